"""The teacher: an ensemble that is honest about what helps, and what it says of every event, once.

    boosting, randomised trees, logistic regression (trainer/boosting.py) ─┬─► mean logit, the offset ─┬─► mean over the
    a causal transformer (trainer/transformer.py), a residual on it ◄──────┘ ──────────────────────────┤   members that
    the recurrence: the student's own network, undistilled ────────────────────────────────────────────┤   help
    a hidden Markov model of shoppers (trainer/markov.py) ─────────────────────────────────────────────┘

A member that does not lower a platform's log-loss on the examples to check by is dropped there, and the reason says so.
Trees and the recurrence also look at the user's own matured label rates, which the student's row has no place for. Of an
event that it learned from, a member says what copies say that have not seen its user; of an event that comes later it is
asked itself (`Teaching.answer`), and what it says of it cannot have been learned from its label.

Shapes: M examples, T tasks. Knows nothing of the student, the gate or Kafka.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from models.config import FoldConfig
from models.student import StudentConfig
from trainer import boosting
from trainer.examples import Check, Examples
from trainer.fit import Schedule, logits, of_users_with
from trainer.train import LEAST_ANCHORS, LEAST_OF_A_CLASS, affine, train
from trainer.transfer import subset

RECURRENCE = Schedule(epochs=10, batch_events=1024, rate=2e-3, patience=3, dropout=0.3)
"""As the undistilled student of the benchmark learns."""
RECURRENCE_FOLDS = 5

Answer = Callable[[Examples, np.ndarray, np.ndarray], np.ndarray]
"""(examples, wanted (M,) bool, offset (M, T), NaN where there is none) → logits (wanted, T). The examples' platforms are
those of the examples fitted on."""


class Member(NamedTuple):
    """One that has been fitted."""

    logits_MT: np.ndarray
    """Of the examples that it was fitted on."""
    answer: Answer
    """What it says of examples that come later."""
    offset_everywhere: bool = False
    """Its answer needs the offset of events that are not wanted, too."""


MoreMember = Callable[[Examples, np.ndarray], Member]
"""(examples, offset (M, T), NaN where there is none) → the member."""


Kept = Mapping[int, tuple[str, ...]]
"""Row of a platform → the members that speak of its events."""
Reasons = Mapping[tuple[int, str], str]
"""(row of a platform, member) → why it was kept or dropped there, with the numbers."""


class Teaching(NamedTuple):
    """What the teacher says, and what it is made of."""

    logits_MT: np.ndarray
    """float32; NaN where a platform × task is not taught."""
    members_MT: dict[str, np.ndarray]
    """Logits of every member, of dropped ones too."""
    kept: Kept
    reasons: Reasons
    answer: Callable[[Examples, np.ndarray], np.ndarray]
    """(examples, wanted (M,) bool) → logits (wanted, T) of those kept, of examples that come later."""


def teach(
    examples: Examples,
    *,
    threads: int = 1,
    more: Mapping[str, MoreMember] = {},
    margin: float = 0.0,
    check: Check = lambda: None,
) -> Teaching:
    """Fits every member and keeps those that help (`choose`, with its `margin`): trees and regression on the rolling
    features, trees on the own rates too where the examples have them, and `more`, told the mean of those."""
    fitted = _cross_fitted(examples, threads, check)
    offset_MT = _mean([member.logits_MT for member in fitted.values()])
    for name, fit in more.items():
        check()
        member = fit(examples, offset_MT)
        own_MT = np.where(np.isnan(offset_MT), np.nan, member.logits_MT).astype(np.float32)
        fitted[name] = member._replace(logits_MT=own_MT)
    members = {name: member.logits_MT for name, member in fitted.items()}
    kept, reasons = choose(examples, members, margin)
    speaking = [name for name in fitted if any(name in names for names in kept.values())]

    def answer(later: Examples, wanted_M: np.ndarray) -> np.ndarray:
        everywhere_M = np.ones(len(later), bool) if any(fitted[name].offset_everywhere for name in speaking) else wanted_M
        first = {name: fitted[name].answer(later, everywhere_M, np.empty(0)) for name in _FIRST if name in fitted}
        offset_XT = _mean([*first.values()])
        said = {
            name: first[name][wanted_M[everywhere_M]] if name in first else fitted[name].answer(later, wanted_M, offset_XT)
            for name in speaking
        }
        mean_XT = mean_of(said, kept, later.platform_M[wanted_M])
        return np.where(np.isnan(offset_XT[wanted_M[everywhere_M]]), np.nan, mean_XT)

    return Teaching(mean_of(members, kept, examples.platform_M), members, kept, reasons, answer)


class _First(NamedTuple):
    """A member that looks at one event's features."""

    fit: Callable[..., boosting.Predict]
    rates: bool
    """Beside the rolling features it sees the user's own matured label rates."""


