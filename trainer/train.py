"""History → a trained model: replay through the serving fold, matured labels, student, tables, calibration.

    events ─► replay (models.fold, up to the gate's start) ─► features, Δt, status, views ─┐
    labels, matured by the gate's start ───────────────────────────────────────────────────┴─► student, tables, calibration

Time is split once, at the *gate's start* G. Everything here uses only what was known at G in event time: events up to G,
labels whose horizon ended by G. `trainer/evaluate.py` then looks at the events after G, so that between an anchor
trained on and an anchor judged lies at least the horizon. A tenth of the users is held out of the student's training and
calibrates it (the later half of their time), so that calibration needs no second gap.

A major model is trained anew. A minor one keeps the incumbent's recurrence bit for bit, so that every `h` in serving
stays valid, and trains heads, tables and calibration.

Shapes: M examples (FOLDED events up to G, sorted by user, then offset), F features, P platforms (0: shared).
Knows nothing of Kafka, files or the store.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.categories import CategoryTable, view_dtype
from models.config import FoldConfig, HorizonsConfig, TrainerConfig
from models.events import BINARY_HEADS, HEADS, hash64
from models.fold import FOLDED, N_FEATURES, fold_params, starts_afresh
from models.scorer import Model, fold_with_views, identity_calibration
from models.state import empty_rows
from models.student import N_GATES, Columns, Student, StudentConfig
from trainer.history import History
from trainer.labels import Labels, horizons_ms, matured

CATEGORY = HEADS.index("category")
REPLAY_BATCH = 65_536
LEAST_ANCHORS, LEAST_OF_A_CLASS = 200, 20
"""A platform × head with fewer matured anchors, or fewer of either outcome, gets its base rate and no more."""
HELD_OUT = 10
"""One user in so many calibrates instead of training."""
STEPS = 160
"""Batches are made smaller than `batch_events` where there would be fewer steps than this."""
LEAST_BATCH = 512
CUT = 1 / 128
"""Chance, at each event, that `h` starts from zero there: it often does in serving, after a rebuild from the ring."""
STRANGER = 0.05
"""Share of users that an epoch shows as being on a platform that the model does not know."""
CATEGORY_WEIGHT = 0.2
WARM_UP, EMA_DECAY, WEIGHT_DECAY, MINOR_RATE = 0.05, 0.99, 0.01, 0.3
# Strength of the pull of a calibration towards slope 1 and offset 0, in units of information (n p (1 − p)).
SLOPE_PRIOR, OFFSET_PRIOR = 25.0, 5.0

Check = Callable[[], None]
"""Called between steps; raises to stop."""
Progress = Callable[[float], None]
"""Told the share of the work that is done."""


class Replay(NamedTuple):
    """The fold over the events up to an instant, as serving did it."""

    rows: np.ndarray
    """(U,) rows of state of the history's users, after those events; `h` is 0."""
    index_M: np.ndarray
    """Positions in the history of the events kept, ascending."""
    features_MF: np.ndarray
    dt_s_M: np.ndarray
    status_M: np.ndarray
    views_M: np.ndarray


def replay(
    history: History,
    fold: FoldConfig,
    size: str,
    *,
    until_ms: int | None = None,
    max_events: int | None = None,
    batch: int = REPLAY_BATCH,
    check: Check = lambda: None,
) -> Replay:
    """Folds the history, up to each user's first event after `until_ms` (None: all of it). However it is cut into
    batches the result is the same, byte for byte. Keeps what came of the `max_events` latest events only."""
    rows = empty_rows(len(history.users), size)
    events_N = np.flatnonzero(before(history, until_ms)) if until_ms is not None else np.arange(len(history))
    keep_N = np.ones(len(events_N), bool)
    if max_events is not None and len(events_N) > max_events:
        ts_N = history.events["ts"][events_N]
        keep_N = ts_N >= np.partition(ts_N, len(ts_N) - max_events)[len(ts_N) - max_events]
    m = int(keep_N.sum())
    out = Replay(
        rows,
        events_N[keep_N],
        np.empty((m, N_FEATURES), np.float32),
        np.empty(m, np.float32),
        np.empty(m, np.uint8),
        np.empty(m, view_dtype(size)),
    )
    scratch = Replay(
        rows,
        np.empty(0, np.int64),
        np.empty((batch, N_FEATURES), np.float32),
        np.empty(batch, np.float32),
        np.empty(batch, np.uint8),
        np.empty(batch, view_dtype(size)),
    )
    params, done = fold_params(fold), 0
    for start in range(0, len(events_N), batch):
        check()
        at = events_N[start : start + batch]
        slots, events = history.user[at].astype(np.int64), history.events[at]
        fold_with_views(rows, slots, events, params, *scratch[2:])
        kept = np.flatnonzero(keep_N[start : start + batch])
        for target, source in zip(out[2:], scratch[2:], strict=True):
            target[done : done + len(kept)] = source[kept]
        done += len(kept)
    return out


