"""The last word on calibration: what the gate's window says of a candidate that has passed the gate.

    ──── learned from, calibrated by ────►│ G ──── judged on ────►│ now ──── served ────►
                                          │        └─ a line on each logit ─┘

Up to G nothing later may be looked at, so that the gate can judge. What is published serves from now on, and the labels of
the gate's window are the newest that there are: a line on each platform × head's logit is fitted to them, pulled to
leaving it as it is. What has come so far of events whose label has yet to mature counts with them, where the horizon is a
day at most (`trainer/delayed.py`). The order of the scores stays.

The calibration that was judged stays beside the served one (`Model.judged_P32`), and a later candidate is judged against
that: with the served one an incumbent would have seen most of the labels that it is judged by.

Knows nothing of files, Kafka, or of what is good enough.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from models.config import HorizonsConfig
from models.events import BINARY_HEADS
from models.fold import FOLDED
from models.scorer import Model
from trainer.delayed import line, so_far
from trainer.evaluate import Comparison, shares_of
from trainer.history import History
from trainer.labels import Labels, horizons_ms
from trainer.train import offset

_LEAST_P = 1e-6


class Line(NamedTuple):
    """What becomes of a logit: slope × logit + offset."""

    slope: float
    offset: float
    events: int
    """Of the window, with a matured label."""
    users: int
    """Theirs."""
    young: int
    """Events of the window whose label has yet to mature, and of which it was counted what has come so far."""


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
        for (platform, head), found in self.lines.items():
            figures = found._asdict() | {"slope": round(found.slope, 6), "offset": round(found.offset, 6)}
            out.setdefault(platform, {})[head] = figures
        return out


class _Window(NamedTuple):
    """What there is to calibrate one platform × head by."""

    logit_N: np.ndarray
    y_N: np.ndarray
    """What has come so far."""
    come_N: np.ndarray
    """Share of what comes true that has come by now; 1 where the label has matured."""
    user_N: np.ndarray


def recalibrate(model: Model, history: History, labels: Labels, horizons: HorizonsConfig, compared: Comparison) -> Served:
    """The candidate of a comparison, calibrated on the window that it was judged on. Platforms and heads of which the window
    has no matured label, and what is shared (row 0), stay as they are. The other arguments as `evaluate.compare` had
    them."""
    judged = compared.judged
    calibration_P32 = model.calibration_P32.copy()
    lines, shares = {}, dict(compared.candidate.shares)
    for index, platform in enumerate(history.platforms):
        if platform not in model.config.platforms:
            continue
        of_N = history.platform[judged.at] == index
        for head, name in enumerate(BINARY_HEADS):
            found = _line(_window(history, labels, horizons, compared, of_N, head))
            if found is None:
                continue
            lines[platform, name] = found
            row = 1 + model.config.platforms.index(platform)
            calibration_P32[row, head] = _after(found, calibration_P32[row, head])
            logit = found.slope * _logit(judged.p_N3[of_N & (judged.status == FOLDED), head]) + found.offset
            shares[platform, name] = shares_of(1.0 / (1.0 + np.exp(-logit)))
    return Served(replace(model, calibration_P32=calibration_P32, judged_P32=model.calibration_P32), lines, shares)


def _window(
    history: History, labels: Labels, horizons: HorizonsConfig, compared: Comparison, of_N: np.ndarray, head: int
) -> _Window:
    """Of the judged events `of_N` (bool), those with a matured label, and younger ones where they can be counted."""
    judged, horizon_ms = compared.judged, horizons_ms(horizons)[head]
    picked = np.flatnonzero(of_N & compared.answered_N3[:, head])
    at = judged.at[picked]
    ts, delay = history.events["ts"][at], labels.delay_N3[at, head]
    age = labels.watermark_N[at] - ts
    y, come = so_far(delay, ts, age, horizon_ms)
    some = come > 0.0
    return _Window(_logit(judged.p_N3[picked, head])[some], y[some], come[some], history.user[at][some])


def _line(window: _Window) -> Line | None:
    matured_N = window.come_N == 1.0
    if not matured_N.any():
        return None
    slope, added = line(*window)
    if slope <= 0.0:  # an inverted ranking on few users: it is not thrown away
        slope, added = 1.0, offset(window.logit_N[matured_N], window.y_N[matured_N], window.user_N[matured_N])
    users, young = len(np.unique(window.user_N[matured_N])), int((~matured_N).sum())
    return Line(slope, added, int(matured_N.sum()), users, young)


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p.astype(np.float64), _LEAST_P, 1.0 - _LEAST_P)
    return np.log(p / (1.0 - p))


def _after(found: Line, before_2: np.ndarray) -> np.ndarray:
    """(2,) the slope and offset of the line after those of `before_2`."""
    slope, added = before_2.astype(np.float64)
    return np.float32([found.slope * slope, found.slope * added + found.offset])
