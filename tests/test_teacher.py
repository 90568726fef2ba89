"""The teacher: cross-fitting knows nobody's own label, members that add nothing are dropped, and the student hears it."""

import dataclasses

import numpy as np
import pytest
import torch
from synthetic_history import examples_until, make_config, make_history
from test_training import FOLD, PRIOR

from trainer import boosting, metrics
from trainer.fit import Schedule, logits, of_users_with
from trainer.teacher import Member, choose, mean_of, recurrence, teach
from trainer.train import train

pytestmark = pytest.mark.usefixtures("one_thread", "one_copy")


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return make_history(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="module")
def config(history):
    return make_config(history)


@pytest.fixture(scope="module")
def examples(history, config):
    return examples_until(history, config)


@pytest.fixture(scope="module")
def teaching(examples):
    return teach(examples)


def test_a_cross_fitted_model_cannot_say_what_only_the_label_tells():
    """Noise features and random labels: whoever has seen the label fits it; out of fold there is nothing to know."""
    rng = np.random.default_rng(0)
    x, user = rng.normal(size=(2000, 8)).astype(np.float32), np.repeat(np.arange(200), 10)
    x[:, 0] = user  # a user is recognised by his feature
    y = rng.integers(0, 2, 200)[user].astype(np.float32)
    learn = np.ones(2000, bool)
    for fit in (boosting.fit_boosting, boosting.fit_randomised, boosting.fit_logistic):
        assert 0.35 < metrics.auc(y, boosting.cross_fit(fit, x, y, learn, user).logit_M) < 0.65
    assert metrics.auc(y, boosting.fit_boosting(x, y)(x)) > 0.8


def test_cross_fitting_without_both_outcomes_says_so():
    x, y = np.zeros((50, 3), np.float32), np.ones(50)
    assert boosting.cross_fit(boosting.fit_logistic, x, y, np.ones(50, bool), np.arange(50)) is None


def test_tuning_takes_the_trial_that_does_best_on_validation():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1500, 6)).astype(np.float32)
    y = (rng.random(1500) < 1 / (1 + np.exp(-2 * x[:, 0] * x[:, 1]))).astype(np.float32)
    predict = boosting.fit_tuned(x[:800], y[:800], x[800:1100], y[800:1100], trials=3)
    assert metrics.auc(y[1100:], predict(x[1100:])) > 0.65
    assert metrics.auc(y[1100:], boosting.fit_logistic(x[:800], y[:800])(x[1100:])) < 0.6


def test_the_teacher_beats_the_base_rates_where_it_speaks(examples, teaching):
    ours, base = [], []
    for task in range(3):
        shop = examples.platform_M == 1
        check, learn = shop & examples.check_MT[:, task], shop & examples.learn_MT[:, task]
        z, y = teaching.logits_MT[check, task], examples.y_MT[check, task]
        ours.append(metrics.log_loss(y, 1 / (1 + np.exp(-z))))
        base.append(metrics.log_loss(y, np.full(len(y), examples.y_MT[learn, task].mean())))
    assert np.mean(ours) < np.mean(base) - 0.01


def test_a_platform_without_labels_of_a_task_is_not_taught(examples, history, teaching):
    till = examples.platform_M == 1 + history.platforms.index("till")
    assert np.isnan(teaching.logits_MT[till, 0]).all() and np.isfinite(teaching.logits_MT[till, 1]).all()


def test_a_member_that_adds_nothing_is_dropped_and_the_reason_has_the_numbers(examples):
    rng = np.random.default_rng(0)
    good = np.where(examples.y_MT > 0, 1.0, -1.0).astype(np.float32)
    members = {"good": good, "noise": rng.normal(0, 3, good.shape).astype(np.float32), "same": good * 1.1}
    kept, reasons = choose(examples, members)
    assert set(kept) == set(np.unique(examples.platform_M))
    assert set(reasons) == {(row, name) for row in kept for name in members}
    for row, names in kept.items():
        assert "noise" not in names and reasons[row, "noise"].startswith("dropped: log-loss 0.")
    blind = dataclasses.replace(examples, check_MT=np.zeros_like(examples.check_MT))
    assert choose(blind, members)[0] == dict.fromkeys(kept, tuple(members))


