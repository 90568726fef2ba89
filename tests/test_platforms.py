"""Platform files: what they make of events, what they refuse, and at which line a wrong file is refused."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import ConfigError, EventRefused, PlatformFileError
from models.events import HEADS, KINDS, MAX_TEXT, REFUSAL_REASONS, CanonicalEvent, platform_code
from streams.platforms import SHIPPED, Platform, load_platform, load_platforms
from streams.timeformat import MAX_TS_MS, TimeFormat, iso_format, pattern_format, unit_format
from streams.toml_lines import key_lines

NOW_MS = 1_700_000_000_000
TOLERANCE_MS = 300_000
UTC_ZONE = ZoneInfo("UTC")

MINIMAL = """
topics = ["t"]
heads = ["return"]
[kind]
path = "kind"
names = { v = "view", b = "purchase", x = "cancel" }
[time]
path = "ts"
unit = "ms"
[fields]
user = "user"
"""
FULL = MINIMAL.replace('heads = ["return"]', 'heads = ["click", "purchase", "return", "category"]') + (
    'item = "item"\ncategory = "category"\nbrand = "brand"\nprice = "price"\ncurrency = "currency"\n'
    'quantity = "quantity"\nsession = "session"\ntext = "text"\n'
)


def platform(tmp_path: Path, text: str, name: str = "shop") -> Platform:
    path = tmp_path / f"{name}.toml"
    path.write_text(text, "utf-8")
    return load_platform(path)


def canonical(of: Platform, event: object, now_ms: int = NOW_MS, offset: int = 7) -> CanonicalEvent:
    value = event if isinstance(event, bytes) or event is None else json.dumps(event).encode()
    return of.canonicalise(value, topic="t", partition=3, offset=offset, now_ms=now_ms, future_tolerance_ms=TOLERANCE_MS)


def refused(of: Platform, event: object) -> EventRefused:
    with pytest.raises(EventRefused) as caught:
        canonical(of, event)
    return caught.value


# --- any platform, any layout: the round trip -------------------------------------------------------------------------

WORD = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"]), min_size=1, max_size=12)
KEY = WORD.filter(lambda word: not word.isdigit())
ID = st.one_of(WORD, st.integers(-(10**20), 10**20), st.integers(-(10**12), 10**12).map(float))
AMOUNT = st.one_of(st.integers(0, 10**6), st.floats(0, 1e6), st.integers(0, 10**6).map(str))
PATTERNS = ("%Y-%m-%d %H:%M:%S.%f", "%d/%m/%Y %I:%M:%S %p", "%d-%b-%Y %H:%M:%S", "at %Y%m%d%H%M%S%z, 100%%")
FORMATS = ["s", "ms", "us", "ns", "iso", *PATTERNS]


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def put(event: dict, keys: list[str | int], value: object) -> None:
    """Builds objects and arrays on the way to `keys`."""
    here: object = event
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        fresh = value if following is None else [None] * 4 if isinstance(following, int) else {}
        if isinstance(here, list):
            here[key] = fresh if here[key] is None or following is None else here[key]
        elif following is None or key not in here:
            here[key] = fresh
        here = here[key]


def format_of(name: str, zone: ZoneInfo) -> tuple[TimeFormat, str]:
    if name in ("s", "ms", "us", "ns"):
        return unit_format(name), f'unit = "{name}"'
    made = iso_format(zone) if name == "iso" else pattern_format(name, zone)
    return made, f'format = "{name}"\nzone = "{zone.key}"'


@st.composite
def platforms_with_events(draw: st.DrawFn) -> tuple[str, dict, dict]:
    """→ (the platform file, an event of the platform, what its canonical event must hold)."""
    event: dict = {}
    tables: dict[str, str] = {}

    def place(name: str, value: object, modifiers: str = "", kind: str = "fields") -> str:
        """Puts the value under a first key of its own, at any depth below; → the source, as TOML."""
        below = draw(st.lists(st.one_of(KEY, st.integers(0, 3)), max_size=3))
        first = f"{draw(KEY)}-{name}"  # of its own, so that no two fields meet
        keys = [first, *below]
        put(event, keys, value)
        dotted = all("." not in str(key) for key in keys)
        if dotted and draw(st.booleans()):
            where = f"path = {quoted('.'.join(map(str, keys)))}"
        else:
            where = f"keys = [{', '.join(quoted(key) if isinstance(key, str) else str(key) for key in keys)}]"
        form = draw(st.sampled_from(["plain", "any"])) if kind == "fields" else "plain"
        if form == "any":
            absent = "{ path = 'no.such.0.field' }, "
            return f"{{ any = [{absent}{{ {where} }}]{modifiers} }}"
        return f"{{ {where}{modifiers} }}"

    expected: dict = {}
    kind, theirs = draw(st.sampled_from(KINDS)), draw(WORD)
    source = place("kind", theirs, kind="kind")
    tables["kind"] = source[1:-1].strip().replace(", names", "\nnames")
    expected["kind"] = kind

    time_name = draw(st.sampled_from(FORMATS))
    zone = ZoneInfo(draw(st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata", "America/New_York"])))
    time_format, spec = format_of(time_name, zone)
    ts = draw(st.integers(0, NOW_MS)) // time_format.resolution_ms * time_format.resolution_ms
    written = time_format.write(ts, draw(st.sampled_from([0, 0.0])) if time_name == "s" else 0)
    again = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ts)).astimezone(zone)
    expected["ts"] = ts - 3_600_000 if again.fold and time_name in PATTERNS[:3] else ts  # read as the first of the two
    expected["ts"] = ts if time_name == "iso" or "%z" in time_name else expected["ts"]
    if time_name == "iso" and not again.fold and draw(st.booleans()):
        written = again.replace(tzinfo=None).isoformat()
    tables["time"] = place("time", written, kind="time")[1:-1].strip() + "\n" + spec

    fields = {}
    for name in ("user", "event_id", "item", "category", "brand", "session"):
        present = name in ("user", "event_id") or draw(st.booleans())
        value = draw(ID) if present else draw(st.sampled_from([None, ""]))
        text = None if value in (None, "") else str(int(value)) if isinstance(value, float) else str(value)
        prefix = "" if name == "user" else draw(st.sampled_from(["", "rr:"]))
        fields[name] = place(name, value, f", prefix = '{prefix}'" if prefix else "")
        expected[name] = None if text is None else prefix + text
    for name in ("price", "quantity"):
        value = draw(st.one_of(st.none(), AMOUNT))
        scale = draw(st.sampled_from([1.0, 0.01]))
        fields[name] = place(name, value, "" if scale == 1.0 else f", scale = {scale}")
        expected[name] = None if value is None else float(value) * scale
    fields["currency"] = '{ literal = "EUR" }'
    expected["currency"] = None if expected["price"] is None else "EUR"
    words = draw(st.lists(WORD, max_size=3))
    parts = [place(f"text{i}", word, kind="part") for i, word in enumerate(words)]
    if parts:
        fields["text"] = f"{{ join = [{', '.join(parts)}], separator = ' / ' }}"
    expected["text"] = " / ".join(words) or None

    lines = ['name = "any"', 'topics = ["t"]', 'heads = ["return"]']
    lines += ["[kind]", tables["kind"], f"[kind.names]\n{quoted(theirs)} = '{kind}'"]
    lines += ["[time]", tables["time"], "[fields]", *(f"{name} = {source}" for name, source in fields.items())]
    return "\n".join(lines), event, expected


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=platforms_with_events())
def test_any_platform_round_trips_through_its_file(tmp_path_factory: pytest.TempPathFactory, made: tuple) -> None:
    text, event, expected = made
    shop = platform(tmp_path_factory.mktemp("p"), text, "any")
    out = canonical(shop, event)
    assert msgspec.to_builtins(out) == {
        "platform": "any",
        **{name: pytest.approx(v) if name in ("price", "quantity") else v for name, v in expected.items() if v is not None},
    }


# --- what becomes of values -------------------------------------------------------------------------------------------

GOOD = {"user": "u-1", "kind": "v", "ts": NOW_MS}


@pytest.mark.parametrize(
    ("raw", "text"),
    [("1234", "1234"), (1234, "1234"), (1234.0, "1234"), (-0.0, "0"), ("01234", "01234"), (" a", " a"), ("ä€😀", "ä€😀")],
)
def test_ids_become_text(tmp_path: Path, raw: object, text: str) -> None:
    event = canonical(platform(tmp_path, FULL), {**GOOD, "user": raw, "item": raw})
    assert (event.user, event.item) == (text, text)


def test_absent_null_and_empty_are_the_same(tmp_path: Path) -> None:
    shop = platform(tmp_path, FULL)
    optional = ("item", "category", "brand", "currency", "session", "text")
    events = [canonical(shop, {**GOOD, **extra}) for extra in ({}, dict.fromkeys(optional), dict.fromkeys(optional, ""))]
    assert events[0] == events[1] == events[2]
    assert [getattr(events[0], name) for name in (*optional, "price", "quantity")] == [None] * 8


def test_the_source_position_is_the_id_unless_the_file_opts_in(tmp_path: Path) -> None:
    by_place, by_content = platform(tmp_path, FULL), platform(tmp_path, 'event_id = "content_hash"\n' + FULL, "other")
    third = platform(tmp_path, 'event_id = "content_hash"\n' + FULL, "third")
    assert [canonical(by_place, GOOD, offset=offset).event_id for offset in (7, 8)] == ["t/3/7", "t/3/8"]
    twice = [canonical(by_content, GOOD, offset=offset).event_id for offset in (7, 8)]
    assert twice[0] == twice[1] != canonical(by_content, {**GOOD, "item": "i"}).event_id
    assert canonical(third, GOOD).event_id != twice[0], "equal bytes on two platforms are two events"


def test_the_sign_goes_from_a_cancel_only(tmp_path: Path) -> None:
    shop = platform(tmp_path, FULL)
    cancel = canonical(shop, {**GOOD, "kind": "x", "quantity": -3, "price": -2.5})
    assert (cancel.quantity, cancel.price) == (3.0, 2.5)
    assert refused(shop, {**GOOD, "kind": "b", "quantity": -3}).reason == "out_of_range"
    assert refused(shop, {**GOOD, "kind": "b", "price": -0.01}).reason == "out_of_range"
    for number in (1e300, -1e300, 1e13, -1e13):
        for field in ("quantity", "price"):
            assert refused(shop, {**GOOD, "kind": "x", field: number}).reason == "out_of_range"


def test_currency_goes_with_a_price_and_text_is_cut(tmp_path: Path) -> None:
    shop = platform(tmp_path, FULL)
    event = canonical(shop, {**GOOD, "currency": "EUR", "text": "x" * 2000})
    assert (event.price, event.currency, len(event.text)) == (None, None, MAX_TEXT)
    assert canonical(shop, {**GOOD, "currency": "EUR", "price": "19.90"}).currency == "EUR"


def test_sources(tmp_path: Path) -> None:
    shop = platform(
        tmp_path,
        MINIMAL
        + """
