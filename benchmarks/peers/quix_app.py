"""Quix Streams: `StreamingDataFrame.apply(stateful=True)`, which it calls once an event; it has no batches across keys.

State in RocksDB with a changelog topic, checkpoints every second; acks=all is its client's default.
"""

from job import Job, decode, task
from quixstreams import Application, State, message_context
from quixstreams.models.topics import TopicAdmin, TopicManager

work = task()
job = Job(work.store)


class Topics(TopicManager):
    """The embedded broker does not tell retention.ms, from which the changelog's is derived."""

    @classmethod
    def derive_topic_config(cls, topics):
        topics = list(topics)
        for topic in topics:
            topic.broker_config.extra_config.setdefault("retention.ms", "604800000")
        return super().derive_topic_config(topics)


consumer, producer = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 1500}, {"linger.ms": 5}
app = Application(
    broker_address=work.bootstrap,
    consumer_group=work.group,
    auto_offset_reset="earliest",
    commit_interval=work.commit_s,
    state_dir=f"{work.folder}/quix",
    consumer_extra_config=consumer,
    producer_extra_config=producer,
    topic_manager=Topics(TopicAdmin(work.bootstrap), work.group),
    loglevel="WARNING",
)
events = app.topic(work.events, value_deserializer="bytes", key_deserializer="bytes")
scores = app.topic(work.scores, value_serializer="bytes", key_serializer="bytes")


def score(value: bytes, state: State) -> bytes | None:
    row, record = job.one(state.get_bytes("row"), decode(value), message_context().offset)
    state.set_bytes("row", row)
    return record


frame = app.dataframe(events).apply(score, stateful=True)
frame.filter(lambda record: record is not None).to_topic(scores)

if __name__ == "__main__":
    app.run()
