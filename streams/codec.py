"""Bytes ⇄ columns, a batch at a time: canonical events in, score records out, and the partition of a key.

    keys, values ─► streams/kernels.py ─► EVENT, spans of the texts that a score repeats   ─► encode_scores ─► values
                         └─ unsure of a record ─► msgspec, for that record alone ─► the same, or EventRefused

What msgspec says of a record is what holds: the kernels only say it sooner, of what they are sure of.

Knows the formats; not Kafka, rows or what makes a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numba
import numpy as np
import xxhash

from models.errors import EventRefused
from models.events import (
    EVENT,
    KIND_CODE,
    PSEUDONYM_LENGTH,
    SCORE_SCHEMA,
    CanonicalEvent,
    event_hashes,
    hash64,
    platform_code,
    price_bucket,
)
from streams import kernels
from streams.kernels import MAX_QUANTITY
from streams.wire import Spans, read_only

if TYPE_CHECKING:
    from models.scorer import Scores  # whose import takes torch's

_decode = msgspec.json.Decoder(CanonicalEvent).decode
encode_json = msgspec.json.Encoder().encode
_code = lru_cache(maxsize=4096)(platform_code)


def decode_event(key: bytes | None, value: bytes | None) -> CanonicalEvent:
    """One record of `events`. Raises EventRefused("not_canonical")."""
    if value is None:
        raise EventRefused("not_canonical", "the record has no value")
    try:
        event = _decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventRefused("not_canonical", type(error).__name__) from error
    if key != event.user.encode():
        raise EventRefused("not_canonical", "the key is not the event's user")
    if event.quantity is not None and not abs(event.quantity) <= MAX_QUANTITY:
        raise EventRefused("not_canonical", "quantity is out of range")
    return event


def decode_events(records: list) -> tuple[list[CanonicalEvent], list, list[tuple[object, EventRefused]]]:
    """Records of `events` (with key, value, offset) → (events, their records, the refused with their reasons)."""
    events, good, refused = [], [], []
    for record in records:
        try:
            events.append(decode_event(record.key, record.value))
        except EventRefused as error:
            refused.append((record, error.with_traceback(None)))
        else:
            good.append(record)
    return events, good, refused


def columns(events: list[CanonicalEvent], offsets: list[int]) -> np.ndarray:
    """Events and their offsets (n,) → EVENT (n,). Equals `models.events.to_columns`, column by column instead of row by
    row."""
    out = np.empty(len(events), EVENT)
    digest = xxhash.xxh3_64_intdigest
    out["offset"] = offsets
    out["ts"] = [e.ts for e in events]
    out["item"] = [(digest(e.item.encode()) & 0xFFFFFFFF) or 1 if e.item else 0 for e in events]
    out["category"] = [(digest(e.category.encode()) & 0xFFFFFFFF) or 1 if e.category else 0 for e in events]
    out["quantity"] = [1.0 if e.quantity is None else e.quantity for e in events]
    out["platform"] = [_code(e.platform) for e in events]
    ids = np.array([digest(e.event_id.encode()) for e in events], np.uint64)
    out["id"] = event_hashes(ids, out["platform"])
    out["kind"] = [KIND_CODE[e.kind] for e in events]
    out["price"] = [price_bucket(e.price) for e in events]
    return out


class Texts(NamedTuple):
    """The JSON strings (quotes included) event_id, user and platform of M events."""

    buffer: np.ndarray
    """uint8: the values' own."""
    extra: np.ndarray
    """uint8: those of records that msgspec decoded."""
    at_M3: np.ndarray
    """int64: in `buffer` where at ≥ 0; at ~at in `extra` where at < 0."""
    length_M3: np.ndarray
    """int32."""


class Decoded(NamedTuple):
    """The canonical events among N records, in their order."""

    index: np.ndarray
    """int64 (M,): the position of each one's record."""
    columns: np.ndarray
    """EVENT (M,)."""
    texts: Texts
    platform_M: np.ndarray
    """int32: index into `platforms`."""
    platforms: list[str]
    """The names that occur."""
    refused: list[tuple[int, EventRefused]]
    """Position of every other record, and why."""


