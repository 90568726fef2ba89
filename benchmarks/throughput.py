"""How fast one worker process is, beside peers doing the same job, and what else of it is measured in time or bytes.

    make bench ARGS="--json benchmarks/throughput.json --report"       everything on the embedded broker, about 55 min
    make bench ARGS="--broker kafka"                                   … on Apache Kafka
    make bench ARGS="--quick"                                          rates and peers, short; says which ratios moved
    make bench ARGS="--what latency swap --seconds 10"                 some modes

What runs is what users run: the student that a trainer published, the full score record, the durable changelog, acks=all,
commits every second, the worker pinned to one core and the broker to the other. Names for --what:

    score          `events` (zipf over 50,000 users, about 200 bytes of JSON) → `scores`      score_uniform: over 1 M users
    ingest         raw events of the simulator's three platforms → `events`                    both: … → `events` → `scores`
    faust faust_take quix bytewax aiokafka_loop confluent_loop                                 peers (`benchmarks/peers/`)
    limit          a bare confluent-kafka loop around our kernels, without durability
    latency recovery swap start scaling stages trainer                                         (recovery: memory a user too)

An event counts when its offset is committed, so when its score and its row are acknowledged. A rate is taken between two
such commits, the first one at least 5 s after the first progress, at least 30 s apart (10 s with --quick), by the clock of
this process; for `both` from the first commit of a raw event to that of the last score. Every run has a fresh broker.

Each finished run is kept in `.crosscurrent/speed/runs.jsonl` under the hash of the code that it measured: a run that was
interrupted resumes, and modes measured one at a time make one report. Peers come from the extra `bench`; where this
interpreter lacks them they are installed into `.crosscurrent/bench-venv`. Prints JSON as its last line.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import speed_modes as modes
import speed_report as report
from speed_lab import HOME, MANY_USERS, ROOT, student
from speed_modes import LATENCY_RATES, Options

from models.state import row_dtype

COMMITTED = ROOT / "benchmarks" / "throughput.json"
GPU = ROOT / "benchmarks" / "gpu_student.json"
"""Measured where there is a card (`benchmarks/gpu_student.py`), reported here."""
CACHE = HOME / "runs.jsonl"
RATES = (*report.OURS, *report.PEERS)
ONCE = ("latency", "recovery", "swap", "start", "scaling", "stages", "trainer", "cores")
"""Modes with one run each."""
QUICK = ("score", "score_uniform", "both", "ingest", *report.PEERS)
_SOURCES = {
    "ours": ("models", "streams"),
    "limit": ("models", "streams", "benchmarks/peers", "benchmarks/kernels.py"),
    "peers": ("models", "benchmarks/peers"),
    "trainer": ("models", "trainer"),
    "stages": ("models", "streams", "benchmarks/kernels.py"),
}


def code_of(name: str) -> str:
    """Hash of the sources that a mode measures: a run of other code is not the same run."""
    group = name if name in _SOURCES else "peers" if name in report.PEERS else "ours"
    digest = hashlib.sha256()
    for source in _SOURCES[group]:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Cache:
    """Measured runs, one a line. A line that was cut off by an interruption is ignored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.runs.append(json.loads(line))
                except json.JSONDecodeError:
                    continue

    def find(self, name: str, how: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Runs of this code that were measured so: on that broker, for as many seconds, with as many users."""
        code = code_of(name.split(":")[0])
        return [run for run in self.runs if (run["name"], run.get("how"), run["code"]) == (name, how, code)]

    def rates(self, broker: str) -> dict[str, float]:
        """Events a second that were last measured, of any code: how many events a run needs."""
        rates = [run for run in self.runs if run["name"] in RATES and run.get("how", {}).get("broker") == broker]
        return {run["name"]: run["result"]["events_per_s"] for run in rates}

    def forget(self, name: str, how: Mapping[str, Any]) -> None:
        """Drops the runs that `find` finds."""
        gone = self.find(name, how)
        if gone:
            self.runs = [run for run in self.runs if run not in gone]
            self._path.write_text("".join(json.dumps(run) + "\n" for run in self.runs))

    def add(self, name: str, how: Mapping[str, Any], result: dict[str, Any]) -> None:
        run = {"name": name, "how": how, "code": code_of(name.split(":")[0]), "result": result}
        self.runs.append(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as lines:
            lines.write("\n" * self._cut_off() + json.dumps(run) + "\n")

    def _cut_off(self) -> bool:
        return self._path.exists() and self._path.stat().st_size > 0 and not self._path.read_bytes().endswith(b"\n")


def machine() -> dict[str, Any]:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def plan(what: list[str], runs: int) -> list[tuple[str, int]]:
    """(name, how many runs) in turn: every rate once, then every rate again, so that a slow minute hits none alone."""
    names = [name for name in RATES if name in what]
    out = [(name, nth) for nth in range(1, runs + 1) for name in names]
    for name in ONCE:
        if name in what:
            if name == "latency":
                out += [(f"latency:{rate}", nth) for nth in range(1, runs + 1) for rate in LATENCY_RATES]
            else:
                out.append((name, 1))
    return out


def work_of(name: str, options: Options, seed: int) -> Callable[[], Coroutine[Any, Any, dict[str, Any]]]:
    if name in RATES:
        return lambda: modes.throughput(name, options, seed)
    if name.startswith("latency:"):
        return lambda: modes.latency(int(name.split(":")[1]), options)
    return lambda: getattr(modes, name)(options)


async def run_all(arguments: argparse.Namespace, cache: Cache) -> dict[str, Any]:
    """→ what the student is."""
    store, about = await student()
    how = how_of(arguments, arguments.broker)
    if arguments.fresh:
        for name in {name for name, _ in plan(arguments.what, 1)}:
            cache.forget(name, how)
    for name, nth in plan(arguments.what, arguments.runs):
        if len(cache.find(name, how)) >= nth:
            continue
        options = Options(
            arguments.broker,
            store,
            arguments.seconds,
            arguments.users,
            arguments.events,
            cache.rates(arguments.broker),
            arguments.warm_up,
        )
        started_s = time.monotonic()
        try:
            result = await work_of(name, options, nth)()
        except SystemExit as error:
            # The others are still worth measuring; a figure that is missing says so in the report.
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        cache.add(name, how, result)
        print(f"{name} ({time.monotonic() - started_s:.0f} s): {json.dumps(result)}", file=sys.stderr, flush=True)
    return about


def how_of(arguments: argparse.Namespace, broker: str) -> dict[str, Any]:
    """Under what a run is kept: runs of other lengths are no medians together."""
    return {"broker": broker, "seconds": arguments.seconds, "users": arguments.users}


def result_of(arguments: argparse.Namespace, cache: Cache, about: dict[str, Any]) -> dict[str, Any]:
    """The JSON object: the figures of `--broker`, and under `brokers` those of each that this code was measured on."""
    names = [name for name, _ in plan([*RATES, *ONCE], 1)]
    brokers = {}
    for broker in ("embedded", "kafka"):
        runs = [run for name in names for run in cache.find(name, how_of(arguments, broker))]
        if runs:
            brokers[broker] = report.summary(runs)
    figures = brokers.get(arguments.broker) or report.summary([])
    gpu = json.loads(GPU.read_text()) if GPU.exists() else None
    return {
        **figures,
        "gpu": gpu,
        "bars": report.bars(figures, gpu),
        "broker": arguments.broker,
        "brokers": brokers,
        "student": about,
        "row_bytes": row_dtype("cpu").itemsize,
        "machine": machine(),
        "command": "python benchmarks/throughput.py " + " ".join(sys.argv[1:]),
        "seconds": arguments.seconds,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="10 s a run, one run, no other modes; says which ratios moved")
    parser.add_argument("--report", action="store_true", help="also write benchmarks/SPEED.md and its plots")
    parser.add_argument("--what", nargs="*", choices=(*RATES, *ONCE), help="what to measure; none: only the report")
    parser.add_argument("--broker", choices=("embedded", "kafka"), default="embedded")
    parser.add_argument("--runs", type=int, help="runs of each rate (3; 1 with --quick)")
    parser.add_argument("--seconds", type=float, help="least time measured (30; 10 with --quick)")
    parser.add_argument("--warm-up", type=float, default=modes.WARM_UP_S)
    parser.add_argument("--events", type=int, help="events a run; without it, as many as it needs")
    parser.add_argument("--users", type=int, default=MANY_USERS, help="users of `recovery`")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache has")
    given = parser.parse_args()
    given.runs = given.runs or (1 if given.quick else 3)
    given.seconds = given.seconds or (10.0 if given.quick else 30.0)
    given.what = list(given.what if given.what is not None else QUICK if given.quick else (*RATES, *ONCE))
    return given


def main() -> None:
    arguments, cache = parse(), Cache(CACHE)
    result = result_of(arguments, cache, asyncio.run(run_all(arguments, cache)))
    if arguments.quick and COMMITTED.exists():
        before = json.loads(COMMITTED.read_text()).get("ratios", {})
        result["moved"] = report.moved(result["ratios"], before)
        print("\n".join(["against benchmarks/throughput.json:", *(result["moved"] or ["nothing moved"])]), file=sys.stderr)
    if arguments.report:
        from speed_plots import draw

        (ROOT / "benchmarks" / "SPEED.md").write_text(report.page(result, draw(result)))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
