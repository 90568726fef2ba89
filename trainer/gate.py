"""The gate: whether a candidate is published, and why not.

    trainer.evaluate.compare ─► Paired ──────────────────┐
    adversarial: extreme rows and events ─► problems     ├─► Evidence ─► decide ─► Verdict ─► the manifest, the log
    scoring_p99_ms: the clock ─► ms ─────────────────────┘     (examine)     (pure)

Rules, every one of which is judged and reported, in this order (`Limits` holds the numbers, and which of them refuse):

    finite                  a number for every extreme and every judged event                      else not_finite
    cells                   some platform × head has enough later events                           else too_few
    log_loss                mean over cells not above the incumbent's by more than noise           else not_better
    better                  … and below it at the point                                            else not_better
    hit_rate                the five categories do not hit clearly less often                      else not_better
    auc, pr_auc             on no cell significantly lower, or lower by much                       else refused
    ece                     on no cell surely above the limit                                      else refused
    predicted_over_actual   on no cell surely out of its range                                     else refused
    slices                  on no slice significantly worse, Holm-corrected                        else refused
    p99                     of 1,024 events, within the budget                                     else refused

Intervals are 95 %, by resampling users whole, the same resamples for both models. A user's events are no independent
trials, so where there are too few users there is no interval, and only rules that speak of the point can refuse.

Shapes: N events of `Paired`; n events of a group (a cell or a slice × head); D resamples.
Knows nothing of training, files, Kafka, or how a model came about; `decide` knows no model either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from models.config import GATE_RULES
from models.events import BINARY_HEADS, EVENT, PURCHASE, platform_code
from models.fold import DUPLICATE, MAX_QUANTITY
from models.scorer import Model, Scorer, Scores
from models.state import N_KINDS, empty_rows
from trainer import metrics
from trainer.evaluate import LEAST_CELL, Comparison, Paired
from trainer.metrics import Interval, Resamples

Outcome = Literal["published", "not_finite", "too_few", "not_better", "refused"]
Check = Callable[[], None]
"""Called between steps; raises to stop."""

TIMED_EVENTS = 1024
TOP_CATEGORIES = 10
NAN = float("nan")
_MAX_TS = 253_402_300_799_999
"""The last ms that a canonical event may have."""
_OUTCOMES: dict[str, Outcome] = {
    "finite": "not_finite",
    "cells": "too_few",
    "log_loss": "not_better",
    "better": "not_better",
    "hit_rate": "not_better",
}


class Limits(NamedTuple):
    """The gate's numbers."""

    draws: int = 200
    seed: int = 0
    least_users: int = 10
    """With fewer there is no interval."""
    least_events: int = LEAST_CELL
    """A cell with fewer, or with one outcome only, does not gate at all."""
    ranked_events: int = 1000
    ranked_of_an_outcome: int = 100
    """Enough for `auc` and `pr_auc`: so many events, and so many of either outcome."""
    ranking_drop: float = 0.005
    ece: float = 0.010
    ratio_low: float = 0.97
    ratio_high: float = 1.03
    forgive_better: bool = True
    """`ece` and `predicted_over_actual` spare a cell on which the incumbent is further off: to keep a worse model because a
    better one is not perfect would help nobody. False: they are absolute."""
    positives: int = 1000
    """What `predicted_over_actual` needs of a cell and `slices` of a slice."""
    alpha: float = 0.05
    """Family-wise, over all slices."""
    hit_rate_drop: float = 0.02
    """In the mean over platforms of HR@5."""
    p99_ms: float = 50.0
    enforced: tuple[str, ...] = GATE_RULES
    """Rules that refuse. What the others find is said and written down, and refuses nothing."""


class Evidence(NamedTuple):
    """All that the gate judges by."""

    paired: Paired
    hit_rates: Mapping[str, tuple[float, float]]
    """Platform → HR@5 of candidate and incumbent, where both name categories."""
    problems: tuple[str, ...]
    """Where the candidate is not finite."""
    p99_ms: float


class Compared(NamedTuple):
    """A figure of both models. NaN where there is none."""

    candidate: float
    incumbent: float
    difference: Interval
    """Candidate − incumbent. No bounds: too few users. No value: it was not compared."""


