"""The trainer as a program: a round every interval, from the topic `events` to an announcement in `models`.

    pull ─► labels ─► replay ─► train ─► judge candidate and incumbent ─► gate ─► store ─► announce
                                                                            └ no: say why, keep the incumbent

A candidate is published where it passes the gate (`trainer/gate.py`) on later events. The incumbent is the version
announced last; where nothing ever was, the newest of the store that loads (it is then announced at once: a crash may have
come between store and announcement); else, and after a withdrawal, the prior.

A major model (new recurrence) is trained where there is no incumbent to build on, where a platform is new, every
`major_every`-th publication, and once the examples have doubled since the last major one. The rest are minor.

Reads and writes only the broker and the stores: no worker, no platform file, no raw id.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
import structlog
import torch
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from models import artifact
from models.config import MetricsConfig, Settings
from models.errors import ArtifactError, HistoryError
from models.events import Announcement, ModelVersion
from models.fold import N_FEATURES
from models.scorer import Model
from models.student import StudentConfig
from trainer import evaluate as judge
from trainer import gate
from trainer.evaluate import Comparison, Report
from trainer.examples import gate_start, heads_of, make_examples, replay
from trainer.fit import Schedule
from trainer.gate import Limits, Verdict
from trainer.history import HistoryStore, client_options, open_consumer, pull, read_to_end
from trainer.labels import make_labels, matured
from trainer.train import Trained, train

log = structlog.get_logger("crosscurrent.trainer")

MAX_FALLBACKS = 3
RETRY_S = 10.0
"""Until a model is published, a round comes at least this often: the first model should not wait for an interval."""

Outcome = Literal["published", "not_better", "refused", "not_finite", "too_few", "nothing_new", "failed", "stopped"]


class RoundResult(NamedTuple):
    """What one round did."""

    outcome: Outcome
    reason: str
    history_events: int = 0
    version: str | None = None
    kind: str | None = None
    candidate: Report | None = None
    incumbent: Report | None = None
    log_loss: float | None = None
    """Mean over the gating cells, candidate."""
    incumbent_log_loss: float | None = None
    verdict: Verdict | None = None
    """None where nothing was judged."""
    seconds: float = 0.0
    stage_seconds: Mapping[str, float] | None = None


class _Stopped(Exception):
    """The round was asked to stop."""


async def run_trainer(
    settings: Settings,
    once: bool = False,
    stop: asyncio.Event | None = None,
    heads: Mapping[str, tuple[str, ...]] | None = None,
) -> list[RoundResult]:
    """Rounds until `stop` is set (None: until SIGTERM or SIGINT), or one if `once`. → their results.

    `heads`: platform → heads that it can have, from the platform files; a platform that is not in it can have what its
    events show. A round that fails for a reason outside (Kafka, the store) is reported and tried again.
    """
    torch.set_num_threads(settings.trainer.threads)
    results: list[RoundResult] = []
    with contextlib.ExitStack() as stack:
        if stop is None:
            stop = asyncio.Event()
            stack.enter_context(_signals_set(stop))
        metrics = _Metrics(settings.metrics)
        stack.callback(metrics.close)
        trainer = _Trainer(settings, heads, stop, metrics)
        while not stop.is_set():
            result = await trainer.round()
            results.append(result)
            if once:
                break
            wait_s = settings.trainer.interval_s
            if not trainer.has_published:
                wait_s = min(wait_s, RETRY_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), wait_s)
    return results


@contextlib.contextmanager
def _signals_set(stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


class _Incumbent(NamedTuple):
    model: Model
    announcement: Announcement | None
    """None: the prior."""


class _Trainer:
    """One trainer process: its settings, its metrics, and nothing that must outlive a round."""

    def __init__(self, settings: Settings, heads, stop: asyncio.Event, metrics: _Metrics) -> None:
        self.settings, self.heads, self.stop, self.metrics = settings, heads, stop, metrics
        self.history = HistoryStore(settings.trainer.history_uri)
        self.has_published = False
        self.judged_events = -1
        """Length of the history when a candidate was last judged: without a new event it is not judged again."""

    async def round(self) -> RoundResult:
        """One round; never raises for what lies outside (Kafka, the stores)."""
        started = time.perf_counter()
        with _Stages() as stages:
            try:
                result = await self._round(stages)
            except _Stopped:
                result = RoundResult("stopped", "asked to stop")
            except (HistoryError, ArtifactError, KafkaError, OSError) as error:
                result = RoundResult("failed", f"{type(error).__name__}: {error}")
        result = result._replace(seconds=time.perf_counter() - started, stage_seconds=dict(stages.seconds))
        self.metrics.observe(result)
        _log_result(result)
        return result

    async def _round(self, stages: _Stages) -> RoundResult:
        settings = self.settings
        with stages.stage("pull"):
            pulled = await pull(
                self.history, settings.kafka, settings.topics.events, stop=self.stop, on_progress=stages.count
            )
            self.metrics.refused.inc(pulled.refused)
            announced, withdrawn = await _read_announcement(settings)
            incumbent = await asyncio.to_thread(_load_incumbent, settings, announced, withdrawn)
            if announced is None and incumbent.announcement is not None:
                await _announce(settings, incumbent.announcement)
        self.has_published = incumbent.announcement is not None
        result, announcement = await asyncio.to_thread(self._train, incumbent, stages)
        if announcement is not None:
            with stages.stage("announce"):
                await _announce(settings, announcement)
            self.has_published = True
            self.metrics.publish(announcement, result)
        return result

    def _check(self) -> None:
        if self.stop.is_set():
            raise _Stopped

    def _train(self, incumbent: _Incumbent, stages: _Stages) -> tuple[RoundResult, Announcement | None]:
        """Everything between Kafka and Kafka; runs in a thread. → the result, and what is to be announced."""
        settings, options = self.settings, self.settings.trainer
        with stages.stage("read"):
            history = self.history.read()
            self._check()
            labels = make_labels(history, settings.fold, settings.horizons)
            gate_ms = gate_start(history, labels, settings.horizons, options.validation_fraction, options.max_events)
        n = len(history)
        if n == self.judged_events:
            return RoundResult("nothing_new", "no event has come since the last round", n), None
        if gate_ms is None:
            return RoundResult("too_few", "no label has had the time to mature", n), None
        trainable = matured(labels, history.events["ts"], settings.horizons, gate_ms)[:, :3].any(axis=1).sum()
        if trainable < options.min_events:
            reason = f"{trainable} events have matured labels; a round needs {options.min_events}"
            return RoundResult("too_few", reason, n), None
        with stages.stage("replay"):
            size = settings.worker.size
            replayed = replay(
                history, settings.fold, size, until_ms=gate_ms, max_events=options.max_events, check=self._check
            )
            heads = heads_of(history, self.heads, gate_ms)
            config = StudentConfig.of(size, N_FEATURES, history.platforms, heads)
            base, config = _base(settings, incumbent, config, len(replayed.index_M))
            examples = make_examples(history, labels, replayed, config, settings.horizons, gate_ms)
        with stages.stage("train"):
            trained = train(
                examples,
                config,
                history.categories,
                settings.fold,
                Schedule(options.epochs, options.batch_events, options.learning_rate, seed=options.seed),
                prior_logits_3=artifact.load_prior(settings.fold).calibration_P32[0, :, 1],
                incumbent=base,
                check=self._check,
                progress=stages.share,
            )
        with stages.stage("evaluate"):
            compared = judge.compare(
                trained.model,
                incumbent.model,
                history,
                labels,
                settings.horizons,
                replayed.rows,
                gate_ms,
                check=self._check,
            )
        with stages.stage("gate"):
            limits = Limits(
                draws=options.bootstrap_draws, seed=options.seed, p99_ms=options.p99_budget_ms, enforced=options.enforce
            )
            evidence = gate.examine(trained.model, compared, limits, _device(settings))
            verdict = gate.decide(evidence, limits, check=self._check)
        if verdict.noticed:
            log.warning(
                "the gate noticed what it does not refuse", rules=list(options.enforce), noticed=list(verdict.noticed)
            )
        self.judged_events = n
        result = _decide(trained, compared, verdict, n)
        if result.outcome != "published":
            return result, None
        with stages.stage("publish"):
            first_ms = int(history.events["ts"].min())
            training_range = {"first_ts": first_ms, "last_ts": gate_ms, "events": len(replayed.index_M)}
            version = artifact.publish(
                settings.store.uri,
                settings.store.name,
                trained.model,
                metrics={
                    "candidate": compared.candidate.as_dict(),
                    "incumbent": compared.incumbent.as_dict(),
                    "gate": verdict.as_dict(),
                },
                training_range=training_range,
                reference_histograms=judge.reference_histograms(
                    compared.candidate, examples.columns.features_NF.numpy(), examples.platform_M, config.platforms
                ),
                fold=settings.fold,
                now_ms=_now_ms(),
                kind=trained.kind,
                parent=incumbent.announcement.version if incumbent.announcement else None,
            )
        announcement = _announcement(settings, version, incumbent.announcement)
        return result._replace(version=f"{settings.store.name}/{version.version}"), announcement


def _base(
    settings: Settings, incumbent: _Incumbent, config: StudentConfig, n_events: int
) -> tuple[Model | None, StudentConfig]:
    """→ (the model whose recurrence a minor one keeps, None for a major one; the configuration to train under)."""
    model = incumbent.model
    if incumbent.announcement is None or model.student is None:
        return None, config
    known = model.config
    if set(config.platforms) - set(known.platforms) or known.size != config.size or known.n_features != N_FEATURES:
        return None, config
    since_major = 0
    for manifest in reversed(artifact.list_versions(settings.store.uri, settings.store.name)):
        if manifest.kind == "major":
            if n_events >= 2 * manifest.training_range.get("events", 0):
                return None, config
            break
        since_major += 1
    return (None, config) if since_major + 1 >= settings.trainer.major_every else (model, known)


def _device(settings: Settings) -> str:
    """Where the worker scores, or the CPU where there is nothing else here."""
    return settings.worker.device if torch.cuda.is_available() else "cpu"


def _decide(trained: Trained, compared: Comparison, verdict: Verdict, history_events: int) -> RoundResult:
    """What the gate's verdict makes of the round."""
    return RoundResult(
        outcome=verdict.outcome,
        reason=verdict.reason,
        history_events=history_events,
        kind=trained.kind,
        candidate=compared.candidate,
        incumbent=compared.incumbent,
        log_loss=verdict.log_loss.candidate,
        incumbent_log_loss=verdict.log_loss.incumbent,
        verdict=verdict,
    )


