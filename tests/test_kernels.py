"""The compiled codec says what msgspec says: of events it reads, of scores it writes, of hashes; whatever the bytes."""

import ctypes
import json
import mmap
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec import events, record

from models.events import KINDS, PRICE_EDGES, PSEUDONYM_LENGTH, CanonicalEvent, Probabilities, ScoreRecord, price_bucket
from models.scorer import Scores
from streams import codec, kernels
from streams.codec import (
    Decoded,
    columns,
    decode_columns,
    decode_events,
    encode_json,
    encode_scores,
    score_texts,
)
from streams.wire import Spans

codec.warm()  # compiling is no part of what is tested

USER = "k1" + "x" * (PSEUDONYM_LENGTH - 2)
PLAIN = CanonicalEvent(event_id="e1", platform="p", user=USER, kind="view", ts=1_750_000_000_000, item="i1", price=3.5)
NO_CATEGORY = np.full((1, 5), -1, np.int32)


def decode(records: list) -> Decoded:
    keys, values = Spans.of([r.key for r in records]), Spans.of([r.value for r in records])
    return decode_columns(keys, values, np.array([r.offset for r in records], np.int64))


def texts(decoded: Decoded) -> list[list[str]]:
    """event_id, user and platform of each event, out of the spans."""
    t = decoded.texts
    return [
        [
            json.loads((t.buffer[a : a + n] if a >= 0 else t.extra[~a : ~a + n]).tobytes())
            for a, n in zip(at, length, strict=True)
        ]
        for at, length in zip(t.at_M3.tolist(), t.length_M3.tolist(), strict=True)
    ]


def check(records: list) -> Decoded:
    """The columns are what `decode_events` and `columns` make of the records, and the same are refused for the same."""
    expected, good, refused = decode_events(records)
    decoded = decode(records)
    assert [records[i] for i in decoded.index] == good
    assert decoded.columns.tobytes() == columns(expected, [r.offset for r in good]).tobytes()
    assert texts(decoded) == [[e.event_id, e.user, e.platform] for e in expected]
    assert [decoded.platforms[i] for i in decoded.platform_M] == [e.platform for e in expected]
    assert len(set(decoded.platforms)) == len(decoded.platforms) == len({e.platform for e in expected})
    assert [(records[i], str(e), e.reason, e.detail) for i, e in decoded.refused] == [
        (r, str(e), e.reason, e.detail) for r, e in refused
    ]
    assert not any(e.__traceback__ for _, e in [*decoded.refused, *refused]), "its frames would keep the whole fetch"
    return decoded


def sure(*values: bytes, key: bytes = USER.encode()) -> list[bool]:
    """Whether the kernel itself knew each."""
    keys, spans, n = Spans.of([key] * len(values)), Spans.of(values), len(values)
    out = np.empty(n, codec.EVENT), np.empty((n, 3), np.int64), np.empty((n, 3), np.int32), np.empty(n, np.uint64)
    known = np.empty(n, np.bool_)
    found = kernels.parse_events(*codec._flat(keys), *codec._flat(spans), np.zeros(n, np.int64), *out, known)
    assert found == known.sum()
    return known.tolist()


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(st.lists(events, max_size=8))
def test_valid_events_are_what_msgspec_makes_of_them(batch):
    assert not check([record(e.user.encode(), encode_json(e), 7 + i) for i, e in enumerate(batch)]).refused


