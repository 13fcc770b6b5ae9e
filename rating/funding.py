"""Who pays: a month's charge split by its waterfalls, and allocations drawn down (RULES 3.7, 3.9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rating.amounts import MICRO_GRAINS, MICROS, PARTS, Exact, divided, pence
from rating.book import Book, Line, Reference
from rating.calendar import days_in, financial_year, financial_year_months, first_day, last_day
from rating.charges import MonthCharge, quantity_pieces
from rating.records import ENGLAND, ORDERING_PARTY, Waterfall

#: The fraction of what would draw on a party's allocation in a month that it covers.
Coverage = Callable[[str, int], Exact]


class Group(NamedTuple):
    """The charge of the month's days that share a waterfall, an ordering party and an acceptance.

    `taken` are the steps before the allocation, settled; `wanted` is what would draw on the
    allocation; `after` are the limits of the steps behind it; the rest is `rest_payer`'s.
    """

    party: str
    charge: Exact
    taken: tuple[tuple[str, Exact], ...]
    allocation_payer: str | None
    wanted: Exact
    after: tuple[tuple[str, Exact], ...]
    rest_payer: str

    def in_pence(self) -> Group:
        """The same in exact pence, for other eyes than the rules'."""
        return Group(
            self.party,
            pence(self.charge),
            tuple([(payer, pence(amount)) for payer, amount in self.taken]),
            self.allocation_payer,
            pence(self.wanted),
            tuple([(payer, pence(limit)) for payer, limit in self.after]),
            self.rest_payer,
        )

    def settle(self, coverage: Exact) -> dict[str, Exact]:
        """What each payer takes when the allocation covers this fraction of what is wanted (3.9).

        Of 100 a share of 0.3, then the allocation, which covers half of the 70 that it would draw, then the rest:

        >>> group = Group("16C", 100, (("FUND", 30),), "NHSE", 70, (), "16C")
        >>> {payer: str(amount) for payer, amount in group.settle(divided(1, 2)).items()}
        {'FUND': '30', 'NHSE': '35', '16C': '35'}
        """
        shares: dict[str, Exact] = {}
        remaining = self.charge
        for payer, amount in self.taken:
            shares[payer] = shares.get(payer, 0) + amount
            remaining -= amount
        if self.allocation_payer is not None and self.wanted:
            drawn = self.wanted * coverage
            shares[self.allocation_payer] = shares.get(self.allocation_payer, 0) + drawn
            remaining -= drawn
        for payer, limit in self.after:
            amount = _limited(limit, remaining, self.charge)
            shares[payer] = shares.get(payer, 0) + amount
            remaining -= amount
        if remaining:
            shares[self.rest_payer] = shares.get(self.rest_payer, 0) + remaining
        return shares


def _limited(limit: Exact, remaining: Exact, charge: Exact) -> Exact:
    return min(limit, remaining) if charge >= 0 else max(limit, remaining)


def groups(line: Line, month: int, charge: MonthCharge, book: Book) -> list[Group]:
    """The month's charge by waterfall, ordering party and acceptance, each group by itself (3.9)."""
    spans = _spans(line, month, book)
    if len(spans) == 1:
        first, until, waterfall, party, accepted = spans[0]
        exact = charge.total()
        return [_group(line, month, waterfall, party, accepted, [(first, until)], exact, book)] if exact else []
    days_of: dict[tuple[Waterfall, str, bool], list[tuple[int, int]]] = {}
    for first, until, waterfall, party, accepted in spans:
        days_of.setdefault((waterfall, party, accepted), []).append((first, until))
    found = []
    for (waterfall, party, accepted), days in days_of.items():
        exact = sum(charge.between(first, until) for first, until in days)
        if exact:
            found.append(_group(line, month, waterfall, party, accepted, days, exact, book))
    return found


def _spans(line: Line, month: int, book: Book) -> list[tuple[int, int, Waterfall, str, bool]]:
    """The steps of the line's waterfall, ordering party and acceptance in the month (3.7)."""
    reference, start, after = book.reference, first_day(month), first_day(month + 1)
    funding, party_of = line.funding, line.order.party
    needs_acceptance = bool(reference.of(line.item_id).acceptances)
    if funding.is_constant and party_of.is_constant and not needs_acceptance:
        return [(start, after, funding.values[0], party_of.values[0], True)]
    spans = [
        (first, until, waterfall, party, True)
        for low, high, waterfall in funding.pieces(start, after)
        for first, until, party in party_of.pieces(low, high)
    ]
    if not needs_acceptance:
        return spans
    return [
        (day, day + 1, waterfall, party, reference.accepted(line.item_id, day))
        for first, until, waterfall, party, _ in spans
        for day in range(first, until)
    ]


