"""The pieces of the commit protocol that need no broker; the protocol itself is under the oracle in test_crash.py."""

import subprocess
import sys

import pytest
from faust.types import TP

from streams.commit import KILL_STEPS, KillSwitch, Watchdog
from streams.ingest import HoldBack


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
