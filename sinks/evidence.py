"""Why and from what: the causes of adjustments and the evidence of documents, in the ledger and as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

from rating.amounts import GRAINS, Exact, micros_text, pence, whole
from rating.book import Service
from rating.calendar import month_text, parse_month
from rating.causes import Cause
from rating.close import ChargeKey
from rating.evidence import Readings
from sinks.clickhouse import ClickHouse
from sinks.ledger import chunks, month_number
from sinks.positions import Positions, at_cut, cut_parameters

#: The readings that stand of some items on days of some months, those of quantity 0 left out.  Only identities
#: that were ever said to be such are judged: a small part of the ledger.
_STANDING_READINGS = """
SELECT ods_code, toString(supplier_id) AS supplier, id, standing.1 AS revision, standing.2 AS item_id,
       standing.3 AS day, standing.4 AS quantity_micros, standing.5 AS occurred_at_us
FROM (
    SELECT ods_code, supplier_id, id,
           argMin((revision, toString(item_id), day, quantity_micros, toUnixTimestamp64Micro(occurred_at)),
                  (-revision, generation, broker_timestamp_ms, topic, partition, offset, `index`)) AS standing
    FROM usage
    WHERE {condition} AND (ods_code, supplier_id, id) IN (
        SELECT ods_code, supplier_id, id FROM usage
        WHERE item_id IN {{items:Array(String)}} AND toYYYYMM(day) IN {{months:Array(UInt32)}})
    GROUP BY ods_code, supplier_id, id
)
WHERE item_id IN {{items:Array(String)}} AND quantity_micros > 0 AND toYYYYMM(day) IN {{months:Array(UInt32)}}
"""
#: How many they are by day, and their digest (docs/verification.md).
_DIGESTS = """
SELECT ods_code, item_id, day, count(),
       lower(hex(SHA256(arrayStringConcat(arraySort(groupArray(
           concat(toString(revision), ' ', toString(quantity_micros), ' ', id, '\\n')))))))