item = ["sku", { path = "lines.0.sku", prefix = "line:" }, { literal = "nothing" }]
category = { path = "group", map = { 7 = "toys", A = "apparel" }, otherwise = "rest", null = ["NA", "0"] }
brand = { path = "maker", map = { A = "Acme" } }
session = { join = ["a", "b"], separator = "" }
price = { path = "cents", scale = 0.01, divide_by = "n" }
quantity = { path = "n", null = ["-1"] }
text = { path = "title", words = { bag = "bags", bags = "bags", holder = "holders" } }
""",
    )

    def field(name: str, **event: object) -> object:
        return getattr(canonical(shop, {**GOOD, **event}), name)

    assert field("item", sku=5, lines=[{"sku": "l"}]) == "5"
    assert field("item", sku="", lines=[{"sku": "l"}]) == "line:l"
    assert [field("item", lines=x) for x in ([], {}, "text", [["sku"]], None)] == ["nothing"] * 5
    assert [field("category", group=x) for x in (7, "7", 7.0, "A", "B")] == ["toys", "toys", "toys", "apparel", "rest"]
    assert [field("category", group=x) for x in (None, "", "NA", 0)] == [None] * 4
    assert [field("brand", maker=x) for x in ("A", "B", 3)] == ["Acme", "B", "3"]
    assert [field("session", a="x", b=1), field("session", a=None, b="y"), field("session")] == ["x1", "y", None]
    assert field("price", cents=1000, n=4) == pytest.approx(2.5)
    assert [field("price", cents=1000, n=n) for n in (0, None, "")] == [None] * 3
    assert field("quantity", n=-1) is None
    title = "JUMBO BAG, candle Holder (red)"
    assert [field("text", title=x) for x in (title, "Bag for holders", "nothing", 3, None)] == (
        ["holders", "bags", None, None, None]
    )


@pytest.mark.parametrize(
    ("when", "kinds"),
    [
        ('{ path = "n", starts_with = "C" }', {"C1": 1, "c1": 0, "": 0, None: 0, 3: 0}),
        ('{ path = "n", starts_with = ["C", "3"] }', {"C1": 1, 3: 1, 33.0: 1, "X": 0}),
        ('{ path = "n", equals = 1 }', {1.0: 1, "1": 0, 2: 0, None: 0}),
        ('{ path = "n", equals = true }', {True: 1, "true": 0, False: 0}),
        ('{ path = "n", in = ["a", 2] }', {"a": 1, 2: 1, "2": 0, None: 0}),
        ('{ path = "n", present = true }', {"a": 1, 0: 1, "": 0, None: 0}),
        ('{ path = "n", present = false }', {"a": 0, None: 1}),
        ('{ path = "n", less_than = 0 }', {-1: 1, "-0.5": 1, 0: 0, "x": 0, None: 0}),
        ('{ path = "n", greater_than = 0.5 }', {1: 1, "1": 1, 0.5: 0, None: 0}),
        ('[{ path = "n", greater_than = 0 }, { path = "n", less_than = 5 }]', {3: 1, 5: 0, -3: 0}),
    ],
)
def test_kind_rules(tmp_path: Path, when: str, kinds: dict) -> None:
    _, rest = MINIMAL.split("[time]")
    rules = f'[[kind.rules]]\nkind = "cancel"\nwhen = {when}\n[[kind.rules]]\nkind = "purchase"\n[time]'
    shop = platform(tmp_path, f'topics = ["t"]\nheads = ["return"]\n{rules}{rest}')
    found = {value: canonical(shop, {**GOOD, "n": value}).kind for value in kinds}
    assert found == {value: "cancel" if holds else "purchase" for value, holds in kinds.items()}


def test_rules_without_a_rest_refuse(tmp_path: Path) -> None:
    _, rest = MINIMAL.split("[time]")
    rule = '[[kind.rules]]\nkind = "cancel"\nwhen = { path = "n", starts_with = "C" }\n[time]'
    shop = platform(tmp_path, f'topics = ["t"]\nheads = ["return"]\n{rule}{rest}')
    assert refused(shop, {**GOOD, "n": "D"}).reason == "unknown_kind"
    assert refused(shop, GOOD).reason == "missing"


# --- refusals ---------------------------------------------------------------------------------------------------------

SECRET = "jane.doe@example.org"


def with_field(**fields: object) -> bytes:
    return json.dumps({"user": SECRET, "kind": "v", "ts": NOW_MS, **fields}).encode()


def raw_field(text: str) -> bytes:
    return b'{"user":"' + SECRET.encode() + b'","kind":"v","ts":1700000000000,' + text.encode() + b"}"


REFUSALS: list[tuple[str, bytes | None]] = [
    ("not_utf8", b"\xff\xfe{}"),
    ("not_utf8", raw_field('"x":"@"').replace(b"@", b"\xff", 2)),
    ("not_utf8", b'{"user":"\xed\xa0\x80"}'),
    ("not_json", None),
    ("not_json", b""),
    ("not_json", b"{"),
    ("not_json", b"\xef\xbb\xbf{}"),
    ("not_json", with_field() + b" x"),
    ("not_json", raw_field('"price":NaN')),
    ("not_json", raw_field('"price":-Infinity')),
    ("not_json", raw_field('"item":"\\ud800"')),
    ("not_json", b'{"a":' + b"[" * 200_000),
    ("not_json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    ("not_object", b"[]"),
    ("not_object", b"null"),
    ("not_object", b'"' + SECRET.encode() + b'"'),
    ("not_object", b"17"),
    ("too_large", with_field(text="x" * (1 << 20))),
    ("missing", with_field(user=None)),
    ("missing", with_field(user="")),
    ("missing", with_field(kind=None)),
    ("missing", with_field(kind="")),
    ("missing", with_field(ts=None)),
    ("missing", with_field(ts="")),
    ("missing", b"{}"),
    ("wrong_type", with_field(user=True)),
    ("wrong_type", with_field(user={"id": SECRET})),
    ("wrong_type", with_field(user=[SECRET])),
    ("wrong_type", with_field(kind={"v": 1})),
    ("wrong_type", with_field(kind=True)),
    ("wrong_type", with_field(ts=True)),
    ("wrong_type", with_field(ts=[NOW_MS])),
    ("wrong_type", with_field(item={})),
    ("wrong_type", with_field(price="cheap")),
    ("wrong_type", with_field(price=[1])),
    ("wrong_type", with_field(quantity=False)),
    ("wrong_type", with_field(quantity="1,5")),
    ("out_of_range", with_field(user=1234.5)),
    ("out_of_range", with_field(user=1e300)),
    ("out_of_range", with_field(user=SECRET * 20)),
    ("out_of_range", with_field(user=10**300)),
    ("out_of_range", with_field(item="i" * 257)),
    ("out_of_range", with_field(price=-1)),
    ("out_of_range", with_field(price=1e13)),
    ("out_of_range", with_field(price="1e999")),
    ("out_of_range", raw_field('"price":1e999')),
    ("out_of_range", raw_field('"quantity":' + "9" * 400)),
    ("out_of_range", raw_field('"quantity":' + "9" * 5000)),
    ("out_of_range", with_field(quantity=2e9)),
    ("out_of_range", with_field(price=5, currency="a whole currency")),
    ("bad_time", with_field(ts="yesterday")),
    ("bad_time", with_field(ts=-1)),
    ("bad_time", with_field(ts=10**30)),
    ("bad_time", with_field(ts=1e300)),
    ("bad_time", with_field(ts=NOW_MS * 1000)),
    ("future", with_field(ts=NOW_MS + TOLERANCE_MS + 1)),
    ("unknown_kind", with_field(kind="refund")),
    ("unknown_kind", with_field(kind=SECRET)),
    ("unknown_kind", with_field(kind=7)),
]


@pytest.mark.parametrize(("reason", "value"), REFUSALS)
def test_refusals(tmp_path: Path, reason: str, value: bytes | None) -> None:
    error = refused(platform(tmp_path, FULL), value)
    assert error.reason == reason, error
    assert error.detail
    assert SECRET not in str(error) and SECRET not in repr(error.__cause__) + repr(error.__context__)


def test_every_reason_is_reached() -> None:
    assert {reason for reason, _ in REFUSALS} == set(REFUSAL_REASONS) - {"not_canonical"}


def test_the_last_moment_of_the_tolerance_is_accepted(tmp_path: Path) -> None:
    event = canonical(platform(tmp_path, FULL), {**GOOD, "ts": NOW_MS + TOLERANCE_MS})
    assert event.ts == NOW_MS + TOLERANCE_MS


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    assert "'refund'" in refused(platform(tmp_path, FULL), {**GOOD, "kind": "refund"}).detail


def test_an_event_id_of_the_platform_must_be_there(tmp_path: Path) -> None:
    shop = platform(tmp_path, MINIMAL + 'event_id = "id"\n')
    assert canonical(shop, {**GOOD, "id": 12}).event_id == "12"
    assert [refused(shop, {**GOOD, **x}).reason for x in ({}, {"id": None}, {"id": ""})] == ["missing"] * 3


JSON_VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=300)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)),
    max_leaves=8,
)
SHIPPED_PLATFORMS = load_platforms()


@settings(max_examples=300, deadline=None)
@given(data=st.data(), of=st.sampled_from(SHIPPED_PLATFORMS))
def test_nothing_but_a_valid_event_or_a_refusal_comes_out(data: st.DataObject, of: Platform) -> None:
    """Bytes, JSON, and the platform's own example with parts replaced: accepted events satisfy the contract."""
    example = example_of(of)
    for key in data.draw(st.lists(st.sampled_from(sorted(example)), max_size=3)):
        example[key] = data.draw(JSON_VALUE)
    value = data.draw(st.one_of(st.just(json.dumps(example).encode()), st.binary(max_size=60)))
    try:
        event = canonical(of, value, now_ms=2 * NOW_MS)
    except EventRefused as error:
        assert error.reason in REFUSAL_REASONS
    else:
        event.user = "k1" + "x" * 22
        again = msgspec.json.decode(msgspec.json.encode(event), type=CanonicalEvent)
        assert again == event and 0 <= event.ts <= MAX_TS_MS


