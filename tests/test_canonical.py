"""The compiled way from raw records to canonical events gives what the plain one gives, or says that it is not sure."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_platforms import (
    FULL,
    GOOD,
    JSON_VALUE,
    MINIMAL,
    NOW_MS,
    REFUSALS,
    SHIPPED_PLATFORMS,
    TOLERANCE_MS,
    example_of,
    platform,
    platforms_with_events,
)

from models.config import PseudonymConfig
from models.errors import EventRefused
from models.events import CanonicalEvent
from streams.canonical import Canonicaliser, _copy, _copy_decimal, _copy_number, _digits_of, warm
from streams.codec import encode_json
from streams.platforms import Platform
from streams.pseudonym import Pseudonymiser
from streams.wire import Spans

PSEUDONYMISER = Pseudonymiser(PseudonymConfig(key="correct horse battery staple"))


def canonicaliser(of: Platform) -> Canonicaliser:
    return Canonicaliser(of, PSEUDONYMISER, fewest=0)


SHIPPED = [(of, canonicaliser(of)) for of in SHIPPED_PLATFORMS]
LATER_MS = 2 * NOW_MS
decode = msgspec.json.Decoder(CanonicalEvent).decode


def spans(values: list[bytes | None], between: bytes = b"") -> Spans:
    """One buffer, with other bytes between the values."""
    length = np.array([-1 if value is None else len(value) for value in values], np.int32)
    size = np.maximum(length, 0).astype(np.int64) + len(between)
    buffer = b"".join((value or b"") + between for value in values)
    return Spans(np.frombuffer(buffer, np.uint8), np.cumsum(size) - size, length)


def compared(of: Platform, fast: Canonicaliser, values: list[bytes | None], now_ms: int = LATER_MS) -> np.ndarray:
    """Holds that every event that the fast way is sure of is that of the plain one. → which it is sure of."""
    place = {"topic": "t", "partition": 3, "now_ms": now_ms, "future_tolerance_ms": TOLERANCE_MS}
    offsets = np.arange(len(values)) * 10**15 + 7
    found = fast(spans(values, b'"}'), offsets, **place)
    for i in np.flatnonzero(found.sure).tolist():
        event = of.canonicalise(values[i], offset=int(offsets[i]), **place)
        event.user = PSEUDONYMISER.of(of.name, event.user)
        at, length = int(found.values.at[i]), int(found.values.length[i])
        written = found.values.buffer[at : at + length].tobytes()
        assert decode(written) == event, (values[i], written)
        assert decode(written).price == event.price and decode(written).quantity == event.quantity
        assert found.ts_ms[i] == event.ts and found.users[i].tobytes() == event.user.encode()
        user_at = int(found.user_at[i])
        assert found.values.buffer[user_at : user_at + 24].tobytes() == event.user.encode()
        if b"\\" not in values[i]:
            assert written == encode_json(event)
    return found.sure


@pytest.mark.parametrize(("of", "fast"), SHIPPED, ids=lambda one: getattr(one, "name", ""))
def test_the_example_of_every_platform_file_goes_the_fast_way(of: Platform, fast: Canonicaliser):
    example = example_of(of)
    values = [json.dumps(example).encode(), json.dumps(example, indent=1, ensure_ascii=False).encode()] * 3
    assert compared(of, fast, values).all()


def mutated(rng: random.Random, value: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(value) + 1)
        how = rng.randrange(5)
        if how == 0:
            value = value[:at] + bytes([rng.randrange(256)]) + value[at + 1 :]
        elif how == 1:
            value = (
                value[:at]
                + rng.choice([b'"', b"\\", b",", b"{", b"}", b"0", b"-", b"e9", b".", b"\xc3\xa9", b" "])
                + value[at:]
            )
        elif how == 2:
            value = value[:at] + value[at + rng.randrange(1, 5) :]
        elif how == 3:
            value = value[:at]
        else:
            begin = rng.randrange(len(value) + 1)
            value = value[:at] + value[begin : begin + rng.randrange(40)] + value[at:]
    return value


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), which=st.integers(0, len(SHIPPED) - 1))
def test_hostile_bytes_cost_their_own_record_only(seed: int, which: int):
    of, fast = SHIPPED[which]
    rng = random.Random(seed)
    good = json.dumps(example_of(of), ensure_ascii=rng.random() < 0.5).encode()
    values = [mutated(rng, good) if i % 2 else good for i in range(60)]
    assert compared(of, fast, values)[::2].all()


@settings(max_examples=300, deadline=None)
@given(data=st.data(), which=st.integers(0, len(SHIPPED) - 1))
def test_odd_values_are_the_plain_ways_or_the_same(data: st.DataObject, which: int):
    of, fast = SHIPPED[which]
    values = []
    for _ in range(4):
        example = example_of(of)
        for key in data.draw(st.lists(st.sampled_from(sorted(example)), max_size=3)):
            example[key] = data.draw(JSON_VALUE)
        values.append(json.dumps(example, ensure_ascii=data.draw(st.booleans())).encode())
    compared(of, fast, values)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=platforms_with_events(), plain=st.booleans())
def test_any_platform(tmp_path_factory: pytest.TempPathFactory, made: tuple, plain: bool):
    text, event, _ = made
    of = platform(tmp_path_factory.mktemp("p"), text, "any")
    values = [json.dumps(event, ensure_ascii=plain).encode(), None, b"", json.dumps(event, indent=2).encode()]
    compared(of, canonicaliser(of), values)


NUMBERS = [
    "0",
    "-0",
    "-0.0",
    "1",
    "12.50",
    "0.07",
    "57",
    "29",
    "110",
    "1e2",
    "1E-3",
    "0.00001",
    "0.0001",
    "1e-7",
    "1000000000000",
    "1000000000000.1",
    "999999999999.99",
    "9007199254740993",
    "0.1234567890123456789",
    "0.30000000000000004",
    "-3",
    "-2.5",
    "1e300",
    "-1e13",
    '"12.5"',
    '"-1"',
    '"+5"',
    '"5."',
    '".5"',
    '"1e2"',
    '"007"',
    '""',
    '"NA"',
    "null",
    "true",
    "[1]",
    "123456789012345678",
    "1.0",
    "3.00",
    "1" + "0" * 40,
    '"' + "9" * 60 + '"',
]
ODD_SOURCES = """
event_id = ["id", { path = "other", prefix = "o-" }, { keys = ["deep", 1, "id"] }]
item = ["sku", { path = "lines.0.sku", prefix = "line:\\"é" }, { literal = "nothing" }]
category = { path = "group", map = { 7 = "toys", A = "app\\"arel" }, otherwise = "rest", null = ["NA", "0"] }
brand = { path = "maker", null = ["NA", "0", "17"] }
session = { join = ["a", "b"], separator = "é\\"" }
price = { path = "cents", scale = 0.01, divide_by = ["n", "m"] }
quantity = { path = "n", null = ["-1", "NA"] }
currency = ["cur", { literal = "EUR" }]
text = { path = "title", prefix = "é" }
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Platform, Canonicaliser]:
    of = platform(tmp_path_factory.mktemp("odd"), MINIMAL + ODD_SOURCES)
    return of, canonicaliser(of)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_modifier(odd: tuple[Platform, Canonicaliser], data: st.DataObject):
    raw = st.sampled_from(
        [*NUMBERS, '"A"', '"x\\ny"', '"\\u00e9"', '"\\ud83d\\ude00"', '"é😀"', '"' + "é" * 300 + '"', '"17"', "17.0"]
    )
    keys = st.sampled_from(
        ["id", "other", "sku", "group", "maker", "a", "b", "cents", "n", "m", "cur", "title", "user", "x", '"', "i\\u0064"]
    )
    values = []
    for _ in range(8):
        fields = data.draw(st.lists(st.tuples(keys, raw), max_size=12))
        kind = data.draw(st.sampled_from(["v", "b", "x"]))
        parts = [f'"{key}":{value}' for key, value in fields if key != '"']
        parts += [f'"kind":"{kind}"', f'"ts":{NOW_MS}', '"user":"u"', '"lines":[{"sku":"l"},{}]', '"deep":[0,{"id":5}]']
        data.draw(st.randoms(use_true_random=False)).shuffle(parts)
        values.append(("{" + ",".join(parts) + "}").encode())
    compared(*odd, values)


def test_every_modifier_goes_the_fast_way(odd: tuple[Platform, Canonicaliser]):
    event = {**GOOD, "id": "i", "group": 7, "maker": "17", "a": "x", "cents": 1000, "n": 3, "title": "é" * 600}
    values = [
        json.dumps({**event, **extra}, ensure_ascii=False).encode()
        for extra in ({}, {"n": -1, "kind": "x"}, {"id": None, "other": 4})
    ]
    assert compared(*odd, values).all()


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers(tmp_path: Path, number: str):
    of = platform(tmp_path, FULL)
    values = [f'{{"user":{user},"kind":"{kind}","ts":{NOW_MS},"{name}":{number},"item":{number}}}'.encode()
              for kind in "vbx" for name in ("price", "quantity") for user in ('"u"', number)]  # fmt: skip
    compared(of, canonicaliser(of), values)


@pytest.mark.parametrize(("reason", "value"), REFUSALS)
def test_what_is_refused_is_never_sure(tmp_path: Path, reason: str, value: bytes | None):
    of = platform(tmp_path, FULL)
    with pytest.raises(EventRefused, match=reason):
        of.canonicalise(value, topic="t", partition=3, offset=1, now_ms=NOW_MS, future_tolerance_ms=TOLERANCE_MS)
    assert not compared(of, canonicaliser(of), [value, value], NOW_MS).any()


TIMES = [
    "2024-03-01T09:25:27.482+01:00",
    "2024-03-01 09:25:27Z",
    "2024-02-29T00:00:00",
    "2023-02-29T00:00:00",
    "2024-10-27T02:30:00",
    "2024-03-31T02:30:00",
    "2024-03-01T09:25:27.4821+01:00",
    "2024-03-01T09:25:27.482999-00:30",
    "2024-03-01",
    "20240301T092527",
    "2024-03-01T24:00:00",
    "2024-03-01T23:59:60",
    "1969-12-31T23:59:59Z",
    "1970-01-01T00:00:00+05:00",
    "9999-12-31T23:59:59Z",
    "2024-03-01T09:25:27,482",
    "2024-13-01T00:00:00",
    "2024-00-01T00:00:00",
    "2024-3-1T9:5:7",
    "2024-03-01T09:25:27+01:00:30",
    "01/03/2024 09:15:27",
    "1/3/2024 9:15:27",
    "31/04/2024 00:00:00",
    "29/02/2000 23:59:59",
    "01/03/24 09:15:27",
    "",
]


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Asia/Kolkata", "Australia/Lord_Howe", "Africa/Monrovia"])
@pytest.mark.parametrize("pattern", ["iso", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %I:%M:%S %p", "%Y%m%d"])
def test_times(tmp_path: Path, pattern: str, zone: str):
    of = platform(tmp_path, MINIMAL.replace('unit = "ms"', f'format = "{pattern}"\nzone = "{zone}"'))
    fast = canonicaliser(of)
    rng = random.Random(5)
    write = of.time.format.write
    written = [write(rng.randrange(0, LATER_MS), 0) for _ in range(300)]
    written += [write(1_711_846_800_000 + i * 397_000, 0) for i in range(-40, 40)]  # around a change of the clock
    texts = [
        *TIMES,
        *written,
        *(text[:-1] for text in written),
        *(mutated(rng, text.encode()).decode("latin1") for text in written),
    ]
    sure = compared(of, fast, [json.dumps({**GOOD, "ts": text}).encode() for text in texts])
    assert sure[len(TIMES) : len(TIMES) + len(written)].mean() > 0.97


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize(
    "at", [0, 1, 1709281527, 1709281527482, 17092815274825, -1, 1709281527.4825, "1709281527", "1e3", 10**18, 1e300]
)
def test_counts_since_the_epoch(tmp_path: Path, unit: str, at: object):
    of = platform(tmp_path, MINIMAL.replace('"ms"', f'"{unit}"'))
    compared(of, canonicaliser(of), [json.dumps({**GOOD, "ts": at}).encode()])


def test_a_source_remembers_answers_and_no_user(tmp_path: Path):
    of = platform(tmp_path, MINIMAL + 'text = { path = "title", words = { bag = "bags" } }\n')
    fast = canonicaliser(of)
    values = [json.dumps({**GOOD, "user": f"user-{i}", "title": f"a bag {i % 5}"}).encode() for i in range(100)]
    assert compared(of, fast, values).all() and compared(of, fast, values[::-1]).all()
    (memory,) = fast._memories
    assert len(memory._known) == 5 and not any(b"user" in key for key in memory._known)
    peeking = platform(tmp_path, MINIMAL + 'text = { join = ["user", "title"] }\n', "peeking")
    slow = canonicaliser(peeking)
    assert not compared(peeking, slow, values).any() and not slow._memories


INVOICES = ["G1", "G1", "C1", "G2", "G", 12, None, 1.5, [1], ["x"], "", "Cé", "a" * 1100]


@settings(max_examples=100, deadline=None)
@given(of_row=st.lists(st.tuples(st.sampled_from(INVOICES), st.booleans()), max_size=30))
def test_rows_alike_have_one_answer(of_row: list[tuple]):
    of, fast = next(one for one in SHIPPED if one[0].name == "sim_grocer")
    good = example_of(of)
    values = [
        json.dumps({**good, "Description": f"{i % 3}", "InvoiceNo": invoice}).encode()[: -1 if broken else None]
        for i, (invoice, broken) in enumerate(of_row)
    ]
    sure = compared(of, fast, values)
    whole = [type(invoice) is str and 0 < len(invoice) < 9 and not broken for invoice, broken in of_row]
    assert not any(of_row[i][1] for i in np.flatnonzero(sure)) and sure[np.flatnonzero(whole)].all()


@settings(max_examples=200, deadline=None)
@given(source=st.binary(max_size=120), data=st.data())
def test_a_copy_stays_within_both_arrays(source: bytes, data: st.DataObject):
    at = data.draw(st.integers(0, len(source)))
    length = data.draw(st.integers(0, len(source) - at))
    position, behind = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    around = np.full(64 + position + length + behind, 0xAA, np.uint8)
    out = around[32 : len(around) - 32]
    assert _copy(out, position, np.frombuffer(source, np.uint8), at, length) == position + length
    assert out[position : position + length].tobytes() == source[at : at + length]
    assert (out[:position] == 0xAA).all() and (around[:32] == 0xAA).all() and (around[-32:] == 0xAA).all()


@settings(max_examples=200, deadline=None)
@given(
    number=st.one_of(st.integers(0, 2**63 - 1), st.integers(0, 18).map(lambda n: 10**n - (n > 9))), more=st.integers(0, 3)
)
def test_numbers_are_written_as_python_does(number: int, more: int):
    out, width = np.zeros(40, np.uint8), _digits_of(number) + more
    assert _copy_number(out, 3, number, width) == 3 + width
    assert (
        out[3 : 3 + width].tobytes().decode() == str(number).zfill(width)
        and not out[:3].any()
        and not out[3 + width :].any()
    )


@settings(max_examples=200, deadline=None)
@given(digits=st.integers(0, 10**15 - 1), decimals=st.integers(0, 6))
def test_decimals_are_written_as_short_as_they_go(digits: int, decimals: int):
    out = np.zeros(40, np.uint8)
    end = _copy_decimal(out, 2, digits, decimals)
    whole, rest = divmod(digits, 10**decimals)
    expected = f"{whole}." + (f"{rest:0{decimals}d}".rstrip("0") if decimals else "")
    assert out[2:end].tobytes().decode() == expected + "0" * expected.endswith(".")


def test_an_empty_batch_and_the_warming_up():
    warm()
    for of, fast in SHIPPED:
        assert compared(of, fast, []).size == 0


def test_few_records_are_left_to_the_plain_way():
    of, _ = SHIPPED[0]
    values = [json.dumps(example_of(of)).encode()] * 16
    assert not compared(of, Canonicaliser(of, PSEUDONYMISER), values[:15]).any()
    assert compared(of, Canonicaliser(of, PSEUDONYMISER), values).all()
