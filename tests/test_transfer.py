"""The ladder: each rung changes what it says and nothing else, folds its changes in exactly, and the guard guards."""

import dataclasses
from itertools import pairwise

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_history import examples_until, make_config, make_history

from models.artifact import load, publish
from models.config import TRANSFER_RUNGS, FoldConfig, HorizonsConfig, TrainerConfig
from models.events import KINDS
from models.fold import FEATURE_COLUMNS, FEATURE_NAMES
from models.scorer import Model, identity_calibration
from models.student import Student
from trainer import transfer as ladder
from trainer.fit import Schedule, logits
from trainer.transfer import RUNGS, Gain, Rehearsal, Task, adopt, choose, pretrain, rehearse, subset, transfer, understudy

FOLD, HORIZONS = FoldConfig(), HorizonsConfig()
FEW = Schedule(epochs=2)
HEADS = {"student.head_weight_POK", "student.head_bias_PO"}
BODY = {
    f"student.{name}"
    for name in (
        "item.weight", "category.weight", "embed.weight", "embed.bias", "recur.weight", "recur.bias", "log_tau_H",
        "trunk.weight", "trunk.bias",
    )
}  # fmt: skip
STANDARD = {"student.feature_mean_PF", "student.feature_std_PF"}
CLAIMS = {
    "finetune_head": (set(), HEADS | STANDARD, "own"),
    "loose_head": (set(), HEADS | STANDARD, "own"),
    "adapter": (set(), HEADS, "own"),
    "finetune": (BODY, HEADS | {"student.platform.weight"}, "own"),
    "interpolate": (BODY, HEADS | {"student.platform.weight"}, "own"),
    "lora": ({"student.embed.weight", "student.recur.weight", "student.trunk.weight"}, {"student.head_bias_PO"}, "own"),
    "adversarial": (BODY, HEADS, "shared"),
    "renormalise": (set(), STANDARD, "own"),
}
"""Rung → tensors that change as a whole, tensors of which one row changes, and which row."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return make_history(tmp_path_factory.mktemp("history"), 60)


@pytest.fixture(scope="module")
def config(history):
    return make_config(history)


@pytest.fixture(scope="module")
def examples(history, config):
    return examples_until(history, config)


@pytest.fixture(scope="module")
def task(history, config, examples):
    row = 1 + history.platforms.index("till")
    of, others = np.flatnonzero(examples.platform_M == row), np.flatnonzero(examples.platform_M != row)
    own, rest = subset(examples, of), subset(examples, others)
    q_own, q_rest = np.zeros((len(of), 7), np.float32), np.full((len(others), 7), 1 / 7, np.float32)
    source = adopt(pretrain(rest, q_rest, config, FEW), row, own)
    return Task(row, source, own, rest, own.columns.features_NF.numpy()[::2], q_own, q_rest, FEW)


@pytest.fixture(scope="module")
def networks(task):
    return {name: climb(task) for name, climb in RUNGS.items()}


def of(network):
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def test_what_no_platform_of_the_source_knows_says_nothing_on_the_target(task, examples):
    """Favourites are of the target alone."""
    features = examples.columns.features_NF.clone()
    own = examples.platform_M == task.row
    features[:, 7] = torch.from_numpy(np.where(own, np.arange(len(examples)) % 5, 3.0)).float()
    known = dataclasses.replace(examples, columns=examples.columns._replace(features_NF=features))
    rest = subset(known, np.flatnonzero(~own))
    source = pretrain(rest, task.q_rest_MG, task.source.student.config, FEW)
    assert not source.student.embed.weight[:, 7].any() and source.student.embed.weight[:, :7].any(dim=0).any()
    said = logits(adopt(source, task.row, rest), known, np.arange(len(known)))
    features[:, 7] = 3.0
    np.testing.assert_array_equal(logits(adopt(source, task.row, rest), known, np.arange(len(known))), said)


@pytest.fixture(scope="module")
def two_platforms(task, config):
    """Every other user of `shop` moves to a third platform: → examples of both, a student's shape for three."""
    rest = task.rest
    moved_M = np.where(rest.user_M % 2 == 0, len(config.platforms) + 1, rest.platform_M)
    columns = rest.columns._replace(platform_N=torch.from_numpy(moved_M.astype(np.int64)))
    return dataclasses.replace(rest, columns=columns), msgspec.structs.replace(
        config, platforms=(*config.platforms, "stall")
    )


