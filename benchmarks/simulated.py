"""What only the simulator can show: how much of what can be known is learned.

    Simulator.stream ─► platform files ─► History ─► the serving fold ─► Examples ─┬─► models ─► logits (M, T) ─► figures
            └─► the ledger: the true probability of each label ────────────────────┘            beside the truth's own

Records go through the platform files and arrive late, out of order, twice or malformed, as in production. Labels are those
of `trainer/labels.py`; accounts that are linked are one user. Beside Bayes (the hidden state itself) stands the observer
(`benchmarks/observer.py`), who sees events only: what a model can reach at best.

Shapes: M folded events, T tasks (click, purchase, return, shift). Freshness is `benchmarks/freshness.py`.
Knows nothing of the recorded data.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from msgspec import structs
from numba import njit

from benchmarks import datasets, interest, observer
from benchmarks.cells import CODE, Bench, Section, bar, cached, difference, digest, logit, named, note, table
from benchmarks.datasets import DAY_MS, ROOT, TEST, TRAIN, VALIDATE
from models.artifact import load_prior
from models.config import FoldConfig, HorizonsConfig
from models.errors import EventRefused
from models.events import BINARY_HEADS, HEADS, IMPRESSION, CanonicalEvent
from models.fold import N_FEATURES
from models.student import StudentConfig
from streams.platforms import load_platforms
from streams.simulator import HAS_CLICK, PLATFORMS, SPREAD, Simulator, SimulatorConfig, Truth
from trainer import boosting, metrics
from trainer.examples import Examples, examples_of, folded, replay
from trainer.fit import Network, Schedule
from trainer.history import History
from trainer.labels import horizons_ms, make_labels
from trainer.markov import hidden_markov
from trainer.rates import matured_counts, rate_features
from trainer.teacher import Reasons, choose, mean_of, recurrence
from trainer.train import Trained, affine, train
from trainer.transformer import TransformerConfig
from trainer.transformer_fit import fit_transformer

matplotlib.use("Agg")
PLOTS = Path(__file__).parent / "plots"
TRIALS = 4
"""Random settings that tuned LightGBM tries in each cell."""
SHOPPERS, DAYS = SimulatorConfig(n_shoppers=3000), 78.0
PARTS = (3.0, 42.0), (49.0, 53.0), (60.0, 70.0)
"""Days of train, validate and test; a gap of the longest horizon after each."""
TASKS = (*BINARY_HEADS, "shift")
SHIFT = TASKS.index("shift")
"""Served by no model; the student's head of it exists while it learns."""
LEAST_BEFORE, LEAST_AFTER = 5, 3
"""Acts with a category that an anchor of `shift` has in the 30 days up to it and in the 7 days after."""
PLAIN = Schedule(epochs=8, batch_events=4096, rate=2e-3, patience=2, dropout=0.3)
DISTIL = Schedule(epochs=12, batch_events=4096, rate=3e-3, soft_weight=0.9)
RESIDUAL = Schedule(epochs=8, batch_events=2048, rate=2e-3, patience=3)
MARGIN = 1.0
"""Standard errors by which the teacher must do better without a member for that to be dropped (`trainer.teacher.choose`):
there are four validation days. Chosen in two other worlds (seeds 1 and 2)."""
LIGHTGBM = ("boosting", "boosting_tuned")
FURTHER = (1, 2, 3, 4, 5, 6)
"""Seeds of further worlds, in which interest shift alone is judged: one world has too few independent weeks."""
SHIFT_BASELINES = ("main_share", "entropy", "short_vs_long", "user_rate", "logistic", *LIGHTGBM)


class World(NamedTuple):
    """A simulated stream as the trainer sees it, and what nobody sees. M folded events, in the order of Examples."""

    history: History
    examples: Examples
    truth_M3: np.ndarray
    """P(click), P(purchase), P(return), NaN where the platform cannot have it."""
    day_M: np.ndarray
    """Since the start."""
    part_M: np.ndarray
    """int8: TRAIN, VALIDATE, TEST or −1."""
    visible_M: np.ndarray
    """bool: the user's sessions are all of the shopper's."""
    shift: Shift


class Shift(NamedTuple):
    """Main categories of n events of the history, by the acts on the event's own platform."""

    y_N: np.ndarray
    """bool: the main category of the next 7 days is none of the last 30 days'."""
    known_N: np.ndarray
    """bool: enough acts before and after."""
    main_share_N: np.ndarray
    entropy_N: np.ndarray
    """Of the last 30 days."""


# ── the stream ───────────────────────────────────────────────────────────────────────────────────────────────────────


