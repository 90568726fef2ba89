"""The simulator's benchmark: the observer sees events only, labels of interest shift, no label before it is known."""

import numpy as np
import pytest
import torch

from benchmarks import freshness, observer, simulated
from benchmarks.cells import Bench
from benchmarks.simulated import PLATFORMS
from models.events import EVENT, IMPRESSION, PURCHASE, VIEW
from models.student import Student
from streams.simulator import DAY_MS, METRO, SimulatorConfig
from trainer.history import History

CONFIG = SimulatorConfig(n_shoppers=400, seed=4)


@pytest.fixture(scope="module")
def world():
    return simulated.make_world(CONFIG, 24.0, ((2.0, 6.0), (13.0, 14.0), (14.0, 16.0)))


def sees(world, of_M):
    kind_M = world.history.events["kind"][world.examples.index_M]
    columns = world.examples.user_M, world.examples.ts_M, world.examples.platform_M - 1, kind_M
    return observer.expected_truth(*(column[of_M] for column in columns))


def test_the_truth_lies_beside_the_event_that_it_is_of(world):
    at = world.part_M == simulated.TEST
    examples = world.examples
    assert at.sum() > 1000 and np.isnan(world.truth_M3[examples.platform_M == 3, 0]).all()
    for head in range(3):
        of = at & ~np.isnan(world.truth_M3[:, head])
        assert examples.y_MT[of, head].mean() == pytest.approx(world.truth_M3[of, head].mean(), abs=0.06)
    assert not (examples.learn_MT & examples.check_MT).any()
    assert 0.5 < world.visible_M.mean() < 0.95


def test_unlinked_every_account_is_a_user_of_its_own():
    linked, alone = (simulated.arrivals(CONFIG, 2.0, linked)[0] for linked in (True, False))
    assert any(event.user.startswith("person-") for event in linked)
    assert not any(event.user.startswith("person-") for event in alone)
    assert [event.event_id for event in linked] == [event.event_id for event in alone]


def test_the_observer_does_not_see_the_future(world):
    of = world.examples.user_M < 60
    early = of & (world.day_M < 12)
    assert sees(world, of)[early[of]] == pytest.approx(sees(world, early), abs=1e-12)


def test_the_observer_is_right_on_average_and_lies_below_bayes(world):
    of = world.visible_M & (world.part_M == simulated.TEST)
    said = sees(world, np.ones(len(of), bool))[of]
    for head in range(3):
        known = ~np.isnan(world.truth_M3[of, head])
        truth = world.truth_M3[of, head][known]
        assert said[known, head].mean() == pytest.approx(truth.mean(), abs=0.04)
        error, blind = ((truth - guess) ** 2 for guess in (said[known, head], truth.mean()))
        assert 0 < error.mean() < 0.8 * blind.mean()


def test_what_is_shown_beside_an_act_tells_the_observer_of_engagement():
    ts = np.array([DAY_MS] * 7)
    kind = np.array([VIEW] + [IMPRESSION] * 6)
    said = observer.expected_truth(np.zeros(7, int), ts, np.full(7, METRO), kind)
    assert (np.diff(said[:, 0]) > 0).all() and (np.diff(said[:, 2]) > 0).all()


def history(rows) -> History:
    """(user, day, kind, category) in the order of arrival, on one platform."""
    events = np.zeros(len(rows), EVENT)
    user, day, kind, category = (np.array(column) for column in zip(*rows, strict=True))
    events["ts"], events["kind"], events["category"] = (day * DAY_MS).astype(np.int64), kind, category
    zeros = np.zeros(len(rows), np.int32)
    return History(
        events, user.astype(np.int32), zeros.astype(np.int16), zeros, np.arange(len(rows)), ["a", "b"], ("p",), {}
    )


