"""User rows in one array, indexed by partition and user key; and the Faust store that puts a table on top of it.

    partition ─► {user key ─► slot} ─► rows[slot]   (one structured array over reserved addresses, paged in as it fills)

Rows are written by the fold and the scorer, in place; the store only finds them, remembers which are dirty, hands out
snapshots for the changelog and takes rows back from it. Knows nothing of events, models or offsets of sources.

An arena may be told to keep no more than so many rows in memory (`keep_cold`). Then clean rows that nobody has asked for
in a while move to the disk (`streams/cold.py`), and come back when their user does: a clock's hand goes round the slots,
takes a mark from each, and moves out those that have none. Who comes has none, who comes again while in memory has all.

Growing copies nothing: addresses for as many rows as the machine has memory for are reserved at the start, and the system
gives memory to what is written. So `Arena.rows` is one array for good, and only its first rows hold anything.
Legend: C slots, N keys or rows.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import structlog
from faust.stores import base
from faust.types import TP, EventT
from numba import njit

from models.errors import CorruptRowError, StateABIError, StateError
from models.events import PSEUDONYM_LENGTH
from models.state import NULL, OK, OTHER, SIZES, decode_row, decode_rows, empty_rows, encode_rows, row_dtype
from streams.cold import ColdRows, words_of
from streams.index import ODD, Index, find, find_or_add, remove
from streams.wire import Spans

log = structlog.get_logger("crosscurrent.state")

_FEWEST_SLOTS = 4096
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)
"""Addresses count as no promise of memory, so that a process with an arena can still start others. Python 3.11 lacks the
name."""
_AT_ONCE = 1024
"""Rows that move to the disk together, where the limit is much greater: some milliseconds."""
_ALL_MARKS, _FOUND = 3, 255
"""Rounds of the clock's hand for which a user who came again stays; a slot that it has just found."""
_FREE, _ODD, _PLAIN = 0, 1, 2
"""What a slot holds: nothing; a user whose key has another length; one whose key lies in `_keys_C3`."""


class Changes(NamedTuple):
    """Dirty rows of one partition, as changelog records: copies, so that the rows may go on changing."""

    keys: Spans
    values: Spans


