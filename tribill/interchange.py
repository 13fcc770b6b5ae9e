"""Interchange files: JSON lines that say what was used, ordered and known (RULES section 1), onto Kafka.

A line that can't be encoded is sent as the text it is: the agent whose topic it is refuses it with
a reason, takes its id, and keeps its bytes in the dead letters.  A line that has no topic of ours
goes to the dead letters from here, with the file and line that it stands in.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rating.calendar import parse_month
from rating.records import Refused
from sinks.clickhouse import ClickHouse
from sinks.dead_letters import DeadLetter, DeadLetters
from streams.codec import NESTING_MAX_LEVELS, Codec, from_interchange, is_shallow
from streams.producer import Outbox
from streams.settings import Settings
from streams.topics import (
    BLOCK_MAX_BYTES,
    CONTRACT_CHANGES,
    PERIOD_EVENTS,
    REFERENCE_CHANGES,
    USAGE,
    input_topics,
)

#: A longer line is no record of anything; it is not even read whole.
LINE_MAX_BYTES = 16 * 1024 * 1024
_TOPIC = re.compile(r"usage(\.[A-Za-z0-9_-]{1,64})?|contract-changes|reference-changes|period-events")
_KEYS = {CONTRACT_CHANGES: "order_number", REFERENCE_CHANGES: "code"}


class BadClose(ValueError):
    """A line that asks for a close in a way that nobody can follow."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an interchange file: a record, a close, or (`reason`) neither."""

    file: str
    number: int
    text: bytes
    topic: str = ""
    value: Any = None
    close: str = ""
    reason: str = ""


@dataclass(slots=True)
class Survey:
    """What a run must know of its files before it starts."""

    lines: int = 0
    closes: list[str] = field(default_factory=list)
    suppliers: set[str] = field(default_factory=set)


