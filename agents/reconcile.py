"""Reconcile: compares accruals with what the ledger gives at the positions that they count, and has them mended.

A role of its own, so that comparing never holds up a stage.  It reads `period-events` only because
that topic has one partition: of several workers the one that holds it has the duty.  All is done
when idle, a partition of `charge-inputs` at a time, and pauses nine times as long as it took.

It writes no total and no accrual: those are their owners' to write, in the order of the log.  For
what differs it asks, and asking for nothing's sake does no harm:

1. `usage` (by a block without readings in `usage-accepted`) to forget the practices concerned and
   to say again, from the ledger, the totals of every day of which anything was ever said.
2. `charges` (by a block without totals in `charge-inputs`) to rate the lines again and write their
   rows, whatever it remembers of them.

If the process dies between, the next round finds what still differs and asks again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import Any, ClassVar

import structlog

from agents.charges import State, accrual_row, restore, touched
from agents.context import Context
from agents.intake import encode_block
from agents.usage import TOTALS_SCHEMA
from rating.book import Book, LineKey
from rating.calendar import first_day
from rating.charges import MonthCharge, rate_months
from sinks import metrics
from sinks.accruals import AccrualRow, Accruals, KeptAccrual, decimal
from sinks.positions import version
from streams.agent import Agent
from streams.batch import Batch
from streams.topics import CHARGE_INPUTS, PERIOD_EVENTS, USAGE_ACCEPTED, Place, partition_for

log = structlog.get_logger(__name__)

#: Orders whose rows are compared at once.
_ORDERS = 100
#: At most so many months of lines are asked for in a round; the rest is found by the next.
_ASKED = 5_000
_REST = 9
_LEAST_PAUSE_SECONDS = 60.0

#: A line's month.
LineMonth = tuple[LineKey, int]


@dataclass(slots=True)
class Drift:
    """By how much a partition's accruals differ from the ledger, as of an offset in charge-inputs."""

    offset: int
    compared: int = 0
    pence: Fraction = Fraction(0)
    quantity_micros: int = 0
    months: list[LineMonth] = field(default_factory=list)


