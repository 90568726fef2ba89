"""The main table's models: what a user would otherwise pick, the teacher, the student with and without it.

    rates · logistic regression · boosting, fixed and tuned      on the rolling features, cell by cell
    teacher                                                      the members that help on validation; own rates, too
    student, distilled                                           one network for all platforms

Each is an array of logits (M, T) of every event of a `Bench`, from the cache where it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np

from benchmarks.cells import HORIZONS_S, Bench, by_cell, cached, logit, student, student_config
from benchmarks.datasets import TASKS, TEST
from trainer import boosting
from trainer.fit import Schedule
from trainer.rates import matured_counts, rate_features
from trainer.teacher import RECURRENCE, RECURRENCE_FOLDS, Kept, Reasons, choose, mean_of, recurrence

PLAIN = RECURRENCE
"""The undistilled student's, chosen on validation: log-loss .5097; .5122 in batches of 4,096."""
DISTIL = Schedule(epochs=4, batch_events=512, rate=3e-3, soft_weight=0.9, dropout=0.1, cut=1 / 64)
"""All of it, and the last is kept. Longer is worse: what the teacher says is learned by heart, too. Chosen on validation
events of which the teacher was not asked (DECISIONS.md)."""
BASELINES = ("boosting", "boosting_tuned", "logistic")


def models_of(bench: Bench, seeds: range, trials: int) -> tuple[dict[str, list[np.ndarray]], Kept, Reasons]:
    """→ the main table's models, each a list of seeds; the teacher's members; why each was kept or dropped."""
    models = {"base_rate": [base_rate(bench)], "user_rate": [cached(bench, "user_rate", lambda: user_rate(bench))]}
    members = members_of(bench)
    models |= {"logistic": [members["logistic"]], "boosting": [fixed(bench)], "boosting_tuned": [tuned(bench, trials)]}
    kept, reasons = choose(bench.examples, members)
    models["teacher"] = [mean_of(members, kept, bench.examples.platform_M)]
    models["student"] = [student(bench, "student", PLAIN._replace(seed=s)) for s in seeds]
    soft_MT = heard(bench, models["teacher"][0])
    models["distilled"] = [student(bench, "distilled", DISTIL._replace(seed=s), soft_MT) for s in seeds]
    return models, kept, reasons


def members_of(bench: Bench) -> dict[str, np.ndarray]:
    """The teacher's members, as the trainer has them (`trainer/teacher.py`) but for the transformer: logits (M, T), out of
    fold where they were learned from. Trees and the recurrence look at the user's own matured rates, too."""
    examples = replace(bench.examples, own_MR=rate_features(*own_counts(bench)))
    with_rates_MX = np.concatenate([examples.columns.features_NF.numpy(), examples.own_MR], axis=1)

    def said_by_recurrence() -> np.ndarray:
        return recurrence(student_config(bench.data))(examples, np.empty(0)).logits_MT

    return {
        "boosting": crossed(bench, "boosting_rates", boosting.fit_boosting, with_rates_MX),
        "randomised": crossed(bench, "randomised_rates", boosting.fit_randomised, with_rates_MX),
        "logistic": crossed(bench, "logistic", boosting.fit_logistic, examples.columns.features_NF.numpy()),
        "recurrence": cached(bench, "recurrence", said_by_recurrence),
    }


def teachers_work(bench: Bench, kept: Kept) -> dict[str, int]:
    """Platform → operations of the teacher's members for one later event: multiplications and additions of networks and
    regression, and of every tree the comparisons to reach one of its leaves, were it balanced (it is not, so no fewer)."""
    examples, tasks = bench.examples, len(TASKS)
    n_features = examples.columns.features_NF.shape[1]
    config = msgspec.structs.replace(student_config(bench.data), n_features=n_features + 2 * tasks)
    path = int(np.log2(boosting.FIXED["num_leaves"]))
    out = {}
    for row, platform in enumerate(bench.data.history.platforms, start=1):
        learned_T = examples.learn_MT[examples.platform_M == row].sum(axis=0)
        trees = sum(len(boosting.bag(int(n))) for n in learned_T if n)
        of = {
            "boosting": trees * boosting.ROUNDS * path,
            "randomised": trees * boosting.RANDOMISED_ROUNDS * path,
            "logistic": 2 * n_features * int((learned_T > 0).sum()),
            "recurrence": RECURRENCE_FOLDS * config.flops_per_event(),
        }
        out[platform] = sum(of[name] for name in kept[row])
    return out


