"""`crosscurrent demo`: the main job on one machine, and what a person wants to see of it.

    simulator or data sets ─► producer (with a ledger) ─► embedded broker ◄─► worker, trainer (processes of their own)
                                                               │
                              observer: events + scores + dead letters ─► table: rate, latency, lag, model, AUC
                              verifier: all three topics again, from offset 0, against the ledger ─► `lost`

The past is sent at full speed, then events come at a steady rate. With the simulator the clock is a simulated one: it
starts over a year ago and is fast, so that labels with a horizon of days mature while one watches.

Knows the worker and the trainer only as commands. Labels come from the caller (`crosscurrent.py`), because they are the
trainer's and this package does not import it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import msgspec
import numpy as np
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition
from rich.console import Console
from rich.live import Live
from rich.table import Table
from sklearn.metrics import roc_auc_score

from models.config import Settings
from models.errors import ConfigError, EventRefused
from models.events import BINARY_HEADS, HEADS, CanonicalEvent, IdentityLink, hash64
from streams.broker import EmbeddedBroker, die_with_parent, free_or_other
from streams.codec import columns, encode_json
from streams.commit import NO_HEADERS, Sender
from streams.dead_letters import decode_headers
from streams.kafka import client_options, connected, create_topics, end_offsets
from streams.platforms import SHIPPED, Platform, load_platforms
from streams.pseudonym import Pseudonymiser
from streams.replay import read_dataset
from streams.simulator import Simulator, SimulatorConfig

log = structlog.get_logger("crosscurrent.demo")

SIMULATED = ("sim_bazaar", "sim_metro", "sim_grocer")
BACKFILL_EVENTS = 100_000
"""Events sent at full speed before the steady rate begins."""
LIVE_EVENTS_PER_S = 1500
"""The steady rate of the simulator's events."""
EVENTS_A_PLATFORM = 60_000
"""Of a real data set: a sample of its users that has about so many events."""
LIVE_SHARE = 0.2
"""Of a real data set: the last events, sent at a steady rate over LIVE_S."""
LIVE_S = 150.0
LEAST_FOR_AUC = 200
"""Matured labels, and at least 10 of each class, before an AUC is shown."""

_DAY_MS = 86_400_000
_CHUNK = 1000
_DRAIN_S = 40.0


class Observed(NamedTuple):
    """Events as they were seen in `events`, n of them, of U users."""

    events: np.ndarray
    """(n,) of models.events.EVENT."""
    user: np.ndarray
    users: list[str]
    platform: np.ndarray
    platforms: tuple[str, ...]
    partition: np.ndarray


Labeller = Callable[[Observed], tuple[np.ndarray, np.ndarray]]
"""→ (labels (n, 3), matured (n, 4) bool in the order of HEADS)."""


class _Score(msgspec.Struct):
    event_id: str
    model: str
    degraded: bool
    p: dict[str, float | None]


_decode_event = msgspec.json.Decoder(CanonicalEvent).decode
_decode_score = msgspec.json.Decoder(_Score).decode


# -- the source


class Record(NamedTuple):
    topic: str
    key: bytes
    value: bytes


class Source(NamedTuple):
    """What is sent: records in order of arrival, how many of them at full speed and at which rate the
    others, and the identity links that come before."""

    platforms: list[Platform]
    records: Iterator[Record]
    backfill: int
    live_per_s: float
    links: list[tuple[str, str, str]]


def simulated_source(now_ms: int) -> Source:
    platforms = load_platforms(SHIPPED, SIMULATED)
    simulator = Simulator(SimulatorConfig(start_ms=now_ms - 400 * _DAY_MS, ledger=False))
    records = (Record(r.topic, r.key, r.value) for r in simulator.stream())
    return Source(platforms, records, BACKFILL_EVENTS, LIVE_EVENTS_PER_S, list(simulator.identity_links()))


