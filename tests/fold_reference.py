"""The rules of the fold once more: slow, plain Python, one event at a time. What `models/fold.py` is held to.

Numbers that a row stores as float32 are rounded here where the row rounds them, so that rows agree byte for byte.
Features are made by name, so that their places are checked too. Knows nothing of Numba.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np

from models.events import KINDS
from models.fold import DUPLICATE, FEATURE_NAMES, FOLDED, REPLAYED, TOO_LATE, FoldParams
from models.state import DECAY_S, SIZES, empty_rows

NAMES_OF_TAU = dict(zip(("1h", "1d", "7d", "30d"), DECAY_S, strict=True))
NEVER = 18.0


class Event(NamedTuple):
    offset: int
    ts: int
    id: int
    item: int
    category: int
    quantity: float
    platform: int
    kind: int
    price: int

    @property
    def kind_name(self) -> str:
        return KINDS[self.kind]

    @property
    def order(self) -> tuple[int, int]:
        return self.ts, self.id

    def same_item(self, other: Event) -> bool:
        return self.item != 0 and (self.platform, self.item) == (other.platform, other.item)


def f32(x: float) -> float:
    return float(np.float32(x))


def fading(x: float) -> float:
    """As a count or a weight is stored: float32, and nothing at all below 1e-20."""
    return f32(x) if f32(x) >= 1e-20 else 0.0


def log_time(seconds: float | None) -> float:
    return NEVER if seconds is None else min(NEVER, math.log1p(max(0.0, seconds)))


class Mix:
    """At most `slots` categories with their decayed weights; a new one displaces the lightest if it is heavier."""

    def __init__(self, slots: int, tau_s: float) -> None:
        self.tau_s = tau_s
        self.slots: list[tuple[int, float]] = [(0, 0.0)] * slots

    def fade(self, dt_ms: int) -> None:
        factor = math.exp(-dt_ms / (1000.0 * self.tau_s))
        faded = [(category, fading(weight * factor)) for category, weight in self.slots]
        self.slots = [(category, weight) if weight > 0.0 else (0, 0.0) for category, weight in faded]

    def add(self, category: int, late_ms: int) -> None:
        weight = math.exp(-late_ms / (1000.0 * self.tau_s))
        if category == 0 or weight < 1e-20:
            return
        held = [c for c, _ in self.slots]
        weights = [w for _, w in self.slots]
        if category in held:
            at = held.index(category)
            self.slots[at] = (category, f32(weights[at] + weight))
        elif 0 in held:
            self.slots[held.index(0)] = (category, f32(weight))
        elif weight > min(weights):
            self.slots[weights.index(min(weights))] = (category, f32(weight))

    def share(self, category: int) -> float:
        total = sum(w for _, w in self.slots)
        return sum(w for c, w in self.slots if c == category != 0) / total if total else 0.0


@dataclass
class Life:
    """What is known of a user since they came, or came back after being idle for too long."""

    ring: list[Event] = field(default_factory=list)
    n_events: int = 0
    first_ts: int = 0
    last_ts: int = 0
    session_start_ts: int = 0
    session_events: int = 0
    session_purchases: int = 0
    session_carts: int = 0
    visits: int = 0
    returns: int = 0
    gap_mean_s: float | None = None
    gap_last_s: float | None = None
    basket_mean: float = 0.0
    price_mean: float = 0.0
    open_carts: int = 0
    last_s: dict[str, int] = field(default_factory=dict)
    counts: dict[tuple[str, str], float] = field(default_factory=dict)
    mix_long: Mix = field(default_factory=lambda: Mix(8, 30 * 86400.0))
    mix_short: Mix = field(default_factory=lambda: Mix(4, 86400.0))


class Reference:
    """One user."""

    def __init__(self, params: FoldParams, size: str = "cpu") -> None:
        self.params, self.size = params, size
        self.ring_length = SIZES[size][1]
        self.applied_offset = -1
        self.life = Life()

    def fold(self, e: Event) -> tuple[int, dict[str, float], float]:
        """→ (status, features by name, dt in s)."""
        life = self.life
        if e.offset <= self.applied_offset:
            return REPLAYED, self.features(e, 0, life.last_s.get(e.kind_name)), 0.0
        self.applied_offset = e.offset
        if e.id in {seen.id for seen in life.ring}:
            return DUPLICATE, dict.fromkeys(FEATURE_NAMES, 0.0), 0.0
        if life.n_events and e.ts - life.last_ts > self.params.idle_ttl_ms:
            life = self.life = Life()
        if life.n_events and self.is_too_late(e):
            return TOO_LATE, self.features(e, 0, life.last_s.get(e.kind_name)), 0.0

        first = life.n_events == 0
        dt_ms = 0 if first else max(0, e.ts - life.last_ts)
        late_ms = 0 if first else max(0, life.last_ts - e.ts)
        since_kind = life.last_s.get(e.kind_name)
        self.visit(e, dt_ms, first)
        self.count(e, dt_ms, late_ms)
        self.shop(e)
        life.ring = sorted([*life.ring, e], key=lambda seen: seen.order)[-self.ring_length :]
        if e.ts >= 1000:
            life.last_s[e.kind_name] = max(life.last_s.get(e.kind_name, 0), min(e.ts // 1000, 2**32 - 1))
        life.first_ts = e.ts if first else life.first_ts
        life.last_ts = e.ts if first else max(life.last_ts, e.ts)
        life.n_events += 1
        return FOLDED, self.features(e, None if first else dt_ms, since_kind), dt_ms / 1000.0

    def is_too_late(self, e: Event) -> bool:
        late = self.life.last_ts - e.ts > self.params.lateness_ms
        return late and len(self.life.ring) == self.ring_length and e.order < self.life.ring[0].order

    def visit(self, e: Event, dt_ms: int, first: bool) -> None:
        life = self.life
        if dt_ms > self.params.session_gap_ms and not first:
            gap_s = dt_ms / 1000.0
            life.gap_mean_s = f32(gap_s if life.gap_mean_s is None else 0.7 * life.gap_mean_s + 0.3 * gap_s)
            life.gap_last_s = f32(gap_s)
            life.returns += dt_ms <= self.params.return_horizon_ms
        if dt_ms > self.params.session_gap_ms or first:
            life.visits += 1
            life.session_start_ts = e.ts
            life.session_events = life.session_purchases = life.session_carts = 0
        life.session_events = min(65535, life.session_events + 1)
        life.session_purchases = min(65535, life.session_purchases + (e.kind_name == "purchase"))
        life.session_carts = min(65535, life.session_carts + (e.kind_name == "cart"))

    def count(self, e: Event, dt_ms: int, late_ms: int) -> None:
        life = self.life
        for tau, tau_s in NAMES_OF_TAU.items():
            factor = math.exp(-dt_ms / (1000.0 * tau_s))
            for kind in KINDS:
                life.counts[kind, tau] = fading(life.counts.get((kind, tau), 0.0) * factor)
            own = math.exp(-late_ms / (1000.0 * tau_s))
            if own >= 1e-20:
                life.counts[e.kind_name, tau] = f32(life.counts[e.kind_name, tau] + own)
        for mix in (life.mix_long, life.mix_short):
            mix.fade(dt_ms)
            mix.add(e.category, late_ms)

    def shop(self, e: Event) -> None:
        life = self.life
        if e.kind_name == "purchase":
            quantity = clean(e.quantity)
            life.basket_mean = f32(0.8 * life.basket_mean + 0.2 * quantity) if life.basket_mean else f32(quantity)
        if e.price:
            life.price_mean = f32(0.8 * life.price_mean + 0.2 * e.price) if life.price_mean else float(e.price)
        known = [s.kind_name for s in life.ring if s.same_item(e) and s.kind_name in ("cart", "purchase")]
        latest = known[-1] if known else None
        if e.kind_name == "cart" and latest != "cart":
            life.open_carts = min(65535, life.open_carts + 1)
        if e.kind_name == "purchase" and latest != "purchase":
            life.open_carts = max(0, life.open_carts - 1)

    def features(self, e: Event, dt_ms: int | None, since_kind: int | None) -> dict[str, float]:
        """`dt_ms` and `since_kind` (s since the epoch) are those before the event; None where there is none."""
        life = self.life
        now_ms = max(e.ts, life.last_ts)
        out: dict[str, float] = {}
        for kind in KINDS:
            out[f"kind_{kind}"] = float(kind == e.kind_name)
            for tau in NAMES_OF_TAU:
                out[f"log_count_{kind}_{tau}"] = math.log1p(life.counts.get((kind, tau), 0.0))
            last = since_kind if kind == e.kind_name else life.last_s.get(kind)
            out[f"log_since_{kind}"] = log_time(None if last is None else now_ms // 1000 - last)
        out["log_dt"] = log_time(None if dt_ms is None else dt_ms / 1000.0)
        out["log_session_events"] = math.log1p(life.session_events)
        out["log_session_s"] = log_time((now_ms - life.session_start_ts) / 1000.0)
        out["log_session_purchases"] = math.log1p(life.session_purchases)
        out["log_session_carts"] = math.log1p(life.session_carts)
        return out | self.visit_features(now_ms) | self.event_features(e) | self.ring_features(e)

    def visit_features(self, now_ms: int) -> dict[str, float]:
        life = self.life
        gaps = max(0, life.visits - 1)
        tenure_s = (now_ms - life.first_ts) / 1000.0
        all_30d = sum(life.counts.get((kind, "30d"), 0.0) for kind in KINDS)
        return {
            "log_visits": math.log1p(life.visits),
            "log_gap_mean": log_time(life.gap_mean_s),
            "log_gap_last": log_time(life.gap_last_s),
            "log_tenure": log_time(tenure_s),
            "log_gap_plain_mean": log_time(tenure_s / gaps if gaps else None),
            "log_events": math.log1p(life.n_events),
            "purchase_share": life.counts.get(("purchase", "30d"), 0.0) / all_30d if all_30d else 0.0,
            "never_bought": float("purchase" not in life.last_s),
            "return_rate": (life.returns + 1) / (gaps + 2),
            "within_session_rate": (life.n_events - life.visits + 1) / (max(0, life.n_events - 1) + 2),
        }

    def event_features(self, e: Event) -> dict[str, float]:
        life = self.life
        when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=e.ts)
        midnight = when.replace(hour=0, minute=0, second=0, microsecond=0)
        hour = 2 * math.pi * ((when - midnight) / timedelta(days=1))
        weekday = 2 * math.pi * when.weekday() / 7
        return {
            "log_open_carts": math.log1p(life.open_carts),
            "log_basket_mean": math.log1p(life.basket_mean),
            "price_mean": life.price_mean / 255,
            "price": e.price / 255,
            "price_minus_mean": (e.price - life.price_mean) / 255 if e.price else 0.0,
            "log_quantity": math.log1p(clean(e.quantity)),
            "hour_sin": math.sin(hour),
            "hour_cos": math.cos(hour),
            "weekday_sin": math.sin(weekday),
            "weekday_cos": math.cos(weekday),
            "weekend": float(when.weekday() >= 5),
            "category_share_long": life.mix_long.share(e.category),
            "category_share_short": life.mix_short.share(e.category),
            "has_category": float(e.category != 0),
        }

    def ring_features(self, e: Event) -> dict[str, float]:
        ring = self.life.ring
        same = [seen for seen in ring if seen.same_item(e)]
        before = [seen.ts for seen in same if seen.id != e.id and seen.ts <= e.ts]
        return {
            "log_ring_categories": math.log1p(len({seen.category for seen in ring} - {0})),
            "ring_fill": len(ring) / self.ring_length,
            "log_item_seen": math.log1p(len(same)),
            "log_item_carts": math.log1p(sum(seen.kind_name == "cart" for seen in same)),
            "log_item_purchases": math.log1p(sum(seen.kind_name == "purchase" for seen in same)),
            "log_since_item": log_time((e.ts - max(before)) / 1000.0 if before else None),
        }

    def row(self) -> np.ndarray:
        """(1,) row, `h` and `h_version` 0."""
        rows, life = empty_rows(1, self.size), self.life
        row = rows[0]
        row["applied_offset"], row["n_ring"] = self.applied_offset, len(life.ring)
        for k, seen in enumerate(life.ring):
            for name in ("ts", "id", "item", "category", "platform", "kind", "price"):
                row[f"ring_{name}"][k] = getattr(seen, name)
        plain = "n_events first_ts last_ts session_start_ts session_events session_purchases session_carts visits returns"
        for name in [*plain.split(), "basket_mean", "price_mean", "open_carts"]:
            row[name] = getattr(life, name)
        row["gap_mean_s"], row["gap_last_s"] = life.gap_mean_s or 0.0, life.gap_last_s or 0.0
        row["last_s_by_kind"] = [life.last_s.get(kind, 0) for kind in KINDS]
        row["counts"] = [[life.counts.get((kind, tau), 0.0) for tau in NAMES_OF_TAU] for kind in KINDS]
        for name, mix in (("mix_long", life.mix_long), ("mix_short", life.mix_short)):
            row[f"{name}_category"] = [category for category, _ in mix.slots]
            row[f"{name}_weight"] = [weight for _, weight in mix.slots]
        return rows


def clean(quantity: float) -> float:
    """A quantity that can be counted with: NaN and negative ones are 0, and a million is enough."""
    return min(quantity, 1e6) if quantity > 0 else 0.0
