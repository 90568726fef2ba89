"""A hidden Markov model of shoppers, as a member of the teacher: what a state that no event names says of what comes next.

    a user's events: silence before, platform, kind ─► forward filter ─► belief: P(class, state | events so far) ─┐
    labels ─► how often it came true in each class and state ─────────────────────────────────────────────────────┴─► logit

A shopper has a class for life and a state that moves with every event; both are only ever believed. Given them,

    the silence after an event     the same instant (by how many events it has had), within the session, a new session
    the platform, in a new session by the class
    the state after it             by the state before, the silence and the platform
    the kind of the event          by the state, the class and the platform

The model learns from the events alone, by expectation maximisation (Baum et al., Annals of Mathematical Statistics, 1970);
states of customers as hidden Markov: Netzer, Lattin, Srinivasan (Marketing Science, 2008). Each class is pulled to what all
classes have in common. It begins with one class and splits it. Labels give one rate to each class and state, by the same
method, so that what is said is a mean of rates and nobody's history can be learned by heart.

Shapes: M events sorted by user, C classes, S states, G silences, U contexts of a silence (platform × place in the instant),
V contexts of a move (silence × platform), P platforms, K kinds, T tasks. Knows nothing of features but the kind, of items,
categories, splits in time or networks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from models.events import KINDS
from models.fold import FEATURE_COLUMNS
from trainer.examples import Check, Examples
from trainer.fit import of_users_with, seen
from trainer.teacher import Member, MoreMember
from trainer.train import LEAST_ANCHORS, LEAST_OF_A_CLASS
from trainer.transfer import subset

FOLDS = 5
SILENCE_S = np.array([0.5, 120, 360, 1800, *np.array([2, 6, 12, 24, 48, 96, 192, 384, 768]) * 3600.0])
"""Where a silence of the next length begins; up to the first it is none, the same instant."""
G, NEW_SESSION, PLACES = len(SILENCE_S) + 1, 4, 9
"""Silences from NEW_SESSION on begin a session; places in an instant from PLACES − 1 on are one."""
LONGEST = 8192
"""Events that are learned from, of one user."""
MOST_EVENTS = 400_000
"""Events that are learned from, of as many users as that takes."""
# How strongly each class is pulled to all of them, in units of events.
MOVE_PULL, SESSION_PULL, SILENCE_PULL, PLATFORM_PULL, KIND_PULL = 100.0, 20.0, 30.0, 5.0, 50.0
INSTANT_PULL, RATE_PULL = 20.0, 20.0
RATE_ROUNDS = 30
LEAST_CHANCE = 1e-4
_BATCH = 65_536


class Size(NamedTuple):
    """Of the model, and how long it learns."""

    classes: int = 12
    states: int = 9
    rounds: int = 60
    """With all classes, after `first_rounds` with one."""
    first_rounds: int = 40
    seed: int = 0


class Events(NamedTuple):
    """M events as the model sees them."""

    first_M: np.ndarray
    """bool: a user's first."""
    counts_M: np.ndarray
    """bool: not older than the one before it. Of one that is, nothing is learned, and the belief stays as it was."""
    silence_M: np.ndarray
    """Before the event, 0 … G − 1."""
    place_M: np.ndarray
    """Context of that silence, of the event before: platform · PLACES + place in the instant."""
    move_M: np.ndarray
    """Context of the move: silence · P + platform."""
    platform_M: np.ndarray
    kind_M: np.ndarray


class Markov(NamedTuple):
    """Probabilities."""

    start_CS: np.ndarray
    move_VCSS: np.ndarray
    """From, to."""
    silence_UGCS: np.ndarray
    """Of the silence after an event, by the state at the event."""
    platform_PCS: np.ndarray
    kind_PKCS: np.ndarray


def events_of(user_M: np.ndarray, ts_M: np.ndarray, platform_M: np.ndarray, kind_M: np.ndarray, n_platforms: int) -> Events:
    """`user_M`: sorted; each user's events in the order of arrival. `ts_M`: ms. `platform_M`: 0 … `n_platforms` − 1."""
    first_M = np.r_[True, user_M[1:] != user_M[:-1]][: len(user_M)]
    since_M, counts_M, place_M = _since(first_M, ts_M.astype(np.int64), platform_M.astype(np.int64))
    silence_M = np.searchsorted(SILENCE_S, since_M, side="right").astype(np.int64)
    move_M = silence_M * n_platforms + platform_M
    return Events(
        first_M, counts_M, silence_M, place_M, move_M.astype(np.int64), platform_M.astype(np.int64), kind_M.astype(np.int64)
    )


