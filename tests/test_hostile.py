"""Whatever anybody sends: each record is billed, in suspense or a dead letter, and no agent dies of it (promise 8).

The records go through the real agents over stores in memory (`tests/simulation`), so that thousands do; what
depends on how ClickHouse and Redis take a text is in `tests/test_hostile_ids.py`.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinks.papers.files import write_paper
from streams.codec import NESTING_MAX_LEVELS, fixed_ids, from_interchange
from streams.topics import CONTRACT_CHANGES, PERIOD_EVENTS, REFERENCE_CHANGES, USAGE
from tests.rich_book import BOOK, BY_PARTY, METERED, contract, ordered, placed, reached, used
from tests.simulation.check import agreed, closes, straight
from tests.simulation.world import CALM, World

INPUTS = (USAGE, "usage.10000", CONTRACT_CHANGES, REFERENCE_CHANGES, PERIOD_EVENTS)
MANY = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=int(os.environ.get("TRIBILL_HOSTILE_EXAMPLES", "20")),
)
NASTY: list[Any] = [
    None, "", [], {}, True, 0, -1, 2**63, 10**400, 1.5, float("nan"), "NaN", "Infinity", "-0", "1e9", "1" * 400,
    "\x00", "a\x00b", "'; DROP TABLE usage; --", '"', "\\", "`", "%s%n", "{0}", "{id:String}", "\r\n$3\r\nGET\r\n",
    "=cmd|'/c calc'!A1", "\u202e", "\ud800", "\ufeff", "9999-12-31", "0001-01-01", "2026-02-30", "24:00:00",
    "2026-04-01T10:00:00", "2026-04-01T10:00:00+14:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00",
    "x" * 5_000, [[]], [None], {"": None}, {"Retracted": {}}, {"OrderPlaced": None},
]  # fmt: skip


def world_of(book: list[Any]) -> World:
    """An installation that nothing goes wrong with but what it is sent."""
    return World([*book, {"close": "2026-04"}], 0, CALM)


def bytes_of(world: World, topic: str, value: Any) -> bytes:
    """A line's value as a publisher sends it: encoded, or as the JSON it is."""
    names = {CONTRACT_CHANGES: "ContractChange", REFERENCE_CHANGES: "ReferenceChange"}
    name = names.get(topic, "Usage")
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("UsageBatch", "UsageComplete"):
        ((name, value),) = value.items()
    try:
        return world.codec.encode(name, from_interchange(name, value))
    except Exception:
        return json.dumps(value).encode()


def paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield before
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(each, (*before, key))


@st.composite
def spoilt(draw: Any) -> tuple[str, Any]:
    """A line of a good book with something nasty somewhere in it."""
    line = copy.deepcopy(draw(st.sampled_from([line for line in BOOK if "close" not in line])))
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from(list(paths(line["value"]))[1:]))
        inner = line["value"]
        for key in way:
            inner = inner[key]
        nasty = copy.deepcopy(draw(st.sampled_from(NASTY)))
        if isinstance(inner, dict) and draw(st.integers(0, 9)) == 0:
            inner.pop(last, None)
        elif isinstance(inner, (dict, list)) and not (isinstance(inner, list) and last >= len(inner)):
            inner[last] = nasty
        if not isinstance(line["value"], dict):
            break
        if any(not isinstance(each, (dict, list)) for each in [line["value"]]):
            break
    return line["topic"].replace("10030", "10000"), line["value"]


raw = st.one_of(
    st.none(),
    st.binary(max_size=60),
    st.builds(
        lambda number, body: b"\0" + number.to_bytes(4, "big") + body,
        st.sampled_from([*fixed_ids().values(), 0, 99, 2**32 - 1]),
        st.binary(max_size=80),
    ),
    st.builds(lambda value: json.dumps(value).encode(), st.recursive(
        st.sampled_from(NASTY), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["id", "code", "order_number", "change", "UsageBatch", "usages"]), inner, max_size=4
        ), max_leaves=8,
    )),
)  # fmt: skip


