"""`tribill verify` over what `tribill run` wrote: all agrees; whatever is changed is found.

One run of a private installation writes the files (some 20 seconds); each case changes a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_billing_book import BOOK, LATE, contract, usage
from tribill.verify import Unusable, Verdict, verify
from tribill.verify_usage import Reading, digest

ROOT = Path(__file__).parents[1]
M2 = contract("m2", "MilestoneReached", item_id="10000-002", ods_code="A83005", milestone="M2", date="2026-05-12")
LINES = [*BOOK, {"close": "2026-04"}, *LATE, M2, {"close": "2026-05"}]

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `tribill run --out` wrote of a book with two closes and late changes."""
    folder = tmp_path_factory.mktemp("verify")
    write_lines(folder / "events.jsonl", LINES)
    command = [sys.executable, "-m", "tribill", "run", "events.jsonl", "--out", "bills"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRIBILL_")}
    ended = subprocess.run(
        command, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "corrections 369.11 (24.8 % of all billed)" in ended.stderr
    return folder / "bills"


@pytest.fixture
def bills(written: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(written, tmp_path / "bills"))


def write_lines(path: Path, lines: list[Any]) -> Path:
    """An interchange file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def check(path: Path, *usage_files: Path, verbose: bool = False) -> tuple[Verdict, list[str]]:
    """What verify finds and says."""
    said: list[str] = []
    return verify(path, usage_files, said.append, verbose=verbose), said


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of every plain value."""
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*path, name))
    else:
        yield path


def change(path: Path, place: tuple[Any, ...], to: Callable[[Any], Any]) -> None:
    """Changes one value of a JSON file."""
    body = json.loads(path.read_text())
    inner = body
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = to(inner[place[-1]])
    path.write_text(json.dumps(body, separators=(",", ":"), ensure_ascii=False) + "\n")


