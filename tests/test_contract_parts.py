"""Every name of Faust and aiokafka that is not public and that we rely on. A failure here says what an upgrade broke.

`streams/transport.py` and `streams/app.py` use them; pyproject.toml pins both packages to a minor version.
"""

import gc
import inspect
import re
import weakref

import aiokafka
import faust
import pytest
from aiokafka import codec
from aiokafka.conn import AIOKafkaConnection
from aiokafka.consumer import fetcher
from aiokafka.producer import sender
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator, MessageBatch
from aiokafka.protocol.api import Request
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.util import calc_crc32c
from faust.app.base import App
from faust.assignor.partition_assignor import PartitionAssignor
from faust.serializers.schemas import Schema
from faust.stores import STORES
from faust.stores.base import Store
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport import consumer as faust_consumer
from faust.transport.consumer import Consumer, ConsumerThread
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver

from models.config import Settings
from streams.app import fetches
from streams.transport import JoinedRequest, encode_produce
from streams.wire import ColumnBatch


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (Consumer, "getmany", ["timeout"]),
        (Consumer, "_wait_next_records", ["timeout"]),
        (Consumer, "ack", ["message"]),
        (Consumer, "perform_seek", []),
        (Consumer, "force_commit", ["topics", "start_new_transaction"]),
        (Consumer, "on_partitions_revoked", ["revoked"]),
        (Consumer, "pause_partitions", ["tps"]),
        (Consumer, "resume_partitions", ["tps"]),
        (Consumer, "on_buffer_full", ["tp"]),
        (Consumer, "on_buffer_drop", ["tp"]),
        (Consumer, "_get_active_partitions", []),
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
        (BatchBuilder, "_set_producer_state", ["producer_id", "producer_epoch", "base_sequence"]),
        (BatchBuilder, "_build", []),
        (driver.AIOKafkaConsumerThread, "on_start", []),
        (fetcher.Fetcher, "_proc_fetch_request", ["assignment", "node_id", "request"]),
        (fetcher.FetchResult, "getall", ["max_records"]),
    ],
)
def test_signature_is_as_we_use_it(owner, name, expected):
    assert parameters(getattr(owner, name)) == expected, f"{owner.__name__}.{name} changed: see streams/transport.py"


def test_batch_builder_append_takes_what_the_sender_gives():
    assert {"timestamp", "key", "value", "headers"} <= set(parameters(BatchBuilder.append))


def test_a_batch_of_columns_is_all_that_the_producer_asks_of_a_batch():
    source = inspect.getsource(MessageBatch) + inspect.getsource(MessageAccumulator)
    asked = set(re.findall(r"_builder\.(\w+)\(", source))
    assert asked == {"append", "close", "closed", "record_count", "_set_producer_state", "_build"}
    for name in asked:
        assert callable(getattr(ColumnBatch, name))


def test_the_accumulator_keeps_what_batches_are_built_with():
    source = inspect.getsource(MessageAccumulator.__init__)
    assert "self._batch_size = batch_size" in source and "self._compression_type = compression_type" in source
    assert "self._message_accumulator = MessageAccumulator(" in inspect.getsource(aiokafka.AIOKafkaProducer.__init__)


def test_the_fetcher_makes_partition_records_of_a_response_with_no_await_between():
    source = inspect.getsource(fetcher.Fetcher._proc_fetch_request)
    _, asked, after = source.partition("response = await self._client.send(node_id, request)")
    told = after[after.index("if not assignment.active") :]
    assert asked and "await" not in told.replace("tp_state.await_reset", "")
    assert "*part_data in partitions" in told and "MemoryRecords(part_data[-1])" in told
    assert "self._records[tp] = FetchResult(" in told and "partition_records=partition_records" in told
    assert "self._proc_fetch_request(assignment" in inspect.getsource(fetcher.Fetcher._fetch_requests_routine)
    assert "self._fetcher = Fetcher(" in inspect.getsource(aiokafka.AIOKafkaConsumer.start)


def test_a_fetch_result_takes_all_from_an_iterator_and_its_position():
    names = set(re.findall(r"_partition_records\.(\w+)", inspect.getsource(fetcher.FetchResult)))
    assert names == {"next_fetch_offset"}
    assert "for msg in self._partition_records:" in inspect.getsource(fetcher.FetchResult.getall)
    assert "type(res_or_error) is FetchResult" in inspect.getsource(fetcher.Fetcher.fetched_records)


def test_partition_records_say_what_they_were_fetched_for():
    source = inspect.getsource(fetcher.PartitionRecords.__init__)
    for name in ("_tp", "_check_crcs", "_isolation_level", "next_fetch_offset"):
        assert f"self.{name} =" in source
    assert "self._records_iterator = self._unpack_records()" in source
    assert fetcher.READ_COMMITTED == 1


def test_aiokafka_has_the_checksum_and_the_codecs():
    assert calc_crc32c(memoryview(b"123456789")) == 0xE3069283
    for name in ("gzip", "snappy", "lz4", "zstd"):
        assert all(callable(getattr(codec, f)) for f in (f"has_{name}", f"{name}_encode", f"{name}_decode"))


def test_schema_compile_exists():
    assert "app" in parameters(Schema.compile)


def test_registries_take_aliases():
    assert hasattr(TRANSPORTS, "aliases") and hasattr(STORES, "aliases")


