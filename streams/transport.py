"""Faust's Kafka transport, turned from events to batches.

                 fetch thread                         main thread
  broker ─► aiokafka consumer ─► columns ─► getmany ─► ONE Faust message a partition batch ─► agent ─► Committer ─► commit

Faust's own path costs a future pair, a message and an ack an event (2 k events/s). Here a message's value is what was
fetched of a partition as `Records`, parsed from the bytes of the fetch, and its offset that of the last of them.
Acknowledgement is not Faust's: a stage tells the committer which offset comes next once it has processed a batch, and
the committer's protocol runs by a timer of its own.

Relies on names that are not public, each held by tests/test_contract_parts.py. Knows nothing of what the records hold.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.errors import IllegalStateError
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.types import Int32, String
from aiokafka.structs import TopicPartition
from faust.serializers.schemas import Schema
from faust.stores import STORES
from faust.transport.consumer import ensure_TP
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from streams.kafka import end_offsets
from streams.wire import Records, parse

if TYPE_CHECKING:
    from streams.commit import Committer

log = structlog.get_logger("crosscurrent.transport")

SCHEME = "crosscurrent"
"""Broker URL scheme that selects this transport."""

_LOOK_AGAIN_S = 0.02
"""While partitions are left out of a wait for records, so long at most."""


class BatchSchema(Schema):
    """The value of a message is its `Records`, untouched."""

    def compile(self, app: Any, **kwargs: Any) -> Any:
        create_event = app.create_event

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            return create_event(None, message.value, message.headers, message)

        return decode


class BatchMessage(ConsumerMessage):
    """A fetched batch of one partition; its offset is that of its last record."""

    seek: int
    """`Consumer.seeks` when its fetch began: once there are more, the records will come again."""

    @classmethod
    def of(cls, tp: TP, batch: Records, generation: int, seek: int) -> BatchMessage:
        message = cls(
            tp.topic,
            tp.partition,
            int(batch.offset[-1]),
            int(batch.timestamp[-1]) / 1000.0,
            int(batch.timestamp_type[-1]),
            (),
            None,
            batch,
            None,
            0,
            0,
            tp,
            generation_id=generation,
        )
        message.seek = seek
        return message


class _Tap:
    """A fetcher's client that keeps the bytes of the fetch responses until they are asked for."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._bytes: dict[TopicPartition, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def send(self, node_id: int, request: Any) -> Any:
        response = await self._client.send(node_id, request)
        if isinstance(request, FetchRequest):
            for topic, partitions in response.topics:
                for partition, *_, records in partitions:
                    self._bytes[TopicPartition(topic, partition)] = records
        return response

    def taken(self) -> dict[TopicPartition, bytes]:
        """What has come since the last call."""
        taken, self._bytes = self._bytes, {}
        return taken


class _PartitionColumns:
    """In place of aiokafka's `PartitionRecords`: an iterator of one `Records` instead of many records; of none where the
    fetch held only what is stepped over. Like there, the offset to fetch next moves when the records are taken."""

    def __init__(self, plain: PartitionRecords, data: bytes) -> None:
        self.next_fetch_offset = plain.next_fetch_offset
        # It and its own iterator refer to each other until that has run out: a fetch's bytes would stay until somebody
        # looked for cycles, which the worker seldom does.
        plain._records_iterator.close()
        self._fetched: tuple[PartitionRecords, bytes] | None = (plain, data)

    def __iter__(self) -> Iterator[Records]:
        return self

    def __next__(self) -> Records:
        if self._fetched is None:
            raise StopIteration
        (plain, data), self._fetched = self._fetched, None
        tp, parsed = plain._tp, None
        if plain._isolation_level != READ_COMMITTED:
            parsed = parse(data, tp.topic, tp.partition, self.next_fetch_offset, check_crcs=plain._check_crcs)
        if parsed is not None:
            records, self.next_fetch_offset = parsed
        else:  # an old format, or aborted transactions to leave out
            plain._records_iterator = plain._unpack_records()
            listed = list(plain)
            self.next_fetch_offset = plain.next_fetch_offset
            records = Records.of(listed) if listed else listed
        if not records:
            raise StopIteration
        return records


def fetch_columns(consumer: AIOKafkaConsumer) -> None:
    """From now on this consumer's `getmany` gives `[Records]` by partition: what was fetched of it, in one piece.

    Call it once, after `start` and before it has partitions. Other consumers are as they were.
    """
    fetcher = consumer._fetcher
    plain, tap = fetcher._proc_fetch_request, _Tap(fetcher._client)

    async def columnar(assignment: Any, node_id: int, request: Any) -> bool:
        woken = await plain(assignment, node_id, request)
        # Between the response and this line nothing was awaited: what has come is what was put there.
        for tp, data in tap.taken().items():
            result = fetcher._records.get(tp)
            if type(result) is FetchResult and type(result._partition_records) is PartitionRecords:
                result._partition_records = _PartitionColumns(result._partition_records, data)
        return woken

    fetcher._client, fetcher._proc_fetch_request = tap, columnar


