"""The commands for whoever runs an installation, typed against a running one."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing
import pytest

from sinks.clickhouse import ClickHouse
from sinks.dead_letters import LetterBox, LetterFilter, LetterId
from streams.producer import Outbox
from streams.settings import Settings
from streams.topics import CONTRACT_CHANGES, USAGE
from tests.rich_book import C1, METERED, P1, P2, S, contract, ordered, placed, reached, used
from tribill.cli import cli
from tribill.embedded.process import Process, free_port
from tribill.installation import Installation
from tribill.interchange import Publisher

pytestmark = pytest.mark.timeout(280)
ROLES = ("intake", "usage", "contracts", "reference", "charges", "funding")
SUPPLIER = "10030"
DRAIN_SECONDS = 200
HOSTILE = "u\x1b[2J\x1b]0;mine\x07\u202e\x00'; DROP TABLE usage; --"
Tribill = Callable[..., click.testing.Result]


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A running installation with one supplier topic, and the records that the tests ask about."""
    settings = Settings(partitions=2, supplier_topics=SUPPLIER, session_timeout_seconds=6)
    with Installation(tmp_path_factory.mktemp("stack"), settings) as held:
        held.prepare()
        held.start_workers(ROLES)
        say(held, *BOOK)
        Outbox(held.settings).deliver(USAGE, b"\xff\x00\x1b[2J no record", key="A\x1b[31m")
        assert held.drain(DRAIN_SECONDS, print)
        yield held


BY_PARTY = [{"payer": "@ordering_party", "take": "rest"}]
OTHER = "10030-S-009"
BOOK = [
    contract(C1, "c1", OrderPlaced=placed("C010001-01", "QOP", SUPPLIER, ordered(S, P1, METERED, BY_PARTY))),
    reached(C1, "c2", S, P1, "M1", "2026-04-05"),
    contract("C019999", "x1", OrderTerminated={"date": "2026-05-01"}),
    used("u1", "2026-04-06", "3"),
    used("u2", "2026-04-03", "1.5"),
    used("u3", "2026-04-04", "2"),
    used("u4", "2026-04-07", "5", ods=P2),
    used("u1", "2026-04-06", "4"),
    used(HOSTILE, "2026-04-06", "1", topic=f"usage.{SUPPLIER}"),
]
BOOK[-1]["value"]["supplier_id"] = "10031\x1b[0m"


def say(held: Installation, *lines: Mapping[str, Any]) -> None:
    """Publishes interchange lines."""
    publisher = Publisher(held.settings)
    for line in lines:
        publisher.send_record(line["topic"], line["value"])
    publisher.flush()


@pytest.fixture
def tribill(installation: Installation) -> Tribill:
    """The command, on the running installation."""

    def run(*arguments: str) -> click.testing.Result:
        return click.testing.CliRunner().invoke(cli, ["--config", str(installation.settings_file), *arguments])

    return run


def listed(tribill: Tribill, *options: str) -> list[dict[str, Any]]:
    """Dead letters as `list --json` has them."""
    return [json.loads(line) for line in tribill("dead-letters", "list", "--json", *options).stdout.splitlines()]


def standing(held: Installation) -> list[tuple[Any, ...]]:
    """What the ledger has of usage, without where it came from."""
    return ClickHouse(held.settings).query("SELECT id, revision, quantity_micros FROM usage GROUP BY ALL ORDER BY ALL")


def test_list_finds_what_was_refused(tribill: Tribill) -> None:
    """A letter that no filter finds is a letter that nobody mends."""
    everything = listed(tribill)
    assert {each["agent"] for each in everything} == {"intake", "usage", "contracts"}
    assert [each["agent"] for each in listed(tribill, "--topic", CONTRACT_CHANGES)] == ["contracts"]
    assert [each["field"] for each in listed(tribill, "--reason", "HIGHER revision")] == ["id"]
    assert len(listed(tribill, "--agent", "intake", "--since", "1h")) == 2
    assert listed(tribill, "--since", "2100-01-01") == []
    assert len(listed(tribill, "--limit", "1")) == 1
    assert tribill("dead-letters", "list", "--since", "soon").exit_code == 2


def test_hostile_bytes_leave_the_terminal_alone(tribill: Tribill) -> None:
    """An id with escape sequences would repaint, retitle or hide what the operator sees."""
    shown = tribill("dead-letters", "list").output
    for each in listed(tribill):
        shown += tribill("dead-letters", "show", each["letter"]).output
        shown += tribill("dead-letters", "show", each["letter"], "--json").output
    assert "1b 5b 32 4a" in shown
    assert {each for each in shown if not each.isprintable()} == {"\n"}


