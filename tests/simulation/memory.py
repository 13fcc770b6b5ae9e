"""ClickHouse, Redis and what agents ask of them, in memory: small models of `sinks`, for the simulation alone.

Each model answers what the class of the same methods in `sinks` would.  `test_stand_ins.py` asks both at once,
through whole histories, and compares every answer: what lies here fails there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import polars as pl
import pyarrow as pa

from rating.amounts import GRAINS, Exact, pence, whole
from rating.book import LineKey
from rating.calendar import month_of, parse_month
from rating.close import Amounts, by_line
from rating.completeness import Reported
from rating.evidence import Readings
from rating.parties import Parties
from sinks.accruals import AccrualRow, KeptAccrual, decimal, fraction_text
from sinks.documents import Cut, Decision, Request
from sinks.ledger import USAGE_SCHEMA, SaidChange
from sinks.positions import place_text, version
from streams.topics import USAGE_ACCEPTED

Row = dict[str, Any]
_EPOCH_ORDINAL = 719163
_TYPES = pl.DataFrame(USAGE_SCHEMA.empty_table()).schema
_KNOWN = [name for name in USAGE_SCHEMA.names if not name.startswith("accepted_")]


def _position(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("generation", "broker_timestamp_ms", "topic", "partition", "offset", "index"))


def _counts(row: Row, generation: int, positions: Mapping[str, int], place: str, offset: int) -> bool:
    """As `sinks.positions.at_cut`."""
    older: bool = row["generation"] < generation
    return older or (row["generation"] == generation and offset < positions.get(place, 0))


def _said(row: Row) -> str:
    return place_text(row["topic"], row["partition"])


def _accepted(row: Row) -> str:
    return place_text(USAGE_ACCEPTED, row["accepted_partition"])


def standing(rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    """By identity what stands: of a revision the first by position, of an identity the highest revision."""
    firsts: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["ods_code"], row["supplier_id"], row["id"], row["revision"])
        if key not in firsts or _position(row) < _position(firsts[key]):
            firsts[key] = row
    return {key[:3]: firsts[key] for key in sorted(firsts)}  # type: ignore[misc]


class MemoryLedger:
    """As `sinks.ledger.Ledger`."""

    def __init__(self) -> None:
        self.usage: list[Row] = []
        self.said: dict[str, dict[tuple[str, int, int, int], SaidChange]] = {}

    def insert_usage(self, rows: pa.Table) -> None:
        self.usage += rows.select(USAGE_SCHEMA.names).to_pylist()

    def has_usage(self) -> bool:
        return bool(self.usage)

    def known_usage(self, identities: pl.DataFrame, generation: int, accepted_before: int) -> pl.DataFrame:
        wanted = set(identities.select("ods_code", "supplier_id", "id").iter_rows())
        rows = [
            {name: row[name] for name in _KNOWN}
            for row in self._before(generation, accepted_before)
            if (row["ods_code"], row["supplier_id"], row["id"]) in wanted
        ]
        return pl.DataFrame(rows, schema={name: _TYPES[name] for name in _KNOWN})

    def totals_of_practices(
        self, alike: Sequence[str], months: Sequence[int], generation: int, accepted_before: int
    ) -> dict[tuple[str, str, int], int]:
        rows = [row for row in self._before(generation, accepted_before) if row["ods_code"].startswith(tuple(alike))]
        return {key: total for key, total in _totals(rows).items() if month_of(key[2]) in months}

    def items(self) -> list[str]:
        return sorted({row["item_id"] for row in self.usage})

    def totals_accepted(
        self, generation: int, positions: Mapping[str, int], items: Iterable[str] | None = None
    ) -> dict[Any, dict[int, int]]:
        totals = _by_service(
            row for row in self.usage if _counts(row, generation, positions, _accepted(row), row["accepted_offset"])
        )
        return totals if items is None else {service: days for service, days in totals.items() if service[0] in items}

    def totals_at_cut(self, generation: int, cut: Mapping[str, int]) -> dict[Any, dict[int, int]]:
        return _by_service(self.at_cut(generation, cut))

    def reported_at_cut(self, generation: int, cut: Mapping[str, int], month: int) -> dict[str, Reported]:
        found: dict[str, Reported] = {}
        for (_, supplier_id, _), row in standing(self.at_cut(generation, cut)).items():
            if row["quantity_micros"] and month_of(row["day"].toordinal()) == month:
                readings, quantity = found.get(supplier_id, Reported())
                found[supplier_id] = Reported(readings + 1, quantity + row["quantity_micros"])
        return found

    def days_said(self, services: Iterable[Any], first: int, end: int) -> list[tuple[str, str, int]]:
        wanted = set(services)
        days = {(row["ods_code"], row["item_id"], row["day"].toordinal()) for row in self.usage}
        return sorted(day for day in days if (day[1], day[0]) in wanted and first <= day[2] < end)

    def same_usage(self, generation: int, positions: Mapping[str, int], cut: Mapping[str, int]) -> bool:
        return all(
            _counts(row, generation, positions, _accepted(row), row["accepted_offset"])
            == _counts(row, generation, cut, _said(row), row["offset"])
            for row in self.usage
        )

    def insert_changes(self, topic: str, changes: Sequence[SaidChange]) -> None:
        said = self.said.setdefault(topic, {})
        for change in changes:
            key = (change.key, change.generation, change.partition, change.offset)
            assert said.setdefault(key, change) == change, f"decided twice, and differently: {change} {said[key]}"

    def changes(self, topic: str, generation: int, positions: Mapping[str, int]) -> list[SaidChange]:
        found = [
            change
            for change in self.said.get(topic, {}).values()
            if change.generation < generation
            or (
                change.generation == generation
                and change.offset < positions.get(place_text(topic, change.partition), 0)
            )
        ]
        return sorted(found, key=lambda change: (change.generation, change.partition, change.offset))

    def positions_seen(self, generation: int) -> dict[str, int]:
        ends: dict[str, int] = {}
        rows = [(_said(row), row["generation"], row["offset"]) for row in self.usage]
        for topic, said in self.said.items():
            rows += [(place_text(topic, each.partition), each.generation, each.offset) for each in said.values()]
        for place, of, offset in rows:
            if of == generation:
                ends[place] = max(ends.get(place, 0), offset + 1)
        return ends

    def _before(self, generation: int, accepted_before: int) -> Iterator[Row]:
        for row in self.usage:
            if (row["generation"], row["accepted_offset"]) < (generation, accepted_before):
                yield row

    def at_cut(self, generation: int, cut: Mapping[str, int]) -> Iterator[Row]:
        return (row for row in self.usage if _counts(row, generation, cut, _said(row), row["offset"]))


def _totals(rows: Iterable[Row]) -> dict[tuple[str, str, int], int]:
    totals: dict[tuple[str, str, int], int] = {}
    for (ods_code, _, _), row in standing(rows).items():
        key = (ods_code, row["item_id"], row["day"].toordinal())
        totals[key] = totals.get(key, 0) + row["quantity_micros"]
    return totals


def _by_service(rows: Iterable[Row]) -> dict[Any, dict[int, int]]:
    usage: dict[Any, dict[int, int]] = {}
    for (ods_code, item_id, day), quantity in _totals(rows).items():
        usage.setdefault((item_id, ods_code), {})[day] = quantity
    return usage


LineMonth = tuple[LineKey, int]


class MemoryAccruals:
    """As `sinks.accruals.Accruals`."""

    def __init__(self) -> None:
        #: By line's month what was ever written: version, partition and row.
        self.rows: dict[LineMonth, list[tuple[int, int, AccrualRow]]] = {}
        self.said: dict[tuple[int, int, int], tuple[dict[str, int], int]] = {}
        self.drawn: dict[tuple[str, int], list[tuple[int, Fraction, Any]]] = {}
        #: What each epoch of a partition announced: generation, first and end offset; and where it said positions.
        self.epochs: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        self.horizons: dict[int, int] = {}
        self.ended: set[tuple[int, int, int, int]] = set()

    def insert(self, rows: Sequence[AccrualRow], at: int, partition: int) -> None:
        for row in rows:
            self.rows.setdefault((row.line, row.month), []).append((at, partition, row))

    def _newest_epoch(self, partition: int) -> int:
        return max((epoch for of, epoch in self.epochs if of == partition), default=0)

    def _insert_epoch(self, partition: int, epoch: int, generation: int, first: int, end: int, horizon: int) -> None:
        self.epochs.setdefault((partition, epoch), []).append((generation, first, end))
        self.horizons[partition] = max(horizon, self.horizons.get(partition, 0))

    def left_by_others(self, partition: int, epoch: int, generation: int, first: int) -> tuple[int, list[int]]:
        others = []
        for (of, other), said in self.epochs.items():
            ours = [(end, began) for life, began, end in said if life == generation and end >= first]
            if of == partition and other < epoch and ours:
                others.append((other, *max(ours)))
        done = [
            offset
            for of, life, offset, by in self.ended
            if (of, life) == (partition, generation) and offset > first and by > 0
            if not any(other > by and began < offset for other, _, began in others)
        ]
        first = max([first, *done])
        return first, sorted({end for _, end, _ in others if end > first})

    def insert_positions(
        self, partition: int, generation: int, offset: int, positions: Mapping[str, int], horizon: int, epoch: int = 0
    ) -> None:
        _, before = self.said.get((partition, generation, offset), ({}, 0))
        self.said[partition, generation, offset] = (dict(positions), max(horizon, before))
        self.ended.add((partition, generation, offset, epoch))

    def horizon(self, partition: int, generation: int, offset: int = 2**62) -> int:
        said = [(life, at, horizon) for (of, life, at), (_, horizon) in self.said.items() if of == partition]
        return max((each for each in said if each[:2] <= (generation, offset)), default=(0, 0, 0))[2]

    def announced(self, partition: int) -> int:
        said = (horizon for (of, _, _), (_, horizon) in self.said.items() if of == partition)
        return max(self.horizons.get(partition, 0), *said, 0)

    def newest_version(self, partition: int) -> int:
        return max((at for said in self.rows.values() for at, of, _ in said if of == partition), default=0)

    def positions(self, partition: int, generation: int, offset: int | None = None) -> dict[str, int]:
        return self.counted(partition, generation, offset)[1]

    def counted(self, partition: int, generation: int, offset: int | None = None) -> tuple[int, dict[str, int]]:
        offsets = [at for of, life, at in self.said if (of, life) == (partition, generation)]
        at = max((each for each in offsets if offset is None or each <= offset), default=None)
        if at is None:
            return version(generation, 0), {}
        return version(generation, at), self.said[partition, generation, at][0]

    def newest(self, partition: int, generation: int) -> tuple[int, int] | None:
        at = max((at for of, life, at in self.said if (of, life) == (partition, generation)), default=None)
        return None if at is None else (at, self.said[partition, generation, at][1])

    def kept(self, partition: int, orders: Sequence[str]) -> list[KeptAccrual]:
        return [
            KeptAccrual(
                line, month, at, row.exact, row.quantity_micros, tuple((day, decimal(each)) for day, each in row.days)
            )
            for (line, month), (at, of, row) in self._newest()
            if of == partition and line[0] in orders
        ]

    def state_of(self, partition: int) -> tuple[int, ...]:
        versions = [at for said in self.rows.values() for at, of, _ in said if of == partition]
        return len(versions), sum(versions)

    def insert_reconciliation(self, *_: Any) -> None:
        """Nobody reads it again."""

    def orders(self, partition: int) -> set[str]:
        return {line[0] for (line, _), said in self.rows.items() if any(of == partition for _, of, _ in said)}

    def written(self, partition: int) -> list[tuple[LineKey, int, list[str]]]:
        found = []
        for (line, month), said in self.rows.items():
            ours = [(at, row) for at, of, row in said if of == partition]
            if ours:
                row = max(ours, key=lambda each: each[0])[1]
                found.append((line, month, [party for party, _ in row.wanted]))
        return found

    def exact_rows(self, month: int) -> Iterator[tuple[LineKey, list[tuple[int, str, int]]]]:
        found: dict[LineKey, list[tuple[int, str, int]]] = {}
        for (line, each), (at, _, row) in self._newest():
            if each <= month:
                found.setdefault(line, []).append((each, fraction_text(row.exact), at))
        for line, rows in found.items():
            yield line, sorted(rows)

    def items(self) -> set[str]:
        return {line[1] for line, _ in self.rows}

    def wanted(self) -> list[tuple[LineKey, int, int, list[str], list[str]]]:
        return [
            (line, month, at, [party for party, _ in row.wanted], [fraction_text(each) for _, each in row.wanted])
            for (line, month), (at, _, row) in self._newest()
            if row.wanted
        ]

    def insert_drawn(self, rows: Iterable[tuple[Any, ...]]) -> None:
        for party, month, at, allocation, drawn in rows:
            self.drawn.setdefault((party, month), []).append((at, allocation, drawn))

    def _newest(self) -> Iterator[tuple[LineMonth, tuple[int, int, AccrualRow]]]:
        for key, said in self.rows.items():
            yield key, max(said, key=lambda each: each[0])


class MemoryDocuments:
    """As `sinks.documents.Documents` and `sinks.evidence.EvidenceStore`."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self._ledger = ledger
        self.cuts: dict[int, dict[tuple[int, int], Cut]] = {}
        self.refused: set[tuple[int, int, int]] = set()
        self.decisions: dict[tuple[int, int, int], Decision] = {}
        self.attestations: dict[tuple[tuple[int, int], str, str], Reported] = {}
        self.answers: list[tuple[str, int, int, str, str]] = []
        self.invoiced: dict[int, dict[Any, int]] = {}
        self.held: dict[int, dict[Any, int]] = {}
        self.rates: dict[int, dict[Any, int]] = {}
        self.issued: dict[str, tuple[int, str, str, str]] = {}
        self.periods: dict[int, Row] = {}
        self.drawn: dict[int, dict[tuple[str, int], Exact]] = {}
        #: Every text or amount that was ever written, by what it is of: a close repeated writes the same.
        self.contents: dict[tuple[Any, ...], set[Any]] = {}

    def cut(self, period: int) -> Cut | None:
        said = self.cuts.get(period, {})
        standing = [at for at in said if (period, *at) not in self.refused or (period, *at) in self.decisions]
        return said[min(standing)] if standing else None

    def fix_cut(self, period: int, cut: Cut) -> None:
        self.cuts.setdefault(period, {})[cut.generation, cut.offset] = cut

    def refuse_cut(self, period: int, cut: Cut) -> None:
        self.refused.add((period, cut.generation, cut.offset))

    def decide(self, period: int, cut: Cut, decision: Decision) -> None:
        self.decisions[period, cut.generation, cut.offset] = decision

    def decision(self, period: int, cut: Cut) -> Decision | None:
        return self.decisions.get((period, cut.generation, cut.offset))

    def answer(self, request: Request, generation: int, outcome: str, detail: str) -> None:
        self.answers.append((request.period, generation, request.offset, outcome, detail))

    def attested(self, months: Sequence[int], generation: int, before: int) -> dict[int, dict[str, Reported]]:
        found: dict[int, dict[str, Reported]] = {month: {} for month in months}
        for (at, supplier_id, period), said in sorted(self.attestations.items()):
            if parse_month(period) in found and at < (generation, before):
                found[parse_month(period)][supplier_id] = said
        return found

    def closed(self) -> list[int]:
        return sorted(self.periods)

    def invoiced_before(self, period: int) -> Amounts:
        return by_line(self._invoiced_before(period))

    def _invoiced_before(self, period: int) -> dict[Any, int]:
        total: dict[Any, int] = {}
        for earlier, rows in self.invoiced.items():
            for key, amount in rows.items() if earlier < period else ():
                total[key] = total.get(key, 0) + amount
        return total

    def issued_before(self, period: int) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for of, payer, _, kind in self.issued.values():
            if of < period and kind != "pro-forma":
                numbers[payer] = numbers.get(payer, 0) + 1
        return numbers

    def vat_rates_before(self, period: int, months: Iterable[int]) -> dict[Any, int]:
        rates: dict[Any, int] = {}
        for earlier in sorted(self.rates):
            if earlier < period:
                rates |= self.rates[earlier]
        within, invoiced = set(months), self._invoiced_before(period)
        return {key: rate for key, rate in rates.items() if key.month in within and invoiced[key]}

    def insert_rows(self, period: int, kind: str, amounts: Mapping[Any, int], rates: Mapping[Any, int]) -> None:
        self._same((period, kind, "keys"), frozenset(amounts))
        for key, amount in amounts.items():
            self._same((period, kind, *key), (amount, rates.get(key, 0)))
        (self.invoiced if kind == "invoiced" else self.held)[period] = dict(amounts)
        if kind == "invoiced":
            self.rates.setdefault(period, {}).update({key: rates.get(key, 0) for key in amounts})

    def insert_documents(self, documents: Sequence[tuple[Any, str]]) -> None:
        for document, body in documents:
            self._same(("document", document.number), body)
            self.issued[document.number] = (document.period, document.payer, document.supplier_id, document.kind)

    def insert_statements(self, period: int, statements: Sequence[Any]) -> None:
        for each in statements:
            self._same((period, each.kind, each.code), str(each.body))

    def insert_period(
        self, period: int, generation: int, documents: Sequence[Any], held_pence: int, drift_pence: Decimal
    ) -> None:
        net, rows = sum(each.net_pence for each in documents), sum(len(each.rows) for each in documents)
        self.periods[period] = {
            "documents": len(documents),
            "rows": rows,
            "net_pence": net,
            "held_pence": held_pence,
            "drift": drift_pence,
        }

    def insert_attestation(
        self, supplier_id: str, period: str, generation: int, offset: int, count: int, quantity_micros: int
    ) -> None:
        self.attestations[(generation, offset), supplier_id, period] = Reported(count, quantity_micros)

    def originals(self, period: int, months: Iterable[int]) -> dict[Any, tuple[str, str]]:
        within, found = set(months), {}
        numbers = {(of, payer, supplier): (number, kind) for number, (of, payer, supplier, kind) in self.issued.items()}
        for earlier in sorted(self.invoiced, reverse=True):
            for key in self.invoiced[earlier] if earlier < period else ():
                issued = numbers.get((earlier, key.payer, key.supplier_id))
                if key.month in within and issued is not None:
                    number, kind = issued
                    found[key] = (number, found.get(key, ("", ""))[1] if kind == "pro-forma" else number)
        return found

    def insert_adjustments(self, period: int, causes: Mapping[Any, Any], originals: Mapping[Any, str]) -> None:
        for key, cause in causes.items():
            self._same((period, "cause", *key), (cause.text, originals.get(key, "")))

    def digests(
        self, generation: int, cut: Mapping[str, int], items: Iterable[str], months: Iterable[int]
    ) -> dict[Any, dict[int, Readings]]:
        wanted, within = set(items), set(months)
        lines: dict[Any, dict[int, list[str]]] = {}
        for (ods_code, _, reading), row in standing(self._ledger.at_cut(generation, cut)).items():
            day = row["day"].toordinal()
            if row["item_id"] in wanted and month_of(day) in within and row["quantity_micros"]:
                text = f"{row['revision']} {row['quantity_micros']} {reading}\n"
                lines.setdefault((row["item_id"], ods_code), {}).setdefault(day, []).append(text)
        return {
            service: {
                day: Readings(len(each), hashlib.sha256("".join(sorted(each)).encode()).hexdigest())
                for day, each in days.items()
            }
            for service, days in lines.items()
        }

    def insert_wanted(self, period: int, wanted: Mapping[tuple[str, int], Exact]) -> None:
        self.drawn[period] = {key: whole(Fraction(pence(exact)) * GRAINS) for key, exact in wanted.items()}

    def wanted(self, period: int) -> dict[tuple[str, int], Exact]:
        return self.drawn.get(period, {})

    def insert_evidence(self, period: int, bodies: Iterable[tuple[str, str]]) -> None:
        for number, body in bodies:
            self._same((period, "evidence", number), body)

    def _same(self, what: tuple[Any, ...], content: Any) -> None:
        self.contents.setdefault(what, set()).add(content)


