"""The arena and its store: slots, dirty rows, recovery with the newest row winning, tombstones, corrupt rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from models.errors import StateABIError, StateError
from models.state import empty_rows, encode_row
from streams.arena import Arena, ArenaStore

TOPIC = "app-user_state-changelog"


def row_bytes(offset: int, visits: int = 0) -> bytes:
    row = empty_rows(1)
    row["applied_offset"], row["visits"] = offset, visits
    return row.tobytes()


def make_store(on_corrupt_row: str = "crash") -> ArenaStore:
    table = SimpleNamespace(name="user_state", changelog_topic=SimpleNamespace(get_topic_name=lambda: TOPIC))
    store = ArenaStore("arena://cpu", SimpleNamespace(), table)
    store.on_corrupt_row = on_corrupt_row
    return store


def changelog(store: ArenaStore, records: list[tuple[bytes, bytes | None]], partition: int = 0) -> None:
    tp = TP(TOPIC, partition)
    value = [SimpleNamespace(key=key, value=value, offset=i) for i, (key, value) in enumerate(records)]
    store.apply_changelog_batch([SimpleNamespace(message=SimpleNamespace(tp=tp, value=value, offset=len(value) - 1))])


def test_a_new_user_gets_an_empty_row_and_keeps_its_slot():
    arena = Arena()
    first = arena.slots(0, [b"a", b"b", b"a"])
    assert first[0] == first[2] != first[1]
    assert arena.slots(0, [b"b"])[0] == first[1]
    assert arena.rows[first].tobytes() == empty_rows(3).tobytes()
    assert len(arena) == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.booleans()), max_size=120))
def test_arena_behaves_like_a_dict_of_rows(steps):
    arena, model = Arena(), {}
    for offset, (partition, user, drop) in enumerate(steps):
        key = f"u{user}".encode()
        if drop and user % 5 == 0:
            arena.drop_partition(partition)
            model = {k: v for k, v in model.items() if k[0] != partition}
        elif drop:
            arena.forget(partition, key)
            model.pop((partition, key), None)
        else:
            slot = arena.slots(partition, [key])[0]
            arena.rows["applied_offset"][slot] = offset
            model[partition, key] = offset
    found = {(p, k): int(arena.rows["applied_offset"][slot]) for p, k, slot in arena.items()}
    assert found == model
    assert len(arena) == len(model)


def test_growth_keeps_rows():
    arena = Arena()
    keys = [f"u{i}".encode() for i in range(10_000)]
    arena.rows["visits"][arena.slots(1, keys[:4000])] = np.arange(4000)
    arena.slots(1, keys)
    assert arena.rows["visits"][arena.slots(1, keys[:4000])].tolist() == list(range(4000))


def test_dirty_rows_are_taken_once_and_are_copies():
    arena = Arena()
    slots = np.concatenate([arena.slots(0, [b"a", b"b"]), arena.slots(3, [b"c"])])
    arena.mark_dirty(slots[[0, 2, 0]])
    taken = arena.take_dirty()
    assert {p: keys for p, (keys, _) in taken.items()} == {0: [b"a"], 3: [b"c"]}
    before = taken[0][1].tobytes()
    arena.rows["visits"][slots[0]] = 7
    assert taken[0][1].tobytes() == before
    assert arena.take_dirty() == {}


def test_recovery_keeps_the_greatest_applied_offset_and_rewrites_it_after_a_stale_one():
    store = make_store()
    changelog(store, [(b"a", encode_row(row_bytes(5, 5))), (b"a", encode_row(row_bytes(9, 9)))])
    assert store.arena.take_dirty() == {}
    changelog(store, [(b"a", encode_row(row_bytes(7, 7)))])
    assert store[b"a"]["visits"] == 9
    (keys, rows) = store.arena.take_dirty()[0]
    assert keys == [b"a"] and rows["applied_offset"].tolist() == [9]
    assert store.persisted_offset(TP(TOPIC, 0)) == 0


def test_a_tombstone_drops_the_user_and_recovery_goes_on():
    store = make_store()
    changelog(store, [(b"a", encode_row(row_bytes(5))), (b"a", None), (b"b", encode_row(row_bytes(6))), (b"c", None)])
    assert list(store) == [b"b"] and store.failure is None


def test_a_corrupt_row_stops_recovery_with_where_and_what_to_do():
    store = make_store()
    bad = bytearray(encode_row(row_bytes(5)))
    bad[100] ^= 1
    changelog(store, [(b"a", bytes(bad)), (b"b", encode_row(row_bytes(6)))], partition=2)
    assert isinstance(store.failure, StateError)
    for part in (f"{TOPIC}[2] offset 0", "checksum", "on_corrupt_row=skip"):
        assert part in str(store.failure)
    assert b"b" not in store


def test_corrupt_rows_are_skipped_and_counted_when_told_so():
    store = make_store("skip")
    changelog(store, [(b"a", b"short"), (b"b", encode_row(row_bytes(6)))])
    assert store.failure is None and list(store) == [b"b"]
    assert (store.skipped_rows, store.recovered_rows) == (1, 1)


def test_an_unknown_abi_stops_even_when_corrupt_rows_are_skipped():
    store = make_store("skip")
    row = empty_rows(1)
    row["abi"] = 999
    changelog(store, [(b"a", encode_row(row.tobytes()))])
    assert store.failure is not None and "ABI 999" in str(store.failure)
    assert not isinstance(store.failure, StateABIError)


async def test_partitions_that_went_elsewhere_are_forgotten():
    store = make_store()
    for partition in (0, 1):
        changelog(store, [(b"a", encode_row(row_bytes(5)))], partition)
    await store.on_rebalance({TP(TOPIC, 1), TP("events", 0)}, {TP(TOPIC, 0)}, set())
    assert [p for p, _, _ in store.arena.items()] == [1]
    assert store.persisted_offset(TP(TOPIC, 0)) is None and store.persisted_offset(TP(TOPIC, 1)) == 0


def test_rows_cannot_be_written_behind_the_folds_back():
    store = make_store()
    with pytest.raises(TypeError, match="written by the fold"):
        store[b"a"] = b""
    with pytest.raises(TypeError, match="tombstone"):
        del store[b"a"]