def read(path: Path) -> Iterator[Line]:
    """The lines of a file, blank ones left out.  Raises OSError, or BadClose for `{"close": ...}` of no period."""
    with path.open("rb") as file:
        number = 0
        while text := file.readline(LINE_MAX_BYTES):
            number += 1
            if len(text) == LINE_MAX_BYTES and not text.endswith(b"\n"):
                while (rest := file.readline(LINE_MAX_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield Line(str(path), number, text[:65_536], reason=f"is longer than {LINE_MAX_BYTES} bytes")
            elif text.strip():
                yield _parse(path, number, text.strip())


def _parse(path: Path, number: int, text: bytes) -> Line:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(str(path), number, text, reason=f"is no JSON: {error}")
    if not is_shallow(value):
        return Line(str(path), number, text, reason=f"is nested deeper than {NESTING_MAX_LEVELS} levels")
    if not isinstance(value, dict):
        return Line(str(path), number, text, reason='is no JSON object such as {"topic": ..., "value": ...}')
    if "close" in value:
        period = str(value["close"])[:40]  # no longer one is a month, and the error shows it
        try:
            parse_month(period)
        except ValueError as error:
            raise BadClose(f"{path}:{number}: close: {error}") from None
        return Line(str(path), number, text, close=period)
    topic = value.get("topic")
    if not isinstance(topic, str) or not _TOPIC.fullmatch(topic):
        return Line(
            str(path),
            number,
            text,
            reason=f"topic: is {str(topic)[:40]!r}, not one of usage, usage.<supplier id>, contract-changes, "
            "reference-changes, period-events",
        )
    return Line(str(path), number, text, topic=topic, value=value.get("value"))


def survey(paths: list[Path]) -> Survey:
    """Reads the files once for what must be known before the first record is sent."""
    found = Survey()
    for path in paths:
        for line in read(path):
            found.lines += 1
            if line.close:
                found.closes.append(line.close)
            elif line.topic.startswith(f"{USAGE}."):
                found.suppliers.add(line.topic.removeprefix(f"{USAGE}."))
    return found


class Publisher:
    """Sends interchange records to their topics."""

    def __init__(self, settings: Settings) -> None:
        self._codec = Codec(settings)
        self._outbox = Outbox(settings)
        self._letters = DeadLetters("publish", settings.log_generation, ClickHouse(settings), self._outbox, self._codec)
        self._topics = {*input_topics(settings), PERIOD_EVENTS}
        self._refused: list[DeadLetter] = []
        self.sent = 0

    def send(self, line: Line, timestamp_ms: int = 0) -> None:
        """Sends a line's record; what has no topic is kept for the dead letters."""
        if line.reason:
            self._refuse(line, line.reason)
            return
        if line.topic not in self._topics:
            supplier = line.topic.removeprefix(f"{USAGE}.")
            self._refuse(line, f"topic: nobody reads {line.topic}; add {supplier} to TRIBILL_SUPPLIER_TOPICS")
            return
        for part in _judged_alone(line):
            self._send(part, timestamp_ms)

    def _send(self, line: Line, timestamp_ms: int) -> None:
        key, value = self._encode(line)
        if len(value) > BLOCK_MAX_BYTES:
            self._refuse(line, f"is {len(value)} bytes long; a record has at most {BLOCK_MAX_BYTES}")
            return
        self._outbox.send(line.topic, value, key=key, timestamp_ms=timestamp_ms)
        self.sent += 1

    def send_record(self, topic: str, value: Any, timestamp_ms: int = 0) -> None:
        """Sends a record given by topic and interchange value."""
        self.send(Line("", 0, b"", topic, value), timestamp_ms)

    def flush(self) -> int:
        """Returns when all is acknowledged; the number of lines refused here since the last time."""
        refused, self._refused = self._refused, []
        self._letters.write(refused)
        self._outbox.flush()
        return len(refused)

    def _refuse(self, line: Line, reason: str) -> None:
        # Another file of the same name may be published tomorrow: its letters are others.
        digest = zlib.crc32(line.text) & 0x7FFFFFFF
        self._refused.append(DeadLetter(line.file, 0, line.number, reason, index=digest, value=line.text))

    def _encode(self, line: Line) -> tuple[str | None, bytes]:
        name, value, key = _record(line)
        try:
            return key, self._codec.encode(name, from_interchange(name, value))
        except Refused:
            return key, json.dumps(line.value).encode()


def _judged_alone(line: Line) -> Iterator[Line]:
    """A line, or what a UsageBatch holds: the readings that can be encoded, and each of the others alone."""
    batch = line.value.get("UsageBatch") if isinstance(line.value, dict) else None
    if not isinstance(batch, dict) or not isinstance(batch.get("usages"), list):
        yield line
        return
    good: list[Any] = []
    for reading in batch["usages"]:
        try:
            from_interchange("UsageBatch", {**batch, "usages": [reading]})
            good.append(reading)
        except Refused:
            alone = {name: each for name, each in batch.items() if name != "usages"}
            alone |= reading if isinstance(reading, dict) else {"id": reading}
            yield replace(line, value=alone)
    if good or not batch["usages"]:
        yield replace(line, value={"UsageBatch": {**batch, "usages": good}})


def _record(line: Line) -> tuple[str, Any, str | None]:
    """A line's schema, its record and its key."""
    value = line.value
    if line.topic == PERIOD_EVENTS:
        name = next(iter(value), "") if isinstance(value, dict) else ""
        # Only attestations come from outside; a close is asked for with {"close": ...}.
        inner = value.get(name) if name == "UsageComplete" else None
        return "UsageComplete", inner, _text(inner, "period")
    if line.topic in _KEYS:
        name = "ContractChange" if line.topic == CONTRACT_CHANGES else "ReferenceChange"
        return name, value, _text(value, _KEYS[line.topic])
    if isinstance(value, dict) and "UsageBatch" in value:
        return "UsageBatch", value["UsageBatch"], _text(value["UsageBatch"], "ods_code")
    return "Usage", value, _text(value, "ods_code")


def _text(value: Any, name: str) -> str | None:
    found = value.get(name) if isinstance(value, dict) else None
    # A lone surrogate is no text: without a key the record is refused like any other that is wrong.
    return found if isinstance(found, str) and not re.search("[\ud800-\udfff]", found) else None
