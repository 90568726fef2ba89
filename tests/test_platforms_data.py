"""The shipped platform files on their real data: everything in is accepted, or refused for a reason that is known.

Needs the data sets: see `data_dir` in conftest.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from models.errors import EventRefused
from models.events import CanonicalEvent
from streams.platforms import Platform, load_platforms
from streams.replay import read_dataset

pytestmark = pytest.mark.data

NOW_MS = 1_800_000_000_000

# platform → (kinds, the share of events with a category, with a price), of the whole data set
KNOWN = {
    "retailrocket": ({"view": 61_527, "cart": 10_281, "purchase": 7_966}, 0.0, 0.0),
    "taobao": ({"purchase": 133_992, "cart": 111_584, "favorite": 39_210}, 0.714, 0.0),
    "online_retail_uk": ({"purchase": 323_894, "cancel": 7_388}, 0.88, 1.0),
    "rees46": ({"view": 17_055, "purchase": 214, "cart": 165}, 1.0, 1.0),
    "complete_journey": ({"purchase": 1_182_873}, 0.995, 0.994),
}
PLATFORMS = {platform.name: platform for platform in load_platforms() if platform.replay}
# Each is read from the start, up to so many events, which keeps the run short; all of it where none is given.
LIMITS = {"complete_journey": 20_000, "online_retail_uk": 30_000, "taobao": 30_000, "retailrocket": 30_000}


def rows_of(data_dir: Path, platform: Platform, **options: object) -> list[tuple[str, bytes, bytes, int]]:
    return list(read_dataset(data_dir, platform, **options))


def canonical(platform: Platform, rows: list) -> list[CanonicalEvent | EventRefused]:
    return platform.canonicalise_many(
        [value for _, _, value, _ in rows],
        topic=platform.topics[0],
        partition=0,
        offsets=range(len(rows)),
        now_ms=NOW_MS,
        future_tolerance_ms=0,
    )


def test_every_real_platform_is_known() -> None:
    assert set(PLATFORMS) == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_the_ledger_closes(data_dir: Path, name: str) -> None:
    platform = PLATFORMS[name]
    rows = rows_of(data_dir, platform, limit=LIMITS.get(name))
    out = canonical(platform, rows)
    accepted = [event for event in out if isinstance(event, CanonicalEvent)]
    refused = Counter(error.reason for error in out if isinstance(error, EventRefused))
    assert len(rows) == len(accepted) + refused.total()
    assert refused == {}, f"the cleaned data sets hold nothing to refuse, found {refused}"

    kinds, with_category, with_price = KNOWN[name]
    found = Counter(event.kind for event in accepted)
    if name in LIMITS:
        assert len(rows) == LIMITS[name] and set(found) <= set(kinds)
    else:
        assert found == kinds and len(rows) == pq.read_metadata(data_dir / platform.replay.files[0]).num_rows
    share = sum(event.category is not None for event in accepted) / len(accepted)
    assert share == pytest.approx(with_category, abs=0.03)
    assert sum(event.price is not None for event in accepted) / len(accepted) == pytest.approx(with_price, abs=0.01)

    times = [ts for *_, ts in rows]
    assert times == sorted(times) == [event.ts for event in accepted]
    assert [event.user.encode() for event in accepted] == [key for _, key, _, _ in rows]
    assert len({event.event_id for event in accepted}) == len(accepted), "equal lines are events of their own"


def test_the_users_are_those_of_the_file(data_dir: Path) -> None:
    platform = PLATFORMS["online_retail_uk"]
    rows = rows_of(data_dir, platform, limit=5_000)
    table = pq.read_table(data_dir / platform.replay.files[0], columns=["CustomerID"]).slice(0, 5_000)
    assert [key.decode() for _, key, _, _ in rows] == [str(int(user)) for user in table["CustomerID"].to_pylist()]


def test_cancels_of_the_gift_shop_are_those_with_a_c(data_dir: Path) -> None:
    platform = PLATFORMS["online_retail_uk"]
    rows = rows_of(data_dir, platform, users_fraction=0.1)
    events = canonical(platform, rows)
    for event, (_, _, value, _) in zip(events, rows, strict=True):
        assert (event.kind == "cancel") == value.startswith(b'{"InvoiceNo":"C') == (b'"Quantity":-' in value)
        assert event.quantity > 0
    assert any(event.kind == "cancel" for event in events)


def test_the_taobao_categories_are_those_of_the_linked_items(data_dir: Path) -> None:
    platform = PLATFORMS["taobao"]
    rows = rows_of(data_dir, platform, limit=5_000)
    linked = pq.read_table(data_dir / "taobao" / "item_category_linked.parquet")
    category = dict(zip(linked["item"].to_pylist(), linked["category"].to_pylist(), strict=True))
    for event in canonical(platform, rows):
        known = category.get(int(event.item.removeprefix("tb:")))
        assert event.category == (None if known is None else f"tb:{known}")


@pytest.mark.parametrize("name", KNOWN)
def test_shifted_to_a_time(data_dir: Path, name: str) -> None:
    platform = PLATFORMS[name]
    end_ms = 1_763_000_000_123
    before = [ts for *_, ts in rows_of(data_dir, platform, limit=3_000)]
    rows = rows_of(data_dir, platform, limit=3_000, end_ms=end_ms)
    after = [event.ts for event in canonical(platform, rows)]
    assert {b - a for a, b in zip(before, after, strict=True)} == {after[0] - before[0]}
    assert 0 <= end_ms - after[-1] < 1_000


def test_the_times_of_complete_journey_are_those_of_the_file(data_dir: Path) -> None:
    platform = PLATFORMS["complete_journey"]
    rows = rows_of(data_dir, platform, limit=2_000)
    column = pq.read_table(data_dir / platform.replay.files[0], columns=["transaction_timestamp"]).column(0).slice(0, 2_000)
    assert [ts for *_, ts in rows] == [ns // 1_000_000 for ns in pc.cast(column, "int64").to_pylist()]