def test_interest_shifts_where_another_category_leads_the_week_to_come():
    before = [(0, 40 + i, VIEW, 1) for i in range(4)] + [(0, 44, PURCHASE, 2)]
    other = [(1, 44.5, VIEW, 9)] * 20
    old = [(0, 1, VIEW, 3)] * 9  # over 30 days ago
    beside = [(0, 45, IMPRESSION, 1)] * 9  # the platform's doing
    shift = simulated.shifts(history(old + before + beside + [(0, 46 + i, VIEW, 2) for i in range(3)] + other))
    at = len(old) + len(before) - 1
    assert shift.known_N[at] and shift.y_N[at]
    assert shift.main_share_N[at] == pytest.approx(0.8)
    assert shift.entropy_N[at] == pytest.approx(-(0.8 * np.log(0.8) + 0.2 * np.log(0.2)))
    stays = simulated.shifts(history(before + [(0, 46 + i, VIEW, 1) for i in range(3)]))
    assert stays.known_N[4] and not stays.y_N[4]
    few = simulated.shifts(history(before + [(0, 46 + i, VIEW, 1) for i in range(2)]))
    assert not few.known_N.any()
    tied = simulated.shifts(history([*before, *[(0, 44, VIEW, 2)] * 3, *[(0, 46, VIEW, 2)] * 3]))
    assert tied.known_N[7] and not tied.y_N[7]


def test_mixes_that_agree_are_no_distance_apart_and_those_that_share_nothing_are_one():
    kind = np.dtype(
        [(f"{which}_{what}", t, (3,)) for which in ("short", "long") for what, t in (("category", "u4"), ("weight", "f4"))]
    )
    views = np.zeros(3, kind)
    views["short_category"], views["long_category"] = (1, 2, 0), ((2, 1, 0), (3, 4, 0), (0, 0, 0))
    views["short_weight"], views["long_weight"] = (0.5, 1.5, 0), ((3, 1, 0), (1, 1, 0), (0, 0, 0))
    far = simulated.short_vs_long(views)
    assert far[:2] == pytest.approx([0.0, 1.0], abs=1e-6) and np.isfinite(far).all()


def test_scores_are_standardised_on_the_learned_events_of_each_platform():
    score, platform = np.array([1.0, 3.0, 9.0, 5.0, 5.0]), np.array([1, 1, 1, 2, 2])
    out = simulated.standardised(score, platform, np.array([True, True, False, True, True]))
    np.testing.assert_allclose(out, [-1.0, 1.0, 7.0, 0.0, 0.0])


def test_a_users_own_rate_knows_only_what_had_matured():
    user, ts, y = np.array([0, 0, 0, 1]), np.array([0, 5, 10, 20]), np.ones(4)
    rate = simulated._own_rate(user, ts, y, np.array([True, True, True, True]), 10, 0.5, 1.0)
    assert rate.tolist() == [0.5, 0.5, 0.75, 0.5]


@pytest.fixture
def stored() -> freshness.Stored:
    """Two weeks before the relaunch and four days after; the recurrence's output is noise."""
    rng = np.random.default_rng(0)
    n, config = 6000, simulated.student_config()
    y = (rng.random((n, 3)) < 0.4).astype(np.float32)
    normal = lambda width: torch.from_numpy(rng.normal(size=(n, width)).astype(np.float32))  # noqa: E731
    x = normal(config.n_features)
    x[:, :3] += torch.from_numpy(y)
    minute, user = np.sort(rng.uniform(-14 * 1440, 4 * 1440, n)), rng.integers(0, 200, n)
    return freshness.Stored(
        normal(config.hidden), x, normal(config.width), torch.from_numpy(rng.integers(1, 4, n)), torch.from_numpy(y),
        np.ones((n, 3), bool), minute, user, user % 10 == 0, np.full((n, 3), 0.5),
    )  # fmt: skip


def test_no_label_teaches_before_it_is_known_and_held_out_users_never_do(stored):
    torch.manual_seed(0)
    fresh = freshness.Fresh(Student(simulated.student_config()), stored, 0.5)
    now = 3 * 1440.0
    for held_out in (False, True):
        new, old = fresh._known(now, held_out)
        for task, horizon in enumerate((30, 1440, 7 * 1440)):
            assert len(new[task]) and stored.minute_N[new[task]].max() + horizon + 60 <= now
            assert stored.minute_N[old[task]].max() < 0
            assert (stored.held_out_N[np.r_[new[task], old[task]]] == held_out).all()


