"""The oracle: reads what a worker left in Kafka and says whether the promises held, whatever it went through.

    ledger (what the test sent) ─┐
    events, scores, dead_letters ┼─► read() ─► World ─► check() ─► Report ─► assert_ok()
    changelog, group's offsets ──┘

It shares with the worker the record types and `models.fold`; reading, decoding and bookkeeping are its own and plain.
A disruption is a crash or a revocation that the test has declared, by its wall-clock time. Only then may anything be
there twice, and only what was first written within `repeat_window_ms` before it.

Laws, and the Report's list for each:
  lost            a record in the ledger or in `events` that has no score, no dead letter, and is no duplicate
  misjudged       refused what the ledger expects accepted, or the reverse; a dead letter with other bytes
  repeated        a score, an event or a dead letter more often than it should be, and no disruption explains it
  strange         a score, dead letter or event that nothing in the ledger or in `events` accounts for, or that disagrees
  corrupt_rows    a changelog row, any that was ever written, that is no row or differs from the replay of `events` up to
                  its applied offset, in any byte but those of `h` and `h_version`
  stale_rows      a user whose newest row is behind: behind the committed offsets, or behind the end where all is done
  drifted         `h` more than 1e-4 from the replay's, where one model served throughout
  over_committed  a committed offset past a record whose results are not all there
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from models.config import FoldConfig, KafkaConfig, TopicsConfig
from models.errors import StateError
from models.events import CanonicalEvent, DeadLetter, ScoreRecord, to_columns
from models.fold import DUPLICATE, N_FEATURES, fold, fold_params
from models.scorer import Scorer
from models.state import decode_row, empty_rows, row_dtype
from streams.kafka import client_options, connected, end_offsets

H_TOLERANCE = 1e-4
P_TOLERANCE = 1e-4
H_FIELDS = ("h", "h_version")

Expect = Literal["accept", "refuse", "duplicate"]
Place = tuple[str, int, int]
"""topic, partition, offset"""


# -- what was sent


class Sent(NamedTuple):
    """One raw record of the producer. `duplicate`: accepted at ingest, and dropped by the fold for its `event_id`."""

    topic: str
    partition: int
    offset: int
    sha256: str
    expect: Expect
    event_id: str | None


class Ledger(list[Sent]):
    """Everything that the test has sent and Kafka has acknowledged."""

    def add(self, meta: Any, value: bytes, expect: Expect, event_id: str | None = None) -> None:
        """`meta`: the RecordMetadata of the send. `event_id` None only for a record that must be refused."""
        assert (event_id is None) == (expect == "refuse"), "a record is refused, or it has an event_id"
        sha256 = hashlib.sha256(value).hexdigest()
        self.append(Sent(meta.topic, meta.partition, meta.offset, sha256, expect, event_id))


# -- what there is


@dataclass
class World:
    """The topics from offset 0 to their ends, and the offsets that the group has committed."""

    topics: TopicsConfig
    partitions: dict[str, list[list[ConsumerRecord]]]
    """topic → partition → records in offset order: `events`, `scores`, `dead_letters` and the changelog."""
    changelog: str
    committed: dict[TopicPartition, int]
    """By every topic of the group; a partition without a committed offset is absent."""
    size: str = "cpu"


async def read(
    kafka: KafkaConfig, topics: TopicsConfig, app_id: str, sources: Iterable[str] = (), size: str = "cpu"
) -> World:
    """Everything, by a plain consumer of its own. `sources`: the platforms' topics, for the committed offsets."""
    changelog = f"{app_id}-user_state-changelog"
    names = [topics.events, topics.scores, topics.dead_letters, changelog]
    partitions = await read_topics(kafka, names)
    places = await _partitions_of(kafka, [topics.events, *sources])
    committed = await committed_offsets(kafka, app_id, places)
    return World(topics, partitions, changelog, committed, size)


