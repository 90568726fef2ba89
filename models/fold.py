"""The fold: events → rows of user state and rolling features, exactly, in offset order. Worker and trainer share it.

The rules are in `_fold_one`, in order; `tests/fold_reference.py` says them again in plain Python, and the two agree
byte for byte. Compiled by Numba without fast-math and with `math.exp` only, so that a replay gives the same bytes.
Numba's cache looks at this file alone: after a change of a constant that it imports, touch it.

Knows nothing of Kafka, keys, clocks or models: it takes slots and hashes, and never reads `h` or `h_version`
(a user who starts afresh after `idle_ttl` has `h` put to zero; see `starts_afresh`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from models.config import FoldConfig
from models.events import CART, EVENT, KINDS, PRICE_EDGES, PURCHASE
from models.state import DECAY_S, N_HALFLIVES, N_KINDS, SIZES, TAU_LONG_S, TAU_SHORT_S, row_dtype

FOLDED, REPLAYED, DUPLICATE, TOO_LATE = 0, 1, 2, 3
"""What became of an event."""

FEATURE_VERSION = 1
"""Raised whenever a feature's meaning, place or scale changes: an artifact made under another one is refused."""

NEVER = 18.0
"""The logarithm of a time that there is none of; also the greatest that a time can have (about two years)."""
SMALLEST = 1e-20
"""A count or a weight below this is put to 0: no subnormal numbers, and an empty slot of a mix is one that faded."""
GAP_WEIGHT, BASKET_WEIGHT, PRICE_WEIGHT = 0.3, 0.2, 0.2
"""Weights of the newest value in the exponentially weighted means."""
MAX_QUANTITY = 1e6

_GROUPS: dict[str, tuple[str, ...]] = {
    "kind": tuple(f"kind_{kind}" for kind in KINDS),
    # log1p of the decayed counts; kind by kind, the four time constants together
    "counts": tuple(f"log_count_{kind}_{tau}" for kind in KINDS for tau in ("1h", "1d", "7d", "30d")),
    # seconds from the last event of each kind to now; of the event's own kind: the last one before it
    "since": tuple(f"log_since_{kind}" for kind in KINDS),
    "session": (
        "log_dt",  # seconds from the last event before this one
        "log_session_events",
        "log_session_s",
        "log_session_purchases",
        "log_session_carts",
    ),
    "visits": (
        "log_visits",
        "log_gap_mean",  # exponentially weighted
        "log_gap_last",
        "log_tenure",
        "log_gap_plain_mean",  # tenure over the gaps between sessions
        "log_events",
        "purchase_share",  # of the 30 d counts
        "never_bought",
        "return_rate",  # (returns + 1) / (gaps between sessions + 2)
        "within_session_rate",  # the same for: the next event comes within the session
    ),
    "basket": (
        "log_open_carts",
        "log_basket_mean",
        "price_mean",  # prices: bucket over 255, 0 where there is none
        "price",
        "price_minus_mean",  # 0 where there is no price
        "log_quantity",
    ),
    "calendar": ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "weekend"),  # UTC, of the event
    "category": (
        "category_share_long",
        "category_share_short",
        "has_category",
        "log_ring_categories",  # distinct ones
        "ring_fill",
    ),
    # events in the ring with this item of this platform; and seconds from the last of them before this one
    "item": ("log_item_seen", "log_item_carts", "log_item_purchases", "log_since_item"),
}
FEATURE_NAMES: tuple[str, ...] = tuple(name for names in _GROUPS.values() for name in names)
N_FEATURES = len(FEATURE_NAMES)
FEATURE_COLUMNS: dict[str, slice] = {
    group: slice(start := FEATURE_NAMES.index(names[0]), start + len(names)) for group, names in _GROUPS.items()
}
"""Where the features of a group stand."""
_F_KIND, _F_COUNTS, _F_SINCE, _F_SESSION = (FEATURE_COLUMNS[g].start for g in ("kind", "counts", "since", "session"))
_F_VISITS, _F_BASKET, _F_CALENDAR = (FEATURE_COLUMNS[g].start for g in ("visits", "basket", "calendar"))
_F_CATEGORY, _F_ITEM = (FEATURE_COLUMNS[g].start for g in ("category", "item"))
_F_EVENTS = FEATURE_NAMES.index("log_events")
_LOG_ONE_EVENT = np.float32(math.log(2.0))

