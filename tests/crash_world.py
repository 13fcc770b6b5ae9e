"""A tribill in one process for crash tests: real agents, real ClickHouse and Redis, a log in memory.

The broker is not what is tested, so topics are lists.  Everything an agent does to the outside goes
through a `Fuse`, which can kill the agent before or after any single call: the agent object is then
thrown away, as a killed process loses its memory, and another one reads on from the last committed
offset.  What had been sent stays sent, what had been inserted stays inserted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeVar
from unittest import mock

import polars as pl
import pyarrow as pa

from agents.charges import Charges
from agents.context import Context
from agents.contracts import Contracts
from agents.explaining import Changes
from agents.funding import Funding
from agents.intake import Intake
from agents.period_close import PeriodClose
from agents.reconcile import Reconcile
from agents.reference import Reference
from agents.usage import ALIKE, Usage
from rating.amounts import Exact, pence
from rating.book import Book
from rating.calendar import financial_year, month_of, parse_month
from rating.close import csv_rows, derive
from rating.evidence import read_evidence, rederive
from rating.funding import allocation_exact, draw_down
from sinks.accruals import Accruals, decimal, fraction_text
from sinks.claims import Claims
from sinks.clickhouse import ClickHouse
from sinks.dead_letters import DeadLetters
from sinks.documents import Documents
from sinks.ledger import Ledger
from sinks.positions import place_text
from streams.batch import Batch, NotYet
from streams.codec import Codec
from streams.settings import Settings
from streams.topics import (
    ACCRUALS,
    CHARGE_INPUTS,
    CONTRACT_CHANGES,
    FUNDING_INPUTS,
    INVOICES,
    PERIOD_EVENTS,
    REFERENCE_CHANGES,
    USAGE_ACCEPTED,
    configurations,
    input_topics,
    partition_for,
    usage_topics,
)
from tests.oracle.strategies import ARRIVAL
from tribill.interchange import Publisher

Place = tuple[str, int]
Found = TypeVar("Found")

#: Topics that no agent reads: how many records of them were sent before a crash makes no difference.
UNREAD = (ACCRUALS, INVOICES)
_ARRIVAL_MS = int(ARRIVAL.timestamp() * 1000)


class CrashNow(BaseException):
    """The process is killed here; no `except Exception` may save it."""


@dataclass(slots=True)
class Entry:
    """A record of the log in memory."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


@dataclass(slots=True)
class Fuse:
    """Counts an agent's calls to the outside and kills it at one of them.

    `at` counts from 1; 0 never blows.  `before`: the call is not made any more; else it was made.
    `meanwhile`: it is not killed there but stopped, and goes on when that has happened.
    """

    at: int = 0
    before: bool = False
    meanwhile: Callable[[], None] | None = None
    calls: list[str] = field(default_factory=list)

    def call(self, name: str, action: Callable[[], Found]) -> Found:
        """Makes a call, or dies of it."""
        self.calls.append(name)
        now = len(self.calls) == self.at
        if now and self.before:
            self._blow(f"before {name}")
        result = action()
        if now and not self.before:
            self._blow(f"after {name}")
        return result

    def _blow(self, where: str) -> None:
        if self.meanwhile is None:
            raise CrashNow(where)
        self.meanwhile()


class MemoryLog:
    """Topics as lists, with every record stamped a millisecond later than the one before."""

    def __init__(self, settings: Settings) -> None:
        self.counts = {name: count for name, (count, _) in configurations(settings).items()}
        self.records: dict[Place, list[Entry]] = {
            (name, partition): [] for name, count in self.counts.items() for partition in range(count)
        }
        #: Every message on `invoices`, by its key.
        self.invoices: dict[Any, set[Any]] = {}
        self._clock = _ARRIVAL_MS

    def append(self, topic: str, value: bytes | None, key: str | bytes | None, partition: int) -> Place:
        """Adds a record; returns the partition that it went to."""
        raw = key.encode() if isinstance(key, str) else key
        if partition < 0:
            partition = partition_for((raw or b"").decode(errors="replace"), self.counts[topic])
        entries = self.records[topic, partition]
        self._clock += 1
        entries.append(Entry(len(entries), self._clock, raw, value))
        return topic, partition

    def end(self, place: Place) -> int:
        """One past the last offset."""
        return len(self.records[place])


