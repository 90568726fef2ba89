"""The student as the CPU serves it, against `Student` in torch."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from tiny import PLATFORMS, make_config, make_model, make_stream

from models.config import FoldConfig
from models.fold import DUPLICATE, FOLDED, N_FEATURES, REPLAYED, TOO_LATE, fold, fold_params, starts_afresh
from models.scorer import Scorer, platform_lookup
from models.serve import TILE, CpuStudent, _exp
from models.state import empty_rows
from models.student import N_GATES, N_LOGITS, Columns

torch.set_num_threads(1)
USERS = 20
ATOL = 1e-5
"""Of h, p and gate logits, all of order 1: float32 sums of up to 384 terms in another order, and `_exp`."""


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def model(request):
    return make_model(request.param)


def folded(model, n: int, seed: int, users: int = USERS):
    """→ (empty rows, slots, events, features, dt_s, status): a stream with late events, repeats and replays, folded."""
    events, slots = make_stream(n, users, seed)
    rows, features = empty_rows(users, model.config.size), np.empty((n, N_FEATURES), np.float32)
    dt_s, status = np.empty(n, np.float32), np.empty(n, np.uint8)
    fold(rows, slots, events, fold_params(FoldConfig()), features, dt_s, status)
    return empty_rows(users, model.config.size), slots, events, features, dt_s, status


def plain(model, rows, slots, events, features, dt_s, status):
    """By `Student`, h event by event in float64 → p (N, 3) with NaN, gate logits (N, 7), h after all by slot."""
    student, n = model.student, len(events)
    platform_N = platform_lookup(model.config)[events["platform"]]
    h_UH, h_NH = rows["h"].astype(np.float64), np.empty((n, model.config.hidden))
    fresh_N = starts_afresh(features, status)
    with torch.inference_mode():
        columns = Columns.of(events, features, dt_s, platform_N)
        x_NF, e_NE, a_NH, b_NH = student.encode(columns)
        for i in range(n):
            if fresh_N[i]:
                h_UH[slots[i]] = 0.0
            if status[i] == FOLDED:
                h_UH[slots[i]] = a_NH[i].double().numpy() * h_UH[slots[i]] + b_NH[i].double().numpy()
            h_NH[i] = h_UH[slots[i]]
        logits_N3, gates_NG = student.heads(torch.from_numpy(h_NH).float(), x_NF, e_NE, columns.platform_N)
    slope_N3, offset_N3 = np.moveaxis(model.calibration_P32[platform_N], 2, 0)
    p_N3 = 1.0 / (1.0 + np.exp(-(logits_N3.numpy() * slope_N3 + offset_N3)))
    can_N4 = model.config.can_have()[platform_N] & (status != DUPLICATE)[:, None]
    return np.where(can_N4[:, :3], p_N3, np.nan), gates_NG.numpy(), h_UH, can_N4[:, 3]


def served(model, rows, slots, events, features, dt_s, status, cuts=()):
    """By CpuStudent, cut into batches."""
    ours = CpuStudent(model.student, model.calibration_P32, model.config.can_have())
    platform_N = platform_lookup(model.config)[events["platform"]]
    bounds, parts = [0, *cuts, len(events)], []
    for start, stop in pairwise(bounds):
        at = slice(start, stop)
        fresh_N = starts_afresh(features[at], status[at])
        parts.append(ours.score(rows, slots[at], events[at], features[at], dt_s[at], status[at], fresh_N, platform_N[at]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@pytest.mark.parametrize("n", [1, 2, 7, 64, TILE - 1, TILE, TILE + 1, 1500, 8192])
def test_it_says_what_the_student_says(model, n):
    rows, *batch = folded(model, n, seed=n)
    p_N3, gates_NG, h_UH, wanted_N = plain(model, rows, *batch)
    ours = served(model, rows, *batch)
    np.testing.assert_allclose(ours[0], p_N3, rtol=0, atol=ATOL)
    np.testing.assert_allclose(ours[1], gates_NG, rtol=0, atol=ATOL)
    np.testing.assert_array_equal(ours[2], wanted_N)
    np.testing.assert_allclose(rows["h"], h_UH, rtol=0, atol=ATOL)
    assert [column.shape for column in ours] == [(n, N_LOGITS), (n, N_GATES), (n,)]
    if n >= 64:
        assert set(batch[-1].tolist()) >= {FOLDED, REPLAYED, DUPLICATE}
        assert set(platform_lookup(model.config)[batch[1]["platform"]]) == {0, 1, 2, 3}
        assert np.abs(rows["h"]).max() > 0.1
        assert np.nanstd(p_N3) > 0.05


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 1300), users=st.integers(1, 30), data=st.data())
def test_any_cut_into_batches_gives_the_same(seed, n, users, data):
    model = make_model(seed=seed % 5)
    rows, *batch = folded(model, n, seed, users)
    cuts = sorted(data.draw(st.sets(st.integers(1, n), max_size=6)) - {n})
    cut_rows = rows.copy()
    whole, cut = served(model, rows, *batch), served(model, cut_rows, *batch, cuts=cuts)
    np.testing.assert_allclose(whole[0], cut[0], rtol=0, atol=ATOL)
    np.testing.assert_allclose(whole[1], cut[1], rtol=0, atol=ATOL)
    np.testing.assert_array_equal(whole[2], cut[2])
    np.testing.assert_allclose(rows["h"], cut_rows["h"], rtol=0, atol=ATOL)


def test_the_same_batch_gives_the_same_bytes_whatever_was_scored_before(model):
    """Nothing of an earlier batch is left in the tile's matrices."""
    rows, *batch = folded(model, 700, seed=3)
    ours = CpuStudent(model.student, model.calibration_P32, model.config.can_have())
    slots, events, features, dt_s, status = batch
    platform_N, fresh_N = platform_lookup(model.config)[events["platform"]], starts_afresh(features, status)
    said = []
    for _ in range(2):
        fresh_rows = rows.copy()
        out = ours.score(fresh_rows, slots, events, features, dt_s, status, fresh_N, platform_N)
        said.append(b"".join(column.tobytes() for column in (*out, fresh_rows)))
        ours.score(rows.copy(), slots[::-1], events[::-1], -features, dt_s, status, fresh_N, platform_N)
    assert said[0] == said[1]


