"""Rows on disk: an arena that keeps few rows in memory is the same as one that keeps all, and what is on disk is found once,
checked, and gone with its partition and its process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from faust.types import TP
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rocksdict import WriteBatch
from test_arena import changed, changelog, key_of, make_store, row_bytes
from test_snapshots import TOPIC, settled
from tiny import make_model, make_stream

from crosscurrent import load_settings
from models.errors import ConfigError, CorruptRowError, StateError
from models.events import PSEUDONYM_LENGTH
from models.fold import DUPLICATE, TOO_LATE
from models.scorer import Scorer
from models.state import empty_rows, encode_row, encode_rows
from streams import arena as arena_module
from streams import cold as cold_module
from streams.arena import Arena, Changes, warm
from streams.cold import ColdRows, words_of
from streams.index import Index
from streams.snapshots import load, path_of, save
from streams.wire import Spans

warm()

ROOT = Path(__file__).resolve().parent.parent
fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def rows_on_disk(on_corrupt_row: str = "crash") -> Iterator[ColdRows]:
    with tempfile.TemporaryDirectory() as folder:
        cold = ColdRows(Path(folder), on_corrupt_row)
        try:
            yield cold
        finally:
            cold.close()


@pytest.fixture
def cold() -> Iterator[ColdRows]:
    with rows_on_disk() as cold:
        yield cold


def limited(cold: ColdRows, most: int) -> Arena:
    arena = Arena()
    arena.keep_cold(cold, most)
    return arena


def values_of(offsets: list[int]) -> Spans:
    rows = empty_rows(len(offsets))
    rows["applied_offset"] = rows["visits"] = offsets
    return Spans(*encode_rows(rows, np.arange(len(rows))))


def put(cold: ColdRows, partition: int, users: list[int], offsets: list[int] | None = None) -> None:
    keys = [key_of(user) for user in users]
    words = np.stack([words_of(key) for key in keys])
    cold.put([(partition, Spans.of(keys), values_of(offsets or users), words)])


def there(cold: ColdRows, partition: int, users: list[int]) -> list[int]:
    """Those of the users whose fingerprint is there."""
    words = np.stack([words_of(key_of(user)) for user in users])
    return [users[i] for i in cold.which(partition, words, np.arange(len(users)))]


def take(cold: ColdRows, partition: int, users: list[int]) -> list[int]:
    keys = [key_of(user) for user in users]
    return cold.take(partition, Spans.of(keys), np.stack([words_of(key) for key in keys]), "cpu")["visits"].tolist()


def content(arena: Arena) -> dict[tuple[int, bytes], bytes]:
    """Every row, wherever it is."""
    found = {(partition, key): arena.row(partition, key).tobytes() for partition, key in arena.users()}
    assert len(found) == len(arena)
    return found


# -- rows on disk


def test_what_is_put_is_taken_once(cold):
    put(cold, 1, [4, 5, 6, 7])
    put(cold, 2, [5])
    assert len(cold) == 5
    assert there(cold, 1, [3, 4, 5, 6, 7, 8]) == [4, 5, 6, 7]
    assert take(cold, 1, [7, 5]) == [7, 5]
    assert there(cold, 1, [4, 5, 6, 7]) == [4, 6] and there(cold, 2, [5]) == [5]
    assert cold.peek(1, key_of(5), "cpu") is None
    assert cold.peek(1, key_of(6), "cpu")["visits"] == 6
    assert (len(cold), cold.moved_out, cold.brought_back) == (3, 5, 2)


def test_a_partition_that_was_dropped_has_nothing_when_it_comes_again(cold):
    for partition in (0, 1, 2, 256):
        put(cold, partition, [4, 5])
    cold.drop(1)
    assert len(cold) == 6 and there(cold, 1, [4, 5]) == []
    put(cold, 1, [5], [77])
    assert there(cold, 1, [4, 5]) == [5]
    assert [keys.tolist() for keys, _ in cold.chunks(1)] == [[key_of(5)]]
    assert take(cold, 1, [5]) == [77]
    assert [take(cold, partition, [4, 5]) for partition in (0, 2, 256)] == [[4, 5]] * 3


def test_a_user_who_is_forgotten_does_not_come_back(cold):
    put(cold, 0, [4, 6, 8])
    for user in (6, 4, 5):
        cold.forget(0, key_of(user))
    assert len(cold) == 1 and there(cold, 0, [4, 5, 6, 8]) == [8]
    assert [key for keys, _ in cold.chunks(0) for key in keys.tolist()] == [key_of(8)]


def test_what_is_listed_is_as_of_the_call_also_in_another_thread(cold):
    users = list(range(1, 3000))
    put(cold, 0, users)
    put(cold, 1, [1])
    chunks, seen = cold.chunks(0), []
    take(cold, 0, users[100:2000])
    put(cold, 0, [5000])
    cold.drop(1)

    def read() -> None:
        for keys, values in chunks:
            assert keys.n == values.n <= 1024
            seen.extend(zip(keys.tolist(), values.tolist(), strict=True))

    thread = Thread(target=read)
    thread.start()
    thread.join()
    assert dict(seen) == dict(zip([key_of(user) for user in users], values_of(users).tolist(), strict=True))
    assert list(cold.chunks(1)) == list(cold.chunks(9)) == []


@fast
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(1, 400)), max_size=12))
def test_fingerprints_are_a_bag(steps):
    """Equal ones count as often as they are there: taking one user's leaves another's."""
    index, seed, bag = Index(), np.array([1, 2], np.uint64), np.zeros(8, int)
    words = np.arange(24, dtype=np.uint64).reshape(8, 3)
    slots, out = np.arange(8), np.empty(8, np.int64)
    for add, which, n in steps:
        n = n if add else min(n, bag[which])
        some = np.repeat(words[which : which + 1], n, axis=0)
        if add:
            index.make_room(n)
            cold_module._add(index.entries, index.counts, seed, some)
        else:
            cold_module._discard(index.entries, index.counts, seed, some)
        bag[which] += n if add else -n
        found = out[: cold_module._which(index.entries, seed, words, slots, out)]
        assert found.tolist() == np.flatnonzero(bag).tolist()
        assert index.counts[1] == bag.sum()


# -- damage


def damage(cold: ColdRows, partition: int, user: int, value: bytes | None) -> None:
    key, batch = cold._assignments[partition][0] + key_of(user), WriteBatch(raw_mode=True)
    batch.delete(key) if value is None else batch.put(key, value)
    cold._db.write(batch)


def damaged(offset: int = 5) -> bytes:
    value = bytearray(encode_row(row_bytes(offset)))
    value[100] ^= 1
    return bytes(value)


@pytest.mark.parametrize(("value", "why"), [(damaged(), "checksum"), (b"", "checksum"), (None, "cannot be read")])
def test_a_damaged_row_is_told_apart_and_nothing_is_taken(cold, value, why):
    put(cold, 3, [4, 5])
    damage(cold, 3, 5, value)
    with pytest.raises(CorruptRowError, match=f"partition 3.*{why}.*Start the worker again.*on_corrupt_row=skip") as raised:
        take(cold, 3, [4, 5])
    assert key_of(5).decode() not in str(raised.value)
    assert there(cold, 3, [4, 5]) == [4, 5] and take(cold, 3, [4]) == [4]


def test_a_damaged_row_is_skipped_and_counted_when_told_so():
    with rows_on_disk("skip") as cold:
        arena = limited(cold, 4)
        users = [key_of(user) for user in (1, 2, 4, 5)]
        arena.rows["visits"][arena.slots(0, users)] = 9
        arena.slots(0, [key_of(user) for user in (7, 8, 10, 11)])
        assert len(cold) == 4
        damage(cold, 0, 4, damaged())
        damage(cold, 0, 5, None)
        slots = arena.slots(0, users)
        assert arena.rows["visits"][slots].tolist() == [9, 9, 0, 0]
        assert arena.rows[slots[2:]].tobytes() == empty_rows(2).tobytes()
        assert cold.skipped_rows == 2


def test_a_damaged_row_stops_recovery_which_faust_would_go_on_with():
    with rows_on_disk() as cold:
        store = make_store()
        store.arena.keep_cold(cold, 2)
        for user in (1, 2, 4, 5):
            changelog(store, [(key_of(user), encode_row(row_bytes(5)))])
        damage(cold, 0, 1, damaged())
        changelog(store, [(key_of(1), encode_row(row_bytes(6)))])
        assert isinstance(store.failure, StateError) and "checksum" in str(store.failure)


def test_a_damaged_block_says_the_same(cold):
    """What RocksDB itself finds out, by the checksums of its own files."""
    put(cold, 0, list(range(1, 4000)))
    cold._db.flush()
    (file,) = (cold.folder / "db").glob("*.sst")
    content = bytearray(file.read_bytes())
    for at in range(100, len(content) // 2, 1000):
        content[at] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(CorruptRowError, match=r"cannot be read.*Start the worker again"):
        take(cold, 0, list(range(1, 4000)))


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from models.state import empty_rows, encode_rows
from streams.arena import Arena
from streams.cold import ColdRows

cold, arena = ColdRows(Path(sys.argv[1])), Arena()
arena.keep_cold(cold, 1024)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
rng, n = np.random.default_rng(0), 0
try:
    while n < 400_000:
        slots = arena.slots(0, [b"%024d" % user for user in range(n, n + 1024)])
        arena.rows["ring_id"][slots] = rng.integers(0, 2**60, (1024, 16))
        n += 1024
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_disk_that_takes_no_more_is_said(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert re.search("^StateError idle rows cannot be moved to .*: .*Make room on the disk.*the changelog has", done.stdout)


# -- the folder


def test_a_folder_belongs_to_one_process_and_goes_with_it(tmp_path):
    first, second = ColdRows(tmp_path), ColdRows(tmp_path)
    put(first, 0, [1])
    put(second, 0, [2])
    assert there(first, 0, [1, 2]) == [1] and there(second, 0, [1, 2]) == [2]
    first.close()
    first.close()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [second.folder]
    second.close()


def test_what_a_dead_process_left_is_deleted_and_what_a_living_one_has_is_not(tmp_path):
    code = """