def asked(bench: Bench) -> np.ndarray:
    """(M,) bool: events of which the student hears the teacher: from the platform's first day of training to its first of
    test, whether labels are known or not, as a trainer asks of all that it has seen. The teacher itself has learned from
    the labels of the training days alone. The student's settings were chosen without the events from validation on."""
    examples, split_M = bench.examples, bench.data.split_N[bench.examples.index_M]
    out = np.zeros(len(examples), bool)
    for row in np.unique(examples.platform_M):
        of = examples.platform_M == row
        test_ms = examples.ts_M[of & (split_M == TEST)].min(initial=np.iinfo(np.int64).max)
        out |= of & (split_M != -2) & (examples.ts_M < test_ms)
    return out


def heard(bench: Bench, logits_MT: np.ndarray) -> np.ndarray:
    """(M, T) float32: what a student hears of a teacher's logits; NaN where it is not asked."""
    return np.where(asked(bench)[:, None], logits_MT, np.nan).astype(np.float32)


def base_rate(bench: Bench) -> np.ndarray:
    def fit(of, learn, check, row, task):
        return np.full(len(of), logit(bench.examples.y_MT[of[learn], task].mean()))

    return by_cell(bench, fit)


def user_rate(bench: Bench, strength: float = 5.0) -> np.ndarray:
    """The rate of the user's own anchors whose label had matured by then, pulled to the platform's."""
    hits_MT, tries_MT = own_counts(bench)

    def fit(of, learn, check, row, task):
        mean = bench.examples.y_MT[of[learn], task].mean()
        return logit((hits_MT[of, task] + strength * mean) / (tries_MT[of, task] + strength))

    return by_cell(bench, fit)


def own_counts(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """(M, T): of the user's own anchors whose label had matured, how many came true, and how many there were."""
    examples = bench.examples
    known_MT = bench.data.anchor_N[examples.index_M][:, None] & bench.data.can_NT[examples.index_M]
    horizon_ms_T = np.array([1000 * HORIZONS_S[task] for task in TASKS])
    return matured_counts(examples.user_M, examples.ts_M, examples.y_MT, known_MT, horizon_ms_T)


def crossed(bench: Bench, name: str, fit: Callable[..., boosting.Predict], inputs_MX: np.ndarray) -> np.ndarray:
    """A member of the teacher, a model a cell, out of fold on what it learned from."""

    def cell(of, learn, check, row, task):
        y, user, seeds = bench.examples.y_MT[of, task], bench.examples.user_M[of], boosting.bag(int(learn.sum()))
        return boosting.cross_fit(fit, inputs_MX[of], y, learn, user, seeds=seeds, threads=bench.threads).logit_M

    return cached(bench, name, lambda: by_cell(bench, cell))


def fixed(bench: Bench) -> np.ndarray:
    """Fixed, regularised LightGBM on the rolling features: the baseline to beat."""
    features_MF = bench.examples.columns.features_NF.numpy()

    def cell(of, learn, check, row, task):
        x, y = features_MF[of], bench.examples.y_MT[of, task]
        return boosting.fit_boosting(x[learn], y[learn], threads=bench.threads)(x)

    return cached(bench, "boosting", lambda: by_cell(bench, cell))


def tuned(bench: Bench, trials: int) -> np.ndarray:
    features_MF = bench.examples.columns.features_NF.numpy()

    def fit(of, learn, check, row, task):
        y = bench.examples.y_MT[of, task]
        x = features_MF[of]
        return boosting.fit_tuned(x[learn], y[learn], x[check], y[check], trials=trials, threads=bench.threads)(x)

    return cached(bench, f"boosting_tuned-{trials}", lambda: by_cell(bench, fit))
