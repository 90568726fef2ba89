"""Rows of user state on the local disk: those that were idle for long, of a worker that keeps only so many in memory.

    put:  rows' changelog values ─► one write to RocksDB; their fingerprints ─► memory
    which, take:  keys without a slot ─► fingerprints: on disk? ─► read, checked, deleted

    key on disk = partition, assignment (uint32 each, big-endian), user key

A row is in one place: in memory or here, never in both, and what is here is what was last put. An assignment is the time
from a partition's first row here to `drop`; each has a number of its own, so that nothing of an earlier one can be found.
The changelog is the truth and this only memory that is larger and slower: the folder is one process's own, nothing in it
is synced, it goes with the process, and what a process that died left is deleted by the next start.

The fingerprint of a key is 64 bits of a seeded hash, in an open-addressing table a partition: a new user costs no read. Two
users with the same one both count, so that taking one never hides the other.

Knows keys, changelog values, files; not slots, and not when a row is idle. RocksDB comes by the package `rocksdict` (the
extra `cold`), in its raw mode, which stores bytes and pickles nothing.
Legend: N rows.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numba import njit

from models.errors import ConfigError, CorruptRowError, StateError
from models.events import PSEUDONYM_LENGTH
from models.state import NULL, OK, decode_rows, empty_rows
from streams.index import Index, siphash13
from streams.wire import Spans

log = structlog.get_logger("crosscurrent.cold")

WORD_BYTES = PSEUDONYM_LENGTH
"""Of the three words that a fingerprint is made of."""
_PREFIX = struct.Struct(">II")
_FREE, _DELETED = 0, 1
"""Lower half of an entry that holds no fingerprint, as in `Index`."""
_WRITE_BUFFER_BYTES, _WRITE_BUFFERS = 32 << 20, 3
_BLOCK_CACHE_BYTES = 8 << 20
_OPEN_FILES = 512
_CHUNK = 1024


def words_of(key: bytes) -> np.ndarray:
    """(3,) uint64 that stand for a key: its bytes where it has PSEUDONYM_LENGTH, else a digest."""
    whole = key if len(key) == WORD_BYTES else hashlib.blake2b(key, digest_size=WORD_BYTES).digest()
    return np.frombuffer(whole, np.uint64)


class ColdRows:
    """Rows on disk by (partition, user key). Not for several threads at once, but for what `chunks` returns."""

    def __init__(self, parent: Path, on_corrupt_row: str = "crash") -> None:
        """Takes a new folder in `parent`, and deletes those of processes that are gone.

        `on_corrupt_row`: `crash` or `skip`. Raises ConfigError where rocksdict is not installed or the folder cannot be
        written to.
        """
        rocksdict = _rocksdict()
        self.on_corrupt_row = on_corrupt_row
        self.moved_out = self.brought_back = self.skipped_rows = 0
        """Rows ever."""
        try:
            self.folder, self._owner = _claim(parent)
        except OSError as error:
            raise ConfigError(
                f"worker.hot_users: cannot keep rows in {parent}: {error.strerror or error}; give worker.data_dir a folder "
                "that can be written to, or set worker.hot_users to 0"
            ) from error
        self._batch = lambda: rocksdict.WriteBatch(raw_mode=True)
        self._db = rocksdict.Rdict(str(self.folder / "db"), _options(rocksdict))
        write = rocksdict.WriteOptions()
        write.disable_wal = True
        self._db.set_write_options(write)
        self._read_once = rocksdict.ReadOptions()
        self._read_once.fill_cache(False)  # what is read is deleted, and who lies beside it is a stranger
        self._seed = np.frombuffer(os.urandom(16), np.uint64)
        self._assignments: dict[int, tuple[bytes, Index]] = {}
        self._n_assignments = 0
        _warm()

    def __len__(self) -> int:
        """Rows on disk now."""
        return sum(int(index.counts[1]) for _, index in self._assignments.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the files, those of rows deleted since included until they are compacted."""
        return int(self._db.property_int_value("rocksdb.total-sst-files-size") or 0)

    def put(self, parts: Sequence[tuple[int, Spans, Spans, np.ndarray]]) -> None:
        """Rows of users none of which is here: for each partition, keys, changelog values and `words_of` (n, 3) uint64.

        All or none. Raises StateError where they cannot be written.
        """
        batch = self._batch()
        for partition, keys, values, _ in parts:
            prefix = self._assignment(partition)[0]
            for key, value in zip(keys.tolist(), values.tolist(), strict=True):
                batch.put(prefix + key, value)
        self._write(batch)
        for partition, keys, _, words_N3 in parts:
            index = self._assignment(partition)[1]
            index.make_room(keys.n)
            _add(index.entries, index.counts, self._seed, words_N3)
            self.moved_out += keys.n

    def which(self, partition: int, words_C3: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Of `slots` (n,) the positions (m,) of those whose words, words_C3[slot], are a key's that is here; no disk is
        read. A stranger with the fingerprint of one is among them once in 2⁶⁴ / rows."""
        if partition not in self._assignments or not len(slots):
            return np.empty(0, np.int64)
        out = np.empty(len(slots), np.int64)
        return out[: _which(self._assignments[partition][1].entries, self._seed, words_C3, slots, out)]

    def take(self, partition: int, keys: Spans, words_N3: np.ndarray, size: str) -> np.ndarray:
        """Rows (n,) of users who are here, one of each; they are here no longer.

        A row that is gone or fails its checksum: raises CorruptRowError, nothing taken; or, with `skip`, an empty row,
        counted in `skipped_rows`.
        """
        prefix, index = self._assignments[partition]
        raw = [prefix + key for key in keys.tolist()]
        rows = self._read(partition, raw, size)
        batch = self._batch()
        for key in raw:
            batch.delete(key)
        self._write(batch)
        _discard(index.entries, index.counts, self._seed, words_N3)
        self.brought_back += len(raw)
        return rows

    def peek(self, partition: int, key: bytes, size: str) -> np.void | None:
        """A copy of a row, which stays; None where the user is not here. Raises as `take`."""
        if not len(self.which(partition, words_of(key)[None], np.zeros(1, np.int64))):
            return None
        return self._read(partition, [self._assignments[partition][0] + key], size)[0]

    def forget(self, partition: int, key: bytes) -> None:
        """Drops one user, who need not be here."""
        words_N3 = words_of(key)[None]
        if not len(self.which(partition, words_N3, np.zeros(1, np.int64))):
            return
        prefix, index = self._assignments[partition]
        batch = self._batch()
        batch.delete(prefix + key)
        self._write(batch)
        _discard(index.entries, index.counts, self._seed, words_N3)

    def drop(self, partition: int) -> None:
        """Drops every row of a partition; what is put from now on belongs to a new assignment."""
        if (assignment := self._assignments.pop(partition, None)) is not None:
            prefix = assignment[0]
            batch = self._batch()
            batch.delete_range(prefix, (int.from_bytes(prefix, "big") + 1).to_bytes(len(prefix), "big"))
            self._write(batch)

    def chunks(self, partition: int) -> Iterator[tuple[Spans, Spans]]:
        """Keys and changelog values of the rows of a partition as of this call, whatever happens meanwhile; some thousand at
        a time. The iterator may be used in another thread."""
        if partition not in self._assignments:
            return iter(())
        prefix = self._assignments[partition][0]
        return _chunked(self._db.items(from_key=prefix, read_opt=self._read_once), prefix)

    def close(self) -> None:
        """Ends it; its folder is deleted. Idempotent."""
        if self._owner < 0:
            return
        self._db.close()
        shutil.rmtree(self.folder)
        os.close(self._owner)
        self._owner = -1

    def _assignment(self, partition: int) -> tuple[bytes, Index]:
        """The prefix of its keys, and its fingerprints."""
        if partition not in self._assignments:
            self._n_assignments += 1
            self._assignments[partition] = _PREFIX.pack(partition, self._n_assignments), Index()
        return self._assignments[partition]

    def _write(self, batch: Any) -> None:
        try:
            self._db.write(batch)
        except Exception as error:  # rocksdict has no class of its own for what RocksDB says
            raise StateError(
                f"idle rows cannot be moved to {self.folder}: {error}. Make room on the disk of worker.data_dir, or set "
                "worker.hot_users higher or to 0, and start again: nothing is lost, the changelog has the rows"
            ) from error

    def _read(self, partition: int, raw: list[bytes], size: str) -> np.ndarray:
        try:
            values = self._db.get(raw, read_opt=self._read_once)
        except Exception as error:  # as above: a damaged block, say, which need not hold all of them
            values = [self._get(partition, key) for key in raw]
            log.error("state.cold_read_failed", partition=partition, reason=str(error))
        rows, status = decode_rows(*Spans.of(values), size)
        for i in np.flatnonzero(status != OK).tolist():
            reason = "cannot be read" if status[i] == NULL else "fails its checksum"
            if self.on_corrupt_row == "crash":
                raise CorruptRowError(
                    f"a row of partition {partition} that was moved to {self.folder} {reason}. Start the worker again: it "
                    "takes the row from the changelog. If it comes again, the disk is at fault: set worker.hot_users to 0, "
                    "or worker.on_corrupt_row=skip to lose such users' state (they start afresh)"
                )
            rows[i] = empty_rows(1, size)[0]
            self.skipped_rows += 1
            log.error("state.row_skipped", where=f"{self.folder} partition {partition}", reason=f"a row {reason}")
        return rows

    def _get(self, partition: int, key: bytes) -> bytes | None:
        try:
            return self._db.get(key)
        except Exception as error:
            log.error("state.cold_row_unreadable", partition=partition, reason=str(error))
            return None


def _rocksdict() -> Any:
    try:
        import rocksdict
    except ImportError as error:
        raise ConfigError(
            "worker.hot_users keeps idle rows in RocksDB, by a package that is not installed: "
            "`pip install 'crosscurrent[cold]'`, or set worker.hot_users to 0"
        ) from error
    return rocksdict


def _options(rocksdict: Any) -> Any:
    """Little memory: write buffers, and some 10 bytes a row of the files' indices. Reads of single keys that are there."""
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(_WRITE_BUFFERS)
    options.set_max_background_jobs(2)
    options.set_max_open_files(_OPEN_FILES)
    options.set_compression_type(rocksdict.DBCompressionType.none())  # a packed row has little left to leave out
    options.set_optimize_filters_for_hits(True)
    options.set_paranoid_checks(True)
    table = rocksdict.BlockBasedOptions()
    table.set_bloom_filter(10, False)  # for the levels above the one that has the key
    table.set_block_cache(rocksdict.Cache(_BLOCK_CACHE_BYTES))
    options.set_block_based_table_factory(table)
    return options


def _claim(parent: Path) -> tuple[Path, int]:
    """→ a new folder in `parent`; the open file whose lock says that its process lives. Deletes the folders of others that
    do not. By locks and not by process ids: of two containers with one volume, both may be number 1."""
    parent.mkdir(parents=True, exist_ok=True)
    with open(parent / "lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for left in parent.glob("*.rows"):
            owner = os.open(left / "owner", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            except BlockingIOError:
                pass
            finally:
                os.close(owner)
        folder = Path(tempfile.mkdtemp(dir=parent, suffix=".rows"))
        owner = os.open(folder / "owner", os.O_RDWR | os.O_CREAT)
        fcntl.flock(owner, fcntl.LOCK_EX)
    return folder, owner


def _chunked(items: Any, prefix: bytes) -> Iterator[tuple[Spans, Spans]]:
    keys, values = [], []
    for key, value in items:
        if not key.startswith(prefix):
            break
        keys.append(key[len(prefix) :])
        values.append(value)
        if len(keys) == _CHUNK:
            yield Spans.of(keys), Spans.of(values)
            keys, values = [], []
    if keys:
        yield Spans.of(keys), Spans.of(values)


def _warm() -> None:
    index, seed, words_N3 = Index(), np.frombuffer(bytes(16), np.uint64), np.zeros((1, 3), np.uint64)
    _add(index.entries, index.counts, seed, words_N3)
    _which(index.entries, seed, words_N3, np.zeros(1, np.int64), np.empty(1, np.int64))
    _discard(index.entries, index.counts, seed, words_N3)
    index.make_room(len(index.entries))


@njit(cache=True, nogil=True)
def _entry(seed, a, b, c):
    """Of `Index`: where it stands is in the upper half, and the lower is neither free nor deleted."""
    entry = siphash13(seed, a, b, c)
    return entry if entry & np.uint64(0xFFFFFFFF) > _DELETED else entry | np.uint64(2)


@njit(cache=True, nogil=True)
def _find(entries, entry):
    """→ a place that has it, or −1."""
    mask = np.uint64(len(entries) - 1)
    place = (entry >> np.uint64(32)) & mask
    while True:
        found = entries[place]
        if found == entry:
            return np.int64(place)
        if found == _FREE:
            return np.int64(-1)
        place = (place + np.uint64(1)) & mask


@njit(cache=True, nogil=True)
def _add(entries, counts, seed, words_N3):
    """One entry each, also where there is an equal one. There must be room (`Index.make_room`)."""
    mask = np.uint64(len(entries) - 1)
    for i in range(len(words_N3)):
        entry = _entry(seed, words_N3[i, 0], words_N3[i, 1], words_N3[i, 2])
        place = (entry >> np.uint64(32)) & mask
        while (entries[place] & np.uint64(0xFFFFFFFF)) > _DELETED:
            place = (place + np.uint64(1)) & mask
        counts[0] += entries[place] == _FREE
        counts[1] += 1
        entries[place] = entry


@njit(cache=True, nogil=True)
def _which(entries, seed, words_C3, slots, out):
    n = 0
    for i in range(len(slots)):
        slot = slots[i]
        if _find(entries, _entry(seed, words_C3[slot, 0], words_C3[slot, 1], words_C3[slot, 2])) >= 0:
            out[n] = i
            n += 1
    return n


@njit(cache=True, nogil=True)
def _discard(entries, counts, seed, words_N3):
    """One entry each."""
    for i in range(len(words_N3)):
        place = _find(entries, _entry(seed, words_N3[i, 0], words_N3[i, 1], words_N3[i, 2]))
        if place >= 0:
            entries[place] = _DELETED
            counts[1] -= 1