import sys, time
from pathlib import Path
from streams.cold import ColdRows
cold = ColdRows(Path(sys.argv[1]))
print(cold.folder, flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        theirs = Path(process.stdout.readline().strip())
        ours = ColdRows(tmp_path)
        assert theirs.is_dir() and ours.folder != theirs
        ours.close()
        assert theirs.is_dir()
        process.send_signal(signal.SIGKILL)
        process.wait()
        again = ColdRows(tmp_path)
        assert len(again) == 0 and [path for path in tmp_path.iterdir() if path.is_dir()] == [again.folder]
        again.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_that_cannot_be_made_is_a_clear_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"worker\.hot_users: cannot keep rows in .*worker\.data_dir"):
        ColdRows(tmp_path / "file" / "cold")


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    with pytest.raises(ConfigError, match=r"pip install 'crosscurrent\[cold\]'.*hot_users to 0"):
        ColdRows(tmp_path)
    assert os.listdir(tmp_path) == []


def test_fewer_users_in_memory_than_a_micro_batch_has_are_refused():
    assert load_settings(["worker.hot_users=64", "worker.max_batch=64"], environ={}).worker.hot_users == 64
    with pytest.raises(ConfigError, match=r"hot_users is 63.*64 users \(max_batch\)"):
        load_settings(["worker.hot_users=63", "worker.max_batch=64"], environ={})
    with pytest.raises(ConfigError, match=r"worker\.hot_users"):
        load_settings(["worker.hot_users=-1"], environ={})


