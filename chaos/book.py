"""The book that is streamed: from a seed, orders and changes with everything in RULES, and a flow of usage.

What the orders and changes are comes from the strategies of the oracle's own tests.  The usage is made
here: readings with duplicates of any age, disorder, late days, revisions, conflicts and batches.  Between
them stands garbage that no decoder takes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.internal.conjecture.data import ConjectureData

from tests.oracle.strategies import Features, World, shape_of

Line = dict[str, Any]

START = (2024, 1)
PRACTICES = ["A83005", "B81001", "Y00001", "A83006", "C82010", "D81002", "E87003", "F84004"]
ITEMS = ["10000-001", "10000-S-036", "10052-002A001", "10052-003", "10000-002"]
SUPPLIERS = ("10000", "10052")
ORDERS = 12
_READINGS_AT_ONCE = 12
_GARBAGE_TOPICS = ("usage", "usage.10000", "contract-changes", "reference-changes", "period-events")


@dataclass(frozen=True, slots=True)
class Garbage:
    """Bytes that are no record of ours."""

    topic: str
    key: bytes | None
    value: bytes | None


class Book:
    """An endless book over so many months, the same for a seed."""

    def __init__(self, seed: int, months: int) -> None:
        self._random = random.Random(f"book {seed}")
        self._world = self._new_world(months)
        self._taken = 0
        self._told: list[tuple[Line, Line]] = []

    def period(self, number: int) -> str:
        """The months that are closed, numbered from 0."""
        return self._world.period(number)

    def opening(self) -> list[Line]:
        """What stands before the stream: list sizes, allocations, memberships and orders."""
        self._world.set_up(ORDERS)
        return self._new_lines()

    def stream(self) -> Iterator[Line | Garbage]:
        """What happens, for ever: mostly readings, now and then a change, seldom garbage."""
        while True:
            chance = self._random.random()
            if chance < 0.04:
                yield from self._change()
            elif chance < 0.05:
                yield self._garbage()
            elif chance < 0.08:
                yield self._batch()
            else:
                yield self._reading()

    # --- what happens to orders, practices and funds ---

    def _new_world(self, months: int) -> World:
        def draw(strategy: st.SearchStrategy[Any]) -> Any:
            # Each draw by itself, from our own randomness: a book is larger than Hypothesis would make one.
            return ConjectureData(random=self._random).draw(strategy)

        shapes = {item: shape_of(draw, Features()) for item in ITEMS}
        for item in ITEMS[1:4]:
            shapes[item] = {"provisioning": "on_demand", "unit": "unit", "time_unit": "none", "day_count": "month"}
        return World(draw, Features(), START, months, PRACTICES, ["QOP", "QHM"], ITEMS, shapes)

    def _change(self) -> Iterator[Line]:
        # What ends lines is rare, or a long stream would soon bill nothing.
        ends = self._random.random() < 0.1
        self._world.features = replace(self._world.features, endings=ends)
        self._world.happens()
        yield from self._new_lines()

    def _new_lines(self) -> list[Line]:
        # What was said lately stays in the world's book: it may say that again.
        lines = self._world.book[self._taken :]
        self._world.book = self._world.book[-50:]
        self._taken = len(self._world.book)
        return lines

    # --- usage ---

    def _reading(self) -> Line:
        head, reading = self._told_or_new()
        return {"topic": self._topic(head), "value": head | reading}

    def _batch(self) -> Line:
        head, reading = self._new()
        readings = [reading]
        for _ in range(self._random.randint(0, _READINGS_AT_ONCE)):
            _, other = self._new()
            readings.append(other | {"item_id": reading["item_id"]})
        self._told += [(head, each) for each in readings]
        return {"topic": self._topic(head), "value": {"UsageBatch": head | {"usages": readings}}}

    def _told_or_new(self) -> tuple[Line, Line]:
        """Who and where; what and when: mostly new, else of an identity that was named before."""
        chance = self._random.random()
        if chance >= 0.2 or not self._told:
            self._told.append(self._new())
            return self._told[-1]
        lately = self._told[-500:] if chance < 0.15 else self._told
        head, reading = self._random.choice(lately)
        if chance < 0.08:
            return head, reading
        if chance < 0.12:
            reading = reading | {"revision": self._random.randint(1, 3)}
        # Of one revision with other content the first in the log stands: a conflict.
        self._told.append((head, reading | self._measured()))
        return self._told[-1]

    def _new(self) -> tuple[Line, Line]:
        item, practice = self._service()
        head = {"supplier_id": item[:5], "ods_code": practice}
        return head, {"id": f"v{len(self._told)}-{self._random.randrange(10**6)}", "item_id": item} | self._measured()

    def _measured(self) -> Line:
        return {
            "quantity": self._random.choice(("1", "2", "0.5", "7", "30", "0", "0.333333")),
            "occurred_at": f"{self._world.day(-1)[:8]}{self._random.randint(1, 28):02d}T10:00:00Z",
        }

    def _service(self) -> tuple[str, str]:
        metered = [
            pair
            for order in self._world.orders.values()
            for pair in order.lines
            if self._world.shapes[pair[0]]["provisioning"] == "on_demand"
        ]
        if metered and self._random.random() < 0.95:
            return self._random.choice(sorted(metered))
        return self._random.choice(ITEMS), self._random.choice(PRACTICES)

    def _topic(self, head: Line) -> str:
        return self._random.choice(("usage", f"usage.{head['supplier_id']}"))

    # --- garbage ---

    def _garbage(self) -> Garbage:
        body = self._random.choice(
            (
                None,
                b"",
                b"\x00",
                b"\x00\x00\x00\x00\x63garbage",
                b"\x00\x00\x00\x00\x01" + self._random.randbytes(20) + b"\xff" * 12,
                b"{not json",
                self._random.randbytes(200),
            )
        )
        return Garbage(self._random.choice(_GARBAGE_TOPICS), self._random.choice((None, b"A83005", b"\xff")), body)
