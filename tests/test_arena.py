"""The arena and its store: slots, dirty rows, recovery with the newest row winning, tombstones, corrupt rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from faust.types import TP
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import StateABIError, StateError
from models.events import PSEUDONYM_LENGTH
from models.state import MIGRATIONS, decode_row, empty_rows, encode_row, encode_rows, row_dtype
from streams.arena import Arena, ArenaStore, Changes, warm
from streams.index import siphash13
from streams.wire import Spans

TOPIC = "app-user_state-changelog"

warm()  # compiling is no part of what is tested


def changed(changes: Changes) -> tuple[list[bytes], np.ndarray]:
    """Keys and rows of a partition's dirty rows."""
    bodies = [decode_row(value) for value in changes.values.tolist()]
    return changes.keys.tolist(), np.frombuffer(b"".join(bodies), row_dtype())


def key_of(user: int) -> bytes:
    """A pseudonym; for some users a key of another length."""
    return f"u{user}".encode() * (user % 4) if user % 3 == 0 else b"%0*d" % (PSEUDONYM_LENGTH, user)


def row_bytes(offset: int, visits: int = 0) -> bytes:
    row = empty_rows(1)
    row["applied_offset"], row["visits"] = offset, visits
    return row.tobytes()


def make_store(on_corrupt_row: str = "crash") -> ArenaStore:
    table = SimpleNamespace(name="user_state", changelog_topic=SimpleNamespace(get_topic_name=lambda: TOPIC))
    app = SimpleNamespace(assignor=SimpleNamespace(assigned_standbys=lambda: {TP(TOPIC, 7)}))
    store = ArenaStore("arena://cpu", app, table)
    store.on_corrupt_row = on_corrupt_row
    return store


def changelog(store: ArenaStore, records: list[tuple[bytes, bytes | None]], partition: int = 0) -> None:
    tp = TP(TOPIC, partition)
    value = [SimpleNamespace(key=key, value=value, offset=i) for i, (key, value) in enumerate(records)]
    message = SimpleNamespace(tp=tp, value=value, offset=len(value) - 1, timestamp=1.5)
    store.apply_changelog_batch([SimpleNamespace(message=message)])


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
        key = key_of(user)
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
    assert {p: changed(changes)[0] for p, changes in taken.items()} == {0: [b"a"], 3: [b"c"]}
    before = arena.rows[slots[:1]].tobytes()
    arena.rows["visits"][slots[0]] = 7
    assert changed(taken[0])[1].tobytes() == before
    assert arena.take_dirty() == {}


def test_dirty_rows_of_some_partitions_are_taken_and_those_of_others_stay():
    arena = Arena()
    for partition in (0, 1, 5):
        arena.mark_dirty(arena.slots(partition, [key_of(user) for user in range(10)]))
    assert arena.take_dirty([2]) == {}
    taken = arena.take_dirty([5, 0])
    assert sorted(taken) == [0, 5]
    assert sorted(changed(taken[5])[0]) == sorted({key_of(user) for user in range(10)})
    assert sorted(arena.take_dirty()) == [1]


def test_recovery_keeps_the_greatest_applied_offset_and_rewrites_it_after_a_stale_one():
    store = make_store()
    changelog(store, [(b"a", encode_row(row_bytes(5, 5))), (b"a", encode_row(row_bytes(9, 9)))])
    assert store.arena.take_dirty() == {}
    changelog(store, [(b"a", encode_row(row_bytes(7, 7)))])
    assert store[b"a"]["visits"] == 9
    keys, rows = changed(store.arena.take_dirty()[0])
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


