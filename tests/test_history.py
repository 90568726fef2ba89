"""The trainer's history: nothing lost, nothing twice, whatever is cut off; and columns equal to the plain form."""

import asyncio
import json

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiokafka import AIOKafkaProducer

from models.config import KafkaConfig
from models.errors import HistoryError
from models.events import CanonicalEvent, to_columns
from streams.kafka import create_topics
from trainer import history
from trainer.history import HistoryStore, import_events, pull


def make_events(n: int, seed: int = 0, start: int = 0) -> list[CanonicalEvent]:
    rng = np.random.default_rng(seed)
    kinds = ("view", "click", "cart", "purchase", "cancel")
    return [
        CanonicalEvent(
            event_id=f"e{start + i}",
            platform=("shop", "tienda")[int(rng.integers(2))],
            user=f"k1user{int(rng.integers(9)):018d}",
            kind=kinds[int(rng.integers(5))],
            ts=1_700_000_000_000 + 1000 * (start + i),
            item=f"item-{int(rng.integers(50))}" if rng.random() < 0.9 else None,
            category=f"Café {int(rng.integers(7))}" if rng.random() < 0.8 else None,
            price=float(rng.lognormal()) if rng.random() < 0.7 else None,
            quantity=float(rng.integers(1, 4)) if rng.random() < 0.3 else None,
            text="words" if rng.random() < 0.2 else None,
        )
        for i in range(n)
    ]


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path) -> HistoryStore:
    return HistoryStore(str(tmp_path / "h") if request.param == "file" else f"memory://{tmp_path.name}/h")


def append(store: HistoryStore, partition: int, events: list[CanonicalEvent], first: int) -> None:
    last = first + len(events) - 1
    store.append(partition, first, last, range(first, last + 1), events)


def test_columns_equal_the_plain_form_and_names_survive(store):
    a, b = make_events(300, 1), make_events(200, 2, 1000)
    append(store, 3, a[:100], 50)
    append(store, 3, a[100:], 150)
    append(store, 0, b, 0)
    read = store.read()
    np.testing.assert_array_equal(read.events[:200], to_columns(b, np.arange(200)))
    np.testing.assert_array_equal(read.events[200:], to_columns(a, np.arange(50, 350)))
    assert [read.users[u] for u in read.user] == [e.user for e in b + a]
    assert [read.platforms[p] for p in read.platform] == [e.platform for e in b + a]
    assert read.platforms == ("shop", "tienda")
    names = [read.categories.get(int(h)) for h in read.events["category"]]
    assert names == [e.category for e in b + a]
    assert (read.partition == np.repeat([0, 3], [200, 300])).all()


def test_an_empty_history_reads_as_nothing(store):
    assert len(store.read()) == 0 and store.partitions() == [] and store.next_offset(0) == 0


def test_overlapping_files_give_every_offset_once(store):
    events = make_events(100)
    append(store, 0, events[:60], 0)
    append(store, 0, events[40:], 40)
    append(store, 0, events[10:20], 10)  # lies within another
    assert store.next_offset(0) == 100
    read = store.read()
    np.testing.assert_array_equal(read.offset, np.arange(100))
    np.testing.assert_array_equal(read.events, to_columns(events, np.arange(100)))


def test_refused_offsets_are_covered_although_they_have_no_row(store):
    store.append(0, 0, 9, [0, 4], make_events(2))
    assert store.next_offset(0) == 10
    assert store.read().offset.tolist() == [0, 4]
    store.append(0, 10, 12, [], [])
    assert store.next_offset(0) == 13 and store.last_event(0) == (4, "e1")


def test_a_crash_while_writing_leaves_no_file_that_counts(tmp_path, monkeypatch):
    store = HistoryStore(str(tmp_path))
    append(store, 0, make_events(10), 0)

    def crash(*_):
        raise OSError("power")

    monkeypatch.setattr(history.os, "replace", crash)
    with pytest.raises(OSError, match="power"):
        append(store, 0, make_events(10, start=10), 10)
    assert len(list((tmp_path / "kafka/00000").iterdir())) == 2  # the good one and the temporary one
    assert store.next_offset(0) == 10 and len(store.read()) == 10


