"""Documents and statements as PDF, for people.  What is too long to read stands in the CSV beside it."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from decimal import Decimal, localcontext
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from fpdf import FPDF
from fpdf.drawing_primitives import DeviceRGB

from sinks.papers.odoo import MONEY_DIGITS

#: A document with more lines shows its items alone, and names the file that has the lines.
MOST_LINES = 1_000
_TITLES = {
    "invoice": "Self-billed VAT invoice",
    "credit-note": "Self-billed VAT credit note",
    "pro-forma": "Pro-forma: not a VAT invoice",
    "practice": "Statement of a practice",
    "ordering-party": "Statement of an ordering party",
    "supplier": "Remittance advice",
}
#: The two parts of the lines of a paper, each with its kind.
_SECTIONS = (("Charges of this month", "charge"), ("Earlier months: corrections and releases", "adjustment"))
_INK, _GREY, _PALE, _BLUE, _ROSE = (25, 30, 40), (105, 112, 125), (238, 241, 246), (0, 66, 130), (247, 233, 233)
_MARGIN, _WIDTH = 15.0, 180.0


class Column(NamedTuple):
    """A column of a table: its title, width in mm, and whether it is a number."""

    title: str
    width: float
    number: bool = False


class Paper(FPDF):  # type: ignore[misc]  # fpdf has no types that mypy follows
    """A4 pages with a running title, page numbers, and a watermark on a preview or specimen."""

    def __init__(self, title: str, about: str, body: dict[str, Any]) -> None:
        super().__init__(format="A4")
        self._title, self._about = plain(title), plain(about)
        self._watermark = "PREVIEW" if body.get("preview") else "SPECIMEN" if body["specimen"] else ""
        self.set_title(f"{self._title} {self._about}")
        self.set_creation_date(datetime.fromisoformat(body["issued_at"]))
        self.set_margins(_MARGIN, 14, _MARGIN)
        self.set_auto_page_break(True, 18)
        self._columns: Sequence[Column] = ()
        self.add_page()

    # --- what fpdf calls on every page ---

    def header(self) -> None:
        """The watermark, and from the second page on the running title."""
        if self._watermark:
            self._font(84, bold=True, colour=_ROSE)
            with self.rotation(52, 105, 150):
                self.text(18, 168, self._watermark)
        if self.page_no() > 1:
            self._font(8, colour=_GREY)
            self._paragraph(f"{self._title} {self._about}", 7, _WIDTH)
            if self._columns:
                self._table_head()

    def footer(self) -> None:
        """What it is, and the page number."""
        self._font(8, colour=_GREY)
        self._put(_MARGIN, 288, _WIDTH - 40, self._about)
        # The number of pages is put in at the end, which only a cell can.
        self.set_xy(_MARGIN + _WIDTH - 40, 284.6)
        self.cell(40, 5, f"Page {self.page_no()} of {{nb}}", align="R")

    # --- what documents are made of ---

    def _font(self, size: float, bold: bool = False, colour: tuple[int, int, int] = _INK) -> None:
        self.set_font("helvetica", "B" if bold else "", size)
        self.text_color, self._ink = _ink(colour)
        self._widths, self._size = self.current_font.cw, self.font_size

    def opening(self, facts: Iterable[tuple[str, str]]) -> None:
        """The title on the left, facts on the right."""
        top = self.get_y()
        self._font(19, bold=True, colour=_BLUE)
        self._paragraph(self._title, 8.5, 100)
        left = self.get_y()
        for number, (name, value) in enumerate(facts, start=1):
            self._font(8.5, colour=_GREY)
            self._put(_MARGIN + 105, top + 5 * number - 1.5, 28, name)
            self._font(9, bold=True)
            self._put(_MARGIN + 133, top + 5 * number - 1.5, 47, value, right=True)
            left = max(left, top + 5 * number)
        self.set_y(left + 4)

    def blocks(self, blocks: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Blocks of lines side by side, each under its title, its first line bold."""
        top, width, lowest = self.get_y(), _WIDTH / len(blocks), 0.0
        for index, (title, lines) in enumerate(blocks):
            x = _MARGIN + index * width
            self._font(8, colour=_GREY)
            self._put(x, top + 3.5, width, title)
            for number, line in enumerate(lines):
                self._font(9.5, bold=number == 0)
                self._put(x, top + 8.5 + number * 4.6, width - 4, line)
            lowest = max(lowest, top + 5 + len(lines) * 4.6)
        self.set_y(lowest + 4)

    def box(self, text: str, colour: tuple[int, int, int] = (252, 240, 222)) -> None:
        """A sentence that must not be missed."""
        if text:
            self._font(9)
            lines, y = self._wrapped(text, _WIDTH - 5), self.get_y()
            self.set_fill_color(*colour)
            self.rect(_MARGIN, y, _WIDTH, 5 * len(lines) + 3, style="F")
            for number, line in enumerate(lines, start=1):
                self._put(_MARGIN + 1.5, y + 5 * number, _WIDTH - 3, line)
            self.set_y(y + 5 * len(lines) + 6)

    def sum_up(self, text: str) -> None:
        """What it all comes to."""
        self._font(13, bold=True, colour=_BLUE)
        self._put(_MARGIN, self.get_y() + 5.8, _WIDTH, text, right=True)
        self.set_y(self.get_y() + 8)

    def say(self, text: str) -> None:
        """A small sentence."""
        self._font(8.5, colour=_GREY)
        self._paragraph(text, 4.5, _WIDTH)

    def _paragraph(self, text: str, height: float, width: float) -> None:
        for line in self._wrapped(text, width):
            self._put(_MARGIN, self.get_y() + height * 0.72, width, line)
            self.set_y(self.get_y() + height)

    def _wrapped(self, text: str, width: float) -> list[str]:
        """The text in lines of a width in mm."""
        room, lines = (width - 2) * 1000 / self.font_size, [""]
        for word in plain(text).split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self._units(longer) > room:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def _units(self, text: str) -> int:
        """The width of a text in thousandths of the font's size."""
        return sum(map(self._widths.__getitem__, text))

    def table(
        self,
        title: str,
        columns: Sequence[Column],
        rows: Sequence[Sequence[str]],
        total: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """A table whose head repeats on every page; below a row its note."""
        if not rows:
            return
        if self.will_page_break(24):
            self.add_page()
        self._font(11, bold=True)
        self._paragraph(title, 7, _WIDTH)
        self._columns = columns
        self._table_head()
        for number, row in enumerate(rows):
            note = notes[number] if notes else ""
            if self.will_page_break(9 if note else 5):
                self.add_page()
            self._font(8.5)
            self._row(row)
            if note:
                self._font(7.5, colour=_GREY)
                self._put(_MARGIN + 4, self.get_y() + 2.5, _WIDTH - 4, note)
                self.set_y(self.get_y() + 3.8)
        if total:
            self.set_draw_color(*_INK)
            self.line(_MARGIN, self.get_y(), _MARGIN + _WIDTH, self.get_y())
            self._font(8.5, bold=True)
            self._row(total)
        self._columns = ()
        self.ln(4)

    def _table_head(self) -> None:
        self.set_fill_color(*_PALE)
        self.rect(_MARGIN, self.get_y(), _WIDTH, 5.5, style="F")
        self._font(8, bold=True, colour=_GREY)
        self._row([column.title for column in self._columns])
        self.set_y(self.get_y() + 1)

    def _row(self, row: Sequence[str]) -> None:
        x, y = _MARGIN, self.get_y()
        for column, value in zip(self._columns, row, strict=True):
            if value:
                self._put(x, y + 3.7, column.width, value, column.number)
            x += column.width
        self.set_y(y + 4.8)

    def _put(self, x: float, baseline: float, width: float, text: str, right: bool = False) -> None:
        """Text in a field of a width in mm, cut where it is longer.  A tenth of the cost of fpdf's cell."""
        text, room = plain(text), (width - 2) * 1000 / self._size
        taken = self._units(text)
        if taken > room:
            units = list(accumulate(map(self._widths.__getitem__, text)))
            text = text[: bisect_right(units, room - self._units("..."))] + "..."
            taken = self._units(text)
        self.text(x + width - 1 - taken * self._size / 1000 if right else x + 1, baseline, text)

    def text(self, x: float, y: float, text: str = "") -> None:
        """The same bytes as fpdf's own, without what no paper of ours needs: a fourth of the cost."""
        if not self.current_font_is_set_on_page:
            self._out(self._set_font_for_page(self.current_font, self.font_size_pt))
        shown = self.current_font.encode_text(text)
        self._out(f"q {self._ink} BT {x * self.k:.2f} {(self.h - y) * self.k:.2f} Td {shown} ET Q")


@cache
def _ink(colour: tuple[int, int, int]) -> tuple[DeviceRGB, str]:
    """A colour as fpdf knows it and as a page says it."""
    found = DeviceRGB(*(each / 255 for each in colour))
    return found, found.serialize().lower()


def plain(text: str) -> str:
    """Text in the characters that every PDF reader has: others lose their accents, or become a question mark.

    >>> plain("Clwyd \\u0174en, \\u00a31")
    'Clwyd Wen, \\xa31'
    """
    if text.isascii():
        return text
    return "".join(
        each if ord(each) < 256 else unicodedata.normalize("NFKD", each).encode("latin-1", "ignore").decode("latin-1")
        or ("" if unicodedata.combining(each) else "?")
        for each in text
    )  # fmt: skip


def money(pounds: str, sign: int = 1) -> str:
    """An amount as people read it.

    >>> money("-1234.50")
    '-1,234.50'
    """
    return f"{sign * Decimal(pounds) + 0:,.2f}"


def percent(rate: str) -> str:
    """A VAT rate in percent.

    >>> percent("0.2"), percent("0.175")
    ('20', '17.5')
    """
    return f"{(Decimal(rate) * 100).normalize():f}"


def day(text: str) -> str:
    """A date as people read it.

    >>> day("2026-05-03")
    '3 May 2026'
    """
    at = date.fromisoformat(text)
    return f"{at.day} {at:%b %Y}"


def _number(text: str) -> str:
    value = Decimal(text)
    return f"{value:,f}"


def _price(text: str) -> str:
    return (
        max(_number(text), money(text), key=len)
        if "." not in text or len(text.partition(".")[2]) < 2
        else _number(text)
    )


def _party_lines(party: dict[str, Any]) -> list[str]:
    name = party.get("name", f"{party['code']} (not described)")
    place = " ".join(each for each in (party.get("city", ""), party.get("postcode", "")) if each)
    endpoint = party.get("endpoint")
    found = [
        name,
        *party.get("address", ()),
        place,
        f"Code {party['code']}",
        f"VAT number {party['vat_number']}" if party.get("vat_number") else "",
        f"Peppol {endpoint['scheme']}:{endpoint['id']}" if endpoint else "",
    ]
    return [line for line in found if line]


# --- documents ---------------------------------------------------------------------------------


def document_pdf(body: dict[str, Any]) -> bytes:
    """An invoice, credit note or pro-forma."""
    with localcontext(prec=MONEY_DIGITS):
        return _document(body)


def _document(body: dict[str, Any]) -> bytes:
    credit = body["kind"] == "credit-note"
    sign = -1 if credit else 1
    paper = Paper(_TITLES[body["kind"]], body["number"], body)
    facts = [("Number", body["number"]), ("Issue date", day(body["issue_date"])), ("Period", body["period"])]
    facts += [("Tax point", day(body["tax_point"]))]
    facts += [("Payment due", day(body["due_date"]))] if body["kind"] == "invoice" else []
    paper.opening(facts)
    customer = _party_lines(body["customer"])
    paper.blocks([("SUPPLIER", _party_lines(body["supplier"])), ("CUSTOMER, WHO PAYS AND ISSUES", customer)])
    paper.box(body["notice"])
    if body["self_billed"]:
        agreed = body.get("agreement")
        until = f", by agreement from {day(agreed['from'])} to before {day(agreed['to'])}" if agreed else ""
        paper.box(
            f"SELF-BILLING: the customer issues this document for the supplier{until}. {body['statement']}.", _PALE
        )
    _totals(paper, body, sign, credit)
    _summary(paper, body, sign)
    _detail(paper, body, sign)
    return bytes(paper.output())


def _totals(paper: Paper, body: dict[str, Any], sign: int, credit: bool) -> None:
    columns = (Column("VAT rate", 90), Column("Net", 45, True), Column("VAT", 45, True))
    rows = [
        [
            f"{percent(each['vat_rate'])} % ({each['category']})",
            money(each["net"], sign),
            money(each["vat"], sign),
        ]
        for each in body["vat_by_rate"]
    ]
    paper.table("Totals in pounds sterling", columns, rows, ["", money(body["net"], sign), money(body["vat"], sign)])
    paper.set_y(paper.get_y() - 3)
    what = "Credit to the customer" if credit else "Total to pay" if body["self_billed"] else "Total, VAT as ordered"
    paper.sum_up(f"{what}  \u00a3{money(body['gross'], sign)}")
    paper.ln(3)
    cos = [
        [
            each.get("order_number") or each["item_id"],
            "yes" if each["recoverable"] else "no",
            each["reason"],
            money(each["net"], sign),
        ]
        for each in body.get("cos", ())
    ]
    decided = (Column("Order or item", 35), Column("Recovered", 20), Column("Reason", 95), Column("Net", 30, True))
    paper.table("VAT that the customer recovers (COS heading 14)", decided, cos)


def _summary(paper: Paper, body: dict[str, Any], sign: int) -> None:
    now: dict[str, Decimal] = defaultdict(Decimal)
    earlier: dict[str, Decimal] = defaultdict(Decimal)
    practices: dict[str, set[str]] = defaultdict(set)
    for line in body["lines"]:
        item = line["item_id"]
        (now if line["kind"] == "charge" else earlier)[item] += sign * Decimal(line["net"])
        practices[item].add(line["ods_code"])
    columns = (
        Column("Item", 28), Column("Name", 62), Column("Practices", 18, True), Column("This month", 24, True),
        Column("Earlier months", 24, True), Column("Net", 24, True),
    )  # fmt: skip
    rows = [
        [
            item,
            body["items"][item],
            f"{len(practices[item]):,}",
            f"{now[item]:,.2f}",
            f"{earlier[item]:,.2f}",
            f"{now[item] + earlier[item]:,.2f}",
        ]
        for item in sorted(practices)
    ]
    both = (sum(now.values()), sum(earlier.values()))
    total = ["", "", f"{len(set().union(*practices.values())):,}", *(f"{each:,.2f}" for each in (*both, sum(both)))]
    paper.table("Summary by item", columns, rows, total)


_LINES = (
    Column("Practice", 18), Column("Item", 26), Column("Call-off", 22), Column("Month", 17),
    Column("Quantity", 22, True), Column("Unit", 20), Column("Unit price", 23, True), Column("VAT", 10, True),
    Column("Net", 22, True),
)  # fmt: skip


def _detail(paper: Paper, body: dict[str, Any], sign: int) -> None:
    lines = body["lines"]
    if len(lines) > MOST_LINES:
        paper.say(
            f"The {len(lines):,} lines, each with practice, call-off order, quantity, price and cause, are in "
            f"the files {body['number']}-{body['kind']}.csv, .json and .xml, which belong to this document."
        )
        return
    for title, kind in _SECTIONS:
        of_kind = [line for line in lines if line["kind"] == kind]
        rows = [
            [
                line["ods_code"],
                line["item_id"],
                line["order_number"],
                line["for_period"],
                _number(line["quantity"]) if sign > 0 else _number(str(-Decimal(line["quantity"]))),
                line["unit"],
                _price(line["unit_price"]),
                percent(line["vat_rate"]),
                money(line["net"], sign),
            ]
            for line in of_kind
        ]
        notes = [_why(line) for line in of_kind]
        net = sum((sign * Decimal(line["net"]) for line in of_kind), Decimal(0))
        paper.table(title, _LINES, rows, [*[""] * 8, f"{net:,.2f}"], notes if any(notes) else ())


def _why(line: dict[str, Any]) -> str:
    cause, original = line.get("cause") or "", line.get("original_document") or ""
    return (
        "    " + ", ".join(each for each in (cause, f"corrects {original}" if original else "") if each)
        if cause or original
        else ""
    )


# --- statements --------------------------------------------------------------------------------


def statement_pdf(body: dict[str, Any]) -> bytes:
    """A practice's or ordering party's statement, or a supplier's remittance advice."""
    with localcontext(prec=MONEY_DIGITS):
        return _statement(body)


def _statement(body: dict[str, Any]) -> bytes:
    kind = body["statement"]
    paper = Paper(_TITLES[kind], f"{body['code']} {body['period']}", body)
    facts = [("Code", body["code"]), ("Period", body["period"])]
    if kind == "supplier":
        facts += [("Gross", money(body["gross"])), ("Held", money(body["held_net"]))]
    else:
        facts += [("Net", money(body["net"])), ("Held", money(body["held_net"]))]
    paper.opening(facts)
    if body["name"]:
        paper.blocks([("FOR", [body["name"]])])
    if kind == "supplier":
        _documents(paper, body)
        _usage(paper, body.get("usage"))
    if allocation := body.get("allocation"):
        _allocation(paper, allocation)
    if kind == "practice":
        _practice_lines(paper, body)
    if kind == "ordering-party":
        _order_lines(paper, body)
    if paid := body.get("paid_by"):
        rows = [[payer, money(net)] for payer, net in paid.items()]
        columns = (Column("Payer", 140), Column("Net", 40, True))
        paper.table("Who pays", columns, rows, ["", money(body["net"])])
    _held(paper, body)
    return bytes(paper.output())


def _documents(paper: Paper, body: dict[str, Any]) -> None:
    columns = (
        Column("Document", 50), Column("Kind", 28), Column("Payer", 27), Column("Net", 25, True),
        Column("VAT", 25, True), Column("Gross", 25, True),
    )  # fmt: skip
    rows = [
        [each["number"], each["kind"], each["payer"], money(each["net"]), money(each["vat"]), money(each["gross"])]
        for each in body["documents"]
    ]
    total = ["", "", "", money(body["net"]), money(body["vat"]), money(body["gross"])]
    paper.table("Documents of this period, in pounds", columns, rows, total)


def _usage(paper: Paper, usage: dict[str, Any] | None) -> None:
    if usage:
        columns = (Column("Usage of this month", 90), Column("Readings", 45, True), Column("Units", 45, True))
        parts = (("As attested", usage.get("attested")), ("Counted here, at the cut", usage["found"]))
        rows = [[name, f"{each['count']:,}", _number(each["quantity"])] for name, each in parts if each]
        paper.table("Usage: " + usage["said"], columns, rows)


def _allocation(paper: Paper, allocation: dict[str, Any]) -> None:
    columns = (
        Column(f"Central allocation, financial year {allocation['financial_year']}", 130),
        Column("Pounds", 50, True),
    )
    dry = allocation["runs_dry"]
    rows = [
        ["Allocation", money(allocation["allocation"])],
        ["Drawn this month", money(allocation["drawn_this_month"])],
        ["Drawn since April", money(allocation["drawn"])],
        ["Left", money(allocation["left"])],
        ["Runs dry, at this month's rate", dry or "not in this financial year"],
    ]
    paper.table("Allocation", columns, rows)


def _practice_lines(paper: Paper, body: dict[str, Any]) -> None:
    columns = (
        Column("Item", 28), Column("Name", 52), Column("Month", 17), Column("Used", 22, True), Column("Unit", 19),
        Column("Paid by", 20), Column("Net", 22, True),
    )  # fmt: skip
    for title, kind in _SECTIONS:
        lines = [line for line in body["lines"] if line["kind"] == kind]
        rows = [
            [
                line["item_id"],
                body["items"][line["item_id"]],
                line["for_period"],
                _number(line["quantity"]) if line.get("quantity") else "",
                line.get("unit", ""),
                ", ".join(line["paid_by"]),
                money(line["net"]),
            ]
            for line in lines
        ]
        net = sum((Decimal(line["net"]) for line in lines), Decimal(0))
        paper.table(title, columns, rows, [*[""] * 6, f"{net:,.2f}"])


def _order_lines(paper: Paper, body: dict[str, Any]) -> None:
    columns = (
        Column("Call-off", 22), Column("Item", 28), Column("Name", 52), Column("Kind", 20), Column("Payer", 18),
        Column("Practices", 17, True), Column("Net", 23, True),
    )  # fmt: skip
    rows = [
        [
            line["order_number"],
            line["item_id"],
            body["items"][line["item_id"]],
            line["kind"],
            line["payer"],
            str(line["practices"]),
            money(line["net"]),
        ]
        for line in body["lines"]
    ]
    paper.table("Its orders", columns, rows, [*[""] * 6, money(body["net"])])


def _held(paper: Paper, body: dict[str, Any]) -> None:
    """What is held, by line; by item where that is too long to read."""
    held = body["held"]
    if len(held) <= MOST_LINES:
        columns = (
            Column("Call-off", 24), Column("Item", 30), Column("Practice", 22), Column("Why", 80),
            Column("Net", 24, True),
        )  # fmt: skip
        rows = [[e["order_number"], e["item_id"], e["ods_code"], e["reason"], money(e["net"])] for e in held]
        paper.table("Accrued and held, to be paid when released", columns, rows, [*[""] * 4, money(body["held_net"])])
        return
    net: dict[str, Decimal] = defaultdict(Decimal)
    count: dict[str, int] = defaultdict(int)
    for each in held:
        net[each["item_id"]] += Decimal(each["net"])
        count[each["item_id"]] += 1
    by_item = (Column("Item", 30), Column("Name", 96), Column("Lines", 24, True), Column("Net", 30, True))
    rows = [[item, body["items"][item], f"{count[item]:,}", f"{net[item]:,.2f}"] for item in sorted(net)]
    paper.table(
        "Accrued and held until service stability (M2), by item",
        by_item,
        rows,
        ["", "", f"{len(held):,}", money(body["held_net"])],
    )
