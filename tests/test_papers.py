"""Documents on paper: UBL against the schema and the rules, the other forms against the document's own sums."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import pypdfium2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peppol import check_rules, validate_xsd

from rating.amounts import GRAINS, PENNY, pounds_text, round_half_away
from rating.book import Book, Order, Reference
from rating.calendar import first_day, parse_month
from rating.close import ChargeKey
from rating.documents import STATEMENT, Document, documents
from rating.parties import Parties, gln_holds, invented, read_party_row, vat_number_holds
from rating.records import Refused, read_contract_change, read_reference_change
from rating.statements import OutOfBalance, Papers
from sinks.papers.forms import json_text
from sinks.papers.odoo import odoo_csv, odoo_json, odoo_table
from sinks.papers.pdf import Paper, document_pdf
from sinks.papers.ubl import ubl
from tests.rich_book import contract, ordered, placed, price, reference

APRIL = parse_month("2026-04")
ISSUED = datetime(2026, 5, 3, 9, 30, tzinfo=UTC)
#: So many random documents; the promise is 0 violations in 1,000 (TRIBILL_DOCUMENTS=1000).
EXAMPLES = int(os.environ.get("TRIBILL_DOCUMENTS", "60"))

# --- documents ------------------------------------------------------------------------------


def party(code: str, **fields: Any) -> dict[str, Any]:
    """A row of a party file: an invented body under a real looking name."""
    shown = invented(code, False).as_json()
    return {"party": shown | {"name": f"{code} & Söhne <Ŵ>", "from": "2020-01-01"} | fields}


def agreement(supplier: str, payer: str, **fields: Any) -> dict[str, Any]:
    """A row of a party file that lets a payer issue a supplier's invoices in 2026."""
    row = {"supplier_id": supplier, "payer": payer, "vat_number": invented(supplier, False).vat_number}
    return {"agreement": row | {"from": "2026-01-01", "to": "2027-01-01"} | fields}


def parties(*rows: dict[str, Any]) -> Parties:
    """What a file with these rows says."""
    return Parties.fold(read_party_row(row) for row in rows)


WHOLE = [party("10030"), party("NHSE"), agreement("10030", "NHSE")]
NHSE = [{"payer": "NHSE", "take": "rest"}]
LINE = ordered("10030-S-001", "A83005", price("on_demand", ("1", "0.017")), NHSE)
BOOK = Book(
    [
        Order.fold(number, [read_contract_change(contract(number, "c1", OrderPlaced=order)["value"])])
        for number in ("C010001", "C010002")
        for order in [placed(f"{number}-01", "QHM", "10030", LINE)]
    ],
    Reference(),
    {("10030-S-001", "A83005"): {}},
)


def key(number: int = 0, payer: str = "NHSE", month: int = APRIL, order: str = "C010001") -> ChargeKey:
    """A charge key of a practice by its number."""
    return ChargeKey(order, "10030-S-001", f"A{number:05d}", "10030", payer, month)


def issue(rows: dict[ChargeKey, int], said: Parties, rates: dict[ChargeKey, int] | None = None) -> list[Document]:
    """The documents of April."""
    return documents(rows, APRIL, BOOK, {"NHSE": 41}, rates or dict.fromkeys(rows, 200_000), said, ISSUED)


