"""`rating` and the oracle, two readings of RULES that share no code, give the same bytes."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.oracle import oracle
from tests.oracle.strategies import ARRIVAL, books
from tests.replay import replay

SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=100)


def same(book: list) -> None:
    expected = oracle.run(book, arrival=ARRIVAL)
    found = replay(book, arrival=ARRIVAL)
    assert len(found.closes) == len(expected.closes)
    for (period, lines, held), close in zip(found.closes, expected.closes, strict=True):
        assert period == close.period
        assert [tuple(row) for row in lines] == [tuple(row) for row in close.lines]
        assert [tuple(row) for row in held] == [tuple(row) for row in close.held]


@SLOW
@given(books(flat_only=True))
def test_flat_books(book: list) -> None:
    """Books of flat prices come out the same to the penny."""
    same(book)


@SLOW
@given(books(flat_only=False))
def test_all_books(book: list) -> None:
    """Books with everything in RULES come out the same to the penny."""
    same(book)


def placing(change_id: str, revision: int, practices: list[str], price: str, party: str = "QOP") -> dict:
    """An order's revision with lines of these practices."""
    tiers = {"type": "flat", "provisioning": "declarative", "unit": "unit", "time_unit": "month"}
    line = {"item_id": "10000-001", "quantity": "1", "price": tiers | {"tiers": [{"from": "1", "price": price}]}}
    line["funding"] = [{"payer": "@ordering_party", "take": "rest"}]
    body = {
        "order_id": f"C010001-{revision:02d}", "ordering_party": party, "supplier_id": "10000", "framework": "GPITF",
        "commencement": "2026-04-01", "vat_rate": "0.2", "lines": [line | {"ods_code": each} for each in practices],
    }  # fmt: skip
    return said(change_id, OrderPlaced=body)


def said(change_id: str, **change: object) -> dict:
    value = {"id": change_id, "order_number": "C010001", "recorded_at": "2026-03-01T09:00:00Z", "change": change}
    return {"topic": "contract-changes", "value": value}


@st.composite
def revived(draw: st.DrawFn) -> list:
    """Revisions of an order placed, retracted, brought back and placed anew in any order, with milestones between."""
    practices = st.lists(st.sampled_from(["P1", "P2"]), unique=True, min_size=1)
    place = st.tuples(st.integers(2, 3), practices, st.sampled_from("3579"), st.sampled_from(["QOP", "QOP", "QHM"]))
    retract = st.integers(1, 3)
    book, ids = [placing("c0", 1, ["P0"], "1")], ["c0"]
    for number, step in enumerate(draw(st.lists(place | retract, min_size=4, max_size=12)), start=1):
        if isinstance(step, tuple):
            book.append(placing(f"c{number}", *step))
        else:
            # One of the last that were said, of whatever kind; the first placing stays.
            book.append(said(f"c{number}", Retracted={"change_id": ids[max(1, len(ids) - step)] if ids[1:] else "c0x"}))
        ids.append(f"c{number}")
        # Of P2 what accrues is held.
        for practice, milestone in (("P1", "M1"), ("P1", "M2"), ("P2", "M1")):
            fact = {"item_id": "10000-001", "ods_code": practice, "milestone": milestone, "date": "2026-04-01"}
            book.append(said(f"c{number}{practice}{milestone}", MilestoneReached=fact))
        if number == 4:
            book.append({"close": "2026-04"})
    return [*book, {"close": "2026-05"}]


@SLOW
@given(revived())
def test_placings_retracted_and_brought_back(book: list) -> None:
    """What of them stands, and what is refused, is the same to both."""
    same(book)
    assert [index for index, _ in replay(book, arrival=ARRIVAL).refused] == [
        index for index, _ in oracle.run(book, arrival=ARRIVAL).refused
    ]