FROM ({readings}) GROUP BY ods_code, item_id, day
"""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: How evidence says that no usage is in it, and what it begins with where there is some.  Nobody's words can be
#: taken for it: in texts quotes are escaped, and a code that is called "usage" has no such list.
_USAGE, _MONTHS = '"usage":', ',"usage_months":'
_NO_USAGE = f"{_USAGE}[]{_MONTHS}"
_SOME_USAGE = f'{_USAGE}[{{"item_id":'
_DECODER = json.JSONDecoder()
#: So much evidence is held at a time.
SOME_CHARACTERS = 16_000_000


class EvidenceStore:
    """Reads and writes the tables of `0006_evidence.sql`."""

    def __init__(self, clickhouse: ClickHouse) -> None:
        self._clickhouse = clickhouse

    def originals(self, period: int, months: Iterable[int]) -> dict[ChargeKey, tuple[str, str]]:
        """The document, and the one in a series ("": none), that first invoiced each key of these months.

        Both of earlier periods; they differ where the first was a pro-forma.
        """
        rows = self._clickhouse.query(
            """
            SELECT order_number, toString(item_id), ods_code, toString(supplier_id), document_rows.payer, month,
                   argMin(number, document_rows.period), argMinIf(number, document_rows.period, in_series)
            FROM document_rows
            INNER JOIN (
                SELECT period, payer, toString(supplier_id) AS supplier, any(number) AS number,
                       any(toString(kind)) != 'pro-forma' AS in_series
                FROM documents WHERE period < {period:String} GROUP BY period, payer, supplier
            ) AS issued
            ON document_rows.period = issued.period AND document_rows.payer = issued.payer
               AND toString(document_rows.supplier_id) = issued.supplier
            WHERE document_rows.kind = 'invoiced' AND document_rows.period < {period:String}
              AND month IN {months:Array(Int32)}
            GROUP BY order_number, item_id, ods_code, supplier_id, document_rows.payer, month
            """,
            {"period": month_text(period), "months": sorted(months)},
        )
        return {ChargeKey(*key): (first, in_series) for *key, first, in_series in rows}

    def insert_adjustments(
        self, period: int, causes: Mapping[ChargeKey, Cause], originals: Mapping[ChargeKey, str]
    ) -> None:
        """Inserts why a period's close adjusts, and what."""
        columns = (*ChargeKey._fields, "cause", "is_release", "original_document")
        text = month_text(period)
        rows = [(text, *key, cause.text, cause.is_release, originals.get(key, "")) for key, cause in causes.items()]
        self._clickhouse.insert("adjustments", ("period", *columns), rows)

    def corrections(self, period: int) -> tuple[int, int]:
        """Pence corrected, and all pence billed, by a period's close: both without regard to sign.

        What M2 releases is no correction: it was never wrong.
        """
        [(corrected, billed)] = self._clickhouse.query(
            """
            WITH (order_number, toString(item_id), ods_code, toString(supplier_id), payer, month) AS key
            SELECT sumIf(abs(pence), key IN (
                       SELECT (order_number, toString(item_id), ods_code, toString(supplier_id), payer, month)
                       FROM adjustments WHERE period = {period:String} AND NOT is_release)),
                   sum(abs(pence))
            FROM document_rows FINAL WHERE period = {period:String} AND kind = 'invoiced'
            """,
            {"period": month_text(period)},
        )
        return int(corrected), int(billed)

    def insert_wanted(self, period: int, wanted: Mapping[tuple[str, int], Exact]) -> None:
        """Inserts what would draw on allocations, as a period's close derived it."""
        text = month_text(period)
        rows = [(text, party, month, str(pence(exact))) for (party, month), exact in wanted.items()]
        self._clickhouse.insert("allocations_wanted", ("period", "ordering_party", "month", "pence"), rows)

    def wanted(self, period: int) -> dict[tuple[str, int], Exact]:
        """What would have drawn on allocations, in grains by party and month, as a period's close derived it."""
        rows = self._clickhouse.query(
            "SELECT ordering_party, month, pence FROM allocations_wanted FINAL WHERE period = {period:String}",
            {"period": month_text(period)},
        )
        return {(party, month): whole(Fraction(exact) * GRAINS) for party, month, exact in rows}

    def digests(
        self, generation: int, cut: Positions, items: Iterable[str], months: Iterable[int]
    ) -> dict[Service, dict[int, Readings]]:
        """The number and digest of the readings of some items on each day of some months, at a cut."""
        found: dict[Service, dict[int, Readings]] = {}
        for chunk in chunks((each,) for each in sorted(items)):
            statement, parameters = _standing_readings(generation, cut, chunk, months)
            rows = self._clickhouse.query(_DIGESTS.format(readings=statement), parameters)
            for ods_code, item_id, day, count, digest in rows:
                found.setdefault((item_id, ods_code), {})[day.toordinal()] = Readings(count, digest)
        return found

    def readings(
        self, generation: int, cut: Positions, items: Iterable[str], months: Iterable[int]
    ) -> Iterator[dict[str, Any]]:
        """Those readings themselves, as interchange values, by practice, item and day for some items at a time."""
        for chunk in chunks((each,) for each in sorted(items)):
            statement, parameters = _standing_readings(generation, cut, chunk, months)
            statement += " ORDER BY ods_code, item_id, day, supplier, id"
            rows = self._clickhouse.stream(statement, parameters)
            for ods_code, supplier, reading_id, revision, item_id, _, quantity, at in rows:
                occurred_at = (_EPOCH + timedelta(microseconds=at)).isoformat().replace("+00:00", "Z")
                yield {
                    "id": reading_id,
                    "revision": revision,
                    "supplier_id": supplier,
                    "ods_code": ods_code,
                    "item_id": item_id,
                    "quantity": micros_text(quantity),
                    "occurred_at": occurred_at,
                }

    def insert_evidence(self, period: int, bodies: Iterable[tuple[str, str]]) -> None:
        """Inserts the evidence of documents, number and JSON."""
        text = month_text(period)
        self._clickhouse.insert("evidence", ("period", "number", "body"), [(text, *each) for each in bodies])

    def evidence(self, period: int, numbers: Sequence[str]) -> Iterator[tuple[str, str]]:
        """The evidence of some of a period's documents: number and JSON, some megabytes at a time."""
        sizes = self._clickhouse.query(
            "SELECT number, max(length(body)) FROM evidence WHERE period = {period:String}"
            " AND number IN {numbers:Array(String)} GROUP BY number ORDER BY number",
            {"period": month_text(period), "numbers": numbers},
        )
        some: list[str] = []
        size = 0
        for number, length in [*sizes, ("", SOME_CHARACTERS)]:
            if some and size + length > SOME_CHARACTERS:
                yield from self._clickhouse.query(
                    "SELECT number, any(body) FROM evidence WHERE period = {period:String}"
                    " AND number IN {numbers:Array(String)} GROUP BY number ORDER BY number",
                    {"period": month_text(period), "numbers": some},
                )
                some, size = [], 0
            some.append(number)
            size += length


