"""Snapshots of user state on the local disk: a worker that starts again reads only what the changelog got since.

    arena ─ copies of some thousand slots, on the event loop ─► packed and written, in a thread ─► <file>.new ─► renamed
    file ─► checked against the broker (`usable`) ─► rows of a partition ─► the changelog from `offset` on, by recovery

A file holds the rows of one partition, copied while the worker went on. So rows may be newer than `offset`, the place in
the changelog that was written when the copying began, never older than what was written up to there. That is enough: a
row knows the last event that it has applied, as after a death between steps 3 and 4 of the commit protocol. And as there,
nobody may see a row before what its events gave is acknowledged, else such an event could be scored from a later state
and from no other: the file gets its name only once the partition has committed after the copying. A file is worth nothing
where the changelog no longer continues it: then it is thrown away, the reason is logged, and all is read.

Of rows that an arena keeps on disk, a file has the changelog values as they lie there, after those in memory. A row that
moved while the file was written may be in it twice, the newer one last.

    magic  header bytes (uint32)  header (JSON)  CRC-32
    chunks: CHUNK (rows, key bytes, value bytes, CRC-32 of what follows up to the values)
            lengths of keys and values (int32), keys, values (each with its own CRC-32)

Knows rows, files and the changelog's offsets; not events, and not who owns a partition.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from models.config import KafkaConfig
from models.errors import CorruptRowError
from models.state import OK, STATE_ABI, decode_rows, encode_rows
from streams.arena import Arena
from streams.kafka import client_options, end_offsets
from streams.wire import Spans

log = structlog.get_logger("crosscurrent.snapshots")

MAGIC = b"CCSTATE1"
OLDEST_S = 12 * 3600.0
"""Age beyond which a file is thrown away: half the time for which the changelog keeps a tombstone. A tombstone that came and
went since would leave a user whom it should have dropped."""
_CHUNK = struct.Struct("<IIII")
_SLOTS = 1024
"""Looked at in one go on the event loop: at most as many rows of about 1 KiB are copied."""
_LARGEST_CHUNK = 1 << 16
_PROBE_S = 10.0


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """What a file says of itself."""

    abi: int
    size: str
    topic: str
    partition: int
    offset: int
    """Of the changelog: what was written up to here, included, is in the rows."""
    offset_ms: int
    """Kafka's time of the record there: tells a changelog from another that had its name."""
    saved_ms: int
    rows: int


class Unusable(Exception):
    """A snapshot is thrown away; str() says why."""


def path_of(folder: Path, topic: str, partition: int) -> Path:
    """Where the snapshot of a changelog partition lies."""
    return folder / f"{topic}-{partition}.rows"


# -- writing


async def save(
    arena: Arena,
    folder: Path,
    topic: str,
    partition: int,
    offset: int,
    offset_ms: int,
    commit: Callable[[int], Awaitable[object]],
) -> int | None:
    """Writes the snapshot of a partition, replacing the one before when it is complete. → rows in it; None, and nothing
    written, where the arena dropped the partition meanwhile.

    `offset`, `offset_ms`: place and Kafka time (ms) of the last changelog record that the arena is known to include. The
    event loop is held only to copy some thousand rows at a time; no more are copies at once. `commit` returns when all that
    the partition had done before the call is acknowledged.
    """
    held = arena.held(partition)
    path = path_of(folder, topic, partition)
    new = path.with_suffix(f".{os.getpid()}.new")
    header = Header(STATE_ABI, arena.size, topic, partition, offset, offset_ms, int(time.time() * 1000), 0)
    try:
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        with await asyncio.to_thread(open, new, "wb") as file:
            await asyncio.to_thread(_write_header, file, header)
            async with aclosing(_rows_of(arena, partition)) as chunks:
                async for keys, rows in chunks:
                    if held is None or arena.held(partition) is not held:
                        return None
                    if keys.n:
                        await asyncio.to_thread(_write_chunk, file, keys, rows)
                        header.rows += keys.n
                    else:
                        await asyncio.sleep(0)
            await asyncio.to_thread(_finish, file, header)
        await commit(partition)
        if arena.held(partition) is not held:
            return None
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    return header.rows


