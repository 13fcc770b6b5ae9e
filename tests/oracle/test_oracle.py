"""The oracle against figures worked by hand, and against what RULES promises of every book."""

from __future__ import annotations

import copy
from collections import Counter
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .oracle import CloseRefused, Result, add_months, largest_remainder, round_payers, round_pence, run
from .strategies import ARRIVAL, books, shuffled

ITEM = "10000-001"
A, B = "A83005", "B81001"
NHSE_REST = [{"payer": "NHSE", "take": "rest"}]
CAREFUL = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
Json = dict[str, Any]


class Log:
    """Writes interchange lines, each change with an id of its own."""

    def __init__(self) -> None:
        """An empty log."""
        self.lines: list[Json] = []

    def say(self, key: str, kind: str, change_id: str = "", /, **body: Any) -> str:
        """A contract change where the key is an order number, else a reference change; `from_` is `from`."""
        body = {name.rstrip("_"): value for name, value in body.items()}
        order = key[0] == "C" and len(key) == 7
        change_id = change_id or f"x{len(self.lines)}"
        value = {
            "id": change_id,
            "order_number" if order else "code": key,
            "recorded_at": "2026-03-01T09:00:00Z",
            "change": {kind: body},
        }
        self.lines.append({"topic": "contract-changes" if order else "reference-changes", "value": value})
        return change_id

    def order(
        self, *lines: Json, number: str = "C010001", live: str | None = "2026-04-01", **header: Any
    ) -> str:
        """Places an order whose lines all go live and are stable on a day."""
        head = {
            "order_id": f"{number}-01",
            "ordering_party": "QOP",
            "supplier_id": "10000",
            "framework": "GPITF",
            "commencement": "2026-04-01",
            "vat_rate": "20",
        }
        change_id = self.say(number, "OrderPlaced", **(head | header), lines=list(lines))
        for line in lines if live else ():
            for milestone in ("M1", "M2"):
                self.milestone(line, milestone, str(live), number)
        return change_id

    def milestone(self, line: Json, milestone: str, day: str, number: str = "C010001") -> str:
        """A milestone of a line."""
        named = {"item_id": line["item_id"], "ods_code": line["ods_code"]}
        return self.say(number, "MilestoneReached", **named, milestone=milestone, date=day)

    def use(self, quantity: Any, when: str, **other: Any) -> None:
        """Usage of the item by the first practice, unless told otherwise."""
        value = {
            "id": f"u{len(self.lines)}",
            "supplier_id": "10000",
            "ods_code": A,
            "item_id": ITEM,
            "quantity": quantity,
            "occurred_at": when if "T" in when else f"{when}T12:00:00Z",
        }
        self.lines.append({"topic": "usage", "value": value | other})

    def close(self, period: str) -> None:
        """A close at this place."""
        self.lines.append({"close": period})

    def run(self, *closes: str) -> Result:
        """What it comes to."""
        return run(self.lines, closes=closes, arrival=ARRIVAL)


def price(amount: str = "1", **other: Any) -> Json:
    """A flat declarative monthly price, unless told otherwise."""
    plain = {
        "type": "flat",
        "calculation": "cumulative",
        "provisioning": "declarative",
        "unit": "unit",
        "time_unit": "month",
        "day_count": "month",
        "tiers": [{"from": "1", "price": amount}],
    }
    return plain | other


def tiered(calculation: str, *tiers: tuple[str, str], **other: Any) -> Json:
    """A tiered price of (from, price)."""
    told: list[Json] = [{"from": start, "price": amount} for start, amount in tiers]
    for tier, following in pairwise(told):
        tier["to"] = str(Decimal(following["from"]) - 1)
    return price(type="tiered", calculation=calculation, tiers=told, **other)


PER_PATIENT = {"provisioning": "patient", "time_unit": "year"}
ON_DEMAND = {"provisioning": "on_demand", "time_unit": "none"}
ONE_OFF = {"time_unit": "none"}


def line(what: Json, ods_code: str = A, quantity: str | None = "1", **other: Any) -> Json:
    """A line of an order."""
    return {
        "item_id": ITEM,
        "ods_code": ods_code,
        "quantity": quantity,
        "price": what,
        "funding": NHSE_REST,
    } | other


def total(result: Result, **wanted: str) -> str:
    """The sum of all rows of all closes, or of those with a payer, a month, a practice or a period closed."""
    columns = {"order": 0, "item": 1, "ods": 2, "supplier": 3, "payer": 4, "month": 5, "kind": 6}
    rows = [
        row
        for close in result.closes
        if wanted.get("period") in (None, close.period)
        for row in close.lines
        if all(row[columns[name]] == value for name, value in wanted.items() if name in columns)
    ]
    return str(sum((Decimal(row[7]) for row in rows), Decimal("0.00")))


def months(first: int, count: int) -> list[str]:
    """Periods from a month of 2026 on."""
    return [f"{2026 + (first + n - 1) // 12}-{(first + n - 1) % 12 + 1:02d}" for n in range(count)]


# -- the worked figures


def test_twelve_months_sum_to_the_year() -> None:
    """1.26 x 8,461 from 1 April: 10,660.86, and no month more than a penny from another (end of section
    3)."""
    log = Log()
    log.order(line(price("1.26", **PER_PATIENT)))
    log.say(A, "ListSize", ods_code=A, as_of="2026-03-01", patients=8461)
    result = log.run(*months(4, 12))
    nets = [Decimal(close.lines[0][7]) for close in result.closes]
    assert sum(nets) == Decimal("10660.86")
    assert max(nets) - min(nets) <= Decimal("0.01")
    assert result.closes[0].lines == [
        ("C010001", ITEM, A, "10000", "NHSE", "2026-04", "charge", "888.41"),
    ]
    assert not result.refused


@pytest.mark.parametrize("live", ["2026-04-01", "2024-02-29", "2025-10-26"])
@pytest.mark.parametrize("amount", ["1.26", "0.28", "0.84", "0.22", "0.333333"])
def test_any_twelve_full_months_are_a_year(live: str, amount: str) -> None:
    """Any twelve full months sum to the yearly amount within a penny, and the first twelve exactly."""
    log = Log()
    log.order(line(price(amount, **PER_PATIENT), quantity="8461"), live=live, commencement=live)
    first = 12 * (int(live[:4]) - 2026) + int(live[5:7]) + (live[8:] != "01")
    closes = months(first, 14)
    result = log.run(*closes)
    yearly = Decimal(amount) * 8461
    for start in range(3):
        twelve = sum(Decimal(total(result, month=closes[start + n])) for n in range(12))
        assert abs(twelve - yearly) <= Decimal("0.01")
        if start == 0 and live == "2026-04-01":
            assert twelve == yearly.quantize(Decimal("0.01"))


