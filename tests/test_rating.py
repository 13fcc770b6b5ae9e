"""The rule book, rule by rule: worked examples, and what holds of any numbers (RULES 2 and 3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import date
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.charges import accrual_row
from rating import records as said
from rating.admission import CodeLog, Conflict, OrderLog
from rating.amounts import GRAINS, MICROS, largest_remainder, pence, round_half_away
from rating.book import Book, Order, Reference
from rating.calendar import (
    FOREVER,
    add_months,
    day_seconds,
    financial_year_months,
    first_day,
    last_day,
    parse_month,
)
from rating.charges import MonthCharge, rate_month, tiered_cost
from rating.close import Derivation, derive, invoice
from rating.funding import allocation_exact, draw_down, groups
from rating.records import Funding, Price, Refused, Tier, read_contract_change
from rating.rounding import Entitlement
from rating.timeline import Timeline
from tests.oracle.strategies import ARRIVAL, books
from tests.replay import replay

MANY = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=50)
ITEM, PRACTICE, PARTY, SUPPLIER = "10000-001", "A83005", "15E", "10000"
REST = (Funding("@ordering_party", "rest"),)
CENTRAL = (Funding("NHSE", "allocation"), *REST)
APRIL = parse_month("2026-04")


def day(text: str) -> int:
    return date.fromisoformat(text).toordinal()


def flat(micros: int, time_unit: str = "year", provisioning: str = "declarative", day_count: str = "month") -> Price:
    return Price("flat", "", provisioning, "", time_unit, day_count, (Tier(0, micros),))


def tiered(calculation: str, *tiers: tuple[int, int], provisioning: str = "declarative") -> Price:
    """Tiers of (units above which, price), both whole."""
    time_unit = "none" if provisioning == "on_demand" else "month"
    held = tuple(Tier(above * MICROS, price * MICROS) for above, price in tiers)
    return Price("tiered", calculation, provisioning, "", time_unit, "month", held)


class World:
    """An order of some lines at practices of their own, and reference data."""

    def __init__(self, *lines: said.OrderLine, commencement: str = "2026-04-01", term_months: int = 36) -> None:
        self.order = Order("C010001")
        header = said.Header(PARTY, SUPPLIER, "GPITF", day(commencement), term_months, 200_000)
        self.order.apply(said.OrderPlaced("C010001-01", header, lines))
        self.reference = Reference()
        self.usage: dict[tuple[str, str], dict[int, int]] = {}
        for line in lines:
            self.milestone(line.ods_code, "M1", commencement)
            self.milestone(line.ods_code, "M2", commencement)

    def milestone(self, ods_code: str, milestone: str, on: str) -> None:
        self.order.apply(said.MilestoneReached(ITEM, ods_code, milestone, day(on)))

    def say(self, body: said.ReferenceBody, code: str = PRACTICE) -> None:
        self.reference.say(said.ReferenceChange("r", code, body))

    def book(self) -> Book:
        return Book([self.order], self.reference, self.usage)

    def charge(self, month: str, ods_code: str = PRACTICE) -> Fraction:
        """The exact pence of a line's month."""
        charges = rate_month(self.order, ITEM, parse_month(month), self.book())
        return pence(charges.get(ods_code, MonthCharge()).total())

    def pence(self, until: str, payer: str = PARTY, ods_code: str = PRACTICE) -> list[int]:
        """What a payer is charged for a line, from April 2026 month by month."""
        period = parse_month(until)
        rows, _ = invoice(derive(self.book(), period), {}, period)
        found = {key.month: amount for key, amount in rows.items() if (key.payer, key.ods_code) == (payer, ods_code)}
        return [found.get(month, 0) for month in range(APRIL, parse_month(until) + 1)]


def line(
    price: Price, quantity: Fraction | int = 1, funding: said.Waterfall = REST, at: str = PRACTICE
) -> said.OrderLine:
    return said.OrderLine(ITEM, at, int(quantity * MICROS), price, funding)


# --- 2 and 3.1: what holds on a day -------------------------------------------------------------


def test_later_paint_covers_until_its_own_end() -> None:
    """2.1: a later change overwrites from its `from` on, until its own `to`; what it covered shows again after."""
    painted: Timeline[str] = Timeline("a")
    painted.paint(10, FOREVER, "b")
    painted.paint(5, 12, "c")
    assert painted.pieces(0, 20) == [(0, 5, "a"), (5, 12, "c"), (12, 20, "b")]
    assert [painted.at(each) for each in (4, 5, 11, 12)] == ["a", "c", "c", "b"]


