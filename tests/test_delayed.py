"""Calibrating by labels that have not matured: shares by age and hour, the line, and what cannot be said."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.delayed import LEAST_POSITIVES, LONGEST_MS, line, share_come, so_far
from trainer.train import affine

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
NEVER = 2**62


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def shoppers(n: int = 60_000, seed: int = 0, added: float = 0.0):
    """Two days of events. What comes true comes within minutes by day, and only in the morning when asked for at night
    (0 to 6 h). → (logits, ts, delay)."""
    rng = np.random.default_rng(seed)
    ts = np.sort(rng.integers(0, 2 * DAY_MS, n))
    logit = rng.normal(-0.5, 1.0, n)
    hour = ts // HOUR_MS % 24
    night = np.where(hour < 6, (6 - hour) * HOUR_MS - ts % HOUR_MS, 0)
    delay = night + rng.exponential(2 * HOUR_MS, n).astype(np.int64) + 1
    drift = np.where(ts >= DAY_MS, added, 0.0)
    return logit, ts, np.where((rng.random(n) < sigmoid(logit + drift)) & (delay <= DAY_MS), delay, NEVER)


def test_the_share_is_that_of_the_same_hour():
    _, ts, delay = shoppers()
    hits = (ts < DAY_MS) & (delay < NEVER)
    at = np.array([DAY_MS + 2 * HOUR_MS, DAY_MS + 12 * HOUR_MS])
    night, noon = share_come(delay[hits], ts[hits], np.full(2, 3 * HOUR_MS), at)
    assert night < 0.1 and noon == pytest.approx(1 - np.exp(-1.5), abs=0.08)
    assert share_come(delay[hits], ts[hits], np.array([0, DAY_MS]), at).tolist() == [0.0, 1.0]


def test_an_hour_without_positives_of_its_own_is_told_by_all():
    delay, ts = np.arange(1, 101) * 60_000, np.zeros(100, np.int64)
    assert share_come(delay, ts, np.array([50 * 60_000]), np.array([5 * HOUR_MS]))[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no matured positive"):
        share_come(delay[:0], ts[:0], np.array([1]), np.array([1]))


def test_a_change_of_today_is_found_before_its_labels_mature():
    """At noon of the second day things happen more often than before: the matured labels are all of the first."""
    logit, ts, delay = shoppers(added=0.8)
    now = DAY_MS + 12 * HOUR_MS
    seen = ts < now
    logit, ts, delay = logit[seen], ts[seen], delay[seen]
    age, user = now - ts, np.arange(len(ts))
    y, come = so_far(delay, ts, age, DAY_MS)
    today = (ts >= DAY_MS) & (come > 0.0)
    assert (y == (delay <= np.minimum(age, DAY_MS))).all()
    slope, added = line(logit[today], y[today], come[today], user[today])
    assert (slope, added) == (pytest.approx(1.0, abs=0.1), pytest.approx(0.8, abs=0.15))
    # By the age alone, hours mixed, it would be found wrong.
    blind = (
        np.searchsorted(np.sort(delay[(age >= DAY_MS) & (delay < NEVER)]), age, side="right")
        / ((age >= DAY_MS) & (delay < NEVER)).sum()
    )
    assert line(logit[today], y[today], blind[today], user[today])[1] > added + 0.2


def test_what_can_be_said_of_an_event():
    _, ts, delay = shoppers()
    now = 3 * DAY_MS // 2
    age = now - ts
    _, come = so_far(delay, ts, age, DAY_MS)
    assert (come[age >= DAY_MS] == 1.0).all() and (come[age < DAY_MS] < 1.0).all() and (come[age <= 0] == 0.0).all()
    assert set(so_far(delay, ts, age, LONGEST_MS + 1)[1].tolist()) == {0.0, 1.0}  # matured ones alone
    few = np.flatnonzero((age >= DAY_MS) & (delay < NEVER))[LEAST_POSITIVES - 1 :]
    delay[few] = NEVER
    assert set(so_far(delay, ts, age, DAY_MS)[1].tolist()) == {0.0, 1.0}


@given(st.integers(0, 300), st.integers(1, 30), st.integers(0, 2**16), st.floats(-4, 4), st.floats(-1, 3))
@settings(max_examples=60, deadline=None)
def test_the_line_is_a_number_and_where_all_has_come_it_is_that_of_the_labels(n, users, seed, added, slope):
    rng = np.random.default_rng(seed)
    logit, user = rng.normal(0.0, 3.0, n), rng.integers(0, users, n)
    y = (rng.random(n) < sigmoid(slope * logit + added)).astype(float)
    assert line(logit, y, np.ones(n), user) == pytest.approx(affine(logit, y, (1.0, 0.0), user), abs=1e-6)
    come = rng.random(n)
    found = line(logit, y * (rng.random(n) < come), come, user)
    assert np.isfinite(found).all() and found[0] >= 0.0
