"""Platform files: one TOML file says where each canonical field lies in a platform's own events.

`load_platforms` reads the files and refuses a wrong one with its line; `Platform.canonicalise` turns one record into a
canonical event whose `user` is still the platform's own id. Nothing in a file is evaluated as code: a file is compiled
once into closures over plain data. Knows no Kafka, no pseudonyms, no environment and no clock.

A file, all of it:

    name = "shop"                        # the file's own name without .toml where absent
    description = "for people"
    topics = ["shop.events"]             # no two platforms share a topic
    heads = ["click", "purchase", "return", "category"]     # what can be predicted here
    event_id = "content_hash"            # or "source", the default: topic/partition/offset; not beside fields.event_id

    [kind]                               # a SOURCE and `names`, or a `literal` kind, or `rules`
    path = "action.type"
    [kind.names]                         # the platform's name = ours; what is not named is refused
    ORDER = "purchase"
    [[kind.rules]]                       # the first rule whose conditions all hold; without `when`: always
    kind = "cancel"
    when = { path = "InvoiceNo", starts_with = "C" }        # or a list of conditions. One test a condition:
                                         # starts_with, equals, in, present, less_than, greater_than

    [time]                               # a SOURCE without modifiers, and one of `unit` and `format`
    path = "ts"
    unit = "ms"                          # s, ms, us, ns
    format = "iso"                       # or a pattern such as "%d/%m/%Y %H:%M:%S"
    zone = "Europe/London"               # of times without an offset; UTC where absent

    [fields]                             # user is needed; also event_id item category brand price currency quantity
    user = "actor.id"                    # session text, each a SOURCE

    [replay]                             # see streams/replay.py
    files = ["shop/events.parquet"]

A SOURCE is a dotted path ("lines.0.sku", a number counts from 0 in an array), a list of SOURCES of which the first
present one counts, or a table of exactly one of

    path = "a.b"    keys = ["a.b", 0, "c"]    literal = "EUR"    any = [SOURCE, ...]    join = [SOURCE, ...]

(`keys` for names with dots, `join` for text of several fields) and of modifiers, applied in this order:

    separator = " "                      # of join
    null = ["", "NA"]                    # values that count as absent; the empty text always does
    map = { A = "apparel" }              # by value; `otherwise = "x"` for values not in the map, which else stay
    words = { bag = "bags" }             # the last of these words in the text decides; none of them: absent
    prefix = "rr:"                       # so that ids of two platforms cannot meet
    scale = 0.01    divide_by = "count"  # price and quantity only

Rules that hold for every platform: numbers are ids too (1234 and 1234.0 are "1234"); an absent or null price is null;
`currency` is kept only beside a price; the sign of quantity and price is dropped for a cancel and refused elsewhere;
text is cut at 512 characters, longer ids are refused.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from zoneinfo import ZoneInfo

import msgspec

from models.errors import ConfigError, EventRefused, PlatformFileError
from models.events import HEADS, KINDS, MAX_ID, MAX_TEXT, CanonicalEvent, platform_code
from streams.timeformat import UNITS, TimeFormat, iso_format, pattern_format, unit_format
from streams.toml_lines import KeyPath, key_lines

SHIPPED = Path(__file__).resolve().parent.parent / "deploy" / "platforms"
"""The platform files that come with the package."""

MAX_VALUE_BYTES = 1 << 20
MAX_PRICE = 1e12
MAX_QUANTITY = 1e9
"""A greater quantity would not be exact in the float32 of a row, and is no purchase."""

FIELDS = ("event_id", "user", "item", "category", "brand", "price", "currency", "quantity", "session", "text")
MAX_CURRENCY = 8
_NUMBERS = ("price", "quantity")
_MAX_EXACT_INT = 1 << 53
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(?:\.[0-9]{0,40})?(?:[eE][+-]?[0-9]{1,3})?")
_WORD = re.compile(r"[^\W\d_]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,200}")  # 200: the id topic/partition/offset must stay within MAX_ID

Get = Callable[[dict], Any]
"""A platform's event → a value of it, None where absent."""


class Join(NamedTuple):
    """A second file of a replay whose `columns` are added to each row where `key` equals the row's `on`."""

    file: str
    on: str
    key: str
    columns: tuple[str, ...]


class Replay(NamedTuple):
    """The files that a platform's events can be replayed from, relative to a data directory."""

    files: tuple[str, ...]
    topic: str
    joins: tuple[Join, ...]


class TimeField(NamedTuple):
    """Where a platform's time is and how it is written."""

    get: Get
    paths: tuple[KeyPath, ...]
    """The first present one holds the time."""
    format: TimeFormat


