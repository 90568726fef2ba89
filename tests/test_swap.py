"""Models published while a real worker scores: swapped in between micro-batches; what is wrong is refused with the
incumbent serving, and the last good one survives a restart."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import oracle
import pytest
from aiokafka import AIOKafkaProducer
from fleet import Fleet, WorkerProcess
from safetensors import numpy as safetensors
from test_artifact import forge, path_of, write
from tiny import make_model

from models.artifact import TENSORS, publish
from models.config import FoldConfig, KafkaConfig, TopicsConfig
from models.events import Announcement, ModelVersion
from models.state import STATE_ABI
from streams.kafka import client_options

pytestmark = pytest.mark.broker


@pytest.fixture
async def fleet(kafka: KafkaConfig, topics: TopicsConfig, prefix: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with Fleet(kafka, topics, prefix, tmp_path, seed=4).running() as fleet:
        yield fleet


def store_of(fleet: Fleet) -> str:
    return str(fleet.folder / "store")


def publish_tiny(fleet: Fleet, seed: int) -> ModelVersion:
    return publish(
        store_of(fleet),
        "student",
        make_model(seed=seed, version="student/x"),
        metrics={},
        training_range={},
        reference_histograms={},
        fold=FoldConfig(),
        now_ms=int(time.time() * 1000),
    )


async def announce(fleet: Fleet, version: ModelVersion, fallbacks: tuple[ModelVersion, ...] = ()) -> None:
    record = Announcement(
        **msgspec.structs.asdict(version), name="student", published_at=int(time.time() * 1000), fallbacks=list(fallbacks)
    )
    async with AIOKafkaProducer(**client_options(fleet.kafka)) as producer:
        await producer.send_and_wait(fleet.topics.models, msgspec.json.encode(record), key=b"student")


async def refused(fleet: Fleet, worker: WorkerProcess, reason: str, already: int) -> None:
    await fleet.said(worker, "model.refused", times=already + 1)
    last = [line for line in worker.log_path.read_text().splitlines() if "model.refused" in line][already]
    assert reason in last and "student/000002" in last, last


async def models_seen(fleet: Fleet) -> list[str]:
    """Models in `scores`, by the first score of each."""
    world = await oracle.read(fleet.kafka, fleet.topics, fleet.app_id, fleet.sources)
    first: dict[str, int] = {}
    for record in (record for partition in world.partitions[fleet.topics.scores] for record in partition):
        score = msgspec.json.decode(record.value)
        first[score["model"]] = min(first.get(score["model"], score["scored_at"]), score["scored_at"])
    return sorted(first, key=first.get)


async def test_a_model_is_swapped_in_under_load_and_wrong_ones_are_refused(fleet: Fleet):
    worker = fleet.start()
    async with fleet.fed(rate=800):
        await fleet.committing()
        second = publish_tiny(fleet, seed=2)
        await announce(fleet, second)
        await fleet.said(worker, "model.swapped", times=2)

        other = publish_tiny(fleet, seed=3)
        forged = [
            ("path", msgspec.structs.replace(other, uri="../student/000003")),
            ("sum", msgspec.structs.replace(other, sha256="0" * 64)),
            ("abi", msgspec.structs.replace(other, abi=STATE_ABI + 1)),
            ("nonfinite", _with_nan(fleet, publish_tiny(fleet, seed=4))),
            ("sum", _damaged(fleet, publish_tiny(fleet, seed=5), lambda body: body[:-100])),
            ("sum", _damaged(fleet, publish_tiny(fleet, seed=6), lambda body: body[:-1] + bytes([body[-1] ^ 1]))),
        ]
        for i, (reason, version) in enumerate(forged):
            await announce(fleet, version)
            await refused(fleet, worker, reason, i)
        await asyncio.sleep(1)
    await fleet.caught_up()
    await fleet.drain(worker)
    fleet.scorer = None  # two models served, so no single one explains `h` and the probabilities
    (await fleet.verdict()).assert_ok()
    assert await models_seen(fleet) == ["student/000001", "student/000002"]


async def test_the_last_good_model_survives_a_restart(fleet: Fleet):
    good = publish_tiny(fleet, seed=2)
    bad = _damaged(fleet, publish_tiny(fleet, seed=3), lambda body: body[:-100])
    await announce(fleet, bad, fallbacks=(good,))
    worker = fleet.start()
    async with fleet.fed(rate=300):
        await fleet.committing()
    await fleet.caught_up()
    await fleet.drain(worker)
    assert await models_seen(fleet) == ["student/000002"]


def _damaged(fleet: Fleet, version: ModelVersion, change) -> ModelVersion:
    path = path_of(store_of(fleet), version, TENSORS)
    write(path, change(Path(path).read_bytes()))
    return version


def _with_nan(fleet: Fleet, version: ModelVersion) -> ModelVersion:
    """A version whose sums are right and whose weights are not numbers."""
    tensors = safetensors.load(Path(path_of(store_of(fleet), version, TENSORS)).read_bytes())
    name = next(name for name, tensor in tensors.items() if tensor.dtype.kind == "f" and tensor.size > 100)
    tensors[name] = tensors[name] * float("nan")
    return forge(store_of(fleet), version, tensors=lambda _: tensors)
