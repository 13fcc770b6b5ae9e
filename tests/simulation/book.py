"""Small books from a seed: a few orders, what happens to them, usage with copies of every kind, and two closes."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st
from hypothesis.internal.conjecture.data import ConjectureData

from tests.oracle.strategies import STARTS, Features, Ordered, World, shape_of

Line = dict[str, Any]
#: Whose own topic there is; the other supplier speaks through the gateway.
SUPPLIERS = ("10000",)
_ITEMS = ["10000-001", "10000-S-036", "10052-002A001"]
_METERED_ITEM = _ITEMS[1]
_METERED = {"provisioning": "on_demand", "unit": "unit", "time_unit": "none", "day_count": "month"}


def small_book(seed: int) -> list[Line]:
    """Its lines, closes included; the same for a seed."""
    source = random.Random(f"book {seed}")

    def draw(strategy: st.SearchStrategy[Any]) -> Any:
        return ConjectureData(random=source).draw(strategy)

    features = Features(bounds=False)  # what is used shall cost something
    shapes = {item: shape_of(draw, features) for item in _ITEMS} | {_METERED_ITEM: _METERED}
    practices = ["A83005", "B81001"][: source.randint(1, 2)]
    parties = ["QOP", "QHM"]
    world = World(draw, features, source.choice(STARTS), 2, practices, parties, _ITEMS, shapes)
    for practice in practices:
        world.list_size(practice)
    world.allocation()
    for number in range(source.choice((1, 1, 1, 2))):
        _place_order(source, world, f"C01000{number + 1}")
    told: list[tuple[Line, Line]] = []
    for number in range(source.choice((1, 1, 2))):
        for _ in range(source.randint(1, 3)):
            world.happens()
        for _ in range(source.randint(2, 5)):
            world.book.append(_usage(source, world, told))
        world.book.append({"close": world.period(number)})
    world.book.append(_usage(source, world, told))
    topics = {f"usage.{each}" for each in SUPPLIERS}
    for line in world.book:
        if line.get("topic", "").startswith("usage.") and line["topic"] not in topics:
            line["topic"] = "usage"
    return world.book


def _place_order(source: random.Random, world: World, order: str) -> None:
    """An order whose lines are live from the month before the first close on: what is used of it is charged."""
    first = f"{world.period(-1)}-01"
    header = {
        "ordering_party": source.choice(world.parties),
        "supplier_id": "10000",
        "framework": "GPITF",
        "commencement": first,
        "vat_rate": "20",
    }
    pairs = [(_METERED_ITEM, each) for each in world.practices]
    pairs.append((source.choice(_ITEMS), source.choice(world.practices)))
    lines = {pair: world.order_line(*pair) for pair in dict.fromkeys(pairs)}
    placed = world.contract(order, "OrderPlaced", {"order_id": f"{order}-01", **header, "lines": [*lines.values()]})
    world.orders[order] = Ordered(header, lines, [placed])
    for milestone in source.choice((["M1"], ["M1", "M2"], ["M1", "M2"])):
        for item, practice in lines:
            reached = {"item_id": item, "ods_code": practice, "milestone": milestone, "date": first}
            world.contract(order, "MilestoneReached", reached)


def _usage(source: random.Random, world: World, told: list[tuple[Line, Line]]) -> Line:
    """A new reading, or one told before: the same, of another revision, or with other content."""
    if told and source.random() < 0.5:
        head, reading = source.choice(told)
        if source.random() < 0.5:
            reading = reading | {"revision": source.randint(0, 2)}
        if source.random() < 0.6:
            reading = reading | _measured(source, world)
    else:
        pairs = [pair for order in world.orders.values() for pair in order.lines]
        item, practice = source.choice((*pairs, (_METERED_ITEM, source.choice(world.practices))))
        head = {"supplier_id": item[:5], "ods_code": practice}
        reading = {"id": f"v{len(told)}", "item_id": item} | _measured(source, world)
    told.append((head, reading))
    topic = source.choice(("usage", *(f"usage.{each}" for each in SUPPLIERS if each == head["supplier_id"])))
    if source.random() < 0.2:
        readings = [reading, source.choice([each for other, each in told if other == head])]
        return {"topic": topic, "value": {"UsageBatch": head | {"usages": readings}}}
    return {"topic": topic, "value": head | reading}


def _measured(source: random.Random, world: World) -> Line:
    quantity = source.choice(("1", "2", "0.5", "70", "300", "0", "33.333333"))
    # Few months and days, so that much falls on the same ones.
    month, day = world.period(source.choice((-1, 0, 0, 1))), source.choice(("01", "01", "15", "28"))
    return {"quantity": quantity, "occurred_at": f"{month}-{day}T10:00:00Z"}