def data_source(data: Path, now_ms: int) -> Source:
    """Every data set under `data` that a shipped platform file describes, a sample of the users of the large ones, each
    shifted so that its last event is now; merged by time."""
    names = sorted(path.stem for path in SHIPPED.glob("*.toml") if path.stem not in SIMULATED)
    platforms = [p for p in load_platforms(SHIPPED, tuple(names)) if (data / p.replay.files[0]).exists()]
    if not platforms:
        raise ConfigError(f"{data} holds none of the data sets that {SHIPPED} describes ({', '.join(names)})")
    everything = []
    for platform in platforms:
        rows = list(read_dataset(data, platform, users_fraction=_users_fraction(data, platform), end_ms=now_ms))
        everything += rows
    everything.sort(key=lambda row: row[3])
    records = (Record(topic, key, value) for topic, key, value, _ in everything)
    live = int(len(everything) * LIVE_SHARE)
    return Source(platforms, records, len(everything) - live, live / LIVE_S, [])


def _users_fraction(data: Path, platform: Platform) -> float | None:
    import pyarrow.parquet as pq

    rows = sum(pq.read_metadata(data / file).num_rows for file in platform.replay.files)
    return None if rows <= EVENTS_A_PLATFORM else EVENTS_A_PLATFORM / rows


# -- the producer and its ledger


class Sent(NamedTuple):
    """One chunk of the ledger: records sent to one partition, whose last one got `last_offset`."""

    topic: str
    partition: int
    last_offset: int
    values: list[bytes]


class Feeder:
    """Sends the source and keeps the ledger: what was sent, and the offset that the broker gave it."""

    def __init__(self, source: Source, settings: Settings) -> None:
        self._source = source
        self._settings = settings
        self.ledger: list[Sent] = []
        self.sent = 0
        self.live = False
        self._stop = False

    def stop(self) -> None:
        self._stop = True

    async def run(self) -> None:
        """Until stopped or the source ends; returns once everything sent is acknowledged."""
        producer = AIOKafkaProducer(acks="all", max_batch_size=500_000, **client_options(self._settings.kafka))
        await producer.start()
        try:
            sender = Sender(lambda: producer, None, asyncio.get_running_loop())
            await self._link(sender)
            await self._feed(sender)
        finally:
            await producer.stop()

    async def _link(self, sender: Sender) -> None:
        pseudonymiser = Pseudonymiser(self._settings.pseudonym)
        now_ms = int(time.time() * 1000)
        links = [
            (pseudonymiser.of(platform, user).encode(), encode_json(IdentityLink(person=pseudonymiser.person(person))))
            for platform, user, person in self._source.links
        ]
        if links:
            await sender.send(self._settings.topics.identities, 0, [(k, v, now_ms, NO_HEADERS) for k, v in links])

    async def _feed(self, sender: Sender) -> None:
        waiting: deque[list[asyncio.Task]] = deque()
        records = self._source.records
        started_s, live_from = 0.0, 0
        while not self._stop:
            if not self.live and self.sent >= self._source.backfill:
                self.live, started_s, live_from = True, time.monotonic(), self.sent
            most = _CHUNK if not self.live else self._due(started_s, live_from)
            chunk = [record for _, record in zip(range(most), records, strict=False)]
            if chunk:
                waiting.append(self._send(sender, chunk))
            elif most:
                break
            if len(waiting) > 8:
                await asyncio.gather(*waiting.popleft())
            await asyncio.sleep(0.01 if self.live else 0)
        for tasks in waiting:
            await asyncio.gather(*tasks)

    def _due(self, started_s: float, live_from: int) -> int:
        due = int((time.monotonic() - started_s) * self._source.live_per_s) - (self.sent - live_from)
        return max(0, min(_CHUNK, due))

    def _send(self, sender: Sender, chunk: list[Record]) -> list[asyncio.Task]:
        now_ms = int(time.time() * 1000)
        by_partition = defaultdict(list)
        partitions = self._settings.topics.partitions
        for record in chunk:
            by_partition[record.topic, crc32(record.key) % partitions].append(record)
        self.sent += len(chunk)
        return [
            asyncio.ensure_future(self._send_to(sender, topic, partition, records, now_ms))
            for (topic, partition), records in by_partition.items()
        ]

    async def _send_to(self, sender: Sender, topic: str, partition: int, records: list[Record], now_ms: int) -> None:
        last = await sender.send(topic, partition, [(r.key, r.value, now_ms, NO_HEADERS) for r in records])
        self.ledger.append(Sent(topic, partition, last, [r.value for r in records]))


# -- reading everything back