def before(history: History, until_ms: int) -> np.ndarray:
    """(n,) bool: the events of each user, in offset order, that come before his first one after `until_ms`."""
    first_U = np.full(len(history.users), len(history))
    late = np.flatnonzero(history.events["ts"] > until_ms)
    np.minimum.at(first_U, history.user[late], late)
    return np.arange(len(history)) < first_U[history.user]


def gate_start(
    history: History, labels: Labels, horizons: HorizonsConfig, fraction: float, max_events: int | None = None
) -> int | None:
    """The instant G (ms) that ends training: the latest `fraction` of the matured time of the longest horizon for which
    there is enough time to train before and to judge after. None where there is for no horizon.

    Time begins with the `max_events` latest events, and never with the earliest thousandth: a platform whose clock
    says 1970 now and then must not stretch it.
    """
    n = len(history)
    if not n:
        return None
    skipped = max(n // 1000, n - (max_events or n))
    first = int(np.partition(history.events["ts"], skipped)[skipped])
    end = int(labels.watermark_N.max())
    for horizon in sorted({int(h) for h in horizons_ms(horizons)}, reverse=True):
        span = end - horizon - first
        start = first + round((1.0 - fraction) * span)
        if start - horizon - first >= fraction * span > 0:
            return start
    return None


@dataclass
class Examples:
    """What the student learns from: M FOLDED events, sorted by user, then offset."""

    columns: Columns
    """Tensors on the CPU."""
    starts_M: np.ndarray
    """bool: `h` is zero before it (first of a user, or of a user who was idle for too long)."""
    user_M: np.ndarray
    held_out_M: np.ndarray
    """bool: of a user who calibrates."""
    ts_M: np.ndarray
    y_M3: np.ndarray
    """float32."""
    mask_M4: np.ndarray
    """bool, in the order of HEADS: matured by G, and a head that the platform can have."""
    next_M: np.ndarray
    """uint32: the next category where matured, else 0."""
    category_M: np.ndarray
    """uint32: the user's last category, the event's own included."""
    views_M: np.ndarray

    @property
    def platform_M(self) -> np.ndarray:
        return self.columns.platform_N.numpy()

    def __len__(self) -> int:
        return len(self.ts_M)


def heads_of(history: History, known: Mapping[str, tuple[str, ...]] | None, until_ms: int) -> dict[str, tuple[str, ...]]:
    """Platform → heads that it can have, for every platform of the history. `known` (the platform files) decides where
    it names a platform; for others the events up to `until_ms` do: a head is possible where its evidence occurs."""
    seen = history.events["ts"] <= until_ms
    heads = {}
    for index, platform in enumerate(history.platforms):
        own = history.events[seen & (history.platform == index)]
        possible = {
            "click": len(np.unique(own["kind"])) > 1,
            "purchase": True,  # on any platform
            "return": True,
            "category": bool((own["category"] != 0).mean() > 0.05) if len(own) else False,
        }
        derived = tuple(head for head in HEADS if possible[head])
        heads[platform] = tuple((known or {}).get(platform, derived))
    return heads


def make_examples(
    history: History, labels: Labels, replayed: Replay, config: StudentConfig, horizons: HorizonsConfig, until_ms: int
) -> Examples:
    """FOLDED events of a replay with the labels that had matured by `until_ms`."""
    folded = np.flatnonzero(replayed.status_M == FOLDED)
    folded = folded[np.argsort(history.user[replayed.index_M[folded]], kind="stable")]
    at = replayed.index_M[folded]
    events, user_M = history.events[at], history.user[at]
    platform_of = {name: i for i, name in enumerate(config.platforms, start=1)}
    platform_M = np.array([platform_of.get(name, 0) for name in history.platforms], np.int64)[history.platform[at]]
    features_MF = replayed.features_MF[folded]
    starts_M = np.r_[True, user_M[1:] != user_M[:-1]][: len(at)] | starts_afresh(features_MF, replayed.status_M[folded])
    mask_M4 = matured(_take(labels, at), events["ts"], horizons, until_ms) & config.can_have()[platform_M]
    views_M = replayed.views_M[folded]
    return Examples(
        columns=Columns.of(events, features_MF, replayed.dt_s_M[folded], platform_M),
        starts_M=starts_M,
        user_M=user_M,
        held_out_M=_held_out(history.users)[user_M],
        ts_M=events["ts"].copy(),
        y_M3=labels.y_N3[at].astype(np.float32),
        mask_M4=mask_M4,
        next_M=np.where(mask_M4[:, CATEGORY], labels.category_N[at], 0).astype(np.uint32),
        category_M=np.where(views_M["n"] > 0, views_M["ring_category"][:, 0], 0).astype(np.uint32),
        views_M=views_M,
    )


def _take(labels: Labels, at: np.ndarray) -> Labels:
    return Labels(*(column[at] for column in labels))


def _held_out(users: list[str]) -> np.ndarray:
    """(U,) bool, the same in every round: by the user's pseudonym."""
    return np.fromiter((hash64(user) % HELD_OUT == 0 for user in users), bool, len(users))


class Trained(NamedTuple):
    """A candidate and how it came about."""

    model: Model
    kind: str
    """`major` or `minor`."""
    examples: int
    """Events with at least one matured label that the student learned from."""
    loss: float
    """Mean over the last epoch."""


def train(
    examples: Examples,
    config: StudentConfig,
    category_names: Mapping[int, str],
    fold: FoldConfig,
    settings: TrainerConfig,
    *,
    prior_logits_3: np.ndarray,
    incumbent: Model | None = None,
    check: Check = lambda: None,
    progress: Progress = lambda share: None,
) -> Trained:
    """A model of `examples`. With an `incumbent` (whose student has the same `config`) a minor one: its recurrence stays
    as it is, bit for bit. `prior_logits_3`: what to say of a head of which nothing is known yet. The same seed and
    examples give the same model."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    if incumbent is None:
        student = Student(config)
        student.fit_normalisation(examples.columns.features_NF.numpy(), examples.platform_M)
        _start_at_base_rates(student, examples)
        parameters, rate = list(student.parameters()), settings.learning_rate
    else:
        student = copy.deepcopy(incumbent.student)
        student.requires_grad_(False)
        parameters, rate = student.head_parameters(), settings.learning_rate * MINOR_RATE
        for parameter in parameters:
            parameter.requires_grad_(True)
    table, q_MG = _category_targets(examples, category_names, len(config.platforms))
    loss = _fit(student, parameters, rate, examples, q_MG, settings, rng, check, progress)
    student.eval().requires_grad_(False)
    model = Model(
        version="candidate",
        config=config,
        student=student,
        categories=table,
        calibration_P32=_calibrate(student, examples, prior_logits_3),
        fold=fold,
    )
    return Trained(model, "major" if incumbent is None else "minor", int(examples.mask_M4.any(axis=1).sum()), loss)


@torch.no_grad()
def _start_at_base_rates(student: Student, examples: Examples) -> None:
    """Biases of the heads: the shared one is the pooled base rate's logit, a platform's own what differs from it."""
    for head in range(len(BINARY_HEADS)):
        for row in range(len(student.config.platforms) + 1):
            of_row = examples.mask_M4[:, head] & ((examples.platform_M == row) if row else True)
            y = examples.y_M3[of_row & ~examples.held_out_M, head]
            logit = float(_logit((y.sum() + 1.0) / (len(y) + 2.0)))
            shared = float(student.head_bias_PO[0, head]) if row else 0.0
            student.head_bias_PO[row, head] = (logit - shared) if len(y) >= LEAST_ANCHORS or not row else 0.0


def _logit(p: float) -> float:
    return np.log(p / (1.0 - p))


def _category_targets(
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


class _Sequences(NamedTuple):
    """Users that train: the examples first … first + length − 1, cut after the last with a label."""

    first_U: np.ndarray
    length_U: np.ndarray


def _sequences(examples: Examples) -> _Sequences:
    of_user = np.flatnonzero(np.r_[True, examples.user_M[1:] != examples.user_M[:-1]][: len(examples)])
    label_at_M = np.where(examples.mask_M4.any(axis=1), np.arange(len(examples)), -1)
    last_U = np.maximum.reduceat(label_at_M, of_user) if len(of_user) else np.empty(0, np.int64)
    trains_U = (last_U >= 0) & ~examples.held_out_M[of_user]
    return _Sequences(of_user[trains_U], (last_U - of_user + 1)[trains_U])


class _Batch(NamedTuple):
    at: np.ndarray
    starts: np.ndarray
    stranger: np.ndarray


def _epoch(examples: Examples, sequences: _Sequences, batch: int, rng: np.random.Generator) -> Iterator[_Batch]:
    """All users in random order, one after another, cut into batches wherever that falls, and now and then elsewhere."""
    if not len(sequences.first_U):
        return
    order = rng.permutation(len(sequences.first_U))
    first_U, length_U = sequences.first_U[order], sequences.length_U[order]
    at_M = np.repeat(first_U - np.r_[0, np.cumsum(length_U)[:-1]], length_U) + np.arange(length_U.sum())
    begins_M = np.zeros(len(at_M), bool)
    begins_M[np.r_[0, np.cumsum(length_U)[:-1]]] = True
    starts_M = begins_M | examples.starts_M[at_M] | (rng.random(len(at_M)) < CUT)
    stranger_M = np.repeat(rng.random(len(order)) < STRANGER, length_U)
    for start in range(0, len(at_M), batch):
        part = slice(start, start + batch)
        starts = starts_M[part].copy()
        starts[0] = True
        yield _Batch(at_M[part], starts, stranger_M[part])


def _fit(
    student: Student,
    parameters: list,
    rate: float,
    examples: Examples,
    q_MG: np.ndarray,
    settings: TrainerConfig,
    rng: np.random.Generator,
    check: Check,
    progress: Progress,
) -> float:
    """Trains `parameters` and leaves their moving average in the student. → mean loss of the last epoch."""
    sequences = _sequences(examples)
    total = int(sequences.length_U.sum()) * settings.epochs
    batch = int(np.clip(total // STEPS, LEAST_BATCH, settings.batch_events))
    steps = settings.epochs * -(-(total // settings.epochs) // batch)
    optimiser = _optimiser(parameters)
    warm = max(1.0, WARM_UP * steps)
    average = [p.detach().clone() for p in parameters]
    weight_P = torch.from_numpy(_platform_weights(examples, sequences, len(student.config.platforms)))
    targets = _Targets(torch.from_numpy(examples.y_M3), torch.from_numpy(examples.mask_M4), torch.from_numpy(q_MG))
    student.train()
    step, losses = 0, []
    for _ in range(settings.epochs):
        losses = []
        for part in _epoch(examples, sequences, batch, rng):
            check()
            loss = _loss(student, examples.columns, targets, weight_P, part)
            optimiser.zero_grad()
            loss.backward(inputs=parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            cosine = 0.05 + 0.475 * (1.0 + np.cos(np.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = rate * cosine * min(1.0, (step + 1) / warm)
            optimiser.step()
            step += 1
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            for mean, parameter in zip(average, parameters, strict=True):
                mean.lerp_(parameter.detach(), 1.0 - decay)
            losses.append(loss.detach())
            progress(step / steps)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    return float(torch.stack(losses).mean()) if losses else float("nan")


def _optimiser(parameters: list[Tensor]) -> torch.optim.AdamW:
    """AdamW without decay of vectors (biases, offsets)."""
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}], lr=0.0
    )


def _platform_weights(examples: Examples, sequences: _Sequences, n_platforms: int) -> np.ndarray:
    """(P + 1,) float32: n^−½ by platform, with mean 1 over the examples: a small platform counts, but not as a large."""
    n_P = np.bincount(examples.platform_M, minlength=n_platforms + 1).astype(np.float64)
    weight_P = 1.0 / np.sqrt(np.maximum(n_P, 1.0))
    return (weight_P * n_P.sum() / max((weight_P * n_P).sum(), 1e-9)).astype(np.float32)


class _Targets(NamedTuple):
    y_M3: Tensor
    mask_M4: Tensor
    q_MG: Tensor


def _loss(student: Student, columns: Columns, targets: _Targets, weight_P: Tensor, part: _Batch) -> Tensor:
    """Mean of the heads' weighted means over what is matured, plus the categories' mixture loss."""
    at = torch.from_numpy(part.at)
    own = Columns(*(column[at] for column in columns))
    weight_N1 = weight_P[own.platform_N][:, None]
    shown_N = own.platform_N.masked_fill(torch.from_numpy(part.stranger), 0)
    logits_N3, gates_NG = student(own._replace(platform_N=shown_N), torch.from_numpy(part.starts))
    weights_N4 = targets.mask_M4[at] * weight_N1
    losses_N3 = functional.binary_cross_entropy_with_logits(logits_N3, targets.y_M3[at], reduction="none")
    q_NG = targets.q_MG[at]
    log_p_N = torch.logsumexp(functional.log_softmax(gates_NG, dim=1) + torch.log(q_NG + 1e-6), dim=1)
    binary = (losses_N3 * weights_N4[:, :3]).sum(0) / weights_N4[:, :3].sum(0).clamp(min=1e-6)
    category = -(log_p_N * weights_N4[:, CATEGORY]).sum() / weights_N4[:, CATEGORY].sum().clamp(min=1e-6)
    return binary.mean() + CATEGORY_WEIGHT * category


# ── calibration ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _calibrate(student: Student, examples: Examples, prior_logits_3: np.ndarray) -> np.ndarray:
    """(P + 1, 3, 2) float32: slope and offset on the logits, fitted on the held-out users' later half.

    Row 0 is fitted on all platforms and is what a platform's own fit is pulled to. A head of which too little has
    matured anywhere says the base rate (slope 0), itself pulled to the prior's.
    """
    calibration_P32 = identity_calibration(len(student.config.platforms))
    at = np.flatnonzero(examples.held_out_M)
    logits_A3 = _logits(student, examples, at)
    late_A = examples.ts_M[at] >= (np.median(examples.ts_M) if len(examples) else 0)
    platform_A = examples.platform_M[at]
    for head in range(len(BINARY_HEADS)):
        if not _enough(examples, head, 0):
            y = examples.y_M3[examples.mask_M4[:, head], head]
            prior = 1.0 / (1.0 + np.exp(-float(prior_logits_3[head])))
            calibration_P32[:, head] = 0.0, _logit((y.sum() + 20.0 * prior) / (len(y) + 20.0))
            continue
        use_A = examples.mask_M4[at, head] & late_A
        y_A = examples.y_M3[at, head]
        pooled = _affine(logits_A3[use_A, head], y_A[use_A], (1.0, 0.0))
        calibration_P32[:, head] = pooled
        for row in range(1, len(calibration_P32)):
            own_A = use_A & (platform_A == row)
            if _enough(examples, head, row):
                calibration_P32[row, head] = _affine(logits_A3[own_A, head], y_A[own_A], pooled)
    return calibration_P32


def _enough(examples: Examples, head: int, row: int) -> bool:
    of_row = examples.mask_M4[:, head] & ((examples.platform_M == row) if row else True)
    positives = int(examples.y_M3[of_row, head].sum())
    n = int(of_row.sum())
    return n >= LEAST_ANCHORS and min(positives, n - positives) >= LEAST_OF_A_CLASS


@torch.inference_mode()
def _logits(student: Student, examples: Examples, at: np.ndarray) -> np.ndarray:
    """(A, 3) float32 logits of whole sequences of users."""
    out = [np.empty((0, len(BINARY_HEADS)), np.float32)]
    user_A = examples.user_M[at]
    new_A = np.r_[True, user_A[1:] != user_A[:-1]][: len(at)]
    begins = np.flatnonzero(new_A)
    users_a_batch = max(1, len(begins) * 16_384 // max(len(at), 1))
    for start, stop in pairwise([*begins[::users_a_batch].tolist(), len(at)]):
        part = torch.from_numpy(at[start:stop])
        own = Columns(*(column[part] for column in examples.columns))
        starts = torch.from_numpy(new_A[start:stop] | examples.starts_M[at[start:stop]])
        out.append(student(own, starts)[0].numpy())
    return np.concatenate(out)


def _affine(logit_A: np.ndarray, y_A: np.ndarray, towards: tuple[float, float]) -> tuple[float, float]:
    """(slope ≥ 0, offset) of the regularised logistic fit of y on a logit, by Newton's method."""
    x_A2 = np.stack([np.clip(logit_A, -15.0, 15.0), np.ones(len(logit_A))], axis=1).astype(np.float64)
    prior_2, strength_2 = np.array(towards, np.float64), np.array([SLOPE_PRIOR, OFFSET_PRIOR])
    theta_2 = prior_2.copy()
    for _ in range(25):
        p_A = 1.0 / (1.0 + np.exp(-x_A2 @ theta_2))
        gradient_2 = x_A2.T @ (p_A - y_A) + strength_2 * (theta_2 - prior_2)
        curvature_22 = (x_A2 * (p_A * (1.0 - p_A))[:, None]).T @ x_A2 + np.diag(strength_2)
        theta_2 -= np.clip(np.linalg.solve(curvature_22, gradient_2), -1.0, 1.0)
    return max(0.0, float(theta_2[0])), float(theta_2[1])
