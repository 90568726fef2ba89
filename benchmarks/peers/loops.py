"""What one writes without a framework: consume a batch, score it, produce; flush and commit offsets once a second.

aiokafka_loop, confluent_loop   rows in a dict: acks=all, but the state dies with the process
limit                           Crosscurrent's own kernels and arena between a bare client's calls: no durability,
                                no group protocol of ours, no backpressure. What a worker could at best be.
"""

import asyncio
import sys
import time
from pathlib import Path

from job import Job, decode, task

BATCH = 4096


async def aiokafka_loop(work) -> None:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

    job, rows, due_s = Job(work.store), {}, time.monotonic() + work.commit_s
    consumer = AIOKafkaConsumer(
        work.events,
        bootstrap_servers=work.bootstrap,
        group_id=work.group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        session_timeout_ms=6000,
        heartbeat_interval_ms=1500,
    )
    producer = AIOKafkaProducer(bootstrap_servers=work.bootstrap, acks="all", linger_ms=5, max_batch_size=500_000)
    await consumer.start()
    await producer.start()
    while True:
        for messages in (await consumer.getmany(timeout_ms=200, max_records=BATCH)).values():
            keys = [message.key for message in messages]
            offsets = [message.offset for message in messages]
            records = job.many(rows, keys, [decode(message.value) for message in messages], offsets)
            for key, record in zip(keys, records, strict=True):
                if record is not None:
                    await producer.send(work.scores, record, key)
        if time.monotonic() >= due_s:
            await producer.flush()
            await consumer.commit()
            due_s = time.monotonic() + work.commit_s


def confluent_clients(work):
    """Consumer and producer; librdkafka's defaults but for what throughput asks for."""
    from confluent_kafka import Consumer, Producer

    consumer = Consumer(
        {
            "bootstrap.servers": work.bootstrap,
            "group.id": work.group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "session.timeout.ms": 6000,
            "heartbeat.interval.ms": 1500,
        }
    )
    producer = Producer(
        {
            "bootstrap.servers": work.bootstrap,
            "acks": "all",
            "linger.ms": 5,
            "batch.size": 500_000,
            "queue.buffering.max.messages": 1_000_000,
        }
    )
    consumer.subscribe([work.events])
    return consumer, producer


def confluent(work, process) -> None:
    """`process`: (partition, keys, values, offsets) → [(key, score record)], between confluent-kafka's batch calls."""
    consumer, producer = confluent_clients(work)
    failed, due_s = [], time.monotonic() + work.commit_s
    pending = False

    def delivered(error, message) -> None:
        if error is not None:
            failed.append(error)

    while not failed:
        by_partition: dict[int, tuple[list, list, list]] = {}
        for message in consumer.consume(BATCH, 0.2):
            if message.error():
                raise SystemExit(str(message.error()))
            keys, values, offsets = by_partition.setdefault(message.partition(), ([], [], []))
            keys.append(message.key())
            values.append(message.value())
            offsets.append(message.offset())
        for partition, (keys, values, offsets) in by_partition.items():
            pending = True
            for key, record in process(partition, keys, values, offsets):
                while True:
                    try:
                        producer.produce(work.scores, record, key, on_delivery=delivered)
                        break
                    except BufferError:
                        producer.poll(0.1)
            producer.poll(0)
        if pending and time.monotonic() >= due_s:
            producer.flush()
            consumer.commit(asynchronous=False)
            pending, due_s = False, time.monotonic() + work.commit_s
    raise SystemExit(f"a score was not taken: {failed[0]}")


def confluent_loop(work) -> None:
    job, rows = Job(work.store), {}

    def process(partition, keys, values, offsets):
        records = job.many(rows, keys, [decode(value) for value in values], offsets)
        return [(key, record) for key, record in zip(keys, records, strict=True) if record is not None]

    confluent(work, process)


def limit(work) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from kernels import Kernels

    confluent(work, Kernels(work.store).process)


if __name__ == "__main__":
    work = task()
    if work.name == "aiokafka_loop":
        asyncio.run(aiokafka_loop(work))
    else:
        {"confluent_loop": confluent_loop, "limit": limit}[work.name](work)