def test_an_unreadable_file_is_a_hole_that_is_fetched_again(tmp_path):
    store = HistoryStore(str(tmp_path))
    events = make_events(30)
    for first in (0, 10, 20):
        append(store, 0, events[first : first + 10], first)
    broken = sorted((tmp_path / "kafka/00000").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:100])
    store = HistoryStore(str(tmp_path))
    assert len(store.read()) == 20 and store.next_offset(0) == 10
    append(store, 0, events[10:], 10)  # what a pull then writes
    store.set_aside_unreadable(0)
    assert store.next_offset(0) == 30
    np.testing.assert_array_equal(store.read().offset, np.arange(30))
    assert [p.name for p in (tmp_path / "kafka/00000").glob("*.unreadable")] == [f"{broken.name}.unreadable"]


def test_compaction_changes_no_row_and_survives_a_crash_before_clean_up(store):
    events = make_events(400)
    for first in range(0, 400, 20):
        append(store, 0, events[first : first + 20], first)
    before = store.read()
    remove, store.fs.rm_file = store.fs.rm_file, lambda path: None  # the crash: nothing was removed
    assert store.compact(0)
    np.testing.assert_array_equal(store.read().events, before.events)
    store.fs.rm_file = remove
    assert store.compact(0)  # the next round finishes the work
    assert len(store.segments(0)[0]) == 1
    np.testing.assert_array_equal(store.read().events, before.events)
    assert not store.compact(0)


def test_import_comes_first_in_time_order_and_only_once(store, tmp_path):
    old = make_events(50, 3)
    shuffled = [old[i] for i in np.random.default_rng(0).permutation(50)]
    lines = tmp_path / "old.jsonl"
    lines.write_bytes(b"\n".join([*map(msgspec.json.encode, shuffled), b'{"no": "event"}', b"\xff\xfe"]))
    append(store, 0, make_events(20, 4, 1000), 0)
    (done,) = import_events(store, [str(lines)])
    assert (done.k, done.events, done.refused) == (1, 50, 2)
    (again,) = import_events(store, [str(lines)])
    assert again.k == 0 and again.events == 0
    read = store.read()
    np.testing.assert_array_equal(read.events[:50], to_columns(old, np.arange(50)))
    np.testing.assert_array_equal(read.events[50:], to_columns(make_events(20, 4, 1000), np.arange(50, 70)))
    assert read.partition[:50].tolist() == [-1] * 50 and read.offset[50:].tolist() == list(range(20))


def test_import_of_parquet_with_nan_for_none_and_impossible_numbers(store, tmp_path):
    rows = [json.loads(msgspec.json.encode(e)) for e in make_events(5)]
    for row in rows:
        row["price"] = float("nan")
    rows[1]["price"], rows[2]["user"] = float("inf"), "short"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (done,) = import_events(store, [str(tmp_path / "a.parquet")])
    assert (done.events, done.refused) == (3, 2)
    assert (store.read().events["price"] == 0).all()


def test_import_of_something_else_says_so(store, tmp_path):
    with pytest.raises(HistoryError, match="missing"):
        import_events(store, [str(tmp_path / "missing.jsonl")])
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(HistoryError, match="x"):
        import_events(store, [str(tmp_path / "x.parquet")])
    assert store.imports() == []


async def test_a_broker_that_is_not_there_is_said(tmp_path):
    with pytest.raises(HistoryError, match="cannot be reached"):
        await pull(HistoryStore(str(tmp_path)), KafkaConfig(bootstrap="127.0.0.1:1", request_timeout_s=2), "events")


# ── from Kafka ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def produce(kafka: KafkaConfig, topic: str, partition: int, values: list[bytes]) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, acks="all")
    await producer.start()
    try:
        # Batches of several records: a broker that reports a batch's base offset as the end is found out by them.
        for start in range(0, len(values), 7):
            batch = producer.create_batch()
            for value in values[start : start + 7]:
                batch.append(key=b"k", value=value, timestamp=None)
            await (await producer.send_batch(batch, topic, partition=partition))
    finally:
        await producer.stop()


