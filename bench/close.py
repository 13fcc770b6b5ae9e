"""A close of the whole country's charge lines as a user has it: `tribill close --out`, from request to last file.

`python -m bench.close [--lines 75000] [--out DIR]` fills the ledger with the book of `bench.rating` (orders, list
sizes, a year of usage, the accruals, and eleven closed months), starts `tribill worker period-close` over the embedded
stack, and runs `tribill close` with files.  Some list sizes of the month before were corrected after its close, so
there are adjustments with causes.  Prints the seconds of each part and the most memory that each process had, and
writes bench/results/close.json, of all lines.  A close must not take longer than 60 s, nor a process more than 2 GiB.
`--ledger DIR` keeps the filled ledger for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa

from agents.collector import collector_paused
from bench.rating import LINES, RESULTS, World
from bench.stack import cpu_seconds, peak_mib
from rating import records as said
from rating.amounts import micros_text
from rating.book import Book, Order, Reference
from rating.calendar import FOREVER, month_text
from rating.charges import iso
from rating.close import ChargeKey, Derivation, derive, invoice
from rating.documents import Document
from rating.parties import Parties
from sinks.clickhouse import ClickHouse
from sinks.documents import Cut, Decision, Documents
from sinks.ledger import Ledger, SaidChange
from streams.settings import Settings
from streams.topics import CONTRACT_CHANGES, REFERENCE_CHANGES, Broker
from tribill.embedded.process import free_port
from tribill.embedded.stack import EmbeddedStack

SAID_AT = "2025-03-01T09:00:00Z"
#: One list size in so many is corrected after the month's close.
CORRECTED = 20
MOST_SECONDS, MOST_MIB = 60, 2048
EXPECTED = "expected.json"


# --- the book as it was said --------------------------------------------------------------------


class Told:
    """A world, and every change that made it."""

    def __init__(self, lines: int) -> None:
        self.contract: list[tuple[str, Any]] = []
        self.reference: list[said.ReferenceChange] = []
        apply, say = Order.apply, Reference.say

        def applied(order: Order, body: Any) -> None:
            self.contract.append((order.number, body))
            apply(order, body)

        def told(reference: Reference, change: said.ReferenceChange) -> None:
            self.reference.append(change)
            say(reference, change)

        with mock.patch.object(Order, "apply", applied), mock.patch.object(Reference, "say", told):
            self.world = World(lines, 12)
        self.before = len(self.reference)

    def correct(self) -> None:
        """Says some list sizes of the month before the last anew."""
        month = self.world.months[-2]
        for change in list(self.world.publish(month))[::CORRECTED]:
            self.reference.append(replace(change, id=f"{change.id}-corrected"))
            self.world.reference.say(self.reference[-1])


def _price(price: said.Price) -> dict[str, Any]:
    tiers: list[dict[str, str]] = [
        {"from": micros_text(tier.above_micros + 10**6), "price": micros_text(tier.price_micros)}
        for tier in price.tiers
    ]
    for tier, following in pairwise(tiers):
        tier["to"] = str(int(following["from"]) - 1)
    shown: dict[str, Any] = {
        name: getattr(price, name) for name in ("type", "calculation", "provisioning", "time_unit")
    }
    shown |= {"unit": "unit", "day_count": price.day_count, "tiers": tiers}
    if price.maximum_micros is not None:
        shown |= {"minimum": micros_text(price.minimum_micros), "maximum": micros_text(price.maximum_micros)}
    return shown


def _take(step: said.Funding) -> Any:
    return {step.take: micros_text(step.amount_micros)} if step.amount_micros else step.take


def _contract(body: Any) -> dict[str, Any]:
    """A contract change in its interchange form."""
    if isinstance(body, said.OrderPlaced):
        head = body.header
        lines = [
            {
                "item_id": line.item_id,
                "ods_code": line.ods_code,
                "quantity": micros_text(line.quantity_micros),
                "price": _price(line.price),
                "funding": [{"payer": step.payer, "take": _take(step)} for step in line.funding],
            }
            for line in body.lines
        ]
        placed = {
            "order_id": body.order_id,
            "ordering_party": head.ordering_party,
            "supplier_id": head.supplier_id,
            "framework": head.framework,
            "commencement": iso(head.commencement),
            "term_months": head.term_months,
            "vat_rate": micros_text(head.vat_rate_micros),
            "lines": lines,
        }
        return {"OrderPlaced": placed}
    if isinstance(body, said.PriceAgreed):
        return {"PriceAgreed": {"item_id": body.item_id, "price": _price(body.price), "from": iso(body.first)}}
    assert isinstance(body, said.MilestoneReached)
    where = {"item_id": body.item_id, "ods_code": body.ods_code}
    return {"MilestoneReached": where | {"milestone": body.milestone, "date": iso(body.day)}}


def _reference(body: Any) -> dict[str, Any]:
    if isinstance(body, said.ListSize):
        return {"ListSize": {"ods_code": body.ods_code, "as_of": iso(body.as_of), "patients": body.patients}}
    if isinstance(body, said.Membership):
        assert body.end == FOREVER
        who = {"ods_code": body.ods_code, "kind": body.kind, "parent": body.parent}
        return {"Membership": who | {"from": "2000-01-01"}}
    assert isinstance(body, said.Allocation)
    assert body.as_of is not None
    amount = micros_text(body.per_patient_micros or 0)
    return {"Allocation": {"financial_year": body.financial_year, "per_patient": amount, "as_of": iso(body.as_of)}}


def fill(clickhouse: ClickHouse, told: Told, closed: int) -> None:
    """Says all changes and usage in an earlier life of the log, whose rows count whole."""
    ledger, world = Ledger(clickhouse), told.world
    changes: dict[str, list[SaidChange]] = {CONTRACT_CHANGES: [], REFERENCE_CHANGES: []}
    for offset, (number, body) in enumerate(told.contract):
        value = {"id": f"c{offset}", "order_number": number, "recorded_at": SAID_AT, "change": _contract(body)}
        kind = next(iter(value["change"]))
        change = SaidChange(number, 1, 0, offset, value["id"], kind, True, "", value, 0)
        changes[CONTRACT_CHANGES].append(change)
    for offset, each in enumerate(told.reference):
        value = {"id": f"r{offset}", "code": each.code, "recorded_at": SAID_AT, "change": _reference(each.body)}
        # What was said after the earlier close lies in the next life of the log.
        generation = 1 if offset < told.before else 2
        kind = next(iter(value["change"]))
        change = SaidChange(each.code, generation, 0, offset, value["id"], kind, True, "", value, 0)
        changes[REFERENCE_CHANGES].append(change)
    for topic, rows in changes.items():
        for start in range(0, len(rows), 20_000):
            ledger.insert_changes(topic, rows[start : start + 20_000])
    for chunk in _chunks(list(_usage(world)), 500_000):
        ods, item, day, quantity, number = zip(*chunk, strict=True)
        rows = len(chunk)
        noon = [datetime.fromordinal(each).replace(tzinfo=UTC) + timedelta(hours=12) for each in day]
        ledger.insert_usage(
            pa.table(
                {
                    "ods_code": ods,
                    "supplier_id": [each[:5] for each in item],
                    "id": [f"reading-{each:012d}" for each in number],
                    "revision": [0] * rows,
                    "generation": [1] * rows,
                    "topic": ["usage"] * rows,
                    "partition": [0] * rows,
                    "offset": number,
                    "index": [0] * rows,
                    "broker_timestamp_ms": [0] * rows,
                    "accepted_partition": [0] * rows,
                    "accepted_offset": number,
                    "item_id": item,
                    "quantity_micros": quantity,
                    "occurred_at": pa.array(noon, pa.timestamp("us", "UTC")),
                    "day": pa.array([date.fromordinal(each) for each in day], pa.date32()),
                }
            )
        )
    [(attested, quantity)] = clickhouse.query(
        "SELECT count(), sum(quantity_micros) FROM usage WHERE supplier_id = '10007'"
        f" AND toYYYYMM(day) = {closed // 12 * 100 + closed % 12 + 1}"
    )
    Documents(clickhouse).insert_attestation("10007", month_text(closed), 1, 1, attested, quantity or 0)


def _usage(world: World) -> Iterator[tuple[str, str, int, int, int]]:
    number = 0
    for (item_id, ods_code), days in world.usage.items():
        for day, quantity in days.items():
            number += 1
            yield ods_code, item_id, day, quantity, number


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def close_before(clickhouse: ClickHouse, book: Book, period: int) -> None:
    """The months before as closed: what they invoiced, their documents without bodies, and the cut of the last."""
    documents = Documents(clickhouse)
    with collector_paused():
        derived = derive(book, period - 1)
    by_month: dict[int, dict[ChargeKey, int]] = {}
    for key, pence in invoice(derived, {}, period - 1)[0].items():
        by_month.setdefault(key.month, {})[key] = pence
    issued: dict[str, int] = {}
    for month, rows in sorted(by_month.items()):
        documents.insert_rows(month, "invoiced", rows, dict.fromkeys(rows, 200_000))
        made = []
        for payer, supplier in sorted({(key.payer, key.supplier_id) for key in rows}):
            issued[payer] = issued.get(payer, 0) + 1
            number = f"{payer}-{issued[payer]:06d}"
            at = datetime(2026, 1, 1, tzinfo=UTC)
            made.append((Document(number, month, payer, supplier, at, book, Parties(specimen=True)), "{}"))
        documents.insert_documents(made)
        documents.insert_period(month, 1, [each for each, _ in made], 0, Decimal(0))
    cut = Cut(1, 1, {}, datetime(2026, 3, 3, tzinfo=UTC), [], specimen=True)
    # All that the first life of the log held.
    cut.positions.update({f"{topic}/0": 2**40 for topic in (CONTRACT_CHANGES, REFERENCE_CHANGES, "usage")})
    documents.fix_cut(period - 1, cut)
    documents.decide(period - 1, cut, Decision(Decimal(0), [], ""))
    documents.evidence.insert_wanted(period - 1, derived.wanted)


def accrue(clickhouse: ClickHouse, derived: Derivation) -> None:
    """The accruals as charges has them: the columns that a close compares."""
    rows = [(*line, month, str(exact)) for (line, month), exact in derived.exact.items()]
    for chunk in _chunks(rows, 200_000):
        names = ("order_number", "item_id", "ods_code", "month", "exact_pence")
        columns = dict(zip(names, zip(*chunk, strict=True), strict=True))
        columns["month"] = pa.array(columns["month"], pa.int32())
        clickhouse.insert_arrow("accruals", pa.table(columns | {"version": pa.array([1] * len(chunk), pa.uint64())}))


# --- measuring ----------------------------------------------------------------------------------


class Parts:
    """What each part took, from what the command said when: of the clock, and of the CPU of some processes."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids, self._part = pids, "the request"
        self._before = self._now()
        self.seconds: dict[str, dict[str, float]] = {}

    def begin(self, part: str) -> None:
        """A part begins, and with it the one before ends."""
        now = self._now()
        took = self.seconds.setdefault(self._part, dict.fromkeys(now, 0.0))
        for name, at in now.items():
            took[name] = round(took[name] + at - self._before[name], 2)
        self._before, self._part = now, part

    def _now(self) -> dict[str, float]:
        return {"clock": time.perf_counter()} | {name: cpu_seconds(pid) for name, pid in self._pids.items()}


