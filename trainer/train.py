"""Examples → a trained model: student, tables of categories, calibration.

A major model is trained anew. A minor one keeps the incumbent's recurrence bit for bit, so that every `h` in serving
stays valid, and trains heads, tables and calibration.

Time is split once, at the *gate's start* G: everything here uses what was known at G (`trainer/examples.py`), and
`trainer/evaluate.py` then looks at the events after G, so that between an anchor trained on and an anchor judged lies at
least the horizon.

Shapes: M examples, P platforms (0: shared), T tasks.
Knows nothing of Kafka, files or the store.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from models.categories import CategoryTable
from models.config import FoldConfig
from models.events import BINARY_HEADS
from models.scorer import Model, identity_calibration
from models.student import N_GATES, Student, StudentConfig
from trainer.examples import Check, Examples, late_half
from trainer.fit import Fitted, Network, Progress, Schedule, fit, logits, of_users_with, seen

LEAST_ANCHORS, LEAST_OF_A_CLASS = 200, 20
"""A platform × head with fewer matured anchors, or fewer of either outcome, gets its base rate and no more."""
MINOR_RATE = 0.3
# Strength of the pull of a calibration towards slope 1 and offset 0, in units of information (n p (1 − p)); of one by
# users, of whom there may be a dozen with hundreds of events each, in units of independent information.
SLOPE_PRIOR, OFFSET_PRIOR = 25.0, 5.0
SLOPE_PRIOR_BY_USERS, OFFSET_PRIOR_BY_USERS = 100.0, 25.0


class Trained(NamedTuple):
    """A candidate and how it came about."""

    model: Model
    kind: str
    """`major` or `minor`."""
    examples: int
    """Events with at least one matured label that the student learned from."""
    fitted: Fitted
    network: Network
    """The student with the heads of tasks that are not served."""


def train(
    examples: Examples,
    config: StudentConfig,
    category_names: Mapping[int, str],
    fold: FoldConfig,
    schedule: Schedule,
    *,
    prior_logits_3: np.ndarray,
    incumbent: Model | None = None,
    soft_MT: np.ndarray | None = None,
    weight_M: np.ndarray | None = None,
    check: Check = lambda: None,
    progress: Progress = lambda share: None,
) -> Trained:
    """A model of `examples`. With an `incumbent` (whose student has the same `config`) a minor one: its recurrence stays
    as it is, bit for bit. `prior_logits_3`: what to say of a head of which nothing is known yet. `soft_MT`: the teacher's
    logits, NaN where it was not asked. `weight_M`: how much each example counts beside its platform's weight (None: 1).
    The same seed and examples give the same model."""
    torch.manual_seed(schedule.seed)
    if incumbent is None:
        student = Student(config, schedule.dropout)
        seen_M = seen(examples, soft_MT)
        if not seen_M.any():
            seen_M[:] = True
        student.fit_normalisation(examples.columns.features_NF.numpy()[seen_M], examples.platform_M[seen_M])
    else:
        student = copy.deepcopy(incumbent.student)
        student.gates_from_features()
    network = Network(student, len(examples.tasks), auxiliary=soft_MT is not None and schedule.way == "auxiliary")
    start_at_base_rates(network, examples, anew=incumbent is None)
    if incumbent is None:
        parameters = list(network.parameters())
    else:
        network.requires_grad_(False)
        parameters = [*student.head_parameters(), network.more_weight_PXK, network.more_bias_PX]
        schedule = schedule._replace(rate=schedule.rate * MINOR_RATE)
        for parameter in parameters:
            parameter.requires_grad_(True)
    table, q_MG = category_targets(examples, category_names, len(config.platforms))
    fitted = fit(
        network, parameters, examples, q_MG, schedule, soft_MT=soft_MT, weight_M=weight_M, check=check, progress=progress
    )
    network.eval().requires_grad_(False)
    model = Model(
        version="candidate",
        config=config,
        student=student,
        categories=table,
        calibration_P32=calibrate(network, examples, prior_logits_3),
        fold=fold,
    )
    learned = examples.learn_MT.any(axis=1) | examples.learn_next_M
    return Trained(model, "major" if incumbent is None else "minor", int(learned.sum()), fitted, network)


@torch.no_grad()
def start_at_base_rates(network: Network, examples: Examples, anew: bool = True) -> None:
    """Biases of the heads: the shared one is the pooled base rate's logit, a platform's own what differs from it. Not
    `anew`: of the heads that are not served only."""
    served = len(BINARY_HEADS)
    tasks = len(examples.tasks)
    for head in range(network.more_bias_PX.shape[1] + served):
        if head < served and not anew:
            continue
        bias_PO = network.student.head_bias_PO if head < served else network.more_bias_PX
        column = head if head < served else head - served
        task = head if head < tasks else head - tasks
        for row in range(len(bias_PO)):
            of_row = examples.learn_MT[:, task] & ((examples.platform_M == row) if row else True)
            y = examples.y_MT[of_row, task]
            logit = float(_logit((y.sum() + 1.0) / (len(y) + 2.0)))
            shared = float(bias_PO[0, column]) if row else 0.0
            bias_PO[row, column] = (logit - shared) if len(y) >= LEAST_ANCHORS or not row else 0.0


def _logit(p: float) -> float:
    return np.log(p / (1.0 - p))


def category_targets(
    examples: Examples, names: Mapping[int, str], n_platforms: int
) -> tuple[CategoryTable | None, np.ndarray]:
    """→ the table of all pairs; (M, 7): what each component gives to the category that came next. A user's q are from a
    table counted on the other half of the users, as in serving nobody's future is in the table."""
    q_MG = np.zeros((len(examples), N_GATES), np.float32)
    if not examples.next_M.any():
        return None, q_MG
    half_M = examples.user_M % 2 == 0
    for own_M in (half_M, ~half_M):
        table = _count(examples, ~own_M, names, n_platforms)
        views = examples.views_M[own_M]
        q_MG[own_M] = table.q_target(views, examples.platform_M[own_M], examples.next_M[own_M])
    return _count(examples, np.ones(len(examples), bool), names, n_platforms), q_MG


