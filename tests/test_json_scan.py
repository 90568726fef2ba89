"""The scanner finds what msgspec finds, or is not sure; it takes no record that msgspec refuses."""

from __future__ import annotations

import json
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.json_scan import (
    ABSENT,
    AT,
    DECIMALS,
    ESCAPED,
    FLOAT,
    INT,
    KIND,
    LENGTH,
    MANTISSA,
    MAX_DEPTH,
    NULL,
    OTHER,
    TEXT,
    compile_paths,
    scan,
)
from streams.platforms import step

PATHS = [("a",), ("b", "a"), ("b",), ("c", 1, "a"), ("a long name of a key",), ("é",), ("c", 0)]
TREE = compile_paths(PATHS)


def scanned(values: list[bytes], padding: bytes = b"") -> tuple[np.ndarray, np.ndarray]:
    length = np.array([len(value) for value in values], np.int32)
    buffer = np.frombuffer(b"".join(values) + padding, np.uint8)
    buffer.flags.writeable = False
    tokens = np.empty((len(values), len(PATHS), 5), np.int64)
    return scan(buffer, np.cumsum(length, dtype=np.int64) - length, length, TREE, tokens), tokens


def held(values: list[bytes], padding: bytes = b"") -> list[bool]:
    """Holds that what is sure is what msgspec reads. → which are sure."""
    sure, tokens = scanned(values, padding)
    whole = b"".join(values)
    for value, found in zip(np.array(values, object)[sure], tokens[sure], strict=True):
        event = msgspec.json.decode(value)
        for path, token in zip(PATHS, found.tolist(), strict=True):
            here = event
            for key in path:
                here = step(here, key)
            raw = whole[token[AT] : token[AT] + token[LENGTH]]
            kind = token[KIND]
            if kind in (ABSENT, NULL):
                assert here is None
            elif kind in (TEXT, ESCAPED):
                assert msgspec.json.decode(b'"' + raw + b'"') == here and (b"\\" in raw) == (kind == ESCAPED)
            else:
                assert msgspec.json.decode(raw) == here
                assert (kind != INT) or token[MANTISSA] == here
                assert (kind != FLOAT) or token[MANTISSA] == int(raw.replace(b".", b""))
                assert (kind != FLOAT) or token[DECIMALS] == len(raw) - raw.index(b".") - 1
    return sure.tolist()


KEYS = st.sampled_from(["a", "b", "c", "a long name of a key", "a long name of a kex", "é", "e", "", "0", "1", "abcdefgh"])
VALUE = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=30)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(st.dictionaries(KEYS, VALUE, max_size=8), min_size=1, max_size=5),
    plain=st.booleans(),
    indent=st.sampled_from([None, 1]),
    seed=st.integers(0, 2**32),
)
def test_values_and_broken_values(events: list[dict], plain: bool, indent: int | None, seed: int):
    rng = random.Random(seed)
    values = [json.dumps(event, ensure_ascii=plain, indent=indent).encode("utf-8", "replace") for event in events]
    held(values, b"x" * rng.randrange(9))
    for _ in range(10):
        broken = []
        for value in values:
            at = rng.randrange(len(value))
            new = rng.choice(
                [b"", bytes([rng.randrange(256)]), b'"', b"\\u12", b"\xed\xa0\x80", b"1e9", b"}", value[: at + 1]]
            )
            broken.append(value[:at] + new + value[at + rng.randrange(3) :])
        held(broken)


GOOD = [
    b"{}",
    b' {"a" : 1 } \n',
    b'{"a":"","b":{"a":null},"c":[{},{"a":-1.50}]}',
    b'{"x":[[[]],{}],"b":[{"a":1}],"a":true}',
    b'{"\xc3\xa9":"\xf0\x9f\x98\x80","a":"\\u00e9\\"\\n","a long name of a key":0}',
    b'{"x":1e-99,"y":0.12345678901234567890}',
    b'{"b":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b',"a":7}',
]
LEFT = [
    b"",
    b" ",
    b"[]",
    b"null",
    b"{",
    b'{"a"',
    b'{"a":',
    b'{"a":1',
    b'{"a":1,}',
    b'{"a":1}}',
    b'{"a":1} x',
    b"{,}",
    b'{"a" 1}',
    b'{"a":01}',
    b'{"a":-}',
    b'{"a":1.}',
    b'{"a":.5}',
    b'{"a":1e}',
    b'{"a":tru}',
    b'{"a":nul',
    b'{"a":"x}',
    b'{"a":"\t"}',
    b'{"a":"\\x"}',
    b'{"a":"\\u12g4"}',
    b'{"a":"\\ud83d\\ude00"}',
    b'{"a":"\xff"}',
    b'{"a":"\xc0\x80"}',
    b'{"a":"\xed\xa0\x80"}',
    b'{"a":"\xf4\x90\x80\x80"}',
    b'{"a":"\xe2\x82"}',
    b'{"a":1,"a":2}',
    b'{"b":{"a":1},"b":2}',
    b'{"\\u0061":1}',
    b'{"a":1e999}',
    b'{"a":' + b"9" * 400 + b"}",
    b'{"b":' + b"[" * 200 + b"]" * 200 + b"}",
    b'{"a":[1 2]}',
    b'{"a":[1,]}',
    b"{'a':1}",
    b"\xef\xbb\xbf{}",
    b'{"a":NaN}',
    b'{"a":Infinity}',
    b"{1:2}",
    b'{"a":]}',
    b'{"a":[}',
    b'{"a":{]}',
    b"\x00{}",
]


def test_what_is_taken_and_what_is_left():
    assert all(held(GOOD)) and all(held(GOOD, b"....")), "also where nothing lies behind the last record"
    assert not any(held(LEFT)) and not any(held(LEFT, b'"}' * 9)), "nothing behind a record counts"
    assert held([value for pair in zip(LEFT, GOOD * 9, strict=False) for value in pair])[1::2].count(False) == 0


def test_the_order_of_keys_may_change():
    first = [f'{{"a":{i},"b":{{"a":"{i}"}},"é":null}}'.encode() for i in range(4)]
    second = [f'{{"é":1,"b":{{"x":0,"a":"{i}"}},"c":[0,{{"a":2}}],"a":{i}}}'.encode() for i in range(4)]
    assert all(held([value for pair in zip(first, second, strict=True) for value in pair]))


@pytest.mark.parametrize(
    "text", ["0", "-1", "12.50", "999999999999999999", "0.10", "-0", "1234567890123456789", "1e5", "-0.0"]
)
def test_numbers(text: str):
    sure, tokens = scanned([b'{"a":' + text.encode() + b"}"])
    kinds = {"0": INT, "-1": INT, "999999999999999999": INT, "12.50": FLOAT, "0.10": FLOAT}
    assert sure.all() and tokens[0, 0, KIND] == kinds.get(text, OTHER)


def test_two_names_of_one_position_have_no_tree():
    assert compile_paths([("a", "0"), ("a", "00")]) is None
    assert compile_paths([("a", "0"), ("a", 0, "b")]) is not None
