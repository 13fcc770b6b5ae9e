"""Usage in suspense: what was used that no line takes, and why it waits (RULES 3.3)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from rating.book import Book, Order, Reference, Service
from rating.records import ContractChange, read_contract_change, read_reference_change
from sinks.clickhouse import ClickHouse
from sinks.ledger import Ledger, chunks


@dataclass(frozen=True, slots=True)
class Waiting:
    """Usage of an item at a practice that waits for one reason; days are ordinals, the last included."""

    ods_code: str
    item_id: str
    first_day: int
    last_day: int
    days: int
    quantity_micros: int
    why: str


def suspended(clickhouse: ClickHouse, ods_code: str = "", item_id: str = "") -> list[Waiting]:
    """What waits now, the largest quantity first; of one practice or item where named.

    From the ledger as it is; SQL finds the items at practices that have more usage than their
    accruals count, so only the orders that are about those are read.
    """
    usage = Ledger(clickhouse).totals_not_counted(ods_code, item_id)
    book = Book(
        _orders(clickhouse, {item for item, _ in usage}), _reference(clickhouse, {code for _, code in usage}), usage
    )
    found = [each for service in usage for each in _of_service(book, service)]
    return sorted(found, key=lambda each: (-each.quantity_micros, each.item_id, each.ods_code, each.first_day))


def _of_service(book: Book, service: Service) -> Iterable[Waiting]:
    days_of: dict[str, list[int]] = {}
    for day, quantity in sorted(book.usage[service].items()):
        if quantity and (why := book.why_untaken(service, day)):
            days_of.setdefault(why, []).append(day)
    item_id, ods_code = service
    for why, days in days_of.items():
        quantity = sum(book.usage[service][day] for day in days)
        yield Waiting(ods_code, item_id, days[0], days[-1], len(days), quantity, why)


def _orders(clickhouse: ClickHouse, items: set[str]) -> list[Order]:
    """The orders that were ever placed for one of these items."""
    changes: dict[str, dict[tuple[int, ...], ContractChange]] = {}
    for chunk in chunks((each,) for each in sorted(items)):
        rows = clickhouse.query(
            """
            SELECT order_number, generation, partition, offset, body FROM contract_changes FINAL
            WHERE outcome = 'accepted' AND order_number IN (
                SELECT order_number FROM contract_changes
                WHERE kind = 'OrderPlaced' AND arrayExists(item -> position(body, item) > 0, {items:Array(String)}))
            """,
            {"items": [item for (item,) in chunk]},
        )
        for number, generation, partition, offset, body in rows:
            place = (generation, partition, offset)
            changes.setdefault(number, {})[place] = read_contract_change(json.loads(body))
    return [Order.fold(number, [said[each] for each in sorted(said)]) for number, said in changes.items()]


def _reference(clickhouse: ClickHouse, practices: set[str]) -> Reference:
    """What was said of these practices: closures and mergers end a line's live days."""
    reference = Reference()
    for chunk in chunks((each,) for each in sorted(practices)):
        rows = clickhouse.query(
            "SELECT body FROM reference_changes FINAL WHERE outcome = 'accepted' AND code IN {codes:Array(String)}"
            " ORDER BY generation, partition, offset",
            {"codes": [code for (code,) in chunk]},
        )
        for (body,) in rows:
            reference.say(read_reference_change(json.loads(body)))
    return reference