def _count(examples: Examples, of_M: np.ndarray, names: Mapping[int, str], n_platforms: int) -> CategoryTable:
    return CategoryTable.from_counts(
        examples.category_M[of_M], examples.next_M[of_M], examples.platform_M[of_M], names, n_platforms
    )


# ── calibration ──────────────────────────────────────────────────────────────────────────────────────────────────────


def calibrate(network: Network, examples: Examples, prior_logits_3: np.ndarray) -> np.ndarray:
    """(P + 1, 3, 2) float32: slope and offset on the logits.

    How much to trust a logit (the slope) only users can say whom the student did not learn from. How often something
    happens of late (the offset) all users say, over the later half of what had matured: those held out may be a dozen.
    Row 0 is fitted on all platforms and is what a platform's own slope is pulled to; a platform of which nothing has
    matured is calibrated as all of them together. A head of which too little has matured anywhere says the base rate
    (slope 0), itself pulled to the prior's.
    """
    calibration_P32 = identity_calibration(len(network.student.config.platforms))
    known_M3 = examples.learn_MT[:, : len(BINARY_HEADS)] | examples.check_MT[:, : len(BINARY_HEADS)]
    late_M3 = known_M3 & late_half(known_M3, examples.ts_M, examples.platform_M)
    at = of_users_with(examples, known_M3)
    logits_AT = logits(network, examples, at)
    platform_A, user_A = examples.platform_M[at], examples.user_M[at]
    for head in range(len(BINARY_HEADS)):
        if not _enough(examples, head, 0):
            y = examples.y_MT[known_M3[:, head], head]
            prior = 1.0 / (1.0 + np.exp(-float(prior_logits_3[head])))
            calibration_P32[:, head] = 0.0, _logit((y.sum() + 20.0 * prior) / (len(y) + 20.0))
            continue
        z_A, y_A = logits_AT[:, head], examples.y_MT[at, head]
        check_A, late_A = examples.check_MT[at, head], late_M3[at, head]
        pooled = affine(z_A[check_A], y_A[check_A], (1.0, 0.0), user_A[check_A])
        for row in range(len(calibration_P32)):
            of_A = (platform_A == row) if row else np.ones(len(at), bool)
            own_A, own_late_A = of_A & check_A, of_A & late_A
            if row and not own_late_A.any():
                calibration_P32[row, head] = calibration_P32[0, head]
                continue
            slope, _ = affine(z_A[own_A], y_A[own_A], pooled, user_A[own_A]) if row else pooled
            calibration_P32[row, head] = slope, offset(slope * z_A[own_late_A], y_A[own_late_A], user_A[own_late_A])
    return calibration_P32