def test_a_list_size_holds_from_its_day_until_the_next() -> None:
    """2.2: the latest `as_of` holds, whatever the order they were said in; before the first, the ordered quantity."""
    world = World(line(flat(12_000_000, provisioning="patient"), quantity=100))
    world.say(said.ListSize(PRACTICE, day("2026-06-16"), 300))
    world.say(said.ListSize(PRACTICE, day("2026-05-01"), 200))
    assert [world.charge(month) for month in ("2026-04", "2026-05", "2026-06", "2026-07")] == [
        100_00, 200_00, 250_00, 300_00,
    ]  # fmt: skip
    world.say(said.ListSize(PRACTICE, day("2026-05-01"), 210))
    assert world.charge("2026-05") == 210_00


def test_a_retraction_of_a_retraction_lets_a_change_stand() -> None:
    """2.4: what is retracted was never said, unless the retraction is itself retracted."""
    size = said.ReferenceChange("a", PRACTICE, said.ListSize(PRACTICE, 1, 10))
    gone = said.ReferenceChange("b", PRACTICE, said.Retracted("a"))
    back = said.ReferenceChange("c", PRACTICE, said.Retracted("b"))
    assert Reference.fold([size, gone]).of(PRACTICE).list_sizes.at(5) is None
    assert Reference.fold([size, gone, back]).of(PRACTICE).list_sizes.at(5) == 10


@pytest.mark.parametrize(
    ("start", "months", "end"),
    [("2026-01-31", 1, "2026-02-28"), ("2024-01-31", 1, "2024-02-29"), ("2026-08-31", 6, "2027-02-28"),
     ("2026-03-30", 11, "2027-02-28"), ("2026-04-01", 36, "2029-04-01")],
)  # fmt: skip
def test_terms_end_on_clamped_days(start: str, months: int, end: str) -> None:
    """3.1: commencement + `term_months`, clamped to the month's length, is the first day no longer live."""
    assert add_months(day(start), months) == day(end)
    world = World(line(flat(1)), commencement=start, term_months=months)
    assert world.order.lines[ITEM, PRACTICE].live(world.reference) == (day(start), day(end))


def test_a_term_beyond_the_calendar_is_open() -> None:
    """3.1: a term longer than dates go does not end."""
    assert add_months(day("2026-04-01"), 12 * 9000) == FOREVER


@pytest.mark.parametrize("ends", ["cease", "terminate", "close", "merge", "M1 later", "no M1"])
def test_the_earliest_end_counts(ends: str) -> None:
    """3.1: each end is the first day no longer live; without M1 no day is."""
    world = World(line(flat(30_000_000, "month")))
    on, days = day("2026-04-11"), 10
    match ends:
        case "cease":
            world.order.apply(said.LineCeased(ITEM, PRACTICE, on))
        case "terminate":
            world.order.apply(said.OrderTerminated(on))
        case "close":
            world.say(said.PracticeClosed(PRACTICE, on))
        case "merge":
            world.say(said.PracticeMerged(PRACTICE, "B81001", on))
        case "M1 later":
            world.milestone(PRACTICE, "M1", "2026-04-21")
        case "no M1":
            world.order.milestones.clear()
            days = 0
    assert world.charge("2026-04") == days * 100


# --- 3.2: time charges --------------------------------------------------------------------------


def test_a_year_of_emis_web() -> None:
    """3.2, 3.10: 1.26 a patient for 8,461 patients is 10,660.86 a year, and no month is a penny from another."""
    world = World(line(flat(1_260_000, provisioning="patient")))
    world.say(said.ListSize(PRACTICE, day("2026-03-01"), 8461))
    months = world.pence("2027-03")
    assert sum(months) == 10_660_86
    assert set(months) == {888_40, 888_41}


@pytest.mark.parametrize(
    ("price", "quantity", "yearly"),
    [(280_000, 8461, 2_369_08), (840_000, 10_000, 8_400_00), (220_000, 8461, 1_861_42), (1_610_000, 8461, 13_622_21)],
)
def test_prices_a_head(price: int, quantity: int, yearly: int) -> None:
    """3.2: Docman 10, askmyGP and Audit+ by their list prices, and 1.61 a head, for a year."""
    assert sum(World(line(flat(price), quantity)).pence("2027-03")) == yearly