class Fetched(NamedTuple):
    """Records of `events`, as columns (N,)."""

    keys: Spans
    values: Spans
    offset: np.ndarray
    """int64."""
    timestamp: np.ndarray
    """int64, ms."""

    @classmethod
    def of(cls, records: Any) -> Fetched:
        """`records` has these columns itself, or is a list of records with `key`, `value`, `offset`, `timestamp`."""
        if not isinstance(records, list):
            return cls(records.keys, records.values, records.offset, records.timestamp)
        return cls(
            Spans.of([record.key for record in records]),
            Spans.of([record.value for record in records]),
            np.array([record.offset for record in records], np.int64),
            np.array([record.timestamp for record in records], np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[Fetched]) -> Fetched:
        """All of at least one, in order. Where there are several, their strings are copied into one buffer."""
        if len(parts) == 1:
            return parts[0]
        buffers, keys, values, end = [], [], [], 0
        for part in parts:
            (key_from, key_to), (from_, to) = part.keys.extent, part.values.extent
            for spans, out, first, last in ((part.keys, keys, key_from, key_to), (part.values, values, from_, to)):
                out.append((np.where(spans.length >= 0, spans.at + (end - first), end), spans.length))
                buffers.append(spans.buffer[first:last])
                end += last - first
        buffer = np.concatenate(buffers)
        keys, values = (Spans(buffer, *map(np.concatenate, zip(*spans, strict=True))) for spans in (keys, values))
        offset, timestamp = (np.concatenate(column) for column in list(zip(*parts, strict=True))[2:])
        return cls(keys, values, offset, timestamp)


def decode_columns(keys: Spans, values: Spans, offsets: np.ndarray) -> Decoded:
    """Keys, values and offsets of N records of `events` → what `decode_events` and `columns` make of them, as columns.

    Reads nothing outside of the buffers, whatever they hold. Raises ValueError where the spans themselves do.
    """
    n = len(offsets)
    events, sure = np.zeros(n, EVENT), np.empty(n, np.bool_)
    at_N3, length_N3, hashes = np.empty((n, 3), np.int64), np.empty((n, 3), np.int32), np.empty(n, np.uint64)
    offsets = np.ascontiguousarray(offsets, np.int64)
    found = kernels.parse_events(*_flat(keys), *_flat(values), offsets, events, at_N3, length_N3, hashes, sure)
    extra, refused, index = b"", [], np.arange(n)
    if found < n:
        unsure = np.flatnonzero(~sure)
        decoded, places, refused = _decode_alone(keys, values, unsure.tolist())
        events[places] = columns(decoded, offsets[places])
        texts = [encode_json(text) for event in decoded for text in (event.event_id, event.user, event.platform)]
        lengths = np.array([len(text) for text in texts], np.int64)
        at_N3[places] = ~(np.cumsum(lengths) - lengths).reshape(-1, 3)
        length_N3[places] = lengths.reshape(-1, 3)
        hashes[places] = np.array([hash64(event.platform) for event in decoded], np.uint64)
        extra = b"".join(texts)
        sure[places] = True
        if refused:
            index = np.flatnonzero(sure)
            events, at_N3, length_N3, hashes = events[index], at_N3[index], length_N3[index], hashes[index]
    texts = Texts(read_only(values.buffer), np.frombuffer(extra, np.uint8), at_N3, length_N3)
    return Decoded(index, events, texts, *_platforms(texts, hashes), refused)


def _decode_alone(
    keys: Spans, values: Spans, positions: list[int]
) -> tuple[list[CanonicalEvent], list[int], list[tuple[int, EventRefused]]]:
    """What msgspec says of each record: → events, their positions, the refused."""
    events, places, refused = [], [], []
    for i in positions:
        try:
            events.append(decode_event(_bytes_at(keys, i), _bytes_at(values, i)))
        except EventRefused as error:
            refused.append((i, error.with_traceback(None)))  # its frames would keep the fetch, until a cycle is looked for
        else:
            places.append(i)
    return events, places, refused


def _bytes_at(spans: Spans, i: int) -> bytes | None:
    at, n = int(spans.at[i]), int(spans.length[i])
    return spans.buffer[at : at + n].tobytes() if n >= 0 else None


def _platforms(texts: Texts, hashes: np.ndarray) -> tuple[np.ndarray, list[str]]:
    n = len(hashes)
    table = np.full(1 << (2 * n).bit_length(), -1, np.int32)
    number, first = np.empty(n, np.int32), np.empty(n, np.int64)
    at_M, length_M = np.ascontiguousarray(texts.at_M3[:, 2]), np.ascontiguousarray(texts.length_M3[:, 2])
    found = kernels.number_names(texts.buffer, texts.extra, at_M, length_M, hashes, table, number, first)
    names = []
    for i in first[:found].tolist():
        at, source = (int(at_M[i]), texts.buffer) if at_M[i] >= 0 else (~int(at_M[i]), texts.extra)
        names.append(msgspec.json.decode(source[at : at + int(length_M[i])].tobytes()))
    return number, names


def _flat(spans: Spans) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        read_only(spans.buffer),
        np.ascontiguousarray(spans.at, np.int64),
        np.ascontiguousarray(spans.length, np.int32),
    )