def learned(examples: Examples, n_platforms: int) -> np.ndarray:
    """(P + 1, 3) bool: enough has matured of a platform × head to learn something of its own."""
    return np.array([[_enough(examples, head, row) for head in range(len(BINARY_HEADS))] for row in range(n_platforms + 1)])


def _enough(examples: Examples, head: int, row: int) -> bool:
    of_row = (examples.learn_MT[:, head] | examples.check_MT[:, head]) & ((examples.platform_M == row) if row else True)
    positives = int(examples.y_MT[of_row, head].sum())
    n = int(of_row.sum())
    return n >= LEAST_ANCHORS and min(positives, n - positives) >= LEAST_OF_A_CLASS


def affine(
    logit_A: np.ndarray, y_A: np.ndarray, towards: tuple[float, float], user_A: np.ndarray | None = None
) -> tuple[float, float]:
    """(slope ≥ 0, offset) of the regularised logistic fit of y on a logit, by Newton's method.

    `user_A`: whose events they are. A user's events err together, so that n of them are worth n over the design effect
    (Kish, Survey Sampling, 1965), and the pull is as much stronger.
    """
    x_A2 = np.stack([np.clip(logit_A, -15.0, 15.0), np.ones(len(logit_A))], axis=1).astype(np.float64)
    prior_2, strength_2 = np.array(towards, np.float64), np.array([SLOPE_PRIOR, OFFSET_PRIOR])
    if user_A is not None:
        error_A = y_A - 1.0 / (1.0 + np.exp(-x_A2 @ prior_2))
        strength_2 = design_effect(error_A, user_A) * np.array([SLOPE_PRIOR_BY_USERS, OFFSET_PRIOR_BY_USERS])
    theta_2 = prior_2.copy()
    for _ in range(25):
        p_A = 1.0 / (1.0 + np.exp(-x_A2 @ theta_2))
        gradient_2 = x_A2.T @ (p_A - y_A) + strength_2 * (theta_2 - prior_2)
        curvature_22 = (x_A2 * (p_A * (1.0 - p_A))[:, None]).T @ x_A2 + np.diag(strength_2)
        theta_2 -= np.clip(np.linalg.solve(curvature_22, gradient_2), -1.0, 1.0)
    return max(0.0, float(theta_2[0])), float(theta_2[1])


def offset(logit_A: np.ndarray, y_A: np.ndarray, user_A: np.ndarray) -> float:
    """What to add to logits so that they say as much as happened, pulled to 0 as by `affine`."""
    z_A, added = np.clip(logit_A, -15.0, 15.0).astype(np.float64), 0.0
    strength = OFFSET_PRIOR_BY_USERS * design_effect(y_A - 1.0 / (1.0 + np.exp(-z_A)), user_A)
    for _ in range(25):
        p_A = 1.0 / (1.0 + np.exp(-z_A - added))
        step = ((p_A - y_A).sum() + strength * added) / ((p_A * (1.0 - p_A)).sum() + strength)
        added -= float(np.clip(step, -1.0, 1.0))
    return added


def design_effect(error_A: np.ndarray, user_A: np.ndarray) -> float:
    """How many times the variance of a sum of errors is what it were if they were independent; at least 1."""
    _, of_A = np.unique(user_A, return_inverse=True)
    error_A = error_A - error_A.mean() if len(error_A) else error_A
    square = float((error_A**2).sum())
    return max(1.0, float((np.bincount(of_A, error_A) ** 2).sum()) / square) if square > 0.0 else 1.0
