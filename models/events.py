"""The records that cross a topic: canonical event, score, dead letter, announcement, identity link.

The contracts (JSON Schema, `contracts/`) are generated from these types. Knows no Kafka, no clock, no files.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated, Literal

import msgspec
import numpy as np
import xxhash
from msgspec import UNSET, Meta, UnsetType

SCORE_SCHEMA = 1
"""Version of the score record. Fields are only ever added within a version."""

Kind = Literal["impression", "view", "click", "favorite", "cart", "purchase", "cancel"]
KINDS: tuple[str, ...] = ("impression", "view", "click", "favorite", "cart", "purchase", "cancel")
KIND_CODE: dict[str, int] = {kind: code for code, kind in enumerate(KINDS)}
IMPRESSION, VIEW, CLICK, FAVORITE, CART, PURCHASE, CANCEL = range(7)

HEADS: tuple[str, ...] = ("click", "purchase", "return", "category")
"""What can be predicted. The first three are probabilities, in this order wherever arrays have an axis of heads."""
BINARY_HEADS: tuple[str, ...] = HEADS[:3]

PSEUDONYM_LENGTH = 24
"""Every pseudonym has exactly this many ASCII characters: 2 of key id, 22 of base64url(HMAC-SHA-256[:16])."""

MAX_TEXT = 512
MAX_ID = 256

REFUSAL_REASONS: tuple[str, ...] = (
    "not_utf8",  # bytes that are no UTF-8
    "not_json",  # no JSON, or deeper than we follow
    "not_object",  # JSON, but no object
    "too_large",  # over 1 MiB
    "missing",  # a field that the canonical event needs is absent or null
    "wrong_type",  # a field has a type that cannot be read
    "out_of_range",  # a number that is not finite, negative where it cannot be, or beyond its bounds
    "bad_time",  # a time that cannot be read
    "future",  # further in the future than the tolerance
    "unknown_kind",  # a kind that the platform file does not name
    "not_canonical",  # a record in `events` that is no canonical event (stage score)
)


class CanonicalEvent(msgspec.Struct, omit_defaults=True, kw_only=True, forbid_unknown_fields=False, gc=False):
    """One shopper event in the one form that everything after ingest reads. Key: `user`."""

    event_id: Annotated[str, Meta(min_length=1, max_length=MAX_ID)]
    platform: Annotated[str, Meta(min_length=1, max_length=64)]
    user: Annotated[str, Meta(min_length=PSEUDONYM_LENGTH, max_length=PSEUDONYM_LENGTH)]
    kind: Kind
    ts: Annotated[int, Meta(ge=0, le=253402300799999)]
    """Event time in ms since the epoch, UTC."""
    item: Annotated[str, Meta(max_length=MAX_ID)] | None = None
    category: Annotated[str, Meta(max_length=MAX_ID)] | None = None
    brand: Annotated[str, Meta(max_length=MAX_ID)] | None = None
    price: float | None = None
    """Price of one unit, in `currency`."""
    currency: Annotated[str, Meta(max_length=8)] | None = None
    quantity: float | None = None
    session: Annotated[str, Meta(max_length=MAX_ID)] | None = None
    text: Annotated[str, Meta(max_length=MAX_TEXT)] | None = None


Probability = Annotated[float, Meta(ge=0.0, le=1.0)]


class Probabilities(msgspec.Struct, kw_only=True, gc=False):
    """Probabilities of what comes strictly after the event; null for a head that the platform cannot have."""

    click: Probability | None
    purchase: Probability | None
    return_: Probability | None = msgspec.field(name="return")


class EventEffect(msgspec.Struct, kw_only=True, gc=False):
    """One of the user's last events, and what the head's log-odds would lose without what it wrote into the state."""

    back: Annotated[int, Meta(ge=0)]
    """Places from the newest event that the row keeps: 0 is the newest."""
    kind: Kind
    age_s: Annotated[float, Meta(ge=0.0)]
    """Seconds from it to the event scored."""
    effect: float
    """Log-odds with it less log-odds without it."""


class FeatureEffect(msgspec.Struct, kw_only=True, gc=False):
    """A rolling feature, and what the head's log-odds would lose were it its platform's mean."""

    name: str
    """Of models/fold.py."""
    effect: float


class Explanation(msgspec.Struct, kw_only=True, gc=False):
    """What moved one head's log-odds most, greatest first. Effects are of one deletion each; they do not add up."""

    head: Literal["click", "purchase", "return"]
    events: list[EventEffect]
    older: float
    """Effect of all that the state holds beside the events that the row keeps."""
    features: list[FeatureEffect]