def test_monthly_licence() -> None:
    """A licence of 37.92 a month; half of April from the 16th is 15 of 30 days."""
    log = Log()
    log.order(line(price("37.92")), live="2026-04-16")
    result = log.run("2026-04", "2026-05")
    assert [close.lines[0][7] for close in result.closes] == ["18.96", "37.92"]


def test_fragments() -> None:
    """An SMS fragment costs 0.017: 1,000 of them 17 pounds, three of them five pence."""
    log = Log()
    log.order(line(price("0.017", **ON_DEMAND)))
    log.use("1000", "2026-04-03")
    log.use("3", "2026-05-03")
    assert total(log.run("2026-04", "2026-05")) == "17.05"


def test_practice_merger_fee() -> None:
    """A one-off of 1,500 falls on the day of M1 and needs no M2 (rules 3.5, 3.8)."""
    log = Log()
    one_off = line(price("1500", **ONE_OFF))
    log.order(one_off, live=None)
    log.milestone(one_off, "M1", "2026-05-10")
    result = log.run("2026-04", "2026-05", "2026-06")
    assert [close.lines and close.lines[0][7] for close in result.closes] == [[], "1500.00", []]


# -- section 1: what is refused


def bad_usage(**other: Any) -> list[tuple[int, str]]:
    """What a run refuses of one usage."""
    log = Log()
    log.use(other.pop("quantity", "1"), other.pop("occurred_at", "2026-04-01"), **other)
    return log.run().refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"quantity": "-1"},
        {"quantity": "NaN"},
        {"quantity": "Infinity"},
        {"quantity": 1.5},
        {"quantity": True},
        {"quantity": None},
        {"quantity": ""},
        {"quantity": "0.0000001"},
        {"quantity": "1000000000000"},
        {"occurred_at": "2026-04-01T10:00:00"},
        {"occurred_at": "2026-04-31T10:00:00Z"},
        {"occurred_at": "2026-04-01T10:00:00.1234567Z"},
        {"occurred_at": "1999-12-31T23:59:59.999999Z"},
        {"occurred_at": "2030-01-01T00:00:00.000001Z"},
        {"item_id": "10052-001"},
        {"supplier_id": "10052"},
        {"revision": "1"},
        {"revision": 1.0},
        {"id": None},
        {"id": 7},
    ],
)
def test_usage_refused(wrong: Json) -> None:
    """Section 1: what is no usage goes to the dead letters, and the run goes on."""
    assert len(bad_usage(**wrong)) == 1


@pytest.mark.parametrize(
    "right",
    [
        {"quantity": "999999999999.999999000"},
        {"quantity": "0"},
        {"occurred_at": "2000-01-01T00:00:00Z"},
        {"occurred_at": "2030-01-01T01:00:00+01:00"},
        {"revision": None},
        {"revision": 3},
    ],
)
def test_usage_accepted(right: Json) -> None:
    """Section 1: the edges of what is allowed."""
    assert not bad_usage(**right)


def test_usage_of_another_topic() -> None:
    """Section 1: "a supplier other than the topic's" is refused."""
    log = Log()
    log.use("1", "2026-04-01")
    for topic, refused in (("usage.10000", 0), ("usage.10052", 1), ("usage.", 1), ("uses", 1)):
        log.lines[0]["topic"] = topic
        assert len(log.run().refused) == refused


def test_batch() -> None:
    """Section 1: in a `UsageBatch` each usage is accepted or refused by itself."""
    parts = [
        {"id": str(n), "item_id": ITEM, "quantity": quantity, "occurred_at": "2026-04-01T12:00:00Z"}
        for n, quantity in enumerate(["1", "-1", "2.50"])
    ]
    batch = {"UsageBatch": {"supplier_id": "10000", "ods_code": A, "usages": parts}}
    result = run([{"topic": "usage.10000", "value": batch}], arrival=ARRIVAL)
    assert [place for place, _ in result.refused] == [0]
    assert result.suspense == {("10000", A, ITEM, date(2026, 4, 1)): Fraction(7, 2)}


def test_identity_of_usage() -> None:
    """Section 1: the highest revision counts, a duplicate is dropped, a conflict refused, 0 cancels."""
    log = Log()
    log.use("5", "2026-04-01", id="u", revision=1)
    log.use("3", "2026-04-01", id="u")
    log.use("5.0", "2026-04-01T13:00:00+01:00", id="u", revision=1)
    log.use("6", "2026-04-01", id="u", revision=1)
    log.use("-6", "2026-04-01", id="u", revision=7)
    log.use("8", "2026-04-01", id="u", ods_code=B)
    log.use("9", "2026-04-01", id="v")
    log.use("0", "2026-04-01", id="v", revision=1)
    result = log.run()
    assert [place for place, _ in result.refused] == [3, 4]
    assert result.suspense == {
        ("10000", A, ITEM, date(2026, 4, 1)): 5,
        ("10000", B, ITEM, date(2026, 4, 1)): 8,
    }


def refused_price(what: Json) -> bool:
    """Whether an order with this price is refused."""
    log = Log()
    log.order(line(what), live=None)
    return bool(log.run().refused)


@pytest.mark.parametrize(
    "wrong",
    [
        price(1.26),  # type: ignore[arg-type]
        price("NaN"),
        price("1.1234567"),
        price("-1"),
        price(tiers=[]),
        price(tiers=[{"from": "1", "to": "5", "price": "1"}]),
        price(tiers=[{"from": "0", "price": "1"}]),
        price(tiers=[{"from": "1", "to": "5", "price": "1"}, {"from": "6", "price": "1"}]),
        tiered("cumulative", *((str(n), "1") for n in range(1, 9))),
        tiered("cumulative", ("1", "1"), ("1", "2")),
        price(type="tiered", tiers=[{"from": "1", "to": "4", "price": "1"}, {"from": "6", "price": "1"}]),
        price(type="tiered", calculation=None),
        price(provisioning="on_demand"),
        price(minimum="1"),
        price(included="1"),
        price("1", **ON_DEMAND, minimum="2", maximum="1"),
        price(time_unit="week"),
        price(unit=None),
    ],
)
def test_price_refused(wrong: Json) -> None:
    """Section 1: prices that contradict themselves."""
    assert refused_price(wrong)


@pytest.mark.parametrize(
    "right",
    [
        price(),
        price(calculation=None),
        tiered("volume", *((str(n), "1") for n in range(1, 8))),
        tiered("volume", ("1", "1"), ("1.5", "2")),
        price("1", **ON_DEMAND, minimum="1.0", maximum="1"),
        price(included=None),
    ],
)
def test_price_accepted(right: Json) -> None:
    """Section 1: prices at the edge of what is allowed."""
    assert not refused_price(right)