class ScoreTexts(NamedTuple):
    """What every score of one model repeats, as JSON: made once a model by `score_texts`."""

    model: bytes
    degraded: bytes
    names: np.ndarray
    """uint8: the names of its categories, and null."""
    name_at: np.ndarray
    """int64 (C + 2,): where each begins and the last ends."""
    longest_name: int


def score_texts(model: str, degraded: bool, names: Sequence[str]) -> ScoreTexts:
    """`model`: its version; `names`: of its categories (C)."""
    encoded = [encode_json(name) for name in (*names, None)]
    pieces, at = _joined(encoded)
    return ScoreTexts(encode_json(model), encode_json(degraded), pieces, at, max(map(len, encoded)))


def _joined(pieces: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """→ (uint8 of them all, followed by a block for reading beyond, where each begins and the last ends)."""
    at = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=at[1:])
    return np.frombuffer(b"".join([*pieces, bytes(kernels.BLOCK)]), np.uint8), at


def encode_scores(
    decoded: Decoded,
    take: np.ndarray,
    scores: Scores,
    cold: np.ndarray,
    texts: ScoreTexts,
    now_ms: int,
    explain: Sequence[Any] | None = None,
) -> Spans:
    """Score records (K) of the events `take` (K,) int64 of `decoded`, whose M events have `scores` and `cold` (M,) bool.

    Every record equals, read as JSON, what msgspec makes of its `ScoreRecord`: probabilities and shift to six digits, NaN
    as null, churn 1 − return. `explain`: what the field of that name holds (M,), UNSET for none; None: none has it.
    Raises ValueError where the columns do not fit the events, or a category has no name.
    """
    pieces, piece_at = _joined(_pieces(texts, now_ms))
    suffix, suffix_at = np.frombuffer(b"", np.uint8), np.empty(0, np.int64)
    if explain is not None:
        reasons = [explain[i] for i in take.tolist()]
        suffix, suffix_at = _joined([b"" if r is msgspec.UNSET else b',"explain":' + encode_json(r) for r in reasons])
    p_M3, category_M5, category_p_M5, shift_M = (np.ascontiguousarray(column) for column in scores)
    spans, k, top = decoded.texts, len(take), category_M5.shape[1]
    most = len(pieces) + (6 + top) * kernels.NUMBER_BYTES + top * (texts.longest_name + 4)
    out = np.empty(k * most + int(spans.length_M3[take].sum()) + len(suffix) + kernels.BLOCK, np.uint8)
    at_K, length_K = np.empty(k, np.int64), np.empty(k, np.int32)
    used = kernels.write_scores(
        *spans, decoded.columns, take, p_M3, category_M5, category_p_M5, shift_M, np.ascontiguousarray(cold),
        pieces, piece_at, texts.names, texts.name_at, suffix, suffix_at, out, at_K, length_K,
    )  # fmt: skip
    return Spans(out[:used], at_K, length_K)


