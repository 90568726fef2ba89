"""Labels against a plain reference, and what may not be known yet."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import FoldConfig, HorizonsConfig
from models.events import CLICK, EVENT, HEADS, IMPRESSION, PURCHASE, VIEW
from trainer.history import History
from trainer.labels import Labels, horizons_ms, make_labels, matured

S = 1000
FOLD = FoldConfig(lateness_s=60, session_gap_s=100)
HORIZONS = HorizonsConfig(click_s=150, purchase_s=400, return_s=1000)


def history_of(rows: list[tuple], partitions: dict[int, int] | None = None) -> History:
    """rows: (user, ts in s, kind, category, platform); offsets in the order given."""
    events = np.zeros(len(rows), EVENT)
    events["offset"] = np.arange(len(rows))
    events["id"] = np.arange(len(rows))
    for column, at in (("ts", 1), ("kind", 2), ("category", 3)):
        events[column] = [row[at] for row in rows]
    events["ts"] *= S
    user = np.array([row[0] for row in rows], np.int32)
    partition = np.array([(partitions or {}).get(u, 0) for u in user.tolist()], np.int32)
    return History(
        events=events,
        user=user,
        platform=np.array([row[4] for row in rows], np.int16),
        partition=partition,
        offset=np.arange(len(rows)),
        users=[f"u{u}" for u in range(max(user, default=-1) + 1)],
        platforms=("a", "b"),
    )


def plain_labels(rows: list[tuple]) -> list[tuple]:
    """Straight from the definitions, in quadratic time → [(click, purchase, return, next category, its ts)]."""
    out = []
    gap, click, purchase, back = FOLD.session_gap_s, HORIZONS.click_s, HORIZONS.purchase_s, HORIZONS.return_s
    for user, ts, *_ in rows:
        own = sorted((r[1], j) for j, r in enumerate(rows) if r[0] == user)
        starts = [t for k, (t, _) in enumerate(own) if k == 0 or t - own[k - 1][0] > gap]
        session = max(s for s in starts if s <= ts)
        later = [(t, j) for t, j in own if t > ts]
        in_session = [(t, j) for t, j in later if max(s for s in starts if s <= t) == session]
        with_category = [(t, rows[j][3]) for t, j in later if rows[j][3]]
        out.append(
            (
                any(t - ts <= click and rows[j][2] != IMPRESSION for t, j in in_session),
                any(t - ts <= purchase and rows[j][2] == PURCHASE for t, j in later),
                any(ts < s <= ts + back for s in starts),
                *((with_category[0][1], with_category[0][0]) if with_category else (0, None)),
            )
        )
    return out


ROWS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 120).map(lambda t: t * 20),  # coarse: many ties and many gaps at the limit
        st.sampled_from([IMPRESSION, VIEW, CLICK, PURCHASE]),
        st.integers(0, 3),
        st.integers(0, 1),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(ROWS)
def test_equal_to_the_plain_reference(rows):
    labels = make_labels(history_of(rows), FOLD, HORIZONS)
    for i, (click, purchase, back, category, category_s) in enumerate(plain_labels(rows)):
        assert labels.y_N3[i].tolist() == [click, purchase, back], (i, rows)
        assert labels.category_N[i] == category
        assert (labels.delay_N3[i] <= horizons_ms(HORIZONS)[:3]).tolist() == [click, purchase, back]
        own = [r[1] - rows[i][1] for r in rows if r[0] == rows[i][0] and r[2] == PURCHASE and r[1] > rows[i][1]]
        assert labels.delay_N3[i, 1] == min(own) * S if own else labels.delay_N3[i, 1] > 10**15
        assert category_s is None or labels.category_ts_N[i] == category_s * S


@settings(deadline=None)
@given(ROWS, st.integers(0, 2400))
def test_a_matured_label_does_not_change_with_what_comes_later(rows, until_s):
    full = make_labels(history_of(rows), FOLD, HORIZONS)
    ts = np.array([row[1] * S for row in rows], np.int64)
    seen = [i for i, row in enumerate(rows) if row[1] <= until_s]
    early = make_labels(history_of([rows[i] for i in seen]), FOLD, HORIZONS)
    known = matured(full, ts, HORIZONS, until_s * S)[seen]
    np.testing.assert_array_equal(known[:, :3] * full.y_N3[seen], known[:, :3] * early.y_N3)
    # What has come so far says when, and stays.
    so_far = early.delay_N3 <= (until_s * S - ts[seen])[:, None]
    np.testing.assert_array_equal(so_far, full.delay_N3[seen] <= (until_s * S - ts[seen])[:, None])
    np.testing.assert_array_equal(early.delay_N3[so_far], full.delay_N3[seen][so_far])
    np.testing.assert_array_equal(known[:, 3] * full.category_N[seen], known[:, 3] * early.category_N)


def test_a_positive_that_is_known_early_is_not_used_before_its_horizon_has_passed():
    rows = [(0, 0, VIEW, 0, 0), (0, 50, PURCHASE, 0, 0), (1, 300, VIEW, 0, 0)]
    labels = make_labels(history_of(rows), FOLD, HORIZONS)
    ts = labels_ts(rows)
    assert labels.y_N3[0].tolist() == [1, 1, 0]
    assert matured(labels, ts, HORIZONS)[0].tolist() == [True, False, False, False]  # watermark: 300 − 60 s
    rows.append((1, 460, VIEW, 0, 0))
    assert matured(make_labels(history_of(rows), FOLD, HORIZONS), labels_ts(rows), HORIZONS)[0, 1]
    rows[-1] = (1, 459, VIEW, 0, 0)
    assert not matured(make_labels(history_of(rows), FOLD, HORIZONS), labels_ts(rows), HORIZONS)[0, 1]


def labels_ts(rows: list[tuple]) -> np.ndarray:
    return np.array([row[1] * S for row in rows], np.int64)


def watermarks_s(history: History) -> list[int]:
    return (make_labels(history, FOLD, HORIZONS).watermark_N // S).tolist()


def test_a_linked_user_waits_for_every_platform_he_is_on():
    rows = [(0, 0, VIEW, 0, 0), (0, 10, VIEW, 0, 1), (1, 500, VIEW, 0, 0), (2, 900, VIEW, 0, 1)]
    assert watermarks_s(history_of(rows)) == [440, 440, 440, 840]


def test_a_platform_that_stopped_holds_back_only_its_own_events():
    rows = [(0, 0, VIEW, 0, 0), (0, 10, VIEW, 0, 1), (1, 100, VIEW, 0, 0), (2, 1200, VIEW, 0, 1)]
    assert watermarks_s(history_of(rows)) == [40, 1140, 40, 1140]


def test_a_partition_that_lags_holds_back_its_own_users():
    rows = [(0, 0, VIEW, 0, 0), (1, 0, VIEW, 0, 0), (0, 300, VIEW, 0, 0), (1, 900, VIEW, 0, 0)]
    assert watermarks_s(history_of(rows, {0: 0, 1: 1})) == [240, 840, 240, 840]


def test_an_import_is_complete_and_holds_back_only_its_own_events():
    rows = [(0, 0, VIEW, 0, 0), (1, 100, VIEW, 0, 0), (0, 300, VIEW, 0, 0)]
    history = history_of(rows)
    history.partition[:2] = -1
    assert watermarks_s(history) == [40, 40, 240]


def test_horizons_are_in_the_order_of_the_heads():
    assert horizons_ms(HORIZONS).tolist() == [150 * S, 400 * S, 1000 * S, 400 * S]
    assert HEADS == ("click", "purchase", "return", "category")


def test_an_empty_history_has_no_labels():
    labels = make_labels(history_of([]), FOLD, HORIZONS)
    assert isinstance(labels, Labels) and all(len(column) == 0 for column in labels)
    assert matured(labels, np.empty(0, np.int64), HORIZONS).shape == (0, 4)
