"""What is refused when a change is read, against what stands before it in the log (RULES section 1).

Decided once: a later retraction neither revives a refused change nor refuses an accepted one.
"""

from __future__ import annotations

from typing import Any

from rating import records as said
from rating.amounts import MICROS, micros_text
from rating.book import Order, standing
from rating.calendar import first_day, month_of
from rating.records import (
    ContractChange,
    ReferenceChange,
    Refused,
    read_contract_change,
    read_reference_change,
)


class Conflict(Refused):
    """An id said before with other content; the first in the log stands."""

    def __init__(self, change_id: str) -> None:
        super().__init__("id", f"{change_id!r} was said before with other content; a correction needs a new id")


class OrderLog:
    """One order's log: which changes were accepted, which ids are taken, and the order they make."""

    def __init__(self, number: str) -> None:
        self.number = number
        self.accepted: list[ContractChange] = []
        self.order = Order(number)
        self._contents: dict[str, object] = {}
        self._refused: set[str] = set()

    def admit(self, value: Any) -> ContractChange | None:
        """Reads one change in log order.

        Returns the accepted change, or None for a duplicate of an accepted one.  Raises Refused
        with the rule and field, Conflict for a taken id; a refused change keeps its id.
        """
        change_id = value.get("id")
        try:
            change = read_contract_change(value)
        except Refused:
            self._take(change_id, value)
            raise
        if change_id in self._contents:
            if self._contents[change_id] != change.body:
                raise Conflict(change_id)
            if change_id in self._refused:
                raise Refused("id", f"{change_id!r} was refused before; a correction needs a new id")
            return None
        try:
            self._check(change)
        except Refused:
            self._take(change_id, change.body)
            raise
        self.restore(change)
        return change

    def restore(self, change: ContractChange) -> None:
        """Adds a change that was accepted before (state rebuilt from the ledger)."""
        self._contents[change.id] = change.body
        self.accepted.append(change)
        if isinstance(change.body, said.Retracted):
            self.order = Order.fold(self.number, self.accepted)
        else:
            self.order.apply(change.body)

    def restore_refused(self, value: Any) -> None:
        """Takes the id of a change that was refused before (state rebuilt from the ledger)."""
        try:
            content: object = read_contract_change(value).body
        except Refused:
            content = value
        self._take(value.get("id"), content)

    def _take(self, change_id: object, content: object) -> None:
        if isinstance(change_id, str) and change_id not in self._contents:
            self._contents[change_id] = content
            self._refused.add(change_id)

    def _check(self, change: ContractChange) -> None:
        body, order = change.body, self.order
        where = f"change.{type(body).__name__}"
        if isinstance(body, said.Retracted):
            named = next((each for each in self.accepted if each.id == body.change_id), None)
            if named is None:
                raise Refused(f"{where}.change_id", f"{body.change_id!r} is no earlier change of {self.number}")
            if isinstance(named.body, said.Retracted):
                self._check_revived(change, f"{where}.change_id")
            return
        if isinstance(body, said.OrderPlaced):
            _check_placing(order, body, where)
            return
        if not order.headers:
            raise Refused("order_number", f"{self.number} has not been placed")
        if isinstance(body, (said.OrderTerminated, said.PartyNovated)):
            return
        lines = order.named(body.item_id, body.ods_code)
        if not lines:
            practice = f" at {body.ods_code}" if body.ods_code else ""
            raise Refused(f"{where}.item_id", f"{self.number} has no line {body.item_id}{practice}")
        if isinstance(body, said.PriceAgreed):
            for line in lines:
                self._check_price(body, line.price.at(body.first), f"{where}.price", line.ods_code)

    def _check_revived(self, retraction: ContractChange, where: str) -> None:
        """A retraction that is retracted may bring a placing back: what then stands is consistent, too."""
        order = Order(self.number)
        for change in standing([*self.accepted, retraction]):
            if isinstance(change.body, said.OrderPlaced):
                try:
                    _check_placing(order, change.body, where)
                except Refused as error:
                    reason = f"brings back what has been placed anew; {change.id!r} would contradict: {error.reason}"
                    raise Refused(where, reason) from None
                order.apply(change.body)

    def _check_price(self, body: said.PriceAgreed, now: said.Price, where: str, ods_code: str) -> None:
        new = body.price
        for name in ("provisioning", "unit", "time_unit", "day_count"):
            if getattr(new, name) != getattr(now, name):
                raise Refused(
                    f"{where}.{name}",
                    f"is {getattr(new, name)!r}, but {getattr(now, name)!r} is in force at {ods_code}",
                )
        changes_kind = (new.type, new.calculation) != (now.type, now.calculation)
        if changes_kind and body.first != first_day(month_of(body.first)):
            raise Refused(f"{where}.type", "type and calculation change from the first of a month only")


def _check_placing(order: Order, body: said.OrderPlaced, where: str) -> None:
    """Raises Refused where a placing is not consistent with the order that stands before it."""
    if body.header.vat_rate_micros > MICROS:
        rate = micros_text(body.header.vat_rate_micros)
        raise Refused(f"{where}.vat_rate", f"is {rate}; a rate is a fraction such as 0.2, or 20 for per cent")
    if body.order_id in order.headers:
        raise Refused(f"{where}.order_id", f"{body.order_id} has been placed already")
    if order.headers and body.header != order.header:
        names = [name for name in said.Header.__slots__ if getattr(body.header, name) != getattr(order.header, name)]
        raise Refused(where, f"does not repeat the order's header as first written: {', '.join(names)}")
    seen = set(order.lines)
    for index, line in enumerate(body.lines):
        if (line.item_id, line.ods_code) in seen:
            raise Refused(f"{where}.lines[{index}]", f"repeats the line {line.item_id} at {line.ods_code}")
        seen.add((line.item_id, line.ods_code))


class CodeLog:
    """One code's reference log: which changes were accepted and which ids are taken."""

    def __init__(self, code: str) -> None:
        self.code = code
        self._accepted: dict[str, object] = {}
        self._refused: dict[str, object] = {}

    def admit(self, value: Any) -> ReferenceChange | None:
        """Reads one change in log order, as `OrderLog.admit`."""
        change_id = value.get("id")
        try:
            change = read_reference_change(value)
            if change_id in self._accepted:
                if self._accepted[change_id] != change.body:
                    raise Conflict(change_id)
                return None
            if change_id in self._refused:
                raise Refused("id", f"{change_id!r} was refused before; a correction needs a new id")
            body = change.body
            if isinstance(body, said.Retracted) and body.change_id not in self._accepted:
                raise Refused("change.Retracted.change_id", f"{body.change_id!r} is no earlier change of {self.code}")
        except Refused:
            if isinstance(change_id, str) and change_id not in self._accepted:
                self._refused[change_id] = value
            raise
        self.restore(change)
        return change

    def restore(self, change: ReferenceChange) -> None:
        """Adds a change that was accepted before."""
        self._accepted[change.id] = change.body

    def restore_refused(self, value: Any) -> None:
        """Takes the id of a change that was refused before."""
        if isinstance(value.get("id"), str):
            self._refused[value["id"]] = value
