"""The job that every peer does: canonical event → user's row → student → score record. One file for all of them.

A peer brings what it is: how records are read, where a user's row is kept and how scores are sent. All else is given, and
generously: the published student is a Crosscurrent artifact, so each peer uses our package `models` as a library, compiled
fold included. A row is a value of bytes in the peer's store.

    one(row, event, offset)        a framework that calls once an event: no batch to multiply matrices of, so the student
                                   is its weights in NumPy, less than half of what PyTorch's calls cost there
    many(rows, events, offsets)    one that hands over batches: `models.scorer.Scorer`, as our own worker has it
    fold, encode, advance, finish   the steps alone, for a dataflow that has its state at some steps and batches at others

Decoding and encoding are msgspec's. Knows no client and no framework.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from models.artifact import load, versions
from models.categories import view_dtype
from models.config import FoldConfig
from models.events import HEADS, SCORE_SCHEMA, CanonicalEvent, Probabilities, ScoreRecord, to_columns
from models.fold import DUPLICATE, FEATURE_NAMES, FOLDED, N_FEATURES, fold_params, starts_afresh
from models.scorer import TOP_CATEGORIES, Scorer, Scores, fold_with_views, platform_lookup
from models.state import empty_rows, row_dtype
from models.student import CLIP, N_LOGITS

SIZE = "cpu"
DTYPE = row_dtype(SIZE)
NEW_ROW = empty_rows(1, SIZE).tobytes()
_COLD = np.log1p(3.5)
_LOG_EVENTS = FEATURE_NAMES.index("log_events")
_DIGITS = 6

decode = msgspec.json.Decoder(CanonicalEvent).decode
encode_json = msgspec.json.Encoder().encode


class Task(NamedTuple):
    """What a peer's process is told, as JSON in its first argument."""

    name: str
    bootstrap: str
    events: str
    scores: str
    group: str
    store: str
    folder: str
    """A folder of the peer's own."""
    partitions: int
    commit_s: float


def task() -> Task:
    """Of this process, pinned and single-threaded as the harness started it."""
    torch.set_num_threads(1)
    return Task(**json.loads(sys.argv[1]))


class Folded(NamedTuple):
    """One event after the fold; arrays have a leading axis of 1, so that they can be concatenated."""

    event: CanonicalEvent
    column: np.ndarray
    features: np.ndarray
    dt_s: np.ndarray
    status: np.ndarray
    view: np.ndarray


class Encoded(NamedTuple):
    """What the student makes of events without `h`: x (N, F), e (N, E), a (N, H), b (N, H), platform (N,)."""

    x: np.ndarray
    e: np.ndarray
    a: np.ndarray
    b: np.ndarray
    platform: np.ndarray

    def split(self) -> list[Encoded]:
        """One an event."""
        return [Encoded(*(part[i : i + 1] for part in self)) for i in range(len(self.x))]

    @staticmethod
    def join(parts: list[Encoded]) -> Encoded:
        """The reverse."""
        return Encoded(*map(np.concatenate, zip(*parts, strict=True)))


