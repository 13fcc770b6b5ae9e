"""Imports party data: JSON lines of parties, self-billing agreements, COS decisions and names of items."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rating.parties import read_party_row
from rating.records import Refused
from streams.codec import NESTING_MAX_LEVELS, is_shallow
from tribill.importers.row import MAX_SHOWN_CHARACTERS, Problem

MAX_BYTES = 64 * 2**20
MAX_LINE_BYTES = 2**16
MAX_ROWS = 200_000


def import_parties(path: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[dict[str, Any] | Problem]:
    """Yield each row as it was said, checked, and every Problem, in the order of the file.

    A file is UTF-8, with or without BOM, at most `max_bytes` long; docs/documents.md describes its rows. A blank
    line says nothing."""
    size, rows = path.stat().st_size, 0
    if size > max_bytes:
        yield Problem(str(path), 0, "", "", f"is larger than {max_bytes:,} bytes")
        return
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                reason = f"has more than {MAX_LINE_BYTES:,} bytes; nothing was read from here on"
                yield Problem(str(path), number, "", "", reason)
                return
            if not line.strip():
                continue
            found = _row(str(path), number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            rows += not isinstance(found, Problem)
            if rows > MAX_ROWS:
                yield Problem(str(path), number, "", "", f"comes after {MAX_ROWS:,} rows, the most of one file")
                return
            yield found


def _row(file: str, number: int, line: bytes) -> dict[str, Any] | Problem:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        reason = f"is no line of JSON in UTF-8: {error}"
        return Problem(file, number, "", "", reason)
    if not is_shallow(row):
        return Problem(file, number, "", "", f"is nested deeper than {NESTING_MAX_LEVELS} levels")
    try:
        read_party_row(row)
    except Refused as refused:
        shown = json.dumps(_value(row, refused.field), ensure_ascii=False) if refused.field else ""
        return Problem(file, number, refused.field, shown[: MAX_SHOWN_CHARACTERS + 1], refused.reason)
    found: dict[str, Any] = row
    return found


def _value(row: Any, path: str) -> Any:
    for name in path.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row
