"""What the score stage adds to the scorer's answers. The stage itself runs in the tests with a broker."""

import msgspec
import numpy as np
import pytest
from aiokafka.structs import ConsumerRecord
from faust.types import TP
from test_fold import events_of, run
from test_ingest import Sent
from tiny import PLATFORMS, make_model, make_stream

from models.config import Settings
from models.errors import CrosscurrentError
from models.events import CanonicalEvent, ScoreRecord, platform_code
from models.scorer import Scorer
from models.state import empty_rows
from streams.arena import Arena
from streams.codec import decode_columns, encode_json
from streams.commit import KillSwitch
from streams.metrics import Metrics
from streams.model_feed import ModelFeed
from streams.score import COLD_EVENTS, ScoreStage, is_cold, one_a_user
from streams.wire import Spans


@pytest.mark.parametrize("cuts", [[6], [1, 5], [1, 1, 1, 1, 1, 1], [4, 2]])
def test_cold_is_a_matter_of_the_event_and_not_of_its_batch(cuts):
    rows, events = empty_rows(1), events_of(*({"ts": 1_700_000_000_000 + i} for i in range(6)))
    features = np.concatenate([run(rows, part)[0] for part in np.split(events, np.cumsum(cuts)[:-1])])
    assert is_cold(features).tolist() == [n <= COLD_EVENTS for n in range(1, 7)]


# ── explanations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def stage(explain: int, prior: bool = False) -> ScoreStage:
    """A real stage but for Kafka."""
    feed = ModelFeed(Settings(), Metrics())
    if not prior:
        feed.current = Scorer(make_model(), "cpu")
    return ScoreStage(
        Arena(), feed, None, None, Metrics(), KillSwitch(None), scores_topic="scores", dead_letters_topic="dead_letters",
        partitions=4, heads={"beta": ("purchase",)}, explain=explain,
    )  # fmt: skip


def scored(stage: ScoreStage, batches: int = 3) -> list[dict]:
    """The records of a stream of a dozen users on known and unknown platforms, many of them twice in a batch."""
    names = {platform_code(name): name for name in (*PLATFORMS, "unheard of")}
    out = []
    events, slots = make_stream(240, 12)
    for part, users in zip(np.split(events, batches), np.split(slots, batches), strict=True):
        keys = [f"k1{user:022d}".encode() for user in users.tolist()]
        canonical = [
            CanonicalEvent(event_id=str(i), platform=names[code], user=key.decode(), kind="view", ts=ts)
            for i, (code, key, ts) in enumerate(zip(part["platform"].tolist(), keys, part["ts"].tolist(), strict=True))
        ]
        spans, values = Spans.of(keys), Spans.of([encode_json(event) for event in canonical])
        decoded = decode_columns(spans, values, part["offset"])._replace(columns=part)  # with its repeats
        _, encoded = stage._encode(decoded, *stage._fold_and_score(stage._arena.slots(0, spans), part), 0)
        out += [msgspec.json.decode(value) for value in encoded.tolist()]
    return out


def test_a_score_that_explains_itself_is_the_same_score():
    plain, explained = scored(stage(explain=0)), scored(stage(explain=2))
    assert len(plain) == len(explained) > 200
    for ours, theirs in zip(explained, plain, strict=True):
        reasons = ours.pop("explain")
        assert [one["head"] for one in reasons] == [
            head for head in ("click", "purchase", "return") if ours["p"][head] is not None
        ]
        assert all(len(one["features"]) == 2 for one in reasons)
        assert "explain" not in theirs
        for head, p in ours.pop("p").items():
            assert p == pytest.approx(theirs["p"][head], abs=3e-6) if p is not None else theirs["p"][head] is None
        assert {k: ours[k] for k in ("event_id", "cold", "user")} == {k: theirs[k] for k in ("event_id", "cold", "user")}
    assert {msgspec.json.decode(msgspec.json.encode(r), type=ScoreRecord).explain for r in plain} == {msgspec.UNSET}


def test_constants_have_no_reasons():
    assert not any("explain" in record for record in scored(stage(explain=2, prior=True)))