@njit(cache=True)
def _since(first_M, ts_M, platform_M):
    n = len(ts_M)
    since_M, counts_M, place_M = np.zeros(n), np.ones(n, np.bool_), np.zeros(n, np.int64)
    last, platform, place = 0, 0, 0
    for i in range(n):
        if first_M[i]:
            last, platform, place = ts_M[i], platform_M[i], 0
            continue
        gap = ts_M[i] - last
        if gap < 0:
            counts_M[i] = False
            continue
        since_M[i] = gap / 1000.0
        place_M[i] = platform * PLACES + min(place, PLACES - 1)
        last, platform, place = ts_M[i], platform_M[i], place + 1 if gap == 0 else 0
    return since_M, counts_M, place_M


# ── learning from events ─────────────────────────────────────────────────────────────────────────────────────────────


def learn(events: Events, learn_M: np.ndarray, n_platforms: int, size: Size, check: Check = lambda: None) -> Markov:
    """The model of the events of `learn_M` (bool; at least one). The same events and seed give the same model."""
    rng, n_kinds = np.random.default_rng(size.seed), len(KINDS)
    learn_M = learn_M & events.counts_M
    kind_PK = np.full((n_platforms, n_kinds), 0.5)
    np.add.at(kind_PK, (events.platform_M[learn_M], events.kind_M[learn_M]), 1.0)
    kind_PK = _shares(kind_PK, 1)
    share_P = _shares(np.bincount(events.platform_M[learn_M], minlength=n_platforms) + 0.5, 0)
    silence_UG, later_M = np.full((n_platforms * PLACES, G), 0.5), learn_M & ~events.first_M
    np.add.at(silence_UG, (events.place_M[later_M], events.silence_M[later_M]), 1.0)
    s = size.states
    moves_SS = _shares(0.6 * np.eye(s) + 0.4 * rng.dirichlet(np.full(s, 0.5), s), 1)
    model = Markov(
        rng.dirichlet(np.full(s, 5.0))[None],
        np.tile(moves_SS, (G * n_platforms, 1, 1, 1)),
        _shares(_shares(silence_UG, 1)[:, :, None, None] * rng.gamma(2.0, 1.0, (1, G, 1, s)), 1),
        np.tile(share_P[:, None, None], (1, 1, s)),
        _shares(kind_PK[:, :, None, None] * rng.gamma(2.0, 1.0, (1, n_kinds, 1, s)), 1),
    )
    for rounds_left in range(size.first_rounds + size.rounds, 0, -1):
        check()
        if rounds_left == size.rounds:
            model = _split(model, size.classes, rng)
        model = _maximised(_expected(events, learn_M, model)[0], kind_PK)
    return model


def log_likelihood(events: Events, of_M: np.ndarray, model: Markov) -> float:
    """Nats an event, of the events of a mask: each given those of the mask before it."""
    return _expected(events, of_M & events.counts_M, model)[1]


def _split(model: Markov, classes: int, rng: np.random.Generator) -> Markov:
    """Classes that differ a little from the one."""

    def shaken(x: np.ndarray, axis: int, noise: float, *shape: int) -> np.ndarray:
        return np.repeat(x, classes, axis) * rng.gamma(noise**-2, noise**2, shape)

    s, (p, k) = model.start_CS.shape[1], model.kind_PKCS.shape[:2]
    return Markov(
        np.repeat(model.start_CS, classes, 0) / classes,
        _shares(shaken(model.move_VCSS, 1, 0.25, 1, classes, s, s), 3),
        _shares(shaken(model.silence_UGCS, 2, 0.4, 1, G, classes, 1), 1),
        _shares(shaken(model.platform_PCS, 1, 0.6, p, classes, 1), 0),
        _shares(shaken(model.kind_PKCS, 2, 0.4, 1, k, classes, 1), 1),
    )


def _expected(events: Events, learn_M: np.ndarray, model: Markov) -> tuple[Markov, float]:
    """→ how often each thing is expected to have happened; the log-likelihood of an event."""
    counts = Markov(*(np.zeros_like(table) for table in model))
    longest = int(np.bincount(np.cumsum(events.first_M)[learn_M]).max(initial=1))
    total = _expect(*events._replace(counts_M=learn_M), *model, *counts, min(longest, LONGEST))
    return counts, total


