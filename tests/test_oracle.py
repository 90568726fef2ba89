"""The oracle catches what it is for: each test breaks one law in fabricated topics, and an honest run breaks none.

The worker here is a toy: one pass over the events, in micro-batches, by `models.fold`.
"""

import random
import time
from collections.abc import Callable

import msgspec
import numpy as np
import oracle
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from oracle import Ledger, Report

from models.config import FoldConfig, KafkaConfig, TopicsConfig
from models.errors import EventRefused
from models.events import CanonicalEvent, Probabilities, ScoreRecord, to_columns
from models.fold import DUPLICATE
from models.state import empty_rows, encode_row
from streams.dead_letters import dead_letter
from streams.kafka import CHANGELOG_CONFIG, client_options, create_topics

pytestmark = pytest.mark.broker

N_USERS, N_EVENTS, BATCH = 12, 240, 40
START_MS = 1_700_000_000_000
encode = msgspec.json.Encoder().encode


class Toy:
    """Fabricates the topics of a worker. Its hooks, by name, are where a test breaks something."""

    def __init__(self, kafka: KafkaConfig, topics: TopicsConfig, app_id: str) -> None:
        self.kafka, self.topics, self.app_id = kafka, topics, app_id
        self.changelog = f"{app_id}-user_state-changelog"
        self.ledger = Ledger()
        self.scored_ms = int(time.time() * 1000)
        self.drop_score: Callable[[str], bool] = lambda event_id: False
        self.change_row: Callable[[np.ndarray, int], None] = lambda row, batch: None
        self.drop_row: Callable[[bytes, int], bool] = lambda key, batch: False
        self.commit: Callable[[int, int], int] = lambda partition, end: end
        self.twice: set[str] = set()
        self.write_letters = True

    async def run(self) -> None:
        await create_topics(self.kafka, self.topics, [(self.changelog, self.topics.partitions, CHANGELOG_CONFIG)])
        options = client_options(self.kafka)
        async with AIOKafkaProducer(**options, enable_idempotence=False) as self.producer:
            await self._send_events()
            await self._work()
        async with AIOKafkaConsumer(**options, group_id=self.app_id, enable_auto_commit=False) as consumer:
            ends = {TopicPartition(self.topics.events, p): len(of) for p, of in enumerate(self.by_partition)}
            offsets = {tp: self.commit(tp.partition, end) for tp, end in ends.items()}
            consumer.assign(list(offsets))
            await consumer.commit(offsets)

    async def _send_events(self) -> None:
        rng = random.Random(7)
        self.by_partition: list[list[tuple[bytes, CanonicalEvent]]] = [[] for _ in range(self.topics.partitions)]
        for i in range(N_EVENTS):
            expect = "accept"
            if i % 60 == 59:
                expect = "duplicate"  # of the one before
            else:
                n = rng.randrange(N_USERS)
                event = CanonicalEvent(
                    event_id=f"e{i}",
                    platform="toy",
                    user=f"k1{n:022d}",
                    kind=rng.choice(["view", "click", "cart", "purchase"]),
                    ts=START_MS + i * 60_000,
                    item=f"i{i % 9}",
                    category=f"c{i % 5}",
                )
            partition = n % self.topics.partitions
            value = encode(event)
            meta = await self.producer.send_and_wait(self.topics.events, value, key=event.user.encode(), partition=partition)
            self.ledger.add(meta, value, expect, event.event_id)
            assert meta.offset == len(self.by_partition[partition])
            self.by_partition[partition].append((event.user.encode(), event))
        meta = await self.producer.send_and_wait(self.topics.events, b"no event", key=b"x", partition=0)
        self.ledger.add(meta, b"no event", "refuse")
        self.by_partition[0].append((b"x", None))

    async def _work(self) -> None:
        for partition, records in enumerate(self.by_partition):
            rows, slots = empty_rows(N_USERS), {}
            for b, start in enumerate(range(0, len(records), BATCH)):
                await self._batch(partition, rows, slots, b, list(enumerate(records))[start : start + BATCH])

    async def _batch(self, partition: int, rows: np.ndarray, slots: dict[bytes, int], b: int, records: list) -> None:
        for offset, (_, event) in records:
            if event is None and self.write_letters:
                await self._send_letter(partition, offset)
        good = [(offset, key, event) for offset, (key, event) in records if event is not None]
        mine = np.array([slots.setdefault(key, len(slots)) for _, key, _ in good], np.int64)
        columns = to_columns([event for _, _, event in good], np.array([offset for offset, _, _ in good]))
        status = oracle._fold(rows, mine, columns, FoldConfig())
        for (_, key, event), how in zip(good, status.tolist(), strict=True):
            if how == DUPLICATE or self.drop_score(event.event_id):
                continue
            for _ in range(2 if event.event_id in self.twice else 1):
                await self.producer.send_and_wait(self.topics.scores, self._score(event), key=key, partition=partition)
        for key in dict.fromkeys(key for _, key, _ in good):
            if not self.drop_row(key, b):
                row = rows[slots[key] : slots[key] + 1].copy()
                self.change_row(row, b)
                value = encode_row(row.tobytes())
                await self.producer.send_and_wait(self.changelog, value, key=key, partition=partition)

    async def _send_letter(self, partition: int, offset: int) -> None:
        class Record:
            topic, value, key = self.topics.events, b"no event", b"x"

        Record.partition, Record.offset = partition, offset
        key, value, _, headers = dead_letter(Record, "score", EventRefused("not_canonical"), self.scored_ms)
        await self.producer.send_and_wait(self.topics.dead_letters, value, key=key, headers=headers)

    def _score(self, event: CanonicalEvent) -> bytes:
        p = Probabilities(click=0.5, purchase=None, return_=0.5)
        return encode(
            ScoreRecord(
                schema=1, event_id=event.event_id, user=event.user, platform=event.platform, ts=event.ts,
                scored_at=self.scored_ms, model="prior", p=p, churn=0.5, categories=[], interest_shift=None, cold=False,
                degraded=True,
            )
        )  # fmt: skip