@pytest.mark.parametrize(
    ("funding", "refused"),
    [
        ([], True),
        ([{"payer": "X", "take": "allocation"}], True),
        ([{"payer": "X", "take": "rest"}, {"payer": "Y", "take": {"share": "0.5"}}], True),
        ([{"payer": "X", "take": {"share": "1.000001"}}, *NHSE_REST], True),
        ([{"payer": "X", "take": {"share": 0.5}}, *NHSE_REST], True),
        ([{"payer": "NHSE", "take": "allocation"}, *NHSE_REST], True),
        ([{"payer": "X", "take": "allocation"}, {"payer": "Y", "take": "allocation"}, *NHSE_REST], True),
        ([{"payer": "X", "take": {"share": "0.5", "per_patient_year": "1"}}, *NHSE_REST], True),
        ([{"payer": "X", "take": "all"}, *NHSE_REST], True),
        ([{"payer": "X", "take": {"share": "1"}}, *NHSE_REST], False),
        ([{"payer": "@ordering_party", "take": "allocation"}, {"payer": "QOP", "take": "rest"}], False),
    ],
)
def test_funding(funding: list[Json], refused: bool) -> None:
    """Section 1: waterfalls."""
    log = Log()
    log.order(line(price(), funding=funding), live=None)
    assert bool(log.run().refused) == refused


def test_orders() -> None:
    """Section 1: a revision only adds lines, repeats the header as written, and is placed once; a line
    too."""
    log = Log()
    log.order(line(price()), live=None)
    log.say("C010001", "PartyNovated", ordering_party="QNEW", from_="2026-05-01")
    log.order(line(price(), B), live=None, order_id="C010001-02", term_months=36)
    log.order(line(price(), "Y1"), live=None, order_id="C010001-03", ordering_party="QNEW")
    log.order(line(price(), "Y2"), live=None, order_id="C010001-02")
    log.order(line(price(), "Y3"), line(price(), B), live=None, order_id="C010001-04")
    log.order(line(price(), "Y4"), live=None, order_id="C010002-05")
    log.order(line(price()), live=None, number="C010009", order_id="C010009-02")
    result = log.run()
    assert [place for place, _ in result.refused] == [3, 4, 5, 6, 7]


def test_changes_of_what_is_not_there() -> None:
    """Section 1: a change that names a line the order does not have is refused; also before it is placed."""
    log = Log()
    wanted = line(price())
    log.milestone(wanted, "M1", "2026-04-01")
    log.order(wanted, live=None)
    log.milestone(line(price(), B), "M1", "2026-04-01")
    log.say("C010001", "FundingChanged", item_id="10000-002", funding=NHSE_REST, from_="2026-04-01")
    log.say("C010001", "Unheard", date="2026-04-01")
    log.say("C010001", "LineCeased", item_id=ITEM, ods_code=A)
    log.say("C010002", "OrderTerminated", date="2026-04-01")
    log.say(A, "ListSize", ods_code=B, as_of="2026-04-01", patients=3)
    log.say(A, "ListSize", ods_code=A, as_of="2026-04-01", patients="3")
    assert [place for place, _ in log.run().refused] == [0, 2, 3, 4, 5, 6, 7, 8]


def test_agreed_prices() -> None:
    """Section 1: what an agreed price may change, against the price in force on its day."""
    log = Log()
    log.order(line(price()), line(price(), B), live=None)
    agree: Json = {"item_id": ITEM}
    log.say("C010001", "PriceAgreed", **agree, price=price("2"), from_="2026-04-15")
    log.say("C010001", "PriceAgreed", **agree, price=tiered("volume", ("1", "2")), from_="2026-05-02")
    log.say(
        "C010001", "PriceAgreed", **agree, ods_code=A, price=tiered("volume", ("1", "2")), from_="2026-05-01"
    )
    log.say("C010001", "PriceAgreed", **agree, price=price("3"), from_="2026-05-02")
    log.say("C010001", "PriceAgreed", **agree, price=price("3"), from_="2026-04-30")
    for other in ({"unit": "x"}, {"time_unit": "year"}, {"day_count": "actual/365"}, PER_PATIENT):
        log.say("C010001", "PriceAgreed", **agree, price=price("3", **other), from_="2026-05-01")
    assert [place for place, _ in log.run().refused] == [2, 4, 6, 7, 8, 9]


def test_ids() -> None:
    """Section 1: a repeated id is a duplicate or a conflict; a refused change keeps its id."""
    log = Log()
    log.order(line(price("10")))
    log.say("C010001", "QuantityChanged", "q", item_id=ITEM, ods_code=A, quantity="2", from_="2026-04-01")
    log.say("C010001", "QuantityChanged", "q", item_id=ITEM, ods_code=A, quantity="2.0", from_="2026-04-01")
    log.say("C010001", "QuantityChanged", "q", item_id=ITEM, ods_code=A, quantity="3", from_="2026-04-01")
    log.say("C010001", "QuantityChanged", "b", item_id=ITEM, ods_code=B, quantity="4", from_="2026-04-01")
    log.say("C010001", "QuantityChanged", "b", item_id=ITEM, ods_code=A, quantity="5", from_="2026-04-01")
    log.say("C010001", "QuantityChanged", "b", item_id=ITEM, ods_code=B, quantity="4", from_="2026-04-01")
    result = log.run("2026-04")
    assert [place for place, _ in result.refused] == [5, 6, 7]
    assert total(result) == "20.00"


# -- section 2: timelines


def test_painting() -> None:
    """Rule 2.1: a later change overwrites from its day on, an earlier one shows before it."""
    log = Log()
    log.order(line(price("30")))
    for quantity, start in (("3", "2026-04-21"), ("2", "2026-04-11"), ("4", "2026-04-26")):
        log.say("C010001", "QuantityChanged", item_id=ITEM, ods_code=A, quantity=quantity, from_=start)
    # 10 days of 1, 15 of 2 (it overwrote the 3), 5 of 4.
    assert total(log.run("2026-04")) == "60.00"


def test_painted_and_single_facts_of_a_line_placed_anew() -> None:
    """Rules 2.1 and 2.3: what is painted acts on lines placed before it; milestones and novation on any."""
    log = Log()
    placed = log.order(line(price("30"), funding=[{"payer": "@ordering_party", "take": "rest"}]))
    log.say("C010001", "QuantityChanged", item_id=ITEM, ods_code=A, quantity="5", from_="2026-04-01")
    log.say("C010001", "PartyNovated", ordering_party="QNEW", from_="2026-04-01")
    log.say("C010001", "Retracted", change_id=placed)
    log.order(line(price("40"), funding=[{"payer": "@ordering_party", "take": "rest"}]), live=None)
    result = log.run("2026-04")
    assert total(result) == "40.00"
    assert total(result, payer="QNEW") == "40.00"


