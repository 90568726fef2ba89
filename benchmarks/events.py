"""Canonical events by the million: what the benchmark of speed feeds to every system, written by a compiled kernel.

    draws (numpy) ─► kernel ─► Block: JSON of about 180 bytes an event, one after another, and the users' pseudonyms

Users are zipf(0.8) over `users`, or uniform. Knows no Kafka.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numba import njit

from models.events import PSEUDONYM_LENGTH

START_MS, STEP_MS = 1_750_000_000_000, 20
PLATFORMS = ("sim_bazaar", "sim_metro", "sim_grocer")
KINDS = ("view", "click", "cart", "purchase")
CATEGORIES = [f"department > aisle {c % 12} > shelf {c}" for c in range(60)]
_LONGEST = 320


class Block(NamedTuple):
    """n events. The i-th value is buffer[at[i] : at[i] + length[i]]."""

    keys: np.ndarray
    """uint8 (n, PSEUDONYM_LENGTH): the users."""
    buffer: np.ndarray
    """uint8 (B,)."""
    at: np.ndarray
    """int64 (n,)."""
    length: np.ndarray
    """int32 (n,)."""

    def values(self) -> list[bytes]:
        blob = self.buffer.tobytes()
        return [blob[a : a + n] for a, n in zip(self.at.tolist(), self.length.tolist(), strict=True)]


def blocks(
    n: int,
    seed: int,
    users: int,
    *,
    uniform: bool = False,
    size: int = 200_000,
    platforms: tuple[str, ...] = PLATFORMS,
    first_ms: int = START_MS,
) -> Iterator[Block]:
    """n events in blocks of at most `size`; the same arguments give the same events."""
    rng = np.random.default_rng(seed)
    weight = np.ones(users) if uniform else 1.0 / np.arange(1, users + 1) ** 0.8
    cumulative = np.cumsum(weight / weight.sum())
    for first in range(0, n, size):
        m = min(size, n - first)
        user = np.minimum(np.searchsorted(cumulative, rng.random(m)), users - 1)
        kind = rng.choice(len(KINDS), m, p=[0.6, 0.25, 0.1, 0.05])
        item, category = rng.integers(0, 20_000, m), rng.integers(0, len(CATEGORIES), m)
        cents = np.round(100 * rng.gamma(2.0, 20.0, m)).astype(np.int64)
        platform = rng.integers(0, len(platforms), m)
        yield _write(first, first_ms, seed, user, platforms, platform, kind, item, category, cents)


def _write(first, first_ms, seed, user, platforms, platform, kind, item, category, cents) -> Block:
    n = len(user)
    keys, buffer = np.empty((n, PSEUDONYM_LENGTH), np.uint8), np.empty(n * _LONGEST, np.uint8)
    at, length = np.empty(n, np.int64), np.empty(n, np.int32)
    used = _kernel(
        first, first_ms, seed, user, platform, kind, item, category, cents,
        *_joined(_LITERALS), *_joined(platforms), *_joined(KINDS), *_joined(CATEGORIES),
        keys, buffer, at, length,
    )  # fmt: skip
    return Block(keys, buffer[:used].copy(), at, length)


_LITERALS = (
    '{"event_id":"e',
    '","platform":"',
    '","user":"k1',
    '","kind":"',
    '","ts":',
    ',"item":"bz:b',
    '","category":"',
    '","price":',
    "}",
)


def _joined(texts) -> tuple[np.ndarray, np.ndarray]:
    """→ bytes one after another, offsets (len + 1,)."""
    parts = [text.encode() for text in texts]
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0, *map(len, parts)])


@njit(cache=True)
def _text(out, p, texts, offsets, k):
    for j in range(offsets[k], offsets[k + 1]):
        out[p] = texts[j]
        p += 1
    return p


@njit(cache=True)
def _digits(out, p, value, width):
    """`width` digits, zeros in front; 0: as many as there are."""
    if width == 0:
        width = 1
        rest = value // 10
        while rest > 0:
            width += 1
            rest //= 10
    for j in range(width):
        out[p + width - 1 - j] = 48 + value % 10
        value //= 10
    return p + width


@njit(cache=True)
def _kernel(
    first, first_ms, seed, user, platform, kind, item, category, cents,
    lit, lit_at, plat, plat_at, kinds, kinds_at, cats, cats_at, keys, out, at, length,
):  # fmt: skip
    p = 0
    for i in range(len(user)):
        at[i] = p
        p = _text(out, p, lit, lit_at, 0)
        p = _digits(out, p, seed, 0)
        out[p] = 45
        p = _digits(out, p + 1, first + i, 10)
        p = _text(out, p, lit, lit_at, 1)
        p = _text(out, p, plat, plat_at, platform[i])
        p = _text(out, p, lit, lit_at, 2)
        p = _digits(out, p, user[i], 22)
        for j in range(24):
            keys[i, j] = out[p - 24 + j]
        p = _text(out, p, lit, lit_at, 3)
        p = _text(out, p, kinds, kinds_at, kind[i])
        p = _text(out, p, lit, lit_at, 4)
        p = _digits(out, p, first_ms + (first + i) * STEP_MS, 0)
        p = _text(out, p, lit, lit_at, 5)
        p = _digits(out, p, item[i], 5)
        p = _text(out, p, lit, lit_at, 6)
        p = _text(out, p, cats, cats_at, category[i])
        p = _text(out, p, lit, lit_at, 7)
        p = _digits(out, p, cents[i] // 100, 0)
        out[p] = 46
        p = _digits(out, p + 1, cents[i] % 100, 2)
        if out[p - 1] == 48:
            p -= 1  # the shortest, as a JSON encoder writes it: 12.5, 12.0
        p = _text(out, p, lit, lit_at, 8)
        length[i] = p - at[i]
    return p
