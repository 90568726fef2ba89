"""What came after each event, and whether it is known yet.

    click      an act (any kind but `impression`) later in the same session, within click_s
    purchase   a purchase on any platform, within purchase_s
    return     the start of a later session, within return_s
    category   the category of the user's next event that has one

"Later" is a strictly greater `ts`: events that share an instant are no future of each other. Sessions are gap-based in
event time over all of a user's events, as in the fold. A linked person is one user, so "any platform" needs no join.

Maturity. A label is used only once its whole horizon lies before the watermark, positives too: a purchase that is seen
after an hour counts after a day, as its absence does; else fresh events would look like buyers. `category` has no
horizon; it is used once `purchase_s` lies before the watermark and the next event does.

The watermark of a source (a platform in a partition) is its greatest `ts` minus the lateness. An event's watermark is
the least of its own source's and those of the other sources on which its user has been seen and which still live. A
source that lies more than return_s behind the furthest has stopped: it no longer holds back the events of others. An
import is complete, so it holds back only its own.

Knows nothing of Kafka, features or models.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from models.config import FoldConfig, HorizonsConfig
from models.events import BINARY_HEADS, HEADS, IMPRESSION, PURCHASE
from trainer.history import History

_NEVER = np.int64(2**62)


class Labels(NamedTuple):
    """The future of n events, in the order of the history."""

    y_N3: np.ndarray
    """uint8, in the order of BINARY_HEADS; means something only where matured."""
    delay_N3: np.ndarray
    """int64 ms, after which what a head predicts came, beyond its horizon too (`click`: in the same session); very large
    where it has not come."""
    category_N: np.ndarray
    """uint32, hash of the next category; 0 where none has come."""
    category_ts_N: np.ndarray
    """int64 ms, of the event that brought it; very large where none has come."""
    watermark_N: np.ndarray
    """int64 ms, up to which the event's future is known."""


def make_labels(history: History, fold: FoldConfig, horizons: HorizonsConfig) -> Labels:
    """Labels of every event of the history and the watermark that says whether they may be used."""
    n = len(history)
    delay_N3, category_N = np.full((n, 3), _NEVER), np.zeros(n, np.uint32)
    category_ts_N = np.full(n, _NEVER)
    order = np.lexsort((np.arange(n), history.events["ts"], history.user))
    _label(
        order, history.user, history.events["ts"], history.events["kind"], history.events["category"],
        _ms(fold.session_gap_s), delay_N3, category_N, category_ts_N,
    )  # fmt: skip
    y_N3 = (delay_N3 <= horizons_ms(horizons)[: len(BINARY_HEADS)]).astype(np.uint8)
    return Labels(
        y_N3, delay_N3, category_N, category_ts_N, watermarks(history, _ms(fold.lateness_s), _ms(horizons.return_s))
    )


def horizons_ms(horizons: HorizonsConfig) -> np.ndarray:
    """(4,) int64 ms, in the order of HEADS: how long after its event a label is known."""
    by_head = {"click": horizons.click_s, "purchase": horizons.purchase_s, "return": horizons.return_s}
    return np.array([_ms(by_head.get(head, horizons.purchase_s)) for head in HEADS])


def matured(
    labels: Labels, ts_N: np.ndarray, horizons: HorizonsConfig, until_ms: int | np.ndarray | None = None
) -> np.ndarray:
    """(n, 4) bool in the order of HEADS: the labels that were known at `until_ms` (event time, of all events, or (n,) of
    each; None: now)."""
    known_N = labels.watermark_N if until_ms is None else np.minimum(labels.watermark_N, until_ms)
    matured_N4 = ts_N[:, None] + horizons_ms(horizons) <= known_N[:, None]
    matured_N4[:, HEADS.index("category")] &= labels.category_ts_N <= known_N
    return matured_N4


def watermarks(history: History, lateness_ms: int, stopped_ms: int) -> np.ndarray:
    """(n,) int64 ms: the watermark of each event, see the module."""
    n_platforms = max(1, len(history.platforms))
    source = history.partition.astype(np.int64) * n_platforms + history.platform
    sources, source_N = np.unique(source, return_inverse=True)
    greatest_S = np.full(len(sources), -_NEVER)
    np.maximum.at(greatest_S, source_N, history.events["ts"])
    watermark_S = greatest_S - lateness_ms
    lives_S = (greatest_S >= greatest_S.max(initial=-_NEVER) - stopped_ms) & (sources >= 0)
    pair = np.unique(history.user.astype(np.int64) * len(sources) + source_N)
    pair = pair[lives_S[pair % len(sources)]] if len(pair) else pair
    least_U = np.full(len(history.users), _NEVER)
    if len(pair):
        np.minimum.at(least_U, pair // len(sources), watermark_S[pair % len(sources)])
    return np.minimum(watermark_S[source_N], least_U[history.user]) if len(history) else np.empty(0, np.int64)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


@njit(cache=True)
def _label(order, user, ts, kind, category, gap_ms, delay_N3, category_N, category_ts_N):
    """Backwards through each user's events by time. Everything at one instant is held in `at_*` until an earlier event
    comes: only then is it `later`."""
    n = len(order)
    none = np.int64(-1)
    session = 0
    at_act = at_purchase = at_start = at_category_ts = none
    later_act = later_purchase = later_start = later_category_ts = none
    at_act_session = later_act_session = 0
    at_category = later_category = category[0] if n else np.uint32(0)
    for k in range(n - 1, -1, -1):
        i = order[k]
        last_of_user = k == n - 1 or user[order[k + 1]] != user[i]
        if last_of_user:
            session = 0
            at_act = at_purchase = at_start = at_category_ts = none
            later_act = later_purchase = later_start = later_category_ts = none
        else:
            following = order[k + 1]
            if ts[following] - ts[i] > gap_ms:
                session += 1
            if ts[following] > ts[i]:
                if at_act != none:
                    later_act, later_act_session, at_act = at_act, at_act_session, none
                if at_purchase != none:
                    later_purchase, at_purchase = at_purchase, none
                if at_start != none:
                    later_start, at_start = at_start, none
                if at_category_ts != none:
                    later_category, later_category_ts, at_category_ts = at_category, at_category_ts, none
        if later_act != none and later_act_session == session:
            delay_N3[i, 0] = later_act - ts[i]
        if later_purchase != none:
            delay_N3[i, 1] = later_purchase - ts[i]
        if later_start != none:
            delay_N3[i, 2] = later_start - ts[i]
        if later_category_ts != none:
            category_N[i], category_ts_N[i] = later_category, later_category_ts
        if kind[i] != IMPRESSION:
            at_act, at_act_session = ts[i], session
        if kind[i] == PURCHASE:
            at_purchase = ts[i]
        if category[i] != 0:
            at_category, at_category_ts = category[i], ts[i]
        first_of_user = k == 0 or user[order[k - 1]] != user[i]
        if first_of_user or ts[i] - ts[order[k - 1]] > gap_ms:
            at_start = ts[i]
