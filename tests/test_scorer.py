"""The scorer and the category mixture: the same answers however the events are cut, against plain Python."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CATEGORIES, HASHES, PLATFORMS, START_MS, make_model, make_stream, make_table, some_categories

from models.categories import (
    MAX_CANDIDATES,
    RECENCY,
    TOP_MARKOV,
    TOP_POPULAR,
    CategoryTable,
    view_dtype,
    views_of,
)
from models.config import FoldConfig
from models.device import DeviceStudent
from models.events import EVENT, hash32, platform_code
from models.fold import DUPLICATE, FOLDED, N_FEATURES, REPLAYED, TOO_LATE, fold, fold_params
from models.scorer import Model, Scorer, Scores, fold_with_views, platform_lookup
from models.state import SIZES, empty_rows
from models.student import COMPONENTS, N_GATES, Columns, StudentConfig

torch.set_num_threads(1)
USERS = 12
UNKNOWN = 999_999_999


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture(scope="module")
def table() -> CategoryTable:
    return make_table()


def run(model: Model, events, slots, cuts=(), rows=None) -> tuple[Scores, np.ndarray, np.ndarray]:
    """Scores, statuses and rows after running the batches between `cuts`."""
    scorer, rows = Scorer(model, "cpu"), empty_rows(USERS, model.config.size) if rows is None else rows
    bounds, parts = [0, *cuts, len(events)], []
    for start, stop in pairwise(bounds):
        parts.append(scorer.run(rows, slots[start:stop], events[start:stop]))
    scores = Scores(*(np.concatenate(column) for column in zip(*(s for s, _ in parts), strict=True)))
    return scores, np.concatenate([status for _, status in parts]), rows


def assert_same_scores(ours: Scores, theirs: Scores, atol: float = 1e-5) -> None:
    for name in ("p_N3", "category_p_N5", "shift_N"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=0, atol=atol, err_msg=name)
    assert (ours.category_N5 == theirs.category_N5).mean() > 0.999


# ── categories ───────────────────────────────────────────────────────────────────────────────────────────────────────


def make_views(n: int, seed: int = 0, size: str = "cpu") -> np.ndarray:
    """Views with every kind of emptiness."""
    rng = np.random.default_rng(seed)
    views = np.zeros(n, view_dtype(size))
    for view in views:
        ring = some_categories(rng, int(rng.integers(0, SIZES[size][1] + 1)))
        ring = ring[ring != 0]
        view["n"] = len(ring)
        view["ring_category"][: len(ring)] = ring
        for mix in ("short", "long"):
            there = rng.random(view[f"{mix}_weight"].shape) < rng.choice([0.0, 0.5, 1.0])
            distinct = rng.choice(HASHES[:40], len(there), replace=False)
            view[f"{mix}_category"] = np.where(there, distinct, 0)
            view[f"{mix}_weight"] = np.where(there, rng.exponential(1.0, len(there)), 0)
    return views


def plain_components(table: CategoryTable, view, platform: int) -> tuple[dict[str, dict], list[int]]:
    """What the kernel says, said slowly: component → {index or 'other': q}, and the candidates in order."""
    index = {int(h): i for i, h in enumerate(table.hashes_C)}
    order: list[int] = []

    def spread(pairs):
        q: dict = {}
        for i, p in pairs:
            if i is not None and i not in order and len(order) < MAX_CANDIDATES:
                order.append(i)
            key = i if i in order else "other"
            q[key] = q.get(key, 0.0) + float(p)
        q["other"] = q.get("other", 0.0) + max(0.0, 1.0 - sum(q.values()))
        return q

    ring = [int(c) for c in view["ring_category"][: view["n"]]]
    q: dict = {}
    total = sum(RECENCY**j for j in range(len(ring)))
    recency = spread([(index.get(c), RECENCY**j / total) for j, c in enumerate(ring)])
    q["copy_recency"] = recency if ring else None
    q["ring_frequency"] = spread([(index.get(c), 1 / len(ring)) for c in ring]) if ring else None
    for mix in ("short", "long"):
        pairs = [
            (int(c), float(w)) for c, w in zip(view[f"{mix}_category"], view[f"{mix}_weight"], strict=True) if c and w > 0
        ]
        weights = sum(w for _, w in pairs)
        q[f"{mix}_mix"] = spread([(index.get(c), w / weights) for c, w in pairs]) if pairs else None
    last, back = index.get(ring[0]) if ring else None, 1.0
    if last is not None:
        back = float(table.markov_back_C[last])
        q["markov"] = spread(
            [(int(i), p) for i, p in zip(table.markov_CM[last], table.markov_p_CM[last], strict=True) if i >= 0]
            + [(None, 0.0)]
        )
        q["markov"]["other"] -= back
    q["popularity"] = spread(
        [(int(i), p) for i, p in zip(table.popular_PT[platform], table.popular_p_PT[platform], strict=True) if i >= 0]
    )
    for name in COMPONENTS[:4]:
        q[name] = q[name] if q[name] is not None else q["popularity"]
    q.setdefault("markov", {})
    q["markov"] = {
        key: q["markov"].get(key, 0.0) + back * q["popularity"].get(key, 0.0) for key in {*q["markov"], *q["popularity"]}
    }
    q["other"] = {"other": 1.0}
    return q, order


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_components_are_what_plain_python_says(table, size):
    views, rng = make_views(80, 3, size), np.random.default_rng(5)
    for i in range(len(views)):
        view, platform = views[i : i + 1], np.array([rng.integers(0, len(PLATFORMS) + 1)])
        plain, order = plain_components(table, view[0], int(platform[0]))
        asked = [*table.hashes_C[order].tolist(), UNKNOWN]
        q_NG = table.q_target(np.repeat(view, len(asked)), np.repeat(platform, len(asked)), np.array(asked))
        expected_NG = [[plain[name].get(key, 0.0) for name in COMPONENTS] for key in [*order, "other"]]
        np.testing.assert_allclose(q_NG, expected_NG, rtol=0, atol=2e-6)
        np.testing.assert_allclose(q_NG.sum(axis=0), 1.0, atol=1e-5)
        outside = np.setdiff1d(np.arange(len(table.hashes_C)), order)
        if len(outside):
            other = table.q_target(view, platform, table.hashes_C[outside[:1]])
            np.testing.assert_array_equal(other[0], q_NG[-1])


def test_serving_says_what_training_was_told(table):
    """Σ gate_k q_k(c) of `q_target` is the p of `predict`, and p over candidates and *other* sums to 1."""
    views, rng = make_views(60), np.random.default_rng(1)
    platform_N = rng.integers(0, len(PLATFORMS) + 1, 60)
    gates_NG = rng.normal(0, 2, (60, N_GATES)).astype(np.float32)
    category_NT, p_NT, _ = table.predict(views, platform_N, gates_NG, top=MAX_CANDIDATES)
    weight_NG = np.exp(gates_NG) / np.exp(gates_NG).sum(axis=1, keepdims=True)
    for t in range(MAX_CANDIDATES):
        there = category_NT[:, t] >= 0
        q_NG = table.q_target(views, platform_N, np.where(there, table.hashes_C[category_NT[:, t]], 0))
        np.testing.assert_allclose((q_NG * weight_NG).sum(axis=1), p_NT[:, t], rtol=0, atol=1e-6)
    other_N = (table.q_target(views, platform_N, np.full(60, UNKNOWN)) * weight_NG).sum(axis=1)
    np.testing.assert_allclose(p_NT.sum(axis=1) + other_N, 1.0, atol=1e-5)
    assert (np.diff(p_NT, axis=1) <= 0).all()
    five = table.predict(views, platform_N, gates_NG)
    np.testing.assert_array_equal(five[0], category_NT[:, :5])
    np.testing.assert_array_equal(five[1], p_NT[:, :5])


def test_never_more_than_64_candidates():
    big = make_table(max_categories=120)
    views = np.zeros(1, view_dtype("gpu"))
    views["n"] = 40
    views["ring_category"][0] = big.hashes_C[60:100]
    views["long_category"][0], views["long_weight"][0] = big.hashes_C[100:108], 1.0
    category_NT, p_NT, _ = big.predict(views, np.array([0]), np.zeros((1, N_GATES), np.float32), top=100)
    assert (category_NT[0] >= 0).sum() == MAX_CANDIDATES
    assert len(set(category_NT[0, :MAX_CANDIDATES].tolist())) == MAX_CANDIDATES
    assert set(range(60, 108)) <= set(category_NT[0].tolist())
    assert 0.5 < p_NT.sum() < 1.0


def test_interest_shift_is_a_distance():
    """0 where the prediction is the long-term mix, 1 where they share nothing, NaN where there is no mix."""
    table, only_long = make_table(), np.full((1, N_GATES), -100.0, np.float32)
    view = make_views(1)
    view["long_category"][0], view["long_weight"][0] = HASHES[:8], np.arange(1, 9)
    only_long[0, COMPONENTS.index("long_mix")] = 100.0
    assert table.predict(view, np.array([1]), only_long)[2][0] == pytest.approx(0.0, abs=1e-6)
    # The mix holds known categories only, the prediction *other* only.
    view["long_category"][0] = table.hashes_C[:8]
    only_other = np.where(np.arange(N_GATES) == COMPONENTS.index("other"), 100.0, -100.0)[None].astype(np.float32)
    assert table.predict(view, np.array([1]), only_other)[2][0] == pytest.approx(1.0, abs=1e-6)
    view["long_weight"] = 0
    assert np.isnan(table.predict(view, np.array([1]), only_long)[2][0])
    views, rng = make_views(500, 8), np.random.default_rng(8)
    shift_N = table.predict(views, rng.integers(0, 4, 500), rng.normal(0, 3, (500, N_GATES)))[2]
    has_mix_N = views["long_weight"].max(axis=1) > 0
    np.testing.assert_array_equal(np.isnan(shift_N), ~has_mix_N)
    assert (shift_N[has_mix_N] >= 0).all()
    assert (shift_N[has_mix_N] <= 1).all()
    assert shift_N[has_mix_N].std() > 0.05


def test_interest_shift_is_the_jensen_shannon_distance(table):
    from scipy.spatial.distance import jensenshannon

    views, rng = make_views(40, 2), np.random.default_rng(2)
    views["long_category"][:], views["long_weight"][:] = HASHES[10:18], rng.exponential(1.0, (40, 8))
    platform_N, gates_NG = rng.integers(0, 4, 40), rng.normal(0, 2, (40, N_GATES)).astype(np.float32)
    shift_N = table.predict(views, platform_N, gates_NG)[2]
    for i in range(40):
        plain, order = plain_components(table, views[i], int(platform_N[i]))
        gate_G = np.exp(gates_NG[i]) / np.exp(gates_NG[i]).sum()
        keys = [*order, "other"]
        p = [sum(g * plain[name].get(key, 0.0) for g, name in zip(gate_G, COMPONENTS, strict=True)) for key in keys]
        long = [plain["long_mix"].get(key, 0.0) for key in keys]
        assert shift_N[i] == pytest.approx(jensenshannon(p, long, base=2), abs=1e-4)


def test_counting():
    a, b, c, rare = (hash32(name) for name in ("a", "b", "c", "rare"))
    names = {a: "a", b: "b", c: "c", rare: "rare"}
    pairs = [(a, b, 1)] * 6 + [(a, c, 1)] * 3 + [(a, rare, 2)] + [(0, c, 2)] * 2 + [(b, 0, 1)] * 9
    came, following, platform = np.array(pairs).T
    table = CategoryTable.from_counts(came, following, platform, names, 3, max_categories=3, smoothing=10.0)
    table.check(3)
    index = {name: i for i, name in enumerate(table.names)}
    assert sorted(index) == ["a", "b", "c"]
    assert table.hashes_C.tolist() == sorted([a, b, c])
    markov = dict(zip(table.markov_CM[index["a"]].tolist(), table.markov_p_CM[index["a"]].tolist(), strict=True))
    assert markov[index["b"]] == pytest.approx(6 / 20)
    assert markov[index["c"]] == pytest.approx(3 / 20)
    assert table.markov_back_C[index["a"]] == pytest.approx(10 / 20)
    assert table.markov_back_C[index["b"]] == 1.0
    assert table.popular_PT[0, :3].tolist() == [index["b"], index["c"], -1]
    np.testing.assert_allclose(table.popular_p_PT[0, :2], [6 / 12, 5 / 12])
    assert table.popular_PT[2, 0] == index["c"]
    assert table.popular_p_PT[2, 0] == pytest.approx(2 / 3)
    # A platform that was never seen is like all of them.
    np.testing.assert_array_equal(table.popular_PT[3], table.popular_PT[0])
    assert table.popular_PT.shape == (4, TOP_POPULAR)
    assert table.markov_CM.shape == (3, TOP_MARKOV)


def test_an_empty_table_answers_other():
    none = np.zeros(0, np.uint32)
    table = CategoryTable.from_counts(none, none, np.zeros(0, int), {}, 1)
    table.check(1)
    category_NT, p_NT, _ = table.predict(make_views(9), np.ones(9, int), np.zeros((9, N_GATES), np.float32))
    assert (category_NT == -1).all()
    assert (p_NT == 0).all()
    np.testing.assert_allclose(table.q_target(make_views(9), np.ones(9, int), np.full(9, 77)), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": ["one"]},
        {"popular_PT": np.full((4, 3), 90, np.int32)},
        {"popular_PT": np.full((2, TOP_POPULAR), 1, np.int32)},
        {"markov_CM": np.full((90, TOP_MARKOV), -2, np.int32)},
        {"markov_back_C": np.full(90, np.nan, np.float32)},
        {"hashes_C": np.zeros(90, np.uint32)},
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, wrong):
    with pytest.raises(ValueError):
        replace(table, **wrong).check(len(PLATFORMS))


# ── the path ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_any_cut_into_batches_gives_the_same(size):
    model = make_model(size)
    events, slots = make_stream(300, USERS)
    whole, status, rows = run(model, events, slots)
    assert set(status.tolist()) >= {FOLDED, REPLAYED, DUPLICATE}
    for cuts in ([150], [1, 2, 3, 40, 299], range(1, 300)):
        cut, cut_status, cut_rows = run(model, events, slots, cuts)
        np.testing.assert_array_equal(status, cut_status)
        assert_same_scores(whole, cut)
        np.testing.assert_allclose(rows["h"], cut_rows["h"], rtol=0, atol=1e-6)
        for field in set(rows.dtype.names) - {"h"}:
            np.testing.assert_array_equal(rows[field], cut_rows[field], err_msg=field)
    assert np.abs(rows["h"]).max() > 0.1
    assert np.nanstd(whole.p_N3) > 0.05


def test_longer_buffers_change_nothing(model):
    events, slots = make_stream(100, USERS)
    expected, _, _ = run(model, events, slots)
    scorer, rows = Scorer(model, "cpu"), empty_rows(USERS)
    features, dt_s = np.full((150, N_FEATURES), np.nan, np.float32), np.full(150, np.nan, np.float32)
    status, views = np.full(150, 200, np.uint8), np.zeros(150, view_dtype())
    scorer.prepare(rows, slots)
    fold_with_views(rows, slots, events, fold_params(model.fold), features, dt_s, status, views)
    assert_same_scores(scorer.score(rows, slots, events, features, dt_s, status, views), expected, atol=0)


def test_h_is_the_recurrence_written_down(model):
    """In plain Python, event by event, from what `encode` says of each."""
    events, slots = make_stream(200, USERS, seed=4)
    _, _, rows = run(model, events, slots, [70])
    again, features = empty_rows(USERS), np.empty((200, N_FEATURES), np.float32)
    dt_s, status = np.empty(200, np.float32), np.empty(200, np.uint8)
    fold(again, slots, events, fold_params(model.fold), features, dt_s, status)
    platform_N = platform_lookup(model.config)[events["platform"]]
    h = {slot: np.zeros(64) for slot in range(USERS)}
    for i in np.flatnonzero(status == FOLDED):
        with torch.inference_mode():
            one = slice(i, i + 1)
            encoded = model.student.encode(Columns.of(events[one], features[one], dt_s[one], platform_N[one]))
        a, b = encoded.a_NH[0].double().numpy(), encoded.b_NH[0].double().numpy()
        h[slots[i]] = a * h[slots[i]] + b
    np.testing.assert_allclose(rows["h"], np.stack([h[slot] for slot in range(USERS)]), rtol=0, atol=1e-6)


def test_training_and_serving_say_the_same(model):
    """`forward_sequences` over a user's events is what serving says of them, before calibration."""
    events, _ = make_stream(120, 1, seed=6)
    slots = np.zeros(120, np.int64)
    uncalibrated = replace(model, calibration_P32=np.tile(np.float32([1, 0]), (4, 3, 1)))
    scores, status, _ = run(uncalibrated, events, slots, [50])
    rows, features = empty_rows(1), np.empty((120, N_FEATURES), np.float32)
    dt_s, again = np.empty(120, np.float32), np.empty(120, np.uint8)
    fold(rows, slots, events, fold_params(model.fold), features, dt_s, again)
    kept = np.flatnonzero(status == FOLDED)
    platform_N = platform_lookup(model.config)[events["platform"]][kept]
    columns = Columns.of(events[kept], features[kept], dt_s[kept], platform_N)
    starts_N = torch.zeros(len(kept), dtype=torch.bool)
    starts_N[0] = True
    with torch.inference_mode():
        logits_N3, _ = model.student.forward_sequences(columns, starts_N)
    p_N3 = torch.sigmoid(logits_N3).numpy()
    there = ~np.isnan(scores.p_N3[kept])
    np.testing.assert_allclose(scores.p_N3[kept][there], p_N3[there], rtol=0, atol=1e-5)