class Platform:
    """One platform: its topics, its heads, and how its events become canonical. Made by `load_platform`."""

    def __init__(self, file: _File) -> None:
        self.path = file.path
        self.name: str = file.name()
        self.code = platform_code(self.name)
        self.topics = file.topics()
        self.heads = file.heads()
        self.time = file.time()
        self.replay = file.replay(self.topics)
        self.user_of: Get = _text_reader(file.source("user"), "user", MAX_ID)
        """The raw id of an event's user, None where absent. Raises `EventRefused`."""
        self.user_columns = frozenset(file.roots["user"])
        """The top-level keys that `user_of` looks at."""
        self.content_prefix, self._from_source = file.event_id_rule()
        """What the sha256 of an event's content begins with, where that is the event's id."""
        self.content_hash = None if self.content_prefix is None else hashlib.sha256(self.content_prefix)
        """That sha256, begun."""
        self.kind_of: Callable[[dict], str] = file.kind()
        """One of KINDS. Raises `EventRefused`."""
        self._read_time = self.time.format.read
        self._event_id, self._item, self._category, self._brand, self._session = (
            _text_reader(file.source(name), name, MAX_ID) for name in ("event_id", "item", "category", "brand", "session")
        )
        self._currency = _text_reader(file.source("currency"), "currency", MAX_CURRENCY)
        self._text = _text_reader(file.source("text"), "text", MAX_TEXT, cut=True)
        self._price = _number_reader(file.source("price"), "price", MAX_PRICE)
        self._quantity = _number_reader(file.source("quantity"), "quantity", MAX_QUANTITY)
        self.readers: dict[str, Callable] = {
            "event_id": self._event_id,
            "item": self._item,
            "category": self._category,
            "brand": self._brand,
            "session": self._session,
            "currency": self._currency,
            "text": self._text,
            "price": self._price,
            "quantity": self._quantity,
        }
        """Field → what reads it from an event: text or None; of price and quantity (event, is it a cancel) → a number or
        None. Pure functions of the values at their paths. Raise `EventRefused`."""
        self.tables: dict[str, Any] = file.root
        """The file itself, checked."""
        file.check_heads(self.heads)

    def __repr__(self) -> str:
        return f"Platform({self.name!r}, topics={list(self.topics)}, file={str(self.path)!r})"

    def canonicalise(
        self,
        value: bytes | None,
        *,
        topic: str,
        partition: int,
        offset: int,
        now_ms: int,
        future_tolerance_ms: int,
    ) -> CanonicalEvent:
        """One record's value → the canonical event, with the platform's own id in `user`.

        Raises `EventRefused` with a reason of `REFUSAL_REASONS`; its detail never holds the user's id.
        """
        event = decode_object(value)
        kind = self.kind_of(event)
        user = self.user_of(event)
        if user is None:
            raise EventRefused("missing", "user: absent or null")
        at = self.time.get(event)
        if at is None or at == "":
            raise EventRefused("missing", "time: absent or null")
        ts = self._read_time(at)
        if ts > now_ms + future_tolerance_ms:
            raise EventRefused("future", f"time: {ts - now_ms} ms ahead of the clock")
        if self._from_source:
            event_id = f"{topic}/{partition}/{offset}"
        elif self.content_hash is not None:
            content = self.content_hash.copy()
            content.update(value)
            event_id = content.hexdigest()[:40]
        else:
            event_id = self._event_id(event)
            if event_id is None:
                raise EventRefused("missing", "event_id: absent or null")
        is_cancel = kind == "cancel"
        price = self._price(event, is_cancel)
        return CanonicalEvent(
            event_id=event_id,
            platform=self.name,
            user=user,
            kind=kind,
            ts=ts,
            item=self._item(event),
            category=self._category(event),
            brand=self._brand(event),
            price=price,
            currency=None if price is None else self._currency(event),
            quantity=self._quantity(event, is_cancel),
            session=self._session(event),
            text=self._text(event),
        )

    def canonicalise_many(
        self,
        values: Sequence[bytes | None],
        *,
        topic: str,
        partition: int,
        offsets: Sequence[int],
        now_ms: int,
        future_tolerance_ms: int,
    ) -> list[CanonicalEvent | EventRefused]:
        """`canonicalise` of each of one partition's records: (n,) values and offsets → (n,) events or refusals."""
        out: list[CanonicalEvent | EventRefused] = []
        canonicalise = self.canonicalise
        for value, offset in zip(values, offsets, strict=True):
            try:
                event = canonicalise(
                    value,
                    topic=topic,
                    partition=partition,
                    offset=offset,
                    now_ms=now_ms,
                    future_tolerance_ms=future_tolerance_ms,
                )
            except EventRefused as refused:
                event = refused.with_traceback(None)  # the frames would keep the record alive
            out.append(event)
        return out