def arrivals(config: SimulatorConfig, days: float, linked: bool = True) -> tuple[list[CanonicalEvent], list[Truth | None]]:
    """Accepted records of the first days in the order of arrival, duplicates too, and their truth (None: a duplicate's).
    The user is a linked person, else an account; without `linked`, always an account."""
    simulator = Simulator(config)
    platforms = {platform.name: platform for platform in load_platforms(None, PLATFORMS)}
    person = {(platform, user): who for platform, user, who in simulator.identity_links()} if linked else {}
    until_ms = config.start_ms + days * DAY_MS
    events, truths = [], []
    for i, record in enumerate(simulator.stream()):
        if record.arrives_ms >= until_ms:
            break
        where = {"topic": record.topic, "partition": 0, "offset": i}
        try:
            event = platforms[record.platform].canonicalise(
                record.value, **where, now_ms=record.arrives_ms, future_tolerance_ms=300_000
            )
        except EventRefused:
            if record.expected != "refuse":
                raise
            continue
        event.user = person.get((event.platform, event.user), f"{event.platform}:{event.user}")
        event.platform = sys.intern(event.platform)
        events.append(event)
        truths.append(record.truth)
    return events, truths


def make_world(config: SimulatorConfig, days: float, parts=PARTS, linked: bool = True) -> World:
    """Folds the stream of the first days and says of each event what came of it."""
    events, truths = arrivals(config, days, linked)
    history, fold = datasets._as_history(events, PLATFORMS), FoldConfig()
    labels, shift = make_labels(history, fold, HorizonsConfig()), shifts(history)
    replayed = replay(history, fold, "cpu")
    at = folded(history, replayed)
    index_M = replayed.index_M[at]
    nothing = (np.nan,) * 3
    truth_N3 = np.array([nothing if t is None else (t.click, t.purchase, t.return_) for t in truths], float)
    truth_M3, day_M = truth_N3[index_M], (history.events["ts"][index_M] - config.start_ms) / DAY_MS
    part_M = np.full(len(at), -1, np.int8)
    for part, (start, stop) in enumerate(parts):
        part_M[(day_M >= start) & (day_M < stop)] = part
    can_MT = np.column_stack([~np.isnan(truth_M3), shift.known_N[index_M]])
    next_M = np.where(part_M == TRAIN, labels.category_N[index_M], 0).astype(np.uint32)
    examples = examples_of(
        history,
        replayed,
        at,
        student_config(),
        tasks=TASKS,
        y_MT=np.column_stack([labels.y_N3, shift.y_N])[index_M].astype(np.float32),
        learn_MT=can_MT & (part_M == TRAIN)[:, None],
        check_MT=can_MT & (part_M == VALIDATE)[:, None],
        next_M=next_M,
        learn_next_M=next_M != 0,
    )
    visible_M = np.isin(history.users, visible(config))[examples.user_M]
    shift = Shift(*(column[index_M] for column in shift))
    return World(history, examples, truth_M3, day_M, part_M, visible_M, shift)


def student_config() -> StudentConfig:
    heads = {p: HEADS if has_click else HEADS[1:] for p, has_click in zip(PLATFORMS, HAS_CLICK, strict=True)}
    return StudentConfig.of("cpu", N_FEATURES, PLATFORMS, heads)


def visible(config: SimulatorConfig) -> list[str]:
    """Users, as `arrivals` names them, whose sessions are all seen: linked persons and persons of one account."""
    simulator = Simulator(config)
    several = (SPREAD > 0).sum(1)[simulator.shoppers.profile] > 1
    users = [f"person-{person}" for person in np.flatnonzero(simulator.linked).tolist()]
    for person in np.flatnonzero(~several).tolist():
        p = int(np.argmax(SPREAD[simulator.shoppers.profile[person]]))
        users.append(f"{PLATFORMS[p]}:{simulator.account(p, person)}")
    return users


# ── interest shift ───────────────────────────────────────────────────────────────────────────────────────────────────


def shifts(history: History) -> Shift:
    """Labels of `shift` and what a count of the last 30 days says. Impressions are the platform's doing, so acts count
    only; categories are each platform's own, so its acts only. Where several categories come first in the last 30 days,
    any of them is no shift; of the next 7 days, the one that came first in time counts."""
    events = history.events
    group = history.user.astype(np.int64) * len(history.platforms) + history.platform
    order = np.lexsort((events["ts"], group))
    acts = (events["kind"] != IMPRESSION) & (events["category"] != 0)
    names, category = np.unique(events["category"], return_inverse=True)
    columns = _shifts(group[order], events["ts"][order], category[order], acts[order], len(names))
    out = []
    for column in columns:
        back = np.empty_like(column)
        back[order] = column
        out.append(back)
    return Shift(*out)


