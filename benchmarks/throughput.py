"""Events a second of one worker process pinned to one core, the embedded broker on another.

    make bench                          python benchmarks/throughput.py [--json FILE] [--quick] [--runs N]

What runs is what users run: the student that a trainer published (counted FLOPs), the full score record, the durable
changelog, acks=all, commits every second. Two figures:

    score   `events` (zipf over 50,000 users, about 180 bytes of JSON) → `scores`
    both    raw events of the simulator's three platforms → `events` → `scores`, in one worker

An event counts when its offset is committed, so when its score and its row are acknowledged. For `score` the rate is taken
between the first commit after the warm-up and the last one with a full second of work; for `both` from the first commit of
a raw event to the commit of the last score, warm-up included, since one stage may run ahead of the other. By the clock of
this process; at least 30 s (10 s with --quick) must lie between. Prints JSON as its last line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from models.artifact import list_versions
from models.config import Settings
from models.events import CanonicalEvent
from models.state import row_dtype
from streams.broker import EmbeddedBroker, die_with_parent
from streams.codec import partitions_of
from streams.commit import NO_HEADERS, Sender
from streams.demo import SIMULATED, write_toml
from streams.kafka import client_options, connected, create_topics, end_offsets
from streams.simulator import Simulator, SimulatorConfig

WORKER_CORE, BROKER_CORE = 0, 1
USERS = 50_000
WARM_UP_S = 5.0
TRAINING_EVENTS = 80_000
PARTITIONS = 4
_DAY_MS = 86_400_000
_IDLE_S = 15.0
"""Nothing is left where nothing has been committed for so long."""


def zipf_events(n: int, seed: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, canonical event) of n events; users zipf(0.8) over USERS, as in the prototype's benchmark."""
    rng = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, USERS + 1) ** 0.8
    user = rng.choice(USERS, n, p=weight / weight.sum())
    platform_ = rng.integers(0, 3, n).tolist()
    kind = rng.choice(["view", "click", "cart", "purchase"], n, p=[0.6, 0.25, 0.1, 0.05]).tolist()
    item, category = rng.integers(0, 20_000, n).tolist(), rng.integers(0, 60, n).tolist()
    price = np.round(rng.gamma(2.0, 20.0, n), 2).tolist()
    start_ms = 1_750_000_000_000
    encode = msgspec.json.Encoder().encode
    for i, u in enumerate(user.tolist()):
        pseudonym = f"k1{u:022d}"
        event = CanonicalEvent(
            event_id=f"e{seed}-{i:010d}",
            platform=SIMULATED[platform_[i]],
            user=pseudonym,
            kind=kind[i],
            ts=start_ms + i * 20,
            item=f"bz:b{item[i]:05d}",
            category=f"department > aisle {category[i] % 12} > shelf {category[i]}",
            price=price[i],
        )
        yield pseudonym.encode(), encode(event)


def raw_events(n: int, seed: int) -> Iterator[tuple[str, bytes, bytes]]:
    """(topic, key, value) of n records of the simulator, USERS shoppers."""
    config = SimulatorConfig(n_shoppers=USERS, seed=seed, start_ms=int(time.time() * 1000) - 400 * _DAY_MS, ledger=False)
    for record in islice(Simulator(config).stream(), n):
        yield record.topic, record.key, record.value


