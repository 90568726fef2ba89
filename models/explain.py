"""Why a score is what it is: the events and the features that moved its log-odds most, by deletion.

    ring ─► refold, encode ─► a, b of each event ─► c_j = (a_n … a_{j+1}) ⊙ b_j      h = older + Σ_j c_j, exactly
                                                         │
    logit(h) − logit(h − c_j)                 the event j: h without its term, the other events' gates as they were
    logit(x, e) − logit(x, e at x_f = mean)   the feature f: its platform's mean instead, h as it is

The recurrence is linear in what events write, so `h` is the sum of their terms and a deletion is exact: it is the served
network run again without that term. What it does not say: what the *features* would have been without the event, which
would also move the gates. A row keeps its last events, not the features that they had then; so in serving the terms of
ring events other than the newest are those of a rebuilt `h` (`Scorer.prepare`), and `older` is all the rest: what fell
out of the ring, and what the rebuild does not know. Effects of several deletions do not add up: the trunk is not linear.

Shapes: N events, K places of the ring, H hidden units, F features, three heads in the order of BINARY_HEADS.
Knows no Kafka, clock or training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.events import BINARY_HEADS, KINDS, EventEffect, Explanation, FeatureEffect
from models.fold import FEATURE_NAMES, FOLDED, fold_params
from models.rebuild import refold
from models.scorer import Folded, Model, platform_lookup
from models.state import SIZES
from models.student import N_LOGITS, Columns, Encoded, Student

_AT_ONCE = 64
"""Events explained at once: each is some ninety rows of the network."""
_DIGITS = 6


class Effects(NamedTuple):
    """What each deletion would take from the served log-odds of N events."""

    event_NK3: np.ndarray
    """float32; places of the ring, oldest first; 0 where empty."""
    older_N3: np.ndarray
    """float32: of what `h` holds beside the ring's terms."""
    feature_NF3: np.ndarray
    """float32."""
    age_s_NK: np.ndarray
    """float64: from the ring's event to this one; never below 0."""
    kind_NK: np.ndarray
    """uint8 kind codes."""
    filled_N: np.ndarray
    """int64: places of the ring that hold an event."""


def contributions(a_NKH: Tensor, b_NKH: Tensor) -> Tensor:
    """(N, K, H) terms c_j of the last h of N sequences of K events, h_j = a_j ⊙ h_{j−1} + b_j from h = 0: they sum to it.
    An event that is not there has a 1 and b 0."""
    later_NKH = torch.ones_like(a_NKH)
    if a_NKH.shape[1] > 1:
        later_NKH[:, :-1] = torch.cumprod(a_NKH[:, 1:].flip(1), dim=1).flip(1)
    return later_NKH * b_NKH


@torch.inference_mode()
def without_terms(student: Student, h_NH: Tensor, c_NKH: Tensor, encoded: Encoded, platform_N: Tensor) -> Tensor:
    """(N, K, 3): what each head's logit loses when one term is taken from `h`. `encoded`: of the N events to explain."""
    n, k, _ = c_NKH.shape
    x_NF, e_NE = encoded.x_NF, encoded.e_NE
    full_N3 = student.heads(h_NH, x_NF, e_NE, platform_N)[0]
    part_N3 = student.heads(
        (h_NH[:, None] - c_NKH).flatten(0, 1), _each(x_NF, k), _each(e_NE, k), platform_N.repeat_interleave(k)
    )[0]
    return full_N3[:, None] - part_N3.reshape(n, k, N_LOGITS)


@torch.inference_mode()
def without_features(student: Student, h_NH: Tensor, columns: Columns) -> Tensor:
    """(N, F, 3): what each head's logit loses when one feature of the event is its platform's mean; `h` stays."""
    n, f = columns.features_NF.shape
    encoded = student.encode(columns)
    full_N3 = student.heads(h_NH, encoded.x_NF, encoded.e_NE, columns.platform_N)[0]
    features_NFF = columns.features_NF[:, None].repeat(1, f, 1)
    features_NFF.diagonal(dim1=1, dim2=2).copy_(student.feature_mean_PF[columns.platform_N])
    repeated = Columns(features_NFF.flatten(0, 1), *(column.repeat_interleave(f) for column in columns[1:]))
    other = student.encode(repeated)
    part_N3 = student.heads(_each(h_NH, f), other.x_NF, other.e_NE, repeated.platform_N)[0]
    return full_N3[:, None] - part_N3.reshape(n, f, N_LOGITS)


def _each(values_NX: Tensor, times: int) -> Tensor:
    return values_NX.repeat_interleave(times, dim=0)


