"""What must never drift between versions: hashes, price buckets, codes of kinds, and the columns the fold reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.events import (
    EVENT,
    KIND_CODE,
    KINDS,
    PRICE_EDGES,
    CanonicalEvent,
    event_hash,
    hash32,
    hash64,
    platform_code,
    price_bucket,
    to_columns,
)

USER = "k1" + "A" * 22


def test_hashes_are_pinned():
    """Rows and models hold these hashes: another function or another version of it would orphan them all."""
    assert hash64("") == 0x2D06800538D394C2  # the published value of XXH3-64 of nothing
    assert hash64("a") == 0xE6C632B61E964E1F
    assert hash64("evt-1") == 0x517F7D200D98F32F
    assert hash64("Schuhe/Größe 42") == 0xE06DBA67442C8AD2
    assert hash32("a") == 0x1E964E1F and hash32("evt-1") == 0x0D98F32F
    assert platform_code("a") == 0x4E1F and platform_code("Schuhe/Größe 42") == 0x8AD2


def test_zero_stands_for_none_alone():
    assert hash32(None) == hash32("") == 0
    zero_in_16_bits = next(name for i in range(10**6) if not hash64(name := f"p{i}") & 0xFFFF)
    assert platform_code(zero_in_16_bits) == 1


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_hashes_fit_their_fields(text):
    assert 0 <= hash64(text) < 2**64
    assert 1 <= hash32(text) < 2**32
    assert 1 <= platform_code(text) < 2**16


def test_kind_codes_are_pinned():
    assert KINDS == ("impression", "view", "click", "favorite", "cart", "purchase", "cancel")
    assert list(KIND_CODE.items()) == [(kind, code) for code, kind in enumerate(KINDS)]


@pytest.mark.parametrize(
    ("price", "bucket"),
    [
        (None, 0),
        (0.0, 0),
        (-0.0, 0),
        (-3.0, 0),
        (math.nan, 0),
        (-math.inf, 0),
        (5e-324, 1),
        (0.01, 1),
        (0.02, 9),
        (0.64, 49),
        (10.24, 81),
        (PRICE_EDGES[-1], 255),
        (1e300, 255),
        (math.inf, 255),
    ],
)
def test_price_bucket(price, bucket):
    assert price_bucket(price) == bucket


def test_price_bucket_changes_at_its_edge():
    assert len(PRICE_EDGES) == 255 and PRICE_EDGES[0] == 0.01
    for k, edge in enumerate(PRICE_EDGES, start=1):
        assert price_bucket(edge) == k
        assert price_bucket(math.nextafter(edge, 0.0)) == max(1, k - 1)


@given(a=st.floats(min_value=0, exclude_min=True), b=st.floats(min_value=0, exclude_min=True))
def test_price_bucket_is_monotone(a, b):
    low, high = sorted((a, b))
    assert 1 <= price_bucket(low) <= price_bucket(high) <= 255


def test_layout_of_an_event_is_pinned():
    offsets = {
        "offset": 0,
        "ts": 8,
        "id": 16,
        "item": 24,
        "category": 28,
        "quantity": 32,
        "platform": 36,
        "kind": 38,
        "price": 39,
    }
    assert {name: EVENT.fields[name][1] for name in EVENT.names} == offsets
    assert EVENT.itemsize == 40


def test_to_columns():
    bare = CanonicalEvent(event_id="e1", platform="shop", user=USER, kind="view", ts=1_700_000_000_000)
    full = CanonicalEvent(
        event_id="e2",
        platform="market",
        user=USER,
        kind="cancel",
        ts=5,
        item="i",
        category="c",
        brand="b",
        price=10.24,
        currency="EUR",
        quantity=2.5,
        session="s",
        text="t",
    )
    columns = to_columns([bare, full], np.array([17, 2**40]))
    assert columns.dtype == EVENT
    assert columns.tolist() == [
        (17, 1_700_000_000_000, event_hash("shop", "e1"), 0, 0, 1.0, platform_code("shop"), 1, 0),
        (2**40, 5, event_hash("market", "e2"), hash32("i"), hash32("c"), 2.5, platform_code("market"), 6, 81),
    ]


def test_to_columns_of_nothing():
    assert to_columns([], np.empty(0, np.int64)).shape == (0,)


def test_a_quantity_of_zero_is_not_an_absent_one():
    event = CanonicalEvent(event_id="e", platform="p", user=USER, kind="view", ts=0, quantity=0.0)
    assert to_columns([event], np.zeros(1, np.int64))["quantity"][0] == 0.0


def test_the_same_id_on_two_platforms_is_two_events():
    assert event_hash("shop", "1") != event_hash("market", "1")
    assert event_hash("shop", "1") == 0x165ABADB2E665895
