"""What a document's lines came from, and the document's rows derived from that alone (DESIGN promise 6).

Evidence is one mapping of plain values, ready for JSON: decimals as text, days as ISO dates, as in
the interchange form.  It holds, as of the close's cut,

- `contract_changes`: what stands of the orders on the document, in log order, in its interchange
  form, as far as they are about the document's lines, lines that its payer was invoiced for before,
  and those that are rated together with them (a tiered price, a shared credit);
- `practices`: list sizes (where a line follows them), closure and merger;
- `acceptances`: the days on which each requirement named for an item is fulfilled;
- `allocations`: the amount for each ordering party and year, and all that would draw on it by
  month, exact, in pence: what lines that are not on the document add is in it as a sum only;
- `usage`: each practice's and item's units by London day, with the number and digest of the
  readings in the months that the close bills (`usage_months`), and who takes them where that is a
  line not in the evidence;
- `invoiced`: what was invoiced before to the document's payer, by line and month;
- `vat_rates`: of rows that keep the rate that they were invoiced at.

So it holds nothing of a practice, a payer or a supplier that the document's lines do not depend on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from operator import itemgetter
from typing import Any

from rating.amounts import GRAINS, MICRO_GRAINS, MICROS, Exact, micros_text, pence, pounds_text, whole
from rating.book import Book, Line, LineKey, Order, Reference, Service
from rating.calendar import FOREVER, financial_year, last_day, month_text, parse_month
from rating.charges import iso, rated_together
from rating.close import Amounts, ChargeKey, Derivation, by_line, invoice, portion_of, rate_lines
from rating.documents import Document
from rating.funding import Coverage, allocation_exact, charge_of, draw_down, payer_order, settle
from rating.records import (
    ContractChange,
    Fields,
    ListSize,
    PracticeClosed,
    PracticeMerged,
    ReferenceBody,
    ReferenceChange,
    Refused,
    ServiceAccepted,
    read_contract_change,
)
from rating.rounding import Entitlement

FORMAT = "tribill-evidence/1"

#: A change as it was said, in its interchange form.
Said = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Readings:
    """The readings that make a day's total: how many, and the digest of them (docs/verification.md)."""

    count: int
    sha256: str


@dataclass(slots=True)
class Known:
    """What was known at a cut: the book, and the accepted changes that made it, in log order, by order and code."""

    book: Book
    contract: Mapping[str, Sequence[Said]]
    reference: Mapping[str, Sequence[Said]]
    #: All that would draw on allocations, in grains by ordering party and month.
    wanted: Mapping[tuple[str, int], Exact]


def standing_values(changes: Sequence[Said]) -> list[Said]:
    """What stands of one key's changes, as `rating.book.standing`.

    >>> standing_values([{"id": "a", "change": {"X": {}}}, {"id": "b", "change": {"Retracted": {"change_id": "a"}}}])
    []
    """
    kept, removed = [], set()
    for value in reversed(changes):
        if value["id"] in removed:
            continue
        if "Retracted" in value["change"]:
            removed.add(value["change"]["Retracted"]["change_id"])
        else:
            kept.append(value)
    return kept[::-1]


# --- made at the close ------------------------------------------------------------------------