@contextmanager
def worker(config: Path, port: int) -> Iterator[int]:
    """`tribill worker period-close`, when it is ready; yields its process id."""
    command = [sys.executable, "-m", "tribill", "--config", str(config), "worker", "period-close"]
    with subprocess.Popen(command) as process:
        try:
            while True:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as answer:
                    if answer.status == 200:
                        break
                assert process.poll() is None, "the worker has ended"
                time.sleep(0.1)
            yield process.pid
        finally:
            process.terminate()


def close(config: Path, period: str, out: Path, pids: Mapping[str, int]) -> tuple[Parts, dict[str, float], int, str]:
    """`tribill close`: its parts, the seconds of the whole, its largest process in MiB, and what it printed."""
    command = [sys.executable, "-m", "tribill", "--config", str(config), "close", period, "--out", str(out)]
    parts, started = Parts(pids), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            print(f"{time.perf_counter() - started:7.2f} s  {line}", end="", flush=True)
            parts.begin("".join(each for each in line.strip() if not each.isdigit()).strip(" :-"))
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    parts.begin("")
    assert process.returncode == 0, "the close failed"
    total = {name: round(sum(each[name] for each in parts.seconds.values()), 2) for name in ("clock", *pids)}
    total |= {"clock": round(time.perf_counter() - started, 2), "command": round(usage.ru_utime + usage.ru_stime, 2)}
    return parts, total, usage.ru_maxrss // 1024, printed


