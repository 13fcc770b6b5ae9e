"""Runs `tribill` with a bug planted in the worker, which the harness must catch: its negative control.

`python -m chaos.planted NAME worker ROLE` stands in for `tribill worker ROLE`.  The product knows nothing
of this: each bug replaces some method in this process.
"""

from __future__ import annotations

import faulthandler
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

#: A worker's last word on an error in an agent; that of Polars is no Exception.
_ERROR = re.compile(r'^\{"event": "a bug|PanicException', re.MULTILINE)
#: So long is what a bug does too early ahead of what it should have waited for.
WINDOW_SECONDS = 2.0
#: The name of no bug.
NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug: how it is planted, and the fault that brings it out (role, table, moment, what is done there)."""

    name: str
    plant: Callable[[], None]
    role: str
    table: str
    moment: str
    action: str


def _claim_without_position() -> None:
    """Whatever is claimed is a duplicate: the retry after a crash finds its own claim and is dropped."""

    from agents.usage import _IDENTITY, Usage
    from sinks.claims import Claims

    claim, rows_of = Claims.claim, Usage._rows
    lane = threading.local()  # each lane does its batch in a thread

    def remember(self: Any, partition: int, identities: Any, claims: Any) -> Any:
        lane.fresh, after = claim(self, partition, identities, claims)
        return lane.fresh, after

    def without_claimed(self: Any, batch: Any) -> Any:
        rows, again = rows_of(self, batch)
        if rows.is_empty():
            return rows, again
        self._certainly_new(rows, batch.partition)
        claimed = rows.filter(~lane.fresh & (rows["revision"] == 0)).select(_IDENTITY).unique()
        if claimed.is_empty():
            return rows, again
        known = self._context.ledger.known_usage(claimed, self._generation, batch.first_offset)
        lost = claimed.join(rows.filter(lane.fresh), on=_IDENTITY, how="anti").join(known, on=_IDENTITY, how="anti")
        return rows.join(lost, on=_IDENTITY, how="anti"), again

    Claims.claim, Usage._rows = remember, without_claimed  # type: ignore[method-assign]


def _commit_before_insert() -> None:
    """A batch is committed when it is taken, not when it is done."""
    from faust.types import TP

    from streams.worker import Worker

    do = Worker._do

    async def commit_first(self: Any, lane: Any, batch: Any, event: Any) -> None:
        place = TP(batch.topic, batch.partition)
        self.app.consumer.finish(place, batch.end_offset)
        event.ack()
        await self.app.consumer.commit({place})
        with mock.patch.object(event, "ack"):
            await do(self, lane, batch, event)

    Worker._do = commit_first  # type: ignore[method-assign]


def _commit_before_totals() -> None:
    """What was sent is not waited for, and leaves a moment later."""
    from confluent_kafka import Producer

    from agents import context
    from streams import producer

    class Hasty(producer.Outbox):
        def __init__(self, settings: Any) -> None:
            patched = {"linger.ms": str(int(WINDOW_SECONDS * 1000)), "batch.num.messages": "100000"}
            with mock.patch.object(producer, "Producer", lambda found: Producer(found | patched)):
                super().__init__(settings)

        def flush(self) -> None:
            self._producer.poll(0)

    mock.patch.object(context, "Outbox", Hasty).start()


def _delta_instead_of_total() -> None:
    """Usage says by how much a day's total moved, and charges add it up."""
    import polars as pl
    import pyarrow as pa

    from agents.charges import Charges
    from agents.usage import Usage, _Totals
    from sinks.positions import place_text
    from streams.topics import USAGE_ACCEPTED

    total, apply, do = _Totals.add, Charges._apply_totals, Usage.do

    def moves(self: Any, changes: Any) -> Any:
        total(self, changes)
        return changes.with_columns(pl.col("quantity_micros").cast(pl.String))

    def add(self: Any, block: bytes, state: Any) -> None:
        with pa.ipc.open_stream(block) as reader:
            metadata, rows = reader.schema.metadata, reader.read_all().to_pylist()
        if b"again" in metadata:
            apply(self, block, state)  # reconciliation asks, and has no totals
            return
        place = place_text(USAGE_ACCEPTED, int(metadata[b"partition"]))
        counted = int(metadata[b"end_offset"]) >= state.positions.get(place, 0)
        days = [((row["item_id"], row["ods_code"]), row["day"]) for row in rows]
        before = [state.usage.get(service, {}).get(day, 0) for service, day in days]
        apply(self, block, state)
        for (service, day), known in zip(days, before, strict=True):
            state.usage[service][day] += known if counted else 0

    def linger(self: Any, batch: Any) -> None:
        do(self, batch)
        time.sleep(WINDOW_SECONDS)  # said, and not yet committed

    _Totals.add, Charges._apply_totals, Usage.do = moves, add, linger  # type: ignore[method-assign]


def _no_fencing() -> None:
    """All rows have one version, so the last one written stands, whoever wrote it."""
    from sinks.accruals import Accruals

    insert = Accruals.insert

    def unversioned(self: Any, rows: Any, version: int, partition: int) -> None:
        insert(self, rows, 1, partition)

    Accruals.insert = unversioned  # type: ignore[method-assign]


PLANTS = {
    plant.name: plant
    for plant in (
        Plant("claim-without-position", _claim_without_position, "usage", "usage", "before", "kill"),
        Plant("commit-before-insert", _commit_before_insert, "usage", "usage", "before", "kill"),
        Plant("commit-before-totals", _commit_before_totals, "usage", "usage", "after", "kill soon"),
        Plant("delta-instead-of-total", _delta_instead_of_total, "usage", "usage", "after", "kill soon"),
        Plant("no-fencing", _no_fencing, "charges", "accruals", "before", "pause"),
    )
}


def failed(directory: Path) -> bool:
    """Whether a worker met an error that nobody planted: then what differs shows nothing of the bug."""
    logs = (directory / "log").glob("worker-*")
    return any(_ERROR.search(log.read_text(errors="replace")) for log in logs)


def main() -> None:
    """Plants the bug, if one is named, and hands over."""
    from tribill.cli import main as tribill

    faulthandler.register(signal.SIGUSR1)
    if "faketime" in os.environ.get("LD_PRELOAD", ""):
        # With libfaketime 0.9.10, which leaves the monotonic clock alone here, Python's own sleep fails (EINVAL).
        mock.patch.object(time, "sleep", lambda seconds: select.select([], [], [], seconds)).start()
    if sys.argv[1] != NOTHING:
        PLANTS[sys.argv[1]].plant()
    sys.argv = ["tribill", *sys.argv[2:]]
    tribill()


if __name__ == "__main__":
    main()
