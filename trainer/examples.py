"""History → examples: replay through the serving fold, and the labels that had matured.

    events ─► replay (models.fold, up to the gate's start G) ─► features, Δt, status, views ─┐
    labels, matured by G ────────────────────────────────────────────────────────────────────┴─► Examples

Everything here uses only what was known at G in event time: events up to G, labels whose horizon ended by G. Every
platform has a G of its own (`GateStart`), since histories of platforms span different times. A tenth of the users is
held out of the student's training and calibrates it (the later half of their time), so that calibration needs no second
gap.

Shapes: M examples (FOLDED events up to G, sorted by user, then offset), F features, P platforms (0: shared), T tasks (the
binary heads first).
Knows nothing of Kafka, files, networks or the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from models.categories import view_dtype
from models.config import FoldConfig, HorizonsConfig
from models.events import BINARY_HEADS, HEADS, hash64
from models.fold import FOLDED, N_FEATURES, fold_params, starts_afresh
from models.scorer import fold_with_views
from models.state import empty_rows
from models.student import Columns, StudentConfig
from trainer.history import History
from trainer.labels import Labels, horizons_ms, matured
from trainer.rates import matured_counts, rate_features

CATEGORY = HEADS.index("category")
REPLAY_BATCH = 65_536
HELD_OUT = 10
"""One user in so many calibrates instead of training."""

Check = Callable[[], None]
"""Called between steps; raises to stop."""


_NEVER = np.int64(2**62)


class GateStart(NamedTuple):
    """The instants, ms, that end training and begin judging.

    A platform's events are judged after its own G. A user's events train up to the least G of the platforms on which he
    was ever seen. So of no user and no platform anything is learned that is later than what is judged of it: a user's
    labels that train had matured before his first judged event, whichever platform either is of, and a platform's last
    learned event comes before its first judged one. What one platform may teach another of the same days, through other
    people, stays; it is no label of anything judged.

    A platform without a G (too short a time to learn before and to judge after) neither trains nor is judged.
    """

    platform_P: np.ndarray
    """(P,) int64, of the history's platforms; very large where there is none."""
    user_U: np.ndarray
    """(U,) int64, of the history's users; very small where there is none."""

    @property
    def has_P(self) -> np.ndarray:
        """(P,) bool: the platform has one."""
        return self.platform_P < _NEVER

    @property
    def last_ms(self) -> int:
        """The latest of all platforms."""
        return int(self.platform_P[self.has_P].max())

    def after(self, history: History) -> np.ndarray:
        """(n,) bool: the events that are judged."""
        return history.events["ts"] > self.platform_P[history.platform]


class Replay(NamedTuple):
    """The fold over the events up to an instant, as serving did it."""

    rows: np.ndarray
    """(U,) rows of state of the history's users, after those events; `h` is 0."""
    index_M: np.ndarray
    """Positions in the history of the events kept, ascending."""
    features_MF: np.ndarray
    dt_s_M: np.ndarray
    status_M: np.ndarray
    views_M: np.ndarray


def replay(
    history: History,
    fold: FoldConfig,
    size: str,
    *,
    until_ms: int | np.ndarray | None = None,
    max_events: int | None = None,
    older_share: float = 0.0,
    batch: int = REPLAY_BATCH,
    check: Check = lambda: None,
) -> Replay:
    """Folds the history, up to each user's first event after `until_ms` (of all, or (U,) of each; None: all of it).
    However it is cut into batches the result is the same, byte for byte.

    Keeps what came of about `max_events` events only: the latest ones, and for `older_share` of them all that is older of
    some users, always the same, so that what seldom happens of late is not forgotten.
    """
    rows = empty_rows(len(history.users), size)
    events_N = np.flatnonzero(before(history, until_ms)) if until_ms is not None else np.arange(len(history))
    keep_N = _kept(history, events_N, max_events, older_share)
    m = int(keep_N.sum())
    out = Replay(
        rows,
        events_N[keep_N],
        np.empty((m, N_FEATURES), np.float32),
        np.empty(m, np.float32),
        np.empty(m, np.uint8),
        np.empty(m, view_dtype(size)),
    )
    scratch = Replay(
        rows,
        np.empty(0, np.int64),
        np.empty((batch, N_FEATURES), np.float32),
        np.empty(batch, np.float32),
        np.empty(batch, np.uint8),
        np.empty(batch, view_dtype(size)),
    )
    params, done = fold_params(fold), 0
    for start in range(0, len(events_N), batch):
        check()
        at = events_N[start : start + batch]
        slots, events = history.user[at].astype(np.int64), history.events[at]
        fold_with_views(rows, slots, events, params, *scratch[2:])
        kept = np.flatnonzero(keep_N[start : start + batch])
        for target, source in zip(out[2:], scratch[2:], strict=True):
            target[done : done + len(kept)] = source[kept]
        done += len(kept)
    return out


