"""Two workers a role against one, on the same machine.

`python -m bench.scaling` sends the same readings to one and then to two intake and usage workers, each
time with a broker, Redis and ClickHouse of their own.  Where the broker, Redis and ClickHouse share
two cores with the workers, these are full with one worker a role: the CPU seconds say how much room
was left.  Writes bench/results/scaling.json.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from bench.stack import Log, Stack, broker, measure_sending, say, write
from bench.workload import SUPPLIERS, TOPIC, Usage


def run(log: Log, workers: int, events: int) -> dict[str, Any]:
    """The pace of so many workers a role."""
    with Stack(log, supplier_topics=SUPPLIERS) as stack:
        running = stack.start(*["usage"] * workers, *["intake"] * workers)
        measure_sending(stack, running, TOPIC, Usage(seed=1).singles(20_000))
        took = measure_sending(stack, running, TOPIC, Usage().singles(events))
    cores = sum(took.cpu.values()) / took.seconds
    print(f"{workers} a role: {took.rate:,} events/s; {cores:.2f} of {os.cpu_count()} cores in use", flush=True)
    return {
        "workers_a_role": workers,
        "events_per_second": took.rate,
        "worker_cpu_us_per_event": took.cpu_us(("intake", "usage")),
        "cores_in_use": round(cores, 2),
        "cpu_us_per_event_by_process": {name: took.cpu_us([name]) for name in took.cpu},
        "peak_mib_of_a_worker": max(took.peak_mib[role] for role in ("intake", "usage")),
    }


def main() -> None:
    """Measures one worker a role, then two."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=400_000, help="measured in each case (default %(default)s)")
    options = parser.parse_args()
    found = []
    for workers in (1, 2):
        with broker() as log:
            say(f"{log.name}, {workers} a role ...")
            found.append(run(log, workers, options.events))
    ratio = round(found[1]["events_per_second"] / found[0]["events_per_second"], 2)
    print(f"two against one: {ratio:.2f}x on {os.cpu_count()} cores that broker, Redis and ClickHouse share")
    write("scaling", log, {"ratio": ratio, "events": options.events, "runs": found})


if __name__ == "__main__":
    main()
