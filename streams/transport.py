"""Faust's Kafka transport, turned from events to batches.

                 fetch thread                         main thread
  broker ─► aiokafka consumer ─► getmany ─► ONE Faust message a partition batch ─► agent ─► Committer ─► commit

Faust's own path costs a future pair, a message and an ack an event (2 k events/s). Here a message's value is the list of
fetched records, and its offset that of the last of them. Acknowledgement is not Faust's: a stage tells the committer
which offset comes next once it has processed a batch, and `Consumer.force_commit` runs the committer's protocol.

Relies on names that are not public, each held by tests/test_contract_parts.py. Knows nothing of what the records hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition
from faust.serializers.schemas import Schema
from faust.stores import STORES
from faust.transport.consumer import ensure_TP
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from streams.kafka import end_offsets

if TYPE_CHECKING:
    from streams.commit import Committer

log = structlog.get_logger("crosscurrent.transport")

SCHEME = "crosscurrent"
"""Broker URL scheme that selects this transport."""


class BatchSchema(Schema):
    """The value of a message is its list of records, untouched."""

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
    def of(cls, tp: TP, batch: list[Any], generation: int, seek: int) -> BatchMessage:
        last = batch[-1]
        message = cls(
            tp.topic,
            tp.partition,
            last.offset,
            last.timestamp / 1000.0,
            last.timestamp_type,
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


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """The fetch thread: Faust's, with a configurable wait and end offsets that hold on every broker."""

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = self.app.fetch_max_wait_ms  # Faust hard-codes 1500
        return consumer

    async def _highwaters(self, partitions: list[TP]) -> Mapping[TP, int]:
        """End offsets as the high watermarks of fetches have them: ListOffsets is not right on every broker."""
        ends = await end_offsets(self._ensure_consumer()._client, [TopicPartition(*tp) for tp in partitions])
        return {tp: ends[TopicPartition(*tp)] for tp in partitions}


class Consumer(driver.Consumer):
    """One message a fetched partition batch; offsets committed by the committer alone."""

    committer: Committer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.committer = self.app.committer
        self.seeks = 0
        """Of the stream partitions to what is committed, begun so far."""
        self._seeking = asyncio.Lock()

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        seek = self.seeks
        records, _ = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        if not records or self.should_stop or not self.flow_active:
            return  # where the flow has stopped, what comes next ends with a seek
        overlapped = seek != self.seeks or self.seeking
        if overlapped:
            # The positions may have moved past these records after the seek put them back.
            await self.perform_seek()
        changelogs = self.app.tables.changelog_topics
        for ktp, batch in records.items():
            tp = ensure_TP(ktp)
            if not self.flow_active or self.app.consumer_generation_id != generation:
                break
            # Also of a partition that was paused since: its position has moved past these records, and without a
            # rebalance nothing would seek back to them.
            if tp.topic in changelogs or not overlapped:
                yield tp, BatchMessage.of(tp, batch, generation, seek)

    @property
    def seeking(self) -> bool:
        return self._seeking.locked()

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Offsets within a batch are no gap."""

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
        async with self._seeking:
            self.seeks += 1
            self._read_offset.clear()
            await super().perform_seek()
            changelogs = self.app.tables.changelog_topics
            streams = [tp for tp in self.assignment() if tp.topic not in changelogs]
            earliest = await self.earliest_offsets(*streams) if streams else {}
            starts = {}
            for tp in streams:
                committed, first = self._read_offset.get(tp) or 0, earliest[tp]
                if committed and committed < first:
                    log.error("consumer.records_removed", topic=tp.topic, partition=tp.partition, records=first - committed)
                starts[tp] = max(committed, first)
                if starts[tp] != committed or not committed:
                    # aiokafka's seek_to_committed leaves a partition without a committed offset wherever it is.
                    await self.seek(tp, starts[tp])
            committed = {tp: offset for tp, offset in self._committed_offset.items() if offset is not None}
            self.committer.on_seek(committed, starts)

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        return await self.committer.commit()

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

    def _settings_extra(self) -> Mapping[str, Any]:
        return {**super()._settings_extra(), "enable_idempotence": self.app.idempotent_producer}


class Transport(driver.Transport):
    Consumer = Consumer
    Producer = Producer


def register() -> None:
    """Makes `crosscurrent://` brokers and `arena://` stores known to Faust. Idempotent."""
    TRANSPORTS.aliases[SCHEME] = "streams.transport:Transport"
    STORES.aliases["arena"] = "streams.arena:ArenaStore"


def batches(records: list[Any], most: int) -> Iterable[list[Any]]:
    """A fetched batch in micro-batches of at most `most` records, in order."""
    return (records[i : i + most] for i in range(0, len(records), most))
