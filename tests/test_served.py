"""The benchmark of the student as it is served, on a made-up history: states, slices, precisions, cadences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save
from synthetic_history import HOUR_MS, START_MS, make_canonical

from benchmarks import cells, datasets, served
from benchmarks.baselines import teachers_work
from benchmarks.datasets import TASKS, TEST, TRAIN, VALIDATE
from models.config import FoldConfig
from models.explain import Explainer
from models.fold import N_FEATURES
from models.scorer import Model, identity_calibration
from models.student import Student
from trainer.boosting import MOST_BAGS
from trainer.fit import Network, logits

pytestmark = pytest.mark.usefixtures("one_thread")
DAY_MS = 24 * HOUR_MS


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """All four platforms of the matrix, made up; some items exist only in the last part of the time."""
    events = []
    for name, users, days, of in (
        ("retailrocket", 30, 132, "shop"),
        ("taobao", 150, 8.5, "shop"),
        ("online_retail_uk", 60, 344, "till"),
        ("complete_journey", 12, 359, "shop"),
    ):
        own = [event for event in make_canonical(users, days, seed=len(name)) if event.platform == of]
        # Long histories keep every fourth event: a round of serving is as long as the longest of them.
        for event in own if days < 10 else own[::4]:
            event.platform, event.user, event.event_id = name, f"{name}:{event.user}", f"{name}:{event.event_id}"
            if event.ts > START_MS + 0.85 * days * DAY_MS and event.item.endswith("7"):
                event.item = f"new {event.item}"
            events.append(event)
    data = datasets._as_dataset(sorted(events, key=lambda event: event.ts), tuple(datasets.MATRIX))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda *_, **__: data)
        return cells.prepare(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("cache"), 1)


@pytest.fixture(scope="module")
def kept(bench) -> served.Kept:
    """Weights from a seed, large enough that every input matters."""
    torch.manual_seed(0)
    config = cells.student_config(bench.data)
    student = Student(config)
    student.fit_normalisation(bench.examples.columns.features_NF.numpy(), bench.examples.platform_M)
    network = Network(student, len(TASKS))
    with torch.no_grad():
        for parameter in (student.head_weight_POK, network.more_weight_PXK):
            parameter.normal_(std=0.1)
    network.eval().requires_grad_(False)
    return served.Kept(network, Model("m", config, student, None, identity_calibration(4), FoldConfig()))


@pytest.fixture(scope="module")
def said(bench, kept):
    return served.histories(bench, kept, served.scored_at(bench))


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_teachers_work_is_that_of_the_members_it_kept(bench):
    platforms = bench.data.history.platforms
    learned_PT = [
        bench.examples.learn_MT[bench.examples.platform_M == row].any(axis=0) for row in range(1, len(platforms) + 1)
    ]

    def work(*members: str) -> list[int]:
        return list(teachers_work(bench, dict.fromkeys(range(1, len(platforms) + 1), members)).values())

    assert work("logistic") == [2 * N_FEATURES * int(learned_T.sum()) for learned_T in learned_PT]
    copies = MOST_BAGS  # of so few events
    assert work("boosting") == [copies * 80 * 3 * int(learned_T.sum()) for learned_T in learned_PT]
    assert min(work("recurrence")) > 5 * cells.student_config(bench.data).flops_per_event()
    everything = zip(work("boosting"), work("randomised"), work("logistic"), work("recurrence"), strict=True)
    assert work("boosting", "randomised", "logistic", "recurrence") == [sum(each) for each in everything]


def test_served_live_the_student_says_what_it_says_in_training(bench, kept, said):
    at_A = served.scored_at(bench)
    whole = logits(kept.network, bench.examples, np.arange(len(bench.examples)))
    np.testing.assert_allclose(said[0]["live"][at_A], whole[at_A], atol=1e-4)
    assert np.isnan(said[0]["live"]).all(axis=1).sum() == len(bench.examples) - len(at_A)


def test_a_rebuild_is_nearer_than_no_history_and_exact_where_the_ring_is_all(bench, said):
    at_A, logits_of = served.scored_at(bench), said[0]
    apart = {name: np.abs(logits_of[name][at_A] - logits_of["live"][at_A]).mean(axis=1) for name in served.HISTORIES}
    assert apart["once"].mean() < apart["rebuilt"].mean() < 0.5 * apart["none"].mean()
    few = served.events_behind(bench.examples)[at_A] <= 16
    assert few.any() and apart["rebuilt"][few].max() < 1e-3 and apart["truncated"][few].max() < 1e-3
    # Before its first event of the test days a user's state was never thrown away.
    checked = bench.data.split_N[bench.examples.index_M[at_A]] == VALIDATE
    assert not apart["once"][checked].any() and apart["once"][~checked].any()


def test_rows_are_those_of_right_after_the_event(bench, said):
    at_A, rows_A = served.scored_at(bench), said[1]
    assert (rows_A["n_events"] == served.events_behind(bench.examples)[at_A]).all()
    assert (rows_A["last_ts"] == bench.examples.ts_M[at_A]).all()


def test_the_section_states_the_bar_and_its_numbers(bench, said):
    section = served.rebuilding(bench, {name: values for name, values in said[0].items()}, 20)
    (one,) = section.bars.values()
    assert (one["must"], one["aim"]) == ("≤ .001 apart", "≤ .0003")
    assert one["met"] == (abs(one["value"][0]) <= 0.001) and f"{one['value'][0]:+.4f}" in section.text


# ── explanations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_a_history_that_lies_in_the_ring_serving_names_the_exact_effects(bench, kept, said):
    at_A, rows_A = served.scored_at(bench), said[1]
    few = np.flatnonzero(rows_A["n_events"] <= 16)[:40]
    events = bench.data.history.events[bench.examples.index_M[at_A[few]]]
    effects = Explainer(kept.model).effects(
        rows_A[few], np.arange(len(few)), events, served._folded(bench.examples, at_A[few])
    )
    exact_AK3, older_A3 = served.exact_effects(kept, bench.examples, at_A[few], 16)
    for i, n in enumerate(effects.filled_N.tolist()):
        np.testing.assert_allclose(effects.event_NK3[i, :n][::-1], exact_AK3[i, :n], atol=1e-3)
    assert np.abs(older_A3).max() < 1e-4 and np.abs(effects.older_N3).max() < 1e-3


# ── slices ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_slices_hold_whom_they_say(bench):
    found, examples = served.slices_of(bench), bench.examples
    assert (found["users with one event"] <= found["users with at most three events"]).all()
    first = found["items not seen before the validation days"]
    days = bench.data.split_N[examples.index_M]
    assert not first[days == TRAIN].any() and first[days == TEST].any()
    new = found["users with no anchor that was learned from"]
    assert not new[examples.learn_MT.any(axis=1)].any()


def test_a_slice_with_too_few_is_left_out_and_the_figures_are_of_the_slice(bench, said):
    p = {"live": served.probabilities(bench, logits_everywhere(bench, said))}
    everyone = served.sliced(bench, p, np.ones(len(bench.examples), bool), 0)
    assert everyone and all(cell["n"] >= served.LEAST for cell in everyone.values())
    none = np.zeros(len(bench.examples), bool)
    assert served.sliced(bench, p, none, 0) == {}
    cell = next(iter(everyone.values()))
    assert cell["models"]["live"]["relative_loss"] > 0


def logits_everywhere(bench, said) -> np.ndarray:
    return np.nan_to_num(said[0]["live"])


def test_the_worst_slice_is_the_worst_of_its_figure():
    def cell(auc, loss, ratio):
        return {"models": {"m": {"auc": auc, "relative_loss": loss, "predicted_over_actual": ratio}}}

    found = {"a": {("p", "t"): cell(0.7, 0.9, 1.3)}, "b": {("p", "t"): cell(0.6, 0.8, 0.5)}}
    assert served.worst(found, "m", "auc") == (0.6, "p t, b")
    assert served.worst(found, "m", "relative_loss") == (0.9, "p t, a")
    assert served.worst(found, "m", "predicted_over_actual") == (0.5, "p t, b")


# ── precision ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_smaller_weights_are_smaller_and_say_nearly_the_same(bench, kept):
    variants = served.compressed(kept)
    plain = variants["fp32"]
    stored = len(save(kept.network.state_dict()))
    assert plain.size_bytes <= stored < plain.size_bytes + 4096  # safetensors' header
    everything = np.arange(len(bench.examples))
    whole = logits(plain.network, bench.examples, everything)
    for name, variant in variants.items():
        apart = np.abs(logits(variant.network, bench.examples, everything) - whole)
        if name == "fp32":
            assert not apart.any()
        else:
            assert variant.size_bytes < plain.size_bytes, name
            assert 0 < apart.mean() < 0.1, name


def test_eight_bits_keep_each_row_to_half_a_step():
    tensor = torch.randn(50, 20) * torch.logspace(-3, 2, 50)[:, None]
    step = tensor.abs().amax(dim=1, keepdim=True) / 127.0
    assert ((served._int8_rows(tensor) - tensor).abs() <= 0.5001 * step).all()
    assert not served._int8_rows(torch.zeros(2, 3)).any()


# ── cadences ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_part_knows_nothing_of_what_came_later(bench):
    part, examples = served.of_first_part(bench, 0.6), bench.examples
    assert 0 < len(part) < len(examples) and not part.check_MT.any()
    shop = examples.platform_M == 1
    train = examples.ts_M[shop & (bench.data.split_N[examples.index_M] == TRAIN)]
    cut = train.min() + 0.6 * (train.max() - train.min())
    mine = part.platform_M == 1
    assert part.ts_M[mine].max() < cut
    week = TASKS.index("return")
    learned = part.learn_MT[:, week] & mine
    assert learned.any() and part.ts_M[learned].max() + 7 * 86_400_000 <= cut
    last = np.r_[part.user_M[1:] != part.user_M[:-1], True]
    assert not part.next_M[last].any()


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "this one"), (90, "90 s before"), (7200, "2 hours before"), (1e6, "12 days before")]
)
def test_how_long_ago(seconds, said):
    assert served._ago(seconds) == said
