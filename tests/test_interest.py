"""What a row's mixes and ring say of each other, and the head on it."""

import numpy as np
import pytest

from benchmarks import interest
from models.categories import view_dtype
from models.events import EVENT
from trainer import metrics
from trainer.history import History

SHOP, OTHER = 1, 2
A, B, C = 11, 22, 33
"""Categories: two of the shop, one of another platform."""
OF = np.array([A, B, C]), np.array([SHOP, SHOP, OTHER])


def view(long=(), short=(), ring=()):
    """`long`, `short`: category → weight; `ring`: newest first."""
    out = np.zeros(1, view_dtype("cpu"))
    for name, mix in (("long", dict(long)), ("short", dict(short))):
        out[f"{name}_category"][0, : len(mix)] = list(mix)
        out[f"{name}_weight"][0, : len(mix)] = list(mix.values())
    out["ring_category"][0, : len(ring)] = ring
    out["n"] = len(ring)
    return out


def said(**more):
    return dict(zip(interest.NAMES, interest.agreement(view(**more), np.array([SHOP]), OF)[0], strict=True))


def test_who_stays_in_the_main_category_and_who_leaves_it():
    stays = said(long={A: 3.0, B: 1.0}, short={A: 2.0}, ring=[A, A, B])
    leaves = said(long={A: 3.0, B: 1.0}, short={B: 2.0}, ring=[B, B, A])
    assert stays["main_share"] == leaves["main_share"] == 0.75 and stays["second_share"] == 0.25
    assert stays["entropy"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert (stays["main_in_short"], leaves["main_in_short"]) == (1.0, 0.0)
    assert (stays["main_is_last"], leaves["main_is_last"]) == (1.0, 0.0)
    assert (stays["last_in_long"], leaves["last_in_long"]) == (0.75, 0.25)
    assert stays["main_in_ring"] == pytest.approx(2 / 3) and leaves["main_in_ring"] == pytest.approx(1 / 3)
    assert stays["main_lately"] == pytest.approx(1.8 / 2.44) and leaves["main_lately"] == pytest.approx(0.64 / 2.44)
    assert stays["short_from_long"] == pytest.approx(0.5) and leaves["short_from_long"] == pytest.approx(1.5)
    assert stays["ring_with_long"] == pytest.approx(2 / 3 + 0.25) and leaves["ring_with_long"] == pytest.approx(1 / 3 + 0.25)


def test_another_platforms_categories_do_not_count():
    assert said(long={C: 9.0, A: 1.0}, short={C: 5.0, A: 1.0}, ring=[C, A]) == said(long={A: 1.0}, short={A: 1.0}, ring=[A])


def test_of_nothing_nothing_is_said():
    assert set(said().values()) == {0.0}


def test_places_of_the_ring_beyond_its_end_are_not_read():
    left = view(long={A: 1.0}, ring=[B])
    left["ring_category"][0, 1:] = A
    at = interest.agreement(left, np.array([SHOP]), OF)
    assert (at == interest.agreement(view(long={A: 1.0}, ring=[B]), np.array([SHOP]), OF)).all()


def test_a_category_belongs_to_the_platform_that_first_had_it():
    events = np.zeros(4, EVENT)
    events["category"] = B, 0, A, B
    nobody, platform = np.zeros(4, np.int32), np.array([1, 0, 0, 1], np.int16)
    history = History(events, nobody, platform, nobody, np.arange(4), ["u"], ("p", "q"), {})
    hashes, rows = interest.platform_of_category(history)
    assert dict(zip(hashes.tolist(), rows.tolist(), strict=True)) == {0: 1, A: 1, B: 2}


def test_the_head_learns_of_its_platform_alone_and_only_from_what_it_is_shown():
    rng = np.random.default_rng(0)
    x, platform = rng.normal(size=(4000, 3)), np.repeat([1, 2], 2000)
    y = (rng.random(4000) < 1 / (1 + np.exp(-2 * np.where(platform == 1, x[:, 0], -x[:, 0])))).astype(np.float32)
    learn, features = np.arange(4000) % 2 == 0, rng.normal(size=(4000, 2))
    z = interest.head(x, features, y, learn, platform)
    for row, sign in ((1, 1), (2, -1)):
        own = platform == row
        assert metrics.auc(sign * x[own, 0] > 0, z[own]) > 0.98
    hidden = np.where(learn, y, 1 - y)
    assert (interest.head(x, features, hidden, learn, platform) == z).all()
    assert np.isnan(interest.head(x, features, y, learn & (platform == 1), platform)[platform == 2]).all()
