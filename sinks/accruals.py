"""Accruals, the positions they count, and allocations drawn: rows of which the newest wins."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Context, Decimal
from fractions import Fraction
from itertools import accumulate
from typing import Any

import pyarrow as pa

from rating.book import LineKey
from sinks.clickhouse import ClickHouse
from sinks.positions import Positions, version

#: Enough digits for any sum of money here, with 18 places.
_EXACT = Context(prec=100)
_MONEY = pa.decimal256(76, 18)


def decimal(exact: Fraction) -> Decimal:
    """Exact pence to 18 places, for display and sums in SQL."""
    return Decimal(_places(exact)).scaleb(-18, _EXACT)


def _places(exact: Fraction) -> int:
    """Exact pence in units of the eighteenth place, halves to even."""
    places, rest = divmod(exact.numerator * 10**18, exact.denominator)
    above = 2 * rest - exact.denominator
    return places + (above > 0 or (above == 0 and places % 2))


def _money(values: Iterable[Fraction]) -> pa.Array:
    """A column of exact pence to 18 places; Arrow keeps such decimals as integers of 32 bytes."""
    data = [_places(each).to_bytes(32, "little", signed=True) for each in values]
    return pa.Array.from_buffers(_MONEY, len(data), [None, pa.py_buffer(b"".join(data))])


def _lists(rows: Iterable[Sequence[Any]], values: pa.Array) -> pa.Array:
    """A column of lists, as long as those of `rows`, of values in order."""
    return pa.ListArray.from_arrays(pa.array([0, *accumulate(map(len, rows))], pa.int32()), values)


def fraction_text(exact: Fraction) -> str:
    """Exact pence as text, `123/7` or `123`."""
    return str(exact)


@dataclass(slots=True, unsafe_hash=True)
class AccrualRow:
    """A charge line's month as it stands, money in exact pence; not changed once made."""

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


@dataclass(frozen=True, slots=True)
class KeptAccrual:
    """What of a row in `accruals` is compared with the ledger; `days` with pence to 18 places."""

    line: LineKey
    month: int
    version: int
    exact: Fraction
    quantity_micros: int
    days: tuple[tuple[date, Decimal], ...]


def _table(rows: Sequence[AccrualRow], version: int, partition: int) -> pa.Table:
    """Rows as the columns of the table `accruals`."""
    size = len(rows)
    times = [each for row in rows for each in row.time]
    days = [each for row in rows for each in row.days]
    wanted = [each for row in rows for each in row.wanted]
    time_of, days_of, wanted_of = [r.time for r in rows], [r.days for r in rows], [r.wanted for r in rows]
    return pa.table(
        {
            "order_number": [row.line[0] for row in rows],
            "item_id": [row.line[1] for row in rows],
            "ods_code": [row.line[2] for row in rows],
            "month": pa.array([row.month for row in rows], pa.int32()),
            "version": pa.array([version] * size, pa.uint64()),
            "charge_partition": pa.array([partition] * size, pa.int32()),
            "supplier_id": [row.supplier_id for row in rows],
            "m2": pa.array([row.m2 for row in rows], pa.date32()),
            "one_off": pa.array([row.one_off for row in rows], pa.bool_()),
            "exact_pence": [fraction_text(row.exact) for row in rows],
            "charge_pence": _money(row.exact for row in rows),
            "quantity_micros": pa.array([row.quantity_micros for row in rows], pa.decimal128(38, 0)),
            "time_from": _lists(time_of, pa.array([first for first, _, _ in times], pa.date32())),
            "time_to": _lists(time_of, pa.array([end for _, end, _ in times], pa.date32())),
            "time_day_pence": _lists(time_of, _money(each for _, _, each in times)),
            "days": _lists(days_of, pa.array([day for day, _ in days], pa.date32())),
            "days_pence": _lists(days_of, _money(each for _, each in days)),
            "groups": [row.groups for row in rows],
            "wanted_party": _lists(wanted_of, pa.array([party for party, _ in wanted], pa.string())),
            "wanted_exact_pence": _lists(wanted_of, pa.array([fraction_text(each) for _, each in wanted], pa.string())),
        }
    )


