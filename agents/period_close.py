"""Period close: fixes the cut, waits until every stage has applied the log up to it, derives, writes.

Reads `period-events`; writes documents to ClickHouse and `invoices`, and `PeriodClosed`.

The order of steps for a close, each of which can be repeated with the same result:

1. `CloseRequested` is checked; the end offsets of every input partition go to `period-events` as
   `CutFixed`.  The first in the log stands, so a second request after a crash changes nothing.
2. `CutFixed` is recorded in the ledger, with its time (the documents' issue time) and the party data known.
3. Each stage in turn must have committed what lay before it: what intake had to do up to the cut,
   then what that put into `usage-accepted`, and so on.  Until then nothing is written.
4. All lines are derived from the ledger as of the cut, and the accruals compared with it.  The causes of
   adjustments and the evidence of documents are found and inserted.  Statements are made from the same
   rows; if they do not tie out, the close is refused.
5. Rows, documents, statements, then the period itself are inserted.  A crash in between repeats from 3 with
   the same cut, and the same rows and numbers collapse.
6. `PeriodClosed` is sent; the broker acknowledges it and the documents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar

import structlog

from agents.collector import collector_paused
from agents.context import Context
from agents.explaining import Changes, Explaining
from rating.amounts import micros, micros_text, pence
from rating.book import Book, LineKey
from rating.calendar import month_start, month_text, parse_month
from rating.close import Derivation, derive, invoice, rate_lines
from rating.documents import Document, documents
from rating.funding import charge_of
from rating.records import Refused
from rating.statements import OutOfBalance, Papers
from sinks import metrics
from sinks.accruals import Accruals, decimal
from sinks.dead_letters import DeadLetter
from sinks.documents import Cut, Documents
from sinks.evidence import sealed
from sinks.parties import PartyStore
from sinks.positions import Positions, place_text
from streams.agent import Agent
from streams.batch import Batch, NotYet, Record
from streams.codec import Undecodable, to_interchange
from streams.topics import (
    CHARGE_INPUTS,
    CONTRACT_CHANGES,
    FUNDING_INPUTS,
    INVOICES,
    PERIOD_EVENTS,
    REFERENCE_CHANGES,
    USAGE_ACCEPTED,
    Broker,
    Place,
    input_topics,
    partition_for,
    usage_topics,
)

log = structlog.get_logger(__name__)

#: A document longer than this is in the ledger whole; a record of `invoices` has to fit the broker's limit.
_MESSAGE_CHARACTERS = 6_000_000


class CloseRefused(Exception):
    """A period that can't be closed; the message says why and what to do."""


