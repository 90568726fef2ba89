"""Plots of the report: small SVG files beside it, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "crosscurrent",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "figure.facecolor": "white",
    }
)
from matplotlib import pyplot  # noqa: E402 (after the backend)

FOLDER = Path(__file__).resolve().parent / "plots"
BLUE, ORANGE, GREY = "#1f5fa8", "#d9731a", "#888888"


def save(figure, name: str) -> Path:
    """Writes `plots/<name>.svg` and closes the figure. → its path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def bars_of(name: str, title: str, values: Mapping[str, Sequence[float]]) -> Path:
    """A horizontal line for each label: point and interval (value, low, high)."""
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.28 * len(values)))
    point_N3 = np.array(list(values.values()), float)
    at = np.arange(len(values))[::-1]
    axes.hlines(at, point_N3[:, 1], point_N3[:, 2], color=BLUE, lw=2)
    axes.plot(point_N3[:, 0], at, "o", color=BLUE, ms=5)
    axes.axvline(0.0, color=GREY, lw=1)
    axes.set_yticks(at, list(values))
    axes.set_xlabel(title)
    return save(figure, name)


def calibration(name: str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], columns: int = 4) -> Path:
    """One panel for each label: mean predicted probability against the share that came true, in bins of equal mass."""
    rows = -(-len(curves) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(2.1 * columns, 2.0 * rows), squeeze=False)
    for axes in panels.flat[len(curves) :]:
        axes.axis("off")
    for axes, (label, (predicted_B, actual_B)) in zip(panels.flat, curves.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=GREY, lw=1)
        axes.plot(predicted_B, actual_B, "o-", color=BLUE, ms=3, lw=1)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_title(label, fontsize=8)
    figure.supxlabel("predicted")
    figure.supylabel("came true")
    return save(figure, name)