async def read_all(settings: Settings, topics: list[str], on_records: Callable[[str, list[Any]], None], stop: Any) -> None:
    """Reads whole topics from offset 0, without a group, until `stop()` is true after a fetch that brought nothing."""
    consumer = AIOKafkaConsumer(
        auto_offset_reset="earliest", enable_auto_commit=False, fetch_max_wait_ms=50, **client_options(settings.kafka)
    )
    await consumer.start()
    try:
        assigned = [TopicPartition(t, p) for t in topics for p in sorted(consumer.partitions_for_topic(t) or ())]
        for topic in topics:
            if not any(tp.topic == topic for tp in assigned):
                partitions = await _partitions(consumer, topic)
                assigned += [TopicPartition(topic, p) for p in partitions]
        consumer.assign(assigned)
        await consumer.seek_to_beginning(*assigned)
        while True:
            fetched = await consumer.getmany(timeout_ms=100, max_records=5000)
            for tp, records in fetched.items():
                on_records(tp.topic, records)
            if not fetched and stop(consumer):
                return
            await asyncio.sleep(0)
    finally:
        await consumer.stop()


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> list[int]:
    await consumer.topics()
    return sorted(consumer.partitions_for_topic(topic) or ())


class Observer:
    """What happens, as a consumer of the topics sees it."""

    def __init__(self, settings: Settings, label: Labeller) -> None:
        self._topics = settings.topics
        self._label = label
        self._index: dict[str, int] = {}
        self._early: dict[str, tuple[Any, int]] = {}
        self._events: list[CanonicalEvent] = []
        self._partition: list[int] = []
        self._offset: list[int] = []
        self._received_ms: list[int] = []
        self._p: list[tuple[float, float, float] | None] = []
        self._latencies_ms: deque[tuple[float, int]] = deque(maxlen=200_000)
        self.live_latencies_ms: list[int] = []
        self.live = False
        """The past is worked off: less than a second of events is open. Latencies count from here."""
        self.scored = 0
        self.duplicates = 0
        self.refused = Counter()
        self.model = "none yet"
        self.models_seen: list[str] = []
        self.model_since_s = time.monotonic()
        self.first_score_s: float | None = None
        self.auc: dict[str, dict[str, float]] = {}

    def on_records(self, topic: str, records: list[Any]) -> None:
        if topic == self._topics.events:
            for record in records:
                self._on_event(record)
        elif topic == self._topics.scores:
            for record in records:
                self._on_score(record)
        else:
            for record in records:
                meta = decode_headers(record.headers)
                self.refused[meta.reason if meta else "?"] += 1

    def _on_event(self, record: Any) -> None:
        event = _decode_event(record.value)
        if event.event_id in self._index:
            self.duplicates += 1
            return
        self._index[event.event_id] = len(self._events)
        self._events.append(event)
        self._partition.append(record.partition)
        self._offset.append(record.offset)
        self._received_ms.append(record.timestamp)
        self._p.append(None)
        early = self._early.pop(event.event_id, None)
        if early is not None:
            self._join(len(self._events) - 1, *early)

    def _on_score(self, record: Any) -> None:
        score = _decode_score(record.value)
        if self.first_score_s is None:
            self.first_score_s = time.monotonic()
        if score.model != self.model:
            self.model, self.model_since_s = score.model, time.monotonic()
            if score.model not in self.models_seen:
                self.models_seen.append(score.model)
        index = self._index.get(score.event_id)
        if index is None:
            self._early[score.event_id] = (score, record.timestamp)
        else:
            self._join(index, score, record.timestamp)

    def _join(self, index: int, score: _Score, scored_ms: int) -> None:
        self.scored += 1
        latency_ms = max(0, scored_ms - self._received_ms[index])
        self._latencies_ms.append((time.monotonic(), latency_ms))
        if self.live:
            self.live_latencies_ms.append(latency_ms)
        if not score.degraded and self._p[index] is None:
            nan = float("nan")
            self._p[index] = tuple(nan if score.p[h] is None else score.p[h] for h in BINARY_HEADS)

    def latency_ms(self, last_s: float = 10.0) -> tuple[float, float]:
        """p50 and p99 of the last seconds."""
        since = time.monotonic() - last_s
        recent = [latency for at, latency in self._latencies_ms if at >= since]
        return _percentiles(recent)

    def update_auc(self) -> None:
        """AUC by platform and head of the scores that a published model made, on labels that have matured."""
        if not any(p is not None for p in self._p[-50_000:]):
            return
        observed = self._observed()
        y_N3, matured_N4 = self._label(observed)
        nothing = (float("nan"),) * 3
        p_N3 = np.array([p or nothing for p in self._p])
        out: dict[str, dict[str, float]] = {}
        for i, platform in enumerate(observed.platforms):
            for j, head in enumerate(BINARY_HEADS):
                of = (observed.platform == i) & matured_N4[:, HEADS.index(head)] & ~np.isnan(p_N3[:, j])
                y = y_N3[of, j]
                if len(y) >= LEAST_FOR_AUC and min(y.sum(), len(y) - y.sum()) >= 10:
                    out.setdefault(platform, {})[head] = round(float(roc_auc_score(y, p_N3[of, j])), 4)
        self.auc = out

    def _observed(self) -> Observed:
        users: dict[str, int] = {}
        platforms: dict[str, int] = {}
        user = np.array([users.setdefault(e.user, len(users)) for e in self._events], np.int32)
        platform = np.array([platforms.setdefault(e.platform, len(platforms)) for e in self._events], np.int16)
        events = columns(self._events, self._offset)
        return Observed(events, user, list(users), platform, tuple(platforms), np.array(self._partition, np.int32))


