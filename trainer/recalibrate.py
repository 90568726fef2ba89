"""The last word on calibration: what the gate's window says of a candidate that has passed the gate.

    ──── learned from, calibrated by ────►│ G ──── judged on ────►│ now ──── served ────►
                                          │        └─ a line on each logit ─┘

Up to G nothing later may be looked at, so that the gate can judge. What is published serves from now on, and the labels of
the gate's window are the newest that there are: a line on each platform × head's logit is fitted to them, pulled to
leaving it as it is (`trainer.train.affine`). The order of the scores stays.

The calibration that was judged stays beside the served one (`Model.judged_P32`), and a later candidate is judged against
that: with the served one an incumbent would have seen most of the labels that it is judged by.

Knows nothing of files, Kafka, or of what is good enough.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from models.events import BINARY_HEADS
from models.fold import FOLDED
from models.scorer import Model
from trainer.evaluate import Comparison, shares_of
from trainer.history import History
from trainer.train import affine, offset

_LEAST_P = 1e-6


class Line(NamedTuple):
    """What becomes of a logit: slope × logit + offset."""

    slope: float
    offset: float
    events: int
    """Of the window, with a matured label."""
    users: int


class Served(NamedTuple):
    """What is published of a candidate."""

    model: Model
    lines: dict[tuple[str, str], Line]
    """(platform, head) → line, where the window has labels of which the candidate has learned something."""
    shares: dict[tuple[str, str], list[float]]
    """As `evaluate.Report.shares`, of the model as it is served."""

    def as_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """platform → head → line, for a manifest."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        for (platform, head), line in self.lines.items():
            figures = line._asdict() | {"slope": round(line.slope, 6), "offset": round(line.offset, 6)}
            out.setdefault(platform, {})[head] = figures
        return out


def recalibrate(model: Model, history: History, compared: Comparison) -> Served:
    """The candidate of a comparison, calibrated on the window that it was judged on. Platforms and heads of which the window
    says nothing, and what is shared (row 0), stay as they are."""
    judged, paired = compared.judged, compared.paired
    calibration_P32 = model.calibration_P32.copy()
    lines, shares = {}, dict(compared.candidate.shares)
    for index, platform in enumerate(history.platforms):
        if platform not in model.config.platforms:
            continue
        row = 1 + model.config.platforms.index(platform)
        folded_N = (history.platform[judged.at] == index) & (judged.status == FOLDED)
        for head, name in enumerate(BINARY_HEADS):
            known_N = paired.known_N3[:, head] & (paired.platform_N == index)
            if not known_N.any():
                continue
            y, user = paired.y_N3[known_N, head], paired.user_N[known_N]
            line = _line(_logit(paired.candidate_N3[known_N, head]), y, user)
            lines[platform, name] = line
            calibration_P32[row, head] = _after(line, calibration_P32[row, head])
            if folded_N.any():
                logit = line.slope * _logit(judged.p_N3[folded_N, head]) + line.offset
                shares[platform, name] = shares_of(1.0 / (1.0 + np.exp(-logit)))
    return Served(replace(model, calibration_P32=calibration_P32, judged_P32=model.calibration_P32), lines, shares)


def _line(logit: np.ndarray, y: np.ndarray, user: np.ndarray) -> Line:
    slope, added = affine(logit, y, (1.0, 0.0), user)
    if slope <= 0.0:  # an inverted ranking on few users: it is not thrown away
        slope, added = 1.0, offset(logit, y, user)
    return Line(slope, added, len(y), len(np.unique(user)))


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p.astype(np.float64), _LEAST_P, 1.0 - _LEAST_P)
    return np.log(p / (1.0 - p))


def _after(line: Line, before_2: np.ndarray) -> np.ndarray:
    """(2,) the slope and offset of the line after those of `before_2`."""
    slope, added = before_2.astype(np.float64)
    return np.float32([line.slope * slope, line.slope * added + line.offset])
