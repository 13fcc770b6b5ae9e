"""The other papers of a close, from the same rows: statements, remittance advices, and the sheet that ties them out.

Every row of a close stands in one document, one practice's statement, one ordering party's (that of the last
day of the row's month) and one supplier's remittance advice, and so does every row that is held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rating.amounts import Exact, micros_text, pence, pounds_text, round_half_away
from rating.book import Book, Line
from rating.calendar import financial_year, financial_year_months, first_day, last_day, month_text
from rating.charges import iso, quantity_on
from rating.close import ChargeKey
from rating.completeness import Completeness
from rating.documents import Document, instant_text
from rating.funding import allocation_exact, draw_down
from rating.parties import Parties

#: A statement's kinds, as in the names of files.
PRACTICE, ORDERING_PARTY, SUPPLIER, CONTROL = "practice", "ordering-party", "supplier", "control"
#: Stands for the ordering party of an order that was taken back.
UNKNOWN = "unknown"

Rows = Mapping[ChargeKey, int]


class OutOfBalance(Exception):
    """The papers of a close do not tie out: none may be issued.  The message names the sums."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement about one code: its sums in pence, and the whole as JSON."""

    kind: str
    code: str
    net_pence: int
    held_pence: int
    body: dict[str, Any]


@dataclass(slots=True)
class Papers:
    """What the statements of a close are made from."""

    period: int
    book: Book
    rows: Rows
    held: Rows
    wanted: Mapping[tuple[str, int], Exact]
    documents: list[Document]
    parties: Parties
    issued_at: datetime
    #: Of each supplier's usage of the month, where there is any or there should be.
    completeness: Mapping[str, Completeness] = field(default_factory=dict)
    #: What was found and, by somebody's leave, did not stop the close.
    accepted: Sequence[str] = ()
    preview: bool = False

    def statements(self) -> list[Statement]:
        """All statements and remittance advices, then the control sheet.  Raises OutOfBalance."""
        found = [*self.practices(), *self.ordering_parties(), *self.suppliers()]
        return [*found, self.control(found)]

    # --- each of the three parties ---

    def practices(self) -> list[Statement]:
        """By practice: what it used, what it cost, who paid, and what is held."""
        rows, held = _by(self.rows, lambda key: key.ods_code), _by(self.held, lambda key: key.ods_code)
        return [
            self._statement(PRACTICE, code, rows.get(code, {}), held.get(code, {}))
            for code in sorted(rows.keys() | held.keys())
        ]

    def ordering_parties(self) -> list[Statement]:
        """By ordering party: the lines of its orders by item, its allocation drawn and left."""
        rows, held = _by(self.rows, self._party), _by(self.held, self._party)
        year = financial_year_months(financial_year(self.period))
        drawing = {party for party, month in self.wanted if month in year}
        return [
            self._statement(ORDERING_PARTY, code, rows.get(code, {}), held.get(code, {}))
            for code in sorted(rows.keys() | held.keys() | drawing)
        ]

    def suppliers(self) -> list[Statement]:
        """By supplier: its documents of the period, how complete its usage is, and what is held and why."""
        documents: dict[str, list[Document]] = defaultdict(list)
        for document in self.documents:
            documents[document.supplier_id].append(document)
        held = _by(self.held, lambda key: key.supplier_id)
        return [
            self._remittance(code, documents.get(code, []), held.get(code, {}))
            for code in sorted({*documents, *held, *self._with_usage()})
        ]

    def _with_usage(self) -> set[str]:
        """The suppliers that have reported or attested usage, though none of it be charged."""
        return {code for code, each in self.completeness.items() if each.attested or each.found.readings}

    def _party(self, key: ChargeKey) -> str:
        order = self.book.orders.get(key.order_number)
        return order.party.at(last_day(key.month)) if order else UNKNOWN

    def _line(self, key: ChargeKey) -> Line | None:
        order = self.book.orders.get(key.order_number)
        return order.lines.get((key.item_id, key.ods_code)) if order else None

    def _head(self, kind: str, code: str, items: Iterable[str]) -> dict[str, Any]:
        parties, day = self.parties, last_day(self.period)
        return {
            "statement": kind,
            "code": code,
            "name": parties.name(code, day),
            "period": month_text(self.period),
            "issued_at": instant_text(self.issued_at),
            "specimen": parties.specimen,
            "preview": self.preview,
            "items": {item_id: parties.item_name(item_id, day) for item_id in sorted(set(items))},
        }

    def _statement(self, kind: str, code: str, rows: Rows, held: Rows) -> Statement:
        head = self._head(kind, code, [key.item_id for key in (*rows, *held)])
        if kind == ORDERING_PARTY:
            head["allocation"] = self._allocation(code)
        net, held_net = sum(rows.values()), sum(held.values())
        lines = self._practice_lines(rows) if kind == PRACTICE else self._party_lines(rows)
        payers: dict[str, int] = defaultdict(int)
        for key, amount in rows.items():
            payers[key.payer] += amount
        body = head | {
            "lines": lines,
            "paid_by": {payer: pounds_text(amount) for payer, amount in sorted(payers.items())},
            "net": pounds_text(net),
            "held": self._held_lines(held),
            "held_net": pounds_text(held_net),
        }
        return Statement(kind, code, net, held_net, body)

    def _practice_lines(self, rows: Rows) -> list[dict[str, Any]]:
        """By order, item and month: how much was used, what it cost, who paid."""
        payers: dict[tuple[str, str, str, int], dict[str, int]] = defaultdict(dict)
        for key, amount in rows.items():
            # A line placed anew by another supplier has rows of both.
            paid_by = payers[key.order_number, key.item_id, key.ods_code, key.month]
            paid_by[key.payer] = paid_by.get(key.payer, 0) + amount
        return [
            {
                "order_number": order_number,
                "item_id": item_id,
                "for_period": month_text(month),
                "kind": self._kind(month),
                **self._used(order_number, item_id, ods_code, month),
                "net": pounds_text(sum(paid.values())),
                "paid_by": {payer: pounds_text(amount) for payer, amount in sorted(paid.items())},
            }
            for (order_number, item_id, ods_code, month), paid in sorted(payers.items())
        ]

    def _party_lines(self, rows: Rows) -> list[dict[str, Any]]:
        """By order, item and kind over all practices."""
        net: dict[tuple[str, str, str, str], int] = defaultdict(int)
        practices: dict[tuple[str, str, str, str], set[str]] = defaultdict(set)
        for key, amount in rows.items():
            group = (key.order_number, key.item_id, self._kind(key.month), key.payer)
            net[group] += amount
            practices[group].add(key.ods_code)
        return [
            {
                "order_number": order_number,
                "item_id": item_id,
                "kind": kind,
                "payer": payer,
                "practices": len(practices[order_number, item_id, kind, payer]),
                "net": pounds_text(amount),
            }
            for (order_number, item_id, kind, payer), amount in sorted(net.items())
        ]

    def _kind(self, month: int) -> str:
        return "charge" if month == self.period else "adjustment"

    def _used(self, order_number: str, item_id: str, ods_code: str, month: int) -> dict[str, str]:
        """What the practice used or had in a month, as the ledger has it at the cut."""
        line = self._line(ChargeKey(order_number, item_id, ods_code, "", "", month))
        if line is None:
            return {}
        first, end = line.live(self.book.reference)
        first, end = max(first, first_day(month)), min(end, first_day(month + 1))
        if first >= end:
            return {}
        price, quantity = quantity_on(line, self.book, end - 1)
        if price.is_on_demand:
            used = self.book.usage.get((item_id, ods_code), {})
            quantity = sum(each for day, each in used.items() if first <= day < end)
        return {"quantity": micros_text(quantity), "unit": price.unit or "unit"}

    def _held_lines(self, held: Rows) -> list[dict[str, Any]]:
        """By line: what is held, and why."""
        lines: dict[tuple[str, str, str], int] = defaultdict(int)
        for key, amount in held.items():
            lines[key.order_number, key.item_id, key.ods_code] += amount
        return [
            {
                "order_number": order_number,
                "item_id": item_id,
                "ods_code": ods_code,
                "net": pounds_text(amount),
                "reason": self._reason(order_number, item_id, ods_code),
            }
            for (order_number, item_id, ods_code), amount in sorted(lines.items())
        ]

    def _reason(self, order_number: str, item_id: str, ods_code: str) -> str:
        line = self._line(ChargeKey(order_number, item_id, ods_code, "", "", self.period))
        if line is None or line.m2 is None:
            return "service stability (M2) is not reached"
        return f"service stability (M2) is on {iso(line.m2)}, after the period"

    def _remittance(self, code: str, documents: list[Document], held: Rows) -> Statement:
        net, vat = sum(each.net_pence for each in documents), sum(each.vat_pence for each in documents)
        items = [key.item_id for key in held]
        body = self._head(SUPPLIER, code, items) | {
            "documents": [
                {
                    "number": each.number,
                    "kind": each.kind,
                    "payer": each.payer,
                    "net": pounds_text(each.net_pence),
                    "vat": pounds_text(each.vat_pence),
                    "gross": pounds_text(each.net_pence + each.vat_pence),
                }
                for each in documents
            ],
            "net": pounds_text(net),
            "vat": pounds_text(vat),
            "gross": pounds_text(net + vat),
            "held": self._held_lines(held),
            "held_net": pounds_text(sum(held.values())),
        }
        if code in self.completeness:
            body["usage"] = self.completeness[code].as_json()
        return Statement(SUPPLIER, code, net, sum(held.values()), body)

    def _allocation(self, party: str) -> dict[str, Any]:
        """What a party's allocation of the financial year has left, and when it runs dry at this month's rate."""
        year = financial_year(self.period)
        allocation = allocation_exact(self.book.reference, party, year)
        wanted = {month: self.wanted.get((party, month), 0) for month in financial_year_months(year)}
        drawn = draw_down(allocation, wanted, year)
        now = drawn[self.period]
        left: Exact = now.left
        runs_dry = None
        for month in financial_year_months(year):
            if month <= self.period and drawn[month].coverage < 1:
                runs_dry = month_text(month)
                break
            if month > self.period:
                left -= now.wanted
                if left < 0:
                    runs_dry = month_text(month)
                    break
        return {
            "financial_year": f"{year}/{(year + 1) % 100:02d}",
            "allocation": _pounds(allocation),
            "wanted_this_month": _pounds(now.wanted),
            "drawn_this_month": _pounds(now.wanted * now.coverage),
            "drawn": _pounds(allocation - now.left),
            "left": _pounds(now.left),
            "runs_dry": runs_dry,
        }

    # --- do they agree? ---

    def control(self, statements: list[Statement]) -> Statement:
        """The sums that must agree to the penny, each reached by another way.  Raises OutOfBalance."""
        net, held = sum(self.rows.values()), sum(self.held.values())
        checks = [("net of the documents", sum(each.net_pence for each in self.documents), net)]
        for kind in (PRACTICE, ORDERING_PARTY, SUPPLIER):
            of_kind = [each for each in statements if each.kind == kind]
            checks.append((f"net of the {kind} statements", sum(each.net_pence for each in of_kind), net))
            checks.append((f"held on the {kind} statements", sum(each.held_pence for each in of_kind), held))
        vat = sum(each.vat_pence for each in self.documents)
        remitted = [_pence(each.body["gross"]) for each in statements if each.kind == SUPPLIER]
        checks.append(("gross of the remittance advices", sum(remitted), net + vat))
        shown = sum(_pence(line["net"]) for each in statements if each.kind != SUPPLIER for line in each.body["lines"])
        checks.append(("lines of the statements, twice", shown, 2 * net))
        wrong = [f"{what}: {pounds_text(got)}, not {pounds_text(due)}" for what, got, due in checks if got != due]
        if wrong:
            raise OutOfBalance(f"the papers of {month_text(self.period)} do not tie out: {'; '.join(wrong)}")
        adjusted = {key: amount for key, amount in self.rows.items() if key.month != self.period}
        kinds = [each.kind for each in self.documents]
        body = {
            "statement": CONTROL,
            "period": month_text(self.period),
            "issued_at": instant_text(self.issued_at),
            "documents": {kind: kinds.count(kind) for kind in ("invoice", "credit-note", "pro-forma")},
            "series": self._series(),
            "rows": len(self.rows),
            "charges": pounds_text(net - sum(adjusted.values())),
            "adjustments": pounds_text(sum(adjusted.values())),
            "net": pounds_text(net),
            "vat": pounds_text(vat),
            "gross": pounds_text(net + vat),
            "held": pounds_text(held),
            "preview": self.preview,
            "accepted": list(self.accepted),
            "usage": {code: each.as_json() for code, each in self.completeness.items()},
            "checks": [
                {"what": what, "found": pounds_text(got), "due": pounds_text(due), "agrees": True}
                for what, got, due in checks
            ],
        }
        return Statement(CONTROL, "", net, held, body)

    def _series(self) -> dict[str, dict[str, str]]:
        """The first and last number of each payer's series, which has no gap between them.  Raises OutOfBalance."""
        numbers: dict[str, list[str]] = defaultdict(list)
        for each in self.documents:
            if each.kind != "pro-forma":
                numbers[each.payer].append(each.number)
        for payer, found in numbers.items():
            places = [int(number.rpartition("-")[2]) for number in found]
            if places != list(range(places[0], places[0] + len(places))):
                raise OutOfBalance(f"the series of {payer} has a gap or a number twice: {', '.join(found[:20])}")
        return {payer: {"first": found[0], "last": found[-1]} for payer, found in sorted(numbers.items())}


def _by(rows: Rows, part: Any) -> dict[str, dict[ChargeKey, int]]:
    found: dict[str, dict[ChargeKey, int]] = defaultdict(dict)
    for key, amount in rows.items():
        found[part(key)][key] = amount
    return found


def _pounds(exact: Exact) -> str:
    return pounds_text(round_half_away(pence(exact)))


def _pence(text: str) -> int:
    return int(text.replace(".", ""))
