"""The stage `ingest`: any platform's records → canonical events under pseudonyms, or dead letters with the reason.

    platform topic ─► Canonicaliser ─► pseudonym (of the person, where linked) ─► partition ─► `events`
                           │ not sure                   ▲
                           └──► Platform.canonicalise ──┘
                                        └─ EventRefused ─► `dead_letters`

Holds no user state. Knows platforms and pseudonyms; not rows, models or what becomes of an event.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
from faust.types import TP

from models.errors import EventRefused
from models.events import PSEUDONYM_LENGTH
from streams import canonical
from streams.canonical import Canonicaliser
from streams.codec import encode_json, partitions_of_rows
from streams.commit import Committer, Sender
from streams.dead_letters import dead_letter
from streams.identities import Identities
from streams.metrics import Metrics
from streams.platforms import Platform
from streams.pseudonym import Pseudonymiser
from streams.wire import Spans

_OLDEST_KEPT_MS = 3_600_000


class Accepted(NamedTuple):
    """The canonical events of a batch, n of them, in the order of their records."""

    ts_ms: np.ndarray
    """int64 (n,): event times."""
    times_ms: np.ndarray
    """int64 (n,): Kafka times. An event keeps the time at which it reached Kafka, so that latency is measured from there;
    a time that retention would act on is not taken over."""
    users: np.ndarray
    """uint8 (n, 24): the keys."""
    values: Spans


class IngestStage:
    """One micro-batch at a time: `process` takes records in and registers everything that comes of them."""

    def __init__(
        self,
        platforms: list[Platform],
        pseudonymiser: Pseudonymiser,
        identities: Identities,
        sender: Sender,
        committer: Committer,
        metrics: Metrics,
        *,
        events_topic: str,
        dead_letters_topic: str,
        partitions: int,
        future_tolerance_s: float,
    ) -> None:
        canonicalisers = [Canonicaliser(platform, pseudonymiser) for platform in platforms]
        self._by_topic = {topic: one for one in canonicalisers for topic in one.platform.topics}
        self._pseudonymiser = pseudonymiser
        self._identities = identities
        self._sender = sender
        self._committer = committer
        self._metrics = metrics
        self._events_topic = events_topic
        self._dead_letters_topic = dead_letters_topic
        self._partitions = partitions
        self._future_tolerance_ms = int(future_tolerance_s * 1000)
        self.latest_ts: dict[TP, int] = {}
        """Greatest event time (ms) accepted from each source partition."""

    joins_partitions = False
    """It would gain nothing: what it costs is by the event."""

    def process(self, parts: Sequence[tuple[TP, Sequence[Any]]]) -> list[Any]:
        """Canonicalises records of source partitions. Returns the tasks of its sends; nothing is awaited."""
        return [send for tp, records in parts for send in self._process(tp, records)]

    def _process(self, tp: TP, records: Sequence[Any]) -> list[Any]:
        canonicaliser = self._by_topic[tp.topic]
        now_ms = int(time.time() * 1000)
        with self._metrics.stage["canonicalise"].time():
            events, refused = self._canonicalise(canonicaliser, tp, records, now_ms)
        with self._metrics.stage["send"].time():
            sends = self._send_events(events) + self._send_refused(refused, now_ms)
        for send in sends:
            self._committer.register(send)
        self._committer.processed(tp, records[-1].offset + 1)
        self._count(canonicaliser.platform.name, len(events.ts_ms), refused)
        if len(events.ts_ms):
            self.latest_ts[tp] = max(self.latest_ts.get(tp, 0), int(events.ts_ms.max()))
        return sends

    def _canonicalise(
        self, canonicaliser: Canonicaliser, tp: TP, records: Sequence[Any], now_ms: int
    ) -> tuple[Accepted, list[tuple[Any, EventRefused]]]:
        """→ (events, the refused)."""
        values, offsets, arrived_ms = columns(records)
        clock = {"now_ms": now_ms, "future_tolerance_ms": self._future_tolerance_ms}
        found = canonicaliser(values, offsets, topic=tp.topic, partition=tp.partition, **clock)
        sure, ts_ms, users, out, user_at = found
        for row in self._identities.resolve_many(users).tolist():
            if sure[row]:
                out.buffer[user_at[row] : user_at[row] + PSEUDONYM_LENGTH] = users[row]
        refused, apart, end = [], [], len(out.buffer)
        for row in np.flatnonzero(~sure).tolist():
            offset, at, length = int(offsets[row]), int(values.at[row]), int(values.length[row])
            value = None if length < 0 else values.buffer[at : at + length].tobytes()
            try:
                event = canonicaliser.platform.canonicalise(
                    value, topic=tp.topic, partition=tp.partition, offset=offset, **clock
                )
            except EventRefused as error:
                # With its traceback it would keep this frame, the fetch in it, and itself.
                refused.append((records[row], error.with_traceback(None)))
                continue
            event.user = self._identities.resolve(self._pseudonymiser.of(canonicaliser.platform.name, event.user))
            json = encode_json(event)
            sure[row], ts_ms[row] = True, event.ts
            users[row] = np.frombuffer(event.user.encode(), np.uint8)
            out.at[row], out.length[row] = end, len(json)
            apart.append(json)
            end += len(json)
        if apart:
            out = out._replace(buffer=np.concatenate([out.buffer, np.frombuffer(b"".join(apart), np.uint8)]))
        fits = (now_ms - _OLDEST_KEPT_MS <= arrived_ms) & (arrived_ms <= now_ms)
        times_ms = np.where(fits, arrived_ms, now_ms)
        if refused:
            ts_ms, times_ms, users = ts_ms[sure], times_ms[sure], users[sure]
            out = Spans(out.buffer, out.at[sure], out.length[sure])
        return Accepted(ts_ms, times_ms, users, out), refused

    def _send_events(self, events: Accepted) -> list[Any]:
        n, values, topic = len(events.users), events.values, self._events_topic
        partitions = partitions_of_rows(events.users, self._partitions)
        ends = np.zeros(self._partitions + 2, np.int64)
        key_at, value_at, times_ms = np.empty((3, n), np.int64)
        key_length, value_length = np.full(n, PSEUDONYM_LENGTH, np.int32), np.empty(n, np.int32)
        _group(partitions, values.at, values.length, events.times_ms, ends, key_at, value_at, value_length, times_ms)
        keys, sends = Spans(events.users.reshape(-1), key_at, key_length), []
        values = Spans(values.buffer, value_at, value_length)
        for partition, (begin, end) in enumerate(pairwise(ends[:-1].tolist())):
            if begin < end:
                rows = slice(begin, end)
                sent = self._sender.send_columns(topic, partition, keys.take(rows), values.take(rows), times_ms[rows])
                sends.append(sent)
        return sends

    def _send_refused(self, refused: list[tuple[Any, EventRefused]], now_ms: int) -> list[Any]:
        by_partition = defaultdict(list)
        for record, error in refused:
            by_partition[record.partition % self._partitions].append(dead_letter(record, "ingest", error, now_ms))
        return [self._sender.send(self._dead_letters_topic, p, out) for p, out in by_partition.items()]

    def _count(self, platform: str, events: int, refused: list[tuple[Any, EventRefused]]) -> None:
        metrics = self._metrics
        metrics.batch_events.labels("ingest").observe(events + len(refused))
        metrics.events.labels(platform, "ingest").inc(events)
        for reason, n in Counter(error.reason for _, error in refused).items():
            metrics.refused.labels(platform, reason, "ingest").inc(n)


@numba.njit(cache=True, nogil=True, _nrt=False)
def _group(partition_N, at_N, length_N, times_N, ends, key_at_N, value_at_N, value_length_N, times_out_N):
    """Events by partition, in their order within one. `ends`: zeros (partitions + 2,); its p becomes where p begins."""
    for i in range(partition_N.size):
        ends[partition_N[i] + 2] += 1
    for p in range(2, ends.size):
        ends[p] += ends[p - 1]
    for i in range(partition_N.size):
        to = ends[partition_N[i] + 1]
        ends[partition_N[i] + 1] = to + 1
        key_at_N[to], times_out_N[to] = i * PSEUDONYM_LENGTH, times_N[i]
        value_at_N[to], value_length_N[to] = at_N[i], length_N[i]


def warm() -> None:
    """Compiles every kernel of the stage into Numba's cache, or loads it from there."""
    canonical.warm()
    none, none32 = np.zeros(0, np.int64), np.zeros(0, np.int32)
    _group(none, none, none32, none, np.zeros(3, np.int64), none, none, none32, none)


