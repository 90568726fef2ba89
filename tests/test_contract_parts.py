"""Every name of Faust and aiokafka that is not public and that we rely on. A failure here says what an upgrade broke.

`streams/transport.py` and `streams/app.py` use them; pyproject.toml pins both packages to a minor version.
"""

import inspect

import aiokafka
import faust
import pytest
from aiokafka.producer.message_accumulator import BatchBuilder
from faust.app.base import App
from faust.serializers.schemas import Schema
from faust.stores import STORES
from faust.stores.base import Store
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer, ConsumerThread
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (Consumer, "getmany", ["timeout"]),
        (Consumer, "_wait_next_records", ["timeout"]),
        (Consumer, "_add_gap", ["tp", "offset_from", "offset_to"]),
        (Consumer, "ack", ["message"]),
        (Consumer, "perform_seek", []),
        (Consumer, "force_commit", ["topics", "start_new_transaction"]),
        (Consumer, "on_partitions_revoked", ["revoked"]),
        (Consumer, "pause_partitions", ["tps"]),
        (Consumer, "resume_partitions", ["tps"]),
        (Consumer, "stop_flow", []),
        (ConsumerThread, "highwater", ["tp"]),
        (driver.Consumer, "_new_consumer_thread", []),
        (driver.Consumer, "_commit", ["offsets"]),
        (driver.AIOKafkaConsumerThread, "_create_worker_consumer", ["transport"]),
        (driver.AIOKafkaConsumerThread, "_highwaters", ["partitions"]),
        (driver.AIOKafkaConsumerThread, "_ensure_consumer", []),
        (driver.Producer, "_settings_extra", []),
        (Store, "apply_changelog_batch", ["batch", "to_key", "to_value"]),
        (Store, "persisted_offset", ["tp"]),
        (Store, "set_persisted_offset", ["tp", "offset"]),
        (Store, "on_rebalance", ["assigned", "revoked", "newly_assigned", "generation_id"]),
        (App, "_stop_consumer", []),
        (BatchBuilder, "record_count", []),
    ],
)
def test_signature_is_as_we_use_it(owner, name, expected):
    assert parameters(getattr(owner, name)) == expected, f"{owner.__name__}.{name} changed: see streams/transport.py"


def test_batch_builder_append_takes_what_the_sender_gives():
    assert {"timestamp", "key", "value", "headers"} <= set(parameters(BatchBuilder.append))


def test_schema_compile_exists():
    assert "app" in parameters(Schema.compile)


def test_registries_take_aliases():
    assert hasattr(TRANSPORTS, "aliases") and hasattr(STORES, "aliases")


def test_consumer_internals_are_initialised():
    source = inspect.getsource(Consumer.__init__)
    for name in ("_read_offset", "_committed_offset", "_unacked_messages", "_buffered_partitions"):
        assert f"self.{name} =" in source, f"Consumer.{name} is gone: see streams/transport.py"


def test_aiokafka_consumer_keeps_the_fetch_wait_that_we_set_before_start():
    assert "_fetch_max_wait_ms" in inspect.getsource(aiokafka.AIOKafkaConsumer)
    assert "self._fetch_max_wait_ms" in inspect.getsource(aiokafka.AIOKafkaConsumer.start)


def test_recovery_swallows_errors_so_that_the_store_must_keep_them():
    """If Faust stops swallowing, `ArenaStore.failure` can go."""
    assert 'logger.warning(f"Error in recovery {ex}")' in inspect.getsource(Recovery)


def test_revocation_forgets_before_it_calls_back():
    """If Faust turns this round, our override of on_partitions_revoked can go."""
    source = inspect.getsource(Consumer.on_partitions_revoked)
    assert source.index("self._acked.pop") < source.index("self._on_partitions_revoked")


def test_faust_is_the_version_that_was_measured():
    assert faust.__version__.startswith("0.15.")
    assert aiokafka.__version__.startswith("0.14.")
