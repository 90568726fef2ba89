"""The order of a worker's start: who joins its group while it loads, and that nothing is taken before it has loaded."""

import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fleet import Fleet, WorkerProcess

from models.config import KafkaConfig, TopicsConfig

pytestmark = pytest.mark.broker

ASSIGNED, JOINING, LOADED = "Setting newly assigned partitions", "(Re-)joining group", "worker.loaded"
SLOW_LOAD = """
import time
from pathlib import Path
import streams.app
plain = streams.app.warm_stages
def slow(stages):
    while not Path({path!r}).exists():
        time.sleep(0.05)
    plain(stages)
streams.app.warm_stages = slow
"""


@pytest.fixture
async def fleet(kafka: KafkaConfig, topics: TopicsConfig, prefix: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    # A worker that takes a session to come so far would load first.
    patient = kafka.model_copy(update={"session_timeout_s": 14.0, "heartbeat_interval_s": 0.5})
    async with Fleet(patient, topics, prefix, tmp_path, seed=9).running() as fleet:
        yield fleet


def slow_to_load(until: Path) -> str:
    """A prelude: the process has not loaded before this file is there."""
    return SLOW_LOAD.format(path=str(until))


def order(worker: WorkerProcess, *texts: str) -> list[str]:
    """The texts in the order in which the worker first said them."""
    log = worker.log_path.read_text(errors="replace")
    return sorted(texts, key=log.index)


async def finish(fleet: Fleet, last: WorkerProcess) -> None:
    await fleet.caught_up()
    await fleet.drain(last)
    report = await fleet.verdict()
    report.assert_ok()
    assert report.info["scores_repeated"] == report.info["events_repeated"] == 0


async def test_alone_it_joins_while_it_loads_and_takes_nothing_before(fleet: Fleet, tmp_path: Path):
    until = tmp_path / "load"
    await fleet.behind()  # waits for the group's coordinator: a fresh broker that has none knows of no group
    async with fleet.fed():
        worker = fleet.start(prelude=slow_to_load(until))
        await fleet.said(worker, "Worker ready")  # Faust has recovered the tables and begun to fetch
        waiting = await fleet.behind()
        assert waiting > 0 and LOADED not in worker.log_path.read_text()
        until.touch()
        await fleet.committing(300)
    assert order(worker, LOADED, ASSIGNED, "model.swapped") == [ASSIGNED, LOADED, "model.swapped"]
    await finish(fleet, worker)
    # Nothing was scored by the prior, which serves until the model's announcement has been read.
    scores = (await fleet.look()).partitions[fleet.topics.scores]
    assert {json.loads(record.value)["model"] for partition in scores for record in partition} == {
        fleet.scorer.model.version
    }


async def test_beside_another_it_loads_first(fleet: Fleet):
    async with fleet.fed():
        first = fleet.start()
        await fleet.committing(200)
        second = fleet.start()
        await fleet.said(second, ASSIGNED)
        assert order(second, LOADED, JOINING) == [LOADED, JOINING]
        await fleet.committing(200)
        await fleet.drain(first)
    await finish(fleet, second)


async def test_told_to_stop_while_it_loads_it_stops(fleet: Fleet, tmp_path: Path):
    until = tmp_path / "load"
    await fleet.behind()
    worker = fleet.start(prelude=slow_to_load(until))
    await fleet.said(worker, JOINING)
    worker.signal(signal.SIGTERM)
    until.touch()  # a thread cannot be cancelled: the process ends when it has loaded
    assert await worker.ended(60) == 0, worker.log()
    assert "worker.crashed" not in worker.log_path.read_text()
