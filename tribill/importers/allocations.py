"""Imports central allocations: an amount for each ordering party, or one national rate per patient."""

from collections.abc import Iterator, Set
from datetime import datetime
from pathlib import Path

from tribill.importers.changes import reference_change
from tribill.importers.row import Keys, Problem, Record, Row, Shape
from tribill.importers.table import MAX_BYTES, convert

AMOUNT = Shape("ordering_party,financial_year,amount", ("ordering_party", "financial_year", "amount"))
PER_PATIENT = Shape("financial_year,per_patient,as_of", ("financial_year", "per_patient", "as_of"))
NATIONAL = "ENGLAND"


def import_allocations(
    path: Path,
    *,
    recorded_at: datetime,
    practices: Set[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Record | Problem]:
    """Yield an Allocation for each row; `financial_year` is the calendar year of its 1 April.

    Columns `ordering_party,financial_year,amount` give an amount under the ordering party's code, columns
    `financial_year,per_patient,as_of` the national rate under ENGLAND. No row names a practice, so
    `practices` is not looked at. The id holds the file's digest, as with list sizes."""
    said = Keys()

    def allocation(row: Row) -> list[Record]:
        year = row.integer("financial_year", 2000, 2199)
        if row.shape is AMOUNT:
            code = row.ods_code("ordering_party")
            body = {"ordering_party": code, "financial_year": year, "amount": row.decimal("amount")}
        else:
            code = NATIONAL
            as_of = row.day("as_of")
            body = {"financial_year": year, "per_patient": row.decimal("per_patient"), "as_of": as_of}
        said.claim(row, "financial_year", (code, year))
        change_id = f"allocation-{code}-{year}-{row.digest}"
        return [reference_change(change_id, code, recorded_at, "Allocation", body)]

    yield from convert(path, (AMOUNT, PER_PATIENT), max_bytes, allocation)
