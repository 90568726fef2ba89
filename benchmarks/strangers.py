"""Users of whom nothing was ever learned: the whole of the main table trained anew without a quarter of the users.

    users ─┬─ three quarters ─► labels, validation, what the teacher is asked of ─► baselines, teacher, student, distilled
           └─ a quarter ──────► test anchors only: judged beside the models of the main table, which know these users

In the main table a user's test events may be judged by a model that has learned from his earlier ones, as in a shop. Here
no label, no validation, no calibration and no word of the teacher is of who is judged. One seed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.baselines import BASELINES, models_of
from benchmarks.cells import Bench, Section, difference, judge, table
from benchmarks.datasets import TEST

SHARE, DRAWS = 4, 200
"""One user in so many is a stranger."""
SHOWN = ("logistic", "boosting", "boosting_tuned", "teacher", "student", "distilled")


def strangers(user_M: np.ndarray) -> np.ndarray:
    """(M,) bool: always the same users."""
    return user_M.astype(np.int64) * 7919 % 1009 % SHARE == 0


def without(bench: Bench) -> Bench:
    """The same events; of the strangers nothing is to be learned, chosen, calibrated or asked by, as all but their test lies
    before the first day of training. The others are not judged."""
    examples, data = bench.examples, bench.data
    known_M = ~strangers(examples.user_M)
    masks = {name: getattr(examples, name) & known_M[:, None] for name in ("learn_MT", "check_MT")}
    examples = replace(examples, **masks, learn_next_M=examples.learn_next_M & known_M)
    theirs_N, test_N = strangers(data.history.user), data.split_N == TEST
    right_N = theirs_N == test_N
    data = data._replace(
        split_N=np.where(theirs_N & ~test_N, -2, data.split_N).astype(data.split_N.dtype),
        anchor_N=data.anchor_N & right_N,
        uncapped_N=data.uncapped_N & right_N,
    )
    return bench._replace(examples=examples, data=data, key=f"{bench.key}-strangers{SHARE}")


def measure(bench: Bench, quick: bool) -> Section:
    """The section `strangers`."""
    trials = 4 if quick else 12
    main, _, _ = models_of(bench, range(1), trials)
    other = without(bench)
    anew, _, _ = models_of(other, range(1), trials)
    models = {name: anew[name] for name in SHOWN} | {f"{name}, knows them": main[name] for name in SHOWN}
    cells = judge(other, models, DRAWS)
    compared = {
        "distilled − best baseline": difference(cells, "distilled", BASELINES),
        "… log-loss": difference(cells, "distilled", BASELINES, "log_loss"),
        "teacher − best baseline": difference(cells, "teacher", BASELINES),
        "distilled − student": difference(cells, "distilled", "student"),
        "distilled − the main table's distilled": difference(cells, "distilled", "distilled, knows them"),
        "boosting − the main table's boosting": difference(cells, "boosting", "boosting, knows them"),
    }
    lines = [
        "## Users of whom nothing was learned",
        "",
        f"One user in {SHARE}, drawn once. Everything was trained, chosen and calibrated without them, and the teacher was "
        f"asked of none of their events; they are judged on their test anchors. One seed, {DRAWS} draws of users. AUC:",
        "",
        table(cells, list(SHOWN), "auc"),
        "",
        "| macro | point [95 %] |",
        "|---|---|",
        *(f"| {name} | {at.value:+.4f} [{at.low:+.4f}, {at.high:+.4f}] |" for name, at in compared.items()),
    ]
    figures = {"cells": cells, "compared": {name: list(at) for name, at in compared.items()}}
    return Section({}, figures, "\n".join(lines))
