"""The web process over the embedded ClickHouse engine: what accrues when, whose it is, and what is served."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from aiohttp import ClientTimeout
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import REGISTRY

from rating.calendar import LONDON, day_seconds, first_day, last_day, month_start, month_text, parse_month
from rating.funding import Drawn, Group
from sinks.accruals import AccrualRow, Accruals, group_json
from sinks.clickhouse import ClickHouse
from sinks.dead_letters import _COLUMNS
from sinks.documents import Documents
from sinks.ledger import USAGE_SCHEMA, Ledger
from streams.settings import Settings
from streams.topics import STAGES, Broker
from tribill.embedded.process import free_port
from tribill.embedded.stack import EmbeddedStack
from web import app as web_app
from web import picture as picture_module
from web.picture import Pictures, pounds
from web.progress import Progress, progress
from web.queries import Amount, Queries

pytestmark = pytest.mark.timeout(280)

APRIL = parse_month("2026-04")
TINY = Decimal("1e-12")
HOSTILE = "<img src=x onerror=alert(1)>\n\ndata: \u2028</script>"
_databases = count(1)
#: Now, where a test needs one that stays.
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStack]:
    directory = tmp_path_factory.mktemp("web")
    with EmbeddedStack(directory, kafka="external:9092", redis="redis://external") as started:
        yield started


@pytest.fixture
def settings(stack: EmbeddedStack) -> Settings:
    """A database of its own, with all tables."""
    found = Settings(clickhouse=f"{stack.clickhouse}/web{next(_databases)}")
    ClickHouse(found).migrate()
    return found


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not what is tested."""
    monkeypatch.setattr(web_app, "PATIENCE_SECONDS", 30)


def ordinal(text: str) -> date:
    return date.fromisoformat(text)


