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
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import (
    ablations,
    canaries,
    datasets,
    freshness,
    plots,
    ranking,
    rounds,
    served,
    simulated,
    strangers,
    transfer,
)
from benchmarks.baselines import BASELINES, models_of, teachers_work
from benchmarks.cells import (
    Bench,
    Section,
    bar,
    by_chance,
    difference,
    judge,
    note,
    prepare,
    student_config,
    table,
    with_half,
)
from benchmarks.datasets import CELLS, MATRIX
from benchmarks.throughput import machine
from models.fold import FEATURE_NAMES
from models.student import StudentConfig
from trainer import metrics

FIGURES = {
    "auc": "AUC",
    "user_auc": "AUC within users, weighted by their anchors",
    "pr_auc": "PR-AUC",
    "log_loss": "Log-loss, calibrated on validation",
    "refreshed_log_loss": "Log-loss, calibrated anew in each of 20 parts of the test's time, by what was known then",
    "refreshed_ece": "Debiased ECE, calibrated anew",
    "refreshed_ece_of_users": "The same, less what chance adds where a user's events err together",
    "refreshed_predicted_over_actual": "Predicted over actual, calibrated anew",
}
SECTIONS: dict[str, Callable[[Bench, bool], Section]] = {
    "ablations": ablations.measure,
    "ranking": ranking.measure,
    "served": served.measure,
    "strangers": strangers.measure,
    "rounds": rounds.measure,
    "transfer": transfer.measure,
    "simulated": simulated.measure,
    "freshness": freshness.measure,
}
"""Name → `measure(bench, quick)`: what the main table does not hold, each a module of its own beside this one."""


QUICK = datasets.ROOT / "benchmarks" / "quick.json"
"""What `--quick --json` wrote, run alone with an empty cache."""


# ── bars ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bars(cells: dict, config: StudentConfig, teachers_flops: dict[str, int]) -> dict[str, dict]:
    """name → must, aim, value, met (and aim_met): those that this run measures. `teachers_flops`: by platform."""
    each = [difference({key: cell}, "distilled", BASELINES) for key, cell in cells.items()]
    macro, loss = difference(cells, "distilled", BASELINES), difference(cells, "distilled", BASELINES, "log_loss")
    teacher = difference(cells, "teacher", BASELINES)
    gained, reachable = difference(cells, "distilled", "student").value, difference(cells, "teacher", "student").value
    eta = gained / reachable if reachable >= 0.005 else float("nan")
    flops = config.flops_per_event()
    losses = [difference({key: cell}, "distilled", BASELINES, "log_loss").value for key, cell in cells.items()]
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
        "student's work, FLOP": bar(
            "≤ 64,000",
            "≤ 1/50 of the teacher's",
            {"student": flops} | {f"teacher on {platform}": work for platform, work in teachers_flops.items()},
            flops <= 64_000,
            50 * flops <= min(teachers_flops.values()),
        ),
        **calibration_bars(cells),
    }


def quick_bar(quick: dict) -> dict:
    """Of the result of a run with `--quick`."""
    minutes, empty = quick["minutes"], quick["cache_was_empty"]
    value = {"minutes": minutes, "the whole": "never run from an empty cache in one go"}
    return bar("≤ 15 min on two cores", "the whole, resumable, ≤ 6 h", value, empty and minutes <= 15.0, False)


def calibration_bars(cells: dict) -> dict[str, dict]:
    """By squares, from which chance is taken off without a bound at 0: over all cells, and none surely above, as the gate
    reads a cell. And the worst cell's point, which a perfectly calibrated model does not bring to .010 either."""
    found = [cell["models"]["distilled"] for cell in cells.values()]
    squares = [one["refreshed_ece_square"] for one in found]
    macro = metrics.ece_interval(
        float(np.mean(squares)), np.mean([one["refreshed_ece_square_draws"] for one in found], axis=0)
    )
    above = {
        limit: [" ".join(key) for key, cell in cells.items() if calibration_error(cell).low > limit]
        for limit in (0.010, 0.003)
    }
    plain, of_users = ([one[key] for one in found] for key in ("refreshed_ece", "refreshed_ece_of_users"))
    worst = {"worst cell": max(plain), "of users": max(of_users), "mean over cells": float(np.mean(plain))}
    worst |= {"of users, mean": float(np.mean(of_users)), "calibrated once": max(one["ece"] for one in found)}
    return {
        "debiased ECE, matured, macro; no cell surely above": bar(
            "≤ .010",
            "≤ .003",
            {"macro": list(macro), "surely above .010": above[0.010], "surely above .003": above[0.003]},
            macro.value <= 0.010 and not above[0.010],
            macro.value <= 0.003 and not above[0.003],
        ),
        "… the worst cell, at the point": bar(
            "≤ .010", "≤ .003", worst | perfectly_calibrated(cells), max(plain) <= 0.010, max(plain) <= 0.003
        ),
    }


