"""Recorded data sets as histories, with who is scored and when, and what strictly followed.

    files ─► streams.replay ─► the platform's own file ─► canonical events ─► (invoices and baskets as one) ─► History
                                                          anchors, labels, one split in time, as the matrix has them

The matrix: which platform honestly has which label, on which anchors, in which days. What is not in it is not scored.

    platform          heads                            anchors                                    events
    retailrocket      click purchase return_1d return  after the first observed buy, ≤ 50 a user  users with ≤ 500
    taobao            click purchase return_1d         after the fourth observed buy              users not censored
    online_retail_uk  return return_30d                an invoice of sales                        its lines grouped
    complete_journey  purchase return                  a shopping trip                            baskets in 30 min merged

`return` alone is within 7 days. A buy that a user was selected for is known to come; hence "after the n-th buy".
Knows nothing of models, figures or Kafka.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from models.config import FoldConfig, HorizonsConfig
from models.events import (
    EVENT,
    KIND_CODE,
    PURCHASE,
    CanonicalEvent,
    event_hashes,
    hash32,
    hash64,
    platform_code,
    price_bucket,
)
from streams.platforms import load_platform
from streams.replay import read_dataset
from trainer.history import History
from trainer.labels import make_labels

ROOT = Path(__file__).resolve().parent.parent
DAY_MS, DAY_S = 86_400_000, 86_400.0
TASKS = ("click", "purchase", "return", "return_1d", "return_30d")
"""Binary labels; the first three are the student's heads."""
RETURNS_S = {"return": 7 * DAY_S, "return_1d": DAY_S, "return_30d": 30 * DAY_S}
TRAIN, VALIDATE, TEST = 0, 1, 2
ANCHORS_A_USER = 50


@dataclass(frozen=True)
class Spec:
    """A row of the matrix. Days count from the platform's first event, ends excluded."""

    tasks: tuple[str, ...]
    days: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    """train, validate, test."""
    least_buys: int = 0
    """An anchor has at least so many buys behind it, itself included."""
    sales_only: bool = False
    most_events: int | None = None
    """Users with more are left out."""
    capped: bool = False
    """At most ANCHORS_A_USER anchors a user in each part of the split."""
    censored: str | None = None
    """File whose users are left out."""
    group_gap_ms: int | None = None
    """Lines of one session (invoice, basket) are one event; so are those of sessions that begin within the gap."""


MATRIX: dict[str, Spec] = {
    "retailrocket": Spec(
        ("click", "purchase", "return_1d", "return"), ((5, 70), (77, 94), (101, 131)), 1, most_events=500, capped=True
    ),
    "taobao": Spec(
        ("click", "purchase", "return_1d"), ((0, 4), (5, 6), (7, 8)), 4, censored="taobao/censored_pairs.parquet"
    ),
    "online_retail_uk": Spec(("return", "return_30d"), ((14, 200), (230, 270), (300, 343)), sales_only=True, group_gap_ms=0),
    "complete_journey": Spec(("purchase", "return"), ((28, 230), (237, 280), (287, 358)), group_gap_ms=30 * 60_000),
}
WITH_CATEGORIES = ("taobao", "online_retail_uk", "complete_journey")
CELLS: tuple[tuple[str, str], ...] = tuple((platform, task) for platform, spec in MATRIX.items() for task in spec.tasks)