def milliseconds(instant: datetime) -> int:
    return (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def row(
    order: str = "C010001",
    *,
    month: int = APRIL,
    supplier: str = "10030",
    ods: str = "A83005",
    time: tuple[tuple[str, str, Fraction], ...] = (),
    days: tuple[tuple[str, Fraction], ...] = (),
    groups: tuple[Group, ...] | None = None,
    quantity: int = 0,
) -> AccrualRow:
    """A line's month; without groups ordering party QOQ has to pay it."""
    segments = tuple((ordinal(low), ordinal(high), each) for low, high, each in time)
    single = tuple((ordinal(day), each) for day, each in days)
    exact = sum(((high - low).days * each for low, high, each in segments), Fraction(0))
    exact += sum((each for _, each in single), Fraction(0))
    if groups is None:
        groups = (Group("QOQ", exact, (), None, Fraction(0), (), "QOQ"),)
    return AccrualRow(
        (order, f"{supplier}-001", ods), month, supplier, None, False, exact, quantity,
        segments, single, json.dumps([group_json(each) for each in groups]), (),
    )  # fmt: skip


def usage(settings: Settings, *rows: dict[str, Any]) -> None:
    """Usage rows; what a test does not care for has a default."""
    number = count(1)
    full = [
        {
            "ods_code": "A83005", "supplier_id": "10030", "id": f"u{next(number)}", "revision": 0, "generation": 1,
            "topic": "usage.10030", "partition": 0, "offset": next(number), "index": 0, "broker_timestamp_ms": 1,
            "accepted_partition": 0, "accepted_offset": 0, "item_id": "10030-001", "quantity_micros": 1_000_000,
            "occurred_at": datetime(2026, 4, 3, 10, tzinfo=UTC), "day": date(2026, 4, 3),
        }
        | each
        for each in rows
    ]  # fmt: skip
    Ledger(ClickHouse(settings)).insert_usage(pa.Table.from_pylist(full, schema=USAGE_SCHEMA))


def letters(settings: Settings, *reasons: str, agent: str = "intake") -> None:
    """Dead letters with these reasons."""
    rows = [
        (agent, 1, "usage", 0, offset, 0, reason, "quantity", b"", b"\xff\x00", 1)
        for offset, reason in enumerate(reasons)
    ]
    ClickHouse(settings).insert("dead_letters", _COLUMNS, rows)


def live(settings: Settings, view: str, month: int, at: datetime) -> list[dict[str, Any]]:
    """The rows of a view."""
    table = ClickHouse(settings).query_arrow(
        f"SELECT * FROM {view}(month = {{month:Int32}}, at_ms = {{at_ms:Int64}})",
        {"month": month, "at_ms": milliseconds(at)},
    )
    return list(table.to_pylist())


def expected(line: AccrualRow, at: datetime) -> tuple[Fraction, Fraction]:
    """What a line has accrued at an instant, and its rate a second, from RULES alone."""
    accrued = rate = Fraction(0)
    for low, high, each in line.time:
        for day in range(low.toordinal(), high.toordinal()):
            start = datetime.combine(date.fromordinal(day), datetime.min.time(), LONDON)
            passed = Fraction(milliseconds(at) - milliseconds(start.astimezone(UTC)), 1000)
            accrued += each * min(max(passed / day_seconds(day), Fraction(0)), Fraction(1))
            if 0 <= passed < day_seconds(day):
                rate += each / day_seconds(day)
    today = at.astimezone(LONDON).date()
    return accrued + sum((each for day, each in line.days if day <= today), Fraction(0)), rate


def near(found: Decimal, exact: Fraction) -> bool:
    return abs(Fraction(found) - exact) <= Fraction(TINY)


# ---- what has accrued when ----------------------------------------------------------------------------------


@pytest.mark.parametrize("month", ["2026-03", "2026-04", "2026-10", "2026-12"])
def test_a_line_accrues_evenly_over_each_london_day(settings: Settings, month: str) -> None:
    """Before, inside and after its segments, on days of 23, 24 and 25 hours, to the millisecond."""
    each = Fraction(1000, 7)
    line = row(
        month=parse_month(month),
        time=((f"{month}-05", f"{month}-26", each), (f"{month}-26", f"{month}-30", each * 3)),
        days=((f"{month}-10", Fraction(500)), (f"{month}-27", Fraction(-77, 3))),
    )
    Accruals(ClickHouse(settings)).insert([line], 1, 0)
    start = month_start(line.month)
    generator = random.Random(month)
    instants = [start + timedelta(milliseconds=generator.randrange(31 * 86_400_000)) for _ in range(12)]
    for day in (1, 5, 25, 26, 29, 30):
        midnight = datetime.fromisoformat(f"{month}-{day:02d}").replace(tzinfo=LONDON).astimezone(UTC)
        instants += [midnight - timedelta(milliseconds=1), midnight, midnight + timedelta(hours=1, minutes=30)]
    instants += [start - timedelta(days=9), month_start(line.month + 1), month_start(line.month + 5)]
    for at in instants:
        found = live(settings, "accruals_live", line.month, at)[0]
        accrued, rate = expected(line, at)
        assert near(found["accrued_pence"], accrued), at
        assert near(found["pence_per_second"], rate), at
    assert near(
        live(settings, "accruals_live", line.month, month_start(line.month + 1))[0]["accrued_pence"], line.exact
    )


def test_the_rate_is_the_days_charge_over_its_seconds(settings: Settings) -> None:
    """82,800 seconds on the last Sunday in March, 90,000 in October."""
    accruals = Accruals(ClickHouse(settings))
    for day, seconds in (("2026-03-29", 82_800), ("2026-03-30", 86_400), ("2026-10-25", 90_000)):
        after = (ordinal(day) + timedelta(days=1)).isoformat()
        month = parse_month(day[:7])
        accruals.insert([row(f"C{seconds}", month=month, time=((day, after, Fraction(seconds)),))], 1, 0)
        at = datetime.fromisoformat(f"{day}T12:00:00+00:00")
        rates = {each["order_number"]: each["pence_per_second"] for each in live(settings, "accruals_live", month, at)}
        assert rates[f"C{seconds}"] == 1


def test_the_newest_version_of_a_row_counts(settings: Settings) -> None:
    accruals = Accruals(ClickHouse(settings))
    old, new = (row(days=(("2026-04-03", Fraction(pence)),)) for pence in (700, 500))
    accruals.insert([new], 9, 0)
    accruals.insert([old], 8, 0)
    found = Queries(ClickHouse(settings)).by_supplier(APRIL, milliseconds(month_start(APRIL + 1)))
    assert [(each.id, int(each.accrued_pence), int(each.month_pence)) for each in found] == [("10030", 500, 500)]


# ---- whose it is --------------------------------------------------------------------------------------------


def random_group(generator: random.Random) -> Group:
    """A group as `rating.funding.groups` makes them: steps before the allocation settled, limits behind it."""

    def amount(most: Fraction) -> Fraction:
        return most * Fraction(
            generator.randrange(0, 12), generator.choice([10, 12, 7]) * generator.choice([1, 31, 997])
        )

    sign = generator.choice([1, 1, 1, -1])
    lower = generator.choice([1, 31, 7 * 10**6, 13**80])
    whole = Fraction(generator.randrange(1, 10**9 * lower), lower)
    taken, remaining = [], whole
    for payer in ("NHSE", "SDF")[: generator.randrange(3)]:
        taken.append((payer, sign * min(amount(whole), remaining)))
        remaining -= abs(taken[-1][1])
    allocation = generator.choice([None, "NHSE", "CENTRAL"])
    after = [(payer, sign * amount(whole)) for payer in ("PCN", "SDF", "X")[: generator.randrange(4)]]
    if allocation is None:
        after = []
    wanted = max(sign * remaining, Fraction(0)) if allocation else Fraction(0)
    party = generator.choice(["QOQ", "QWO", "QF7"])
    return Group(party, sign * whole, tuple(taken), allocation, wanted, tuple(after), generator.choice([party, "REST"]))


def test_shares_are_the_settled_waterfall(settings: Settings) -> None:
    """As `Group.settle`, for charges and credits, limits in any order, and fractions of any length."""
    generator = random.Random(7)
    coverage = {"QOQ": Fraction(1), "QWO": Fraction(1, 3)}  # QF7: nothing is known to be drawn
    accruals = Accruals(ClickHouse(settings))
    drawn = [(party, APRIL, 1, Fraction(0), Drawn(Fraction(0), each, Fraction(0))) for party, each in coverage.items()]
    accruals.insert_drawn(drawn)
    lines = []
    for number in range(300):
        groups = tuple(random_group(generator) for _ in range(generator.randrange(1, 4)))
        total = sum((group.charge for group in groups), Fraction(0))
        lines.append(row(f"C{number:06d}", days=(("2026-04-03", total),), groups=groups))
    accruals.insert(lines, 1, 0)
    shares: dict[str, dict[str, Decimal]] = {}
    accrued: dict[str, Decimal] = {}
    for each in live(settings, "shares_live", APRIL, month_start(APRIL + 1)):
        of_line = shares.setdefault(each["order_number"], {})
        of_line[each["payer"]] = of_line.get(each["payer"], Decimal(0)) + each["share_pence"]
        accrued[each["order_number"]] = accrued.get(each["order_number"], Decimal(0)) + each["accrued_pence"]
    for line in lines:
        exact: dict[str, Fraction] = {}
        for group in json.loads(line.groups):
            settled = _group(group).settle(coverage.get(group["party"], Fraction(0)))
            for payer, pence in settled.items():
                exact[payer] = exact.get(payer, Fraction(0)) + pence
        found = shares[line.line[0]]
        assert near(sum(found.values(), Decimal(0)), line.exact)
        assert near(accrued[line.line[0]], line.exact)
        for payer, pence in exact.items():
            # Coverage has 18 places, of amounts up to 10**9.
            assert abs(Fraction(found.get(payer, Decimal(0))) - pence) < Fraction(1, 10**8), (line, payer)


def _group(value: dict[str, Any]) -> Group:
    return Group(
        value["party"],
        Fraction(value["charge"]),
        tuple((payer, Fraction(amount)) for payer, amount in value["taken"]),
        value["allocation"],
        Fraction(value["wanted"]),
        tuple((payer, Fraction(limit)) for payer, limit in value["after"]),
        value["rest"],
    )


def test_shares_grow_with_the_line_and_always_sum_to_it(settings: Settings) -> None:
    """Also when a later credit takes all back, when nothing is left to pay, and without any group."""
    half = (("NHSE", Fraction(1500)),)
    lines = [
        row("C1", time=(("2026-04-01", "2026-05-01", Fraction(100)),),
            groups=(Group("QOQ", Fraction(3000), half, None, Fraction(0), (), "QOQ"),)),
        row("C2", days=(("2026-04-02", Fraction(900)), ("2026-04-20", Fraction(-1000)))),
        row("C3", days=(("2026-04-02", Fraction(50)), ("2026-04-20", Fraction(-50))), groups=()),
    ]  # fmt: skip
    Accruals(ClickHouse(settings)).insert(lines, 1, 0)
    queries = Queries(ClickHouse(settings))
    for at in (datetime(2026, 4, 10, 23, tzinfo=UTC), datetime(2026, 4, 25, 7, 1, 2, 3000, tzinfo=UTC)):
        for line in lines:
            found = [each for each in live(settings, "shares_live", APRIL, at) if each["order_number"] == line.line[0]]
            accrued, rate = expected(line, at)
            assert near(sum((each["accrued_pence"] for each in found), Decimal(0)), accrued)
            assert near(sum((each["pence_per_second"] for each in found), Decimal(0)), rate)
        payers = {each.id: each for each in queries.by_payer(APRIL, milliseconds(at))}
        suppliers = queries.by_supplier(APRIL, milliseconds(at))
        for name in ("accrued_pence", "pence_per_second"):
            by_payer = sum(getattr(each, name) for each in payers.values())
            assert abs(by_payer - sum(getattr(each, name) for each in suppliers)) < TINY
        # Of the even line each has half at any time.
        assert near(payers["NHSE"].accrued_pence, expected(lines[0], at)[0] / 2)


# ---- usage --------------------------------------------------------------------------------------------------


def test_suspense_is_what_stands_less_what_is_counted(settings: Settings) -> None:
    """Of copies the first counts, of revisions the highest; a record inserted twice counts once."""
    again = {"id": "again", "offset": 50}
    fifth = {"ods_code": "A5", "item_id": "10030-005"}
    usage(
        settings,
        {"id": "a", "quantity_micros": 3_000_000, "offset": 1},
        {"id": "a", "quantity_micros": 9_000_000, "offset": 2},
        {"id": "b", "quantity_micros": 3_000_000},
        {"id": "b", "revision": 2, "quantity_micros": 5_500_000},
        {"id": "b", "revision": 1, "quantity_micros": 7_000_000},
        again,
        # At one instant the lower topic is first, whatever the offsets.
        {"id": "e", **fifth, "offset": 1, "quantity_micros": 8_000_000},
        {"id": "e", **fifth, "offset": 7, "quantity_micros": 1_000_001, "topic": "usage"},
        {"id": "f", **fifth, "offset": 5, "broker_timestamp_ms": 2},
        {"id": "f", **fifth, "offset": 6, "quantity_micros": 1},
        {"id": "c", "ods_code": "A1", "quantity_micros": 2_000_000},
        {"id": "d", "ods_code": "A2", "item_id": "10030-009"},
        {"id": "moved", "ods_code": "A3", "item_id": "10030-001"},
        {"id": "moved", "ods_code": "A3", "item_id": "10030-002", "revision": 1},
    )
    usage(settings, again)
    lines = [
        row(quantity=9_000_000),
        row(quantity=250_000, month=APRIL + 1),
        row(ods="A1", quantity=2_000_000),
    ]
    Accruals(ClickHouse(settings)).insert(lines, 1, 0)
    found = Queries(ClickHouse(settings)).suspense(10)
    assert found.largest == (
        ("10030-005", "A5", 1_000_002),
        ("10030-002", "A3", 1_000_000),
        ("10030-009", "A2", 1_000_000),
        ("10030-001", "A83005", 250_000),
    )
    assert (found.services, found.quantity_micros) == (4, 3_250_002)
    assert Queries(ClickHouse(settings)).suspense(1).services == 4


def test_duplicates_are_the_records_that_left_nothing(settings: Settings) -> None:
    """Known only where usage is settled; a batch of readings is one record."""
    usage(settings, {"offset": 0}, {"offset": 0, "index": 1}, {"offset": 3}, {"offset": 9})
    letters(settings, "offset 0 of another topic", "offset 1 of usage/0")
    settled = {"usage.10030/0": 6, "usage/0": 2, "usage/1": 4}
    pictures = Pictures(Queries(ClickHouse(settings)), settings)
    behind = {stage: {"usage": 1} for stage, _ in STAGES}

    def duplicates(progress: Progress | None) -> Any:
        return pictures.picture(APRIL, NOW, progress)["usage"]["duplicates"]

    assert duplicates(None) is None
    assert duplicates(Progress(behind, None)) is None
    # Of 6 + 2 + 4 records, 2 have readings and 2 a dead letter.
    assert duplicates(Progress(behind, settled)) == 8
    assert duplicates(Progress(behind, None)) == 8


# ---- the picture --------------------------------------------------------------------------------------------


def test_which_month_is_live(settings: Settings) -> None:
    """The newest with usage that is not in the future; without usage, the current one; or as asked."""

    def shown(settings: Settings, month: int | None = None) -> tuple[str, str]:
        pictures = Pictures(Queries(ClickHouse(settings)), settings)
        found = pictures.picture(month, max(NOW, settings.arrival_floor_at or NOW), None)
        return found["month"], found["state"]

    assert shown(settings) == ("2026-11", "live")
    usage(settings, {}, {"day": date(2027, 1, 3), "occurred_at": datetime(2027, 1, 3, tzinfo=UTC)})
    assert shown(settings) == ("2026-04", "past")
    assert shown(settings, APRIL + 9) == ("2027-01", "future")
    # A replay may play ahead of the calendar.
    assert shown(replace(settings, arrival_floor="2027-02-01T00:00:00+00:00")) == ("2027-01", "past")


def test_time_alone_needs_no_new_query(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a London day the amount goes on at its rate; a new row or a new day is asked for."""
    monkeypatch.setattr(picture_module, "_REST", 0)
    monkeypatch.setattr(picture_module, "_COSTLY_SECONDS", 60)
    month = parse_month("2026-11")
    line = row(month=month, time=(("2026-11-01", "2026-12-01", Fraction(86_400)),))
    accruals = Accruals(ClickHouse(settings))
    accruals.insert([line], 1, 0)
    queries = Queries(ClickHouse(settings))
    asked: list[int] = []
    plain = queries.by_supplier

    def by_supplier(month: int, at_ms: int) -> list[Amount]:
        asked.append(at_ms)
        return plain(month, at_ms)

    monkeypatch.setattr(queries, "by_supplier", by_supplier)
    pictures = Pictures(queries, settings)
    national = [
        pictures.picture(None, NOW + timedelta(seconds=seconds), None)["national"] for seconds in (0, 1, 100, 43_199)
    ]
    assert [each["accrued"] for each in national] == [
        "18576.00000000", "18576.01000000", "18577.00000000", "19007.99000000"
    ]  # fmt: skip
    assert {each["per_second"] for each in national} == {"0.010000000000"}
    assert len(asked) == 1
    assert pictures.picture(None, NOW + timedelta(days=1), None)["national"]["accrued"] == "19440.00000000"
    assert len(asked) == 2
    accruals.insert([row("C2", month=month, days=(("2026-11-02", Fraction(123)),))], 1, 0)
    later = pictures.picture(None, NOW + timedelta(days=1), None)
    assert later["national"]["accrued"] == "19441.23000000"
    assert later["national"]["whole_month"] == "25921.23"


def test_what_is_costly_rests_and_waits_its_turn(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that took long is not computed again at once, nor two such parts for one picture."""
    queries = Queries(ClickHouse(settings))
    computed: list[str] = []

    def slow(name: str) -> Callable[..., Any]:
        plain = getattr(queries, name)

        def ask(*arguments: Any) -> Any:
            computed.append(name)
            time.sleep(0.12)
            return plain(*arguments)

        return ask

    for name in ("by_payer", "suspense"):
        monkeypatch.setattr(queries, name, slow(name))
    pictures = Pictures(queries, settings)
    pictures.picture(APRIL, NOW, None)
    assert computed == ["by_payer", "suspense"]  # there is nothing yet to show instead
    usage(settings, {})
    Accruals(ClickHouse(settings)).insert([row(days=(("2026-04-03", Fraction(100)),))], 1, 0)
    assert pictures.picture(APRIL, NOW, None)["suspense"]["services"] == 0
    assert computed == ["by_payer", "suspense"]
    monkeypatch.setattr(picture_module, "_REST", 0)
    for part in pictures._parts.values():
        part.rests_until = 0
    assert pictures.picture(APRIL, NOW, None)["national"]["accrued"] == "1.00000000"
    assert computed[2:] == ["by_payer"]
    assert pictures.picture(APRIL, NOW, None)["suspense"]["services"] == 1
    assert computed[3:] == ["suspense"]


def test_the_picture_has_no_floats_and_all_its_parts(settings: Settings) -> None:
    """Lists are bounded; money and quantities are decimal strings."""
    lines = [
        row(f"C{n:06d}", supplier=f"{10000 + n}", days=(("2026-04-03", Fraction(100 + n)),),
            groups=(Group(f"Q{n:02d}", Fraction(100 + n), (), None, Fraction(0), (), f"Q{n:02d}"),))
        for n in range(25)
    ]  # fmt: skip
    accruals = Accruals(ClickHouse(settings))
    accruals.insert(lines, 1, 0)
    accruals.insert_drawn(
        [
            (f"Q{n:02d}", APRIL, 1, Fraction(1000), Drawn(Fraction(7, 3), Fraction(n, 30), Fraction(n * 30)))
            for n in range(25)
        ]
    )
    usage(settings, *({"ods_code": f"A{n}"} for n in range(30)))
    letters(settings, *(f"reason {n}" for n in range(30)))
    letters(settings, "was said before with other content", agent="usage")
    Documents(ClickHouse(settings)).insert_period(APRIL, 1, [], 12_345, Decimal(0))
    picture = Pictures(Queries(ClickHouse(settings)), settings).picture(None, NOW, None)

    def check(value: Any) -> None:
        assert not isinstance(value, (float, Decimal))
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(each)

    check(picture)
    for kind in ("suppliers", "payers"):
        assert picture[kind]["count"] == 25
        assert [each["accrued"] for each in picture[kind]["top"]] == [pounds(124 - n, 8) for n in range(10)]
        assert picture[kind]["others"]["accrued"] == pounds(sum(range(100, 115)), 8)
    assert picture["national"]["accrued"] == pounds(sum(range(100, 125)), 8)
    allocations = picture["allocations"]
    assert [each["party"] for each in allocations["shown"]] == [f"Q{n:02d}" for n in (*range(5), *range(20, 25))]
    assert (allocations["year"], allocations["allocation"], allocations["left"]) == ("2026/27", "250.00", "90.00")
    assert allocations["drawn"] == "160.00"
    assert picture["usage"] == {"accepted": 30, "duplicates": None, "conflicts": 1, "refused": 30}
    assert picture["suspense"]["services"] == 30
    assert len(picture["suspense"]["largest"]) == len(picture["dead_letters"]["last"]) == 10
    assert picture["dead_letters"]["count"] == 31
    assert picture["periods"][0] | {"closed_at_ms": 0} == {
        "period": "2026-04", "documents": 0, "net": "0.00", "held": "123.45", "drift": "0.00", "closed_at_ms": 0
    }  # fmt: skip


def test_an_empty_ledger_has_a_picture(settings: Settings) -> None:
    picture = Pictures(Queries(ClickHouse(settings)), settings).picture(None, NOW, None)
    assert picture["national"] == {
        "id": "", "accrued": "0.00000000", "per_second": "0.000000000000", "whole_month": "0.00"
    }  # fmt: skip


# ---- what is served -----------------------------------------------------------------------------------------


def serve(settings: Settings, use: Callable[[TestClient[Any, Any]], Awaitable[None]]) -> None:
    """Runs the application while `use` is a client of it."""

    async def run() -> None:
        timeout = ClientTimeout(total=60)
        async with TestClient(TestServer(web_app.application(settings)), timeout=timeout) as client:
            await use(client)

    asyncio.run(run())


async def next_event(response: Any) -> tuple[str, Any]:
    """The next event of a stream: its name and value."""
    name = ""
    while True:
        line = (await asyncio.wait_for(response.content.readline(), 40)).decode()
        assert line, "the stream has ended"
        if line.startswith("event: "):
            name = line[7:].strip()
        elif line.startswith("data: "):
            return name, json.loads(line[6:])


def test_the_stream_goes_on_about_one_a_second(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes into the ledger is in the next event; several listeners share one refresh."""
    monkeypatch.setattr(picture_module, "_REST", 0)
    monkeypatch.setattr(picture_module, "_COSTLY_SECONDS", 60)
    accruals = Accruals(ClickHouse(settings))
    accruals.insert([row(days=(("2026-04-03", Fraction(100)),))], 1, 0)

    async def use(client: TestClient[Any, Any]) -> None:
        first, second = [await client.get("/events?month=2026-04") for _ in range(2)]
        assert first.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        started = time.monotonic()
        seen = [await next_event(first) for _ in range(3)]
        assert 1.5 < time.monotonic() - started < 30
        assert {name for name, _ in seen} == {"picture"}
        assert seen[-1][1]["national"]["accrued"] == "1.00000000"
        assert await next_event(second) == seen[0]
        await asyncio.to_thread(accruals.insert, [row("C2", days=(("2026-04-03", Fraction(11)),))], 1, 0)
        for _ in range(5):
            if (await next_event(first))[1]["national"]["accrued"] == "1.11000000":
                break
        else:
            pytest.fail("the new row was never seen")
        first.close()
        second.close()

    serve(settings, use)


def test_nobody_listens_nothing_is_asked(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    plain = Queries.tokens

    def tokens(self: Queries) -> Any:
        asked.append(None)
        return plain(self)

    monkeypatch.setattr(Queries, "tokens", tokens)

    async def use(client: TestClient[Any, Any]) -> None:
        assert (await client.get("/")).status == 200
        assert (await client.get("/health")).status == 200
        await asyncio.sleep(1.2)
        assert not asked
        response = await client.get("/events")
        await next_event(response)
        response.close()
        await asyncio.sleep(2.5)
        before = len(asked)
        assert before
        await asyncio.sleep(1.5)
        assert len(asked) == before

    serve(settings, use)


def test_hostile_text_stays_text(settings: Settings) -> None:
    """Suppliers choose ids and are quoted in reasons: an event stays one line, the page makes no HTML of it."""
    hostile = row("C1", supplier=HOSTILE, days=(("2026-04-03", Fraction(1)),))
    hostile = replace(
        hostile, groups=json.dumps([group_json(Group("Q", Fraction(1), (), None, Fraction(0), (), HOSTILE))])
    )
    Accruals(ClickHouse(settings)).insert([hostile], 1, 0)
    usage(settings, {"item_id": HOSTILE, "ods_code": HOSTILE})
    letters(settings, HOSTILE)

    async def use(client: TestClient[Any, Any]) -> None:
        response = await client.get("/events?month=2026-04")
        _, picture = await next_event(response)
        assert picture["suppliers"]["top"][0]["id"] == picture["payers"]["top"][0]["id"] == HOSTILE
        assert picture["suspense"]["largest"][0]["ods_code"] == HOSTILE
        assert HOSTILE in picture["dead_letters"]["last"][0]["reason"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert (await next_event(response))[0] == "picture"
        response.close()

    serve(settings, use)
    script = (Path(web_app.__file__).parent / "page.js").read_text()
    for maker in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert maker not in script


def test_read_only_and_locked_down(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """GET only, our own files only, local names only on a local address, months that exist, so many listeners."""
    monkeypatch.setattr(web_app, "MAX_LISTENERS", 2)

    async def use(client: TestClient[Any, Any]) -> None:
        page = await client.get("/")
        text = await page.text()
        policy = page.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in policy
        for outside in ("http:", "https:", "//", "style=", "onclick", "<script>"):
            assert outside not in text.replace("<!doctype html>", "")
        for path in ("/page.js", "/page.css", "/health", "/health/", "/ready", "/ready/", "/metrics"):
            assert (await client.get(path)).status == 200, path
        for method in ("post", "put", "delete", "patch"):
            for path in ("/", "/events", "/metrics"):
                assert (await getattr(client, method)(path)).status == 405
        assert (await client.get("/../pyproject.toml")).status == 404
        assert (await client.get("/", headers={"Host": "evil.example"})).status == 403
        for month in ("2026-13", "x", "0001-01", "2026-04'--", "\uff12026-4"):
            assert (await client.get("/events", params={"month": month})).status == 400
        streams = [await client.get("/events") for _ in range(2)]
        refused = await client.get("/events")
        assert (refused.status, refused.headers["Retry-After"]) == (503, "30")
        for stream in streams:
            await next_event(stream)
            stream.close()

    serve(settings, use)


def test_the_stream_outlives_the_ledger(tmp_path: Path) -> None:
    """A ledger that goes away is said, and nothing of why; when it is back, so are the figures."""
    with EmbeddedStack(tmp_path, kafka="external:9092", redis="redis://external") as stack:
        settings = Settings(clickhouse=stack.clickhouse)
        ClickHouse(settings).migrate()

        async def until(response: Any, wanted: str) -> Any:
            for _ in range(20):
                name, value = await next_event(response)
                if name == wanted:
                    return value
            return pytest.fail(f"no event {wanted}")

        async def use(client: TestClient[Any, Any]) -> None:
            response = await client.get("/events")
            await until(response, "picture")
            assert (await client.get("/metrics")).status == 200
            stack.kill("clickhouse")
            reason = (await until(response, "away"))["reason"]
            assert reason == "the ledger does not answer"
            assert (await client.get("/ready")).status == 503
            assert (await client.get("/health")).status == 200
            stack.restart("clickhouse")
            await until(response, "picture")
            assert (await client.get("/ready")).status == 200
            response.close()

        serve(settings, use)


def test_national_gauges(settings: Settings) -> None:
    """Computed when scraped, at most once in five seconds; a closed period's figures among them."""
    now = datetime.now(LONDON)
    month = now.year * 12 + now.month - 1
    first, after = date.fromordinal(first_day(month)), date.fromordinal(last_day(month) + 1)
    accruals = Accruals(ClickHouse(settings))
    even = row(month=month, time=((first.isoformat(), after.isoformat(), Fraction(86_400)),))
    past = row(month=month - 1, days=((first.isoformat(), Fraction(1234)),))
    accruals.insert([even, past], 1, 0)
    usage(settings, {"ods_code": "A1", "quantity_micros": 2_500_000}, {"ods_code": "A2"})
    letters(settings, "one", "two")
    Documents(ClickHouse(settings)).insert_period(month - 1, 1, [], 4321, Decimal("0.5"))

    async def use(client: TestClient[Any, Any]) -> None:
        text = await (await client.get("/metrics")).text()
        assert "# TYPE tribill_accrued_pence gauge" in text
        letters(settings, "three", "four", "five")
        again = await (await client.get("/metrics")).text()
        assert 'tribill_dead_letters{agent="intake"} 2.0' in again

    serve(settings, use)
    expected_now = expected(even, datetime.now(UTC))[0]
    value = REGISTRY.get_sample_value
    accrued = value("tribill_accrued_pence", {"month": month_text(month)})
    assert accrued is not None
    assert abs(Fraction(accrued) - expected_now) < 60
    assert value("tribill_accrued_pence", {"month": month_text(month - 1)}) == 1234
    assert value("tribill_spend_pence_per_second") == pytest.approx(1, abs=0.05)
    assert value("tribill_suspense_services") == 2
    assert value("tribill_suspense_quantity") == 3.5
    assert value("tribill_dead_letters", {"agent": "intake"}) == 2
    assert value("tribill_held_pence") == 4321
    assert value("tribill_accrual_drift_pence") == 0.5
    assert value("tribill_closed_period_timestamp_seconds") == month_start(month).timestamp()


# ---- the process and the broker -----------------------------------------------------------------------------


def test_progress_of_the_stages(tmp_path: Path) -> None:
    """What is in the log and in no group's commits is to do; usage is settled once its stage has done all."""
    from confluent_kafka import Producer

    with EmbeddedStack(tmp_path, clickhouse="http://external", redis="redis://external") as stack:
        settings = Settings(kafka=stack.kafka, partitions=2)
        broker = Broker(settings)
        broker.create_topics()
        producer = Producer({"bootstrap.servers": stack.kafka})
        for topic, records in (("usage", 3), ("charge-inputs", 2)):
            for number in range(records):
                producer.produce(topic, b"x", partition=number % 2)
        producer.flush()
        found = progress(broker, settings)
        assert found.stage("intake") == 3
        assert found.behind["charges"] == {"charge-inputs": 2}
        assert found.settled == {"usage/0": 0, "usage/1": 0}
        producer.produce("usage-accepted", b"x", partition=0)
        producer.flush()
        assert progress(broker, settings).settled is None


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_when_asked(settings: Settings, way: signal.Signals) -> None:
    """Also with a browser listening."""
    port = free_port()
    environment = os.environ | replace(settings, web_port=port).environment()
    program = "from streams.settings import Settings; from web.app import serve; serve(Settings.load())"
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=root)
    try:
        deadline = time.monotonic() + 100
        while True:
            try:
                stream = urllib.request.urlopen(f"http://127.0.0.1:{port}/events", timeout=10)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert stream.readline() == b"retry: 2000\n"
        process.send_signal(way)
        assert process.wait(100) == 0
        stream.close()
    finally:
        process.kill()
        process.wait()
