"""Hypothesis strategies for whole books: interchange lines of small worlds, with closes in between.

`books()` draws a world (orders, items, practices, ordering parties, two to five months around an edge of the
calendar), sets it up and lets things happen between its closes: mostly what RULES allows, some that it
refuses, some late, some twice. `shuffled(book)` is the same book as a stream might deliver it.

All days lie in 2023 to the spring of 2026, so that no usage is ahead of its arrival whenever the tests run.
What RULES leaves open is mostly avoided, so that two readings do not differ by it.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

Record = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

ARRIVAL = datetime(2029, 12, 31, tzinfo=UTC)
"""An arrival later than anything that happens in a book, for runs that shall not depend on the clock."""

# The first month of a world: the financial year's turn with the clock going forward (31 March 2024, 30 March
# 2025), a leap February, the clock going back (27 October 2024, 26 October 2025), an ordinary February, the
# year's turn.
STARTS = [(2024, 3), (2024, 2), (2024, 10), (2025, 2), (2023, 12), (2025, 9), (2024, 1)]
PRACTICES = ["A83005", "B81001", "Y00001", "A83006"]
PARTIES = ["QOP", "QHM"]
SUB_ICB = "00L"
ITEMS = ["10000-001", "10000-S-036", "10052-002A001"]
PRICES = [
    "1.26",
    "0.017",
    "37.92",
    "0.28",
    "0.333333",
    "100",
    "0.84",
    "650",
    "0.005",
    "0.000123",
    "207.92",
    "0.01",
    "0",
]
QUANTITIES = ["3", "1", "7", "0.5", "8461", "0.333333", "12", "115", "100000", "0", "1000000.000001"]
USED = ["3", "1", "0.5", "1000", "7", "0.000001", "50", "33.333333", "250000", "0"]
LISTS = [8461, 10000, 1, 7, 12345, 0, 3333]
SHARES = ["0.5", "0.333333", "0.1", "0.25", "0.521739", "1", "0.437", "0"]
CAPS = ["1.61", "0.35", "0.01", "12.6", "0"]
ALLOCATIONS = ["1000", "5", "0.03", "250.005", "100000", "0", "33.33"]
PER_HEAD = ["1.61", "0.01", "0.1", "0"]
AMOUNTS = ["5", "0.01", "100", "33.333333", "2500", "0.005"]
BOUNDS = ["10", "0.1", "100", "1000", "0", "33.33"]
INCLUDED = ["5", "0.5", "100", "0", "3"]
CLOCKS = ["12:00:00Z", "23:30:00Z", "00:00:00+01:00", "23:59:59.999999Z", "00:30:00+01:00", "01:30:00Z"]
CALCULATIONS = ["cumulative", "volume", "single_fixed"]


@dataclass(frozen=True)
class Features:
    """What may happen in a book; each is an argument of `books`."""

    tiers: bool = True
    day_counts: bool = True
    bounds: bool = True
    caps: bool = True
    credits: bool = True
    acceptance: bool = True
    amendments: bool = True
    period_events: bool = True
    usage: bool = True
    one_offs: bool = True
    allocations: bool = True
    novation: bool = True
    endings: bool = True
    retractions: bool = True
    repricing: bool = True
    duplicates: bool = True
    invalid: bool = True


FULL_ONLY = ("tiers", "day_counts", "bounds", "caps", "credits", "acceptance", "amendments")
"""What `flat_only` leaves out."""


@dataclass
class Ordered:
    """What the builder remembers of an order: its header, its lines, and whether it may still be amended."""

    header: Record
    lines: dict[tuple[str, str], Record]
    placements: list[str]
    revision: int = 1
    replaced: bool = False
    retracted: bool = False


@dataclass
class World:
    """A book in the making."""

    draw: Draw
    features: Features
    start: tuple[int, int]
    months: int
    practices: list[str]
    parties: list[str]
    items: list[str]
    shapes: dict[str, Record]
    orders: dict[str, Ordered] = field(default_factory=dict)
    book: list[Record] = field(default_factory=list)
    change_ids: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)
    count: int = 0

    # -- small draws

    def pick(self, *choices: Any) -> Any:
        """One of the choices; the first is the simplest."""
        return self.draw(st.sampled_from(choices))

    def maybe(self, percent: int) -> bool:
        """True in so many of a hundred cases."""
        return bool(self.draw(st.integers(0, 99)) >= 100 - percent)

    def period(self, number: int) -> str:
        """The world's months, numbered from 0."""
        year, month = self.start[0], self.start[1] - 1 + number
        return f"{year + month // 12:04d}-{month % 12 + 1:02d}"

    def day(self, first: int = -2, last: int | None = None) -> str:
        """A day of the world: an edge of a month, the day a clock changes, or any."""
        months = range(first, self.months + 1 if last is None else last + 1)
        order = sorted(months, key=lambda number: (number < 0, number))
        year, month = map(int, self.period(self.pick(*order)).split("-"))
        length = calendar.monthrange(year, month)[1]
        last_sunday = length - (date(year, month, length).weekday() + 1) % 7
        number = self.pick(1, length, 15, last_sunday, 2, self.draw(st.integers(1, length)))
        return date(year, month, number).isoformat()

    def new_id(self, letter: str) -> str:
        """An id that was not used before."""
        self.count += 1
        return f"{letter}{self.count}"

    def recorded(self) -> str:
        """When a change was recorded: it only informs."""
        return f"{self.day()}T09:00:00Z"

    # -- the records

    def contract(self, order: str, kind: str, body: Record, target: str = "") -> str:
        """Appends a contract change and returns its id."""
        change_id = self.new_id("c")
        value = {
            "id": change_id,
            "order_number": order,
            "recorded_at": self.recorded(),
            "change": {kind: body},
        }
        self.book.append({"topic": "contract-changes", "value": value})
        self.change_ids.setdefault(("order_number", order), []).append((change_id, target or kind))
        return change_id

    def reference(self, code: str, kind: str, body: Record, target: str = "") -> str:
        """Appends a reference change and returns its id."""
        change_id = self.new_id("r")
        value = {"id": change_id, "code": code, "recorded_at": self.recorded(), "change": {kind: body}}
        self.book.append({"topic": "reference-changes", "value": value})
        self.change_ids.setdefault(("code", code), []).append((change_id, target or kind))
        return change_id

    # -- prices and funding

    def price(self, shape: Record) -> Record:
        """A price of an item's shape: what `PriceAgreed` may not change stays."""
        price = dict(shape)
        tiered = self.features.tiers and self.maybe(50)
        price["type"] = "tiered" if tiered else "flat"
        price["calculation"] = self.pick(*CALCULATIONS) if tiered else "cumulative"
        tiers: list[Record] = []
        start = 1
        for _ in range(self.draw(st.integers(1, 4)) if tiered else 1):
            if tiers:
                start += self.pick(10, 1, 100, 8000, 3)
                tiers[-1]["to"] = str(start - 1)
            tiers.append({"from": str(start), "price": self.pick(*PRICES)})
        price["tiers"] = tiers
        if shape["provisioning"] == "on_demand" and self.features.bounds:
            if self.maybe(40):
                price["included"] = self.pick(*INCLUDED)
            low, high = sorted([self.pick(*BOUNDS), self.pick(*BOUNDS)], key=float)
            if self.maybe(30):
                price["minimum"] = low
            if self.maybe(30):
                price["maximum"] = high
        return price

    def funding(self) -> list[Record]:
        """A waterfall: shares, a cap, the allocation, and the rest."""
        entries: list[Record] = []
        payers = ["NHSE", "@ordering_party", "LOCAL", "FUND", self.parties[0]]
        left = 1000000
        for _ in range(self.draw(st.integers(0, 3))):
            kinds = ["share"]
            if self.features.allocations and all(entry["take"] != "allocation" for entry in entries):
                kinds = ["allocation", "share"]
            if self.features.caps:
                kinds.append("per_patient_year")
            kind = self.pick(*kinds)
            take: Any = kind
            if kind == "share":
                share = self.pick(*SHARES)
                if round(float(share) * 1000000) > left:
                    continue
                left -= round(float(share) * 1000000)
                take = {"share": share}
            elif kind == "per_patient_year":
                take = {"per_patient_year": self.pick(*CAPS)}
            entries.append({"payer": payers.pop(self.pick(*range(len(payers)))), "take": take})
        payer = "@ordering_party" if "@ordering_party" in payers else payers[0]
        return [*entries, {"payer": payer, "take": "rest"}]

    # -- setting up

    def order_line(self, item: str, practice: str) -> Record:
        """A line of an order."""
        line: Record = {"item_id": item, "ods_code": practice}
        if self.maybe(90):
            line["quantity"] = self.pick(*QUANTITIES)
        line["price"] = self.price(self.shapes[item])
        line["funding"] = self.funding()
        return line

    def place_order(self, order: str) -> None:
        """Places an order with one to four lines, which mostly go live."""
        header: Record = {
            "ordering_party": self.pick(*self.parties),
            "supplier_id": self.pick("10000", "10052"),
            "framework": "GPITF",
            "commencement": self.day(-2, 0),
            "vat_rate": "20",
        }
        if self.maybe(30):
            header["term_months"] = self.pick(36, 3, 1, 2)
        pairs = [(item, practice) for item in self.items for practice in self.practices]
        chosen = self.draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=4, unique=True))
        lines = {pair: self.order_line(*pair) for pair in chosen}
        body = {"order_id": f"{order}-01", **header, "lines": list(lines.values())}
        placement = self.contract(order, "OrderPlaced", body)
        self.orders[order] = Ordered(header, lines, [placement])
        for pair in chosen:
            self.go_live(order, pair)

    def go_live(self, order: str, pair: tuple[str, str]) -> None:
        """M1, mostly early, and mostly M2."""
        body = {"item_id": pair[0], "ods_code": pair[1]}
        if self.maybe(92):
            went_live = f"{self.period(0)}-01" if self.maybe(50) else self.day(-2, 1)
            self.contract(order, "MilestoneReached", body | {"milestone": "M1", "date": went_live})
        if self.maybe(75):
            self.contract(order, "MilestoneReached", body | {"milestone": "M2", "date": self.day(-1, 1)})

    def set_up(self, orders: int) -> None:
        """What a book begins with: memberships, list sizes, allocations and orders."""
        for practice in self.practices:
            if self.maybe(80):
                self.list_size(practice)
        if self.features.allocations:
            for _ in range(self.draw(st.integers(0, 3))):
                self.membership()
            for _ in range(self.draw(st.integers(1, 3))):
                self.allocation()
        for number in range(orders):
            self.place_order(f"C01000{number + 1}")

    # -- what may happen between two closes

    def some_line(self) -> tuple[str, str, str]:
        """A line of one of the orders."""
        order = self.pick(*self.orders)
        item, practice = self.pick(*self.orders[order].lines)
        return order, item, practice

    def line_body(self, named: int = 100) -> tuple[str, Record]:
        """An order, and the fields that name one of its lines; the practice in so many of a hundred cases."""
        order, item, practice = self.some_line()
        body = {"item_id": item}
        if self.maybe(named):
            body["ods_code"] = practice
        return order, body

    def list_size(self, practice: str | None = None) -> None:
        """A list size: a snapshot of a first, or of any day."""
        code = practice or self.pick(*self.practices)
        as_of = self.day() if self.maybe(20) else self.day()[:8] + "01"
        self.reference(code, "ListSize", {"ods_code": code, "as_of": as_of, "patients": self.pick(*LISTS)})

    def membership(self) -> None:
        """A membership: practices under a sub-ICB or a party, the sub-ICB under a party."""
        code = self.pick(*self.practices, SUB_ICB)
        parent = self.pick(*self.parties) if code == SUB_ICB else self.pick(*self.parties, SUB_ICB)
        body = {"ods_code": code, "kind": "commissioner", "parent": parent, "from": self.day(-2, 0)}
        if self.maybe(10):
            body["kind"] = "pcn"
        if self.maybe(30):
            body["to"] = max(self.day(), (date.fromisoformat(body["from"]) + timedelta(1)).isoformat())
        self.reference(code, "Membership", body)

    def allocation(self) -> None:
        """An allocation of a party, or the national one."""
        if not self.features.allocations:
            return self.list_size()
        year = int(self.period(0)[:4]) - self.pick(0, 1)
        if self.maybe(40):
            body = {"financial_year": year, "per_patient": self.pick(*PER_HEAD), "as_of": self.day(-2, 0)}
            self.reference("ENGLAND", "Allocation", body)
        else:
            party = self.pick(*self.parties)
            body = {"ordering_party": party, "financial_year": year, "amount": self.pick(*ALLOCATIONS)}
            self.reference(party, "Allocation", body)
        return None

    def milestone(self) -> None:
        """A milestone is said or said again."""
        order, body = self.line_body()
        body |= {"milestone": self.pick("M1", "M2", "M2"), "date": self.day()}
        self.contract(order, "MilestoneReached", body)

    def quantity_changed(self) -> None:
        """A quantity changes."""
        order, body = self.line_body()
        self.contract(
            order, "QuantityChanged", body | {"quantity": self.pick(*QUANTITIES), "from": self.day()}
        )

    def price_agreed(self) -> None:
        """A price changes, mostly from a first."""
        if not self.features.repricing:
            return self.quantity_changed()
        order, body = self.line_body(named=60)
        start = self.day() if self.maybe(30) else self.day()[:8] + "01"
        price = self.price(self.shapes[body["item_id"]])
        self.contract(order, "PriceAgreed", body | {"price": price, "from": start})
        return None

    def funding_changed(self) -> None:
        """A waterfall changes."""
        order, body = self.line_body(named=60)
        self.contract(order, "FundingChanged", body | {"funding": self.funding(), "from": self.day()})

    def ending(self) -> None:
        """A line, an order or a practice ends."""
        if not self.features.endings:
            return self.quantity_changed()
        order, body = self.line_body()
        kind = self.pick(
            "LineCeased", "PracticeClosed", "PracticeMerged", "OrderTerminated", "PracticeOpened"
        )
        day = self.day(0)
        if kind == "LineCeased":
            self.contract(order, kind, body | {"date": day})
        elif kind == "OrderTerminated":
            self.contract(order, kind, {"date": day})
        else:
            practice = body["ods_code"]
            told = {"ods_code": practice, "date": day}
            if kind == "PracticeMerged":
                told["into"] = "Y99999"
            self.reference(practice, kind, told)
        return None

    def novated(self) -> None:
        """Another ordering party takes an order over."""
        if not self.features.novation:
            return self.funding_changed()
        body = {"ordering_party": self.pick(*PARTIES), "from": self.day()}
        self.contract(self.pick(*self.orders), "PartyNovated", body)
        return None

    def credited(self) -> None:
        """A service credit."""
        if not self.features.credits:
            return self.quantity_changed()
        order, body = self.line_body(named=50)
        body |= {"amount": self.pick(*AMOUNTS), "date": self.day(), "reason": "slow"}
        self.contract(order, "ServiceCredit", body)
        return None

    def service_accepted(self) -> None:
        """An item's requirement is met for a time."""
        if not self.features.acceptance:
            return self.quantity_changed()
        item = self.pick(*self.items)
        body = {"item_id": item, "requirement": self.pick("C5", "C11"), "from": self.day(-2, 1)}
        if self.maybe(50):
            body["to"] = max(self.day(), (date.fromisoformat(body["from"]) + timedelta(1)).isoformat())
        self.reference(item, "ServiceAccepted", body)
        return None

    def amended(self) -> None:
        """A revision adds a line to an order; some repeat one and are refused."""
        order = self.pick(*self.orders)
        told = self.orders[order]
        pairs = [(item, practice) for item in self.items for practice in PRACTICES]
        free = [pair for pair in pairs if pair not in told.lines]
        if not self.features.amendments or told.retracted or not free or told.revision > 90:
            return self.funding_changed()
        pair = self.pick(*free)
        line = self.order_line(*pair)
        lines = [line]
        repeats = self.features.invalid and self.maybe(10)
        if repeats:
            lines.append(self.order_line(*next(iter(told.lines))))
        told.revision += 1
        body = {"order_id": f"{order}-{told.revision:02d}", **told.header, "lines": lines}
        placement = self.contract(order, "OrderPlaced", body)
        if repeats:
            self.change_ids["order_number", order].pop()
        else:
            told.lines[pair] = line
            told.placements.append(placement)
            self.go_live(order, pair)
        return None

    def retracted(self) -> None:
        """A change is retracted, a retraction too; now and then an order, which is then mostly placed
        anew."""
        if not self.features.retractions:
            return self.list_size()
        space, key = self.pick(*self.change_ids)
        ids = self.change_ids[space, key]
        change_id, kind = ids[self.draw(st.integers(0, len(ids) - 1))]
        told = self.orders.get(key)
        if told is not None and kind == "OrderPlaced":
            if len(told.placements) > 1 or told.replaced or not self.maybe(40):
                return self.milestone()
            told.retracted = True
        say = self.contract if space == "order_number" else self.reference
        target = "OrderPlaced" if kind == "OrderPlaced" else "Retracted"
        retraction = say(key, "Retracted", {"change_id": change_id}, target)
        if told is not None and kind == "OrderPlaced":
            self.after_order_retracted(key, told, retraction)
        return None

    def after_order_retracted(self, order: str, told: Ordered, retraction: str) -> None:
        """The order is placed anew with other prices, or its retraction is retracted."""
        told.replaced = True
        if self.maybe(50):
            lines = [self.order_line(*pair) for pair in told.lines]
            body = {"order_id": f"{order}-01", **told.header, "lines": lines}
            told.placements = [self.contract(order, "OrderPlaced", body)]
            told.retracted = False
        elif self.maybe(50):
            self.contract(order, "Retracted", {"change_id": retraction}, "OrderPlaced")
            told.retracted = False

    def used(self) -> None:
        """Usage: mostly of a line that is charged by it; new, revised, cancelled, or in a batch."""
        if not self.features.usage:
            return self.list_size()
        _, item, practice = self.some_line()
        metered = [i for i in self.items if self.shapes[i]["provisioning"] == "on_demand"]
        if metered and item not in metered and self.maybe(90):
            wanted = [pair for told in self.orders.values() for pair in told.lines if pair[0] in metered]
            item, practice = self.pick(*wanted) if wanted else (item, practice)
        supplier = item[:5]
        parts = []
        for _ in range(self.draw(st.integers(1, 3))):
            part = {
                "id": self.pick("u1", "u2", "u3") if self.maybe(30) else self.new_id("u"),
                "item_id": item,
                "quantity": self.pick(*USED),
                "occurred_at": f"{self.day(-1)}T{self.pick(*CLOCKS)}",
            }
            if self.maybe(50):
                part["revision"] = self.draw(st.integers(0, 3))
            parts.append(part)
        topic = self.pick("usage", f"usage.{supplier}")
        head = {"supplier_id": supplier, "ods_code": practice}
        if self.maybe(30):
            value: Record = {"UsageBatch": head | {"usages": parts}}
            self.book.append({"topic": topic, "value": value})
        else:
            self.book.extend({"topic": topic, "value": head | part} for part in parts)
        return None

    def duplicate(self) -> None:
        """A record comes again."""
        if self.features.duplicates:
            again = [line for line in self.book if "topic" in line]
            self.book.append(again[self.draw(st.integers(0, len(again) - 1))])

    def period_event(self) -> None:
        """What a supplier reports of a period; it moves no money."""
        if self.features.period_events:
            event = {"supplier_id": "10000", "period": self.period(0), "count": 3, "quantity": "12.5"}
            self.book.append({"topic": "period-events", "value": {"UsageComplete": event}})

    def wrong(self) -> None:
        """Something that must be refused, and replace nothing."""
        if not self.features.invalid:
            return self.list_size()
        self.pick(self.wrong_usage, self.wrong_change, self.wrong_reference)()
        return None

    def wrong_usage(self) -> None:
        """A usage that is refused."""
        value: Record = {
            "id": self.pick("u1", "u2", "u3"),
            "revision": 9,
            "supplier_id": "10000",
            "ods_code": self.pick(*self.practices),
            "item_id": "10000-001",
            "quantity": "5",
            "occurred_at": f"{self.day(-1)}T12:00:00Z",
        }
        wrongs: list[Record] = [
            {"quantity": "-1"},
            {"quantity": "NaN"},
            {"quantity": 2.5},
            {"quantity": "0.0000001"},
            {"quantity": "1000000000000"},
            {"quantity": None},
            {"occurred_at": f"{self.day(-1)}T12:00:00"},
            {"occurred_at": "1999-12-31T23:59:59Z"},
            {"occurred_at": "2199-01-01T00:00:00Z"},
            {"item_id": "10052-001"},
            {"supplier_id": "10052"},
        ]
        value |= self.pick(*wrongs)
        if self.maybe(20):
            head = {key: value.pop(key) for key in ("supplier_id", "ods_code")}
            value = {"UsageBatch": head | {"usages": [value]}}
        self.book.append({"topic": self.pick("usage", "usage.10000"), "value": value})

    def wrong_change(self) -> None:
        """A contract change that is refused."""
        order, item, practice = self.some_line()
        line = {"item_id": item, "ods_code": practice}
        price = self.price(self.shapes[item])
        day = self.day()
        rest = {"payer": "X", "take": "rest"}
        cases: list[tuple[str, Record]] = [
            ("PriceAgreed", line | {"price": price | {"unit": "another"}, "from": day}),
            ("PriceAgreed", line | {"price": price | {"tiers": []}, "from": day}),
            ("PriceAgreed", line | {"price": price | {"tiers": [{"from": "1", "price": 1.5}]}, "from": day}),
            ("PriceAgreed", line | {"price": price | {"minimum": "2", "maximum": "1"}, "from": day}),
            ("FundingChanged", line | {"funding": [], "from": day}),
            ("FundingChanged", line | {"funding": [rest, {"payer": "Y", "take": "rest"}], "from": day}),
            (
                "FundingChanged",
                line | {"funding": [{"payer": "Y", "take": {"share": "1.1"}}, rest], "from": day},
            ),
            ("FundingChanged", line | {"funding": [{"payer": "X", "take": "allocation"}, rest], "from": day}),
            ("QuantityChanged", line | {"quantity": "-1", "from": day}),
            ("QuantityChanged", line | {"quantity": "1", "from": "2024-02-30"}),
            ("MilestoneReached", {"item_id": item, "ods_code": "Z00000", "milestone": "M1", "date": day}),
            ("MilestoneReached", line | {"milestone": "M3", "date": day}),
            ("LineCeased", {"item_id": "10000-999", "ods_code": practice, "date": day}),
            ("ServiceCredit", line | {"amount": "0", "date": day, "reason": "none"}),
            ("Retracted", {"change_id": "nobody"}),
            ("OrderForgotten", {"date": day}),
        ]
        if self.maybe(20):
            return self.conflict(order, day)
        kind, body = self.pick(*cases)
        self.contract(order, kind, body)
        self.change_ids["order_number", order].pop()
        return None

    def conflict(self, order: str, day: str) -> None:
        """The id of an earlier change with other content: the first stands."""
        self.contract(order, "OrderTerminated", {"date": day})
        self.change_ids["order_number", order].pop()
        earlier, kind = self.pick(*self.change_ids["order_number", order])
        if kind != "OrderTerminated":
            self.book[-1]["value"]["id"] = earlier

    def wrong_reference(self) -> None:
        """A reference change that is refused."""
        practice = self.pick(*self.practices)
        cases: list[tuple[str, Record]] = [
            ("ListSize", {"ods_code": "Z00000", "as_of": self.day(), "patients": 5}),
            ("ListSize", {"ods_code": practice, "as_of": self.day(), "patients": -5}),
            ("ListSize", {"ods_code": practice, "as_of": self.day(), "patients": "5"}),
            ("PracticeClosed", {"ods_code": practice}),
            ("Retracted", {"change_id": "nobody"}),
        ]
        kind, body = self.pick(*cases)
        self.reference(practice, kind, body)
        ids = self.change_ids["code", practice]
        ids.pop()
        if not ids:
            del self.change_ids["code", practice]

    def happens(self) -> None:
        """One thing happens."""
        self.pick(
            self.used,
            self.list_size,
            self.milestone,
            self.used,
            self.price_agreed,
            self.quantity_changed,
            self.funding_changed,
            self.used,
            self.ending,
            self.novated,
            self.credited,
            self.credited,
            self.service_accepted,
            self.amended,
            self.retracted,
            self.retracted,
            self.used,
            self.allocation,
            self.membership,
            self.duplicate,
            self.wrong,
            self.period_event,
        )()


