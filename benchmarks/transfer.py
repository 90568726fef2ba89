"""The ladder of transfer on recorded data: what a platform with few labelled users gains from the others.

    for each target: the other platforms ─► source ─┐
    a draw of the target's labelled users ──────────┴─► every rung, `auto`, baselines ─► AUC on the target's test anchors
    each other platform in the target's place, as many users ─► rehearsal ──┘

A labelled user has a label to learn from or to check by. A draw takes some of them: of their train anchors everything is
learned, by their validation anchors everything is chosen (early stopping, α; the rung, by the rehearsal too); nobody else's
label of the target is seen. Rehearsals are judged on the other platforms' validation anchors. Each
draw has the same users for every rung and baseline, by (target, how many, draw), so a run can be resumed draw by draw.
Knows nothing of the main table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

from benchmarks.cells import Bench, Section, bar, note, student_config
from benchmarks.datasets import MATRIX, ROOT, TASKS, TEST, TRAIN
from models.student import Student
from trainer import boosting, metrics
from trainer.examples import Examples
from trainer.fit import Network, Schedule, logits
from trainer.train import category_targets
from trainer.transfer import (
    REHEARSED,
    RUNGS,
    Rehearsal,
    Task,
    adopt,
    choose,
    climb_all,
    labels_a_user,
    pretrain,
    rehearse,
    subset,
    understudy,
)

TARGETS = ("retailrocket", "taobao")
FRACTIONS = (0.01, 0.05, 0.10, 1.0)
LEAST_USERS = 50
LIGHT = ("scratch", "finetune_head", "loose_head", "renormalise")
"""Rungs of every draw, and what `auto` chooses among here."""
DRAWS, DRAWS_OTHERS = 20, 2
"""Draws of users; of the rungs that are not in LIGHT, which cost ten times as much."""
REHEARSALS = 3
"""Draws of users on each platform that stands in for a target."""
REST_USERS = 600
"""Of the other platforms, drawn anew each time, that `pooled` and `adversarial` see beside the target's."""
SOURCE = Schedule(epochs=8, batch_events=4096, rate=2e-3, patience=3, dropout=0.3)
FEW = SOURCE._replace(epochs=4)
RESAMPLES = 100
BASELINES = ("logistic", "logistic_tuned", "boosting")
PENALTIES = (0.1, 0.03, 0.003, 0.0003)
"""C of the tuned regression, chosen on the drawn users' validation as the rungs' settings are."""
PLOTS = ROOT / "benchmarks" / "plots"


class Draw(NamedTuple):
    """One draw of a target's labelled users. Dictionaries by rung or baseline."""

    users: int
    learned: int
    """Users with a label to learn from; the others only have labels to choose by."""
    auc: dict[str, list[float]]
    """By cell of the target, in the order of its tasks."""
    resampled: dict[str, list[list[float]]]
    """(cells, RESAMPLES) AUC on the same resamples of test users; of some."""
    picked: str
    unguarded: str


class Ground(NamedTuple):
    """What all draws of a target share."""

    name: str
    row: int
    tasks: list[int]
    own: Examples
    """All of the target's users."""
    rest: Examples
    q_rest: np.ndarray
    source: Network
    unlabelled_NF: np.ndarray
    labelled: np.ndarray
    """Users."""
    test: Examples
    """The whole sequences of users with a test anchor."""
    anchors: list[np.ndarray]
    """By cell, positions in `test`."""
    resamples: list[metrics.Resamples]
    rehearsals: dict[int, Rehearsal]
    """By how many users; filled by `rehearsed`."""


def ground(bench: Bench, name: str) -> Ground:
    examples, row = bench.examples, 1 + bench.data.history.platforms.index(name)
    split_M, anchor_M = bench.data.split_N[examples.index_M], bench.data.anchor_N[examples.index_M]
    tasks = [TASKS.index(task) for task in MATRIX[name].tasks]
    of, others = np.flatnonzero(examples.platform_M == row), np.flatnonzero(examples.platform_M != row)
    own, rest = subset(examples, of), subset(examples, others)
    # The next category of the target is no label here: few users, and half of the targets have none.
    own = dataclasses.replace(own, learn_next_M=np.zeros(len(own), bool))
    source, q_rest = _source(bench, (name,), rest)
    judged_M = anchor_M[of] & (split_M[of] == TEST)
    at = np.flatnonzero(np.isin(own.user_M, own.user_M[judged_M]))
    test, place = subset(own, at), np.flatnonzero(judged_M[at])
    return Ground(
        name,
        row,
        tasks,
        own,
        rest,
        q_rest,
        source,
        own.columns.features_NF.numpy()[np.isin(split_M[of], (-2, TRAIN))],
        np.unique(own.user_M[(own.learn_MT | own.check_MT).any(axis=1)]),
        test,
        [place for _ in tasks],
        [metrics.Resamples(test.user_M[place], RESAMPLES)] * len(tasks),
        {},
    )


