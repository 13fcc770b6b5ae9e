"""Runs `tribill` with a bug planted in the worker, which the harness must catch: its negative control.

`python -m chaos.planted NAME worker ROLE` stands in for `tribill worker ROLE`.  The product knows nothing
of this: each bug replaces some method in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

#: So long is what a bug does too early ahead of what it should have waited for.
WINDOW_SECONDS = 2.0


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
    from agents.usage import Usage
    from sinks.claims import Claims

    claimed: set[str] = set()
    claim, judge = Claims.claim, Usage._judge_copies

    def remember(self: Any, identities: Any, claims: Any) -> Any:
        standing, after = claim(self, identities, claims)
        claimed.clear()
        claimed.update(identity for identity, each in zip(identities, standing, strict=True) if each is not None)
        return standing, after

    def drop(self: Any, copies: Any, batch: Any, outcome: Any) -> None:
        generation, offset = self._generation, batch.first_offset
        names = ("ods_code", "supplier_id", "id")
        identities = {tuple(row[name] for name in names) for row in copies.iter_rows(named=True)}
        rows = self._context.ledger.known_usage(identities, generation, offset)
        known = {tuple(row[name] for name in names) for row in rows}
        kept = [
            row
            for row in copies.iter_rows(named=True)
            if tuple(row[name] for name in names) in known
            or row["revision"]
            or f"{row['supplier_id']}/{row['ods_code']}/{row['id']}" not in claimed
        ]
        judge(self, copies.clear() if not kept else type(copies)(kept, schema=copies.schema), batch, outcome)

    Claims.claim, Usage._judge_copies = remember, drop  # type: ignore[method-assign]


def _commit_before_insert() -> None:
    """A batch is committed when it is taken, not when it is done."""
    from faust.types import TP

    from streams.worker import Worker

    do = Worker._do

    async def commit_first(self: Any, event: Any) -> None:
        message = event.message
        place = TP(message.topic, message.partition)
        self.app.consumer.finished[place] = message.value[-1].offset + 1
        event.ack()
        await self.app.consumer.commit({place})
        with mock.patch.object(event, "ack"):
            await do(self, event)

    Worker._do = commit_first  # type: ignore[method-assign]


def _commit_before_totals() -> None:
    """What was sent is not waited for, and leaves a moment later."""
    from streams import producer

    class Hasty(producer.Outbox):
        def __init__(self, settings: Any) -> None:
            patched = {"linger.ms": str(int(WINDOW_SECONDS * 1000)), "batch.num.messages": "100000"}
            make = producer.Producer
            with mock.patch.object(producer, "Producer", lambda found: make(found | patched)):
                super().__init__(settings)

        def flush(self) -> None:
            self._producer.poll(0)

    from agents import context

    context.Outbox = Hasty  # type: ignore[misc]


def _delta_instead_of_total() -> None:
    """Usage says by how much a day's total moved, and charges add it up."""
    from agents.charges import Charges, State
    from agents.usage import Usage

    judge, publish, apply = Usage._judge, Usage._publish, Charges._apply_totals
    moved: dict[Any, int] = {}

    def remember(self: Any, rows: Any, batch: Any) -> Any:
        outcome = judge(self, rows, batch)
        moved.clear()
        moved.update(outcome.change)
        return outcome

    def publish_moves(self: Any, batch: Any, totals: Mapping[Any, int]) -> None:
        publish(self, batch, dict(moved))

    def add(self: Any, block: bytes, state: State) -> None:
        before = {service: dict(days) for service, days in state.usage.items()}
        positions = dict(state.positions)
        apply(self, block, state)
        if state.positions != positions:
            for service, days in _said(block):
                for day in days:
                    state.usage[service][day] += before.get(service, {}).get(day, 0)

    Usage._judge, Usage._publish = remember, publish_moves  # type: ignore[method-assign]
    Charges._apply_totals = add  # type: ignore[method-assign]


def _said(block: bytes) -> Iterable[tuple[tuple[str, str], list[int]]]:
    import pyarrow as pa

    with pa.ipc.open_stream(block) as reader:
        rows = reader.read_all().to_pylist()
    return [((row["item_id"], row["ods_code"]), [row["day"]]) for row in rows]


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
        Plant("delta-instead-of-total", _delta_instead_of_total, "usage", "usage", "after", "kill"),
        Plant("no-fencing", _no_fencing, "charges", "accruals", "before", "pause"),
    )
}


def main() -> None:
    """Plants the bug and hands over."""
    from tribill.cli import main as tribill

    PLANTS[sys.argv[1]].plant()
    sys.argv = ["tribill", *sys.argv[2:]]
    tribill()


if __name__ == "__main__":
    main()