class CellVerdict(NamedTuple):
    """One platform × binary head. All figures are NaN where there are too few events, or not both outcomes; those of the
    incumbent where it does not answer."""

    platform: str
    head: str
    n: int
    users: int
    positives: int
    log_loss: Compared
    auc: Compared
    """No difference where the incumbent says the same of every event."""
    pr_auc: Compared
    ece: Interval
    """Candidate's."""
    predicted_over_actual: Interval
    """Candidate's."""
    incumbent_ece: float
    incumbent_predicted_over_actual: float


class SliceVerdict(NamedTuple):
    """One binary head on a part of the events, over all platforms."""

    dimension: str
    """`platform`, `activity`, `price` or `category`."""
    name: str
    head: str
    n: int
    users: int
    positives: int
    log_loss: Compared
    p_value: float
    """Two-sided, of the log-loss being worse; NaN where the slice has too few positives or users to be judged."""
    worse: bool
    """Significantly, after Holm's correction."""


class Rule(NamedTuple):
    """What became of one rule."""

    name: str
    found: str
    """The numbers: all of a single figure, else those of the worst cell or slice."""
    refusals: tuple[str, ...]
    """One for each reason to refuse, each with the rule's name and its numbers. Empty: passed."""


class Verdict(NamedTuple):
    """What the gate says."""

    outcome: Outcome
    reason: str
    """All refusals of the rules that are enforced, or by how much the candidate is better."""
    noticed: tuple[str, ...]
    """What rules found that are not enforced."""
    log_loss: Compared
    """Mean over the cells that gate, each counted once."""
    rules: tuple[Rule, ...]
    cells: tuple[CellVerdict, ...]
    slices: tuple[SliceVerdict, ...]
    events: int
    users: int
    p99_ms: float
    limits: Limits

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it: named fields as objects, six decimals, null for what there is none of."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {key: _plain(part) for key, part in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if math.isfinite(value) else None
    return value


# ── the decision ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Draws:
    """Resamples of all users of the evidence: one set for every figure that is a mean, so that cells and slices, which
    share users, are resampled together."""

    _AT_ONCE = 10
    """Draws held as float64 at a time: bounds the memory."""

    def __init__(self, user_N: np.ndarray, limits: Limits) -> None:
        users, self._of_event_N = np.unique(user_N, return_inverse=True)
        self._n_users, each, self._times = len(users), np.arange(len(users)), []
        for first in range(0, limits.draws, self._AT_ONCE):
            drawn = Resamples(each, min(self._AT_ONCE, limits.draws - first), seed=1000 * limits.seed + first)
            self._times.append(np.stack([drawn.weights(k) for k in range(len(drawn))]).astype(np.uint16))

    def means(self, at: np.ndarray, *values: np.ndarray) -> np.ndarray:
        """(len(values), D) means over the events `at` of values (n,); NaN in a draw that has none of these events."""
        user = self._of_event_N[at]
        sums_UK = np.stack([np.bincount(user, own, self._n_users) for own in (np.ones(len(at)), *values)], axis=1)
        sums_KD = np.concatenate([times_DU.astype(np.float64) @ sums_UK for times_DU in self._times]).T
        with np.errstate(invalid="ignore"):
            return sums_KD[1:] / sums_KD[0]


class _Group(NamedTuple):
    """Events of one head that are looked at together."""

    at: np.ndarray
    """Positions in `Paired`."""
    user: np.ndarray
    users: int
    y: np.ndarray
    ours: np.ndarray
    """float64 (n,)."""
    theirs: np.ndarray
    draws: _Draws | None
    """None: too few users."""

    @property
    def positives(self) -> int:
        return int(self.y.sum())

    @property
    def answered(self) -> bool:
        """By both models, at every event."""
        return bool(np.isfinite(self.ours).all() and np.isfinite(self.theirs).all())

    def judged(self, limits: Limits) -> bool:
        """Enough events, both outcomes, and the candidate answers all of it."""
        enough = len(self.y) >= limits.least_events and 0 < self.positives < len(self.y)
        return enough and bool(np.isfinite(self.ours).all())

    def worse_by(self) -> np.ndarray:
        """(n,) by how much the candidate's log-loss is higher."""
        return metrics.log_losses(self.y, self.ours) - metrics.log_losses(self.y, self.theirs)

    def worse_by_draws(self) -> np.ndarray | None:
        """(D,) of the mean of `worse_by`."""
        return self.draws.means(self.at, self.worse_by())[0] if self.draws is not None else None

    def log_loss(self, worse_by_draws: np.ndarray | None) -> Compared:
        ours, theirs = metrics.log_loss(self.y, self.ours), metrics.log_loss(self.y, self.theirs)
        return _compared(ours, theirs, worse_by_draws)


