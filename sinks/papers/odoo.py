"""Bills for a payer's Odoo: one import of `account.move`, as CSV for the import screen and as a JSON-2 request.

Both hold the same table.  The JSON is the body of `POST /json/2/account.move/load` (Odoo 19): `load` is what the
import screen calls, takes names instead of database ids, and takes an external id again as the same bill.  A
bill has a line for each order, item, kind and VAT rate, because VAT is on the sum of a rate; let the company
round taxes globally.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from decimal import Decimal, localcontext
from typing import Any

#: As many digits as pence in the ledger have: no sum of pounds is rounded.
MONEY_DIGITS = 80
_FIELDS = (
    "id",
    "move_type",
    "partner_id",
    "ref",
    "invoice_date",
    "invoice_date_due",
    "currency_id",
    "narration",
    "invoice_line_ids/name",
    "invoice_line_ids/quantity",
    "invoice_line_ids/price_unit",
    "invoice_line_ids/tax_ids",
)


def odoo_table(bodies: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The rows of the import: the first of a bill has its head, the others only their line."""
    with localcontext(prec=MONEY_DIGITS):
        return [row for body in bodies if body["self_billed"] for row in _bill(body)]


def odoo_csv(table: list[list[str]]) -> str:
    """The table for the import screen."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(_FIELDS)
    out.writerows(table)
    return file.getvalue()


def odoo_json(table: list[list[str]]) -> str:
    """The table as the body of a request to JSON-2."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in table)
    return f'{{"fields": {json.dumps(_FIELDS)},\n"data": [\n{rows}\n]}}\n'


def _bill(body: dict[str, Any]) -> Iterable[list[str]]:
    refund = body["kind"] == "credit-note"
    head = [
        f"tribill.{body['number'].replace('.', '_')}",
        "in_refund" if refund else "in_invoice",
        body["supplier"]["name"],
        body["number"],
        body["issue_date"],
        body["due_date"],
        body["currency"],
        ". ".join(each for each in (body["notice"], body["statement"]) if each),
    ]
    net: dict[tuple[str, str, str, str], Decimal] = {}
    practices: dict[tuple[str, str, str, str], set[str]] = {}
    for line in body["lines"]:
        group = (line["order_number"], line["item_id"], line["kind"], line["vat_rate"])
        net[group] = net.get(group, Decimal(0)) + Decimal(line["net"])
        practices.setdefault(group, set()).add(line["ods_code"])
    for group, amount in sorted(net.items()):
        order, item, kind, rate = group
        what = "" if kind == "charge" else ", corrections of earlier months"
        name = f"{order} {item} {body['items'][item]}: {len(practices[group])} practices, {body['period']}{what}"
        yield [*head, name, "1", str(-amount if refund else amount), f"{(Decimal(rate) * 100).normalize():f}%"]
        head = [""] * len(head)
