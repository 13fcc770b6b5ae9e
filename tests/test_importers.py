"""The importers take the real files as they come, refuse bad rows one by one, and say the same twice."""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tribill import data
from tribill.data import compact
from tribill.importers import (
    IMPORTERS,
    Problem,
    Record,
    import_allocations,
    import_list_sizes,
    import_orders,
    import_practices,
)

AT = datetime(2026, 3, 1, 9, tzinfo=UTC)
FIRST_GENERATION = [
    "Call Off Agreement ID",
    "Call Off Ordering Party ID",
    "Call Off Ordering Party Name",
    "Call Off Commencement Date",
    "Service Recipient ID",
    "Service Recipient Name",
    "Service Recipient Item ID",
    "Supplier ID",
    "Supplier Name",
    "Product ID",
    "Product Name",
    "Product Type",
    "Quantity Ordered",
    "Unit of Order",
    "Unit Time",
    "Estimation Period",
    "Price",
    "Order Type",
    "Funding Type",
    "M1 planned (Delivery Date)",
    "Actual M1 date",
    "Buyer verification date (M2)",
    "Cease Date",
]
SECOND_GENERATION = [
    *FIRST_GENERATION,
    *("Framework", "Initial Term", "Contract Length (Months)", "Pricing Type", "Tiered Array"),
]
PATIENTS_ONLY = [
    name for name in FIRST_GENERATION if name not in {"Unit Time", "Estimation Period", "Order Type"}
]
EMIS_WEB = {
    "Call Off Agreement ID": "C010001-01",
    "Call Off Ordering Party ID": "16C",
    "Call Off Ordering Party Name": "NHS Tees Valley CCG",
    "Call Off Commencement Date": "01/04/2021",
    "Service Recipient ID": "A81001",
    "Service Recipient Name": "THE DENSHAM SURGERY",
    "Service Recipient Item ID": "C010001-01-A81001-0",
    "Supplier ID": "10000",
    "Supplier Name": "EMIS Health",
    "Product ID": "10000-001",
    "Product Name": "Emis Web GP",
    "Product Type": "Catalogue Solution",
    "Quantity Ordered": "4075",
    "Unit of Order": "per patient",
    "Unit Time": "per year",
    "Price": "1.2600",
    "Order Type": "1",
    "Funding Type": "Central",
    "M1 planned (Delivery Date)": "05/09/2021",
}
CENTRAL = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]
LOCAL = [{"payer": "@ordering_party", "take": "rest"}]