def decide(evidence: Evidence, limits: Limits | None = None, *, check: Check = lambda: None) -> Verdict:
    """The verdict: arrays in, numbers and reasons out. The same evidence gives the same verdict. `check` is called
    between cells and slices and may raise to stop; nothing else is raised for evidence that `compare` can make."""
    limits, paired = limits or Limits(), evidence.paired
    draws = _Draws(paired.user_N, limits)
    groups = [
        (platform, head, _group(paired, draws, limits, h, paired.platform_N == index))
        for index, platform in enumerate(paired.platforms)
        for h, head in enumerate(BINARY_HEADS)
    ]
    groups = [(platform, head, group) for platform, head, group in groups if len(group.at)]
    gating = [group for _, _, group in groups if group.judged(limits) and group.answered]
    cells = tuple(_cell(platform, head, group, limits, check) for platform, head, group in groups)
    slices = _slices(paired, draws, limits, check)
    log_loss = _mean_log_loss(gating, draws, limits)
    rules = (
        _finite(evidence),
        _enough(gating, cells, limits),
        _log_loss(log_loss, len(gating)),
        _better(log_loss, len(gating)),
        _hit_rate(evidence.hit_rates, limits),
        _ranking("auc", cells, limits),
        _ranking("pr_auc", cells, limits),
        _ece_rule(cells, limits),
        _ratio_rule(cells, limits),
        _slices_rule(slices),
        _p99(evidence.p99_ms, limits),
    )
    refusing = [rule for rule in rules if rule.refusals and rule.name in limits.enforced]
    outcome = _OUTCOMES.get(refusing[0].name, "refused") if refusing else "published"
    better = f"mean log-loss {log_loss.candidate:.4f} under {log_loss.incumbent:.4f} over {len(gating)} cells"
    return Verdict(
        outcome=outcome,
        reason="; ".join(refusal for rule in refusing for refusal in rule.refusals) or better,
        noticed=tuple(r for rule in rules if rule.name not in limits.enforced for r in rule.refusals),
        log_loss=log_loss,
        rules=rules,
        cells=cells,
        slices=slices,
        events=len(paired.user_N),
        users=len(np.unique(paired.user_N)),
        p99_ms=evidence.p99_ms,
        limits=limits,
    )


def _group(paired: Paired, draws: _Draws, limits: Limits, head: int, mask_N: np.ndarray) -> _Group:
    at = np.flatnonzero(mask_N & paired.known_N3[:, head])
    user = paired.user_N[at]
    users = len(np.unique(user))
    ours, theirs = (p_N3[at, head].astype(np.float64) for p_N3 in (paired.candidate_N3, paired.incumbent_N3))
    own_draws = draws if users >= limits.least_users else None
    return _Group(at, user, users, paired.y_N3[at, head], ours, theirs, own_draws)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_NOTHING = Interval(NAN, NAN, NAN)
_NOT_COMPARED = Compared(NAN, NAN, _NOTHING)


def _interval(value: float, draws: np.ndarray | None) -> Interval:
    return Interval(value, NAN, NAN) if draws is None else metrics.interval(value, draws)


def _compared(candidate: float, incumbent: float, draws: np.ndarray | None) -> Compared:
    return Compared(candidate, incumbent, _interval(candidate - incumbent, draws))


def _cell(platform: str, head: str, group: _Group, limits: Limits, check: Check) -> CellVerdict:
    check()
    counts = (platform, head, len(group.at), group.users, group.positives)
    if not group.judged(limits):
        return CellVerdict(*counts, _NOT_COMPARED, _NOT_COMPARED, _NOT_COMPARED, _NOTHING, _NOTHING, NAN, NAN)
    ratio_D = None
    if group.draws is not None:
        ours_D, actual_D = group.draws.means(group.at, group.ours, group.y)
        ratio_D = ours_D[actual_D > 0] / actual_D[actual_D > 0]
    alone = Compared(metrics.log_loss(group.y, group.ours), NAN, _NOTHING)
    return CellVerdict(
        *counts,
        log_loss=group.log_loss(group.worse_by_draws()) if group.answered else alone,
        **_rankings(group, limits),
        ece=_ece(group, group.ours),
        predicted_over_actual=_interval(metrics.predicted_over_actual(group.y, group.ours), ratio_D),
        incumbent_ece=_ece(group, group.theirs).value if group.answered else NAN,
        incumbent_predicted_over_actual=metrics.predicted_over_actual(group.y, group.theirs),
    )