def _maximised(counts: Markov, kind_PK: np.ndarray) -> Markov:
    """The most likely model of what is expected to have happened, each class pulled to all of them."""
    platforms, (classes, states) = len(kind_PK), counts.start_CS.shape
    most_SS = _shares(counts.move_VCSS.sum((0, 1)) + 0.01, 1)
    moves_VSS = _shares(counts.move_VCSS.sum(1) + 5.0 * most_SS, 2)
    kinds_PKS = _shares(counts.kind_PKCS.sum(2) + 5.0 * kind_PK[:, :, None], 1)
    platform_PC = counts.platform_PCS.sum(2)
    share_P1 = _shares(platform_PC.sum(1, keepdims=True) + 1.0, 0)
    platform_PC = _shares(platform_PC + PLATFORM_PULL * share_P1, 0)
    return Markov(
        _shares(counts.start_CS + 1.0, None),
        _shares(counts.move_VCSS + MOVE_PULL * moves_VSS[:, None], 3),
        _silences(counts.silence_UGCS.reshape(platforms, PLACES, G, classes, states)),
        np.repeat(platform_PC[:, :, None], states, 2),
        _shares(counts.kind_PKCS + KIND_PULL * kinds_PKS[:, :, None], 1),
    )


def _silences(counts_PLGCS: np.ndarray) -> np.ndarray:
    """(U, G, C, S): whether the instant goes on, by its place and the state; whether the session does, by class and state;
    how long until the next one, by class and state, whatever the platform."""
    p, places, g, c, s = counts_PLGCS.shape
    on_PLS, of_PLS = counts_PLGCS[:, :, 0].sum(2), counts_PLGCS.sum((2, 3))
    mean_PL1 = (on_PLS.sum(2, keepdims=True) + 0.5) / (of_PLS.sum(2, keepdims=True) + 1.0)
    on_PLS = (on_PLS + INSTANT_PULL * mean_PL1) / (of_PLS + INSTANT_PULL)
    within_PCS, past_PCS = counts_PLGCS[:, :, 1:NEW_SESSION].sum((1, 2)), counts_PLGCS[:, :, 1:].sum((1, 2))
    mean_P1S = (within_PCS.sum(1, keepdims=True) + 1.0) / (past_PCS.sum(1, keepdims=True) + 2.0)
    stays_PCS = (within_PCS + SESSION_PULL * mean_P1S) / (past_PCS + SESSION_PULL)
    shape_PG = _shares(counts_PLGCS[:, :, 1:NEW_SESSION].sum((1, 3, 4)) + 1.0, 1)
    until_GCS = counts_PLGCS[:, :, NEW_SESSION:].sum((0, 1))
    until_GCS = _shares(until_GCS + SILENCE_PULL * _shares(until_GCS.sum(1, keepdims=True) + 1.0, 0), 0)
    out = np.empty((p, places, g, c, s))
    out[:, :, 0] = on_PLS[:, :, None]
    past_PL1CS = (1.0 - on_PLS)[:, :, None, None]
    out[:, :, 1:NEW_SESSION] = past_PL1CS * (stays_PCS[:, None] * shape_PG[:, :, None, None])[:, None]
    out[:, :, NEW_SESSION:] = past_PL1CS * ((1.0 - stays_PCS)[:, None] * until_GCS)[:, None]
    return out.reshape(p * places, g, c, s)


def _shares(x: np.ndarray, axis: int | None) -> np.ndarray:
    return x / x.sum(axis, keepdims=True)


@njit(cache=True)
def _step(before_CS, after_CS, silence, place, move, platform, kind, move_VCSS, silence_UGCS, platform_PCS, kind_PKCS):
    """The belief after an event, of the one before it. → the event's likelihood"""
    classes, states = before_CS.shape
    total = 0.0
    for c in range(classes):
        for s in range(states):
            after_CS[c, s] = 0.0
        for r in range(states):
            x = before_CS[c, r] * silence_UGCS[place, silence, c, r]
            for s in range(states):
                after_CS[c, s] += x * move_VCSS[move, c, r, s]
        for s in range(states):
            seen_here = kind_PKCS[platform, kind, c, s]
            if silence >= NEW_SESSION:
                seen_here *= platform_PCS[platform, c, s]
            after_CS[c, s] *= seen_here
            total += after_CS[c, s]
    for c in range(classes):
        for s in range(states):
            after_CS[c, s] /= total
    return total


@njit(cache=True)
def _begin(after_CS, platform, kind, start_CS, platform_PCS, kind_PKCS):
    total = 0.0
    for c in range(len(start_CS)):
        for s in range(start_CS.shape[1]):
            after_CS[c, s] = start_CS[c, s] * platform_PCS[platform, c, s] * kind_PKCS[platform, kind, c, s]
            total += after_CS[c, s]
    for c in range(len(start_CS)):
        for s in range(start_CS.shape[1]):
            after_CS[c, s] /= total
    return total