class MemoryParties:
    """As `sinks.parties.PartyStore` of an installation without party data."""

    def imports(self) -> list[str]:
        return []

    def parties(self, imports: Sequence[str], specimen: bool) -> Parties:
        return Parties.fold((), specimen)


class MemoryClaims:
    """As `sinks.claims.Claims`, with a window that no claim outlives."""

    def __init__(self, ledger_is_empty: Callable[[], bool]) -> None:
        self._ledger_is_empty = ledger_is_empty
        self._claimed: set[str] | None = None
        self._complete = False

    def check(self) -> None:
        """It evicts nothing."""

    def flush(self) -> None:
        """FLUSHALL."""
        self._claimed = None

    def claim(self, partition: int, identities: pl.Series, claims: pl.Series) -> tuple[pl.Series, datetime]:
        if self._claimed is None:
            self._claimed, self._complete = set(), self._ledger_is_empty()
        unclaimed = []
        for identity in identities:
            unclaimed.append(identity not in self._claimed)
            self._claimed.add(identity)
        since = datetime(1970, 1, 1, tzinfo=UTC) if self._complete else datetime.now(UTC)
        return pl.Series(unclaimed, dtype=pl.Boolean), since


@dataclass
class MemorySinks:
    """What agents know as `context.clickhouse`, and behind it every store."""

    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    accruals: MemoryAccruals = field(default_factory=MemoryAccruals)
    parties: MemoryParties = field(default_factory=MemoryParties)
    tables: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.documents = MemoryDocuments(self.ledger)
        self.claims = MemoryClaims(lambda: not self.ledger.has_usage())

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As `sinks.clickhouse.ClickHouse.insert`."""
        self.tables.setdefault(table, []).extend(tuple(row) for row in rows)

    def query(self, statement: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The one query that an agent asks by itself: the totals of a closed period."""
        assert "FROM periods" in statement, statement
        period = self.documents.periods[parse_month(parameters["period"])]
        return [tuple(period[name] for name in ("documents", "rows", "net_pence", "held_pence"))]
