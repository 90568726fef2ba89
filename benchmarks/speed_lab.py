"""Where speed is measured: a fresh broker on one core, one pinned process on the other, and how far it has come.

    student()        the store with a student that the trainer published, made once and kept under `.crosscurrent/speed/`
    Lab              one broker and all that a run needs on it: topics, events, worker or peer processes, progress
    measure()        events a second between two acknowledged commits

The broker keeps its records in memory (the embedded one) or in a folder that goes with it (Apache Kafka): a run has its
own, so that memory and disk stay bounded. While events are laid out the broker may use both cores; while a run is
measured, it and this process have BROKER_CORE alone. Knows no mode and no report.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from events import START_MS, Block, blocks

from models.artifact import list_versions, load, versions
from models.config import KafkaConfig, Settings, TopicsConfig
from models.errors import ArtifactError
from models.events import ModelVersion
from streams.broker import EmbeddedBroker, die_with_parent
from streams.codec import partitions_of, partitions_of_rows
from streams.commit import NO_HEADERS, Sender
from streams.demo import SIMULATED, write_toml
from streams.kafka import client_options, connected, create_topics, end_offsets
from streams.simulator import Simulator, SimulatorConfig
from streams.wire import Spans
from trainer.announce import announce, announcement_of

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".crosscurrent" / "speed"
WORKER_CORE, BROKER_CORE = 0, 1
USERS, MANY_USERS = 50_000, 1_000_000
PARTITIONS = 4
WARM_UP_S = 5.0
TRAINING_EVENTS, TRAINING_SHOPPERS = 80_000, 1_500
"""So few shoppers that their events span weeks: labels with a horizon of days mature, and next categories are learned."""
PEER_MODULES = ("confluent_kafka", "quixstreams", "bytewax")
_DAY_MS = 86_400_000
_CHUNK = 20_000
_POLL_S = 0.05
STUCK_S = 120.0


class TooFewEvents(Exception):
    """All events were consumed before enough time was measured."""

    def __init__(self, events_per_s: float) -> None:
        super().__init__(f"{events_per_s:.0f} events a second, and no more events")
        self.events_per_s = events_per_s


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def stored_events(
    n: int,
    seed: int,
    users: int,
    zipf: bool = True,
    first_ms: int = START_MS,
    platforms: tuple[str, str, str] = SIMULATED,
) -> Iterator[tuple[bytes, bytes]]:
    """(key, canonical event) of n events of about 200 bytes; users zipf(0.8), or uniform, over `users`."""
    for block in blocks(n, seed, users, uniform=not zipf, first_ms=first_ms, platforms=platforms, size=_CHUNK):
        yield from zip([key.tobytes() for key in block.keys], block.values(), strict=True)


def every_user_once(users: int, first_ms: int = START_MS) -> Iterator[tuple[bytes, bytes]]:
    """One event of each user."""
    for u in range(users):
        yield event_bytes(f"once-{u:09d}", u, SIMULATED[u % 3], "view", first_ms + u, u % 20_000, u % 60, 9.5)


def event_bytes(event_id, user, platform, kind, ts, item, category, price) -> tuple[bytes, bytes]:
    """Key and JSON of one canonical event, as `streams.codec.encode_json` writes it."""
    pseudonym = f"k1{user:022d}"
    return pseudonym.encode(), (
        f'{{"event_id":"{event_id}","platform":"{platform}","user":"{pseudonym}","kind":"{kind}","ts":{ts},'
        f'"item":"bz:b{item:05d}","category":"department > aisle {category % 12} > shelf {category}","price":{price}}}'
    ).encode()


def raw_events(n: int, seed: int, shoppers: int = USERS) -> Iterator[tuple[str, bytes, bytes]]:
    """(topic, key, value) of n records of the simulator; made once and kept, since making them takes longer than reading."""
    code = hashlib.sha256((ROOT / "streams" / "simulator.py").read_bytes()).hexdigest()[:8]
    made = {int(path.stem.split("-")[3]): path for path in HOME.glob(f"raw-{seed}-{shoppers}-*-{code}.jsonl")}
    path = made.get(min((m for m in made if m >= n), default=n), HOME / f"raw-{seed}-{shoppers}-{n}-{code}.jsonl")
    if not path.exists():
        HOME.mkdir(parents=True, exist_ok=True)
        start_ms = int(time.time() * 1000) - 400 * _DAY_MS
        config = SimulatorConfig(n_shoppers=shoppers, seed=seed, start_ms=start_ms, ledger=False)
        part = path.with_suffix(".part")
        with part.open("wb") as out:
            for record in islice(Simulator(config).stream(), n):
                out.write(msgspec.json.encode([record.topic, record.key, record.value]) + b"\n")
        part.rename(path)
    decode = msgspec.json.Decoder(tuple[str, bytes, bytes]).decode
    with path.open("rb") as lines:
        for line in islice(lines, n):
            yield decode(line)


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Process:
    """A child with a log file; it dies with us."""

    def __init__(self, command: list[str], log: Path, core: int | None, cwd: Path = ROOT, path: Path = ROOT) -> None:
        die = die_with_parent(os.getpid())

        def prepare() -> None:
            if die is not None:
                die()
            os.sched_setaffinity(0, {core} if core is not None else set(range(os.cpu_count())))

        env = {k: v for k, v in os.environ.items() if not k.startswith("CROSSCURRENT_")}
        env |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(path)}
        self.log = log
        self.started_s = time.time()
        with log.open("wb") as out:
            self._child = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env=env, preexec_fn=prepare
            )
        self.pid = self._child.pid

    def check(self) -> None:
        """Raises SystemExit with its log where it has ended."""
        if self._child.poll() is not None:
            raise SystemExit(f"{self.log.stem} ended with {self._child.returncode}:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def stop(self, grace_s: float = 20.0) -> None:
        """SIGTERM, and SIGKILL where that does not end it."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()

    def wait(self) -> int:
        return self._child.wait()

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self, what: str = "VmHWM") -> int:
        """VmHWM: the peak; VmRSS: now."""
        return int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())[1]) * 1024

    def written_bytes(self) -> int:
        """What it has written to files."""
        return int(re.search(r"^write_bytes: (\d+)", Path(f"/proc/{self.pid}/io").read_text(), re.MULTILINE)[1])


