"""`tribill import`: a bad row is reported and stops nothing but itself; the exit status tells."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from tribill.cli import cli
from tribill.importers import Problem
from tribill.importers.parties import import_parties

HEADER = (
    "Call Off Agreement ID,Call Off Ordering Party ID,Call Off Ordering Party Name,Call Off Commencement Date,"
    "Service Recipient ID,Service Recipient Name,Service Recipient Item ID,Supplier ID,Supplier Name,Product ID,"
    "Product Name,Product Type,Quantity Ordered,Unit of Order,Unit Time,Estimation Period,Price,Order Type,"
    "Funding Type,M1 planned (Delivery Date),Actual M1 date,Buyer verification date (M2),Cease Date"
)
ROW = (
    "C010001-01,16C,NHS Tees Valley,01/04/2026,{ods_code},SURGERY,1,10000,EMIS,10000-001,Emis Web GP,"
    "Catalogue Solution,{quantity},per patient,per year,,1.26,1,Central,01/04/2026,,,"
)


def order_file(folder: Path) -> Path:
    """An order of two practices, of which one row is bad."""
    rows = [HEADER, ROW.format(ods_code="A81001", quantity="4075"), ROW.format(ods_code="A81002", quantity="4o75")]
    path = folder / "C010001-01_16C_Full.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(row + "\r\n" for row in rows).encode())
    return path


def test_a_bad_row_stops_nothing_but_itself(tmp_path: Path) -> None:
    """The order goes on with its good line; file, line, field and value are named; the status is 1."""
    path, target = order_file(tmp_path), tmp_path / "out.jsonl"
    done = CliRunner().invoke(cli, ["import", "orders", str(path), "--to", str(target)])
    assert done.exit_code == 1
    assert f"{path}:3: Quantity Ordered '4o75'" in done.output
    (record,) = [json.loads(line) for line in target.read_text().splitlines()]
    lines = record["value"]["change"]["OrderPlaced"]["lines"]
    assert [line["ods_code"] for line in lines] == ["A81001"]


def test_an_order_may_be_held_back_whole(tmp_path: Path) -> None:
    """With --whole nothing of a file with a bad row is sent: an order is placed once."""
    path, target = order_file(tmp_path), tmp_path / "out.jsonl"
    done = CliRunner().invoke(cli, ["import", "orders", str(path), "--to", str(target), "--whole"])
    assert done.exit_code == 1
    assert target.read_text() == ""


def test_list_sizes_are_written(tmp_path: Path) -> None:
    """A clean file ends with status 0."""
    source, target = tmp_path / "sizes.csv", tmp_path / "out.jsonl"
    source.write_text("ods_code,as_of,patients\nA81001,2021-01-01,3975\n")
    done = CliRunner().invoke(cli, ["import", "list-sizes", str(source), "--to", str(target)])
    assert done.exit_code == 0, done.output
    assert json.loads(target.read_text())["value"]["change"]["ListSize"]["patients"] == 3975


def test_only_known_practices(tmp_path: Path) -> None:
    """A practice that the file of practices does not have is refused, wherever its column stands."""
    path, target, known = order_file(tmp_path), tmp_path / "out.jsonl", tmp_path / "practices.csv"
    for code, refused in (("A81001", False), ("A81003", True)):
        known.write_text(f"name,ods_code\nTHE SURGERY, {code} \n")
        done = CliRunner().invoke(cli, ["import", "orders", str(path), "--to", str(target), "--practices", str(known)])
        assert (f"{path}:2: Service Recipient ID 'A81001'" in done.output) == refused, done.output


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (b"ods_code\nA81001\nA81\xff\n", ":3: ods_code 'A81\\udcff': has bytes that are not UTF-8"),
        (b"code\nA81001\n", ":1: the header lacks ods_code (read as a list of practices)"),
        (b"ods_code\n" + b"A" * 2**20, ":2: is not CSV (a line of 1,048,576 characters or more ends the reading)"),
        (b"ods_code\n" + b"A81001\n" * (64 * 2**20 // 7), ": is larger than 67,108,864 bytes"),
        (b"", ": is empty: it has no header"),
    ],
    ids=["not UTF-8", "no such column", "a line without end", "too large", "empty"],
)
def test_a_bad_file_of_practices(tmp_path: Path, written: bytes, reason: str) -> None:
    """Nothing is imported on the word of a file that cannot be read: it is named, with the line and what to do."""
    path, target, known = order_file(tmp_path), tmp_path / "out.jsonl", tmp_path / "practices.csv"
    known.write_bytes(written)
    done = CliRunner().invoke(cli, ["import", "orders", str(path), "--to", str(target), "--practices", str(known)])
    assert done.exit_code == 1
    assert done.output == f"tribill: {known}{reason}; mend the file of practices, or import without --practices\n"
    assert not target.exists()


def test_a_party_file_row_by_row(tmp_path: Path) -> None:
    """A bad row is a problem with file, line, field, value and fix; the others are kept, in order."""
    path = tmp_path / "parties.jsonl"
    good = {"item": {"item_id": "10030-S-001", "name": "Text message"}}
    bad = {"item": {"item_id": "10030-S-001", "name": "Text message", "from": "1 April"}}
    lines = [json.dumps(good), "", json.dumps(bad), "{", json.dumps(good)]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    found = list(import_parties(path))
    assert [each for each in found if not isinstance(each, Problem)] == [good, good]
    said = [str(each) for each in found if isinstance(each, Problem)]
    assert said[0] == f"{path}:3: item.from '\"1 April\"': is '1 April', not a date like 2026-04-01"
    assert said[1].startswith(f"{path}:4: is no line of JSON in UTF-8")


def test_a_party_file_is_bounded(tmp_path: Path) -> None:
    """A file or a line that is too long is refused, not read."""
    path = tmp_path / "parties.jsonl"
    path.write_bytes(b"x" * 70_000)
    assert [str(each) for each in import_parties(path, max_bytes=69_999)] == [f"{path}: is larger than 69,999 bytes"]
    [problem] = import_parties(path)
    assert "more than 65,536 bytes" in str(problem)


@pytest.mark.parametrize(
    "closes",
    [["--close", "2026-04", "2026-05", "--close", "2026-06"], ["--close=2026-04", "2026-05", "--close", "2026-06"]],
)
def test_several_closes(tmp_path: Path, closes: list[str]) -> None:
    """After one --close or one each: they are closed in the order named, and a period is never taken for a file."""
    path = order_file(tmp_path)
    with mock.patch("tribill.run.run", return_value=[]) as run:
        done = CliRunner().invoke(cli, ["run", str(path), *closes, "--out", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert run.call_args[0][:2] == ((path,), ("2026-04", "2026-05", "2026-06"))
        assert CliRunner().invoke(cli, ["run", "--close", "2026-04", "2026-05"]).exit_code == 2
        assert CliRunner().invoke(cli, ["run", str(path), "2026-05"]).exit_code == 2
