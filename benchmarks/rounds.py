"""What a trainer's round publishes, judged by what came after: with the calibration of the gate, and with the last one.

    ─── learned from ───►│ G ─── judged on ───►│ now ─── what came next ───►      at NOWS of each platform's time
                                               └ published: calibrated at G, or once more by the window after G

Each round is the trainer's own path over the recorded data up to an instant: labels, gate, replay, examples, training
without a teacher, comparison, `trainer.recalibrate`. What it would have served is then judged on the next tenth of the
platform's time, by labels of which that round knew nothing. All FOLDED events, not the anchors of the main table alone.

Shapes: N events after G of one round; n of one platform × head that came next.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from benchmarks.cells import HEADS_OF, Bench, Section, note
from models.artifact import load_prior
from models.config import FoldConfig, HorizonsConfig, TrainerConfig
from models.events import BINARY_HEADS
from models.fold import N_FEATURES
from models.student import StudentConfig
from trainer import metrics
from trainer.evaluate import LEAST_CELL, compare, predict
from trainer.examples import gate_start, heads_of, make_examples, replay
from trainer.fit import Schedule
from trainer.history import History
from trainer.labels import Labels, make_labels, matured
from trainer.recalibrate import recalibrate
from trainer.train import learned, train

NOWS = (0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85)
NEXT = 0.10
"""Shares of a platform's time."""
VALIDATION = TrainerConfig().validation_fraction


class Next(NamedTuple):
    """One platform × head after one round."""

    now: float
    platform: str
    head: str
    y: np.ndarray
    user: np.ndarray
    judged: np.ndarray
    """(n,) probabilities as the gate judged them."""
    served: np.ndarray
    """(n,) probabilities as published."""


def until(history: History, until_ms_P: np.ndarray) -> History:
    """The history up to an instant of each platform; users, platforms and categories keep their numbers."""
    some = history.events["ts"] <= until_ms_P[history.platform]
    columns = {name: getattr(history, name)[some] for name in ("events", "user", "platform", "partition", "offset")}
    return replace(history, **columns)


def a_round(history: History, known: Labels, now: float, schedule: Schedule) -> list[Next]:
    """`known`: labels of the whole history."""
    fold, horizons = FoldConfig(), HorizonsConfig()
    ts_N, platforms = history.events["ts"], history.platforms
    first_P, last_P = (
        np.array([of(ts_N[history.platform == p]) for p in range(len(platforms))], np.int64) for of in (np.min, np.max)
    )
    now_P, next_P = ((first_P + share * (last_P - first_P)).astype(np.int64) for share in (now, now + NEXT))
    past = until(history, now_P)
    labels = make_labels(past, fold, horizons)
    gate = gate_start(past, labels, horizons, VALIDATION)
    if gate is None:
        return []
    replayed = replay(past, fold, "cpu", until_ms=gate.user_U)
    config = StudentConfig.of("cpu", N_FEATURES, platforms, heads_of(past, HEADS_OF, gate))
    examples = make_examples(past, labels, replayed, config, horizons, gate)
    prior_3 = load_prior(fold).calibration_P32[0, :, 1]
    model = train(examples, config, history.categories, fold, schedule, prior_logits_3=prior_3).model
    learned_R3 = learned(examples, len(platforms))
    compared = compare(model, load_prior(fold), past, labels, horizons, replayed.rows, gate, learned_R3=learned_R3)
    published = recalibrate(model, past, labels, horizons, compared)
    said = [predict(one, history, replayed.rows, gate) for one in (model, published.model)]
    at = said[0].at
    known_N4 = matured(Labels(*(column[at] for column in known)), ts_N[at], horizons)
    comes_N = (ts_N[at] > now_P[history.platform[at]]) & (ts_N[at] <= next_P[history.platform[at]])
    out = []
    for platform, name in published.lines:
        head = BINARY_HEADS.index(name)
        of_N = comes_N & known_N4[:, head] & (history.platform[at] == platforms.index(platform))
        of_N &= ~np.isnan(said[0].p_N3[:, head])
        if of_N.sum() >= LEAST_CELL:
            y, user = known.y_N3[at[of_N], head].astype(np.float64), history.user[at[of_N]]
            out.append(Next(now, platform, name, y, user, *(one.p_N3[of_N, head].astype(np.float64) for one in said)))
    return out


