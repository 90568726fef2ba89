"""Workers as real processes, a producer beside them, and the ledger of what was sent: what the crash tests drive.

    fed() ─► two source topics ─► worker processes ─► oracle.read() ─► oracle.check(ledger, disruptions)

One platform (`alpha`) with two topics, and one model for the whole run: tiny, with random weights, published and
announced before any worker starts, so that `h` means something. Everything random comes from a seed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import oracle
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from tiny import make_model

from models.artifact import publish
from models.config import FoldConfig, KafkaConfig, TopicsConfig
from models.events import Announcement
from models.scorer import Scorer
from streams.kafka import client_options, connected, create_topics, end_offsets

ROOT = Path(__file__).resolve().parent.parent
SOURCE_CONFIG = {"max.message.bytes": str(4 << 20)}
"""A producer may send more than ingest takes."""
SOURCE_PARTITIONS = 2
"""Of each of the platform's two topics."""
N_USERS = 40
COMMIT_INTERVAL_S = 0.4

PLATFORM = """\
name = "alpha"
topics = ["{sources[0]}", "{sources[1]}"]
heads = ["click", "purchase", "return", "category"]

[kind]
path = "what"
[kind.names]
view = "view"
click = "click"
cart = "cart"
buy = "purchase"

[time]
path = "at"
unit = "ms"

[fields]
event_id = "id"
user = "who"
item = "item"
category = "category"
price = "price"
quantity = "quantity"
"""

CONFIG = """\
[kafka]
bootstrap = "{kafka.bootstrap}"
session_timeout_s = {kafka.session_timeout_s}
heartbeat_interval_s = {kafka.heartbeat_interval_s}
idempotence = {idempotence}

[topics]
events = "{topics.events}"
scores = "{topics.scores}"
dead_letters = "{topics.dead_letters}"
models = "{topics.models}"
identities = "{topics.identities}"
partitions = {topics.partitions}

[pseudonym]
key = "a key of the crash tests, of no worth"

[worker]
app_id = "{app_id}"
platforms_dir = "{folder}/platforms"
data_dir = "{folder}/data"
commit_interval_s = {commit_interval_s}
max_batch = 256
device = "cpu"

[store]
uri = "{folder}/store"

[metrics]
enabled = false
"""


class WorkerProcess:
    """`crosscurrent worker` with a log file. `prelude`: Python that its process runs first."""

    def __init__(self, name: str, config: Path, log_path: Path, kill_at: str | None, prelude: str) -> None:
        self.name, self.log_path = name, log_path
        env = {k: v for k, v in os.environ.items() if not k.startswith("CROSSCURRENT_")}
        if kill_at:
            env["CROSSCURRENT_KILL_AT"] = kill_at
        with open(log_path, "wb") as log:
            program = f"{prelude}\nimport sys, crosscurrent\nsys.exit(crosscurrent.main())"
            command = [sys.executable, "-c", program, "worker", "--config", str(config)]
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    async def ended(self, timeout_s: float) -> int:
        """Its exit code; AssertionError with its log when it goes on."""
        until = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < until, f"{self.name} goes on after {timeout_s} s:\n{self.log()}"
            await asyncio.sleep(0.02)
        return self.process.returncode

    def log(self, n_chars: int = 6000) -> str:
        return self.log_path.read_text(errors="replace")[-n_chars:]


def said(worker: WorkerProcess, event: str) -> list[dict]:
    """What the worker has logged under this name."""
    lines = [json.loads(line) for line in worker.log_path.read_text(errors="replace").splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == event]


