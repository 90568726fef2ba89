"""What comes next on recorded data: category, item, spend, shift; and what else one might put on the binary cells.

    Bench ─┬─► taught student ─► gates, h ─┬─► the whole mixture over all categories ─┐
           │                               └─► boosting on features + h ──────────────┼─► paired figures, bars
           └─► Markov + copy, GRU4Rec-like, SASRec-like, mean-pool, popularity … ─────┘

Ranks are over the full catalogue, conservative: what ties with the answer stands before it. A pair (event, next category)
is learned from only where the next one came before the first day of validation; all else as in `benchmarks/cells.py`.
Knows nothing of the main table's choices but the schedule and the teacher's members.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import lightgbm as lgb
import numpy as np
import pyarrow.parquet as pq
import torch
from numba import njit
from scipy import sparse
from sklearn.linear_model import Ridge

from benchmarks import datasets, interest
from benchmarks.baselines import DISTIL, fixed, heard, models_of
from benchmarks.cells import (
    Bench,
    Section,
    bar,
    by_cell,
    cached,
    difference,
    judge,
    named,
    note,
    student,
    student_config,
    trained,
)
from benchmarks.datasets import DAY_MS, TEST, TRAIN, VALIDATE, WITH_CATEGORIES
from models.categories import RECENCY, CategoryTable
from models.events import KINDS, PRICE_EDGES, PURCHASE
from models.student import Columns, linear_scan
from trainer import boosting, metrics
from trainer.examples import Examples
from trainer.sequences import Settings, fit_events, fit_next, next_scores

CHUNK = 1024
FIGURES = {"HR@5": metrics.hit_rates, "NDCG@10": metrics.ndcgs, "MRR@20": metrics.mrrs}
CHECKED = 4_000
"""Validation anchors by which baselines are tuned, evenly taken, at most."""
ON_CELLS = {
    "mean_pool": Settings("mean", epochs=8, batch_events=512, patience=2),
    "gru4rec_like": Settings("gru", epochs=8, batch_events=512, patience=2),
    "sasrec_like": Settings("attention"),
}
"""By validation log-loss: .580, .554, .557; .589, .563, .566 with the other schedule of the two."""
SESSIONS = ("retailrocket_sessions", "diginetica_sessions")
LAST_SESSIONS, SCORED_SESSIONS = 60_000, 2_000
"""Of a file, in its order: so many of the last are used, and of their last fifth so many drawn at random are scored."""
SPEND = SHIFT = ("online_retail_uk", "complete_journey")
LEAST_EVENTS = 3
"""With a category, in both windows of an anchor of interest shift."""


def measure(bench: Bench, quick: bool) -> Section:
    """The section `ranking`."""
    draws = 100 if quick else 400
    examples, (models, *_) = bench.examples, models_of(bench, range(1), 4 if quick else 12)
    soft_MT = heard(bench, models["teacher"][0])
    state_MS = cached(bench, named("ranking-state", DISTIL, soft_MT), lambda: _state(bench, soft_MT))
    hidden = student_config(bench.data).hidden
    h_MH, gates_MG = state_MS[:, :hidden], state_MS[:, hidden:]
    table = count(bench, examples)
    categories = next_category(bench, examples, table, gates_MG, draws)
    cells = binary(bench, h_MH, soft_MT, draws)
    sessions = next_item(bench, draws)
    spent = spend(bench, h_MH, draws)
    shifted = shift(bench, table, gates_MG, draws)
    figures = {"category": categories, "cells": cells, "next_item": sessions, "spend": spent, "shift": shifted}
    return Section(bars(categories), figures, text(figures, draws))


def _tell(what: str, values: dict[str, float]) -> None:
    note(f"{what}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))


def _key(what: str, settings: Settings) -> str:
    """A name in the cache that changes with the networks' code and settings."""
    code = (datasets.ROOT / "trainer" / "sequences.py").read_bytes() + repr(settings).encode()
    return f"ranking-{what}-{settings.body}-{hashlib.sha256(code).hexdigest()[:8]}"


# ── the student, and pairs that had matured ──────────────────────────────────────────────────────────────────────────


def count(bench: Bench, examples: Examples) -> CategoryTable:
    """The table of all pairs to learn from, as `trainer.train` counts it."""
    history = bench.data.history
    return CategoryTable.from_counts(
        examples.category_M, examples.next_M, examples.platform_M, history.categories, len(history.platforms)
    )


def _state(bench: Bench, soft_MT: np.ndarray) -> np.ndarray:
    """(M, H + 7): the hidden state after each event and the gates' logits of the distilled student."""
    examples, model = bench.examples, trained(bench, "distilled", DISTIL, soft_MT=soft_MT).network.student
    out, user_M = [], examples.user_M
    cuts = np.r_[np.flatnonzero(np.r_[True, user_M[1:] != user_M[:-1]])[::2000], len(user_M)]
    with torch.inference_mode():
        for start, stop in pairwise(cuts.tolist()):
            own = Columns(*(column[start:stop] for column in examples.columns))
            x_NF, e_NE, a_NH, b_NH = model.encode(own)
            h_NH = linear_scan(a_NH, b_NH, torch.from_numpy(examples.starts_M[start:stop]))
            gates_NG = model.heads(h_NH, x_NF, e_NE, own.platform_N)[1]
            out.append(torch.cat([h_NH, gates_NG], dim=1).numpy())
    return np.concatenate(out)


