"""Prometheus metrics of the worker, and the small HTTP server that shows them with /healthz and /readyz.

Knows nothing of Kafka, of user ids (no label ever holds one) or of what is measured: the app calls, this module counts.
Label values must come from a bounded set: platforms from the platform files (`unknown` for any other), stages and
reasons from the constants of the code.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from models.errors import MODEL_REFUSAL_REASONS, ConfigError

PREFIX = "crosscurrent"
STAGES = ("decode", "slots", "fold", "score", "encode", "send", "canonicalise")
READY_CONDITIONS = ("assigned", "recovered", "model")

# The `_created` series would double what is stored and answer no question of ours. The switch is process-wide.
disable_created_metrics()

_BATCH = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)
_STAGE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_LATENCY_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)
_COMMIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_PAUSE_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)


class BatchHistogram:
    """A histogram without labels that takes an array at once: one `searchsorted` a batch, not one call an event."""

    def __init__(self, name: str, documentation: str, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = np.asarray(buckets, np.float64)
        self._labels = [*(floatToGoString(b) for b in buckets), "+Inf"]
        self._counts = np.zeros(len(buckets) + 1, np.int64)
        self._sum = 0.0
        self._lock = threading.Lock()
        registry.register(self)

    def observe_many(self, values: np.ndarray) -> None:
        """Counts every element of `values` (n,). NaN is refused by the caller, not here: it would fall into +Inf."""
        counts = np.bincount(np.searchsorted(self._bounds, values, side="left"), minlength=len(self._counts))
        total = float(np.sum(values, dtype=np.float64))
        with self._lock:
            self._counts += counts
            self._sum += total

    def collect(self) -> Iterator[HistogramMetricFamily]:
        with self._lock:
            cumulative, total = np.cumsum(self._counts).tolist(), self._sum
        buckets = list(zip(self._labels, cumulative, strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=total)


class Metrics:
    """All metrics of one worker, in a registry of its own. Names carry their units: seconds, bytes, rows, events.

    The attributes are the metrics' names without prefix and `_total`. `stage` holds the children of
    `stage_seconds`, so that the hot path looks no label up: `with metrics.stage["fold"].time(): …`.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=PREFIX, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace=PREFIX, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, namespace=PREFIX, registry=registry, buckets=buckets)

        self.events = counter("events", "Events taken in, by stage (ingest, score).", "platform", "stage")
        self.refused = counter("refused", "Events sent to the dead letters.", "platform", "reason", "stage")
        self.duplicates = counter("duplicates", "Events dropped because one with the same id was scored.", "platform")
        self.late = counter("late", "Events scored but too late to be folded.", "platform")
        self.scores = counter("scores", "Score records sent.", "platform")

        self.batch_events = histogram("batch_events", "Events in one micro-batch.", _BATCH, "stage")
        self.stage_seconds = histogram("stage_seconds", "Time of one step of one micro-batch.", _STAGE_S, "stage")
        self.stage = {name: self.stage_seconds.labels(name) for name in STAGES}
        self.event_to_score_seconds = BatchHistogram(
            f"{PREFIX}_event_to_score_seconds",
            "From Kafka's record time of the event to the creation of its score.",
            _LATENCY_S,
            registry,
        )
        self.lag_events = gauge("lag_events", "Records not yet read: high watermark - position.", "topic", "partition")

        self.commits = counter("commits", "Commits of source offsets.")
        self.commit_seconds = histogram("commit_seconds", "From snapshot to committed source offsets.", _COMMIT_S)
        self.changelog_bytes = counter("changelog_bytes", "Bytes of rows sent to the changelog, before compression.")
        self.changelog_rows = counter("changelog_rows", "Rows sent to the changelog.")

        self.rebalances = counter("rebalances", "Assignments received from the group.")
        self.recovery_rows = counter("recovery_rows", "Rows read back from the changelog.")
        self.recovery_seconds = gauge("recovery_seconds", "How long the last recovery took.")
        self.recovery_in_progress = gauge("recovery_in_progress", "1 while state is read back from the changelog.")
        self.snapshot_rows = counter("snapshot_rows", "Rows restored from snapshots on this machine.")
        self.snapshot_load_seconds = counter("snapshot_load_seconds", "Time that took.")
        self.state_rows = gauge("state_rows", "Users with a row on this worker.")
        self.state_bytes = gauge("state_bytes", "Memory of the rows.")
        self.cold_rows = gauge("cold_rows", "Users whose rows are on disk, as they were idle (worker.hot_users).")
        self.cold_bytes = gauge("cold_bytes", "Files of the rows on disk.")
        self.cold_rows_moved_out = counter("cold_rows_moved_out", "Idle rows moved to disk.")
        self.cold_rows_brought_back = counter("cold_rows_brought_back", "Rows that came back from disk with an event.")

        self.model_info = gauge("model_info", "1 for the model that scores now.", "model")
        self.model_published_timestamp_seconds = gauge(
            "model_published_timestamp_seconds", "When it was published, seconds since the epoch; 0 for the prior."
        )
        self.model_loads = counter("model_loads", "Announced models tried, by outcome (loaded, refused).", "outcome")
        self.model_refusals = counter("model_refusals", "Announced models refused.", "reason")
        for outcome in ("loaded", "refused"):
            self.model_loads.labels(outcome)
        for reason in MODEL_REFUSAL_REASONS:
            self.model_refusals.labels(reason)  # a counter that starts at 0 has a rate from its first refusal on
        self.swap_pause_seconds = histogram("swap_pause_seconds", "Pause of scoring for a new model.", _PAUSE_S)
        self.device_out_of_memory = counter(
            "device_out_of_memory", "Times the card's memory did not do: half the batch, at last the CPU."
        )
        self.degraded = gauge("degraded", "1 while something less than a published model scores (the prior).")

    def set_model(self, model: str, published_at_ms: int, degraded: bool) -> None:
        """Says which model scores from now on; the one before it disappears from `model_info`."""
        self.model_info.clear()
        self.model_info.labels(model).set(1)
        self.model_published_timestamp_seconds.set(published_at_ms / 1000.0)
        self.degraded.set(degraded)

    def forget_lag(self) -> None:
        """Drops the lag of all partitions: called when they are revoked, so that no old lag is shown for ever."""
        self.lag_events.clear()


