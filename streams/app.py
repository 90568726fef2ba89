"""The worker: one Faust app with the agents `ingest` and `score`, and everything around them.

    run_worker ─► topics exist ─┬─► Faust app (transport, table on an arena, agents): joins its group ─┬─► ready
                                │       ├─ models, identities: read to the end, then followed          │
                                │       ├─ lag, hold-back, health: every second                        │
                                │       └─ SIGTERM/SIGINT: drain by the commit protocol, exit 0        │
                                └─► thread: kernels, torch, the first model ─► nothing is fetched before that

A worker joins while it loads where nobody else serves its group: the broker may take seconds to answer. Where others do, it
loads first, since what it is given would wait for it, and they can do it meanwhile.

Crash-only: what cannot be handled ends the process with the reason and commits nothing; the next start goes on from the
last commit. Knows how the parts fit; the parts know their work.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faust
import numpy as np
import structlog
from faust.tables import TableManager
from faust.tables.recovery import Recovery, ServiceStopped
from faust.types import TP
from yarl import URL

from models.config import Settings
from models.errors import ConfigError, CrosscurrentError
from streams import snapshots
from streams.arena import ArenaStore
from streams.cold import ColdRows
from streams.commit import Committer, KillSwitch, Sender, Watchdog
from streams.compacted import CompactedReader
from streams.identities import Identities
from streams.ingest import HoldBack, IngestStage
from streams.kafka import CHANGELOG_CONFIG, client_options, create_topics, has_members
from streams.metrics import Health, Metrics, OpsServer
from streams.platforms import Platform, load_platforms
from streams.pseudonym import Pseudonymiser
from streams.transport import SCHEME, BatchSchema, batches, register
from streams.warm import warm_stages
from streams.wire import Records

if TYPE_CHECKING:  # their import takes torch's
    from streams.model_feed import ModelFeed
    from streams.score import ScoreStage

log = structlog.get_logger("crosscurrent.worker")

TABLE = "user_state"
EXIT_CRASHED = 70

_SENDS_AHEAD = 16
"""Micro-batches of one agent whose sends may be unacknowledged before it takes the next: bounds memory."""
_TURNS_BETWEEN = 4
"""Of the event loop, between two micro-batches: an acknowledgement, the request after it and the fetch after that each take
one, and would else wait for a whole micro-batch each."""
_TURNS_TO_DELIVER = 6
"""Of the event loop, in which Faust hands over the next message that was fetched with one."""
_FETCH_BYTES = 1 << 20
"""Most that is asked for of a partition at a time; a record larger than that comes whole."""
_EVENT_BYTES = 200
"""Of a canonical event in a fetch, about."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class StepsThatEnd(Recovery):
    """Faust takes a step of its recovery that lasts longer than the broker's request timeout for its own end: the worker
    would stay in its group, never ready. Ours crashes, and the next start tries again."""

    async def _wait(self, coro: Any, timeout: Any = None) -> None:
        try:
            await super()._wait(coro, timeout)
        except ServiceStopped:
            if not self.should_stop:
                raise CrosscurrentError(
                    f"a step of the recovery took longer than kafka.request_timeout_s ({timeout} s): the broker is slow or "
                    "away. Start the worker again; if it stays so, raise that setting"
                ) from None
            raise