spaces = st.sampled_from(["", "", "", " ", "\n\t", "\r "])
digits = st.text("0123456789", min_size=1, max_size=20)
numbers = st.one_of(
    st.integers(-1000, 1000).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.tuples(st.sampled_from(["", "-"]), digits, st.sampled_from([".", "", "e", ".5E-"]), digits).map("".join),
    st.sampled_from(["-0", "0", "-0.0", "0.0", "01", "1.", ".5", "-", "1e5", "9007199254740993", "NaN", "1e999"]),
)
strings = st.one_of(
    st.text(max_size=9).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.text("aé漢😀", max_size=300).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.sampled_from([*map(json.dumps, KINDS), '"look"', '""', '"\\ud800"', '"a\tb"', '"\\u0061"', '"\\u00e9"']),
)
others = st.sampled_from(["null", "true", "false", "nul", "[]", "{}", '[{"a":[1]}]', "[1,]", ""])
names = st.sampled_from(
    [*CanonicalEvent.__struct_fields__, "other", "a longer name than any", "", "event_iD", "ts\\u0000", "\\u0074s", "é"]
)
NEEDED = [("event_id", '"e"'), ("platform", '"p"'), ("user", json.dumps(USER)), ("kind", '"cart"'), ("ts", "5")]
optional = st.one_of(
    st.tuples(st.sampled_from(["price", "quantity"]), numbers),
    st.tuples(st.sampled_from(["item", "category", "brand", "session", "text", "currency"]), strings | st.just("null")),
    st.tuples(names, strings | numbers | others),
)


@settings(max_examples=400, deadline=None)
@given(st.permutations(NEEDED), st.lists(optional, max_size=4), spaces, spaces, st.integers(0, 9))
def test_objects_in_any_order_and_form(needed, more, before, after, at):
    """Objects that are nearly events: some fields missing, some twice, some of anything."""
    fields = needed[: 5 if at else 4]
    fields[at:at] = more
    parts = [f'{before}"{name}"{after}:{before}{value}{after}' for name, value in fields]
    check([record(USER.encode(), (after + "{" + ",".join(parts) + "}" + before).encode())])


