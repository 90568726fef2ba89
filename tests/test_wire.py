"""Record batches as columns: what we write, aiokafka reads, and what we read is what aiokafka reads, on any bytes."""

import asyncio
import gc
import os
import platform
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from random import Random

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.errors import CorruptRecordException, KafkaError, MessageSizeTooLargeError, UnsupportedCodecError
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c
from aiokafka.structs import ConsumerRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import KafkaConfig, TopicsConfig
from streams import wire
from streams.commit import Sender
from streams.kafka import client_options, create_topics
from streams.transport import _PartitionColumns, fetch_columns
from streams.wire import Records, Spans, build, crc32c, parse

CODECS = {"none": 0} | {name: n for n, (name, available, *_) in wire._CODECS.items() if available()}
"""Those with a library here: all five where cramjam is installed."""
LOG_APPEND_TIME, CONTROL = 0x08, 0x20
NOW_MS = 1_700_000_000_000
TP = TopicPartition("t", 3)

nullable = st.none() | st.binary(max_size=300)


def some_bytes(random: Random) -> bytes | None:
    return None if random.random() < 0.2 else random.randbytes(random.choice((0, 1, 20, 63, 64, 300)))


def some_rows(random: Random) -> list[tuple[int, int, bytes | None, bytes | None, list]]:
    """Offsets with holes, times, keys, values and headers of up to 8 records."""
    rows, offset = [], -1
    for _ in range(random.randint(0, 8)):
        offset += random.choice((1, 1, 1, 2, 200))
        header = [(random.choice(("", "name", "ä")), some_bytes(random)) for _ in range(random.choice((0, 0, 1, 3)))]
        rows.append((offset, random.randint(-1, 2**41), some_bytes(random), some_bytes(random), header))
    return rows


def as_the_broker_has_it(rows: list, codec: int, base: int, attributes: int, removed: int) -> tuple[bytes, int]:
    """→ a batch, `removed` records of whose end were compacted away, and the offset after it. None is compressed empty."""
    builder = DefaultRecordBatchBuilder(2, codec if rows else 0, 0, -1, -1, 0, 1 << 30)
    for row in rows:
        builder.append(*row)
    batch = builder.build()
    last = rows[-1][0] + removed if rows else 0
    struct.pack_into(">q", batch, 0, base)
    struct.pack_into(">hi", batch, 21, struct.unpack_from(">h", batch, 21)[0] | attributes, last)
    struct.pack_into(">I", batch, 17, calc_crc32c(batch[21:]))
    return bytes(batch), base + last + 1


@st.composite
def fetches(draw) -> tuple[bytes, int]:
    """Bytes of a fetch and the offset that they were fetched from, which is one of the first batch: any codec, holes,
    control batches, a cut-off end.

    The rows come from a seed: drawn one by one they take a hundred times as long."""
    random = Random(draw(st.integers(0, 2**32)))
    first = due = fetch_offset = draw(st.sampled_from((0, 5, 2**40)))
    data = b""
    for codec in draw(st.lists(st.sampled_from(list(CODECS.values())), min_size=1, max_size=4)):
        attributes = random.choice((0, 0, 0, LOG_APPEND_TIME, CONTROL))
        batch, due = as_the_broker_has_it(some_rows(random), codec, due, attributes, random.choice((0, 0, 2)))
        fetch_offset = fetch_offset if data else random.choice((first, random.randrange(first, due)))
        data += batch
        due += random.choice((0, 0, 7))
    cut = random.choice((0, 0, random.randint(0, len(data))))
    return data[: len(data) - cut], fetch_offset


def as_aiokafka_reads(data: bytes, fetch_offset: int, check_crcs: bool = True) -> tuple[list[ConsumerRecord], int]:
    plain = PartitionRecords(TP, MemoryRecords(data), None, fetch_offset, None, None, check_crcs, 0)
    records = list(plain)
    return records, plain.next_fetch_offset


@settings(max_examples=300, deadline=None)
@given(fetches())
def test_reads_what_aiokafka_reads(fetched):
    data, fetch_offset = fetched
    expected, due = as_aiokafka_reads(data, fetch_offset)
    records, next_offset = parse(data, *TP, fetch_offset)
    assert list(records) == expected
    assert [records[i] for i in range(-len(records), 0)] == expected
    assert len(records) == len(expected)
    assert next_offset == due
    assert records.keys.tolist() == [record.key for record in expected]
    assert records.values.tolist() == [record.value for record in expected]


