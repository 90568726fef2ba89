"""Fixtures that many tests share: the broker, names of topics that no other test uses, the real data sets.

Which broker: the embedded one; Apache Kafka with `--broker=kafka` or CROSSCURRENT_TEST_BROKER=kafka.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.config import KafkaConfig, TopicsConfig
from models.errors import ConfigError
from streams.broker import EmbeddedBroker

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / place) for place in ("tests", "deploy/kafka", "benchmarks", "benchmarks/peers")]

from local_kafka import ApacheKafka  # noqa: E402  (lies beside its pom, which no wheel carries)

BROKERS = {"embedded": EmbeddedBroker, "kafka": ApacheKafka}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--broker",
        choices=sorted(BROKERS),
        default=os.environ.get("CROSSCURRENT_TEST_BROKER", "embedded"),
        help="which broker the tests run on",
    )


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Iterator[EmbeddedBroker | ApacheKafka]:
    """A running broker, the same for the whole run. One that was asked for and cannot start fails, never skips."""
    try:
        running = BROKERS[request.config.getoption("--broker")]().start()
    except ConfigError as e:
        pytest.fail(str(e), pytrace=False)
    yield running
    running.stop()


@pytest.fixture
def prefix() -> str:
    """Start of every topic, group and app id of one test."""
    return f"t{uuid.uuid4().hex[:8]}-"


@pytest.fixture
def kafka(broker: EmbeddedBroker | ApacheKafka) -> KafkaConfig:
    # 6 s: a group join on the embedded broker takes half the session timeout; Kafka's least is 6 s.
    return KafkaConfig(
        bootstrap=broker.bootstrap,
        session_timeout_s=6.0,
        heartbeat_interval_s=1.0,
        idempotence=broker.name != "embedded",
    )


@pytest.fixture
def topics(prefix: str) -> TopicsConfig:
    """Our topics, under names of this test's own. Not yet created: `streams.kafka.create_topics` does it."""
    names = ("events", "scores", "dead_letters", "models", "identities")
    return TopicsConfig(**{name: prefix + name for name in names}, partitions=4)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread while a module's tests run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_copy() -> Iterator[None]:
    """Teachers average one copy of their trees while a module's tests run: what the others add is less chance, for time."""
    from trainer import boosting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boosting, "MOST_BAGS", 1)
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data sets; the test is skipped where it is absent."""
    folder = Path(os.environ.get("CROSSCURRENT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}: set CROSSCURRENT_DATA to their folder")
    return folder
