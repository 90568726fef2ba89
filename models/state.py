"""The row of user state: one fixed-size NumPy record a user, and how it crosses the changelog.

FIELDS below is the field table; `row_dtype` builds the record of a size. Rows hold hashes and numbers, never names or ids.
Knows nothing of Kafka or of the order of events: `models/fold.py` writes rows, `models/scorer.py` writes `h`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache

import numpy as np

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


def encode_row(row_bytes: bytes) -> bytes:
    """A row's bytes → the changelog's value: the bytes and their CRC-32, little endian."""
    return row_bytes + zlib.crc32(row_bytes).to_bytes(_CRC_BYTES, "little")


def decode_row(value: bytes, size: str = "cpu") -> bytes:
    """A changelog value → the row's bytes under the current ABI.

    Raises `CorruptRowError` for a wrong length or checksum, `StateABIError` for an ABI that cannot be migrated.
    """
    body, crc = value[:-_CRC_BYTES], value[-_CRC_BYTES:]
    dtype = row_dtype(size)
    if len(body) < dtype["abi"].itemsize:
        raise CorruptRowError(f"a changelog value of {len(value)} bytes is too short for a row")
    if zlib.crc32(body) != int.from_bytes(crc, "little"):
        raise CorruptRowError(f"a row of {len(body)} bytes fails its checksum")
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


MIGRATIONS: dict[int, Callable[[bytes, str], bytes]] = {}
"""Older ABI → function (body, size) → body under STATE_ABI. Empty while there has been one ABI only."""
