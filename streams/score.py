"""The stage `score`: `events` → rows of user state → student → `scores`.

    records ─► decode ─► slots ─► Scorer.run: stale h rebuilt, fold, student ─► encode ─► send
                 └─ not canonical ─► `dead_letters`        └─ duplicate: no score

One thread, one micro-batch at a time, and no await between the fold and the registration of its sends: whatever the
commit protocol snapshots is consistent. Knows rows, models and records; not Faust and not how offsets are committed.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from faust.types import TP
from msgspec import UNSET

from models.errors import CrosscurrentError, EventRefused
from models.events import HEADS, SCORE_SCHEMA, CanonicalEvent, Explanation, Probabilities, ScoreRecord, platform_code
from models.explain import Explainer
from models.fold import DUPLICATE, FEATURE_NAMES, TOO_LATE
from models.scorer import Scorer, Scores
from streams.arena import Arena
from streams.codec import columns, decode_events, encode_json
from streams.commit import NO_HEADERS, Committer, KillSwitch, Outgoing, Sender
from streams.dead_letters import dead_letter
from streams.metrics import Metrics
from streams.model_feed import ModelFeed

COLD_EVENTS = 3
"""A user with at most so many folded events is cold."""

_LOG_EVENTS = FEATURE_NAMES.index("log_events")
_DIGITS = 6


def is_cold(features_NF: np.ndarray) -> np.ndarray:
    """(N,) bool: whether each event's user had at most COLD_EVENTS folded events right after it."""
    return features_NF[:, _LOG_EVENTS] < np.log1p(COLD_EVENTS + 0.5)


def one_a_user(slots: np.ndarray) -> Iterator[np.ndarray]:
    """Positions (ascending) of each user's first event, then of each one's second, and so on: all of `slots` (N,)."""
    order = np.argsort(slots, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(slots[order]) != 0])
    rank = np.empty(len(slots), np.int64)
    rank[order] = np.arange(len(slots)) - np.repeat(starts, np.diff(np.r_[starts, len(slots)]))
    for nth in range(int(rank.max()) + 1):
        yield np.flatnonzero(rank == nth)