LETTER = st.characters(exclude_categories=["C", "Z"]) | st.sampled_from("<&>' x")
TEXT = st.text(LETTER, min_size=1, max_size=30).filter(str.strip)
CAUSE = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).map(lambda text: f"cause {text}")


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A random document with a supplier and a payer of any name, lines of any sign and several rates."""
    rows = {}
    for number in range(draw(st.integers(1, 12))):
        order = draw(st.sampled_from(["C010001", "C010002", "gone"]))
        rows[key(number, month=draw(st.integers(APRIL - 14, APRIL)), order=order)] = draw(
            st.integers(-1_000_000, 2_000_000).filter(bool)
        )
    rates = {each: draw(st.sampled_from([0, 50_000, 175_000, 200_000])) for each in rows}
    names = [party(code, name=draw(TEXT), city=draw(TEXT), address=draw(st.lists(TEXT, min_size=1, max_size=3)))
             for code in ("10030", "NHSE")]  # fmt: skip
    items = [{"item": {"item_id": "10030-S-001", "name": draw(TEXT)}}]
    [document] = issue(rows, parties(*names, agreement("10030", "NHSE"), *items), rates)
    body = document.as_json()
    for line in body["lines"]:
        if line["kind"] == "adjustment" and draw(st.booleans()):
            line |= {"cause": draw(CAUSE), "original_document": draw(st.sampled_from(["NHSE-000007", "NHSE-000008"]))}
    found: dict[str, Any] = json.loads(json.dumps(body))
    return found


# --- UBL ------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(bodies())
def test_ubl_passes_schema_and_rules(body: dict[str, Any]) -> None:
    """No random document violates the UBL schema, EN 16931 or what the receiver adds up."""
    found = ubl(body)
    assert validate_xsd(found) == (True, [])
    assert [str(each) for each in check_rules(found)] == []
    text = found.decode()
    sign = -1 if body["kind"] == "credit-note" else 1
    [payable] = re.findall(r"<cbc:PayableAmount[^>]*>(.*?)<", text)
    assert Decimal(payable) == sign * Decimal(body["gross"])
    assert text.count("<cbc:Note>") - len([line for line in body["lines"] if line.get("cause")]) == 2
    assert STATEMENT in text


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(1, 10**9), st.integers(1, 10**8), st.integers(-2, 2))
def test_quantity_times_price_is_the_net(quantity: int, price_micros: int, more: int) -> None:
    """To a penny, which cumulative rounding may move; where it is further off, once the net."""
    each = price("on_demand", ("1", f"{Decimal(price_micros).scaleb(-6):f}"))
    order = placed("C010001-01", "QHM", "10030", ordered("10030-S-001", "A00000", each, NHSE))
    live = {"item_id": "10030-S-001", "ods_code": "A00000", "milestone": "M1", "date": "2026-04-01"}
    said = [{"OrderPlaced": order}, {"MilestoneReached": live}]
    changes = [contract("C010001", f"c{number}", **change)["value"] for number, change in enumerate(said)]
    used = {("10030-S-001", "A00000"): {first_day(APRIL) + 3: quantity}}
    book = Book([Order.fold("C010001", map(read_contract_change, changes))], Reference(), used)
    pence = max(1, round_half_away(quantity * price_micros, PENNY) + more)
    rates = {key(): 200_000}
    [document] = documents({key(): pence}, APRIL, book, {}, rates, parties(*WHOLE), ISSUED)
    body = document.as_json()
    [line] = body["lines"]
    assert abs(Decimal(line["quantity"]) * Decimal(line["unit_price"]) - Decimal(line["net"])) <= Decimal("0.01")
    if more == 0 and quantity * price_micros >= PENNY:
        assert Decimal(line["quantity"]) == Decimal(quantity).scaleb(-6)
    found = ubl(body)
    assert validate_xsd(found) == (True, [])
    assert [str(each) for each in check_rules(found)] == []


@pytest.fixture(scope="module")
def official() -> Iterator[Any]:
    """The official rules as XSLT, where somebody has them: TRIBILL_PEPPOL_RULES names their folder."""
    folder = os.environ.get("TRIBILL_PEPPOL_RULES")
    if not folder:
        pytest.skip("TRIBILL_PEPPOL_RULES does not name a folder with the official rules as XSLT")
    saxonche = pytest.importorskip("saxonche")
    with saxonche.PySaxonProcessor(license=False) as saxon:
        compiled = [
            saxon.new_xslt30_processor().compile_stylesheet(stylesheet_file=str(path))
            for path in sorted(Path(folder).glob("*.xslt"))
        ]

        def violations(xml: bytes) -> list[str]:
            node = saxon.parse_xml(xml_text=xml.decode())
            told = "".join(each.transform_to_string(xdm_node=node) for each in compiled)
            failed = re.findall(r"<svrl:failed-assert.*?</svrl:failed-assert>", told, re.DOTALL)
            return [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", each)) for each in failed]

        yield violations


@settings(max_examples=EXAMPLES, deadline=None)
@given(body=bodies())
def test_ubl_passes_the_official_rules(official: Any, body: dict[str, Any]) -> None:
    """Nor does one violate the rules as OpenPeppol and CEN publish them."""
    assert official(ubl(body)) == []


def test_the_official_rules_find_something(official: Any) -> None:
    """A document without a buyer reference, of type 380, is refused."""
    [document] = issue({key(): 100, key(1, order="C010002"): 5}, parties(*WHOLE))
    spoilt = re.sub(rb"<cbc:BuyerReference>.*?</cbc:BuyerReference>", b"", ubl(document.as_json()))
    found = official(spoilt.replace(b">389<", b">380<"))
    assert any("R003" in each for each in found)
    assert any("P0100" in each for each in found)


def test_a_credit_note_names_what_it_corrects() -> None:
    """Type 261, positive amounts, the original invoices, the lines with the sign turned."""
    [document] = issue({key(): -1234, key(1, month=APRIL - 1): 34}, parties(*WHOLE))
    body = document.as_json()
    body["lines"][0] |= {"original_document": "NHSE-000007", "cause": "list size of 1 March"}
    text = ubl(body).decode()
    assert "<cbc:CreditNoteTypeCode>261<" in text
    assert re.search(r"InvoiceDocumentReference>\s*<cbc:ID>NHSE-000007<", text)
    assert re.findall(r"<cbc:CreditedQuantity[^>]*>(.*?)<", text) == ["1", "-1"]
    assert re.findall(r"<cbc:LineExtensionAmount[^>]*>(.*?)<", text) == ["12.00", "12.34", "-0.34"]
    assert re.findall(r"<cbc:PayableAmount[^>]*>(.*?)<", text) == ["14.40"]


# --- who may issue what -------------------------------------------------------------------------


def test_invoice_has_what_the_law_asks() -> None:
    """SI 1995/2518 reg. 14 and 13: number, dates, both parties, lines, rates, sums, and that it is self-billed."""
    [document] = issue({key(): 1000, key(1): 234}, parties(*WHOLE))
    body = document.as_json()
    assert (body["number"], body["kind"], body["notice"]) == ("NHSE-000042", "invoice", "")
    assert (body["tax_point"], body["issue_date"], body["due_date"]) == ("2026-04-30", "2026-05-03", "2026-06-02")
    assert body["supplier"]["vat_number"] == invented("10030", False).vat_number
    assert body["customer"]["name"] == "NHSE & Söhne <Ŵ>"
    assert body["statement"] == "The VAT shown is your output tax due to HMRC"
    assert (body["net"], body["vat"], body["gross"]) == ("12.34", "2.47", "14.81")
    assert [line["quantity"] for line in body["lines"]] == ["1", "1"]
    assert body["agreement"] == {"from": "2026-01-01", "to": "2027-01-01"}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([party("10030"), party("NHSE")], "no self-billing agreement of 10030 with NHSE is in force on 2026-04-30"),
        ([party("10030"), party("NHSE"), agreement("10030", "NHSE", to="2026-04-30")], "no self-billing agreement"),
        ([party("10030", vat_number=None), party("NHSE"), agreement("10030", "NHSE")], "10030 has no VAT number"),
        ([party("10030", vat_number="GB999999973"), party("NHSE"), agreement("10030", "NHSE")], "new agreement"),
        ([party("NHSE"), agreement("10030", "NHSE")], "the supplier 10030 has no name and address"),
        ([party("10030"), agreement("10030", "NHSE")], "the payer NHSE has no name and address"),
        ([], "the payer NHSE has no name and address"),
    ],
)
def test_without_the_right_a_pro_forma(rows: list[dict[str, Any]], why: str) -> None:
    """Its number is none of the series, it has no UBL and says why; the other document's number has no gap."""
    said = parties(*rows, party("QHM"), party("10031"), agreement("10031", "QHM"))
    other = ChargeKey("C010001", "10031-001", "A00001", "10031", "QHM", APRIL)
    bodies = {each.payer: each.as_json() for each in issue({key(): 1000, other: 5}, said)}
    body = bodies["NHSE"]
    assert (body["kind"], body["number"]) == ("pro-forma", "NHSE-10030-2026-04")
    assert why in body["notice"]
    assert (body["electronic"], body["self_billed"], body["statement"]) == (False, False, "")
    assert body["gross"] == "12.00"
    assert (bodies["QHM"]["number"], bodies["QHM"]["kind"]) == ("QHM-000001", "invoice")