def test_show_has_the_original_bytes(tribill: Tribill) -> None:
    """Without its bytes nobody can say what a supplier really sent."""
    [letter] = listed(tribill, "--topic", USAGE, "--agent", "intake")
    shown = json.loads(tribill("dead-letters", "show", "--json", letter["letter"]).stdout)
    assert bytes.fromhex(shown["value_hex"]) == b"\xff\x00\x1b[2J no record"
    assert bytes.fromhex(shown["key_hex"]) == b"A\x1b[31m"
    assert shown["value"] is None
    assert tribill("dead-letters", "show", "--value", letter["letter"]).exit_code == 1
    assert tribill("dead-letters", "show", "intake/1/usage/9/9/9").exit_code == 1
    assert tribill("dead-letters", "show", "usage").exit_code == 2


def test_replay_of_what_stays_refused(tribill: Tribill) -> None:
    """A change or reading that cannot be taken any more would be sent for ever, each time a letter more."""
    for agent, says in (("contracts", "new id"), ("usage", "higher revision")):
        done = tribill("dead-letters", "replay", "--agent", agent)
        assert done.exit_code == 1
        assert says in done.stdout
        assert "not sent" in done.stdout


def test_replay_twice_adds_nothing(tribill: Tribill, installation: Installation) -> None:
    """A replayed reading would count twice, or a bad one leave a letter at every replay."""
    before, letters = standing(installation), len(listed(tribill))
    done = tribill("dead-letters", "replay", "--agent", "intake", "--by", "somebody")
    assert done.exit_code == 0, done.output
    assert installation.drain(DRAIN_SECONDS, print)
    assert len(listed(tribill)) == letters + 2
    again = tribill("dead-letters", "replay", "--agent", "intake")
    assert again.stdout == ""
    assert {each["replayed_by"] for each in listed(tribill, "--agent", "intake")} == {"somebody"}
    named = tribill("dead-letters", "replay", listed(tribill, "--agent", "intake")[0]["letter"])
    assert named.exit_code == 1
    assert "by somebody" in named.stdout
    assert installation.drain(DRAIN_SECONDS, print)
    assert len(listed(tribill)) == letters + 2
    assert standing(installation) == before
    # Nothing that was let through is a letter; sent once more it is a duplicate.
    box = LetterBox(ClickHouse(installation.settings))
    assert box.find(LetterId("intake", 1, "usage", 0, 0, 7)) is None


def test_an_edited_reading_counts_once(tribill: Tribill, installation: Installation, tmp_path: Path) -> None:
    """A correction that is sent twice would count twice."""
    [letter] = listed(tribill, "--reason", "higher revision")
    said = json.loads(tribill("dead-letters", "show", "--value", letter["letter"]).stdout)
    edit = tmp_path / "mended.json"
    for wrong in (said | {"quantity": 4}, said | {"quantitty": "4"}, [], said):
        edit.write_text(json.dumps(wrong))
        assert tribill("dead-letters", "replay", letter["letter"], "--edit", str(edit)).exit_code == 1
    edit.write_text(json.dumps(said | {"revision": 1, "quantity": "8"}))
    for _ in range(2):
        done = tribill("dead-letters", "replay", letter["letter"], "--edit", str(edit))
        assert done.exit_code == 0, done.output
    assert installation.drain(DRAIN_SECONDS, print)
    assert ("u1", 1, 8_000_000) in standing(installation)
    box = LetterBox(ClickHouse(installation.settings))
    assert box.count(LetterFilter(agent="usage")) == 1


def test_a_refused_change_under_a_new_id(tribill: Tribill, installation: Installation, tmp_path: Path) -> None:
    """Who corrects a change under its old id would wait for ever."""
    [letter] = listed(tribill, "--agent", "contracts")
    said = json.loads(tribill("dead-letters", "show", "--value", letter["letter"]).stdout)
    edit = tmp_path / "mended.json"
    edit.write_text(json.dumps(said | {"order_number": "C010001", "id": "c2"}))
    done = tribill("dead-letters", "replay", letter["letter"], "--edit", str(edit))
    assert done.exit_code == 1
    assert "was accepted" in done.stdout
    edit.write_text(json.dumps(said | {"order_number": "C010001", "id": "x2"}))
    assert tribill("dead-letters", "replay", letter["letter"], "--edit", str(edit)).exit_code == 0
    assert installation.drain(DRAIN_SECONDS, print)
    rows = ClickHouse(installation.settings).query(
        "SELECT id, toString(outcome) FROM contract_changes WHERE order_number = 'C010001' ORDER BY id"
    )
    assert rows == [("c1", "accepted"), ("c2", "accepted"), ("x2", "accepted")]