def forge(document: Path) -> None:
    """Makes all digests right again, as somebody would who wants the change not to be found."""
    evidence = next(document.parent.glob(document.name.rpartition("-")[0].removesuffix("-credit") + "-evidence.json"))
    body = json.loads(document.read_text())
    body["evidence_sha256"] = hashlib.sha256(evidence.read_bytes()).hexdigest()
    body.pop("sha256")
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
    document.write_text(json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def other(value: Any) -> Any:
    """Another value of the same kind: a digit or a letter more."""
    if value is None or isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value[:-1] + ("1" if value[-1:] != "1" else "2")


def test_all_agrees(written: Path) -> None:
    """A document, a period and the whole folder; line by line with --verbose."""
    whole, said = check(written, verbose=True)
    assert (whole.exit_code, whole.documents, whole.lines) == (0, 4, 19)
    assert sum("agrees" in text for text in said) == 19
    assert check(written / "2026-05")[0].exit_code == 0
    assert check(written / "2026-05" / "NHSE-000002-invoice.json")[0].lines == 5


def test_no_server_is_needed() -> None:
    """A supplier runs it on its own machine: nothing of the stack is even imported."""
    code = (
        "import sys, tribill.verify; "
        "print(sorted({'faust', 'confluent_kafka', 'clickhouse_connect', 'redis', 'streams', 'agents'}"
        " & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_any_changed_value_of_a_document_is_found(bills: Path) -> None:
    """Whatever it is: a penny, a date, a cause."""
    document = bills / "2026-05" / "NHSE-000002-invoice.json"
    before = document.read_bytes()
    places = list(leaves(json.loads(before)))
    assert len(places) > 50
    for place in places:
        change(document, place, other)
        assert check(document)[0].exit_code == 1, place
        document.write_bytes(before)


@pytest.mark.parametrize("column", ["net", "for_period", "kind", "vat_rate", "ods_code", "item_id", "order_number"])
def test_a_forged_line_is_found(bills: Path, column: str) -> None:
    """Also when all digests were made right again: the line does not come out of its evidence."""
    for document in sorted(bills.rglob("*-invoice.json")):
        before = document.read_bytes()
        for index in range(len(json.loads(before)["lines"])):
            change(document, ("lines", index, column), other)
            forge(document)
            verdict, said = check(document)
            assert verdict.exit_code == 1
            assert any("C010001" in text or "lines[" in text for text in said), said
            document.write_bytes(before)


@pytest.mark.parametrize("name", ["net", "vat", "gross", "number", "period", "payer", "supplier_id"])
def test_a_forged_sum_or_name_is_found(bills: Path, name: str) -> None:
    """Sums follow from the lines, names are those of the evidence."""
    document = bills / "2026-05" / "NHSE-000002-invoice.json"
    change(document, (name,), other)
    forge(document)
    verdict, said = check(document)
    assert verdict.exit_code == 1
    assert any(name in text for text in said)


def test_a_line_more_or_less_is_found(bills: Path) -> None:
    """A forged document without a line, and with one twice."""
    document = bills / "2026-05" / "NHSE-000002-invoice.json"
    before = document.read_bytes()
    for lines, text in ((lambda each: each[1:], "is not there"), (lambda each: [*each, each[0]], "stands twice")):
        change(document, ("lines",), lines)
        forge(document)
        verdict, said = check(document)
        assert verdict.exit_code == 1
        assert any(text in each for each in said)
        document.write_bytes(before)


def test_any_changed_value_of_evidence_is_found(bills: Path) -> None:
    """Its digest stands in the document."""
    document = bills / "2026-04" / "NHSE-000001-invoice.json"
    evidence = bills / "2026-04" / "NHSE-000001-evidence.json"
    before = evidence.read_bytes()
    places = list(leaves(json.loads(before)))
    assert len(places) > 100
    for place in places:
        change(evidence, place, other)
        assert check(document)[0].exit_code == 1, place
        evidence.write_bytes(before)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("practices", "A83005", "list_sizes", "2026-03-01"), 8462),
        (("usage", 0, "quantity", "2026-04-03"), "1004"),
        (("usage", 0, "quantity"), {"2026-04-04": "1003", "2026-04-11": "11", "2026-04-30": "17.5"}),
        (("usage", 0, "readings", "2026-04-03", 1), "0" * 64),
        (("usage", 0, "readings", "2026-04-03", 0), 2),
        (("allocations", 0, "amount"), "1501"),
        (("allocations", 0, "wanted", "2026-04"), "273700"),
        (("period",), "2026-05"),
        (("format",), "tribill-evidence/2"),
    ],
)
def test_forged_evidence_is_found(bills: Path, place: tuple[Any, ...], value: Any) -> None:
    """A changed list size, usage day, digest or allocation gives other pennies, or other readings than are listed."""
    document = bills / "2026-04" / "NHSE-000001-invoice.json"
    change(bills / "2026-04" / "NHSE-000001-evidence.json", place, lambda _: value)
    forge(document)
    assert check(document)[0].exit_code == 1


@pytest.mark.parametrize(("was", "now"), [('"17.5"', '"18"'), ('"u1"', '"u9"'), ("04-03T", "04-04T"), (":1,", ":2,")])
def test_a_changed_event_is_found(bills: Path, was: str, now: str) -> None:
    """A reading beside the document with another quantity, id, day or revision."""
    listed = bills / "2026-04" / "NHSE-000001-usage.jsonl"
    text = listed.read_text()
    assert text.count(was) == 1
    listed.write_text(text.replace(was, now))
    verdict, said = check(bills / "2026-04")
    assert verdict.exit_code == 1
    assert "NHSE-000001-usage.jsonl" in said[0]


def test_files_that_are_missing_or_do_not_belong_are_found(bills: Path) -> None:
    """Evidence without a document, a document without evidence, another lines.csv, other earlier documents."""
    april, may = bills / "2026-04", bills / "2026-05"
    lines = (may / "lines.csv").read_text()
    (may / "lines.csv").write_text(lines.replace("-96.35", "-96.34"))
    assert check(bills)[1] == [
        f"{may}/lines.csv: C010001 10000-001 B81001 10000 NHSE 2026-04 adjustment: -96.34, in the documents -96.35"
    ]
    (may / "lines.csv").write_text(lines)
    change(may / "NHSE-000002-evidence.json", ("invoiced", 0, "net", "2026-04"), lambda _: "486.40")
    forge(may / "NHSE-000002-invoice.json")
    assert any("486.40 invoiced before, the earlier documents say 486.41" in text for text in check(bills)[1])
    (may / "NHSE-000002-evidence.json").unlink()
    (april / "NHSE-000001-invoice.json").unlink()
    verdict, said = check(bills)
    assert verdict.exit_code == 1
    assert any("no document beside this evidence" in text for text in said)
    assert any("there is no NHSE-000002-evidence.json beside it" in text for text in said)


