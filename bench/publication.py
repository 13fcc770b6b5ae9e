"""From list sizes of all practices, read, to every accrual that they move: the charges agent as it runs.

`python -m bench.publication [--lines 75000] [--workers 2]` gives the agents of some workers the book of
`bench.rating`, in four partitions, and the list sizes of a month as the reference agent sends them.  It
measures from the moment that the agents have the records until ClickHouse has every row and the broker
has acknowledged all that follows, on the embedded stack.  Writes bench/results/publication.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agents.charges import Charges, State
from agents.context import Context
from bench.rating import LINES, RESULTS, World, timed
from rating import records as said
from rating.book import Book
from rating.calendar import month_text, parse_month
from rating.charges import iso
from sinks.clickhouse import ClickHouse
from streams.batch import Batch
from streams.codec import Codec
from streams.settings import Settings
from streams.topics import CHARGE_INPUTS, REFERENCE_CHANGES, Broker, partition_for
from tribill.embedded.stack import EmbeddedStack

#: As many changes as the reference agent puts into one record.
CHUNK = 1_000


@dataclass
class Record:
    """What of a record the agent looks at."""

    offset: int
    value: bytes | None
    timestamp: int = 0
    key: bytes | None = None


def records(codec: Codec, changes: Sequence[said.ReferenceChange], partitions: int) -> Iterator[Record]:
    """The changes as `charge-inputs` carries them, the same to every partition."""
    offset = 1
    for partition in range(partitions):
        ours = [each for each in changes if partition_for(each.code, partitions) == partition]
        for start in range(0, len(ours), CHUNK):
            chunk = []
            for place, each in enumerate(ours[start : start + CHUNK], start):
                assert isinstance(each.body, said.ListSize)
                size = {"ods_code": each.code, "as_of": iso(each.body.as_of), "patients": each.body.patients}
                whole = {"id": each.id, "code": each.code, "recorded_at": "2026-03-14T09:00:00Z"}
                body = zlib.compress(json.dumps(whole | {"change": {"ListSize": size}}).encode(), 1)
                chunk.append({"generation": 1, "partition": partition, "offset": place, "body": body})
            source = {"generation": 1, "topic": REFERENCE_CHANGES, "partition": partition, "end_offset": place + 1}
            value = {"source": source, "kind": "reference", "changes": chunk}
            yield Record(offset, codec.encode("AcceptedChanges", value))
            offset += 1


def state_of(world: World, partition: int, partitions: int) -> State:
    """What the agent has in memory of a partition once it has applied the year."""
    orders = [
        order
        for order in world.orders
        if any(partition_for(item_id, partitions) == partition for item_id in order.by_item)
    ]
    usage = {key: days for key, days in world.usage.items() if partition_for(key[0], partitions) == partition}
    state = State(1, orders={order.number: order for order in orders}, reference=world.reference, usage=usage)
    state.book = Book(orders, world.reference, usage)
    return state


def work(
    world: World, settings: Settings, number: int, workers: int, sent: list[Record], ready: Any, found: Any
) -> None:
    """One worker: does what was published for its partitions, when all workers are ready."""
    agent = Charges(Context("charges", settings))
    ours = range(number, settings.partitions, workers)
    for partition in ours:
        agent._states[partition] = state_of(world, partition, settings.partitions)
        agent._states[partition].horizon = parse_month(settings.horizon_month)
    ready.wait()
    with timed() as took:
        started = time.perf_counter()
        ends = []
        for partition in ours:
            agent.do(Batch(CHARGE_INPUTS, partition, sent))
            ends.append(round(time.perf_counter() - started, 2))
    found.put({"wall_seconds": round(took.wall, 2), "cpu_seconds": round(took.cpu, 2), "partitions_after": ends})


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.publication", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=LINES, help="charge lines (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of the role charges (default %(default)s)")
    options = parser.parse_args()
    world = World(options.lines, 12)
    last = world.months[-1]
    with tempfile.TemporaryDirectory(prefix="tribill-bench-") as folder, EmbeddedStack(Path(folder)) as stack:
        settings = replace(
            Settings(), kafka=stack.kafka, clickhouse=stack.clickhouse, redis=stack.redis,
            horizon_month=month_text(last + 1),
        )  # fmt: skip
        ClickHouse(settings).migrate()
        Broker(settings).create_topics()
        sent = list(records(Codec(settings), list(world.publish(last)), settings.partitions))
        fork = get_context("fork")
        ready, found = fork.Barrier(options.workers), fork.Queue()
        workers = [
            fork.Process(target=work, args=(world, settings, number, options.workers, sent, ready, found))
            for number in range(options.workers)
        ]
        for worker in workers:
            worker.start()
        took = [found.get() for _ in workers]
        for worker in workers:
            worker.join()
        [(rows,)] = ClickHouse(settings).query("SELECT count() FROM accruals")
    wall, cpu = max(each["wall_seconds"] for each in took), sum(each["cpu_seconds"] for each in took)
    print(
        f"list sizes of {month_text(last)} for {len(world.practices):,} practices: {rows:,} accrual rows of "
        f"{options.lines:,} lines visible and acknowledged {wall:.2f} s after they were read "
        f"by {options.workers} workers ({cpu:.2f} s CPU of theirs)"
    )
    result = {
        "day": date.today().isoformat(),  # noqa: DTZ011  # of the machine, for the record
        "python": platform.python_version(),
        "machine": platform.machine(),
        "lines": options.lines,
        "practices": len(world.practices),
        "rows": rows,
        "wall_seconds": wall,
        "cpu_seconds": round(cpu, 2),
        "workers": took,
    }
    (RESULTS / "publication.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
