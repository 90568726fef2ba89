"""What a row's last events were to the student when they came, as well as the row still tells: for a rebuild of `h`.

    row ─► less what its ring's events added ─► the row before them ─► fold the ring ─► features, Δt of each

The ring keeps events, not the features that they had. Folded on an empty row they would look like the first events of a
new user. So the ring's own share is taken off the row's counts, means, sessions and mixes, which is exact for some
(events, tenure, decayed counts that the elapsed time has not used up) and a guess for others (the session and the kinds'
last times before the ring). A row whose whole history lies in its ring gives exactly what the live fold gave, quantities
apart: the ring has none.

Shapes: U users, K places of the ring, N events in all their rings. Knows no student and no `h`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from models.events import CART, EVENT, PURCHASE
from models.fold import FEATURE_NAMES, GAP_WEIGHT, N_FEATURES, PRICE_WEIGHT, FoldParams, fold
from models.state import DECAY_S, N_KINDS, SIZES, TAU_LONG_S, TAU_SHORT_S, empty_rows, row_dtype

_RING_FILL = FEATURE_NAMES.index("ring_fill")
_MOST_DECAYS = 7.0
"""A count that has decayed by more than e^−7 since the ring began is not read back: rounding would decide it."""
_NOISE = 1e-4
"""What is left of a count or a weight below this share of it is rounding."""
_WITHIN_S = 60.0
"""Time between two events of a session where the ring shows none."""
_TAU_MS = 1000.0 * np.array(DECAY_S)


class Refolded(NamedTuple):
    """The events of some users' rings, one user after another, oldest first."""

    events: np.ndarray
    """(N,) EVENT."""
    features: np.ndarray
    """(N, F) float32."""
    dt_s: np.ndarray
    """(N,) float32."""
    counts: np.ndarray
    """(U,) int64: events of each ring."""


def refold(rows: np.ndarray, slots: np.ndarray, params: FoldParams) -> Refolded:
    """The rings of rows[slots] (U,), folded on what those rows were before. Changes no row."""
    own = rows[slots]
    ring = own["ring_ts"].shape[1]
    counts_U = own["n_ring"].astype(np.int64)
    filled_UK = np.arange(ring) < counts_U[:, None]
    events_UK = np.zeros((len(own), ring), EVENT)
    events_UK["offset"], events_UK["quantity"] = np.arange(ring), 1.0
    for field in ("ts", "id", "item", "category", "platform", "kind", "price"):
        events_UK[field] = own[f"ring_{field}"]
    events = events_UK[filled_UK]
    user_N, place_N = np.nonzero(filled_UK)
    n = len(events)
    features, dt_s, status = np.zeros((n, N_FEATURES), np.float32), np.zeros(n, np.float32), np.zeros(n, np.uint8)
    before = rows_before(own, params)
    known_U = before["n_events"].astype(np.int64)
    fold(before, user_N, events, params, features, dt_s, status)
    features[:, _RING_FILL] = np.minimum(known_U[user_N] + place_N + 1, ring) / ring
    return Refolded(events, features, dt_s, counts_U)


