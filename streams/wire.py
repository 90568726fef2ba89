"""Kafka's record batches (format v2) ⇄ columns, a whole fetch or a whole send at a time.

    bytes of a fetch ─► batch headers ─► CRC-32C ─► decompressed ─► Records: offsets, timestamps, spans of keys and values
    columns ─► cut at the largest batch ─► records written ─► (compressed) ─► header, CRC-32C ─► aiokafka's producer

Keys and values stay where they are in the bytes that came: a span is a place and a length. Batches of the older formats
are aiokafka's to read (`parse` says None); `Records.of` makes columns of what it reads.

Knows the format alone; not topics' meaning, what keys and values hold, or where the bytes come from.
Legend: N records, B bytes, M batches.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import llvmlite.binding
import llvmlite.ir
import numba
import numpy as np
from aiokafka import codec
from aiokafka.errors import CorruptRecordException, UnsupportedCodecError
from aiokafka.record.util import calc_crc32c
from aiokafka.structs import ConsumerRecord
from numba import njit
from numba.extending import intrinsic

_HEADER = struct.Struct(">qiibIhiqqqhii")
"""Base offset, length, leader epoch, magic, CRC, attributes, last offset delta, first and greatest timestamp, producer id
and epoch, first sequence, count; the records follow."""
_HEADER_B = _HEADER.size
_BEFORE_LENGTH_ENDS_B = 12
_CRC_AT, _CRC_OF_B = 17, 21
_LEAST_RECORD_B = 7
"""Length, attributes, two deltas, key, value, headers: a byte each."""
_OLDEST_HEADER_B = 26

_CODEC, _LOG_APPEND_TIME, _CONTROL = 0x07, 0x08, 0x20

_BATCH = np.dtype(
    [
        (name, np.int64)
        for name in (
            "start", "at", "end", "magic", "attributes", "base_offset", "next_offset", "first_ms", "greatest_ms", "count",
        )
    ]
)  # fmt: skip
"""Of one batch: where it starts; from where to where its records lie; what its header says."""

_WHOLE, _TOO_SHORT, _UNKNOWN_MAGIC, _BAD_COUNT, _BAD_RECORD, _LEFT_OVER = range(6)
_WHY = {
    _TOO_SHORT: "it says that it is shorter than its own header",
    _UNKNOWN_MAGIC: "its format is newer than version 2, or none",
    _BAD_COUNT: "it says that it has more records than fit into it",
    _BAD_RECORD: "a length in a record points beyond the record",
    _LEFT_OVER: "bytes are left over after its last record",
}


class Spans(NamedTuple):
    """N byte strings, or nulls, in one buffer. Its `len` is that of the tuple: the number of strings is `n`."""

    buffer: np.ndarray
    """(B,) uint8."""
    at: np.ndarray
    """(N,) int64: where each begins."""
    length: np.ndarray
    """(N,) int32: its bytes; −1 is null."""

    @classmethod
    def of(cls, items: Sequence[bytes | None]) -> Spans:
        """Of byte strings, copied."""
        length = np.array([-1 if item is None else len(item) for item in items], np.int32)
        buffer = np.frombuffer(b"".join([item or b"" for item in items]), np.uint8)
        return cls(buffer, np.cumsum(np.maximum(length, 0), dtype=np.int64) - np.maximum(length, 0), length)

    def read_only(self) -> Spans:
        """The same strings, in the one kind of buffer that kernels are compiled for (`read_only` below)."""
        return self._replace(buffer=read_only(self.buffer))

    @property
    def n(self) -> int:
        return len(self.at)

    @property
    def extent(self) -> tuple[int, int]:
        """All strings lie in `buffer` from the first to before the last; (0, 0) where there is none but nulls."""
        here = self.length >= 0
        at, length = (self.at, self.length) if here.all() else (self.at[here], self.length[here])
        return (int(at.min()), int((at + length).max())) if len(at) else (0, 0)

    def take(self, rows: np.ndarray | slice) -> Spans:
        """Those of `rows` (indices, a mask or a slice), in the same buffer."""
        return Spans(self.buffer, self.at[rows], self.length[rows])

    def tolist(self) -> list[bytes | None]:
        """Copies of all, None where null."""
        if not self.n:
            return []
        end = self.at + np.maximum(self.length, 0)
        first = int(self.at.min())
        held = self.buffer[first : int(end.max())].tobytes()
        spans = zip((self.at - first).tolist(), (end - first).tolist(), self.length.tolist(), strict=True)
        return [held[a:b] if n >= 0 else None for a, b, n in spans]

    def get(self, i: int) -> bytes | None:
        """A copy of one."""
        at, n = int(self.at[i]), int(self.length[i])
        return self.buffer[at : at + n].tobytes() if n >= 0 else None


class Records(Sequence):
    """What was fetched of one partition, as columns, in ascending order of offsets.

    It is a sequence of aiokafka's `ConsumerRecord` too: indexing and iterating make them (with headers, no checksum); a
    slice is `Records` in the same buffer.
    """

    __slots__ = ("headers_at", "keys", "offset", "partition", "timestamp", "timestamp_type", "topic", "values")

    def __init__(
        self,
        topic: str,
        partition: int,
        offset: np.ndarray,
        timestamp: np.ndarray,
        keys: Spans,
        values: Spans,
        timestamp_type: np.ndarray | None = None,
        headers_at: np.ndarray | None = None,
    ) -> None:
        """`offset`, `timestamp` (ms): (N,) int64; `timestamp_type` (N,) int8: 0 creation (if not given), 1 log append,
        −1 unknown; `headers_at` (N,) int64: where in the buffer of `values` a record's headers begin, −1 where none."""
        self.topic = topic
        self.partition = partition
        self.offset = offset
        self.timestamp = timestamp
        self.keys = keys
        self.values = values
        self.timestamp_type = np.zeros(len(offset), np.int8) if timestamp_type is None else timestamp_type
        self.headers_at = np.full(len(offset), -1, np.int64) if headers_at is None else headers_at

    @classmethod
    def of(cls, records: Sequence[Any]) -> Records:
        """Of at least one `ConsumerRecord`, all of one partition; copied. A time that is None becomes −1."""
        headers = [_encode_headers(record.headers) for record in records]
        parts = [part for r, header in zip(records, headers, strict=True) for part in (r.key, r.value, header)]
        spans = Spans.of(parts)
        headers_at = np.where(spans.length[2::3] >= 0, spans.at[2::3], -1)
        return cls(
            records[0].topic,
            records[0].partition,
            np.array([record.offset for record in records], np.int64),
            np.array([-1 if r.timestamp is None else r.timestamp for r in records], np.int64),
            spans.take(slice(0, None, 3)),
            spans.take(slice(1, None, 3)),
            np.array([-1 if r.timestamp_type is None else r.timestamp_type for r in records], np.int8),
            headers_at,
        )

    @property
    def nbytes(self) -> int:
        """Of the buffer that it keeps: that of the whole fetch."""
        return self.values.buffer.nbytes

    def __len__(self) -> int:
        return len(self.offset)

    def __repr__(self) -> str:
        return f"<Records {self.topic}[{self.partition}]: {len(self)}>"  # never keys or values: they can be raw ids

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Records(
                self.topic,
                self.partition,
                self.offset[i],
                self.timestamp[i],
                self.keys.take(i),
                self.values.take(i),
                self.timestamp_type[i],
                self.headers_at[i],
            )
        key, value = self.keys.get(i), self.values.get(i)
        return self._record(
            int(self.offset[i]), int(self.timestamp[i]), int(self.timestamp_type[i]), key, value, int(self.headers_at[i])
        )

    def __iter__(self) -> Iterator[ConsumerRecord]:
        columns = (self.offset, self.timestamp, self.timestamp_type, self.keys, self.values, self.headers_at)
        for row in zip(*(column.tolist() for column in columns), strict=True):
            yield self._record(*row)

    def _record(
        self, offset: int, timestamp: int, timestamp_type: int, key: bytes | None, value: bytes | None, headers_at: int
    ) -> ConsumerRecord:
        return ConsumerRecord(
            self.topic,
            self.partition,
            offset,
            timestamp,
            timestamp_type,
            key,
            value,
            None,
            len(key) if key is not None else -1,
            len(value) if value is not None else -1,
            _decode_headers(self.values.buffer, headers_at) if headers_at >= 0 else (),
        )


