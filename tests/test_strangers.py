"""Of the strangers nothing is learned, chosen or calibrated by; of the others nothing is judged."""

from pathlib import Path

import numpy as np
import pytest
from synthetic_history import examples_until, make_config, make_history

from benchmarks import datasets, strangers
from benchmarks.cells import Bench
from benchmarks.datasets import TEST, TRAIN, VALIDATE


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """Splits drawn at random: the rules of who may be seen where are of users and splits alone."""
    history = make_history(tmp_path_factory.mktemp("history"), 100)
    examples = examples_until(history, make_config(history))
    rng, n = np.random.default_rng(0), len(history)
    split_N, anchor_N = rng.choice([TRAIN, VALIDATE, TEST, -1, -2], n), rng.random(n) < 0.7
    nothing_NT = np.zeros((n, len(datasets.TASKS)))
    data = datasets.DataSet(
        history, split_N, split_N == TRAIN, anchor_N & (split_N >= 0), anchor_N, nothing_NT, nothing_NT, nothing_NT[:, 0]
    )
    return Bench(data, examples, np.empty(0), Path("nowhere"), "key", 1)


def test_one_user_in_four_is_a_stranger_and_always_the_same():
    user = np.arange(20_000)
    of = strangers.strangers(user)
    assert 0.23 < of.mean() < 0.27
    assert (strangers.strangers(user[::-1]) == of[::-1]).all()


def test_strangers_are_judged_and_nothing_else_is_known_of_them(bench: Bench, monkeypatch):
    monkeypatch.setattr(datasets, "MATRIX", dict.fromkeys(bench.data.history.platforms, datasets.MATRIX["taobao"]))
    other = strangers.without(bench)
    of_M = strangers.strangers(bench.examples.user_M)
    for name in ("learn_MT", "check_MT"):
        had, has = getattr(bench.examples, name), getattr(other.examples, name)
        assert not has[of_M].any() and (has[~of_M] == had[~of_M]).all()
    assert bench.examples.learn_MT[of_M].any() and bench.examples.learn_next_M[of_M].any()
    assert not other.examples.learn_next_M[of_M].any() and other.examples.learn_next_M[~of_M].any()
    of_N, split_N, anchor_N = strangers.strangers(bench.data.history.user), bench.data.split_N, other.data.anchor_N
    assert (anchor_N == bench.data.anchor_N & np.where(of_N, split_N == TEST, split_N != TEST)).all()
    assert anchor_N[of_N].any() and anchor_N[~of_N].any()
    gaps = other.data.gap_anchors()
    assert gaps.any() and not (gaps & of_N).any() and (bench.data.gap_anchors() & of_N).any()
    assert other.key != bench.key
