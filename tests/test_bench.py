"""The pure parts of the speed benchmark; each peer on a few thousand events, its scores against the scorer's own."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
import numpy as np
import plots
import pytest
import speed_feed
import speed_lab
import speed_plots
import speed_report as report
import throughput
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from job import Encoded, Job
from kernels import Kernels
from speed_modes import PEERS
from tiny import PLATFORMS, make_model

from models.artifact import publish
from models.config import KafkaConfig
from models.events import CanonicalEvent, ScoreRecord
from streams.demo import SIMULATED
from streams.kafka import client_options, create_topics

# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=2000))
def test_percentiles_are_values_that_were_seen(values):
    found = report.percentiles(np.array(values))
    ordered = sorted(values)
    for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
        assert found[name] in {round(v, 2) for v in values}
        assert sum(v <= found[name] + 0.01 for v in ordered) >= share * len(ordered) - 1e-6
    assert found["max"] == round(ordered[-1], 2)


def test_percentiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no values"):
        report.percentiles(np.empty(0))


def test_a_pause_that_its_error_hides_is_not_told():
    told, hidden = ({"pause_ms": 0.0, "gap_ms": 40.0, "usual_gap_ms": 40.0, "error_ms": error} for error in (4.0, 30.0))
    found = report.summary(
        [{"name": "swap", "result": {"sent_per_s": 50_000, "minor": told, "major": hidden, "handover_ms": 0.2}}]
    )
    assert found["swap"]["minor"]["pause_ms"] == 0.0 and found["swap"]["major"]["pause_ms"] is None


def test_swaps_pause_for_as_much_longer_than_usual():
    times = np.arange(0, 10_000, 20.0)
    swaps = [(3_000, 3_100), (6_000, 6_100), (9_000, 9_100)]
    calm = report.swap_pause(times, swaps, [True] * 3)
    assert calm["pause_ms"] == calm["error_ms"] == 0 and calm["usual_gap_ms"] == 20 and calm["load_ms"] == 100
    held = times[(times < 6_020) | (times >= 6_100)]
    found = report.swap_pause(held, swaps, [True] * 3)
    assert found["pause_ms"] == found["error_ms"] == pytest.approx(80 / 3, abs=0.01) and found["swaps"] == 3
    assert report.swap_pause(held, swaps, [True, False, True])["pause_ms"] == 0
    # A pause in the calm is usual, not a swap's.
    held = times[(times < 5_020) | (times >= 5_100)]
    assert report.swap_pause(held, swaps, [True] * 3)["usual_gap_ms"] > 20
    with pytest.raises(ValueError, match="too little"):
        report.swap_pause(times[times > 2_900], swaps, [True] * 3)


def test_ratios_are_ours_over_theirs():
    assert report.ratios({"score": 100.0, "quix": 10.0, "limit": 200.0}) == {"quix": 10.0, "limit": 0.5}
    assert report.ratios({"quix": 10.0}) == {}


def test_what_moved_names_each_ratio_and_by_how_much():
    assert report.moved({"quix": 10.5, "limit": 0.5}, {"quix": 10.0, "limit": 0.5}) == []
    lines = report.moved({"quix": 12.0, "new": 1.0}, {"quix": 10.0, "limit": 0.5})
    assert lines == ["quix: 10.00 → 12.00 (+20%)", "limit: not measured now", "new: not in the committed figures"]


def test_bars_say_must_aim_and_no():
    figures = {"events_per_s": {"score": 150e3, "score_uniform": 50e3}, "swap": {"minor": {"pause_ms": 1.5}}}
    bars = report.bars(figures)
    assert [bars[name]["met"] for name in ("score_zipf", "score_uniform", "swap", "over_quix")] == [
        "must",
        "no",
        "aim",
        None,
    ]
    assert bars["score_zipf"] == {"must": 100e3, "aim": 200e3, "value": 150e3, "unit": "events/s", "met": "must"}
    assert report.bars({"recovery": {"snapshot": {"rows_per_s": 10.0}}})["recovery_snapshot"]["met"] == "must"


def result(rate: float, **more) -> dict:
    return {"events_per_s": rate, "seconds": 30.0, "cpu_us_per_event": 9.0, "peak_memory_mib": 500, **more}


def runs() -> list[dict]:
    made = [
        ("score", result(rate, changelog_bytes_per_event=200.0, stage_us_per_event={"fold": 2.0}))
        for rate in (90.0, 120.0, 100.0)
    ]
    made += [("quix", result(10.0, changelog_bytes_per_event=900.0)), ("limit", result(200.0))]
    latency = {"p50": 3.0, "p99": 9.0, "p99.9": 12.0, "max": 20.0}
    for worse in (300.0, 0.0, -2.0):  # the middle one counts
        created = {key: value + worse for key, value in latency.items()}
        made.append(("latency:20000", {"rate": 20000, "sent_per_s": 20000, "created_ms": created, "seen_ms": latency}))
    made.append(("stages", {"us_per_event": {"all": 4.0, "fold": 2.5}, "score_bytes": 480}))
    return [{"name": name, "result": result} for name, result in made]


def test_a_summary_has_medians_spreads_and_ratios():
    found = report.summary(runs())
    assert found["events_per_s"] == {"score": 100, "quix": 10, "limit": 200}
    assert found["spread"]["score"] == [90.0, 120.0] and found["details"]["score"]["runs"] == 3
    assert found["ratios"] == {"quix": 10.0, "limit": 0.5}
    assert found["latency"]["20000"]["created_ms"]["p50"] == 3.0
    assert found["latency"]["20000"]["created_ms_spread"] == {"p50": [1.0, 303.0], "p99": [7.0, 309.0]}
    assert found["stages"]["in_worker_us_per_event"] == {"fold": 2.0}
    assert report.bars(found)["latency_p99"]["met"] == "aim"


def test_the_page_shows_every_figure_that_there_is(tmp_path):
    found = report.summary(runs())
    whole = {
        "machine": {"cpu": "one", "cores": 2, "memory_gib": 24, "python": "3.11"},
        "student": {"flops_per_event": 61828},
        "command": "python benchmarks/throughput.py",
        "brokers": {"embedded": found},
        "bars": report.bars(found),
    }
    page = report.page(whole)
    for words in ("100 (90.0 … 120.0)", "10.00 ×", "| fold | 2.5 | 2.0 |", "3.0 / 9.0 / 12.0", "not measured", "**none**"):
        assert words in page, words
    assert all(bar.title in page for bar in report.BARS.values())


def test_the_page_has_the_card_where_one_was_measured():
    spread = {"median": 500.0, "p5": 490.0, "p95": 600.0}
    batch = {"on_card_us": spread, "on_card_events_per_s": 4_096_000, "with_transfers_us": spread, "bandwidth_share": 0.25}
    batches = [{"size": size, "batch": 8192, "events_per_s": rate, **batch} for size, rate in (("cpu", 12e6), ("gpu", 1))]
    gpu = {"card": "a card", "torch": "2.0", "bandwidth_gb_s": 3000, "repeats": 200, "batches": batches}
    bars = report.bars({}, gpu)
    assert (bars["gpu_student"]["value"], bars["gpu_student"]["met"]) == (12e6, "must")
    assert report.bars({})["gpu_student"]["met"] is None
    whole = {
        "machine": {"cpu": "one", "cores": 2, "memory_gib": 24, "python": "3.11"},
        "student": {"flops_per_event": 61828},
        "brokers": {},
        "bars": bars,
        "gpu": gpu,
    }
    page = report.page(whole)
    assert "| cpu | 8,192 | 500.0 (490.0 … 600.0) | 4,096,000 | 25.0% | 500.0 (490.0 … 600.0) | 12,000,000" in page
    assert "one a card, 3,000 GB/s" in page and "not measured, no CUDA" not in page


def test_plots_are_drawn_of_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    drawn = speed_plots.draw({"brokers": {"kafka": report.summary(runs())}})
    assert [path.name for path in drawn] == ["speed-rates.svg", "speed-latency.svg", "speed-stages.svg"]
    assert all("</svg>" in path.read_text() for path in drawn)
    assert speed_plots.draw({"brokers": {}}) == []


def test_on_paper_a_hundred_workers_ask_for_what_they_write():
    rows = {
        row["what"]: row["value"] for row in report.on_paper(report.summary(runs()) | {"events_per_s": {"score": 100_000}})
    }
    assert rows["events a second"] == "10.0 M" and rows["read by workers (events)"] == "2.70 GB/s"
    assert report.on_paper({}) == []


def test_a_cache_resumes_and_forgets_other_code(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    how = {"broker": "embedded", "seconds": 30.0, "users": 10}
    throughput.Cache(path).add("score", how, result(5.0))
    with path.open("a") as lines:
        lines.write('{"name": "sco')  # interrupted
    cache = throughput.Cache(path)
    assert len(cache.find("score", how)) == 1 and cache.rates("embedded") == {"score": 5.0}
    assert not cache.find("score", how | {"broker": "kafka"}) and not cache.find("score", how | {"seconds": 10.0})
    cache.add("score", how, result(6.0))
    assert len(throughput.Cache(path).find("score", how)) == 2
    cache.add("quix", how, result(7.0))
    cache.forget("quix", how)
    again = throughput.Cache(path)
    assert not again.find("quix", how) and len(again.find("score", how)) == 2
    monkeypatch.setattr(throughput, "code_of", lambda name: "other")
    assert not throughput.Cache(path).find("score", how)


def test_a_plan_takes_turns():
    assert throughput.plan(["quix", "score", "latency"], 2) == [
        ("score", 1), ("quix", 1), ("score", 2), ("quix", 2),
        ("latency:2000", 1), ("latency:20000", 1), ("latency:50000", 1),
        ("latency:2000", 2), ("latency:20000", 2), ("latency:50000", 2),
    ]  # fmt: skip


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────

decode = msgspec.json.Decoder(CanonicalEvent).decode


@pytest.mark.parametrize("zipf", [True, False])
def test_events_are_canonical_and_none_is_twice(zipf):
    events = list(speed_lab.stored_events(3000, 1, 50, zipf))
    decoded = [decode(value) for _, value in events]
    assert len({event.event_id for event in decoded}) == 3000
    assert all(
        key.decode() == event.user and event.platform in SIMULATED for (key, _), event in zip(events, decoded, strict=True)
    )
    counts = np.unique([event.user for event in decoded], return_counts=True)[1]
    assert len(counts) == 50 and (counts.max() > 5 * np.median(counts)) == zipf
    # As ingest writes them: a fast path for compact JSON is not missed.
    assert all(msgspec.json.encode(event) == value for event, (_, value) in zip(decoded, events, strict=True))
    assert [decode(value).user for _, value in speed_lab.every_user_once(3)] == [f"k1{u:022d}" for u in range(3)]


def test_a_fed_event_has_its_own_id_and_the_time_of_its_sending():
    partition, key, before, after = speed_feed.prepared(50, 4)[7]
    event = decode(speed_feed.event(5, before, 123456, after))
    assert (event.event_id, event.ts, event.user.encode()) == ("f000000000005", 123456, key) and 0 <= partition < 4


# ── peers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """With a tiny model of three platforms, two of which cannot have every head."""
    folder = str(tmp_path_factory.mktemp("store"))
    model = make_model(seed=3)
    publish(folder, "student", model, metrics={}, training_range={}, reference_histograms={}, fold=model.fold, now_ms=1)
    return folder


def reference(store: str, events: list[tuple[bytes, bytes]]) -> dict[str, ScoreRecord]:
    """Scores by event id, of our own kernels, one partition after another as Kafka would have them."""
    out = {}
    partitions = speed_lab.partitions_of([key for key, _ in events], speed_lab.PARTITIONS)
    for p in range(speed_lab.PARTITIONS):
        part = [event for event, own in zip(events, partitions == p, strict=True) if own]
        kernels, keys, values = Kernels(store), [key for key, _ in part], [value for _, value in part]
        for _, value in kernels.process(p, keys, values, list(range(len(part)))):
            score = msgspec.json.decode(value, type=ScoreRecord)
            out[score.event_id] = score
    return out


def assert_same(found: dict[str, ScoreRecord], wanted: dict[str, ScoreRecord]) -> None:
    assert found.keys() == wanted.keys()
    for event_id, score in found.items():
        want = wanted[event_id]
        for field in ("click", "purchase", "return_"):
            assert getattr(score.p, field) == pytest.approx(getattr(want.p, field), abs=2e-4), (event_id, field)
        assert (score.user, score.platform, score.ts, score.cold) == (want.user, want.platform, want.ts, want.cold)
        assert [p for _, p in score.categories] == pytest.approx([p for _, p in want.categories], abs=2e-4)
        assert score.interest_shift == pytest.approx(want.interest_shift, abs=1e-3)


def records(found: list[bytes | None]) -> dict[str, ScoreRecord]:
    scores = [msgspec.json.decode(value, type=ScoreRecord) for value in found if value is not None]
    return {score.event_id: score for score in scores}


@pytest.mark.parametrize("way", ["one", "many", "steps"])
def test_a_peer_s_job_gives_the_scores_that_the_worker_gives(store, way):
    events = list(speed_lab.stored_events(400, 2, 20, platforms=PLATFORMS))
    events.insert(50, events[49])  # a duplicate has no score
    keys, canonical = [key for key, _ in events], [decode(value) for _, value in events]
    partition = speed_lab.partitions_of(keys, speed_lab.PARTITIONS).tolist()
    counts = dict.fromkeys(range(speed_lab.PARTITIONS), 0)
    offsets = []
    for p in partition:
        offsets.append(counts[p])
        counts[p] += 1
    job, rows, out = Job(store), {}, []
    if way == "many":
        for start in range(0, len(keys), 64):
            at = slice(start, start + 64)
            out += job.many(rows, keys[at], canonical[at], offsets[at])
    elif way == "one":
        for key, event, offset in zip(keys, canonical, offsets, strict=True):
            rows[key], record = job.one(rows.get(key), event, offset)
            out.append(record)
    else:
        h = {}
        for start in range(0, len(keys), 64):
            at, folded = slice(start, start + 64), []
            for key, event, offset in zip(keys[at], canonical[at], offsets[at], strict=True):
                rows[key], one = job.fold(rows.get(key), event, offset)
                folded.append(one)
            encoded, moved = job.encode(folded).split(), []
            for key, one, its in zip(keys[at], folded, encoded, strict=True):
                h[key] = job.advance(h.get(key), one, its)
                moved.append(h[key])
            out += job.finish(folded, Encoded.join(encoded), np.stack(moved))
    assert sum(record is None for record in out) == 1
    assert_same(records(out), reference(store, events))


@pytest.mark.broker
@pytest.mark.parametrize("name", PEERS)
async def test_a_peer_scores_every_event_as_the_worker_does(name, kafka, topics, prefix, store, tmp_path):
    python = speed_lab.peers_python(install=False)
    if python is None:
        pytest.skip("the extra `bench` is not installed: pip install -e '.[bench]', or run `make bench` once")
    events = list(speed_lab.stored_events(2_000, 5, 100, platforms=PLATFORMS))
    lab = speed_lab.Lab.on(kafka, topics, tmp_path, store)
    await create_topics(kafka, topics)
    await lab.produce_events(topics.events, iter(events))
    process, group = lab.start_peer(name, PEERS[name], python, topics.events, topics.scores, prefix)

    async def until(count: Callable[[], Awaitable[int]]) -> None:
        end_s = time.monotonic() + 150
        while await count() < len(events):
            process.check()
            assert time.monotonic() < end_s, process.tail()
            await asyncio.sleep(0.2)

    try:
        await until(lambda: lab.ends({topics.scores}))
        if name != "bytewax":  # which keeps its offsets in its snapshots
            await until(lambda: lab.committed(group, {topics.events}))
        durable = name in ("faust", "faust_take", "quix")
        # At least a row of about a KiB for each of the hundred users.
        assert (await lab.changelog_bytes(group) > 90_000) == durable
        found = await values_of(kafka, topics.scores, len(events))
    finally:
        process.stop(5.0)
        await lab.close()
    assert_same(records(found), reference(store, events))


async def values_of(kafka: KafkaConfig, topic: str, n: int) -> list[bytes]:
    async with AIOKafkaConsumer(**client_options(kafka)) as consumer:
        tps = [TopicPartition(topic, p) for p in range(speed_lab.PARTITIONS)]
        consumer.assign(tps)
        await consumer.seek_to_beginning(*tps)
        values: list[bytes] = []
        while len(values) < n:
            got = await consumer.getmany(timeout_ms=10_000)
            assert got, f"{len(values)} of {n} scores"
            values += [record.value for batch in got.values() for record in batch]
        return values
