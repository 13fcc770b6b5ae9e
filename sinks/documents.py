"""What was closed: cuts, periods, rows, documents and statements in the ledger."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from rating.calendar import month_text, parse_month
from rating.close import Amounts, ChargeKey, portion_of
from rating.completeness import Reported
from rating.documents import Document
from rating.statements import Statement
from sinks.clickhouse import ClickHouse
from sinks.evidence import EvidenceStore


@dataclass(frozen=True, slots=True)
class Cut:
    """Up to where the log counts for a close, and what else its documents are made from.

    `offset` is that of its CutFixed in period-events: attestations before it count.  `issued_at` is the broker's
    time of the cut: the issue time of every document.  `party_imports` are the imports of party data that were
    there by then, `specimen` whether others are invented.  All is recorded, so a close repeated gives the same bytes.
    """

    generation: int
    offset: int
    positions: dict[str, int]
    issued_at: datetime
    party_imports: list[str]
    specimen: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """That the documents of a cut are issued: recorded before the first of them, and taken back by nothing.

    `accepted` says in words what was found and, by somebody's leave, did not stop the close.
    """

    drift_pence: Decimal
    accepted: list[str]
    requested_by: str


class Request(NamedTuple):
    """Somebody's wish to close a period, at an offset of period-events."""

    period: str
    offset: int
    accepted: list[str]
    requested_by: str