class WorkerProcess(Process):
    """`crosscurrent worker`, with its metrics."""

    def _port(self) -> int | None:
        port = re.search(r'metrics\.listening.*?port"?[=:]\s*(\d+)|"port": (\d+).*metrics\.listening', self.log.read_text())
        return int(next(group for group in port.groups() if group)) if port else None

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port()}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and line[0] != "#"}

    def ready(self) -> bool:
        if self._port() is None:
            return False
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port()}/readyz", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False

    async def until_ready(self, timeout_s: float = 180.0) -> float:
        """→ seconds from its start."""
        while not self.ready():
            self.check()
            if time.time() - self.started_s > timeout_s:
                raise SystemExit(f"not ready after {timeout_s:.0f} s:\n{self.tail()}")
            await asyncio.sleep(0.02)
        return time.time() - self.started_s


def peers_python(install: bool = True) -> Path | None:
    """The interpreter that has the peers: $CROSSCURRENT_BENCH_PYTHON, ours where the extra `bench` is installed, else that
    of `.crosscurrent/bench-venv`, made of that extra on top of our packages: in ours, quixstreams would change the
    version of pydantic that users run. None: not there and not to be installed."""
    given = os.environ.get("CROSSCURRENT_BENCH_PYTHON")
    python = ROOT / ".crosscurrent" / "bench-venv" / "bin" / "python"
    for candidate in (given, sys.executable, python):
        if candidate and Path(candidate).exists():
            imports = "; ".join(f"import {name}" for name in PEER_MODULES)
            if subprocess.run([candidate, "-c", imports], capture_output=True).returncode == 0:
                return Path(candidate)
    if given:
        raise SystemExit(f"CROSSCURRENT_BENCH_PYTHON={given} cannot import {', '.join(PEER_MODULES)}")
    if not install:
        return None
    print(f"installing the extra `bench` into {python.parent.parent}", file=sys.stderr, flush=True)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *extra], check=True)
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    (Path(site.stdout.strip()) / "_crosscurrent.pth").write_text(
        "\n".join(p for p in sys.path if p.endswith("site-packages"))
    )
    return python


