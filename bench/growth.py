"""Whether the usage path keeps its pace while what lies behind it grows.

`python -m bench.growth` measures intake and usage agents together, warm, with readings sent to them:

- charge lines: 1,000, 100,000 and 1,000,000 (practice, item) pairs have usage and are held as day
  totals.  `same` sends readings of the same 1,000 lines each time: what a larger book costs alone.
  `even` sends readings of all lines alike, the worst there is: at a million hardly two readings
  of a batch share a day total.
- history: an empty ledger against one with millions of rows, whose identities Redis no longer
  has.  `late` then sends readings older than the claim window, each of which is looked up in the ledger.

Ratios are to the smallest of each, by the clock and by the CPU of workers, Redis and ClickHouse; 0.8
and above is flat.  Writes bench/results/growth.json.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from bench.stack import Log, Measured, Stack, broker, measure_sending, write
from bench.workload import BATCHES_TOPIC, BATCHING_SUPPLIER, SUPPLIERS, TOPIC, Usage, practice_codes

_LATE_DAYS = 60
_HISTORY = """
INSERT INTO usage
SELECT {practices:Array(String)}[number % length({practices:Array(String)}) + 1], {supplier:String},
       toString(generateUUIDv4(number)), 0, 0, {topic:String}, number % 4, number, 0,
       toUnixTimestamp(now()) * 1000 - 86400000, number % 4, number, concat({supplier:String}, '-S-001'),
       1000000, now() - INTERVAL 90 + number % 200 DAY, toDate32(now() - INTERVAL 90 + number % 200 DAY)
FROM numbers({first:UInt64}, {count:UInt64})
"""


def shown(name: str, took: Measured) -> dict[str, Any]:
    """A measurement, kept and printed."""
    peaks = {role: took.peak_mib[role] for role in ("intake", "usage")}
    cost = took.cpu_us(("intake", "usage"))
    print(
        f"{name:28}{took.rate:>9,} events/s{cost:>8.2f} us of the workers, peak {max(peaks.values())} MiB",
        flush=True,
    )
    return {
        "events_per_second": took.rate,
        "events": took.events,
        "worker_cpu_us_per_event": cost,
        "cpu_us_per_event": took.cpu_us(("intake", "usage", "redis", "clickhouse")),
        "peak_mib": peaks,
    }


def shape(lines: int) -> dict[str, int]:
    """Practices and items of so many charge lines."""
    practices = min(lines, 6_250)
    return {"practices": practices, "items": lines // practices}


def with_lines(log: Log, lines: int, events: int) -> dict[str, Any]:
    """The pace with so many charge lines in use."""
    with Stack(log, supplier_topics=SUPPLIERS) as stack:
        workers = stack.start("usage", "intake")
        known = Usage(supplier=BATCHING_SUPPLIER, **shape(lines))
        measure_sending(stack, workers, BATCHES_TOPIC, known.each_line_once())
        found = {}
        for number, (name, sends) in enumerate((("same", shape(1_000)), ("even", shape(lines)))):
            usage = Usage(supplier=BATCHING_SUPPLIER, seed=number, **sends)
            took = measure_sending(stack, workers, BATCHES_TOPIC, usage.singles(events))
            found[name] = shown(f"{lines:,} lines, {name}", took)
        return {"lines": lines, **found}


def with_history(log: Log, rows: int, events: int) -> dict[str, Any]:
    """The pace with so many rows in the ledger, of identities that Redis does not have."""
    with Stack(log, supplier_topics=SUPPLIERS) as stack:
        codes = practice_codes(6_500)
        # The first claim must find the ledger empty: so a store that has run for long is told from a new one.
        stack.start("usage", "intake")
        measure_sending(stack, stack.workers, TOPIC, Usage(practices=1).singles(10))
        stack.stop_workers()
        for first in range(0, rows, 500_000):
            block = {"practices": codes, "supplier": SUPPLIERS.split(",")[0], "topic": TOPIC}
            stack.clickhouse.command(_HISTORY, block | {"first": first, "count": min(500_000, rows - first)})
        started = time.monotonic()
        workers = stack.start("usage", "intake")
        measure_sending(stack, workers, TOPIC, Usage(items=1, seed=1).each_line_once())
        restored = time.monotonic() - started
        found = shown(f"{rows:,} rows", measure_sending(stack, workers, TOPIC, Usage(seed=2).singles(events)))
        late = Usage(seed=3, days_ago=_LATE_DAYS).singles(max(1, events // 10))
        slow = shown(f"{rows:,} rows, late", measure_sending(stack, workers, TOPIC, late))
        return {"rows": rows, "seconds_until_warm": round(restored, 1), "recent": found, "late": slow}


def compared(cases: list[dict[str, Any]], name: str) -> dict[str, list[float]]:
    """Each case against the first one: its pace by the clock, and by CPU, where neighbours do not count."""
    first = cases[0][name]
    return {
        "by_clock": [round(case[name]["events_per_second"] / first["events_per_second"], 2) for case in cases],
        "by_cpu": [round(first["cpu_us_per_event"] / case[name]["cpu_us_per_event"], 2) for case in cases],
    }


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(each) for each in text.split(",")]


def main() -> None:
    """Measures every case."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=numbers, default="1000,100000,1000000", metavar="N,...", help="charge lines")
    parser.add_argument("--rows", type=numbers, default="0,5000000", metavar="N,...", help="rows in the ledger before")
    parser.add_argument("--events", type=int, default=200_000, help="measured in each case (default %(default)s)")
    options = parser.parse_args()
    by_lines, by_rows = [], []
    for lines in options.lines:
        with broker() as log:
            by_lines.append(with_lines(log, lines, options.events))
    for rows in options.rows:
        with broker() as log:
            by_rows.append(with_history(log, rows, options.events))
    ratios = {f"lines_{name}": compared(by_lines, name) for name in ("same", "even")}
    ratios |= {f"history_{name}": compared(by_rows, name) for name in ("recent", "late")}
    for name, each in ratios.items():
        print(f"{name:16} by the clock {each['by_clock']}, by CPU {each['by_cpu']}")
    print("1.0 is the pace of the smallest; from 0.8 on it is flat")
    write("growth", log, {"ratios": ratios, "charge_lines": by_lines, "history": by_rows})


if __name__ == "__main__":
    main()
