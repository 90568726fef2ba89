"""Reads a data set as the stream it once was: each row as its platform's own JSON, in time order.

The platform file says which files, in a table of its own:

    [replay]
    files = ["shop/events.parquet"]      # .parquet, .csv or .jsonl, inside the data directory
    topic = "shop.events"                # the first of `topics` where absent
    [[replay.join]]                      # columns of a second file, by a key that is unique there
    file = "shop/items.parquet"
    on = "item"                          # column of the events
    key = "item_id"                      # column of the second file; like `on` where absent
    columns = ["category"]

Ids stay exactly as in the data: a CSV is read as text throughout, a line of JSON stays the line it is, unless the time
is shifted. Columns of Parquet become JSON as they are, times among them ISO 8601, NaN null.

Memory: the files as Arrow columns and 16 bytes a row for the order; Python objects only for one chunk of rows at a time.
Knows no Kafka and no pace: who sends, and how fast, is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import xxhash

from models.errors import ConfigError, EventRefused
from streams.platforms import Join, Platform, decode_object, step

CHUNK_ROWS = 8192
_LINE = "\0line"  # the one column of a .jsonl
_encode = msgspec.json.Encoder().encode


def read_dataset(
    directory: Path | str,
    platform: Platform,
    *,
    limit: int | None = None,
    users_fraction: float | None = None,
    end_ms: int | None = None,
) -> Iterator[tuple[str, bytes, bytes, int]]:
    """Yields (topic, key, value, ts_ms) of the platform's data set, by ts and, where equal, in the order of the files.

    The key is the raw user id in UTF-8. `users_fraction` keeps about that share of the users, whole, always the same ones;
    `limit` then keeps the first so many events. `end_ms` shifts every time by one constant, so that the last event
    is at `end_ms`, or before it by less than the platform's time format can show; `ts_ms` is the shifted time. (A local
    time shifted into the hour that autumn repeats reads as the first of the two.) A row whose time or user cannot be
    read comes right after the row before it, unshifted, for ingest to refuse.

    Raises `ConfigError` where the platform has no [replay], or a file or a column is missing.
    """
    if platform.replay is None:
        raise ConfigError(f"platform {platform.name!r} has no [replay] table in {platform.path}")
    if users_fraction is not None and not 0.0 < users_fraction <= 1.0:
        raise ConfigError("users_fraction must be greater than 0 and at most 1")
    rows = _Rows(Path(directory), platform)
    return rows.stream(limit, users_fraction, end_ms)


class _Rows:
    """The rows of a platform's files, and their order."""

    def __init__(self, directory: Path, platform: Platform) -> None:
        self.platform = platform
        self.tables = [_read_file(directory / name) for name in platform.replay.files]
        self.joins = [(join, _read_join(directory, join)) for join in platform.replay.joins]
        for table, name in zip(self.tables, platform.replay.files, strict=True):
            self._check_columns(table, directory / name)

    def _check_columns(self, table: pa.Table, path: Path) -> None:
        times = {str(way[0]) for way in self.platform.time.paths}
        if table.column_names != [_LINE] and not times & set(table.column_names):
            raise ConfigError(f"{path}: has no column {' or '.join(sorted(times))}, where the platform's time would be")
        for join, _ in self.joins:
            if table.column_names == [_LINE]:
                raise ConfigError(f"{path}: rows of a .jsonl cannot be joined; write the columns into the lines")
            if join.on not in table.column_names:
                raise ConfigError(f"{path}: has no column {join.on!r} to join {join.file} on")

    def stream(
        self, limit: int | None, users_fraction: float | None, end_ms: int | None
    ) -> Iterator[tuple[str, bytes, bytes, int]]:
        table_of, row_of, ts = self._order(users_fraction)
        if limit is not None:
            table_of, row_of, ts = table_of[:limit], row_of[:limit], ts[:limit]
        shift_ms = 0
        if end_ms is not None and len(ts):
            resolution_ms = self.platform.time.format.resolution_ms
            shift_ms = (end_ms - int(ts[-1])) // resolution_ms * resolution_ms
            if int(ts.min()) + shift_ms < 0:
                raise ConfigError("end_ms would put the first event before 1970")
        topic = self.platform.replay.topic
        for start in range(0, len(ts), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            chunk = self._chunk(table_of[part], row_of[part])
            for (event, line), at in zip(chunk, ts[part].tolist(), strict=True):
                if shift_ms and _shift(event, self.platform, shift_ms):
                    line = None
                yield topic, _user(self.platform, event).encode(), line or _encode(event), at + shift_ms

    def _order(self, users_fraction: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """→ (n,) index of the table, (n,) row in it, (n,) ts in ms, of the rows to send, by ts and then as they lie."""
        parts = [self._times(table, users_fraction) for table in self.tables]
        table_of = np.concatenate([np.full(len(row), i, np.int32) for i, (row, _) in enumerate(parts)])
        row_of = np.concatenate([row for row, _ in parts])
        ts = np.concatenate([ts for _, ts in parts])
        order = np.argsort(ts, kind="stable")
        return table_of[order], row_of[order], ts[order]

    def _times(self, table: pa.Table, users_fraction: float | None) -> tuple[np.ndarray, np.ndarray]:
        """→ (n,) row, (n,) ts of a table's rows that `users_fraction` keeps."""
        platform = self.platform
        ts = _by_row(table, {str(path[0]) for path in platform.time.paths}, lambda event: _time(platform, event), -1)
        _fill_unreadable(ts)
        if users_fraction is None:
            return np.arange(table.num_rows), ts
        share = users_fraction * 2.0**64
        kept = _by_row(table, platform.user_columns, lambda event: _user_hash(platform, event) < share, False)
        rows = np.flatnonzero(kept)
        return rows, ts[rows]

    def _chunk(self, table_of: np.ndarray, row_of: np.ndarray) -> list[tuple[dict, bytes | None]]:
        """The events of a chunk with all their columns, and their lines, in the order given."""
        out: list[Any] = [None] * len(row_of)
        for i in np.unique(table_of):
            places = np.flatnonzero(table_of == i)
            rows = self.tables[i].take(pa.array(row_of[places]))
            for join, other in self.joins:
                rows = _joined(rows, join, other)
            pairs = (pair for batch in rows.to_batches() for pair in _events(batch))
            for place, pair in zip(places.tolist(), pairs, strict=True):
                out[place] = pair
        return out


def _fill_unreadable(ts: np.ndarray) -> None:
    """In place: a row without a time (-1) takes that of the row before it; the first ones that of the first with one."""
    good = np.flatnonzero(ts >= 0)
    if len(good) == 0:
        ts[:] = 0
        return
    before = np.searchsorted(good, np.arange(len(ts)), side="right") - 1
    ts[:] = ts[good[np.maximum(before, 0)]]


# --- files -----------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return _times_as_text(pa.parquet.read_table(path))
        if path.suffix == ".csv":
            with pa.csv.open_csv(path) as reader:
                as_text = {name: pa.string() for name in reader.schema.names}
            return pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=as_text))
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
        return pa.table({_LINE: pa.array(lines, pa.large_binary())})
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; is this the directory of the data sets?") from None
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _times_as_text(table: pa.Table) -> pa.Table:
    """Columns of instants → ISO 8601, without a fraction where none has one; with Z where the column has a zone."""
    for i, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            coded = table.column(i).combine_chunks().dictionary_encode()  # writing one instant costs more than finding it
            text = pa.DictionaryArray.from_arrays(coded.indices, _iso(coded.dictionary))
            table = table.set_column(i, field.name, text)
    return table