async def _rows_of(arena: Arena, partition: int) -> AsyncIterator[tuple[Spans, np.ndarray | Spans]]:
    """Keys, and rows or changelog values, of every user that the partition has now, as they are now or later; some thousand
    at a time, and between two the arena may go on. No version of a row is followed by an older one."""
    with arena.watched(partition) as came_back:
        for first in range(0, arena.n_slots, _SLOTS):
            yield arena.copies(partition, first, first + _SLOTS)
        # What came back from the disk meanwhile may lie in a slot already passed.
        while True:
            slots = np.unique(np.concatenate([*came_back, np.empty(0, np.int64)]))
            came_back[:] = [slots[_SLOTS:]]
            last = arena.copies_at(partition, slots[:_SLOTS])
            if len(slots) <= _SLOTS:
                break
            yield last
        # No await since the last copies: whoever is in none of them is on disk now.
        on_disk = arena.cold.chunks(partition) if arena.cold is not None else iter(())
    yield last
    while (chunk := await asyncio.to_thread(next, on_disk, None)) is not None:
        yield chunk


def _write_header(file: BinaryIO, header: Header) -> None:
    # Room for any number of rows: the header is written again when they are known.
    body = msgspec.json.encode(header).ljust(512)
    file.write(MAGIC + struct.pack("<I", len(body)) + body + struct.pack("<I", zlib.crc32(body)))


def _write_chunk(file: BinaryIO, keys: Spans, rows: np.ndarray | Spans) -> None:
    values = rows if isinstance(rows, Spans) else Spans(*encode_rows(rows, np.arange(len(rows))))
    key_bytes = b"".join(keys.tolist())
    front = keys.length.tobytes() + values.length.tobytes() + key_bytes
    file.write(_CHUNK.pack(keys.n, len(key_bytes), len(values.buffer), zlib.crc32(front)))
    file.write(front)
    file.write(values.buffer)


def _finish(file: BinaryIO, header: Header) -> None:
    file.seek(0)
    _write_header(file, header)
    file.flush()
    os.fsync(file.fileno())


# -- reading


def read_header(path: Path, topic: str, size: str, now_ms: int) -> Header:
    """The header of a file. Raises `Unusable` where it is damaged, of another ABI, size or topic, or too old."""
    with path.open("rb") as file:
        return _header(file, topic, size, now_ms)


def _header(file: BinaryIO, topic: str, size: str, now_ms: int) -> Header:
    if file.read(len(MAGIC)) != MAGIC:
        raise Unusable("it is no snapshot of this version")
    (n,) = struct.unpack("<I", _exactly(file, 4))
    body = _exactly(file, min(n, 1 << 16))
    if struct.pack("<I", zlib.crc32(body)) != _exactly(file, 4):
        raise Unusable("its header fails its checksum")
    try:
        header = msgspec.json.decode(body, type=Header)
    except msgspec.DecodeError as error:
        raise Unusable(f"its header cannot be read: {error}") from error
    if (header.abi, header.size, header.topic) != (STATE_ABI, size, topic):
        raise Unusable(
            f"it has state ABI {header.abi}, size {header.size!r}, changelog {header.topic!r}; "
            f"this worker has {STATE_ABI}, {size!r}, {topic!r}"
        )
    if not 0 <= now_ms - header.saved_ms <= OLDEST_S * 1000:
        raise Unusable(f"it is older than {OLDEST_S / 3600:.0f} h, or from the future")
    return header


def _exactly(file: BinaryIO, n: int) -> bytes:
    data = file.read(n)
    if len(data) != n:
        raise Unusable("it ends too soon")
    return data


