"""How fast a close writes its papers: a month of the whole country's charge lines, into the ledger and to files.

`python -m bench.close [--lines 75000] [--out DIR]` takes the book of `bench.rating`, closes its last month
over what the eleven months before have invoiced, and measures each step after the derivation.  Prints seconds of
the CPU (of all processors together) and of the clock, and writes `bench/results/close.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path

from agents.period_close import collector_paused
from bench.rating import LINES, RESULTS, World, peak_mib, timed
from rating.close import derive, invoice
from rating.documents import documents
from rating.parties import Parties
from rating.statements import Papers
from sinks.clickhouse import ClickHouse
from sinks.documents import Documents
from sinks.papers.files import write_files
from streams.settings import Settings
from tribill.embedded.stack import EmbeddedStack

ISSUED = datetime(2026, 4, 3, 9, tzinfo=UTC)


class Steps:
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step and says it."""
        before = os.times()
        with timed() as took:
            yield
        after = os.times()
        # The processes that render the papers have ended by then.
        took.cpu += after.children_user - before.children_user + after.children_system - before.children_system
        self.seconds[name] = (round(took.cpu, 2), round(took.wall, 2))
        print(f"{name:<24}{took.cpu:>8.2f} s CPU{took.wall:>8.2f} s   {peak_mib():,} MiB", flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--out", type=Path, help="keep the files here")
    options = parser.parse_args()
    steps = Steps()
    world = World(options.lines, 12)
    book, period = world.book(), world.months[-1]
    with collector_paused():
        invoiced = derive(book, period - 1).payable
    with tempfile.TemporaryDirectory(prefix="tribill-bench-") as directory, EmbeddedStack(Path(directory)) as stack:
        clickhouse = ClickHouse(Settings(clickhouse=stack.clickhouse))
        clickhouse.migrate()
        ledger, parties = Documents(clickhouse), Parties(specimen=True)
        with steps.step("derive"), collector_paused():
            derived = derive(book, period)
        with steps.step("rows"):
            rows, held = invoice(derived, invoiced, period)
        with steps.step("documents"):
            issued = documents(rows, period, book, {}, {}, parties, ISSUED)
        with steps.step("statements"):
            statements = Papers(period, book, rows, held, derived.wanted, issued, parties, ISSUED).statements()
        with steps.step("ledger: rows"):
            rates = {key: rate for each in issued for key, rate in each.vat_rates_micros.items()}
            ledger.insert_rows(period, "invoiced", rows, rates)
            ledger.insert_rows(period, "held", held, {})
        with steps.step("ledger: documents"):
            ledger.insert_documents([(each, json.dumps(each.as_json(), separators=(",", ":"))) for each in issued])
        with steps.step("ledger: statements"):
            ledger.insert_statements(period, statements)
        out = options.out or Path(directory) / "out"
        with steps.step("files"):
            written = write_files(ledger, period, out)
        size = sum(path.stat().st_size for path in written)
        longest = max(len(each.rows) for each in issued)
        counts = f"{len(rows):,} rows, {len(held):,} held, {len(issued):,} documents (the longest {longest:,} lines)"
        print(f"{counts}, {len(statements):,} statements; {len(written):,} files of {size / 2**20:,.0f} MiB")
        if options.out is None:
            shutil.rmtree(out)
    total = [round(sum(each), 2) for each in zip(*steps.seconds.values(), strict=True)]
    print(f"{'total':<24}{total[0]:>8.2f} s CPU{total[1]:>8.2f} s   {peak_mib():,} MiB")
    result = {
        "day": date.today().isoformat(),  # noqa: DTZ011  # of the machine, for the record
        "lines": options.lines,
        "rows": len(rows),
        "documents": len(issued),
        "statements": len(statements),
        "files": len(written),
        "peak_mib": peak_mib(),
        "cpu_and_wall_seconds": steps.seconds | {"total": tuple(total)},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "close.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
