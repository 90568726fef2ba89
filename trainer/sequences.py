"""Sequence models as a user would otherwise build them: baselines of the benchmark, never served.

    items ─► embedding ───────────────────────────────┐              ┌─ · embedding of every item ─► next item
    kind, item, category, platform, price, Δt, hour ──┴─► body ─► y ─┴─ heads ─► click, purchase, return …
                                                          gru: a GRU (GRU4Rec: Hidasi et al., ICLR 2016)
                                                          attention: causal self-attention (SASRec: Kang, McAuley, ICDM 2018)
                                                          mean: mean of the events so far beside the last, an MLP

"Like", since the losses and sizes are ours: softmax over all items where there are few, else a sampled one with the log-Q
correction (Bengio, Senécal 2008); AdamW, and the epoch that did best on what it is checked by is kept. Raw events only, no
rolling features. What is said of an event depends on it and on those before it in its window.

Shapes: N or M events sorted by sequence, V items (1 … V; 0 none), T tasks, B windows, L events of a window, D width.
Knows nothing of splits in time, states, the student or the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.examples import Examples, check_loss
from trainer.fit import optimiser_of, platform_weights, put
from trainer.history import History
from trainer.transformer import Windows, batches, windows

BODIES = ("gru", "attention", "mean")
NEGATIVES, FULL_SOFTMAX = 512, 4096
"""Items drawn a batch; vocabularies up to which all are compared instead."""
ITEM_BUCKETS, CATEGORY_BUCKETS = 4096, 1024
_NUMBERS = 8


class Settings(NamedTuple):
    """How large, how long."""

    body: str
    width: int = 64
    window: int = 32
    """Events of the longest context; even."""
    dropout: float = 0.2
    epochs: int = 4
    batch_events: int = 2048
    rate: float = 2e-3
    patience: int = 1
    """Epochs without progress before it stops."""
    seed: int = 0


class Body(nn.Module):
    """(B, L, D) → (B, L, D), causal."""

    def __init__(self, settings: Settings) -> None:
        """ValueError for a body that is none of BODIES."""
        super().__init__()
        width, drop = settings.width, settings.dropout
        if settings.body not in BODIES:
            raise ValueError(f"a body is one of {', '.join(BODIES)}, not {settings.body!r}")
        self.kind, self.dropout = settings.body, nn.Dropout(drop)
        if self.kind == "gru":
            self.gru = nn.GRU(width, width, batch_first=True)
        elif self.kind == "attention":
            self.position_LD = nn.Parameter(0.02 * torch.randn(settings.window, width))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(width, 2, 2 * width, drop, "gelu", batch_first=True, norm_first=True)
                for _ in range(2)
            )
            self.norm = nn.LayerNorm(width)
        else:
            self.mlp = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        length, x_BLD = x_BLD.shape[1], self.dropout(x_BLD)
        if self.kind == "gru":
            return self.dropout(self.gru(x_BLD)[0])
        if self.kind == "attention":
            future_LL = torch.ones(length, length, dtype=torch.bool).triu(1)
            y_BLD = x_BLD + self.position_LD[:length]
            for block in self.blocks:
                y_BLD = block(y_BLD, src_mask=future_LL)
            return self.norm(y_BLD)
        mean_BLD = x_BLD.cumsum(1) / torch.arange(1, length + 1)[:, None]
        return self.mlp(torch.cat([x_BLD, mean_BLD], dim=2))


def _places(part: Windows) -> tuple[np.ndarray, Tensor]:
    """→ events (B, L), the last again where a window is shorter; which of them a window speaks of (bool)."""
    place_L, length_B1 = np.arange(part.length_W.max()), part.length_W[:, None]
    at_BL = part.first_W[:, None] + np.minimum(place_L, length_B1 - 1)
    return at_BL, torch.from_numpy((place_L < length_B1) & (place_L >= part.skip_W[:, None]))


def _train(
    network: nn.Module,
    settings: Settings,
    learn: Windows,
    loss_of: Callable[[np.ndarray, Tensor], Tensor | None],
    judge: Callable[[], float],
) -> float:
    """Trains on windows and keeps the epoch whose `judge` (lower is better) is least. → that value"""
    parameters, rng = list(network.parameters()), np.random.default_rng(settings.seed)
    optimiser = optimiser_of(parameters)
    steps = max(1, settings.epochs * len(batches(learn.length_W, settings.batch_events)))
    best, best_at, best_value, step = [p.detach().clone() for p in parameters], 0, float("inf"), 0
    for epoch in range(1, settings.epochs + 1):
        network.train()
        for part in batches(learn.length_W, settings.batch_events, rng):
            loss = loss_of(*_places(Windows(*(column[part] for column in learn))))
            step += 1
            if loss is None:
                continue
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimiser.param_groups:
                group["lr"] = settings.rate * (0.05 + 0.475 * (1.0 + np.cos(np.pi * step / steps))) * min(1.0, step / 50)
            optimiser.step()
        network.eval()
        value = judge()
        if value < best_value:
            best, best_at, best_value = [p.detach().clone() for p in parameters], epoch, value
        elif epoch - best_at >= settings.patience:
            break
    put(parameters, best)
    network.eval()
    return best_value


# ── the next item ────────────────────────────────────────────────────────────────────────────────────────────────────


class NextItem(nn.Module):
    """Scores of all items as the next one; the embedding of what is read and of what is told apart is one."""

    def __init__(self, n_items: int, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.item = nn.Embedding(n_items + 1, settings.width)
        nn.init.normal_(self.item.weight, std=0.1)
        self.bias_V = nn.Parameter(torch.zeros(n_items))
        self.body = Body(settings)

    def forward(self, item_BL: Tensor) -> Tensor:
        """→ (B, L, D), to be compared with `item` and `bias_V`."""
        return self.body(self.item(item_BL))

    def scores(self, y_ND: Tensor) -> Tensor:
        """→ (N, V) logits."""
        return y_ND @ self.item.weight[1:].T + self.bias_V


def fit_next(
    item_N: np.ndarray,
    sequence_N: np.ndarray,
    next_N: np.ndarray,
    learn_N: np.ndarray,
    check_N: np.ndarray,
    n_items: int,
    settings: Settings,
) -> NextItem:
    """Learns `next_N` (1 … V) where `learn_N` (bool) holds. `item_N`: what each event showed, 0 none; `sequence_N`: sorted.
    The same seed gives the same network."""
    torch.manual_seed(settings.seed)
    network = NextItem(n_items, settings)
    count_V = np.bincount(next_N[learn_N], minlength=n_items + 1)[1:].astype(np.float64)
    log_q_V = torch.log(torch.from_numpy((count_V + 0.1) / (count_V + 0.1).sum()).float())
    with torch.no_grad():
        network.bias_V.copy_(log_q_V)
    item, following, learns = torch.from_numpy(item_N), torch.from_numpy(next_N), torch.from_numpy(learn_N)

    def loss_of(at_BL: np.ndarray, speaks_BL: Tensor) -> Tensor | None:
        wanted_BL = speaks_BL & learns[at_BL]
        if not wanted_BL.any():
            return None
        y_ND, right_N = network(item[at_BL])[wanted_BL], following[at_BL][wanted_BL] - 1
        if n_items <= FULL_SOFTMAX:
            return functional.cross_entropy(network.scores(y_ND), right_N)
        drawn_K = torch.multinomial(log_q_V.exp(), NEGATIVES, replacement=True)
        own_N = (y_ND * network.item(right_N + 1)).sum(1) + network.bias_V[right_N]
        others_NK = y_ND @ network.item(drawn_K + 1).T + network.bias_V[drawn_K] - log_q_V[drawn_K] - np.log(NEGATIVES)
        others_NK = others_NK.masked_fill(right_N[:, None] == drawn_K, float("-inf"))
        return (torch.logsumexp(torch.cat([own_N[:, None], others_NK], dim=1), dim=1) - own_N).mean()

    def judge() -> float:
        losses = [
            functional.cross_entropy(torch.from_numpy(scores), following[at] - 1, reduction="sum").item()
            for at, scores in next_scores(network, item_N, sequence_N, check_N)
        ]
        return sum(losses) / max(1, int(check_N.sum()))

    _train(network, settings, windows(sequence_N, settings.window, learn_N), loss_of, judge)
    return network


def next_scores(
    network: NextItem, item_N: np.ndarray, sequence_N: np.ndarray, wanted_N: np.ndarray, batch_events: int = 1024
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (positions (n,), logits of all items (n, V) float32) until every event of `wanted_N` (bool) had its turn."""
    item = torch.from_numpy(item_N)
    told = windows(sequence_N, network.settings.window, wanted_N)
    for part in batches(told.length_W, batch_events):
        at_BL, speaks_BL = _places(Windows(*(column[part] for column in told)))
        of_BL = speaks_BL.numpy() & wanted_N[at_BL]
        if of_BL.any():
            with torch.inference_mode():
                yield at_BL[of_BL], network.scores(network(item[at_BL])[torch.from_numpy(of_BL)]).numpy()