def test_many_equal_one_by_one(tmp_path: Path) -> None:
    shop = platform(tmp_path, FULL)
    values = [with_field(item=i) if i % 3 else None for i in range(10)]
    many = shop.canonicalise_many(
        values, topic="t", partition=3, offsets=range(10), now_ms=NOW_MS, future_tolerance_ms=TOLERANCE_MS
    )
    for offset, (value, out) in enumerate(zip(values, many, strict=True)):
        if value is None:
            assert isinstance(out, EventRefused) and str(out) == str(refused(shop, value)) and out.__traceback__ is None
        else:
            assert out == canonical(shop, value, offset=offset)


def test_json_deeper_than_the_stack_is_refused_from_any_depth(tmp_path: Path) -> None:
    shop = platform(tmp_path, FULL)
    value = b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"

    def deeper(n: int) -> str:
        return deeper(n - 1) if n else refused(shop, value).reason

    assert deeper(sys.getrecursionlimit() - 500) == "not_json"


# --- times ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(ms=st.integers(0, MAX_TS_MS - 50_400_000), name=st.sampled_from(FORMATS), like=st.sampled_from([0, 0.0, "0"]))
def test_a_written_time_reads_as_it_was(ms: int, name: str, like: object) -> None:
    time_format, _ = format_of(name, UTC_ZONE)
    ms = ms // time_format.resolution_ms * time_format.resolution_ms
    if name in ("us", "ns") and isinstance(like, float):
        like = 0  # a float does not hold so many digits
    written = time_format.write(ms, like if name in ("s", "ms", "us", "ns") else 0)
    assert time_format.read(written) == ms
    assert type(written) is (type(like) if name in ("s", "ms", "us", "ns") else str)