class Reconcile(Agent):
    """The agent of role `reconcile`."""

    role: ClassVar[str] = "reconcile"
    idle_seconds: ClassVar[float] = 10

    def __init__(self, context: Context) -> None:
        self._context = context
        self._accruals = Accruals(context.clickhouse)
        self._generation = context.settings.log_generation
        self._partitions = context.settings.partitions
        self._due = time.monotonic() + _LEAST_PAUSE_SECONDS
        #: What a partition was like when nothing in it differed, and what was compared then.
        self._clean: dict[int, tuple[tuple[int, ...], Drift]] = {}

    def topics(self) -> Sequence[str]:
        """`period-events`; see above."""
        return [PERIOD_EVENTS]

    def do(self, batch: Batch) -> None:
        """Nothing: what happens to periods is not this role's business."""

    def idle(self, committed: Mapping[Place, int]) -> None:
        """Compares every partition when it is time to."""
        if time.monotonic() < self._due:
            return
        started = time.monotonic()
        self.reconcile()
        took = time.monotonic() - started
        self._due = time.monotonic() + max(_LEAST_PAUSE_SECONDS, _REST * took)

    def reconcile(self) -> int:
        """Compares every partition and asks for what differs to be mended; returns how many months of lines do."""
        found = 0
        for partition in range(self._partitions):
            drift = self._compare(partition)
            if drift is None:
                continue
            if drift.months:
                log.warning(
                    "accruals differ from the ledger",
                    partition=partition,
                    line_months=len(drift.months),
                    pence=str(decimal(drift.pence)),
                    first=str(drift.months[0]),
                )
                self._ask(drift.months[:_ASKED], partition)
            self._show(drift, partition)
            found += len(drift.months)
        metrics.RECONCILED.set_to_current_time()
        return found

    # --- comparing ---

    def _compare(self, partition: int) -> Drift | None:
        """None when nothing has been counted yet; where nothing has changed since all agreed, what was found then."""
        counted = self._accruals.newest(partition, self._generation)
        if counted is None:
            return None
        like = (*counted, *self._accruals.state_of(partition))
        if partition in self._clean and self._clean[partition][0] == like:
            return self._clean[partition][1]
        offset, horizon = counted
        state = restore(self._context, partition, offset)
        book = Book(state.orders.values(), state.reference, state.usage)
        drift = Drift(offset)
        numbers = iter(sorted(state.orders.keys() | self._accruals.orders(partition)))
        while some := list(islice(numbers, _ORDERS)):
            due = dict(self._due_of(some, state, book, horizon, partition))
            kept = {(each.line, each.month): each for each in self._accruals.kept(partition, some)}
            self._differences(due, kept, horizon, drift)
        if not drift.months:
            self._clean[partition] = (like, drift)
        return drift

    def _due_of(
        self, orders: Iterable[str], state: State, book: Book, horizon: int, partition: int
    ) -> Iterator[tuple[LineMonth, AccrualRow]]:
        """The rows that charges would write for these orders."""
        state.said_of_orders = dict.fromkeys(orders, -1)
        for order, item_id, lines, months in touched(state, book, horizon):
            if order.number in state.said_of_orders and partition_for(item_id, self._partitions) == partition:
                for month, charges in rate_months(order, item_id, months, book, lines):
                    for line in lines:
                        charge = charges.get(line.ods_code) or MonthCharge()
                        yield (line.key, month), accrual_row(line, month, charge, book)

    def _differences(
        self,
        due: Mapping[LineMonth, AccrualRow],
        kept: Mapping[LineMonth, KeptAccrual],
        horizon: int,
        drift: Drift,
    ) -> None:
        now = version(self._generation, drift.offset)
        for key in sorted(due.keys() | kept.keys()):
            row, standing = due.get(key), kept.get(key)
            if key[1] > horizon or (standing is not None and standing.version > now):
                continue  # written since: the next round compares it
            drift.compared += 1
            exact = (row.exact if row else Fraction(0)) - (standing.exact if standing else 0)
            quantity = (row.quantity_micros if row else 0) - (standing.quantity_micros if standing else 0)
            days = tuple((day, decimal(amount)) for day, amount in row.days) if row else ()
            if exact or quantity or days != (standing.days if standing else ()):
                drift.pence += abs(exact)
                drift.quantity_micros += abs(quantity)
                drift.months.append(key)

    # --- mending ---

    def _ask(self, months: Sequence[LineMonth], partition: int) -> None:
        services: dict[int, set[tuple[str, str]]] = {}
        for (_, item_id, ods_code), month in months:
            services.setdefault(month, set()).add((item_id, ods_code))
        days: dict[int, list[tuple[str, str, int]]] = {}
        for month, each in services.items():
            for day in self._context.ledger.days_said(each, first_day(month), first_day(month + 1)):
                days.setdefault(partition_for(day[0], self._partitions), []).append(day)
        for target, asked in days.items():
            for chunk in _chunks(asked):
                self._context.outbox.send(USAGE_ACCEPTED, _question(chunk), partition=target)
        for chunk in _chunks([(*line, month) for line, month in months]):
            self._context.outbox.send(CHARGE_INPUTS, _question(chunk), partition=partition)
        self._context.outbox.flush()
        metrics.REPAIRS.inc(len(months))

    # --- showing ---

    def _show(self, drift: Drift, partition: int) -> None:
        metrics.DRIFT.labels(str(partition)).set(float(decimal(drift.pence)))
        metrics.DRIFT_UNITS.labels(str(partition)).set(drift.quantity_micros / 1_000_000)
        metrics.DRIFT_ROWS.labels(str(partition)).set(len(drift.months))
        self._accruals.insert_reconciliation(
            partition,
            self._generation,
            drift.offset,
            drift.compared,
            len(drift.months),
            decimal(drift.pence),
            drift.quantity_micros,
        )


def _chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), 1_000):
        yield values[start : start + 1_000]


def _question(again: Sequence[Any]) -> bytes:
    """A block that holds nothing but what is to be said again."""
    return encode_block(TOTALS_SCHEMA.empty_table(), {"again": json.dumps(again)})
