"""Which model serves, and telling that another one is to: the topic `models` and the store, read and written.

    topic `models`, newest record of our name ─► announcement ─► Incumbent: the model, loaded and verified
    a version that was published              ─► announcement, with earlier ones to fall back to ─► topic `models`

Knows nothing of training, histories or the gate.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec
import structlog
from aiokafka import AIOKafkaProducer

from models import artifact
from models.config import Settings
from models.errors import ArtifactError
from models.events import Announcement, ModelVersion
from models.scorer import Model
from trainer.history import client_options, open_consumer, read_to_end

log = structlog.get_logger("crosscurrent.trainer")

MAX_FALLBACKS = 3


class Incumbent(NamedTuple):
    model: Model
    announcement: Announcement | None
    """None: the prior."""


async def read_announcement(settings: Settings) -> tuple[Announcement | None, bool]:
    """→ (the newest announcement of our model, None where there is none; whether it was withdrawn by a null value)."""
    newest: bytes | None = None
    ever = False
    async with open_consumer(settings.kafka, settings.topics.models) as (consumer, partitions):
        async for _, records in read_to_end(consumer, partitions, timeout_s=settings.kafka.request_timeout_s):
            for record in records:
                if record.key == settings.store.name.encode():
                    newest, ever = record.value, True
    if newest is None:
        return None, ever
    try:
        return msgspec.json.decode(newest, type=Announcement), False
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.error("announcement cannot be read", topic=settings.topics.models, error=str(error))
        return None, False


def load_incumbent(settings: Settings, announced: Announcement | None, withdrawn: bool) -> Incumbent:
    """The announced version; with none ever announced the newest of the store that loads; the prior where nothing does,
    or where the last announcement was withdrawn."""
    store = settings.store
    versions: list[ModelVersion] = [announced] if announced is not None else []
    if announced is None and not withdrawn:
        versions = artifact.versions(store.uri, store.name)
    for version in versions:
        try:
            model = artifact.load(store.uri, store.name, version, fold=settings.fold, size=settings.worker.size)
        except ArtifactError as error:
            log.error("model cannot be loaded", version=version.version, reason=error.reason, detail=error.detail)
            continue
        return Incumbent(model, announced or announcement_of(settings, version, None))
    return Incumbent(artifact.load_prior(settings.fold), None)


def announcement_of(settings: Settings, version: ModelVersion, earlier: Announcement | None) -> Announcement:
    fallbacks: list[ModelVersion] = []
    if earlier is not None:
        last = ModelVersion(version=earlier.version, uri=earlier.uri, sha256=earlier.sha256, abi=earlier.abi)
        fallbacks = [last, *earlier.fallbacks][:MAX_FALLBACKS]
    return Announcement(
        name=settings.store.name,
        version=version.version,
        uri=version.uri,
        sha256=version.sha256,
        abi=version.abi,
        published_at=now_ms(),
        fallbacks=fallbacks,
    )


async def announce(settings: Settings, announcement: Announcement) -> None:
    """Sends it and waits until all in-sync replicas have it."""
    producer = AIOKafkaProducer(**client_options(settings.kafka), acks="all")
    await producer.start()
    try:
        await producer.send_and_wait(
            settings.topics.models, msgspec.json.encode(announcement), key=announcement.name.encode()
        )
    finally:
        await producer.stop()
    log.info("model announced", model=f"{announcement.name}/{announcement.version}", topic=settings.topics.models)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