def _kept(history: History, events_N: np.ndarray, max_events: int | None, older_share: float) -> np.ndarray:
    """(N,) bool, of the positions `events_N` in the history: see `replay`."""
    if max_events is None or len(events_N) <= max_events:
        return np.ones(len(events_N), bool)
    ts_N, user_N = history.events["ts"][events_N], history.user[events_N]
    older = round(older_share * max_events)
    latest = len(ts_N) - (max_events - older)
    keep_N = ts_N >= np.partition(ts_N, latest)[latest]
    if older:
        # Users in the order of their hash: who comes first stays first, whoever else comes or grows.
        order = np.argsort(np.fromiter((hash64(f"older {user}") for user in history.users), np.uint64, len(history.users)))
        older_U = np.bincount(user_N[~keep_N], minlength=len(history.users))
        taken_U = np.zeros(len(history.users), bool)
        taken_U[order[np.cumsum(older_U[order]) <= older]] = True
        keep_N |= taken_U[user_N]
    return keep_N


def before(history: History, until_ms: int | np.ndarray) -> np.ndarray:
    """(n,) bool: the events of each user, in offset order, that come before his first one after `until_ms` (of all users,
    or (U,) of each)."""
    first_U = np.full(len(history.users), len(history))
    until_U = np.broadcast_to(np.asarray(until_ms), len(history.users))
    late = np.flatnonzero(history.events["ts"] > until_U[history.user])
    np.minimum.at(first_U, history.user[late], late)
    return np.arange(len(history)) < first_U[history.user]


def gate_start(
    history: History, labels: Labels, horizons: HorizonsConfig, fraction: float, max_events: int | None = None
) -> GateStart | None:
    """The gate's start of every platform and user. None where no platform has one.

    Of a platform: the latest `fraction` of the matured time of the longest horizon for which there is enough time to train
    before and to judge after. Its time begins with the `max_events` latest events of the history, and never with its own
    earliest thousandth: a platform whose clock says 1970 now and then must not stretch it.
    """
    ts_N, n = history.events["ts"], len(history)
    oldest = np.partition(ts_N, n - max_events)[n - max_events] if max_events is not None and n > max_events else None
    platform_P = np.full(len(history.platforms), _NEVER)
    for platform in range(len(history.platforms)):
        own = np.flatnonzero(history.platform == platform)
        skipped = len(own) // 1000
        if oldest is not None:
            skipped = max(skipped, int((ts_N[own] < oldest).sum()))
        if skipped < len(own):
            first = int(np.partition(ts_N[own], skipped)[skipped])
            platform_P[platform] = _start(first, int(labels.watermark_N[own].max()), horizons, fraction)
    if not (platform_P < _NEVER).any():
        return None
    user_U = np.full(len(history.users), _NEVER)
    np.minimum.at(user_U, history.user, platform_P[history.platform])
    return GateStart(platform_P, np.where(user_U < _NEVER, user_U, -_NEVER))


def _start(first: int, end: int, horizons: HorizonsConfig, fraction: float) -> np.int64:
    """Of a time from `first` to `end`, ms."""
    for horizon in sorted({int(h) for h in horizons_ms(horizons)}, reverse=True):
        span = end - horizon - first
        start = first + round((1.0 - fraction) * span)
        if start - horizon - first >= fraction * span > 0:
            return np.int64(start)
    return _NEVER


@dataclass
class Examples:
    """What the student learns from: M FOLDED events, sorted by user, then offset."""

    index_M: np.ndarray
    """Positions in the history."""
    columns: Columns
    """Tensors on the CPU."""
    starts_M: np.ndarray
    """bool: `h` is zero before it (first of a user, or of a user who was idle for too long)."""
    user_M: np.ndarray
    ts_M: np.ndarray
    tasks: tuple[str, ...]
    """BINARY_HEADS, then tasks that are learned and judged but not served."""
    y_MT: np.ndarray
    """float32 (M, T); means something only where one of the masks holds."""
    learn_MT: np.ndarray
    """bool: labels to learn from."""
    check_MT: np.ndarray
    """bool: labels to choose and calibrate by; of other events than those learned from."""
    next_M: np.ndarray
    """uint32: the next category where matured, else 0."""
    learn_next_M: np.ndarray
    """bool: the student learns from `next_M`; the tables count all of it."""
    category_M: np.ndarray
    """uint32: the user's last category, the event's own included."""
    views_M: np.ndarray
    own_MR: np.ndarray | None = None
    """float32: the user's own matured label rates (`trainer.rates`), which the teacher alone may look at."""

    @property
    def platform_M(self) -> np.ndarray:
        return self.columns.platform_N.numpy()

    def __len__(self) -> int:
        return len(self.ts_M)


def heads_of(history: History, known: Mapping[str, tuple[str, ...]] | None, gate: GateStart) -> dict[str, tuple[str, ...]]:
    """Platform → heads that it can have, for every platform of the history. `known` (the platform files) decides where
    it names a platform; for others the events up to the gate's start do: a head is possible where its evidence occurs."""
    seen = ~gate.after(history)
    heads = {}
    for index, platform in enumerate(history.platforms):
        own = history.events[seen & (history.platform == index)]
        possible = {
            "click": len(np.unique(own["kind"])) > 1,
            "purchase": True,  # on any platform
            "return": True,
            "category": bool((own["category"] != 0).mean() > 0.05) if len(own) else False,
        }
        derived = tuple(head for head in HEADS if possible[head])
        heads[platform] = tuple((known or {}).get(platform, derived))
    return heads


