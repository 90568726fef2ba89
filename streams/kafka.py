"""How we reach Kafka beside Faust: options of every client, our topics, the true end of a partition.

Knows aiokafka; knows no Faust, no record format and no group.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError, NoError, TopicAlreadyExistsError, for_code
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.offset import OffsetRequest

from models.config import KafkaConfig, TopicsConfig
from models.errors import ConfigError

_LATEST = -1
_READ_UNCOMMITTED = 0
_RETRY_S = 0.1
_PROBE_WAIT_MS = 1
"""Not 0: the embedded broker answers a fetch that may not wait at all with no partition."""

CHANGELOG_CONFIG: dict[str, str] = {
    "cleanup.policy": "compact",
    "min.compaction.lag.ms": str(2 * 3600 * 1000),
    "delete.retention.ms": str(24 * 3600 * 1000),
}
"""Of the state's changelog. The lag keeps, for two hours, the fresh row that a zombie's stale one may follow; tombstones
stay for a day, twice as long as a local snapshot may be old."""


def client_options(kafka: KafkaConfig) -> dict[str, Any]:
    """Keyword arguments that every aiokafka client takes: servers, security, timeout.

    Raises `ConfigError` for SASL without a name or a password, or a CA file that cannot be read.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap,
        "security_protocol": kafka.security_protocol,
        "request_timeout_ms": int(kafka.request_timeout_s * 1000),
    }
    if kafka.security_protocol in ("SSL", "SASL_SSL"):
        options["ssl_context"] = _ssl_context(kafka)
    if kafka.security_protocol.startswith("SASL_"):
        if not kafka.sasl_username or kafka.sasl_password is None:
            raise ConfigError(
                f"kafka.security_protocol is {kafka.security_protocol}: set kafka.sasl_username and kafka.sasl_password"
            )
        options["sasl_mechanism"] = kafka.sasl_mechanism
        options["sasl_plain_username"] = kafka.sasl_username
        options["sasl_plain_password"] = kafka.sasl_password.get_secret_value()
    return options


def _ssl_context(kafka: KafkaConfig):
    try:
        return create_ssl_context(cafile=str(kafka.ssl_cafile) if kafka.ssl_cafile else None)
    except OSError as e:  # ssl.SSLError is one too
        raise ConfigError(f"kafka.ssl_cafile {kafka.ssl_cafile} cannot be read as CA certificates: {e}") from e


@asynccontextmanager
async def connected(kafka: KafkaConfig) -> AsyncIterator[AIOKafkaClient]:
    """A bare client, for `end_offsets`. `ConfigError` when no broker answers."""
    client = AIOKafkaClient(**client_options(kafka))
    try:
        try:
            await client.bootstrap()
        except KafkaError as e:
            raise ConfigError(f"no Kafka broker answers at kafka.bootstrap={kafka.bootstrap}: {e}") from e
        yield client
    finally:
        await client.close()


def _hours_ms(hours: float) -> str:
    return str(int(hours * 3600 * 1000))


def topic_specs(topics: TopicsConfig) -> list[tuple[str, int, dict[str, str]]]:
    """(name, partitions, config) of our own topics. The state's changelog is not among them: it belongs to an app id."""
    return [
        (topics.events, topics.partitions, {"retention.ms": _hours_ms(topics.events_retention_h)}),
        (topics.scores, topics.partitions, {"retention.ms": _hours_ms(topics.scores_retention_h)}),
        # A value of up to 1 MiB keeps its bytes, and the headers come on top.
        (
            topics.dead_letters,
            topics.partitions,
            {"retention.ms": _hours_ms(topics.dead_letters_retention_h), "max.message.bytes": str(2 << 20)},
        ),
        # Each worker reads these two from the start: one partition keeps that simple, and the order of links total.
        (topics.models, 1, {"cleanup.policy": "compact"}),
        (topics.identities, 1, {"cleanup.policy": "compact"}),
    ]


async def create_topics(
    kafka: KafkaConfig, topics: TopicsConfig, extra: Iterable[tuple[str, int, dict[str, str]]] = ()
) -> list[str]:
    """Creates our topics and `extra` (name, partitions, config) where absent; returns the names created.

    An `extra` with −1 partitions gets `topics.partitions` when created, and may have any number when it exists.
    What exists is left as it is, `min.insync.replicas` is always the broker's. Returns when every topic is visible.
    Raises `ConfigError` when one exists with another number of partitions, or the broker refuses.
    """
    specs = [*topic_specs(topics), *extra]
    new = [
        NewTopic(name, topics.partitions if n < 0 else n, kafka.replication_factor, topic_configs=config)
        for name, n, config in specs
    ]
    admin = AIOKafkaAdminClient(**client_options(kafka))
    try:
        try:
            await admin.start()
        except KafkaError as e:
            raise ConfigError(f"no Kafka broker answers at kafka.bootstrap={kafka.bootstrap}: {e}") from e
        existing = set(await admin.list_topics())
        missing = [t for t in new if t.name not in existing]
        created = _created(await admin.create_topics(missing)) if missing else []
        counts = await _wait_visible(admin, [name for name, _, _ in specs], kafka.request_timeout_s)
    finally:
        await admin.close()
    for name, n, _ in specs:
        if n >= 0 and counts[name] != n:
            raise ConfigError(
                f"topic {name!r} has {counts[name]} partitions and the configuration says {n}: set topics.partitions "
                "to what exists, or use new topic names (and a new worker.app_id)"
            )
    return created


