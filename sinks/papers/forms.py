"""The forms of a document: all that they say is in its JSON, so that whoever has that can make them again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

_LINE_COLUMNS = (
    "order_number", "item_id", "ods_code", "for_period", "kind", "quantity", "unit", "unit_price", "vat_rate", "net",
    "cause", "original_document",
)  # fmt: skip


def document_forms(body: dict[str, Any]) -> dict[str, bytes]:
    """A document's files by their suffix: .json, .pdf, .csv, and .xml where it is an e-invoice."""
    from sinks.papers.pdf import document_pdf
    from sinks.papers.ubl import ubl

    rows = ([line.get(column) or "" for column in _LINE_COLUMNS] for line in body["lines"])
    forms = {".json": json_text(body).encode(), ".pdf": document_pdf(body)}
    if body["electronic"]:
        forms[".xml"] = ubl(body)
    return forms | {".csv": csv_text(_LINE_COLUMNS, rows).encode()}


def csv_text(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as CSV, with a line feed behind each row."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(header)
    out.writerows(rows)
    return file.getvalue()


def json_text(body: dict[str, Any]) -> str:
    """JSON for people and machines: a field a line, and a line of a list a line."""
    parts = []
    for name, value in body.items():
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in value)
            text = f"[\n  {rows}\n ]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