def _rankings(group: _Group, limits: Limits) -> dict[str, Compared]:
    """`auc` and `pr_auc`. A constant ranks nothing, so that there is nothing to compare with."""
    comparable = group.answered and np.ptp(group.theirs) > 0.0
    resamples = Resamples(group.user, limits.draws, limits.seed) if comparable and group.draws is not None else None
    found = {}
    for name, figure, draws_of in (
        ("auc", metrics.auc, Resamples.auc),
        ("pr_auc", metrics.average_precision, Resamples.average_precision),
    ):
        ours = figure(group.y, group.ours)
        theirs = figure(group.y, group.theirs) if group.answered else NAN
        draws = None
        if resamples is not None:
            draws = draws_of(resamples, group.y, group.ours) - draws_of(resamples, group.y, group.theirs)
        found[name] = _compared(ours, theirs, draws) if comparable else Compared(ours, theirs, _NOTHING)
    return found


def _ece(group: _Group, p: np.ndarray) -> Interval:
    """Calibration error; of too few users without an interval, and as if their events erred alone."""
    if group.draws is None:
        return Interval(metrics.ece(group.y, p), NAN, NAN)
    return metrics.ece_interval(*metrics.ece_squares(group.y, p, partial(group.draws.means, group.at)))


def _mean_log_loss(gating: list[_Group], draws: _Draws, limits: Limits) -> Compared:
    """Mean over cells, with the interval of the difference: a resampled user takes his events of every cell along."""
    if not gating:
        return _NOT_COMPARED
    ours = float(np.mean([metrics.log_loss(group.y, group.ours) for group in gating]))
    theirs = float(np.mean([metrics.log_loss(group.y, group.theirs) for group in gating]))
    if len(np.unique(np.concatenate([group.user for group in gating]))) < limits.least_users:
        return _compared(ours, theirs, None)
    cells_CD = np.stack([draws.means(group.at, group.worse_by())[0] for group in gating])
    # A cell of few users may be missing from a draw; never all of them, or that draw is left out.
    drawn_D = (~np.isnan(cells_CD)).sum(axis=0)
    return _compared(ours, theirs, np.nansum(cells_CD, axis=0)[drawn_D > 0] / drawn_D[drawn_D > 0])


def _slices(paired: Paired, draws: _Draws, limits: Limits, check: Check) -> tuple[SliceVerdict, ...]:
    found = []
    for dimension, name, mask_N in _masks(paired):
        for h, head in enumerate(BINARY_HEADS):
            check()
            answered_N = np.isfinite(paired.candidate_N3[:, h]) & np.isfinite(paired.incumbent_N3[:, h])
            group = _group(paired, draws, limits, h, mask_N & answered_N)
            if len(group.at):
                found.append(_slice(dimension, name, head, group, limits))
    judged = [i for i, part in enumerate(found) if not math.isnan(part.p_value)]
    worse = metrics.holm([found[i].p_value for i in judged], limits.alpha)
    for i, rejected in zip(judged, worse, strict=True):
        found[i] = found[i]._replace(worse=rejected and found[i].log_loss.difference.value > 0.0)
    return tuple(found)


def _masks(paired: Paired) -> Iterator[tuple[str, str, np.ndarray]]:
    """→ (dimension, name, (N,) bool) of every slice."""
    for index, platform in enumerate(paired.platforms):
        yield "platform", platform, paired.platform_N == index
    for name, least, most in (("1-3", 1, 3), ("4-15", 4, 15), ("16+", 16, None)):
        yield "activity", name, (paired.activity_N >= least) & (most is None or paired.activity_N <= most)
    priced_N = paired.price_N > 0
    yield "price", "none", ~priced_N
    if priced_N.any():
        quartile_N = np.searchsorted(np.quantile(paired.price_N[priced_N], [0.25, 0.5, 0.75]), paired.price_N)
        for quartile in range(4):
            yield "price", f"q{quartile + 1}", priced_N & (quartile_N == quartile)
    hashes, counts = np.unique(paired.category_N[paired.category_N != 0], return_counts=True)
    top = hashes[np.lexsort((hashes, -counts))[:TOP_CATEGORIES]]
    for category in top.tolist():
        yield "category", paired.category_names.get(category, f"{category:08x}"), paired.category_N == category
    yield "category", "(the rest)", ~np.isin(paired.category_N, top)