# -- the checksum


def _has_crc32() -> bool:
    """Whether this processor, and what Numba compiles for, have the instruction for CRC-32C."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    told = numba.config.CPU_FEATURES
    if told is not None or numba.config.CPU_NAME is not None:
        return "+sse4.2" in (told or "")
    return bool(llvmlite.binding.get_host_cpu_features().get("sse4.2"))


@intrinsic
def _crc32_of_8(typing_context, crc, word):
    """The processor's own step over 8 bytes."""

    def generate(context, builder, signature, arguments):
        i64 = llvmlite.ir.IntType(64)
        kind = llvmlite.ir.FunctionType(i64, [i64, i64])
        step = builder.module.declare_intrinsic("llvm.x86.sse42.crc32.64.64", (), kind)
        return builder.call(step, arguments)

    return numba.types.uint64(numba.types.uint64, numba.types.uint64), generate


@njit(cache=True, nogil=True)
def _crc32c(buffer):
    eight, size = np.uint64(8), np.uint64(len(buffer))
    crc, at = np.uint64(0xFFFFFFFF), np.uint64(0)
    while size - at >= eight:
        word = np.uint64(0)
        for j in range(eight):
            word |= np.uint64(buffer[at + j]) << (eight * j)
        crc = _crc32_of_8(crc, word)
        at += eight
    rest = np.uint32(crc)
    for i in range(at, size):
        rest ^= np.uint32(buffer[i])
        for _ in range(8):
            rest = np.uint32(rest >> np.uint32(1)) ^ np.uint32(np.uint32(0x82F63B78) * (rest & np.uint32(1)))
    return rest ^ np.uint32(0xFFFFFFFF)