@pytest.mark.parametrize(
    ("pattern", "zone", "text", "utc"),
    [
        ("%Y-%m-%d %H:%M:%S", "UTC", "2010-12-01 08:26:00", "2010-12-01T08:26:00+00:00"),
        ("%d/%m/%Y %H:%M:%S", "Europe/Berlin", "01/07/2024 09:15:27", "2024-07-01T07:15:27+00:00"),
        ("%d/%m/%Y %H:%M", "Europe/London", "1/12/2010 8:26", "2010-12-01T08:26:00+00:00"),
        ("%b %d %Y %I:%M%p", "America/New_York", "Mar 05 2024 12:05am", "2024-03-05T05:05:00+00:00"),
        ("%Y-%m-%dT%H:%M:%S.%f%z", "UTC", "2024-03-01T00:00:00.5-0530", "2024-03-01T05:30:00.500+00:00"),
        ("%Y-%m-%d", "Asia/Tokyo", "2024-03-01", "2024-02-29T15:00:00+00:00"),
        ("%Y-%m-%d %H:%M", "Europe/Berlin", "2024-10-27 02:30", "2024-10-27T00:30:00+00:00"),  # occurs twice
        ("%Y-%m-%d %H:%M", "Europe/Berlin", "2024-03-31 02:30", "2024-03-31T01:30:00+00:00"),  # does not occur
    ],
)
def test_patterns_read_local_times(pattern: str, zone: str, text: str, utc: str) -> None:
    ms = pattern_format(pattern, ZoneInfo(zone)).read(text)
    assert ms == round(datetime.fromisoformat(utc).timestamp() * 1000)