def _slice(dimension: str, name: str, head: str, group: _Group, limits: Limits) -> SliceVerdict:
    counts = (dimension, name, head, len(group.at), group.users, group.positives)
    draws = group.worse_by_draws() if group.positives >= limits.positives else None
    if draws is None:
        return SliceVerdict(*counts, group.log_loss(None), NAN, False)
    compared = group.log_loss(draws)
    return SliceVerdict(*counts, compared, _p_value(compared.difference.value, float(np.nanstd(draws))), False)


def _p_value(value: float, deviation: float) -> float:
    """Two-sided, of a normal variable about 0. Resamples are too few to count the small chances that Holm asks for."""
    if deviation > 0.0:
        return math.erfc(abs(value) / deviation / math.sqrt(2.0))
    return 1.0 if value == 0.0 else 0.0


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _finite(evidence: Evidence) -> Rule:
    paired, problems = evidence.paired, list(evidence.problems)
    unknown = int((paired.known_N3 & ~np.isfinite(paired.candidate_N3)).sum())
    if unknown:
        problems.append(f"window: {unknown} probabilities of {int(paired.known_N3.sum())} are no numbers")
    found = f"{int(paired.known_N3.sum())} probabilities in the window, and all extremes"
    return Rule("finite", f"{len(problems)} problems" if problems else found, tuple(f"finite: {p}" for p in problems))


def _enough(gating: list[_Group], cells: tuple[CellVerdict, ...], limits: Limits) -> Rule:
    found = f"{len(gating)} of {len(cells)} cells have {limits.least_events:,} events and both outcomes"
    most = max((cell.n for cell in cells), default=0)
    refusal = f"cells: no platform x head has enough later events to judge by; the most is {most:,}"
    return Rule("cells", found, () if gating else (refusal,))


def _log_loss(mean: Compared, n_cells: int) -> Rule:
    found = f"mean over {n_cells} cells {_change(mean)}" if n_cells else "no cell to compare"
    no_interval = math.isnan(mean.difference.low)
    worse = mean.difference.low > 0.0 or (no_interval and mean.difference.value > 0.0)
    return Rule("log_loss", found, (f"log_loss: {found}",) if worse else ())


def _better(mean: Compared, n_cells: int) -> Rule:
    found = f"mean over {n_cells} cells {mean.difference.value:+.6f}" if n_cells else "no cell to compare"
    refusal = f"better: mean log-loss {mean.candidate:.6f} is not below the incumbent's {mean.incumbent:.6f}"
    # Without a cell, rule `cells` refuses.
    return Rule("better", found, (f"{refusal}, over {n_cells} cells",) if mean.difference.value >= 0.0 else ())


def _hit_rate(hit_rates: Mapping[str, tuple[float, float]], limits: Limits) -> Rule:
    if not hit_rates:
        return Rule("hit_rate", "no platform on which both name categories", ())
    ours, theirs = (float(np.mean([pair[i] for pair in hit_rates.values()])) for i in (0, 1))
    found = f"mean HR@5 over {len(hit_rates)} platforms {ours:.4f}, was {theirs:.4f} ({ours - theirs:+.4f})"
    lost = theirs - ours > limits.hit_rate_drop
    return Rule("hit_rate", found, (f"hit_rate: {found}, limit -{limits.hit_rate_drop}",) if lost else ())


