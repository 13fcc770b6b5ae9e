"""Documents as data: what a close invoices, by payer and supplier, with VAT on the sum (RULES 3.11, 4).

A document is an invoice that the payer issues for the supplier (self-billing, SI 1995/2518 reg. 13), or a credit
note where it would be negative.  Where the law does not let the payer issue it, it is a pro-forma: outside the
series, no VAT document, and what it lists counts as billed, so that no later close bills it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

from rating.amounts import MICROS, PENNY, micros_text, pounds_text, round_half_away
from rating.book import Book, Line
from rating.calendar import LONDON, first_day, last_day, month_text
from rating.charges import iso, quantity_on
from rating.close import ChargeKey
from rating.parties import Agreement, CosDecision, Parties, Party

#: Payment is due so many days after an undisputed e-invoice.
PAYMENT_DAYS = 30
#: What a self-billed document must say (VAT Notice 700/62).
STATEMENT = "The VAT shown is your output tax due to HMRC"
SPECIMEN = "SPECIMEN: the parties are invented, this is no VAT invoice"
PREVIEW = "PREVIEW: what a close would issue now; nothing is issued, and this is no VAT invoice"


class Extent(NamedTuple):
    """How much of what was supplied at which price, for a line that a person reads; the net is what counts."""

    quantity_micros: int
    unit: str
    price_micros: int


@dataclass(slots=True)
class Document:
    """A document from a payer to a supplier.

    `rows` are pence by charge key; VAT is by rate (micros), each on the sum of its rows.  Party data, the
    agreement and the names are those of the tax point, the last day of the period.
    """

    number: str
    period: int
    payer: str
    supplier_id: str
    issued_at: datetime
    book: Book
    parties: Parties
    rows: dict[ChargeKey, int] = field(default_factory=dict)
    vat_rates_micros: dict[ChargeKey, int] = field(default_factory=dict)
    #: Of adjustments: the cause, and the document that first invoiced the key or "".
    explanations: dict[ChargeKey, tuple[str, str]] = field(default_factory=dict)
    evidence_sha256: str = ""
    preview: bool = False

    @property
    def tax_point(self) -> int:
        """The day (ordinal) on which the VAT of the period becomes due."""
        return last_day(self.period)

    @property
    def supplier(self) -> Party | None:
        """The supplier, if described."""
        return self.parties.party(self.supplier_id, self.tax_point, supplier=True)

    @property
    def customer(self) -> Party | None:
        """The payer, if described."""
        return self.parties.party(self.payer, self.tax_point)

    @property
    def agreement(self) -> Agreement | None:
        """The self-billing agreement in force."""
        return self.parties.agreement(self.supplier_id, self.payer, self.tax_point)

    @property
    def net_pence(self) -> int:
        """The sum of the rows, excluding VAT."""
        return sum(self.rows.values())

    @property
    def kind(self) -> str:
        """`pro-forma`, or `credit-note` where the sum is negative, or `invoice`."""
        if any(self.obstacles()):
            return "pro-forma"
        return "credit-note" if self.net_pence < 0 else "invoice"

    def vat(self) -> dict[int, tuple[int, int]]:
        """By rate (micros): the net pence it is on, and the VAT pence."""
        net: dict[int, int] = {}
        for key, pence in self.rows.items():
            rate = self.vat_rates_micros[key]
            net[rate] = net.get(rate, 0) + pence
        return {rate: (sum_, round_half_away(sum_ * rate, MICROS)) for rate, sum_ in net.items()}

    @property
    def vat_pence(self) -> int:
        """The VAT of all rates."""
        return sum(vat for _, vat in self.vat().values())

    def obstacles(self) -> Iterator[str]:
        """Why the payer may not issue the supplier's invoice; nothing where it may."""
        supplier, agreement, day = self.supplier, self.agreement, iso(self.tax_point)
        if self.customer is None:
            yield f"the payer {self.payer} has no name and address on {day}"
        if supplier is None:
            yield f"the supplier {self.supplier_id} has no name and address on {day}"
        elif not supplier.vat_number:
            yield f"the supplier {self.supplier_id} has no VAT number on {day}"
        if agreement is None:
            yield f"no self-billing agreement of {self.supplier_id} with {self.payer} is in force on {day}"
        elif supplier is not None and supplier.vat_number and agreement.vat_number != supplier.vat_number:
            yield (
                f"the self-billing agreement was made under {agreement.vat_number}, the supplier now has "
                f"{supplier.vat_number}: a new agreement is needed"
            )

    def not_electronic(self) -> Iterator[str]:
        """Why there is no e-invoice of a document in the series."""
        for party, role in ((self.supplier, "supplier"), (self.customer, "payer")):
            if party is not None and not party.endpoint_id:
                yield f"no e-invoice: the {role} {party.code} has no Peppol address"

    def notice(self) -> str:
        """What somebody must know before paying."""
        said = [PREVIEW] if self.preview else []
        said += [SPECIMEN] if self.parties.specimen else []
        if obstacles := list(self.obstacles()):
            said.append("PRO-FORMA, no VAT invoice: " + "; ".join(obstacles))
            said.append("The supplier invoices what is listed here itself; no later document repeats it")
        else:
            said += self.not_electronic()
        return ". ".join(said)

    def as_json(self) -> dict[str, Any]:
        """The document for people and other systems; amounts are pounds as strings."""
        kind, issued = self.kind, self.issued_at.astimezone(LONDON).date()
        # A preview is issued by nobody: it is no document of self-billing, nor one to send or to book.
        self_billed = kind != "pro-forma" and not self.preview
        supplier, customer, agreement = self.supplier, self.customer, self.agreement
        items = {key.item_id for key in self.rows}
        vat = self.vat()
        vat_pence = sum(each for _, each in vat.values())
        body: dict[str, Any] = {
            "number": self.number,
            "kind": kind,
            "notice": self.notice(),
            "specimen": self.parties.specimen,
            "preview": self.preview,
            "self_billed": self_billed,
            "statement": STATEMENT if self_billed else "",
            "electronic": self_billed and not any(self.not_electronic()),
            "period": month_text(self.period),
            "tax_point": iso(self.tax_point),
            "issued_at": instant_text(self.issued_at),
            "issue_date": issued.isoformat(),
            "due_date": date.fromordinal(issued.toordinal() + PAYMENT_DAYS).isoformat(),
            "payer": self.payer,
            "supplier_id": self.supplier_id,
            "supplier": supplier.as_json() if supplier else {"code": self.supplier_id},
            "customer": customer.as_json() if customer else {"code": self.payer},
            "currency": "GBP",
            "items": {item_id: self.parties.item_name(item_id, self.tax_point) for item_id in sorted(items)},
            "orders": self._orders(),
            "lines": self._lines(),
            "vat_by_rate": [
                {
                    "category": "S" if rate else "Z",
                    "vat_rate": micros_text(rate),
                    "net": pounds_text(net),
                    "vat": pounds_text(tax),
                }
                for rate, (net, tax) in sorted(vat.items())
            ],
            "net": pounds_text(self.net_pence),
            "vat": pounds_text(vat_pence),
            "gross": pounds_text(self.net_pence + vat_pence),
            "evidence_sha256": self.evidence_sha256,
        }
        if self_billed and agreement and not self.parties.specimen:
            body["agreement"] = {"from": iso(agreement.first), "to": iso(agreement.end)}
        if cos := self._cos():
            body["cos"] = cos
        return body

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        months = {key.month: month_text(key.month) for key in self.rows}
        rates = {rate: micros_text(rate) for rate in self.vat_rates_micros.values()}
        for key, pence in sorted(self.rows.items()):
            quantity, unit, price = extent(key, pence, self.book)
            lines.append(
                {
                    "order_number": key.order_number,
                    "item_id": key.item_id,
                    "ods_code": key.ods_code,
                    "for_period": months[key.month],
                    "kind": "charge" if key.month == self.period else "adjustment",
                    "quantity": micros_text(quantity),
                    "unit": unit,
                    "unit_price": micros_text(price),
                    "vat_rate": rates[self.vat_rates_micros[key]],
                    "net": pounds_text(pence),
                    **self.explained(key),
                }
            )
        return lines

    def _orders(self) -> dict[str, dict[str, str]]:
        found = {}
        for number in sorted({key.order_number for key in self.rows}):
            if order := self.book.orders.get(number):
                party = order.party.at(self.tax_point)
                found[number] = {"framework": order.header.framework, "ordering_party": party}
        return found

    def _cos(self) -> list[dict[str, Any]]:
        """What the payer has decided of the VAT of the lines, with the net that each decision is about."""
        net: dict[CosDecision, int] = {}
        decided: dict[tuple[str, str], CosDecision | None] = {}
        for key, pence in self.rows.items():
            about = (key.item_id, key.order_number)
            if about not in decided:
                decided[about] = self.parties.cos(self.payer, *about, self.tax_point)
            if decision := decided[about]:
                net[decision] = net.get(decision, 0) + pence
        return [
            {
                **({"order_number": each.order_number} if each.order_number else {"item_id": each.item_id}),
                "recoverable": each.recoverable,
                "reason": each.reason,
                "net": pounds_text(pence),
            }
            for each, pence in sorted(net.items(), key=lambda pair: (pair[0].order_number, pair[0].item_id))
        ]

    def explained(self, key: ChargeKey) -> dict[str, str | None]:
        """The cause of an adjustment and its original document; nothing of a charge."""
        if key not in self.explanations:
            return {}
        cause, original = self.explanations[key]
        return {"cause": cause, "original_document": original or None}


