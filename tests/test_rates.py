"""A user's own matured label rates: what was known at each event, and nothing that came later."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.rates import matured_counts, rate_features


def plain(user, ts, y, known, horizon):
    """The same by looking at every pair."""
    hits, tries = np.zeros(y.shape), np.zeros(y.shape)
    for i in range(len(user)):
        for j in range(i):
            for task in range(y.shape[1]):
                if user[j] == user[i] and known[j, task] and ts[j] + horizon[task] <= ts[i]:
                    hits[i, task] += y[j, task]
                    tries[i, task] += 1
    return hits, tries


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_equals_a_count_over_all_pairs(seed, n):
    rng = np.random.default_rng(seed)
    user, ts = rng.integers(0, 4, n), rng.integers(0, 50, n)
    order = np.lexsort((ts, user))
    user, ts = user[order], ts[order]
    y, known = rng.integers(0, 2, (n, 3)).astype(np.float32), rng.random((n, 3)) < 0.7
    horizon = np.array([0, 5, 20])
    for ours, theirs in zip(matured_counts(user, ts, y, known, horizon), plain(user, ts, y, known, horizon), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_label_counts_from_the_end_of_its_horizon_and_not_before():
    user, ts = np.zeros(3, int), np.array([0, 9, 10])
    y, known = np.ones((3, 1), np.float32), np.ones((3, 1), bool)
    hits, tries = matured_counts(user, ts, y, known, np.array([10]))
    assert hits[:, 0].tolist() == tries[:, 0].tolist() == [0, 0, 1]


def test_what_is_still_to_come_does_not_matter():
    rng = np.random.default_rng(1)
    user, ts = np.zeros(50, int), np.sort(rng.integers(0, 1000, 50))
    y, known = rng.integers(0, 2, (50, 1)).astype(np.float32), np.ones((50, 1), bool)
    before = matured_counts(user, ts, y, known, np.array([100]))[0][:30]
    y[ts + 100 > ts[29]] = 1 - y[ts + 100 > ts[29]]
    np.testing.assert_array_equal(matured_counts(user, ts, y, known, np.array([100]))[0][:30], before)


def test_features_are_the_rate_and_how_much_is_behind_it():
    features = rate_features(np.array([[0.0, 3.0]], np.float32), np.array([[0.0, 4.0]], np.float32))
    np.testing.assert_allclose(features, [[0.5, 4 / 6, 0.0, np.log(5)]], rtol=1e-6)


def test_only_known_labels_count():
    user, ts = np.array([1, 1, 1, 1, 2]), np.array([0, 10, 20, 30, 30])
    y, known = np.array([[1.0], [1.0], [0.0], [1.0], [1.0]]), np.array([[True], [False], [True], [True], [True]])
    hits, tries = matured_counts(user, ts, y, known, np.array([10]))
    assert hits[:, 0].tolist() == [0, 1, 1, 1, 0]
    assert tries[:, 0].tolist() == [0, 1, 1, 2, 0]
