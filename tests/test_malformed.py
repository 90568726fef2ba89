"""A thousand malformed events among good ones: every one ends in `dead_letters` with its bytes, every good one is scored."""

import hashlib
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import oracle
import pytest
from aiokafka import AIOKafkaProducer
from fleet import PLATFORM, Fleet

from models.config import KafkaConfig, TopicsConfig
from models.errors import EventRefused
from streams.dead_letters import decode_headers
from streams.kafka import client_options
from streams.platforms import load_platform

N_BAD, N_GOOD = 1000, 400
LARGE = b'{"id": "large", "who": "u", "what": "view", "note": "' + b"x" * 2_000_000 + b'"}'


@pytest.fixture
async def fleet(kafka: KafkaConfig, topics: TopicsConfig, prefix: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with Fleet(kafka, topics, prefix, tmp_path).running() as fleet:
        yield fleet


def good(i: int) -> dict:
    at = int(time.time() * 1000) - 86_400_000 + i
    return {"id": f"good-{i}", "who": f"user {i % 50}", "what": "view", "at": at, "item": 'ü\u2028\\"', "price": 1e-9}


def bad(rng: random.Random, i: int) -> tuple[str, bytes]:
    """(reason, value) of one malformed event."""
    event = good(0) | {"id": f"bad-{i}"}
    body = msgspec.json.encode(event)
    kinds = {
        "not_utf8": lambda: body.replace(b"view", b"v\xff\xfew"),
        "not_json": lambda: rng.choice(
            [b"", b"{", body[:-2], b"[" * 5000, b'{"a":' * 5000, b'{"price": NaN}', b"\x00", b"<a/>"]
        ),
        "not_object": lambda: rng.choice([b"[]", b"3", b'"text"', b"null", b"true", b"[" + body + b"]"]),
        "missing": lambda: msgspec.json.encode(event | {rng.choice(["who", "what", "at"]): rng.choice([None, ""])}),
        "wrong_type": lambda: msgspec.json.encode(
            event | {rng.choice(["who", "id", "price"]): rng.choice([{"a": 1}, [1], True])}
        ),
        "out_of_range": lambda: msgspec.json.encode(event | {"price": rng.choice([-1.0, 1e300])}),
        "bad_time": lambda: msgspec.json.encode(event | {"at": rng.choice(["tomorrow", -5, 10**18])}),
        "future": lambda: msgspec.json.encode(event | {"at": int(time.time() * 1000) + 10**9}),
        "unknown_kind": lambda: msgspec.json.encode(event | {"what": rng.choice(["yawn", "VIEW"])}),
    }
    reason = rng.choice(list(kinds))
    return reason, kinds[reason]()


@pytest.mark.broker
async def test_a_thousand_malformed_events_cost_themselves_only(fleet: Fleet):
    rng = random.Random(7)
    values = [bad(rng, i)[1] for i in range(N_BAD - 3)] + [
        LARGE,
        None,
        b'{"id": 1' + b"0" * 400 + b', "price": 1' + b"0" * 400 + b"}",
    ]
    records = [(value, None) for value in values] + [(msgspec.json.encode(good(i)), f"good-{i}") for i in range(N_GOOD)]
    rng.shuffle(records)
    places = {}
    async with AIOKafkaProducer(**client_options(fleet.kafka), max_request_size=4 << 20) as producer:
        for i, (value, event_id) in enumerate(records):
            ack = await producer.send_and_wait(fleet.sources[0], value, key=b"k", partition=i % 2)
            places[ack.topic, ack.partition, ack.offset] = value, event_id
    worker = fleet.start()
    await fleet.caught_up()
    await fleet.drain(worker)

    world = await oracle.read(fleet.kafka, fleet.topics, fleet.app_id)
    letters = [record for partition in world.partitions[fleet.topics.dead_letters] for record in partition]
    assert len(letters) == N_BAD
    for letter in letters:
        meta = decode_headers(letter.headers)
        value, event_id = places[meta.source_topic, meta.source_partition, meta.source_offset]
        assert event_id is None, f"a good event was refused: {meta}"
        if value is LARGE:
            assert (meta.reason, meta.size, letter.value) == ("too_large", len(LARGE), b"")
            assert meta.sha256 == hashlib.sha256(LARGE).hexdigest()
        else:
            assert letter.value == value
        assert "user " not in meta.detail, "a raw user id in the detail"
    scored = [record for partition in world.partitions[fleet.topics.scores] for record in partition]
    assert sorted(msgspec.json.decode(record.value)["event_id"] for record in scored) == sorted(
        f"good-{i}" for i in range(N_GOOD)
    )


def test_each_kind_of_malformed_event_is_refused_for_its_reason(tmp_path: Path):
    path = tmp_path / "alpha.toml"
    path.write_text(PLATFORM.format(sources=["s", "o"]))
    platform = load_platform(path)
    rng = random.Random(7)
    for i in range(300):
        reason, value = bad(rng, i)
        with pytest.raises(EventRefused) as refused:
            platform.canonicalise(
                value, topic="s", partition=0, offset=i, now_ms=int(time.time() * 1000), future_tolerance_ms=1000
            )
        assert refused.value.reason == reason, value[:200]
