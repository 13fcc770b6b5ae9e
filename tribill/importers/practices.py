"""Imports practices: their openings, closings and memberships, from a mapping or from the ODS register."""

from collections.abc import Iterator, Set
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from tribill.importers.changes import reference_change
from tribill.importers.row import Keys, Problem, Record, Row, Shape
from tribill.importers.table import MAX_BYTES, convert

MAPPING = Shape("a mapping of practices", ("ods_code", "sub_icb_code", "pcn_code", "icb_code", "as_of"))
REGISTER = Shape(
    "the ODS register of practices",
    ("ods_code", "opened", "closed", "sub_icb_code", "sub_icb_joined", "sub_icb_left", "icb_code"),
)
ICBS_BEGIN = date(2022, 7, 1)
ONE_DAY = timedelta(days=1)


def import_practices(
    path: Path,
    *,
    recorded_at: datetime,
    practices: Set[str] | None = None,
    max_bytes: int = MAX_BYTES,
    since: date | None = None,
    closings: bool = False,
) -> Iterator[Record | Problem]:
    """Yield what the file knows of each practice.

    - A mapping (the columns of `practices.csv`): Membership of its PCN, of its sub-ICB location as
      commissioner, and once for each sub-ICB location of its ICB, all from `since`, by default the row's
      as_of.
    - The ODS register (`orgs_history.csv`): PracticeOpened, Membership of the latest sub-ICB location from
      the day it joined up to the day after it left, and once for each sub-ICB location that still has a
      practice of its ICB from `since`, by default 1 July 2022. Rows that have left carry codes of former
      bodies, so nothing is said of those bodies' parents.

    PracticeClosed is yielded only with `closings`: the register's dates are administrative, a median of 396
    days after the first quarter without patients, and a closing ends charges. Its date is the first day no
    longer live, so the day after the register's, which is the last (mostly the end of a month).
    The opening 1974-04-01 is the register's placeholder; openings move no money. Ids hold the file's digest.
    """
    said = Keys()
    parents: dict[str, str] = {}

    def changes(row: Row) -> list[Record]:
        ods_code = row.ods_code("ods_code", practices)
        said.claim(row, "ods_code", ods_code)
        records: list[Record] = []

        def say(name: str, code: str, kind: str, body: dict[str, Any]) -> None:
            body = {"ods_code": code} | body
            records.append(reference_change(f"{name}-{row.digest}", code, recorded_at, kind, body))

        def member(code: str, kind: str, parent: str, start: date, end: date | None = None) -> None:
            body = {"kind": kind, "parent": parent, "from": start, "to": end}
            say(f"{kind}-{code}-{start}", code, "Membership", body)

        commissioner, parent = row.optional_ods_code("sub_icb_code"), row.optional_ods_code("icb_code")
        if row.shape is MAPPING:
            joined = parent_since = since or row.day("as_of")
            left = None
            if pcn := row.optional_ods_code("pcn_code"):
                member(ods_code, "pcn", pcn, joined)
        else:
            say(f"opened-{ods_code}", ods_code, "PracticeOpened", {"date": row.day("opened")})
            if closings and (last_day := row.optional_day("closed")):
                say(f"closed-{ods_code}", ods_code, "PracticeClosed", {"date": last_day + ONE_DAY})
            parent_since = since or ICBS_BEGIN
            joined = row.day("sub_icb_joined") if commissioner else parent_since
            last_day = row.optional_day("sub_icb_left")
            left = last_day + ONE_DAY if last_day else None
            if left and left <= joined:
                raise row.refuse("sub_icb_left", "is before sub_icb_joined")
        if commissioner:
            member(ods_code, "commissioner", commissioner, joined, left)
        if commissioner and parent and not left:
            if commissioner not in parents:
                member(commissioner, "commissioner", parent, parent_since)
            if parents.setdefault(commissioner, parent) != parent:
                reason = f"is not {parents[commissioner]}, the parent of {commissioner} so far"
                raise row.refuse("icb_code", reason)
        return records

    yield from convert(path, (MAPPING, REGISTER), max_bytes, changes)
