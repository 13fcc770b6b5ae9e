"""Dead letters: what was refused, why, its original bytes and where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

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


@dataclass(frozen=True, slots=True)
class LetterId:
    """Which dead letter: who refused it, and where in the log it came from."""

    agent: str
    generation: int
    topic: str
    partition: int
    offset: int
    index: int

    def __str__(self) -> str:
        return f"{self.agent}/{self.generation}/{self.topic}/{self.partition}/{self.offset}/{self.index}"

    @classmethod
    def parse(cls, text: str) -> LetterId:
        """An id as `str` writes it; the topic may hold slashes.  Raises ValueError."""
        try:
            agent, generation, rest = text.split("/", 2)
            topic, partition, offset, index = rest.rsplit("/", 3)
            return cls(agent, int(generation), topic, int(partition), int(offset), int(index))
        except ValueError:
            raise ValueError(
                f"{text!r} is no dead letter; one is named like intake/1/usage/0/17/0 "
                "(agent, log generation, topic, partition, offset, place in its batch), as the list shows it"
            ) from None


@dataclass(frozen=True, slots=True)
class KeptLetter:
    """A dead letter as the ledger keeps it, and its last replay; `key` and `value` are the original bytes."""

    id: LetterId
    reason: str
    field: str
    written_at: datetime
    size: int
    #: Of topic, value and reason: the same record refused again for the same reason has the same.
    content: int
    replayed_at: datetime | None
    replayed_by: str
    key: bytes = b""
    value: bytes = b""


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Which dead letters; what is empty leaves none out."""

    agent: str = ""
    topic: str = ""
    reason: str = ""
    since: datetime | None = None
    waiting: bool = False


class LetterBox:
    """Reads the dead letters that were kept, and notes what was sent again."""

    def __init__(self, clickhouse: ClickHouse) -> None:
        self._clickhouse = clickhouse

    def count(self, wanted: LetterFilter) -> int:
        """How many there are."""
        return int(self._select("count()", wanted)[0][0])

    def newest(self, wanted: LetterFilter, limit: int) -> list[KeptLetter]:
        """The last ones, the newest first, without their bytes."""
        rows = self._select(_SUMMARY, wanted, "ORDER BY written_at DESC, topic, partition, offset DESC, `index`", limit)
        return [_kept(row) for row in rows]

    def find(self, which: LetterId) -> KeptLetter | None:
        """One, with its original bytes."""
        rows = self._clickhouse.query(
            f"SELECT {_SUMMARY}, hex(key), hex(value) FROM {_WITH_REPLAYS}"  # noqa: S608  # both are ours
            " WHERE agent = {agent:String} AND generation = {generation:UInt32} AND topic = {topic:String}"
            " AND partition = {partition:Int32} AND offset = {offset:Int64} AND `index` = {index:Int32}",
            {name: getattr(which, name) for name in _ID_COLUMNS},
        )
        return _kept(rows[0]) if rows else None

    def mark(self, replayed: Sequence[KeptLetter], by: str, *, edited: bool) -> None:
        """Notes that these were sent again now, and by whom."""
        rows = [(*(getattr(each.id, name) for name in _ID_COLUMNS), each.content, by, edited) for each in replayed]
        self._clickhouse.insert("replays", (*_ID_COLUMNS, "content", "replayed_by", "edited"), rows)

    def _select(self, columns: str, wanted: LetterFilter, order: str = "", limit: int = 1) -> list[tuple[Any, ...]]:
        since = wanted.since or datetime.fromtimestamp(0, UTC)
        return self._clickhouse.query(
            f"SELECT {columns} FROM {_WITH_REPLAYS}"  # noqa: S608  # columns and order are ours
            " WHERE ({agent:String} = '' OR agent = {agent:String}) AND ({topic:String} = '' OR topic = {topic:String})"
            " AND positionCaseInsensitiveUTF8(concat(field, ': ', reason), {reason:String}) > 0"
            " AND toUnixTimestamp64Milli(written_at) >= {since:Int64} AND NOT ({waiting:Bool} AND times > 0)"
            f" {order} LIMIT {{limit:UInt32}}",
            {
                "agent": wanted.agent,
                "topic": wanted.topic,
                "reason": wanted.reason,
                "since": int(since.timestamp() * 1000),
                "waiting": wanted.waiting,
                "limit": limit,
            },
        )


_ID_COLUMNS = ("agent", "generation", "topic", "partition", "offset", "index")
_SUMMARY = """toString(agent), generation, toString(topic), partition, offset, `index`, reason, field,
    toUnixTimestamp64Milli(written_at), length(value), content, times, toUnixTimestamp64Milli(last_at), last_by"""
_WITH_REPLAYS = """(SELECT *, sipHash64(topic, value, reason) AS content FROM dead_letters FINAL) AS letters
LEFT JOIN (
    SELECT agent, generation, content, count() AS times, max(replayed_at) AS last_at,
           argMax(replayed_by, replayed_at) AS last_by
    FROM replays GROUP BY agent, generation, content
) AS again USING (agent, generation, content)"""


def _kept(row: Sequence[Any]) -> KeptLetter:
    agent, generation, topic, partition, offset, index, *rest = row
    reason, field, written_ms, size, content, times, last_ms, by, *data = rest
    return KeptLetter(
        LetterId(agent, generation, topic, partition, offset, index),
        reason,
        field,
        instant(written_ms),
        size,
        content,
        instant(last_ms) if times else None,
        by,
        *(bytes.fromhex(each) for each in data),
    )


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