class Tables(TableManager):
    """Faust's tables, started at once: it waits for a second, in case one is declared late. Ours are declared before."""

    @property
    def recovery(self) -> Recovery:
        if self._recovery is None:
            self._recovery = StepsThatEnd(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery

    async def on_start(self) -> None:
        await self._update_channels()
        await self.recovery.start()


class CrosscurrentApp(faust.App):
    """Faust's app with what our transport asks of it."""

    committer: Committer
    loaded: asyncio.Event
    fetch_max_wait_ms: int
    fetch_min_bytes: int
    idempotent_producer: bool

    async def _stop_consumer(self) -> None:
        """Drain: nothing more is taken in, then everything taken in is committed, then Faust stops."""
        if self._consumer is not None and self.committer.consumer is not None:
            self._consumer.stop_flow()
            self.flow_control.suspend()
            self.flow_control.clear()
            await self.committer.commit()
        await super()._stop_consumer()


class Worker:
    """One worker process, from settings to exit code."""

    def __init__(self, settings: Settings, began_s: float) -> None:
        """`began_s`: when the process began, by time.monotonic()."""
        self.settings = settings
        self._began_s = began_s
        self.stages = settings.worker.stages
        self.metrics = Metrics()
        self.health = Health()
        self.kill = KillSwitch(os.environ.get("CROSSCURRENT_KILL_AT"))
        self.watchdog = Watchdog(settings.kafka.session_timeout_s)
        self.platforms = self._load_platforms()
        self.pseudonymiser = Pseudonymiser(settings.pseudonym) if "ingest" in self.stages else None
        self.identities = Identities()
        self.hold_back = HoldBack(self.platforms, settings.fold.lateness_s)
        self._held: set[TP] = set()
        self._assigned = False
        self._tasks: list[asyncio.Task] = []
        self._loaded = asyncio.Event()
        """Whatever events and recovery need is in memory; nothing is fetched before."""
        self.feed: ModelFeed | None = None
        self.ingest: IngestStage | None = None
        self.score: ScoreStage | None = None

    @property
    def app_id(self) -> str:
        """The group. `ingest` alone has one of its own, so that every member of a group reads the same topics."""
        return self.settings.worker.app_id + ("" if "score" in self.stages else "-ingest")

    @property
    def changelog_topic(self) -> str:
        return f"{self.app_id}-{TABLE}-changelog"

    def _load_platforms(self) -> list[Platform]:
        worker, topics = self.settings.worker, self.settings.topics
        platforms = load_platforms(worker.platforms_dir, worker.platforms)
        ours = {topics.events, topics.scores, topics.dead_letters, topics.models, topics.identities, self.changelog_topic}
        for platform in platforms:
            if taken := ours.intersection(platform.topics):
                raise ConfigError(f"{platform.path}: topic {sorted(taken)[0]!r} is one of Crosscurrent's own; rename either")
        return platforms

    # -- start and stop

    async def run(self) -> int:
        """Until SIGTERM or SIGINT. Returns the exit code; a crash ends the process from `fatal`."""
        settings = self.settings
        self._loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(signum, stop.set)
        ops = OpsServer(self.metrics.registry, self.health, settings.metrics.host, settings.metrics.port)
        if settings.metrics.enabled:
            log.info("metrics.listening", host=settings.metrics.host, port=ops.start())
        self.metrics.recovery_in_progress.set(0)
        await self._create_topics()
        joins_at_once = await self._may_join_before_it_is_loaded()
        self._build_app()
        loading = self._spawn("load", self._load())
        await self._offer_snapshots()
        if not joins_at_once:
            await loading
        self.watchdog.start()
        self._follow()
        settings.worker.data_dir.mkdir(parents=True, exist_ok=True)
        self._spawn("app", self.app.start())
        self._spawn("watch", self._watch())
        self._spawn("commits", self.committer.run(settings.worker.commit_interval_s))
        if settings.worker.snapshot_interval_s:
            self._spawn("snapshots", self._keep_snapshots())
        await stop.wait()
        log.info("worker.draining")
        await self._shut_down(ops)
        log.info("worker.stopped")
        return 0

    async def _may_join_before_it_is_loaded(self) -> bool:
        """Not where snapshots are kept: they are restored while the group waits for us. Nor on a machine so slow (a cold
        disk) that torch's libraries, read without a turn for any other thread, might take a session: it would be fenced."""
        slow = time.monotonic() - self._began_s > self.settings.kafka.session_timeout_s  # the longest library: a third of it
        if slow or self.settings.worker.snapshot_interval_s:
            return False
        return not await has_members(self.settings.kafka, self.app_id)

    async def _load(self) -> None:
        """Kernels, torch and the model that serves until the first announcement: seconds of work, in a thread."""
        await asyncio.to_thread(warm_stages, self.stages)
        if "score" in self.stages:
            self.feed, self.score = await asyncio.to_thread(self._load_scoring)
            _set_torch_threads(self.settings.worker.threads)  # each thread has a number of its own
        collect_rarely()
        self._loaded.set()
        log.info("worker.loaded")

    def _load_scoring(self) -> tuple[ModelFeed, ScoreStage]:
        from streams.model_feed import ModelFeed
        from streams.score import ScoreStage

        settings, topics = self.settings, self.settings.topics
        _set_torch_threads(settings.worker.threads)
        feed = ModelFeed(settings, self.metrics)
        return feed, ScoreStage(
            self.store.arena,
            feed,
            self.sender,
            self.committer,
            self.metrics,
            self.kill,
            scores_topic=topics.scores,
            dead_letters_topic=topics.dead_letters,
            partitions=topics.partitions,
            heads={platform.name: platform.heads for platform in self.platforms},
            explain=settings.worker.explain,
        )

    async def _on_models(self, records: list[Any]) -> None:
        await self._loaded.wait()
        await self.feed.on_records(records)

    async def _shut_down(self, ops: OpsServer) -> None:
        for condition in ("assigned", "recovered"):
            self.health.set(condition, False)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.app.stop()
        await self._save_snapshots(lambda partition: asyncio.sleep(0))  # the drain has committed everything
        self.watchdog.stop()
        if self.store is not None and (cold := self.store.arena.cold) is not None:
            log.info("state.cold", rows=len(cold), moved_out=cold.moved_out, brought_back=cold.brought_back)
            cold.close()
        if self.settings.metrics.enabled:
            ops.close()

    async def _create_topics(self) -> None:
        settings = self.settings
        extra: list[tuple[str, int, dict[str, str]]] = []
        if "ingest" in self.stages:
            extra += [(topic, -1, {}) for platform in self.platforms for topic in platform.topics]
        if "score" in self.stages:
            extra.append((self.changelog_topic, settings.topics.partitions, CHANGELOG_CONFIG))
        created = await create_topics(settings.kafka, settings.topics, extra)
        if created:
            log.info("topics.created", topics=created)

    def _follow(self) -> None:
        """Starts the readers of `models` and `identities`; the agents wait for their ends."""
        topics, options = self.settings.topics, client_options(self.settings.kafka)
        self._identities_reader = CompactedReader(topics.identities, self.identities.on_records, options)
        if self.ingest is not None:
            self._spawn("identities", self._identities_reader.run())
        if "score" in self.stages:
            self._models_reader = CompactedReader(topics.models, self._on_models, options)
            self._spawn("models", self._models_reader.run())

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self.fatal(name, error)

        task = self._loop.create_task(guarded(), name=name)
        self._tasks.append(task)
        return task

    def fatal(self, where: str, error: BaseException) -> None:
        """Ends the process, with the reason, without committing anything."""
        expected = error if isinstance(error, CrosscurrentError) else None
        log.critical("worker.crashed", where=where, reason=str(error) or repr(error), exc_info=None if expected else error)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CRASHED)

    # -- the Faust app

    def _build_app(self) -> None:
        settings = self.settings
        register()
        app = self.app = CrosscurrentApp(self.app_id, **_faust_options(settings))
        app.loaded = self._loaded
        app.fetch_max_wait_ms, app.fetch_min_bytes = fetches(settings)
        app.idempotent_producer = settings.kafka.idempotence
        store = None
        if "score" in self.stages:
            table = app.Table(
                TABLE,
                partitions=settings.topics.partitions,
                store=f"arena://{settings.worker.size}",
                recovery_buffer_size=4,
                standby_buffer_size=1,  # a message is a whole fetch
                key_type=bytes,
                value_type=bytes,
                extra_topic_configs=CHANGELOG_CONFIG,
            )
            table.changelog_topic.schema = BatchSchema()
            store = table.data
            store.on_corrupt_row = settings.worker.on_corrupt_row
            # At once: the next event could be folded into a row that was not restored.
            store.on_failure = lambda error: self.fatal("state", error)
            if settings.worker.hot_users:
                cold = ColdRows(settings.worker.data_dir / "cold", settings.worker.on_corrupt_row)
                store.arena.keep_cold(cold, settings.worker.hot_users)
        self.store: ArenaStore | None = store
        self.committer = Committer(store, self.changelog_topic, self.metrics, self.kill)
        self.committer.on_failure = lambda error: self.fatal("commit", error)
        app.committer = self.committer
        self.sender = Sender(lambda: app.producer._producer, self.watchdog, self._loop)
        self.committer.sender = self.sender
        self._add_agents()
        app.on_partitions_assigned.connect(self._on_assigned)
        app.on_partitions_revoked.connect(self._on_revoked)

    def _add_agents(self) -> None:
        settings, topics = self.settings, self.settings.topics
        if "ingest" in self.stages:
            self.ingest = IngestStage(
                self.platforms,
                self.pseudonymiser,
                self.identities,
                self.sender,
                self.committer,
                self.metrics,
                events_topic=topics.events,
                dead_letters_topic=topics.dead_letters,
                partitions=topics.partitions,
                future_tolerance_s=settings.worker.future_tolerance_s,
            )
            sources = [topic for platform in self.platforms for topic in platform.topics]
            channel = self.app.topic(*sources, schema=BatchSchema())
            self.app.agent(channel, name="ingest")(self._ingest_agent)
        if "score" in self.stages:
            channel = self.app.topic(topics.events, schema=BatchSchema(), partitions=topics.partitions)
            self.app.agent(channel, name="score")(self._score_agent)

    async def _ingest_agent(self, stream: Any) -> None:
        await self._identities_reader.at_end.wait()
        await self._drive("ingest", stream, self.ingest)

    async def _score_agent(self, stream: Any) -> None:
        await self._loaded.wait()
        await self._models_reader.at_end.wait()
        self.health.set("model", True)
        await self._drive("score", stream, self.score)

    async def _drive(self, name: str, stream: Any, stage: IngestStage | ScoreStage) -> None:
        """Batches of one stage, strictly in order. What cannot be processed ends the process: Faust would skip it."""
        ahead: deque[list[asyncio.Task]] = deque()
        most = self.settings.worker.max_batch
        try:
            async for messages in self._fetched(stream, most if stage.joins_partitions else 1):
                for batch in batches(((message, message.value) for message in messages), most):
                    if sends := self._process(stage, batch):  # none where all were duplicates
                        ahead.append(sends)
                    if len(ahead) > _SENDS_AHEAD:
                        await asyncio.wait(ahead.popleft())
                    for _ in range(_TURNS_BETWEEN):
                        await asyncio.sleep(0)
        except Exception as error:
            self.fatal(name, error)

    async def _fetched(self, stream: Any, most: int) -> AsyncIterator[list[Any]]:
        """The messages that are there: as many as bring `most` records or a fetch's bytes together, at least one. A small
        micro-batch costs as much as some hundred events, so the partitions of one fetch make one. Where the stream ends
        meanwhile (the worker stops), what was gathered is left: it is not committed, and comes again."""
        events, queue = stream.events(), stream.channel.queue
        async for event in events:
            messages, records, size = [event.message], len(event.value), event.value.nbytes
            while records < most and size < _FETCH_BYTES and await _soon(queue):
                if (event := await anext(events, None)) is None:
                    return
                messages.append(event.message)
                records, size = records + len(event.value), size + event.value.nbytes
            yield messages

    def _process(self, stage: IngestStage | ScoreStage, batch: list[tuple[Any, Records]]) -> list[asyncio.Task]:
        """A micro-batch, but for what will come again or was processed. → its sends"""
        parts, seen = [], {}
        for message, records in batch:
            if self._is_current(message):
                tp = message.tp
                if unseen := self._unseen(records, seen.get(tp, self.committer.position(tp))):
                    parts.append((tp, unseen))
                    seen[tp] = int(unseen.offset[-1]) + 1
        return stage.process(parts) if parts else []

    def _is_current(self, message: Any) -> bool:
        """False for what was fetched before a rebalance or before the seek that ends it, which brings it back."""
        consumer = self.app.consumer
        if not consumer.flow_active or message.generation_id != self.app.consumer_generation_id:
            return False
        sought = self.committer.position(message.tp) is not None and not consumer.seeking
        return sought and message.seek == consumer.seeks

    @staticmethod
    def _unseen(records: Records, position: int) -> Records:
        """Without those that were processed since the seek: a partition's offsets are processed once and in order."""
        return records[int(np.searchsorted(records.offset, position)) :]

    # -- what happens around them

    async def _on_assigned(self, sender: Any, assigned: set[TP], **kwargs: Any) -> None:
        self.metrics.rebalances.inc()
        self.committer.consumer = self.app.consumer
        self._assigned = True
        self.health.set("assigned", True)

    async def _on_revoked(self, sender: Any, revoked: set[TP], **kwargs: Any) -> None:
        self._assigned = False
        self._held.clear()
        self.health.set("assigned", False)
        self.metrics.forget_lag()

    async def _watch(self) -> None:
        """Health, lag, recovery and hold-back, several times a second."""
        recovery_started_s: float | None = None
        while True:
            self.health.beat()
            loaded = self._loaded.is_set()
            recovering = bool(loaded and self.store is not None and self.app.in_recovery)
            if recovering and recovery_started_s is None:
                recovery_started_s = time.monotonic()
            if not recovering and recovery_started_s is not None:
                self.metrics.recovery_seconds.set(time.monotonic() - recovery_started_s)
                recovery_started_s = None
            self.metrics.recovery_in_progress.set(recovering)
            self._watch_state()
            consumer = self.app.consumer
            ready = loaded and self._assigned and not recovering and not self.app.rebalancing and consumer.flow_active
            self.health.set("recovered", ready)
            if "score" not in self.stages:
                self.health.set("model", True)
            if ready:
                self._watch_sources(consumer)
            if self.app.should_stop or self.app.crashed:
                raise CrosscurrentError(f"Faust stopped the app: {self.app.crash_reason!r}")
            await asyncio.sleep(0.25)

    @property
    def _snapshot_folder(self) -> Path:
        return self.settings.worker.data_dir / "state"

    async def _offer_snapshots(self) -> None:
        """Those on this machine that the changelog continues are the store's to load, each once."""
        settings = self.settings
        if self.store is None or not settings.worker.snapshot_interval_s:
            return
        folder, topic = self._snapshot_folder, self.changelog_topic
        numbers = range(settings.topics.partitions)
        offered = await snapshots.usable(settings.kafka, folder, topic, numbers, settings.worker.size)

        async def load(partition: int) -> tuple[int, int] | None:
            if offered.pop(partition, None) is None:
                return None
            path, started_s = snapshots.path_of(folder, topic, partition), time.monotonic()
            try:
                header = await snapshots.load(self.store.arena, path, partition, topic)
            except snapshots.Unusable as error:
                snapshots.discard(path, str(error))
                return None
            seconds = time.monotonic() - started_s
            self.metrics.snapshot_rows.inc(header.rows)
            self.metrics.snapshot_load_seconds.inc(seconds)
            told = {"rows": header.rows, "offset": header.offset, "seconds": round(seconds, 3)}
            log.info("snapshot.loaded", partition=partition, **told)
            return header.offset, header.offset_ms

        self.store.load_snapshot = load

    async def _keep_snapshots(self) -> None:
        while True:
            await asyncio.sleep(self.settings.worker.snapshot_interval_s)
            if not self.app.in_recovery:
                await self._save_snapshots(self.committer.commit_partition)

    async def _save_snapshots(self, commit: Callable[[int], Awaitable[object]]) -> None:
        """One of each partition that we own; a disk that is full or gone costs the snapshot only."""
        if self.store is None or not self.settings.worker.snapshot_interval_s:
            return
        for partition in self.store.arena.partitions():
            place = self.store.place(TP(self.changelog_topic, partition))
            if partition in self.store.standbys or place is None:
                continue
            started_s = time.monotonic()
            try:
                rows = await snapshots.save(
                    self.store.arena,
                    self._snapshot_folder,
                    self.changelog_topic,
                    partition,
                    *place,
                    commit=commit,
                )
            except OSError as error:
                log.error("snapshot.not_saved", partition=partition, reason=str(error))
            else:
                log.info("snapshot.saved", partition=partition, rows=rows, seconds=round(time.monotonic() - started_s, 3))

    def _watch_state(self) -> None:
        if self.store is None:
            return
        self.metrics.state_rows.set(len(self.store.arena))
        self.metrics.state_bytes.set(self.store.arena.nbytes)
        new = self.store.recovered_rows - self._counted_rows
        self._counted_rows += new
        self.metrics.recovery_rows.inc(new)
        if (cold := self.store.arena.cold) is not None:
            self.metrics.cold_rows.set(len(cold))
            self.metrics.cold_bytes.set(cold.nbytes)
            out, back = self._counted_cold
            self._counted_cold = cold.moved_out, cold.brought_back
            self.metrics.cold_rows_moved_out.inc(cold.moved_out - out)
            self.metrics.cold_rows_brought_back.inc(cold.brought_back - back)

    _counted_rows = 0
    _counted_cold = 0, 0

    def _watch_sources(self, consumer: Any) -> None:
        behind = set()
        for tp in consumer.assignment():
            if tp.topic == self.changelog_topic:
                continue
            high = consumer.highwater(tp)
            if high is None:
                continue
            lag = max(0, high - self._next_offset(consumer, tp))
            self.metrics.lag_events.labels(tp.topic, str(tp.partition)).set(lag)
            if lag and self.ingest is not None and tp.topic != self.settings.topics.events:
                behind.add(tp)
        if self.ingest is not None:
            self._apply_hold_back(consumer, self.hold_back.held(self.ingest.latest_ts, behind))

    def _next_offset(self, consumer: Any, tp: TP) -> int:
        position = self.committer.position(tp)
        return position if position is not None else (consumer._committed_offset[tp] or 0)

    def _apply_hold_back(self, consumer: Any, held: set[TP]) -> None:
        if freed := self._held - held:
            consumer.resume_partitions(freed & consumer.assignment())
        if new := held - self._held:
            consumer.pause_partitions(new)
        self._held = held


