"""Explanations are deletions: each effect is the network run again without that term, or without that feature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PLATFORMS, make_model, make_stream, make_student

from models.artifact import load_prior
from models.events import BINARY_HEADS
from models.explain import Explainer, contributions, without_features, without_terms
from models.fold import FEATURE_NAMES, FOLDED, N_FEATURES
from models.scorer import Scorer
from models.state import SIZES, empty_rows
from models.student import N_LOGITS, Columns, linear_scan

torch.set_num_threads(1)
HIDDEN, RING = SIZES["cpu"]


def some_columns(n: int, seed: int) -> Columns:
    rng = np.random.default_rng(seed)
    return Columns(
        torch.from_numpy(rng.normal(1.0, 2.0, (n, N_FEATURES)).astype(np.float32)),
        torch.from_numpy(rng.integers(0, 2**32, n)),
        torch.from_numpy(rng.integers(0, 2**32, n)),
        torch.from_numpy(np.full(n, rng.integers(0, len(PLATFORMS) + 1))),
        torch.from_numpy(rng.choice([0.0, 30.0, 4000.0, 3e6], n).astype(np.float32)),
    )


networks = st.integers(0, 2**16)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 30), seed=networks)
def test_the_terms_of_the_events_sum_to_h(n, seed):
    student, columns = make_student(seed=seed), some_columns(n, seed)
    starts = torch.zeros(n, dtype=torch.bool)
    starts[0] = True
    with torch.inference_mode():
        encoded = student.encode(columns)
        h_NH = linear_scan(encoded.a_NH, encoded.b_NH, starts)
        terms_NH = contributions(encoded.a_NH[None], encoded.b_NH[None])[0]
    torch.testing.assert_close(terms_NH.sum(0), h_NH[-1], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 20), seed=networks, data=st.data())
def test_the_effect_of_an_event_is_what_is_lost_without_its_term(n, seed, data):
    """Against the recurrence run again with b_j = 0, through the heads that serve."""
    student, columns = make_student(seed=seed), some_columns(n, seed)
    j = data.draw(st.integers(0, n - 1))
    starts = torch.zeros(n, dtype=torch.bool)
    starts[0] = True
    with torch.inference_mode():
        encoded = student.encode(columns)
        last = type(encoded)(*(part[-1:] for part in encoded))
        deleted_NH = encoded.b_NH.clone()
        deleted_NH[j] = 0.0

        def logits(b_NH):
            h_NH = linear_scan(encoded.a_NH, b_NH, starts)[-1:]
            return student.heads(h_NH, last.x_NF, last.e_NE, columns.platform_N[-1:])[0][0], h_NH

        full, h_1H = logits(encoded.b_NH)
        without, _ = logits(deleted_NH)
        terms = contributions(encoded.a_NH[None], encoded.b_NH[None])
        effects = without_terms(student, h_1H, terms, last, columns.platform_N[-1:])
    torch.testing.assert_close(effects[0, j], full - without, rtol=1e-3, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(seed=networks, feature=st.integers(0, N_FEATURES - 1))
def test_the_effect_of_a_feature_is_what_is_lost_at_its_mean(seed, feature):
    student, columns = make_student(seed=seed), some_columns(3, seed)
    h_NH = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, HIDDEN)).astype(np.float32))
    features_NF = columns.features_NF.clone()
    features_NF[:, feature] = student.feature_mean_PF[columns.platform_N, feature]
    with torch.inference_mode():
        full, without = (
            student.heads(h_NH, encoded.x_NF, encoded.e_NE, columns.platform_N)[0]
            for encoded in (student.encode(columns), student.encode(columns._replace(features_NF=features_NF)))
        )
    effects = without_features(student, h_NH, columns)
    torch.testing.assert_close(effects[:, feature], full - without, rtol=1e-4, atol=1e-5)
    assert effects.shape == (3, N_FEATURES, N_LOGITS)


def test_a_feature_at_its_mean_has_no_effect():
    student, columns = make_student(), some_columns(4, 1)
    at_mean = columns._replace(features_NF=student.feature_mean_PF[columns.platform_N])
    assert without_features(student, torch.ones(4, HIDDEN), at_mean).abs().max() < 1e-5
    assert without_features(student, torch.ones(4, HIDDEN), columns).abs().max() > 1e-2


# ── in serving ───────────────────────────────────────────────────────────────────────────────────────────────────────


def served(n: int = 400, users: int = 12, seed: int = 3, forget: bool = False):
    """A stream through the scorer; then the last event of each user, scored alone. → what `Explainer` takes, scores."""
    model = make_model(seed=seed)
    scorer, rows = Scorer(model, "cpu"), empty_rows(users)
    events, slots = make_stream(n, users, seed=seed)
    last = np.array([np.flatnonzero(slots == user)[-1] for user in range(users)])
    earlier = np.setdiff1d(np.arange(n), last)
    scorer.run(rows, slots[earlier], events[earlier])
    if forget:
        rows["h_version"] = 0
    folded = scorer.fold(rows, slots[last], events[last])
    scores = scorer.score(rows, slots[last], events[last], *folded)
    return model, rows, slots[last], events[last], folded, scores


def logit(p):
    return np.log(p / (1.0 - p))


def test_in_serving_the_terms_and_what_is_older_are_all_of_h():
    """A rebuilt `h` is the ring's terms and nothing older; a live one of long histories is not."""
    model, rows, slots, events, folded, _ = served(n=130, forget=True)
    in_order = (folded.status == FOLDED) & (rows["ring_id"][slots, rows["n_ring"][slots] - 1] == events["id"])
    whole = in_order & (rows["n_events"][slots] <= RING)
    effects = Explainer(model).effects(rows, slots, events, folded)
    scale = np.abs(effects.event_NK3).max()
    assert whole.sum() > 3 and np.abs(effects.older_N3[whole]).max() < 1e-3 * scale
    model, rows, slots, events, folded, _ = served()
    assert (rows["n_events"][slots] > RING).any()
    assert np.abs(Explainer(model).effects(rows, slots, events, folded).older_N3).max() > 1e-2 * scale


