"""Orders and reference data as the log has made them: what stands after a prefix of it (RULES section 2).

A `Book` is folded from accepted changes in log order.  It holds no money; `charges` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from rating import records as said
from rating.calendar import FOREVER, add_months
from rating.records import ContractChange, Header, OrderLine, Price, ReferenceChange, Waterfall
from rating.timeline import Intervals, Snapshots, Timeline

#: A charge line's stable key: order number, item id, ODS code.
LineKey = tuple[str, str, str]
#: What usage is counted for: item id, ODS code.
Service = tuple[str, str]


def standing(changes: Iterable[ContractChange]) -> list[ContractChange]:
    """The changes less those retracted; a retraction can itself be retracted by a later one (2.4)."""
    kept, removed = [], set()
    for change in reversed(list(changes)):
        if change.id in removed:
            continue
        if isinstance(change.body, said.Retracted):
            removed.add(change.body.change_id)
        else:
            kept.append(change)
    return kept[::-1]


@dataclass(slots=True, eq=False)
class Line:
    """One charge line: what is painted on it, and the facts about it."""

    key: LineKey
    order: Order
    placed: OrderLine
    price: Timeline[Price]
    quantity: Timeline[int]
    funding: Timeline[Waterfall]

    #: The catalogue item and the practice, as in the key.
    item_id: str = field(init=False)
    ods_code: str = field(init=False)

    def __post_init__(self) -> None:
        _, self.item_id, self.ods_code = self.key

    @property
    def m1(self) -> int | None:
        """The day of go-live; charges start on it."""
        return self.order.milestones.get((self.item_id, self.ods_code, "M1"))

    @property
    def m2(self) -> int | None:
        """The day of service stability; makes payable what accrued since M1."""
        return self.order.milestones.get((self.item_id, self.ods_code, "M2"))

    @property
    def is_one_off(self) -> bool:
        """Whether the line is charged once, on delivery: it needs no M2 (3.8)."""
        return self.placed.price.is_one_off

    @property
    def follows_list_size(self) -> bool:
        """Whether a list size of the practice moves what the line costs or who pays it."""
        return any(price.provisioning == "patient" for price in self.price.values) or any(
            step.take == "per_patient_year" for waterfall in self.funding.values for step in waterfall
        )

    def live(self, reference: Reference) -> tuple[int, int]:
        """The live days `[first, end)`; (0, 0) when never live (3.1).

        >>> line = OrderLine("10000-001", "A83005", 0, None, ())  # its price and funding play no part
        >>> placed = said.OrderPlaced("C010001-01", Header("16C", "10000", "", 739342, 12, 0), (line,))
        >>> live = said.MilestoneReached("10000-001", "A83005", "M1", 739350)
        >>> ceased = said.LineCeased("10000-001", "A83005", 739400)
        >>> def days(*bodies):
        ...     order = Order.fold("C010001", [ContractChange(str(n), "C010001", b) for n, b in enumerate(bodies)])
        ...     return order.lines["10000-001", "A83005"].live(Reference())
        >>> days(placed), days(placed, live), days(placed, live, ceased)
        ((0, 0), (739350, 739707), (739350, 739400))
        """
        first = self.m1
        if first is None:
            return 0, 0
        order, practice = self.order, reference.of(self.ods_code)
        end = min(
            order.ceased.get((self.item_id, self.ods_code), FOREVER),
            order.terminated,
            practice.closed,
            practice.merged,
            add_months(order.header.commencement, order.header.term_months),
        )
        return (first, end) if first < end else (0, 0)

    def payable(self, last_day: int) -> bool:
        """Whether what accrued is released in a period that ends on `last_day` (3.8).

        Held until M2 is known and not later than the period's end; a one-off needs none.

        >>> from rating.calendar import last_day, parse_month
        >>> from rating.records import Funding, Header, MilestoneReached, OrderLine, OrderPlaced, Price, Tier
        >>> price = Price("flat", "volume", "declarative", "", "month", "month", (Tier(0, 1_000_000),))
        >>> placed = OrderLine("10000-001", "A83005", 1_000_000, price, (Funding("NHSE", "rest"),))
        >>> order, april, may = Order("C010001"), parse_month("2026-04"), parse_month("2026-05")
        >>> order.apply(OrderPlaced("C010001-01", Header("15E", "10000", "", 739_000, 36, 200_000), (placed,)))
        >>> order.apply(MilestoneReached("10000-001", "A83005", "M2", last_day(april) + 12))
        >>> [line] = order.lines.values()
        >>> line.payable(last_day(april)), line.payable(last_day(may))  # M2 on 12 May: all since M1 in May's close
        (False, True)
        """
        return self.is_one_off or (self.m2 is not None and self.m2 <= last_day)


@dataclass(slots=True)
class Credit:
    """A service credit: of one practice's line, or (None) of all the order's lines for the item."""

    item_id: str
    ods_code: str | None
    amount_micros: int
    day: int


class Order:
    """A call-off order with its revisions rolled up, and all that was said of it."""

    def __init__(self, number: str) -> None:
        self.number = number
        self.headers: dict[str, Header] = {}
        self.lines: dict[Service, Line] = {}
        self.by_item: dict[str, list[Line]] = {}
        self.milestones: dict[tuple[str, str, str], int] = {}
        self.ceased: dict[Service, int] = {}
        self.terminated = FOREVER
        self.novations: list[said.PartyNovated] = []
        self.credits: list[Credit] = []
        self._party: Timeline[str] | None = None

    @classmethod
    def fold(cls, number: str, changes: Iterable[ContractChange]) -> Order:
        """The order that the accepted changes, in log order, make."""
        order = cls(number)
        for change in standing(changes):
            order.apply(change.body)
        return order

    @property
    def header(self) -> Header:
        """The header as first written; every revision repeats it."""
        return next(iter(self.headers.values()))

    @property
    def party(self) -> Timeline[str]:
        """The ordering party over days; a novation acts on the whole order, whenever placed (2.1)."""
        if self._party is None:
            self._party = Timeline(self.header.ordering_party)
            for novation in self.novations:
                self._party.paint(novation.first, FOREVER, novation.ordering_party)
        return self._party

    def named(self, item_id: str, ods_code: str | None) -> list[Line]:
        """The lines that a change names: one, or (no practice) each of the item's."""
        if ods_code is None:
            return self.by_item.get(item_id, [])
        line = self.lines.get((item_id, ods_code))
        return [line] if line else []

    def apply(self, body: said.ContractBody) -> None:
        """Says one accepted change that is not a retraction."""
        match body:
            case said.OrderPlaced():
                self._place(body)
            case said.MilestoneReached():
                self.milestones[body.item_id, body.ods_code, body.milestone] = body.day
            case said.QuantityChanged():
                for line in self.named(body.item_id, body.ods_code):
                    line.quantity.paint(body.first, FOREVER, body.quantity_micros)
            case said.PriceAgreed():
                for line in self.named(body.item_id, body.ods_code):
                    line.price.paint(body.first, FOREVER, body.price)
            case said.FundingChanged():
                for line in self.named(body.item_id, body.ods_code):
                    line.funding.paint(body.first, FOREVER, body.funding)
            case said.LineCeased():
                self.ceased[body.item_id, body.ods_code] = body.day
            case said.OrderTerminated():
                self.terminated = body.day
            case said.PartyNovated():
                self.novations.append(body)
                self._party = None
            case said.ServiceCredit():
                self.credits.append(Credit(body.item_id, body.ods_code, body.amount_micros, body.day))
            case said.Retracted():
                raise AssertionError("a retraction is folded, not applied")

    def _place(self, body: said.OrderPlaced) -> None:
        self.headers[body.order_id] = body.header
        self._party = None
        for placed in body.lines:
            service = (placed.item_id, placed.ods_code)
            if service in self.lines:
                continue  # admission lets none through; who reads what a hand has changed may meet one
            line = Line(
                key=(self.number, *service),
                order=self,
                placed=placed,
                price=Timeline(placed.price),
                quantity=Timeline(placed.quantity_micros),
                funding=Timeline(placed.funding),
            )
            self.lines[service] = line
            self.by_item.setdefault(placed.item_id, []).append(line)


@dataclass(slots=True)
class CodeFacts:
    """What the reference log says of one code: a practice, commissioner, item, party or ENGLAND."""

    list_sizes: Snapshots = field(default_factory=Snapshots)
    closed: int = FOREVER
    merged: int = FOREVER
    memberships: dict[str, Timeline[str | None]] = field(default_factory=dict)
    acceptances: dict[str, Intervals] = field(default_factory=dict)
    #: By financial year and form: for one party, or (None) for all.
    allocations: dict[tuple[int, str | None], said.Allocation] = field(default_factory=dict)

    def apply(self, body: said.ReferenceBody) -> None:
        """Says one accepted change that is not a retraction."""
        match body:
            case said.ListSize():
                self.list_sizes.say(body.as_of, body.patients)
            case said.Membership():
                empty: Timeline[str | None] = Timeline(None)
                self.memberships.setdefault(body.kind, empty).paint(body.first, body.end, body.parent)
            case said.PracticeClosed():
                self.closed = body.day
            case said.PracticeMerged():
                self.merged = body.day
            case said.ServiceAccepted():
                self.acceptances.setdefault(body.requirement, Intervals()).add(body.first, body.end)
            case said.Allocation():
                self.allocations[body.financial_year, body.ordering_party] = body
            case said.PracticeOpened():
                pass
            case said.Retracted():
                raise AssertionError("a retraction is folded, not applied")


_NOTHING_SAID = CodeFacts()


class Reference:
    """List sizes, memberships, closures, acceptances and allocations, by code."""

    def __init__(self) -> None:
        self.codes: dict[str, CodeFacts] = {}
        self._logs: dict[str, list[ReferenceChange]] = {}
        self._patients_under: dict[int, dict[str, int]] = {}

    @classmethod
    def fold(cls, changes: Iterable[ReferenceChange]) -> Reference:
        """The reference data that the accepted changes, in log order per code, make."""
        reference = cls()
        for change in changes:
            reference.say(change)
        return reference

    def say(self, change: ReferenceChange) -> None:
        """Adds one accepted change; a retraction folds its code's log anew."""
        self._patients_under.clear()
        log = self._logs.setdefault(change.code, [])
        log.append(change)
        if not isinstance(change.body, said.Retracted):
            self.codes.setdefault(change.code, CodeFacts()).apply(change.body)
            return
        facts, removed, kept = CodeFacts(), set(), []
        for each in reversed(log):
            if each.id in removed:
                continue
            if isinstance(each.body, said.Retracted):
                removed.add(each.body.change_id)
            else:
                kept.append(each.body)
        for body in reversed(kept):
            facts.apply(body)
        self.codes[change.code] = facts

    def of(self, code: str) -> CodeFacts:
        """What is known of a code; nothing, for one that nobody has described."""
        return self.codes.get(code, _NOTHING_SAID)

    def accepted(self, item_id: str, day: int) -> bool:
        """Whether every requirement named for the item covers the day (3.7).

        >>> reference = Reference.fold([
        ...     ReferenceChange("1", "10000-001", said.ServiceAccepted("10000-001", "C5", 100, 200)),
        ...     ReferenceChange("2", "10000-001", said.ServiceAccepted("10000-001", "C11", 150, 300))])
        >>> [reference.accepted("10000-001", day) for day in (149, 150, 199, 200)]
        [False, True, True, False]
        >>> reference.accepted("10000-002", 100)  # none is named for it
        True
        """
        return all(spans.covers(day) for spans in self.of(item_id).acceptances.values())

    def patients_under(self, day: int) -> Mapping[str, int]:
        """The patients registered on a day with all practices under each commissioner (3.9).

        By commissioner membership on that day, through any number of parents.
        """
        if day not in self._patients_under:
            under: dict[str, int] = {}
            for code, facts in self.codes.items():
                patients = facts.list_sizes.at(day)
                seen, parent = {code}, self._commissioner(code, day)
                while patients and parent is not None and parent not in seen:
                    under[parent] = under.get(parent, 0) + patients
                    seen.add(parent)
                    parent = self._commissioner(parent, day)
            self._patients_under[day] = under
        return self._patients_under[day]

    def _commissioner(self, code: str, day: int) -> str | None:
        timeline = self.of(code).memberships.get("commissioner")
        return timeline.at(day) if timeline else None


class Book:
    """All orders, the reference data, and the day totals of usage."""

    def __init__(
        self,
        orders: Iterable[Order],
        reference: Reference,
        usage: Mapping[Service, Mapping[int, int]],
    ) -> None:
        """`usage` is quantity_micros by (item, practice) and London day (ordinal)."""
        self.orders = {order.number: order for order in orders if order.headers}
        self.reference = reference
        self.usage = usage
        self.by_service: dict[Service, list[Line]] = {}
        #: The lines that a code is about: a practice's, or an item's.
        self.by_code: dict[str, list[Line]] = {}
        for order in sorted(self.orders.values(), key=attrgetter("number")):
            for service, line in order.lines.items():
                self.by_service.setdefault(service, []).append(line)
                for code in service:
                    self.by_code.setdefault(code, []).append(line)

    def takers(self, service: Service, day: int) -> list[Line]:
        """The lines live on the day at an on-demand price; the first, of the lowest order, takes it (3.3)."""
        return _takers(self._live(service), day)

    def _live(self, service: Service) -> list[tuple[Line, int, int]]:
        return [(line, *line.live(self.reference)) for line in self.by_service.get(service, [])]

    def untaken(self) -> tuple[dict[Service, int], dict[Service, list[str]]]:
        """Usage in suspense, and overlaps (3.3).

        The first is what no line takes, in micros by (item, practice); the second the orders that
        all have a line for a (item, practice) on some day of its usage, of which the lowest takes it.
        """
        suspense: dict[Service, int] = {}
        overlaps: dict[Service, list[str]] = {}
        for service, days in self.usage.items():
            live = self._live(service)
            for day, quantity in days.items():
                if not quantity:
                    continue
                takers = _takers(live, day)
                if not takers:
                    suspense[service] = suspense.get(service, 0) + quantity
                elif len(takers) > 1:
                    overlaps[service] = [line.order.number for line in takers]
        return suspense, overlaps

    def why_untaken(self, service: Service, day: int) -> str:
        """Why no line takes usage of a day, in words; "" when one does."""
        live = self._live(service)
        if not live:
            return "no order has a line for it"
        if _takers(live, day):
            return ""
        if any(first <= day < end for _, first, end in live):
            return "not at an on-demand price on the day"
        if all(line.m1 is None for line, _, _ in live):
            return "not live on the day: its go-live (M1) was not said"
        starts = [first for _, first, end in live if first < end]
        if starts and day < min(starts):
            return "not live on the day: before its go-live (M1)"
        return "not live on the day: after its end"


def _takers(live: list[tuple[Line, int, int]], day: int) -> list[Line]:
    return [line for line, first, end in live if first <= day < end and line.price.at(day).is_on_demand]
