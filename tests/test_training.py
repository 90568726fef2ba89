"""Training: the serving fold replayed, no look ahead, and a student that learns, keeps its recurrence and is calibrated."""

import copy
import dataclasses

import msgspec
import numpy as np
import pytest
import torch
from synthetic_history import HOUR_MS, START_MS, make_canonical, make_history, store_events

from models.artifact import load_prior
from models.config import FoldConfig, HorizonsConfig
from models.events import HEADS
from models.fold import FOLDED, N_FEATURES, fold, fold_params
from models.scorer import Model, Scorer, identity_calibration
from models.state import empty_rows
from models.student import N_LOGITS, Student, StudentConfig
from trainer import evaluate as judge
from trainer.evaluate import LEAST_CELL, compare, evaluate, predict
from trainer.examples import before, gate_start, heads_of, make_examples, replay
from trainer.fit import Schedule
from trainer.history import HistoryStore
from trainer.labels import horizons_ms, make_labels, matured
from trainer.recalibrate import recalibrate
from trainer.train import affine, category_targets, design_effect, learned, offset, train

FOLD, HORIZONS = FoldConfig(), HorizonsConfig()
OPTIONS = Schedule(epochs=2)
PRIOR = np.array([0.5, -2.0, 0.3])
DAY_MS = 24 * HOUR_MS


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return make_history(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="module")
def labels(history):
    return make_labels(history, FOLD, HORIZONS)


@pytest.fixture(scope="module")
def gate(history, labels):
    return gate_start(history, labels, HORIZONS, 0.2)


@pytest.fixture(scope="module")
def replayed(history, gate):
    return replay(history, FOLD, "cpu", until_ms=gate.user_U)


@pytest.fixture(scope="module")
def config(history, gate):
    return StudentConfig.of("cpu", N_FEATURES, history.platforms, heads_of(history, None, gate))


@pytest.fixture(scope="module")
def examples(history, labels, replayed, config, gate):
    return make_examples(history, labels, replayed, config, HORIZONS, gate)


@pytest.fixture(scope="module")
def major(examples, config, history):
    return train(examples, config, history.categories, FOLD, OPTIONS, prior_logits_3=PRIOR)


def test_a_replay_in_other_batches_gives_the_same_bytes(history):
    one = replay(history, FOLD, "cpu")
    for batch in (1, 7, 1000):
        other = replay(history, FOLD, "cpu", batch=batch)
        assert one.rows.tobytes() == other.rows.tobytes()
        assert one.features_MF.tobytes() == other.features_MF.tobytes()
        assert one.dt_s_M.tobytes() == other.dt_s_M.tobytes()
        assert one.status_M.tobytes() == other.status_M.tobytes()
        assert clean(one.views_M).tobytes() == clean(other.views_M).tobytes()


def clean(views: np.ndarray) -> np.ndarray:
    """What lies after the n-th category of a view means nothing."""
    views = views.copy()
    views["ring_category"][np.arange(views["ring_category"].shape[1]) >= views["n"][:, None]] = 0
    return views


def test_a_replay_is_what_the_fold_of_serving_makes(history):
    n = len(history)
    rows = empty_rows(len(history.users))
    features, dt_s, status = np.empty((n, N_FEATURES), np.float32), np.empty(n, np.float32), np.empty(n, np.uint8)
    rng, start = np.random.default_rng(0), 0
    while start < n:  # micro-batches of random sizes, as Kafka hands them out
        part = slice(start, min(n, start + int(rng.integers(1, 500))))
        slots = history.user[part].astype(np.int64)
        fold(rows, slots, history.events[part], fold_params(FOLD), features[part], dt_s[part], status[part])
        start = part.stop
    replayed = replay(history, FOLD, "cpu")
    assert replayed.rows.tobytes() == rows.tobytes()
    assert replayed.features_MF.tobytes() == features.tobytes()
    assert (replayed.rows["applied_offset"] >= 0).all()


def test_a_replay_with_a_bound_keeps_the_latest_events_and_the_same_rows(history):
    full, some = replay(history, FOLD, "cpu"), replay(history, FOLD, "cpu", max_events=1000, batch=300)
    assert some.rows.tobytes() == full.rows.tobytes()
    assert 1000 <= len(some.index_M) <= 1010  # ties of the oldest instant
    assert history.events["ts"][some.index_M].min() > np.delete(history.events["ts"], some.index_M).max()
    assert some.features_MF.tobytes() == full.features_MF[some.index_M].tobytes()


