"""Raw records of a platform → canonical events as bytes, a batch at a time: what `Platform.canonicalise` gives, faster.

    scan ─► kind ─► user ─► time ─► price, quantity ─► write          compiled kernels over columns, no object an event
       └──────┴───────┴───────┴────────────┴── not sure of a record: Platform.canonicalise decides, for it alone

The kernels know the usual sources: paths, `any` of them, with `null` and `prefix`; `scale` and `divide_by`; names of kinds.
Any other source (rules, map, words, join, …) is a pure function of the values at its paths, so the platform's own closure
is called once for each new combination of them and its answer remembered. Refusals are never made here: the plain path
makes them. Knows platforms and JSON; not Kafka, not people and their accounts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import chain, pairwise
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import numba
import numpy as np

from models.config import PseudonymConfig
from models.errors import EventRefused
from models.events import KIND_CODE, KINDS, MAX_ID, MAX_TEXT, PSEUDONYM_LENGTH
from streams import vectors
from streams.json_scan import (
    AT,
    DECIMALS,
    ESCAPED,
    FLOAT,
    INT,
    KIND,
    LENGTH,
    MANTISSA,
    NULL,
    TEXT,
    Paths,
    compile_paths,
    scan,
)
from streams.platforms import (
    MAX_CURRENCY,
    MAX_PRICE,
    MAX_QUANTITY,
    MAX_VALUE_BYTES,
    SHIPPED,
    Platform,
    decode_object,
    load_platform,
)
from streams.pseudonym import Pseudonymiser
from streams.sha256 import BLOCK, START, finish
from streams.timeformat import MAX_TS_MS
from streams.wire import Spans, read_only

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

_TEXTS = ("event_id", "item", "category", "brand", "currency", "session", "text")
"""The fields of text but the user, in the order of the rows of `_Plan.texts`."""
_EVENT_ID, _ITEM, _CATEGORY, _BRAND, _CURRENCY, _SESSION, _TEXT = range(len(_TEXTS))
_MOST = {"currency": MAX_CURRENCY, "text": MAX_TEXT}
_NUMBERS = ("price", "quantity")
_PRICE, _QUANTITY = range(2)

_NO_FIELD, _SIMPLE, _REMEMBERED, _OF_SOURCE = range(4)
"""How a field is read: not at all; from alternatives; by `_Memory`; of the place in the source topic (event_id)."""

_MEMORY = 16_384
"""Answers that a source remembers; then it begins anew."""
_LONGEST_REMEMBERED = 1024
"""Bytes of a value that is worth remembering."""
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
_POWERS = np.array([10**n for n in range(19)], np.int64)
_PAIRS = np.frombuffer(b"".join(b"%02d" % n for n in range(100)), np.uint8)
_PADDING = b" " * vectors.WIDTH
"""Behind constants and the like, so that they are copied 32 bytes at a time to their end."""
_QUARTER_MS = 900_000
_EXACT = 1 << 53
_MOST_DECIMALS = 6
_CANCEL = KIND_CODE["cancel"]
_NO_SPAN = -1

_kernel = numba.njit(cache=True, nogil=True, _nrt=False)  # without reference counts: no array is made in a kernel
_part = numba.njit(cache=True, nogil=True, _nrt=False, forceinline=True)
"""Of a kernel: a call would hand over each array as seven words or more, which took half of the time."""


class Canonical(NamedTuple):
    """Canonical events of a batch: n records."""

    sure: np.ndarray
    """bool (n,): False: `Platform.canonicalise` must decide; nothing else of the row means anything."""
    ts_ms: np.ndarray
    """int64 (n,): event times."""
    users: np.ndarray
    """uint8 (n, 24): pseudonyms of the accounts."""
    values: Spans
    """(n,): the canonical events as JSON."""
    user_at: np.ndarray
    """int64 (n,): where in the buffer of `values` the 24 characters of the user stand."""


class _Alternatives(NamedTuple):
    """A source as alternatives, of which the first present one counts."""

    paths: list[tuple[str | int, ...] | None]
    """None: `prefix` itself is the value."""
    prefixes: list[str]
    nulls: list[list[str]]


class _Odd(Exception):
    """A source that the kernels do not know."""


class _Plan(NamedTuple):
    """A platform, for the kernels. Indices into `constants` where spans are spoken of."""

    constants: np.ndarray
    """uint8."""
    alternatives: np.ndarray
    """int64 (A, 6): leaf or −1, place and bytes of the prefix, its characters, first and last of its `nulls`."""
    nulls: np.ndarray
    """int64 (M, 2): place and bytes."""
    texts: np.ndarray
    """int64 (7, 6): how it is read, first and last alternative, most characters, whether it is cut, column remembered."""
    numbers: np.ndarray
    """int64 (2, 7): how it is read, first and last alternative, whether scaled, first and last of the divisor, column."""
    factors: np.ndarray
    """float64 (2, 2): scale and the most that is taken."""
    user: np.ndarray
    """int64 (2,): first and last alternative."""
    time: np.ndarray
    """int64 (2,)."""
    kind: np.ndarray
    """int64 (4,): how it is read, first and last alternative, column."""
    names: np.ndarray
    """int64 (K, 3): place, bytes and code of a kind's name."""
    layout: np.ndarray
    """int64 (P, 2): the pieces of the time: (directive, 0) or (0, byte). See `_layout`."""
    unit: np.ndarray
    """int64 (2,): units in a ms and ms in a unit, as in timeformat; both 0 where the time is no number."""
    pieces: np.ndarray
    """int64 (18, 2): spans of what is written between the values of an event: 11, then one a kind."""