async def _soon(queue: asyncio.Queue) -> bool:
    """Whether something is in the queue, or is put there in a moment."""
    for _ in range(_TURNS_TO_DELIVER):
        if not queue.empty():
            return True
        await asyncio.sleep(0)
    return False


def fetches(settings: Settings) -> tuple[int, int]:
    """→ the longest wait (ms) and the fewest bytes of a fetch."""
    if not settings.worker.linger_ms:
        return settings.kafka.fetch_max_wait_ms, 1
    return settings.worker.linger_ms, settings.worker.max_batch * _EVENT_BYTES


def _faust_options(settings: Settings) -> dict[str, Any]:
    kafka, worker = settings.kafka, settings.worker
    servers = [URL(f"{SCHEME}://{server.strip()}") for server in kafka.bootstrap.split(",")]
    return {
        "broker": servers,
        "broker_credentials": _credentials(settings),
        "datadir": str(worker.data_dir / "faust"),
        "store": "memory://",
        "TableManager": Tables,
        "web_enabled": False,
        "topic_partitions": settings.topics.partitions,
        "topic_replication_factor": kafka.replication_factor,
        "topic_disable_leader": True,
        "table_standby_replicas": worker.standbys,
        "stream_wait_empty": False,
        "stream_buffer_maxsize": 8,
        "broker_session_timeout": kafka.session_timeout_s,
        "broker_heartbeat_interval": kafka.heartbeat_interval_s,
        "broker_request_timeout": kafka.request_timeout_s,
        "broker_commit_interval": worker.commit_interval_s,
        "consumer_auto_offset_reset": "earliest",
        "consumer_max_fetch_size": _FETCH_BYTES,
        "producer_acks": -1,
        "producer_linger": 0.0,
        "producer_max_batch_size": 900_000,
        "producer_max_request_size": 4 << 20,
        "producer_request_timeout": kafka.request_timeout_s,
    }


