"""Reads a compacted topic: to its end before the worker is ready, then on for as long as it runs.

By a consumer of its own without a group, because a topic in the group would reach one worker only. Used for `models` and
`identities`. Knows nothing of what the records mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

OnRecords = Callable[[list[Any]], Awaitable[None]]


class CompactedReader:
    """Hands every record of `topic` to `on_records`, in order within a partition.

    The records that were there at the start come in as few calls as the fetches allow; `at_end` is set after the call
    that brought the last of them.
    """

    def __init__(self, topic: str, on_records: OnRecords, client_options: dict[str, Any]) -> None:
        self._topic = topic
        self._on_records = on_records
        self._options = client_options
        self.at_end = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled. Raises what `on_records` raises, and Kafka's errors."""
        consumer = AIOKafkaConsumer(
            enable_auto_commit=False, auto_offset_reset="earliest", fetch_max_wait_ms=100, **self._options
        )
        await consumer.start()
        try:
            assigned = await self._assign(consumer)
            while True:
                fetched = await consumer.getmany(timeout_ms=200)
                records = [record for batch in fetched.values() for record in batch]
                if records:
                    await self._on_records(records)
                if not self.at_end.is_set() and await self._caught_up(consumer, assigned):
                    self.at_end.set()
        finally:
            await consumer.stop()

    async def _assign(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        for _ in range(100):
            partitions = consumer.partitions_for_topic(self._topic)
            if partitions:
                assigned = [TopicPartition(self._topic, p) for p in sorted(partitions)]
                consumer.assign(assigned)
                await consumer.seek_to_beginning(*assigned)
                return assigned
            await consumer._client.force_metadata_update()
            await consumer.topics()
            await asyncio.sleep(0.1)
        raise TimeoutError(f"topic {self._topic!r} has no partitions after 10 s; was it created?")

    async def _caught_up(self, consumer: AIOKafkaConsumer, assigned: list[TopicPartition]) -> bool:
        for tp in assigned:
            high = consumer.highwater(tp)
            if high is None or await consumer.position(tp) < high:
                return False
        return True
