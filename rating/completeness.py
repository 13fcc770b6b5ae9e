"""How complete a supplier's usage of a month is: what it attests (`UsageComplete`) against what the ledger has.

Both count the readings that stand with a quantity above 0: a corrected one once, a cancelled one not at all.
Nothing here moves money: what is late comes as an adjustment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rating.amounts import micros_text
from rating.book import Book
from rating.calendar import first_day


class Reported(NamedTuple):
    """So many readings, and the sum of their quantities."""

    readings: int = 0
    quantity_micros: int = 0


@dataclass(frozen=True, slots=True)
class Completeness:
    """A supplier's usage of a month; `attested` is None where it has attested nothing."""

    supplier_id: str
    attested: Reported | None
    found: Reported

    @property
    def status(self) -> str:
        """`complete`, `short`, `over`, or `none`: not attested.  Readings decide before quantity."""
        if self.attested is None:
            return "none"
        if self.found == self.attested:
            return "complete"
        return "short" if self.found < self.attested else "over"

    @property
    def text(self) -> str:
        """In words.

        >>> Completeness("10030", Reported(5, 9_000_000), Reported(3, 7_500_000)).text
        'short by 2 readings and 1.5 units'
        >>> Completeness("10030", None, Reported(3, 7_500_000)).text
        'none attested; 3 readings of 7.5 units are here'
        """
        if self.attested is None:
            found = f"{self.found.readings} readings of {micros_text(self.found.quantity_micros)} units"
            return f"none attested; {found} are here"
        readings = self.found.readings - self.attested.readings
        quantity = self.found.quantity_micros - self.attested.quantity_micros
        parts = [f"{abs(readings)} reading{'s' if abs(readings) > 1 else ''}"] if readings else []
        if quantity:
            agrees = not readings or (quantity > 0) == (readings > 0)
            against = "" if agrees else "over by " if quantity > 0 else "short by "
            parts.append(f"{against}{micros_text(abs(quantity))} units")
        return f"{self.status} by {' and '.join(parts)}" if parts else self.status

    def as_json(self) -> dict[str, Any]:
        """As papers show it."""
        shown: dict[str, Any] = {"status": self.status, "said": self.text, "found": _shown(self.found)}
        return shown | ({"attested": _shown(self.attested)} if self.attested else {})


def _shown(reported: Reported) -> dict[str, Any]:
    return {"count": reported.readings, "quantity": micros_text(reported.quantity_micros)}


def completeness(
    attested: Mapping[str, Reported], found: Mapping[str, Reported], book: Book | None = None, month: int = 0
) -> dict[str, Completeness]:
    """By supplier: all that attested or reported, and of a book those that have a line on demand in the month."""
    suppliers = {*attested, *found, *(_metered(book, month) if book else ())}
    return {
        supplier_id: Completeness(supplier_id, attested.get(supplier_id), found.get(supplier_id, Reported()))
        for supplier_id in sorted(suppliers)
    }


def _metered(book: Book, month: int) -> set[str]:
    """The suppliers whose usage would be charged in a month: an item's id begins with its supplier's five digits."""
    first, end = first_day(month), first_day(month + 1)
    found: set[str] = set()
    for order in book.orders.values():
        for (item_id, _), line in order.lines.items():
            if item_id[:5] not in found and line.placed.price.is_on_demand:
                start, after = line.live(book.reference)
                if start < min(after, end) and after > first:
                    found.add(item_id[:5])
    return found