class Documents:
    """Reads and writes the tables of `0003_documents.sql`."""

    def __init__(self, clickhouse: ClickHouse) -> None:
        self._clickhouse = clickhouse
        self.evidence = EvidenceStore(clickhouse)

    # --- the course of a close ---

    def cut(self, period: int) -> Cut | None:
        """The cut of a period: the first in the log that was not refused stands."""
        rows = self._clickhouse.query(
            """
            SELECT generation, offset, cut, issued_at_ms, party_imports, specimen FROM cuts
            WHERE period = {period:String} AND (generation, offset) NOT IN (
                SELECT generation, offset FROM close_decisions WHERE period = {period:String}
                GROUP BY generation, offset HAVING countIf(outcome = 'go') = 0)
            ORDER BY generation, offset LIMIT 1
            """,
            {"period": month_text(period)},
        )
        for generation, offset, positions, issued_at_ms, imports, specimen in rows:
            at = datetime.fromtimestamp(issued_at_ms / 1000, UTC)
            return Cut(generation, offset, dict(positions), at, list(imports), bool(specimen))
        return None

    def fix_cut(self, period: int, cut: Cut) -> None:
        """Records a cut read from the log."""
        issued_at_ms = int(cut.issued_at.timestamp() * 1000)
        where = (month_text(period), cut.generation, cut.offset)
        self._clickhouse.insert(
            "cuts",
            ("period", "generation", "offset", "cut", "issued_at_ms", "party_imports", "specimen"),
            [(*where, cut.positions, issued_at_ms, cut.party_imports, cut.specimen)],
        )

    def refuse_cut(self, period: int, cut: Cut) -> None:
        """Says that a cut counts no more: the next request takes another."""
        self._decide(period, cut, "refused", Decision(Decimal(0), [], ""))

    def decide(self, period: int, cut: Cut, decision: Decision) -> None:
        """Says that the documents of a cut are issued from here on."""
        self._decide(period, cut, "go", decision)

    def _decide(self, period: int, cut: Cut, outcome: str, decision: Decision) -> None:
        columns = ("period", "generation", "offset", "outcome", "drift_pence", "accepted", "requested_by")
        of = (month_text(period), cut.generation, cut.offset)
        row = (*of, outcome, decision.drift_pence, decision.accepted, decision.requested_by)
        self._clickhouse.insert("close_decisions", columns, [row])

    def decision(self, period: int, cut: Cut) -> Decision | None:
        """What was decided of a cut; None while nothing of it may have been issued."""
        rows = self._clickhouse.query(
            """
            SELECT drift_pence, accepted, requested_by FROM close_decisions FINAL
            WHERE period = {period:String} AND generation = {generation:UInt32} AND offset = {offset:Int64}
              AND outcome = 'go'
            """,
            {"period": month_text(period), "generation": cut.generation, "offset": cut.offset},
        )
        return Decision(rows[0][0], list(rows[0][1]), rows[0][2]) if rows else None

    def answer(self, request: Request, generation: int, outcome: str, detail: str) -> None:
        """Says how a request to close stands, and why.

        `refused`, `waiting`, `attestations` (waiting for them before the cut is fixed) or `closed`.
        """
        self._clickhouse.insert(
            "close_requests",
            ("period", "generation", "offset", "outcome", "detail", "accepted", "requested_by"),
            [(request.period, generation, request.offset, outcome, detail, request.accepted, request.requested_by)],
        )

    def answer_since(self, period: str, generation: int, offset: int) -> tuple[str, str] | None:
        """The latest outcome and detail of a request at an offset of period-events or what followed it.

        None when it was not taken yet.
        """
        rows = self._clickhouse.query(
            """
            SELECT outcome, detail FROM close_requests
            WHERE period = {period:String} AND generation = {generation:UInt32} AND offset >= {offset:Int64}
            ORDER BY outcome IN ('refused', 'closed') DESC, at DESC LIMIT 1
            """,
            {"period": period, "generation": generation, "offset": offset},
        )
        return (str(rows[0][0]), str(rows[0][1])) if rows else None

    def waiting_for_attestations(self, generation: int) -> list[tuple[Request, str]]:
        """The requests of a life of the log whose cut waits for attestations, each with what it waits for."""
        rows = self._clickhouse.query(
            "SELECT period, offset, accepted, requested_by, detail FROM close_requests FINAL"
            " WHERE generation = {generation:UInt32} AND outcome = 'attestations' ORDER BY offset",
            {"generation": generation},
        )
        return [(Request(period, offset, list(accepted), by), detail) for period, offset, accepted, by, detail in rows]

    def closed(self) -> list[int]:
        """The closed periods (months), in order."""
        return sorted({int(month) for (month,) in self._clickhouse.query("SELECT month FROM periods")})

    # --- what is invoiced ---

    def invoiced_before(self, period: int) -> Amounts:
        """All that was invoiced in earlier periods, in pence by line."""
        rows = self._clickhouse.stream(
            """
            SELECT toLowCardinality(order_number), item_id, toLowCardinality(ods_code),
                   groupArray(supplier_id), groupArray(payer), groupArray(month), groupArray(total)
            FROM (
                SELECT order_number, item_id, ods_code, supplier_id, payer, month, sum(pence) AS total
                FROM document_rows FINAL
                WHERE kind = 'invoiced' AND period < {period:String}
                GROUP BY order_number, item_id, ods_code, supplier_id, payer, month
            )
            GROUP BY order_number, item_id, ods_code
            SETTINGS max_block_size = 4096
            """,
            {"period": month_text(period)},
        )
        # A row is a line with all that it has, so blocks are small ones.
        return {
            (order_number, item_id, ods_code): dict(zip(map(portion_of, *portions), pence, strict=True))
            for order_number, item_id, ods_code, *portions, pence in rows
        }

    def issued_before(self, period: int) -> dict[str, int]:
        """How many documents of its series each payer has issued in earlier periods."""
        rows = self._clickhouse.query(
            "SELECT payer, uniqExact(number) FROM documents"
            " WHERE period < {period:String} AND kind != 'pro-forma' GROUP BY payer",
            {"period": month_text(period)},
        )
        return {str(payer): int(count) for payer, count in rows}

    def vat_rates_before(self, period: int, months: Collection[int]) -> dict[ChargeKey, int]:
        """The VAT rate (micros) that each key of months was last invoiced at before, if anything of that stands.

        What was credited whole has given its VAT back: what is charged for it anew has its order's rate of now.
        """
        rows = self._clickhouse.query(
            """
            SELECT order_number, toString(item_id), ods_code, toString(supplier_id), payer, month,
                   argMax(vat_rate_micros, period)
            FROM document_rows FINAL
            WHERE kind = 'invoiced' AND period < {period:String} AND month IN {months:Array(Int32)}
            GROUP BY order_number, item_id, ods_code, supplier_id, payer, month
            HAVING sum(pence) != 0
            """,
            {"period": month_text(period), "months": sorted(months)},
        )
        return {ChargeKey(*key): rate for *key, rate in rows}

    def insert_rows(
        self, period: int, kind: str, amounts: Mapping[ChargeKey, int], vat_rates_micros: Mapping[ChargeKey, int]
    ) -> None:
        """Inserts a period's `invoiced` or `held` rows."""
        text = month_text(period)
        self._clickhouse.insert(
            "document_rows",
            (
                "period",
                "kind",
                "order_number",
                "item_id",
                "ods_code",
                "supplier_id",
                "payer",
                "month",
                "pence",
                "vat_rate_micros",
            ),
            [(text, kind, *key, pence, vat_rates_micros.get(key, 0)) for key, pence in amounts.items()],
        )

    def rows(self, period: int, kind: str) -> dict[ChargeKey, int]:
        """A period's `invoiced` or `held` rows."""
        rows = self._clickhouse.query(
            """
            SELECT order_number, toString(item_id), ods_code, toString(supplier_id), payer, month, pence
            FROM document_rows FINAL WHERE period = {period:String} AND kind = {kind:String}
            """,
            {"period": month_text(period), "kind": kind},
        )
        return {ChargeKey(*key): pence for *key, pence in rows}

    def insert_documents(self, documents: Sequence[tuple[Document, str]]) -> None:
        """Inserts documents, each with its JSON."""
        self._clickhouse.insert(
            "documents",
            ("number", "period", "payer", "supplier_id", "kind", "net_pence", "vat_pence", "body"),
            [
                (
                    document.number,
                    month_text(document.period),
                    document.payer,
                    document.supplier_id,
                    document.kind,
                    document.net_pence,
                    document.vat_pence,
                    body,
                )
                for document, body in documents
            ],
        )

    def documents(self, period: int) -> list[tuple[str, str, dict[str, Any]]]:
        """A period's documents: number, kind and JSON, in the order of their numbers."""
        rows = self._clickhouse.query(
            "SELECT number, toString(kind), body FROM documents FINAL WHERE period = {period:String} ORDER BY number",
            {"period": month_text(period)},
        )
        return [(number, kind, json.loads(body)) for number, kind, body in rows]

    def numbers(self, period: int) -> list[str]:
        """The numbers of the documents that are issued by now: all, once the period is closed."""
        rows = self._clickhouse.query(
            "SELECT DISTINCT number FROM documents WHERE period = {period:String} ORDER BY number",
            {"period": month_text(period)},
        )
        return [number for (number,) in rows]

    def issued(self, period: int, numbers: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Some documents: number, JSON and evidence, in the order of their numbers."""
        rows = self._clickhouse.query(
            "SELECT number, body FROM documents FINAL WHERE period = {period:String}"
            " AND number IN {numbers:Array(String)}",
            {"period": month_text(period), "numbers": numbers},
        )
        bodies = dict(rows)
        for number, evidence in self.evidence.evidence(period, numbers):
            yield number, bodies.pop(number), evidence
        assert not bodies, f"without evidence: {bodies.keys()}"

    def readings(self, period: int, items: Iterable[str], months: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The readings of some items and months that a closed period counted, as interchange values."""
        cut = self.cut(period)
        assert cut is not None, "a closed period has a cut"
        return self.evidence.readings(cut.generation, cut.positions, items, months)

    def insert_statements(self, period: int, statements: Sequence[Statement]) -> None:
        """Inserts statements, remittance advices and the control sheet."""
        rows = [
            (month_text(period), each.kind, each.code, each.net_pence, json.dumps(each.body, separators=(",", ":")))
            for each in statements
        ]
        self._clickhouse.insert("statements", ("period", "kind", "code", "net_pence", "body"), rows)

    def statements(self, period: int) -> list[str]:
        """The JSON of a period's statements, as text."""
        rows = self._clickhouse.query(
            "SELECT body FROM statements FINAL WHERE period = {period:String} ORDER BY kind, code",
            {"period": month_text(period)},
        )
        return [body for (body,) in rows]

    def insert_period(
        self, period: int, generation: int, documents: Sequence[Document], held_pence: int, drift_pence: Decimal
    ) -> None:
        """Says that a period is closed."""
        self._clickhouse.insert(
            "periods",
            ("period", "month", "generation", "documents", "rows", "net_pence", "held_pence", "drift_pence"),
            [
                (
                    month_text(period),
                    period,
                    generation,
                    len(documents),
                    sum(len(document.rows) for document in documents),
                    sum(document.net_pence for document in documents),
                    held_pence,
                    drift_pence,
                )
            ],
        )

    # --- attestations ---

    def attested(self, months: Sequence[int], generation: int, before: int) -> dict[int, dict[str, Reported]]:
        """What each supplier attested last of these months, before an offset of period-events in a life of the log."""
        rows = self._clickhouse.query(
            """
            SELECT period, supplier_id, argMax((count, quantity_micros), (generation, offset)) FROM attestations
            WHERE period IN {periods:Array(String)}
              AND (generation, offset) < ({generation:UInt32}, {before:Int64})
            GROUP BY period, supplier_id
            """,
            {"periods": [month_text(month) for month in months], "generation": generation, "before": before},
        )
        found: dict[int, dict[str, Reported]] = {month: {} for month in months}
        for period, supplier_id, said in rows:
            found[parse_month(period)][supplier_id] = Reported(*said)
        return found

    def insert_attestation(
        self, supplier_id: str, period: str, generation: int, offset: int, count: int, quantity_micros: int
    ) -> None:
        """Records a supplier's word on what it reported."""
        self._clickhouse.insert(
            "attestations",
            ("supplier_id", "period", "generation", "offset", "count", "quantity_micros"),
            [(supplier_id, period, generation, offset, count, quantity_micros)],
        )
