"""What the agents of contract changes and of reference changes have in common.

The order of steps for a batch:

1. Each change is decoded and admitted or refused against what stands before it in the log of its
   order or code.  The logs in memory hold for one offset; for any other they are read from the
   ledger, which has every decision.
2. All decisions go into the ledger.  If the process dies after this, the batch is read again,
   decided the same way, and the same rows collapse.
3. What was accepted goes on, what was refused to the dead letters, and the broker acknowledges
   both.  Only then is the batch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from agents.context import Context
from rating.records import Refused
from sinks import metrics
from sinks.dead_letters import DeadLetter
from sinks.ledger import SaidChange
from sinks.positions import place_text
from streams.agent import Agent
from streams.batch import Batch, Record
from streams.codec import Undecodable, from_interchange, read_json, to_interchange
from streams.topics import partition_for


class KeyLog(Protocol):
    """The log of one order or code: `rating.admission.OrderLog` or `CodeLog`."""

    def admit(self, value: Any) -> Any:
        """The accepted change, None for a duplicate; raises Refused."""

    def restore(self, change: Any) -> None:
        """Adds a change accepted before."""

    def restore_refused(self, value: Any) -> None:
        """Takes the id of a change refused before."""


Log = TypeVar("Log", bound=KeyLog)


@dataclass(slots=True)
class _Logs(Generic[Log]):
    """The logs of a partition's orders or codes, as of an offset."""

    offset: int
    by_key: dict[str, Log] = field(default_factory=dict)


@dataclass(slots=True)
class Decided(Generic[Log]):
    """What a batch's records came to, in log order."""

    changes: list[SaidChange] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)
    #: Each accepted change with its log as it was before and is after.
    duplicates: int = 0