def _source(bench: Bench, without: tuple[str, ...], rest: Examples, seed: int = SOURCE.seed) -> tuple[Network, np.ndarray]:
    """The network of `rest`, the platforms other than `without`, from the cache where it is there."""
    name = "-".join(without) + (f"-s{seed}" if seed != SOURCE.seed else "")
    config, path = student_config(bench.data), bench.cache / f"transfer-source-{name}-{_key(bench)}.npz"
    if not path.exists():
        q_MG = category_targets(rest, bench.data.history.categories, len(config.platforms))[1]
        trained = pretrain(rest, q_MG, config, SOURCE._replace(seed=seed))
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, q_MG=q_MG, **{key: value.numpy() for key, value in trained.state_dict().items()})
        os.replace(temporary, path)
        note(f"transfer: the source for {name}")
    with np.load(path) as kept:
        network = Network(Student(config), len(rest.tasks))
        network.load_state_dict({key: torch.from_numpy(kept[key]) for key in kept.files if key != "q_MG"})
        return network, kept["q_MG"]


def rehearsed(bench: Bench, at: Ground, users: Iterable[int]) -> None:
    """Fills `at.rehearsals`, from the cache where they are there. Of all the target's users a rehearsal takes all of an
    understudy's, or as many as the target has."""
    platforms, stand_ins = bench.data.history.platforms, []
    for n in users:
        path = bench.cache / f"transfer-rehearsal-{at.name}-{n}-{_key(bench)}.json"
        if not path.exists():
            stand_ins = stand_ins or [_understudy(bench, at, other) for other in platforms if other != at.name]
            found = rehearse(stand_ins, n, labels_a_user(at.own), REHEARSED, draws=REHEARSALS)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(found._asdict()))
            os.replace(temporary, path)
            note(f"transfer: {n} users of {at.name} rehearsed")
        at.rehearsals[n] = Rehearsal(**json.loads(path.read_text()))


def _understudy(bench: Bench, at: Ground, name: str) -> Task:
    row = 1 + bench.data.history.platforms.index(name)
    others = np.flatnonzero(at.rest.platform_M != row)
    # The same two platforms teach whichever of the other two is the target.
    source, _ = _source(bench, tuple(sorted((at.name, name))), subset(at.rest, others))
    return understudy(at.rest, at.q_rest, row, student_config(bench.data), FEW, source=source)


# ── one draw ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_of(at: Ground, users: int, draw: int, light: bool) -> Draw:
    """Trains on so many of the target's labelled users and judges on its test anchors: the rungs in LIGHT, what `auto` takes
    of them and the baselines; or the other rungs."""
    rng = np.random.default_rng([at.row, users, draw])
    chosen = rng.choice(at.labelled, users, replace=False) if users < len(at.labelled) else at.labelled
    own = subset(at.own, np.flatnonzero(np.isin(at.own.user_M, chosen)))
    few = rng.choice(np.unique(at.rest.user_M), REST_USERS, replace=False)
    place = np.flatnonzero(np.isin(at.rest.user_M, few))
    rest, q_rest = subset(at.rest, place), at.q_rest[place]
    q_own = np.zeros((len(own), q_rest.shape[1]), np.float32)
    schedule = FEW._replace(seed=draw)
    task = Task(at.row, adopt(at.source, at.row, own), own, rest, at.unlabelled_NF, q_own, q_rest, schedule)
    ys = [at.test.y_MT[place, t] for t, place in zip(at.tasks, at.anchors, strict=True)]
    picked = unguarded = ""
    resampled = {}
    if light:
        networks = climb_all(task, LIGHT)
        on_own = {name: logits(network, own, np.arange(len(own))) for name, network in networks.items()}
        choice = choose(own, on_own, at.rehearsals[users])
        said = {name: _on_test(at, network) for name, network in networks.items()} | _baselines(at, own)
        picked, unguarded = choice.rung, choice.unguarded
        said["auto"], said["unguarded"] = said[picked], said[unguarded]
        for name, zs in said.items():
            same = next((other for other in resampled if said[other] is zs), None)
            resampled[name] = resampled[same] if same else _resampled(at, ys, zs)
    else:
        networks = climb_all(task, [name for name in RUNGS if name not in (*LIGHT, "pooled")])
        networks["pooled"] = RUNGS["pooled"](task._replace(schedule=SOURCE._replace(seed=draw)))
        said = {name: _on_test(at, network) for name, network in networks.items()}
    auc = {name: [metrics.auc(y, z) for y, z in zip(ys, zs, strict=True)] for name, zs in said.items()}
    learned = len(np.unique(own.user_M[own.learn_MT.any(axis=1)]))
    return Draw(len(chosen), learned, auc, resampled, picked, unguarded)