def _iso(at: pa.TimestampArray) -> pa.StringArray:
    whole = pc.all(pc.equal(at, pc.floor_temporal(at, unit="second"))).as_py() in (True, None)
    unit, zone = "s" if whole else "us", "UTC" if at.type.tz else None
    return pc.strftime(at.cast(pa.timestamp(unit, zone), safe=False), format=f"%Y-%m-%dT%H:%M:%S{'Z' if zone else ''}")


def _read_join(directory: Path, join: Join) -> pa.Table:
    table = _read_file(directory / join.file)
    lacking = {join.key, *join.columns} - set(table.column_names)
    if lacking:
        raise ConfigError(f"{directory / join.file}: has no column {', '.join(sorted(lacking))}")
    return table.select(list(dict.fromkeys([join.key, *join.columns])))


def _joined(rows: pa.Table, join: Join, other: pa.Table) -> pa.Table:
    """Rows with the columns of `other` (null where no key fits); order and number of rows stay."""
    on = rows[join.on]
    found = pc.index_in(on, value_set=other[join.key].cast(on.type).combine_chunks())
    for name in join.columns:
        column = other[name].take(found)
        at = rows.schema.get_field_index(name)
        rows = rows.append_column(name, column) if at < 0 else rows.set_column(at, name, column)
    return rows


