"""Small canonical histories with something to learn, for the trainer's tests. No Kafka, no platform's own format.

Two shops: `shop` has a funnel and categories, `till` has purchases only and no categories. A user is busy or idle, a
buyer or a looker, for life; after a cart a purchase is likely; a session stays mostly with one of the user's categories.
"""

from pathlib import Path

import numpy as np

from models.config import FoldConfig, HorizonsConfig
from models.events import CanonicalEvent
from models.fold import N_FEATURES
from models.student import StudentConfig
from trainer.examples import Examples, gate_start, heads_of, make_examples, replay
from trainer.history import History, HistoryStore
from trainer.labels import make_labels

START_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
PARTITIONS = 4


def make_canonical(n_users: int = 300, days: float = 30.0, seed: int = 0, start_ms: int = START_MS) -> list[CanonicalEvent]:
    """Events of `n_users` in time order; about 70 a user in 30 days."""
    rng = np.random.default_rng(seed)
    events = []
    for u in range(n_users):
        user = f"k1{u:022d}"
        busy, buyer, till = rng.random() < 0.4, rng.random() < 0.3, rng.random() < 0.2
        favourites = rng.choice(30, 4, replace=False)
        now = rng.exponential(3 * 24)
        while now < 24 * days:
            at, focus, carted = now, int(favourites[int(rng.integers(4))]), False
            while True:
                if till:
                    kind = "purchase"
                else:
                    buys = 0.6 if carted else (0.1 if buyer else 0.01)
                    kind = "purchase" if rng.random() < buys else str(rng.choice(["view", "click", "cart"]))
                    carted = kind == "cart"
                category = focus if rng.random() < 0.8 else int(rng.integers(30))
                events.append(
                    CanonicalEvent(
                        event_id=f"{u}-{len(events)}",
                        platform="till" if till else "shop",
                        user=user,
                        kind=kind,
                        ts=start_ms + int(at * HOUR_MS),
                        item=f"i{category * 10 + int(rng.integers(10))}",
                        category=None if till else f"category {category}",
                        price=float(10 + category),
                    )
                )
                at += rng.exponential(0.05) + 0.003
                if rng.random() < (0.5 if till else 0.35 if buyer else 0.2):
                    break
            now = at + 1 + rng.exponential(24 if busy else 24 * 8)
    events = [event for event in events if event.ts < start_ms + days * 24 * HOUR_MS]
    return sorted(events, key=lambda event: event.ts)


def store_events(store: HistoryStore, events: list[CanonicalEvent]) -> None:
    """Into the history, as if they had come through Kafka: users keyed to partitions."""
    by_partition: dict[int, list[CanonicalEvent]] = {p: [] for p in range(PARTITIONS)}
    for event in events:
        by_partition[int(event.user[2:]) % PARTITIONS].append(event)
    for partition, own in by_partition.items():
        first = store.next_offset(partition)
        store.append(partition, first, first + len(own) - 1, range(first, first + len(own)), own)


def make_history(folder: Path, n_users: int = 300) -> History:
    """`make_canonical`, stored in a folder and read back."""
    store = HistoryStore(str(folder))
    store_events(store, make_canonical(n_users))
    return store.read()


def make_config(history: History, fraction: float = 0.2) -> StudentConfig:
    """Of the heads that show before the gate's start; `fraction` of the time is held out."""
    horizons = HorizonsConfig()
    gate = gate_start(history, make_labels(history, FoldConfig(), horizons), horizons, fraction)
    return StudentConfig.of("cpu", N_FEATURES, history.platforms, heads_of(history, None, gate))


def examples_until(history: History, config: StudentConfig, fraction: float = 0.2) -> Examples:
    """As a round sees them that holds out so much of the time."""
    fold, horizons = FoldConfig(), HorizonsConfig()
    labels = make_labels(history, fold, horizons)
    gate = gate_start(history, labels, horizons, fraction)
    return make_examples(history, labels, replay(history, fold, "cpu", until_ms=gate.user_U), config, horizons, gate)
