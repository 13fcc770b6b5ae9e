"""The usage that the benchmarks send: real practices, ids that are never the same twice, Avro as tribill writes it."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from confluent_kafka import Producer

from streams.codec import Codec
from streams.settings import Settings
from streams.topics import USAGE, client_settings
from tribill.data import practices

#: accuRx and Evergreen Life, both with items on demand; one sends readings singly, the other in batches.
SUPPLIER, BATCHING_SUPPLIER = "10030", "10035"
TOPIC, BATCHES_TOPIC = f"{USAGE}.{SUPPLIER}", f"{USAGE}.{BATCHING_SUPPLIER}"
SUPPLIERS = f"{SUPPLIER},{BATCHING_SUPPLIER}"
SEED = 2026

#: Key, value, units of quantity, and readings in it.
Record = tuple[str, bytes, int, int]
_QUANTITIES = [Decimal(each) for each in range(10)]


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent: readings, their quantity, and the records that carried them."""

    readings: int
    micros: int
    records: int


@dataclass(slots=True)
class Usage:
    """Readings of some charge lines: (practice, item) pairs in even shares, spread over the last `hours`.

    Every practice buys all items; or, if `area` is given, so many that follow each other buy one of them.
    """

    supplier: str = SUPPLIER
    items: int = 3
    practices: int = 6_500
    seed: int = SEED
    hours: int = 6
    days_ago: int = 0
    area: int = 0

    def lines(self) -> list[tuple[str, str]]:
        """The charge lines, (practice, item)."""
        codes = practice_codes(self.practices)
        items = [f"{self.supplier}-S-{number:03d}" for number in range(1, self.items + 1)]
        if self.area:
            return [(code, items[number // self.area % self.items]) for number, code in enumerate(codes)]
        return [(code, item_id) for item_id in items for code in codes]

    def readings(self, count: int) -> Iterator[tuple[str, dict[str, Any], int]]:
        """So many readings: the practice, the reading without practice and supplier, and its quantity in units."""
        chance = random.Random(self.seed)
        lines = self.lines()
        newest = datetime.now(UTC).replace(microsecond=0) - timedelta(days=self.days_ago)
        for _ in range(count):
            code, item_id = lines[int(chance.random() * len(lines))]
            units = int(chance.random() * 9) + 1
            reading = {
                "id": str(uuid.UUID(int=chance.getrandbits(128))),
                "revision": 0,
                "item_id": item_id,
                "quantity": _QUANTITIES[units],
                "occurred_at": newest - timedelta(seconds=chance.random() * self.hours * 3600),
            }
            yield code, reading, units

    def singles(self, count: int) -> list[Record]:
        """So many `Usage` records."""
        encode = Codec(Settings()).encode
        return [
            (code, encode("Usage", reading | {"supplier_id": self.supplier, "ods_code": code}), units, 1)
            for code, reading, units in self.readings(count)
        ]

    def each_line_once(self) -> list[Record]:
        """`UsageBatch` records with a reading of every charge line, one record a practice."""
        encode = Codec(Settings()).encode
        by_practice: dict[str, list[str]] = {}
        for code, item_id in self.lines():
            by_practice.setdefault(code, []).append(item_id)
        found, readings = [], self.readings(self.items * self.practices)
        for code, items in by_practice.items():
            taken = [next(readings) for _ in items]
            usages = [reading | {"item_id": item} for (_, reading, _), item in zip(taken, items, strict=True)]
            value = encode("UsageBatch", {"supplier_id": self.supplier, "ods_code": code, "usages": usages})
            found.append((code, value, sum(units for _, _, units in taken), len(items)))
        return found

    def batches(self, count: int, size: int) -> Iterator[Record]:
        """`UsageBatch` records of `size` readings of one practice each."""
        encode = Codec(Settings()).encode
        codes = practice_codes(self.practices)
        chance = random.Random(self.seed)
        source = self.readings(count)
        left = count
        while left:
            readings = [next(source) for _ in range(min(size, left))]
            left -= len(readings)
            code = codes[int(chance.random() * len(codes))]
            usages = [reading for _, reading, _ in readings]
            value = encode("UsageBatch", {"supplier_id": self.supplier, "ods_code": code, "usages": usages})
            yield code, value, sum(units for _, _, units in readings), len(readings)


def practice_codes(count: int) -> list[str]:
    """So many practices of England, real ones first."""
    codes = [each.ods_code for each in practices()][:count]
    return codes + [f"X{number:05d}" for number in range(count - len(codes))]


def producer(settings: Settings, linger_ms: int = 20) -> Producer:
    """As a supplier would send: keyed, murmur2, lz4."""
    return Producer(
        client_settings(settings)
        | {
            "partitioner": "murmur2_random",
            "compression.type": "lz4",
            "linger.ms": str(linger_ms),
            "queue.buffering.max.messages": "1000000",
            "log_level": "0",
        }
    )


def send(settings: Settings, topic: str, records: Sequence[Record]) -> Sent:
    """Sends records; returns when the broker has them."""
    failed: list[str] = []
    outbox = producer(settings)

    def delivered(error: object, _message: object) -> None:
        if error is not None:
            failed.append(str(error))

    for key, value, _, _ in records:
        while True:
            try:
                outbox.produce(topic, value, key, on_delivery=delivered)
                break
            except BufferError:
                outbox.poll(0.1)
        outbox.poll(0)
    outbox.flush()
    assert not failed, failed[0]
    units, readings = sum(each[2] for each in records), sum(each[3] for each in records)
    return Sent(readings, units * 10**6, len(records))
