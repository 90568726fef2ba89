"""Canaries: a run that trips one is worth nothing.

    shuffled labels    boosting learns nothing from them: AUC .5 on test, over shuffles
    single features    none has an AUC over .95 alone
    the future         what the replay says of a platform's events before its test is the same, byte by byte, without what
                       comes after
    replay             features folded as a worker folds them, in micro-batches of any size, are the bytes of the replay

A detector that catches nothing is no canary: each of the second and third is shown what it must catch, a column from the
future: when the label came true, and the time until the user's next event.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.cells import Bench, cells_of
from benchmarks.datasets import CELLS, TEST
from models.config import FoldConfig
from models.fold import FEATURE_NAMES, N_FEATURES, fold, fold_params
from models.state import empty_rows
from trainer import boosting, metrics
from trainer.examples import replay
from trainer.history import History

SHUFFLES = 6
MOST_ALONE = 0.95
_LARGEST_MICRO_BATCH = 1000


class Columns(NamedTuple):
    """What was made of some events of a history."""

    index_M: np.ndarray
    """(m,) places of the events."""
    features_MF: np.ndarray
    """(m, F) float32"""


def tripped(bench: Bench) -> dict[str, str]:
    """What went wrong, by canary; empty where nothing did."""
    history = bench.data.history
    whole, part = replayed(history, None), replayed(history, before_test(bench))
    wrong = shuffled(bench) | alone(bench) | looked_ahead(whole, part)
    if not looked_ahead(with_next(history, whole), with_next(history, part)):
        wrong["planted future"] = "the time until the user's next event was not caught"
    if differing(whole, live(history)):
        wrong["replay"] = "features folded in micro-batches are not the same bytes"
    folded = bench.examples.columns.features_NF.numpy()
    if differing(whole, Columns(bench.examples.index_M, folded)):
        wrong["examples"] = "the features that models see are not the replay's"
    return wrong


# ── labels that say nothing, features that say too much ──────────────────────────────────────────────────────────────


def shuffled(bench: Bench) -> dict[str, str]:
    """Cells in which boosting learns from shuffled labels."""
    examples, wrong = bench.examples, {}
    x, rng = examples.columns.features_NF.numpy(), np.random.default_rng(0)
    for (row, task), (platform, name) in zip(cells_of(bench), CELLS, strict=True):
        learn, at = np.flatnonzero(examples.learn_MT[:, task] & (examples.platform_M == row)), _test_anchors(bench, row)
        y, of_nothing = examples.y_MT[:, task], []
        for _ in range(SHUFFLES):
            predict = boosting.fit_boosting(x[learn], rng.permutation(y[learn]), seeds=(0,), threads=bench.threads)
            of_nothing.append(metrics.auc(y[at], predict(x[at])))
        low, high = around_mean(of_nothing, 0.05 / len(CELLS))
        if low > 0.5 or high < 0.5:
            wrong[f"{platform} {name} shuffled labels"] = f"AUC [{low:.3f}, {high:.3f}]"
    return wrong


def around_mean(values: list[float], alpha: float) -> tuple[float, float]:
    """The interval of the mean by Student's t. Over shuffles, not over users: what one shuffle teaches leans somewhere by
    chance, and on thousands of anchors that is significant."""
    half = float(stats.t.ppf(1 - alpha / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def alone(bench: Bench) -> dict[str, str]:
    """Features with an AUC over MOST_ALONE alone; and the cells in which when the label came true, planted, has none."""
    examples, wrong = bench.examples, {}
    features_MF = examples.columns.features_NF.numpy()
    for (row, task), (platform, name) in zip(cells_of(bench), CELLS, strict=True):
        at = _test_anchors(bench, row)
        y, came = examples.y_MT[at, task], -bench.delay_MT[at, task].astype(np.float64)
        for feature, title in enumerate(FEATURE_NAMES):
            if tells_too_much(y, features_MF[at, feature]):
                wrong[f"{platform} {name} feature {title}"] = f"AUC over {MOST_ALONE} alone"
        if not tells_too_much(y, came):
            wrong[f"{platform} {name} planted"] = "when the label came true was not caught"
    return wrong


def tells_too_much(y: np.ndarray, feature: np.ndarray) -> bool:
    """(n,), (n,)"""
    auc = metrics.auc(y, feature)
    return max(auc, 1.0 - auc) > MOST_ALONE


def _test_anchors(bench: Bench, row: int) -> np.ndarray:
    examples = bench.examples
    split_M, anchor_M = bench.data.split_N[examples.index_M], bench.data.anchor_N[examples.index_M]
    return np.flatnonzero(anchor_M & (examples.platform_M == row) & (split_M == TEST))


# ── features ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def replayed(history: History, until_ms: np.ndarray | None) -> Columns:
    """By the trainer's replay, which is given each user's events up to a moment (U,), or all."""
    found = replay(history, FoldConfig(), "cpu", until_ms=until_ms)
    return Columns(found.index_M, found.features_MF)


def live(history: History) -> Columns:
    """By the fold of serving on rows of state, in micro-batches as Kafka might hand them out."""
    n, rows, params = len(history), empty_rows(len(history.users)), fold_params(FoldConfig())
    features_NF, dt_s_N, status_N = np.empty((n, N_FEATURES), np.float32), np.empty(n, np.float32), np.empty(n, np.uint8)
    rng, start = np.random.default_rng(0), 0
    while start < n:
        part = slice(start, min(n, start + int(rng.integers(1, _LARGEST_MICRO_BATCH))))
        slots = history.user[part].astype(np.int64)
        fold(rows, slots, history.events[part], params, features_NF[part], dt_s_N[part], status_N[part])
        start = part.stop
    return Columns(np.arange(n), features_NF)


def with_next(history: History, columns: Columns) -> Columns:
    """And one more: seconds until the user's next event of those; −1 where there is none."""
    user_M, ts_M = history.user[columns.index_M], history.events["ts"][columns.index_M]
    order = np.lexsort((ts_M, user_M))
    ahead_s = np.full(len(order), -1.0, np.float32)
    same = user_M[order[1:]] == user_M[order[:-1]]
    ahead_s[order[:-1][same]] = np.diff(ts_M[order])[same] / 1000.0
    return Columns(columns.index_M, np.column_stack([columns.features_MF, ahead_s]))


def differing(one: Columns, other: Columns) -> int:
    """Events of `other` whose features are not the same bytes in `one`, which has them all."""
    place_N = np.full(1 + max(one.index_M.max(), other.index_M.max()), -1)
    place_N[one.index_M] = np.arange(len(one.index_M))
    ours = np.ascontiguousarray(one.features_MF[place_N[other.index_M]]).view(np.uint32)
    theirs = np.ascontiguousarray(other.features_MF).view(np.uint32)
    return int((ours != theirs).any(axis=1).sum())


def looked_ahead(whole: Columns, part: Columns) -> dict[str, str]:
    """Whether events of `part`, which were all that there was, have other features in `whole`."""
    n = differing(whole, part)
    return {"the future": f"{n} events of {len(part.index_M)} have other features without what comes later"} if n else {}


def before_test(bench: Bench) -> np.ndarray:
    """(U,) ms: right before the first event of the test on the user's platform."""
    data, history = bench.data, bench.data.history
    first_P = np.full(len(history.platforms), np.iinfo(np.int64).max)
    test = data.split_N == TEST
    np.minimum.at(first_P, history.platform[test], history.events["ts"][test])
    until_U = np.empty(len(history.users), np.int64)
    until_U[history.user] = first_P[history.platform] - 1
    return until_U