@pytest.mark.parametrize(
    "text", ["2024-13-01", "2024-02-30", "24-01-01", " 2024-01-01", "2024-01-01x", "٢٠٢٤-٠١-٠١", "", "1969-12-31"]
)
def test_patterns_refuse(text: str) -> None:
    with pytest.raises(EventRefused, match="bad_time"):
        pattern_format("%Y-%m-%d", UTC_ZONE).read(text)


@pytest.mark.parametrize(
    "text", ["", "now", "2024-02-30T00:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"]
)
def test_iso_refuses(text: str) -> None:
    for zone in ("UTC", "America/New_York"):
        with pytest.raises(EventRefused, match="bad_time"):
            iso_format(ZoneInfo(zone)).read(text)


def test_units_read_numbers_and_their_text() -> None:
    assert [unit_format("s").read(x) for x in (1, 1.5, "1", "1.5")] == [1000, 1500, 1000, 1500]
    assert unit_format("us").read(1_999) == 1 and unit_format("ns").read("1999999") == 1
    for bad in ("1_000", "١", "0x10", "9" * 50, "1e3"):
        with pytest.raises(EventRefused, match="bad_time"):
            unit_format("ms").read(bad)


# --- wrong files ------------------------------------------------------------------------------------------------------

WRONG = [  # (file; the culprit's line ends in "# <-"), part of the reason
    ("colour = 1 # <-\n" + MINIMAL, "unknown key"),
    ("topics = [ # <-", "not TOML"),
    ('topics = ["a"]\ntopics = ["b"] # <-\n' + MINIMAL, "not TOML"),
    (MINIMAL.replace('topics = ["t"]', ""), "topics: is missing"),
    (MINIMAL.replace('topics = ["t"]', "topics = [] # <-"), "must not be empty"),
    (MINIMAL.replace('topics = ["t"]', 'topics = "t" # <-'), "a list of texts"),
    (MINIMAL.replace('topics = ["t"]', 'topics = [\n  "t",\n  "a b", # <-\n]'), "no topic name"),
    (MINIMAL.replace('topics = ["t"]', 'topics = ["t", "t"] # <-'), "twice"),
    (MINIMAL.replace('heads = ["return"]', ""), "heads: is missing"),
    (MINIMAL.replace('"return"]', '"churn"] # <-'), "'churn' is not one of click"),
    (MINIMAL.replace('"return"]', '"category"] # <-'), "fields.category is absent"),
    (MINIMAL.replace('"return"]', '"purchase"] # <-').replace('"purchase", x', '"view", x'), "no kind is a purchase"),
    ('name = "no name" # <-\n' + MINIMAL, "1 to 64"),
    ("name = 5 # <-\n" + MINIMAL, "a text"),
    ('event_id = "id" # <-\n' + MINIMAL, "content_hash"),
    ('event_id = "source" # <-\n' + MINIMAL + 'event_id = "id"', "beside fields.event_id"),
    (MINIMAL.replace('path = "kind"\n', ""), "exactly one of path"),
    (MINIMAL.replace('path = "kind"\n', 'path = "kind"\nany = ["a"] # <-\n'), "exactly one of"),
    (MINIMAL.replace('b = "purchase", x = "cancel" }', 'b = "buy" } # <-'), "'buy' is not one of impression"),
    (MINIMAL.replace('names = { v = "view", b = "purchase", x = "cancel" }', ""), "names, rules or a literal"),
    (MINIMAL.replace("[kind]", "[kind]\nliteral = 'view'\nrule = 1 # <-"), "unknown key"),
    (MINIMAL.replace('unit = "ms"', 'unit = "min" # <-'), "one of s, ms, us, ns"),
    (MINIMAL.replace('unit = "ms"', 'unit = "ms"\nzone = "UTC" # <-'), "has no zone"),
    (MINIMAL.replace('unit = "ms"', 'unit = "ms"\nformat = "iso" # <-'), "exactly one of unit, format"),
    (MINIMAL.replace('unit = "ms"', 'format = "%Y-%m-%d %q" # <-'), "'%q' is not one of"),
    (MINIMAL.replace('unit = "ms"', 'format = "%H:%M" # <-'), "needs a year"),
    (MINIMAL.replace('unit = "ms"', 'format = "%Y-%m-%d %I" # <-'), "%I with %p"),
    (MINIMAL.replace('unit = "ms"', 'format = "iso"\nzone = "Mars/Base" # <-'), "IANA"),
    (MINIMAL.replace('unit = "ms"', 'format = "iso"\nzone = "../etc/passwd" # <-'), "IANA"),
    (MINIMAL.replace('path = "ts"', 'path = "ts"\nprefix = "a" # <-'), "unknown key"),
    (MINIMAL.replace('path = "ts"', 'any = ["a", { path = "b", prefix = "c" }] # <-'), "must be a path"),
    (MINIMAL.replace("[fields]", "[fields] # <-").replace('user = "user"', ""), "`user` is missing"),
    (MINIMAL.replace("[fields]", "").replace('user = "user"', ""), "[fields] is missing"),
    (MINIMAL + 'colour = "c" # <-', "unknown key"),
    (MINIMAL + "item = 5 # <-", "a path, a list of sources or a table"),
    (MINIMAL + 'item = "a..b" # <-', "empty part"),
    (MINIMAL + 'item = { path = "a", literal = "b" } # <-', "exactly one of"),
    (MINIMAL + 'item = { pfad = "a" } # <-', "unknown key"),
    (MINIMAL + "item = [] # <-", "must not be empty"),
    (MINIMAL + 'item = [\n  "a",\n  { path = "b", prefix = 5 }, # <-\n]', "a text"),
    (MINIMAL + "item = { keys = [0] } # <-", "the first key must be a name"),
    (MINIMAL + 'item = { keys = ["a", -1] } # <-', "count from 0"),
    (MINIMAL + 'item = { keys = ["a", true] } # <-', "a name or a position"),
    (MINIMAL + 'item = { path = "a", scale = 2 } # <-', "unknown key"),
    (MINIMAL + 'item = { path = "a", separator = "-" } # <-', "belongs to join"),
    (MINIMAL + 'item = { path = "a", otherwise = "-" } # <-', "belongs to map"),
    (MINIMAL + 'price = { path = "a", scale = 0 } # <-', "greater than 0"),
    (MINIMAL + 'price = { path = "a", divide_by = 3 } # <-', "a path, a list"),
    (MINIMAL + "[fields.text]\npath = 'a'\n[fields.text.words]\nBag = 'bag' # <-", "small letters"),
    (MINIMAL.replace('user = "user"', 'user = { path = "user", prefix = "x" } # <-'), "stays as the platform has it"),
    (MINIMAL + "item = " + "[" * 20 + '"a"' + "]" * 20 + " # <-", "nested more than 8"),
    (MINIMAL + '[replay]\nfile = "a.csv" # <-', "unknown key"),
    (MINIMAL + "[replay] # <-", "`files` is missing"),
    (MINIMAL + '[replay]\nfiles = ["../a.csv"] # <-', "inside the data directory"),
    (MINIMAL + '[replay]\nfiles = ["/a.csv"] # <-', "inside the data directory"),
    (MINIMAL + '[replay]\nfiles = ["a.pickle"] # <-', ".parquet, .csv or .jsonl"),
    (MINIMAL + '[replay]\nfiles = ["a.csv"]\ntopic = "other" # <-', "not one of the platform's topics"),
    (MINIMAL + '[replay]\nfiles = ["a.csv"]\n[[replay.join]] # <-\nfile = "b.csv"', "`on` is missing"),
]

