"""The pieces of the commit protocol that need no broker; the protocol itself is under the oracle in test_crash.py."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from faust.types import TP
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import CrosscurrentError
from models.state import decode_row
from streams.arena import ArenaStore
from streams.commit import KILL_STEPS, TURNS, Committer, KillSwitch, Watchdog
from streams.ingest import HoldBack
from streams.metrics import Metrics


def test_the_kill_switch_kills_at_the_nth_time_of_its_step_only():
    code = (
        "from streams.commit import KillSwitch\n"
        "kill = KillSwitch('commit_changelog_acked:3')\n"
        "for i in range(5):\n"
        "    kill('commit_snapshot'); print(i, flush=True); kill('commit_changelog_acked')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (-9, ["0", "1", "2"])


def test_an_unset_kill_switch_does_nothing():
    kill = KillSwitch(None)
    for step in KILL_STEPS:
        kill(step)


def test_an_unknown_kill_step_is_refused():
    with pytest.raises(ValueError, match="the steps are after_fold"):
        KillSwitch("somewhere")


def test_a_worker_that_overslept_its_session_exits_before_it_sends():
    code = (
        "import os, signal, subprocess, sys, time\n"
        "from streams.commit import Watchdog\n"
        "w = Watchdog(0.5); w.start()\n"
        "subprocess.Popen([sys.executable, '-c', f'import os,time; time.sleep(1.2); os.kill({os.getpid()}, 18)'])\n"
        "time.sleep(0.2); os.kill(os.getpid(), signal.SIGSTOP)\n"
        "w.check(); print('sent')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == Watchdog.EXIT_CODE
    assert "sent" not in done.stdout
    assert "start it again" in done.stderr


def test_a_busy_worker_is_not_fenced():
    watchdog = Watchdog(5.0)
    watchdog.start()
    sum(range(2_000_000))
    watchdog.check()
    watchdog.stop()


class _Platform:
    def __init__(self, name, topics):
        self.name, self.topics = name, topics


def test_a_partition_ahead_of_its_platforms_slowest_is_held_until_that_has_caught_up():
    hold = HoldBack([_Platform("a", ["views", "buys"]), _Platform("b", ["b"])], lateness_s=10)
    views, buys, other = TP("views", 0), TP("buys", 0), TP("b", 0)
    latest = {views: 5_000, buys: 20_000, other: 900_000}
    assert hold.held(latest, {views, buys, other}) == {buys}
    assert hold.held({**latest, views: 10_000}, {views, buys, other}) == set()
    assert hold.held(latest, {buys, other}) == set()
    assert hold.held({buys: 20_000}, {views, buys}) == {buys}


NEVER = KillSwitch(None)


class _Broker:
    """Takes what a committer sends and commits, acknowledges late, and checks the protocol at each commit of offsets."""

    def __init__(self, kill: Callable[[str], None] = NEVER) -> None:
        self.store = ArenaStore("arena://cpu", SimpleNamespace(), SimpleNamespace(name="user_state"))
        self.committer = Committer(self.store, "changelog", Metrics(), kill)
        self.committer.consumer = self.committer.sender = self
        self.committer.on_failure = lambda error: None
        self.sends: dict[TP, list[tuple[int, asyncio.Future]]] = {}
        self.folded: dict[int, int] = {}
        self.durable: dict[int, int] = {}
        self.offsets: dict[TP, int] = {}
        self.commits: list[set[int]] = []
        self.answers = asyncio.Event()
        """Cleared, what a batch gave is not acknowledged."""
        self.answers.set()

    def process(self, tp: TP, offset: int) -> None:
        """A batch of one event: the row of the one user of the partition, where it has one, and a send."""
        if tp.topic == "events":
            slots = self.store.arena.slots(tp.partition, [b"user"])
            self.store.arena.rows["applied_offset"][slots] = self.folded[tp.partition] = offset
            self.store.arena.mark_dirty(slots)
        send = asyncio.get_running_loop().create_task(self._ack_send(offset))
        self.sends.setdefault(tp, []).append((offset, send))
        self.committer.register(send)
        self.committer.processed(tp, offset + 1)

    async def _ack_send(self, offset: int) -> None:
        await asyncio.sleep(offset % 3 * 1e-4)
        await self.answers.wait()

    async def _ack(self, partition: int, offset: int) -> int:
        await asyncio.sleep(1e-4)
        self.durable[partition] = offset
        return 0

    def send_columns(self, topic, partition, keys, values, timestamps_ms):
        (value,) = values.tolist()
        offset = int.from_bytes(decode_row(value)[8:16], "little", signed=True)
        assert keys.tolist() == [b"user"]
        before = [send for at, send in self.sends.get(TP("events", partition), []) if at <= offset]
        assert all(send.done() for send in before), "a row goes out before what its events gave"
        return asyncio.ensure_future(self._ack(partition, offset))

    async def commit_offsets(self, offsets: dict[TP, int]) -> bool:
        for tp, offset in offsets.items():
            assert offset > self.offsets.get(tp, -1), f"{tp}: committed backwards"
            acknowledged = (send.done() and not send.cancelled() for at, send in self.sends[tp] if at < offset)
            assert all(acknowledged), f"{tp}: a send is not acknowledged"
            if tp.topic == "events":
                assert self.durable[tp.partition] >= offset - 1, f"{tp}: a row is not acknowledged"
        self.offsets |= offsets
        self.commits.append({tp.partition for tp in offsets})
        return True


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.just("turn"),
            st.sampled_from(["turn", "turn", "all", "wait", "cancel"]),
            st.tuples(st.sampled_from(["events", "raw"]), st.integers(0, 9)),
        ),
        max_size=60,
    )
)
def test_each_turn_commits_only_what_is_acknowledged_and_all_of_it_in_the_end(steps):
    async def run() -> None:
        broker, next_offset, commits = _Broker(), {}, []
        for step in steps:
            if step == "turn":
                commits.append(asyncio.ensure_future(broker.committer.commit_turn(len(commits) % TURNS)))
            elif step == "all":
                commits.append(asyncio.ensure_future(broker.committer.commit()))
            elif step == "wait":
                await asyncio.sleep(1e-4)
            elif step == "cancel":
                await asyncio.sleep(0)  # it has begun
                for commit in commits[-1:]:
                    commit.cancel()
            else:
                tp = TP(*step)
                next_offset[tp] = next_offset.get(tp, -1) + 1
                broker.process(tp, next_offset[tp])
        for done in await asyncio.gather(*commits, return_exceptions=True):
            assert isinstance(done, bool | asyncio.CancelledError), done
        for turn in range(TURNS):
            await broker.committer.commit_turn(turn)
        assert broker.offsets == {tp: offset + 1 for tp, offset in next_offset.items()}
        assert broker.durable == broker.folded
        assert not await broker.committer.commit()

    asyncio.run(run())


@pytest.mark.parametrize("n", [1, 3, 4, 8, 11])
async def test_every_partition_has_one_turn_an_interval(n):
    broker = _Broker()
    for lap in range(2):
        for partition in range(n):
            broker.process(TP("events", partition), lap)
        broker.commits.clear()
        for turn in range(TURNS):
            await broker.committer.commit_turn(turn)
        assert len(broker.commits) == min(n, TURNS)
        assert sorted(partition for turn in broker.commits for partition in turn) == list(range(n))


async def test_the_steps_of_a_commit_without_rows_are_not_counted():
    """A kill at one of them would hit no changelog, and a crash test could pass without having tested it."""
    steps: list[str] = []
    broker = _Broker(steps.append)
    broker.process(TP("raw", 0), 0)
    assert await broker.committer.commit()
    assert steps == []
    broker.process(TP("raw", 0), 1)
    broker.process(TP("events", 0), 0)
    assert await broker.committer.commit()
    assert steps == [step for step in KILL_STEPS if step.startswith("commit_")]


async def test_rows_that_another_worker_writes_are_not_ours_to_commit():
    broker = _Broker()
    broker.process(TP("events", 0), 0)
    broker.process(TP("raw", 1), 0)
    broker.store.standbys = {1}
    broker.store.arena.mark_dirty(broker.store.arena.slots(1, [b"user"]))
    await broker.committer.commit()
    assert list(broker.durable) == [0]
    broker.store.standbys = set()
    await broker.committer.commit()
    assert sorted(broker.durable) == [0, 1]


async def test_a_turn_that_was_begun_is_ended_though_the_timer_is_cancelled():
    broker = _Broker()
    broker.process(TP("events", 0), 1)
    timer = asyncio.ensure_future(broker.committer.run(0.001 * TURNS))
    while not broker.committer._locks[0].locked():
        await asyncio.sleep(0)
    timer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await timer
    await broker.committer.commit()
    assert broker.durable == {0: 1} and broker.offsets == {TP("events", 0): 2}
    assert len(broker.commits) == 1


async def test_a_commit_that_was_begun_is_ended_though_who_waits_for_it_is_cancelled():
    """As a snapshot's commit is where the worker is told to stop: the last commit knows nothing of what it has taken."""
    broker = _Broker()
    broker.answers.clear()
    broker.process(TP("events", 0), 1)
    snapshot = asyncio.ensure_future(broker.committer.commit_partition(0))
    await asyncio.sleep(0.001)
    snapshot.cancel()
    with pytest.raises(asyncio.CancelledError):
        await snapshot
    drain = asyncio.ensure_future(broker.committer.commit())
    await asyncio.sleep(0.001)
    assert not broker.offsets and not drain.done()
    broker.answers.set()
    await drain
    assert broker.durable == {0: 1} and broker.offsets == {TP("events", 0): 2}


