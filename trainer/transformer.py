"""The teacher's causal transformer: what the order of a user's events adds to what others already say of each event.

    offset logits of each event (boosting, regression) ──────────────────────────────────────┐
    features, price, item, text, platform, offsets ─► e_i ─┬─► blocks ─► y_i ─┐               ▼
    [platform] ────────────────────────────────────────────┘                  ├─ MLP ─► offset + residual = logit
                                                           e_i ────── task ───┘
    attention of i to j ≤ i:  q_i · k_j − a · log1p((t_i − t_j) / 60 s) − b · log1p(i − j)      a, b ≥ 0, by head

A window holds so many events of one user; the next begins half a window later and speaks of its later half only, so what
is said of an event never depends on what came after it. The last layer begins at zero: an untrained network repeats the
offsets. The parameters' moving average of the epoch that did best on the examples to check by is kept, if it does better
than the offsets alone. Under torch.distributed the ranks share the batches of an epoch and stay equal, bit for bit.

Shapes: M events, F features, P platforms (axis of length P + 1; 0: unknown), T tasks, V items with an embedding of their
own, W windows, B windows of a batch, L events of a window, D width, I width of an item, H heads, X width of a text.
Knows nothing of histories, splits in time, users' names, how the offsets were made, calibration or distillation.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn import functional

from models.errors import ConfigError
from models.fold import FEATURE_NAMES
from models.student import CLIP
from trainer.examples import Check, Examples, check_loss
from trainer.fit import (
    EMA_DECAY,
    LEAST_BATCH,
    STEPS,
    STRANGER,
    WARM_UP,
    Progress,
    Schedule,
    optimiser_of,
    platform_weights,
    put,
)

LEAST_FOR_PLATFORM = 256
"""A platform with fewer learning events is standardised like all of them together."""
NEGATIVES = 256
"""Items that a batch's next items are told apart from."""
PREDICT_TOKENS = 16_384
_PRICE, _BUCKETS = FEATURE_NAMES.index("price"), 256

Text = Callable[[np.ndarray], np.ndarray]
"""Item hashes (n,) uint32 → their text vectors (n, X) float32; zeros where an item has no text."""

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"width": 64, "layers": 2, "heads": 4, "window": 96, "dropout": 0.3, "item_dim": 16, "item_buckets": 1024},
    "gpu-small": {"width": 128, "layers": 4, "heads": 4, "window": 192, "dropout": 0.2, "item_dim": 32},
    "gpu": {"width": 256, "layers": 6, "heads": 8, "window": 256, "dropout": 0.2, "item_dim": 64},
    "large": {"width": 512, "layers": 12, "heads": 8, "window": 512, "dropout": 0.1, "item_dim": 128},
}


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what is learned, but for the data and the schedule."""

    n_features: int
    platforms: tuple[str, ...]
    """Known platforms; the i-th has index i + 1."""
    tasks: tuple[str, ...]
    """As in Examples."""
    text_dim: int = 0
    """X; 0: no text."""
    width: int
    layers: int
    heads: int
    window: int
    """Events of the longest context; even."""
    dropout: float
    item_dim: int
    item_buckets: int = 16_384
    item_floor: int = 5
    """Learning events that an item needs for an embedding of its own; a bucket of the hash stands for the others."""
    next_item_weight: float = 0.05
    """0: no next-item head."""
    task_weights: dict[str, float] = {}
    """Of tasks whose loss does not count 1."""
    bf16: bool = False
    compiled: bool = False
    """Both on CUDA only."""

    @classmethod
    def of(
        cls, size: str, n_features: int, platforms: tuple[str, ...], tasks: tuple[str, ...], **changes: Any
    ) -> TransformerConfig:
        """The configuration of a size (a key of SIZES), with changes. Raises `ConfigError` for another size."""
        if size not in SIZES:
            raise ConfigError(f"there is no teacher of size {size!r}: choose one of {', '.join(SIZES)}")
        on_gpu = {"bf16": size != "cpu", "compiled": size != "cpu"}
        known = {"n_features": n_features, "platforms": tuple(platforms), "tasks": tuple(tasks)}
        return cls(**{**SIZES[size], **on_gpu, **known, **changes})

    def check(self) -> None:
        """Raises `ConfigError` where the fields do not fit each other."""
        if self.width % self.heads or self.window % 2 or self.window < 2:
            raise ConfigError(f"width {self.width} must be a multiple of heads {self.heads}, window {self.window} even")
        if len(set(self.platforms)) != len(self.platforms) or len(set(self.tasks)) != len(self.tasks) or not self.tasks:
            raise ConfigError(f"a platform or a task is named twice, or there is no task: {self.platforms}, {self.tasks}")
        if set(self.task_weights) - set(self.tasks) or min(self.task_weights.values(), default=0.0) < 0:
            raise ConfigError(f"task weights {self.task_weights} must be of tasks {self.tasks} and at least 0")
        if min(self.n_features, self.width, self.item_dim, self.item_buckets, self.item_floor) < 1 or self.layers < 0:
            raise ConfigError("every width, the number of item buckets and the item floor must be at least 1")

    def flops_per_event(self) -> int:
        """Floating-point operations of the matrix products of one event in a full window, a multiplication and an
        addition each one; the next-item head, which only training needs, left out."""
        inputs = self.n_features + 2 + len(self.tasks) + self.item_dim + self.text_dim
        block = 4 * self.width**2 + 2 * (self.window + 1) * self.width + 6 * self.width**2
        head = 2 * self.width**2 + len(self.tasks) * self.width
        return 2 * (inputs * self.width + self.layers * block + head)


# ── windows and batches ──────────────────────────────────────────────────────────────────────────────────────────────


class Windows(NamedTuple):
    """Window w holds the events first … first + length − 1 and speaks of all but the `skip` first of them."""

    first_W: np.ndarray
    length_W: np.ndarray
    skip_W: np.ndarray


def windows(user_M: np.ndarray, window: int, wanted_M: np.ndarray | None = None) -> Windows:
    """Windows of at most `window` events (even) of one user that speak of every event exactly once, with the user's whole
    past or at least half a window of it before. With `wanted_M` (bool): only those that speak of such an event, cut
    after the last one. `user_M`: sorted by user."""
    begins_U = np.flatnonzero(np.r_[True, user_M[1:] != user_M[:-1]][: len(user_M)])
    length_U, half = np.diff(np.r_[begins_U, len(user_M)]), window // 2
    count_U = 1 + -(-np.maximum(length_U - window, 0) // half)
    k_W = np.arange(count_U.sum()) - np.repeat(np.cumsum(count_U) - count_U, count_U)
    first_W, length_W = np.repeat(begins_U, count_U) + k_W * half, np.repeat(length_U, count_U) - k_W * half
    out = Windows(first_W, np.minimum(length_W, window), np.where(k_W > 0, half, 0))
    if wanted_M is None:
        return out
    last_M = np.maximum.accumulate(np.where(wanted_M, np.arange(len(user_M)), -1))
    length_W = last_M[out.first_W + out.length_W - 1] + 1 - out.first_W
    keep_W = length_W > out.skip_W
    return Windows(out.first_W[keep_W], length_W[keep_W], out.skip_W[keep_W])


def batches(length_W: np.ndarray, tokens: int, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Windows of similar length together, at most `tokens` tokens with the padding and the platform's token, at least one
    window. With `rng`: ties of length and the batches in random order."""
    order_W = np.lexsort((rng.random(len(length_W)) if rng else np.arange(len(length_W)), length_W))
    out, start = [], 0
    while start < len(order_W):
        # Lengths ascend, so the number of tokens does too.
        cost = (length_W[order_W[start : start + tokens]] + 1) * np.arange(1, min(tokens, len(order_W) - start) + 1)
        stop = start + max(1, int(np.searchsorted(cost, tokens, side="right")))
        out.append(order_W[start:stop])
        start = stop
    return [out[i] for i in rng.permutation(len(out))] if rng else out