class Verified(NamedTuple):
    """The ledger against the topics."""

    events_in: int
    accepted: int
    refused: int
    duplicates: int
    scored_distinct: int
    lost: int


async def verify(settings: Settings, platforms: list[Platform], ledger: list[Sent]) -> Verified:
    """Reads `events`, `scores` and `dead_letters` from offset 0 with a consumer of its own, and looks every record of
    the ledger up: its event's id among the scores, or its source offset among the dead letters; else it is lost."""
    topics = settings.topics
    accepted, scored, refused = Counter(), set(), set()

    def on_records(topic: str, records: list[Any]) -> None:
        for record in records:
            if topic == topics.events:
                accepted[hash64(_decode_event(record.value).event_id)] += 1
            elif topic == topics.scores:
                scored.add(hash64(_decode_score(record.value).event_id))
            else:
                meta = decode_headers(record.headers)
                refused.add((meta.source_topic, meta.source_partition, meta.source_offset))

    async with connected(settings.kafka) as client:
        names = [topics.events, topics.scores, topics.dead_letters]
        tps = [TopicPartition(t, p) for t in names for p in range(topics.partitions)]
        ends = await end_offsets(client, tps)
    await read_all(settings, names, on_records, lambda consumer: _at(consumer, ends))
    by_topic = {topic: platform for platform in platforms for topic in platform.topics}
    lost = 0
    for sent in ledger:
        first = sent.last_offset - len(sent.values) + 1
        for offset, value in enumerate(sent.values, first):
            if (sent.topic, sent.partition, offset) not in refused:
                lost += _id_of(by_topic[sent.topic], sent, offset, value) not in scored
    return Verified(
        events_in=sum(len(sent.values) for sent in ledger),
        accepted=sum(accepted.values()),
        refused=len(refused),
        duplicates=sum(accepted.values()) - len(accepted),
        scored_distinct=len(scored),
        lost=lost,
    )


def _at(consumer: AIOKafkaConsumer, ends: dict[TopicPartition, int]) -> bool:
    return all((consumer._subscription.subscription.assignment.state_value(tp).position or 0) >= e for tp, e in ends.items())


def _id_of(platform: Platform, sent: Sent, offset: int, value: bytes) -> int | None:
    """Hash of the id that the platform file gives the event; None where it should have been refused."""
    far_ms = 1 << 60
    try:
        event = platform.canonicalise(
            value, topic=sent.topic, partition=sent.partition, offset=offset, now_ms=far_ms, future_tolerance_ms=0
        )
    except EventRefused:
        return None
    return hash64(event.event_id)


# -- the whole