@njit(cache=True)
def _expect(
    first, learn, silence, place, move, platform, kind,
    start_CS, move_VCSS, silence_UGCS, platform_PCS, kind_PKCS,
    n_start, n_move, n_silence, n_platform, n_kind, longest,
):  # fmt: skip
    """Forward, backward; adds what is expected to the `n_…`. → log-likelihood of an event"""
    classes, states = start_CS.shape
    belief, likely, at = np.empty((longest, classes, states)), np.empty(longest), np.empty(longest, np.int64)
    later, earlier, onto = np.empty((classes, states)), np.empty((classes, states)), np.empty(states)
    log_likelihood, n, i = 0.0, 0, 0
    while i < len(first):
        stop, length = i, 0
        while stop < len(first) and (stop == i or not first[stop]):
            if learn[stop] and length < longest:
                at[length] = stop
                length += 1
            stop += 1
        for t in range(length):
            e = at[t]
            if t == 0:
                likely[0] = _begin(belief[0], platform[e], kind[e], start_CS, platform_PCS, kind_PKCS)
            else:
                likely[t] = _step(
                    belief[t - 1], belief[t], silence[e], place[e], move[e], platform[e], kind[e],
                    move_VCSS, silence_UGCS, platform_PCS, kind_PKCS,
                )  # fmt: skip
            log_likelihood += np.log(likely[t])
            n += 1
        later[:] = 1.0
        for t in range(length - 1, -1, -1):
            e = at[t]
            p, k, new = platform[e], kind[e], t == 0 or silence[e] >= NEW_SESSION
            for c in range(classes):
                for s in range(states):
                    x = belief[t, c, s] * later[c, s]
                    n_kind[p, k, c, s] += x
                    if new:
                        n_platform[p, c, s] += x
                    if t == 0:
                        n_start[c, s] += x
            if t == 0:
                continue
            g, u, v = silence[e], place[e], move[e]
            for c in range(classes):
                for s in range(states):
                    onto[s] = kind_PKCS[p, k, c, s] * later[c, s] / likely[t]
                    if new:
                        onto[s] *= platform_PCS[p, c, s]
                for r in range(states):
                    leaves = belief[t - 1, c, r] * silence_UGCS[u, g, c, r]
                    arrives = 0.0
                    for s in range(states):
                        x = move_VCSS[v, c, r, s] * onto[s]
                        arrives += x
                        n_move[v, c, r, s] += leaves * x
                    earlier[c, r] = silence_UGCS[u, g, c, r] * arrives
                    n_silence[u, g, c, r] += leaves * arrives
            later[:] = earlier
        i = stop
    return log_likelihood / max(n, 1)


# ── belief, and what it says ─────────────────────────────────────────────────────────────────────────────────────────


def beliefs(events: Events, model: Markov) -> np.ndarray:
    """(M, C · S) float32, P(class, state) given the user's events up to and with each; begins at a user's first event."""
    out_MCS = np.empty((len(events.first_M), *model.start_CS.shape), np.float32)
    _filter(*events, *model, out_MCS)
    return out_MCS.reshape(len(out_MCS), model.start_CS.size)


@njit(cache=True)
def _filter(
    first, counts, silence, place, move, platform, kind,
    start_CS, move_VCSS, silence_UGCS, platform_PCS, kind_PKCS, out_MCS,
):  # fmt: skip
    before, after = np.empty(start_CS.shape), np.empty(start_CS.shape)
    for i in range(len(first)):
        if first[i]:
            _begin(after, platform[i], kind[i], start_CS, platform_PCS, kind_PKCS)
        elif counts[i]:
            _step(
                before, after, silence[i], place[i], move[i], platform[i], kind[i],
                move_VCSS, silence_UGCS, platform_PCS, kind_PKCS,
            )  # fmt: skip
        before[:] = after
        out_MCS[i] = after


