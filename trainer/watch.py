"""What a person sees of the rounds: a progress bar or lines of log, and Prometheus metrics.

Knows nothing of how a round comes about.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from models.config import GATE_RULES, MetricsConfig
from models.events import Announcement
from trainer.evaluate import Report
from trainer.lessons import Heard

if TYPE_CHECKING:
    from trainer.run import RoundResult

log = structlog.get_logger("crosscurrent.trainer")


class Stages:
    """Names and times the stages of a round; a progress bar on a terminal, structured lines otherwise."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Stages:
        console = Console(stderr=True)
        if sys.stderr.isatty() and console.is_terminal:
            columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.fields[note]}"))
            self._progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; a failed one too."""
        started = time.perf_counter()
        if self._progress is not None:
            self._task = self._progress.add_task(name, total=None, note="")
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)
            if self._progress is not None:
                self._progress.update(self._task, total=1, completed=1)
            else:
                log.debug("stage done", stage=name, seconds=self.seconds[name])

    def share(self, done: float) -> None:
        """Share of the present stage that is done, 0 … 1."""
        if self._progress is not None:
            self._progress.update(self._task, total=1.0, completed=done)

    def count(self, n: int) -> None:
        """How many events the present stage has seen."""
        if self._progress is not None:
            self._progress.update(self._task, note=f"{n:,} events")


def log_result(result: RoundResult) -> None:
    line: Callable[..., None] = log.error if result.outcome == "failed" else log.info
    line(
        "round done",
        outcome=result.outcome,
        reason=result.reason,
        version=result.version,
        kind=result.kind,
        history_events=result.history_events,
        log_loss=result.log_loss,
        incumbent_log_loss=result.incumbent_log_loss,
        seconds=round(result.seconds, 2),
        stages=result.stage_seconds,
    )


class Metrics:
    """The trainer's own registry and port. `/metrics`; any other path answers too, which says that it is alive."""

    def __init__(self, config: MetricsConfig) -> None:
        self.registry = CollectorRegistry()
        prefix, own = "crosscurrent_trainer_", {"registry": self.registry}
        self.rounds = Counter(prefix + "rounds", "Rounds by outcome", ["outcome"], **own)
        self.refused = Counter(prefix + "refused_records", "Records of `events` that are no canonical event", **own)
        self.history_events = Gauge(prefix + "history_events", "Events in the history", **own)
        self.round_seconds = Gauge(prefix + "last_round_seconds", "Duration of the last round", **own)
        self.round_time = Gauge(prefix + "last_round_timestamp_seconds", "When the last round ended", **own)
        self.published = Info(prefix + "published", "The version published last by this process", **own)
        of = ["platform", "head", "model"]
        self.log_loss = Gauge(prefix + "log_loss", "Log-loss on later events, last judged round", of, **own)
        self.auc = Gauge(prefix + "auc", "AUC on later events, last judged round", of, **own)
        self.hit_rate = Gauge(prefix + "hit_rate_5", "HR@5 of the next category, last judged round", of, **own)
        self.base_rate = Gauge(prefix + "base_rate", "Share of positives, last judged round", of[:2], **own)
        self.judged = Gauge(prefix + "judged_events", "Events judged, last judged round", of[:2], **own)
        self.refusals = Counter(prefix + "refusals", "Candidates refused, by rule of the gate", ["rule"], **own)
        for rule in GATE_RULES:
            self.refusals.labels(rule)
        self.teacher_fits = Counter(prefix + "teacher_fits", "Teachers fitted", **own)
        self.teacher_member = Gauge(prefix + "teacher_member", "1: kept at the last fit, 0: dropped", ["member"], **own)
        self.teacher_asked = Counter(prefix + "teacher_asked_events", "Events that a teacher was asked of", **own)
        self.teacher_logits = Gauge(prefix + "teacher_cached_events", "Events with the teacher's logits on disk", **own)
        self._server = None
        if config.enabled:
            self._server, _ = start_http_server(config.trainer_port, config.host, registry=self.registry)
            log.info("metrics served", host=config.host, port=self._server.server_port)

    def observe(self, result: RoundResult) -> None:
        """After every round."""
        self.rounds.labels(result.outcome).inc()
        self.round_seconds.set(result.seconds)
        self.round_time.set(time.time())
        if result.outcome not in ("failed", "stopped"):
            self.history_events.set(result.history_events)
        for name, report in (("candidate", result.candidate), ("incumbent", result.incumbent)):
            if report is not None:
                self._observe_report(name, report)
        if result.verdict is not None and result.outcome != "published":
            for rule in result.verdict.rules:
                if rule.refusals and rule.name in result.verdict.limits.enforced:
                    self.refusals.labels(rule.name).inc()

    def hear(self, heard: Heard, cached: int) -> None:
        """After a round was told what the teacher says; `cached`: events that it has been asked of."""
        self.teacher_asked.inc(heard.asked)
        self.teacher_logits.set(cached)
        if heard.members is not None:
            self.teacher_fits.inc()
            for member, kept in heard.members.items():
                self.teacher_member.labels(member).set(kept)

    def _observe_report(self, name: str, report: Report) -> None:
        for (platform, head), cell in report.cells.items():
            self.log_loss.labels(platform, head, name).set(cell.log_loss)
            self.auc.labels(platform, head, name).set(cell.auc)
            self.base_rate.labels(platform, head).set(cell.base_rate)
            self.judged.labels(platform, head).set(cell.n)
        for platform, cell in report.categories.items():
            self.log_loss.labels(platform, "category", name).set(cell.nll)
            self.hit_rate.labels(platform, "category", name).set(cell.hit_rate_5)
            self.judged.labels(platform, "category").set(cell.n)

    def publish(self, announcement: Announcement, result: RoundResult) -> None:
        """After an announcement."""
        self.published.info(
            {"version": f"{announcement.name}/{announcement.version}", "kind": result.kind or "", "uri": announcement.uri}
        )

    def close(self) -> None:
        """Stops serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
