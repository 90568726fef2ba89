"""Calibrating by labels that have not matured: what has come of an event so far, and what share has by its age.

    event ─── age ───► now      something that comes true with probability p has been seen to with p × come
          └─ come: of the matured positives of the same hour of the day, the share that came by that age

A label of a day is a day old before it is used; on the first day of a sale every probability is that of the day before.
What has come so far says sooner how often things happen. The hour is needed, since who comes back sleeps at night; so it is
for horizons of a day at most. Longer ones hold weeks and seasons, of which an hour of the day knows nothing.

Delayed feedback: Chapelle (KDD 2014), there with exponential delays. Shapes: N events, K matured positives. Times in ms.
Knows nothing of models, platforms or splits.
"""

from __future__ import annotations

import numpy as np

from trainer.train import OFFSET_PRIOR_BY_USERS, SLOPE_PRIOR_BY_USERS, design_effect

LONGEST_MS = 86_400_000
"""The longest horizon that this is for."""
LEAST_POSITIVES = 20
"""Fewer matured ones do not say when things come."""
_PULL = 20.0
"""Positives of all hours that each hour has beside its own."""
_MOST = 0.999999
"""Below 1, which says that a label has matured."""
_HOUR_MS, _HOURS = 3_600_000, 24


def share_come(delay_K: np.ndarray, ts_K: np.ndarray, age_N: np.ndarray, ts_N: np.ndarray) -> np.ndarray:
    """(N,) share in [0, 1] of what comes true of events at `ts_N` that has come when they are `age_N` old. `delay_K`: after
    how long it came of matured positives at `ts_K`. ValueError without any."""
    if not len(delay_K):
        raise ValueError("no matured positive says when things come")
    overall_N = np.searchsorted(np.sort(delay_K), age_N, side="right") / len(delay_K)
    hour_K, hour_N = (ts // _HOUR_MS % _HOURS for ts in (ts_K, ts_N))
    share_N = np.empty(len(age_N))
    for hour in np.unique(hour_N):
        of_N, own_k = hour_N == hour, np.sort(delay_K[hour_K == hour])
        come_n = np.searchsorted(own_k, age_N[of_N], side="right")
        share_N[of_N] = (come_n + _PULL * overall_N[of_N]) / (len(own_k) + _PULL)
    return share_N


def so_far(delay_N: np.ndarray, ts_N: np.ndarray, age_N: np.ndarray, horizon_ms: int) -> tuple[np.ndarray, np.ndarray]:
    """→ (N,) 0.0 or 1.0: it has come by now, within its horizon; (N,) share of what comes true that has come by now: 1 where
    the label has matured, below 1 of a younger event, 0 where nothing can be said of it. `delay_N`: after how long it came,
    very large where it has not."""
    matured_N = age_N >= horizon_ms
    hits_N = matured_N & (delay_N <= horizon_ms)
    young_N = ~matured_N & (age_N > 0)
    come_N = matured_N.astype(np.float64)
    if horizon_ms <= LONGEST_MS and hits_N.sum() >= LEAST_POSITIVES and young_N.any():
        share_n = share_come(delay_N[hits_N], ts_N[hits_N], age_N[young_N], ts_N[young_N])
        come_N[young_N] = np.minimum(share_n, _MOST)
    return (delay_N <= np.minimum(age_N, horizon_ms)).astype(np.float64), come_N


def line(logit_N: np.ndarray, y_N: np.ndarray, come_N: np.ndarray, user_N: np.ndarray) -> tuple[float, float]:
    """(slope ≥ 0, offset) on the logits under which what has come so far (`y_N`, 0 or 1) is likeliest, pulled to (1, 0) as
    by `trainer.train.affine`, which this is where everything has come (`come_N` of 1)."""
    x_N2 = np.stack([np.clip(logit_N, -15.0, 15.0), np.ones(len(logit_N))], axis=1).astype(np.float64)
    prior_2 = np.array([1.0, 0.0])
    error_N = y_N - come_N / (1.0 + np.exp(-x_N2 @ prior_2))
    strength_2 = design_effect(error_N, user_N) * np.array([SLOPE_PRIOR_BY_USERS, OFFSET_PRIOR_BY_USERS])
    theta_2 = prior_2.copy()
    for _ in range(25):
        p_N = 1.0 / (1.0 + np.exp(-x_N2 @ theta_2))
        unseen_N = np.maximum(1.0 - come_N * p_N, 1e-12)
        pull_N = y_N * (1.0 - p_N) - (1.0 - y_N) * come_N * p_N * (1.0 - p_N) / unseen_N
        weight_N = come_N * p_N * (1.0 - p_N) ** 2 / unseen_N
        curvature_22 = (x_N2 * weight_N[:, None]).T @ x_N2 + np.diag(strength_2)
        gradient_2 = x_N2.T @ pull_N - strength_2 * (theta_2 - prior_2)
        theta_2 += np.clip(np.linalg.solve(curvature_22, gradient_2), -1.0, 1.0)
    return max(0.0, float(theta_2[0])), float(theta_2[1])