RULES = 'topics = ["t"]\nheads = ["return"]\n{}\n[time]' + MINIMAL.split("[time]")[1]
WRONG += [
    (RULES.format("[kind]\nrules = [] # <-"), "must not be empty"),
    (RULES.format("[[kind.rules]] # <-\nwhen = { path = 'a', present = true }"), "`kind` is missing"),
    (RULES.format("[[kind.rules]] # <-\nkind = 'view'\n[[kind.rules]]\nkind = 'cancel'"), "never count"),
    (RULES.format("[[kind.rules]]\nkind = 'view'\nwhen = { path = 'a' } # <-"), "exactly one of starts_with"),
    (RULES.format("[[kind.rules]]\nkind = 'view'\nwhen = { path = 'a', matches = '(a+)+$' } # <-"), "exactly one of"),
    (RULES.format("[[kind.rules]]\nkind = 'view'\nwhen = { path = 'a', present = 1 } # <-"), "true or false"),
    (RULES.format("[[kind.rules]]\nkind = 'view'\nwhen = { path = 'a', less_than = '1' } # <-"), "a number"),
    (RULES.format("[[kind.rules]]\nkind = 'view'\n[kind.rules.when]\npath = 'a'\nequals = [1] # <-"), "must be a text"),
    (RULES.format("[[kind.rules]]\nkind = 'sale' # <-"), "'sale' is not one of"),
]