def test_list_sizes() -> None:
    """Rule 2.2: the latest snapshot holds, the later said of one day; before the first the ordered
    quantity."""
    log = Log()
    log.order(line(price("12", **PER_PATIENT), quantity="30"))
    for as_of, patients in (("2026-04-21", 50), ("2026-04-11", 40), ("2026-04-11", 20)):
        log.say(A, "ListSize", ods_code=A, as_of=as_of, patients=patients)
    # A pound a month: 10 days of 30, 10 of 20, 10 of 50.
    assert total(log.run("2026-04")) == "33.33"


def test_retractions() -> None:
    """Rule 2.4: as if never said; a retraction can be retracted; a redelivered change stays retracted."""
    log = Log()
    log.order(line(price("30")))
    change: Json = {"item_id": ITEM, "ods_code": A, "quantity": "2", "from_": "2026-04-01"}
    log.say("C010001", "QuantityChanged", "q", **change)
    log.say("C010001", "Retracted", "r", change_id="q")
    log.say("C010001", "QuantityChanged", "q", **change)
    log.close("2026-04")
    log.say("C010001", "Retracted", "s", change_id="r")
    log.close("2026-05")
    log.say("C010001", "Retracted", "t", change_id="s")
    log.close("2026-06")
    log.say("C010001", "Retracted", change_id="later")
    log.say("C010001", "Retracted", "self", change_id="self")
    result = log.run()
    assert [total(result, period=period) for period in months(4, 3)] == ["30.00", "90.00", "-30.00"]
    assert len(result.refused) == 2


def test_retraction_decides_nothing_anew() -> None:
    """Section 1: "a later retraction neither revives a refused change nor refuses an accepted one"."""
    log = Log()
    log.order(line(price("30")))
    tiers = tiered("volume", ("1", "60"))
    agreed = log.say("C010001", "PriceAgreed", item_id=ITEM, price=tiers, from_="2026-04-01")
    log.say("C010001", "PriceAgreed", item_id=ITEM, price=price("90"), from_="2026-04-16")
    log.say("C010001", "PriceAgreed", item_id=ITEM, price=tiered("volume", ("1", "120")), from_="2026-04-16")
    log.say("C010001", "Retracted", change_id=agreed)
    result = log.run("2026-04")
    assert [place for place, _ in result.refused] == [4]
    assert total(result) == "75.00"


# -- section 3: rating


def test_live_days() -> None:
    """Rule 3.1: each end is the first day no longer live, the earliest counts, the later said replaces."""
    ends: list[tuple[str, str, Json]] = [
        ("C010001", "LineCeased", {"item_id": ITEM, "ods_code": A}),
        ("C010001", "OrderTerminated", {}),
        (A, "PracticeClosed", {"ods_code": A}),
        (A, "PracticeMerged", {"ods_code": A, "into": B}),
    ]
    for key, kind, body in ends:
        log = Log()
        log.order(line(price("30")), line(price("30"), B))
        log.say(key, kind, **body, date="2026-04-05")
        log.say(key, kind, **body, date="2026-04-11")
        result = log.run("2026-04")
        assert total(result, ods=A) == "10.00"
        assert total(result, ods=B) == ("10.00" if kind == "OrderTerminated" else "30.00")


def test_term() -> None:
    """Rule 3.1: commencement + term, clamped; M1 before commencement counts."""
    assert add_months(date(2024, 1, 31), 1) == date(2024, 2, 29)
    assert add_months(date(2025, 1, 31), 1) == date(2025, 2, 28)
    assert add_months(date(2025, 12, 31), 2) == date(2026, 2, 28)
    assert add_months(date(2025, 1, 31), 10**7) is None
    log = Log()
    log.order(line(price("29")), live="2024-01-31", commencement="2024-01-31", term_months=1)
    # One day of January at 29/31, and 28 days of February at a pound.
    assert [total(log.run("2024-01", "2024-02", "2024-03"), month=m) for m in ("2024-01", "2024-02")] == [
        "0.94",
        "28.00",
    ]
    log = Log()
    log.order(line(price("31")), live="2026-03-01")
    assert total(log.run("2026-03")) == "31.00"


@pytest.mark.parametrize(
    ("what", "february", "march"),
    [
        (price("366", time_unit="year", day_count="actual/actual"), "29.00", "31.00"),
        (price("365", time_unit="year", day_count="actual/365"), "29.00", "31.00"),
        (price("30.5", day_count="actual/actual"), "29.00", "31.00"),
        (price("36.5", day_count="actual/365"), "34.80", "37.20"),
        (price("36.5", time_unit="year", day_count="month"), "3.04", "3.04"),
    ],
)
def test_day_counts(what: Json, february: str, march: str) -> None:
    """Rule 3.2: a day of a leap year."""
    log = Log()
    log.order(line(what), live="2024-02-01", commencement="2024-02-01")
    result = log.run("2024-02", "2024-03")
    assert [total(result, month="2024-02"), total(result, month="2024-03")] == [february, march]


@pytest.mark.parametrize(
    ("calculation", "first", "second"),
    [("cumulative", "55.00", "165.00"), ("volume", "30.00", "90.00"), ("single_fixed", "0.25", "0.75")],
)
def test_tiers_over_time(calculation: str, first: str, second: str) -> None:
    """Rules 3.2 and 3.4: 30 + 90 units: 100 at 2 and 20 at 1 is 220; 120 at 1; 1 once. Shared by quantity."""
    what = tiered(calculation, ("1", "2"), ("101", "1"))
    log = Log()
    log.order(line(what, quantity="30"), line(what, B, "90"))
    result = log.run("2026-04")
    assert [total(result, ods=A), total(result, ods=B)] == [first, second]


def test_tier_edges() -> None:
    """Rule 3.4: a tier holds the units up to and including the next `from` - 1; 0 costs nothing."""
    for quantity, volume in (("100", "200.00"), ("100.000001", "100.00"), ("0", "0.00")):
        log = Log()
        log.order(line(tiered("volume", ("1", "2"), ("101", "1")), quantity=quantity))
        assert total(log.run("2026-04")) == volume


def test_tiers_count_live_lines_only() -> None:
    """Rule 3.2: the total is of the lines that are live on the day."""
    what = tiered("volume", ("1", "3"), ("101", "1.5"))
    log = Log()
    log.order(line(what, quantity="60"), line(what, B, "60"))
    log.say("C010001", "LineCeased", item_id=ITEM, ods_code=B, date="2026-04-16")
    assert total(log.run("2026-04"), ods=A) == "135.00"


