"""The scorer: one model, and the whole path from a micro-batch of events to its scores.

    run(rows, slots, events):
      1. prepare   rows whose `h` belongs to another recurrence: `h` rebuilt from their ring   (before the fold!)
      2. fold      models/fold.py, event by event; a View of each row right after its event
      3. encode    one matrix product: what decides h           (device)
      4. advance   h ← a ⊙ h + b in the rows, event by event    (where the rows lie)
      5. heads     one matrix product: logits and gates         (device)
      6. finish    calibration, masks, categories, shift

On the CPU steps 3 to 6, less the categories, are those of models/serve.py; on a card 3 and 5 are those of
models/device.py.

Whoever must do something in between calls `prepare`, `fold_with_views` and `score`.

Shapes: N events, F features, H hidden units, P platforms (index 0: unknown to the model).
Knows no Kafka, file or clock.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from models.categories import CategoryTable, take_view, view_dtype
from models.config import FoldConfig
from models.device import BUCKETS, DeviceStudent
from models.events import platform_code
from models.fold import DUPLICATE, FOLDED, N_FEATURES, _fold_one, fold, fold_params, starts_afresh
from models.rebuild import Refolded, refold
from models.serve import CpuStudent
from models.state import N_KINDS, row_dtype
from models.student import N_LOGITS, Columns, Student, StudentConfig, linear_scan

__all__ = ["CategoryTable", "Model", "Scorer", "Scores", "fold_with_views", "identity_calibration", "platform_lookup"]

TOP_CATEGORIES = 5
MOST_AT_ONCE = BUCKETS[-1]
_LEAST_AT_ONCE = 256
"""A device that cannot hold this many events is given up: the CPU is faster than fewer."""
_REBUILD_USERS = 512
"""Most users whose `h` is rebuilt at once: bounds the memory."""


def _compile_fold_with_views(sources: str):
    @njit(cache=True, nogil=True)
    def fold_with_views(rows, slots, events, params, features, dt_s, status, views):
        """`models.fold.fold`, one event after another, and views[i] (of `view_dtype`) of the row right after event i.

        Leaves `h` alone, also of a user who starts afresh: `Scorer.score` puts it to zero when it comes to that event.
        Raises as `fold` does, before any row has changed.
        """
        _ = sources
        n = len(events)
        if len(slots) != n or min(len(features), len(dt_s), len(status), len(views)) < n or features.shape[1] != N_FEATURES:
            raise ValueError("fold_with_views: slots, events, views and the outputs do not fit together")
        for i in range(n):
            if not 0 <= slots[i] < len(rows):
                raise ValueError("fold_with_views: a slot lies outside the rows")
            if events[i].kind >= N_KINDS:
                raise ValueError("fold_with_views: a kind code that there is none of")
        kept = np.empty(len(rows[0]["h"]) if len(rows) else 0, np.float32)
        for i in range(n):
            row, e = rows[slots[i]], events[i]
            # Only then the fold forgets the user, `h` too; and only then it is worth keeping.
            forgets = row.n_events > 0 and e.ts - row.last_ts > params.idle_ttl_ms
            if forgets:
                kept[:] = row.h
            status[i], dt_s[i] = _fold_one(row, e, params, features[i])
            if forgets:
                row.h[:] = kept
            take_view(row, views[i])

    return fold_with_views


# Numba's cache of a function does not see that one it calls, in another file, has changed; but what a closure holds is
# part of the cache's key. So a stale fold can never be served from the cache.
fold_with_views = _compile_fold_with_views(
    "".join(hashlib.sha256(Path(f.py_func.__code__.co_filename).read_bytes()).hexdigest() for f in (fold, take_view))
)


@njit(cache=True, nogil=True)
def _advance(rows, slots, folded_N, fresh_N, a_NH, b_NH, h_NH):
    """Step 4."""
    for i in range(len(h_NH)):
        h = rows[slots[i]]["h"]
        if fresh_N[i]:
            h[:] = 0.0
        if folded_N[i]:
            for j in range(len(h)):
                h[j] = a_NH[i, j] * h[j] + b_NH[i, j]
        h_NH[i, :] = h


def identity_calibration(n_platforms: int) -> np.ndarray:
    """(P + 1, 3, 2) float32: slope 1 and offset 0 on every logit."""
    return np.tile(np.float32([1.0, 0.0]), (n_platforms + 1, N_LOGITS, 1))


def platform_lookup(config: StudentConfig) -> np.ndarray:
    """(65536,) int64: `events.platform_code` → the model's platform index, 0 for a platform that it does not know."""
    lookup = np.zeros(1 << 16, np.int64)
    for index, platform in enumerate(config.platforms, start=1):
        code = platform_code(platform)
        if lookup[code]:
            raise ValueError(f"platforms {platform!r} and {config.platforms[lookup[code] - 1]!r} have the same code")
        lookup[code] = index
    return lookup