@pytest.fixture
async def topic(kafka, topics) -> str:
    await create_topics(kafka, topics)
    return topics.events


@pytest.mark.broker
async def test_pull_takes_everything_once_and_counts_what_is_no_event(kafka, topic, tmp_path):
    store = HistoryStore(str(tmp_path))
    a, b = make_events(40, 1), make_events(25, 2, 1000)
    await produce(kafka, topic, 1, [msgspec.json.encode(e) for e in a[:30]])
    await produce(kafka, topic, 3, [*(msgspec.json.encode(e) for e in b), b"no event", b'{"ts": "\xff"}'])
    assert await pull(store, kafka, topic) == (55, 2)
    assert await pull(store, kafka, topic) == (0, 0)
    assert [store.next_offset(p) for p in range(4)] == [0, 30, 0, 27]
    await produce(kafka, topic, 1, [msgspec.json.encode(e) for e in a[30:]])
    assert await pull(HistoryStore(str(tmp_path)), kafka, topic) == (10, 0)
    read = store.read()
    np.testing.assert_array_equal(read.events[:40], to_columns(a, np.arange(40)))
    np.testing.assert_array_equal(read.events[40:], to_columns(b, np.arange(25)))


@pytest.mark.broker
async def test_a_pull_that_is_cut_off_loses_and_repeats_nothing(kafka, topic, tmp_path, monkeypatch):
    store = HistoryStore(str(tmp_path))
    events = make_events(200)
    await produce(kafka, topic, 0, [msgspec.json.encode(e) for e in events])
    monkeypatch.setattr(history, "ROWS_PER_FILE", 30)
    append_file, written = store.append, []

    def crash_at_third(*args):
        if len(written) == 2:
            raise OSError("power")
        written.append(args)
        append_file(*args)

    monkeypatch.setattr(store, "append", crash_at_third)
    with pytest.raises(OSError, match="power"):
        await pull(store, kafka, topic)
    assert store.next_offset(0) == 60
    store = HistoryStore(str(tmp_path))
    assert await pull(store, kafka, topic) == (140, 0)
    np.testing.assert_array_equal(store.read().events, to_columns(events, np.arange(200)))


@pytest.mark.broker
async def test_a_topic_that_was_created_anew_is_refused(kafka, topic, tmp_path):
    events = make_events(30)
    await produce(kafka, topic, 0, [msgspec.json.encode(e) for e in events[:20]])
    longer = HistoryStore(str(tmp_path / "longer"))
    append(longer, 0, events, 0)
    with pytest.raises(HistoryError, match="created anew"):
        await pull(longer, kafka, topic)
    other = HistoryStore(str(tmp_path / "other"))
    append(other, 0, make_events(10, start=500), 0)
    with pytest.raises(HistoryError, match="created anew"):
        await pull(other, kafka, topic)
    same = HistoryStore(str(tmp_path / "same"))
    append(same, 0, events[:10], 0)
    assert await pull(same, kafka, topic) == (10, 0)


@pytest.mark.broker
async def test_a_topic_that_does_not_exist_is_not_created(kafka, topic, tmp_path):
    assert await pull(HistoryStore(str(tmp_path)), kafka, f"{topic}-absent") == (0, 0)
    async with history.open_consumer(kafka, f"{topic}-absent") as (_, partitions):
        assert partitions == []


@pytest.mark.broker
async def test_a_pull_stops_when_it_is_told_and_goes_on_later(kafka, topic, tmp_path):
    events = make_events(50)
    await produce(kafka, topic, 2, [msgspec.json.encode(e) for e in events])
    store, stop = HistoryStore(str(tmp_path)), asyncio.Event()
    stop.set()
    first = await pull(store, kafka, topic, stop=stop)
    second = await pull(store, kafka, topic)
    assert first.events + second.events == 50
    np.testing.assert_array_equal(store.read().events, to_columns(events, np.arange(50)))
