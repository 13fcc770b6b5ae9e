"""Imports the order feed of the Buying Catalogue: the CSV that finance receives for every completed order."""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tribill.importers.changes import contract_change
from tribill.importers.row import UK_DATE, Problem, Record, Row, Shape, plain_decimal
from tribill.importers.table import convert

MAX_ORDER_BYTES = 64 * 2**20
MAX_TIERS = 7
MAX_TERM_MONTHS = 600

_CALL_OFF, _PARTY, _COMMENCEMENT = (
    "Call Off Agreement ID",
    "Call Off Ordering Party ID",
    "Call Off Commencement Date",
)
_PRACTICE, _SUPPLIER, _ITEM, _ITEM_TYPE = "Service Recipient ID", "Supplier ID", "Product ID", "Product Type"
_QUANTITY, _UNIT, _PRICE, _FUNDING = "Quantity Ordered", "Unit of Order", "Price", "Funding Type"
_UNIT_TIME, _ORDER_TYPE = "Unit Time", "Order Type"
_DELIVERY, _M1, _M2 = "M1 planned (Delivery Date)", "Actual M1 date", "Buyer verification date (M2)"
_CEASE, _FRAMEWORK, _TERM = "Cease Date", "Framework", "Contract Length (Months)"
_PRICING, _TIERS = "Pricing Type", "Tiered Array"

_COMMON = (
    *(_CALL_OFF, _PARTY, _COMMENCEMENT, _PRACTICE, _SUPPLIER, _ITEM, _ITEM_TYPE),
    *(_QUANTITY, _UNIT, _PRICE, _FUNDING, _DELIVERY, _M1, _M2),
)
_LATER = (_CEASE, _FRAMEWORK, _TERM, _PRICING, _TIERS)
FULL = Shape("a Full order file", (*_COMMON, _UNIT_TIME, _ORDER_TYPE), _LATER)
PATIENTS = Shape("a Patients order file", _COMMON, (*_LATER, _ORDER_TYPE))

_CALL_OFF_ID = re.compile(r"C\d{6}-\d{2}", re.ASCII)
_SUPPLIER_ID = re.compile(r"\d{5}", re.ASCII)
_ITEM_ID = re.compile(r"\d{5}-[A-Z0-9][A-Z0-9-]{0,19}", re.ASCII)
_TIER = re.compile(r"\[ *([1-9]\d{0,11}) *: *([^][ ]+) *\]", re.ASCII)

_ITEM_TYPES = {
    "catalogue solution": "solution",
    "additional service": "additional_service",
    "associated service": "associated_service",
}
_PROVISIONING = {"1": "patient", "2": "declarative", "3": "on_demand"}
_PER_PATIENT = {"": "patient", "1": "patient"}
_TIME_UNITS = {"per month": "month", "per year": "year", "": "none"}
_CALCULATIONS = {
    "tiered cumulative": "cumulative",
    "tiered volume": "volume",
    "tiered singlefixed": "single_fixed",
}
_PRICING_TYPES = {"": "flat", "flat": "flat", **_CALCULATIONS}

Funding = Sequence[Mapping[str, Any]]
_CENTRAL: Funding = (
    {"payer": "NHSE", "take": "allocation"},
    {"payer": "@ordering_party", "take": "rest"},
)
_LOCAL: Funding = ({"payer": "@ordering_party", "take": "rest"},)
FUNDING_TYPES: Mapping[str, Funding] = MappingProxyType(
    {
        "Central": _CENTRAL,
        "Central funding": _CENTRAL,
        "GPIT funding": _CENTRAL,
        "PCARP funding": _CENTRAL,
        "Local funding": _LOCAL,
        "None specified": _LOCAL,
    }
)
"""Policy: central funding draws on the ordering party's allocation, the excess is the party's own."""


