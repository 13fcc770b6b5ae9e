"""What a close invoices: every month of every line derived anew, less what was invoiced (RULES section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from rating.amounts import Exact, pence, pounds_text
from rating.book import Book, Line, LineKey
from rating.calendar import last_day, month_text
from rating.charges import first_month, rate_months
from rating.funding import Group, charge_of, coverage_of, groups, payer_order, sum_shares
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
class Derivation:
    """What all lines have earned up to a period: pence by charge key, and the exact charge of each month."""

    payable: dict[ChargeKey, int] = field(default_factory=dict)
    held: dict[ChargeKey, int] = field(default_factory=dict)
    charges: dict[LineKey, dict[int, Exact]] = field(default_factory=dict)
    wanted: dict[tuple[str, int], Exact] = field(default_factory=dict)

    @property
    def exact(self) -> dict[tuple[LineKey, int], Fraction]:
        """The exact charge by line and month, in pence."""
        return {(line, month): pence(exact) for line, months in self.charges.items() for month, exact in months.items()}


def rate_lines(book: Book, period: int) -> Iterator[tuple[Line, int, list[Group]]]:
    """Every month with a charge of every line, split by its waterfalls, from its first day up to the period.

    The months of a line come in order.
    """
    for order in book.orders.values():
        for item_id, lines in order.by_item.items():
            of_practice = {line.ods_code: line for line in lines}
            starts = [month for line in lines if (month := first_month(line, book)) is not None]
            months = range(min(starts), period + 1) if starts else ()
            for month, charges in rate_months(order, item_id, months, book):
                for ods_code, charge in charges.items():
                    line = of_practice[ods_code]
                    if split := groups(line, month, charge, book):
                        yield line, month, split


def derive(book: Book, period: int) -> Derivation:
    """Derives every line from the book: pence by line, supplier, payer and month, up to the period."""
    derived = Derivation()
    rated: dict[Line, dict[int, list[Group]]] = {}
    for line, month, split in rate_lines(book, period):
        rated.setdefault(line, {})[month] = split
        for group in split:
            if group.wanted:
                wanted = (group.party, month)
                derived.wanted[wanted] = derived.wanted.get(wanted, 0) + group.wanted
    coverage = coverage_of(book.reference, derived.wanted)
    until = last_day(period)
    for line, months in rated.items():
        into = derived.payable if line.payable(until) else derived.held
        supplier_id = line.order.header.supplier_id
        entitlement = Entitlement()
        derived.charges[line.key] = {month: charge_of(split) for month, split in months.items()}
        for month, split in months.items():
            shares = sum_shares([group.settle(coverage(group.party, month)) for group in split])
            grown = entitlement.add_month(shares, partial(payer_order, line, month))
            for payer, difference in grown.items():
                into[ChargeKey(*line.key, supplier_id, payer, month)] = difference
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
            pounds_text(amount),
        )
        for key, amount in amounts.items()
    ]
    return sorted(rows, key=lambda row: [column.encode() for column in row])


CSV_HEADER = ChargeRow._fields