class _Events(NamedTuple):
    """What the network reads: columns (M, …) of all events, or (B, L, …) of a batch."""

    features: Tensor
    offset: Tensor
    item: Tensor
    """int64, row of the item's embedding on its own platform."""
    bucket: Tensor
    """int64, the row on a platform that is not known."""
    platform: Tensor
    price: Tensor
    """int64, 0 … 255, 0 none."""
    ts: Tensor
    """int64, ms."""
    text: Tensor
    """int64, row of the text table, 0 none."""


class _Batch(NamedTuple):
    at_BL: Tensor
    """Places of the events; the last again where a window is shorter than the longest."""
    speaks_BL: Tensor
    """bool"""


def _collate(part: Windows, device: torch.device) -> _Batch:
    longest = int(part.length_W.max())
    if device.type == "cuda":  # attention kernels like multiples of 8, the platform's token included
        longest = -(-(longest + 1) // 8) * 8 - 1
    place_L, length_B1 = np.arange(longest), part.length_W[:, None]
    at_BL = part.first_W[:, None] + np.minimum(place_L, length_B1 - 1)
    speaks_BL = (place_L < length_B1) & (place_L >= part.skip_W[:, None])
    return _Batch(torch.from_numpy(at_BL).to(device), torch.from_numpy(speaks_BL).to(device))


# ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Block(nn.Module):
    """Causal attention, biased by elapsed time and by distance, and a feed-forward layer; both pre-normalised."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        # Softplus of these: from heads that hardly forget to heads that see the last few minutes.
        self.time_H = nn.Parameter(torch.linspace(-3.0, 1.0, config.heads))
        self.distance_H = nn.Parameter(torch.linspace(1.0, -3.0, config.heads))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, since_BLL: Tensor, apart_LL: Tensor, future_LL: Tensor) -> Tensor:
        b, length, width = x_BLD.shape
        qkv = self.qkv(self.before_attention(x_BLD)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias_BHLL = -functional.softplus(self.time_H)[:, None, None] * since_BLL[:, None]
        bias_BHLL = bias_BHLL - functional.softplus(self.distance_H)[:, None, None] * apart_LL
        bias_BHLL = bias_BHLL.masked_fill(future_LL, float("-inf")).to(qkv.dtype)
        y_BLD = functional.scaled_dot_product_attention(*qkv, attn_mask=bias_BHLL).transpose(1, 2).reshape(b, length, width)
        x_BLD = x_BLD + self.dropout(self.out(y_BLD))
        hidden = self.dropout(functional.gelu(self.up(self.before_mlp(x_BLD))))
        return x_BLD + self.dropout(self.down(hidden))


class Transformer(nn.Module):
    """The network. Rows of the table of items: 0 none, then the buckets, then the vocabulary."""

    def __init__(self, config: TransformerConfig, vocabulary_V: np.ndarray) -> None:
        """`vocabulary_V`: int64 ascending, platform index · 2^32 + item hash. Raises `ConfigError`."""
        super().__init__()
        config.check()
        self.config = config
        width, rows, n_tasks = config.width, len(config.platforms) + 1, len(config.tasks)
        self.register_buffer("vocabulary_V", torch.from_numpy(np.asarray(vocabulary_V, np.int64)))
        self.register_buffer("feature_mean_PF", torch.zeros(rows, config.n_features))
        self.register_buffer("feature_std_PF", torch.ones(rows, config.n_features))
        self.register_buffer("percentile_PQ", torch.zeros(rows, _BUCKETS))
        self.item = nn.Embedding(1 + config.item_buckets + len(vocabulary_V), config.item_dim)
        self.platform = nn.Embedding(rows, width)
        self.task = nn.Embedding(n_tasks, width)
        for table, std in ((self.item, 0.05), (self.platform, 0.05), (self.task, 0.5)):
            nn.init.normal_(table.weight, std=std)
        # One layer over everything together, in parts, so that a warm start can copy those that fit.
        self.from_features = nn.Linear(config.n_features + 2, width)
        self.from_offset = nn.Linear(n_tasks, width, bias=False)
        self.from_item = nn.Linear(config.item_dim, width, bias=False)
        self.from_text = nn.Linear(config.text_dim, width, bias=False) if config.text_dim else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.joint = nn.Linear(2 * width, width)
        self.last = nn.Linear(width, 1, bias=False)
        self.bias_T = nn.Parameter(torch.zeros(n_tasks))
        self.query = nn.Linear(width, config.item_dim) if config.next_item_weight else None
        self.dropout = nn.Dropout(config.dropout)
        self.silence()

    @torch.no_grad()
    def silence(self) -> None:
        """Makes the residual zero."""
        self.last.weight.zero_()
        self.bias_T.zero_()

    def forward(self, events: _Events, text_BLX: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """→ residuals (B, L, T) float32; queries for the next item (B, L, I), None without that head."""
        e_BLD = self._encode(events, text_BLX)
        token_B1D = self.platform(events.platform[:, :1])
        y_BLD = torch.cat([token_B1D, e_BLD], dim=1)
        geometry = _geometry(events.ts)
        for block in self.blocks:
            y_BLD = block(y_BLD, *geometry)
        y_BLD = self.norm(y_BLD[:, 1:])
        hidden_BLTD = functional.silu(self.joint(torch.cat([y_BLD, e_BLD], dim=2))[:, :, None] + self.task.weight)
        residual_BLT = self.last(self.dropout(hidden_BLTD))[..., 0].float() + self.bias_T
        return residual_BLT, self.query(y_BLD) if self.query is not None else None

    def _encode(self, events: _Events, text_BLX: Tensor | None) -> Tensor:
        platform = events.platform
        x_BLF = ((events.features - self.feature_mean_PF[platform]) / self.feature_std_PF[platform]).clamp(-CLIP, CLIP)
        price_BL2 = torch.stack([self.percentile_PQ[platform, events.price], (events.price > 0).float()], dim=2)
        sum_BLD = self.from_features(self.dropout(torch.cat([x_BLF, price_BL2], dim=2))) + self.platform(platform)
        sum_BLD = sum_BLD + self.from_offset(self.dropout(events.offset.clamp(-CLIP, CLIP)))
        sum_BLD = sum_BLD + self.from_item(self.dropout(self.item(events.item)))
        if self.from_text is not None:
            sum_BLD = sum_BLD + self.from_text(self.dropout(text_BLX))
        return functional.silu(sum_BLD)

    def item_rows(self, platform_M: np.ndarray, item_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """→ (M,) int64 rows of the table of items, (M,) their rows where the platform is not known."""
        bucket_M = np.where(item_M == 0, 0, 1 + item_M % self.config.item_buckets)
        key_M, own_V = (platform_M << 32) + item_M, self.vocabulary_V.cpu().numpy()
        at_M = np.searchsorted(own_V, key_M)
        if len(own_V):
            known_M = own_V[np.minimum(at_M, len(own_V) - 1)] == key_M
            return np.where(known_M, 1 + self.config.item_buckets + at_M, bucket_M), bucket_M
        return bucket_M, bucket_M

    @torch.no_grad()
    def fit_inputs(self, features_MF: np.ndarray, platform_M: np.ndarray) -> None:
        """Sets standardisation and price percentiles from learning events: row 0 pooled, a platform with few like it."""
        for row in range(len(self.config.platforms) + 1):
            own_NF = features_MF[platform_M == row] if row else features_MF
            if len(own_NF) < (LEAST_FOR_PLATFORM if row else 1):
                for table in (self.feature_mean_PF, self.feature_std_PF, self.percentile_PQ):
                    table[row] = table[0]
                continue
            std_F = own_NF.std(axis=0, dtype=np.float64)
            self.feature_mean_PF[row] = torch.from_numpy(own_NF.mean(axis=0, dtype=np.float64))
            self.feature_std_PF[row] = torch.from_numpy(np.where(std_F < 1e-3, 1.0, std_F))
            count_Q = np.bincount(_price_bucket(own_NF), minlength=_BUCKETS).astype(np.float64)
            count_Q[0] = 0.0
            percentile_Q = (np.cumsum(count_Q) - count_Q / 2) / max(count_Q.sum(), 1.0)
            self.percentile_PQ[row] = torch.from_numpy(percentile_Q)

    @torch.no_grad()
    def start_from(self, source: Transformer) -> None:
        """Copies what fits: tensors of the same shape; of platforms, tasks and items those that both know."""
        theirs, ours = {name: p.cpu() for name, p in source.named_parameters()}, dict(self.named_parameters())
        platforms = _common(("", *self.config.platforms), ("", *source.config.platforms))
        tasks = _common(self.config.tasks, source.config.tasks)
        labelled = {"platform.weight": platforms, "task.weight": tasks, "bias_T": tasks, "item.weight": self._items(source)}
        for name, tensor in ours.items():
            other = theirs.get(name)
            if name in labelled and other.shape[1:] == tensor.shape[1:]:
                to, of = labelled[name]
                tensor[to] = other[of]
            elif name == "from_offset.weight" and len(other) == len(tensor):
                tensor[:, tasks[0]] = other[:, tasks[1]]
            elif other is not None and other.shape == tensor.shape:
                tensor.copy_(other)

    def _items(self, source: Transformer) -> tuple[Tensor, Tensor]:
        """→ our rows, their rows of the same items."""
        to, of = _common(self.config.platforms, source.config.platforms)
        ours = {int(theirs): int(own) for own, theirs in zip(to + 1, of + 1, strict=True)}
        key_V = source.vocabulary_V.cpu().numpy()
        platform_V = np.array([ours.get(int(row), -1) for row in range(len(source.config.platforms) + 1)])[key_V >> 32]
        row_V, _ = self.item_rows(platform_V, key_V & 0xFFFFFFFF)
        base, their_base = 1 + self.config.item_buckets, 1 + source.config.item_buckets
        both = np.flatnonzero((platform_V >= 0) & (row_V >= base))
        shared = np.arange(base if base == their_base else 1)
        return torch.from_numpy(np.r_[shared, row_V[both]]), torch.from_numpy(np.r_[shared, their_base + both])


def _geometry(ts_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ log1p of the minutes from j to i (B, L + 1, L + 1), log1p of their distance and whether j lies in the future (both
    (L + 1, L + 1)). The platform's token is no time and no distance away."""
    since_BLL = (ts_BL[:, :, None] - ts_BL[:, None, :]).clamp(min=0).float()  # a difference of int64: exact
    since_BLL = functional.pad(torch.log1p(since_BLL / 60_000.0), (1, 0, 1, 0))
    place_L = torch.arange(ts_BL.shape[1] + 1, device=ts_BL.device)
    apart_LL = place_L[:, None] - place_L
    far_LL = torch.log1p(apart_LL.clamp(min=0).float())
    return since_BLL, torch.where(place_L == 0, torch.zeros_like(far_LL), far_LL), apart_LL < 0


def _common(ours: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """→ places in ours, places in theirs of the same names."""
    both = [(i, theirs.index(name)) for i, name in enumerate(ours) if name in theirs]
    to, of = zip(*both, strict=True) if both else ((), ())
    return torch.tensor(to, dtype=torch.int64), torch.tensor(of, dtype=torch.int64)


def _price_bucket(features_MF: np.ndarray) -> np.ndarray:
    return np.rint(features_MF[:, _PRICE] * (_BUCKETS - 1)).astype(np.int64).clip(0, _BUCKETS - 1)


# ── a fitted teacher ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class FittedTransformer:
    """A trained residual and how it went."""

    network: Transformer
    adds: bool
    """Some epoch did better than the offsets alone on the examples to check by. If not, the residual is zero."""
    epochs: int
    """Epochs behind the parameters that were kept; 0: those that it began with."""
    loss: float
    """Mean over the last epoch, next items included; NaN where there was none."""
    check_loss: float
    """Mean log-loss over platform × task on the examples to check by; NaN where there was nothing."""
    offset_loss: float
    """The same of the offsets alone."""

    def logits(
        self, examples: Examples, offsets_MT: np.ndarray, *, text: Text | None = None, check: Check = lambda: None
    ) -> np.ndarray:
        """(M, T) float32 logits of all events and tasks, offsets included. Raises `ValueError` for what `fit_transformer`
        would not take. Every rank may call it alone."""
        device = self.network.bias_T.device
        events, text_IX = _columns(self.network, examples, offsets_MT, text, device)
        self.network.eval()
        wins = windows(examples.user_M, self.network.config.window)
        residual_MT = _residuals(self.network, self.network.config, events, text_IX, wins, _Ranks(0, 1), check)
        return (events.offset + residual_MT).cpu().numpy()

    def flops_per_event(self) -> int:
        """Counted operations of the matrix products of one event in a full window."""
        return self.network.config.flops_per_event()


# ── data to network ──────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(
    network: Transformer, examples: Examples, offsets_MT: np.ndarray, text: Text | None, device: torch.device
) -> tuple[_Events, Tensor | None]:
    """→ the columns of all events on a device, the table of texts (row 0: none)."""
    config, features_MF = network.config, examples.columns.features_NF
    if offsets_MT.shape != (len(examples), len(config.tasks)) or not np.isfinite(offsets_MT).all():
        raise ValueError(f"offsets must be finite and of shape {(len(examples), len(config.tasks))}, not {offsets_MT.shape}")
    if examples.tasks != config.tasks or features_MF.shape[1] != config.n_features:
        raise ValueError(f"examples of tasks {examples.tasks} do not fit a teacher of {config.tasks}")
    if examples.platform_M.max(initial=0) > len(config.platforms):
        raise ValueError(f"examples of platform {examples.platform_M.max()} do not fit a teacher of {config.platforms}")
    if (text is not None) != bool(config.text_dim):
        raise ValueError(f"text must be given where text_dim ({config.text_dim}) is not 0, and only there")
    item_M = examples.columns.item_N.numpy()
    row_M, bucket_M = network.item_rows(examples.platform_M, item_M)
    hash_I, text_M = np.unique(np.r_[0, item_M], return_inverse=True)  # so that place 0 is the item 0: none
    text_IX = None
    if text is not None:
        text_IX = np.zeros((len(hash_I), config.text_dim), np.float32)
        text_IX[1:] = text(hash_I[1:].astype(np.uint32))
        text_IX = torch.from_numpy(text_IX).to(device)
    price_M = _price_bucket(features_MF.numpy())
    arrays = (np.asarray(offsets_MT, np.float32), row_M, bucket_M, examples.platform_M, price_M, examples.ts_M, text_M[1:])
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    return _Events(features_MF.to(device), *(tensor.to(device) for tensor in tensors)), text_IX


def _call(
    forward: Callable,
    config: TransformerConfig,
    events: _Events,
    text_IX: Tensor | None,
    batch: _Batch,
    hidden_B: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Runs the network on a batch; the windows of `hidden_B` as of a platform that it does not know."""
    own = _Events(*(column[batch.at_BL] for column in events))
    if hidden_B is not None:
        unknown_B1 = hidden_B[:, None]
        platform, item = own.platform.masked_fill(unknown_B1, 0), torch.where(unknown_B1, own.bucket, own.item)
        own = own._replace(platform=platform, item=item)
    kind = batch.at_BL.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=config.bf16 and kind == "cuda"):
        return forward(own, text_IX[own.text] if text_IX is not None else None)


class _Ranks(NamedTuple):
    """This process among those that train together."""

    rank: int
    world: int

    @classmethod
    def present(cls) -> _Ranks:
        together = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if together else cls(0, 1)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


@torch.no_grad()
def _residuals(
    forward: Callable,
    config: TransformerConfig,
    events: _Events,
    text_IX: Tensor | None,
    wins: Windows,
    ranks: _Ranks,
    check: Check,
) -> Tensor:
    """(M, T) residuals of the events that the windows speak of, 0 elsewhere; each rank works out its share."""
    out_MT = torch.zeros_like(events.offset)
    for part in batches(wins.length_W, PREDICT_TOKENS)[ranks.rank :: ranks.world]:
        check()
        batch = _collate(Windows(*(column[part] for column in wins)), out_MT.device)
        residual_BLT = _call(forward, config, events, text_IX, batch)[0]
        out_MT[batch.at_BL[batch.speaks_BL]] = residual_BLT[batch.speaks_BL]
    return ranks.sum(out_MT)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def fit_transformer(
    examples: Examples,
    offsets_MT: np.ndarray,
    config: TransformerConfig,
    schedule: Schedule,
    *,
    text: Text | None = None,
    warm_start: FittedTransformer | None = None,
    device: str | torch.device = "cpu",
    check: Check = lambda: None,
    progress: Progress = lambda share: None,
    log_dir: str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> FittedTransformer:
    """Learns a residual on `offsets_MT` (M, T), finite logits that were cross-fitted, from `learn_MT`; the epoch that does
    best on `check_MT` is kept, and none where it does not beat the offsets.

    Of the schedule: `epochs`, `batch_events` (tokens of a step, over all ranks), `rate`, `patience`, `seed`. `log_dir`:
    TensorBoard scalars. `checkpoint`: a folder (one that all ranks see), written after each epoch; a run that finds one
    goes on behind it and ends, on a CPU, with the same bytes as one that was never stopped. On CUDA the kernels may add
    in another order. Every rank of torch.distributed calls this with the same arguments but `device`, and `check` must
    raise on all of them or on none.

    Raises `ConfigError` for a configuration that does not fit, a checkpoint of another run or without its bytes, and
    `log_dir` without TensorBoard; `ValueError` for examples, offsets or texts that do not fit the configuration; and
    what `check` raises.
    """
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(schedule.seed)
        seen_M = _seen(examples)
        network = Transformer(config, _vocabulary(examples, seen_M, config))
        network.fit_inputs(examples.columns.features_NF.numpy()[seen_M], examples.platform_M[seen_M])
        if warm_start is not None:
            network.start_from(warm_start.network)
        network.to(device)
        run = _Run(network, examples, offsets_MT, text, schedule, seen_M, check)
        with _writer(log_dir if run.ranks.rank == 0 else None) as writer:
            return run.to_the_end(warm_start is not None, progress, writer, Path(checkpoint) if checkpoint else None)


def _seen(examples: Examples) -> np.ndarray:
    """(M,) bool: events up to their user's last one to learn from. What is counted and predicted is counted there."""
    learns_M = examples.learn_MT.any(axis=1) | examples.learn_next_M
    user_M = examples.user_M[::-1]
    # Read backwards, a user's events are seen from the first to learn from on.
    of_user_M = np.cumsum(np.r_[True, user_M[1:] != user_M[:-1]][: len(user_M)])
    latest_M = np.maximum.accumulate(np.where(learns_M[::-1], of_user_M, 0))
    return (latest_M == of_user_M)[::-1]


def _vocabulary(examples: Examples, seen_M: np.ndarray, config: TransformerConfig) -> np.ndarray:
    """(V,) int64 keys of the items that get an embedding of their own."""
    item_M, platform_M = examples.columns.item_N.numpy(), examples.platform_M
    count_M = seen_M & (item_M != 0) & (platform_M > 0)
    key_V, n_V = np.unique((platform_M[count_M] << 32) + item_M[count_M], return_counts=True)
    return key_V[n_V >= config.item_floor]


class _Saved(msgspec.Struct):
    """checkpoint.json: written last, so it never speaks of tensors that are not there."""

    run: str
    """Which run it is, by everything that decides its result."""
    epoch: int
    step: int
    best_epoch: int
    best_loss: float | None
    loss: float | None
    tensors: str
    """Name of the file beside it."""
    sha256: str


class _Run:
    """One training: what it learns from, and the state that a checkpoint keeps."""

    def __init__(
        self,
        network: Transformer,
        examples: Examples,
        offsets_MT: np.ndarray,
        text: Text | None,
        schedule: Schedule,
        seen_M: np.ndarray,
        check: Check,
    ) -> None:
        self.network, self.examples, self.schedule, self.check = network, examples, schedule, check
        self.config, self.ranks, self.device = network.config, _Ranks.present(), network.bias_T.device
        self.events, self.text_IX = _columns(network, examples, offsets_MT, text, self.device)
        compiled = self.config.compiled and self.device.type == "cuda"
        self.forward = torch.compile(network, dynamic=True) if compiled else network
        self.learn = windows(examples.user_M, self.config.window, examples.learn_MT.any(axis=1) | examples.learn_next_M)
        self.judge = windows(examples.user_M, self.config.window, examples.check_MT.any(axis=1))
        weight_M = platform_weights(examples, len(self.config.platforms))[examples.platform_M]
        self.y_MT = torch.from_numpy(examples.y_MT).to(self.device)
        self.weight_MT = torch.from_numpy(examples.learn_MT * weight_M[:, None]).to(self.device)
        task_T = np.array([self.config.task_weights.get(task, 1.0) for task in self.config.tasks], np.float32)
        self.task_T = torch.from_numpy(task_T / max(task_T.sum(), 1e-9)).to(self.device)
        self.next_M, self.next_weight_M, self.log_q_R = self._next_items(seen_M, weight_M)
        self.names, self.parameters = zip(*network.named_parameters(), strict=True)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.best: list[Tensor] | None = None
        self.optimiser = optimiser_of(list(self.parameters))
        total, epochs = int((self.learn.length_W + 1).sum()), max(1, schedule.epochs)
        tokens = int(np.clip(total * epochs // STEPS, LEAST_BATCH, max(LEAST_BATCH, schedule.batch_events)))
        self.tokens = max(1, tokens // self.ranks.world)
        self.steps = max(1, epochs * -(-len(batches(self.learn.length_W, self.tokens)) // self.ranks.world))
        self.epoch, self.step, self.best_epoch, self.best_loss, self.loss = 0, 0, 0, None, float("nan")

    def _next_items(self, seen_M: np.ndarray, weight_M: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """→ (M,) rows of the item that came next, strictly later; (M,) weights, 0 where it is not one to learn from; (rows
        of the table of items,) log-probability of drawing each as a negative, None where there is no next item."""
        user_M, ts_M, following = self.examples.user_M, self.examples.ts_M, np.roll(np.arange(len(seen_M)), -1)
        item_M = self.events.item.cpu().numpy()[following]
        known_M = (user_M[following] == user_M) & (ts_M[following] > ts_M) & seen_M[following]
        known_M[-1:] = False
        known_M &= item_M > self.config.item_buckets
        next_M = np.where(known_M, item_M, 0)
        log_q_R = None
        if known_M.any() and self.network.query is not None:
            count_R = np.bincount(next_M[known_M], minlength=len(self.network.item.weight))
            log_q_R = torch.log(torch.from_numpy(count_R / count_R.sum()).float()).to(self.device)
        weight_M = torch.from_numpy((known_M * weight_M).astype(np.float32)).to(self.device)
        return torch.from_numpy(next_M).to(self.device), weight_M, log_q_R

    def to_the_end(self, warm: bool, progress: Progress, writer: Any, folder: Path | None) -> FittedTransformer:
        """Trains to the end and keeps the best."""
        offset_loss = check_loss(self.examples, self.events.offset.cpu().numpy())
        name = self._fingerprint(warm) if folder else ""
        resumed = folder is not None and self._load(folder, name)
        if warm and not resumed:
            self._judge()
        # Without a label to check by nothing can be shown to add anything.
        epochs = self.schedule.epochs if len(self.learn.first_W) and not np.isnan(offset_loss) else 0
        patience = self.schedule.patience or self.schedule.epochs
        while self.epoch < epochs and self.epoch - self.best_epoch < patience:
            self.epoch += 1
            begin, losses = self.step, self._train(progress)
            self.loss = self._mean(losses)
            judged = self._judge()
            if folder:
                self._save(folder, name)
            if writer is not None:
                for step, loss in enumerate(losses.tolist(), begin):
                    writer.add_scalar("train/loss", loss, step)
                    writer.add_scalar("train/rate", self._rate(step), step)
                writer.add_scalar("check/log_loss", judged, self.step)
                writer.add_scalar("check/log_loss_over_offsets", judged - offset_loss, self.step)
        adds = self.best_loss is not None and self.best_loss < offset_loss
        put(list(self.parameters), self.best or self.average)
        if not adds:
            self.network.silence()
        best_loss = self.best_loss if adds else offset_loss
        return FittedTransformer(self.network, adds, self.best_epoch if adds else 0, self.loss, best_loss, offset_loss)

    def _train(self, progress: Progress) -> Tensor:
        """One epoch → (steps,) losses. Everything random in it follows from the seed, the epoch and the rank alone."""
        rng = np.random.default_rng([self.schedule.seed, self.epoch])
        seeds = np.random.SeedSequence([self.schedule.seed, self.epoch, self.ranks.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint32)[0]))
        user_W = self.examples.user_M[self.learn.first_W]
        hidden_W = (rng.random(int(user_W.max()) + 1) < STRANGER)[user_W]
        parts, losses = batches(self.learn.length_W, self.tokens, rng), []
        self.network.train()
        for start in range(0, len(parts), self.ranks.world):
            self.check()
            together = parts[start : start + self.ranks.world]
            self.optimiser.zero_grad()
            if self.ranks.rank < len(together):
                part = together[self.ranks.rank]
                loss = self._loss(Windows(*(column[part] for column in self.learn)), hidden_W[part])
                loss.backward()
                losses.append(loss.detach())
            self._share_gradients(len(together))
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for group in self.optimiser.param_groups:
                group["lr"] = self._rate(self.step)
            self.optimiser.step()
            self.step += 1
            decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
            for mean, parameter in zip(self.average, self.parameters, strict=True):
                mean.lerp_(parameter.detach(), 1.0 - decay)
            progress(min(1.0, self.step / self.steps))
        return torch.stack(losses) if losses else torch.zeros(0, device=self.device)

    def _mean(self, losses: Tensor) -> float:
        """Over the ranks' steps."""
        both = torch.stack([losses.double().sum(), torch.ones_like(losses).double().sum()])
        total, count = self.ranks.sum(both).tolist()
        return total / count

    def _rate(self, step: int) -> float:
        cosine = 0.05 + 0.475 * (1.0 + np.cos(np.pi * min(1.0, step / self.steps)))
        return float(self.schedule.rate * cosine * min(1.0, (step + 1) / max(1.0, WARM_UP * self.steps)))

    def _share_gradients(self, n: int) -> None:
        """The mean over the `n` ranks that had a batch."""
        if self.ranks.world == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = self.ranks.sum(torch.cat([grad.reshape(-1) for grad in grads])) / n
        for parameter, grad in zip(self.parameters, flat.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = grad.view_as(parameter).clone()

    def _loss(self, part: Windows, hidden_B: np.ndarray) -> Tensor:
        batch = _collate(part, self.device)
        hidden = torch.from_numpy(hidden_B).to(self.device)
        residual_BLT, query_BLI = _call(self.forward, self.config, self.events, self.text_IX, batch, hidden)
        at_N = batch.at_BL[batch.speaks_BL]
        logits_NT, weight_NT = self.events.offset[at_N] + residual_BLT[batch.speaks_BL], self.weight_MT[at_N]
        losses_NT = functional.binary_cross_entropy_with_logits(logits_NT, self.y_MT[at_N], reduction="none")
        loss = ((losses_NT * weight_NT).sum(0) / weight_NT.sum(0).clamp(min=1e-6) * self.task_T).sum()
        if self.log_q_R is None:
            return loss
        return loss + self.config.next_item_weight * self._next_item_loss(query_BLI[batch.speaks_BL].float(), at_N)

    def _next_item_loss(self, query_NI: Tensor, at_N: Tensor) -> Tensor:
        """Sampled softmax: the next item against items drawn by their frequency, each with the weight that makes their sum
        an estimate of the sum over the platform's whole vocabulary (log Q)."""
        weight_N, log_q_R, items = self.next_weight_M[at_N], self.log_q_R, self.network.item
        of_N, own_K = weight_N > 0, torch.multinomial(log_q_R.exp(), NEGATIVES, replacement=True)
        query_NI, target_N, weight_N = query_NI[of_N], self.next_M[at_N][of_N], weight_N[of_N]
        right_N = (query_NI * items(target_N)).sum(1)
        wrong_NK = query_NI @ items(own_K).T - log_q_R[own_K] - np.log(NEGATIVES)
        # An item of another platform is no alternative: what it is would only say which platform this is.
        platform_V = (self.network.vocabulary_V >> 32).to(own_K.device)
        base = 1 + self.config.item_buckets
        other_NK = platform_V[target_N - base][:, None] != platform_V[own_K - base]
        wrong_NK = wrong_NK.masked_fill(other_NK | (target_N[:, None] == own_K), float("-inf"))
        losses_N = torch.logsumexp(torch.cat([right_N[:, None], wrong_NK], dim=1), dim=1) - right_N
        return (losses_N * weight_N).sum() / weight_N.sum().clamp(min=1e-6)

    def _judge(self) -> float:
        """Log-loss of the moving average on the examples to check by; remembers it where it is the best."""
        present = [parameter.detach().clone() for parameter in self.parameters]
        put(list(self.parameters), self.average)
        self.network.eval()
        residual_MT = _residuals(self.forward, self.config, self.events, self.text_IX, self.judge, self.ranks, self.check)
        put(list(self.parameters), present)
        judged = check_loss(self.examples, (self.events.offset + residual_MT).cpu().numpy())
        if np.isfinite(judged) and (self.best_loss is None or judged < self.best_loss):
            self.best, self.best_epoch, self.best_loss = [mean.clone() for mean in self.average], self.epoch, judged
        return judged

    # ── checkpoints ──

    def _fingerprint(self, warm: bool) -> str:
        """sha256 of all that decides the result: settings, what is learned from, where it starts."""
        settings = (self.config, self.schedule, self.ranks.world, warm)
        digest = hashlib.sha256(msgspec.json.encode(settings))
        arrays = [*self.events, self.y_MT, self.weight_MT, *self.parameters, *self.network.buffers()]
        arrays += [torch.from_numpy(self.examples.check_MT), *([] if self.text_IX is None else [self.text_IX])]
        for tensor in arrays:
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"average.{name}": mean for name, mean in zip(self.names, self.average, strict=True)}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            tensors[f"parameter.{name}"] = parameter.detach()
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        return tensors | {f"best.{name}": best for name, best in zip(self.names, self.best or [], strict=bool(self.best))}

    def _save(self, folder: Path, name: str) -> None:
        """Rank 0: the tensors under the epoch's name, then checkpoint.json, which names them; then the old ones go."""
        if self.ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            blob, file = safetensors.save(self._tensors()), f"epoch-{self.epoch:06d}.safetensors"
            best = self.best_epoch, self.best_loss
            saved = _Saved(name, self.epoch, self.step, *best, self.loss, file, hashlib.sha256(blob).hexdigest())
            _write(folder / file, blob)
            _write(folder / "checkpoint.json", msgspec.json.encode(saved))
            for old in folder.glob("epoch-*.safetensors"):
                if old.name != file:
                    old.unlink()
        self.ranks.sum(torch.zeros(1, device=self.device))  # nobody goes on before it is there

    def _load(self, folder: Path, name: str) -> bool:
        """Goes back to the end of the checkpoint's epoch. False where there is none."""
        path = folder / "checkpoint.json"
        if not path.exists():
            return False
        try:
            saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
            blob = (folder / saved.tensors).read_bytes()
            if hashlib.sha256(blob).hexdigest() != saved.sha256:
                raise ConfigError("its tensors are not those that were written")
            if saved.run != name:
                raise ConfigError("it belongs to a run with other data, settings or ranks")
            tensors = {key: tensor.to(self.device) for key, tensor in safetensors.load(blob).items()}
        except (OSError, ValueError, SafetensorError, ConfigError) as e:
            raise ConfigError(f"cannot go on from {path}: {e}. Delete the folder to start afresh") from e
        put(list(self.parameters), [tensors[f"parameter.{name}"] for name in self.names])
        self.average = [tensors[f"average.{name}"] for name in self.names]
        self.best = [tensors[f"best.{name}"] for name in self.names] if saved.best_loss is not None else None
        for name, parameter in zip(self.names, self.parameters, strict=True):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            if keys:
                self.optimiser.state[parameter] = {key: tensors[f"{key}.{name}"] for key in keys}
        self.epoch, self.step = saved.epoch, saved.step
        self.loss = float("nan") if saved.loss is None else saved.loss
        self.best_epoch, self.best_loss = saved.best_epoch, saved.best_loss
        return True


def _write(path: Path, blob: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextlib.contextmanager
def _writer(log_dir: str | Path | None) -> Iterator[Any]:
    """A TensorBoard writer; None without a folder."""
    if log_dir is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ConfigError("log_dir needs TensorBoard: pip install 'crosscurrent[teacher]', or leave log_dir out") from e
    with SummaryWriter(str(log_dir)) as writer:
        yield writer