def test_suspense_says_why(tribill: Tribill) -> None:
    """Usage that waits would not be told from usage that nobody will ever pay."""
    rows = [json.loads(line) for line in tribill("suspense", "list", "--json").stdout.splitlines()]
    assert [(each["ods_code"], each["first_day"], each["last_day"], each["quantity"]) for each in rows] == [
        (P2, "2026-04-07", "2026-04-07", "5"),
        (P1, "2026-04-03", "2026-04-04", "3.5"),
    ]
    assert [each["why"] for each in rows] == [
        "no order has a line for it",
        "not live on the day: before its go-live (M1)",
    ]
    assert P1 not in tribill("suspense", "list", "--practice", P2).stdout
    assert "nothing waits" in tribill("suspense", "list", "--item", OTHER).output


def test_a_ledger_that_is_away_is_said(tribill: Tribill) -> None:
    """A traceback tells an operator nothing."""
    result = click.testing.CliRunner().invoke(
        cli, ["dead-letters", "list"], env={"TRIBILL_CLICKHOUSE": "http://127.0.0.1:1/x"}
    )
    assert result.exit_code == 1
    assert result.output.startswith("tribill: ")


def examined(result: click.testing.Result) -> dict[str, set[str]]:
    """The levels that `doctor --json` found, by part."""
    found: dict[str, set[str]] = {}
    for line in result.stdout.splitlines():
        finding = json.loads(line)
        assert finding["cure"] or finding["level"] == "ok", f"what is one to do about {finding}?"
        found.setdefault(finding["part"], set()).add(finding["level"])
    return found


def test_doctor_finds_nothing_wrong(tribill: Tribill) -> None:
    """A fault that is none makes every fault look like one."""
    done = tribill("doctor", "--json")
    assert done.exit_code == 0, done.output
    found = examined(done)
    # Letters may wait or not, whatever the tests before have sent again.
    assert found.pop("refused") | found.pop("suspense") | found.pop("drift") <= {"ok", "warning"}
    assert found.keys() == {"broker", "ledger", "redis", "topics", "groups", "positions", "schemas", "clocks"}
    assert set().union(*found.values()) == {"ok"}, done.output


@pytest.mark.parametrize(
    ("name", "value", "faulty"),
    [
        ("TRIBILL_KAFKA", "127.0.0.1:1", "broker"),
        ("TRIBILL_CLICKHOUSE", "http://127.0.0.1:1/tribill", "ledger"),
        ("TRIBILL_REDIS", "redis://127.0.0.1:1/0", "redis"),
        ("TRIBILL_PARTITIONS", "3", "topics"),
        ("TRIBILL_SUPPLIER_TOPICS", "10030,10031", "topics"),
        ("TRIBILL_LOG_GENERATION", "0", "ledger"),
    ],
)
def test_doctor_finds_the_fault(
    tribill: Tribill, monkeypatch: pytest.MonkeyPatch, name: str, value: str, faulty: str
) -> None:
    """One part that is away would hide what is wrong with the others, or not be seen at all."""
    monkeypatch.setenv(name, value)
    done = tribill("doctor", "--json")
    assert done.exit_code == 1
    found = examined(done)
    assert "fault" in found[faulty], done.output
    others = {"broker", "ledger", "redis"} - {faulty}
    assert all(found[each] == {"ok"} for each in others), done.output


def test_doctor_wants_the_tables(tribill: Tribill, installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that was never migrated would look like one that is away."""
    monkeypatch.setenv("TRIBILL_CLICKHOUSE", f"{installation.settings.clickhouse}/nothing")
    done = tribill("doctor")
    assert done.exit_code == 1
    assert "tribill migrate" in done.stdout


def test_a_surplus_worker_is_ready(installation: Installation) -> None:
    """A roll-out would wait for ever for a worker for which there is no partition."""
    ports = []
    for name in ("first", "second"):
        ports.append(free_port())
        environment = replace(installation.settings, worker_port=ports[-1]).environment()
        command = [sys.executable, "-m", "tribill", "worker", "reconcile"]
        installation.workers[name] = Process(name, command, installation.directory, environment=environment)
    held: list[int | None] = [None, None]
    deadline = time.monotonic() + DRAIN_SECONDS
    while sorted(each if each is not None else -1 for each in held) != [0, 1]:
        assert time.monotonic() < deadline, held
        time.sleep(0.2)
        held = [partitions_of(port) for port in ports]


def partitions_of(port: int) -> int | None:
    """How many partitions a ready worker holds; None while it is not ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as answer:
            return int(json.load(answer)["partitions"])
    except OSError:
        return None