class Fleet:
    """Workers of one app id, their source and the ledger."""

    def __init__(self, kafka: KafkaConfig, topics: TopicsConfig, prefix: str, folder: Path, seed: int = 0) -> None:
        self.kafka, self.topics, self.folder = kafka, topics, folder
        self.app_id, self.sources = f"{prefix}app", [f"{prefix}shop", f"{prefix}app-shop"]
        self.ledger = oracle.Ledger()
        self.disruptions_ms: list[int] = []
        self.workers: list[WorkerProcess] = []
        self.padding_bytes = 0
        """Of a field that no one reads, in each record: so that a partition takes several fetches."""
        self._rng = random.Random(seed)
        self._sent = 0
        self._last_of: dict[str, tuple[str, bytes]] = {}
        self._clock_ms = int(time.time() * 1000) - 20 * 86_400_000

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        """Topics, the model, the producer; at the end every process that is left is killed."""
        self._write_files()
        options = client_options(self.kafka)
        await create_topics(self.kafka, self.topics, [(source, SOURCE_PARTITIONS, SOURCE_CONFIG) for source in self.sources])
        async with (
            AIOKafkaProducer(**options, linger_ms=5, enable_idempotence=self.kafka.idempotence) as self._producer,
            AIOKafkaConsumer(**options, group_id=self.app_id, enable_auto_commit=False) as self._group,
            connected(self.kafka) as self._client,
        ):
            await self._announce()
            try:
                yield self
            finally:
                for worker in self.workers:
                    if worker.process.poll() is None:
                        worker.signal(signal.SIGKILL)
                        worker.process.wait()

    def _write_files(self) -> None:
        (self.folder / "platforms").mkdir()
        (self.folder / "platforms" / "alpha.toml").write_text(PLATFORM.format(sources=self.sources))
        self.config = self.folder / "crosscurrent.toml"
        self.config.write_text(
            CONFIG.format(
                kafka=self.kafka,
                topics=self.topics,
                idempotence=str(self.kafka.idempotence).lower(),
                app_id=self.app_id,
                folder=self.folder,
                commit_interval_s=COMMIT_INTERVAL_S,
            )
        )

    async def _announce(self) -> None:
        # Without categories, which are no state: a worker that need not compile their views starts sooner.
        model = dataclasses.replace(make_model(version="student/000001"), categories=None)
        store, now_ms = str(self.folder / "store"), int(time.time() * 1000)
        version = publish(
            store, "student", model, metrics={}, training_range={}, reference_histograms={}, fold=FoldConfig(), now_ms=now_ms
        )
        announcement = Announcement(**msgspec.structs.asdict(version), name="student", published_at=now_ms)
        await self._producer.send_and_wait(self.topics.models, msgspec.json.encode(announcement), key=b"student")
        self.scorer = Scorer(model, "cpu")

    # -- workers

    def start(self, kill_at: str | None = None, prelude: str = "") -> WorkerProcess:
        name = f"worker-{len(self.workers)}"
        worker = WorkerProcess(name, self.config, self.folder / f"{name}.log", kill_at, prelude)
        self.workers.append(worker)
        return worker

    def disrupted(self) -> None:
        """A worker has died, or partitions are taken from one, about now."""
        self.disruptions_ms.append(int(time.time() * 1000))

    async def killed(self, worker: WorkerProcess, timeout_s: float = 60.0) -> None:
        """Waits for a worker to be killed at its step."""
        code = await worker.ended(timeout_s)
        self.disrupted()
        assert code == -signal.SIGKILL, f"{worker.name} ended with {code}:\n{worker.log()}"

    async def drain(self, worker: WorkerProcess) -> None:
        """SIGTERM: it commits everything that it has taken in, and exits with 0."""
        worker.signal(signal.SIGTERM)
        code = await worker.ended(30)
        assert code == 0, f"{worker.name} ended with {code}:\n{worker.log()}"

    # -- what they are fed

    @asynccontextmanager
    async def fed(self, rate: int = 600) -> AsyncIterator[None]:
        """Inside, about `rate` records a second are sent; on leaving, all are acknowledged and in the ledger."""
        stop = asyncio.Event()
        feeding = asyncio.create_task(self._feed(rate, stop))
        try:
            yield
        finally:
            stop.set()
            await feeding

    async def _feed(self, rate: int, stop: asyncio.Event) -> None:
        sends = []
        loop = asyncio.get_running_loop()
        started, n_before = loop.time(), self._sent
        while not stop.is_set():
            while self._sent - n_before < (loop.time() - started) * rate:
                sends.append(await self._send_one())
            await asyncio.sleep(0.02)
        for ack, value, expect, event_id in sends:
            self.ledger.add(await ack, value, expect, event_id)

    async def _send_one(self) -> tuple:
        rng, user = self._rng, f"user {self._rng.randrange(N_USERS)}"
        self._sent += 1
        expect, event_id = "accept", f"al-{self._sent}"
        draw = rng.random()
        if draw < 0.02:
            value, expect, event_id = self._bad_record(user), "refuse", None
        elif draw < 0.05 and user in self._last_of:
            event_id, value = self._last_of[user]
            expect = "duplicate"
        else:
            value = self._good_record(event_id, user)
            self._last_of[user] = event_id, value
        # By user, so that the order of a user's events is the producer's.
        number = int(user.split()[1])
        source, partition = self.sources[number % 2], number // 2 % SOURCE_PARTITIONS
        ack = await self._producer.send(source, value, key=user.encode(), partition=partition)
        return ack, value, expect, event_id

    def _good_record(self, event_id: str, user: str) -> bytes:
        rng = self._rng
        self._clock_ms += 20_000
        late_ms = rng.randrange(3_000_000) if rng.random() < 0.03 else 0
        record = {
            "id": event_id,
            "who": user,
            "what": rng.choice(["view", "view", "click", "cart", "buy"]),
            "at": self._clock_ms - late_ms,
            "item": f"item {rng.randrange(50)}",
            "category": f"category {rng.randrange(100)}",
            "price": round(rng.uniform(1, 90), 2),
            "quantity": rng.randrange(1, 4),
            "note": "x" * self.padding_bytes,
        }
        return msgspec.json.encode(record)

    def _bad_record(self, user: str) -> bytes:
        good = {"id": f"bad-{self._sent}", "who": user, "what": "view", "at": self._clock_ms}
        return self._rng.choice(
            [
                b"\xff\xfe",
                b'{"id": ',
                b"[]",
                msgspec.json.encode(good | {"what": "yawn"}),
                msgspec.json.encode(good | {"who": None}),
                msgspec.json.encode(good | {"at": int(time.time() * 1000) + 86_400_000}),
            ]
        )

    # -- how far they are

    async def behind(self) -> int:
        """Records of the sources and of `events` that are not committed yet."""
        places = [TopicPartition(source, p) for source in self.sources for p in range(SOURCE_PARTITIONS)]
        places += [TopicPartition(self.topics.events, p) for p in range(self.topics.partitions)]
        # The sources first: what is committed there is in `events` already.
        lag: dict[str, int] = defaultdict(int)
        for tp in places:
            committed = await self._group.committed(tp)
            end = (await end_offsets(self._client, [tp]))[tp]
            lag[tp.topic] += end - max(0, committed or 0)
        return sum(lag.values())

    async def caught_up(self, timeout_s: float = 60.0, at_most: int = 0) -> None:
        """Waits until no more than so many records are uncommitted; AssertionError when no worker runs."""
        until = time.monotonic() + timeout_s
        while (left := await self.behind()) > at_most:
            running = [worker for worker in self.workers if worker.process.poll() is None]
            assert running, "no worker runs:\n" + self.workers[-1].log()
            assert time.monotonic() < until, f"{left} records wait after {timeout_s} s:\n" + running[-1].log()
            await asyncio.sleep(0.1)

    async def committing(self, more: int = 1, timeout_s: float = 60.0) -> None:
        """Waits until `more` further events are committed than now: some worker works."""
        tps = [TopicPartition(self.topics.events, p) for p in range(self.topics.partitions)]

        async def total() -> int:
            return sum([await self._group.committed(tp) or 0 for tp in tps])

        before = await total()
        until = time.monotonic() + timeout_s
        while await total() < before + more:
            running = any(worker.process.poll() is None for worker in self.workers)
            assert running, "no worker runs:\n" + self.workers[-1].log()
            assert time.monotonic() < until, f"nothing committed for {timeout_s} s:\n" + self.workers[-1].log()
            await asyncio.sleep(0.1)

    async def said(self, worker: WorkerProcess, text: str, times: int = 1, timeout_s: float = 60.0) -> None:
        """Waits until the worker's log has `text` so many times."""
        until = time.monotonic() + timeout_s
        while worker.log_path.read_text(errors="replace").count(text) < times:
            assert worker.process.poll() is None, f"{worker.name} ended:\n{worker.log()}"
            assert time.monotonic() < until, f"{worker.name} does not say {text!r}:\n{worker.log()}"
            await asyncio.sleep(0.05)

    async def look(self) -> oracle.World:
        """What there is now."""
        return await oracle.read(self.kafka, self.topics, self.app_id, self.sources)

    def judge(self, world: oracle.World, **options) -> oracle.Report:
        """What the oracle says, with h and p by the one model. Not while the fleet is fed: the ledger lags behind."""
        report = oracle.check(
            world,
            self.ledger,
            disruptions=self.disruptions_ms,
            # A commit itself may take that long on a busy machine.
            repeat_window_ms=int(1000 * COMMIT_INTERVAL_S) + 2500,
            scorer=self.scorer,
            **options,
        )
        report.info |= {"sent": len(self.ledger), "disruptions": len(self.disruptions_ms)}
        return report

    async def verdict(self) -> oracle.Report:
        """Everything should be done: what the oracle says."""
        return self.judge(await self.look())