def _standing_readings(
    generation: int, cut: Positions, items: Sequence[tuple[str, ...]], months: Iterable[int]
) -> tuple[str, dict[str, Any]]:
    parameters = cut_parameters(generation, cut) | {
        "items": [item_id for (item_id,) in items],
        "months": [month_number(month) for month in sorted(months)],
    }
    return _STANDING_READINGS.format(condition=at_cut("concat(topic, '/', toString(partition))")), parameters


def evidence_text(evidence: Mapping[str, Any]) -> str:
    """Evidence as its file has it; a document names the SHA-256 of these bytes."""
    return json.dumps(evidence, separators=(",", ":"), ensure_ascii=False) + "\n"


def sealed(body: dict[str, Any]) -> dict[str, Any]:
    """A document with the digest of all that it says (docs/verification.md)."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
    return {**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}


class EvidenceFiles:
    """The files of what documents came from, beside them.

    `<number>-evidence.json`, and where there is usage `<number>-usage.jsonl`, the readings of the months
    that were billed in the interchange form.  `name` makes a number part of a file name.
    """

    def __init__(self, folder: Path, name: Callable[[str], str]) -> None:
        self._folder, self._name = folder, name
        self._numbers: dict[Service, list[str]] = {}
        self._months: set[int] = set()

    def write(self, number: str, text: str) -> Path:
        """Writes a document's evidence, given as JSON."""
        if _NO_USAGE not in text:
            # Of megabytes no more is read than is needed.
            usage, end = _DECODER.raw_decode(text, text.index(_SOME_USAGE) + len(_USAGE))
            months, _ = _DECODER.raw_decode(text, text.index(_MONTHS, end) + len(_MONTHS))
            self._months |= {parse_month(month) for month in months}
            for each in usage:
                self._numbers.setdefault((each["item_id"], each["ods_code"]), []).append(number)
        return write_whole(self._folder / f"{self._name(number)}-evidence.json", text.encode())

    def write_usage(self, readings: Callable[[set[str], set[int]], Iterable[dict[str, Any]]]) -> Iterator[Path]:
        """Writes the readings behind all evidence that was written; yields the files as they are whole."""
        if not (self._numbers and self._months):
            return
        metered = {number for each in self._numbers.values() for number in each}
        paths = {number: self._folder / f"{self._name(number)}-usage.jsonl" for number in metered}
        for path in paths.values():
            unfinished(path).write_bytes(b"")
        lines: dict[Path, list[str]] = {}
        size = 0
        for reading in readings({item_id for item_id, _ in self._numbers}, self._months):
            line = json.dumps({"topic": "usage", "value": reading}, separators=(",", ":"), ensure_ascii=False) + "\n"
            for number in self._numbers.get((reading["item_id"], reading["ods_code"]), ()):
                lines.setdefault(paths[number], []).append(line)
                size += len(line)
            if size > SOME_CHARACTERS:
                _append(lines)
                size = 0
        _append(lines)
        for path in sorted(paths.values()):
            yield unfinished(path).rename(path)


def _append(lines: dict[Path, list[str]]) -> None:
    """Adds lines to their unfinished files, of which there may be more than a process may have open."""
    for path, texts in lines.items():
        with unfinished(path).open("a", encoding="utf-8", newline="") as file:
            file.writelines(texts)
    lines.clear()


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file that is there whole or not at all, also after a kill; one that was there is replaced."""
    unfinished(path).write_bytes(content)
    return unfinished(path).rename(path)


def unfinished(path: Path) -> Path:
    """Where a file is written until it is whole; no form of a paper has such a name."""
    return path.with_name(f".{path.name}.part")
