"""How well it predicts: student and teacher beside what a user would otherwise pick, on recorded data.

    make bench-quality                 python benchmarks/quality.py [--json FILE] [--quick] [--cache DIR]

    data sets ─► one History ─► the serving fold ─► features ─► models ─► logits of every event ─► figures on test anchors

One prediction an event, and one split in time: train → gap of at least the horizon → validate → gap → test
(`datasets.MATRIX`). Users stay in their natural stream, so a test anchor's state holds what came before it. Everything is
chosen on validation; the test part is only judged. Figures carry user-clustered 95 % bootstrap intervals on the same draws
for every model, so that differences are paired.

Resumable: what a model says of every event is kept in the cache by a key of its settings, of the code and of the data.
Prints JSON as its last line. `--quick`: one seed, fewer draws.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from benchmarks import datasets
from benchmarks.datasets import CELLS, TASKS, TEST, TRAIN, VALIDATE, DataSet
from benchmarks.throughput import machine
from models.artifact import load_prior
from models.config import FoldConfig
from models.fold import FEATURE_NAMES, N_FEATURES
from models.student import StudentConfig
from trainer import boosting, metrics
from trainer.examples import Examples, examples_of, folded, replay
from trainer.fit import Schedule, logits
from trainer.teacher import choose
from trainer.train import affine, train

HEADS_OF = {
    platform: tuple(
        head
        for head in ("click", "purchase", "return", "category")
        if head in spec.tasks or (head == "category" and platform in datasets.WITH_CATEGORIES)
    )
    for platform, spec in datasets.MATRIX.items()
}
PLAIN, PLAIN_DROPOUT = Schedule(epochs=10, batch_events=4096, rate=2e-3, patience=3), 0.3
"""The undistilled student's, chosen on validation: log-loss .5109; .5151 at rate 3e-3 and dropout .1."""
DISTIL = Schedule(epochs=12, batch_events=4096, rate=3e-3, soft_weight=0.9)
"""Every epoch: what the teacher says does not overfit as labels do."""
SHUFFLES = 6
BASELINES = ("boosting", "boosting_tuned", "logistic")


class Bench(NamedTuple):
    data: DataSet
    examples: Examples
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
    next_M = np.where(np.isin(split_M1[:, 0], (-2, TRAIN)), data.category_N[index_M], 0)
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
    for name in ("models/fold.py", "models/student.py", "trainer/fit.py", "trainer/boosting.py", "benchmarks/datasets.py"):
        code.update((datasets.ROOT / name).read_bytes())
    code.update(examples.y_MT.tobytes() + examples.learn_MT.tobytes())
    cache.mkdir(parents=True, exist_ok=True)
    return Bench(data, examples, cache, code.hexdigest()[:12], threads)


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


# ── models: (M, T) logits of every event ─────────────────────────────────────────────────────────────────────────────


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


def base_rate(bench: Bench) -> np.ndarray:
    def fit(of, learn, check, row, task):
        return np.full(len(of), logit(bench.examples.y_MT[of[learn], task].mean()))

    return by_cell(bench, fit)


def user_rate(bench: Bench, strength: float = 5.0) -> np.ndarray:
    """The rate of the user's own anchors whose label had matured by then, pulled to the platform's."""
    examples = bench.examples
    seconds = {"click": 1800.0, "purchase": datasets.DAY_S, **datasets.RETURNS_S}

    def fit(of, learn, check, row, task):
        mean = bench.examples.y_MT[of[learn], task].mean()
        anchor = bench.data.anchor_N[examples.index_M[of]]
        horizon_ms = int(1000 * seconds[TASKS[task]])
        hits, n = _matured_before(examples.user_M[of], examples.ts_M[of], examples.y_MT[of, task], anchor, horizon_ms)
        return logit((hits + strength * mean) / (n + strength))

    return by_cell(bench, fit)