def test_with_a_margin_only_what_hurts_beyond_chance_is_dropped(examples):
    rng = np.random.default_rng(0)
    good = np.where(examples.y_MT > 0, 1.0, -1.0) + rng.normal(0, 2, examples.y_MT.shape)
    members = {"good": good, "twin": good + rng.normal(0, 0.1, good.shape), "noise": rng.normal(0, 6, good.shape)}
    members = {name: logits.astype(np.float32) for name, logits in members.items()}
    without, with_margin = (choose(examples, members, margin)[0] for margin in (0.0, 1.0))
    assert without == {1: ("good",), 2: ("twin",)} and with_margin[1] == ("good", "twin")
    assert with_margin[2] == tuple(members)  # five users with 57 labels cannot tell
    assert all(names == tuple(members) for names in choose(examples, members, 1e3)[0].values())


def test_each_platform_keeps_the_members_that_help_there_whatever_their_scale(examples):
    rng = np.random.default_rng(0)
    shop_M1 = (examples.platform_M == 1)[:, None]
    good = np.where(examples.y_MT > 0, 1.0, -1.0) + rng.normal(0, 1, examples.y_MT.shape)
    noise = rng.normal(0, 3, good.shape)
    members = {"here": np.where(shop_M1, 9 * good, noise), "there": np.where(shop_M1, noise, good)}
    kept, _ = choose(examples, {name: logits.astype(np.float32) for name, logits in members.items()})
    assert kept == {1: ("here",), 2: ("there",)}
    mean = mean_of(members, kept, examples.platform_M)
    np.testing.assert_allclose(mean, np.where(shop_M1, members["here"], members["there"]), rtol=1e-5)


def test_a_further_member_hears_the_offset_and_counts_where_it_helps(examples):
    def oracle(examples, offset_MT):
        assert np.isfinite(offset_MT[examples.learn_MT]).all()
        return Member(
            np.where(examples.y_MT > 0, 4.0, -4.0), lambda later, wanted_M, offset_LT: offset_LT[wanted_M] + 1.0, True
        )

    teaching = teach(examples, more={"oracle": oracle})
    assert set(teaching.kept.values()) == {("oracle",)}
    assert np.isnan(teaching.members_MT["oracle"]).any()  # it does not speak where nothing is taught
    wanted = np.arange(len(examples)) % 5 == 0
    said = teaching.answer(examples, wanted)
    first = [teaching.members_MT[name][wanted] for name in ("boosting", "logistic")]
    assert np.isfinite(said).any() and (np.isnan(said) == np.isnan(first[0])).all()


def test_own_rates_are_of_labels_that_had_matured_and_trees_look_at_them(examples, teaching):
    assert examples.own_MR.shape == (len(examples), 6) and np.isfinite(examples.own_MR).all()
    first = np.r_[True, examples.user_M[1:] != examples.user_M[:-1]]
    np.testing.assert_array_equal(examples.own_MR[first], np.broadcast_to([0.5] * 3 + [0.0] * 3, (first.sum(), 6)))
    assert (examples.own_MR[~first, 3:] > 0).any()
    blind = teach(dataclasses.replace(examples, own_MR=None))
    assert list(blind.members_MT) == list(teaching.members_MT) == ["boosting", "randomised", "logistic"]
    np.testing.assert_array_equal(blind.members_MT["logistic"], teaching.members_MT["logistic"])
    for name in ("boosting", "randomised"):
        assert np.nanmax(np.abs(blind.members_MT[name] - teaching.members_MT[name])) > 0.01


def test_of_few_events_more_copies_are_averaged(monkeypatch):
    monkeypatch.setattr(boosting, "MOST_BAGS", 4)
    assert [len(boosting.bag(n)) for n in (0, 20_000, 60_000, 10**7)] == [4, 4, 3, 2]


def test_of_few_events_there_are_more_folds():
    assert [boosting.folds(n) for n in (0, 20_000, 40_000, 10**7)] == [10, 10, 5, 4]
    rng = np.random.default_rng(0)
    x, y, user = rng.normal(size=(600, 3)).astype(np.float32), rng.random(600) < 0.5, np.arange(600) // 10
    seen = []

    def fit(features, labels, **_):
        seen.append(len(labels))
        return lambda features: np.zeros(len(features), np.float32)

    boosting.cross_fit(fit, x, y.astype(np.float32), np.ones(600, bool), user)
    assert seen[0] == 600 and len(seen) == 11 and sum(600 - n for n in seen[1:]) == 600


