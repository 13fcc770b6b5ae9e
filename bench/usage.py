"""The usage path against its peers: the same messages, on one broker, in one run.

`python -m bench.usage` sends Avro `Usage` records to a Kafka topic of 4 partitions and has them done by

- tribill: intake and usage agents, a worker each, with Redis and ClickHouse, up to the ledger, the
  day totals and the committed offsets; then the same with `UsageBatch` records of 100 readings;
- faust: a Faust agent, event by event, that decodes with fastavro and adds up in a dictionary;
- quix, bytewax: Quix Streams and Bytewax, decoding with fastavro and adding up in their own state, by
  practice; quix_dict, bytewax_dict: the same with a dictionary instead, as cheap as state can be;
- fetch: raw aiokafka `getmany`, no decoding.

The topic is filled, and read once, before. The clock runs from the first record (for tribill: from the last instant at
which intake had no partitions) to the last one done; joining the group is not counted for anybody.
Everyone must have counted every message and the exact sum, or the run fails.
Prints events/s, CPU and memory; writes bench/results/usage.json and usage.svg.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

from bench.peers import environment
from bench.plot import bars
from bench.profile import profiled
from bench.stack import RESULTS, ROOT, Log, Measured, Meter, Stack, broker, machine, measure, say, wait, write
from bench.workload import (
    BATCHES_TOPIC,
    BATCHING_SUPPLIER,
    SUPPLIERS,
    TOPIC,
    Sent,
    Usage,
    send,
)
from tribill.embedded.process import Process

ROLES = ("intake", "usage")
#: Each peer, and the package that it needs.
PEERS = {
    "bytewax": "bytewax",
    "bytewax_dict": "bytewax",
    "quix": "quixstreams",
    "quix_dict": "quixstreams",
    "fetch": "aiokafka",
    "faust": "faust",
}
EVERYONE = ("tribill", "tribill_batch", *PEERS)
READINGS_A_BATCH = 100
#: A peer that takes longer has hung.
PEER_SECONDS = 300


def run_tribill(stack: Stack, events: int, rows_before: int, profile: Path | None) -> Measured:
    """What the usage path takes for the events that wait for it."""
    say("tribill ...")
    (usage,) = stack.start("usage")
    watched = {"usage": [usage.pid]} | {name: [pid] for name, pid in stack.parts().items()}
    meter = Meter(watched)
    (intake,) = stack.start("intake")
    meter.take_in(intake)
    spy = environment.BIN / "py-spy"
    with profiled(spy, {"intake": intake.pid, "usage": usage.pid}, profile):
        return measure(stack, events, rows_before, meter)


def tribill(stack: Stack, singles: Sent, options: argparse.Namespace) -> dict[str, Measured]:
    """tribill's results, with single readings and in batches."""
    found = {}
    if "tribill" in options.only:
        found["tribill"] = run_tribill(stack, singles.readings, 0, options.profile)
        stack.check_ledger(TOPIC, singles.readings, singles.micros)
        stack.stop_workers()
    if "tribill_batch" in options.only:
        usage = Usage(supplier=BATCHING_SUPPLIER, seed=1)
        sent = send(stack.settings, BATCHES_TOPIC, list(usage.batches(options.events, READINGS_A_BATCH)))
        folder = options.profile and options.profile / "batch"
        found["tribill_batch"] = run_tribill(stack, sent.readings, stack.rows(), folder)
        stack.check_ledger(BATCHES_TOPIC, sent.readings, sent.micros)
        stack.stop_workers()
    return found


# --- the peers ------------------------------------------------------------------------------


def run_peer(name: str, log: Log, sent: Sent) -> Measured | None:
    """What a peer takes for the same records; None where there is no wheel of it for this Python."""
    if not environment.has(PEERS[name]):
        say(f"{name}: no wheel for Python {platform.python_version()} on {platform.machine()}; left out")
        return None
    say(f"{name} ...")
    program = str(Path(__file__).parent / "peers" / f"{name}_peer.py")
    command = [str(environment.PYTHON), program, "--broker", log.address, "--topic", TOPIC]
    command += ["--events", str(sent.readings), "--schema", str(ROOT / "schemas" / "avro" / "Usage.avsc")]
    with tempfile.TemporaryDirectory(prefix="tribill-bench-") as folder:
        environ = {"Quix__State__Dir": folder}
        peer = Process(name, command, Path(folder), environment=environ)
        try:
            wait(lambda: peer.exit_code is not None, PEER_SECONDS, name)
        finally:
            peer.terminate()
        lines = [line for line in peer.log.read_text().splitlines() if line.startswith('{"events"')]
        if not lines:
            raise RuntimeError(f"{name} ended with {peer.exit_code} and no result:\n{peer.log_tail()}")
    took = json.loads(lines[-1])
    assert took["events"] == sent.readings, f"{name} counted {took['events']} of {sent.readings} records"
    if name != "fetch":
        micros = int(Decimal(took["quantity"]) * 10**6)
        assert micros == sent.micros, f"{name} summed {micros} micros, {sent.micros} were sent"
    return Measured(took["events"], took["seconds"], {"peer": took["cpu"]}, {"peer": took["peak_mib"]})


