"""`tribill import`: what the importers read of real files, published or written as an interchange file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sinks.clickhouse import ClickHouse
from sinks.parties import PartyStore
from streams.settings import Settings
from tribill.importers import IMPORTERS, Problem, table
from tribill.importers.parties import import_parties
from tribill.importers.row import Shape
from tribill.interchange import Publisher

_PRACTICES = Shape("a list of practices", ("ods_code",))
#: Its codes are held in memory; the ODS register of all practices is half a megabyte.
_PRACTICES_MAX_BYTES = 64 * 2**20


def import_all(
    kind: str,
    files: Sequence[Path],
    settings: Settings,
    target: Path | None,
    known: Path | None,
    whole: bool,
    say: Callable[[str], None],
) -> tuple[int, int]:
    """Imports the files; returns how many records were published (or written) and how many rows were bad.

    `known` names a file of the practices that exist, in a column `ods_code`.  With `whole` a file of
    orders with a bad row is held back, because an order is placed once.
    """
    practices = _practices_in(known) if known is not None else None
    recorded_at = datetime.now(UTC)
    published = problems = 0
    with ExitStack() as stack:
        publisher = Publisher(settings) if target is None else None
        file = stack.enter_context(target.open("w", encoding="utf-8")) if target is not None else None

        def send(record: dict[str, Any]) -> None:
            if file is not None:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            elif publisher is not None:
                publisher.send_record(record["topic"], record["value"])

        for path in files:
            held: list[dict[str, Any]] = []
            bad = 0
            for found in IMPORTERS[kind](path, recorded_at=recorded_at, practices=practices):
                if isinstance(found, Problem):
                    bad += 1
                    say(str(found))
                elif kind == "orders":
                    held.append(found)
                else:
                    send(found)
                    published += 1
                    if published % 100_000 == 0:
                        say(f"{published} records")
            if bad and held and whole:
                say(f"{path}: held back because of {bad} bad rows")
            else:
                for record in held:
                    send(record)
                published += len(held)
            problems += bad
        if publisher is not None:
            problems += publisher.flush()
    return published, problems


def import_party_files(files: Sequence[Path], clickhouse: ClickHouse, say: Callable[[str], None]) -> tuple[int, int]:
    """Imports party data into the ledger, a version a file; returns how many rows were kept and how many were bad."""
    store, kept, problems = PartyStore(clickhouse), 0, 0
    for path in files:
        rows = []
        for found in import_parties(path):
            if isinstance(found, Problem):
                problems += 1
                say(str(found))
            else:
                rows.append(found)
        store.insert(rows, datetime.now(UTC))
        kept += len(rows)
    return kept, problems


def _practices_in(path: Path) -> set[str]:
    """The codes in the column `ods_code`.  Raises ValueError with the place and the fault of the first bad row."""
    codes = set()
    for row in table.rows(path, [_PRACTICES], _PRACTICES_MAX_BYTES):
        if isinstance(row, Problem):
            raise ValueError(f"{row}; mend the file of practices, or import without --practices")  # noqa: TRY004
        codes.add(row.text("ods_code"))
    return codes
