"""The student's training loop: hard labels, what the teacher says, the next category.

    loss = mean over tasks of [(1 − w) · cross-entropy with the label + w · cross-entropy with the teacher] + categories

The gates of the categories learn from the features alone, so the body hears nothing of the next category.
A label counts where it has matured; the teacher's word counts wherever it was asked, labels or not. It goes to the serving
heads, or to auxiliary heads beside them that are dropped afterwards (`way`). The parameters' moving average is what is
kept; with `patience` the one of the epoch that did best on the examples to check by.

Shapes: M examples, T tasks (the student's three first; further ones have heads that exist while training only).
Knows nothing of histories, calibration or artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.student import N_LOGITS, Columns, Student, by_platform, linear_scan
from trainer.examples import Check, Examples, check_loss

STEPS = 160
"""Batches are made smaller than `batch_events` where there would be fewer steps than this."""
LEAST_BATCH = 512
STRANGER = 0.05
"""Share of users that an epoch shows as being on a platform that the model does not know, see `Schedule`."""
CATEGORY_WEIGHT = 0.2
WARM_UP, EMA_DECAY, WEIGHT_DECAY = 0.05, 0.99, 0.01

Progress = Callable[[float], None]
"""Told the share of the work that is done."""


class Schedule(NamedTuple):
    """How to learn."""

    epochs: int = 3
    batch_events: int = 8192
    rate: float = 3e-3
    patience: int | None = None
    """Epochs without progress on the examples to check by before it stops; None: all epochs, and the last is kept."""
    soft_weight: float = 0.9
    """w above, where the teacher was asked."""
    temperature: float = 1.0
    way: str = "serving"
    """`serving` or `auxiliary`: the heads that hear the teacher."""
    dropout: float = 0.1
    """Of a student that is made anew."""
    cut: float = 1 / 16
    """Chance, at each event, that `h` starts from zero there: one rebuilt from the ring shall be as good as a live one."""
    stranger: float = STRANGER
    """Share of users that an epoch shows as being on a platform that the model does not know."""
    seed: int = 0


class Fitted(NamedTuple):
    """How it went."""

    loss: float
    """Mean over the last epoch."""
    epochs: int
    """Epochs behind the parameters that were kept."""
    check_loss: float
    """Mean log-loss over the tasks on the examples to check by; NaN where nothing was checked."""


class Network(nn.Module):
    """A student with the heads that exist only while it learns."""

    def __init__(self, student: Student, n_tasks: int, auxiliary: bool = False) -> None:
        """`n_tasks`: T. `auxiliary`: T further heads that hear the teacher."""
        super().__init__()
        self.student = student
        self.n_tasks = n_tasks
        more = n_tasks - N_LOGITS + (n_tasks if auxiliary else 0)
        rows, _, width = student.head_weight_POK.shape
        self.more_weight_PXK = nn.Parameter(torch.zeros(rows, more, width))
        self.more_bias_PX = nn.Parameter(torch.zeros(rows, more))

    def forward(self, columns: Columns, starts_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """→ logits (N, T), gate logits (N, 7), logits that hear the teacher (N, T)."""
        x_NF, e_NE, a_NH, b_NH = self.student.encode(columns)
        z_NK = self.student.before_heads(linear_scan(a_NH, b_NH, starts_N), x_NF, e_NE)
        weight_POK, bias_PO = self.student.head_weight_POK, self.student.head_bias_PO
        logits_NT = by_platform(z_NK, columns.platform_N, weight_POK[:, :N_LOGITS], bias_PO[:, :N_LOGITS])
        on_x_PGF = weight_POK[:, N_LOGITS:, self.student.config.head_width :]
        gates_NG = by_platform(x_NF, columns.platform_N, on_x_PGF, bias_PO[:, N_LOGITS:])
        if not self.more_bias_PX.shape[1]:
            return logits_NT, gates_NG, logits_NT
        more_NX = by_platform(z_NK, columns.platform_N, self.more_weight_PXK, self.more_bias_PX)
        extra = self.n_tasks - N_LOGITS
        logits_NT = torch.cat([logits_NT, more_NX[:, :extra]], dim=1)
        return logits_NT, gates_NG, more_NX[:, extra:] if more_NX.shape[1] > extra else logits_NT


class _Sequences(NamedTuple):
    """Users that train: the examples first … first + length − 1, cut after the last with something to learn."""

    first_U: np.ndarray
    length_U: np.ndarray


def _sequences(examples: Examples, soft_MT: np.ndarray | None) -> _Sequences:
    of_user = np.flatnonzero(np.r_[True, examples.user_M[1:] != examples.user_M[:-1]][: len(examples)])
    length_U = np.add.reduceat(seen(examples, soft_MT), of_user, dtype=np.int64) if len(of_user) else np.empty(0, np.int64)
    return _Sequences(of_user[length_U > 0], length_U[length_U > 0])


def seen(examples: Examples, soft_MT: np.ndarray | None = None) -> np.ndarray:
    """(M,) bool: events up to their user's last one to learn something from, a label or what the teacher says. What
    training counts, standardises by and predicts lies there, so that nothing later is looked at."""
    learns_M = examples.learn_MT.any(axis=1) | examples.learn_next_M
    if soft_MT is not None:
        learns_M = learns_M | ~np.isnan(soft_MT).all(axis=1)
    user_M = examples.user_M[::-1]
    # Read backwards, a user's events are seen from the first to learn from on.
    of_user_M = np.cumsum(np.r_[True, user_M[1:] != user_M[:-1]][: len(user_M)])
    latest_M = np.maximum.accumulate(np.where(learns_M[::-1], of_user_M, 0))
    return (latest_M == of_user_M)[::-1]


class _Batch(NamedTuple):
    at: np.ndarray
    starts: np.ndarray
    stranger: np.ndarray


def _epoch(
    examples: Examples, sequences: _Sequences, batch: int, schedule: Schedule, rng: np.random.Generator
) -> Iterator[_Batch]:
    """All users in random order, one after another, cut into batches wherever that falls, and now and then elsewhere."""
    if not len(sequences.first_U):
        return
    order = rng.permutation(len(sequences.first_U))
    first_U, length_U = sequences.first_U[order], sequences.length_U[order]
    at_M = np.repeat(first_U - np.r_[0, np.cumsum(length_U)[:-1]], length_U) + np.arange(length_U.sum())
    begins_M = np.zeros(len(at_M), bool)
    begins_M[np.r_[0, np.cumsum(length_U)[:-1]]] = True
    starts_M = begins_M | examples.starts_M[at_M] | (rng.random(len(at_M)) < schedule.cut)
    stranger_M = np.repeat(rng.random(len(order)) < schedule.stranger, length_U)
    for start in range(0, len(at_M), batch):
        part = slice(start, start + batch)
        starts = starts_M[part].copy()
        starts[0] = True
        yield _Batch(at_M[part], starts, stranger_M[part])


class _Targets(NamedTuple):
    y_MT: Tensor
    learn_MT: Tensor
    q_MG: Tensor
    learn_next_M: Tensor
    soft_MT: Tensor | None
    """The teacher's probabilities at the temperature; 0 where it was not asked."""
    asked_MT: Tensor | None
    weight_M: Tensor | None