def write(
    path: Path, columns: Iterable[str], rows: Iterable[dict[str, str]], *, bom: bool = True, end: str = "\r\n"
) -> Path:
    """Write a file as the Buying Catalogue does: UTF-8 with BOM, CRLF."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), restval="", extrasaction="ignore", lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    return path


def orders(
    folder: Path, *rows: dict[str, str], columns: Iterable[str] = FIRST_GENERATION, name: str = "Full"
) -> Path:
    """An order file whose rows differ from EMIS_WEB as said."""
    return write(folder / f"C010001-01_16C_{name}.csv", columns, [EMIS_WEB | row for row in rows])


def split(results: Iterator[Record | Problem]) -> tuple[list[Record], list[Problem]]:
    """Records and problems apart; every record must be plain JSON without a float."""
    found = list(results)
    records = [each for each in found if not isinstance(each, Problem)]
    problems = [each for each in found if isinstance(each, Problem)]

    def no_float(text: str) -> None:
        raise AssertionError(text)

    for record in records:
        assert json.loads(json.dumps(record), parse_float=no_float) == record
    return records, problems


def imported(path: Path, **settings: Any) -> tuple[list[Record], list[Problem]]:
    """Import an order file."""
    return split(import_orders(path, recorded_at=AT, **settings))


def only_problem(path: Path, **settings: Any) -> Problem:
    """The one problem of a file of which nothing is imported."""
    records, problems = imported(path, **settings)
    assert not records
    assert len(problems) == 1
    return problems[0]


def changes(records: Iterable[Record], kind: str) -> list[Any]:
    """The bodies of the changes of a kind."""
    found = [record["value"]["change"] for record in records]
    return [change[kind] for change in found if kind in change]


def price_of(folder: Path, row: dict[str, str], **settings: Any) -> Any:
    """The price of the one line that a row of the second generation gives."""
    records, problems = imported(orders(folder, row, columns=SECOND_GENERATION), **settings)
    assert not problems, problems
    return changes(records, "OrderPlaced")[0]["lines"][0]["price"]


# Orders


def test_first_generation_full(tmp_path: Path) -> None:
    """A Full file of 2020 becomes one OrderPlaced with everything that RULES names."""
    records, problems = imported(orders(tmp_path, {}))
    assert not problems
    assert records == [
        {
            "topic": "contract-changes",
            "value": {
                "id": "order-C010001-01",
                "order_number": "C010001",
                "recorded_at": "2026-03-01T09:00:00Z",
                "change": {
                    "OrderPlaced": {
                        "order_id": "C010001-01",
                        "ordering_party": "16C",
                        "supplier_id": "10000",
                        "framework": "NHSDGP001",
                        "commencement": "2021-04-01",
                        "term_months": 36,
                        "vat_rate": "0.2",
                        "lines": [
                            {
                                "item_id": "10000-001",
                                "ods_code": "A81001",
                                "quantity": "4075",
                                "delivery_date": "2021-09-05",
                                "price": {
                                    "type": "flat",
                                    "calculation": "cumulative",
                                    "provisioning": "patient",
                                    "unit": "per patient",
                                    "time_unit": "year",
                                    "day_count": "month",
                                    "tiers": [{"from": "1", "price": "1.26"}],
                                },
                                "funding": CENTRAL,
                            }
                        ],
                    }
                },
            },
        }
    ]


def test_second_generation_full(tmp_path: Path) -> None:
    """Framework, length and tiers come from the file where it has them; parameters stand in where not."""
    own = {"Framework": "TIF001", "Contract Length (Months)": "24", "Initial Term": "12"}
    tiers = {"Pricing Type": "Tiered Cumulative", "Tiered Array": "[[1:5.00];[101:4.50]]"}
    records, problems = imported(orders(tmp_path, own | tiers, columns=SECOND_GENERATION), framework="X")
    assert not problems
    (placed,) = changes(records, "OrderPlaced")
    assert (placed["framework"], placed["term_months"]) == ("TIF001", 24)
    price = placed["lines"][0]["price"]
    assert (price["type"], price["calculation"]) == ("tiered", "cumulative")
    assert price["tiers"] == [{"from": "1", "to": "100", "price": "5"}, {"from": "101", "price": "4.5"}]
    records, _ = imported(orders(tmp_path, {}), framework="X", term_months=12, vat_rate=Decimal("0.050"))
    (placed,) = changes(records, "OrderPlaced")
    assert (placed["framework"], placed["term_months"], placed["vat_rate"]) == ("X", 12, "0.05")


def test_patients_file_says_what_its_full_twin_says(tmp_path: Path) -> None:
    """Both files of one order may be imported: the second is a duplicate."""
    full, _ = imported(orders(tmp_path, {}))
    patients, problems = imported(orders(tmp_path, {}, columns=PATIENTS_ONLY, name="Patients"))
    assert not problems
    assert patients == full


def test_columns_in_any_order_without_bom_and_with_lf(tmp_path: Path) -> None:
    """Columns are found by name, whatever their order, case and company."""
    columns = [name.upper() for name in reversed([*FIRST_GENERATION, "Sub ICB Name"])]
    row = {name.upper(): value for name, value in EMIS_WEB.items()}
    path = write(tmp_path / "any.csv", columns, [row], bom=False, end="\n")
    assert imported(path) == imported(orders(tmp_path, {}))


@pytest.mark.parametrize(
    ("row", "provisioning", "time_unit"),
    [
        ({"Order Type": "1", "Unit Time": "per year"}, "patient", "year"),
        ({"Order Type": "1", "Unit Time": ""}, "patient", "year"),
        ({"Order Type": "2", "Unit Time": "per month"}, "declarative", "month"),
        ({"Order Type": "2", "Unit Time": ""}, "declarative", "none"),
        ({"Order Type": "3", "Unit Time": ""}, "on_demand", "none"),
        (
            {"Order Type": "2", "Product Type": "Associated Service", "Unit Time": "per year"},
            "declarative",
            "none",
        ),
        (
            {"Order Type": "3", "Product Type": "Associated Service", "Unit Time": "per month"},
            "on_demand",
            "none",
        ),
    ],
)
def test_provisioning_and_time_unit(
    tmp_path: Path, row: dict[str, str], provisioning: str, time_unit: str
) -> None:
    """Order Type gives the provisioning; associated services and prices on demand have no time unit."""
    price = price_of(tmp_path, row)
    assert (price["provisioning"], price["time_unit"]) == (provisioning, time_unit)


def test_associated_service_in_a_patients_file(tmp_path: Path) -> None:
    """Also there an associated service is paid once."""
    row = {"Product Type": "Associated Service", "Product ID": "10000-S-036"}
    records, problems = imported(orders(tmp_path, row, columns=PATIENTS_ONLY, name="Patients"))
    assert not problems
    assert changes(records, "OrderPlaced")[0]["lines"][0]["price"]["time_unit"] == "none"


@pytest.mark.parametrize(
    ("funding_type", "funding"),
    [
        *((name, CENTRAL) for name in ("Central", "Central funding", "GPIT funding", "PCARP FUNDING")),
        *((name, LOCAL) for name in ("Local funding", "None specified")),
    ],
)
def test_funding(tmp_path: Path, funding_type: str, funding: list[dict[str, str]]) -> None:
    """Central kinds draw on the allocation, others are the ordering party's."""
    records, _ = imported(orders(tmp_path, {"Funding Type": funding_type}))
    assert changes(records, "OrderPlaced")[0]["lines"][0]["funding"] == funding


