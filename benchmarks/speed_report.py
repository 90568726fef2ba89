"""Figures → medians, ratios, bars, the JSON object, what moved, and the page SPEED.md. Pure but for writing the page.

A measured run is a dict `{"name", "broker", "quick", "code", "run", "result"}`; its figures are in `result`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PEERS = ("faust", "faust_take", "quix", "bytewax", "aiokafka_loop", "confluent_loop", "limit")
OURS = ("score", "score_uniform", "both", "ingest")
DURABLE = {
    "score": "changelog, rows once a commit",
    "faust": "changelog, a row an event",
    "faust_take": "changelog, a row a user and batch",
    "quix": "RocksDB and changelog, rows once a checkpoint",
    "bytewax": "SQLite snapshot an epoch; no changelog",
    "aiokafka_loop": "**none**: a dict",
    "confluent_loop": "**none**: a dict",
    "limit": "**none**: an arena",
}
TITLES = {
    "score": "Crosscurrent",
    "score_uniform": "Crosscurrent, uniform over 1 M users",
    "both": "Crosscurrent, ingest and score",
    "ingest": "Crosscurrent, ingest",
    "faust": "Faust, per event",
    "faust_take": "Faust, `take_events(512)`",
    "quix": "Quix Streams",
    "bytewax": "Bytewax with recovery",
    "aiokafka_loop": "bare aiokafka loop",
    "confluent_loop": "bare confluent-kafka loop",
    "limit": "the tuned limit",
}
MOVED = 0.1
"""A ratio that differs by more than this share has moved."""


class Bar(NamedTuple):
    """What a figure must and should be. `where`: the path to it in `summary`; `least`: more is better."""

    title: str
    where: tuple[str, ...]
    must: float | None
    aim: float
    unit: str
    least: bool = True


BARS: dict[str, Bar] = {
    "score_zipf": Bar("score, zipf over 50,000 users", ("events_per_s", "score"), 100e3, 200e3, "events/s"),
    "score_uniform": Bar("score, uniform over 1 M users", ("events_per_s", "score_uniform"), 60e3, 120e3, "events/s"),
    "over_faust": Bar("over stock Faust", ("ratios", "faust"), 40, 100, "×"),
    "over_quix": Bar("over Quix Streams", ("ratios", "quix"), 8, 20, "×"),
    "over_bytewax": Bar("over Bytewax", ("ratios", "bytewax"), 5, 11, "×"),
    "over_confluent_loop": Bar("over a bare confluent-kafka loop", ("ratios", "confluent_loop"), 2, 5, "×"),
    "of_limit": Bar("of the tuned limit", ("ratios", "limit"), 0.5, 0.8, "×"),
    "ingest": Bar("ingest", ("events_per_s", "ingest"), 100e3, 200e3, "events/s"),
    "both": Bar("both stages in one worker", ("events_per_s", "both"), 50e3, 100e3, "events/s"),
    "latency_p50": Bar("p50 event → score created at 20 k/s", ("latency", "20000", "created_ms", "p50"), 20, 5, "ms", False),
    "latency_p99": Bar(
        "p99 event → score created at 20 k/s", ("latency", "20000", "created_ms", "p99"), 50, 15, "ms", False
    ),
    "recovery": Bar("recovery from the changelog", ("recovery", "changelog", "rows_per_s"), 150e3, 400e3, "rows/s"),
    "recovery_snapshot": Bar("recovery from a local snapshot", ("recovery", "snapshot", "rows_per_s"), None, 1e6, "rows/s"),
    "memory": Bar("memory a user", ("recovery", "bytes_per_user"), 1.4 * 1024, 1.1 * 1024, "bytes", False),
    "swap": Bar("swap pause at 50 k/s", ("swap", "minor", "pause_ms"), 10, 2, "ms", False),
    "start": Bar("start to first score, warm cache", ("start", "first_score_s"), 6, 3, "s", False),
    "gpu_student": Bar(
        "student `cpu` on a GPU, batch 8,192, transfers included",
        ("gpu", "cpu:8192", "events_per_s"),
        10e6,
        50e6,
        "events/s",
    ),
}


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def percentiles(values_ms: np.ndarray) -> dict[str, float]:
    """p50, p99, p99.9 and the greatest of (N,) ms, N > 0; the smallest value that so many are not above."""
    if not len(values_ms):
        raise ValueError("no values")
    p50, p99, p999 = np.percentile(values_ms, [50, 99, 99.9], method="inverted_cdf")
    return {
        "p50": round(float(p50), 2),
        "p99": round(float(p99), 2),
        "p99.9": round(float(p999), 2),
        "max": round(float(values_ms.max()), 2),
    }


def swap_pause(
    scored_ms: np.ndarray, swaps: Sequence[tuple[float, float]], of: Sequence[bool], after_ms: float = 200.0
) -> dict[str, float]:
    """How much longer than usual no score was made around swaps of a model: (announced, first score by the new one), ms.

    `scored_ms` (N,): when scores were made. Of each swap the greatest gap from the announcement to `after_ms` after the
    first score, less the mean of those of the windows of the same length in the time before it, back to the swap before.
    `pause_ms` is their mean over the swaps that `of` names, at least 0, `error_ms` its standard error. ValueError where
    less than a window was scored before an announcement.
    """
    times, since_ms, found = np.unique(scored_ms), float(np.min(scored_ms)), []
    for announced_ms, swapped_ms in swaps:
        length = swapped_ms + after_ms - announced_ms
        ends = np.arange(announced_ms, since_ms + length - 1e-9, -length).tolist()
        if not ends:
            raise ValueError("too little was scored before the announcement to say what gap is usual")
        usual = statistics.mean(_greatest_gap(times, end - length, end) for end in ends)
        found.append((_greatest_gap(times, announced_ms, swapped_ms + after_ms), usual, swapped_ms - announced_ms))
        since_ms = swapped_ms + after_ms
    gaps, usuals, loads = zip(*(one for one, counts in zip(found, of, strict=True) if counts), strict=True)
    pauses = [gap - usual for gap, usual in zip(gaps, usuals, strict=True)]
    return {
        "pause_ms": round(max(0.0, statistics.mean(pauses)), 2),
        "error_ms": round(statistics.stdev(pauses) / len(pauses) ** 0.5, 2),
        "swaps": len(pauses),
        "gap_ms": round(statistics.mean(gaps), 2),
        "usual_gap_ms": round(statistics.mean(usuals), 2),
        "load_ms": round(statistics.mean(loads), 1),
    }


def _greatest_gap(times: np.ndarray, start: float, end: float) -> float:
    inside = times[(times >= start) & (times <= end)]
    return float(np.diff(inside).max()) if len(inside) > 1 else end - start


def ratios(events_per_s: Mapping[str, float]) -> dict[str, float]:
    """Ours over theirs, of every peer that was measured."""
    if "score" not in events_per_s:
        return {}
    ours = events_per_s["score"]
    return {peer: round(ours / events_per_s[peer], 3) for peer in PEERS if events_per_s.get(peer)}


def moved(now: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """One line for each ratio that differs by more than MOVED from the committed one, or is in one of them alone."""
    lines = []
    for name in [*dict.fromkeys([*before, *now])]:
        if name not in now or name not in before:
            lines.append(f"{name}: {'not measured now' if name in before else 'not in the committed figures'}")
        elif abs(now[name] / before[name] - 1.0) > MOVED:
            lines.append(f"{name}: {before[name]:.2f} → {now[name]:.2f} ({now[name] / before[name] - 1.0:+.0%})")
    return lines


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians and spreads of one broker's runs; of latencies the middle run; modes with one result keep the newest."""
    results: dict[str, list[dict]] = {}
    for run in runs:
        results.setdefault(run["name"], []).append(run["result"])
    out: dict[str, Any] = {"events_per_s": {}, "spread": {}, "details": {}}
    for name in (*OURS, *PEERS):
        if name not in results:
            continue
        rates = [result["events_per_s"] for result in results[name]]
        out["events_per_s"][name] = round(statistics.median(rates))
        out["spread"][name] = [min(rates), max(rates)]
        keys = ("cpu_us_per_event", "changelog_bytes_per_event", "peak_memory_mib")
        out["details"][name] = {"runs": len(rates), "seconds": min(result["seconds"] for result in results[name])} | {
            key: round(statistics.median(result[key] for result in results[name]), 2)
            for key in keys
            if key in results[name][0]
        }
    out["ratios"] = ratios(out["events_per_s"])
    latencies = {name.split(":")[1]: _middle(found) for name, found in results.items() if name.startswith("latency:")}
    if latencies:
        out["latency"] = latencies
    for name in ("recovery", "swap", "start", "scaling", "stages", "trainer", "cores"):
        if name in results:
            out[name] = results[name][-1]
    if "swap" in out:
        out["swap"] = {kind: _resolved(one) if isinstance(one, dict) else one for kind, one in out["swap"].items()}
    if "stages" in out and "score" in results:
        out["stages"] = out["stages"] | {"in_worker_us_per_event": results["score"][-1]["stage_us_per_event"]}
    return out


