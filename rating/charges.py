"""What a charge line costs in a calendar month, day by day and exact (RULES 3.1 to 3.6).

Exact money is a `Fraction` of pence; only `rounding` rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from fractions import Fraction
from itertools import pairwise

from rating.amounts import MICROS, PENNY
from rating.book import Book, Line, Order
from rating.calendar import days_in, first_day, last_day, month_of
from rating.records import Price

ZERO = Fraction(0)


@dataclass(slots=True)
class MonthCharge:
    """A line's charge in one month.

    `time` holds steps (first day, day after, pence of each day); `days` holds what falls on
    single days: usage, one-offs, top-ups, credits.  `quantity_micros` is the usage counted.
    """

    time: list[tuple[int, int, Fraction]] = field(default_factory=list)
    days: dict[int, Fraction] = field(default_factory=dict)
    quantity_micros: int = 0

    def add(self, day: int, exact: Fraction) -> None:
        """Adds to what falls on a day."""
        self.days[day] = self.days.get(day, ZERO) + exact

    def between(self, first: int, end: int) -> Fraction:
        """The charge of the days `[first, end)`, in exact pence."""
        total = ZERO
        for start, until, each in self.time:
            days = min(until, end) - max(start, first)
            if days > 0:
                total += each * days
        for day, exact in self.days.items():
            if first <= day < end:
                total += exact
        return total


# --- tiers (3.4) ----------------------------------------------------------------------------


def tier_price(price: Price, total_micros: int) -> int:
    """The price_micros of the tier that holds the total."""
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
    """The units above `low_micros` up to `high_micros`, each at its tier's price, in 10**-12 pounds."""
    cost = 0
    for index, tier in enumerate(price.tiers):
        last = index + 1 == len(price.tiers)
        top = high_micros if last else min(high_micros, price.tiers[index + 1].above_micros)
        units = top - max(low_micros, tier.above_micros)
        if units > 0:
            cost += units * tier.price_micros
    return cost


# --- time charges (3.2) ---------------------------------------------------------------------


def per_day(price: Price, month: int) -> tuple[int, int]:
    """What turns a monthly or yearly price into a day's: (numerator, denominator)."""
    yearly = price.time_unit == "year"
    if price.day_count == "month":
        return 1, days_in(month) * (12 if yearly else 1)
    year = month // 12
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = 366 if price.day_count == "actual/actual" and leap else 365
    return (1 if yearly else 12), days


def quantity_pieces(line: Line, book: Book, first: int, end: int) -> Iterable[tuple[int, int, Price, int]]:
    """The steps inside `[first, end)` of a line's price and quantity: (from, to, price, quantity_micros).

    The quantity is the list size of the day for a price per patient (the ordered quantity before
    the practice's first list size, RULES 2.2), else the declared one.
    """
    for start, until, price in line.price.pieces(first, end):
        if price.provisioning != "patient":
            for low, high, quantity in line.quantity.pieces(start, until):
                yield low, high, price, quantity
            continue
        sizes = book.reference.of(line.ods_code).list_sizes
        for low, high, patients in sizes.pieces(start, until):
            if patients is not None:
                yield low, high, price, patients * MICROS
            else:
                for at, to, quantity in line.quantity.pieces(low, high):
                    yield at, to, price, quantity


def quantity_on(line: Line, book: Book, day: int) -> tuple[Price, int]:
    """A line's price and quantity_micros on a day."""
    for _, _, price, quantity in quantity_pieces(line, book, day, day + 1):
        return price, quantity
    raise AssertionError("every day has a price and a quantity")


def live_in(line: Line, book: Book, month: int) -> tuple[int, int]:
    """The live days of the line in the month, `[first, end)`; empty when first >= end."""
    first, end = line.live(book.reference)
    return max(first, first_day(month)), min(end, last_day(month) + 1)


def _add_time_charges(lines: list[Line], book: Book, month: int, charges: Mapping[str, MonthCharge]) -> None:
    steps: list[tuple[Line, int, int, Price, int]] = []
    tiered = False
    for line in lines:
        first, end = live_in(line, book, month)
        if first >= end:
            continue
        for low, high, price, quantity in quantity_pieces(line, book, first, end):
            if price.is_time:
                steps.append((line, low, high, price, quantity))
                tiered = tiered or not price.is_flat
    totals = _totals(steps) if tiered else []
    for line, low, high, price, quantity in steps:
        numerator, denominator = per_day(price, month)
        time = charges[line.ods_code].time
        if price.is_flat:
            cost = price.tiers[0].price_micros * quantity
            if cost:
                time.append((low, high, Fraction(cost * numerator, denominator * PENNY)))
            continue
        for low_total, high_total, total in totals:
            start, until = max(low_total, low), min(high_total, high)
            if start < until and total and quantity:
                cost = tiered_cost(price, total) * quantity
                time.append((start, until, Fraction(cost * numerator, denominator * PENNY * total)))


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


@dataclass(slots=True)
class _Used:
    """One line's usage in the month: what counts towards tiers and charges, by day."""

    line: Line
    remaining: dict[int, tuple[Price, int]]


def _add_usage_charges(lines: list[Line], book: Book, month: int, charges: Mapping[str, MonthCharge]) -> None:
    used = [_free_of_included(line, book, month, charges[line.ods_code]) for line in lines]
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
        _bound(each.line, book, month, exact)
        charge = charges[each.line.ods_code]
        for day, amount in exact.items():
            if amount:
                charge.add(day, amount)