def rows_before(own: np.ndarray, params: FoldParams) -> np.ndarray:
    """(U,) rows as they were before the oldest event of their ring, with an empty ring and `h` 0; empty where the ring is
    the whole history."""
    ring = own["ring_ts"].shape[1]
    size = next(size for size in SIZES if row_dtype(size) == own.dtype)
    out = empty_rows(len(own), size)
    more_U = own["n_events"].astype(np.int64) > own["n_ring"]
    if not more_U.any():
        return out
    own = own[more_U]
    filled_UK = np.arange(ring) < own["n_ring"][:, None]
    ts_UK, kind_UK = own["ring_ts"], own["ring_kind"]
    gap_UK = np.where(filled_UK[:, 1:], np.diff(ts_UK, axis=1), 0)
    begins_UK = gap_UK > params.session_gap_ms
    in_one_U = ~begins_UK.any(axis=1)
    n_U, visits_U = own["n_events"].astype(np.float64), own["visits"].astype(np.float64)
    # Whether the ring's first event went on with a session: known where one session covers the ring, else the likelier.
    goes_on_U = np.where(in_one_U, own["session_events"] > own["n_ring"], (n_U - visits_U) / np.maximum(n_U - 1, 1) > 0.5)
    gap_mean_U = _undo_means(own["gap_mean_s"], gap_UK / 1000.0, begins_UK, GAP_WEIGHT)
    within_UK = filled_UK[:, 1:] & ~begins_UK
    within_ms_U = (gap_UK * within_UK).sum(axis=1) / np.maximum(within_UK.sum(axis=1), 1)
    within_ms_U = np.where(within_UK.any(axis=1), within_ms_U, 1000.0 * _WITHIN_S)
    dt_ms_U = np.where(goes_on_U, within_ms_U, np.maximum(1000.0 * gap_mean_U, params.session_gap_ms + 1000.0))
    first_U = np.minimum(own["first_ts"], ts_UK[:, 0])
    last_U = np.maximum(first_U, ts_UK[:, 0] - dt_ms_U.astype(np.int64))

    row = empty_rows(len(own), size)
    row["first_ts"], row["last_ts"] = first_U, last_U
    row["n_events"] = own["n_events"] - own["n_ring"]
    row["visits"] = np.clip(visits_U - begins_UK.sum(axis=1) - ~goes_on_U, 1, row["n_events"])
    came_back_U = (begins_UK & (gap_UK <= params.return_horizon_ms)).sum(axis=1)
    came_back_U = came_back_U + (~goes_on_U & (dt_ms_U <= params.return_horizon_ms))
    row["returns"] = np.clip(own["returns"].astype(np.int64) - came_back_U, 0, row["visits"] - 1)
    row["gap_mean_s"] = np.where(row["visits"] > 1, gap_mean_U, 0.0)
    row["gap_last_s"] = np.where(row["visits"] > 1, np.where(in_one_U & goes_on_U, own["gap_last_s"], gap_mean_U), 0.0)
    row["basket_mean"] = own["basket_mean"]
    priced_UK = filled_UK & (own["ring_price"] > 0)
    row["price_mean"] = np.minimum(_undo_means(own["price_mean"], own["ring_price"], priced_UK, PRICE_WEIGHT), 255.0)
    _session(row, own, filled_UK, in_one_U & goes_on_U)
    row["open_carts"] = np.maximum(0, own["open_carts"].astype(np.int64) - (filled_UK & (kind_UK == CART)).sum(axis=1))
    _counts(row, own, filled_UK)
    for name, tau_s in (("mix_long", TAU_LONG_S), ("mix_short", TAU_SHORT_S)):
        _mix(row, own, filled_UK, name, 1000.0 * tau_s)
    out[more_U] = row
    return out


def _undo_means(mean_U: np.ndarray, value_UK: np.ndarray, counts_UK: np.ndarray, weight: float) -> np.ndarray:
    """(U,) the exponentially weighted mean before the values that count, the last of them undone first; at least 0."""
    mean_U = mean_U.astype(np.float64)
    for k in range(value_UK.shape[1] - 1, -1, -1):
        mean_U = np.where(counts_UK[:, k], (mean_U - weight * value_UK[:, k]) / (1.0 - weight), mean_U)
    return np.maximum(mean_U, 0.0)


def _session(row: np.ndarray, own: np.ndarray, filled_UK: np.ndarray, same_U: np.ndarray) -> None:
    """The session before the ring: what the present one held before it, where it is the `same`; else one event."""
    row["session_start_ts"] = np.where(same_U, own["session_start_ts"], row["last_ts"])
    of = {"session_events": None, "session_purchases": PURCHASE, "session_carts": CART}
    for field, kind in of.items():
        in_ring_U = (filled_UK if kind is None else filled_UK & (own["ring_kind"] == kind)).sum(axis=1)
        before_U = np.maximum(own[field].astype(np.int64) - in_ring_U, 0)
        row[field] = np.where(same_U, before_U, 1 if kind is None else 0)


