"""How well anybody could know the simulator's shoppers from their events: the exact filter of the hidden state.

    a moment's kind, impressions or lines, the silence before it ─► P(a, b, k, e, m | all events so far) ─► E[truth]

Bayes' AUC (`streams/simulator.py`) knows the state itself; events only hint at it. This filter knows the simulator's
numbers and nothing but the events, so its AUC is what a model can reach at best, and Bayes' is not.

Exact for a shopper all of whose sessions are seen (accounts linked, or only one), but for three small things: the state
before the first event is drawn as the simulator draws it at its start, three silent days earlier; events are taken by their
time, late ones too; and a moment may lie anywhere in its tick.

Shapes: n events, A × B × 9 hidden states (activity, buyer, engagement · 3 + need), K profiles.
Knows nothing of models, features or splits.
"""

from __future__ import annotations

from math import lgamma

import numpy as np
from numba import njit

from models.events import CANCEL, CART, CLICK, FAVORITE, IMPRESSION, PURCHASE, VIEW
from streams import simulator as sim

_WARM_UP, _SILENT, _GROCER = sim.WARM_UP_TICKS, sim.SILENT_TICKS, sim.GROCER
_BITS = 17
"""2^17 ticks are half a year of silence."""


def expected_truth(user: np.ndarray, ts: np.ndarray, platform: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """(n, 3) P(click), P(purchase), P(return) given each user's events up to and with the event, those of a moment in their
    order, the act before what is shown beside it. `user`: a number; `ts`: ms; `platform`: index into PLATFORMS; `kind`:
    KIND_CODE."""
    day, ms = np.divmod(ts, sim.DAY_MS)
    tick = day * sim.TICKS_A_DAY + sim.operational_ticks(ms)
    order = np.lexsort((np.arange(len(user)), kind == IMPRESSION, ts, user))
    seen = np.empty((len(user), 3))
    short, long = sim.survival("purchase", sim.PURCHASE_TICKS), sim.survival("return", sim.RETURN_TICKS)
    everything = np.array([sim.VIEWPOINT[k, sim.ALL] for k in range(len(sim.PROFILES))])
    # A moment lies anywhere in its tick: the mean over places.
    purchase, returns = (1.0 - table.mean(axis=0)[everything] for table in (short, long))
    _filter(
        user[order], tick[order], platform[order].astype(np.int64), kind[order].astype(np.int64),
        _silence(), sim.stays(), sim.starts(), _moments(), _at_least(), purchase, returns,
        sim.SPREAD, sim.PROFILE_SHARE, _prior(), sim.CLOYS, seen,
    )  # fmt: skip
    out = np.empty_like(seen)
    out[order] = seen
    return out


def _silence() -> np.ndarray:
    """(bits, a, b, from, to): 2^bit idle ticks without a session."""
    h_AE, drift = sim.starts(), sim.drifts()
    out = np.empty((_BITS, sim.N_A, sim.N_B, sim.N_EM, sim.N_EM))
    out[0] = (1.0 - h_AE)[:, None, :, None] * drift[None]
    for bit in range(1, _BITS):
        out[bit] = out[bit - 1] @ out[bit - 1]
    return out


def _moments() -> np.ndarray:
    """(b, p, kind, from, to): the state moves and the moment's own kind is seen."""
    out = np.zeros((sim.N_B, 3, 1 + CANCEL, sim.N_EM, sim.N_EM))
    moved, buy, after = sim.need_moves(), sim.buys(), sim.after_purchase()
    for b in range(sim.N_B):
        for p in range(3):
            stays = moved[b, p] * (1.0 - buy[b, p])
            if p == sim.GROCER:
                out[b, p, CANCEL] = np.kron(np.eye(3), stays)
            else:
                for column, code in enumerate((VIEW, CLICK, FAVORITE, CART)):
                    out[b, p, code] = np.kron(np.eye(3), stays * sim.SHOWN[:, column])
            up = sim.UPLIFT[p]
            rises = np.array([[1 - up, up, 0], [0, 1 - up, up], [0, 0, 1]])
            out[b, p, PURCHASE] = np.kron(rises, (moved[b, p] * buy[b, p]) @ after[p])
    return out


def _at_least() -> np.ndarray:
    """(2, extras, e): chance of exactly, of at least so many impressions or further lines; 0 shops, 1 the grocer."""
    out = np.zeros((2, 2, sim.MOST_LINES + 1, 3))
    for which, (mean_E, most) in enumerate(((sim.SHOWN_BESIDE, sim.MOST_SHOWN), (sim.EXTRA_LINES, sim.MOST_LINES - 1))):
        for e, mean in enumerate(mean_E):
            chance = np.array([np.exp(x * np.log(mean) - mean - lgamma(x + 1)) for x in range(most)])
            chance = np.r_[chance, 1.0 - chance.sum()]
            out[which, 0, : most + 1, e] = chance
            out[which, 1, : most + 1, e] = np.cumsum(chance[::-1])[::-1]
    return out


def _prior() -> np.ndarray:
    """(a, b, 9): as the simulator begins."""
    e_m = np.outer((0.69, 0.2, 0.11), (0.79, 0.2, 0.01)).ravel()
    return sim.ACTIVITY_SHARE[:, None, None] * sim.BUYER_SHARE[:, None] * e_m


@njit(cache=True)
def _filter(
    user, tick, platform, kind, silence, stays, starts, moments, at_least, purchase, returns, spread, profile, prior, cloys,
    out,
):  # fmt: skip
    n_a, n_b, n_em = prior.shape
    v, w = prior.copy(), prior.copy()
    k_share = profile.copy()
    n = len(user)
    i = 0
    while i < n:
        p = platform[i]
        first = i == 0 or user[i] != user[i - 1]
        gap = 0 if first else round(tick[i] - tick[i - 1])
        if first:
            v[:] = prior
            k_share[:] = profile
            quiet = _WARM_UP
        else:
            quiet = gap - 1 - _SILENT
        if not first and quiet < 0:
            for a in range(n_a):
                for b in range(n_b):
                    for s in range(n_em):
                        v[a, b, s] *= stays[b, platform[i - 1], s]
        else:
            if not first:
                for a in range(n_a):
                    for b in range(n_b):
                        for s in range(n_em):
                            v[a, b, s] *= 1.0 - stays[b, platform[i - 1], s]
                        for s in range(3, n_em):  # ascending: what came down from 6 … 8 goes no further
                            moved = cloys[a] * v[a, b, s]
                            v[a, b, s] -= moved
                            v[a, b, s - 3] += moved
            for a in range(n_a):
                for b in range(n_b):
                    for bit in range(len(silence)):
                        if (quiet >> bit) & 1:
                            w[a, b] = 0.0
                            for s in range(n_em):
                                for t in range(n_em):
                                    w[a, b, t] += v[a, b, s] * silence[bit, a, b, s, t]
                            v[a, b] = w[a, b]
                    for s in range(n_em):
                        v[a, b, s] *= starts[a, s]
            k_share *= spread[:, p]
            k_share /= k_share.sum()
        # The moment: its first event says what it is.
        for a in range(n_a):
            for b in range(n_b):
                w[a, b] = 0.0
                for s in range(n_em):
                    for t in range(n_em):
                        w[a, b, t] += v[a, b, s] * moments[b, p, kind[i], s, t]
        total = w.sum()
        v[:] = w / total if total > 0 else prior
        stop = i + 1
        while stop < n and user[stop] == user[i] and tick[stop] == tick[i]:
            stop += 1
        shows = kind[i] == VIEW or kind[i] == CLICK or (p == _GROCER and kind[i] == PURCHASE)
        which = 1 if p == _GROCER else 0
        for at in range(i, stop):
            click = bought = back = weight = 0.0
            for a in range(n_a):
                for b in range(n_b):
                    for s in range(n_em):
                        x = v[a, b, s]
                        if shows:
                            x *= at_least[which, 1, min(at - i, at_least.shape[2] - 1), s // 3]
                        weight += x
                        click += x * stays[b, p, s]
                        for k in range(len(k_share)):
                            bought += x * k_share[k] * purchase[k, a, b, p, s]
                            back += x * k_share[k] * returns[k, a, b, p, s]
            out[at, 0], out[at, 1], out[at, 2] = click / weight, bought / weight, back / weight
        if shows:
            for a in range(n_a):
                for b in range(n_b):
                    for s in range(n_em):
                        v[a, b, s] *= at_least[which, 0, min(stop - i - 1, at_least.shape[2] - 1), s // 3]
            v /= v.sum()
        i = stop