class Health:
    """What /healthz and /readyz answer. Threads may read while the event loop writes.

    Alive: `beat()` was called within `beat_timeout_s`. Ready: alive, and every condition is True.
    The conditions are named at construction and False until set, so that none is forgotten.
    """

    def __init__(self, conditions: Sequence[str] = READY_CONDITIONS, beat_timeout_s: float = 30.0) -> None:
        self._conditions = dict.fromkeys(conditions, False)
        self._beat_timeout_s = beat_timeout_s
        self._last_beat_s = time.monotonic()

    def set(self, condition: str, value: bool) -> None:
        """Sets a condition. KeyError for one that was not named at construction."""
        if condition not in self._conditions:
            raise KeyError(f"unknown condition {condition!r}; known: {', '.join(self._conditions)}")
        self._conditions[condition] = bool(value)

    def beat(self) -> None:
        """The event loop is alive. Call it from a task of the loop that does the work, at least every few seconds."""
        self._last_beat_s = time.monotonic()

    @property
    def beat_age_s(self) -> float:
        return time.monotonic() - self._last_beat_s

    @property
    def alive(self) -> bool:
        return self.beat_age_s <= self._beat_timeout_s

    @property
    def ready(self) -> bool:
        return self.alive and all(self._conditions.values())

    def report(self) -> dict[str, object]:
        return {
            "ready": self.ready,
            "alive": self.alive,
            "beat_age_s": round(self.beat_age_s, 3),
            "conditions": dict(self._conditions),
        }


class OpsServer:
    """/metrics, /healthz and /readyz over HTTP, on a thread and an event loop of its own: it still answers, and says
    503, while the loop that does the work is stuck.

    `start()` returns the port (for port 0: the free one it got) and raises `ConfigError` where it cannot listen.
    """

    def __init__(self, registry: CollectorRegistry, health: Health, host: str, port: int) -> None:
        self._registry, self._health = registry, health
        self._host, self._port = host, port
        self._loop = asyncio.new_event_loop()
        self._runner = web.AppRunner(self._app(), access_log=None, handle_signals=False)
        self._thread = threading.Thread(target=self._loop.run_forever, name="ops-server", daemon=True)

    def start(self) -> int:
        self._thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except OSError as error:
            self.close()
            raise ConfigError(
                f"cannot serve metrics on {self._host}:{self._port}: {error.strerror or error}; "
                "set metrics.port to a free port (0 takes any) or metrics.enabled to false"
            ) from error

    def close(self) -> None:
        """Stops listening. Idempotent."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    async def _listen(self) -> int:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        return self._runner.addresses[0][1]

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        return app

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        response = web.Response(body=encode(self._registry), headers={"Content-Type": content_type})
        response.enable_compression()
        return response

    async def _healthz(self, request: web.Request) -> web.Response:
        alive = self._health.alive
        return web.json_response(
            {"alive": alive, "beat_age_s": round(self._health.beat_age_s, 3)}, status=200 if alive else 503
        )

    async def _readyz(self, request: web.Request) -> web.Response:
        report = self._health.report()
        return web.json_response(report, status=200 if report["ready"] else 503)
