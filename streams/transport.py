"""A Faust transport that hands over what was fetched as one message a partition, not one a record.

Faust spends about 170 microseconds on every message whatever is in it (DESIGN section 7); folding
a fetch into one message makes that a cost of the fetch.  A folded message has the offset of its
last record and the list of its records as its value, and acknowledging it commits one past that.

Why the bookkeeping is overridden: Faust commits up to the first gap between acknowledged offsets,
and folded offsets are nothing but gaps; and it acknowledges messages by itself that it skips after a
rebalance.  So what is committed is only what an agent has said to be finished, in order.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from aiokafka.consumer import consumer, fetcher
from aiokafka.errors import KafkaTimeoutError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from streams.unfolding import bound_unfolding

#: An agent is handed no more records at once when their values have so many bytes.
BATCH_BYTES = 16 * 1024 * 1024
_NONE = TP("", -1)
#: A partition of which fewer bytes than this were handed over is not asked for again for so long: what a batch
#: costs whatever is in it would otherwise keep everything busy with batches of a few records.
_FEW_BYTES = 256 * 1024
REST_SECONDS = 0.4
#: A broker that is not asked for a partition, for records of it wait here, answers after so long.
_SOON_MS = 50


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


class _Records(fetcher.PartitionRecords):  # type: ignore[misc]  # aiokafka is untyped
    """What a fetch has of a partition, each record as the parser of the wire gives it.

    aiokafka would copy each into an object of its own, which takes longer than parsing it.
    """

    def _consumer_record(self, tp: TP, record: Any) -> Any:
        return record


class _Fetched(fetcher.FetchResult):  # type: ignore[misc]
    """What a fetch has of a partition, handed over in parts of a bounded size."""

    _partition_records: Any

    def getall(self, max_records: int | None = None) -> list[Any]:
        """The next records.  What was fetched may have been packed very small: it is unpacked as it is needed."""
        if not self.check_assignment(self._topic_partition) or not self.has_more():
            return []
        records: list[Any] = []
        size = 0
        for record in self._partition_records:
            records.append(record)
            size += len(record.value or b"")
            if size >= BATCH_BYTES or len(records) == max_records:
                self._update_position()
                return records
        self._update_position()
        self._partition_records = None
        if size < _FEW_BYTES:
            state = self._assignment.state_value(self._topic_partition)
            state.rests_until = time.monotonic() + REST_SECONDS
        return records


class _Fetcher(fetcher.Fetcher):  # type: ignore[misc]
    """What asks each broker for records, one request at a time.

    A request leaves out the partitions that rest or have records waiting here, and the broker may hold it for as
    long as the others have none (Faust lets it for 1.5 s): so long the ones left out could not be asked for.
    """

    _fetch_max_wait_ms: int

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, prefetch_backoff=_SOON_MS / 1000)
        self._patience_ms = self._fetch_max_wait_ms

    def _get_actions_per_node(self, assignment: Any) -> Any:
        now = time.monotonic()
        rests = {tp: getattr(assignment.state_value(tp), "rests_until", now) - now for tp in assignment.tps}
        awake = SimpleNamespace(tps=[tp for tp, rest in rests.items() if rest <= 0], state_value=assignment.state_value)
        soonest = min((rest for rest in rests.values() if rest > 0), default=self._patience_ms / 1000)
        self._fetch_max_wait_ms = min(math.ceil(soonest * 1000), _SOON_MS if self._records else self._patience_ms)
        requests, resets, seconds, *others = super()._get_actions_per_node(awake)
        return requests, resets, min(seconds, soonest), *others


fetcher.PartitionRecords, fetcher.FetchResult, consumer.Fetcher = _Records, _Fetched, _Fetcher


class _Thread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]  # faust is untyped
    """The thread that talks to the broker."""

    def _create_worker_consumer(self, transport: Any) -> Any:
        bound_unfolding()
        consumer = super()._create_worker_consumer(transport)
        # Faust also reads what a producer's transaction took back, unless it writes in some itself.
        consumer._isolation_level = "read_committed"
        return consumer

    def wake(self) -> None:
        """Has whoever waits for records look again."""
        if self._consumer is None:
            return
        fetching = self._consumer._fetcher

        def notify() -> None:
            for waiter in fetching._fetch_waiters:
                fetching._notify(waiter)

        self.thread_loop.call_soon_threadsafe(notify)

    def _state(self, tp: TP) -> Any:
        """What is known of a partition; None: it was taken away meanwhile, in the other thread."""
        subscription = self._ensure_consumer()._subscription.subscription
        assignment = subscription and subscription.assignment
        return assignment and assignment.state_value(tp)

    def highwater(self, tp: TP) -> int | None:
        """Where a partition ends for us: what lies behind the beginning of an open transaction can't be read yet.

        None: it is not known.
        """
        state = self._state(tp)
        return state.lso if state else None

    def reached(self, tp: TP) -> int | None:
        """Up to where a partition was fetched; None: it is not known.  (`position` waits until it is.)"""
        state = self._state(tp)
        return state._position if state else None

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        """Partitions may have been taken away since it was asked for; to commit none is an error."""
        held = {tp: offset for tp, offset in offsets.items() if tp in self.assignment()}
        return bool(held) and await super()._commit(held)


class Consumer(driver.Consumer):  # type: ignore[misc]  # faust is untyped
    """Folds each fetched partition into one message and commits what agents have finished."""

    def on_init(self) -> None:
        """Faust's hook: also called when the consumer is started again."""
        super().on_init()
        #: By partition, one past the last record handed over, done by its agent, and done but not committed.
        self._handed: dict[TP, int] = {}
        self._done: dict[TP, int] = {}
        self._finished: dict[TP, int] = {}
        #: Of which partitions records may be handed over.
        self._wanted: set[TP] = set()
        #: Counts the changes of hands: what was known before one says nothing of what is committed after it.
        self._hands = 0

    def finish(self, tp: TP, end_offset: int) -> None:
        """Says that all records of a partition before an offset are done; `commit` tells the broker."""
        self._done[tp] = self._finished[tp] = end_offset
        if self.flow_active and not self._is_in_hand(tp):
            self._wanted.add(tp)
            self._thread.wake()

    def reached(self, tp: TP) -> int | None:
        """Up to where a partition was fetched; None: it is not known."""
        found: int | None = self._thread.reached(tp)
        return found

    def _is_in_hand(self, tp: TP) -> bool:
        """Whether a batch of the partition is in hand or waits: so long its next stays with the fetcher."""
        handed = self._handed.get(tp)
        return handed is not None and handed != self._done.get(tp)

    def on_buffer_full(self, tp: TP) -> None:
        """Faust would leave a partition out until no batch of any waits: one that never rests starves all others."""

    def on_buffer_drop(self, tp: TP) -> None:
        """See on_buffer_full."""

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """What was done but not committed is its next owner's to read again."""
        self._begin_anew()
        await super().on_partitions_revoked(revoked)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """What was handed over before comes again.

        Nothing flows until Faust has gone back to what is committed: what it fetches meanwhile it drops, and where
        nothing was ever committed it does not go back.
        """
        self.stop_flow()
        self._begin_anew()
        await super().on_partitions_assigned(assigned, generation_id)

    def _begin_anew(self) -> None:
        """Whoever waits for records is given none any more, and nothing is known of what is in hand."""
        self._wanted &= {_NONE}
        self._hands += 1
        for known in (self._handed, self._done, self._finished):
            known.clear()

    async def perform_seek(self) -> None:
        """Goes back to what is committed.  When it takes too long Faust would end its recovery and never resume."""
        try:
            async with asyncio.timeout(self.app.conf.broker_request_timeout / 2):
                await super().perform_seek()
        except TimeoutError as error:
            raise KafkaTimeoutError("the broker does not say what is committed") from error

    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> dict[TP, list[Folded]]:
        active, hands = active_partitions or set(), self._hands
        # The fetcher takes no partition at all for all of them.
        self._wanted = {tp for tp in active if not self._is_in_hand(tp)} | {_NONE}
        fetched = await super()._getmany(self._wanted, timeout)
        folded = {tp: [_fold(tp, records)] for tp, records in fetched.items() if records}
        for tp, (message,) in folded.items():
            self._handed[tp] = message.offset + 1
            self._read_offset[tp] = None  # Faust drops what it takes for read, and what is in hand must be handed over
        if not folded:
            await self._commit_past_markers(active, hands)
        return folded

    async def _commit_past_markers(self, partitions: set[TP], hands: int) -> None:
        """Commits past what is no record, where no record is left: the markers that end transactions.

        Otherwise a close would wait for ever for a log that ends with one.  Not once partitions have changed hands
        since: what is in hand then is not known, and would be committed before it is done.
        """
        for tp in list(partitions):  # Faust changes its set meanwhile
            if self._hands != hands:
                return
            reached = None if self._is_in_hand(tp) else self.reached(tp)
            if reached is not None and reached > (self._done.get(tp) or self._committed_offset[tp] or 0):
                await self._commit_offsets({tp: reached})
                if tp in self._done and self._hands == hands:
                    self._handed[tp] = self._done[tp] = reached

    def _new_offset(self, tp: TP) -> int | None:
        self._acked[tp].clear()
        self._acked_index[tp].clear()
        return self._finished.pop(tp, None)

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Gaps are the rule between folded messages; there is nothing to wait for in them."""


def _fold(tp: TP, records: list[Any]) -> Folded:
    last = records[-1]
    return Folded(tp.topic, tp.partition, last.offset, last.timestamp, last.timestamp_type, records)


class Transport(driver.Transport):  # type: ignore[misc]
    """Faust's aiokafka transport with the folding consumer."""

    Consumer = Consumer