def test_funding_table_of_the_caller(tmp_path: Path) -> None:
    """The caller's table replaces the default."""
    table = {
        "Mixed": [{"payer": "PCN", "take": {"share": "0.5"}}, {"payer": "@ordering_party", "take": "rest"}]
    }
    records, _ = imported(orders(tmp_path, {"Funding Type": "mixed"}), funding_types=table)
    assert changes(records, "OrderPlaced")[0]["lines"][0]["funding"] == table["Mixed"]
    assert only_problem(orders(tmp_path, {}), funding_types=table).field == "Funding Type"


@pytest.mark.parametrize(("name", "calculation"), [("Volume", "volume"), ("SingleFixed", "single_fixed")])
def test_lost_tiers(tmp_path: Path, name: str, calculation: str) -> None:
    """Tiers that the export lost come from the catalogue, if it can have them, else the row is refused."""
    row = {"Pricing Type": f"Tiered {name}", "Price": "5.00"}
    tiers = [{"from": "1", "to": "10", "price": "5"}, {"from": "11", "price": "4"}]
    listed = {"type": "tiered", "calculation": calculation, "tiers": tiers}
    price = price_of(tmp_path, row, catalogue={"10000-001": listed})
    assert (price["calculation"], price["tiers"]) == (calculation, tiers)
    path = orders(tmp_path, row, columns=SECOND_GENERATION)
    for catalogue in (
        {},
        {"10000-002": listed},
        {"10000-001": listed | {"calculation": "cumulative"}},
        {"10000-001": listed | {"type": "flat"}},
    ):
        problem = only_problem(path, catalogue=catalogue)
        assert problem.field == "Pricing Type"
        assert "without its tiers" in problem.reason
    agreed = orders(tmp_path, row | {"Price": "4.99"}, columns=SECOND_GENERATION)
    assert only_problem(agreed, catalogue={"10000-001": listed}).field == "Price"


def test_tiers_in_any_order_up_to_seven(tmp_path: Path) -> None:
    """The export does not promise the order of the tiers."""
    array = "[" + ";".join(f"[{bound}:{bound}.5]" for bound in (31, 1, 61, 21, 11, 41, 51)) + "]"
    tiers = price_of(tmp_path, {"Pricing Type": "Tiered Cumulative", "Tiered Array": array})["tiers"]
    assert [tier["from"] for tier in tiers] == ["1", "11", "21", "31", "41", "51", "61"]
    assert [tier.get("to") for tier in tiers] == ["10", "20", "30", "40", "50", "60", None]


def test_milestones_and_cessation(tmp_path: Path) -> None:
    """Dates that someone filled in follow the order that they speak of."""
    dates = {
        "Actual M1 date": "07/04/2021",
        "Buyer verification date (M2)": "30/04/2021",
        "Cease Date": "01/02/2022",
    }
    records, problems = imported(orders(tmp_path, dates))
    assert not problems
    line = {"item_id": "10000-001", "ods_code": "A81001"}
    assert [record["value"]["change"] for record in records[1:]] == [
        {"MilestoneReached": line | {"milestone": "M1", "date": "2021-04-07"}},
        {"MilestoneReached": line | {"milestone": "M2", "date": "2021-04-30"}},
        {"LineCeased": line | {"date": "2022-02-01"}},
    ]
    ids = [record["value"]["id"] for record in records]
    assert [each.split("-")[0] for each in ids] == ["order", "m1", "m2", "ceased"]


def test_a_forecast_is_no_cessation(tmp_path: Path) -> None:
    """Later exports write "Forecast Cease Date", which ends nothing."""
    columns = [name.replace("Cease", "Forecast Cease") for name in FIRST_GENERATION]
    records, problems = imported(orders(tmp_path, {"Forecast Cease Date": "01/02/2022"}, columns=columns))
    assert not problems
    assert not changes(records, "LineCeased")


def test_revisions_come_in_their_order(tmp_path: Path) -> None:
    """An export with earlier revisions puts the latest first; what repeats a line is refused."""
    added = {"Call Off Agreement ID": "C010001-02", "Product ID": "10000-001A002"}
    again = {"Call Off Agreement ID": "C010001-02"}
    records, problems = imported(orders(tmp_path, added, again, {}))
    assert [placed["order_id"] for placed in changes(records, "OrderPlaced")] == ["C010001-01", "C010001-02"]
    assert [len(placed["lines"]) for placed in changes(records, "OrderPlaced")] == [1, 1]
    assert {record["value"]["order_number"] for record in records} == {"C010001"}
    assert [(problem.line, problem.field, problem.value) for problem in problems] == [
        (3, "Product ID", "10000-001")
    ]


