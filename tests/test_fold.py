"""The fold against its plain reference, and the properties that recovery and the trainer rely on."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from fold_reference import Event, Reference
from hypothesis import given, settings
from hypothesis import strategies as st

from models import fold as fold_module
from models.config import FoldConfig
from models.events import CART, EVENT, KIND_CODE, PURCHASE, VIEW
from models.fold import (
    DUPLICATE,
    FEATURE_NAMES,
    FEATURE_VERSION,
    FOLDED,
    N_FEATURES,
    REPLAYED,
    TOO_LATE,
    fold,
    fold_params,
    refold_rings,
    starts_afresh,
)
from models.state import SIZES, empty_rows

PARAMS = fold_params(FoldConfig())
SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000
START_MS = 1_700_000_000_000
IN_RING = [name for name in empty_rows(1).dtype.names if name.startswith("ring_")]


def events_of(*events: dict) -> np.ndarray:
    """EVENT records, by default views at the same time, with offset and id by place."""
    out = np.zeros(len(events), EVENT)
    for i, event in enumerate(events):
        values = {"offset": i, "ts": START_MS, "id": 1000 + i, "quantity": 1.0, "platform": 7, "kind": VIEW} | event
        for name, value in values.items():
            out[i][name] = value
    return out


def run(rows, events, slots=None, params=PARAMS):
    """→ (features, dt_s, status) of one batch."""
    n = len(events)
    features, dt_s = np.full((n, N_FEATURES), np.nan, np.float32), np.full(n, np.nan, np.float32)
    status = np.full(n, 99, np.uint8)
    fold(rows, np.zeros(n, np.int64) if slots is None else slots, events, params, features, dt_s, status)
    return features, dt_s, status


def feature(features, name):
    return features[..., FEATURE_NAMES.index(name)]


# Steps in ms between an event and the user's one before: around every limit of the rules, and backwards.
# A product, because Hypothesis favours the small integers of a wide range.
units_ms = st.sampled_from([1, SECOND, MINUTE, HOUR, DAY])
limits_ms = st.sampled_from([0, 30 * MINUTE, 30 * MINUTE + 1, 7 * DAY, 7 * DAY + 1, DAY + 1, 180 * DAY, 180 * DAY + 1])
steps_ms = st.one_of(
    limits_ms,
    st.tuples(units_ms, st.integers(0, 40)).map(math.prod),
    st.tuples(units_ms, st.integers(-20, 0)).map(math.prod),
)
gaps_ms = st.tuples(units_ms, st.integers(0, 90)).map(math.prod)
quantities = st.one_of(st.floats(width=32), st.integers(1, 9).map(float))
drawn_events = st.tuples(
    st.sampled_from([0, 0, 0, 0, 1, 2]),  # user: one with enough events to fill the ring
    steps_ms,
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 30)),  # id; None: a new one
    st.integers(0, 4),  # item
    st.integers(0, 12),  # category: more than the mixes have room for
    quantities,
    st.sampled_from([7, 8]),  # platform
    st.sampled_from([0, 1, 2, 3, 4, 4, 5, 5, 6]),  # kind
    st.sampled_from([0, 1, 90, 255]),  # price
    st.sampled_from([1] * 12 + [-1, -3]),  # step of the offset
)
# Left to itself, Hypothesis draws lists of about five, which fill no ring.
drawn_streams = st.integers(1, 90).flatmap(lambda n: st.lists(drawn_events, min_size=n, max_size=n))
never_idle = fold_params(FoldConfig(idle_ttl_s=math.inf))
quick_params = fold_params(FoldConfig(lateness_s=60, session_gap_s=60, return_horizon_s=3600, idle_ttl_s=2 * 86400))
some_params = st.sampled_from([PARAMS, never_idle, quick_params])


def stream_of(drawn) -> tuple[np.ndarray, np.ndarray]:
    """Drawn events → (events, slots of 3 users). Offsets go back at times, as in a replay."""
    events, slots = np.zeros(len(drawn), EVENT), np.zeros(len(drawn), np.int64)
    ts, offset = {}, 0
    for i, (user, step, event_id, item, category, quantity, platform, kind, price, offset_step) in enumerate(drawn):
        ts[user] = max(0, ts.get(user, START_MS) + step)
        offset = max(0, offset + offset_step)
        new_id = 2**63 + 7919 * i % 2**20
        events[i] = (
            offset, ts[user], new_id if event_id is None else event_id, item, category, quantity, platform, kind, price
        )  # fmt: skip
        slots[i] = user
    return events, slots


def assert_equals_reference(events, slots, params, size) -> tuple[np.ndarray, np.ndarray]:
    """→ features, status"""
    rows = empty_rows(3, size)
    features, dt_s, status = run(rows, events, slots, params)
    users = [Reference(params, size) for _ in range(3)]
    for i, event in enumerate(events):
        want_status, want, want_dt_s = users[slots[i]].fold(Event(*event.tolist()))
        assert status[i] == want_status
        assert dt_s[i] == np.float32(want_dt_s)
        assert set(want) == set(FEATURE_NAMES)
        np.testing.assert_allclose(features[i], [want[name] for name in FEATURE_NAMES], rtol=1e-6, atol=1e-6)
    want_rows = np.concatenate([user.row() for user in users])
    for name in rows.dtype.names:
        assert rows[name].tobytes() == want_rows[name].tobytes(), (name, rows[name], want_rows[name])
    return features, status


@settings(max_examples=60, deadline=None)
@given(drawn=drawn_streams, params=some_params, size=st.sampled_from(list(SIZES)))
def test_kernel_equals_reference(drawn, params, size):
    assert_equals_reference(*stream_of(drawn), params, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("params", [PARAMS, quick_params, never_idle], ids=["default", "quick", "never_idle"])
def test_kernel_equals_reference_on_a_long_stream(params, size):
    """Hypothesis finds the corners; this makes sure that every rule has been gone through, often."""
    rng = np.random.default_rng(5)
    n = 1500
    events = np.zeros(n, EVENT)
    events["offset"] = np.arange(n) - rng.choice([0, 0, 0, 0, 0, 0, 9], n)
    steps = rng.choice([0, 20 * SECOND, 5 * MINUTE, HOUR, 9 * HOUR, 3 * DAY, -20 * MINUTE, -2 * DAY], n)
    far = rng.random(n) < 0.01
    events["ts"] = START_MS + np.cumsum(np.where(far, 181 * DAY, steps * rng.random(n)).astype(np.int64))
    events["id"] = rng.integers(0, 2**64, n, dtype=np.uint64)
    events["id"][20:] = np.where(rng.random(n - 20) < 0.1, events["id"][:-20], events["id"][20:])
    events["item"], events["category"] = rng.integers(0, 9, n), rng.integers(0, 14, n)
    events["kind"], events["price"] = rng.integers(0, 7, n), rng.integers(0, 256, n)
    events["platform"], events["quantity"] = rng.integers(7, 9, n), rng.integers(1, 20, n)
    features, status = assert_equals_reference(events, rng.integers(0, 3, n), params, size)
    seen = set(status.tolist())
    assert seen >= {FOLDED, REPLAYED, DUPLICATE}
    assert TOO_LATE in seen
    assert (starts_afresh(features, status).sum() > 10) == (params != never_idle)


def test_a_mix_forgets_a_category_that_has_faded():
    # 5 years: without an idle limit, the short mix and then the long one fade to nothing.
    events = events_of({"category": 3}, {"ts": START_MS + 50 * DAY, "category": 4}, {"ts": START_MS + 5 * 365 * DAY})
    rows = empty_rows(1)
    run(rows, events[:2], params=never_idle)
    assert rows["mix_long_category"][0, :3].tolist() == [3, 4, 0]
    assert rows["mix_short_category"][0, :2].tolist() == [4, 0]
    features, _, _ = run(rows, events[2:], params=never_idle)
    assert not rows["mix_long_category"].any() and not rows["mix_long_weight"].any()
    assert rows["counts"].sum() == 4.0  # the new event alone
    assert feature(features, "category_share_long")[0] == 0.0


def test_a_full_mix_gives_up_its_lightest_category():
    old = [{"category": c, "ts": START_MS + c * HOUR} for c in range(1, 9)]
    rows = empty_rows(1)
    run(rows, events_of(*old, {"category": 2, "ts": START_MS + 8 * HOUR}, {"category": 99, "ts": START_MS + 9 * HOUR}))
    assert rows["mix_long_category"][0].tolist() == [99, 2, 3, 4, 5, 6, 7, 8]
    # A late event whose own weight is less than the lightest takes no place.
    run(rows, events_of({"offset": 99, "id": 99, "category": 77, "ts": START_MS - DAY}))
    assert 77 not in rows["mix_long_category"][0]
    # Nor does one that is just as heavy.
    rows = empty_rows(1)
    run(rows, events_of(*({"category": c} for c in range(1, 10))))
    assert rows["mix_long_category"][0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows["mix_short_category"][0].tolist() == [1, 2, 3, 4]


@settings(max_examples=40, deadline=None)
@given(drawn=drawn_streams, data=st.data())
def test_replay_from_any_offset_changes_nothing(drawn, data):
    events, slots = stream_of(drawn)
    events["offset"] = np.arange(len(events))
    rows = empty_rows(3)
    run(rows, events, slots)
    before = rows.tobytes()
    start = data.draw(st.integers(0, len(events) - 1))
    features, dt_s, status = run(rows, events[start:], slots[start:])
    assert rows.tobytes() == before
    assert (status == REPLAYED).all()
    assert (dt_s == 0).all()
    assert np.isfinite(features).all()


@settings(max_examples=40, deadline=None)
@given(drawn=drawn_streams, data=st.data())
def test_batches_do_not_matter(drawn, data):
    events, slots = stream_of(drawn)
    whole, parts = empty_rows(3), empty_rows(3)
    features, dt_s, status = run(whole, events, slots)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(events)), max_size=5)))
    for a, b in zip([0, *cuts], [*cuts, len(events)], strict=True):
        part_features, part_dt_s, part_status = run(parts, events[a:b], slots[a:b])
        assert part_features.tobytes() == features[a:b].tobytes()
        assert part_dt_s.tobytes() == dt_s[a:b].tobytes()
        assert part_status.tobytes() == status[a:b].tobytes()
    assert parts.tobytes() == whole.tobytes()


@st.composite
def jittered(draw, max_size=60):
    """One user's events in order of time without idle gaps → (sorted, the same as they might arrive, within lateness)."""
    n = draw(st.integers(1, max_size))
    gaps = draw(st.lists(gaps_ms, min_size=n, max_size=n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    events = np.zeros(n, EVENT)
    events["ts"] = START_MS + np.cumsum(gaps)
    events["id"] = rng.permutation(2**20)[:n].astype(np.uint64) << np.uint64(44)
    events["item"], events["category"], events["quantity"] = rng.integers(0, 5, n), rng.integers(0, 5, n), 1.0
    events["platform"], events["kind"], events["price"] = 7, rng.integers(0, 7, n), rng.integers(0, 255, n)
    events = events[np.lexsort((events["id"], events["ts"]))]
    arrived = events[np.argsort(events["ts"] + rng.integers(0, PARAMS.lateness_ms + 1, n), kind="stable")]
    for stream in (events, arrived):
        stream["offset"] = np.arange(n)
    return events, arrived


@settings(max_examples=60, deadline=None)
@given(streams=jittered(), size=st.sampled_from(list(SIZES)))
def test_a_stream_shuffled_within_lateness_gives_the_state_of_the_sorted_one(streams, size):
    in_order, arrived = empty_rows(1, size), empty_rows(1, size)
    run(in_order, streams[0])
    _, _, status = run(arrived, streams[1])
    assert (status == FOLDED).all()
    for name in [*IN_RING, "n_ring", "n_events", "last_ts", "last_s_by_kind"]:
        assert arrived[name].tobytes() == in_order[name].tobytes(), name
    # 1e-18: below 1e-20 a count is put to 0, sooner in the one order than in the other.
    np.testing.assert_allclose(arrived["counts"], in_order["counts"], rtol=1e-5, atol=1e-18)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=st.sampled_from(list(SIZES)))
def test_refolding_the_ring_gives_the_features_of_the_sorted_stream(data, size):
    ring = SIZES[size][1]
    streams = [data.draw(jittered(max_size=ring)) for _ in range(3)]
    rows = empty_rows(4, size)
    want = [run(empty_rows(1, size), in_order) for in_order, _ in streams]
    for user, (_, arrived) in enumerate(streams):
        run(rows, arrived, np.full(len(arrived), user))
    before = rows.tobytes()
    slots = np.array([2, 0, 3, 1])  # 3 has no events
    features, dt_s = np.empty((4 * ring, N_FEATURES), np.float32), np.empty(4 * ring, np.float32)
    events = np.zeros(4 * ring, EVENT)
    counts = refold_rings(rows, slots, PARAMS, features, dt_s, events)
    assert rows.tobytes() == before
    assert counts.tolist() == [len(streams[s][0]) if s < 3 else 0 for s in slots]
    for i, (user, n) in enumerate(zip(slots, counts, strict=True)):
        at = slice(i * ring, i * ring + n)
        if n:
            assert features[at].tobytes() == want[user][0].tobytes()
            assert dt_s[at].tobytes() == want[user][1].tobytes()
            assert events[at].tobytes() == streams[user][0].tobytes()


def test_refolding_knows_no_quantity():
    rows, ring = empty_rows(1), SIZES["cpu"][1]
    live, _, _ = run(rows, events_of({"kind": PURCHASE, "quantity": 5.0}, {"ts": START_MS + 1, "quantity": 3.0}))
    features, dt_s = np.empty((ring, N_FEATURES), np.float32), np.empty(ring, np.float32)
    refold_rings(rows, np.zeros(1, np.int64), PARAMS, features, dt_s, np.zeros(ring, EVENT))
    differ = {FEATURE_NAMES[f] for f in np.flatnonzero((features[:2] != live).any(axis=0))}
    assert differ == {"log_basket_mean", "log_quantity"}


def test_duplicate_is_counted_once_and_moves_the_offset():
    rows = empty_rows(1)
    run(rows, events_of({}))
    before = rows.copy()
    features, dt_s, status = run(rows, events_of({"offset": 5, "id": 1000, "ts": START_MS + HOUR}))
    assert status.tolist() == [DUPLICATE]
    assert not features.any() and dt_s[0] == 0
    assert rows["applied_offset"][0] == 5
    rows["applied_offset"] = before["applied_offset"]
    assert rows.tobytes() == before.tobytes()


def test_duplicates_are_known_while_their_event_is_in_the_ring():
    ring = SIZES["cpu"][1]
    rows = empty_rows(1)
    events = events_of(*({"ts": START_MS + i} for i in range(ring + 1)))
    run(rows, events)
    again = np.concatenate([events[1:2], events[:1]])
    again["offset"] = [100, 101]
    assert run(rows, again)[2].tolist() == [DUPLICATE, FOLDED]


@pytest.mark.parametrize(
    ("late_ms", "n_before", "want"),
    [
        (HOUR + 1, 16, TOO_LATE),
        (HOUR, 16, FOLDED),  # within lateness: counted, though the ring has no place for it
        (40 * DAY, 15, FOLDED),  # the ring has room
    ],
)
def test_too_late(late_ms, n_before, want):
    rows = empty_rows(1)
    run(rows, events_of(*({"ts": START_MS + i} for i in range(n_before))))
    before = rows.copy()
    late = events_of({"offset": 500, "id": 1, "ts": START_MS + n_before - 1 - late_ms, "kind": PURCHASE})
    features, dt_s, status = run(rows, late)
    assert status.tolist() == [want] and dt_s[0] == 0
    assert np.isfinite(features).all() and feature(features, "kind_purchase")[0] == 1
    assert rows["applied_offset"][0] == 500
    if want == TOO_LATE:
        rows["applied_offset"] = before["applied_offset"]
        assert rows.tobytes() == before.tobytes()
    else:
        assert rows["n_events"][0] == n_before + 1
        assert rows["last_ts"][0] == before["last_ts"][0]
        assert rows["n_ring"][0] == min(16, n_before + 1)
        want_counts = np.exp(-late_ms / 1000 / np.array([3600, 86400, 604800, 2592000]))
        np.testing.assert_allclose(rows["counts"][0, PURCHASE], want_counts, rtol=1e-6, atol=1e-20)


def test_a_late_event_inside_the_ring_is_never_too_late():
    rows = empty_rows(1)
    run(rows, events_of(*({"ts": START_MS + i * DAY} for i in range(16))))
    _, _, status = run(rows, events_of({"offset": 99, "id": 1, "ts": START_MS + DAY // 2}))
    assert status.tolist() == [FOLDED]
    assert rows["ring_ts"][0, :2].tolist() == [START_MS + DAY // 2, START_MS + DAY]


@pytest.mark.parametrize("size", SIZES)
def test_a_user_idle_for_too_long_starts_afresh(size):
    rows = empty_rows(1, size)
    rows["h"], rows["h_version"] = 0.5, 17
    first = events_of({"kind": CART, "item": 3, "category": 4, "price": 9}, {"ts": START_MS + DAY, "kind": PURCHASE})
    run(rows, first)
    assert (rows["h"] == 0.5).all()
    back = events_of(
        {"offset": 7, "id": 50, "ts": START_MS + 181 * DAY}, {"offset": 8, "id": 51, "ts": START_MS + 181 * DAY + 1}
    )
    at_limit = back.copy()
    at_limit["ts"] = [START_MS + 181 * DAY - 1, START_MS + 181 * DAY]
    lived = rows.copy()
    run(lived, at_limit)
    assert lived["n_events"][0] == 4 and lived["visits"][0] == 3 and (lived["h"] == 0.5).all()

    back["ts"] += 1
    features, dt_s, status = run(rows, back)
    assert status.tolist() == [FOLDED, FOLDED] and dt_s[0] == 0
    assert starts_afresh(features, status).tolist() == [True, False]
    fresh = empty_rows(1, size)
    fresh["h_version"] = 17
    run(fresh, back)
    assert rows.tobytes() == fresh.tobytes()
    assert not rows["h"].any()


def test_starts_afresh_names_the_first_event_of_each_user_only():
    events, slots = events_of(*({"ts": START_MS + i} for i in range(6))), np.array([0, 1, 0, 1, 2, 0])
    events["id"][3] = events["id"][1]  # a duplicate
    features, _, status = run(empty_rows(3), events, slots)
    assert starts_afresh(features, status).tolist() == [True, True, False, False, True, False]


def test_sessions_and_returns():
    minute_of_visit = [0, 10, 40, 71, 71 + 7 * 24 * 60, 71 + 14 * 24 * 60 + 1]
    rows = empty_rows(1)
    features, dt_s, _ = run(rows, events_of(*({"ts": START_MS + m * MINUTE} for m in minute_of_visit)))
    row = rows[0]
    # 40 − 10 is just a session's gap; the last gap is a minute over the return horizon.
    assert row["visits"] == 4 and row["returns"] == 2 and row["session_events"] == 1
    assert row["session_start_ts"] == row["last_ts"] == START_MS + minute_of_visit[-1] * MINUTE
    assert row["gap_last_s"] == 7 * 86400 + 60
    mean = 0.7 * (0.7 * 31 * 60 + 0.3 * 7 * 86400) + 0.3 * (7 * 86400 + 60)
    assert row["gap_mean_s"] == pytest.approx(mean)
    assert feature(features, "return_rate")[-1] == pytest.approx(3 / 5)
    assert feature(features, "log_session_events")[2] == pytest.approx(math.log(4))
    assert dt_s.tolist() == [0, 600, 1800, 1860, 7 * 86400, 7 * 86400 + 60]


def test_a_person_on_two_platforms_has_one_row_and_items_that_do_not_mix():
    events = events_of(
        {"kind": CART, "item": 11, "platform": 7},
        {"kind": CART, "item": 11, "platform": 8, "ts": START_MS + MINUTE},
        {"kind": CART, "item": 11, "platform": 7, "ts": START_MS + 2 * MINUTE},
        {"kind": PURCHASE, "item": 11, "platform": 8, "ts": START_MS + 3 * MINUTE},
    )
    rows = empty_rows(1)
    features, dt_s, _ = run(rows, events)
    assert rows["ring_platform"][0, :4].tolist() == [7, 8, 7, 8]
    assert rows["session_carts"][0] == 3 and rows["session_purchases"][0] == 1
    assert np.expm1(feature(features, "log_open_carts")).round().tolist() == [1, 2, 2, 1]
    assert np.expm1(feature(features, "log_item_seen")).round().tolist() == [1, 1, 2, 2]
    assert np.expm1(feature(features, "log_since_item")[2:]).round().tolist() == [120, 120]
    assert (feature(features, "log_since_item")[:2] == 18).all()
    assert dt_s.tolist() == [0, 60, 60, 60]


def test_open_carts_do_not_only_grow():
    ring = SIZES["cpu"][1]
    views = [{"ts": START_MS + 1 + i} for i in range(ring)]
    events = events_of({"kind": CART, "item": 3}, *views, {"kind": PURCHASE, "item": 3, "ts": START_MS + DAY},
                       {"kind": PURCHASE, "item": 3, "ts": START_MS + DAY + 1})  # fmt: skip
    rows = empty_rows(1)
    run(rows, events[:-2])
    assert rows["open_carts"][0] == 1  # the ring no longer knows the item
    run(rows, events[-2:-1])
    assert rows["open_carts"][0] == 0
    run(rows, events[-1:])
    assert rows["open_carts"][0] == 0


@pytest.mark.parametrize("size", SIZES)
def test_rows_stay_bounded(size):
    n = 70_000
    rows, events = empty_rows(1, size), np.zeros(n, EVENT)
    events["offset"] = events["id"] = events["item"] = np.arange(n) + 1
    events["ts"], events["kind"], events["category"] = START_MS + np.arange(n), CART, np.arange(n) % 1000 + 1
    features, _, status = run(rows, events)
    assert (status == FOLDED).all() and np.isfinite(features).all()
    row = rows[0]
    assert row["session_events"] == row["session_carts"] == row["open_carts"] == 65535
    assert row["n_events"] == n and row["n_ring"] == SIZES[size][1]
    np.testing.assert_array_equal(row["ring_ts"], events["ts"][-SIZES[size][1] :])
    assert row["mix_long_weight"].min() > 0 and row["mix_long_weight"].max() <= n
    assert row["counts"].max() <= n


@settings(max_examples=60, deadline=None)
@given(
    ts=st.lists(st.integers(0, 253_402_300_799_999), min_size=1, max_size=30),
    quantity=st.floats(width=32),
    price=st.integers(0, 255),
)
def test_features_are_finite_and_small_whatever_comes(ts, quantity, price):
    rows = empty_rows(1)
    events = events_of(*({"ts": t, "quantity": quantity, "price": price, "kind": PURCHASE, "item": 1} for t in ts))
    for params in (PARAMS, never_idle):
        features, dt_s, _ = run(rows, events, params=params)
        assert np.isfinite(features).all() and np.abs(features).max() <= 18
        assert np.isfinite(dt_s).all() and (dt_s >= 0).all()
        for name in ("counts", "basket_mean", "price_mean", "gap_mean_s", "mix_long_weight"):
            assert np.isfinite(rows[name]).all()


def test_what_does_not_fit_is_refused_before_any_row_changes():
    rows, events = empty_rows(2), events_of({}, {"ts": START_MS + 1})
    before = rows.tobytes()
    for slots in (np.array([0, 2]), np.array([0, -1]), np.array([0])):
        with pytest.raises(ValueError):
            run(rows, events, slots)
    wrong_kind = events.copy()
    wrong_kind["kind"][1] = 7
    with pytest.raises(ValueError, match="kind"):
        run(rows, wrong_kind)
    out = np.empty((2, N_FEATURES), np.float32), np.empty(1, np.float32), np.empty(2, np.uint8)
    with pytest.raises(ValueError, match="fit"):
        fold(rows, np.zeros(2, np.int64), events, PARAMS, *out)
    ring = np.empty((16, N_FEATURES), np.float32), np.empty(16, np.float32), np.zeros(16, EVENT)
    with pytest.raises(ValueError, match="outside"):
        refold_rings(rows, np.array([2]), PARAMS, *ring)
    with pytest.raises(ValueError, match="outputs"):
        refold_rings(rows, np.array([0, 1]), PARAMS, *ring)
    assert rows.tobytes() == before


def test_outputs_may_be_longer_than_the_batch():
    features, dt_s = np.full((9, N_FEATURES), 5, np.float32), np.full(9, 5, np.float32)
    status = np.full(9, 5, np.uint8)
    fold(empty_rows(1), np.zeros(2, np.int64), events_of({}, {}), PARAMS, features, dt_s, status)
    assert status.tolist() == [FOLDED, FOLDED] + [5] * 7
    assert (features[2:] == 5).all() and (dt_s[2:] == 5).all()


def test_params():
    assert PARAMS == (3_600_000, 1_800_000, 7 * DAY, 180 * DAY)
    assert fold_params(FoldConfig(idle_ttl_s=math.inf)).idle_ttl_ms == 2**62
    assert fold_params(FoldConfig(lateness_s=0.0015)).lateness_ms == 2


def test_a_change_of_the_features_needs_a_new_version():
    """The names and places of version 1. Where this fails, raise FEATURE_VERSION and pin the new ones."""
    assert N_FEATURES == len(FEATURE_NAMES) == len(set(FEATURE_NAMES)) == 77
    digest = hashlib.sha256(" ".join(FEATURE_NAMES).encode()).hexdigest()[:16]
    assert (FEATURE_VERSION, digest) == (1, "5a1e6cb8396e2463")


def test_warm_compiles_everything_that_serving_calls():
    fold_module.warm()
    compiled = len(fold.signatures)
    for size in SIZES:
        run(empty_rows(1, size), events_of({"kind": KIND_CODE["click"]}))
    assert len(fold.signatures) == compiled
