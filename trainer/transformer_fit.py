"""The training of the teacher's transformer (`trainer/transformer.py`), and what comes of it.

    examples, offsets ─► windows ─► batches, shared by the ranks ─► epochs ─► the average that did best ─► FittedTransformer
                                                        └► a checkpoint after each, TensorBoard

The parameters' moving average of the epoch that did best on the examples to check by is kept, if it does better than the
offsets alone. Under torch.distributed the ranks share the batches of an epoch and stay equal, bit for bit.

Shapes as in `trainer/transformer.py`. Knows nothing of histories, splits in time, how the offsets were made, calibration
or distillation.
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
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn import functional

from models.errors import ConfigError
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
    seen,
)
from trainer.transformer import Text, Tokens, Transformer, TransformerConfig, Windows, batches, price_buckets, windows

NEGATIVES = 256
"""Items that a batch's next items are told apart from."""
PREDICT_TOKENS = 16_384


class StaleCheckpoint(ConfigError):
    """A checkpoint that this run cannot go on from."""


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


def save_network(network: Transformer, path: Path) -> None:
    """Weights and configuration in one file, written whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    _write(path, safetensors.save(tensors, {"config": msgspec.json.encode(network.config).decode()}))


def load_network(path: Path) -> Transformer:
    """What `save_network` wrote, on the CPU. Raises `ConfigError` where it is anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            config = msgspec.json.decode((file.metadata() or {})["config"], type=TransformerConfig)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network = Transformer(config, tensors["vocabulary_V"].numpy())
        network.load_state_dict(tensors)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as e:
        raise ConfigError(f"{path} is no transformer of this version: {e}. Delete it to start afresh") from e
    return network


# ── data to network ──────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(
    network: Transformer, examples: Examples, offsets_MT: np.ndarray, text: Text | None, device: torch.device
) -> tuple[Tokens, Tensor | None]:
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
    price_M = price_buckets(features_MF.numpy())
    arrays = (np.asarray(offsets_MT, np.float32), row_M, bucket_M, examples.platform_M, price_M, examples.ts_M, text_M[1:])
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    return Tokens(features_MF.to(device), *(tensor.to(device) for tensor in tensors)), text_IX


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


def _call(
    forward: Callable,
    config: TransformerConfig,
    events: Tokens,
    text_IX: Tensor | None,
    batch: _Batch,
    hidden_B: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Runs the network on a batch; the windows of `hidden_B` as of a platform that it does not know."""
    own = Tokens(*(column[batch.at_BL] for column in events))
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
    events: Tokens,
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
    warm_start: Transformer | None = None,
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

    Raises `ConfigError` for a configuration that does not fit and for `log_dir` without TensorBoard, `StaleCheckpoint`, one
    of them, for a checkpoint of another run or without its bytes; `ValueError` for examples, offsets or texts that do not
    fit the configuration; and what `check` raises.
    """
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(schedule.seed)
        seen_M = seen(examples)
        network = Transformer(config, _vocabulary(examples, seen_M, config))
        network.fit_inputs(examples.columns.features_NF.numpy()[seen_M], examples.platform_M[seen_M])
        if warm_start is not None:
            network.start_from(warm_start)
        network.to(device)
        run = _Run(network, examples, offsets_MT, text, schedule, seen_M, check)
        with _writer(log_dir if run.ranks.rank == 0 else None) as writer:
            return run.to_the_end(warm_start is not None, progress, writer, Path(checkpoint) if checkpoint else None)


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
            raise StaleCheckpoint(f"cannot go on from {path}: {e}. Delete the folder to start afresh") from e
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
