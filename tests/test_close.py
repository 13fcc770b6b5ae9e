"""What stops a close and what accepts it, attestations, previews, and files that a kill leaves whole or not at all.

Real agents over a real ClickHouse; the log is in memory (`tests/crash_world.py`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis as redis_client

from agents import period_close
from agents.deriving import Deriving
from rating.calendar import parse_month
from rating.completeness import Completeness, Reported
from rating.statements import Papers
from sinks.accruals import Accruals
from sinks.clickhouse import LedgerUnavailable
from sinks.papers.files import write_files
from sinks.parties import PartyStore
from streams.topics import PERIOD_EVENTS, USAGE_ACCEPTED
from tests.crash_world import AGENTS, CrashNow, Fuse, World
from tests.rich_book import BOOK, BY_PARTY, C1, C2, METERED, P1, SUPPLIERS, S, contract, ordered, placed, reached, used
from tribill.closing import CloseRefused
from tribill.embedded.stack import EmbeddedStack
from tribill.preview import Preview
from tribill.verify import verify

pytestmark = pytest.mark.timeout(280)

NewWorld = Callable[..., World]
AT_WORK = [role for role in AGENTS if role != "period-close"]
APRIL = parse_month("2026-04")
#: What a close writes.
WRITTEN = ("adjustments", "allocations_wanted", "document_rows", "documents", "evidence", "periods", "statements")

_numbers = count(1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStack]:
    """ClickHouse and Redis; the broker's place is taken by a log in memory."""
    with EmbeddedStack(tmp_path_factory.mktemp("stack"), kafka="127.0.0.1:1") as stack:
        yield stack


@pytest.fixture(scope="module")
def new_world(stack: EmbeddedStack) -> NewWorld:
    """Makes a world with a ledger of its own."""

    def make(**options: Any) -> World:
        number = next(_numbers)
        redis = f"{stack.redis.removesuffix('/0')}/{number % 16}"
        redis_client.Redis.from_url(redis).flushdb()
        return World(f"{stack.clickhouse}/close{number}", redis, "2026-06", SUPPLIERS, **options)

    return make


def metered(world: World) -> None:
    """An order with one line on demand, live in April, and two readings of it."""
    order = placed("C010001-01", "QOP", "10030", ordered(S, P1, METERED, BY_PARTY))
    world.say(contract(C1, "c1", OrderPlaced=order))
    world.say(reached(C1, "c2", S, P1, "M1", "2026-04-01"))
    world.say(reached(C1, "c3", S, P1, "M2", "2026-04-01"))
    world.say(used("u1", "2026-04-03", "3"))
    world.say(used("u2", "2026-04-04", "4"))
    world.drain(AT_WORK)


def attest(world: World, readings: int, quantity: str, supplier: str = "10030") -> None:
    """A supplier's word on April."""
    said = {"supplier_id": supplier, "period": "2026-04", "count": readings, "quantity": quantity}
    world.say({"topic": PERIOD_EVENTS, "value": {"UsageComplete": said}})
    world.drain(["period-close"])


def ask(world: World, *accept: str, period: str = "2026-04") -> tuple[str, str]:
    """Asks for a close, has all done that there is, and returns the answer."""
    offset = world.request_close(period, *accept)
    world.drain(["period-close"])
    answer = world.documents.answer_since(period, 1, offset)
    assert answer is not None, "whoever asked for the close waits for ever"
    return answer


def written(world: World) -> dict[str, int]:
    """How many rows there are of what a close writes."""
    return {table: world.clickhouse.query(f"SELECT count() FROM {table}")[0][0] for table in WRITTEN}


def statement(world: World, kind: str, code: str = "") -> dict[str, Any]:
    """A statement of the one period that is closed."""
    [(body,)] = world.clickhouse.query(
        "SELECT body FROM statements FINAL WHERE kind = {kind:String} AND code = {code:String}",
        {"kind": kind, "code": code},
    )
    found: dict[str, Any] = json.loads(body)
    return found


class MemoryBroker:
    """What a close and a preview ask of the broker."""

    def __init__(self, world: World) -> None:
        self._world = world

    def end_offsets(self, topics: Any) -> dict[tuple[str, int], int]:
        """Where the partitions of topics end."""
        return {place: len(entries) for place, entries in self._world.log.records.items() if place[0] in {*topics}}

    def behind(self, group: str, ends: dict[tuple[str, int], int]) -> int:
        """What a role has still to do."""
        done = self._world.committed
        return sum(end - done.get((group.removeprefix("tribill-"), place), 0) for place, end in ends.items())