async def has_members(kafka: KafkaConfig, group: str) -> bool:
    """Whether anybody is in a consumer group. True where the broker does not say: it refuses, or has no coordinator
    for it just now."""
    admin = AIOKafkaAdminClient(**client_options(kafka))
    try:
        await admin.start()
        (answer,) = await admin.describe_consumer_groups([group])
    except KafkaError:
        return True
    finally:
        await admin.close()
    (error_code, _, state, *_), *_ = answer.groups
    return error_code != 0 or state not in ("Empty", "Dead")


def _created(response: Any) -> list[str]:
    """Names that a CreateTopics response made; those that another process made first are no error."""
    names = []
    for name, code, *rest in response.topic_errors:
        error = for_code(code)
        if error is NoError:
            names.append(name)
        elif error is not TopicAlreadyExistsError:
            raise ConfigError(f"the broker refuses to create topic {name!r}: {error.__name__} {rest[0] if rest else ''}")
    return names


async def _wait_visible(admin: AIOKafkaAdminClient, names: list[str], timeout_s: float) -> dict[str, int]:
    """Number of partitions by topic, once all have a leader: a topic just created takes a moment to reach the metadata."""
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    while True:
        found = {
            t["topic"]: len(t["partitions"])
            for t in await admin.describe_topics(names)
            if t["error_code"] == 0 and t["partitions"] and all(p["leader"] >= 0 for p in t["partitions"])
        }
        lacking = sorted(set(names) - set(found))
        if not lacking:
            return found
        if loop.time() > until:
            raise ConfigError(f"topics {lacking} have no leader after {timeout_s:.0f} s: is the broker healthy?")
        await asyncio.sleep(_RETRY_S)


async def end_offsets(
    client: AIOKafkaClient, partitions: Iterable[TopicPartition], timeout_s: float = 30.0
) -> dict[TopicPartition, int]:
    """The offset that the next record of each partition will get, on every broker.

    ListOffsets(latest) alone is wrong on the embedded broker (last batch's base offset + 1), so we fetch from there, without
    waiting for records, and take the high watermark. `client` is one from `connected` or a consumer's own.
    Raises `TimeoutError` when a partition has no answer in time: it does not exist, or its leader is away.
    """
    wanted = set(partitions)
    found: dict[TopicPartition, int] = {}
    why = "unknown topic, or no leader"
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    while True:
        for node, group in _by_leader(client, wanted - set(found)).items():
            try:
                found.update(await _high_watermarks(client, node, await _list_latest(client, node, group)))
            except KafkaError as e:  # the leader moved or the connection broke: ask again
                why = repr(e)
        if len(found) == len(wanted):
            return found
        if loop.time() > until:
            raise TimeoutError(f"no end offset for {sorted(wanted - set(found))}: {why}")
        for tp in wanted - set(found):
            client.add_topic(tp.topic)
        await asyncio.sleep(_RETRY_S)
        await client.force_metadata_update()


def _by_leader(client: AIOKafkaClient, partitions: set[TopicPartition]) -> dict[int, list[TopicPartition]]:
    groups: dict[int, list[TopicPartition]] = defaultdict(list)
    for tp in sorted(partitions):
        leader = client.cluster.leader_for_partition(tp)
        if leader is not None and leader >= 0:
            groups[leader].append(tp)
    return groups


async def _list_latest(client: AIOKafkaClient, node: int, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
    by_topic: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for tp in partitions:
        by_topic[tp.topic].append((tp.partition, _LATEST))
    response = await client.send(node, OffsetRequest(-1, _READ_UNCOMMITTED, list(by_topic.items())))
    # Fields: partition, error code, [timestamp,] offset.
    return {
        TopicPartition(topic, fields[0]): fields[-1]
        for topic, answers in response.topics
        for fields in answers
        if fields[1] == 0
    }


async def _high_watermarks(client: AIOKafkaClient, node: int, at: dict[TopicPartition, int]) -> dict[TopicPartition, int]:
    if not at:
        return {}
    by_topic: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for tp, offset in at.items():
        by_topic[tp.topic].append((tp.partition, offset, 1))
    response = await client.send(node, FetchRequest(_PROBE_WAIT_MS, 0, 1, _READ_UNCOMMITTED, list(by_topic.items())))
    return {
        TopicPartition(topic, partition): high_watermark
        for topic, answers in response.topics
        for partition, error_code, high_watermark, *_ in answers
        if error_code == 0 and high_watermark >= 0
    }
