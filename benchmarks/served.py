"""The student as it is served: what the main table does not ask of it.

    live h ─┬─ thrown away, rebuilt from the ring ─► AUC apart              slices: cold users, unseen items, new users
            └─ its terms, event by event ─► why a score is what it is       groups: the worst one; weights against it
    weights ─► fp32, bf16, int8 ─► bytes, µs an event, AUC                  refresh: none, minor, major

All of it on the cells, anchors and splits of the main table, with the distilled student of its first seed, trained anew
here because rows and scorer need weights and not logits. Knows no Kafka; rows, scorer and explanations are the served ones.

Shapes: M examples, A of them asked for, T tasks, H hidden units, K places of the ring.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines import DISTIL, heard, models_of
from benchmarks.cells import HORIZONS_S, Bench, Kept, Section, bar, cells_of, difference, judge, trained
from benchmarks.datasets import CELLS, DAY_S, TASKS, TEST, TRAIN, VALIDATE
from models.explain import Explainer, contributions, without_terms
from models.fold import FEATURE_NAMES, FOLDED
from models.scorer import Folded, Model, Scorer
from models.state import SIZES, empty_rows, row_dtype
from models.student import N_LOGITS, Columns, Encoded, Student, by_platform, linear_scan
from streams.score import one_a_user
from trainer import groups, metrics
from trainer.examples import Examples
from trainer.fit import Network, Schedule, logits
from trainer.train import affine
from trainer.transfer import subset

SHOWN = ("student", "distilled", "boosting", "logistic")
"""Models in the tables of slices."""
LEAST, LEAST_OF_A_CLASS = 100, 20
"""A slice of a cell with fewer anchors, or fewer of either outcome, is not shown."""
REFRESH = Schedule(epochs=5, batch_events=4096, rate=2e-3, dropout=0.3)
"""For the cadences: the undistilled student's rate and dropout. No early stopping: a model of the first days has no later
window to stop by."""
FIRST_PART = 0.6
"""Share of the training days that the model to be refreshed has seen."""


# ── state: live, and rebuilt from the ring ───────────────────────────────────────────────────────────────────────────


class States(NamedTuple):
    """`h` right after each of A events, as different histories would leave it, and their users' live rows."""

    live_AH: np.ndarray
    rebuilt_AH: np.ndarray
    """The row's `h` thrown away right before the event, so that `Scorer.prepare` rebuilds it from the ring."""
    once_AH: np.ndarray
    """Thrown away once, before the user's first event of the test days: what a major version published then leaves."""
    rows_A: np.ndarray


def states(bench: Bench, model: Model, at_A: np.ndarray, since_M: np.ndarray) -> States:
    """Serves the whole history, each user's events one after another, through rows and the scorer. `at_A`: positions of
    examples. `since_M` (bool): from a user's first such example on, `once` lives on from a rebuilt `h`."""
    scorer, history, examples = Scorer(model, "cpu"), bench.data.history, bench.examples
    place_N = np.full(len(history), -1)
    place_N[examples.index_M[at_A]] = np.arange(len(at_A))
    since_N = np.zeros(len(history), bool)
    since_N[examples.index_M[since_M]] = True
    live, once = (empty_rows(len(history.users), model.config.size) for _ in range(2))
    forgotten_U = np.zeros(len(history.users), bool)
    h = (np.zeros((len(at_A), model.config.hidden), np.float32) for _ in range(3))
    out = States(*h, np.zeros(len(at_A), row_dtype(model.config.size)))
    for at_N in one_a_user(history.user):
        events, users = history.events[at_N], history.user[at_N].astype(np.int64)
        place = place_N[at_N]
        asked = np.flatnonzero(place >= 0)
        rebuilt = live[users[asked]]
        rebuilt["h_version"] = 0
        scorer.run(rebuilt, np.arange(len(asked)), events[asked])
        scorer.run(live, users, events)
        new = since_N[at_N] & ~forgotten_U[users]
        once["h_version"][users[new]] = 0
        forgotten_U[users[new]] = True
        scorer.run(once, users, events)
        served = ((live, users[asked]), (rebuilt, np.arange(len(asked))), (once, users[asked]))
        for into, (rows, slots) in zip(out, served, strict=False):
            into[place[asked]] = rows["h"][slots]
        out.rows_A[place[asked]] = live[users[asked]]
    return out


