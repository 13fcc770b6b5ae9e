"""Period close: fixes the cut, waits until every stage has applied the log up to it, decides, writes.

Reads `period-events`; writes documents to ClickHouse and `invoices`, and `PeriodClosed`.

The order of steps for a close, each of which can be repeated with the same result:

1. `CloseRequested` is checked, and by setting waits for suppliers' attestations until a deadline.  Then the
   end offsets of every input partition go to `period-events` as `CutFixed`.  The first in the log stands, so a
   second request after a crash changes nothing.
2. `CutFixed` is recorded in the ledger, with its time (the documents' issue time) and the party data known.
3. Each stage in turn must have committed what lay before it: what intake had to do up to the cut,
   then what that put into `usage-accepted`, and so on.  Until then nothing is written.  `charges` is told that
   all usage is done.
4. All lines are derived from the ledger as of the cut, and all papers made (agents/deriving.py); the accruals are
   compared with it.  What speaks against the close refuses it, unless the request accepts it: then the cut
   counts no more, nothing was written, and the next request takes another.
5. That the documents are issued is recorded, with what was found and accepted; from here on nothing refuses.
   Causes, rows, statements, documents with their evidence, then the period itself are inserted.  A crash in between
   repeats from 4 with the same cut, and the same rows and numbers collapse.
6. `PeriodClosed` is sent; the broker acknowledges it and the documents.
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar

import structlog

from agents.collector import collector_paused
from agents.context import Context
from agents.deriving import Derived, Deriving, Issue, attestation_deadline, has_ended
from agents.drift import drift_pence
from agents.reconcile import Reconcile
from agents.usage import TOTALS_SCHEMA, totals_block
from rating.amounts import micros, micros_text
from rating.calendar import month_start, month_text, parse_month
from rating.documents import Document
from rating.records import Refused
from rating.statements import OutOfBalance
from sinks import metrics
from sinks.accruals import decimal
from sinks.dead_letters import DeadLetter
from sinks.documents import Cut, Decision, Documents, Request
from sinks.evidence import SOME_CHARACTERS, EvidenceStore, sealed
from sinks.parties import PartyStore
from sinks.positions import place_text
from streams.agent import Agent
from streams.batch import Batch, NotYet, Record
from streams.codec import Undecodable, to_interchange
from streams.settings import SettingsError
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
    usage_topics,
)

log = structlog.get_logger(__name__)

#: A document longer than this is in the ledger whole; a record of `invoices` has to fit the broker's limit.
_MESSAGE_CHARACTERS = 6_000_000


#: What a request may accept, so that it stops the close no more (`tribill close --accept-...`).
LAG, ATTESTATIONS, SUSPENSE, DRIFT = ACCEPTABLE = ("lag", "attestations", "suspense", "drift")
#: So often what the accruals lack is asked for before a drift refuses a close.
_MENDS = 3
#: So often at most a stage of the work is told with how far it is.
_TELL_SECONDS = 1.0
#: The fields of a document that grow with its lines.
_LONG = ("lines", "items", "orders", "cos")


class CloseRefused(Exception):
    """A period that can't be closed; the message says why and what to do."""


