"""What must hold when a history is over: promises 1 to 3 of DESIGN.md, against the same book without a fault."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from agents.explaining import Changes
from rating.amounts import pence
from rating.calendar import financial_year, parse_month
from rating.close import csv_rows, derive
from rating.funding import allocation_exact, draw_down
from sinks.positions import place_text
from streams.codec import Undecodable
from streams.topics import PERIOD_EVENTS, input_topics, partition_for
from tests.crash_world import same
from tests.oracle import oracle
from tests.oracle.strategies import ARRIVAL
from tests.simulation.memory import standing
from tests.simulation.world import CALM, SimulatedContext, Worker, World

#: After any month.
_EVER = parse_month("2099-12")


@dataclass(frozen=True)
class Expected:
    """What a book comes to, whatever happens to the workers."""

    closes: dict[int, tuple[list[Any], list[Any]]]
    standing: dict[Any, Any]
    refused: set[tuple[Any, ...]]


def agreed(world: World) -> None:
    """A world agrees with itself, whatever it was sent."""
    check(world, Expected(closes(world), _standing(world), _refused(world)))


def straight(book: Sequence[dict[str, Any]]) -> Expected:
    """The book played without a fault; its closes are the oracle's."""
    world = World(book, 0, CALM)
    world.play()
    made = closes(world)
    for close in oracle.run(book, arrival=ARRIVAL).closes:
        found = made[parse_month(close.period)]
        assert found == ([tuple(row) for row in close.lines], [tuple(row) for row in close.held]), close.period
    expected = Expected(made, _standing(world), _refused(world))
    check(world, expected)
    return expected


def check(world: World, expected: Expected) -> None:
    """Raises AssertionError with what differs."""
    # 1: the same documents, each with one content however often it was written, and each close answered.
    same("closed and held rows", closes(world), expected.closes)
    documents = world.sinks.documents
    assert {what: each for what, each in documents.contents.items() if len(each) > 1} == {}, (
        "written with other content"
    )
    _check_answers(world)
    # 2: each reading counts once, whatever was refused is a dead letter, and all is committed.
    same("what stands of each reading", _standing(world), expected.standing)
    same("refused", dict.fromkeys(_refused(world)), dict.fromkeys(expected.refused))
    _check_conflicts(world)
    # 3: the accrual is the invoice.
    drifts = {period: row["drift"] for period, row in documents.periods.items() if row["drift"]}
    assert drifts == {}, "the accruals differed from the ledger at a close"
    mended = [detail for *_, detail in documents.answers if "differ from the ledger" in detail]
    assert mended == [], "the accruals differed from the ledger at a close, which had them mended"
    _check_accruals(world)
    assert world.reconcile() == 0, "reconciliation sees a drift where there is none"


def closes(world: World) -> dict[int, tuple[list[Any], list[Any]]]:
    documents = world.sinks.documents
    return {
        period: tuple(
            [tuple(row) for row in csv_rows(rows[period], period)] for rows in (documents.invoiced, documents.held)
        )
        for period in documents.closed()
    }


def _standing(world: World) -> dict[Any, Any]:
    content = ("revision", "item_id", "quantity_micros", "occurred_at")
    return {
        identity: tuple(row[name] for name in content) for identity, row in standing(world.sinks.ledger.usage).items()
    }


def _letters(world: World) -> set[tuple[Any, ...]]:
    """Agent, topic, partition, offset, index, and reason of each."""
    rows = world.sinks.tables.get("dead_letters", [])
    return {(agent, *place, reason) for agent, _, *place, reason, _, _, _, _ in rows}


def _refused(world: World) -> set[tuple[Any, ...]]:
    # Which of several copies a loser is told to have lost against depends on what came first.
    return {letter for letter in _letters(world) if letter[0] != "usage"}


