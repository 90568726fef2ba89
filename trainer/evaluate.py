"""How good a model is on events after the gate's start, by the very path that serves: `models.scorer.Scorer`.

    rows as they were at G ─► Scorer in micro-batches over the events after G ─► Scores ─► a cell a platform × head
                                                       candidate's and incumbent's ─► Paired, what trainer/gate.py judges

G is the gate's start (`trainer.examples.GateStart`), each user's for the rows, each platform's for what is judged.
`h` is rebuilt from each user's ring at G, for every model alike, as serving does right after a new recurrence.
Judged are FOLDED events after G whose label has matured by now. Every user's labels overlap with his own next ones, so n
is not a number of independent trials.

Shapes: N events.
Knows nothing of training, files, Kafka, or of what is good enough (`trainer/gate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from models.config import HorizonsConfig
from models.events import BINARY_HEADS, HEADS
from models.fold import FEATURE_NAMES, FOLDED
from models.scorer import Model, Scorer
from trainer import metrics
from trainer.examples import GateStart, before
from trainer.history import History
from trainer.labels import Labels, matured

BATCH = 4096
LEAST_CELL = 100
"""Fewer judged events, or only one outcome, do not gate."""
P_BINS, FEATURE_BINS = 20, 10
_SAMPLE = 20_000
_LOG_EVENTS = FEATURE_NAMES.index("log_events")
_CATEGORY = HEADS.index("category")


class Cell(NamedTuple):
    """One platform × binary head."""

    n: int
    base_rate: float
    log_loss: float
    auc: float
    """NaN where only one outcome occurs."""


class CategoryCell(NamedTuple):
    """Next category on one platform, from the five that a score names."""

    n: int
    nll: float
    """Mean −log p of what came; what the five leave is spread evenly over all other categories of the history."""
    hit_rate_5: float


class Report(NamedTuple):
    """What one model did."""

    cells: dict[tuple[str, str], Cell]
    """(platform, head) → cell."""
    categories: dict[str, CategoryCell]
    finite: bool
    """Every output that should be a number is one."""
    shares: dict[tuple[str, str], list[float]]
    """(platform, head) → share of the probabilities in each of P_BINS equal bins from 0 to 1, over all judged events."""

    def as_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """platform → head → figures, for a manifest."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        for (platform, head), cell in self.cells.items():
            out.setdefault(platform, {})[head] = {k: v for k, v in cell._asdict().items() if v == v}
        for platform, cell in self.categories.items():
            out.setdefault(platform, {})["category"] = cell._asdict()
        return out


class Judged(NamedTuple):
    """The events after G, and what a model said of them."""

    at: np.ndarray
    """Positions in the history."""
    status: np.ndarray
    p_N3: np.ndarray
    category_N5: np.ndarray
    """uint32: hashes, 0 none."""
    category_p_N5: np.ndarray
    activity_N: np.ndarray
    """int64: events of the user so far, this one included; 0 for one that is no event of his (a duplicate)."""


class Paired(NamedTuple):
    """What two models said of the same N events: those after G with a matured label of at least one head."""

    platforms: tuple[str, ...]
    platform_N: np.ndarray
    """Index into `platforms`."""
    user_N: np.ndarray
    known_N3: np.ndarray
    """bool, in the order of BINARY_HEADS: the label has matured, the candidate answers it, and has learned of such labels
    on this platform, or followed an incumbent that knew it."""
    y_N3: np.ndarray
    """uint8; means something only where known."""
    candidate_N3: np.ndarray
    """float32."""
    incumbent_N3: np.ndarray
    """float32; NaN where the incumbent does not answer."""
    activity_N: np.ndarray
    """Events of the user so far."""
    price_N: np.ndarray
    """uint8: price bucket, 0 none."""
    category_N: np.ndarray
    """uint32: hash of the event's own category, 0 none."""
    category_names: Mapping[int, str]
    """Hash → name."""


class Comparison(NamedTuple):
    """Both models on the same events."""

    candidate: Report
    incumbent: Report
    paired: Paired
    judged: Judged
    """The candidate's."""
    answered_N3: np.ndarray
    """(N, 3) bool, of `judged`: what would pair were its label known; `Paired.known_N3` are those of which it is."""