# -- an arena with a limit


class Unread(ColdRows):
    """Whose disk must not be read."""

    def _read(self, *args):
        raise AssertionError("a user who never was there cost a read")


def test_no_more_rows_than_the_limit_are_in_memory_but_dirty_ones(cold):
    arena = limited(cold, 100)
    for first in range(0, 1000, 20):
        slots = arena.slots(first % 3, [key_of(user) for user in range(first, first + 20)])
        assert arena.n_hot <= 100
        arena.mark_dirty(slots[:4])
        if first % 100 == 80:
            arena.take_dirty()
    assert len(arena) == len(set(arena.users())) == len({(user // 20 * 20 % 3, key_of(user)) for user in range(1000)})
    assert arena.n_slots <= 100


def test_dirty_rows_stay_and_the_limit_holds_again_after_the_commit(cold):
    arena = limited(cold, 50)
    for user in range(200):
        arena.mark_dirty(arena.slots(0, [key_of(user)]))
    assert arena.n_hot == len({key_of(user) for user in range(200)}) and len(cold) == 0
    assert sorted(changed(arena.take_dirty()[0])[0]) == sorted({key_of(user) for user in range(200)})
    arena.slots(0, [key_of(1)])
    assert arena.n_hot <= 50


@fast
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=30), st.data())
def test_the_hand_goes_on_and_finds_each_clean_slot_once(slots, data):
    marks, dirty, held = (np.array(column, np.uint8) for column in zip(*slots, strict=True))
    hand, n = data.draw(st.integers(0, len(slots))), data.draw(st.integers(0, 40))
    out, after = np.empty(n, np.int64), marks.copy()
    found, last = arena_module._idle(after, dirty, held, len(slots), hand, out)
    clean = np.flatnonzero((held > 0) & (dirty == 0))
    # By rounds: who has no mark in the first, who had one in the second, …, each from the hand on.
    order = sorted(clean.tolist(), key=lambda slot: (marks[slot], (slot - hand) % len(slots)))
    assert out[:found].tolist() == order[:n]
    assert (after[out[:found]] == arena_module._FOUND).all() and 0 <= last <= len(slots)


@pytest.mark.parametrize("user", [1, 3])
def test_a_tombstone_for_a_user_on_disk(cold, user):
    """With a key of the usual length, and with another."""
    store = make_store()
    store.arena.keep_cold(cold, 2)
    changelog(store, [(key_of(u), encode_row(row_bytes(5, 5))) for u in (user, 100, 101, 103, 104, 106)])
    assert store.arena.find(0, key_of(user)) < 0 and key_of(user) in store
    changelog(store, [(key_of(user), None)])
    assert key_of(user) not in store and len(store) == 5
    assert store.arena.rows["visits"][store.arena.slots(0, [key_of(user)])] == 0


def test_those_asked_for_again_and_again_stay_in_memory(cold):
    arena = limited(cold, 100)
    regulars = [key_of(user) for user in range(1, 40)]
    slots = arena.slots(0, regulars)
    for user in range(100, 2000):
        if user % 5 == 0:
            assert [int(arena.slots(0, [key])[0]) for key in regulars] == slots.tolist()
        arena.slots(0, [b"%0*d" % (PSEUDONYM_LENGTH, user)])
    assert cold.brought_back == 0 and cold.moved_out > 1800


def test_new_users_cost_no_read(tmp_path):
    cold = Unread(tmp_path)
    arena = limited(cold, 64)
    for first in range(0, 5000, 50):
        arena.slots(first % 2, [b"%0*d" % (PSEUDONYM_LENGTH, user) for user in range(first, first + 50)])
    assert len(cold) > 4900
    cold.close()


SCORED_BY = make_model()
COMMIT, DROP, FORGET, NOTHING = range(4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    most=st.integers(1, 12),
    steps=st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.integers(0, 3), st.integers(0, 24)), max_size=20),
)
def test_rows_and_scores_are_those_of_an_arena_without_a_limit(seed, most, steps):
    """Events, commits, drops and tombstones in any order; a user twice in a batch, duplicates, late ones, replays."""
    events, users = make_stream(600, 25, seed)
    scorer, at = Scorer(SCORED_BY, "cpu"), 0
    with rows_on_disk() as cold:
        arenas = Arena(), limited(cold, most)
        for n, partition, then, which in steps:
            batch, keys = events[at : at + n], [key_of(user) for user in users[at : at + n].tolist()]
            at += n
            answers = []
            for arena in arenas:
                slots = arena.slots(partition, keys)
                scores, status = scorer.run(arena.rows, slots, batch)
                arena.mark_dirty(slots)
                answers.append([column.tobytes() for column in (*scores, status)])
                if then == COMMIT:
                    answers[-1].append({p: of_each(changes) for p, changes in arena.take_dirty().items()})
                elif then == DROP:
                    arena.drop_partition(which % 2)
                elif then == FORGET:
                    arena.forget(partition, key_of(which))
            assert answers[0] == answers[1]
        assert content(arenas[0]) == content(arenas[1])