def test_prices_a_month() -> None:
    """3.2: a licence of 37.92 and a practice unit of 207.92 a month cost just that in every full month."""
    assert set(World(line(flat(37_920_000, "month"))).pence("2027-03")) == {37_92}
    assert set(World(line(flat(207_920_000, "month"), 3)).pence("2027-03")) == {623_76}


@pytest.mark.parametrize(
    ("day_count", "time_unit", "month", "expected"),
    [("month", "year", "2024-02", Fraction(1200_00, 12)), ("month", "month", "2026-05", Fraction(1200_00)),
     ("actual/365", "year", "2024-02", Fraction(1200_00 * 29, 365)),
     ("actual/actual", "year", "2024-02", Fraction(1200_00 * 29, 366)),
     ("actual/actual", "year", "2026-02", Fraction(1200_00 * 28, 365)),
     ("actual/365", "month", "2026-04", Fraction(12 * 1200_00 * 30, 365)),
     ("actual/actual", "month", "2024-04", Fraction(12 * 1200_00 * 30, 366))],
)  # fmt: skip
def test_day_counts(day_count: str, time_unit: str, month: str, expected: Fraction) -> None:
    """3.2: by the month's days, by 365, or by the year's; a monthly price x 12 first, a yearly / 12 for `month`."""
    world = World(line(flat(1200_000_000, time_unit, day_count=day_count)), commencement="2024-01-01")
    assert world.charge(month) == expected


@pytest.mark.parametrize(("on", "seconds"), [("2026-03-29", 82_800), ("2026-10-25", 90_000), ("2026-04-01", 86_400)])
def test_days_of_a_clock_change(on: str, seconds: int) -> None:
    """3.2: a London day has 23, 24 or 25 hours; its charge is a day's all the same."""
    assert day_seconds(day(on)) == seconds
    world = World(line(flat(31_000_000, "month")), commencement="2026-03-01")
    [charge] = rate_month(world.order, ITEM, parse_month(on[:7]), world.book()).values()
    length = last_day(parse_month(on[:7])) - first_day(parse_month(on[:7])) + 1
    assert pence(charge.between(day(on), day(on) + 1)) == Fraction(3100, length)


def test_tiers_count_the_orders_total_over_its_practices() -> None:
    """3.2: the tier's cost of all lines that are live, by each line's own quantity, exactly."""
    price = tiered("volume", (0, 10), (100, 7))
    world = World(line(price, 60), line(price, 41, at="B81001"))
    world.milestone("B81001", "M1", "2026-04-16")
    assert world.charge("2026-04") == 60 * 10_00 / Fraction(2) + 60 * 7_00 / Fraction(2)
    assert world.charge("2026-04", "B81001") == 41 * 7_00 / Fraction(2)


# --- 3.3, 3.4, 3.5: usage, tiers, one-offs -------------------------------------------------------


@pytest.mark.parametrize(
    ("calculation", "quantity", "pounds"),
    [("cumulative", Fraction(120), 590), ("cumulative", Fraction(201, 2), Fraction(50225, 100)),
     ("cumulative", Fraction(1, 2), Fraction(5, 2)), ("volume", Fraction(100), 500),
     ("volume", 100 + Fraction(1, MICROS), (100 + Fraction(1, MICROS)) * Fraction(9, 2)),
     ("single_fixed", Fraction(1, 2), 5), ("single_fixed", Fraction(1001, 10), Fraction(9, 2)),
     ("cumulative", Fraction(0), 0), ("volume", Fraction(0), 0), ("single_fixed", Fraction(0), 0)],
)  # fmt: skip
def test_tiers_of_fractional_totals(calculation: str, quantity: Fraction, pounds: Fraction) -> None:
    """3.4: a tier holds the units above `from` - 1, up to and including the next `from` - 1; 0 costs nothing."""
    tiers = (Tier(0, 5_000_000), Tier(100 * MICROS, 4_500_000))
    price = Price("tiered", calculation, "declarative", "", "month", "month", tiers)
    assert Fraction(tiered_cost(price, int(quantity * MICROS)), 10**12) == pounds


def metered(price: Price, usage: dict[str, int]) -> World:
    world = World(line(price))
    world.usage[ITEM, PRACTICE] = {day(on): units * MICROS for on, units in usage.items()}
    return world


