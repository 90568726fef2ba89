"""The row of user state: its layout, which must not change under an ABI, and its way through the changelog."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import state
from models.errors import CorruptRowError, StateABIError, StateError
from models.state import FIELDS, MIGRATIONS, SIZES, STATE_ABI, decode_row, empty_rows, encode_row, row_dtype

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