# ── the binary tasks ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Raw(NamedTuple):
    """Columns of raw events."""

    kind: Tensor
    item: Tensor
    category: Tensor
    platform: Tensor
    numbers: Tensor
    """Δt, whether it ended a session, price, whether there is one, quantity, hour of the day twice, weekend."""


class EventModel(nn.Module):
    """Raw events → logits of the tasks, by platform."""

    def __init__(self, n_kinds: int, n_platforms: int, n_tasks: int, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.kind, self.platform = nn.Embedding(n_kinds, width), nn.Embedding(n_platforms + 1, width)
        self.item, self.category = nn.Embedding(ITEM_BUCKETS, width), nn.Embedding(CATEGORY_BUCKETS, width)
        for table in (self.kind, self.platform, self.item, self.category):
            nn.init.normal_(table.weight, std=0.1)
        self.numbers = nn.Linear(_NUMBERS, width)
        self.body = Body(settings)
        self.head = nn.Linear(width, (n_platforms + 1) * n_tasks)

    def forward(self, raw: _Raw) -> Tensor:
        """Columns (B, L, …) → (B, L, T)."""
        x_BLD = self.kind(raw.kind) + self.platform(raw.platform) + self.item(raw.item) + self.category(raw.category)
        out_BLPT = self.head(self.body(x_BLD + self.numbers(raw.numbers))).unflatten(2, (self.platform.num_embeddings, -1))
        index = raw.platform[:, :, None, None].expand(-1, -1, 1, out_BLPT.shape[3])
        return out_BLPT.gather(2, index)[:, :, 0]


def _raw(examples: Examples, history: History) -> _Raw:
    events, dt_s_M = history.events[examples.index_M], examples.columns.dt_s_N.numpy()
    hour_M = events["ts"] % 86_400_000 / 86_400_000 * 2 * np.pi
    weekend_M = (events["ts"] // 86_400_000 + 3) % 7 >= 5
    numbers = (
        np.log1p(dt_s_M) / 10, dt_s_M > 1800, events["price"] / 255, events["price"] > 0,
        np.log1p(np.abs(events["quantity"])), np.sin(hour_M), np.cos(hour_M), weekend_M,
    )  # fmt: skip
    buckets = [
        np.where(events[name] == 0, 0, 1 + events[name].astype(np.int64) % (n - 1))
        for name, n in (("item", ITEM_BUCKETS), ("category", CATEGORY_BUCKETS))
    ]
    columns = [events["kind"].astype(np.int64), *buckets, examples.platform_M, np.stack(numbers, 1).astype(np.float32)]
    return _Raw(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))


def fit_events(examples: Examples, history: History, n_platforms: int, n_kinds: int, settings: Settings) -> np.ndarray:
    """Learns all tasks of all platforms at once from the labels to learn from, and keeps the epoch that does best on those
    to check by. → logits (M, T) float32 of every event."""
    torch.manual_seed(settings.seed)
    raw, network = _raw(examples, history), EventModel(n_kinds, n_platforms, len(examples.tasks), settings)
    weight_M = torch.from_numpy(platform_weights(examples, n_platforms)[examples.platform_M])
    y, weight_MT = torch.from_numpy(examples.y_MT), torch.from_numpy(examples.learn_MT) * weight_M[:, None]

    def loss_of(at_BL: np.ndarray, speaks_BL: Tensor) -> Tensor:
        at_N = at_BL[speaks_BL.numpy()]
        logits_NT = network(_Raw(*(column[at_BL] for column in raw)))[speaks_BL]
        losses_NT = functional.binary_cross_entropy_with_logits(logits_NT, y[at_N], reduction="none")
        return ((losses_NT * weight_MT[at_N]).sum(0) / weight_MT[at_N].sum(0).clamp(min=1e-6)).mean()

    def say(wanted_M: np.ndarray) -> np.ndarray:
        out_MT = np.full(examples.y_MT.shape, np.nan, np.float32)
        told = windows(examples.user_M, settings.window, wanted_M)
        with torch.inference_mode():
            for part in batches(told.length_W, 8192):
                at_BL, speaks_BL = _places(Windows(*(column[part] for column in told)))
                out_MT[at_BL[speaks_BL.numpy()]] = network(_Raw(*(column[at_BL] for column in raw)))[speaks_BL].numpy()
        return out_MT

    checked_M = examples.check_MT.any(axis=1)
    learn = windows(examples.user_M, settings.window, examples.learn_MT.any(axis=1))
    _train(network, settings, learn, loss_of, lambda: check_loss(examples, say(checked_M)))
    return say(np.ones(len(examples), bool))