def test_pro_formas_of_codes_with_hyphens() -> None:
    """Two documents never have one number, whatever payers and suppliers are called."""
    rows = {ChargeKey("C010001", "x", "A00001", supplier, payer, APRIL): 5
            for payer, supplier in (("A", "B-C"), ("A-B", "C"), ("A-B", "%2DC"), ("A", "B%2DC"))}  # fmt: skip
    numbers = [each.number for each in issue(rows, parties())]
    assert len({*numbers}) == len(rows)


def test_without_a_peppol_address_no_e_invoice() -> None:
    """The invoice stands; what is missing is said."""
    [document] = issue({key(): 1000}, parties(party("10030", endpoint=None), *WHOLE[1:]))
    body = document.as_json()
    assert (body["kind"], body["electronic"]) == ("invoice", False)
    assert "no e-invoice: the supplier 10030 has no Peppol address" in body["notice"]


def test_what_is_said_later_stands() -> None:
    """A row with the same first day replaces an earlier one; another first day holds from then on."""
    said = parties(*WHOLE, party("10030", name="Later", **{"from": "2026-04-30"}), party("NHSE", name="Replaced"))
    [document] = issue({key(): 1000}, said)
    assert document.supplier is not None
    assert document.customer is not None
    assert (document.supplier.name, document.customer.name) == ("Later", "Replaced")