# --- refusals -------------------------------------------------------------------------------


def test_suspense_above_the_limit(new_world: NewWorld) -> None:
    """It refuses, leaves nothing behind, and the next request takes a new cut; or it is accepted, for the record."""
    world = new_world(suspense_limit="2.5")
    metered(world)
    world.say(used("u3", "2026-04-05", "2.5", ods="B81001"))
    world.say(used("u4", "2026-04-05", "0.000001", item="10031-S-001", ods="B81001"))
    world.drain(AT_WORK)
    outcome, why = ask(world)
    assert outcome == "refused"
    assert "2.500001 units in suspense, more than 2.5" in why
    assert "--accept-suspense" in why
    assert not any(written(world).values())
    order = placed("C010002-01", "QOP", "10030", ordered(S, "B81001", METERED, BY_PARTY))
    world.say(contract(C2, "c1", OrderPlaced=order))
    world.say(reached(C2, "c2", S, "B81001", "M1", "2026-04-01"))
    world.drain(AT_WORK)
    assert ask(world) == ("closed", mock.ANY)
    assert statement(world, "control")["accepted"] == []
    assert {row.ods_code for row in world.documents.rows(APRIL, "held")} == {"B81001"}


@pytest.mark.parametrize("lagging", ["usage", "charges"])
def test_lag_that_nobody_works_off(new_world: NewWorld, lagging: str) -> None:
    """The close waits, and refuses when nothing is done; it is accepted only where the ledger has all."""
    world = new_world(close_wait_seconds=1)
    metered(world)
    world.say(used("u3", "2026-04-05", "2"))
    world.drain(AT_WORK[: AT_WORK.index(lagging)])
    agent = world.agents["period-close"] = world.start("period-close")
    del agent._wait  # the real one
    agent._broker = MemoryBroker(world)

    waited: list[str] = []

    def until_answered(*accept: str, at_work: Sequence[str] = ()) -> tuple[str, str]:
        offset = world.request_close("2026-04", *accept)
        while world.waiting("period-close", (PERIOD_EVENTS, 0)):
            world.drain(at_work)
            if not world.step("period-close", (PERIOD_EVENTS, 0)):
                waited.append((world.documents.answer_since("2026-04", 1, offset) or ("", ""))[1])
                time.sleep(0.2)
        return world.documents.answer_since("2026-04", 1, offset) or ("", "")

    outcome, why = until_answered()
    assert outcome == "refused"
    assert re.search(f"2026-04 waits for {lagging}: [1-9][0-9]* records", waited[0])
    assert f"none was done for 1 s. Start the role {lagging} and ask again" in why
    assert ("--accept-lag" in why) == (lagging == "charges")
    outcome, detail = until_answered("lag")
    assert outcome == ("closed" if lagging == "charges" else "refused")
    assert ("accepted by tester: lag of charges: " in detail) == (lagging == "charges")
    assert any(written(world).values()) == (lagging == "charges")
    assert until_answered(at_work=AT_WORK)[0] == "closed"
    # Also a partition of charges that no total was for counts all usage now, so accruals are compared with the cut.
    found = agent._broker.end_offsets([USAGE_ACCEPTED])
    ends = {f"{topic}/{partition}": end for (topic, partition), end in found.items() if end}
    for partition in range(world.settings.partitions):
        counted = Accruals(world.clickhouse).positions(partition, world.settings.log_generation)
        assert ends == {place: end for place, end in counted.items() if place in ends}


def test_accepted_suspense_is_recorded(new_world: NewWorld) -> None:
    """Who accepted what stands in the ledger, in the answer and on the control sheet."""
    world = new_world(suspense_limit="0")
    metered(world)
    world.say(used("u3", "2026-04-05", "2", ods="B81001"))
    world.drain(AT_WORK)
    outcome, detail = ask(world, "suspense", "no such thing")
    assert outcome == "closed"
    assert "accepted by tester: usage of 2 units in suspense, more than 0" in detail
    assert statement(world, "control")["accepted"] == ["usage of 2 units in suspense, more than 0"]
    rows = world.clickhouse.query("SELECT accepted, requested_by FROM close_requests FINAL WHERE outcome = 'closed'")
    assert rows == [(["suspense"], "tester")]
    assert ask(world)[0] == "closed"  # asked again it is only answered


