"""Contracts: admits the changes of orders and hands them to the partitions of the orders' items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from agents.changes import ChangesAgent
from rating.admission import OrderLog
from rating.records import ContractChange, OrderPlaced, read_contract_change
from sinks.ledger import SaidChange
from sinks.positions import place_text
from streams.batch import Batch
from streams.topics import CHARGE_INPUTS, CONTRACT_CHANGES, partition_for


class Contracts(ChangesAgent[OrderLog]):
    """The agent of role `contracts`."""

    role: ClassVar[str] = "contracts"
    topic: ClassVar[str] = CONTRACT_CHANGES
    schema: ClassVar[str] = "ContractChange"
    key_field: ClassVar[str] = "order_number"

    def new_log(self, key: str) -> OrderLog:
        """An order's log."""
        return OrderLog(key)

    def read(self, value: Any) -> ContractChange:
        """A contract change."""
        return read_contract_change(value)

    def forward(self, batch: Batch, accepted: Sequence[SaidChange], logs: dict[str, OrderLog]) -> None:
        """Each change goes to the partitions of all items that its order has ever had.

        A partition that an order reaches for the first time needs all that was said of the order.
        """
        by_partition: dict[int, list[SaidChange]] = {each: [] for each in range(self._partitions)}
        by_order: dict[str, list[SaidChange]] = {}
        for change in accepted:
            by_order.setdefault(change.key, []).append(change)
        for number, ours in by_order.items():
            placings = [each for each in logs[number].accepted if isinstance(each.body, OrderPlaced)]
            new = {change.id for change in ours}
            before = self._reach(each for each in placings if each.id not in new)
            after = self._reach(placings)
            for partition in before:
                by_partition[partition] += ours
            if after - before:
                place = {place_text(self.topic, batch.partition): batch.first_offset}
                earlier = [
                    change
                    for change in self._context.ledger.changes(self.topic, self._generation, place)
                    if change.key == number and change.accepted
                ] if before else []  # fmt: skip
                for partition in after - before:
                    by_partition[partition] += [*earlier, *ours]
        for partition, changes in by_partition.items():
            self.send(CHARGE_INPUTS, partition, batch, "contract", changes)

    def _reach(self, placings: Any) -> set[int]:
        return {partition_for(line.item_id, self._partitions) for each in placings for line in each.body.lines}