def import_orders(
    path: Path,
    *,
    recorded_at: datetime,
    practices: Set[str] | None = None,
    max_bytes: int = MAX_ORDER_BYTES,
    vat_rate: Decimal = Decimal("0.2"),
    framework: str = "NHSDGP001",
    term_months: int = 36,
    funding_types: Mapping[str, Funding] = FUNDING_TYPES,
    catalogue: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Iterator[Record | Problem]:
    """Yield an OrderPlaced for each call-off, then what its rows say of milestones and cessation.

    Both generations of `{CallOffId}_{OrderingPartyODS}_Full.csv` and `_Patients.csv` are read, columns by
    name. A file is Patients if its name says so and its columns do not make it Full: its items are per
    patient and year. `framework` (by default GP IT Futures) and `term_months` stand in where the file has
    none; `vat_rate` is never in it. Orders come in the order of their revisions and lines sorted by item and
    practice, however the file is sorted; so the memory follows the size of the file, which is why its limit
    is lower than others'.

    Policies:
    - Funding Type is looked up in `funding_types`, whatever its case; a type not in it refuses the row.
    - An associated service has no time unit, and neither has a price on demand. Otherwise an empty Unit Time
      is none too, but a solution or additional service priced per patient is by definition per year.
    - A tiered price whose tiers the export has lost (volume, single-fixed) is looked up in `catalogue`, item
      id to price as in an order, which must be tiered with the same calculation, and begin with the row's
      Price: if that differs, the agreed tiers are not the catalogue's, and nobody can know them.
    - Cease Date is the first day no longer live. "Forecast Cease Date" is a forecast, so it is not read.
    - Rows of one call-off agree on its header; of those that do not, the first stands. A line that repeats
      another of the order, or of a lower revision in the file, is refused.

    A row that is refused is missing from its order, and a placed order is not placed again: mend the file
    before the records go into the log. Ids are `order-<call-off>` and
    `<kind>-<call-off>-<item>-<practice>-<digest of the file>`, so the same file again is a duplicate, and
    another file may say a date anew.
    """
    funding_of = {name.casefold(): funding for name, funding in funding_types.items()}
    orders: dict[str, _Order] = {}

    def collect(row: Row) -> list[Record]:
        order_id = row.matching(_CALL_OFF, _CALL_OFF_ID, "is not a call-off id such as C010001-01")
        header = {
            _PARTY: row.ods_code(_PARTY),
            _SUPPLIER: row.matching(_SUPPLIER, _SUPPLIER_ID, "is not a supplier's five digits"),
            _FRAMEWORK: row.text(_FRAMEWORK) or framework,
            _COMMENCEMENT: row.day(_COMMENCEMENT, UK_DATE),
            _TERM: row.integer(_TERM, 1, MAX_TERM_MONTHS) if row.text(_TERM) else term_months,
        }
        line = _line(row, practices, funding_of, catalogue)
        order = orders.setdefault(order_id, _Order(header))
        order.add(row, header, line)
        return []

    shapes = (FULL, PATIENTS) if "_patients" in path.stem.lower() else (FULL,)
    yield from convert(path, shapes, max_bytes, collect)

    lines: dict[tuple[str, str, str], int] = {}
    for order_id, order in sorted(orders.items()):
        number = order_id.partition("-")[0]
        kept = []
        for line in sorted(order.lines.values(), key=lambda each: (each.item_id, each.ods_code)):
            first = lines.setdefault((number, line.item_id, line.ods_code), line.place)
            if first == line.place:
                kept.append(line)
            else:
                reason = f"repeats line {first}, of a lower revision"
                yield Problem(str(path), line.place, _ITEM, line.item_id, reason)
        if not kept:
            continue
        placed = {
            "order_id": order_id,
            "ordering_party": order.header[_PARTY],
            "supplier_id": order.header[_SUPPLIER],
            "framework": order.header[_FRAMEWORK],
            "commencement": order.header[_COMMENCEMENT],
            "term_months": order.header[_TERM],
            "vat_rate": f"{vat_rate.normalize():f}",
            "lines": [line.placed for line in kept],
        }
        yield contract_change(f"order-{order_id}", number, recorded_at, "OrderPlaced", placed)
        for line in kept:
            line_key = {"item_id": line.item_id, "ods_code": line.ods_code}
            for name, kind, said in line.facts:
                change_id = f"{name}-{order_id}-{line.item_id}-{line.ods_code}-{line.digest}"
                yield contract_change(change_id, number, recorded_at, kind, line_key | said)


@dataclass(frozen=True, slots=True)
class _Line:
    place: int
    digest: str
    item_id: str
    ods_code: str
    placed: dict[str, Any]
    facts: list[tuple[str, str, dict[str, Any]]]


@dataclass(slots=True)
class _Order:
    header: dict[str, Any]
    lines: dict[tuple[str, str], _Line] = field(default_factory=dict)

    def add(self, row: Row, header: dict[str, Any], line: _Line) -> None:
        for column, value in self.header.items():
            if header[column] != value:
                raise row.refuse(column, f"is not {value}, which the order's first row says")
        earlier = self.lines.get((line.item_id, line.ods_code))
        if earlier:
            raise row.refuse(_ITEM, f"repeats line {earlier.place}: order, item and practice are the same")
        self.lines[line.item_id, line.ods_code] = line


def _line(
    row: Row,
    practices: Set[str] | None,
    funding_of: Mapping[str, Funding],
    catalogue: Mapping[str, Mapping[str, Any]],
) -> _Line:
    item_id = row.matching(_ITEM, _ITEM_ID, "is not a catalogue item id such as 10000-001A001")
    ods_code = row.ods_code(_PRACTICE, practices)
    funding = funding_of.get(row.text(_FUNDING).casefold())
    if funding is None:
        raise row.refuse(_FUNDING, "is not in the table of funding types")
    delivery = row.optional_day(_DELIVERY, UK_DATE)
    placed = {
        "item_id": item_id,
        "ods_code": ods_code,
        "quantity": row.decimal(_QUANTITY),
        "price": _price(row, item_id, catalogue),
        "funding": [dict(step) for step in funding],
    }
    if delivery:
        placed["delivery_date"] = delivery.isoformat()
    facts: list[tuple[str, str, dict[str, Any]]] = []
    for milestone, column in (("M1", _M1), ("M2", _M2)):
        if reached := row.optional_day(column, UK_DATE):
            facts.append((milestone.lower(), "MilestoneReached", {"milestone": milestone, "date": reached}))
    if ceased := row.optional_day(_CEASE, UK_DATE):
        facts.append(("ceased", "LineCeased", {"date": ceased}))
    return _Line(row.line, row.digest, item_id, ods_code, placed, facts)


def _price(row: Row, item_id: str, catalogue: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    provisioning = row.one_of(_ORDER_TYPE, _PER_PATIENT if row.shape is PATIENTS else _PROVISIONING)
    pricing = row.one_of(_PRICING, _PRICING_TYPES)
    if row.text(_TIERS):
        if pricing not in ("flat", "cumulative") or row.text(_PRICING).casefold() == "flat":
            raise row.refuse(_PRICING, "has a Tiered Array, which only a cumulative price may have")
        pricing = "cumulative"
        tiers = _tiers(row)
    elif pricing == "flat":
        tiers = [{"from": "1", "price": row.decimal(_PRICE)}]
    else:
        tiers = _lost_tiers(row, item_id, pricing, catalogue)
    return {
        "type": "flat" if pricing == "flat" else "tiered",
        "calculation": "cumulative" if pricing == "flat" else pricing,
        "provisioning": provisioning,
        "unit": row.required(_UNIT),
        "time_unit": _time_unit(row, provisioning),
        "day_count": "month",
        "tiers": tiers,
    }


def _time_unit(row: Row, provisioning: str) -> str:
    if row.one_of(_ITEM_TYPE, _ITEM_TYPES) == "associated_service":
        return "none"
    time_unit = "none" if row.shape is PATIENTS else row.one_of(_UNIT_TIME, _TIME_UNITS)
    if provisioning == "on_demand" and time_unit != "none":
        raise row.refuse(_UNIT_TIME, "is a unit of time for a price on demand, which has none")
    return "year" if provisioning == "patient" and time_unit == "none" else time_unit


def _tiers(row: Row) -> list[dict[str, str]]:
    """The tiers of `[[1:5.00];[101:4.50]]`, each a lower bound and a price."""
    text = row.text(_TIERS)
    if not (text.startswith("[") and text.endswith("]")):
        raise row.refuse(_TIERS, "is not of the form [[1:5.00];[101:4.50]]")
    tiers: dict[int, str] = {}
    for part in text[1:-1].split(";"):
        match = _TIER.fullmatch(part.strip())
        if match is None:
            raise row.refuse(_TIERS, "is not of the form [[1:5.00];[101:4.50]]")
        if int(match[1]) in tiers:
            raise row.refuse(_TIERS, f"has two tiers from {match[1]}")
        try:
            tiers[int(match[1])] = plain_decimal(match[2])
        except ValueError as error:
            raise row.refuse(_TIERS, f"has a price that {error}") from None
    bounds = sorted(tiers)
    if bounds[0] != 1 or len(bounds) > MAX_TIERS:
        raise row.refuse(_TIERS, f"must begin with a tier from 1 and have at most {MAX_TIERS}")
    last_units = [str(bound - 1) for bound in bounds[1:]]
    closed = [
        {"from": str(bound), "to": to, "price": tiers[bound]}
        for bound, to in zip(bounds, last_units, strict=False)
    ]
    return [*closed, {"from": str(bounds[-1]), "price": tiers[bounds[-1]]}]


def _lost_tiers(
    row: Row, item_id: str, calculation: str, catalogue: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, str]]:
    """The catalogue's tiers for a row that was exported without."""
    price = catalogue.get(item_id)
    if price is None or price["type"] != "tiered" or price["calculation"] != calculation:
        lacking = f"the catalogue has no {calculation} tiers of {item_id}"
        raise row.refuse(_PRICING, f"was exported without its tiers, and {lacking}")
    tiers = [dict(tier) for tier in price["tiers"]]
    if row.text(_PRICE) and Decimal(row.decimal(_PRICE)) != Decimal(tiers[0]["price"]):
        listed = tiers[0]["price"]
        raise row.refuse(_PRICE, f"is not the catalogue's {listed}, so the agreed tiers are unknown")
    return tiers