def test_a_share_of_a_bounded_replay_is_all_that_is_older_of_always_the_same_users(history):
    full = replay(history, FOLD, "cpu")
    mixed = replay(history, FOLD, "cpu", max_events=4000, older_share=0.25)
    ts, user = history.events["ts"], history.user
    latest = ts >= np.sort(ts)[-3000]
    kept = np.zeros(len(history), bool)
    kept[mixed.index_M] = True
    assert kept[latest].all() and 3500 < kept.sum() <= 4010
    old = set(user[kept & ~latest].tolist())
    assert 10 < len(old) < 100 and all(kept[user == u].all() for u in old)
    assert mixed.features_MF.tobytes() == full.features_MF[mixed.index_M].tobytes()
    less = replay(history, FOLD, "cpu", until_ms=int(np.sort(ts)[-500]), max_events=4000, older_share=0.25)
    again = set(user[np.setdiff1d(less.index_M, np.flatnonzero(latest))].tolist())
    assert len(old & again) > 0.6 * len(old)
    none = replay(history, FOLD, "cpu", max_events=4000)
    assert ts[none.index_M].min() > np.delete(ts, none.index_M).max()


def test_nothing_after_the_gate_is_known_in_training(history, labels, replayed, config, gate, examples):
    later = gate.after(history)
    rng = np.random.default_rng(0)
    changed = dataclasses.replace(history, events=history.events.copy())
    for column, top in (("kind", 7), ("category", 1000), ("item", 1000)):
        changed.events[column][later] = rng.integers(0, top, later.sum())
    again = make_examples(
        changed,
        make_labels(changed, FOLD, HORIZONS),
        replay(changed, FOLD, "cpu", until_ms=gate.user_U),
        config,
        HORIZONS,
        gate,
    )
    np.testing.assert_array_equal(again.learn_MT, examples.learn_MT)
    np.testing.assert_array_equal(again.check_MT, examples.check_MT)
    known = examples.learn_MT | examples.check_MT
    np.testing.assert_array_equal(again.y_MT * known, examples.y_MT * known)
    np.testing.assert_array_equal(again.next_M, examples.next_M)
    for own, other in zip(again.columns, examples.columns, strict=True):
        assert torch.equal(own, other)


def test_between_what_trains_and_what_judges_lies_the_horizon(history, labels, gate, examples):
    later = later_anchors(history, labels, gate)
    assert later.sum(axis=0).min() > 100
    for head, horizon in enumerate(horizons_ms(HORIZONS)):
        known = (examples.learn_MT | examples.check_MT)[:, head] if head < 3 else examples.next_M != 0
        assert known.sum() > 500
        for platform in range(len(history.platforms)):
            judged = history.events["ts"][later[:, head] & (history.platform == platform)]
            learned_of = examples.ts_M[known & (examples.platform_M == platform + 1)]
            assert not len(judged) or judged.min() - learned_of.max(initial=0) > horizon


def later_anchors(history, labels, gate) -> np.ndarray:
    return matured(labels, history.events["ts"], HORIZONS) & gate.after(history)[:, None]


def test_examples_are_the_folded_events_in_order(history, replayed, examples):
    assert len(examples) == (replayed.status_M == FOLDED).sum()
    assert (np.diff(examples.user_M) >= 0).all()
    begins = np.r_[True, np.diff(examples.user_M) > 0]
    assert (examples.starts_M[begins]).all() and not examples.starts_M[~begins].any()
    till = examples.platform_M == 1 + history.platforms.index("till")
    assert not (examples.learn_MT | examples.check_MT)[till, HEADS.index("click")].any()