class Bench:
    """One broker, one published student, and the runs on them."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings.model_validate(
            {
                "kafka": {"bootstrap": bootstrap, "session_timeout_s": 6, "heartbeat_interval_s": 1.5, "idempotence": False},
                "topics": {"partitions": PARTITIONS},
                "pseudonym": {"key": secrets.token_urlsafe(32)},
                "worker": {"data_dir": folder / "worker", "platforms": SIMULATED, "commit_interval_s": 1.0},
                "store": {"uri": str(folder / "store")},
                "trainer": {"history_uri": str(folder / "history"), "min_events": 10_000, "epochs": 2},
                "metrics": {"port": 0, "trainer_port": 0},
            }
        )

    # -- parts

    async def produce_raw(self, records: Iterator[tuple[str, bytes, bytes]]) -> None:
        await self._produce((topic, crc32(key) % PARTITIONS, key, value) for topic, key, value in records)

    async def produce_events(self, topic: str, events: Iterator[tuple[bytes, bytes]]) -> None:
        def placed() -> Iterator[tuple[str, int, bytes, bytes]]:
            while chunk := list(islice(events, 5000)):
                for (key, value), p in zip(chunk, partitions_of([k for k, _ in chunk], PARTITIONS).tolist(), strict=True):
                    yield topic, p, key, value

        await self._produce(placed())

    async def _produce(self, records: Iterator[tuple[str, int, bytes, bytes]]) -> None:
        producer = AIOKafkaProducer(acks="all", max_batch_size=900_000, **client_options(self.settings.kafka))
        await producer.start()
        sender = Sender(lambda: producer, None, asyncio.get_running_loop())
        try:
            while chunk := list(islice(records, 20_000)):
                now_ms = int(time.time() * 1000)
                by_partition = defaultdict(list)
                for topic, partition, key, value in chunk:
                    by_partition[topic, partition].append((key, value, now_ms, NO_HEADERS))
                await asyncio.gather(*(sender.send(t, p, out) for (t, p), out in by_partition.items()))
        finally:
            await producer.stop()

    def start(self, command: str, settings: Settings, *arguments: str, core: int | None = None) -> subprocess.Popen:
        config = self.folder / f"{command}-{settings.worker.app_id}.toml"
        write_toml(settings, config)

        die = die_with_parent(os.getpid())

        def pin() -> None:
            if die is not None:
                die()
            if core is not None:
                os.sched_setaffinity(0, {core})

        log = (self.folder / f"{config.stem}.log").open("wb")
        return subprocess.Popen(
            [sys.executable, "-m", "crosscurrent", command, "--config", str(config), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=pin,
        )

    def with_changes(self, **sections: dict) -> Settings:
        changed = self.settings.model_dump()
        for section, values in sections.items():
            changed[section] |= values
        changed["pseudonym"]["key"] = self.settings.pseudonym.key.get_secret_value()
        return Settings.model_validate(changed)

    async def committed(self, group: str, topics: set[str]) -> int:
        if group not in self._groups:
            options = client_options(self.settings.kafka)
            consumer = self._groups[group] = AIOKafkaConsumer(group_id=group, enable_auto_commit=False, **options)
            await consumer.start()
        tps = [TopicPartition(topic, p) for topic in topics for p in range(PARTITIONS)]
        return sum([await self._groups[group].committed(tp) or 0 for tp in tps])

    # -- the student

    async def publish_student(self) -> dict:
        """A student trained on the simulator's events, as the demo does it."""
        settings = self.with_changes(worker={"app_id": "training"})
        extra = [(name, PARTITIONS, {}) for name in SIMULATED]
        await create_topics(settings.kafka, settings.topics, extra)
        await self.produce_raw(raw_events(TRAINING_EVENTS, seed=1))
        worker = self.start("worker", settings)
        while await self.committed("training", set(SIMULATED)) < TRAINING_EVENTS:
            _check(worker, self.folder / "worker-training.log")
            await asyncio.sleep(0.5)
        _stop(worker)
        trainer = self.start("trainer", settings, "--once")
        if await asyncio.to_thread(trainer.wait) != 0 or not (versions := list_versions(settings.store.uri, "student")):
            raise SystemExit((self.folder / "trainer-training.log").read_text()[-3000:])
        return {"version": versions[-1].version, "flops_per_event": versions[-1].config.flops_per_event()}

    # -- one run

    async def run(self, what: str, n: int, run: int, least_s: float) -> dict:
        """Feeds n events to a fresh group and measures until all are committed."""
        app_id = f"bench-{what}-{run}"
        topics = {"events": f"{app_id}-events", "scores": f"{app_id}-scores", "dead_letters": f"{app_id}-dead"}
        settings = self.with_changes(
            topics=topics,
            worker={"app_id": app_id, "stages": ("score",) if what == "score" else ("ingest", "score")},
        )
        await create_topics(settings.kafka, settings.topics)
        sources, already = {topics["events"]}, 0
        if what == "score":
            await self.produce_events(topics["events"], zipf_events(n, seed=run))
        else:
            # An event counts once scored: by the offsets of `events`. What earlier runs left in the raw topics is not ours.
            already = await self._skip_raw(app_id)
            await self.produce_raw(raw_events(n, seed=run))
        worker = self.start("worker", settings, core=WORKER_CORE)
        log = self.folder / f"worker-{app_id}.log"
        try:
            return {"what": what, "run": run, **await self._measure(what, worker, log, app_id, sources, n, least_s, already)}
        finally:
            _stop(worker)

    async def _skip_raw(self, group: str) -> int:
        """Commits the ends of the raw topics for the group. → their sum."""
        tps = [TopicPartition(t, p) for t in SIMULATED for p in range(PARTITIONS)]
        async with connected(self.settings.kafka) as client:
            ends = await end_offsets(client, tps)
        consumer = AIOKafkaConsumer(group_id=group, enable_auto_commit=False, **client_options(self.settings.kafka))
        await consumer.start()
        consumer.assign(tps)
        await consumer.commit({tp: OffsetAndMetadata(end, "") for tp, end in ends.items()})
        await consumer.stop()
        return sum(ends.values())

    async def _measure(
        self,
        what: str,
        worker: subprocess.Popen,
        log: Path,
        group: str,
        sources: set[str],
        n: int,
        least_s: float,
        already: int,
    ) -> dict:
        points: list[tuple[float, int, float]] = []
        progress, idle_since = already, time.monotonic()
        while True:
            _check(worker, log)
            count = await self.committed(group, sources)
            now, raw = time.monotonic(), await self.committed(group, set(SIMULATED)) if what == "both" else already
            if count + raw > progress:
                progress, idle_since = count + raw, now
                if count or what == "both":
                    points.append((now, count, _cpu_s(worker.pid)))
            if points and (count >= n or now - idle_since > _IDLE_S):
                break
            if now - idle_since > 120:
                raise SystemExit(f"nothing was committed for 120 s; see {log}")
            await asyncio.sleep(0.05)
        # The last point is that of the last score: ingest may have ended before.
        points = [p for p in points if p[1] < count] + [next(p for p in points if p[1] == count)]
        metrics = _metrics(log)
        # `both`: from the first commit of a raw event to the last score, since one stage may run ahead of the other.
        steady = points if what == "both" else [p for p in points if p[0] - points[0][0] >= WARM_UP_S][:-1]
        (t0, n0, cpu0), (t1, n1, cpu1) = steady[0], steady[-1]
        if t1 - t0 < least_s:
            raise SystemExit(f"only {t1 - t0:.0f} s were measured, {least_s:.0f} are needed: raise --events")
        return {
            "events_per_s": round((n1 - n0) / (t1 - t0)),
            "seconds": round(t1 - t0, 1),
            "events": n1 - n0,
            "cpu_us_per_event": round((cpu1 - cpu0) / (n1 - n0) * 1e6, 2),
            "changelog_bytes_per_event": round(metrics["crosscurrent_changelog_bytes_total"] / count, 1),
            "state_rows": int(metrics["crosscurrent_state_rows"]),
            "peak_memory_mib": _peak_mib(worker.pid),
        }

    async def __aenter__(self) -> Bench:
        self._groups: dict[str, AIOKafkaConsumer] = {}
        return self

    async def __aexit__(self, *exc: object) -> None:
        for consumer in self._groups.values():
            await consumer.stop()