def _baselines(at: Ground, own: Examples, names: tuple[str, ...] = BASELINES) -> dict[str, list[np.ndarray]]:
    """On the target's drawn users alone; says nothing of a cell whose labels are all alike."""
    x, to = own.columns.features_NF.numpy(), at.test.columns.features_NF.numpy()
    said: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for t, place in zip(at.tasks, at.anchors, strict=True):
        y, learn, check = own.y_MT[:, t], own.learn_MT[:, t], own.check_MT[:, t]
        both = learn.any() and y[learn].min() < y[learn].max()
        for name in names:
            if not both:
                said[name].append(np.zeros(len(place), np.float32))
            elif name == "boosting":
                said[name].append(boosting.fit_boosting(x[learn], y[learn])(to[place]))
            else:
                tried = PENALTIES if name == "logistic_tuned" and check.any() else PENALTIES[1:2]
                fitted = [boosting.fit_logistic(x[learn], y[learn], c=c) for c in tried]
                losses = [metrics.log_loss(y[check], 1 / (1 + np.exp(-predict(x[check])))) for predict in fitted]
                said[name].append(fitted[int(np.argmin(losses))](to[place]))
    return said


def _resampled(at: Ground, ys: list[np.ndarray], zs: list[np.ndarray]) -> list[list[float]]:
    return [r.auc(y, z).tolist() for r, y, z in zip(at.resamples, ys, zs, strict=True)]


def _on_test(at: Ground, network: Network) -> list[np.ndarray]:
    logits_MT = logits(network, at.test, np.arange(len(at.test)))
    return [logits_MT[place, task] for task, place in zip(at.tasks, at.anchors, strict=True)]


_GROUND: dict[str, Ground] = {}
"""For the processes that do the draws: they inherit it."""


Job = tuple[str, int, int, bool]
"""Target, users, draw, light."""


def _draw_job(name: str, users: int, draw: int, light: bool, path: Path) -> None:
    torch.set_num_threads(1)
    done = draw_of(_GROUND[name], users, draw, light)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(done._asdict()))
    os.replace(temporary, path)


def draws_of(bench: Bench, grounds: dict[str, Ground], jobs: list[Job]) -> dict[Job, Draw]:
    """What was found, from the cache where it is there; on as many processes as threads."""
    paths = {
        job: bench.cache / f"transfer-{job[0]}-{job[1]}-{job[2]}-{'light' if job[3] else 'others'}-{_key(bench)}.json"
        for job in jobs
    }
    missing = [job for job in jobs if not paths[job].exists()]
    if missing:
        _GROUND.update(grounds)
        with ProcessPoolExecutor(bench.threads, multiprocessing.get_context("fork")) as pool:
            futures = [pool.submit(_draw_job, *job, paths[job]) for job in missing]
            for count, future in enumerate(futures, start=1):
                future.result()
                if count % 10 == 0:
                    note(f"transfer: {count} of {len(missing)} draws")
    return {job: Draw(**json.loads(path.read_text())) for job, path in paths.items()}


def _key(bench: Bench) -> str:
    """Of the bench, and of the code of rungs and draws."""
    code = (ROOT / "trainer" / "transfer.py").read_text() + Path(__file__).read_text().split("# ── figures")[0]
    return f"{bench.key}-{hashlib.sha256(code.encode()).hexdigest()[:8]}"


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


SOURCE_SEEDS = (0, 1, 2)
"""Of the sources that are judged without a label of the target; the draws begin at the first."""
ALL_ANCHORS = "all anchors"
"""Of a platform whose users' anchors are capped elsewhere."""


def gain(draws: dict[str, list[Draw]], ours: str, theirs: str, cell: int | None = None) -> metrics.Interval:
    """Mean over targets, draws and cells (or of one cell) of ours − theirs, AUC. Its interval is over test users, the same
    for both, and over which users were drawn."""
    rng = np.random.default_rng(0)
    values, resampled = [], []
    for own in draws.values():
        cells = slice(None) if cell is None else slice(cell, cell + 1)
        values.append(np.mean([np.subtract(one.auc[ours][cells], one.auc[theirs][cells]).mean() for one in own]))
        of_DB = np.array([np.subtract(one.resampled[ours][cells], one.resampled[theirs][cells]).mean(axis=0) for one in own])
        again_BD = rng.integers(0, len(own), (RESAMPLES, len(own)))
        resampled.append(of_DB[again_BD, np.arange(RESAMPLES)[:, None]].mean(axis=1))
    return metrics.interval(float(np.mean(values)), np.mean(resampled, axis=0))


