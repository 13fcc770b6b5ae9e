"""A kill between any two steps of any agent, and it still comes out right (promises 1-3).

Real agents over real ClickHouse and Redis; the log is in memory (`tests/crash_world.py`).  A case
kills one agent at one of its calls to the outside, starts another, and hands it the batch again,
as it was, longer or shorter; at the end the closed rows are the oracle's, the accruals are what
the ledger gives, and what was refused is the same as without the kill.

`TRIBILL_CRASH_EXAMPLES` sets how many random schedules are tried (Hypothesis prints the book and
the schedule's seed of one that fails).
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import count, zip_longest
from typing import Any
from unittest import mock

import pytest
import redis as redis_client
import structlog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rating.calendar import LONDON, month_text, parse_month
from rating.close import derive
from sinks.accruals import Accruals
from sinks.claims import ClaimsUnavailable
from streams.batch import Batch, NotYet
from streams.topics import CHARGE_INPUTS, PERIOD_EVENTS, partition_for
from tests.crash_world import AGENTS, CrashNow, Fuse, World, same
from tests.oracle import oracle
from tests.oracle.strategies import ARRIVAL, books
from tests.rich_book import (
    BOOK,
    BY_ALLOCATION,
    BY_PARTY,
    C1,
    C2,
    METERED,
    P1,
    PATIENTS,
    SUPPLIERS,
    A,
    S,
    contract,
    ordered,
    placed,
    reached,
    reference,
    used,
)
from tests.simulation.task import Task
from tribill.embedded.stack import EmbeddedStack

pytestmark = pytest.mark.timeout(280)

EXAMPLES = int(os.environ.get("TRIBILL_CRASH_EXAMPLES", "12"))
Record = dict[str, Any]
NewWorld = Callable[..., World]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStack]:
    """ClickHouse and Redis; the broker's place is taken by a log in memory."""
    with EmbeddedStack(tmp_path_factory.mktemp("stack"), kafka="127.0.0.1:1") as stack:
        yield stack


_numbers = count(1)
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture(scope="module")
def new_world(stack: EmbeddedStack) -> NewWorld:
    """Makes a world with a ledger and a claim store of its own; up to 15 live side by side."""

    def make(horizon: str, suppliers: tuple[str, ...] = (), **options: Any) -> World:
        number = next(_numbers)
        redis = f"{stack.redis.removesuffix('/0')}/{number % 16}"
        redis_client.Redis.from_url(redis).flushdb()
        return World(f"{stack.clickhouse}/crash{number}", redis, horizon, suppliers, **options)

    return make


HORIZON = "2026-06"


def parts(book: list[Record]) -> list[tuple[list[Record], str]]:
    """The lines before each close, with the period that it closes ("": after the last)."""
    found: list[tuple[list[Record], str]] = []
    lines: list[Record] = []
    for line in book:
        if "close" in line:
            found.append((lines, line["close"]))
            lines = []
        else:
            lines.append(line)
    return [*found, (lines, "")] if lines else found


def play(world: World, book: list[Record]) -> Iterator[str]:
    """Says the book, drains every stage before each close, and closes; yields each period closed."""
    for lines, period in parts(book):
        for line in lines:
            world.say(line)
        # Small blocks, so that the batches of usage that are read again end between a reading's copies.
        world.drain(["intake"], 4)
        world.drain([role for role in AGENTS if role not in ("intake", "period-close")])
        if period:
            offset = world.request_close(period)
            world.drain(["period-close"])
            answer = world.documents.answer_since(period, world.settings.log_generation, offset)
            assert answer is not None, "whoever asked for the close waits for ever"
            assert answer[0] == "closed", answer
            yield period


# --- one kill at any step -------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """At which call of which batch of a role the agent dies, and how the batch is read again."""

    role: str
    #: Of the role's, since the last close.
    batch: int
    call: int
    name: str
    #: Read again as it was; the batch that dies is the first half of what is read again; read again in halves.
    again: str
    #: Killed before the call (with nothing delivered of what was sent), not after it.
    before: bool = False


Done = list[tuple[str, list[str]]]


@pytest.fixture(scope="module")
def undisturbed(new_world: NewWorld) -> tuple[list[Done], dict[str, Any]]:
    """The book without a kill: every batch's calls up to each close, and the dead letters after it."""
    world = new_world(HORIZON, SUPPLIERS)
    done, letters = [], {}
    for period in play(world, BOOK):
        letters[period] = world.dead_letters()
        done.append(world.done)
        world.done = []
    world.check_closes(EXPECTED.closes)
    world.check_state()
    world.drop()
    return done, letters


def kills(done: Done, role: str) -> Iterator[Kill]:
    """Every kill of a role: after each call, and before each flush.

    Before any other call is the same as after the one before it.
    """
    ways = ("as it was",) if role == "period-close" else ("longer", "in halves", "as it was")
    shift = 0
    for number, calls in enumerate(calls for each, calls in done if each == role):
        for call, name in enumerate(calls, 1):
            shift += 1
            for again in ways if EVERY_WAY else (ways[shift % len(ways)],):
                yield Kill(role, number, call, name, again)
                if name == "flush":
                    yield Kill(role, number, call, name, again, before=True)