def crc32c(buffer: np.ndarray) -> int:
    """CRC-32C of (B,) uint8: by the processor where it can (5 times as fast), else by aiokafka."""
    return int(_crc32c(buffer)) if _BY_PROCESSOR else calc_crc32c(buffer)


_BY_PROCESSOR = _has_crc32()


# -- reading


def parse(
    data: bytes, topic: str, partition: int, fetch_offset: int, *, check_crcs: bool = True
) -> tuple[Records, int] | None:
    """The bytes of a fetch → (its records from `fetch_offset` on, the offset to fetch next).

    A batch that is cut off at the end is left out, control batches are stepped over. Where a batch is older than v2: None.
    Raises CorruptRecordException where a batch is not what its header says, UnsupportedCodecError where there is no codec.
    """
    buffer = np.frombuffer(data, np.uint8)
    batches_M, bad, at = _scan(buffer)
    where = f"{topic}[{partition}]"
    if bad:
        raise _corrupt(where, at, bad)
    if np.any(batches_M["magic"] < 2):
        return None
    if check_crcs:
        _check_crcs(buffer, batches_M, where)
    if np.any(batches_M["attributes"] & _CODEC):
        buffer = _inflate(data, batches_M, where)
    read = _read(buffer, batches_M, fetch_offset)
    n, next_offset, bad, at = read[:4]
    if bad:
        raise _corrupt(where, at, bad)
    offset, timestamp, timestamp_type, key_at, key_length, value_at, value_length, headers_at = (
        column[:n] for column in read[4:]
    )
    keys, values = Spans(buffer, key_at, key_length), Spans(buffer, value_at, value_length)
    return Records(topic, partition, offset, timestamp, keys, values, timestamp_type, headers_at), next_offset


def _corrupt(where: str, at: int, bad: int) -> CorruptRecordException:
    return CorruptRecordException(
        f"{where}: the record batch at byte {at} of what was fetched is corrupt: {_WHY[bad]}. Nothing of it was taken. "
        "If it stays so after a restart, look at the broker's log segment or read from another replica"
    )


def _check_crcs(buffer: np.ndarray, batches_M: np.ndarray, where: str) -> None:
    for start, end in zip(batches_M["start"].tolist(), batches_M["end"].tolist(), strict=True):
        stated = int.from_bytes(buffer[start + _CRC_AT : start + _CRC_OF_B].tobytes(), "big")
        if crc32c(buffer[start + _CRC_OF_B : end]) != stated:
            raise CorruptRecordException(
                f"{where}: the checksum (CRC-32C) of the record batch at byte {start} of what was fetched does not hold. "
                "If it stays so after a restart, look at the broker's log segment or read from another replica"
            )