def test_cos_decisions_are_shown() -> None:
    """The order's decision goes before the item's; the sums do not change."""
    cos = {"payer": "NHSE", "recoverable": True, "reason": "heading 14 (a)", "from": "2026-01-01"}
    rows = [
        {"cos": cos | {"item_id": "10030-S-001"}},
        {"cos": cos | {"order_number": "C010002", "recoverable": False, "reason": "not contracted out"}},
    ]
    [document] = issue({key(): 1000, key(1, order="C010002"): 250}, parties(*WHOLE, *rows))
    body = document.as_json()
    assert body["cos"] == [
        {"item_id": "10030-S-001", "recoverable": True, "reason": "heading 14 (a)", "net": "10.00"},
        {"order_number": "C010002", "recoverable": False, "reason": "not contracted out", "net": "2.50"},
    ]
    assert body["gross"] == "15.00"


@given(st.from_regex(r"[A-Z0-9]{3,8}", fullmatch=True), st.booleans())
def test_invented_parties_have_the_right_form(code: str, supplier: bool) -> None:
    """Their identifiers check, and their names say that they are invented."""
    found = invented(code, supplier)
    assert vat_number_holds(found.vat_number)
    assert "SPECIMEN" in found.name
    assert gln_holds(invented(code, False).endpoint_id)


# --- statements -----------------------------------------------------------------------------------


