"""The commit protocol: what makes state exact and scores complete, whatever dies.

    fold ─► sends registered ─► processed(tp, next)          (no await in between, per micro-batch)
                                     │
    each partition in its turn, once a commit interval; all when partitions are revoked, and when the worker drains:
      1. snapshot: source offsets, copies of dirty rows, the set of unacknowledged sends    (no await in between)
      2. every send of the snapshot is acknowledged: `events`, `scores`, `dead_letters`
      3. the dirty rows are sent to the changelog and acknowledged
      4. the source offsets are committed

Died before 3: the events are folded again from the older rows and scored again. Died between 3 and 4: the rows are ahead
of the offsets; each row knows the last offset that it has applied, so a replayed event is not folded twice, only scored
again. So scores are at least once and state exactly once. Anything that fails in 2 or 3 ends the process: nothing was
committed, the next start repeats it.

A turn is that of a partition number: of every source partition with that number, and of the rows that lie under it, which
the `events` partition of that number has written. What a batch sends belongs to the turn of its source partition, so in a
turn, too, 2 covers all that 4 commits. One interval's work comes in TURNS small pieces and not in one, which every event of
that moment would wait for.

    partition 0   ├─────────────C────────────────C───     4 partitions: each commits once an interval,
    partition 1   ├─────────────────C────────────────C    a quarter of it apart
    partition 2   ├─────────────────────C────────────
    partition 3   ├─────────────────────────C────────

Knows rows, offsets and futures; not events, models or topics' meaning.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import structlog
from faust.types import TP

from models.errors import CrosscurrentError, WorkerFenced
from streams.arena import ArenaStore, Changes
from streams.metrics import Metrics
from streams.wire import Spans, build

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


TURNS = 8
"""Into which a commit interval is divided. Partitions share a turn where there are more of them: each commit costs round
trips to the broker."""


class KillSwitch:
    """Kills this process (SIGKILL) the n-th time a named step is reached: `CROSSCURRENT_KILL_AT=<step>[:n]`.

    The steps of a commit are counted where it has rows to write: one of ingest's offsets alone has no changelog to die
    around. For tests of what a crash leaves behind; does nothing unless the variable is set.
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
        self._locks: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By partition number: the commits of one follow one another."""
        self._positions: dict[TP, int] = {}
        self._committed: dict[TP, int] = {}
        self._sends: dict[int, set[asyncio.Future]] = {}
        """By the partition number of the source."""
        self._unclaimed: set[asyncio.Future] = set()
        """Of the batch that is being processed."""
        self.revocations = 0
        """How often partitions were taken away, so far."""
        self.consumer: Any = None
        self.sender: Sender
        self.on_failure: Callable[[BaseException], None]

    def position(self, tp: TP) -> int | None:
        """The next offset expected of a source partition; None from its revocation to the seek after the rebalance."""
        return self._positions.get(tp)

    def register(self, send: asyncio.Future) -> None:
        """A derived record is on its way. Called with no await after the fold that it speaks of."""
        self._unclaimed.add(send)

    def processed(self, tp: TP, next_offset: int) -> None:
        """Everything before `next_offset` is folded and its sends are registered."""
        self._positions[tp] = max(next_offset, self._positions.get(tp, 0))
        if self._unclaimed:
            self._sends.setdefault(tp.partition, set()).update(self._unclaimed)
            self._unclaimed.clear()

    def on_seek(self, committed: dict[TP, int], starts: dict[TP, int]) -> None:
        """The consumer went back to what is committed; `starts`: the next offset of each source partition."""
        self._committed.update(committed)
        for tp, offset in starts.items():
            self._positions[tp] = max(offset, self._positions.get(tp, 0))

    def on_revoked(self, revoked: Iterable[TP]) -> None:
        """A commit that is still under way goes no further: the rows would follow those of the next owner."""
        self.revocations += 1
        for tp in revoked:
            self._positions.pop(tp, None)
            self._committed.pop(tp, None)

    async def commit(self) -> bool:
        """Steps 1 to 4 for all partitions. True if offsets were committed. A second caller waits and then runs a commit of
        its own.

        A failure is handed to `on_failure`, which does not return: after it nothing may be committed any more. A commit that
        was begun is ended though its caller is cancelled: what it has taken no later one knows of.
        """
        return await self._guarded(self._numbers(None))

    async def commit_partition(self, number: int) -> bool:
        """`commit`, for the partitions of one number."""
        return await self._guarded([number])

    async def run(self, interval_s: float) -> None:
        """Commits each partition once in `interval_s`, until cancelled; turns that were begun then end by themselves.

        They do not wait for each other: one that takes longer than its share of the interval delays its own partitions
        only, and is left out until it has ended.
        """
        running: dict[int, asyncio.Task] = {}
        due_s = time.monotonic()
        while True:
            for turn in range(TURNS):
                due_s = max(due_s + interval_s / TURNS, time.monotonic())
                await asyncio.sleep(due_s - time.monotonic())
                if turn not in running or running[turn].done():
                    running[turn] = asyncio.get_running_loop().create_task(self.commit_turn(turn))

    async def commit_turn(self, turn: int) -> bool:
        """`commit`, for the partitions of one turn, 0 to TURNS − 1."""
        return await self._guarded(self._numbers(turn))

    async def _guarded(self, numbers: list[int]) -> bool:
        return await asyncio.shield(asyncio.get_running_loop().create_task(self._in_turn(numbers)))

    async def _in_turn(self, numbers: list[int]) -> bool:
        try:
            async with AsyncExitStack() as stack:
                # Always in the same order, so that two commits cannot wait for each other.
                for number in numbers:
                    await stack.enter_async_context(self._locks[number])
                return await self._commit(numbers)
        except Exception as error:
            self.on_failure(error)
            raise

    def _numbers(self, turn: int | None) -> list[int]:
        """The partition numbers whose turn it is; None: all."""
        numbers = {tp.partition for tp in self._positions} | set(self._sends)
        if self._store is not None:
            numbers.update(self._store.arena.partitions())
        if turn is None:
            return sorted(numbers)
        n = 1 + max(numbers, default=0)
        return sorted(p for p in numbers if (p % TURNS if n >= TURNS else p * TURNS // n) == turn)

    async def _commit(self, numbers: list[int]) -> bool:
        started_s = time.monotonic()
        # step 1
        offsets = {
            tp: offset
            for tp, offset in self._positions.items()
            if tp.partition in numbers and offset != self._committed.get(tp, 0)
        }
        # Rows of partitions that were revoked are another's to write.
        ours = {tp.partition for tp in self._positions}.intersection(numbers)
        dirty = self._store.take_dirty(sorted(ours)) if self._store is not None else {}
        held = {partition: self._store.arena.held(partition) for partition in dirty}
        sends = set().union(*(self._sends.pop(number, ()) for number in numbers))
        revocations = self.revocations
        if not (offsets or dirty or sends):
            return False
        kill = self._kill if dirty else KillSwitch(None)
        kill("commit_snapshot")
        # step 2
        await gather_all(sends)
        kill("commit_sends_acked")
        if self.revocations != revocations:
            self._give_back(dirty, held)
            return False
        # step 3
        await self._write_changelog(dirty, held, kill)
        kill("commit_changelog_acked")
        # step 4
        committed = self.revocations == revocations and await self._commit_offsets(offsets, kill)
        kill("commit_done")
        self._metrics.commits.inc()
        self._metrics.commit_seconds.observe(time.monotonic() - started_s)
        return committed

    def _give_back(self, dirty: dict[int, Changes], held: dict[int, object]) -> None:
        """The rows are dirty again, where they still are."""
        for partition, (keys, _) in dirty.items():
            if (arena := self._store.arena).held(partition) is held[partition]:
                arena.mark_dirty(arena.slots(partition, keys))

    async def _write_changelog(self, dirty: dict[int, Changes], held: dict[int, object], kill: KillSwitch) -> None:
        acks = []
        now_ms = int(time.time() * 1000)
        for partition, (keys, values) in dirty.items():
            acks.append(self.sender.send_columns(self._changelog_topic, partition, keys, values, now_ms))
            self._metrics.changelog_rows.inc(len(keys.at))
            self._metrics.changelog_bytes.inc(int(values.length.sum()))
        kill("commit_changelog_sent")
        for partition, last_offset in zip(dirty, await gather_all(acks), strict=True):
            # Where the partition went away meanwhile, and perhaps came back empty, its rows are not here.
            if self._store.arena.held(partition) is held[partition]:
                self._store.written(TP(self._changelog_topic, partition), last_offset, now_ms)

    async def _commit_offsets(self, offsets: dict[TP, int], kill: KillSwitch) -> bool:
        if not offsets:
            return False
        commit = asyncio.ensure_future(self.consumer.commit_offsets(offsets))
        await asyncio.sleep(0)
        kill("commit_offsets_sent")
        if not await commit:
            log.info("commit.offsets_not_taken", reason="the group moved on; the new owners repeat these events")
            return False
        self._committed.update(offsets)
        return True


async def gather_all(futures: Iterable[asyncio.Future]) -> list[Any]:
    """Waits for all; raises the first failure only once none is pending. One that was cancelled is a failure, too."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, asyncio.CancelledError):
            raise CrosscurrentError("a send was cancelled: nothing that came after it may be committed") from result
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
        """The last handing over of each partition."""

    def send(self, topic: str, partition: int, records: Iterable[Outgoing]) -> asyncio.Task[int]:
        """Sends records in order, after what was sent there before.

        Returns at once; the task's result is the offset of the last record, once all are acknowledged.
        """
        return self._after_what_was_sent(topic, partition, self._build(records))

    def send_columns(
        self, topic: str, partition: int, keys: Spans, values: Spans, timestamps_ms: np.ndarray | int
    ) -> asyncio.Task[int]:
        """`send` of records without headers, given as columns: (N,) each, or one time for all. They are copied before it
        returns, so their buffers may be used again. The task's result is −1 where there are no records.

        Raises ValueError where the columns do not fit together.
        """
        accumulator = self._producer()._message_accumulator
        batches = build(keys, values, timestamps_ms, accumulator._batch_size, accumulator._compression_type)
        return self._after_what_was_sent(topic, partition, batches)

    def _after_what_was_sent(self, topic: str, partition: int, builders: list[Any]) -> asyncio.Task[int]:
        before = self._tails.get((topic, partition))
        handed_over = self._loop.create_task(self._hand_over(topic, partition, builders, before))
        self._tails[topic, partition] = handed_over
        return self._loop.create_task(self._acknowledged(handed_over))

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

    async def _hand_over(
        self, topic: str, partition: int, builders: list[Any], before: asyncio.Task | None
    ) -> list[tuple[asyncio.Future, int]]:
        """To the producer, which keeps the order of a partition's batches and has one of them on its way at a time; the next
        is ready when that is acknowledged. → (acknowledgement, records) of each batch"""
        if before is not None:
            # Its failure is its own registrant's to raise; ours is the order alone.
            await asyncio.wait([before])
        acks = []
        for builder in builders:
            if self._watchdog is not None:
                self._watchdog.check()
            acks.append((await self._producer().send_batch(builder, topic, partition=partition), builder.record_count()))
        return acks

    async def _acknowledged(self, handed_over: asyncio.Task) -> int:
        acks = await handed_over
        metadata = await gather_all([ack for ack, _ in acks])
        return metadata[-1].offset + acks[-1][1] - 1 if acks else -1