# ── the lab ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Window(NamedTuple):
    """Between two acknowledged commits."""

    events: int
    seconds: float
    cpu_s: float

    def as_dict(self) -> dict[str, float]:
        return {
            "events_per_s": round(self.events / self.seconds),
            "seconds": round(self.seconds, 1),
            "events": self.events,
            "cpu_us_per_event": round(self.cpu_s / self.events * 1e6, 2),
        }


class Lab:
    """One broker, fresh; ended at the end of `async with`."""

    def __init__(self, kind: str, folder: Path, store: str | None = None) -> None:
        """`kind`: embedded or kafka. `store`: of the student that is announced; None: none yet."""
        self.kind, self.folder, self.store = kind, folder, store
        self.broker: Any = None
        self._groups: dict[str, AIOKafkaConsumer] = {}

    @classmethod
    def on(cls, kafka: KafkaConfig, topics: TopicsConfig, folder: Path, store: str) -> Lab:
        """On a broker that runs already, for peers alone; to be `close`d. Pins neither it nor this process."""
        lab = cls("", folder, store)
        lab.settings = Settings(kafka=kafka, topics=topics, store={"uri": store})
        return lab

    async def __aenter__(self) -> Lab:
        self.broker = _broker(self.kind)
        try:
            await self._prepare()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        for consumer in self._groups.values():
            await consumer.stop()
        if self.broker is not None:
            self.broker.stop()

    async def _prepare(self) -> None:
        self.settings = Settings.model_validate(
            {
                "kafka": {
                    "bootstrap": self.broker.bootstrap,
                    "session_timeout_s": 6,
                    "heartbeat_interval_s": 1.5,
                    "idempotence": self.kind != "embedded",
                },
                "topics": {"partitions": PARTITIONS},
                "pseudonym": {"key": secrets.token_urlsafe(32)},
                "worker": {"data_dir": self.folder / "worker", "platforms": SIMULATED, "commit_interval_s": 1.0},
                "store": {"uri": self.store or str(self.folder / "store")},
                "trainer": {
                    "history_uri": str(self.folder / "history"),
                    "min_events": 10_000,
                    "epochs": 2,
                    "enforce": ["finite", "log_loss"],
                },
                "metrics": {"port": 0, "trainer_port": 0},
            }
        )
        if self.store:
            await create_topics(self.settings.kafka, self.settings.topics)
            await self.announce(versions(self.store, "student")[-1])

    async def announce(self, version: ModelVersion) -> None:
        await announce(self.settings, announcement_of(self.settings, version, None))

    def with_changes(self, **sections: dict) -> Settings:
        changed = self.settings.model_dump()
        for section, values in sections.items():
            changed[section] |= values
        changed["pseudonym"]["key"] = self.settings.pseudonym.key.get_secret_value()
        return Settings.model_validate(changed)

    # -- records

    def spread(self) -> None:
        """The broker and we may use every core: nothing is measured."""
        self._pin(set(range(os.cpu_count())))

    def pin(self) -> None:
        """The broker and we leave the worker's core alone."""
        self._pin({BROKER_CORE % os.cpu_count()})

    def _pin(self, cores: set[int]) -> None:
        for pid in (self.broker.pid, os.getpid()) if self.broker is not None else ():
            _pin(pid, cores)

    async def produce_raw(self, records: Iterator[tuple[str, bytes, bytes]]) -> None:
        await self._produce((topic, crc32(key) % PARTITIONS, key, value) for topic, key, value in records)

    async def produce_blocks(self, topic: str, events: Iterator[Block]) -> None:
        """The same, of whole blocks of events: many times as fast."""
        async with self._sending() as sender:
            for block in events:
                now_ms, partition = int(time.time() * 1000), partitions_of_rows(block.keys, PARTITIONS)
                n, width = block.keys.shape
                keys = Spans(block.keys.reshape(-1), width * np.arange(n), np.full(n, width, np.int32))
                values = Spans(block.buffer, block.at, block.length)
                of = [np.flatnonzero(partition == p) for p in range(PARTITIONS)]
                sends = (
                    sender.send_columns(topic, p, keys.take(of[p]), values.take(of[p]), now_ms) for p in range(PARTITIONS)
                )
                await asyncio.gather(*sends)

    async def produce_events(self, topic: str, events: Iterator[tuple[bytes, bytes]]) -> None:
        def placed() -> Iterator[tuple[str, int, bytes, bytes]]:
            while chunk := list(islice(events, 5000)):
                for (key, value), p in zip(chunk, partitions_of([k for k, _ in chunk], PARTITIONS).tolist(), strict=True):
                    yield topic, p, key, value

        await self._produce(placed())

    async def _produce(self, records: Iterator[tuple[str, int, bytes, bytes]]) -> None:
        async with self._sending() as sender:
            while chunk := list(islice(records, _CHUNK)):
                now_ms = int(time.time() * 1000)
                by_partition = defaultdict(list)
                for topic, partition, key, value in chunk:
                    by_partition[topic, partition].append((key, value, now_ms, NO_HEADERS))
                await asyncio.gather(*(sender.send(t, p, out) for (t, p), out in by_partition.items()))

    @asynccontextmanager
    async def _sending(self) -> AsyncIterator[Sender]:
        """Events are laid out: the broker and we may use every core."""
        self.spread()
        producer = AIOKafkaProducer(acks="all", max_batch_size=900_000, **client_options(self.settings.kafka))
        await producer.start()
        try:
            yield Sender(lambda: producer, None, asyncio.get_running_loop())
        finally:
            await producer.stop()
            self.pin()

    async def skip(self, group: str, topics: set[str]) -> int:
        """Commits the ends of topics for a group that is still empty. → their sum."""
        tps = [TopicPartition(t, p) for t in topics for p in range(PARTITIONS)]
        async with connected(self.settings.kafka) as client:
            ends = await end_offsets(client, tps)
        consumer = AIOKafkaConsumer(group_id=group, enable_auto_commit=False, **client_options(self.settings.kafka))
        await consumer.start()
        consumer.assign(tps)
        await consumer.commit({tp: OffsetAndMetadata(end, "") for tp, end in ends.items()})
        await consumer.stop()
        return sum(ends.values())

    # -- progress

    async def committed(self, group: str, topics: set[str]) -> int:
        """Sum of a group's committed offsets."""
        if group not in self._groups:
            options = client_options(self.settings.kafka)
            consumer = self._groups[group] = AIOKafkaConsumer(group_id=group, enable_auto_commit=False, **options)
            await consumer.start()
        tps = [TopicPartition(topic, p) for topic in topics for p in range(PARTITIONS)]
        return sum([await self._groups[group].committed(tp) or 0 for tp in tps])

    async def ends(self, topics: set[str], partitions: int = PARTITIONS) -> int:
        """Sum of the topics' ends: records that the broker acknowledged."""
        async with connected(self.settings.kafka) as client:
            return sum(
                (await end_offsets(client, [TopicPartition(t, p) for t in topics for p in range(partitions)])).values()
            )

    async def changelog_bytes(self, group: str) -> float:
        """Key and value bytes in the topics of a group that are named changelogs, from a sample of each."""
        admin = AIOKafkaAdminClient(**client_options(self.settings.kafka))
        await admin.start()
        names = [name for name in await admin.list_topics() if "changelog" in name and group in name]
        await admin.close()
        total = 0.0
        for name in names:
            records = await self.ends({name})
            consumer = AIOKafkaConsumer(**client_options(self.settings.kafka), auto_offset_reset="earliest")
            await consumer.start()
            consumer.assign([TopicPartition(name, p) for p in range(PARTITIONS)])
            await consumer.seek_to_beginning()
            got = [r for batch in (await consumer.getmany(timeout_ms=2000, max_records=500)).values() for r in batch]
            await consumer.stop()
            sizes = [len(r.key or b"") + len(r.value or b"") for r in got]
            total += records * float(np.mean(sizes)) if sizes else 0.0
        return total

    # -- processes

    def start(
        self, command: str, settings: Settings, *arguments: str, core: int | None = None, name: str = ""
    ) -> WorkerProcess:
        stem = name or f"{command}-{settings.worker.app_id}"
        config = self.folder / f"{stem}.toml"
        write_toml(settings, config)
        call = [sys.executable, "-m", "crosscurrent", command, "--config", str(config), *arguments]
        return WorkerProcess(call, self.folder / f"{stem}.log", core)

    def start_peer(
        self, name: str, script: str, python: Path, events: str, scores: str, prefix: str = ""
    ) -> tuple[Process, str]:
        """→ the process and its consumer group."""
        folder, group = self.folder / name, f"{prefix}peer-{name}"
        folder.mkdir()
        task = {
            "name": name,
            "bootstrap": self.settings.kafka.bootstrap,
            "events": events,
            "scores": scores,
            "group": group,
            "store": self.settings.store.uri,
            "folder": str(folder),
            "partitions": PARTITIONS,
            "commit_s": 1.0,
        }
        path = ROOT / "benchmarks" / "peers" / script
        arguments = ["worker"] if script == "faust_app.py" else []
        call = [str(python), str(path), json.dumps(task), *arguments]
        return Process(call, self.folder / f"{name}.log", WORKER_CORE, cwd=folder), group