def calibration_error(cell: dict, model: str = "distilled") -> metrics.Interval:
    """Calibrated anew, of users, as the gate reads it."""
    found = cell["models"][model]
    return metrics.ece_interval(found["refreshed_ece_square"], found["refreshed_ece_square_draws"])


def perfectly_calibrated(cells: dict) -> dict[str, float]:
    """What the calibration errors of a model whose probabilities are right come to on these anchors."""
    plain_CD, users_CD = np.stack([cell["right_ece_draws"] for cell in cells.values()], axis=1)
    return {
        "a perfect model, mean over cells": float(np.median(plain_CD.mean(axis=0))),
        "a perfect model, worst cell": float(np.median(plain_CD.max(axis=0))),
        "a perfect model, of users, mean": float(np.median(users_CD.mean(axis=0))),
        "a perfect model, of users, worst": float(np.median(users_CD.max(axis=0))),
        "chance that its worst cell is ≤ .010": float(np.mean(plain_CD.max(axis=0) <= 0.010)),
        "the same, of users": float(np.mean(users_CD.max(axis=0) <= 0.010)),
    }


def calibration_errors(cells: dict) -> list[str]:
    """The distilled student's with their intervals, and what they would be by chance alone; Markdown."""
    lines = [
        "What a perfectly calibrated model would show is drawn from the same anchors: a bin's errors without their mean, "
        "with a random sign for each user (`trainer.metrics.as_if_calibrated`). Median, and what one draw in twenty "
        "exceeds:",
        "",
        "| platform | task | calibration error | of users | a perfect model's | a perfect model's, of users |",
        "|---|---|---|---|---|---|",
    ]
    for key, cell in cells.items():
        plain, users = ("{:.4f}, {:.4f}".format(*np.quantile(draws, [0.5, 0.95])) for draws in cell["right_ece_draws"])
        error = f"{cell['models']['distilled']['refreshed_ece']:.4f}"
        lines.append(f"| {' | '.join(key)} | {error} | {_short(list(calibration_error(cell)))} | {plain} | {users} |")
    return lines


def within_users(cells: dict) -> list[str]:
    """What those figures are of; Markdown."""
    lines = [
        "Of users with both outcomes. Below .5 is no error: within a user what comes true lies before what does not (a "
        "history ends by nothing coming), while his counts grow. Ranked by nothing but their time the same anchors have:",
        "",
        "| platform | task | anchors | users with both outcomes | AUC within users, of the time |",
        "|---|---|---|---|---|",
    ]
    for key, cell in cells.items():
        both = cell["both_outcomes"]
        lines.append(f"| {' | '.join(key)} | {both['n']:,} | {both['users']:,} | {both['auc_of_time']:.4f} |")
    return lines


def at_half(cells: dict) -> list[str]:
    """Decisions at one threshold; Markdown."""
    shown, figures = ("boosting", "teacher", "distilled"), ("accuracy", "precision", "recall", "f1")
    lines = [
        "Accuracy / precision / recall / F1 ± half of its interval, of probabilities calibrated on validation.",
        "",
        f"| platform | task | anchors | users | base rate | {' | '.join(shown)} |",
        "|---" * (5 + len(shown)) + "|",
    ]
    for key, cell in cells.items():
        values = []
        for model in shown:
            found = cell["models"][model]
            three = " / ".join(f"{found[f'{figure}_at_0.5']:.3f}" for figure in figures[:3])
            values.append(f"{three} / {with_half(found, 'f1_at_0.5')}")
        about = f"{cell['n']:,} | {cell['users']:,} | {cell['base_rate']:.3f}"
        lines.append(f"| {' | '.join(key)} | {about} | {' | '.join(values)} |")
    return lines


