"""What the live page and the national gauges ask of the ledger, one method a question; it only reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from sinks.clickhouse import ClickHouse
from sinks.positions import Positions, at_cut, cut_parameters

#: A statement that takes longer than this is given up: the page must never be what loads the ledger.
_LIMIT = " SETTINGS max_execution_time = 20"

#: The order of an identity's readings in which the first stands, as the usage agent has it: the highest
#: revision, of it the first by generation, broker timestamp, topic, partition, offset and index.  Packed
#: into one number it costs a third of the same as a tuple.  A supplier's readings come by `usage` or by
#: its own topic; offsets have 48 bits in the versions of rows too.
_PRECEDENCE = """
    bitShiftLeft(toUInt256(toInt256(9223372036854775807) - revision), 169)
    + bitShiftLeft(toUInt256(generation), 137)
    + bitShiftLeft(toUInt256(broker_timestamp_ms), 89)
    + bitShiftLeft(toUInt256(topic != 'usage'), 88)
    + bitShiftLeft(toUInt256(partition), 72)
    + bitShiftLeft(toUInt256(offset), 24)
    + `index`
"""
#: What stands of usage, by item and practice.
_STANDING = f"""
SELECT item, practice, sum(toInt256(quantity)) AS units
FROM (
    SELECT any(ods_code) AS practice, argMin(item_id, {_PRECEDENCE}) AS item,
           argMin(quantity_micros, {_PRECEDENCE}) AS quantity
    FROM usage
    -- A short key of fixed length is grouped by much faster than three texts.
    GROUP BY sipHash128(ods_code, supplier_id, id)
)
GROUP BY item, practice
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Tokens:
    """What changes when rows come; while one stays the same, what was asked of its tables is still so."""

    usage: tuple[int, ...]
    accruals: tuple[int, ...]
    dead_letters: tuple[int, ...]
    periods: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Amount:
    """A supplier's or payer's part of a month: at the instant asked for, its rate then, and the whole month."""

    id: str
    accrued_pence: Decimal
    pence_per_second: Decimal
    month_pence: Decimal


@dataclass(frozen=True, slots=True)
class Allocation:
    """An ordering party's allocation of a financial year after a month."""

    party: str
    allocation_pence: Decimal
    left_pence: Decimal
    wanted_pence: Decimal
    coverage: Decimal


