"""The student: a gated linear recurrence over one user's events, O(1) work an event, and its heads.

    x = standardised features            (by platform)
    e = silu(W_e [x, item, category, platform])
    g, c = sigmoid, linear of W_r e
    a = g · exp(−Δt / τ)                  half the units have no τ
    h ← a ⊙ h + (1 − g) ⊙ c               the only step that is sequential
    f = silu(W_f [h, e]);  logits, gates = W_p [f, x]       heads of the event's platform, linear in x

The gates are trained on x alone, their weights on f are 0 (`gates_from_features`): they hear labels only, of which there are
few, and on f they learn those by heart.

Shapes: N events, F features, H hidden units, E width of the embedding, P platforms (axis of length P + 1: index 0 is
the shared row, used for platforms that the model does not know).

Knows nothing of rows, rings, files or losses: `models/scorer.py` serves it, the trainer trains it.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.nn import functional

from models.events import BINARY_HEADS, HEADS
from models.state import SIZES

N_LOGITS = len(BINARY_HEADS)
COMPONENTS: tuple[str, ...] = (
    "copy_recency",
    "ring_frequency",
    "short_mix",
    "long_mix",
    "markov",
    "popularity",
    "other",
)
"""What the category head mixes; `models/categories.py` says what each one is."""
N_GATES = len(COMPONENTS)
CLIP = 5.0
"""Standardised features are clipped to ± this."""
TAU_MIN_S, TAU_MAX_S = 300.0, 60 * 86400.0


class StudentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides the shapes of a student's tensors."""

    size: str
    """`cpu` or `gpu`: a key of `models.state.SIZES`, which fixes `hidden`."""
    hidden: int
    n_features: int
    width: int = 96
    head_width: int = 48
    item_buckets: int = 4096
    item_dim: int = 8
    category_buckets: int = 1024
    category_dim: int = 12
    platform_dim: int = 4
    platforms: tuple[str, ...] = ()
    """Known platforms; the i-th has index i + 1."""
    heads: dict[str, tuple[str, ...]] = {}
    """Platform → heads that it can have; one that is not named here has all. Index 0 (shared) has all."""

    @classmethod
    def of(cls, size: str, n_features: int, platforms: tuple[str, ...], heads: dict[str, tuple[str, ...]]):
        """The configuration that we use for a size."""
        wide = {"width": 256, "head_width": 128, "item_buckets": 65536, "item_dim": 16, "category_dim": 24}
        return cls(
            size=size,
            hidden=SIZES[size][0],
            n_features=n_features,
            platforms=tuple(platforms),
            heads={platform: tuple(names) for platform, names in heads.items()},
            **(wide if size == "gpu" else {}),
        )

    def check(self) -> None:
        """Raises `ValueError` where the fields do not fit each other."""
        if self.size not in SIZES or self.hidden != SIZES[self.size][0]:
            raise ValueError(f"size {self.size!r} with {self.hidden} hidden units is none of {SIZES}")
        if len(set(self.platforms)) != len(self.platforms):
            raise ValueError(f"a platform is named twice: {self.platforms}")
        unknown = {head for heads in self.heads.values() for head in heads} - set(HEADS)
        if unknown or set(self.heads) - set(self.platforms):
            raise ValueError(f"heads {sorted(unknown)} or platforms of {sorted(self.heads)} are not known")
        widths = (self.n_features, self.width, self.head_width, self.item_dim, self.category_dim, self.platform_dim)
        if min(*widths, self.item_buckets - 1, self.category_buckets - 1) < 1:
            raise ValueError("every width must be at least 1 and every table have at least 2 buckets")

    @property
    def n_inputs(self) -> int:
        return self.n_features + self.item_dim + self.category_dim + self.platform_dim

    def can_have(self) -> np.ndarray:
        """(P + 1, 4) bool: which of HEADS each platform can have."""
        named = [HEADS, *(self.heads.get(platform, HEADS) for platform in self.platforms)]
        return np.array([[head in heads for head in HEADS] for heads in named], dtype=bool)

    def flops_per_event(self) -> int:
        """Floating-point operations of the matrix products of one event, a multiplication and an addition each one."""
        products = (
            self.n_inputs * self.width
            + self.width * 2 * self.hidden
            + (self.hidden + self.width) * self.head_width
            + (self.head_width + self.n_features) * (N_LOGITS + N_GATES)
        )
        return 2 * products


