"""A document's rows come out of its evidence alone, and of changed evidence they do not (DESIGN promise 6)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from rating.evidence import read_evidence, rederive
from rating.records import Refused
from sinks.evidence import EvidenceFiles, evidence_text
from tests.oracle.strategies import books
from tests.test_billing_book import BOOK, LATE, contract
from tests.told import tell

MANY = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=120)


def through_json(value: dict[str, Any]) -> Any:
    """As whoever reads the file has it."""
    return json.loads(json.dumps(value))


@MANY
@given(books(flat_only=False))
def test_every_lines_evidence_rederives_it(book: list[dict[str, Any]]) -> None:
    """Of each document of each of a book's closes: all of its rows, no others, and their VAT rates."""
    for close in tell(book).told:
        for document, evidence in zip(close.documents, close.evidence, strict=True):
            read = read_evidence(through_json(evidence))
            assert rederive(read) == document.rows
            for key, rate in document.vat_rates_micros.items():
                assert read.vat_rate_micros(key) == rate


@pytest.fixture(scope="module")
def closes() -> list[Any]:
    """Two closes of a small book, the second with late changes."""
    return tell([*BOOK, {"close": "2026-04"}, *LATE, {"close": "2026-05"}]).told


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every plain value in evidence, with its path; keys that are dates or months count too."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, (*path, name))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from leaves(each, (*path, index))
    else:
        yield path, value


def changed(evidence: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the evidence with one value changed."""
    found = copy.deepcopy(evidence)
    inner = found
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return found


#: What moves a penny of the small book wherever it stands in evidence; the paths end in it.
MATTERS = {
    "price": "1.31",
    "2026-03-01": 8462,
    "2026-04-01": 8513,
    "amount": "1499.99",
    "2026-04": "1.00",
}


def test_what_matters_is_found(closes: list[Any]) -> None:
    """A changed price, list size, allocation, amount invoiced before, go-live or usage gives other rows."""
    found: set[str] = set()
    for close in closes:
        for document, evidence in zip(close.documents, close.evidence, strict=True):
            for path, value in leaves(evidence):
                name = str(path[-1])
                if name in MATTERS and "wanted" not in path:
                    other = changed(evidence, path, MATTERS[name])
                elif "usage" in path and "quantity" in path:
                    other = changed(evidence, path, str(float(value) + 1))
                elif name == "date" and "M1" in str(evidence["contract_changes"][path[1]]):
                    other = changed(evidence, path, "2026-04-13")
                else:
                    continue
                # On some places no row of a document hangs: a list size that another has replaced, say.
                if rederive(read_evidence(other)) != document.rows:
                    found.add(str(path[0]) if path[0] in ("invoiced", "usage") else name)
    assert found == {"price", "2026-03-01", "2026-04-01", "amount", "invoiced", "usage", "date"}


def test_an_order_that_takes_the_usage_is_named() -> None:
    """Usage that a lower order takes is marked, not charged, and that order is not shown (3.3)."""
    other = json.loads(json.dumps(BOOK))
    placed = next(line for line in other if "OrderPlaced" in str(line))
    lower = copy.deepcopy(placed)
    lower["value"] |= {"id": "lower", "order_number": "C000001"}
    body = lower["value"]["change"]["OrderPlaced"]
    body |= {"order_id": "C000001-01", "supplier_id": "10052"}
    body["lines"] = [line for line in body["lines"] if line["item_id"] == "10000-S-001"]
    live = contract(
        "m1", "MilestoneReached", item_id="10000-S-001", ods_code="A83005", milestone="M1", date="2026-04-11"
    )
    live["value"]["order_number"] = "C000001"
    told = tell([*other, lower, live, {"close": "2026-04"}])
    [close] = told.told
    evidence = next(each for each in close.evidence if each["supplier_id"] == "10000" and each["payer"] == "NHSE")
    [usage] = evidence["usage"]
    assert list(usage["quantity"]) == ["2026-04-03", "2026-04-11", "2026-04-30"]
    assert usage["taken_by"] == {"2026-04-11": "C000001", "2026-04-30": "C000001"}
    assert "10052" not in json.dumps(evidence)
    document = next(each for each in close.documents if each.number == evidence["number"])
    assert rederive(read_evidence(evidence)) == document.rows


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("format",), "other/9", "format"),
        (("period",), "2026-13", "period"),
        (("usage",), None, "usage"),
        (("usage", 0, "quantity", "2026-04-03"), "-1", "usage[0].quantity.2026-04-03"),
        (("usage", 0, "readings", "2026-04-03"), [1], "usage[0].readings.2026-04-03"),
        (("allocations", 0, "wanted", "2026-04"), "1/0", "allocations[0].wanted.2026-04"),
        (("practices", "A83005", "list_sizes", "2026-03-01"), "many", "practices.A83005.list_sizes.2026-03-01"),
        (("contract_changes", 0, "id"), 7, "contract_changes[0].id"),
        (("contract_changes",), {}, "contract_changes"),
    ],
)
def test_what_is_no_evidence_is_refused_with_its_field(
    closes: list[Any], path: tuple[Any, ...], value: Any, field: str
) -> None:
    """Whoever sends a file with nonsense in it is told where."""
    evidence = next(each for each in closes[0].evidence if each["payer"] == "NHSE")
    with pytest.raises(Refused) as caught:
        read_evidence(changed(evidence, path, value))
    assert caught.value.field == field


def test_codes_that_are_called_usage(tmp_path: Path) -> None:
    """Whoever writes evidence reads no more of it than where its usage is: no code may be taken for that."""
    spans = [["2026-04-01", None]]
    reading = {"item_id": "10030-S-001", "ods_code": "A83005", "quantity": {"2026-04-03": "3"}}
    for usage, months in (([reading], ["2026-04"]), ([], [])):
        evidence = {
            "contract_changes": [{"id": '"usage":[{"item_id":', "change": {"usage": [{"lines": []}]}}],
            "practices": {"usage": {"list_sizes": {"2026-04-01": 3}}, "usage_months": {}},
            "acceptances": {"usage": {"usage": spans, "usage_months": spans}},
            "usage": usage,
            "usage_months": months,
            "invoiced": [],
        }
        files = EvidenceFiles(tmp_path, str)
        text = evidence_text(evidence)
        assert files.write("NHSE-000001", text).read_text() == text
        asked: list[Any] = []
        list(files.write_usage(lambda items, of, asked=asked: asked.append((items, of)) or ()))
        assert asked == ([({"10030-S-001"}, {2026 * 12 + 3})] if usage else [])