def test_the_gate_starts_where_the_longest_horizon_leaves_room(history, labels):
    def expected(platform: int, horizon_ms: int, skipped: int = 0):
        own = history.platform == platform
        ts = np.sort(history.events["ts"][own])
        first, end = ts[max(len(ts) // 1000, skipped)], labels.watermark_N[own].max()
        return first + round(0.8 * (end - horizon_ms - first))

    start = gate_start(history, labels, HORIZONS, 0.2)
    assert start.platform_P.tolist() == [expected(0, 7 * DAY_MS), expected(1, 7 * DAY_MS)]
    short = HorizonsConfig(return_s=25 * 86400.0)
    assert gate_start(history, labels, short, 0.2).platform_P[0] == expected(0, DAY_MS)
    endless = HorizonsConfig(click_s=4e6, purchase_s=4e6, return_s=4e6)
    assert gate_start(history, labels, endless, 0.2) is None
    latest = len(history) * 2 // 3
    oldest = np.sort(history.events["ts"])[-latest]
    some = gate_start(history, labels, HORIZONS, 0.2, max_events=latest)
    for platform in (0, 1):
        skipped = (history.events["ts"][history.platform == platform] < oldest).sum()
        assert some.platform_P[platform] == expected(platform, 7 * DAY_MS, skipped)


@pytest.fixture(scope="module")
def two_spans(tmp_path_factory):
    """The shops' thirty days, and of their users' other accounts a third shop that opened five days ago, the fourth of
    which is an hour old; a tenth of the users was seen on the third and the first."""
    store = HistoryStore(str(tmp_path_factory.mktemp("spans")))
    old = make_canonical(200)
    new = make_canonical(120, days=5, seed=3, start_ms=START_MS + 25 * DAY_MS)
    for event in new:
        event.platform = "annexe"
        if int(event.user[2:]) % 10:
            event.user = f"k2{event.user[2:]}"
        event.event_id += "-annexe"
    hour = [msgspec.structs.replace(e, platform="booth", user=f"k3{e.user[2:]}", event_id=e.event_id + "-b") for e in new]
    hour = [event for event in hour if event.ts >= START_MS + 30 * DAY_MS - HOUR_MS]
    store_events(store, sorted([*old, *new, *hour], key=lambda event: event.ts))
    return store.read()


def test_each_platform_has_a_gate_of_its_own_and_a_user_the_least_of_his(two_spans):
    labels = make_labels(two_spans, FOLD, HORIZONS)
    start = gate_start(two_spans, labels, HORIZONS, 0.2)
    gates = dict(zip(two_spans.platforms, start.platform_P.tolist(), strict=True))
    assert gates["annexe"] > START_MS + 25 * DAY_MS and gates["shop"] < gates["annexe"]
    assert start.has_P.tolist() == [True, False, True, True] and two_spans.platforms[1] == "booth"
    assert start.last_ms == gates["annexe"]
    seen = [set(two_spans.platform[two_spans.user == u].tolist()) for u in range(len(two_spans.users))]
    both = [u for u, platforms in enumerate(seen) if {0, 2} <= platforms]
    alone = [u for u, platforms in enumerate(seen) if platforms == {0}]
    assert both and (start.user_U[both] == gates["shop"]).all() and (start.user_U[alone] == gates["annexe"]).all()
    booth = [u for u, platforms in enumerate(seen) if platforms == {1}]
    assert booth and (start.user_U[booth] < 0).all()
    assert not start.after(two_spans)[two_spans.platform == 1].any()


def test_nothing_is_learned_of_a_user_or_a_platform_later_than_what_is_judged_of_it(two_spans):
    labels = make_labels(two_spans, FOLD, HORIZONS)
    start = gate_start(two_spans, labels, HORIZONS, 0.2)
    config = StudentConfig.of("cpu", N_FEATURES, two_spans.platforms, heads_of(two_spans, None, start))
    replayed = replay(two_spans, FOLD, "cpu", until_ms=start.user_U)
    examples = make_examples(two_spans, labels, replayed, config, HORIZONS, start)
    judged = start.after(two_spans) & matured(labels, two_spans.events["ts"], HORIZONS)[:, :3].any(axis=1)
    assert {two_spans.platforms[p] for p in np.unique(two_spans.platform[judged])} == {"annexe", "shop", "till"}
    for head, horizon in enumerate(horizons_ms(HORIZONS)[:3]):
        known = (examples.learn_MT | examples.check_MT)[:, head]
        assert known.sum() > 100
        known_until = np.zeros(len(two_spans.users), np.int64)
        np.maximum.at(known_until, examples.user_M[known], examples.ts_M[known] + horizon)
        assert (two_spans.events["ts"][judged] > known_until[two_spans.user[judged]]).all()  # of a user
        for platform in range(4):  # of a platform
            of, judged_of = known & (examples.platform_M == platform + 1), judged & (two_spans.platform == platform)
            if of.any() and judged_of.any():
                assert (examples.ts_M[of] + horizon).max() <= two_spans.events["ts"][judged_of].min()
    booth = examples.platform_M == 2
    assert not (examples.learn_MT | examples.check_MT)[booth].any() and not examples.learn_next_M[booth].any()


def test_a_platform_that_was_not_learned_answers_by_what_is_shared_and_does_not_gate(examples, config, history, labels):
    till = examples.platform_M == 1 + history.platforms.index("till")
    deaf = dataclasses.replace(examples, learn_MT=examples.learn_MT & ~till[:, None])
    deaf.check_MT = examples.check_MT & ~till[:, None]
    known = learned(deaf, 2)
    assert known.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    trained = train(deaf, config, history.categories, FOLD, OPTIONS, prior_logits_3=PRIOR)
    calibration = trained.model.calibration_P32
    np.testing.assert_array_equal(calibration[2], calibration[0])
    assert not np.array_equal(calibration[1], calibration[0])
    assert not trained.model.student.head_weight_POK[2, :3].any() and not trained.model.student.head_bias_PO[2, :3].any()
    gate = gate_start(history, labels, HORIZONS, 0.2)
    rows = replay(history, FOLD, "cpu", until_ms=gate.user_U).rows
    args = (history, labels, HORIZONS, rows, gate)
    prior = load_prior(FOLD)
    for incumbent, gates in ((prior, False), (trained.model, True)):  # the second knows the platform
        compared = compare(trained.model, incumbent, *args, learned_R3=known)
        of_till = compared.paired.platform_N == history.platforms.index("till")
        assert of_till.any() == gates and ("till", "return") in compared.candidate.cells
        assert (~of_till).sum() > 1000


def test_heads_come_from_the_platform_files_and_else_from_the_events(history, gate):
    derived = heads_of(history, None, gate)
    assert derived == {"shop": HEADS, "till": ("purchase", "return")}
    assert heads_of(history, {"shop": ("return",), "elsewhere": HEADS}, gate) == {
        "shop": ("return",),
        "till": ("purchase", "return"),
    }
    nothing = gate._replace(platform_P=np.full(2, START_MS - 1))
    assert heads_of(history, None, nothing)["shop"] == ("purchase", "return")


def test_the_student_beats_the_base_rates_on_later_events(history, labels, replayed, gate, examples, major):
    report = evaluate(major.model, history, labels, HORIZONS, replayed.rows, gate)
    base = evaluate(base_rates(examples, major.model.config), history, labels, HORIZONS, replayed.rows, gate)
    assert major.kind == "major" and report.finite and base.finite
    cells = [key for key in report.cells if base.cells[key].n >= LEAST_CELL]
    assert [key for key in cells if key[0] == "shop"] == [("shop", "click"), ("shop", "purchase"), ("shop", "return")]
    assert ("till", "click") not in report.cells and ("till", "return") in report.cells
    assert np.mean([report.cells[key].log_loss - base.cells[key].log_loss for key in cells]) < -0.01
    assert report.cells["shop", "purchase"].auc > 0.56 and report.cells["shop", "return"].auc > 0.6
    assert report.categories["shop"].hit_rate_5 > 0.5 and "till" not in report.categories
    assert report.as_dict()["shop"]["category"]["n"] == report.categories["shop"].n


def base_rates(examples, config) -> Model:
    """The best constants by platform and head."""
    calibration = identity_calibration(len(config.platforms))
    for row in range(1, len(calibration)):
        for head in range(3):
            y = examples.y_MT[examples.learn_MT[:, head] & (examples.platform_M == row), head]
            p = (y.sum() + 1) / (len(y) + 2)
            calibration[row, head] = 0.0, np.log(p / (1 - p))
    return Model("base", config, None, None, calibration, FOLD)


def test_the_same_seed_gives_the_same_model_and_held_out_users_do_not_train_it(examples, config, history, major):
    options = OPTIONS._replace(epochs=1)
    one = train(examples, config, history.categories, FOLD, options, prior_logits_3=PRIOR)
    two = train(examples, config, history.categories, FOLD, options, prior_logits_3=PRIOR)
    assert tensors(one.model) == tensors(two.model)
    np.testing.assert_array_equal(one.model.calibration_P32, two.model.calibration_P32)
    flipped = dataclasses.replace(examples, y_MT=examples.y_MT.copy())
    checks = examples.check_MT[:, 0]
    flipped.y_MT[checks, 0] = 1 - flipped.y_MT[checks, 0]
    assert 0.01 < checks.mean() < 0.1
    assert not set(examples.user_M[checks]) & set(examples.user_M[examples.learn_MT.any(axis=1)])
    other = train(flipped, config, history.categories, FOLD, options, prior_logits_3=PRIOR)
    assert tensors(other.model) == tensors(one.model)
    assert not np.array_equal(one.model.calibration_P32[:, 0], other.model.calibration_P32[:, 0])
    np.testing.assert_array_equal(one.model.calibration_P32[:, 1:], other.model.calibration_P32[:, 1:])


def tensors(model: Model) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.student.state_dict().items()}


def test_a_minor_model_keeps_all_but_the_heads_bit_for_bit(examples, config, history, major):
    minor = train(examples, config, history.categories, FOLD, OPTIONS, prior_logits_3=PRIOR, incumbent=major.model)
    old, new = tensors(major.model), tensors(minor.model)
    assert minor.kind == "minor" and minor.model.recurrence_id == major.model.recurrence_id
    heads = {"head_weight_POK", "head_bias_PO"}
    assert {name for name in old if old[name] != new[name]} == heads
    assert tensors(major.model) == old  # the incumbent itself is left alone


def test_the_gates_hear_the_features_alone_and_the_body_hears_nothing_of_them(examples, config, history, major):
    width = config.head_width
    assert not major.model.student.head_weight_POK[:, N_LOGITS:, :width].any()
    assert major.model.student.head_weight_POK[:, N_LOGITS:, width:].any()
    unlabelled = dataclasses.replace(examples, learn_MT=np.zeros_like(examples.learn_MT))
    trained = train(unlabelled, config, history.categories, FOLD, OPTIONS, prior_logits_3=PRIOR).model.student
    torch.manual_seed(OPTIONS.seed)
    fresh = Student(config, OPTIONS.dropout)
    assert trained.head_weight_POK[:, N_LOGITS:].any()
    assert torch.equal(trained.log_tau_H, fresh.log_tau_H) and torch.equal(trained.recur.bias, fresh.recur.bias)
    nothing = dataclasses.replace(unlabelled, learn_next_M=np.zeros_like(examples.learn_next_M))
    unmoved = train(nothing, config, history.categories, FOLD, OPTIONS, prior_logits_3=PRIOR).model.student
    assert not unmoved.head_weight_POK[:, N_LOGITS:].any()


def test_a_minor_of_a_model_whose_gates_heard_more_silences_that(examples, config, history, major):
    older = copy.deepcopy(major.model)
    with torch.no_grad():
        older.student.head_weight_POK[:, N_LOGITS:, : config.head_width] = 0.1
    minor = train(examples, config, history.categories, FOLD, OPTIONS, prior_logits_3=PRIOR, incumbent=older)
    assert not minor.model.student.head_weight_POK[:, N_LOGITS:, : config.head_width].any()
    assert older.student.head_weight_POK[:, N_LOGITS:, : config.head_width].all()


def test_a_head_without_matured_labels_says_what_the_prior_says(examples, config, history):
    young = dataclasses.replace(examples, learn_MT=examples.learn_MT.copy(), check_MT=examples.check_MT.copy())
    young.learn_MT[:, 2] = young.check_MT[:, 2] = False
    options = OPTIONS._replace(epochs=1)
    model = train(young, config, history.categories, FOLD, options, prior_logits_3=PRIOR).model
    np.testing.assert_allclose(model.calibration_P32[:, 2], np.tile([0.0, PRIOR[2]], (3, 1)), rtol=1e-6)
    assert (model.calibration_P32[:, 0, 0] > 0).all()


def test_calibration_finds_the_affine_map_and_stays_put_without_data():
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 40_000)
    y = (rng.random(len(logit)) < 1 / (1 + np.exp(-(0.6 * logit - 1.0)))).astype(np.float32)
    slope, offset = affine(logit, y, (1.0, 0.0))
    assert abs(slope - 0.6) < 0.05 and abs(offset + 1.0) < 0.05
    assert affine(logit[:0], y[:0], (0.8, 0.3)) == (0.8, 0.3)
    slope, offset = affine(np.full(5, 3.0), np.zeros(5), (1.0, 0.0))  # five events move it, but not far
    assert 0.5 < slope < 1.0 and -1.5 < offset < 0.0
    assert affine(-logit, y, (1.0, 0.0))[0] == 0.0  # an inverted ranking is not turned round