async def measure(
    process: Process, count: Callable[[], Awaitable[int]], n: int, least_s: float, warm_up_s: float, poll_s: float = _POLL_S
) -> Window:
    """Follows `count` (acknowledged events) from `warm_up_s` after its first progress for `least_s`.

    Raises TooFewEvents where `n` are done sooner: the last commit may have had less than its interval's work.
    """
    points: list[tuple[float, int, float]] = []
    moved_s = time.monotonic()
    while True:
        process.check()
        done, now_s = await count(), time.monotonic()
        if done > (points[-1][1] if points else 0):
            points.append((now_s, done, process.cpu_s()))
            moved_s = now_s
            steady = [p for p in points if p[0] - points[0][0] >= warm_up_s]
            ended = done >= n
            last = steady[:-1] if ended else steady
            if last and last[-1][0] - last[0][0] >= least_s:
                (t0, n0, cpu0), (t1, n1, cpu1) = last[0], last[-1]
                return Window(n1 - n0, t1 - t0, cpu1 - cpu0)
            if ended:
                seconds = max(points[-1][0] - points[0][0], 0.5)
                raise TooFewEvents((done - points[0][1]) / seconds or n / seconds)
        if now_s - moved_s > STUCK_S:
            raise SystemExit(f"nothing was committed for {STUCK_S:.0f} s:\n{process.tail()}")
        await asyncio.sleep(poll_s)