def documents(
    rows: Mapping[ChargeKey, int],
    period: int,
    book: Book,
    issued: Mapping[str, int],
    vat_rates_micros: Mapping[ChargeKey, int],
    parties: Parties,
    issued_at: datetime,
    *,
    preview: bool = False,
) -> list[Document]:
    """One document for each payer and supplier, numbered in the payer's gapless series; a preview in one of its own.

    `issued` is how many documents each payer has issued in earlier periods.  A row of what was
    invoiced before has the rate that it was invoiced at (`vat_rates_micros`), so that a credit gives
    back the VAT that was charged; any other has its order's.
    """
    by_parties: dict[tuple[str, str], Document] = {}
    counters = dict(issued)
    for key in sorted(rows, key=lambda key: (key.payer, key.supplier_id, *key)):
        between = (key.payer, key.supplier_id)
        if between not in by_parties:
            document = Document("", period, *between, issued_at, book, parties, preview=preview)
            if any(document.obstacles()):
                document.number = _pro_forma_number(*between, period)
            else:
                counters[key.payer] = counters.get(key.payer, 0) + 1
                series = f"{key.payer}-PREVIEW" if preview else key.payer
                document.number = f"{series}-{counters[key.payer]:06d}"
            by_parties[between] = document
        document = by_parties[between]
        document.rows[key] = rows[key]
        invoiced_at = vat_rates_micros.get(key)
        document.vat_rates_micros[key] = (
            invoiced_at if invoiced_at is not None else book.orders[key.order_number].header.vat_rate_micros
        )
    return list(by_parties.values())


