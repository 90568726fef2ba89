"""Compiles every kernel of the fold and the scorer into Numba's cache, so that no first start waits for it.

Run `python -m models.warm` once after an installation: a minute at most the first time, seconds after.
"""

from __future__ import annotations

import time

import numpy as np

from models import fold
from models.categories import CategoryTable
from models.config import FoldConfig
from models.events import EVENT, HEADS, hash32, platform_code
from models.scorer import Model, Scorer, identity_calibration
from models.state import SIZES, empty_rows
from models.student import Student, StudentConfig

_PLATFORM, _CATEGORIES = "warm", ("a", "b")
_EVENTS = 4


def warm() -> None:
    """Runs a model with random weights over a few made-up events, for every size: each kernel is called at least once."""
    fold.warm()
    for size in SIZES:
        scorer, rows, events = Scorer(_model(size), "cpu"), empty_rows(1, size), _events()
        slots = np.zeros(_EVENTS, np.int64)
        scorer.run(rows, slots, events)
        rows["h_version"] = 0  # as after a major version: the next batch rebuilds `h` from the ring
        events["offset"] += _EVENTS
        scorer.run(rows, slots, events)


def _model(size: str) -> Model:
    config = StudentConfig.of(size, fold.N_FEATURES, (_PLATFORM,), {_PLATFORM: HEADS})
    names = {hash32(name): name for name in _CATEGORIES}
    hashes = np.array(list(names), np.uint32)
    table = CategoryTable.from_counts(hashes, hashes[::-1].copy(), np.ones(2, np.int64), names, n_platforms=1)
    return Model("warm", config, Student(config).eval(), table, identity_calibration(1), FoldConfig())


def _events() -> np.ndarray:
    events = np.zeros(_EVENTS, EVENT)
    events["offset"] = events["id"] = np.arange(_EVENTS)
    events["ts"] = 60_000 * np.arange(1, _EVENTS + 1)
    events["category"] = hash32(_CATEGORIES[0])
    events["platform"] = platform_code(_PLATFORM)
    return events


if __name__ == "__main__":
    started_s = time.monotonic()
    warm()
    print(f"kernels are compiled, {time.monotonic() - started_s:.1f} s")
