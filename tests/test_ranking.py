"""The section `ranking`: the whole mixture is what is served, ranks are conservative, futures are strictly later."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scorer import make_views
from tiny import PLATFORMS, make_table

from benchmarks import cells as bench_cells
from benchmarks import ranking
from benchmarks.datasets import DAY_MS, TEST, TRAIN, VALIDATE
from benchmarks.ranking import Copy, Sessions, Stream
from models.categories import MAX_CANDIDATES
from models.events import price_bucket
from models.student import N_GATES
from trainer import metrics


def test_the_whole_mixture_names_what_is_served():
    table, views, rng = make_table(max_categories=60), make_views(300), np.random.default_rng(2)
    platform_N = rng.integers(0, len(PLATFORMS) + 1, 300)
    gates_NG = rng.normal(0, 2, (300, N_GATES)).astype(np.float32)
    p_NC = ranking.mixture(table, views, platform_N, gates_NG)
    served_NT, served_p_NT, _ = table.predict(views, platform_N, gates_NG, top=MAX_CANDIDATES)
    for i in range(300):
        named = served_NT[i] >= 0
        np.testing.assert_allclose(p_NC[i, served_NT[i][named]], served_p_NT[i][named], atol=1e-6)
        assert p_NC[i, np.setdiff1d(np.arange(len(table.hashes_C)), served_NT[i][named])].sum() == pytest.approx(0, abs=1e-9)
    five_N5 = np.sort(p_NC, axis=1)[:, :-6:-1]
    np.testing.assert_allclose(table.predict(views, platform_N, gates_NG)[1], five_N5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_the_time_of_the_next_category_is_strictly_later(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 14))
    user = np.sort(rng.integers(0, 3, n))
    ts = rng.integers(0, 5, n)
    ts = ts[np.lexsort((ts, user))].astype(np.int64)
    category = rng.integers(0, 2, n).astype(np.uint32)
    expected = [
        min((ts[j] for j in range(n) if user[j] == user[i] and ts[j] > ts[i] and category[j]), default=2**62)
        for i in range(n)
    ]
    assert bench_cells._next_ts(user, ts, category).tolist() == expected


def stream(n: int = 200, v: int = 9, ring: int = 4, seed: int = 0) -> Stream:
    """The next category is mostly the last one's neighbour; a tenth of the rings are empty."""
    rng = np.random.default_rng(seed)
    ring_NK = rng.integers(0, v, (n, ring))
    ring_NK[rng.random(n) < 0.1] = -1
    next_N = np.where(rng.random(n) < 0.7, (ring_NK[:, 0] + 1) % v, rng.integers(0, v, n))
    part = rng.integers(0, 3, n)
    scored = {p: np.flatnonzero(part == p) for p in (VALIDATE, TEST)}
    return Stream(
        np.arange(n), np.arange(1, v + 1), ring_NK[:, 0], next_N, ring_NK, part == TRAIN, scored, part * 0, part * 0
    )


def test_ranks_by_the_kernel_are_those_of_the_dense_scores():
    one, rng = stream(), np.random.default_rng(1)
    at = one.scored[TEST]
    for rows in (1, 10):
        copy = Copy(rng.integers(1, 4, (rows, 9)) / 10, np.array([0.3, 0.1, 0.1, 0.0]))
        row_N = np.where(one.ring_NK[at, 0] < 0, 9, one.ring_NK[at, 0]) if rows > 1 else np.zeros(len(at), int)
        dense_NV = copy.base_RV[row_N]
        for i, r in enumerate(one.ring_NK[at]):
            for k, c in enumerate(r):
                if c >= 0:
                    dense_NV[i, c] += copy.share_K[k]
        np.testing.assert_array_equal(copy.ranks(one, at), metrics.ranks(dense_NV, one.next_N[at]))
        if rows > 1:
            np.testing.assert_allclose(copy.shares(one, at), dense_NV / dense_NV.sum(axis=1, keepdims=True))


def test_markov_and_copy_finds_the_neighbour():
    one = stream(2000)
    baselines, chosen = ranking.counted(one)
    value = {name: metrics.ndcgs(copy.ranks(one, one.scored[TEST])).mean() for name, copy in baselines.items()}
    assert value["Markov + copy"] > 0.7 > value["popularity"]
    assert max(value["Markov + copy"], value["Markov"]) > value["repeat last"] + 0.2
    assert chosen.startswith("smoothing")


def cells(student: float, markov: float, last: float, changed: float) -> dict:
    def part(values):
        names = ("student", "Markov + copy", "repeat last")
        return {name: {"NDCG@10": v, "NDCG@10_draws": np.full(5, v)} for name, v in zip(names, values, strict=True)}

    return {"shop": {"models": part((student, markov, last)), "changed": part((changed, changed, 0.2))}}


@pytest.mark.parametrize(
    ("values", "met", "aims"),
    [
        ((0.30, 0.29, 0.27, 0.25), [True, True], [True, True]),
        ((0.30, 0.304, 0.29, 0.24), [True, False], [False, False]),
        ((0.30, 0.306, 0.27, 0.26), [False, True], [False, True]),
    ],
)
def test_bars_are_computed(values, met, aims):
    found = ranking.bars(cells(*values)).values()
    assert [bar["met"] for bar in found] == met
    assert [bar["aim_met"] for bar in found] == aims
    assert all(len(bar["value"]["shop"]) == 3 for bar in found)


