"""What the benchmark of quality is made of: the recorded data folded once, cells, models' logits, paired figures.

    data sets ─► one History ─► the serving fold ─► Bench ─► logits (M, T) of each model ─► judge ─► cells ─► difference

A *cell* is a platform × task of `datasets.MATRIX`; a model is an array of logits (M, T) of every folded event, kept in the
cache by a key of its settings, of the code and of the data. Figures carry draws of users, the same for every model, so that
differences are paired. A *section* is one page's worth: its bars, its figures, its text.
Knows no particular model but the student.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from safetensors.torch import load_file, save_file

from benchmarks import datasets
from benchmarks.datasets import CELLS, TASKS, TEST, TRAIN, VALIDATE, DataSet
from models.artifact import load_prior
from models.config import FoldConfig, HorizonsConfig
from models.fold import N_FEATURES
from models.scorer import Model
from models.student import Student, StudentConfig
from trainer import metrics
from trainer.delayed import line, so_far
from trainer.examples import Examples, examples_of, folded, replay
from trainer.fit import Network, Schedule, logits
from trainer.history import History
from trainer.labels import make_labels
from trainer.train import affine, train

_NEVER = np.int64(2**62)
HORIZONS_S = {"click": 1800.0, "purchase": datasets.DAY_S, **datasets.RETURNS_S}
CODE = (
    "models/fold.py",
    "models/student.py",
    "trainer/fit.py",
    "trainer/train.py",
    "trainer/boosting.py",
    "trainer/rates.py",
    "trainer/teacher.py",
    "benchmarks/datasets.py",
)
"""What a figure in the cache depends on, beside the data and a model's own settings."""
REFRESHES = 20
"""Parts of the test's time, each calibrated anew."""
HEADS_OF = {
    platform: tuple(
        head
        for head in ("click", "purchase", "return", "category")
        if head in spec.tasks or (head == "category" and platform in datasets.WITH_CATEGORIES)
    )
    for platform, spec in datasets.MATRIX.items()
}


class Section(NamedTuple):
    """What one part of the benchmark found."""

    bars: dict[str, dict]
    """name → must, aim, value, met, aim_met: as `bar` makes them."""
    figures: dict
    """For the JSON file."""
    text: str
    """Markdown, its headings `##` and below; plots are SVG or PNG files in `benchmarks/plots/`, by relative links."""


class Bench(NamedTuple):
    data: DataSet
    examples: Examples
    delay_MT: np.ndarray
    """int64 ms, as `trainer.labels.Labels.delay_N3`; that of a return is any task's of returning."""
    cache: Path
    key: str
    threads: int


def prepare(data_dir: Path, cache: Path, threads: int) -> Bench:
    data = datasets.load(data_dir, progress=lambda name: note(f"reading {name}"))
    history, fold = data.history, FoldConfig()
    replayed = replay(history, fold, "cpu")
    at = folded(history, replayed)
    index_M = replayed.index_M[at]
    config = student_config(data)
    anchor_M1, can_MT = data.anchor_N[index_M][:, None], data.can_NT[index_M]
    split_M1 = data.split_N[index_M][:, None]
    next_M = np.where(_next_known(history, index_M, split_M1[:, 0]), data.category_N[index_M], 0)
    examples = examples_of(
        history,
        replayed,
        at,
        config,
        tasks=TASKS,
        y_MT=data.y_NT[index_M].astype(np.float32),
        learn_MT=anchor_M1 & can_MT & (split_M1 == TRAIN),
        check_MT=anchor_M1 & can_MT & (split_M1 == VALIDATE),
        next_M=next_M.astype(np.uint32),
        learn_next_M=(next_M != 0) & (split_M1[:, 0] == TRAIN),
    )
    code = hashlib.sha256()
    for name in CODE:
        code.update((datasets.ROOT / name).read_bytes())
    code.update(examples.y_MT.tobytes() + examples.learn_MT.tobytes() + examples.next_M.tobytes())
    cache.mkdir(parents=True, exist_ok=True)
    delay_M3 = make_labels(history, fold, HorizonsConfig()).delay_N3[index_M]
    delay_MT = delay_M3[:, [("click", "purchase", "return").index(task.split("_")[0]) for task in TASKS]]
    return Bench(data, examples, delay_MT, cache, code.hexdigest()[:12], threads)