class MemoryOutbox:
    """What agents send, into the log: at once (the worst case for a crash) or only when flushed.

    `held`: a worker that was cut off; what it sent arrives when `release` is called.
    """

    def __init__(self, log: MemoryLog, fuse: Fuse, *, eager: bool = True, held: bool = False) -> None:
        self._log = log
        self._fuse = fuse
        self._eager = eager and not held
        self.held = held
        self._waiting: list[tuple[str, bytes | None, str | bytes | None, int]] = []
        self._unread_seen: set[str] = set()

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: str | bytes | None = None,
        partition: int = -1,
        timestamp_ms: int = 0,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """As `streams.producer.Outbox.send`."""
        record = (topic, value, key, partition)
        if topic == INVOICES:
            self._log.invoices.setdefault(key, set()).add(value)
        if topic in UNREAD:
            return
        if self._eager:
            self._fuse.call(f"send {topic}", lambda: self._log.append(*record))
        else:
            self._fuse.call(f"send {topic}", lambda: self._waiting.append(record))

    def flush(self) -> None:
        """As `streams.producer.Outbox.flush`."""
        self._fuse.call("flush", lambda: None if self.held else self.release())

    def release(self) -> None:
        """What waits arrives."""
        waiting, self._waiting = self._waiting, []
        for record in waiting:
            self._log.append(*record)


class FusedClickHouse(ClickHouse):
    """ClickHouse, with every write behind the fuse."""

    def __init__(self, settings: Settings, fuse: Fuse, client: Any) -> None:
        super().__init__(settings)
        self._fuse = fuse
        self._client = client

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self._fuse.call(f"insert {table}", lambda: super(FusedClickHouse, self).insert(table, columns, rows))

    def insert_arrow(self, table: str, rows: pa.Table) -> None:
        if rows.num_rows:
            self._fuse.call(f"insert {table}", lambda: super(FusedClickHouse, self).insert_arrow(table, rows))

    def command(self, statement: str, parameters: Any = None) -> None:
        self._fuse.call("command", lambda: super(FusedClickHouse, self).command(statement, parameters))


class FusedClaims(Claims):
    """The claim store, behind the fuse."""

    fuse: Fuse

    def claim(self, partition: int, identities: pl.Series, claims: pl.Series) -> Any:
        return self.fuse.call("claim", lambda: super(FusedClaims, self).claim(partition, identities, claims))


class FusedContext(Context):
    """An agent's context over the log in memory."""

    def __init__(self, role: str, world: World, fuse: Fuse, *, eager: bool, held: bool) -> None:
        self.fuse = fuse
        self.settings = world.settings
        self.codec = world.codec
        self.outbox = MemoryOutbox(world.log, fuse, eager=eager, held=held)  # type: ignore[assignment]
        self.clickhouse = FusedClickHouse(world.settings, fuse, world.clickhouse._client)
        self.ledger = Ledger(self.clickhouse)
        self.dead_letters = DeadLetters(role, world.settings.log_generation, self.clickhouse, self.outbox, self.codec)

    def claims(self) -> Claims:
        claims = FusedClaims(self.settings, lambda: not self.ledger.has_usage())
        claims.fuse = self.fuse
        return claims


