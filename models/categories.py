"""The next category: which candidates there are, what each component of the mixture says of them, and the mixture.

    ring, mixes of a row ─► View ─┐
    CategoryTable ────────────────┴─► ≤ 64 candidates, q_k over them and *other* ─┬─► Σ gate_k q_k    serving
    (Markov neighbours, popularity)                                               └─► q_k(next)       training

Serving and training run the same `_components`. Only categories of the table are candidates; what a component gives to
any other category, or to one past the 64th, goes to *other*, so that every q_k sums to 1. A component that has nothing
to say (an empty ring, an unknown last category) says what popularity says.

A row changes with every event, so what the candidates need of it is copied, a View an event, as the fold passes
(`fold_with_views`): the answer for an event then does not depend on what came after it in its batch.

Shapes: N events, C categories, P platforms (index 0: unknown), K ring. Knows nothing of the student or of files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from numba import njit

from models.state import MIX_LONG, MIX_SHORT, SIZES
from models.student import N_GATES

MAX_CANDIDATES = 64
TOP_POPULAR, TOP_MARKOV = 32, 16
RECENCY = 0.5
"""The weight of an event's category in `copy_recency`, relative to the one after it."""
_OTHER = MAX_CANDIDATES
_HALF_BIT = 0.5 / math.log(2.0)
_WIDTH = 72
"""Of what is kept for each candidate and for *other*: whole vector registers."""
_COPY, _FREQUENCY, _SHORT, _LONG, _MARKOV, _POPULAR, _REST = range(N_GATES)


@cache
def view_dtype(size: str = "cpu") -> np.dtype:
    """What the candidates need of a row, as it was right after one event."""
    ring = SIZES[size][1]
    return np.dtype(
        [
            ("n", "<i4"),  # events in the ring with a category
            ("ring_category", "<u4", (ring,)),  # theirs, newest first
            ("short_category", "<u4", (MIX_SHORT,)),
            ("short_weight", "<f4", (MIX_SHORT,)),
            ("long_category", "<u4", (MIX_LONG,)),
            ("long_weight", "<f4", (MIX_LONG,)),
        ]
    )


@njit(cache=True, nogil=True)
def take_view(row, view):
    """view ← what the candidates need of a row. Places of the ring from `n` on are left as they are."""
    n = 0
    for j in range(np.int64(row.n_ring) - 1, -1, -1):
        if row.ring_category[j] != 0:
            view.ring_category[n] = row.ring_category[j]
            n += 1
    view.n = n
    for j in range(MIX_SHORT):
        view.short_category[j], view.short_weight[j] = row.mix_short_category[j], row.mix_short_weight[j]
    for j in range(MIX_LONG):
        view.long_category[j], view.long_weight[j] = row.mix_long_category[j], row.mix_long_weight[j]


@njit(cache=True, nogil=True)
def _take_views(rows, slots, views):
    for i in range(len(slots)):
        take_view(rows[slots[i]], views[i])


def views_of(rows: np.ndarray, slots: np.ndarray, size: str = "cpu") -> np.ndarray:
    """Views (N,) of rows as they now are."""
    views = np.zeros(len(slots), view_dtype(size))
    _take_views(rows, slots, views)
    return views


class _Tables(NamedTuple):
    """The table as the kernels read it."""

    key_T: np.ndarray  # u4, open addressing by the hash itself; 0 empty
    index_T: np.ndarray  # C where the key is 0
    popular_PT: np.ndarray
    popular_p_PT: np.ndarray
    popular_n_P: np.ndarray  # how many there are before the first −1
    popular_rest_P: np.ndarray  # what they leave to *other*
    markov_CM: np.ndarray
    markov_p_CM: np.ndarray
    markov_n_C: np.ndarray
    markov_rest_C: np.ndarray
    markov_back_C: np.ndarray