def survive(new_world: NewWorld, story: Sequence[Kill | None], letters: dict[str, Any]) -> None:
    """Plays the book with a kill before each close, and looks after each."""
    world = new_world(HORIZON, SUPPLIERS)
    kill: Kill | None = None
    batches = 0

    def on_batch(role: str, place: tuple[str, int], batch: Batch) -> bool:
        nonlocal batches, kill
        if kill is None or role != kill.role:
            return False
        batches += 1
        if batches <= kill.batch:
            return False
        now, kill = kill, None
        half = batch.records[: (len(batch.records) + 1) // 2]
        dying = Batch(*place, half) if now.again == "longer" else batch
        world.crash(role, dying, now.call, before=now.before, eager=not now.before)
        if now.again == "in halves":
            world.step(role, place, len(half))
        return True

    world.on_batch = on_batch
    expected = {close.period: close for close in EXPECTED.closes}
    periods = play(world, BOOK)
    for planned in story:
        kill, batches = planned, 0
        period = next(periods)
        assert kill is None, "nobody was killed"
        world.check_closes([expected[period]])
        assert world.dead_letters() == letters[period], "dead letters"
        world.check_state()
        names = ("CloseRequested", "CutFixed", "PeriodClosed")
        said = [world.codec.decode(each.value, names) for each in world.log.records[PERIOD_EVENTS, 0]]
        closed = {each.value["period"] for each in said if each.name == "PeriodClosed"}
        assert period in closed, "PeriodClosed was never sent"
    world.drop()


EVERY_WAY = bool(os.environ.get("TRIBILL_CRASH_EVERY_WAY"))
EXPECTED = oracle.run(BOOK, arrival=ARRIVAL)


@pytest.mark.parametrize("role", list(AGENTS))
def test_a_kill_at_any_step(role: str, new_world: NewWorld, undisturbed: Any) -> None:
    """Money, accruals, totals or dead letters would depend on where an agent was killed."""
    done, letters = undisturbed
    failed = []
    with ThreadPoolExecutor(4) as pool:
        stories = zip_longest(*(kills(each, role) for each in done))
        cases = [(story, pool.submit(survive, new_world, story, letters)) for story in stories]
        for story, case in cases:
            if error := case.exception():
                failed.append(f"{story}: {type(error).__name__} {str(error)[:500]}")
    assert not failed, f"{len(failed)} of {len(cases)} stories:\n" + "\n".join(failed)


# --- what the kills above do not reach ------------------------------------------------------

AT_WORK = [role for role in AGENTS if role != "period-close"]
METERED_ORDER = [
    contract(C1, "c1", OrderPlaced=placed("C010001-01", "QOP", "10030", ordered(S, P1, METERED, BY_ALLOCATION))),
    reached(C1, "c2", S, P1, "M1", "2026-04-01"),
    reached(C1, "c3", S, P1, "M2", "2026-04-01"),
]


def test_usage_moved_in_the_longer_batch(new_world: NewWorld) -> None:
    """A day total published by a killed agent would stand although its reading was moved in the same, longer batch."""
    world = new_world(HORIZON)
    for line in [*METERED_ORDER, used("u1", "2026-04-03", "3"), used("u1", "2026-04-07", "3", revision=1)]:
        world.say(line)
    world.drain(["contracts", "intake"], 1)
    place = next(place for place in world.places("usage") if world.waiting("usage", place))
    assert world.waiting("usage", place) == 2
    world.crash("usage", world.batch(place, 0, 1), 4)
    world.drain(AT_WORK)
    world.check_state()


def test_a_copy_that_lost_in_the_longer_batch(new_world: NewWorld) -> None:
    """A killed agent's total of a copy would stand when the longer batch has an earlier one of another day."""
    world = new_world(HORIZON, SUPPLIERS)
    for line in [*METERED_ORDER, used("u1", "2026-04-03", "3"), used("u1", "2026-04-07", "3", topic="usage.10030")]:
        world.say(line)
    world.drain(["contracts"])
    for place in reversed(world.places("intake")):
        if world.waiting("intake", place):
            world.step("intake", place)
    place = next(place for place in world.places("usage") if world.waiting("usage", place))
    assert world.waiting("usage", place) == 2
    world.crash("usage", world.batch(place, 0, 1), 4)
    world.drain(AT_WORK)
    world.check_state()


def test_an_order_revived_after_a_restart(new_world: NewWorld) -> None:
    """An order whose retraction is retracted would have no lines in charges that were started in between."""
    world = new_world(HORIZON)
    for line in [*METERED_ORDER, used("u1", "2026-04-03", "3"), contract(C1, "c4", Retracted={"change_id": "c1"})]:
        world.say(line)
    world.drain(AT_WORK)
    world.agents.clear()
    world.say(used("u2", "2026-04-04", "3"))
    world.drain(AT_WORK)
    world.say(contract(C1, "c5", Retracted={"change_id": "c4"}))
    world.drain(AT_WORK)
    world.check_state()


@pytest.mark.parametrize("restart", [False, True])
def test_an_overlapping_order_takes_over(new_world: NewWorld, restart: bool) -> None:
    """Usage that another order's line took would stay uncharged when that order is retracted."""
    world = new_world(HORIZON)
    other = contract(C2, "c1", OrderPlaced=placed("C010002-01", "QHM", "10030", ordered(S, P1, METERED, BY_PARTY)))
    live = reached(C2, "c2", S, P1, "M1", "2026-04-01")
    for line in [*METERED_ORDER, other, live, used("u1", "2026-04-03", "3")]:
        world.say(line)
    world.drain(AT_WORK)
    world.check_state()
    if restart:
        world.agents.clear()
    world.say(contract(C1, "c4", Retracted={"change_id": "c1"}))
    world.drain(AT_WORK)
    world.check_state()


def test_changes_in_several_records(new_world: NewWorld) -> None:
    """Charges killed between two records of one large batch of changes would miss what the first said."""
    world = new_world(HORIZON)
    long = "r" * 1_500_000
    for line in [
        contract(C1, "c1", OrderPlaced=placed("C010001-01", "QOP", "10030", ordered(A, P1, PATIENTS, BY_PARTY))),
        reached(C1, "c2", A, P1, "M1", "2026-04-01"),
    ]:
        world.say(line)
    world.drain(AT_WORK)
    for number in (1, 2):
        size = {"ods_code": P1, "as_of": f"2026-0{number + 3}-01", "patients": 1000 * number}
        world.say(reference(P1, f"{long}{number}", ListSize=size))
    world.drain(["reference"])
    place = (CHARGE_INPUTS, partition_for(A, 2))
    while world.waiting("charges", place):
        world.agents.clear()
        world.step("charges", place, 1)
    world.drain(AT_WORK)
    world.check_state()
    world.say(reached(C1, "c3", A, P1, "M2", "2026-04-01"))
    world.drain(AT_WORK)
    world.check_state()


@pytest.mark.parametrize("restart", [False, True])
def test_the_horizon_moves(new_world: NewWorld, restart: bool) -> None:
    """Charges started anew in another month would not write that month of lines that nothing touches."""
    world = new_world("2026-05")
    for line in [
        contract(C1, "c1", OrderPlaced=placed("C010001-01", "QOP", "10030", ordered(A, P1, PATIENTS, BY_PARTY))),
        reached(C1, "c2", A, P1, "M1", "2026-04-01"),
    ]:
        world.say(line)
    world.drain(AT_WORK)
    world.check_state()
    world.settings = replace(world.settings, horizon_month="2026-06")
    if restart:
        world.agents.clear()
        world.say(reference("X1", "r1", ListSize={"ods_code": "X1", "as_of": "2026-04-01", "patients": 5}))
        world.drain(AT_WORK)
    else:
        world.agents["charges"]._context.settings = world.settings
    committed = {place: end for (role, place), end in world.committed.items() if role == "charges"}
    world.agents["charges"].idle(committed)
    world.drain(AT_WORK)
    world.check_state()
    # As after a clock that was ahead: the months that are written stay right.
    ahead, world.settings = world.settings, replace(world.settings, horizon_month="2026-05")
    if restart:
        world.agents.clear()
    else:
        world.agents["charges"]._context.settings = world.settings
    world.say(contract(C1, "c3", LineCeased={"item_id": A, "ods_code": P1, "date": "2026-06-10"}))
    world.drain(AT_WORK)
    world.settings = ahead
    world.check_state()


def written_right(world: World, partition: int) -> None:
    """What any worker has written is what the ledger gives, to the month up to which all is written ahead."""
    accruals, ever = Accruals(world.clickhouse), parse_month("2026-12")
    horizon = accruals.horizon(partition, world.settings.log_generation)
    rows = ((line, month, exact) for line, months in accruals.exact_rows(ever) for month, exact, _ in months)
    accrued = {(line, month): Fraction(exact) for line, month, exact in rows}
    derived = derive(world.book(), ever).exact
    due = {key: exact for key, exact in derived.items() if exact and (key in accrued or key[1] <= horizon)}
    same("accruals", {key: exact for key, exact in accrued.items() if exact}, due)


ORDER = [
    contract(C1, "c1", OrderPlaced=placed("C010001-01", "QOP", "10030", ordered(A, P1, PATIENTS, BY_PARTY))),
    reached(C1, "c2", A, P1, "M1", "2026-04-01"),
]
CEASED = contract(C1, "c3", LineCeased={"item_id": A, "ods_code": P1, "date": "2026-04-10"})


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("idle", [False, True])
def test_written_ahead_by_one_that_was_stopped(new_world: NewWorld, idle: bool, goes_on: bool) -> None:
    """Months that only a worker with a clock ahead has written, and never said that it had, would stand for ever."""
    for at in range(1, 99):
        world, place = new_world("2026-05"), (CHARGE_INPUTS, partition_for(A, 2))
        for line in ORDER:
            world.say(line)
        world.drain(["contracts"])
        if idle:
            world.drain(["charges"])

        def meanwhile(world: World = world) -> None:
            world.settings = replace(world.settings, horizon_month="2026-05")
            world.say(CEASED)
            world.drain(["contracts"])
            world.drain(["charges"], 1)
            if not goes_on:
                raise CrashNow

        world.settings = replace(world.settings, horizon_month="2026-07")
        world.agents.clear()
        fuse = Fuse(at, before=True, meanwhile=meanwhile)
        zombie = world.start("charges", fuse)
        with suppress(CrashNow, NotYet):
            if idle:
                zombie.idle({place: world.committed["charges", place]})
            else:
                zombie.do(world.batch(place, 0, 100))
        world.drain(AT_WORK)
        written_right(world, place[1])
        world.drop()
        if len(fuse.calls) < at:
            break
    assert at > 5


def test_written_ahead_past_positions_that_do_not_count(new_world: NewWorld) -> None:
    """Lines would be taken for written ahead as of an offset which only a worker that was cut off has reached."""
    world, place = new_world("2026-05"), (CHARGE_INPUTS, partition_for(A, 2))
    for line in ORDER:
        world.say(line)
    world.drain(AT_WORK)
    first = world.log.end(place)
    world.say(reference("X1", "r1", ListSize={"ods_code": "X1", "as_of": "2026-04-01", "patients": 5}))
    world.drain(["reference"])
    world.say(CEASED)
    world.drain(["contracts"])
    world.settings = replace(world.settings, horizon_month="2026-07")
    world.agents.clear()
    on_the_way = []

    def its_successor() -> None:
        successor = world.start("charges")

        def lost(table: str, rows: Any) -> None:
            on_the_way.append((table, rows))
            raise CrashNow

        with mock.patch.object(successor._context.clickhouse, "insert_arrow", lost), suppress(CrashNow):
            successor.do(world.batch(place, first, 1))

    zombie = world.start("charges", Fuse(3, before=True, meanwhile=its_successor))
    with suppress(NotYet):
        zombie.do(world.batch(place, first, 2))
    assert [table for table, _ in on_the_way] == ["accruals"]
    world.drain(AT_WORK)
    world.clickhouse.insert_arrow(*on_the_way[0])
    written_right(world, place[1])
    world.drop()


@pytest.mark.parametrize("behind", [False, True])
def test_a_clock_alone_does_not_move_the_horizon(new_world: NewWorld, behind: bool) -> None:
    """One worker whose clock says 2090 would have every line written for sixty years, and kept right for ever."""
    world, place = new_world(""), (CHARGE_INPUTS, partition_for(A, 2))
    accruals = Accruals(world.clickhouse)
    now = accruals.now()
    assert abs(now - datetime.now(UTC)) < timedelta(hours=1)
    wrong = now - timedelta(days=70) if behind else now + timedelta(days=25_000)
    due, said = ((at.year * 12 + at.month) for at in (now.astimezone(LONDON), wrong.astimezone(LONDON)))

    def by_a_wrong_clock(line: dict[str, Any]) -> int:
        world.say(line)
        world.drain(["contracts"])
        with mock.patch("agents.charges.datetime") as clock:
            clock.now.return_value = wrong
            world.drain(["charges"])
        return accruals.horizon(place[1], 1)

    assert by_a_wrong_clock(ORDER[0]) == (said if behind else due)
    world.agents["charges"].idle({place: world.committed["charges", place]})
    assert accruals.horizon(place[1], 1) == due
    assert by_a_wrong_clock(ORDER[1]) == due
    world.drop()


@pytest.mark.parametrize("said_again", ["another day", "another revision"])
def test_a_claim_that_has_expired(new_world: NewWorld, said_again: str) -> None:
    """A reading said again for a recent day would count twice when its first claim has expired."""
    today = datetime.now(UTC)
    world = new_world(max(HORIZON, str(today.date())[:7]), claim_window_days=45)
    old, recent = (str((today - timedelta(days)).date()) for days in (60, 1))
    for line in [*METERED_ORDER, used("u0", old, "1"), used("u1", old, "3")]:
        world.say(line)
    world.drain(AT_WORK)
    claims = redis_client.Redis.from_url(world.settings.redis)
    keys = claims.keys("tribill:claims:*:*:*")
    assert keys
    claims.delete(*keys)
    world.say(used("u1", recent, "4", revision=1 if said_again == "another revision" else 0))
    world.drain(AT_WORK)
    if said_again == "another day":
        # The copy passed as certainly new: the one gap that is left to reconciliation.
        with pytest.raises(AssertionError, match="accruals"):
            world.check_state()
        assert world.reconcile() == 1
        world.drain(AT_WORK)
    world.check_state()
    assert world.reconcile() == 0
    # What the usage agent remembers is right again, too.
    world.say(used("u2", recent, "0.25"))
    world.drain(AT_WORK)
    world.check_state()


@pytest.mark.parametrize("restart", [False, True])
def test_rows_that_nobody_should_have_written(new_world: NewWorld, restart: bool) -> None:
    """A wrong accrual row would stand for ever when its charges believe that they have written another."""
    world = new_world(HORIZON)
    patients = ordered(A, P1, PATIENTS, [{"payer": "NHSE", "take": "allocation"}, *BY_PARTY])
    for line in [
        reference("QOP", "r1", Allocation={"ordering_party": "QOP", "financial_year": 2026, "amount": "1000"}),
        *METERED_ORDER,
        contract(C2, "c1", OrderPlaced=placed("C010002-01", "QOP", "10030", patients)),
        reached(C2, "c2", A, P1, "M1", "2026-04-01"),
        used("u1", "2026-04-03", "3"),
    ]:
        world.say(line)
    world.drain(AT_WORK)
    assert world.reconcile() == 0
    # Of a metered and of a timed line, of a line that nobody placed, and one row that is lost.
    world.clickhouse.command(
        "INSERT INTO accruals SELECT * REPLACE ('7/3' AS exact_pence, 7 AS quantity_micros)"
        " FROM accruals FINAL WHERE month = 24315"
    )
    world.clickhouse.command(
        "INSERT INTO accruals SELECT * REPLACE ('C019999' AS order_number, '9' AS exact_pence)"
        " FROM accruals FINAL WHERE month = 24316"
    )
    world.clickhouse.command("ALTER TABLE accruals DELETE WHERE month = 24317 SETTINGS mutations_sync = 2")
    with pytest.raises(AssertionError, match="accruals"):
        world.check_state()
    if restart:
        world.agents.clear()
    assert world.reconcile() > 0
    world.drain(AT_WORK)
    world.check_state()
    assert world.reconcile() == 0


def test_a_batch_keeps_its_good_readings(new_world: NewWorld) -> None:
    """One bad reading of a UsageBatch would take the others with it (RULES 1: each by itself)."""
    world = new_world(HORIZON)
    reading = {"item_id": S, "quantity": "8", "occurred_at": "2026-04-11T10:00:00Z"}
    bad = [{"id": "b2"} | reading | {"quantity": "-8"}, {"id": "b3"} | reading | {"occurred_at": "2026-04-11T10:00:00"}]
    usages = [{"id": "b1"} | reading, *bad, {"id": "b4"} | reading]
    head = {"supplier_id": "10030", "ods_code": P1}
    world.say({"topic": "usage", "value": {"UsageBatch": head | {"usages": usages}}})
    world.drain(AT_WORK)
    assert world.clickhouse.query("SELECT id FROM usage ORDER BY id") == [("b1",), ("b4",)]
    assert len(world.dead_letters()) == 2


# --- zombies: agents that have lost their partition and go on -------------------------------


def test_late_funding_of_a_zombie(new_world: NewWorld) -> None:
    """What a line no longer wants of a party would come back with the late word of cut-off charges."""
    world = new_world(HORIZON)
    order = ordered(A, P1, PATIENTS, [{"payer": "NHSE", "take": "allocation"}, *BY_PARTY])
    for line in [
        reference("QOP", "r1", Allocation={"ordering_party": "QOP", "financial_year": 2026, "amount": "1000"}),
        contract(C1, "c1", OrderPlaced=placed("C010001-01", "QOP", "10030", order)),
        reached(C1, "c2", A, P1, "M1", "2026-04-01"),
    ]:
        world.say(line)
    world.drain(["contracts", "reference"])
    place = (CHARGE_INPUTS, partition_for(A, 2))
    zombie = world.start("charges", held=True)
    zombie.do(world.batch(place, 0, 100))
    world.say(contract(C1, "c3", FundingChanged={"item_id": A, "funding": BY_PARTY, "from": "2026-03-01"}))
    world.drain(AT_WORK)
    zombie._context.outbox.release()
    world.drain(AT_WORK)
    world.check_state()


@pytest.mark.parametrize("change", ["funding", "party"])
def test_a_later_row_that_knows_no_earlier_party(new_world: NewWorld, change: str) -> None:
    """What was wanted of a party at an offset would be drawn for ever behind another's row of a later one."""
    no_more: dict[str, Any] = {
        "funding": {"FundingChanged": {"item_id": A, "funding": BY_PARTY, "from": "2026-03-01"}},
        "party": {"PartyNovated": {"ordering_party": "QHM", "from": "2026-03-01"}},
    }[change]
    order = ordered(A, P1, PATIENTS, [{"payer": "NHSE", "take": "allocation"}, *BY_PARTY])
    for at in count(1):
        world, place = new_world(HORIZON), (CHARGE_INPUTS, partition_for(A, 2))
        for line in [
            reference("QOP", "r1", Allocation={"ordering_party": "QOP", "financial_year": 2026, "amount": "1000"}),
            contract(C1, "c1", OrderPlaced=placed("C010001-01", "QOP", "10030", order)),
            reached(C1, "c2", A, P1, "M1", "2026-04-01"),
            contract(C1, "c3", **no_more),
        ]:
            world.say(line)
        world.drain(["reference", "contracts"], 1)
        killed = world.start("charges", Fuse(at, before=True))
        first = world.committed.get(("charges", place), 0)
        with suppress(CrashNow):
            killed.do(world.batch(place, first, 100))
        while world.waiting("charges", place):
            world.agents.pop("charges", None)
            world.step("charges", place, 1)
        world.drain(AT_WORK)
        world.check_state()
        world.drop()
        if len(killed._context.fuse.calls) < at:
            break
    assert at > 5


RETRACTED = contract(C1, "c4", Retracted={"change_id": "c1"})
NOT_LIVE = contract(C1, "c4", Retracted={"change_id": "c2"})


@pytest.mark.parametrize(
    ("known", "said", "size"), [(1, RETRACTED, 100), (3, RETRACTED, 2), (1, NOT_LIVE, 2), (3, NOT_LIVE, 100)]
)
def test_charges_stopped_at_any_write(new_world: NewWorld, known: int, said: Record, size: int) -> None:
    """A row of charges that have lost their partition would stand where their successor writes none."""
    place, worlds = (CHARGE_INPUTS, partition_for(S, 2)), []
    for at in count(1):
        world = new_world(HORIZON)
        worlds.append(world)
        for line in METERED_ORDER[:known]:
            world.say(line)
        world.drain(AT_WORK)
        for line in [*METERED_ORDER[known:], used("u1", "2026-04-03", "3")]:
            world.say(line)
        world.drain(["contracts", "intake", "usage"], 1)

        def meanwhile(world: World = world) -> None:
            world.say(said)
            world.drain(["contracts"], 1)
            world.drain(["charges"], size)

        first = world.committed.get(("charges", place), 0)
        zombie = world.stopped("charges", world.batch(place, first, 100), at, meanwhile, held=bool(at % 2))
        if zombie is None:
            break
        world.drain(AT_WORK)
        zombie._context.outbox.release()
        world.drain(AT_WORK)
        world.check_state()
    assert len(worlds) > 5
    for world in worlds:
        world.drop()


@pytest.mark.parametrize("done", [False, True])
def test_a_zombie_takes_over_once_more(new_world: NewWorld, done: bool) -> None:
    """Charges that have lost their partition and begin anew would end batches where their successor ends none."""
    world, place = new_world(HORIZON), (CHARGE_INPUTS, partition_for(S, 2))
    for line in [*METERED_ORDER, used("u1", "2026-04-03", "3")]:
        world.say(line)
    world.drain(["contracts", "intake", "usage"], 1)
    before = world.log.end(place)
    world.say(RETRACTED)
    world.drain(["contracts"])
    zombie = world.start("charges")

    def begin_anew() -> None:
        zombie.do(world.batch(place, 0, before))

    if not done:
        # Its successor has written, and has not yet said what its rows count.
        world.agents["charges"] = world.start("charges", Fuse(4, before=True, meanwhile=begin_anew))
    while world.waiting("charges", place):
        world.step("charges", place)
    if done:
        begin_anew()
    assert "insert charge_epochs" in zombie._context.fuse.calls
    world.drain(AT_WORK)
    world.check_state()
    world.drop()


def test_what_was_taken_for_done_is_doubted_later(new_world: NewWorld) -> None:
    """A batch that a successor acknowledged as another's would count nowhere once a third announced the same."""
    world, place = new_world(HORIZON), (CHARGE_INPUTS, partition_for(A, 2))
    for line in ORDER:
        world.say(line)
    world.drain(AT_WORK)
    first = world.log.end(place)
    world.say(CEASED)
    world.drain(["contracts"])
    world.say(reference("X1", "r1", ListSize={"ods_code": "X1", "as_of": "2026-04-01", "patients": 5}))
    world.drain(["reference"])
    batch = world.batch(place, first, 2)

    def stopped(before: int) -> Task:
        fuse = Fuse(before, before=True)
        agent = world.start("charges", fuse)
        task = Task(lambda: agent.do(batch))
        fuse.meanwhile = task.pause
        assert not task.go_on()
        return task

    world.agents.clear()
    writes, begins = stopped(3), stopped(2)
    assert writes.go_on()
    assert isinstance(writes.error, NotYet)  # all is written, and another has begun
    assert world.step("charges", place, 1)
    assert begins.go_on()
    assert isinstance(begins.error, NotYet)
    world.agents.clear()
    world.say(reference(P1, "r2", ListSize={"ods_code": P1, "as_of": "2026-04-01", "patients": 700}))
    world.drain(AT_WORK)
    world.check_state()
    world.drop()


def test_funding_that_did_not_know_the_allocation(new_world: NewWorld) -> None:
    """What cut-off funding drew without an allocation would stand behind what its successor drew with it."""
    world = new_world(HORIZON)
    order = ordered(A, P1, PATIENTS, [{"payer": "NHSE", "take": "allocation"}, *BY_PARTY])
    for line in [
        reference(P1, "r0", ListSize={"ods_code": P1, "as_of": "2026-04-01", "patients": 1000}),
        contract(C1, "c1", OrderPlaced=placed("C010001-01", "QOP", "10030", order)),
        reached(C1, "c2", A, P1, "M1", "2026-04-01"),
    ]:
        world.say(line)
    world.drain(["contracts", "reference", "charges"], 1)
    place = ("funding-inputs", partition_for("QOP", 2))
    end = world.log.end(place)
    zombie = world.start("funding")
    world.say(reference("QOP", "r1", Allocation={"ordering_party": "QOP", "financial_year": 2026, "amount": "1000"}))
    world.drain(["reference"])
    world.step("funding", place, 1)
    while world.committed["funding", place] < end - 1:
        world.step("funding", place, 1)
    with mock.patch.object(type(zombie._context.ledger), "changes", return_value=[]):
        zombie.do(world.batch(place, 0, end))
    world.drain(AT_WORK)
    world.check_state()
    world.drop()


def test_charges_go_on_during_a_close(new_world: NewWorld) -> None:
    """What is accrued between the close's two looks is no drift."""
    world = new_world(HORIZON, SUPPLIERS)
    read, late = Accruals.exact_rows, [used("late", "2026-04-20", "500")]

    def after_more(self: Accruals, month: int) -> Any:
        while late:
            world.say(late.pop())
            world.drain([role for role in AGENTS if role != "period-close"])
        return read(self, month)

    with mock.patch.object(Accruals, "exact_rows", after_more):
        for _ in play(world, BOOK):
            break
    assert not late
    world.check_closes(EXPECTED.closes[:1])
    world.check_state()
    world.drop()


@pytest.mark.parametrize("first", [1, 2, 3])
def test_late_totals_of_a_zombie(new_world: NewWorld, first: int) -> None:
    """Day totals as of an older offset, arriving late, would replace newer ones."""
    world = new_world(HORIZON)
    readings = [used("u1", "2026-04-03", "3"), used("u2", "2026-04-03", "4"), used("u1", "2026-04-07", "5", revision=1)]
    for line in [*METERED_ORDER, *readings]:
        world.say(line)
    world.drain(["contracts", "intake"], 1)
    place = next(place for place in world.places("usage") if world.waiting("usage", place))
    zombie = world.start("usage", held=True)
    zombie.do(world.batch(place, 0, first))
    world.drain(AT_WORK, 2)
    zombie._context.outbox.release()
    world.agents.pop("usage")
    world.drain(AT_WORK)
    world.check_state()
    # It goes on with what it still has in hand, overlapping what its successor did.
    world.say(used("u2", "2026-04-09", "4", revision=1))
    world.drain(AT_WORK, 1)
    zombie.do(world.batch(place, 0, 4))
    zombie._context.outbox.release()
    world.drain(AT_WORK)
    world.check_state()


# --- Redis away, Redis emptied --------------------------------------------------------------


@pytest.mark.parametrize("away", ["killed", "emptied"])
def test_redis_goes_away(stack: EmbeddedStack, new_world: NewWorld, away: str) -> None:
    """A duplicate would count twice, or usage be lost, while claims are gone (promise 2)."""
    world = new_world(HORIZON, SUPPLIERS)
    lines = iter(BOOK)
    first = [next(lines) for _ in range(22)]
    for line in first:
        world.say(line)
    world.drain(AT_WORK)
    try:
        if away == "killed":
            stack.kill("redis")
        else:
            redis_client.Redis.from_url(stack.redis).flushall()
        # All again, and what is new; then half of it again once Redis is back, empty.
        for line in [*first, *(line for line in lines if "close" not in line)]:
            world.say(line)
        world.drain(["intake"], 3)
        if away == "killed":
            # Usage waits: what it kept without claims would let its copies pass as new.
            with pytest.raises(ClaimsUnavailable):
                world.drain(AT_WORK, 3)
            stack.restart("redis")
        for place in world.places("usage"):
            if world.waiting("usage", place):
                world.crash("usage", world.batch(place, world.committed.get(("usage", place), 0), 4), 2)
        world.drain(AT_WORK, 3)
        world.check_state()
    finally:
        if away == "killed":
            stack.restart("redis")
    for line in BOOK:
        if "close" not in line and line["topic"].startswith("usage"):
            world.say(line)
    world.drain(AT_WORK, 5)
    world.check_state()
    assert (
        world.clickhouse.query("SELECT id, revision FROM usage GROUP BY ALL HAVING uniqExact(topic, offset) > 1") == []
    )


# --- any schedule ---------------------------------------------------------------------------


class Schedule:
    """Plays a book in random steps: fetches of any size, kills at any call, zombies, an emptied Redis."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        #: Cut-off agents: role, agent, and where in each partition it stands.
        self.zombies: list[tuple[str, Any, dict[tuple[str, int], int]]] = []
        self.redis = redis_client.Redis.from_url(world.settings.redis)
        self.told: list[str] = []
        #: How many agents are stopped one within another.
        self.depth = 0

    def play(self, book: list[Record]) -> None:
        """The whole book; before each close every stage has done all."""
        for lines, period in parts(book):
            for line in lines:
                self.world.say(line)
                if self.random.random() < 0.3:
                    self.some()
            while any(self.world.waiting(role, place) for role in AT_WORK for place in self.world.places(role)):
                self.some()
            if period:
                self._close(period)
        for role, agent, _ in self.zombies:
            self.told.append(f"the {role} zombie's word arrives")
            agent._context.outbox.release()
        self.world.drain(AT_WORK)

    def some(self) -> None:
        """One thing happens."""
        roles = [
            (role, place) for role in AT_WORK for place in self.world.places(role) if self.world.waiting(role, place)
        ]
        if not roles:
            return
        role, place = self.random.choice(roles)
        first = self.world.committed.get((role, place), 0)
        batch = self.world.batch(place, first, self.random.choice([1, 2, 3, 5, 10_000]))
        chance = self.random.random()
        if chance < 0.1 and self.depth < 2:
            self._stop(role, batch)
        elif chance < 0.2:
            at, before, eager = self.random.randint(1, 8), self.random.random() < 0.5, self.random.random() < 0.7
            died: Any = self.world.crash(role, batch, at, before=before, eager=eager)
            self.told.append(
                f"{role} {place} {first}-{batch.end_offset} killed at call {at}: {died}, {before=} {eager=}"
            )
        elif chance < 0.3:
            self._cut_off(role)
        elif chance < 0.4 and self.zombies:
            self._zombie()
        elif chance < 0.43:
            self.told.append("Redis is emptied")
            self.redis.flushdb()
        else:
            self.told.append(f"{role} {place} {first}-{batch.end_offset}")
            self.world.step(role, place, len(batch.records))

    def _stop(self, role: str, batch: Batch) -> None:
        """The agent is stopped before a call, others do its work, and it goes on: a zombie."""
        at, others = self.random.randint(1, 8), self.random.randint(1, 6)
        shown = f"{role} {batch.partition} {batch.first_offset}-{batch.end_offset}, stopped before call {at}"

        def meanwhile() -> None:
            self.told.append(f"{shown}, while:")
            self.depth += 1
            for _ in range(others):
                self.some()
            self.depth -= 1
            self.told.append(f"{shown}, goes on")

        held = self.random.random() < 0.5
        if zombie := self.world.stopped(role, batch, at, meanwhile, held=held):
            zombie._context.fuse.at = 0
            zombie._context.outbox.held, zombie._context.outbox._eager = True, False
            # It does the batch that it has in hand again.
            self.zombies.append((role, zombie, {(batch.topic, batch.partition): batch.first_offset}))

    def _cut_off(self, role: str) -> None:
        """The agent has lost its partitions and does not know it yet: what it sends from now on is late."""
        if agent := self.world.agents.pop(role, None):
            self.told.append(f"{role} is cut off")
            outbox = agent._context.outbox
            outbox.held, outbox._eager = True, False
            stands = {place: end for (each, place), end in self.world.committed.items() if each == role}
            self.zombies.append((role, agent, stands))

    def _zombie(self) -> None:
        role, agent, stands = self.zombies[self.random.randrange(len(self.zombies))]
        if self.random.random() < 0.5:
            self.told.append(f"the {role} zombie's word arrives")
            agent._context.outbox.release()
            return
        place = self.random.choice(self.world.places(role))
        batch = self.world.batch(place, stands.get(place, 0), self.random.choice([1, 3, 10_000]))
        if batch.records:
            self.told.append(f"the {role} zombie does {place} {batch.first_offset}-{batch.end_offset}")
            try:
                agent.do(batch)
            except NotYet:
                return
            stands[place] = batch.end_offset

    def _close(self, period: str) -> None:
        offset = self.world.request_close(period)
        place = (PERIOD_EVENTS, 0)
        while self.world.waiting("period-close", place):
            if self.random.random() < 0.3:
                first = self.world.committed.get(("period-close", place), 0)
                at = self.random.randint(1, 12)
                self.told.append(f"the close of {period} is killed at call {at}")
                self.world.crash("period-close", self.world.batch(place, first, 10_000), at)
            self.world.step("period-close", place, self.random.choice([1, 10_000]))
        answer = self.world.documents.answer_since(period, self.world.settings.log_generation, offset)
        assert answer is not None, "whoever asked for the close waits for ever"
        assert answer[0] == "closed", answer


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    print_blob=True,
)
@given(book=books(flat_only=False, max_events=8), seed=st.integers(0, 2**32))
def test_any_schedule(new_world: NewWorld, book: list[Record], seed: int) -> None:
    """Documents would depend on how the work was cut up, who was killed, or what came late."""
    closes = [line["close"] for line in book if "close" in line]
    world = new_world(month_text(parse_month(max(closes)) + 1), ("10000", "10052"))
    schedule = Schedule(world, seed)
    try:
        schedule.play(book)
        world.check_closes(oracle.run(book, arrival=ARRIVAL).closes)
        world.check_state()
        assert world.reconcile() == 0, "reconciliation sees a drift where there is none"
    except BaseException:
        print(f"seed {seed}; what happened:", *schedule.told, sep="\n  ")
        raise
    finally:
        world.drop()
