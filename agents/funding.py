"""Funding: draws ordering parties' allocations down, month by month, as charges want of them.

Reads `funding-inputs`, partitioned by ordering party: what each line's month wants, allocations,
memberships and list sizes, all absolute.  Writes one small row a party and month; a payer's share
of a line follows from it and the line's accrual in a query.

The order of steps for a batch:

1. The inputs are applied to the state of the partition.  The state holds for one offset; for any
   other it is read from the accruals and the ledger, which may know more than this offset: what
   then arrives again changes nothing.
2. The years touched are drawn down anew and their months inserted, with the batch's end as their
   version.  If the process dies after this, the batch is read again.  Then the batch is done.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

from agents.context import Context
from rating.amounts import Exact, pence
from rating.book import LineKey, Reference
from rating.calendar import financial_year
from rating.funding import allocation_exact, draw_down
from rating.records import ENGLAND, Allocation, ReferenceChange, read_reference_change
from sinks import metrics
from sinks.accruals import Accruals
from sinks.positions import place_text, version
from streams.agent import Agent
from streams.batch import Batch, Record
from streams.topics import FUNDING_INPUTS, REFERENCE_CHANGES, partition_for

#: An ordering party and a financial year.
PartyYear = tuple[str, int]


@dataclass(slots=True)
class _State:
    """What a partition's parties want of their allocations, as of an offset in funding-inputs."""

    offset: int
    partition: int
    reference: Reference = field(default_factory=Reference)
    positions: dict[str, int] = field(default_factory=dict)
    #: What each line wants of a party in a month, with the version that said so.
    wanted: dict[tuple[str, int], dict[LineKey, tuple[int, Fraction]]] = field(default_factory=dict)
    dirty: set[PartyYear] = field(default_factory=set)


class Funding(Agent):
    """The agent of role `funding`."""

    role: ClassVar[str] = "funding"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._accruals = Accruals(context.clickhouse)
        self._generation = context.settings.log_generation
        self._partitions = context.settings.partitions
        self._states: dict[int, _State] = {}

    def topics(self) -> Sequence[str]:
        """`funding-inputs`."""
        return [FUNDING_INPUTS]

    def do(self, batch: Batch) -> None:
        """Does a batch; see the steps above."""
        state = self._states.pop(batch.partition, None)
        if state is None or state.offset != batch.first_offset:
            state = self._restore(batch)
        for record in batch.records:
            self._apply(record, state)
        state.offset = batch.end_offset
        self._flush(state)
        self._states[batch.partition] = state
        metrics.RECORDS.labels(self.role, "accepted").inc(len(batch.records))

    def _restore(self, batch: Batch) -> _State:
        state = _State(batch.first_offset, batch.partition)
        everything = {place_text(REFERENCE_CHANGES, each): 2**62 for each in range(self._partitions)}
        for change in self._context.ledger.changes(REFERENCE_CHANGES, self._generation, everything):
            if change.accepted:
                state.reference.say(read_reference_change(change.body))
            if change.generation == self._generation:
                place = place_text(REFERENCE_CHANGES, change.partition)
                state.positions[place] = max(state.positions.get(place, 0), change.offset + 1)
        for line, month, said_at, parties, exact in self._accruals.wanted():
            for party, amount in zip(parties, exact, strict=True):
                if partition_for(party, self._partitions) == batch.partition:
                    state.wanted.setdefault((party, month), {})[line] = (said_at, Fraction(amount))
                    state.dirty.add((party, financial_year(month)))
        return state

    def _apply(self, record: Record, state: _State) -> None:
        decoded = self._context.codec.decode(record.value, ("AcceptedChanges", "WantedOfAllocations"))
        source = decoded.value["source"]
        if decoded.name == "WantedOfAllocations":
            said_at = version(source["generation"], source["end_offset"])
            for each in decoded.value["wanted"]:
                self._want(each, said_at, state)
            return
        place = place_text(source["topic"], source["partition"])
        counted = state.positions.get(place, 0)
        for each in decoded.value["changes"]:
            change = read_reference_change(json.loads(zlib.decompress(each["body"])))
            if each["offset"] >= counted:
                state.reference.say(change)
            # Marked even if known: a worker that has lost the partition may have written what it knew without.
            self._mark(change, state)
        state.positions[place] = max(counted, source["end_offset"])

    def _want(self, each: Any, said_at: int, state: _State) -> None:
        key = (each["ordering_party"], each["month"])
        line = (each["order_number"], each["item_id"], each["ods_code"])
        lines = state.wanted.setdefault(key, {})
        if line in lines and lines[line][0] > said_at:
            return  # from a worker that had lost its partition; its successor has said more
        exact = Fraction(each["exact_pence"])
        # A zero is kept with its version too: an older word may still come.
        lines[line] = (said_at, exact)
        state.dirty.add((key[0], financial_year(key[1])))

    def _mark(self, change: ReferenceChange, state: _State) -> None:
        """A party's own allocation is a matter of its year; all else may move any that is per patient."""
        body = change.body
        if isinstance(body, Allocation) and change.code != ENGLAND:
            if partition_for(change.code, self._partitions) == state.partition:
                state.dirty.add((change.code, body.financial_year))
            return
        state.dirty |= {(party, financial_year(month)) for party, month in state.wanted}

    def _flush(self, state: _State) -> None:
        now = version(self._generation, state.offset)
        by_year: dict[PartyYear, dict[int, Exact]] = {}
        for (party, month), lines in state.wanted.items():
            key = (party, financial_year(month))
            if key in state.dirty:
                total = sum((exact for _, exact in lines.values()), Fraction(0))
                by_year.setdefault(key, {})[month] = total
        rows = []
        for party, year in sorted(state.dirty):
            allocation = pence(allocation_exact(state.reference, party, year))
            drawn = draw_down(allocation, by_year.get((party, year), {}), year)
            rows += [(party, month, now, allocation, each) for month, each in drawn.items()]
        self._accruals.insert_drawn(rows)
        state.dirty.clear()