def test_the_recurrence_has_not_seen_the_users_of_whom_it_speaks(examples, config):
    """Labels that only the user's number tells, which is among the features: who has seen the user knows them."""
    rng = np.random.default_rng(0)
    secret = rng.integers(0, 2, examples.user_M.max() + 1)[examples.user_M].astype(np.float32)
    features = examples.columns.features_NF.clone()
    features[:, :16] = torch.from_numpy(rng.normal(size=(examples.user_M.max() + 1, 16))[examples.user_M]).float()
    marked = dataclasses.replace(
        examples,
        columns=examples.columns._replace(features_NF=features),
        y_MT=np.repeat(secret[:, None], 3, axis=1),
        check_MT=np.zeros_like(examples.check_MT),
    )
    schedule = Schedule(epochs=8, batch_events=512, rate=1e-2, dropout=0.0)
    member = recurrence(config, schedule)(marked, np.zeros_like(marked.y_MT))
    learned = marked.learn_MT.all(axis=1)
    assert 0.35 < metrics.auc(secret[learned], member.logits_MT[learned, 2]) < 0.65
    wanted = learned & (np.arange(len(marked)) % 3 == 0)
    said = member.answer(marked, wanted, np.empty(0))
    assert said.shape == (wanted.sum(), 3) and metrics.auc(secret[wanted], said[:, 2]) > 0.8
    unlearned = ~marked.learn_MT.any(axis=1)
    np.testing.assert_allclose(
        member.answer(marked, unlearned, np.empty(0)), member.logits_MT[unlearned], rtol=1e-4, atol=1e-5
    )


def test_members_answer_later_events_as_they_would_have_then(examples, teaching):
    """Of events that nobody learned from, cross-fitting says what the members themselves say."""
    unlearned = ~examples.learn_MT.any(axis=1)
    assert unlearned.sum() > 500
    np.testing.assert_allclose(teaching.answer(examples, unlearned), teaching.logits_MT[unlearned], rtol=1e-5)
    learned = examples.learn_MT.all(axis=1)
    known = teaching.answer(examples, learned)
    y = examples.y_MT[learned]
    assert metrics.auc(y[:, 2], known[:, 2]) > metrics.auc(y[:, 2], teaching.logits_MT[learned][:, 2]) + 0.01


@pytest.mark.parametrize("way", ["serving", "auxiliary"])
def test_the_student_learns_what_the_teacher_says(examples, config, history, way):
    """A teacher that knows a truth which the labels do not show: users by number."""
    secret = np.where(examples.columns.features_NF.numpy()[:, 5] > 0.5, 3.0, -3.0)
    soft_MT = np.repeat(secret[:, None], 3, axis=1).astype(np.float32)
    schedule = Schedule(epochs=2, soft_weight=1.0, way=way)
    trained = train(examples, config, history.categories, FOLD, schedule, prior_logits_3=PRIOR, soft_MT=soft_MT)
    at = of_users_with(examples, examples.check_MT)
    agreement = metrics.auc((secret > 0)[at], logits(trained.network, examples, at)[:, 2])
    assert agreement > 0.95 if way == "serving" else agreement < 0.9


def test_events_without_labels_are_heard_too(examples, config, history):
    nothing = dataclasses.replace(
        examples, learn_MT=np.zeros_like(examples.learn_MT), learn_next_M=np.zeros_like(examples.learn_next_M)
    )
    soft_MT = np.full(examples.y_MT.shape, 2.0, np.float32)
    schedule = Schedule(epochs=3, soft_weight=0.9)
    trained = train(nothing, config, history.categories, FOLD, schedule, prior_logits_3=PRIOR, soft_MT=soft_MT)
    assert logits(trained.network, examples, np.arange(200)).mean() > 1.0


def test_shuffled_teaching_makes_a_worse_student(examples, config, history, teaching):
    """If it did not, distillation would be doing something else than teaching."""
    order = np.random.default_rng(0).permutation(len(examples))
    losses = []
    for soft_MT in (teaching.logits_MT, teaching.logits_MT[order]):
        schedule = Schedule(epochs=4, soft_weight=0.9, patience=9)
        trained = train(examples, config, history.categories, FOLD, schedule, prior_logits_3=PRIOR, soft_MT=soft_MT)
        losses.append(trained.fitted.check_loss)
    assert losses[0] < losses[1]
