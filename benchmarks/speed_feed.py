"""An open-loop producer: events at a steady rate, whatever becomes of them; a process of its own, beside the broker.

Every TICK_S what is due is sent, with the moment of sending as Kafka's time and as the event's `ts`: how long a score took
is then in the score record. Prints what it sent as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import numpy as np
from aiokafka import AIOKafkaProducer
from speed_lab import stored_events

from streams.codec import partitions_of
from streams.commit import Sender
from streams.wire import Spans, build

TICK_S = 0.02
_PREPARED = 100_000


def prepared(users: int, partitions: int) -> list[tuple[int, bytes, bytes, bytes]]:
    """(partition, key, JSON before the time, JSON after it) of events that are sent again and again; ids get a counter."""
    out, events = [], list(stored_events(_PREPARED, 7, users))
    places = partitions_of([key for key, _ in events], partitions).tolist()
    for (key, value), partition in zip(events, places, strict=True):
        before, after = value.split(b'"ts":')
        # Without its own id and time, which the feed puts in: no two events may share an id.
        out.append((partition, key, before[before.index(b'","platform"') :] + b'"ts":', after.partition(b",")[2]))
    return out


def event(number: int, before: bytes, now_ms: int, after: bytes) -> bytes:
    """The JSON of one event to be sent."""
    return b'{"event_id":"f%012d%s%d,%s' % (number, before, now_ms, after)


async def feed(task: dict) -> dict:
    events, rate, n = prepared(task["users"], task["partitions"]), task["rate"], int(task["rate"] * task["seconds"])
    producer = AIOKafkaProducer(bootstrap_servers=task["bootstrap"], acks="all", max_batch_size=900_000)
    await producer.start()
    sender = Sender(lambda: producer, None, asyncio.get_running_loop())
    build(Spans.of([b"key"]), Spans.of([b"value"]), 0, 1000)  # loads the kernels
    started_s, sent, behind_ms, tails = time.monotonic(), 0, [], set()
    while sent < n:
        due = min(n, int((time.monotonic() - started_s) * rate))
        if due == sent:
            await asyncio.sleep(TICK_S)
            continue
        behind_ms.append((time.monotonic() - started_s - sent / rate) * 1000)
        now_ms = int(time.time() * 1000)
        by_partition: dict[int, tuple[list, list]] = {}
        for i in range(sent, min(due, sent + 5_000)):
            partition, key, before, after = events[i % _PREPARED]
            keys, values = by_partition.setdefault(partition, ([], []))
            keys.append(key)
            values.append(event(i, before, now_ms, after))
            sent += 1
        for partition, (keys, values) in by_partition.items():
            task_ = sender.send_columns(task["topic"], partition, Spans.of(keys), Spans.of(values), now_ms)
            tails.add(task_)
            task_.add_done_callback(tails.discard)
        await asyncio.sleep(TICK_S)
    seconds = time.monotonic() - started_s
    await asyncio.gather(*tails)
    await producer.stop()
    p50, p99 = np.percentile(behind_ms, [50, 99])
    return {"sent": sent, "seconds": seconds, "behind_ms": [round(p50, 2), round(p99, 2)]}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(feed(json.loads(sys.argv[1])))), flush=True)
