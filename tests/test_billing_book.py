"""A small book of a practice's services, used where a real stack is too slow for many; and its pennies."""

from __future__ import annotations

from typing import Any

from tests.oracle import oracle
from tests.replay import replay

SAID = "2026-03-01T09:00:00Z"
FLAT = {"type": "flat", "unit": "unit", "day_count": "month"}
CENTRAL = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]


def contract(change_id: str, kind: str, **body: Any) -> dict[str, Any]:
    """A contract change of order C010001."""
    value = {"id": change_id, "order_number": "C010001", "recorded_at": SAID, "change": {kind: body}}
    return {"topic": "contract-changes", "value": value}


def reference(change_id: str, code: str, kind: str, **body: Any) -> dict[str, Any]:
    """A reference change of a code."""
    value = {"id": change_id, "code": code, "recorded_at": SAID, "change": {kind: body}}
    return {"topic": "reference-changes", "value": value}


def usage(reading_id: str, quantity: str, at: str, topic: str = "usage", **more: Any) -> dict[str, Any]:
    """A reading of SMS at practice A83005."""
    value = {"id": reading_id, "supplier_id": "10000", "ods_code": "A83005", "item_id": "10000-S-001"}
    return {"topic": topic, "value": value | {"quantity": quantity, "occurred_at": at} | more}


def line(item: str, ods_code: str, provisioning: str, time_unit: str, price: str, **more: Any) -> dict[str, Any]:
    """A flat line of an order, paid from the allocation first."""
    flat = FLAT | {"provisioning": provisioning, "time_unit": time_unit, "tiers": [{"from": "1", "price": price}]}
    return {"item_id": item, "ods_code": ods_code, "price": flat, "funding": CENTRAL} | more


LINES = [
    line("10000-001", "A83005", "patient", "year", "1.26", quantity="8000"),
    line("10000-001", "B81001", "patient", "year", "1.26", quantity="5000"),
    line("10000-002", "A83005", "declarative", "month", "37.92", quantity="3"),
    line("10000-S-001", "A83005", "on_demand", "none", "0.017"),
    line("10000-S-003", "A83005", "declarative", "none", "650", quantity="2"),
]
BOOK = [
    reference("r1", "A83005", "ListSize", ods_code="A83005", as_of="2026-03-01", patients=8461),
    reference("r2", "16C", "Allocation", ordering_party="16C", financial_year=2026, amount="1500"),
    contract(
        "c1",
        "OrderPlaced",
        order_id="C010001-01",
        ordering_party="16C",
        supplier_id="10000",
        framework="GPITF",
        commencement="2026-04-01",
        vat_rate="0.2",
        lines=LINES,
    ),
    *(
        contract(
            f"{milestone}-{each['item_id']}-{each['ods_code']}",
            "MilestoneReached",
            item_id=each["item_id"],
            ods_code=each["ods_code"],
            milestone=milestone,
            date="2026-04-07" if each["ods_code"] == "B81001" else "2026-04-01",
        )
        for each in LINES
        for milestone in ("M1", "M2")
        if not (milestone == "M2" and each["item_id"] == "10000-002")
    ),
    usage("u1", "1003", "2026-04-03T10:00:00Z"),
    usage("u1", "1003", "2026-04-03T10:00:00Z"),
    usage("u2", "17.5", "2026-04-30T22:59:59Z", "usage.10000"),
    usage("u3", "40", "2026-04-30T23:00:00Z"),
    usage("u4", "9", "2026-04-11T08:00:00+01:00"),
    usage("u4", "11", "2026-04-11T08:00:00+01:00", revision=1),
]
LATE = [
    usage("u5", "100", "2026-04-29T10:00:00Z"),
    usage("u3", "0", "2026-04-30T23:00:00Z", revision=2),
    reference("r3", "A83005", "ListSize", ods_code="A83005", as_of="2026-04-01", patients=8512),
    contract("cease", "LineCeased", item_id="10000-001", ods_code="B81001", date="2026-04-20"),
]


def test_book() -> None:
    """Rating and the oracle agree on the book, and it has charges, adjustments and held rows in it."""
    lines = [*BOOK, {"close": "2026-04"}, *LATE, {"close": "2026-05"}]
    expected, found = oracle.run(lines), replay(lines)
    for (_, invoiced, held), close in zip(found.closes, expected.closes, strict=True):
        assert [tuple(row) for row in invoiced] == close.lines
        assert [tuple(row) for row in held] == close.held
        assert held
    assert {row.kind for row in found.closes[1][1]} == {"charge", "adjustment"}