@njit(cache=True)
def _next_ts(user, ts, category):
    """(n,) ts of the user's first strictly later event with a category; sorted by user, then time."""
    out = np.full(len(ts), _NEVER)
    first = later = _NEVER
    for i in range(len(ts) - 1, -1, -1):
        if i == len(ts) - 1 or user[i + 1] != user[i]:
            first = later = _NEVER
        elif ts[i + 1] > ts[i]:
            later = first
        out[i] = later
        if category[i] != 0:
            first = ts[i]
    return out


def _next_known(history: History, index_M: np.ndarray, split_M: np.ndarray) -> np.ndarray:
    """(M,) bool: the event lies before the platform's days of validation, and so does the next one with a category."""
    events = history.events[index_M]
    next_ts_M = _next_ts(history.user[index_M], events["ts"], events["category"])
    begins_P = np.array(
        [
            history.events["ts"][history.platform == place].min(initial=_NEVER)
            + int(datasets.MATRIX[name].days[VALIDATE][0] * datasets.DAY_MS)
            for place, name in enumerate(history.platforms)
        ]
    )
    return np.isin(split_M, (-2, TRAIN)) & (next_ts_M < begins_P[history.platform[index_M]])


def student_config(data: DataSet) -> StudentConfig:
    return StudentConfig.of("cpu", N_FEATURES, data.history.platforms, HEADS_OF)


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def cached(bench: Bench, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """(M, T) float32 logits: from the cache where they are there."""
    path = bench.cache / f"{name}-{bench.key}.npy"
    if path.exists():
        return np.load(path)
    started = time.monotonic()
    out = make().astype(np.float32)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, out)
    os.replace(temporary, path)
    note(f"{name}: {time.monotonic() - started:.0f} s")
    return out


# ── models ──


def cells_of(bench: Bench) -> list[tuple[int, int]]:
    """(platform row, task) of every cell."""
    return [
        (1 + bench.data.history.platforms.index(p), TASKS.index(t)) for p, t in CELLS if p in bench.data.history.platforms
    ]


def by_cell(bench: Bench, fit: Callable[[np.ndarray, np.ndarray, np.ndarray, int, int], np.ndarray]) -> np.ndarray:
    """Calls `fit(of, learn, check, row, task)` for every cell with (n,) positions of its platform's events and bool masks
    among them; puts the logits that it gives of them into one array."""
    examples = bench.examples
    out = np.full(examples.y_MT.shape, np.nan, np.float32)
    for row, task in cells_of(bench):
        of = np.flatnonzero(examples.platform_M == row)
        out[of, task] = fit(of, examples.learn_MT[of, task], examples.check_MT[of, task], row, task)
    return out


class Kept(NamedTuple):
    """A trained network with its calibration."""

    network: Network
    """With the heads of tasks that are not served."""
    model: Model
    """As it would be served, without its table of categories."""


def trained(
    bench: Bench,
    name: str,
    schedule: Schedule,
    *,
    examples: Examples | None = None,
    soft_MT: np.ndarray | None = None,
    incumbent: Model | None = None,
    **more,
) -> Kept:
    """The serving network, trained on `examples` (None: the bench's), from the cache where it is there."""
    path = bench.cache / f"{named(name, schedule, soft_MT)}-{bench.key}.safetensors"
    config = student_config(bench.data)
    examples = bench.examples if examples is None else examples
    if not path.exists():
        started = time.monotonic()
        fitted = train(
            examples,
            config,
            bench.data.history.categories,
            FoldConfig(),
            schedule,
            prior_logits_3=load_prior(FoldConfig()).calibration_P32[0, :, 1],
            incumbent=incumbent,
            soft_MT=soft_MT,
            **more,
        )
        tensors = {f"network.{key}": tensor.contiguous() for key, tensor in fitted.network.state_dict().items()}
        tensors["calibration"] = torch.from_numpy(fitted.model.calibration_P32)
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        os.replace(temporary, path)
        about = f"kept epoch {fitted.fitted.epochs}, validation log-loss {fitted.fitted.check_loss:.4f}"
        note(f"{name}: {about}, {time.monotonic() - started:.0f} s")
    tensors = load_file(path)
    network = Network(Student(config), len(examples.tasks), auxiliary=soft_MT is not None and schedule.way == "auxiliary")
    network.load_state_dict({key.removeprefix("network."): t for key, t in tensors.items() if key.startswith("network.")})
    network.eval().requires_grad_(False)
    return Kept(
        network, Model(f"{name}/000001", config, network.student, None, tensors["calibration"].numpy(), FoldConfig())
    )


