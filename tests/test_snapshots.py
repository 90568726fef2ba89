"""Snapshots of state: what is saved comes back, what is damaged or of another changelog is thrown away, and a worker that
starts again reads only the changelog's tail."""

import asyncio
import os
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from aiokafka import AIOKafkaProducer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.events import PSEUDONYM_LENGTH
from streams import snapshots
from streams.arena import Arena, warm
from streams.kafka import CHANGELOG_CONFIG, client_options, create_topics
from streams.snapshots import Unusable, load, path_of, read_header, save, usable

TOPIC = "app-user_state-changelog"

warm()


def filled(n: int, partition: int = 2, seed: int = 0) -> Arena:
    """Users of a partition between those of others, some with odd keys, some dropped again."""
    arena, rng = Arena(), np.random.default_rng(seed)
    for first in range(0, n, 50):
        for of in (0, partition, 5):
            users = range(first, min(first + 50, n))
            keys = [b"odd%d" % user if user % 17 == 3 else b"%0*d" % (PSEUDONYM_LENGTH, user) for user in users]
            slots = arena.slots(of, keys)
            arena.rows["visits"][slots] = rng.integers(0, 1000, len(slots))
            arena.rows["ring_id"][slots, 0] = rng.integers(0, 2**60, len(slots))
        arena.drop_partition(0)
    return arena


def content(arena: Arena, partition: int) -> dict[bytes, bytes]:
    return {key: arena.rows[slot].tobytes() for p, key, slot in arena.items() if p == partition}


async def settled(partition: int) -> None:
    """Nothing waits to be committed."""


async def saved(folder: Path, arena: Arena, partition: int = 2) -> Path:
    assert await save(arena, folder, TOPIC, partition, 41, 1234, settled) == len(content(arena, partition))
    assert os.listdir(folder) == [path_of(folder, TOPIC, partition).name]
    return path_of(folder, TOPIC, partition)


@pytest.mark.parametrize("n", [0, 1, 7, 9000])
async def test_what_is_saved_comes_back(tmp_path, n):
    arena = filled(n)
    arena.slots(2, [])
    path = await saved(tmp_path, arena)
    other = filled(20, partition=3)
    header = await load(other, path, 2, TOPIC)
    assert content(other, 2) == content(arena, 2)
    assert (header.offset, header.offset_ms, header.rows) == (41, 1234, n)
    assert other.take_dirty() == {}
    assert len(content(other, 3)) == 20


async def test_a_newer_snapshot_takes_the_place_of_the_older(tmp_path):
    arena = filled(100)
    await saved(tmp_path, arena)
    arena.rows["visits"][arena.slots(2, [b"odd3"])] = 77
    path = await saved(tmp_path, arena)
    other = Arena()
    await load(other, path, 2, TOPIC)
    assert other.rows["visits"][other.slots(2, [b"odd3"])] == 77


async def test_a_partition_that_goes_away_while_it_is_saved_leaves_no_file(tmp_path):
    arena = filled(9000)
    saving = asyncio.ensure_future(save(arena, tmp_path, TOPIC, 2, 41, 1234, settled))
    await asyncio.sleep(0.005)
    arena.drop_partition(2)
    assert await saving is None
    assert os.listdir(tmp_path) == []


async def test_a_file_is_not_there_before_its_rows_events_are_acknowledged(tmp_path):
    """The copies may be ahead of the commit, and a file that a crash leaves must not be."""
    arena, acknowledged = filled(300), asyncio.Event()

    async def commit(partition: int) -> None:
        assert partition == 2
        await acknowledged.wait()

    saving = asyncio.ensure_future(save(arena, tmp_path, TOPIC, 2, 41, 1234, commit))
    await asyncio.sleep(0.2)
    assert not path_of(tmp_path, TOPIC, 2).exists()
    acknowledged.set()
    assert await saving == 300
    assert path_of(tmp_path, TOPIC, 2).exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_and_nothing_of_it_stays(tmp_path, at, flip, cut):
    async def run() -> None:
        path = tmp_path / "good"
        if not path.exists():
            os.rename(await saved(tmp_path / "new", filled(60)), path)
        whole = path.read_bytes()
        i = int(at * len(whole))
        bad = tmp_path / "bad"
        bad.write_bytes(whole[:i] if cut else whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
        arena = filled(10, partition=3)
        with pytest.raises(Unusable):
            await load(arena, bad, 2, TOPIC)
        assert content(arena, 2) == {} and len(content(arena, 3)) == 10

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"abi": 99}, "state ABI 99"),
        ({"size": "gpu"}, "size 'gpu'"),
        ({"topic": "another"}, "changelog 'another'"),
        ({"saved_ms": int(time.time() * 1000) - 13 * 3_600_000}, "older than 12 h"),
        ({"saved_ms": int(time.time() * 1000) + 3_600_000}, "from the future"),
    ],
)
async def test_a_file_that_is_not_of_this_worker_is_refused_with_the_reason(tmp_path, change, why):
    path = await saved(tmp_path, filled(5))
    header = read_header(path, TOPIC, "cpu", int(time.time() * 1000))
    with path.open("r+b") as file:
        snapshots._write_header(file, msgspec.structs.replace(header, **change))
    with pytest.raises(Unusable, match=why):
        await load(Arena(), path, 2, TOPIC)


async def test_a_file_of_another_partition_is_refused(tmp_path):
    with pytest.raises(Unusable, match="of partition 2"):
        await load(Arena(), await saved(tmp_path, filled(5)), 1, TOPIC)


@pytest.mark.broker
async def test_only_a_snapshot_that_the_changelog_continues_is_usable(tmp_path, kafka, topics, prefix):
    topic, n = f"{prefix}changelog", 4
    await create_topics(kafka, topics, [(topic, n, CHANGELOG_CONFIG)])
    async with AIOKafkaProducer(**client_options(kafka)) as producer:
        for partition in range(3):
            for i in range(10):
                await producer.send_and_wait(topic, b"value", key=b"%d" % i, partition=partition, timestamp_ms=1000 + i)
    arena = filled(5)
    for partition, offset, offset_ms in ((0, 6, 1006), (1, 10, 1010), (2, 6, 1007), (3, 0, 1000)):
        arena.slots(partition, [b"someone"])
        await save(arena, tmp_path, topic, partition, offset, offset_ms, settled)
    found = await usable(kafka, tmp_path, topic, range(n + 1), "cpu")
    assert {partition: header.offset for partition, header in found.items()} == {0: 6}
    assert os.listdir(tmp_path) == [path_of(tmp_path, topic, 0).name]