def shape_of(draw: Draw, features: Features) -> Record:
    """What of an item's price never changes: provisioning, unit, time unit and day count."""
    kinds = [("patient", "year"), ("declarative", "month"), ("declarative", "year"), ("patient", "month")]
    if features.usage:
        kinds = [("on_demand", "none"), *kinds, ("on_demand", "none")]
    if features.one_offs:
        kinds += [("declarative", "none"), ("patient", "none")]
    provisioning, time_unit = draw(st.sampled_from(kinds))
    day_counts = ["month", "actual/365", "actual/actual"] if features.day_counts else ["month"]
    return {
        "provisioning": provisioning,
        "unit": "unit",
        "time_unit": time_unit,
        "day_count": draw(st.sampled_from(day_counts)),
    }


@st.composite
def _books(draw: Draw, features: Features, max_events: int) -> list[Record]:
    """The book of a world."""
    items = ITEMS[: draw(st.integers(1, 3))]
    world = World(
        draw=draw,
        features=features,
        start=draw(st.sampled_from(STARTS)),
        months=draw(st.integers(2, 5)),
        practices=PRACTICES[: draw(st.integers(1, 4))],
        parties=PARTIES[: draw(st.integers(1, 2))],
        items=items,
        shapes={item: shape_of(draw, features) for item in items},
    )
    world.set_up(orders=draw(st.integers(1, 3)))
    first = draw(st.sampled_from([0, 0, 0, 1]))
    for number in range(first, world.months):
        for _ in range(draw(st.integers(0, max_events))):
            world.happens()
        world.book.append({"close": world.period(number)})
    for _ in range(draw(st.integers(0, 2))):
        world.happens()
    return world.book