def predict(
    model: Model, history: History, rows: np.ndarray, gate: GateStart, *, check: Callable[[], None] = lambda: None
) -> Judged:
    """Runs a model over each user's events from the first one after his gate start. `rows`: as they were then; not
    changed."""
    scorer = Scorer(model, "cpu")
    rows = rows.copy()
    at = np.flatnonzero(~before(history, gate.user_U))
    hashes = model.categories.hashes_C if model.categories is not None else np.empty(0, np.uint32)
    hashes = np.append(hashes, np.uint32(0))  # index −1: none
    parts = []
    for start in range(0, len(at), BATCH):
        check()
        part = at[start : start + BATCH]
        slots, events = history.user[part].astype(np.int64), history.events[part]
        folded = scorer.fold(rows, slots, events)
        scores = scorer.score(rows, slots, events, *folded)
        activity = np.rint(np.expm1(folded.features[:, _LOG_EVENTS].astype(np.float64))).astype(np.int64)
        parts.append((folded.status, scores.p_N3, hashes[scores.category_N5], scores.category_p_N5, activity))
    if not parts:
        none, nobody = np.empty((0, 5), np.uint32), np.empty(0, np.int64)
        return Judged(at, np.empty(0, np.uint8), np.empty((0, 3), np.float32), none, none.astype(np.float32), nobody)
    return Judged(at, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def evaluate(
    model: Model,
    history: History,
    labels: Labels,
    horizons: HorizonsConfig,
    rows: np.ndarray,
    gate: GateStart,
    *,
    check: Callable[[], None] = lambda: None,
) -> Report:
    """The report of a model on the events after the gate's start; see `predict` for `rows`."""
    judged = predict(model, history, rows, gate, check=check)
    return _report(model, judged, history, labels, _known(judged, history, labels, horizons, gate))


def compare(
    candidate: Model,
    incumbent: Model,
    history: History,
    labels: Labels,
    horizons: HorizonsConfig,
    rows: np.ndarray,
    gate: GateStart,
    *,
    learned_R3: np.ndarray | None = None,
    check: Callable[[], None] = lambda: None,
) -> Comparison:
    """`evaluate` of both models, and what they said event by event.

    `learned_R3`: (P + 1, 3) bool, platforms of the candidate × binary heads of which it has learned something (None: all).
    One of which it has not is answered by what is shared, and is reported, but pairs only where the incumbent knows the
    platform.
    """
    ours = predict(candidate, history, rows, gate, check=check)
    theirs = predict(incumbent, history, rows, gate, check=check)
    known_N4 = _known(ours, history, labels, horizons, gate)
    pairs_N3 = _pairs(candidate, incumbent, history, learned_R3)[history.platform[ours.at]]
    return Comparison(
        _report(candidate, ours, history, labels, known_N4),
        _report(incumbent, theirs, history, labels, known_N4),
        _paired(ours, theirs, history, labels, known_N4[:, :3] & pairs_N3),
        ours,
        pairs_N3 & _of_window(ours, history, gate)[:, None],
    )


def _known(judged: Judged, history: History, labels: Labels, horizons: HorizonsConfig, gate: GateStart) -> np.ndarray:
    """(N, 4) bool in the order of HEADS: the event is judged, and its label has matured. The same for every model: what
    becomes of an event is the fold's to say."""
    ts_N = history.events["ts"][judged.at]
    own = Labels(*(column[judged.at] for column in labels))
    return matured(own, ts_N, horizons) & _of_window(judged, history, gate)[:, None]


def _of_window(judged: Judged, history: History, gate: GateStart) -> np.ndarray:
    """(N,) bool: it is an event of its own, after its platform's gate start."""
    return (judged.status == FOLDED) & gate.after(history)[judged.at]


def _pairs(candidate: Model, incumbent: Model, history: History, learned_R3: np.ndarray | None) -> np.ndarray:
    """(platforms of the history, 3) bool: what the two are compared on."""
    row = {name: i for i, name in enumerate(candidate.config.platforms, start=1)}
    can_P3 = _can_have(candidate, history)[:, : len(BINARY_HEADS)]
    if learned_R3 is None:
        return can_P3
    known_P1 = np.array([name in incumbent.config.platforms for name in history.platforms])[:, None]
    return can_P3 & (learned_R3[[row.get(name, 0) for name in history.platforms]] | known_P1)


def _paired(ours: Judged, theirs: Judged, history: History, labels: Labels, known_N3: np.ndarray) -> Paired:
    some = known_N3.any(axis=1)
    at = ours.at[some]
    return Paired(
        platforms=history.platforms,
        platform_N=history.platform[at],
        user_N=history.user[at],
        known_N3=known_N3[some],
        y_N3=labels.y_N3[at],
        candidate_N3=ours.p_N3[some],
        incumbent_N3=theirs.p_N3[some],
        activity_N=ours.activity_N[some],
        price_N=history.events["price"][at],
        category_N=history.events["category"][at],
        category_names=history.categories,
    )


def _report(model: Model, judged: Judged, history: History, labels: Labels, known_N4: np.ndarray) -> Report:
    own = Labels(*(column[judged.at] for column in labels))
    can_N4 = _can_have(model, history)[history.platform[judged.at]]
    cells, categories, shares = {}, {}, {}
    for index, platform in enumerate(history.platforms):
        here_N = history.platform[judged.at] == index
        for head, name in enumerate(BINARY_HEADS):
            of_cell = here_N & known_N4[:, head] & can_N4[:, head]
            if of_cell.any():
                cells[platform, name] = _cell(own.y_N3[of_cell, head], judged.p_N3[of_cell, head])
                p = judged.p_N3[here_N & (judged.status == FOLDED), head]
                shares[platform, name] = shares_of(p)
        of_cell = here_N & known_N4[:, _CATEGORY] & can_N4[:, _CATEGORY]
        if of_cell.any() and model.categories is not None:
            categories[platform] = _category_cell(
                own.category_N[of_cell],
                judged.category_N5[of_cell],
                judged.category_p_N5[of_cell],
                max(2, len(history.categories)),
            )
    scored_N3 = (can_N4[:, :3]) & (judged.status == FOLDED)[:, None]
    finite = bool(np.isfinite(judged.p_N3[scored_N3]).all() and np.isfinite(judged.category_p_N5).all())
    return Report(cells, categories, finite, shares)


def reference_histograms(
    report: Report, features_MF: np.ndarray, platform_M: np.ndarray, platforms: tuple[str, ...]
) -> dict:
    """What later traffic is compared with to see drift.

    `p`: platform → head → shares in P_BINS equal bins of the probability, on the judged events. `features`: platform →
    feature → `edges` (the inner deciles of the training events, equal ones merged) and the `shares` between them.
    """
    p: dict[str, dict[str, list[float]]] = {}
    for (platform, head), shares in report.shares.items():
        p.setdefault(platform, {})[head] = shares
    features: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row, platform in enumerate(platforms, start=1):
        own = np.flatnonzero(platform_M == row)
        own = own[:: max(1, len(own) // _SAMPLE)]
        if not len(own):
            continue
        deciles_BF = np.quantile(features_MF[own], np.linspace(0, 1, FEATURE_BINS + 1)[1:-1], axis=0)
        features[platform] = {}
        for feature, name in enumerate(FEATURE_NAMES):
            edges = np.unique(deciles_BF[:, feature])
            shares = _shares(features_MF[own, feature], edges)
            features[platform][name] = {"edges": [round(float(edge), 6) for edge in edges], "shares": shares}
    return {"p": p, "features": features}


def shares_of(p: np.ndarray) -> list[float]:
    """Share of the probabilities in each of P_BINS equal bins from 0 to 1."""
    return _shares(p, np.linspace(0.0, 1.0, P_BINS + 1)[1:-1])


def _shares(values: np.ndarray, edges: np.ndarray) -> list[float]:
    """Share of the values under, between and over the edges; a value at an edge counts as over it."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    return [round(float(share), 6) for share in counts / max(len(values), 1)]


def _can_have(model: Model, history: History) -> np.ndarray:
    """(platforms of the history, 4) bool: which heads the model answers."""
    row = {name: i for i, name in enumerate(model.config.platforms, start=1)}
    return model.config.can_have()[[row.get(name, 0) for name in history.platforms]].reshape(-1, len(HEADS))


def _cell(y: np.ndarray, p: np.ndarray) -> Cell:
    p = np.clip(p.astype(np.float64), 1e-7, 1.0 - 1e-7)
    loss = -np.where(y == 1, np.log(p), np.log1p(-p)).mean()
    both = 0 < int(y.sum()) < len(y) and bool(np.isfinite(p).all())
    return Cell(len(y), float(y.mean()), float(loss), metrics.auc(y, p) if both else float("nan"))


def _category_cell(next_N: np.ndarray, category_N5: np.ndarray, p_N5: np.ndarray, n_categories: int) -> CategoryCell:
    hit_N5 = category_N5 == next_N[:, None]
    named_N = (category_N5 != 0).sum(axis=1)
    left_N = np.clip(1.0 - p_N5.sum(axis=1, dtype=np.float64), 1e-7, 1.0) / np.maximum(n_categories - named_N, 1)
    p_N = np.where(hit_N5.any(axis=1), (p_N5 * hit_N5).sum(axis=1, dtype=np.float64), left_N)
    return CategoryCell(len(next_N), float(-np.log(np.maximum(p_N, 1e-12)).mean()), float(hit_N5.any(axis=1).mean()))