@pytest.mark.parametrize(
    ("suffix", "was", "now"),
    [(".xml", b"PayableAmount>", b"PayableAmount >"), (".csv", b".", b","), (".pdf", b"e", b"f")],
)
def test_a_forged_form_is_found(bills: Path, suffix: str, was: bytes, now: bytes) -> None:
    """The e-invoice is what a payer's machine books, the PDF what a person pays."""
    document = bills / "2026-05" / "NHSE-000002-invoice.json"
    form = document.with_suffix(suffix)
    form.write_bytes(form.read_bytes().replace(was, now, 1))
    verdict, said = check(document)
    assert (verdict.exit_code, said) == (1, [f"{form}: does not say what NHSE-000002-invoice.json says"])
    form.unlink()
    assert check(document)[0].exit_code == 0


def test_an_e_invoice_of_what_is_none_is_found(bills: Path) -> None:
    """A payer's machine would book it."""
    document = bills / "2026-05" / "NHSE-000002-invoice.json"
    change(document, ("electronic",), lambda _: False)
    forge(document)
    assert any("NHSE-000002-invoice.xml: is not to be there" in text for text in check(document)[1])


def test_other_papers_that_look_like_documents_are_passed_over(bills: Path) -> None:
    """A payer called X-invoice has a file odoo/X-invoice.json, and a supplier a statement."""
    for name in ("odoo/X-invoice.json", "statements/supplier-Y-evidence.json", "statements/lines.csv"):
        (bills / "2026-04" / name).write_text("{}")
    assert check(bills)[0].exit_code == 0