class PeriodClose(Agent):
    """The agent of role `period-close`."""

    role: ClassVar[str] = "period-close"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._generation = context.settings.log_generation
        self._documents = Documents(context.clickhouse)
        self._explaining = Explaining(context)
        self._parties = PartyStore(context.clickhouse)
        self._accruals = Accruals(context.clickhouse)
        self._broker = Broker(context.settings)
        #: For a period, the ends that each stage must reach, found once the stage before was done.
        self._ends: dict[int, dict[str, dict[Place, int]]] = {}
        self._said = ""

    def topics(self) -> Sequence[str]:
        """`period-events`."""
        return [PERIOD_EVENTS]

    def do(self, batch: Batch) -> None:
        """Does a batch; see the steps above."""
        letters: list[DeadLetter] = []
        for record in batch.records:
            try:
                decoded = self._context.codec.decode(
                    record.value, ("UsageComplete", "CloseRequested", "CutFixed", "PeriodClosed")
                )
                if decoded.name == "UsageComplete":
                    self._attest(to_interchange("UsageComplete", decoded.value), record)
                elif decoded.name == "CloseRequested":
                    self._request(str(decoded.value["period"]), record)
                elif decoded.name == "CutFixed":
                    self._cut(decoded.value, record)
            except (Undecodable, Refused, CloseRefused) as error:
                letters.append(
                    DeadLetter(
                        PERIOD_EVENTS,
                        batch.partition,
                        record.offset,
                        str(error),
                        key=record.key,
                        value=record.value,
                        broker_timestamp_ms=record.timestamp,
                    )
                )
        self._context.dead_letters.write(letters)
        self._context.outbox.flush()
        metrics.RECORDS.labels(self.role, "accepted").inc(len(batch.records) - len(letters))

    # --- steps 1 and 2 ---

    def _attest(self, value: dict[str, Any], record: Record) -> None:
        try:
            parse_month(value["period"])
            quantity = micros(value["quantity"])
        except ValueError as error:
            raise Refused("", str(error)) from None
        self._documents.insert_attestation(
            value["supplier_id"], value["period"], self._generation, record.offset, value["count"], quantity
        )

    def _request(self, text: str, record: Record) -> None:
        try:
            period = self._check(text)
            if period is None:
                self._answer(text, record, "closed", "was closed before")
                return
            cut = self._documents.cut(period)
            if cut is None:
                self._answer(text, record, "waiting", "the cut is being fixed")
                self._fix(period)
                return
            self._close(period, cut, record)
        except CloseRefused as error:
            self._answer(text, record, "refused", str(error))
            raise

    def _check(self, text: str) -> int | None:
        """The period to close; None when it is closed already.  Raises CloseRefused."""
        try:
            period = parse_month(text)
        except ValueError as error:
            raise CloseRefused(str(error)) from None
        closed = self._documents.closed()
        if period in closed:
            return None
        if closed and period != closed[-1] + 1:
            raise CloseRefused(
                f"{text} cannot be closed: {month_text(closed[-1])} was closed last, so "
                f"{month_text(closed[-1] + 1)} is next; periods close in order without gaps"
            )
        ended = month_start(period + 1)
        if not self._context.settings.close_any_period and datetime.now(UTC) < ended:
            raise CloseRefused(f"{text} can be closed from {ended.isoformat()} on")
        return period

    def _fix(self, period: int) -> None:
        ends = self._ends_now()
        value = {
            "period": month_text(period),
            "generation": self._generation,
            "cut": [
                {"topic": topic, "partition": partition, "end_offset": end}
                for (topic, partition), end in sorted(ends.items())
            ],
        }
        self._context.outbox.send(PERIOD_EVENTS, self._context.codec.encode("CutFixed", value), key=month_text(period))
        self._context.outbox.flush()

    def _cut(self, value: dict[str, Any], record: Record) -> None:
        period = self._check(value["period"])
        if period is None:
            # Perhaps the process died after the period was written: whoever waits is told (again).
            self._say_closed(value["period"])
            self._answer(value["period"], record, "closed", "")
            return
        cut = self._documents.cut(period)
        if cut is None:
            self._check_cut(value)
            positions = {place_text(each["topic"], each["partition"]): each["end_offset"] for each in value["cut"]}
            issued_at = datetime.fromtimestamp(record.timestamp / 1000, UTC)
            cut = Cut(value["generation"], positions, issued_at, self._parties.imports())
            self._documents.fix_cut(period, record.offset, cut)
        self._close(period, cut, record)

    def _check_cut(self, value: dict[str, Any]) -> None:
        """A cut names every input partition up to an offset that it has.  Raises CloseRefused."""
        if value["generation"] != self._generation:
            raise CloseRefused(f"the cut is of log generation {value['generation']}, not {self._generation}")
        ends = self._ends_now()
        said = {(each["topic"], each["partition"]): each["end_offset"] for each in value["cut"]}
        for place in ends.keys() | said.keys():
            if not 0 <= said.get(place, -1) <= ends.get(place, -1):
                raise CloseRefused(f"the cut says {said.get(place)} of {place}, which has {ends.get(place)} records")

    def _ends_now(self) -> dict[Place, int]:
        # What the ledger has of a topic that is read no more still counts.
        seen = self._context.ledger.positions_seen(self._generation)
        return {_place(text): end for text, end in seen.items()} | self._broker.end_offsets(
            input_topics(self._context.settings)
        )

    def _answer(self, period: str, record: Record, outcome: str, detail: str) -> None:
        self._documents.answer(period, self._generation, record.offset, outcome, detail)

    def _say_closed(self, text: str) -> None:
        [(documents, rows, net, held)] = self._context.clickhouse.query(
            "SELECT documents, rows, net_pence, held_pence FROM periods FINAL WHERE period = {period:String}",
            {"period": text},
        )
        totals = {
            "documents": documents,
            "rows": rows,
            "net": Decimal(net).scaleb(-2),
            "held": Decimal(held).scaleb(-2),
        }
        value = {"period": text, "totals": totals}
        self._context.outbox.send(PERIOD_EVENTS, self._context.codec.encode("PeriodClosed", value), key=text)
        self._context.outbox.flush()

    # --- step 3 ---

    def _wait(self, period: int, cut: Cut) -> None:
        """Raises NotYet naming the stage that still has work before the cut."""
        if cut.generation != self._generation:
            return  # that life of the log has ended, and what it held is in the ledger
        settings = self._context.settings
        first = {_place(text): end for text, end in cut.positions.items()}
        ends = self._ends.setdefault(period, {})

        def of(*topics: str) -> dict[Place, int]:
            return {place: end for place, end in first.items() if place[0] in topics}

        ends.setdefault("intake", of(*usage_topics(settings)))
        ends.setdefault("contracts", of(CONTRACT_CHANGES))
        ends.setdefault("reference", of(REFERENCE_CHANGES))
        stages = (
            ("intake", None),
            ("contracts", None),
            ("reference", None),
            ("usage", USAGE_ACCEPTED),
            ("charges", CHARGE_INPUTS),
            ("funding", FUNDING_INPUTS),
        )
        for stage, topic in stages:
            if stage not in ends and topic is not None:
                ends[stage] = self._broker.end_offsets([topic])
            if behind := self._broker.behind(f"tribill-{stage}", ends[stage]):
                raise NotYet(f"{month_text(period)} waits for {stage}: {behind} records to do before the cut")

    # --- steps 4 to 6 ---

    def _close(self, period: int, cut: Cut, record: Record) -> None:
        text = month_text(period)
        try:
            self._wait(period, cut)
        except NotYet as reason:
            if str(reason) != self._said:
                self._answer(text, record, "waiting", str(reason))
                self._said = str(reason)
            raise
        self._answer(text, record, "waiting", "all is applied; the lines are being derived")
        changes = Changes(self._context, cut.generation, cut.positions)
        known = changes.known(self._context.ledger.totals_at_cut(cut.generation, cut.positions))
        book = known.book
        with collector_paused():
            derived = derive(book, period)
        known.wanted = derived.wanted
        drift = self._drift(period, derived, cut)
        invoiced = self._documents.invoiced_before(period)
        rows, held = invoice(derived, invoiced, period)
        rates = self._documents.vat_rates_before(period)
        parties = self._parties.parties(cut.party_imports, self._context.settings.specimen)
        issued = documents(rows, period, book, self._documents.issued_before(period), rates, parties, cut.issued_at)
        self._explaining.explain(period, cut, changes, known, invoiced, issued)
        try:
            statements = Papers(period, book, rows, held, derived.wanted, issued, parties, cut.issued_at).statements()
        except OutOfBalance as error:
            self._answer(text, record, "refused", str(error))
            raise CloseRefused(str(error)) from error
        rates = {key: rate for document in issued for key, rate in document.vat_rates_micros.items()}
        self._documents.insert_rows(period, "invoiced", rows, rates)
        self._documents.insert_rows(period, "held", held, {})
        self._issue(issued)
        self._documents.insert_statements(period, statements)
        self._documents.insert_period(period, cut.generation, issued, sum(held.values()), drift)
        totals = {
            "documents": len(issued),
            "rows": len(rows),
            "net": Decimal(sum(rows.values())).scaleb(-2),
            "held": Decimal(sum(held.values())).scaleb(-2),
        }
        announced = self._context.codec.encode("PeriodClosed", {"period": text, "totals": totals})
        self._context.outbox.send(PERIOD_EVENTS, announced, key=text)
        self._context.outbox.flush()
        self._ends.pop(period, None)
        self._answer(text, record, "closed", _notice(book))
        metrics.ACCRUAL_DRIFT.set(float(decimal(drift)))
        metrics.CLOSED_PERIOD.set(month_start(period + 1).timestamp())
        log.info("period closed", period=text, documents=len(issued), rows=len(rows), drift=str(drift))

    def _issue(self, issued: Sequence[Document]) -> None:
        """Writes documents to the ledger and to `invoices`, where the longest go without their lines."""
        bodies = []
        for document in issued:
            body = sealed(document.as_json())
            text = json.dumps(body, separators=(",", ":"))
            bodies.append((document, text))
            if len(text) > _MESSAGE_CHARACTERS:
                text = json.dumps(body | {"lines": [], "lines_left_out": len(body["lines"])}, separators=(",", ":"))
            value = {"number": document.number, "period": body["period"], "body": text}
            self._context.outbox.send(INVOICES, self._context.codec.encode("Document", value), key=document.number)
        self._documents.insert_documents(bodies)
        self._context.outbox.flush()

    def _drift(self, period: int, derived: Derivation, cut: Cut) -> Fraction:
        """By how many pence the accruals differ from what the ledger gives at the positions that they count.

        Where they count what the cut does and no more, that is what was just derived.
        """
        partitions = self._context.settings.partitions
        expected: list[Mapping[tuple[LineKey, int], Fraction]] = []
        known: dict[tuple[tuple[str, int], ...], Mapping[tuple[LineKey, int], Fraction]] = {}
        complete: list[int] = []
        for partition in range(partitions):
            newest, counted = self._accruals.counted(partition, self._generation)
            complete.append(newest)
            same = tuple(sorted(counted.items()))
            if same not in known:
                known[same] = derived.exact if self._counts_the_cut(counted, cut) else self._exact_at(counted, period)
            expected.append(known[same])
        accrued = self._accruals.exact_and_version(period)
        partition_of: dict[str, int] = {}
        total, nothing = Fraction(0), Fraction(0)
        for key in accrued.keys() | {key for each in known.values() for key in each}:
            item_id = key[0][1]
            if item_id not in partition_of:
                partition_of[item_id] = partition_for(item_id, partitions)
            partition = partition_of[item_id]
            found, at = accrued.get(key, (nothing, 0))
            due = expected[partition].get(key, nothing)
            # A row that was written since its partition's positions were read counts more than they say.
            if found != due and at <= complete[partition]:
                total += abs(found - due)
        return total

    def _counts_the_cut(self, counted: Positions, cut: Cut) -> bool:
        """Whether positions of the accruals and a cut of the input topics take in the same changes and usage."""
        return (
            cut.generation == self._generation
            and all(counted.get(place, 0) == end for place, end in cut.positions.items() if "changes" in place)
            and self._context.ledger.same_usage(self._generation, counted, cut.positions)
        )

    def _exact_at(self, counted: Positions, period: int) -> Mapping[tuple[LineKey, int], Fraction]:
        """What the ledger gives at positions that the accruals count."""
        usage = self._context.ledger.totals_accepted(self._generation, counted)
        book = Changes(self._context, self._generation, counted).known(usage).book
        return {
            (line.key, month): pence(charge_of(split))
            for line, months in rate_lines(book, period)
            for month, split in months.items()
        }


def _notice(book: Book) -> str:
    """What somebody should look at: usage that no order covers, and usage that several do."""
    suspense, overlaps = book.untaken()
    said = []
    if suspense:
        quantity = micros_text(sum(suspense.values()))
        said.append(f"usage of {quantity} units of {len(suspense)} items at practices waits in suspense")
    for (item_id, ods_code), orders in sorted(overlaps.items())[:10]:
        said.append(f"usage of {item_id} at {ods_code} is covered by {', '.join(orders)}: {orders[0]} takes it")
    return "; ".join(said)


def _place(text: str) -> Place:
    topic, _, partition = text.rpartition("/")
    return topic, int(partition)