class ScoreStage:
    """One micro-batch at a time: `process` names the whole path."""

    def __init__(
        self,
        arena: Arena,
        feed: ModelFeed,
        sender: Sender,
        committer: Committer,
        metrics: Metrics,
        kill: KillSwitch,
        *,
        scores_topic: str,
        dead_letters_topic: str,
        partitions: int,
        heads: Mapping[str, tuple[str, ...]],
        explain: int = 0,
    ) -> None:
        """`heads`: what each platform can have, from its file; a platform without a file can have what the model has.
        `explain`: how many events and features each score names; 0: none."""
        self._arena = arena
        self._feed = feed
        self._sender = sender
        self._committer = committer
        self._metrics = metrics
        self._kill = kill
        self._scores_topic = scores_topic
        self._dead_letters_topic = dead_letters_topic
        self._partitions = partitions
        self._explain = explain
        self._explainer: Explainer | None = None
        self._can_have = np.ones((1 << 16, len(HEADS)), np.bool_)
        for platform, those in heads.items():
            self._can_have[platform_code(platform)] = [head in those for head in HEADS]

    def process(self, tp: TP, records: list[Any]) -> list[Any]:
        """Folds and scores `records` of one partition of `events`.

        Returns the tasks of its sends, registered with the committer; nothing is awaited. Raises where offsets are
        missing: going on would lose the events between.
        """
        self._check_contiguous(tp, records)
        self._feed.swap()
        stage = self._metrics.stage
        with stage["decode"].time():
            events, good, refused = decode_events(records)
            batch = columns(events, [record.offset for record in good])
        sends = self._send_refused(refused)
        if events:
            scores, cold, status, reasons = self._fold_and_score(tp.partition, batch, [record.key for record in good])
            with stage["encode"].time():
                now_ms = int(time.time() * 1000)
                out, received_ms = self._encode(events, good, scores, cold, status, reasons, now_ms)
            self._kill("after_fold")
            if out:
                with stage["send"].time():
                    sends.append(self._sender.send(self._scores_topic, tp.partition, out))
                self._metrics.event_to_score_seconds.observe_many(np.maximum(0, now_ms - received_ms) / 1000.0)
            self._count(events, status)
        for send in sends:
            self._committer.register(send)
        self._committer.processed(tp, records[-1].offset + 1)
        self._kill("after_send")
        return sends

    def _check_contiguous(self, tp: TP, records: list[Any]) -> None:
        expected = self._committer.position(tp)
        if expected is not None and records[0].offset > expected:
            raise CrosscurrentError(
                f"{tp.topic}[{tp.partition}]: offset {records[0].offset} came where {expected} was due. The worker stops "
                "so that nothing is skipped; start it again to read from the last commit. If retention removed the "
                "events between, lengthen topics.events_retention_h"
            )

    def _fold_and_score(self, partition: int, batch: np.ndarray, keys: list[bytes]) -> tuple[Scores, Any, np.ndarray, list]:
        """→ scores, cold, status, reasons (UNSET, or a list, for each event)."""
        arena = self._arena
        with self._metrics.stage["slots"].time():
            slots = arena.slots(partition, keys)
        scorer = self._feed.current
        if self._explain and scorer.model.student is not None:
            with self._metrics.stage["score"].time():
                arena.mark_dirty(slots)
                return self._score_and_explain(scorer, slots, batch)
        with self._metrics.stage["fold"].time():
            folded = scorer.fold(arena.rows, slots, batch)
            arena.mark_dirty(slots)
        with self._metrics.stage["score"].time():
            scores = scorer.score(arena.rows, slots, batch, *folded)
        self._mask(scores, self._can_have[batch["platform"]])
        return scores, is_cold(folded.features), folded.status, [UNSET] * len(batch)

    def _score_and_explain(
        self, scorer: Scorer, slots: np.ndarray, batch: np.ndarray
    ) -> tuple[Scores, np.ndarray, np.ndarray, list[list[Explanation]]]:
        """The same scores, each user's events one after another: a row can only be explained as it is."""
        rows = self._arena.rows
        if self._explainer is None or self._explainer.model is not scorer.model:
            self._explainer = Explainer(scorer.model)
        places, parts, reasons = [], [], [[] for _ in batch]
        for at in one_a_user(slots):
            folded = scorer.fold(rows, slots[at], batch[at])
            scores = scorer.score(rows, slots[at], batch[at], *folded)
            self._mask(scores, self._can_have[batch["platform"][at]])
            explained = self._explainer.explain(rows, slots[at], batch[at], folded, scores.p_N3, self._explain)
            for i, why in zip(at.tolist(), explained, strict=True):
                reasons[i] = why
            places.append(at)
            parts.append((*scores, is_cold(folded.features), folded.status))
        order = np.argsort(np.concatenate(places))
        *scores, cold, status = (np.concatenate(column)[order] for column in zip(*parts, strict=True))
        return Scores(*scores), cold, status, reasons

    def _mask(self, scores: Scores, can_have_N4: np.ndarray) -> None:
        """Nulls the heads that a platform cannot have: the prior and a model that does not know it answer them all."""
        scores.p_N3[~can_have_N4[:, :3]] = np.nan
        without = ~can_have_N4[:, HEADS.index("category")]
        scores.category_N5[without] = -1
        scores.shift_N[without] = np.nan

    def _encode(
        self,
        events: list[CanonicalEvent],
        records: list[Any],
        scores: Scores,
        cold: Any,
        status: np.ndarray,
        reasons: list[Any],
        now_ms: int,
    ) -> tuple[list[Outgoing], np.ndarray]:
        """→ (score record of every event that is no duplicate, the Kafka times (ms) of those events)."""
        model = self._feed.current.model
        name, degraded = model.version, model.degraded
        # −1, none, is the last of the names; what is none comes after what is some.
        names = np.array([*(model.categories.names if model.categories is not None else []), None], object)
        p = np.round(scores.p_N3.astype(np.float64), _DIGITS).tolist()
        shift = np.round(scores.shift_N.astype(np.float64), _DIGITS).tolist()
        top_names = names[scores.category_N5].tolist()
        top_n = (scores.category_N5 >= 0).sum(axis=1).tolist()
        category_p = np.round(scores.category_p_N5.astype(np.float64), _DIGITS).tolist()
        out, received_ms = [], []
        top = zip(top_names, category_p, top_n, strict=True)
        rows = zip(events, records, p, shift, top, cold.tolist(), status.tolist(), reasons, strict=True)
        for event, record, (click, purchase, return_), drift, (top_name, top_p, n), is_cold, how, why in rows:
            if how == DUPLICATE:
                continue
            score = ScoreRecord(
                schema=SCORE_SCHEMA,
                event_id=event.event_id,
                user=event.user,
                platform=event.platform,
                ts=event.ts,
                scored_at=now_ms,
                model=name,
                p=Probabilities(click=click, purchase=purchase, return_=return_),
                churn=round(1.0 - return_, _DIGITS),
                categories=list(zip(top_name[:n], top_p, strict=False)),
                interest_shift=drift,
                cold=is_cold,
                degraded=degraded,
                explain=why,
            )
            out.append((record.key, encode_json(score), now_ms, NO_HEADERS))  # NaN becomes null
            received_ms.append(record.timestamp)
        return out, np.array(received_ms, np.int64)

    def _send_refused(self, refused: list[tuple[Any, EventRefused]]) -> list[Any]:
        by_partition = defaultdict(list)
        now_ms = int(time.time() * 1000)
        for record, error in refused:
            by_partition[record.partition % self._partitions].append(dead_letter(record, "score", error, now_ms))
            self._metrics.refused.labels("unknown", error.reason, "score").inc()
        return [self._sender.send(self._dead_letters_topic, p, out) for p, out in by_partition.items()]

    def _count(self, events: list[CanonicalEvent], status: np.ndarray) -> None:
        metrics = self._metrics
        metrics.batch_events.labels("score").observe(len(events))
        platforms = [event.platform for event in events]
        for platform, n in Counter(platforms).items():
            metrics.events.labels(platform, "score").inc(n)
        duplicates = Counter(platforms[i] for i in np.flatnonzero(status == DUPLICATE).tolist())
        for platform, n in Counter(platforms).items():
            metrics.scores.labels(platform).inc(n - duplicates.get(platform, 0))
        for platform, n in duplicates.items():
            metrics.duplicates.labels(platform).inc(n)
        for i in np.flatnonzero(status == TOO_LATE).tolist():
            metrics.late.labels(platforms[i]).inc()