@pytest.mark.parametrize(("text", "reason"), WRONG)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(PlatformFileError) as caught:
        platform(tmp_path, text)
    error = caught.value
    assert reason in error.reason
    marked = [i for i, line in enumerate(text.splitlines(), 1) if line.endswith("# <-")]
    if marked:
        assert error.line == marked[0]
    assert str(error).startswith(f"{tmp_path / 'shop.toml'}:{error.line}: ")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    for name, reason in (("latin", "not UTF-8"), ("nowhere", "No such file")):
        with pytest.raises(PlatformFileError, match=reason):
            load_platform(tmp_path / f"{name}.toml")


def two(tmp_path: Path, first: str, second: str) -> PlatformFileError:
    (tmp_path / "a.toml").write_text(first)
    (tmp_path / "b.toml").write_text(second)
    with pytest.raises(PlatformFileError) as caught:
        load_platforms(tmp_path)
    assert caught.value.path.endswith("b.toml")
    return caught.value


def test_two_platforms_cannot_share(tmp_path: Path) -> None:
    def named(name: str, topic: str) -> str:
        return f'name = "{name}"' + MINIMAL.replace('["t"]', f'["{topic}"]')

    error = two(tmp_path, named("one", "x"), named("one", "y"))
    assert error.line == 1 and "already the name" in error.reason
    error = two(tmp_path, named("one", "x"), named("two", "x"))
    assert error.line == 2 and "belongs to 'one' already" in error.reason
    by_code: dict[int, str] = {}
    first, second = next(
        (by_code[code], f"p{i}")
        for i in range(10**5)
        if by_code.setdefault(code := platform_code(f"p{i}"), f"p{i}") != f"p{i}"
    )
    error = two(tmp_path, named(first, "x"), named(second, "y"))
    assert error.line == 1 and "16-bit code" in error.reason