def _filled(index_XT: np.ndarray, p_XT: np.ndarray, whole_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """→ how many each row names before its first −1, and what of `whole` their shares leave, taken off one by one."""
    n_X = np.argmax(np.hstack([index_XT < 0, np.ones((len(index_XT), 1), bool)]), axis=1)
    rest_X = whole_X.astype(np.float32)
    for t in range(index_XT.shape[1]):
        rest_X = np.where(t < n_X, rest_X - p_XT[:, t], rest_X)
    return n_X, np.maximum(rest_X, np.float32(0.0))


@njit(cache=True, nogil=True)
def _find(key_T, index_T, category):
    """Index of a category's hash in the table; the number of categories where it is not there."""
    last = len(key_T) - 1
    at = np.int64(category) & last
    while key_T[at] != category and key_T[at] != 0:
        at = (at + 1) & last
    return np.int64(index_T[at])


@njit(cache=True, nogil=True)
def _workspace(tables):
    """→ seen_C, candidates, q, back, as `_components` takes them."""
    seen_C = np.full(len(tables.markov_back_C) + 1, -1, np.int8)
    seen_C[-1] = _OTHER  # whatever is not in the table
    candidates = np.empty(MAX_CANDIDATES + 1, np.int32)
    return seen_C, candidates, np.zeros((N_GATES, _WIDTH), np.float32), np.zeros(N_GATES, np.float32)


@njit(cache=True, nogil=True)
def _place(index, seen_C, candidates, n):
    """→ (place of a category among the candidates, number of candidates): itself where it fits, else *other*.

    Without a branch, which no processor could predict: with all places taken, n is *other*'s place.
    """
    place = np.int64(seen_C[index])
    new = place < 0
    placed = n if new else place
    fits = new and n < MAX_CANDIDATES
    candidates[n] = index
    seen_C[index] = n if fits else place
    return placed, n + np.int64(fits)


@njit(cache=True, nogil=True)
def _mix(key_T, index_T, categories, weights, component, seen_C, candidates, q, n):
    """Adds a normalised mix. → (anything in it, number of candidates)"""
    total = np.float32(0.0)
    for j in range(len(categories)):
        if categories[j] != 0 and weights[j] > 0:
            total += weights[j]
    if total <= 0:
        return False, n
    for j in range(len(categories)):
        if categories[j] != 0 and weights[j] > 0:
            place, n = _place(_find(key_T, index_T, categories[j]), seen_C, candidates, n)
            q[component, place] += weights[j] / total
    return True, n


# Inlined: a call would hand over each field of each array of the tables, a quarter of a microsecond.
@njit(cache=True, nogil=True, inline="always")
def _components(tables, key_T, index_T, view, platform, seen_C, candidates, q, back):
    """Fills `candidates` (65,) and q (7, _WIDTH): q_k of every candidate, and in the last column of *other*; 0 between them.
    → number of candidates. `seen_C` comes as `_workspace` made it and is left with the candidates' places."""
    n, one = np.int64(0), np.float32(1.0)
    q[:] = 0.0
    back[:] = 0.0  # the part of each component that popularity speaks for
    ring, filled = view["ring_category"], view["n"]

    if filled == 0:
        back[_COPY] = back[_FREQUENCY] = one
    else:
        weight, total = one, np.float32(0.0)
        for _ in range(filled):
            total += weight
            weight *= np.float32(RECENCY)
        weight, share = one / total, one / np.float32(filled)
        for j in range(filled):
            place, n = _place(_find(key_T, index_T, ring[j]), seen_C, candidates, n)
            q[_COPY, place] += weight
            q[_FREQUENCY, place] += share
            weight *= np.float32(RECENCY)
    some, n = _mix(key_T, index_T, view["short_category"], view["short_weight"], _SHORT, seen_C, candidates, q, n)
    if not some:
        back[_SHORT] = one
    some, n = _mix(key_T, index_T, view["long_category"], view["long_weight"], _LONG, seen_C, candidates, q, n)
    if not some:
        back[_LONG] = one

    unknown = len(tables.markov_back_C)
    latest = _find(key_T, index_T, ring[0]) if filled else unknown
    if latest == unknown:
        back[_MARKOV] = one
    else:
        back[_MARKOV] = tables.markov_back_C[latest]
        n_listed = tables.markov_n_C[latest]
        n = _listed(tables.markov_CM, tables.markov_p_CM, latest, n_listed, q, _MARKOV, seen_C, candidates, n)
        q[_MARKOV, _OTHER] += tables.markov_rest_C[latest]

    n_listed = tables.popular_n_P[platform]
    n = _listed(tables.popular_PT, tables.popular_p_PT, platform, n_listed, q, _POPULAR, seen_C, candidates, n)
    q[_POPULAR, _OTHER] += tables.popular_rest_P[platform]

    for k in range(_POPULAR):
        part = back[k]
        if part > 0:
            for c in range(_WIDTH):
                q[k, c] += part * q[_POPULAR, c]
    q[_REST, _OTHER] = one
    return n


@njit(cache=True, nogil=True)
def _listed(index_XT, p_XT, x, n_listed, q, component, seen_C, candidates, n):
    """Adds the first `n_listed` of a row of the table. → number of candidates"""
    for j in range(n_listed):
        place, n = _place(index_XT[x, j], seen_C, candidates, n)
        q[component, place] += p_XT[x, j]
    return n


@njit(cache=True, nogil=True)
def _forget(seen_C, candidates, n):
    for c in range(n):
        seen_C[candidates[c]] = -1


@njit(cache=True, nogil=True)
def _softmax(logits_K, out_K):
    top = logits_K[0]
    for k in range(1, len(out_K)):
        top = max(top, logits_K[k])
    total = np.float32(0.0)
    for k in range(len(out_K)):
        out_K[k] = np.exp(logits_K[k] - top)
        total += out_K[k]
    for k in range(len(out_K)):
        out_K[k] /= total


@njit(cache=True, nogil=True)
def _mixture(gate_G, q, p):
    for c in range(_WIDTH):
        total = np.float32(0.0)
        for k in range(N_GATES):
            total += gate_G[k] * q[k, c]
        p[c] = total


# A sum in any order: an output, no state. So it is of vector instructions.
@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _outside(p, long):
    """The sum of p where `long` says nothing."""
    total = 0.0
    for c in range(_WIDTH):
        total += np.float64(p[c]) if long[c] <= 0 else 0.0
    return total


@njit(cache=True, nogil=True)
def _divergence(p, long, at):
    """Jensen-Shannon divergence (base 2) over the candidates and *other*. `at`: scratch for (_WIDTH,) places."""
    n = 0
    for c in range(_OTHER + 1):
        at[n] = c
        n += long[c] > 0
    total = 0.5 * _outside(p, long)  # ½ p log2(p / ½p)
    for j in range(n):
        one, two = np.float64(p[at[j]]), np.float64(long[at[j]])
        middle = 0.5 * (one + two)
        if one <= 0.0:
            total += 0.5 * two
        elif one != two:
            total += _HALF_BIT * (one * math.log(one / middle) + two * math.log(two / middle))
    return min(max(total, 0.0), 1.0)


@njit(cache=True, nogil=True)
def _keep_most(p, n, candidates, category_T, p_T):
    """The candidates of the greatest p, greatest first. Equal ones keep the order of the candidates, which the row and
    the table alone decide."""
    last = len(p_T) - 1
    for c in range(n):
        if p[c] > p_T[last]:
            t = last
            while t > 0 and p[c] > p_T[t - 1]:
                category_T[t], p_T[t] = category_T[t - 1], p_T[t - 1]
                t -= 1
            category_T[t], p_T[t] = candidates[c], p[c]


@njit(cache=True, nogil=True)
def _predict(tables, views, platform_N, wanted_N, gates_NG, category_NT, p_NT, shift_N):
    seen_C, candidates, q, back = _workspace(tables)
    key_T, index_T = tables.key_T, tables.index_T
    p = np.empty(_WIDTH, np.float32)
    gate_G, at = np.empty(N_GATES, np.float32), np.empty(_WIDTH, np.int64)
    for i in range(len(platform_N)):
        category_NT[i] = -1
        p_NT[i] = 0.0
        shift_N[i] = np.nan
        if not wanted_N[i]:
            continue
        n = _components(tables, key_T, index_T, views[i], platform_N[i], seen_C, candidates, q, back)
        _softmax(gates_NG[i], gate_G)
        _mixture(gate_G, q, p)
        _keep_most(p, n, candidates, category_NT[i], p_NT[i])
        if _any_above_zero(views[i]["long_weight"]):
            shift_N[i] = np.sqrt(_divergence(p, q[_LONG], at))
        _forget(seen_C, candidates, n)


@njit(cache=True, nogil=True)
def _any_above_zero(weights):
    found = False
    for j in range(len(weights)):
        found |= weights[j] > 0
    return found


@njit(cache=True, nogil=True)
def _target(tables, views, platform_N, next_N, q_NG):
    seen_C, candidates, q, back = _workspace(tables)
    key_T, index_T = tables.key_T, tables.index_T
    for i in range(len(platform_N)):
        if next_N[i] == 0:
            q_NG[i] = 0.0
            continue
        n = _components(tables, key_T, index_T, views[i], platform_N[i], seen_C, candidates, q, back)
        place = np.int64(seen_C[_find(key_T, index_T, next_N[i])])
        for k in range(N_GATES):
            q_NG[i, k] = q[k, place if place >= 0 else _OTHER]
        _forget(seen_C, candidates, n)


@dataclass(frozen=True, eq=False)
class CategoryTable:
    """The categories that a model knows, and what it counted of them. Indices are into `hashes_C` and `names`."""

    hashes_C: np.ndarray
    """u4, strictly ascending: hash32 of the names."""
    names: list[str]
    popular_PT: np.ndarray
    """int32 (P + 1, T): most frequent next categories, most frequent first; −1 after the last. Row 0: all platforms."""
    popular_p_PT: np.ndarray
    """float32: their shares among all next categories, known or not."""
    markov_CM: np.ndarray
    """int32 (C, M): most frequent categories next to each one, −1 after the last."""
    markov_p_CM: np.ndarray
    """float32: their smoothed shares."""
    markov_back_C: np.ndarray
    """float32: what the smoothing leaves to popularity."""

    @classmethod
    def from_counts(
        cls,
        category_N: np.ndarray,
        next_N: np.ndarray,
        platform_N: np.ndarray,
        names: Mapping[int, str],
        n_platforms: int,
        *,
        max_categories: int = 8192,
        smoothing: float = 20.0,
    ) -> CategoryTable:
        """Counts training pairs: the last category that the user saw at an event and the next one (hash32, 0 none),
        with the event's platform (0 … n_platforms). Pairs without a next category are left out.

        Keeps the `max_categories` most frequent; `names` maps every hash to its name. A category that was followed
        n times gives popularity smoothing / (n + smoothing) of its word. Deterministic.
        """
        kept = next_N != 0
        category_N, next_N, platform_N = category_N[kept], next_N[kept], platform_N[kept]
        found, counts = np.unique(np.concatenate([category_N[category_N != 0], next_N]), return_counts=True)
        most = np.lexsort((found, -counts))[:max_categories]
        hashes_C = np.sort(found[most]).astype(np.uint32)
        to, known = _indices(hashes_C, next_N)
        popular_PT, popular_p_PT = _empty_top(n_platforms + 1, TOP_POPULAR)
        for platform in range(n_platforms + 1):
            of_platform = (platform_N == platform) if platform else np.ones(len(platform_N), bool)
            counted_C = np.bincount(to[of_platform & known], minlength=len(hashes_C))
            _fill_top(popular_PT[platform], popular_p_PT[platform], counted_C, of_platform.sum())
            if platform and not of_platform.any():
                popular_PT[platform], popular_p_PT[platform] = popular_PT[0], popular_p_PT[0]
        markov_CM, markov_p_CM = _empty_top(len(hashes_C), TOP_MARKOV)
        markov_back_C = np.ones(len(hashes_C), np.float32)
        came, known_from = _indices(hashes_C, category_N)
        came, to, known = came[known_from], to[known_from], known[known_from]
        order = np.argsort(came, kind="stable")
        bounds = np.searchsorted(came[order], np.arange(len(hashes_C) + 1))
        for c in range(len(hashes_C)):
            of_c = order[bounds[c] : bounds[c + 1]]
            total = len(of_c) + smoothing
            following, n = np.unique(to[of_c][known[of_c]], return_counts=True)
            best = np.lexsort((following, -n))[:TOP_MARKOV]
            markov_CM[c, : len(best)] = following[best]
            markov_p_CM[c, : len(best)] = n[best] / total
            markov_back_C[c] = smoothing / total
        texts = [names[int(h)] for h in hashes_C]
        return cls(hashes_C, texts, popular_PT, popular_p_PT, markov_CM, markov_p_CM, markov_back_C)

    @cached_property
    def _tables(self) -> _Tables:
        size = 1 << max(10, int(2 * len(self.hashes_C)).bit_length())
        key_T, index_T = np.zeros(size, np.uint32), np.full(size, len(self.hashes_C), np.int32)
        for index, category in enumerate(self.hashes_C.tolist()):
            at = category & (size - 1)
            while key_T[at]:
                at = (at + 1) & (size - 1)
            key_T[at], index_T[at] = category, index
        one_P = np.ones(len(self.popular_PT), np.float32)
        return _Tables(
            key_T,
            index_T,
            self.popular_PT,
            self.popular_p_PT,
            *_filled(self.popular_PT, self.popular_p_PT, one_P),
            self.markov_CM,
            self.markov_p_CM,
            *_filled(self.markov_CM, self.markov_p_CM, np.float32(1.0) - self.markov_back_C),
            self.markov_back_C,
        )

    def predict(
        self,
        views: np.ndarray,
        platform_N: np.ndarray,
        gates_NG: np.ndarray,
        wanted_N: np.ndarray | None = None,
        top: int = 5,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """→ category (N, top) int32 index or −1, their p (N, top) float32 descending or 0, interest shift (N,) float32
        in [0, 1] or NaN. `gates_NG`: float32 logits (N, 7); `wanted_N`: False gives −1, 0, NaN."""
        n = len(platform_N)
        wanted_N = np.ones(n, bool) if wanted_N is None else wanted_N
        category_NT, p_NT = np.empty((n, top), np.int32), np.empty((n, top), np.float32)
        shift_N = np.empty(n, np.float32)
        gates_NG = np.ascontiguousarray(gates_NG, np.float32)
        platform_N = np.asarray(platform_N, np.int64)
        _predict(self._tables, views, platform_N, wanted_N, gates_NG, category_NT, p_NT, shift_N)
        return category_NT, p_NT, shift_N

    def q_target(self, views: np.ndarray, platform_N: np.ndarray, next_N: np.ndarray) -> np.ndarray:
        """(N, 7) float32: what each component gives to the category that came next (hash32; *other* where it is no
        candidate; all zero where there is none, 0). The category loss of an event is −log Σ_k gate_k q_k."""
        q_NG = np.empty((len(platform_N), N_GATES), np.float32)
        _target(self._tables, views, np.asarray(platform_N, np.int64), np.asarray(next_N, np.uint32), q_NG)
        return q_NG

    def index_of(self, category_N: np.ndarray) -> np.ndarray:
        """int32 indices of hashes, −1 where not in the table."""
        index, known = _indices(self.hashes_C, category_N)
        return np.where(known, index, -1).astype(np.int32)

    def check(self, n_platforms: int) -> None:
        """Raises `ValueError` where the arrays do not fit each other (the kernels do not look)."""
        c, rows = len(self.hashes_C), n_platforms + 1
        shaped = (
            len(self.names) == c
            and self.hashes_C.dtype == np.uint32
            and self.popular_PT.shape == self.popular_p_PT.shape == (rows, self.popular_PT.shape[-1])
            and self.markov_CM.shape == self.markov_p_CM.shape == (c, self.markov_CM.shape[-1])
            and self.markov_back_C.shape == (c,)
        )
        if not shaped or (c and (self.hashes_C[0] == 0 or (np.diff(self.hashes_C.astype(np.int64)) <= 0).any())):
            raise ValueError("the category table's arrays do not fit each other")
        for indices in (self.popular_PT, self.markov_CM):
            if indices.dtype != np.int32 or (indices.size and (indices.max() >= c or indices.min() < -1)):
                raise ValueError("the category table points outside itself")
        for shares in (self.popular_p_PT, self.markov_p_CM, self.markov_back_C):
            if shares.dtype != np.float32 or (shares.size and not (shares.min() >= 0 and shares.max() <= 1)):
                raise ValueError("the category table has a share outside [0, 1]")


def _indices(hashes_C: np.ndarray, category_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """→ index of each category, and whether it is there at all."""
    if not len(hashes_C):
        return np.zeros(len(category_N), np.int64), np.zeros(len(category_N), bool)
    index = np.minimum(np.searchsorted(hashes_C, category_N), len(hashes_C) - 1)
    return index, hashes_C[index] == category_N


def _empty_top(n: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((n, top), -1, np.int32), np.zeros((n, top), np.float32)


def _fill_top(index_T: np.ndarray, p_T: np.ndarray, counted_C: np.ndarray, total: int) -> None:
    best = np.lexsort((np.arange(len(counted_C)), -counted_C))[: len(index_T)]
    best = best[counted_C[best] > 0]
    index_T[: len(best)] = best
    p_T[: len(best)] = counted_C[best] / max(total, 1)