def test_what_nothing_accepts(new_world: NewWorld) -> None:
    """A month that has not ended and one out of order are refused whatever is accepted."""
    world = new_world(close_any_period=False)
    metered(world)
    everything = period_close.ACCEPTABLE
    outcome, why = ask(world, *everything, period="2199-01")
    assert (outcome, "2199-01 can be closed from" in why) == ("refused", True)
    assert ask(world)[0] == "closed"
    outcome, why = ask(world, *everything, period="2026-06")
    assert (outcome, "so 2026-05 is next" in why) == ("refused", True)
    assert ask(world, *everything, period="2026-03")[0] == "refused"


def test_a_period_that_has_not_ended(new_world: NewWorld) -> None:
    """The setting that allows it is on record: whoever has the documents sees that they came early."""
    world = new_world(close_any_period=True)
    metered(world)
    early = "the cut was fixed before the period's end, which close_any_period allows"
    assert "said on the control sheet: 2199-01 ends 2199-02-01" in "\n".join(preview(world, "2199-01").lines())
    # Also when the period is over by the time that it is decided: usage that came after the cut is not in it.
    with mock.patch.object(period_close, "has_ended", return_value=True):
        outcome, detail = ask(world, period="2199-01")
    assert (outcome, f"accepted by tester: {early}" in detail) == ("closed", True)
    assert statement(world, "control")["accepted"] == [early]


def test_a_kill_at_any_step_of_a_refusal(new_world: NewWorld) -> None:
    """Killed while it refuses it refuses all the same, and what is then accepted closes with a cut of its own."""
    for call in range(1, 20):
        world = new_world(suspense_limit="0")
        metered(world)
        world.say(used("u3", "2026-04-05", "2", ods="B81001"))
        world.drain(AT_WORK)
        offset = world.request_close("2026-04")
        place = (PERIOD_EVENTS, 0)
        world.step("period-close", place, 1)
        died = world.crash("period-close", world.batch(place, offset + 1, 1), call)
        world.drain(["period-close"])
        assert (world.documents.answer_since("2026-04", 1, offset) or ("", ""))[0] == "refused", call
        assert not any(written(world).values())
        assert ask(world, "suspense")[0] == "closed"
        [(cuts,)] = world.clickhouse.query("SELECT count() FROM cuts FINAL")
        assert cuts == 2
        world.drop()
        if not died:
            assert call > 3
            return
    raise AssertionError("the refusal never came to its end")


def spoil(world: World) -> None:
    """A row of the accruals that says what nobody has written."""
    world.clickhouse.command(
        "ALTER TABLE accruals UPDATE exact_pence = '7/3' WHERE month = 24315 SETTINGS mutations_sync = 2"
    )


def test_a_drift_is_mended(new_world: NewWorld) -> None:
    """The close asks for the rows to be rated again and waits for it; then it closes without a drift."""
    world = new_world()
    metered(world)
    spoil(world)
    world.request_close("2026-04")
    assert world.step("period-close", (PERIOD_EVENTS, 0))
    assert not world.step("period-close", (PERIOD_EVENTS, 0))
    outcome, why = world.documents.answer_since("2026-04", 1, 0) or ("", "")
    assert outcome == "waiting"
    assert re.search(r"accruals differ from the ledger by .* rated again \(1 of 3\)", why)
    assert not any(written(world).values())
    world.drain(AT_WORK)
    world.drain(["period-close"])
    assert world.documents.answer_since("2026-04", 1, 0) == ("closed", "")
    [(drift,)] = world.clickhouse.query("SELECT drift_pence FROM periods")
    assert drift == 0