def test_what_lies_before_the_fetch_offset_is_left_out():
    """Also a whole batch of it, which no broker sends: nothing is taken twice."""
    data = some_batch()
    assert parse(data, *TP, 3)[0].offset.tolist() == [3, 4]
    records, next_offset = parse(data, *TP, 8)
    assert (len(records), next_offset) == (0, 8)


@settings(max_examples=100, deadline=None)
@given(fetches(), st.slices(12))
def test_columns_of_records_are_those_records_and_a_slice_is_records(fetched, part):
    expected, _ = as_aiokafka_reads(*fetched)
    if not expected:
        return
    records = Records.of(expected)
    assert list(records) == expected
    assert list(records[part]) == expected[part]
    assert isinstance(records[part], Records) and records[part].values.buffer is records.values.buffer
    assert list(Records.of(records)) == expected


outgoing = st.lists(st.tuples(nullable, nullable, st.integers(0, 2**42)), min_size=1, max_size=15)


@settings(max_examples=200, deadline=None)
@given(outgoing, st.integers(61, 2000), st.booleans())
def test_writes_byte_for_byte_what_aiokafka_writes(rows, most_bytes, idempotent):
    limit = most_bytes + 1  # aiokafka's is one that is not reached
    builders = [BatchBuilder(limit, 0)]
    for key, value, time_ms in rows:
        if builders[-1].append(timestamp=time_ms, key=key, value=value) is None:
            builders.append(BatchBuilder(limit, 0))
            builders[-1].append(timestamp=time_ms, key=key, value=value)
    ours = build(*columns(rows), most_bytes)
    assert [batch.record_count() for batch in ours] == [builder.record_count() for builder in builders]
    for batch, builder in zip(ours, builders, strict=True):
        if idempotent:
            batch._set_producer_state(4711, 3, 12)
            builder._set_producer_state(4711, 3, 12)
        assert batch._build() == builder._build()
        assert batch.size() == len(batch._build())
        assert batch.size() <= most_bytes or batch.record_count() == 1


@settings(max_examples=100, deadline=None)
@given(outgoing, st.sampled_from(list(CODECS.values())), st.integers(100, 3000))
def test_what_is_written_is_read_again(rows, codec, most_bytes):
    got = []
    for batch in build(*columns(rows), most_bytes, codec):
        data = bytes(batch._build())
        assert batch._build() == data
        records, next_offset = parse(data, *TP, 0)
        assert next_offset == batch.record_count() == len(records)
        assert list(records) == as_aiokafka_reads(data, 0)[0]
        got += [(record.key, record.value, record.timestamp) for record in records]
    assert got == rows


def columns(rows) -> tuple[Spans, Spans, np.ndarray]:
    keys, values, times = zip(*rows, strict=True)
    return Spans.of(keys), Spans.of(values), np.array(times, np.int64)


@given(st.lists(nullable))
def test_spans_are_their_strings(items):
    spans = Spans.of(items)
    assert spans.tolist() == items
    assert [spans.get(i) for i in range(spans.n)] == items
    rows = np.arange(len(items))[::-2]
    assert spans.take(rows).tolist() == items[::-2]


@given(st.binary(max_size=100))
def test_checksum_is_aiokafkas(data):
    assert crc32c(np.frombuffer(data, np.uint8)) == calc_crc32c(data)


def test_a_processor_without_the_instruction_has_aiokafkas_checksum(monkeypatch):
    monkeypatch.setattr(wire, "_BY_PROCESSOR", False)
    data = some_batch()
    assert crc32c(np.frombuffer(data, np.uint8)) == calc_crc32c(data)
    assert len(parse(data, *TP, 0)[0]) == 5


def test_the_processors_checksum_is_used_where_it_can_be():
    features = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert ("sse4_2" in features) == wire._BY_PROCESSOR


def test_one_time_for_all_and_no_records():
    keys = Spans.of([b"a", b"b"])
    (batch,) = build(keys, keys, NOW_MS, 1000)
    assert parse(bytes(batch._build()), *TP, 0)[0].timestamp.tolist() == [NOW_MS, NOW_MS]
    assert build(Spans.of([]), Spans.of([]), NOW_MS, 1000) == []