async def test_what_was_revoked_before_its_sends_were_acknowledged_is_not_committed_late():
    """Its rows would follow those of the next owner. They are ours to write once the partition is ours again."""
    broker, tp = _Broker(), TP("events", 0)
    broker.answers.clear()
    broker.process(tp, 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(broker.committer.commit(), 0.01)
    broker.committer.on_revoked({tp})
    broker.answers.set()
    await asyncio.sleep(0.01)
    for turn in range(TURNS):  # the timer goes on during a rebalance
        await broker.committer.commit_turn(turn)
    assert not broker.durable and not broker.offsets
    broker.committer.on_seek({}, {tp: 0})
    broker.process(tp, 1)
    assert await broker.committer.commit()
    assert broker.durable == {0: 1} and broker.offsets == {tp: 2}


async def test_a_send_that_was_cancelled_is_a_failure():
    broker, tp, failures = _Broker(), TP("events", 0), []
    broker.committer.on_failure = failures.append
    broker.answers.clear()
    broker.process(tp, 1)
    commit = asyncio.ensure_future(broker.committer.commit())
    await asyncio.sleep(0.001)
    broker.sends[tp][0][1].cancel()
    with pytest.raises(CrosscurrentError, match="a send was cancelled"):
        await commit
    assert len(failures) == 1 and not broker.offsets and not broker.durable