def test_a_sink_fails_after_a_drift_was_mended(new_world: NewWorld) -> None:
    """The next try would compare the accruals with what the failed one had let go, and find them all wrong."""
    world = new_world()
    metered(world)
    spoil(world)
    world.request_close("2026-04")
    for _ in range(2):
        world.step("period-close", (PERIOD_EVENTS, 0))
    world.drain(AT_WORK)
    issue, tries = Deriving.issue, []

    def fails_once(*arguments: Any, **options: Any) -> Any:
        tries.append(arguments)
        if len(tries) == 1:
            raise LedgerUnavailable("for a moment")
        return issue(*arguments, **options)

    with mock.patch.object(Deriving, "issue", fails_once):
        with pytest.raises(LedgerUnavailable):
            world.step("period-close", (PERIOD_EVENTS, 0))
        world.drain(["period-close"])
    assert len(tries) == 2
    assert world.documents.answer_since("2026-04", 1, 0) == ("closed", "")


def test_papers_that_do_not_tie_out(new_world: NewWorld) -> None:
    """A close whose papers contradict each other is refused aloud, and nothing of it is written; mended it closes."""
    world = new_world()
    metered(world)
    practices = Papers.practices
    with mock.patch.object(Papers, "practices", lambda papers: practices(papers)[1:]):
        outcome, why = ask(world)
    assert outcome == "refused"
    assert "do not tie out: net of the practice statements" in why
    assert not any(written(world).values())
    assert ask(world)[0] == "closed"


def test_a_drift_that_stays(new_world: NewWorld) -> None:
    """After some tries it refuses, and nothing is written; accepted it closes and says how much."""
    world = new_world()
    metered(world)
    spoil(world)
    with mock.patch.object(period_close.Reconcile, "reconcile", return_value=1):
        world.request_close("2026-04")
        assert world.step("period-close", (PERIOD_EVENTS, 0))
        for _ in range(3):
            assert not world.step("period-close", (PERIOD_EVENTS, 0))
        world.drain(["period-close"])
        outcome, why = world.documents.answer_since("2026-04", 1, 0) or ("", "")
        assert outcome == "refused"
        assert "--accept-drift" in why
        assert not any(written(world).values())
        outcome, detail = ask(world, "drift")
    assert outcome == "closed"
    assert "accepted by tester: the accruals differ from the ledger by" in detail
    [(drift,)] = world.clickhouse.query("SELECT drift_pence FROM periods")
    assert drift > 0


# --- attestations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attested", "found", "status", "said"),
    [
        (Reported(2, 7_000_000), Reported(2, 7_000_000), "complete", "complete"),
        (Reported(3, 7_000_000), Reported(2, 7_000_000), "short", "short by 1 reading"),
        (Reported(2, 7_000_000), Reported(2, 7_500_000), "over", "over by 0.5 units"),
        (Reported(1, 9_000_000), Reported(2, 7_000_000), "over", "over by 1 reading and short by 2 units"),
        (None, Reported(2, 7_000_000), "none", "none attested; 2 readings of 7 units are here"),
    ],
)
def test_how_complete_usage_is(attested: Reported | None, found: Reported, status: str, said: str) -> None:
    """Readings decide, then quantity."""
    complete = Completeness("10030", attested, found)
    assert (complete.status, complete.text) == (status, said)


def test_what_an_attestation_counts(new_world: NewWorld) -> None:
    """Readings that stand at the cut: a corrected one once, in its last month; cancelled ones and copies not at all."""
    world = new_world()
    metered(world)
    for line in (
        used("u1", "2026-04-03", "3"),
        used("u2", "2026-04-04", "5", revision=1),
        used("u3", "2026-04-05", "9"),
        used("u3", "2026-04-05", "0", revision=1),
        used("u4", "2026-04-05", "9"),
        used("u4", "2026-05-05", "9", revision=1),
        used("u5", "2026-03-31", "1"),
        used("u5", "2026-04-30", "1", revision=1),
        # London is an hour ahead: this is the first of May.
        used("u6", "2026-04-30", "1") | {"value": used("u6", "2026-04-30", "1")["value"] | {
            "occurred_at": "2026-04-30T23:30:00Z"}},
    ):  # fmt: skip
        world.say(line)
    world.drain(AT_WORK)
    attest(world, 4, "10")
    attest(world, 3, "9")  # said again: the last counts
    attest(world, 5, "1", "10031")
    assert ask(world)[0] == "closed"
    attest(world, 99, "1")  # after the cut
    assert statement(world, "supplier", "10030")["usage"] == {
        "status": "complete",
        "said": "complete",
        "found": {"count": 3, "quantity": "9"},
        "attested": {"count": 3, "quantity": "9"},
    }
    assert statement(world, "supplier", "10031")["usage"]["said"] == "short by 5 readings and 1 units"
    assert {code: each["status"] for code, each in statement(world, "control")["usage"].items()} == {
        "10030": "complete",
        "10031": "short",
    }