class Accruals:
    """Reads and writes the tables of `0002_accruals.sql`, and `charge_epochs`."""

    def __init__(self, clickhouse: ClickHouse) -> None:
        self._clickhouse = clickhouse

    def insert(self, rows: Sequence[AccrualRow], version: int, partition: int) -> None:
        """Inserts rows in blocks that ClickHouse takes at once."""
        for start in range(0, len(rows), 20_000):
            self._clickhouse.insert_arrow("accruals", _table(rows[start : start + 20_000], version, partition))

    def begin(self, partition: int, generation: int) -> int:
        """Takes a partition over: a new epoch, above all others.  Who holds an older one writes no more."""
        epoch = (self._newest_epoch(partition) >> 32) + 1 << 32 | secrets.randbits(32)
        self._insert_epoch(partition, epoch, generation, -1, -1, 0)
        return epoch

    def announce(self, partition: int, epoch: int, generation: int, first: int, end: int, horizon: int) -> bool:
        """Says of which batch rows are going to be written, and up to which month.

        False when a newer epoch has begun: they must not be.
        """
        self._insert_epoch(partition, epoch, generation, first, end, horizon)
        return self.holds(partition, epoch)

    def holds(self, partition: int, epoch: int) -> bool:
        """Whether no newer epoch has begun."""
        return self._newest_epoch(partition) == epoch

    def left_by_others(self, partition: int, epoch: int, generation: int, first: int) -> tuple[int, list[int]]:
        """Where an epoch that has just begun goes on, and the ends at which those before it may yet write rows.

        That is `first`, or behind it the last offset up to which all is done and nobody began before it since.
        """
        others = self._clickhouse.query(
            """
            SELECT epoch, max(end_offset), argMax(first_offset, end_offset) FROM charge_epochs
            WHERE charge_partition = {partition:Int32} AND epoch < {epoch:UInt64}
              AND generation = {generation:UInt32} AND end_offset >= {first:Int64}
            GROUP BY epoch
            """,
            {"partition": partition, "epoch": epoch, "generation": generation, "first": first},
        )
        done = self._clickhouse.query(
            """
            SELECT max(offset) FROM accrual_positions
            WHERE charge_partition = {partition:Int32} AND generation = {generation:UInt32}
              AND offset > {first:Int64} AND epoch > 0
              AND NOT arrayExists((other, began) -> other > epoch AND began < offset,
                                  {epochs:Array(UInt64)}, {begins:Array(Int64)})
            """,
            {
                "partition": partition,
                "generation": generation,
                "first": first,
                # Empty arrays have no type to infer from, so there is always one that takes nothing away.
                "epochs": [0, *(int(other) for other, _, _ in others)],
                "begins": [0, *(int(began) for _, _, began in others)],
            },
        )
        first = max(first, int(done[0][0]))
        return first, sorted({int(end) for _, end, _ in others if end > first})

    def _newest_epoch(self, partition: int) -> int:
        rows = self._clickhouse.query(
            "SELECT max(epoch) FROM charge_epochs WHERE charge_partition = {partition:Int32}", {"partition": partition}
        )
        return int(rows[0][0])

    def _insert_epoch(self, *row: int) -> None:
        columns = ("charge_partition", "epoch", "generation", "first_offset", "end_offset", "horizon")
        self._clickhouse.insert("charge_epochs", columns, [row])

    def insert_positions(
        self, partition: int, generation: int, offset: int, positions: Positions, horizon: int, epoch: int
    ) -> None:
        """Says what a partition's accruals count as of an offset in charge-inputs, and up to which month."""
        self._clickhouse.insert(
            "accrual_positions",
            ("charge_partition", "generation", "offset", "positions", "horizon", "epoch"),
            [(partition, generation, offset, dict(positions), horizon, epoch)],
        )

    def horizon(self, partition: int, generation: int, offset: int = 2**62) -> int:
        """The month up to which all lines of a partition were written ahead at an offset; 0 before the first time."""
        rows = self._clickhouse.query(
            """
            SELECT argMax(horizon, (generation, offset, horizon)) FROM accrual_positions
            WHERE charge_partition = {partition:Int32}
              AND (generation, offset) <= ({generation:UInt32}, {offset:Int64})
            """,
            {"partition": partition, "generation": generation, "offset": offset},
        )
        return int(rows[0][0])

    def announced(self, partition: int) -> int:
        """The month up to which anybody may have written rows of a partition; 0 before the first."""
        rows = self._clickhouse.query(
            """
            SELECT greatest(
                (SELECT max(horizon) FROM charge_epochs WHERE charge_partition = {partition:Int32}),
                (SELECT max(horizon) FROM accrual_positions WHERE charge_partition = {partition:Int32}))
            """,
            {"partition": partition},
        )
        return int(rows[0][0])

    def now(self) -> datetime:
        """What the ledger's clock says."""
        return datetime.fromtimestamp(self._clickhouse.query("SELECT toUnixTimestamp(now())", {})[0][0], UTC)

    def positions(self, partition: int, generation: int, offset: int | None = None) -> dict[str, int]:
        """What the accruals of a partition counted at an offset (None: now); nothing before the first."""
        return self.counted(partition, generation, offset)[1]

    def counted(self, partition: int, generation: int, offset: int | None = None) -> tuple[int, dict[str, int]]:
        """Up to which version the rows of a partition are complete at an offset (None: now), and what they count."""
        rows = self._clickhouse.query(
            """
            SELECT offset, positions FROM accrual_positions
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
        return (version(generation, rows[0][0]), dict(rows[0][1])) if rows else (version(generation, 0), {})

    def newest(self, partition: int, generation: int) -> tuple[int, int] | None:
        """The newest offset at which a partition said what it counts, and its horizon; None before the first."""
        rows = self._clickhouse.query(
            """
            SELECT max(offset), argMax(horizon, (offset, horizon)), count() FROM accrual_positions FINAL
            WHERE charge_partition = {partition:Int32} AND generation = {generation:UInt32}
            """,
            {"partition": partition, "generation": generation},
        )
        return (int(rows[0][0]), int(rows[0][1])) if rows[0][2] else None

    def kept(self, partition: int, orders: Sequence[str]) -> Iterator[KeptAccrual]:
        """The rows of a partition's lines of these orders, as they stand."""
        rows = self._clickhouse.query(
            """
            SELECT order_number, toString(item_id), ods_code, month, version, exact_pence, quantity_micros,
                   days, days_pence
            FROM accruals FINAL
            WHERE order_number IN {orders:Array(String)} AND charge_partition = {partition:Int32}
            """,
            {"orders": list(orders), "partition": partition},
        )
        for order, item, ods, month, at, exact, quantity, days, pence in rows:
            by_day = tuple(zip(days, pence, strict=True))
            yield KeptAccrual((order, item, ods), month, at, Fraction(exact), int(quantity), by_day)

    def state_of(self, partition: int) -> tuple[int, ...]:
        """What changes whenever a row of a partition does."""
        rows = self._clickhouse.query(
            "SELECT count(), sum(version) FROM accruals WHERE charge_partition = {partition:Int32}",
            {"partition": partition},
        )
        return int(rows[0][0]), int(rows[0][1])

    def insert_reconciliation(
        self, partition: int, generation: int, offset: int, compared: int, drifting: int, pence: Decimal, micros: int
    ) -> None:
        """Says what comparing a partition's accruals with the ledger found."""
        self._clickhouse.insert(
            "reconciliations",
            ("charge_partition", "generation", "offset", "compared", "drifting", "drift_pence", "drift_micros"),
            [(partition, generation, offset, compared, drifting, pence, micros)],
        )

    def orders(self, partition: int) -> set[str]:
        """Every order that a partition has a row of."""
        rows = self._clickhouse.query(
            "SELECT DISTINCT order_number FROM accruals WHERE charge_partition = {partition:Int32}",
            {"partition": partition},
        )
        return {str(order) for (order,) in rows}

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

    def exact_rows(self, month: int) -> Iterator[tuple[LineKey, list[tuple[int, str, int]]]]:
        """Every line's months up to one in order, each with its exact pence as text and the version of the row."""
        rows = self._clickhouse.stream(
            """
            SELECT order_number, toString(item_id), ods_code, groupArray(month), groupArray(exact), groupArray(at)
            FROM (
                SELECT order_number, item_id, ods_code, month,
                       argMax(exact_pence, accruals.version) AS exact, max(accruals.version) AS at
                FROM accruals WHERE month <= {month:Int32}
                GROUP BY order_number, item_id, ods_code, month
            )
            GROUP BY order_number, item_id, ods_code
            SETTINGS max_block_size = 4096
            """,
            {"month": month},
        )
        # A row is a line with all its months, so blocks are small ones.
        for order, item, ods, *months in rows:
            yield (order, item, ods), sorted(zip(*months, strict=True))

    def items(self) -> set[str]:
        """Every item that has a row."""
        return {item for (item,) in self._clickhouse.query("SELECT DISTINCT toString(item_id) FROM accruals")}

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
