"""Each canary is shown what it must catch, and what it must not."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic_history import make_history

from benchmarks import canaries, quality
from benchmarks.cells import Section

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return make_history(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="module")
def whole(history):
    return canaries.replayed(history, None)


@pytest.fixture(scope="module")
def part(history):
    """What is known of each user up to a moment of his own."""
    ts = np.sort(history.events["ts"])
    until_U = np.random.default_rng(0).choice(ts[len(ts) // 2 :], len(history.users))
    part = canaries.replayed(history, until_U)
    assert 0.3 * len(history) < len(part.index_M) < len(history)
    return part


def test_features_that_know_nothing_of_what_comes_later_pass(whole, part):
    assert canaries.looked_ahead(whole, part) == {}


def test_the_time_until_the_next_event_is_from_the_future(history, whole, part):
    (what,) = canaries.looked_ahead(canaries.with_next(history, whole), canaries.with_next(history, part)).values()
    # The last event of each user, of those whose history was cut.
    cut = len(set(history.user[part.index_M]) & set(history.user[np.setdiff1d(whole.index_M, part.index_M)]))
    assert what.startswith(f"{cut} events of {len(part.index_M)}")


def test_one_bit_of_one_feature_is_seen(whole, part):
    features = part.features_MF.copy()
    features.view(np.uint32)[7, 3] ^= 1
    assert canaries.differing(whole, part._replace(features_MF=features)) == 1


def test_the_fold_of_serving_gives_the_bytes_of_the_replay_and_another_history_does_not(history, whole):
    assert canaries.differing(whole, canaries.live(history)) == 0
    events = history.events.copy()
    events["ts"][5] += 1000
    assert canaries.differing(whole, canaries.live(dataclasses.replace(history, events=events))) > 0


def test_a_feature_tells_too_much_whichever_way_it_points():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 500)
    assert canaries.tells_too_much(y, y + rng.normal(0, 0.3, 500)) and canaries.tells_too_much(y, -1.0 * y)
    assert not canaries.tells_too_much(y, y + rng.normal(0, 2.0, 500))


def test_shuffles_that_lean_both_ways_are_no_leak_and_those_that_lean_one_way_are():
    low, high = canaries.around_mean([0.54, 0.47, 0.52, 0.46, 0.51, 0.49], 0.05 / 11)
    assert low < 0.5 < high
    low, high = canaries.around_mean([0.61, 0.63, 0.60, 0.62, 0.61, 0.64], 0.05 / 11)
    assert low > 0.5


@pytest.mark.parametrize("wrong", [{}, {"replay": "other bytes"}])
def test_a_run_that_trips_one_ends_with_1(monkeypatch, capsys, wrong):
    monkeypatch.setattr(
        quality,
        "prepare",
        lambda *args: quality.Bench(SimpleNamespace(history=SimpleNamespace(users=[])), [], None, None, "", 1),
    )
    monkeypatch.setattr(quality, "main_table", lambda bench, quick: (Section({}, {}, ""), wrong))
    arguments = quality.parser().parse_args(["--quick"])
    assert quality.main(arguments) == (1 if wrong else 0)
    assert ("CANARY replay: other bytes" in capsys.readouterr().err) == bool(wrong)