def test_nobodys_own_future_is_in_the_table_that_his_gates_learn_from(examples, config, history):
    table, q_MG = category_targets(examples, history.categories, len(config.platforms))
    markov = 4
    lone = dataclasses.replace(examples, next_M=np.where(examples.user_M == examples.user_M[0], examples.next_M, 0))
    _, alone_MG = category_targets(lone, history.categories, len(config.platforms))
    assert q_MG[:, markov].max() > 0.02 and q_MG.sum(axis=1)[examples.next_M == 0].max() == 0
    assert len(table.names) == 30
    # Only one user has pairs: the table of the other half is empty, and everything is *other*.
    own = lone.next_M != 0
    assert own.any()
    np.testing.assert_allclose(alone_MG[own], 1.0, rtol=1e-5)


def test_both_models_are_compared_on_the_same_events(history, labels, replayed, gate, examples, major):
    base = base_rates(examples, major.model.config)
    args = (history, labels, HORIZONS, replayed.rows, gate)
    compared = compare(major.model, base, *args)
    for report, model in ((compared.candidate, major.model), (compared.incumbent, base)):
        alone = evaluate(model, *args)
        assert report.cells == alone.cells and report.shares == alone.shares
    paired = compared.paired
    for (platform, head), cell in compared.candidate.cells.items():
        own = (paired.platform_N == history.platforms.index(platform)) & paired.known_N3[:, HEADS.index(head)]
        assert own.sum() == cell.n and paired.y_N3[own, HEADS.index(head)].mean() == pytest.approx(cell.base_rate)
        assert np.isfinite(paired.candidate_N3[own, HEADS.index(head)]).all()
    assert paired.known_N3.any(axis=1).all()


