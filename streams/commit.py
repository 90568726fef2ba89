"""The commit protocol: what makes state exact and scores complete, whatever dies.

    fold ─► sends registered ─► processed(tp, next)          (no await in between, per micro-batch)
                                     │
    every commit interval, and when partitions are revoked, and when the worker drains:
      1. snapshot: source offsets, copies of dirty rows, the set of unacknowledged sends    (no await in between)
      2. every send of the snapshot is acknowledged: `events`, `scores`, `dead_letters`
      3. the dirty rows are sent to the changelog and acknowledged
      4. the source offsets are committed

Died before 3: the events are folded again from the older rows and scored again. Died between 3 and 4: the rows are ahead
of the offsets; each row knows the last offset that it has applied, so a replayed event is not folded twice, only scored
again. So scores are at least once and state exactly once. Anything that fails in 2 or 3 ends the process: nothing was
committed, the next start repeats it.

Knows rows, offsets and futures; not events, models or topics' meaning.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import structlog
from faust.types import TP

from models.errors import WorkerFenced
from models.state import encode_row
from streams.arena import Arena, ArenaStore
from streams.metrics import Metrics

log = structlog.get_logger("crosscurrent.commit")

KILL_STEPS = (
    "after_fold",
    "after_send",
    "commit_snapshot",
    "commit_sends_acked",
    "commit_changelog_sent",
    "commit_changelog_acked",
    "commit_offsets_sent",
    "commit_done",
)


class KillSwitch:
    """Kills this process (SIGKILL) the n-th time a named step is reached: `CROSSCURRENT_KILL_AT=<step>[:n]`.

    For tests of what a crash leaves behind; does nothing unless the variable is set.
    """

    def __init__(self, spec: str | None) -> None:
        self._step, self._left = None, 0
        if spec:
            self._step, _, n = spec.partition(":")
            self._left = int(n or 1)
            if self._step not in KILL_STEPS:
                raise ValueError(f"CROSSCURRENT_KILL_AT names {self._step!r}; the steps are {', '.join(KILL_STEPS)}")

    def __call__(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class Watchdog:
    """Ends the process before it sends anything once it has overslept its session (SIGSTOP, a paused machine).

    A thread ticks several times a session; a gap of a whole session between two ticks means that the group has given our
    partitions away. Whoever sees it first, the thread or `check()` in front of a send, exits.
    """

    EXIT_CODE = 75

    def __init__(self, session_timeout_s: float) -> None:
        self._limit_s = session_timeout_s
        self._tick_s = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._tick_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        """Returns at once, or ends the process."""
        slept_s = time.monotonic() - self._tick_s
        if slept_s > self._limit_s:
            error = WorkerFenced(
                f"this worker slept {slept_s:.1f} s, longer than its session of {self._limit_s:.1f} s: its partitions "
                "belong to another by now. It exits without sending; start it again"
            )
            print(f"WorkerFenced: {error}", file=sys.stderr, flush=True)
            os._exit(self.EXIT_CODE)

    def _run(self) -> None:
        while not self._stop.wait(self._limit_s / 20):
            self.check()
            self._tick_s = time.monotonic()


class Committer:
    """Runs the protocol above. One a worker; `consumer` and `producer` are set by the app before anything flows."""

    def __init__(self, store: ArenaStore | None, changelog_topic: str, metrics: Metrics, kill: KillSwitch) -> None:
        self._store = store
        self._changelog_topic = changelog_topic
        self._metrics = metrics
        self._kill = kill
        self._lock = asyncio.Lock()
        self._positions: dict[TP, int] = {}
        self._committed: dict[TP, int] = {}
        self._sends: set[asyncio.Future] = set()
        self.consumer: Any = None
        self.sender: Sender
        self.on_failure: Callable[[BaseException], None]

    @property
    def arena(self) -> Arena | None:
        return self._store.arena if self._store else None

    def position(self, tp: TP) -> int | None:
        """The next offset expected of a source partition; None from its revocation to the seek after the rebalance."""
        return self._positions.get(tp)

    def register(self, send: asyncio.Future) -> None:
        """A derived record is on its way. Called with no await after the fold that it speaks of."""
        self._sends.add(send)

    def processed(self, tp: TP, next_offset: int) -> None:
        """Everything before `next_offset` is folded and its sends are registered."""
        self._positions[tp] = max(next_offset, self._positions.get(tp, 0))

    def on_seek(self, committed: dict[TP, int], starts: dict[TP, int]) -> None:
        """The consumer went back to what is committed; `starts`: the next offset of each source partition."""
        self._committed.update(committed)
        for tp, offset in starts.items():
            self.processed(tp, offset)

    def on_revoked(self, revoked: Iterable[TP]) -> None:
        for tp in revoked:
            self._positions.pop(tp, None)
            self._committed.pop(tp, None)

    async def commit(self) -> bool:
        """Steps 1 to 4. True if offsets were committed. A second caller waits and then runs a commit of its own.

        A failure is handed to `on_failure`, which does not return: after it nothing may be committed any more.
        """
        try:
            return await self._commit()
        except Exception as error:
            self.on_failure(error)
            raise

    async def _commit(self) -> bool:
        async with self._lock:
            started_s = time.monotonic()
            # step 1
            offsets = {tp: offset for tp, offset in self._positions.items() if offset != self._committed.get(tp, 0)}
            dirty = self.arena.take_dirty() if self.arena is not None else {}
            sends, self._sends = self._sends, set()
            if not (offsets or dirty or sends):
                return False
            self._kill("commit_snapshot")
            # step 2
            await gather_all(sends)
            self._kill("commit_sends_acked")
            # step 3
            await self._write_changelog(dirty)
            self._kill("commit_changelog_acked")
            # step 4
            committed = await self._commit_offsets(offsets)
            self._kill("commit_done")
            self._metrics.commits.inc()
            self._metrics.commit_seconds.observe(time.monotonic() - started_s)
            return committed

    async def _write_changelog(self, dirty: dict[int, tuple[list[bytes], Any]]) -> None:
        acks = []
        now_ms = int(time.time() * 1000)
        for partition, (keys, rows) in dirty.items():
            itemsize, blob = rows.dtype.itemsize, rows.tobytes()
            values = [encode_row(blob[i : i + itemsize]) for i in range(0, len(blob), itemsize)]
            records = [(key, value, now_ms, NO_HEADERS) for key, value in zip(keys, values, strict=True)]
            acks.append(self.sender.send(self._changelog_topic, partition, records))
            self._metrics.changelog_rows.inc(len(keys))
            self._metrics.changelog_bytes.inc(len(keys) * (itemsize + 4))
        self._kill("commit_changelog_sent")
        for partition, last_offset in zip(dirty, await gather_all(acks), strict=True):
            self._store.set_persisted_offset(TP(self._changelog_topic, partition), last_offset)

    async def _commit_offsets(self, offsets: dict[TP, int]) -> bool:
        if not offsets:
            return False
        commit = asyncio.ensure_future(self.consumer.commit_offsets(offsets))
        await asyncio.sleep(0)
        self._kill("commit_offsets_sent")
        if not await commit:
            log.info("commit.offsets_not_taken", reason="the group moved on; the new owners repeat these events")
            return False
        self._committed.update(offsets)
        return True


async def gather_all(futures: Iterable[asyncio.Future]) -> list[Any]:
    """Waits for all; raises the first failure only once none is pending."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)


