"""The figures of docs/performance.md, from what was measured last.

`python -m bench.report` prints them as Markdown from bench/results/*.json; `--write` puts them into
docs/performance.md, between its markers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from math import ceil, log2
from typing import Any

from bench.stack import RESULTS, ROOT

DOCUMENT = ROOT / "docs" / "performance.md"
#: The sizing: all of a day within eight hours, three times the mean at the peak, a core half full, and
#: claims for the window and a day on either side.
WORKING_SECONDS, PEAK_FACTOR, FULL, CLAIM_DAYS = 8 * 3600, 3, 0.5, 95
WHAT = {
    "tribill": "**tribill**: decode, check, authorise, claim, ledger, day totals; two processes",
    "tribill_batch": "**tribill**, `UsageBatch` of 100, readings",
    "bytewax": "Bytewax: decode, sum in its own state",
    "bytewax_dict": "Bytewax: decode, sum in a dictionary",
    "quix": "Quix Streams: decode, sum in its own state",
    "quix_dict": "Quix Streams: decode, sum in a dictionary",
    "faust": "Faust, event by event: decode, sum in a dictionary",
    "fetch": "aiokafka `getmany`, nothing done",
}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
    yield ""


def about(result: dict[str, Any]) -> str:
    """What a result was measured on."""
    return (
        f"{result['day']}, {result['machine']}, load average {result['load_average']}, {result['broker']}, "
        f"Python {result['python']}"
    )


def usage(result: dict[str, Any]) -> Iterator[str]:
    """The comparison."""
    yield f"`make bench`, {result['messages']:,} messages ({about(result)}):"
    yield ""
    rows = []
    for name, what in WHAT.items():
        if each := result["details"].get(name):
            ratio = result["tribill"] / each["events_per_second"]
            rate, cpu = f"{each['events_per_second']:,}", f"{each['cpu_us_per_event']:.1f}"
            rows.append((what, rate, cpu, each["peak_mib"], f"{ratio:.2f}"))
        else:
            rows.append((what, "no wheel for this Python", "", "", ""))
    yield from table(("what", "events/s", "worker CPU s per million", "peak MiB", "tribill against it"), rows)
    yield "CPU seconds per million events by process:"
    yield ""
    parts = ("intake", "usage", "redis", "clickhouse", "broker")
    rows = []
    for name in ("tribill", "tribill_batch"):
        shares = result["details"][name]["cpu_us_per_event_by_process"]
        whole = sum(shares.values())
        rows.append((name, *(shares[part] for part in parts), f"{whole:.1f}", f"{result['cores'] / whole * 1e6:,.0f}"))
    yield from table(("", *parts, "together", f"bound of {result['cores']} cores, events/s"), rows)


def sizing(result: dict[str, Any]) -> Iterator[str]:
    """What so many events a day need, by the arithmetic that the document gives."""
    cost = result["details"]["tribill"]["cpu_us_per_event_by_process"]
    rows = []
    for events in (100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000):
        peak = events * PEAK_FACTOR / WORKING_SECONDS
        cores = {part: peak * cost[part] / 1e6 / FULL for part in ("intake", "usage", "clickhouse", "redis")}
        workers = max(1, ceil(cores["intake"]), ceil(cores["usage"]))
        rows.append(
            (
                f"{events:,}",
                f"{peak:,.0f}",
                max(1, ceil(cores["intake"])),
                max(1, ceil(cores["usage"])),
                max(4, 2 ** ceil(log2(2 * workers))),
                f"{cores['clickhouse']:.1f}",
                gib(events * result["ledger_bytes_per_reading"] * 365),
                f"{cores['redis']:.1f}",
                gib(events * result["redis_bytes_per_reading"] * CLAIM_DAYS),
            )
        )
    yield (
        f"A reading takes {result['redis_bytes_per_reading']} bytes in Redis and "
        f"{result['ledger_bytes_per_reading']} in ClickHouse."
    )
    yield ""
    head = ("events a day", "peak/s", "intake workers", "usage workers", "partitions", "ClickHouse cores")
    yield from table((*head, "ClickHouse GiB a year", "Redis cores", "Redis GiB"), rows)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:,.1f}"


def latency(result: dict[str, Any]) -> Iterator[str]:
    """Event to visible accrual."""
    yield f"`make bench-latency`, {result['charge_lines']:,} charge lines ({about(result)}):"
    yield ""
    rows = [
        (
            f"{each['rate']:,}",
            f"{each['rate_sent']:,}",
            each["p50_seconds"],
            each["p99_seconds"],
            each["max_seconds"],
            f"{sum(each['cores'].values()):.2f}",
        )
        for each in result["rates"]
    ]
    yield from table(("events/s asked", "sent", "p50 s", "p99 s", "longest s", "cores in use"), rows)


def growth(result: dict[str, Any]) -> Iterator[str]:
    """What grows behind the usage path."""
    yield f"`make bench-growth` ({about(result)}):"
    yield ""
    head = ("what grows", "events/s", "CPU s per million, workers + Redis + ClickHouse", "by the clock", "by CPU")
    rows = []
    for key, names, label in (
        ("charge_lines", ("same", "even"), "{lines:,} lines, {name}"),
        ("history", ("recent", "late"), "{rows:,} rows, {name}"),
    ):
        prefix = "lines" if key == "charge_lines" else "history"
        for name in names:
            ratio = result["ratios"][f"{prefix}_{name}"]
            for index, case in enumerate(result[key]):
                clock, cpu = ratio["by_clock"][index], ratio["by_cpu"][index]
                pace = f"{case[name]['events_per_second']:,}"
                rows.append((label.format(**case, name=name), pace, case[name]["cpu_us_per_event"], clock, cpu))
    yield from table(head, rows)


def scaling(result: dict[str, Any]) -> Iterator[str]:
    """Two workers a role against one."""
    yield f"`make bench-scaling` ({about(result)}): {result['ratio']:.2f} times"
    yield ""
    names = ("workers_a_role", "events_per_second", "worker_cpu_us_per_event", "cores_in_use")
    rows = [[each[name] for name in names] for each in result["runs"]]
    yield from table(("workers a role", "events/s", "worker CPU s per million", "cores in use"), rows)


def main() -> None:
    """Prints the figures, or writes them into the document."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()
    results = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    measured = [line for each in (usage, latency, growth, scaling) for line in each(results[each.__name__])]
    parts = {"figures": measured, "sizing": list(sizing(results["usage"]))}
    if options.write:
        text = DOCUMENT.read_text()
        for name, lines in parts.items():
            begin, end = f"<!-- {name}: python -m bench.report --write -->\n", f"<!-- end of {name} -->"
            before, _, rest = text.partition(begin)
            text = "".join([before, begin, "\n".join(lines), rest[rest.index(end) :]])
        DOCUMENT.write_text(text)
    else:
        print("\n".join(measured + parts["sizing"]))


if __name__ == "__main__":
    main()