class ChangesAgent(Agent, Generic[Log]):
    """Admits the changes of one topic."""

    role: ClassVar[str]
    topic: ClassVar[str]
    schema: ClassVar[str]
    key_field: ClassVar[str]

    def __init__(self, context: Context) -> None:
        self._context = context
        self._generation = context.settings.log_generation
        self._partitions = context.settings.partitions
        self._logs: dict[int, _Logs[Log]] = {}

    def new_log(self, key: str) -> Log:
        """An empty log of an order or code."""
        raise NotImplementedError

    def read(self, value: Any) -> Any:
        """A change from its interchange form."""
        raise NotImplementedError

    def forward(self, batch: Batch, accepted: Sequence[SaidChange], logs: dict[str, Log]) -> None:
        """Hands what was accepted to the outbox."""
        raise NotImplementedError

    def topics(self) -> Sequence[str]:
        """The topic of these changes."""
        return [self.topic]

    def do(self, batch: Batch) -> None:
        """Does a batch; see the steps above."""
        logs = self._logs.pop(batch.partition, None)
        if logs is None or logs.offset != batch.first_offset:
            logs = self._restore(batch)
        decided: Decided[Log] = Decided()
        for record in batch.records:
            self._decide(batch, record, logs, decided)
        self._context.ledger.insert_changes(self.topic, decided.changes)
        accepted = [change for change in decided.changes if change.accepted]
        self.forward(batch, accepted, logs.by_key)
        self._context.dead_letters.write(decided.letters)
        self._context.outbox.flush()
        logs.offset = batch.end_offset
        self._logs[batch.partition] = logs
        metrics.RECORDS.labels(self.role, "accepted").inc(len(accepted))
        metrics.RECORDS.labels(self.role, "duplicate").inc(decided.duplicates)

    def _restore(self, batch: Batch) -> _Logs[Log]:
        logs: _Logs[Log] = _Logs(batch.first_offset)
        place = place_text(self.topic, batch.partition)
        for change in self._context.ledger.changes(self.topic, self._generation, {place: batch.first_offset}):
            if partition_for(change.key, self._partitions) == batch.partition:
                log = self._log(logs, change.key)
                if change.accepted:
                    log.restore(self.read(change.body))
                else:
                    log.restore_refused(change.body)
        return logs

    def _log(self, logs: _Logs[Log], key: str) -> Log:
        if key not in logs.by_key:
            logs.by_key[key] = self.new_log(key)
        return logs.by_key[key]

    def _decide(self, batch: Batch, record: Record, logs: _Logs[Log], decided: Decided[Log]) -> None:
        place = (batch.topic, batch.partition, record.offset)

        def refuse(reason: str, field: str) -> None:
            decided.letters.append(DeadLetter(*place, reason, field, 0, record.key, record.value, record.timestamp))

        try:
            value = to_interchange(self.schema, self._context.codec.decode(record.value, (self.schema,)).value)
            unencodable = None
        except Undecodable as error:
            # What could not be encoded is sent as the JSON it was: it is refused, yet its id is taken.
            found = read_json(record.value)
            if found is None:
                refuse(str(error), "")
                return
            value = found
            try:
                from_interchange(self.schema, value)
                refuse("is JSON; records are Avro in the Confluent wire format", "")
                return
            except Refused as refusal:
                unencodable = refusal
        key = value.get(self.key_field)
        if not isinstance(key, str):
            refuse("is missing or no string", self.key_field)
            return
        if record.key != key.encode():
            shown = (record.key or b"").decode(errors="replace")
            refuse(f"is {key!r}, but the record's key is {shown!r}", self.key_field)
            return
        if (belongs := partition_for(key, self._partitions)) != batch.partition:
            refuse(
                f"is {key!r}, which belongs in partition {belongs} by murmur2, not {batch.partition}: "
                "set the producer's partitioner to murmur2_random, so that an order's changes have one order",
                self.key_field,
            )
            return
        log = self._log(logs, key)
        accepted, reason = False, ""
        try:
            if unencodable is not None:
                log.restore_refused(value)
                raise unencodable
            if log.admit(value) is None:
                decided.duplicates += 1
                return
            accepted = True
        except Refused as error:
            reason = str(error)
            refuse(error.reason, error.field)
        decided.changes.append(
            SaidChange(
                key=key,
                generation=self._generation,
                partition=batch.partition,
                offset=record.offset,
                id=str(value.get("id")),
                kind=_kind(value),
                accepted=accepted,
                reason=reason,
                body=value,
                broker_timestamp_ms=record.timestamp,
            )
        )

    def send(self, topic: str, partition: int, batch: Batch, kind: str, changes: Sequence[SaidChange]) -> None:
        """Sends accepted changes to a partition in records of a bounded size."""
        chunk: list[dict[str, Any]] = []
        size = 0
        for change in sorted(changes, key=lambda each: (each.generation, each.offset)):
            # A large order is megabytes of JSON and kilobytes of it compressed.
            body = zlib.compress(json.dumps(change.body, separators=(",", ":")).encode(), 1)
            if chunk and size + len(body) > 2_000_000:
                last = chunk[-1]
                end = last["offset"] + 1 if last["generation"] == self._generation else batch.first_offset
                self._send_chunk(topic, partition, kind, batch, chunk, end)
                chunk, size = [], 0
            chunk.append(
                {
                    "generation": change.generation,
                    "partition": change.partition,
                    "offset": change.offset,
                    "body": body,
                }
            )
            size += len(body)
        # The last record says that all of the batch has been said, also when there was nothing to say.
        self._send_chunk(topic, partition, kind, batch, chunk, batch.end_offset)

    def _send_chunk(
        self, topic: str, partition: int, kind: str, batch: Batch, chunk: list[dict[str, Any]], end: int
    ) -> None:
        source = {
            "generation": self._generation,
            "topic": batch.topic,
            "partition": batch.partition,
            "end_offset": end,
        }
        value = {"source": source, "kind": kind, "changes": chunk}
        self._context.outbox.send(topic, self._context.codec.encode("AcceptedChanges", value), partition=partition)


def _kind(value: Any) -> str:
    change = value.get("change")
    return str(next(iter(change), "")) if isinstance(change, dict) else ""