class Arena:
    """Rows of user state by (partition, user key). Not for several threads at once."""

    def __init__(self, size: str = "cpu") -> None:
        self.size = size
        dtype = row_dtype(size)
        self.capacity, parts = _reserved(dtype.itemsize, PSEUDONYM_LENGTH, 4, 1, 1, 1)
        rows, keys, partitions, held, dirty, self._marks_C = parts
        self.rows = rows.view(dtype)
        """(C,): those of slots that no user has hold anything."""
        self._rows_C8 = rows.view(np.uint64).reshape(self.capacity, dtype.itemsize // 8)
        self._keys_C3 = keys.view(np.uint64).reshape(self.capacity, 3)
        self._partition_C, self._held_C, self._dirty_C = partitions.view(np.int32), held, dirty
        self._empty_8 = empty_rows(1, size).view(np.uint64)
        self._odd_keys: dict[int, bytes] = {}
        self._index: dict[int, Index] = {}
        self._seed = np.frombuffer(os.urandom(16), np.uint64)
        self._free = np.empty(1024, np.int64)
        self._taken = np.zeros(2, np.int64)
        """Slots ever taken; how many of `_free` are free again."""
        self.cold: ColdRows | None = None
        self._most = 0
        self._hand = 0
        self._look_again = 0
        """With as many rows in memory as this, where a look for idle ones found too few: most were dirty."""
        self._came_back: dict[int, list[np.ndarray]] = {}

    def keep_cold(self, cold: ColdRows, most: int) -> None:
        """From now on no more than `most` rows are in memory, and the others in `cold`; more only while so many are dirty.
        A call for more keys than that has them all in memory."""
        self.cold, self._most = cold, most
        no_slots, one = np.empty(0, np.int64), np.zeros(1, np.uint8)
        _idle(one, one, one, 1, 0, no_slots)  # compiled, or loaded from Numba's cache
        _remove(*_places(Index()), self._seed, self._keys_C3, no_slots)

    def __len__(self) -> int:
        """Users: in memory and on disk."""
        return self.n_hot + (len(self.cold) if self.cold is not None else 0)

    @property
    def n_hot(self) -> int:
        """Users whose rows are in memory."""
        return int(self._taken[0] - self._taken[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are in memory, without keys and index."""
        return int(self._taken[0]) * self.rows.dtype.itemsize

    @property
    def n_slots(self) -> int:
        """All slots that hold a user, or held one, are below."""
        return int(self._taken[0])

    def copies(self, partition: int, first: int, last: int) -> tuple[Spans, np.ndarray]:
        """Keys and rows (n,) of a partition's users in the slots from `first` to before `last`."""
        return self.copies_at(partition, np.arange(first, min(last, self.n_slots)))

    def copies_at(self, partition: int, slots: np.ndarray) -> tuple[Spans, np.ndarray]:
        """Keys and rows of those of `slots` that a user of the partition has."""
        slots = slots[(self._partition_C[slots] == partition) & (self._held_C[slots] != _FREE)]
        return self._keys_at(slots), self.rows[slots]

    @contextmanager
    def watched(self, partition: int) -> Iterator[list[np.ndarray]]:
        """Inside, the slots to which rows of a partition come back from the disk are appended to the list. For one at a
        time."""
        self._came_back[partition] = slots = []
        try:
            yield slots
        finally:
            del self._came_back[partition]

    def held(self, partition: int) -> object | None:
        """A token that stays the same as long as the partition's users are here; None where none are."""
        return self._index.get(partition)

    def partitions(self) -> list[int]:
        """Those that have had a user."""
        return list(self._index)

    def slots(self, partition: int, keys: Sequence[bytes] | Spans) -> np.ndarray:
        """Slots (n,) int64 of `keys`, good until the next call; users never seen get an empty row. Raises ValueError for a
        null key; what `ColdRows.put` and `take` raise, where rows are kept on disk."""
        spans = keys.read_only() if isinstance(keys, Spans) else Spans.of(keys)
        n = len(spans.at)
        if self.cold is not None:
            self._move_idle_out(n)
        index = self._index.get(partition)
        if index is None:
            index = self._index[partition] = Index()
        index.make_room(n)
        self._make_room(n)
        out, added = np.empty(n, np.int64), np.empty(n, np.int64)
        strange, n_added = find_or_add(
            index.entries, index.counts, self._seed, self._keys_C3, *spans, self._free, self._taken, added, out
        )
        self._begin(partition, added[:n_added], _PLAIN)
        if self.cold is not None:
            self._bring_back(partition, added[:n_added])
        if strange:
            for i in np.flatnonzero(out < 0).tolist():
                out[i] = self._odd_slot(partition, index, _odd_key(spans, i, out[i]))
        if self.cold is not None:
            self._marks_C[out] = _ALL_MARKS
            self._marks_C[added[:n_added]] = 0
        return out

    def row(self, partition: int, key: bytes) -> np.void | None:
        """A copy of a user's row, wherever it is; None for a user never seen."""
        slot = self.find(partition, key)
        if slot >= 0:
            return self.rows[slot].copy()
        return self.cold.peek(partition, key, self.size) if self.cold is not None else None

    def find(self, partition: int, key: bytes) -> int:
        """Slot of a key whose row is in memory, or -1."""
        index = self._index.get(partition)
        if index is None:
            return -1
        out = np.empty(1, np.int64)
        find(index.entries, self._seed, self._keys_C3, *Spans.of([key]), out)
        return index.odd.get(key, -1) if out[0] == ODD else int(out[0])

    def key(self, slot: int) -> bytes:
        """The key of the user whose slot it is."""
        return self._odd_keys[slot] if self._held_C[slot] == _ODD else self._keys_C3[slot].tobytes()

    def items(self) -> Iterator[tuple[int, bytes, int]]:
        """(partition, key, slot) of every row in memory."""
        for slot in np.flatnonzero(self._held_C[: self._taken[0]]).tolist():
            yield int(self._partition_C[slot]), self.key(slot), slot

    def users(self) -> Iterator[tuple[int, bytes]]:
        """(partition, key) of every row, wherever it is."""
        for partition, key, _ in self.items():
            yield partition, key
        if self.cold is not None:
            for partition in self._index:
                for keys, _ in self.cold.chunks(partition):
                    yield from ((partition, key) for key in keys.tolist())

    def mark_dirty(self, slots: np.ndarray) -> None:
        """These rows changed since the last snapshot."""
        self._dirty_C[slots] = 1

    def take_dirty(self, partitions: Iterable[int] | None = None) -> dict[int, Changes]:
        """Copies of the dirty rows by partition (of all, unless told of which); they are clean from now on."""
        out = {}
        self._look_again = 0
        found = np.empty(int(np.count_nonzero(self._dirty_C[: self._taken[0]])), np.int64)
        for partition in self._index if partitions is None else partitions:
            slots = found[: _take_dirty(self._dirty_C, self._partition_C, self._taken[0], partition, found)]
            if len(slots):
                out[partition] = Changes(self._keys_at(slots), Spans(*encode_rows(self.rows, slots)))
        return out

    def restore(self, partition: int, keys: Spans, rows: np.ndarray) -> None:
        """Rows (n,) from the changelog, in its order: the one with the greatest applied offset stays. Where a stale one
        follows a newer one (a zombie wrote it) the newer one is dirty again, so that the next commit writes it after the
        stale one."""
        offset_at = self.rows.dtype.fields["applied_offset"][1] // 8
        rows_N8 = rows.view(np.uint64).reshape(len(rows), self._rows_C8.shape[1])
        at_once = self._most or len(rows) or 1
        for first in range(0, len(rows), at_once):
            some = slice(first, first + at_once)
            _restore(self._rows_C8, self.slots(partition, keys.take(some)), rows_N8[some], offset_at, self._dirty_C)

    def forget(self, partition: int, key: bytes) -> None:
        """Drops one user, and what the row held."""
        slot = self.find(partition, key)
        if slot < 0:
            if self.cold is not None:
                self.cold.forget(partition, key)
            return
        index = self._index[partition]
        if self._held_C[slot] == _ODD:
            del index.odd[self._odd_keys.pop(slot)]
        else:
            remove(index.entries, index.counts, self._seed, self._keys_C3, slot)
        self._rows_C8[slot] = self._keys_C3[slot] = 0
        self._release(np.array([slot]))

    def drop_partition(self, partition: int) -> None:
        """Drops every row of a partition that is no longer ours."""
        index = self._index.pop(partition, None)
        if index is None:
            return
        used = slice(0, self._taken[0])
        slots = np.flatnonzero((self._partition_C[used] == partition) & (self._held_C[used] != _FREE))
        for slot in index.odd.values():
            del self._odd_keys[slot]
        self._release(slots)
        if self.cold is not None:
            self.cold.drop(partition)

    # -- rows on disk

    def _move_idle_out(self, n: int) -> None:
        """So that `n` users more find a place, as far as rows are not dirty."""
        over = self.n_hot + n - self._most
        if over <= 0 or self.n_hot < self._look_again:
            return
        slots = np.empty(min(max(over, self._most // 8), n + _AT_ONCE), np.int64)
        found, self._hand = _idle(self._marks_C, self._dirty_C, self._held_C, self.n_slots, self._hand, slots)
        if found:
            self._move_out(slots[:found])
        self._look_again = self.n_hot + self._most // 8 + 1 if found < min(over, len(slots)) else 0

    def _move_out(self, slots: np.ndarray) -> None:
        slots = slots[np.argsort(self._partition_C[slots], kind="stable")]
        of = self._partition_C[slots]
        values = Spans(*encode_rows(self.rows, slots))
        parts = []
        for partition in np.unique(of).tolist():
            which = slice(*np.searchsorted(of, [partition, partition + 1]))
            theirs = slots[which]
            parts.append((partition, self._keys_at(theirs), values.take(which), self._keys_C3[theirs]))
        self.cold.put(parts)
        odd = self._held_C[slots] == _ODD
        for slot, partition in zip(slots[odd].tolist(), of[odd].tolist(), strict=True):
            del self._index[partition].odd[self._odd_keys.pop(slot)]
        for partition in np.unique(of[~odd]).tolist():
            _remove(*_places(self._index[partition]), self._seed, self._keys_C3, slots[~odd & (of == partition)])
        self._release(slots)

    def _bring_back(self, partition: int, slots: np.ndarray) -> None:
        """Those of the slots, which have just begun, whose users are on disk get their rows."""
        slots = slots[self.cold.which(partition, self._keys_C3, slots)]
        if not len(slots):
            return
        self.rows[slots] = self.cold.take(partition, self._keys_at(slots), self._keys_C3[slots], self.size)
        if partition in self._came_back:
            self._came_back[partition].append(slots)

    def _odd_slot(self, partition: int, index: Index, key: bytes) -> int:
        slot = index.odd.get(key)
        if slot is None:
            if self._taken[1]:
                self._taken[1] -= 1
                slot = int(self._free[self._taken[1]])
            else:
                slot = int(self._taken[0])
                self._taken[0] += 1
            index.odd[key] = slot
            self._odd_keys[slot] = key
            self._begin(partition, np.array([slot]), _ODD)
            if self.cold is not None:
                self._keys_C3[slot] = words_of(key)
                self._bring_back(partition, np.array([slot]))
        return slot

    def _begin(self, partition: int, slots: np.ndarray, held: int) -> None:
        _begin(self._rows_C8, slots, self._empty_8, self._partition_C, partition, self._held_C, held)

    def _make_room(self, n: int) -> None:
        if self._taken[0] + n > self.capacity + self._taken[1]:
            raise MemoryError(
                f"{self.n_hot} rows of user state are all that this machine's memory is reserved for: give the worker more "
                "memory (or a greater limit of addresses, ulimit -v), start another worker to share the partitions, or set "
                "worker.hot_users to keep idle rows on disk"
            )

    def _release(self, slots: np.ndarray) -> None:
        self._held_C[slots] = _FREE
        self._dirty_C[slots] = 0
        first = int(self._taken[1])
        if first + len(slots) > len(self._free):
            grown = np.empty(2 * (first + len(slots)), np.int64)
            grown[:first] = self._free[:first]
            self._free = grown
        self._free[first : first + len(slots)] = slots
        self._taken[1] += len(slots)

    def _keys_at(self, slots: np.ndarray) -> Spans:
        if self._odd_keys and (self._held_C[slots] == _ODD).any():
            return Spans.of([self.key(slot) for slot in slots.tolist()])
        at = np.arange(len(slots), dtype=np.int64) * PSEUDONYM_LENGTH
        return Spans(self._keys_C3[slots].view(np.uint8).ravel(), at, np.full(len(slots), PSEUDONYM_LENGTH, np.int32))


def warm() -> None:
    """Compiles all of it for every size of row, or loads it from Numba's cache."""
    for size in SIZES:
        arena, keys = Arena(size), [b"0" * PSEUDONYM_LENGTH]
        arena.mark_dirty(arena.slots(0, keys))
        (changed,) = arena.take_dirty().values()
        rows, _ = decode_rows(*changed.values.read_only(), size)
        arena.restore(0, changed.keys, rows)
        arena.forget(0, keys[0])
        arena.slots(0, [b"%024d" % i for i in range(1000)])


def _reserved(*item_bytes: int) -> tuple[int, list[np.ndarray]]:
    """→ capacity C, and for each size of item, the row's first, a zeroed array of (C · size,) uint8 that takes no
    memory before it is written. C is what the machine's memory could hold, less where addresses are limited."""
    capacity = max(_FEWEST_SLOTS, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sum(item_bytes)) // 8 * 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    while True:
        try:
            blocks = [mmap.mmap(-1, capacity * n, flags=flags) for n in item_bytes]
            _want_great_pages(blocks[0])
            return capacity, [np.frombuffer(block, np.uint8) for block in blocks]
        except (OSError, ValueError):
            if capacity <= _FEWEST_SLOTS:
                raise
            capacity = max(_FEWEST_SLOTS, capacity // 16 * 8)


def _want_great_pages(rows: mmap.mmap) -> None:
    """Of 2 MiB, where the system has them: a row is looked for anywhere in a gigabyte, and with pages of 4 KiB nearly every
    look has to find the page first (a tenth of the fold's time, at 24,000 users). Small columns would only grow by them."""
    if advice := getattr(mmap, "MADV_HUGEPAGE", None):
        with contextlib.suppress(OSError):  # a kernel without them
            rows.madvise(advice)


def _places(index: Index) -> tuple[np.ndarray, np.ndarray]:
    return index.entries, index.counts


def _odd_key(spans: Spans, i: int, why: int) -> bytes:
    key = spans.get(i) if why == ODD and spans.at[i] >= 0 else None
    if key is None or len(key) != spans.length[i]:
        raise ValueError("a user key is null or lies outside its buffer: only events with a key may reach the state")
    return key


@njit(cache=True, nogil=True)
def _begin(rows_C8, slots, empty_8, partition_C, partition, held_C, held):
    for slot in slots:
        for j in range(len(empty_8)):
            rows_C8[slot, j] = empty_8[j]
        partition_C[slot] = partition
        held_C[slot] = held


@njit(cache=True, nogil=True)
def _idle(marks_C, dirty_C, held_C, n_slots, hand, out):
    """From `hand` on until `out` is full, and round no more often than it takes to see every clean slot without a mark:
    those → out, each once; the others lose one. → how many, the hand."""
    n = 0
    for _ in range((_ALL_MARKS + 1) * n_slots):
        if n == len(out):
            break
        if hand >= n_slots:
            hand = 0
        if held_C[hand] != _FREE and dirty_C[hand] == 0 and marks_C[hand] != _FOUND:
            if marks_C[hand] == 0:
                out[n] = hand
                n += 1
                marks_C[hand] = _FOUND
            else:
                marks_C[hand] -= 1
        hand += 1
    return n, hand


@njit(cache=True, nogil=True)
def _remove(entries, counts, seed, keys_C3, slots):
    for slot in slots:
        remove(entries, counts, seed, keys_C3, slot)


@njit(cache=True, nogil=True)
def _take_dirty(dirty_C, partition_C, n_slots, partition, out):
    """Dirty slots of one partition → out, ascending; they are clean then. → how many."""
    n = 0
    eights = dirty_C[: len(dirty_C) // 8 * 8].view(np.uint64)
    for block in range((n_slots + 7) // 8):
        if eights[block] == 0:
            continue
        for slot in range(8 * block, min(8 * block + 8, n_slots)):
            if dirty_C[slot] and partition_C[slot] == partition:
                dirty_C[slot] = 0
                out[n] = slot
                n += 1
    return n


@njit(cache=True, nogil=True)
def _restore(rows_C8, slots, rows_N8, offset_at, dirty_C):
    for i in range(len(slots)):
        slot = slots[i]
        if np.int64(rows_N8[i, offset_at]) >= np.int64(rows_C8[slot, offset_at]):
            rows_C8[slot] = rows_N8[i]
        else:
            dirty_C[slot] = 1


class ArenaStore(base.Store):
    """Faust's view of the arena. Table URL: `arena://cpu` or `arena://gpu`.

    Rows are changed through the arena and reach the changelog by `streams.commit.Committer`, once a touched user a
    commit; writing through `table[key] = …` is refused. Recovery arrives as whole changelog batches.
    """

    on_corrupt_row = "crash"
    """`crash` or `skip`; set by the app."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arena = Arena(self.url.host or "cpu")
        self.recovered_rows = 0
        self.skipped_rows = 0
        self.failure: Exception | None = None
        self.on_failure: Callable[[Exception], None] = lambda error: None
        self.standbys: set[int] = set()
        """Partitions that another worker writes: we only follow their changelog, to take over at once."""
        self.load_snapshot: Callable[[int], Awaitable[tuple[int, int] | None]] | None = None
        """Called for a partition that comes to us and of which we have nothing: restores it from this machine if it can, and
        says up to which changelog record: offset, Kafka time (ms). Set by the app."""
        self._persisted: dict[TP, int] = {}
        self._times_ms: dict[TP, int] = {}
        self._rows_before = 0

    # -- recovery

    def apply_changelog_batch(self, batch: Iterable[EventT], to_key: Any = None, to_value: Any = None) -> None:
        """Takes rows back from the changelog. Faust swallows what is raised here and would then wait for ever, so the
        first failure is told to `on_failure`, which does not return, and kept: nothing more is applied."""
        for event in batch:
            message = event.message
            if self.failure is None:
                try:
                    self._restore(message.tp, *_columns(message.value))
                except Exception as error:
                    self.failure = error
                if self.failure is not None:
                    self.on_failure(self.failure)
            self.written(message.tp, message.offset, round(message.timestamp * 1000))

    def _restore(self, tp: TP, keys: Spans, values: Spans, offsets: Sequence[int]) -> None:
        """Records of one partition in their order: stretches of rows at once, and the tombstones between them."""
        rows, status = decode_rows(*values.read_only(), self.arena.size)
        status[keys.length < 0] = OTHER
        for i in np.flatnonzero(status == OTHER).tolist():
            if not self._take_other(tp, keys, values, offsets, i, rows, status):
                rows, status = rows[:i], status[:i]
                break
        first = 0
        for tombstone in [*np.flatnonzero(status == NULL).tolist(), len(status)]:
            good = first + np.flatnonzero(status[first:tombstone] == OK)
            if len(good):
                whole = len(good) == len(rows)
                self.arena.restore(tp.partition, keys if whole else keys.take(good), rows if whole else rows[good])
                self.recovered_rows += len(good)
            if tombstone < len(status):
                self.arena.forget(tp.partition, keys.get(tombstone))
            first = tombstone + 1

    def _take_other(
        self, tp: TP, keys: Spans, values: Spans, offsets: Sequence[int], i: int, rows: np.ndarray, status: np.ndarray
    ) -> bool:
        """A value that is no row of ours as it stands: migrated to rows[i], or skipped, or False with `failure` set."""
        key, value = keys.get(i), values.get(i)
        try:
            if key is None:
                raise CorruptRowError("a row has no user key")
            rows[i] = np.frombuffer(decode_row(value, self.arena.size), rows.dtype)[0]
        except (CorruptRowError, StateABIError) as error:
            where = f"{tp.topic}[{tp.partition}] offset {offsets[i]}"
            if isinstance(error, StateABIError) or self.on_corrupt_row == "crash":
                self.failure = StateError(
                    f"{where}: {error}. The state is not used. Start the version that wrote it, or set "
                    "worker.on_corrupt_row=skip to lose the corrupt rows' users' state (they start afresh)"
                )
                return False
            self.skipped_rows += 1
            log.error("state.row_skipped", where=where, reason=str(error))
        else:
            status[i] = OK
        return True

    def take_dirty(self, partitions: Iterable[int]) -> dict[int, Changes]:
        """`Arena.take_dirty` of those of the partitions that are ours to write."""
        return self.arena.take_dirty([p for p in partitions if p not in self.standbys])

    def persisted_offset(self, tp: TP) -> int | None:
        """Changelog offset up to which the arena holds this partition: recovery starts after it."""
        return self._persisted.get(tp)

    def set_persisted_offset(self, tp: TP, offset: int) -> None:
        self._persisted[tp] = offset

    def written(self, tp: TP, offset: int, time_ms: int) -> None:
        """The changelog holds what the arena had at some time, up to this record of this Kafka time."""
        self._persisted[tp], self._times_ms[tp] = offset, time_ms

    def place(self, tp: TP) -> tuple[int, int] | None:
        """Offset and Kafka time (ms) of the last changelog record that the arena includes."""
        return (self._persisted[tp], self._times_ms[tp]) if tp in self._times_ms else None

    async def on_rebalance(
        self, assigned: set[TP], revoked: set[TP], newly_assigned: set[TP], generation_id: int = 0
    ) -> None:
        """Forgets the partitions that another worker owns now and that we do not stand by for."""
        changelog = self.table.changelog_topic.get_topic_name()
        self._rows_before = self.recovered_rows
        for tp in [tp for tp in self._persisted if tp not in assigned]:
            del self._persisted[tp]
            self._times_ms.pop(tp, None)
        mine = {tp.partition for tp in assigned if tp.topic == changelog}
        for partition in [p for p in self.arena.partitions() if p not in mine]:
            self.arena.drop_partition(partition)
        before = self.standbys
        self.standbys = {tp.partition for tp in self.app.assignor.assigned_standbys() if tp.topic == changelog}
        if promoted := sorted((before & mine) - self.standbys):
            log.info(
                "state.taken_over", partitions=promoted, offsets=[self._persisted.get(TP(changelog, p)) for p in promoted]
            )
        for tp in sorted(tp for tp in assigned if tp.topic == changelog and tp not in self._persisted):
            if self.load_snapshot is not None and (place := await self.load_snapshot(tp.partition)):
                self.written(tp, *place)

    async def on_recovery_completed(self, active_tps: set[TP], standby_tps: set[TP]) -> None:
        """Says what it took: rows read since the rebalance began, standbys' included."""
        read = self.recovered_rows - self._rows_before
        log.info("state.recovered", rows_read=read, rows=len(self.arena), standbys=sorted(self.standbys))

    async def backup_partition(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the changelog is the backup of an arena store")

    def restore_backup(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the changelog is the backup of an arena store")

    def reset_state(self) -> None:
        for partition in self.arena.partitions():
            self.arena.drop_partition(partition)
        self._persisted.clear()
        self._times_ms.clear()

    # -- the mapping that Faust's Table shows

    def __getitem__(self, key: bytes) -> np.void:
        for partition in self.arena.partitions():
            if (row := self.arena.row(partition, key)) is not None:
                return row
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and any(self.arena.row(p, key) is not None for p in self.arena.partitions())

    def __iter__(self) -> Iterator[bytes]:
        return (key for _, key in self.arena.users())

    def __len__(self) -> int:
        return len(self.arena)

    def __setitem__(self, key: bytes, value: Any) -> None:
        raise TypeError("user state is written by the fold, not through table[key] = value")

    def __delitem__(self, key: bytes) -> None:
        raise TypeError("user state is dropped by a tombstone in the changelog, not through del table[key]")

    def clear(self) -> None:
        raise TypeError("user state is not cleared while a worker runs")


def _columns(records: Any) -> tuple[Spans, Spans, Sequence[int]]:
    """Keys, values and offsets of fetched records: columns as they are, or a list of records."""
    if not isinstance(records, list):
        return records.keys, records.values, records.offset
    return (
        Spans.of([record.key for record in records]),
        Spans.of([record.value for record in records]),
        [record.offset for record in records],
    )