async def read_topics(kafka: KafkaConfig, names: list[str]) -> dict[str, list[list[ConsumerRecord]]]:
    """topic → partition → every record from offset 0 to the end that it has now."""
    places = await _partitions_of(kafka, names)
    async with connected(kafka) as client:
        ends = await end_offsets(client, places)
    found: dict[str, list[list[ConsumerRecord]]] = {name: [] for name in names}
    for tp in sorted(places):
        found[tp.topic].append([])
    consumer = AIOKafkaConsumer(**client_options(kafka), enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    try:
        unread = {tp for tp in places if ends[tp] > 0}
        if unread:
            consumer.assign(sorted(unread))
            await consumer.seek_to_beginning(*unread)
        until = time.monotonic() + 60
        while unread:
            assert time.monotonic() < until, f"the oracle cannot read {sorted(unread)} to their ends"
            for tp, records in (await consumer.getmany(*unread, timeout_ms=200)).items():
                found[tp.topic][tp.partition].extend(r for r in records if r.offset < ends[tp])
            unread = {tp for tp in unread if await consumer.position(tp) < ends[tp]}
    finally:
        await consumer.stop()
    return found


async def _partitions_of(kafka: KafkaConfig, names: Iterable[str]) -> list[TopicPartition]:
    async with connected(kafka) as client:
        cluster = await client.fetch_all_metadata()
    return [TopicPartition(name, p) for name in names for p in sorted(cluster.partitions_for_topic(name) or ())]


async def committed_offsets(kafka: KafkaConfig, group: str, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
    """What the group has committed, read by a member that is never assigned anything."""
    consumer = AIOKafkaConsumer(**client_options(kafka), group_id=group, enable_auto_commit=False)
    await consumer.start()  # no subscription: it looks up the coordinator and never joins
    try:
        found = {tp: await consumer.committed(tp) for tp in partitions}
    finally:
        await consumer.stop()
    return {tp: offset for tp, offset in found.items() if offset is not None and offset >= 0}


# -- the replay


class Event(NamedTuple):
    """A canonical event where it lies."""

    partition: int
    offset: int
    key: bytes
    timestamp_ms: int
    value: CanonicalEvent


class Replay(NamedTuple):
    """`events` folded by one thread, from nothing."""

    events: list[Event]
    not_canonical: list[ConsumerRecord]
    status: np.ndarray
    """(n,) of models/fold.py, by event."""
    users: dict[tuple[int, bytes], int]
    """(partition, key) → slot."""
    slots: np.ndarray
    columns: np.ndarray
    rows: np.ndarray
    """By slot, after the last event; `h` by the model that is given, else 0."""
    p: np.ndarray | None
    """(n, 3) scores of the model that is given."""


def replay(world: World, fold_config: FoldConfig, scorer: Scorer | None = None) -> Replay:
    """Event by event of each partition in offset order."""
    events, not_canonical = _canonical(world.partitions[world.topics.events])
    users: dict[tuple[int, bytes], int] = {}
    slots = np.array([users.setdefault((e.partition, e.key), len(users)) for e in events], np.int64)
    columns = to_columns([e.value for e in events], np.array([e.offset for e in events], np.int64))
    rows = empty_rows(len(users), world.size)
    p = None
    if scorer is None:
        status = _fold(rows, slots, columns, fold_config)
    else:
        scores, status = scorer.run(rows, slots, columns)
        p = scores.p_N3
    return Replay(events, not_canonical, status, users, slots, columns, rows, p)


def _canonical(partitions: list[list[ConsumerRecord]]) -> tuple[list[Event], list[ConsumerRecord]]:
    decoder = msgspec.json.Decoder(CanonicalEvent)
    good, bad = [], []
    for records in partitions:
        for r in records:
            try:
                event = decoder.decode(r.value or b"")
            except (msgspec.DecodeError, UnicodeDecodeError):
                bad.append(r)
                continue
            if r.key != event.user.encode():
                bad.append(r)
            else:
                good.append(Event(r.partition, r.offset, r.key, r.timestamp, event))
    return good, bad


def _fold(rows: np.ndarray, slots: np.ndarray, columns: np.ndarray, fold_config: FoldConfig) -> np.ndarray:
    n = len(columns)
    features, dt_s, status = np.empty((n, N_FEATURES), np.float32), np.empty(n, np.float32), np.empty(n, np.uint8)
    fold(rows, slots, columns, fold_params(fold_config), features, dt_s, status)
    return status


# -- the verdict


@dataclass
class Report:
    """Violations, law by law; `info` is for people. Empty lists: the laws held."""

    lost: list[str] = field(default_factory=list)
    misjudged: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    corrupt_rows: list[str] = field(default_factory=list)
    stale_rows: list[str] = field(default_factory=list)
    drifted: list[str] = field(default_factory=list)
    over_committed: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def violations(self) -> dict[str, list[str]]:
        """Law → what broke it, only those that were broken."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "info"}
        return {name: found for name, found in named.items() if found}

    def assert_ok(self) -> None:
        """Raises AssertionError with the first few of each."""
        broken = [f"{name} ({len(found)}):\n    " + "\n    ".join(found[:5]) for name, found in self.violations.items()]
        assert not broken, "the oracle found\n  " + "\n  ".join(broken) + f"\n  info: {self.info}"


class Disruptions(NamedTuple):
    """Wall-clock times (ms) of declared crashes and revocations; what was first written within the window before one
    (or after, until `grace_ms` later: a worker that is told to go still finishes) may be there again."""

    times_ms: list[int]
    window_ms: int
    grace_ms: int = 0

    def explain(self, first_ms: int) -> bool:
        """Whether what was first written at `first_ms` may have been written again."""
        return any(t - self.window_ms <= first_ms <= t + self.grace_ms for t in self.times_ms)

    def explain_event(self, arrived_ms: int, handled_ms: int | None) -> bool:
        """The same of an event, which keeps the time of its raw record: it was there before the disruption, and it was
        written, so handled, no earlier than a window before it. None: not handled yet."""
        return any(
            arrived_ms <= t + self.grace_ms and (handled_ms is None or t - self.window_ms <= handled_ms)
            for t in self.times_ms
        )

    def after(self, ms: int) -> int:
        """How many came after `ms`."""
        return sum(t >= ms for t in self.times_ms)


def check(
    world: World,
    ledger: Ledger,
    *,
    disruptions: list[int] | None = None,
    repeat_window_ms: int = 0,
    grace_ms: int = 0,
    complete: bool = True,
    fold_config: FoldConfig | None = None,
    scorer: Scorer | None = None,
) -> Report:
    """All laws. `complete`: the worker had time for everything and was drained, so nothing may be missing at all; False:
    what lies past the committed offsets may be. `scorer`: of the one model that served throughout."""
    report = Report()
    allowed = Disruptions(disruptions or [], repeat_window_ms, grace_ms)
    fold_config = fold_config or FoldConfig()
    scores = _scores(world, report)
    letters = _letters(world, report)
    past = replay(world, fold_config, scorer)
    homes = Counter(key for _, key in past.users)
    report.strange += [f"{key.decode()} has events in {n} partitions" for key, n in homes.items() if n > 1]
    missing = _check_scores(world, past, scores, letters, allowed, complete, report)
    _check_ingest(world, ledger, past, scores, letters, allowed, complete, report)
    _check_rows(world, past, fold_config, complete, scorer is not None, report)
    _check_events_offsets(world, past, missing, report)
    if past.p is not None:
        _check_probabilities(past, scores, report)
    report.info |= {
        "events": len(past.events),
        "users": len(past.users),
        "scores": sum(map(len, scores.values())),
        "scores_repeated": sum(map(len, scores.values())) - int((past.status != DUPLICATE).sum()) + len(missing),
        "events_repeated": len(past.events) - sum(s.event_id is not None for s in ledger),
        "duplicates": int((past.status == DUPLICATE).sum()),
        "dead_letters": sum(map(len, letters.values())),
        "changelog_rows": sum(map(len, world.partitions[world.changelog])),
        "committed": {f"{tp.topic}[{tp.partition}]": offset for tp, offset in sorted(world.committed.items())},
    }
    return report


class Score(NamedTuple):
    partition: int
    record: ScoreRecord


def _scores(world: World, report: Report) -> dict[str, list[Score]]:
    """event_id → its scores, oldest first."""
    decoder = msgspec.json.Decoder(ScoreRecord)
    found: dict[str, list[Score]] = defaultdict(list)
    for records in world.partitions[world.topics.scores]:
        for r in records:
            try:
                score = decoder.decode(r.value or b"")
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                report.strange.append(f"{_at(r)}: no score record: {error}")
                continue
            if r.key != score.user.encode():
                report.strange.append(f"{_at(r)}: the key of the score is not its user")
            found[score.event_id].append(Score(r.partition, score))
    return found


class Letter(NamedTuple):
    meta: DeadLetter
    sha256: str
    record: ConsumerRecord


def _letters(world: World, report: Report) -> dict[Place, list[Letter]]:
    """Place of the refused record → its dead letters."""
    found: dict[Place, list[Letter]] = defaultdict(list)
    for records in world.partitions[world.topics.dead_letters]:
        for r in records:
            try:
                meta = msgspec.convert({k: v.decode() for k, v in r.headers}, DeadLetter, strict=False)
            except (msgspec.ValidationError, UnicodeDecodeError) as error:
                report.strange.append(f"{_at(r)}: no headers of a dead letter: {error}")
                continue
            sha256 = meta.sha256 or hashlib.sha256(r.value or b"").hexdigest()
            found[meta.source_topic, meta.source_partition, meta.source_offset].append(Letter(meta, sha256, r))
    return found


def _check_scores(
    world: World,
    past: Replay,
    scores: dict[str, list[Score]],
    letters: dict[Place, list[Letter]],
    allowed: Disruptions,
    complete: bool,
    report: Report,
) -> dict[int, int]:
    """Every event has its score. → partition of `events` → first offset whose results are not there."""
    due: dict[str, list[Event]] = defaultdict(list)
    dropped: dict[str, list[Event]] = defaultdict(list)
    missing: list[tuple[int, int, str]] = []
    for event, status in zip(past.events, past.status.tolist(), strict=True):
        event_id = event.value.event_id
        (dropped if status == DUPLICATE else due)[event_id].append(event)
        if status == DUPLICATE and not scores.get(event_id):
            missing.append((event.partition, event.offset, f"{event_id} is a duplicate of one without a score"))
    for event_id, events in due.items():
        got = scores.get(event_id, [])
        missing += [(e.partition, e.offset, f"{event_id} has no score") for e in events[len(got) :]]
        # A duplicate that was dropped before a crash is scored by the replay after it: its offset is applied already.
        replayed = sum(allowed.after(e.timestamp_ms) for e in dropped[event_id])
        times = [s.record.scored_at for s in got]
        _check_repeats(f"score of {event_id}", times, len(events), allowed, report, forgiven=replayed)
        if got:
            _check_agrees(got, events[0], report)
    for event_id in scores.keys() - due.keys():
        report.strange.append(f"score of {event_id}: no such event in `events`")
    for r in past.not_canonical:
        if (r.topic, r.partition, r.offset) not in letters:
            missing.append((r.partition, r.offset, "not canonical and no dead letter"))
    first: dict[int, int] = {}
    for partition, offset, what in sorted(missing):
        first.setdefault(partition, offset)
        committed = world.committed.get(TopicPartition(world.topics.events, partition), 0)
        if complete or offset < committed:
            report.lost.append(f"{world.topics.events}[{partition}] offset {offset}: {what}")
    return first


def _check_agrees(got: list[Score], event: Event, report: Report) -> None:
    want = event.value
    for partition, s in got:
        if (s.user, s.platform, s.ts, partition) != (want.user, want.platform, want.ts, event.partition):
            report.strange.append(f"score of {s.event_id}: user, platform, ts or partition differ from the event's")
        p = [s.p.click, s.p.purchase, s.p.return_]
        if any(x is not None and not 0.0 <= x <= 1.0 for x in p):
            report.strange.append(f"score of {s.event_id}: p {p} is no probability")


def _check_repeats(
    what: str, times_ms: list[int], due: int, allowed: Disruptions, report: Report, forgiven: int = 0
) -> None:
    """More than `due` copies need a disruption soon after each earlier copy, but for so many as are forgiven."""
    earlier = sorted(times_ms)[: max(0, len(times_ms) - due)]
    unexplained = [first_ms for first_ms in earlier if not allowed.explain(first_ms)]
    if len(unexplained) > forgiven:
        report.repeated.append(
            f"{what}: written at {sorted(times_ms)} ms, {due} due; no disruption follows those of {unexplained} ms "
            f"(they were at {allowed.times_ms} ms)"
        )


def _check_ingest(
    world: World,
    ledger: Ledger,
    past: Replay,
    scores: dict[str, list[Score]],
    letters: dict[Place, list[Letter]],
    allowed: Disruptions,
    complete: bool,
    report: Report,
) -> None:
    """Every record of the ledger became one event or one dead letter; each of these came of one record."""
    in_events: dict[str, list[Event]] = defaultdict(list)
    copies: dict[str, list[tuple[int, int | None]]] = defaultdict(list)
    for event, handled_ms in zip(past.events, _handled_ms(past, scores), strict=True):
        in_events[event.value.event_id].append(event)
        copies[event.value.event_id].append((event.timestamp_ms, handled_ms))
    sent_ids = Counter(sent.event_id for sent in ledger if sent.event_id is not None)
    seen: Counter[str] = Counter()
    first_missing: dict[TopicPartition, int] = {}
    for sent in sorted(ledger, key=lambda s: (s.topic, s.partition, s.offset)):
        place = (sent.topic, sent.partition, sent.offset)
        here = letters.get(place, [])
        if sent.event_id is None:
            there = bool(here)
        else:
            seen[sent.event_id] += 1
            there = len(in_events[sent.event_id]) >= seen[sent.event_id] or sent.topic == world.topics.events
            if here:
                report.misjudged.append(f"{place}: {sent.event_id} is refused ({here[0].meta.reason}), expected accepted")
                there = True
        if not there:
            tp = TopicPartition(sent.topic, sent.partition)
            first_missing.setdefault(tp, sent.offset)
            if complete or sent.offset < world.committed.get(tp, 0):
                report.lost.append(f"{place}: {sent.event_id or 'to be refused'}: neither in `events` nor a dead letter")
        if any(letter.sha256 != sent.sha256 for letter in here):
            report.misjudged.append(f"{place}: its dead letter has other bytes")
        _check_repeats(f"dead letter of {place}", [x.meta.refused_at for x in here], 1, allowed, report)
    for event_id in in_events:
        if event_id not in sent_ids:
            report.strange.append(f"{event_id} is in `events` and nobody has sent it")
        else:
            _check_ingested_once(event_id, copies[event_id], sent_ids[event_id], allowed, report)
    sent_places = {(s.topic, s.partition, s.offset) for s in ledger}
    for place in letters.keys() - sent_places:
        report.strange.append(f"dead letter of {place}: nobody has sent that record")
    _check_duplicates(ledger, past, in_events, report)
    for tp, offset in first_missing.items():
        if world.committed.get(tp, 0) > offset:
            report.over_committed.append(f"{tp.topic}[{tp.partition}]: committed {world.committed[tp]}, {offset} is lost")


def _handled_ms(past: Replay, scores: dict[str, list[Score]]) -> list[int | None]:
    """By event, when a worker had it first: it was scored, or the next of its partition that has a score was. None: no
    such one yet."""
    handled: list[int | None] = [None] * len(past.events)
    following: dict[int, int] = {}
    for i in range(len(past.events) - 1, -1, -1):
        event = past.events[i]
        if past.status[i] != DUPLICATE and (got := scores.get(event.value.event_id)):
            following[event.partition] = min(s.record.scored_at for s in got)
        handled[i] = following.get(event.partition)
    return handled


def _check_ingested_once(
    event_id: str, copies: list[tuple[int, int | None]], due: int, allowed: Disruptions, report: Report
) -> None:
    """`copies`: (arrived, handled) of each in `events`, in their order. Each that is too much is of an earlier one that a
    disruption explains; which one it repeats cannot be told where the producer itself sent the event twice."""
    explained = sum(allowed.explain_event(*copy) for copy in copies[:-1])
    if len(copies) - due > explained:
        report.repeated.append(
            f"event {event_id}: {len(copies)} times in `events`, {due} due; (arrived, handled) at {copies} ms, disruptions "
            f"at {allowed.times_ms} ms explain {explained}"
        )


def _check_duplicates(ledger: Ledger, past: Replay, in_events: dict[str, list[Event]], report: Report) -> None:
    """What the ledger calls a duplicate is dropped, and nothing else is (but what ingest sent again after a crash)."""
    sent: dict[str, Counter[str]] = defaultdict(Counter)
    for s in ledger:
        if s.event_id is not None:
            sent[s.event_id][s.expect] += 1
    dropped = Counter(
        e.value.event_id for e, status in zip(past.events, past.status.tolist(), strict=True) if status == DUPLICATE
    )
    for event_id, expected in sent.items():
        if len(in_events[event_id]) == expected.total() and dropped[event_id] != expected["duplicate"]:
            report.misjudged.append(
                f"{event_id}: {dropped[event_id]} dropped as duplicates, expected {expected['duplicate']}"
            )


def _check_rows(
    world: World, past: Replay, fold_config: FoldConfig, complete: bool, one_model: bool, report: Report
) -> None:
    """Every row ever written equals the replay up to its applied offset, and the newest is new enough."""
    written = _written_rows(world, past, report)
    _compare_prefixes(world, past, written, fold_config, report)
    newest = {slot: rows[max(rows)] for slot, rows in written.items()}
    offsets_of: dict[int, list[int]] = defaultdict(list)
    for slot, event in zip(past.slots.tolist(), past.events, strict=True):
        offsets_of[slot].append(event.offset)
    for (partition, key), slot in past.users.items():
        committed = world.committed.get(TopicPartition(world.topics.events, partition), 0)
        due = [offset for offset in offsets_of[slot] if complete or offset < committed]
        if not due:
            continue
        applied = max(written.get(slot, {-1: None}))
        if applied < due[-1]:
            state = "no row" if applied < 0 else f"a row applied up to {applied}"
            report.stale_rows.append(f"{key.decode()} in partition {partition}: {state}, {due[-1]} is due")
        elif one_model and complete:
            drift = float(np.abs(newest[slot]["h"] - past.rows[slot]["h"]).max())
            if not drift <= H_TOLERANCE:
                report.drifted.append(f"{key.decode()}: h is {drift:.2e} from the replay's")


def _written_rows(world: World, past: Replay, report: Report) -> dict[int, dict[int, np.void]]:
    """slot → applied offset → the row that was written last for it. Rows of one applied offset must not differ."""
    written: dict[int, dict[int, np.void]] = defaultdict(dict)
    for records in world.partitions[world.changelog]:
        for r in records:
            slot = past.users.get((r.partition, r.key))
            if slot is None:
                report.corrupt_rows.append(f"{_at(r)}: a row of a user without events in that partition")
                continue
            try:
                body = decode_row(r.value or b"", world.size)
            except StateError as error:
                report.corrupt_rows.append(f"{_at(r)}: {error}")
                continue
            row = np.frombuffer(body, row_dtype(world.size))[0]
            applied = int(row["applied_offset"])
            other = written[slot].get(applied)
            if other is not None and (unlike := _differing_fields(row, other)):
                report.corrupt_rows.append(f"{_at(r)}: {unlike} differ from an earlier row of the same applied offset")
            written[slot][applied] = row
    return written


def _compare_prefixes(
    world: World, past: Replay, written: dict[int, dict[int, np.void]], fold_config: FoldConfig, report: Report
) -> None:
    """Replays round by round: in each, every user up to the next of its rows' applied offsets."""
    rows = empty_rows(len(past.users), world.size)
    stops = {slot: sorted(of) for slot, of in written.items()}
    done = np.full(len(past.users), -1, np.int64)
    names = {slot: user for user, slot in past.users.items()}
    for turn in range(max(map(len, stops.values()), default=0)):
        until = done.copy()
        for slot, of in stops.items():
            if turn < len(of):
                until[slot] = of[turn]
        offset = past.columns["offset"]
        now = (offset > done[past.slots]) & (offset <= until[past.slots])
        _fold(rows, past.slots[now], past.columns[now], fold_config)
        done = until
        for slot, of in stops.items():
            if turn < len(of) and (unlike := _differing_fields(written[slot][of[turn]], rows[slot])):
                partition, key = names[slot]
                report.corrupt_rows.append(
                    f"{key.decode()} in partition {partition}, applied {of[turn]}: {unlike} differ from the replay"
                )


def _differing_fields(row: np.void, other: np.void) -> list[str]:
    return [name for name in row.dtype.names if name not in H_FIELDS and row[name].tobytes() != other[name].tobytes()]


def _check_events_offsets(world: World, past: Replay, missing: dict[int, int], report: Report) -> None:
    """`events`: nothing committed past an event without its results, or past the end."""
    for partition, records in enumerate(world.partitions[world.topics.events]):
        committed = world.committed.get(TopicPartition(world.topics.events, partition), 0)
        end = records[-1].offset + 1 if records else 0
        limit = min(missing.get(partition, end), end)
        if committed > limit:
            report.over_committed.append(
                f"{world.topics.events}[{partition}]: committed {committed}, results are there before {limit} only"
            )


def _check_probabilities(past: Replay, scores: dict[str, list[Score]], report: Report) -> None:
    """An event that was scored once has the replay's score. (A repeat speaks of the state as it then was.)"""
    occurrences = Counter(e.value.event_id for e in past.events)
    for event, want in zip(past.events, past.p.tolist(), strict=True):
        got = scores.get(event.value.event_id, [])
        if len(got) != 1 or occurrences[event.value.event_id] != 1:
            continue
        p = got[0].record.p
        for have, due in zip((p.click, p.purchase, p.return_), want, strict=True):
            if (have is None) != (due != due) or (have is not None and abs(have - due) > P_TOLERANCE):
                report.drifted.append(f"score of {event.value.event_id}: p {have}, the replay's is {due}")


def _at(r: ConsumerRecord) -> str:
    return f"{r.topic}[{r.partition}] offset {r.offset}"
