"""The oracle: RULES read aloud, one day at a time.

A slow and (we hope) obviously correct implementation of the rules of tribill, written from RULES.md alone.
It shares no code with the engine. Read it with RULES in hand: the parts below carry the numbers of its
sections, and every function quotes the rule that it implements.

    Part 0  values            decimals, dates, instants, months
    Part 1  events            what a record must look like, and what is refused (section 1)
    Part 2  timelines         what stands, what is painted, snapshots, single facts (section 2)
    Part 3  rating            live days to rounding, rules 1 to 10 (section 3)
    Part 4  the close         charges, adjustments, what is held (section 4)

`run` at the end puts them together. All money is an exact `Fraction` of pounds until rule 3.10 makes it
pence.
"""

from __future__ import annotations

import calendar
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

LONDON = ZoneInfo("Europe/London")
ZERO = Fraction(0)
Month = tuple[int, int]
Row = tuple[str, ...]
LineKey = tuple[str, str, str]
"""(order number, item, practice): section 1, "A line (order, item, practice)"."""


class CloseRefused(Exception):
    """A close that rule 4.3 does not allow, or whose period is no period."""


class Refusal(Exception):
    """A record that section 1 refuses; its text is the reason."""


# ----------------------------------------------------------------------------------------------------
# Part 0: values
# ----------------------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_INSTANT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]((?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9])"
    r"(?:\.([0-9]+))?([Zz]|[+-][0-9]{2}:[0-5][0-9])"
)
_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")


def to_text(value: Any, name: str) -> str:
    """Section 1: ids, codes and names are text, and not empty."""
    if not isinstance(value, str) or value == "":
        raise Refusal(f"{name}: a text is required")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(f"{name}: not a text in Unicode") from None
    return value


def to_words(value: Any, name: str) -> str:
    """Section 1: free text (framework, unit, reason); it may be empty but must be there."""
    if value == "":
        return ""
    return to_text(value, name)


def to_decimal(value: Any, name: str) -> Fraction:
    """Preamble: "quantities, prices, shares and tier bounds are decimal(18,6), not negative, never floats
    (trailing zeros do not count)"; interchange file: "decimals as strings"."""
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
        raise Refusal(f"{name}: not a decimal in a string")
    whole, _, part = value.lstrip("-").partition(".")
    if len(part.rstrip("0")) > 6 or len(whole.lstrip("0")) > 12:
        raise Refusal(f"{name}: does not fit decimal(18,6)")
    number = Fraction(value)
    if number < 0:
        raise Refusal(f"{name}: negative")
    return number


def to_integer(value: Any, name: str, least: int = 0) -> int:
    """Preamble: "`patients`, `term_months`, `revision`, `count`, `financial_year` are integers"."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refusal(f"{name}: not an integer")
    if not least <= value < 2**63:
        raise Refusal(f"{name}: below {least}, or no integer of 64 bits")
    return value


def to_date(value: Any, name: str) -> date:
    """Preamble: "dates are London civil dates"; interchange file: "dates ISO"."""
    if not isinstance(value, str) or not _DATE.fullmatch(value):
        raise Refusal(f"{name}: not an ISO date")
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise Refusal(f"{name}: no such day") from None


def to_instant(value: Any, name: str) -> datetime:
    """Preamble: "Instants are UTC microseconds"; interchange file: "instants RFC 3339"; refused: "an instant
    without an offset ..., never rounded"."""
    found = _INSTANT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise Refusal(f"{name}: not an RFC 3339 instant with an offset")
    day, clock, part, offset = found.groups()
    part = (part or "").rstrip("0")
    if len(part) > 6:
        raise Refusal(f"{name}: finer than a microsecond")
    offset = "+00:00" if offset in "Zz" else offset
    try:
        return datetime.fromisoformat(f"{day}T{clock}.{part:0<6}{offset}").astimezone(UTC)
    except (ValueError, OverflowError):
        raise Refusal(f"{name}: no such instant") from None


def to_one_of(value: Any, name: str, *allowed: str) -> str:
    """Section 1: the named alternatives of a field."""
    if not isinstance(value, str) or value not in allowed:
        raise Refusal(f"{name}: not one of {', '.join(allowed)}")
    return value


def to_month(value: Any) -> Month:
    """Section 4: a period is a calendar month, `2026-04`."""
    found = _MONTH.fullmatch(value) if isinstance(value, str) else None
    if found is None or not 1 <= int(found[1]) <= 9998:
        raise CloseRefused(f"not a period: {value!r}")
    return int(found[1]), int(found[2])


def month_of(day: date) -> Month:
    """The calendar month of a day."""
    return day.year, day.month


def month_text(month: Month) -> str:
    """A month as `for_period` writes it."""
    return f"{month[0]:04d}-{month[1]:02d}"


def next_month(month: Month) -> Month:
    """The month after."""
    return (month[0] + 1, 1) if month[1] == 12 else (month[0], month[1] + 1)


def months_between(first: Month, last: Month) -> Iterator[Month]:
    """All months from `first` to `last`, both included."""
    month = first
    while month <= last:
        yield month
        month = next_month(month)


def days_of(month: Month) -> list[date]:
    """All calendar days of a month."""
    return [date(month[0], month[1], n + 1) for n in range(calendar.monthrange(*month)[1])]


def add_months(day: date, months: int) -> date | None:
    """Rule 3.1: "commencement + `term_months` calendar months (clamped to the month's length)"; None is
    never."""
    index = day.year * 12 + day.month - 1 + months
    year, month = index // 12, index % 12 + 1
    if year > 9999:
        return None
    return date(year, month, min(day.day, calendar.monthrange(year, month)[1]))


def financial_year(month: Month) -> int:
    """Section 1: "`financial_year` is the calendar year of its 1 April"."""
    return month[0] if month[1] >= 4 else month[0] - 1


# ----------------------------------------------------------------------------------------------------
# Part 1: events
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tier:
    """One tier of a price."""

    start: Fraction
    end: Fraction | None
    price: Fraction


@dataclass(frozen=True)
class Price:
    """Section 1: `price = {type, calculation, provisioning, unit, time_unit, day_count, tiers, included?,
    ...}`."""

    type: str
    calculation: str | None
    provisioning: str
    unit: str
    time_unit: str
    day_count: str
    tiers: tuple[Tier, ...]
    included: Fraction | None
    minimum: Fraction | None
    maximum: Fraction | None

    @property
    def is_time(self) -> bool:
        """A price that rule 3.2 charges by the day."""
        return self.time_unit != "none"

    @property
    def is_on_demand(self) -> bool:
        """A price that rule 3.3 charges by usage."""
        return self.provisioning == "on_demand"

    @property
    def is_one_off(self) -> bool:
        """Rule 3.5: "time unit none, not on demand"."""
        return self.time_unit == "none" and self.provisioning != "on_demand"

    @property
    def way(self) -> str:
        """How it is calculated: "a flat price ...: its `calculation` is ignored"."""
        return "flat" if self.type == "flat" else str(self.calculation)


@dataclass(frozen=True)
class Entry:
    """One entry of a funding waterfall: who takes what."""

    payer: str
    take: str
    amount: Fraction = ZERO


Funding = tuple[Entry, ...]


@dataclass(frozen=True)
class OrderLine:
    """A line as its order placed it."""

    item_id: str
    ods_code: str
    quantity: Fraction
    delivery_date: date | None
    price: Price
    funding: Funding


@dataclass(frozen=True)
class Usage:
    """Section 1: one usage. `place` is its place in the log."""

    supplier_id: str
    ods_code: str
    id: str
    revision: int
    item_id: str
    quantity: Fraction
    occurred_at: datetime

    @property
    def identity(self) -> tuple[str, str, str]:
        """Section 1: "Identity is (supplier_id, ods_code, id)"."""
        return self.supplier_id, self.ods_code, self.id

    @property
    def day(self) -> date:
        """Rule 3.3: "the London day of `occurred_at`"."""
        return self.occurred_at.astimezone(LONDON).date()