class Evidence:
    """Makes the evidence of each document of one close."""

    def __init__(
        self,
        known: Known,
        invoiced: Amounts,
        readings: Mapping[Service, Mapping[int, Readings]],
        months: Iterable[int],
    ) -> None:
        """`invoiced` is what was invoiced before, `readings` all readings of these months."""
        self._known = known
        self._readings = readings
        self._months = [month_text(month) for month in sorted(months)]
        self._invoiced = invoiced
        #: The lines that a supplier has invoiced a payer for, by order and item.
        self._lines_of: dict[tuple[str, str], dict[tuple[str, str], list[LineKey]]] = {}
        for line, amounts in invoiced.items():
            for parties in {each[:2] for each, amount in amounts.items() if amount}:
                self._lines_of.setdefault(parties, {}).setdefault(line[:2], []).append(line)
        self._said: dict[str, _SaidOfOrder] = {}
        self._allocated: dict[str, list[dict[str, Any]]] = {}
        self._wanted: dict[str, dict[int, Exact]] = {}
        for (party, month), exact in known.wanted.items():
            self._wanted.setdefault(party, {})[month] = exact

    def of(self, document: Document) -> dict[str, Any]:
        """The evidence of a document."""
        orders = self._known.book.orders
        own = {key[:3] for key in document.rows}
        invoiced = self._invoiced_before(document)
        own |= {line for of_item in invoiced for line in of_item}
        lines = self._lines(own)
        about = {line.key for line in lines}
        services: dict[str, set[Service]] = {}
        for line in lines:
            services.setdefault(line.order.number, set()).add((line.item_id, line.ods_code))
        return {
            "format": FORMAT,
            "number": document.number,
            "period": month_text(document.period),
            "payer": document.payer,
            "supplier_id": document.supplier_id,
            "contract_changes": [
                change
                for number in sorted(services)
                for change in self._said_of(number).about(services[number])
            ],
            "practices": self._practices(lines, document.period),
            "acceptances": self._acceptances(lines),
            "allocations": self._allocations(lines),
            "usage": self._usage(lines, about, document.period),
            "usage_months": self._months,
            "invoiced": [
                {
                    **dict(zip(("order_number", "item_id", "ods_code"), line, strict=True)),
                    "net": {month_text(month): pounds_text(amount) for month, amount in sorted(months.items())},
                }
                for of_item in invoiced
                for line, months in sorted(of_item.items())
            ],
            "vat_rates": [
                {**_names(key), "month": month_text(key.month), "vat_rate": micros_text(rate)}
                for key, rate in sorted(document.vat_rates_micros.items())
                if key.order_number not in orders or rate != orders[key.order_number].header.vat_rate_micros
            ],
        }

    def _said_of(self, number: str) -> _SaidOfOrder:
        if number not in self._said:
            self._said[number] = _SaidOfOrder(self._known.contract.get(number, ()))
        return self._said[number]

    def _lines(self, own: Iterable[LineKey]) -> list[Line]:
        """The lines that stand of these, and those that are rated together with them."""
        by_item: dict[tuple[str, str], list[Service]] = {}
        for number, item_id, ods_code in sorted(own):
            by_item.setdefault((number, item_id), []).append((item_id, ods_code))
        found: list[Line] = []
        for (number, item_id), services in by_item.items():
            order = self._known.book.orders.get(number)
            if order is not None and rated_together(order, item_id):
                found += order.by_item.get(item_id, [])
            elif order is not None:
                found += [order.lines[service] for service in services if service in order.lines]
        return found

    def _practices(self, lines: Iterable[Line], period: int) -> dict[str, Any]:
        reference, until = self._known.book.reference, last_day(period)
        found: dict[str, dict[str, Any]] = {}
        for line in lines:
            facts, said = reference.of(line.ods_code), found.setdefault(line.ods_code, {})
            if line.follows_list_size and facts.list_sizes.days:
                said["list_sizes"] = {
                    iso(day): patients
                    for day, patients in zip(facts.list_sizes.days, facts.list_sizes.patients, strict=True)
                    if day <= until
                }
            if facts.closed < FOREVER:
                said["closed"] = iso(facts.closed)
            if facts.merged < FOREVER:
                said["merged"] = iso(facts.merged)
        return {code: said for code, said in sorted(found.items()) if said}

    def _acceptances(self, lines: Iterable[Line]) -> dict[str, Any]:
        return {
            item_id: {
                requirement: [[iso(first), None if end == FOREVER else iso(end)] for first, end in intervals.spans]
                for requirement, intervals in sorted(acceptances.items())
            }
            for item_id in sorted({line.item_id for line in lines})
            if (acceptances := self._known.book.reference.of(item_id).acceptances)
        }

    def _allocations(self, lines: Iterable[Line]) -> list[dict[str, Any]]:
        parties = {
            party
            for line in lines
            if any(step.take == "allocation" for waterfall in line.funding.values for step in waterfall)
            for party in line.order.party.values
        }
        return [each for party in sorted(parties) for each in self._allocations_of(party)]

    def _allocations_of(self, party: str) -> list[dict[str, Any]]:
        if party not in self._allocated:
            years: dict[int, dict[str, str]] = {}
            for month, exact in sorted(self._wanted.get(party, {}).items()):
                years.setdefault(financial_year(month), {})[month_text(month)] = str(pence(exact))
            self._allocated[party] = [
                {"ordering_party": party, "financial_year": year, "amount": micros_text(amount), "wanted": wanted}
                for year, wanted in years.items()
                for amount in [allocation_exact(self._known.book.reference, party, year) // MICRO_GRAINS]
            ]
        return self._allocated[party]

    def _usage(self, lines: Iterable[Line], about: set[LineKey], period: int) -> list[dict[str, Any]]:
        book, until, found = self._known.book, last_day(period), []
        metered = {
            (line.item_id, line.ods_code) for line in lines if any(price.is_on_demand for price in line.price.values)
        }
        for service in sorted(metered):
            item_id, ods_code = service
            used = [(day, quantity) for day, quantity in sorted(book.usage.get(service, {}).items()) if quantity]
            used = [each for each in used if each[0] <= until]
            readings = self._readings.get(service, {})
            said: dict[str, Any] = {
                "item_id": item_id,
                "ods_code": ods_code,
                "quantity": {iso(day): micros_text(quantity) for day, quantity in used},
                "readings": {iso(day): [each.count, each.sha256] for day, _ in used if (each := readings.get(day))},
            }
            if len(book.by_service.get(service, ())) > 1:
                said["taken_by"] = {
                    iso(day): takers[0].order.number
                    for day, _ in used
                    if (takers := book.takers(service, day))
                    if takers[0].key not in about
                }
            found.append(said)
        return found

    def _invoiced_before(self, document: Document) -> list[dict[LineKey, dict[int, int]]]:
        """What the payer was invoiced before for the orders' items on the document: by line and month, in pence."""
        parties = (document.supplier_id, document.payer)
        of_parties = self._lines_of.get(parties, {})

        def months(line: LineKey) -> dict[int, int]:
            return {key.month: amount for key, amount in self._invoiced[line].items() if amount and key[:2] == parties}

        items = sorted({(key.order_number, key.item_id) for key in document.rows})
        return [{line: months(line) for line in of_parties.get(item, ())} for item in items]


def _names(key: ChargeKey) -> dict[str, str]:
    return {"order_number": key.order_number, "item_id": key.item_id, "ods_code": key.ods_code}


class _SaidOfOrder:
    """What stands of an order's changes, to be found by line: its lines may have a payer, and so a document, each."""

    def __init__(self, changes: Sequence[Said]) -> None:
        self._placed: list[tuple[int, Said, dict[Service, tuple[int, Any]]]] = []
        #: By item and practice, either of which may be None, as a change names it: place in the log and change.
        self._named: dict[tuple[str | None, str | None], list[tuple[int, Said]]] = {}
        for place, value in enumerate(standing_values(changes)):
            [(kind, body)] = value["change"].items()
            if kind == "OrderPlaced":
                lines = {(line["item_id"], line["ods_code"]): (at, line) for at, line in enumerate(body["lines"])}
                self._placed.append((place, value, lines))
            else:
                named = (body.get("item_id"), body.get("ods_code"))
                self._named.setdefault(named, []).append((place, value))

    def about(self, services: set[Service]) -> list[Said]:
        """The changes as far as they are about these items at practices, in log order."""
        found: list[tuple[int, Said]] = []
        for place, value, lines in self._placed:
            ours = sorted((lines[each] for each in services if each in lines), key=itemgetter(0))
            if ours:
                body = {**value["change"]["OrderPlaced"], "lines": [line for _, line in ours]}
                found.append((place, {**value, "change": {"OrderPlaced": body}}))
        names: set[tuple[str | None, str | None]] = {(None, None), *services}
        names |= {(item_id, None) for item_id, _ in services}
        for named in names:
            found += self._named.get(named, [])
        return [value for _, value in sorted(found, key=itemgetter(0))]


# --- read by whoever checks a bill ------------------------------------------------------------


@dataclass(slots=True)
class Read:
    """Evidence read from plain values: all that a document's rows depend on."""

    number: str
    period: int
    payer: str
    supplier_id: str
    book: Book
    #: What would draw on an allocation, and what there is, in grains by ordering party and year.
    wanted: dict[tuple[str, int], dict[int, Exact]] = field(default_factory=dict)
    amounts: dict[tuple[str, int], int] = field(default_factory=dict)
    invoiced: dict[ChargeKey, int] = field(default_factory=dict)
    vat_rates_micros: dict[ChargeKey, int] = field(default_factory=dict)
    #: The units of each day, and the readings that they are in these months, as the evidence says.
    days: dict[Service, dict[int, tuple[int, Readings | None]]] = field(default_factory=dict)
    months: set[int] = field(default_factory=set)

    def vat_rate_micros(self, key: ChargeKey) -> int | None:
        """The rate of a row: the one that it keeps, or its order's; None for a row of neither."""
        order = self.book.orders.get(key.order_number)
        return self.vat_rates_micros.get(key, order.header.vat_rate_micros if order else None)


def read_evidence(value: object) -> Read:
    """Reads evidence.  Raises Refused with the field for what is none."""
    fields = Fields(value)
    if fields.text("format") != FORMAT:
        raise Refused("format", f"is {fields.text('format')[:40]!r}; this version reads {FORMAT}")
    read = Read(
        number=fields.text("number"),
        period=_month(fields, "period"),
        payer=fields.text("payer"),
        supplier_id=fields.text("supplier_id"),
        book=Book([], Reference(), {}),
    )
    usage = _read_usage(fields, read)
    months = fields.require("usage_months")
    if not isinstance(months, list):
        raise Refused("usage_months", "is a list of months")
    read.months = {_month(Fields({"": month}, "usage_months"), "") for month in months}
    read.book = Book(_read_orders(fields), _read_reference(fields), usage)
    for row in fields.list("allocations"):
        key = (row.text("ordering_party"), row.integer("financial_year"))
        read.amounts[key] = _total_micros(row, "amount") * MICRO_GRAINS
        wanted = _mapping(row, "wanted")
        read.wanted[key] = {_month_named(month, row): _exact(wanted, month) for month in wanted.value}
    for row in fields.list("invoiced"):
        net = _mapping(row, "net")
        for month in net.value:
            read.invoiced[_key(row, read, _month_named(month, row))] = signed_pence(net, month)
    for row in fields.list("vat_rates"):
        read.vat_rates_micros[_key(row, read, _month(row, "month"))] = row.micros("vat_rate")
    return read


def rederive(read: Read) -> dict[ChargeKey, int]:
    """The document's rows, in pence by charge key, from its evidence alone (RULES 4.1)."""
    derived, until, coverage = Derivation(), last_day(read.period), _coverage(read)
    for line, months in rate_lines(read.book, read.period):
        if not line.payable(until) or line.order.header.supplier_id != read.supplier_id:
            continue
        entitlement = Entitlement()
        for month, split in months.items():
            shares = settle(split, month, coverage)
            grown = entitlement.add_month(charge_of(split), shares, partial(payer_order, line, month))
            if read.payer in grown:
                portion = portion_of(read.supplier_id, read.payer, month)
                derived.payable.setdefault(line.key, {})[portion] = grown[read.payer]
    return invoice(derived, by_line(read.invoiced), read.period)[0]


def _coverage(read: Read) -> Coverage:
    drawn = {
        (party, month): each.coverage
        for (party, year), wanted in read.wanted.items()
        for month, each in draw_down(read.amounts[party, year], wanted, year).items()
    }
    return lambda party, month: drawn.get((party, month), 0)


def _read_orders(fields: Fields) -> list[Order]:
    by_order: dict[str, list[ContractChange]] = {}
    for index, row in enumerate(fields.list("contract_changes")):
        try:
            change = read_contract_change(row.value)
        except Refused as error:
            raise Refused(f"contract_changes[{index}].{error.field}", error.reason) from None
        by_order.setdefault(change.order_number, []).append(change)
    return [Order.fold(number, changes) for number, changes in by_order.items()]


def _read_reference(fields: Fields) -> Reference:
    bodies: list[tuple[str, ReferenceBody]] = []
    practices = _mapping(fields, "practices")
    for code in practices.value:
        facts = _mapping(practices, code)
        if facts.get("list_sizes") is not None:
            sizes = _mapping(facts, "list_sizes")
            bodies += [(code, ListSize(code, _day(day, sizes), sizes.integer(day))) for day in sizes.value]
        if facts.get("closed") is not None:
            bodies.append((code, PracticeClosed(code, facts.day("closed"))))
        if facts.get("merged") is not None:
            bodies.append((code, PracticeMerged(code, "", facts.day("merged"))))
    acceptances = _mapping(fields, "acceptances")
    for item_id in acceptances.value:
        requirements = _mapping(acceptances, item_id)
        for requirement in requirements.value:
            # One that is named and covers nothing is asked for all the same.
            bodies.append((item_id, ServiceAccepted(item_id, requirement, 1, 1)))
            for span in requirements.require(requirement):
                if not isinstance(span, list) or len(span) != 2:
                    raise Refused(requirements.at(requirement), "is a list of [from, to]")
                ends = Fields({"from": span[0], "to": span[1]}, requirements.at(requirement))
                bodies.append((item_id, ServiceAccepted(item_id, requirement, ends.day("from"), ends.end_day("to"))))
    return Reference.fold(ReferenceChange("", code, body) for code, body in bodies)


def _read_usage(fields: Fields, read: Read) -> dict[Service, dict[int, int]]:
    """The units that the orders of the evidence may take, by service and day."""
    usage: dict[Service, dict[int, int]] = {}
    for row in fields.list("usage"):
        service = (row.text("item_id"), row.text("ods_code"))
        quantities, said = _mapping(row, "quantity"), _mapping(row, "readings")
        taken_by = _mapping(row, "taken_by").value if row.get("taken_by") is not None else {}
        days = read.days.setdefault(service, {})
        for text in quantities.value:
            day, quantity = _day(text, quantities), _total_micros(quantities, text)
            days[day] = quantity, _read_readings(said, text) if said.get(text) is not None else None
            if text not in taken_by:
                usage.setdefault(service, {})[day] = quantity
        if extra := said.value.keys() - quantities.value.keys():
            raise Refused(said.at(min(extra)), "has readings of a day without a quantity")
    return usage


def _read_readings(fields: Fields, day: str) -> Readings:
    pair = fields.require(day)
    if not isinstance(pair, list) or len(pair) != 2:
        raise Refused(fields.at(day), "is a pair of count and SHA-256")
    said = Fields({"count": pair[0], "sha256": pair[1]}, fields.at(day))
    return Readings(said.integer("count"), said.text("sha256"))


def _total_micros(fields: Fields, name: str) -> int:
    """A sum or product of decimals: it may have more digits than one of them."""
    match = re.fullmatch(r"(\d{1,60})(?:\.(\d{1,6}))?", fields.text(name), re.ASCII)
    if not match:
        raise Refused(fields.at(name), "is no number such as 12.5")
    return int(match[1]) * MICROS + int((match[2] or "").ljust(6, "0"))


def signed_pence(fields: Fields, name: str) -> int:
    """Pounds with two places, perhaps negative, as pence.  Raises Refused."""
    match = re.fullmatch(r"(-?)(\d{1,60})\.(\d{2})", fields.text(name), re.ASCII)
    if not match:
        raise Refused(fields.at(name), "is no amount in pounds such as -12.30")
    amount = int(match[2]) * 100 + int(match[3])
    return -amount if match[1] else amount


def _exact(fields: Fields, name: str) -> Exact:
    """Exact pence, a whole number or a fraction of two, as grains."""
    match = re.fullmatch(r"(\d{1,100000})(?:/(\d{1,100000}))?", fields.text(name), re.ASCII)
    if not match or (match[2] is not None and not int(match[2])):
        raise Refused(fields.at(name), "is no exact number of pence such as 88841 or 1/3")
    return whole(Fraction(int(match[1]), int(match[2] or 1)) * GRAINS)


def _mapping(fields: Fields, name: str) -> Fields:
    return Fields(fields.require(name), fields.at(name))


def _day(text: str, fields: Fields) -> int:
    return Fields({text: text}, fields.path).day(text)


def _month(fields: Fields, name: str) -> int:
    try:
        return parse_month(fields.text(name))
    except ValueError as error:
        raise Refused(fields.at(name), str(error)) from None


def _month_named(text: str, fields: Fields) -> int:
    return _month(Fields({text: text}, fields.path), text)


def _key(row: Fields, read: Read, month: int) -> ChargeKey:
    line = (row.text("order_number"), row.text("item_id"), row.text("ods_code"))
    return ChargeKey(*line, read.supplier_id, read.payer, month)
