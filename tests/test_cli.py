"""The command line: exit codes, one-line errors, and every command that needs no trained model, on a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from crosscurrent import main
from models import artifact
from models.config import FoldConfig, KafkaConfig
from models.errors import EventRefused
from models.events import CanonicalEvent
from streams import dead_letters
from streams.broker import free_port
from streams.kafka import client_options, create_topics
from trainer.evaluate import Paired
from trainer.gate import Evidence, Limits, decide

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("CROSSCURRENT_")]:
        monkeypatch.delenv(name)


def command(*args: str) -> list[str]:
    return [sys.executable, str(ROOT / "crosscurrent.py"), *args]


def run(*args: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120, env={**os.environ, **environ})


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit 2, nothing on stdout, one line on stderr that holds the words."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


# ── exit codes and errors, in a process of their own ─────────────────────────────────────────────────────────────────


def test_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0
    commands = ["demo", "worker", "trainer", "teacher", "replay", "broker", "history", "models", "dead-letters", "config"]
    assert all(f"  {name} " in done.stdout for name in commands)
    assert run().stdout == done.stdout


def test_help_loads_nothing_heavy():
    heavy = "{'torch', 'numba', 'numpy', 'faust', 'aiokafka', 'pydantic', 'pyarrow', 'rich.console'}"
    code = f"import sys, crosscurrent; crosscurrent.main(['--help']); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_a_refused_worker_loads_neither_torch_nor_faust_and_leaves_the_collector_on():
    code = (
        "import gc, sys, crosscurrent\n"
        "code = crosscurrent.main(['worker', '--set', 'worker.max_batch=0'])\n"
        "print([code, gc.isenabled(), sorted({'torch', 'numba', 'faust'} & set(sys.modules))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "[2, True, []]", done.stdout
    assert "worker.max_batch" in done.stderr


def test_a_worker_comes_to_its_group_without_torch():
    """It takes longer than all else that a worker imports: `streams.app` loads it while the group answers."""
    code = "import sys, streams.app; print(sorted({'torch', 'models.scorer', 'pyarrow', 'fsspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_usage_errors_are_one_line():
    assert_refused(run("wroker"), "wroker", "worker")
    assert_refused(run("worker", "--bootstrp", "x"), "--bootstrp")
    assert_refused(run("models"), "Missing command")
    assert_refused(run("replay", "somewhere"), "--platform")
    assert_refused(run("demo", "--seconds", "soon"), "seconds")


def test_unknown_settings_are_one_line():
    assert_refused(run("worker", "--set", "worker.max_bach=1"), "worker.max_batch")
    assert_refused(run("worker", CROSSCURRENT_WORKER__MAX_BACH="1"), "CROSSCURRENT_WORKER__MAX_BATCH")


@pytest.mark.parametrize("name", ["worker", "trainer"])
def test_unreachable_kafka_is_one_line(name):
    done = run(name, "--bootstrap", f"127.0.0.1:{free_port()}")
    assert_refused(done, "no Kafka broker answers", "crosscurrent broker", "--bootstrap")


def test_commands_that_only_read_say_so_too(capsys):
    bootstrap = f"127.0.0.1:{free_port()}"
    for args in (["dead-letters", "list"], ["dead-letters", "replay"], ["replay", ".", "--platform", "x.toml"]):
        assert main([*args, "--bootstrap", bootstrap]) == 2
        assert "no Kafka broker answers" in capsys.readouterr().err


@pytest.mark.broker
def test_broker_runs_until_it_is_told_to_stop():
    port = free_port()
    with subprocess.Popen(command("broker", "--port", str(port)), stdout=subprocess.PIPE, text=True) as process:
        assert f"broker at 127.0.0.1:{port}" in process.stdout.readline()
        assert asyncio.run(create_topics(KafkaConfig(bootstrap=f"127.0.0.1:{port}"), _topics("t-"))) != []
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.broker
def test_broker_that_dies_is_said():
    with subprocess.Popen(
        command("broker", "--port", str(free_port())), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert process.wait(10) == 1
        assert "the broker has exited" in process.stderr.read()


# ── without a broker ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out[0].isdigit()


def test_config_show(capsys):
    assert main(["config", "show", "--set", "pseudonym.key=geheim", "--bootstrap", "b:1"]) == 0
    out = capsys.readouterr().out
    assert 'bootstrap = "b:1"  # command line' in out and "geheim" not in out


def test_history_import(capsys, tmp_path):
    event = CanonicalEvent(event_id="1", platform="shop", user="k1" + "u" * 22, kind="view", ts=1_700_000_000_000)
    (tmp_path / "old.jsonl").write_bytes(msgspec.json.encode(event) + b"\n{}\n")
    assert main(["history", "import", "old.jsonl"]) == 0
    assert capsys.readouterr().out == "old.jsonl: 1 events, 1 refused\n"
    assert main(["history", "import", "old.jsonl"]) == 0
    assert capsys.readouterr().out == "old.jsonl: imported before, skipped\n"
    assert main(["history", "import", "none.jsonl"]) == 1
    assert capsys.readouterr().err.startswith("error: none.jsonl cannot be imported")


def test_models_list(capsys):
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out == "no version of 'student' in .crosscurrent/store\n"
    for at in (1_700_000_000_000, 1_700_000_060_000):
        publish({}, at)
    assert main(["models", "list"]) == 0
    header, newest, oldest = capsys.readouterr().out.splitlines()
    assert header.startswith("version\tkind\tcreated_at")
    assert newest.startswith("student/000002\t") and "2023-11-14 22:14:20" in newest
    assert oldest.startswith("student/000001\t")
    assert main(["models", "list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["version"] for row in rows] == ["student/000002", "student/000001"]


def publish(metrics: dict, at: int = 1_700_000_000_000) -> None:
    training_range = {"first_ts": 0, "last_ts": 1, "events": 1}
    artifact.publish(
        ".crosscurrent/store",
        "student",
        artifact.load_prior(),
        metrics=metrics,
        training_range=training_range,
        reference_histograms={},
        fold=FoldConfig(),
        now_ms=at,
    )


def verdict_of_a_toy() -> dict:
    n = 6000
    user, known = np.arange(n) % 200, np.repeat([[True, False, False]], n, axis=0)
    p = np.random.default_rng(0).random(n)
    y = (np.random.default_rng(1).random(n) < p).astype(np.uint8)
    paired = Paired(
        platforms=("shop", "till"),
        platform_N=(np.arange(n) >= n - 50).astype(np.int16),
        user_N=user,
        known_N3=known,
        y_N3=np.repeat(y[:, None], 3, axis=1),
        candidate_N3=np.repeat(p[:, None], 3, axis=1).astype(np.float32),
        incumbent_N3=np.full((n, 3), 0.5, np.float32),
        activity_N=np.arange(n) % 30 + 1,
        price_N=np.zeros(n, np.uint8),
        category_N=np.zeros(n, np.uint32),
        category_names={},
    )
    return decide(Evidence(paired, {}, (), 5.0), Limits(draws=40)).as_dict()


def test_models_show(capsys):
    assert main(["models", "show"]) == 2
    assert capsys.readouterr().err == "error: no version of 'student' in .crosscurrent/store\n"
    verdict = verdict_of_a_toy()
    publish({})
    line = {"slope": 0.93, "offset": -0.125, "events": 5950, "users": 200, "young": 7}
    publish({"gate": verdict, "recalibrated": {"shop": {"click": line}}}, 1_700_000_060_000)
    assert main(["models", "show"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(
        "on each logit:\nplatform\thead\tslope\toffset\tevents\tusers\tyoung\nshop\tclick\t0.93\t-0.125\t5950\t200\t7\n"
    )
    assert shown.startswith("student/000002: major, published 2023-11-14 22:14:20, follows 000001\n")
    assert "published: mean log-loss 0." in shown and "6000 events of 200 users" in shown
    for rule in verdict["rules"]:
        assert f"{rule['name']}\tpassed\t{rule['found']}\n" in shown
    cell = verdict["cells"][0]
    assert f"shop\tclick\t5950\t200\t{cell['positives']}\t0.6931 -> {cell['log_loss']['candidate']:.4f} (-0." in shown
    assert "till\tclick\t50\t50\t" in shown  # too few events for any figure
    assert f"{cell['ece']['value']:.4f} [{cell['ece']['low']:.4f}, {cell['ece']['high']:.4f}]" in shown
    assert "activity 16+\tclick\t" in shown and "activity 1-3" not in shown  # the latter has too few positives
    for name in ("2", "000002", "student/000002"):
        assert main(["models", "show", name]) == 0 and capsys.readouterr().out == shown
    assert main(["models", "show", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["version"] == "student/000002" and written["gate"] == verdict
    assert written["recalibrated"] == {"shop": {"click": line}}


def test_models_show_of_a_version_without_a_verdict_and_of_none(capsys):
    publish({"candidate": {}})
    assert main(["models", "show", "1"]) == 0
    assert capsys.readouterr().out.endswith("\nits manifest holds no verdict of the gate\n")
    assert main(["models", "show", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gate"] is None
    assert_refused(run("models", "show", "000007"), "'000007'", "the newest is student/000001")
    for wrong in ("teacher/000001", "x", "-1", "²"):
        assert main(["models", "show", "--", wrong]) == 2
        assert capsys.readouterr().err.startswith("error: no version ")


def test_models_show_makes_tables_on_a_terminal(capsys, monkeypatch):
    publish({"gate": verdict_of_a_toy()})
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["models", "show"]) == 0
    shown = capsys.readouterr().out
    assert "\t" not in shown and "predicted_over_actual" in shown and "activity 16+" in shown


def test_wrong_platform_file_is_a_config_error(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("crosscurrent._require_kafka", lambda settings: None)
    (tmp_path / "shop.toml").write_text("name = 1\n")
    assert main(["replay", ".", "--platform", "shop.toml"]) == 2
    assert "shop.toml" in capsys.readouterr().err


# ── with a broker ────────────────────────────────────────────────────────────────────────────────────────────────────


def _topics(prefix: str):
    from models.config import TopicsConfig

    names = ("events", "scores", "dead_letters", "models", "identities")
    return TopicsConfig(**{name: prefix + name for name in names}, partitions=2)


class Fetched(msgspec.Struct):
    """A fetched record, as `dead_letter` takes it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