def _ranking(name: str, cells: tuple[CellVerdict, ...], limits: Limits) -> Rule:
    enough = [
        cell
        for cell in cells
        if cell.n >= limits.ranked_events
        and limits.ranked_of_an_outcome <= cell.positives <= cell.n - limits.ranked_of_an_outcome
    ]
    changes = {f"{c.platform} x {c.head}": getattr(c, name) for c in enough}
    changes = {key: change for key, change in changes.items() if not math.isnan(change.difference.value)}
    if not changes:
        return Rule(name, "no cell to compare", ())
    worst = min(changes, key=lambda key: changes[key].difference.value)
    refusals = tuple(
        f"{name}: {key} {_change(change)}"
        for key, change in changes.items()
        if change.difference.high < 0.0 or change.difference.value < -limits.ranking_drop
    )
    return Rule(name, f"worst of {len(changes)} cells: {worst} {_change(changes[worst])}", refusals)


def _ece_rule(cells: tuple[CellVerdict, ...], limits: Limits) -> Rule:
    known = {f"{c.platform} x {c.head}": c for c in cells if not math.isnan(c.ece.value)}
    refusals = tuple(
        f"ece: {key} {_range(cell.ece)}, limit {limits.ece:.4f}"
        for key, cell in known.items()
        if cell.ece.low > limits.ece and not (limits.forgive_better and cell.ece.value < cell.incumbent_ece)
    )
    found = _worst({key: cell.ece for key, cell in known.items()}, lambda ece: np.nan_to_num(ece.low))
    return Rule("ece", found, refusals)


def _ratio_rule(cells: tuple[CellVerdict, ...], limits: Limits) -> Rule:
    known = {f"{c.platform} x {c.head}": c for c in cells if c.positives >= limits.positives and not math.isnan(c.ece.value)}
    refusals = []
    for key, cell in known.items():
        ratio = cell.predicted_over_actual
        better = _off(ratio.value) < _off(cell.incumbent_predicted_over_actual)
        outside = ratio.high < limits.ratio_low or ratio.low > limits.ratio_high
        if outside and not (limits.forgive_better and better):
            refusals.append(f"predicted_over_actual: {key} {_range(ratio)}, range [{limits.ratio_low}, {limits.ratio_high}]")
    ratios = {key: cell.predicted_over_actual for key, cell in known.items()}
    found = _worst(ratios, lambda ratio: _off(ratio.value))
    return Rule("predicted_over_actual", found, tuple(refusals))


def _off(ratio: float) -> float:
    """Twice too much is as far off as half."""
    return abs(math.log(max(ratio, 1e-12)))


def _slices_rule(slices: tuple[SliceVerdict, ...]) -> Rule:
    judged = [part for part in slices if not math.isnan(part.p_value)]
    refusals = tuple(f"slices: {_part(part)}" for part in judged if part.worse)
    if not judged:
        return Rule("slices", f"none of {len(slices)} has enough positives", ())
    # The worst is the one furthest above 0, measured by its own noise.
    worst = min(judged, key=lambda part: math.copysign(1.0 - part.p_value, -part.log_loss.difference.value))
    return Rule("slices", f"worst of {len(judged)}: {_part(worst)}", refusals)


def _p99(p99_ms: float, limits: Limits) -> Rule:
    found = f"{p99_ms:.2f} ms for {TIMED_EVENTS:,} events, budget {limits.p99_ms:.2f} ms"
    return Rule("p99", found, (f"p99: {found}",) if not p99_ms <= limits.p99_ms else ())


def _part(part: SliceVerdict) -> str:
    return f"{part.head} where {part.dimension} = {part.name} {_change(part.log_loss)}, p = {part.p_value:.2g}"


def _change(compared: Compared) -> str:
    """`0.7410 -> 0.7290 (-0.0120 [-0.0190, -0.0050])`: the incumbent's, the candidate's, the difference."""
    value, low, high = compared.difference
    bounds = "no interval: too few users" if math.isnan(low) else f"[{low:+.4f}, {high:+.4f}]"
    return f"{compared.incumbent:.4f} -> {compared.candidate:.4f} ({value:+.4f} {bounds})"


def _range(interval: Interval) -> str:
    bounds = "" if math.isnan(interval.low) else f" [{interval.low:.4f}, {interval.high:.4f}]"
    return f"{interval.value:.4f}{bounds}"


def _worst(known: dict[str, Interval], badness: Callable[[Interval], float]) -> str:
    if not known:
        return "no cell with enough events"
    worst = max(known, key=lambda key: badness(known[key]))
    return f"worst of {len(known)} cells: {worst} {_range(known[worst])}"


