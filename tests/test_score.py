"""What the score stage adds to the scorer's answers. The stage itself runs in the tests with a broker."""

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from test_fold import events_of, run
from tiny import PLATFORMS, make_model, make_stream

from models.config import Settings
from models.events import CanonicalEvent, ScoreRecord, platform_code
from models.scorer import Scorer
from models.state import empty_rows
from streams.arena import Arena
from streams.commit import KillSwitch
from streams.metrics import Metrics
from streams.model_feed import ModelFeed
from streams.score import COLD_EVENTS, ScoreStage, is_cold, one_a_user


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
        records = [SimpleNamespace(key=key, timestamp=0) for key in keys]
        encoded, _ = stage._encode(canonical, records, *stage._fold_and_score(0, part, keys), 0)
        out += [msgspec.json.decode(value) for _, value, _, _ in encoded]
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
