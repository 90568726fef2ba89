"""Workers that keep few of their users in memory: state and scores are those of a worker that keeps all, whatever dies.

The oracle replays every event with all rows in memory and compares each score, each row and each hidden state.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import fleet as fleets
import pytest
from fleet import Fleet, WorkerProcess, said

from models.config import KafkaConfig, TopicsConfig

pytestmark = pytest.mark.broker

USERS, HOT_USERS = 2000, 256


@pytest.fixture
async def fleet(kafka: KafkaConfig, topics: TopicsConfig, prefix: str, tmp_path: Path, monkeypatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(fleets, "N_USERS", USERS)
    quick = kafka.model_copy(update={"session_timeout_s": 4.0, "heartbeat_interval_s": 0.5})
    async with Fleet(quick, topics, prefix, tmp_path, seed=11).running() as fleet:
        yield fleet


def configure(fleet: Fleet, settings: str) -> None:
    text = fleet.config.read_text().replace("max_batch = 256\n", f"max_batch = 64\nhot_users = {HOT_USERS}\n{settings}\n")
    assert "hot_users" in text
    fleet.config.write_text(text)


async def finish(fleet: Fleet, last: WorkerProcess) -> dict:
    """Everything is done and right, and nothing is left on disk. → what the last worker says of the rows there"""
    await fleet.caught_up()
    await fleet.drain(last)
    report = await fleet.verdict()
    report.assert_ok()
    assert report.info["duplicates"] > 0
    (cold,) = said(last, "state.cold")
    assert cold["rows"] > USERS / 4  # the last second's users are in memory, as they were dirty
    assert [path.name for path in (fleet.folder / "data" / "cold").iterdir()] == ["lock"]
    return cold


@pytest.mark.parametrize("settings", ["", "snapshot_interval_s = 0.5"], ids=["from the changelog", "from snapshots"])
async def test_a_killed_worker_with_most_users_on_disk_goes_on_as_if_they_were_in_memory(fleet: Fleet, settings: str):
    configure(fleet, settings)
    async with fleet.fed(rate=1500):
        victim = fleet.start()
        await fleet.committing(6000)
        if settings:  # a fast worker has come so far before its first snapshot
            await fleet.said(victim, "snapshot.saved")
        fleet.disrupted()
        victim.process.kill()
        assert await victim.ended(10) < 0
        heir = fleet.start()
        await fleet.committing(3000)
    cold = await finish(fleet, heir)
    # More users than fit came back at the start, and then with their events.
    assert said(heir, "state.recovered")[-1]["rows"] > HOT_USERS
    assert cold["moved_out"] > cold["brought_back"] > 1000
    assert bool(said(heir, "snapshot.loaded")) == bool(settings)
    assert not said(heir, "snapshot.discarded")


async def test_partitions_change_hands_between_workers_with_most_users_on_disk(fleet: Fleet):
    """A joins, one leaves and one stands by: rows on disk are dropped with their partition, and never seen again."""
    configure(fleet, "standbys = 1")
    first = fleet.start()
    async with fleet.fed(rate=1000):
        await fleet.committing(2000)
        second = fleet.start()
        await fleet.said(second, "Setting newly assigned partitions")
        await fleet.said(first, "Setting newly assigned partitions", times=2)
        await fleet.committing(2000)
        await fleet.drain(first)
        await fleet.said(second, "state.taken_over")
        await fleet.committing(2000)
        third = fleet.start()
        await fleet.said(third, "Setting newly assigned partitions")
        await fleet.committing(2000)
        await fleet.drain(second)
        await fleet.committing(1000)
    cold = await finish(fleet, third)
    assert cold["brought_back"] > 1000