def test_only_folded_events_move_h_and_only_h_changes(model):
    rows, slots, events, features, dt_s, status = folded(model, 300, seed=5)
    rows["h"] = np.random.default_rng(0).normal(size=rows["h"].shape)
    before = rows.copy()
    for other in (REPLAYED, DUPLICATE, TOO_LATE):
        served(model, rows, slots, events, features, dt_s, np.full_like(status, other))
        assert rows.tobytes() == before.tobytes()
    served(model, rows, slots, events, features, dt_s, status)
    for field in set(rows.dtype.names) - {"h"}:
        np.testing.assert_array_equal(rows[field], before[field])
    assert not np.array_equal(rows["h"], before["h"])


@settings(max_examples=30, deadline=None)
@given(
    feature=st.floats(-(2.0**100), 2.0**100, width=32),
    dt=st.sampled_from([0.0, 1e-3, 60.0, 1e9, 3e38]),
    item=st.sampled_from([0, 1, 4095, 4096, 2**31, 2**32 - 1]),
    code=st.integers(0, 2**16 - 1),
)
def test_extreme_events_are_the_students_too(feature, dt, item, code):
    model = make_model()
    rows, slots, events, features, dt_s, status = folded(model, 40, seed=9)
    features[::3], dt_s[::2], events["item"][::4], events["category"][::5] = feature, dt, item, item
    events["platform"][::3] = code
    expected = plain(model, rows, slots, events, features, dt_s, status)
    ours = served(model, rows, slots, events, features, dt_s, status)
    np.testing.assert_allclose(ours[0], expected[0], rtol=0, atol=ATOL)
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-5, atol=ATOL)
    np.testing.assert_allclose(rows["h"], expected[2], rtol=1e-5, atol=ATOL)


