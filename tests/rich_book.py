"""A book with everything in it, by hand, and the lines that it is made of."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

Record = dict[str, Any]


def contract(number: str, change_id: str, **change: Record) -> Record:
    """A line that says a contract change."""
    value = {"id": change_id, "order_number": number, "recorded_at": "2026-03-01T09:00:00Z", "change": change}
    return {"topic": "contract-changes", "value": value}


def reference(code: str, change_id: str, **change: Record) -> Record:
    """A line that says a reference change."""
    value = {"id": change_id, "code": code, "recorded_at": "2026-03-01T09:00:00Z", "change": change}
    return {"topic": "reference-changes", "value": value}


def used(
    reading: str,
    day: str,
    quantity: str,
    *,
    revision: int = 0,
    item: str = "10030-S-001",
    ods: str = "A83006",
    topic: str = "usage",
) -> Record:
    """A line that reports usage."""
    value = {
        "id": reading,
        "revision": revision,
        "supplier_id": item[:5],
        "ods_code": ods,
        "item_id": item,
        "quantity": quantity,
        "occurred_at": f"{day}T10:00:00Z",
    }
    return {"topic": topic, "value": value}


def price(provisioning: str, *tiers: tuple[str, str], unit: str = "none", calculation: str = "cumulative") -> Record:
    """A price, flat where there is one tier."""
    shown: list[Record] = [{"from": start, "price": amount} for start, amount in tiers]
    for tier, following in pairwise(shown):
        tier["to"] = str(int(following["from"]) - 1)
    return {
        "type": "tiered" if len(tiers) > 1 else "flat",
        "calculation": calculation,
        "provisioning": provisioning,
        "unit": "unit",
        "time_unit": unit,
        "day_count": "month",
        "tiers": shown,
    }


PATIENTS = price("patient", ("1", "1.26"), unit="year")
METERED = price("on_demand", ("1", "0.5"), ("11", "0.333333"), ("101", "0.017"))
METERED_BELOW = METERED | {"included": "3", "minimum": "2", "maximum": "60"}
ONE_OFF = price("declarative", ("1", "207.92"))
BY_ALLOCATION = [
    {"payer": "LOCAL", "take": {"share": "0.1"}},
    {"payer": "NHSE", "take": "allocation"},
    {"payer": "@ordering_party", "take": "rest"},
]
BY_CAP = [{"payer": "NHSE", "take": {"per_patient_year": "0.35"}}, {"payer": "@ordering_party", "take": "rest"}]
BY_PARTY = [{"payer": "@ordering_party", "take": "rest"}]


def placed(order_id: str, party: str, supplier: str, *lines: Record) -> Record:
    """The body of OrderPlaced."""
    return {
        "order_id": order_id,
        "ordering_party": party,
        "supplier_id": supplier,
        "framework": "GPITF",
        "commencement": "2026-03-01",
        "vat_rate": "0.2",
        "lines": list(lines),
    }


def ordered(item: str, ods: str, at: Record, funding: list[Record], quantity: str = "100") -> Record:
    """A line of an order."""
    return {"item_id": item, "ods_code": ods, "quantity": quantity, "price": at, "funding": funding}


def reached(number: str, change_id: str, item: str, ods: str, milestone: str, day: str) -> Record:
    """A line that says a milestone."""
    body = {"item_id": item, "ods_code": ods, "milestone": milestone, "date": day}
    return contract(number, change_id, MilestoneReached=body)


A, B, S = "10030-001", "10031-002", "10030-S-001"
P1, P2, P3 = "A83006", "B81001", "Y00001"
C1, C2 = "C010001", "C010002"
SUPPLIERS = ("10030", "10031")

BOOK: list[Record] = [
    reference(P1, "r1", ListSize={"ods_code": P1, "as_of": "2026-03-01", "patients": 8461}),
    contract(
        C1,
        "c1",
        OrderPlaced=placed(
            "C010001-01",
            "QOP",
            "10030",
            ordered(A, P1, PATIENTS, BY_ALLOCATION),
            ordered(A, P2, PATIENTS, BY_ALLOCATION, "3333"),
            ordered(S, P1, METERED_BELOW, BY_ALLOCATION),
            ordered(S, P2, METERED, BY_CAP),
        ),
    ),
    used("u1", "2026-04-03", "3"),
    used("u1", "2026-04-03", "3.000"),
    reached(C1, "c2", A, P1, "M1", "2026-03-15"),
    reached(C1, "c3", A, P1, "M2", "2026-04-10"),
    reached(C1, "c4", A, P2, "M1", "2026-04-01"),
    reached(C1, "c5", S, P1, "M1", "2026-04-01"),
    reached(C1, "c6", S, P1, "M2", "2026-04-02"),
    reached(C1, "c7", S, P2, "M1", "2026-04-05"),
    reached(C1, "c8", S, P2, "M2", "2026-04-06"),
    used("u2", "2026-04-04", "12", topic="usage.10030"),
    used("u3", "2026-04-05", "90", topic="usage.10030"),
    # The same reading with other content on the other topic: the first in the log stands.
    used("u2", "2026-04-04", "13"),
    used("u3", "2026-04-05", "90"),
    # Reported again to another day, then to another item.
    used("u3", "2026-04-21", "91", revision=1),
    used("u4", "2026-04-08", "7", ods=P2, topic="usage.10030"),
    used("u4", "2026-04-08", "7", ods=P2, item=A, revision=1),
    used("u5", "2026-04-09", "40", ods=P2),
    used("u5", "2026-04-09", "0", ods=P2, revision=2),
    used("u5", "2026-04-09", "41", ods=P2, revision=1, topic="usage.10030"),
    used("u6", "2026-04-10", "5", item="10031-002"),
    used("u7", "2026-04-10", "5", item="10031-002", topic="usage.10030"),
    {
        "topic": "usage.10030",
        "value": {
            "UsageBatch": {
                "supplier_id": "10030",
                "ods_code": P2,
                "usages": [
                    {"id": "b1", "item_id": S, "quantity": "8", "occurred_at": "2026-04-11T10:00:00Z"},
                    {"id": "b2", "item_id": "10031-002", "quantity": "8", "occurred_at": "2026-04-11T10:00:00Z"},
                    {"id": "b1", "item_id": S, "quantity": "8", "occurred_at": "2026-04-11T11:00:00+01:00"},
                ],
            }
        },
    },
    reference("QOP", "r2", Allocation={"ordering_party": "QOP", "financial_year": 2026, "amount": "1000"}),
    reference("ENGLAND", "r3", Allocation={"financial_year": 2026, "per_patient": "0.01", "as_of": "2026-04-01"}),
    reference(P2, "r4", Membership={"ods_code": P2, "kind": "commissioner", "parent": "QHM", "from": "2026-03-01"}),
    reference(P2, "r5", ListSize={"ods_code": P2, "as_of": "2026-04-01", "patients": 5000}),
    contract(
        C2,
        "c1",
        OrderPlaced=placed(
            "C010002-01", "QHM", "10031", ordered(B, P1, ONE_OFF, BY_PARTY, "2"), ordered(B, P2, ONE_OFF, BY_ALLOCATION)
        ),
    ),
    reached(C2, "c2", B, P1, "M1", "2026-04-20"),
    reached(C2, "c3", B, P2, "M1", "2026-04-30"),
    contract(C1, "c9", ServiceCredit={"item_id": A, "amount": "33.333333", "date": "2026-04-12", "reason": "slow"}),
    contract(C1, "c9", ServiceCredit={"item_id": A, "amount": "44", "date": "2026-04-12", "reason": "slow"}),
    contract(C1, "c10", PriceAgreed={"item_id": S, "price": PATIENTS, "from": "2026-04-01"}),
    {"close": "2026-04"},
    # Late usage, of a closed month; and a correction of what was charged.
    used("u8", "2026-04-30", "30", topic="usage.10030"),
    used("u1", "2026-04-03", "2", revision=1),
    used("u9", "2026-05-03", "17", ods=P2),
    used("u9", "2026-05-03", "18", ods=P2, topic="usage.10030"),
    contract(C1, "c11", Retracted={"change_id": "c9"}),
    contract(C1, "c12", LineCeased={"item_id": A, "ods_code": P1, "date": "2026-05-20"}),
    contract(C1, "c13", Retracted={"change_id": "c12"}),
    contract(
        C1,
        "c14",
        OrderPlaced=placed(
            "C010001-02", "QOP", "10030", ordered(S, P3, METERED, BY_ALLOCATION), ordered(B, P3, ONE_OFF, BY_PARTY)
        ),
    ),
    reached(C1, "c15", S, P3, "M1", "2026-05-01"),
    reached(C1, "c16", S, P3, "M2", "2026-05-01"),
    used("u10", "2026-05-09", "50", ods=P3),
    reached(C1, "c17", A, P2, "M2", "2026-05-31"),
    contract(C1, "c18", PartyNovated={"ordering_party": "QHM", "from": "2026-05-16"}),
    reference(P1, "r6", ListSize={"ods_code": P1, "as_of": "2026-05-01", "patients": 12345}),
    reference(P1, "r7", ListSize={"ods_code": P1, "as_of": "2026-05-01", "patients": 1}),
    reference(P1, "r8", Retracted={"change_id": "r7"}),
    reference(P3, "r9", PracticeClosed={"ods_code": P3, "date": "2026-05-25"}),
    reference(A, "r10", ServiceAccepted={"item_id": A, "requirement": "C5", "from": "2026-03-01", "to": "2026-05-10"}),
    {"close": "2026-05"},
]