def test_london_days() -> None:
    """Rule 3.3: usage counts on its London day; before M1 it waits in suspense."""
    log = Log()
    on_demand = line(price("1", **ON_DEMAND))
    log.order(on_demand, live="2026-04-01")
    log.use("1", "2026-03-31T22:59:59.999999Z")
    log.use("2", "2026-03-31T23:00:00Z")
    log.use("4", "2026-04-30T23:59:59+01:00")
    log.use("8", "2026-04-30T23:00:00Z")
    log.close("2026-04")
    log.close("2026-05")
    log.milestone(on_demand, "M1", "2026-03-01")
    log.close("2026-06")
    result = log.run()
    assert [total(result, month=month) for month in months(3, 3)] == ["1.00", "6.00", "8.00"]
    assert total(result, period="2026-06") == "1.00"
    assert not result.suspense


def test_overlap() -> None:
    """Rule 3.3: the lowest order number takes what two orders could."""
    log = Log()
    for number, live in (("C010002", "2026-04-01"), ("C010001", "2026-04-10")):
        log.order(line(price("1", **ON_DEMAND)), number=number, live=live)
    log.use("1", "2026-04-09")
    log.use("2", "2026-04-10")
    result = log.run("2026-04")
    assert [total(result, order="C010001"), total(result, order="C010002")] == ["2.00", "1.00"]


def test_included() -> None:
    """Rule 3.3: the first units of the month are free and count towards no tier; a part month too."""
    log = Log()
    what = tiered("cumulative", ("1", "10"), ("4", "1"), **ON_DEMAND, included="5")
    log.order(line(what), live="2026-04-10")
    log.use("4", "2026-04-10")
    log.use("4", "2026-04-11")
    log.use("1", "2026-04-12")
    # Five are free; three at 10, one at 1.
    assert total(log.run("2026-04")) == "31.00"


def test_usage_tiers() -> None:
    """Rule 3.3: the tiers count the order's units of the month in day order; within a day all share alike."""
    for calculation, first, second in (
        # 10 units of A on the 1st, 5 + 15 on the 2nd; tiers of 20: 20 at 2, then 10 at 1 in the second day.
        ("cumulative", "27.50", "22.50"),
        ("volume", "15.00", "15.00"),
        ("single_fixed", "0.50", "0.50"),
    ):
        what = tiered(calculation, ("1", "2"), ("21", "1"), **ON_DEMAND)
        log = Log()
        log.order(line(what), line(what, B))
        log.use("10", "2026-04-01")
        log.use("5", "2026-04-02")
        log.use("15", "2026-04-02", ods_code=B)
        result = log.run("2026-04")
        assert [total(result, ods=A), total(result, ods=B)] == [first, second], calculation


def test_usage_tiers_with_a_price_that_changes() -> None:
    """Rule 3.3: each day's own price, but single-fixed takes the last of the month that is single-fixed."""
    for calculation, expected in (
        ("cumulative", "50.00"),  # 10 at 1, 10 at 4
        ("volume", "70.00"),  # the tier of 20: 10 at 2, 10 at 5
        ("single_fixed", "5.00"),
    ):
        log = Log()
        log.order(line(tiered(calculation, ("1", "1"), ("11", "2"), **ON_DEMAND)))
        dearer = tiered(calculation, ("1", "3"), ("11", "5"), **ON_DEMAND)
        if calculation == "cumulative":
            dearer = tiered(calculation, ("1", "3"), ("11", "4"), **ON_DEMAND)
        log.say("C010001", "PriceAgreed", item_id=ITEM, price=dearer, from_="2026-04-16")
        log.use("10", "2026-04-15")
        log.use("10", "2026-04-16")
        assert total(log.run("2026-04")) == expected


def test_minimum() -> None:
    """Rule 3.3: the minimum of the live days, used or not; the top-up accrues evenly over them."""
    funding = [{"payer": "FROM16", "take": "rest"}]
    log = Log()
    log.order(line(price("1", **ON_DEMAND, minimum="30")), live="2026-04-11")
    log.say("C010001", "FundingChanged", item_id=ITEM, funding=funding, from_="2026-04-16")
    log.use("10", "2026-04-12")
    result = log.run("2026-04")
    # 20 live days: 20 pounds, ten of them used on the 12th, ten as a top-up of 0.50 a day.
    assert [total(result, payer="NHSE"), total(result, payer="FROM16")] == ["12.50", "7.50"]


def test_maximum() -> None:
    """Rule 3.3: the maximum of the live days cuts every day by the same fraction; a day without lifts it."""
    log = Log()
    log.order(line(price("1", **ON_DEMAND, maximum="30")), live="2026-04-11")
    log.say(
        "C010001",
        "FundingChanged",
        item_id=ITEM,
        funding=[{"payer": "FROM16", "take": "rest"}],
        from_="2026-04-16",
    )
    log.use("10", "2026-04-12")
    log.use("30", "2026-04-30")
    log.close("2026-04")
    result = log.run()
    assert [total(result, payer="NHSE"), total(result, payer="FROM16")] == ["5.00", "15.00"]
    log.say("C010001", "PriceAgreed", item_id=ITEM, price=price("1", **ON_DEMAND), from_="2026-04-30")
    assert total(log.run("2026-05")) == "40.00"


def test_tiered_one_off() -> None:
    """Rule 3.5: tiered over the order's lines live that day at a one-off price; nothing if M1 is not live."""
    what = tiered("cumulative", ("1", "10"), ("3", "4"), **ONE_OFF)
    log = Log()
    log.order(line(what), line(what, B, "3"))
    log.say("C010001", "LineCeased", item_id=ITEM, ods_code=B, date="2026-04-01")
    result = log.run("2026-04")
    assert [total(result, ods=A), total(result, ods=B)] == ["10.00", "0.00"]
    log = Log()
    log.order(line(what), line(what, B, "3"))
    result = log.run("2026-04")
    assert [total(result, ods=A), total(result, ods=B)] == ["7.00", "21.00"]
    log.say("C010001", "LineCeased", item_id=ITEM, ods_code=B, date="2026-04-11")
    log.milestone(line(what), "M1", "2026-04-11")  # on the 1st B is alone: 10 + 10 + 4
    result = log.run("2026-04")
    assert [total(result, ods=A), total(result, ods=B)] == ["10.00", "24.00"]


