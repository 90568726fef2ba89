"""The topic `dead_letters`: how a refused record is written there, listed and sent again.

A dead letter keeps the refused record's key and bytes, no value where it had none; what is known of the refusal is in
its headers, one header a field of `models.events.DeadLetter`, as text. Bytes over 1 MiB are not kept: `sha256` and
`size` stand for them.
Knows nothing of why a record is refused. Never shows a value: it can hold a raw user id.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from models.config import KafkaConfig
from models.errors import EventRefused
from models.events import DeadLetter
from streams.kafka import client_options, connected, end_offsets

REPLAYED_HEADER = "replayed_from"
"""On a record sent again: `topic/partition/offset` of its dead letter."""

MAX_KEPT_BYTES = 1 << 20
"""Greatest value whose bytes are kept."""

_MAX_REQUEST_BYTES = 4 << 20
"""Of the replaying producer: a kept value with its key and headers must fit."""

_IN_FLIGHT = 1000


class Letter(NamedTuple):
    """A record of `dead_letters`. `meta` is None where its headers cannot be read."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    meta: DeadLetter | None

    @property
    def kept(self) -> bool:
        """Whether `value` is the original: not where that was over 1 MiB."""
        return self.meta is not None and self.meta.sha256 is None


class Replayed(NamedTuple):
    """What `replay` did: records sent, records whose original was too large to be kept, records without headers."""

    sent: int
    too_large: list[Letter]
    unreadable: list[Letter]


def encode_headers(meta: DeadLetter) -> list[tuple[str, bytes]]:
    """The headers of a dead letter; fields that are None are left out."""
    fields = msgspec.structs.asdict(meta)
    return [(name, str(value).encode()) for name, value in fields.items() if value is not None]


def dead_letter(record: Any, stage: str, error: EventRefused, now_ms: int) -> tuple[bytes | None, bytes | None, int, list]:
    """(key, value, timestamp, headers) of the dead letter of a fetched record."""
    value = record.value
    large = value is not None and len(value) > MAX_KEPT_BYTES
    meta = DeadLetter(
        source_topic=record.topic,
        source_partition=record.partition,
        source_offset=record.offset,
        stage=stage,
        reason=error.reason,
        detail=error.detail,
        refused_at=now_ms,
        sha256=hashlib.sha256(value).hexdigest() if large else None,
        size=len(value) if large else None,
    )
    return record.key, b"" if large else value, now_ms, encode_headers(meta)


def decode_headers(headers: Iterable[tuple[str, bytes]]) -> DeadLetter | None:
    """Inverse of `encode_headers`; None where they are not the headers of a dead letter. Other headers are ignored."""
    try:
        fields = {name: value.decode() for name, value in headers}
        return msgspec.convert(fields, DeadLetter, strict=False)
    except (UnicodeDecodeError, msgspec.ValidationError):
        return None


async def read(kafka: KafkaConfig, topic: str, reason: str | None = None) -> AsyncIterator[Letter]:
    """The dead letters that the topic holds now, of `reason` only where given."""
    async for record in _records(kafka, topic):
        meta = decode_headers(record.headers)
        if reason is None or (meta is not None and meta.reason == reason):
            yield Letter(topic, record.partition, record.offset, record.key, record.value, meta)


async def _records(kafka: KafkaConfig, topic: str) -> AsyncIterator[Any]:
    """Every record of `topic` up to the end that it has now, without a group. None where the topic does not exist."""
    async with connected(kafka) as client:
        cluster = await client.fetch_all_metadata()
        partitions = [TopicPartition(topic, p) for p in cluster.partitions_for_topic(topic) or ()]
        ends = await end_offsets(client, partitions)
    if not partitions:
        return
    consumer = AIOKafkaConsumer(
        group_id=None, enable_auto_commit=False, auto_offset_reset="earliest", **client_options(kafka)
    )
    await consumer.start()
    try:
        consumer.assign(partitions)
        unread = {tp for tp in partitions if ends[tp] > 0}
        while unread:
            fetched = await consumer.getmany(*unread, timeout_ms=200)
            for tp, records in fetched.items():
                for record in records:
                    if record.offset < ends[tp]:
                        yield record
            # By position, not by the last record: retention may have removed those before the end.
            unread = {tp for tp in unread if await consumer.position(tp) < ends[tp]}
    finally:
        await consumer.stop()


async def newest(kafka: KafkaConfig, topic: str, limit: int, reason: str | None = None) -> list[Letter]:
    """The `limit` dead letters refused last, oldest of them first. Holds no values."""
    held: list[tuple[int, int, int, Letter]] = []
    async for letter in read(kafka, topic, reason):
        refused_at = letter.meta.refused_at if letter.meta else 0
        heapq.heappush(held, (refused_at, letter.offset, letter.partition, letter._replace(value=b"")))
        if len(held) > limit:
            heapq.heappop(held)
    return [entry[-1] for entry in sorted(held, key=lambda entry: entry[:3])]


async def replay(kafka: KafkaConfig, topic: str, limit: int | None = None, reason: str | None = None) -> Replayed:
    """Sends the original bytes, under the original key, to the topic they came from; waits for every acknowledgement.

    Letters stay in the topic: a second replay sends them again. What is refused anew becomes a new letter, and is not
    read by this call, which stops at the end that the topic had when it began.
    """
    sent, too_large, unreadable = 0, [], []
    producer = AIOKafkaProducer(
        acks="all",
        enable_idempotence=kafka.idempotence,
        linger_ms=5,
        max_request_size=_MAX_REQUEST_BYTES,
        **client_options(kafka),
    )
    await producer.start()
    try:
        in_flight: list[asyncio.Future] = []
        async for letter in read(kafka, topic, reason):
            if sent == limit:
                break
            if not letter.kept:
                (too_large if letter.meta else unreadable).append(letter)
                continue
            origin = f"{letter.topic}/{letter.partition}/{letter.offset}".encode()
            headers = [(REPLAYED_HEADER, origin)]
            in_flight.append(await producer.send(letter.meta.source_topic, letter.value, key=letter.key, headers=headers))
            sent += 1
            if len(in_flight) == _IN_FLIGHT:
                await asyncio.gather(*in_flight)
                in_flight.clear()
        await asyncio.gather(*in_flight)
    finally:
        await producer.stop()
    return Replayed(sent, too_large, unreadable)