@pytest.mark.parametrize("slots", [[4], [1, 2, 3], [5, 5, 5], [2, 9, 2, 9, 9, 1]])
def test_one_event_of_a_user_at_a_time_and_each_in_its_order(slots):
    slots = np.array(slots)
    rounds = list(one_a_user(slots))
    assert sorted(np.concatenate(rounds).tolist()) == list(range(len(slots)))
    assert all(len(np.unique(slots[at])) == len(at) for at in rounds)
    for user in slots:
        mine = [i for at in rounds for i in at.tolist() if slots[i] == user]
        assert mine == sorted(mine)


# ── several partitions in one micro-batch ────────────────────────────────────────────────────────────────────────────


def fetched_of(partition: int, n: int, seed: int) -> list[tuple[TP, list]]:
    """`n` records of a partition, in two parts: some users twice, some events repeated, some records not canonical."""
    rng, records = np.random.default_rng(seed), []
    for i in range(n):
        event_id = f"{partition}-{i if rng.random() < 0.9 else 0}"
        user = f"k1{partition:02d}{rng.integers(5):020d}"
        event = CanonicalEvent(event_id=event_id, platform="beta", user=user, kind="view", ts=10**12 + i)
        value = encode_json(event) if i % 7 != 3 else b"{"
        records.append(ConsumerRecord("events", partition, i, i, 0, user.encode(), value, None, 0, 0, ()))
    tp = TP("events", partition)
    return [(tp, records[: n // 3]), (tp, records[n // 3 :])]


def outcome(parts_of_batches: list[list[tuple[TP, list]]]) -> tuple[Sent, ScoreStage]:
    kept, made = Sent(), stage(explain=0)
    made._sender = made._committer = kept
    for parts in parts_of_batches:
        made.process(parts)
    return kept, made


def test_partitions_scored_at_once_are_scored_as_one_by_one():
    partitions = [fetched_of(p, 30, seed=p) for p in range(4)]
    apart, _ = outcome([[part] for parts in partitions for part in parts])
    joint, made = outcome([[part for parts in partitions for part in parts]])
    assert made.joins_partitions
    assert joint.next_offset == apart.next_offset == {TP("events", p): 30 for p in range(4)}
    assert joint.records.keys() == apart.records.keys() == {(t, p) for t in ("scores", "dead_letters") for p in range(4)}
    for (topic, partition), theirs in apart.records.items():
        ours = joint.records[topic, partition]
        assert [record[0] for record in ours] == [record[0] for record in theirs]
        if topic == "scores":
            for one, other in zip(ours, theirs, strict=True):
                one, other = msgspec.json.decode(one[1]), msgspec.json.decode(other[1])
                del one["scored_at"], other["scored_at"]
                assert one.pop("p") == pytest.approx(other.pop("p"), abs=3e-6)
                assert one == other
        else:
            assert [record[1] for record in ours] == [record[1] for record in theirs]
    for tp, sends in joint.claimed.items():  # the commit of a partition waits for its own sends, and all of them
        assert sorted(send[:2] for send in sends) == sorted(
            [("scores", tp.partition)] * 2 + [("dead_letters", tp.partition)] * 2
        )


def test_a_gap_between_the_parts_of_a_partition_stops_the_worker():
    (tp, first), (_, second) = fetched_of(0, 30, seed=1)
    with pytest.raises(CrosscurrentError, match="offset 11 came where 10 was due"):
        outcome([[(tp, first), (tp, second[1:])]])


def test_a_card_that_was_too_full_for_a_model_is_counted(monkeypatch):
    """Found out while the model loads, so no batch tells."""

    class Tight(Scorer):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            self.out_of_memory, self.at_once = 2, 2048

    metrics = Metrics()
    feed = ModelFeed(Settings(), metrics)
    assert metrics.device_out_of_memory._value.get() == 0
    monkeypatch.setattr("streams.model_feed.Scorer", Tight)
    assert feed._scorer(make_model()).at_once == 2048
    assert metrics.device_out_of_memory._value.get() == 2