def student(bench: Bench, name: str, schedule: Schedule, soft_MT: np.ndarray | None = None) -> np.ndarray:
    """(M, T) logits of the serving network, trained on all platforms at once."""

    def make() -> np.ndarray:
        network = trained(bench, name, schedule, soft_MT=soft_MT).network
        return logits(network, bench.examples, np.arange(len(bench.examples)))

    return cached(bench, named(name, schedule, soft_MT), make)


def named(name: str, schedule: Schedule, soft_MT: np.ndarray | None) -> str:
    """A name in the cache that changes with the settings and with what is heard."""
    heard = "" if soft_MT is None else hashlib.sha256(soft_MT.tobytes()).hexdigest()
    return f"{name}-s{schedule.seed}-{digest(schedule, heard)}"


def digest(*settings: object) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:6]


def logit(p):
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(
    bench: Bench, models: dict[str, list[np.ndarray]], draws: int, part: int = TEST, cells: Container = CELLS
) -> dict[tuple[str, str], dict]:
    """Cell → n, users, base rate, and for each model (a list of seeds) the mean over seeds of each figure, with draws of
    AUC, log-loss and the square of the calibration error. Probabilities are calibrated on the validation anchors, platform
    by platform and task by task, as the trainer does: pulled to the logits as they are, the more so the more a user's
    events err together. Figures named `refreshed_…` are of probabilities that `refreshed` calibrates again and again, as
    the trainer's rounds do."""
    out = {}
    for cell in _judged(bench, part, cells):
        y, user = cell.y_M[cell.at], bench.examples.user_M[cell.at]
        resamples = metrics.Resamples(user, draws)
        found = {"n": len(cell.at), "users": len(np.unique(user)), "base_rate": float(y.mean()), "models": {}}
        in_time = metrics.auc_by_user(y, bench.examples.ts_M[cell.at], user)
        both = ~np.isnan(in_time)
        found["both_outcomes"] = {
            "n": int(both.sum()), "users": len(np.unique(user[both])), "auc_of_time": float(in_time[both].mean())
        }  # fmt: skip
        for model, seeds in models.items():
            figures = []
            for logits_MT in seeds:
                z_M = logits_MT[:, cell.task]
                z = z_M[cell.at]
                check_user = bench.examples.user_M[cell.check]
                slope, offset = affine(z_M[cell.check], cell.y_M[cell.check], (1.0, 0.0), check_user)
                once = 1 / (1 + np.exp(-(slope * z + offset)))
                figures.append(_figures(y, z, once, _as_served(bench, cell, z_M), user, resamples))
            found["models"][model] = {key: np.mean([each[key] for each in figures], axis=0) for key in figures[0]}
        out[cell.key] = found
    return out


def by_chance(bench: Bench, logits_MT: np.ndarray, draws: int) -> dict[tuple[str, str], np.ndarray]:
    """Cell → (2, draws): `refreshed_ece` and `refreshed_ece_of_users` that the same test events would show of a model whose
    probabilities are right: what such a figure cannot be told from."""
    out = {}
    for cell in _judged(bench, TEST, CELLS):
        y, user = cell.y_M[cell.at], bench.examples.user_M[cell.at]
        p = _as_served(bench, cell, logits_MT[:, cell.task])
        right = metrics.as_if_calibrated(y, p, user, draws)
        out[cell.key] = np.array([(metrics.ece(each, p), metrics.ece(each, p, user=user)) for each in right]).T
    return out


