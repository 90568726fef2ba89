"""Groups of examples and their weights; and that a weight is heard by the loss."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from synthetic_history import make_history

from models.config import FoldConfig, HorizonsConfig
from models.fold import FEATURE_NAMES, N_FEATURES
from models.student import Student, StudentConfig
from trainer import fit, groups
from trainer.examples import Examples, gate_start, heads_of, make_examples, replay
from trainer.fit import Network, Schedule
from trainer.labels import make_labels
from trainer.train import train

FOLD, HORIZONS = FoldConfig(), HorizonsConfig()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return make_history(tmp_path_factory.mktemp("history"), 150)


@pytest.fixture(scope="module")
def config(history) -> StudentConfig:
    gate = gate_start(history, make_labels(history, FOLD, HORIZONS), HORIZONS, 0.2)
    return StudentConfig.of("cpu", N_FEATURES, history.platforms, heads_of(history, None, gate))


@pytest.fixture(scope="module")
def examples(history, config) -> Examples:
    labels = make_labels(history, FOLD, HORIZONS)
    gate = gate_start(history, labels, HORIZONS, 0.1)
    return make_examples(history, labels, replay(history, FOLD, "cpu", until_ms=gate.user_U), config, HORIZONS, gate)


@pytest.fixture(scope="module")
def found(examples) -> groups.Groups:
    return groups.groups_of(examples)


def means(examples: Examples, weight_M: np.ndarray) -> list[float]:
    learned_M = examples.learn_MT.any(axis=1)
    return [weight_M[learned_M & (examples.platform_M == row)].mean() for row in np.unique(examples.platform_M)]


def test_groups_say_how_active_a_user_was_and_what_he_pays(examples, found):
    features_MF = examples.columns.features_NF.numpy()
    n_M = np.rint(np.expm1(features_MF[:, FEATURE_NAMES.index("log_events")]))
    names = np.array([name for name, _ in groups.ACTIVITY])[found.activity_M]
    assert set(names[n_M == 1]) == {"1 event"} and set(names[(n_M > 1) & (n_M <= 3)]) == {"2-3 events"}
    assert set(names[(n_M > 10) & (n_M <= 50)]) == {"11-50"}
    learned_M, price_M = examples.learn_MT.any(axis=1), features_MF[:, FEATURE_NAMES.index("price_mean")]
    for row in np.unique(examples.platform_M):
        own_M = (examples.platform_M == row) & (price_M > 0)
        shares = np.bincount(found.price_M[own_M & learned_M], minlength=4) / (own_M & learned_M).sum()
        assert shares[0] == 0 and np.abs(shares[1:] - 1 / 3).max() < 0.05
        assert price_M[own_M & (found.price_M == 1)].max() <= price_M[own_M & (found.price_M == 3)].min()
    assert len(np.unique(found.group_M)) == len({*zip(*found, strict=True)})


def test_a_rare_group_weighs_more_and_no_platform_gains(examples, found):
    weight_M = groups.by_frequency(examples, found)
    n_G = np.bincount(found.group_M, examples.learn_MT.any(axis=1))
    for row in np.unique(examples.platform_M):
        own = np.unique(found.group_M[examples.platform_M == row])
        of_group = np.array([weight_M[found.group_M == group][0] for group in own])
        order = np.argsort(n_G[own])
        # Of fewer than groups.LEAST examples as of so many.
        assert (np.diff(of_group[order]) <= 1e-6).all() and of_group[order][0] > 1.1 * of_group[order][-1]
    np.testing.assert_allclose(means(examples, weight_M), 1.0, rtol=1e-5)


def test_a_group_that_a_first_model_served_badly_weighs_more(examples, found):
    perfect_MT = np.where(examples.y_MT > 0, 3.0, -3.0)
    checked_M = examples.check_MT.any(axis=1)
    counts = np.bincount(found.group_M[checked_M & (examples.platform_M == 1)])
    worst = int(counts.argmax())
    bad_MT = np.where((found.group_M == worst)[:, None], -perfect_MT, perfect_MT)
    weight_M = groups.by_loss(examples, found, bad_MT, strength=0.3)
    mine_M = (examples.platform_M == 1) & (found.group_M != worst)
    assert weight_M[found.group_M == worst].min() > 1.5 * weight_M[mine_M].max()
    np.testing.assert_allclose(means(examples, weight_M), 1.0, rtol=1e-5)
    np.testing.assert_allclose(groups.by_loss(examples, found, np.zeros_like(bad_MT)), 1.0, rtol=1e-5)


def test_the_loss_is_the_weighted_mean(examples, config):
    torch.manual_seed(0)
    network = Network(Student(config, dropout=0.0), len(examples.tasks)).eval()
    quiet = dataclasses.replace(examples, learn_next_M=np.zeros(len(examples), bool))
    weight_M = np.random.default_rng(0).uniform(0.1, 3.0, len(examples)).astype(np.float32)
    n = 4000
    part = fit._Batch(np.arange(n), examples.starts_M[:n], np.zeros(n, bool))
    targets = fit._targets(quiet, np.zeros((len(examples), 7), np.float32), None, weight_M, 1.0)
    platform_P = torch.tensor([1.0, 0.5, 2.0])
    loss = fit._loss(network, examples.columns, targets, platform_P, part, Schedule())
    z = fit.logits(network, examples, np.arange(len(examples)))[:n].astype(np.float64)
    losses = np.logaddexp(0.0, z) - examples.y_MT[:n] * z
    w = examples.learn_MT[:n] * (weight_M[:n] * platform_P.numpy()[examples.platform_M[:n]])[:, None]
    assert float(loss.detach()) == pytest.approx(float(((losses * w).sum(0) / w.sum(0)).mean()), rel=1e-4)


def test_weights_of_one_change_nothing_and_others_something(history, examples, config, found):
    def trained(weight_M):
        options = {"prior_logits_3": np.zeros(3), "weight_M": weight_M}
        student = train(examples, config, history.categories, FOLD, Schedule(epochs=1), **options).model.student
        return np.concatenate([tensor.numpy().ravel() for tensor in student.state_dict().values()])

    plain = trained(None)
    assert trained(np.ones(len(examples))).tobytes() == plain.tobytes()
    assert np.abs(trained(groups.by_frequency(examples, found)) - plain).max() > 1e-4