def books(
    *, flat_only: bool = False, max_events: int = 6, **switches: bool
) -> st.SearchStrategy[list[Record]]:
    """Whole books with closes in between; a switch is the name of one of `Features`.

    `flat_only` leaves out tiers, the day counts by actual days, included, minimum and maximum, caps, service
    credits, acceptance and amendments. `max_events` is the most that happens before each close.
    """
    unknown = switches.keys() - {feature.name for feature in fields(Features)}
    assert not unknown, f"no such feature: {unknown}"
    chosen = dict.fromkeys(FULL_ONLY, False) if flat_only else {}
    return _books(Features(**(chosen | switches)), max_events)


def usage_keys(line: Record) -> list[tuple[Any, ...]]:
    """The identities and revisions that a usage line speaks of."""
    value = line["value"]
    head = value.get("UsageBatch", value)
    return [
        (head.get("supplier_id"), head.get("ods_code"), part.get("id"), part.get("revision") or 0)
        for part in head.get("usages", [head])
    ]


def is_usage(line: Record) -> bool:
    """Whether a line of a book reports usage."""
    return str(line.get("topic", "")).startswith("usage")


@st.composite
def _shuffled(draw: Draw, book: list[Record]) -> list[Record]:
    """Each part of a book between two closes, mixed anew."""
    result: list[Record] = []
    part: list[Record] = []
    for line in [*book, None]:
        if line is None or "close" in line:
            result += mixed(draw, part)
            part = []
            if line is not None:
                result.append(line)
        else:
            part.append(line)
    return result


