"""Rounds of the trainer: from the topic `events` to an announcement that a worker can load; and what it refuses."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest
import structlog
import torch
from aiokafka import AIOKafkaProducer
from synthetic_history import PARTITIONS, make_canonical

from models import artifact
from models.config import GATE_RULES, KafkaConfig, MetricsConfig, Settings, StoreConfig, TrainerConfig
from models.events import CanonicalEvent
from streams.kafka import create_topics
from trainer import run
from trainer.announce import read_announcement
from trainer.history import HistoryStore
from trainer.run import run_trainer

ROOT = Path(__file__).resolve().parent.parent
EVENTS = make_canonical(260, days=30)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings_of(tmp_path, kafka: KafkaConfig, topics, **trainer) -> Settings:
    options = {"history_uri": str(tmp_path / "history"), "epochs": 2, "min_events": 1000, "nice": 0, "teacher": False}
    options |= trainer
    return Settings(
        kafka=kafka,
        topics=topics,
        store=StoreConfig(uri=str(tmp_path / "store")),
        trainer=TrainerConfig(**options),
        metrics=MetricsConfig(trainer_port=0),
    )


@pytest.fixture
async def settings(tmp_path, kafka, topics) -> Settings:
    await create_topics(kafka, topics)
    return settings_of(tmp_path, kafka, topics)


async def produce(settings: Settings, events: list[CanonicalEvent]) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka.bootstrap, acks="all")
    await producer.start()
    try:
        for event in events:
            partition = int(event.user[2:]) % PARTITIONS
            await producer.send(
                settings.topics.events, msgspec.json.encode(event), key=event.user.encode(), partition=partition
            )
    finally:
        await producer.stop()


async def announced(settings: Settings):
    return (await read_announcement(settings))[0]


def load(settings: Settings, version):
    return artifact.load(settings.store.uri, settings.store.name, version, fold=settings.fold, size="cpu")


@pytest.mark.broker
async def test_the_first_round_publishes_a_model_that_loads_and_the_next_builds_on_it(settings, monkeypatch):
    await produce(settings, [*EVENTS])
    (first,) = await run_trainer(settings, once=True)
    assert first.outcome == "published" and first.kind == "major", first.reason
    assert first.history_events == len(EVENTS)
    assert first.log_loss < first.incumbent_log_loss
    one = await announced(settings)
    assert one.name == settings.store.name and one.fallbacks == []
    model = load(settings, one)
    assert model.version == first.version == f"{one.name}/{one.version}" and not model.degraded
    assert model.config.platforms == ("shop", "till")
    (manifest,) = artifact.list_versions(settings.store.uri, settings.store.name)
    assert manifest.metrics["gate"] == first.verdict.as_dict() and manifest.metrics["gate"]["outcome"] == "published"
    cells = {(cell["platform"], cell["head"]): cell for cell in manifest.metrics["gate"]["cells"]}
    assert cells["shop", "return"]["n"] == first.candidate.cells["shop", "return"].n
    assert cells["shop", "return"]["auc"]["candidate"] == pytest.approx(
        first.candidate.cells["shop", "return"].auc, abs=1e-5
    )
    assert manifest.metrics["gate"]["p99_ms"] > 0.0

    assert manifest.metrics["recalibrated"]["shop"]["return"]["events"] == cells["shop", "return"]["n"]
    assert model.judged_P32 is not None and not (model.judged_P32 == model.calibration_P32).all()

    await produce(settings, make_canonical(260, days=4, seed=1, start_ms=EVENTS[-1].ts))
    judged, real = [], run.judge.compare
    monkeypatch.setattr(run.judge, "compare", lambda *args, **more: judged.append(args[1]) or real(*args, **more))
    (second,) = await run_trainer(settings, once=True)
    assert (judged[0].calibration_P32 == model.judged_P32).all()  # not by what has seen the labels that judge
    assert second.kind == "minor" and second.history_events > first.history_events
    assert second.incumbent is not None and second.incumbent_log_loss < 0.65  # the first model, no longer the prior
    two = await announced(settings)
    if second.outcome == "published":
        assert [f.version for f in two.fallbacks] == [one.version]
        assert load(settings, two).recurrence_id == model.recurrence_id
    else:
        assert second.outcome in ("not_better", "refused") and two == one
        assert all(f"{rule.name}: " in second.reason for rule in second.verdict.rules if rule.refusals)


@pytest.mark.broker
async def test_a_better_minor_model_is_published_with_the_earlier_ones_to_fall_back_to(settings, monkeypatch):
    await produce(settings, EVENTS)
    real = run._decide

    def always(*args):
        return real(*args)._replace(outcome="published")

    monkeypatch.setattr(run, "_decide", always)
    kinds, versions = [], []
    settings = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"major_every": 3})})
    for _ in range(5):
        (result,) = await run_trainer(settings, once=True)
        kinds.append(result.kind)
        versions.append((await announced(settings)).version)
    assert kinds == ["major", "minor", "minor", "major", "minor"]
    last = await announced(settings)
    assert [f.version for f in last.fallbacks] == versions[-2:-5:-1]
    assert all(load(settings, fallback) for fallback in last.fallbacks)


@pytest.mark.broker
async def test_a_version_that_was_stored_but_not_announced_is_announced_at_the_next_start(settings, monkeypatch):
    await produce(settings, EVENTS)
    announce = run.announce

    async def crash(*_):
        raise OSError("power")

    monkeypatch.setattr(run, "announce", crash)
    (first,) = await run_trainer(settings, once=True)
    assert first.outcome == "failed" and "power" in first.reason and await announced(settings) is None
    monkeypatch.setattr(run, "announce", announce)
    (second,) = await run_trainer(settings, once=True)
    found = await announced(settings)
    versions = {found.version, *(f.version for f in found.fallbacks)}
    assert min(m.version for m in artifact.list_versions(settings.store.uri, settings.store.name)) in versions
    assert second.kind == "minor"


@pytest.mark.broker
async def test_a_version_that_was_withdrawn_is_not_announced_again(settings):
    await produce(settings, EVENTS[: len(EVENTS) // 2])
    settings = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"min_events": 500})})
    (first,) = await run_trainer(settings, once=True)
    assert first.outcome == "published", first.reason
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka.bootstrap)
    await producer.start()
    await producer.send_and_wait(settings.topics.models, None, key=settings.store.name.encode())
    await producer.stop()
    assert await read_announcement(settings) == (None, True)
    impatient = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"min_events": 10**6})})
    (second,) = await run_trainer(impatient, once=True)
    assert second.outcome == "too_few" and await read_announcement(settings) == (None, True)


@pytest.mark.broker
async def test_an_incumbent_that_cannot_be_loaded_does_not_stop_the_trainer(settings, tmp_path):
    await produce(settings, EVENTS)
    await run_trainer(settings, once=True)
    one = await announced(settings)
    (weights,) = (tmp_path / "store").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    (second,) = await run_trainer(settings, once=True)
    two = await announced(settings)
    assert second.outcome == "published" and second.kind == "major" and two.version > one.version
    assert load(settings, two).version == second.version


@pytest.mark.usefixtures("one_copy")
@pytest.mark.broker
async def test_the_second_model_distils_a_teacher_and_later_rounds_ask_only_of_new_events(settings, monkeypatch, tmp_path):
    real = run._decide

    def always(*args):
        return real(*args)._replace(outcome="published")

    monkeypatch.setattr(run, "_decide", always)
    options = {"teacher": True, "distil_epochs": 2, "epochs": 1, "major_every": 100, "min_events": 500}
    settings = settings.model_copy(update={"trainer": settings.trainer.model_copy(update=options)})
    metrics = run.Metrics(settings.metrics)
    trainer = run._Trainer(settings, None, asyncio.Event(), metrics)
    parts = EVENTS[: len(EVENTS) * 3 // 4], EVENTS[len(EVENTS) * 3 // 4 : -500], EVENTS[-500:]
    kinds, asked = [], []
    for part in parts:
        await produce(settings, part)
        result = await trainer.round()
        kinds.append(result.kind)
        asked.append(metrics.registry.get_sample_value("crosscurrent_trainer_teacher_asked_events_total"))
    metrics.close()
    assert kinds == ["major", "major", "minor"]
    assert asked[0] == 0 and asked[2] > asked[1] > 5000
    assert asked[2] - asked[1] < 0.1 * asked[1]
    value = metrics.registry.get_sample_value
    assert value("crosscurrent_trainer_teacher_fits_total") == 1
    assert value("crosscurrent_trainer_teacher_member", {"member": "boosting"}) in (0, 1)
    assert value("crosscurrent_trainer_teacher_cached_events") == asked[2]
    files = sorted(path.name for path in (tmp_path / "history" / "teacher").iterdir())
    assert [name[-14:] for name in files] == ["000000.parquet", "000001.parquet"]


@pytest.mark.broker
async def test_a_platform_can_be_told_to_learn_from_the_others(settings, tmp_path):
    told = settings_of(
        tmp_path, settings.kafka, settings.topics, transfer="finetune_head", transfer_to="till", group_weights="frequency"
    )
    await produce(told, [*EVENTS])
    with structlog.testing.capture_logs() as logs:
        (first,) = await run_trainer(told, once=True)
    assert first.kind == "major" and first.verdict is not None, first.reason
    (moved,) = [line for line in logs if line["event"] == "transfer"]
    assert (moved["to"], moved["rung"]) == ("till", "finetune_head")


@pytest.mark.broker
async def test_too_few_events_make_no_model(settings):
    (result,) = await run_trainer(settings, once=True)
    assert result.outcome == "too_few" and result.history_events == 0
    await produce(settings, EVENTS[:300])
    (result,) = await run_trainer(settings, once=True)
    assert result.outcome == "too_few" and result.history_events == 300
    assert await announced(settings) is None
    assert artifact.list_versions(settings.store.uri, settings.store.name) == []


@pytest.mark.broker
async def test_it_runs_until_it_is_told_to_stop_and_serves_its_metrics(settings):
    await produce(settings, EVENTS)
    settings = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"interval_s": 0.2})})
    served = []

    class Spy(run.Metrics):
        def __init__(self, config):
            super().__init__(config)
            served.append(self)

    stop = asyncio.Event()
    real, run.Metrics = run.Metrics, Spy
    try:
        task = asyncio.create_task(run_trainer(settings, stop=stop))
        text = ""
        while 'rounds_total{outcome="nothing_new"}' not in text:
            await asyncio.sleep(0.3)
            assert not task.done(), task.result()
            if served:
                text = await asyncio.to_thread(read_metrics, served[0])
    finally:
        run.Metrics = real
    assert 'rounds_total{outcome="published"} 1.0' in text
    assert f"crosscurrent_trainer_history_events {float(len(EVENTS))}" in text
    assert 'crosscurrent_trainer_published_info{kind="major"' in text
    assert 'crosscurrent_trainer_auc{head="return",model="candidate",platform="shop"}' in text
    stop.set()
    results = await asyncio.wait_for(task, 60)
    assert results[0].outcome == "published" and len(results) > 1
    assert {result.outcome for result in results[1:]} <= {"nothing_new", "stopped"}
    with pytest.raises(OSError):
        read_metrics(served[0])


def read_metrics(metrics) -> str:
    port = metrics._server.server_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return response.read().decode()


@pytest.mark.broker
async def test_sigterm_stops_it_in_the_middle_of_a_round(settings):
    await produce(settings, EVENTS)
    slow = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"epochs": 1000})})
    task = asyncio.create_task(run_trainer(slow))
    await asyncio.sleep(3)
    assert not task.done()
    os.kill(os.getpid(), signal.SIGTERM)
    (result,) = await asyncio.wait_for(task, 30)
    assert result.outcome == "stopped" and await announced(settings) is None
    assert len(HistoryStore(settings.trainer.history_uri).read()) == len(EVENTS)  # what was pulled is kept


async def test_a_broker_that_is_not_there_fails_the_round_and_not_the_program(tmp_path, topics):
    nobody = KafkaConfig(bootstrap="127.0.0.1:1", request_timeout_s=2)
    (result,) = await run_trainer(settings_of(tmp_path, nobody, topics), once=True)
    assert result.outcome == "failed" and "cannot be reached" in result.reason


@pytest.mark.broker
async def test_a_candidate_that_the_gate_refuses_is_not_stored_and_the_reason_is_said(settings, monkeypatch):
    counted = {}

    class Spy(run.Metrics):
        def observe(self, result):
            super().observe(result)
            value = self.registry.get_sample_value
            counted.update({r: value("crosscurrent_trainer_refusals_total", {"rule": r}) for r in GATE_RULES})

    monkeypatch.setattr(run, "Metrics", Spy)
    await produce(settings, EVENTS)
    slow = settings.trainer.model_copy(update={"p99_budget_ms": 1e-6, "epochs": 1, "enforce": ("better", "p99")})
    (result,) = await run_trainer(settings.model_copy(update={"trainer": slow}), once=True)
    assert result.outcome == "refused" and "ms for 1,024 events, budget 0.00 ms" in result.reason
    assert counted["p99"] == 1.0 and counted["ece"] == 0.0
    assert result.verdict.limits.draws == settings.trainer.bootstrap_draws
    assert result.log_loss == result.verdict.log_loss.candidate < result.incumbent_log_loss
    assert await announced(settings) is None
    assert artifact.list_versions(settings.store.uri, settings.store.name) == []


@pytest.mark.broker
async def test_it_runs_where_nothing_of_the_streams_can_be_imported(settings, tmp_path):
    """The broker and the stores are all that it reads: no simulator, no platform file, no worker."""
    await produce(settings, [*EVENTS])
    copy = tmp_path / "copy"
    for package in ("models", "trainer"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import asyncio, importlib.abc, os, sys\n"
        "class Gone(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('streams', 'crosscurrent'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        f"sys.path.insert(0, {str(copy)!r})\n"
        "import trainer.run\n"
        f"assert trainer.run.__file__.startswith({str(copy)!r})\n"
        "from models.config import Settings\n"
        "settings = Settings.model_validate_json(sys.stdin.read())\n"
        "(result,) = asyncio.run(trainer.run.run_trainer(settings, once=True))\n"
        "print(result.outcome, result.version)\n"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", code],
        input=settings.model_dump_json(),
        capture_output=True,
        text=True,
        cwd=copy,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["published", "student/000001"]
