"""A Faust transport that hands over what was fetched as one message a partition, not one a record.

Faust spends about 170 microseconds on every message whatever is in it (DESIGN section 7); folding
a fetch into one message makes that a cost of the fetch.  A folded message has the offset of its
last record and the list of its records as its value, and acknowledging it commits one past that.

Why the bookkeeping is overridden: Faust commits up to the first gap between acknowledged offsets,
and folded offsets are nothing but gaps; and it acknowledges messages by itself that it skips after a
rebalance.  So what is committed is only what an agent has said to be finished, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from faust.transport.drivers import aiokafka as driver
from faust.types import TP


@dataclass(frozen=True, slots=True)
class Folded:
    """A fetch's records of one partition, with the attributes that Faust reads of a record."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    timestamp_type: int
    value: list[Any]
    headers: tuple[()] = ()
    key: None = None
    checksum: None = None
    serialized_key_size: int = 0
    serialized_value_size: int = 0


class Consumer(driver.Consumer):  # type: ignore[misc]  # faust is untyped
    """Folds each fetched partition into one message and commits what agents have finished."""

    def on_init(self) -> None:
        """Faust's hook: also called when the consumer is started again."""
        super().on_init()
        #: By partition, one past the last offset that its agent has done.
        self.finished: dict[TP, int] = {}

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """What was done but not committed is its next owner's to read again."""
        for tp in revoked:
            self.finished.pop(tp, None)
        await super().on_partitions_revoked(revoked)

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> dict[TP, list[Folded]]:
        fetched = await super()._getmany(active_partitions, timeout)
        return {tp: [_fold(records)] for tp, records in fetched.items() if records}

    def _new_offset(self, tp: TP) -> int | None:
        self._acked[tp].clear()
        self._acked_index[tp].clear()
        return self.finished.pop(tp, None)

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Gaps are the rule between folded messages; there is nothing to wait for in them."""


def _fold(records: list[Any]) -> Folded:
    last = records[-1]
    return Folded(last.topic, last.partition, last.offset, last.timestamp, last.timestamp_type, list(records))


class Transport(driver.Transport):  # type: ignore[misc]
    """Faust's aiokafka transport with the folding consumer."""

    Consumer = Consumer