def _credentials(settings: Settings) -> Any:
    options = client_options(settings.kafka)
    protocol, context = options["security_protocol"], options.get("ssl_context")
    if protocol == "PLAINTEXT":
        return None
    if protocol == "SSL":
        return faust.SSLCredentials(context=context)
    return faust.SASLCredentials(
        username=options["sasl_plain_username"],
        password=options["sasl_plain_password"],
        mechanism=options["sasl_mechanism"],
        ssl_context=context,
    )


def _set_torch_threads(n: int) -> None:
    import torch

    torch.set_num_threads(n)


def quiet_parts() -> None:
    """Faust and aiokafka build debug records even when nobody reads them."""
    for name in ("aiokafka", "faust", "faust.topics", "faust.app", "mode"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))


def collect_rarely() -> None:
    """A batch makes some hundred thousand objects, none of them in a cycle, and drops them; looking for cycles after every
    700, as Python does, took a quarter of a busy worker's time. What is there now is never looked at again."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    gc.enable()


def keep_memory() -> bool:
    """Fetches and sends are blocks of some MiB that come and go. Given back to the system and faulted in again each time,
    they cost about 0.5 µs an event; blocks of up to 32 MiB are kept instead. False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20) and mallopt(_M_TRIM_THRESHOLD, 256 << 20))


def run_worker(settings: Settings, began_s: float | None = None) -> int:
    """Runs one worker until it is told to stop. Returns the exit code. `began_s`: when the process began, by
    time.monotonic(); None: now.

    Raises ConfigError for what is wrong with the settings, the platform files or the topics.
    """
    quiet_parts()
    keep_memory()
    unknown = set(settings.worker.stages) - {"ingest", "score"}
    if unknown or not settings.worker.stages:
        raise ConfigError("worker.stages needs `ingest`, `score` or both")
    return asyncio.run(Worker(settings, time.monotonic() if began_s is None else began_s).run())