# --- rows ------------------------------------------------------------------------------------------------------------


def _events(batch: pa.RecordBatch) -> Iterator[tuple[dict, bytes | None]]:
    """Each row → (the event, its line). A line that is no JSON object gives an event without fields; None: no line."""
    if batch.schema.names != [_LINE]:
        for event in batch.to_pylist():
            yield event, None
        return
    for line in batch.column(0).to_pylist():
        try:
            event = decode_object(line)
        except EventRefused:
            event = {}
        yield event, line


def _time(platform: Platform, event: dict) -> int | None:
    value = platform.time.get(event)
    try:
        return None if value is None else platform.time.format.read(value)
    except EventRefused:
        return None


def _user(platform: Platform, event: dict) -> str:
    """The raw id; empty where the event has none that can be read."""
    try:
        return platform.user_of(event) or ""
    except EventRefused:
        return ""


def _user_hash(platform: Platform, event: dict) -> int:
    return xxhash.xxh3_64_intdigest(_user(platform, event).encode())


def _by_row(table: pa.Table, columns: Iterable[str], function: Callable[[dict], int | None], absent: int) -> np.ndarray:
    """(n,) int64: of each row, `function` of the event, which may look at `columns` only; `absent` for its None."""
    rows = table.num_rows
    if table.column_names != [_LINE]:
        table = table.select([name for name in table.column_names if name in columns])
        if table.num_columns == 0:
            value = function({})
            return np.full(rows, absent if value is None else value, np.int64)
        if table.num_columns == 1 and not pa.types.is_nested(table.schema.types[0]):
            return _by_distinct_value(table, function, absent)
    values = (function(event) for batch in table.to_batches(max_chunksize=CHUNK_ROWS) for event, _ in _events(batch))
    return np.fromiter((absent if v is None else v for v in values), np.int64, rows)


def _by_distinct_value(table: pa.Table, function: Callable[[dict], int | None], absent: int) -> np.ndarray:
    """`_by_row` of a single column: a value is looked at once, however many rows have it."""
    (name,) = table.column_names
    column = table.column(0).combine_chunks()
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    values = [function({name: value}) for value in [*coded.dictionary.to_pylist(), None]]
    distinct = np.array([absent if value is None else value for value in values], np.int64)
    return distinct[coded.indices.fill_null(len(coded.dictionary)).to_numpy(zero_copy_only=False)]


def _shift(event: dict, platform: Platform, shift_ms: int) -> bool:
    """Moves the event's time in place. False where it has none that can be read: the event stays as it is."""
    at = _time(platform, event)
    if at is None:
        return False
    for *way, last in platform.time.paths:
        holder: Any = event
        for key in way:
            holder = step(holder, key)
        value = step(holder, last)
        if value is not None and value != "":
            holder[int(last) if type(holder) is list else last] = platform.time.format.write(at + shift_ms, value)
            return True
    return False
