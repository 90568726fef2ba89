"""The row of user state: one fixed-size NumPy record a user, and how it crosses the changelog.

FIELDS below is the field table; `row_dtype` builds the record of a size. Rows hold hashes and numbers, never names or ids.
Knows nothing of Kafka or of the order of events: `models/fold.py` writes rows, `models/scorer.py` writes `h`.

A changelog value takes one of two forms, told apart by its first two bytes, both closed by the CRC-32 of what precedes:

    plain    row                                         crc     starts with the row's ABI
    packed   PACKED  bytes of the row  bitmap  words     crc     words: the row's 4-byte words that are not zero

Most of a row is zero while its user is new: empty places of the ring, counts of kinds never seen. Before the zeros are left
out, the upper halves of the times, which are mostly equal, are each XORed with the one before, so that they are zero too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from models.errors import CorruptRowError, StateABIError

STATE_ABI = 1
"""Raised whenever the meaning or the layout of a row changes; `decode_row` then migrates the older ones."""

N_KINDS = 7
N_HALFLIVES = 4
DECAY_S = (3600.0, 86400.0, 7 * 86400.0, 30 * 86400.0)
"""Time constants τ of the decayed counts: a count decays by exp(−Δt/τ)."""
MIX_LONG, MIX_SHORT = 8, 4
TAU_LONG_S, TAU_SHORT_S = 30 * 86400.0, 86400.0

SIZES: dict[str, tuple[int, int]] = {"cpu": (64, 16), "gpu": (256, 40)}
"""size → (hidden units of the student, events in the ring)."""

# (name, type, shape, meaning); H and K stand for the hidden units and the ring's length.
FIELDS: tuple[tuple[str, str, tuple, str], ...] = (
    ("abi", "<u2", (), "STATE_ABI; first under every ABI"),
    ("n_ring", "u1", (), "events in the ring"),
    ("size", "u1", (), "0 cpu, 1 gpu"),
    ("h_version", "<u4", (), "recurrence id of the model that `h` belongs to; 0 none"),
    ("applied_offset", "<i8", (), "offset in `events` of the last event seen for this user; -1 none"),
    ("first_ts", "<i8", (), "ms; of the first folded event"),
    ("last_ts", "<i8", (), "ms; greatest ts folded"),
    ("session_start_ts", "<i8", (), "ms; of the current session"),
    ("ring_ts", "<i8", ("K",), "ms; ring of the last K events, ascending by (ts, id); n_ring of them filled, from 0"),
    ("ring_id", "<u8", ("K",), "event_hash: also the window that duplicates are looked up in"),
    ("ring_item", "<u4", ("K",), "hash32(item)"),
    ("ring_category", "<u4", ("K",), "hash32(category)"),
    ("ring_platform", "<u2", ("K",), "platform_code"),
    ("ring_kind", "u1", ("K",), "kind code"),
    ("ring_price", "u1", ("K",), "price bucket"),
    ("visits", "<u4", (), "sessions begun"),
    ("n_events", "<u4", (), "events folded"),
    ("returns", "<u4", (), "gaps between sessions within the return horizon"),
    ("last_s_by_kind", "<u4", (N_KINDS,), "s since the epoch of the last event of each kind; 0 none"),
    ("gap_mean_s", "<f4", (), "exponentially weighted mean gap between sessions, weight 0.3"),
    ("gap_last_s", "<f4", (), "last gap between sessions"),
    ("basket_mean", "<f4", (), "exponentially weighted mean quantity of purchases, weight 0.2"),
    ("price_mean", "<f4", (), "exponentially weighted mean price bucket of priced events, weight 0.2"),
    ("counts", "<f4", (N_KINDS, N_HALFLIVES), "time-decayed counts by kind and time constant, as of last_ts"),
    ("mix_long_category", "<u4", (MIX_LONG,), "categories of the long-term mix (30 d); 0 empty"),
    ("mix_long_weight", "<f4", (MIX_LONG,), "their decayed weights, as of last_ts"),
    ("mix_short_category", "<u4", (MIX_SHORT,), "categories of the short-term mix (1 d); 0 empty"),
    ("mix_short_weight", "<f4", (MIX_SHORT,), "their decayed weights, as of last_ts"),
    ("h", "<f4", ("H",), "hidden state of the student's recurrence"),
    ("session_events", "<u2", (), "events in the current session, saturating"),
    ("session_purchases", "<u2", (), "… purchases"),
    ("session_carts", "<u2", (), "… adds to cart"),
    ("open_carts", "<u2", (), "items added to a cart and not bought since, at least 0"),
)

_CRC_BYTES = 4


@cache
def row_dtype(size: str = "cpu") -> np.dtype:
    """The record of a size. Packed without holes, every field at a multiple of its own size."""
    hidden, ring = SIZES[size]
    extent = {"H": hidden, "K": ring}
    dtype = np.dtype([(name, kind, tuple(extent.get(n, n) for n in shape)) for name, kind, shape, _ in FIELDS], align=False)
    return dtype


def empty_rows(n: int, size: str = "cpu") -> np.ndarray:
    """(n,) rows of users never seen: all zero but `applied_offset` −1, `abi` and `size`."""
    rows = np.zeros(n, row_dtype(size))
    rows["applied_offset"] = -1
    rows["abi"] = STATE_ABI
    rows["size"] = list(SIZES).index(size)
    return rows


PACKED = 0xFFFE
"""First two bytes of a packed value, where a plain one has its ABI: no ABI is ever that great. An ABI whose times lie in
other places takes another marker, and these places stay with this one."""
_MARKER_BYTES = 4
OK, NULL, OTHER = 0, 1, 2
"""What `decode_rows` says of a value. OTHER: it is for `decode_row` to migrate it, or to say what is wrong with it."""


def encode_row(row_bytes: bytes) -> bytes:
    """A row's bytes → the plain changelog value: the bytes and their CRC-32, little endian."""
    return row_bytes + zlib.crc32(row_bytes).to_bytes(_CRC_BYTES, "little")


