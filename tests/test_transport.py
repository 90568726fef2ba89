"""The consumer beside full buffers, what Faust waits for and how long; how what was fetched becomes micro-batches."""

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from aiokafka.errors import IllegalStateError
from aiokafka.structs import ConsumerRecord
from faust.tables.recovery import ServiceStopped
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st
from mode.threads import QueueServiceThread

from models.errors import CrosscurrentError
from streams.app import CrosscurrentApp, StepsThatEnd, Tables, Worker
from streams.codec import Fetched
from streams.commit import Committer, KillSwitch
from streams.metrics import Metrics
from streams.transport import Consumer, batches, register
from streams.wire import Records, Spans

ONE, OTHER = TP("events", 0), TP("events", 1)


class Asking(Consumer):
    """Keeps which partitions were asked for, and how long; nothing is ever there."""

    asked: list[tuple[set[TP], float]]

    async def _getmany(self, active_partitions: set[TP], timeout: float) -> dict:
        self.asked.append((set(active_partitions), timeout))
        return {}


@pytest.fixture
async def consumer() -> Asking:
    register()
    app = CrosscurrentApp("buffers", broker="crosscurrent://127.0.0.1:1")
    app.committer = None

    async def nothing(*args: object) -> None: ...

    consumer = Asking(app.transport, nothing, nothing, nothing)
    consumer.asked = []
    consumer._active_partitions = {ONE, OTHER}
    return consumer


async def test_all_partitions_are_asked_for_while_no_buffer_is_full(consumer: Asking):
    await consumer._wait_next_records(1.0)
    assert consumer.asked == [({ONE, OTHER}, 1.0)]


async def test_beside_a_full_buffer_the_wait_for_others_is_short(consumer: Asking):
    consumer.on_buffer_full(ONE)
    await consumer._wait_next_records(1.0)
    ((partitions, timeout_s),) = consumer.asked
    assert partitions == {OTHER} and timeout_s < 0.1
    consumer.on_buffer_drop(ONE)
    await consumer._wait_next_records(1.0)
    assert consumer.asked[1] == ({ONE, OTHER}, 1.0)


@pytest.mark.parametrize("resume", [lambda c: c.on_buffer_drop(ONE), lambda c: c.resume_partitions([ONE])])
async def test_where_all_buffers_are_full_the_wait_ends_as_soon_as_one_has_room(consumer: Asking, resume):
    consumer.on_buffer_full(ONE)
    consumer.on_buffer_full(OTHER)
    waiting = asyncio.create_task(consumer._wait_next_records(60.0))
    await asyncio.sleep(0.05)
    assert not waiting.done() and not consumer.asked
    resume(consumer)
    records, _ = await asyncio.wait_for(waiting, 5)
    assert records == {}
    await consumer._wait_next_records(1.0)
    assert consumer.asked[0][0] == {ONE}


class Thread(QueueServiceThread):
    """A thread that is told to seek."""

    def seek(self, partition: TP, offset: int) -> None:
        self.sought = (partition, offset, threading.current_thread())


async def test_a_seek_is_made_in_the_thread_that_fetches(consumer: Asking):
    """Elsewhere it would race with what that thread takes from the same dictionary."""
    consumer._thread = thread = Thread()
    await thread.start()
    try:
        await asyncio.wait_for(consumer.seek(ONE, 7), 10)
        *where, by = thread.sought
        assert where == [ONE, 7] and by is not threading.current_thread()
        assert consumer._read_offset.get(ONE) == 7
    finally:
        await thread.stop()


class Seeking(Consumer):
    """Seeks and fetches last as long as a test wants; what is fetched is a batch of ONE."""

    answers: asyncio.Event
    """Of a seek: the broker has said what is committed."""
    knows_first: asyncio.Event
    """… and where its partitions begin."""
    fetched: asyncio.Queue[dict]
    assigned: set[TP]
    committed: int | None = None

    async def seek_to_committed(self) -> dict:
        assert self.assignment(), "No partitions are currently assigned"  # as aiokafka does
        await self.answers.wait()
        return {ONE: self.committed}

    async def earliest_offsets(self, *partitions: TP) -> dict:
        await self.knows_first.wait()
        return dict.fromkeys(partitions, 0)

    async def _seek(self, partition: TP, offset: int) -> None: ...

    async def _getmany(self, active_partitions: set[TP], timeout: float) -> dict:
        return await self.fetched.get()

    def assignment(self) -> set[TP]:
        return self.assigned

    async def taken(self) -> list[TP]:
        return [tp async for tp, _ in self.getmany(1.0)]


@pytest.fixture
async def seeking(consumer: Asking) -> Seeking:
    app = consumer.app
    app.committer = Committer(None, "changelog", Metrics(), KillSwitch(None))
    app.loaded = asyncio.Event()
    app.loaded.set()

    async def nothing(*args: object) -> None: ...

    seeking = Seeking(app.transport, nothing, nothing, nothing)
    seeking.answers, seeking.fetched = asyncio.Event(), asyncio.Queue()
    seeking.answers.set()
    seeking.knows_first, seeking.assigned = asyncio.Event(), {ONE}
    seeking.knows_first.set()
    seeking._active_partitions = {ONE}
    seeking.resume_flow()
    return seeking