def _broker(kind: str) -> Any:
    if kind == "embedded":
        return EmbeddedBroker().start()
    sys.path.append(str(ROOT / "deploy" / "kafka"))
    from local_kafka import ApacheKafka

    return ApacheKafka().start()


def _pin(pid: int, cores: set[int]) -> None:
    """Every thread of a process: a child's threads inherit what the one that starts them has."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:
            continue


# ── the student ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def student() -> tuple[str, dict[str, Any]]:
    """→ the store with a student that this code can load, what it is. Trained on the simulator's events by the worker and
    the trainer, as the demo does it, where there is none yet. Its speed matters here, not how good it is: two of the gate's
    rules are enforced."""
    home = HOME / "student"
    store = str(home / "store")
    found = _loadable(store)
    if found is None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        await _train_student(home)
        found = _loadable(store)
        if found is None:
            raise SystemExit((home / "trainer-training.log").read_text()[-3000:])
    return store, found


def history_folder() -> Path:
    """The Parquet history that the student was trained on."""
    return HOME / "student" / "history"


def _loadable(store: str) -> dict[str, Any] | None:
    settings = Settings()
    try:
        version = versions(store, "student")[-1]
        model = load(store, "student", version, fold=settings.fold, size=settings.worker.size)
    except (ArtifactError, IndexError):
        return None
    if model.categories is None:
        return None  # its scores would be smaller than the contract's
    return {"version": version.version, "flops_per_event": list_versions(store, "student")[-1].config.flops_per_event()}


async def _train_student(home: Path) -> None:
    async with Lab("embedded", home) as lab:
        settings = lab.with_changes(worker={"app_id": "training"})
        await create_topics(settings.kafka, settings.topics, [(name, PARTITIONS, {}) for name in SIMULATED])
        await lab.produce_raw(raw_events(TRAINING_EVENTS, 1, TRAINING_SHOPPERS))
        lab.spread()
        worker = lab.start("worker", settings)
        while await lab.committed("training", set(SIMULATED)) < TRAINING_EVENTS:
            worker.check()
            await asyncio.sleep(0.5)
        worker.stop()
        await asyncio.to_thread(lab.start("trainer", settings, "--once").wait)
