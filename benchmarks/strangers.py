"""Users of whom nothing was ever learned: the whole of the main table trained anew without a quarter of the users.

    users ─┬─ three quarters ─► labels, validation, what the teacher is asked of ─► baselines, teacher, student, distilled
           └─ a quarter ──────► test anchors only: judged beside the models of the main table, which know these users

In the main table a user's test events may be judged by a model that has learned from his earlier ones, as in a shop. Here
no label, no validation, no calibration and no word of the teacher is of who is judged. One seed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.baselines import BASELINES, DISTIL, PLAIN, fixed, heard, members_of, models_of, tuned
from benchmarks.cells import Bench, Section, difference, judge, student, table
from benchmarks.datasets import TEST
from trainer.teacher import choose, mean_of

SHARE, DRAWS = 4, 200
"""One user in so many is a stranger."""
SHOWN = ("logistic", "boosting", "boosting_tuned", "teacher", "student", "distilled")


def strangers(user_M: np.ndarray) -> np.ndarray:
    """(M,) bool: always the same users."""
    return user_M.astype(np.int64) * 7919 % 1009 % SHARE == 0


def without(bench: Bench) -> Bench:
    """The same events; of the strangers nothing is to be learned or chosen by, and only the others calibrate."""
    examples, data = bench.examples, bench.data
    known_M = ~strangers(examples.user_M)
    masks = {name: getattr(examples, name) & known_M[:, None] for name in ("learn_MT", "check_MT")}
    examples = replace(examples, **masks, learn_next_M=examples.learn_next_M & known_M)
    right_N = strangers(data.history.user) == (data.split_N == TEST)
    data = data._replace(anchor_N=data.anchor_N & right_N, uncapped_N=data.uncapped_N & right_N)
    return bench._replace(examples=examples, data=data, key=f"{bench.key}-strangers{SHARE}")


def trained_without(bench: Bench, trials: int) -> dict[str, np.ndarray]:
    """(M, T) logits of SHOWN; `bench` as `without` gives it."""
    members = members_of(bench)
    kept, _ = choose(bench.examples, members)
    teacher_MT = mean_of(members, kept, bench.examples.platform_M)
    soft_MT = heard(bench, teacher_MT)
    soft_MT[strangers(bench.examples.user_M)] = np.nan
    return {
        "logistic": members["logistic"],
        "boosting": fixed(bench),
        "boosting_tuned": tuned(bench, trials),
        "teacher": teacher_MT,
        "student": student(bench, "student", PLAIN),
        "distilled": student(bench, "distilled", DISTIL, soft_MT),
    }


def measure(bench: Bench, quick: bool) -> Section:
    """The section `strangers`."""
    trials = 4 if quick else 12
    main, _, _ = models_of(bench, range(1), trials)
    other = without(bench)
    models = trained_without(other, trials) | {f"{name}, knows them": main[name][0] for name in SHOWN}
    cells = judge(other, {name: [logits_MT] for name, logits_MT in models.items()}, DRAWS)
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
