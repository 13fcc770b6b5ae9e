"""What a close invoices: every month of every line derived anew, less what was invoiced (RULES section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from rating.amounts import pounds_text
from rating.book import Book, Line, LineKey
from rating.calendar import last_day, month_text
from rating.charges import ZERO, MonthCharge, first_month, rate_month
from rating.funding import Group, coverage_of, groups, payer_order, sum_shares
from rating.rounding import Entitlement


class ChargeKey(NamedTuple):
    """What a document has one row for: a line, its supplier, a payer and the month that it is for."""

    order_number: str
    item_id: str
    ods_code: str
    supplier_id: str
    payer: str
    month: int


class ChargeRow(NamedTuple):
    """A row of lines.csv or held.csv, as text, in the order of its columns."""

    order_number: str
    item_id: str
    ods_code: str
    supplier_id: str
    payer: str
    for_period: str
    kind: str
    net: str


@dataclass(slots=True)
class LineMonth:
    """A line's exact charge in a month and how its waterfalls split it."""

    charge: MonthCharge
    groups: list[Group]

    @property
    def exact(self) -> Fraction:
        """The month's charge in exact pence."""
        return sum((group.charge for group in self.groups), ZERO)


@dataclass(slots=True)
class Derivation:
    """What all lines have earned up to a period: pence by charge key, and exact pence by line and month."""

    payable: dict[ChargeKey, int] = field(default_factory=dict)
    held: dict[ChargeKey, int] = field(default_factory=dict)
    exact: dict[tuple[LineKey, int], Fraction] = field(default_factory=dict)
    wanted: dict[tuple[str, int], Fraction] = field(default_factory=dict)


def rate_lines(book: Book, period: int) -> dict[Line, dict[int, LineMonth]]:
    """Every month with a charge of every line, from its first day up to the period."""
    rated: dict[LineKey, tuple[Line, dict[int, LineMonth]]] = {}
    for order in book.orders.values():
        for item_id, lines in order.by_item.items():
            starts = [month for line in lines if (month := first_month(line, book)) is not None]
            for line in lines:
                rated[line.key] = (line, {})
            for month in range(min(starts), period + 1) if starts else ():
                charges = rate_month(order, item_id, month, book)
                for line in lines:
                    charge = charges[line.ods_code]
                    if charge.time or charge.days:
                        split = groups(line, month, charge, book)
                        if split:
                            rated[line.key][1][month] = LineMonth(charge, split)
    return dict(rated.values())


def derive(book: Book, period: int) -> Derivation:
    """Derives every line from the book: pence by line, supplier, payer and month, up to the period."""
    rated = rate_lines(book, period)
    derived = Derivation()
    for months in rated.values():
        for month, line_month in months.items():
            for group in line_month.groups:
                if group.wanted:
                    key = (group.party, month)
                    derived.wanted[key] = derived.wanted.get(key, ZERO) + group.wanted
    coverage = coverage_of(book.reference, derived.wanted)
    until = last_day(period)
    for line, months in rated.items():
        into = derived.payable if line.payable(until) else derived.held
        entitlement = Entitlement()
        for month, line_month in sorted(months.items()):
            derived.exact[line.key, month] = line_month.exact
            shares = sum_shares(
                group.settle(coverage(group.party, month) if group.wanted else ZERO) for group in line_month.groups
            )
            grown = entitlement.add_month(shares, payer_order(line, month))
            for payer, pence in grown.items():
                into[ChargeKey(*line.key, line.order.header.supplier_id, payer, month)] = pence
    return derived


def invoice(
    derived: Derivation, invoiced: Mapping[ChargeKey, int], period: int
) -> tuple[dict[ChargeKey, int], dict[ChargeKey, int]]:
    """What the close of a period invoices and what it holds, in pence by charge key, zeros left out.

    Invoiced is the newly derived amount, if payable, less all that was invoiced before; a key no
    longer derived counts as 0.
    """
    rows = {}
    for key in derived.payable.keys() | invoiced.keys():
        if difference := derived.payable.get(key, 0) - invoiced.get(key, 0):
            rows[key] = difference
    return rows, dict(derived.held)


def csv_rows(amounts: Mapping[ChargeKey, int], period: int) -> list[ChargeRow]:
    """The rows of lines.csv or held.csv, sorted by their columns as byte strings."""
    rows = [
        ChargeRow(
            key.order_number,
            key.item_id,
            key.ods_code,
            key.supplier_id,
            key.payer,
            month_text(key.month),
            "charge" if key.month == period else "adjustment",
            pounds_text(pence),
        )
        for key, pence in amounts.items()
    ]
    return sorted(rows, key=lambda row: [column.encode() for column in row])


CSV_HEADER = ChargeRow._fields
