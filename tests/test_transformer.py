"""The teacher's transformer: it sees no future, begins at the offsets, learns what they lack, and resumes to the byte."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import torch as safetensors

from models.errors import ConfigError
from models.fold import FEATURE_NAMES, N_FEATURES
from models.student import Columns
from trainer import transformer, transformer_fit
from trainer.examples import Examples
from trainer.fit import Schedule
from trainer.metrics import auc
from trainer.transformer import SIZES, TransformerConfig, batches, windows
from trainer.transformer_fit import fit_transformer, load_network, save_network

PLATFORMS, TASKS = ("alpha", "beta"), ("click", "purchase", "return")
MINUTE_MS, START_MS = 60_000, 1_700_000_000_000
SCHEDULE = Schedule(epochs=2, rate=2e-3, seed=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes) -> TransformerConfig:
    small = {"width": 16, "layers": 1, "heads": 2, "window": 8, "item_dim": 8, "item_buckets": 32, "dropout": 0.1}
    return TransformerConfig.of("cpu", N_FEATURES, PLATFORMS, TASKS, **(small | changes))


def make_examples(lengths: list[int], seed: int = 0, items: int = 12, platforms: int = 3, noise: bool = True) -> Examples:
    """Users of these lengths; of all tasks: did the event before have one of the first half of the items? A third of the
    users is there to check by. Platform 0 is not known."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    user_M = np.repeat(np.arange(len(lengths)), lengths)
    begins_M = np.r_[True, user_M[1:] != user_M[:-1]][:n]
    ts_M = START_MS + np.cumsum(rng.integers(1, 30, n)) * MINUTE_MS
    item_M = rng.integers(1, items + 1, n)
    features_MF = np.zeros((n, N_FEATURES), np.float32)
    features_MF[:, : N_FEATURES // 2] = rng.normal(size=(n, N_FEATURES // 2)) * noise
    features_MF[:, FEATURE_NAMES.index("price")] = rng.integers(0, 256, n) / np.float32(255)
    before_M = np.r_[0, item_M[:-1]][:n]
    y_MT = np.repeat(((before_M > items // 2) & ~begins_M)[:, None], len(TASKS), axis=1).astype(np.float32)
    y_MT[rng.random(y_MT.shape) < 0.1] = 0.0
    judges_M1 = (user_M % 3 == 0)[:, None]
    return Examples(
        index_M=np.arange(n),
        columns=Columns(
            torch.from_numpy(features_MF),
            torch.from_numpy(item_M.astype(np.int64)),
            torch.zeros(n, dtype=torch.int64),
            torch.from_numpy((user_M % platforms).astype(np.int64)),
            torch.zeros(n),
        ),
        starts_M=begins_M,
        user_M=user_M,
        ts_M=ts_M,
        tasks=TASKS,
        y_MT=y_MT,
        learn_MT=np.repeat(~judges_M1, len(TASKS), axis=1),
        check_MT=np.repeat(judges_M1, len(TASKS), axis=1),
        next_M=np.zeros(n, np.uint32),
        learn_next_M=np.zeros(n, bool),
        category_M=np.zeros(n, np.uint32),
        views_M=np.zeros(n),
    )


def subset(examples: Examples, at: np.ndarray) -> Examples:
    fields = {field.name: getattr(examples, field.name) for field in dataclasses.fields(examples)}
    cut = {name: value[at] for name, value in fields.items() if name.endswith(("_M", "_MT"))}
    return dataclasses.replace(
        examples, **cut, columns=Columns(*(column[torch.from_numpy(at)] for column in examples.columns))
    )


def make_offsets(examples: Examples, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(-0.3, 0.3, examples.y_MT.shape).astype(np.float32)


def weights(fitted) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in fitted.network.state_dict().items()}


@pytest.fixture(scope="module")
def examples():
    return make_examples([1, 2, 5, 8, 9, 13, 20, 31, 3, 1, 12])


@pytest.fixture(scope="module")
def loud(examples):
    """Not trained; every weight is large enough to matter."""
    fitted = fit_transformer(examples, make_offsets(examples), tiny(item_floor=2), SCHEDULE._replace(epochs=0))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in fitted.network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return fitted


@pytest.fixture(scope="module")
def arguments():
    """Of a run with several batches an epoch, and something to gain."""
    busy = make_examples([30] * 50, noise=False, items=4)
    return busy, make_offsets(busy) - 1.0, tiny(), SCHEDULE._replace(epochs=3, rate=1e-2)


# ── what it sees ─────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_later_event_changes_nothing_before_it(loud, examples, data):
    offsets_MT = make_offsets(examples)
    at = data.draw(st.integers(0, len(examples) - 1))
    before_MT = loud.logits(examples, offsets_MT)
    changed_MT, columns = offsets_MT.copy(), Columns(*(column.clone() for column in examples.columns))
    columns.features_NF[at] += 1.0
    columns.item_N[at] = data.draw(st.integers(0, 2**32 - 1))
    columns.platform_N[at] = (columns.platform_N[at] + 1) % 3
    changed_MT[at] += 1.0
    ts_M = examples.ts_M.copy()
    ts_M[at] += data.draw(st.integers(-MINUTE_MS, MINUTE_MS))
    after_MT = loud.logits(dataclasses.replace(examples, columns=columns, ts_M=ts_M), changed_MT)
    sees_M = (examples.user_M == examples.user_M[at]) & (np.arange(len(examples)) >= at)
    assert after_MT[~sees_M].tobytes() == before_MT[~sees_M].tobytes()
    assert (after_MT[at] != before_MT[at]).all()


def test_what_came_later_changes_nothing_not_even_the_windows(loud, examples):
    offsets_MT = make_offsets(examples)
    whole_MT = loud.logits(examples, offsets_MT)
    for keep in (1, 8, 9, 13, 30):
        place_M = np.arange(len(examples)) - np.searchsorted(examples.user_M, examples.user_M)
        at = np.flatnonzero(place_M < keep)
        np.testing.assert_allclose(loud.logits(subset(examples, at), offsets_MT[at]), whole_MT[at], atol=2e-5)


def test_it_says_the_same_of_a_user_alone_and_among_others(loud, examples):
    offsets_MT = make_offsets(examples)
    together_MT = loud.logits(examples, offsets_MT)
    for user in np.unique(examples.user_M):
        at = np.flatnonzero(examples.user_M == user)
        np.testing.assert_allclose(loud.logits(subset(examples, at), offsets_MT[at]), together_MT[at], atol=2e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 10), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_windows_speak_of_every_event_once_with_half_a_window_before(lengths, half, seed, share):
    user_M = np.repeat(np.arange(len(lengths)) * 3, lengths)
    place_M = np.concatenate([np.arange(0), *(np.arange(n) for n in lengths)])
    wanted_M = np.random.default_rng(seed).random(len(user_M)) < share
    for wanted, wins in ((None, windows(user_M, 2 * half)), (wanted_M, windows(user_M, 2 * half, wanted_M))):
        spoken_M = np.zeros(len(user_M), int)
        for first, length, skip in zip(*wins, strict=True):
            assert 0 <= skip < length <= 2 * half
            assert len(set(user_M[first : first + length])) == 1
            spoken = np.arange(first + skip, first + length)
            spoken_M[spoken] += 1
            assert (spoken - first >= np.minimum(place_M[spoken], half)).all()
            assert wanted is None or wanted[spoken].any()
        assert (spoken_M == 1).all() if wanted is None else (spoken_M[wanted] == 1).all() and spoken_M.max(initial=0) <= 1


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 200), st.none() | st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_batches_hold_every_window_once_within_their_bound(lengths, tokens, seed):
    length_W = np.array(lengths, np.int64)
    parts = batches(length_W, tokens, None if seed is None else np.random.default_rng(seed))
    assert sorted(np.concatenate([np.empty(0, int), *parts]).tolist()) == list(range(len(lengths)))
    assert all(len(part) == 1 or len(part) * (length_W[part].max() + 1) <= tokens for part in parts)


def test_items_and_platforms_that_it_never_saw_are_fine(loud, examples):
    strange = dataclasses.replace(examples, columns=examples.columns._replace(item_N=examples.columns.item_N + 2**31))
    unknown = dataclasses.replace(strange, columns=strange.columns._replace(platform_N=torch.zeros(len(examples)).long()))
    for of in (strange, unknown, subset(examples, np.arange(0))):
        logits_MT = loud.logits(of, make_offsets(of))
        assert logits_MT.shape == (len(of), len(TASKS)) and logits_MT.dtype == np.float32 and np.isfinite(logits_MT).all()


def test_an_item_has_an_embedding_of_its_own_above_the_floor_and_on_its_platform_alone(examples):
    network = fit_transformer(examples, make_offsets(examples), tiny(item_floor=3), SCHEDULE._replace(epochs=0)).network
    learned_M = examples.learn_MT[:, 0]
    platform_M, item_M = examples.platform_M, examples.columns.item_N.numpy()
    row_M, bucket_M = network.item_rows(platform_M, item_M)
    for row, bucket, platform, item in zip(row_M, bucket_M, platform_M, item_M, strict=True):
        often = (learned_M & (platform_M == platform) & (item_M == item)).sum() >= 3 and platform > 0
        assert (row > network.config.item_buckets) == often and (often or row == bucket)
    assert network.item_rows(np.array([1, 2]), np.array([0, 0]))[0].tolist() == [0, 0]


def test_prices_are_percentiles_within_the_platform(examples):
    many = make_examples([40] * 30, platforms=2)
    many.columns.features_NF[:, FEATURE_NAMES.index("price")] *= torch.where(many.columns.platform_N == 1, 1.0, 0.1)
    table_PQ = fit_transformer(many, make_offsets(many), tiny(), SCHEDULE._replace(epochs=0)).network.percentile_PQ
    assert (table_PQ.diff(dim=1) >= 0).all() and table_PQ.min() >= 0 and table_PQ.max() <= 1
    assert table_PQ[1, 128] == pytest.approx(0.5, abs=0.08)
    assert torch.equal(table_PQ[2], table_PQ[0]), "a platform without learning events is like all together"
    assert table_PQ[0, 128] > table_PQ[1, 128]


# ── what it learns ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_begins_at_the_offsets_exactly(examples):
    offsets_MT = 30.0 * make_offsets(examples)
    network = fit_transformer(examples, offsets_MT, tiny(), SCHEDULE._replace(epochs=0))
    assert network.logits(examples, offsets_MT).tobytes() == offsets_MT.tobytes()


@pytest.mark.parametrize("lacks", ["learn_MT", "check_MT"])
def test_without_labels_nothing_is_added(examples, lacks):
    without = dataclasses.replace(examples, **{lacks: np.zeros_like(examples.learn_MT)})
    offsets_MT = make_offsets(examples)
    fitted = fit_transformer(without, offsets_MT, tiny(), SCHEDULE)
    assert not fitted.adds and fitted.epochs == 0
    assert fitted.logits(without, offsets_MT).tobytes() == offsets_MT.tobytes()


def test_what_holds_for_the_learners_alone_is_not_kept():
    examples = make_examples([20] * 30)
    examples.y_MT[examples.check_MT] = 1.0 - examples.y_MT[examples.check_MT]
    offsets_MT = np.zeros_like(examples.y_MT)
    fitted = fit_transformer(examples, offsets_MT, tiny(), SCHEDULE._replace(epochs=4, patience=3, rate=1e-2))
    assert not fitted.adds and fitted.epochs == 0 and fitted.check_loss == fitted.offset_loss
    assert fitted.logits(examples, offsets_MT).tobytes() == offsets_MT.tobytes()


def test_it_learns_from_the_order_what_the_offsets_lack():
    examples = make_examples([30] * 40, noise=False, items=4, platforms=2)
    offsets_MT = make_offsets(examples)
    schedule = SCHEDULE._replace(epochs=18, rate=2e-2, patience=8)
    fitted = fit_transformer(examples, offsets_MT, tiny(window=16, dropout=0.05), schedule)
    logits_MT, own_M = fitted.logits(examples, offsets_MT), examples.check_MT[:, 0]
    assert fitted.adds and fitted.check_loss < fitted.offset_loss - 0.1 and fitted.epochs > 0
    assert fitted.check_loss == pytest.approx(transformer_fit.check_loss(examples, logits_MT), abs=1e-5)
    for task in range(len(TASKS)):
        assert auc(examples.y_MT[own_M, task], offsets_MT[own_M, task]) < 0.55
        assert auc(examples.y_MT[own_M, task], logits_MT[own_M, task]) > 0.75


def test_a_task_without_weight_is_not_learned_and_the_others_are(examples):
    config = tiny(task_weights={"purchase": 0.0}, next_item_weight=0.0)
    offsets_MT = make_offsets(examples)
    fitted = fit_transformer(examples, offsets_MT, config, SCHEDULE._replace(epochs=1), warm_start=None)
    assert fitted.network.query is None
    assert (fitted.network.bias_T != 0).tolist() == [fitted.adds, False, fitted.adds]


def test_users_shown_as_strangers_train_what_unknown_platforms_and_items_use(arguments, monkeypatch):
    monkeypatch.setattr(transformer_fit, "STRANGER", 1.0)
    examples, offsets_MT, _, schedule = arguments
    config = tiny(next_item_weight=0.0)
    fits = [fit_transformer(examples, offsets_MT, config, schedule._replace(epochs=epochs)) for epochs in (0, 3)]
    before, after = (fitted.network for fitted in fits)
    # What is not learned from is only decayed: multiplied by one number.
    platform_PD = (after.platform.weight / before.platform.weight).detach()
    assert platform_PD[0].std() > 1e-4 > platform_PD[1:].std()
    item_RI, own = (after.item.weight / before.item.weight).detach(), 1 + config.item_buckets
    assert item_RI[:own].std() > 1e-4 > item_RI[own:].std() and len(item_RI) > own


def test_the_next_item_loss_is_that_of_the_whole_softmax(examples, loud, monkeypatch):
    monkeypatch.setattr(transformer_fit, "NEGATIVES", 200_000)
    torch.manual_seed(0)
    seen_M = transformer_fit.seen(examples)
    run = transformer_fit._Run(loud.network, examples, make_offsets(examples), None, SCHEDULE, seen_M, lambda: None)
    at_N = torch.arange(len(examples))
    query_NI, of_N = torch.randn(len(examples), loud.network.config.item_dim), run.next_weight_M > 0
    platform_V, first = loud.network.vocabulary_V >> 32, 1 + loud.network.config.item_buckets
    drawn_V = torch.isfinite(run.log_q_R[first:])
    expected, table_RI = 0.0, loud.network.item.weight.detach()
    for i in of_N.nonzero().flatten().tolist():
        row = int(run.next_M[i]) - first
        same = ((platform_V == platform_V[row]) & drawn_V).nonzero().flatten()
        logits = table_RI[first:] @ query_NI[i]
        expected += float(run.next_weight_M[i] * (torch.logsumexp(logits[same], 0) - logits[row]))
        following = int(examples.columns.item_N[i + 1])
        assert seen_M[i + 1] and int(loud.network.vocabulary_V[row]) & 0xFFFFFFFF == following
    assert of_N.sum() > 20
    found = float(run._next_item_loss(query_NI, at_N).detach())
    assert found == pytest.approx(expected / float(run.next_weight_M.sum()), rel=0.02)


def test_an_item_s_text_is_read_and_asked_for_once(examples):
    asked = []

    def text(hash_I: np.ndarray) -> np.ndarray:
        asked.append(hash_I)
        return np.stack([hash_I, hash_I > 6, hash_I * 0 + 1], axis=1).astype(np.float32) / 12

    offsets_MT, config = make_offsets(examples), tiny(text_dim=3)
    fitted = fit_transformer(examples, offsets_MT, config, SCHEDULE._replace(epochs=0), text=text)
    torch.nn.init.normal_(fitted.network.last.weight)
    one, other = (fitted.logits(examples, offsets_MT, text=words) for words in (text, lambda hash_I: -text(hash_I)))
    assert (one != other).all()
    assert all(hash_I.dtype == np.uint32 and len(set(hash_I.tolist())) == len(hash_I) == 12 for hash_I in asked)
    with pytest.raises(ValueError, match="text must be given"):
        fitted.logits(examples, offsets_MT)


# ── stop and go on ───────────────────────────────────────────────────────────────────────────────────────────────────


class Stopped(Exception):
    pass


def stopping_after(calls: int):
    left = iter(range(calls))

    def check() -> None:
        if next(left, None) is None:
            raise Stopped

    return check


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """→ the run that was never stopped, its checkpoint, how often it called `check`."""
    calls, folder = [], tmp_path_factory.mktemp("whole")
    fitted = fit_transformer(*arguments, checkpoint=folder, check=lambda: calls.append(1))
    return fitted, (folder / "epoch-000003.safetensors").read_bytes(), len(calls)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(arguments, whole, tmp_path, share):
    straight, tensors, calls = whole
    assert straight.adds
    with pytest.raises(Stopped):
        fit_transformer(*arguments, checkpoint=tmp_path, check=stopping_after(int(share * calls)))
    torch.manual_seed(7)  # what else is drawn meanwhile does not matter
    again = fit_transformer(*arguments, checkpoint=tmp_path)
    assert weights(again) == weights(straight)
    assert (again.epochs, again.loss, again.check_loss) == (straight.epochs, straight.loss, straight.check_loss)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "epoch-000003.safetensors"]
    assert (tmp_path / "epoch-000003.safetensors").read_bytes() == tensors
    finished = fit_transformer(*arguments, checkpoint=tmp_path, check=stopping_after(0))
    assert weights(finished) == weights(straight)
    assert weights(fit_transformer(*arguments)) == weights(straight)


def test_training_leaves_the_caller_s_random_numbers_alone(examples):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fit_transformer(examples, make_offsets(examples), tiny(), SCHEDULE._replace(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_another_run_or_without_its_bytes_is_refused(examples, tmp_path):
    offsets_MT, schedule = make_offsets(examples), SCHEDULE._replace(epochs=1)
    fit_transformer(examples, offsets_MT, tiny(), schedule, checkpoint=tmp_path)
    for other in ((examples, offsets_MT + 1, tiny(), schedule), (examples, offsets_MT, tiny(window=4), schedule)):
        with pytest.raises(ConfigError, match="other data"):
            fit_transformer(*other, checkpoint=tmp_path)
    tensors = tmp_path / "epoch-000001.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ConfigError, match="not those that were written"):
        fit_transformer(examples, offsets_MT, tiny(), schedule, checkpoint=tmp_path)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(ConfigError, match="Delete the folder"):
        fit_transformer(examples, offsets_MT, tiny(), schedule, checkpoint=tmp_path)


def _rank(rank: int, folder: str, arguments: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    fitted = fit_transformer(*arguments, checkpoint=f"{folder}/checkpoint")
    safetensors.save_file(fitted.network.state_dict(), f"{folder}/{rank}.safetensors")
    Path(folder, f"{rank}.json").write_text(json.dumps([fitted.loss, fitted.check_loss, fitted.epochs, fitted.adds]))
    torch.distributed.destroy_process_group()


def test_two_ranks_end_with_the_same_parameters_and_near_a_single_one(arguments, whole, tmp_path):
    # A fork has torch loaded already; with a GPU, autograd's threads forbid it.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(_rank, (str(tmp_path), arguments), nprocs=2, start_method=method)
    one, other = ((tmp_path / f"{rank}.safetensors").read_bytes() for rank in (0, 1))
    assert one == other
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(whole[0].loss, rel=0.05)
    assert results[0][1] == pytest.approx(whole[0].check_loss, rel=0.02)
    assert [path.name for path in (tmp_path / "checkpoint").glob("epoch-*")] == ["epoch-000003.safetensors"]


# ── warm start, settings, scalars ────────────────────────────────────────────────────────────────────────────────────


def test_a_warm_start_copies_what_fits(examples, loud):
    offsets_MT = make_offsets(examples)[:, [2, 0]]
    config = msgspec.structs.replace(tiny(item_floor=1), platforms=("gamma", "beta"), tasks=("return", "click"))
    fields = {name: getattr(examples, name)[:, [2, 0]] for name in ("y_MT", "learn_MT", "check_MT")}
    own = dataclasses.replace(examples, tasks=config.tasks, **fields)
    before = weights(loud)
    schedule = SCHEDULE._replace(epochs=0)
    cold, seen_M = fit_transformer(own, offsets_MT, config, schedule).network, transformer_fit.seen(own)
    warm = transformer.Transformer(config, transformer_fit._vocabulary(own, seen_M, config))
    fresh = warm.item.weight.detach().clone()
    warm.start_from(loud.network)
    assert weights(loud) == before and len(cold.vocabulary_V) == len(warm.vocabulary_V)
    theirs = loud.network
    assert torch.equal(warm.blocks[0].qkv.weight, theirs.blocks[0].qkv.weight)
    assert torch.equal(warm.platform.weight[[0, 2]], theirs.platform.weight[[0, 2]])
    assert torch.equal(warm.bias_T, theirs.bias_T[[2, 0]]) and torch.equal(warm.task.weight, theirs.task.weight[[2, 0]])
    assert torch.equal(warm.from_offset.weight, theirs.from_offset.weight[:, [2, 0]])
    first, their_keys = 1 + config.item_buckets, theirs.vocabulary_V.tolist()
    copied = 0
    for place, key in enumerate(warm.vocabulary_V.tolist()):
        knows = key >> 32 == 2 and key in their_keys
        expected = theirs.item.weight[first + their_keys.index(key)] if knows else fresh[first + place]
        assert torch.equal(warm.item.weight[first + place], expected)
        copied += knows
    assert 0 < copied < len(warm.vocabulary_V)


def test_a_warm_start_that_is_best_is_kept_and_one_of_another_width_does_no_harm(arguments, whole):
    examples, offsets_MT, *_ = arguments
    whole, last = whole[0], whole[0].network
    wide = fit_transformer(
        examples, offsets_MT, tiny(width=24, text_dim=0), SCHEDULE._replace(epochs=1), warm_start=whole.network
    )
    assert np.isfinite(wide.logits(examples, offsets_MT)).all()
    again = fit_transformer(examples, offsets_MT, tiny(), SCHEDULE._replace(epochs=1, rate=0.0), warm_start=last)
    assert again.check_loss <= whole.check_loss + 1e-6


def test_a_network_that_was_kept_is_the_same_and_what_is_no_network_is_refused(arguments, whole, tmp_path):
    examples, offsets_MT, *_ = arguments
    path = tmp_path / "network.safetensors"
    save_network(whole[0].network, path)
    again = load_network(path)
    assert again.config == whole[0].network.config
    fitted = dataclasses.replace(whole[0], network=again)
    assert fitted.logits(examples, offsets_MT).tobytes() == whole[0].logits(examples, offsets_MT).tobytes()
    path.write_bytes(path.read_bytes()[:-8])
    safetensors.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for wrong in (path, tmp_path / "other.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(ConfigError, match="Delete it"):
            load_network(wrong)


def test_settings_that_do_not_fit_are_refused_with_the_reason(examples):
    offsets_MT = make_offsets(examples)
    for changes in ({"heads": 3}, {"window": 7}, {"task_weights": {"churn": 1.0}}, {"item_floor": 0}):
        with pytest.raises(ConfigError):
            fit_transformer(examples, offsets_MT, tiny(**changes), SCHEDULE)
    with pytest.raises(ConfigError, match="choose one of cpu"):
        TransformerConfig.of("huge", N_FEATURES, PLATFORMS, TASKS)
    for wrong in (offsets_MT[:, :2], np.full_like(offsets_MT, np.nan)):
        with pytest.raises(ValueError, match="offsets must be finite"):
            fit_transformer(examples, wrong, tiny(), SCHEDULE)
    with pytest.raises(ValueError, match="platform"):
        fit_transformer(examples, offsets_MT, msgspec.structs.replace(tiny(), platforms=("alpha",)), SCHEDULE)


def test_sizes_and_counted_operations():
    flops = []
    for size in SIZES:
        config = TransformerConfig.of(size, N_FEATURES, PLATFORMS, TASKS)
        config.check()
        assert (config.bf16, config.compiled) == ((size != "cpu"),) * 2
        flops.append(config.flops_per_event())
    assert flops == sorted(flops)
    counted = 0
    config = TransformerConfig.of("cpu", N_FEATURES, PLATFORMS, TASKS)
    for name, module in transformer.Transformer(config, np.empty(0, np.int64)).named_modules():
        if isinstance(module, torch.nn.Linear) and name != "query":
            counted += 2 * module.weight.numel() * (len(TASKS) if name == "last" else 1)
    attention = 2 * config.layers * 2 * (config.window + 1) * config.width
    assert config.flops_per_event() == counted + attention


def test_scalars_go_to_tensorboard(examples, tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="crosscurrent[teacher]")
    fitted = fit_transformer(examples, make_offsets(examples), tiny(), SCHEDULE, log_dir=tmp_path)
    log = reader.EventAccumulator(str(tmp_path))
    log.Reload()
    assert set(log.Tags()["scalars"]) >= {"train/loss", "train/rate", "check/log_loss"}
    losses = [point.value for point in log.Scalars("check/log_loss")]
    assert min(losses) == pytest.approx(fitted.check_loss, abs=1e-3)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"crosscurrent\[teacher\]"):
        fit_transformer(examples, make_offsets(examples), tiny(), SCHEDULE, log_dir=tmp_path)