def test_whatever_fails_in_recovery_is_told_at_once_and_nothing_more_is_applied(monkeypatch):
    """Faust would log it and wait for ever; a row folded before the worker stops would be of a user who looks new."""
    store, told = make_store(), []
    store.on_failure = told.append

    def no_room(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(store.arena, "restore", no_room)
    changelog(store, [(b"a", encode_row(row_bytes(5)))])
    assert [str(error) for error in told] == ["no room"] and store.failure is told[0]
    monkeypatch.undo()
    changelog(store, [(b"b", encode_row(row_bytes(6)))])
    assert len(told) == 1 and b"b" not in store


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


async def test_partitions_that_we_stand_by_for_are_kept_and_not_written():
    store = make_store()
    for partition in (1, 7):
        changelog(store, [(b"a", encode_row(row_bytes(5))), (b"a", encode_row(row_bytes(4)))], partition)
    await store.on_rebalance({TP(TOPIC, 1), TP(TOPIC, 7)}, set(), set())
    assert sorted(p for p, _, _ in store.arena.items()) == [1, 7]
    assert list(store.take_dirty([1, 7])) == [1]
    store.app.assignor.assigned_standbys = set
    await store.on_rebalance({TP(TOPIC, 7)}, set(), set())
    assert list(store.take_dirty([1, 7])) == [7]
    assert store.place(TP(TOPIC, 7)) == (1, 1500) and store.place(TP(TOPIC, 1)) is None


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


def plain_siphash13(key: tuple[int, int], data: bytes) -> int:
    """SipHash with one and three rounds, as its paper has it."""
    whole = 2**64 - 1

    def left(x: int, n: int) -> int:
        return (x << n | x >> (64 - n)) & whole

    def rounds(v: list[int], n: int) -> None:
        for _ in range(n):
            for a, b, c, d, r, t in ((0, 1, 2, 3, 13, 16), (2, 1, 0, 3, 17, 21)):
                v[a] = (v[a] + v[b]) & whole
                v[b] = left(v[b], r) ^ v[a]
                v[a] = left(v[a], 32)
                v[c] = (v[c] + v[d]) & whole
                v[d] = left(v[d], t) ^ v[c]

    v = [
        half ^ int.from_bytes(text, "big")
        for half, text in zip(key * 2, (b"somepseu", b"dorandom", b"lygenera", b"tedbytes"), strict=True)
    ]
    tail = data[len(data) // 8 * 8 :].ljust(7, b"\0") + bytes([len(data) % 256])
    for i in range(0, len(data) // 8 * 8 + 8, 8):
        word = int.from_bytes((data[: len(data) // 8 * 8] + tail)[i : i + 8], "little")
        v[3] ^= word
        rounds(v, 1)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(v, 3)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


@settings(deadline=None)  # compiles: the seed may be written to, an arena's may not
@given(st.binary(min_size=24, max_size=24), st.tuples(*[st.integers(0, 2**64 - 1)] * 2))
def test_the_hash_of_a_key_is_siphash(data, seed):
    words = np.frombuffer(data, np.uint64)
    assert siphash13(np.array(seed, np.uint64), *words) == plain_siphash13(seed, data)


@given(st.lists(st.one_of(st.none(), st.binary(max_size=30)), max_size=8))
def test_spans_are_what_they_are_made_of(strings):
    spans = Spans.of(strings)
    assert spans.tolist() == strings
    assert spans.take(slice(1, None)).tolist() == strings[1:]


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(0, 9))
def test_keys_may_come_as_spans_anywhere_in_a_buffer(users, shift):
    keys = [key_of(user) for user in users]
    moved = Spans(
        np.frombuffer(b"x" * shift + b"".join(keys) + b"y", np.uint8).copy(),
        Spans.of(keys).at + shift,
        Spans.of(keys).length,
    )
    arena = Arena()
    assert arena.slots(0, moved).tolist() == arena.slots(0, keys).tolist()
    assert len(arena) == len(set(keys))


@pytest.mark.parametrize(("at", "length"), [(0, -1), (1, 24), (-1, 24), (2**62, 24), (20, 10), (-1, 3)])
def test_a_key_that_is_null_or_outside_its_buffer_is_refused(at, length):
    with pytest.raises(ValueError, match="null or lies outside"):
        Arena().slots(0, Spans(np.zeros(24, np.uint8), np.array([at]), np.array([length], np.int32)))


def test_slots_are_reused_and_begin_empty():
    arena = Arena()
    keys = [key_of(user) for user in range(5000)]
    arena.rows["visits"][arena.slots(0, keys)] = 7
    arena.drop_partition(0)
    assert len(arena) == 0 and arena.find(0, keys[1]) == -1
    slots = arena.slots(1, keys)
    assert slots.max() < 5000 and not arena.rows["visits"][slots].any()
    assert [arena.key(slot) for slot in slots.tolist()] == keys


def test_forgetting_leaves_nothing_of_the_user_in_memory():
    arena = Arena()
    slot = int(arena.slots(0, [key_of(1)])[0])
    arena.rows["visits"][slot] = 7
    arena.forget(0, key_of(1))
    assert not any(arena.rows[slot].tobytes()) and not any(arena.key(slot))


def test_a_full_arena_says_what_to_do():
    arena = Arena()
    arena.capacity = 10
    arena.slots(0, [key_of(1)])
    with pytest.raises(MemoryError, match="another worker"):
        arena.slots(0, [key_of(user) for user in range(10)])


@given(st.data())
def test_recovery_by_batches_equals_one_record_after_another(data):
    """Packed and plain rows, tombstones, corrupt ones and rows of an older ABI, cut into batches anywhere."""
    users = st.integers(0, 6).map(key_of)
    row = st.builds(row_bytes, st.integers(0, 30), st.integers(0, 3))
    old = row.map(lambda body: encode_row((0).to_bytes(2, "little") + body[2:]))
    packed = row.map(
        lambda body: Spans(*encode_rows(np.frombuffer(body, row_dtype()).copy(), np.zeros(1, np.int64))).tolist()[0]
    )
    values = st.one_of(packed, row.map(encode_row), old, st.none(), st.binary(max_size=50))
    records = data.draw(st.lists(st.tuples(users, values), max_size=30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MIGRATIONS, 0, lambda body, size: (1).to_bytes(2, "little") + body[2:])
        single, batched = make_store("skip"), make_store("skip")
        for record in records:
            changelog(single, [record])
        rest = records
        while rest:
            n = data.draw(st.integers(1, len(rest)))
            changelog(batched, rest[:n])
            rest = rest[n:]
        model, dirty = {}, set()
        for key, value in records:
            if value is None:
                model.pop(key, None)
                dirty.discard(key)
                continue
            try:
                body = decode_row(value)
            except StateError:
                continue
            offset = int.from_bytes(body[8:16], "little", signed=True)
            if key in model and offset < int.from_bytes(model[key][8:16], "little", signed=True):
                dirty.add(key)
            else:
                model[key] = body
    for store in (single, batched):
        assert {key: store[key].tobytes() for key in store} == model
        taken = store.arena.take_dirty()
        assert (set(changed(taken[0])[0]) if taken else set()) == dirty
    assert (single.recovered_rows, single.skipped_rows) == (batched.recovered_rows, batched.skipped_rows)