def _check_conflicts(world: World) -> None:
    """Every copy that lost is a dead letter, and none that stands."""
    lost = {letter[1:5] for letter in _letters(world) if letter[0] == "usage"}
    rows = world.sinks.ledger.usage
    firsts: dict[Any, Any] = {}
    for row in rows:
        for each in standing([row, *([firsts[key]] if (key := _revision(row)) in firsts else [])]).values():
            firsts[key] = each
    places = {key: _place(row) for key, row in firsts.items()}
    assert not lost & set(places.values()), "what stands is a dead letter, too"
    content = ("item_id", "quantity_micros", "occurred_at")
    losers = {_place(row) for row in rows if any(row[each] != firsts[_revision(row)][each] for each in content)}
    assert losers <= lost, f"no dead letter says that these lost: {losers - lost}"


def _revision(row: Any) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("ods_code", "supplier_id", "id", "revision"))


def _place(row: Any) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("topic", "partition", "offset", "index"))


def _check_answers(world: World) -> None:
    said, names = [], ("CloseRequested", "CutFixed", "PeriodClosed", "UsageComplete")
    for record in world.log.records[PERIOD_EVENTS, 0]:
        with suppress(Undecodable):
            said.append(world.codec.decode(record.value, names))
    closed = {each.value["period"] for each in said if each.name == "PeriodClosed"}
    asked = {each.value["period"] for each in said if each.name == "CloseRequested"}
    assert closed == asked, f"PeriodClosed was sent of {closed}, and asked for was {asked}"
    answered = {period for period, _, _, outcome, _ in world.sinks.documents.answers if outcome == "closed"}
    assert answered == asked, "whoever asked for the close waits for ever"


def _check_accruals(world: World) -> None:
    context, settings = SimulatedContext(Worker(world, "check", 0)), world.settings
    ends = {place_text(*place): world.log.end(place) for place in world.log.records}
    inputs = {text: end for text, end in ends.items() if text.rpartition("/")[0] in input_topics(settings)}
    book = Changes(context, 1, ends).known(world.sinks.ledger.totals_at_cut(1, inputs)).book
    accruals = world.sinks.accruals
    until = [accruals.horizon(partition, 1) for partition in range(settings.partitions)]
    accrued = {
        (line, month): Fraction(exact) for line, months in accruals.exact_rows(_EVER) for month, exact, _ in months
    }
    # Beyond it a worker may have come to write some, and they are right, too.
    furthest = max([world.horizon, *until, *(month for _, month in accrued)])
    charges = {
        key: amount
        for key, amount in derive(book, furthest).exact.items()
        if amount and (key in accrued or key[1] <= until[partition_for(key[0][1], settings.partitions)])
    }
    same("accruals", {key: amount for key, amount in accrued.items() if amount}, charges)
    for key, said in accruals.rows.items():
        newest = max(at for at, _, _ in said)
        # What a line no longer wants may be said once more, as zero.
        rows = {
            replace(row, wanted=tuple(each for each in row.wanted if each[1])) for at, _, row in said if at == newest
        }
        assert len(rows) == 1, f"rows of one version say different things of {key}: {rows}"
    wanted: dict[tuple[str, int], dict[int, Any]] = {}
    for (party, month), amount in derive(book, world.horizon).wanted.items():
        wanted.setdefault((party, financial_year(month)), {})[month] = amount
    due = {}
    for (party, year), months in wanted.items():
        allocation = pence(allocation_exact(book.reference, party, year))
        drawn_down = draw_down(allocation, {month: pence(each) for month, each in months.items()}, year)
        due.update({(party, month): (allocation, each) for month, each in drawn_down.items() if each.wanted})
    # What is wanted after it, by some partitions and not by others, takes nothing from the months before.
    drawn = {
        key: max(said, key=lambda each: each[0])[1:]
        for key, said in accruals.drawn.items()
        if key[1] <= world.horizon
    }
    same("drawn of allocations", {key: each for key, each in drawn.items() if each[1].wanted}, due)
