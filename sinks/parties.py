"""Party data in the ledger: every import is kept, so that a close can be repeated with what it knew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rating.parties import Parties, read_party_row
from sinks.clickhouse import ClickHouse


class PartyStore:
    """Reads and writes the table `parties`."""

    def __init__(self, clickhouse: ClickHouse) -> None:
        self._clickhouse = clickhouse

    def insert(self, rows: Sequence[dict[str, Any]], at: datetime) -> None:
        """Keeps the rows of an import, which were checked by `read_party_row`; they go in as one block."""
        bodies = [json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in rows]
        digest = hashlib.sha256("\n".join(bodies).encode()).hexdigest()[:16]
        import_id = f"{at:%Y-%m-%dT%H:%M:%S.%f}-{digest}"
        numbered = [(import_id, number, body) for number, body in enumerate(bodies)]
        self._clickhouse.insert("parties", ("import_id", "row", "body"), numbered)

    def imports(self) -> list[str]:
        """The imports that there are, in their order."""
        rows = self._clickhouse.query("SELECT DISTINCT import_id FROM parties ORDER BY import_id")
        return [import_id for (import_id,) in rows]

    def parties(self, imports: Sequence[str], specimen: bool) -> Parties:
        """What these imports say, later ones over earlier."""
        rows = self._clickhouse.query(
            "SELECT body FROM parties FINAL WHERE import_id IN {imports:Array(String)} ORDER BY import_id, row",
            {"imports": list(imports)},
        )
        return Parties.fold((read_party_row(json.loads(body)) for (body,) in rows), specimen)