def of_each(changes: Changes) -> dict[bytes, bytes]:
    return dict(zip(changes.keys.tolist(), changes.values.tolist(), strict=True))


def test_a_duplicate_and_a_late_event_are_known_when_the_row_was_on_disk(cold):
    events, _ = make_stream(40, 1, 3)
    scorer, arena = Scorer(SCORED_BY, "cpu"), limited(cold, 8)
    batch = events[:20].copy()
    batch["id"], batch["offset"], batch["ts"] = np.arange(1, 21), np.arange(20), batch["ts"].max() + np.arange(20)
    scorer.run(arena.rows, arena.slots(0, [key_of(1)] * 20), batch)
    for user in range(100, 200):
        arena.slots(0, [key_of(user)])
    assert arena.find(0, key_of(1)) < 0
    again = batch[[19, 0]].copy()
    again["offset"] = 100, 101
    again["id"][1], again["ts"][1] = 99, again["ts"][1] - 10 * 86_400_000
    _, status = scorer.run(arena.rows, arena.slots(0, [key_of(1)] * 2), again)
    assert status.tolist() == [DUPLICATE, TOO_LATE]


# -- recovery, rebalances, snapshots


@fast
@given(st.data())
def test_recovery_with_more_users_than_fit_equals_recovery_with_all(data):
    row = st.builds(row_bytes, st.integers(0, 30), st.integers(0, 3)).map(encode_row)
    users = st.integers(0, 20).map(key_of)
    records = data.draw(st.lists(st.tuples(users, st.one_of(row, row, row, st.none())), max_size=80))
    with rows_on_disk() as cold:
        plain, small = make_store(), make_store()
        small.arena.keep_cold(cold, data.draw(st.integers(1, 8)))
        while records:
            n = data.draw(st.integers(1, len(records)))
            for store in (plain, small):
                changelog(store, records[:n], 7)  # a standby's partition
            records = records[n:]
        assert sorted(plain) == sorted(small) and len(plain) == len(small)
        assert all(plain[key] == small[key] and key in small for key in plain)
        assert b"nobody" not in small
        taken = [store.arena.take_dirty() for store in (plain, small)]
        assert len({str(sorted(changed(t[7])[0]) if t else []) for t in taken}) == 1
        assert small.failure is None


