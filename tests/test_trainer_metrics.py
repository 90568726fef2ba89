"""Figures of merit against scikit-learn and against their definitions; the bootstrap's draws and its coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from trainer import metrics

binary = st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=60)


def columns(drawn) -> tuple[np.ndarray, ...]:
    y, score, user, w = (np.array(column) for column in zip(*drawn, strict=True))
    return y.astype(np.uint8), score / 6.0, user, w.astype(float)


@given(binary)
@settings(max_examples=60, deadline=None)
def test_auc_and_average_precision_are_those_of_scikit_learn(drawn):
    y, score, _, w = columns(drawn)
    if len(set(y[w > 0])) == 2:
        assert metrics.auc(y, score, w) == pytest.approx(reference.roc_auc_score(y, score, sample_weight=w))
        assert metrics.average_precision(y, score, w) == pytest.approx(
            reference.average_precision_score(y, score, sample_weight=w)
        )
    else:
        assert np.isnan(metrics.auc(y, score, w))


@given(binary)
@settings(max_examples=40, deadline=None)
def test_a_weight_is_how_often_an_event_occurs(drawn):
    y, score, _, w = columns(drawn)
    again = np.repeat(np.arange(len(y)), w.astype(int))
    for figure in (metrics.auc, metrics.average_precision, metrics.log_loss):
        np.testing.assert_allclose(figure(y, score, w), figure(y[again], score[again]))


def test_an_auc_by_user_sees_only_the_order_of_his_own_events():
    y, user = np.array([1, 0, 1, 0, 1]), np.array([2, 0, 0, 1, 1])
    score = np.array([0.5, 0.8, 0.9, 0.2, 0.1])
    for moved in (score, score + user):
        np.testing.assert_array_equal(metrics.auc_by_user(y, moved, user), [np.nan, 1.0, 1.0, 0.0, 0.0])
    assert len(metrics.auc_by_user(y[:0], score[:0], user[:0])) == 0


def test_log_loss_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    p = rng.random(500)
    y = rng.random(500) < p
    assert metrics.log_loss(y, p) == pytest.approx(reference.log_loss(y, p))
    assert metrics.log_loss(np.array([1]), np.array([0.0])) == pytest.approx(-np.log(metrics.EPSILON))


def test_calibration_error_of_the_truth_is_about_zero_and_of_an_error_is_the_error():
    rng = np.random.default_rng(1)
    honest, plain = [], []
    for _ in range(40):
        p = rng.beta(2, 5, 3000)
        y = rng.random(3000) < p
        honest.append(metrics.ece(y, p))
        plain.append(np.mean([abs(p[k].mean() - y[k].mean()) for k in np.array_split(np.argsort(p), 15)]))
    assert np.mean(honest) < 0.4 * np.mean(plain)
    assert np.mean(np.array(honest) == 0.0) > 0.3  # as often too low as too high
    p = rng.beta(2, 5, 200_000) * 0.8
    y = rng.random(200_000) < p + 0.05
    assert metrics.ece(y, p) == pytest.approx(0.05, abs=0.004)
    assert metrics.predicted_over_actual(y, p) == pytest.approx(p.mean() / (p.mean() + 0.05), abs=0.01)


def test_the_calibration_error_of_users_who_err_together_is_about_nothing_where_the_model_is_honest():
    """Each of 300 users errs by a shift of his own, 20 events each: the mean is right, so only chance is left."""
    rng = np.random.default_rng(5)
    alone, together = [], []
    for _ in range(40):
        user = np.repeat(np.arange(300), 20)
        p = np.repeat(rng.uniform(0.2, 0.8, 300), 20)
        truth = np.clip(p + np.repeat(rng.choice([-0.2, 0.2], 300), 20), 0.0, 1.0)
        y = (rng.random(len(user)) < truth).astype(np.float32)
        alone.append(metrics.ece(y, p))
        together.append(metrics.ece(y, p, user=user))
    assert np.mean(np.array(together) == 0.0) > 0.3  # as often too low as too high
    assert np.mean(np.array(alone) == 0.0) < 0.1 and np.mean(together) < 0.5 * np.mean(alone)
    p = rng.uniform(0.2, 0.8, len(user))
    wrong = (rng.random(len(user)) < p + 0.1).astype(np.float32)
    assert metrics.ece(wrong, p, user=user) == pytest.approx(0.1, abs=0.025)
    singles = np.arange(len(user))
    assert metrics.ece(wrong, p, user=singles) == pytest.approx(metrics.ece(wrong, p), abs=0.001)


def test_the_interval_of_the_calibration_error_of_users_holds_what_is_true():
    """150 users of 20 events, each user off by a shift of his own: honest on the whole, or wrong by a tenth."""
    rng = np.random.default_rng(6)
    user = np.repeat(np.arange(150), 20)
    resamples = metrics.Resamples(user, 100)
    above, held = [], []
    for _ in range(30):
        p = np.repeat(rng.uniform(0.3, 0.7, 150), 20)
        truth = p + np.repeat(rng.choice([-0.15, 0.15], 150), 20)
        outcome = rng.random(len(user))
        honest = metrics.ece_interval(*metrics.ece_squares(outcome < truth, p, resamples.means))
        wrong = metrics.ece_interval(*metrics.ece_squares(outcome < truth + 0.1, p, resamples.means))
        above.append(honest.low > 0.010)
        held.append(wrong.low < 0.1 < wrong.high)
        assert wrong.low > honest.low or honest.low == 0.0
    assert np.mean(above) <= 0.1 and np.mean(held) >= 0.85


def test_what_chance_shows_of_a_right_model_is_told_from_the_labels_of_a_wrong_one():
    """120 users of 20 events, each off by a shift of his own. One model is wrong by a tenth besides; the errors that a right
    one shows from sample to sample are foretold from a single sample of the wrong one."""
    rng = np.random.default_rng(7)
    user = np.repeat(np.arange(120), 20)

    def sample(wrong: float) -> tuple[np.ndarray, np.ndarray]:
        p = np.repeat(rng.uniform(0.3, 0.7, 120), 20)
        truth = p + wrong + np.repeat(rng.choice([-0.15, 0.15], 120), 20)
        return (rng.random(len(user)) < truth).astype(np.float32), p

    def errors(y, p) -> tuple[float, float]:
        return metrics.ece(y, p), metrics.ece(y, p, user=user)

    seen = np.array([errors(*sample(0.0)) for _ in range(150)])
    y, p = sample(0.1)
    foretold = np.array([errors(each, p) for each in metrics.as_if_calibrated(y, p, user, 150)])
    assert errors(y, p)[1] > 0.08
    np.testing.assert_allclose(np.quantile(foretold, 0.95, axis=0), np.quantile(seen, 0.95, axis=0), atol=0.012)
    np.testing.assert_allclose(foretold.mean(axis=0), seen.mean(axis=0), atol=0.008)
    again = next(iter(metrics.as_if_calibrated(y, p, user, 1)))
    assert (again == next(iter(metrics.as_if_calibrated(y, p, user, 9)))).all() and not (again == y).any()
    assert not len(next(iter(metrics.as_if_calibrated(y[:0], p[:0], user[:0], 1))))


def test_at_threshold():
    y, p = np.array([1, 1, 0, 0, 0]), np.array([0.9, 0.2, 0.6, 0.1, 0.5])
    assert metrics.at_threshold(y, p, 0.5) == (pytest.approx(0.4), pytest.approx(1 / 3), 0.5, pytest.approx(0.4))
    assert np.isnan(metrics.at_threshold(y, p, 2.0).precision)


def test_a_tie_counts_against_the_model():
    scores = np.array([[0.5, 0.5, 0.5, 0.1], [0.9, 0.5, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0]])
    rank = metrics.ranks(scores, np.array([1, 0, 2]))
    assert rank.tolist() == [3, 1, 4]
    assert metrics.hit_rates(rank, 3).tolist() == [1, 1, 0]
    np.testing.assert_allclose(metrics.ndcgs(rank), [0.5, 1.0, 1 / np.log2(5)])
    np.testing.assert_allclose(metrics.mrrs(rank, 3), [1 / 3, 1.0, 0.0])


def test_resamples_take_users_whole_and_are_the_same_for_every_model():
    user = np.array([5, 5, 9, 7, 9, 5])
    ours, again = metrics.Resamples(user, 50, seed=3), metrics.Resamples(user, 50, seed=3)
    for draw in range(50):
        w = ours.weights(draw)
        assert (w == again.weights(draw)).all()
        assert w[0] == w[1] == w[5] and w[2] == w[4]
        assert w[0] + w[2] + w[3] == 3
    values = np.arange(6.0)
    np.testing.assert_allclose(ours.mean(values), ours.of(lambda w: values @ w / w.sum()))


def test_bootstrapped_figures_are_the_figures_under_the_weights():
    rng = np.random.default_rng(2)
    user, y, score = rng.integers(0, 40, 300), rng.random(300) < 0.3, rng.integers(0, 20, 300) / 20
    resamples = metrics.Resamples(user, 20)
    np.testing.assert_allclose(resamples.auc(y, score), resamples.of(lambda w: metrics.auc(y, score, w)))
    np.testing.assert_allclose(
        resamples.average_precision(y, score), resamples.of(lambda w: metrics.average_precision(y, score, w))
    )


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """Users with their own rates: an interval that took events for independent would be too narrow."""
    rng = np.random.default_rng(4)
    covered = 0
    for seed in range(100):
        rate_U = rng.beta(2, 2, 80)
        user = np.repeat(np.arange(80), 20)
        y = (rng.random(1600) < rate_U[user]).astype(float)
        at = metrics.interval(y.mean(), metrics.Resamples(user, 200, seed).mean(y))
        covered += not at.excludes(0.5)
    assert 85 <= covered <= 100


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        metrics.auc(np.array([0, 1]), np.array([0.1, np.nan]))


def test_holm_rejects_from_the_smallest_on_until_one_fails():
    assert metrics.holm([0.04, 0.001, 0.02]) == [True, True, True]
    assert metrics.holm([0.06, 0.001, 0.02]) == [False, True, True]
    assert metrics.holm([0.02, 0.03, 0.9]) == [False, False, False]
    assert metrics.holm([0.01, 0.03, 0.9]) == [True, False, False]
    assert metrics.holm([]) == []