def _middle(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The run whose p99 is the median one, and how far apart all are."""
    middle = sorted(runs, key=lambda run: run["created_ms"]["p99"])[len(runs) // 2]
    spread = {p: [f(run["created_ms"][p] for run in runs) for f in (min, max)] for p in ("p50", "p99")}
    return {**middle, "runs": len(runs), "created_ms_spread": spread}


def _resolved(pause: Mapping[str, float]) -> dict[str, float | None]:
    """Without `pause_ms` where its error is above what the bar allows: it cannot be seen then."""
    return {**pause, "pause_ms": pause["pause_ms"] if pause["error_ms"] <= BARS["swap"].must else None}


def bars(figures: Mapping[str, Any], gpu: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Every bar: what must and should be, what was measured (None: not), and whether it is met: `aim`, `must` or `no`.
    `gpu`: what `benchmarks/gpu_student.py` found."""
    out = {}
    batches = {f"{one['size']}:{one['batch']}": one for one in gpu["batches"]} if gpu else {}
    for name, bar in BARS.items():
        value: Any = {**figures, "gpu": batches}
        for key in bar.where:
            value = value.get(key) if isinstance(value, Mapping) else None
        out[name] = {"must": bar.must, "aim": bar.aim, "value": value, "unit": bar.unit, "met": _met(bar, value)}
    return out


def _met(bar: Bar, value: float | None) -> str | None:
    if value is None:
        return None

    def reaches(limit: float) -> bool:
        return value >= limit if bar.least else value <= limit

    if reaches(bar.aim):
        return "aim"
    return "must" if bar.must is None or reaches(bar.must) else "no"


def on_paper(figures: Mapping[str, Any], workers: int = 100, row_bytes: int = 1016) -> list[dict[str, Any]]:
    """What `workers` of the measured kind would ask of a cluster, by resource; empty where `score` was not measured."""
    if "score" not in figures.get("events_per_s", {}):
        return []
    rate, details = figures["events_per_s"]["score"], figures["details"]["score"]
    changelog = details.get("changelog_bytes_per_event", row_bytes)
    scores = figures.get("stages", {}).get("score_bytes", 500)
    event = 270
    gb = 1e-9 * workers * rate
    written = (event + scores + changelog) * gb
    return [
        {"what": "events a second", "value": f"{workers * rate / 1e6:.1f} M"},
        {"what": "read by workers (events)", "value": f"{event * gb:.2f} GB/s"},
        {"what": "written by workers (scores, changelog)", "value": f"{(scores + changelog) * gb:.2f} GB/s"},
        {
            "what": "broker disks, three replicas of events, scores and changelog",
            "value": f"{3 * written:.1f} GB/s: at 0.5 GB/s a broker, {int(np.ceil(3 * written / 0.5))} brokers",
        },
        {"what": "partitions of `events`, one a worker at least, four as measured", "value": f"{4 * workers}"},
        {"what": "offset commits", "value": f"{workers} a second at 1 s interval, one group coordinator"},
        {
            "what": "an eager rebalance stops every worker; rows that one of them restores when it joins",
            "value": "its users' rows, at the rate of recovery",
        },
    ]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(result: Mapping[str, Any], plots: Sequence[Path] = ()) -> str:
    """SPEED.md of a whole JSON object."""
    machine, flops = result["machine"], result["student"]["flops_per_event"]
    lines = [
        "# Speed",
        "",
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, Python {machine['python']}.",
        "The same job for all: canonical events of about 200 bytes of JSON from three platforms, zipf(0.8) over 50,000",
        f"users, through the published `cpu` student ({flops:,} FLOP an event) to the full score record; acks=all; the",
        "process on one core, the broker on the other; between acknowledged commits at 1 s interval, after 5 s of",
        "warm-up. Median (least … greatest).",
        "",
        '    make bench ARGS="--json benchmarks/throughput.json --report"        # --what MODE …: some of it; runs are kept',
        "",
    ]
    for broker, title in (("embedded", "the embedded broker"), ("kafka", "Apache Kafka")):
        figures = result["brokers"].get(broker)
        if figures:
            lines += [f"## On {title}", "", *_rates(figures), *_modes(figures), ""]
    lines += ["## Bars", "", *_bars(result), "", "## How the peers are written", "", *_PEERS_TEXT, ""]
    lines += [f"![{plot.stem}](plots/{plot.name})" for plot in plots]
    return "\n".join(lines).rstrip() + "\n"


def _rates(figures: Mapping[str, Any]) -> list[str]:
    if not figures["events_per_s"]:
        return []
    lines = [
        "| | events a second | runs | ours over it | CPU µs an event | changelog bytes an event | peak MiB | its state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rate in figures["events_per_s"].items():
        low, high = figures["spread"][name]
        details, ratio = figures["details"][name], figures["ratios"].get(name)
        cells = (
            TITLES[name],
            f"{rate:,} ({low:,} … {high:,})",
            str(details["runs"]),
            f"{ratio:.2f} ×" if ratio else "",
            str(details["cpu_us_per_event"]),
            str(details.get("changelog_bytes_per_event", "–")),
            str(details["peak_memory_mib"]),
            DURABLE.get(name, DURABLE["score"]) if name != "ingest" else "no state",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _modes(figures: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if latency := figures.get("latency"):
        lines += [
            "| latency, 1 s commits | created p50 / p99 / p99.9 ms | p50, p99 of the runs | seen, ms | sent a second |",
            "|---|---|---|---|---|",
        ]
        for rate, one in sorted(latency.items(), key=lambda item: int(item[0])):
            cells = [" / ".join(str(one[key][p]) for p in ("p50", "p99", "p99.9")) for key in ("created_ms", "seen_ms")]
            spread = ", ".join("{} … {}".format(*one["created_ms_spread"][p]) for p in ("p50", "p99"))
            lines.append(
                f"| {int(rate):,} events/s | {cells[0]} | {spread} ({one['runs']}) | {cells[1]} | {one['sent_per_s']:,} |"
            )
        lines.append("")
    if one := figures.get("recovery"):
        lines += [
            f"{one['users']:,} users: {one['bytes_per_user']:,} bytes of memory each (a row has {one['row_bytes']:,}).",
            "",
            "| restart | ready after s | recovery s | rows/s | MB/s | rows read from the changelog |",
            "|---|---|---|---|---|---|",
        ]
        for how, title in (("changelog", "with an empty folder"), ("snapshot", "as it left its folder")):
            r = one[how]
            rows, mb = (f"{r[key]:,}" if r[key] else "–" for key in ("rows_per_s", "mb_per_s"))
            lines.append(f"| {title} | {r['ready_s']} | {r['recovery_s']} | {rows} | {mb} | {r['changelog_rows']:,} |")
        lines.append("")
    if one := figures.get("swap"):
        lines += [
            "| a new model at 50,000 events/s | swaps | longest time without a score ms | usual ms | pause ms | load ms |",
            "|---|---|---|---|---|---|",
        ]
        for kind in ("minor", "major"):
            at = one[kind]
            pause = f"{at['gap_ms'] - at['usual_gap_ms']:+.1f} ± {at['error_ms']}"
            lines.append(
                f"| {kind} version | {at['swaps']} | {at['gap_ms']} | {at['usual_gap_ms']} | {pause} | {at['load_ms']} |"
            )
        lines += ["", f"The hand-over itself takes {one['handover_ms']} ms. Sent: {one['sent_per_s']:,} events/s.", ""]
    if one := figures.get("start"):
        first_s, ready_s, session_s = (one[key] for key in ("first_score_s", "ready_s", "session_timeout_s"))
        lines += [f"Start to first score: {first_s} s (ready after {ready_s} s), session timeout {session_s} s.", ""]
    if one := figures.get("stages"):
        worker = one.get("in_worker_us_per_event", {})
        lines += ["| stage | alone, µs an event | in the worker, µs an event |", "|---|---|---|"]
        for name, value in one["us_per_event"].items():
            lines.append(f"| {name} | {value} | {worker.get(name, '')} |")
        lines.append("")
    if one := figures.get("trainer"):
        lines += [
            f"Trainer, one thread: reads {one['read_events_per_s']:,}, labels {one['label_events_per_s']:,}, replays "
            f"{one['replay_events_per_s']:,} and trains {one['train_events_per_s']:,} events a second.",
            "",
        ]
    if one := figures.get("cores"):
        lines += [
            f"A matrix product on the worker's core, while the broker's multiplies too, goes at {one['together']:.2f} of "
            f"its speed alone ({one['least']:.2f} … {one['greatest']:.2f}): "
            + ("they share more than memory." if one["together"] < 0.8 else "they are cores of their own."),
            "",
        ]
    if one := figures.get("scaling"):
        each = "; ".join(f"{workers}: {found['events_per_s']:,} events/s" for workers, found in one.items())
        lines += [f"Workers sharing all cores with the broker: {each}.", ""]
    paper = on_paper(figures)
    if paper:
        lines += [
            "On paper, 100 workers:",
            "",
            "| | |",
            "|---|---|",
            *(f"| {row['what']} | {row['value']} |" for row in paper),
            "",
        ]
    return lines


def _bars(result: Mapping[str, Any]) -> list[str]:
    lines = ["| bar | must | aim | measured | met |", "|---|---|---|---|---|"]
    for name, bar in result["bars"].items():
        value = (
            "not measured" if bar["value"] is None else f"{bar['value']:,.2f}".rstrip("0").rstrip(".") + f" {bar['unit']}"
        )
        if value == "not measured" and name == "swap":
            value = "not to be told from the usual gaps"
        must = "–" if bar["must"] is None else f"{bar['must']:,g}"
        lines.append(f"| {BARS[name].title} | {must} | {bar['aim']:,g} | {value} | {bar['met'] or '–'} |")
    return [*lines, "", *_card(result.get("gpu"))]


def _card(gpu: Mapping[str, Any] | None) -> list[str]:
    """What `benchmarks/gpu_student.py` found, as it wrote it."""
    if not gpu:
        return ["The student on a GPU: not measured, no CUDA device (`python -m benchmarks.gpu_student`)."]
    lines = [
        f"The student on one {gpu['card']}, {gpu['bandwidth_gb_s']:,} GB/s by a copy, PyTorch {gpu['torch']}; medians of "
        f"{gpu['repeats']} batches (5th … 95th percentile); `python -m benchmarks.gpu_student --json "
        "benchmarks/gpu_student.json`:",
        "",
        "| size | batch | on the card, µs | events/s | share of the bandwidth | with transfers, µs | events/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in gpu["batches"]:
        alone, moved = ("{median:,} ({p5:,} … {p95:,})".format(**one[key]) for key in ("on_card_us", "with_transfers_us"))
        lines.append(
            f"| {one['size']} | {one['batch']:,} | {alone} | {one['on_card_events_per_s']:,} | {one['bandwidth_share']:.1%} "
            f"| {moved} | {one['events_per_s']:,} |"
        )
    return lines


_PEERS_TEXT = [
    "Each is a program of `benchmarks/peers/`, written as its own documentation does it, with its batch API where it has",
    "one, and acks=all. `peers/job.py` gives all of them what they would have to write themselves, and gives it",
    "generously: msgspec for JSON, our compiled fold on a row of bytes that lies in the peer's own store, and the",
    "student in one matrix product a batch. Faust per event and Quix Streams call once an event, so there the student is",
    "its weights in plain NumPy: the whole job then takes less than half of what PyTorch's calls alone take for one",
    "event. Bytewax keeps state in two stateful steps and does the student's products in batches between them. Faust's",
    "table is in memory with its changelog, which spares it RocksDB. The loops commit once a second after all their",
    "scores are acknowledged; their state dies with them. Bytewax commits no offsets to Kafka: its progress is counted",
    "in acknowledged scores, and what it writes is bytes of SQLite. The tuned limit is a bare confluent-kafka loop",
    "around Crosscurrent's own kernels. That all of them make the worker's scores is a test (`tests/test_bench.py`).",
]