def differently(examples, names, of_M=slice(None)):
    """The examples, with other values of the features in the rows `of_M`."""
    features = examples.columns.features_NF.clone()
    for name in names:
        values = features[of_M, FEATURE_NAMES.index(name)]
        features[of_M, FEATURE_NAMES.index(name)] = 0.25 * (torch.arange(len(values)) % 5)
    return dataclasses.replace(examples, columns=examples.columns._replace(features_NF=features))


def test_a_source_does_not_hear_the_calendar(task):
    everything = np.arange(len(task.own))
    said = logits(task.source, task.own, everything)
    assert (
        logits(task.source, differently(task.own, FEATURE_NAMES[FEATURE_COLUMNS["calendar"]]), everything).tobytes()
        == said.tobytes()
    )
    assert logits(task.source, differently(task.own, ["log_dt"]), everything).tobytes() != said.tobytes()
    assert torch.isfinite(task.source.student.feature_mean_PF).all()
    hours = task.own.columns.features_NF[:, FEATURE_NAMES.index("hour_cos")]
    mean = task.source.student.feature_mean_PF[task.row, FEATURE_NAMES.index("hour_cos")]
    assert hours.min() < mean < hours.max() and mean != 0.0  # for whoever learns on from it


def test_a_source_is_silent_on_what_one_of_its_platforms_alone_varied(two_platforms, task):
    """A count that both vary speaks, one that one of them varies does not, and of a single platform all speak."""
    both, config = two_platforms
    name, one = "log_count_favorite_7d", both.platform_M == both.platform_M.max()
    by_both, by_one = differently(both, [name]), differently(differently(both, [name]), [name], ~one)
    by_one.columns.features_NF[torch.from_numpy(~one), FEATURE_NAMES.index(name)] = 1.0
    alone = subset(by_one, np.flatnonzero(one))
    for rest, speaks in ((by_both, True), (by_one, False), (alone, True)):
        source = pretrain(rest, np.full((len(rest), 7), 1 / 7, np.float32), config, FEW)
        said, other = (logits(source, examples, np.arange(len(both))) for examples in (both, differently(both, [name])))
        assert (said.tobytes() != other.tobytes()) == speaks


def test_a_kind_that_no_platform_has_is_taken_for_the_next_one_up_the_funnel(two_platforms):
    both, config = two_platforms
    kinds = [FEATURE_NAMES.index(f"kind_{kind}") for kind in KINDS]
    features = both.columns.features_NF.clone()
    features[:, kinds] = 0.0
    for kind, of_it in (("favorite", 0), ("cart", 1), ("purchase", 2), ("cancel", 3)):
        features[of_it::4, FEATURE_NAMES.index(f"kind_{kind}")] = 1.0
    rest = dataclasses.replace(both, columns=both.columns._replace(features_NF=features))
    source = pretrain(rest, np.full((len(rest), 7), 1 / 7, np.float32), config, FEW)
    student, width = source.student, config.head_width
    for weight_K in (student.embed.weight[:, kinds], student.head_weight_POK[0, :, width:][:, kinds]):
        _, view, click, favorite, cart, purchase, cancel = weight_K.T
        assert torch.equal(view, favorite) and torch.equal(click, favorite) and favorite.any()
        for one, other in pairwise((favorite, cart, purchase, cancel)):
            assert not torch.equal(one, other)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_rung_changes_what_it_claims_and_no_other_byte(task, networks, name):
    whole, by_row, which = CLAIMS[name]
    row = task.row if which == "own" else 0
    before, after = of(task.source), of(networks[name])
    assert set(before) == set(after)
    for tensor, value in before.items():
        now = after[tensor]
        if tensor in whole:
            assert name == "interpolate" or not torch.equal(now, value), tensor  # α may be 1 for a block
        elif tensor in by_row:
            assert name == "interpolate" or not torch.equal(now[row], value[row]), tensor
            others = [i for i in range(len(value)) if i != row]
            assert torch.equal(now[others], value[others]), tensor
        else:
            assert torch.equal(now, value), tensor


@pytest.mark.parametrize("name", ["scratch", "pooled", "distil_source"])
def test_what_learns_anew_shares_nothing_with_the_source_but_the_standardisation(task, networks, name):
    before, after = of(task.source), of(networks[name])
    for tensor in BODY:
        assert not torch.equal(after[tensor], before[tensor])
    for tensor in ("student.feature_mean_PF", "student.feature_std_PF"):
        assert torch.equal(after[tensor][task.row], before[tensor][task.row])