def test_usage_counts_on_its_london_day() -> None:
    """3.3: quantity x price of the day, where the line is live; what comes before waits in suspense."""
    world = metered(flat(17_000, "none", "on_demand"), {"2026-03-31": 5, "2026-04-01": 100, "2026-04-30": 200})
    assert world.charge("2026-04") == Fraction(300 * 17, 10)
    assert world.book().untaken() == ({(ITEM, PRACTICE): 5 * MICROS}, {})


def test_included_minimum_and_maximum() -> None:
    """3.3: the first units of the month are free; the bounds are of the live days of the month."""
    tiers = (Tier(0, 1_000_000),)
    price = Price("flat", "", "on_demand", "", "none", "month", tiers, 10 * MICROS, 30_000_000, 60_000_000)
    days = {"2026-04-02": 7, "2026-04-03": 7}
    assert metered(price, days).charge("2026-04") == 30_00  # 4.00, topped up
    assert metered(price, days | {"2026-04-30": 36}).charge("2026-04") == 40_00
    assert metered(price, days | {"2026-04-30": 99}).charge("2026-04") == 60_00
    half = metered(price, {"2026-04-20": 15})
    half.milestone(PRACTICE, "M1", "2026-04-16")
    assert half.charge("2026-04") == 15_00


def test_usage_tiers_count_from_the_first_of_the_month() -> None:
    """3.3: cumulative by the day, volume and single-fixed by the month's total."""
    usage = {"2026-04-02": 8, "2026-04-03": 4}
    for calculation, expected in (("cumulative", 10 * 5_00 + 2 * 2_00), ("volume", 12 * 2_00), ("single_fixed", 2_00)):
        assert (
            metered(tiered(calculation, (0, 5), (10, 2), provisioning="on_demand"), usage).charge("2026-04") == expected
        )


def test_a_one_off_falls_on_m1() -> None:
    """3.5: price x quantity on the day of M1, without M2."""
    world = World(line(flat(650_000_000, "none"), 2))
    del world.order.milestones[ITEM, PRACTICE, "M2"]
    assert world.pence("2026-05") == [1_300_00, 0]


# --- 3.6 to 3.9: credits, holding, who pays -------------------------------------------------------


def test_a_credit_is_shared_by_quantity() -> None:
    """3.6: over the lines live on its date, by quantity; equally if all quantities are 0."""
    free = flat(0, "month")
    world = World(line(free, 1), line(free, 2, at="B81001"))
    world.order.apply(said.ServiceCredit(ITEM, None, 9_000_000, day("2026-04-10"), ""))
    assert (world.charge("2026-04"), world.charge("2026-04", "B81001")) == (-3_00, -6_00)
    none = World(line(free, 0), line(free, 0, at="B81001"))
    none.order.apply(said.ServiceCredit(ITEM, None, 9_000_000, day("2026-04-10"), ""))
    assert (none.charge("2026-04"), none.charge("2026-04", "B81001")) == (-4_50, -4_50)


def test_days_not_accepted_are_the_rests() -> None:
    """3.7: a day counts as accepted when every requirement named covers it."""
    world = World(line(flat(30_000_000, "month"), funding=(Funding("NHSE", "share", MICROS), *REST)))
    world.say(said.ServiceAccepted(ITEM, "C5", day("2026-04-01"), day("2026-04-21")), ITEM)
    world.say(said.ServiceAccepted(ITEM, "C11", day("2026-04-11"), FOREVER), ITEM)
    assert (world.pence("2026-04", "NHSE"), world.pence("2026-04")) == ([10_00], [20_00])


def test_held_until_m2() -> None:
    """3.8: M2 releases all that accrued since M1; one-offs need none."""
    world = World(line(flat(30_000_000, "month")))
    world.milestone(PRACTICE, "M2", "2026-06-30")
    for month, expected in (("2026-05", (0, 60_00)), ("2026-06", (90_00, 0))):
        rows, held = invoice(derive(world.book(), parse_month(month)), {}, parse_month(month))
        assert (sum(rows.values()), sum(held.values())) == expected


def test_a_waterfall_step_by_step() -> None:
    """3.9: a share of the whole, a cap per patient and year over the month's days, the rest."""
    funding = (Funding("SDF", "share", 500_000), Funding("NHSE", "per_patient_year", 120_000), *REST)
    world = World(line(flat(100_000_000, "month"), funding=funding))
    assert [world.pence("2026-04", payer) for payer in ("SDF", "NHSE", PARTY)] == [[50_00], [0], [50_00]]
    world.say(said.ListSize(PRACTICE, day("2026-04-01"), 3_000))
    assert [world.pence("2026-04", payer) for payer in ("SDF", "NHSE", PARTY)] == [[50_00], [30_00], [20_00]]