class Job:
    """The published student of a store, ready for events."""

    def __init__(self, store: str) -> None:
        version = versions(store, "student")[-1]
        self.model = load(store, "student", version, fold=FoldConfig(), size=SIZE)
        self._scorer = Scorer(self.model, "cpu")
        self._params = fold_params(self.model.fold)
        self._platform_of_code = platform_lookup(self.model.config)
        self._can_have_P4 = self.model.config.can_have()
        self._recurrence = self.model.recurrence_id
        self._weights = {name: tensor.numpy() for name, tensor in self.model.student.state_dict().items()}
        w = self._weights
        self._rate_H = np.exp(-w["log_tau_H"]) * (np.arange(self.model.config.hidden) % 2)
        # A platform's heads are the shared ones plus its own.
        own_P = (np.arange(len(w["head_bias_PO"])) > 0).astype(np.float32)
        self._head_POK = w["head_weight_POK"] + w["head_weight_POK"][:1] * own_P[:, None, None]
        self._bias_PO = w["head_bias_PO"] + w["head_bias_PO"][:1] * own_P[:, None]
        self._names = [*self.model.categories.names]
        self._warm()

    # -- once an event

    def one(self, row: bytes | None, event: CanonicalEvent, offset: int) -> tuple[bytes, bytes | None]:
        """→ the user's row after the event, its score record (None: a duplicate)."""
        rows, folded = self._fold(row, event, offset)
        encoded = self.encode([folded])
        h_H = self.advance(rows["h"][0], folded, encoded)
        rows["h"][0], rows["h_version"] = h_H, self._recurrence
        return rows.tobytes(), self.finish([folded], encoded, h_H[None])[0]

    # -- batches

    def many(
        self, rows: dict[Any, bytes], keys: list[Any], events: list[CanonicalEvent], offsets: list[int]
    ) -> list[bytes | None]:
        """Rows (by key; absent: a new user) are replaced by those after the events. → score records, in order."""
        place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        block = np.frombuffer(bytearray(b"".join([rows.get(key) or NEW_ROW for key in place])), DTYPE)
        slots = np.array([place[key] for key in keys], np.int64)
        columns = to_columns(events, offsets)
        folded = self._scorer.fold(block, slots, columns)
        scores = self._scorer.score(block, slots, columns, *folded)
        blob, size = block.tobytes(), DTYPE.itemsize
        for key, i in place.items():
            rows[key] = blob[i * size : (i + 1) * size]
        return self._records(events, scores, folded.features, folded.status)

    # -- step by step

    def fold(self, row: bytes | None, event: CanonicalEvent, offset: int) -> tuple[bytes, Folded]:
        """The event into its user's row, all but `h`, which a dataflow keeps beside it."""
        rows, folded = self._fold(row, event, offset)
        return rows.tobytes(), folded

    def _fold(self, row: bytes | None, event: CanonicalEvent, offset: int) -> tuple[np.ndarray, Folded]:
        rows = np.frombuffer(bytearray(row or NEW_ROW), DTYPE)
        column, features = to_columns([event], [offset]), np.empty((1, N_FEATURES), np.float32)
        dt_s, status, view = np.empty(1, np.float32), np.empty(1, np.uint8), np.empty(1, view_dtype(SIZE))
        fold_with_views(rows, _FIRST, column, self._params, features, dt_s, status, view)
        return rows, Folded(event, column, features, dt_s, status, view)

    def encode(self, folded: list[Folded]) -> Encoded:
        """The part of the student that decides how `h` moves, of a batch."""
        w, config = self._weights, self.model.config
        columns, features_NF, dt_s_N = (_joined(folded, field) for field in ("column", "features", "dt_s"))
        platform_N = self._platform_of_code[columns["platform"]]
        x_NF = (features_NF - w["feature_mean_PF"][platform_N]) / w["feature_std_PF"][platform_N]
        x_NF = np.minimum(np.maximum(x_NF, -CLIP), CLIP)
        inputs = (
            x_NF,
            w["item.weight"][_bucket(columns["item"], config.item_buckets)],
            w["category.weight"][_bucket(columns["category"], config.category_buckets)],
            w["platform.weight"][platform_N],
        )
        e_NE = _silu(np.concatenate(inputs, axis=1) @ w["embed.weight"].T + w["embed.bias"])
        both = e_NE @ w["recur.weight"].T + w["recur.bias"]
        gate_NH = 1.0 / (1.0 + np.exp(-both[:, : config.hidden]))
        a_NH = gate_NH * np.exp(np.maximum(-dt_s_N[:, None] * self._rate_H, -60.0))
        return Encoded(x_NF, e_NE, a_NH, (1.0 - gate_NH) * both[:, config.hidden :], platform_N)

    def advance(self, h_H: np.ndarray | None, folded: Folded, encoded: Encoded) -> np.ndarray:
        """`h` (H,) after one event; None: a new user's."""
        if folded.status[0] != FOLDED:
            return h_H if h_H is not None else np.zeros_like(encoded.b[0])
        if h_H is None or starts_afresh(folded.features, folded.status)[0]:
            return encoded.b[0]
        return encoded.a[0] * h_H + encoded.b[0]

    def finish(self, folded: list[Folded], encoded: Encoded, h_NH: np.ndarray) -> list[bytes | None]:
        """Heads, calibration, categories and the record, of a batch."""
        w, model = self._weights, self.model
        f_NK = _silu(np.concatenate([h_NH, encoded.e], axis=1) @ w["trunk.weight"].T + w["trunk.bias"])
        z_NK, platform_N = np.concatenate([f_NK, encoded.x], axis=1), encoded.platform
        out_NO = np.empty((len(z_NK), self._bias_PO.shape[1]), np.float32)
        for p in set(platform_N.tolist()):
            of = platform_N == p
            out_NO[of] = z_NK[of] @ self._head_POK[p].T + self._bias_PO[p]
        calibration_N32 = model.calibration_P32[platform_N]
        logits_N3 = out_NO[:, :N_LOGITS] * calibration_N32[:, :, 0] + calibration_N32[:, :, 1]
        p_N3 = 1.0 / (1.0 + np.exp(-np.clip(logits_N3, -30.0, 30.0)))
        status_N = _joined(folded, "status")
        can_N4 = self._can_have_P4[platform_N] & (status_N != DUPLICATE)[:, None]
        p_N3[~can_N4[:, :N_LOGITS]] = np.nan
        wanted_N = np.ascontiguousarray(can_N4[:, HEADS.index("category")])
        mixed = model.categories.predict(_joined(folded, "view"), platform_N, out_NO[:, N_LOGITS:], wanted_N, TOP_CATEGORIES)
        return self._records([f.event for f in folded], Scores(p_N3, *mixed), _joined(folded, "features"), status_N)

    # -- records

    def _records(
        self, events: list[CanonicalEvent], scores: Scores, features_NF: np.ndarray, status_N: np.ndarray
    ) -> list[bytes | None]:
        now_ms, names = int(time.time() * 1000), self._names
        rows = zip(
            events,
            np.round(scores.p_N3.astype(np.float64), _DIGITS).tolist(),
            scores.category_N5.tolist(),
            np.round(scores.category_p_N5.astype(np.float64), _DIGITS).tolist(),
            np.round(scores.shift_N.astype(np.float64), _DIGITS).tolist(),
            (features_NF[:, _LOG_EVENTS] < _COLD).tolist(),
            (status_N == DUPLICATE).tolist(),
            strict=True,
        )
        return [
            None
            if duplicate
            else encode_json(
                ScoreRecord(
                    schema=SCORE_SCHEMA,
                    event_id=event.event_id,
                    user=event.user,
                    platform=event.platform,
                    ts=event.ts,
                    scored_at=now_ms,
                    model=self.model.version,
                    p=Probabilities(click=click, purchase=purchase, return_=return_),
                    churn=round(1.0 - return_, _DIGITS),
                    categories=[(names[c], p) for c, p in zip(top, top_p, strict=True) if c >= 0],
                    interest_shift=shift,
                    cold=cold,
                    degraded=self.model.degraded,
                )
            )
            for event, (click, purchase, return_), top, top_p, shift, cold, duplicate in rows
        ]

    def _warm(self) -> None:
        """Every kernel compiled before the first record is read."""
        event = CanonicalEvent(event_id="w", platform="warm", user="k1" + "0" * 22, kind="view", ts=1)
        self.one(None, event, 0)
        self.many({}, [b""], [event], [0])


_FIRST = np.zeros(1, np.int64)


def _joined(folded: list[Folded], field: str) -> np.ndarray:
    parts = [getattr(one, field) for one in folded]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _bucket(hash_N: np.ndarray, buckets: int) -> np.ndarray:
    return np.where(hash_N == 0, 0, 1 + hash_N.astype(np.int64) % (buckets - 1))


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))
