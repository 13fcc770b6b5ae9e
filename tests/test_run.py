"""`tribill run` as a process: the files that it writes against the oracle, and what it says and leaves.

Each run starts a whole private installation (some 20 seconds), so there are few, rich cases.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import oracle
from tests.oracle.strategies import is_usage, usage_keys
from tests.rich_book import (
    BOOK,
    BY_ALLOCATION,
    BY_CAP,
    BY_PARTY,
    METERED,
    contract,
    ordered,
    placed,
    price,
    reached,
    reference,
    used,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc"),
    pytest.mark.timeout(280),
]

ROOT = Path(__file__).parents[1]
HEADER = "order_number,item_id,ods_code,supplier_id,payer,for_period,kind,net"
Record = dict[str, Any]


class Run:
    """A `tribill run` in a process of its own, with a folder for temporary files of its own."""

    def __init__(self, folder: Path, lines: Iterable[Record | bytes], *arguments: str) -> None:
        self.out, self.temporary = folder / "out", folder / "tmp"
        self.temporary.mkdir(parents=True)
        file = folder / "events.jsonl"
        file.write_bytes(
            b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)
        )
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TRIBILL_")},
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
        }
        self._stderr = folder / "stderr"
        command = [sys.executable, "-m", "tribill", "run", str(file), *arguments, "--out", str(self.out)]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(command, env=self.environment, cwd=folder, stderr=stderr, stdout=stderr)

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self._stderr.read_text(errors="replace")

    def end(self, code: int = 0) -> str:
        """Waits until it has ended with this code; returns what it said."""
        assert self.process.wait(240) == code, self.said
        return self.said

    def wait_until_it_catches(self, number: signal.Signals) -> None:
        """Waits until Python has started and the command has set its handler (`SigCgt` of proc(5))."""
        status = Path(f"/proc/{self.process.pid}/status")
        while not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) >> number - 1 & 1:
            time.sleep(0.01)

    def wait_for(self, pattern: str, seconds: float = 200) -> re.Match[str]:
        """Waits until it has said this."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.said)):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"never said {pattern!r}:\n{self.said}"
            time.sleep(0.05)
        return found

    def rows(self, period: str, name: str = "lines.csv") -> list[tuple[str, ...]]:
        """The rows of a file, without the header."""
        return [tuple(row.split(",")) for row in (self.out / period / name).read_text().splitlines()[1:]]

    def check(self, expected: Iterable[oracle.Close]) -> None:
        """The files of every period are the oracle's, to the byte."""
        expected = list(expected)
        assert sorted(each.name for each in self.out.iterdir()) == sorted(close.period for close in expected)
        for close in expected:
            for name, rows in (("lines.csv", close.lines), ("held.csv", close.held)):
                wanted = "".join(f"{line}\n" for line in (HEADER, *(",".join(row) for row in rows)))
                assert (self.out / close.period / name).read_bytes() == wanted.encode(), f"{close.period} {name}"

    def workers(self) -> dict[str, int]:
        """The process ids of its workers, by role."""
        found = {}
        for pid in descendants(self.process.pid):
            command = command_of(pid)
            if command[-2:-1] == ["worker"]:
                found[command[-1]] = pid
        return found


def encoded(line: Record) -> bytes:
    """A line as the file has it."""
    return json.dumps(line).encode()