def test_of_a_negative_charge_only_shares_and_rest_take() -> None:
    """3.9: caps and the allocation take nothing of it."""
    funding = (Funding("SDF", "share", 250_000), Funding("CAP", "per_patient_year", MICROS), *CENTRAL)
    world = World(line(flat(0, "month"), funding=funding))
    world.say(said.ListSize(PRACTICE, day("2026-04-01"), 3_000))
    world.say(said.Allocation(PARTY, 2026, 100 * MICROS, 0, 0), PARTY)
    world.order.apply(said.ServiceCredit(ITEM, PRACTICE, 8_000_000, day("2026-04-10"), ""))
    assert [world.pence("2026-04", payer) for payer in ("SDF", "CAP", "NHSE", PARTY)] == [[-2_00], [0], [0], [-6_00]]


def test_the_month_that_runs_dry_is_covered_in_part() -> None:
    """3.9: all that would draw in it get the same fraction; the next months get nothing, the next year begins anew."""
    world = World(line(flat(100_000_000, "month"), 1, CENTRAL), line(flat(100_000_000, "month"), 3, CENTRAL, "B81001"))
    world.say(said.Allocation(PARTY, 2026, 600 * MICROS, 0, 0), PARTY)
    assert world.pence("2026-06", "NHSE") == [100_00, 50_00, 0]
    assert world.pence("2026-06", "NHSE", "B81001") == [300_00, 150_00, 0]
    assert world.pence("2026-06") == [0, 50_00, 100_00]
    months = dict.fromkeys(financial_year_months(2026), Fraction(400))
    assert [each.coverage for each in draw_down(600, months, 2026).values()] == [1, Fraction(1, 2), *[0] * 10]


def test_a_central_allocation_a_head() -> None:
    """3.9: 1.61 pounds x the patients of all practices under the party on `as_of`: 95.8 million for England."""
    reference = Reference()
    for code, parent, patients in (("A1", "SUB", 40_000_000), ("A2", PARTY, 19_500_000), ("A3", "OTHER", 7)):
        reference.say(said.ReferenceChange("m", code, said.Membership(code, "commissioner", parent, 0, FOREVER)))
        reference.say(said.ReferenceChange("s", code, said.ListSize(code, day("2020-04-01"), patients)))
    reference.say(said.ReferenceChange("m", "SUB", said.Membership("SUB", "commissioner", PARTY, 0, FOREVER)))
    assert allocation_exact(reference, PARTY, 2020) == 0
    national = said.Allocation(None, 2020, 0, 1_610_000, day("2020-04-01"))
    reference.say(said.ReferenceChange("n", "ENGLAND", national))
    assert pence(allocation_exact(reference, PARTY, 2020)) == 95_795_000_00
    reference.say(said.ReferenceChange("o", PARTY, said.Allocation(PARTY, 2020, 5 * MICROS, 0, 0)))
    assert pence(allocation_exact(reference, PARTY, 2020)) == 5_00


# --- 3.10: rounding -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "total", "expected"),
    [(["1/3", "1/3", "1/3"], 1, [1, 0, 0]), (["1/2", "3/4", "-1/4"], 1, [0, 1, 0]),
     (["-1/3", "-2/3"], -1, [0, -1]), (["-1/2", "-1/2"], -1, [0, -1]), (["-5/2", "7/2"], 1, [-2, 3]),
     (["2", "3"], 5, [2, 3]), (["1/2"], 1, [1]), (["5/2"], 4, None), (["5/2"], 1, None)],
)  # fmt: skip
def test_largest_remainder(shares: list[str], total: int, expected: list[int] | None) -> None:
    """3.10: floors, and a penny more for the largest excess over them, also when negative; ties to the first."""
    assert largest_remainder([Fraction(each) for each in shares], total) == expected


def test_halves_are_rounded_away_from_zero() -> None:
    """3.10: half away from zero; indexed prices of 2007 to 2014 come out as they were published."""
    assert [round_half_away(Fraction(each, 2)) for each in (1, -1, 3, -3, 2)] == [1, -1, 2, -2, 1]
    for price, factor, published in ((650_00, 10232, 665_08), (200_00, 10232, 204_64), (650_00, 10153, 659_95)):
        assert round_half_away(price * factor, 10_000) == published