class PeriodClose(Agent):
    """The agent of role `period-close`."""

    role: ClassVar[str] = "period-close"

    idle_seconds: ClassVar[float] = 5

    def __init__(self, context: Context) -> None:
        self._context = context
        self._generation = context.settings.log_generation
        limit = context.settings.suspense_limit
        try:
            self._suspense_limit_micros = micros(limit) if limit else None
        except ValueError as error:
            raise SettingsError(f"suspense_limit: {error}") from None
        self._documents = Documents(context.clickhouse)
        self._evidence = EvidenceStore(context.clickhouse)
        self._deriving = Deriving(context)
        self._parties = PartyStore(context.clickhouse)
        self._broker = Broker(context.settings)
        #: For a period, the ends that each stage must reach, found once the stage before was done.
        self._ends: dict[int, dict[str, dict[Place, int]]] = {}
        #: What is waited for, with the time since when it has not moved.
        self._waits: tuple[str, float] = ("", 0.0)
        #: What was derived of a cut that waits for a drift to be mended, and how often that was asked for.
        self._kept: Derived | None = None
        self._mends = 0
        self._said = ("", 0.0)
        #: Idle work and batches come on threads of their own.
        self._lock = threading.Lock()

    def topics(self) -> Sequence[str]:
        """`period-events`."""
        return [PERIOD_EVENTS]

    def do(self, batch: Batch) -> None:
        """Does a batch; see the steps above."""
        with self._lock, collector_paused():
            self._do(batch)
        gc.collect()  # orders and their lines refer to each other: of a close a gigabyte would stay until the next

    def idle(self, committed: Mapping[Place, int]) -> None:
        """Fixes the cut of requests that no longer wait for attestations."""
        if self._context.settings.attestation_days:
            with self._lock:
                self._look_for_attestations()

    def _do(self, batch: Batch) -> None:
        letters: list[DeadLetter] = []
        for record in batch.records:
            try:
                decoded = self._context.codec.decode(
                    record.value, ("UsageComplete", "CloseRequested", "CutFixed", "PeriodClosed")
                )
                if decoded.name == "UsageComplete":
                    self._attest(to_interchange("UsageComplete", decoded.value), record)
                elif decoded.name in ("CloseRequested", "CutFixed"):
                    value = decoded.value
                    accepted = [each for each in value["accept"] if each in ACCEPTABLE]
                    request = Request(str(value["period"]), record.offset, accepted, value["requested_by"])
                    try:
                        if decoded.name == "CloseRequested":
                            self._request(request)
                        else:
                            self._cut(request, value, record)
                    except CloseRefused as error:
                        self._answer(request, "refused", str(error))
                        raise
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

    def _request(self, request: Request) -> None:
        period = self._check(request.period)
        if period is None:
            self._answer(request, "closed", "was closed before")
        elif cut := self._documents.cut(period):
            self._close(period, cut, request)
        elif missing := self._missing(period, request):
            self._answer(request, "attestations", missing)
        else:
            self._answer(request, "waiting", "the cut is being fixed")
            self._fix(request)

    def _look_for_attestations(self) -> None:
        for request, said in self._documents.waiting_for_attestations(self._generation):
            try:
                period = self._check(request.period)
            except CloseRefused as error:
                self._answer(request, "refused", str(error))
                continue
            if period is None:
                self._answer(request, "closed", "was closed before")
            elif missing := self._missing(period, request):
                if missing != said:
                    self._answer(request, "attestations", missing)
            else:
                self._fix(request)
                self._answer(request, "waiting", "the cut is being fixed")

    def _missing(self, period: int, request: Request) -> str:
        """Whose attestations a close waits for, and until when; nothing when it does not, or no longer."""
        days = self._context.settings.attestation_days
        deadline = attestation_deadline(period, days)
        if not days or ATTESTATIONS in request.accepted or datetime.now(UTC) >= deadline:
            return ""
        missing = [f"{code} ({each.text})" for code, each in self._deriving.awaited(period).items()]
        if not missing:
            return ""
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        return f"waits until {deadline:%Y-%m-%d %H:%M} UTC for attestations of usage: {shown}"

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
        if not self._context.settings.close_any_period and not has_ended(period):
            raise CloseRefused(
                f"{text} can be closed from {month_start(period + 1).isoformat()} on (before, only by a worker whose "
                "setting close_any_period is true, and what it closes says so)"
            )
        return period

    def _fix(self, request: Request) -> None:
        ends = self._ends_now()
        value = {
            "period": request.period,
            "generation": self._generation,
            "cut": [
                {"topic": topic, "partition": partition, "end_offset": end}
                for (topic, partition), end in sorted(ends.items())
            ],
            "accept": request.accepted,
            "requested_by": request.requested_by,
        }
        self._context.outbox.send(PERIOD_EVENTS, self._context.codec.encode("CutFixed", value), key=request.period)
        self._context.outbox.flush()

    def _cut(self, request: Request, value: dict[str, Any], record: Record) -> None:
        period = self._check(request.period)
        if period is None:
            # Perhaps the process died after the period was written: whoever waits is told (again).
            self._say_closed(request.period)
            self._answer(request, "closed", "")
            return
        cut = self._documents.cut(period)
        if cut is None:
            self._check_cut(value)
            positions = {place_text(each["topic"], each["partition"]): each["end_offset"] for each in value["cut"]}
            issued_at, specimen = datetime.fromtimestamp(record.timestamp / 1000, UTC), self._context.settings.specimen
            imports = self._parties.imports()
            cut = Cut(value["generation"], record.offset, positions, issued_at, imports, specimen)
            self._documents.fix_cut(period, cut)
        self._close(period, cut, request)

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

    def _answer(self, request: Request, outcome: str, detail: str) -> None:
        self._documents.answer(request, self._generation, outcome, detail)
        self._said = (detail, time.monotonic())

    def _tell(self, request: Request, detail: str, *, often: bool = False) -> None:
        """Says how far the close is, if that is new; what is said `often` not at once."""
        said, at = self._said
        if detail != said and not (often and time.monotonic() - at < _TELL_SECONDS):
            self._answer(request, "waiting", detail)

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

    def _wait(self, period: int, cut: Cut, request: Request) -> str:
        """Waits for every stage, or says what lag was accepted.  Raises NotYet naming the stage that has work left.

        Raises CloseRefused when that stage has done nothing for long.  Lag of `charges` and `funding` may be
        accepted, for documents follow from the ledger; what the others have not done is missing in it.
        """
        if cut.generation != self._generation:
            return ""  # that life of the log has ended, and what it held is in the ledger
        settings, text = self._context.settings, month_text(period)
        first = {_place(place): end for place, end in cut.positions.items()}
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
                if stage == "charges":
                    self._say_all_is_used(ends["usage"])
                ends[stage] = self._broker.end_offsets([topic])
            behind = self._broker.behind(f"tribill-{stage}", ends[stage])
            if not behind:
                continue
            waits, may_be_accepted = f"{stage}: {behind} records to do before the cut", stage in ("charges", "funding")
            if may_be_accepted and LAG in request.accepted:
                return f"lag of {waits}"
            if waits != self._waits[0]:
                self._waits = (waits, time.monotonic())
            if time.monotonic() - self._waits[1] > settings.close_wait_seconds:
                raise CloseRefused(
                    f"{text} has waited for {waits}; none was done for {settings.close_wait_seconds} s. Start the role "
                    f"{stage} and ask again" + ("; or accept it with --accept-lag" if may_be_accepted else "")
                )
            raise NotYet(f"{text} waits for {waits}")
        return ""

    def _say_all_is_used(self, done: Mapping[Place, int]) -> None:
        """Tells every partition of charges how far `usage` is; it tells only those for which something changes.

        So that the accruals count what the cut does, and are compared with what is derived of it.
        """
        nothing = TOTALS_SCHEMA.empty_table()
        for (_, partition), end in done.items():
            if not end:
                continue  # nothing was ever accepted there
            block = totals_block(nothing, self._generation, partition, end, last=True)
            for target in range(self._context.settings.partitions):
                self._context.outbox.send(CHARGE_INPUTS, block, partition=target)
        self._context.outbox.flush()

    # --- step 4 ---

    def _close(self, period: int, cut: Cut, request: Request) -> None:
        decision = self._documents.decision(period, cut)
        try:
            lag = self._wait(period, cut, request) if decision is None else ""
            derived = self._derive(period, cut, request)
            if decision is None:
                decision = self._decide(derived, lag, request)
            # A million amounts, that the accruals alone are compared with: what lacks them is used no second time.
            self._kept = None
            derived.derivation.charges.clear()
            self._tell(request, "the documents are being made")
            try:
                issue = self._deriving.issue(derived, decision.accepted)
            except OutOfBalance as error:
                raise CloseRefused(str(error)) from error
        except NotYet as reason:
            self._tell(request, str(reason))
            raise
        except CloseRefused:
            self._forget(period)
            self._documents.refuse_cut(period, cut)
            raise
        self._documents.decide(period, cut, decision)
        self._write(derived, issue, decision, request)
        self._forget(period)

    def _forget(self, period: int) -> None:
        self._ends.pop(period, None)
        self._kept, self._mends = None, 0

    def _derive(self, period: int, cut: Cut, request: Request) -> Derived:
        if self._kept is not None and (self._kept.period, self._kept.cut) == (period, cut):
            return self._kept
        self._tell(request, "all is applied; the lines are being derived")
        return self._deriving.derive(period, cut)

    def _decide(self, derived: Derived, lag: str, request: Request) -> Decision:
        """What was found and accepted.  Raises CloseRefused for what was not, NotYet while a drift is being mended."""
        text, accepted = month_text(derived.period), [lag] if lag else []
        if derived.cut.issued_at < month_start(derived.period + 1):
            accepted.append("the cut was fixed before the period's end, which close_any_period allows")
        limit, units = self._suspense_limit_micros, derived.suspense_micros
        if limit is not None and units > limit:
            found = f"usage of {micros_text(units)} units in suspense, more than {micros_text(limit)}"
            if SUSPENSE not in request.accepted:
                raise CloseRefused(
                    f"{text} has {found} (suspense_limit). `tribill suspense list` says why; have the orders said and "
                    "ask again, or accept it with --accept-suspense"
                )
            accepted.append(found)
        # Accruals that have not caught up differ: of accepted lag there is nothing to compare.
        drift = drift_pence(self._context, derived.period, derived.derivation, derived.cut) if not lag else Fraction(0)
        if drift:
            found = f"the accruals differ from the ledger by {decimal(drift):.2f} pence"
            if DRIFT not in request.accepted:
                self._mend(derived, found)
            accepted.append(found)
        return Decision(decimal(drift), accepted, request.requested_by)

    def _mend(self, derived: Derived, found: str) -> None:
        """Asks for what differs to be rated again, a few times, and has the close wait for it; then refuses."""
        text = month_text(derived.period)
        if self._mends >= _MENDS:
            raise CloseRefused(
                f"{text}: {found}, also after they were rated again {_MENDS} times. That is a defect: report it with "
                "the logs of charges, usage and reconcile. The documents follow from the ledger alone; to issue "
                "them all the same: --accept-drift"
            )
        self._mends += 1
        self._kept = derived
        Reconcile(self._context).reconcile()
        ends = self._ends.setdefault(derived.period, {})
        for stage in ("usage", "charges", "funding"):
            ends.pop(stage, None)
        raise NotYet(f"{text}: {found}; they are being rated again ({self._mends} of {_MENDS})")

    # --- steps 5 and 6 ---

    def _write(self, derived: Derived, issue: Issue, decision: Decision, request: Request) -> None:
        period, cut, documents = derived.period, derived.cut, issue.documents
        text = month_text(period)
        self._evidence.insert_adjustments(period, issue.explained.causes, issue.explained.originals)
        self._evidence.insert_wanted(period, derived.derivation.wanted)
        rates = {key: rate for document in documents for key, rate in document.vat_rates_micros.items()}
        self._documents.insert_rows(period, "invoiced", derived.rows, rates)
        self._documents.insert_rows(period, "held", derived.held, {})
        self._documents.insert_statements(period, issue.statements)
        self._issue(period, issue, request)
        held = sum(derived.held.values())
        self._documents.insert_period(period, cut.generation, documents, held, decision.drift_pence)
        totals = {
            "documents": len(documents),
            "rows": len(derived.rows),
            "net": Decimal(sum(derived.rows.values())).scaleb(-2),
            "held": Decimal(held).scaleb(-2),
        }
        announced = self._context.codec.encode("PeriodClosed", {"period": text, "totals": totals})
        self._context.outbox.send(PERIOD_EVENTS, announced, key=text)
        self._context.outbox.flush()
        accepted = [f"accepted by {decision.requested_by or 'the request'}: {each}" for each in decision.accepted]
        self._answer(request, "closed", "; ".join(filter(None, [derived.notice(), *accepted])))
        metrics.ACCRUAL_DRIFT.set(float(decision.drift_pence))
        metrics.CLOSED_PERIOD.set(month_start(period + 1).timestamp())
        drift = str(decision.drift_pence)
        log.info("period closed", period=text, documents=len(documents), rows=len(derived.rows), drift=drift)

    def _issue(self, period: int, issue: Issue, request: Request) -> None:
        """Issues documents with their evidence, some megabytes at a time; meanwhile the next are made."""
        some: list[tuple[str, str]] = []
        first = size = 0
        with ThreadPoolExecutor(1) as aside:
            issued: Future[None] | None = None
            for number, evidence in enumerate(issue.explained.evidence_of(issue.documents), start=1):
                some.append(evidence)
                size += len(evidence[1])
                if size > SOME_CHARACTERS or number == len(issue.documents):
                    if issued is not None:
                        issued.result()
                    issued = aside.submit(self._issue_some, period, issue.documents[first:number], some)
                    self._tell(request, f"{number} of {len(issue.documents)} documents are made", often=True)
                    some, size, first = [], 0, number
            if issued is not None:
                issued.result()
        self._context.outbox.flush()

    def _issue_some(self, period: int, documents: Sequence[Document], evidence: Sequence[tuple[str, str]]) -> None:
        """Writes documents to the ledger and to `invoices`, where the longest go without what makes them long."""
        bodies = []
        for document in documents:
            body = sealed(document.as_json())
            text = json.dumps(body, separators=(",", ":"))
            bodies.append((document, text))
            if len(text) > _MESSAGE_CHARACTERS:
                left_out = {name: type(body[name])() for name in _LONG if name in body}
                text = json.dumps(body | left_out | {"lines_left_out": len(body["lines"])}, separators=(",", ":"))
            value = {"number": document.number, "period": body["period"], "body": text}
            self._context.outbox.send(INVOICES, self._context.codec.encode("Document", value), key=document.number)
        self._evidence.insert_evidence(period, evidence)
        self._documents.insert_documents(bodies)


def _place(text: str) -> Place:
    topic, _, partition = text.rpartition("/")
    return topic, int(partition)