@dataclass(frozen=True)
class Change:
    """A contract or reference change that was accepted, with its place in the log."""

    place: int
    id: str
    kind: str
    body: dict[str, Any]


def as_object(value: Any, name: str) -> dict[str, Any]:
    """Section 1: a record."""
    if not isinstance(value, dict):
        raise Refusal(f"{name}: not an object")
    return value


def as_list(value: Any, name: str) -> list[Any]:
    """Section 1: an array."""
    if not isinstance(value, list):
        raise Refusal(f"{name}: not a list")
    return value


def optional(value: Any, name: str, convert: Callable[[Any, str], Any]) -> Any:
    """Preamble: "a missing optional field and null are the same"."""
    return None if value is None else convert(value, name)


def read_tier(value: Any) -> Tier:
    """Section 1: `tiers[{from, to?, price}]`."""
    tier = as_object(value, "tier")
    return Tier(
        to_decimal(tier.get("from"), "tier from"),
        optional(tier.get("to"), "tier to", to_decimal),
        to_decimal(tier.get("price"), "tier price"),
    )


def read_price(value: Any) -> Price:
    """Section 1: the price. "Tiers: at most 7, the first from 1, each `to` = next `from` - 1, the last open.
    `time_unit` is none for on demand; `included`, `minimum`, `maximum` are for on demand only, and a minimum
    is not above its maximum; a flat price has one tier and its `calculation` is ignored"."""
    raw = as_object(value, "price")
    kind = to_one_of(raw.get("type"), "price type", "flat", "tiered")
    calculation = raw.get("calculation")
    if kind == "tiered" or calculation is not None:
        calculation = to_one_of(calculation, "calculation", "cumulative", "volume", "single_fixed")
    day_count = raw.get("day_count")
    price = Price(
        type=kind,
        calculation=calculation,
        provisioning=to_one_of(
            raw.get("provisioning"), "provisioning", "patient", "declarative", "on_demand"
        ),
        unit=to_words(raw.get("unit"), "unit"),
        time_unit=to_one_of(raw.get("time_unit"), "time unit", "month", "year", "none"),
        day_count="month"
        if day_count is None
        else to_one_of(day_count, "day count", "month", "actual/365", "actual/actual"),
        tiers=tuple(read_tier(tier) for tier in as_list(raw.get("tiers"), "tiers")),
        included=optional(raw.get("included"), "included", to_decimal),
        minimum=optional(raw.get("minimum"), "minimum", to_decimal),
        maximum=optional(raw.get("maximum"), "maximum", to_decimal),
    )
    if not 1 <= len(price.tiers) <= 7:
        raise Refusal("a price has one to seven tiers")
    if price.tiers[0].start != 1:
        raise Refusal("the first tier is from 1")
    for tier, following in pairwise(price.tiers):
        if tier.end is None or tier.end != following.start - 1 or following.start <= tier.start:
            raise Refusal("each tier ends where the next begins")
    if price.tiers[-1].end is not None:
        raise Refusal("the last tier is open")
    if price.type == "flat" and len(price.tiers) != 1:
        raise Refusal("a flat price has one tier")
    if price.is_on_demand and price.is_time:
        raise Refusal("the time unit is none for on demand")
    bounds = (price.included, price.minimum, price.maximum)
    if not price.is_on_demand and any(bound is not None for bound in bounds):
        raise Refusal("included, minimum and maximum are for on demand only")
    if price.minimum is not None and price.maximum is not None and price.minimum > price.maximum:
        raise Refusal("a minimum is not above its maximum")
    return price


def read_entry(value: Any) -> Entry:
    """Section 1: "take one of `{"share": "0.5"}`, `{"per_patient_year": "1.61"}`, `"allocation"`,
    `"rest"`"."""
    raw = as_object(value, "funding entry")
    payer = to_text(raw.get("payer"), "payer")
    take = raw.get("take")
    if isinstance(take, str):
        return Entry(payer, to_one_of(take, "take", "allocation", "rest"))
    told = {key: part for key, part in as_object(take, "take").items() if part is not None}
    if len(told) != 1:
        raise Refusal("a take is one thing")
    [(name, amount)] = told.items()
    return Entry(payer, to_one_of(name, "take", "share", "per_patient_year"), to_decimal(amount, "take"))


def read_funding(value: Any) -> Funding:
    """Section 1: "exactly one `rest`, last; shares sum to at most 1; a payer stands once ...; at most one
    `allocation`"."""
    funding = tuple(read_entry(entry) for entry in as_list(value, "funding"))
    takes = [entry.take for entry in funding]
    if takes.count("rest") != 1 or takes[-1] != "rest":
        raise Refusal("exactly one rest, last")
    if sum((entry.amount for entry in funding if entry.take == "share"), ZERO) > 1:
        raise Refusal("shares sum to at most 1")
    if len({entry.payer for entry in funding}) != len(funding):
        raise Refusal("a payer stands once")
    if takes.count("allocation") > 1:
        raise Refusal("at most one allocation")
    return funding


def read_order_line(value: Any) -> OrderLine:
    """Section 1: `lines[{item_id, ods_code, quantity?, delivery_date?, price, funding[]}]`. Reading: a
    missing quantity counts as 0."""
    raw = as_object(value, "line")
    quantity = optional(raw.get("quantity"), "quantity", to_decimal)
    return OrderLine(
        to_text(raw.get("item_id"), "item_id"),
        to_text(raw.get("ods_code"), "ods_code"),
        ZERO if quantity is None else quantity,
        optional(raw.get("delivery_date"), "delivery_date", to_date),
        read_price(raw.get("price")),
        read_funding(raw.get("funding")),
    )


def read_interval(raw: dict[str, Any]) -> dict[str, Any]:
    """Preamble: "intervals are half-open `[from, to)`, a missing `to` is open". Reading: one that is empty or
    runs backwards is refused."""
    start = to_date(raw.get("from"), "from")
    end = optional(raw.get("to"), "to", to_date)
    if end is not None and end <= start:
        raise Refusal("the interval is empty")
    return {"from": start, "to": end}


