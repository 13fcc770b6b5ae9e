"""What an agent is handed: consecutive records of one partition, done as a whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

#: 9999-12-30, in milliseconds since 1970.
LATEST_MS = 253_402_128_000_000


class NotYet(Exception):
    """A batch that can't be done before something else has happened; the message says what."""


def instant(timestamp_ms: int) -> datetime:
    """A record's broker timestamp; one that no calendar has is the nearest that one has."""
    return datetime.fromtimestamp(min(max(timestamp_ms, 0), LATEST_MS) / 1000, UTC)


class Record(Protocol):
    """A record as aiokafka delivers it."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of one partition in offset order; at least one."""

    topic: str
    partition: int
    records: Sequence[Record]

    @property
    def first_offset(self) -> int:
        """The offset of the first record."""
        return self.records[0].offset

    @property
    def end_offset(self) -> int:
        """One past the offset of the last record: what is committed when the batch is done."""
        return self.records[-1].offset + 1

    def since(self, offset: int) -> Batch | None:
        """The part of the batch from an offset on; None when nothing is left."""
        left = [record for record in self.records if record.offset >= offset]
        return Batch(self.topic, self.partition, left) if left else None
