"""Dead letters: what was refused, why, its original bytes and where it came from."""

from __future__ import annotations

from dataclasses import dataclass

from sinks import metrics
from sinks.clickhouse import ClickHouse
from streams.batch import instant
from streams.codec import Codec
from streams.producer import Outbox
from streams.topics import DEAD_LETTERS

#: At 16 MiB a letter at most, what one insert holds.
ROWS_AT_ONCE = 5_000
TOPIC_VALUE_BYTES = 512 * 1024

_COLUMNS = (
    "agent", "generation", "topic", "partition", "offset", "index",
    "reason", "field", "key", "value", "broker_timestamp_ms",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A refused record, or (`index`) a refused reading of a UsageBatch."""

    topic: str
    partition: int
    offset: int
    reason: str
    field: str = ""
    index: int = 0
    key: bytes | None = None
    value: bytes | None = None
    broker_timestamp_ms: int = 0


class DeadLetters:
    """Collects an agent's dead letters; they are safe once `write` has returned."""

    def __init__(self, agent: str, generation: int, clickhouse: ClickHouse, outbox: Outbox, codec: Codec) -> None:
        self._agent = agent
        self._generation = generation
        self._clickhouse = clickhouse
        self._outbox = outbox
        self._codec = codec

    def write(self, letters: list[DeadLetter]) -> None:
        """Writes them to the ledger and hands them to the topic (the caller flushes the outbox).

        A letter written again is the same row: its key is the record's position.
        """
        if not letters:
            return
        rows = [
            (
                self._agent,
                self._generation,
                letter.topic,
                letter.partition,
                letter.offset,
                letter.index,
                letter.reason,
                letter.field,
                letter.key or b"",
                letter.value or b"",
                letter.broker_timestamp_ms,
            )
            for letter in letters
        ]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            self._clickhouse.insert("dead_letters", _COLUMNS, rows[start : start + ROWS_AT_ONCE])
        for letter in letters:
            small = letter.value is not None and len(letter.value) <= TOPIC_VALUE_BYTES
            value = {
                "reason": letter.reason,
                "field": letter.field or None,
                "source": {
                    "generation": self._generation,
                    "topic": letter.topic,
                    "partition": letter.partition,
                    "offset": letter.offset,
                    "index": letter.index,
                },
                "agent": self._agent,
                "key": letter.key,
                # A larger one is whole in the ledger; the topic says only that it was.
                "value": letter.value if small else None,
                "timestamp": instant(letter.broker_timestamp_ms),
            }
            self._outbox.send(
                DEAD_LETTERS,
                self._codec.encode("DeadLetter", value),
                key=f"{letter.topic}/{letter.partition}/{letter.offset}/{letter.index}",
            )
        metrics.RECORDS.labels(self._agent, "refused").inc(len(letters))