_DAY_MS = 86_400_000
_TWO_PI = 2.0 * math.pi
_MAX_U2, _MAX_U4 = 0xFFFF, 0xFFFFFFFF
_TAU_MS = tuple(1000.0 * tau_s for tau_s in DECAY_S)
# The mixes share their time constants with two of the counts: four exponentials an event do for all.
_LONG, _SHORT = DECAY_S.index(TAU_LONG_S), DECAY_S.index(TAU_SHORT_S)

_jit = njit(cache=True, nogil=True)
_part = njit(cache=True, nogil=True, forceinline=True)  # whole into what calls them: 5 % of an event's time


class FoldParams(NamedTuple):
    """`FoldConfig` in ms, as the kernel takes it."""

    lateness_ms: int
    session_gap_ms: int
    return_horizon_ms: int
    idle_ttl_ms: int


def fold_params(config: FoldConfig) -> FoldParams:
    """The kernel's parameters; an infinite setting becomes the greatest that the kernel can hold."""
    return FoldParams(
        *(
            round(min(1000.0 * seconds, 2.0**62))
            for seconds in (config.lateness_s, config.session_gap_s, config.return_horizon_s, config.idle_ttl_s)
        )
    )


@_jit
def fold(rows, slots, events, params, features, dt_s, status):
    """Folds a batch of events into the rows of their users, in place.

    rows: (cap,) of `row_dtype(size)`. slots: (n,) int64, the row of each event's user. events: (n,) EVENT, in offset
    order within a user; users may be mixed. params: FoldParams. Out, each (>= n, …): features (·, N_FEATURES) float32;
    dt_s float32, seconds since the user's last event, 0 for a first or a late one; status uint8: FOLDED, REPLAYED,
    DUPLICATE or TOO_LATE. A score of a FOLDED event speaks of a state that includes it; features of a DUPLICATE are 0.

    Raises ValueError, before any row has changed, for lengths that do not fit and for a slot or a kind out of range.
    Compiled, so other compiled functions can call it. Give it writeable, contiguous arrays of just these types: `warm`
    has compiled it for them, and any other kind would be compiled on its first call, for seconds.
    """
    n = len(events)
    if len(slots) != n or min(len(features), len(dt_s), len(status)) < n or features.shape[1] != N_FEATURES:
        raise ValueError("fold: slots, events and the outputs do not fit together")
    for i in range(n):
        if not 0 <= slots[i] < len(rows):
            raise ValueError("fold: a slot lies outside the rows")
        if events[i].kind >= N_KINDS:
            raise ValueError("fold: a kind code that there is none of")
    for i in range(n):
        status[i], dt_s[i] = _fold_one(rows[slots[i]], events[i], params, features[i])


def refold_rings(
    rows: np.ndarray,
    slots: np.ndarray,
    params: FoldParams,
    features: np.ndarray,
    dt_s: np.ndarray,
    events_out: np.ndarray,
) -> np.ndarray:
    """Folds the ring of each slot, oldest event first, on an empty row: what a rebuild of `h` needs. Changes no row.

    rows: (cap,); slots: (m,) int64. With K the ring's length, slot i writes its n events' features, dt_s and events to
    [i*K : i*K + n] of features (>= m*K, N_FEATURES) float32, dt_s (>= m*K,) float32, events_out (>= m*K,) EVENT;
    returns n (m,) int64. The ring keeps no offset and no quantity: events have their place in the ring and 1 instead.
    """
    n_out = len(slots) * rows.dtype["ring_ts"].shape[0]
    if min(len(features), len(dt_s), len(events_out)) < n_out or features.shape[1] != N_FEATURES:
        raise ValueError(f"refold_rings: {len(slots)} rings need outputs of {n_out} by {N_FEATURES}")
    if len(slots) and not 0 <= slots.min() <= slots.max() < len(rows):
        raise ValueError("refold_rings: a slot lies outside the rows")
    scratch, counts = np.zeros(1, rows.dtype), np.empty(len(slots), np.int64)
    _refold_all(rows, slots, params, scratch, features, dt_s, events_out, counts)
    return counts