def batch_of_one(first: int = 0) -> dict:
    return {ONE: [records_of(0, first, [(b"k", b"v")])]}


async def turns(n: int = 10) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_what_is_fetched_between_two_seeks_is_taken(seeking: Seeking):
    await seeking.perform_seek()
    seeking.fetched.put_nowait(batch_of_one())
    assert await seeking.taken() == [ONE]
    await seeking.perform_seek()
    assert seeking.seeks == 2


@pytest.mark.parametrize("ends_first", ["fetch", "seek"])
@pytest.mark.parametrize("begins_first", ["fetch", "seek"])
async def test_what_a_seek_overlaps_is_left_and_comes_again_by_one_more_seek(
    seeking: Seeking, begins_first: str, ends_first: str
):
    """However they overlap: the records may have left aiokafka before the seek, and the positions moved on after it."""
    seeking.answers.clear()

    async def begin(what: str) -> asyncio.Task:
        task = asyncio.create_task(seeking.perform_seek() if what == "seek" else seeking.taken())
        await turns()
        return task

    async def end(what: str) -> None:
        if what == "seek":
            seeking.answers.set()
        else:
            seeking.fetched.put_nowait(batch_of_one())
        await turns()

    tasks = {what: await begin(what) for what in sorted(["fetch", "seek"], key=lambda what: what != begins_first)}
    for what in sorted(["fetch", "seek"], key=lambda what: what != ends_first):
        await end(what)
    await asyncio.wait_for(tasks["seek"], 5)
    assert await asyncio.wait_for(tasks["fetch"], 5) == []
    assert seeking.seeks == 2


async def test_what_was_left_while_the_flow_stood_still_comes_again(seeking: Seeking):
    """Also where the seek that ends a rebalance has been made before: then by one of our own."""
    taking = asyncio.create_task(seeking.taken())
    await turns()
    seeking.stop_flow()
    await seeking.perform_seek()
    seeking.fetched.put_nowait(batch_of_one())
    assert await asyncio.wait_for(taking, 5) == []
    seeking.resume_flow()
    for rebalancing, seeks in ((True, 1), (False, 2)):
        seeking.app.rebalancing = rebalancing
        seeking.fetched.put_nowait({})
        assert await asyncio.wait_for(seeking.taken(), 5) == []
        assert seeking.seeks == seeks
    seeking.fetched.put_nowait(batch_of_one())
    assert await asyncio.wait_for(seeking.taken(), 5) == [ONE]
    assert seeking.seeks == 2


async def test_what_was_left_before_a_seek_needs_no_other(seeking: Seeking):
    taking = asyncio.create_task(seeking.taken())
    await turns()
    seeking.stop_flow()
    seeking.fetched.put_nowait(batch_of_one())
    assert await asyncio.wait_for(taking, 5) == []
    await seeking.perform_seek()
    seeking.resume_flow()
    seeking.fetched.put_nowait(batch_of_one())
    assert await asyncio.wait_for(seeking.taken(), 5) == [ONE]
    assert seeking.seeks == 1


async def test_what_a_seek_brings_again_is_handed_on_though_more_had_been_read_before(seeking: Seeking):
    """A message on its way while a seek is made: Faust notes its offset after that, and left out what is not beyond."""
    handed_on, may_go_on = [], asyncio.Event()

    async def callback(message) -> None:
        await may_go_on.wait()
        handed_on.append(message.offset)

    seeking.callback = callback
    draining = asyncio.create_task(seeking._drain_messages(SimpleNamespace(_stopped=asyncio.Event())))
    seeking.fetched.put_nowait(batch_of_one(500))
    await turns(20)
    await seeking.perform_seek()
    may_go_on.set()
    await turns(20)
    seeking.fetched.put_nowait(batch_of_one(400))
    await turns(20)
    draining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await draining
    assert handed_on == [500, 400]


async def test_a_seek_goes_to_what_is_committed_whatever_is_handed_on_meanwhile(seeking: Seeking):
    """Faust notes what it hands on where it also notes what is committed: a start taken from there lost what lay between."""
    seeking.committed = 100
    seeking.knows_first.clear()
    seek = asyncio.create_task(seeking.perform_seek())
    await turns()
    seeking._read_offset[ONE] = 149
    seeking.knows_first.set()
    await asyncio.wait_for(seek, 5)
    assert seeking.committer.position(ONE) == 100


async def test_a_seek_that_outlives_a_revocation_gives_nothing_a_position(seeking: Seeking):
    seeking.committed = 100
    seeking.answers.clear()
    seek = asyncio.create_task(seeking.perform_seek())
    await turns()
    seeking.committer.on_revoked({ONE})
    seeking.answers.set()
    await asyncio.wait_for(seek, 5)
    assert seeking.committer.position(ONE) is None