def test_a_close_waits_for_attestations(new_world: NewWorld) -> None:
    """The cut is fixed when all have attested and the ledger has as much, also by another process after a crash."""
    world = new_world(attestation_days=60_000)
    metered(world)
    outcome, detail = ask(world)
    assert outcome == "attestations"
    assert "for attestations of usage: 10030 (none attested; 2 readings of 7 units are here)" in detail
    attest(world, 3, "8")
    world.agents.clear()
    world.agents["period-close"] = agent = world.start("period-close")
    agent.idle({})
    assert "10030 (short by 1 reading and 1 units)" in (world.documents.answer_since("2026-04", 1, 0) or ("", ""))[1]
    world.say(used("u3", "2026-04-30", "1"))
    world.drain(AT_WORK)
    agent.idle({})
    world.drain(["period-close"])
    assert world.documents.answer_since("2026-04", 1, 0) == ("closed", "")
    assert statement(world, "control")["usage"]["10030"]["status"] == "complete"
    agent.idle({})
    assert world.waiting("period-close", (PERIOD_EVENTS, 0)) == 0


def test_a_kill_while_the_cut_is_fixed_at_last(new_world: NewWorld) -> None:
    """Killed at any step of it, the cut is fixed by the next process; a second one in the log changes nothing."""
    for call in range(1, 6):
        world = new_world(attestation_days=60_000)
        metered(world)
        ask(world)
        attest(world, 2, "7")
        world.agents.clear()
        with pytest.raises(CrashNow) if call < 4 else nullcontext():
            world.start("period-close", Fuse(call)).idle({})
        world.start("period-close").idle({})
        world.drain(["period-close"])
        assert world.documents.answer_since("2026-04", 1, 0) == ("closed", mock.ANY)
        assert [number for number, _, _ in world.documents.documents(APRIL)] == ["QOP-10030-2026-04"]
        world.drop()


@pytest.mark.parametrize("accepted", [True, False])
def test_missing_attestations_accepted_or_overdue(new_world: NewWorld, accepted: bool) -> None:
    """It closes at once, and says whose usage is short."""
    world = new_world(attestation_days=60_000 if accepted else 1)
    metered(world)
    attest(world, 3, "8")
    outcome, detail = ask(world, *(["attestations"] if accepted else []))
    assert (outcome, detail) == ("closed", "usage of 10030 is short by 1 reading and 1 units")


# --- previews -------------------------------------------------------------------------------


def preview(world: World, period: str) -> Preview:
    """A preview of a period over the log in memory."""
    with mock.patch("tribill.preview.Broker", return_value=MemoryBroker(world)):
        return Preview(world.settings, parse_month(period), lambda text: None)


def test_a_preview_is_the_close_to_come(new_world: NewWorld, tmp_path: Path) -> None:
    """The same rows, sums, causes and statements, without numbers; nothing of it is seen by the close."""
    world = new_world(specimen=True)
    tables = [name for (name,) in world.clickhouse.query(
        "SELECT name FROM system.tables WHERE database = currentDatabase() AND engine LIKE '%MergeTree'"
    )]  # fmt: skip

    def rows() -> dict[str, int]:
        return {name: world.clickhouse.query(f"SELECT count() FROM {name}")[0][0] for name in tables}

    for line in BOOK:
        if "close" not in line:
            world.say(line)
            continue
        period, month = line["close"], parse_month(line["close"])
        world.drain(AT_WORK)
        before, shown = rows(), preview(world, period)
        files = write_files(shown, month, tmp_path / "preview")
        assert rows() == before
        assert shown.drift == 0
        assert list(shown.findings()) == []
        assert not [path for path in files if path.suffix == ".xml" or path.parent.name == "odoo"]
        assert ask(world, period=period)[0] == "closed"
        for kind in ("invoiced", "held"):
            assert shown.rows(month, kind) == world.documents.rows(month, kind)
        said = [(each.payer, each.supplier_id, each.kind, each.net_pence, each.explanations)
                for each in shown.issue.documents]  # fmt: skip
        closed = world.documents.documents(month)
        assert len(said) == len(closed)
        for payer, supplier, kind, net, explained in said:
            [body] = [each for _, _, each in closed if (each["payer"], each["supplier_id"]) == (payer, supplier)]
            assert (body["kind"], body["net"].replace(".", "")) == (kind, f"{net:03d}" if net >= 0 else f"{net:04d}")
            causes = {cause for cause, _ in explained.values()}
            assert {each["cause"] for each in body["lines"] if "cause" in each} == causes
        assert all("-PREVIEW-" in each.number for each in shown.issue.documents)
        assert all("-0000" in number for number, _, _ in closed)
    verdict = verify(tmp_path / "preview", [], lambda text: None, verbose=False)
    assert verdict.exit_code == 0
    assert verdict.documents


