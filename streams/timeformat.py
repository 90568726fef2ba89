"""How platforms write the time: a count since the epoch, ISO 8601, or a pattern of `strptime` directives; both ways.

Reads no clock and no locale. Patterns become a regular expression of fixed pieces (each digit run bounded), so a
hostile value cannot make the match slow. Local times take the IANA zone's offset; an hour that autumn repeats is read
as the first of the two, an hour that spring skips as if the clock had not yet gone forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from operator import itemgetter
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from models.errors import EventRefused

MAX_TS_MS = 253402300799999
"""The last ms of the year 9999."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_SEEN_TIMES = 4096
_NUMBER = re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{0,30})?")

# unit → (units in a ms, ms in a unit)
_UNITS = {"s": (0, 1000), "ms": (1, 1), "us": (1000, 0), "ns": (1_000_000, 0)}
UNITS = tuple(_UNITS)

# directive → (pattern, how it is written, its resolution in ms)
_DIRECTIVES: dict[str, tuple[str, Callable[[datetime], str], int]] = {
    "Y": ("[0-9]{4}", lambda t: f"{t.year:04}", 31_536_000_000),
    "m": ("[0-9]{1,2}", lambda t: f"{t.month:02}", 31_536_000_000),
    "b": ("[A-Za-z]{3}", lambda t: _MONTHS[t.month - 1].title(), 31_536_000_000),
    "d": ("[0-9]{1,2}", lambda t: f"{t.day:02}", 86_400_000),
    "H": ("[0-9]{1,2}", lambda t: f"{t.hour:02}", 3_600_000),
    "I": ("[0-9]{1,2}", lambda t: f"{t.hour % 12 or 12:02}", 3_600_000),
    "p": ("[AaPp][Mm]", lambda t: "AM" if t.hour < 12 else "PM", 3_600_000),
    "M": ("[0-9]{1,2}", lambda t: f"{t.minute:02}", 60_000),
    "S": ("[0-9]{1,2}", lambda t: f"{t.second:02}", 1000),
    "f": ("[0-9]{1,9}", lambda t: f"{t.microsecond:06}", 1),
    "z": ("Z|[+-][0-9]{2}:?[0-9]{2}", lambda t: t.strftime("%z"), 86_400_000),
}


class TimeFormat(NamedTuple):
    """One way to write an instant."""

    read: Callable[[Any], int]
    """The platform's value → ms since the epoch. Raises `EventRefused` (`wrong_type`, `bad_time`)."""
    write: Callable[[int, Any], Any]
    """(ms, a value as the platform has it, for its type and offset) → the platform's value."""
    resolution_ms: int
    """The smallest step that the format can show."""