def without_cap(cells: dict, models: list[str]) -> str:
    """Of cells that are judged on all anchors of their users; Markdown."""
    lines = [
        "## Retailrocket without the cap on a user's anchors",
        "",
        "The matrix caps a user at 50 anchors, and so does all of this report. The number of anchors that it states, its "
        "base rates and the figures that the zero-shot bar was set by are of all anchors, 42 % of them of ten users. AUC:",
        "",
        table(cells, models, "auc"),
        "",
        "| platform | task | distilled − best baseline | teacher − best baseline |",
        "|---|---|---|---|",
    ]
    for key, cell in cells.items():
        ours, teachers = (list(difference({key: cell}, name, BASELINES)) for name in ("distilled", "teacher"))
        lines.append(f"| {' | '.join(key)} | {_short(ours)} | {_short(teachers)} |")
    return "\n".join(lines)


def tables(figures: dict, models: list[str]) -> str:
    """The main section's text."""
    lines = [
        f"*student* and *distilled*: the mean of {figures['seeds']} seed(s); the other models are one fit each. ± is half "
        f"of the 95 % interval over {figures['draws']} bootstrap draws of users. The student is one network for all "
        "platforms; *distilled* is the same, taught by *teacher*. The best baseline is chosen in each cell, on test."
    ]
    for figure, title in FIGURES.items():
        lines += ["", f"## {title}", "", table(figures["cells"], models, figure)]
        lines += ["", *within_users(figures["cells"])] if figure == "user_auc" else []
    lines += ["", "## At probability .5", "", *at_half(figures["cells"])]
    lines += ["", "Calibration of the distilled student, calibrated anew:", ""]
    lines += ["![calibration](plots/calibration.svg)", "", *calibration_errors(figures["cells"])]
    lines += ["", without_cap(figures["without cap"], models)]
    lines += ["", "## The teacher's members", ""]
    lines += [f"- {name}: {reason}" for name, reason in figures["teacher"]["reasons"].items()]
    wrong = [f"- {name}: {what}" for name, what in figures["canaries"].items()]
    none = (
        "None tripped: shuffled labels, single features, the future, replay (`benchmarks/canaries.py`); both plants caught."
    )
    lines += ["", "## Canaries", "", *(wrong or [none])]
    return "\n".join(lines)