async def send(kafka: KafkaConfig, topic: str, records: list[tuple]) -> None:
    producer = AIOKafkaProducer(enable_idempotence=False, max_request_size=4 << 20, **client_options(kafka))
    await producer.start()
    for partition, key, value, headers in records:
        await producer.send_and_wait(topic, value, key=key, partition=partition, headers=headers)
    await producer.stop()


async def receive(kafka: KafkaConfig, topic: str, n: int) -> list:
    consumer = AIOKafkaConsumer(topic, auto_offset_reset="earliest", **client_options(kafka))
    await consumer.start()
    records = [await asyncio.wait_for(consumer.getone(), 20) for _ in range(n)]
    await consumer.stop()
    return records


def letter(topic: str, offset: int, value: bytes | None, reason: str, at_ms: int, stage: str = "ingest") -> tuple:
    record = Fetched(topic, 1, offset, b"key", value)
    key, kept, *_, headers = dead_letters.dead_letter(record, stage, EventRefused(reason, "because"), at_ms)
    return offset % 2, key, kept, headers


@pytest.fixture
def refused(kafka, prefix) -> tuple[list[str], KafkaConfig, str]:
    """Dead letters of a topic of the platform: two reasons, one too large, one foreign record. → (options, …, topic)."""
    topics, source = _topics(prefix), prefix + "shop"
    asyncio.run(create_topics(kafka, topics, [(source, 2, {})]))
    letters = [
        letter(source, 0, b"\xff\x00 not utf-8", "not_utf8", 1_700_000_002_000),
        letter(source, 1, b"{}", "missing", 1_700_000_001_000),
        letter(source, 2, b"x" * ((1 << 20) + 1), "too_large", 1_700_000_003_000),
        letter(source, 3, None, "not_json", 1_700_000_004_000),
        (0, None, b"whatever", [("other", b"header")]),
    ]
    asyncio.run(send(kafka, topics.dead_letters, letters))
    options = ["--bootstrap", kafka.bootstrap, "--set", f"topics.dead_letters={topics.dead_letters}"]
    return [*options, "--set", f"kafka.idempotence={kafka.idempotence}"], kafka, source