def test_no_rung_touches_the_source(task, history, config):
    again = adopt(pretrain(task.rest, task.q_rest_MG, config, FEW), task.row, task.own)
    for name, tensor in of(again).items():
        assert torch.equal(tensor, of(task.source)[name]), name


@pytest.mark.parametrize("name", ["finetune_head", "loose_head", "adapter", "renormalise"])
def test_other_platforms_are_scored_as_before(task, networks, name):
    everything = np.arange(len(task.rest))
    assert logits(networks[name], task.rest, everything).tobytes() == logits(task.source, task.rest, everything).tobytes()
    own = np.arange(len(task.own))
    assert logits(networks[name], task.own, own).tobytes() != logits(task.source, task.own, own).tobytes()


def test_a_loose_head_goes_further_from_the_shared_one(task, networks):
    tight, loose = (networks[name].student.head_weight_POK[task.row].norm() for name in ("finetune_head", "loose_head"))
    assert 0 < tight < loose


def test_what_comes_out_is_an_ordinary_student(networks):
    for name, network in networks.items():
        assert type(network.student) is Student, name
        fresh = Student(network.student.config)
        fresh.load_state_dict(network.student.state_dict())
        assert not any("parametrizations" in key for key in network.state_dict()), name


def test_an_adapter_folded_in_says_what_the_adapter_said(task):
    """f' = f + U D f before the heads, against the folded weights."""
    torch.manual_seed(0)
    weight_POK = torch.randn(3, 10, 20)
    up, down = torch.nn.Parameter(torch.randn(20, 4)), torch.nn.Parameter(torch.randn(4, 20))
    folded = ladder._Residual(2, up, down)(weight_POK)
    f_NK = torch.randn(50, 20)
    adapted_NK = f_NK + (up @ down @ f_NK.T).T
    said = adapted_NK @ (weight_POK[0] + weight_POK[2]).T
    torch.testing.assert_close(f_NK @ (folded[0] + folded[2]).T, said, rtol=1e-4, atol=1e-4)
    assert torch.equal(folded[:2], weight_POK[:2])


def test_the_critics_gradient_is_reversed():
    x = torch.ones(2, 3, requires_grad=True)
    ladder._Reversed.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), -ladder.REVERSED))


def test_interpolated_blocks_lie_between_the_source_and_the_finetuned(task, networks):
    source, tuned, mixed = of(task.source), of(networks["finetune"]), of(networks["interpolate"])
    for name in (name for block in ladder.BLOCKS.values() for name in block):
        low, high = torch.minimum(source[name], tuned[name]), torch.maximum(source[name], tuned[name])
        assert ((mixed[name] >= low - 1e-6) & (mixed[name] <= high + 1e-6)).all(), name


def test_a_few_users_train_only_on_their_own(task):
    """Other users' labels change nothing."""
    users = np.unique(task.own.user_M)[::2]
    few = subset(task.own, np.flatnonzero(np.isin(task.own.user_M, users)))
    assert set(few.user_M) == set(users) and few.starts_M[np.r_[True, np.diff(few.user_M) != 0]].all()
    assert np.array_equal(
        few.columns.features_NF.numpy(), task.own.columns.features_NF.numpy()[np.isin(task.own.user_M, users)]
    )


def checked(n_users: int = 40, each: int = 10):
    """Examples to check by, of which only what `choose` reads is set; and a score of y."""
    rng = np.random.default_rng(0)
    m = n_users * each
    y = (rng.random((m, 2)) < 0.4).astype(np.float32)
    fields = {field.name: None for field in dataclasses.fields(ladder.Examples)}
    own = ladder.Examples(
        **fields | {"user_M": np.repeat(np.arange(n_users), each), "y_MT": y, "tasks": ("a", "b"),
                    "learn_MT": np.zeros((m, 2), bool), "check_MT": np.ones((m, 2), bool)}
    )  # fmt: skip
    return own, lambda *skill: (np.array(skill) * (y - 0.4) + rng.normal(size=y.shape)).astype(np.float32)


def test_the_guard_takes_the_best_in_sum_unless_it_hurts_a_head():
    own, score = checked()
    z = {"scratch": score(0.5, 0.5), "finetune": score(8.0, 0.0), "lora": score(0.8, 0.8), "adapter": score(0.1, 0.1)}
    choice = choose(own, z)
    assert choice.rung == "lora" and choice.unguarded == "finetune"
    assert choice.reasons["finetune"].startswith("worse on b") and choice.reasons["lora"].startswith("allowed")
    assert choose(own, {"scratch": z["scratch"], "adapter": z["adapter"]}).rung == "scratch"