def test_what_may_be_written_to_is_sent_by_the_same_kernels():
    """A kind of column that `warm` knows not would be compiled in front of a worker's first scores."""
    kept = Spans.of([b"key", b"other"])
    scratch = Spans(kept.buffer.copy(), kept.at, kept.length)
    assert scratch.buffer.flags.writeable and not kept.buffer.flags.writeable
    wire.warm()
    known = [kernel.signatures for kernel in (wire._plan, wire._write)]
    built = [bytes(build(k, v, NOW_MS, 1000)[0]._build()) for k in (kept, scratch) for v in (kept, scratch)]
    assert len(set(built)) == 1
    assert [kernel.signatures for kernel in (wire._plan, wire._write)] == known


def test_columns_that_do_not_fit_are_refused():
    keys = Spans.of([b"abc", b"d"])
    with pytest.raises(ValueError, match="2 keys, 1 values"):
        build(keys, keys.take(slice(1)), NOW_MS, 1000)
    for at, length in ((3, 2), (-1, 1), (0, 5), (0, -2), (2**62, 1), (1, 2**31 - 1)):
        wrong = Spans(keys.buffer, np.array([0, at]), np.array([3, length], np.int32))
        with pytest.raises(ValueError, match="record 1 does not lie in its buffer"):
            build(wrong, keys, NOW_MS, 1000)
        with pytest.raises(ValueError, match="record 1 does not lie in its buffer"):
            build(keys, wrong, NOW_MS, 1000)


def some_batch(codec: int = 0) -> bytes:
    builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, 0, 1 << 30)
    for i in range(5):
        builder.append(i, NOW_MS, b"key %d" % i, b"value " * 20, [("h", b"x"), ("n", None)] if i % 2 else [])
    return bytes(builder.build())


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_flipped_bit_is_found_by_the_checksum(codec):
    data = some_batch(codec)
    for at in range(21, len(data)):
        broken = bytearray(data)
        broken[at] ^= 1
        with pytest.raises(CorruptRecordException, match=r"t\[3\]: the checksum"):
            parse(bytes(broken), *TP, 0)


HOSTILE = """
import sys
import weakref
import numpy as np
sys.path.insert(0, {tests!r})
from aiokafka.errors import KafkaError
from test_wire import CODECS, some_batch
from streams.wire import parse

random = np.random.default_rng(7)
whole = refused = 0
for codec in CODECS.values():
    valid = some_batch(codec) * 2
    for i in range(3000):
        data = bytearray(valid)
        for at in random.integers(0, len(data), random.integers(1, 4)):
            data[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.integers(256)])
        data = bytes(data[: random.integers(len(data) + 1)]) if i % 3 == 0 else bytes(data)
        try:
            parsed = parse(data, "t", 0, 0, check_crcs=False)
        except KafkaError:
            refused += 1
            continue
        whole += 1
        if parsed is not None:
            records, _ = parsed
            assert np.all(np.diff(records.offset) > 0)
            for spans in (records.keys, records.values):
                held = spans.length >= 0
                assert np.all(spans.at[held] >= 0)
                assert np.all(spans.at[held] + spans.length[held] <= len(spans.buffer))
            list(records)
print(whole > 1000 and refused > 1000)
"""


def test_hostile_bytes_are_refused_or_read_and_never_read_beyond_their_end(tmp_path):
    """With Numba's own check of bounds, which the worker does not have."""
    env = {
        **os.environ,
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(wire.__file__).parent.parent),
    }
    code = HOSTILE.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=280)
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr[-3000:]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_noise_is_refused_or_nothing(noise, check_crcs):
    try:
        parsed = parse(noise, *TP, 0, check_crcs=check_crcs)
    except KafkaError:
        return
    assert parsed is None or len(parsed[0]) == 0