def decode_row(value: bytes, size: str = "cpu") -> bytes:
    """A changelog value of either form → the row's bytes under the current ABI.

    Raises `CorruptRowError` for a wrong length or checksum, `StateABIError` for an ABI that cannot be migrated.
    """
    body, crc = value[:-_CRC_BYTES], value[-_CRC_BYTES:]
    dtype = row_dtype(size)
    if len(body) < dtype["abi"].itemsize:
        raise CorruptRowError(f"a changelog value of {len(value)} bytes is too short for a row")
    if zlib.crc32(body) != int.from_bytes(crc, "little"):
        raise CorruptRowError(f"a row of {len(body)} bytes fails its checksum")
    if int.from_bytes(body[:2], "little") == PACKED:
        body = _unpacked(body, size)
    abi = int.from_bytes(body[:2], "little")
    if abi in MIGRATIONS:
        body = MIGRATIONS[abi](body, size)
    elif abi != STATE_ABI:
        raise StateABIError(f"a row has state ABI {abi}; this version reads {sorted([*MIGRATIONS, STATE_ABI])}")
    if len(body) != dtype.itemsize:
        raise CorruptRowError(
            f"a row has {len(body)} bytes, size {size!r} needs {dtype.itemsize}; was the worker's size changed?"
        )
    return body