def test_what_is_no_number_stays_none():
    """A broken feature must not look like a score."""
    model = make_model()
    rows, slots, events, features, dt_s, status = folded(model, 40, seed=9)
    features[7] = np.nan
    status[:] = FOLDED
    p_N3, gates_NG, _ = served(model, rows, slots, events, features, dt_s, status)
    assert np.isnan(p_N3[7]).all()
    assert np.isnan(gates_NG[7]).all()
    others = slots != slots[7]
    assert np.isfinite(gates_NG[others]).all()
    assert np.isnan(rows["h"][slots[7]]).all()


def test_what_does_not_fit_is_refused_before_any_row_changes(model):
    rows, slots, events, features, dt_s, status = folded(model, 10, seed=1)
    ours, before = CpuStudent(model.student, model.calibration_P32, model.config.can_have()), rows.tobytes()
    good = {
        "rows": rows,
        "slots": slots,
        "events": events,
        "features_NF": features,
        "dt_s_N": dt_s,
        "status_N": status,
        "fresh_N": np.zeros(10, bool),
        "platform_N": np.ones(10, np.int64),
    }
    other = "gpu" if model.config.size == "cpu" else "cpu"
    for wrong in (
        {"slots": slots[:9]},
        {"slots": np.full(10, USERS)},
        {"slots": np.full(10, -1)},
        {"features_NF": features[:, 1:]},
        {"dt_s_N": dt_s[:9]},
        {"status_N": status[:9]},
        {"fresh_N": np.zeros(9, bool)},
        {"platform_N": np.full(10, len(PLATFORMS) + 1)},
        {"platform_N": np.full(10, -1)},
        {"rows": empty_rows(USERS, other)},
    ):
        with pytest.raises(ValueError):
            ours.score(**{**good, **wrong})
        assert rows.tobytes() == before
    ours.score(**good)
    assert rows.tobytes() != before


@njit
def every_exp(x, out):
    for i in range(len(x)):
        out[i] = _exp(x[i])


def test_the_exponential_keeps_its_error():
    x = np.concatenate([np.linspace(-87, 87, 2_000_001), np.random.default_rng(0).normal(size=500_000)]).astype(np.float32)
    out = np.empty_like(x)
    every_exp(x, out)
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1.0).max() < 1.2e-7
    edges, out = np.float32([0.0, -0.0, -1e9, 1e9, -np.inf, np.inf, np.nan]), np.empty(7, np.float32)
    every_exp(edges, out)
    assert out[:2].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(out[2:6], [math.exp(-87), math.exp(87)] * 2, rtol=1e-5)
    assert np.isnan(out[6])


def test_the_scorer_serves_by_it():
    """The whole path, against the student in torch."""
    model = make_model()
    rows, slots, events, features, dt_s, status = folded(model, 600, seed=11)
    p_N3, _, h_UH, _ = plain(model, rows, slots, events, features, dt_s, status)
    scores, said = Scorer(model, "cpu").run(rows, slots, events)
    np.testing.assert_array_equal(said, status)
    np.testing.assert_allclose(scores.p_N3, p_N3, rtol=0, atol=ATOL)
    np.testing.assert_allclose(rows["h"], h_UH, rtol=0, atol=ATOL)


def test_a_student_without_known_platforms():
    config = make_config()
    model = make_model()
    assert config.platforms == PLATFORMS
    rows, slots, events, features, dt_s, status = folded(model, 50, seed=2)
    events["platform"] = 65_000
    expected = plain(model, rows, slots, events, features, dt_s, status)
    ours = served(model, rows, slots, events, features, dt_s, status)
    np.testing.assert_allclose(ours[0], expected[0], rtol=0, atol=ATOL)