def test_heads_that_a_platform_cannot_have_are_nan(model):
    events, slots = make_stream(300, USERS, seed=2)
    scores, status, _ = run(model, events, slots)
    can_P4 = model.config.can_have()
    platform_N = platform_lookup(model.config)[events["platform"]]
    expected_N4 = can_P4[platform_N] & (status != DUPLICATE)[:, None]
    np.testing.assert_array_equal(~np.isnan(scores.p_N3), expected_N4[:, :3])
    named_N = (scores.category_N5 >= 0).any(axis=1)
    np.testing.assert_array_equal(named_N, expected_N4[:, 3])
    assert np.isnan(scores.shift_N[~expected_N4[:, 3]]).all()
    assert (scores.category_p_N5[~expected_N4[:, 3]] == 0).all()
    given = scores.p_N3[~np.isnan(scores.p_N3)]
    assert ((given > 0) & (given < 1)).all()
    assert set(np.unique(platform_N)) == {0, 1, 2, 3}


def test_calibration_is_applied_by_platform_and_head(model):
    events, slots = make_stream(150, USERS, seed=3)
    identity = np.tile(np.float32([1, 0]), (4, 3, 1))
    plain, _, _ = run(replace(model, calibration_P32=identity), events, slots)
    changed = identity.copy()
    changed[2, 1] = 0.5, -1.0
    moved, _, _ = run(replace(model, calibration_P32=changed), events, slots)
    logit = np.log(plain.p_N3 / (1 - plain.p_N3))
    at = platform_lookup(model.config)[events["platform"]] == 2
    expected = plain.p_N3.copy()
    expected[at, 1] = 1 / (1 + np.exp(-(0.5 * logit[at, 1] - 1.0)))
    np.testing.assert_allclose(moved.p_N3, expected, rtol=0, atol=1e-6)
    assert not np.isnan(expected[at, 1]).all()