def test_service_credits() -> None:
    """Rule 3.6: by quantity over the lines live on its date, over all if none is, equally if all are 0."""
    credit: Json = {"item_id": ITEM, "amount": "10", "reason": "outage"}
    log = Log()
    log.order(line(price("0"), quantity="1"), line(price("0"), B, "4"))
    log.say("C010001", "LineCeased", item_id=ITEM, ods_code=B, date="2026-05-01")
    log.say("C010001", "ServiceCredit", **credit, date="2026-04-30")
    log.say("C010001", "ServiceCredit", **credit, date="2026-05-01")
    log.say("C010001", "ServiceCredit", **credit, date="2026-03-31")
    log.say("C010001", "ServiceCredit", **credit, ods_code=B, date="2026-06-01")
    result = log.run("2026-06")
    assert [total(result, ods=A, month=month) for month in months(3, 4)] == [
        "-2.00",
        "-2.00",
        "-10.00",
        "0.00",
    ]
    assert [total(result, ods=B, month=month) for month in months(3, 4)] == [
        "-8.00",
        "-8.00",
        "0.00",
        "-10.00",
    ]
    log = Log()
    log.order(line(price("0"), quantity=None), line(price("0"), B, "0"), line(price("0"), "Y1", "0.00"))
    log.say("C010001", "ServiceCredit", **credit, date="2026-04-01")
    result = log.run("2026-04")
    assert [total(result, ods=code) for code in (A, B, "Y1")] == ["-3.33", "-3.33", "-3.33"]


def test_acceptance() -> None:
    """Rule 3.7: a day not accepted goes to `rest`; every requirement must cover it; intervals unite."""
    log = Log()
    log.order(
        line(price("30"), funding=[{"payer": "NHSE", "take": {"share": "1"}}, {"payer": "P", "take": "rest"}])
    )
    log.say(ITEM, "ServiceAccepted", item_id=ITEM, requirement="C5", from_="2026-04-01", to="2026-04-11")
    log.say(ITEM, "ServiceAccepted", item_id=ITEM, requirement="C5", from_="2026-04-06", to="2026-04-21")
    only = log.say(ITEM, "ServiceAccepted", item_id=ITEM, requirement="C11", from_="2026-04-16")
    assert total(log.run("2026-04"), payer="NHSE") == "5.00"
    log.say(ITEM, "Retracted", change_id=only)
    assert total(log.run("2026-04"), payer="NHSE") == "20.00"


def test_held_and_released() -> None:
    """Rules 3.8, 4.2, 4.4: held until M2, then released as adjustments; a moved M2 credits and holds
    again."""
    log = Log()
    wanted = line(price("30"))
    log.order(wanted, live=None)
    log.milestone(wanted, "M1", "2026-04-01")
    log.close("2026-04")
    stable = log.milestone(wanted, "M2", "2026-06-30")
    log.close("2026-05")
    log.close("2026-06")
    log.say("C010001", "Retracted", change_id=stable)
    log.close("2026-07")
    result = log.run()
    named = ("C010001", ITEM, A, "10000", "NHSE")
    assert [close.lines for close in result.closes] == [
        [],
        [],
        [
            (*named, "2026-04", "adjustment", "30.00"),
            (*named, "2026-05", "adjustment", "30.00"),
            (*named, "2026-06", "charge", "30.00"),
        ],
        [(*named, month, "adjustment", "-30.00") for month in months(4, 3)],
    ]
    assert [len(close.held) for close in result.closes] == [1, 2, 0, 4]
    assert result.closes[1].held[1] == (*named, "2026-05", "charge", "30.00")


def test_waterfall() -> None:
    """Rule 3.9: a share of the whole, a cap by patients, the allocation, the rest; each limited by what is
    left."""
    funding = [
        {"payer": "LOCAL", "take": {"share": "0.25"}},
        {"payer": "FUND", "take": {"per_patient_year": "1.2"}},
        {"payer": "NHSE", "take": "allocation"},
        {"payer": "@ordering_party", "take": "rest"},
    ]
    log = Log()
    log.order(line(price("100"), funding=funding))
    log.say(A, "ListSize", ods_code=A, as_of="2026-04-16", patients=400)
    log.say("QOP", "Allocation", ordering_party="QOP", financial_year=2026, amount="60")
    result = log.run("2026-04", "2026-05")
    # The cap is 40 a month, in April for 15 of 30 days and 0 before the first list size.
    for payer, april, may in (
        ("LOCAL", "25.00", "25.00"),
        ("FUND", "20.00", "40.00"),
        ("NHSE", "55.00", "5.00"),
        ("QOP", "0.00", "30.00"),
    ):
        assert [total(result, payer=payer, month=month) for month in months(4, 2)] == [april, may], payer


def test_cap_of_a_patient_line() -> None:
    """Rule 2.2: in the cap of a line priced per patient the ordered quantity stands in."""
    funding = [{"payer": "FUND", "take": {"per_patient_year": "1.2"}}, {"payer": "QOP", "take": "rest"}]
    log = Log()
    log.order(line(price("2.4", **PER_PATIENT), quantity="100", funding=funding))
    result = log.run("2026-04")
    assert [total(result, payer="FUND"), total(result, payer="QOP")] == ["10.00", "10.00"]


def test_negative_charge() -> None:
    """Rule 3.9: of a negative charge caps and allocation take nothing, a share its share, rest the rest."""
    funding = [
        {"payer": "LOCAL", "take": {"share": "0.25"}},
        {"payer": "FUND", "take": {"per_patient_year": "12"}},
        {"payer": "NHSE", "take": "allocation"},
        {"payer": "QOP", "take": "rest"},
    ]
    log = Log()
    log.order(line(price("10"), funding=funding))
    log.say(A, "ListSize", ods_code=A, as_of="2026-01-01", patients=400)
    log.say("QOP", "Allocation", ordering_party="QOP", financial_year=2026, amount="60")
    log.say("C010001", "ServiceCredit", item_id=ITEM, amount="50", date="2026-04-09", reason="outage")
    result = log.run("2026-04")
    assert [(row[4], row[7]) for row in result.closes[0].lines] == [("LOCAL", "-10.00"), ("QOP", "-30.00")]


def test_allocation_runs_dry() -> None:
    """Rule 3.9: in the month in which it runs dry all that draw get the same fraction; each year has its
    own."""
    funding = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]
    log = Log()
    log.order(line(price("30"), funding=funding), live="2026-03-01")
    log.order(line(price("90"), B, funding=funding), number="C010002", live="2026-03-01")
    for year, amount in ((2025, "60"), (2026, "150")):
        log.say("QOP", "Allocation", ordering_party="QOP", financial_year=year, amount=amount)
    result = log.run("2026-06")
    assert [total(result, payer="NHSE", ods=A, month=m) for m in months(3, 4)] == [
        "15.00",
        "30.00",
        "7.50",
        "0.00",
    ]
    assert [total(result, payer="NHSE", ods=B, month=m) for m in months(3, 4)] == [
        "45.00",
        "90.00",
        "22.50",
        "0.00",
    ]


