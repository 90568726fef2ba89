"""Figures of merit and their intervals, weighted, so that a bootstrap over users is the same function with other weights.

    auc, auc_by_user, average_precision, log_loss, ece, at_threshold    of binary outcomes
    ranks → hit_rate, ndcg, mrr                                         of one right answer among many
    Resamples → interval, paired                                        user-clustered bootstrap

Weights are counts of how often an event is drawn; None: once. A figure that has no meaning (one outcome only, no events)
is NaN. Knows nothing of models, platforms or splits.

Sources: AUC by ranks with ties counted half (Mann and Whitney 1947; Hanley and McNeil 1982). Debiased calibration error:
the squared difference minus the variance of the mean in each bin (Kumar, Liang and Ma 2019, definition 5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numba import njit

EPSILON = 1e-6
"""Probabilities are clipped to [EPSILON, 1 − EPSILON] in a log-loss."""


class Sorted(NamedTuple):
    """Outcomes in the order of a score, ready for `auc` under many weights."""

    order: np.ndarray
    y: np.ndarray
    """uint8, ascending by score."""
    ends: np.ndarray
    """bool: the last of its score."""


def by_score(y: np.ndarray, score: np.ndarray) -> Sorted:
    """Sorts once what `auc` and `average_precision` need for every weight. ValueError where a score is no number."""
    if not np.isfinite(score).all():
        raise ValueError("a score is not finite")
    order = np.argsort(score, kind="stable")
    ascending = score[order]
    ends = np.r_[ascending[1:] != ascending[:-1], True] if len(order) else np.empty(0, bool)
    return Sorted(order, y[order].astype(np.uint8), ends)


@njit(cache=True)
def _auc(y, ends, w):
    below = half = area = positives = 0.0
    tied_positives = 0.0
    for i in range(len(y)):
        if y[i]:
            tied_positives += w[i]
        else:
            half += w[i]
        if ends[i]:
            area += tied_positives * (below + 0.5 * half)
            positives += tied_positives
            below += half
            half = tied_positives = 0.0
    return area / (positives * below) if positives > 0.0 and below > 0.0 else np.nan


@njit(cache=True)
def _average_precision(y, ends, w):
    """From the greatest score down; tied scores are one step."""
    n = len(y)
    seen = hits = step_all = step_hits = area = 0.0
    for k in range(n):
        i = n - 1 - k
        step_all += w[i]
        if y[i]:
            step_hits += w[i]
        if i == 0 or ends[i - 1]:
            seen += step_all
            hits += step_hits
            if seen > 0.0:
                area += step_hits * hits / seen
            step_all = step_hits = 0.0
    return area / hits if hits > 0.0 and hits < seen else np.nan


def auc(y: np.ndarray, score: np.ndarray, w: np.ndarray | None = None) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half."""
    return _of_sorted(_auc, by_score(y, score), w)


def average_precision(y: np.ndarray, score: np.ndarray, w: np.ndarray | None = None) -> float:
    """Area under the precision-recall curve as the step-wise sum of precision over recall."""
    return _of_sorted(_average_precision, by_score(y, score), w)


def _of_sorted(kernel: Callable, ordered: Sorted, w: np.ndarray | None) -> float:
    w = np.ones(len(ordered.y)) if w is None else w[ordered.order].astype(np.float64)
    return float(kernel(ordered.y, ordered.ends, w))


def auc_by_user(y: np.ndarray, score: np.ndarray, user: np.ndarray) -> np.ndarray:
    """(n,) of each event the AUC among its user's events; NaN where they have one outcome only."""
    out = np.full(len(y), np.nan)
    order = np.argsort(user, kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(user[order])) + 1):
        if len(own) > 1 and 0 < y[own].sum() < len(own):
            out[own] = auc(y[own], score[own])
    return out