# --- one record ------------------------------------------------------------------------------------------------------

_decode = msgspec.json.Decoder().decode


def decode_object(value: bytes | None) -> dict:
    """A record's value → its JSON object. Raises `EventRefused`."""
    if value is None:
        raise EventRefused("not_json", "the record has no value")
    if len(value) > MAX_VALUE_BYTES:
        raise EventRefused("too_large", f"{len(value)} bytes, at most {MAX_VALUE_BYTES} are read")
    try:
        event = _decode(value)
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
        refused = _undecodable(value, error)
    else:
        if type(event) is dict:
            return event
        refused = EventRefused("not_object", f"JSON, but {_json_type(event)}")
    raise refused


def _undecodable(value: bytes, error: Exception) -> EventRefused:
    if isinstance(error, RecursionError):
        return EventRefused("not_json", "nested deeper than is followed")
    try:
        bytes(value).decode()
    except UnicodeDecodeError as bad:
        return EventRefused("not_utf8", f"byte {bad.start} begins no UTF-8 character")
    if isinstance(error, msgspec.ValidationError):
        return EventRefused("out_of_range", "a number is too large to be read")
    return EventRefused("not_json", str(error))  # msgspec names a byte position, no content


_JSON_TYPES = {
    str: "a text", int: "a number", float: "a number", bool: "a truth value", list: "an array", dict: "an object"
}  # fmt: skip


def _json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value), "null")


def _scalar_text(value: Any) -> str | None:
    """A scalar as an id: 1234 and 1234.0 → "1234"; None for what is no id."""
    if type(value) is str:
        return value
    if type(value) is int:
        return str(value)
    if type(value) is float and value.is_integer() and abs(value) < _MAX_EXACT_INT:
        return str(int(value))
    return None


def _absent(event: dict, is_cancel: bool = False) -> None:
    return None


def _text_reader(get: Get | None, field: str, max_length: int, cut: bool = False) -> Get:
    """A closure: event → text of at most `max_length` characters, or None where absent, null or empty."""
    if get is None:
        return _absent

    def read(event: dict) -> str | None:
        value = get(event)
        if type(value) is not str:
            if value is None:
                return None
            value = _id_text(value, field)
        if len(value) > max_length:
            if not cut:
                raise EventRefused("out_of_range", f"{field}: {len(value)} characters, at most {max_length} are read")
            return value[:max_length]
        return value or None

    return read


def _id_text(value: Any, field: str) -> str:
    text = _scalar_text(value)
    if text is not None:
        return text
    if type(value) is float:
        raise EventRefused("out_of_range", f"{field}: a number that is not whole, or too large to be exact")
    raise EventRefused("wrong_type", f"{field}: {_json_type(value)}, not a text or a whole number")


def _number_reader(get: Get | None, field: str, most: float) -> Callable[[dict, bool], float | None]:
    """A closure: (event, is it a cancel) → a finite number in [0, most], or None where absent."""
    if get is None:
        return _absent

    def read(event: dict, is_cancel: bool) -> float | None:
        value = get(event)
        if type(value) is not float:
            if value is None or value == "":
                return None
            value = to_number(value, field)
        if 0.0 <= value <= most:
            return value
        if is_cancel and -most <= value < 0.0:
            return -value
        raise EventRefused("out_of_range", f"{field}: {'negative' if value < 0 else 'too large'}")

    return read


def to_number(value: Any, field: str) -> float:
    """A JSON number, or a text of one, → a finite float. Raises `EventRefused`."""
    if type(value) is str and _NUMBER.fullmatch(value):
        value = float(value)
    if type(value) is float and abs(value) < float("inf"):
        return value
    if type(value) is int and value.bit_length() < 1000:
        return float(value)
    if type(value) in (int, float):
        raise EventRefused("out_of_range", f"{field}: too large")
    raise EventRefused("wrong_type", f"{field}: {_json_type(value)}, not a number")


# --- sources: plain data → closures ----------------------------------------------------------------------------------


def _path_getter(keys: tuple[str | int, ...]) -> Get:
    """A closure: event → the value at `keys`, None where anything on the way is absent or of another type."""
    if len(keys) == 1:
        (only,) = keys
        return lambda event: event.get(only)
    if not any(_is_index(key) for key in keys):
        first, *rest = keys
        if len(rest) == 1:
            (last,) = rest

            def two(event: dict) -> Any:
                inner = event.get(first)
                return inner.get(last) if type(inner) is dict else None

            return two

    def walk(value: Any) -> Any:
        for key in keys:
            value = step(value, key)
        return value

    return walk