def mixed(draw: Draw, part: list[Record]) -> list[Record]:
    """The lines between two closes in another order: those that speak of the same revision of the same usage
    keep theirs, and all that is no usage keeps its own; some usage lines come twice."""
    chains: list[tuple[set[Any], list[tuple[int, Record]]]] = []
    for place, line in enumerate(part):
        keys: set[Any] = set(usage_keys(line)) if is_usage(line) else {"no usage"}
        members = [(place, line)]
        for chain in [chain for chain in chains if chain[0] & keys]:
            chains.remove(chain)
            keys |= chain[0]
            members += chain[1]
        chains.append((keys, sorted(members, key=lambda member: member[0])))
    waiting: list[list[Record]] = []
    for keys, members in chains:
        lines = [line for _, line in members]
        if "no usage" not in keys:
            lines += [line for line in lines if draw(st.integers(0, 3)) == 0]
        waiting.append(lines)
    turns = draw(st.permutations([index for index, lines in enumerate(waiting) for _ in lines]))
    return [waiting[index].pop(0) for index in turns]


def shuffled(book: list[Record]) -> st.SearchStrategy[list[Record]]:
    """The same book as another stream might deliver it: between two closes its usage lines are shuffled
    (copies that conflict keep their order) and a part of them is doubled. It must come to the same money."""
    return _shuffled(book)