def starts_afresh(features: np.ndarray, status: np.ndarray) -> np.ndarray:
    """(n,) bool: events that are the first of their user's state, whether the user is new or was idle for too long.

    What is kept beside the fold (`h`) starts from zero at such an event, also in the middle of a batch.
    """
    n = len(status)
    return (status == FOLDED) & (features[:n, _F_EVENTS] == _LOG_ONE_EVENT)


def warm() -> None:
    """Compiles all of it for every size of row, or loads it from Numba's cache: seconds the first time."""
    params = fold_params(FoldConfig())
    for size in SIZES:
        rows, slots = np.zeros(1, row_dtype(size)), np.empty(0, np.int64)
        features, dt_s = np.empty((0, N_FEATURES), np.float32), np.empty(0, np.float32)
        events = np.empty(0, EVENT)
        fold(rows, slots, events, params, features, dt_s, np.empty(0, np.uint8))
        refold_rings(rows, slots, params, features, dt_s, events)


@_jit
def _refold_all(rows, slots, params, scratch, features, dt_s, events_out, counts):
    for i in range(len(slots)):
        row, blank = rows[slots[i]], scratch[0]
        start = i * len(row.ring_ts)
        counts[i] = np.int64(row.n_ring)
        _forget(blank)
        blank.applied_offset = -1
        for k in range(counts[i]):
            e = events_out[start + k]
            _event_of_ring(row, k, e)
            _, dt_s[start + k] = _fold_one(blank, e, params, features[start + k])


@_part
def _event_of_ring(row, k, e):
    e.offset, e.ts, e.id = k, row.ring_ts[k], row.ring_id[k]
    e.item, e.category, e.quantity = row.ring_item[k], row.ring_category[k], 1.0
    e.platform, e.kind, e.price = row.ring_platform[k], row.ring_kind[k], row.ring_price[k]