def _unpacked(packed: bytes, size: str) -> bytes:
    """A packed value without its checksum → the row's bytes. Raises `CorruptRowError` where the lengths contradict."""
    n_bytes = int.from_bytes(packed[2:_MARKER_BYTES], "little")
    n_words = n_bytes // 4
    words_at = _MARKER_BYTES + 4 * -(-n_words // 32)
    bits = np.unpackbits(np.frombuffer(packed[_MARKER_BYTES:words_at], np.uint8), bitorder="little")
    if n_bytes % 4 or len(packed) < words_at or bits[n_words:].any() or len(packed) - words_at != 4 * bits.sum(dtype=int):
        raise CorruptRowError(f"a packed row of {len(packed)} bytes contradicts itself")
    words = np.zeros(n_words, np.uint32)
    words[bits[:n_words].astype(bool)] = np.frombuffer(packed[words_at:], "<u4")
    if n_bytes == row_dtype(size).itemsize:
        chain = _times(size)
        words[chain] = np.bitwise_xor.accumulate(words[chain])
    return words.tobytes()


def encode_rows(rows: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows at `slots` (n,) int64 of `rows` (cap,) → their changelog values, each in its shorter form, in one new buffer.

    → buffer (B,) uint8, at (n,) int64, length (n,) int32: value i is `buffer[at[i] : at[i] + length[i]]`.
    Raises ValueError for a slot outside the rows.
    """
    size = _size_of(rows.dtype)
    n_words = rows.dtype.itemsize // 4
    out = np.empty(len(slots) * (n_words + 1), np.uint32)
    at, length = np.empty(len(slots), np.int64), np.empty(len(slots), np.int32)
    end = _encode_rows(rows.view(np.uint32).reshape(-1, n_words), slots, _times(size), _crc_tables(), out, at, length)
    if end < 0:
        raise ValueError("encode_rows: a slot lies outside the rows")
    return out[:end].view(np.uint8), at, length


def decode_rows(buffer: np.ndarray, at: np.ndarray, length: np.ndarray, size: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Changelog values, value i being `buffer[at[i] : at[i] + length[i]]` and null where its length is −1 → rows (n,) of
    `row_dtype(size)`, status (n,) uint8: OK, NULL or OTHER. Only rows that are OK hold anything.

    A value is OK when `decode_row` takes it without a migration; hostile ones cost themselves only.
    """
    rows = np.empty(len(at), row_dtype(size))
    status = np.empty(len(at), np.uint8)
    words = rows.view(np.uint32).reshape(len(at), rows.dtype.itemsize // 4)
    _decode_rows(buffer, at, length, _times(size), _crc_tables(), STATE_ABI, words, status)
    return rows, status


@cache
def _size_of(dtype: np.dtype) -> str:
    return next(size for size in SIZES if row_dtype(size) == dtype)


@cache
def _times(size: str) -> np.ndarray:
    """Words (m,) of a row that are mostly equal: the upper halves of its times, in the order of their XOR."""
    dtype = row_dtype(size)
    single = [dtype.fields[name][1] // 4 + 1 for name in ("last_ts", "first_ts", "session_start_ts")]
    ring = dtype.fields["ring_ts"][1] // 4 + 1 + 2 * np.arange(SIZES[size][1])
    return np.concatenate([single, ring]).astype(np.int64)


@cache
def _crc_tables() -> np.ndarray:
    """(8, 256) uint32: table k maps a byte to its effect on zlib's CRC-32 when k bytes follow it."""
    tables = np.zeros((8, 256), np.uint32)
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, np.uint32(0xEDB88320) ^ (crc >> 1), crc >> 1)
    tables[0] = crc
    for k in range(1, 8):
        tables[k] = (tables[k - 1] >> 8) ^ tables[0][tables[k - 1] & 0xFF]
    return tables


@njit(cache=True, nogil=True)
def _crc_word_pair(crc, low, high, tables):
    low ^= crc
    return (
        tables[7, low & np.uint32(0xFF)]
        ^ tables[6, (low >> np.uint32(8)) & np.uint32(0xFF)]
        ^ tables[5, (low >> np.uint32(16)) & np.uint32(0xFF)]
        ^ tables[4, low >> np.uint32(24)]
        ^ tables[3, high & np.uint32(0xFF)]
        ^ tables[2, (high >> np.uint32(8)) & np.uint32(0xFF)]
        ^ tables[1, (high >> np.uint32(16)) & np.uint32(0xFF)]
        ^ tables[0, high >> np.uint32(24)]
    )


@njit(cache=True, nogil=True)
def _crc_word(crc, word, tables):
    word ^= crc
    return (
        tables[3, word & np.uint32(0xFF)]
        ^ tables[2, (word >> np.uint32(8)) & np.uint32(0xFF)]
        ^ tables[1, (word >> np.uint32(16)) & np.uint32(0xFF)]
        ^ tables[0, word >> np.uint32(24)]
    )


@njit(cache=True, nogil=True)
def _crc_words(words, start, end, tables):
    """zlib's CRC-32 of words[start:end] as little-endian bytes."""
    crc = np.uint32(0xFFFFFFFF)
    i = start
    while i + 1 < end:
        crc = _crc_word_pair(crc, words[i], words[i + 1], tables)
        i += 2
    if i < end:
        crc = _crc_word(crc, words[i], tables)
    return crc ^ np.uint32(0xFFFFFFFF)


@njit(cache=True, nogil=True)
def _encode_rows(words_CW, slots, times, tables, out, at, length):
    """Values one after another in `out`, whose room is the sum of the plain ones. → words written; −1: a slot is outside."""
    n_words = words_CW.shape[1]
    n_masks = (n_words + 31) // 32
    for i in range(len(slots)):
        if not 0 <= slots[i] < len(words_CW):
            return -1
    row = np.zeros(n_masks * 32, np.uint32)
    end = 0
    for i in range(len(slots)):
        source = words_CW[slots[i]]
        for j in range(n_words):
            row[j] = source[j]
        for j in range(len(times) - 1, 0, -1):
            row[times[j]] ^= row[times[j - 1]]
        filled = 0
        for j in range(n_words):
            filled += row[j] != 0
        start = end
        if 1 + n_masks + filled < n_words:
            out[start] = np.uint32(PACKED | (4 * n_words) << 16)
            end = start + 1 + n_masks
            for block in range(n_masks):
                mask = np.uint32(0)
                for bit in range(32):
                    # Without a branch, which would be guessed wrong for half of the words.
                    word = row[block * 32 + bit]
                    used = np.uint32(word != 0)
                    mask |= used << np.uint32(bit)
                    out[end] = word
                    end += used
                out[start + 1 + block] = mask
        else:
            end = start + n_words
            for j in range(n_words):
                out[start + j] = source[j]
        out[end] = _crc_words(out, start, end, tables)
        end += 1
        at[i] = 4 * start
        length[i] = 4 * (end - start)
    return end


@njit(cache=True, nogil=True)
def _word_at(buffer, i):
    i = np.uint64(i)
    return (
        np.uint32(buffer[i])
        | np.uint32(buffer[i + np.uint64(1)]) << np.uint32(8)
        | np.uint32(buffer[i + np.uint64(2)]) << np.uint32(16)
        | np.uint32(buffer[i + np.uint64(3)]) << np.uint32(24)
    )


@njit(cache=True, nogil=True)
def _decode_rows(buffer, at, length, times, tables, abi, rows_NW, status):
    n_words = rows_NW.shape[1]
    value = np.empty(n_words + 1, np.uint32)
    for i in range(len(at)):
        n = np.int64(length[i])
        status[i] = NULL if n == -1 else OTHER
        # A value that is longer than a plain one, or no whole number of words, is none of ours.
        if n < 8 or n % 4 or n > 4 * (n_words + 1) or at[i] < 0 or at[i] > len(buffer) - n:
            continue
        n_value = n // 4 - 1
        for j in range(n_value + 1):
            value[j] = _word_at(buffer, at[i] + 4 * j)
        if _crc_words(value, 0, n_value, tables) != value[n_value]:
            continue
        row = rows_NW[i]
        if value[0] & np.uint32(0xFFFF) != PACKED:
            if n_value != n_words:
                continue
            for j in range(n_words):
                row[j] = value[j]
        elif not _unpack(value, n_value, times, row):
            continue
        if row[0] & np.uint32(0xFFFF) == abi:
            status[i] = OK


@njit(cache=True, nogil=True)
def _unpack(value, n_value, times, row):
    """value[:n_value], packed → row. False where the lengths contradict."""
    n_words = len(row)
    n_masks = (n_words + 31) // 32
    if value[0] >> np.uint32(16) != 4 * n_words or n_value < 1 + n_masks:
        return False
    if n_words % 32 and value[n_masks] >> np.uint32(n_words % 32) != 0:
        return False
    filled = 0
    for block in range(n_masks):
        filled += _bits(value[1 + block])
    if n_value != 1 + n_masks + filled:
        return False
    at = 1 + n_masks
    for block in range(n_masks):
        mask = value[1 + block]
        for j in range(32 * block, min(32 * block + 32, n_words)):
            # Without a branch; after the last word `at` is the checksum's place.
            used = mask & np.uint32(1)
            row[j] = value[at] * used
            at += used
            mask >>= np.uint32(1)
    for j in range(1, len(times)):
        row[times[j]] ^= row[times[j - 1]]
    return True


@njit(cache=True, nogil=True)
def _bits(mask):
    """How many bits are set."""
    mask = mask - ((mask >> np.uint32(1)) & np.uint32(0x55555555))
    mask = (mask & np.uint32(0x33333333)) + ((mask >> np.uint32(2)) & np.uint32(0x33333333))
    mask = (mask + (mask >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
    return np.int64(np.uint32(mask * np.uint32(0x01010101)) >> np.uint32(24))


MIGRATIONS: dict[int, Callable[[bytes, str], bytes]] = {}
"""Older ABI → function (body, size) → body under STATE_ABI. Empty while there has been one ABI only."""
