"""Plots of SPEED.md: who is how fast, latency by load, what a stage costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plots import BLUE, GREY, ORANGE, pyplot, save
from speed_report import PEERS, TITLES


def draw(result: Mapping[str, Any]) -> list[Path]:
    """SVG files of what was measured; of the embedded broker where it was."""
    figures = result["brokers"].get("embedded") or next(iter(result["brokers"].values()), {})
    drawn = []
    if figures.get("events_per_s"):
        drawn.append(_rates(figures))
    if figures.get("latency"):
        drawn.append(_latency(figures["latency"]))
    if figures.get("stages"):
        drawn.append(_stages(figures["stages"]["us_per_event"]))
    return drawn


def _rates(figures: Mapping[str, Any]) -> Path:
    rates, spread = figures["events_per_s"], figures["spread"]
    names = sorted((name for name in ("score", *PEERS) if name in rates), key=rates.get)
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.32 * len(names)))
    for at, name in enumerate(names):
        colour = ORANGE if name == "score" else GREY if name == "limit" else BLUE
        axes.barh(at, rates[name], color=colour, height=0.62)
        axes.hlines(at, *spread[name], color="black", lw=1)
        axes.text(spread[name][1], at, f" {rates[name]:,}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [TITLES[name].replace("`", "") for name in names])
    axes.set_xlim(0, 1.15 * max(spread[name][1] for name in names))
    axes.set_xlabel("events a second on one core, acknowledged (line: least to greatest run)")
    return save(figure, "speed-rates")


def _latency(latency: Mapping[str, Mapping[str, Any]]) -> Path:
    rates = sorted(latency, key=int)
    figure, axes = pyplot.subplots(figsize=(6, 3))
    for key, colour in (("created_ms", BLUE), ("seen_ms", ORANGE)):
        for p, style in (("p50", "-"), ("p99", "--"), ("p99.9", ":")):
            values = [latency[rate][key][p] for rate in rates]
            axes.plot([int(r) for r in rates], values, style, marker="o", ms=3, color=colour, label=f"{key[:-3]} {p}")
    axes.set(xscale="log", yscale="log", xlabel="events a second", ylabel="ms from the event")
    axes.set_xticks([int(r) for r in rates], [f"{int(r):,}" for r in rates], minor=False)
    low, high = axes.get_ylim()
    ticks = [ms for ms in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= ms <= high]
    axes.set_yticks(ticks, [f"{ms:,}" for ms in ticks], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize=7, ncols=2, handlelength=3.5)
    return save(figure, "speed-latency")


def _stages(us_per_event: Mapping[str, float]) -> Path:
    parts = {name: value for name, value in us_per_event.items() if name != "all" and not name.endswith("_per_row")}
    figure, axes = pyplot.subplots(figsize=(7, 0.7 + 0.26 * len(parts)))
    at = range(len(parts))[::-1]
    axes.barh(list(at), list(parts.values()), color=BLUE, height=0.6)
    for y, value in zip(at, parts.values(), strict=True):
        axes.text(value, y, f" {value:.2f}", va="center", fontsize=8)
    axes.set_yticks(list(at), list(parts))
    axes.set_xlabel("µs an event, alone")
    return save(figure, "speed-stages")
