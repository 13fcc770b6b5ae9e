"""Day totals of a part of the ledger: what stands is judged by all that was said of a reading, then taken in part."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rating.calendar import month_of
from sinks.clickhouse import ClickHouse
from sinks.ledger import USAGE_SCHEMA, Ledger
from streams.settings import Settings
from tribill.embedded.stack import EmbeddedStack

ITEMS = ["10030-S-001", "10030-S-002", "10031-S-001"]
PRACTICES = ["A81001", "A81002", "B82001"]
#: Days around the end of a month, so that a revision may also move a reading to another.
FIRST = datetime(2026, 3, 30, 12, tzinfo=UTC)
#: Each example has practices of its own, for what earlier ones have said is in the ledger as well.
NUMBERS = count(1)

said = st.fixed_dictionaries(
    {
        "ods_code": st.sampled_from(PRACTICES),
        "id": st.sampled_from(["a", "b", "c", "d"]),
        "revision": st.integers(0, 2),
        "item_id": st.sampled_from(ITEMS),
        "quantity_micros": st.sampled_from([0, 1, 1_000_000, 2_500_000]),
        "day": st.integers(0, 4),
        "accepted_offset": st.integers(0, 9),
        "broker_timestamp_ms": st.integers(0, 2),
    }
)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """A ledger of its own."""
    with EmbeddedStack(tmp_path_factory.mktemp("stack"), kafka="127.0.0.1:1") as stack:
        clickhouse = ClickHouse(Settings(clickhouse=stack.clickhouse))
        clickhouse.migrate()
        yield Ledger(clickhouse)


def standing(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], int]:
    """RULES section 2: of a revision the first by position stands, of a reading its highest revision."""
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (-row["revision"], row["broker_timestamp_ms"], row["offset"])):
        chosen.setdefault((row["ods_code"], row["id"]), row)
    totals: dict[tuple[str, str, int], int] = {}
    for row in chosen.values():
        key = (row["item_id"], row["ods_code"], row["day"].toordinal())
        totals[key] = totals.get(key, 0) + row["quantity_micros"]
    return {key: total for key, total in totals.items() if total}


def flat(found: dict[tuple[str, str], dict[int, int]], ending: str) -> dict[tuple[str, str, int], int]:
    """Totals by (item, practice, day) of the practices of an example, those of nothing left out."""
    return {
        (item_id, ods_code, day): total
        for (item_id, ods_code), days in found.items()
        for day, total in days.items()
        if total and ods_code.endswith(ending)
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(said, max_size=14), st.sets(st.sampled_from(ITEMS), min_size=1, max_size=2), st.integers(0, 10))
def test_totals_of_a_part(ledger: Ledger, drawn: list[dict[str, Any]], items: set[str], end: int) -> None:
    """A revision that names another item, day or month would be counted twice, or not at all."""
    number = next(NUMBERS)
    ending = f"-{number}"
    rows = []
    for offset, each in enumerate(drawn):
        at = FIRST + timedelta(days=each["day"])
        rows.append(
            each
            | {"ods_code": each["ods_code"] + ending, "supplier_id": "10030", "generation": 1, "topic": "usage"}
            | {"partition": 0, "offset": offset, "index": number, "accepted_partition": 0}
            | {"occurred_at": at, "day": at.date()}
        )
    ledger.insert_usage(pa.Table.from_pylist(rows, USAGE_SCHEMA))
    expected = standing([row for row in rows if row["accepted_offset"] < end])

    whole = flat(ledger.totals_accepted(1, {"usage-accepted/0": end}), ending)
    assert whole == expected
    part = flat(ledger.totals_accepted(1, {"usage-accepted/0": end}, items), ending)
    assert part == {key: total for key, total in expected.items() if key[0] in items}
    alike, month = ["A81", "C99"], month_of(FIRST.date().toordinal())
    found = ledger.totals_of_practices(alike, [month], 1, end)
    assert {
        (item, code, day): total for (code, item, day), total in found.items() if total and code.endswith(ending)
    } == {key: total for key, total in expected.items() if key[1].startswith("A81") and month_of(key[2]) == month}
    for item_id in ITEMS:
        waiting = flat(ledger.totals_not_counted(item_id=item_id), ending)
        assert waiting == {key: total for key, total in standing(rows).items() if key[0] == item_id}
