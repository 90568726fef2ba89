"""The row of user state: its layout, which must not change under an ABI, and its way through the changelog."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import state
from models.errors import CorruptRowError, StateABIError, StateError
from models.state import (
    FIELDS,
    MIGRATIONS,
    NULL,
    OK,
    OTHER,
    PACKED,
    SIZES,
    STATE_ABI,
    decode_row,
    decode_rows,
    empty_rows,
    encode_row,
    encode_rows,
    row_dtype,
)

# Of STATE_ABI 1. Where these fail, a row in somebody's changelog reads wrong: raise STATE_ABI and write a migration.
OFFSETS_CPU = {
    "abi": 0, "n_ring": 2, "size": 3, "h_version": 4, "applied_offset": 8, "first_ts": 16, "last_ts": 24,
    "session_start_ts": 32, "ring_ts": 40, "ring_id": 168, "ring_item": 296, "ring_category": 360,
    "ring_platform": 424, "ring_kind": 456, "ring_price": 472, "visits": 488, "n_events": 492, "returns": 496,
    "last_s_by_kind": 500, "gap_mean_s": 528, "gap_last_s": 532, "basket_mean": 536, "price_mean": 540, "counts": 544,
    "mix_long_category": 656, "mix_long_weight": 688, "mix_short_category": 720, "mix_short_weight": 736, "h": 752,
    "session_events": 1008, "session_purchases": 1010, "session_carts": 1012, "open_carts": 1014,
}  # fmt: skip
OFFSETS_GPU = {
    "abi": 0, "n_ring": 2, "size": 3, "h_version": 4, "applied_offset": 8, "first_ts": 16, "last_ts": 24,
    "session_start_ts": 32, "ring_ts": 40, "ring_id": 360, "ring_item": 680, "ring_category": 840,
    "ring_platform": 1000, "ring_kind": 1080, "ring_price": 1120, "visits": 1160, "n_events": 1164, "returns": 1168,
    "last_s_by_kind": 1172, "gap_mean_s": 1200, "gap_last_s": 1204, "basket_mean": 1208, "price_mean": 1212,
    "counts": 1216, "mix_long_category": 1328, "mix_long_weight": 1360, "mix_short_category": 1392,
    "mix_short_weight": 1408, "h": 1424, "session_events": 2448, "session_purchases": 2450, "session_carts": 2452,
    "open_carts": 2454,
}  # fmt: skip


def a_row(size: str, seed: int = 0) -> bytes:
    """A row full of anything, but of this ABI."""
    rows = np.frombuffer(np.random.default_rng(seed).bytes(row_dtype(size).itemsize), row_dtype(size)).copy()
    rows["abi"] = STATE_ABI
    return rows.tobytes()


@pytest.mark.parametrize(
    ("size", "offsets", "itemsize", "limit"), [("cpu", OFFSETS_CPU, 1016, 1024), ("gpu", OFFSETS_GPU, 2456, 2560)]
)
def test_layout_is_pinned(size, offsets, itemsize, limit):
    dtype = row_dtype(size)
    assert STATE_ABI == 1
    assert {name: dtype.fields[name][1] for name in dtype.names} == offsets
    assert dtype.itemsize == itemsize <= limit
    assert dtype.itemsize % 8 == 0  # so that rows in an array stay aligned


@pytest.mark.parametrize("size", SIZES)
def test_fields_are_aligned_and_without_holes(size):
    dtype, end = row_dtype(size), 0
    assert dtype.names == tuple(name for name, *_ in FIELDS)
    for name in dtype.names:
        field, offset = dtype.fields[name][:2]
        assert offset == end and offset % field.base.itemsize == 0, name
        assert field.base.byteorder in "<|=" and field.base.newbyteorder("<") == field.base, name
        end += field.itemsize
    assert end == dtype.itemsize


@pytest.mark.parametrize("size", SIZES)
def test_empty_rows(size):
    rows = empty_rows(3, size)
    assert rows["abi"].tolist() == [STATE_ABI] * 3 and rows["applied_offset"].tolist() == [-1] * 3
    assert rows["size"].tolist() == [list(SIZES).index(size)] * 3
    for name in set(rows.dtype.names) - {"abi", "applied_offset", "size"}:
        assert not rows[name].any(), name
    assert rows["h"].shape == (3, SIZES[size][0]) and rows["ring_ts"].shape == (3, SIZES[size][1])


@pytest.mark.parametrize("size", SIZES)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_row_comes_back_as_it_was(size, seed):
    body = a_row(size, seed)
    value = encode_row(body)
    assert len(value) == len(body) + 4
    assert decode_row(value, size) == body


@given(at=st.integers(0, 1019), flip=st.integers(1, 255))
def test_any_wrong_byte_is_found(at, flip):
    value = bytearray(encode_row(a_row("cpu")))
    value[at] ^= flip
    with pytest.raises(CorruptRowError, match="checksum"):
        decode_row(bytes(value))


@given(length=st.integers(0, 1019))
def test_a_row_cut_short_is_corrupt(length):
    with pytest.raises(CorruptRowError):
        decode_row(encode_row(a_row("cpu"))[:length])


def test_a_row_of_another_length_is_corrupt_though_its_checksum_is_right():
    for body in (a_row("cpu")[:-1], a_row("cpu") + b"\0", a_row("gpu")):
        with pytest.raises(CorruptRowError, match="size"):
            decode_row(encode_row(body), "cpu")
    with pytest.raises(CorruptRowError, match="size"):
        decode_row(encode_row(a_row("cpu")), "gpu")


def test_an_older_abi_is_migrated(monkeypatch):
    """As after a field was added: the rows of before are shorter."""
    monkeypatch.setattr(state, "STATE_ABI", 2)
    seen = []

    def widen(body: bytes, size: str) -> bytes:
        seen.append(size)
        return (2).to_bytes(2, "little") + body[2:] + b"\0" * 8

    monkeypatch.setitem(MIGRATIONS, 1, widen)
    new = a_row("cpu")
    old = (1).to_bytes(2, "little") + new[2:-8]
    got = decode_row(encode_row(old), "cpu")
    assert got == (2).to_bytes(2, "little") + old[2:] + b"\0" * 8
    assert seen == ["cpu"]
    with pytest.raises(CorruptRowError):  # a migration cannot save a row of the wrong length
        decode_row(encode_row(old[:-8]), "cpu")


@pytest.mark.parametrize("abi", [0, STATE_ABI + 1, 65535])
def test_an_unknown_abi_is_named(abi):
    body = abi.to_bytes(2, "little") + a_row("cpu")[2:]
    with pytest.raises(StateABIError, match=rf"state ABI {abi}; this version reads \[{STATE_ABI}\]"):
        decode_row(encode_row(body))


def test_both_errors_are_state_errors():
    assert issubclass(StateABIError, StateError) and issubclass(CorruptRowError, StateError)


def sparse_rows(size: str, seed: int, n: int, filled: float) -> np.ndarray:
    """Rows of this ABI of which about a share of the bytes is not zero."""
    rng = np.random.default_rng(seed)
    blob = rng.integers(0, 256, (n, row_dtype(size).itemsize), np.uint8)
    blob[rng.random(blob.shape) >= filled] = 0
    rows = blob.reshape(-1).view(row_dtype(size)).copy()
    rows["abi"] = STATE_ABI
    return rows


def values_of(columns: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[bytes | None]:
    buffer, at, length = columns
    blob = buffer.tobytes()
    return [blob[a : a + n] if n >= 0 else None for a, n in zip(at.tolist(), length.tolist(), strict=True)]


def columns_of(values: list[bytes | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    length = np.array([-1 if v is None else len(v) for v in values], np.int32)
    ends = np.cumsum(np.maximum(length, 0))
    return (
        np.frombuffer(b"".join(v or b"" for v in values), np.uint8),
        (ends - np.maximum(length, 0)).astype(np.int64),
        length,
    )


def packed_by_hand(body: bytes, size: str) -> bytes:
    """The packed form, written down plainly."""
    words = np.frombuffer(body, "<u4").copy()
    dtype, before = row_dtype(size), None
    singles = [dtype.fields[name][1] + 4 for name in ("last_ts", "first_ts", "session_start_ts")]
    uppers = singles + [dtype.fields["ring_ts"][1] + 8 * k + 4 for k in range(SIZES[size][1])]
    for upper in uppers:
        word = int(words[upper // 4])
        words[upper // 4] = word ^ before if before is not None else word
        before = word
    bitmap = sum(1 << i for i, word in enumerate(words) if word)
    n_mask_bytes = 4 * -(-len(words) // 32)
    packed = PACKED.to_bytes(2, "little") + len(body).to_bytes(2, "little") + bitmap.to_bytes(n_mask_bytes, "little")
    return encode_row(packed + b"".join(int(word).to_bytes(4, "little") for word in words if word))


@pytest.mark.parametrize("size", SIZES)
@settings(deadline=None)  # the first one compiles
@given(seed=st.integers(0, 2**32 - 1), filled=st.sampled_from([0.0, 0.02, 0.2, 0.6, 1.0]), n=st.integers(0, 5))
def test_rows_take_the_shorter_form_and_come_back_byte_for_byte(size, seed, filled, n):
    rows = sparse_rows(size, seed, n + 2, filled)
    slots = np.random.default_rng(seed).integers(0, len(rows), n)
    values = values_of(encode_rows(rows, slots))
    for value, slot in zip(values, slots.tolist(), strict=True):
        body = rows[slot].tobytes()
        packed = packed_by_hand(body, size)
        assert value == (packed if len(packed) < len(encode_row(body)) else encode_row(body))
        assert decode_row(value, size) == body
    got, status = decode_rows(*columns_of(values), size)
    assert status.tolist() == [OK] * n and got.tobytes() == rows[slots].tobytes()


def test_encode_rows_refuses_slots_outside_the_rows():
    for slot in (-1, 3):
        with pytest.raises(ValueError, match="outside"):
            encode_rows(empty_rows(3), np.array([0, slot]))


@pytest.mark.parametrize("size", SIZES)
@settings(deadline=None)
@given(data=st.data())
def test_decode_rows_takes_what_decode_row_takes_whatever_stands_beside_it(size, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    rows = sparse_rows(size, seed, 6, 0.1)
    values: list[bytes | None] = [*values_of(encode_rows(rows, np.arange(5))), encode_row(rows[5].tobytes())]
    sealed = st.binary(max_size=60).map(encode_row)
    marked = st.binary(max_size=80).map(
        lambda b: encode_row(PACKED.to_bytes(2, "little") + row_dtype(size).itemsize.to_bytes(2, "little") + b)
    )
    cut = st.builds(
        lambda v, n, m: encode_row(v[n : len(v) - 4 - m]), st.sampled_from(values), st.integers(0, 9), st.integers(0, 9)
    )
    flipped = st.builds(
        lambda v, i, x: v[: i % len(v)] + bytes([v[i % len(v)] ^ x]) + v[i % len(v) + 1 :],
        st.sampled_from(values),
        st.integers(0, 4000),
        st.integers(1, 255),
    )
    hostile = st.one_of(st.none(), st.binary(max_size=60), sealed, marked, cut, flipped)
    values = data.draw(st.permutations(values + data.draw(st.lists(hostile, max_size=8))))
    got, status = decode_rows(*columns_of(values), size)
    for i, value in enumerate(values):
        if value is None:
            assert status[i] == NULL
            continue
        try:
            body = decode_row(value, size)
        except StateError:
            assert status[i] == OTHER
        else:
            assert status[i] == OK and got[i].tobytes() == body


def test_decode_rows_reads_nothing_outside_the_buffer():
    buffer = np.frombuffer(encode_row(a_row("cpu")), np.uint8)
    at = np.array([0, 1, -1, -1020, 2**62, 0, 0], np.int64)
    length = np.array([1020, 1020, 1020, 1020, 1020, 2**31 - 1, -2], np.int32)
    assert decode_rows(buffer, at, length)[1].tolist() == [OK] + [OTHER] * 6


def test_a_packed_row_of_an_older_abi_is_migrated(monkeypatch):
    monkeypatch.setattr(state, "STATE_ABI", 2)
    monkeypatch.setitem(MIGRATIONS, 1, lambda body, size: (2).to_bytes(2, "little") + body[2:])
    row = empty_rows(1)
    row["abi"] = 1
    values = values_of(encode_rows(row, np.zeros(1, np.int64)))
    assert len(values[0]) < 100
    assert decode_rows(*columns_of(values))[1].tolist() == [OTHER]
    assert decode_row(values[0]) == (2).to_bytes(2, "little") + row.tobytes()[2:]
