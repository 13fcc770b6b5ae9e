"""Runs interchange lines through `rating` alone, without a broker or a database.

What the agents do in a run, in one process and in memory: for comparing `rating` with the oracle
thousands of times a minute.  The end-to-end test shows that the agents come to the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from agents.intake import check
from rating.admission import CodeLog, OrderLog
from rating.book import Book, Order, Reference
from rating.calendar import london_day, month_start, parse_month
from rating.close import ChargeKey, ChargeRow, by_line, csv_rows, derive, invoice
from rating.records import Refused
from streams.codec import from_interchange


class Replay:
    """The state of a run: logs by order and code, usage, and what was invoiced."""

    def __init__(self, arrival: datetime) -> None:
        self.arrival = arrival
        self.orders: dict[str, OrderLog] = {}
        self.codes: dict[str, CodeLog] = {}
        self.reference_changes: list[Any] = []
        self.usage: dict[tuple[str, str, str], dict[int, tuple[str, int, datetime]]] = {}
        self.invoiced: dict[ChargeKey, int] = {}
        self.closed: list[int] = []
        self.refused: list[tuple[int, str]] = []
        self.closes: list[tuple[str, list[ChargeRow], list[ChargeRow]]] = []

    def say(self, index: int, line: dict[str, Any]) -> None:
        """One interchange line."""
        try:
            if "close" in line:
                self.close(line["close"])
            elif line["topic"].startswith("usage"):
                self._usage(index, line)
            elif line["topic"] == "contract-changes":
                value = line["value"]
                self.orders.setdefault(value.get("order_number"), OrderLog(value.get("order_number"))).admit(value)
            elif line["topic"] == "reference-changes":
                value = line["value"]
                change = self.codes.setdefault(value.get("code"), CodeLog(value.get("code"))).admit(value)
                if change is not None:
                    self.reference_changes.append(change)
        except Refused as error:
            self.refused.append((index, str(error)))

    def _usage(self, index: int, line: dict[str, Any]) -> None:
        _, _, speaker = line["topic"].partition(".")
        value = line["value"]
        readings = [value]
        if "UsageBatch" in value:
            head = {name: value["UsageBatch"].get(name) for name in ("supplier_id", "ods_code")}
            readings = [{**each, **head} for each in value["UsageBatch"]["usages"]]
        for reading in readings:
            try:
                usage = from_interchange("Usage", reading)
                quantity = check(usage, usage["supplier_id"], usage["ods_code"], speaker or None, self.arrival)
                content = (usage["item_id"], quantity, usage["occurred_at"])
                revisions = self.usage.setdefault((usage["supplier_id"], usage["ods_code"], usage["id"]), {})
                if revisions.setdefault(usage["revision"], content) != content:
                    raise Refused("id", "conflict")
            except Refused as error:
                self.refused.append((index, str(error)))

    def book(self) -> Book:
        """What stands now."""
        totals: dict[tuple[str, str], dict[int, int]] = {}
        for (_, ods_code, _), revisions in self.usage.items():
            item_id, quantity, at = revisions[max(revisions)]
            days = totals.setdefault((item_id, ods_code), {})
            days[london_day(at)] = days.get(london_day(at), 0) + quantity
        orders = [Order.fold(number, log.accepted) for number, log in self.orders.items()]
        return Book(orders, Reference.fold(self.reference_changes), totals)

    def close(self, text: str) -> None:
        """Closes a period."""
        period = parse_month(text)
        if period in self.closed:
            return
        derived = derive(self.book(), period)
        rows, held = invoice(derived, by_line(self.invoiced), period)
        for key, pence in rows.items():
            self.invoiced[key] = self.invoiced.get(key, 0) + pence
        self.closed.append(period)
        self.closes.append((text, csv_rows(rows, period), csv_rows(held, period)))


def replay(lines: Iterable[dict[str, Any]], closes: Sequence[str] = (), arrival: datetime | None = None) -> Replay:
    """Runs the lines, then the closes."""
    lines = [*lines, *({"close": each} for each in closes)]
    last = max((parse_month(line["close"]) for line in lines if "close" in line), default=None)
    if arrival is None:
        arrival = datetime.now(UTC)
        if last is not None:
            arrival = max(arrival, month_start(last + 1))
    run = Replay(arrival)
    for index, line in enumerate(lines):
        run.say(index, line)
    return run
