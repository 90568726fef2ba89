"""Whatever dies, and whenever: real worker processes on a real broker, and the oracle's word on what they leave.

┌ fed ──────────────────────────────────────────────┐
victim ────────────✗ SIGKILL at a named step of the commit protocol
                      heir ──── joins ── recovers ── catches up ── SIGTERM, exit 0 ─► oracle
"""

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fleet import Fleet, WorkerProcess

from models.config import KafkaConfig, TopicsConfig
from streams.app import EXIT_CRASHED
from streams.commit import KILL_STEPS, Watchdog

pytestmark = pytest.mark.broker

SEED = 20
ASSIGNED = "Setting newly assigned partitions"


@pytest.fixture
async def fleet(kafka: KafkaConfig, topics: TopicsConfig, prefix: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    # The heir can join once the session of the killed has expired: a short one keeps the tests short.
    quick = kafka.model_copy(update={"session_timeout_s": 4.0, "heartbeat_interval_s": 0.5})
    async with Fleet(quick, topics, prefix, tmp_path, SEED).running() as fleet:
        yield fleet


async def finish(fleet: Fleet, last: WorkerProcess) -> dict:
    """Everything is done, the last worker drains, the oracle finds nothing. → the report's info"""
    await fleet.caught_up()
    await fleet.drain(last)
    report = await fleet.verdict()
    print({key: value for key, value in report.info.items() if key != "committed"})
    report.assert_ok()
    assert report.info["dead_letters"] > 0
    assert report.info["duplicates"] > 0
    return report.info


async def test_backlog_loses_nothing(fleet: Fleet):
    """Hours of event time wait in the source: ingest holds back the partitions that run ahead, and lets them go again."""
    fleet.padding_bytes = 2000
    async with fleet.fed(rate=2000):
        await asyncio.sleep(4)
    worker = fleet.start()
    info = await finish(fleet, worker)
    assert info["scores_repeated"] == info["events_repeated"] == 0


@pytest.mark.parametrize("step", KILL_STEPS)
async def test_kill_at(fleet: Fleet, step: str):
    # Which time the step is reached is drawn, so that it is not always the first commit.
    n = random.Random(f"{SEED} {step}").randint(2, 4 if step.startswith("commit_") else 12)
    async with fleet.fed():
        await fleet.killed(fleet.start(kill_at=f"{step}:{n}"))
        heir = fleet.start()
        await fleet.committing()
    info = await finish(fleet, heir)
    if step in ("commit_sends_acked", "commit_changelog_sent", "commit_changelog_acked"):
        # Scores were out and their offsets were not: had none come again, the kill would not have hit the commit.
        assert info["scores_repeated"] > 0


async def test_killed_in_the_first_commit(fleet: Fleet):
    """The rows are in the changelog and no offset of `events` is committed yet."""
    async with fleet.fed():
        await fleet.killed(fleet.start(kill_at="commit_changelog_acked:1"))
        heir = fleet.start()
        await fleet.committing()
    await finish(fleet, heir)


async def test_killed_again_at_the_first_batch_after_recovery(fleet: Fleet):
    async with fleet.fed():
        await fleet.killed(fleet.start(kill_at="commit_changelog_acked:3"))
        await fleet.killed(fleet.start(kill_at="after_send:1"))
        heir = fleet.start()
        await fleet.committing()
    await finish(fleet, heir)


async def test_one_joins_and_one_leaves(fleet: Fleet):
    """Nothing dies, so nothing may be there twice: partitions change hands by the commit protocol."""
    first = fleet.start()
    async with fleet.fed():
        await fleet.committing()
        second = fleet.start()
        await fleet.said(first, ASSIGNED, times=2)
        await fleet.said(second, ASSIGNED)
        await fleet.committing(500)
        await fleet.drain(first)
        await fleet.said(second, ASSIGNED, times=2)
        await fleet.committing(500)
    info = await finish(fleet, second)
    assert info["scores_repeated"] == info["events_repeated"] == 0


SLOW_SEEK = """
import asyncio
from streams import transport

seek_to_committed = transport.ConsumerThread.seek_to_committed

async def slow(self):
    await asyncio.sleep(6)  # a fetch that began before the seek ends within 5 s
    offsets = await seek_to_committed(self)
    await asyncio.sleep(1)
    return offsets

transport.ConsumerThread.seek_to_committed = slow
"""


async def test_what_is_fetched_during_a_seek_is_not_taken_twice(fleet: Fleet):
    """Faust fetches stream partitions while it seeks them to what is committed: on a busy machine, for a long time."""
    async with fleet.fed():
        first = fleet.start(prelude=SLOW_SEEK)
        await fleet.committing()
        await fleet.drain(first)
        second = fleet.start(prelude=SLOW_SEEK)
        await fleet.committing(500)
    info = await finish(fleet, second)
    assert info["scores_repeated"] == info["events_repeated"] == 0


SEEKS_FOR_LONG_ONCE = """
import asyncio
from streams import transport

seek_to_committed, slept = transport.ConsumerThread.seek_to_committed, []

async def slow_once(self):
    if not slept:
        slept.append(await asyncio.sleep(8))
    return await seek_to_committed(self)

transport.ConsumerThread.seek_to_committed = slow_once
"""


async def test_a_step_of_recovery_beyond_the_request_timeout_ends_the_worker_and_not_its_recovery_alone(fleet: Fleet):
    """Faust would stay in the group with its partitions, and never be ready."""
    quick = fleet.config.read_text().replace("[kafka]\n", "[kafka]\nrequest_timeout_s = 4.5\n")
    fleet.config.write_text(quick)
    async with fleet.fed(rate=200):
        first = fleet.start(prelude=SEEKS_FOR_LONG_ONCE)
        assert await first.ended(60) == EXIT_CRASHED, first.log()
        assert "kafka.request_timeout_s" in first.log()
        second = fleet.start()
        await fleet.committing(300)
    info = await finish(fleet, second)
    assert info["scores_repeated"] == info["events_repeated"] == 0


async def test_sleeper_is_fenced(fleet: Fleet):
    """SIGSTOP for longer than the session: another takes over, and the sleeper exits when it wakes."""
    async with fleet.fed():
        sleeper = fleet.start()
        await fleet.committing()
        other = fleet.start()
        await fleet.said(other, ASSIGNED)
        await fleet.committing(500)
        fleet.disrupted()
        sleeper.signal(signal.SIGSTOP)
        await fleet.said(other, ASSIGNED, times=2)
        await fleet.committing(500)
        sleeper.signal(signal.SIGCONT)
        assert await sleeper.ended(10) == Watchdog.EXIT_CODE, sleeper.log()
        assert "WorkerFenced" in sleeper.log()
    await finish(fleet, other)


async def test_drain_repeats_nothing(fleet: Fleet):
    """SIGTERM in mid load: what was taken in is scored and committed, and the next worker goes on after it."""
    async with fleet.fed():
        first = fleet.start()
        await fleet.committing(300)
        await fleet.drain(first)
        half_way = await fleet.look()
        second = fleet.start()
        await fleet.committing(300)
    fleet.judge(half_way, complete=False).assert_ok()
    info = await finish(fleet, second)
    assert info["scores_repeated"] == info["events_repeated"] == 0
