"""How fast the rule book rates: a financial year of the whole country's charge lines, in one process.

`python -m bench.rating [--lines 75000] [--months 12]` builds a book from a seed and measures

(a) `derive`, as a close does it: every month of every line from its first day, funded, drawn down
    and rounded; and
(b) what the charges agent rates after the list sizes of a month were published for all practices,
    in the middle of that month: the lines they move, in that month and the next, as accrual rows.

Prints both, with where the time goes, and writes `bench/results/rating.json`.  Times are of the
process's CPU, so that a neighbour on the machine does not count; wall time stands beside them.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import platform
import pstats
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from agents.charges import State, accrual_row, touched
from agents.collector import collector_paused
from rating import records as said
from rating.book import Book, Line, Order, Reference
from rating.calendar import FOREVER, first_day, last_day, month_text, parse_month
from rating.charges import MonthCharge, rate_months
from rating.close import Derivation, derive, invoice
from rating.records import Funding, Price, Tier
from sinks.accruals import AccrualRow

SEED = 20250401
FIRST_MONTH = parse_month("2025-04")
PRACTICES, PARTIES, SUPPLIERS = 6_500, 105, 24
LINES = 75_000
RESULTS = Path(__file__).parent / "results"


# --- a book of a year -----------------------------------------------------------------------


class Item:
    """A catalogue item: how it is priced, and what it costs after the year's price change."""

    def __init__(self, number: int, chance: random.Random) -> None:
        self.supplier_id = str(10_000 + number % SUPPLIERS)
        self.item_id = f"{self.supplier_id}-{number:03d}"
        kind = number % 33
        self.provisioning = "patient" if kind < 22 else "declarative" if kind < 31 else "on_demand"
        self.tiered = number % 10 == 3
        self.calculation = "cumulative" if number % 20 == 3 else "volume"
        self.micros = {
            "patient": chance.randrange(50_000, 600_000),
            "declarative": chance.randrange(10_000_000, 90_000_000),
            "on_demand": chance.randrange(10_000, 40_000),
        }[self.provisioning]
        self.changes_price = number % 2 == 0
        self.bounded = self.provisioning == "on_demand" and number % 4 == 0
        self.funding = number % 20

    def price(self, percent: int) -> Price:
        """A price of its own for each line, as one read from the log is."""
        micros = self.micros * percent // 100
        steps = (0, 400, 5_000) if self.provisioning != "patient" else (0, 100_000, 300_000)
        tiers = [Tier(above * 10**6, micros * (10 - index) // 10) for index, above in enumerate(steps)]
        return Price(
            type="tiered" if self.tiered else "flat",
            calculation=self.calculation,
            provisioning=self.provisioning,
            unit="",
            time_unit={"patient": "year", "declarative": "month", "on_demand": "none"}[self.provisioning],
            day_count="month",
            tiers=tuple(tiers if self.tiered else tiers[:1]),
            minimum_micros=20_000_000 if self.bounded else 0,
            maximum_micros=90_000_000 if self.bounded else None,
        )

    def waterfall(self) -> tuple[Funding, ...]:
        """Most draw on the allocation, some are shared and capped, some are the party's alone."""
        if self.funding < 14:
            return Funding("NHSE", "allocation"), Funding("@ordering_party", "rest")
        if self.funding < 17:
            return (
                Funding("NHSE", "share", 300_000),
                Funding("LOCAL", "per_patient_year", 90_000),
                Funding("@ordering_party", "rest"),
            )
        return (Funding("@ordering_party", "rest"),)


class World:
    """The changes of a year, and the day totals of usage, from a seed."""

    def __init__(self, lines: int, months: int) -> None:
        self._chance = random.Random(SEED)
        self.months = range(FIRST_MONTH, FIRST_MONTH + months)
        self.practices = [f"A{number:05d}" for number in range(PRACTICES)]
        self._party = {code: f"Q{index % PARTIES:03d}" for index, code in enumerate(self.practices)}
        self._patients = {code: self._chance.randrange(1_500, 20_000) for code in self.practices}
        self._items = [Item(number, self._chance) for number in range(66)]
        self.reference = Reference()
        self.usage: dict[tuple[str, str], dict[int, int]] = {}
        self.lines = lines
        self._say_reference()
        self.orders = list(self._orders())

    def publish(self, month: int) -> Iterator[said.ReferenceChange]:
        """A new list size of every practice on the first of a month."""
        as_of = first_day(month)
        for code in self.practices:
            self._patients[code] += self._chance.randrange(-100, 101)
            body = said.ListSize(code, as_of, self._patients[code])
            yield said.ReferenceChange(f"size-{as_of}", code, body)

    def _say_reference(self) -> None:
        for code in self.practices:
            body = said.Membership(code, "commissioner", self._party[code], 0, FOREVER)
            self.reference.say(said.ReferenceChange("parent", code, body))
        for month in self.months[:-1]:
            for change in self.publish(month):
                self.reference.say(change)
        year = FIRST_MONTH // 12
        # Some parties' lines want more than this a head and run dry before the year is over.
        national = said.Allocation(None, year, 0, 1_850_000 * self.lines // LINES, first_day(FIRST_MONTH))
        self.reference.say(said.ReferenceChange("national", said.ENGLAND, national))

    def _orders(self) -> Iterator[Order]:
        chance, bodies = self._chance, {}
        placed: dict[tuple[str, str], list[said.OrderLine]] = {}
        for index in range(self.lines):
            code = self.practices[index % PRACTICES]
            item = self._items[(index // PRACTICES * 5 + index % PRACTICES // PARTIES * 7) % len(self._items)]
            patients = item.provisioning == "patient"
            quantity = (self._patients[code] if patients else chance.randrange(1, 9)) * 10**6
            line = said.OrderLine(item.item_id, code, quantity, item.price(100), item.waterfall())
            placed.setdefault((self._party[code], item.supplier_id), []).append(line)
            bodies[item.item_id, code] = item
        for number, ((party, supplier), lines) in enumerate(sorted(placed.items())):
            order = Order(f"C{number:06d}")
            header = said.Header(party, supplier, "GPITF", first_day(FIRST_MONTH), 36, 200_000)
            order.apply(said.OrderPlaced(f"{order.number}-01", header, tuple(lines)))
            for line in lines:
                self._live(order, line, bodies[line.item_id, line.ods_code])
            for item_id in order.by_item:
                item = next(each for each in self._items if each.item_id == item_id)
                if item.changes_price:
                    agreed = said.PriceAgreed(item_id, None, item.price(104), first_day(FIRST_MONTH + 6))
                    order.apply(agreed)
            yield order

    def _live(self, order: Order, line: said.OrderLine, item: Item) -> None:
        chance = self._chance
        start = first_day(FIRST_MONTH)
        if chance.randrange(100) < 15:
            start += chance.randrange(1, 200)
        order.apply(said.MilestoneReached(line.item_id, line.ods_code, "M1", start))
        if chance.randrange(100) < 97:
            order.apply(said.MilestoneReached(line.item_id, line.ods_code, "M2", start + 2))
        if item.provisioning == "on_demand":
            days = range(start, last_day(self.months[-1]) + 1)
            used = {day: chance.randrange(1, 60) * 10**6 for day in days if day % 7 < 5}
            self.usage[line.item_id, line.ods_code] = used

    def book(self) -> Book:
        """The book as it stands."""
        return Book(self.orders, self.reference, self.usage)


def published(book: Book, changes: list[said.ReferenceChange], horizon: int) -> list[AccrualRow]:
    """What the charges agent rates after list sizes were published, up to a month ahead: its rows."""
    sizes = {(change.code, change.body.as_of) for change in changes if isinstance(change.body, said.ListSize)}
    state = State(0, list_sizes=sizes)
    rows = []
    for order, item_id, lines, months in touched(state, book, horizon):
        for month, charges in rate_months(order, item_id, months, book, lines):
            rows += [accrual_row(line, month, charges.get(line.ods_code) or MonthCharge(), book) for line in lines]
    return rows


# --- measuring ------------------------------------------------------------------------------


class Timed:
    """What a block took, by the clock and of the CPU."""

    wall = 0.0
    cpu = 0.0


@contextmanager
def timed() -> Iterator[Timed]:
    """Times a block, from a heap without rubbish."""
    gc.collect()
    took, wall, cpu = Timed(), time.perf_counter(), time.process_time()
    yield took
    took.wall, took.cpu = time.perf_counter() - wall, time.process_time() - cpu


def peak_mib() -> int:
    """The most memory that the process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def profile(work: Callable[[], Any], entries: int) -> list[str]:
    """The functions that took the most time of their own."""
    profiler = cProfile.Profile()
    profiler.runcall(work)
    out = io.StringIO()
    pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(entries)
    text = out.getvalue().replace(str(Path.cwd()) + "/", "")
    return [line for line in text.splitlines() if line.strip()]


def describe(book: Book, derived: Derivation, period: int) -> str:
    """What the book is made of, to see that the benchmark asks for what it says."""
    lines: list[Line] = [line for order in book.orders.values() for line in order.lines.values()]
    kinds = dict.fromkeys(("patient", "declarative", "on_demand"), 0)
    for line in lines:
        kinds[line.placed.price.provisioning] += 1
    tiered = sum(not line.placed.price.is_flat for line in lines)
    usage = sum(map(len, book.usage.values()))
    payable, held = invoice(derived, {}, period)
    net = (sum(payable.values()) + sum(held.values())) / 100
    paid = dict.fromkeys(("NHSE", "LOCAL"), 0)
    for key, pence in payable.items():
        if key.payer in paid:
            paid[key.payer] += pence
    central = ", ".join(f"{payer} {pence / 100:,.2f}" for payer, pence in paid.items())
    return (
        f"{len(lines):,} lines of {len(book.orders):,} orders: {kinds}, {tiered:,} tiered; {usage:,} days of usage\n"
        f"{len(payable):,} payable and {len(held):,} held amounts, {net:,.2f} pounds ({central})"
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--months", type=int, default=12, help="how many, from April 2025")
    parser.add_argument("--profile", type=int, default=20, metavar="ENTRIES", help="0: no profiles")
    options = parser.parse_args()

    with timed() as built:
        world = World(options.lines, options.months)
        book = world.book()
    book_mib = peak_mib()
    print(f"book built in {built.wall:.1f} s, {book_mib} MiB")
    last = world.months[-1]

    with timed() as year, collector_paused():
        derived = derive(book, last)
    derive_mib = peak_mib()
    line_months = sum(map(len, derived.charges.values()))
    print(describe(book, derived, last))
    print(
        f"(a) a year derived: {year.cpu:.2f} s CPU, {year.wall:.2f} s; {options.lines / year.cpu:,.0f} lines/s, "
        f"{line_months / year.cpu:,.0f} line-months/s; peak {derive_mib} MiB"
    )
    del derived

    changes = list(world.publish(last))
    with timed() as rerated, collector_paused():
        for change in changes:
            book.reference.say(change)
        rows = published(book, changes, last + 1)
    print(
        f"(b) list sizes of {month_text(last)} published for {len(changes):,} practices: {len(rows):,} rows in "
        f"{rerated.cpu:.2f} s CPU, {rerated.wall:.2f} s"
    )

    profiles: dict[str, list[str]] = {}
    if options.profile:
        profiles["derive"] = profile(lambda: derive(book, last), options.profile)
        profiles["rerate"] = profile(lambda: published(book, changes, last + 1), options.profile)
        for name, text in profiles.items():
            print(f"\n{name}:", *text, sep="\n")
    RESULTS.mkdir(exist_ok=True)
    result = {
        "day": date.today().isoformat(),  # noqa: DTZ011  # of the machine, for the record
        "python": platform.python_version(),
        "machine": platform.machine(),
        "lines": options.lines,
        "months": options.months,
        "line_months": line_months,
        "derive": {
            "cpu_seconds": round(year.cpu, 2),
            "wall_seconds": round(year.wall, 2),
            "lines_per_second": round(options.lines / year.cpu),
            "line_months_per_second": round(line_months / year.cpu),
            "peak_mib": derive_mib,
            "book_mib": book_mib,
        },
        "rerate": {
            "practices": len(changes),
            "rows": len(rows),
            "cpu_seconds": round(rerated.cpu, 2),
            "wall_seconds": round(rerated.wall, 2),
        },
        "profiles": profiles,
    }
    (RESULTS / "rating.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