_FIRST: dict[str, _First] = {
    "boosting": _First(boosting.fit_boosting, True),
    "randomised": _First(boosting.fit_randomised, True),
    "logistic": _First(boosting.fit_logistic, False),
}


def _inputs(examples: Examples, rates: bool, at: np.ndarray | slice = np.s_[:]) -> np.ndarray:
    features_XF = examples.columns.features_NF.numpy()[at]
    return (
        np.concatenate([features_XF, examples.own_MR[at]], axis=1) if rates and examples.own_MR is not None else features_XF
    )


def _mean(logits: list[np.ndarray]) -> np.ndarray:
    return np.mean(logits, axis=0)


def _cross_fitted(examples: Examples, threads: int, check: Check) -> dict[str, Member]:
    """The first members, a model a platform × task where there is enough to learn from."""
    logits = {name: np.full(examples.y_MT.shape, np.nan, np.float32) for name in _FIRST}
    predicts: dict[str, dict[tuple[int, int], boosting.Predict]] = {name: {} for name in _FIRST}
    for row in np.unique(examples.platform_M):
        of = np.flatnonzero(examples.platform_M == row)
        inputs = {name: _inputs(examples, first.rates, of) for name, first in _FIRST.items()}
        for task in range(len(examples.tasks)):
            y, learn = examples.y_MT[of, task], examples.learn_MT[of, task]
            n, positives = int(learn.sum()), int(y[learn].sum())
            if n < LEAST_ANCHORS or min(positives, n - positives) < LEAST_OF_A_CLASS:
                continue
            for name, x in inputs.items():
                fitted = boosting.cross_fit(
                    _FIRST[name].fit, x, y, learn, examples.user_M[of], seeds=boosting.bag(n), threads=threads, check=check
                )
                logits[name][of, task], predicts[name][int(row), task] = fitted
    return {name: Member(logits[name], _answer_of(predicts[name], first.rates)) for name, first in _FIRST.items()}


def _answer_of(predicts: Mapping[tuple[int, int], boosting.Predict], rates: bool) -> Answer:
    def answer(examples: Examples, wanted_M: np.ndarray, offset_MT: np.ndarray) -> np.ndarray:
        at = np.flatnonzero(wanted_M)
        platform_X, x_XF = examples.platform_M[at], _inputs(examples, rates, at)
        out_XT = np.full((len(x_XF), len(examples.tasks)), np.nan, np.float32)
        for (row, task), predict in predicts.items():
            own = np.flatnonzero(platform_X == row)
            if len(own):
                out_XT[own, task] = predict(x_XF[own])
        return out_XT

    return answer


def recurrence(config: StudentConfig, schedule: Schedule = RECURRENCE, check: Check = lambda: None) -> MoreMember:
    """The student's network of this configuration, taught by labels alone, as a further member: what the order of a user's
    events tells beside their counts. The mean logit of copies, each of which has not seen one of RECURRENCE_FOLDS parts of
    the users; of events learned from, the copy's that has not seen the user."""

    def told(examples: Examples) -> Examples:
        inputs_MF = np.ascontiguousarray(_inputs(examples, True), np.float32)
        return replace(examples, columns=examples.columns._replace(features_NF=torch.from_numpy(inputs_MF)))

    def fit(examples: Examples, offset_MT: np.ndarray) -> Member:
        own, fold_M = told(examples), examples.user_M * 7919 % RECURRENCE_FOLDS
        own_config = msgspec.structs.replace(config, n_features=own.columns.features_NF.shape[1])
        no_category = {"next_M": np.zeros_like(examples.next_M), "learn_next_M": np.zeros_like(examples.learn_next_M)}
        networks = []
        for fold in range(RECURRENCE_FOLDS):
            learn_MT = examples.learn_MT & (fold_M != fold)[:, None]
            trained = train(
                replace(own, learn_MT=learn_MT, **no_category), own_config, {}, FoldConfig(),
                schedule._replace(seed=schedule.seed + fold), prior_logits_3=np.zeros(3), check=check,
            )  # fmt: skip
            networks.append(trained.network)

        def said(told_examples: Examples) -> np.ndarray:
            everything = np.arange(len(told_examples))
            return np.stack([logits(network, told_examples, everything) for network in networks])

        def answer(later: Examples, wanted_M: np.ndarray, offset_XT: np.ndarray) -> np.ndarray:
            at = of_users_with(later, wanted_M[:, None])
            return said(told(subset(later, at))).mean(axis=0)[wanted_M[at]]

        said_KMT, learned_M = said(own), examples.learn_MT.any(axis=1)
        out_MT = said_KMT.mean(axis=0)
        out_MT[learned_M] = said_KMT[fold_M, np.arange(len(examples))][learned_M]
        return Member(out_MT, answer)

    return fit


