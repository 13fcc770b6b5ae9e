"""Every adjustment has a cause, and says the one that a person would name (RULES 4.1, 4.2)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from rating.causes import NOTHING_CHANGED, UNEXPLAINED, Cause, Causes
from rating.close import ChargeKey
from tests.oracle.strategies import books
from tests.test_billing_book import BOOK, contract, reference, usage
from tests.told import Told, tell

MANY = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=120)


def causes(told: Told) -> list[dict[ChargeKey, Cause]]:
    """The causes of each close's adjustments."""
    found, before = [], None
    for close in told.told:
        of_close = Causes(before, close.known, close.period)
        found.append({key: of_close.of(key) for key in close.rows if key.month < close.period})
        before = close.known
    return found


@MANY
@given(books(flat_only=False))
def test_every_adjustment_has_a_cause(book: list[dict[str, Any]]) -> None:
    """None is left without one, and it is the same each time; only what was held is a release."""
    told = tell(book)
    for close, before, found in zip(told.told, [None, *told.told], causes(told), strict=False):
        for key, cause in found.items():
            assert cause.text not in (NOTHING_CHANGED, UNEXPLAINED)
            if cause.is_release and before is not None:
                assert told.invoiced_up_to(before.period).get(key, 0) == 0
        assert found == {key: Causes(before and before.known, close.known, close.period).of(key) for key in found}


@MANY
@given(books(flat_only=False))
def test_no_cause_names_another_practice(book: list[dict[str, Any]]) -> None:
    """Of what others of the order did, only the order's total is said."""
    told = tell(book)
    practices = {"A83005", "B81001", "Y00001", "A83006"}
    for found in causes(told):
        for key, cause in found.items():
            assert not any(code in cause.text for code in practices - {key.ods_code}), cause.text


def retraction(change_id: str) -> dict[str, Any]:
    """Change x of the order: another is as if never said."""
    found = contract("x", "Retracted")
    found["value"]["change"]["Retracted"]["change_id"] = change_id
    return found


M2_LATER = contract("m2", "MilestoneReached", item_id="10000-002", ods_code="A83005", milestone="M2", date="2026-05-12")
PUBLISHED = reference("r3", "A83005", "ListSize", ods_code="A83005", as_of="2026-04-01", patients=8512)
PUBLISHED["value"]["recorded_at"] = "2026-05-14T09:00:00Z"


def price(item: str, amount: str, **more: Any) -> dict[str, Any]:
    """A new price of an item of the book."""
    placed = next(line["value"]["change"]["OrderPlaced"] for line in BOOK if "OrderPlaced" in str(line))
    was = next(line["price"] for line in placed["lines"] if line["item_id"] == item)
    return {**was, "tiers": [{"from": "1", "price": amount}], **more}


@pytest.mark.parametrize(
    ("line", "row", "text"),
    [
        (PUBLISHED, ("10000-001", "A83005"), "list size of 1 April, published 14 May: 8,461 to 8,512"),
        (usage("u5", "12", "2026-04-03T10:00:00Z"), ("10000-S-001", "A83005"),
         "usage of 3 April reported late: 12 more"),
        (usage("u4", "4", "2026-04-11T08:00:00Z", revision=2), ("10000-S-001", "A83005"),
         "usage of 11 April corrected: 7 less"),
        (contract("p", "PriceAgreed", item_id="10000-001", price=price("10000-001", "1.20"), **{"from": "2026-04-01"}),
         ("10000-001", "A83005"), "price agreed from 1 April: 1.26 to 1.20 (change p)"),
        (M2_LATER, ("10000-002", "A83005"), "M2 reached 12 May: held until now"),
        (reference("al", "16C", "Allocation", ordering_party="16C", financial_year=2026, amount="1400"),
         ("10000-001", "A83005"), "allocation of 2026 of 16C changed: 1,500.00 to 1,400.00"),
        (contract("cease", "LineCeased", item_id="10000-001", ods_code="B81001", date="2026-04-20"),
         ("10000-001", "B81001"), "cessation on 20 April (change cease)"),
        (contract("cease", "LineCeased", item_id="10000-001", ods_code="B81001", date="2026-04-20"),
         ("10000-001", "A83005"), "what draws on the allocation of 2026 of 16C changed"),
        (contract("n", "PartyNovated", ordering_party="QHM", **{"from": "2026-04-16"}),
         ("10000-001", "A83005"), "ordering party from 16 April: 16C to QHM (change n)"),
        (retraction("M2-10000-001-A83005"), ("10000-001", "A83005"),
         "M2 retracted: credited and held again (M2-10000-001-A83005 retracted by x)"),
        (retraction("c1"), ("10000-001", "A83005"),
         "the line is no longer ordered (c1 retracted by x)"),
        (contract("m", "MilestoneReached", item_id="10000-001", ods_code="B81001", milestone="M1", date="2026-04-02"),
         ("10000-001", "B81001"), "M1 moved from 7 April to 2 April (change m)"),
        (reference("mg", "A83005", "PracticeMerged", ods_code="A83005", into="B81001", date="2026-04-10"),
         ("10000-S-001", "A83005"), "merger of the practice on 10 April"),
        (contract("cr", "ServiceCredit", item_id="10000-002", ods_code="A83005", amount="5", date="2026-04-03",
                  reason="down"), ("10000-002", "A83005"), None),
    ],
)  # fmt: skip
def test_the_cause_is_what_a_person_would_name(line: dict[str, Any], row: tuple[str, str], text: str | None) -> None:
    """One late change after the close of April: what May's adjustment of April says."""
    told = tell([*BOOK, {"close": "2026-04"}, line, {"close": "2026-05"}])
    found = {cause for key, cause in causes(told)[1].items() if (key.item_id, key.ods_code) == row}
    if text is None:
        assert not found  # held: nothing is adjusted yet
        return
    assert {cause.text for cause in found} == {text}
    assert all(cause.is_release == text.startswith("M2 reached") for cause in found)


def test_the_orders_total_is_named_not_the_other_practice() -> None:
    """A tiered price: the other practice's quantity moves this one's charge."""
    book = json.loads(json.dumps(BOOK))
    tiers = {"type": "tiered", "calculation": "volume"}
    placed = next(line["value"]["change"]["OrderPlaced"] for line in book if "OrderPlaced" in str(line))
    for each in placed["lines"][:2]:
        each["price"] |= tiers | {
            "tiers": [{"from": "1", "to": "14000", "price": "1.26"}, {"from": "14001", "price": "1"}]
        }
    size = reference("r9", "B81001", "ListSize", ods_code="B81001", as_of="2026-04-01", patients=9000)
    found = causes(tell([*book, {"close": "2026-04"}, size, {"close": "2026-05"}]))[1]
    texts = {cause.text for key, cause in found.items() if key.ods_code == "A83005" and key.item_id == "10000-001"}
    assert {text.split(";")[-1].strip() for text in texts} == {"change of the total of order C010001 for 10000-001"}


def test_what_the_first_close_finds_says_so() -> None:
    """Months before the first closed period were never invoiced."""
    found = causes(tell([*BOOK, {"close": "2026-05"}]))[0]
    assert {cause.text for cause in found.values()} == {
        "2026-05 is the first period closed; earlier months were never invoiced"
    }
