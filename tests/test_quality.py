"""The quality benchmark's own parts: trips, anchors, the split, paired differences. The real data where they are there."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import cells as cells_
from benchmarks import datasets, quality, transfer
from benchmarks.datasets import MATRIX, TASKS, TEST, TRAIN, VALIDATE
from models.events import CanonicalEvent
from trainer import metrics

MINUTE_MS = 60_000


def line(user: str, minute: float, session: str, item: str, price: float, quantity: float = 1.0, kind: str = "purchase"):
    return CanonicalEvent(
        event_id=f"{session}-{item}", platform="p", user=user, kind=kind, ts=int(minute * MINUTE_MS), item=item,
        category=f"c-{item}", session=session, price=price, quantity=quantity,
    )  # fmt: skip


def test_lines_of_an_invoice_are_one_event_whose_item_is_what_was_most_spent_on():
    lines = [line("a", 0, "1", "x", 2.0, 5), line("a", 0, "1", "y", 8.0), line("b", 0, "2", "x", 1.0)]
    one, other = datasets._trips(lines, 0)
    assert (one.user, one.item, one.category, one.price, one.quantity) == ("a", "x", "c-x", 18.0, 2.0)
    assert (other.user, other.price) == ("b", 1.0)


def test_baskets_within_the_gap_are_one_trip_at_the_time_of_the_last():
    lines = [line("a", 0, "1", "x", 1.0), line("a", 29, "2", "y", 1.0), line("a", 58, "3", "z", 1.0)]
    lines += [line("a", 89, "4", "w", 1.0)]
    trips = list(datasets._trips(lines, 30 * MINUTE_MS))
    assert [trip.ts // MINUTE_MS for trip in trips] == [58, 89]
    assert [trip.ts // MINUTE_MS for trip in datasets._trips(lines, 0)] == [0, 29, 58, 89]


def test_a_cancellation_is_no_part_of_a_purchase():
    lines = [line("a", 0, "1", "x", 1.0), line("a", 0, "1", "y", 1.0, kind="cancel")]
    assert [trip.kind for trip in datasets._trips(lines, 0)] == ["purchase", "cancel"]


def test_so_far_counts_the_event_itself_and_nobody_else():
    user, bought = np.array([0, 1, 0, 1, 0]), np.array([True, False, False, True, True])
    assert datasets._so_far(bought, user).tolist() == [1, 0, 1, 1, 2]


def test_at_most_so_many_anchors_a_user_in_each_part_the_same_every_time():
    rng = np.random.default_rng(0)
    user, split = rng.integers(0, 5, 1000), rng.integers(0, 3, 1000).astype(np.int8)
    of = rng.random(1000) < 0.9
    kept = datasets._at_most(20, of, user, split)
    assert not (kept & ~of).any()
    assert np.bincount(user[kept] * 3 + split[kept]).tolist() == [20] * 15
    assert (kept == datasets._at_most(20, of, user, split)).all()


def test_anchors_of_the_gaps_are_capped_as_the_platform_is():
    """Six users of 80 events in the gaps and 80 in training, three on a capped platform; one has no anchors at all."""
    user, split = np.repeat(np.arange(6), 160), np.tile([-1, TRAIN], 480)
    history = SimpleNamespace(platforms=["retailrocket", "taobao"], platform=user // 3, user=user)
    uncapped = user != 2
    none = np.zeros((0, 0))
    data = datasets.DataSet(history, split, uncapped, uncapped & False, uncapped, none, none, none)
    found = data.gap_anchors()
    assert not (found & ((split != -1) | ~uncapped)).any()
    assert np.bincount(user[found], minlength=6).tolist() == [50, 50, 0, 80, 80, 80]


def test_a_gap_of_the_horizon_lies_between_the_parts():
    horizon = {"click": 1800 / 86400, "purchase": 1.0, "return": 7.0, "return_1d": 1.0, "return_30d": 30.0}
    for name, spec in MATRIX.items():
        for (_, stop), (start, _) in zip(spec.days, spec.days[1:], strict=False):
            assert start - stop >= max(horizon[task] for task in spec.tasks), name


def cells(gain: float) -> dict:
    """Two cells; `ours` ranks better than `theirs` by about `gain`."""
    rng = np.random.default_rng(0)
    out = {}
    for name in ("x", "y"):
        user, y = np.repeat(np.arange(200), 5), (rng.random(1000) < 0.4).astype(float)
        noise = rng.normal(size=1000)
        resamples = metrics.Resamples(user, 100)
        scores = {"ours": y * (1 + gain) + noise, "theirs": y + noise, "worse": 0.3 * y + noise}
        out["p", name] = {
            "models": {
                k: cells_._figures(y, z, 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-z)), user, resamples)
                for k, z in scores.items()
            }
        }
    return out


def test_differences_are_paired_and_against_the_best_in_each_cell():
    same = cells_.difference(cells(0.0), "ours", ("theirs", "worse"))
    assert same == (0.0, 0.0, 0.0)
    better = cells_.difference(cells(0.3), "ours", ("theirs", "worse"))
    assert better.low > 0 and better.value > 0.02
    assert cells_.difference(cells(0.3), "ours", "worse").value > better.value
    lone = cells(0.3)["p", "x"]
    assert cells_.best_of(lone, ("theirs", "worse"), "auc") == "theirs"
    assert cells_.best_of(lone, ("theirs", "worse"), "log_loss") == min(
        ("theirs", "worse"), key=lambda name: lone["models"][name]["log_loss"]
    )


HOUR_MS = 60 * MINUTE_MS
NEVER = 2**62


def test_what_is_calibrated_anew_knows_only_matured_labels():
    """One event an hour, a horizon of 300 hours."""
    rng = np.random.default_rng(0)
    hour, z = np.arange(4000), np.zeros(4000)
    y = rng.random(4000) < np.where(hour < 2000, 0.2, 0.7)
    anchors, at = np.arange(4000), np.arange(1500, 4000)

    def served(y: np.ndarray) -> np.ndarray:
        delay = np.where(y, HOUR_MS, NEVER)
        return cells_.refreshed(z, delay, hour * HOUR_MS, hour, anchors, at, 300 * HOUR_MS, 1000)

    p = served(y)
    assert abs(p[at < 2000].mean() - 0.2) < 0.05 and abs(p[at > 3600].mean() - 0.7) < 0.05
    changed = served(np.where(hour + 300 > 2750, ~y, y))
    begins = np.linspace(1500, 3999, cells_.REFRESHES, endpoint=False)
    seen = at < begins[begins > 2751].min()
    np.testing.assert_array_equal(p[seen], changed[seen])
    assert (p[~seen] != changed[~seen]).any()
    # What had matured in the gap between validation and test counts.
    assert (served(np.where((hour >= 1000) & (hour < 1200), ~y, y)) != p)[: len(at) // 20].all()


def test_within_a_day_it_knows_what_has_come_and_no_more():
    """One event a minute; what comes, comes within two hours; horizon: a day. From the fourth day on more comes."""
    rng = np.random.default_rng(0)
    n, day = 7200, 1440
    minute = np.arange(n)
    delay = np.where(rng.random(n) < np.where(minute < 3 * day, 0.2, 0.7), rng.integers(1, 120 * MINUTE_MS, n), NEVER)
    at = np.arange(2 * day, n)

    def served(delay: np.ndarray) -> np.ndarray:
        return cells_.refreshed(np.zeros(n), delay, minute * MINUTE_MS, minute, minute, at, day * MINUTE_MS, 2 * day)

    p = served(delay)
    begins = np.linspace(2 * day, n - 1, cells_.REFRESHES, endpoint=False)
    soon = (at > 3.5 * day) & (at < 4 * day)
    assert p[soon].mean() > 0.3  # no label of that day has matured
    begin = int(begins[begins > 4 * day].min())
    later = np.where(delay <= (begin - minute) * MINUTE_MS, delay, NEVER)
    np.testing.assert_array_equal(p[at <= begin], served(later)[at <= begin])
    assert (p[at > begin + day] != served(later)[at > begin + day]).all()


def test_what_a_perfect_model_would_show_is_read_off_its_draws():
    """Two cells, four draws: plain errors, and those of users."""
    x = np.array([[0.01, 0.02, 0.03, 0.00], [0.00, 0.01, 0.02, 0.00]])
    found = quality.perfectly_calibrated({"x": {"right_ece_draws": x}, "y": {"right_ece_draws": x / 2}})
    assert found["a perfect model, worst cell"] == 0.015 and found["chance that its worst cell is ≤ .010"] == 0.5
    assert found["a perfect model, of users, worst"] == 0.005 and found["the same, of users"] == 0.75
    assert found["a perfect model, mean over cells"] == pytest.approx(0.01125)
    assert found["a perfect model, of users, mean"] == pytest.approx(0.00375)


def test_a_cell_that_is_surely_off_misses_the_bar_of_calibration_and_chance_does_not():
    """Squares of two cells, with draws a little around them."""

    def bars(*squares: float) -> list[dict]:
        around = np.random.default_rng(0).normal(0.0, 2e-4, 400)
        cells = {
            ("p", str(i)): {
                "models": {
                    "distilled": {
                        "refreshed_ece_square": square, "refreshed_ece_square_draws": square + around,
                        "refreshed_ece": 0.02, "refreshed_ece_of_users": max(0.0, square) ** 0.5, "ece": 0.03,
                    }
                },
                "right_ece_draws": np.full((2, 4), 0.03),
            }
            for i, square in enumerate(squares)
        }  # fmt: skip
        return list(quality.calibration_bars(cells).values())

    bar, worst = bars(3e-4, -2e-4)
    assert bar["met"] and bar["value"]["macro"][0] == pytest.approx(0.5e-4**0.5) and not bar["aim_met"]
    assert not worst["met"] and worst["value"]["worst cell"] == 0.02
    assert worst["value"]["a perfect model, worst cell"] == 0.03
    bar, _ = bars(9e-4, -8e-4)  # as good over all, but one is surely off
    assert not bar["met"] and bar["value"]["surely above .010"] == ["p 0"]
    assert not bars(3e-4, 3e-4)[0]["met"]  # none surely, but both together
    assert bars(-1e-4, 1e-4)[0]["aim_met"]


def test_draws_stay_out_of_the_json():
    written = quality.plain(cells(0.1))
    assert set(written) == {"p x", "p y"}
    assert "auc" in written["p x"]["models"]["ours"] and "auc_draws" not in written["p x"]["models"]["ours"]


@pytest.mark.data
def test_the_matrix_on_the_real_data(data_dir):
    """Anchors and base rates of two platforms as the data's own description has them."""
    data = datasets.load(data_dir, ["taobao", "online_retail_uk"])
    at = data.of("taobao", "click", TEST)
    assert (len(at), len(np.unique(data.history.user[at]))) == (15_676, 8_042)
    rates = data.y_NT[at].mean(axis=0)
    for task, rate in (("click", 0.246), ("purchase", 0.361), ("return_1d", 0.537)):
        assert rates[TASKS.index(task)] == pytest.approx(rate, abs=5e-4)
    assert not len(data.of("online_retail_uk", "click", TEST))
    assert 2_370 < len(data.of("online_retail_uk", "return", TEST)) < 2_400
    for platform in (0, 1):
        ts = [data.history.events["ts"][(data.split_N == part) & (data.history.platform == platform)] for part in range(3)]
        assert ts[TRAIN].max() < ts[VALIDATE].min() and ts[VALIDATE].max() < ts[TEST].min()
    assert not (data.taught_N & np.isin(data.split_N, (VALIDATE, TEST))).any()