def _free_of_included(line: Line, book: Book, month: int, charge: MonthCharge) -> _Used:
    """The month's usage that the line takes, less the included units, in day order."""
    first, end = live_in(line, book, month)
    service = (line.item_id, line.ods_code)
    days = book.usage.get(service)
    remaining: dict[int, tuple[Price, int]] = {}
    if first < end and days:
        free = 0
        sole = len(book.by_service[service]) == 1
        for day in range(first, end):
            quantity = days.get(day, 0)
            if not quantity:
                continue
            price = line.price.at(day)
            if not price.is_on_demand or not (sole or book.takers(service, day)[0] is line):
                continue
            charge.quantity_micros += quantity
            released = min(quantity, max(0, price.included_micros - free))
            free += released
            if quantity > released:
                remaining[day] = (price, quantity - released)
    return _Used(line, remaining)


def _usage_by_day(
    used: _Used, month: int, by_day: Mapping[int, int], before: Mapping[int, int], total: int
) -> dict[int, Fraction]:
    """The line's usage charge of each day before its bounds, in exact pence."""
    exact: dict[int, Fraction] = {}
    fixed = _last_single_fixed(used.line, month)
    for day, (price, quantity) in used.remaining.items():
        if price.is_flat:
            exact[day] = Fraction(price.tiers[0].price_micros * quantity, PENNY)
        elif price.calculation == "volume":
            exact[day] = Fraction(tier_price(price, total) * quantity, PENNY)
        elif price.calculation == "single_fixed":
            cost = tiered_cost(fixed or price, total)
            exact[day] = Fraction(cost * quantity, PENNY * total)
        else:
            stretch = stretch_cost(price, before[day], before[day] + by_day[day])
            exact[day] = Fraction(stretch * quantity, PENNY * by_day[day])
    return exact


def _last_single_fixed(line: Line, month: int) -> Price | None:
    """The last of the line's prices in the month that is tiered single-fixed."""
    found = None
    for _, _, price in line.price.pieces(first_day(month), last_day(month) + 1):
        if not price.is_flat and price.calculation == "single_fixed":
            found = price
    return found


def _bound(line: Line, book: Book, month: int, exact: dict[int, Fraction]) -> None:
    """Tops the month's usage charge up to its minimum, or cuts it to its maximum."""
    first, end = live_in(line, book, month)
    days, least_micros, most_micros, bounded = 0, 0, 0, True
    on_demand: list[range] = []
    for low, high, price in line.price.pieces(first, end) if first < end else ():
        if price.is_on_demand:
            days += high - low
            on_demand.append(range(low, high))
            least_micros += price.minimum_micros * (high - low)
            bounded = bounded and price.maximum_micros is not None
            most_micros += (price.maximum_micros or 0) * (high - low)
    if not days:
        return
    to_pence = days_in(month) * 10_000  # millionths of a pound a day of the month
    charge = sum(exact.values(), ZERO)
    least, most = Fraction(least_micros, to_pence), Fraction(most_micros, to_pence)
    if charge < least:
        each = (least - charge) / days
        for span in on_demand:
            for day in span:
                exact[day] = exact.get(day, ZERO) + each
    elif bounded and charge > most:
        for day in exact:
            exact[day] *= most / charge


# --- one-offs and credits (3.5, 3.6) --------------------------------------------------------


def _add_one_offs(lines: list[Line], book: Book, month: int, charges: Mapping[str, MonthCharge]) -> None:
    for line in lines:
        day = line.m1
        if day is None or month_of(day) != month or not _live_on(line, book, day):
            continue
        price, quantity = quantity_on(line, book, day)
        if not price.is_one_off:
            continue
        if price.is_flat:
            exact = Fraction(price.tiers[0].price_micros * quantity, PENNY)
        else:
            total = 0
            for other in lines:
                if _live_on(other, book, day):
                    other_price, other_quantity = quantity_on(other, book, day)
                    total += other_quantity if other_price.is_one_off else 0
            exact = Fraction(tiered_cost(price, total) * quantity, PENNY * total) if total else ZERO
        if exact:
            charges[line.ods_code].add(day, exact)


def _live_on(line: Line, book: Book, day: int) -> bool:
    first, end = line.live(book.reference)
    return first <= day < end


def _subtract_credits(
    order: Order, item_id: str, lines: list[Line], book: Book, month: int, charges: Mapping[str, MonthCharge]
) -> None:
    for credit in order.credits:
        if credit.item_id != item_id or month_of(credit.day) != month:
            continue
        exact = Fraction(credit.amount_micros, 10_000)
        if credit.ods_code is not None:
            if credit.ods_code in charges:
                charges[credit.ods_code].add(credit.day, -exact)
            continue
        sharing = [line for line in lines if _live_on(line, book, credit.day)] or lines
        quantities = [quantity_on(line, book, credit.day)[1] for line in sharing]
        if not any(quantities):
            quantities = [1] * len(sharing)
        total = sum(quantities)
        for line, quantity in zip(sharing, quantities, strict=True):
            if quantity:
                charges[line.ods_code].add(credit.day, -exact * Fraction(quantity, total))


# --- a month --------------------------------------------------------------------------------


def rate_month(order: Order, item_id: str, month: int, book: Book) -> dict[str, MonthCharge]:
    """The month's charges of all of an order's lines for an item, by practice.

    The lines are rated together because tiers count the order's total over its practices.
    """
    lines = order.by_item.get(item_id, [])
    charges = {line.ods_code: MonthCharge() for line in lines}
    _add_time_charges(lines, book, month, charges)
    if any(price.is_on_demand for line in lines for price in line.price.values):
        _add_usage_charges(lines, book, month, charges)
    _add_one_offs(lines, book, month, charges)
    _subtract_credits(order, item_id, lines, book, month, charges)
    return charges


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


def iso(day: int) -> str:
    """A day (ordinal) as an ISO date, for messages and evidence."""
    return date.fromordinal(day).isoformat()
