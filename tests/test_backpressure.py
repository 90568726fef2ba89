"""A broker that takes nothing more: the worker holds what it has, asks for no more, and goes on where it was.

worker ◄── proxy ◄── embedded broker        fetches pass; produce requests wait while `holding`
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fleet import Fleet

from models.config import KafkaConfig, TopicsConfig
from streams.broker import EmbeddedBroker, free_port

pytestmark = pytest.mark.broker

PRODUCE = 0
RECORD_BYTES, RECORDS = 100_000, 3_600
MOST_AHEAD_BYTES = 33 * 5_400_000
"""Half the backlog. Taken ahead are 33 fetches: one of each of four partitions, the four of the last `getmany`, 8 in the
agent's queue and the 17 micro-batches whose sends are open. Of a partition we ask for 1 MiB at a time, which the embedded
broker answers now and then with 5 MiB."""
IDLE_BYTES = 50_000
"""Of the answers to fetches of partitions without records, in half a second: 10 kB, about."""


class Proxy:
    """Between the clients and one broker; can hold back the clients' produce requests."""

    def __init__(self, port: int, broker_port: int) -> None:
        self.port, self._broker_port = port, broker_port
        self.answered_bytes = 0
        """From the broker to the clients."""
        self.held = 0
        """Produce requests that have waited."""
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task] = set()

    def hold(self) -> None:
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._broker_port)
        pumps = (self._requests(reader, upstream_writer), self._answers(upstream_reader, writer))
        self._tasks |= {asyncio.create_task(pump) for pump in pumps}

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the client has gone
            while True:
                size = await reader.readexactly(4)
                request = await reader.readexactly(struct.unpack(">i", size)[0])
                if struct.unpack_from(">h", request)[0] == PRODUCE and not self._open.is_set():
                    self.held += 1
                    await self._open.wait()
                writer.write(size + request)
                await writer.drain()
        writer.close()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                self.answered_bytes += len(piece)
                writer.write(piece)
                await writer.drain()
        writer.close()


@pytest.fixture
async def proxied(broker) -> AsyncIterator[Proxy]:
    """A broker of this test's own behind a proxy."""
    if broker.name != "embedded":
        pytest.skip("the proxy stands before the embedded broker; what it tests is the worker")
    port = free_port()
    with EmbeddedBroker(advertised_port=port) as own:
        async with Proxy(port, int(own.bootstrap.split(":")[1])).running() as proxy:
            yield proxy


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def test_a_broker_that_takes_nothing_stops_the_worker_and_loses_nothing(
    proxied: Proxy, kafka: KafkaConfig, topics: TopicsConfig, prefix: str, tmp_path: Path
):
    own = kafka.model_copy(update={"bootstrap": f"127.0.0.1:{proxied.port}"})
    async with Fleet(own, topics, prefix, tmp_path, seed=3).running() as fleet:
        fleet.padding_bytes = RECORD_BYTES
        while len(fleet.ledger) < RECORDS:
            async with fleet.fed(rate=300):
                await asyncio.sleep(1)
        backlog_bytes = len(fleet.ledger) * RECORD_BYTES
        proxied.hold()
        worker, before = fleet.start(), proxied.answered_bytes
        fetched = 0
        for _ in range(240):
            await asyncio.sleep(0.5)
            assert worker.process.poll() is None, worker.log()
            now = proxied.answered_bytes - before
            if proxied.held and now - fetched < IDLE_BYTES and now > 1_000_000:
                break
            fetched = now
        else:
            pytest.fail(f"the worker never stopped asking: {fetched} bytes\n{worker.log()}")
        least = resident_bytes(worker.process.pid)
        await asyncio.sleep(3)
        now = proxied.answered_bytes - before
        assert now - fetched < 7 * IDLE_BYTES, f"{now - fetched} more bytes were fetched in 3 s"
        assert now < MOST_AHEAD_BYTES < backlog_bytes / 2, f"{now} of {backlog_bytes} bytes were fetched"
        assert resident_bytes(worker.process.pid) - least < 20_000_000
        proxied.let_go()
        await fleet.caught_up(120)
        await fleet.drain(worker)
        report = await fleet.verdict()
        report.assert_ok()
