"""What a charge line costs in a calendar month, day by day and exact (RULES 3.1 to 3.6).

Money is exact, in grains of a penny (`amounts`); only `rounding` rounds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from rating.amounts import MICRO_GRAINS, MICROS, PARTS, Exact, divided
from rating.book import Book, Line, Order
from rating.calendar import days_in, first_day, month_of
from rating.records import Price


@dataclass(slots=True)
class MonthCharge:
    """A line's charge in one month.

    `time` holds steps (first day, day after, grains of each day); `days` holds what falls on
    single days: usage, one-offs, top-ups, credits.  `quantity_micros` is the usage counted.
    """

    time: list[tuple[int, int, Exact]] = field(default_factory=list)
    days: dict[int, Exact] = field(default_factory=dict)
    quantity_micros: int = 0

    def add(self, day: int, exact: Exact) -> None:
        """Adds to what falls on a day."""
        self.days[day] = self.days.get(day, 0) + exact

    def between(self, first: int, end: int) -> Exact:
        """The charge of the days `[first, end)`."""
        total: Exact = 0
        for start, until, each in self.time:
            days = min(until, end) - max(start, first)
            if days > 0:
                total += each * days
        for day, exact in self.days.items():
            if first <= day < end:
                total += exact
        return total

    def total(self) -> Exact:
        """The charge of the whole month."""
        if len(self.time) == 1 and not self.days:
            [(start, until, each)] = self.time
            return each * (until - start)
        charges = [each * (until - start) for start, until, each in self.time]
        charges += self.days.values()
        return sum(charges)


#: A line with its live days `[first, end)`, of all time or within a month.
Live = tuple[Line, int, int]
#: The charges of a month, by practice; a line without any is not in it.
Charges = dict[str, MonthCharge]


def _of(charges: Charges, line: Line) -> MonthCharge:
    found = charges.get(line.ods_code)
    if found is None:
        found = charges[line.ods_code] = MonthCharge()
    return found


# --- tiers (3.4) ----------------------------------------------------------------------------


def tier_price(price: Price, total_micros: int) -> int:
    """The price_micros of the tier that holds the total: up to and including the next tier's `from` - 1 (3.4).

    >>> from rating.records import Tier
    >>> price = Price("tiered", "volume", "on_demand", "", "none", "month", (Tier(0, 5), Tier(100_000_000, 4)))
    >>> [tier_price(price, units * MICROS) for units in (1, 100, 101)]
    [5, 5, 4]
    """
    found = price.tiers[0]
    for tier in price.tiers:
        if tier.above_micros < total_micros:
            found = tier
    return found.price_micros


def tiered_cost(price: Price, total_micros: int) -> int:
    """What a total costs by a price, in 10**-12 pounds; a total of 0 costs nothing.

    Cumulative: each unit at its tier's price.  Volume: all units at the price of the tier that
    holds the total.  Single-fixed: that tier's price once.

    >>> from rating.records import Tier
    >>> tiers = (Tier(0, 5_000_000), Tier(100_000_000, 4_500_000))
    >>> price = Price("tiered", "cumulative", "declarative", "", "month", "month", tiers)
    >>> tiered_cost(price, 120_000_000) / 10**12  # 100 x 5.00 + 20 x 4.50
    590.0
    """
    if total_micros == 0:
        return 0
    if price.is_flat:
        return price.tiers[0].price_micros * total_micros
    if price.calculation == "volume":
        return tier_price(price, total_micros) * total_micros
    if price.calculation == "single_fixed":
        return tier_price(price, total_micros) * MICROS
    return stretch_cost(price, 0, total_micros)


def stretch_cost(price: Price, low_micros: int, high_micros: int) -> int:
    """The units above `low_micros` up to `high_micros`, each at its tier's price, in 10**-12 pounds (3.3, 3.4).

    Thirty units on a day, after 90 in the month: ten at 5.00 and twenty at 4.50.

    >>> from rating.records import Tier
    >>> tiers = (Tier(0, 5_000_000), Tier(100_000_000, 4_500_000))
    >>> price = Price("tiered", "cumulative", "on_demand", "", "none", "month", tiers)
    >>> stretch_cost(price, 90_000_000, 120_000_000) // 10**12
    140
    """
    cost = 0
    for index, tier in enumerate(price.tiers):
        last = index + 1 == len(price.tiers)
        top = high_micros if last else min(high_micros, price.tiers[index + 1].above_micros)
        units = top - max(low_micros, tier.above_micros)
        if units > 0:
            cost += units * tier.price_micros
    return cost


# --- time charges (3.2) ---------------------------------------------------------------------


@lru_cache(maxsize=4096)
def day_grains(time_unit: str, day_count: str, month: int) -> int:
    """What 10**-12 pounds a month or a year are for one day of the month (3.2).

    1.26 a year for 8,461 patients is 888.405 pounds in April, and in any other month:

    >>> from rating.amounts import pence
    >>> [str(pence(1_260_000 * 8461 * MICROS * day_grains("year", "month", 2026 * 12 + m) * days))
    ...  for m, days in ((3, 30), (1, 28))]
    ['177681/2', '177681/2']
    """
    yearly = time_unit == "year"
    if day_count == "month":
        return PARTS // (days_in(month) * (12 if yearly else 1))
    year = month // 12
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = 366 if day_count == "actual/actual" and leap else 365
    return PARTS // days * (1 if yearly else 12)


def quantity_pieces(line: Line, book: Book, first: int, end: int) -> list[tuple[int, int, Price, int]]:
    """The steps inside `[first, end)` of a line's price and quantity: (from, to, price, quantity_micros).

    The quantity is the list size of the day for a price per patient (the ordered quantity before
    the practice's first list size, RULES 2.2), else the declared one.
    """
    found: list[tuple[int, int, Price, int]] = []
    for start, until, price in line.price.pieces(first, end):
        if price.provisioning != "patient":
            for low, high, quantity in line.quantity.pieces(start, until):
                found.append((low, high, price, quantity))
            continue
        for low, high, patients in book.reference.of(line.ods_code).list_sizes.pieces(start, until):
            if patients is not None:
                found.append((low, high, price, patients * MICROS))
            else:
                for at, to, quantity in line.quantity.pieces(low, high):
                    found.append((at, to, price, quantity))
    return found


def quantity_on(line: Line, book: Book, day: int) -> tuple[Price, int]:
    """A line's price and quantity_micros on a day."""
    for _, _, price, quantity in quantity_pieces(line, book, day, day + 1):
        return price, quantity
    raise AssertionError("every day has a price and a quantity")


def _add_flat_charges(live: Iterable[Live], book: Book, month: int, charges: Charges) -> None:
    """The time charges of lines that have had flat prices only: each by itself."""
    for line, first, end in live:
        time: list[tuple[int, int, Exact]] = [
            (low, high, price.tiers[0].price_micros * quantity * day_grains(price.time_unit, price.day_count, month))
            for low, high, price, quantity in quantity_pieces(line, book, first, end)
            if quantity and price.is_time and price.tiers[0].price_micros
        ]
        if time:
            charges[line.ods_code] = MonthCharge(time)


def _add_tiered_charges(live: Iterable[Live], book: Book, month: int, charges: Charges) -> None:
    """The time charges of lines of which some are tiered: by the order's total of the day."""
    steps = [
        (line, low, high, price, quantity)
        for line, first, end in live
        for low, high, price, quantity in quantity_pieces(line, book, first, end)
        if quantity and price.is_time
    ]
    totals = _totals(steps)
    for line, low, high, price, quantity in steps:
        grains = day_grains(price.time_unit, price.day_count, month)
        for low_total, high_total, total in totals:
            start, until = max(low_total, low), min(high_total, high)
            if start < until and (each := divided(tiered_cost(price, total) * quantity * grains, total)):
                _of(charges, line).time.append((start, until, each))


def _totals(steps: list[tuple[Line, int, int, Price, int]]) -> list[tuple[int, int, int]]:
    """The order's total over its lines for the item, by day: (from, to, quantity_micros)."""
    change: dict[int, int] = {}
    for _, low, high, _, quantity in steps:
        change[low] = change.get(low, 0) + quantity
        change[high] = change.get(high, 0) - quantity
    days = sorted(change)
    totals, total = [], 0
    for low, high in pairwise(days):
        total += change[low]
        totals.append((low, high, total))
    return totals


# --- usage charges (3.3) --------------------------------------------------------------------


class _Used(NamedTuple):
    """One line's usage in the month: what counts towards tiers and charges, by day."""

    live: Live
    remaining: dict[int, tuple[Price, int]]


def _add_usage_charges(live: Iterable[Live], book: Book, month: int, charges: Charges) -> None:
    used = [_Used(each, _free_of_included(each, book, charges)) for each in live]
    by_day: dict[int, int] = {}
    for each in used:
        for day, (_, quantity) in each.remaining.items():
            by_day[day] = by_day.get(day, 0) + quantity
    before: dict[int, int] = {}
    total = 0
    for day in sorted(by_day):
        before[day] = total
        total += by_day[day]
    for each in used:
        exact = _usage_by_day(each, month, by_day, before, total)
        _bound(each.live, month, exact)
        if exact:
            _of(charges, each.live[0]).days = {day: amount for day, amount in exact.items() if amount}


def _free_of_included(live: Live, book: Book, charges: Charges) -> dict[int, tuple[Price, int]]:
    """The month's usage that the line takes, less the included units, in day order."""
    line, first, end = live
    service = (line.item_id, line.ods_code)
    days = book.usage.get(service)
    remaining: dict[int, tuple[Price, int]] = {}
    if not days:
        return remaining
    free = taken = 0
    sole = len(book.by_service[service]) == 1
    for low, high, price in line.price.pieces(first, end):
        for day in range(low, high) if price.is_on_demand else ():
            quantity = days.get(day, 0)
            if not quantity or not (sole or book.takers(service, day)[0] is line):
                continue
            taken += quantity
            released = min(quantity, max(0, price.included_micros - free)) if price.included_micros else 0
            free += released
            if quantity > released:
                remaining[day] = (price, quantity - released)
    if taken:
        _of(charges, line).quantity_micros = taken
    return remaining


def _usage_by_day(
    used: _Used, month: int, by_day: Mapping[int, int], before: Mapping[int, int], total: int
) -> dict[int, Exact]:
    """The line's usage charge of each day before its bounds."""
    exact: dict[int, Exact] = {}
    fixed = _last_single_fixed(used.live)
    for day, (price, quantity) in used.remaining.items():
        if price.is_flat:
            exact[day] = price.tiers[0].price_micros * quantity * PARTS
        elif price.calculation == "volume":
            exact[day] = tier_price(price, total) * quantity * PARTS
        elif price.calculation == "single_fixed":
            exact[day] = divided(tiered_cost(fixed or price, total) * quantity * PARTS, total)
        else:
            stretch = stretch_cost(price, before[day], before[day] + by_day[day])
            exact[day] = divided(stretch * quantity * PARTS, by_day[day])
    return exact


def _last_single_fixed(live: Live) -> Price | None:
    """The last of the line's prices on its live days of the month that is tiered single-fixed."""
    found = None
    line, first, end = live
    for _, _, price in line.price.pieces(first, end):
        if not price.is_flat and price.calculation == "single_fixed":
            found = price
    return found


def _bound(live: Live, month: int, exact: dict[int, Exact]) -> None:
    """Tops the month's usage charge up to its minimum, or cuts it to its maximum."""
    line, first, end = live
    days, least_micros, most_micros, bounded = 0, 0, 0, True
    on_demand: list[range] = []
    for low, high, price in line.price.pieces(first, end):
        if price.is_on_demand:
            days += high - low
            on_demand.append(range(low, high))
            least_micros += price.minimum_micros * (high - low)
            bounded = bounded and price.maximum_micros is not None
            most_micros += (price.maximum_micros or 0) * (high - low)
    if not days or not (least_micros or bounded):
        return
    charge = sum(exact.values())
    of_a_day = MICRO_GRAINS // days_in(month)
    least, most = least_micros * of_a_day, most_micros * of_a_day
    if charge < least:
        each = divided(least - charge, days)
        for span in on_demand:
            for day in span:
                exact[day] = exact.get(day, 0) + each
    elif bounded and charge > most:
        for day, uncut in exact.items():
            exact[day] = divided(uncut * most, charge)


# --- one-offs and credits (3.5, 3.6) --------------------------------------------------------


def _add_one_offs(live: Collection[Live], book: Book, month: int, charges: Charges) -> None:
    for line, first, end in live:
        day = line.m1
        if day is None or not first <= day < end:
            continue
        price, quantity = quantity_on(line, book, day)
        if not price.is_one_off:
            continue
        if price.is_flat:
            exact: Exact = price.tiers[0].price_micros * quantity * PARTS
        else:
            total = 0
            for other, from_, to in live:
                if from_ <= day < to:
                    other_price, other_quantity = quantity_on(other, book, day)
                    total += other_quantity if other_price.is_one_off else 0
            exact = divided(tiered_cost(price, total) * quantity * PARTS, total) if total else 0
        if exact:
            _of(charges, line).add(day, exact)


def _subtract_credits(
    order: Order, item_id: str, live: Iterable[Live], book: Book, month: int, charges: Charges
) -> None:
    for credit in order.credits:
        if credit.item_id != item_id or month_of(credit.day) != month:
            continue
        exact = credit.amount_micros * MICRO_GRAINS
        sharing = order.named(item_id, credit.ods_code)
        if credit.ods_code is None:
            sharing = [line for line, first, end in live if first <= credit.day < end] or sharing
        quantities = [quantity_on(line, book, credit.day)[1] for line in sharing]
        if not any(quantities):
            quantities = [1] * len(sharing)
        for line, quantity in zip(sharing, quantities, strict=True):
            if quantity:
                _of(charges, line).add(credit.day, -divided(exact * quantity, sum(quantities)))


# --- a month --------------------------------------------------------------------------------


def rate_months(
    order: Order, item_id: str, months: Iterable[int], book: Book, lines: Iterable[Line] | None = None
) -> Iterator[tuple[int, Charges]]:
    """Each month's charges of an order's lines for an item, by practice; a line without any is not in them.

    All of the item's lines, for tiers count the order's total over its practices; or only those
    given, where they are not `rated_together`.
    """
    if lines is None:
        lines = order.by_item.get(item_id, [])
    spans = [(line, *line.live(book.reference)) for line in lines]
    prices = [price for line in lines for price in line.price.values]
    add_time_charges = _add_flat_charges if all(price.is_flat for price in prices) else _add_tiered_charges
    metered = any(price.is_on_demand for price in prices)
    delivered = any(price.is_one_off for price in prices)
    for month in months:
        start, after = first_day(month), first_day(month + 1)
        live = [
            (line, first if first > start else start, end if end < after else after)
            for line, first, end in spans
            if first < after and end > start
        ]
        charges: Charges = {}
        add_time_charges(live, book, month, charges)
        if metered:
            _add_usage_charges(live, book, month, charges)
        if delivered:
            _add_one_offs(live, book, month, charges)
        _subtract_credits(order, item_id, live, book, month, charges)
        yield month, charges


def rate_month(order: Order, item_id: str, month: int, book: Book) -> Charges:
    """One month's charges of all of an order's lines for an item, by practice.

    A one-off (3.5) of two days' training at 650.00 on the day of M1, and a service credit (3.6) of 50.00:

    >>> from rating.amounts import pence
    >>> from rating.book import Reference
    >>> from rating.records import ContractChange, Funding, Header, MilestoneReached, OrderLine, OrderPlaced
    >>> from rating.records import ServiceCredit, Tier
    >>> day = date(2026, 4, 7).toordinal()
    >>> price = Price("flat", "ignored", "declarative", "day", "none", "month", (Tier(0, 650_000_000),))
    >>> line = OrderLine("10000-S-003", "A83005", 2 * MICROS, price, (Funding("NHSE", "rest"),))
    >>> header = Header("16C", "10000", "GPITF", day, 36, 200_000)
    >>> said = [OrderPlaced("C010001-01", header, (line,)), MilestoneReached("10000-S-003", "A83005", "M1", day),
    ...         ServiceCredit("10000-S-003", None, 50_000_000, day + 3, "late")]
    >>> order = Order.fold("C010001", [ContractChange(str(n), "C010001", body) for n, body in enumerate(said)])
    >>> charges = rate_month(order, "10000-S-003", 2026 * 12 + 3, Book([order], Reference(), {}))
    >>> [(iso(day), int(pence(exact))) for day, exact in charges["A83005"].days.items()]
    [('2026-04-07', 130000), ('2026-04-10', -5000)]
    """
    return dict(rate_months(order, item_id, [month], book))[month]


def rated_together(order: Order, item_id: str) -> bool:
    """Whether what is said of one of the item's lines may move the charges of the order's others.

    So it is with a tiered price, which counts their total, and a credit that they share.
    """
    return any(credit.item_id == item_id and credit.ods_code is None for credit in order.credits) or any(
        not price.is_flat for line in order.by_item.get(item_id, ()) for price in line.price.values
    )


def first_month(line: Line, book: Book) -> int | None:
    """The month of the line's first live day or first credit, the earlier; None when it has neither."""
    first, end = line.live(book.reference)
    days = [first] if first < end else []
    days += [
        credit.day
        for credit in line.order.credits
        if credit.item_id == line.item_id and credit.ods_code in (None, line.ods_code)
    ]
    return month_of(min(days)) if days else None


@lru_cache(maxsize=65_536)
def iso(day: int) -> str:
    """A day (ordinal) as an ISO date, for messages and evidence."""
    return date.fromordinal(day).isoformat()
