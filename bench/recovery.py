"""How long accruals stand still when a worker is killed, over a ledger of a million readings.

`python -m bench.recovery [--rows 1000000] [--lines 4000] [--kills 3] [--session 8]` starts an installation
on the benches' broker with two workers each of the roles usage and charges, fills the ledger as an earlier life of the
log would have left it, places an order, and then, some times: kills one worker of each of the two
roles with SIGKILL, reports a reading for every pair of their partitions, and waits until all of
these are in the accruals.  Killed workers are started again after each time, as Kubernetes would.

Prints the seconds from the kill to live accruals and writes `bench/results/recovery.json`.  The
session timeout is part of it: for so long the broker takes a dead worker for a slow one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from bench.stack import broker, write
from sinks.clickhouse import ClickHouse
from sinks.ledger import USAGE_SCHEMA, Ledger
from streams.settings import Settings
from streams.topics import partition_for
from tribill.embedded.process import Process, free_port
from tribill.installation import Installation
from tribill.interchange import Publisher

PARTITIONS = 2
SUPPLIER = "10030"
ITEMS = [f"{SUPPLIER}-S-{number:03d}" for number in range(4)]
KILLED = ("usage", "charges")
WITHIN_SECONDS = 15.0


def main() -> None:
    """Measures, and exits with 1 when a recovery took longer than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="readings in the ledger")
    parser.add_argument("--lines", type=int, default=4_000, help="charge lines")
    parser.add_argument("--kills", type=int, default=3, help="how often")
    session = Settings().session_timeout_seconds
    parser.add_argument("--session", type=int, default=session, help="session_timeout_seconds (%(default)s)")
    options = parser.parse_args()
    practices = [f"A{number:05d}" for number in range(options.lines // len(ITEMS))]
    settings = Settings(partitions=PARTITIONS, session_timeout_seconds=options.session, log_generation=2)
    with (
        broker() as log,
        tempfile.TemporaryDirectory(prefix="tribill-recovery-") as directory,
        Installation(Path(directory), replace(settings, kafka=log.address)) as held,
    ):
        held.prepare(2)
        fill(held.settings, practices, options.rows)
        held.start_workers()
        seconds_workers = {role: second(held, role) for role in KILLED}
        publish(held.settings, order(practices))
        assert held.drain(600, print), "not drained"
        started_with = counted(held.settings)
        print(f"{options.rows} readings, {options.lines} lines; {started_with} units counted")
        found = []
        for number in range(options.kills):
            found.append(recover(held, practices, number))
            print(f"killed {' and '.join(KILLED)}: live accruals after {found[-1]:.1f} s")
            # In turns the one or the other of the two is killed, so that each time both have partitions.
            for role in KILLED:
                killed, held.workers[role] = held.workers[role], seconds_workers[role]
                killed.terminate()
                seconds_workers[role] = second(held, role)
            time.sleep(2 * options.session)
            assert held.drain(600, print), "not drained"
        for worker in seconds_workers.values():
            worker.terminate()
    result = {
        "readings": options.rows,
        "lines": options.lines,
        "partitions": PARTITIONS,
        "session_timeout_seconds": options.session,
        "seconds_to_live_accruals": [round(each, 1) for each in found],
    }
    write("recovery", log, result)
    print(json.dumps(result))
    sys.exit(max(found) > WITHIN_SECONDS)


def fill(settings: Settings, practices: list[str], rows: int) -> None:
    """Readings of the last year, as log generation 1 would have left them."""
    ledger, chance = Ledger(ClickHouse(settings)), random.Random(1)
    today = datetime.now(UTC).replace(hour=10, minute=0, second=0, microsecond=0)
    for first in range(0, rows, 100_000):
        numbers = range(first, min(first + 100_000, rows))
        at = [today - timedelta(days=chance.randrange(1, 300)) for _ in numbers]
        frame = pl.DataFrame(
            {
                "ods_code": chance.choices(practices, k=len(numbers)),
                "id": [f"filled-{number}" for number in numbers],
                "item_id": chance.choices(ITEMS, k=len(numbers)),
                "occurred_at": at,
                "day": [each.date() for each in at],
                "offset": list(numbers),
            }
        ).with_columns(
            supplier_id=pl.lit(SUPPLIER), revision=0, generation=1, topic=pl.lit("usage"), partition=0, index=0,
            broker_timestamp_ms=0, accepted_partition=0, accepted_offset=pl.col("offset"), quantity_micros=1_000_000,
        )  # fmt: skip
        ledger.insert_usage(frame.select(USAGE_SCHEMA.names).to_arrow())


def order(practices: list[str]) -> list[dict[str, Any]]:
    """One order of every item at every practice, live for a year."""
    price = {"type": "flat", "calculation": "cumulative", "provisioning": "on_demand", "unit": "unit"}
    price |= {"time_unit": "none", "day_count": "month", "tiers": [{"from": "1", "price": "0.0134"}]}
    funding = [{"payer": "@ordering_party", "take": "rest"}]
    first = str((datetime.now(UTC) - timedelta(days=330)).date())
    services = [(item, practice) for practice in practices for item in ITEMS]
    lines = [
        {"item_id": item, "ods_code": practice, "quantity": "1", "price": price, "funding": funding}
        for item, practice in services
    ]
    header = {"order_id": "C010001-01", "ordering_party": "QOP", "supplier_id": SUPPLIER, "framework": "GPITF"}
    header |= {"commencement": first, "vat_rate": "20", "term_months": 36}
    said: list[dict[str, Any]] = [{"OrderPlaced": header | {"lines": lines}}]
    for item, practice in services:
        body = {"item_id": item, "ods_code": practice, "milestone": "M1", "date": first}
        said.append({"MilestoneReached": body})
    return [
        {
            "topic": "contract-changes",
            "value": {"id": f"c{n}", "order_number": "C010001", "recorded_at": f"{first}T09:00:00Z", "change": change},
        }
        for n, change in enumerate(said)
    ]


def recover(held: Installation, practices: list[str], number: int) -> float:
    """Kills a worker of each role; returns the seconds until every reading since then has accrued."""
    before = counted(held.settings)
    chosen = {partition_for(each, PARTITIONS): each for each in practices}
    items = {partition_for(each, PARTITIONS): each for each in ITEMS}
    yesterday = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y-%m-%dT10:00:00Z")
    started = time.monotonic()
    for role in KILLED:
        held.workers[role].kill()
    pairs = [(practice, item) for practice in chosen.values() for item in items.values()]
    for place, (practice, item) in enumerate(pairs):
        value = {"id": f"probe-{number}-{place}", "supplier_id": SUPPLIER, "ods_code": practice, "item_id": item}
        value |= {"quantity": "1", "occurred_at": yesterday}
        publish(held.settings, [{"topic": "usage", "value": value}])
    while counted(held.settings) < before + len(pairs):
        assert time.monotonic() < started + 300, "no recovery within five minutes"
        time.sleep(0.1)
    return time.monotonic() - started


def counted(settings: Settings) -> int:
    """The units of usage that all accruals count."""
    return int(ClickHouse(settings).query("SELECT sum(quantity_micros) FROM accruals FINAL")[0][0]) // 1_000_000


def publish(settings: Settings, lines: list[dict[str, Any]]) -> None:
    """Sends interchange lines."""
    publisher = Publisher(settings)
    for line in lines:
        publisher.send_record(line["topic"], line["value"])
    publisher.flush()


def second(held: Installation, role: str) -> Process:
    """One more worker of a role."""
    environment = replace(held.settings, worker_port=free_port()).environment()
    command = [sys.executable, "-m", "tribill", "worker", role]
    return Process(f"worker-{role}-second", command, held.directory, environment=environment)


if __name__ == "__main__":
    main()
