"""The ledger: what was said, kept for ever; what stands of it at a cut is a query."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pyarrow as pa

from rating.book import Service
from rating.completeness import Reported
from sinks.clickhouse import ClickHouse
from sinks.positions import Positions, at_cut, cut_parameters
from streams.topics import CONTRACT_CHANGES, REFERENCE_CHANGES, USAGE_ACCEPTED

#: The columns of a usage row, as blocks in usage-accepted and the table have them.
USAGE_SCHEMA = pa.schema(
    [
        ("ods_code", pa.string()),
        ("supplier_id", pa.string()),
        ("id", pa.string()),
        ("revision", pa.int64()),
        ("generation", pa.uint32()),
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("index", pa.int32()),
        ("broker_timestamp_ms", pa.int64()),
        ("accepted_partition", pa.int32()),
        ("accepted_offset", pa.int64()),
        ("item_id", pa.string()),
        ("quantity_micros", pa.int64()),
        ("occurred_at", pa.timestamp("us", "UTC")),
        ("day", pa.date32()),
    ]
)

#: What stands: of a revision the first by position, of an identity the highest revision.
_STANDING_TOTALS = """
SELECT ods_code, content.1 AS item_id, content.2 AS day, sum(toInt256(content.3)) AS quantity_micros
FROM (
    SELECT ods_code, argMax(content, revision) AS content
    FROM (
        SELECT ods_code, supplier_id, id, revision,
               argMin((toString(item_id), toInt32(day), quantity_micros),
                      (generation, broker_timestamp_ms, topic, partition, offset, `index`)) AS content
        FROM usage
        WHERE {condition}
        GROUP BY ods_code, supplier_id, id, revision
    )
    GROUP BY ods_code, supplier_id, id
)
GROUP BY ods_code, item_id, day
"""
#: The same of a large part of the ledger, at a third of the cost: the few identities that were said more than
#: once, known by a hash, are judged by themselves (so are others of the same hash), all else is added up.  A
#: revision may name another item than the one before it, so of some items is only what stands in the end.
_STANDING_TOTALS_OF_MUCH = """
WITH again AS (
    SELECT sipHash64(ods_code, supplier_id, id) AS hash FROM usage WHERE {condition} GROUP BY hash HAVING count() > 1
)
SELECT ods_code, item_id, day, sum(quantity_micros) FROM (
    SELECT ods_code, toString(item_id) AS item_id, toInt32(day) AS day, toInt256(quantity_micros) AS quantity_micros
    FROM usage WHERE {condition} AND {items} AND sipHash64(ods_code, supplier_id, id) NOT IN again
    UNION ALL SELECT ods_code, content.1, content.2, toInt256(content.3) FROM (
        SELECT ods_code,
               argMin((toString(item_id), toInt32(day), quantity_micros),
                      (-revision, generation, broker_timestamp_ms, topic, partition, offset, `index`)) AS content
        FROM usage WHERE {condition} AND sipHash64(ods_code, supplier_id, id) IN again
        GROUP BY ods_code, supplier_id, id
    )
)
WHERE {items}
GROUP BY ods_code, item_id, day
"""
#: Behind it: of some months alone, each counted as elsewhere here (year x 12 + month - 1).
_OF_MONTHS = " HAVING toYear(toDate32(day)) * 12 + toMonth(toDate32(day)) - 1 IN {months:Array(Int32)}"
#: By supplier and month, the readings that stand with a quantity.  An identity counts where its last revision says.
_REPORTED = """
SELECT toString(supplier_id), toYYYYMM(day), count(), sum(toInt256(quantity_micros))
FROM (
    SELECT supplier_id, argMax(content, revision) AS last, last.1 AS day, last.2 AS quantity_micros
    FROM (
        SELECT ods_code, supplier_id, id, revision,
               argMin((day, quantity_micros),
                      (generation, broker_timestamp_ms, topic, partition, offset, `index`)) AS content
        FROM usage
        WHERE {condition} AND (ods_code, supplier_id, id) IN (
            SELECT ods_code, supplier_id, id FROM usage WHERE toYYYYMM(day) IN {{months:Array(UInt32)}})
        GROUP BY ods_code, supplier_id, id, revision
    )
    GROUP BY ods_code, supplier_id, id
)
WHERE quantity_micros > 0 AND toYYYYMM(day) IN {{months:Array(UInt32)}}
GROUP BY 1, 2
"""
#: `toInt32` of a date counts from 1970-01-01; ordinals count from 0001-01-01.
_EPOCH_ORDINAL = 719163
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: At most so many bytes of values are bound to one parameter.
BOUND_BYTES = 100_000


@dataclass(frozen=True, slots=True)
class SaidChange:
    """A contract or reference change as the ledger keeps it."""

    key: str
    generation: int
    partition: int
    offset: int
    id: str
    kind: str
    accepted: bool
    reason: str
    body: dict[str, Any]
    broker_timestamp_ms: int


_CHANGE_COLUMNS = (
    "generation", "partition", "offset", "id", "kind", "outcome", "reason", "body", "broker_timestamp_ms",
)  # fmt: skip
_TABLES = {
    CONTRACT_CHANGES: ("contract_changes", "order_number"),
    REFERENCE_CHANGES: ("reference_changes", "code"),
}


class Ledger:
    """Reads and writes the tables of `0001_ledger.sql`."""

    def __init__(self, clickhouse: ClickHouse) -> None:
        self._clickhouse = clickhouse

    # --- usage ---

    def insert_usage(self, rows: pa.Table) -> None:
        """Inserts usage rows of `USAGE_SCHEMA`."""
        self._clickhouse.insert_arrow("usage", rows.select(USAGE_SCHEMA.names).cast(USAGE_SCHEMA))

    def has_usage(self) -> bool:
        """Whether there is any usage row."""
        return bool(self._clickhouse.query("SELECT 1 FROM usage LIMIT 1"))

    def known_usage(self, identities: pl.DataFrame, generation: int, accepted_before: int) -> pl.DataFrame:
        """The rows of these identities (practice, supplier, id) accepted before an offset."""
        parts = chunks(identities.select("ods_code", "supplier_id", "id").iter_rows())
        found = pa.concat_tables([self._known_usage(chunk, generation, accepted_before) for chunk in parts])
        return pl.DataFrame(found)

    def _known_usage(self, identities: Sequence[tuple[str, ...]], generation: int, accepted_before: int) -> pa.Table:
        practices, suppliers, ids = zip(*identities, strict=True)
        return self._clickhouse.query_arrow(
            """
            SELECT ods_code, toString(supplier_id) AS supplier_id, id, revision, generation,
                   toString(topic) AS topic, partition, offset, `index`, broker_timestamp_ms,
                   toString(item_id) AS item_id, quantity_micros, occurred_at, day
            FROM usage
            WHERE ods_code IN {practices:Array(String)}
              AND (ods_code, supplier_id, id) IN (
                SELECT arrayJoin(arrayZip({practices:Array(String)}, {suppliers:Array(String)}, {ids:Array(String)}))
              )
              AND (generation < {generation:UInt32}
                   OR generation = {generation:UInt32} AND accepted_offset < {before:Int64})
            """,
            {
                "practices": list(practices),
                "suppliers": list(suppliers),
                "ids": list(ids),
                "generation": generation,
                "before": accepted_before,
            },
        )

    def totals_of_practices(
        self, alike: Sequence[str], months: Sequence[int], generation: int, accepted_before: int
    ) -> dict[tuple[str, str, int], int]:
        """Day totals of some months in micros by (practice, item, day), of what was accepted before an offset.

        Of all practices whose codes begin with one of `alike`.
        """
        # Each by itself, for so the index is used; where there are fewer, the last one takes the places left.
        places = "12345678"
        practices = " OR ".join(f"startsWith(ods_code, {{alike:Array(String)}}[{place}])" for place in places)
        condition = f"""({practices})
            AND (generation < {{generation:UInt32}}
                 OR generation = {{generation:UInt32}} AND accepted_offset < {{before:Int64}})"""
        statement = _STANDING_TOTALS.format(condition=condition) + _OF_MONTHS
        totals = {}
        for start in range(0, len(alike), len(places)):
            some = list(alike[start : start + len(places)])
            some += some[-1:] * (len(places) - len(some))
            parameters = {"alike": some, "months": list(months), "generation": generation, "before": accepted_before}
            for ods_code, item_id, day, quantity in self._clickhouse.query(statement, parameters):
                totals[ods_code, item_id, day + _EPOCH_ORDINAL] = quantity
        return totals

    def items(self) -> list[str]:
        """Every item of which usage was reported."""
        return [str(item_id) for (item_id,) in self._clickhouse.query("SELECT DISTINCT toString(item_id) FROM usage")]

    def totals_accepted(
        self, generation: int, positions: Positions, items: Collection[str] | None = None
    ) -> dict[Service, dict[int, int]]:
        """Day totals by (item, practice) and day, at positions in usage-accepted; of some items, or of all."""
        condition = at_cut(f"concat('{USAGE_ACCEPTED}/', toString(accepted_partition))", "accepted_offset")
        parameters = cut_parameters(generation, positions)
        if items is None:
            return self._totals_of_much(condition, parameters)
        found: dict[Service, dict[int, int]] = {}
        for chunk in chunks((each,) for each in items):
            some = parameters | {"items": [each for (each,) in chunk]}
            found |= self._totals_of_much(condition, some, "item_id IN {items:Array(String)}")
        return found

    def totals_at_cut(self, generation: int, cut: Positions) -> dict[Service, dict[int, int]]:
        """Day totals by (item, practice) and day, at a cut of the input topics."""
        return self._totals_of_much(at_cut("concat(topic, '/', toString(partition))"), cut_parameters(generation, cut))

    def _totals_of_much(
        self, condition: str, parameters: Mapping[str, Any], items: str = "1"
    ) -> dict[Service, dict[int, int]]:
        statement = _STANDING_TOTALS_OF_MUCH.format(condition=condition, items=items)
        rows = self._clickhouse.query(statement, parameters)
        return _by_service((code, item, day + _EPOCH_ORDINAL, quantity) for code, item, day, quantity in rows)

    def days_said(self, services: Collection[Service], first: int, end: int) -> list[tuple[str, str, int]]:
        """Every (practice, item, day) in `[first, end)` of which anything was ever said, whether it stands or not."""
        found = []
        for chunk in chunks(sorted(services)):
            items, practices = zip(*chunk, strict=True)
            found += self._clickhouse.query(
                """
                SELECT DISTINCT ods_code, toString(item_id), toInt32(day) AS number FROM usage
                WHERE ods_code IN {practices:Array(String)} AND number >= {first:Int32} AND number < {end:Int32}
                  AND (item_id, ods_code) IN (
                    SELECT arrayJoin(arrayZip({items:Array(String)}, {practices:Array(String)})))
                """,
                {
                    "items": list(items),
                    "practices": list(practices),
                    "first": first - _EPOCH_ORDINAL,
                    "end": end - _EPOCH_ORDINAL,
                },
            )
        return [(ods_code, item_id, day + _EPOCH_ORDINAL) for ods_code, item_id, day in found]

    def totals_not_counted(self, ods_code: str = "", item_id: str = "") -> dict[Service, dict[int, int]]:
        """Day totals of the items at practices of which the accruals count less; of one practice or item if named."""
        condition = "({ods_code:String} = '' OR ods_code = {ods_code:String})"
        statement = f"""
            SELECT ods_code, item_id, day, quantity_micros FROM (
                SELECT *, sum(quantity_micros) OVER (PARTITION BY ods_code, item_id) AS whole
                FROM ({_STANDING_TOTALS.format(condition=condition)})
            ) AS used
            LEFT JOIN (
                SELECT ods_code, toString(item_id) AS item_id, sum(toInt256(quantity_micros)) AS counted
                FROM accruals FINAL GROUP BY ods_code, item_id
            ) AS taken USING (ods_code, item_id)
            WHERE whole > counted AND ({{item_id:String}} = '' OR item_id = {{item_id:String}})
            """  # noqa: S608  # two statements of ours
        rows = self._clickhouse.query(statement, {"ods_code": ods_code, "item_id": item_id})
        return _by_service((code, item, day + _EPOCH_ORDINAL, quantity) for code, item, day, quantity in rows)

    def reported_at_cut(self, generation: int, cut: Positions, month: int) -> dict[str, Reported]:
        """What each supplier has reported for a month, at a cut of the input topics."""
        condition = at_cut("concat(topic, '/', toString(partition))")
        return self._reported([month], condition, cut_parameters(generation, cut))[month]

    def reported(self, months: Sequence[int]) -> dict[int, dict[str, Reported]]:
        """What each supplier has reported for months, of all that is here."""
        return self._reported(months, "1", {})

    def _reported(
        self, months: Sequence[int], condition: str, parameters: dict[str, Any]
    ) -> dict[int, dict[str, Reported]]:
        numbers = {month_number(month): month for month in months}
        rows = self._clickhouse.query(_REPORTED.format(condition=condition), parameters | {"months": list(numbers)})
        found: dict[int, dict[str, Reported]] = {month: {} for month in months}
        for supplier_id, number, count, quantity in rows:
            found[numbers[number]][supplier_id] = Reported(count, quantity)
        return found

    def same_usage(self, generation: int, positions: Positions, cut: Positions) -> bool:
        """Whether positions in usage-accepted and a cut of the input topics take in the same usage."""
        accepted = at_cut(f"concat('{USAGE_ACCEPTED}/', toString(accepted_partition))", "accepted_offset")
        said = at_cut("concat(topic, '/', toString(partition))")
        rows = self._clickhouse.query(
            f"SELECT 1 FROM usage WHERE {accepted} != {said} LIMIT 1",  # noqa: S608  # two conditions of ours
            cut_parameters(generation, {**positions, **cut}),
        )
        return not rows

    # --- contract and reference changes ---

    def insert_changes(self, topic: str, changes: Sequence[SaidChange]) -> None:
        """Inserts changes of `contract-changes` or `reference-changes`."""
        table, key = _TABLES[topic]
        rows = [
            (
                change.key,
                change.generation,
                change.partition,
                change.offset,
                change.id,
                change.kind,
                "accepted" if change.accepted else "refused",
                change.reason,
                json.dumps(change.body, separators=(",", ":"), sort_keys=True),
                change.broker_timestamp_ms,
            )
            for change in changes
        ]
        self._clickhouse.insert(table, (key, *_CHANGE_COLUMNS), rows)

    def changes(self, topic: str, generation: int, positions: Positions) -> list[SaidChange]:
        """All changes at these positions, in log order."""
        table, key = _TABLES[topic]
        condition = at_cut(f"concat('{topic}/', toString(partition))")
        rows = self._clickhouse.query(
            f"SELECT {key}, {', '.join(_CHANGE_COLUMNS)} FROM {table} FINAL WHERE {condition}"  # noqa: S608
            " ORDER BY generation, partition, offset",
            cut_parameters(generation, positions),
        )
        # Read together, for then equal names of fields are one text in memory.
        bodies = json.loads(f"[{','.join(row[8] for row in rows)}]")
        return [
            SaidChange(
                row[0],
                row[1],
                row[2],
                row[3],
                row[4],
                row[5],
                row[6] == "accepted",
                row[7],
                body,
                row[9],
            )
            for row, body in zip(rows, bodies, strict=True)
        ]

    def positions_seen(self, generation: int) -> dict[str, int]:
        """One past the last offset of every input partition that the ledger has rows of, in a life of the log."""
        rows = self._clickhouse.query(
            """
            SELECT concat(topic, '/', toString(partition)), max(offset) + 1 FROM usage
            WHERE generation = {generation:UInt32} GROUP BY topic, partition
            UNION ALL SELECT concat('contract-changes/', toString(partition)), max(offset) + 1
            FROM contract_changes WHERE generation = {generation:UInt32} GROUP BY partition
            UNION ALL SELECT concat('reference-changes/', toString(partition)), max(offset) + 1
            FROM reference_changes WHERE generation = {generation:UInt32} GROUP BY partition
            """,
            {"generation": generation},
        )
        return {str(place): int(end) for place, end in rows}

    def positions_accepted(self, generation: int) -> dict[str, int]:
        """One past the last offset of every partition of usage-accepted that the ledger has rows of."""
        rows = self._clickhouse.query(
            "SELECT accepted_partition, max(accepted_offset) + 1 FROM usage"
            " WHERE generation = {generation:UInt32} GROUP BY accepted_partition",
            {"generation": generation},
        )
        return {f"{USAGE_ACCEPTED}/{partition}": int(end) for partition, end in rows}

    # --- what the log and the schemas were ---

    def known_topics(self, generation: int) -> dict[str, str]:
        """The ids of topics as they were first seen in a life of the log."""
        rows = self._clickhouse.query(
            "SELECT topic, any(topic_id) FROM known_topics WHERE generation = {generation:UInt32} GROUP BY topic",
            {"generation": generation},
        )
        return {str(topic): str(number) for topic, number in rows}

    def note_topics(self, generation: int, ids: Mapping[str, str]) -> None:
        """Keeps the ids of topics that are seen for the first time."""
        rows = [(generation, topic, number) for topic, number in ids.items()]
        self._clickhouse.insert("known_topics", ("generation", "topic", "topic_id"), rows)

    def known_schemas(self) -> dict[int, tuple[str, str]]:
        """Every schema that a tribill on this ledger had: its id to its name and digest."""
        rows = self._clickhouse.query("SELECT id, any(name), any(digest) FROM known_schemas GROUP BY id")
        return {int(number): (str(name), str(digest)) for number, name, digest in rows}

    def note_schemas(self, schemas: Mapping[int, tuple[str, str]]) -> None:
        """Keeps the schemas that are new."""
        rows = [(number, name, digest) for number, (name, digest) in schemas.items()]
        self._clickhouse.insert("known_schemas", ("id", "name", "digest"), rows)

    def has_done(self, topic: str, generation: int, partition: int, offset: int) -> bool:
        """Whether a record of changes or of period events has left a trace: a row, or a dead letter."""
        rows = self._clickhouse.query(
            """
            SELECT 1 FROM (
                SELECT 'contract-changes' AS topic, partition FROM contract_changes
                WHERE generation = {generation:UInt32} AND offset = {offset:Int64}
                UNION ALL SELECT 'reference-changes', partition FROM reference_changes
                WHERE generation = {generation:UInt32} AND offset = {offset:Int64}
                UNION ALL SELECT 'period-events', 0 FROM attestations
                WHERE generation = {generation:UInt32} AND offset = {offset:Int64}
                UNION ALL SELECT 'period-events', 0 FROM close_requests
                WHERE generation = {generation:UInt32} AND offset = {offset:Int64}
                UNION ALL SELECT toString(topic), partition FROM dead_letters
                WHERE generation = {generation:UInt32} AND offset = {offset:Int64}
            ) WHERE topic = {topic:String} AND partition = {partition:Int32} LIMIT 1
            """,
            {"topic": topic, "generation": generation, "partition": partition, "offset": offset},
        )
        return bool(rows)

    def has_change(self, topic: str, key: str, change_id: str) -> bool:
        """Whether a change of this id was said of an order or code."""
        table, name = _TABLES[topic]
        rows = self._clickhouse.query(
            f"SELECT 1 FROM {table} WHERE {name} = {{key:String}} AND id = {{id:String}} LIMIT 1",  # noqa: S608
            {"key": key, "id": change_id},
        )
        return bool(rows)

    def has_period(self, period: str) -> bool:
        """Whether a period is closed."""
        rows = self._clickhouse.query(
            "SELECT 1 FROM periods WHERE period = {period:String} LIMIT 1", {"period": period}
        )
        return bool(rows)

    def positions_complete(self, generation: int, partitions: int) -> dict[str, int]:
        """Up to where the ledger certainly has all of every input partition, in a life of the log.

        A partition of usage fans out to all partitions of usage-accepted, each of which goes on by
        itself, so certain is what lies before the last row from it in the one furthest behind.
        """
        rows = self._clickhouse.query(
            """
            SELECT place, if(count() = {partitions:UInt32}, min(end), 0) FROM (
                SELECT concat(topic, '/', toString(partition)) AS place, max(offset) AS end FROM usage
                WHERE generation = {generation:UInt32} GROUP BY place, accepted_partition)
            GROUP BY place
            """,
            {"generation": generation, "partitions": partitions},
        )
        return self.positions_seen(generation) | {str(place): int(end) for place, end in rows}


def month_number(month: int) -> int:
    """A month as `toYYYYMM` gives it."""
    return month // 12 * 100 + month % 12 + 1


def chunks(values: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Values to bind in parts that ClickHouse takes: a field of a form has a limit (by default 128 KiB)."""
    chunk: list[tuple[str, ...]] = []
    size = 0
    for value in values:
        length = max(len(part.encode()) * 2 + 8 for part in value)
        if chunk and size + length > BOUND_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(value)
        size += length
    if chunk:
        yield chunk


def _by_service(rows: Iterable[tuple[str, str, int, int]]) -> dict[Service, dict[int, int]]:
    usage: dict[Service, dict[int, int]] = {}
    for ods_code, item_id, day, quantity in rows:
        usage.setdefault((item_id, ods_code), {})[day] = quantity
    return usage