def test_a_served_effect_is_a_difference_of_served_log_odds():
    """Calibration included: the newest event's term taken from `h` in the row, scored by the scorer's own heads."""
    model, rows, slots, events, folded, scores = served()
    explainer = Explainer(model)
    effects = explainer.effects(rows, slots, events, folded)
    student = model.student
    columns = explainer._columns(events, folded.features, folded.dt_s)
    calibration = model.calibration_P32[columns.platform_N.numpy()]
    with torch.inference_mode():
        encoded = student.encode(columns)
        h_NH = torch.from_numpy(rows["h"][slots]) - encoded.b_NH
        z = student.heads(h_NH, encoded.x_NF, encoded.e_NE, columns.platform_N)[0].numpy()
    without = z * calibration[:, :, 0] + calibration[:, :, 1]
    newest = np.argmax(rows["ring_id"][slots] == events["id"][:, None], axis=1)
    there = (rows["ring_id"][slots, newest] == events["id"]) & (folded.status == FOLDED)
    there &= newest == rows["n_ring"][slots] - 1  # not late: nothing came after it
    can = ~np.isnan(scores.p_N3) & there[:, None]
    assert can.any()
    measured = effects.event_NK3[np.arange(len(slots)), newest]
    np.testing.assert_allclose(measured[can], (logit(scores.p_N3.astype(np.float64)) - without)[can], atol=2e-4)


def test_what_is_named_is_the_greatest_by_absolute_value():
    model, rows, slots, events, folded, scores = served()
    explainer = Explainer(model)
    effects = explainer.effects(rows, slots, events, folded)
    named = explainer.explain(rows, slots, events, folded, scores.p_N3, top=3)
    assert len(named) == len(events)
    for i, explanations in enumerate(named):
        assert [e.head for e in explanations] == [
            head for k, head in enumerate(BINARY_HEADS) if not np.isnan(scores.p_N3[i, k])
        ]
        for one in explanations:
            head, n = BINARY_HEADS.index(one.head), rows["n_ring"][slots[i]]
            assert len(one.features) == 3 and len(one.events) == min(3, n)
            strongest = np.abs(effects.feature_NF3[i, :, head]).argmax()
            assert one.features[0].name == FEATURE_NAMES[strongest]
            by_size = [abs(event.effect) for event in one.events]
            assert by_size == sorted(by_size, reverse=True)
            assert all(0 <= event.back < n and event.age_s >= 0 for event in one.events)


def test_a_duplicate_has_no_reasons_and_a_model_of_constants_none():
    model, rows, slots, events, folded, scores = served()
    scores.p_N3[2] = np.nan  # as the scorer has it for a duplicate
    named = Explainer(model).explain(rows, slots, events, folded, scores.p_N3, top=2)
    assert named[2] == [] and any(named)
    with pytest.raises(ValueError, match="no student"):
        Explainer(load_prior())


def test_a_user_who_is_there_twice_or_has_another_models_h_is_refused():
    model, rows, slots, events, folded, _ = served()
    explainer = Explainer(model)
    with pytest.raises(ValueError, match="twice"):
        explainer.effects(rows, slots * 0, events, folded)
    rows["h_version"][slots[0]] += 1
    with pytest.raises(ValueError, match="recurrence"):
        explainer.effects(rows, slots, events, folded)