def rates(belief_NX: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """(X,) how often it came true in each class and state, so that the mean by belief explains the labels best; pulled to
    the mean of all (½ where there is none)."""
    mean = (float(y_N.sum()) + 0.5) / (len(y_N) + 1.0)
    true_NX, false_NX = belief_NX[y_N > 0].astype(np.float64), belief_NX[y_N <= 0].astype(np.float64)
    rate_X = np.full(belief_NX.shape[1], mean)
    for _ in range(RATE_ROUNDS):
        came_X = _shares(true_NX * rate_X, 1).sum(0)
        not_X = _shares(false_NX * (1.0 - rate_X), 1).sum(0)
        rate_X = (came_X + RATE_PULL * mean) / (came_X + not_X + RATE_PULL)
    return rate_X


class _Speaker(NamedTuple):
    """A model, and the rates of each platform and task (X,)."""

    model: Markov
    rates: dict[tuple[int, int], np.ndarray]

    def says(self, events: Events, row_M: np.ndarray, n_tasks: int) -> np.ndarray:
        """(M, T) logits, NaN where there is no rate. `row_M`: rows of platforms."""
        out_MT = np.full((len(row_M), n_tasks), np.nan, np.float32)
        begins = np.flatnonzero(events.first_M)
        cuts = begins[np.r_[True, np.diff(begins // _BATCH) > 0][: len(begins)]]
        for start, stop in zip(cuts, [*cuts[1:], len(row_M)][: len(cuts)], strict=True):
            belief_NX = beliefs(Events(*(column[start:stop] for column in events)), self.model)
            for (row, task), rate_X in self.rates.items():
                at = np.flatnonzero(row_M[start:stop] == row)
                p = np.clip(belief_NX[at] @ rate_X, LEAST_CHANCE, 1.0 - LEAST_CHANCE)
                out_MT[start + at, task] = np.log(p / (1.0 - p))
        return out_MT


def hidden_markov(size: Size = Size(), check: Check = lambda: None) -> MoreMember:  # noqa: B008 (immutable)
    """The hidden Markov model as a further member. The mean logit of copies, each of which has not seen one of FOLDS parts
    of the users, neither their labels nor their events; of events learned from, the copy's that has not seen the user."""

    def fit(examples: Examples, offset_MT: np.ndarray) -> Member:
        n_platforms = int(examples.platform_M.max()) + 1
        events, fold_M = _events(examples, n_platforms), examples.user_M * 7919 % FOLDS
        speakers = []
        for fold in range(FOLDS):
            other_M = fold_M != fold
            few_M = _few(examples.user_M, seen(examples) & other_M, size.seed + fold)
            model = learn(events, few_M, n_platforms, size._replace(seed=size.seed + fold), check)
            speakers.append(_Speaker(model, _rates(examples, events, model, other_M)))
        n_tasks = len(examples.tasks)

        def said(some: Events, row_M: np.ndarray) -> np.ndarray:
            return np.stack([speaker.says(some, row_M, n_tasks) for speaker in speakers])

        def answer(later: Examples, wanted_M: np.ndarray, offset_XT: np.ndarray) -> np.ndarray:
            at = of_users_with(later, wanted_M[:, None])
            own = subset(later, at)
            return said(_events(own, n_platforms), own.platform_M).mean(axis=0)[wanted_M[at]]

        said_KMT, learned_M = said(events, examples.platform_M), examples.learn_MT.any(axis=1)
        out_MT = said_KMT.mean(axis=0)
        out_MT[learned_M] = said_KMT[fold_M, np.arange(len(examples))][learned_M]
        return Member(out_MT, answer)

    return fit


def _events(examples: Examples, n_platforms: int) -> Events:
    kind_M = examples.columns.features_NF.numpy()[:, FEATURE_COLUMNS["kind"]].argmax(axis=1)
    return events_of(examples.user_M, examples.ts_M, examples.platform_M, kind_M, n_platforms)


def _few(user_M: np.ndarray, learn_M: np.ndarray, seed: int) -> np.ndarray:
    """(M,) bool: the events to learn from, of random users where there are more than MOST_EVENTS."""
    count_U = np.bincount(user_M[learn_M], minlength=int(user_M.max(initial=-1)) + 1)
    order_U = np.random.default_rng(seed).permutation(len(count_U))
    taken_U = np.zeros(len(count_U), bool)
    taken_U[order_U[np.cumsum(count_U[order_U]) <= max(MOST_EVENTS, count_U[order_U[0]])]] = True
    return learn_M & taken_U[user_M]


def _rates(examples: Examples, events: Events, model: Markov, other_M: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """By the labels of the events of a mask; of each platform and task of which there are enough labels in all, as for the
    other members."""
    learn_MT = examples.learn_MT & other_M[:, None]
    at = of_users_with(examples, learn_MT)
    belief_NX, platform_N = beliefs(Events(*(column[at] for column in events)), model), examples.platform_M[at]
    out = {}
    for row in np.unique(examples.platform_M).tolist():
        for task in range(len(examples.tasks)):
            every = examples.y_MT[examples.learn_MT[:, task] & (examples.platform_M == row), task]
            if len(every) < LEAST_ANCHORS or min(every.sum(), len(every) - every.sum()) < LEAST_OF_A_CLASS:
                continue
            own = np.flatnonzero(learn_MT[at, task] & (platform_N == row))
            out[row, task] = rates(belief_NX[own], examples.y_MT[at[own], task])
    return out
