"""Who pays: a month's charge split by its waterfalls, and allocations drawn down (RULES 3.7, 3.9)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from rating.amounts import MICROS, PENNY
from rating.book import Book, Line, Reference
from rating.calendar import days_in, financial_year, financial_year_months, first_day, last_day
from rating.charges import ZERO, MonthCharge, quantity_pieces
from rating.records import ENGLAND, ORDERING_PARTY, Waterfall

#: The fraction of what would draw on a party's allocation in a month that it covers.
Coverage = Callable[[str, int], Fraction]


@dataclass(frozen=True, slots=True)
class Group:
    """The charge of the month's days that share a waterfall, an ordering party and an acceptance.

    `taken` are the steps before the allocation, settled; `wanted` is what would draw on the
    allocation; `after` are the limits of the steps behind it; the rest is `rest_payer`'s.
    All in exact pence.
    """

    party: str
    charge: Fraction
    taken: tuple[tuple[str, Fraction], ...]
    allocation_payer: str | None
    wanted: Fraction
    after: tuple[tuple[str, Fraction], ...]
    rest_payer: str

    def settle(self, coverage: Fraction) -> dict[str, Fraction]:
        """What each payer takes when the allocation covers this fraction of what is wanted."""
        shares: dict[str, Fraction] = {}
        remaining = self.charge
        for payer, amount in self.taken:
            shares[payer] = shares.get(payer, ZERO) + amount
            remaining -= amount
        if self.allocation_payer is not None and self.wanted:
            drawn = self.wanted * coverage
            shares[self.allocation_payer] = shares.get(self.allocation_payer, ZERO) + drawn
            remaining -= drawn
        for payer, limit in self.after:
            amount = _limited(limit, remaining, self.charge)
            shares[payer] = shares.get(payer, ZERO) + amount
            remaining -= amount
        shares[self.rest_payer] = shares.get(self.rest_payer, ZERO) + remaining
        return shares


def _limited(limit: Fraction, remaining: Fraction, charge: Fraction) -> Fraction:
    return min(limit, remaining) if charge >= 0 else max(limit, remaining)


def groups(line: Line, month: int, charge: MonthCharge, book: Book) -> list[Group]:
    """The month's charge by waterfall, ordering party and acceptance, each group by itself (3.9)."""
    start, end = first_day(month), last_day(month) + 1
    spans: dict[tuple[Waterfall, str, bool], list[tuple[int, int]]] = {}
    needs_acceptance = bool(book.reference.of(line.item_id).acceptances)
    for low, high, waterfall in line.funding.pieces(start, end):
        for first, until, party in line.order.party.pieces(low, high):
            if not needs_acceptance:
                spans.setdefault((waterfall, party, True), []).append((first, until))
                continue
            for day in range(first, until):
                accepted = book.reference.accepted(line.item_id, day)
                spans.setdefault((waterfall, party, accepted), []).append((day, day + 1))
    found = []
    for (waterfall, party, accepted), days in spans.items():
        exact = sum((charge.between(first, until) for first, until in days), ZERO)
        if exact:
            found.append(_group(line, month, waterfall, party, accepted, days, exact, book))
    return found


def _group(
    line: Line,
    month: int,
    waterfall: Waterfall,
    party: str,
    accepted: bool,
    days: list[tuple[int, int]],
    charge: Fraction,
    book: Book,
) -> Group:
    before: list[tuple[str, Fraction]] = []
    after: list[tuple[str, Fraction]] = []
    remaining, wanted, allocation_payer = charge, ZERO, None
    for step in waterfall[:-1] if accepted else ():
        payer = party if step.payer == ORDERING_PARTY else step.payer
        if step.take == "allocation":
            # Of a negative charge an allocation takes nothing.
            allocation_payer, wanted = payer, max(remaining, ZERO)
            continue
        if step.take == "share":
            limit = charge * Fraction(step.amount_micros, MICROS)
        elif charge > 0:
            limit = _cap(line, month, step.amount_micros, days, book)
        else:
            limit = ZERO
        if allocation_payer is None:
            amount = _limited(limit, remaining, charge)
            before.append((payer, amount))
            remaining -= amount
        else:
            after.append((payer, limit))
    rest = party if waterfall[-1].payer == ORDERING_PARTY else waterfall[-1].payer
    return Group(party, charge, tuple(before), allocation_payer, wanted, tuple(after), rest)


def _cap(line: Line, month: int, amount_micros: int, days: list[tuple[int, int]], book: Book) -> Fraction:
    """`per_patient_year`: amount x list size / 12 / days in the month, over the group's calendar days.

    Before the practice's first list size the ordered quantity of a line priced per patient stands
    in for it; in a cap of another line it is 0 (2.2).
    """
    sizes = book.reference.of(line.ods_code).list_sizes
    patient_day_micros = 0
    for first, end in days:
        for low, high, patients in sizes.pieces(first, end):
            if patients is not None:
                patient_day_micros += patients * MICROS * (high - low)
                continue
            for at, to, price, quantity in quantity_pieces(line, book, low, high):
                if price.provisioning == "patient":
                    patient_day_micros += quantity * (to - at)
    return Fraction(amount_micros * patient_day_micros, 12 * days_in(month) * PENNY)


def allocation_exact(reference: Reference, party: str, year: int) -> Fraction:
    """An ordering party's allocation of a financial year, in exact pence; none: 0.

    An amount for the party replaces the per-patient form.
    """
    own = reference.of(party).allocations.get((year, party))
    if own is not None:
        return Fraction(own.amount_micros, 10_000)
    national = reference.of(ENGLAND).allocations.get((year, None))
    if national is None:
        return ZERO
    patients = reference.patients_under(national.as_of).get(party, 0)
    return Fraction(national.per_patient_micros * patients, 10_000)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A party's month: what would draw, the fraction covered, and what is left after, in exact pence."""

    wanted: Fraction
    coverage: Fraction
    left: Fraction


def draw_down(allocation: Fraction, wanted: Mapping[int, Fraction], year: int) -> dict[int, Drawn]:
    """A financial year's months in order; in the one in which it runs dry all get the same fraction."""
    drawn, left = {}, allocation
    for month in financial_year_months(year):
        want = wanted.get(month, ZERO)
        coverage = Fraction(1) if want <= left else left / want
        left -= want * coverage
        drawn[month] = Drawn(want, coverage, left)
    return drawn


def coverage_of(reference: Reference, wanted: Mapping[tuple[str, int], Fraction]) -> Coverage:
    """The fraction covered, by party and month, when `wanted` is all that would draw."""
    years: dict[tuple[str, int], dict[int, Fraction]] = {}
    for (party, month), amount in wanted.items():
        year = years.setdefault((party, financial_year(month)), {})
        year[month] = year.get(month, ZERO) + amount
    drawn = {
        (party, month): each.coverage
        for (party, year), months in years.items()
        for month, each in draw_down(allocation_exact(reference, party, year), months, year).items()
    }
    return lambda party, month: drawn[party, month]


def payer_order(line: Line, month: int) -> list[str]:
    """The payers of the waterfall in force on the month's last day, for ties (3.10)."""
    day = last_day(month)
    party = line.order.party.at(day)
    return [party if step.payer == ORDERING_PARTY else step.payer for step in line.funding.at(day)]


def sum_shares(parts: Iterable[Mapping[str, Fraction]]) -> dict[str, Fraction]:
    """The payers' shares of several groups, added up."""
    total: dict[str, Fraction] = {}
    for part in parts:
        for payer, amount in part.items():
            total[payer] = total.get(payer, ZERO) + amount
    return total