def test_what_is_published_says_the_line_of_what_was_judged(history, labels, replayed, gate, examples, major):
    compared = compare(major.model, base_rates(examples, major.model.config), history, labels, HORIZONS, replayed.rows, gate)
    served = recalibrate(major.model, history, labels, HORIZONS, compared)
    again = predict(served.model, history, replayed.rows, gate)
    report = evaluate(served.model, history, labels, HORIZONS, replayed.rows, gate)
    assert {platform for platform, _ in served.lines} == {"shop", "till"} and served.shares == report.shares
    platform_N = history.platform[again.at]
    for (platform, head), line in served.lines.items():
        own, column = platform_N == history.platforms.index(platform), HEADS.index(head)
        before_N, now_N = (np.log(p / (1 - p)) for p in (compared.judged.p_N3[own, column], again.p_N3[own, column]))
        np.testing.assert_allclose(now_N, line.slope * before_N + line.offset, atol=2e-3)
        assert report.cells[platform, head].log_loss <= compared.candidate.cells[platform, head].log_loss
        assert report.cells[platform, head].auc == pytest.approx(compared.candidate.cells[platform, head].auc, abs=1e-4)


def test_activity_is_how_many_events_the_user_has_had(history, replayed, gate, major):
    judged = predict(major.model, history, replayed.rows, gate)
    rank_N = np.zeros(len(history), np.int64)
    order = np.argsort(history.user, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(history.user[order])) + 1, len(order)]
    rank_N[order] = np.concatenate([np.arange(n) for n in np.diff(starts)]) + 1
    assert (judged.status == FOLDED).all()
    np.testing.assert_array_equal(judged.activity_N, rank_N[judged.at])


