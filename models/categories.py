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
def take_view(rows, slot, views, i):
    """views[i] ← what the candidates need of rows[slot]."""
    row, view = rows[slot], views[i]
    ring, kept, n = row["ring_category"], view["ring_category"], 0
    for j in range(row["n_ring"] - 1, -1, -1):
        if ring[j] != 0:
            kept[n] = ring[j]
            n += 1
    view["n"] = n
    view["short_category"][:] = row["mix_short_category"]
    view["short_weight"][:] = row["mix_short_weight"]
    view["long_category"][:] = row["mix_long_category"]
    view["long_weight"][:] = row["mix_long_weight"]


@njit(cache=True, nogil=True)
def _take_views(rows, slots, views):
    for i in range(len(slots)):
        take_view(rows, slots[i], views, i)


def views_of(rows: np.ndarray, slots: np.ndarray, size: str = "cpu") -> np.ndarray:
    """Views (N,) of rows as they now are."""
    views = np.zeros(len(slots), view_dtype(size))
    _take_views(rows, slots, views)
    return views


class _Tables(NamedTuple):
    """The table as the kernels read it."""

    key_T: np.ndarray  # u4, open addressing by the hash itself; 0 empty
    index_T: np.ndarray
    popular_PT: np.ndarray
    popular_p_PT: np.ndarray
    markov_CM: np.ndarray
    markov_p_CM: np.ndarray
    markov_back_C: np.ndarray


@njit(cache=True, nogil=True)
def _find(tables, category):
    """Index of a category's hash in the table, −1 where it is not there."""
    last = len(tables.key_T) - 1
    at = category & last
    while tables.key_T[at] != 0:
        if tables.key_T[at] == category:
            return tables.index_T[at]
        at = (at + 1) & last
    return -1


@njit(cache=True, nogil=True)
def _place(index, seen_C, candidates, q, n):
    """→ (place of a category among the candidates, number of candidates): itself where it fits, else *other*."""
    if index < 0:
        return _OTHER, n
    place = seen_C[index]
    if place >= 0:
        return place, n
    if n == MAX_CANDIDATES:
        return _OTHER, n
    seen_C[index] = n
    candidates[n] = index
    for k in range(N_GATES):
        q[k, n] = 0.0
    return n, n + 1


@njit(cache=True, nogil=True)
def _mix(tables, categories, weights, component, seen_C, candidates, q, n):
    """Adds a normalised mix. → (anything in it, number of candidates)"""
    total = np.float32(0.0)
    for j in range(len(categories)):
        if categories[j] != 0 and weights[j] > 0:
            total += weights[j]
    if total <= 0:
        return False, n
    for j in range(len(categories)):
        if categories[j] != 0 and weights[j] > 0:
            place, n = _place(_find(tables, categories[j]), seen_C, candidates, q, n)
            q[component, place] += weights[j] / total
    return True, n


@njit(cache=True, nogil=True)
def _components(tables, view, platform, seen_C, candidates, q):
    """Fills `candidates` (64,) and q (7, 65): q_k of every candidate, and in the last column of *other*.
    → number of candidates. `seen_C` comes as all −1 and is left with the candidates' places."""
    n, one = 0, np.float32(1.0)
    for k in range(N_GATES):
        q[k, _OTHER] = 0.0
    back = np.zeros(N_GATES, np.float32)  # the part of each component that popularity speaks for
    ring, filled = view["ring_category"], view["n"]

    if filled == 0:
        back[_COPY] = back[_FREQUENCY] = one
    else:
        weight, total = one, np.float32(0.0)
        for _ in range(filled):
            total += weight
            weight *= np.float32(RECENCY)
        weight = one / total
        for j in range(filled):
            place, n = _place(_find(tables, ring[j]), seen_C, candidates, q, n)
            q[_COPY, place] += weight
            q[_FREQUENCY, place] += one / np.float32(filled)
            weight *= np.float32(RECENCY)
    some, n = _mix(tables, view["short_category"], view["short_weight"], _SHORT, seen_C, candidates, q, n)
    if not some:
        back[_SHORT] = one
    some, n = _mix(tables, view["long_category"], view["long_weight"], _LONG, seen_C, candidates, q, n)
    if not some:
        back[_LONG] = one

    latest = _find(tables, ring[0]) if filled else -1
    if latest < 0:
        back[_MARKOV] = one
    else:
        back[_MARKOV] = tables.markov_back_C[latest]
        rest = one - back[_MARKOV]
        for j in range(tables.markov_CM.shape[1]):
            if tables.markov_CM[latest, j] < 0:
                break
            place, n = _place(tables.markov_CM[latest, j], seen_C, candidates, q, n)
            q[_MARKOV, place] += tables.markov_p_CM[latest, j]
            rest -= tables.markov_p_CM[latest, j]
        q[_MARKOV, _OTHER] += max(rest, np.float32(0.0))

    rest = one
    for j in range(tables.popular_PT.shape[1]):
        if tables.popular_PT[platform, j] < 0:
            break
        place, n = _place(tables.popular_PT[platform, j], seen_C, candidates, q, n)
        q[_POPULAR, place] += tables.popular_p_PT[platform, j]
        rest -= tables.popular_p_PT[platform, j]
    q[_POPULAR, _OTHER] += max(rest, np.float32(0.0))

    for k in range(_POPULAR):
        if back[k] > 0:
            for c in range(n):
                q[k, c] += back[k] * q[_POPULAR, c]
            q[k, _OTHER] += back[k] * q[_POPULAR, _OTHER]
    q[_REST, _OTHER] = one
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
def _divergence(p, long, n):
    """Jensen-Shannon divergence (base 2) over n candidates and *other*."""
    total = 0.0
    for c in range(n + 1):
        at = c if c < n else _OTHER
        one, two = np.float64(p[at]), np.float64(long[at])
        middle = 0.5 * (one + two)
        if two <= 0.0:
            total += 0.5 * one  # ½ p log2(p / ½p)
        elif one <= 0.0:
            total += 0.5 * two
        elif one != two:
            total += 0.5 * (one * np.log2(one / middle) + two * np.log2(two / middle))
    return min(max(total, 0.0), 1.0)


