"""User rows in one array, indexed by partition and user key; and the Faust store that puts a table on top of it.

    partition ─► {user key ─► slot} ─► rows[slot]   (one structured array, doubled when full)

Rows are written by the fold and the scorer, in place; the store only finds them, remembers which are dirty, hands out
snapshots for the changelog and takes rows back from it. Knows nothing of events, models or offsets of sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import structlog
from faust.stores import base
from faust.types import TP, EventT

from models.errors import CorruptRowError, StateABIError, StateError
from models.state import decode_row, empty_rows, row_dtype

log = structlog.get_logger("crosscurrent.state")

_FIRST_CAPACITY = 4096


class Arena:
    """Rows of user state by (partition, user key)."""

    def __init__(self, size: str = "cpu") -> None:
        self.size = size
        self.rows = empty_rows(_FIRST_CAPACITY, size)
        self._empty = empty_rows(1, size)[0]
        self._keys: list[bytes] = []
        self._partition = np.full(_FIRST_CAPACITY, -1, np.int32)
        self._dirty = np.zeros(_FIRST_CAPACITY, np.bool_)
        self._index: dict[int, dict[bytes, int]] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._keys) - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, without keys and index."""
        return self.rows.nbytes

    def slots(self, partition: int, keys: list[bytes]) -> np.ndarray:
        """Slots (n,) int64 of `keys`; users never seen get an empty row."""
        index = self._index.setdefault(partition, {})
        find = index.get
        found = [find(key, -1) for key in keys]
        if -1 in found:
            for i, slot in enumerate(found):
                if slot < 0:
                    key = keys[i]
                    slot = find(key, -1)
                    found[i] = slot if slot >= 0 else self._add(partition, index, key)
        return np.array(found, np.int64)

    def find(self, partition: int, key: bytes) -> int:
        """Slot of a key, or -1."""
        return self._index.get(partition, {}).get(key, -1)

    def items(self) -> Iterator[tuple[int, bytes, int]]:
        """(partition, key, slot) of every row."""
        for partition, index in self._index.items():
            for key, slot in index.items():
                yield partition, key, slot

    def mark_dirty(self, slots: np.ndarray) -> None:
        """These rows changed since the last snapshot."""
        self._dirty[slots] = True

    def take_dirty(self) -> dict[int, tuple[list[bytes], np.ndarray]]:
        """Copies of the dirty rows by partition, as (keys, rows (n,)); they are clean from now on."""
        slots = np.flatnonzero(self._dirty[: len(self._keys)])
        self._dirty[slots] = False
        partitions = self._partition[slots]
        out = {}
        for partition in np.unique(partitions).tolist():
            of = slots[partitions == partition]
            out[partition] = ([self._keys[slot] for slot in of.tolist()], self.rows[of])
        return out

    def restore(self, partition: int, key: bytes, body: bytes) -> None:
        """A row from the changelog: the one with the greatest applied offset stays. Where a stale one follows a newer
        one (a zombie wrote it) the newer one is dirty again, so that the next commit writes it after the stale one."""
        row = np.frombuffer(body, row_dtype(self.size))[0]
        slot = int(self.slots(partition, [key])[0])
        if row["applied_offset"] >= self.rows[slot]["applied_offset"]:
            self.rows[slot] = row
        else:
            self._dirty[slot] = True

    def forget(self, partition: int, key: bytes) -> None:
        """Drops one user."""
        slot = self._index.get(partition, {}).pop(key, None)
        if slot is not None:
            self._release([slot])

    def drop_partition(self, partition: int) -> None:
        """Drops every row of a partition that is no longer ours."""
        self._release(list(self._index.pop(partition, {}).values()))

    def _add(self, partition: int, index: dict[bytes, int], key: bytes) -> int:
        if self._free:
            slot = self._free.pop()
            self._keys[slot] = key
        else:
            slot = len(self._keys)
            self._keys.append(key)
            if slot >= len(self.rows):
                self._grow()
        index[key] = slot
        self._partition[slot] = partition
        return slot

    def _grow(self) -> None:
        n = len(self.rows)
        self.rows = np.concatenate([self.rows, empty_rows(n, self.size)])
        self._partition = np.concatenate([self._partition, np.full(n, -1, np.int32)])
        self._dirty = np.concatenate([self._dirty, np.zeros(n, np.bool_)])

    def _release(self, slots: list[int]) -> None:
        self.rows[slots] = self._empty
        self._partition[slots] = -1
        self._dirty[slots] = False
        self._free.extend(slots)
        for slot in slots:
            self._keys[slot] = b""


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
        self.failure: StateError | None = None
        self._persisted: dict[TP, int] = {}

    # -- recovery

    def apply_changelog_batch(self, batch: Iterable[EventT], to_key: Any = None, to_value: Any = None) -> None:
        """Takes rows back from the changelog. Faust swallows what is raised here and would then wait for ever, so the
        first failure is kept in `failure` for the app to crash on, and nothing more is applied."""
        for event in batch:
            message = event.message
            for record in message.value:
                if self.failure is None:
                    self._restore(message.tp, record)
            self._persisted[message.tp] = message.offset

    def _restore(self, tp: TP, record: Any) -> None:
        if record.value is None:
            self.arena.forget(tp.partition, record.key)
            return
        try:
            body = decode_row(record.value, self.arena.size)
        except (CorruptRowError, StateABIError) as error:
            where = f"{tp.topic}[{tp.partition}] offset {record.offset}"
            if isinstance(error, StateABIError) or self.on_corrupt_row == "crash":
                self.failure = StateError(
                    f"{where}: {error}. The state is not used. Start the version that wrote it, or set "
                    "worker.on_corrupt_row=skip to lose the corrupt rows' users' state (they start afresh)"
                )
            else:
                self.skipped_rows += 1
                log.error("state.row_skipped", where=where, reason=str(error))
            return
        self.arena.restore(tp.partition, record.key, body)
        self.recovered_rows += 1

    def persisted_offset(self, tp: TP) -> int | None:
        """Changelog offset up to which the arena holds this partition: recovery starts after it."""
        return self._persisted.get(tp)

    def set_persisted_offset(self, tp: TP, offset: int) -> None:
        self._persisted[tp] = offset

    async def on_rebalance(
        self, assigned: set[TP], revoked: set[TP], newly_assigned: set[TP], generation_id: int = 0
    ) -> None:
        """Forgets the partitions that another worker owns now."""
        changelog = self.table.changelog_topic.get_topic_name()
        for tp in [tp for tp in self._persisted if tp not in assigned]:
            del self._persisted[tp]
        mine = {tp.partition for tp in assigned if tp.topic == changelog}
        for partition in [p for p in self.arena._index if p not in mine]:
            self.arena.drop_partition(partition)

    async def backup_partition(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the changelog is the backup of an arena store")

    def restore_backup(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the changelog is the backup of an arena store")

    def reset_state(self) -> None:
        self.arena = Arena(self.arena.size)
        self._persisted.clear()

    # -- the mapping that Faust's Table shows

    def __getitem__(self, key: bytes) -> np.void:
        for index in self.arena._index.values():
            if key in index:
                return self.arena.rows[index[key]].copy()
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return any(key in index for index in self.arena._index.values())

    def __iter__(self) -> Iterator[bytes]:
        return (key for _, key, _ in self.arena.items())

    def __len__(self) -> int:
        return len(self.arena)

    def __setitem__(self, key: bytes, value: Any) -> None:
        raise TypeError("user state is written by the fold, not through table[key] = value")

    def __delitem__(self, key: bytes) -> None:
        raise TypeError("user state is dropped by a tombstone in the changelog, not through del table[key]")

    def clear(self) -> None:
        raise TypeError("user state is not cleared while a worker runs")
