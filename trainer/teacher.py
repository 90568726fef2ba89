"""The teacher: an ensemble that is honest about what helps, and what it says of every event, once.

    boosting, logistic regression (trainer/boosting.py), cross-fitted ─┬─► mean logit, the offset ─┬─► mean over the members
    a causal transformer (trainer/transformer.py), a residual on it ◄──┘ ─────────────────────────┘   that help

A member that does not lower the log-loss on the examples to check by is dropped, and the reason says so. Of an event that
it learned from, boosting and regression say what copies say that have not seen its user; of an event that comes later
they are asked themselves (`Teaching.answer`), and what they say of it cannot have been learned from its label.

Shapes: M examples, T tasks. Knows nothing of the student, the gate or Kafka.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from trainer import boosting
from trainer.examples import Check, Examples, check_loss
from trainer.train import LEAST_ANCHORS, LEAST_OF_A_CLASS

Answer = Callable[[Examples, np.ndarray, np.ndarray], np.ndarray]
"""(examples, wanted (M,) bool, offset (M, T), NaN where there is none) → logits (wanted, T). The examples' platforms are
those of the examples fitted on."""


class Member(NamedTuple):
    """One that has been fitted."""

    logits_MT: np.ndarray
    """Of the examples that it was fitted on."""
    answer: Answer
    """What it says of examples that come later."""


MoreMember = Callable[[Examples, np.ndarray], Member]
"""(examples, offset (M, T), NaN where there is none) → the member."""


class Teaching(NamedTuple):
    """What the teacher says, and what it is made of."""

    logits_MT: np.ndarray
    """float32; NaN where a platform × task is not taught."""
    members_MT: dict[str, np.ndarray]
    """Logits of every member, of dropped ones too."""
    kept: tuple[str, ...]
    reasons: dict[str, str]
    """Member → why it was kept or dropped, with the numbers."""
    answer: Callable[[Examples, np.ndarray], np.ndarray]
    """(examples, wanted (M,) bool) → logits (wanted, T) of those kept, of examples that come later."""


def teach(
    examples: Examples,
    *,
    threads: int = 1,
    more: Mapping[str, MoreMember] = {},
    check: Check = lambda: None,
) -> Teaching:
    """Fits every member and keeps those that help: boosting and regression on the rolling features, boosting on the own
    rates too where the examples have them, and `more`, told the mean of those."""
    fitted = _cross_fitted(examples, threads, check)
    offset_MT = _mean([member.logits_MT for member in fitted.values()])
    for name, fit in more.items():
        check()
        member = fit(examples, offset_MT)
        own_MT = np.where(np.isnan(offset_MT), np.nan, member.logits_MT).astype(np.float32)
        fitted[name] = member._replace(logits_MT=own_MT)
    members = {name: member.logits_MT for name, member in fitted.items()}
    kept, reasons = choose(examples, members)

    def answer(later: Examples, wanted_M: np.ndarray) -> np.ndarray:
        # A further member may look at all that came before, so its offset is needed everywhere.
        everywhere_M = np.ones(len(later), bool) if set(kept) - set(_FIRST) else wanted_M
        first = {name: fitted[name].answer(later, everywhere_M, np.empty(0)) for name in _FIRST if name in fitted}
        offset_XT = _mean([*first.values()])
        said = [
            first[name][wanted_M[everywhere_M]] if name in first else fitted[name].answer(later, wanted_M, offset_XT)
            for name in kept
        ]
        return np.where(np.isnan(offset_XT[wanted_M[everywhere_M]]), np.nan, _mean(said)).astype(np.float32)

    return Teaching(_mean([members[name] for name in kept]), members, kept, reasons, answer)


class _First(NamedTuple):
    """A member that looks at one event's features."""

    fit: Callable[..., boosting.Predict]
    rates: bool
    """Beside the rolling features it sees the user's own matured label rates."""


_FIRST: dict[str, _First] = {
    "boosting": _First(boosting.fit_boosting, False),
    "logistic": _First(boosting.fit_logistic, False),
    "boosting_rates": _First(boosting.fit_boosting, True),
}


def _inputs(examples: Examples, rates: bool, at: np.ndarray) -> np.ndarray:
    features_XF = examples.columns.features_NF.numpy()[at]
    return np.concatenate([features_XF, examples.own_MR[at]], axis=1) if rates else features_XF


def _mean(logits: list[np.ndarray]) -> np.ndarray:
    return np.mean(logits, axis=0)


def _cross_fitted(examples: Examples, threads: int, check: Check) -> dict[str, Member]:
    """The first members, a model a platform × task where there is enough to learn from."""
    names = [name for name, first in _FIRST.items() if not first.rates or examples.own_MR is not None]
    logits = {name: np.full(examples.y_MT.shape, np.nan, np.float32) for name in names}
    predicts: dict[str, dict[tuple[int, int], boosting.Predict]] = {name: {} for name in names}
    for row in np.unique(examples.platform_M):
        of = np.flatnonzero(examples.platform_M == row)
        inputs = {name: _inputs(examples, _FIRST[name].rates, of) for name in names}
        for task in range(len(examples.tasks)):
            y, learn = examples.y_MT[of, task], examples.learn_MT[of, task]
            n, positives = int(learn.sum()), int(y[learn].sum())
            if n < LEAST_ANCHORS or min(positives, n - positives) < LEAST_OF_A_CLASS:
                continue
            for name, x in inputs.items():
                fitted = boosting.cross_fit(_FIRST[name].fit, x, y, learn, examples.user_M[of], threads=threads, check=check)
                logits[name][of, task], predicts[name][int(row), task] = fitted
    return {name: Member(logits[name], _answer_of(predicts[name], _FIRST[name].rates)) for name in names}


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


def choose(examples: Examples, members: Mapping[str, np.ndarray]) -> tuple[tuple[str, ...], dict[str, str]]:
    """→ (members kept, reasons). Begins with all of them; drops, one after another, the one whose absence lowers the mean
    log-loss of the mean logit most, while that does not raise it. Without examples to check by all are kept."""
    kept, reasons = list(members), {}
    loss = _loss_of_mean(examples, members, kept)
    if np.isnan(loss):
        return tuple(kept), dict.fromkeys(kept, "kept: there is nothing to check by")
    while len(kept) > 1:
        without = {name: _loss_of_mean(examples, members, [k for k in kept if k != name]) for name in kept}
        worst = min(without, key=without.__getitem__)
        if without[worst] > loss:
            reasons |= {name: f"kept: log-loss {loss:.5f}, {without[name]:.5f} without it" for name in kept}
            break
        reasons[worst] = f"dropped: log-loss {loss:.5f}, {without[worst]:.5f} without it"
        loss = without[worst]
        kept.remove(worst)
    reasons |= {name: f"kept: the best alone, log-loss {loss:.5f}" for name in kept if name not in reasons}
    return tuple(kept), reasons


def _loss_of_mean(examples: Examples, members: Mapping[str, np.ndarray], names: list[str]) -> float:
    """`check_loss` of the mean logit, where something is taught."""
    mean_MT = np.mean([members[name] for name in names], axis=0)
    return check_loss(examples, mean_MT, examples.check_MT & ~np.isnan(mean_MT))
