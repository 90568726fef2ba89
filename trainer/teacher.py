"""The teacher: an ensemble that is honest about what helps, and what it says of every event, once.

    boosting, logistic regression (trainer/boosting.py), cross-fitted ─┬─► mean logit, the offset ─┬─► mean over the members
    a causal transformer (trainer/transformer.py), a residual on it ◄──┘ ─────────────────────────┘   that help

A member that does not lower the log-loss on the examples to check by is dropped, and the reason says so. Of an event that
it learned from, boosting and regression say what copies say that have not seen its user.

Shapes: M examples, T tasks. Knows nothing of the student, the gate or Kafka.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from trainer import boosting
from trainer.examples import Check, Examples, check_loss
from trainer.train import LEAST_ANCHORS, LEAST_OF_A_CLASS

MoreMember = Callable[[Examples, np.ndarray], np.ndarray]
"""(examples, offset (M, T), NaN where there is none) → logits (M, T)."""


class Teaching(NamedTuple):
    """What the teacher says, and what it is made of."""

    logits_MT: np.ndarray
    """float32; NaN where a platform × task is not taught."""
    members_MT: dict[str, np.ndarray]
    """Logits of every member, of dropped ones too."""
    kept: tuple[str, ...]
    reasons: dict[str, str]
    """Member → why it was kept or dropped, with the numbers."""


def teach(
    examples: Examples,
    *,
    threads: int = 1,
    more: Mapping[str, MoreMember] = {},
    check: Check = lambda: None,
) -> Teaching:
    """Fits every member and keeps those that help. `more`: further members, told the mean of the first two."""
    members = dict(zip(("boosting", "logistic"), _cross_fitted(examples, threads, check), strict=True))
    offset_MT = (members["boosting"] + members["logistic"]) / 2.0
    for name, fit in more.items():
        check()
        members[name] = np.where(np.isnan(offset_MT), np.nan, fit(examples, offset_MT)).astype(np.float32)
    kept, reasons = choose(examples, members)
    return Teaching(np.mean([members[name] for name in kept], axis=0), members, kept, reasons)


def _cross_fitted(examples: Examples, threads: int, check: Check) -> tuple[np.ndarray, np.ndarray]:
    features_MF = examples.columns.features_NF.numpy()
    out = np.full((2, *examples.y_MT.shape), np.nan, np.float32)
    for row in np.unique(examples.platform_M):
        of = np.flatnonzero(examples.platform_M == row)
        x = features_MF[of]
        for task in range(len(examples.tasks)):
            check()
            y, learn = examples.y_MT[of, task], examples.learn_MT[of, task]
            n, positives = int(learn.sum()), int(y[learn].sum())
            if n < LEAST_ANCHORS or min(positives, n - positives) < LEAST_OF_A_CLASS:
                continue
            fitted = boosting.cross_fit(x, y, learn, examples.user_M[of], threads)
            out[0, of, task], out[1, of, task] = fitted
    return out[0], out[1]


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
