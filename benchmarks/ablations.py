"""What each part of the distillation is worth: the student taught in other ways, one change at a time.

    the teacher's logits ─► student (as in the main table) ─► macro AUC and log-loss, validation and test
                            ├ temperature · weight of the soft loss · auxiliary heads · fewer events asked
                            ├ a teacher of boosting alone; a teacher whose word was shuffled across events (it must hurt)
                            ├ hints: further heads that say what each of the teacher's members says
                            ├ the teacher's word of the user's event before, kept in the row, as inputs
                            └ fusion: the mean logit of teacher and student

The main table's settings were chosen on validation; the rows here show what the choice rests on. One seed each.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import torch

from benchmarks import plots
from benchmarks.baselines import BASELINES, DISTIL, heard, members_of, models_of
from benchmarks.cells import Bench, Section, bar, cached, difference, judge, named, student, student_config
from benchmarks.datasets import TASKS, VALIDATE
from models.config import FoldConfig
from trainer.fit import logits
from trainer.train import train

DRAWS = 200


def measure(bench: Bench, quick: bool) -> Section:
    models, _, _ = models_of(bench, range(1), 4 if quick else 12)
    teacher_MT = models["teacher"][0]
    variants = {
        "as in the main table": models["distilled"],
        "no teacher": models["student"],
        **{name: [make()] for name, make in _variants(bench, teacher_MT, models["boosting"][0]).items()},
        "fusion: mean of teacher and student": [(teacher_MT + models["distilled"][0]) / 2],
        "the teacher itself": [teacher_MT],
    }
    judged = {part: judge(bench, {**models, **variants}, DRAWS, part) for part in (VALIDATE, 2)}
    rows = {name: _row(judged, name) for name in variants}
    shuffled = difference(judged[VALIDATE], "the teacher's word shuffled", "distilled")
    bars = {
        "shuffled logits lower the student's validation AUC": bar(
            "interval < 0", "–", list(shuffled), shuffled.high < 0, shuffled.high < 0
        )
    }
    plots.bars_of(
        "ablations",
        "AUC on test minus the student of the main table",
        {name: row["difference"] for name, row in rows.items() if name != "as in the main table"},
    )
    return Section(bars, rows, _text(rows))


def _variants(bench: Bench, teacher_MT: np.ndarray, boosting_MT: np.ndarray) -> dict:
    """Name → what trains it."""
    early_M = bench.data.taught_N[bench.examples.index_M]
    soft_MT, alone_MT = heard(bench, teacher_MT), heard(bench, boosting_MT)
    early_MT = np.where(early_M[:, None], teacher_MT, np.nan).astype(np.float32)
    anchors_MT = np.where(bench.examples.learn_MT, teacher_MT, np.nan).astype(np.float32)

    def variant(key: str, schedule=DISTIL, soft=soft_MT):
        return lambda: student(bench, f"ablation-{key}", schedule, soft)

    return {
        "temperature 2": variant("temperature2", DISTIL._replace(temperature=2.0)),
        "soft weight .5": variant("weight.5", DISTIL._replace(soft_weight=0.5)),
        "soft weight 1": variant("weight1", DISTIL._replace(soft_weight=1.0)),
        "auxiliary heads hear the teacher": variant("auxiliary", DISTIL._replace(way="auxiliary")),
        "not asked from the first day of validation on": variant("early", soft=early_MT),
        "asked of learned anchors only": variant("anchors", soft=anchors_MT),
        "taught by boosting alone": variant("boosting", soft=alone_MT),
        "the teacher's word shuffled": variant("shuffled", soft=_shuffled(soft_MT, bench.examples.platform_M)),
        "hints: heads for each of the teacher's members": lambda: hinted(bench, soft_MT),
        "the teacher's word of the event before as inputs": lambda: with_vector(bench, soft_MT, teacher_MT),
    }


def hinted(bench: Bench, soft_MT: np.ndarray) -> np.ndarray:
    """(M, T) logits of a student that hears, beside the teacher, every member of it on heads that are not served."""
    examples, members = bench.examples, members_of(bench)
    wide_MX = np.concatenate([soft_MT, *(heard(bench, member_MT) for member_MT in members.values())], axis=1)
    more = ((0, 0), (0, wide_MX.shape[1] - len(TASKS)))
    told = replace(
        examples,
        tasks=(*TASKS, *(f"{task} by {name}" for name in members for task in TASKS)),
        **{name: np.pad(getattr(examples, name), more) for name in ("y_MT", "learn_MT", "check_MT")},
    )
    return student(bench._replace(examples=told), "ablation-hints", DISTIL, wide_MX)[:, : len(TASKS)]


def with_vector(bench: Bench, soft_MT: np.ndarray, teacher_MT: np.ndarray) -> np.ndarray:
    """(M, T) logits of a student whose inputs are also the teacher's logits of the user's event before, as if they had been
    asked for and put into the row at once: the most that such a vector can be worth."""
    examples, config = bench.examples, student_config(bench.data)
    before_MT = np.zeros_like(teacher_MT)
    same = examples.user_M[1:] == examples.user_M[:-1]
    before_MT[1:][same] = np.nan_to_num(teacher_MT[:-1][same])

    def make() -> np.ndarray:
        inputs_MX = torch.cat([examples.columns.features_NF, torch.from_numpy(before_MT)], dim=1)
        told = replace(examples, columns=examples.columns._replace(features_NF=inputs_MX))
        fitted = train(
            told,
            msgspec.structs.replace(config, n_features=inputs_MX.shape[1]),
            bench.data.history.categories,
            FoldConfig(),
            DISTIL,
            prior_logits_3=np.zeros(3),
            soft_MT=soft_MT,
        )
        return logits(fitted.network, told, np.arange(len(told)))

    return cached(bench, named("ablation-vector", DISTIL, soft_MT), make)


def _shuffled(soft_MT: np.ndarray, platform_M: np.ndarray) -> np.ndarray:
    """What was said of one event is said of another of the same platform."""
    rng, out = np.random.default_rng(0), soft_MT.copy()
    for row in np.unique(platform_M):
        at = np.flatnonzero((platform_M == row) & ~np.isnan(soft_MT).all(axis=1))
        out[at] = soft_MT[rng.permutation(at)]
    return out


def _row(judged: dict, name: str) -> dict:
    row = {"difference": list(difference(judged[2], name, "distilled"))}
    for part, title in ((VALIDATE, "validation"), (2, "test")):
        for figure in ("auc", "log_loss"):
            values = [cell["models"][name][figure] for cell in judged[part].values()]
            row[f"{title}_{figure}"] = float(np.mean(values))
    row["over_baselines"] = list(difference(judged[2], name, BASELINES))
    return row


def _text(rows: dict[str, dict]) -> str:
    lines = [
        "## Ablations of the distillation",
        "",
        f"One seed, {DRAWS} draws of users, one change at a time; macro over the 11 cells. Last column: test, paired.",
        "",
        "![ablations](plots/ablations.svg)",
        "",
        "| student | AUC, validation | log-loss, validation | AUC, test | log-loss, test | AUC − the main table's |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        values = " | ".join(
            f"{row[key]:.4f}" for key in ("validation_auc", "validation_log_loss", "test_auc", "test_log_loss")
        )
        point, low, high = row["difference"]
        lines.append(f"| {name} | {values} | {point:+.4f} [{low:+.4f}, {high:+.4f}] |")
    return "\n".join(lines)