def report(result: dict, texts: list[str], command: str) -> str:
    """The committed page."""
    machine_ = result["machine"]
    lines = [
        "# Quality on recorded data",
        "",
        f"`{command}`, {machine_['cpu']} with {machine_['cores']} cores, Python {machine_['python']}, {result['minutes']} "
        "minutes (what was in the cache is not counted). Written by the command; the same figures, and more, are in "
        "`benchmarks/quality.json`. Which platform has which task, on which anchors and days: `benchmarks/datasets.py`. "
        "complete_journey's provenance is contested (real, or simulated from real). All populations are selected buyers, "
        "so base rates are not those of a shop. The test days have been looked at more than once while this was built; "
        "where a choice followed from it, DECISIONS.md says so.",
        "",
        "## Bars",
        "",
        "Values of two brackets are point [low, high], paired, 95 %, users resampled. Three bars are met in one reading and "
        "missed in another, and both stand here: the calibration error (over all cells by squares less chance; the worst "
        "cell, and the means with a bound at 0), Bayes − teacher (of what can be known from the events; of the hidden "
        "state), interest shift (by a head that no worker serves, in all worlds; in the one of the other figures its "
        "interval holds 0).",
        "",
        "| bar | must | aim | value | must met | aim met |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in result["bars"].items():
        met, aim = ("yes" if one[key] else "**no**" for key in ("met", "aim_met"))
        lines.append(f"| {name} | {one['must']} | {one['aim']} | {_short(one['value'])} | {met} | {aim} |")
    return "\n".join([*lines, "", *("\n" + text.strip("\n") + "\n" for text in texts)])


def _short(value) -> str:
    """A bar's value in one line: [point, low, high], numbers, words, or several of them by name."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {_short(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        if len(value) == 3 and all(isinstance(part, (int, float)) for part in value):
            point, low, high = value
            return f"{point:+.4f} [{low:+.4f}, {high:+.4f}]"
        return ", ".join(_short(part) for part in value) or "none"
    return (
        f"{value:.4f}" if isinstance(value, (float, np.floating)) else f"{value:,}" if isinstance(value, int) else str(value)
    )


def plain(value):
    """For JSON: arrays of draws are left out, their 95 % interval stands beside the figure."""
    if isinstance(value, dict):
        out = {" ".join(k) if isinstance(k, tuple) else k: plain(v) for k, v in value.items() if "draws" not in k}
        for name, draws in value.items():
            figure = name.removesuffix("_draws") if isinstance(name, str) else name
            if figure != name and figure in value and np.ndim(draws) == 1:
                out[f"{figure}_interval"] = list(metrics.interval(value[figure], draws)[1:])
        return out
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    return float(value) if isinstance(value, (np.floating, float)) else value


def main_table(bench: Bench, quick: bool) -> tuple[Section, dict[str, str]]:
    """→ the section; canaries that tripped."""
    seeds, draws = range(1 if quick else 3), 100 if quick else 400
    wrong = canaries.tripped(bench)
    models, kept, reasons = models_of(bench, seeds, 4 if quick else 12)
    platforms = bench.data.history.platforms
    why = {f"{platforms[row - 1]}, {member}": reason for (row, member), reason in reasons.items()}
    cells = judge(bench, models, draws)
    for figure in ("auc", "log_loss"):
        note(f"{figure}\n{table(cells, list(models), figure)}")
    for key, draws_2D in by_chance(bench, models["distilled"][0], draws).items():
        cells[key]["right_ece_draws"] = draws_2D
    data = bench.data._replace(anchor_N=bench.data.uncapped_N)
    capped = [(platform, task) for platform, task in CELLS if MATRIX[platform].capped]
    without = judge(bench._replace(data=data), models, draws, cells=capped)
    curves = {" ".join(key): tuple(cell["models"]["distilled"]["refreshed_curve"]) for key, cell in cells.items()}
    if not quick:  # the committed plot is of the whole
        plots.calibration("calibration", curves)
    figures = {"cells": cells, "without cap": without, "teacher": {"reasons": why}, "canaries": wrong}
    figures |= {"seeds": len(seeds), "draws": draws}
    return Section(
        bars(cells, student_config(bench.data), teachers_work(bench, kept)), figures, tables(figures, list(models))
    ), wrong


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    started, empty = time.monotonic(), not arguments.cache.exists() or not any(arguments.cache.iterdir())
    bench = prepare(arguments.data, arguments.cache, arguments.threads)
    note(f"{len(bench.examples)} events of {len(bench.data.history.users)} users, {len(FEATURE_NAMES)} features")
    wrong, sections = {}, {}
    if not arguments.only or "cells" in arguments.only:
        sections["cells"], wrong = main_table(bench, arguments.quick)
    for name in arguments.only or ([] if arguments.quick else SECTIONS):
        if name in SECTIONS:
            sections[name] = SECTIONS[name](bench, arguments.quick)
            note(f"{name}: done")
    result = {
        "bars": {name: one for section in sections.values() for name, one in section.bars.items()},
        "sections": {name: section.figures for name, section in sections.items()},
        "minutes": round((time.monotonic() - started) / 60, 1),
        "cache_was_empty": empty,
        "machine": machine(),
    }
    if not arguments.quick and not arguments.only:
        result["bars"]["`make bench-quality ARGS=--quick`"] = quick_bar(json.loads(QUICK.read_text()))
    for name, one in result["bars"].items():
        note(f"{'met   ' if one['met'] else 'MISSED'} {name}: {plain(one['value'])} (must {one['must']}, aim {one['aim']})")
    for name, what in wrong.items():
        note(f"CANARY {name}: {what}")
    if arguments.report:
        arguments.report.write_text(report(result, [section.text for section in sections.values()], _command(arguments)))
    if arguments.json:
        arguments.json.write_text(json.dumps(plain(result), indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(plain(result), ensure_ascii=False), flush=True)
    return 1 if wrong else 0


def _command(arguments: argparse.Namespace) -> str:
    flags = ["--quick"] * arguments.quick + [f"--only {name}" for name in arguments.only or ()]
    return f'make bench-quality ARGS="{" ".join(flags)}"' if flags else "make bench-quality"


def parser() -> argparse.ArgumentParser:
    shared = os.environ.get("CROSSCURRENT_DATA") or datasets.ROOT.parent / "shared" / "data"
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", type=Path, default=Path(shared))
    out.add_argument("--cache", type=Path, default=datasets.ROOT / ".crosscurrent" / "quality")
    out.add_argument("--json", type=Path, help="also write the result here")
    out.add_argument("--report", type=Path, help="write the result as Markdown here")
    out.add_argument("--quick", action="store_true", help="one seed, 100 draws, 4 trials of tuning")
    out.add_argument("--only", action="append", choices=["cells", *SECTIONS], help="this section (may be repeated)")
    out.add_argument("--threads", type=int, default=os.cpu_count())
    return out


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