@dataclass(frozen=True, slots=True)
class Suspense:
    """Usage that no line takes: services (item, practice), quantity, and the largest."""

    services: int
    quantity_micros: int
    largest: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter without its bytes."""

    agent: str
    topic: str
    partition: int
    offset: int
    reason: str
    field: str
    written_at: datetime


@dataclass(frozen=True, slots=True)
class Period:
    """A closed period."""

    month: int
    documents: int
    net_pence: int
    held_pence: int
    drift_pence: Decimal
    closed_at: datetime


class Queries:
    """The questions; used by one thread at a time, as its client."""

    def __init__(self, clickhouse: ClickHouse) -> None:
        self._clickhouse = clickhouse

    def _rows(self, statement: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        return self._clickhouse.query(statement + _LIMIT, parameters)

    def ping(self) -> None:
        """Returns when the ledger answers."""
        self._rows("SELECT 1")

    def latest_usage(self) -> datetime | None:
        """The latest instant of usage in the ledger."""
        count, latest = self._rows("SELECT count(), max(occurred_at) FROM usage")[0]
        return latest.replace(tzinfo=UTC) if count else None

    def tokens(self) -> Tokens:
        """See Tokens.  Counts alone would do but for a row that replaces one just merged away."""
        row = self._rows(
            """
            SELECT (SELECT count() FROM usage),
                   (SELECT (count(), sum(version)) FROM accruals),
                   (SELECT (count(), sum(version)) FROM allocations_drawn),
                   (SELECT count() FROM dead_letters),
                   (SELECT count() FROM periods)
            """
        )[0]
        return Tokens((row[0],), (*row[1], *row[2]), (row[3],), (row[4],))

    # --- months ---

    def months(self) -> list[int]:
        """The months that have accruals."""
        return [int(month) for (month,) in self._rows("SELECT DISTINCT month FROM accruals ORDER BY month")]

    def newest_usage(self, before: date) -> date | None:
        """The latest London day before a day that has usage."""
        rows = self._rows(
            "SELECT count(), max(day) FROM usage WHERE day < {before:Date32}", {"before": before.isoformat()}
        )
        return rows[0][1] if rows[0][0] else None

    # --- money ---

    def by_supplier(self, month: int, at_ms: int) -> list[Amount]:
        """What has accrued by supplier, the largest first."""
        return self._amounts("supplier_id", "charge_pence", "accruals_live", month, at_ms)

    def by_payer(self, month: int, at_ms: int) -> list[Amount]:
        """What has accrued by payer, the largest first."""
        return self._amounts("payer", "share_pence", "shares_live", month, at_ms)

    def _amounts(self, key: str, whole: str, view: str, month: int, at_ms: int) -> list[Amount]:
        # The names are ours; what comes from outside is bound.
        rows = self._rows(
            f"""
            SELECT toString({key}) AS id, sum(accrued_pence) AS accrued, sum(pence_per_second), sum({whole}) AS whole
            FROM {view}(month = {{month:Int32}}, at_ms = {{at_ms:Int64}})
            GROUP BY id HAVING accrued != 0 OR whole != 0
            ORDER BY accrued DESC, whole DESC, id
            """,  # noqa: S608
            {"month": month, "at_ms": at_ms},
        )
        return [Amount(*row) for row in rows]

    def accrued_by_month(self, first: int, last: int) -> dict[int, Decimal]:
        """The whole charge of months, in pence."""
        rows = self._rows(
            """
            SELECT month, sum(charge_pence) FROM accruals FINAL
            PREWHERE month BETWEEN {first:Int32} AND {last:Int32} GROUP BY month
            """,
            {"first": first, "last": last},
        )
        return {int(month): pence for month, pence in rows}

    def allocations(self, month: int) -> list[Allocation]:
        """Allocations as they are left after a month, the least left first."""
        rows = self._rows(
            """
            SELECT ordering_party, allocation_pence, left_pence, wanted_pence, coverage_decimal
            FROM allocations_drawn FINAL PREWHERE month = {month:Int32}
            WHERE allocation_pence != 0 OR wanted_pence != 0
            ORDER BY if(allocation_pence = 0, 0, left_pence / allocation_pence), wanted_pence DESC, ordering_party
            """,
            {"month": month},
        )
        return [Allocation(*row) for row in rows]

    # --- usage ---

    def usage_rows(self) -> int:
        """How many readings the ledger has kept."""
        return int(self._rows("SELECT count() FROM usage")[0][0])

    def records_kept(self, generation: int, ends: Positions) -> int:
        """How many records of the usage topics before these offsets brought a reading or a dead letter."""
        condition = at_cut("concat(topic, '/', toString(partition))")
        rows = self._rows(
            f"""
            SELECT uniqExact(topic, partition, offset) FROM (
                SELECT topic, partition, offset FROM usage
                WHERE generation = {{generation:UInt32}} AND {condition}
                UNION ALL
                SELECT topic, partition, offset FROM dead_letters
                WHERE generation = {{generation:UInt32}} AND {condition}
            )
            """,  # noqa: S608
            cut_parameters(generation, ends),
        )
        return int(rows[0][0])

    def suspense(self, largest: int) -> Suspense:
        """Usage less what the accruals count, by item and practice, where there is more of it."""
        rows = self._rows(
            f"""
            SELECT toString(item), practice, sum(units) AS waiting,
                   count() OVER (), sum(waiting) OVER ()
            FROM (
                {_STANDING}
                UNION ALL
                SELECT item_id AS item, ods_code AS practice, -sum(toInt256(quantity_micros)) AS units
                FROM accruals FINAL
                -- By a key column, so before the newest is picked; few items are on demand.
                PREWHERE item_id IN (SELECT DISTINCT item_id FROM usage)
                GROUP BY item_id, ods_code
            )
            GROUP BY item, practice HAVING waiting > 0
            ORDER BY waiting DESC, item, practice LIMIT {{largest:UInt32}}
            """,  # noqa: S608
            {"largest": largest},
        )
        if not rows:
            return Suspense(0, 0, ())
        return Suspense(int(rows[0][3]), int(rows[0][4]), tuple((row[0], row[1], int(row[2])) for row in rows))

    def dead_letters(self) -> dict[str, int]:
        """Dead letters by the agent that wrote them."""
        rows = self._rows("SELECT toString(agent), count() FROM dead_letters FINAL GROUP BY agent ORDER BY agent")
        return {agent: int(count) for agent, count in rows}

    def last_letters(self, count: int) -> Sequence[Letter]:
        """The last dead letters, without their bytes: those may say more than everyone may read."""
        rows = self._rows(
            """
            SELECT toString(agent), toString(topic), partition, offset, leftUTF8(reason, 300), field, written_at
            FROM dead_letters FINAL ORDER BY written_at DESC, topic, partition, offset DESC LIMIT {count:UInt32}
            """,
            {"count": count},
        )
        return [Letter(*row) for row in rows]

    # --- closes ---

    def periods(self) -> list[Period]:
        """The closed periods, the last first."""
        rows = self._rows(
            "SELECT month, documents, net_pence, held_pence, drift_pence, closed_at FROM periods FINAL"
            " ORDER BY month DESC"
        )
        return [Period(*row) for row in rows]
