"""The stage `score`: `events` → rows of user state → student → `scores`.

    records ─► decode ─► slots ─► Scorer.run: stale h rebuilt, fold, student ─► encode ─► send      columns throughout
                 └─ not canonical ─► `dead_letters`        └─ duplicate: no score

One thread, one micro-batch at a time, of one partition or of several, and no await between the fold and the registration
of its sends: whatever the commit protocol snapshots is consistent. Knows rows, models and records; not Faust and not how
offsets are committed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import structlog
from faust.types import TP

from models.errors import CrosscurrentError, EventRefused
from models.events import HEADS, Explanation, platform_code
from models.explain import Explainer
from models.fold import DUPLICATE, FEATURE_NAMES, TOO_LATE
from models.scorer import Model, Scorer, Scores
from streams.arena import Arena
from streams.codec import Decoded, Fetched, ScoreTexts, decode_columns, encode_scores, score_texts
from streams.commit import Committer, KillSwitch, Sender
from streams.dead_letters import dead_letter
from streams.metrics import Metrics
from streams.model_feed import ModelFeed
from streams.wire import Spans

log = structlog.get_logger("crosscurrent.score")

COLD_EVENTS = 3
"""A user with at most so many folded events is cold."""

_LOG_EVENTS = FEATURE_NAMES.index("log_events")


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
        self._texts: tuple[Model, ScoreTexts] | None = None
        self._can_have = np.ones((1 << 16, len(HEADS)), np.bool_)
        for platform, those in heads.items():
            self._can_have[platform_code(platform)] = [head in those for head in HEADS]

    @property
    def joins_partitions(self) -> bool:
        """Whether `process` takes several partitions at once: not where users' slots are good for one call only."""
        return self._arena.cold is None

    def process(self, parts: Sequence[tuple[TP, Sequence[Any]]]) -> list[Any]:
        """Folds and scores a micro-batch: records of partitions of `events`, each a list of them or what `Fetched.of` takes.

        Returns the tasks of its sends, registered with the committer; nothing is awaited. Raises where offsets are
        missing: going on would lose the events between.
        """
        fetched = [Fetched.of(records) for _, records in parts]
        self._check_contiguous([tp for tp, _ in parts], fetched)
        self._feed.swap()
        stage = self._metrics.stage
        with stage["decode"].time():
            joined = Fetched.joined(fetched)
            decoded = decode_columns(joined.keys, joined.values, joined.offset)
        record_ends = np.cumsum([len(one.offset) for one in fetched])
        sends = self._send_refused(parts, record_ends, decoded.refused)
        if len(decoded.index):
            ends = np.searchsorted(decoded.index, record_ends)
            keys = joined.keys.take(decoded.index)
            slots = self._slots([tp.partition for tp, _ in parts], keys, ends)
            scores, cold, status, reasons = self._fold_and_score(slots, decoded.columns)
            with stage["encode"].time():
                now_ms = int(time.time() * 1000)
                out, values = self._encode(decoded, scores, cold, status, reasons, now_ms)
            self._kill("after_fold")
            with stage["send"].time():
                first = 0
                for (tp, _), last, mine in zip(parts, np.searchsorted(out, ends).tolist(), sends, strict=True):
                    if first < last:
                        some = slice(first, last)
                        columns = keys.take(out[some]), values.take(some)
                        mine.append(self._sender.send_columns(self._scores_topic, tp.partition, *columns, now_ms))
                    first = last
            if len(out):
                received_ms = joined.timestamp[decoded.index[out]]
                self._metrics.event_to_score_seconds.observe_many(np.maximum(0, now_ms - received_ms) / 1000.0)
            self._count(decoded, status)
        for (tp, _), one, mine in zip(parts, fetched, sends, strict=True):
            for send in mine:
                self._committer.register(send)
            self._committer.processed(tp, int(one.offset[-1]) + 1)
        self._kill("after_send")
        return [send for mine in sends for send in mine]

    def _check_contiguous(self, tps: list[TP], fetched: list[Fetched]) -> None:
        due: dict[TP, int | None] = {}
        for tp, one in zip(tps, fetched, strict=True):
            expected, first = due.get(tp, self._committer.position(tp)), int(one.offset[0])
            if expected is not None and first > expected:
                raise CrosscurrentError(
                    f"{tp.topic}[{tp.partition}]: offset {first} came where {expected} was due. The worker stops "
                    "so that nothing is skipped; start it again to read from the last commit. If retention removed the "
                    "events between, lengthen topics.events_retention_h"
                )
            due[tp] = int(one.offset[-1]) + 1

    def _slots(self, partitions: list[int], keys: Spans, ends: np.ndarray) -> np.ndarray:
        """`keys` of each partition begin where those of the one before end."""
        with self._metrics.stage["slots"].time():
            begins = [0, *ends.tolist()]
            return np.concatenate(
                [self._arena.slots(p, keys.take(slice(*of))) for p, of in zip(partitions, pairwise(begins), strict=True)]
            )

    def _fold_and_score(
        self, slots: np.ndarray, batch: np.ndarray
    ) -> tuple[Scores, np.ndarray, np.ndarray, list[Any] | None]:
        """→ scores, cold, status, reasons (a list for each event; None: nobody asked)."""
        arena, scorer = self._arena, self._feed.current
        if self._explain and scorer.model.student is not None:
            with self._metrics.stage["score"].time():
                arena.mark_dirty(slots)
                return self._score_and_explain(scorer, slots, batch)
        with self._metrics.stage["fold"].time():
            folded = scorer.fold(arena.rows, slots, batch)
            arena.mark_dirty(slots)
        with self._metrics.stage["score"].time():
            before = scorer.out_of_memory
            scores = scorer.score(arena.rows, slots, batch, *folded)
        if scorer.out_of_memory != before:
            self._metrics.device_out_of_memory.inc(scorer.out_of_memory - before)
            log.warning("score.out_of_memory", device=str(scorer.device), events_at_once=scorer.at_once)
        self._mask(scores, self._can_have[batch["platform"]])
        return scores, is_cold(folded.features), folded.status, None

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
        decoded: Decoded,
        scores: Scores,
        cold: np.ndarray,
        status: np.ndarray,
        reasons: list[Any] | None,
        now_ms: int,
    ) -> tuple[np.ndarray, Spans]:
        """→ (positions of the events that are no duplicates, the score record of each)."""
        model = self._feed.current.model
        if self._texts is None or self._texts[0] is not model:
            names = model.categories.names if model.categories is not None else []
            self._texts = model, score_texts(model.version, model.degraded, names)
        out = np.flatnonzero(status != DUPLICATE)
        return out, encode_scores(decoded, out, scores, cold, self._texts[1], now_ms, reasons)

    def _send_refused(
        self, parts: Sequence[tuple[TP, Sequence[Any]]], record_ends: np.ndarray, refused: list[tuple[int, EventRefused]]
    ) -> list[list[Any]]:
        """→ the sends of each part. `refused`: positions in the micro-batch."""
        letters: list[dict[int, list]] = [defaultdict(list) for _ in parts]
        now_ms = int(time.time() * 1000)
        for i, error in refused:
            part = int(np.searchsorted(record_ends, i, side="right"))
            records = parts[part][1]
            record = records[i - int(record_ends[part])]  # counted from its end
            letters[part][record.partition % self._partitions].append(dead_letter(record, "score", error, now_ms))
            self._metrics.refused.labels("unknown", error.reason, "score").inc()
        return [[self._sender.send(self._dead_letters_topic, p, out) for p, out in each.items()] for each in letters]

    def _count(self, decoded: Decoded, status: np.ndarray) -> None:
        metrics, platforms, of = self._metrics, decoded.platforms, decoded.platform_M
        metrics.batch_events.labels("score").observe(len(of))

        def counts(which: np.ndarray) -> list[int]:
            return np.bincount(which, minlength=len(platforms)).tolist()

        duplicates, late = counts(of[status == DUPLICATE]), counts(of[status == TOO_LATE])
        for platform, n, n_duplicates, n_late in zip(platforms, counts(of), duplicates, late, strict=True):
            metrics.events.labels(platform, "score").inc(n)
            metrics.scores.labels(platform).inc(n - n_duplicates)
            if n_duplicates:
                metrics.duplicates.labels(platform).inc(n_duplicates)
            if n_late:
                metrics.late.labels(platform).inc(n_late)