def test_a_preview_says_what_a_close_would_meet(new_world: NewWorld) -> None:
    """Order, time, lag, suspense, drift, attestations; a closed period has no preview."""
    world = new_world(close_any_period=False, suspense_limit="0", attestation_days=60_000)
    metered(world)
    assert ask(world, "attestations")[0] == "closed"
    world.say(used("u3", "2026-05-05", "2", ods="B81001"))
    world.drain(AT_WORK)
    spoil(world)
    world.say(used("u4", "2026-05-05", "2"))
    said = "\n".join([*preview(world, "2026-06").lines(), *preview(world, "2199-01").lines()])
    for expected in (
        "2026-06 preview: ",
        "refused: 2026-05 is to be closed before 2026-06",
        "refused: 2026-05 is to be closed before 2199-01",
        "refused: 2199-01 can be closed from 2199-02-01",
        "waits for intake: 1 records",
        "waits for attestations of 10030 until 2190-",
        "refused: 2 units in suspense, more than 0",
        "refused if it stays: the accruals differ",
        "10030         none attested; 0 readings",
    ):
        assert expected in said
    with pytest.raises(CloseRefused, match="tribill close 2026-04 --out"):
        preview(world, "2026-04")


# --- what stands on documents ---------------------------------------------------------------


def bodies(world: World, period: str) -> dict[str, dict[str, Any]]:
    """The documents of a period by payer."""
    return {body["payer"]: body for _, _, body in world.documents.documents(parse_month(period))}


def test_vat_of_an_order_placed_anew(new_world: NewWorld) -> None:
    """What is taken back gives back the VAT that was charged; what is charged for it anew has the rate of now."""
    world = new_world(specimen=True)
    metered(world)
    assert ask(world)[0] == "closed"
    world.say(contract(C1, "c9", Retracted={"change_id": "c1"}))
    world.drain(AT_WORK)
    assert ask(world, period="2026-05")[0] == "closed"
    order = placed("C010001-01", "QOP", "10030", ordered(S, P1, METERED, BY_PARTY)) | {"vat_rate": "0.05"}
    world.say(contract(C1, "c10", OrderPlaced=order))
    world.drain(AT_WORK)
    assert ask(world, period="2026-06")[0] == "closed"
    lines = [bodies(world, f"2026-0{month}")["QOP"]["lines"] for month in (4, 5, 6)]
    said = [[(each["for_period"], each["vat_rate"], each["net"]) for each in of] for of in lines]
    net = said[0][0][2]
    april = "2026-04"
    assert said == [[(april, "0.2", net)], [(april, "0.2", f"-{net}")], [(april, "0.05", net)]]


def described(*agreements: dict[str, Any]) -> list[dict[str, Any]]:
    """Party rows of a supplier and a payer, with agreements between them."""
    head = {"address": ["1 High Street"], "postcode": "LS1 1AA", "vat_number": "GB999999973", "from": "2026-01-01"}
    head["endpoint"] = {"scheme": "9932", "id": "GB999999973"}
    between = {"supplier_id": "10030", "payer": "QOP", "vat_number": "GB999999973"}
    parties = [{"party": head | {"code": code, "name": f"Body {code}"}} for code in ("10030", "QOP")]
    return [*parties, *({"agreement": between | each} for each in agreements)]