@_part
def _fold_one(r, e, params, out_F):
    """One event on its user's row → (status, dt in s)."""
    own_kind_s = np.int64(r.last_s_by_kind[e.kind])
    if e.offset <= r.applied_offset:
        _features(r, e, 0, own_kind_s, out_F)
        return REPLAYED, 0.0
    r.applied_offset = e.offset
    if _ring_holds(r, e.id):
        out_F[:] = 0.0
        return DUPLICATE, 0.0
    if r.n_events > 0 and e.ts - r.last_ts > params.idle_ttl_ms:
        _forget(r)
        own_kind_s = 0
    first = r.n_events == 0
    late_ms = 0 if first else max(0, r.last_ts - e.ts)
    if late_ms > params.lateness_ms and r.n_ring == len(r.ring_ts) and _before(e, r, 0):
        _features(r, e, 0, own_kind_s, out_F)
        return TOO_LATE, 0.0
    dt_ms = 0 if first else max(0, e.ts - r.last_ts)
    _enter_session(r, e, first, dt_ms, params)
    _count(r, e, dt_ms, late_ms)
    _update_basket(r, e)
    _place_in_ring(r, e)
    r.last_s_by_kind[e.kind] = max(own_kind_s, min(e.ts // 1000, _MAX_U4))
    if first:
        r.first_ts = r.last_ts = e.ts
    else:
        r.last_ts = max(r.last_ts, e.ts)
    r.n_events = min(r.n_events + 1, _MAX_U4)
    _features(r, e, -1 if first else dt_ms, own_kind_s, out_F)
    return FOLDED, dt_ms / 1000.0


@_part
def _forget(r):
    """Everything but abi, size, applied_offset and h_version."""
    r.n_ring = r.first_ts = r.last_ts = r.session_start_ts = 0
    r.visits = r.n_events = r.returns = 0
    r.gap_mean_s = r.gap_last_s = r.basket_mean = r.price_mean = 0.0
    r.session_events = r.session_purchases = r.session_carts = r.open_carts = 0
    r.ring_ts[:] = 0
    r.ring_id[:] = 0
    r.ring_item[:] = 0
    r.ring_category[:] = 0
    r.ring_platform[:] = 0
    r.ring_kind[:] = 0
    r.ring_price[:] = 0
    r.last_s_by_kind[:] = 0
    r.counts[:] = 0.0
    r.mix_long_category[:] = 0
    r.mix_long_weight[:] = 0.0
    r.mix_short_category[:] = 0
    r.mix_short_weight[:] = 0.0
    r.h[:] = 0.0


@_part
def _enter_session(r, e, first, dt_ms, params):
    """A late event belongs to the session that goes on as it arrives."""
    if first or dt_ms > params.session_gap_ms:
        if not first:
            gap_s = dt_ms / 1000.0
            has_mean = r.visits > 1
            r.gap_mean_s = (1.0 - GAP_WEIGHT) * r.gap_mean_s + GAP_WEIGHT * gap_s if has_mean else gap_s
            r.gap_last_s = gap_s
            if dt_ms <= params.return_horizon_ms:
                r.returns = min(r.returns + 1, _MAX_U4)
        r.visits = min(r.visits + 1, _MAX_U4)
        r.session_start_ts = e.ts
        r.session_events = r.session_purchases = r.session_carts = 0
    r.session_events = min(r.session_events + 1, _MAX_U2)
    if e.kind == PURCHASE:
        r.session_purchases = min(r.session_purchases + 1, _MAX_U2)
    elif e.kind == CART:
        r.session_carts = min(r.session_carts + 1, _MAX_U2)


@_part
def _count(r, e, dt_ms, late_ms):
    """Decays counts and mixes by the time passed and adds the event, itself decayed where it is late."""
    if dt_ms > 0:
        decay_T = _decays(dt_ms)
        for kind in range(N_KINDS):
            for j in range(N_HALFLIVES):
                count = np.float32(r.counts[kind, j] * decay_T[j])
                r.counts[kind, j] = count if count >= SMALLEST else np.float32(0.0)
        _fade_mix(r.mix_long_category, r.mix_long_weight, decay_T[_LONG])
        _fade_mix(r.mix_short_category, r.mix_short_weight, decay_T[_SHORT])
    own_T = _decays(late_ms)
    for j in range(N_HALFLIVES):
        if own_T[j] >= SMALLEST:
            r.counts[e.kind, j] = r.counts[e.kind, j] + own_T[j]
    if e.category != 0:
        _add_to_mix(r.mix_long_category, r.mix_long_weight, e.category, own_T[_LONG])
        _add_to_mix(r.mix_short_category, r.mix_short_weight, e.category, own_T[_SHORT])


@_part
def _decays(elapsed_ms):
    if elapsed_ms == 0:
        return 1.0, 1.0, 1.0, 1.0
    return (
        math.exp(-elapsed_ms / _TAU_MS[0]),
        math.exp(-elapsed_ms / _TAU_MS[1]),
        math.exp(-elapsed_ms / _TAU_MS[2]),
        math.exp(-elapsed_ms / _TAU_MS[3]),
    )


@_part
def _fade_mix(category_M, weight_M, decay):
    for m in range(len(weight_M)):
        weight = np.float32(weight_M[m] * decay)
        if weight >= SMALLEST:
            weight_M[m] = weight
        else:
            category_M[m], weight_M[m] = 0, 0.0


@_part
def _add_to_mix(category_M, weight_M, category, own):
    """To the category's slot; else the first empty one; else the lightest (the first of equals), if it is lighter."""
    if own < SMALLEST:
        return
    lightest = 0
    for m in range(len(weight_M)):
        if category_M[m] == category:
            weight_M[m] = weight_M[m] + own
            return
        if weight_M[m] < weight_M[lightest]:
            lightest = m
    # An empty slot weighs 0, less than any other: the first of them is the lightest.
    if weight_M[lightest] < own:
        category_M[lightest], weight_M[lightest] = category, own


@_part
def _update_basket(r, e):
    """Means of quantity (purchases) and price bucket (priced events); open carts. Reads the ring before the event."""
    if e.kind == PURCHASE:
        quantity = _clean_quantity(e)
        first = r.basket_mean == 0.0
        r.basket_mean = quantity if first else (1.0 - BASKET_WEIGHT) * r.basket_mean + BASKET_WEIGHT * quantity
    if e.price != 0:
        first = r.price_mean == 0.0
        r.price_mean = e.price if first else (1.0 - PRICE_WEIGHT) * r.price_mean + PRICE_WEIGHT * e.price
    # The latest that the ring knows of the item decides; a purchase of an item that it no longer knows closes a cart,
    # so that the count cannot only grow.
    if e.kind == CART and _latest_cart_or_purchase(r, e) != CART:
        r.open_carts = min(r.open_carts + 1, _MAX_U2)
    elif e.kind == PURCHASE and _latest_cart_or_purchase(r, e) != PURCHASE:
        r.open_carts = max(np.int64(r.open_carts) - 1, 0)


@_part
def _clean_quantity(e):
    return min(np.float64(e.quantity), MAX_QUANTITY) if e.quantity > 0.0 else 0.0


@_part
def _latest_cart_or_purchase(r, e):
    """CART, PURCHASE or −1: the kind of the ring's last such event with this item."""
    for k in range(np.int64(r.n_ring) - 1, -1, -1):
        if _same_item(r, k, e) and (r.ring_kind[k] == CART or r.ring_kind[k] == PURCHASE):
            return np.int64(r.ring_kind[k])
    return -1


@_part
def _same_item(r, k, e):
    """Platforms name items each in their own way: 4711 of one is not 4711 of another."""
    return e.item != 0 and r.ring_item[k] == e.item and r.ring_platform[k] == e.platform


@_part
def _ring_holds(r, event_id):
    found = False
    for k in range(np.int64(r.n_ring)):  # no early end: so it compiles to vector instructions
        found |= r.ring_id[k] == event_id
    return found


@_part
def _before(e, r, k):
    """Whether the event sorts before the ring's k-th, by (ts, id)."""
    return e.ts < r.ring_ts[k] or (e.ts == r.ring_ts[k] and e.id < r.ring_id[k])


@_part
def _place_in_ring(r, e):
    """By (ts, id). From a full ring the smallest falls out; an event that would be the smallest takes no place."""
    n = np.int64(r.n_ring)
    full = n == len(r.ring_ts)
    at = n
    while at > 0 and _before(e, r, at - 1):
        at -= 1
    if full:
        at -= 1
        if at < 0:
            return
    else:
        r.n_ring = n + 1
    _insert(r.ring_ts, full, n, at, e.ts)
    _insert(r.ring_id, full, n, at, e.id)
    _insert(r.ring_item, full, n, at, e.item)
    _insert(r.ring_category, full, n, at, e.category)
    _insert(r.ring_platform, full, n, at, e.platform)
    _insert(r.ring_kind, full, n, at, e.kind)
    _insert(r.ring_price, full, n, at, e.price)


@_part
def _insert(ring_K, full, n, at, value):
    if full:
        for k in range(at):
            ring_K[k] = ring_K[k + 1]
    else:
        for k in range(n, at, -1):
            ring_K[k] = ring_K[k - 1]
    ring_K[at] = value


@_part
def _features(r, e, dt_ms, own_kind_s, out_F):
    """Features of an event on a row as it is. dt_ms −1: none before. own_kind_s: the last of the kind before it."""
    now_ms = max(e.ts, r.last_ts)
    for kind in range(N_KINDS):
        out_F[_F_KIND + kind] = 1.0 if kind == e.kind else 0.0
        for j in range(N_HALFLIVES):
            out_F[_F_COUNTS + N_HALFLIVES * kind + j] = math.log(1.0 + r.counts[kind, j])
        last_s = own_kind_s if kind == e.kind else np.int64(r.last_s_by_kind[kind])
        out_F[_F_SINCE + kind] = _log_time(now_ms // 1000 - last_s) if last_s > 0 else NEVER
    out_F[_F_SESSION] = _log_time(dt_ms / 1000.0) if dt_ms >= 0 else NEVER
    out_F[_F_SESSION + 1] = _log1p(r.session_events)
    out_F[_F_SESSION + 2] = _log_time((now_ms - r.session_start_ts) / 1000.0)
    out_F[_F_SESSION + 3] = _log1p(r.session_purchases)
    out_F[_F_SESSION + 4] = _log1p(r.session_carts)
    _visit_features(r, now_ms, out_F)
    _basket_features(r, e, out_F)
    _calendar_features(e, out_F)
    _category_features(r, e, out_F)
    _item_features(r, e, out_F)


@_part
def _visit_features(r, now_ms, out_F):
    visits, n_events = np.float64(r.visits), np.float64(r.n_events)
    tenure_s = (now_ms - r.first_ts) / 1000.0
    came_back = visits > 1.0
    out_F[_F_VISITS] = _log1p(visits)
    out_F[_F_VISITS + 1] = _log_time(r.gap_mean_s) if came_back else NEVER
    out_F[_F_VISITS + 2] = _log_time(r.gap_last_s) if came_back else NEVER
    out_F[_F_VISITS + 3] = _log_time(tenure_s)
    out_F[_F_VISITS + 4] = _log_time(tenure_s / (visits - 1.0)) if came_back else NEVER
    out_F[_F_VISITS + 5] = _log1p(n_events)
    total = 0.0
    for kind in range(N_KINDS):
        total += r.counts[kind, N_HALFLIVES - 1]
    out_F[_F_VISITS + 6] = r.counts[PURCHASE, N_HALFLIVES - 1] / total if total > 0.0 else 0.0
    out_F[_F_VISITS + 7] = 1.0 if r.last_s_by_kind[PURCHASE] == 0 else 0.0
    out_F[_F_VISITS + 8] = (r.returns + 1.0) / (max(visits - 1.0, 0.0) + 2.0)
    out_F[_F_VISITS + 9] = (n_events - visits + 1.0) / (max(n_events - 1.0, 0.0) + 2.0)


@_part
def _basket_features(r, e, out_F):
    scale = 1.0 / len(PRICE_EDGES)
    out_F[_F_BASKET] = _log1p(r.open_carts)
    out_F[_F_BASKET + 1] = _log1p(r.basket_mean)
    out_F[_F_BASKET + 2] = scale * r.price_mean
    out_F[_F_BASKET + 3] = scale * e.price
    out_F[_F_BASKET + 4] = scale * (e.price - r.price_mean) if e.price != 0 else 0.0
    out_F[_F_BASKET + 5] = _log1p(_clean_quantity(e))


@_part
def _calendar_features(e, out_F):
    hour = _TWO_PI * ((e.ts % _DAY_MS) / _DAY_MS)
    day = (e.ts // _DAY_MS + 3) % 7  # 0 Monday: the epoch began on a Thursday
    out_F[_F_CALENDAR], out_F[_F_CALENDAR + 1] = math.sin(hour), math.cos(hour)
    out_F[_F_CALENDAR + 2], out_F[_F_CALENDAR + 3] = math.sin(_TWO_PI * day / 7.0), math.cos(_TWO_PI * day / 7.0)
    out_F[_F_CALENDAR + 4] = 1.0 if day >= 5 else 0.0


@_part
def _category_features(r, e, out_F):
    n, distinct = np.int64(r.n_ring), 0
    for k in range(n):
        seen = r.ring_category[k] == 0
        for earlier in range(k):
            seen |= r.ring_category[earlier] == r.ring_category[k]
        distinct += not seen
    out_F[_F_CATEGORY] = _share(r.mix_long_category, r.mix_long_weight, e.category)
    out_F[_F_CATEGORY + 1] = _share(r.mix_short_category, r.mix_short_weight, e.category)
    out_F[_F_CATEGORY + 2] = 1.0 if e.category != 0 else 0.0
    out_F[_F_CATEGORY + 3] = _log1p(distinct)
    out_F[_F_CATEGORY + 4] = n / len(r.ring_category)


@_part
def _share(category_M, weight_M, category):
    own, total = 0.0, 0.0
    for m in range(len(weight_M)):
        total += weight_M[m]
        if category != 0 and category_M[m] == category:
            own += weight_M[m]
    return own / total if total > 0.0 else 0.0


@_part
def _item_features(r, e, out_F):
    seen, carts, purchases, since = 0, 0, 0, NEVER
    for k in range(np.int64(r.n_ring)):
        if _same_item(r, k, e):
            seen += 1
            carts += r.ring_kind[k] == CART
            purchases += r.ring_kind[k] == PURCHASE
            if r.ring_ts[k] <= e.ts and r.ring_id[k] != e.id:
                since = _log_time((e.ts - r.ring_ts[k]) / 1000.0)
    out_F[_F_ITEM], out_F[_F_ITEM + 1], out_F[_F_ITEM + 2] = _log1p(seen), _log1p(carts), _log1p(purchases)
    out_F[_F_ITEM + 3] = since


@_part
def _log1p(x):
    # x is never negative and a feature is float32: log(1 + x) is exact enough, and twice as fast as log1p.
    return math.log(1.0 + x)


@_part
def _log_time(seconds):
    return min(math.log(1.0 + max(seconds, 0.0)), NEVER)
