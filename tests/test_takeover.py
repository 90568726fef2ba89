"""What spares a worker the whole changelog: a snapshot on its own disk, or having followed it while another owned the rows.

The oracle has the last word, as in test_crash.py: neither may cost or repeat anything.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiokafka.structs import TopicPartition
from fleet import Fleet, WorkerProcess, said

from models.config import KafkaConfig, TopicsConfig

pytestmark = pytest.mark.broker


@pytest.fixture
async def fleet(kafka: KafkaConfig, topics: TopicsConfig, prefix: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    quick = kafka.model_copy(update={"session_timeout_s": 4.0, "heartbeat_interval_s": 0.5})
    async with Fleet(quick, topics, prefix, tmp_path, seed=7).running() as fleet:
        yield fleet


def configure(fleet: Fleet, setting: str) -> None:
    """One more setting of the section `worker`."""
    fleet.config.write_text(fleet.config.read_text().replace("\n[worker]\n", f"\n[worker]\n{setting}\n"))


def once_saved(folder: Path) -> str:
    """A prelude: the kill switch counts from the first snapshot on; before it there is nothing to start again from."""
    return f"""
from pathlib import Path
from streams.commit import KillSwitch
count, saved = KillSwitch.__call__, []

def count_once_saved(switch, step):
    saved[:] = saved or Path({str(folder)!r}).rglob("*.rows")
    if saved:
        count(switch, step)

KillSwitch.__call__ = count_once_saved
"""


async def finish(fleet: Fleet, last: WorkerProcess) -> dict:
    await fleet.caught_up()
    await fleet.drain(last)
    report = await fleet.verdict()
    report.assert_ok()
    return report.info


async def test_a_worker_that_drained_starts_again_from_its_snapshots(fleet: Fleet):
    configure(fleet, "snapshot_interval_s = 0.5")
    async with fleet.fed():
        first = fleet.start()
        await fleet.committing(500)
        await fleet.drain(first)
        second = fleet.start()
        await fleet.committing(300)
    info = await finish(fleet, second)
    assert info["scores_repeated"] == info["events_repeated"] == 0
    last = {line["partition"]: line for line in said(first, "snapshot.saved")}
    loaded = {line["partition"]: line for line in said(second, "snapshot.loaded")}
    assert sorted(loaded) == sorted(last) and len(loaded) == fleet.topics.partitions
    assert {p: line["rows"] for p, line in loaded.items()} == {p: line["rows"] for p, line in last.items()}
    assert not said(second, "snapshot.discarded")
    # Nothing was written after the last snapshots, so nothing of the changelog is left to read.
    assert sum(line["rows_read"] for line in said(second, "state.recovered")) == 0


TOLD_TO_STOP_IN_A_SNAPSHOT = """
import asyncio
import os
import signal
from streams.commit import Committer, Sender

commit_partition, hand_over, waited_for = Committer.commit_partition, Sender._hand_over, []

async def told_to_stop(committer, number):
    waited_for.extend([number] * bool(committer._sends.get(number)))
    if len(waited_for) == 5:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
    try:
        return await commit_partition(committer, number)
    except asyncio.CancelledError:
        print('{"event": "snapshot.cancelled"}', flush=True)
        raise

async def late(sender, *batch):
    await asyncio.sleep(0.5)
    return await hand_over(sender, *batch)

Committer.commit_partition, Sender._hand_over = told_to_stop, late
"""


async def test_a_worker_that_is_told_to_stop_while_a_snapshot_is_committed_loses_nothing(fleet: Fleet):
    """What that commit waits for belongs to none that follows."""
    configure(fleet, "snapshot_interval_s = 0.01")
    async with fleet.fed():
        first = fleet.start(prelude=TOLD_TO_STOP_IN_A_SNAPSHOT)
        assert await first.ended(60) == 0, first.log()
        second = fleet.start()
        await fleet.committing(300)
    info = await finish(fleet, second)
    assert said(first, "snapshot.cancelled")
    assert info["scores_repeated"] == info["events_repeated"] == 0


@pytest.mark.parametrize("step", ["after_fold", "commit_sends_acked", "commit_changelog_acked"])
async def test_a_killed_worker_starts_again_from_a_snapshot_and_the_rest(fleet: Fleet, step: str):
    """The rows of a snapshot may be newer than what was committed, and older than the changelog."""
    configure(fleet, "snapshot_interval_s = 0.3")
    async with fleet.fed():
        kill_at = f"{step}:{40 if step == 'after_fold' else 14}"
        await fleet.killed(fleet.start(kill_at, once_saved(fleet.folder)))
        heir = fleet.start()
        await fleet.committing(300)
    await finish(fleet, heir)
    assert said(heir, "snapshot.loaded")
    assert not said(heir, "snapshot.discarded")


async def test_a_standby_takes_over_without_reading_the_changelog_again(fleet: Fleet):
    configure(fleet, "standbys = 1")
    async with fleet.fed():
        workers = [fleet.start(), fleet.start()]
        for worker in workers:
            await fleet.said(worker, "Setting newly assigned partitions")
        for partition in range(fleet.topics.partitions):  # also the victim's
            while (await fleet._group.committed(TopicPartition(fleet.topics.events, partition)) or 0) < 300:
                await fleet.committing(50)
        victim, heir = workers
        fleet.disrupted()
        victim.process.kill()
        victim.process.wait()
        await fleet.said(heir, "state.taken_over")
        await fleet.committing(500)
    await finish(fleet, heir)
    taken = said(heir, "state.taken_over")
    assert len(taken) == 1 and taken[0]["partitions"]
    # All rows of the victim were there but for what it wrote last.
    read = said(heir, "state.recovered")[-1]["rows_read"]
    assert all(offset is not None for offset in taken[0]["offsets"])
    assert read < sum(offset + 1 for offset in taken[0]["offsets"]) / 2