def _pro_forma_number(payer: str, supplier_id: str, period: int) -> str:
    """Outside every series, and one for each payer and supplier also where their codes have hyphens.

    >>> _pro_forma_number("A-B", "C", 24315), _pro_forma_number("A", "B-C", 24315)
    ('A-B-C-2026-04', 'A-B%2DC-2026-04')
    """
    return f"{payer}-{supplier_id.replace('%', '%25').replace('-', '%2D')}-{month_text(period)}"


def instant_text(instant: datetime) -> str:
    """An instant in UTC as RFC 3339 has it."""
    return instant.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- quantity and unit price ------------------------------------------------------------------


def extent(key: ChargeKey, pence: int, book: Book) -> Extent:
    """What a person can multiply to a row's net, to the penny that cumulative rounding may move.

    The quantity and price of the line where it was live for the whole month at one flat price and one payer has
    all of it; else once (or, taken back, minus once) the net.
    """
    order = book.orders.get(key.order_number)
    line = order.lines.get((key.item_id, key.ods_code)) if order else None
    if line is not None and pence > 0:
        found = _one_off(line, book) if line.is_one_off else _of_month(line, key.month, book)
        if found and abs(found.quantity_micros * found.price_micros - pence * PENNY) <= PENNY:
            return found
    sign = -1 if pence < 0 else 1
    unit = "service" if line is None or not line.placed.price.is_time else "month"
    return Extent(sign * MICROS, unit, abs(pence) * MICROS // 100)


def _one_off(line: Line, book: Book) -> Extent | None:
    if line.m1 is None:
        return None
    price, quantity = quantity_on(line, book, line.m1)
    return Extent(quantity, price.unit or "unit", price.tiers[0].price_micros) if price.is_flat else None


def _of_month(line: Line, month: int, book: Book) -> Extent | None:
    first, end = line.live(book.reference)
    first, end = max(first, first_day(month)), min(end, first_day(month + 1))
    if first >= end:
        return None
    price, quantity = quantity_on(line, book, end - 1)
    if not price.is_flat:
        return None
    each = price.tiers[0].price_micros
    if price.is_on_demand:
        days = book.usage.get((line.item_id, line.ods_code), {})
        quantity = sum(used for day, used in days.items() if first <= day < end)
    elif price.time_unit == "year":
        each = round_half_away(each, 12)
    return Extent(quantity, price.unit or "unit", each)