class _Judged(NamedTuple):
    """A cell with the positions of its anchors."""

    key: tuple[str, str]
    task: int
    y_M: np.ndarray
    delay_M: np.ndarray
    at: np.ndarray
    check: np.ndarray
    """Of validation."""
    later: np.ndarray
    """From validation's first on, those of the gap before the test and of the test too: what may calibrate anew."""


def _judged(bench: Bench, part: int, cells: Container) -> Iterator[_Judged]:
    examples = bench.examples
    split_M, anchor_M = bench.data.split_N[examples.index_M], bench.data.anchor_N[examples.index_M]
    calibrates_M = anchor_M | bench.data.gap_anchors()[examples.index_M]
    for (row, task), key in zip(cells_of(bench), CELLS, strict=True):
        if key not in cells:
            continue
        of_row = examples.platform_M == row
        at, check = (np.flatnonzero(anchor_M & of_row & (split_M == one)) for one in (part, VALIDATE))
        first_ms = examples.ts_M[check].min(initial=np.iinfo(np.int64).max)
        later = np.flatnonzero(calibrates_M & of_row & (examples.ts_M >= first_ms))
        yield _Judged(key, task, examples.y_MT[:, task], bench.delay_MT[:, task], at, check, later)


def _as_served(bench: Bench, cell: _Judged, z_M: np.ndarray) -> np.ndarray:
    """(len(cell.at),) probabilities by `refreshed`."""
    ts_M, user_M = bench.examples.ts_M, bench.examples.user_M
    horizon_ms = int(1000 * HORIZONS_S[cell.key[1]])
    return refreshed(z_M, cell.delay_M, ts_M, user_M, cell.later, cell.at, horizon_ms, len(cell.check))


def refreshed(z_M, delay_M, ts_M, user_M, anchors: np.ndarray, at: np.ndarray, horizon_ms: int, newest: int) -> np.ndarray:
    """(len(at),) probabilities of the events `at`, calibrated as they would have been served (`trainer/recalibrate.py`): the
    test's time is cut into REFRESHES parts of equal length, and each is calibrated on the `newest` of the `anchors`
    (positions, from the first of validation on, those of the gap before the test too) of which something was known when it
    began: the label, or with horizons of a day at most what had come so far."""
    anchors = anchors[np.argsort(ts_M[anchors], kind="stable")]
    begins = np.linspace(ts_M[at].min(), ts_M[at].max(), REFRESHES, endpoint=False)
    part = np.searchsorted(begins, ts_M[at], side="right") - 1
    out = np.empty(len(at))
    for index, begin in enumerate(begins):
        y, come = so_far(delay_M[anchors], ts_M[anchors], np.floor(begin) - ts_M[anchors], horizon_ms)
        some = np.flatnonzero(come > 0.0)[-newest:]
        slope, offset = line(z_M[anchors[some]], y[some], come[some], user_M[anchors[some]])
        out[part == index] = 1 / (1 + np.exp(-(slope * z_M[at[part == index]] + offset)))
    return out


