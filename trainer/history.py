"""The trainer's own copy of `events`: Parquet files on an fsspec path, filled from Kafka, read back as columns.

    <history>/kafka/00003/00000000000000000000-00000000000000012345.parquet    partition 3, offsets 0 … 12345
    <history>/imported/000001-5f2c….parquet                                    the first `import_events`

A file is written whole or not at all (a temporary name, then a rename; object stores put whole objects anyway), and
its name says which offsets it covers, refused records included. So the history itself is the consumer's position: a
crash loses at most what was not yet in a file, and that is fetched again. Where ranges overlap (a crash between
compaction and clean-up, two trainers at once) the earlier-starting, longer file wins and the other gives only what lies
beyond it.

Order for the fold: imports first, in the order they were made, then Kafka's partitions; by offset within each. A user
has one partition, so this is offset order within a user. `History.events["offset"]` is the offset for the fold: the
real one where nothing was imported, else the row number within the imports, and the real one plus the number of
imported rows for Kafka's events: always ascending within a user.

Knows nothing of labels, features or models, and nothing of `streams`; it never reads raw user ids.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import math
import os
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.helpers import create_ssl_context

from models.config import KafkaConfig
from models.errors import HistoryError
from models.events import EVENT, KIND_CODE, CanonicalEvent, event_hashes, hash32, hash64, platform_code, price_bucket

log = structlog.get_logger("crosscurrent.trainer")

EVENT_COLUMNS: tuple[str, ...] = tuple(f.name for f in msgspec.structs.fields(CanonicalEvent))
SCHEMA = pa.schema(
    [("partition", pa.int32()), ("offset", pa.int64())]
    + [
        (name, {"ts": pa.int64(), "price": pa.float64(), "quantity": pa.float64()}.get(name, pa.string()))
        for name in EVENT_COLUMNS
    ]
)
READ_COLUMNS = ("partition", "offset", "event_id", "platform", "user", "kind", "ts", "item", "category")
READ_COLUMNS += ("price", "quantity")
DICTIONARY_COLUMNS = ["platform", "user", "kind", "item", "category"]

ROWS_PER_FILE = 100_000
COMPACT_FILES, COMPACT_ROWS = 16, 1_000_000
"""More than this many files of a partition that together stay under so many rows become one."""

_KAFKA_FILE = re.compile(r"(\d{20})-(\d{20})\.parquet$")
_IMPORT_FILE = re.compile(r"(\d{6})-([0-9a-f]{16})\.parquet$")

_decode_event = msgspec.json.Decoder(CanonicalEvent).decode
_NOT_CANONICAL = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Segment(NamedTuple):
    """A file of one partition: offsets `first` … `last`, both included."""

    path: str
    first: int
    last: int
    rows: int


class Pulled(NamedTuple):
    """What one pull brought: events written, records that were no canonical event."""

    events: int
    refused: int


@dataclass
class History:
    """The history as columns, in the order of the fold. n events, U users."""

    events: np.ndarray
    """(n,) of models.events.EVENT; its `offset` is the fold's (see the module)."""
    user: np.ndarray
    """(n,) int32, index into `users`."""
    platform: np.ndarray
    """(n,) int16, index into `platforms`."""
    partition: np.ndarray
    """(n,) int32: Kafka's partition, or −k for the k-th import."""
    offset: np.ndarray
    """(n,) int64: Kafka's offset, or the row's number in its import."""
    users: list[str]
    platforms: tuple[str, ...]
    categories: dict[int, str] = field(default_factory=dict)
    """hash32 → name of every category seen."""

    def __len__(self) -> int:
        return len(self.events)