class Columns(NamedTuple):
    """What the student reads of N events, as tensors on one device."""

    features_NF: Tensor
    """float32, raw as the fold gives them."""
    item_N: Tensor
    """int64, hash32, 0 none."""
    category_N: Tensor
    """int64, hash32, 0 none."""
    platform_N: Tensor
    """int64, 0 … P."""
    dt_s_N: Tensor
    """float32, s since the user's event before (0 for the first)."""

    @classmethod
    def of(cls, events: np.ndarray, features_NF: np.ndarray, dt_s_N: np.ndarray, platform_N: np.ndarray, device="cpu"):
        """From arrays as the fold gives them: `events` of EVENT (N,); the others may be longer than N."""
        n = len(events)
        return cls(
            torch.from_numpy(np.ascontiguousarray(features_NF[:n])).to(device),
            torch.from_numpy(events["item"].astype(np.int64)).to(device),
            torch.from_numpy(events["category"].astype(np.int64)).to(device),
            torch.from_numpy(np.asarray(platform_N[:n], np.int64)).to(device),
            torch.from_numpy(np.ascontiguousarray(dt_s_N[:n], np.float32)).to(device),
        )

    def to(self, device) -> Columns:
        return Columns(*(column.to(device) for column in self))


class Encoded(NamedTuple):
    """What an event alone (without `h`) decides."""

    x_NF: Tensor
    e_NE: Tensor
    a_NH: Tensor
    b_NH: Tensor


@njit(cache=True, nogil=True)
def _scan_kernel(a_NH, b_NH, h_NH):
    n, hidden = a_NH.shape
    for j in range(hidden):
        h_NH[0, j] = b_NH[0, j]
    for i in range(1, n):
        for j in range(hidden):
            h_NH[i, j] = a_NH[i, j] * h_NH[i - 1, j] + b_NH[i, j]


def _scan(a_NH: Tensor, b_NH: Tensor) -> Tensor:
    """h_i = a_i h_{i−1} + b_i with h_{−1} = 0. A sequence begins wherever a is 0."""
    if a_NH.device.type != "cpu":
        return _scan_by_doubling(a_NH, b_NH)
    h_NH = torch.empty_like(b_NH, memory_format=torch.contiguous_format)
    if len(h_NH):
        _scan_kernel(a_NH.contiguous().numpy(), b_NH.contiguous().numpy(), h_NH.numpy())
    return h_NH


def _scan_by_doubling(a_NH: Tensor, b_NH: Tensor) -> Tensor:
    """The same in log2(N) launches instead of N: after step s, (a, b) at i compose the 2^s events up to i."""
    step = 1
    while step < len(a_NH):
        b_NH = torch.cat([b_NH[:step], a_NH[step:] * b_NH[:-step] + b_NH[step:]])
        a_NH = torch.cat([a_NH[:step], a_NH[step:] * a_NH[:-step]])
        step *= 2
    return b_NH.clone()


class _Scan(torch.autograd.Function):
    """The exact scan and its gradient, which is the same scan run backwards."""

    @staticmethod
    def forward(ctx, a_NH: Tensor, b_NH: Tensor, starts_N: Tensor) -> Tensor:
        a_NH = a_NH.masked_fill(starts_N[:, None], 0.0)
        h_NH = _scan(a_NH, b_NH)
        ctx.save_for_backward(a_NH, h_NH, starts_N)
        return h_NH

    @staticmethod
    def backward(ctx, grad_NH: Tensor):
        a_NH, h_NH, starts_N = ctx.saved_tensors
        # Gradient of b: d_i = g_i + a_{i+1} d_{i+1}. The flipped first row multiplies nothing.
        following_NH = torch.cat([a_NH[1:], torch.zeros_like(a_NH[:1])]).flip(0)
        db_NH = _scan(following_NH, grad_NH.flip(0)).flip(0)
        before_NH = torch.cat([torch.zeros_like(h_NH[:1]), h_NH[:-1]])
        return (db_NH * before_NH).masked_fill(starts_N[:, None], 0.0), db_NH, None


def linear_scan(a_NH: Tensor, b_NH: Tensor, starts_N: Tensor) -> Tensor:
    """h_i = a_i ⊙ h_{i−1} + b_i, with h = 0 before every event where `starts_N` (bool) holds. Exact, differentiable."""
    return _Scan.apply(a_NH, b_NH, starts_N)


