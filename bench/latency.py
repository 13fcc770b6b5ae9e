"""From an event to its accrual: how long until a reader of the page sees what a supplier has just sent.

`python -m bench.latency` places orders for the messages of every practice (of twenty products), then
sends `Usage` records at a steady rate through the whole path: intake, usage and charges agents, to the
row in `accruals`.
The practices of one order are watched: their rows are read every 200 ms, and since their quantities
only grow, each reading that has become visible is known.  Its latency is from just before it was
handed to the producer until the answer was there.  The first five seconds of a rate are not counted.
Prints p50, p99 and the longest; writes bench/results/latency.json.
"""

from __future__ import annotations

import argparse
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from bench.stack import Meter, Stack, broker, say, wait, write
from bench.workload import SUPPLIER, SUPPLIERS, TOPIC, Record, Usage, practice_codes, producer
from sinks.clickhouse import ClickHouse
from streams.topics import CONTRACT_CHANGES
from tribill.interchange import Publisher

ROLES = ("intake", "usage", "charges")
WARM_SECONDS = 5
POLL_SECONDS = 0.2
PRACTICES_AN_ORDER = 65
WATCHED = "C000000"
_SEEN = """
SELECT ods_code, toInt64(sum(quantity_micros) / 1000000) FROM accruals FINAL
WHERE order_number = {order:String} GROUP BY ods_code
"""


@dataclass(slots=True)
class Watched:
    """A practice's readings: when each was sent, and its quantity with all before it."""

    seen: int
    sent_at: list[float] = field(default_factory=list)
    up_to: list[int] = field(default_factory=list)
    visible: int = 0


def usage_of(practices: int, seed: int) -> Usage:
    """Messages of twenty products, each order's practices using one of them."""
    return Usage(items=20, practices=practices, seed=seed, area=PRACTICES_AN_ORDER)


def place_orders(stack: Stack, practices: int) -> None:
    """Orders messages for every practice, 65 an order, live for two months."""
    publisher = Publisher(stack.settings)
    began = (datetime.now(UTC) - timedelta(days=60)).date().isoformat()
    lines = usage_of(practices, 0).lines()
    price: dict[str, Any] = {"type": "flat", "provisioning": "on_demand", "unit": "fragment", "time_unit": "none"}
    price |= {"day_count": "month", "tiers": [{"from": "1", "price": "0.017"}]}
    funding = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]
    for start in range(0, practices, PRACTICES_AN_ORDER):
        number = f"C{start // PRACTICES_AN_ORDER:06d}"

        def tell(change_id: str, change: dict[str, Any], number: str = number) -> None:
            value = {"id": change_id, "order_number": number, "recorded_at": f"{began}T09:00:00Z", "change": change}
            publisher.send_record(CONTRACT_CHANGES, value)

        ordered = [code for code, _ in lines[start : start + PRACTICES_AN_ORDER]]
        item_id = lines[start][1]
        line = {"item_id": item_id, "price": price, "funding": funding}
        header = {"order_id": f"{number}-01", "ordering_party": "QHM", "supplier_id": SUPPLIER, "framework": "GPITF"}
        header |= {"commencement": began, "vat_rate": "0.2"}
        tell("placed", {"OrderPlaced": header | {"lines": [line | {"ods_code": code} for code in ordered]}})
        for code in ordered:
            reached = {"item_id": item_id, "ods_code": code, "milestone": "M1", "date": began}
            tell(f"live-{code}", {"MilestoneReached": reached})
    assert not publisher.flush(), "an order was refused"


def watch(
    clickhouse: ClickHouse, watched: dict[str, Watched], seen: list[tuple[float, float]], ended: threading.Event
) -> None:
    """Reads the watched rows until told to end; notes when each reading was sent and became visible."""
    while not ended.is_set():
        rows = clickhouse.query(_SEEN, {"order": WATCHED})
        now = time.monotonic()
        for code, quantity in rows:
            practice = watched[code]
            visible = bisect_right(practice.up_to, quantity)
            seen += [(sent, now) for sent in practice.sent_at[practice.visible : visible]]
            practice.visible = visible
        time.sleep(max(0.0, now + POLL_SECONDS - time.monotonic()))