@contextmanager
def embedded(directory: Path) -> Iterator[tuple[EmbeddedStack, Settings]]:
    """The embedded stack with tables and topics."""
    with EmbeddedStack(directory) as stack:
        settings = Settings(
            kafka=stack.kafka,
            clickhouse=stack.clickhouse,
            redis=stack.redis,
            log_generation=3,
            session_timeout_seconds=6,
            specimen=True,
            close_any_period=True,
            worker_port=free_port(),
        )
        ClickHouse(settings).migrate()
        Broker(settings).create_topics()
        yield stack, settings


def prepare(directory: Path, lines: int) -> None:
    """Fills a ledger with all that a close meets, and writes beside it what the close must come to."""
    told = Told(lines)
    world, period = told.world, told.world.months[-1]
    with embedded(directory) as (_, settings):
        clickhouse = ClickHouse(settings)
        close_before(clickhouse, world.book(), period)
        told.correct()
        with collector_paused():
            derived = derive(world.book(), period)
        rows, held = invoice(derived, Documents(clickhouse).invoiced_before(period), period)
        accrue(clickhouse, derived)
        fill(clickhouse, told, period)
    expected = {"period": month_text(period), "lines": lines, "contract_changes": len(told.contract)}
    expected |= {"rows": len(rows), "net_pence": sum(rows.values()), "held": len(held)}
    (directory / EXPECTED).write_text(json.dumps(expected))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--ledger", type=Path, help="keep the filled ledger here, or take the one that is here")
    parser.add_argument("--fill", action="store_true", help="only fill the ledger")
    parser.add_argument("--out", type=Path, help="keep the files here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tribill-bench-") as temporary:
        directory = Path(temporary) / "stack"
        ledger = options.ledger or directory
        if not (ledger / EXPECTED).exists():
            started = time.perf_counter()
            ledger.mkdir(parents=True, exist_ok=True)
            # A process of its own: what filling takes is not what the close takes.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(prepare, ledger, options.lines).result()
            print(f"the ledger is filled after {time.perf_counter() - started:.0f} s", flush=True)
        if not options.fill:
            if ledger != directory:
                shutil.copytree(ledger, directory, symlinks=True)
            measure(directory, options.out or Path(temporary) / "out")


