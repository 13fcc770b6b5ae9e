"""Makes the pictures of docs/documents.md: a small book is closed twice and its papers are drawn (`make pictures`)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pypdfium2

from rating.book import Book, Order, Reference
from rating.calendar import first_day, month_of, parse_month
from rating.close import Amounts, derive, invoice
from rating.completeness import Completeness, Reported
from rating.documents import Document, documents
from rating.parties import Parties, invented, read_party_row
from rating.records import read_contract_change, read_reference_change
from rating.statements import Papers
from sinks.papers.pdf import document_pdf, statement_pdf

PICTURES = Path(__file__).parent / "pictures"
APRIL, MAY = parse_month("2026-04"), parse_month("2026-05")
PRACTICES = {"A83005": 8_461, "A83006": 12_030, "A83008": 6_212, "A83010": 9_874, "A83013": 15_402}
SYSTEM, MESSAGES, LICENCE = "10001-001", "10030-S-001", "10002-004"
NAMES = {SYSTEM: "Clinical system", MESSAGES: "Text message fragment", LICENCE: "Document management licence"}
CENTRAL = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]
LOCAL = [{"payer": "@ordering_party", "take": "rest"}]
PRICES: dict[str, tuple[str, str, str, str]] = {
    SYSTEM: ("patient", "patient", "year", "1.26"),
    MESSAGES: ("on_demand", "fragment", "none", "0.017"),
    LICENCE: ("declarative", "licence", "month", "37.92"),
}


def _price(item: str) -> dict[str, Any]:
    provisioning, unit, time_unit, price = PRICES[item]
    tiers = [{"from": "1", "price": price}]
    return {"type": "flat", "provisioning": provisioning, "unit": unit, "time_unit": time_unit, "tiers": tiers}


def _order(number: str, item: str, funding: list[dict[str, str]], held: str = "") -> Order:
    lines = [
        {"item_id": item, "ods_code": code, "quantity": "3", "price": _price(item), "funding": funding}
        for code in PRACTICES
    ]
    header = {"order_id": f"{number}-01", "ordering_party": "QF7", "supplier_id": item[:5], "framework": "GPITF"}
    header |= {"commencement": "2026-04-01", "vat_rate": "0.2"}
    changes: list[dict[str, Any]] = [{"OrderPlaced": header | {"lines": lines}}]
    for code in PRACTICES:
        reached = {"item_id": item, "ods_code": code, "date": "2026-04-01" if code != "A83010" else "2026-04-16"}
        changes.append({"MilestoneReached": reached | {"milestone": "M1"}})
        if code != held:
            changes.append({"MilestoneReached": reached | {"milestone": "M2"}})
    said = {"order_number": number, "recorded_at": "2026-03-01T09:00:00Z"}
    values = [said | {"id": f"c{index}", "change": change} for index, change in enumerate(changes)]
    return Order.fold(number, [read_contract_change(value) for value in values])


def _book(corrected: bool) -> Book:
    reference = Reference()

    def say(code: str, **change: Any) -> None:
        value = {"id": str(change), "code": code, "recorded_at": "2026-03-01T09:00:00Z", "change": change}
        reference.say(read_reference_change(value))

    for code, patients in PRACTICES.items():
        say(code, ListSize={"ods_code": code, "as_of": "2026-03-01", "patients": patients})
    if corrected:
        say("A83005", ListSize={"ods_code": "A83005", "as_of": "2026-04-01", "patients": 8_512})
        say("A83013", ListSize={"ods_code": "A83013", "as_of": "2026-04-01", "patients": 14_975})
    say("QF7", Allocation={"ordering_party": "QF7", "financial_year": 2026, "amount": "48000"})
    usage = {
        (MESSAGES, code): {
            first_day(month) + day: (patients // 40 + day) * 1_000_000 for month in (APRIL, MAY) for day in range(28)
        }
        for code, patients in PRACTICES.items()
    }
    orders = [
        _order("C010001", SYSTEM, CENTRAL),
        _order("C010002", MESSAGES, LOCAL),
        _order("C010003", LICENCE, LOCAL, "A83008"),
    ]
    return Book(orders, reference, usage)


def _close(period: int, book: Book, invoiced: Amounts, parties: Parties) -> tuple[list[Document], Papers]:
    issued_at = datetime(2026, period % 12 + 2, 3, 9, tzinfo=UTC)
    derived = derive(book, period)
    rows, held = invoice(derived, invoiced, period)
    counts = {"NHSE": 1, "QF7": 2} if period == MAY else {}
    issued = documents(rows, period, book, counts, {}, parties, issued_at)
    days = [each for used in book.usage.values() for day, each in used.items() if month_of(day) == period]
    found = Reported(len(days), sum(days))
    attested = Reported(found.readings + 2, found.quantity_micros + 4_000_000)
    usage = {"10030": Completeness("10030", attested, found)}
    return issued, Papers(period, book, rows, held, derived.wanted, issued, parties, issued_at, usage)


def _draw(name: str, pdf: bytes) -> None:
    page = pypdfium2.PdfDocument(pdf)[0]
    image = page.render(scale=1.25).to_pil().convert("L" if name == "none" else "RGB").quantize(48)
    image.save(PICTURES / f"{name}.png", optimize=True)


def main() -> None:
    """Draws every picture."""
    PICTURES.mkdir(exist_ok=True)
    said = [{"item": {"item_id": item, "name": name}} for item, name in NAMES.items()]
    parties = Parties.fold([read_party_row(row) for row in said], specimen=True)
    april = _book(corrected=False)
    issued, _ = _close(APRIL, april, {}, parties)
    _draw("invoice", document_pdf(next(each for each in issued if each.payer == "NHSE").as_json()))
    book = _book(corrected=True)
    _, papers = _close(MAY, book, derive(april, APRIL).payable, parties)
    statements = {(each.kind, each.code): each.body for each in papers.statements()}
    at = datetime(2026, 6, 3, 9, tzinfo=UTC)
    for kind, code in (("practice", "A83005"), ("ordering-party", "QF7"), ("supplier", "10002")):
        _draw(kind, statement_pdf(statements[kind, code]))
    _draw("supplier-usage", statement_pdf(statements["supplier", "10030"]))
    # What a correction looks like, and a credit note, with what the close says of each line.
    body = next(each for each in papers.documents if each.payer == "NHSE").as_json()
    sizes = {"A83005": "8,461 to 8,512", "A83013": "15,402 to 14,975"}
    for line in body["lines"]:
        if line["kind"] == "adjustment":
            cause = f"list size of 1 April, published 14 May: {sizes[line['ods_code']]}"
            line |= {"cause": cause, "original_document": "NHSE-000001"}
    _draw("corrections", document_pdf(body))
    back = {key: -amount // 4 for key, amount in papers.rows.items() if key.payer == "QF7" and key.item_id == MESSAGES}
    [note] = documents(back, MAY, book, {"QF7": 4}, {}, parties, at)
    body = note.as_json()
    for line in body["lines"]:
        line |= {"cause": "service credit of 12 May: delivery delayed", "original_document": "QF7-000001"}
    _draw("credit-note", document_pdf(body))
    rows = [*said, *({"party": invented(code, False).as_json() | {"from": "2026-01-01"}} for code in ("NHSE", "10001"))]
    nobody = Parties.fold(read_party_row(row) for row in rows)
    issued, _ = _close(APRIL, april, {}, nobody)
    _draw("pro-forma", document_pdf(next(each for each in issued if each.payer == "NHSE").as_json()))


if __name__ == "__main__":
    main()