class Student(nn.Module):
    """The network. Everything in RECURRENCE decides `h` and is kept bit-equal by a minor version.

    `dropout` acts on the inputs and on [h, e] while training.
    """

    RECURRENCE: tuple[str, ...] = (
        "feature_mean_PF",
        "feature_std_PF",
        "item.weight",
        "category.weight",
        "platform.weight",
        "embed.weight",
        "embed.bias",
        "recur.weight",
        "recur.bias",
        "log_tau_H",
    )

    def __init__(self, config: StudentConfig, dropout: float = 0.1) -> None:
        super().__init__()
        config.check()
        self.config = config
        rows, hidden, features = len(config.platforms) + 1, config.hidden, config.n_features
        self.register_buffer("feature_mean_PF", torch.zeros(rows, features))
        self.register_buffer("feature_std_PF", torch.ones(rows, features))
        self.item = nn.Embedding(config.item_buckets, config.item_dim)
        self.category = nn.Embedding(config.category_buckets, config.category_dim)
        self.platform = nn.Embedding(rows, config.platform_dim)
        self.embed = nn.Linear(config.n_inputs, config.width)
        self.recur = nn.Linear(config.width, 2 * hidden)
        self.log_tau_H = nn.Parameter(torch.linspace(np.log(TAU_MIN_S), np.log(TAU_MAX_S), hidden))
        # Every other unit forgets with time; the others only by their gate.
        self.register_buffer("decays_H", (torch.arange(hidden) % 2).float(), persistent=False)
        self.trunk = nn.Linear(hidden + config.width, config.head_width)
        # Row 0 is shared; a platform's head is the shared one plus its own row.
        self.head_weight_POK = nn.Parameter(torch.zeros(rows, N_LOGITS + N_GATES, config.head_width + features))
        self.head_bias_PO = nn.Parameter(torch.zeros(rows, N_LOGITS + N_GATES))
        self.dropout = nn.Dropout(dropout)
        self._initialise(hidden)

    @torch.no_grad()
    def _initialise(self, hidden: int) -> None:
        for table in (self.item, self.category, self.platform):
            nn.init.normal_(table.weight, std=0.05)
        # Gate biases from short to long memory, spread so that each half of the units has all of them.
        order = torch.argsort((torch.arange(hidden) * 0.6180339887) % 1.0)
        self.recur.bias[:hidden] = torch.linspace(0.5, 5.5, hidden)[order]
        nn.init.normal_(self.head_weight_POK[0, :N_LOGITS, : self.config.head_width], std=0.02)

    @torch.no_grad()
    def fit_normalisation(self, features_NF: np.ndarray, platform_N: np.ndarray, least: int = 256) -> None:
        """Sets the standardisation from training features: row 0 pooled, a platform with fewer than `least` events
        like row 0."""
        for index in range(len(self.config.platforms) + 1):
            of_platform = features_NF if index == 0 else features_NF[platform_N == index]
            if index and len(of_platform) < least:
                self.feature_mean_PF[index] = self.feature_mean_PF[0]
                self.feature_std_PF[index] = self.feature_std_PF[0]
                continue
            std_F = of_platform.std(axis=0, dtype=np.float64)
            self.feature_mean_PF[index] = torch.from_numpy(of_platform.mean(axis=0, dtype=np.float64))
            # A feature that never varied in training is left on its own scale.
            self.feature_std_PF[index] = torch.from_numpy(np.where(std_F < 1e-3, 1.0, std_F))

    def encode(self, columns: Columns) -> Encoded:
        """Everything of the events that does not need `h`: this part decides `h`."""
        features_NF, item_N, category_N, platform_N, dt_s_N = columns
        x_NF = (features_NF - self.feature_mean_PF[platform_N]) / self.feature_std_PF[platform_N]
        x_NF = x_NF.clamp(-CLIP, CLIP)
        inputs = (
            self.dropout(x_NF),
            self.dropout(self.item(_bucket(item_N, self.config.item_buckets))),
            self.dropout(self.category(_bucket(category_N, self.config.category_buckets))),
            self.platform(platform_N),
        )
        e_NE = functional.silu(self.embed(torch.cat(inputs, dim=1)))
        gate_NH, candidate_NH = self.recur(e_NE).chunk(2, dim=1)
        gate_NH = torch.sigmoid(gate_NH)
        rate_H = torch.exp(-self.log_tau_H) * self.decays_H
        # Beyond e^−60 nothing is left; further down are subnormal numbers, which take ten times as long.
        a_NH = gate_NH * torch.exp((-dt_s_N[:, None] * rate_H).clamp_min(-60.0))
        return Encoded(x_NF, e_NE, a_NH, (1.0 - gate_NH) * candidate_NH)

    def heads(self, h_NH: Tensor, x_NF: Tensor, e_NE: Tensor, platform_N: Tensor) -> tuple[Tensor, Tensor]:
        """→ logits (N, 3) in the order of BINARY_HEADS, gate logits (N, 7) in the order of COMPONENTS."""
        z_NK = self.before_heads(h_NH, x_NF, e_NE)
        out_NO = by_platform(z_NK, platform_N, self.head_weight_POK, self.head_bias_PO)
        return out_NO[:, :N_LOGITS], out_NO[:, N_LOGITS:]

    def before_heads(self, h_NH: Tensor, x_NF: Tensor, e_NE: Tensor) -> Tensor:
        """→ (N, K): what every head is linear in."""
        f_NK = functional.silu(self.trunk(self.dropout(torch.cat([h_NH, e_NE], dim=1))))
        return torch.cat([f_NK, x_NF], dim=1)

    def forward_sequences(self, columns: Columns, starts_N: Tensor) -> tuple[Tensor, Tensor]:
        """For training: ragged sequences one after another, each in order; `starts_N` (bool) marks first events, before
        which `h` is 0 (so a long history may be cut). → logits (N, 3), gate logits (N, 7)."""
        x_NF, e_NE, a_NH, b_NH = self.encode(columns)
        h_NH = linear_scan(a_NH, b_NH, starts_N)
        return self.heads(h_NH, x_NF, e_NE, columns.platform_N)

    forward = forward_sequences

    @torch.no_grad()
    def gates_from_features(self) -> None:
        """The gates' weights on f become 0, as training leaves them; those of an artifact trained before may not be."""
        self.head_weight_POK[:, N_LOGITS:, : self.config.head_width] = 0.0

    def recurrence_id(self) -> int:
        """u4 ≠ 0 that names the tensors which decide `h` (sha256 of their names, shapes and bytes)."""
        digest = hashlib.sha256()
        state = self.state_dict()
        for name in self.RECURRENCE:
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.numpy().tobytes())
        return int.from_bytes(digest.digest()[:4], "little") or 1

    def head_parameters(self) -> list[nn.Parameter]:
        """What a minor version trains. All other tensors decide `h`, or what all heads hear of it: by a trunk that learned
        too, a head whose labels take days would be moved by those whose labels take minutes."""
        return [self.head_weight_POK, self.head_bias_PO]