# ── announcements ────────────────────────────────────────────────────────────────────────────────────────────────────


async def _read_announcement(settings: Settings) -> tuple[Announcement | None, bool]:
    """→ (the newest announcement of our model, None where there is none; whether it was withdrawn by a null value)."""
    newest: bytes | None = None
    ever = False
    async with open_consumer(settings.kafka, settings.topics.models) as (consumer, partitions):
        async for _, records in read_to_end(consumer, partitions, timeout_s=settings.kafka.request_timeout_s):
            for record in records:
                if record.key == settings.store.name.encode():
                    newest, ever = record.value, True
    if newest is None:
        return None, ever
    try:
        return msgspec.json.decode(newest, type=Announcement), False
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.error("announcement cannot be read", topic=settings.topics.models, error=str(error))
        return None, False


def _load_incumbent(settings: Settings, announced: Announcement | None, withdrawn: bool) -> _Incumbent:
    """The announced version; with none ever announced the newest of the store that loads; the prior where nothing does,
    or where the last announcement was withdrawn."""
    store = settings.store
    versions: list[ModelVersion] = [announced] if announced is not None else []
    if announced is None and not withdrawn:
        versions = artifact.versions(store.uri, store.name)
    for version in versions:
        try:
            model = artifact.load(store.uri, store.name, version, fold=settings.fold, size=settings.worker.size)
        except ArtifactError as error:
            log.error("model cannot be loaded", version=version.version, reason=error.reason, detail=error.detail)
            continue
        return _Incumbent(model, announced or _announcement(settings, version, None))
    return _Incumbent(artifact.load_prior(settings.fold), None)