def test_credits_give_nothing_back_to_the_allocation() -> None:
    """Rule 3.9: of a negative charge the allocation takes nothing, whoever else draws on it in the month."""
    funding = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]
    log = Log()
    log.order(line(price("30"), funding=funding), line(price("30"), B, funding=funding))
    log.say("QOP", "Allocation", ordering_party="QOP", financial_year=2026, amount="20")
    log.say(
        "C010001", "ServiceCredit", item_id=ITEM, ods_code=B, amount="130", date="2026-04-09", reason="slow"
    )
    rows = log.run("2026-04").closes[0].lines
    assert [(row[2], row[4], row[7]) for row in rows] == [
        (A, "NHSE", "20.00"),
        (A, "QOP", "10.00"),
        (B, "QOP", "-100.00"),
    ]


def test_held_lines_draw_too() -> None:
    """Rule 3.8: "Holding has no influence on rounding or on draw-down"."""
    funding = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]
    log = Log()
    log.order(line(price("30"), funding=funding))
    held = line(price("30"), B, funding=funding)
    log.order(held, number="C010002", live=None)
    log.milestone(held, "M1", "2026-04-01", "C010002")
    log.say("QOP", "Allocation", ordering_party="QOP", financial_year=2026, amount="30")
    result = log.run("2026-04")
    assert total(result, payer="NHSE") == "15.00"
    assert [row[7] for row in result.closes[0].held] == ["15.00", "15.00"]


def test_national_allocation() -> None:
    """Rule 3.9: per patient of the practices under the party through any number of parents, on a day; an
    amount for the party replaces it."""
    funding = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]
    log = Log()
    log.order(line(price("1000"), funding=funding))
    member: Json = {"kind": "commissioner", "from_": "2020-01-01"}
    log.say(A, "Membership", ods_code=A, parent="00L", **member)
    log.say("00L", "Membership", ods_code="00L", parent="QOP", **member)
    log.say(B, "Membership", ods_code=B, parent="QOP", **member)
    log.say("Y1", "Membership", ods_code="Y1", parent="QOP", kind="pcn", from_="2020-01-01")
    log.say("Y2", "Membership", ods_code="Y2", parent="QOP", **member, to="2026-04-01")
    log.say("QOP", "Membership", ods_code="QOP", parent="00L", **member)  # a circle harms nobody
    for code, patients in ((A, 100), (B, 20), ("Y1", 3000), ("Y2", 5000)):
        log.say(code, "ListSize", ods_code=code, as_of="2026-03-15", patients=patients)
    log.say(A, "ListSize", ods_code=A, as_of="2026-04-02", patients=7)
    log.say("ENGLAND", "Allocation", financial_year=2026, per_patient="1.5", as_of="2026-03-31")
    log.say("ENGLAND", "Allocation", financial_year=2026, per_patient="1.61", as_of="2026-04-01")
    assert total(log.run("2026-04"), payer="NHSE") == "193.20"
    amount = log.say("QOP", "Allocation", ordering_party="QOP", financial_year=2026, amount="1")
    log.say("ENGLAND", "Allocation", financial_year=2026, per_patient="2", as_of="2026-04-01")
    assert total(log.run("2026-04"), payer="NHSE") == "1.00"
    log.say("QOP", "Retracted", change_id=amount)
    assert total(log.run("2026-04"), payer="NHSE") == "240.00"


def test_novation() -> None:
    """Rules 2.1 and 3.9: another party pays and draws on its own allocation from the day on."""
    funding = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]
    log = Log()
    log.order(line(price("30"), funding=funding))
    log.say("QOP", "Allocation", ordering_party="QOP", financial_year=2026, amount="4")
    log.say("QNEW", "Allocation", ordering_party="QNEW", financial_year=2026, amount="7")
    log.close("2026-04")
    log.say("C010001", "PartyNovated", ordering_party="QNEW", from_="2026-04-11")
    result = log.run("2026-05")
    assert [total(result, payer=p, month="2026-04") for p in ("NHSE", "QOP", "QNEW")] == [
        "11.00",
        "6.00",
        "13.00",
    ]
    assert {row[6] for row in result.closes[1].lines if row[5] == "2026-04"} == {"adjustment"}


def test_rounding() -> None:
    """Rule 3.10: half away from zero; largest remainder, also when negative; ties by waterfall, then code."""
    assert [round_pence(Fraction(n, 2)) for n in (1, -1, 3, -3, 0)] == [1, -1, 2, -2, 0]
    half = {"B": Fraction(1, 2), "A": Fraction(1, 2)}
    assert largest_remainder(1, half, ["B", "A"]) == {"B": 1, "A": 0}
    assert largest_remainder(1, half, []) == {"B": 0, "A": 1}
    assert largest_remainder(-1, {"A": Fraction(-6, 5), "B": Fraction(2, 5)}, []) == {"A": -1, "B": 0}
    assert largest_remainder(3, half, []) is None


def test_payers_that_take_nothing_keep_their_pence() -> None:
    """Rule 3.10: who takes nothing keeps its pence, if the others can make up the total."""
    exact = {"A": Fraction(1, 2), "B": Fraction(1, 2), "C": Fraction(3, 2)}
    assert round_payers(3, exact, {"C"}, {"A": 1, "B": 0}, []) == {"A": 1, "B": 0, "C": 2}
    assert round_payers(3, exact, {"C"}, {"A": 1, "B": 1}, []) == {"A": 1, "B": 1, "C": 1}
    assert round_payers(3, exact, {"C"}, {"A": 0, "B": 0}, []) == {"A": 1, "B": 1, "C": 1}


def test_all_take_part_if_the_others_cannot_make_it_up() -> None:
    """Rule 3.10: 0.60 + 0.55 pence are one penny of D's; 0.39 more make two of 1.54, and D gets at most
    one."""
    log = Log()
    shared = [{"payer": "D", "take": {"share": "0.521739"}}, {"payer": "A", "take": "rest"}]
    log.order(line(price("0.0001"), quantity="115", funding=shared))
    named: Json = {"item_id": ITEM, "ods_code": A, "from_": "2026-05-01"}
    log.say("C010001", "QuantityChanged", **named, quantity="39")
    log.say("C010001", "FundingChanged", **named, funding=[{"payer": "D", "take": "rest"}])
    result = log.run("2026-04", "2026-05")
    assert [[row[4:6] for row in close.lines] for close in result.closes] == [
        [("D", "2026-04")],
        [("A", "2026-05")],
    ]
    assert total(result) == "0.02"


def test_thirds() -> None:
    """Rule 3.10: a price of a third is rounded as it accumulates."""
    log = Log()
    log.order(line(price("0.333333")))
    result = log.run(*months(4, 4))
    assert [close.lines[0][7] for close in result.closes] == ["0.33", "0.34", "0.33", "0.33"]


# -- section 4: the close