class ScoreRecord(msgspec.Struct, kw_only=True, gc=False):
    """One score. Key: `user`. At least one for every accepted event; a repeat has the same `event_id`."""

    schema: int
    event_id: str
    user: str
    platform: str
    ts: int
    """Event time, ms since the epoch."""
    scored_at: int
    """Wall clock of the scoring, ms since the epoch."""
    model: str
    """`<name>/<version>` of the model, or `prior`."""
    p: Probabilities
    churn: Probability | None
    """1 − p.return."""
    categories: Annotated[list[tuple[str, float]], Meta(max_length=5)]
    """At most five most likely next categories, most likely first; empty where the platform has none."""
    interest_shift: float | None
    """Jensen-Shannon distance (base 2, in [0, 1]) between the long-term and the predicted category mix."""
    cold: bool
    """True while the user has at most 3 folded events."""
    degraded: bool
    """True where something less than a published model made the score (the prior)."""
    explain: list[Explanation] | UnsetType = UNSET
    """One for each head that has a probability; absent unless the worker's setting `explain` asks for it, and where a
    model of constants made the score."""


class DeadLetter(msgspec.Struct, kw_only=True):
    """The headers of a refused record, as one object. The record's value is the original bytes
    (over 1 MiB: empty, with `sha256` and `size` set; the original is at the source offset)."""

    source_topic: str
    source_partition: int
    source_offset: int
    stage: Literal["ingest", "score"]
    reason: str
    detail: str
    refused_at: int
    sha256: str | None = None
    size: int | None = None


class ModelVersion(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Where one published version lies."""

    version: str
    uri: str
    """Path of the version's folder, relative to the store; never absolute, never with `..`."""
    sha256: str
    """Of manifest.json, which in turn holds the sums of the other files."""
    abi: int
    """STATE_ABI that it was trained for."""


class Announcement(ModelVersion, kw_only=True, omit_defaults=True):
    """A record of the topic `models`. Key: the model's name."""

    name: str
    published_at: int
    fallbacks: list[ModelVersion] = []
    """Up to three earlier good versions, newest first: a worker that cannot load this one after a restart tries them."""


class IdentityLink(msgspec.Struct, kw_only=True):
    """A record of the topic `identities`. Key: the pseudonym of `platform:user`. A null value ends the link."""

    person: str
    """Pseudonym of the person."""


def hash64(text: str) -> int:
    """Stable 64-bit hash of an id (xxh3)."""
    return xxhash.xxh3_64_intdigest(text.encode())


def hash32(text: str | None) -> int:
    """Stable 32-bit hash of an item or a category, never 0; 0 stands for none."""
    return (xxhash.xxh3_64_intdigest(text.encode()) & 0xFFFFFFFF) or 1 if text else 0


def platform_code(platform: str) -> int:
    """Stable 16-bit code of a platform's name, never 0. Two of one deployment with equal codes are refused at start."""
    return (xxhash.xxh3_64_intdigest(platform.encode()) & 0xFFFF) or 1


_SPREAD = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd: spreads a platform's code over 64 bits."""


def event_hash(platform: str, event_id: str) -> int:
    """64-bit hash of an event: two platforms may give the same id, and a linked person has events of both in one row."""
    return hash64(event_id) ^ (platform_code(platform) * _SPREAD & 0xFFFFFFFFFFFFFFFF)


def event_hashes(id_hashes_N: np.ndarray, platform_codes_N: np.ndarray) -> np.ndarray:
    """`event_hash` of many: hash64 of the ids (n,) uint64 and the platforms' codes (n,) → (n,) uint64."""
    return id_hashes_N ^ (platform_codes_N.astype(np.uint64) * np.uint64(_SPREAD))


EVENT = np.dtype(
    [
        ("offset", "<i8"),  # offset in the partition of `events`
        ("ts", "<i8"),  # ms
        ("id", "<u8"),  # event_hash
        ("item", "<u4"),  # hash32, 0 none
        ("category", "<u4"),  # hash32, 0 none
        ("quantity", "<f4"),  # 1 where absent
        ("platform", "<u2"),  # platform_code
        ("kind", "u1"),  # KIND_CODE
        ("price", "u1"),  # price_bucket
    ],
    align=True,
)
"""One event as the fold sees it: 40 bytes."""

PRICE_EDGES: tuple[float, ...] = tuple(0.01 * 2.0 ** (k / 8.0) for k in range(255))
"""Lower edges of the price buckets 1 … 255: eight an octave, from 0.01 up."""


def price_bucket(price: float | None) -> int:
    """Log-scale price bucket: 0 for none or not positive; else the k in 1 … 255 with PRICE_EDGES[k-1] <= price
    (1 also for less than the first edge). By comparison, not by logarithm, so that every machine agrees."""
    if price is None or not price > 0.0:
        return 0
    return bisect_right(PRICE_EDGES, price) or 1


def to_columns(events: list[CanonicalEvent], offsets: np.ndarray) -> np.ndarray:
    """Canonical events and their offsets (n,) → array of EVENT (n,). The plain form that faster codecs must equal."""
    out = np.empty(len(events), EVENT)
    for i, e in enumerate(events):
        out[i] = (
            offsets[i],
            e.ts,
            event_hash(e.platform, e.event_id),
            hash32(e.item),
            hash32(e.category),
            1.0 if e.quantity is None else e.quantity,
            platform_code(e.platform),
            KIND_CODE[e.kind],
            price_bucket(e.price),
        )
    return out