@pytest.mark.data
def test_without_the_cap_retailrocket_has_the_anchors_that_the_matrix_counts(data_dir):
    """4,271 of 480 users, .655, .417, .582 and .725: so the data are described, zero-shot figures too."""
    data = datasets.load(data_dir, ["retailrocket"])
    at = np.flatnonzero(data.uncapped_N & (data.split_N == TEST))
    assert (len(at), len(np.unique(data.history.user[at]))) == (4_271, 480)
    rates = data.y_NT[at].mean(axis=0)
    for task, rate in (("click", 0.655), ("purchase", 0.417), ("return_1d", 0.582), ("return", 0.725)):
        assert rates[TASKS.index(task)] == pytest.approx(rate, abs=5e-4)
    most = np.sort(np.bincount(data.history.user[at]))[-10:].sum() / len(at)
    assert most == pytest.approx(0.42, abs=5e-3)
    capped = data.of("retailrocket", "click", TEST)
    assert set(capped) < set(at) and np.bincount(data.history.user[capped]).max() == 50
    assert not (data.gap_anchors() & (data.split_N >= 0)).any() and data.gap_anchors().any()


def test_the_report_says_of_each_bar_whether_it_was_met():
    bar = {"must": "≥ 0", "aim": "≥ 1", "value": [0.5, 0.1, 0.9], "met": True, "aim_met": False}
    result = {
        "machine": {"cpu": "a", "cores": 2, "python": "3"},
        "minutes": 1.0,
        "bars": {"x": bar, "y": bar | {"value": 61_828, "met": False}},
    }
    figures = {
        "cells": {},
        "without cap": {},
        "seeds": 1,
        "draws": 10,
        "teacher": {"reasons": {"boosting": "kept"}},
        "canaries": {"z": "tripped"},
    }
    page = quality.report(result, [quality.tables(figures, [])], "command")
    assert "| x | ≥ 0 | ≥ 1 | +0.5000 [+0.1000, +0.9000] | yes | **no** |" in page
    assert "| y | ≥ 0 | ≥ 1 | 61,828 | **no** | **no** |" in page
    assert "- z: tripped" in page and "- boosting: kept" in page


def test_a_bar_says_its_value_in_one_line_whatever_it_is():
    assert quality._short(
        {"a": [0.1, -0.2, 0.3], "b": ["x y", "z"], "c": [], "d": 61_828, "e": None, "f": np.float32(0.5)}
    ) == ("a +0.1000 [-0.2000, +0.3000]; b x y, z; c none; d 61,828; e None; f 0.5000")


def test_zero_shot_counts_each_head_once():
    assert transfer.heads_of(("click", "purchase", "return_1d", "return")) == ["click", "purchase", "return"]
    assert transfer.heads_of(("click", "purchase", "return_1d")) == ["click", "purchase", "return_1d"]


@pytest.mark.parametrize(("minutes", "empty", "met"), [(5.9, True, True), (5.9, False, False), (15.1, True, False)])
def test_the_quick_bar_is_met_in_time_and_without_a_cache(minutes, empty, met):
    found = quality.quick_bar({"minutes": minutes, "cache_was_empty": empty})
    assert (found["met"], found["aim_met"], found["value"]["minutes"]) == (met, False, minutes)


def test_the_committed_quick_run_began_with_an_empty_cache():
    assert json.loads(quality.QUICK.read_text())["cache_was_empty"]