def _chunks(file: BinaryIO, header: Header) -> Iterator[tuple[Spans, np.ndarray]]:
    left = header.rows
    while left:
        n, n_key_bytes, n_value_bytes, crc = _CHUNK.unpack(_exactly(file, _CHUNK.size))
        if not 0 < n <= left or n > _LARGEST_CHUNK or max(n_key_bytes, n_value_bytes) > 1 << 28:
            raise Unusable("its rows do not add up")
        front = _exactly(file, 8 * n + n_key_bytes)
        if zlib.crc32(front) != crc:
            raise Unusable("its keys fail their checksum")
        lengths = np.frombuffer(front, np.int32, 2 * n).reshape(2, n)
        ends = np.cumsum(lengths, axis=1, dtype=np.int64)
        if lengths.min() < 0 or ends[:, -1].tolist() != [n_key_bytes, n_value_bytes]:
            raise Unusable("its lengths do not add up")
        keys = Spans(np.frombuffer(front, np.uint8, offset=8 * n), ends[0] - lengths[0], lengths[0])
        values = np.frombuffer(_exactly(file, n_value_bytes), np.uint8)
        rows, status = decode_rows(values, ends[1] - lengths[1], lengths[1], header.size)
        if (status != OK).any():
            raise Unusable("a row fails its checksum")
        yield keys, rows
        left -= n


async def load(arena: Arena, path: Path, partition: int, topic: str) -> Header:
    """Restores a partition of which the arena holds nothing. Raises `Unusable`, and then it still holds nothing."""
    try:
        with path.open("rb") as file:
            header = _header(file, topic, arena.size, int(time.time() * 1000))
            if header.partition != partition:
                raise Unusable(f"it is of partition {header.partition}")
            for keys, rows in _chunks(file, header):
                arena.restore(partition, keys, rows)
                await asyncio.sleep(0)
    except (Unusable, OSError, CorruptRowError) as error:
        arena.drop_partition(partition)
        raise error if isinstance(error, Unusable) else Unusable(str(error)) from error
    return header


# -- what the broker says of them


async def usable(kafka: KafkaConfig, folder: Path, topic: str, partitions: Iterable[int], size: str) -> dict[int, Header]:
    """Headers of the snapshots that the changelog continues, by partition; the others are deleted, with a reason in the log.

    A file must end where the changelog still has the very record that it ended with.
    """
    headers = {}
    for partition in partitions:
        path = path_of(folder, topic, partition)
        try:
            headers[partition] = read_header(path, topic, size, int(time.time() * 1000))
        except FileNotFoundError:
            continue
        except (Unusable, OSError) as error:
            discard(path, str(error))
    if not headers:
        return {}
    consumer = AIOKafkaConsumer(**client_options(kafka), enable_auto_commit=False, max_partition_fetch_bytes=1 << 16)
    await consumer.start()
    try:
        for partition, why in (await _contradicted(consumer, topic, headers)).items():
            discard(path_of(folder, topic, partition), why)
            del headers[partition]
    finally:
        await consumer.stop()
    return headers


def discard(path: Path, reason: str) -> None:
    """Deletes a snapshot; the whole changelog is read instead."""
    log.warning("snapshot.discarded", path=str(path), reason=reason, hint="the whole changelog is read instead")
    path.unlink(missing_ok=True)


async def _contradicted(consumer: AIOKafkaConsumer, topic: str, headers: dict[int, Header]) -> dict[int, str]:
    """Why not, by partition."""
    places = {TopicPartition(topic, partition): header for partition, header in headers.items()}
    ends = await end_offsets(consumer._client, places)
    why = {
        tp.partition: f"it goes up to offset {header.offset} and the changelog ends at {ends[tp]}: another broker or topic"
        for tp, header in places.items()
        if header.offset >= ends[tp]
    }
    wanted = {tp: header for tp, header in places.items() if tp.partition not in why}
    consumer.assign(list(wanted))
    for tp, header in wanted.items():
        consumer.seek(tp, header.offset)
    until = time.monotonic() + _PROBE_S
    while wanted and time.monotonic() < until:
        for tp, records in (await consumer.getmany(timeout_ms=500)).items():
            header = wanted.pop(tp, None)
            if header is None:
                continue
            consumer.pause(tp)
            if records[0].offset != header.offset:
                why[tp.partition] = f"the changelog no longer has the record at offset {header.offset}"
            elif records[0].timestamp != header.offset_ms:
                why[tp.partition] = f"the changelog has another record at offset {header.offset}: another broker or topic"
    return why | {tp.partition: f"the broker does not give the record at offset {h.offset}" for tp, h in wanted.items()}