class HistoryStore:
    """The files of one history. One writer at a time is expected; two do no harm beyond double work."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.fs, root = fsspec.core.url_to_fs(uri)
        self.root = root.rstrip("/")
        self._rows: dict[tuple[str, int], int | None] = {}

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────

    def partitions(self) -> list[int]:
        """Kafka's partitions that have a folder, ascending."""
        names = (Path(path).name for path in self._list("kafka"))
        return sorted(int(name) for name in names if re.fullmatch(r"\d{5}", name))

    def segments(self, partition: int) -> tuple[list[Segment], list[Segment]]:
        """→ (files to read, ascending by (first, −last); files whose content cannot be read)."""
        good, bad = [], []
        for path, size in self._list(f"kafka/{partition:05d}").items():
            if match := _KAFKA_FILE.search(path):
                rows = self._count_rows(path, size)
                segment = Segment(path, int(match[1]), int(match[2]), rows or 0)
                (bad if rows is None else good).append(segment)
        return sorted(good, key=lambda s: (s.first, -s.last)), sorted(bad, key=lambda s: s.first)

    def imports(self) -> list[tuple[int, str, str]]:
        """(k, sum of the source, path) of every import, in order."""
        found = ((_IMPORT_FILE.search(path), path) for path in self._list("imported"))
        return sorted((int(m[1]), m[2], path) for m, path in found if m)

    def next_offset(self, partition: int) -> int:
        """The offset after the greatest that the history covers; 0 where it has none.

        A file that cannot be read is a hole: then the offset where the first such hole begins.
        """
        good, bad = self.segments(partition)
        end = max((s.last + 1 for s in good), default=0)
        holes = [s.first for s in bad if not any(g.first <= s.first and s.last <= g.last for g in good)]
        for segment in bad:
            log.error("history file cannot be read; its events are fetched again", path=segment.path)
        return min([end, *holes])

    def last_event(self, partition: int) -> tuple[int, str] | None:
        """(offset, event_id) of the greatest offset held for a partition; None where it holds no event."""
        for segment in sorted(self.segments(partition)[0], key=lambda s: -s.last):
            table = pq.read_table(io.BytesIO(self.fs.cat_file(segment.path)), columns=["offset", "event_id"])
            if table.num_rows:
                return table["offset"][-1].as_py(), table["event_id"][-1].as_py()
        return None

    def append(self, partition: int, first: int, last: int, offsets: Sequence[int], events: list) -> None:
        """Writes one file: the events of offsets `first` … `last`; an offset without an event was refused."""
        name = f"kafka/{partition:05d}/{first:020d}-{last:020d}.parquet"
        self._write(name, _to_table(partition, offsets, events))

    def set_aside_unreadable(self, partition: int) -> None:
        """Renames files that cannot be read to `….unreadable`, after what they covered was fetched again."""
        for segment in self.segments(partition)[1]:
            self.fs.mv(segment.path, f"{segment.path}.unreadable")

    def compact(self, partition: int) -> bool:
        """Merges a partition's small files into one where there are many. A crash in between only leaves overlaps."""
        good, _ = self.segments(partition)
        start, total = len(good), 0
        while start > 0 and total + good[start - 1].rows <= COMPACT_ROWS:
            start -= 1
            total += good[start].rows
        small = good[start:]
        if len(small) <= COMPACT_FILES:
            return False
        table = pa.concat_tables([self._read_segment(s, after, SCHEMA.names, []) for s, after in _resolve(small)])
        first, last = small[0].first, max(s.last for s in small)
        self._write(f"kafka/{partition:05d}/{first:020d}-{last:020d}.parquet", table)
        for segment in small:
            if (segment.first, segment.last) != (first, last):
                self.fs.rm_file(segment.path)
        return True

    def _list(self, folder: str) -> dict[str, int]:
        self.fs.invalidate_cache()
        path = f"{self.root}/{folder}"
        if not self.fs.exists(path):
            return {}
        return {entry["name"]: entry.get("size") or 0 for entry in self.fs.ls(path, detail=True)}

    def _count_rows(self, path: str, size: int) -> int | None:
        """Rows of a file by its footer; None where it cannot be read. Remembered: files never change."""
        if (path, size) not in self._rows:
            try:
                with self.fs.open(path, "rb") as file:
                    self._rows[path, size] = pq.read_metadata(file).num_rows
            except (pa.ArrowInvalid, OSError):
                self._rows[path, size] = None
        return self._rows[path, size]

    def _write(self, name: str, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table.cast(SCHEMA), buffer, compression="zstd")
        self.put(name, buffer.getvalue())

    def put(self, name: str, blob: bytes) -> None:
        """Writes a file of the history's folder, whole or not at all."""
        path = f"{self.root}/{name}"
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if "file" not in self.fs.protocol:
            self.fs.pipe_file(path, blob)  # one put: the object appears whole
            return
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(temporary, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_segment(self, segment: Segment, after: int, columns: Sequence[str], dictionaries: list[str]) -> pa.Table:
        data = io.BytesIO(self.fs.cat_file(segment.path))
        table = pq.read_table(data, columns=list(columns), read_dictionary=dictionaries)
        return table.filter(pc.field("offset") > after) if after >= segment.first else table

    def read(self) -> History:
        """All of it, as columns. Raises `HistoryError` where a file of an import cannot be read."""
        imported, tables = 0, []
        for k, _, path in self.imports():
            try:
                data = io.BytesIO(self.fs.cat_file(path))
                tables.append(pq.read_table(data, columns=list(READ_COLUMNS), read_dictionary=DICTIONARY_COLUMNS))
            except (pa.ArrowInvalid, OSError) as error:
                raise HistoryError(f"import {k} cannot be read; delete {path} and import again: {error}") from error
            imported += tables[-1].num_rows
        for partition in self.partitions():
            for segment, after in _resolve(self.segments(partition)[0]):
                tables.append(self._read_segment(segment, after, READ_COLUMNS, DICTIONARY_COLUMNS))
        if not tables:
            return History(
                np.empty(0, EVENT), np.empty(0, np.int32), np.empty(0, np.int16), np.empty(0, np.int32),
                np.empty(0, np.int64), [], (),
            )  # fmt: skip
        return _to_history(pa.concat_tables(tables), imported)


def _resolve(segments: Iterable[Segment]) -> list[tuple[Segment, int]]:
    """Overlapping files → [(file, take only offsets greater than this)], nothing twice."""
    covered, out = -1, []
    for segment in segments:
        if segment.last > covered:
            out.append((segment, covered))
            covered = segment.last
    return out


def _to_table(partition: int, offsets: Sequence[int], events: list[CanonicalEvent]) -> pa.Table:
    columns: dict[str, Any] = {"partition": np.full(len(events), partition, np.int32), "offset": offsets}
    for name in EVENT_COLUMNS:
        columns[name] = [getattr(event, name) for event in events]
    return pa.table(columns, schema=SCHEMA)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """A dictionary column → (index of each row, −1 for null; the words)."""
    array = column.unify_dictionaries().combine_chunks()
    return array.indices.fill_null(-1).to_numpy(zero_copy_only=False), array.dictionary.to_pylist()


def _hash_column(column: pa.ChunkedArray, hash_of: Callable[[str], int], dtype: type) -> np.ndarray:
    codes, words = _codes(column)
    table = np.zeros(len(words) + 1, dtype)  # the last entry, index −1: null
    table[:-1] = [hash_of(word) for word in words]
    return table[codes]


def _to_history(table: pa.Table, imported: int) -> History:
    events = np.zeros(table.num_rows, EVENT)
    partition = table["partition"].to_numpy().astype(np.int32)
    offset = table["offset"].to_numpy().astype(np.int64)
    events["offset"] = offset + imported
    events["offset"][:imported] = np.arange(imported)
    events["ts"] = table["ts"].to_numpy()
    events["item"] = _hash_column(table["item"], hash32, np.uint32)
    events["category"] = _hash_column(table["category"], hash32, np.uint32)
    events["platform"] = _hash_column(table["platform"], platform_code, np.uint16)
    ids = table["event_id"].to_pylist()
    hashes = np.fromiter((hash64(i) for i in ids), np.uint64, len(ids))
    events["id"] = event_hashes(hashes, events["platform"])
    events["kind"] = _hash_column(table["kind"], KIND_CODE.__getitem__, np.uint8)
    events["quantity"] = pc.fill_null(table["quantity"], 1.0).to_numpy()
    prices, inverse = np.unique(pc.fill_null(table["price"], 0.0).to_numpy(), return_inverse=True)
    events["price"] = np.array([price_bucket(price) for price in prices], np.uint8)[inverse]
    user, users = _codes(table["user"])
    platform, platforms = _codes(table["platform"])
    order = np.argsort(platforms)
    place = np.empty(len(platforms), np.int16)
    place[order] = np.arange(len(platforms))
    return History(
        events=events,
        user=user.astype(np.int32),
        platform=place[platform],
        partition=partition,
        offset=offset,
        users=users,
        platforms=tuple(platforms[i] for i in order),
        categories={hash32(name): name for name in _codes(table["category"])[1] if name},
    )


# ── from Kafka ───────────────────────────────────────────────────────────────────────────────────────────────────────


def client_options(kafka: KafkaConfig) -> dict[str, Any]:
    """The settings of an aiokafka client."""
    options: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap,
        "security_protocol": kafka.security_protocol,
        "request_timeout_ms": int(kafka.request_timeout_s * 1000),
    }
    if kafka.security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": kafka.sasl_mechanism,
            "sasl_plain_username": kafka.sasl_username,
            "sasl_plain_password": kafka.sasl_password.get_secret_value() if kafka.sasl_password else None,
        }
    if kafka.security_protocol.endswith("SSL"):
        options["ssl_context"] = create_ssl_context(cafile=str(kafka.ssl_cafile) if kafka.ssl_cafile else None)
    return options