def _inflate(data: bytes, batches_M: np.ndarray, where: str) -> np.ndarray:
    """A buffer of `data` and, after it, every compressed batch's records; `batches_M` then says where those lie."""
    parts, size = [data], len(data)
    for i in np.flatnonzero(batches_M["attributes"] & _CODEC).tolist():
        batch = batches_M[i]
        if batch["attributes"] & _CONTROL:
            continue
        inflated = _decompress(data[batch["at"] : batch["end"]], int(batch["attributes"]) & _CODEC, where)
        parts.append(inflated)
        batches_M["at"][i], batches_M["end"][i] = size, size + len(inflated)
        size += len(inflated)
    return np.frombuffer(b"".join(parts), np.uint8)


_CODECS = {
    1: ("gzip", codec.has_gzip, codec.gzip_encode, codec.gzip_decode),
    2: ("snappy", codec.has_snappy, codec.snappy_encode, codec.snappy_decode),
    3: ("lz4", codec.has_lz4, codec.lz4_encode, codec.lz4_decode),
    4: ("zstd", codec.has_zstd, codec.zstd_encode, codec.zstd_decode),
}


def _decompress(records: bytes, number: int, where: str) -> bytes:
    name, available, _, decode = _codec(number)
    if not available():
        raise UnsupportedCodecError(f"{where}: no library for its compression ({name}): pip install aiokafka[{name}]")
    try:
        return decode(records)
    except Exception as error:  # each codec has its own, down to struct.error
        raise CorruptRecordException(f"{where}: a record batch does not decompress ({name}): {error}") from error


def _codec(number: int) -> tuple[str, Any, Any, Any]:
    if number not in _CODECS:
        raise UnsupportedCodecError(f"a record batch names compression {number}, which Kafka does not have")
    return _CODECS[number]


def _encode_headers(headers: Sequence[tuple[str, bytes | None]]) -> bytes | None:
    """Headers as they lie in a record; None where there are none."""
    if not headers:
        return None
    out = bytearray(_varint_bytes(len(headers)))
    for name, value in headers:
        encoded = name.encode()
        out += _varint_bytes(len(encoded)) + encoded + _varint_bytes(-1 if value is None else len(value)) + (value or b"")
    return bytes(out)


def _decode_headers(buffer: np.ndarray, at: int) -> tuple[tuple[str, bytes | None], ...]:
    """Inverse of `_encode_headers`, of headers that `_read` has found whole. A name that is no UTF-8 is shown as it is."""
    out = []
    count, at = _varint(buffer, at, len(buffer))
    for _ in range(count):
        n, at = _varint(buffer, at, len(buffer))
        name, at = buffer[at : at + n].tobytes().decode(errors="backslashreplace"), at + n
        n, at = _varint(buffer, at, len(buffer))
        value, at = (None, at) if n < 0 else (buffer[at : at + n].tobytes(), at + n)
        out.append((name, value))
    return tuple(out)


def _varint_bytes(value: int) -> bytes:
    out = np.empty(10, np.uint8)
    return out[: _put_varint(out, 0, value)].tobytes()


@njit(cache=True, nogil=True, forceinline=True)
def _big_endian(buffer, at, n):
    """n bytes as a signed number."""
    value = np.int64(buffer[at])
    if value >= 128:
        value -= 256
    for i in range(at + 1, at + n):
        value = (value << 8) | np.int64(buffer[i])
    return value


@njit(cache=True, nogil=True, forceinline=True)
def _varint(buffer, at, end):
    """A zigzag number → (it, the place after it); the place is −1 where it does not end before `end`, or came in as −1."""
    if at < 0 or at >= end:
        return np.int64(0), np.int64(-1)
    raw = np.uint64(0)
    shift = np.uint64(0)
    while at < end and shift < np.uint64(70):
        byte = np.uint64(buffer[np.uint64(at)])
        at += 1
        raw |= (byte & np.uint64(0x7F)) << shift
        if byte < np.uint64(0x80):
            return np.int64(raw >> np.uint64(1)) ^ -np.int64(raw & np.uint64(1)), np.int64(at)
        shift += np.uint64(7)
    return np.int64(0), np.int64(-1)