def make_examples(
    history: History, labels: Labels, replayed: Replay, config: StudentConfig, horizons: HorizonsConfig, gate: GateStart
) -> Examples:
    """FOLDED events of a replay up to each user's gate start, with the labels that had matured by then."""
    at = folded(history, replayed)
    index_M = replayed.index_M[at]
    user_M, ts_M = history.user[index_M], history.events["ts"][index_M].copy()
    platform_M = _rows_of(history, config)[history.platform[index_M]]
    known_M4 = matured(Labels(*(column[index_M] for column in labels)), ts_M, horizons, gate.user_U[user_M])
    known_M4 &= config.can_have()[platform_M] & gate.has_P[history.platform[index_M]][:, None]
    held_out_M = held_out(history.users)[user_M]
    check_MT, y_MT = known_M4[:, :CATEGORY] & held_out_M[:, None], labels.y_N3[index_M].astype(np.float32)
    counts = matured_counts(user_M, ts_M, y_MT, known_M4[:, :CATEGORY], horizons_ms(horizons)[:CATEGORY])
    return examples_of(
        history,
        replayed,
        at,
        config,
        tasks=BINARY_HEADS,
        y_MT=y_MT,
        learn_MT=known_M4[:, :CATEGORY] & ~held_out_M[:, None],
        check_MT=check_MT & late_half(check_MT, ts_M, platform_M),
        next_M=np.where(known_M4[:, CATEGORY], labels.category_N[index_M], 0).astype(np.uint32),
        learn_next_M=known_M4[:, CATEGORY] & ~held_out_M,
        own_MR=rate_features(*counts),
    )


def late_half(mask_MT: np.ndarray, ts_M: np.ndarray, platform_M: np.ndarray) -> np.ndarray:
    """(M, T) bool: of the examples of the mask, the later half of each platform × task."""
    late_MT = np.zeros(mask_MT.shape, bool)
    for task in range(mask_MT.shape[1]):
        for row in np.unique(platform_M):
            own = np.flatnonzero(mask_MT[:, task] & (platform_M == row))
            if len(own):
                late_MT[own, task] = ts_M[own] >= np.median(ts_M[own])
    return late_MT


def folded(history: History, replayed: Replay) -> np.ndarray:
    """(M,) places in the replay of its FOLDED events, sorted by user, then offset."""
    at = np.flatnonzero(replayed.status_M == FOLDED)
    return at[np.argsort(history.user[replayed.index_M[at]], kind="stable")]


def examples_of(history: History, replayed: Replay, at: np.ndarray, config: StudentConfig, **labels) -> Examples:
    """Examples of the places `at` of a replay, as `folded` gives them; `labels`: the fields of Examples that speak of
    labels."""
    index_M = replayed.index_M[at]
    events, user_M = history.events[index_M], history.user[index_M]
    features_MF, views_M = replayed.features_MF[at], replayed.views_M[at]
    first_M = np.r_[True, user_M[1:] != user_M[:-1]][: len(at)]
    return Examples(
        index_M=index_M,
        columns=Columns.of(events, features_MF, replayed.dt_s_M[at], _rows_of(history, config)[history.platform[index_M]]),
        starts_M=first_M | starts_afresh(features_MF, replayed.status_M[at]),
        user_M=user_M,
        ts_M=events["ts"].copy(),
        category_M=np.where(views_M["n"] > 0, views_M["ring_category"][:, 0], 0).astype(np.uint32),
        views_M=views_M,
        **labels,
    )


def check_loss(examples: Examples, logits_MT: np.ndarray, mask_MT: np.ndarray | None = None) -> float:
    """Mean over platform × task of the log-loss on the examples of a mask (bool; None: those to check by); NaN of none."""
    mask_MT = examples.check_MT if mask_MT is None else mask_MT
    losses = []
    for task in range(len(examples.tasks)):
        for row in np.unique(examples.platform_M):
            own_M = mask_MT[:, task] & (examples.platform_M == row)
            if own_M.any():
                z, y = logits_MT[own_M, task].astype(np.float64), examples.y_MT[own_M, task]
                losses.append(float((np.logaddexp(0.0, z) - y * z).mean()))
    return float(np.mean(losses)) if losses else float("nan")


def _rows_of(history: History, config: StudentConfig) -> np.ndarray:
    """(platforms of the history,) → the model's platform index, 0 for one that it does not know."""
    row = {name: i for i, name in enumerate(config.platforms, start=1)}
    return np.array([row.get(name, 0) for name in history.platforms], np.int64)


def held_out(users: list[str]) -> np.ndarray:
    """(U,) bool, the same in every round: by the user's pseudonym."""
    return np.fromiter((hash64(user) % HELD_OUT == 0 for user in users), bool, len(users))