def _pieces(texts: ScoreTexts, now_ms: int) -> list[bytes]:
    """kernels.PIECES."""
    return [
        b'{"schema":%d,"event_id":' % SCORE_SCHEMA,
        b',"user":',
        b',"platform":',
        b',"ts":',
        b',"scored_at":%d,"model":%b,"p":{"click":' % (now_ms, texts.model),
        b',"purchase":',
        b',"return":',
        b'},"churn":',
        b',"categories":[',
        b'],"interest_shift":',
        b',"cold":false,"degraded":' + texts.degraded,
        b',"cold":true,"degraded":' + texts.degraded,
        b"}",
    ]


@numba.njit(cache=True, nogil=True)
def _murmur2(keys_NL: np.ndarray, out_N: np.ndarray) -> None:
    """Kafka's murmur2 (seed 0x9747b28c) of each row of bytes."""
    length = keys_NL.shape[1]
    m = np.uint32(0x5BD1E995)
    tail = length & 3
    for i in range(keys_NL.shape[0]):
        h = np.uint32(np.uint32(0x9747B28C) ^ np.uint32(length))
        for j in range(0, length - tail, 4):
            k = np.uint32(
                np.uint32(keys_NL[i, j])
                | np.uint32(np.uint32(keys_NL[i, j + 1]) << np.uint32(8))
                | np.uint32(np.uint32(keys_NL[i, j + 2]) << np.uint32(16))
                | np.uint32(np.uint32(keys_NL[i, j + 3]) << np.uint32(24))
            )
            k = np.uint32(k * m)
            k = np.uint32(k ^ np.uint32(k >> np.uint32(24)))
            k = np.uint32(k * m)
            h = np.uint32(np.uint32(h * m) ^ k)
        if tail:
            for j in range(tail - 1, -1, -1):
                h = np.uint32(h ^ np.uint32(np.uint32(keys_NL[i, length - tail + j]) << np.uint32(8 * j)))
            h = np.uint32(h * m)
        h = np.uint32(h ^ np.uint32(h >> np.uint32(13)))
        h = np.uint32(h * m)
        out_N[i] = np.uint32(h ^ np.uint32(h >> np.uint32(15)))


def partitions_of(users: list[bytes], n_partitions: int) -> np.ndarray:
    """Partition (n,) of each pseudonym, as Kafka's default partitioner has it. All have PSEUDONYM_LENGTH bytes."""
    return partitions_of_rows(np.frombuffer(b"".join(users), np.uint8).reshape(len(users), PSEUDONYM_LENGTH), n_partitions)


def partitions_of_rows(users_N24: np.ndarray, n_partitions: int) -> np.ndarray:
    """`partitions_of`, of pseudonyms as rows of bytes, uint8 (n, 24)."""
    hashes = np.empty(len(users_N24), np.uint32)
    _murmur2(users_N24, hashes)
    return (hashes & np.uint32(0x7FFFFFFF)).astype(np.int64) % n_partitions


def warm() -> None:
    """Compiles into Numba's cache."""
    user = b"0" * PSEUDONYM_LENGTH
    partitions_of([user], 4)
    event = CanonicalEvent(event_id="1", platform="warm", user=user.decode(), kind="view", ts=1)
    decoded = decode_columns(Spans.of([user]), Spans.of([encode_json(event)]), np.zeros(1, np.int64))
    p, shift, top_p = np.zeros((1, 3), np.float32), np.zeros(1, np.float32), np.zeros((1, 5), np.float32)
    scores = (p, top_p.astype(np.int32), top_p, shift)
    take, cold, texts = np.arange(1), np.zeros(1, np.bool_), score_texts("warm", False, ["a"])
    encode_scores(decoded, take, scores, cold, texts, 1)