def test_judging_does_not_depend_on_the_batches_and_leaves_the_rows(history, replayed, gate, major, monkeypatch):
    rows = replayed.rows.tobytes()
    one = predict(major.model, history, replayed.rows, gate)
    monkeypatch.setattr(judge, "BATCH", 97)
    two = predict(major.model, history, replayed.rows, gate)
    np.testing.assert_allclose(one.p_N3, two.p_N3, atol=1e-5)
    np.testing.assert_allclose(one.category_p_N5, two.category_p_N5, atol=1e-5)
    np.testing.assert_array_equal(one.status, two.status)
    assert replayed.rows.tobytes() == rows


def test_judging_is_serving(history, replayed, gate, major):
    """One user's events after the gate through a Scorer of our own, one by one."""
    judged = predict(major.model, history, replayed.rows, gate)
    user = np.bincount(history.user[judged.at]).argmax()
    own = judged.at[history.user[judged.at] == user][:20]
    scorer, rows = Scorer(major.model, "cpu"), replayed.rows.copy()
    for i in own:
        scores, _ = scorer.run(rows, history.user[i : i + 1].astype(np.int64), history.events[i : i + 1])
        np.testing.assert_allclose(scores.p_N3[0], judged.p_N3[judged.at == i][0], atol=1e-5)


