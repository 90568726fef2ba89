"""Sends a recorded data set to Kafka as its platform would have: the old part at once, the latest at a steady rate.

Reading, order and the shift in time are `streams/replay.py`; this module knows the pace, and nothing of what it sends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from aiokafka import AIOKafkaProducer

from models.config import Settings
from streams.kafka import client_options, create_topics
from streams.platforms import load_platform
from streams.replay import read_dataset

_IN_FLIGHT = 5000
_LEAST_SLEEP_S = 0.005


class Produced(NamedTuple):
    """What was sent, all of it acknowledged."""

    backfilled: int
    live: int
    seconds: float


async def produce(
    settings: Settings,
    directory: Path,
    platform_file: Path,
    rate: float | None = None,
    limit: int | None = None,
    live_share: float = 0.1,
    on_progress: Callable[[int, bool], None] = lambda sent, live: None,
) -> Produced:
    """Sends the data set of a platform, shifted in time so that its last event is now.

    What lies before the last `live_share` of the time span goes at full speed, the rest at `rate` events a second
    (None: at full speed too). `limit` keeps the first so many events. `on_progress(sent, live)` is called now and then.
    Topics are created where absent. Raises `ConfigError` for the file, the data set or Kafka, and Kafka's own errors
    where a record is not acknowledged.
    """
    platform = load_platform(platform_file)
    end_ms = int(time.time() * 1000)
    events = read_dataset(directory, platform, limit=limit, end_ms=end_ms)
    await create_topics(settings.kafka, settings.topics, [(topic, -1, {}) for topic in platform.topics])
    producer = AIOKafkaProducer(
        acks="all", enable_idempotence=settings.kafka.idempotence, linger_ms=5, **client_options(settings.kafka)
    )
    await producer.start()
    try:
        return await _send(producer, events, end_ms, rate, live_share, on_progress)
    finally:
        await producer.stop()


async def _send(producer, events, end_ms: int, rate: float | None, live_share: float, on_progress) -> Produced:
    started_s = time.monotonic()
    live_from_ms: float | None = None
    live_started_s = 0.0
    backfilled = live = 0
    in_flight: list[asyncio.Future] = []
    for topic, key, value, ts_ms in events:
        if live_from_ms is None:
            live_from_ms = end_ms - live_share * (end_ms - ts_ms)
        # Once live, always live: a row whose time cannot be read comes in between with the time of its neighbour.
        if rate is not None and (live or ts_ms >= live_from_ms):
            if not live:
                live_started_s = time.monotonic()
            wait_s = live_started_s + live / rate - time.monotonic()
            if wait_s > _LEAST_SLEEP_S:
                on_progress(backfilled + live, True)
                await asyncio.sleep(wait_s)
            live += 1
        else:
            backfilled += 1
        in_flight.append(await producer.send(topic, value, key=key))
        if len(in_flight) >= _IN_FLIGHT:
            await asyncio.gather(*in_flight)
            in_flight.clear()
            on_progress(backfilled + live, live > 0)
    await asyncio.gather(*in_flight)
    return Produced(backfilled, live, time.monotonic() - started_s)
