"""The stage `ingest`: any platform's records → canonical events under pseudonyms, or dead letters with the reason.

    platform topic ─► Platform.canonicalise ─► pseudonym (of the person, where linked) ─► `events`
                              └─ EventRefused ─► `dead_letters`

Holds no user state. Knows platforms and pseudonyms; not rows, models or what becomes of an event.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any

from faust.types import TP

from models.errors import EventRefused
from models.events import CanonicalEvent
from streams.codec import encode_json, partitions_of
from streams.commit import NO_HEADERS, Committer, Sender
from streams.dead_letters import dead_letter
from streams.identities import Identities
from streams.metrics import Metrics
from streams.platforms import Platform
from streams.pseudonym import Pseudonymiser

_OLDEST_KEPT_MS = 3_600_000


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
        self._by_topic = {topic: platform for platform in platforms for topic in platform.topics}
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

    def process(self, tp: TP, records: list[Any]) -> list[Any]:
        """Canonicalises `records` of one source partition. Returns the tasks of its sends; nothing is awaited."""
        platform = self._by_topic[tp.topic]
        now_ms = int(time.time() * 1000)
        with self._metrics.stage["canonicalise"].time():
            events, times_ms, refused = self._canonicalise(platform, tp, records, now_ms)
        with self._metrics.stage["send"].time():
            sends = self._send_events(events, times_ms) + self._send_refused(refused, now_ms)
        for send in sends:
            self._committer.register(send)
        self._committer.processed(tp, records[-1].offset + 1)
        self._count(platform, events, refused)
        if events:
            self.latest_ts[tp] = max(self.latest_ts.get(tp, 0), max(event.ts for event in events))
        return sends

    def _canonicalise(
        self, platform: Platform, tp: TP, records: list[Any], now_ms: int
    ) -> tuple[list[CanonicalEvent], list[int], list[tuple[Any, EventRefused]]]:
        """→ (events, their Kafka times in ms, the refused). An event keeps the time at which it reached Kafka, so that
        latency is measured from there; a time that retention would act on is not taken over."""
        events, times_ms, refused = [], [], []
        oldest_ms = now_ms - _OLDEST_KEPT_MS
        pseudonym, resolve = self._pseudonymiser.of, self._identities.resolve
        for record in records:
            try:
                event = platform.canonicalise(
                    record.value,
                    topic=tp.topic,
                    partition=tp.partition,
                    offset=record.offset,
                    now_ms=now_ms,
                    future_tolerance_ms=self._future_tolerance_ms,
                )
            except EventRefused as error:
                refused.append((record, error))
            else:
                event.user = resolve(pseudonym(platform.name, event.user))
                events.append(event)
                times_ms.append(record.timestamp if oldest_ms <= record.timestamp <= now_ms else now_ms)
        return events, times_ms, refused

    def _send_events(self, events: list[CanonicalEvent], times_ms: list[int]) -> list[Any]:
        if not events:
            return []
        users = [event.user.encode() for event in events]
        by_partition = defaultdict(list)
        partitions = partitions_of(users, self._partitions).tolist()
        for user, event, time_ms, partition in zip(users, events, times_ms, partitions, strict=True):
            by_partition[partition].append((user, encode_json(event), time_ms, NO_HEADERS))
        return [self._sender.send(self._events_topic, p, out) for p, out in by_partition.items()]

    def _send_refused(self, refused: list[tuple[Any, EventRefused]], now_ms: int) -> list[Any]:
        by_partition = defaultdict(list)
        for record, error in refused:
            by_partition[record.partition % self._partitions].append(dead_letter(record, "ingest", error, now_ms))
        return [self._sender.send(self._dead_letters_topic, p, out) for p, out in by_partition.items()]

    def _count(self, platform: Platform, events: list[Any], refused: list[tuple[Any, EventRefused]]) -> None:
        metrics = self._metrics
        metrics.batch_events.labels("ingest").observe(len(events) + len(refused))
        metrics.events.labels(platform.name, "ingest").inc(len(events))
        for reason, n in Counter(error.reason for _, error in refused).items():
            metrics.refused.labels(platform.name, reason, "ingest").inc(n)


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