class DataSet(NamedTuple):
    """One or more platforms' events, in the order of the fold. n events."""

    history: History
    split_N: np.ndarray
    """int8: TRAIN, VALIDATE, TEST, −1 in between; −2 before the first day of training."""
    taught_N: np.ndarray
    """bool: from the first day of training to the first of validation; a teacher may be asked, labels or not."""
    anchor_N: np.ndarray
    """bool: scored, where its split is one."""
    uncapped_N: np.ndarray
    """bool: the same without the cap on a user's anchors, in the gaps too."""
    y_NT: np.ndarray
    """uint8 (n, len(TASKS))."""
    can_NT: np.ndarray
    """bool: the platform has this task."""
    category_N: np.ndarray
    """uint32: hash of the next category, strictly later; 0 where none follows."""

    def of(self, platform: str, task: str, part: int) -> np.ndarray:
        """Positions of a cell's anchors in one part of the split."""
        here = self.history.platform == self.history.platforms.index(platform)
        return np.flatnonzero(here & self.anchor_N & (self.split_N == part) & self.can_NT[:, TASKS.index(task)])

    def gap_anchors(self) -> np.ndarray:
        """bool: anchors of the gaps, the cap being on both together. Nothing learns from them and nothing is judged on
        them; a trainer would calibrate with them."""
        at = np.flatnonzero(self.uncapped_N & (self.split_N == -1))
        capped = np.array([MATRIX[name].capped for name in self.history.platforms])[self.history.platform[at]]
        out = np.zeros(len(self.uncapped_N), bool)
        out[at[~capped]] = True
        out[at[capped]] = _at_most(ANCHORS_A_USER, capped[capped], self.history.user[at[capped]], self.split_N[at[capped]])
        return out


def load(
    data: Path, platforms: Iterable[str] = tuple(MATRIX), progress: Callable[[str], None] = lambda name: None
) -> DataSet:
    """Reads the platforms from the folder of data sets. ConfigError where a file is missing."""
    rows, events = [], []
    for platform in platforms:
        progress(platform)
        own = list(_events(data, platform))
        rows += [(platform, len(own))]
        events += own
    return _as_dataset(events, tuple(name for name, _ in rows))


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _events(data: Path, name: str) -> Iterator[CanonicalEvent]:
    """Canonical events of a platform by ts, of the users that the matrix takes; `user` is not a pseudonym here."""
    spec = MATRIX[name]
    platform = load_platform(ROOT / "deploy" / "platforms" / f"{name}.toml")
    left_out = set()
    if spec.censored:
        left_out = {str(user) for user in pq.read_table(data / spec.censored, columns=["user"])["user"].to_pylist()}
    events = []
    for i, (topic, _, value, _) in enumerate(read_dataset(data, platform)):
        event = platform.canonicalise(value, topic=topic, partition=0, offset=i, now_ms=2**53, future_tolerance_ms=0)
        if event.user not in left_out:
            event.user = f"{name}:{event.user}"
            event.platform = sys.intern(name)
            events.append(event)
    if spec.group_gap_ms is not None:
        events = sorted(_trips(events, spec.group_gap_ms), key=lambda event: event.ts)
    if spec.most_events:
        counts: dict[str, int] = {}
        for event in events:
            counts[event.user] = counts.get(event.user, 0) + 1
        events = [event for event in events if counts[event.user] <= spec.most_events]
    return iter(events)


def _trips(events: list[CanonicalEvent], gap_ms: int) -> Iterator[CanonicalEvent]:
    """One event for all lines of a user that share a session or begin within the gap of the line before, kind by kind:
    the time of the last, what was most spent on, the whole amount, how many different items."""
    order = sorted(range(len(events)), key=lambda i: (events[i].user, events[i].ts, events[i].session or "", i))
    trip: list[CanonicalEvent] = []
    for i in order:
        event = events[i]
        if trip:
            last = trip[-1]
            together = last.session == event.session or (gap_ms > 0 and event.ts - last.ts <= gap_ms)
            if last.user != event.user or last.kind != event.kind or not together:
                yield _trip(trip)
                trip = []
        trip.append(event)
    if trip:
        yield _trip(trip)


def _trip(lines: list[CanonicalEvent]) -> CanonicalEvent:
    spent = [abs((line.price or 0.0) * (1.0 if line.quantity is None else line.quantity)) for line in lines]
    main = lines[int(np.argmax(spent))]
    return CanonicalEvent(
        event_id=lines[0].event_id,
        platform=main.platform,
        user=main.user,
        kind=main.kind,
        ts=lines[-1].ts,
        item=main.item,
        category=main.category,
        text=main.text,
        session=lines[-1].session,
        price=sum(spent),
        quantity=float(len({line.item for line in lines})),
    )


# ── columns, labels, split ───────────────────────────────────────────────────────────────────────────────────────────