@settings(max_examples=400, deadline=None)
@given(events, st.data())
def test_a_changed_byte_costs_its_own_record_only(event, data):
    """Bytes are changed, dropped, repeated and cut off; the neighbours in the buffer are what they were."""
    good = encode_json(event)
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        if not broken:
            break
        i = data.draw(st.integers(0, len(broken) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                broken[i] = data.draw(st.integers(0, 255))
            case 1:
                del broken[i]
            case 2:
                broken[i:i] = broken[i : i + data.draw(st.integers(1, 9))]
            case _:
                del broken[i:]
    key = event.user.encode()
    decoded = check([record(key, good, 1), record(key, bytes(broken), 2), record(key, good, 3)])
    first, last = decoded.columns[0].copy(), decoded.columns[-1].copy()
    assert (first["offset"], last["offset"]) == (1, 3)
    first["offset"] = last["offset"] = 0
    assert first == last


@settings(deadline=None)
@given(st.lists(st.none() | st.binary(max_size=60), min_size=1, max_size=5), st.lists(st.none() | st.binary(max_size=30)))
def test_any_bytes_at_all(values, keys):
    keys = (keys + [USER.encode()] * len(values))[: len(values)]
    check([record(key, value, i) for i, (key, value) in enumerate(zip(keys, values, strict=True))])


@pytest.fixture(scope="module")
def guarded():
    """A page (uint8) at whose end the process may not go on reading: it would die."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    buffer = np.frombuffer(memory, np.uint8)
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(buffer.ctypes.data + page), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return buffer[:page]


@pytest.mark.parametrize("category", ["c", "Möbel > 椅子 > 😀"])
def test_every_beginning_of_an_event_where_the_buffer_ends(guarded, category):
    """Nothing is read beyond the buffer, and nothing found beyond the record."""
    event = msgspec.structs.replace(PLAIN, price=None, category=category)
    whole = np.frombuffer(encode_json(event), np.uint8)
    key, first = Spans.of([USER.encode()]), np.zeros(1, np.int64)
    for n in range(len(whole) + 1):
        guarded[-n - 1 :] = np.append(0, whole[:n])
        before, after = guarded[len(guarded) - n :], np.concatenate([whole, whole])
        for buffer in (before, after):
            decoded = decode_columns(key, codec.Spans(buffer, first, np.array([n], np.int32)), first)
            assert len(decoded.refused) == (n < len(whole)), n
    scores = Scores(np.zeros((1, 3), np.float32), NO_CATEGORY, np.zeros((1, 5), np.float32), np.zeros(1, np.float32))
    decoded = decode_columns(key, codec.Spans(before, first, np.array([n], np.int32)), first)
    written = encode_scores(decoded, np.arange(1), scores, np.zeros(1, np.bool_), score_texts("m", False, []), 1).tolist()
    assert json.loads(written[0])["platform"] == PLAIN.platform


@pytest.mark.parametrize("at, length", [(-1, 5), (0, 1000), (5, 2**31 - 1), (2**63 - 1, 5)])
def test_a_span_outside_of_its_buffer_is_refused(at, length):
    good = Spans.of([encode_json(PLAIN)])
    bad = codec.Spans(good.buffer, np.array([at], np.int64), np.array([length], np.int32))
    key = Spans.of([USER.encode()])
    for keys, values in ((key, bad), (bad, good)):
        with pytest.raises(ValueError, match="outside"):
            decode_columns(keys, values, np.zeros(1, np.int64))


def test_what_is_usual_does_not_need_msgspec():
    usual = [
        encode_json(PLAIN),
        encode_json(msgspec.structs.replace(PLAIN, category="Möbel > 椅子 > 😀", price=None, quantity=2.0, text="a/b")),
        json.dumps(msgspec.to_builtins(PLAIN) | {"new": "field", "other": None, "n": 12.5, "b": True}).encode(),
        b" " + json.dumps(msgspec.to_builtins(PLAIN), indent=1).encode() + b"\n",
        encode_json(msgspec.structs.replace(PLAIN, price=-12.25, currency="EUR", brand="b", session="s", item="")),
    ]
    assert sure(*usual) == [True] * len(usual)
    unusual = [
        encode_json(msgspec.structs.replace(PLAIN, item='"')),
        encode_json(msgspec.structs.replace(PLAIN, price=1e-9)),
        encode_json(PLAIN)[:-1] + b',"new":[1]}',
        encode_json(PLAIN)[:-1] + b',"ts":1}',
    ]
    assert sure(*unusual) == [False] * len(unusual)


def test_prices_at_the_edges():
    prices = [*PRICE_EDGES, *np.nextafter(PRICE_EDGES, 0).tolist(), 5e-324, 1e308, -1.0, 0.0]
    check([record(USER.encode(), encode_json(msgspec.structs.replace(PLAIN, price=price))) for price in prices])
    assert [kernels._price_bucket(price) for price in prices] == [price_bucket(price) for price in prices]


@settings(deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_price_buckets(price):
    assert kernels._price_bucket(price) == price_bucket(price)


def test_many_platforms_in_one_batch_are_told_apart():
    platforms = [f"p{i % 300}" for i in range(900)] + ['with "quotes"', "p1", 'with "quotes"']
    check(
        [record(USER.encode(), encode_json(msgspec.structs.replace(PLAIN, platform=p)), i) for i, p in enumerate(platforms)]
    )


@pytest.mark.parametrize("seed", range(4))
def test_hashes_of_every_length_are_xxh3(seed):
    rng = np.random.default_rng(seed)
    for n in range(1, kernels.MAX_HASHED_BYTES + 1):
        text = rng.bytes(n)
        assert kernels.hash_bytes(np.frombuffer(text, np.uint8)) == xxhash.xxh3_64_intdigest(text), n


@pytest.mark.parametrize("n", [0, kernels.MAX_HASHED_BYTES + 1])
def test_what_cannot_be_hashed_is_refused(n):
    with pytest.raises(ValueError, match="240"):
        kernels.hash_bytes(np.zeros(n, np.uint8))


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=60, max_size=256))
def test_long_ids_have_the_same_hash(text):
    changed = {"event_id": text, "item": text[:200], "category": text[::-1]}
    check([record(USER.encode(), encode_json(msgspec.structs.replace(PLAIN, **changed)))])


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


CATEGORIES = ["a", 'b"c', "Möbel > 椅子", ""]
probabilities = st.floats(0, 1, width=32) | st.sampled_from([np.nan, 0.0, 1.0, 5e-7, 4.9e-7, 1e-6, 0.9999996])
one_score = st.tuples(
    st.tuples(*[probabilities] * 3),
    st.lists(st.integers(0, len(CATEGORIES) - 1), max_size=5),
    st.tuples(*[probabilities] * 5),
    probabilities | st.floats(-5, 5, width=32) | st.sampled_from([-0.0, np.inf, -1e-9, 123456.79]),
    st.booleans(),
)


def plain_scores(
    batch: list, take: list, scores: Scores, cold: list, degraded: bool, now_ms: int, explain: list
) -> list[bytes]:
    """The plain form: one `ScoreRecord` after another, through msgspec."""
    p, shift, top_p = (
        np.round(a.astype(np.float64), 6).tolist() for a in (scores.p_N3, scores.shift_N, scores.category_p_N5)
    )
    out = []
    for i in take:
        event, top = batch[i], [CATEGORIES[c] for c in scores.category_N5[i] if c >= 0]
        score = ScoreRecord(
            schema=1,
            event_id=event.event_id,
            user=event.user,
            platform=event.platform,
            ts=event.ts,
            scored_at=now_ms,
            model='m"x/1',
            p=Probabilities(click=p[i][0], purchase=p[i][1], return_=p[i][2]),
            churn=round(1.0 - p[i][2], 6),
            categories=list(zip(top, top_p[i], strict=False)),
            interest_shift=shift[i],
            cold=cold[i],
            degraded=degraded,
            explain=explain[i],
        )
        out.append(encode_json(score))
    return out


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(events, one_score), min_size=1, max_size=6), st.booleans(), st.integers(0, 2**41), st.data())
def test_scores_are_what_msgspec_writes(rows, degraded, now_ms, data):
    batch, answers = [event for event, _ in rows], [answer for _, answer in rows]
    p, top, top_p, shift, cold = (list(column) for column in zip(*answers, strict=True))
    scores = Scores(
        np.array(p, np.float32),
        np.array([[*t, *[-1] * 5][:5] for t in top], np.int32),
        np.array(top_p, np.float32),
        np.array(shift, np.float32),
    )
    why = st.sampled_from([msgspec.UNSET, [], [{"head": "click", "older": 0.5, "events": [], "features": []}]])
    explain = [data.draw(why) for _ in rows]
    take = np.flatnonzero([data.draw(st.integers(0, 4)) > 0 for _ in rows])
    decoded = decode([record(e.user.encode(), encode_json(e), i) for i, e in enumerate(batch)])
    model = score_texts('m"x/1', degraded, CATEGORIES)
    written = encode_scores(decoded, take, scores, np.array(cold), model, now_ms, explain).tolist()
    expected = plain_scores(batch, take.tolist(), scores, cold, degraded, now_ms, explain)
    assert [repr(msgspec.json.decode(value)) for value in written] == [repr(msgspec.json.decode(v)) for v in expected]
    without = encode_scores(decoded, take, scores, np.array(cold), model, now_ms).tolist()
    assert [json.loads(v) for v in without] == [
        {name: x for name, x in json.loads(v).items() if name != "explain"} for v in expected
    ]
    for value in written:
        msgspec.json.decode(value)


@pytest.mark.parametrize("start", range(0, 1_000_001, 100_000))
def test_every_millionth_is_the_double_that_rounding_makes(start):
    p = (np.arange(start, min(start + 100_000, 1_000_001)) / 1e6).astype(np.float32)
    p = np.resize(p, (len(p) // 3 + 1, 3))
    n = len(p)
    decoded = decode([record(USER.encode(), encode_json(PLAIN))])
    one = Decoded(*decoded)._replace(
        columns=np.repeat(decoded.columns, n),
        texts=decoded.texts._replace(
            at_M3=np.repeat(decoded.texts.at_M3, n, axis=0), length_M3=np.repeat(decoded.texts.length_M3, n, axis=0)
        ),
    )
    none = np.full((n, 5), -1, np.int32)
    scores = Scores(p, none, np.zeros((n, 5), np.float32), p[:, 0].copy())
    written = encode_scores(one, np.arange(n), scores, np.zeros(n, np.bool_), score_texts("m", False, []), 1)
    records = msgspec.json.Decoder(ScoreRecord)
    found = [records.decode(value) for value in written.tolist()]
    rounded = np.round(p.astype(np.float64), 6)
    assert [[s.p.click, s.p.purchase, s.p.return_] for s in found] == rounded.tolist()
    assert [s.churn for s in found] == [round(1.0 - x, 6) for x in rounded[:, 2].tolist()]
    assert [s.interest_shift for s in found] == rounded[:, 0].tolist()


def one_scored(**changed: np.ndarray) -> bytes:
    decoded = decode([record(USER.encode(), encode_json(PLAIN))])
    scores = Scores(np.zeros((1, 3), np.float32), NO_CATEGORY, np.zeros((1, 5), np.float32), np.zeros(1, np.float32))
    scores = scores._replace(**changed)
    texts = score_texts("m", False, CATEGORIES)
    return encode_scores(decoded, np.arange(1), scores, np.zeros(1, np.bool_), texts, 1).tolist()[0]


@pytest.mark.parametrize("at, length", [(0, 1000), (2**62, 2), (-1, 2), (0, -1)])
def test_a_text_outside_of_its_buffer_is_not_written(at, length):
    decoded = decode([record(USER.encode(), encode_json(PLAIN))])
    texts = decoded.texts._replace(at_M3=np.full((1, 3), at), length_M3=np.full((1, 3), length, np.int32))
    scores = Scores(np.zeros((1, 3), np.float32), NO_CATEGORY, np.zeros((1, 5), np.float32), np.zeros(1, np.float32))
    model, cold = score_texts("m", False, []), np.zeros(1, np.bool_)
    with pytest.raises(ValueError, match="outside"):
        encode_scores(decoded._replace(texts=texts), np.arange(1), scores, cold, model, 1)


def test_fields_come_in_the_order_of_the_record():
    assert tuple(json.loads(one_scored())) == ScoreRecord.__struct_encode_fields__[:-1]


@pytest.mark.parametrize(
    "changed, why",
    [
        ({"category_N5": np.full((1, 5), len(CATEGORIES), np.int32)}, "no name"),
        ({"shift_N": np.full(1, 1e30, np.float32)}, "too large"),
        ({"p_N3": np.zeros((2, 3), np.float32)}, "fit"),
        ({"category_p_N5": np.zeros((1, 4), np.float32)}, "fit"),
    ],
)
def test_scores_that_make_no_record_are_refused(changed, why):
    with pytest.raises(ValueError, match=why):
        one_scored(**changed)


def test_arrays_of_any_kind_meet_the_kernels_that_warming_compiled():
    """Buffers that can be written to or not, columns with gaps between: a second compilation would stop a worker."""
    keys, values = Spans.of([USER.encode(), None] * 2), Spans.of([encode_json(PLAIN), b""] * 2)
    for buffer in (values.buffer, values.buffer.copy()):
        apart = codec.Spans(buffer, values.at[::2], values.length[::2])
        decoded = decode_columns(keys.take(np.array([0, 2])), apart, np.arange(4)[::2])
        assert decoded.columns["offset"].tolist() == [0, 2]
        zero = np.zeros((2, 10), np.float32)
        scores = Scores(zero[:, :3], zero[:, ::2].astype(np.int32), zero[:, ::2], zero[:, 0])
        texts, cold = score_texts("m", True, CATEGORIES), np.zeros(4, np.bool_)[::2]
        assert len(encode_scores(decoded, np.arange(2), scores, cold, texts, 1).tolist()) == 2
    assert [len(k.signatures) for k in (kernels.parse_events, kernels.number_names, kernels.write_scores)] == [1, 1, 1]


def test_kernels_come_from_the_cache_in_the_next_process():
    program = "from streams import codec, kernels; codec.warm(); print(*(sum(k.stats.cache_misses.values()) for k in ("
    program += "kernels.parse_events, kernels.number_names, kernels.write_scores)))"
    root = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=250, check=True)
    assert ran.stdout.split() == ["0", "0", "0"]