async def read_to_end(
    consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition], *, timeout_s: float = 60.0
) -> AsyncIterator[tuple[TopicPartition, list]]:
    """Yields (partition, records) up to where each partition ended when it was first fetched, perhaps a little more.

    The end is the high watermark that comes with a fetch, not ListOffsets(latest): some brokers answer that with the
    base offset of the last batch plus one. Raises `HistoryError` after `timeout_s` without any progress.
    """
    waiting, ends = set(partitions), {}
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while waiting:
        batch = await consumer.getmany(*waiting, timeout_ms=100)
        for partition, records in batch.items():
            yield partition, records
        for partition in list(waiting):
            highwater = consumer.highwater(partition)
            if highwater is None:
                continue
            end = ends.setdefault(partition, highwater)
            if await asyncio.wait_for(consumer.position(partition), timeout_s) >= end:
                waiting.discard(partition)
                deadline = loop.time() + timeout_s
        if batch:
            deadline = loop.time() + timeout_s
        elif loop.time() > deadline:
            raise HistoryError(
                f"no answer from Kafka for {sorted(p.partition for p in waiting)} of topic "
                f"{next(iter(waiting)).topic!r} in {timeout_s:.0f} s; are the brokers up?"
            )


class _PartitionPull:
    """Buffers one partition's records between files and checks that it is still the topic that the history knows."""

    def __init__(self, store: HistoryStore, topic: str, partition: int) -> None:
        self.store, self.topic, self.partition = store, topic, partition
        self.next = store.next_offset(partition)
        last = store.last_event(partition) if self.next else None
        self.known_id = last[1] if last and last[0] == self.next - 1 else None
        self.first = self.next
        self.offsets: list[int] = []
        self.events: list[CanonicalEvent] = []
        self.written = self.refused = 0

    @property
    def start(self) -> int:
        """Where to fetch from: one record early, to compare it with what the history holds."""
        return max(0, self.next - 1)

    def add(self, records: list) -> None:
        for record in records:
            if record.offset < self.next:
                self._check(record)
                continue
            if record.offset > self.next and not self.events and self.first == self.next:
                if self.next:
                    log.warning("offsets are gone from the topic", partition=self.partition,
                                first=self.next, last=record.offset - 1)  # fmt: skip
                self.first = record.offset
            self.next = record.offset + 1
            try:
                self.events.append(_decode_event(record.value or b""))
                self.offsets.append(record.offset)
                self.written += 1
            except _NOT_CANONICAL:
                self.refused += 1
            if len(self.events) >= ROWS_PER_FILE:
                self.flush()

    def flush(self) -> None:
        if self.next > self.first:
            self.store.append(self.partition, self.first, self.next - 1, self.offsets, self.events)
        self.first, self.offsets, self.events = self.next, [], []

    def _check(self, record: Any) -> None:
        try:
            same = self.known_id is None or _decode_event(record.value or b"").event_id == self.known_id
        except _NOT_CANONICAL:
            same = False
        if record.offset != self.next - 1 or not same:
            self.recreated()

    def recreated(self) -> None:
        raise HistoryError(
            f"partition {self.partition} of {self.topic!r} is not the one in the history {self.store.uri!r}, which "
            f"goes to offset {self.next - 1}: the topic was created anew. Move that history away, or import it anew"
        )