def macro(draws: list[Draw], name: str) -> float:
    """Mean over the draws that have it, and over cells."""
    return float(np.mean([np.mean(one.auc[name]) for one in draws if name in one.auc]))


def hurt(draws: dict[str, list[Draw]], ours: str) -> list[str]:
    """Cells of the targets where it is more than .001 below scratch, the interval wholly below 0."""
    out = []
    for target, own in draws.items():
        for cell, task in enumerate(MATRIX[target].tasks):
            by = gain({target: own}, ours, "scratch", cell)
            if by.value < -0.001 and by.high < 0:
                out.append(f"{target} {task} {by.value:+.4f} [{by.low:+.4f}, {by.high:+.4f}]")
    return out


class Likeness(NamedTuple):
    """How alike two platforms are, on features standardised by each platform's own mean and scale."""

    a_distance: float
    """2 (1 − 2 ε), ε the error of a linear classifier of the platform on unseen users: 0 alike, 2 apart."""
    mmd: float
    """Squared maximum mean discrepancy, Gaussian kernel at the median distance."""
    coefficients: float
    """Mean over shared tasks of the correlation of the logistic regressions' coefficients."""
    zero_shot: float
    """Mean over shared tasks of the AUC, on the target's test anchors, of the source's logistic regression alone."""


def likeness(at: Ground, source_row: int, n: int = 2000) -> Likeness:
    """Ben-David et al. (Machine Learning 2010); Gretton et al. (JMLR 2012)."""
    rng = np.random.default_rng(0)
    other = subset(at.rest, np.flatnonzero(at.rest.platform_M == source_row))
    mean_F, std_F = _scale(at.unlabelled_NF)
    mine = np.clip((at.unlabelled_NF - mean_F) / std_F, -5, 5)
    theirs_M = other.columns.features_NF.numpy()
    other_mean_F, other_std_F = _scale(theirs_M[other.learn_MT.any(axis=1)])
    theirs_M = np.clip((theirs_M - other_mean_F) / other_std_F, -5, 5)
    x = mine[rng.choice(len(mine), n, replace=False)]
    z = theirs_M[rng.choice(np.flatnonzero(other.learn_MT.any(axis=1)), n)]
    both, which = np.concatenate([x, z]), np.r_[np.zeros(n), np.ones(n)]
    fold = rng.permutation(2 * n) < n
    told = LogisticRegression(C=0.03, max_iter=300).fit(both[fold], which[fold])
    error = float((told.predict(both[~fold]) != which[~fold]).mean())
    correlations, aucs = [], []
    for task, place in zip(at.tasks, at.anchors, strict=True):
        learn, learn_other = at.own.learn_MT[:, task], other.learn_MT[:, task]
        if learn_other.any():
            mine_M = np.clip((at.own.columns.features_NF.numpy()[learn] - mean_F) / std_F, -5, 5)
            a = LogisticRegression(C=0.03, max_iter=300).fit(mine_M, at.own.y_MT[learn, task])
            b = LogisticRegression(C=0.03, max_iter=300).fit(theirs_M[learn_other], other.y_MT[learn_other, task])
            correlations.append(np.corrcoef(a.coef_[0], b.coef_[0])[0, 1])
            judged = np.clip((at.test.columns.features_NF.numpy()[place] - mean_F) / std_F, -5, 5)
            aucs.append(metrics.auc(at.test.y_MT[place, task], b.decision_function(judged)))
    nothing = float("nan")
    return Likeness(
        2 * (1 - 2 * min(error, 1 - error)),
        _mmd(x[:1000], z[:1000]),
        float(np.mean(correlations)) if correlations else nothing,
        float(np.mean(aucs)) if aucs else nothing,
    )