@MANY
@given(
    st.lists(spoilt(), max_size=8),
    st.lists(
        st.tuples(st.sampled_from(INPUTS), st.sampled_from([None, b"A83006", b"C010001", b"\xff"]), raw), max_size=8
    ),
    st.randoms(use_true_random=False),
)
def test_whatever_is_sent(lines: list[tuple[str, Any]], others: list[Any], random: Any) -> None:
    """An agent would die of a record, each time that it is started again."""
    world = world_of([])
    sent = []
    for topic, value in lines:
        key = value.get("order_number") or value.get("code") if isinstance(value, dict) else None
        key = key.encode(errors="replace") if isinstance(key, str) else None
        sent.append((topic, bytes_of(world, topic, value), key))
    sent += [(topic, value, key) for topic, key, value in others]
    random.shuffle(sent)
    for topic, value, key in sent:
        world.log.append(topic, value, key, 0 if topic == PERIOD_EVENTS else -1)
    world.play()
    agreed(world)
    letters = {row[2:5] for row in world.sinks.tables.get("dead_letters", [])}
    kept = {(row["topic"], row["partition"], row["offset"]) for row in world.sinks.ledger.usage}
    for (topic, partition), records in world.log.records.items():
        for record in records if topic.startswith("usage") and topic != "usage-accepted" else ():
            place = (topic, partition, record.offset)
            assert place in letters | kept or _is_empty_batch(world, record.value) or _is_again(world, record.value)


def _is_empty_batch(world: World, value: bytes) -> bool:
    return not world.codec.decode(value, ("Usage", "UsageBatch")).value.get("usages", True)


def _is_again(world: World, value: bytes) -> bool:
    """Whether a reading is one that is kept, said before."""
    decoded = world.codec.decode(value, ("Usage", "UsageBatch")).value
    ids = {each["id"] for each in decoded.get("usages", [decoded])}
    return ids <= {row["id"] for row in world.sinks.ledger.usage}


@pytest.mark.parametrize("topic", INPUTS)
@pytest.mark.parametrize("inner", ["[", '{"a":'])
def test_nesting_at_the_limit_of_the_stack(topic: str, inner: str) -> None:
    """There is a depth that the reader of JSON still takes, and whoever looks at it no more."""
    world = world_of([])
    close = "]" if inner == "[" else "}"
    depths = [1, NESTING_MAX_LEVELS, 100, *range(960, 1_000)]
    for depth in depths:
        nested = f"{inner * depth}1{close * depth}"
        for text in (f'{{"id": {nested}}}', f'{{"UsageBatch": {{"usages": [{nested}]}}}}', f'{{"change": {nested}}}'):
            world.log.append(topic, text.encode(), None, 0)
    world.play()
    letters = [row for row in world.sinks.tables["dead_letters"] if row[2] == topic]
    assert len(letters) == 3 * len(depths)


def test_good_records_among_garbage_are_billed() -> None:
    """Garbage would take its neighbours with it."""
    book = [line for line in BOOK if "close" not in line or line["close"] == "2026-04"]
    book = book[: book.index({"close": "2026-04"}) + 1]
    for line in book:
        if "topic" in line:
            line["topic"] = line["topic"].replace("usage.10030", "usage").replace("usage.10031", "usage")
    expected = straight(book)
    world = World(book, 0, CALM)
    garbage = [b"", b"\0", b"{", b"\xff" * 40, b"\0\0\0\0\1" + b"\xff" * 30, b"{" * 5_000, b"[" * 100_000]
    for topic in (USAGE, CONTRACT_CHANGES, REFERENCE_CHANGES):
        for partition in (0, 1):
            for value in garbage:
                world.log.append(topic, value, None, partition)
    world.play()
    letters = world.sinks.tables["dead_letters"]
    assert len(letters) - len(expected.refused) >= 6 * len(garbage)
    for period, (lines, held) in expected.closes.items():
        assert world.sinks.documents.invoiced[period], period
        found = closes(world)[period]
        assert found == (lines, held)


def batch_of(world: World, readings: Iterable[bytes], count: int) -> bytes:
    """A `UsageBatch` that says it has so many readings, with these behind it."""
    whole = bytes_of(world, USAGE, {"UsageBatch": ONE})
    beginning = whole[: -len(reading_of(world)) - 2]  # before the number of readings; 0 ends them
    number = bytearray()
    left = 2 * count
    while left > 127:
        number.append(left & 127 | 128)
        left >>= 7
    return b"".join((beginning, bytes([*number, left]), *readings, b"\0"))