def read_contract_change(kind: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Section 1, "Contract changes": the fields of each of the ten changes."""
    body: dict[str, Any]
    if kind == "OrderPlaced":
        term = raw.get("term_months")
        return {
            "order_id": to_text(raw.get("order_id"), "order_id"),
            "ordering_party": to_text(raw.get("ordering_party"), "ordering_party"),
            "supplier_id": to_text(raw.get("supplier_id"), "supplier_id"),
            "framework": to_words(raw.get("framework"), "framework"),
            "commencement": to_date(raw.get("commencement"), "commencement"),
            "term_months": 36 if term is None else to_integer(term, "term_months", least=1),
            "vat_rate": to_decimal(raw.get("vat_rate"), "vat_rate"),
            "lines": tuple(read_order_line(line) for line in as_list(raw.get("lines"), "lines")),
        }
    if kind == "OrderTerminated":
        return {"date": to_date(raw.get("date"), "date")}
    if kind == "PartyNovated":
        return {
            "ordering_party": to_text(raw.get("ordering_party"), "ordering_party"),
            "from": to_date(raw.get("from"), "from"),
        }
    if kind == "Retracted":
        return {"change_id": to_text(raw.get("change_id"), "change_id")}
    body = {"item_id": to_text(raw.get("item_id"), "item_id")}
    if kind in ("MilestoneReached", "QuantityChanged", "LineCeased"):
        body["ods_code"] = to_text(raw.get("ods_code"), "ods_code")
    else:
        body["ods_code"] = optional(raw.get("ods_code"), "ods_code", to_text)
    if kind == "MilestoneReached":
        body["milestone"] = to_one_of(raw.get("milestone"), "milestone", "M1", "M2")
        body["date"] = to_date(raw.get("date"), "date")
    elif kind == "QuantityChanged":
        body["quantity"] = to_decimal(raw.get("quantity"), "quantity")
        body["from"] = to_date(raw.get("from"), "from")
    elif kind == "PriceAgreed":
        body["price"] = read_price(raw.get("price"))
        body["from"] = to_date(raw.get("from"), "from")
    elif kind == "FundingChanged":
        body["funding"] = read_funding(raw.get("funding"))
        body["from"] = to_date(raw.get("from"), "from")
    elif kind == "LineCeased":
        body["date"] = to_date(raw.get("date"), "date")
    elif kind == "ServiceCredit":
        body["amount"] = to_decimal(raw.get("amount"), "amount")
        if body["amount"] == 0:
            raise Refusal("a credit's amount is positive")
        body["date"] = to_date(raw.get("date"), "date")
        body["reason"] = to_words(raw.get("reason"), "reason")
    else:
        raise Refusal(f"unknown change {kind}")
    return body


def read_reference_change(kind: str, raw: dict[str, Any], code: str) -> dict[str, Any]:
    """Section 1, "Reference changes": the fields of each. "The code is the practice's, item's or ordering
    party's (`ENGLAND` for the national allocation) and must be its body's"."""
    body: dict[str, Any]
    if kind == "Retracted":
        return {"change_id": to_text(raw.get("change_id"), "change_id")}
    if kind == "Allocation":
        body = {"financial_year": to_integer(raw.get("financial_year"), "financial_year", least=1)}
        if raw.get("ordering_party") is not None:
            owner = to_text(raw.get("ordering_party"), "ordering_party")
            body |= {"ordering_party": owner, "amount": to_decimal(raw.get("amount"), "amount")}
            other = ["per_patient", "as_of"]
        else:
            owner = "ENGLAND"
            body |= {
                "per_patient": to_decimal(raw.get("per_patient"), "per_patient"),
                "as_of": to_date(raw.get("as_of"), "as_of"),
            }
            other = ["amount"]
        if any(raw.get(name) is not None for name in other):
            raise Refusal("an allocation is of a party or national, not both")
    elif kind == "ServiceAccepted":
        owner = to_text(raw.get("item_id"), "item_id")
        body = {
            "item_id": owner,
            "requirement": to_text(raw.get("requirement"), "requirement"),
            **read_interval(raw),
        }
    elif kind in ("ListSize", "Membership", "PracticeOpened", "PracticeClosed", "PracticeMerged"):
        owner = to_text(raw.get("ods_code"), "ods_code")
        body = {"ods_code": owner}
        if kind == "ListSize":
            body["as_of"] = to_date(raw.get("as_of"), "as_of")
            body["patients"] = to_integer(raw.get("patients"), "patients")
        elif kind == "Membership":
            body["kind"] = to_one_of(raw.get("kind"), "kind", "pcn", "commissioner")
            body["parent"] = to_text(raw.get("parent"), "parent")
            body |= read_interval(raw)
            if body["parent"] == owner:
                raise Refusal("nobody is its own parent")
        else:
            body["date"] = to_date(raw.get("date"), "date")
        if kind == "PracticeMerged":
            body["into"] = to_text(raw.get("into"), "into")
            if body["into"] == owner:
                raise Refusal("a practice does not merge into itself")
    else:
        raise Refusal(f"unknown change {kind}")
    if code != owner:
        raise Refusal("the code is not its body's")
    return body


def read_usage(raw: dict[str, Any], supplier: str, practice: str, topic: str, arrival: datetime) -> Usage:
    """Section 1, "Usage", the refusals: "an instant without an offset, a decimal that does not fit its type,
    a negative, NaN or overflowing quantity; `item_id` that does not start with the supplier's id; a supplier
    other than the topic's or the caller's; `occurred_at` before 2000 or more than a day ahead of its
    arrival"."""
    revision = raw.get("revision")
    usage = Usage(
        supplier_id=supplier,
        ods_code=practice,
        id=to_text(raw.get("id"), "id"),
        revision=0 if revision is None else to_integer(revision, "revision"),
        item_id=to_text(raw.get("item_id"), "item_id"),
        quantity=to_decimal(raw.get("quantity"), "quantity"),
        occurred_at=to_instant(raw.get("occurred_at"), "occurred_at"),
    )
    if topic not in ("usage", f"usage.{supplier}"):
        raise Refusal("a supplier other than the topic's")
    if not usage.item_id.startswith(supplier):
        raise Refusal("the item does not start with the supplier's id")
    if usage.occurred_at < datetime(2000, 1, 1, tzinfo=UTC):
        raise Refusal("occurred before 2000")
    if usage.occurred_at > arrival + timedelta(days=1):
        raise Refusal("occurred more than a day ahead of its arrival")
    return usage


@dataclass
class Log:
    """What was read and accepted so far, and what was refused."""

    arrival: datetime
    usages: dict[tuple[str, str, str], dict[int, Usage]] = field(default_factory=dict)
    orders: dict[str, list[Change]] = field(default_factory=dict)
    references: dict[str, list[Change]] = field(default_factory=dict)
    said: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    refused: list[tuple[int, str]] = field(default_factory=list)

    def read(self, place: int, line: Any) -> None:
        """Section 1: one line of an interchange file; what is refused is noted and changes nothing else."""
        try:
            line = as_object(line, "line")
            topic = to_text(line.get("topic"), "topic")
            value = as_object(line.get("value"), "value")
            if topic == "usage" or topic.startswith("usage."):
                self.read_usages(place, topic, value)
            elif topic == "contract-changes":
                self.read_change(place, value, "order_number", self.orders)
            elif topic == "reference-changes":
                self.read_change(place, value, "code", self.references)
            elif topic == "period-events":
                read_period_event(value)
            else:
                raise Refusal(f"unknown topic {topic}")
        except Refusal as refusal:
            self.refused.append((place, str(refusal)))

    def read_usages(self, place: int, topic: str, value: dict[str, Any]) -> None:
        """Section 1: "`UsageBatch` ... is the same many times, each usage accepted or refused by itself"."""
        if "UsageBatch" in value:
            header = as_object(value["UsageBatch"], "UsageBatch")
            parts = as_list(header.get("usages"), "usages")
        else:
            header, parts = value, [value]
        supplier = to_text(header.get("supplier_id"), "supplier_id")
        practice = to_text(header.get("ods_code"), "ods_code")
        for part in parts:
            try:
                usage = read_usage(as_object(part, "usage"), supplier, practice, topic, self.arrival)
                self.keep_usage(usage)
            except Refusal as refusal:
                self.refused.append((place, str(refusal)))

    def keep_usage(self, usage: Usage) -> None:
        """Section 1: "Same identity and revision, same content (compared as values): a duplicate, dropped.
        Other content: a conflict; the first in the log stands"."""
        revisions = self.usages.setdefault(usage.identity, {})
        if usage.revision not in revisions:
            revisions[usage.revision] = usage
        elif revisions[usage.revision] != usage:
            raise Refusal("a conflict: the same identity and revision with other content")

    def read_change(
        self, place: int, value: dict[str, Any], key_name: str, logs: dict[str, list[Change]]
    ) -> None:
        """Section 1: "Ids are unique within an order [a code]; a repeated id with the same content is a
        duplicate, with other content a conflict (the first stands)"; "A refused change keeps its id:
        redelivered it stays refused, its correction needs a new id". Reading: that holds for whatever could
        be read as far as its id."""
        key = to_text(value.get(key_name), key_name)
        change_id = to_text(value.get("id"), "id")
        problem: Refusal | None = None
        content: Any
        kind, body = "", {}
        try:
            recorded_at = to_instant(value.get("recorded_at"), "recorded_at")
            told = {k: v for k, v in as_object(value.get("change"), "change").items() if v is not None}
            if len(told) != 1:
                raise Refusal("a change is one change")
            [(kind, raw)] = told.items()
            raw = as_object(raw, kind)
            if key_name == "order_number":
                body = read_contract_change(kind, raw)
            else:
                body = read_reference_change(kind, raw, key)
            content = (recorded_at, kind, body)
        except Refusal as refusal:
            problem = refusal
            content = json.dumps(value, sort_keys=True, default=str)
        name = (key_name, key, change_id)
        if name in self.said:
            if self.said[name] != content:
                raise Refusal("a conflict: the id was used with other content")
            return
        self.said[name] = content
        if problem is not None:
            raise problem
        before = logs.setdefault(key, [])
        change = Change(place, change_id, kind, body)
        check_retraction(before, change)
        if key_name == "order_number":
            check_contract_change(key, before, change)
        before.append(change)


def read_period_event(value: dict[str, Any]) -> None:
    """Section 1, "Period events": they move no money; in an interchange file only `{"close": ...}` closes."""
    if len(value) != 1:
        raise Refusal("a period event is one event")
    [(kind, raw)] = value.items()
    to_one_of(kind, "period event", "UsageComplete", "CloseRequested", "CutFixed", "PeriodClosed")
    raw = as_object(raw, kind)
    try:
        to_month(raw.get("period"))
    except CloseRefused as refused:
        raise Refusal(str(refused)) from None
    if kind == "UsageComplete":
        to_text(raw.get("supplier_id"), "supplier_id")
        to_integer(raw.get("count"), "count")
        to_decimal(raw.get("quantity"), "quantity")


def check_retraction(before: list[Change], change: Change) -> None:
    """Rule 2.4: a retraction "names an earlier change of the same order or code, else it is refused".
    Reading: a refused change is no change that could be named."""
    if change.kind == "Retracted" and change.body["change_id"] not in {earlier.id for earlier in before}:
        raise Refusal("it retracts no earlier change")


HEADER = ("ordering_party", "supplier_id", "framework", "commencement", "term_months", "vat_rate")


def check_contract_change(order: str, before: list[Change], change: Change) -> None:
    """Section 1: "Inconsistent changes are refused when read, with the rule named: decided once, against what
    stands before in the log"."""
    stands = standing(before)
    orders = [earlier for earlier in stands if earlier.kind == "OrderPlaced"]
    if change.kind == "OrderPlaced":
        check_order(order, orders, change)
    elif change.kind == "Retracted":
        revived = [later for later in standing([*before, change]) if later.kind == "OrderPlaced"]
        for index, placed in enumerate(revived):
            check_order(order, revived[:index], placed, first_revision=False)
    elif not orders:
        raise Refusal("the order does not stand")
    elif change.kind not in ("OrderTerminated", "PartyNovated"):
        check_lines(stands, change)


def check_order(order: str, orders: list[Change], change: Change, *, first_revision: bool = True) -> None:
    """Section 1: "An order's higher revision only adds lines: it repeats the header of the first as written
    (also after a novation), and one that repeats a line is refused as a whole. `order_id` is the order number
    with its revision; each is placed once". Reading: a higher revision needs an order that it adds to."""
    body = change.body
    found = re.fullmatch(re.escape(order) + r"-([0-9]{2})", body["order_id"])
    if found is None or found[1] == "00":
        raise Refusal("order_id is not the order number with its revision")
    if not orders and found[1] != "01" and first_revision:
        raise Refusal("a higher revision of an order that does not stand")
    if any(earlier.body["order_id"] == body["order_id"] for earlier in orders):
        raise Refusal("a revision is placed once")
    if orders and any(body[name] != orders[0].body[name] for name in HEADER):
        raise Refusal("a revision repeats the header of the first")
    taken = {(line.item_id, line.ods_code) for earlier in orders for line in earlier.body["lines"]}
    for line in body["lines"]:
        if (line.item_id, line.ods_code) in taken:
            raise Refusal("a line is placed once")
        taken.add((line.item_id, line.ods_code))


def check_lines(stands: list[Change], change: Change) -> None:
    """Section 1: "A change that names no practice is a change of each of the item's lines that the order has
    at its place in the log". Reading: one that names a line (or an item) that the order does not have there
    is refused. "`PriceAgreed` may change type and calculation only from the first of a month, and
    provisioning, unit, time unit and day count not at all, compared with each line's price in force on
    `from`; one mismatch refuses the whole"."""
    concerned = [placed for placed in placed_lines(stands) if concerns(change, placed[1])]
    if not concerned:
        raise Refusal("the order has no such line")
    if change.kind != "PriceAgreed":
        return
    new: Price = change.body["price"]
    start: date = change.body["from"]
    for place, line in concerned:
        old: Price = in_force(painted(stands, place, line, "PriceAgreed"), start)
        for name in ("provisioning", "unit", "time_unit", "day_count"):
            if getattr(old, name) != getattr(new, name):
                raise Refusal(f"an agreed price does not change the {name}")
        if old.way != new.way and start.day != 1:
            raise Refusal("type and calculation change only from the first of a month")


# ----------------------------------------------------------------------------------------------------
# Part 2: timelines
# ----------------------------------------------------------------------------------------------------

Timeline = list[tuple[date | None, date | None, Any]]
"""What was painted, in the order of the log: (from, to, value)."""


def standing(changes: list[Change]) -> list[Change]:
    """Rule 2.4: "`Retracted` removes a change as if never said; ... a retraction can be retracted by a later
    one". A retraction only names what is before it, so from the last to the first each is decided when it is
    met."""
    gone: set[str] = set()
    for change in reversed(changes):
        if change.kind == "Retracted" and change.id not in gone:
            gone.add(change.body["change_id"])
    return [change for change in changes if change.id not in gone and change.kind != "Retracted"]


def placed_lines(stands: list[Change]) -> list[tuple[int, OrderLine]]:
    """Section 1: the lines of an order, all its revisions rolled up, each with the place of its placing."""
    return [
        (change.place, line)
        for change in stands
        if change.kind == "OrderPlaced"
        for line in change.body["lines"]
    ]


def concerns(change: Change, line: OrderLine) -> bool:
    """Section 1: whether a change of lines is about this one."""
    named = change.body["ods_code"]
    return bool(change.body["item_id"] == line.item_id and named in (None, line.ods_code))


PAINTS = {"QuantityChanged": "quantity", "PriceAgreed": "price", "FundingChanged": "funding"}


def painted(stands: list[Change], place: int, line: OrderLine, kind: str) -> Timeline:
    """Rule 2.1: "painted in log order: a later change overwrites from its `from` on ... They act on lines
    placed before them in the log"; section 1: "A line starts with its own price, quantity and funding"."""
    name = PAINTS[kind]
    timeline: Timeline = [(None, None, getattr(line, name))]
    for change in stands:
        if change.kind == kind and change.place > place and concerns(change, line):
            timeline.append((change.body["from"], None, change.body[name]))
    return timeline


def in_force(timeline: Timeline, day: date) -> Any:
    """Rule 2.1: what the day shows once all is painted over it: the last in the log that covers it."""
    for start, end, value in reversed(timeline):
        if (start is None or start <= day) and (end is None or day < end):
            return value
    return None


def last_fact(stands: list[Change], kind: str, fits: Callable[[dict[str, Any]], bool]) -> date | None:
    """Rule 2.3: "Single facts (milestones, cessation, termination, closure, merger): said again, the later
    replaces the earlier of the same kind about the same thing, whenever the line was placed"."""
    facts = [change.body["date"] for change in stands if change.kind == kind and fits(change.body)]
    return facts[-1] if facts else None


@dataclass
class Line:
    """A charge line as known at a cut: its timelines, its facts and its credits."""

    key: LineKey
    supplier: str
    quantities: Timeline
    prices: Timeline
    fundings: Timeline
    parties: Timeline
    m1: date | None
    m2: date | None
    end: date | None
    needs_m2: bool
    credits: list[tuple[date, Fraction]] = field(default_factory=list)

    def price(self, day: date) -> Price:
        """Rule 2.1: the price in force on a day."""
        return in_force(self.prices, day)  # type: ignore[no-any-return]

    def live(self, day: date) -> bool:
        """Rule 3.1: "from M1 until the earliest of cessation, termination, practice closure, merger, and
        commencement + `term_months` ...; each of these is the first day no longer live. No M1: never
        live"."""
        return self.m1 is not None and self.m1 <= day and (self.end is None or day < self.end)


@dataclass
class Known:
    """Section 2: "What was known at a close is the prefix of the log up to its cut": all that stands
    there."""

    references: dict[str, list[Change]]
    usages: list[Usage]
    lines: list[Line]
    lists: dict[str, list[tuple[date, int]]]

    def list_size(self, practice: str, day: date) -> int | None:
        """Rule 2.2: "on day d the one with the latest `as_of` <= d holds; of two with the same `as_of` the
        later in the log". None before the first."""
        best: tuple[date, int] | None = None
        for as_of, patients in self.lists.get(practice, []):
            if as_of <= day and (best is None or as_of >= best[0]):
                best = (as_of, patients)
        return None if best is None else best[1]

    def quantity(self, line: Line, day: date) -> Fraction:
        """Rule 3.2: "q is the list size on d (patient) or the declared quantity"; rule 2.2: "Before a
        practice's first one, the ordered quantity of a line priced per patient stands in for it"."""
        if line.price(day).provisioning == "patient":
            patients = self.list_size(line.key[2], day)
            if patients is not None:
                return Fraction(patients)
        return in_force(line.quantities, day)  # type: ignore[no-any-return]

    def list_for_cap(self, line: Line, day: date) -> Fraction:
        """Rule 3.9, `list(d)` of a cap; rule 2.2: without a list size the ordered quantity of a line priced
        per patient, "in a cap of another line: 0"."""
        patients = self.list_size(line.key[2], day)
        if patients is not None:
            return Fraction(patients)
        if line.price(day).provisioning == "patient":
            return in_force(line.quantities, day)  # type: ignore[no-any-return]
        return ZERO


def counting_usages(log: Log) -> list[Usage]:
    """Section 1: "Of one identity the highest revision counts, at a cut the highest before it. Quantity 0
    cancels"."""
    latest = [revisions[max(revisions)] for revisions in log.usages.values() if revisions]
    return [usage for usage in latest if usage.quantity > 0]


def line_end(
    stands: list[Change], references: dict[str, list[Change]], header: dict[str, Any], line: OrderLine
) -> date | None:
    """Rule 3.1: "the earliest of cessation, termination, practice closure, merger, and commencement +
    `term_months` calendar months"."""
    practice = references.get(line.ods_code, [])
    ends = [
        last_fact(stands, "LineCeased", lambda body: same_line(body, line)),
        last_fact(stands, "OrderTerminated", lambda body: True),
        last_fact(practice, "PracticeClosed", lambda body: True),
        last_fact(practice, "PracticeMerged", lambda body: True),
        add_months(header["commencement"], header["term_months"]),
    ]
    return min((end for end in ends if end is not None), default=None)


def same_line(body: dict[str, Any], line: OrderLine) -> bool:
    """Rule 2.3: whether a single fact is about this line."""
    return bool(body["item_id"] == line.item_id and body["ods_code"] == line.ods_code)


def milestone(stands: list[Change], line: OrderLine, name: str) -> date | None:
    """Rule 2.3: the date of M1 or M2 of a line, as said last."""
    return last_fact(
        stands, "MilestoneReached", lambda body: same_line(body, line) and body["milestone"] == name
    )


def order_lines(order: str, stands: list[Change], references: dict[str, list[Change]]) -> list[Line]:
    """Sections 1 and 2: the charge lines of an order as they stand."""
    orders = [change.body for change in stands if change.kind == "OrderPlaced"]
    if not orders:
        return []
    header = orders[0]
    parties: Timeline = [(None, None, header["ordering_party"])]
    for change in stands:
        if change.kind == "PartyNovated":
            # Rule 2.1: "`PartyNovated` acts on the whole order, whenever its lines were placed".
            parties.append((change.body["from"], None, change.body["ordering_party"]))
    lines = []
    for place, line in placed_lines(stands):
        lines.append(
            Line(
                key=(order, line.item_id, line.ods_code),
                supplier=header["supplier_id"],
                quantities=painted(stands, place, line, "QuantityChanged"),
                prices=painted(stands, place, line, "PriceAgreed"),
                fundings=painted(stands, place, line, "FundingChanged"),
                parties=parties,
                m1=milestone(stands, line, "M1"),
                m2=milestone(stands, line, "M2"),
                end=line_end(stands, references, header, line),
                needs_m2=not line.price.is_one_off,
            )
        )
    return lines


def what_is_known(log: Log) -> Known:
    """Section 2: all that stands at this place in the log."""
    references = {code: standing(changes) for code, changes in log.references.items()}
    orders = {order: standing(changes) for order, changes in log.orders.items()}
    known = Known(references, counting_usages(log), [], {})
    for code, changes in references.items():
        known.lists[code] = [(c.body["as_of"], c.body["patients"]) for c in changes if c.kind == "ListSize"]
    for order, stands in orders.items():
        lines = order_lines(order, stands, references)
        for change in stands:
            if change.kind == "ServiceCredit":
                give_credit(known, lines, change.body)
        known.lines += lines
    return known


# ----------------------------------------------------------------------------------------------------
# Part 3: rating
# ----------------------------------------------------------------------------------------------------


def tier_of(price: Price, total: Fraction) -> Tier:
    """Rule 3.4: "A tier holds the units above `from` - 1 up to and including the next `from` - 1"."""
    for tier in price.tiers:
        if tier.start - 1 < total and (tier.end is None or total <= tier.end):
            return tier
    raise AssertionError("tiers have no gaps and a total above 0")


def stretch_cost(price: Price, low: Fraction, high: Fraction) -> Fraction:
    """Rule 3.4, "cumulative: each unit at its tier's price": the cost of the units above `low` up to
    `high`."""
    cost = ZERO
    for tier in price.tiers:
        bottom = max(low, tier.start - 1)
        top = high if tier.end is None else min(high, tier.end)
        if top > bottom:
            cost += (top - bottom) * tier.price
    return cost


def tiered_cost(price: Price, total: Fraction) -> Fraction:
    """Rule 3.4: "A total of 0 costs nothing. Cumulative: each unit at its tier's price; volume: all units at
    the price of the tier that holds the total; single-fixed: that tier's price once"."""
    if total == 0:
        return ZERO
    if price.way == "flat":
        return price.tiers[0].price * total
    if price.way == "cumulative":
        return stretch_cost(price, ZERO, total)
    if price.way == "volume":
        return tier_of(price, total).price * total
    return tier_of(price, total).price


def shared_cost(price: Price, own: Fraction, total: Fraction) -> Fraction:
    """Rule 3.2: "the cost, by the line's own price, of the total quantity ..., times own quantity / total
    (exact)"; a flat price is price x quantity."""
    if own == 0:
        return ZERO
    if price.way == "flat":
        return price.tiers[0].price * own
    return tiered_cost(price, total) * own / total


def part_of_unit(price: Price, day: date) -> Fraction:
    """Rule 3.2: what a day is of the price's time unit. "`/ days in month`, a yearly price / 12 first (day
    count `month`); `actual/365`: yearly `p x q / 365`, `actual/actual`: / 366 in a leap year, a monthly price
    x 12 first"."""
    if price.day_count == "month":
        days = calendar.monthrange(day.year, day.month)[1]
        return Fraction(1, 12 * days) if price.time_unit == "year" else Fraction(1, days)
    leap = price.day_count == "actual/actual" and calendar.isleap(day.year)
    return Fraction(1 if price.time_unit == "year" else 12, 366 if leap else 365)


Charges = dict[LineKey, dict[date, Fraction]]
"""What each line costs on each day, exact."""


def time_charges(known: Known, lines: list[Line], days: list[date], charges: Charges) -> None:
    """Rule 3.2, for all the lines of one order and item: "each live day d: `p(d) x q(d) / days in month` ...
    Tiered: ... the total quantity of the order's lines for that item that are live on d with a time
    price"."""
    for day in days:
        counted = [
            (line, known.quantity(line, day)) for line in lines if line.live(day) and line.price(day).is_time
        ]
        total = sum((quantity for _, quantity in counted), ZERO)
        for line, quantity in counted:
            price = line.price(day)
            charges[line.key][day] += shared_cost(price, quantity, total) * part_of_unit(price, day)


def one_off_charges(known: Known, lines: list[Line], days: list[date], charges: Charges) -> None:
    """Rule 3.5: "One-off (time unit none, not on demand): price x quantity on the day of M1, if live; tiered
    over the order's lines for that item live that day at a one-off price, by quantity"."""
    for line in lines:
        day = line.m1
        if day is None or day not in days or not line.live(day) or not line.price(day).is_one_off:
            continue
        others = [other for other in lines if other.live(day) and other.price(day).is_one_off]
        total = sum((known.quantity(other, day) for other in others), ZERO)
        charges[line.key][day] += shared_cost(line.price(day), known.quantity(line, day), total)


Units = dict[tuple[LineKey, date], Fraction]


def takes_usage(line: Line, day: date) -> bool:
    """Rule 3.3: "the line is live that day at an on-demand price"."""
    return line.live(day) and line.price(day).is_on_demand


def assign_usage(known: Known) -> tuple[Units, dict[tuple[str, str, str, date], Fraction]]:
    """Rule 3.3: "Usage charges count usage on the London day of `occurred_at`, if the line is live that day
    at an on-demand price; other usage waits in suspense ... If several orders have such a line for the item
    and practice, the lowest order number takes it". Returns the units of each line and day, and the
    suspense."""
    taken: Units = {}
    suspense: dict[tuple[str, str, str, date], Fraction] = {}
    for usage in known.usages:
        day = usage.day
        takers = [
            line.key
            for line in known.lines
            if line.key[1:] == (usage.item_id, usage.ods_code) and takes_usage(line, day)
        ]
        if takers:
            line_day = (min(takers, key=as_bytes), day)
            taken[line_day] = taken.get(line_day, ZERO) + usage.quantity
        else:
            waiting = (usage.supplier_id, usage.ods_code, usage.item_id, day)
            suspense[waiting] = suspense.get(waiting, ZERO) + usage.quantity
    return taken, suspense


def less_included(line: Line, days: list[date], units: Units) -> dict[date, Fraction]:
    """Rule 3.3: "`included`: the first units of the line's month, in day order, are free (on a day, the
    `included` of its price less what was free before in the month), count towards no tier, and are not
    reduced for a part month"."""
    remaining: dict[date, Fraction] = {}
    free_before = ZERO
    for day in days:
        used = units.get((line.key, day), ZERO)
        free = ZERO
        if used > 0:
            free = min(used, max(ZERO, (line.price(day).included or ZERO) - free_before))
        free_before += free
        remaining[day] = used - free
    return remaining


def usage_charges(lines: list[Line], days: list[date], units: Units, charges: Charges) -> None:
    """Rule 3.3, for all the lines of one order and item: "Flat: quantity x price of the day. Tiers count the
    remaining units of all the order's lines for that item, whatever their price type, from the first of the
    month in day order (within a day all lines share alike, by quantity): cumulative: each stretch at the
    day's price of its tier; volume: the month's total picks the tier, each day's own price for it;
    single-fixed: the month's total picks the tier of the last of the line's prices in the month that is
    single-fixed, shared by quantity"."""
    left = {line.key: less_included(line, days, units) for line in lines}
    of_day = {day: sum((left[line.key][day] for line in lines), ZERO) for day in days}
    month_total = sum(of_day.values(), ZERO)
    for line in lines:
        live_prices = [line.price(day) for day in days if takes_usage(line, day)]
        fixed = [price for price in live_prices if price.way == "single_fixed"]
        cost: dict[date, Fraction] = {}
        before = ZERO
        for day in days:
            quantity = left[line.key][day]
            after = before + of_day[day]
            if quantity > 0:
                price = line.price(day)
                if price.way == "flat":
                    cost[day] = quantity * price.tiers[0].price
                elif price.way == "cumulative":
                    cost[day] = stretch_cost(price, before, after) * quantity / of_day[day]
                elif price.way == "volume":
                    cost[day] = quantity * tier_of(price, month_total).price
                else:
                    cost[day] = tier_of(fixed[-1], month_total).price * quantity / month_total
            before = after
        for day, amount in bounded(line, days, cost).items():
            charges[line.key][day] += amount


def bounded(line: Line, days: list[date], cost: dict[date, Fraction]) -> dict[date, Fraction]:
    """Rule 3.3: "`minimum`, `maximum` bound the line's usage charge of the month, used or not, before
    credits: each live on-demand day adds 1/days-in-month of the bound in force on it; a day without a maximum
    lifts it. A top-up accrues evenly over those days; a cut reduces every day by the same fraction"."""
    bound_days = [day for day in days if takes_usage(line, day)]
    if not bound_days:
        return cost
    total = sum(cost.values(), ZERO)
    minimum = sum(((line.price(day).minimum or ZERO) for day in bound_days), ZERO) / len(days)
    if total < minimum:
        topping = (minimum - total) / len(bound_days)
        return {day: cost.get(day, ZERO) + topping for day in bound_days}
    maxima = [line.price(day).maximum for day in bound_days]
    if all(maximum is not None for maximum in maxima):
        maximum = sum((m for m in maxima if m is not None), ZERO) / len(days)
        if total > maximum:
            return {day: amount * maximum / total for day, amount in cost.items()}
    return cost


def give_credit(known: Known, lines: list[Line], body: dict[str, Any]) -> None:
    """Rule 3.6: "Service credits subtract on their date, live or not; one that names no practice is shared by
    quantity over the order's lines for the item known at the cut that are live on its date (over all of them
    if none is; equally if all quantities are 0)"."""
    day: date = body["date"]
    sharing = [line for line in lines if line.key[1] == body["item_id"]]
    if body["ods_code"] is not None:
        sharing = [line for line in sharing if line.key[2] == body["ods_code"]]
    elif any(line.live(day) for line in sharing):
        sharing = [line for line in sharing if line.live(day)]
    weights = [known.quantity(line, day) for line in sharing]
    if sum(weights, ZERO) == 0:
        weights = [Fraction(1)] * len(sharing)
    for line, weight in zip(sharing, weights, strict=True):
        line.credits.append((day, body["amount"] * weight / sum(weights, ZERO)))


def accepted(known: Known, item: str, day: date) -> bool:
    """Rule 3.7: "an item with any `ServiceAccepted` in the log requires acceptance on all its days; a day is
    accepted when every requirement named for the item covers it"; rule 2.1: "the intervals of one
    requirement's acceptances unite"."""
    covered: dict[str, bool] = {}
    for change in known.references.get(item, []):
        if change.kind == "ServiceAccepted":
            body = change.body
            covers = body["from"] <= day and (body["to"] is None or day < body["to"])
            covered[body["requirement"]] = covered.get(body["requirement"], False) or covers
    return all(covered.values())


def payable(line: Line, period: Month) -> bool:
    """Rule 3.8: "a line is held until its M2 is known and not later than the end of the closing month ...
    One-offs need no M2"."""
    return not line.needs_m2 or (line.m2 is not None and month_of(line.m2) <= period)


@dataclass
class Group:
    """Rule 3.9: "the month's days with the same waterfall, ordering party and acceptance"."""

    line: Line
    funding: Funding
    party: str
    accepted: bool
    charge: Fraction = ZERO
    days: list[date] = field(default_factory=list)


def groups_of(known: Known, line: Line, days: list[date], costs: dict[date, Fraction]) -> list[Group]:
    """Rule 3.9: "Funding splits the exact charge of the month's days with the same waterfall, ordering party
    and acceptance, each such group by itself". Reading: the calendar days of a group are days live or not."""
    groups: dict[tuple[Funding, str, bool], Group] = {}
    if all(cost == 0 for cost in costs.values()):
        return []
    for day in days:
        key = (in_force(line.fundings, day), in_force(line.parties, day), accepted(known, line.key[1], day))
        group = groups.setdefault(key, Group(line, *key))
        group.charge += costs[day]
        group.days.append(day)
    return list(groups.values())


def waterfall(known: Known, group: Group, fraction: Fraction) -> tuple[dict[str, Fraction], Fraction]:
    """Rule 3.9: "step by step, each step limited to what remains: `share` of the whole; `per_patient_year`
    amount x list(d) / 12 / days in month summed over the group's calendar days; `allocation` what is left of
    the ordering party's allocation ...; `rest` all that remains. Of a negative charge caps and allocation
    take nothing, a share takes its share, rest the rest". Rule 3.7: "the charge of a day not accepted goes to
    `rest` alone". The allocation covers `fraction` of what would draw on it. Returns what each payer takes,
    and what would draw."""
    whole = left = group.charge
    takes: dict[str, Fraction] = {}
    draws = ZERO
    for entry in group.funding:
        payer = group.party if entry.payer == "@ordering_party" else entry.payer
        take = ZERO
        if entry.take == "rest":
            take = left
        elif not group.accepted:
            take = ZERO
        elif entry.take == "share":
            take = entry.amount * whole
            take = min(take, left) if whole >= 0 else max(take, left)
        elif whole > 0 and entry.take == "per_patient_year":
            dim = calendar.monthrange(group.days[0].year, group.days[0].month)[1]
            cap = sum(
                (entry.amount * known.list_for_cap(group.line, day) / 12 / dim for day in group.days), ZERO
            )
            take = min(cap, left)
        elif whole > 0 and entry.take == "allocation":
            draws = left
            take = left * fraction
        takes[payer] = takes.get(payer, ZERO) + take
        left -= take
    return takes, draws


def allocation_amount(known: Known, party: str, year: int) -> Fraction:
    """Rule 3.9: "An amount for a party replaces the per-patient form, which is per_patient x the list sizes
    on `as_of` of all practices under the party by commissioner membership on `as_of`, through any number of
    parents; the later said of the same form holds; none: 0"."""
    for code, of_party in ((party, True), ("ENGLAND", False)):
        said = [
            change.body
            for change in known.references.get(code, [])
            if change.kind == "Allocation"
            and change.body["financial_year"] == year
            and ("amount" in change.body) == of_party
        ]
        if said and of_party:
            return said[-1]["amount"]  # type: ignore[no-any-return]
        if said:
            as_of: date = said[-1]["as_of"]
            patients = sum(
                known.list_size(practice, as_of) or 0
                for practice in known.lists
                if party in commissioners(known, practice, as_of)
            )
            return said[-1]["per_patient"] * Fraction(patients)  # type: ignore[no-any-return]
    return ZERO


def commissioners(known: Known, code: str, day: date) -> set[str]:
    """Rule 3.9: the parents by commissioner membership on a day, "through any number of parents"; rule 2.1:
    "Memberships are painted per code and kind"."""
    above: set[str] = set()
    current: str | None = code
    while current is not None:
        timeline: Timeline = [
            (change.body["from"], change.body["to"], change.body["parent"])
            for change in known.references.get(current, [])
            if change.kind == "Membership" and change.body["kind"] == "commissioner"
        ]
        current = in_force(timeline, day)
        if current is None or current in above:
            break
        above.add(current)
    return above


Takes = dict[LineKey, dict[str, Fraction]]
"""What each payer of each line takes of a month, exact."""


def fund(known: Known, groups: list[Group], month: Month, drawn: dict[tuple[str, int], Fraction]) -> Takes:
    """Rule 3.9, "Allocation: months in order; in the month in which it would run dry all that would draw get
    the same fraction ... a correction draws on the year of the month it is for"; section 1: "there is one
    allocation per ordering party and year, whoever the entry names as its payer". Returns what each payer of
    each line takes."""
    year = financial_year(month)
    wanted: dict[str, Fraction] = {}
    for group in groups:
        _, draws = waterfall(known, group, ZERO)
        if draws > 0:
            wanted[group.party] = wanted.get(group.party, ZERO) + draws
    fractions: dict[str, Fraction] = {}
    for party, amount in wanted.items():
        left = allocation_amount(known, party, year) - drawn.get((party, year), ZERO)
        covered = min(amount, left)
        fractions[party] = covered / amount
        drawn[party, year] = drawn.get((party, year), ZERO) + covered
    taken: Takes = {}
    for group in groups:
        takes, _ = waterfall(known, group, fractions.get(group.party, ZERO))
        payers = taken.setdefault(group.line.key, {})
        for payer, take in takes.items():
            payers[payer] = payers.get(payer, ZERO) + take
    return taken


def round_pence(pence: Fraction) -> int:
    """Rule 3.10: "half away from zero"."""
    whole = (abs(pence) + Fraction(1, 2)).__floor__()
    return whole if pence >= 0 else -whole


def largest_remainder(target: int, exact: dict[str, Fraction], order: Sequence[str]) -> dict[str, int] | None:
    """Rule 3.10: "rounded to sum to it by largest remainder (what exceeds the floor, also when negative),
    ties by" the order given, "then by payer code"; "a penny each at most above the floor; if that cannot be"
    None."""
    pence = {payer: amount.__floor__() for payer, amount in exact.items()}
    missing = target - sum(pence.values())
    if not 0 <= missing <= len(exact):
        return None

    def rank(payer: str) -> tuple[Fraction, int, bytes]:
        place = order.index(payer) if payer in order else len(order)
        return -(exact[payer] - pence[payer]), place, payer.encode()

    for payer in sorted(exact, key=rank)[:missing]:
        pence[payer] += 1
    return pence


def round_payers(
    target: int, exact: dict[str, Fraction], moved: set[str], before: dict[str, int], order: Sequence[str]
) -> dict[str, int]:
    """Rule 3.10: "a payer that takes nothing in M keeps its pence of M-1 and the others are rounded to sum to
    what remains (a penny each at most above the floor; if that cannot be, all take part)"."""
    kept = {payer: before.get(payer, 0) for payer in exact if payer not in moved}
    others = {payer: amount for payer, amount in exact.items() if payer in moved}
    rounded = largest_remainder(target - sum(kept.values()), others, order)
    if rounded is not None:
        return kept | rounded
    rounded = largest_remainder(target, exact, order)
    assert rounded is not None, "the floors of all are never more than a penny each below the total"
    return rounded


@dataclass
class Account:
    """Rule 3.10: a line's cumulative exact shares and rounded pence, and each month's pence of each payer."""

    exact: dict[str, Fraction] = field(default_factory=dict)
    pence: dict[str, int] = field(default_factory=dict)
    months: dict[tuple[Month, str], int] = field(default_factory=dict)

    def add(self, line: Line, month: Month, takes: dict[str, Fraction]) -> None:
        """Rule 3.10: "with E the exact entitlement of the line from its first day to the end of M, the line
        has earned `round(E)` pence ... The payers' cumulative exact shares are rounded to sum to it ... ties
        by the waterfall in force on the last day of M ... M's share of a payer is the difference of two
        months' rounded cumulative shares"."""
        for payer, take in takes.items():
            self.exact[payer] = self.exact.get(payer, ZERO) + take * 100
        last_day = days_of(month)[-1]
        party = in_force(line.parties, last_day)
        funding: Funding = in_force(line.fundings, last_day)
        order = [party if entry.payer == "@ordering_party" else entry.payer for entry in funding]
        moved = {payer for payer, take in takes.items() if take != 0}
        target = round_pence(sum(self.exact.values(), ZERO))
        pence = round_payers(target, self.exact, moved, self.pence, order)
        for payer, now in pence.items():
            if now != self.pence.get(payer, 0):
                self.months[month, payer] = now - self.pence.get(payer, 0)
        self.pence = pence


def touches(line: Line, month: Month) -> bool:
    """Rules 3.1 and 3.6: whether the line has a live day or a credit in the month."""
    days = days_of(month)
    if any(days[0] <= day <= days[-1] for day, _ in line.credits):
        return True
    if line.m1 is None or line.m1 > days[-1]:
        return False
    return line.end is None or line.end > max(days[0], line.m1)


def month_charges(known: Known, lines: list[Line], month: Month, units: Units) -> Charges:
    """Rules 3.2, 3.3, 3.5 and 3.6: what each line costs on each day of a month, before anybody pays."""
    days = days_of(month)
    charges: Charges = {line.key: dict.fromkeys(days, ZERO) for line in lines}
    for order, item in sorted({line.key[:2] for line in lines}):
        together = [line for line in lines if line.key[:2] == (order, item)]
        time_charges(known, together, days, charges)
        usage_charges(together, days, units, charges)
        one_off_charges(known, together, days, charges)
    for line in lines:
        for day, amount in line.credits:
            if month_of(day) == month:
                charges[line.key][day] -= amount
    return charges


def derive(known: Known, period: Month) -> dict[LineKey, Account]:
    """Rule 4.1: "A close derives every month of every line from its first day up to the period"; rule 3.9:
    "months in order", with all lines of all orders, since they share allocations; rule 3.10: "The first day
    is that of the first credit, if that is earlier"."""
    accounts = {line.key: Account() for line in known.lines}
    units, _ = assign_usage(known)
    drawn: dict[tuple[str, int], Fraction] = {}
    first_days = [line.m1 for line in known.lines if line.m1 is not None]
    first_days += [day for line in known.lines for day, _ in line.credits]
    if not first_days:
        return accounts
    for month in months_between(month_of(min(first_days)), period):
        lines = [line for line in known.lines if touches(line, month)]
        charges = month_charges(known, lines, month, units)
        groups = [
            group for line in lines for group in groups_of(known, line, days_of(month), charges[line.key])
        ]
        takes = fund(known, groups, month, drawn)
        for line in lines:
            if line.key in takes:
                accounts[line.key].add(line, month, takes[line.key])
    return accounts


# ----------------------------------------------------------------------------------------------------
# Part 4: the close
# ----------------------------------------------------------------------------------------------------

RowKey = tuple[str, str, str, str, str, str]
"""(order number, item, practice, supplier, payer, month)."""


@dataclass(frozen=True)
class Close:
    """Rule 4.4: a closed period with the rows of its `lines.csv` and its `held.csv`."""

    period: str
    lines: list[Row]
    held: list[Row]


def as_bytes(row: Row) -> tuple[bytes, ...]:
    """Rule 4.4: "sorted by the columns as byte strings"."""
    return tuple(column.encode() for column in row)


def pounds(pence: int) -> str:
    """Rule 4.4: "net in pounds with two places"."""
    return f"{'-' if pence < 0 else ''}{abs(pence) // 100}.{abs(pence) % 100:02d}"


def rows_of(amounts: dict[RowKey, int], period: str) -> list[Row]:
    """Rule 4.2: "The row is `charge` where P is the closing period, whatever its sign, else `adjustment`";
    rule 4.4: "zero rows left out", sorted."""
    rows = [
        (*key, "charge" if key[5] == period else "adjustment", pounds(pence))
        for key, pence in amounts.items()
        if pence != 0
    ]
    return sorted(rows, key=as_bytes)


@dataclass
class Books:
    """Section 4: what was closed and invoiced so far."""

    closes: list[Close] = field(default_factory=list)
    invoiced: dict[RowKey, int] = field(default_factory=dict)

    def close(self, log: Log, asked: Any) -> None:
        """Rule 4.3: "After the first close, periods close in order without gaps; asking for a closed one
        answers with its documents; an earlier one is refused". Rule 4.1: "For each (line, supplier, payer,
        month P) it invoices the newly derived amount, if payable, less all that was invoiced for it before; a
        key no longer derived counts as 0 ... A line that no longer exists counts as 0". Rule 4.4: "`held.csv`
        is the balance held at the cut: every month of every line not payable"."""
        period = to_month(asked)
        text = month_text(period)
        if any(done.period == text for done in self.closes):
            return
        if self.closes and period != next_month(to_month(self.closes[-1].period)):
            raise CloseRefused(f"{text} does not follow {self.closes[-1].period}")
        known = what_is_known(log)
        accounts = derive(known, period)
        due: dict[RowKey, int] = {}
        held: dict[RowKey, int] = {}
        for line in known.lines:
            for (month, payer), pence in accounts[line.key].months.items():
                row_key = (*line.key, line.supplier, payer, month_text(month))
                (due if payable(line, period) else held)[row_key] = pence
        invoice: dict[RowKey, int] = {}
        for row_key in due.keys() | self.invoiced.keys():
            invoice[row_key] = due.get(row_key, 0) - self.invoiced.get(row_key, 0)
            self.invoiced[row_key] = due.get(row_key, 0)
        self.closes.append(Close(text, rows_of(invoice, text), rows_of(held, text)))


@dataclass
class Result:
    """What a run gave: its closes, what it refused, and the usage that no line takes at the end."""

    closes: list[Close]
    refused: list[tuple[int, str]]
    suspense: dict[tuple[str, str, str, date], Fraction]


def default_arrival(lines: Sequence[Any], closes: Sequence[str]) -> datetime:
    """Rule 4.1: `tribill run` "takes as arrival the later of now and the end of the file's last period".
    Reading: that is the last period closed."""
    asked = [line["close"] for line in lines if isinstance(line, dict) and "close" in line] + list(closes)
    ends = [datetime(*next_month(to_month(period)), 1, tzinfo=LONDON).astimezone(UTC) for period in asked]
    return max([datetime.now(UTC), *ends])


def run(
    lines: Iterable[dict[str, Any]], *, closes: Sequence[str] = (), arrival: datetime | None = None
) -> Result:
    """Rule 4.4, `tribill run FILE... [--close 2026-04 ...]`: read the lines in order, close where a line says
    so ("what follows is late"), then close the periods of `closes` in order. A close that is refused raises
    `CloseRefused`; a record that is refused is noted by the index of its line."""
    everything = list(lines)
    log = Log(arrival if arrival is not None else default_arrival(everything, closes))
    books = Books()
    for place, line in enumerate(everything):
        if isinstance(line, dict) and "close" in line:
            books.close(log, line["close"])
        else:
            log.read(place, line)
    for period in closes:
        books.close(log, period)
    _, suspense = assign_usage(what_is_known(log))
    return Result(books.closes, log.refused, suspense)