def columns(records: Sequence[Any]) -> tuple[Spans, np.ndarray, np.ndarray]:
    """Fetched records (n) → (their values, offsets int64 (n,), Kafka times in ms int64 (n,)). Of records that are columns
    already, their own."""
    if not isinstance(records, list):
        return records.values, records.offset, records.timestamp
    offsets, times_ms = (np.array([getattr(r, name) for r in records], np.int64) for name in ("offset", "timestamp"))
    return Spans.of([record.value for record in records]), offsets, times_ms


class HoldBack:
    """Which source partitions run too far ahead of their platform.

    Where a platform has several topics, a partition that is more than the lateness ahead of the slowest that still has
    something to read is held, so that a backfill of one topic does not make the same users' events of another too late.
    """

    def __init__(self, platforms: list[Platform], lateness_s: float) -> None:
        several = [platform for platform in platforms if len(platform.topics) > 1]
        self._platform = {topic: platform.name for platform in several for topic in platform.topics}
        self._lateness_ms = int(lateness_s * 1000)

    def held(self, latest_ts: dict[TP, int], behind: set[TP]) -> set[TP]:
        """`latest_ts`: greatest event time by partition; `behind`: partitions with unread records. → those to hold."""
        by_platform = defaultdict(list)
        for tp in behind:
            if tp.topic in self._platform:
                by_platform[self._platform[tp.topic]].append(tp)
        out = set()
        for tps in by_platform.values():
            slowest = min(latest_ts.get(tp, 0) for tp in tps)
            out |= {tp for tp in tps if latest_ts.get(tp, 0) - slowest > self._lateness_ms}
        return out
