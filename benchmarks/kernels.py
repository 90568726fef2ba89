"""Crosscurrent's own path from records to scores without Kafka: the score stage with a sender and a committer that keep.

    Kernels.process(partition, keys, values, offsets) → [(key, score record)]

For the modes `limit` and `stages` of the speed benchmark: the one place of it that calls the worker's parts directly.
Stage prices are read from the stage's own histogram, `Metrics.stage_seconds`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from faust.types import TP

from models.artifact import load, versions
from models.config import Settings
from models.events import HEADS
from models.scorer import Scorer
from streams.arena import Arena
from streams.commit import KillSwitch
from streams.metrics import Metrics
from streams.model_feed import ModelFeed
from streams.score import ScoreStage
from streams.wire import Records, Spans

TOPIC, SCORES, DEAD = "events", "scores", "dead"


class Kept:
    """Sender and committer in one: keeps what would be sent, commits nothing."""

    def __init__(self) -> None:
        self.out: list[tuple[str, Spans, Spans]] = []

    def send_columns(self, topic: str, partition: int, keys: Spans, values: Spans, timestamps_ms: Any) -> Any:
        self.out.append((topic, keys, values))
        return None

    def position(self, tp: TP) -> None:
        return None

    def register(self, send: Any) -> None: ...

    def processed(self, tp: TP, next_offset: int) -> None: ...


class Kernels:
    """The newest student of a store, an arena, and the stage between them."""

    def __init__(self, store: str) -> None:
        settings = Settings()
        self.metrics, self.arena, self.kept = Metrics(), Arena(settings.worker.size), Kept()
        feed = ModelFeed(settings, self.metrics)
        model = load(store, "student", versions(store, "student")[-1], fold=settings.fold, size=settings.worker.size)
        self.scorer = feed.current = Scorer(model, "cpu")
        self.stage = ScoreStage(
            self.arena,
            feed,
            self.kept,
            self.kept,
            self.metrics,
            KillSwitch(None),
            scores_topic=SCORES,
            dead_letters_topic=DEAD,
            partitions=1,
            heads=dict.fromkeys(model.config.platforms, HEADS),
        )

    def process(
        self, partition: int, keys: list[bytes], values: list[bytes], offsets: list[int]
    ) -> list[tuple[bytes, bytes]]:
        """One micro-batch. → key and value of its score records; duplicates have none."""
        offset = np.array(offsets, np.int64)
        records = Records(TOPIC, partition, offset, np.zeros(len(offset), np.int64), Spans.of(keys), Spans.of(values))
        pairs = (zip(*(spans.tolist() for spans in scored), strict=True) for scored in self.scores_of(records))
        return [pair for each in pairs for pair in each]

    def scores_of(self, records: Records) -> list[tuple[Spans, Spans]]:
        """One micro-batch. → keys and values of its score records."""
        self.stage.process([(TP(TOPIC, records.partition), records)])
        out, self.kept.out = self.kept.out, []
        return [(keys, values) for topic, keys, values in out if topic == SCORES]

    def stage_seconds(self) -> dict[str, float]:
        """Stage → seconds spent in it so far."""
        return {name: child._sum.get() for name, child in self.metrics.stage.items()}