def _announcement(settings: Settings, version: ModelVersion, earlier: Announcement | None) -> Announcement:
    fallbacks: list[ModelVersion] = []
    if earlier is not None:
        last = ModelVersion(version=earlier.version, uri=earlier.uri, sha256=earlier.sha256, abi=earlier.abi)
        fallbacks = [last, *earlier.fallbacks][:MAX_FALLBACKS]
    return Announcement(
        name=settings.store.name,
        version=version.version,
        uri=version.uri,
        sha256=version.sha256,
        abi=version.abi,
        published_at=_now_ms(),
        fallbacks=fallbacks,
    )


async def _announce(settings: Settings, announcement: Announcement) -> None:
    """Sends it and waits until all in-sync replicas have it."""
    producer = AIOKafkaProducer(**client_options(settings.kafka), acks="all")
    await producer.start()
    try:
        await producer.send_and_wait(
            settings.topics.models, msgspec.json.encode(announcement), key=announcement.name.encode()
        )
    finally:
        await producer.stop()
    log.info("model announced", model=f"{announcement.name}/{announcement.version}", topic=settings.topics.models)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# ── what a person sees ───────────────────────────────────────────────────────────────────────────────────────────────


class _Stages:
    """Names and times the stages of a round; a progress bar on a terminal, structured lines otherwise."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> _Stages:
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


def _log_result(result: RoundResult) -> None:
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


class _Metrics:
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