async def test_without_partitions_nothing_is_sought(seeking: Seeking):
    """As a worker more than there are partitions: Faust seeks nothing then, and aiokafka would raise."""
    taking = asyncio.create_task(seeking.taken())
    await turns()
    seeking.stop_flow()
    seeking.fetched.put_nowait(batch_of_one())
    assert await asyncio.wait_for(taking, 5) == []
    seeking.assigned = set()
    seeking.resume_flow()
    seeking.fetched.put_nowait({})
    assert await asyncio.wait_for(seeking.taken(), 5) == []
    assert seeking.seeks == 0


async def test_a_partition_that_is_taken_away_during_a_seek_is_left_to_the_rebalance(seeking: Seeking, monkeypatch):
    async def taken_away(*partitions: TP) -> dict:
        raise IllegalStateError("not assigned")

    monkeypatch.setattr(seeking, "earliest_offsets", taken_away)
    seeking._left_at = seeking.seeks
    seeking.fetched.put_nowait(batch_of_one())
    assert await asyncio.wait_for(seeking.taken(), 5) == []
    assert not seeking.seeking


async def test_a_step_of_the_recovery_that_takes_too_long_is_no_end_of_it(consumer: Asking):
    tables = Tables(consumer.app)
    assert isinstance(tables.recovery, StepsThatEnd) and tables.recovery is tables.recovery
    with pytest.raises(CrosscurrentError, match=r"kafka\.request_timeout_s"):
        await tables.recovery._wait(asyncio.sleep(5), timeout=0.01)
    await tables.recovery._wait(asyncio.sleep(0), timeout=5)
    tables.recovery._stopped.set()
    with pytest.raises(ServiceStopped):
        await tables.recovery._wait(asyncio.sleep(5), timeout=5)


async def test_where_all_buffers_stay_full_the_wait_ends_in_time(consumer: Asking):
    consumer.on_buffer_full(ONE)
    consumer.on_buffer_full(OTHER)
    assert await asyncio.wait_for(consumer._wait_next_records(0.05), 5) == ({}, set())
    assert not consumer.asked


# ── micro-batches ────────────────────────────────────────────────────────────────────────────────────────────────────

strings = st.none() | st.binary(max_size=6)


def records_of(partition: int, first: int, pairs: list[tuple[bytes | None, bytes | None]]) -> Records:
    return Records.of(
        [
            ConsumerRecord("events", partition, first + i, 7 * i, 0, key, value, None, 0, 0, ())
            for i, (key, value) in enumerate(pairs)
        ]
    )


@given(sizes=st.lists(st.integers(1, 12), max_size=6), most=st.integers(1, 10))
def test_micro_batches_are_full_but_for_the_last_and_in_order(sizes: list[int], most: int):
    fetched = [(name, records_of(0, 0, [(b"k", b"v")] * n)) for name, n in enumerate(sizes)]
    made = list(batches(fetched, most))
    lengths = [sum(len(records) for _, records in batch) for batch in made]
    assert sum(lengths) == sum(sizes)
    assert all(n == most for n in lengths[:-1]) and all(0 < n <= most for n in lengths)
    flat = [(name, offset) for batch in made for name, records in batch for offset in records.offset.tolist()]
    assert flat == [(name, i) for name, n in enumerate(sizes) for i in range(n)]


@given(parts=st.lists(st.lists(st.tuples(strings, strings), min_size=1, max_size=5), min_size=1, max_size=4), data=st.data())
def test_joined_partitions_are_their_records_one_after_another(parts: list[list[tuple]], data: st.DataObject):
    fetched, due = [], []
    for p, pairs in enumerate(parts):
        some = slice(data.draw(st.integers(0, len(pairs) - 1)), None)
        fetched.append(Fetched.of(records_of(p, 100 * p, pairs)[some]))
        due += [(key, value, 100 * p + i, 7 * i) for i, (key, value) in list(enumerate(pairs))[some]]
    joined = Fetched.joined(fetched)
    columns = joined.keys.tolist(), joined.values.tolist(), joined.offset.tolist(), joined.timestamp.tolist()
    assert list(zip(*columns, strict=True)) == due
    assert all(isinstance(spans, Spans) and spans.at.dtype == np.int64 for spans in joined[:2])
    assert joined.keys.length.dtype == joined.values.length.dtype == np.int32


async def test_a_stream_that_ends_while_messages_are_gathered_is_no_crash():
    """As where a worker is told to stop between two partitions of a fetch: the half gathered comes again."""

    async def events(n: int):
        for i in range(n):
            yield SimpleNamespace(message=i, value=np.zeros(3))

    queue = asyncio.Queue()
    queue.put_nowait("there is always more, it seems")
    for n, gathered in ((4, [[0, 1], [2, 3]]), (3, [[0, 1]])):
        stream = SimpleNamespace(events=lambda n=n: events(n), channel=SimpleNamespace(queue=queue))
        assert [messages async for messages in Worker._fetched(None, stream, 6)] == gathered
