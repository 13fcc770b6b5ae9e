"""Accruals, the positions they count, and allocations drawn: rows of which the newest wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

from rating.book import LineKey
from sinks.clickhouse import ClickHouse
from sinks.positions import Positions

#: Enough digits for any sum of money here, with 18 places.
_EXACT = Context(prec=100)

_ACCRUAL_COLUMNS = (
    "order_number", "item_id", "ods_code", "month", "version", "charge_partition", "supplier_id",
    "m2", "one_off", "exact_pence", "charge_pence", "quantity_micros",
    "time_from", "time_to", "time_day_pence", "days", "days_pence",
    "groups", "wanted_party", "wanted_exact_pence",
)  # fmt: skip


def decimal(exact: Fraction) -> Decimal:
    """Exact pence to 18 places, for display and sums in SQL."""
    places, rest = divmod(exact.numerator * 10**18, exact.denominator)
    above = 2 * rest - exact.denominator
    return Decimal(places + (above > 0 or (above == 0 and places % 2))).scaleb(-18, _EXACT)


def fraction_text(exact: Fraction) -> str:
    """Exact pence as text, `123/7` or `123`."""
    return str(exact)


@dataclass(frozen=True, slots=True)
class AccrualRow:
    """A charge line's month as it stands."""

    line: LineKey
    month: int
    supplier_id: str
    m2: date | None
    one_off: bool
    exact: Fraction
    quantity_micros: int
    time: tuple[tuple[date, date, Fraction], ...]
    days: tuple[tuple[date, Fraction], ...]
    groups: str
    wanted: tuple[tuple[str, Fraction], ...]

    def values(self, version: int, partition: int) -> tuple[Any, ...]:
        """The row's columns."""
        return (
            *self.line,
            self.month,
            version,
            partition,
            self.supplier_id,
            self.m2,
            self.one_off,
            fraction_text(self.exact),
            decimal(self.exact),
            self.quantity_micros,
            [first for first, _, _ in self.time],
            [end for _, end, _ in self.time],
            [decimal(each) for _, _, each in self.time],
            [day for day, _ in self.days],
            [decimal(each) for _, each in self.days],
            self.groups,
            [party for party, _ in self.wanted],
            [fraction_text(each) for _, each in self.wanted],
        )


class Accruals:
    """Reads and writes the tables of `0002_accruals.sql`."""

    def __init__(self, clickhouse: ClickHouse) -> None:
        self._clickhouse = clickhouse

    def insert(self, rows: Sequence[AccrualRow], version: int, partition: int) -> None:
        """Inserts rows in blocks that ClickHouse takes at once."""
        for start in range(0, len(rows), 20_000):
            values = [row.values(version, partition) for row in rows[start : start + 20_000]]
            self._clickhouse.insert("accruals", _ACCRUAL_COLUMNS, values)

    def insert_positions(
        self, partition: int, generation: int, offset: int, positions: Positions, horizon: int
    ) -> None:
        """Says what a partition's accruals count as of an offset in charge-inputs, and up to which month."""
        self._clickhouse.insert(
            "accrual_positions",
            ("charge_partition", "generation", "offset", "positions", "horizon"),
            [(partition, generation, offset, dict(positions), horizon)],
        )

    def horizon(self, partition: int) -> int:
        """The month up to which all of a partition's lines have been written ahead; 0 before the first time."""
        rows = self._clickhouse.query(
            "SELECT max(horizon) FROM accrual_positions WHERE charge_partition = {partition:Int32}",
            {"partition": partition},
        )
        return int(rows[0][0])

    def newest_version(self, partition: int) -> int:
        """The highest version of a partition's rows; 0 when there is none."""
        rows = self._clickhouse.query(
            "SELECT max(version) FROM accruals WHERE charge_partition = {partition:Int32}", {"partition": partition}
        )
        return int(rows[0][0])

    def positions(self, partition: int, generation: int, offset: int | None = None) -> dict[str, int]:
        """What the accruals of a partition counted at an offset (None: now); nothing before the first."""
        rows = self._clickhouse.query(
            """
            SELECT positions FROM accrual_positions
            WHERE charge_partition = {partition:Int32} AND generation = {generation:UInt32}
              AND offset <= {offset:Int64}
            ORDER BY offset DESC LIMIT 1
            """,
            {
                "partition": partition,
                "generation": generation,
                "offset": 2**62 if offset is None else offset,
            },
        )
        return dict(rows[0][0]) if rows else {}

    def written(self, partition: int) -> list[tuple[LineKey, int, list[str]]]:
        """Every (line, month) of a partition that has a row, with the parties it wants of."""
        rows = self._clickhouse.query(
            """
            SELECT order_number, toString(item_id), ods_code, month, argMax(wanted_party, version)
            FROM accruals WHERE charge_partition = {partition:Int32}
            GROUP BY order_number, item_id, ods_code, month
            """,
            {"partition": partition},
        )
        return [((order, item, ods), month, list(parties)) for order, item, ods, month, parties in rows]

    def exact_up_to(self, month: int) -> dict[tuple[LineKey, int], Fraction]:
        """The exact pence of every line's month up to one, zeros left out."""
        rows = self._clickhouse.query(
            """
            SELECT order_number, toString(item_id), ods_code, month, argMax(exact_pence, version) AS exact
            FROM accruals WHERE month <= {month:Int32}
            GROUP BY order_number, item_id, ods_code, month HAVING exact != '0'
            """,
            {"month": month},
        )
        return {((order, item, ods), each): Fraction(exact) for order, item, ods, each, exact in rows}

    def wanted(self) -> list[tuple[LineKey, int, int, list[str], list[str]]]:
        """What every line's month would draw: (line, month, version, parties, exact pence as text)."""
        rows = self._clickhouse.query(
            """
            SELECT order_number, toString(item_id), ods_code, month, max(accruals.version),
                   argMax(wanted_party, accruals.version) AS parties,
                   argMax(wanted_exact_pence, accruals.version)
            FROM accruals GROUP BY order_number, item_id, ods_code, month HAVING notEmpty(parties)
            """
        )
        return [((order, item, ods), month, version, p, e) for order, item, ods, month, version, p, e in rows]

    def insert_drawn(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Inserts (party, month, version, allocation, Drawn) rows."""
        self._clickhouse.insert(
            "allocations_drawn",
            (
                "ordering_party", "month", "version", "allocation_pence", "wanted_pence",
                "coverage", "coverage_decimal", "left_pence",
            ),
            [
                (
                    party, month, version, decimal(allocation), decimal(drawn.wanted),
                    fraction_text(drawn.coverage), decimal(drawn.coverage), decimal(drawn.left),
                )
                for party, month, version, allocation, drawn in rows
            ],
        )  # fmt: skip


def group_json(group: Any) -> Mapping[str, Any]:
    """A funding group as the accrual row carries it."""
    return {
        "party": group.party,
        "charge": str(group.charge),
        "taken": [[payer, str(amount)] for payer, amount in group.taken],
        "allocation": group.allocation_payer,
        "wanted": str(group.wanted),
        "after": [[payer, str(limit)] for payer, limit in group.after],
        "rest": group.rest_payer,
    }
