"""What is measured: one coroutine a mode, on a fresh broker each, → a dict of figures.

    score, score_uniform, both, ingest        the worker, events a second
    faust … limit                             a peer on the same events
    latency, recovery, swap, start, scaling   the worker under an open loop, killed, given a new model, started, twice
    stages, trainer, cores                    in this process

`recovery` also measures memory a user. Knows no JSON file, cache or report.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import speed_lab
import torch
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition
from events import blocks
from kernels import Kernels
from speed_lab import (
    BROKER_CORE,
    MANY_USERS,
    ROOT,
    USERS,
    WARM_UP_S,
    WORKER_CORE,
    Lab,
    Process,
    TooFewEvents,
    Window,
    WorkerProcess,
    measure,
)
from speed_report import percentiles, swap_pause

from models import artifact
from models.config import Settings
from models.events import BINARY_HEADS
from models.fold import N_FEATURES
from models.state import row_dtype
from models.student import StudentConfig
from streams import wire
from streams.codec import partitions_of_rows
from streams.demo import SIMULATED
from streams.kafka import client_options, create_topics
from streams.wire import Spans
from trainer.examples import gate_start, heads_of, make_examples, replay
from trainer.fit import Schedule
from trainer.history import HistoryStore
from trainer.labels import make_labels
from trainer.train import train

PEERS: dict[str, str] = {
    "faust": "faust_app.py",
    "faust_take": "faust_app.py",
    "quix": "quix_app.py",
    "bytewax": "bytewax_flow.py",
    "aiokafka_loop": "loops.py",
    "confluent_loop": "loops.py",
    "limit": "loops.py",
}
EXPECTED: dict[str, int] = {
    "score": 110_000,
    "score_uniform": 70_000,
    "both": 50_000,
    "ingest": 110_000,
    "faust": 3_000,
    "faust_take": 8_000,
    "quix": 8_000,
    "bytewax": 15_000,
    "aiokafka_loop": 30_000,
    "confluent_loop": 40_000,
    "limit": 120_000,
}
"""Events a second that a run lays out events for at first; where they do not last it is done again with more."""
LATENCY_RATES = (2_000, 20_000, 50_000)
SWAP_RATE, SWAPS = 50_000, {"minor": (8, 2.0), "major": (3, 6.0)}
"""Events a second; new versions of each kind and the seconds that each is given: after a major one every user's `h` is
rebuilt at his next event, seconds of work for all 50,000."""
_BACKLOG_S = 90.0
_CALM_S = 4.0
"""Before the first swap."""
_RAW = 1_000_000
ROW_BYTES = row_dtype("cpu").itemsize


class Options(NamedTuple):
    """How long and how much."""

    broker: str
    store: str
    least_s: float
    users: int = MANY_USERS
    """Of `recovery`."""
    events: int | None = None
    """Laid out for a run of events a second; None: by EXPECTED."""
    expected: dict[str, float] | None = None
    """Events a second of earlier runs, by name."""
    warm_up_s: float = WARM_UP_S
    start_runs: int = 3


# ── events a second ──────────────────────────────────────────────────────────────────────────────────────────────────


async def throughput(name: str, options: Options, seed: int) -> dict[str, Any]:
    """One run of a worker or a peer; again with more events where they did not last."""
    one = peer if name in PEERS else worker
    rate = (options.expected or {}).get(name, EXPECTED[name])
    n = options.events or int(rate * (options.least_s + options.warm_up_s + 8) * 1.15)
    for _ in range(3):
        try:
            return await one(name, options, n, seed)
        except TooFewEvents as error:
            if options.events:
                raise SystemExit(f"{name}: {error}; raise --events or lower --seconds") from error
            n = int(max(error.events_per_s * (options.least_s + options.warm_up_s + 8) * 1.15, 1.3 * n))
    raise SystemExit(f"{name}: events did not last three times")


async def worker(name: str, options: Options, n: int, seed: int) -> dict[str, Any]:
    """score, score_uniform, both or ingest."""
    async with _lab(options) as lab:
        stages = {"both": ("ingest", "score"), "ingest": ("ingest",)}.get(name, ("score",))
        settings = lab.with_changes(worker={"app_id": "bench", "stages": stages})
        events, group = settings.topics.events, "bench" if "score" in stages else "bench-ingest"
        await create_topics(
            settings.kafka, settings.topics, [(platform, speed_lab.PARTITIONS, {}) for platform in SIMULATED]
        )
        if name == "both":
            await lab.produce_raw(speed_lab.raw_events(n, seed=2))
        elif name == "ingest":
            # The same million again and again: ingest keeps nothing of an event.
            for start in range(0, n, _RAW):
                await lab.produce_raw(speed_lab.raw_events(min(_RAW, n - start), seed=2))
        else:
            uniform = name == "score_uniform"
            await lab.produce_blocks(events, blocks(n, seed, MANY_USERS if uniform else USERS, uniform=uniform))
        process = lab.start("worker", settings, core=WORKER_CORE)
        try:
            if name == "both":
                window = await _drain(lab, process, group, n, options.least_s)
            else:
                count = _counter(lab, group, set(SIMULATED) if name == "ingest" else {events})
                window = await measure(process, count, n, options.least_s, options.warm_up_s)
            return window.as_dict() | _of_worker(process, name)
        finally:
            process.stop()


async def _drain(lab: Lab, process: WorkerProcess, group: str, n: int, least_s: float) -> Window:
    """Both stages in one worker: from the first commit of a raw event to that of the last score, warm-up included, since
    one stage may run ahead of the other."""
    events, first, moved = lab.settings.topics.events, None, (-1, time.monotonic())
    while True:
        process.check()
        raw, scored = await lab.committed(group, set(SIMULATED)), await lab.committed(group, {events})
        now_s = time.monotonic()
        if raw + scored > moved[0]:
            moved = (raw + scored, now_s)
            if first is None and raw:
                first = (now_s, scored, process.cpu_s())
            if raw >= n and scored >= await lab.ends({events}):
                seconds = now_s - first[0]
                if seconds < least_s:
                    raise TooFewEvents((scored - first[1]) / seconds)
                return Window(scored - first[1], seconds, process.cpu_s() - first[2])
        if now_s - moved[1] > speed_lab.STUCK_S:
            raise SystemExit(f"nothing was committed for {speed_lab.STUCK_S:.0f} s:\n{process.tail()}")
        await asyncio.sleep(0.05)


def _of_worker(process: WorkerProcess, name: str) -> dict[str, Any]:
    metrics = process.metrics()
    scored = sum(v for k, v in metrics.items() if k.startswith("crosscurrent_events_total") and 'stage="score"' in k)
    taken = sum(v for k, v in metrics.items() if k.startswith("crosscurrent_events_total") and 'stage="ingest"' in k)
    seconds = {
        key.split('"')[1]: value for key, value in metrics.items() if key.startswith("crosscurrent_stage_seconds_sum")
    }
    out = {
        "peak_memory_mib": process.memory_bytes() >> 20,
        "stage_us_per_event": {
            stage: round(s / (taken if stage == "canonicalise" or not scored else scored) * 1e6, 3)
            for stage, s in seconds.items()
            if s
        },
        "state_rows": int(metrics.get("crosscurrent_state_rows", 0)),
    }
    if name != "ingest":
        out["changelog_bytes_per_event"] = round(metrics["crosscurrent_changelog_bytes_total"] / max(scored, 1), 1)
    return out


async def peer(name: str, options: Options, n: int, seed: int) -> dict[str, Any]:
    """One of PEERS."""
    python = speed_lab.peers_python()
    async with _lab(options) as lab:
        topics = lab.settings.topics
        await lab.produce_blocks(topics.events, blocks(n, seed, USERS))
        process, group = lab.start_peer(name, PEERS[name], python, topics.events, topics.scores)
        try:
            if name == "bytewax":
                count, poll_s = (lambda: lab.ends({topics.scores})), 0.5
            else:
                count, poll_s = _counter(lab, group, {topics.events}), 0.05
            window = await measure(process, count, n, options.least_s, options.warm_up_s, poll_s)
            done = await count()
            out = window.as_dict() | {"peak_memory_mib": process.memory_bytes() >> 20}
            if name == "bytewax":
                out["changelog_bytes_per_event"] = round(process.written_bytes() / done, 1)
            elif name in ("faust", "faust_take", "quix"):
                out["changelog_bytes_per_event"] = round(await lab.changelog_bytes(group) / done, 1)
            return out
        finally:
            process.stop(5.0)


def _counter(lab: Lab, group: str, topics: set[str]) -> Callable:
    async def count() -> int:
        return await lab.committed(group, topics)

    return count


def _scoring(lab: Lab, **changes: Any) -> Settings:
    """The settings of a worker with the stage `score` alone."""
    return lab.with_changes(worker={"app_id": "bench", "stages": ("score",), **changes})


@asynccontextmanager
async def _lab(options: Options) -> AsyncIterator[Lab]:
    """A fresh broker, in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="crosscurrent-bench-") as folder:
        async with Lab(options.broker, Path(folder), options.store) as lab:
            yield lab


