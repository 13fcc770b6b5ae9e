"""Sending a dead letter again to where it came from, and what will become of it there.

The order of steps:

1. The record is sent, and the broker acknowledges it.
2. It is marked as sent again.  If the process dies before, the next replay sends it once more, which
   adds nothing: usage has the same identity and revision, a change the same id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rating.records import Refused
from sinks.clickhouse import ClickHouse
from sinks.dead_letters import KeptLetter, LetterBox, LetterId
from streams.codec import Codec, Undecodable, from_interchange, read_json, to_interchange
from streams.producer import Outbox
from streams.settings import Settings
from streams.topics import CONTRACT_CHANGES, PERIOD_EVENTS, REFERENCE_CHANGES, input_topics

_PERIOD_RECORDS = ("UsageComplete", "CloseRequested", "CutFixed", "PeriodClosed")
_CHANGES = {
    CONTRACT_CHANGES: ("ContractChange", "order_number", "contract_changes"),
    REFERENCE_CHANGES: ("ReferenceChange", "code", "reference_changes"),
}
#: So many letters are held, sent and acknowledged before they are marked.
_AT_ONCE = 20


@dataclass(frozen=True, slots=True)
class Fate:
    """What a replay does with a letter (`sent`: it goes out), and what is to be expected, for a person."""

    id: LetterId
    sent: bool
    text: str


def said(codec: Codec, topic: str, value: bytes) -> dict[str, Any] | None:
    """A record of a topic in its interchange form, as the `value` of an interchange line; None for other bytes."""
    if (found := read_json(value)) is not None:
        return found
    try:
        name, record = codec.decode(value, _names(topic))
        inner = to_interchange(name, record)
    except (Undecodable, ArithmeticError):
        return None
    return inner if name == "Usage" or topic in _CHANGES else {name: inner}


def encode(codec: Codec, topic: str, value: Mapping[str, Any]) -> tuple[str, bytes]:
    """The key and bytes of a record given in its interchange form.  Raises Refused with the field."""
    if topic in _CHANGES:
        name, key, _ = _CHANGES[topic]
        record = from_interchange(name, value)
        return str(record[key]), codec.encode(name, record)
    name = next(iter(value), "")
    if topic == PERIOD_EVENTS:
        if name not in _PERIOD_RECORDS or len(value) != 1:
            raise Refused("", f"is none of {', '.join(_PERIOD_RECORDS)}")
        record = from_interchange(name, value[name])
        return str(record["period"]), codec.encode(name, record)
    name, inner = ("UsageBatch", value["UsageBatch"]) if "UsageBatch" in value else ("Usage", value)
    record = from_interchange(name, inner)
    return str(record["ods_code"]), codec.encode(name, record)


class Replay:
    """Sends dead letters again."""

    def __init__(self, settings: Settings, clickhouse: ClickHouse) -> None:
        self._codec = Codec(settings)
        self._outbox = Outbox(settings)
        self._clickhouse = clickhouse
        self._box = LetterBox(clickhouse)
        self._topics = {*input_topics(settings), PERIOD_EVENTS}

    def fate(self, letter: KeptLetter, edited: Mapping[str, Any] | None = None, *, again: bool = False) -> Fate:
        """What sending a letter (or `edited` in its place) comes to.  Raises Refused when `edited` is no record."""
        if letter.replayed_at is not None and edited is None and not again:
            at = f"{letter.replayed_at:%Y-%m-%d %H:%M} UTC"
            return Fate(
                letter.id, False, f"was sent again before, {at} by {letter.replayed_by} (--again sends it once more)"
            )
        sent, text = self._judge(letter, edited)
        return Fate(letter.id, sent, text)

    def send(
        self, letters: Iterable[KeptLetter], by: str, edited: Mapping[str, Any] | None = None, *, again: bool = False
    ) -> Iterator[Fate]:
        """Sends what is worth it and marks it; yields each letter's fate when it is decided and acknowledged.

        Of letters with the same content the first is sent.  `again`: also what was sent again before.
        """
        contents: set[int] = set()
        waiting = iter(letters)
        while portion := list(islice(waiting, _AT_ONCE)):
            fates, sent = [], []
            for letter in portion:
                if letter.content in contents:
                    fates.append(Fate(letter.id, False, "the same record was sent again just now"))
                    continue
                fate = self.fate(letter, edited, again=again)
                if fate.sent:
                    key, value = self._record(letter, edited)
                    self._outbox.send(letter.id.topic, value, key=key)
                    contents.add(letter.content)
                    sent.append(letter)
                fates.append(fate)
            self._outbox.flush()
            self._box.mark(sent, by, edited=edited is not None)
            yield from fates

    def _record(self, letter: KeptLetter, edited: Mapping[str, Any] | None) -> tuple[str | bytes | None, bytes]:
        if edited is not None:
            return encode(self._codec, letter.id.topic, edited)
        value = read_json(letter.value)
        if value is not None:
            try:
                # Kept as text: a reading of a batch, or what could not be encoded then.
                return encode(self._codec, letter.id.topic, value)
            except Refused:
                pass
        return letter.key or None, letter.value

    def _judge(self, letter: KeptLetter, edited: Mapping[str, Any] | None) -> tuple[bool, str]:
        topic = letter.id.topic
        if letter.id.agent == "publish":
            return False, "never was in a topic: mend the file and publish it again"
        if topic not in self._topics:
            return False, f"nobody reads {topic} any more; add its supplier to TRIBILL_SUPPLIER_TOPICS"
        if edited is None and not letter.value:
            return False, "has no bytes that could be sent again"
        if edited is not None:
            encode(self._codec, topic, edited)
        value = edited if edited is not None else said(self._codec, topic, letter.value)
        if topic in _CHANGES:
            return self._judge_change(topic, value)
        if letter.id.agent == "usage":
            return self._judge_conflict(letter, edited)
        if topic == PERIOD_EVENTS:
            return True, "period-close takes it as new"
        return True, "intake judges it anew; a reading that it let through before is a duplicate and adds nothing"

    def _judge_change(self, topic: str, value: Mapping[str, Any] | None) -> tuple[bool, str]:
        _, key, table = _CHANGES[topic]
        if value is None:
            return True, "cannot be read here either: expect it to be refused again unless schemas were added since"
        rows = self._clickhouse.query(
            f"SELECT toString(outcome), reason FROM {table} FINAL"  # noqa: S608  # names are ours
            f" WHERE {key} = {{key:String}} AND id = {{id:String}} ORDER BY outcome LIMIT 1",
            {"key": str(value.get(key)), "id": str(value.get("id"))},
        )
        if not rows:
            return True, "its id is free: it is judged against what stands before it in the log now"
        if rows[0][0] == "accepted":
            return False, f"a change with the id {value.get('id')!r} was accepted: a correction needs a new id"
        return False, (
            f"stays refused, for a refused change keeps its id: correct it under a new id (show --value, replay --edit)"
            f"; the id {value.get('id')!r} was refused because {rows[0][1]}"
        )

    def _judge_conflict(self, letter: KeptLetter, edited: Mapping[str, Any] | None) -> tuple[bool, str]:
        revision = (read_json(letter.value) or {}).get("revision", 0)
        said_anew = (edited or {}).get("revision", 0)
        if isinstance(said_anew, int) and isinstance(revision, int) and said_anew > revision:
            return True, f"usage takes it as revision {said_anew}, if there is no higher one"
        return False, (
            f"stays a conflict: revision {revision} of this id was said before with other content; "
            "correct it with a higher revision (show --value, replay --edit)"
        )


def _names(topic: str) -> tuple[str, ...]:
    if topic in _CHANGES:
        return (_CHANGES[topic][0],)
    return _PERIOD_RECORDS if topic == PERIOD_EVENTS else ("Usage", "UsageBatch")


def pretty(value: Mapping[str, Any]) -> str:
    """A record for a person and for an editor; nothing in it moves a terminal."""
    return json.dumps(value, indent=2)