def measure(directory: Path, out: Path) -> None:
    """Closes over a filled ledger, and says what it took."""
    expected = json.loads((directory / EXPECTED).read_text())
    period = expected["period"]
    with embedded(directory) as (stack, settings):
        config = directory / "tribill.toml"
        settings.write(config)
        with worker(config, settings.worker_port) as pid:
            clickhouse_pid = next(part.pid for part in stack.parts if part.name == "clickhouse") or 0
            parts, total, command_mib, printed = close(
                config, period, out, {"worker": pid, "clickhouse": clickhouse_pid}
            )
            peaks = {"period-close": peak_mib(pid), "tribill close": command_mib}
        peaks |= {part.name: peak_mib(part.pid) for part in stack.parts if part.pid is not None}
        [(documents, found, net)] = ClickHouse(settings).query(
            "SELECT documents, rows, net_pence FROM periods FINAL WHERE period = {period:String}", {"period": period}
        )
    assert (found, net) == (expected["rows"], expected["net_pence"]), "the close invoiced something else"
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(printed, end="")
    print(f"{'clock':>10}{'worker':>12}{'clickhouse':>12}   (seconds; of the worker and ClickHouse: CPU)")
    for part, took in parts.seconds.items():
        print(f"{took['clock']:>10.2f}{took['worker']:>12.2f}{took['clickhouse']:>12.2f}   {part}")
    in_all = f"{total['clock']:>10.2f}{total['worker']:>12.2f}{total['clickhouse']:>12.2f}   in all"
    print(f"{in_all}; the command {total['command']:.2f} s CPU")
    counts = f"{expected['lines']:,} lines, {expected['contract_changes']:,} contract changes; {found:,} rows"
    counts += f", {expected['held']:,} held, {documents:,} documents; {len(files):,} files"
    print(f"{counts} of {size / 2**20:,.0f} MiB")
    print("at most " + ", ".join(f"{name} {mib:,} MiB" for name, mib in peaks.items()))
    result = {
        "day": date.today().isoformat(),  # noqa: DTZ011  # of the machine, for the record
        "lines": expected["lines"],
        "rows": found,
        "documents": documents,
        "files": len(files),
        "mib_of_files": size // 2**20,
        "seconds": parts.seconds | {"total": total},
        "peak_mib": peaks,
    }
    if expected["lines"] == LINES:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "close.json").write_text(json.dumps(result, indent=1) + "\n")
    if total["clock"] > MOST_SECONDS or max(peaks.values()) > MOST_MIB:
        sys.exit(f"more than {MOST_SECONDS} s or {MOST_MIB} MiB")


if __name__ == "__main__":
    main()