def test_the_same_order_however_sorted(tmp_path: Path) -> None:
    """The content of an OrderPlaced does not follow the order of the rows."""
    rows = [{"Service Recipient ID": code} for code in ("A81001", "A81002", "A81004")]
    assert imported(orders(tmp_path, *rows)) == imported(orders(tmp_path, *reversed(rows)))


def test_the_same_file_twice_gives_the_same(tmp_path: Path) -> None:
    """Also under another name and gzipped; another file has other ids for its dates."""
    dated = {"Actual M1 date": "07/04/2021"}
    path = orders(tmp_path, dated)
    first = imported(path)
    zipped = tmp_path / "again_Full.csv.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert imported(path) == imported(zipped) == first
    ids = [
        {record["value"]["id"] for record in found}
        for found in (first[0], imported(orders(tmp_path, dated, {"Service Recipient ID": "A81002"}))[0])
    ]
    assert ids[0] & ids[1] == {"order-C010001-01"}


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"Call Off Agreement ID": "C1-01"}, "Call Off Agreement ID", "call-off id"),
        ({"Call Off Agreement ID": ""}, "Call Off Agreement ID", "is empty"),
        ({"Call Off Ordering Party ID": "?"}, "Call Off Ordering Party ID", "ODS code"),
        ({"Call Off Commencement Date": "2021-04-01"}, "Call Off Commencement Date", "dd/MM/yyyy"),
        ({"Call Off Commencement Date": "30/02/2021"}, "Call Off Commencement Date", "dd/MM/yyyy"),
        ({"Call Off Commencement Date": "01/04/0021"}, "Call Off Commencement Date", "dd/MM/yyyy"),
        ({"Service Recipient ID": "A 81001"}, "Service Recipient ID", "ODS code"),
        ({"Supplier ID": "100"}, "Supplier ID", "five digits"),
        ({"Product ID": "EMIS"}, "Product ID", "item id"),
        ({"Product Type": "Hardware"}, "Product Type", "is none of"),
        ({"Quantity Ordered": ""}, "Quantity Ordered", "is empty"),
        ({"Quantity Ordered": "-1"}, "Quantity Ordered", "plain decimal"),
        ({"Quantity Ordered": "4,075"}, "Quantity Ordered", "plain decimal"),
        ({"Quantity Ordered": "NaN"}, "Quantity Ordered", "plain decimal"),
        ({"Quantity Ordered": "1e3"}, "Quantity Ordered", "plain decimal"),
        ({"Quantity Ordered": "٣"}, "Quantity Ordered", "plain decimal"),
        ({"Quantity Ordered": "1" + "0" * 12}, "Quantity Ordered", "decimal(18,6)"),
        ({"Price": "0.0000001"}, "Price", "nothing is rounded"),
        ({"Price": "£1.26"}, "Price", "plain decimal"),
        ({"Unit of Order": " "}, "Unit of Order", "is empty"),
        ({"Unit Time": "per week"}, "Unit Time", "is none of"),
        ({"Order Type": "4"}, "Order Type", "is none of"),
        ({"Order Type": "3", "Unit Time": "per month"}, "Unit Time", "on demand"),
        ({"Funding Type": "Mixed"}, "Funding Type", "table of funding types"),
        ({"M1 planned (Delivery Date)": "soon"}, "M1 planned (Delivery Date)", "dd/MM/yyyy"),
        ({"Actual M1 date": "1/4/21"}, "Actual M1 date", "dd/MM/yyyy"),
        ({"Buyer verification date (M2)": "31/04/2021"}, "Buyer verification date (M2)", "dd/MM/yyyy"),
        ({"Cease Date": "x"}, "Cease Date", "dd/MM/yyyy"),
        ({"Contract Length (Months)": "0"}, "Contract Length (Months)", "from 1 to 600"),
        ({"Contract Length (Months)": "36.5"}, "Contract Length (Months)", "whole number"),
        ({"Pricing Type": "Banded"}, "Pricing Type", "is none of"),
        ({"Pricing Type": "Flat", "Tiered Array": "[[1:5]]"}, "Pricing Type", "Tiered Array"),
        ({"Pricing Type": "Tiered Volume", "Tiered Array": "[[1:5]]"}, "Pricing Type", "Tiered Array"),
        ({"Pricing Type": "Tiered Cumulative"}, "Pricing Type", "without its tiers"),
        ({"Tiered Array": "1:5"}, "Tiered Array", "of the form"),
        ({"Tiered Array": "[[1:5][101:4]]"}, "Tiered Array", "of the form"),
        ({"Tiered Array": "[[2:5]]"}, "Tiered Array", "from 1"),
        ({"Tiered Array": "[[1:5];[1:4]]"}, "Tiered Array", "two tiers"),
        ({"Tiered Array": "[[1:-5]]"}, "Tiered Array", "plain decimal"),
        (
            {"Tiered Array": "[" + ";".join(f"[{n}:1]" for n in range(1, 9)) + "]"},
            "Tiered Array",
            "at most 7",
        ),
        ({"Supplier ID": "10052"}, "Supplier ID", "first row"),
        ({"Call Off Commencement Date": "02/04/2021"}, "Call Off Commencement Date", "first row"),
        ({"Service Recipient ID": "A81001"}, "Product ID", "repeats line 2"),
    ],
)
def test_a_bad_row_stops_only_itself(tmp_path: Path, row: dict[str, str], field: str, reason: str) -> None:
    """Between two good rows, a bad one is named by file, line, field, value and reason."""
    bad = {"Service Recipient ID": "A81002"} | row
    path = orders(tmp_path, {}, bad, {"Service Recipient ID": "A81004"}, columns=SECOND_GENERATION)
    records, problems = imported(path)
    (placed,) = changes(records, "OrderPlaced")
    assert [line["ods_code"] for line in placed["lines"]] == ["A81001", "A81004"]
    (problem,) = problems
    assert (problem.file, problem.line, problem.field) == (str(path), 3, field)
    assert problem.value == (EMIS_WEB | bad).get(field, "")
    assert reason in problem.reason
    assert str(problem).startswith(f"{path}:3: {field} {problem.value!r}: ")