@pytest.mark.parametrize(
    ("at", "put", "why"),
    [
        (8, struct.pack(">i", 3), "shorter than its own header"),
        (8, struct.pack(">i", -1), "shorter than its own header"),
        (8, struct.pack(">i", 20), "shorter than its own header"),
        (16, b"\x03", "format is newer"),
        (57, struct.pack(">i", 2_000_000_000), "more records than fit"),
        (57, struct.pack(">i", -1), "more records than fit"),
        (57, struct.pack(">i", 4), "bytes are left over"),
        (61, b"\xff", "points beyond the record"),
    ],
)
def test_a_corrupt_batch_says_what_is_wrong(at, put, why):
    data = bytearray(some_batch())
    data[at : at + len(put)] = put
    with pytest.raises(CorruptRecordException, match=rf"t\[3\].*{why}.*broker"):
        parse(bytes(data), *TP, 0, check_crcs=False)


def test_an_unknown_codec_and_a_broken_stream_say_so():
    data = bytearray(some_batch(CODECS["gzip"]))
    data[61] ^= 0xFF
    with pytest.raises(CorruptRecordException, match=r"t\[3\].*does not decompress \(gzip\)"):
        parse(bytes(data), *TP, 0, check_crcs=False)
    data[22] = 7
    with pytest.raises(KafkaError, match="compression 7"):
        parse(bytes(data), *TP, 0, check_crcs=False)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_codec_without_its_library_says_what_to_install(number, monkeypatch):
    name, _, encode, decode = wire._CODECS[number]
    monkeypatch.setitem(wire._CODECS, number, (name, lambda: False, encode, decode))
    data = bytearray(some_batch())
    data[22] = number
    with pytest.raises(UnsupportedCodecError, match=rf"t\[3\].*pip install aiokafka\[{name}\]"):
        parse(bytes(data), *TP, 0, check_crcs=False)