class _SendsJoined:
    """A producer's client whose produce requests are put together by `encode_produce`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def send(self, node_id: int, request: Any) -> Any:
        if isinstance(request, ProduceRequest):
            request = JoinedRequest(request)
        return await self._client.send(node_id, request)


class JoinedRequest(ProduceRequest):
    """The same request, whose bytes `encode_produce` makes. By classes, as an attribute of the request would refer to the
    request, and its batches would then stay until somebody looks for cycles."""

    def __init__(self, plain: ProduceRequest) -> None:
        vars(self).update(vars(plain))

    def build(self, version: type) -> Any:
        return super().build(_joining(version))


@cache
def _joining(version: type) -> type:
    return type(version.__name__, (version,), {"encode": encode_produce})


def encode_produce(struct: Any) -> bytes:
    """The bytes of a produce request of any version, as `struct.encode` gives them. The batches are copied once; aiokafka's
    own encoding copies them at every level of its schema, five times in all, a twentieth of a busy worker's time."""
    schema = struct.SCHEMA
    *plain, topics = schema.names
    parts = [field.encode(getattr(struct, name)) for field, name in zip(schema.fields, plain, strict=False)]
    parts.append(Int32.encode(len(getattr(struct, topics))))
    for topic, partitions in getattr(struct, topics):
        parts += (_text.encode(topic), Int32.encode(len(partitions)))
        for partition, batch in partitions:
            parts += (Int32.encode(partition), Int32.encode(len(batch)), batch)
    return b"".join(parts)


_text = String("utf-8")


def join_sends(producer: AIOKafkaProducer) -> None:
    """From now on this producer's requests are copied less often. Call it once, after `start`."""
    producer._sender.client = _SendsJoined(producer._sender.client)


class _ReadOffsets(dict):
    """Where Faust notes the last offset that it has read of a partition. Where it asks, to leave out what is not beyond, it
    is told nothing: it notes late, after a seek that brings earlier ones again; what was seen the committer knows."""

    def __getitem__(self, tp: TP) -> None:
        return None


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """The fetch thread: Faust's, with columns, a configurable wait and end offsets that hold on every broker."""

    async def on_start(self) -> None:
        await super().on_start()
        fetch_columns(self._ensure_consumer())

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = self.app.fetch_max_wait_ms  # Faust hard-codes 1500
        consumer._fetch_min_bytes = self.app.fetch_min_bytes
        return consumer

    async def _highwaters(self, partitions: list[TP]) -> Mapping[TP, int]:
        """End offsets as the high watermarks of fetches have them: ListOffsets is not right on every broker."""
        ends = await end_offsets(self._ensure_consumer()._client, [TopicPartition(*tp) for tp in partitions])
        return {tp: ends[TopicPartition(*tp)] for tp in partitions}


