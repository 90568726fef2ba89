"""The last word on calibration: the line of a window, its pull, what is left alone; what an artifact then serves."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PLATFORMS, make_model, make_stream

from models import artifact
from models.config import FoldConfig, HorizonsConfig
from models.events import EVENT
from models.fold import DUPLICATE, FOLDED
from models.scorer import Scorer
from models.state import empty_rows
from trainer import metrics
from trainer.evaluate import Comparison, Judged, Report
from trainer.labels import Labels
from trainer.recalibrate import recalibrate

ALPHA, BETA = 0, 1
PURCHASE = 1
DAY_MS = 86_400_000
START_MS = 1_700_000_000_000
NEVER = 2**62


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def window(logit, y, user, platform=None, age=None, delay=None) -> tuple:
    """A gate's window of n events, all on one hour of the day, of which purchases alone are answered. `age` (n,) ms, None:
    all have matured; `delay`: None: what comes, comes at once. → what `recalibrate` is given besides the model."""
    n = len(logit)
    platform = np.zeros(n, np.int16) if platform is None else platform
    age = np.full(n, DAY_MS) if age is None else age
    delay = np.where(y > 0, 1, NEVER) if delay is None else delay
    p_N3 = np.full((n, 3), np.nan, np.float32)
    p_N3[:, PURCHASE] = sigmoid(logit)
    answered_N3 = np.zeros((n, 3), bool)
    answered_N3[:, PURCHASE] = True
    events = np.zeros(n, EVENT)
    events["ts"] = START_MS + 10 * DAY_MS * np.arange(n)
    delay_N3 = np.repeat(np.asarray(delay, np.int64)[:, None], 3, axis=1)
    labels = Labels((delay_N3 <= DAY_MS).astype(np.uint8), delay_N3, np.zeros(n), np.zeros(n), events["ts"] + age)
    history = SimpleNamespace(platforms=PLATFORMS, platform=platform, user=user, events=events)
    nothing = np.zeros((n, 5), np.uint32)
    judged = Judged(np.arange(n), np.full(n, FOLDED, np.uint8), p_N3, nothing, nothing * 0.0, np.ones(n, int))
    report = Report({}, {}, True, {("alpha", "purchase"): [0.0], ("gamma", "click"): [1.0]})
    return history, labels, HorizonsConfig(), Comparison(report, report, None, judged, answered_N3)


def drifted(n: int = 20_000, users: int = 4_000, seed: int = 0):
    """Logits of a candidate, and what comes true under a line on them: slope .8, offset −.5."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0.0, 1.5, n)
    y = (rng.random(n) < sigmoid(0.8 * logit - 0.5)).astype(np.uint8)
    return logit, y, rng.integers(0, users, n)


def test_a_line_fitted_to_the_window_comes_after_the_calibration_that_was_judged():
    model, (logit, y, user) = make_model(), drifted()
    served = recalibrate(model, *window(logit, y, user))
    line = served.lines["alpha", "purchase"]
    assert (line.slope, line.offset) == (pytest.approx(0.8, abs=0.06), pytest.approx(-0.5, abs=0.06))
    assert (line.events, line.users) == (len(y), len(np.unique(user)))
    slope, added = model.calibration_P32[1 + ALPHA, PURCHASE]
    expected = [line.slope * slope, line.slope * added + line.offset]
    np.testing.assert_allclose(served.model.calibration_P32[1 + ALPHA, PURCHASE], expected, rtol=1e-6)
    same = np.ones(model.calibration_P32.shape, bool)
    same[1 + ALPHA, PURCHASE] = False
    np.testing.assert_array_equal(served.model.calibration_P32[same], model.calibration_P32[same])
    served.model.check()
    assert served.as_dict() == {
        "alpha": {
            "purchase": {
                "slope": round(line.slope, 6), "offset": round(line.offset, 6), "events": len(y), "users": line.users,
                "young": 0,
            }
        }
    }  # fmt: skip


def test_what_was_judged_is_kept_beside_what_is_served():
    model = make_model()
    served = recalibrate(model, *window(*drifted())).model
    assert served.as_judged().calibration_P32 is served.judged_P32 is model.calibration_P32
    assert served.as_judged().judged_P32 is None and model.as_judged() is model


def test_the_shares_are_those_of_the_probabilities_as_they_are_served():
    logit, y, user = drifted()
    given = window(logit, y, user)
    compared = given[-1]
    compared.judged.status[::2] = DUPLICATE
    compared.answered_N3[::2] = False
    served = recalibrate(make_model(), *given)
    line = served.lines["alpha", "purchase"]
    p = sigmoid(line.slope * logit[1::2] + line.offset)
    np.testing.assert_allclose(served.shares["alpha", "purchase"], np.histogram(p, 20, (0, 1))[0] / len(p), atol=2e-3)
    assert served.shares["gamma", "click"] == [1.0] and compared.candidate.shares["alpha", "purchase"] == [0.0]


def test_each_platform_has_a_line_of_its_own_and_an_unknown_one_has_none():
    logit, y, user = drifted()
    platform = (np.arange(len(y)) % 2).astype(np.int16)
    logit[platform == BETA] += 1.0
    given = window(logit, y, user, platform)
    lines = recalibrate(make_model(), *given).lines
    assert lines["beta", "purchase"].offset < lines["alpha", "purchase"].offset - 0.5
    given[0].platforms = ("alpha", "nobody knows", "gamma")
    assert list(recalibrate(make_model(), *given).lines) == [("alpha", "purchase")]


