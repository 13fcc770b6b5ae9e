"""Documents as data: what a close invoices, by payer and supplier, with VAT on the sum (RULES 3.11, 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rating.amounts import MICROS, micros_text, pounds_text, round_half_away
from rating.book import Book
from rating.calendar import month_text
from rating.close import ChargeKey


@dataclass(slots=True)
class Document:
    """A self-billed invoice from a payer to a supplier, or a credit note where it would be negative.

    `rows` are pence by charge key; `vat_pence` is by rate (micros), each on the sum of its rows.
    """

    number: str
    period: int
    payer: str
    supplier_id: str
    rows: dict[ChargeKey, int] = field(default_factory=dict)
    vat_rates_micros: dict[ChargeKey, int] = field(default_factory=dict)
    #: Of adjustments: the cause, and the document that first invoiced the key or "".
    explanations: dict[ChargeKey, tuple[str, str]] = field(default_factory=dict)
    evidence_sha256: str = ""

    @property
    def net_pence(self) -> int:
        """The sum of the rows, excluding VAT."""
        return sum(self.rows.values())

    @property
    def kind(self) -> str:
        """`invoice`, or `credit-note` where the sum is negative."""
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

    def as_json(self) -> dict[str, Any]:
        """The document for people and other systems; amounts are pounds as strings."""
        return {
            "number": self.number,
            "kind": self.kind,
            # Names, addresses and VAT numbers of parties are not known yet: no document to pay on.
            "notice": "SPECIMEN: party data is missing, this is no VAT invoice",
            "period": month_text(self.period),
            "payer": self.payer,
            "supplier_id": self.supplier_id,
            "currency": "GBP",
            "lines": [
                {
                    "order_number": key.order_number,
                    "item_id": key.item_id,
                    "ods_code": key.ods_code,
                    "for_period": month_text(key.month),
                    "kind": "charge" if key.month == self.period else "adjustment",
                    "vat_rate": micros_text(self.vat_rates_micros[key]),
                    "net": pounds_text(pence),
                    **self.explained(key),
                }
                for key, pence in sorted(self.rows.items())
            ],
            "vat_by_rate": [
                {"vat_rate": micros_text(rate), "net": pounds_text(net), "vat": pounds_text(vat)}
                for rate, (net, vat) in sorted(self.vat().items())
            ],
            "net": pounds_text(self.net_pence),
            "vat": pounds_text(self.vat_pence),
            "gross": pounds_text(self.net_pence + self.vat_pence),
            "evidence_sha256": self.evidence_sha256,
        }

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
) -> list[Document]:
    """One document for each payer and supplier, numbered in the payer's gapless series.

    `issued` is how many documents each payer has issued in earlier periods.  A row of what was
    invoiced before has the rate that it was invoiced at (`vat_rates_micros`), so that a credit gives
    back the VAT that was charged; any other has its order's.
    """
    by_parties: dict[tuple[str, str], Document] = {}
    counters = dict(issued)
    for key in sorted(rows, key=lambda key: (key.payer, key.supplier_id, *key)):
        parties = (key.payer, key.supplier_id)
        if parties not in by_parties:
            counters[key.payer] = counters.get(key.payer, 0) + 1
            number = f"{key.payer}-{counters[key.payer]:06d}"
            by_parties[parties] = Document(number, period, *parties)
        document = by_parties[parties]
        document.rows[key] = rows[key]
        invoiced_at = vat_rates_micros.get(key)
        document.vat_rates_micros[key] = (
            invoiced_at if invoiced_at is not None else book.orders[key.order_number].header.vat_rate_micros
        )
    return list(by_parties.values())
