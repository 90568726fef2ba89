"""How often a user's own past labels came true, of those that had matured: features for the teacher.

    events of a user      e1      e2      e3            e4 ← asked here
    their labels known    e1 + horizon ─┘  e2 + horizon ──┘   (e3's is not known yet: it does not count)

The student's row has no place for them; the teacher sees the history and passes on what they tell. Only labels whose
horizon had ended by the event itself count, so they are known when it is scored.

Shapes: M events, sorted by user, then time; T tasks. Knows nothing of histories, models or splits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

PRIOR_HITS, PRIOR_TRIES = 1.0, 2.0
"""What a user begins with: a rate of one half on two tries."""


@njit(cache=True, nogil=True)
def _count(user_M, ts_M, y_MT, known_MT, horizon_ms_T, hits_MT, tries_MT):
    for task in range(len(horizon_ms_T)):
        done = 0
        hits = tries = 0.0
        for i in range(len(user_M)):
            if i == 0 or user_M[i] != user_M[i - 1]:
                done = i
                hits = tries = 0.0
            while done < i and ts_M[done] + horizon_ms_T[task] <= ts_M[i]:
                if known_MT[done, task]:
                    hits += y_MT[done, task]
                    tries += 1.0
                done += 1
            hits_MT[i, task] = hits
            tries_MT[i, task] = tries


def matured_counts(
    user_M: np.ndarray, ts_M: np.ndarray, y_MT: np.ndarray, known_MT: np.ndarray, horizon_ms_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """→ (labels that came true, labels) float32 (M, T): of the user's earlier events whose label is of the kind that is ever
    known (`known_MT`) and whose horizon ended by the event's `ts`. Times in ms. A late event (its `ts` below the one
    before it) holds the window where it was."""
    shape = y_MT.shape
    hits_MT, tries_MT = np.empty(shape, np.float32), np.empty(shape, np.float32)
    horizon_ms_T = np.asarray(horizon_ms_T, np.int64)
    _count(user_M, np.asarray(ts_M, np.int64), y_MT.astype(np.float32), known_MT, horizon_ms_T, hits_MT, tries_MT)
    return hits_MT, tries_MT


def rate_features(hits_MT: np.ndarray, tries_MT: np.ndarray) -> np.ndarray:
    """(M, 2 T) float32: for each task the rate, drawn to one half by two tries, and log(1 + tries)."""
    rate_MT = (hits_MT + PRIOR_HITS) / (tries_MT + PRIOR_TRIES)
    return np.concatenate([rate_MT, np.log1p(tries_MT)], axis=1).astype(np.float32)