def test_sessions_are_split_in_the_order_of_the_file(tmp_path):
    rows = [(s, pos, 100 + (s + pos) % 7) for s in range(40) for pos in (1, 0, 2)]
    session, pos, item = (list(column) for column in zip(*rows, strict=True))
    pq.write_table(pa.table({"session": session, "pos": pos, "item": item}), tmp_path / "s.parquet")
    out = ranking.read_sessions(tmp_path / "s.parquet", last=20)
    assert out.n_items == 7 and len(out.item_N) == 60 and out.session_N[0] == 0 and out.session_N[-1] == 19
    first = [100 + (20 + p) % 7 for p in range(3)]
    assert (out.item_N[:3] + 99).tolist() == first
    assert out.next_N[:3].tolist() == [out.item_N[1], out.item_N[2], 0]
    assert np.bincount(out.split_N).tolist() == [42, 6, 12] and (np.diff(out.split_N) >= 0).all()
    kept = ranking._some(out, TEST, 3)
    assert kept.sum() == 6 and (out.split_N[kept] == TEST).all()


def test_item_baselines_on_a_known_case():
    """Item 2 always follows item 1; 3 goes with 1 too, but comes before it."""
    item, session = np.tile([3, 1, 2], 10), np.repeat(np.arange(10), 3)
    split = np.where(session < 8, TRAIN, TEST)
    following = np.where(np.arange(30) % 3 < 2, np.roll(item, -1), 0)
    sessions = Sessions(item, session, following, split, 5)
    at = np.flatnonzero((split == TEST) & (item == 1))
    ranks = ranking.item_baselines(sessions, at)
    assert ranks["item Markov"].tolist() == [1, 1]
    assert ranks["item kNN"].tolist() == [2, 2]  # ties with item 3
    assert ranks["repeat last"].tolist() == [3, 3]  # popularity ties 1, 2 and 3


@given(st.floats(0.02, 1e6))
def test_a_bucket_stands_for_a_price_near_the_true_one(price):
    assert ranking._amounts()[price_bucket(price)] == pytest.approx(price, rel=0.05)
    assert len(ranking._amounts()) == 256 and ranking._amounts()[0] == 0


def test_the_next_purchase_is_strictly_later_and_in_the_same_part():
    user, ts = np.array([0, 0, 0, 0, 1]), np.array([1, 1, 2, 3, 2])
    bought, amount = np.array([True, True, False, True, True]), np.array([1.0, 2.0, 9.0, 4.0, 5.0])
    following, past = ranking._next_and_past(user, ts, bought, amount, np.zeros(5))
    np.testing.assert_array_equal(following, [4.0, 4.0, 4.0, np.nan, np.nan])
    np.testing.assert_allclose(past, [1.0, 1.5, 1.5, 7 / 3, 5.0])
    following, _ = ranking._next_and_past(user, ts, bought, amount, np.array([0, 0, 0, 1, 0]))
    assert np.isnan(following).all()


def test_shift_compares_the_main_categories_of_two_windows():
    days = np.array([0, 10, 20, 21, 22, 23, 60, 61, 62, 63])
    category = np.array([1, 1, 2, 2, 2, 2, 3, 1, 1, 1], np.uint32)
    y, entropy = ranking.shifts(np.zeros(10, int), days * DAY_MS, category)
    # Only from day 20 on there are three events in both windows, and none after day 23's but those of day 60.
    assert np.flatnonzero(~np.isnan(y)).tolist() == [2]
    assert y[2] == 1 and entropy[2] == pytest.approx(-(2 / 3) * np.log(2 / 3) - (1 / 3) * np.log(1 / 3))
    same, _ = ranking.shifts(np.zeros(10, int), days * DAY_MS, np.ones(10, np.uint32))
    assert same[2] == 0
    none, _ = ranking.shifts(np.arange(10), days * DAY_MS, category)
    assert np.isnan(none).all()


def test_the_page_says_how_many_and_how_sure():
    figures = {title: 0.3 for title in ranking.FIGURES}
    of_ranks = {name: one | figures for name, one in cells(0.3, 0.2, 0.1, 0.1)["shop"]["models"].items()}
    about = {"n": 1234, "users": 56, "base_rate": 0.25, "catalogue": 78}
    of_cell = {name: {"auc": 0.7, "log_loss": 0.6} for name in ("boosting", "distilled")}
    binary = {
        "cells": {("shop", "click"): {"n": 9, "base_rate": 0.5, "models": of_cell}},
        "models": list(of_cell),
        "minus_distilled": {"boosting": {"auc": [0.01, -0.02, 0.03], "log_loss": [0.0, 0.0, 0.0]}},
    }
    category = {"models": of_ranks, "changed": of_ranks, "in_ring": 0.4, "chosen": "smoothing 20"}
    items = {"models": {name.replace("Markov + copy", "item Markov"): one for name, one in of_ranks.items()}}
    page = ranking.text(
        {
            "category": {"shop": about | category},
            "cells": binary,
            "next_item": {"sessions": about | items},
            "spend": {"shop": about | {"models": {"mean": {"mse": [1.0, 0.9, 1.1], "minus_lightgbm": [0.1, 0.0, 0.2]}}}},
            "shift": {"shop": about | {"learned": 7, "models": {"served": {"auc": [0.6, 0.5, 0.7]}}}},
        },
        50,
    )
    assert page.count("1,234") == 4 and "+0.0100 [-0.0200, +0.0300]" in page and "0.6000 [0.5000, 0.7000]" in page
    widths = {}
    for line in page.splitlines():
        if line.startswith("|"):
            widths.setdefault(line.count("|"), []).append(line)
    assert all(len(lines) >= 3 for lines in widths.values())