def step(value: Any, key: str | int) -> Any:
    """One step into an object or an array; None where there is nothing."""
    if type(value) is dict:
        return value.get(key if type(key) is str else str(key))
    if type(value) is list and _is_index(key) and int(key) < len(value):
        return value[int(key)]
    return None


def _is_index(key: str | int) -> bool:
    return type(key) is int or (key.isascii() and key.isdigit() and len(key) < 7)


def _first_of(gets: list[Get]) -> Get:
    def first(event: dict) -> Any:
        for get in gets:
            value = get(event)
            if value is not None and value != "":
                return value
        return None

    return first


def _joined(gets: list[Get], separator: str) -> Get:
    def join(event: dict) -> str | None:
        parts = []
        for get in gets:
            value = get(event)
            if value is not None and value != "":
                parts.append(value if type(value) is str else _id_text(value, "join"))
        return separator.join(parts) or None

    return join


def _nulled(get: Get, nulls: frozenset[str]) -> Get:
    def kept(event: dict) -> Any:
        value = get(event)
        return None if _scalar_text(value) in nulls else value

    return kept


def _mapped(get: Get, table: dict[str, str], otherwise: str | None) -> Get:
    def look_up(event: dict) -> Any:
        value = get(event)
        if value is None or value == "":
            return None
        return table.get(_scalar_text(value), value if otherwise is None else otherwise)

    return look_up


def _by_words(get: Get, table: dict[str, str]) -> Get:
    def last_known(event: dict) -> str | None:
        value = get(event)
        if type(value) is not str:
            return None
        for word in reversed(_WORD.findall(value.lower())):
            if word in table:
                return table[word]
        return None

    return last_known


def _prefixed(get: Get, prefix: str, field: str) -> Get:
    def prefixed(event: dict) -> str | None:
        value = get(event)
        if value is None or value == "":
            return None
        return prefix + (value if type(value) is str else _id_text(value, field))

    return prefixed


def _scaled(get: Get, scale: float, divisor: Get | None, field: str) -> Get:
    def scaled(event: dict) -> float | None:
        value = get(event)
        if value is None or value == "":
            return None
        number = (value if type(value) is float else to_number(value, field)) * scale
        if divisor is not None:
            by = divisor(event)
            by = 0.0 if by is None or by == "" else to_number(by, field)
            if by == 0.0:
                return None
            number /= abs(by)  # the sign stays that of the field itself
        return number

    return scaled


# --- conditions ------------------------------------------------------------------------------------------------------

_TESTS = ("starts_with", "equals", "in", "present", "less_than", "greater_than")


def _same(left: Any, right: Any) -> bool:
    return left == right and (type(left) is bool) == (type(right) is bool)


def _number_or_none(value: Any) -> float | None:
    try:
        return to_number(value, "condition")
    except EventRefused:
        return None


def _condition(get: Get, test: str, wanted: Any) -> Callable[[dict], bool]:
    if test == "starts_with":
        starts = tuple(wanted) if isinstance(wanted, list) else wanted
        return lambda event: (_scalar_text(get(event)) or "").startswith(starts)
    if test == "present":
        return lambda event: (get(event) not in (None, "")) is wanted
    if test == "equals":
        return lambda event: _same(get(event), wanted)
    if test == "in":
        return lambda event: any(_same(get(event), one) for one in wanted)
    if test == "less_than":
        return lambda event: (n := _number_or_none(get(event))) is not None and n < wanted
    return lambda event: (n := _number_or_none(get(event))) is not None and n > wanted


# --- the file --------------------------------------------------------------------------------------------------------