@njit(cache=True, nogil=True)
def _scan(buffer):
    """Batch headers, up to the first batch that is not whole → (_BATCH (M,), what is wrong or 0, where)."""
    size = len(buffer)
    m, at = 0, 0
    while size - at >= _BEFORE_LENGTH_ENDS_B:
        length = _big_endian(buffer, at + 8, 4)
        if length > size - at - _BEFORE_LENGTH_ENDS_B:
            break
        if length < _OLDEST_HEADER_B - _BEFORE_LENGTH_ENDS_B:
            return np.empty(0, _BATCH), _TOO_SHORT, at
        at += _BEFORE_LENGTH_ENDS_B + length
        m += 1
    batches_M = np.empty(m, _BATCH)
    at = 0
    for i in range(m):
        batch = batches_M[i]
        batch["start"] = at
        batch["end"] = at + _BEFORE_LENGTH_ENDS_B + _big_endian(buffer, at + 8, 4)
        batch["at"] = at + _HEADER_B
        batch["magic"] = buffer[at + 16]
        if batch["magic"] > 2:
            return batches_M, _UNKNOWN_MAGIC, at
        batch["attributes"] = 0
        if batch["magic"] == 2:
            if batch["end"] < batch["at"]:
                return batches_M, _TOO_SHORT, at
            batch["base_offset"] = _big_endian(buffer, at, 8)
            batch["attributes"] = _big_endian(buffer, at + 21, 2)
            batch["next_offset"] = batch["base_offset"] + _big_endian(buffer, at + 23, 4) + 1
            batch["first_ms"] = _big_endian(buffer, at + 27, 8)
            batch["greatest_ms"] = _big_endian(buffer, at + 35, 8)
            batch["count"] = _big_endian(buffer, at + 57, 4)
        at = batch["end"]
    return batches_M, _WHOLE, 0


@njit(cache=True, nogil=True)
def _read(buffer, batches_M, fetch_offset):
    """Every record from `fetch_offset` on → (their number, the next offset, what is wrong or 0, where, the columns)."""
    total, bad, bad_at = 0, _WHOLE, 0
    for batch in batches_M:
        if batch["count"] < 0 or batch["count"] > (batch["end"] - batch["at"]) // _LEAST_RECORD_B:
            if not batch["attributes"] & _CONTROL:
                bad, bad_at, total = _BAD_COUNT, batch["start"], 0
                break
        elif not batch["attributes"] & _CONTROL:
            total += batch["count"]
    offset = np.empty(total, np.int64)
    timestamp = np.empty(total, np.int64)
    timestamp_type = np.empty(total, np.int8)
    key_at = np.empty(total, np.int64)
    key_length = np.empty(total, np.int32)
    value_at = np.empty(total, np.int64)
    value_length = np.empty(total, np.int32)
    headers_at = np.empty(total, np.int64)
    columns = (offset, timestamp, timestamp_type, key_at, key_length, value_at, value_length, headers_at)
    n, due = 0, np.int64(fetch_offset)
    if bad:
        return n, due, bad, bad_at, *columns
    for batch in batches_M:
        if batch["attributes"] & _CONTROL:
            due = max(due, batch["next_offset"])
            continue
        at, end = batch["at"], batch["end"]
        by_broker = (batch["attributes"] & _LOG_APPEND_TIME) != 0
        for _ in range(batch["count"]):
            length, at = _varint(buffer, at, end)
            if at < 0 or length < 1 or length > end - at:
                return n, due, _BAD_RECORD, batch["start"], *columns
            stop = at + length
            ms_delta, at = _varint(buffer, at + 1, stop)  # the first byte has no use yet
            offset_delta, at = _varint(buffer, at, stop)
            k_length, at = _varint(buffer, at, stop)
            k_at = at
            if at >= 0 and k_length > 0:
                at = at + k_length if k_length <= stop - at else -1
            v_length, at = _varint(buffer, at, stop)
            v_at = at
            if at >= 0 and v_length > 0:
                at = at + v_length if v_length <= stop - at else -1
            h_at = at
            n_headers, at = _varint(buffer, at, stop)
            if n_headers:
                at = _after_headers(buffer, at, stop, n_headers)
            if at != stop:
                return n, due, _BAD_RECORD, batch["start"], *columns
            here = batch["base_offset"] + offset_delta
            if here < due:
                continue  # before the fetch offset: the broker sends whole batches
            due = here + 1
            offset[n] = here
            timestamp[n] = batch["greatest_ms"] if by_broker else batch["first_ms"] + ms_delta
            timestamp_type[n] = by_broker
            key_at[n], key_length[n] = k_at, max(k_length, -1)
            value_at[n], value_length[n] = v_at, max(v_length, -1)
            headers_at[n] = h_at if n_headers else -1
            n += 1
        if at != end:
            return n, due, _LEFT_OVER, batch["start"], *columns
        # Compaction may have taken its last records: the header still says where the next batch begins.
        due = max(due, batch["next_offset"])
    return n, due, _WHOLE, 0, *columns


