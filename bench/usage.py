"""The usage path against its peers: the same messages, on one broker, in one run.

`python -m bench.usage` sends Avro `Usage` records to a Kafka topic of 4 partitions and has them done by

- tribill: intake and usage agents, a worker each, with Redis and ClickHouse, up to the ledger, the
  day totals and the committed offsets; then the same with `UsageBatch` records of 100 readings;
- faust: a Faust agent, event by event; quix: Quix Streams; bytewax: Bytewax; each decodes with
  fastavro and keeps a sum per practice in memory;
- fetch: raw aiokafka `getmany`, no decoding.

The topic is filled before. The clock runs from the first record (for tribill: from the last instant at
which intake had no partitions) to the last one done; joining the group is not counted for anybody.
Everyone must have counted every message and the exact sum, or the run fails.
Prints events/s, CPU and memory; writes bench/results/usage.json and usage.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.peers import environment
from bench.profile import profiled
from bench.stack import Measured, Meter, Stack, broker, measure, say
from bench.workload import (
    BATCHES_TOPIC,
    BATCHING_SUPPLIER,
    SUPPLIERS,
    TOPIC,
    Sent,
    Usage,
    send,
)

ROLES = ("intake", "usage")
PEERS = ("bytewax", "quix", "fetch", "faust")
EVERYONE = ("tribill", "tribill_batch", *PEERS)
READINGS_A_BATCH = 100


def run_tribill(stack: Stack, events: int, rows_before: int, profile: Path | None) -> Measured:
    """What the usage path takes for the events that wait for it."""
    say("starting the workers ...")
    (usage,) = stack.start("usage")
    watched = {"usage": [usage.pid]} | {name: [pid] for name, pid in stack.parts().items()}
    meter = Meter(watched)
    (intake,) = stack.start("intake")
    meter.take_in(intake)
    spy = environment.BIN / "py-spy"
    with profiled(spy, {"intake": intake.pid, "usage": usage.pid}, profile):
        return measure(stack, events, rows_before, meter)


def tribill(stack: Stack, only: list[str], singles: Sent, options: argparse.Namespace) -> dict[str, Measured]:
    """tribill's results, with single readings and in batches."""
    found = {}
    if "tribill" in only:
        found["tribill"] = run_tribill(stack, singles.readings, 0, options.profile)
        stack.check_ledger(TOPIC, singles.readings, singles.micros)
        stack.stop_workers()
    if "tribill_batch" in only:
        usage = Usage(supplier=BATCHING_SUPPLIER, seed=1)
        sent = send(stack.settings, BATCHES_TOPIC, list(usage.batches(options.events, READINGS_A_BATCH)))
        before = stack.rows()
        found["tribill_batch"] = run_tribill(stack, sent.readings, before, options.profile and options.profile / "batch")
        stack.check_ledger(BATCHES_TOPIC, sent.readings, sent.micros)
        stack.stop_workers()
    return found


def main() -> None:
    """Runs the comparison."""
    options = arguments()
    with broker() as log:
        say(f"{log.name}; {options.events:,} events for {', '.join(options.only)}")
        with Stack(log, supplier_topics=SUPPLIERS) as stack:
            records = [(key, value, units, 1) for key, value, units in Usage().singles(options.events)]
            singles = send(stack.settings, TOPIC, records)
            size = sum(len(value) for _, value, _, _ in records)
            say(f"sent {singles.readings:,} records of {size / len(records):.0f} bytes")
            del records
            found = tribill(stack, options.only, singles, options)
    for name, measured in found.items():
        print(name, measured.rate, "events/s", {k: round(v / measured.events * 1e6, 2) for k, v in measured.cpu.items()}, measured.peak_mib)
    if options.profile:
        for role in ROLES:
            print((options.profile / f"{role}.txt").read_text())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.usage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=500_000, metavar="N", help="how many (default %(default)s)")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(EVERYONE),
        metavar="NAME,...",
        help=f"not all of {','.join(EVERYONE)}; then no results are written",
    )
    parser.add_argument("--profile", type=Path, metavar="DIR", help="profile tribill's workers with py-spy into DIR")
    options = parser.parse_args()
    if unknown := set(options.only) - set(EVERYONE):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; choose of {', '.join(EVERYONE)}")
    return options


if __name__ == "__main__":
    main()