def _figures(y, z, p, later, user, resamples: metrics.Resamples) -> dict:
    """`p`: calibrated once; `later`: by `refreshed`."""
    losses, later_losses = metrics.log_losses(y, p), metrics.log_losses(y, later)
    square, square_draws = metrics.ece_squares(y, later, resamples.means)
    at_half = metrics.at_threshold(y, p, 0.5)
    within = metrics.auc_by_user(y, z, user)
    both = ~np.isnan(within)
    within_D, both_D = resamples.means(np.where(both, within, 0.0), both)
    later_D, true_D = resamples.means(later, y)
    said, did = p >= 0.5, y > 0
    hits_D, said_D, did_D, right_D = resamples.means(said & did, said, did, said == did)
    with np.errstate(divide="ignore", invalid="ignore"):
        half_draws = {"accuracy": right_D, "precision": hits_D / said_D, "recall": hits_D / did_D}
        half_draws["f1"] = 2 * hits_D / (said_D + did_D)
        more_draws = {"user_auc_draws": within_D / both_D, "refreshed_predicted_over_actual_draws": later_D / true_D}
    return {
        "auc": metrics.auc(y, z),
        "auc_draws": resamples.auc(y, z),
        "user_auc": float(within[both].mean()) if both.any() else float("nan"),
        "pr_auc": metrics.average_precision(y, z),
        "pr_auc_draws": resamples.average_precision(y, z),
        **more_draws,
        "log_loss": float(losses.mean()),
        "log_loss_draws": resamples.mean(losses),
        "ece": metrics.ece(y, p),
        "predicted_over_actual": metrics.predicted_over_actual(y, p),
        "refreshed_curve": _curve(y, later),
        "refreshed_log_loss": float(later_losses.mean()),
        "refreshed_log_loss_draws": resamples.mean(later_losses),
        "refreshed_ece": metrics.ece(y, later),
        "refreshed_ece_of_users": metrics.ece(y, later, user=user),
        "refreshed_ece_square": square,
        "refreshed_ece_square_draws": square_draws,
        "refreshed_predicted_over_actual": metrics.predicted_over_actual(y, later),
        **{f"{name}_at_0.5": value for name, value in at_half._asdict().items()},
        **{f"{name}_at_0.5_draws": draws_D for name, draws_D in half_draws.items()},
    }


def _curve(y, p, bins: int = 15) -> np.ndarray:
    """(2, bins): mean prediction and share that came true, in bins of equal mass."""
    parts = np.array_split(np.argsort(p, kind="stable"), bins)
    return np.array([[values[part].mean() for part in parts] for values in (p, y)])


def difference(cells: dict, ours: str, theirs: str | tuple[str, ...], figure: str = "auc") -> metrics.Interval:
    """Mean over cells of ours − theirs, paired; of several, the one that is best in each cell."""
    values, draws = [], []
    for cell in cells.values():
        other = best_of(cell, (theirs,) if isinstance(theirs, str) else theirs, figure)
        a, b = cell["models"][ours], cell["models"][other]
        values.append(a[figure] - b[figure])
        draws.append(a[f"{figure}_draws"] - b[f"{figure}_draws"])
    return metrics.interval(float(np.mean(values)), np.mean(draws, axis=0))


def best_of(cell: dict, names: tuple[str, ...], figure: str) -> str:
    sign = 1 if figure == "auc" else -1
    return max(names, key=lambda name: sign * cell["models"][name][figure])


def bar(must: str, aim: str, value, met: bool, aim_met: bool) -> dict:
    return {"must": must, "aim": aim, "value": value, "met": bool(met), "aim_met": bool(aim_met)}


def table(cells: dict, models: list[str], figure: str) -> str:
    """A Markdown table of one figure; ± half of its 95 % interval where there are draws."""
    lines = [
        "| platform | task | anchors | users | base rate | " + " | ".join(models) + " |",
        "|---" * (5 + len(models)) + "|",
    ]
    for (platform, task), cell in cells.items():
        values = " | ".join(with_half(cell["models"][m], figure) for m in models)
        lines.append(f"| {platform} | {task} | {cell['n']:,} | {cell['users']:,} | {cell['base_rate']:.3f} | {values} |")
    means = " | ".join(with_half(mean_over(cells, m, figure), figure) for m in models)
    lines.append(f"| **macro** | | | | | {means} |")
    return "\n".join(lines)


def with_half(found: dict, figure: str) -> str:
    """A figure to four places, and half of its interval where it has draws."""
    value, draws = found[figure], found.get(f"{figure}_draws")
    if draws is None:
        return f"{value:.4f}"
    at = metrics.interval(value, draws)
    return f"{value:.4f} ±{(at.high - at.low) / 2:.3f}"


def mean_over(cells: dict, model: str, figure: str) -> dict:
    """Figure and, where they are there, its draws: the mean over cells."""
    found = [cell["models"][model] for cell in cells.values()]
    return {name: np.mean([one[name] for one in found], axis=0) for name in (figure, f"{figure}_draws") if name in found[0]}
