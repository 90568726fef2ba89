"""Bytewax with recovery: state in stateful steps, the student's matrix products in batch steps between them.

State is snapshotted into SQLite partitions every epoch of a second, together with the source's offsets; acks=all is its
client's default. It commits no offsets to Kafka: its progress is counted in acknowledged scores.
"""

from datetime import timedelta
from pathlib import Path

import bytewax.operators as op
import numpy as np
from bytewax.connectors.kafka import KafkaSinkMessage
from bytewax.connectors.kafka import operators as kafka
from bytewax.dataflow import Dataflow
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.run import cli_main
from job import Encoded, Job, decode, task

BATCH = 1000
work = task()
job = Job(work.store)


def read(message):
    return message.key.decode(), (message.offset, decode(message.value))


def fold(row, offset_and_event):
    offset, event = offset_and_event
    return job.fold(row, event, offset)


def encode(batch):
    encoded = job.encode([folded for _, folded in batch]).split()
    return [(key, (folded, one)) for (key, folded), one in zip(batch, encoded, strict=True)]


def advance(h, folded_and_encoded):
    folded, encoded = folded_and_encoded
    h = job.advance(h, folded, encoded)
    return h, (folded, encoded, h)


def finish(batch):
    folded, encoded, h = zip(*(value for _, value in batch), strict=True)
    records = job.finish(list(folded), Encoded.join(encoded), np.stack(h))
    return [
        KafkaSinkMessage(key.encode(), record) for (key, _), record in zip(batch, records, strict=True) if record is not None
    ]


flow = Dataflow("score")
source = kafka.input("events", flow, brokers=[work.bootstrap], topics=[work.events], batch_size=BATCH)
keyed = op.map("read", source.oks, read)
folded = op.stateful_map("fold", keyed, fold)
encoded = op.flat_map_batch("encode", folded, encode)
advanced = op.stateful_map("advance", encoded, advance)
scored = op.flat_map_batch("finish", advanced, finish)
kafka.output("scores", scored, brokers=[work.bootstrap], topic=work.scores)

if __name__ == "__main__":
    recovery = Path(work.folder) / "recovery"
    recovery.mkdir(parents=True)
    init_db_dir(recovery, 1)
    cli_main(flow, epoch_interval=timedelta(seconds=work.commit_s), recovery_config=RecoveryConfig(str(recovery)))
