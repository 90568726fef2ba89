"""User key → slot: an open-addressing hash table a partition, over the keys that lie with the rows.

    key ─ SipHash-1-3, seeded ─► 32-bit tag ─► entries[tag & mask], then the next, … until the key is found or a free entry

An entry holds the tag and the slot, so a table grows without looking at a key, and a key is compared only where its tag
agrees. The seed is drawn for each arena: whoever can choose keys cannot make them collide. Only keys of PSEUDONYM_LENGTH are
in the table; others, which ingest never makes, are in a dict beside it.

Knows keys and slots; not rows, and not who takes or frees a slot.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from models.events import PSEUDONYM_LENGTH

_FIRST_ENTRIES = 1024
_FREE, _DELETED = 0, 1
"""Lower half of an entry that holds none; else it is the slot + 2."""
_FULLEST = 0.7
"""Share of entries in use, deleted ones included, above which a table is made anew."""
ODD, OUTSIDE = -2, -3
"""In place of a slot: the key has another length, or its span lies outside the buffer."""


class Index:
    """The users of one partition."""

    def __init__(self) -> None:
        self.entries = np.zeros(_FIRST_ENTRIES, np.uint64)
        self.counts = np.zeros(2, np.int64)
        """Entries that are not free; keys."""
        self.odd: dict[bytes, int] = {}

    def __len__(self) -> int:
        return int(self.counts[1]) + len(self.odd)

    def make_room(self, n: int) -> None:
        """So that n keys more find a place."""
        used, live = self.counts.tolist()
        size = len(self.entries)
        if used + n <= _FULLEST * size:
            return
        # Not only just enough: what is deleted next would soon fill it again.
        while live + n > _FULLEST * size * 0.75:
            size *= 2
        grown = np.zeros(size, np.uint64)
        _reinsert(self.entries, grown)
        self.entries, self.counts[0] = grown, live


@njit(cache=True, nogil=True)
def _rotated(x, bits):
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@njit(cache=True, nogil=True)
def _sip_round(v0, v1, v2, v3):
    v0 += v1
    v1 = _rotated(v1, 13) ^ v0
    v0 = _rotated(v0, 32)
    v2 += v3
    v3 = _rotated(v3, 16) ^ v2
    v0 += v3
    v3 = _rotated(v3, 21) ^ v0
    v2 += v1
    v1 = _rotated(v1, 17) ^ v2
    v2 = _rotated(v2, 32)
    return v0, v1, v2, v3


@njit(cache=True, nogil=True)
def siphash13(seed, a, b, c):
    """SipHash-1-3 of the 24 bytes of three little-endian words under `seed` (2,) uint64."""
    v0 = seed[0] ^ np.uint64(0x736F6D6570736575)
    v1 = seed[1] ^ np.uint64(0x646F72616E646F6D)
    v2 = seed[0] ^ np.uint64(0x6C7967656E657261)
    v3 = seed[1] ^ np.uint64(0x7465646279746573)
    for word in (a, b, c, np.uint64(24 << 56)):
        v3 ^= word
        v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
        v0 ^= word
    v2 ^= np.uint64(0xFF)
    for _ in range(3):
        v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3


@njit(cache=True, nogil=True)
def _long_at(buffer, i):
    i = np.uint64(i)
    return (
        np.uint64(buffer[i])
        | np.uint64(buffer[i + np.uint64(1)]) << np.uint64(8)
        | np.uint64(buffer[i + np.uint64(2)]) << np.uint64(16)
        | np.uint64(buffer[i + np.uint64(3)]) << np.uint64(24)
        | np.uint64(buffer[i + np.uint64(4)]) << np.uint64(32)
        | np.uint64(buffer[i + np.uint64(5)]) << np.uint64(40)
        | np.uint64(buffer[i + np.uint64(6)]) << np.uint64(48)
        | np.uint64(buffer[i + np.uint64(7)]) << np.uint64(56)
    )


@njit(cache=True, nogil=True)
def _reinsert(entries, grown):
    mask = np.uint64(len(grown) - 1)
    for entry in entries:
        if (entry & np.uint64(0xFFFFFFFF)) > _DELETED:
            place = (entry >> np.uint64(32)) & mask
            while grown[place] != _FREE:
                place = (place + np.uint64(1)) & mask
            grown[place] = entry


@njit(cache=True, nogil=True)
def find(entries, seed, keys_C3, buffer, at, length, out):
    """out[i] = the slot of key i, −1 where it has none, ODD or OUTSIDE. → how many are none of ours: ODD or OUTSIDE."""
    strange = 0
    for i in range(len(at)):
        if length[i] != PSEUDONYM_LENGTH or at[i] < 0 or at[i] > len(buffer) - PSEUDONYM_LENGTH:
            out[i] = ODD if length[i] != PSEUDONYM_LENGTH else OUTSIDE
            strange += 1
            continue
        a, b, c = _long_at(buffer, at[i]), _long_at(buffer, at[i] + 8), _long_at(buffer, at[i] + 16)
        tag = siphash13(seed, a, b, c) & np.uint64(0xFFFFFFFF)
        out[i] = _look(entries, keys_C3, tag, a, b, c)[0]
    return strange


@njit(cache=True, nogil=True)
def _look(entries, keys_C3, tag, a, b, c):
    """→ slot or −1; the entry where it is, or where it would go."""
    mask = np.uint64(len(entries) - 1)
    place = tag & mask
    reusable = np.int64(-1)
    while True:
        entry = entries[place]
        low = np.int64(entry & np.uint64(0xFFFFFFFF))
        if low == _FREE:
            return np.int64(-1), np.int64(place) if reusable < 0 else reusable
        if low == _DELETED:
            if reusable < 0:
                reusable = np.int64(place)
        elif entry >> np.uint64(32) == tag:
            slot = low - 2
            if keys_C3[slot, 0] == a and keys_C3[slot, 1] == b and keys_C3[slot, 2] == c:
                return slot, np.int64(place)
        place = (place + np.uint64(1)) & mask


@njit(cache=True, nogil=True)
def find_or_add(entries, counts, seed, keys_C3, buffer, at, length, free, taken, added, out):
    """Like `find`, and a key that has none takes a slot, which is written to `added` (n,). → strange, how many are added.

    Slots come from free[: taken[1]], the last first, then from taken[0] upwards. There must be room for n more: of keys
    (`Index.make_room`) and of slots."""
    strange, n_added = 0, 0
    for i in range(len(at)):
        if length[i] != PSEUDONYM_LENGTH or at[i] < 0 or at[i] > len(buffer) - PSEUDONYM_LENGTH:
            out[i] = ODD if length[i] != PSEUDONYM_LENGTH else OUTSIDE
            strange += 1
            continue
        a, b, c = _long_at(buffer, at[i]), _long_at(buffer, at[i] + 8), _long_at(buffer, at[i] + 16)
        tag = siphash13(seed, a, b, c) & np.uint64(0xFFFFFFFF)
        slot, place = _look(entries, keys_C3, tag, a, b, c)
        if slot < 0:
            if taken[1] > 0:
                taken[1] -= 1
                slot = free[taken[1]]
            else:
                slot = taken[0]
                taken[0] += 1
            added[n_added] = slot
            n_added += 1
            keys_C3[slot, 0], keys_C3[slot, 1], keys_C3[slot, 2] = a, b, c
            counts[0] += entries[place] == _FREE
            counts[1] += 1
            entries[place] = (tag << np.uint64(32)) | np.uint64(slot + 2)
        out[i] = slot
    return strange, n_added


@njit(cache=True, nogil=True)
def remove(entries, counts, seed, keys_C3, slot):
    """Takes the key of a slot out of the table."""
    a, b, c = keys_C3[slot, 0], keys_C3[slot, 1], keys_C3[slot, 2]
    tag = siphash13(seed, a, b, c) & np.uint64(0xFFFFFFFF)
    found, place = _look(entries, keys_C3, tag, a, b, c)
    if found == slot:
        entries[place] = _DELETED
        counts[1] -= 1