class Canonicaliser:
    """The fast way from one platform's records to canonical events, for one thread."""

    def __init__(self, platform: Platform, pseudonymiser: Pseudonymiser, fewest: int = 16) -> None:
        """Of less than `fewest` records nothing is sure: a batch costs as much as some twelve records the plain way."""
        self.platform = platform
        self.fewest = fewest
        self._pseudonymiser = pseudonymiser
        self._zone_shifts: dict[int, int | None] = {}
        self._room = np.empty((0, 0, 0), np.int64)
        self._memories: list[_Memory] = []
        builder = _Builder(platform)
        self._plan: _Plan | None = None
        with suppress(_Odd):  # then nothing is sure, and the platform's own path takes it all
            self._plan, self._paths, self._n_paths, self._memories = builder.build()
        self._zone = builder.zone
        prefix = platform.content_prefix
        self._prefix = None if prefix is None else np.frombuffer(prefix, np.uint8)

    def __call__(
        self, values: Spans, offsets: np.ndarray, *, topic: str, partition: int, now_ms: int, future_tolerance_ms: int
    ) -> Canonical:
        """Values and offsets (n,) of records of one partition → (n,) canonical events, where they are sure."""
        n = len(offsets)
        plan = self._plan
        if plan is None or n < self.fewest:
            nothing = Spans(np.empty(0, np.uint8), np.zeros(n, np.int64), np.zeros(n, np.int32))
            return Canonical(np.zeros(n, np.bool_), np.zeros(n, np.int64), np.zeros((n, 24), np.uint8), nothing, nothing.at)
        # Of one type always: each other type would be compiled anew.
        values = Spans(read_only(values.buffer), np.ascontiguousarray(values.at), np.ascontiguousarray(values.length))
        lengths = np.where(values.length > MAX_VALUE_BYTES, np.int32(-1), values.length)
        if len(self._room) < n or self._room.shape[1] != max(self._n_paths, 1):
            self._room = np.empty((n, max(self._n_paths, 1), 5), np.int64)  # fresh pages cost a tenth of the scan
        tokens = self._room[:n]
        sure = scan(values.buffer, values.at, lengths, self._paths, tokens)
        remembered = _Remembered(values, tokens, sure, len(self._memories) + 3)
        for column, memory in enumerate(self._memories):
            memory.recall(remembered, column)
        side = remembered.column
        kinds = np.zeros(n, np.uint8)
        _kinds(values.buffer, tokens, sure, plan.kind, plan.alternatives, plan.nulls, plan.constants, plan.names,
               remembered.numbers, kinds)  # fmt: skip
        users_at, users_length = np.zeros(n, np.int64), np.full(n, -1, np.int32)
        _users(values.buffer, tokens, sure, plan.user, plan.alternatives, plan.nulls, plan.constants, users_at, users_length)
        ts_ms = self._times(values.buffer, tokens, sure, now_ms + future_tolerance_ms)
        amounts, places = np.zeros((2, n)), np.zeros((2, n, 2), np.int64)
        for number in range(2):
            _amounts(values.buffer, tokens, sure, plan.numbers[number], plan.factors[number], plan.alternatives, plan.nulls,
                     plan.constants, kinds, remembered.numbers, amounts[number], places[number])  # fmt: skip
            remembered.write_odd(side + number, amounts[number], places[number])
        if self._prefix is not None:
            remembered.write_hashes(side + 2, self._prefix)
        users = self._pseudonymiser.of_many(self.platform.name, values.buffer, users_at, users_length)
        out, at, length, user_at = self._write(values, offsets, topic, partition, sure, tokens, kinds, users, ts_ms, places,
                                               remembered)  # fmt: skip
        return Canonical(sure, ts_ms, users, Spans(out, at, length), user_at)

    def _times(self, buffer: np.ndarray, tokens: np.ndarray, sure: np.ndarray, latest_ms: int) -> np.ndarray:
        """(n,) event times. Takes `sure` from the rows that have none, or one after `latest_ms`."""
        plan, n = self._plan, len(sure)
        ts_ms, state = np.zeros(n, np.int64), np.zeros(n, np.uint8)
        place = np.zeros((n, 2), np.int64)
        _read_times(buffer, tokens, sure, plan.time, plan.alternatives, plan.nulls, plan.constants, plan.layout, plan.unit,
                    ts_ms, state, place)  # fmt: skip
        local = np.flatnonzero(sure & (state == _LOCAL))
        if local.size and self._zone is not None:
            quarters, which = np.unique(ts_ms[local] // _QUARTER_MS, return_inverse=True)
            shifts = [self._shift_ms(quarter) for quarter in quarters.tolist()]
            known = np.array([shift is not None for shift in shifts])[which]
            ts_ms[local] -= np.array([shift or 0 for shift in shifts], np.int64)[which]
            state[local[~known]] = _UNREAD
        for i in np.flatnonzero(sure & (state == _UNREAD)).tolist():
            leaf, kind = place[i].tolist()
            at, length = tokens[i, leaf, AT], tokens[i, leaf, LENGTH]
            raw = buffer[at : at + length].tobytes()
            try:
                value = raw.decode() if kind == TEXT else _decode(b'"' + raw + b'"' if kind == ESCAPED else raw)
                ts_ms[i] = self.platform.time.format.read(value)
            except EventRefused:
                sure[i] = False
        sure &= (ts_ms >= 0) & (ts_ms <= min(latest_ms, MAX_TS_MS))
        return ts_ms

    def _shift_ms(self, quarter: int) -> int | None:
        """Offset in ms of the zone from UTC throughout a quarter of an hour of local time, None where it changes in it."""
        if quarter not in self._zone_shifts:
            if len(self._zone_shifts) >= _MEMORY:
                self._zone_shifts.clear()
            begin = datetime(1970, 1, 1) + timedelta(milliseconds=quarter * _QUARTER_MS)
            moments = [begin + timedelta(seconds=s) for s in (0, 1, 450, 898, 899, 899.999)]
            shifts = {moment.replace(tzinfo=self._zone).utcoffset() for moment in moments}
            shift = shifts.pop()
            self._zone_shifts[quarter] = None if shifts else round(shift.total_seconds() * 1000)
        return self._zone_shifts[quarter]

    def _write(
        self,
        values: Spans,
        offsets: np.ndarray,
        topic: str,
        partition: int,
        sure: np.ndarray,
        tokens: np.ndarray,
        kinds: np.ndarray,
        users: np.ndarray,
        ts_ms: np.ndarray,
        places: np.ndarray,
        remembered: _Remembered,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        plan, n = self._plan, len(sure)
        source = np.frombuffer(f"{topic}/{partition}/".encode(), np.uint8)
        side, spans = remembered.joined()
        at, length, user_at = np.zeros(n, np.int64), np.zeros(n, np.int32), np.zeros(n, np.int64)
        out = np.empty(int(values.length.sum()) + 300 * n + 4096, np.uint8)
        position, picked = np.zeros(2, np.int64), np.empty((len(_TEXTS), 3), np.int64)
        hashed = remembered.column + 2 if self._prefix is not None else -1
        while True:
            _write(values.buffer, tokens, sure, plan.texts, plan.alternatives, plan.nulls, plan.constants, plan.pieces,
                   source, offsets, kinds, users.reshape(-1), ts_ms, places, side, spans, remembered.column, hashed, picked,
                   position, out, at, length, user_at)  # fmt: skip
            if position[0] == n:
                return out, at, length, user_at
            out = np.concatenate([out, np.empty(len(out) + 65_536, np.uint8)])


def warm() -> None:
    """Compiles every kernel into Numba's cache, or loads it from there."""
    nothing = Spans(np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.int32))
    pseudonymiser = Pseudonymiser(PseudonymConfig(key="of nobody, and used for nobody"))
    grocer = load_platform(SHIPPED / "sim_grocer.toml")  # has a source that is remembered
    Canonicaliser(grocer, pseudonymiser, fewest=0)(
        nothing, np.empty(0, np.int64), topic="warm", partition=0, now_ms=0, future_tolerance_ms=0
    )


# --- a platform file → a plan ------------------------------------------------------------------------------------------


class _Builder:
    """Compiles a platform's tables, which the platform file's checks have passed. Raises `_Odd` where it cannot."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.tables = platform.tables
        self.leaves: dict[tuple[str, ...], int] = {}
        self.constants = bytearray()
        self.alternatives: list[tuple[int, ...]] = []
        self.nulls: list[tuple[int, int]] = []
        self.memories: list[_Memory] = []
        key = self.tables["time"].get("zone", "UTC")
        self.zone = None if key == "UTC" else ZoneInfo(key)

    def build(self) -> tuple[_Plan, Paths, int, list[_Memory]]:
        fields, platform = self.tables["fields"], self.platform
        user = self.simple(fields["user"], literals=False)
        user_leaves = set(self.leaves.values())
        time = {key: value for key, value in self.tables["time"].items() if key not in ("unit", "format", "zone")}
        at = self.simple(time, literals=False)
        kind, names = self.kind()
        texts = [self.text(name, fields.get(name), platform.readers[name]) for name in _TEXTS]
        numbers, factors = zip(*(self.number(name, fields.get(name)) for name in _NUMBERS), strict=True)
        paths = compile_paths(list(self.leaves))
        if paths is None or any(user_leaves & set(memory.leaves) for memory in self.memories):
            raise _Odd  # what is remembered must not be a user's id
        unit = (0, 0)
        layout: list[tuple[int, int]] = []
        if "unit" in self.tables["time"]:
            unit = {"s": (0, 1000), "ms": (1, 1), "us": (1000, 0), "ns": (1_000_000, 0)}[self.tables["time"]["unit"]]
        else:
            layout = _layout(self.tables["time"]["format"])
        name = f'","platform":{_encode(platform.name).decode()},"user":"'
        between = ('{"event_id":"', name, ',"item":"', ',"category":"', ',"brand":"', ',"price":',
                   ',"currency":"', ',"quantity":', ',"session":"', ',"text":"', "}")  # fmt: skip
        kinds = [f'","kind":"{kind}","ts":' for kind in KINDS]
        pieces = [self.constant(text.encode()) for text in (*between, *kinds)]
        plan = _Plan(
            texts=_table(texts, 6),
            numbers=_table(numbers, 7),
            factors=np.array(factors, np.float64),
            user=np.array(user, np.int64),
            time=np.array(at, np.int64),
            kind=np.array(kind, np.int64),
            names=_table(names, 3),
            layout=_table(layout, 2),
            unit=np.array(unit, np.int64),
            pieces=_table(pieces, 2),
            constants=np.frombuffer(bytes(self.constants) + _PADDING, np.uint8),
            alternatives=_table(self.alternatives, 6),
            nulls=_table(self.nulls, 2),
        )
        return plan, paths, len(self.leaves), self.memories

    def constant(self, text: bytes) -> tuple[int, int]:
        at = len(self.constants)
        self.constants += text
        return at, len(text)

    def leaf(self, path: Sequence[str | int]) -> int:
        return self.leaves.setdefault(tuple(map(str, path)), len(self.leaves))

    def simple(self, spec: Any, *, literals: bool = True) -> tuple[int, int]:
        """A SOURCE of paths, texts, `any`, `null` and `prefix` → first and last of its alternatives."""
        source = _alternatives(spec)
        if not literals and any(path is None or prefix for path, prefix in zip(source.paths, source.prefixes, strict=True)):
            raise _Odd
        first = len(self.alternatives)
        for path, prefix, nulls in zip(source.paths, source.prefixes, source.nulls, strict=True):
            begin = len(self.nulls)
            self.nulls += [self.constant(null.encode()) for null in nulls]
            place = self.constant(_encode(prefix)[1:-1])
            leaf = -1 if path is None else self.leaf(path)
            self.alternatives.append((leaf, *place, len(prefix), begin, len(self.nulls)))
        return first, len(self.alternatives)

    def remember(self, specs: Sequence[Any], answer: Callable[[dict], Any]) -> int:
        leaves = sorted({self.leaf(path) for spec in specs for path in _paths(spec)})
        self.memories.append(_Memory(leaves, answer))
        return len(self.memories) - 1

    def kind(self) -> tuple[tuple[int, int, int, int], list[tuple[int, int, int]]]:
        table, answer = self.tables["kind"], self.platform.kind_of
        if "literal" in table:
            return (_NO_FIELD, KIND_CODE[table["literal"]], 0, 0), []
        if "rules" in table:
            whens = [rule.get("when", []) for rule in table["rules"]]
            specs = [when for listed in whens for when in (listed if isinstance(listed, list) else [listed])]
            tests = ("starts_with", "equals", "in", "present", "less_than", "greater_than")
            specs = [{key: value for key, value in spec.items() if key not in tests} for spec in specs]
            return (_REMEMBERED, 0, 0, self.remember(specs, lambda event: KIND_CODE[answer(event)])), []
        spec = {key: value for key, value in table.items() if key != "names"}
        try:
            first, last = self.simple(spec, literals=False)
        except _Odd:
            return (_REMEMBERED, 0, 0, self.remember([spec], lambda event: KIND_CODE[answer(event)])), []
        names = [(*self.constant(name.encode()), KIND_CODE[kind]) for name, kind in table["names"].items()]
        return (_SIMPLE, first, last, 0), names

    def text(self, name: str, spec: Any, answer: Callable[[dict], str | None]) -> tuple[int, ...]:
        most, cut = _MOST.get(name, MAX_ID), int(name == "text")
        if name == "event_id" and spec is None:
            return (_OF_SOURCE if self.platform.content_hash is None else _REMEMBERED, 0, 0, most, cut, 0)
        if spec is None:
            return (_NO_FIELD, 0, 0, most, cut, 0)
        try:
            return (_SIMPLE, *self.simple(spec), most, cut, 0)
        except _Odd:
            return (_REMEMBERED, 0, 0, most, cut, self.remember([spec], answer))

    def number(self, name: str, spec: Any) -> tuple[tuple[int, ...], tuple[float, float]]:
        most = MAX_PRICE if name == "price" else MAX_QUANTITY
        if spec is None:
            return (_NO_FIELD, 0, 0, 0, 0, 0, 0), (1.0, most)
        try:
            return self.simple_number(spec, most)
        except _Odd:
            answer = self.platform.readers[name]

            def signed(event: dict) -> float | None:
                try:
                    return answer(event, False)
                except EventRefused:
                    return -answer(event, True)  # what only a cancel may have

            column = self.remember([spec], signed)
            return (_REMEMBERED, 0, 0, 0, 0, 0, column), (1.0, most)

    def simple_number(self, spec: Any, most: float) -> tuple[tuple[int, ...], tuple[float, float]]:
        scale, divisor, scaled = 1.0, (0, 0), 0
        if isinstance(spec, dict):
            scaled = int("scale" in spec or "divide_by" in spec)
            scale = float(spec.get("scale", 1.0))
            if "divide_by" in spec:
                divisor = self.simple(spec["divide_by"], literals=False)
            spec = {key: value for key, value in spec.items() if key not in ("scale", "divide_by")}
        first, last = self.simple(spec, literals=False)
        return (_SIMPLE, first, last, scaled, *divisor, 0), (scale, most)


def _table(rows: Sequence[Sequence[int]], columns: int) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, columns)


def _alternatives(spec: Any) -> _Alternatives:
    """A SOURCE → its alternatives. Raises `_Odd` for what is none of the usual."""
    if isinstance(spec, str):
        spec = {"path": spec}
    if isinstance(spec, list):
        spec = {"any": spec}
    if not spec.keys() <= {"path", "keys", "literal", "any", "null", "prefix"}:
        raise _Odd
    if "any" in spec:
        if len(spec) > 1:
            raise _Odd
        parts = [_alternatives(part) for part in spec["any"]]
        return _Alternatives(*(list(chain(*column)) for column in zip(*parts, strict=True)))
    if "literal" in spec:
        if type(spec["literal"]) is float or "null" in spec:
            raise _Odd
        text = str(spec["literal"])
        return _Alternatives([None], [spec.get("prefix", "") + text if text else ""], [[]])
    path = spec["path"].split(".") if "path" in spec else spec["keys"]
    return _Alternatives([tuple(path)], [spec.get("prefix", "")], [spec.get("null", [])])


def _paths(spec: Any) -> list[tuple[str | int, ...]]:
    """All paths that a SOURCE looks at."""
    if isinstance(spec, str):
        return [tuple(spec.split("."))]
    if isinstance(spec, list):
        return [path for part in spec for path in _paths(part)]
    found = [path for key in ("any", "join", "divide_by") if key in spec for path in _paths(spec[key])]
    if "path" in spec:
        found += _paths(spec["path"])
    if "keys" in spec:
        found.append(tuple(spec["keys"]))
    return found


_YEAR, _MONTH, _DAY, _HOUR, _MINUTE, _SECOND, _ISO = range(1, 8)
_DIRECTIVES = {"Y": _YEAR, "m": _MONTH, "d": _DAY, "H": _HOUR, "M": _MINUTE, "S": _SECOND}


def _layout(pattern: str) -> list[tuple[int, int]]:
    """A time format → (directive, 0) or (0, byte) each; nothing where the kernel does not know one of its directives."""
    if pattern == "iso":
        return [(_ISO, 0)]
    out: list[tuple[int, int]] = []
    rest = iter(pattern)
    for character in rest:
        directive = next(rest) if character == "%" else ""
        if directive in ("", "%"):
            out += [(0, byte) for byte in (directive or character).encode()]
        elif directive in _DIRECTIVES:
            out.append((_DIRECTIVES[directive], 0))
        else:
            return []
    return out


# --- sources that are remembered ---------------------------------------------------------------------------------------


class _Remembered:
    """The columns of a batch that are made outside the kernels: texts as spans of one side buffer, and numbers."""

    def __init__(self, values: Spans, tokens: np.ndarray, sure: np.ndarray, columns: int) -> None:
        self.values, self.tokens, self.sure = values, tokens, sure
        self.column = columns - 3
        """The first of three columns after those of the memories: odd prices, odd quantities, hashes of the content."""
        self._spans = np.full((columns, len(sure), 2), _NO_SPAN, np.int64)
        self.numbers = np.zeros((columns, len(sure)))
        """float64 (columns, n); NaN where a source has none."""
        self._side: list[bytes | np.ndarray] = []
        self._bytes = 0

    def write(self, column: int, rows: np.ndarray, texts: list[bytes]) -> None:
        """`texts` of `rows` into a column."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        self._spans[column, rows, 0] = np.cumsum(lengths) - lengths + self._bytes
        self._spans[column, rows, 1] = lengths
        self._side += texts
        self._bytes += int(lengths.sum())

    def repeat(self, column: int, rows: np.ndarray, like: np.ndarray) -> None:
        """Gives `rows` what the rows `like` (as many) have in a column."""
        self.numbers[column, rows] = self.numbers[column, like]
        self._spans[column, rows] = self._spans[column, like]
        self.sure[rows] = self.sure[like]

    def write_odd(self, column: int, amounts_N: np.ndarray, places_N2: np.ndarray) -> None:
        """The numbers that the kernel has not written, as text."""
        rows = np.flatnonzero(self.sure & (places_N2[:, 1] == _WRITTEN_OUT))
        if rows.size:
            self.write(column, rows, [_encode(amount) for amount in amounts_N[rows].tolist()])

    def write_hashes(self, column: int, prefix: np.ndarray) -> None:
        at, length = self.values.at, self.values.length
        longest = int(length.max(initial=0, where=self.sure))
        message, hashes_N40 = np.empty(len(prefix) + longest + 2 * BLOCK, np.uint8), np.empty((len(at), 40), np.uint8)
        _hashes(prefix, self.values.buffer, at, length, self.sure, message, np.empty(72, np.uint32), hashes_N40)
        self._spans[column, :, 0] = np.arange(self._bytes, self._bytes + hashes_N40.size, 40)
        self._spans[column, :, 1] = 40
        self._side.append(hashes_N40)
        self._bytes += hashes_N40.size

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """→ (side buffer uint8, spans int64 (columns, n, 2))."""
        return np.frombuffer(b"".join([*self._side, _PADDING]), np.uint8), self._spans


class _Memory:
    """One source: values at its paths → what the platform's closure makes of them, text, number or nothing.

    Rows that follow one with the same values, such as the lines of one invoice, have its answer without being looked up.
    """

    def __init__(self, leaves: list[int], answer: Callable[[dict], Any]) -> None:
        self.leaves = leaves
        self._leaves = np.array(leaves, np.int64)
        self._answer = answer
        self._known: dict[bytes, Any] = {}

    def recall(self, batch: _Remembered, column: int) -> None:
        """Fills a column of the batch; takes `sure` from the rows that have no answer."""
        changed, sizes = np.zeros((2, len(batch.sure)), np.int64)
        _changes(batch.values.buffer, batch.tokens, batch.sure, self._leaves, changed, sizes)
        rows = np.flatnonzero(batch.sure)
        firsts = np.flatnonzero(changed)
        keys, ends = self._keys(batch, changed, sizes[firsts])
        known = self._known
        answers = [known.get(keys[a:b], known) for a, b in pairwise(ends)]
        if len(known) > _MEMORY:
            known.clear()
        for i, (row, answer) in enumerate(zip(firsts.tolist(), answers, strict=True)):
            if answer is known:
                key = keys[ends[i] : ends[i + 1]]
                answers[i] = known[key] if key in known else self._ask(batch, row, key)
        self._fill(batch, column, firsts, answers)
        batch.repeat(column, rows, firsts[np.cumsum(changed[rows]) - 1])

    def _fill(self, batch: _Remembered, column: int, rows: np.ndarray, answers: list[Any]) -> None:
        refused = [answer is EventRefused for answer in answers]
        if any(refused):
            batch.sure[rows[refused]] = False
            rows, answers = rows[~np.array(refused)], [answer for answer in answers if answer is not EventRefused]
        there = [answer is not None for answer in answers]
        if not all(there):
            batch.numbers[column, rows[~np.array(there)]] = np.nan
            rows, answers = rows[there], [answer for answer in answers if answer is not None]
        if answers and type(answers[0]) is bytes:
            batch.write(column, rows, answers)
        else:
            batch.numbers[column, rows] = answers

    def _keys(self, batch: _Remembered, changed: np.ndarray, sizes: np.ndarray) -> tuple[bytes, list[int]]:
        ends = np.concatenate([[0], np.cumsum(sizes)])
        keys = np.empty(int(ends[-1]), np.uint8)
        _write_keys(batch.values.buffer, batch.tokens, changed, self._leaves, keys)
        return keys.tobytes(), ends.tolist()

    def _ask(self, batch: _Remembered, row: int, key: bytes) -> Any:
        at, length = int(batch.values.at[row]), int(batch.values.length[row])
        try:
            answer = self._answer(decode_object(batch.values.buffer[at : at + length].tobytes()))
        except EventRefused:
            return EventRefused  # not remembered: the plain path refuses it, with its reason
        if type(answer) is str:
            answer = _encode(answer)[1:-1]
        self._known[key] = answer
        return answer


# --- kernels -----------------------------------------------------------------------------------------------------------

_UNREAD, _READ, _LOCAL = range(3)
"""How far the kernel came with a time: not at all; to UTC; to local time."""
_NO_NUMBER, _WRITTEN_OUT = -1, -2
"""Second column of `places` of a number: none; from 0 up its decimals, its digits being the first; text at the side."""


@_kernel
def _hashes(prefix, buffer, at_N, length_N, sure_N, message, room, out_N40):
    """The first 40 hexadecimal digits of the SHA-256 of the prefix and each sure record. `message`: room for the
    longest."""
    w, state = room[:64], room[64:]
    for i in range(sure_N.size):
        if not sure_N[i]:
            continue
        position = _copy(message, 0, prefix, 0, prefix.size)
        position = _copy(message, position, buffer, at_N[i], np.int64(length_N[i]))
        for j in range(8):
            state[j] = START[j]
        finish(state, message, position, 0, w)
        for j in range(40):
            out_N40[i, j] = _DIGITS[(state[j >> 3] >> np.uint32(28 - 4 * (j & 7))) & np.uint32(15)]


@_kernel
def _changes(buffer, tokens, sure_N, leaves, changed_N, size_N):
    """Marks the sure rows whose values at `leaves` are not those of the sure row before, and says how long their keys are;
    takes `sure` from those with too long ones."""
    before = -1
    for i in range(sure_N.size):
        if not sure_N[i]:
            continue
        size, same = 0, before >= 0
        for k in range(leaves.size):
            leaf = leaves[k]
            kind = tokens[i, leaf, KIND]
            length = tokens[i, leaf, LENGTH] if kind > NULL else 0
            size += 5 + length
            if same:
                same = kind == tokens[before, leaf, KIND]
            if same and kind > NULL:
                last = tokens[before, leaf, LENGTH]
                same = _same(buffer, tokens[i, leaf, AT], length, buffer, tokens[before, leaf, AT], last)
        if size > _LONGEST_REMEMBERED:
            sure_N[i] = False
        else:
            changed_N[i], size_N[i], before = not same, size, i


@_kernel
def _write_keys(buffer, tokens, changed_N, leaves, out):
    position = 0
    for i in range(changed_N.size):
        if not changed_N[i]:
            continue
        for k in range(leaves.size):
            leaf = leaves[k]
            kind = tokens[i, leaf, KIND]
            length = tokens[i, leaf, LENGTH] if kind > NULL else 0
            out[position] = kind
            for j in range(4):
                out[position + 1 + j] = (length >> (8 * j)) & 0xFF
            position += 5
            for j in range(length):
                out[position + j] = buffer[tokens[i, leaf, AT] + j]
            position += length


@_part
def _pick(buffer, tokens, row, first, last, alternatives, nulls, constants):
    """The alternative that counts → (its number, place and bytes of its text); −1: none is present, −2: not sure."""
    for a in range(first, last):
        leaf = alternatives[a, 0]
        if leaf < 0:
            if alternatives[a, 2] > 0:
                return a, 0, 0
            continue
        kind = tokens[row, leaf, KIND]
        if kind <= NULL:
            continue
        at, length = tokens[row, leaf, AT], tokens[row, leaf, LENGTH]
        some_nulls = alternatives[a, 4] < alternatives[a, 5]
        if kind == TEXT:
            if length == 0:
                continue
        elif kind == FLOAT:
            whole = abs(tokens[row, leaf, MANTISSA])
            for _ in range(tokens[row, leaf, DECIMALS]):
                if whole % 10 != 0:
                    return -2, 0, 0
                whole //= 10
            if whole >= _EXACT:
                return -2, 0, 0
            length -= tokens[row, leaf, DECIMALS] + 1
        elif kind != INT and (kind != ESCAPED or some_nulls):
            return -2, 0, 0
        if some_nulls and _is_null(buffer, at, length, alternatives, a, nulls, constants):
            continue
        return a, at, length
    return -1, 0, 0


@_part
def _is_null(buffer, at, length, alternatives, a, nulls, constants):
    for k in range(alternatives[a, 4], alternatives[a, 5]):
        if _same(buffer, at, length, constants, nulls[k, 0], nulls[k, 1]):
            return True
    return False


@_part
def _same(left, left_at, left_length, right, right_at, right_length):
    if left_length != right_length:
        return False
    for j in range(left_length):  # noqa: SIM110 - Numba knows no generators
        if left[left_at + j] != right[right_at + j]:
            return False
    return True


@_kernel
def _kinds(buffer, tokens, sure_N, kind, alternatives, nulls, constants, names, numbers, out_N):
    for i in range(sure_N.size):
        if not sure_N[i]:
            continue
        if kind[0] == _NO_FIELD:
            out_N[i] = kind[1]
        elif kind[0] == _REMEMBERED:
            out_N[i] = np.uint8(numbers[kind[3], i])
        else:
            a, at, length = _pick(buffer, tokens, i, kind[1], kind[2], alternatives, nulls, constants)
            sure = False
            if a >= 0 and tokens[i, alternatives[a, 0], KIND] != ESCAPED:
                for k in range(names.shape[0]):
                    if _same(buffer, at, length, constants, names[k, 0], names[k, 1]):
                        out_N[i] = names[k, 2]
                        sure = True
                        break
            sure_N[i] = sure


@_kernel
def _users(buffer, tokens, sure_N, user, alternatives, nulls, constants, at_N, length_N):
    for i in range(sure_N.size):
        if sure_N[i]:
            a, at, length = _pick(buffer, tokens, i, user[0], user[1], alternatives, nulls, constants)
            if a < 0 or length > MAX_ID or tokens[i, alternatives[a, 0], KIND] == ESCAPED:
                sure_N[i] = False
            else:
                at_N[i], length_N[i] = at, length


@_kernel
def _read_times(
    buffer, tokens, sure_N, time, alternatives, nulls, constants, layout, unit, ts_N, state_N, place_N2
):  # fmt: skip
    for i in range(sure_N.size):
        if not sure_N[i]:
            continue
        leaf = -1
        for a in range(time[0], time[1]):
            leaf = alternatives[a, 0]
            kind = tokens[i, leaf, KIND]
            if kind > NULL and not (kind == TEXT and tokens[i, leaf, LENGTH] == 0):
                break
            leaf = -1
        if leaf < 0:
            sure_N[i] = False
            continue
        kind, at, length = tokens[i, leaf, KIND], tokens[i, leaf, AT], tokens[i, leaf, LENGTH]
        place_N2[i, 0], place_N2[i, 1] = leaf, kind
        if kind == INT and unit[0] + unit[1] > 0 and length <= 15:
            mantissa = tokens[i, leaf, MANTISSA]
            ts_N[i] = mantissa * unit[1] if unit[1] > 0 else mantissa // unit[0]
            state_N[i] = _READ
        elif kind == TEXT and layout.shape[0] == 1 and layout[0, 0] == _ISO:
            ts_N[i], state_N[i] = _read_iso(buffer, at, length)
        elif kind == TEXT and layout.shape[0] > 0:
            ts_N[i], state_N[i] = _read_layout(buffer, at, length, layout)


@_part
def _two(buffer, at):
    """The number of two digits at `at`, −1 where there is none."""
    high, low = np.int64(buffer[at]) - 48, np.int64(buffer[at + 1]) - 48
    return high * 10 + low if 0 <= high <= 9 and 0 <= low <= 9 else -1


@_part
def _read_iso(buffer, at, length):
    """YYYY-MM-DDTHH:MM:SS, then .mmm or .uuuuuu or nothing, then Z or ±HH:MM or nothing → (ms, how far it came)."""
    if length < 19:
        return 0, _UNREAD
    between = buffer[at + 10]
    if not (
        buffer[at + 4] == 45 and buffer[at + 7] == 45 and (between == 84 or between == 32)
        and buffer[at + 13] == 58 and buffer[at + 16] == 58
    ):  # fmt: skip
        return 0, _UNREAD
    century, year = _two(buffer, at), _two(buffer, at + 2)
    if century < 0 or year < 0:
        return 0, _UNREAD
    ms = _moment_ms(
        century * 100 + year, _two(buffer, at + 5), _two(buffer, at + 8), _two(buffer, at + 11), _two(buffer, at + 14),
        _two(buffer, at + 17),
    )  # fmt: skip
    if ms < 0:
        return 0, _UNREAD
    j = 19
    if j < length and buffer[at + j] == 46:
        digits = 0
        while j + 1 + digits < length and 48 <= buffer[at + j + 1 + digits] <= 57:
            digits += 1
        if digits != 3 and digits != 6:
            return 0, _UNREAD
        ms += 10 * _two(buffer, at + j + 1) + np.int64(buffer[at + j + 3]) - 48
        j += 1 + digits
    if j == length:
        return ms, _LOCAL
    if j + 1 == length and buffer[at + j] == 90:
        return ms, _READ
    sign = buffer[at + j]
    if j + 6 != length or (sign != 43 and sign != 45) or buffer[at + j + 3] != 58:
        return 0, _UNREAD
    hours, minutes = _two(buffer, at + j + 1), _two(buffer, at + j + 4)
    if not (0 <= hours <= 23 and 0 <= minutes <= 59):
        return 0, _UNREAD
    shift = (hours * 60 + minutes) * 60_000
    return ms - shift if sign == 43 else ms + shift, _READ


@_part
def _read_layout(buffer, at, length, layout):
    """Local time in a layout of digits: as many of a number as there are, at most two (four of a year)."""
    year, month, day, hour, minute, second = -1, -1, -1, 0, 0, 0
    j = 0
    for k in range(layout.shape[0]):
        directive = layout[k, 0]
        if directive == 0:
            if j >= length or buffer[at + j] != layout[k, 1]:
                return 0, _UNREAD
            j += 1
            continue
        most = 4 if directive == _YEAR else 2
        number, digits = 0, 0
        while digits < most and j < length and 48 <= buffer[at + j] <= 57:
            number = number * 10 + np.int64(buffer[at + j]) - 48
            j += 1
            digits += 1
        if digits == 0 or (directive == _YEAR and digits < 4):
            return 0, _UNREAD
        if directive == _YEAR:
            year = number
        elif directive == _MONTH:
            month = number
        elif directive == _DAY:
            day = number
        elif directive == _HOUR:
            hour = number
        elif directive == _MINUTE:
            minute = number
        else:
            second = number
    ms = _moment_ms(year, month, day, hour, minute, second) if j == length else -1
    return (ms, _LOCAL) if ms >= 0 else (0, _UNREAD)


@_kernel
def _moment_ms(year, month, day, hour, minute, second):
    """ms since 1970 of a moment of the years 1971 to 9998, −1 where there is no such moment."""
    if not (1971 <= year <= 9998 and 1 <= month <= 12 and 0 <= hour <= 23 and 0 <= minute <= 59 and 0 <= second <= 59):
        return -1
    leap = (year % 4 == 0 and year % 100 != 0) or year % 400 == 0
    days_in = 28 + leap if month == 2 else 30 if month == 4 or month == 6 or month == 9 or month == 11 else 31
    if not 1 <= day <= days_in:
        return -1
    # Years that begin with March: the leap day is their last.
    shifted = year - 1 if month <= 2 else year
    month_from_march = (month + 9) % 12
    days = 365 * shifted + shifted // 4 - shifted // 100 + shifted // 400 + (153 * month_from_march + 2) // 5 + day - 1
    return (((days - 719_468) * 24 + hour) * 60 + minute) * 60_000 + second * 1000


@_part
def _decimal(buffer, at, length):
    """A text of a number, -?digits[.digits] of at most 15 digits → (digits with the sign, decimals); decimals −1: none."""
    j, minus = 0, False
    if length > 0 and buffer[at] == 45:
        j, minus = 1, True
    number, digits, decimals, point = 0, 0, 0, False
    while j < length:
        c = np.int64(buffer[at + j])
        if c == 46 and not point and digits > 0:
            point = True
        elif 48 <= c <= 57 and digits < 15:
            number = number * 10 + c - 48
            digits += 1
            decimals += point
        else:
            return 0, -1
        j += 1
    if digits == 0 or (point and decimals == 0) or (minus and number == 0):
        return 0, -1
    return -number if minus else number, decimals


@_part
def _pick_number(buffer, tokens, row, first, last, alternatives, nulls, constants):
    """The number that counts → (1, digits, decimals); (0, …): none is present; (−1, …): not sure."""
    for a in range(first, last):
        leaf = alternatives[a, 0]
        kind = tokens[row, leaf, KIND]
        if kind <= NULL:
            continue
        at, length = tokens[row, leaf, AT], tokens[row, leaf, LENGTH]
        if kind == TEXT:
            if length == 0:
                continue
            if _is_null(buffer, at, length, alternatives, a, nulls, constants):
                continue
            number, decimals = _decimal(buffer, at, length)
            return (1, number, decimals) if decimals >= 0 else (-1, 0, 0)
        if kind != INT and kind != FLOAT:
            return -1, 0, 0
        if alternatives[a, 4] < alternatives[a, 5]:
            chosen, _, _ = _pick(buffer, tokens, row, a, a + 1, alternatives, nulls, constants)
            if chosen == -1:
                continue
            if chosen == -2 and kind == INT:
                return -1, 0, 0
        number = tokens[row, leaf, MANTISSA]
        return (1, number, tokens[row, leaf, DECIMALS]) if abs(number) < _EXACT else (-1, 0, 0)
    return 0, 0, 0


@_kernel
def _power_of_ten(n):
    power = 1.0
    for _ in range(n):
        power *= 10.0
    return power


@_kernel
def _amounts(
    buffer, tokens, sure_N, number, factors, alternatives, nulls, constants, kinds_N, remembered, amount_N, place_N2
):  # fmt: skip
    """A price or quantity → its digits and decimals where these are exactly the number, else the number to be written.

    A number below 2^53 over a power of ten up to 10^22 is the nearest double to its decimals, which so need no parser.
    """
    for i in range(sure_N.size):
        place_N2[i, 1] = _NO_NUMBER
        if not sure_N[i] or number[0] == _NO_FIELD:
            continue
        digits, decimals, known = 0, 0, False
        if number[0] == _REMEMBERED:
            value = remembered[number[6], i]
            if np.isnan(value):
                continue
        else:
            there, digits, decimals = _pick_number(buffer, tokens, i, number[1], number[2], alternatives, nulls, constants)
            if there < 0:
                sure_N[i] = False
            if there <= 0:
                continue
            value = digits / _power_of_ten(decimals)
            known = number[3] == 0
            if not known:
                value *= factors[0]
                if number[4] < number[5]:
                    there, by, by_decimals = _pick_number(
                        buffer, tokens, i, number[4], number[5], alternatives, nulls, constants
                    )
                    if there < 0:
                        sure_N[i] = False
                    if there <= 0 or by == 0:
                        continue
                    value /= abs(by / _power_of_ten(by_decimals))
        if value < 0.0 and kinds_N[i] == _CANCEL:
            value, digits = -value, -digits
        if not 0.0 <= value <= factors[1]:
            sure_N[i] = False
            continue
        if not known:
            digits, decimals = _short(value)
        amount_N[i] = value
        if decimals >= 0 and not np.signbit(value) and (value == 0.0 or value >= 1e-4):
            place_N2[i, 0], place_N2[i, 1] = digits, decimals
        else:
            place_N2[i, 1] = _WRITTEN_OUT


@_kernel
def _short(value):
    """(digits, decimals) of at most 15 digits that are exactly this double, decimals −1 where there are none so short."""
    power = 1.0
    for decimals in range(_MOST_DECIMALS + 1):
        digits = np.rint(value * power)
        if digits < 1e15 and digits / power == value:
            return np.int64(digits), decimals
        power *= 10.0
    return 0, -1


@_part
def _copy(out, position, source, at, length):
    """→ the position after the copy. 32 bytes at a time where both have room for it: bytes behind are written over."""
    if at + length + vectors.WIDTH <= source.size and position + length + vectors.WIDTH <= out.size:
        for j in range(0, length, vectors.WIDTH):
            vectors.copy(out, position + j, source, at + j)
    else:
        for j in range(length):
            out[position + j] = source[at + j]
    return position + length


@_part
def _digits_of(number):
    """How many digits a number from 0 up has."""
    digits = 13 if number >= _POWERS[12] else 5 if number >= _POWERS[4] else 1
    while digits < 19 and number >= _POWERS[digits]:
        digits += 1
    return digits


@_part
def _copy_number(out, position, number, width):
    """A number from 0 up in `width` digits, which are enough; with zeros in front."""
    rest, after = np.uint64(number), position + width
    while after - 2 >= position:
        less = rest // np.uint64(100)
        pair = np.uint64(2) * (rest - less * np.uint64(100))
        out[after - 2], out[after - 1] = _PAIRS[pair], _PAIRS[pair + np.uint64(1)]
        rest = less
        after -= 2
    if after > position:
        out[position] = np.uint64(48) + rest
    return position + width


@_part
def _copy_decimal(out, position, digits, decimals):
    """A number from 0 up with a point, as short as it goes: 12 → 12.0, 1250 with two decimals → 12.5."""
    while decimals > 0 and digits % 10 == 0:
        digits //= 10
        decimals -= 1
    if decimals == 0:
        digits *= 10
        decimals = 1
    position = _copy_number(out, position, digits, max(_digits_of(digits), decimals + 1))
    for j in range(position, position - decimals, -1):
        out[j] = out[j - 1]
    out[position - decimals] = 46
    return position + 1


@_kernel
def _cut(buffer, at, length, most):
    """Bytes of the first `most` characters of valid UTF-8."""
    characters = 0
    for j in range(length):
        if buffer[at + j] & 0xC0 != 0x80:
            if characters == most:
                return j
            characters += 1
    return length


@_part
def _pick_text(buffer, tokens, row, text, alternatives, nulls, constants, spans, field, hashed, picked):
    """Where a text is, into picked[field]: (alternative or −1 none or −3 at the side, place, bytes). False: unsure."""
    picked[field, 0], picked[field, 1], picked[field, 2] = -1, 0, 0
    if text[field, 0] == _REMEMBERED:
        column = hashed if field == _EVENT_ID and hashed >= 0 else text[field, 5]
        if spans[column, row, 1] > 0:
            picked[field, 0], picked[field, 1], picked[field, 2] = -3, spans[column, row, 0], spans[column, row, 1]
        return True
    if text[field, 0] != _SIMPLE:
        return True
    a, at, length = _pick(buffer, tokens, row, text[field, 1], text[field, 2], alternatives, nulls, constants)
    if a == -2:
        return False
    if a >= 0:
        most = text[field, 3]
        if alternatives[a, 3] + length > most:
            if text[field, 4] == 0 or alternatives[a, 0] < 0 or tokens[row, alternatives[a, 0], KIND] == ESCAPED:
                return False
            if alternatives[a, 3] >= most:
                return False
            length = _cut(buffer, at, length, most - alternatives[a, 3])
    picked[field, 0], picked[field, 1], picked[field, 2] = a, at, length
    return True


@_part
def _write_text(out, position, field, piece, picked, buffer, side, alternatives, constants, pieces):
    a = picked[field, 0]
    if a == -1:
        return position
    position = _copy(out, position, constants, pieces[piece, 0], pieces[piece, 1])
    if a == -3:
        position = _copy(out, position, side, picked[field, 1], picked[field, 2])
    else:
        position = _copy(out, position, constants, alternatives[a, 1], alternatives[a, 2])
        position = _copy(out, position, buffer, picked[field, 1], picked[field, 2])
    if field != _EVENT_ID:
        out[position] = 34
        position += 1
    return position


@_part
def _write_amount(out, position, row, piece, places, side, spans, column, constants, pieces):
    if places[row, 1] == _NO_NUMBER:
        return position
    position = _copy(out, position, constants, pieces[piece, 0], pieces[piece, 1])
    if places[row, 1] == _WRITTEN_OUT:
        return _copy(out, position, side, spans[column, row, 0], spans[column, row, 1])
    return _copy_decimal(out, position, places[row, 0], places[row, 1])


@_kernel
def _write(
    buffer, tokens, sure_N, texts, alternatives, nulls, constants, pieces, source, offsets, kinds_N, users, ts_N,
    places, side, spans, odd, hashed, picked, position, out, at_N, length_N, user_at_N,
):  # fmt: skip
    """Events into `out` from row position[0] on, at position[1]; stops in front of a row for which there may be no room."""
    p = position[1]
    for i in range(position[0], sure_N.size):
        if not sure_N[i]:
            continue
        room = constants.size + source.size + 256 + vectors.WIDTH
        sure = True
        for field in range(texts.shape[0]):
            if field == _CURRENCY and places[_PRICE, i, 1] == _NO_NUMBER:
                picked[field, 0] = -1
                continue
            if not _pick_text(buffer, tokens, i, texts, alternatives, nulls, constants, spans, field, hashed, picked):
                sure = False
                break
            room += picked[field, 2]
            if picked[field, 0] >= 0:
                room += alternatives[picked[field, 0], 2]
        if not sure or (texts[_EVENT_ID, 0] != _OF_SOURCE and picked[_EVENT_ID, 0] == -1):
            sure_N[i] = False
            continue
        if p + room > out.size:
            position[0], position[1] = i, p
            return
        begin = p
        if texts[_EVENT_ID, 0] == _OF_SOURCE:
            p = _copy(out, p, constants, pieces[0, 0], pieces[0, 1])
            p = _copy(out, p, source, 0, source.size)
            p = _copy_number(out, p, offsets[i], _digits_of(offsets[i]))
        else:
            p = _write_text(out, p, _EVENT_ID, 0, picked, buffer, side, alternatives, constants, pieces)
        p = _copy(out, p, constants, pieces[1, 0], pieces[1, 1])
        user_at_N[i] = p
        p = _copy(out, p, users, PSEUDONYM_LENGTH * i, PSEUDONYM_LENGTH)
        piece = 11 + kinds_N[i]
        p = _copy(out, p, constants, pieces[piece, 0], pieces[piece, 1])
        p = _copy_number(out, p, ts_N[i], _digits_of(ts_N[i]))
        p = _write_text(out, p, _ITEM, 2, picked, buffer, side, alternatives, constants, pieces)
        p = _write_text(out, p, _CATEGORY, 3, picked, buffer, side, alternatives, constants, pieces)
        p = _write_text(out, p, _BRAND, 4, picked, buffer, side, alternatives, constants, pieces)
        p = _write_amount(out, p, i, 5, places[_PRICE], side, spans, odd, constants, pieces)
        p = _write_text(out, p, _CURRENCY, 6, picked, buffer, side, alternatives, constants, pieces)
        p = _write_amount(out, p, i, 7, places[_QUANTITY], side, spans, odd + 1, constants, pieces)
        p = _write_text(out, p, _SESSION, 8, picked, buffer, side, alternatives, constants, pieces)
        p = _write_text(out, p, _TEXT, 9, picked, buffer, side, alternatives, constants, pieces)
        p = _copy(out, p, constants, pieces[10, 0], pieces[10, 1])
        at_N[i], length_N[i] = begin, p - begin
    position[0], position[1] = sure_N.size, p
