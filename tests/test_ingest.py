"""The stage `ingest`: what it sends where, in which order, and what it keeps of a record."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from faust.types import TP
from hypothesis import given, settings
from hypothesis import strategies as st
from test_platforms import MINIMAL, platform

from models.config import PseudonymConfig
from models.errors import EventRefused
from models.events import CanonicalEvent
from streams.codec import partitions_of
from streams.dead_letters import decode_headers
from streams.identities import Identities
from streams.ingest import IngestStage, _group, columns
from streams.metrics import Metrics
from streams.pseudonym import Pseudonymiser
from streams.wire import Spans

FILE = MINIMAL + 'item = "item"\nprice = "price"\ntext = "text"\n'
SOURCE = TP("t", 2)
PARTITIONS = 3
PSEUDONYMISER = Pseudonymiser(PseudonymConfig(key="correct horse battery staple"))


class Record(NamedTuple):
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int
    headers: tuple = ()


class Fetched:
    """Records as the transport has them where it keeps columns."""

    def __init__(self, records: list[Record]) -> None:
        self._records = records
        self.values, self.offset, self.timestamp = columns(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Record:
        return self._records[i]


class Sent:
    """A sender that keeps what it is given, and a committer that is told."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, int], list[tuple]] = defaultdict(list)
        self.registered: list[Any] = []
        self.claimed: dict[TP, list[Any]] = defaultdict(list)
        """What was registered since the last `processed`, by the partition that was."""
        self.next_offset: dict[TP, int] = {}

    def send(self, topic: str, partition: int, records: list[tuple]) -> object:
        self.records[topic, partition] += records
        return topic, partition, len(self.records[topic, partition])

    def send_columns(
        self, topic: str, partition: int, keys: Spans, values: Spans, timestamps_ms: np.ndarray | int
    ) -> object:
        assert keys.at.dtype == values.at.dtype == np.int64 and keys.length.dtype == values.length.dtype == np.int32
        for i, timestamp_ms in enumerate(np.broadcast_to(timestamps_ms, keys.n).tolist()):
            key, value = (s.buffer[s.at[i] : s.at[i] + s.length[i]].tobytes() for s in (keys, values))
            self.records[topic, partition].append((key, value, timestamp_ms))
        return topic, partition, len(self.records[topic, partition])

    def register(self, send: object) -> None:
        self.registered.append(send)

    def processed(self, tp: TP, next_offset: int) -> None:
        self.claimed[tp] += self.registered[sum(map(len, self.claimed.values())) :]
        self.next_offset[tp] = next_offset

    def position(self, tp: TP) -> int | None:
        return self.next_offset.get(tp)


def values(n: int, ts: int) -> list[bytes | None]:
    """Good ones of all sorts, and bad ones among them."""
    out: list[bytes | None] = []
    for i in range(n):
        event = {"user": f"user-{i % 7}", "kind": "vbx"[i % 3], "ts": ts - 1000 + i, "item": f"i-{i}", "price": i / 4}
        odd = {3: {"price": 1e-9}, 5: {"user": "ü\n"}, 11: {"kind": "yawn"}, 12: {"user": None}, 13: {"ts": ts + 10**9}}
        body = json.dumps({**event, **odd.get(i % 17, {})}).encode()
        out.append({15: None, 16: body[:-2]}.get(i % 17, body))
    return out


def stage(tmp_path: Path, identities: Identities, sent: Sent) -> IngestStage:
    return IngestStage(
        [platform(tmp_path, FILE)],
        PSEUDONYMISER,
        identities,
        sent,
        sent,
        Metrics(),
        events_topic="events",
        dead_letters_topic="dead",
        partitions=PARTITIONS,
        future_tolerance_s=300.0,
    )


async def linked(*users: str) -> Identities:
    identities = Identities()
    for user in users:
        account, person = PSEUDONYMISER.of("shop", user), PSEUDONYMISER.person(user)
        link = Record("identities", 0, 0, account.encode(), msgspec.json.encode({"person": person}), 0)
        await identities.on_records([link])
    return identities