@njit(cache=True, nogil=True, forceinline=True)
def _after_headers(buffer, at, stop, n_headers):
    """The place after `n_headers` headers; −1 where they do not end by `stop`."""
    if n_headers < 0:
        return np.int64(-1)
    for _ in range(n_headers):
        n, at = _varint(buffer, at, stop)
        if at < 0 or n < 0 or n > stop - at:
            return np.int64(-1)
        n, at = _varint(buffer, at + n, stop)
        if at < 0:
            return np.int64(-1)
        if n > 0:
            if n > stop - at:
                return np.int64(-1)
            at += n
    return np.int64(at)


# -- writing


class ColumnBatch:
    """One batch for aiokafka's producer, which treats it like its own `BatchBuilder`: closed from the start."""

    def __init__(self, buffer: bytearray, count: int, first_ms: int, greatest_ms: int, compression: int) -> None:
        """`buffer`: room for the header, then the records. `compression`: Kafka's number of the codec, 0 none."""
        self._buffer = buffer
        self._count = count
        self._first_ms, self._greatest_ms = first_ms, greatest_ms
        self._compression = compression
        self._producer = (-1, -1, 0)
        self._built = False

    def append(self, **record: Any) -> None:
        """Takes nothing more."""

    def close(self) -> None:
        """It is."""

    def closed(self) -> bool:
        return True

    def record_count(self) -> int:
        return self._count

    def size(self) -> int:
        """Bytes, not yet compressed before it is built."""
        return len(self._buffer)

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        self._producer = (producer_id, producer_epoch, base_sequence)

    def _build(self) -> bytearray:
        """The batch as it is sent; the same again when it is sent again."""
        if not self._built:
            attributes = self._compress()
            buffer, count = self._buffer, self._count
            length = len(buffer) - _BEFORE_LENGTH_ENDS_B
            ms = (self._first_ms, self._greatest_ms)
            _HEADER.pack_into(buffer, 0, 0, length, -1, 2, 0, attributes, count - 1, *ms, *self._producer, count)
            crc = crc32c(np.frombuffer(buffer, np.uint8)[_CRC_OF_B:])
            buffer[_CRC_AT:_CRC_OF_B] = crc.to_bytes(4, "big")
            self._built = True
        return self._buffer

    def _compress(self) -> int:
        """Compresses the records where that makes them smaller. → the codec used, 0 none"""
        if not self._compression:
            return 0
        _, _, encode, _ = _codec(self._compression)
        records = bytes(memoryview(self._buffer)[_HEADER_B:])
        compressed = encode(records)
        if len(compressed) >= len(records):
            return 0
        self._buffer = bytearray(_HEADER_B) + compressed
        return self._compression


def build(
    keys: Spans, values: Spans, timestamps_ms: np.ndarray | int, most_bytes: int, compression: int = 0
) -> list[ColumnBatch]:
    """Records without headers → batches of at most `most_bytes` (uncompressed) in order; one that is larger is alone in its
    batch, and the broker's to refuse. `timestamps_ms`: (N,) int64, or one for all. Copies: the columns may be used again.

    Raises ValueError where the columns differ in length or a span does not lie in its buffer.
    """
    n = keys.n
    times = np.ascontiguousarray(np.broadcast_to(np.asarray(timestamps_ms, np.int64), n))
    if values.n != n or len(keys.length) != n or len(values.length) != n:
        raise ValueError(f"{n} keys, {values.n} values: a record has both")
    columns = [read_only(np.ascontiguousarray(column)) for column in (*keys, *values)]
    cuts, sizes, bad = _plan(*columns, times, most_bytes)
    if bad >= 0:
        raise ValueError(f"the key or the value of record {bad} does not lie in its buffer")
    out = []
    for first, last, size in zip(cuts[:-1].tolist(), cuts[1:].tolist(), sizes.tolist(), strict=True):
        buffer = bytearray(size)
        _write(*columns, times, first, last, np.frombuffer(buffer, np.uint8))
        out.append(ColumnBatch(buffer, last - first, int(times[first]), int(times[first:last].max()), compression))
    return out