async def pull(
    store: HistoryStore,
    kafka: KafkaConfig,
    topic: str,
    *,
    stop: asyncio.Event | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Pulled:
    """Brings the history up to the present end of the topic. Stops early, with nothing lost, when `stop` is set.

    A topic that does not exist yet gives nothing. Raises `HistoryError` where Kafka cannot be reached, or where the
    topic was created anew since.
    """
    async with open_consumer(kafka, topic) as (consumer, partitions):
        return await _pull(store, kafka, topic, consumer, partitions, stop, on_progress)


@asynccontextmanager
async def open_consumer(kafka: KafkaConfig, topic: str) -> AsyncIterator[tuple[AIOKafkaConsumer, list[TopicPartition]]]:
    """A consumer without a group that is assigned every partition of a topic (none where the topic does not exist), from
    the earliest offset. Never creates the topic, as asking a broker for an unknown one may: its partitions are for the
    worker to choose. Raises `HistoryError` where Kafka fails."""
    consumer = AIOKafkaConsumer(
        **client_options(kafka),
        group_id=None,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=kafka.fetch_max_wait_ms,
        max_partition_fetch_bytes=4 << 20,
    )
    admin = AIOKafkaAdminClient(**client_options(kafka))
    try:
        await admin.start()
        partitions = []
        if topic in await admin.list_topics():
            described = (await admin.describe_topics([topic]))[0]["partitions"]
            partitions = sorted(TopicPartition(topic, entry["partition"]) for entry in described)
        await consumer.start()
        if partitions:
            consumer.assign(partitions)
        yield consumer, partitions
    except KafkaError as error:
        raise HistoryError(f"Kafka at {kafka.bootstrap} cannot be reached or failed: {error}") from error
    finally:
        await admin.close()
        await consumer.stop()


async def _pull(
    store: HistoryStore,
    kafka: KafkaConfig,
    topic: str,
    consumer: AIOKafkaConsumer,
    partitions: list[TopicPartition],
    stop: asyncio.Event | None,
    on_progress: Callable[[int], None],
) -> Pulled:
    pulls = {partition: _PartitionPull(store, topic, partition.partition) for partition in partitions}
    for partition, part in pulls.items():
        consumer.seek(partition, part.start)
    seen = 0
    async for partition, records in read_to_end(consumer, partitions, timeout_s=kafka.request_timeout_s):
        pulls[partition].add(records)
        seen += len(records)
        on_progress(seen)
        if stop is not None and stop.is_set():
            break
    for partition, part in pulls.items():
        highwater = consumer.highwater(partition)
        if highwater is not None and highwater < part.next:
            part.recreated()
    for part in pulls.values():
        part.flush()
        if stop is None or not stop.is_set():
            store.set_aside_unreadable(part.partition)
            store.compact(part.partition)
    return Pulled(sum(part.written for part in pulls.values()), sum(part.refused for part in pulls.values()))


# ── from elsewhere ───────────────────────────────────────────────────────────────────────────────────────────────────


class Imported(NamedTuple):
    """What `import_events` did with one source. `k` is 0 where the same bytes were imported before: nothing is done."""

    source: str
    k: int
    events: int
    refused: int


def import_events(store: HistoryStore, sources: Sequence[str]) -> list[Imported]:
    """Adds canonical events that lie elsewhere: JSONL (one event a line) or Parquet (columns named as the fields).

    Each source (a local path or an fsspec URI) becomes one file, ordered by `ts` (ties as they came), and comes before
    all of Kafka's events and after earlier imports in the fold: import what is older than the topic. `user` must
    already be a pseudonym. What is no canonical event is counted as refused. A source whose bytes were imported before
    is skipped, so that an import that was cut off can simply be repeated. Raises `HistoryError` for a source that
    cannot be read.
    """
    out = []
    for source in sources:
        try:
            fs, path = fsspec.core.url_to_fs(source)
            data = fs.cat_file(path)
            existing = store.imports()
            digest = hashlib.sha256(data).hexdigest()[:16]
            if digest in {known for _, known, _ in existing}:
                out.append(Imported(source, 0, 0, 0))
                continue
            records = _parquet_records(data) if path.endswith(".parquet") else _json_records(data)
        except (OSError, pa.ArrowInvalid) as error:
            raise HistoryError(f"{source} cannot be imported: {error}") from error
        events = [event for event in records if event is not None]
        events.sort(key=lambda event: event.ts)
        k = max((number for number, _, _ in existing), default=0) + 1
        store._write(f"imported/{k:06d}-{digest}.parquet", _to_table(-k, np.arange(len(events)), events))
        out.append(Imported(source, k, len(events), len(records) - len(events)))
    return out


def _json_records(data: bytes) -> list[CanonicalEvent | None]:
    return [_event_or_none(_decode_event, line) for line in data.splitlines() if line.strip()]


def _parquet_records(data: bytes) -> list[CanonicalEvent | None]:
    schema = pq.read_schema(io.BytesIO(data))
    columns = [name for name in EVENT_COLUMNS if name in schema.names]
    rows = pq.read_table(io.BytesIO(data), columns=columns).to_pylist()
    return [_event_or_none(_from_row, row) for row in rows]


def _from_row(row: dict[str, Any]) -> CanonicalEvent:
    # A NaN is how data frames write "none"; canonical events hold finite numbers only.
    clean = {name: value for name, value in row.items() if value is not None and value == value}
    if any(isinstance(value, float) and math.isinf(value) for value in clean.values()):
        raise msgspec.ValidationError("Number out of range")
    return msgspec.convert(clean, CanonicalEvent, strict=True)


def _event_or_none(decode: Callable[[Any], CanonicalEvent], raw: Any) -> CanonicalEvent | None:
    try:
        return decode(raw)
    except _NOT_CANONICAL:
        return None