def figures_of(found: list[Next], draws: int) -> dict:
    """Macro over platforms × heads × rounds: log-loss, users' calibration error, predicted/actual, of what was judged and of
    what is published; the difference of the log-loss with its interval, users resampled over all rounds together."""
    users = int(max(one.user.max() for one in found)) + 1
    resamples = metrics.Resamples(np.arange(users), draws)
    differences, rows = [], []
    for one in found:
        loss = [metrics.log_losses(one.y, p) for p in (one.judged, one.served)]
        error = [metrics.ece(one.y, p, user=one.user) for p in (one.judged, one.served)]
        ratio = [metrics.predicted_over_actual(one.y, p) for p in (one.judged, one.served)]
        row = {"now": one.now, "platform": one.platform, "head": one.head, "n": len(one.y)}
        row |= {"log_loss": [x.mean() for x in loss], "ece_of_users": error, "predicted_over_actual": ratio}
        rows.append(row)
        sums_D, events_D = resamples.means(
            np.bincount(one.user, loss[1] - loss[0], users), np.bincount(one.user, minlength=users)
        )
        differences.append(sums_D / np.maximum(events_D, 1 / users))
    means = {key: np.mean([row[key] for row in rows], axis=0).tolist() for key in ("log_loss", "ece_of_users")}
    off = np.abs(np.log([row["predicted_over_actual"] for row in rows]))
    point = means["log_loss"][1] - means["log_loss"][0]
    return {
        **means,
        "predicted_over_actual_off": (np.exp(off.mean(axis=0)) - 1.0).tolist(),
        "log_loss_difference": list(metrics.interval(point, np.mean(differences, axis=0))),
        "better": int(sum(row["log_loss"][1] < row["log_loss"][0] for row in rows)),
        "cells": rows,
    }


def measure(bench: Bench, quick: bool) -> Section:
    """One seed; not cached, it takes seconds a round. `quick`: two rounds, fewer draws."""
    history = bench.data.history
    known = make_labels(history, FoldConfig(), HorizonsConfig())
    found = []
    for now in NOWS[::4] if quick else NOWS:
        found += a_round(history, known, now, Schedule())
        note(f"round at {now:.0%} of the time")
    figures = figures_of(found, 100 if quick else 400)
    return Section({}, figures, text(figures))


def text(figures: dict) -> str:
    """Markdown."""
    value, low, high = figures["log_loss_difference"]
    cells = figures["cells"]
    lines = [
        "## A round's last calibration",
        "",
        f"Trainer's rounds over the data up to {len({row['now'] for row in cells})} instants, without a teacher; what each "
        "would have published, judged on the next tenth of each platform's time. The gate judges a candidate calibrated by "
        "what had matured before its window; it is published calibrated once more by that window "
        f"(`trainer/recalibrate.py`). Macro over {len(cells)} platforms × heads × rounds; log-loss "
        f"{value:+.4f} [{low:+.4f}, {high:+.4f}], better in {figures['better']} of them.",
        "",
        "| | log-loss | calibration error, of users | predicted/actual off by |",
        "|---|---|---|---|",
    ]
    for index, name in enumerate(("as judged", "as published")):
        loss, error, off = (figures[key][index] for key in ("log_loss", "ece_of_users", "predicted_over_actual_off"))
        lines.append(f"| {name} | {loss:.4f} | {error:.4f} | {off:.1%} |")
    lines += [
        "",
        "| platform | head | log-loss, judged → published | error of users | predicted/actual |",
        "|---|---|---|---|---|",
    ]
    for platform, head in dict.fromkeys((row["platform"], row["head"]) for row in cells):
        own = [row for row in cells if (row["platform"], row["head"]) == (platform, head)]
        loss, error, ratio = (
            np.mean([row[key] for row in own], axis=0) for key in ("log_loss", "ece_of_users", "predicted_over_actual")
        )
        arrows = " | ".join(f"{before:.4f} → {after:.4f}" for before, after in (loss, error, ratio))
        lines.append(f"| {platform} | {head} | {arrows} |")
    return "\n".join(lines)
