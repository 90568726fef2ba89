"""A ring folded on what the row was before it: the features that its events had, where the row still tells them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_stream

from models.config import FoldConfig
from models.events import EVENT
from models.fold import FEATURE_NAMES, N_FEATURES, fold, fold_params, refold_rings
from models.rebuild import refold, rows_before
from models.state import SIZES, empty_rows

PARAMS = fold_params(FoldConfig())
USERS = 6
EXACT = [
    FEATURE_NAMES.index(name)
    for name in ("log_events", "log_tenure", "ring_fill", "price_mean", "price", "hour_sin", "has_category", "log_quantity")
]
LONG = [i for i, name in enumerate(FEATURE_NAMES) if name.startswith("log_count") and name.endswith(("_30d", "_7d"))]


def folded(n: int, seed: int, size: str = "cpu"):
    """In time, one of each, quantity 1. → rows, events, slots, features, Δt as the live fold gave them."""
    events, slots = make_stream(n, USERS, seed=seed)
    rng = np.random.default_rng(seed)
    events["offset"], events["quantity"] = np.arange(n), 1.0
    events["id"] = rng.permutation(n) + 1
    events["ts"] = 1_700_000_000_000 + np.cumsum(
        rng.choice([1_000, 90_000, 3_000_000, 40_000_000], n, p=[0.3, 0.4, 0.2, 0.1])
    )
    rows, features, dt_s = empty_rows(USERS, size), np.zeros((n, N_FEATURES), np.float32), np.zeros(n, np.float32)
    fold(rows, slots, events, PARAMS, features, dt_s, np.zeros(n, np.uint8))
    return rows, events, slots, features, dt_s


def of_rings(rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Positions in the stream of the events of all rings, user after user, oldest first."""
    return np.concatenate([np.flatnonzero(slots == user)[-int(rows["n_ring"][user]) :] for user in range(USERS)])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_history_that_lies_in_its_ring_is_folded_to_the_same_bytes(seed):
    rows, _, slots, features, dt_s = folded(40, seed)
    users = np.flatnonzero((rows["n_events"] == rows["n_ring"]) & (rows["n_ring"] > 0))
    at = np.concatenate([np.flatnonzero(slots == user) for user in users])
    again = refold(rows, users, PARAMS)
    assert again.features.tobytes() == features[at].tobytes()
    assert again.dt_s.tobytes() == dt_s[at].tobytes()
    assert again.counts.tolist() == [int((slots == user).sum()) for user in users]
    assert not rows_before(rows[users], PARAMS)["n_events"].any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from(sorted(SIZES)))
def test_of_a_longer_history_some_features_are_known(seed, size):
    rows, _, slots, features, _ = folded(600, seed, size)
    at = of_rings(rows, slots)
    again = refold(rows, np.arange(USERS), PARAMS)
    assert (rows["n_events"] > rows["n_ring"]).any()
    np.testing.assert_allclose(again.features[:, EXACT], features[at][:, EXACT], atol=2e-3)
    np.testing.assert_allclose(again.features[:, LONG], features[at][:, LONG], atol=0.05)


def test_it_knows_far_more_than_a_fold_on_an_empty_row():
    for seed in range(5):
        rows, _, slots, features, _ = folded(900, seed)
        live, ring = features[of_rings(rows, slots)], SIZES["cpu"][1]
        blank = np.zeros((USERS * ring, N_FEATURES), np.float32)
        refold_rings(rows, np.arange(USERS), PARAMS, blank, np.zeros(len(blank), np.float32), np.zeros(len(blank), EVENT))
        scale = live.std(axis=0) + 0.1
        ours, theirs = (np.abs((f - live) / scale).mean() for f in (refold(rows, np.arange(USERS), PARAMS).features, blank))
        assert ours < 0.5 * theirs, (seed, ours, theirs)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_whatever_the_stream_the_row_before_could_be_one_and_no_row_changes(seed):
    """Late events, repeats and replayed offsets too."""
    events, slots = make_stream(700, USERS, seed=seed)
    rows = empty_rows(USERS)
    n = len(events)
    fold(rows, slots, events, PARAMS, np.zeros((n, N_FEATURES), np.float32), np.zeros(n, np.float32), np.zeros(n, np.uint8))
    kept = rows.tobytes()
    again, before = refold(rows, np.arange(USERS), PARAMS), rows_before(rows, PARAMS)
    assert rows.tobytes() == kept
    assert np.isfinite(again.features).all() and np.isfinite(again.dt_s).all() and (again.dt_s >= 0).all()
    for field in ("counts", "mix_long_weight", "mix_short_weight", "gap_mean_s", "price_mean"):
        assert np.isfinite(before[field]).all() and (before[field] >= 0).all(), field
    assert (np.diff(before["counts"], axis=2) >= -1e-5).all()
    assert (before["first_ts"] <= before["last_ts"]).all() and (before["visits"] <= before["n_events"]).all()
    assert not before["n_ring"].any() and not before["h"].any()


@pytest.mark.parametrize("slots", [[], [3]])
def test_empty_rows_have_nothing_to_fold(slots):
    again = refold(empty_rows(5), np.array(slots, np.int64), PARAMS)
    assert len(again.events) == len(again.features) == 0 and again.counts.tolist() == [0] * len(slots)
