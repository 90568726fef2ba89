"""The benchmark of a round's last calibration: what it may know, what it is judged by, its figures."""

import numpy as np
import pytest
from synthetic_history import make_history

from benchmarks import rounds
from benchmarks.rounds import Next
from models.config import FoldConfig, HorizonsConfig
from trainer.fit import Schedule
from trainer.labels import make_labels

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = Schedule(epochs=1)


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return make_history(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="module")
def known(history):
    return make_labels(history, FoldConfig(), HorizonsConfig())


@pytest.fixture(scope="module")
def found(history, known):
    return rounds.a_round(history, known, 0.7, SCHEDULE)


def test_the_history_until_an_instant_keeps_everybodys_number(history):
    until_ms = np.array([np.median(history.events["ts"][history.platform == p]) for p in range(len(history.platforms))])
    past = rounds.until(history, until_ms.astype(np.int64))
    assert 0.4 < len(past) / len(history) < 0.6 and past.users is history.users
    for platform in range(len(history.platforms)):
        own, kept = (one.events["ts"][one.platform == platform] for one in (history, past))
        assert kept.max() <= until_ms[platform] < own.max() and len(kept) == (own <= until_ms[platform]).sum()


def test_what_is_published_knows_nothing_of_what_it_is_judged_by(history, known, found):
    assert {("shop", "click"), ("shop", "purchase"), ("shop", "return")} <= {(one.platform, one.head) for one in found}
    last = history.events["ts"].max()
    late = history.events["ts"] > history.events["ts"].min() + 0.7 * (last - history.events["ts"].min())
    turned = known._replace(y_N3=np.where(late[:, None], 1 - known.y_N3, known.y_N3).astype(np.uint8))
    again = rounds.a_round(history, turned, 0.7, SCHEDULE)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one.judged, other.judged)
        np.testing.assert_array_equal(one.served, other.served)
        assert (one.y != other.y).mean() > 0.9
        assert (one.judged != one.served).any() and 0 < one.y.mean() < 1


def test_too_short_a_time_makes_no_round(history, known):
    assert rounds.a_round(history, known, 0.01, SCHEDULE) == []


def test_figures_are_of_each_cell_alike_and_the_difference_is_paired_by_user():
    rng = np.random.default_rng(0)

    def cell(head: str, n: int, shift: float) -> Next:
        truth = rng.uniform(0.2, 0.8, n)
        y = (rng.random(n) < truth).astype(float)
        return Next(0.5, "shop", head, y, rng.integers(0, 300, n), np.clip(truth + shift, 0.01, 0.99), truth)

    figures = rounds.figures_of([cell("click", 4000, 0.1), cell("return", 400, 0.0)], 50)
    value, low, high = figures["log_loss_difference"]
    each = [np.subtract(*row["log_loss"][::-1]) for row in figures["cells"]]
    assert each[1] == 0.0 and value == pytest.approx(each[0] / 2) and low < value < high < 0
    assert figures["better"] == 1 and figures["ece_of_users"][0] > figures["ece_of_users"][1] + 0.03
    assert figures["predicted_over_actual_off"][0] > figures["predicted_over_actual_off"][1] + 0.05
    page = rounds.text(figures)
    assert f"log-loss {value:+.4f} [{low:+.4f}, {high:+.4f}], better in 1 of them" in page and "| shop | return |" in page
