"""The teacher's transformer by the trainer's settings: on any devices, from the last one on, and kept.

    a round (trainer/lessons.py) ────────────────────────────────┐
    torchrun --no-python --nproc-per-node N crosscurrent teacher ┴─► fit_kept ─► <folder>/transformer.safetensors
                                                                       │                └─► where the next one begins
                                                                       ├ checkpoint/   after each epoch; gone at the end
                                                                       └ tensorboard/  with trainer.teacher_tensorboard

The rest of a teacher takes minutes of a CPU, a large transformer hours of several cards: so it may be trained by a program
of its own, on the same stored history, and the rounds of the trainer begin with what that left. `folder` is
`trainer.teacher_dir`. Every rank reads the history and makes the examples, which must be the same; the offsets are made by
rank 0. Nothing of Kafka, students or gates.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import structlog
import torch
import torch.distributed as dist

from models.config import Settings
from models.errors import ConfigError
from models.fold import N_FEATURES
from models.student import StudentConfig
from trainer.examples import Check, Examples, gate_start, heads_of, make_examples, replay
from trainer.fit import Progress, Schedule
from trainer.history import History, HistoryStore
from trainer.labels import make_labels
from trainer.texts import WIDTH as TEXT_WIDTH
from trainer.texts import by_item, sentences_of
from trainer.transformer import Text, Transformer, TransformerConfig
from trainer.transformer_fit import FittedTransformer, StaleCheckpoint, fit_transformer, load_network, save_network
from trainer.watch import Stages

log = structlog.get_logger("crosscurrent.trainer")

EPOCHS, PATIENCE = 6, 2
KEPT = "transformer.safetensors"
LONGEST = timedelta(hours=12)
"""That the other ranks wait for the offsets."""


def fit_kept(
    settings: Settings,
    examples: Examples,
    offset_MT: np.ndarray,
    platforms: tuple[str, ...],
    *,
    text: Text | None = None,
    check: Check = lambda: None,
    progress: Progress = lambda share: None,
) -> FittedTransformer:
    """Trains the transformer of the settings as a residual on `offset_MT` (M, T; NaN counts as 0), from the one that was
    kept last where there is one, and keeps it. Goes on behind the checkpoint of a run that was stopped; one of another run,
    or damaged, is deleted, and the log says so. Every rank of torch.distributed calls it alike.

    Raises `ConfigError` where settings and this machine do not fit, and what `check` raises."""
    options, folder = settings.trainer, settings.trainer.teacher_dir
    config = TransformerConfig.of(
        options.teacher_transformer,
        examples.columns.features_NF.shape[1],
        platforms,
        examples.tasks,
        text_dim=TEXT_WIDTH if text is not None else 0,
        task_weights=options.teacher_task_weights,
    )
    schedule = Schedule(epochs=EPOCHS, batch_events=8192, rate=1e-3, patience=PATIENCE, seed=options.seed)
    last = _last(folder / KEPT)

    def fit() -> FittedTransformer:
        return fit_transformer(
            examples,
            np.nan_to_num(offset_MT),
            config,
            schedule,
            text=text,
            warm_start=last,
            device=device_of(options.teacher_device),
            check=check,
            progress=progress,
            log_dir=folder / "tensorboard" / time.strftime("%Y%m%d-%H%M%S") if options.teacher_tensorboard else None,
            checkpoint=folder / "checkpoint",
        )

    try:
        fitted = fit()
    except StaleCheckpoint as error:
        log.warning("a checkpoint of the transformer is not used", reason=str(error))
        _once(lambda: shutil.rmtree(folder / "checkpoint"))
        fitted = fit()
    _once(lambda: _keep(fitted.network, folder))
    return fitted


def device_of(name: str) -> torch.device:
    """`auto`: this rank's card, the CPU where torch sees none. Raises `ConfigError` for a card that is not there."""
    if name == "auto":
        here = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", here) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"trainer.teacher_device is {name!r} and torch sees no card; set it to auto or cpu")
    return device


def text_of(settings: Settings, words: dict[int, str], examples: Examples) -> Text:
    """What the transformer asks of the examples' items: a vector of the words of the item's category."""
    item_M, category_M = examples.columns.item_N.numpy(), examples.columns.category_N.numpy()
    pairs = np.unique(np.stack([item_M, category_M], axis=1), axis=0)
    sentences = sentences_of((item, words.get(category), None, None) for item, category in pairs.tolist())
    return by_item(sentences, settings.worker.data_dir / "texts.npz")