@pytest.mark.parametrize("n", [1, 5, 16, 200])
@pytest.mark.parametrize("fetched", [list, Fetched])
def test_a_batch(tmp_path: Path, n: int, fetched: type) -> None:
    now_ms = int(time.time() * 1000)
    identities = asyncio.run(linked("user-1", "user-4", "ü\n"))
    of = platform(tmp_path, FILE)
    records = [Record("t", 2, 70 + i, b"k", v, now_ms + 30_000 - 60_000 * i) for i, v in enumerate(values(n, now_ms))]
    sent = Sent()
    made = stage(tmp_path, identities, sent)
    sends = made.process([(SOURCE, fetched(records))])

    due, refused, latest = defaultdict(list), [], 0
    for record in records:
        try:
            event = of.canonicalise(
                record.value, topic="t", partition=2, offset=record.offset, now_ms=now_ms, future_tolerance_ms=300_000
            )
        except EventRefused as error:
            refused.append((record, error))
            continue
        event.user = identities.resolve(PSEUDONYMISER.of("shop", event.user))
        due[int(partitions_of([event.user.encode()], PARTITIONS)[0])].append((record, event))
        latest = max(latest, event.ts)
    for partition, events in due.items():
        got = sent.records.pop(("events", partition))
        assert [(key, msgspec.json.decode(value, type=CanonicalEvent)) for key, value, _ in got] == [
            (event.user.encode(), event) for _, event in events
        ], "in the order of the source"
        for (record, _), (_, _, timestamp_ms) in zip(events, got, strict=True):
            recent = 0 <= now_ms - record.timestamp < 3_600_000
            assert timestamp_ms == record.timestamp if recent else now_ms <= timestamp_ms < now_ms + 30_000
    letters = sent.records.pop(("dead", 2), [])
    assert [(key, value) for key, value, *_ in letters] == [(b"k", record.value) for record, _ in refused]
    for (record, error), (*_, headers) in zip(refused, letters, strict=True):
        meta = decode_headers(headers)
        assert (meta.source_offset, meta.reason) == (record.offset, error.reason)
        assert meta.detail == error.detail or error.reason == "future"  # which counts the milliseconds
        assert "user-" not in meta.detail
    assert not sent.records and sent.registered == sends and sent.next_offset == {SOURCE: 70 + n}
    assert made.latest_ts.get(SOURCE, 0) == latest


def test_a_batch_of_refused_records_only(tmp_path: Path) -> None:
    sent = Sent()
    made = stage(tmp_path, Identities(), sent)
    made.process([(SOURCE, [Record("t", 2, i, None, b"{", 0) for i in range(40)])])
    assert set(sent.records) == {("dead", 2)} and len(sent.records["dead", 2]) == 40
    assert sent.next_offset == {SOURCE: 40} and not made.latest_ts


def test_a_batch_is_gone_once_it_is_sent_without_the_collector(tmp_path: Path) -> None:
    """A refusal that is kept with its traceback keeps every frame, the batch in it, and itself."""
    made, now_ms = stage(tmp_path, Identities(), Sent()), int(time.time() * 1000)
    records = Fetched([Record("t", 2, i, b"k", v, now_ms) for i, v in enumerate(values(40, now_ms))])
    fetched = weakref.ref(records.values.buffer)
    gc.collect()
    gc.disable()
    try:
        made.process([(SOURCE, records)])
        del records
        assert fetched() is None
    finally:
        gc.enable()


def test_who_is_linked_is_put_in_place() -> None:
    identities = asyncio.run(linked("a", "c"))
    accounts = np.stack([np.frombuffer(PSEUDONYMISER.of("shop", user).encode(), np.uint8) for user in "abc"]).copy()
    assert identities.resolve_many(accounts).tolist() == [0, 2]
    assert [row.tobytes().decode() for row in accounts] == [
        PSEUDONYMISER.person("a"), PSEUDONYMISER.of("shop", "b"), PSEUDONYMISER.person("c"),
    ]  # fmt: skip
    assert Identities().resolve_many(accounts).size == 0


@pytest.mark.parametrize("person", ["p" * 23, "ü" * 24, '"' * 24, "p" * 25, "p p" * 8])
def test_a_link_to_what_is_no_pseudonym_is_refused(person: str) -> None:
    identities = Identities()
    link = Record("identities", 0, 0, b"k1" + b"a" * 22, msgspec.json.encode({"person": person}), 0)
    asyncio.run(identities.on_records([link]))
    assert (len(identities), identities.refused) == (0, 1)


@settings(max_examples=100, deadline=None)
@given(partitions=st.lists(st.integers(0, 4), max_size=40), more=st.integers(0, 3))
def test_events_are_grouped_as_a_stable_sort_does(partitions: list[int], more: int):
    n, number = len(partitions), 5 + more
    of = np.array(partitions, np.int64)
    at, length, times = np.arange(n) * 7 + 1, np.arange(n, dtype=np.int32) + 3, np.arange(n) * 11 + 5
    ends, (keys, values, moved) = np.zeros(number + 2, np.int64), np.zeros((3, n), np.int64)
    lengths = np.zeros(n, np.int32)
    _group(of, at, length, times, ends, keys, values, lengths, moved)
    order = np.argsort(of, kind="stable")
    assert ends[: number + 1].tolist() == [0, *np.cumsum(np.bincount(of, minlength=number))]
    assert keys.tolist() == (order * 24).tolist() and values.tolist() == at[order].tolist()
    assert lengths.tolist() == length[order].tolist() and moved.tolist() == times[order].tolist()