class Demo:
    """Broker, worker, trainer, feeder and observer, started and stopped together."""

    def __init__(self, settings: Settings, source: Source, folder: Path, label: Labeller, console: Console) -> None:
        self.settings = settings
        self.source = source
        self.folder = folder
        self.console = console
        self.feeder = Feeder(source, settings)
        self.observer = Observer(settings, label)
        self._processes: dict[str, subprocess.Popen] = {}
        self._interrupted = asyncio.Event()
        self._done = False
        self._started_s = time.monotonic()

    async def run(self, seconds: float | None) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._interrupted.set)
        settings = self.settings
        extra = [(t, settings.topics.partitions, {}) for p in self.source.platforms for t in p.topics]
        await create_topics(settings.kafka, settings.topics, extra)
        self._start("worker")
        self._start("trainer")
        names = [settings.topics.events, settings.topics.scores, settings.topics.dead_letters]
        observing = asyncio.create_task(read_all(settings, names, self.observer.on_records, lambda _: self._done))
        feeding = asyncio.create_task(self.feeder.run())
        try:
            await self._show(seconds, observing, feeding)
            self.feeder.stop()
            await feeding
            await self._drain(observing)
        finally:
            await self._stop_processes()
        self._done = True
        await observing
        self.observer.update_auc()
        verified = await verify(settings, self.source.platforms, self.feeder.ledger)
        return self._result(verified)

    def _start(self, command: str) -> None:
        with (self.folder / f"{command}.log").open("wb") as out:
            self._processes[command] = subprocess.Popen(
                [sys.executable, "-m", "crosscurrent", command, "--config", str(self.folder / "crosscurrent.toml")],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches us alone; we stop them in order
                preexec_fn=die_with_parent(os.getpid()),
            )

    async def _stop_processes(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for name, process in self._processes.items():
            try:
                code = await asyncio.to_thread(process.wait, 30)
            except subprocess.TimeoutExpired:
                process.kill()
                code = await asyncio.to_thread(process.wait)
            if code != 0:
                log.error("demo.process_failed", process=name, exit_code=code, log=str(self.folder / f"{name}.log"))

    def _check_alive(self, *tasks: asyncio.Task) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                tail = (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
                raise ConfigError(f"the {name} ended with code {process.returncode}; its last words:\n{tail}")
        for task in tasks:
            if task.done():
                task.result()

    async def _show(self, seconds: float | None, observing: asyncio.Task, feeding: asyncio.Task) -> None:
        until_s = time.monotonic() + seconds if seconds is not None else float("inf")
        next_auc_s, last, rate = time.monotonic() + 10, (time.monotonic(), 0), 0.0
        with Live(console=self.console, refresh_per_second=2, transient=False) as live:
            while time.monotonic() < until_s and not self._interrupted.is_set():
                await asyncio.sleep(0.5)
                self._check_alive(observing, feeding)
                self.observer.live |= self.feeder.live and self._open() < self.source.live_per_s
                now_s = time.monotonic()
                rate = 0.5 * rate + 0.5 * (self.observer.scored - last[1]) / (now_s - last[0])
                last = (now_s, self.observer.scored)
                if now_s > next_auc_s:
                    self.observer.update_auc()
                    next_auc_s = time.monotonic() + 10
                live.update(self._table(rate))

    async def _drain(self, observing: asyncio.Task) -> None:
        """Waits until everything that was sent has its score or its dead letter, or nothing moves any more."""
        until_s = time.monotonic() + _DRAIN_S
        while self._open() > 0 and time.monotonic() < until_s:
            self._check_alive(observing)
            await asyncio.sleep(0.2)

    def _open(self) -> int:
        seen = self.observer
        return self.feeder.sent - seen.scored - seen.duplicates - sum(seen.refused.values())

    def _table(self, rate: float) -> Table:
        seen = self.observer
        p50, p99 = seen.latency_ms()
        phase = "live" if self.feeder.live else "sending the past at full speed"
        table = Table(title=f"Crosscurrent · {phase} · {time.monotonic() - self._started_s:.0f} s", min_width=72)
        table.add_column("")
        table.add_column("", justify="right")
        table.add_row("events sent", f"{self.feeder.sent:,}")
        table.add_row("scored", f"{seen.scored:,}")
        table.add_row("scores a second", f"{rate:,.0f}")
        table.add_row("latency p50 / p99, last 10 s", f"{p50:,.0f} / {p99:,.0f} ms")
        table.add_row("lag", f"{max(0, self._open()):,}")
        age = f"serving for {time.monotonic() - seen.model_since_s:.0f} s"
        table.add_row("model", f"[bold]{seen.model}[/bold] · {age}")
        table.add_row("refused", ", ".join(f"{reason} {n:,}" for reason, n in seen.refused.most_common()) or "0")
        table.add_row("duplicates dropped", f"{seen.duplicates:,}")
        metrics = self.settings.metrics
        table.add_row("metrics", f"http://{metrics.host}:{metrics.port}/metrics, :{metrics.trainer_port} of the trainer")
        for platform, heads in sorted(seen.auc.items()):
            table.add_row(f"AUC {platform}", "  ".join(f"{head} {value:.3f}" for head, value in heads.items()))
        if not seen.auc:
            table.add_row("AUC", "waits for a published model and matured labels")
        return table

    def _result(self, verified: Verified) -> dict[str, Any]:
        published = [model for model in self.observer.models_seen if model != "prior"]
        p50, p99 = _percentiles(self.observer.live_latencies_ms)
        first = self.observer.first_score_s
        return {
            **verified._asdict(),
            "models_published": len(published),
            "model": self.observer.model,
            "platforms": [platform.name for platform in self.source.platforms],
            "p50_ms": round(p50, 1),
            "p99_ms": round(p99, 1),
            "first_score_s": round(first - self._started_s, 1) if first is not None else None,
            "auc": self.observer.auc,
        }


def _percentiles(latencies_ms: list[int]) -> tuple[float, float]:
    if not latencies_ms:
        return 0.0, 0.0
    p50, p99 = np.percentile(latencies_ms, (50, 99))
    return float(p50), float(p99)


def demo_settings(settings: Settings, bootstrap: str, folder: Path, platforms: tuple[str, ...]) -> Settings:
    """The user's settings with what the demo decides: its own broker, folder, key and ports."""
    changed = settings.model_dump()
    changed["kafka"] |= {
        "bootstrap": bootstrap,
        "session_timeout_s": 6.0,  # the embedded broker's group join takes half of it
        "heartbeat_interval_s": 1.5,
        "idempotence": False,  # the embedded broker has no idempotent producer
    }
    changed["pseudonym"] = {"key": secrets.token_urlsafe(32)}
    changed["worker"] |= {"data_dir": folder / "worker", "platforms": platforms}
    changed["store"] |= {"uri": str(folder / "store")}
    changed["trainer"] |= {"history_uri": str(folder / "history"), "interval_s": 30.0, "min_events": 20_000}
    changed["trainer"] |= {"max_events": 150_000, "epochs": 2}
    ports = {name: free_or_other(changed["metrics"][name]) for name in ("port", "trainer_port")}
    changed["metrics"] |= {"host": "127.0.0.1"} | ports
    return Settings.model_validate(changed)


def write_toml(settings: Settings, path: Path) -> None:
    """Settings as TOML, secrets in clear: readable by the owner alone."""
    plain = settings.model_dump(mode="json", exclude_none=True)
    if settings.pseudonym.key is not None:
        plain["pseudonym"]["key"] = settings.pseudonym.key.get_secret_value()
    if settings.kafka.sasl_password is not None:
        plain["kafka"]["sasl_password"] = settings.kafka.sasl_password.get_secret_value()
    path.touch(mode=0o600)
    lines = []
    for section, values in plain.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]  # a JSON scalar or list is TOML too
    path.write_text("\n".join(lines) + "\n")


def run_demo(settings: Settings, seconds: float | None, json_output: bool, data: Path | None, label: Labeller) -> int:
    """Runs the demo for `seconds`, or until Ctrl-C. Returns the exit code: 0, or 1 where an event was lost."""
    logging.getLogger("aiokafka").setLevel(logging.WARNING)  # its news of our own readers would break the table
    console = Console(stderr=json_output)
    now_ms = int(time.time() * 1000)
    source = data_source(data, now_ms) if data is not None else simulated_source(now_ms)
    folder = Path(tempfile.mkdtemp(prefix="crosscurrent-demo-"))
    with EmbeddedBroker() as broker:
        platforms = tuple(platform.name for platform in source.platforms)
        settings = demo_settings(settings, broker.bootstrap, folder, platforms)
        write_toml(settings, folder / "crosscurrent.toml")
        demo = Demo(settings, source, folder, label, console)
        result = asyncio.run(demo.run(seconds))
    if result["lost"] == 0:
        shutil.rmtree(folder)
    else:
        log.error("demo.events_lost", lost=result["lost"], logs=str(folder))
    if json_output:
        print(json.dumps(result), flush=True)
    else:
        console.print(result)
    return 0 if result["lost"] == 0 else 1