def test_before_cuts_every_user_at_his_first_later_event(history, gate):
    until_U = gate.user_U + np.arange(len(history.users)) * HOUR_MS
    own = before(history, until_U)
    assert (history.events["ts"][own] <= until_U[history.user[own]]).all()
    for user in range(0, len(history.users), 37):
        kept = own[history.user == user]
        assert (np.diff(kept.astype(int)) <= 0).all()
        late = np.flatnonzero(history.events["ts"][history.user == user] > until_U[user])
        assert kept.sum() == np.r_[late, len(kept)][0]
    one = int(gate.platform_P[0])
    np.testing.assert_array_equal(before(history, one), before(history, np.full(len(history.users), one)))


def test_category_figures_of_a_known_case():
    next_N = np.array([7, 8, 9], np.uint32)
    named = np.array([[7, 1, 0, 0, 0], [1, 2, 3, 4, 5], [1, 9, 2, 0, 0]], np.uint32)
    p = np.array([[0.5, 0.1, 0, 0, 0], [0.2, 0.1, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0, 0]], np.float32)
    cell = judge._category_cell(next_N, named, p, 9)
    assert cell.n == 3 and cell.hit_rate_5 == pytest.approx(2 / 3)
    assert cell.nll == pytest.approx(-np.mean(np.log([0.5, 0.4 / 4, 0.2])), rel=1e-5)


def test_a_calibration_moves_less_on_few_users_than_on_many():
    """The same events, of a dozen users who each lean one way, or each of a user of his own."""
    rng = np.random.default_rng(0)
    of_few, z = np.repeat(np.arange(12), 200), rng.normal(size=2400)
    y = (rng.random(2400) < 1 / (1 + np.exp(-(z - 1 + rng.normal(0, 1, 12)[of_few])))).astype(float)
    few, many = affine(z, y, (1.0, 0.0), of_few), affine(z, y, (1.0, 0.0), np.arange(2400))
    error = y - 1 / (1 + np.exp(-z))
    assert design_effect(error, of_few) > 20 and design_effect(error, np.arange(2400)) == 1.0
    assert abs(few[1]) < 0.6 * abs(many[1]) and 0.4 < -many[1] < 1.6
    assert offset(np.empty(0), np.empty(0), np.empty(0)) == 0.0
    exact = offset(z, y, np.arange(2400))
    said = (1 / (1 + np.exp(-z - exact))).mean()
    assert said == pytest.approx(y.mean(), abs=0.01) and abs(offset(z, y, of_few)) < abs(exact)
    assert affine(np.empty(0), np.empty(0), (1.2, 0.3), np.empty(0, int)) == pytest.approx((1.2, 0.3))


def test_a_check_stops_the_work(examples, config, history):
    class Stop(Exception):
        pass

    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    with pytest.raises(Stop):
        train(examples, config, history.categories, FOLD, OPTIONS, prior_logits_3=PRIOR, check=check)
    assert len(calls) == 3