class Consumer(driver.Consumer):
    """One message a fetched partition batch, none before the app has loaded; offsets committed by the committer alone."""

    committer: Committer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.committer = self.app.committer
        self.seeks = 0
        """Of the stream partitions to what is committed, begun so far."""
        self._seeking = asyncio.Lock()
        self._left_at = -1
        """`seeks` when records were last left because the flow had stopped: a seek that begins later brings them back."""
        self._read_offset = _ReadOffsets()
        self._resumed = asyncio.Event()
        """A partition that was left out of fetches takes part again."""

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        await self.app.loaded.wait()
        seek, overlapped = self.seeks, self.seeking
        records, _ = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        if self.should_stop:
            return
        if not self.flow_active:
            if records:
                self._left_at = self.seeks
            return
        # Taken in part before a seek and in part after it, for all we know: the positions may have moved past these records
        # after the seek put them back.
        overlapped = bool(records) and (overlapped or seek != self.seeks or self.seeking)
        owed = self._left_at == self.seeks and not self.app.rebalancing  # else Faust is about to seek itself
        if (overlapped or owed) and self.assignment():
            try:
                await self.perform_seek()
            except IllegalStateError:
                return  # a partition was taken away meanwhile: a rebalance, which ends with a seek
        changelogs = self.app.tables.changelog_topics
        for ktp, (batch,) in records.items():
            tp = ensure_TP(ktp)
            if not self.flow_active or self.app.consumer_generation_id != generation:
                self._left_at = self.seeks
                break
            # Also of a partition that was paused since: its position has moved past these records, and without a
            # rebalance nothing would seek back to them.
            if tp.topic in changelogs or not overlapped:
                yield tp, BatchMessage.of(tp, batch, generation, seek)

    async def _wait_next_records(self, timeout: float) -> tuple[Any, Any]:
        """Faust's, for partitions whose buffer is full. Where all are, Faust sleeps a second, however soon there is room;
        where some are, it waits for records of the others alone, a second too, and has no eye for those."""
        if self._buffered_partitions:
            if not self._get_active_partitions():
                self._resumed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._resumed.wait(), timeout)
                return {}, set()
            timeout = min(timeout, _LOOK_AGAIN_S)
        return await super()._wait_next_records(timeout)

    def on_buffer_drop(self, tp: TP) -> None:
        super().on_buffer_drop(tp)
        self._resumed.set()

    def resume_partitions(self, tps: Iterable[TP]) -> None:
        super().resume_partitions(tps)
        self._resumed.set()

    @property
    def seeking(self) -> bool:
        return self._seeking.locked()

    def ack(self, message: Any) -> bool:
        """Only lets go of the message; what may be committed is the committer's to know."""
        if message.acked:
            return False
        message.acked = True
        self._unacked_messages.discard(message)
        return True

    async def perform_seek(self) -> None:
        """Back to what is committed, to the first record where nothing is. The committer is told where each begins.

        Faust lets stream partitions be fetched before this and while it goes on. Those records come again, so the agents
        drop what was fetched before the last seek began, and `getmany` what a seek overlaps, after one more seek.
        """
        revocations = self.committer.revocations
        async with self._seeking:
            self.seeks += 1
            # Not Faust's own, which reads what is committed from where it also notes, meanwhile, what it hands on.
            sought = {ensure_TP(tp): offset or 0 for tp, offset in (await self.seek_to_committed()).items()}
            changelogs = self.app.tables.changelog_topics
            streams = [tp for tp in self.assignment() if tp.topic not in changelogs]
            earliest = await self.earliest_offsets(*streams) if streams else {}
            starts = {}
            for tp in streams:
                committed, first = sought.get(tp, 0), earliest[tp]
                if committed and committed < first:
                    log.error("consumer.records_removed", topic=tp.topic, partition=tp.partition, records=first - committed)
                starts[tp] = max(committed, first)
                if starts[tp] != committed or not committed:
                    # aiokafka's seek_to_committed leaves a partition without a committed offset wherever it is.
                    await self.seek(tp, starts[tp])
            if self.committer.revocations != revocations:
                return  # what was taken away meanwhile has no position until the seek after the rebalance
            committed = {tp: offset for tp, offset in sought.items() if offset}
            self._committed_offset.update(committed)
            self.committer.on_seek(committed, starts)

    async def _seek(self, partition: TP, offset: int) -> None:
        """In the fetch thread. Faust seeks in this one, and so takes from aiokafka what the other is about to hand out: a
        KeyError there, which ends the worker."""
        await self._thread.call_thread(self._thread.seek, partition, offset)

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Faust's own timer and error path: nothing. When to commit is the committer's to know."""
        return False

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """The commit protocol first, within half the session timeout: Faust forgets before it calls back."""
        if revoked and not self.app.should_stop:
            self.stop_flow()
            self.app.flow_control.suspend()
            self.app.flow_control.clear()
            try:
                await asyncio.wait_for(self.committer.commit(), self.app.conf.broker_session_timeout / 2)
            except TimeoutError:
                log.warning("commit.revoked_unfinished", hint="scores of the last interval will be sent again")
        self.committer.on_revoked(revoked)
        await super().on_partitions_revoked(revoked)

    async def commit_offsets(self, offsets: dict[TP, int]) -> bool:
        """Step 4 of the commit protocol: offsets of partitions that are still ours. False if the group moved on."""
        assignment = self.assignment()
        mine = {tp: offset for tp, offset in offsets.items() if tp in assignment}
        if not mine or not await self._commit(mine):
            return False
        self._committed_offset.update(mine)
        self.app.monitor.on_tp_commit(mine)
        return True


class Producer(driver.Producer):
    """Faust's producer: every acknowledgement, and idempotent where the broker can."""

    async def on_start(self) -> None:
        await super().on_start()
        join_sends(self._producer)

    def _settings_extra(self) -> Mapping[str, Any]:
        return {**super()._settings_extra(), "enable_idempotence": self.app.idempotent_producer}


class Transport(driver.Transport):
    Consumer = Consumer
    Producer = Producer


def register() -> None:
    """Makes `crosscurrent://` brokers and `arena://` stores known to Faust. Idempotent."""
    TRANSPORTS.aliases[SCHEME] = "streams.transport:Transport"
    STORES.aliases["arena"] = "streams.arena:ArenaStore"


def batches(fetched: Iterable[tuple[Any, Records]], most: int) -> Iterator[list[tuple[Any, Records]]]:
    """Fetched batches, each beside whatever it belongs to, in micro-batches of at most `most` records, in order."""
    batch, room = [], most
    for of, records in fetched:
        at = 0
        while at < len(records):
            part = records[at : at + room]
            batch.append((of, part))
            at, room = at + len(part), room - len(part)
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch
