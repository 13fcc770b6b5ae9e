"""What is said of contracts and of the world, as typed records (RULES section 1).

Each record is read from its interchange form: a mapping with decimals as strings, dates and
instants as ISO text.  What breaks a rule raises `Refused`, which names the rule and the field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rating.amounts import MICROS, micros
from rating.calendar import FOREVER, parse_date, parse_instant

ORDERING_PARTY = "@ordering_party"
ENGLAND = "ENGLAND"


class Refused(ValueError):
    """A record that breaks a rule: `field` says where, the message which rule and how."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason


# --- prices and funding ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tier:
    """The units above `above_micros`, up to the next tier's, at `price_micros` pounds each."""

    above_micros: int
    price_micros: int


@dataclass(frozen=True, slots=True)
class Price:
    """A price: `tiers[0]` alone when flat.  The bounds are of a month and for on demand only."""

    type: str
    calculation: str
    provisioning: str
    unit: str
    time_unit: str
    day_count: str
    tiers: tuple[Tier, ...]
    included_micros: int = 0
    minimum_micros: int = 0
    maximum_micros: int | None = None

    @property
    def is_flat(self) -> bool:
        """Price times quantity, whatever the calculation says."""
        return self.type == "flat"

    @property
    def is_on_demand(self) -> bool:
        """Charged by usage."""
        return self.provisioning == "on_demand"

    @property
    def is_time(self) -> bool:
        """Charged by the live day."""
        return self.time_unit != "none"

    @property
    def is_one_off(self) -> bool:
        """Charged once, on the day of M1."""
        return self.time_unit == "none" and not self.is_on_demand


@dataclass(frozen=True, slots=True)
class Funding:
    """One step of a waterfall: what `payer` takes of what the earlier steps left.

    `take` is share, per_patient_year, allocation or rest; `amount_micros` is the share (of one)
    or the pounds per patient and year.
    """

    payer: str
    take: str
    amount_micros: int = 0


Waterfall = tuple[Funding, ...]


# --- contract changes -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OrderLine:
    """A line as ordered: its own price, quantity and funding to start with."""

    item_id: str
    ods_code: str
    quantity_micros: int
    price: Price
    funding: Waterfall


@dataclass(frozen=True, slots=True)
class Header:
    """What every revision of an order repeats as first written."""

    ordering_party: str
    supplier_id: str
    framework: str
    commencement: int
    term_months: int
    vat_rate_micros: int


@dataclass(frozen=True, slots=True)
class OrderPlaced:
    """A call-off order, or a revision of it that only adds lines."""

    order_id: str
    header: Header
    lines: tuple[OrderLine, ...]


@dataclass(frozen=True, slots=True)
class MilestoneReached:
    """M1 (go-live, charges start) or M2 (service stability, what accrued becomes payable)."""

    item_id: str
    ods_code: str
    milestone: str
    day: int


@dataclass(frozen=True, slots=True)
class QuantityChanged:
    """A line's quantity from a day on."""

    item_id: str
    ods_code: str
    quantity_micros: int
    first: int


@dataclass(frozen=True, slots=True)
class PriceAgreed:
    """A price from a day on, of one line or (no practice) of each of the item's lines."""

    item_id: str
    ods_code: str | None
    price: Price
    first: int


@dataclass(frozen=True, slots=True)
class FundingChanged:
    """A waterfall from a day on, of one line or (no practice) of each of the item's lines."""

    item_id: str
    ods_code: str | None
    funding: Waterfall
    first: int


@dataclass(frozen=True, slots=True)
class LineCeased:
    """The first day on which the line is no longer live."""

    item_id: str
    ods_code: str
    day: int


@dataclass(frozen=True, slots=True)
class OrderTerminated:
    """The first day on which none of the order's lines is live."""

    day: int


@dataclass(frozen=True, slots=True)
class PartyNovated:
    """Another ordering party from a day on, for the whole order."""

    ordering_party: str
    first: int


@dataclass(frozen=True, slots=True)
class ServiceCredit:
    """An amount (pounds, excluding VAT, positive) that the supplier gives back on a day."""

    item_id: str
    ods_code: str | None
    amount_micros: int
    day: int
    reason: str


@dataclass(frozen=True, slots=True)
class Retracted:
    """The named change of the same order or code is as if never said."""

    change_id: str


ContractBody = (
    OrderPlaced
    | MilestoneReached
    | QuantityChanged
    | PriceAgreed
    | FundingChanged
    | LineCeased
    | OrderTerminated
    | PartyNovated
    | ServiceCredit
    | Retracted
)


# --- reference changes ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ListSize:
    """A practice's registered patients at a day."""

    ods_code: str
    as_of: int
    patients: int


@dataclass(frozen=True, slots=True)
class Membership:
    """A practice's PCN or commissioner, or a commissioner's own, over days."""

    ods_code: str
    kind: str
    parent: str
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class PracticeOpened:
    """A practice's first day; moves no money."""

    ods_code: str
    day: int


@dataclass(frozen=True, slots=True)
class PracticeClosed:
    """The first day on which the practice's lines are no longer live."""

    ods_code: str
    day: int


@dataclass(frozen=True, slots=True)
class PracticeMerged:
    """As PracticeClosed, through a merger into another practice."""

    ods_code: str
    into: str
    day: int


@dataclass(frozen=True, slots=True)
class ServiceAccepted:
    """A requirement that an item fulfils over days."""

    item_id: str
    requirement: str
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """What an ordering party may draw in a financial year.

    For one party `amount_micros` pounds; for all (`ordering_party` None) `per_patient_micros`
    pounds for each patient registered on `as_of`.
    """

    ordering_party: str | None
    financial_year: int
    amount_micros: int
    per_patient_micros: int
    as_of: int


ReferenceBody = (
    ListSize | Membership | PracticeOpened | PracticeClosed | PracticeMerged | ServiceAccepted | Allocation | Retracted
)


@dataclass(frozen=True, slots=True)
class ContractChange:
    """A change of one order (`order_number`), with its id."""

    id: str
    order_number: str
    body: ContractBody


@dataclass(frozen=True, slots=True)
class ReferenceChange:
    """A change about one practice, item, ordering party or ENGLAND (`code`), with its id."""

    id: str
    code: str
    body: ReferenceBody


# --- reading the interchange form -----------------------------------------------------------


class Fields:
    """A mapping of the interchange form, read field by field with its path for messages."""

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, Mapping):
            raise Refused(path, f"is {_shown(value)}, not a record of named fields")
        self.value = value
        self.path = path

    def at(self, name: str) -> str:
        """The path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str) -> Any:
        """A field's value; a missing one and null are the same."""
        return self.value.get(name)

    def require(self, name: str) -> Any:
        """A field's value, which must be there."""
        value = self.value.get(name)
        if value is None:
            raise Refused(self.at(name), "is missing")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.require(name)
        if not isinstance(value, str):
            raise Refused(self.at(name), f"is {_shown(value)}, not a string")
        return value

    def optional_text(self, name: str) -> str | None:
        """A string, or nothing."""
        return self.text(name) if self.get(name) is not None else None

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of the words that the field may be."""
        if default is not None and self.get(name) is None:
            return default
        value = self.text(name)
        if value not in choices:
            raise Refused(self.at(name), f"is {_shown(value)}, not one of {', '.join(choices)}")
        return value

    def micros(self, name: str) -> int:
        """A decimal(18,6), not negative."""
        value = self.require(name)
        if not isinstance(value, str):
            raise Refused(self.at(name), f'is {_shown(value)}; write decimals as strings, "1.26"')
        try:
            return micros(value)
        except ValueError as error:
            raise Refused(self.at(name), str(error)) from None

    def optional_micros(self, name: str) -> int | None:
        """A decimal(18,6), or nothing."""
        return self.micros(name) if self.get(name) is not None else None

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number, not negative."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        value = self.require(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Refused(self.at(name), f"is {_shown(value)}, not a whole number")
        if not 0 <= value < 2**31:
            raise Refused(self.at(name), f"is {value}, not between 0 and 2147483647")
        return value

    def day(self, name: str) -> int:
        """A date, as an ordinal."""
        value = self.text(name)
        try:
            return parse_date(value).toordinal()
        except ValueError as error:
            raise Refused(self.at(name), f"is {_shown(value)}, {error}") from None

    def end_day(self, name: str) -> int:
        """The first day no longer covered; a missing one is open."""
        return self.day(name) if self.get(name) is not None else FOREVER

    def list(self, name: str) -> list[Fields]:
        """A list of records."""
        value = self.require(name)
        if not isinstance(value, list):
            raise Refused(self.at(name), f"is {_shown(value)}, not a list")
        return [Fields(each, f"{self.at(name)}[{index}]") for index, each in enumerate(value)]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_instant(fields: Fields, name: str) -> datetime:
    """An instant with its offset, RFC 3339."""
    value = fields.text(name)
    try:
        return parse_instant(value)
    except ValueError as error:
        raise Refused(fields.at(name), f"is {_shown(value)}, {error}") from None


def read_price(fields: Fields) -> Price:
    """A price, with every rule of RULES section 1 about one."""
    kind = fields.choice("type", ("flat", "tiered"))
    calculations = ("cumulative", "volume", "single_fixed")
    # A flat price's calculation is ignored, so any or none will do.
    calculation = fields.choice("calculation", calculations) if kind == "tiered" else "ignored"
    provisioning = fields.choice("provisioning", ("patient", "declarative", "on_demand"))
    on_demand = provisioning == "on_demand"
    time_unit = fields.choice("time_unit", ("month", "year", "none"), "none" if on_demand else None)
    if on_demand and time_unit != "none":
        raise Refused(fields.at("time_unit"), f"is {time_unit}; an on-demand price has none")
    tiers = _read_tiers(fields, kind)
    included = fields.optional_micros("included")
    minimum = fields.optional_micros("minimum")
    maximum = fields.optional_micros("maximum")
    if not on_demand:
        for name, value in (("included", included), ("minimum", minimum), ("maximum", maximum)):
            if value is not None:
                raise Refused(fields.at(name), "is for on-demand prices only")
    if minimum is not None and maximum is not None and minimum > maximum:
        raise Refused(fields.at("minimum"), "is above the maximum")
    return Price(
        type=kind,
        calculation=calculation,
        provisioning=provisioning,
        unit=fields.optional_text("unit") or "",
        time_unit=time_unit,
        day_count=fields.choice("day_count", ("month", "actual/365", "actual/actual"), "month"),
        tiers=tiers,
        included_micros=included or 0,
        minimum_micros=minimum or 0,
        maximum_micros=maximum,
    )


def _read_tiers(fields: Fields, kind: str) -> tuple[Tier, ...]:
    rows = fields.list("tiers")
    where = fields.at("tiers")
    if not rows:
        raise Refused(where, "is empty")
    if len(rows) > 7:
        raise Refused(where, f"has {len(rows)} tiers, at most 7 are allowed")
    if kind == "flat" and len(rows) != 1:
        raise Refused(where, f"has {len(rows)} tiers, a flat price has one")
    tiers, expected = [], MICROS
    for index, row in enumerate(rows):
        first, last = row.micros("from"), row.optional_micros("to")
        if first != expected:
            rule = "the first tier starts at 1" if index == 0 else "tiers leave no gap and do not overlap"
            raise Refused(row.at("from"), f"is {row.get('from')}; {rule}")
        if (last is None) != (index == len(rows) - 1):
            rule = "the last tier is open" if last is not None else "only the last tier is open"
            raise Refused(row.at("to"), rule)
        if last is not None:
            if last + MICROS <= first:
                raise Refused(row.at("to"), f"is {row.get('to')}, below its from")
            expected = last + MICROS
        tiers.append(Tier(first - MICROS, row.micros("price")))
    return tuple(tiers)


def read_funding(rows: list[Fields], path: str) -> Waterfall:
    """A waterfall: exactly one rest, last; shares of at most 1; a payer and an allocation once."""
    steps: list[Funding] = []
    for row in rows:
        payer, take = row.text("payer"), row.require("take")
        if isinstance(take, str):
            if take not in ("allocation", "rest"):
                raise Refused(row.at("take"), f"is {_shown(take)}, not allocation or rest")
            steps.append(Funding(payer, take))
        else:
            kinds = Fields(take, row.at("take"))
            names = [name for name in take if take[name] is not None]
            if len(names) != 1 or names[0] not in ("share", "per_patient_year"):
                raise Refused(row.at("take"), "names one of share and per_patient_year")
            steps.append(Funding(payer, names[0], kinds.micros(names[0])))
    takes = [step.take for step in steps]
    if takes.count("rest") != 1 or takes[-1] != "rest":
        raise Refused(path, "has exactly one rest, as its last entry")
    if takes.count("allocation") > 1:
        raise Refused(path, "has at most one allocation")
    if sum(step.amount_micros for step in steps if step.take == "share") > MICROS:
        raise Refused(path, "has shares of more than 1 in sum")
    payers = [step.payer for step in steps]
    for payer in payers:
        if payers.count(payer) > 1:
            raise Refused(path, f"names the payer {payer} twice")
    return tuple(steps)


def _order_placed(fields: Fields) -> OrderPlaced:
    lines = tuple(
        OrderLine(
            item_id=row.text("item_id"),
            ods_code=row.text("ods_code"),
            quantity_micros=row.optional_micros("quantity") or 0,
            price=read_price(Fields(row.require("price"), row.at("price"))),
            funding=read_funding(row.list("funding"), row.at("funding")),
        )
        for row in fields.list("lines")
        if _delivery_date_reads(row)
    )
    return OrderPlaced(
        order_id=fields.text("order_id"),
        header=Header(
            ordering_party=fields.text("ordering_party"),
            supplier_id=fields.text("supplier_id"),
            framework=fields.optional_text("framework") or "",
            commencement=fields.day("commencement"),
            term_months=fields.integer("term_months", 36),
            vat_rate_micros=_vat_rate(fields),
        ),
        lines=lines,
    )


def _vat_rate(fields: Fields) -> int:
    """A fraction of one; what is above one can only be meant in per cent: `0.2` and `20` are the same rate.

    What is neither stays as it is, for admission to refuse.
    """
    rate = fields.micros("vat_rate")
    in_per_cent = MICROS < rate <= 100 * MICROS and rate % 100 == 0
    return rate // 100 if in_per_cent else rate


def _delivery_date_reads(row: Fields) -> bool:
    # The planned date informs and moves no money, yet a wrong one is said at the edge.
    row.end_day("delivery_date")
    return True


def _credit(fields: Fields) -> ServiceCredit:
    amount = fields.micros("amount")
    if amount == 0:
        raise Refused(fields.at("amount"), "is 0; a credit's amount is positive")
    return ServiceCredit(
        item_id=fields.text("item_id"),
        ods_code=fields.optional_text("ods_code"),
        amount_micros=amount,
        day=fields.day("date"),
        reason=fields.optional_text("reason") or "",
    )


def _allocation(fields: Fields) -> Allocation:
    party = fields.optional_text("ordering_party")
    amount, per_patient = fields.optional_micros("amount"), fields.optional_micros("per_patient")
    for_party = party is not None and amount is not None
    for_all = per_patient is not None and fields.get("as_of") is not None
    if for_party == for_all or (party is None) != (amount is None):
        raise Refused(
            fields.path,
            "is either ordering_party, financial_year, amount or financial_year, per_patient, as_of",
        )
    year = fields.integer("financial_year")
    if not 1 <= year <= 9998:
        raise Refused(fields.at("financial_year"), f"is {year}, not the year of a 1 April such as 2026")
    return Allocation(
        ordering_party=party,
        financial_year=year,
        amount_micros=amount or 0,
        per_patient_micros=per_patient or 0,
        as_of=fields.day("as_of") if for_all else 0,
    )


_CONTRACT_BODIES: dict[str, Callable[[Fields], ContractBody]] = {
    "OrderPlaced": _order_placed,
    "MilestoneReached": lambda f: MilestoneReached(
        f.text("item_id"), f.text("ods_code"), f.choice("milestone", ("M1", "M2")), f.day("date")
    ),
    "QuantityChanged": lambda f: QuantityChanged(
        f.text("item_id"), f.text("ods_code"), f.micros("quantity"), f.day("from")
    ),
    "PriceAgreed": lambda f: PriceAgreed(
        f.text("item_id"),
        f.optional_text("ods_code"),
        read_price(Fields(f.require("price"), f.at("price"))),
        f.day("from"),
    ),
    "FundingChanged": lambda f: FundingChanged(
        f.text("item_id"),
        f.optional_text("ods_code"),
        read_funding(f.list("funding"), f.at("funding")),
        f.day("from"),
    ),
    "LineCeased": lambda f: LineCeased(f.text("item_id"), f.text("ods_code"), f.day("date")),
    "OrderTerminated": lambda f: OrderTerminated(f.day("date")),
    "PartyNovated": lambda f: PartyNovated(f.text("ordering_party"), f.day("from")),
    "ServiceCredit": _credit,
    "Retracted": lambda f: Retracted(f.text("change_id")),
}

_REFERENCE_BODIES: dict[str, Callable[[Fields], ReferenceBody]] = {
    "ListSize": lambda f: ListSize(f.text("ods_code"), f.day("as_of"), f.integer("patients")),
    "Membership": lambda f: Membership(
        f.text("ods_code"),
        f.choice("kind", ("pcn", "commissioner")),
        f.text("parent"),
        f.day("from"),
        f.end_day("to"),
    ),
    "PracticeOpened": lambda f: PracticeOpened(f.text("ods_code"), f.day("date")),
    "PracticeClosed": lambda f: PracticeClosed(f.text("ods_code"), f.day("date")),
    "PracticeMerged": lambda f: PracticeMerged(f.text("ods_code"), f.text("into"), f.day("date")),
    "ServiceAccepted": lambda f: ServiceAccepted(
        f.text("item_id"), f.text("requirement"), f.day("from"), f.end_day("to")
    ),
    "Allocation": _allocation,
    "Retracted": lambda f: Retracted(f.text("change_id")),
}

_Body = Any


def _body(fields: Fields, readers: Mapping[str, Callable[[Fields], _Body]]) -> _Body:
    change = fields.require("change")
    if not isinstance(change, Mapping) or len(change) != 1:
        raise Refused("change", 'is one named change, such as {"LineCeased": {...}}')
    name = next(iter(change))
    if name not in readers:
        raise Refused("change", f"{_shown(name)} is not one of {', '.join(readers)}")
    return readers[name](Fields(change[name], f"change.{name}"))


def read_contract_change(value: object) -> ContractChange:
    """A contract change from its interchange form.  Raises Refused."""
    fields = Fields(value)
    change = ContractChange(fields.text("id"), fields.text("order_number"), _body(fields, _CONTRACT_BODIES))
    read_instant(fields, "recorded_at")
    body = change.body
    if isinstance(body, OrderPlaced):
        number, _, revision = body.order_id.rpartition("-")
        if number != change.order_number or not re.fullmatch(r"\d{2}", revision, re.ASCII):
            raise Refused(
                "change.OrderPlaced.order_id",
                f"is {body.order_id!r}, not the order number {change.order_number} with a revision, "
                f"such as {change.order_number}-01",
            )
    return change


def read_reference_change(value: object) -> ReferenceChange:
    """A reference change from its interchange form.  Raises Refused."""
    fields = Fields(value)
    change = ReferenceChange(fields.text("id"), fields.text("code"), _body(fields, _REFERENCE_BODIES))
    read_instant(fields, "recorded_at")
    expected = _code_of(change.body)
    if expected is not None and change.code != expected:
        raise Refused("code", f"is {change.code!r}, but the change is about {expected!r}")
    return change


def _code_of(body: ReferenceBody) -> str | None:
    if isinstance(body, Retracted):
        return None
    if isinstance(body, ServiceAccepted):
        return body.item_id
    if isinstance(body, Allocation):
        return body.ordering_party if body.ordering_party is not None else ENGLAND
    return body.ods_code
