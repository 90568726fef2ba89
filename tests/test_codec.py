"""Columns equal the plain form, partitions equal Kafka's, and what is no canonical event costs itself only."""

from types import SimpleNamespace

import numpy as np
from aiokafka.partitioner import murmur2
from hypothesis import given
from hypothesis import strategies as st

from models.events import KINDS, PSEUDONYM_LENGTH, CanonicalEvent, to_columns
from streams.codec import columns, decode_events, encode_json, partitions_of, warm

warm()  # compiling is no part of what is tested

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
users = st.text("abcXYZ019-_", min_size=PSEUDONYM_LENGTH, max_size=PSEUDONYM_LENGTH)
numbers = st.floats(-1e9, 1e9, width=32)
events = st.builds(
    CanonicalEvent,
    event_id=ids,
    platform=ids,
    user=users,
    kind=st.sampled_from(KINDS),
    ts=st.integers(0, 253402300799999),
    item=st.none() | ids,
    category=st.none() | ids,
    brand=st.none() | ids,
    price=st.none() | numbers,
    currency=st.none() | st.text("ABC", min_size=3, max_size=3),
    quantity=st.none() | numbers,
    session=st.none() | ids,
    text=st.none() | ids,
)


def record(key: bytes, value: bytes, offset: int = 0) -> SimpleNamespace:
    return SimpleNamespace(key=key, value=value, offset=offset)


@given(st.lists(events, max_size=8))
def test_every_field_survives_the_round_trip_and_columns_equal_the_plain_form(batch):
    records = [record(e.user.encode(), encode_json(e), i) for i, e in enumerate(batch)]
    decoded, good, refused = decode_events(records)
    assert decoded == batch and good == records and not refused
    offsets = list(range(len(batch)))
    assert columns(batch, offsets).tobytes() == to_columns(batch, np.array(offsets)).tobytes()


def test_a_record_that_is_no_canonical_event_costs_itself_only():
    event = CanonicalEvent(event_id='e"1\\ü\u2028', platform="p", user="k1" + "x" * 22, kind="view", ts=1)
    good = record(event.user.encode(), encode_json(event))
    wrong = [
        record(event.user.encode(), value)
        for value in (
            b"",
            None,
            b"[]",
            b"{",
            b"\xff",
            b"{} , {}",
            b"[" * 100_000,
            encode_json(event).replace(b'"view"', b'"look"'),
            encode_json(event)[:-1] + b',"ts":-1}',
            encode_json(event)[:-1] + b',"quantity":1e999}',
            encode_json(event)[:-1] + b',"user":"raw"}',
        )
    ] + [record(b"another", good.value), record(None, good.value)]
    decoded, kept, refused = decode_events([good, *wrong, good])
    assert decoded == [event, event] and kept == [good, good]
    assert [r for r, _ in refused] == wrong
    assert {error.reason for _, error in refused} == {"not_canonical"}


@given(st.lists(users, min_size=1, max_size=20), st.integers(1, 64))
def test_partitions_are_kafkas(keys, n):
    keys = [key.encode() for key in keys]
    assert partitions_of(keys, n).tolist() == [(murmur2(key) & 0x7FFFFFFF) % n for key in keys]