# --- what comes out -------------------------------------------------------------------------


def result(measured: Measured | None) -> dict[str, Any] | None:
    """What is kept of a measurement."""
    if measured is None:
        return None
    workers = ROLES if "intake" in measured.cpu else ("peer",)
    kept: dict[str, Any] = {
        "events_per_second": measured.rate,
        "events": measured.events,
        "seconds": round(measured.seconds, 3),
        "cpu_us_per_event": measured.cpu_us(workers),
        "peak_mib": max(measured.peak_mib[each] for each in workers),
    }
    if len(measured.cpu) > 1:
        kept["cpu_us_per_event_by_process"] = {each: measured.cpu_us([each]) for each in sorted(measured.cpu)}
        kept["peak_mib_by_process"] = dict(sorted(measured.peak_mib.items()))
    return kept


def summary(messages: int, found: dict[str, Any]) -> dict[str, Any]:
    """The content of bench/results/usage.json."""
    tribill = found["tribill"]
    rates = {name: each and each["events_per_second"] for name, each in found.items()}
    return {
        **rates,
        "worker_cpu_us_per_event": tribill["cpu_us_per_event"],
        "worker_cpu_us_per_event_by_role": {r: tribill["cpu_us_per_event_by_process"][r] for r in ROLES},
        "worker_peak_mib": tribill["peak_mib"],
        "ratios": {
            f"tribill/{name}": round(rates["tribill"] / rates[name], 2) for name in PEERS if rates.get(name)
        },
        "messages": messages,
        "details": found,
    }


def shown(found: dict[str, Any]) -> str:
    """The table for the terminal."""
    lines = [f"{'':14}{'events/s':>10}{'CPU s / million':>17}{'peak MiB':>10}{'tribill is':>12}"]
    first = found.get("tribill")
    for name, each in found.items():
        if each is None:
            lines.append(f"{name:14}{'no wheel':>10}")
            continue
        ratio = f"{first['events_per_second'] / each['events_per_second']:.2f}x" if first else ""
        figures = f"{each['events_per_second']:>10,}{each['cpu_us_per_event']:>17.2f}{each['peak_mib']:>10,}{ratio:>12}"
        lines.append(f"{name:14}{figures}")
    for name in ("tribill", "tribill_batch"):
        if each := found.get(name):
            shares = ", ".join(f"{part} {us:.2f}" for part, us in each["cpu_us_per_event_by_process"].items())
            lines.append(f"{name}, microseconds of CPU an event: {shares}")
    return "\n".join(lines)


def main() -> None:
    """Runs the comparison."""
    options = arguments()
    if options.profile or set(options.only) & set(PEERS):
        environment.make()
    found: dict[str, Any] = {}
    with broker() as log:
        say(f"{log.name}; {options.events:,} events for {', '.join(options.only)}")
        with Stack(log, supplier_topics=SUPPLIERS) as stack:
            records = Usage().singles(options.events)
            singles = send(stack.settings, TOPIC, records)
            size = sum(len(value) for _, value, _, _ in records) / len(records)
            del records
            say(f"sent {singles.records:,} records of {size:.0f} bytes")
            if set(options.only) & set(PEERS):
                # Nobody is the first to read: Java translates what it runs often, and that costs whoever comes first.
                run_peer("fetch", log, singles)
            found |= {name: result(each) for name, each in tribill(stack, singles, options).items()}
            footprint = stack.footprint() if found else {}
        for name in PEERS:
            if name in options.only:
                found[name] = result(run_peer(name, log, singles))
    print(shown(found))
    if set(found) == set(EVERYONE):
        write("usage", log, summary(options.events, found) | footprint)
        rates = {name: each["events_per_second"] for name, each in found.items() if each}
        (RESULTS / "usage.svg").write_text(bars(f"events a second, {log.name}, {machine()}", rates))
    for role in ROLES if options.profile else ():
        print(f"\n{role}:\n{(options.profile / role).with_suffix('.txt').read_text()}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.usage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=1_000_000, metavar="N", help="how many (default %(default)s)")
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
