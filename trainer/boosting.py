"""Gradient boosting and logistic regression on the rolling features, cell by cell (a platform × task): the baselines that
a user would otherwise pick, and members of the teacher.

Cross-fitted: what they say of an event that they would learn from is said by a copy that has not seen its user. So their
logits can be taught from, and offset a network, without teaching it to trust what was only memorised.

`fixed` and regularised boosting is LightGBM with 15 leaves, 80 rounds and L2 10, no tuning; `tuned` searches at random with
early stopping on the validation anchors, as practitioners do; `randomised` draws each split's threshold at random (extremely
randomised trees: Geurts et al., Machine Learning, 2006). Shapes: M events, F features.
Knows nothing of splits in time or networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import lightgbm as lgb
import numpy as np
from sklearn.linear_model import LogisticRegression

from trainer.examples import Check

FIXED = {
    "objective": "binary",
    "num_leaves": 15,
    "learning_rate": 0.06,
    "lambda_l2": 10.0,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.4,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
}
RANDOMISED = {**FIXED, "extra_trees": True, "feature_fraction": 0.6}
ROUNDS, RANDOMISED_ROUNDS = 80, 120
SEEDS = (0, 1)
BAG_EVENTS, MOST_BAGS = 200_000, 4
LEAST_FOLDS, MOST_FOLDS = 4, 10
_QUIET = {"verbose": -1, "max_bin": 63, "deterministic": True, "force_row_wise": True}
MAX_LOGIT = 9.2
"""Logits are clipped to ± this: a probability of 1e-4."""
_CLIP = 6.0

Predict = Callable[[np.ndarray], np.ndarray]
"""Features (M, F) → logits (M,)."""


class CrossFitted(NamedTuple):
    """A model, and what it says of the events that it was made with."""

    logit_M: np.ndarray
    """float32; out of fold where the event was learned from."""
    predict: Predict
    """The model that learned from all of them."""


def cross_fit(
    fit: Callable[..., Predict],
    features_MF: np.ndarray,
    y_M: np.ndarray,
    learn_M: np.ndarray,
    user_M: np.ndarray,
    *,
    seeds: tuple[int, ...] = SEEDS,
    threads: int = 1,
    check: Check = lambda: None,
) -> CrossFitted | None:
    """Fits one of the `fit_…` on the events of `learn_M` (bool), users whole in each of `folds`; a fold's copies are the
    mean over half of the seeds. None where only one outcome occurs."""
    if not _both(y_M[learn_M]):
        return None
    check()
    predict = fit(features_MF[learn_M], y_M[learn_M], seeds=seeds, threads=threads)
    fewer = seeds[: (len(seeds) + 1) // 2]
    parts = folds(int(learn_M.sum()))
    logit_M, fold_M = predict(features_MF), user_M * 7919 % parts
    for fold in range(parts):
        check()
        own_M, rest_M = learn_M & (fold_M == fold), learn_M & (fold_M != fold)
        if own_M.any() and _both(y_M[rest_M]):
            logit_M[own_M] = fit(features_MF[rest_M], y_M[rest_M], seeds=fewer, threads=threads)(features_MF[own_M])
    return CrossFitted(logit_M, predict)


def bag(n: int) -> tuple[int, ...]:
    """Seeds of the copies whose mean logit a member of the teacher is, where n events are learned from: of few events much
    of what one copy says is chance, and copies cost little."""
    return tuple(range(int(np.clip(BAG_EVENTS // max(n, 1), 2, MOST_BAGS))))


def folds(n: int) -> int:
    """Into how many parts the users of n events are cut: of few events a copy without a quarter of them says less than the
    model that answers later, and the student would learn from the lesser one."""
    return int(np.clip(BAG_EVENTS // max(n, 1), LEAST_FOLDS, MOST_FOLDS))


def fit_boosting(features_MF: np.ndarray, y_M: np.ndarray, *, seeds: tuple[int, ...] = SEEDS, threads: int = 1) -> Predict:
    """Fixed, regularised LightGBM; the mean logit over seeds."""
    return _fit_trees(FIXED, ROUNDS, features_MF, y_M, seeds, threads)


def fit_randomised(features_MF: np.ndarray, y_M: np.ndarray, *, seeds: tuple[int, ...] = SEEDS, threads: int = 1) -> Predict:
    """The same with random thresholds and more of the features in each tree."""
    return _fit_trees(RANDOMISED, RANDOMISED_ROUNDS, features_MF, y_M, seeds, threads)


def _fit_trees(
    settings: dict, rounds: int, features_MF: np.ndarray, y_M: np.ndarray, seeds: tuple[int, ...], threads: int
) -> Predict:
    models = [
        lgb.train({**settings, **_QUIET, "num_threads": threads, "seed": seed}, lgb.Dataset(features_MF, y_M), rounds)
        for seed in seeds
    ]
    return lambda x_NF: _mean_logit([model.predict(x_NF, raw_score=True) for model in models])


def fit_tuned(
    features_MF: np.ndarray,
    y_M: np.ndarray,
    validate_NF: np.ndarray,
    validate_y_N: np.ndarray,
    *,
    trials: int = 12,
    seed: int = 0,
    threads: int = 1,
) -> Predict:
    """The best of random settings by validation AUC, each stopped early there."""
    rng = np.random.default_rng(seed)
    best: tuple[float, lgb.Booster] | None = None
    for trial in range(trials):
        settings = {
            "objective": "binary",
            "metric": "auc",
            "learning_rate": float(rng.choice([0.03, 0.06, 0.1])),
            "num_leaves": int(rng.choice([7, 15, 31, 63])),
            "min_data_in_leaf": int(rng.choice([20, 50, 100, 300])),
            "feature_fraction": float(rng.choice([0.2, 0.4, 0.7])),
            "bagging_fraction": float(rng.choice([0.6, 0.8, 1.0])),
            "bagging_freq": 1,
            "lambda_l2": float(rng.choice([0.0, 1.0, 10.0, 50.0])),
            "seed": trial,
            "num_threads": threads,
        }
        # A data set remembers settings such as min_data_in_leaf, so each trial has its own.
        train = lgb.Dataset(features_MF, y_M)
        stop = [lgb.early_stopping(40, verbose=False)]
        valid = [train.create_valid(validate_NF, validate_y_N)]
        model = lgb.train({**_QUIET, **settings}, train, 800, valid_sets=valid, callbacks=stop)
        value = model.best_score["valid_0"]["auc"]
        if best is None or value > best[0]:
            best = value, model
    model = best[1]
    return lambda x_NF: _mean_logit([model.predict(x_NF, raw_score=True)])


def fit_logistic(features_MF: np.ndarray, y_M: np.ndarray, *, c: float = 0.03, **_: object) -> Predict:
    """L2-regularised logistic regression on standardised features, clipped to ± 6."""
    mean_F, std_F = features_MF.mean(axis=0, dtype=np.float64), features_MF.std(axis=0, dtype=np.float64)
    std_F = np.where(std_F < 1e-6, 1.0, std_F)

    def scaled(x_NF: np.ndarray) -> np.ndarray:
        return np.clip((x_NF - mean_F) / std_F, -_CLIP, _CLIP)

    model = LogisticRegression(C=c, max_iter=300).fit(scaled(features_MF), y_M)
    return lambda x_NF: _mean_logit([model.decision_function(scaled(x_NF))])


def _mean_logit(logits: list[np.ndarray]) -> np.ndarray:
    return np.clip(np.mean(logits, axis=0), -MAX_LOGIT, MAX_LOGIT).astype(np.float32)


def _both(y: np.ndarray) -> bool:
    return len(y) > 0 and y.min() < y.max()
