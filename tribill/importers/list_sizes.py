"""Imports registered list sizes: what the NHS publishes becomes ListSize changes."""

from collections.abc import Iterator, Set
from datetime import datetime
from pathlib import Path

from tribill.importers.changes import reference_change
from tribill.importers.row import EXTRACT_DATE, ISO_DATE, Keys, Problem, Record, Row, Shape
from tribill.importers.table import MAX_BYTES, convert

COMPACT = Shape("ods_code,as_of,patients", ("ods_code", "as_of", "patients"))
PUBLISHED = Shape(
    "Patients Registered at a GP Practice",
    ("EXTRACT_DATE", "TYPE", "CODE", "SEX", "AGE", "NUMBER_OF_PATIENTS"),
)


def import_list_sizes(
    path: Path,
    *,
    recorded_at: datetime,
    practices: Set[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Record | Problem]:
    """Yield a ListSize for each practice and snapshot date.

    Two shapes: `ods_code,as_of,patients`, and NHS "Patients Registered at a GP Practice" with its columns for
    the CCG or the sub-ICB location (ignored), of which only practices' totals are kept (TYPE GP, SEX and AGE
    ALL). A list without such a row is a Problem.

    The id is `list-<practice>-<as of>-<digest of the file>`. So the same file again is a duplicate, while a
    republished file says all its numbers anew, also one that returns to an earlier number. A number that one
    file says twice for a practice and date is refused the second time.
    """
    said = Keys()

    def list_size(row: Row) -> list[Record]:
        code, as_of, patients = "ods_code", "as_of", "patients"
        style = ISO_DATE
        if row.shape is PUBLISHED:
            if (row.text("TYPE"), row.text("SEX"), row.text("AGE")) != ("GP", "ALL", "ALL"):
                return []
            code, as_of, patients = "CODE", "EXTRACT_DATE", "NUMBER_OF_PATIENTS"
            style = EXTRACT_DATE
        ods_code, day = row.ods_code(code, practices), row.day(as_of, style)
        size = {"ods_code": ods_code, "as_of": day, "patients": row.integer(patients)}
        said.claim(row, code, (ods_code, day))
        change_id = f"list-{ods_code}-{day}-{row.digest}"
        return [reference_change(change_id, ods_code, recorded_at, "ListSize", size)]

    empty = True
    for each in convert(path, (COMPACT, PUBLISHED), max_bytes, list_size):
        empty = False
        yield each
    if empty:
        reason = "has no list size (of the published shape: TYPE GP, SEX ALL, AGE ALL)"
        yield Problem(str(path), 0, "", "", reason)