def test_unknown_practice(tmp_path: Path) -> None:
    """A code that is not among the practices given is refused; without any, none is."""
    path = orders(tmp_path, {}, {"Service Recipient ID": "A81002"})
    records, problems = imported(path, practices={"A81002"})
    assert len(changes(records, "OrderPlaced")[0]["lines"]) == 1
    assert [(problem.value, problem.reason) for problem in problems] == [
        ("A81001", "is not among the known practices")
    ]
    assert not imported(path)[1]


def test_an_order_without_a_good_line_is_not_placed(tmp_path: Path) -> None:
    """Only its problems are said."""
    assert only_problem(orders(tmp_path, {"Price": "free"})).value == "free"


# Files


@pytest.mark.parametrize("missing", ["Price", "Order Type", "Actual M1 date"])
def test_missing_columns_are_one_problem(tmp_path: Path, missing: str) -> None:
    """However many rows follow."""
    columns = [name for name in FIRST_GENERATION if name != missing]
    problem = only_problem(orders(tmp_path, {}, {}, columns=columns))
    assert (problem.line, problem.field) == (1, "")
    assert f"lacks {missing}" in problem.reason


def test_a_patients_file_without_its_name_is_refused(tmp_path: Path) -> None:
    """A Full file that lost its columns must not be taken as per patient."""
    problem = only_problem(orders(tmp_path, {}, columns=PATIENTS_ONLY))
    assert "lacks Unit Time, Order Type" in problem.reason
    declarative = orders(
        tmp_path, {"Order Type": "2"}, columns=[*PATIENTS_ONLY, "Order Type"], name="Patients"
    )
    assert only_problem(declarative).field == "Order Type"


def test_lines_are_counted_as_an_editor_counts(tmp_path: Path) -> None:
    """Quoted newlines and blank lines count."""
    path = orders(
        tmp_path,
        {"Service Recipient Name": "THE\r\nDENSHAM\r\nSURGERY"},
        {"Service Recipient ID": "A81002", "Price": "x"},
        {"Service Recipient ID": "A81004", "Product Name": "one\ntwo", "Price": "y"},
    )
    content = path.read_bytes()
    path.write_bytes(content.replace(b"C010001-01,16C", b"\r\nC010001-01,16C", 1))
    lines = path.read_bytes().splitlines()
    _, problems = imported(path)
    assert [(problem.line, problem.value) for problem in problems] == [(6, "x"), (7, "y")]
    assert all(lines[problem.line - 1].startswith(b"C010001-01") for problem in problems)