@torch.inference_mode()
def logits_from(network: Network, examples: Examples, at_A: np.ndarray, h_AH: np.ndarray) -> np.ndarray:
    """(M, T) logits of the events `at_A` with this `h`; NaN elsewhere."""
    student, at = network.student, torch.from_numpy(at_A)
    columns = Columns(*(column[at] for column in examples.columns))
    x_NF, e_NE, _, _ = student.encode(columns)
    z_NK = student.before_heads(torch.from_numpy(h_AH), x_NF, e_NE)
    served = by_platform(z_NK, columns.platform_N, student.head_weight_POK, student.head_bias_PO)[:, :N_LOGITS]
    more = by_platform(z_NK, columns.platform_N, network.more_weight_PXK, network.more_bias_PX)
    out = np.full(examples.y_MT.shape, np.nan, np.float32)
    out[at_A] = torch.cat([served, more], dim=1).numpy()[:, : out.shape[1]]
    return out


@torch.inference_mode()
def truncated(network: Network, examples: Examples, at_A: np.ndarray, most: int) -> np.ndarray:
    """(A, H): `h` of the event and at most `most` before it, as they were live: what cutting the history alone costs."""
    student = network.student
    starts_M, a_MH, b_MH = examples.starts_M, *encoded_of(student, examples)
    first_M = np.maximum.accumulate(np.where(starts_M, np.arange(len(examples)), 0))
    h_AH = torch.zeros(len(at_A), a_MH.shape[1])
    for back in range(most, -1, -1):
        there = torch.from_numpy(at_A - back >= first_M[at_A])
        own = torch.from_numpy(np.maximum(at_A - back, 0))[there]
        h_AH[there] = a_MH[own] * h_AH[there] + b_MH[own]
    return h_AH.numpy()


@torch.inference_mode()
def encoded_of(student: Student, examples: Examples, at_once: int = 32_768) -> tuple[torch.Tensor, torch.Tensor]:
    """a, b (M, H) of every example."""
    parts = []
    for start in range(0, len(examples), at_once):
        encoded = student.encode(Columns(*(column[start : start + at_once] for column in examples.columns)))
        parts.append((encoded.a_NH, encoded.b_NH))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def scored_at(bench: Bench) -> np.ndarray:
    """(A,) positions of the anchors of validation and test."""
    split_M, anchor_M = bench.data.split_N[bench.examples.index_M], bench.data.anchor_N[bench.examples.index_M]
    return np.flatnonzero(anchor_M & np.isin(split_M, (VALIDATE, TEST)))