def test_loading_by_name(tmp_path: Path) -> None:
    assert [p.name for p in load_platforms(SHIPPED, ["taobao", "rees46"])] == ["taobao", "rees46"]
    for folder, names in ((tmp_path / "nowhere", ()), (tmp_path, ()), (SHIPPED, ["taobao", "nobody"])):
        with pytest.raises(ConfigError):
            load_platforms(folder, names)


def test_lines_of_keys() -> None:
    text = textwrap.dedent(
        '''\
        # a = 1
        a.b = 1
        "q.\\" ]" = [ # ]
          1, "]", [2,
            { x = "}" , y = 3 }],
        ]
        s = """
        no = 1
        \\""" no = 2 """""
        t = 'c:\\'
        [one."two three"] # [no]
        k = 1979-05-27 07:32:00
        [[many]]
        v = 1
        [many.inner]
        w = 2
        [[many]]
        v = { deep = { er = [1] } }
        [[many.more]]
        z = 1
        '''
    )
    assert tomllib.loads(text)["many"][1]["more"] == [{"z": 1}]
    lines = key_lines(text)
    assert lines == {
        ("a",): 2, ("a", "b"): 2,
        ('q." ]',): 3, ('q." ]', 0): 4, ('q." ]', 1): 4, ('q." ]', 2): 4, ('q." ]', 2, 0): 4, ('q." ]', 2, 1): 5,
        ('q." ]', 2, 1, "x"): 5, ('q." ]', 2, 1, "y"): 5,
        ("s",): 7, ("t",): 10, ("one",): 11, ("one", "two three"): 11, ("one", "two three", "k"): 12,
        ("many",): 13, ("many", 0): 13, ("many", 0, "v"): 14, ("many", 0, "inner"): 15, ("many", 0, "inner", "w"): 16,
        ("many", 1): 17, ("many", 1, "v"): 18, ("many", 1, "v", "deep"): 18, ("many", 1, "v", "deep", "er"): 18,
        ("many", 1, "v", "deep", "er", 0): 18, ("many", 1, "more"): 19, ("many", 1, "more", 0): 19,
        ("many", 1, "more", 0, "z"): 20,
    }  # fmt: skip


# --- the files that ship ----------------------------------------------------------------------------------------------


def example_of(of: Platform) -> dict:
    """The event that the file's own comment shows."""
    comment = "".join(line.lstrip("# ") for line in of.path.read_text("utf-8").splitlines() if line.startswith("#   "))
    return json.JSONDecoder().raw_decode(re.sub(r"\.\.\.,", "", comment[comment.index("{") :]))[0]


@pytest.mark.parametrize("of", SHIPPED_PLATFORMS, ids=lambda p: p.name)
def test_the_example_in_a_shipped_file_is_accepted(of: Platform) -> None:
    event = canonical(of, example_of(of), now_ms=2 * NOW_MS)
    assert event.platform == of.name and event.user and event.item and event.kind in KINDS
    assert (event.category is not None) == ("category" in of.heads)
    assert of.heads == tuple(head for head in HEADS if head in of.heads)


def test_the_three_simulated_companies() -> None:
    bazaar, grocer, metro = (p for p in SHIPPED_PLATFORMS if p.name.startswith("sim_"))
    assert canonical(metro, example_of(metro), now_ms=2 * NOW_MS) == CanonicalEvent(
        event_id="mt-5d0c2f9e11", platform="sim_metro", user="M-4F7A21C9", kind="cart", ts=1709281527482,
        item="mt:p88123", category="mt:c1042", brand="mt:m17", price=349.0, currency="SEK", quantity=1.0,
        session="v-77120", text="Kettle 1.7 l",
    )  # fmt: skip
    assert canonical(bazaar, example_of(bazaar), now_ms=2 * NOW_MS).category == "electronics > audio > headphones"
    sold = example_of(grocer)
    back = canonical(grocer, {**sold, "InvoiceNo": "C100024", "Quantity": -2}, now_ms=2 * NOW_MS)
    assert (back.kind, back.quantity, back.ts) == ("cancel", 2.0, 1709280927000)
    assert canonical(grocer, sold, now_ms=2 * NOW_MS, offset=1).event_id == (
        canonical(grocer, sold, now_ms=2 * NOW_MS, offset=2).event_id
    )
    assert refused(grocer, {**sold, "InvoiceNo": None}).reason == "missing"