class _File:
    """A platform file under compilation. Every method raises `PlatformFileError` with the line of the culprit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text("utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8"
            raise PlatformFileError(path, None, f"cannot be read: {why}") from None
        try:
            self.root = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            found = re.search(r"at line (\d+)", str(error))
            last = text.count("\n") + 1
            raise PlatformFileError(path, int(found[1]) if found else last, f"not TOML: {error}") from None
        self.lines = key_lines(text)
        known = ("name", "description", "topics", "heads", "event_id", "kind", "time", "fields", "replay")
        self.known_keys(self.root, (), known)
        self.typed(self.root.get("description", ""), str, ("description",), "a text")
        self.kinds: set[str] = set()
        self.roots: dict[str, set[str]] = defaultdict(set)  # field → top-level keys of its paths
        self.fields = self.table((), "fields")
        self.known_keys(self.fields, ("fields",), FIELDS)
        if "user" not in self.fields:
            self.fail(("fields",), "`user` is missing: say where the event names its user")

    # -- checks --

    def fail(self, where: KeyPath, reason: str) -> NoReturn:
        label = ".".join(map(str, where))
        while where and where not in self.lines:
            where = where[:-1]
        raise PlatformFileError(self.path, self.lines.get(where, 1), f"{label}: {reason}" if label else reason)

    def typed(self, value: Any, kind: type | tuple, where: KeyPath, wanted: str) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(where, f"must be {wanted}")
        return value

    def known_keys(self, table: dict, where: KeyPath, known: Iterable[str]) -> None:
        for key in table:
            if key not in known:
                self.fail((*where, key), f"unknown key; known here: {', '.join(known)}")

    def table(self, where: KeyPath, key: str) -> dict:
        root = self.root
        for step_ in where:
            root = root[step_]
        if key not in root:
            self.fail((*where, key), f"the table [{key}] is missing")
        return self.typed(root[key], dict, (*where, key), "a table")

    def texts(self, value: Any, where: KeyPath, *, empty_ok: bool = False) -> list[str]:
        """A non-empty list of texts without repeats."""
        self.typed(value, list, where, "a list of texts")
        if not value:
            self.fail(where, "must not be empty")
        for i, text in enumerate(value):
            self.text(text, (*where, i), empty_ok=empty_ok)
            if text in value[:i]:
                self.fail((*where, i), f"{text!r} stands twice")
        return value

    def text(self, value: Any, where: KeyPath, *, empty_ok: bool = False) -> str:
        self.typed(value, str, where, "a text")
        if not value and not empty_ok:
            self.fail(where, "must not be empty")
        return value

    def text_table(self, value: Any, where: KeyPath) -> dict[str, str]:
        self.typed(value, dict, where, "a table of texts")
        if not value:
            self.fail(where, "must not be empty")
        return {key: self.text(value[key], (*where, key)) for key in value}

    def exactly_one(self, table: dict, where: KeyPath, keys: Sequence[str]) -> str:
        found = [key for key in keys if key in table]
        if len(found) != 1:
            culprit = (*where, found[1]) if found else where
            self.fail(culprit, f"exactly one of {', '.join(keys)} is needed, found {', '.join(found) or 'none'}")
        return found[0]

    # -- parts --

    def name(self) -> str:
        name = self.typed(self.root.get("name", self.path.stem), str, ("name",), "a text")
        if not _NAME.fullmatch(name):
            self.fail(("name",), "must be 1 to 64 of the characters A-Z a-z 0-9 _ . - and begin with a letter or digit")
        return name

    def topics(self) -> tuple[str, ...]:
        if "topics" not in self.root:
            self.fail(("topics",), "is missing: which topics does the platform write to?")
        for i, topic in enumerate(self.texts(self.root["topics"], ("topics",))):
            if not _TOPIC.fullmatch(topic) or topic in (".", ".."):
                self.fail(("topics", i), f"{topic!r} is no topic name of at most 200 characters")
        return tuple(self.root["topics"])

    def heads(self) -> tuple[str, ...]:
        if "heads" not in self.root:
            self.fail(("heads",), f"is missing: which of {', '.join(HEADS)} can be predicted here?")
        for i, head in enumerate(self.texts(self.root["heads"], ("heads",))):
            if head not in HEADS:
                self.fail(("heads", i), f"{head!r} is not one of {', '.join(HEADS)}")
        return tuple(head for head in HEADS if head in self.root["heads"])

    def check_heads(self, heads: tuple[str, ...]) -> None:
        if "category" in heads and "category" not in self.fields:
            self.fail(("heads",), "has category, but fields.category is absent")
        if "purchase" in heads and "purchase" not in self.kinds:
            self.fail(("heads",), "has purchase, but no kind is a purchase")

    def event_id_rule(self) -> tuple[bytes | None, bool]:
        """→ (what a hash of the content begins with, or None; whether the id is the place in the source topic)."""
        rule = self.root.get("event_id")
        if rule is None:
            return None, "event_id" not in self.fields
        if rule not in ("source", "content_hash"):
            self.fail(("event_id",), 'must be "source" or "content_hash"; a field of the event goes under [fields]')
        if "event_id" in self.fields:
            self.fail(("event_id",), "stands beside fields.event_id: keep one of them")
        # The platform's name goes in, so that equal bytes on two platforms are two events.
        return (self.name().encode() + b"\0", False) if rule == "content_hash" else (None, True)

    def kind(self) -> Callable[[dict], str]:
        table = self.table((), "kind")
        where = ("kind",)
        if "rules" in table:
            self.known_keys(table, where, ("rules",))
            return self.kind_by_rules()
        if "literal" in table:
            self.known_keys(table, where, ("literal",))
            kind = self.our_kind(table["literal"], ("kind", "literal"))
            return lambda event: kind
        if "names" not in table:
            self.fail(where, "needs names, rules or a literal")
        names = self.text_table(table["names"], ("kind", "names"))
        for key, kind in names.items():
            self.our_kind(kind, ("kind", "names", key))
        get = self.compile_source({k: v for k, v in table.items() if k != "names"}, where, "kind")
        return _kind_by_name(get, names, self.source("user"))

    def our_kind(self, kind: Any, where: KeyPath) -> str:
        if kind not in KINDS:
            self.fail(where, f"{kind!r} is not one of {', '.join(KINDS)}")
        self.kinds.add(kind)
        return kind

    def kind_by_rules(self) -> Callable[[dict], str]:
        rules, gets = [], []
        listed = self.typed(self.root["kind"]["rules"], list, ("kind", "rules"), "a list of tables")
        if not listed:
            self.fail(("kind", "rules"), "must not be empty")
        for i, rule in enumerate(listed):
            where: KeyPath = ("kind", "rules", i)
            self.typed(rule, dict, where, "a table")
            self.known_keys(rule, where, ("kind", "when"))
            if "kind" not in rule:
                self.fail(where, "`kind` is missing")
            kind = self.our_kind(rule["kind"], (*where, "kind"))
            if "when" not in rule:
                if i < len(listed) - 1:
                    self.fail(where, "holds always, so the rules after it never count")
                rules.append((kind, ()))
                continue
            whens = rule["when"] if isinstance(rule["when"], list) else [rule["when"]]
            if not whens:
                self.fail((*where, "when"), "must not be empty")
            at = [(*where, "when", j) if isinstance(rule["when"], list) else (*where, "when") for j in range(len(whens))]
            compiled = [self.condition(when, place) for when, place in zip(whens, at, strict=True)]
            gets += [get for get, _ in compiled]
            rules.append((kind, tuple(test for _, test in compiled)))
        return _kind_by_rules(tuple(rules), gets)

    def condition(self, when: Any, where: KeyPath) -> tuple[Get, Callable[[dict], bool]]:
        self.typed(when, dict, where, "a table")
        test = self.exactly_one(when, where, _TESTS)
        wanted, place = when[test], (*where, test)
        if test == "starts_with":
            _ = self.texts(wanted, place) if isinstance(wanted, list) else self.text(wanted, place)
        elif test == "present":
            self.typed(wanted, bool, place, "true or false")
        elif test in ("less_than", "greater_than"):
            self.typed(wanted, (int, float), place, "a number")
        elif test == "in":
            self.typed(wanted, list, place, "a list")
        for i, one in enumerate(wanted if test == "in" else [wanted] if test == "equals" else []):
            if not isinstance(one, (str, int, float, bool)):
                self.fail((*place, i) if test == "in" else place, "must be a text, a number, true or false")
        get = self.compile_source({k: v for k, v in when.items() if k != test}, where, "kind")
        return get, _condition(get, test, wanted)

    def time(self) -> TimeField:
        table = self.table((), "time")
        where: KeyPath = ("time",)
        self.known_keys(table, where, ("path", "keys", "any", "unit", "format", "zone"))
        one = self.exactly_one(table, where, ("path", "keys", "any"))
        source = {one: table[one]}
        get = self.compile_source(source, where, "time")
        paths = []
        for i, part in enumerate(source["any"] if one == "any" else [source]):
            if isinstance(part, str):
                paths.append(tuple(part.split(".")))
            elif isinstance(part, dict) and len(part) == 1 and (part.keys() <= {"path", "keys"}):
                paths.append(tuple(part["keys"]) if "keys" in part else tuple(part["path"].split(".")))
            else:
                self.fail(("time", "any", i), "must be a path, as text or as { keys = [...] }")
        return TimeField(get, tuple(paths), self.time_format(table, where))

    def time_format(self, table: dict, where: KeyPath) -> TimeFormat:
        zone = ZoneInfo("UTC")
        if "zone" in table:
            zone = self.zone(self.text(table["zone"], (*where, "zone")), (*where, "zone"))
        if self.exactly_one(table, where, ("unit", "format")) == "unit":
            if table["unit"] not in UNITS:
                self.fail((*where, "unit"), f"must be one of {', '.join(UNITS)}")
            if "zone" in table:
                self.fail((*where, "zone"), "a count since the epoch has no zone")
            return unit_format(table["unit"])
        pattern = self.text(table["format"], (*where, "format"))
        if pattern == "iso":
            return iso_format(zone)
        try:
            return pattern_format(pattern, zone)
        except ValueError as error:
            self.fail((*where, "format"), f'neither "iso" nor a pattern: {error}')

    def zone(self, name: str, where: KeyPath) -> ZoneInfo:
        try:
            return ZoneInfo(name)
        except (KeyError, ValueError, OSError):  # unknown; absolute or with ..; a folder of zones
            self.fail(where, f"{name!r} is no IANA time zone such as Europe/London")

    def source(self, field: str) -> Get | None:
        if field not in self.fields:
            return None
        spec = self.fields[field]
        if field == "user" and isinstance(spec, dict):  # pseudonyms are of the platform's own id, as it is
            for key in {"map", "otherwise", "words", "prefix"} & spec.keys():
                self.fail(("fields", field, key), "the user's id stays as the platform has it")
        return self.compile_source(spec, ("fields", field), field)

    def compile_source(self, spec: Any, where: KeyPath, field: str, depth: int = 0) -> Get:
        """A SOURCE → its closure. `field` decides which modifiers it may have."""
        if depth > 8:
            self.fail(where, "nested more than 8 deep")
        if isinstance(spec, str):
            spec, at = {"path": spec}, where
        elif isinstance(spec, list):
            spec, at = {"any": spec}, where
        else:
            self.typed(spec, dict, where, "a path, a list of sources or a table")
            at = None
        number = ("scale", "divide_by") if field in _NUMBERS else ()
        modifiers = ("separator", "null", "map", "otherwise", "words", "prefix", *number)
        self.known_keys(spec, where, ("path", "keys", "literal", "any", "join", *modifiers))
        one = self.exactly_one(spec, where, ("path", "keys", "literal", "any", "join"))
        get = self.base(spec, one, at or (*where, one), field, depth)
        if "separator" in spec and one != "join":
            self.fail((*where, "separator"), "belongs to join")
        return self.modified(get, spec, where, field)

    def base(self, spec: dict, one: str, at: KeyPath, field: str, depth: int) -> Get:
        value = spec[one]
        if one == "path":
            keys = self.text(value, at).split(".")
            if "" in keys:
                self.fail(at, "a dotted path has an empty part; use `keys` for names with dots")
            self.roots[field].add(keys[0])
            return _path_getter(tuple(keys))
        if one == "keys":
            if not self.typed(value, list, at, "a list of names and positions"):
                self.fail(at, "must not be empty")
            for i, key in enumerate(value):
                self.typed(key, (str, int), (*at, i), "a name or a position from 0")
                if isinstance(key, int) and key < 0:
                    self.fail((*at, i), "positions count from 0")
            if not isinstance(value[0], str):
                self.fail((*at, 0), "an event is an object: the first key must be a name")
            self.roots[field].add(value[0])
            return _path_getter(tuple(value))
        if one == "literal":
            self.typed(value, (str, int, float), at, "a text or a number")
            return lambda event: value
        if not self.typed(value, list, at, "a list of sources"):
            self.fail(at, "must not be empty")
        gets = [self.compile_source(part, (*at, i), field, depth + 1) for i, part in enumerate(value)]
        if one == "any":
            return _first_of(gets)
        separator = self.text(spec.get("separator", " "), (*at[:-1], "separator"), empty_ok=True)
        return _joined(gets, separator)

    def modified(self, get: Get, spec: dict, where: KeyPath, field: str) -> Get:
        if "null" in spec:
            get = _nulled(get, frozenset(self.texts(spec["null"], (*where, "null"), empty_ok=True)))
        if "map" in spec:
            otherwise = spec.get("otherwise")
            if otherwise is not None:
                self.text(otherwise, (*where, "otherwise"))
            get = _mapped(get, self.text_table(spec["map"], (*where, "map")), otherwise)
        elif "otherwise" in spec:
            self.fail((*where, "otherwise"), "belongs to map")
        if "words" in spec:
            table = self.text_table(spec["words"], (*where, "words"))
            for word in table:
                if not _WORD.fullmatch(word) or word != word.lower():
                    self.fail((*where, "words", word), "must be one word of small letters")
            get = _by_words(get, table)
        if "prefix" in spec:
            get = _prefixed(get, self.text(spec["prefix"], (*where, "prefix")), field)
        if "scale" in spec or "divide_by" in spec:
            scale = self.typed(spec.get("scale", 1.0), (int, float), (*where, "scale"), "a number")
            if not 0 < scale < float("inf"):
                self.fail((*where, "scale"), "must be greater than 0")
            divisor = None
            if "divide_by" in spec:
                divisor = self.compile_source(spec["divide_by"], (*where, "divide_by"), "divisor")
            get = _scaled(get, float(scale), divisor, field)
        return get

    def replay(self, topics: tuple[str, ...]) -> Replay | None:
        if "replay" not in self.root:
            return None
        table, where = self.table((), "replay"), ("replay",)
        self.known_keys(table, where, ("files", "topic", "join"))
        if "files" not in table:
            self.fail(where, "`files` is missing")
        files = self.texts(table["files"], (*where, "files"))
        for i, name in enumerate(files):
            self.file_name(name, (*where, "files", i))
        topic = table.get("topic", topics[0])
        if topic not in topics:
            self.fail((*where, "topic"), f"{topic!r} is not one of the platform's topics")
        joins = self.typed(table.get("join", []), list, (*where, "join"), "a list of tables")
        return Replay(tuple(files), topic, tuple(self.join(j, (*where, "join", i)) for i, j in enumerate(joins)))

    def join(self, table: Any, where: KeyPath) -> Join:
        self.typed(table, dict, where, "a table")
        self.known_keys(table, where, ("file", "on", "key", "columns"))
        for key in ("file", "on", "columns"):
            if key not in table:
                self.fail(where, f"`{key}` is missing")
        on = self.text(table["on"], (*where, "on"))
        key = self.text(table.get("key", on), (*where, "key"))
        file = self.file_name(table["file"], (*where, "file"))
        return Join(file, on, key, tuple(self.texts(table["columns"], (*where, "columns"))))

    def file_name(self, name: Any, where: KeyPath) -> str:
        self.text(name, where)
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            self.fail(where, "must be a path inside the data directory")
        if not name.endswith((".parquet", ".csv", ".jsonl")):
            self.fail(where, "must end in .parquet, .csv or .jsonl")
        return name


def _kind_by_name(get: Get, names: dict[str, str], raw_user: Get) -> Callable[[dict], str]:
    def kind(event: dict) -> str:
        value = get(event)
        if type(value) is str:
            found = names.get(value)
            if found is not None:
                return found
        if value is None or value == "":
            raise EventRefused("missing", "kind: absent or null")
        text = _scalar_text(value)
        if text is None:
            raise EventRefused("wrong_type", f"kind: {_json_type(value)}, not a name")
        found = names.get(text)
        if found is not None:
            return found
        user = _scalar_text(raw_user(event))
        # The platform's name of the kind helps whoever reads the dead letter, unless the user's id is in it.
        shown = "" if len(text) > 64 or user is None or user in text else f" {text!r}"
        raise EventRefused("unknown_kind", f"kind{shown} is not in the platform file")

    return kind


def _kind_by_rules(rules: tuple, gets: list[Get]) -> Callable[[dict], str]:
    def kind(event: dict) -> str:
        for name, conditions in rules:
            for holds in conditions:
                if not holds(event):
                    break
            else:
                return name
        if all(get(event) in (None, "") for get in gets):
            raise EventRefused("missing", "kind: nothing that its rules look at is present")
        raise EventRefused("unknown_kind", "kind: no rule of the platform file holds")

    return kind


# --- loading ---------------------------------------------------------------------------------------------------------


def load_platform(path: Path | str) -> Platform:
    """One file → its platform. Raises `PlatformFileError`."""
    return Platform(_File(Path(path)))


def load_platforms(directory: Path | str | None = None, names: Iterable[str] = ()) -> list[Platform]:
    """The platform files of a folder (None: those that ship), by file name without .toml; no names: all of them.

    Raises `PlatformFileError` for a wrong file, for two platforms of one name or code, for a topic of two platforms;
    `ConfigError` where there is no such folder or file.
    """
    folder = SHIPPED if directory is None else Path(directory)
    if not folder.is_dir():
        raise ConfigError(f"the folder of platform files {folder} does not exist; set worker.platforms_dir")
    there = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    wanted = list(dict.fromkeys(names)) or list(there)
    lacking = [name for name in wanted if name not in there]
    if lacking or not there:
        raise ConfigError(f"{folder} holds no platform file {', '.join(lacking)}; it holds {', '.join(there) or 'none'}")
    platforms: list[Platform] = []
    for name in wanted:
        file = _File(there[name])
        platform = Platform(file)
        _refuse_clash(file, platform, platforms)
        platforms.append(platform)
    return platforms


def _refuse_clash(file: _File, platform: Platform, others: list[Platform]) -> None:
    for other in others:
        if platform.name == other.name:
            file.fail(("name",), f"{platform.name!r} is already the name of {other.path}")
        if platform.code == other.code:
            file.fail(("name",), f"{platform.name!r} has the same 16-bit code as {other.name!r}: change one name")
        for i, topic in enumerate(platform.topics):
            if topic in other.topics:
                file.fail(("topics", i), f"the topic {topic!r} belongs to {other.name!r} already ({other.path})")