def _as_dataset(events: list[CanonicalEvent], platforms: tuple[str, ...]) -> DataSet:
    history = _as_history(events, platforms)
    labels = {}
    fold = FoldConfig()
    for task, seconds in RETURNS_S.items():
        labels[task] = make_labels(history, fold, HorizonsConfig(return_s=seconds))
    first = labels["return"]
    columns = [first.y_N3[:, 0], first.y_N3[:, 1], *(labels[task].y_N3[:, 2] for task in RETURNS_S)]
    y_NT = np.stack(columns, axis=1)
    split_N = np.full(len(events), -1, np.int8)
    anchor_N, uncapped_N, taught_N = np.zeros((3, len(events)), bool)
    can_NT = np.zeros(y_NT.shape, bool)
    for index, name in enumerate(platforms):
        own = np.flatnonzero(history.platform == index)
        split_N[own], anchor_N[own], uncapped_N[own], taught_N[own] = _split(history, own, MATRIX[name])
        can_NT[own] = [task in MATRIX[name].tasks for task in TASKS]
    return DataSet(history, split_N, taught_N, anchor_N, uncapped_N, y_NT, can_NT, first.category_N)


def _as_history(events: list[CanonicalEvent], platforms: tuple[str, ...]) -> History:
    n = len(events)
    out = np.zeros(n, EVENT)
    users: dict[str, int] = {}
    categories: dict[int, str] = {}
    out["offset"] = np.arange(n)
    out["ts"] = [event.ts for event in events]
    out["item"] = [hash32(event.item) for event in events]
    out["category"] = [hash32(event.category) for event in events]
    out["quantity"] = [1.0 if event.quantity is None else event.quantity for event in events]
    out["platform"] = [platform_code(event.platform) for event in events]
    out["kind"] = [KIND_CODE[event.kind] for event in events]
    out["price"] = [price_bucket(event.price) for event in events]
    out["id"] = event_hashes(np.array([hash64(event.event_id) for event in events], np.uint64), out["platform"])
    for event, category in zip(events, out["category"].tolist(), strict=True):
        if event.category:
            categories[category] = event.category
    user = np.array([users.setdefault(event.user, len(users)) for event in events], np.int32)
    platform = np.array([platforms.index(event.platform) for event in events], np.int16)
    zeros = np.zeros(n, np.int32)
    return History(out, user, platform, zeros, np.arange(n), list(users), platforms, categories)


def _split(history: History, own: np.ndarray, spec: Spec) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """→ (split, anchor, uncapped, taught) of a platform's events, which are in the order of time."""
    ts, user = history.events["ts"][own], history.user[own]
    bought = history.events["kind"][own] == PURCHASE
    day = (ts - ts.min()) / DAY_MS
    split = np.full(len(own), -1, np.int8)
    split[day < spec.days[0][0]] = -2
    for part, (start, stop) in enumerate(spec.days):
        split[(day >= start) & (day < stop)] = part
    uncapped = _so_far(bought, user) >= spec.least_buys
    if spec.sales_only:
        uncapped &= bought
    anchor = uncapped.copy()
    if spec.capped:
        anchor &= _at_most(ANCHORS_A_USER, anchor & (split >= 0), user, split)
    return split, anchor, uncapped, (day >= spec.days[0][0]) & (day < spec.days[1][0])


def _so_far(happened: np.ndarray, user: np.ndarray) -> np.ndarray:
    """(n,) int: how often it happened to the event's user up to and with the event."""
    order = np.argsort(user, kind="stable")
    total = np.cumsum(happened[order])
    start = np.flatnonzero(np.r_[True, np.diff(user[order]) != 0])
    before = np.repeat(total[start] - happened[order][start], np.diff(np.r_[start, len(order)]))
    out = np.empty(len(user), np.int64)
    out[order] = total - before
    return out


def _at_most(most: int, of: np.ndarray, user: np.ndarray, split: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n,) bool: a random `most` of each user's events of `of` in each part of the split, the same every time."""
    at = np.random.default_rng(seed).permutation(np.flatnonzero(of))
    group = user[at].astype(np.int64) * 8 + split[at]
    order = np.argsort(group, kind="stable")
    start = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    rank = np.arange(len(at)) - np.repeat(start, np.diff(np.r_[start, len(at)]))
    out = np.zeros(len(of), bool)
    out[at[order[rank < most]]] = True
    return out