def run(stack: Stack, rate: int, seconds: int, practices: int, pids: dict[str, list[int]]) -> dict[str, Any]:
    """Latencies at a rate."""
    records = usage_of(practices, rate).singles(rate * (seconds + WARM_SECONDS))
    clickhouse = ClickHouse(stack.settings)
    watched = {code: Watched(0) for code in practice_codes(PRACTICES_AN_ORDER)}
    watched |= {code: Watched(seen) for code, seen in clickhouse.query(_SEEN, {"order": WATCHED})}
    seen: list[tuple[float, float]] = []
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(clickhouse, watched, seen, ended))
    watcher.start()
    meter = Meter(pids)
    try:
        send_paced(stack, records, rate, watched)
        sending = time.monotonic() - meter.started
        say(f"  sent {len(records):,} in {sending:.1f} s")
        wait(lambda: all(each.visible == len(each.up_to) for each in watched.values()), 120, "the last accruals")
    finally:
        ended.set()
        watcher.join()
    took = meter.stop(len(records))
    counted = sorted(now - sent for sent, now in seen if sent >= meter.started + WARM_SECONDS)
    assert counted, "no reading was watched"
    shown = {
        "rate": rate,
        "rate_sent": round(len(records) / sending),
        "seconds": seconds,
        "readings_watched": len(counted),
        "p50_seconds": round(counted[len(counted) // 2], 3),
        "p99_seconds": round(counted[len(counted) * 99 // 100], 3),
        "max_seconds": round(counted[-1], 3),
        "drained_after_seconds": round(took.seconds - sending, 2),
        "cores": {name: round(used / took.seconds, 2) for name, used in took.cpu.items()},
        "peak_mib": took.peak_mib,
    }
    print(
        f"{rate:>7,}/s: p50 {shown['p50_seconds']:.3f} s, p99 {shown['p99_seconds']:.3f} s, max "
        f"{shown['max_seconds']:.3f} s of {len(counted):,} readings watched; cores {shown['cores']}",
        flush=True,
    )
    return shown


def send_paced(stack: Stack, records: list[Record], rate: int, watched: dict[str, Watched]) -> None:
    """Sends records at a steady rate."""
    outbox = producer(stack.settings, linger_ms=5)
    totals: dict[str, int] = defaultdict(int, {code: each.seen for code, each in watched.items()})
    started, sent = time.monotonic(), 0
    while sent < len(records):
        due = min(len(records), int((time.monotonic() - started) * rate))
        for key, value, units, _ in records[sent:due]:
            if practice := watched.get(key):
                totals[key] += units
                practice.sent_at.append(time.monotonic())
                practice.up_to.append(totals[key])
            outbox.produce(TOPIC, value, key)
        sent = due
        outbox.poll(0)
        time.sleep(0.002)
    assert outbox.flush(30) == 0, "the broker did not take all records"


def main() -> None:
    """Measures every rate."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="1000,10000", metavar="N,...", help="events/s (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=60, help="how long each (default %(default)s)")
    parser.add_argument("--practices", type=int, default=6_500, help="with a charge line each (default %(default)s)")
    options = parser.parse_args()
    with broker() as log, Stack(log, supplier_topics=SUPPLIERS) as stack:
        say(f"{log.name}; placing orders for {options.practices:,} practices ...")
        place_orders(stack, options.practices)
        workers = stack.start("contracts", "charges", "usage", "intake")
        pids = {each.role: [each.pid] for each in workers if each.role in ROLES}
        pids |= {name: [pid] for name, pid in stack.parts().items()}
        wait(lambda: stack.all_done(("contracts", "charges")), 300, "the orders to be known", every=1)
        found = [run(stack, int(rate), options.seconds, options.practices, pids) for rate in options.rates.split(",")]
    write("latency", log, {"charge_lines": options.practices, "rates": found})


if __name__ == "__main__":
    main()