def test_undecodable_bytes(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 spoil their row alone, and are shown."""
    path = orders(tmp_path, {}, {"Service Recipient ID": "A81002", "Product Name": "Café"}, {"Price": "x"})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9"))
    records, problems = imported(path)
    assert len(changes(records, "OrderPlaced")[0]["lines"]) == 1
    assert [(problem.line, problem.field) for problem in problems] == [(3, "Product Name"), (4, "Price")]
    str(problems[0]).encode()
    assert r"\udce9" in str(problems[0])
    path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-16"))
    assert "not UTF-8" in only_problem(path).reason


def test_not_csv(tmp_path: Path) -> None:
    """Text after a closing quote spoils its row; a quote that never closes says up to where it reached."""
    path = orders(tmp_path, {}, {"Service Recipient ID": "A81002"}, {"Service Recipient ID": "A81004"})
    good = path.read_bytes()
    path.write_bytes(good.replace(b"A81002,THE", b'A81002,"THE"', 1))
    records, problems = imported(path)
    assert [problem.line for problem in problems] == [3]
    assert len(changes(records, "OrderPlaced")[0]["lines"]) == 2
    path.write_bytes(good.replace(b"A81002,THE", b'A81002,"THE', 1))
    records, problems = imported(path)
    assert [problem.line for problem in problems] == [3]
    assert "line 4" in problems[0].reason
    assert len(changes(records, "OrderPlaced")[0]["lines"]) == 1
    path.write_bytes(good.replace(b",1.2600,", b",", 1))
    records, problems = imported(path)
    assert [(problem.line, problem.reason) for problem in problems] == [
        (2, "has 22 fields where the header has 23")
    ]


def test_limits(tmp_path: Path) -> None:
    """Too large a file, too long a line, an empty file, half a gzip file, a column twice."""
    path = orders(tmp_path, {})
    assert "larger than 100 bytes" in only_problem(path, max_bytes=100).reason
    zipped = tmp_path / "x_Full.csv.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert "larger than 100 bytes" in only_problem(zipped, max_bytes=100).reason
    zipped.write_bytes(zipped.read_bytes()[:-20])
    assert "gzip" in only_problem(zipped).reason
    path.write_bytes(path.read_bytes() + b"x" * (2**20 + 1) + b"\r\n")
    records, problems = imported(path)
    assert len(records) == len(problems) == 1
    assert "a line of 1,048,576 characters" in problems[0].reason
    path.write_bytes(b"")
    assert "no header" in only_problem(path).reason
    assert "Price twice" in only_problem(orders(tmp_path, {}, columns=[*FIRST_GENERATION, " price"])).reason


def test_a_problem_is_one_line() -> None:
    """Whatever the value."""
    text = str(Problem("f.csv", 7, "Price", "a\nb" * 100, "is odd"))
    assert text.startswith("f.csv:7: Price 'a\\nb")
    assert text.endswith("…': is odd")
    assert "\n" not in text
    assert len(text) < 200
    assert str(Problem("f.csv", 0, "", "", "is empty")) == "f.csv: is empty"


def test_an_instant_needs_an_offset(tmp_path: Path) -> None:
    """A naive recorded_at is the caller's mistake; another offset is written as UTC."""
    path = orders(tmp_path, {})
    with pytest.raises(ValueError, match="offset"):
        list(import_orders(path, recorded_at=datetime(2026, 3, 1)))  # noqa: DTZ001
    records, _ = split(import_orders(path, recorded_at=datetime.fromisoformat("2026-06-01T10:00:00+01:00")))
    assert records[0]["value"]["recorded_at"] == "2026-06-01T09:00:00Z"


# List sizes


def sizes(path: Path, **settings: Any) -> tuple[list[Record], list[Problem]]:
    """Import list sizes."""
    return split(import_list_sizes(path, recorded_at=AT, **settings))


@pytest.mark.parametrize(
    "body", ["CCG_CODE,ONS_CCG_CODE,", "SUB_ICB_LOCATION_CODE,ONS_SUB_ICB_LOCATION_CODE,", ""]
)
def test_published_list_sizes(tmp_path: Path, body: str) -> None:
    """Only practices' totals are kept, whatever columns the year has for the commissioner."""
    code = "16C,E38000247," if body else ""
    path = tmp_path / "gp-reg-pat-prac-all.csv"
    path.write_text(
        f"PUBLICATION,EXTRACT_DATE,TYPE,{body}CODE,POSTCODE,SEX,AGE,NUMBER_OF_PATIENTS\n"
        f"GP_PRAC_PAT_LIST,01JAN2021,CCG,{code}16C,,ALL,ALL,700000\n"
        f"GP_PRAC_PAT_LIST,01JAN2021,GP,{code}A81001,TS18 1HU,ALL,ALL,4075\n"
        f"GP_PRAC_PAT_LIST,01JAN2021,GP,{code}A81001,TS18 1HU,MALE,ALL,2000\n"
        f"GP_PRAC_PAT_LIST,01JAN2021,GP,{code}A81001,TS18 1HU,ALL,0_4,200\n"
    )
    records, problems = sizes(path)
    assert not problems
    (record,) = records
    assert record["topic"] == "reference-changes"
    assert record["value"]["code"] == "A81001"
    assert record["value"]["id"].startswith("list-A81001-2021-01-01-")
    assert changes(records, "ListSize") == [{"ods_code": "A81001", "as_of": "2021-01-01", "patients": 4075}]


def test_a_republished_number_is_a_new_id(tmp_path: Path) -> None:
    """The same file again is a duplicate; a correction is not, even one that returns to the first number."""
    path = tmp_path / "sizes.csv"
    ids = []
    for text in (
        "A81001,2021-01-01,100",
        "A81001,2021-01-01,110",
        "A81001,2021-01-01,100\nA81002,2021-01-01,5",
    ):
        path.write_text(f"ods_code,as_of,patients\n{text}\n")
        assert sizes(path) == sizes(path)
        ids.append(sizes(path)[0][0]["value"]["id"])
    assert len(set(ids)) == 3


def test_bad_list_sizes(tmp_path: Path) -> None:
    """Each bad row by itself."""
    path = tmp_path / "sizes.csv"
    rows = ["A81001,2021-01-01,100", "A81001,2021-01-01,101", "A81002,01/01/2021,5", "A81003,2021-01-01,-5"]
    path.write_text(
        "\n".join(["ods_code,as_of,patients", *rows, "A81009,2021-01-01,5", "a81004,2021-01-01,5"])
    )
    records, problems = sizes(path, practices={"A81001", "A81002", "A81003", "A81004"})
    assert [body["ods_code"] for body in changes(records, "ListSize")] == ["A81001", "A81004"]
    assert [(problem.line, problem.field) for problem in problems] == [
        (3, "ods_code"),
        (4, "as_of"),
        (5, "patients"),
        (6, "ods_code"),
    ]
    path.write_text("EXTRACT_DATE,TYPE,CODE,SEX,AGE,NUMBER_OF_PATIENTS\n31FEB2021,GP,A81001,ALL,ALL,5\n")
    assert [problem.field for problem in sizes(path)[1]] == ["EXTRACT_DATE"]
    path.write_text("EXTRACT_DATE,TYPE,CODE,SEX,AGE,NUMBER_OF_PATIENTS\n01JAN2021,GP,A81001,MALE,ALL,5\n")
    assert "no list size" in sizes(path)[1][0].reason


# Practices and allocations


def test_practices_from_a_mapping(tmp_path: Path) -> None:
    """PCN and commissioner of each practice, and the ICB of each sub-ICB location once."""
    path = tmp_path / "practices.csv"
    path.write_text(
        "ods_code,name,sub_icb_code,pcn_code,icb_code,as_of\n"
        'A81001,"A, B",16C,U89141,QHM,2022-01-01\n'
        "A81002,,16C,,QHM,2022-01-01\n"
        "A81003,,16C,,QXX,2022-01-01\n"
        "A81001,,16C,,QHM,2022-01-01\n"
    )
    records, problems = split(import_practices(path, recorded_at=AT))
    said = [(body["ods_code"], body["kind"], body["parent"]) for body in changes(records, "Membership")]
    assert said == [
        ("A81001", "pcn", "U89141"),
        ("A81001", "commissioner", "16C"),
        ("16C", "commissioner", "QHM"),
        ("A81002", "commissioner", "16C"),
    ]
    assert {record["value"]["code"] for record in records} == {"A81001", "A81002", "16C"}
    assert {body["from"] for body in changes(records, "Membership")} == {"2022-01-01"}
    assert [(problem.line, problem.field) for problem in problems] == [(4, "icb_code"), (5, "ods_code")]
    earlier, _ = split(import_practices(path, recorded_at=AT, since=date(2020, 4, 1)))
    assert {body["from"] for body in changes(earlier, "Membership")} == {"2020-04-01"}
    assert not {each["value"]["id"] for each in earlier} & {each["value"]["id"] for each in records}


def test_practices_from_the_register(tmp_path: Path) -> None:
    """The register's closing dates are administrative: said only when asked, as the first day without."""
    path = tmp_path / "orgs_history.csv"
    path.write_text(
        "ods_code,opened,closed,status,sub_icb_code,sub_icb_joined,sub_icb_left,icb_code,region_code\n"
        "A81001,1974-04-01,,active,16C,2020-04-01,,QHM,Y63\n"
        "A81003,1974-04-01,2017-10-31,closed,00K,2013-04-01,2017-10-31,Q74,Y54\n"
        "A81005,1990-01-01,,active,16C,2020-04-01,2019-01-01,QHM,Y63\n"
    )
    records, problems = split(import_practices(path, recorded_at=AT))
    assert changes(records, "PracticeOpened") == [
        {"ods_code": "A81001", "date": "1974-04-01"},
        {"ods_code": "A81003", "date": "1974-04-01"},
    ]
    assert not changes(records, "PracticeClosed")
    assert changes(records, "Membership") == [
        {"ods_code": "A81001", "kind": "commissioner", "parent": "16C", "from": "2020-04-01"},
        {"ods_code": "16C", "kind": "commissioner", "parent": "QHM", "from": "2022-07-01"},
        {
            "ods_code": "A81003",
            "kind": "commissioner",
            "parent": "00K",
            "from": "2013-04-01",
            "to": "2017-11-01",
        },
    ]
    assert [problem.field for problem in problems] == ["sub_icb_left"]
    records, _ = split(import_practices(path, recorded_at=AT, closings=True, practices={"A81003"}))
    assert changes(records, "PracticeClosed") == [{"ods_code": "A81003", "date": "2017-11-01"}]


def test_allocations(tmp_path: Path) -> None:
    """An amount under the party's code, the national rate under ENGLAND."""
    path = tmp_path / "allocations.csv"
    path.write_text(
        "ordering_party,financial_year,amount\n16C,2020,1000000.50\n16C,2020,2\n,2020,2\nQHM,2020/21,2\n"
    )
    records, problems = split(import_allocations(path, recorded_at=AT))
    assert changes(records, "Allocation") == [
        {"ordering_party": "16C", "financial_year": 2020, "amount": "1000000.5"}
    ]
    assert records[0]["value"]["code"] == "16C"
    assert [(problem.line, problem.field) for problem in problems] == [
        (3, "financial_year"),
        (4, "ordering_party"),
        (5, "financial_year"),
    ]
    path.write_text("financial_year,per_patient,as_of\n2020,1.61,2020-04-01\n")
    records, problems = split(import_allocations(path, recorded_at=AT))
    assert not problems
    assert records[0]["value"]["code"] == "ENGLAND"
    assert changes(records, "Allocation") == [
        {"financial_year": 2020, "per_patient": "1.61", "as_of": "2020-04-01"}
    ]


def test_every_importer_has_the_common_signature(tmp_path: Path) -> None:
    """And says of a file in no known shape what it lacks."""
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    assert set(IMPORTERS) == {"orders", "list-sizes", "practices", "allocations"}
    for importer in IMPORTERS.values():
        (problem,) = importer(path, recorded_at=AT, practices=None, max_bytes=1000)
        assert isinstance(problem, Problem)
        assert "the header lacks" in problem.reason


# The reference data in the package


def test_reference_data_has_the_counts_that_its_readme_states() -> None:
    """Figures of the source's README."""
    assert len(data.practices()) == 6_527
    assert len({practice.pcn_code for practice in data.practices()} - {""}) == 1_254
    assert sum(not practice.pcn_code for practice in data.practices()) == 68
    assert sum(not practice.name for practice in data.practices()) == 247
    list_sizes = data.list_sizes()
    assert Counter(each.as_of for each in list_sizes) == {date(2018, 11, 1): 7_033, date(2021, 1, 1): 6_658}
    patients: Counter[int] = Counter()
    for each in list_sizes:
        patients[each.as_of.year] += each.patients
    assert patients == {2018: 59_503_377, 2021: 60_606_345}
    assert len(data.list_size_history()) == 63_808
    assert Counter(each.supplier_id for each in data.practice_systems()) == {"10000": 4_125, "10052": 2_515}
    assert len(data.suppliers()) == 74
    prices = data.catalogue()
    assert (len(prices), len({price.item_id for price in prices})) == (115, 112)
    assert len({price.supplier_id for price in prices}) == 16
    assert Counter(price.time_unit for price in prices) == {"none": 77, "year": 31, "month": 7}
    assert sum(price.draft for price in prices) == 6
    listed = {price.price_id: price.price for price in prices}
    assert (listed[1001], listed[1102]) == (Decimal("1.26"), Decimal("0.017"))


def test_reference_data_goes_through_the_importers() -> None:
    """Without a problem; the practices of one file do not cover the other snapshot, which is then said."""
    with data.file("list_sizes") as path:
        records, problems = sizes(path)
        known = {practice.ods_code for practice in data.practices()}
        _, unknown = sizes(path, practices=known)
    assert (len(records), len(problems)) == (13_691, 0)
    later = [problem for problem in unknown if problem.value not in known]
    assert len(later) == len(unknown)
    assert len({problem.value for problem in unknown}) >= 135
    with data.file("practices") as path:
        records, problems = split(import_practices(path, recorded_at=AT))
    assert not problems
    kinds = Counter(body["kind"] for body in changes(records, "Membership"))
    assert kinds == {"pcn": 6_527 - 68, "commissioner": 6_527 + 106}


def test_compact_is_deterministic_and_small(tmp_path: Path) -> None:
    """Compacting what was compacted gives the same bytes, under the limit."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in compact.COLUMNS:
        with data.file(name) as path:
            (source / f"{name}.csv").write_bytes(gzip.decompress(path.read_bytes()))
    written = compact.compact(source, target)
    for name in compact.COLUMNS:
        with data.file(name) as path:
            assert (target / path.name).read_bytes() == path.read_bytes()
    assert sum(size for _, size in written.values()) < compact.MAX_TOTAL_BYTES