def test_the_guard_seldom_trips_on_equal_models_of_few_users():
    rng = np.random.default_rng(0)
    tripped = 0
    for _ in range(60):
        user = np.repeat(np.arange(11), rng.integers(2, 25, 11))
        taste = rng.normal(0, 1, 11)[user]
        y = (rng.random(len(user)) < 1 / (1 + np.exp(-taste))).astype(np.float32)
        ours, theirs = (0.8 * y + rng.normal(0, 1, len(user)) + rng.normal(0, 0.7, 11)[user] for _ in range(2))
        tripped += ladder._more_auc(y, ours, theirs, user).high(0.05) < 0
    assert tripped <= 6  # 2.5 % expected; percentiles of a bootstrap: about 15 %


def rehearsal(spread: float = 0.01, bias: float = 0.0, error: float = 0.0, **gains: float) -> Rehearsal:
    return Rehearsal(gains, spread, bias, error)


def test_with_few_to_check_by_the_rehearsal_decides_and_with_many_the_target():
    """`lora` did well on other platforms and does badly here, `adapter` the other way round."""
    few, score = checked(n_users=4, each=10)
    z = {"scratch": score(0.5, 0.5), "lora": score(0.4, 0.4), "adapter": score(1.0, 1.0)}
    past = rehearsal(0.001, error=0.02, lora=0.05, adapter=-0.05)
    assert choose(few, z, past).rung == "lora" and choose(few, z).rung == "adapter"
    many, score = checked(n_users=400)
    z = {"scratch": score(0.5, 0.5), "lora": score(0.4, 0.4), "adapter": score(3.0, 3.0)}
    assert choose(many, z, past._replace(error=0.001)).rung == "adapter"


def test_no_rehearsal_saves_a_rung_that_hurts_a_head_here():
    own, score = checked()
    z = {"scratch": score(0.5, 4.0), "lora": score(1.0, 0.0)}
    choice = choose(own, z, rehearsal(1e-6, lora=0.3))
    assert choice.rung == "scratch" and choice.reasons["lora"].startswith("worse on b") and choice.unguarded == "lora"


def test_where_nothing_can_be_checked_the_best_rehearsed_is_taken_if_it_gained():
    own, score = checked()
    own = dataclasses.replace(own, check_MT=np.zeros_like(own.check_MT))
    z = {"scratch": score(1, 1), "lora": score(1, 1), "adapter": score(1, 1)}
    assert choose(own, z, rehearsal(lora=0.01, adapter=0.02)).rung == "adapter"
    assert choose(own, z, rehearsal(lora=-0.01, adapter=-0.02)).rung == "scratch"


@given(
    *(st.floats(-0.5, 0.5) for _ in range(3)), *(st.floats(1e-6, 1.0) for _ in range(3)), st.integers(0, 19)
)  # fmt: skip
def test_what_was_seen_and_what_was_rehearsed_meet_between(seen, before, bias, variance, spread, error, freedom):
    past = rehearsal(spread, bias, error, lora=before)
    mean = past.expects("lora", Gain(seen, variance, freedom))
    if freedom < 1:
        assert mean == before
    else:
        low, high = sorted((seen - bias, before))
        assert low - 1e-12 <= mean <= high + 1e-12
        surer = past._replace(error=error / 10).expects("lora", Gain(seen, variance / 10, freedom))
        assert abs(surer - (seen - bias)) <= abs(mean - (seen - bias)) + 1e-12


def test_a_rung_that_was_not_rehearsed_is_expected_to_gain_nothing():
    past = rehearsal(0.01, error=0.01, lora=0.1)
    assert past.expects("adapter", Gain(0.2, 0.01, 5)) == pytest.approx(0.1)
    assert past.expects("lora", Gain(0.2, 0.01, 5)) == pytest.approx(0.15)


@pytest.fixture(scope="module")
def stand_ins(task, two_platforms):
    """Each of the two stands in for `till`."""
    rest, config = two_platforms
    return [understudy(rest, task.q_rest_MG, int(row), config, FEW) for row in np.unique(rest.platform_M)]


def test_an_understudy_is_taught_by_the_others_alone(stand_ins):
    for one in stand_ins:
        assert set(one.own.platform_M) == {one.row} and one.row not in one.rest.platform_M
        assert len(one.unlabelled_NF) < len(one.own)  # nothing after its last label to learn
    assert len({one.row for one in stand_ins}) == 2