def papers(rows: dict[ChargeKey, int], issued: list[Document], **changed: Any) -> Papers:
    """The papers of April."""
    made: dict[str, Any] = {"held": {}, "wanted": {}, "book": BOOK} | changed
    return Papers(period=APRIL, rows=rows, documents=issued, parties=parties(), issued_at=ISSUED, **made)


ROWS = {key(): 1000, key(1, month=APRIL - 1): -34, key(1, payer="QHM"): 5}
HELD = {key(2): 77, key(2, month=APRIL - 1): 23}


def test_the_papers_of_one_close() -> None:
    """Each row stands once on each kind of paper; what is held and why is on the remittance advice."""
    statements = papers(ROWS, issue(ROWS, parties(*WHOLE)), held=HELD).statements()
    made = {(each.kind, each.code): each.body for each in statements}
    assert made["practice", "A00001"]["paid_by"] == {"NHSE": "-0.34", "QHM": "0.05"}
    assert made["ordering-party", "QHM"]["net"] == "9.71"
    advice = made["supplier", "10030"]
    assert [(each["number"], each["gross"]) for each in advice["documents"]] == [
        ("NHSE-000042", "11.59"),
        ("QHM-10030-2026-04", "0.06"),
    ]
    [held] = advice["held"]
    assert (held["ods_code"], held["net"]) == ("A00002", "1.00")
    assert held["reason"] == "service stability (M2) is not reached"
    control = made["control", ""]
    assert (control["charges"], control["adjustments"], control["held"]) == ("10.05", "-0.34", "1.00")
    assert control["series"] == {"NHSE": {"first": "NHSE-000042", "last": "NHSE-000042"}}


def test_papers_that_do_not_tie_out_are_refused() -> None:
    """A penny, a lost document or a gap in a series is found, and named."""
    issued = issue(ROWS, parties(*WHOLE))
    with pytest.raises(OutOfBalance, match=r"net of the documents: 9\.71, not 9\.72"):
        papers(ROWS | {key(): 1001}, issued).statements()
    with pytest.raises(OutOfBalance, match="net of the documents"):
        papers(ROWS, issued[:-1]).statements()
    other = ChargeKey("C010001", "10031-001", "A00001", "10031", "NHSE", APRIL)
    rows = ROWS | {other: 5}
    issued = issue(rows, parties(*WHOLE, party("10031"), agreement("10031", "NHSE")))
    issued[1].number = "NHSE-000044"
    with pytest.raises(OutOfBalance, match="series of NHSE has a gap"):
        papers(rows, issued).statements()


@pytest.mark.parametrize(("wanted", "dry"), [(30_00, "2026-07"), (25_00, "2026-08"), (1, None), (120_00, "2026-04")])
def test_when_an_allocation_runs_dry(wanted: int, dry: str | None) -> None:
    """An allocation of 100 pounds, at the rate of April: the month that it does not cover whole."""
    said = {"ordering_party": "QHM", "financial_year": 2026, "amount": "100"}
    book = Book([], Reference.fold([read_reference_change(reference("QHM", "r1", Allocation=said)["value"])]), {})
    made = papers({}, [], book=book, wanted={("QHM", APRIL): wanted * GRAINS}).statements()
    allocation = next(each for each in made if each.kind == "ordering-party").body["allocation"]
    assert allocation["runs_dry"] == dry
    assert allocation["left"] == pounds_text(max(0, 100_00 - wanted))
    assert allocation["drawn_this_month"] == pounds_text(min(100_00, wanted))


# --- the other forms ------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(bodies())
def test_every_form_has_the_document_s_sums(body: dict[str, Any]) -> None:
    """JSON reads back as it was, Odoo's lines add up to the net, and the PDF shows number and total, twice the same."""
    assert json.loads(json_text(body)) == body
    sign = -1 if body["kind"] == "credit-note" else 1
    table = odoo_table([body])
    rows = list(csv.DictReader(io.StringIO(odoo_csv(table))))
    assert sum(Decimal(row["invoice_line_ids/price_unit"]) for row in rows) == sign * Decimal(body["net"])
    assert rows[0]["move_type"] == ("in_refund" if sign < 0 else "in_invoice")
    assert json.loads(odoo_json(table))["data"] == table
    made = document_pdf(body)
    assert made == document_pdf(body)
    text = "".join(page.get_textpage().get_text_range() for page in pypdfium2.PdfDocument(made))
    assert body["number"] in text
    assert f"{sign * Decimal(body['gross']) + 0:,.2f}" in text
    assert "The VAT shown is your output tax due to HMRC" in text.replace("\r\n", " ")


