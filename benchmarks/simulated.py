"""What only the simulator can show: how much of what can be known is learned, and how soon what has changed.

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
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from benchmarks import datasets, observer
from benchmarks.cells import Bench, Section, bar, cached, logit, note
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
from trainer.fit import Network, Schedule, of_users_with
from trainer.history import History
from trainer.labels import make_labels
from trainer.teacher import choose
from trainer.train import Trained, affine, train
from trainer.transformer import TransformerConfig, fit_transformer

SHOPPERS, DAYS = SimulatorConfig(n_shoppers=3000), 78.0
PARTS = (3.0, 42.0), (49.0, 53.0), (60.0, 70.0)
"""Days of train, validate and test; a gap of the longest horizon after each."""
TASKS = (*BINARY_HEADS, "shift")
SHIFT = TASKS.index("shift")
LEAST_BEFORE, LEAST_AFTER = 5, 3
"""Acts with a category that an anchor of `shift` has in the 30 days up to it and in the 7 days after."""
PLAIN, PLAIN_DROPOUT = Schedule(epochs=8, batch_events=4096, rate=2e-3, patience=2), 0.3
DISTIL = Schedule(epochs=10, batch_events=4096, rate=3e-3, soft_weight=0.9)
RESIDUAL = Schedule(epochs=6, batch_events=8192, rate=2e-3, patience=2)
LIGHTGBM = ("boosting", "boosting_tuned")
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
    for name in ("models/fold.py", "models/student.py", "trainer/fit.py", "trainer/boosting.py", "trainer/transformer.py"):
        code.update((ROOT / name).read_bytes())
    for array in (world.examples.y_MT, world.examples.learn_MT, world.examples.columns.features_NF.numpy()):
        code.update(array.tobytes())
    return bench._replace(examples=world.examples, key=code.hexdigest()[:12])


def boosted(bench: Bench, trials: int) -> dict[str, np.ndarray]:
    """Boosting and logistic regression of every platform × task, cross-fitted; boosting tuned; NaN where no label is."""
    examples = bench.examples
    x_MF = examples.columns.features_NF.numpy()

    def every(fit: Callable) -> np.ndarray:
        out = np.full((*examples.y_MT.shape, 2), np.nan, np.float32)
        for row in range(1, 1 + len(PLATFORMS)):
            of = np.flatnonzero(examples.platform_M == row)
            for task in range(len(TASKS)):
                learn, check = examples.learn_MT[of, task], examples.check_MT[of, task]
                if learn.any():
                    out[of, task] = fit(x_MF[of], examples.y_MT[of, task], learn, check, examples.user_M[of])
        return out

    def fixed(x, y, learn, check, user):
        return np.stack(boosting.cross_fit(x, y, learn, user, bench.threads), axis=1)

    def tuned(x, y, learn, check, user):
        predict = boosting.fit_tuned(x[learn], y[learn], x[check], y[check], trials=trials, threads=bench.threads)
        return predict(x)[:, None]

    crossed = cached(bench, "simulated-crossed", lambda: every(fixed))
    best = cached(bench, f"simulated-tuned-{trials}", lambda: every(tuned)[..., 0])
    return {"boosting": crossed[..., 0], "logistic": crossed[..., 1], "boosting_tuned": best}


def transformer(bench: Bench, offset_MT: np.ndarray, schedule: Schedule = RESIDUAL) -> np.ndarray:
    """(M, T) logits: the offset and what the order of a user's events adds."""

    def make() -> np.ndarray:
        config = TransformerConfig.of("cpu", N_FEATURES, PLATFORMS, TASKS, next_item_weight=0.0)
        fitted = fit_transformer(bench.examples, np.nan_to_num(offset_MT), config, schedule)
        note(f"transformer: epoch {fitted.epochs}, log-loss {fitted.check_loss:.4f}, the offset's {fitted.offset_loss:.4f}")
        return np.where(np.isnan(offset_MT), np.nan, fitted.logits(bench.examples, np.nan_to_num(offset_MT)))

    return cached(bench, "simulated-transformer", make)


def student(bench: Bench, history: History, name: str, schedule: Schedule, dropout: float, soft_MT=None) -> np.ndarray:
    """(M, T + 1) logits of the student, and the interest shift as it is served."""

    def make() -> np.ndarray:
        prior_3 = load_prior(FoldConfig()).calibration_P32[0, :, 1]
        trained = train(
            bench.examples, student_config(), history.categories, FoldConfig(), schedule,
            prior_logits_3=prior_3, soft_MT=soft_MT, dropout=dropout,
        )  # fmt: skip
        note(f"{name}: kept epoch {trained.fitted.epochs}, validation log-loss {trained.fitted.check_loss:.4f}")
        return said(trained, bench.examples)

    return cached(bench, f"simulated-{name}", make)


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
                    line = affine(logits_MT[check, task], examples.y_MT[check, task], line)
                losses = metrics.log_losses(y, 1 / (1 + np.exp(-(line[0] * z + line[1]))))
                cell["models"][model] = {
                    "auc": metrics.auc(y, z),
                    "auc_draws": resamples.auc(y, z),
                    "log_loss": float(losses.mean()),
                    "log_loss_draws": resamples.mean(losses),
                }
            out[platform, name] = cell
    return out
