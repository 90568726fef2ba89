"""The sequence baselines: causal, they learn what is there to learn, and the best epoch is kept."""

import numpy as np
import pytest
import torch
from test_transformer import make_examples

from models.events import EVENT
from trainer import sequences
from trainer.examples import check_loss
from trainer.history import History
from trainer.metrics import auc, ranks
from trainer.sequences import BODIES, Body, EventModel, Settings, fit_events, fit_next, next_scores

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"width": 16, "window": 8, "dropout": 0.0, "batch_events": 64, "rate": 2e-2, "patience": 9}


@pytest.mark.parametrize("body", BODIES)
def test_a_body_sees_no_future(body):
    torch.manual_seed(0)
    network, x_BLD = Body(Settings(body, **SMALL)).eval(), torch.randn(3, 7, 16)
    changed_BLD = x_BLD.clone()
    changed_BLD[:, 4] += 1.0
    with torch.no_grad():
        before, after = network(x_BLD), network(changed_BLD)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert (before[:, 4:] != after[:, 4:]).any(dim=2).all()


def test_there_is_no_other_body():
    with pytest.raises(ValueError, match="one of gru, attention, mean"):
        Body(Settings("lstm"))


def walks(n_sequences: int = 240, n_items: int = 12, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Each item is followed by the one three on, nine times of ten; item, sequence, next (0: the last)."""
    rng, length = np.random.default_rng(seed), 6
    item = np.empty((n_sequences, length), np.int64)
    item[:, 0] = rng.integers(0, n_items, n_sequences)
    for step in range(1, length):
        lost = rng.random(n_sequences) < 0.1
        item[:, step] = np.where(lost, rng.integers(0, n_items, n_sequences), (item[:, step - 1] + 3) % n_items)
    following = np.c_[item[:, 1:] + 1, np.zeros(n_sequences, np.int64)]
    return item.ravel() + 1, np.repeat(np.arange(n_sequences), length), following.ravel()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("sampled", [False, True], ids=["full softmax", "sampled"])
def test_the_next_item_is_learned(body, sampled, monkeypatch):
    if sampled:
        monkeypatch.setattr(sequences, "FULL_SOFTMAX", 1)
        monkeypatch.setattr(sequences, "NEGATIVES", 8)
    item, sequence, following = walks()
    known, learns = following > 0, sequence % 3 > 0
    settings = Settings(body, epochs=12, **SMALL)
    network = fit_next(item, sequence, following, known & learns, known & ~learns, 12, settings)
    hits, seen = 0, np.zeros(len(item), int)
    for at, scores_NV in next_scores(network, item, sequence, known & ~learns, batch_events=64):
        assert scores_NV.shape == (len(at), 12)
        hits += (ranks(scores_NV, following[at] - 1) == 1).sum()
        seen[at] += 1
    assert (seen == (known & ~learns)).all()
    assert hits / seen.sum() > 0.75


def test_scores_do_not_depend_on_what_is_scored_with_them():
    item, sequence, following = walks(40)
    network = sequences.NextItem(12, Settings("attention", **SMALL)).eval()
    one = dict(_by_event(network, item, sequence, following > 0, 500))
    two = dict(_by_event(network, item, sequence, (following > 0) & (sequence % 2 == 0), 30))
    assert set(two) < set(one)
    for at, scores in two.items():
        np.testing.assert_allclose(scores, one[at], atol=1e-5)


def _by_event(network, item, sequence, wanted, batch):
    for at, scores in next_scores(network, item, sequence, wanted, batch):
        yield from zip(at.tolist(), scores, strict=True)


def history_of(examples) -> History:
    events = np.zeros(len(examples), EVENT)
    events["item"], events["ts"] = examples.columns.item_N.numpy(), examples.ts_M
    events["kind"] = 1
    zeros = np.zeros(len(examples), np.int32)
    users = [str(u) for u in range(int(examples.user_M.max()) + 1)]
    return History(events, examples.user_M, zeros, zeros, np.arange(len(examples)), users, ("alpha", "beta"), {})


@pytest.mark.parametrize("body", ["gru", "attention"])
def test_what_the_event_before_was_is_learned_from_raw_events(body):
    examples = make_examples([12] * 90, platforms=2)
    logits = fit_events(examples, history_of(examples), 2, 7, Settings(body, epochs=12, **SMALL))
    assert logits.shape == examples.y_MT.shape and np.isfinite(logits).all()
    at = examples.check_MT[:, 0]
    assert auc(examples.y_MT[at, 0], logits[at, 0]) > 0.8


def test_the_epoch_that_did_best_is_kept():
    """Labels are noise: the first epoch is the best on others' labels, however long it trains."""
    examples = make_examples([8] * 40)
    rng = np.random.default_rng(0)
    examples.y_MT[:] = rng.random(examples.y_MT.shape) < 0.5
    history, settings = history_of(examples), Settings("mean", epochs=1, **SMALL | {"rate": 5e-2})
    long = fit_events(examples, history, 2, 7, settings._replace(epochs=12))
    assert check_loss(examples, long) < 0.9
    again = fit_events(examples, history, 2, 7, settings._replace(epochs=12))
    np.testing.assert_array_equal(long, again)


def test_logits_are_of_the_events_own_platform():
    torch.manual_seed(0)
    examples = make_examples([5] * 6)
    network = EventModel(7, 2, 3, Settings("mean", **SMALL)).eval()
    raw = sequences._raw(examples, history_of(examples))
    at = np.arange(5)[None]
    with torch.no_grad():
        before = network(sequences._Raw(*(column[at] for column in raw)))
        own = int(examples.platform_M[0])
        network.head.weight.view(3, 3, -1)[(own + 1) % 3] += 1.0
        same = network(sequences._Raw(*(column[at] for column in raw)))
        network.head.weight.view(3, 3, -1)[own] += 1.0
        other = network(sequences._Raw(*(column[at] for column in raw)))
    assert torch.equal(before, same) and not torch.allclose(before, other)
