"""The teacher's causal transformer: what the order of a user's events adds to what others already say of each event.

    offset logits of each event (boosting, regression) ──────────────────────────────────────┐
    features, price, item, text, platform, offsets ─► e_i ─┬─► blocks ─► y_i ─┐               ▼
    [platform] ────────────────────────────────────────────┘                  ├─ MLP ─► offset + residual = logit
                                                           e_i ────── task ───┘
    attention of i to j ≤ i:  q_i · k_j − a · log1p((t_i − t_j) / 60 s) − b · log1p(i − j)      a, b ≥ 0, by head

A window holds so many events of one user; the next begins half a window later and speaks of its later half only, so what
is said of an event never depends on what came after it. The last layer begins at zero: an untrained network repeats the
offsets. Trained by `trainer/transformer_fit.py`.

Shapes: M events, F features, P platforms (axis of length P + 1; 0: unknown), T tasks, V items with an embedding of their
own, W windows, B windows of a batch, L events of a window, D width, I width of an item, H heads, X width of a text.
Knows nothing of histories, splits in time, users' names, how the offsets were made, calibration or distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.errors import ConfigError
from models.fold import FEATURE_NAMES
from models.student import CLIP

LEAST_FOR_PLATFORM = 256
"""A platform with fewer learning events is standardised like all of them together."""
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


class Tokens(NamedTuple):
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

    def forward(self, events: Tokens, text_BLX: Tensor | None) -> tuple[Tensor, Tensor | None]:
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

    def _encode(self, events: Tokens, text_BLX: Tensor | None) -> Tensor:
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
            count_Q = np.bincount(price_buckets(own_NF), minlength=_BUCKETS).astype(np.float64)
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


def price_buckets(features_MF: np.ndarray) -> np.ndarray:
    return np.rint(features_MF[:, _PRICE] * (_BUCKETS - 1)).astype(np.int64).clip(0, _BUCKETS - 1)
