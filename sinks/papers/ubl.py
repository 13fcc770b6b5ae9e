"""An invoice or credit note as UBL 2.1, Peppol BIS Self-Billing 3.0 (a usage of EN 16931).

The customer issues it.  EN 16931 knows no third party, so the payer is the buyer (its code the buyer
reference), the call-off order and the practice stand on each line.  A credit note shows what is given back as
positive amounts.  Only `electronic` documents have this form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any
from xml.sax.saxutils import escape

from lxml import etree

from rating.calendar import days_in, parse_month
from rating.documents import PAYMENT_DAYS

CUSTOMIZATION = "urn:cen.eu:en16931:2017#compliant#urn:fdc:peppol.eu:2017:poacc:selfbilling:3.0"
PROFILE = "urn:fdc:peppol.eu:2017:poacc:selfbilling:01:1.0"
INVOICE, CREDIT_NOTE = "389", "261"

_UBL = "urn:oasis:names:specification:ubl:schema:xsd:"
_CBC, _CAC = f"{{{_UBL}CommonBasicComponents-2}}", f"{{{_UBL}CommonAggregateComponents-2}}"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: UN/ECE Recommendation 20.
_MONTHS, _ONE = "MON", "C62"

Node = Any


def ubl(body: dict[str, Any]) -> bytes:
    """The XML of a document."""
    credit = body["kind"] == "credit-note"
    kind = "CreditNote" if credit else "Invoice"
    sign = -1 if credit else 1
    spaces = {None: f"{_UBL}{kind}-2", "cac": _CAC[1:-1], "cbc": _CBC[1:-1]}
    root = etree.Element(f"{{{_UBL}{kind}-2}}{kind}", nsmap=spaces)
    _head(root, body, credit)
    _references(root, body)
    _party(root, "AccountingSupplierParty", body["supplier"])
    _party(root, "AccountingCustomerParty", body["customer"])
    terms = "Set off against what is due to the supplier" if credit else f"{PAYMENT_DAYS} days after the issue date"
    _basic(_aggregate(root, "PaymentTerms"), "Note", terms)
    _totals(root, body, sign)
    found: bytes = etree.tostring(root, xml_declaration=True, encoding="UTF-8", pretty_print=True)
    end = f"</{kind}>\n".encode()
    return b"".join([found.removesuffix(end), *(line.encode() for line in _lines(body, kind, sign)), end])


def _basic(parent: Node, name: str, text: str, **attributes: str) -> None:
    etree.SubElement(parent, _CBC + name, attributes).text = _NOT_XML.sub("\ufffd", text)


def _aggregate(parent: Node, name: str) -> Node:
    return etree.SubElement(parent, _CAC + name)


def _amount(parent: Node, name: str, pounds: str, sign: int) -> None:
    _basic(parent, name, _signed(pounds, sign), currencyID="GBP")


def _signed(text: str, sign: int) -> str:
    if sign > 0 or not text.strip("0.-"):
        return text
    return text.removeprefix("-") if text.startswith("-") else f"-{text}"


def _category(rate: str) -> str:
    return "Z" if rate == "0" else "S"


@lru_cache
def _percent(rate: str) -> str:
    return f"{(Decimal(rate) * 100).normalize():f}"


def _head(root: Node, body: dict[str, Any], credit: bool) -> None:
    _basic(root, "CustomizationID", CUSTOMIZATION)
    _basic(root, "ProfileID", PROFILE)
    _basic(root, "ID", body["number"])
    _basic(root, "IssueDate", body["issue_date"])
    if credit:
        _basic(root, "TaxPointDate", body["tax_point"])
        _basic(root, "CreditNoteTypeCode", CREDIT_NOTE)
        _basic(root, "Note", _note(body))
    else:
        _basic(root, "DueDate", body["due_date"])
        _basic(root, "InvoiceTypeCode", INVOICE)
        _basic(root, "Note", _note(body))
        _basic(root, "TaxPointDate", body["tax_point"])
    _basic(root, "DocumentCurrencyCode", body["currency"])
    _basic(root, "BuyerReference", body["payer"])
    months = sorted({line["for_period"] for line in body["lines"]})
    _period(root, months[0], max(months[-1], body["period"]))


def _note(body: dict[str, Any]) -> str:
    said = [body["notice"], f"Self-billed by {body['customer']['name']} (payer {body['payer']})", body["statement"]]
    return ". ".join(each for each in said if each)


def _period(parent: Node, first: str, last: str) -> None:
    period = _aggregate(parent, "InvoicePeriod")
    _basic(period, "StartDate", f"{first}-01")
    _basic(period, "EndDate", _last_day(last))


def _references(root: Node, body: dict[str, Any]) -> None:
    orders = {line["order_number"] for line in body["lines"]}
    if len(orders) == 1:
        _basic(_aggregate(root, "OrderReference"), "ID", *orders)
    for number in originals(body["lines"]):
        reference = _aggregate(_aggregate(root, "BillingReference"), "InvoiceDocumentReference")
        _basic(reference, "ID", number)
    frameworks = {each["framework"] for each in body["orders"].values() if each["framework"].strip()}
    if len(frameworks) == 1:
        _basic(_aggregate(root, "ContractDocumentReference"), "ID", *frameworks)


def originals(lines: Iterable[dict[str, Any]]) -> list[str]:
    """The documents that the lines correct."""
    return sorted({line["original_document"] for line in lines if line.get("original_document")})


def _party(root: Node, role: str, party: dict[str, Any]) -> None:
    node = _aggregate(_aggregate(root, role), "Party")
    _basic(node, "EndpointID", party["endpoint"]["id"], schemeID=party["endpoint"]["scheme"])
    _basic(_aggregate(node, "PartyIdentification"), "ID", party["code"])
    _basic(_aggregate(node, "PartyName"), "Name", party["name"])
    address = _aggregate(node, "PostalAddress")
    street, *more = party["address"]
    _basic(address, "StreetName", street)
    if more:
        _basic(address, "AdditionalStreetName", more[0])
    if party.get("city"):
        _basic(address, "CityName", party["city"])
    _basic(address, "PostalZone", party["postcode"])
    for line in more[1:]:
        _basic(_aggregate(address, "AddressLine"), "Line", line)
    _basic(_aggregate(address, "Country"), "IdentificationCode", party["country"])
    if party.get("vat_number"):
        scheme = _aggregate(node, "PartyTaxScheme")
        _basic(scheme, "CompanyID", party["vat_number"])
        _basic(_aggregate(scheme, "TaxScheme"), "ID", "VAT")
    _basic(_aggregate(node, "PartyLegalEntity"), "RegistrationName", party["name"])


def _totals(root: Node, body: dict[str, Any], sign: int) -> None:
    total = _aggregate(root, "TaxTotal")
    _amount(total, "TaxAmount", body["vat"], sign)
    for each in body["vat_by_rate"]:
        subtotal = _aggregate(total, "TaxSubtotal")
        _amount(subtotal, "TaxableAmount", each["net"], sign)
        _amount(subtotal, "TaxAmount", each["vat"], sign)
        _tax_category(_aggregate(subtotal, "TaxCategory"), each["vat_rate"])
    money = _aggregate(root, "LegalMonetaryTotal")
    _amount(money, "LineExtensionAmount", body["net"], sign)
    _amount(money, "TaxExclusiveAmount", body["net"], sign)
    _amount(money, "TaxInclusiveAmount", body["gross"], sign)
    _amount(money, "PayableAmount", body["gross"], sign)


def _tax_category(node: Node, rate: str) -> None:
    _basic(node, "ID", _category(rate))
    _basic(node, "Percent", _percent(rate))
    _basic(_aggregate(node, "TaxScheme"), "ID", "VAT")


def _lines(body: dict[str, Any], kind: str, sign: int) -> Iterator[str]:
    """The lines as text, laid out like the rest: a tree of all of them costs ten times as much."""
    quantity = "CreditedQuantity" if kind == "CreditNote" else "InvoicedQuantity"
    for number, line in enumerate(body["lines"], start=1):
        note = f"\n    <cbc:Note>{_text(line['cause'])}</cbc:Note>" if line.get("cause") else ""
        unit = _MONTHS if line["unit"] == "month" else _ONE
        properties = [("Practice", line["ods_code"])]
        if order := body["orders"].get(line["order_number"]):
            properties.append(("Ordering party", order["ordering_party"]))
        if line.get("original_document"):
            properties.append(("Corrects", line["original_document"]))
        yield f"""\
  <cac:{kind}Line>
    <cbc:ID>{number}</cbc:ID>{note}
    <cbc:{quantity} unitCode="{unit}">{_signed(line["quantity"], sign)}</cbc:{quantity}>
    <cbc:LineExtensionAmount currencyID="GBP">{_signed(line["net"], sign)}</cbc:LineExtensionAmount>
    <cac:InvoicePeriod>
      <cbc:StartDate>{line["for_period"]}-01</cbc:StartDate>
      <cbc:EndDate>{_last_day(line["for_period"])}</cbc:EndDate>
    </cac:InvoicePeriod>
    <cac:OrderLineReference>
      <cbc:LineID>{_text(line["order_number"])}</cbc:LineID>
    </cac:OrderLineReference>
    <cac:Item>
      <cbc:Name>{_text(body["items"][line["item_id"]])}</cbc:Name>
      <cac:SellersItemIdentification>
        <cbc:ID>{_text(line["item_id"])}</cbc:ID>
      </cac:SellersItemIdentification>
      <cac:ClassifiedTaxCategory>
        <cbc:ID>{_category(line["vat_rate"])}</cbc:ID>
        <cbc:Percent>{_percent(line["vat_rate"])}</cbc:Percent>
        <cac:TaxScheme>
          <cbc:ID>VAT</cbc:ID>
        </cac:TaxScheme>
      </cac:ClassifiedTaxCategory>
{"".join(_property(*each) for each in properties)}\
    </cac:Item>
    <cac:Price>
      <cbc:PriceAmount currencyID="GBP">{line["unit_price"]}</cbc:PriceAmount>
    </cac:Price>
  </cac:{kind}Line>
"""


def _property(name: str, value: str) -> str:
    return f"""\
      <cac:AdditionalItemProperty>
        <cbc:Name>{name}</cbc:Name>
        <cbc:Value>{_text(value)}</cbc:Value>
      </cac:AdditionalItemProperty>
"""


@lru_cache(maxsize=65_536)
def _text(value: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", value), {"\r": "&#13;"})


@lru_cache
def _last_day(month: str) -> str:
    return f"{month}-{days_in(parse_month(month)):02d}"