def test_what_is_young_is_seen_and_new_and_of_heads_without_a_new_label(stored):
    fresh = freshness.Fresh(Student(simulated.student_config()), stored, 0.5)
    for now, heads in ((80.0, {0, 1, 2}), (1000.0, {1, 2}), (3 * 1440.0, {2}), (0.0, set())):
        young = fresh._young(now)
        assert {task for task, of in enumerate(young) if len(of)} == heads
        for of in young:
            assert (stored.minute_N[of] >= 0).all() and (stored.minute_N[of] + 60 <= now).all()
            assert not stored.held_out_N[of].any()


def test_a_head_is_held_to_what_the_major_says_where_no_label_is_known(stored, monkeypatch):
    """Returns take a week: without that they drift on new events while clicks learn."""
    torch.manual_seed(0)
    student, moved = Student(simulated.student_config()), []
    for least in (freshness.LEAST_TO_KEEP, 10**9):
        monkeypatch.setattr(freshness, "LEAST_TO_KEEP", least)
        fresh = freshness.Fresh(student, stored, 0.3)
        for now in np.linspace(1440.0, 4320.0, 20):
            fresh.refresh(now)
        young = fresh._young(4320.0)[2]
        moved.append(np.abs(stored.logits(fresh.student, young) - stored.logits(student, young))[:, 2].mean())
    assert moved[0] < 0.9 * moved[1]


def test_a_refresh_learns_and_keeps_all_but_the_heads_bit_for_bit(stored):
    torch.manual_seed(0)
    student = Student(simulated.student_config())
    fresh = freshness.Fresh(student, stored, 0.3)
    at = np.flatnonzero(stored.held_out_N)
    loss = lambda: torch.nn.functional.binary_cross_entropy_with_logits(  # noqa: E731
        torch.from_numpy(fresh.says(at)).float(), stored.y_NT[at]
    )
    before = loss()
    for now in (60.0, 1440.0, 2880.0):
        fresh.refresh(now)
    assert loss() < before - 0.01
    theirs = student.state_dict()
    changed = {name for name, tensor in fresh.student.state_dict().items() if not torch.equal(tensor, theirs[name])}
    assert changed == {"head_weight_POK", "head_bias_PO"}


def test_a_gain_is_paired_and_a_copy_gains_nothing():
    rng = np.random.default_rng(1)
    n = 3000
    y = (rng.random((n, 3)) < 0.5).astype(float)
    weak, strong = y + 2 * rng.normal(size=(n, 3)), 2 * y + 2 * rng.normal(size=(n, 3))
    rest = np.arange(n) / 10, np.repeat(np.arange(300), 10), rng.integers(1, 4, n), np.full(n, 7)
    said = freshness.Said.of(np.column_stack([weak, strong, weak, y * 9, y, *rest]))
    everything = np.ones(n, bool)
    gain = said.gain("refreshed", everything, said.cells(), 50)
    assert gain.low > 0 and said.gain("refreshed, no replay", everything, said.cells(), 50) == (0.0, 0.0, 0.0)
    assert said.auc("bayes", everything, said.cells()) == 1.0
    assert len(said.cells()) == 3 * len(PLATFORMS) - 1


def test_interest_shift_is_judged_in_further_worlds_too(tmp_path, monkeypatch):
    monkeypatch.setattr(simulated, "SHOPPERS", SimulatorConfig(n_shoppers=120))
    bench = Bench(None, None, None, tmp_path, "", 1)
    one, other = (simulated.further_cells(bench, seed, 1, 20) for seed in (1, 2))
    assert set(one) == {(platform, "shift, world 1") for platform in PLATFORMS}
    for cell in one.values():
        assert set(cell["models"]) == {*simulated.SHIFT_BASELINES, "mixes"}
        assert all(0 < model["auc"] < 1 and len(model["auc_draws"]) == 20 for model in cell["models"].values())
    assert [cell["n"] for cell in one.values()] != [cell["n"] for cell in other.values()]