@pytest.fixture
def toy(kafka: KafkaConfig, topics: TopicsConfig, prefix: str) -> Toy:
    return Toy(kafka, topics, prefix + "app")


async def judge(toy: Toy, **options) -> Report:
    await toy.run()
    return oracle.check(await oracle.read(toy.kafka, toy.topics, toy.app_id), toy.ledger, **options)


def only(report: Report, *laws: str) -> None:
    assert set(report.violations) == set(laws), report.violations


async def test_an_honest_run_breaks_no_law(toy: Toy):
    report = await judge(toy)
    report.assert_ok()
    assert report.info["events"] == N_EVENTS
    assert report.info["duplicates"] == 4
    assert report.info["scores"] == N_EVENTS - 4
    assert report.info["dead_letters"] == 1
    assert len(report.info["committed"]) == 4


async def test_lost_score(toy: Toy):
    toy.drop_score = lambda event_id: event_id == "e100"
    report = await judge(toy)
    only(report, "lost", "over_committed")
    assert "e100 has no score" in report.lost[0]
    with pytest.raises(AssertionError, match="e100 has no score"):
        report.assert_ok()


async def test_lost_score_past_the_commit_is_not_lost_yet(toy: Toy):
    toy.drop_score = lambda event_id: event_id == "e230"
    toy.commit = lambda partition, end: 0
    assert not (await judge(toy, complete=False)).violations
    only(oracle.check(await oracle.read(toy.kafka, toy.topics, toy.app_id), toy.ledger), "lost")


async def test_corrupted_row(toy: Toy):
    def spoil(row: np.ndarray, batch: int) -> None:
        if batch == 0:  # not even the last one
            row["counts"][0, 1, 2] = np.nextafter(row["counts"][0, 1, 2], np.float32(9))

    toy.change_row = spoil
    report = await judge(toy)
    only(report, "corrupt_rows")
    assert len(report.corrupt_rows) == N_USERS
    assert "['counts'] differ from the replay" in report.corrupt_rows[0]


async def test_row_that_fails_its_checksum(toy: Toy):
    await toy.run()
    world = await oracle.read(toy.kafka, toy.topics, toy.app_id)
    record = world.partitions[toy.changelog][1][-1]
    record.value = record.value[:100] + bytes([record.value[100] ^ 1]) + record.value[101:]
    report = oracle.check(world, toy.ledger)
    assert any("checksum" in text for text in report.corrupt_rows)


async def test_stale_row(toy: Toy):
    user = b"k1%022d" % 5
    toy.drop_row = lambda key, batch: key == user and batch > 0
    report = await judge(toy)
    only(report, "stale_rows")
    assert len(report.stale_rows) == 1
    assert user.decode() in report.stale_rows[0]


async def test_stale_row_behind_the_commit_is_caught_in_mid_run(toy: Toy):
    user = b"k1%022d" % 5
    toy.drop_row = lambda key, batch: key == user
    only(await judge(toy, complete=False), "stale_rows")