def _last(path: Path) -> Transformer | None:
    if not path.exists():
        return None
    try:
        return load_network(path)
    except ConfigError as error:
        log.warning("the last transformer is not used", reason=str(error))
        return None


def _keep(network: Transformer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_network(network, folder / KEPT)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


# ── ranks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _once(act: Callable[[], None]) -> None:
    """By rank 0; nobody goes on before it is done."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        act()
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def ranks() -> Iterator[int]:
    """→ this process's rank. Joins those that torchrun has started; alone without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=LONGEST)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _same_everywhere(examples: Examples) -> None:
    """Raises `ConfigError` where ranks have other examples: the history grew while they read it."""
    digest = hashlib.sha256()
    for array in (examples.index_M, examples.y_MT, examples.learn_MT, examples.columns.features_NF.numpy()):
        digest.update(np.ascontiguousarray(array).data)
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    if any(not torch.equal(own, other) for other in found):
        raise ConfigError("the history grew while the ranks read it: stop the trainer, or give them a copy, and start again")


def _offsets(settings: Settings, examples: Examples, rank: int) -> np.ndarray:
    """(M, T) float32: the mean logit of trees and regression, out of fold where they learned; made by rank 0."""
    offset = torch.empty(examples.y_MT.shape, dtype=torch.float32)
    if rank == 0:
        from trainer.teacher import teach

        members = teach(examples, threads=settings.trainer.threads).members_MT
        offset = torch.from_numpy(np.mean([*members.values()], axis=0, dtype=np.float32))
    if dist.is_initialized():
        dist.broadcast(offset, 0)
    return offset.numpy()


# ── a program of its own ─────────────────────────────────────────────────────────────────────────────────────────────


def examples_of(settings: Settings) -> tuple[History, Examples]:
    """All that a round of the trainer would learn from. Raises `ConfigError` where no label has matured."""
    options = settings.trainer
    history = HistoryStore(options.history_uri).read()
    labels = make_labels(history, settings.fold, settings.horizons)
    start = gate_start(history, labels, settings.horizons, options.validation_fraction, options.max_events)
    if start is None:
        raise ConfigError(f"no label of {options.history_uri} has matured: let the trainer pull, or import a history")
    replayed = replay(
        history,
        settings.fold,
        settings.worker.size,
        until_ms=start.user_U,
        max_events=options.max_events,
        older_share=options.older_share,
    )
    heads = heads_of(history, None, start)
    config = StudentConfig.of(settings.worker.size, N_FEATURES, history.platforms, heads)
    return history, make_examples(history, labels, replayed, config, settings.horizons, start)


def pretrain(settings: Settings) -> dict:
    """Trains and keeps the transformer; called by every rank. → what came of it, as JSON."""
    if settings.trainer.teacher_transformer is None:
        raise ConfigError("set trainer.teacher_transformer to a size: there is no transformer to train")
    torch.set_num_threads(settings.trainer.threads)
    started_s = time.monotonic()
    with ranks() as rank, Stages() if rank == 0 else contextlib.nullcontext() as stages:
        history, examples = examples_of(settings)
        if dist.is_initialized():
            _same_everywhere(examples)
        offset_MT = _offsets(settings, examples, rank)
        text = text_of(settings, history.categories, examples) if settings.trainer.teacher_texts else None
        with stages.stage("transformer") if stages is not None else contextlib.nullcontext():
            progress = stages.share if stages is not None else lambda share: None
            fitted = fit_kept(settings, examples, offset_MT, history.platforms, text=text, progress=progress)
        return {
            "rank": rank,
            "ranks": dist.get_world_size() if dist.is_initialized() else 1,
            "examples": len(examples),
            "adds": fitted.adds,
            "epochs": fitted.epochs,
            "log_loss": round(fitted.check_loss, 6),
            "log_loss_of_the_offsets": round(fitted.offset_loss, 6),
            "kept": str(settings.trainer.teacher_dir / KEPT),
            "seconds": round(time.monotonic() - started_s, 1),
        }