def _left(total: np.ndarray, of_ring: np.ndarray, decays: np.ndarray) -> np.ndarray:
    """What the ring did not add, as it was `decays` time constants ago; NaN where that cannot be read back."""
    left = np.maximum(total.astype(np.float64) - of_ring, 0.0)
    left[left < _NOISE * total] = 0.0
    return np.where(decays <= _MOST_DECAYS, left * np.exp(np.minimum(decays, _MOST_DECAYS)), np.nan)


def _counts(row: np.ndarray, own: np.ndarray, filled_UK: np.ndarray) -> None:
    """Decayed counts, and the last time of each kind that the ring has hidden."""
    age_UK = (own["last_ts"][:, None] - own["ring_ts"]) * filled_UK
    fade_UKJ = np.exp(-age_UK[:, :, None] / _TAU_MS) * filled_UK[:, :, None]
    one_UKC = (own["ring_kind"][:, :, None] == np.arange(N_KINDS)) & filled_UK[:, :, None]
    of_ring_UCJ = np.einsum("ukc,ukj->ucj", one_UKC.astype(np.float64), fade_UKJ)
    decays_U1J = (own["last_ts"] - row["last_ts"])[:, None, None] / _TAU_MS
    left_UCJ = _left(own["counts"], of_ring_UCJ, np.broadcast_to(decays_U1J, of_ring_UCJ.shape))
    # From the longest down: one that cannot be read back is what a steady rate would give, and none exceeds the next.
    before_U1 = row["n_events"].astype(np.float64)[:, None]
    longest = len(_TAU_MS) - 1
    left_UCJ[:, :, longest] = np.minimum(np.nan_to_num(left_UCJ[:, :, longest]), before_U1)
    for j in range(longest - 1, -1, -1):
        steady_UC = left_UCJ[:, :, j + 1] * (_TAU_MS[j] / _TAU_MS[j + 1])
        known_UC = np.where(np.isnan(left_UCJ[:, :, j]), steady_UC, left_UCJ[:, :, j])
        left_UCJ[:, :, j] = np.minimum(known_UC, left_UCJ[:, :, j + 1])
    row["counts"] = left_UCJ
    in_ring_UC, left_UC = one_UKC.any(axis=1), left_UCJ[:, :, longest]
    age_ms_UC = -_TAU_MS[longest] * np.log(np.clip(left_UC, 1e-2, 1.0))
    guess_UC = np.where(left_UC > 1e-2, np.maximum(row["last_ts"][:, None] - age_ms_UC, row["first_ts"][:, None]), 0.0)
    row["last_s_by_kind"] = np.where(in_ring_UC, (guess_UC / 1000.0).astype(np.int64), own["last_s_by_kind"])


def _mix(row: np.ndarray, own: np.ndarray, filled_UK: np.ndarray, name: str, tau_ms: float) -> None:
    """A category mix without what the ring's events put into it."""
    category_UM, weight_UM = own[f"{name}_category"], own[f"{name}_weight"]
    fade_UK = np.exp(-(own["last_ts"][:, None] - own["ring_ts"]) * filled_UK / tau_ms) * filled_UK
    of_ring_UM = ((own["ring_category"][:, None] == category_UM[:, :, None]) * fade_UK[:, None]).sum(axis=2)
    decays_U1 = ((own["last_ts"] - row["last_ts"]) / tau_ms)[:, None]
    left_UM = np.nan_to_num(_left(weight_UM, of_ring_UM, np.broadcast_to(decays_U1, weight_UM.shape)))
    row[f"{name}_category"] = np.where(left_UM > 0, category_UM, 0)
    row[f"{name}_weight"] = left_UM