Outgoing = tuple[bytes | None, bytes | None, int, list[tuple[str, bytes]]]
"""Key, value, Kafka timestamp in ms, headers."""


NO_HEADERS: list[tuple[str, bytes]] = []


class Sender:
    """Sends records in whole batches to one partition and tells when they are acknowledged."""

    def __init__(self, producer: Callable[[], Any], watchdog: Watchdog | None, loop: asyncio.AbstractEventLoop) -> None:
        """`producer` gives the aiokafka producer, which exists only once the app has started."""
        self._producer = producer
        self._watchdog = watchdog
        self._loop = loop
        self._tails: dict[tuple[str, int], asyncio.Task] = {}

    def send(self, topic: str, partition: int, records: Iterable[Outgoing]) -> asyncio.Task[int]:
        """Sends records in order, after what was sent there before.

        Returns at once; the task's result is the offset of the last record, once all are acknowledged.
        """
        before = self._tails.get((topic, partition))
        task = self._loop.create_task(self._send(topic, partition, self._build(records), before))
        self._tails[topic, partition] = task
        return task

    def _build(self, records: Iterable[Outgoing]) -> list[Any]:
        create = self._producer().create_batch
        builder = create()
        builders = [builder]
        for key, value, timestamp_ms, headers in records:
            if builder.append(timestamp=timestamp_ms, key=key, value=value, headers=headers) is None:
                builder = create()
                builders.append(builder)
                builder.append(timestamp=timestamp_ms, key=key, value=value, headers=headers)
        return builders

    async def _send(self, topic: str, partition: int, builders: list[Any], before: asyncio.Task | None) -> int:
        if before is not None:
            # Its failure is its own registrant's to raise; ours is the order alone.
            await asyncio.wait([before])
        last = -1
        for builder in builders:
            if self._watchdog is not None:
                self._watchdog.check()
            records = builder.record_count()
            ack = await self._producer().send_batch(builder, topic, partition=partition)
            last = (await ack).offset + records - 1
        return last