def test_what_has_come_so_far_counts_where_labels_have_yet_to_mature():
    """Half of the window is younger than a day, and twice as much comes true of it; what comes, comes within four hours."""
    rng = np.random.default_rng(3)
    n = 20_000
    young = np.arange(n) % 2 == 1
    logit = rng.normal(-1.0, 1.0, n)
    delay = np.where(rng.random(n) < sigmoid(logit + 0.8 * young), rng.integers(1, DAY_MS // 6, n), NEVER)
    age = np.where(young, rng.integers(1, DAY_MS, n), 2 * DAY_MS)
    y, user = (delay <= age).astype(np.uint8), rng.integers(0, 5000, n)

    def line(age, delay):
        return recalibrate(make_model(), *window(logit, y, user, age=age, delay=delay)).lines["alpha", "purchase"]

    found, matured = line(age, delay), line(np.where(young, -1, age), delay)
    assert abs(matured.offset) < 0.05 and (matured.events, matured.young) == (n // 2, 0)
    assert 0.3 < found.offset < 0.5 and found.events == n // 2 and 0.45 * n < found.young <= n // 2
    # Nothing that has come later than now is known.
    unseen = np.where(delay > age, NEVER, delay)
    assert line(age, unseen) == found


def test_without_a_matured_label_it_stays_as_it_was():
    logit, y, user = drifted(2000, 300)
    model = make_model()
    served = recalibrate(model, *window(logit, y, user, age=np.full(2000, DAY_MS // 2)))
    assert served.lines == {} and (served.model.calibration_P32 == model.calibration_P32).all()


def test_few_users_with_many_events_hardly_move_it():
    logit, y, _ = drifted()
    together = np.random.default_rng(1).normal(0.0, 3.0, 6)[np.arange(len(y)) % 6]
    y = (np.random.default_rng(2).random(len(y)) < sigmoid(logit + together)).astype(np.uint8)
    few = recalibrate(make_model(), *window(logit, y, np.arange(len(y)) % 6)).lines["alpha", "purchase"]
    many = recalibrate(make_model(), *window(logit, y, np.arange(len(y)))).lines["alpha", "purchase"]
    assert abs(few.offset) < 0.2 * abs(many.offset) and abs(few.slope - 1.0) < 0.2 * abs(many.slope - 1.0)


def test_an_inverted_ranking_keeps_its_order_and_gets_its_rate():
    logit, y, user = drifted()
    line = recalibrate(make_model(), *window(-logit, y, user)).lines["alpha", "purchase"]
    assert line.slope == 1.0 and sigmoid(-logit + line.offset).mean() == pytest.approx(y.mean(), abs=0.02)


@given(st.integers(0, 400), st.integers(1, 40), st.integers(0, 2**16), st.floats(-3, 3), st.floats(-1, 3))
@settings(max_examples=60, deadline=None)
def test_no_window_is_predicted_worse_and_no_order_is_changed(n, users, seed, added, slope):
    rng = np.random.default_rng(seed)
    logit = rng.normal(0.0, 2.0, n)
    y = (rng.random(n) < sigmoid(slope * logit + added)).astype(np.uint8)
    served = recalibrate(make_model(), *window(logit, y, rng.integers(0, users, n)))
    assert (("alpha", "purchase") in served.lines) == (n > 0)
    assert np.isfinite(served.model.calibration_P32).all()
    for line in served.lines.values():
        assert line.slope > 0.0
        before, after = metrics.log_loss(y, sigmoid(logit)), metrics.log_loss(y, sigmoid(line.slope * logit + line.offset))
        assert after <= before + 1e-6


def test_an_artifact_serves_the_one_and_remembers_the_other(tmp_path):
    model = make_model()
    served = recalibrate(model, *window(*drifted())).model
    store = str(tmp_path)
    told = {"metrics": {}, "training_range": {}, "reference_histograms": {}, "fold": FoldConfig(), "now_ms": 1}
    versions = [artifact.publish(store, "student", one, **told) for one in (model, served)]
    plain, loaded = (artifact.load(store, "student", one, fold=FoldConfig(), size="cpu") for one in versions)
    assert plain.judged_P32 is None
    np.testing.assert_array_equal(loaded.calibration_P32, served.calibration_P32)
    np.testing.assert_array_equal(loaded.judged_P32, model.calibration_P32)
    events, slots = make_stream(200, 9)
    said = {
        name: Scorer(one, "cpu").run(empty_rows(9, "cpu"), slots, events)[0].p_N3
        for name, one in {"plain": plain, "served": loaded, "judged": loaded.as_judged()}.items()
    }
    np.testing.assert_array_equal(said["judged"], said["plain"])
    assert np.nanmax(np.abs(said["served"] - said["plain"])[:, PURCHASE]) > 0.02
    np.testing.assert_array_equal(said["served"][:, 0], said["plain"][:, 0])


def test_a_judged_calibration_of_another_shape_is_refused():
    served = recalibrate(make_model(), *window(*drifted())).model
    object.__setattr__(served, "judged_P32", served.judged_P32[:-1])
    with pytest.raises(ValueError, match="calibration has shape"):
        served.check()
