"""A replay that also keeps what was said, and makes each close's documents, evidence and causes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rating.book import Service
from rating.calendar import london_day, month_of, parse_month
from rating.close import ChargeKey, by_line, csv_rows, derive, invoice
from rating.documents import Document, documents
from rating.evidence import Evidence, Known, Readings, Said
from rating.parties import Parties
from tests.oracle.strategies import ARRIVAL
from tests.replay import Replay

ISSUED = datetime(2026, 5, 1, tzinfo=UTC)


@dataclass
class ToldClose:
    """One close: what was known at its cut, its documents and their evidence."""

    period: int
    known: Known
    rows: dict[ChargeKey, int]
    documents: list[Document]
    evidence: list[dict[str, Any]]


class Told(Replay):
    """The state of a run, with the accepted changes as they were said."""

    def __init__(self, arrival: datetime = ARRIVAL) -> None:
        super().__init__(arrival)
        self.contract: dict[str, list[Said]] = {}
        self.reference: dict[str, list[Said]] = {}
        self.issued: dict[str, int] = {}
        self.rates: dict[ChargeKey, int] = {}
        self.told: list[ToldClose] = []

    def say(self, index: int, line: dict[str, Any]) -> None:
        """One interchange line."""
        before = self._accepted()
        super().say(index, line)
        if self._accepted() > before:
            said = self.contract if line["topic"] == "contract-changes" else self.reference
            value = line["value"]
            said.setdefault(value.get("order_number") or value.get("code"), []).append(value)

    def invoiced_up_to(self, period: int) -> dict[ChargeKey, int]:
        """What the closes up to a period have invoiced."""
        total: dict[ChargeKey, int] = {}
        for close in self.told:
            for key, pence in close.rows.items() if close.period <= period else ():
                total[key] = total.get(key, 0) + pence
        return total

    def _accepted(self) -> int:
        return sum(len(log.accepted) for log in self.orders.values()) + len(self.reference_changes)

    def readings(self) -> dict[Service, dict[int, Readings]]:
        """The number and digest of the readings of every day (docs/verification.md), written once more."""
        lines: dict[Service, dict[int, list[bytes]]] = {}
        for (_, ods_code, reading_id), revisions in self.usage.items():
            item_id, quantity, at = revisions[max(revisions)]
            if quantity:
                days = lines.setdefault((item_id, ods_code), {})
                days.setdefault(london_day(at), []).append(f"{max(revisions)} {quantity} {reading_id}\n".encode())
        return {
            service: {
                day: Readings(len(each), hashlib.sha256(b"".join(sorted(each))).hexdigest())
                for day, each in days.items()
            }
            for service, days in lines.items()
        }

    def close(self, text: str) -> None:
        """Closes a period, with its documents and evidence."""
        period = parse_month(text)
        if period in self.closed:
            return
        book = self.book()
        derived = derive(book, period)
        rows, held = invoice(derived, by_line(self.invoiced), period)
        parties = Parties.fold([], specimen=True)
        issued = documents(rows, period, book, self.issued, self.rates, parties, ISSUED)
        known = Known(
            book,
            {number: list(changes) for number, changes in self.contract.items()},
            {code: list(changes) for code, changes in self.reference.items()},
            dict(derived.wanted),
        )
        readings = self.readings()
        months = {month_of(day) for days in readings.values() for day in days}
        evidence = Evidence(known, by_line(self.invoiced), readings, months)
        self.told.append(ToldClose(period, known, rows, issued, [evidence.of(document) for document in issued]))
        for document in issued:
            self.issued[document.payer] = self.issued.get(document.payer, 0) + 1
            self.rates |= document.vat_rates_micros
        for key, pence in rows.items():
            self.invoiced[key] = self.invoiced.get(key, 0) + pence
        self.closed.append(period)
        self.closes.append((text, csv_rows(rows, period), csv_rows(held, period)))


def tell(lines: list[dict[str, Any]]) -> Told:
    """Runs the lines of a book."""
    told = Told(datetime(2029, 12, 31, tzinfo=UTC))
    for index, line in enumerate(lines):
        told.say(index, line)
    return told
