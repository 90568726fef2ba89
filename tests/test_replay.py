"""Replay of data sets: order, ids as they were, joins, samples of users, and the shift in every time format."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import ConfigError, EventRefused
from streams.platforms import Platform, load_platform
from streams.replay import read_dataset

FILE = """
name = "shop"
topics = ["clicks", "orders"]
heads = ["return"]
kind = {{ literal = "view" }}
{time}
[fields]
user = "user"
item = "item"
category = "category"
[replay]
files = {files}
{more}
"""
SECONDS = '[time]\npath = "ts"\nunit = "s"'


def shop(tmp_path: Path, files: list[str], time: str = SECONDS, more: str = "") -> Platform:
    path = tmp_path / "shop.toml"
    path.write_text(FILE.format(time=time, files=json.dumps(files), more=more))
    return load_platform(path)


def parquet(path: Path, **columns: object) -> str:
    pq.write_table(pa.table(columns), path)
    return path.name


def ts_of(platform: Platform, value: bytes) -> int:
    return platform.canonicalise(value, topic="clicks", partition=0, offset=0, now_ms=2**42, future_tolerance_ms=0).ts


def test_rows_come_in_time_order_and_ties_as_they_lie(tmp_path: Path) -> None:
    one = parquet(tmp_path / "one.parquet", user=[1, 2, 3], item=["a", "b", "c"], ts=[30, 10, 20])
    two = parquet(tmp_path / "two.parquet", user=[4, 5], item=["d", None], ts=[20, 5])
    rows = list(read_dataset(tmp_path, shop(tmp_path, [one, two])))
    assert [(key, ts) for _, key, _, ts in rows] == [
        (b"5", 5000), (b"2", 10_000), (b"3", 20_000), (b"4", 20_000), (b"1", 30_000)
    ]  # fmt: skip
    assert {topic for topic, *_ in rows} == {"clicks"}
    assert rows[0][2] == b'{"user":5,"item":null,"ts":5}'
    limited = read_dataset(tmp_path, shop(tmp_path, [one, two], more='topic = "orders"'), limit=2)
    assert [(topic, key) for topic, key, *_ in limited] == [("orders", b"5"), ("orders", b"2")]


def test_many_chunks_of_unsorted_rows(tmp_path: Path) -> None:
    n = 20_000
    ts = [(i * 7919) % n for i in range(n)]
    name = parquet(tmp_path / "big.parquet", user=list(range(n)), item=list(range(n)), ts=ts)
    rows = list(read_dataset(tmp_path, shop(tmp_path, [name])))
    assert [r[3] for r in rows] == [i * 1000 for i in range(n)]
    assert all(json.loads(value) == {"user": u, "item": u, "ts": ts[u]} for _, key, value, _ in rows for u in [int(key)])


def test_ids_of_a_csv_stay_text(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text('user,item,ts\n007,"1,5",20\n1e3,,10\n')
    rows = list(read_dataset(tmp_path, shop(tmp_path, ["e.csv"])))
    assert [json.loads(value) for _, _, value, _ in rows] == [
        {"user": "1e3", "item": "", "ts": "10"}, {"user": "007", "item": "1,5", "ts": "20"}
    ]  # fmt: skip
    assert [key for _, key, _, _ in rows] == [b"1e3", b"007"]


def test_lines_of_json_stay_as_they_are(tmp_path: Path) -> None:
    lines = [b'{"ts": 20,  "user": "\xc3\xa4"}', b'{"ts":10.0, "user":17.0, "x":{"y":[1e0]}}', b"not json", b"[]"]
    (tmp_path / "e.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    rows = list(read_dataset(tmp_path, shop(tmp_path, ["e.jsonl"])))
    assert [value for _, _, value, _ in rows] == [lines[1], lines[2], lines[3], lines[0]]
    by_line = {value: (key, ts) for _, key, value, ts in rows}
    assert by_line[lines[1]] == (b"17", 10_000) and by_line[lines[0]] == ("ä".encode(), 20_000)
    assert by_line[b"not json"][0] == b""


def test_rows_without_a_time_follow_the_row_before_them(tmp_path: Path) -> None:
    name = parquet(tmp_path / "e.parquet", user=[1, 2, 3, 4, 5], item=list("abcde"), ts=[None, 30, None, 10, -5])
    rows = list(read_dataset(tmp_path, shop(tmp_path, [name]), end_ms=1_000_000))
    assert [(key, ts) for _, key, _, ts in rows] == [
        (b"4", 980_000), (b"5", 980_000), (b"1", 1_000_000), (b"2", 1_000_000), (b"3", 1_000_000)
    ]  # fmt: skip
    assert [json.loads(value)["ts"] for _, _, value, _ in rows] == [980, -5, None, 1000, None]


def test_joined_columns(tmp_path: Path) -> None:
    name = parquet(tmp_path / "e.parquet", user=[1, 2, 3], item=[7, 8, 9], ts=[1, 2, 3])
    parquet(tmp_path / "i.parquet", id=pa.array([9, 7, 7], pa.int16()), category=["nine", "seven", "other"], size=[1, 2, 3])
    more = '[[replay.join]]\nfile = "i.parquet"\non = "item"\nkey = "id"\ncolumns = ["category"]'
    rows = [json.loads(value) for _, _, value, _ in read_dataset(tmp_path, shop(tmp_path, [name], more=more))]
    assert [row["category"] for row in rows] == ["seven", None, "nine"]
    assert set(rows[0]) == {"user", "item", "ts", "category"}


def test_a_fraction_of_the_users_is_whole_and_always_the_same(tmp_path: Path) -> None:
    users = [i % 400 for i in range(4000)]
    name = parquet(tmp_path / "e.parquet", user=[float(u) for u in users], item=users, ts=list(range(4000)))
    platform = shop(tmp_path, [name])
    kept = [key for _, key, _, _ in read_dataset(tmp_path, platform, users_fraction=0.25)]
    assert 60 < len(set(kept)) < 140 and len(kept) == 10 * len(set(kept))
    more = {key for _, key, _, _ in read_dataset(tmp_path, platform, users_fraction=0.5)}
    assert set(kept) < more
    assert len(list(read_dataset(tmp_path, platform, users_fraction=1.0))) == 4000


END_MS = 1_763_000_000_000 + 123_456
AT = [1_700_000_000_000, 1_700_000_061_000, 1_703_000_000_000]


def utc(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


FORMATS: list[tuple[str, Callable[[int], object]]] = [
    ('path = "ts"\nunit = "s"', lambda ms: ms // 1000),
    ('path = "ts"\nunit = "s"', lambda ms: ms / 1000),
    ('path = "ts"\nunit = "s"', lambda ms: str(ms // 1000)),
    ('path = "ts"\nunit = "ms"', lambda ms: ms),
    ('path = "ts"\nunit = "us"', lambda ms: ms * 1000),
    ('path = "ts"\nunit = "ns"', lambda ms: ms * 1_000_000),
    ('path = "ts"\nformat = "iso"', lambda ms: utc(ms).isoformat()),
    ('path = "ts"\nformat = "iso"', lambda ms: utc(ms).strftime("%Y-%m-%dT%H:%M:%SZ")),
    ('path = "ts"\nformat = "iso"\nzone = "Asia/Tokyo"', lambda ms: utc(ms).strftime("%Y-%m-%d %H:%M:%S")),
    ('path = "ts"\nformat = "%d/%m/%Y %H:%M:%S"\nzone = "Europe/Berlin"', lambda ms: utc(ms).strftime("%d/%m/%Y %H:%M:%S")),
]


@pytest.mark.parametrize(("time", "write"), FORMATS)
def test_the_shift_is_one_constant_in_the_platforms_own_format(tmp_path: Path, time: str, write: Callable) -> None:
    events = [{"user": f"u{i}", "ts": write(ms)} for i, ms in enumerate(AT)]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, events)))
    platform = shop(tmp_path, ["e.jsonl"], time="[time]\n" + time)
    before = [ts for *_, ts in read_dataset(tmp_path, platform)]
    rows = list(read_dataset(tmp_path, platform, end_ms=END_MS))
    after = [ts_of(platform, value) for _, _, value, _ in rows]
    assert after == [ts for *_, ts in rows]
    assert {b - a for a, b in zip(before, after, strict=True)} == {after[0] - before[0]}
    assert 0 <= END_MS - after[-1] < platform.time.format.resolution_ms
    assert [type(json.loads(value)["ts"]) for _, _, value, _ in rows] == [type(event["ts"]) for event in events]


def test_a_nested_time_is_shifted_where_it_is(tmp_path: Path) -> None:
    lines = [{"user": 1, "meta": [{"at": 5}]}, {"user": 1, "other": 9}]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, lines)))
    time = '[time]\nany = ["meta.0.at", { keys = ["other"] }]\nunit = "s"'
    rows = read_dataset(tmp_path, shop(tmp_path, ["e.jsonl"], time=time), end_ms=1_009_000)
    assert [json.loads(value) for _, _, value, _ in rows] == [
        {"user": 1, "meta": [{"at": 1005}]}, {"user": 1, "other": 1009}
    ]  # fmt: skip


def test_instants_of_parquet_become_iso(tmp_path: Path) -> None:
    at = [datetime(2024, 7, 1, 12, 0, 0), datetime(2024, 7, 1, 12, 0, 0, 250_000)]
    time = '[time]\npath = "ts"\nformat = "iso"'
    for kind, texts in (
        (pa.timestamp("ns"), ["2024-07-01T12:00:00.000000", "2024-07-01T12:00:00.250000"]),
        (pa.timestamp("ms", "Europe/Berlin"), ["2024-07-01T12:00:00.000000Z", "2024-07-01T12:00:00.250000Z"]),
    ):
        name = parquet(tmp_path / "e.parquet", user=[1, 2], ts=pa.array(at, kind))
        platform = shop(tmp_path, [name], time=time)
        rows = list(read_dataset(tmp_path, platform))
        assert [json.loads(value)["ts"] for _, _, value, _ in rows] == texts
        assert [ts_of(platform, value) for _, _, value, _ in rows] == [1_719_835_200_000, 1_719_835_200_250]
    whole = parquet(tmp_path / "e.parquet", user=[1, 2], ts=pa.array([at[0], None], pa.timestamp("ns")))
    values = [json.loads(value) for _, _, value, _ in read_dataset(tmp_path, shop(tmp_path, [whole], time=time))]
    assert [value["ts"] for value in values] == ["2024-07-01T12:00:00", None]


def test_not_a_number_is_null_and_refused(tmp_path: Path) -> None:
    name = parquet(tmp_path / "e.parquet", user=[float("nan"), 2.0], item=["a", "b"], ts=[1, 2])
    platform = shop(tmp_path, [name])
    rows = list(read_dataset(tmp_path, platform))
    assert rows[0][1:3] == (b"", b'{"user":null,"item":"a","ts":1}')
    with pytest.raises(EventRefused, match="missing"):
        ts_of(platform, rows[0][2])


def test_what_cannot_be_replayed_says_so(tmp_path: Path) -> None:
    name = parquet(tmp_path / "e.parquet", user=[1], item=[1], ts=[1])
    (tmp_path / "bad.parquet").write_bytes(b"nothing of the kind")
    (tmp_path / "e.jsonl").write_text("{}")
    join = '[[replay.join]]\nfile = "e.parquet"\non = "{}"\ncolumns = ["{}"]'
    cases = [
        (shop(tmp_path, ["no.parquet"]), "does not exist"),
        (shop(tmp_path, ["bad.parquet"]), "cannot be read"),
        (shop(tmp_path, [name], time='[time]\npath = "when"\nunit = "s"'), "no column when"),
        (shop(tmp_path, [name], more=join.format("sku", "user").replace("on =", 'key = "user"\non =')), "no column 'sku'"),
        (shop(tmp_path, [name], more=join.format("item", "size")), "no column size"),
        (shop(tmp_path, ["e.jsonl"], more=join.format("item", "user")), "cannot be joined"),
    ]
    for platform, says in cases:
        with pytest.raises(ConfigError, match=says):
            read_dataset(tmp_path, platform)
    with pytest.raises(ConfigError, match="users_fraction"):
        read_dataset(tmp_path, shop(tmp_path, [name]), users_fraction=0.0)
    late = parquet(tmp_path / "late.parquet", user=[1, 2], item=[1, 2], ts=[10, 10_000])
    with pytest.raises(ConfigError, match="before 1970"):
        list(read_dataset(tmp_path, shop(tmp_path, [late]), end_ms=1000))
    path = tmp_path / "shop.toml"
    path.write_text(FILE.format(time=SECONDS, files="[]", more="").split("[replay]")[0])
    with pytest.raises(ConfigError, match="no \\[replay\\]"):
        read_dataset(tmp_path, load_platform(path))