def test_order_of_closes() -> None:
    """Rule 4.3: in order without gaps after the first; a closed one is answered; an earlier one refused."""
    log = Log()
    log.order(line(price("30")))
    result = log.run("2026-05", "2026-06", "2026-05", "2026-06")
    assert [close.period for close in result.closes] == ["2026-05", "2026-06"]
    assert [row[6] for row in result.closes[0].lines] == ["adjustment", "charge"]
    for wrong in (("2026-05", "2026-04"), ("2026-05", "2026-07"), ("2026-13",), ("April",)):
        with pytest.raises(CloseRefused):
            log.run(*wrong)


def test_late_events_and_lines_that_vanish() -> None:
    """Rule 4.1: what is late adjusts; a line or supplier that is no longer counts as 0."""
    log = Log()
    placed = log.order(line(price("30")))
    log.close("2026-04")
    log.say(
        "C010001",
        "FundingChanged",
        item_id=ITEM,
        funding=[{"payer": "X", "take": "rest"}],
        from_="2026-04-16",
    )
    log.close("2026-05")
    log.say("C010001", "Retracted", change_id=placed)
    log.close("2026-06")
    log.order(line(price("60")), live=None, supplier_id="10052")
    log.close("2026-07")
    result = log.run()
    named = ("C010001", ITEM, A, "10000")
    assert result.closes[1].lines == [
        (*named, "NHSE", "2026-04", "adjustment", "-15.00"),
        (*named, "X", "2026-04", "adjustment", "15.00"),
        (*named, "X", "2026-05", "charge", "30.00"),
    ]
    assert total(result, supplier="10000") == "0.00"
    assert [row[3:] for row in result.closes[3].lines] == [
        ("10052", "NHSE", month, "charge" if month == "2026-07" else "adjustment", "60.00")
        for month in months(4, 4)
    ]


def test_arrival() -> None:
    """Rule 4.1: a run takes as arrival the later of now and the end of the last period closed."""
    log = Log()
    log.use("1", "2098-12-31T23:59:59Z")
    assert run(log.lines).refused
    assert run(log.lines, arrival=datetime(2098, 12, 30, 23, 59, 58, tzinfo=UTC)).refused
    assert not run(log.lines, closes=["2098-12"]).refused
    log.close("2098-12")
    assert not run(log.lines).refused


# -- what RULES promises of every book


def by_key(result: Result) -> dict[tuple[str, ...], int]:
    """The pence of all closes per line, supplier, payer and month."""
    sums: Counter[tuple[str, ...]] = Counter()
    for close in result.closes:
        for row in close.lines:
            sums[row[:6]] += int(Decimal(row[7]) * 100)
    return {key: pence for key, pence in sums.items() if pence}


BOOKS = st.one_of(books(), books(flat_only=True))


@CAREFUL
@given(BOOKS)
def test_conservation(book: list[Json]) -> None:
    """Rule 4.5: "Whatever the cuts, the documents up to the last one sum to the same"."""
    last = max(index for index, told in enumerate(book) if "close" in told)
    once = [told for index, told in enumerate(book) if "close" not in told or index == last]
    cut, uncut = run(book, arrival=ARRIVAL), run(once, arrival=ARRIVAL)
    assert by_key(cut) == by_key(uncut)
    assert cut.closes[-1].held == uncut.closes[-1].held
    assert len(cut.refused) == len(uncut.refused)


@CAREFUL
@given(BOOKS)
def test_payers_sum_to_the_line(book: list[Json]) -> None:
    """Rule 3.10: whoever pays, a line's month comes to the same."""
    alone = copy.deepcopy(book)
    for told in alone:
        for body in told.get("value", {}).get("change", {}).values() if "topic" in told else ():
            for place in [body, *body.get("lines", [])]:
                if "funding" in place:
                    place["funding"] = NHSE_REST
    sums: list[Counter[tuple[str, ...]]] = []
    for each in (book, alone):
        sums.append(Counter())
        for key, pence in by_key(run(each, arrival=ARRIVAL)).items():
            sums[-1][(*key[:4], key[5])] += pence
    assert {k: v for k, v in sums[0].items() if v} == {k: v for k, v in sums[1].items() if v}


@CAREFUL
@given(st.data())
def test_shuffled_usage(data: st.DataObject) -> None:
    """Section 1: neither order nor doubling of usage matters."""
    book = data.draw(books())
    again = data.draw(shuffled(book))
    first, second = run(book, arrival=ARRIVAL), run(again, arrival=ARRIVAL)
    assert first.closes == second.closes
    assert first.suspense == second.suspense


@CAREFUL
@given(BOOKS)
def test_rows(book: list[Json]) -> None:
    """Rule 4.4: one row a key, sorted, no zeros, `charge` for the period alone."""
    for close in run(book, arrival=ARRIVAL).closes:
        for rows in (close.lines, close.held):
            assert rows == sorted(rows, key=lambda row: tuple(column.encode() for column in row))
            assert len({row[:6] for row in rows}) == len(rows)
            for row in rows:
                assert row[7] not in ("0.00", "-0.00")
                assert (row[6] == "charge") == (row[5] == close.period)
                assert row[5] <= close.period
        assert not {row[:3] for row in close.held} & {row[:3] for row in close.lines if row[6] == "charge"}


@CAREFUL
@given(BOOKS, st.data())
def test_nothing_stops_a_run(book: list[Json], data: st.DataObject) -> None:
    """Section 1: what is malformed is refused, never the run."""
    junk: st.SearchStrategy[Any] = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)
        ),
        max_leaves=3,
    )
    spoiled = copy.deepcopy(book)
    for told in spoiled:
        if "close" in told or data.draw(st.integers(0, 3)):
            continue
        place: Any = told
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 4)):
                place = inner
                continue
            place[key] = data.draw(junk)
            break
    run(spoiled, arrival=ARRIVAL)


@pytest.mark.parametrize("flat_only", [True, False])
def test_books_have_money(flat_only: bool) -> None:
    """The strategies are of use: most books come to money, many to adjustments, several payers and things
    held."""
    seen: Counter[str] = Counter()

    @settings(CAREFUL, max_examples=150, database=None, derandomize=True)
    @given(books(flat_only=flat_only))
    def look(book: list[Json]) -> None:
        result = run(book, arrival=ARRIVAL)
        rows = [row for close in result.closes for row in close.lines]
        seen["books"] += 1
        seen["money"] += bool(rows)
        seen["adjusted"] += any(row[6] == "adjustment" for row in rows)
        seen["payers"] += len({row[4] for row in rows}) > 1
        seen["held"] += any(close.held for close in result.closes)
        seen["refused"] += bool(result.refused)
        seen["suspense"] += bool(result.suspense)

    look()
    assert seen["money"] > seen["books"] / 2
    for name in ("adjusted", "payers", "held", "refused", "suspense"):
        assert seen[name] > seen["books"] / 20, name