class Explainer:
    """Explains the scores of one model, on the CPU. Not for several threads at once."""

    def __init__(self, model: Model) -> None:
        """ValueError for a model without a student: constants have no reasons."""
        if model.student is None:
            raise ValueError(f"{model.version} has no student, so there is nothing to explain")
        self.model = model
        self._student = copy.deepcopy(model.student).eval().requires_grad_(False).to("cpu")
        self._params = fold_params(model.fold)
        self._platform_of_code = platform_lookup(model.config)

    def effects(self, rows: np.ndarray, slots: np.ndarray, events: np.ndarray, folded: Folded) -> Effects:
        """Of events (N,) that were just scored, each the last of its user: `Scorer.fold` gave `folded`, and the rows are
        as `Scorer.score` left them. ValueError where a row's `h` is another model's or a user is there twice."""
        if len(np.unique(slots)) != len(slots):
            raise ValueError("a user is there twice; only the last event of a row can be explained")
        if (rows["h_version"][slots] != self.model.recurrence_id).any():
            raise ValueError("h belongs to another recurrence")
        starts = range(0, max(len(events), 1), _AT_ONCE)
        parts = [self._part(rows, slots, events, folded, slice(start, start + _AT_ONCE)) for start in starts]
        return Effects(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def explain(
        self, rows: np.ndarray, slots: np.ndarray, events: np.ndarray, folded: Folded, p_N3: np.ndarray, top: int
    ) -> list[list[Explanation]]:
        """For each event an Explanation of every head that `p_N3` has a probability of, with the `top` events and features
        by absolute effect. The rest as for `effects`."""
        effects = self.effects(rows, slots, events, folded)
        return [list(_named(effects, i, ~np.isnan(p_N3[i]), top)) for i in range(len(events))]

    @torch.inference_mode()
    def _part(self, rows, slots, events, folded: Folded, part: slice) -> Effects:
        slots, events = slots[part], events[part]
        features_NF, dt_s_N, status_N = folded.features[part], folded.dt_s[part], folded.status[part]
        features_NF, dt_s_N, status_N = features_NF[: len(events)], dt_s_N[: len(events)], status_N[: len(events)]
        columns = self._columns(events, features_NF, dt_s_N)
        encoded = self._student.encode(columns)
        a_NKH, b_NKH, counts_N = self._ring(rows, slots)
        # Of the event itself we know what it wrote, whatever the ring's refolding says.
        own_NK = (rows["ring_id"][slots] == events["id"][:, None]) & (status_N == FOLDED)[:, None]
        own_NK &= np.arange(own_NK.shape[1]) < counts_N[:, None]
        own_N, place_N = (torch.from_numpy(at) for at in np.nonzero(own_NK))
        a_NKH[own_N, place_N], b_NKH[own_N, place_N] = encoded.a_NH[own_N], encoded.b_NH[own_N]
        h_NH = torch.from_numpy(rows["h"][slots])
        c_NKH = contributions(a_NKH, b_NKH)
        older_NH = h_NH - c_NKH.sum(dim=1)
        terms = torch.cat([c_NKH, older_NH[:, None]], dim=1)
        slope_N13 = torch.from_numpy(self.model.calibration_P32[columns.platform_N.numpy(), :, 0])[:, None]
        term_NK3 = slope_N13 * without_terms(self._student, h_NH, terms, encoded, columns.platform_N)
        feature_NF3 = slope_N13 * without_features(self._student, h_NH, columns)
        age_ms_NK = np.maximum(0, events["ts"][:, None] - rows["ring_ts"][slots])
        return Effects(
            term_NK3[:, :-1].numpy(),
            term_NK3[:, -1].numpy(),
            feature_NF3.numpy(),
            age_ms_NK / 1000.0,
            rows["ring_kind"][slots],
            counts_N,
        )

    def _ring(self, rows: np.ndarray, slots: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """→ a, b (N, K, H) of the ring's events as a rebuild has them, 1 and 0 where empty; counts (N,)."""
        hidden, ring = SIZES[self.model.config.size]
        events, features, dt_s, counts_N = refold(rows, slots, self._params)
        a_NKH, b_NKH = torch.ones(len(slots), ring, hidden), torch.zeros(len(slots), ring, hidden)
        if len(events):
            encoded = self._student.encode(self._columns(events, features, dt_s))
            filled_NK = torch.from_numpy(np.arange(ring) < counts_N[:, None])
            a_NKH[filled_NK], b_NKH[filled_NK] = encoded.a_NH, encoded.b_NH
        return a_NKH, b_NKH, counts_N

    def _columns(self, events: np.ndarray, features_NF: np.ndarray, dt_s_N: np.ndarray) -> Columns:
        return Columns.of(events, features_NF, dt_s_N, self._platform_of_code[events["platform"]])


def _named(effects: Effects, i: int, wanted_3: np.ndarray, top: int) -> Iterator[Explanation]:
    n = int(effects.filled_N[i])
    for head in np.flatnonzero(wanted_3).tolist():
        of_events, of_features = effects.event_NK3[i, :n, head], effects.feature_NF3[i, :, head]
        yield Explanation(
            head=BINARY_HEADS[head],
            events=[
                EventEffect(
                    back=n - 1 - k,
                    kind=KINDS[effects.kind_NK[i, k]],
                    age_s=round(float(effects.age_s_NK[i, k]), 3),
                    effect=round(float(of_events[k]), _DIGITS),
                )
                for k in _largest(of_events, top)
            ],
            older=round(float(effects.older_N3[i, head]), _DIGITS),
            features=[
                FeatureEffect(name=FEATURE_NAMES[f], effect=round(float(of_features[f]), _DIGITS))
                for f in _largest(of_features, top)
            ],
        )


def _largest(values: np.ndarray, top: int) -> list[int]:
    """Positions of the greatest by absolute value, of equals the first."""
    return np.argsort(-np.abs(values), kind="stable")[:top].tolist()