async def test_undeclared_duplicate(toy: Toy):
    toy.twice = {"e7", "e8"}
    report = await judge(toy)
    only(report, "repeated")
    assert len(report.repeated) == 2


async def test_duplicates_of_a_declared_crash_are_allowed_within_one_interval(toy: Toy):
    toy.twice = {"e7", "e8"}
    await toy.run()
    world = await oracle.read(toy.kafka, toy.topics, toy.app_id)
    crash = toy.scored_ms + 800
    assert not oracle.check(world, toy.ledger, disruptions=[crash], repeat_window_ms=1000).violations
    only(oracle.check(world, toy.ledger, disruptions=[crash], repeat_window_ms=500), "repeated")
    only(oracle.check(world, toy.ledger, disruptions=[crash - 2000], repeat_window_ms=1000), "repeated")


def test_each_copy_too_many_in_events_needs_an_earlier_one_that_a_disruption_explains():
    allowed = oracle.Disruptions([10_000], window_ms=1000)

    def judged(due: int, *copies: tuple[int, int | None]) -> bool:
        report = Report()
        oracle._check_ingested_once("e1", list(copies), due, allowed, report)
        return not report.repeated

    old, near, after = (5000, 5100), (9800, 9900), (11_000, 11_100)
    assert judged(2, old, near)
    assert judged(1, near, after)
    assert judged(1, (9800, None), after)
    assert not judged(1, old, near)
    assert not judged(1, after, after)
    # Sent twice by the producer: the second copy is the one that came again.
    assert judged(2, old, near, after)
    assert not judged(2, old, old, near)
    assert not judged(1, old, near, after)


async def test_overcommitted_offset(toy: Toy):
    toy.commit = lambda partition, end: end + 3 if partition == 2 else end
    report = await judge(toy)
    only(report, "over_committed")
    assert f"{toy.topics.events}[2]" in report.over_committed[0]


async def test_commit_before_the_scores(toy: Toy):
    """All is there but the score of one event before the committed offset."""
    last = {}
    toy.drop_score = lambda event_id: event_id == "e12"
    toy.commit = lambda partition, end: last.setdefault(partition, end // 2)
    report = await judge(toy, complete=False)
    only(report, "lost", "over_committed")


async def test_missing_dead_letter(toy: Toy):
    toy.write_letters = False
    only(await judge(toy), "lost", "over_committed")


async def test_ledger_against_what_is_there(toy: Toy):
    await toy.run()
    world = await oracle.read(toy.kafka, toy.topics, toy.app_id)
    lacking = Ledger(s for s in toy.ledger if s.event_id != "e3")
    only(oracle.check(world, lacking), "strange")
    more = Ledger([*toy.ledger, toy.ledger[0]._replace(topic="source", offset=9, event_id="never")])
    only(oracle.check(world, more), "lost")
    wrong = Ledger(s._replace(expect="accept") for s in toy.ledger)
    only(oracle.check(world, wrong), "misjudged")
    bytes_differ = Ledger(s._replace(sha256="0" * 64) for s in toy.ledger)
    only(oracle.check(world, bytes_differ), "misjudged")


async def test_strange_scores(toy: Toy):
    await toy.run()
    world = await oracle.read(toy.kafka, toy.topics, toy.app_id)
    records = world.partitions[toy.topics.scores]
    records[2][-1].partition = 3  # a score in another partition than its event
    records[1][0].value = b"{}"
    report = oracle.check(world, toy.ledger)
    assert any("partition differ" in text for text in report.strange)
    assert any("no score record" in text for text in report.strange)


async def test_drift_of_h(toy: Toy):
    class Half:
        """A scorer whose h, by the rule, is 1 everywhere."""

        def run(self, rows, slots, events):
            status = oracle._fold(rows, slots, events, FoldConfig())
            rows["h"] = 1.0

            class Scores:
                p_N3 = np.tile(np.float32([0.5, np.nan, 0.5]), (len(events), 1))

            return Scores, status

    toy.change_row = lambda row, batch: row["h"].fill(1.0 + 2e-5)
    await toy.run()
    world = await oracle.read(toy.kafka, toy.topics, toy.app_id)
    assert not oracle.check(world, toy.ledger, scorer=Half()).violations
    for records in world.partitions[toy.changelog]:
        for record in records[-3:]:
            row = np.frombuffer(record.value[:-4], empty_rows(1).dtype).copy()
            row["h"][0, 5] = 0.99
            record.value = encode_row(row.tobytes())
    only(oracle.check(world, toy.ledger, scorer=Half()), "drifted")