def _group(
    line: Line,
    month: int,
    waterfall: Waterfall,
    party: str,
    accepted: bool,
    days: list[tuple[int, int]],
    charge: Exact,
    book: Book,
) -> Group:
    """The waterfall over the group's charge, step by step, each limited to what remains (3.9)."""
    before: tuple[tuple[str, Exact], ...] = ()
    after: tuple[tuple[str, Exact], ...] = ()
    remaining: Exact = charge
    wanted: Exact = 0
    allocation_payer = None
    for step in waterfall[:-1] if accepted else ():
        payer = party if step.payer == ORDERING_PARTY else step.payer
        if step.take == "allocation":
            # Of a negative charge an allocation takes nothing.
            allocation_payer, wanted = payer, max(remaining, 0)
            continue
        if step.take == "share":
            limit = divided(charge * step.amount_micros, MICROS)
        elif charge > 0:
            limit = _cap(line, month, step.amount_micros, days, book)
        else:
            limit = 0
        if allocation_payer is None:
            amount = _limited(limit, remaining, charge)
            before += ((payer, amount),)
            remaining -= amount
        else:
            after += ((payer, limit),)
    rest = party if waterfall[-1].payer == ORDERING_PARTY else waterfall[-1].payer
    return Group(party, charge, before, allocation_payer, wanted, after, rest)


def _cap(line: Line, month: int, amount_micros: int, days: list[tuple[int, int]], book: Book) -> int:
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
    return amount_micros * patient_day_micros * (PARTS // (12 * days_in(month)))


def allocation_exact(reference: Reference, party: str, year: int) -> int:
    """An ordering party's allocation of a financial year, in grains; none: 0.

    An amount for the party replaces the per-patient form.
    """
    own = reference.of(party).allocations.get((year, party))
    if own is not None:
        return own.amount_micros * MICRO_GRAINS
    national = reference.of(ENGLAND).allocations.get((year, None))
    if national is None:
        return 0
    patients = reference.patients_under(national.as_of).get(party, 0)
    return national.per_patient_micros * patients * MICRO_GRAINS


class Drawn(NamedTuple):
    """A party's month: what would draw, the fraction of it covered, and what is left after."""

    wanted: Exact
    coverage: Exact
    left: Exact


def draw_down(allocation: Exact, wanted: Mapping[int, Exact], year: int) -> dict[int, Drawn]:
    """A financial year's months in order; in the one in which it runs dry all get the same fraction (3.9).

    An allocation of 150 and 100 wanted in April, May and June: May is covered by half, June not at all.

    >>> april = 2026 * 12 + 3
    >>> drawn = draw_down(150, {april: 100, april + 1: 100, april + 2: 100}, 2026)
    >>> [(str(drawn[month].coverage), drawn[month].left) for month in (april, april + 1, april + 2)]
    [('1', 50), ('1/2', 0), ('0', 0)]
    """
    drawn, left = {}, allocation
    for month in financial_year_months(year):
        want = wanted.get(month, 0)
        coverage: Exact = 1 if want <= left else divided(left, want)
        left = left - want if want <= left else 0
        drawn[month] = Drawn(want, coverage, left)
    return drawn


def coverage_of(reference: Reference, wanted: Mapping[tuple[str, int], Exact]) -> Coverage:
    """The fraction covered, by party and month, when `wanted` is all that would draw."""
    years: dict[tuple[str, int], dict[int, Exact]] = {}
    for (party, month), amount in wanted.items():
        year = years.setdefault((party, financial_year(month)), {})
        year[month] = amount
    drawn = {
        (party, month): each.coverage
        for (party, year), months in years.items()
        for month, each in draw_down(allocation_exact(reference, party, year), months, year).items()
    }
    return lambda party, month: drawn.get((party, month), 0)


def payer_order(line: Line, month: int) -> list[str]:
    """The payers of the waterfall in force on the month's last day, for ties (3.10)."""
    day = last_day(month)
    party = line.order.party.at(day)
    return [party if step.payer == ORDERING_PARTY else step.payer for step in line.funding.at(day)]


def charge_of(split: list[Group]) -> Exact:
    """The month's exact charge."""
    return split[0].charge if len(split) == 1 else sum(group.charge for group in split)


def settle(split: list[Group], month: int, coverage: Coverage) -> dict[str, Exact]:
    """What each payer takes of a line's month: the shares of its groups, added up."""
    if len(split) == 1:
        return split[0].settle(coverage(split[0].party, month) if split[0].wanted else 0)
    total: dict[str, Exact] = {}
    for group in split:
        for payer, amount in group.settle(coverage(group.party, month)).items():
            total[payer] = total.get(payer, 0) + amount
    return total