@torch.no_grad()
def heads_of_platforms(student: Student) -> tuple[Tensor, Tensor]:
    """→ (P + 1, O, K), (P + 1, O): each platform's own weights and biases, the shared ones added; copies."""
    weight_POK, bias_PO = student.head_weight_POK.clone(), student.head_bias_PO.clone()
    weight_POK[1:] += weight_POK[:1]
    bias_PO[1:] += bias_PO[:1]
    return weight_POK, bias_PO


def by_platform(z_NK: Tensor, platform_N: Tensor, weight_POK: Tensor, bias_PO: Tensor) -> Tensor:
    """(N, O): each event by its platform's weights, which are the shared ones (row 0) plus its own row."""
    # Sorted by platform, a product for each that occurs: the work does not grow with the platforms known.
    counts = torch.bincount(platform_N, minlength=len(bias_PO)).tolist()

    def product(part_MK: Tensor, index: int) -> Tensor:
        weight_OK, bias_O = weight_POK[0], bias_PO[0]
        if index:
            weight_OK, bias_O = weight_OK + weight_POK[index], bias_O + bias_PO[index]
        return functional.linear(part_MK, weight_OK, bias_O)

    if max(counts) == len(z_NK):
        return product(z_NK, counts.index(max(counts)))
    order_N = torch.argsort(platform_N, stable=True)
    parts = enumerate(z_NK[order_N].split(counts))
    out_NO = torch.cat([product(part_MK, index) for index, part_MK in parts if len(part_MK)])
    return out_NO[torch.argsort(order_N)]


def _bucket(hash_N: Tensor, buckets: int) -> Tensor:
    """Bucket 0 is kept for `none`."""
    # Not `torch.where`: it would copy its 0 to the card, which no CUDA graph may.
    return (1 + hash_N % (buckets - 1)).masked_fill(hash_N == 0, 0)