@pytest.mark.broker
def test_dead_letters_are_listed_oldest_first(refused, capsys):
    options, _, source = refused
    assert main(["dead-letters", "list", *options]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "time\tsource\tstage\treason\tdetail"
    assert [line.split("\t")[3] for line in lines] == ["unreadable", "missing", "not_utf8", "too_large", "not_json"]
    assert lines[1] == f"2023-11-14 22:13:21\t{source}/1/1\tingest\tmissing\tbecause"
    assert main(["dead-letters", "list", "--json", "--limit", "1", *options]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "not_json"
    assert main(["dead-letters", "list", "--reason", "bad_time", *options]) == 0
    assert capsys.readouterr().out == "no dead letters\n"
    assert main(["dead-letters", "list", "--reason", "bad", *options]) == 2


@pytest.mark.broker
def test_dead_letters_are_sent_again_as_they_came(refused, capsys):
    options, kafka, source = refused
    assert main(["dead-letters", "replay", *options]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "3 sent again"
    assert second.startswith(f"not sent: {source}/1/2 is too large to be kept (1048577 bytes)")
    assert third == "not sent: 1 without the headers of a dead letter"
    records = asyncio.run(receive(kafka, source, 3))
    assert {record.value for record in records} == {b"\xff\x00 not utf-8", b"{}", None}
    assert all(record.key == b"key" for record in records)
    assert all(dict(record.headers)[dead_letters.REPLAYED_HEADER].count(b"/") == 2 for record in records)


@pytest.mark.broker
def test_replay_of_one_reason_and_of_a_kept_value_of_the_greatest_size(refused, capsys):
    options, kafka, source = refused
    topic = next(o for o in options if o.startswith("topics.dead_letters")).partition("=")[2]
    value = b"y" * (1_000_000)
    asyncio.run(send(kafka, topic, [letter(source, 9, value, "future", 1)]))
    assert main(["dead-letters", "replay", "--reason", "future", *options]) == 0
    assert capsys.readouterr().out == "1 sent again\n"
    assert [record.value for record in asyncio.run(receive(kafka, source, 1))] == [value]


@pytest.mark.broker
def test_dead_letters_of_a_topic_that_does_not_exist(kafka, prefix, capsys):
    options = ["--bootstrap", kafka.bootstrap, "--set", f"topics.dead_letters={prefix}none"]
    assert main(["dead-letters", "list", *options]) == 0
    assert capsys.readouterr().out == "no dead letters\n"


PLATFORM = """
name = "{topic}"
topics = ["{topic}"]
heads = ["click"]
[kind]
path = "kind"
[kind.names]
look = "view"
[time]
path = "at"
unit = "ms"
[fields]
user = "who"
event_id = "id"
[replay]
files = ["events.jsonl"]
"""


@pytest.fixture
def recorded(kafka, prefix, tmp_path) -> tuple[list[str], KafkaConfig, str]:
    """100 recorded events, one a minute. → (arguments of replay, Kafka, topic)."""
    topic = prefix + "shop"
    (tmp_path / "shop.toml").write_text(PLATFORM.format(topic=topic))
    lines = [
        json.dumps({"id": str(i), "kind": "look", "at": 1_600_000_000_000 + 60_000 * i, "who": f"u{i % 7}"})
        for i in range(100)
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    topics = _topics(prefix)
    options = [f"topics.{name}={value}" for name, value in topics.model_dump().items() if str(value).startswith(prefix)]
    options += [f"kafka.idempotence={kafka.idempotence}", "topics.partitions=2"]
    sets = [part for option in options for part in ("--set", option)]
    return [".", "--platform", "shop.toml", "--bootstrap", kafka.bootstrap, *sets], kafka, topic


@pytest.mark.broker
def test_replay_shifts_the_data_set_to_now(recorded, capsys):
    args, kafka, topic = recorded
    assert main(["replay", *args]) == 0
    assert capsys.readouterr().out.startswith("100 events backfilled, 0 sent live")
    records = asyncio.run(receive(kafka, topic, 100))
    events = {e["id"]: e for e in map(json.loads, (r.value for r in records))}
    assert len(events) == 100
    assert abs(events["99"]["at"] - time.time() * 1000) < 60_000
    assert events["99"]["at"] - events["0"]["at"] == 99 * 60_000
    by_key = {(r.key, r.partition) for r in records}
    assert len(by_key) == 7, "one partition a user"


@pytest.mark.broker
def test_replay_sends_the_live_share_at_its_rate(recorded, capsys):
    args, kafka, topic = recorded
    started = time.monotonic()
    assert main(["replay", *args, "--rate", "20", "--live-share", "0.2", "--limit", "96"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("76 events backfilled, 20 sent live") or out.startswith("77 events backfilled, 19 sent live")
    assert time.monotonic() - started > 18 / 20
    assert len(asyncio.run(receive(kafka, topic, 96))) == 96