def test_sums_of_any_size_are_exact() -> None:
    """Pounds of more digits than Python's decimals have by default are neither rounded in the PDF nor for Odoo."""
    huge = 10**40 + 1
    [document] = issue({key(): huge, key(1): huge}, parties(*WHOLE))
    body = json.loads(json.dumps(document.as_json()))
    [line] = odoo_table([body])
    assert line[-2] == pounds_text(2 * huge)
    text = "".join(page.get_textpage().get_text_range() for page in pypdfium2.PdfDocument(document_pdf(body)))
    pounds, _, pence = body["gross"].partition(".")
    assert f"Total to pay £{int(pounds):,}.{pence}" in " ".join(text.split())


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(st.characters(codec="latin-1", exclude_categories=["C"]), max_size=60), st.integers(3, 60))
def test_text_is_cut_where_the_field_ends(text: str, width: int) -> None:
    """As much of it as there is room for, with dots where some is missing."""
    paper = Paper("title", "about", {"issued_at": "2026-05-03T09:30:00Z", "specimen": False})
    paper._font(9)
    with mock.patch.object(paper, "text") as put:
        paper._put(0, 0, width, text)
    shown = put.call_args.args[2]
    room = (width - 2) * 1000 / paper.font_size
    if paper._units(text) <= room:
        assert shown == text
    else:
        longest = max((n for n in range(len(text)) if paper._units(text[:n] + "...") <= room), default=0)
        assert shown == text[:longest] + "..."


def test_a_long_document_is_summed_up() -> None:
    """A PDF of 15,000 lines has their sum by item, and names the files that have them."""
    rows = {key(number): number + 1 for number in range(15_000)}
    [document] = issue(rows, parties(*WHOLE))
    pdf = pypdfium2.PdfDocument(document_pdf(document.as_json()))
    text = "".join(page.get_textpage().get_text_range() for page in pdf)
    assert len(pdf) == 1
    assert "15,000" in text
    assert f"{Decimal(pounds_text(sum(rows.values()))):,.2f}" in text
    assert "NHSE-000042-invoice.csv" in text


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (party("10030", vat_number="GB123456789"), "party.vat_number"),
        (party("10030", endpoint={"scheme": "0088", "id": "9520000527106"}), "party.endpoint.id"),
        (party("10030", endpoint={"scheme": "0192", "id": "1"}), "party.endpoint.scheme"),
        (party("10030", name="a\nb"), "party.name"),
        (party("10030", nmae="x"), "party.nmae"),
        (party("10030", to="2019-01-01"), "party.to"),
        (agreement("10030", "NHSE", to="2027-01-02"), "agreement.to"),
        ({"cos": {"payer": "NHSE", "recoverable": True, "reason": "r", "from": "2026-01-01"}}, "cos.item_id"),
        ({"party": {}, "cos": {}}, ""),
        ([], ""),
    ],
)
def test_a_bad_row_is_named(row: Any, field: str) -> None:
    """Each fault has its field."""
    with pytest.raises(Refused) as refused:
        read_party_row(row)
    assert refused.value.field == field


def test_an_agreement_may_last_as_long_as_its_contract() -> None:
    """More than twelve months needs the contract's name."""
    row = agreement("10030", "NHSE", to="2029-01-01", contract="C010001")
    assert read_party_row(row) == read_party_row(json.loads(json.dumps(row)))
