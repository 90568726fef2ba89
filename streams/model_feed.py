"""From announcements to the model that scores: load in the background, verify, warm up, hand over between micro-batches.

    topic `models` ─► newest announcement ─► artifact.load (thread) ─► warm scorer ─► pending ─► current
                                                   └─ ArtifactError: the incumbent goes on serving; counted; logged

Knows artifacts and announcements; not Faust, rows or events.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import numpy as np
import structlog

from models.artifact import load, load_prior
from models.config import Settings
from models.errors import ArtifactError
from models.events import EVENT, Announcement, ModelVersion
from models.scorer import Model, Scorer
from models.state import empty_rows
from streams.metrics import Metrics

log = structlog.get_logger("crosscurrent.models")
_WARM_EVENTS = 64
_decode = msgspec.json.Decoder(Announcement).decode


class ModelFeed:
    """The scorer in use. `current` changes only in `swap`, which the score stage calls between two micro-batches."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._pending: tuple[Scorer, int] | None = None
        self._settled: str | None = None
        self._first = True
        self.current = self._scorer(load_prior(settings.fold))
        self._metrics.set_model(self.current.model.version, 0, self.current.model.degraded)

    async def on_records(self, records: list[Any]) -> None:
        """The newest announcement of our model counts. At the start its fallbacks do too: a worker that restarts goes on
        with the last good model; one that runs has it already."""
        announcement = self._newest(records)
        first, self._first = self._first, False
        if announcement is None or announcement.version == self._settled:
            return
        candidates: list[ModelVersion] = [announcement, *(announcement.fallbacks if first else [])]
        for candidate in candidates:
            if await self._try(candidate, announcement.published_at):
                return

    def swap(self) -> bool:
        """Takes the pending scorer into use, if there is one. Microseconds: it is loaded, checked and warm."""
        if self._pending is None:
            return False
        started_s = time.perf_counter()
        (self.current, published_at), self._pending = self._pending, None
        model = self.current.model
        self._metrics.set_model(model.version, published_at, model.degraded)
        self._metrics.swap_pause_seconds.observe(time.perf_counter() - started_s)
        log.info("model.swapped", model=model.version)
        return True

    def _newest(self, records: list[Any]) -> Announcement | None:
        newest = None
        for record in records:
            if record.key != self._settings.store.name.encode() or record.value is None:
                continue
            try:
                newest = _decode(record.value)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self._refuse("manifest", f"the announcement at offset {record.offset} cannot be read: {error}")
        return newest

    async def _try(self, version: ModelVersion, published_at: int) -> bool:
        try:
            scorer = await asyncio.to_thread(self._load, version)
        except ArtifactError as error:
            self._refuse(error.reason, f"{version.version}: {error.detail}")
            return False
        self._pending = (scorer, published_at)
        self._settled = version.version
        self._metrics.model_loads.labels("loaded").inc()
        log.info("model.loaded", model=scorer.model.version)
        return True

    def _load(self, version: ModelVersion) -> Scorer:
        settings = self._settings
        model = load(settings.store.uri, settings.store.name, version, fold=settings.fold, size=settings.worker.size)
        return self._scorer(model)

    def _scorer(self, model: Model) -> Scorer:
        """On its device and warm: every kernel compiled and every first allocation made."""
        worker = self._settings.worker
        scorer = Scorer(model, worker.device, memory_fraction=worker.device_memory)
        if scorer.out_of_memory:
            self._metrics.device_out_of_memory.inc(scorer.out_of_memory)
            log.warning("model.out_of_memory", device=str(scorer.device), events_at_once=scorer.at_once)
        rows = empty_rows(_WARM_EVENTS, self._settings.worker.size)
        events = np.zeros(_WARM_EVENTS, EVENT)
        events["id"], events["category"] = np.arange(_WARM_EVENTS), 1
        for first_offset in (0, 1):
            rows["h_version"] = 0  # so that the rebuild of `h` from the ring is warm too
            events["offset"], events["id"] = first_offset, events["id"] + _WARM_EVENTS
            scorer.run(rows, np.arange(_WARM_EVENTS), events)
        return scorer

    def _refuse(self, reason: str, detail: str) -> None:
        self._metrics.model_loads.labels("refused").inc()
        self._metrics.model_refusals.labels(reason).inc()
        log.error("model.refused", reason=reason, detail=detail, serving=self.current.model.version)
