"""What a close invoices: every month of every line derived anew, less what was invoiced (RULES section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from typing import NamedTuple

from rating.amounts import Exact, pence, pounds_text
from rating.book import Book, Line, LineKey
from rating.calendar import last_day, month_text
from rating.charges import first_month, rate_months
from rating.funding import Coverage, Group, charge_of, coverage_of, groups, payer_order, settle
from rating.rounding import Entitlement


class ChargeKey(NamedTuple):
    """What a document has one row for: a line, its supplier, a payer and the month that it is for."""

    order_number: str
    item_id: str
    ods_code: str
    supplier_id: str
    payer: str
    month: int


class Portion(NamedTuple):
    """What is left of a `ChargeKey` within a line."""

    supplier_id: str
    payer: str
    month: int


#: Pence by line, of each by supplier, payer and month: what there may be millions of is kept so.
Amounts = dict[LineKey, dict[Portion, int]]
#: A portion; lines share those that are equal.
portion_of = lru_cache(maxsize=65_536)(Portion)


def by_line(amounts: Mapping[ChargeKey, int]) -> Amounts:
    """Amounts by charge key, by line."""
    found: Amounts = {}
    for key, amount in amounts.items():
        found.setdefault(key[:3], {})[portion_of(*key[3:])] = amount
    return found


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


#: A line's months that have a charge, in order, each split by its waterfalls.
Months = dict[int, list[Group]]


@dataclass(slots=True)
class Derivation:
    """What all lines have earned up to a period: pence by line and portion, and the exact charge of each month."""

    payable: Amounts = field(default_factory=dict)
    held: Amounts = field(default_factory=dict)
    charges: dict[LineKey, dict[int, Exact]] = field(default_factory=dict)
    wanted: dict[tuple[str, int], Exact] = field(default_factory=dict)

    @property
    def exact(self) -> dict[tuple[LineKey, int], Fraction]:
        """The exact charge by line and month, in pence."""
        return {(line, month): pence(exact) for line, months in self.charges.items() for month, exact in months.items()}


def rate_lines(book: Book, period: int) -> Iterator[tuple[Line, Months]]:
    """Every month with a charge of every line, from its first day up to the period."""
    for order in book.orders.values():
        for item_id, lines in order.by_item.items():
            months_of: dict[str, Months] = {line.ods_code: {} for line in lines}
            starts = [month for line in lines if (month := first_month(line, book)) is not None]
            months = range(min(starts), period + 1) if starts else ()
            for month, charges in rate_months(order, item_id, months, book):
                for ods_code, charge in charges.items():
                    if split := groups(order.lines[item_id, ods_code], month, charge, book):
                        months_of[ods_code][month] = split
            for line in lines:
                yield line, months_of[line.ods_code]


def derive(book: Book, period: int) -> Derivation:
    """Derives every line from the book: pence by line, supplier, payer and month, up to the period."""
    derived = Derivation()
    until = last_day(period)
    nothing_drawn = coverage_of(book.reference, {})
    drawing: list[tuple[Line, Months]] = []
    for line, months in rate_lines(book, period):
        charges = derived.charges[line.key] = {}
        draws = False
        for month, split in months.items():
            charges[month] = charge_of(split)
            for group in split:
                if group.wanted:
                    draws, wanted = True, (group.party, month)
                    derived.wanted[wanted] = derived.wanted.get(wanted, 0) + group.wanted
        if draws:
            drawing.append((line, months))
        else:
            _earn(line, months, until, nothing_drawn, derived)
    coverage = coverage_of(book.reference, derived.wanted)
    for line, months in drawing:
        _earn(line, months, until, coverage, derived)
    return derived


def _earn(line: Line, months: Months, until: int, coverage: Coverage, derived: Derivation) -> None:
    """Rounds what a line has earned month by month, and each payer's part of it (3.10)."""
    earned = (derived.payable if line.payable(until) else derived.held)[line.key] = {}
    supplier_id = line.order.header.supplier_id
    entitlement = Entitlement()
    for month, split in months.items():
        shares = settle(split, month, coverage)
        growth = entitlement.add_month(charge_of(split), shares, partial(payer_order, line, month))
        for payer, grown in growth.items():
            earned[portion_of(supplier_id, payer, month)] = grown


def invoice(
    derived: Derivation, invoiced: Amounts, period: int
) -> tuple[dict[ChargeKey, int], dict[ChargeKey, int]]:
    """What the close of a period invoices and what it holds, in pence by charge key, zeros left out.

    Invoiced is the newly derived amount, if payable, less all that was invoiced before; a key no
    longer derived counts as 0.
    """
    rows, nothing = {}, dict[Portion, int]()
    for line, amounts in derived.payable.items():
        before = invoiced.get(line, nothing)
        for portion, amount in amounts.items():
            if difference := amount - before.get(portion, 0):
                rows[ChargeKey(*line, *portion)] = difference
    for line, before in invoiced.items():
        amounts = derived.payable.get(line, nothing)
        for portion, amount in before.items():
            if amount and portion not in amounts:
                rows[ChargeKey(*line, *portion)] = -amount
    held = {
        ChargeKey(*line, *portion): amount
        for line, amounts in derived.held.items()
        for portion, amount in amounts.items()
    }
    return rows, held


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
