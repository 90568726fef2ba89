"""The trainer as a program: a round every interval, from the topic `events` to an announcement in `models`.

    pull ─► labels ─► replay ─► teach ─► train ─► judge candidate and incumbent ─► gate ─► recalibrate ─► store ─► announce
                                                                                    └ no: say why, keep the incumbent

A candidate is published where it passes the gate (`trainer/gate.py`) on later events, calibrated once more by those very
events (`trainer/recalibrate.py`). The incumbent is the version announced last; where nothing ever was, the newest of the
store that loads (it is then announced at once: a crash may have come between store and announcement); else, and after a
withdrawal, the prior.

A major model (new recurrence) is trained where there is no incumbent to build on, where a platform is new, where a teacher
is due, every `major_every`-th publication, and once the examples have doubled since the last major one. The rest are
minor. The first model is trained without a teacher, so that it comes soon; later ones distil what `trainer/lessons.py`
has been told.

Reads and writes only the broker and the stores: no worker, no platform file, no raw id.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import structlog
import torch
from aiokafka.errors import KafkaError

from models import artifact
from models.config import Settings
from models.errors import ArtifactError, HistoryError
from models.events import Announcement
from models.fold import N_FEATURES
from models.scorer import Model
from models.student import StudentConfig
from trainer import evaluate as judge
from trainer import gate, groups
from trainer.announce import Incumbent, announce, announcement_of, load_incumbent, now_ms, read_announcement
from trainer.evaluate import Comparison, Report
from trainer.examples import Examples, GateStart, gate_start, heads_of, held_out, make_examples, replay
from trainer.fit import Schedule
from trainer.gate import Limits, Verdict
from trainer.history import History, HistoryStore, pull
from trainer.labels import make_labels, matured
from trainer.lessons import Heard, Lessons
from trainer.recalibrate import Served, recalibrate
from trainer.train import Trained, learned, train
from trainer.watch import Metrics, Stages, log_result

log = structlog.get_logger("crosscurrent.trainer")

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
        metrics = Metrics(settings.metrics)
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


class _Trainer:
    """One trainer process: its settings, its metrics, and nothing that must outlive a round but the teacher."""

    def __init__(self, settings: Settings, heads, stop: asyncio.Event, metrics: Metrics) -> None:
        self.settings, self.heads, self.stop, self.metrics = settings, heads, stop, metrics
        self.history = HistoryStore(settings.trainer.history_uri)
        self.lessons: Lessons | None = None
        """Read where they are first needed: the store may not be reachable yet."""
        self.has_published = False
        self.judged_events = -1
        """Length of the history when a candidate was last judged: without a new event it is not judged again."""

    async def round(self) -> RoundResult:
        """One round; never raises for what lies outside (Kafka, the stores)."""
        started = time.perf_counter()
        with Stages() as stages:
            try:
                result = await self._round(stages)
            except _Stopped:
                result = RoundResult("stopped", "asked to stop")
            except (HistoryError, ArtifactError, KafkaError, OSError) as error:
                result = RoundResult("failed", f"{type(error).__name__}: {error}")
        result = result._replace(seconds=time.perf_counter() - started, stage_seconds=dict(stages.seconds))
        self.metrics.observe(result)
        log_result(result)
        return result

    async def _round(self, stages: Stages) -> RoundResult:
        settings = self.settings
        with stages.stage("pull"):
            pulled = await pull(
                self.history, settings.kafka, settings.topics.events, stop=self.stop, on_progress=stages.count
            )
            self.metrics.refused.inc(pulled.refused)
            announced, withdrawn = await read_announcement(settings)
            incumbent = await asyncio.to_thread(load_incumbent, settings, announced, withdrawn)
            if announced is None and incumbent.announcement is not None:
                await announce(settings, incumbent.announcement)
        self.has_published = incumbent.announcement is not None
        result, announcement = await asyncio.to_thread(self._train, incumbent, stages)
        if announcement is not None:
            with stages.stage("announce"):
                await announce(settings, announcement)
            self.has_published = True
            self.metrics.publish(announcement, result)
        return result

    def _check(self) -> None:
        if self.stop.is_set():
            raise _Stopped

    def _train(self, incumbent: Incumbent, stages: Stages) -> tuple[RoundResult, Announcement | None]:
        """Everything between Kafka and Kafka; runs in a thread. → the result, and what is to be announced."""
        settings, options = self.settings, self.settings.trainer
        if incumbent.announcement is not None:
            # Of this thread and those that it starts. The first model is waited for.
            os.setpriority(os.PRIO_PROCESS, 0, max(options.nice, os.getpriority(os.PRIO_PROCESS, 0)))
        with stages.stage("read"):
            history = self.history.read()
            self._check()
            labels = make_labels(history, settings.fold, settings.horizons)
            start = gate_start(history, labels, settings.horizons, options.validation_fraction, options.max_events)
        n = len(history)
        if n == self.judged_events:
            return RoundResult("nothing_new", "no event has come since the last round", n), None
        if start is None:
            return RoundResult("too_few", "no label has had the time to mature", n), None
        until_N = start.user_U[history.user]
        trainable = matured(labels, history.events["ts"], settings.horizons, until_N)[:, :3].any(axis=1).sum()
        if trainable < options.min_events:
            reason = f"{trainable} events have matured labels; a round needs {options.min_events}"
            return RoundResult("too_few", reason, n), None
        with stages.stage("replay"):
            size = settings.worker.size
            replayed = replay(
                history,
                settings.fold,
                size,
                until_ms=start.user_U,
                max_events=options.max_events,
                older_share=options.older_share,
                check=self._check,
            )
            heads = heads_of(history, self.heads, start)
            config = StudentConfig.of(size, N_FEATURES, history.platforms, heads)
            due = self._teacher_due(incumbent, len(replayed.index_M), history.platforms)
            base, config = _base(settings, incumbent, config, len(replayed.index_M), due is not None)
            examples = make_examples(history, labels, replayed, config, settings.horizons, start)
        with stages.stage("teach"):
            heard = self._teach(examples, history, config.platforms, due, incumbent, stages)
            self.metrics.hear(heard, len(self.lessons or ()))
        with stages.stage("train"):
            trained = self._fit(examples, config, history, base, heard, stages)
        with stages.stage("evaluate"):
            compared = judge.compare(
                trained.model,
                incumbent.model.as_judged(),
                history,
                labels,
                settings.horizons,
                replayed.rows,
                start,
                learned_R3=learned(examples, len(config.platforms)),
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
            served = recalibrate(trained.model, history, labels, settings.horizons, compared)
            version = self._publish(trained, served, examples, compared, verdict, history, start, incumbent)
        announcement = announcement_of(settings, version, incumbent.announcement)
        return result._replace(version=f"{settings.store.name}/{version.version}"), announcement

    def _teacher_due(self, incumbent: Incumbent, examples: int, platforms: tuple[str, ...]) -> str | None:
        """Why a teacher is to be fitted; None where none is. The first model does not wait for one."""
        if not self.settings.trainer.teacher or incumbent.announcement is None:
            return None
        if self.lessons is None:
            self.lessons = Lessons(self.history, self.settings)
        return self.lessons.due(examples, now_ms(), platforms)

    def _teach(
        self,
        examples: Examples,
        history: History,
        platforms: tuple[str, ...],
        due: str | None,
        incumbent: Incumbent,
        stages: Stages,
    ) -> Heard:
        if self.lessons is None or incumbent.announcement is None:
            return Heard(None, 0, None)
        id_M = history.events["id"][examples.index_M]
        if due is not None:
            log.info("a teacher is fitted", because=due, examples=len(examples))
            heard = self.lessons.fit(
                examples, id_M, platforms, now_ms(), self._check, history.categories, progress=stages.share
            )
        else:
            heard = self.lessons.hear(examples, id_M, platforms, history.categories)
        if heard.soft_MT is None:
            return heard
        # Who is held out calibrates the student, and so must not have taught it anything.
        theirs_M = held_out(history.users)[examples.user_M]
        return heard._replace(soft_MT=np.where(theirs_M[:, None], np.float32(np.nan), heard.soft_MT))

    def _fit(
        self, examples: Examples, config: StudentConfig, history: History, base: Model | None, heard: Heard, stages: Stages
    ) -> Trained:
        """A candidate: by the ladder of transfer where a major version is asked to, else of all platforms together."""
        settings, options = self.settings, self.settings.trainer
        prior_logits_3 = artifact.load_prior(settings.fold).calibration_P32[0, :, 1]
        schedule = self._schedule(base is None and heard.soft_MT is not None)
        if base is None and options.transfer_to is not None:
            if _two_sides(examples, config, options.transfer_to):
                # Here, not above: a trainer starts sooner without SciPy.
                from trainer.transfer import transfer

                moved = transfer(
                    examples, config, history.categories, settings.fold, schedule, target=options.transfer_to,
                    rung=options.transfer, prior_logits_3=prior_logits_3, check=self._check,
                )  # fmt: skip
                log.info("transfer", to=options.transfer_to, rung=moved.rung, reasons=moved.reasons)
                return moved.trained
            log.info("no transfer yet: it or the others have no example", to=options.transfer_to)
        by_frequency = options.group_weights == "frequency"
        return train(
            examples,
            config,
            history.categories,
            settings.fold,
            schedule,
            prior_logits_3=prior_logits_3,
            incumbent=base,
            soft_MT=heard.soft_MT,
            weight_M=groups.by_frequency(examples, groups.groups_of(examples)) if by_frequency else None,
            check=self._check,
            progress=stages.share,
        )

    def _schedule(self, distils_anew: bool) -> Schedule:
        options = self.settings.trainer
        schedule = Schedule(
            epochs=options.epochs,
            batch_events=options.batch_events,
            rate=options.learning_rate,
            soft_weight=options.distil_weight,
            seed=options.seed,
        )
        if not distils_anew:
            return schedule
        return schedule._replace(
            epochs=options.distil_epochs,
            batch_events=options.distil_batch_events,
            rate=options.distil_rate,
            dropout=options.distil_dropout,
            cut=options.distil_cut,
        )

    def _publish(
        self,
        trained: Trained,
        served: Served,
        examples: Examples,
        compared: Comparison,
        verdict: Verdict,
        history: History,
        start: GateStart,
        incumbent: Incumbent,
    ):
        settings = self.settings
        gates = zip(history.platforms, start.platform_P.tolist(), start.has_P, strict=True)
        return artifact.publish(
            settings.store.uri,
            settings.store.name,
            served.model,
            metrics={
                "candidate": compared.candidate.as_dict(),
                "incumbent": compared.incumbent.as_dict(),
                "gate": verdict.as_dict(),
                "recalibrated": served.as_dict(),
                "gate_start": {platform: ms if has else None for platform, ms, has in gates},
            },
            training_range={
                "first_ts": int(history.events["ts"].min()),
                "last_ts": start.last_ms,
                "events": len(examples),
            },
            reference_histograms=judge.reference_histograms(
                compared.candidate._replace(shares=served.shares),
                examples.columns.features_NF.numpy(),
                examples.platform_M,
                trained.model.config.platforms,
            ),
            fold=settings.fold,
            now_ms=now_ms(),
            kind=trained.kind,
            parent=incumbent.announcement.version if incumbent.announcement else None,
        )


def _two_sides(examples: Examples, config: StudentConfig, target: str) -> bool:
    """Both the target and the other platforms have examples."""
    row = 1 + config.platforms.index(target) if target in config.platforms else -1
    return 0 < (examples.platform_M == row).sum() < len(examples)


def _base(
    settings: Settings, incumbent: Incumbent, config: StudentConfig, n_events: int, teacher_is_due: bool
) -> tuple[Model | None, StudentConfig]:
    """→ (the model whose recurrence a minor one keeps, None for a major one; the configuration to train under)."""
    model = incumbent.model
    if incumbent.announcement is None or model.student is None or teacher_is_due:
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