@njit(cache=True)
def _shifts(group, ts, category, acts, n_categories):
    n = len(group)
    day = 86_400_000
    y, known = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    share, entropy = np.zeros(n), np.zeros(n)
    before, after = np.zeros(n_categories), np.zeros(n_categories)
    first = 0
    for i in range(n):
        if i == 0 or group[i] != group[i - 1]:
            first = i
        while ts[first] <= ts[i] - 30 * day:
            first += 1
        before[:] = 0.0
        after[:] = 0.0
        j = first
        while j < n and group[j] == group[i] and ts[j] <= ts[i]:
            before[category[j]] += acts[j]
            j += 1
        future = j
        while j < n and group[j] == group[i] and ts[j] <= ts[i] + 7 * day:
            after[category[j]] += acts[j]
            j += 1
        total, most = before.sum(), before.max()
        for count in before:
            if count > 0:
                entropy[i] -= count / total * np.log(count / total)
        share[i] = most / max(total, 1.0)
        while future < j and not (acts[future] and after[category[future]] == after.max()):
            future += 1
        known[i] = total >= LEAST_BEFORE and after.sum() >= LEAST_AFTER
        y[i] = known[i] and before[category[future]] < most
    return y, known, share, entropy


def short_vs_long(views_M: np.ndarray) -> np.ndarray:
    """(M,) Jensen–Shannon distance of the row's two mixes of categories, of a day and of thirty."""
    out = np.empty(len(views_M))
    for i, view in enumerate(views_M):
        both = {}
        for which in ("short", "long"):
            weight = view[f"{which}_weight"].astype(float)
            for key, w in zip(view[f"{which}_category"].tolist(), weight / max(weight.sum(), 1e-12), strict=True):
                if w > 0:
                    both.setdefault(key, [0.0, 0.0])[which == "long"] += w
        p = np.array(list(both.values()) or [[0.0, 0.0]])
        middle = p.mean(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            out[i] = np.sqrt(max(0.0, np.nansum(np.where(p > 0, p * np.log2(p / middle), 0.0)) / 2))
    return out


@njit(cache=True)
def _own_rate(user, ts, y, known, horizon_ms, mean, strength):
    """(M,) rate of the user's own anchors that had matured, pulled to the mean; sorted by user, then arrival."""
    out = np.empty(len(user))
    start = 0
    for i in range(len(user)):
        if i == 0 or user[i] != user[i - 1]:
            start = i
        hits = total = 0.0
        for j in range(start, i):
            if known[j] and ts[j] + horizon_ms <= ts[i]:
                hits += y[j]
                total += 1.0
        out[i] = (hits + strength * mean) / (total + strength)
    return out


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def keyed(bench: Bench, world: World) -> Bench:
    """The cache of a world: by what was simulated and the code that made it and learns from it."""
    code = hashlib.sha256()
    for name in (*CODE, "trainer/transformer.py", "trainer/transformer_fit.py"):
        code.update((ROOT / name).read_bytes())
    for array in (world.examples.y_MT, world.examples.learn_MT, world.examples.columns.features_NF.numpy()):
        code.update(array.tobytes())
    return bench._replace(examples=world.examples, key=code.hexdigest()[:12])


def boosted(bench: Bench, trials: int) -> dict[str, np.ndarray]:
    """The baselines, a model a platform × task (NaN where no label is): boosting fixed and tuned, and logistic regression,
    cross-fitted, as the teacher has it too."""
    x_MF = bench.examples.columns.features_NF.numpy()

    def fixed(x, y, learn, check, user):
        return boosting.fit_boosting(x[learn], y[learn], threads=bench.threads)(x)

    def tuned(x, y, learn, check, user):
        return boosting.fit_tuned(x[learn], y[learn], x[check], y[check], trials=trials, threads=bench.threads)(x)

    return {
        "boosting": cached(bench, "simulated-boosting", lambda: every(bench, x_MF, fixed)),
        "logistic": crossed(bench, "logistic", boosting.fit_logistic, x_MF),
        "boosting_tuned": cached(bench, f"simulated-tuned-{trials}", lambda: every(bench, x_MF, tuned)),
    }


def every(bench: Bench, inputs_MX: np.ndarray, fit: Callable[..., np.ndarray]) -> np.ndarray:
    """(M, T) logits that `fit` gives for each platform × task, NaN where no label is."""
    examples = bench.examples
    out = np.full(examples.y_MT.shape, np.nan, np.float32)
    for row in range(1, 1 + len(PLATFORMS)):
        of = np.flatnonzero(examples.platform_M == row)
        for task in range(len(TASKS)):
            learn, check = examples.learn_MT[of, task], examples.check_MT[of, task]
            if learn.any():
                out[of, task] = fit(inputs_MX[of], examples.y_MT[of, task], learn, check, examples.user_M[of])
    return out


def crossed(bench: Bench, name: str, fit: Callable[..., boosting.Predict], inputs_MX: np.ndarray) -> np.ndarray:
    def one(x, y, learn, check, user):
        seeds = boosting.bag(int(learn.sum()))
        return boosting.cross_fit(fit, x, y, learn, user, seeds=seeds, threads=bench.threads).logit_M

    return cached(bench, f"simulated-{name}", lambda: every(bench, inputs_MX, one))


def with_own_rates(world: World) -> Examples:
    """The examples with the user's own matured label rates, for the teacher."""
    examples = world.examples
    known_MT = np.column_stack([~np.isnan(world.truth_M3), world.shift.known_N])
    horizons_ms_T = np.append(horizons_ms(HorizonsConfig())[: len(BINARY_HEADS)], 7 * int(DAY_MS))
    counts = matured_counts(examples.user_M, examples.ts_M, examples.y_MT, known_MT, horizons_ms_T)
    return replace(examples, own_MR=rate_features(*counts))


def transformer(bench: Bench, offset_MT: np.ndarray, schedule: Schedule = RESIDUAL) -> np.ndarray:
    """(M, T) logits: the offset and what the order of a user's events adds; to `shift`, whose few labels it would learn by
    heart, nothing."""

    def make() -> np.ndarray:
        of = slice(0, len(BINARY_HEADS))
        examples, told_MT = bench.examples, np.nan_to_num(offset_MT[:, of])
        labels = {name: getattr(examples, name)[:, of] for name in ("y_MT", "learn_MT", "check_MT")}
        examples = replace(examples, tasks=BINARY_HEADS, **labels)
        changes = {"next_item_weight": 0.0, "dropout": schedule.dropout}
        config = TransformerConfig.of("cpu", N_FEATURES, PLATFORMS, BINARY_HEADS, **changes)
        fitted = fit_transformer(examples, told_MT, config, schedule)
        note(f"transformer: epoch {fitted.epochs}, log-loss {fitted.check_loss:.4f}, the offset's {fitted.offset_loss:.4f}")
        adds_MT = np.zeros_like(offset_MT)
        adds_MT[:, of] = fitted.logits(examples, told_MT) - told_MT
        return offset_MT + adds_MT

    return cached(bench, f"simulated-transformer-{digest(schedule)}", make)


def student(bench: Bench, history: History, name: str, schedule: Schedule, soft_MT=None) -> np.ndarray:
    """(M, T + 1) logits of the student, and the interest shift as it is served."""

    def make() -> np.ndarray:
        prior_3 = load_prior(FoldConfig()).calibration_P32[0, :, 1]
        trained = train(
            bench.examples, student_config(), history.categories, FoldConfig(), schedule,
            prior_logits_3=prior_3, soft_MT=soft_MT,
        )  # fmt: skip
        note(f"{name}: kept epoch {trained.fitted.epochs}, validation log-loss {trained.fitted.check_loss:.4f}")
        return said(trained, bench.examples)

    return cached(bench, named(f"simulated-{name}", schedule, soft_MT), make)


@torch.inference_mode()
def said(trained: Trained, examples: Examples, users_a_batch: int = 200) -> np.ndarray:
    """(M, T + 1) float32: logits of every event and, last, the interest shift as it is served (NaN none)."""
    network: Network = trained.network.eval()
    out = np.full((len(examples), network.n_tasks + 1), np.nan, np.float32)
    begins = np.flatnonzero(np.r_[True, examples.user_M[1:] != examples.user_M[:-1]])
    for start, stop in zip(begins[::users_a_batch], [*begins[users_a_batch::users_a_batch], len(examples)], strict=True):
        part = slice(start, stop)
        columns = type(examples.columns)(*(column[part] for column in examples.columns))
        logits_NT, gates_NG, _ = network(columns, torch.from_numpy(examples.starts_M[part]))
        served = trained.model.categories.predict(examples.views_M[part], examples.platform_M[part], gates_NG.numpy())
        out[part, :-1], out[part, -1] = logits_NT.numpy(), served[2]
    return out


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(world: World, models: dict[str, np.ndarray], at_M: np.ndarray, draws: int, tasks=BINARY_HEADS) -> dict:
    """(platform, task) → n, users, base rate and of each model's logits (M, T) AUC and log-loss with draws, on the events
    of a mask. Models are calibrated on the validation part, Bayes and the observer are taken at their word."""
    examples, out = world.examples, {}
    for row, platform in enumerate(PLATFORMS, start=1):
        for task, name in enumerate(tasks):
            if name == "click" and not HAS_CLICK[row - 1]:
                continue
            at = np.flatnonzero(at_M & (examples.platform_M == row))
            check = np.flatnonzero(examples.check_MT[:, task] & (examples.platform_M == row))
            y, user = examples.y_MT[at, task], examples.user_M[at]
            resamples = metrics.Resamples(user, draws)
            cell = {"n": len(at), "users": len(np.unique(user)), "base_rate": float(y.mean()), "models": {}}
            for model, logits_MT in models.items():
                z, line = logits_MT[at, task], (1.0, 0.0)
                if model not in ("bayes", "observer"):
                    line = affine(logits_MT[check, task], examples.y_MT[check, task], line, examples.user_M[check])
                losses = metrics.log_losses(y, 1 / (1 + np.exp(-(line[0] * z + line[1]))))
                cell["models"][model] = {
                    "auc": metrics.auc(y, z),
                    "auc_draws": resamples.auc(y, z),
                    "log_loss": float(losses.mean()),
                    "log_loss_draws": resamples.mean(losses),
                }
            out[platform, name] = cell
    return out


def all_models(bench: Bench, world: World, trials: int) -> tuple[dict[str, np.ndarray], Reasons]:
    """→ (M, T) logits of every model, Bayes and the observer included (T: their three); why the teacher's members stayed."""
    models = boosted(bench, trials)
    rated = with_own_rates(world)
    with_rates_MX = np.concatenate([rated.columns.features_NF.numpy(), rated.own_MR], axis=1)
    members = {
        "boosting": crossed(bench, "boosting-rates", boosting.fit_boosting, with_rates_MX),
        "randomised": crossed(bench, "randomised-rates", boosting.fit_randomised, with_rates_MX),
        "logistic": models["logistic"],
    }
    models["offset"] = np.mean([*members.values()], axis=0)
    members["transformer"] = transformer(bench, models["offset"])
    members["recurrence"] = cached(
        bench,
        f"simulated-recurrence-{digest(PLAIN)}",
        lambda: recurrence(student_config(), PLAIN)(rated, np.empty(0)).logits_MT,
    )
    code = digest((ROOT / "trainer" / "markov.py").read_text())
    members["hidden_markov"] = cached(
        bench, f"simulated-hidden-markov-{code}", lambda: hidden_markov()(rated, np.empty(0)).logits_MT
    )
    models["student"] = student(bench, world.history, "plain", PLAIN)
    kept, reasons = choose(bench.examples, members, MARGIN)
    note(f"teacher: {kept}")
    models["transformer"], models["hidden_markov"] = members["transformer"], members["hidden_markov"]
    models["teacher"] = mean_of(members, kept, bench.examples.platform_M)
    taught_MT = (
        ~np.isnan(models["teacher"]) & (world.day_M >= PARTS[TRAIN][0])[:, None] & (world.day_M < PARTS[TEST][0])[:, None]
    )
    taught_MT[:, SHIFT] &= bench.examples.learn_MT[:, SHIFT]  # elsewhere it would say who acts at all in the week to come
    soft_MT = np.where(taught_MT, models["teacher"], np.nan).astype(np.float32)
    models["distilled"] = student(bench, world.history, "distilled", DISTIL, soft_MT)
    kind_M = world.history.events["kind"][bench.examples.index_M]
    sees_M3 = cached(
        bench,
        "simulated-observer",
        lambda: observer.expected_truth(bench.examples.user_M, bench.examples.ts_M, bench.examples.platform_M - 1, kind_M),
    )
    return models | {"observer": logit(sees_M3), "bayes": logit(world.truth_M3)}, reasons


def known(world: World, models: dict[str, np.ndarray], reasons: Reasons, draws: int) -> tuple[dict, dict, str]:
    """→ bars, figures, text: what is known of what can be known."""
    test_M = world.part_M == TEST
    everybody = judge(world, models, test_M, draws)
    seen = judge(world, models, test_M & world.visible_M, draws)
    teacher, taught = difference(everybody, "teacher", LIGHTGBM), difference(everybody, "distilled", LIGHTGBM)
    hidden, left = difference(everybody, "bayes", "teacher"), difference(seen, "observer", "teacher")
    more = {
        "student without distillation − LightGBM": difference(everybody, "student", LIGHTGBM),
        "distilled − undistilled": difference(everybody, "distilled", "student"),
        "transformer − its offset": difference(everybody, "transformer", "offset"),
        "transformer − its offset, log-loss": difference(everybody, "transformer", "offset", "log_loss"),
        "teacher − logistic regression": difference(everybody, "teacher", "logistic"),
        "distilled − logistic regression": difference(everybody, "distilled", "logistic"),
        "distilled − best of LightGBM and logistic regression, log-loss": difference(
            everybody, "distilled", (*LIGHTGBM, "logistic"), "log_loss"
        ),
        "Bayes − observer, shoppers seen wholly": difference(seen, "bayes", "observer"),
        "observer − teacher, shoppers seen wholly": difference(seen, "observer", "teacher"),
        "observer − student, shoppers seen wholly": difference(seen, "observer", "distilled"),
        "observer − LightGBM, shoppers seen wholly": difference(seen, "observer", LIGHTGBM),
    }
    bars = {
        "simulator: teacher − LightGBM": bar(
            "≥ +.010", "≥ +.02", list(teacher), teacher.value >= 0.010, teacher.value >= 0.02
        ),
        "simulator: student − LightGBM": bar(
            "≥ +.005", "≥ +.015", list(taught), taught.value >= 0.005, taught.value >= 0.015
        ),
        "simulator: Bayes − teacher": bar(
            "≤ .03",
            "≤ .01",
            {"from the events, shoppers seen wholly": list(left), "from the hidden state, all shoppers": list(hidden)},
            left.value <= 0.03,
            left.value <= 0.01,
        ),
    }
    names = ["logistic", *LIGHTGBM, "offset", "transformer", "hidden_markov", "teacher", "student", "distilled", "bayes"]
    lines = [
        "## How much of what can be known",
        "",
        f"{SHOPPERS.n_shoppers:,} shoppers, {DAYS:.0f} days, {len(world.examples):,} events; train, validate and test are "
        f"days {PARTS}, every event of them an anchor. LightGBM is the better of fixed and tuned ({TRIALS} random settings) "
        f"in each cell, on test. One seed, {draws} draws of users. *bayes* knows the hidden state: with it, the label is a "
        "draw of a known coin. *hidden_markov* (`trainer/markov.py`, which sees events and no feature) and *transformer* "
        "are members of the teacher; *transformer* is a residual on *offset*, the mean of boosting and randomised trees by "
        "the own rates and of regression, so what it adds is the difference of the two.",
        "",
        table(everybody, names, "auc"),
        "",
        "Log-loss, calibrated on the validation days:",
        "",
        table(everybody, names, "log_loss"),
        "",
        "The *observer* is the exact filter of the hidden state by somebody who knows the simulator's numbers and sees the "
        "events, and no more: Bayes' prediction from what a model is given. What lies between him and the hidden state, no "
        "model can learn from events, so the bar of what the teacher leaves is met or missed by him; the other figure "
        "stands beside it. AUC on the shoppers all of whose sessions are seen, for whom he is exact:",
        "",
        table(seen, [*names[:-1], "observer", "bayes"], "auc"),
        "",
        "| macro, AUC unless stated | point [95 %] |",
        "|---|---|",
        *(f"| {name} | {at.value:+.4f} [{at.low:+.4f}, {at.high:+.4f}] |" for name, at in more.items()),
        "",
        "The teacher's members, platform by platform:",
        "",
        *(f"- {PLATFORMS[row - 1]}, {member}: {reason}" for (row, member), reason in reasons.items()),
        "",
        "![What the student says against the true probability](plots/simulated-calibration.svg)",
        "",
        "Mean true probability against what the distilled student says, calibrated on the validation days, in 15 bins of "
        "equal mass on the test days.",
    ]
    figures = {"everybody": everybody, "seen wholly": seen, "more": {name: list(at) for name, at in more.items()}}
    figures["members"] = {f"{PLATFORMS[row - 1]}, {member}": reason for (row, member), reason in reasons.items()}
    return bars, figures, "\n".join(lines)


def shift_baselines(world: World, models: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(M,) scores of SHIFT_BASELINES: those that count, and those of `models` that learn."""
    examples, shift = world.examples, world.shift
    mean = float(shift.y_N[shift.known_N & (world.part_M == TRAIN)].mean())
    came = shift.y_N.astype(float)
    return {
        "main_share": -shift.main_share_N,
        "entropy": shift.entropy_N,
        "short_vs_long": short_vs_long(examples.views_M),
        "user_rate": _own_rate(examples.user_M, examples.ts_M, came, shift.known_N, 7 * DAY_MS, mean, 5.0),
        **{name: models[name][:, SHIFT] for name in ("logistic", *LIGHTGBM)},
    }


def shift_cells(world: World, scores: dict[str, np.ndarray], draws: int, title: str = "shift") -> dict:
    """(platform, title) → n, users, base rate, AUC of each score (M,) on the test days."""
    examples, cells = world.examples, {}
    for row, platform in enumerate(PLATFORMS, start=1):
        at = np.flatnonzero(world.shift.known_N & (world.part_M == TEST) & (examples.platform_M == row))
        y, resamples = world.shift.y_N[at].astype(np.float32), metrics.Resamples(examples.user_M[at], draws)
        cell = {"n": len(at), "users": len(np.unique(examples.user_M[at])), "base_rate": float(y.mean())}
        cell["models"] = {
            name: {"auc": metrics.auc(y, score[at]), "auc_draws": resamples.auc(y, score[at])}
            for name, score in scores.items()
        }
        cells[platform, title] = cell
    return cells


def further_cells(bench: Bench, seed: int, trials: int, draws: int) -> dict:
    """As `shift_cells`, in a world of its own: the baselines and the head on the row's mixes, no network."""
    world = make_world(structs.replace(SHOPPERS, seed=seed), DAYS)
    learned_MT = world.examples.learn_MT.copy()
    learned_MT[:, :SHIFT] = False
    world = world._replace(examples=replace(world.examples, learn_MT=learned_MT))
    scores = shift_baselines(world, boosted(keyed(bench, world), trials)) | {"mixes": shift_head(world)}
    note(f"simulated: interest shift in world {seed}")
    return shift_cells(world, scores, draws, f"shift, world {seed}")


def shifted(world: World, models: dict[str, np.ndarray], further: dict, draws: int) -> tuple[dict, dict, str]:
    """→ bars, figures, text: interest shift. `further`: cells of other worlds."""
    examples = world.examples
    known_M, y_M = world.shift.known_N, world.shift.y_N
    scores = {
        **shift_baselines(world, models),
        "served": np.nan_to_num(models["distilled"][:, SHIFT + 1]),
        "teacher": models["teacher"][:, SHIFT],
        "student": models["student"][:, SHIFT],
        "distilled": models["distilled"][:, SHIFT],
    }
    learn_M = known_M & (world.part_M == TRAIN)
    scores["both"] = sum(standardised(scores[name], examples.platform_M, learn_M) for name in ("served", "distilled"))
    scores["mixes"] = shift_head(world)
    cells = shift_cells(world, scores, draws)
    # The student's word is chosen on the validation days: the head of either training, or what is served.
    check_M = known_M & (world.part_M == VALIDATE)
    rows = range(1, 1 + len(PLATFORMS))
    validation = {
        name: float(
            np.mean([metrics.auc(y_M[of], scores[name][of]) for of in (check_M & (examples.platform_M == r) for r in rows)])
        )
        for name in ("served", "student", "distilled", "both", "mixes")
    }
    ours = max(validation, key=validation.__getitem__)
    everywhere = cells | further if ours == "mixes" else cells
    gain, here = difference(everywhere, ours, SHIFT_BASELINES), difference(cells, ours, SHIFT_BASELINES)
    counts = difference(cells, ours, ("main_share", "entropy", "short_vs_long", "user_rate"))
    single = max(SHIFT_BASELINES, key=lambda name: sum(cell["models"][name]["auc"] for cell in cells.values()))
    alone = difference(cells, ours, single)
    bars = {
        "simulator: interest shift − best baseline": bar(
            "≥ +.01",
            "≥ +.03",
            {"all worlds": list(gain), "the one of the other figures": list(here)},
            gain.value >= 0.01,
            gain.value >= 0.03,
        )
    }
    lines = [
        "## Interest shift on the simulator",
        "",
        "Label: the category most acted on in the next 7 days was not that of the last 30 (acts on the event's own "
        "platform, impressions apart; ties are no shift). Anchors: events with at least "
        f"{LEAST_BEFORE} acts before and {LEAST_AFTER} after, {known_M.mean():.0%} of all. *served*: the record's "
        "`interest_shift`; *student*, *distilled*: a head that exists while learning; *both*: the mean of *served* and "
        "*distilled*, each standardised on the training days of a platform; *mixes*: a head on what the "
        "row's mixes and ring say of each other and on the rolling features (`benchmarks/interest.py`; the row holds both, "
        "no worker serves it). Of these five the bar takes "
        f"*{ours}*, best on the validation days ({', '.join(f'{k} {v:.4f}' for k, v in validation.items())}), and of the "
        "baselines the best in each cell on test.",
        "",
        table(cells, list(scores), "auc"),
        "",
        f"*{ours}* less the best of the counts (main_share, entropy, short_vs_long, user_rate) in each cell: "
        f"{counts.value:+.4f} [{counts.low:+.4f}, {counts.high:+.4f}]; less {single}, the one baseline that is best over "
        f"all cells: {alone.value:+.4f} [{alone.low:+.4f}, {alone.high:+.4f}].",
        "",
        f"The intervals of one world are wide, so the baselines and *mixes* are judged in {len(FURTHER)} more "
        f"(simulator seeds {', '.join(map(str, FURTHER))}; nothing of this was chosen in them), and the bar is of all:",
        "",
        table(further, [*SHIFT_BASELINES, "mixes"], "auc"),
        "",
        f"*{ours}* less the best baseline in each cell: {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] in all, "
        f"{here.value:+.4f} [{here.low:+.4f}, {here.high:+.4f}] in the world above.",
    ]
    figures = {
        "cells": cells | further,
        "validation": validation,
        "ours": ours,
        "over counts": list(counts),
        f"over {single}": list(alone),
    }
    return bars, figures, "\n".join(lines)


def shift_head(world: World) -> np.ndarray:
    """(M,) logits of the head on the row's mixes and the rolling features, learned on the training days."""
    examples, shift = world.examples, world.shift
    mixes_MA = interest.agreement(examples.views_M, examples.platform_M, interest.platform_of_category(world.history))
    learn_M, features_MF = shift.known_N & (world.part_M == TRAIN), examples.columns.features_NF.numpy()
    return interest.head(mixes_MA, features_MF, shift.y_N.astype(np.float32), learn_M, examples.platform_M)


def standardised(score_M: np.ndarray, platform_M: np.ndarray, learn_M: np.ndarray) -> np.ndarray:
    """(M,) with mean 0 and variance 1 on the events of a mask, platform by platform."""
    out_M = np.zeros(len(score_M))
    for row in np.unique(platform_M):
        of_M = platform_M == row
        learned = score_M[of_M & learn_M].astype(np.float64)
        if len(learned) and learned.std() > 0:
            out_M[of_M] = (score_M[of_M] - learned.mean()) / learned.std()
    return out_M


def plot_calibration(world: World, logits_MT: np.ndarray, path: Path) -> None:
    """Three panels, a head each: what is said against the mean true probability, by platform."""
    examples = world.examples
    figure, axes = pyplot.subplots(1, len(BINARY_HEADS), figsize=(9, 3.2), constrained_layout=True)
    for task, (head, panel) in enumerate(zip(BINARY_HEADS, axes, strict=True)):
        panel.plot((0, 1), (0, 1), color="0.7", linewidth=1)
        for row, platform in enumerate(PLATFORMS, start=1):
            own_M = (examples.platform_M == row) & ~np.isnan(world.truth_M3[:, task])
            check, at = np.flatnonzero(own_M & (world.part_M == VALIDATE)), np.flatnonzero(own_M & (world.part_M == TEST))
            if not len(at):
                continue
            slope, offset = affine(logits_MT[check, task], examples.y_MT[check, task], (1.0, 0.0), examples.user_M[check])
            p = 1 / (1 + np.exp(-(slope * logits_MT[at, task] + offset)))
            bins = np.array_split(np.argsort(p), 15)
            said, true = ([values[b].mean() for b in bins] for values in (p, world.truth_M3[at, task]))
            panel.plot(said, true, marker="o", markersize=3, linewidth=1.2, label=platform)
        panel.set(title=head, xlabel="what the student says", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes[0].set_ylabel("mean true probability")
    axes[-1].legend(fontsize=8, frameon=False, loc="upper left")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """The same bytes for the same figure."""
    path.parent.mkdir(exist_ok=True)
    with pyplot.rc_context({"svg.hashsalt": "crosscurrent", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def measure(bench: Bench, quick: bool) -> Section:
    """The section `simulated`. Takes the cache and the threads of `bench` only."""
    draws = 100 if quick else 400
    world = make_world(SHOPPERS, DAYS)
    bench = keyed(bench, world)
    note(f"simulated: {len(world.examples)} events")
    trials = 1 if quick else TRIALS
    models, reasons = all_models(bench, world, trials)
    plot_calibration(world, models["distilled"], PLOTS / "simulated-calibration.svg")
    further = {key: cell for seed in FURTHER for key, cell in further_cells(bench, seed, trials, draws).items()}
    parts = {"known": known(world, models, reasons, draws), "shift": shifted(world, models, further, draws)}
    bars = {name: one for part in parts.values() for name, one in part[0].items()}
    intro = (
        "## The simulator, stated apart\n\nEverything here is simulated (`streams/simulator.py`), and nothing of it is in "
        "the figures of recorded data. Records pass the platform files, late, out of order, twice and malformed at the "
        "simulator's own rates."
    )
    text = "\n\n".join([intro, *(part[2] for part in parts.values())])
    return Section(bars, {name: part[1] for name, part in parts.items()}, text)
