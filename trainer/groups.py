"""Groups of examples, and weights under which a small or a hard group counts for more.

    platform × activity (events so far) × price band (the user's mean price, thirds within the platform) ─► group ─► weight

`by_frequency`: a group of n examples weighs n^−½ each, so that a group's share of the loss grows with the root of its size.
`by_loss`: one step of group distributionally robust optimisation (Sagawa et al., ICLR 2020): weights grow exponentially
with what a first model lost on the group, on the examples to check by.

Shapes: M examples, G groups. Weights have mean 1 over the examples learned from, platform by platform, so that they move
nothing between platforms: `fit.platform_weights` does that. Knows nothing of networks, histories or files.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from models.fold import FEATURE_NAMES
from trainer.examples import Examples

ACTIVITY: tuple[tuple[str, int], ...] = (("1 event", 1), ("2-3 events", 3), ("4-10", 10), ("11-50", 50), ("over 50", 2**62))
"""Name → most events behind an example, its own included."""
PRICES = ("no price", "low price", "middle price", "high price")
LEAST = 50
"""A group with fewer examples than this weighs as one with as many."""
MOST = 4.0
"""No example weighs more than this before the mean is put to 1."""

_LOG_EVENTS, _PRICE_MEAN = FEATURE_NAMES.index("log_events"), FEATURE_NAMES.index("price_mean")


class Groups(NamedTuple):
    """Which group each of M examples is in."""

    platform_M: np.ndarray
    activity_M: np.ndarray
    """Index into ACTIVITY."""
    price_M: np.ndarray
    """Index into PRICES."""

    @property
    def group_M(self) -> np.ndarray:
        """(M,) int: one number a group."""
        return (self.platform_M * len(ACTIVITY) + self.activity_M) * len(PRICES) + self.price_M


def groups_of(examples: Examples) -> Groups:
    """The thirds of the price are those of the examples learned from."""
    features_MF = examples.columns.features_NF.numpy()
    events_M = np.rint(np.expm1(features_MF[:, _LOG_EVENTS].astype(np.float64)))
    activity_M = np.searchsorted([most for _, most in ACTIVITY], events_M, side="left")
    mean_M, learned_M = features_MF[:, _PRICE_MEAN], examples.learn_MT.any(axis=1)
    price_M = np.zeros(len(examples), np.int64)
    for row in np.unique(examples.platform_M):
        priced_M = (examples.platform_M == row) & (mean_M > 0)
        known = mean_M[priced_M & learned_M]
        if len(known):
            price_M[priced_M] = 1 + np.searchsorted(np.quantile(known, [1 / 3, 2 / 3]), mean_M[priced_M], side="right")
    return Groups(examples.platform_M, activity_M, price_M)


def by_frequency(examples: Examples, groups: Groups) -> np.ndarray:
    """(M,) float32."""
    n_G = np.bincount(groups.group_M, examples.learn_MT.any(axis=1))
    return _normal(examples, 1.0 / np.sqrt(np.maximum(n_G, LEAST))[groups.group_M])


def by_loss(examples: Examples, groups: Groups, logits_MT: np.ndarray, strength: float = 5.0) -> np.ndarray:
    """(M,) float32: exp(strength × (loss of the group − mean loss of its platform)). `logits_MT` (M, T) of a first model.
    A group with fewer than LEAST labels to check by has its platform's loss."""
    z, check_MT = logits_MT.astype(np.float64), examples.check_MT
    loss_MT = np.where(check_MT, np.logaddexp(0.0, z) - examples.y_MT * z, 0.0)
    gap_G = np.zeros(int(groups.group_M.max(initial=0)) + 1)
    for row in np.unique(groups.platform_M):
        own_M = groups.platform_M == row
        # Each task's loss less its mean on the platform: a task that not all groups have must not decide.
        n_T = check_MT[own_M].sum(axis=0)
        over_MT = np.where(check_MT, loss_MT - loss_MT[own_M].sum(axis=0) / np.maximum(n_T, 1), 0.0)
        for group in np.unique(groups.group_M[own_M]):
            of = groups.group_M == group
            n = check_MT[of].sum()
            gap_G[group] = over_MT[of].sum() / n if n >= LEAST else 0.0
    return _normal(examples, np.exp(strength * gap_G)[groups.group_M])


def _normal(examples: Examples, weight_M: np.ndarray) -> np.ndarray:
    """Mean 1 over what is learned from on each platform, before and after the greatest are cut."""
    out, learned_M = np.ones(len(examples)), examples.learn_MT.any(axis=1)
    for row in np.unique(examples.platform_M):
        own_M = examples.platform_M == row
        if not (own_M & learned_M).any():
            continue
        cut = np.minimum(weight_M[own_M] / weight_M[own_M & learned_M].mean(), MOST)
        out[own_M] = cut / cut[learned_M[own_M]].mean()
    return out.astype(np.float32)