async def test_a_partition_that_went_elsewhere_starts_afresh_when_it_comes_again(cold):
    store = make_store()
    store.arena.keep_cold(cold, 2)
    users = [1, 2, 4, 5, 7, 8, 10]
    for partition in (0, 7):
        changelog(store, [(key_of(user), encode_row(row_bytes(50, 50))) for user in users], partition)
    assert len(cold) == 12
    await store.on_rebalance({TP(TOPIC, 7)}, {TP(TOPIC, 0)}, set())
    assert {p for p, _ in store.arena.users()} == {7} and len(store) == 7
    # The new changelog is older than what was there: nothing of that may win.
    changelog(store, [(key_of(user), encode_row(row_bytes(3, 3))) for user in users[:5]], 0)
    assert {int(store.arena.row(0, key_of(user))["visits"]) for user in users[:5]} == {3}
    assert store.arena.row(0, key_of(10)) is None
    store.arena.slots(0, [key_of(user) for user in users])
    assert [int(store.arena.row(0, key_of(user))["visits"]) for user in users] == [3] * 5 + [0] * 2
    store.reset_state()
    assert len(store) == len(cold) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [30, 300, 1500])
def test_a_snapshot_while_rows_move_has_every_user_and_no_row_older_than_at_its_start(seed, most):
    async def run() -> None:
        rng, n = np.random.default_rng(seed), 2000
        with rows_on_disk() as cold, tempfile.TemporaryDirectory() as folder:
            arena = limited(cold, most)
            offset = 0

            def touch(users: list[int], partition: int = 2) -> None:
                nonlocal offset
                offset += 1
                slots = arena.slots(partition, [key_of(user) for user in users])
                arena.rows["applied_offset"][slots] = offset
                arena.mark_dirty(slots)
                if offset % 3 == 0:
                    arena.take_dirty()

            for first in range(0, n, 30):
                touch(list(range(first, first + 30)))
            before = {key: row[8:16] for (_, key), row in content(arena).items()}
            saving = asyncio.ensure_future(save(arena, Path(folder), TOPIC, 2, 41, 1234, settled))
            while not saving.done():
                touch(rng.integers(0, n + 500, min(30, most)).tolist())
                touch(rng.integers(0, 50, 5).tolist(), 3)
                await asyncio.sleep(0)
            assert await saving >= len(before)
            other = Arena()
            header = await load(other, path_of(Path(folder), TOPIC, 2), 2, TOPIC)
            after = {key: row[8:16] for (_, key), row in content(other).items()}
            assert header.rows >= len(after) and before.keys() <= after.keys()
            older = [k for k in before if int.from_bytes(after[k], "little") < int.from_bytes(before[k], "little")]
            assert not older
            # No version was followed by an older one, so there is nothing to write again.
            assert other.take_dirty() == {}
            assert cold.brought_back > 0

    asyncio.run(run())


async def test_a_snapshot_with_more_users_than_fit_is_loaded(tmp_path, cold):
    arena = Arena()
    keys = [key_of(user) for user in range(5000)]
    arena.rows["visits"][arena.slots(2, keys)] = np.arange(5000)
    await save(arena, tmp_path, TOPIC, 2, 41, 1234, settled)
    small = limited(cold, 100)
    await load(small, path_of(tmp_path, TOPIC, 2), 2, TOPIC)
    assert small.n_hot <= 100 and content(small) == content(arena)
    # And saved again by the one with most of it on disk.
    await save(small, tmp_path, TOPIC, 2, 41, 1234, settled)
    again = Arena()
    await load(again, path_of(tmp_path, TOPIC, 2), 2, TOPIC)
    assert content(again) == content(arena)