def histories(bench: Bench, kept: Kept, at_A: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """→ name → (M, T) logits of the events `at_A` under each history of `h`; the users' rows (A,) right after them."""
    examples = bench.examples
    found = states(bench, kept.model, at_A, bench.data.split_N[examples.index_M] == TEST)
    ring = SIZES[kept.model.config.size][1]
    h = {
        "live": found.live_AH,
        "rebuilt": found.rebuilt_AH,
        "once": found.once_AH,
        "truncated": truncated(kept.network, examples, at_A, ring),
        "none": truncated(kept.network, examples, at_A, 0),
    }
    return {name: logits_from(kept.network, examples, at_A, h_AH) for name, h_AH in h.items()}, found.rows_A


HISTORIES = {
    "rebuilt": "rebuilt from the ring right before each anchor",
    "once": "rebuilt once, before the user's first event of the test days, then live",
    "truncated": "the last 16 events before the anchor, with the features that they had when they came",
    "none": "no history: the anchor alone",
}


def rebuilding(bench: Bench, logits_of: dict[str, np.ndarray], draws: int) -> Section:
    """How far each history is from the live one; the bar is on `rebuilt`."""
    cells = judge(bench, {name: [logits_MT] for name, logits_MT in logits_of.items()}, draws)
    apart = {name: difference(cells, name, "live") for name in HISTORIES}
    losses = {name: difference(cells, name, "live", "log_loss") for name in HISTORIES}
    some_MT = ~np.isnan(logits_of["live"])
    moved = {name: float(np.abs(logits_of[name] - logits_of["live"])[some_MT].mean()) for name in HISTORIES}
    macro = float(np.mean([cell["models"]["live"]["auc"] for cell in cells.values()]))
    point = abs(apart["rebuilt"].value)
    bars = {
        "state rebuilt from the ring − live, macro AUC": bar(
            "≤ .001 apart", "≤ .0003", list(apart["rebuilt"]), point <= 0.001, point <= 0.0003
        )
    }
    lines = [
        "### State rebuilt from the ring",
        "",
        f"The whole history is served through rows and scorer, event by event; live macro AUC {macro:.4f}. The row's `h` is "
        "thrown away, so that the scorer rebuilds it: the ring of 16 events, folded on what the row says that it was before "
        "them (`models/rebuild.py`). The features that they had are lost in serving: that line is what a cut history alone "
        "costs.",
        "",
        "| `h` | AUC − live, macro | log-loss − live, macro | mean change of a logit |",
        "|---|---|---|---|",
    ]
    for name, what in HISTORIES.items():
        lines.append(f"| {what} | {_interval(apart[name])} | {_interval(losses[name])} | {moved[name]:.3f} |")
    worst = min(cells, key=lambda key: cells[key]["models"]["rebuilt"]["auc"] - cells[key]["models"]["live"]["auc"])
    lost = _interval(difference({worst: cells[worst]}, "rebuilt", "live"))
    lines += ["", f"The cell that loses most by a rebuild is {' '.join(worst)}: {lost}."]
    figures = {"auc_apart": apart, "log_loss_apart": losses, "logit_apart": moved, "live_macro_auc": macro}
    return Section(bars, figures, "\n".join(lines))


def _interval(at: metrics.Interval) -> str:
    return f"{at.value:+.4f} [{at.low:+.4f}, {at.high:+.4f}]"


# ── slices: cold users, unseen items, new users ──────────────────────────────────────────────────────────────────────


def events_behind(examples: Examples) -> np.ndarray:
    """(M,) int: events of the user's state, the example's own included."""
    log_events_M = examples.columns.features_NF[:, FEATURE_NAMES.index("log_events")].numpy().astype(np.float64)
    return np.rint(np.expm1(log_events_M)).astype(np.int64)


def slices_of(bench: Bench) -> dict[str, np.ndarray]:
    """Name → (M,) bool."""
    examples, n_M = bench.examples, events_behind(bench.examples)
    split_M = bench.data.split_N[examples.index_M]
    item_M = examples.columns.item_N.numpy()
    key_M = examples.platform_M.astype(np.int64) << 32 | item_M
    # Whatever a model could have learned from: events before the first of validation, platform by platform.
    known_M = bench.data.taught_N[examples.index_M] | (split_M == -2)
    learned_from = np.unique(examples.user_M[examples.learn_MT.any(axis=1)])
    return {
        "users with one event": n_M == 1,
        "users with at most three events": n_M <= 3,
        "items not seen before the validation days": (item_M != 0) & ~np.isin(key_M, key_M[known_M]),
        "users with no anchor that was learned from": ~np.isin(examples.user_M, learned_from),
        "all anchors": np.ones(len(examples), bool),
    }


def probabilities(bench: Bench, logits_MT: np.ndarray) -> np.ndarray:
    """(M, T) calibrated on the cell's validation anchors, as the main table has them; NaN outside the cells."""
    examples = bench.examples
    check_M = bench.data.anchor_N[examples.index_M] & (bench.data.split_N[examples.index_M] == VALIDATE)
    out = np.full(logits_MT.shape, np.nan)
    for row, task in cells_of(bench):
        own = examples.platform_M == row
        check = own & check_M
        slope, offset = affine(logits_MT[check, task], examples.y_MT[check, task], (1.0, 0.0), examples.user_M[check])
        out[own, task] = 1.0 / (1.0 + np.exp(-(slope * logits_MT[own, task] + offset)))
    return out


def sliced(bench: Bench, p: dict[str, np.ndarray], mask_M: np.ndarray, draws: int) -> dict[tuple[str, str], dict]:
    """Cell → n, users, base rate and each model's figures on the test anchors of a slice, cells with too few left out.
    The same form as `judge`'s."""
    examples = bench.examples
    test_M = bench.data.anchor_N[examples.index_M] & (bench.data.split_N[examples.index_M] == TEST) & mask_M
    out = {}
    for (row, task), cell in zip(cells_of(bench), CELLS, strict=True):
        at = np.flatnonzero(test_M & (examples.platform_M == row))
        y = examples.y_MT[at, task]
        if len(at) < LEAST or min(y.sum(), len(y) - y.sum()) < LEAST_OF_A_CLASS:
            continue
        resamples = metrics.Resamples(examples.user_M[at], draws) if draws else None
        entropy = metrics.log_loss(y, np.full(len(y), y.mean()))
        found = {"n": len(at), "users": len(np.unique(examples.user_M[at])), "base_rate": float(y.mean()), "models": {}}
        for name, p_MT in p.items():
            own = p_MT[at, task]
            losses = metrics.log_losses(y, own)
            figures = {"auc": metrics.auc(y, own), "log_loss": float(losses.mean())}
            figures["relative_loss"] = figures["log_loss"] / entropy
            figures["predicted_over_actual"] = metrics.predicted_over_actual(y, own)
            if resamples:
                figures |= {"auc_draws": resamples.auc(y, own), "log_loss_draws": resamples.mean(losses)}
            found["models"][name] = figures
        out[cell] = found
    return out


def cold_start(bench: Bench, models: dict[str, np.ndarray], draws: int) -> Section:
    """Tables of the slices."""
    p = {name: probabilities(bench, models[name]) for name in SHOWN}
    found = {name: sliced(bench, p, mask_M, draws) for name, mask_M in slices_of(bench).items()}
    lines = [
        "### Cold start and new users",
        "",
        f"Test anchors of a slice; a cell with fewer than {LEAST} of them, or {LEAST_OF_A_CLASS} of either outcome, is left "
        "out. Cells are AUC / log-loss. taobao's anchors have at least four buys behind them, so none of its users is cold.",
    ]
    for name, cells in found.items():
        if name == "all anchors":
            continue
        lines += ["", f"#### {name[0].upper()}{name[1:]}", ""]
        if not cells:
            lines.append("No cell has enough of them.")
            continue
        lines += [f"| platform | task | n | users | base rate | {' | '.join(SHOWN)} |", "|---" * (5 + len(SHOWN)) + "|"]
        for (platform, task), cell in cells.items():
            at = " | ".join(f"{cell['models'][m]['auc']:.3f} / {cell['models'][m]['log_loss']:.3f}" for m in SHOWN)
            lines.append(f"| {platform} | {task} | {cell['n']:,} | {cell['users']:,} | {cell['base_rate']:.3f} | {at} |")
        here, there = (
            difference(cells, "distilled", "boosting"),
            difference({c: found["all anchors"][c] for c in cells}, "distilled", "boosting"),
        )
        lines += [
            "",
            f"Distilled − boosting, macro AUC of these cells: {_interval(here)}; on all their anchors {_interval(there)}.",
        ]
    return Section({}, {"cold_start": found}, "\n".join(lines))


# ── why a score is what it is ────────────────────────────────────────────────────────────────────────────────────────


def explanations(bench: Bench, kept: Kept, at_A: np.ndarray, rows_A: np.ndarray, sample: int) -> Section:
    """What serving can name, against the exact terms of the live recurrence; its cost; an example."""
    examples = bench.examples
    split_M = bench.data.split_N[examples.index_M]
    test = np.flatnonzero(split_M[at_A] == TEST)
    own = np.sort(np.random.default_rng(0).choice(test, min(sample, len(test)), replace=False))
    at, rows = at_A[own], rows_A[own]
    events, folded = bench.data.history.events[examples.index_M[at]], _folded(examples, at)
    explainer, slots = Explainer(kept.model), np.arange(len(at))
    started = time.perf_counter()
    effects = explainer.effects(rows, slots, events, folded)
    each_us = 1e6 * (time.perf_counter() - started) / len(at)
    exact_AK3, older_A3 = exact_effects(kept, examples, at, effects.event_NK3.shape[1])
    # The newest place of the ring first, as the exact ones have it.
    n_A = effects.filled_N
    back_AK = n_A[:, None] - 1 - np.arange(exact_AK3.shape[1])
    served_AK3 = np.take_along_axis(effects.event_NK3, np.maximum(back_AK, 0)[:, :, None], axis=1)
    there_AK = back_AK >= 0
    earlier_AK = there_AK & (np.arange(there_AK.shape[1]) > 0)
    two = earlier_AK.sum(axis=1) > 1
    with np.errstate(invalid="ignore"):
        same = _top(served_AK3, earlier_AK)[two] == _top(exact_AK3, earlier_AK)[two]
    figures = {
        "anchors": len(at),
        "us_each": each_us,
        "newest_largest_gap": float(np.abs(served_AK3[:, 0] - exact_AK3[:, 0]).max()),
        "correlation": float(np.corrcoef(served_AK3[earlier_AK].ravel(), exact_AK3[earlier_AK].ravel())[0, 1]),
        "same_first": float(same.mean()),
        "mean_effect": {
            "newest event": float(np.abs(exact_AK3[:, 0]).mean()),
            "earlier events of the ring, together exact": float(np.abs(exact_AK3[:, 1:].sum(axis=1)).mean()),
            "older, served": float(np.abs(effects.older_N3).mean()),
            "older, exact": float(np.abs(older_A3).mean()),
            "strongest feature": float(np.abs(effects.feature_NF3).max(axis=1).mean()),
        },
    }
    mean = figures["mean_effect"]
    lines = [
        "### Explanations",
        "",
        f"`worker.explain = n` adds to each score the n events and features whose deletion moves a head's log-odds most "
        f"(`models/explain.py`): exact for the linear recurrence with its gates as they were. {len(at):,} test anchors, "
        f"{each_us:.0f} µs each on one thread, so off by default.",
        "",
        f"In serving the ring has no past features, so the terms of earlier events are those of a rebuilt `h`. Against the "
        f"exact terms of the live recurrence their correlation is {figures['correlation']:.2f}, and the earlier event named "
        f"first is the exact one for {figures['same_first']:.0%} of anchors and heads. The newest event's is exact.",
        "",
        f"Mean absolute effect on the log-odds: newest event {mean['newest event']:.3f}; what is older than the ring "
        f"{mean['older, exact']:.3f} ({mean['older, served']:.3f} as served, with all that the rebuild does not know); the "
        f"strongest feature {mean['strongest feature']:.3f}. Most of what a score knows comes through the features.",
        "",
        *_example(bench, kept, explainer, at, rows, events, folded),
    ]
    return Section({}, {"explanations": figures}, "\n".join(lines))


def _folded(examples: Examples, at: np.ndarray) -> Folded:
    """What the fold gave of these events, all of them FOLDED."""
    columns = examples.columns
    return Folded(columns.features_NF.numpy()[at], columns.dt_s_N.numpy()[at], np.full(len(at), FOLDED, np.uint8), None)


def _top(effects_AK3: np.ndarray, there_AK: np.ndarray) -> np.ndarray:
    """(A, 3): the place of the largest by absolute value."""
    return np.where(there_AK[:, :, None], np.abs(effects_AK3), -1.0).argmax(axis=1)


@torch.inference_mode()
def exact_effects(kept: Kept, examples: Examples, at_A: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """→ (A, most, 3) effects of the anchor and the events before it by the live recurrence, newest first, 0 where there is
    none; (A, 3) of all older ones together. On the served log-odds."""
    student = kept.network.student
    a_MH, b_MH = encoded_of(student, examples)
    starts = torch.from_numpy(examples.starts_M)
    h_AH = linear_scan(a_MH, b_MH, starts)[torch.from_numpy(at_A)]
    first_M = np.maximum.accumulate(np.where(examples.starts_M, np.arange(len(examples)), 0))
    window_AK = at_A[:, None] - np.arange(most)[::-1]  # oldest first
    there = torch.from_numpy(window_AK >= first_M[at_A][:, None])[:, :, None]
    own = torch.from_numpy(np.maximum(window_AK, 0))
    terms_AKH = contributions(torch.where(there, a_MH[own], 1.0), torch.where(there, b_MH[own], 0.0))
    terms_AKH = torch.cat([terms_AKH.flip(1), (h_AH - terms_AKH.sum(dim=1))[:, None]], dim=1)
    columns = Columns(*(column[torch.from_numpy(at_A)] for column in examples.columns))
    lost = without_terms(student, h_AH, terms_AKH, student.encode(columns), columns.platform_N).numpy()
    lost = lost * kept.model.calibration_P32[columns.platform_N.numpy(), :, 0][:, None]
    return lost[:, :-1], lost[:, -1]


def _example(bench: Bench, kept: Kept, explainer: Explainer, at, rows, events, folded: Folded) -> list[str]:
    """The purchase head of one anchor of retailrocket with a full ring: the one at the ninth decile of the probability."""
    shop = 1 + bench.data.history.platforms.index("retailrocket")
    mine = np.flatnonzero((bench.examples.platform_M[at] == shop) & (rows["n_ring"] == rows["ring_ts"].shape[1]))
    logits_MT = logits_from(kept.network, bench.examples, at[mine], rows["h"][mine])
    slope, offset = kept.model.calibration_P32[shop, 1]
    p = 1.0 / (1.0 + np.exp(-(slope * logits_MT[at[mine], 1] + offset)))
    one = mine[np.argsort(p)[int(0.9 * len(p))]][None]
    part = Folded(folded.features[one], folded.dt_s[one], folded.status[one], None)
    p_13 = np.float32([[np.nan, np.sort(p)[int(0.9 * len(p))], np.nan]])
    (why,) = explainer.explain(rows, one, events[one], part, p_13, 3)[0]
    lines = [
        f"An example, chosen by rule (retailrocket, full ring, the ninth decile of the probability of a purchase: "
        f"{p_13[0, 1]:.2f}). The effect is what the log-odds would lose.",
        "",
        "| what | effect |",
        "|---|---|",
    ]
    lines += [f"| event: {event.kind}, {_ago(event.age_s)} | {event.effect:+.3f} |" for event in why.events]
    lines += [f"| all that is older than the ring | {why.older:+.3f} |"]
    value = {feature.name: folded.features[one[0], FEATURE_NAMES.index(feature.name)] for feature in why.features}
    lines += [f"| feature `{f.name}` = {value[f.name]:.2f} | {f.effect:+.3f} |" for f in why.features]
    return lines


def _ago(seconds: float) -> str:
    for unit, length in (("days", DAY_S), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} before"
    return "this one" if seconds == 0 else f"{seconds:.0f} s before"


# ── compression ──────────────────────────────────────────────────────────────────────────────────────────────────────


class HalfStudent(Student):
    """The same network with matrix products in bfloat16; the recurrence itself stays in float32."""

    def encode(self, columns: Columns) -> Encoded:
        with torch.autocast("cpu", torch.bfloat16):
            return Encoded(*(part.float() for part in super().encode(columns)))

    def before_heads(self, h_NH: Tensor, x_NF: Tensor, e_NE: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().before_heads(h_NH, x_NF, e_NE).float()


class Variant(NamedTuple):
    network: Network
    size_bytes: int


def compressed(kept: Kept) -> dict[str, Variant]:
    """Name → the same network at another precision."""
    state = kept.network.state_dict()
    many = {key for key, tensor in state.items() if tensor.ndim >= 2 and "student.feature_" not in key}  # no weights
    n = {key: tensor.numel() for key, tensor in state.items()}
    full = 4 * sum(n.values())
    halved = {key: t.bfloat16().float() for key, t in state.items()}
    eighth = {key: _int8_rows(t) if key in many else t for key, t in state.items()}
    rows = sum(state[key].numel() // state[key].shape[-1] for key in many)
    eighth_bytes = sum(n[key] if key in many else 4 * n[key] for key in n) + 4 * rows
    out = {
        "fp32": Variant(kept.network, full),
        "bf16, computed in fp32": Variant(_network(kept, halved), full // 2),
        "bf16, products in bf16": Variant(_network(kept, halved, HalfStudent), full // 2),
        "int8 a row, computed in fp32": Variant(_network(kept, eighth), eighth_bytes),
    }
    if hasattr(torch.ao, "quantization"):  # announced to leave torch with 2.10
        dynamic = _network(kept, state)
        linear = [dynamic.student.embed, dynamic.student.recur, dynamic.student.trunk]
        saved = sum(3 * layer.weight.numel() - 4 for layer in linear)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dynamic.student = torch.ao.quantization.quantize_dynamic(dynamic.student, {nn.Linear}, dtype=torch.qint8)
        out["int8, products in int8"] = Variant(dynamic, full - saved)
    return out


def _network(kept: Kept, state: dict[str, Tensor], kind: type[Student] = Student) -> Network:
    network = Network(kind(kept.model.config), kept.network.n_tasks)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def _int8_rows(tensor: Tensor) -> Tensor:
    """What symmetric 8-bit integers with a scale for each row of the last axis keep of it."""
    scale = tensor.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127.0
    return torch.round(tensor / scale).clamp(-127, 127) * scale


def compression(bench: Bench, kept: Kept, models: dict[str, np.ndarray], draws: int, repetitions: int = 9) -> Section:
    """Bytes, µs an event and AUC of each precision, on one thread."""
    variants, threads = compressed(kept), torch.get_num_threads()
    everything = np.arange(len(bench.examples))
    said = {name: logits(variant.network, bench.examples, everything) for name, variant in variants.items()}
    cells = judge(bench, {name: [logits_MT] for name, logits_MT in said.items()}, draws)
    p = {name: probabilities(bench, logits_MT) for name, logits_MT in said.items()}
    torch.set_num_threads(1)
    try:
        us = timed(variants, bench.examples, repetitions)
    finally:
        torch.set_num_threads(threads)
    lines = [
        "### Compression",
        "",
        "The distilled student at other precisions, without retraining. Time: encode, scan and heads of 4,096 events in "
        f"one batch on one core, {repetitions} repetitions in turn, median [least, greatest], and the median of the ratios "
        "to fp32 in the same turn. *Computed in fp32*: stored small, unpacked when loaded.",
        "",
        "| weights | bytes | µs an event | × fp32 | macro AUC | − fp32 | largest change of p |",
        "|---|---|---|---|---|---|---|",
    ]
    figures = {}
    for name, variant in variants.items():
        ratio = us[name] / us["fp32"]
        change = float(np.nanmax(np.abs(p[name] - p["fp32"])))
        apart = difference(cells, name, "fp32")
        auc = float(np.mean([cell["models"][name]["auc"] for cell in cells.values()]))
        figures[name] = {
            "bytes": variant.size_bytes,
            "us": us[name].tolist(),
            "auc": auc,
            "auc_apart": apart,
            "p_apart": change,
        }
        times = " | ".join(f"{np.median(of):.2f} [{of.min():.2f}, {of.max():.2f}]" for of in (us[name], ratio))
        lines.append(f"| {name} | {variant.size_bytes:,} | {times} | {auc:.4f} | {_interval(apart)} | {change:.4f} |")
    return Section({}, {"compression": figures}, "\n".join(lines))


@torch.inference_mode()
def timed(variants: dict[str, Variant], examples: Examples, repetitions: int, n: int = 4096) -> dict[str, np.ndarray]:
    """Name → (repetitions,) µs an event, the variants in turn."""
    at = torch.from_numpy(np.sort(np.random.default_rng(0).choice(len(examples), n, replace=False)))
    columns = Columns(*(column[at] for column in examples.columns))
    starts = torch.from_numpy(examples.starts_M)[at]
    out = {name: np.zeros(repetitions) for name in variants}
    for repetition in range(-2, repetitions):  # two to warm up
        for name, variant in variants.items():
            started = time.perf_counter()
            variant.network.student(columns, starts)
            if repetition >= 0:
                out[name][repetition] = 1e6 * (time.perf_counter() - started) / n
    return out


# ── the worst slice, and weights against it ──────────────────────────────────────────────────────────────────────────


def fairness_slices(bench: Bench) -> dict[str, dict[str, np.ndarray]]:
    """Dimension → name → (M,) bool."""
    found = groups.groups_of(bench.examples)
    return {
        "platform": {"all of it": np.ones(len(bench.examples), bool)},
        "activity": {name: found.activity_M == i for i, (name, _) in enumerate(groups.ACTIVITY)},
        "price band": {name: found.price_M == i for i, name in enumerate(groups.PRICES)},
    }


FIGURES = {
    "auc": "AUC",
    "relative_loss": "log-loss over that of the slice's own base rate",
    "predicted_over_actual": "predicted / actual",
}


def worst(found: dict, model: str, figure: str) -> tuple[float, str]:
    """(value, where) of the worst slice of a model."""
    values = {
        f"{' '.join(cell)}, {name}": one["models"][model][figure]
        for name, cells in found.items()
        for cell, one in cells.items()
    }
    bad = {"auc": lambda v: -v, "relative_loss": lambda v: v, "predicted_over_actual": lambda v: abs(np.log(max(v, 1e-9)))}[
        figure
    ]
    where = max(values, key=lambda key: bad(values[key]))
    return values[where], where


def fairness(bench: Bench, models: dict[str, np.ndarray], draws: int) -> Section:
    """Each model's worst slice of each dimension, and what weights cost overall. `models`: the first is the unweighted."""
    p = {name: probabilities(bench, logits_MT) for name, logits_MT in models.items()}
    cells = judge(bench, {name: [logits_MT] for name, logits_MT in models.items()}, draws)
    first, *weighted = models
    figures: dict = {"macro": {}, "worst": {}}
    lines = [
        "### The worst slice, and group weights",
        "",
        "Slices of each cell's test anchors by platform, activity (events behind the anchor) and price band (the user's "
        f"mean price, thirds within the platform); at least {LEAST} anchors and {LEAST_OF_A_CLASS} of either outcome. "
        "Groups are platform × activity × price band. *by frequency*: weights n^−½; *by loss*: one exponential step on the "
        "unweighted student's validation loss of the group. Weights have mean 1 on each platform.",
        "",
        "| dimension | figure | " + " | ".join(models) + " |",
        "|---" * (2 + len(models)) + "|",
    ]
    for dimension, parts in fairness_slices(bench).items():
        found = {name: sliced(bench, p, mask_M, 0) for name, mask_M in parts.items()}
        for figure, title in FIGURES.items():
            at = {name: worst(found, name, figure) for name in models}
            figures["worst"][f"{dimension} {figure}"] = {
                name: {"value": v, "where": where} for name, (v, where) in at.items()
            }
            lines.append(f"| {dimension} | {title} | " + " | ".join(f"{v:.3f} ({where})" for v, where in at.values()) + " |")
    for name in weighted:
        apart = {figure: difference(cells, name, first, figure) for figure in ("auc", "log_loss")}
        figures["macro"][name] = apart
        lines += [
            "",
            f"{name} − {first}: macro AUC {_interval(apart['auc'])}, macro log-loss {_interval(apart['log_loss'])}.",
        ]
    return Section({}, {"fairness": figures}, "\n".join(lines))


# ── refresh: none, minor, major ──────────────────────────────────────────────────────────────────────────────────────


def of_first_part(bench: Bench, share: float) -> Examples:
    """The examples of the first `share` of each platform's training days, with the labels that had matured by then."""
    examples = bench.examples
    platform_M, split_M = examples.platform_M, bench.data.split_N[examples.index_M]
    until_M = np.zeros(len(examples), np.int64)
    for row in np.unique(platform_M):
        ts = examples.ts_M[(platform_M == row) & (split_M == TRAIN)]
        until_M[platform_M == row] = ts.min() + int(share * (ts.max() - ts.min()))
    matured_MT = np.stack([examples.ts_M + int(1000 * HORIZONS_S[task]) <= until_M for task in TASKS], axis=1)
    at = np.flatnonzero(examples.ts_M < until_M)
    last_M = np.r_[examples.user_M[at][1:] != examples.user_M[at][:-1], True]  # what follows comes after the cut
    next_M = np.where(last_M, 0, examples.next_M[at]).astype(np.uint32)
    part = subset(examples, at)
    learn_MT = part.learn_MT & matured_MT[at]
    check_MT = np.zeros_like(part.check_MT)
    return replace(part, learn_MT=learn_MT, check_MT=check_MT, next_M=next_M, learn_next_M=part.learn_next_M & (next_M != 0))


def cadences(bench: Bench, draws: int) -> Section:
    """A model of the first part of the training days, judged on the test days as it is, after a minor, after a major."""
    everything = np.arange(len(bench.examples))
    first = of_first_part(bench, FIRST_PART)
    base = trained(bench, "served_first_part", REFRESH, examples=first)
    refreshed = {
        "no refresh": base,
        "minor": trained(bench, "served_minor", REFRESH, incumbent=base.model),
        "major": trained(bench, "served_major", REFRESH),
    }
    said = {name: [logits(kept.network, bench.examples, everything)] for name, kept in refreshed.items()}
    cells = judge(bench, said, draws)
    apart = {
        (name, figure): difference(cells, name, "no refresh", figure) for name in said for figure in ("auc", "log_loss")
    }
    stays = refreshed["minor"].model.recurrence_id == base.model.recurrence_id
    lines = [
        "### Cadences",
        "",
        f"An undistilled student of the first {FIRST_PART:.0%} of each platform's training days ({_learned(first):,} "
        f"anchors), then refreshed with all of them ({_learned(bench.examples):,}): *minor* trains heads, tables and "
        f"calibration and keeps the recurrence bit for bit{', so that every h in serving stays valid' if stays else ''}; "
        f"*major* trains all anew. {REFRESH.epochs} epochs, one seed, no early stopping. Drift is the simulator's to show.",
        "",
        "| | macro AUC | − no refresh | macro log-loss | − no refresh |",
        "|---|---|---|---|---|",
    ]
    for name in said:
        auc, loss = (float(np.mean([c["models"][name][f] for c in cells.values()])) for f in ("auc", "log_loss"))
        more = ("", "") if name == "no refresh" else (_interval(apart[name, "auc"]), _interval(apart[name, "log_loss"]))
        lines.append(f"| {name} | {auc:.4f} | {more[0]} | {loss:.4f} | {more[1]} |")
    figures = {"apart": {" ".join(key): at for key, at in apart.items()}, "recurrence_kept": stays}
    return Section({}, {"cadences": figures}, "\n".join(lines))


def _learned(examples: Examples) -> int:
    return int(examples.learn_MT.any(axis=1).sum())


# ── the section ──────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(bench: Bench, quick: bool) -> Section:
    """All of the above. One seed; `quick`: fewer draws, no trainings but the distilled student's."""
    draws, sample = (100, 500) if quick else (400, 2000)
    lists, *_ = models_of(bench, range(1), 4 if quick else 12)
    models = {name: seeds[0] for name, seeds in lists.items()}
    soft_MT = heard(bench, models["teacher"])
    kept = trained(bench, "distilled", DISTIL, soft_MT=soft_MT)
    at_A = scored_at(bench)
    logits_of, rows_A = histories(bench, kept, at_A)
    parts = [
        rebuilding(bench, logits_of, draws),
        cold_start(bench, models, draws),
        explanations(bench, kept, at_A, rows_A, sample),
        compression(bench, kept, models, draws),
    ]
    if not quick:
        parts += [
            fairness(bench, weighted(bench, models["distilled"], soft_MT, DISTIL), draws),
            cadences(bench, draws),
        ]
    bars = {name: one for part in parts for name, one in part.bars.items()}
    figures = {name: one for part in parts for name, one in part.figures.items()}
    return Section(bars, figures, "\n\n".join(["## The student as it is served", *(part.text for part in parts)]))


def weighted(bench: Bench, distilled_MT: np.ndarray, soft_MT: np.ndarray, schedule: Schedule) -> dict[str, np.ndarray]:
    """Name → (M, T) logits: the distilled student, and the same under group weights."""
    found = groups.groups_of(bench.examples)
    weights = {
        "by frequency": groups.by_frequency(bench.examples, found),
        "by loss": groups.by_loss(bench.examples, found, distilled_MT),
    }
    out = {"unweighted": distilled_MT}
    for name, weight_M in weights.items():
        kept = trained(bench, f"served_{name.replace(' ', '_')}", schedule, soft_MT=soft_MT, weight_M=weight_M)
        out[name] = logits(kept.network, bench.examples, np.arange(len(bench.examples)))
    return out