def test_replayed_and_late_events_leave_h_alone(model):
    events, slots = make_stream(120, 2, seed=1)
    _, _, rows = run(model, events, slots)
    before = rows.copy()
    again, status, _ = run(model, events[-30:], slots[-30:], rows=rows)
    assert (status == REPLAYED).all()
    assert rows.tobytes() == before.tobytes()
    assert not np.isnan(again.p_N3).all(axis=1).any()
    ancient = events[-1:].copy()
    ancient["offset"] += 1000
    ancient["id"] += 1
    ancient["ts"] = START_MS - 10**10
    scores, status, _ = run(model, ancient, slots[-1:], rows=rows)
    assert status.tolist() == [TOO_LATE]
    np.testing.assert_array_equal(rows["h"], before["h"])
    assert not np.isnan(scores.p_N3).all()


def test_h_of_another_recurrence_is_rebuilt_from_the_ring():
    """Up to as many events as the ring holds, in order and without replays, that is the very same h."""
    ours, theirs = make_model(seed=0), make_model(seed=1)
    events, slots = make_stream(150, USERS, seed=9)
    events["offset"], events["id"], events["quantity"] = np.arange(150), np.arange(1, 151), 1
    events["ts"] = START_MS + 50_000 * np.arange(150)
    _, _, expected = run(ours, events, slots)
    _, _, rows = run(theirs, events, slots)
    short = np.flatnonzero(rows["n_events"] <= SIZES["cpu"][1])
    assert 3 <= len(short) <= USERS
    assert not np.allclose(rows["h"], expected["h"], atol=0.05)
    scorer = Scorer(ours, "cpu")
    assert scorer.prepare(rows, np.repeat(np.arange(USERS), 2)) == USERS
    np.testing.assert_allclose(rows["h"][short], expected["h"][short], rtol=0, atol=1e-5)
    assert (rows["h_version"] == ours.recurrence_id).all()
    assert scorer.prepare(rows, np.arange(USERS)) == 0
    # A long history is cut to the ring: what is older has mostly faded from the state, not all of it.
    assert np.abs(rows["h"] - expected["h"]).max() < np.abs(expected["h"]).max()