def mean_of(members: Mapping[str, np.ndarray], kept: Kept, platform_M: np.ndarray) -> np.ndarray:
    """(M, T) float32: the mean logit of each event's platform's members."""
    out_MT = np.full(next(iter(members.values())).shape, np.nan, np.float32)
    for row, names in kept.items():
        own_M = platform_M == row
        out_MT[own_M] = _mean([members[name][own_M] for name in names])
    return out_MT


def choose(examples: Examples, members: Mapping[str, np.ndarray], margin: float = 0.0) -> tuple[Kept, Reasons]:
    """→ (members kept, reasons), for each platform. Begins with all of them; drops, one after another, the one whose absence
    lowers the log-loss of the mean logit most, while that does not raise it. With a `margin`, its absence must lower the
    log-loss by so many standard errors (of the difference, users resampled): where a few days of the same users are all
    there is to check by, most of what tells members apart is chance. Without examples to check by all are kept."""
    kept, reasons = {}, {}
    for row in np.unique(examples.platform_M).tolist():
        kept[row], why = _choose(examples, members, row, margin)
        reasons |= {(row, name): reason for name, reason in why.items()}
    return kept, reasons


def _choose(
    examples: Examples, members: Mapping[str, np.ndarray], row: int, margin: float
) -> tuple[tuple[str, ...], dict[str, str]]:
    kept, reasons = list(members), {}
    loss, losses_U = _loss_of_mean(examples, members, kept, row)
    if np.isnan(loss):
        return tuple(kept), dict.fromkeys(kept, "kept: there is nothing to check by")
    while len(kept) > 1:
        without = {name: _loss_of_mean(examples, members, [k for k in kept if k != name], row) for name in kept}
        # What would be gained, less what chance may have given.
        gain = {
            name: loss - other - margin * float(np.sqrt(((losses_U - others_U) ** 2).sum()))
            for name, (other, others_U) in without.items()
        }
        worst = max(gain, key=gain.__getitem__)
        if gain[worst] < 0.0:
            reasons |= {name: f"kept: log-loss {loss:.5f}, {without[name][0]:.5f} without it" for name in kept}
            break
        reasons[worst] = f"dropped: log-loss {loss:.5f}, {without[worst][0]:.5f} without it"
        loss, losses_U = without[worst]
        kept.remove(worst)
    reasons |= {name: f"kept: the best alone, log-loss {loss:.5f}" for name in kept if name not in reasons}
    return tuple(kept), reasons


def _loss_of_mean(
    examples: Examples, members: Mapping[str, np.ndarray], names: list[str], row: int
) -> tuple[float, np.ndarray]:
    """→ mean over tasks of the log-loss of the mean logit on the platform's examples to check by, once calibrated on them:
    what the student says is calibrated too, so a member is not dropped for its scale; each user's share of it (U,). NaN of
    none."""
    losses, share_U = [], np.zeros(int(examples.user_M.max(initial=-1)) + 1)
    for task in range(len(examples.tasks)):
        own = np.flatnonzero(examples.check_MT[:, task] & (examples.platform_M == row))
        z, y = np.mean([members[name][own, task] for name in names], axis=0), examples.y_MT[own, task]
        if len(own) and not np.isnan(z).any():
            user = examples.user_M[own]
            slope, offset = affine(z, y, (1.0, 0.0), user)
            losses_A = np.logaddexp(0.0, slope * z + offset) - y * (slope * z + offset)
            losses.append(float(losses_A.mean()))
            share_U += np.bincount(user, losses_A, len(share_U)) / len(own)
    return (float(np.mean(losses)), share_U / len(losses)) if losses else (float("nan"), share_U)
