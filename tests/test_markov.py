"""The hidden Markov model of shoppers: the belief is Bayes', learning finds what is hidden, nobody's own label is heard."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_history import examples_until, make_config, make_history

from models.events import KINDS, PURCHASE, VIEW
from trainer import markov, metrics
from trainer.markov import PLACES, G, Markov, Size, beliefs, events_of, hidden_markov, learn, log_likelihood, rates

pytestmark = pytest.mark.usefixtures("one_thread")
MINUTE_MS, DAY_MS = 60_000, 86_400_000
SMALL = Size(classes=2, states=2, rounds=15, first_rounds=10)


def random_model(rng: np.random.Generator, c: int = 2, s: int = 3, p: int = 2) -> Markov:
    def shares(axis, *shape):
        x = rng.gamma(1.0, 1.0, shape)
        return x / x.sum(axis, keepdims=True)

    return Markov(
        shares(None, c, s),
        shares(3, G * p, c, s, s),
        shares(1, p * PLACES, G, c, s),
        shares(0, p, c, s),
        shares(1, p, len(KINDS), c, s),
    )


def random_events(rng: np.random.Generator, n: int, p: int = 2):
    user = np.sort(rng.integers(0, 4, n))
    gaps = rng.choice([0, 0, 3000, 5 * MINUTE_MS, 3 * 60 * MINUTE_MS, 20 * DAY_MS, -1000], n)
    return user, np.cumsum(gaps), rng.integers(0, p, n), rng.integers(0, len(KINDS), n)


def bayes(user, ts, platform, kind, model: Markov) -> np.ndarray:
    """The forward filter, said again in plain Python."""
    out, belief = [], None
    for i in range(len(user)):
        emit = model.kind_PKCS[platform[i], kind[i]]
        if i == 0 or user[i] != user[i - 1]:
            belief, last, before, place = model.start_CS * model.platform_PCS[platform[i]] * emit, ts[i], platform[i], 0
        elif ts[i] >= last:
            silence = int(np.searchsorted(markov.SILENCE_S, (ts[i] - last) / 1000.0, side="right"))
            told = belief * model.silence_UGCS[before * PLACES + min(place, PLACES - 1), silence]
            belief = np.einsum("cr,crs->cs", told, model.move_VCSS[silence * len(model.platform_PCS) + platform[i]]) * emit
            if silence >= markov.NEW_SESSION:
                belief = belief * model.platform_PCS[platform[i]]
            place = place + 1 if ts[i] == last else 0
            last, before = ts[i], platform[i]
        belief = belief / belief.sum()
        out.append(belief.ravel())
    return np.array(out)


@given(st.integers(0, 2**31), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_the_belief_is_that_of_bayes_and_looks_at_nothing_later(seed, n):
    rng = np.random.default_rng(seed)
    model, columns = random_model(rng), random_events(rng, n)
    said = beliefs(events_of(*columns, 2), model)
    np.testing.assert_allclose(said, bayes(*columns, model), atol=1e-5)
    np.testing.assert_allclose(said.sum(1), 1.0, rtol=1e-5)
    half = n // 2
    np.testing.assert_array_equal(beliefs(events_of(*(column[:half] for column in columns), 2), model), said[:half])


def hidden_stream(n_users: int = 150, seed: int = 0):
    """Two classes of users, who come often or seldom, and two moods that last: browsing, or buying every second act."""
    rng = np.random.default_rng(seed)
    columns, hidden = [], []
    for user in range(n_users):
        often, mood, ts = user % 2, 0, 0
        for _ in range(60):
            mood = mood if rng.random() < 0.95 else 1 - mood
            ts += int(MINUTE_MS if rng.random() < 0.7 else rng.exponential((0.3 if often else 6.0) * DAY_MS) + 2 * 3_600_000)
            columns.append((user, ts, 0, PURCHASE if mood and rng.random() < 0.5 else VIEW))
            hidden.append((often, mood))
    return tuple(map(np.array, zip(*columns, strict=True))), np.array(hidden)


def test_learning_finds_class_and_state_that_no_event_names():
    columns, hidden = hidden_stream()
    events, learned_M = events_of(*columns, 1), columns[0] < 100
    model, alike = (learn(events, learned_M, 1, SMALL._replace(classes=c)) for c in (2, 1))
    assert log_likelihood(events, ~learned_M, model) > log_likelihood(events, ~learned_M, alike) + 0.05
    assert learn(events, learned_M, 1, SMALL).move_VCSS.tobytes() == model.move_VCSS.tobytes()
    belief_MX = beliefs(events, model)
    said_M2 = np.stack([belief_MX @ rates(belief_MX[learned_M], hidden[learned_M, i]) for i in (0, 1)], axis=1)
    last_M = ~learned_M & (np.arange(len(learned_M)) % 60 == 59)
    assert metrics.auc(hidden[last_M, 0], said_M2[last_M, 0]) > 0.95
    assert metrics.auc(hidden[~learned_M, 1], said_M2[~learned_M, 1]) > 0.75


def test_rates_of_what_is_known_for_sure_are_the_shares_that_came_true():
    rng = np.random.default_rng(0)
    state = rng.integers(0, 3, 60_000)
    y = (rng.random(len(state)) < np.array([0.1, 0.5, 0.8])[state]).astype(np.float32)
    np.testing.assert_allclose(rates(np.eye(3, dtype=np.float32)[state], y), (0.1, 0.5, 0.8), atol=0.01)
    nothing = rates(np.empty((0, 3), np.float32), np.empty(0))
    np.testing.assert_allclose(nothing, 0.5)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    history = make_history(tmp_path_factory.mktemp("history"))
    return examples_until(history, make_config(history))


def test_a_member_has_not_heard_of_the_users_of_whom_it_speaks_and_answers_later_events(examples):
    member = hidden_markov(SMALL)(examples, np.empty(0))
    learned_M = examples.learn_MT.any(axis=1)
    one = examples.user_M[learned_M][0]
    turned_M1 = ((examples.user_M == one) & learned_M)[:, None]
    turned = dataclasses.replace(examples, y_MT=np.where(turned_M1, 1.0 - examples.y_MT, examples.y_MT).astype(np.float32))
    again = hidden_markov(SMALL)(turned, np.empty(0))
    np.testing.assert_array_equal(again.logits_MT[turned_M1[:, 0]], member.logits_MT[turned_M1[:, 0]])
    assert (again.logits_MT[learned_M] != member.logits_MT[learned_M]).any()
    later_M = ~learned_M
    said = member.answer(examples, later_M, np.empty(0))
    np.testing.assert_allclose(said, member.logits_MT[later_M], atol=1e-5)
    spoken = np.isfinite(member.logits_MT).mean(axis=0)
    assert spoken[2] == 1.0 and 0.0 < spoken[0] < 1.0  # one platform has no clicks


def test_a_member_ranks_better_than_chance(examples):
    member = hidden_markov(SMALL)(examples, np.empty(0))
    at = np.flatnonzero(examples.check_MT[:, 2])
    assert metrics.auc(examples.y_MT[at, 2], member.logits_MT[at, 2]) > 0.55


def test_many_events_are_thinned_by_whole_users(monkeypatch):
    monkeypatch.setattr(markov, "MOST_EVENTS", 100)
    user_M = np.repeat(np.arange(30), 10)
    few_M = markov._few(user_M, np.ones(300, bool), 0)
    assert few_M.sum() == 100 and (np.bincount(user_M, few_M) % 10 == 0).all()
    assert (markov._few(user_M, user_M < 5, 0) == (user_M < 5)).all()