def _check(process: subprocess.Popen, log: Path) -> None:
    if process.poll() is not None:
        raise SystemExit(f"the worker ended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_mib(pid: int) -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024


def _metrics(log: Path) -> dict[str, float]:
    """Unlabelled metrics of the worker, from the port that its log names."""
    port = re.search(r'metrics\.listening.*?port"?[=:]\s*(\d+)|"port": (\d+).*metrics\.listening', log.read_text())
    number = next(group for group in port.groups() if group)
    with urllib.request.urlopen(f"http://127.0.0.1:{number}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line and line[0] != "#" and "{" not in line}


def machine() -> dict:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
    }


async def main(arguments: argparse.Namespace) -> dict:
    least_s = 10.0 if arguments.quick else 30.0
    sizes = {"score": 900_000, "both": 500_000} if arguments.quick else {"score": 2_600_000, "both": 1_500_000}
    if arguments.events:
        sizes = dict.fromkeys(sizes, arguments.events)
    with tempfile.TemporaryDirectory(prefix="crosscurrent-bench-") as name, EmbeddedBroker() as broker:
        os.sched_setaffinity(broker.pid, {BROKER_CORE})
        async with Bench(broker.bootstrap, Path(name)) as bench:
            student = await bench.publish_student()
            print(f"student: {student}", file=sys.stderr, flush=True)
            runs = []
            for run in range(1, arguments.runs + 1):
                for what in arguments.what:
                    runs.append(await bench.run(what, sizes[what], run, least_s))
                    print(runs[-1], file=sys.stderr, flush=True)
    rates = {what: [r["events_per_s"] for r in runs if r["what"] == what] for what in arguments.what}
    return {
        "events_per_s": {what: statistics.median(values) for what, values in rates.items()},
        "spread": {what: [min(values), max(values)] for what, values in rates.items()},
        "row_bytes": row_dtype("cpu").itemsize,
        "student": student,
        "machine": machine(),
        "broker": "embedded",
        "runs": runs,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="at least 10 s a run instead of 30, one run")
    parser.add_argument("--runs", type=int, default=None, help="runs of each kind (3; 1 with --quick)")
    parser.add_argument("--events", type=int, help="events a run")
    parser.add_argument("--what", nargs="+", choices=("score", "both"), default=["score", "both"])
    given = parser.parse_args()
    given.runs = given.runs or (1 if given.quick else 3)
    result = asyncio.run(main(given))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