def reading_of(world: World, identity: bytes = b"", occurred_at: str = "2026-04-03T10:00:00Z") -> bytes:
    """The smallest reading, as Avro has it."""
    [reading] = ONE["usages"]
    one = bytes_of(world, USAGE, {"UsageBatch": ONE | {"usages": [reading | {"occurred_at": occurred_at}]}})
    none = bytes_of(world, USAGE, {"UsageBatch": ONE | {"usages": []}})
    return bytes([2 * len(identity)]) + identity + one[len(none) + 1 : -1]


@pytest.mark.parametrize("there", [10_000_000, 1])
def test_ten_million_readings(there: int) -> None:
    """Or a record that says so: room would be made for them, or all of them decoded."""
    world = world_of([])
    record = batch_of(world, [reading_of(world)] * there, 10_000_000)
    world.log.append(USAGE, record, None, 0)
    tracemalloc.start()
    world.play()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    [letter] = world.sinks.tables["dead_letters"]
    assert ("bytes long" if there > 1 else "no Avro record") in letter[6]
    assert peak_bytes < 64 * 1024 * 1024


@pytest.mark.parametrize("is_refused", [False, True])
def test_the_most_readings_of_a_record(is_refused: bool) -> None:
    """A hundred thousand of the smallest readings in one record: more than a block, an insert and a letter hold."""
    world = world_of([])
    there = 100_000
    occurred_at = "1999-04-03T10:00:00Z" if is_refused else "2026-04-03T10:00:00Z"
    begins, ends = reading_of(world, b"00000", occurred_at).split(b"00000")
    world.log.append(USAGE, batch_of(world, (begins + b"%05x" % n + ends for n in range(there)), there), None, 0)
    world.play()
    assert len(world.sinks.ledger.usage) == (0 if is_refused else there)
    letters = world.sinks.tables.get("dead_letters", [])
    assert len(letters) == (there if is_refused else 0)
    assert all("before the year 2000" in letter[6] for letter in letters)


ONE: Any = {
    "supplier_id": "1",
    "ods_code": "A",
    "usages": [{"id": "", "item_id": "1", "quantity": "1", "occurred_at": "2026-04-03T10:00:00Z"}],
}


UNPRINTABLE = [
    "\x00", "a\x0bb", "\x1b[2J", "]]>", "<!--", "&lt;", "\ud7ff\ufffe\uffff", "\u202egnp.exe", "=1+1", "../..",
    "\U0001f600", "a\r\nb",
]  # fmt: skip


@pytest.mark.parametrize("text", UNPRINTABLE)
def test_documents_of_any_characters(text: str, tmp_path: Path) -> None:
    """A code that no XML or PDF can carry would stop the files of a whole period."""
    item, practice, payer, order = f"1{text}", f"P{text}", f"N{text}", f"C{text}"
    at = METERED | {"unit": text}
    line = ordered(item, practice, at, [{"payer": payer, "take": {"share": "0.5"}}, *BY_PARTY])
    credit = {"item_id": item, "amount": "1", "date": "2026-04-12", "reason": text}
    book = [
        contract(order, "c1", OrderPlaced=placed(f"{order}-01", f"Q{text}", f"1{text}", line) | {"framework": text}),
        reached(order, "c2", item, practice, "M1", "2026-04-01"),
        reached(order, "c3", item, practice, "M2", "2026-04-01"),
        contract(order, f"c{text}", ServiceCredit=credit),
        {"topic": USAGE, "value": used(f"u{text}", "2026-04-03", "300", item=item, ods=practice)["value"]
            | {"supplier_id": f"1{text}"}},
        {"close": "2026-04"},
    ]  # fmt: skip
    world = World(book, 0, CALM)
    world.settings = replace(world.settings, specimen=True)  # with parties, so that there are e-invoices
    world.play()
    agreed(world)
    contents = world.sinks.documents.contents
    assert not world.sinks.tables.get("dead_letters"), world.sinks.tables["dead_letters"]
    bodies = [next(iter(each)) for what, each in contents.items() if what[0] == "document"]
    bodies += [
        json.dumps(ast.literal_eval(next(iter(each))))
        for what, each in contents.items()
        if len(what) == 3 and what[1] in ("practice", "ordering-party", "supplier", "control")
    ]
    assert len(bodies) > 4
    (tmp_path / "statements").mkdir()
    written = [path for body in bodies for path in write_paper(tmp_path, body)[0]]
    assert any(path.suffix == ".xml" for path in written)
    assert all(path.resolve().is_relative_to(tmp_path.resolve()) and path.stat().st_size for path in written)