# ── an open loop ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Seen(NamedTuple):
    """Scores of one partition as a consumer saw them, ms since the epoch."""

    event_ms: np.ndarray
    """Kafka's time of the event, which its `ts` is too here."""
    scored_ms: np.ndarray
    seen_ms: np.ndarray
    model: list[str]

    def since(self, start_ms: float, end_ms: float) -> Seen:
        at = np.flatnonzero((self.event_ms >= start_ms) & (self.event_ms < end_ms))
        return Seen(self.event_ms[at], self.scored_ms[at], self.seen_ms[at], [self.model[i] for i in at.tolist()])


class _Score(msgspec.Struct):
    ts: int
    scored_at: int
    model: str


class Watcher:
    """Follows partition 0 of `scores` in this process."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self._rows = lab, []

    async def __aenter__(self) -> Watcher:
        self._consumer = AIOKafkaConsumer(**client_options(self._lab.settings.kafka), fetch_max_wait_ms=100)
        await self._consumer.start()
        tp = TopicPartition(self._lab.settings.topics.scores, 0)
        self._consumer.assign([tp])
        await self._consumer.seek_to_beginning(tp)
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._consumer.stop()

    async def _follow(self) -> None:
        decode, rows = msgspec.json.Decoder(_Score).decode, self._rows
        while True:
            for records in (await self._consumer.getmany(timeout_ms=100)).values():
                seen_ms = time.time() * 1000
                for record in records:
                    score = decode(record.value)
                    rows.append((score.ts, score.scored_at, seen_ms, score.model))

    def __len__(self) -> int:
        return len(self._rows)

    def latest_ms(self) -> float:
        """Time of the event whose score came last."""
        return self._rows[-1][0] if self._rows else 0.0

    def latest_model(self) -> str:
        return self._rows[-1][3] if self._rows else ""

    def seen(self) -> Seen:
        event, scored, seen, model = zip(*self._rows, strict=True) if self._rows else ((), (), (), ())
        return Seen(np.array(event, float), np.array(scored, float), np.array(seen, float), list(model))


def _feed(lab: Lab, rate: float, seconds: float) -> Process:
    """An open-loop producer beside the broker."""
    task = {
        "bootstrap": lab.settings.kafka.bootstrap,
        "topic": lab.settings.topics.events,
        "partitions": speed_lab.PARTITIONS,
        "rate": rate,
        "seconds": seconds,
        "users": USERS,
    }
    call = [sys.executable, str(ROOT / "benchmarks" / "speed_feed.py"), json.dumps(task)]
    return Process(call, lab.folder / "feed.log", BROKER_CORE)


async def _fed(feed: Process) -> dict[str, float]:
    """Waits for its end. → sent, seconds, behind_ms (p50, p99 of how late it was by its own schedule)."""
    if await asyncio.to_thread(feed.wait) != 0:
        raise SystemExit(feed.tail())
    return json.loads(feed.log.read_text().splitlines()[-1])


async def latency(rate: int, options: Options) -> dict[str, Any]:
    """Event → score created, event → score seen by a consumer, under an open loop, without the warm-up."""
    async with _lab(options) as lab:
        process = lab.start("worker", _scoring(lab), core=WORKER_CORE)
        try:
            await process.until_ready()
            async with Watcher(lab) as watcher:
                started_ms, seconds = time.time() * 1000, options.warm_up_s + options.least_s
                feed = _feed(lab, rate, seconds + 2.0)
                fed = await _fed(feed)
                # A worker that cannot keep up is behind by then: its latency is what it is, so wait for the backlog.
                until_s = time.monotonic() + _BACKLOG_S
                while watcher.latest_ms() < started_ms + seconds * 1000 and time.monotonic() < until_s:
                    process.check()
                    await asyncio.sleep(0.2)
                seen = watcher.seen()
            first_ms = seen.event_ms.min() if len(seen.event_ms) else started_ms
            seen = seen.since(first_ms + options.warm_up_s * 1000, first_ms + seconds * 1000)
            if not len(seen.event_ms):
                raise SystemExit(f"no score at {rate} events a second:\n{process.tail()}")
            return {
                "rate": rate,
                "sent_per_s": round(fed["sent"] / fed["seconds"]),
                "producer_behind_ms": fed["behind_ms"],
                "scores_seen": len(seen.event_ms),
                "created_ms": percentiles(seen.scored_ms - seen.event_ms),
                "seen_ms": percentiles(seen.seen_ms - seen.event_ms),
            }
        finally:
            process.stop()


async def swap(options: Options) -> dict[str, Any]:
    """The longest time without a score around each of SWAPS, less what is usual."""
    with tempfile.TemporaryDirectory(prefix="crosscurrent-bench-store-") as folder:
        shutil.copytree(options.store, folder, dirs_exist_ok=True)
        async with _lab(options._replace(store=folder)) as lab:
            process = lab.start("worker", _scoring(lab), core=WORKER_CORE)
            try:
                await process.until_ready()
                async with Watcher(lab) as watcher:
                    calm_s = _CALM_S + sum(n * each_s for n, each_s in SWAPS.values())
                    feed = _feed(lab, SWAP_RATE, options.warm_up_s + calm_s + 4.0)
                    while not len(watcher):  # the feed takes seconds to start
                        process.check()
                        await asyncio.sleep(0.1)
                    await asyncio.sleep(options.warm_up_s + _CALM_S)
                    announced = []
                    for kind in (kind for kind, (n, _) in SWAPS.items() for _ in range(n)):
                        version = await asyncio.to_thread(_another_version, folder, kind)
                        announced.append((kind, version.version, time.time() * 1000))
                        await lab.announce(version)
                        await asyncio.sleep(SWAPS[kind][1])
                    fed = await _fed(feed)
                    until_s = time.monotonic() + _BACKLOG_S
                    while watcher.latest_model() != f"student/{version.version}" and time.monotonic() < until_s:
                        process.check()
                        await asyncio.sleep(0.2)
                    await asyncio.sleep(2.0)
                    seen = watcher.seen()
                metrics = process.metrics()
                count = metrics["crosscurrent_swap_pause_seconds_count"]
                handover_ms = metrics["crosscurrent_swap_pause_seconds_sum"] / max(count, 1) * 1000
                return {
                    "sent_per_s": round(fed["sent"] / fed["seconds"]),
                    **_pauses(seen, announced, options.warm_up_s),
                    "handover_ms": round(handover_ms, 4),
                }
            finally:
                process.stop()


def _pauses(seen: Seen, announced: list[tuple[str, str, float]], warm_up_s: float) -> dict[str, Any]:
    """By kind, of (kind, version, announced ms): `swap_pause`. A swap's usual is what followed the one before it, of
    either kind."""
    names, swaps = np.array(seen.model), []
    for kind, version, announced_ms in announced:
        firsts = seen.scored_ms[names == f"student/{version}"]
        if not len(firsts):
            raise SystemExit(f"the {kind} version {version} was not swapped in")
        swaps.append((announced_ms, float(firsts.min())))
    times = seen.scored_ms[seen.scored_ms >= seen.scored_ms.min() + warm_up_s * 1000]
    kinds = [kind for kind, *_ in announced]
    return {kind: swap_pause(times, swaps, of=[k == kind for k in kinds]) for kind in dict.fromkeys(kinds)}


def _another_version(store: str, kind: str) -> Any:
    """The student again: as a minor version with other offsets, or as a major one with another recurrence."""
    fold = Settings().fold
    model = artifact.load(store, "student", artifact.versions(store, "student")[0], fold=fold, size="cpu")
    if kind == "minor":
        model = dataclasses.replace(model, calibration_P32=model.calibration_P32 + np.float32([0.0, 1e-3]))
    else:
        with torch.no_grad():
            model.student.log_tau_H += 1e-3
        model = dataclasses.replace(model)  # which forgets the name of the recurrence that it had
    return artifact.publish(
        store,
        "student",
        model,
        metrics={},
        training_range={},
        reference_histograms={},
        fold=fold,
        now_ms=int(time.time() * 1000),
    )


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def recovery(options: Options) -> dict[str, Any]:
    """Memory a user with `users` rows, then two restarts: as the worker left its folder, and without it."""
    async with _lab(options) as lab:
        settings = _scoring(lab, snapshot_interval_s=3600.0)  # once, when it drains
        events = settings.topics.events
        first = 20_000
        await lab.produce_events(events, speed_lab.stored_events(first, 1, 1_000))
        process = lab.start("worker", settings, core=WORKER_CORE)
        try:
            await process.until_ready()
            await _caught_up(lab, process, first)
            before_bytes, rows_before = process.memory_bytes("VmRSS"), process.metrics()["crosscurrent_state_rows"]
            n = first + options.users
            await lab.produce_events(events, speed_lab.every_user_once(options.users))
            await _caught_up(lab, process, n)
            await asyncio.sleep(2.0)
            rows = process.metrics()["crosscurrent_state_rows"]
            filled = process.memory_bytes("VmRSS")
            out: dict[str, Any] = {
                "users": int(rows),
                "row_bytes": ROW_BYTES,
                "bytes_per_user": round((filled - before_bytes) / (rows - rows_before)),
                "peak_memory_mib": process.memory_bytes() >> 20,
            }
        finally:
            process.stop(60.0)
        for how in ("snapshot", "changelog"):
            if how == "changelog":
                shutil.rmtree(settings.worker.data_dir, ignore_errors=True)
            process = lab.start("worker", settings, core=WORKER_CORE, name=f"worker-{how}")
            try:
                ready_s = await process.until_ready(300.0)
                await asyncio.sleep(1.0)  # the gauges are set four times a second
                metrics = process.metrics()
                read, rows = metrics["crosscurrent_recovery_rows_total"], metrics["crosscurrent_state_rows"]
                seconds = metrics["crosscurrent_recovery_seconds"]
                if how == "snapshot":
                    seconds = metrics["crosscurrent_snapshot_load_seconds_total"]
                out[how] = {
                    "ready_s": round(ready_s, 2),
                    "recovery_s": round(seconds, 2),
                    "rows": int(rows),
                    "changelog_rows": int(read),
                    "rows_per_s": round(rows / seconds) if seconds else None,
                    "mb_per_s": round(rows * ROW_BYTES / seconds / 1e6, 1) if seconds else None,
                    "bytes_per_user": round((process.memory_bytes("VmRSS") - before_bytes) / rows),
                }
            finally:
                process.stop()
        return out


async def _caught_up(lab: Lab, process: Process, n: int) -> None:
    while await lab.committed("bench", {lab.settings.topics.events}) < n:
        process.check()
        await asyncio.sleep(0.2)


async def start(options: Options) -> dict[str, Any]:
    """Seconds from the start of the process to its first score at a consumer, with events waiting."""
    async with _lab(options) as lab:
        await lab.produce_events(lab.settings.topics.events, speed_lab.stored_events(2_000, 1, 100))
        runs = []
        for run in range(options.start_runs + 1):
            topics = {"scores": f"scores-{run}"}
            settings = lab.with_changes(topics=topics, worker={"app_id": f"bench-{run}", "stages": ("score",)})
            await create_topics(settings.kafka, settings.topics)
            before, lab.settings = lab.settings, settings
            async with Watcher(lab) as watcher:
                process = lab.start("worker", settings, core=WORKER_CORE)
                try:
                    ready_s = await process.until_ready()
                    while not len(watcher):
                        process.check()
                        await asyncio.sleep(0.01)
                    runs.append(
                        {"first_score_s": watcher.seen().seen_ms.min() / 1000 - process.started_s, "ready_s": ready_s}
                    )
                finally:
                    process.stop()
            lab.settings = before
        warm = runs[1:]  # the first fills Numba's and the page cache
        return {
            "first_score_s": round(float(np.median([run["first_score_s"] for run in warm])), 2),
            "ready_s": round(float(np.median([run["ready_s"] for run in warm])), 2),
            "runs": [{key: round(value, 2) for key, value in run.items()} for run in runs],
            "session_timeout_s": lab.settings.kafka.session_timeout_s,
        }


async def scaling(options: Options) -> dict[str, Any]:
    """One worker and two in one group, on all cores, the broker among them."""
    out = {}
    for workers in (1, 2):
        n = options.events or int(EXPECTED["score"] * (options.least_s + options.warm_up_s + 8) * 1.2)
        for _ in range(3):
            try:
                out[str(workers)] = await _scaled(workers, n, options)
                break
            except TooFewEvents as error:
                n = int(error.events_per_s * (options.least_s + options.warm_up_s + 8) * 1.3)
    return out


async def _scaled(workers: int, n: int, options: Options) -> dict[str, Any]:
    async with _lab(options) as lab:
        settings = _scoring(lab)
        await lab.produce_blocks(settings.topics.events, blocks(n, 1, USERS))
        lab.spread()
        processes = [
            lab.start(
                "worker",
                lab.with_changes(worker={"app_id": "bench", "stages": ("score",), "data_dir": lab.folder / str(i)}),
                name=f"worker-{i}",
            )
            for i in range(workers)
        ]
        try:
            count = _counter(lab, "bench", {settings.topics.events})
            window = await measure(processes[0], count, n, options.least_s, options.warm_up_s)
            metrics = [process.metrics() for process in processes]
            return {
                "events_per_s": round(window.events / window.seconds),
                "rows_by_worker": [int(m["crosscurrent_state_rows"]) for m in metrics],
            }
        finally:
            for process in processes:
                process.stop()


# ── in this process ──────────────────────────────────────────────────────────────────────────────────────────────────


async def stages(options: Options, batch: int = 4096, batches: int = 24) -> dict[str, Any]:
    """µs an event of each stage alone, without Kafka, median over batches after the first third; and of what stands
    around them: parsing what was fetched, partitioning, building what is sent, changelog rows."""
    torch.set_num_threads(1)
    kernels = Kernels(options.store)
    spent: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started_s = time.perf_counter()
        result = work()
        spent.setdefault(name, []).append(time.perf_counter() - started_s)
        return result

    for i, block in enumerate(blocks(batch * batches, 1, USERS, size=batch)):
        n, width = block.keys.shape
        keys = Spans(block.keys.reshape(-1), width * np.arange(n), np.full(n, width, np.int32))
        (fetched,) = wire.build(keys, Spans(block.buffer, block.at, block.length), 0, 1 << 22)
        timed("partition", lambda keys=block.keys: partitions_of_rows(keys, 4))
        data = bytes(fetched._build())
        records, _ = timed("parse", lambda data=data: wire.parse(data, "events", 0, 0))
        records.offset += i * batch
        before = kernels.stage_seconds()
        ((keys, values),) = timed("all", lambda records=records: kernels.scores_of(records))
        for name, seconds in kernels.stage_seconds().items():
            spent.setdefault(name, []).append(seconds - before[name])
        timed("build", lambda k=keys, v=values: [part._build() for part in wire.build(k, v, 0, 900_000)])
    per_event = {
        name: round(float(np.median(seconds[batches // 3 :])) / batch * 1e6, 3)
        for name, seconds in spent.items()
        if any(seconds)
    }
    started_s = time.perf_counter()
    (rows,) = kernels.arena.take_dirty().values()
    changelog_us = (time.perf_counter() - started_s) / rows.values.n * 1e6
    sizes = {
        "score_bytes": round(float(values.length.mean())),
        "changelog_row_bytes": round(float(rows.values.length.mean())),
    }
    return {"batch": batch, "us_per_event": per_event | {"changelog, a row": round(changelog_us, 3)}} | sizes


async def trainer(options: Options) -> dict[str, Any]:
    """Events a second of reading the history, of its replay through the fold and of training, one thread."""
    torch.set_num_threads(1)
    settings = Settings()
    times = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started_s = time.perf_counter()
        result = work()
        times[name] = time.perf_counter() - started_s
        return result

    history = timed("read", HistoryStore(str(speed_lab.history_folder())).read)
    labels = timed("labels", lambda: make_labels(history, settings.fold, settings.horizons))
    gate = gate_start(history, labels, settings.horizons, settings.trainer.validation_fraction)
    config = StudentConfig.of("cpu", N_FEATURES, history.platforms, heads_of(history, None, gate))
    replay(history, settings.fold, "cpu")  # loads the kernels
    timed("replay", lambda: replay(history, settings.fold, "cpu"))
    replayed = replay(history, settings.fold, "cpu", until_ms=gate.user_U)
    examples = make_examples(history, labels, replayed, config, settings.horizons, gate)
    epochs = 2
    timed(
        "train",
        lambda: train(
            examples,
            config,
            history.categories,
            settings.fold,
            Schedule(epochs=epochs),
            prior_logits_3=np.zeros(len(BINARY_HEADS), np.float32),
        ),
    )
    n = len(history)
    return {
        "events": n,
        "examples": len(examples),
        "epochs": epochs,
        "read_events_per_s": round(n / times["read"]),
        "label_events_per_s": round(n / times["labels"]),
        "replay_events_per_s": round(n / times["replay"]),
        "train_events_per_s": round(len(examples) * epochs / times["train"]),
    }


async def cores(options: Options, seconds: float = 1.0, rounds: int = 5) -> dict[str, float]:
    """What the worker's core keeps of its speed when the broker's is busy: two cores of a virtual machine may be one."""
    torch.set_num_threads(1)

    def multiply(core: int, rates: list[float]) -> None:
        os.sched_setaffinity(0, {core % os.cpu_count()})  # of this thread
        a = torch.rand(256, 256)
        started_s, n = time.perf_counter(), 0
        while (spent_s := time.perf_counter() - started_s) < seconds:
            n += 1
            torch.mm(a, a)
        rates.append(n / spent_s)

    kept = []
    for _ in range(rounds):
        alone, together, other = [], [], []
        for busy in ([(WORKER_CORE, alone)], [(WORKER_CORE, together), (BROKER_CORE, other)]):
            threads = [threading.Thread(target=multiply, args=one) for one in busy]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        kept.append(together[0] / alone[0])
    low, middle, high = np.quantile(kept, (0.0, 0.5, 1.0)).round(3).tolist()
    return {"together": middle, "least": low, "greatest": high}