def unit_format(unit: str) -> TimeFormat:
    """A number (or a text of digits) of `s`, `ms`, `us` or `ns` since the epoch."""
    per_ms, ms_per = _UNITS[unit]

    def read(value: Any) -> int:
        if type(value) is str and _NUMBER.fullmatch(value):
            value = float(value) if "." in value else int(value)
        if type(value) is int:
            ms = value * ms_per if ms_per else value // per_ms
        elif type(value) is float:
            if not abs(value) < 1e20:
                raise _bad_time("too large")
            ms = round(value * ms_per) if ms_per else int(value // per_ms)
        else:
            raise _not_a_time(value, f"a number of {unit}")
        return _in_range(ms)

    def write(ms: int, like: Any) -> Any:
        exact = ms * per_ms if per_ms else ms // ms_per
        if type(like) is float or (type(like) is str and "." in like):
            exact = ms / ms_per if ms_per else float(exact)
        return str(exact) if type(like) is str else exact

    return TimeFormat(read, write, ms_per or 1)


def iso_format(zone: ZoneInfo) -> TimeFormat:
    """ISO 8601 text; without an offset it is local time in `zone`."""
    local = _quick(zone)

    def read(value: Any) -> int:
        if type(value) is not str:
            raise _not_a_time(value, "ISO 8601 text")
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            at = None
        return _to_ms(at, local)

    def write(ms: int, like: Any) -> str:
        shown = datetime.fromisoformat(like) if type(like) is str else _EPOCH
        at = (_EPOCH + timedelta(milliseconds=ms)).astimezone(shown.tzinfo or zone)
        at = at if shown.tzinfo else at.replace(tzinfo=None)
        text = at.isoformat(sep=_separator(like), timespec="milliseconds" if ms % 1000 else "auto")
        return text.replace("+00:00", "Z") if type(like) is str and like.endswith("Z") else text

    return TimeFormat(read, write, 1)


def pattern_format(pattern: str, zone: ZoneInfo) -> TimeFormat:
    """A pattern of %Y %m %b %d %H %I %p %M %S %f %z and literal text. Raises `ValueError` for any other."""
    pieces, names = _split(pattern)
    expression = re.compile("".join(f"({_DIRECTIVES[p[1]][0]})" if p[0] == "%" else re.escape(p[1]) for p in pieces))
    layout = tuple(names)
    local = _quick(zone)
    digits = _digits_only(layout, local)
    seen: dict[str, int] = {}  # parsing costs 4 µs, and a busy platform sends thousands of events within one second

    def read(value: Any) -> int:
        if type(value) is not str:
            raise _not_a_time(value, f"text like {pattern}")
        ms = seen.get(value)
        if ms is None:
            ms = parse(value)
            if len(seen) >= _SEEN_TIMES:
                seen.clear()
            seen[value] = ms
        return ms

    def parse(text: str) -> int:
        match = expression.fullmatch(text)
        at = None
        if match is not None:
            try:
                at = digits(match.groups()) if digits else _from_parts(layout, match.groups())
            except ValueError:  # the 30th of February
                at = None
        return _to_ms(at, local)

    def write(ms: int, like: Any) -> str:
        at = (_EPOCH + timedelta(milliseconds=ms)).astimezone(zone)
        return "".join(_DIRECTIVES[p[1]][1](at) if p[0] == "%" else p[1] for p in pieces)

    return TimeFormat(read, write, min(_DIRECTIVES[n][2] for n in names))


def _split(pattern: str) -> tuple[list[tuple[str, str]], list[str]]:
    """A pattern → its pieces ("%", directive) or ("", literal), and the directives alone."""
    pieces: list[tuple[str, str]] = []
    for part in re.findall(r"%.|[^%]+|%$", pattern, re.DOTALL):
        if part == "%%":
            pieces.append(("", "%"))
        elif part[0] != "%":
            pieces.append(("", part))
        elif part[1:] in _DIRECTIVES:
            pieces.append(("%", part[1:]))
        else:
            raise ValueError(f"{part!r} is not one of {' '.join('%' + d for d in _DIRECTIVES)}")
    names = [name for mark, name in pieces if mark]
    if len(set(names)) < len(names):
        raise ValueError("a directive stands twice")
    if not ({"Y", "d"} <= set(names) and len({"m", "b"} & set(names)) == 1):
        raise ValueError("needs a year (%Y), a month (%m or %b) and a day (%d)")
    if ("I" in names) != ("p" in names) or {"H", "I"} <= set(names):
        raise ValueError("needs %H alone, or %I with %p")
    return pieces, names


def _quick(zone: ZoneInfo) -> tzinfo:
    return UTC if zone.key == "UTC" else zone  # the constant is looked up three times as fast


def _digits_only(layout: tuple[str, ...], zone: tzinfo) -> Callable[[tuple[str, ...]], datetime] | None:
    """The short way for the usual layouts, of year, month, day and perhaps hour, minute, second: half the time."""
    usual = "YmdHMS"[: len(layout)]
    if set(layout) != set(usual):
        return None
    pick = itemgetter(*(layout.index(name) for name in usual))
    return lambda texts: datetime(*map(int, pick(texts)), tzinfo=zone)


def _from_parts(layout: tuple[str, ...], texts: tuple[str, ...]) -> datetime:
    part = dict(zip(layout, texts, strict=True))
    month = _MONTHS.index(part["b"].lower()) + 1 if "b" in part else int(part["m"])
    hour = int(part.get("H", 0))
    if "I" in part:
        if not 1 <= int(part["I"]) <= 12:
            raise ValueError("hour of twelve")
        hour = int(part["I"]) % 12 + (12 if part["p"].lower() == "pm" else 0)
    micro = int(part.get("f", "0")[:6].ljust(6, "0"))
    zone: tzinfo | None = None
    if "z" in part:
        sign, digits = part["z"][0], part["z"][1:].replace(":", "")
        minutes = 0 if sign == "Z" else int(digits[:2]) * 60 + int(digits[2:])
        zone = timezone(timedelta(minutes=-minutes if sign == "-" else minutes))
    second, minute = int(part.get("S", 0)), int(part.get("M", 0))
    return datetime(int(part["Y"]), month, int(part["d"]), hour, minute, second, micro, zone)


def _to_ms(at: datetime | None, zone: tzinfo) -> int:
    if at is None:
        raise _bad_time("not in the platform's format, or no such day")
    if at.tzinfo is None:
        at = at.replace(tzinfo=zone)
    since = at - _EPOCH
    return _in_range(since.days * 86_400_000 + since.seconds * 1000 + since.microseconds // 1000)


def _in_range(ms: int) -> int:
    if 0 <= ms <= MAX_TS_MS:
        return ms
    raise _bad_time("before 1970 or after 9999; is the platform file's unit right?")


def _separator(like: Any) -> str:
    return like[10] if type(like) is str and len(like) > 10 and like[10] in "T " else "T"


def _bad_time(why: str) -> EventRefused:
    return EventRefused("bad_time", f"time: {why}")


def _not_a_time(value: Any, wanted: str) -> EventRefused:
    if type(value) is str:
        return _bad_time(f"not {wanted}")
    return EventRefused("wrong_type", f"time: {type(value).__name__}, not {wanted}")