def command_of(pid: int) -> list[str]:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    except OSError:
        return []


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and those that they have."""
    try:
        lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return set()
    children = {int(each) for found in lists for each in found}
    return children.union(*(descendants(each) for each in children))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs; afterwards none of them may have left a process or a temporary directory."""
    runs: list[Run] = []

    def start(lines: Iterable[Record | bytes], *arguments: str) -> Run:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        runs.append(Run(folder, lines, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.wait(60)
        assert list(run.temporary.iterdir()) == [], "temporary files are left"
        assert using(run.temporary) == [], "processes are left"


def using(folder: Path) -> list[list[str]]:
    """The commands of processes that were told of a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (path / "environ").read_bytes() + (path / "cmdline").read_bytes():
                found.append(command_of(int(path.name)))
        except OSError:
            continue
    return [command for command in found if command]


# --- books ----------------------------------------------------------------------------------


def mixed(book: Sequence[Record], seed: int) -> list[Record]:
    """The book with its usage between two closes shuffled and half of it doubled.

    Copies of one revision keep their order, because where they differ the first stands.
    """
    shuffle = random.Random(seed)
    found: list[Record] = []
    chains: dict[Any, list[Record]] = {}
    others: list[Record] = []
    for line in [*book, {"close": ""}]:
        if is_usage(line):
            keys = usage_keys(line)
            joined = {id(chain): chain for key in keys if (chain := chains.get(key)) is not None}
            chain = [each for chain in joined.values() for each in chain]
            chains |= dict.fromkeys([*keys, *(key for each in chain for key in usage_keys(each))], chain)
            chain.append(line)
        elif "close" not in line:
            others.append(line)
        else:
            waiting = [others, *{id(chain): chain for chain in chains.values()}.values()]
            for each in waiting[1:]:
                each.extend(shuffle.sample(each, len(each) // 2 + shuffle.randrange(2) * (len(each) % 2)))
            turns = [chain for chain in waiting for _ in chain]
            shuffle.shuffle(turns)
            found += [chain.pop(0) for chain in turns]
            found += [line] if line["close"] else []
            chains, others = {}, []
    return found


def many(book: Sequence[Record], practices: int, readings: int) -> list[Record]:
    """The book with an order of many practices and their usage, some of it late, revised or twice."""
    draw = random.Random(20260401)
    codes = [f"Z{number:05d}" for number in range(practices)]
    items = ["10030-S-007", "10031-S-008"]
    lines = [
        ordered(
            item, code, price("on_demand", ("1", "0.28"), ("51", "0.017")) | bounds, BY_ALLOCATION if funded else BY_CAP
        )
        for number, code in enumerate(codes)
        for item, bounds, funded in ((items[0], {}, number % 2), (items[1], {"included": "5", "minimum": "3"}, True))
    ]
    first = [contract("C010009", "c1", OrderPlaced=placed("C010009-01", "QHM", "10030", *lines))]
    for number, code in enumerate(codes):
        size = {"ods_code": code, "as_of": "2026-03-01", "patients": draw.randrange(20_000)}
        first.append(reference(code, "r1", ListSize=size))
        for item in items:
            name = f"{item}{code}"
            first.append(reached("C010009", f"{name}1", item, code, "M1", f"2026-04-{number % 28 + 1:02d}"))
            if number % 3:
                first.append(reached("C010009", f"{name}2", item, code, "M2", f"2026-0{number % 2 + 4}-20"))
    usage = []
    for number in range(readings):
        item = draw.choice(items)
        day = f"2026-0{draw.choice([4, 4, 5])}-{draw.randrange(1, 31):02d}"
        reading = used(
            f"m{draw.randrange(readings)}",
            day,
            draw.choice(["1", "0.333333", "12", "0", "700"]),
            revision=number // 100,
            item=item,
            ods=draw.choice(codes),
            topic=draw.choice(["usage", f"usage.{item[:5]}"]),
        )
        usage.append(reading)
    close = next(place for place, line in enumerate(book) if "close" in line)
    half = len(usage) // 2
    return [*first, *usage[:half], *book[:close], book[close], *usage[half:], *book[close + 1 :]]


def check_papers(run: Run) -> None:
    """Every document in each of its forms, statements and control sheet; specimens, since no party is described."""
    for period in ("2026-04", "2026-05"):
        folder = run.out / period
        bodies = [json.loads(path.read_text()) for path in folder.glob("*-invoice.json")]
        bodies += [json.loads(path.read_text()) for path in folder.glob("*-credit-note.json")]
        rows = run.rows(period)
        assert sum(Decimal(body["net"]) for body in bodies) == sum(Decimal(row[-1]) for row in rows)
        assert sum(len(body["lines"]) for body in bodies) == len(rows)
        for body in bodies:
            stem = folder / f"{body['number']}-{body['kind']}"
            assert "SPECIMEN" in body["notice"]
            assert "SPECIMEN" in stem.with_name(f"{stem.name}.xml").read_text()
            assert stem.with_name(f"{stem.name}.pdf").read_bytes().startswith(b"%PDF")
            assert len(stem.with_name(f"{stem.name}.csv").read_text().splitlines()) == len(body["lines"]) + 1
        control = json.loads((folder / "control.json").read_text())
        assert all(check["agrees"] and check["found"] == check["due"] for check in control["checks"])
        practices = {row[2] for row in (*rows, *run.rows(period, "held.csv"))}
        assert {path.stem for path in (folder / "statements").glob("practice-*.json")} == {
            f"practice-{code}" for code in practices
        }


def write_parties(file: Path) -> None:
    """Writes what is known of the parties: one of them, in line 5, is wrong, and no agreement outlives April."""
    lines = []
    for code in ("10030", "10031", "NHSE", "QOP", "QHM"):
        number = "GB999999973"
        row = {"code": code, "name": f"Body {code}", "address": ["1 High Street"], "postcode": "LS1 1AA"}
        row |= {"vat_number": number, "from": "2026-01-01", "endpoint": {"scheme": "9932", "id": number}}
        lines.append({"party": row})
        if code == "QHM":
            row["postcode"] = ""
    for payer, supplier in (("NHSE", "10030"), ("NHSE", "10031"), ("QOP", "10030"), ("QHM", "10031")):
        row = {"supplier_id": supplier, "payer": payer, "vat_number": "GB999999973"}
        lines.append({"agreement": row | {"from": "2026-04-01", "to": "2026-05-01"}})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def check_documents(run: Run) -> None:
    """With party data a document is an invoice; a party that a bad row leaves out costs the number, not the money."""
    names = sorted(path.name for path in (run.out / "2026-04").glob("*.json") if "evidence" not in path.name)
    assert [name for name in names if "pro-forma" not in name] == [
        "NHSE-000001-invoice.json",
        "NHSE-000002-invoice.json",
        "QOP-000001-invoice.json",
        "control.json",
    ]
    assert "QHM-10031-2026-04-pro-forma.json" in names
    assert not list((run.out / "2026-04").glob("*pro-forma.xml"))
    # The agreements ended with April.
    assert not list((run.out / "2026-05").glob("*-invoice.json"))
    for period in ("2026-04", "2026-05"):
        papers = [path for path in (run.out / period).glob("*-*.json") if "evidence" not in path.name]
        bodies = [json.loads(path.read_text()) for path in papers]
        assert sum(Decimal(body["net"]) for body in bodies) == sum(Decimal(row[-1]) for row in run.rows(period))
        assert not any(body["specimen"] for body in bodies)


# --- cases ----------------------------------------------------------------------------------


def test_a_rich_book(start: Callable[..., Run], tmp_path: Path) -> None:
    """The command would come to other money than the rules, or to other money when the stream is mixed.

    The one run knows nothing of the parties, the other does, so their documents differ and their money does not.
    """
    parties = tmp_path / "parties.jsonl"
    write_parties(parties)
    book = many(BOOK, 25, 1_200)
    expected = oracle.run(book)
    assert any(float(row[-1]) < 0 for row in expected.closes[1].lines), "the book has a credit"
    plain, shuffled = start(book), start(mixed(book, 7), "--parties", str(parties))
    assert "2026-05 closed" in plain.end()
    plain.check(expected.closes)
    check_papers(plain)
    assert f"{parties}:5: party.postcode" in shuffled.end()
    shuffled.check(expected.closes)
    check_documents(shuffled)


def test_a_year_of_emis_web(start: Callable[..., Run]) -> None:
    """1.26 per patient a year for 8,461 patients would not sum to 10,660.86, or a month to a penny."""
    item, practice = "10000-001", "A83005"
    waterfall = [{"payer": "NHSE", "take": {"per_patient_year": "1.26"}}, {"payer": "@ordering_party", "take": "rest"}]
    line = ordered(item, practice, price("patient", ("1", "1.26"), unit="year"), waterfall)
    header = {"commencement": "2026-04-01", "term_months": 12}
    book = [
        reference(practice, "r1", ListSize={"ods_code": practice, "as_of": "2026-03-01", "patients": 8461}),
        contract("C010001", "c1", OrderPlaced=placed("C010001-01", "QOP", "10000", line) | header),
        reached("C010001", "c2", item, practice, "M1", "2026-04-01"),
        reached("C010001", "c3", item, practice, "M2", "2026-04-14"),
    ]
    # The first close comes late and bills ten months; tests/test_rating.py has one for each.
    closes = ["2027-01", "2027-02", "2027-03"]
    run = start(book, *(argument for period in closes for argument in ("--close", period)))
    run.end()
    run.check(oracle.run(book, closes=closes).closes)
    months = []
    for period in closes:
        for *_, for_period, kind, net in run.rows(period):
            assert kind == ("charge" if for_period == period else "adjustment")
            months.append(Decimal(net))
        assert run.rows(period, "held.csv") == []
    assert len(months) == 12
    assert sum(months) == Decimal("10660.86")
    assert max(months) - min(months) <= Decimal("0.01")


def test_hostile_lines(start: Callable[..., Run]) -> None:
    """A line that is nonsense would end the run, take its neighbours with it, or be swallowed unsaid."""
    item, practice = "10030-S-001", "A83006"
    good = [
        contract(
            "C010001",
            "c1",
            OrderPlaced=placed("C010001-01", "QOP", "10030", ordered(item, practice, METERED, BY_PARTY)),
        ),
        reached("C010001", "c2", item, practice, "M1", "2026-04-01"),
        reached("C010001", "c3", item, practice, "M2", "2026-04-01"),
        used("u1", "2026-04-03", "3"),
        used("u2", "2026-04-04", "30", topic="usage.10030"),
    ]
    gap = [{"from": "1", "to": "10", "price": "1"}, {"from": "12", "price": "2"}]
    dear = ordered(item, practice, METERED | {"type": "flat", "tiers": [{"from": "1", "price": "-1"}]}, BY_PARTY)
    holed = ordered(item, practice, METERED | {"tiers": gap}, BY_PARTY)
    reading = {"item_id": item, "quantity": "5", "occurred_at": "2026-04-06T10:00:00Z"}
    batch = [{"id": "b1"} | reading, {"id": "b2"} | reading | {"quantity": "-1"}, {"id": "b3"} | reading]
    head = {"supplier_id": "10030", "ods_code": practice}
    hostile: list[tuple[Record | bytes, str]] = [
        (contract("C010002", "c1", OrderPlaced=placed("C010002-01", "QOP", "10030", dear)), r"price.*-1.*negative"),
        (contract("C010003", "c1", OrderPlaced=placed("C010003-01", "QOP", "10030", holed)), r"tiers.*(12|11|10)"),
        (used("n1", "2026-04-03", "NaN"), r"quantity.*NaN"),
        (used("n2", "2200-04-03", "1"), r"occurred_at.*2200.*more than a day"),
        (used("n3", "2026-04-03", "1", topic="usage.10031"), r"supplier_id.*10030.*topic of supplier '10031'"),
        (used("n4", "2026-04-03", "1") | {"topic": "usage.10030x"}, r"topic of supplier '10030x'"),
        (
            {"topic": "usage", "value": used("n5", "2026-04-03", "1")["value"] | {"item_id": "10031-S-001"}},
            r"item_id.*10031-S-001.*not an item of supplier '10030'",
        ),
        (used("n" * 5_000_000, "2026-04-03", "1"), r"id has 5000000 characters"),
        (b'{"topic": "usage", "value": ', r"no JSON"),
        (b"[1, 2]", r"no JSON object"),
        ({"topic": "usages", "value": {}}, r"'usages'"),
        (b'{"topic": "usage", "value": {"id": "\xff\xfe"}}', r"no JSON.*(utf|UTF)"),
        ({"topic": "usage", "value": {"UsageBatch": head | {"usages": batch}}}, r"quantity.*-1.*negative"),
    ]
    lines: list[Record | bytes] = []
    for number, (line, _) in enumerate(hostile):
        lines += [line, good[number]] if number < len(good) else [line]
    run = start([*lines, used("u3", "2026-04-05", "7"), {"close": "2026-04"}])
    said = run.end()
    understood = [
        # The oracle knows no limit of a record's size.
        *(each for each in lines if isinstance(each, dict) and len(encoded(each)) < 1_000_000),
        used("u3", "2026-04-05", "7"),
        {"close": "2026-04"},
    ]
    run.check(oracle.run(understood).closes)
    assert f"{len(hostile)} records were refused" in said
    for line, reason in hostile:
        assert re.search(reason, said), f"{reason!r} for {str(line)[:200]} is not in\n{said}"
    assert max(map(len, said.splitlines())) < 1000, "a reason is for a person to read"


def test_a_killed_worker(start: Callable[..., Run]) -> None:
    """A run whose worker was killed would bill without it, hang without a word, or not go on with another."""
    book = BOOK[: BOOK.index({"close": "2026-04"}) + 1]
    run = start(book)
    run.wait_for("private stack")
    deadline = time.monotonic() + 100
    while "usage" not in (workers := run.workers()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers["usage"], signal.SIGKILL)
    command = run.wait_for(r"the worker usage has ended.*`tribill ([^`]*)`").group(1)
    time.sleep(1)
    assert run.process.poll() is None
    assert not (run.out / "2026-04" / "lines.csv").exists()
    again = [sys.executable, "-m", "tribill", *shlex.split(command)]
    with subprocess.Popen(again, env=run.environment, stderr=subprocess.DEVNULL) as worker:
        try:
            run.end()
        finally:
            worker.terminate()
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                worker.kill()
    run.check(oracle.run(book).closes)


def test_ended_or_refused(start: Callable[..., Run]) -> None:
    """A run that is stopped would leave processes and files; one with a gap would close it or fail silently."""
    refused = start([*BOOK, {"close": "2026-07"}, *BOOK])
    early, late = start(BOOK), start([*BOOK, {"close": "2026-06"}])
    early.wait_until_it_catches(signal.SIGTERM)
    early.process.terminate()
    late.wait_for("private stack")
    late.process.terminate()
    early.end(143)
    late.end(143)
    said = refused.end(1)
    assert re.search(r"2026-07 cannot be closed: 2026-05 was closed last, so 2026-06 is next", said)
    assert "Traceback" not in said + early.said + late.said
    refused.check(oracle.run(BOOK).closes)


def test_stopped_amid_a_library(tmp_path: Path) -> None:
    """librdkafka's binding, stopped while it reads its settings, says that they are wrong: a traceback for 143."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal\n"
        "from tribill import cli\n"
        "def cut_off():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except SystemExit:\n"
        "        raise TypeError('expected configuration property name') from None\n"
        "cli.cli = cut_off\n"
        "cli.main()\n"
    )
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, env=os.environ, check=False)
    assert (ended.returncode, ended.stderr) == (143, "")