def test_codes_with_odd_characters_and_large_quantities_are_read(bills: Path) -> None:
    """A line separator inside a code ends no row of lines.csv; a quantity may be a sum above a reading's limit."""
    april = bills / "2026-04"
    for path in (*april.glob("*.json*"), april / "lines.csv"):
        path.write_text(path.read_text().replace("A83005", "A\u20283005"))
    for path in april.glob("*-invoice.json"):
        forge(path)
        for suffix in (".xml", ".pdf", ".csv"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    assert check(april)[0].exit_code == 0
    document = april / "NHSE-000001-invoice.json"
    body = json.loads(document.read_text())
    body["lines"][0] |= {"quantity": "1000000000000000.5", "unit_price": "0"}
    document.write_text(json.dumps(body))
    forge(document)
    said = check(april)[1]
    assert len(said) == 1
    assert "quantity x unit_price is not" in said[0]


OWN = [line for line in LINES if str(line.get("topic", "")).startswith("usage")]


@pytest.mark.parametrize("shown", ["2026-04/NHSE-000001-invoice.json", "2026-05", "."])
def test_a_suppliers_own_usage_agrees(written: Path, tmp_path: Path, shown: str) -> None:
    """Its file as of the bill's cut; duplicates, revisions and another topic's lines in it are nothing new."""
    known = OWN if shown != "2026-04/NHSE-000001-invoice.json" else [line for line in BOOK if line in OWN]
    own = write_lines(tmp_path / "own.jsonl", [*known, *known, LINES[0]])
    verdict, said = check(written / shown, own)
    assert verdict.exit_code == 0, said
    assert verdict.days > 4


def test_differences_are_listed_event_by_event(written: Path, tmp_path: Path) -> None:
    """What the supplier has that the bill does not count, the reverse, and what is another."""
    own = [line for line in OWN if line["value"]["id"] != "u1"]
    own += [usage("u9", "7", "2026-04-29T10:00:00Z"), usage("u2", "1", "2026-04-30T22:00:00Z", revision=4)]
    own += [usage("v1", "3", "2026-04-05T10:00:00Z", ods_code="B81001"), usage("v2", "-3", "2026-04-05T10:00:00Z")]
    file = write_lines(tmp_path / "own.jsonl", own)
    verdict, said = check(written, file)
    assert verdict.exit_code == 1
    assert said == [
        f"{file}:{len(own)}: quantity: '-3' is negative: is no usage that can be billed",
        "2026-04-03 10000-S-001 at A83005: the bill counts 1003 in 1 readings, your file has 0 in 0",
        "  only the bill counts u1: 1003 at 2026-04-03T10:00:00Z, revision 0",
        "2026-04-29 10000-S-001 at A83005: the bill counts 100 in 1 readings, your file has 107 in 2",
        "  only your file has u9: 7 at 2026-04-29T10:00:00Z, revision 0",
        "2026-04-30 10000-S-001 at A83005: the bill counts 17.5 in 1 readings, your file has 1 in 1",
        "  u2: the bill counts 17.5 at 2026-04-30T22:59:59Z, revision 0, your file has 1 at 2026-04-30T22:00:00Z, "
        "revision 4",
        "2026-04-05 10000-S-001 at B81001: no bill counts usage of it, your file has 1 readings",
        "  only your file has v1: 3 at 2026-04-05T10:00:00Z, revision 0",
    ]


def test_without_the_listed_readings_the_days_are_narrowed_down(bills: Path, tmp_path: Path) -> None:
    """The digests in the evidence say which day; the supplier's own readings of it are listed."""
    for listed in bills.rglob("*-usage.jsonl"):
        listed.unlink()
    own = write_lines(tmp_path / "own.jsonl", [*OWN, usage("u9", "7", "2026-04-29T10:00:00Z")])
    assert check(bills, own)[1] == [
        "2026-04-29 10000-S-001 at A83005: the bill counts 100 in 1 readings, your file has 107 in 2",
        "  your file has u5: 100 at 2026-04-29T10:00:00Z, revision 0",
        "  your file has u9: 7 at 2026-04-29T10:00:00Z, revision 0",
    ]


def test_the_digest_is_the_documented_one() -> None:
    """`printf '0 3000000 u1\\n' | sha256sum`; lines sorted as bytes."""
    one, two = Reading(0, 3_000_000, ""), Reading(12, 500_000, "")
    assert digest({("10030", "u1"): one}).sha256.startswith("e4e54a771837")
    expected = hashlib.sha256("0 3000000 u1\n12 500000 é\n".encode()).hexdigest()
    assert digest({("10030", "é"): two, ("10030", "u1"): one}).sha256 == expected


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "no document here"),
        (lambda bills: [each.unlink() for each in bills.rglob("*-invoice.json")], "no document here"),
    ],
)
def test_where_there_is_no_document(bills: Path, spoil: Callable[[Path], object], said: str) -> None:
    """It says what a document's name looks like."""
    spoil(bills)
    with pytest.raises(Unusable, match=said):
        check(bills)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lines": 1e400}', "[" * 100_000, "9" * 5000, "\udcff"])
@pytest.mark.parametrize("name", ["NHSE-000001-invoice.json", "NHSE-000001-evidence.json"])
def test_files_that_are_no_json_of_ours(bills: Path, name: str, text: str) -> None:
    """Said with the file, and the others are verified all the same."""
    (bills / "2026-04" / name).write_text(text, errors="surrogateescape")
    verdict, said = check(bills)
    assert verdict.exit_code in (1, 2)
    assert verdict.documents >= 3
    assert any(name in each for each in said)


def test_a_file_of_usage_that_cannot_be_read(written: Path, tmp_path: Path) -> None:
    """No verdict without it."""
    with pytest.raises(Unusable, match=r"own\.jsonl"):
        check(written, tmp_path / "own.jsonl")


def test_the_command_says_and_exits(bills: Path) -> None:
    """0, 1 and 2, with a last line that counts."""

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "tribill", "verify", *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return ended.returncode, (ended.stdout + ended.stderr).splitlines()[-1]

    assert run(str(bills)) == (0, "4 documents, 19 lines agree, 10 days of readings compared; no differences")
    change(bills / "2026-04" / "NHSE-000001-invoice.json", ("gross",), other)
    code, last = run(str(bills))
    assert (code, last.rpartition(";")[2]) == (1, " 2 differences")
    assert run(str(bills / "nothing"))[0] == 2
