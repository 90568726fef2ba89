"""Interest shift: a head on what a row's mixes of categories and its ring say of each other.

    long mix (30 d) ─► main category, c ─┐
    short mix (1 d) · ring · last event ─┴─► how much of each is c, how alike they are ─► ridge and trees, a platform each

Whoever still acts in his main category keeps it; rolling features hold the shares of the event's own category only.
The row has all of it, so a worker could serve the head; it serves the divergence of the predicted from the long mix.

Shapes: M events, L and S places of the mixes, K of the ring. Knows nothing of the simulator, of splits or of networks.
"""

from __future__ import annotations

import numpy as np

from trainer import boosting
from trainer.history import History

NAMES = (
    "main_share",  # of the long mix
    "second_share",
    "entropy",  # of the long mix, nat
    "log_weight",  # of the long mix, as counts
    "main_in_short",  # share of the long mix's main category in the short mix
    "log_weight_short",
    "main_in_ring",  # share among the ring's events
    "main_lately",  # the same, each event LATELY times the weight of the one after it
    "main_is_last",
    "last_in_long",  # share of the last event's category in the long mix
    "short_from_long",  # total variation
    "ring_with_long",  # overlap: 1 where the shares are the same
)
LATELY = 0.8
STRENGTH = 0.001
"""C of the ridge. By folds of users on the training days .001 and .003 are equal, .0001 is worse."""


def platform_of_category(history: History) -> tuple[np.ndarray, np.ndarray]:
    """→ hashes of the categories that occur, ascending; of each the row (1 … P) of the platform that first had it."""
    hashes_C, first_C = np.unique(history.events["category"], return_index=True)
    return hashes_C, history.platform[first_C].astype(np.int64) + 1


def agreement(views_M: np.ndarray, platform_M: np.ndarray, of_category: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(M, len(NAMES)) float64 of views as `models.categories.take_view` makes them. Categories of the event's own platform
    count (`of_category`, see `platform_of_category`): a linked person's row has those of others, too. Shares of an empty
    mix or ring are 0."""
    ring_MK, filled = views_M["ring_category"], views_M["n"]

    def own(category_MX: np.ndarray) -> np.ndarray:
        hashes_C, row_C = of_category
        at = np.minimum(np.searchsorted(hashes_C, category_MX), len(hashes_C) - 1)
        return (hashes_C[at] == category_MX) & (category_MX != 0) & (row_C[at] == platform_M[:, None])

    def shares(which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        category_MX = views_M[f"{which}_category"]
        weight_MX = np.where(own(category_MX), views_M[f"{which}_weight"].astype(np.float64), 0.0)
        return category_MX, _normalised(weight_MX), weight_MX.sum(axis=1)

    def of(category_M: np.ndarray, category_MX: np.ndarray, share_MX: np.ndarray) -> np.ndarray:
        return (share_MX * (category_MX == category_M[:, None])).sum(axis=1)

    long_ML, share_ML, total_M = shares("long")
    short_MS, share_MS, short_total_M = shares("short")
    in_ring_MK = own(ring_MK) & (np.arange(ring_MK.shape[1]) < filled[:, None])
    ring_share_MK = _normalised(in_ring_MK.astype(np.float64))
    lately_MK = _normalised(np.where(in_ring_MK, LATELY ** (np.cumsum(in_ring_MK, axis=1) - 1.0), 0.0))
    order_ML = np.argsort(-share_ML, axis=1, kind="stable")
    main_M = np.take_along_axis(long_ML, order_ML[:, :1], axis=1)[:, 0]
    most_ML = np.take_along_axis(share_ML, order_ML, axis=1)
    newest_M = np.take_along_axis(ring_MK, np.argmax(in_ring_MK, axis=1)[:, None], axis=1)[:, 0]
    some_M = in_ring_MK.any(axis=1)
    both = [(share_ML[:, place], long_ML[:, place]) for place in range(long_ML.shape[1])]
    columns = (
        most_ML[:, 0],
        most_ML[:, 1],
        -(share_ML * np.log(np.maximum(share_ML, 1e-12))).sum(axis=1),
        np.log1p(total_M),
        of(main_M, short_MS, share_MS),
        np.log1p(short_total_M),
        of(main_M, ring_MK, ring_share_MK),
        of(main_M, ring_MK, lately_MK),
        some_M & (newest_M == main_M),
        np.where(some_M, of(newest_M, long_ML, share_ML), 0.0),
        sum(np.abs(share_M - of(category_M, short_MS, share_MS)) for share_M, category_M in both),
        sum(np.minimum(share_M, of(category_M, ring_MK, ring_share_MK)) for share_M, category_M in both),
    )
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def _normalised(weight_MX: np.ndarray) -> np.ndarray:
    return weight_MX / np.maximum(weight_MX.sum(axis=1, keepdims=True), 1e-9)


def head(
    mixes_MA: np.ndarray, features_MF: np.ndarray, y_M: np.ndarray, learn_M: np.ndarray, platform_M: np.ndarray
) -> np.ndarray:
    """(M,) float32 logits, the mean of each platform's ridge on mixes and features and its randomised trees on the mixes.
    They learn from the events of `learn_M` (bool); NaN without any."""
    both_MX, out_M = np.concatenate([mixes_MA, features_MF], axis=1), np.full(len(y_M), np.nan, np.float32)
    for row in np.unique(platform_M[learn_M]):
        of = np.flatnonzero(platform_M == row)
        learn = of[learn_M[of]]
        ridge = boosting.fit_logistic(both_MX[learn], y_M[learn], c=STRENGTH)(both_MX[of])
        trees = boosting.fit_randomised(mixes_MA[learn], y_M[learn], seeds=(0,))(mixes_MA[of])
        out_M[of] = (ridge + trees) / 2
    return out_M