# ── the next category ────────────────────────────────────────────────────────────────────────────────────────────────


def mixture(table: CategoryTable, views: np.ndarray, platform_N: np.ndarray, gates_NG: np.ndarray) -> np.ndarray:
    """(N, C) what the head's mixture gives to every category of the table: said again in plain NumPy, without the limit on
    candidates, of which `CategoryTable.predict` names the top."""
    n, c = len(views), len(table.hashes_C)
    gate_NG = np.exp(gates_NG - gates_NG.max(axis=1, keepdims=True)).astype(np.float64)
    gate_NG /= gate_NG.sum(axis=1, keepdims=True)
    popular_PC = _dense(table.popular_PT, table.popular_p_PT, c)
    markov_CC = _dense(table.markov_CM, table.markov_p_CM, c) + 0.0
    place_K = np.arange(views["ring_category"].shape[1])
    filled_NK = place_K < views["n"][:, None]
    ring_NK = np.where(filled_NK, table.index_of(np.where(filled_NK, views["ring_category"], 0)), -1)
    shares = [(ring_NK, filled_NK * RECENCY**place_K), (ring_NK, filled_NK * 1.0)]
    for mix in ("short", "long"):
        category_NJ = views[f"{mix}_category"]
        shares.append((table.index_of(category_NJ), np.where(category_NJ != 0, np.maximum(views[f"{mix}_weight"], 0), 0.0)))
    popular_NC = popular_PC[platform_N]
    out_NC = np.zeros((n, c))
    for k, (index_NJ, weight_NJ) in enumerate(shares):
        total_N1 = weight_NJ.sum(axis=1, keepdims=True)
        q_NC = np.where(total_N1 > 0, 0.0, popular_NC)
        event_J, place_J = np.nonzero((index_NJ >= 0) & (total_N1 > 0))
        np.add.at(q_NC, (event_J, index_NJ[event_J, place_J]), (weight_NJ / np.maximum(total_N1, 1e-30))[event_J, place_J])
        out_NC += gate_NG[:, k, None] * q_NC
    known_N = ring_NK[:, 0] >= 0
    back_N = np.where(known_N, table.markov_back_C[ring_NK[:, 0]] if c else 1.0, 1.0)
    markov_NC = markov_CC[ring_NK[:, 0]] * known_N[:, None] + back_N[:, None] * popular_NC
    return out_NC + gate_NG[:, 4, None] * markov_NC + gate_NG[:, 5, None] * popular_NC


def _dense(index_RT: np.ndarray, p_RT: np.ndarray, c: int) -> np.ndarray:
    out_RC = np.zeros((len(index_RT), c))
    row_J, place_J = np.nonzero(index_RT >= 0)
    out_RC[row_J, index_RT[row_J, place_J]] = p_RT[row_J, place_J]
    return out_RC


class Stream(NamedTuple):
    """One platform's events, sorted by user, and its catalogue of V categories. Indices are 0 … V − 1, −1 none."""

    at: np.ndarray
    """Places among the examples."""
    hashes_V: np.ndarray
    """All categories that occur on the platform, at any time."""
    own_N: np.ndarray
    next_N: np.ndarray
    ring_NK: np.ndarray
    """Newest first."""
    learn_N: np.ndarray
    scored: dict[int, np.ndarray]
    """Part of the split → positions of the anchors that have a next category."""
    user_N: np.ndarray
    ts_N: np.ndarray


def stream_of(bench: Bench, examples: Examples, platform: str) -> Stream:
    data = bench.data
    at = np.flatnonzero(examples.platform_M == 1 + data.history.platforms.index(platform))
    index_N = examples.index_M[at]
    own_N, next_N, views = data.history.events["category"][index_N], data.category_N[index_N], examples.views_M[at]
    hashes_V = np.setdiff1d(np.concatenate([own_N, next_N]), [0])

    def place(hash_: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(hashes_V, hash_), len(hashes_V) - 1)
        return np.where(hashes_V[place] == hash_, place, -1)

    filled_NK = np.arange(views["ring_category"].shape[1]) < views["n"][:, None]
    split_N, anchor_N = data.split_N[index_N], data.anchor_N[index_N]
    scored = {part: np.flatnonzero(anchor_N & (split_N == part) & (next_N != 0)) for part in (VALIDATE, TEST)}
    ring_NK = np.where(filled_NK, place(np.where(filled_NK, views["ring_category"], 0)), -1)
    user_N, ts_N = examples.user_M[at], examples.ts_M[at]
    return Stream(at, hashes_V, place(own_N), place(next_N), ring_NK, examples.learn_next_M[at], scored, user_N, ts_N)


@njit(cache=True)
def copy_ranks(base_RV, row_N, ring_NK, next_N, share_K):
    """(n,) conservative ranks of `next_N` by base_RV[row] plus share_K[k] for the k-th newest category of the ring."""
    out = np.empty(len(next_N), np.int64)
    for i in range(len(next_N)):
        score_V = base_RV[row_N[i]].copy()
        for k in range(ring_NK.shape[1]):
            if ring_NK[i, k] >= 0:
                score_V[ring_NK[i, k]] += share_K[k]
        out[i] = (score_V >= score_V[next_N[i]]).sum()
    return out