def test_a_payer_that_takes_nothing_keeps_its_pence() -> None:
    """3.10: the others are rounded to sum to what remains; ties go by the waterfall, then by payer code."""
    entitlement = Entitlement()
    half = GRAINS // 2
    assert entitlement.add_month(2 * half, {"B": half, "A": half}, lambda: ["B", "A"]) == {"B": 1}
    assert entitlement.add_month(half, {"A": half}, lambda: ["B", "A"]) == {"A": 1}
    assert entitlement.payers_pence == {"B": 1, "A": 1}
    assert Entitlement().add_month(2 * half, {"B": half, "A": half}, list) == {"A": 1}


# --- section 1: what is refused, by name ------------------------------------------------------------

_PRICE = {"type": "flat", "provisioning": "declarative", "unit": "u", "time_unit": "month", "day_count": "month",
          "tiers": [{"from": "1", "price": "5"}]}  # fmt: skip
_REST = [{"payer": "X", "take": "rest"}]


def change(kind: str, id_: str = "c1", /, **body: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "order_number": "C010001",
        "recorded_at": "2026-03-01T09:00:00Z",
        "change": {kind: body},
    }


def placed(price: Any = _PRICE, funding: Any = _REST, **more: Any) -> dict[str, Any]:
    row = {"item_id": ITEM, "ods_code": PRACTICE, "quantity": "1", "price": price, "funding": funding}
    body: dict[str, Any] = {
        "order_id": "C010001-01", "ordering_party": PARTY, "supplier_id": SUPPLIER, "framework": "GPITF",
        "commencement": "2026-04-01", "vat_rate": "0.2", "lines": [row],
    }  # fmt: skip
    return change("OrderPlaced", "placed", **body | more)


@pytest.mark.parametrize(
    ("value", "field"),
    [(placed(_PRICE | {"tiers": [{"from": "2", "price": "5"}]}), "change.OrderPlaced.lines[0].price.tiers[0].from"),
     (placed(_PRICE | {"minimum": "1"}), "change.OrderPlaced.lines[0].price"),
     (placed(_PRICE | {"tiers": [{"from": "1", "price": "-5"}]}), "change.OrderPlaced.lines[0].price.tiers[0].price"),
     (placed(_PRICE | {"tiers": [{"from": "1", "price": "0.0000001"}]}),
      "change.OrderPlaced.lines[0].price.tiers[0].price"),
     (placed(funding=[]), "change.OrderPlaced.lines[0].funding"),
     (placed(funding=[*_REST, *_REST]), "change.OrderPlaced.lines[0].funding"),
     (placed(funding=[{"payer": "A", "take": {"share": "0.6"}}, {"payer": "B", "take": {"share": "0.6"}}, *_REST]),
      "change.OrderPlaced.lines[0].funding"),
     (placed(order_id="C010002-01"), "change.OrderPlaced.order_id"),
     (change("ServiceCredit", item_id=ITEM, amount="0", date="2026-04-01", reason=""), "change.ServiceCredit.amount"),
     (change("LineCeased", item_id=ITEM, ods_code=PRACTICE, date="2026-02-30"), "change.LineCeased.date"),
     (change("Nonsense"), "change")],
)  # fmt: skip
def test_a_change_that_breaks_a_rule_is_refused(value: dict[str, Any], field: str) -> None:
    """1: refused when read, never rounded, with the field named."""
    with pytest.raises(Refused) as refused:
        read_contract_change(value)
    assert refused.value.field.startswith(field)


@pytest.mark.parametrize(
    ("value", "field"),
    [(placed() | {"id": "other"}, "change.OrderPlaced.order_id"),
     (placed(order_id="C010001-02") | {"id": "other"}, "change.OrderPlaced.lines[0]"),
     (placed(order_id="C010001-02", ordering_party="Q") | {"id": "other"}, "change.OrderPlaced"),
     (change("LineCeased", item_id=ITEM, ods_code="B81001", date="2026-04-01"), "change.LineCeased.item_id"),
     (change("Retracted", change_id="unknown"), "change.Retracted.change_id"),
     (change("PriceAgreed", item_id=ITEM, price=_PRICE | {"time_unit": "year"}, **{"from": "2026-05-01"}),
      "change.PriceAgreed.price.time_unit"),
     (change("PriceAgreed", item_id=ITEM, **{"from": "2026-05-02"}, price=_PRICE | {"type": "tiered", "calculation":
      "volume", "tiers": [{"from": "1", "to": "2", "price": "5"}, {"from": "3", "price": "5"}]}),
      "change.PriceAgreed.price.type")],
)  # fmt: skip
def test_a_change_that_does_not_fit_its_order_is_refused(value: dict[str, Any], field: str) -> None:
    """1: against what stands before it in the log; a refused change keeps its id."""
    log = OrderLog("C010001")
    log.admit(placed())
    with pytest.raises(Refused) as refused:
        log.admit(value)
    assert refused.value.field == field
    with pytest.raises(Refused):
        log.admit(value)
    assert len(log.accepted) == 1