def _matured_before(user, ts, y, anchor, horizon_ms) -> tuple[np.ndarray, np.ndarray]:
    hits, n = np.zeros(len(user)), np.zeros(len(user))
    done = 0
    sum_hits = sum_n = 0.0
    for i in range(len(user)):
        if i == 0 or user[i] != user[i - 1]:
            done = i
            sum_hits = sum_n = 0.0
        while done < i and ts[done] + horizon_ms <= ts[i]:
            if anchor[done]:
                sum_hits, sum_n = sum_hits + y[done], sum_n + 1
            done += 1
        hits[i], n[i] = sum_hits, sum_n
    return hits, n


def cross_fitted(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """Boosting and logistic regression, out of fold on what they learned from."""

    def both() -> np.ndarray:
        examples = bench.examples
        features_MF = examples.columns.features_NF.numpy()
        out = np.full((*examples.y_MT.shape, 2), np.nan, np.float32)
        for row, task in cells_of(bench):
            of = np.flatnonzero(examples.platform_M == row)
            fitted = boosting.cross_fit(
                features_MF[of], examples.y_MT[of, task], examples.learn_MT[of, task], examples.user_M[of], bench.threads
            )
            out[of, task, 0], out[of, task, 1] = fitted.boosting_M, fitted.logistic_M
        return out

    out = cached(bench, "cross_fitted", both)
    return out[:, :, 0], out[:, :, 1]


def tuned(bench: Bench, trials: int) -> np.ndarray:
    features_MF = bench.examples.columns.features_NF.numpy()

    def fit(of, learn, check, row, task):
        y = bench.examples.y_MT[of, task]
        x = features_MF[of]
        return boosting.fit_tuned(x[learn], y[learn], x[check], y[check], trials=trials, threads=bench.threads)(x)

    return cached(bench, f"boosting_tuned-{trials}", lambda: by_cell(bench, fit))


def student(
    bench: Bench, name: str, schedule: Schedule, soft_MT: np.ndarray | None = None, dropout: float = 0.1
) -> np.ndarray:
    """The serving network, trained on all platforms at once."""

    def make() -> np.ndarray:
        trained = train(
            bench.examples,
            student_config(bench.data),
            bench.data.history.categories,
            FoldConfig(),
            schedule,
            prior_logits_3=load_prior(FoldConfig()).calibration_P32[0, :, 1],
            soft_MT=soft_MT,
            dropout=dropout,
        )
        note(f"{name}: kept epoch {trained.fitted.epochs}, validation log-loss {trained.fitted.check_loss:.4f}")
        return logits(trained.network, bench.examples, np.arange(len(bench.examples)))

    return cached(bench, f"{name}-s{schedule.seed}", make)


def logit(p):
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(bench: Bench, models: dict[str, list[np.ndarray]], draws: int, part: int = TEST) -> dict[tuple[str, str], dict]:
    """Cell → n, users, base rate, and for each model (a list of seeds) the mean over seeds of each figure, with draws of AUC
    and log-loss. Probabilities are calibrated on the validation anchors, platform by platform and task by task."""
    examples = bench.examples
    out = {}
    split_M, anchor_M = bench.data.split_N[examples.index_M], bench.data.anchor_N[examples.index_M]
    for (row, task), (platform, name) in zip(cells_of(bench), CELLS, strict=True):
        here = anchor_M & (examples.platform_M == row)
        at, check = np.flatnonzero(here & (split_M == part)), np.flatnonzero(here & (split_M == VALIDATE))
        y, user = examples.y_MT[at, task], examples.user_M[at]
        resamples = metrics.Resamples(user, draws)
        cell = {"n": len(at), "users": len(np.unique(user)), "base_rate": float(y.mean()), "models": {}}
        for model, seeds in models.items():
            figures = []
            for logits_MT in seeds:
                z = logits_MT[at, task]
                slope, offset = affine(logits_MT[check, task], examples.y_MT[check, task], (1.0, 0.0))
                figures.append(_figures(y, z, 1 / (1 + np.exp(-(slope * z + offset))), user, resamples))
            cell["models"][model] = {key: np.mean([each[key] for each in figures], axis=0) for key in figures[0]}
        out[platform, name] = cell
    return out


def _figures(y, z, p, user, resamples: metrics.Resamples) -> dict:
    losses = metrics.log_losses(y, p)
    at_half = metrics.at_threshold(y, p, 0.5)
    return {
        "auc": metrics.auc(y, z),
        "auc_draws": resamples.auc(y, z),
        "user_auc": metrics.grouped_auc(y, z, user),
        "pr_auc": metrics.average_precision(y, z),
        "log_loss": float(losses.mean()),
        "log_loss_draws": resamples.mean(losses),
        "ece": metrics.ece(y, p),
        "predicted_over_actual": metrics.predicted_over_actual(y, p),
        **{f"{name}_at_0.5": value for name, value in at_half._asdict().items()},
    }


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


# ── canaries: a run that trips one is worth nothing ──────────────────────────────────────────────────────────────────


def canaries(bench: Bench) -> dict[str, str]:
    """What went wrong, by canary; empty where nothing did."""
    examples = bench.examples
    features_MF = examples.columns.features_NF.numpy()
    rng = np.random.default_rng(0)
    wrong = {}
    split_M, anchor_M = bench.data.split_N[examples.index_M], bench.data.anchor_N[examples.index_M]
    for (row, task), (platform, name) in zip(cells_of(bench), CELLS, strict=True):
        here = anchor_M & (examples.platform_M == row)
        learn, at = examples.learn_MT[:, task], np.flatnonzero(here & (split_M == TEST))
        learn = np.flatnonzero(learn & here)
        y, x = examples.y_MT[:, task], features_MF
        of_nothing = []
        for _ in range(SHUFFLES):
            predict = boosting.fit_boosting(x[learn], rng.permutation(y[learn]), seeds=(0,), threads=bench.threads)
            of_nothing.append(metrics.auc(y[at], predict(x[at])))
        low, high = around_mean(of_nothing, 0.05 / len(CELLS))
        if low > 0.5 or high < 0.5:
            wrong[f"{platform} {name} shuffled labels"] = f"AUC [{low:.3f}, {high:.3f}]"
        for feature, title in enumerate(FEATURE_NAMES):
            if _tells_too_much(y[at], x[at, feature]):
                wrong[f"{platform} {name} feature {title}"] = "AUC over .95 alone"
        if not _tells_too_much(y[at], y[at] + rng.normal(0, 0.1, len(at))):
            wrong[f"{platform} {name} planted"] = "a feature from the future was not caught"
    again = replay(bench.data.history, FoldConfig(), "cpu", batch=997)
    if again.features_MF[folded(bench.data.history, again)].tobytes() != features_MF.tobytes():
        wrong["replay"] = "features folded in other batches are not the same bytes"
    return wrong


def around_mean(values: list[float], alpha: float) -> tuple[float, float]:
    """The interval of the mean by Student's t. Over shuffles, not over users: what one shuffle teaches leans somewhere by
    chance, and on thousands of anchors that is significant."""
    half = float(stats.t.ppf(1 - alpha / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _tells_too_much(y: np.ndarray, feature: np.ndarray) -> bool:
    alone = metrics.auc(y, feature)
    return max(alone, 1.0 - alone) > 0.95


# ── bars ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bars(cells: dict, config: StudentConfig) -> dict[str, dict]:
    """name → must, aim, value, met (and aim_met): those that this run measures."""
    each = [difference({key: cell}, "distilled", BASELINES) for key, cell in cells.items()]
    macro, loss = difference(cells, "distilled", BASELINES), difference(cells, "distilled", BASELINES, "log_loss")
    teacher = difference(cells, "teacher", BASELINES)
    gained, reachable = difference(cells, "distilled", "student").value, difference(cells, "teacher", "student").value
    eta = gained / reachable if reachable >= 0.005 else float("nan")
    worst_ece = max(cell["models"]["distilled"]["ece"] for cell in cells.values())
    flops = config.flops_per_event()
    losses = [difference({key: cell}, "distilled", BASELINES, "log_loss").value for key, cell in cells.items()]

    def bar(must: str, aim: str, value, met: bool, aim_met: bool) -> dict:
        return {"must": must, "aim": aim, "value": value, "met": bool(met), "aim_met": bool(aim_met)}

    return {
        "student − best baseline, AUC, each cell": bar(
            "point ≥ −.010 and upper end ≥ 0",
            "≥ 0 in 8 of 11 cells",
            {" ".join(key): [round(v, 4) for v in at] for key, at in zip(cells, each, strict=True)},
            all(at.value >= -0.010 and at.high >= 0 for at in each),
            sum(at.value >= 0 for at in each) >= 8,
        ),
        "… macro": bar(
            "≥ −.002", "≥ +.003, interval > 0", list(macro), macro.value >= -0.002, macro.low > 0 and macro.value >= 0.003
        ),
        "… log-loss, macro": bar("not above", "below in every cell", list(loss), loss.value <= 0, max(losses) < 0),
        "teacher − the same, macro": bar(
            "≥ 0", "≥ +.005, interval > 0", list(teacher), teacher.value >= 0, teacher.value >= 0.005 and teacher.low > 0
        ),
        "η": bar("≥ .60", "≥ .85", {"eta": eta, "teacher_minus_student": reachable}, eta >= 0.60, eta >= 0.85),
        "student's work, FLOP": bar("≤ 64,000", "≤ 1/50 of the teacher's", flops, flops <= 64_000, False),
        "debiased ECE, worst cell": bar("≤ .010", "≤ .003", worst_ece, worst_ece <= 0.010, worst_ece <= 0.003),
    }


def table(cells: dict, models: list[str], figure: str) -> str:
    """A Markdown table of one figure."""
    lines = [
        "| platform | task | anchors | users | base rate | " + " | ".join(models) + " |",
        "|---" * (5 + len(models)) + "|",
    ]
    for (platform, task), cell in cells.items():
        values = " | ".join(f"{cell['models'][m][figure]:.4f}" for m in models)
        lines.append(f"| {platform} | {task} | {cell['n']:,} | {cell['users']:,} | {cell['base_rate']:.3f} | {values} |")
    means = " | ".join(f"{np.mean([c['models'][m][figure] for c in cells.values()]):.4f}" for m in models)
    lines.append(f"| **macro** | | | | | {means} |")
    return "\n".join(lines)


def report(result: dict, models: list[str], command: str) -> str:
    """The committed page."""
    cells, machine_ = result["cells"], result["machine"]
    lines = [
        "# Quality on recorded data",
        "",
        f"`{command}`, {result['seeds']} seed(s), {result['draws']} bootstrap draws of users, {machine_['cpu']} with "
        f"{machine_['cores']} cores, Python {machine_['python']}, {result['minutes']} minutes. Written by the command; the "
        "same figures, and more, are in `benchmarks/quality.json`. Which platform has which task, on which anchors and "
        "days: `benchmarks/datasets.py`. complete_journey's provenance is contested (real, or simulated from real). "
        "All populations are selected buyers, so base rates are not those of a shop.",
        "",
        "## Bars",
        "",
        "| bar | must | aim | value | must met | aim met |",
        "|---|---|---|---|---|---|",
    ]
    for name, bar in result["bars"].items():
        met, aim = ("yes" if bar[key] else "**no**" for key in ("met", "aim_met"))
        lines.append(f"| {name} | {bar['must']} | {bar['aim']} | {_short(bar['value'])} | {met} | {aim} |")
    lines += [
        "",
        "The student is one network for all platforms; *distilled* is the same, taught by *teacher*. Values of two ",
    ]
    lines[-1] += (
        "brackets are point [low, high], paired, 95 %, users resampled; the best baseline is chosen in each cell, on test."
    )
    for figure, title in (("auc", "AUC"), ("log_loss", "Log-loss, calibrated on validation"), ("pr_auc", "PR-AUC")):
        lines += ["", f"## {title}", "", table(cells, models, figure)]
    lines += ["", "## The teacher's members", ""]
    lines += [f"- {name}: {reason}" for name, reason in result["teacher"]["reasons"].items()]
    wrong = [f"- {name}: {what}" for name, what in result["canaries"].items()]
    lines += ["", "## Canaries", "", *(wrong or ["None tripped: shuffled labels, planted future, single features, replay."])]
    return "\n".join(lines) + "\n"


def _short(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_short(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        point, low, high = value
        return f"{point:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def plain(value):
    """For JSON: arrays of draws are left out."""
    if isinstance(value, dict):
        return {" ".join(k) if isinstance(k, tuple) else k: plain(v) for k, v in value.items() if "draws" not in k}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return float(value) if isinstance(value, (np.floating, float)) else value


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    started, seeds, draws = time.monotonic(), range(1 if arguments.quick else 3), 100 if arguments.quick else 400
    bench = prepare(arguments.data, arguments.cache, arguments.threads)
    note(f"{len(bench.examples)} events of {len(bench.data.history.users)} users, {len(FEATURE_NAMES)} features")
    wrong = canaries(bench)
    models = {"base_rate": [base_rate(bench)], "user_rate": [cached(bench, "user_rate", lambda: user_rate(bench))]}
    boosted, regressed = cross_fitted(bench)
    models |= {"logistic": [regressed], "boosting": [boosted]}
    models["boosting_tuned"] = [tuned(bench, 4 if arguments.quick else 12)]
    members = {"boosting": boosted, "logistic": regressed}
    kept, reasons = choose(bench.examples, members)
    models["teacher"] = [np.mean([members[name] for name in kept], axis=0)]
    models["student"] = [student(bench, "student", PLAIN._replace(seed=s), dropout=PLAIN_DROPOUT) for s in seeds]
    taught_M1 = bench.data.taught_N[bench.examples.index_M][:, None]
    soft_MT = np.where(taught_M1, models["teacher"][0], np.nan).astype(np.float32)
    models["distilled"] = [student(bench, "distilled", DISTIL._replace(seed=s), soft_MT) for s in seeds]
    cells = judge(bench, models, draws)
    result = {
        "bars": bars(cells, student_config(bench.data)),
        "teacher": {"kept": kept, "reasons": reasons},
        "canaries": wrong,
        "cells": cells,
        "seeds": len(seeds),
        "draws": draws,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": machine(),
    }
    for figure in ("auc", "log_loss"):
        note(f"{figure}\n{table(cells, list(models), figure)}")
    for name, bar in result["bars"].items():
        note(f"{'met   ' if bar['met'] else 'MISSED'} {name}: {plain(bar['value'])} (must {bar['must']}, aim {bar['aim']})")
    for name, what in wrong.items():
        note(f"CANARY {name}: {what}")
    if arguments.report:
        flags = " ".join(["--quick"] * arguments.quick)
        arguments.report.write_text(
            report(result, list(models), f'make bench-quality ARGS="{flags}"'.replace(' ARGS=""', ""))
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(plain(result), indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(plain(result), ensure_ascii=False), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("CROSSCURRENT_DATA") or datasets.ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(shared))
    parser.add_argument("--cache", type=Path, default=datasets.ROOT / ".crosscurrent" / "quality")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--report", type=Path, help="write the result as Markdown here")
    parser.add_argument("--quick", action="store_true", help="one seed, 100 draws, 4 trials of tuning")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    sys.exit(main(parser.parse_args()))
