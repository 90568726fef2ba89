"""Stock Faust: `faust` an event at a time; `faust_take` in batches by `take_events`.

State is a Faust table with its changelog; store `memory://`, faster than RocksDB and just as durable, since the changelog
is what survives. acks=all, at-least-once, offsets committed every second: Faust's own defaults but for the interval.
"""

import logging
from pathlib import Path

import faust
from job import Job, decode, task

TAKE, WITHIN_S = 512, 0.05
work = task()
job = Job(work.store)
for quiet in ("aiokafka", "faust", "mode"):
    logging.getLogger(quiet).setLevel(logging.WARNING)

app = faust.App(
    work.group,
    broker=f"kafka://{work.bootstrap}",
    store="memory://",
    datadir=str(Path(work.folder) / "faust"),
    topic_partitions=work.partitions,
    topic_replication_factor=1,
    topic_disable_leader=True,
    table_standby_replicas=0,
    web_enabled=False,
    stream_wait_empty=False,
    broker_session_timeout=6.0,
    broker_heartbeat_interval=1.5,
    broker_commit_interval=work.commit_s,
    consumer_auto_offset_reset="earliest",
    producer_acks=-1,
)
RAW = {"key_type": bytes, "value_type": bytes, "key_serializer": "raw", "value_serializer": "raw"}
events = app.topic(work.events, partitions=work.partitions, **RAW)
scores = app.topic(work.scores, partitions=work.partitions, **RAW)
rows = app.Table(
    "rows", partitions=work.partitions, key_type=bytes, value_type=bytes, use_partitioner=work.name == "faust_take"
)

if work.name == "faust":

    @app.agent(events)
    async def score(stream):
        async for event in stream.events():
            row, record = job.one(rows.get(event.key), decode(event.value), event.message.offset)
            rows[event.key] = row
            if record is not None:
                await scores.send(key=event.key, value=record)

else:

    @app.agent(events)
    async def score_batches(stream):
        async for batch in stream.take_events(TAKE, within=WITHIN_S):
            keys = [event.key for event in batch]
            touched = {key: rows[key] for key in set(keys) if key in rows}
            offsets = [event.message.offset for event in batch]
            records = job.many(touched, keys, [decode(event.value) for event in batch], offsets)
            for key, row in touched.items():
                rows[key] = row
            for key, record in zip(keys, records, strict=True):
                if record is not None:
                    await scores.send(key=key, value=record)


if __name__ == "__main__":
    app.finalize()
    faust.Worker(app, loglevel="WARNING").execute_from_commandline()