def read_only(array: np.ndarray) -> np.ndarray:
    """The same memory. To Numba that is a type of its own: kernels are compiled for it alone, whoever may write to it."""
    array = array.view()
    array.flags.writeable = False
    return array


@njit(cache=True, nogil=True, forceinline=True)
def _put_varint(out, at, value):
    """Writes a zigzag number; → the place after it."""
    raw = np.uint64((np.int64(value) << 1) ^ (np.int64(value) >> 63))
    while raw >= np.uint64(0x80):
        out[np.uint64(at)] = np.uint8((raw & np.uint64(0x7F)) | np.uint64(0x80))
        raw >>= np.uint64(7)
        at += 1
    out[np.uint64(at)] = np.uint8(raw)
    return at + 1


@njit(cache=True, nogil=True, forceinline=True)
def _size_of_varint(value):
    raw = np.uint64((np.int64(value) << 1) ^ (np.int64(value) >> 63))
    n = 1
    while raw >= np.uint64(0x80):
        raw >>= np.uint64(7)
        n += 1
    return n


@njit(cache=True, nogil=True, forceinline=True)
def _body_size(ms_delta, offset_delta, key_length, value_length):
    """Bytes of a record after its length."""
    size = 2 + _size_of_varint(ms_delta) + _size_of_varint(offset_delta)  # attributes and the number of headers: one each
    size += _size_of_varint(key_length) + max(key_length, 0)
    return size + _size_of_varint(value_length) + max(value_length, 0)


@njit(cache=True, nogil=True, forceinline=True)
def _inside(at, length, size):
    return length == -1 or (length >= 0 and 0 <= at <= size - length)


@njit(cache=True, nogil=True)
def _plan(key_buffer, key_at, key_length, value_buffer, value_at, value_length, times, most_bytes):
    """Where to cut → (first record of each batch and the end (M + 1,), bytes of each (M,), first record that is not inside
    its buffers or −1)."""
    n = len(times)
    cuts = np.zeros(n + 1, np.int64)
    sizes = np.zeros(n, np.int64)
    m, first, size = 0, 0, np.int64(_HEADER_B)
    for i in range(n):
        k, v = np.int64(key_length[i]), np.int64(value_length[i])
        if not (_inside(key_at[i], k, len(key_buffer)) and _inside(value_at[i], v, len(value_buffer))):
            return cuts[:1], sizes[:0], i
        body = _body_size(times[i] - times[first], i - first, k, v)
        needs = body + _size_of_varint(body)
        if i > first and size + needs > most_bytes:
            sizes[m] = size
            m += 1
            cuts[m] = first = i
            body = _body_size(0, 0, k, v)
            needs = body + _size_of_varint(body)
            size = np.int64(_HEADER_B)
        size += needs
    if n:
        sizes[m] = size
        m += 1
        cuts[m] = n
    return cuts[: m + 1], sizes[:m], -1


@njit(cache=True, nogil=True)
def _write(key_buffer, key_at, key_length, value_buffer, value_at, value_length, times, first, last, out):
    """Records `first` to `last` of a plan into `out`, after its header."""
    at = _HEADER_B
    for i in range(first, last):
        k, v = np.int64(key_length[i]), np.int64(value_length[i])
        ms_delta = times[i] - times[first]
        at = _put_varint(out, at, _body_size(ms_delta, i - first, k, v))
        out[at] = 0
        at = _put_varint(out, at + 1, ms_delta)
        at = _put_varint(out, at, i - first)
        at = _put_bytes(out, _put_varint(out, at, k), key_buffer, key_at[i], k)
        at = _put_bytes(out, _put_varint(out, at, v), value_buffer, value_at[i], v)
        out[at] = 0
        at += 1


@njit(cache=True, nogil=True, forceinline=True)
def _put_bytes(out, at, buffer, start, n):
    if n < 1:
        return at
    to, of = np.uint64(at), np.uint64(start)  # unsigned, so that the compiler makes a block copy of it: 10 times faster
    for j in range(np.uint64(n)):
        out[to + j] = buffer[of + j]
    return at + n


def warm() -> None:
    """Compiles into Numba's cache."""
    columns = Spans.of([b"key", None])
    (batch,) = build(columns, columns, 0, 1000)
    parse(bytes(batch._build()), "warm", 0, 0)
    _varint_bytes(0)