def fit(
    network: Network,
    parameters: list[Tensor],
    examples: Examples,
    q_MG: np.ndarray,
    schedule: Schedule,
    *,
    soft_MT: np.ndarray | None = None,
    weight_M: np.ndarray | None = None,
    check: Check = lambda: None,
    progress: Progress = lambda share: None,
) -> Fitted:
    """Trains `parameters` and leaves what is kept of them in the network. `q_MG`: what each component of the category
    mixture gives to the category that came next. `soft_MT`: the teacher's logits, NaN where it was not asked. `weight_M`:
    how much each example counts beside its platform's weight (None: 1). The same seed, examples and parameters give the
    same result."""
    rng = np.random.default_rng(schedule.seed)
    sequences = _sequences(examples, soft_MT)
    total = int(sequences.length_U.sum()) * schedule.epochs
    batch = int(np.clip(total // STEPS, LEAST_BATCH, max(LEAST_BATCH, schedule.batch_events)))
    steps = max(1, schedule.epochs * -(-(total // schedule.epochs) // batch))
    optimiser = optimiser_of(parameters)
    average = [p.detach().clone() for p in parameters]
    weight_P = torch.from_numpy(platform_weights(examples, len(network.student.config.platforms)))
    targets = _targets(examples, q_MG, soft_MT, weight_M, schedule.temperature)
    best, best_epoch, best_loss = None, 0, float("inf")
    step, losses = 0, []
    for epoch in range(1, schedule.epochs + 1):
        network.train()
        losses = []
        for part in _epoch(examples, sequences, batch, schedule, rng):
            check()
            loss = _loss(network, examples.columns, targets, weight_P, part, schedule)
            optimiser.zero_grad()
            loss.backward(inputs=parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            cosine = 0.05 + 0.475 * (1.0 + np.cos(np.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate * cosine * min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
            optimiser.step()
            step += 1
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            for mean, parameter in zip(average, parameters, strict=True):
                mean.lerp_(parameter.detach(), 1.0 - decay)
            losses.append(loss.detach())
            progress(min(1.0, step / steps))
        if schedule.patience is not None:
            checked = _average_loss(network, parameters, average, examples)
            if not checked >= best_loss:
                best, best_epoch, best_loss = [mean.clone() for mean in average], epoch, checked
            elif epoch - best_epoch >= schedule.patience:
                break
    put(parameters, best or average)
    mean_loss = float(torch.stack(losses).mean()) if losses else float("nan")
    return Fitted(mean_loss, best_epoch or schedule.epochs, best_loss if best else float("nan"))


@torch.no_grad()
def put(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _average_loss(network: Network, parameters: list[Tensor], average: list[Tensor], examples: Examples) -> float:
    """Mean over platform × task of the log-loss of the moving average on the examples to check by."""
    present = [parameter.detach().clone() for parameter in parameters]
    put(parameters, average)
    at = of_users_with(examples, examples.check_MT)
    logits_MT = np.full(examples.y_MT.shape, np.nan, np.float32)
    logits_MT[at] = logits(network, examples, at)
    put(parameters, present)
    return check_loss(examples, logits_MT)


def of_users_with(examples: Examples, mask_MT: np.ndarray) -> np.ndarray:
    """(A,) all examples of the users with something in the mask: `h` needs what came before."""
    has_U = np.zeros(int(examples.user_M.max(initial=-1)) + 1, bool)
    has_U[examples.user_M[mask_MT.any(axis=1)]] = True
    return np.flatnonzero(has_U[examples.user_M])


@torch.inference_mode()
def logits(network: Network, examples: Examples, at: np.ndarray) -> np.ndarray:
    """(A, T) float32 logits of whole sequences of users."""
    network.eval()
    out = [np.empty((0, network.n_tasks), np.float32)]
    user_A = examples.user_M[at]
    new_A = np.r_[True, user_A[1:] != user_A[:-1]][: len(at)]
    begins = np.flatnonzero(new_A)
    users_a_batch = max(1, len(begins) * 16_384 // max(len(at), 1))
    for start, stop in pairwise([*begins[::users_a_batch].tolist(), len(at)]):
        part = torch.from_numpy(at[start:stop])
        own = Columns(*(column[part] for column in examples.columns))
        starts = torch.from_numpy(new_A[start:stop] | examples.starts_M[at[start:stop]])
        out.append(network(own, starts)[0].numpy())
    return np.concatenate(out)


def _targets(
    examples: Examples, q_MG: np.ndarray, soft_MT: np.ndarray | None, weight_M: np.ndarray | None, temperature: float
) -> _Targets:
    soft = asked = None
    if soft_MT is not None:
        asked = torch.from_numpy(~np.isnan(soft_MT))
        soft = torch.sigmoid(torch.from_numpy(np.nan_to_num(soft_MT).astype(np.float32)) / temperature)
    return _Targets(
        torch.from_numpy(examples.y_MT),
        torch.from_numpy(examples.learn_MT),
        torch.from_numpy(q_MG),
        torch.from_numpy(examples.learn_next_M),
        soft,
        asked,
        None if weight_M is None else torch.from_numpy(np.asarray(weight_M, np.float32)),
    )


def optimiser_of(parameters: list[Tensor]) -> torch.optim.AdamW:
    """AdamW without decay of vectors (biases, offsets)."""
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}], lr=0.0
    )


def platform_weights(examples: Examples, n_platforms: int) -> np.ndarray:
    """(P + 1,) float32: n^−½ by platform, with mean 1 over the examples: a small platform counts, but not as a large."""
    n_P = np.bincount(examples.platform_M, minlength=n_platforms + 1).astype(np.float64)
    weight_P = 1.0 / np.sqrt(np.maximum(n_P, 1.0))
    return (weight_P * n_P.sum() / max((weight_P * n_P).sum(), 1e-9)).astype(np.float32)


def _loss(
    network: Network, columns: Columns, targets: _Targets, weight_P: Tensor, part: _Batch, schedule: Schedule
) -> Tensor:
    """Mean of the tasks' weighted means over what is known, plus the categories' mixture loss."""
    at = torch.from_numpy(part.at)
    own = Columns(*(column[at] for column in columns))
    weight_N1 = weight_P[own.platform_N][:, None]
    if targets.weight_M is not None:
        weight_N1 = weight_N1 * targets.weight_M[at][:, None]
    shown_N = own.platform_N.masked_fill(torch.from_numpy(part.stranger), 0)
    logits_NT, gates_NG, hear_NT = network(own._replace(platform_N=shown_N), torch.from_numpy(part.starts))
    loss = _mean_loss(logits_NT, targets.y_MT[at], targets.learn_MT[at] * weight_N1)
    if targets.soft_MT is not None:
        t, w = schedule.temperature, schedule.soft_weight
        soft = t * t * _mean_loss(hear_NT / t, targets.soft_MT[at], targets.asked_MT[at] * weight_N1)
        loss = soft * w + (loss * (1.0 - w) if schedule.way == "serving" else loss)
    weight_N = targets.learn_next_M[at] * weight_N1[:, 0]
    log_p_N = torch.logsumexp(functional.log_softmax(gates_NG, dim=1) + torch.log(targets.q_MG[at] + 1e-6), dim=1)
    return loss - CATEGORY_WEIGHT * (log_p_N * weight_N).sum() / weight_N.sum().clamp(min=1e-6)


def _mean_loss(logits_NT: Tensor, y_NT: Tensor, weights_NT: Tensor) -> Tensor:
    losses_NT = functional.binary_cross_entropy_with_logits(logits_NT, y_NT, reduction="none")
    return ((losses_NT * weights_NT).sum(0) / weights_NT.sum(0).clamp(min=1e-6)).mean()