@njit(cache=True, nogil=True)
def _predict(tables, views, platform_N, wanted_N, gates_NG, category_NT, p_NT, shift_N):
    seen_C = np.full(len(tables.markov_back_C), -1, np.int8)
    candidates = np.empty(MAX_CANDIDATES, np.int32)
    q = np.zeros((N_GATES, MAX_CANDIDATES + 1), np.float32)
    p = np.empty(MAX_CANDIDATES + 1, np.float32)
    gate_G = np.empty(N_GATES, np.float32)
    top = category_NT.shape[1]
    for i in range(len(platform_N)):
        for t in range(top):
            category_NT[i, t] = -1
            p_NT[i, t] = 0.0
        shift_N[i] = np.nan
        if not wanted_N[i]:
            continue
        n = _components(tables, views[i], platform_N[i], seen_C, candidates, q)
        _softmax(gates_NG[i], gate_G)
        p[:] = 0.0
        for k in range(N_GATES):
            for c in range(n):
                p[c] += gate_G[k] * q[k, c]
            p[_OTHER] += gate_G[k] * q[k, _OTHER]
        for c in range(n):
            # Equal probabilities keep the order of the candidates, which the row and the table alone decide.
            t = top
            while t > 0 and p[c] > p_NT[i, t - 1]:
                t -= 1
            if t < top:
                for later in range(top - 1, t, -1):
                    category_NT[i, later] = category_NT[i, later - 1]
                    p_NT[i, later] = p_NT[i, later - 1]
                category_NT[i, t] = candidates[c]
                p_NT[i, t] = p[c]
        if views[i]["long_weight"].max() > 0:
            shift_N[i] = np.sqrt(_divergence(p, q[_LONG], n))
        _forget(seen_C, candidates, n)


@njit(cache=True, nogil=True)
def _target(tables, views, platform_N, next_N, q_NG):
    seen_C = np.full(len(tables.markov_back_C), -1, np.int8)
    candidates = np.empty(MAX_CANDIDATES, np.int32)
    q = np.zeros((N_GATES, MAX_CANDIDATES + 1), np.float32)
    for i in range(len(platform_N)):
        if next_N[i] == 0:
            q_NG[i] = 0.0
            continue
        n = _components(tables, views[i], platform_N[i], seen_C, candidates, q)
        index = _find(tables, next_N[i])
        place = seen_C[index] if index >= 0 else -1
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
        size = 1 << max(4, int(2 * len(self.hashes_C)).bit_length())
        key_T, index_T = np.zeros(size, np.uint32), np.full(size, -1, np.int32)
        for index, category in enumerate(self.hashes_C.tolist()):
            at = category & (size - 1)
            while key_T[at]:
                at = (at + 1) & (size - 1)
            key_T[at], index_T[at] = category, index
        return _Tables(
            key_T,
            index_T,
            self.popular_PT,
            self.popular_p_PT,
            self.markov_CM,
            self.markov_p_CM,
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