def _scale(features_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    std_F = features_NF.std(axis=0, dtype=np.float64)
    return features_NF.mean(axis=0, dtype=np.float64), np.where(std_F < 1e-3, 1.0, std_F)


def _mmd(x_NF: np.ndarray, z_NF: np.ndarray) -> float:
    both = np.concatenate([x_NF, z_NF])
    norm_N = (both**2).sum(axis=1)
    square_NN = np.maximum(norm_N[:, None] + norm_N[None] - 2 * both @ both.T, 0)
    kernel = np.exp(-square_NN / np.median(square_NN[square_NN > 0]))
    np.fill_diagonal(kernel, 0)
    n = len(x_NF)
    within = kernel[:n, :n].sum() + kernel[n:, n:].sum()
    return float(within / (n * (n - 1)) - 2 * kernel[:n, n:].mean())


# ── the section ──────────────────────────────────────────────────────────────────────────────────────────────────────


def sizes(labelled: int) -> dict[str, int]:
    """Name of a share → users: as the issue has them, at least LEAST_USERS, and the true share where that is fewer."""
    out = {f"{fraction:.0%}": max(LEAST_USERS, round(fraction * labelled)) for fraction in FRACTIONS}
    few = {f"{f:.0%} exactly": round(f * labelled) for f in FRACTIONS if round(f * labelled) < LEAST_USERS}
    return {name: min(users, labelled) for name, users in (out | few).items()}


def measure(bench: Bench, quick: bool) -> Section:
    count = 3 if quick else DRAWS
    grounds = {name: ground(bench, name) for name in TARGETS}
    users = {name: sizes(len(at.labelled)) for name, at in grounds.items()}
    for name, at in grounds.items():
        rehearsed(bench, at, sorted(set(users[name].values())))
    jobs = [
        (name, n, draw, light)
        for light in (True, False)
        for whole in (False, True)
        for draw in range(count if light else min(count, DRAWS_OTHERS))
        for name, of in users.items()
        for n in dict.fromkeys(of.values())
        if whole == (n == len(grounds[name].labelled)) and not (whole and draw)
    ]
    found = draws_of(bench, grounds, jobs)
    by = {
        share: {name: merged(found, name, of.get(share, of[share.split()[0]])) for name, of in users.items()}
        for share in dict.fromkeys(share for of in users.values() for share in of)
    }
    of_sources = {name: sources(bench, at) for name, at in grounds.items()}
    zero = {name: zero_shot(at, of_sources[name]) for name, at in grounds.items()}
    zero |= {
        f"{name}, {ALL_ANCHORS}": zero_shot(uncapped(bench, at), of_sources[name])
        for name, at in grounds.items()
        if MATRIX[name].capped
    }
    platforms = bench.data.history.platforms
    alike = {
        name: {other: likeness(at, 1 + i)._asdict() for i, other in enumerate(platforms) if other != name}
        for name, at in grounds.items()
    }
    figures = {
        "labelled": {name: len(at.labelled) for name, at in grounds.items()},
        "users": users,
        "zero_shot": zero,
        "ladder": {share: {name: ladder(own) for name, own in of.items()} for share, of in by.items()},
        "gains": {
            f"{share} {ours} − {theirs}": list(gain(of, ours, theirs))
            for share, of in by.items()
            for ours, theirs in (*(("auto", name) for name in ("scratch", *BASELINES)), ("unguarded", "scratch"))
        },
        "picked": {
            share: {name: _counts([one.picked for one in own]) for name, own in of.items()} for share, of in by.items()
        },
        "hurt": {f"{share} {which}": hurt(of, which) for share, of in by.items() for which in ("auto", "unguarded")},
        "rehearsals": {name: {str(n): one._asdict() for n, one in at.rehearsals.items()} for name, at in grounds.items()},
        "likeness": alike,
        "draws": count,
        "draws_others": min(count, DRAWS_OTHERS),
    }
    PLOTS.mkdir(exist_ok=True)
    plot_ladder(figures, PLOTS / "transfer-ladder.svg")
    plot_likeness(figures, PLOTS / "transfer-similarity.svg")
    return Section(bars(by, figures), figures, text(by, figures))


def merged(found: dict[Job, Draw], name: str, users: int) -> list[Draw]:
    """The draws of so many users, the other rungs' figures beside those of the light ones."""
    out = []
    for (target, n, draw, light), one in found.items():
        if light and (target, n) == (name, users):
            others = found.get((target, n, draw, False))
            out.append(one._replace(auc=one.auc | others.auc) if others else one)
    return out


def sources(bench: Bench, at: Ground) -> list[Network]:
    """The source of the draws, and others that differ from it by their seed."""
    return [at.source, *(_source(bench, (at.name,), at.rest, seed)[0] for seed in SOURCE_SEEDS[1:])]


def uncapped(bench: Bench, at: Ground) -> Ground:
    """The same, judged on all anchors of its users."""
    data, index_M = bench.data, at.test.index_M
    place = np.flatnonzero(data.uncapped_N[index_M] & (data.split_N[index_M] == TEST))
    resamples = metrics.Resamples(at.test.user_M[place], RESAMPLES)
    return at._replace(anchors=[place for _ in at.tasks], resamples=[resamples] * len(at.tasks))


def zero_shot(at: Ground, networks: list[Network]) -> dict[str, dict]:
    """Macro AUC without a label of the target, mean over sources: standardised as a platform unknown, and by its unlabelled
    events."""
    titles = MATRIX[at.name].tasks
    ys = [at.test.y_MT[place, t] for t, place in zip(at.tasks, at.anchors, strict=True)]
    said: dict[str, list[list[np.ndarray]]] = {"stranger": [], "renormalise": []}
    for source in networks:
        stranger = adopt(source, at.row, at.own, least=len(at.own) + 1)
        task = Task(at.row, stranger, at.own, at.rest, at.unlabelled_NF, at.q_rest, at.q_rest, FEW)
        said["stranger"].append(_on_test(at, stranger))
        said["renormalise"].append(_on_test(at, RUNGS["renormalise"](task)))
    out = {}
    for name, of_sources in said.items():
        cells, draws = {}, {}
        for title, y, resamples, zs in zip(titles, ys, at.resamples, zip(*of_sources, strict=True), strict=True):
            cells[title] = float(np.mean([metrics.auc(y, z) for z in zs]))
            draws[title] = np.mean([resamples.auc(y, z) for z in zs], axis=0)
        macro, heads = (list(_mean_auc(cells, draws, of)) for of in (titles, heads_of(titles)))
        each = [
            float(
                np.mean([metrics.auc(y, z) for title, y, z in zip(titles, ys, zs, strict=True) if title in heads_of(titles)])
            )
            for zs in of_sources
        ]
        out[name] = {"macro": macro, "heads": heads, "heads of each source": each, "cells": cells}
    return out


def _mean_auc(cells: dict[str, float], draws: dict[str, np.ndarray], of: Iterable[str]) -> metrics.Interval:
    value, drawn = (np.mean([one[task] for task in of], axis=0) for one in (cells, draws))
    return metrics.interval(float(value), drawn)


def heads_of(tasks: Iterable[str]) -> list[str]:
    """Click, purchase and one return: where a return within 7 days is scored, that within a day does not count beside it."""
    tasks = list(tasks)
    return [task for task in tasks if task != "return_1d" or "return" not in tasks]


def ladder(draws: list[Draw]) -> dict[str, dict]:
    """Rung or baseline → macro AUC, its standard deviation over draws, how many."""
    out = {}
    for name in draws[0].auc:
        values = [np.mean(one.auc[name]) for one in draws if name in one.auc]
        out[name] = {"auc": float(np.mean(values)), "sd": float(np.std(values)), "draws": len(values)}
    return out


def _counts(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def bars(by: dict, figures: dict) -> dict[str, dict]:
    def at(share: str, theirs: str) -> metrics.Interval:
        return gain(by[share], "auto", theirs)

    def at_one(share: str) -> dict:
        scratch, logistic = at(share, "scratch"), at(share, "logistic")
        return bar(
            "≥ +.03 / +.03",
            "≥ +.08 / +.10",
            {"scratch": list(scratch), "logistic": list(logistic)},
            scratch.value >= 0.03 and logistic.value >= 0.03,
            scratch.value >= 0.08 and logistic.value >= 0.10,
        )

    five, ten, five_lr, ten_lr = (at(s, t) for t in ("scratch", "logistic") for s in ("5%", "10%"))
    zero = {name: ways["renormalise"] for name, ways in figures["zero_shot"].items()}
    rr, tb, whole = (zero[name]["heads"] for name in (*TARGETS, f"retailrocket, {ALL_ANCHORS}"))
    guarded = [cell for share in ("1%", "5%", "10%", "100%") for cell in figures["hurt"][f"{share} auto"]]
    free = [cell for share in ("1%", "5%", "10%", "100%") for cell in figures["hurt"][f"{share} unguarded"]]
    return {
        "transfer at 1 % of labelled users over scratch network / target-only logistic regression": at_one("1% exactly"),
        "… the same, but at least 50 users": at_one("1%"),
        "… at 5 % / 10 %, over scratch": bar(
            "≥ +.010 / +.005, and not below target-only",
            "≥ +.03 / +.015",
            {"5%": list(five), "10%": list(ten), "5% over logistic": list(five_lr), "10% over logistic": list(ten_lr)},
            five.value >= 0.010 and ten.value >= 0.005 and five_lr.value >= 0 and ten_lr.value >= 0,
            five.value >= 0.03 and ten.value >= 0.015 and five_lr.value >= 0 and ten_lr.value >= 0,
        ),
        "zero-shot macro, retailrocket / taobao": bar(
            "≥ .75 / .57",
            "≥ .78 / .60",
            {"retailrocket": rr, "taobao": tb, "retailrocket, return within a day too": zero["retailrocket"]["macro"]},
            rr[0] >= 0.75 and tb[0] >= 0.57,
            rr[0] >= 0.78 and tb[0] >= 0.60,
        ),
        "… the same, retailrocket on the anchors of which its figure was set": bar(
            "≥ .75 / .57",
            "≥ .78 / .60",
            {"retailrocket": whole, "taobao": tb},
            whole[0] >= 0.75 and tb[0] >= 0.57,
            whole[0] >= 0.78 and tb[0] >= 0.60,
        ),
        "platform × head cells hurt beyond −.001 (significant) with the guard": bar(
            "0",
            "0 without it",
            {"guarded": guarded, "without": free},
            not guarded,
            not free,
        ),
    }


def text(by: dict, figures: dict) -> str:
    """The section's page."""
    shares = [share for share in by if " " not in share]
    lines = [
        "## Transfer",
        "",
        "A target's labelled users have a label to learn from or to choose by: "
        + ", ".join(f"{name} {n:,}" for name, n in figures["labelled"].items())
        + f". A draw takes a share of them, at least {LEAST_USERS}; of their train anchors a rung learns, by their "
        "validation anchors everything is chosen; no other label of the target is seen. All its test anchors are judged. "
        f"{figures['draws']} draws, the same users for every rung and baseline; {figures['draws_others']} draws for the "
        f"rungs other than {', '.join(LIGHT)}. *pooled* and *adversarial* see {REST_USERS} users of the other platforms, "
        "drawn anew each time (pooled over all users of all platforms: the student of the main table). "
        "The source is one network for all draws, of the other three platforms, with one shared head. All learn from the "
        "target's standardisation by the drawn users' own events; *renormalise* and the two new heads, which stand on it, "
        "see unlabelled events of the target's other users too (before its validation). *auto* takes the greatest AUC in "
        "sum over the heads, on validation and, as far as so few users leave it open, by what the rung gained over scratch "
        "on the other platforms in the target's place, with as many users and labels; unless a head is significantly worse "
        "than from scratch. "
        "*best unguarded* is without the guard, never scratch. "
        "*exactly*: the true share where it is fewer users. Macro AUC over the target's cells, ± the standard deviation "
        "over draws; intervals are over test users and draws.",
        "",
        "![The ladder](plots/transfer-ladder.svg)",
        "",
    ]
    for name in TARGETS:
        own = {share: figures["users"][name].get(share) for share in by if figures["users"][name].get(share)}
        lines += [
            f"### {name}",
            "",
            "| | 0 % | " + " | ".join(f"{share} ({users:,} users)" for share, users in own.items()) + " |",
            "|---" * (2 + len(own)) + "|",
        ]
        zero = figures["zero_shot"][name]["renormalise"]["macro"][0]
        for rung in [*RUNGS, "auto", "unguarded", *BASELINES]:
            values = [figures["ladder"][share][name].get(rung) for share in own]
            shown = " | ".join(f"{v['auc']:.4f} ± {v['sd']:.4f}" if v else "–" for v in values)
            label = {"unguarded": "best unguarded", "auto": "**auto**"}.get(rung, rung)
            lines.append(f"| {label} | {f'{zero:.4f}' if rung == 'renormalise' else '–'} | {shown} |")
        lines.append("")
        for share in own:
            picked = ", ".join(f"{rung} {n}" for rung, n in figures["picked"][share][name].items())
            lines.append(f"- {share}: auto took {picked}; users with a label to learn from: {_learned(by[share][name])}.")
        lines.append("")
    lines += [
        "### Gains",
        "",
        "Mean over both targets and all draws.",
        "",
        "| share | auto − scratch | − logistic regression | − the same, tuned | − LightGBM | best unguarded − scratch |",
        "|---|---|---|---|---|---|",
    ]
    for share in by:
        values = [
            figures["gains"][f"{share} {pair}"]
            for pair in (*(f"auto − {name}" for name in ("scratch", *BASELINES)), "unguarded − scratch")
        ]
        lines.append(f"| {share} | " + " | ".join(f"{v:+.4f} [{a:+.4f}, {b:+.4f}]" for v, a, b in values) + " |")
    lines += ["", "Cells below scratch by more than .001, interval wholly below 0:", ""]
    for share in shares:
        for which, label in (("auto", "with the guard"), ("unguarded", "without")):
            lines.append(f"- {share} {label}: {'; '.join(figures['hurt'][f'{share} {which}']) or 'none'}")
    lines += [
        "",
        "### Rehearsals",
        "",
        "Each other platform in the target's place, taught by the remaining two, with as many users and labels: macro AUC "
        f"over scratch on its validation anchors, mean over platforms and {REHEARSALS} draws; heads that somebody is left "
        "to teach. Spread: standard deviation over platforms and draws. Bias, error: what the drawn users' own validation "
        "said, less that; mean and standard deviation.",
        "",
        "| target | users | " + " | ".join(REHEARSED) + " | spread | bias | error |",
        "|---" * (5 + len(REHEARSED)) + "|",
    ]
    for name, of in figures["rehearsals"].items():
        for users, one in of.items():
            gains = " | ".join(f"{one['gains'][rung]:+.4f}" for rung in REHEARSED)
            doubts = f"{one['spread'] ** 0.5:.4f} | {one['bias']:+.4f} | {one['error'] ** 0.5:.4f}"
            lines.append(f"| {name} | {users} | {gains} | {doubts} |")
    lines += [
        "",
        "### Zero-shot",
        "",
        f"Mean over {len(SOURCE_SEEDS)} sources, which differ by their seed. *Heads*: mean over click, purchase and return, "
        "each once, which is what the bar was set by. Its .75 was set by a prototype's .738, .817 and .752 on all 4,271 "
        f"test anchors of retailrocket (*{ALL_ANCHORS}* below); the bar's first line, as all else here, takes at most 50 of "
        "each user's.",
        "",
        "| target | standardised | macro AUC, heads | of each source | macro AUC, cells | cells |",
        "|---|---|---|---|---|---|",
    ]
    for name, ways in figures["zero_shot"].items():
        for way, one in ways.items():
            heads, macro = ("{:.4f} [{:.4f}, {:.4f}]".format(*one[which]) for which in ("heads", "macro"))
            each = ", ".join(f"{auc:.4f}" for auc in one["heads of each source"])
            cells = ", ".join(f"{task} {auc:.3f}" for task, auc in one["cells"].items())
            by_what = "as a stranger" if way == "stranger" else "by its unlabelled events"
            lines.append(f"| {name} | {by_what} | {heads} | {each} | {macro} | {cells} |")
    lines += [
        "",
        "### Similarity and gain",
        "",
        "Features standardised by each platform's own events. Proxy A-distance: 0 alike, 2 told apart without error. Gain: "
        "*auto* over scratch at 1 %, of all sources together; what one source alone is worth is the AUC of its logistic "
        "regression on the target, over the tasks that both have.",
        "",
        "| target | source | A-distance | MMD² | correlation of coefficients | AUC of its regression | gain at 1 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, others in figures["likeness"].items():
        value = gain({name: by["1%"][name]}, "auto", "scratch")
        for other, one in others.items():
            cells = f"{one['a_distance']:.2f} | {one['mmd']:.3f} | {one['coefficients']:+.2f} | {one['zero_shot']:.3f}"
            lines.append(f"| {name} | {other} | {cells} | {value.value:+.4f} [{value.low:+.4f}, {value.high:+.4f}] |")
    lines += ["", "![Similarity and what a source is worth](plots/transfer-similarity.svg)"]
    return "\n".join(lines)


def _learned(draws: list[Draw]) -> str:
    low, high = min(one.learned for one in draws), max(one.learned for one in draws)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


# ── plots ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SHOWN = {
    "scratch": ("tab:gray", "-"),
    "finetune_head": ("tab:orange", "-"),
    "loose_head": ("gold", "-"),
    "finetune": ("tab:red", "-"),
    "interpolate": ("tab:pink", "-"),
    "adapter": ("tab:purple", "-"),
    "lora": ("tab:brown", "-"),
    "distil_source": ("tab:olive", "-"),
    "renormalise": ("tab:cyan", "-"),
    "logistic": ("black", ":"),
    "boosting": ("black", "--"),
    "auto": ("tab:blue", "-"),
}


def plot_ladder(figures: dict, path: Path) -> None:
    """Macro AUC by the share of labelled users, a panel for each target."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(TARGETS)), TARGETS, strict=True):
        users = {share: n for share, n in figures["users"][name].items()}
        shares = sorted(users, key=users.__getitem__)
        for rung, (colour, style) in SHOWN.items():
            has = [share for share in shares if rung in figures["ladder"][share][name]]
            values = [figures["ladder"][share][name][rung]["auc"] for share in has]
            wide = {"linewidth": 2.6, "zorder": 3} if rung == "auto" else {"linewidth": 1.2}
            axes.plot([users[s] for s in has], values, style, color=colour, label=rung, marker="o", markersize=3, **wide)
        axes.set(xscale="log", title=name, xlabel="labelled users of the target", ylabel="macro AUC, test")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    _save(figure, path)


def plot_likeness(figures: dict, path: Path) -> None:
    """What one source is worth by how alike its coefficients, and its features, are."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = zip(
        figure.subplots(1, 2, sharey=True),
        (("coefficients", "correlation of coefficients"), ("a_distance", "proxy A-distance")),
        strict=True,
    )
    for axes, (key, title) in panels:
        for name, colour in zip(TARGETS, ("tab:blue", "tab:orange"), strict=True):
            for other, one in figures["likeness"][name].items():
                axes.plot(one[key], one["zero_shot"], "o", color=colour)
                axes.annotate(
                    f"{other} → {name}", (one[key], one["zero_shot"]), fontsize=6, xytext=(3, 3), textcoords="offset points"
                )
        axes.set(xlabel=title, ylabel="AUC of the source's regression" if key == "coefficients" else "")
        axes.margins(x=0.35)
        axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Text as text: a tenth of the size."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transfer"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