@dataclass(frozen=True, eq=False)
class Model:
    """All that makes scores. Without a student every logit is 0, so that the calibration's offsets are the base rates'
    logits: this is how the prior is made."""

    version: str
    """`<name>/<version>`, or `prior`."""
    config: StudentConfig
    student: Student | None
    categories: CategoryTable | None
    calibration_P32: np.ndarray
    """float32 (P + 1, 3, 2): slope and offset on each logit, by platform and head."""
    fold: FoldConfig
    """The rules of the fold that it was trained under."""
    degraded: bool = False
    judged_P32: np.ndarray | None = None
    """The calibration that the gate judged it by, where it was fitted to later labels since; None: `calibration_P32`."""

    def as_judged(self) -> Model:
        """As the gate judged it: calibrated by nothing that came after the gate's start."""
        return self if self.judged_P32 is None else replace(self, calibration_P32=self.judged_P32, judged_P32=None)

    @cached_property
    def recurrence_id(self) -> int:
        """What `h_version` of a row says where its `h` is this model's; 0: it has none."""
        return self.student.recurrence_id() if self.student is not None else 0

    def check(self) -> None:
        """Raises `ValueError` where the parts do not fit each other."""
        self.config.check()
        platforms = len(self.config.platforms)
        platform_lookup(self.config)
        if self.student is not None and self.config.n_features != N_FEATURES:
            raise ValueError(f"the model reads {self.config.n_features} features; the fold makes {N_FEATURES}")
        for calibration in (self.calibration_P32, self.as_judged().calibration_P32):
            if calibration.shape != (platforms + 1, N_LOGITS, 2) or calibration.dtype != np.float32:
                raise ValueError(f"calibration has shape {calibration.shape}, of {calibration.dtype}")
        if self.categories is not None:
            if self.student is None:
                raise ValueError("categories need a student, whose gates mix them")
            self.categories.check(platforms)


class Scores(NamedTuple):
    """What a batch of N events gets."""

    p_N3: np.ndarray
    """float32, in the order of BINARY_HEADS; NaN where the platform cannot have the head, and for duplicates."""
    category_N5: np.ndarray
    """int32 index into `model.categories.names`, most likely first; −1 none."""
    category_p_N5: np.ndarray
    """float32; 0 none."""
    shift_N: np.ndarray
    """float32 in [0, 1]; NaN none."""


class Folded(NamedTuple):
    """What the fold makes of a batch of N events: arguments of `Scorer.score`."""

    features: np.ndarray
    """float32 (N, 77)."""
    dt_s: np.ndarray
    """float32 (N,)."""
    status: np.ndarray
    """uint8 (N,) of models/fold.py."""
    views: np.ndarray | None
    """(N,) of `view_dtype`; None for a model without a student."""


