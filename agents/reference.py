"""Reference: admits list sizes, memberships, closures, acceptances and allocations, and tells everyone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from agents.changes import ChangesAgent
from rating.admission import CodeLog
from rating.records import ReferenceChange, read_reference_change
from sinks.ledger import SaidChange
from streams.batch import Batch
from streams.topics import CHARGE_INPUTS, FUNDING_INPUTS, REFERENCE_CHANGES


class Reference(ChangesAgent[CodeLog]):
    """The agent of role `reference`."""

    role: ClassVar[str] = "reference"
    topic: ClassVar[str] = REFERENCE_CHANGES
    schema: ClassVar[str] = "ReferenceChange"
    key_field: ClassVar[str] = "code"

    def new_log(self, key: str) -> CodeLog:
        """A code's log."""
        return CodeLog(key)

    def read(self, value: Any) -> ReferenceChange:
        """A reference change."""
        return read_reference_change(value)

    def forward(self, batch: Batch, accepted: Sequence[SaidChange], logs: dict[str, CodeLog]) -> None:
        """Every partition of charges and of funding needs every list size, closure and allocation."""
        for partition in range(self._partitions):
            self.send(CHARGE_INPUTS, partition, batch, "reference", accepted)
            self.send(FUNDING_INPUTS, partition, batch, "reference", accepted)