# ── evidence that needs the model ────────────────────────────────────────────────────────────────────────────────────


def examine(candidate: Model, compared: Comparison, limits: Limits | None = None, device: str = "cpu") -> Evidence:
    """The evidence on a candidate. `device`: where `scoring_p99_ms` is taken."""
    ours, theirs = compared.candidate.categories, compared.incumbent.categories
    problems = list(adversarial(candidate))
    if not compared.candidate.finite:
        problems.append("window: something that the candidate says there is no number")
    return Evidence(
        paired=compared.paired,
        hit_rates={key: (ours[key].hit_rate_5, theirs[key].hit_rate_5) for key in sorted(set(ours) & set(theirs))},
        problems=tuple(problems),
        p99_ms=scoring_p99_ms(candidate, device, enough_ms=(limits or Limits()).p99_ms),
    )


def adversarial(model: Model) -> tuple[str, ...]:
    """What is wrong with what the model says of extreme rows and events, one line each; empty: nothing.

    Through the scorer itself: empty rows and rows with every count at its maximum, and events with the least and the
    greatest time, gaps of millennia there and back, unknown platforms, items and categories, the greatest quantity and
    price, one user with the same event again and again. A number must come wherever there should be one, in [0, 1].
    """
    rows, slots, events = _extremes(model)
    scorer, middle = Scorer(model, "cpu"), len(events) // 2
    try:
        parts = [scorer.run(rows, slots[part], events[part]) for part in (slice(0, middle), slice(middle, None))]
    except (ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        return (f"extremes: the scorer fails: {type(error).__name__}: {error}",)
    scores = Scores(*(np.concatenate(columns) for columns in zip(*(part[0] for part in parts), strict=True)))
    return tuple(_problems(model, scores, np.concatenate([status for _, status in parts]), events, rows))


_EXTREME_ROWS, _EXTREME_EVENTS, _SAME_EVENTS = 256, 2048, 512


def _extremes(model: Model) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """→ rows, slots, events (of EVENT). The first half of the rows is empty; always the same for equal platforms."""
    rng = np.random.default_rng(0)
    codes = _codes(model)
    rows = empty_rows(_EXTREME_ROWS, model.config.size)
    _fill_to_the_brim(rows[_EXTREME_ROWS // 2 :], codes)
    n = _EXTREME_EVENTS + _SAME_EVENTS
    events = np.zeros(n, EVENT)
    events["offset"], events["id"] = np.arange(n), np.arange(n, dtype=np.uint64) + np.uint64(2**64 - n)
    events["ts"] = rng.choice([0, 1, 86_400_000, 1_700_000_000_000, _MAX_TS - 1, _MAX_TS], n)
    events["item"] = rng.choice([0, 1, 2**32 - 1], n)
    events["category"] = rng.choice([0, 1, 2**32 - 1, *_categories(model)], n)
    events["quantity"] = rng.choice([0.0, 1.0, float(np.finfo(np.float32).max)], n)
    events["platform"] = rng.choice(codes, n)
    events["kind"] = rng.integers(0, N_KINDS, n)
    events["price"] = rng.choice([0, 1, 255], n)
    slots = rng.integers(1, _EXTREME_ROWS, n)
    # One user does the same again and again: what a recurrence adds up comes to its greatest.
    same = np.arange(_EXTREME_EVENTS, n)
    slots[same] = 0
    for field in ("ts", "item", "category", "quantity", "platform", "kind", "price"):
        events[field][same] = events[field][same[0]]
    return rows, slots, events


def _fill_to_the_brim(rows: np.ndarray, codes: np.ndarray) -> None:
    """Every count and time at the greatest that a fold can reach; half of the rows were last seen at the epoch, so that
    the next event comes after millennia."""
    most = 2**32 - 1
    rows["n_ring"] = rows.dtype["ring_ts"].shape[0]
    for field in ("last_ts", "session_start_ts", "ring_ts"):
        rows[field][::2] = _MAX_TS
    rows["ring_id"] = np.arange(rows["ring_id"].shape[1]) + 1
    rows["ring_platform"] = codes[np.arange(len(rows)) % len(codes)][:, None]
    rows["ring_kind"], rows["ring_price"] = PURCHASE, 255
    for field in ("ring_item", "ring_category", "visits", "n_events", "returns", "last_s_by_kind", "counts"):
        rows[field] = most
    for field in ("mix_long", "mix_short"):
        rows[f"{field}_category"] = most - np.arange(rows[f"{field}_category"].shape[1])
        rows[f"{field}_weight"] = most
    rows["gap_mean_s"] = rows["gap_last_s"] = _MAX_TS / 1000.0
    rows["basket_mean"], rows["price_mean"] = MAX_QUANTITY, 255.0
    for field in ("session_events", "session_purchases", "session_carts", "open_carts"):
        rows[field] = 2**16 - 1


def _problems(model: Model, scores: Scores, status: np.ndarray, events: np.ndarray, rows: np.ndarray) -> Iterator[str]:
    known = {platform_code(platform): i for i, platform in enumerate(model.config.platforms, start=1)}
    can_N4 = model.config.can_have()[[known.get(code, 0) for code in events["platform"].tolist()]]
    can_N4 &= (status != DUPLICATE)[:, None]
    said: dict[str, np.ndarray] = {f"p.{h}": scores.p_N3[can_N4[:, i], i] for i, h in enumerate(BINARY_HEADS)}
    said["p of categories"] = scores.category_p_N5
    # Not every event has a shift; where it has none it is NaN.
    said["interest_shift"] = scores.shift_N[~np.isnan(scores.shift_N)]
    for name, values in said.items():
        wrong = int((~((values >= 0.0) & (values <= 1.0 + 1e-5))).sum())  # NaN too
        if wrong:
            yield f"extremes: {name} is no number in [0, 1] at {wrong} of {values.size}"
    wrong = int((~np.isfinite(rows["h"])).any(axis=1).sum())
    if wrong:
        yield f"extremes: h is not finite in {wrong} of {len(rows)} rows"


def scoring_p99_ms(
    model: Model, device: str = "cpu", *, batches: int = 100, attempts: int = 3, enough_ms: float = 0.0
) -> float:
    """p99 of `Scorer.run` on TIMED_EVENTS made-up events, ms, warm: compiled, and rows that hold a past.

    What the neighbours on the machine take is not the model's: on the CPU the lesser of wall and processor time counts,
    and of up to `attempts` measurements the least. It is not measured again once it is at most `enough_ms`.
    """
    scorer, best = Scorer(model, device), math.inf
    warm_up = 10
    slots, events = _traffic(model, (warm_up + attempts * batches) * TIMED_EVENTS)
    rows = empty_rows(4 * TIMED_EVENTS, model.config.size)
    took_ms = []
    for start in range(0, len(events), TIMED_EVENTS):
        part = slice(start, start + TIMED_EVENTS)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        scorer.run(rows, slots[part], events[part])
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        took_ms.append(1000.0 * (min(took_s, cpu_s) if scorer.device.type == "cpu" else took_s))
        if len(took_ms) > warm_up and (len(took_ms) - warm_up) % batches == 0:
            best = min(best, float(np.percentile(took_ms[-batches:], 99)))
            if best <= enough_ms:
                break
    return best


def _traffic(model: Model, n: int) -> tuple[np.ndarray, np.ndarray]:
    """→ slots, events of 4 × TIMED_EVENTS made-up users; always the same for equal platforms and categories."""
    rng = np.random.default_rng(1)
    events = np.zeros(n, EVENT)
    events["offset"], events["id"] = np.arange(n), np.arange(1, n + 1)
    events["ts"] = 1_700_000_000_000 + np.cumsum(rng.integers(0, 2_000, n))
    events["item"] = rng.integers(1, 10_000, n)
    events["category"] = rng.choice(np.array([0, *_categories(model)], np.uint32), n)
    events["quantity"] = rng.integers(1, 4, n)
    events["platform"] = rng.choice(_codes(model), n)
    events["kind"] = rng.integers(0, N_KINDS, n)
    events["price"] = rng.integers(0, 256, n)
    return rng.integers(0, 4 * TIMED_EVENTS, n), events


def _codes(model: Model) -> np.ndarray:
    """Codes of the model's platforms, and one that it does not know."""
    known = [platform_code(platform) for platform in model.config.platforms]
    return np.array([*known, next(code for code in range(1, 1 << 16) if code not in known)], np.uint16)


def _categories(model: Model) -> list[int]:
    return [] if model.categories is None else model.categories.hashes_C.tolist()