def test_a_rehearsal_says_what_rungs_gain_over_scratch(stand_ins):
    found = rehearse(stand_ins, 8, (50.0, 50.0), ladder.REHEARSED, draws=2)
    assert set(found.gains) == set(ladder.REHEARSED) and found.spread > 0 and found.error > 0
    assert all(-1 < gain < 1 and gain != 0 for gain in found.gains.values())
    assert rehearse(stand_ins, 8, (50.0, 50.0), ladder.REHEARSED, draws=2) == found


def test_where_nobody_is_left_to_teach_a_rehearsal_says_nothing(stand_ins):
    nothing = [dataclasses.replace(one.rest, learn_MT=np.zeros_like(one.rest.learn_MT)) for one in stand_ins]
    alone = [one._replace(rest=rest) for one, rest in zip(stand_ins, nothing, strict=True)]
    assert set(rehearse(alone, 8, (50.0, 50.0), ladder.REHEARSED, draws=1).gains.values()) == {0.0}


def test_an_understudy_has_no_more_labels_than_the_target(stand_ins):
    own = stand_ins[0].own
    learn, check = ladder.labels_a_user(own)
    thin = ladder._thinned(own, (learn / 2, check * 2), np.random.default_rng(0))
    assert 0.3 * own.learn_MT.sum() < thin.learn_MT.sum() < 0.7 * own.learn_MT.sum()
    assert not (thin.learn_MT & ~own.learn_MT).any() and np.array_equal(thin.check_MT, own.check_MT)


def test_with_nothing_to_check_by_it_is_scratch():
    own, score = checked()
    own = dataclasses.replace(own, check_MT=np.zeros_like(own.check_MT))
    assert choose(own, {"scratch": score(1, 1), "lora": score(3, 3)}).rung == "scratch"


@pytest.mark.parametrize("rung", ["auto", "adapter"])
def test_transfer_gives_a_model_that_can_be_served(examples, config, history, rung):
    out = transfer(
        examples, config, history.categories, FOLD, FEW, target="till", prior_logits_3=np.zeros(3), rung=rung
    )  # fmt: skip
    assert isinstance(out.trained.model, Model) and out.trained.kind == "major"
    assert np.isfinite(out.trained.model.calibration_P32).all() and out.trained.fitted.check_loss < 1.0
    assert out.rung == rung if rung != "auto" else out.rung in RUNGS and set(out.reasons) == set(RUNGS) - {"scratch"}


def test_a_transferred_model_is_published_and_read_back(tmp_path, networks, config):
    for name in ("lora", "adapter"):
        model = Model("candidate", config, networks[name].student, None, identity_calibration(2), FOLD)
        version = publish(
            str(tmp_path), "m", model, metrics={}, training_range={}, reference_histograms={}, fold=FOLD, now_ms=0
        )  # fmt: skip
        read = load(str(tmp_path), "m", version, fold=FOLD, size="cpu")
        for key, tensor in networks[name].student.state_dict().items():
            assert torch.equal(read.student.state_dict()[key], tensor), (name, key)


def test_the_source_is_not_told_which_platform_an_event_is_of(history, config, examples):
    network = pretrain(examples, np.full((len(examples), 7), 1 / 7, np.float32), config, FEW)
    student = network.student
    assert not student.platform.weight.any() and not student.head_weight_POK[1:].any()
    assert student.head_weight_POK[0].any() and student.head_bias_PO[1:, :3].any()


def test_without_another_platform_there_is_nothing_to_transfer(task, config, history):
    with pytest.raises(ValueError, match="both are needed"):
        transfer(task.own, config, history.categories, FOLD, FEW, target="till", prior_logits_3=np.zeros(3))


def test_names_that_there_are_none_of_are_refused(examples, config, history):
    for wrong in ({"target": "nowhere"}, {"target": "till", "rung": "magic"}):
        with pytest.raises(ValueError, match=r"nowhere|magic"):
            transfer(examples, config, history.categories, FOLD, FEW, prior_logits_3=np.zeros(3), **wrong)


def test_the_settings_name_every_rung_and_want_a_target():
    assert tuple(RUNGS) == TRANSFER_RUNGS
    assert TrainerConfig(transfer="auto", transfer_to="till").transfer == "auto"
    for wrong in ({"transfer": "auto"}, {"transfer_to": "till"}):
        with pytest.raises(ValueError, match="transfer and transfer_to go together"):
            TrainerConfig(**wrong)