@pytest.mark.parametrize(
    ("anew", "why"),
    [(placed(lines=[]), "C010001-01 has been placed already"),
     (placed(order_id="C010001-02", lines=[], vat_rate="0.1"), "header as first written: vat_rate"),
     (placed(order_id="C010001-02", lines=[], ordering_party="Q"), "header as first written: ordering_party"),
     (placed(order_id="C010001-02"), f"repeats the line {ITEM} at {PRACTICE}")],
)  # fmt: skip
def test_a_retraction_brings_no_second_placing_back(anew: dict[str, Any], why: str) -> None:
    """1, 2.4: each order is placed once and no line twice, also when a retraction is retracted."""
    log = OrderLog("C010001")
    log.admit(placed())
    log.admit(change("Retracted", "gone", change_id="placed"))
    log.admit(anew | {"id": "anew"})
    with pytest.raises(Refused, match=f"'anew' would contradict: .*{why}") as refused:
        log.admit(change("Retracted", "back", change_id="gone"))
    assert refused.value.field == "change.Retracted.change_id"
    assert log.order.header.ordering_party == anew["change"]["OrderPlaced"]["ordering_party"]
    log.admit(change("Retracted", "anew gone", change_id="anew"))
    log.admit(change("Retracted", "back at last", change_id="gone"))
    assert log.order.header == OrderLog("C010001").admit(placed()).body.header  # type: ignore[union-attr]
    with pytest.raises(Refused, match=why):
        log.admit(change("Retracted", "both", change_id="anew gone"))


@pytest.mark.parametrize(("rate", "micros"), [("0.2", 200_000), ("20", 200_000), ("17.5", 175_000), ("1", 1_000_000)])
def test_a_rate_of_vat_in_per_cent(rate: str, micros: int) -> None:
    """Above one it can mean nothing else; and it is no more than all."""
    body = read_contract_change(placed(vat_rate=rate)).body
    assert isinstance(body, said.OrderPlaced)
    assert body.header.vat_rate_micros == micros
    for wrong in ("100.01", "20.00001"):
        with pytest.raises(Refused, match="per cent") as refused:
            OrderLog("C010001").admit(placed(vat_rate=wrong))
        assert refused.value.field == "change.OrderPlaced.vat_rate"


def test_an_id_said_again() -> None:
    """1: with the same content (trailing zeros do not count) a duplicate, with other content a conflict."""
    log = OrderLog("C010001")
    assert log.admit(placed()) is not None
    assert log.admit(placed(vat_rate="0.200")) is None
    with pytest.raises(Conflict):
        log.admit(placed(vat_rate="0.1"))
    codes = CodeLog(PRACTICE)
    size = {"ods_code": PRACTICE, "as_of": "2026-03-01", "patients": 8461}
    said_ = {"id": "r", "code": PRACTICE, "recorded_at": "2026-03-14T09:00:00Z", "change": {"ListSize": size}}
    assert codes.admit(said_) is not None
    assert codes.admit(said_) is None
    with pytest.raises(Conflict):
        codes.admit(said_ | {"change": {"ListSize": size | {"patients": 1}}})


# --- what holds of any numbers ----------------------------------------------------------------------