class _LogBroker:
    """What the close asks of the broker: where each partition ends."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    def end_offsets(self, topics: Iterable[str]) -> dict[Place, int]:
        wanted = set(topics)
        return {place: len(entries) for place, entries in self._log.records.items() if place[0] in wanted}


AGENTS: dict[str, Any] = {
    "intake": Intake,
    "contracts": Contracts,
    "reference": Reference,
    "usage": Usage,
    "charges": Charges,
    "funding": Funding,
    "period-close": PeriodClose,
}


def same(what: str, found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    """Says what differs, as (found, expected)."""
    different = {
        key: (found.get(key), expected.get(key))
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    }
    assert not different, f"{what}, (found, expected): {different}"


class World:
    """An installation: log, ledger, claims, and one agent a role."""

    def __init__(
        self,
        clickhouse: str,
        redis: str,
        horizon: str,
        suppliers: Iterable[str] = (),
        **settings: Any,
    ) -> None:
        wanted: dict[str, Any] = {
            "kafka": "127.0.0.1:1",
            "clickhouse": clickhouse,
            "redis": redis,
            "partitions": 2,
            "supplier_topics": ",".join(suppliers),
            # So that claims alone decide what is new: without it all usage of a test's past is looked up.
            "claim_window_days": 20_000,
            "horizon_month": horizon,
            "close_any_period": True,
        }
        self.settings = Settings(**(wanted | settings))
        self.codec = Codec(self.settings)
        self.log = MemoryLog(self.settings)
        with mock.patch("tribill.interchange.Outbox", return_value=MemoryOutbox(self.log, Fuse())):
            self._publisher = Publisher(self.settings)
        self.clickhouse = ClickHouse(self.settings)
        self.clickhouse.migrate()
        self.documents = Documents(self.clickhouse)
        self.committed: dict[tuple[str, Place], int] = {}
        self.agents: dict[str, Any] = {}
        #: Each batch that was done, with the agent's calls.
        self.done: list[tuple[str, list[str]]] = []
        #: Asked before each batch; True: it is not done now.
        self.on_batch: Callable[[str, Place, Batch], bool] | None = None

    def drop(self) -> None:
        """Gives the database back."""
        self.clickhouse.command(f"DROP DATABASE {self.clickhouse.database}")

    # --- the log ---

    def say(self, line: dict[str, Any]) -> None:
        """An interchange line, encoded as `tribill publish` does."""
        self._publisher.send_record(line["topic"], line["value"])

    def request_close(self, period: str, *accept: str) -> int:
        """Asks for a close; returns the request's offset."""
        request = {"period": period, "accept": [*accept], "requested_by": "tester"}
        self.log.append(PERIOD_EVENTS, self.codec.encode("CloseRequested", request), period, 0)
        return self.log.end((PERIOD_EVENTS, 0)) - 1

    def places(self, role: str) -> list[Place]:
        """The partitions that a role reads."""
        topics = {
            "intake": usage_topics(self.settings),
            "contracts": [CONTRACT_CHANGES],
            "reference": [REFERENCE_CHANGES],
            "usage": [USAGE_ACCEPTED],
            "charges": [CHARGE_INPUTS],
            "funding": [FUNDING_INPUTS],
            "period-close": [PERIOD_EVENTS],
        }[role]
        return [place for place in self.log.records if place[0] in topics]

    def waiting(self, role: str, place: Place) -> int:
        """How many records a role has still to do in a partition."""
        return self.log.end(place) - self.committed.get((role, place), 0)

    def batch(self, place: Place, first: int, size: int) -> Batch:
        """Records of a partition."""
        return Batch(*place, self.log.records[place][first : first + size])

    # --- the agents ---

    def start(self, role: str, fuse: Fuse | None = None, *, eager: bool = True, held: bool = False) -> Any:
        """A new agent, which knows nothing yet."""
        agent = AGENTS[role](FusedContext(role, self, fuse or Fuse(), eager=eager, held=held))
        if isinstance(agent, PeriodClose):
            agent._broker = _LogBroker(self.log)  # type: ignore[assignment]
            agent._wait = lambda period, cut, request: ""  # type: ignore[method-assign]  # there is no consumer group
        return agent

    def step(self, role: str, place: Place, size: int = 10_000) -> bool:
        """The role's agent does the next batch; False when it died of it and must be started anew."""
        first = self.committed.get((role, place), 0)
        agent = self.agents.get(role)
        if agent is None:
            agent = self.agents[role] = self.start(role)
        batch = self.batch(place, first, size)
        before = len(agent._context.fuse.calls)
        try:
            if self.on_batch is not None and self.on_batch(role, place, batch):
                return False
            agent.do(batch)
        except CrashNow:
            del self.agents[role]
            return False
        except NotYet:
            return False
        self.done.append((role, agent._context.fuse.calls[before:]))
        self.committed[role, place] = batch.end_offset
        return True

    def crash(self, role: str, batch: Batch, at: int, *, before: bool = False, eager: bool = True) -> bool:
        """Another agent of the role does a batch and is killed at a call; False when it made fewer calls.

        What the batch left is there, its offset is not committed, and no agent knows of it.
        """
        self.agents.pop(role, None)
        try:
            self.start(role, Fuse(at, before), eager=eager).do(batch)
        except CrashNow:
            return True
        return False

    def stopped(self, role: str, batch: Batch, at: int, meanwhile: Callable[[], None], *, held: bool = False) -> Any:
        """Another agent of the role does a batch, is stopped before a call while its successor works, and goes on.

        What it has done is not committed.  Returns it when it came to that call.
        """
        self.agents.pop(role, None)
        fuse = Fuse(at, before=True, meanwhile=meanwhile)
        zombie = self.start(role, fuse, held=held)
        with suppress(NotYet):  # it has seen that another took over
            zombie.do(batch)
        if len(fuse.calls) < at:
            # It has done the batch, and went on only because all that it sent was acknowledged.
            zombie._context.outbox.release()
            return None
        return zombie

    def drain(self, roles: Iterable[str] = AGENTS, size: int = 10_000) -> None:
        """Every stage does all that there is."""
        for role in roles:
            for place in self.places(role):
                while self.waiting(role, place):
                    self.step(role, place, size)

    def reconcile(self) -> int:
        """Compares all accruals with the ledger and asks for what differs to be mended, once."""
        return Reconcile(FusedContext("reconcile", self, Fuse(), eager=True, held=False)).reconcile()

    # --- what came out ---

    def dead_letters(self) -> list[tuple[Any, ...]]:
        """What was refused, and why."""
        return self.clickhouse.query(
            "SELECT toString(agent), toString(topic), partition, offset, index, field, reason FROM dead_letters FINAL"
            " ORDER BY ALL"
        )

    def book(self) -> Book:
        """What the ledger says of all that is in the log."""
        ends = {place_text(*place): self.log.end(place) for place in self.log.records}
        context = self.start("intake")._context
        usage = context.ledger.totals_at_cut(
            self.settings.log_generation,
            {text: end for text, end in ends.items() if text.rpartition("/")[0] in input_topics(self.settings)},
        )
        return Changes(context, self.settings.log_generation, ends).known(usage).book

    def check_closes(self, expected: Iterable[Any]) -> None:
        """The closed rows are the oracle's, and the accruals agreed with them at each cut."""
        for close in expected:
            period = parse_month(close.period)
            for kind, rows in (("invoiced", close.lines), ("held", close.held)):
                found = [tuple(row) for row in csv_rows(self.documents.rows(period, kind), period)]
                assert found == [tuple(row) for row in rows], f"{kind} of {close.period}"
            self._check_explained(period)
        drifts = self.clickhouse.query("SELECT period, toString(drift_pence) FROM periods FINAL WHERE drift_pence != 0")
        assert drifts == [], f"{drifts} the accruals differed from the ledger at a close (promise 3)"
        # No FINAL: what an attempt that died has written counts, too.
        key = "toString((order_number, item_id, ods_code, supplier_id, payer, month))"
        bodies = f"""
            SELECT period, number AS name, body FROM documents
            UNION ALL SELECT period, concat('evidence of ', number), body FROM evidence
            UNION ALL SELECT period, concat(kind, code), body FROM statements
            UNION ALL SELECT period, concat(kind, {key}), toString((pence, vat_rate_micros)) FROM document_rows
            UNION ALL SELECT period, concat('cause of ', {key}),
                             toString((cause, is_release, original_document)) FROM adjustments
            UNION ALL SELECT period, concat(ordering_party, toString(month)), pence FROM allocations_wanted
            UNION ALL SELECT period, 'totals', toString((documents, rows, net_pence, held_pence)) FROM periods
        """  # names of ours
        different = self.clickhouse.query(
            f"SELECT period, name FROM ({bodies}) GROUP BY period, name HAVING uniqExact(body) > 1"
        )
        assert different == [], "a close that was repeated wrote other bytes"
        for number, messages in self.log.invoices.items():
            assert len(messages) == 1, f"a close that was repeated announced other bytes of {number}"

    def _check_explained(self, period: int) -> None:
        """Each document's rows come out of its evidence, and each of its adjustments has its cause."""
        rows = self.documents.rows(period, "invoiced")
        evidence = dict(self.documents.evidence.evidence(period, self.documents.numbers(period)))
        rederived: dict[Any, int] = {}
        for number, _, body in self.documents.documents(period):
            text = evidence.pop(number)
            assert hashlib.sha256(text.encode()).hexdigest() == body["evidence_sha256"], number
            rederived |= rederive(read_evidence(json.loads(text)))
            for line in body["lines"]:
                assert bool(line.get("cause")) == (line["kind"] == "adjustment"), line
        assert rederived == rows
        assert not evidence

    def check_state(self) -> None:
        """Accruals, cached totals and allocations drawn are what the ledger gives (promise 3)."""
        horizon = parse_month(self.settings.horizon_month)
        book = self.book()
        derived = derive(book, horizon)
        exact = {key: amount for key, amount in derived.exact.items() if amount}
        rows = Accruals(self.clickhouse).exact_rows(horizon)
        accrued = {(line, month): Fraction(exact) for line, months in rows for month, exact, _ in months}
        same("accruals", {key: amount for key, amount in accrued.items() if amount}, exact)
        self._check_totals(book)
        self._check_drawn(book, derived.wanted)

    def _check_totals(self, book: Book) -> None:
        standing = {
            (item_id, ods_code, day): quantity
            for (item_id, ods_code), days in book.usage.items()
            for day, quantity in days.items()
            if quantity
        }
        if charges := self.agents.get("charges"):
            held = {
                (*service, day): quantity
                for state in charges._states.values()
                for service, days in state.usage.items()
                for day, quantity in days.items()
                if quantity
            }
            ours = set(charges._states)
            expected = {
                key: quantity
                for key, quantity in standing.items()
                if partition_for(key[0], self.settings.partitions) in ours
            }
            same("day totals that charges have been told", held, expected)
        if usage := self.agents.get("usage"):
            for partition, totals in usage._totals.items():
                cached = {
                    (item_id, ods_code, day): quantity
                    for (ods_code, item_id), days in totals.micros.items()
                    for day, quantity in days.items()
                    if quantity
                }
                expected = {
                    key: each
                    for key, each in standing.items()
                    if (key[1][:ALIKE], month_of(key[2])) in totals.known
                    and partition_for(key[1], self.settings.partitions) == partition
                }
                same("day totals in the usage agent's memory", cached, expected)

    def _check_drawn(self, book: Book, wanted: dict[tuple[str, int], Exact]) -> None:
        found = {
            (party, month): (allocation, total, coverage)
            for party, month, allocation, total, coverage in self.clickhouse.query(
                "SELECT ordering_party, month, allocation_pence, wanted_pence, coverage FROM allocations_drawn FINAL"
            )
        }
        by_year: dict[tuple[str, int], dict[int, Exact]] = {}
        for (party, month), amount in wanted.items():
            by_year.setdefault((party, financial_year(month)), {})[month] = amount
        for (party, year), months in by_year.items():
            allocation = allocation_exact(book.reference, party, year)
            for month, drawn in draw_down(allocation, months, year).items():
                if months.get(month):
                    row = (
                        decimal(pence(allocation)),
                        decimal(pence(drawn.wanted)),
                        fraction_text(drawn.coverage),
                    )
                    assert found.pop((party, month)) == row, f"drawn of {party} in {month}"
        rest = {key: row for key, row in found.items() if row[1] != Decimal(0)}
        assert rest == {}, "allocations drawn by what wants nothing"