class Copy(NamedTuple):
    """A baseline that adds shares of the ring to a row of a table; the last row is of users without a category."""

    base_RV: np.ndarray
    share_K: np.ndarray

    def ranks(self, stream: Stream, at: np.ndarray) -> np.ndarray:
        row_N = stream.ring_NK[at, 0] if len(self.base_RV) > 1 else np.zeros(len(at), np.int64)
        row_N = np.where(row_N < 0, len(self.base_RV) - 1, row_N)
        return copy_ranks(self.base_RV, row_N, stream.ring_NK[at], stream.next_N[at], self.share_K)

    def shares(self, stream: Stream, at: np.ndarray) -> np.ndarray:
        """(n, V) scores, to sum 1."""
        row_N = np.where(stream.ring_NK[at, 0] < 0, len(self.base_RV) - 1, stream.ring_NK[at, 0])
        out_NV = self.base_RV[row_N].copy()
        event_J, k_J = np.nonzero(stream.ring_NK[at] >= 0)
        np.add.at(out_NV, (event_J, stream.ring_NK[at][event_J, k_J]), self.share_K[k_J])
        return out_NV / out_NV.sum(axis=1, keepdims=True)


def counted(stream: Stream) -> tuple[dict[str, Copy], str]:
    """→ the baselines that only count, and what was chosen for them on validation."""
    v, ring = len(stream.hashes_V), stream.ring_NK.shape[1]
    learned = np.flatnonzero(stream.learn_N)
    check = stream.scored[VALIDATE][:: -(-len(stream.scored[VALIDATE]) // CHECKED)]

    def popularity(part: float) -> np.ndarray:
        ts = stream.ts_N[learned]
        late = learned[ts >= ts.max() - part * (ts.max() - ts.min())]
        count_V = np.bincount(stream.next_N[late], minlength=v) + 0.01
        return count_V / count_V.sum()

    def value(copy: Copy) -> float:
        return float(metrics.ndcgs(copy.ranks(stream, check)).mean())

    popular_V, none_K = popularity(1.0), np.zeros(ring)
    recent = max((0.05, 0.2, 0.5), key=lambda part: value(Copy(popularity(part)[None], none_K)))
    first_K, place_K = np.eye(ring)[0], np.arange(ring)
    pairs_VV = np.zeros((v, v))
    came = stream.ring_NK[learned, 0]
    np.add.at(pairs_VV, (came[came >= 0], stream.next_N[learned][came >= 0]), 1.0)

    def markov(smoothing: float) -> np.ndarray:
        rows_VV = (pairs_VV + smoothing * popular_V) / (pairs_VV.sum(axis=1, keepdims=True) + smoothing)
        return np.concatenate([rows_VV, popular_V[None]])

    best, chosen = -1.0, None
    for smoothing in (20.0, 50.0, 100.0, 300.0, 1000.0):
        base_RV = markov(smoothing)
        for weight in (0.3, 0.6, 1.0, 1.5, 2.0, 3.0):
            for decay in (0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
                copy = Copy(base_RV, weight / ring * decay**place_K)
                if (now := value(copy)) > best:
                    best, chosen = now, (copy, smoothing, weight, decay)
    plain = max((10.0, 20.0, 50.0, 100.0), key=lambda smoothing: value(Copy(markov(smoothing), none_K)))
    out = {
        "popularity": Copy(popular_V[None], none_K),
        "recent popularity": Copy(popularity(recent)[None], none_K),
        "repeat last": Copy(popular_V[None] * 1e-3, first_K),
        "user frequency": Copy(popular_V[None] * 1e-3, 1.0 + 0.01 * (ring - place_K)),
        "Markov": Copy(markov(plain), none_K),
        "Markov + copy": chosen[0],
    }
    settings = f"smoothing {chosen[1]:g}, copy {chosen[2]:g}, decay {chosen[3]:g}"
    return out, f"{settings}; recent popularity: the last {recent:.0%} of training"


def next_category(
    bench: Bench, examples: Examples, table: CategoryTable, gates_MG: np.ndarray, draws: int
) -> dict[str, dict]:
    """Platform → n, users, what was chosen, models' figures with draws of NDCG@10, all and where the category changes."""
    out = {}
    for platform in WITH_CATEGORIES:
        stream = stream_of(bench, examples, platform)
        at = stream.scored[TEST]
        baselines, chosen = counted(stream)
        ranks = {name: copy.ranks(stream, at) for name, copy in baselines.items()}
        for body, title in (("gru", "GRU4Rec-like"), ("attention", "SASRec-like")):
            network = Settings(body, window=16, epochs=6, batch_events=512, rate=3e-3)
            name = _key(f"category-{platform}", network)
            both = cached(bench, name, lambda s=stream, m=baselines["Markov + copy"], n=network: _networks_ranks(s, m, n))
            ranks[title], ranks[f"{title} + Markov + copy"] = both.astype(np.int64)
        ranks["student"] = mixture_ranks(table, stream, examples, gates_MG, at)
        changed_N = stream.next_N[at] != stream.ring_NK[at, 0]
        out[platform] = {
            "n": len(at),
            "users": len(np.unique(stream.user_N[at])),
            "catalogue": len(stream.hashes_V),
            "base_rate": float(1 - changed_N.mean()),
            "in_ring": float((stream.next_N[at][:, None] == stream.ring_NK[at]).any(axis=1).mean()),
            "chosen": chosen,
            "models": ranked(ranks, stream.user_N[at], draws),
            "changed": ranked({k: r[changed_N] for k, r in ranks.items()}, stream.user_N[at][changed_N], draws),
        }
        _tell(f"next category, {platform}", {name: own["NDCG@10"] for name, own in out[platform]["models"].items()})
    return out


def mixture_ranks(table, stream: Stream, examples: Examples, gates_MG: np.ndarray, at: np.ndarray) -> np.ndarray:
    column_V = table.index_of(stream.hashes_V)
    out = []
    for start in range(0, len(at), CHUNK):
        of = stream.at[at[start : start + CHUNK]]
        p_NC = mixture(table, examples.views_M[of], examples.platform_M[of], gates_MG[of])
        scores_NV = np.where(column_V >= 0, p_NC[:, column_V], 0.0)
        out.append(metrics.ranks(scores_NV, stream.next_N[at[start : start + CHUNK]]))
    return np.concatenate(out)


def _networks_ranks(stream: Stream, markov: Copy, settings: Settings) -> np.ndarray:
    """(2, n) ranks on test of a network alone, and of its mean with Markov + copy, weighted by validation."""
    v = len(stream.hashes_V)
    check_N = np.zeros(len(stream.at), bool)
    check_N[stream.scored[VALIDATE][:: -(-len(stream.scored[VALIDATE]) // CHECKED)]] = True
    test_N = np.zeros(len(stream.at), bool)
    test_N[stream.scored[TEST]] = True
    item_N, next_N = stream.own_N + 1, stream.next_N + 1
    network = fit_next(item_N, stream.user_N, next_N, stream.learn_N, check_N, v, settings)
    weights = np.linspace(0.0, 1.0, 6)

    def all_ranks(wanted_N: np.ndarray) -> np.ndarray:
        rank_WN = np.zeros((len(weights), len(stream.at)), np.int64)
        for at, logits_NV in next_scores(network, item_N, stream.user_N, wanted_N):
            p_NV = np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True))
            p_NV /= p_NV.sum(axis=1, keepdims=True)
            counted_NV = markov.shares(stream, at)
            for w, weight in enumerate(weights):
                rank_WN[w, at] = metrics.ranks(weight * counted_NV + (1 - weight) * p_NV, stream.next_N[at])
        return rank_WN

    best = int(np.argmax([metrics.ndcgs(rank_N[check_N]).mean() for rank_N in all_ranks(check_N)]))
    rank_WN = all_ranks(test_N)[:, stream.scored[TEST]]
    note(f"{settings.body}: weight of Markov + copy {weights[best]:.1f}")
    return rank_WN[[0, best]]


def ranked(ranks: dict[str, np.ndarray], user: np.ndarray, draws: int) -> dict[str, dict]:
    """Model → FIGURES, and the draws of NDCG@10."""
    resamples = metrics.Resamples(user, draws)
    return {
        name: {title: float(figure(rank_N).mean()) for title, figure in FIGURES.items()}
        | {"NDCG@10_draws": resamples.mean(metrics.ndcgs(rank_N))}
        for name, rank_N in ranks.items()
    }


def over(cell: dict, ours: str, theirs: str, part: str = "models") -> metrics.Interval:
    """Paired difference of NDCG@10."""
    a, b = cell[part][ours], cell[part][theirs]
    return metrics.interval(a["NDCG@10"] - b["NDCG@10"], a["NDCG@10_draws"] - b["NDCG@10_draws"])


def bars(categories: dict[str, dict]) -> dict[str, dict]:
    markov = {name: over(cell, "student", "Markov + copy") for name, cell in categories.items()}
    last = {name: over(cell, "student", "repeat last") for name, cell in categories.items()}
    changed = [cell["changed"] for cell in categories.values()]
    gains = [models["student"]["NDCG@10"] / models["repeat last"]["NDCG@10"] for models in changed]
    return {
        "next category NDCG@10 − Markov + copy, each platform": bar(
            "≥ −.005",
            "≥ +.010",
            {name: list(at) for name, at in markov.items()},
            all(at.value >= -0.005 for at in markov.values()),
            all(at.value >= 0.010 for at in markov.values()),
        ),
        "next category NDCG@10 − repeat last, each platform": bar(
            "≥ +.02",
            "on events where the category changes, + 25 %",
            {name: list(at) for name, at in last.items()},
            all(at.value >= 0.02 for at in last.values()),
            min(gains) >= 1.25,
        ),
    }


# ── the binary cells: sequence models, and boosting that also sees the student's state ───────────────────────────────


def binary(bench: Bench, h_MH: np.ndarray, soft_MT: np.ndarray, draws: int) -> dict:
    """→ cells as `judge` gives them, and differences to the distilled student."""
    examples, history = bench.examples, bench.data.history
    features_MF = examples.columns.features_NF.numpy()
    both_MX = np.concatenate([features_MF, h_MH], axis=1)

    def fit(of, learn, check, row, task):
        y = examples.y_MT[of, task]
        return boosting.fit_boosting(both_MX[of[learn]], y[learn], threads=bench.threads)(both_MX[of])

    models = {
        name: [cached(bench, _key("cells", network), lambda n=network: _sequence_logits(bench, n))]
        for name, network in ON_CELLS.items()
    }
    models["boosting"] = [fixed(bench)]
    name = named("ranking-boosting_state", DISTIL, soft_MT)
    models["boosting_state"] = [cached(bench, name, lambda: by_cell(bench, fit))]
    models["distilled"] = [student(bench, "distilled", DISTIL, soft_MT)]
    cells = judge(bench, models, draws)
    against = {
        name: {figure: list(difference(cells, name, "distilled", figure)) for figure in ("auc", "log_loss")}
        for name in models
        if name != "distilled"
    }
    _tell("binary cells, AUC", {name: np.mean([c["models"][name]["auc"] for c in cells.values()]) for name in models})
    return {"cells": cells, "minus_distilled": against, "models": list(models), "platforms": len(history.platforms)}


def _sequence_logits(bench: Bench, settings: Settings) -> np.ndarray:
    history = bench.data.history
    return fit_events(bench.examples, history, len(history.platforms), len(KINDS), settings)


# ── the next item, of sessions without times ─────────────────────────────────────────────────────────────────────────


class Sessions(NamedTuple):
    """Clicks of the last sessions of a file; items 1 … V, all of the file."""

    item_N: np.ndarray
    session_N: np.ndarray
    next_N: np.ndarray
    """0: the session's last."""
    split_N: np.ndarray
    n_items: int


def read_sessions(path: Path, last: int = LAST_SESSIONS) -> Sessions:
    """Sessions in the order of the file (of dates, as one card says): 70 % train, 10 % validate, 20 % test."""
    table = pq.read_table(path)
    item_N, session_N = (table[name].to_numpy().astype(np.int64) for name in ("item", "session"))
    codes, item_N = np.unique(item_N, return_inverse=True)
    order = np.lexsort((table["pos"].to_numpy(), session_N))
    item_N, session_N = item_N[order] + 1, np.unique(session_N[order], return_inverse=True)[1]
    kept = session_N >= session_N.max() + 1 - last
    item_N, session_N = item_N[kept], session_N[kept] - session_N[kept].min()
    follows_N = np.r_[session_N[1:] == session_N[:-1], False]
    share_N = session_N / (session_N.max() + 1)
    split_N = np.where(share_N < 0.7, TRAIN, np.where(share_N < 0.8, VALIDATE, TEST))
    return Sessions(item_N, session_N, np.where(follows_N, np.roll(item_N, -1), 0), split_N, len(codes))


def next_item(bench: Bench, draws: int) -> dict[str, dict]:
    """File → n, sessions, catalogue, models' figures."""
    data = Path(os.environ.get("CROSSCURRENT_DATA") or datasets.ROOT.parent / "shared" / "data")
    out = {}
    for name in SESSIONS:
        path = data / name / "sequences.parquet"
        if not path.exists():
            note(f"{path} is not there: left out")
            continue
        sessions = read_sessions(path)
        scored_N = _some(sessions, TEST, SCORED_SESSIONS)
        at = np.flatnonzero(scored_N)
        ranks = item_baselines(sessions, at)
        for body, title in (("gru", "GRU4Rec-like"), ("attention", "SASRec-like")):
            network = Settings(body, window=10, epochs=5, batch_events=1024, rate=4e-3)
            key = _key(f"items-{name}-{LAST_SESSIONS}-{SCORED_SESSIONS}", network)
            ranks[title] = cached(bench, key, lambda s=sessions, m=scored_N, n=network: _item_ranks(s, m, n)).astype(
                np.int64
            )
        new_N = sessions.next_N[at] != sessions.item_N[at]
        out[name] = {
            "n": len(at),
            "users": len(np.unique(sessions.session_N[at])),
            "catalogue": sessions.n_items,
            "base_rate": float(1 - new_N.mean()),
            "models": ranked(ranks, sessions.session_N[at], draws),
        }
        _tell(f"next item, {name}", {model: own["NDCG@10"] for model, own in out[name]["models"].items()})
    return out


def _some(sessions: Sessions, part: int, most: int) -> np.ndarray:
    """(n,) bool: clicks with a next one of `most` random sessions of a part."""
    of = np.unique(sessions.session_N[sessions.split_N == part])
    drawn = np.random.default_rng(0).permutation(of)[:most]
    return np.isin(sessions.session_N, drawn) & (sessions.next_N > 0)


def item_baselines(sessions: Sessions, at: np.ndarray) -> dict[str, np.ndarray]:
    """Ranks of the next item by what only counts; popularity settles what they leave equal."""
    v, learn_N = sessions.n_items, sessions.split_N == TRAIN
    popular_V = np.bincount(sessions.item_N[learn_N] - 1, minlength=v) + 0.01
    popular_V = popular_V / popular_V.sum() * 1e-3
    pair_N = learn_N & (sessions.next_N > 0)
    ones = np.ones(int(pair_N.sum()))
    follows_VV = sparse.csr_matrix((ones, (sessions.item_N[pair_N] - 1, sessions.next_N[pair_N] - 1)), (v, v))
    in_SV = sparse.csr_matrix((np.ones(int(learn_N.sum())), (sessions.session_N[learn_N], sessions.item_N[learn_N] - 1)))
    in_SV.resize((in_SV.shape[0], v))
    in_SV.data[:] = 1.0
    together_VV = (in_SV.T @ in_SV).tocsr()
    size_V = np.maximum(together_VV.diagonal(), 1.0)
    together_VV = sparse.diags(1 / np.sqrt(size_V)) @ together_VV @ sparse.diags(1 / np.sqrt(size_V + 20.0))
    together_VV = together_VV.tocsr()
    together_VV.setdiag(0.0)
    scores = {
        "popularity": lambda last_N: np.zeros((len(last_N), v)),
        "repeat last": lambda last_N: (np.arange(v) == last_N[:, None]).astype(np.float64),
        "item Markov": lambda last_N: follows_VV[last_N].toarray(),
        "item kNN": lambda last_N: together_VV[last_N].toarray(),
    }
    out = {name: [] for name in scores}
    for start in range(0, len(at), 512):
        part = at[start : start + 512]
        for name, score in scores.items():
            out[name].append(metrics.ranks(score(sessions.item_N[part] - 1) + popular_V, sessions.next_N[part] - 1))
    return {name: np.concatenate(parts) for name, parts in out.items()}


def _item_ranks(sessions: Sessions, scored_N: np.ndarray, settings: Settings) -> np.ndarray:
    learn_N, check_N = (sessions.split_N == TRAIN) & (sessions.next_N > 0), _some(sessions, VALIDATE, 500)
    inputs = sessions.item_N, sessions.session_N
    network = fit_next(*inputs, sessions.next_N, learn_N, check_N, sessions.n_items, settings)
    rank_N = np.zeros(len(sessions.item_N), np.int64)
    for at, logits_NV in next_scores(network, *inputs, scored_N, batch_events=512):
        rank_N[at] = metrics.ranks(logits_NV, sessions.next_N[at] - 1)
    return rank_N[scored_N]


# ── spend ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def spend(bench: Bench, h_MH: np.ndarray, draws: int) -> dict[str, dict]:
    """Mean squared error of log1p(amount) of the user's next purchase, strictly later, in the same part of the split."""
    examples, data = bench.examples, bench.data
    x_MF = examples.columns.features_NF.numpy()
    out = {}
    for platform in SPEND:
        of = np.flatnonzero(examples.platform_M == 1 + data.history.platforms.index(platform))
        index_N = examples.index_M[of]
        events, split_N, user_N = data.history.events[index_N], data.split_N[index_N], examples.user_M[of]
        amount_N = np.log1p(_amounts()[events["price"]])
        bought_N = (events["kind"] == PURCHASE) & (events["price"] > 0)
        next_N, past_N = _next_and_past(user_N, events["ts"].astype(np.int64), bought_N, amount_N, split_N)
        use_N = data.anchor_N[index_N] & ~np.isnan(next_N)
        learn, at = np.flatnonzero(use_N & (split_N == TRAIN)), np.flatnonzero(use_N & (split_N == TEST))
        check = np.flatnonzero(use_N & (split_N == VALIDATE))
        y, mean = next_N, float(next_N[learn].mean())
        both = np.concatenate([x_MF[of], h_MH[of]], axis=1)
        sets = lgb.Dataset(x_MF[of[learn]], y[learn])
        settings = {**boosting.FIXED, "objective": "regression", "verbose": -1, "num_threads": bench.threads, "seed": 0}
        predicted = {
            "mean": np.full(len(at), mean),
            "user's mean": np.where(np.isnan(past_N[at]), mean, past_N[at]),
            "LightGBM": lgb.train({**settings, "deterministic": True}, sets, 120).predict(x_MF[of[at]]),
            "features, linear": _ridge(x_MF[of], y, learn, check)[at],
            "student's features, linear": _ridge(both, y, learn, check)[at],
        }
        resamples = metrics.Resamples(user_N[at], draws)
        losses = {name: (p - y[at]) ** 2 for name, p in predicted.items()}
        against = losses["LightGBM"]
        out[platform] = {
            "n": len(at),
            "users": len(np.unique(user_N[at])),
            "base_rate": float(np.var(y[at])),
            "models": {
                name: {
                    "mse": list(metrics.interval(float(loss.mean()), resamples.mean(loss))),
                    "minus_lightgbm": list(metrics.interval(float((loss - against).mean()), resamples.mean(loss - against))),
                }
                for name, loss in losses.items()
            },
        }
        _tell(f"spend, {platform}", {name: own["mse"][0] for name, own in out[platform]["models"].items()})
    return out


def _amounts() -> np.ndarray:
    """(256,) a price for each bucket: the middle of its edges on the scale of the logarithm; 0 for none."""
    edges = np.asarray(PRICE_EDGES, np.float64)
    middles = np.sqrt(edges[1:] * edges[:-1])
    return np.r_[0.0, middles, edges[-1]]


def _next_and_past(user_N, ts_N, bought_N, amount_N, split_N) -> tuple[np.ndarray, np.ndarray]:
    """→ the amount of the first strictly later purchase in the same part of the split, the mean of those up to now; NaN
    where there is none."""
    next_N, past_N = np.full(len(ts_N), np.nan), np.full(len(ts_N), np.nan)
    starts = np.flatnonzero(np.r_[True, user_N[1:] != user_N[:-1]])
    for start, stop in zip(starts, np.r_[starts[1:], len(user_N)], strict=True):
        own = np.arange(start, stop)
        buys = own[bought_N[own]]
        if not len(buys):
            continue
        so_far = np.searchsorted(buys, own, side="right")
        mean = np.cumsum(amount_N[buys]) / np.arange(1, len(buys) + 1)
        past_N[own[so_far > 0]] = mean[so_far[so_far > 0] - 1]
        after = np.searchsorted(ts_N[buys], ts_N[own], side="right")
        there = after < len(buys)
        following = buys[after[there]]
        same = split_N[following] == split_N[own[there]]
        next_N[own[there][same]] = amount_N[following[same]]
    return next_N, past_N


def _ridge(x_NF: np.ndarray, y: np.ndarray, learn: np.ndarray, check: np.ndarray) -> np.ndarray:
    """(n,) a linear head on standardised inputs; its strength by validation."""
    mean_F, std_F = x_NF[learn].mean(axis=0), np.maximum(x_NF[learn].std(axis=0), 1e-3)
    scaled = np.clip((x_NF - mean_F) / std_F, -5, 5)
    fitted = [Ridge(alpha).fit(scaled[learn], y[learn]) for alpha in (1.0, 10.0, 100.0, 1000.0)]
    return min(fitted, key=lambda model: float(((model.predict(scaled[check]) - y[check]) ** 2).mean())).predict(scaled)


# ── interest shift ───────────────────────────────────────────────────────────────────────────────────────────────────


def shift(bench: Bench, table: CategoryTable, gates_MG: np.ndarray, draws: int) -> dict[str, dict]:
    """AUC of: the user's main category over the next 7 days is not that of the last 30."""
    examples, data = bench.examples, bench.data
    of_category, out = interest.platform_of_category(data.history), {}
    for platform in SHIFT:
        of = np.flatnonzero(examples.platform_M == 1 + data.history.platforms.index(platform))
        index_N = examples.index_M[of]
        events, split_N, anchor_N = data.history.events[index_N], data.split_N[index_N], data.anchor_N[index_N]
        y, entropy_N = shifts(examples.user_M[of], events["ts"].astype(np.int64), events["category"])
        use_N = anchor_N & ~np.isnan(y)
        learn_N = use_N & (split_N == TRAIN)
        learn, at = np.flatnonzero(learn_N), np.flatnonzero(use_N & (split_N == TEST))
        x_NF, user = examples.columns.features_NF.numpy()[of], examples.user_M[of[at]]
        mixes_NA = interest.agreement(examples.views_M[of], examples.platform_M[of], of_category)
        *_, served_N = table.predict(examples.views_M[of[at]], examples.platform_M[of[at]], gates_MG[of[at]])
        scores = {
            "served interest_shift": np.nan_to_num(served_N, nan=0.5),
            "category entropy of 30 d": entropy_N[at],
            "LightGBM": boosting.fit_boosting(x_NF[learn], y[learn], threads=bench.threads)(x_NF[at]),
            "features and mixes": interest.head(mixes_NA, x_NF, y, learn_N, examples.platform_M[of])[at],
            "LightGBM + entropy": boosting.fit_boosting(
                np.c_[x_NF, entropy_N][learn], y[learn], threads=bench.threads
            )(np.c_[x_NF, entropy_N][at]),
        }  # fmt: skip
        resamples = metrics.Resamples(user, draws)
        out[platform] = {
            "n": len(at),
            "learned": len(learn),
            "users": len(np.unique(user)),
            "base_rate": float(y[at].mean()),
            "models": {
                name: {"auc": list(metrics.interval(metrics.auc(y[at], score), resamples.auc(y[at], score)))}
                for name, score in scores.items()
            },
        }
        _tell(f"shift, {platform}", {name: own["auc"][0] for name, own in out[platform]["models"].items()})
    return out


def shifts(user_N: np.ndarray, ts_N: np.ndarray, category_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """→ (n,) 1 where the main category of (t, t + 7 d] is not that of (t − 30 d, t], NaN with fewer than LEAST_EVENTS events
    with a category in either; the entropy (nat) of the latter. Of equally frequent ones the first in time is the main."""
    y, entropy = np.full(len(ts_N), np.nan), np.full(len(ts_N), np.nan)
    starts = np.flatnonzero(np.r_[True, user_N[1:] != user_N[:-1]])
    for start, stop in zip(starts, np.r_[starts[1:], len(user_N)], strict=True):
        own = np.arange(start, stop)
        named = own[category_N[own] != 0]
        ts, category = ts_N[named], category_N[named].tolist()
        low, middle, high = (np.searchsorted(ts, ts_N[own] + days * DAY_MS, side="right") for days in (-30, 0, 7))
        for i, a, b, c in zip(own, low, middle, high, strict=True):
            if b - a < LEAST_EVENTS or c - b < LEAST_EVENTS:
                continue
            before = Counter(category[a:b])
            share = np.array(list(before.values())) / (b - a)
            entropy[i] = float(-(share * np.log(share)).sum())
            y[i] = before.most_common(1)[0][0] != Counter(category[b:c]).most_common(1)[0][0]
    return y, entropy


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(figures: dict, draws: int) -> str:
    """Markdown."""
    lines = [
        "## What comes next",
        "",
        f"One seed, {draws} draws of users (of sessions where there are no users), paired; brackets are 95 %. "
        "Ranks are over the "
        "full catalogue and conservative: what ties with the answer stands before it.",
        "",
        "### Next category",
        "",
        "Test anchors of the matrix that have a next category, strictly later. Pairs are learned from where "
        "the next category "
        "came before validation begins. Catalogue: every category that occurs on the platform. Baselines "
        "read the ring of 16 "
        "events and are tuned on validation. *student*: the served mixture of counted components with "
        "learned gates, all of it "
        "(the score names its five best). *+ Markov + copy*: weighted mean, the weight from validation; a "
        "teacher, not served.",
    ]
    for platform, cell in figures["category"].items():
        lines += [
            "",
            f"**{platform}**: {cell['n']:,} anchors of {cell['users']:,} users, {cell['catalogue']:,} categories; "
            "the next is "
            f"the last one in {cell['base_rate']:.1%}, in the ring in {cell['in_ring']:.1%}. Chosen: {cell['chosen']}.",
            "",
            "| model | HR@5 | NDCG@10 | MRR@20 | NDCG@10 where it changes | NDCG@10 − Markov + copy | … where it changes |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, own in cell["models"].items():
            values = " | ".join(f"{own[title]:.4f}" for title in FIGURES)
            both = " | ".join(brackets(over(cell, name, "Markov + copy", part)) for part in ("models", "changed"))
            lines.append(f"| {name} | {values} | {cell['changed'][name]['NDCG@10']:.4f} | {both} |")
    lines += ["", *_binary_text(figures["cells"])]
    lines += [
        "",
        "### Next item, sessions without times",
        "",
        f"The last {LAST_SESSIONS:,} sessions of each file in its order: 70 % train, 10 % validate, 20 % "
        "test; the authors' split "
        f"cannot be had. Every click that has a next one of {SCORED_SESSIONS:,} random test sessions is "
        "scored, over all items of the "
        "file. Networks: 64 wide, sampled softmax with log-Q correction, 512 negatives. The student has no item head.",
    ]
    for name, cell in figures["next_item"].items():
        lines += [
            "",
            f"**{name}**: {cell['n']:,} clicks of {cell['users']:,} sessions, {cell['catalogue']:,} items; the "
            "next is the same "
            f"item in {cell['base_rate']:.1%}.",
            "",
            "| model | HR@5 | NDCG@10 | MRR@20 | NDCG@10 − item Markov |",
            "|---|---|---|---|---|",
        ]
        for model, own in cell["models"].items():
            values = " | ".join(f"{own[title]:.4f}" for title in FIGURES)
            lines.append(f"| {model} | {values} | {brackets(over(cell, model, 'item Markov'))} |")
    lines += [
        "",
        "### Spend",
        "",
        "Mean squared error of log1p of the amount of the user's next purchase (invoice, trip), strictly "
        "later and in the same part "
        "of the split; amounts are those of the 255 price buckets. *student's features*: rolling features "
        "and the hidden state.",
    ]
    for platform, cell in figures["spend"].items():
        lines += [
            "",
            f"**{platform}**: {cell['n']:,} anchors of {cell['users']:,} users, variance {cell['base_rate']:.3f}.",
            "",
            "| model | MSE | − LightGBM |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name} | {_bracketed(own['mse'])} | {brackets(own['minus_lightgbm'])} |"
            for name, own in cell["models"].items()
        ]
    lines += [
        "",
        "### Interest shift",
        "",
        "The user's main category over the next 7 days is not that of the last 30; anchors with at least "
        f"{LEAST_EVENTS} events with "
        "a category in both. A trip or invoice is one event here, so few weeks have three, and one event "
        "decides much: report "
        "only; the bar is on the simulator. *features and mixes*: `benchmarks/interest.py`.",
    ]
    for platform, cell in figures["shift"].items():
        values = "; ".join(f"{name} {_bracketed(own['auc'])}" for name, own in cell["models"].items())
        lines += [
            "",
            f"**{platform}**: {cell['n']:,} anchors of {cell['users']:,} users ({cell['learned']:,} to learn "
            "from), base rate "
            f"{cell['base_rate']:.3f}. AUC: {values}.",
        ]
    return "\n".join(lines)


def _binary_text(binary: dict) -> list[str]:
    cells, models, against = binary["cells"], binary["models"], binary["minus_distilled"]
    lines = [
        "### Sequence models and the student's state on the binary cells",
        "",
        "GRU4Rec-like, SASRec-like and mean-pool + time MLP read raw events (item, category, kind, platform, "
        "Δt, hour, price) without "
        "rolling features, all platforms at once, the epoch by validation log-loss. *boosting_state*: fixed "
        "LightGBM on the rolling "
        "features and the distilled student's hidden state, which has seen the same labels. Anchors, users "
        "and base rates as in the "
        "main table.",
    ]
    for figure, title in (("auc", "AUC"), ("log_loss", "Log-loss")):
        lines += ["", f"| {title} | anchors | base rate | " + " | ".join(models) + " |", "|---" * (3 + len(models)) + "|"]
        for (platform, task), cell in cells.items():
            values = " | ".join(f"{cell['models'][m][figure]:.4f}" for m in models)
            lines.append(f"| {platform} {task} | {cell['n']:,} | {cell['base_rate']:.3f} | {values} |")
        means = " | ".join(f"{np.mean([c['models'][m][figure] for c in cells.values()]):.4f}" for m in models)
        apart = " | ".join(brackets(against[m][figure]) if m in against else "" for m in models)
        lines += [f"| **macro** | | | {means} |", f"| macro − distilled | | | {apart} |"]
    return lines


def brackets(at) -> str:
    point, low, high = at
    return f"{point:+.4f} [{low:+.4f}, {high:+.4f}]"


def _bracketed(at) -> str:
    point, low, high = at
    return f"{point:.4f} [{low:.4f}, {high:.4f}]"