def test_rebuilding_in_one_go_or_one_by_one_is_the_same(monkeypatch):
    ours, theirs = make_model(seed=0), make_model(seed=1)
    events, slots = make_stream(200, USERS, seed=10)
    _, _, rows = run(theirs, events, slots)
    rows["n_ring"][3] = 0
    one_by_one, scorer = rows.copy(), Scorer(ours, "cpu")
    scorer.prepare(rows, np.arange(USERS))
    monkeypatch.setattr("models.scorer._REBUILD_USERS", 1)
    scorer.prepare(one_by_one, np.arange(USERS))
    np.testing.assert_allclose(rows["h"], one_by_one["h"], rtol=0, atol=1e-6)
    assert (rows["h"][3] == 0).all()


def test_a_swap_between_batches_rebuilds_before_the_fold():
    """The batch's own events must not be in h twice."""
    ours, theirs = make_model(seed=0), make_model(seed=1)
    events, _ = make_stream(12, 1, seed=11)
    slots = np.zeros(12, np.int64)
    events["offset"], events["quantity"] = np.arange(12), 1
    events["ts"] = START_MS + 50_000 * np.arange(12)
    expected, _, expected_rows = run(ours, events, slots)
    _, _, rows = run(theirs, events[:8], slots[:8])
    scores, _, rows = run(ours, events[8:], slots[8:], rows=rows)
    np.testing.assert_allclose(rows["h"][0], expected_rows["h"][0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores.p_N3, expected.p_N3[8:], rtol=0, atol=1e-5)


def test_score_without_prepare_is_refused(model):
    events, slots = make_stream(10, USERS)
    rows, features, dt_s = empty_rows(USERS), np.zeros((10, N_FEATURES), np.float32), np.zeros(10, np.float32)
    with pytest.raises(ValueError, match="prepare"):
        Scorer(model, "cpu").score(rows, slots, events, features, dt_s, np.zeros(10, np.uint8), np.zeros(10, view_dtype()))


def test_rows_and_slots_that_do_not_fit_are_refused(model):
    events, slots = make_stream(10, USERS)
    scorer = Scorer(model, "cpu")
    with pytest.raises(ValueError, match="size"):
        scorer.run(empty_rows(USERS, "gpu"), slots, events)
    with pytest.raises(ValueError, match="slot"):
        fold_with_views(
            empty_rows(2),
            slots,
            events,
            fold_params(model.fold),
            np.empty((10, N_FEATURES), np.float32),
            np.empty(10, np.float32),
            np.empty(10, np.uint8),
            np.empty(10, view_dtype()),
        )


def test_a_user_idle_for_too_long_starts_from_zero_in_the_middle_of_a_batch(model):
    events, _ = make_stream(40, 1, seed=12)
    slots = np.zeros(40, np.int64)
    events["offset"], events["id"] = np.arange(40), np.arange(1, 41)
    events["ts"] = START_MS + 50_000 * np.arange(40)
    events["ts"][25:] += int(model.fold.idle_ttl_s * 1000) + 1
    whole, _, rows = run(model, events, slots)
    cut, _, cut_rows = run(model, events, slots, [25])
    assert_same_scores(whole, cut)
    np.testing.assert_allclose(rows["h"], cut_rows["h"], rtol=0, atol=1e-6)
    after = events[25:].copy()
    _, _, fresh = run(model, after, slots[25:])
    np.testing.assert_allclose(rows["h"], fresh["h"], rtol=0, atol=1e-6)


def test_views_are_of_the_moment_of_each_event():
    """A View of an event in the middle of a batch is that of the row had the batch ended there."""
    events, slots = make_stream(80, 3, seed=13)
    params = fold_params(FoldConfig())
    buffers = [np.empty((80, N_FEATURES), np.float32), np.empty(80, np.float32), np.empty(80, np.uint8)]
    views, rows, alone = np.zeros(80, view_dtype()), empty_rows(3), empty_rows(3)
    fold_with_views(rows, slots, events, params, *buffers, views)
    for i in range(80):
        one = slice(i, i + 1)
        fold(alone, slots[one], events[one], params, *(buffer[one].copy() for buffer in buffers))
        assert views_of(alone, slots[one])["n"] == views[i]["n"]
        for field in ("short_category", "short_weight", "long_category", "long_weight"):
            np.testing.assert_array_equal(views_of(alone, slots[one])[field][0], views[field][i])
        n = views[i]["n"]
        newest_first = alone[slots[i]]["ring_category"][: alone[slots[i]]["n_ring"]][::-1]
        np.testing.assert_array_equal(views[i]["ring_category"][:n], newest_first[newest_first != 0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 120), users=st.integers(1, 5), size=st.sampled_from(["cpu", "gpu"]))
def test_folding_with_views_is_folding_and_leaves_h_alone(seed, n, users, size):
    """Byte for byte, late events, repeats, replays and users who were idle for too long among them."""
    events, slots = make_stream(max(n, 1), users, seed)
    events, slots = events[:n].copy(), slots[:n]
    idle_ms = int(FoldConfig().idle_ttl_s * 1000)
    for at in np.random.default_rng(seed).integers(0, max(n, 1), 2):
        events["ts"][at:] += idle_ms + 1
    params, rows = fold_params(FoldConfig()), empty_rows(users, size)
    rows["h"] = np.random.default_rng(seed).normal(size=rows["h"].shape)
    h_UH, alone = rows["h"].copy(), rows.copy()
    out, expected = [
        (np.zeros((n, N_FEATURES), np.float32), np.zeros(n, np.float32), np.zeros(n, np.uint8)) for _ in range(2)
    ]
    views = np.zeros(n, view_dtype(size))
    fold_with_views(rows, slots, events, params, *out, views)
    fold(alone, slots, events, params, *expected)
    np.testing.assert_array_equal(rows["h"], h_UH)
    alone["h"] = h_UH
    assert rows.tobytes() == alone.tobytes()
    assert [column.tobytes() for column in out] == [column.tobytes() for column in expected]
    last = {int(slot): i for i, slot in enumerate(slots)}
    for slot, i in last.items():
        assert views_of(rows, np.array([slot]), size)[0].tobytes() == views[i].tobytes()


def test_a_batch_that_does_not_fit_changes_no_row():
    events, slots = make_stream(10, 2)
    wrong_kind, wrong_slots = events.copy(), slots.copy()
    wrong_kind["kind"][-1], wrong_slots[-1] = 7, 2
    whole = (10, N_FEATURES), 10, 10, 10
    cases = [(slots, wrong_kind, whole), (wrong_slots, events, whole), (slots[:9], events, whole)]
    cases += [(slots, events, shapes) for shapes in (((9, N_FEATURES), *whole[1:]), ((10, 5), *whole[1:]), (*whole[:3], 9))]
    for some_slots, some_events, shapes in cases:
        rows = empty_rows(2)
        out = [np.zeros(shape, dtype) for shape, dtype in zip(shapes, (np.float32, np.float32, np.uint8), strict=False)]
        with pytest.raises(ValueError):
            fold_with_views(
                rows, some_slots, some_events, fold_params(FoldConfig()), *out, np.zeros(shapes[3], view_dtype())
            )
        assert rows.tobytes() == empty_rows(2).tobytes()


def test_a_model_without_student_says_its_constants_and_disowns_h(model):
    offsets = np.tile(np.float32([1.0, 0.0]), (4, 3, 1))
    offsets[:, :, 1] = [0.2, -0.7, 0.4]
    prior = Model("prior", model.config, None, None, offsets, FoldConfig(), degraded=True)
    events, slots = make_stream(100, USERS, seed=14)
    _, _, rows = run(model, events[:60], slots[:60])
    assert (rows["h_version"][np.unique(slots[:60])] == model.recurrence_id).all()
    scores, status, rows = run(prior, events[60:], slots[60:], rows=rows)
    touched = np.unique(slots[60:][status == FOLDED])
    assert (rows["h_version"][touched] == 0).all()
    for head, offset in enumerate([0.2, -0.7, 0.4]):
        column = scores.p_N3[:, head]
        np.testing.assert_allclose(column[~np.isnan(column)], 1 / (1 + np.exp(-offset)), rtol=1e-6)
    assert (scores.category_N5 == -1).all()
    assert np.isnan(scores.shift_N).all()
    assert prior.recurrence_id == 0


def test_no_events_no_scores(model):
    scores, status, _ = run(model, np.empty(0, EVENT), np.empty(0, np.int64))
    assert scores.p_N3.shape == (0, 3)
    assert scores.category_N5.shape == (0, 5)
    assert len(status) == len(scores.shift_N) == 0


def test_platforms_are_found_by_their_code():
    config = StudentConfig.of("cpu", N_FEATURES, PLATFORMS, {})
    lookup = platform_lookup(config)
    assert [lookup[platform_code(platform)] for platform in PLATFORMS] == [1, 2, 3]
    assert lookup[platform_code("unheard of")] == 0
    assert (lookup > 0).sum() == 3
    by_code: dict[int, str] = {}
    for i in range(5000):
        name = f"p{i}"
        if by_code.setdefault(platform_code(name), name) != name:
            twins = (by_code[platform_code(name)], name)
            break
    with pytest.raises(ValueError, match="same code"):
        platform_lookup(StudentConfig.of("cpu", N_FEATURES, twins, {}))


def test_names_come_with_their_hashes(table):
    assert [hash32(name) for name in table.names] == table.hashes_C.tolist()
    assert set(table.names) <= set(CATEGORIES.values())
    np.testing.assert_array_equal(table.index_of(table.hashes_C[[3, 5]]), [3, 5])
    assert table.index_of(np.array([UNKNOWN], np.uint32)).tolist() == [-1]


def device_scorer(model: Model) -> Scorer:
    """A scorer that goes the way of another device, which here is the CPU too."""
    scorer = Scorer(model, "cpu")
    scorer._served, scorer._on_device = None, DeviceStudent(scorer._student, scorer.device)
    return scorer


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_way_of_another_device_says_the_same(size):
    model = make_model(size)
    events, slots = make_stream(700, USERS, seed=21)
    expected, _, expected_rows = run(model, events, slots)
    scorer, rows = device_scorer(model), empty_rows(USERS, size)
    scorer.at_once = 300
    assert_same_scores(scorer.run(rows, slots, events)[0], expected)
    np.testing.assert_allclose(rows["h"], expected_rows["h"], rtol=0, atol=1e-5)
    nothing, _ = scorer.run(rows, slots[:0], events[:0])
    assert nothing.p_N3.shape == (0, 3)
    assert scorer.out_of_memory == 0


@pytest.mark.parametrize("step", ["encode", "before_heads"])
@pytest.mark.parametrize("holds", [0, 300, 1000])
def test_too_little_memory_on_the_device_costs_no_event(model, monkeypatch, step, holds):
    """Half as many at once, in the end the CPU; every event moves h once."""
    events, slots = make_stream(1500, USERS, seed=22)
    expected, _, expected_rows = run(model, events, slots)
    scorer, rows = device_scorer(model), empty_rows(USERS)
    whole = getattr(scorer._student, step)

    def tight(first, *rest):
        held = len(first.features_NF) if step == "encode" else len(first)
        if held > holds and scorer._served is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(first, *rest)

    monkeypatch.setattr(scorer._student, step, tight)
    scorer.at_once = 1024
    assert_same_scores(scorer.run(rows, slots, events)[0], expected)
    np.testing.assert_allclose(rows["h"], expected_rows["h"], rtol=0, atol=1e-5)
    failed, at_once = {0: (3, 128), 300: (2, 256), 1000: (1, 512)}[holds]
    assert (scorer.out_of_memory, scorer.at_once) == (failed, at_once)
    assert (scorer._served is not None) == (at_once == 128)
    again = empty_rows(USERS)
    assert_same_scores(scorer.run(again, slots, events)[0], expected)


def test_too_little_memory_for_a_rebuild_goes_on_on_the_cpu(model, monkeypatch):
    events, slots = make_stream(300, USERS, seed=23)
    _, _, rows = run(model, events, slots)
    rows["h_version"] = 0
    expected, scorer = rows.copy(), device_scorer(model)
    Scorer(model, "cpu").prepare(expected, slots)
    whole = scorer._student.encode

    def tight(columns):
        if scorer._served is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(columns)

    monkeypatch.setattr(scorer._student, "encode", tight)
    scorer.prepare(rows, slots)
    assert rows.tobytes() == expected.tobytes()
    assert scorer.out_of_memory == 1
    assert scorer.device.type == "cpu"


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_of_memory_that_is_none_is_refused(model, fraction):
    with pytest.raises(ValueError, match="memory_fraction"):
        Scorer(model, "cpu", memory_fraction=fraction)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_cuda_scores_the_same(size):
    model = make_model(size)
    events, slots = make_stream(400, USERS)
    expected, _, expected_rows = run(model, events, slots, [100])
    scorer, rows = Scorer(model, "cuda"), empty_rows(USERS, size)
    scores, _ = scorer.run(rows, slots[:100], events[:100])
    np.testing.assert_allclose(scores.p_N3, expected.p_N3[:100], rtol=0, atol=1e-4)
    scores, _ = scorer.run(rows, slots[100:], events[100:])
    np.testing.assert_allclose(scores.p_N3, expected.p_N3[100:], rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores.category_p_N5, expected.category_p_N5[100:], rtol=0, atol=1e-4)
    np.testing.assert_allclose(rows["h"], expected_rows["h"], rtol=0, atol=1e-4)
    rows["h_version"] = 0
    assert scorer.prepare(rows, np.arange(USERS)) == USERS