@given(st.integers(0, 10**12), st.integers(0, 10**11), st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_a_first_year_is_exact(micros: int, quantity: int, later: int) -> None:
    """3.10: twelve months from the start sum to the yearly price to the penny, any others to within one."""
    placed_line = said.OrderLine(ITEM, PRACTICE, quantity, flat(micros), REST)
    months = World(placed_line, term_months=60).pence("2030-09")
    yearly = round_half_away(micros * quantity, 10**10)
    assert sum(months[:12]) == yearly
    assert abs(sum(months[later : later + 12]) - yearly) <= 1


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 3)), max_size=6), st.data())
def test_splitting_a_timeline_changes_nothing(paints: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """2.1: a change said in two parts is the change, and the pieces of two ranges are the pieces of both."""
    whole, parts = Timeline(9), Timeline(9)
    for first, end, value in paints:
        whole.paint(first, end, value)
        middle = data.draw(st.integers(min(first, end), max(first, end)))
        parts.paint(first, middle, value)
        parts.paint(middle, end, value)
    assert [whole.at(each) for each in range(70)] == [parts.at(each) for each in range(70)]
    split = data.draw(st.integers(0, 70))
    assert by_day(whole.pieces(0, 70)) == by_day([*parts.pieces(0, split), *parts.pieces(split, 70)])


def by_day(pieces: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(each, value) for first, end, value in pieces for each in range(first, end)]


@given(st.lists(st.integers(-10 * GRAINS, 10 * GRAINS), min_size=1, max_size=5))
def test_rounded_payers_sum_to_the_rounded_line(shares: list[int]) -> None:
    """3.10: no penny is made or lost, and none is more than a penny from its exact share."""
    total = round_half_away(sum(shares), GRAINS)
    rounded = largest_remainder(shares, total, GRAINS)
    assert rounded is not None
    assert sum(rounded) == total
    assert all(abs(each * GRAINS - share) <= GRAINS for each, share in zip(rounded, shares, strict=True))


def derived_of(lines: list[dict[str, Any]]) -> tuple[Book, int, Derivation]:
    """The book that interchange lines make, to the end of their last close."""
    book = replay([each for each in lines if "close" not in each], arrival=ARRIVAL).book()
    closes = [parse_month(each["close"]) for each in lines if "close" in each] or [APRIL + 2]
    return book, max(closes), derive(book, max(closes))


@MANY
@given(books(flat_only=False))
def test_payers_pay_what_the_line_costs(lines: list[dict[str, Any]]) -> None:
    """3.10: the payers' pence of a line sum to its exact entitlement, rounded once."""
    _, _, derived = derived_of(lines)
    paid: dict[tuple[str, str, str], int] = {}
    for key, amounts in itertools.chain(derived.payable.items(), derived.held.items()):
        paid[key] = paid.get(key, 0) + sum(amounts.values())
    for key, months in derived.charges.items():
        assert paid.get(key, 0) == round_half_away(sum(months.values()), GRAINS)


@MANY
@given(books(flat_only=False))
def test_the_list_order_of_lines_changes_nothing(lines: list[dict[str, Any]]) -> None:
    """3.2, 3.3: an order's total, shares and roundings do not depend on which of its lines is named first."""
    turned = []
    for each in lines:
        body = each.get("value", {}).get("change", {}) if isinstance(each.get("value"), dict) else {}
        order = body.get("OrderPlaced") if isinstance(body, dict) else None
        if isinstance(order, dict) and isinstance(order.get("lines"), list):
            value = each["value"] | {"change": {"OrderPlaced": order | {"lines": order["lines"][::-1]}}}
            turned.append(each | {"value": value})
        else:
            turned.append(each)
    assert replay(turned, arrival=ARRIVAL).closes == replay(lines, arrival=ARRIVAL).closes


@MANY
@given(books(flat_only=False))
def test_the_accrual_is_the_charge(lines: list[dict[str, Any]]) -> None:
    """Promise 3: what a row says to have accrued at the end of any day is the exact charge to that day, and the
    month's is what the close derives: both come from the same functions.
    """
    book, period, derived = derived_of(lines)
    for order, month in itertools.product(book.orders.values(), range(period - 14, period + 1)):
        start, after = first_day(month), first_day(month + 1)
        for item_id in order.by_item:
            for ods_code, charge in rate_month(order, item_id, month, book).items():
                of = order.lines[item_id, ods_code]
                row = accrual_row(of, month, charge, book)
                for end in range(start, after + 1):
                    accrued = sum(
                        each * max(0, min(high.toordinal(), end) - low.toordinal()) for low, high, each in row.time
                    ) + sum(each for on, each in row.days if on.toordinal() < end)
                    assert accrued == pence(charge.between(start, end))
                assert row.exact == pence(charge.total()) == derived.exact.get((of.key, month), 0)
                assert sum(group.charge for group in groups(of, month, charge, book)) == charge.total()