def log_losses(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """(n,) −log of the probability given to what happened."""
    p = np.clip(p.astype(np.float64), EPSILON, 1.0 - EPSILON)
    return -np.where(y > 0, np.log(p), np.log1p(-p))


def log_loss(y: np.ndarray, p: np.ndarray, w: np.ndarray | None = None) -> float:
    return _mean(log_losses(y, p), w)


def _mean(values: np.ndarray, w: np.ndarray | None) -> float:
    if w is None:
        return float(values.mean()) if len(values) else float("nan")
    total = float(w.sum())
    return float(values @ w) / total if total > 0 else float("nan")


def ece(y: np.ndarray, p: np.ndarray, w: np.ndarray | None = None, bins: int = 15, user: np.ndarray | None = None) -> float:
    """Debiased expected calibration error over `bins` bins of equal mass: the root of the mean squared difference of
    predicted and actual, less what chance alone adds to the square. At least 0. `user`: whose events they are, where a
    user's events may err together, which adds more (the variance over users in a bin; without `w`)."""
    w = np.ones(len(y)) if w is None else w.astype(np.float64)
    if w.sum() < bins:
        return float("nan")
    order = np.argsort(p, kind="stable")
    y, p, w = y[order].astype(np.float64), p[order].astype(np.float64), w[order]
    # The middle of each event's mass decides its bin.
    at = np.minimum(((np.cumsum(w) - 0.5 * w) / w.sum() * bins).astype(int), bins - 1)
    n_B = np.bincount(at, w, bins)
    some = n_B > 1
    n_B, y_B, p_B = n_B[some], np.bincount(at, w * y, bins)[some], np.bincount(at, w * p, bins)[some]
    actual_B, gap_B = y_B / n_B, (p_B - y_B) / n_B
    noise_B = actual_B * (1.0 - actual_B) / (n_B - 1.0)
    if user is not None:
        gap_of_bin = np.zeros(bins)
        gap_of_bin[some] = gap_B
        noise_B = _noise_of_users(p - y - gap_of_bin[at], at, user[order], bins)[some]
    return float(np.sqrt(max(0.0, float(n_B / n_B.sum() @ (gap_B**2 - noise_B)))))


def _noise_of_users(error: np.ndarray, at: np.ndarray, user: np.ndarray, bins: int) -> np.ndarray:
    """(bins,) variance of each bin's mean of `error` (whose own mean in the bin is 0), users drawn."""
    of_users, which = np.unique(np.stack([at, user]), axis=1, return_inverse=True)
    sums = np.bincount(which.ravel(), error)
    users_B = np.bincount(of_users[0], minlength=bins)
    square_B = np.bincount(of_users[0], sums**2, bins)
    return square_B * users_B / np.maximum(users_B - 1, 1) / np.maximum(np.bincount(at, minlength=bins), 1) ** 2


def ece_squares(y: np.ndarray, p: np.ndarray, means: Callable[..., np.ndarray], bins: int = 15) -> tuple[float, np.ndarray]:
    """→ the debiased square of the calibration error over bins of about equal mass, a user's events erring together; (D,)
    its draws. `means`: values (n,) … → (values, D) their means over the events that each resample of users drew.

    The square of a bin's gap holds the gap's own variance, and that of a resample's gap holds it twice: once as the
    sample has it, once from resampling. Both are taken off, or the interval of a perfect model would lie above 0.
    """
    edges = np.unique(np.quantile(p, np.arange(1, bins) / bins))
    bin_n, error_n = np.searchsorted(edges, p), p - y
    inside_Bn = [bin_n == b for b in np.unique(bin_n)]
    means_KD = means(*inside_Bn, *(inside * error_n for inside in inside_Bn))
    means_KD = means_KD[:, ~np.isnan(means_KD[0])]
    share_BD, error_BD = np.split(means_KD, 2)
    gap_BD = error_BD / np.where(share_BD > 0.0, share_BD, 1.0)
    noise_B = gap_BD.var(axis=1)
    share_B = np.array([inside.mean() for inside in inside_Bn])
    gap_B = np.array([error_n[inside].mean() for inside in inside_Bn])
    return float(share_B @ (gap_B**2 - noise_B)), (share_BD * (gap_BD**2 - 2.0 * noise_B[:, None])).sum(axis=0)


def ece_interval(square: float, square_draws: np.ndarray) -> Interval:
    """Of `ece_squares`: the error, at least 0, with its interval."""
    return Interval(*(float(np.sqrt(max(0.0, part))) for part in interval(square, square_draws)))


def as_if_calibrated(
    y: np.ndarray, p: np.ndarray, user: np.ndarray, draws: int, seed: int = 0, bins: int = 15
) -> Iterator[np.ndarray]:
    """What might have come true had the predictions been right: (n,) outcomes, so many times. An event's error, less the
    mean of its bin of equal mass, keeps its size and gets a random sign, the same for all of its user's (the wild bootstrap
    of clusters: Cameron, Gelbach and Miller, 2008), so that users err together as they did. No outcome is 0 or 1; each has
    the prediction as its mean."""
    at = np.empty(len(p), np.int64)
    at[np.argsort(p, kind="stable")] = np.arange(len(p)) * bins // max(len(p), 1)
    error = y.astype(np.float64) - p
    error -= (np.bincount(at, error, bins) / np.maximum(np.bincount(at, minlength=bins), 1))[at]
    users, of_event = np.unique(user, return_inverse=True)
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield p + rng.choice([-1.0, 1.0], len(users))[of_event] * error


def predicted_over_actual(y: np.ndarray, p: np.ndarray, w: np.ndarray | None = None) -> float:
    """Sum of the probabilities over the number of positives; NaN without positives."""
    actual = _mean(y.astype(np.float64), w)
    return _mean(p.astype(np.float64), w) / actual if actual > 0 else float("nan")


class AtThreshold(NamedTuple):
    accuracy: float
    precision: float
    recall: float
    f1: float


def at_threshold(y: np.ndarray, p: np.ndarray, threshold: float) -> AtThreshold:
    """What deciding by p ≥ threshold gives. Precision is NaN where nothing is said, recall where nothing happened."""
    said, did = p >= threshold, y > 0
    hits = float((said & did).sum())
    precision = hits / said.sum() if said.any() else float("nan")
    recall = hits / did.sum() if did.any() else float("nan")
    f1 = 2.0 * hits / (said.sum() + did.sum()) if said.any() or did.any() else float("nan")
    return AtThreshold(float((said == did).mean()) if len(y) else float("nan"), precision, recall, f1)


# ── one right answer among many ──────────────────────────────────────────────────────────────────────────────────────


def ranks(scores_NC: np.ndarray, answer_N: np.ndarray) -> np.ndarray:
    """(n,) 1-based rank of the right column, conservative: whatever ties with it stands before it."""
    own_N1 = np.take_along_axis(scores_NC, answer_N[:, None], axis=1)
    return (scores_NC >= own_N1).sum(axis=1)


def hit_rates(rank_N: np.ndarray, k: int = 5) -> np.ndarray:
    """(n,) 1 where the answer is among the first k."""
    return (rank_N <= k).astype(np.float64)


def ndcgs(rank_N: np.ndarray, k: int = 10) -> np.ndarray:
    """(n,) 1 / log2(1 + rank) within the first k, else 0: with one right answer the ideal is 1."""
    return np.where(rank_N <= k, 1.0 / np.log2(1.0 + rank_N), 0.0)


def mrrs(rank_N: np.ndarray, k: int = 20) -> np.ndarray:
    """(n,) 1 / rank within the first k, else 0."""
    return np.where(rank_N <= k, 1.0 / rank_N, 0.0)


# ── intervals ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Interval(NamedTuple):
    """A figure with the 2.5 and 97.5 % points of its bootstrap."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return value < self.low or value > self.high


class Resamples:
    """Bootstrap resamples of users: each draw takes as many users as there are, with replacement, and every one of his
    events with him. The same seed gives the same draws, so that models are compared on equal ones."""

    def __init__(self, user: np.ndarray, draws: int = 400, seed: int = 0) -> None:
        """`user`: (n,) of each event."""
        users, self._of_event = np.unique(user, return_inverse=True)
        rng = np.random.default_rng(seed)
        n = len(users)
        self._times_DU = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(draws)]).astype(np.float64)

    def __len__(self) -> int:
        return len(self._times_DU)

    def weights(self, draw: int) -> np.ndarray:
        """(n,) float64: how often each event is drawn."""
        return self._times_DU[draw][self._of_event]

    def auc(self, y: np.ndarray, score: np.ndarray) -> np.ndarray:
        """(draws,) of `auc`."""
        return self._sorted(_auc, y, score)

    def average_precision(self, y: np.ndarray, score: np.ndarray) -> np.ndarray:
        """(draws,) of `average_precision`."""
        return self._sorted(_average_precision, y, score)

    def _sorted(self, kernel: Callable, y: np.ndarray, score: np.ndarray) -> np.ndarray:
        ordered = by_score(y, score)
        of_event = self._of_event[ordered.order]
        return np.array([kernel(ordered.y, ordered.ends, times_U[of_event]) for times_U in self._times_DU])

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(draws,) weighted mean of values (n,), by sums over users: fast."""
        return self.means(values)[0]

    def means(self, *values: np.ndarray) -> np.ndarray:
        """(len(values), draws) of `mean`."""
        users = self._times_DU.shape[1]
        n_D = self._times_DU @ np.bincount(self._of_event, minlength=users)
        return np.stack([self._times_DU @ np.bincount(self._of_event, own, users) / n_D for own in values])

    def of(self, figure: Callable[[np.ndarray], float]) -> np.ndarray:
        """(draws,) of any figure of the weights."""
        return np.array([figure(self.weights(draw)) for draw in range(len(self))])


def interval(value: float, draws: np.ndarray) -> Interval:
    """95 % by percentiles. NaN draws (one outcome only) are left out."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def holm(p_values: list[float], alpha: float = 0.05) -> list[bool]:
    """Which of several hypotheses are rejected with the family-wise error at `alpha` (Holm 1979)."""
    rejected = [False] * len(p_values)
    for k, i in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[i] > alpha / (len(p_values) - k):
            break
        rejected[i] = True
    return rejected