def test_consumer_internals_are_initialised():
    source = inspect.getsource(Consumer.__init__)
    for name in ("_read_offset", "_committed_offset", "_unacked_messages", "_buffered_partitions"):
        assert f"self.{name} =" in source, f"Consumer.{name} is gone: see streams/transport.py"


def test_faust_asks_what_it_has_read_by_item_and_sees_no_gap_where_nothing_is_known():
    """`streams.transport._ReadOffsets` answers None there."""
    source = inspect.getsource(Consumer._drain_messages)
    assert "get_read_offset = self._read_offset.__getitem__" in source
    assert "if r_offset is None or offset >= r_offset:" in source and "if gap > 1 and r_offset:" in source


def test_faust_sleeps_where_no_partition_may_be_fetched():
    """If Faust waits for one instead, our override of _wait_next_records can go."""
    assert "await self.sleep(1)" in inspect.getsource(Consumer._wait_next_records)


def test_aiokafka_consumer_keeps_the_fetch_wait_that_we_set_before_start():
    assert "_fetch_max_wait_ms" in inspect.getsource(aiokafka.AIOKafkaConsumer)
    assert "self._fetch_max_wait_ms" in inspect.getsource(aiokafka.AIOKafkaConsumer.start)
    assert "self._fetch_min_bytes" in inspect.getsource(aiokafka.AIOKafkaConsumer.start)


def test_one_setting_leads_from_latency_to_throughput():
    assert fetches(Settings()) == (20, 1)
    assert fetches(Settings(worker={"linger_ms": 50, "max_batch": 4096})) == (50, 4096 * 200)


def test_recovery_swallows_errors_so_that_the_store_must_keep_them():
    """If Faust stops swallowing, `ArenaStore.failure` can go."""
    assert 'logger.warning(f"Error in recovery {ex}")' in inspect.getsource(Recovery)


def test_revocation_forgets_before_it_calls_back():
    """If Faust turns this round, our override of on_partitions_revoked can go."""
    source = inspect.getsource(Consumer.on_partitions_revoked)
    assert source.index("self._acked.pop") < source.index("self._on_partitions_revoked")


def test_standbys_are_named_by_the_assignor_before_recovery_asks_where_to_begin():
    """`ArenaStore.on_rebalance` reads them, and loads snapshots, before `persisted_offset` is asked for."""
    assert parameters(PartitionAssignor.assigned_standbys) == []
    source = inspect.getsource(TableManager.on_rebalance)
    assert source.index("table.on_rebalance") < source.index("self.recovery.on_rebalance")
    assert "table.persisted_offset(tp)" in inspect.getsource(Recovery._add)
    assert "assigned_standbys" in inspect.getsource(Recovery.on_rebalance)


def test_tables_start_as_faust_starts_them_but_for_its_wait():
    """`streams.app.Tables` has the rest of it."""
    source = inspect.getsource(TableManager.on_start)
    assert re.findall(r"await (self.+)", source) == ["self.sleep(1.0)", "self._update_channels()", "self.recovery.start()"]


def test_faust_takes_what_is_fetched_through_our_gate_only():
    """`streams.transport.Consumer.getmany` waits for `app.loaded`."""
    assert "getmany = self.getmany" in inspect.getsource(Consumer._drain_messages)
    assert "consumer._drain_messages(self)" in inspect.getsource(faust_consumer.Fetcher._fetcher.fun)


def test_faust_is_the_version_that_was_measured():
    assert faust.__version__.startswith("0.15.")
    assert aiokafka.__version__.startswith("0.14.")


BATCHES = [("scores", [(0, bytearray(b"one")), (3, b"two")]), ("größe", [(7, bytearray(1000))])]


@pytest.mark.parametrize("version", ProduceRequest._CLASSES, ids=lambda v: f"v{v.API_VERSION}")
@pytest.mark.parametrize("topics", [BATCHES, [], [("scores", [])]], ids=["batches", "no topic", "no partition"])
def test_a_produce_request_put_together_is_what_aiokafka_would_send(version, topics):
    request = ProduceRequest(transactional_id=None, required_acks=-1, timeout=40_000, topics=topics)
    struct, joined = request.build(version), JoinedRequest(request).build(version)
    assert joined.encode() == struct.encode()
    assert joined.encode.__func__ is encode_produce
    assert (joined.API_KEY, joined.API_VERSION, joined.RESPONSE_TYPE) == (0, struct.API_VERSION, struct.RESPONSE_TYPE)


def test_a_request_put_together_is_gone_once_it_is_sent():
    """Without a search for cycles: the worker seldom makes one, and a request holds a megabyte."""
    gc.disable()
    try:
        request = JoinedRequest(ProduceRequest(None, -1, 1000, BATCHES))
        struct = request.prepare({0: (0, 7)})
        struct.encode()
        there = weakref.ref(request), weakref.ref(struct)
        del request, struct
        assert [one() for one in there] == [None, None]
    finally:
        gc.enable()


def test_produce_requests_are_sent_by_the_sender_s_client():
    assert "self._client = sender.client" in inspect.getsource(sender.SendProduceReqHandler.__init__)
    assert "await self._client.send(node_id, request)" in inspect.getsource(sender.SendProduceReqHandler.do)
    assert "self.build(" in inspect.getsource(Request.prepare)
    sends = inspect.getsource(AIOKafkaConnection.send)
    assert "request.prepare(self._versions)" in sends and "request_struct.encode()" in sends