FAULTS = """
import resource, sys
from streams.app import keep_memory
kept = keep_memory()
first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(50):
    blocks = [b"x" * (4 << 20) for _ in range(4)]
    del blocks
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is told to by glibc's own call")
def test_memory_of_fetches_and_sends_is_kept_not_faulted_in_again():
    env = {**os.environ, "PYTHONPATH": str(Path(wire.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=env, timeout=120)
    kept, faults = done.stdout.split()
    assert kept == "True", done.stderr
    assert int(faults) < 10_000  # the first touch of 4,096 pages; without it some of them again and again, 36,000 in all


def through_the_fetcher(data: bytes, fetch_offset: int, isolation_level: int = 0) -> tuple[list[Records], int]:
    aborted = [(9, 0)] if isolation_level else None
    plain = PartitionRecords(TP, MemoryRecords(data), aborted, fetch_offset, None, None, True, isolation_level)
    unpacked = _PartitionColumns(plain, data)
    return list(unpacked), unpacked.next_fetch_offset


@pytest.mark.parametrize("taken", [True, False])
def test_a_fetch_is_gone_without_the_collector(taken):
    """Read, or thrown away by a rebalance: 5 MiB each, many a second."""
    data = bytes(some_batch())
    plain = PartitionRecords(TP, MemoryRecords(data), None, 0, None, None, True, 0)
    fetched, refs = weakref.ref(plain), sys.getrefcount(data)
    gc.disable()
    try:
        unpacked = _PartitionColumns(plain, data)
        del plain
        assert not taken or len(next(unpacked)) == 5
        del unpacked
        assert fetched() is None
        assert sys.getrefcount(data) == refs - 1
    finally:
        gc.enable()


@pytest.mark.parametrize("magic", [0, 1])
def test_older_formats_are_read_by_aiokafka(magic):
    builder = LegacyRecordBatchBuilder(magic, 0, 1 << 20)
    for i in range(4):
        builder.append(i, NOW_MS + i, b"k%d" % i, None if i == 2 else b"v")
    data = bytes(builder.build())
    assert parse(data, *TP, 0) is None
    (records,), next_offset = through_the_fetcher(data, 1)
    assert next_offset == 4
    assert [(r.offset, r.key, r.value) for r in records] == [(1, b"k1", b"v"), (2, b"k2", None), (3, b"k3", b"v")]
    assert records.timestamp.tolist() == ([-1] * 3 if magic == 0 else [NOW_MS + 1, NOW_MS + 2, NOW_MS + 3])


def test_aborted_transactions_are_left_out_where_the_consumer_reads_what_is_committed():
    builder = DefaultRecordBatchBuilder(2, 0, 1, 9, 0, 0, 1 << 20)  # producer 9, whose transaction was aborted
    builder.append(0, NOW_MS, b"k", b"aborted", [])
    aborted, plain = bytes(builder.build()), bytearray(some_batch())
    struct.pack_into(">q", plain, 0, 1)
    data = aborted + bytes(plain)
    assert [len(records) for records in through_the_fetcher(data, 0)[0]] == [6]
    (records,), next_offset = through_the_fetcher(data, 0, isolation_level=1)
    assert (records.offset.tolist(), next_offset) == ([1, 2, 3, 4, 5], 6)


def test_a_fetch_of_nothing_but_control_batches_moves_on():
    data = bytearray(some_batch())
    data[22] |= CONTROL
    struct.pack_into(">I", data, 17, calc_crc32c(data[21:]))
    assert through_the_fetcher(bytes(data), 0) == ([], 5)


@pytest.mark.broker
@pytest.mark.parametrize("codec", CODECS)
async def test_columns_there_and_back(kafka: KafkaConfig, topics: TopicsConfig, codec: str):
    """Columns and records by turns through one sender: all arrive, in order, once, and the last offset is known."""
    await create_topics(kafka, topics)
    options = client_options(kafka)
    producer = AIOKafkaProducer(
        acks="all",
        enable_idempotence=kafka.idempotence,
        max_batch_size=20_000,
        compression_type=None if codec == "none" else codec,
        **options,
    )
    await producer.start()
    consumer = AIOKafkaConsumer(auto_offset_reset="earliest", **options)
    await consumer.start()
    fetch_columns(consumer)
    consumer.assign([TopicPartition(topics.scores, 1)])
    try:
        sender = Sender(lambda: producer, None, asyncio.get_running_loop())
        sent, tasks = [], []
        for i in range(40):
            rows = [(b"key %d" % i, (b"value %d.%d " % (i, j)) * 8, NOW_MS + i) for j in range(50 * (i % 5))]
            sent += rows
            if i % 3 and rows:
                tasks.append(sender.send(topics.scores, 1, [(*row, []) for row in rows]))
            else:
                keys, values = (Spans.of([row[c] for row in rows]) for c in (0, 1))
                tasks.append(sender.send_columns(topics.scores, 1, keys, values, NOW_MS + i))
        last = [await task for task in tasks]
        assert max(last) == len(sent) - 1 and last[0] == -1
        got: list[Records] = []
        while sum(map(len, got)) < len(sent):
            for records in (await consumer.getmany(timeout_ms=10_000)).values():
                got += records
        assert [(r.key, r.value, r.timestamp) for records in got for r in records] == sent
        assert np.concatenate([records.offset for records in got]).tolist() == list(range(len(sent)))
        consumer.seek(TopicPartition(topics.scores, 1), 777)
        (((again, *_),),) = ((await consumer.getmany(timeout_ms=10_000)).values(),)
        assert (again.offset[0], again[0].value) == (777, sent[777][1])
    finally:
        await consumer.stop()
        await producer.stop()


@pytest.mark.broker
async def test_a_record_that_the_broker_does_not_take_fails_its_send_alone(broker, kafka: KafkaConfig, topics: TopicsConfig):
    """As with `send`: it goes alone in a batch, so that the others do not fail with it."""
    await create_topics(kafka, topics)
    producer = AIOKafkaProducer(
        acks="all", max_batch_size=20_000, enable_idempotence=kafka.idempotence, **client_options(kafka)
    )
    await producer.start()
    try:
        sender = Sender(lambda: producer, None, asyncio.get_running_loop())
        large = Spans.of([b"x" * (3 << 20)])
        outcomes = []
        for send in (
            sender.send(topics.scores, 0, [(b"k", b"x" * (3 << 20), NOW_MS, [])]),
            sender.send_columns(topics.scores, 0, Spans.of([b"k"]), large, NOW_MS),
        ):
            outcomes.append((await asyncio.gather(send, return_exceptions=True))[0])
        assert type(outcomes[0]) is type(outcomes[1])
        if broker.name == "kafka":  # the embedded broker takes records of any size
            assert type(outcomes[1]) is MessageSizeTooLargeError
        assert await sender.send_columns(topics.scores, 0, Spans.of([b"k"]), Spans.of([b"v"]), NOW_MS) >= 0
    finally:
        await producer.stop()
