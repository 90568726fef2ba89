"""Bytes ⇄ columns, a batch at a time: canonical events in, score records out, and the partition of a key.

Knows the formats; not Kafka, rows or models.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec
import numba
import numpy as np
import xxhash

from models.errors import EventRefused
from models.events import (
    EVENT,
    KIND_CODE,
    PSEUDONYM_LENGTH,
    CanonicalEvent,
    event_hashes,
    platform_code,
    price_bucket,
)

_decode = msgspec.json.Decoder(CanonicalEvent).decode
encode_json = msgspec.json.Encoder().encode
_code = lru_cache(maxsize=4096)(platform_code)

MAX_QUANTITY = 1e9


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
            refused.append((record, error))
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
    keys = np.frombuffer(b"".join(users), np.uint8).reshape(len(users), PSEUDONYM_LENGTH)
    hashes = np.empty(len(users), np.uint32)
    _murmur2(keys, hashes)
    return (hashes & np.uint32(0x7FFFFFFF)).astype(np.int64) % n_partitions


def warm() -> None:
    """Compiles into Numba's cache."""
    partitions_of([b"0" * PSEUDONYM_LENGTH], 4)