class Scorer:
    """Serves one model on one device (`auto`, `cpu`, `cuda[:n]`). Not for several threads at once.

    Where the device's memory does not do, it goes on with half as many events at once, and in the end on the CPU.
    """

    def __init__(self, model: Model, device: str = "auto", *, memory_fraction: float = 1.0) -> None:
        """`memory_fraction`: most of a card's memory that this process may take, where several workers share the card."""
        model.check()
        if not 0.0 < memory_fraction <= 1.0:
            raise ValueError(f"memory_fraction {memory_fraction} is not above 0 and at most 1")
        self.model = model
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if self.device.type == "cuda" and memory_fraction < 1.0:
            torch.cuda.set_per_process_memory_fraction(memory_fraction, self.device)
        self.out_of_memory = 0
        """How often the device had too little memory, so far."""
        self.at_once = MOST_AT_ONCE
        """Most events given to the device at once."""
        self._student = None
        if model.student is not None:
            self._student = copy.deepcopy(model.student).eval().requires_grad_(False)
        self._params = fold_params(model.fold)
        self._platform_of_code = platform_lookup(model.config)
        self._can_have_P4 = model.config.can_have()
        self._recurrence_id = model.recurrence_id
        self._served: CpuStudent | None = None
        self._on_device: DeviceStudent | None = None
        if self._student is not None and self.device.type == "cpu":
            self._serve_on_cpu()
        elif self._student is not None:
            self._serve_on_device()

    def run(self, rows: np.ndarray, slots: np.ndarray, events: np.ndarray) -> tuple[Scores, np.ndarray]:
        """The whole path: `fold`, then `score`. → (Scores, status (N,) uint8 of models/fold.py)."""
        folded = self.fold(rows, slots, events)
        return self.score(rows, slots, events, *folded), folded.status

    def fold(self, rows: np.ndarray, slots: np.ndarray, events: np.ndarray) -> Folded:
        """Folds the events (N,) of EVENT, in offset order within a user, into rows[slots], `prepare` included."""
        n = len(events)
        features_NF, dt_s_N = np.empty((n, N_FEATURES), np.float32), np.empty(n, np.float32)
        status_N, views = np.empty(n, np.uint8), None
        self.prepare(rows, slots)
        if self._student is None:
            fold(rows, slots, events, self._params, features_NF, dt_s_N, status_N)
        else:
            views = np.empty(n, view_dtype(self.model.config.size))
            fold_with_views(rows, slots, events, self._params, features_NF, dt_s_N, status_N, views)
        return Folded(features_NF, dt_s_N, status_N, views)

    def prepare(self, rows: np.ndarray, slots: np.ndarray) -> int:
        """Before the fold: rebuilds `h` of those rows[slots] whose `h` belongs to another recurrence, from their ring,
        which must not hold this batch's events yet. → how many it rebuilt."""
        if self._student is None:
            return 0
        if rows.dtype != row_dtype(self.model.config.size):
            raise ValueError(f"rows are not of size {self.model.config.size!r}, which the model needs")
        stale = slots[rows["h_version"][slots] != self._recurrence_id]
        if not len(stale):
            return 0
        stale = np.unique(stale)
        # A new user has nothing to be rebuilt from, and there are many.
        empty = rows["n_ring"][stale] == 0
        rows["h"][stale[empty]] = 0.0
        rows["h_version"][stale[empty]] = self._recurrence_id
        held = stale[~empty]
        for start in range(0, len(held), _REBUILD_USERS):
            self._rebuild(rows, held[start : start + _REBUILD_USERS])
        return len(stale)

    @torch.inference_mode()
    def _rebuild(self, rows: np.ndarray, slots: np.ndarray) -> None:
        refolded = refold(rows, slots, self._params)
        counts = refolded.counts
        h_UH = np.zeros((len(slots), self.model.config.hidden), np.float32)
        if len(refolded.events):
            ends = np.cumsum(counts)
            starts_N = np.zeros(len(refolded.events), bool)
            starts_N[(ends - counts)[counts > 0]] = True
            try:
                h_NH = self._scanned(refolded, starts_N)
            except torch.OutOfMemoryError:
                self.out_of_memory += 1
                self._serve_on_cpu()
                h_NH = self._scanned(refolded, starts_N)
            h_UH[counts > 0] = h_NH[ends[counts > 0] - 1]
        rows["h"][slots] = h_UH
        rows["h_version"][slots] = self._recurrence_id

    def _scanned(self, refolded: Refolded, starts_N: np.ndarray) -> np.ndarray:
        columns = self._columns(
            refolded.events, refolded.features, refolded.dt_s, self._platform_of_code[refolded.events["platform"]]
        )
        encoded = self._student.encode(columns)
        return linear_scan(encoded.a_NH, encoded.b_NH, torch.from_numpy(starts_N).to(self.device)).cpu().numpy()

    def score(
        self,
        rows: np.ndarray,
        slots: np.ndarray,
        events: np.ndarray,
        features: np.ndarray,
        dt_s: np.ndarray,
        status: np.ndarray,
        views: np.ndarray | None,
    ) -> Scores:
        """After `prepare` and the fold: advances `h` of FOLDED events in the rows, exactly and in order, and scores.

        REPLAYED and TOO_LATE events are scored from `h` as it then is; DUPLICATE ones get no score. `features`, `dt_s`,
        `status` and `views` are as the fold left them and may be longer than `events`; `views` may be None for a model
        without categories. Raises `ValueError` where `prepare` was left out.
        """
        n = len(events)
        features_NF, dt_s_N, status_N = features[:n], dt_s[:n], status[:n]
        platform_N = self._platform_of_code[events["platform"]]
        if self._student is not None:
            stale = np.count_nonzero(rows["h_version"][slots] != self._recurrence_id)
            if stale:
                raise ValueError(f"h at {stale} events belongs to another recurrence; call prepare() before the fold")
        if self._student is None:
            # `h` is not advanced, so that it is no longer anybody's.
            rows["h_version"][slots[status_N == FOLDED]] = 0
            p_N3 = self._probabilities(np.zeros((n, N_LOGITS), np.float32), platform_N, status_N)
            gates_NG = wanted_N = None
        else:
            features_NF, dt_s_N = (np.ascontiguousarray(column, np.float32) for column in (features_NF, dt_s_N))
            fresh_N = starts_afresh(features_NF, status_N)
            p_N3, gates_NG, wanted_N = self._infer(rows, slots, events, features_NF, dt_s_N, status_N, fresh_N, platform_N)
        if self.model.categories is None:
            none = np.full((n, TOP_CATEGORIES), -1, np.int32)
            return Scores(p_N3, none, np.zeros(none.shape, np.float32), np.full(n, np.nan, np.float32))
        mixed = self.model.categories.predict(views, platform_N, gates_NG, wanted_N, TOP_CATEGORIES)
        return Scores(p_N3, *mixed)

    def _infer(self, rows, slots, *columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps 3 to 6 but the categories. → p (N, 3), gate logits (N, 7), wanted (N,): as `CpuStudent.score`, whose
        arguments these are."""
        if self._served is not None:
            return self._served.score(rows, slots, *columns)
        parts, start, n = [], 0, len(slots)
        while start < n or not parts:
            if self._served is not None:
                at = slice(start, n)
                parts.append(self._served.score(rows, slots[at], *(column[at] for column in columns)))
                break
            at = slice(start, start + self.at_once)
            part = self._infer_on_device(rows, slots[at], *(column[at] for column in columns))
            if part is not None:
                parts.append(part)
                start = at.stop
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _infer_on_device(self, rows, slots, events, features_NF, dt_s_N, status_N, fresh_N, platform_N):
        """`_infer` of some events; None where the device had too little memory, and then no row has changed."""
        try:
            a_NH, b_NH, h_NH = self._on_device.encode(events, features_NF, dt_s_N, platform_N)
        except torch.OutOfMemoryError:
            self._take_less()
            return None
        _advance(rows, slots, status_N == FOLDED, fresh_N, a_NH, b_NH, h_NH)
        logits_N3, gates_NG = self._on_device.heads(len(events))
        wanted_N = self._can_have_P4[platform_N, N_LOGITS] & (status_N != DUPLICATE)
        return self._probabilities(logits_N3, platform_N, status_N), gates_NG, wanted_N

    def _take_less(self) -> None:
        self.out_of_memory += 1
        self.at_once //= 2
        if self.at_once < _LEAST_AT_ONCE:
            self._serve_on_cpu()
        elif self._on_device is not None:
            self._on_device.forget(above=self.at_once)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _serve_on_device(self) -> None:
        """Asks for all memory that a batch will need, so that none waits or fails for it."""
        while self._served is None:
            try:
                self._on_device = self._on_device or DeviceStudent(self._student.to(self.device), self.device)
                self._on_device.make(self.at_once)
                return
            except torch.OutOfMemoryError:
                self._take_less()

    def _serve_on_cpu(self) -> None:
        """From now on; also where the device was the CPU from the first."""
        self._on_device = None
        self.device = torch.device("cpu")
        self._student = self._student.to(self.device)
        self._served = CpuStudent(self._student, self.model.calibration_P32, self._can_have_P4)

    def _columns(self, events: np.ndarray, features_NF: np.ndarray, dt_s_N: np.ndarray, platform_N: np.ndarray) -> Columns:
        return Columns.of(events, features_NF, dt_s_N, platform_N, self.device)

    def _probabilities(self, logits_N3: np.ndarray, platform_N: np.ndarray, status_N: np.ndarray) -> np.ndarray:
        """NaN where the platform cannot have the head and for duplicates."""
        calibration_N32 = self.model.calibration_P32[platform_N]
        logits_N3 = logits_N3 * calibration_N32[:, :, 0] + calibration_N32[:, :, 1]
        p_N3 = 1.0 / (1.0 + np.exp(-np.clip(logits_N3, -30.0, 30.0)))
        p_N3[~(self._can_have_P4[platform_N, :N_LOGITS] & (status_N != DUPLICATE)[:, None])] = np.nan
        return p_N3