@pytest.mark.parametrize("agreed", [True, False])
def test_what_a_pro_forma_billed_is_corrected(new_world: NewWorld, agreed: bool) -> None:
    """An invoice of the series names no pro-forma as the document that it corrects; another pro-forma does."""
    world = new_world()
    rows = described({"from": "2026-05-01", "to": "2027-01-01"}) if agreed else described()
    PartyStore(world.clickhouse).insert(rows, datetime(2026, 1, 1, tzinfo=UTC))
    metered(world)
    assert ask(world)[0] == "closed"
    world.say(used("u3", "2026-04-05", "9"))
    world.drain(AT_WORK)
    assert ask(world, period="2026-05")[0] == "closed"
    [line] = bodies(world, "2026-05")["QOP"]["lines"]
    assert line["cause"]
    assert line["original_document"] == (None if agreed else "QOP-10030-2026-04")
    assert bodies(world, "2026-05")["QOP"]["kind"] == ("invoice" if agreed else "pro-forma")


def test_a_document_too_long_for_a_message(new_world: NewWorld) -> None:
    """On `invoices` it goes without all that grows with its lines, and says how many they are."""
    world = new_world(specimen=True)
    metered(world)
    with mock.patch.object(period_close, "_MESSAGE_CHARACTERS", 1_000):
        assert ask(world)[0] == "closed"
    [(number, [message])] = world.log.invoices.items()
    body = json.loads(world.codec.decode(message, ("Document",)).value["body"])
    whole = bodies(world, "2026-04")["QOP"]
    assert body["number"] == number
    assert body["lines_left_out"] == len(whole["lines"])
    assert [body[name] for name in ("lines", "items", "orders")] == [[], {}, {}]
    assert {name: body[name] for name in ("gross", "sha256", "supplier")} == {
        name: whole[name] for name in ("gross", "sha256", "supplier")
    }


def test_a_setting_that_changes_while_it_closes(new_world: NewWorld) -> None:
    """Specimen or not is decided with the cut: a process with another setting goes on with the same documents."""
    world = new_world(specimen=True)
    metered(world)
    world.request_close("2026-04")
    place = (PERIOD_EVENTS, 0)
    world.step("period-close", place, 1)
    world.crash("period-close", world.batch(place, 1, 1), 3)
    world.settings = replace(world.settings, specimen=False)
    world.drain(["period-close"])
    assert bodies(world, "2026-04")["QOP"]["specimen"] is True


# --- files ----------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is killed here."""


def test_files_are_whole_or_not_there(new_world: NewWorld, tmp_path: Path) -> None:
    """A kill between any two steps of writing leaves no half file, and writing again gives the same bytes."""
    world = new_world(specimen=True)
    for line in BOOK:
        if "close" in line:
            world.drain(AT_WORK)
            assert ask(world, period=line["close"])[0] == "closed"
        else:
            world.say(line)
    period = parse_month("2026-05")
    whole = tmp_path / "whole"
    files = write_files(world.documents, period, whole)
    assert {path for path in whole.rglob("*") if path.is_file()} == set(files)
    content = {path.relative_to(whole): path.read_bytes() for path in files}
    assert {path.suffix for path in content} == {".csv", ".json", ".jsonl", ".pdf", ".txt", ".xml"}
    steps = 2 * len(files) + 5

    def killed_at(step: int, folder: Path) -> None:
        left = step

        def dying(action: Callable[..., Any]) -> Callable[..., Any]:
            def act(path: Path, *arguments: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    if action is write_bytes:  # the half of it is there
                        write_bytes(path, arguments[0][: len(arguments[0]) // 2])
                    raise Killed
                return action(path, *arguments)

            return act

        write_bytes = Path.write_bytes
        with (
            mock.patch.object(Path, "write_bytes", dying(write_bytes)),
            mock.patch.object(Path, "rename", dying(Path.rename)),
        ):
            write_files(world.documents, period, folder)

    for step in range(1, steps, 9):
        folder = tmp_path / str(step)
        try:
            killed_at(step, folder)
        except Killed:
            for path in folder.rglob("*"):
                if path.is_file() and not path.name.startswith("."):
                    assert path.read_bytes() == content[path.relative_to(folder)], path
        write_files(world.documents, period, folder)
        assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == content
    assert datetime.fromisoformat(json.loads(content[Path("2026-05/control.json")])["issued_at"])
