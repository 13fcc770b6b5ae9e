"""Files from outside, whatever is in them: records that can be encoded, problems that can be read, and nothing else."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rating.parties import read_party_row
from streams.codec import Codec, from_interchange
from streams.settings import Settings
from tests.crash_world import Fuse, MemoryLog, MemoryOutbox
from tests.rich_book import BOOK
from tribill.importers import IMPORTERS, Problem
from tribill.importers.orders import FULL
from tribill.importers.parties import import_parties
from tribill.interchange import BadClose, Publisher, read, survey

AT = datetime(2026, 3, 1, 9, tzinfo=UTC)
CODEC = Codec(Settings())
MANY = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=int(os.environ.get("TRIBILL_HOSTILE_EXAMPLES", "60")),
)
HEADERS = {
    "orders": [*FULL.required, *FULL.optional],
    "list-sizes": ["ods_code", "as_of", "patients"],
    "practices": ["ods_code", "sub_icb_code", "pcn_code", "icb_code", "as_of"],
    "allocations": ["ordering_party", "financial_year", "amount"],
}
GOOD = [
    "C010001-01", "A83005", "QOP", "10030", "10030-001", "01/04/2026", "2026-04-01", "2026", "1.26", "100", "patient",
    "per year", "Catalogue Solution", "1", "Central", "36", "Tiered Cumulative", "[[1:5.00];[101:4.50]]", "",
]  # fmt: skip
NASTY = [
    "\x00", '"', '""', "'", "\n", "\r", "\ufeff", "=cmd()", "%s", "{0}", "'; DROP TABLE usage; --", "9" * 400, "1e9",
    "NaN", "-1", "٣", "²", "31/02/2026", "00/00/0000", "0000-00-00", "[[1:" + "9" * 50 + "]]", "[" * 500, "x" * 140_000,
    "\u202e", "İ", "ß" * 100,
]  # fmt: skip
cells = st.one_of(st.sampled_from(GOOD), st.sampled_from(NASTY), st.text(max_size=20))


def table(header: list[str], rows: list[list[str]]) -> bytes:
    """A CSV file; what is no Unicode text stays as it is."""
    out = io.StringIO()
    csv.writer(out).writerows([header, *rows])
    return out.getvalue().encode(errors="surrogatepass")


def check_import(kind: str, path: Path) -> None:
    """Records that the log takes, and problems of a bounded length."""
    for found in IMPORTERS[kind](path, recorded_at=AT):
        if isinstance(found, Problem):
            assert len(str(found)) < 2_000 + len(str(path))
            assert str(found).isprintable()
        else:
            name = "ContractChange" if found["topic"] == "contract-changes" else "ReferenceChange"
            CODEC.encode(name, from_interchange(name, found["value"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of all examples lie, one after the other."""
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("kind", HEADERS)
@MANY
@given(data=st.data())
def test_any_cells(kind: str, folder: Path, data: st.DataObject) -> None:
    """An import would end in the middle, or write what no agent reads."""
    header = HEADERS[kind]
    width = st.integers(len(header) - 1, len(header) + 1)
    row = width.flatmap(lambda size: st.lists(cells, min_size=size, max_size=size))
    spoilt = data.draw(st.sampled_from([header, header[::-1], [*header, header[0]], [name.upper() for name in header]]))
    path = folder / f"{kind}_Full.csv"
    path.write_bytes(table(spoilt, data.draw(st.lists(row, max_size=4))))
    check_import(kind, path)


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@MANY
@given(body=st.binary(max_size=200), cut=st.integers(0, 400))
def test_any_bytes(kind: str, suffix: str, folder: Path, body: bytes, cut: int) -> None:
    """Bytes that are no text, no CSV or no gzip would be a stack trace."""
    path = folder / f"bytes{suffix}"
    content = ",".join(HEADERS[kind]).encode() + b"\n" + body
    whole = gzip.compress(content) if suffix.endswith("gz") else content
    for each in (whole, whole[:cut], whole + body, body):
        path.write_bytes(each)
        check_import(kind, path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*GOOD, *NASTY[:-5]])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["code", "name", "from", "party", "item", "payer", "topic", "value", "UsageBatch",
        "usages", "close", "id", "change"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@MANY
@given(rows=st.lists(values, max_size=4), body=st.binary(max_size=80))
def test_any_parties(folder: Path, rows: list[Any], body: bytes) -> None:
    """Party data that was taken could not be read again at a close."""
    path = folder / "parties.jsonl"
    path.write_bytes("\n".join(json.dumps(row) for row in rows).encode() + b"\n" + body)
    for found in import_parties(path):
        if isinstance(found, Problem):
            assert len(str(found)) < 2_000 + len(str(path))
        else:
            read_party_row(json.loads(json.dumps(found)))


@MANY
@given(
    lines=st.lists(st.one_of(values, st.sampled_from(BOOK)), max_size=5),
    raw=st.lists(st.binary(max_size=60), max_size=3),
    random=st.randoms(use_true_random=False),
)
@example(lines=[{"close": [[]]}], raw=[], random=mock.Mock(shuffle=lambda each: None))
def test_any_interchange_lines(folder: Path, lines: list[Any], raw: list[bytes], random: Any) -> None:
    """A line would end the run, or vanish: each is sent, a dead letter, or a close that is refused by name."""
    path = folder / "lines.jsonl"
    texts = [json.dumps(line).encode() for line in lines] + [each.replace(b"\n", b" ") for each in raw]
    random.shuffle(texts)
    path.write_bytes(b"\n".join(texts))
    log = MemoryLog(Settings(partitions=2, supplier_topics="10030"))
    with (
        mock.patch("tribill.interchange.Outbox", return_value=MemoryOutbox(log, Fuse())),
        mock.patch("tribill.interchange.ClickHouse"),
    ):
        publisher = Publisher(Settings(partitions=2, supplier_topics="10030"))
    said = 0
    try:
        found = list(read(path))
        assert survey([path]).lines == len(found)
        for line in found:
            if not line.close:
                said += 1
                publisher.send(line)
    except BadClose:
        return
    sent = publisher.sent
    refused = publisher.flush()
    # A batch is taken apart where some of it cannot be encoded.
    assert sent + refused >= said
    assert len(found) == sum(bool(text.strip()) for text in texts)


def test_a_close_of_anything(tmp_path: Path) -> None:
    """Sixteen megabytes that are no period would all be shown."""
    path = tmp_path / "close.jsonl"
    path.write_text(json.dumps({"close": "9" * 1_000_000}))
    with pytest.raises(BadClose) as refused:
        list(read(path))
    assert len(str(refused.value)) < 200 + len(str(path))


def test_deep_nesting(tmp_path: Path) -> None:
    """There is a depth that the reader of JSON still takes, and whoever shows it no more."""
    path = tmp_path / "deep.jsonl"
    for depth in (33, 500, *range(930, 1_000), 5_000):
        nested = "[" * depth + "]" * depth
        texts = [f'{{"topic": "usage", "value": {nested}}}', f'{{"topic": {nested}}}', nested, f'{{"close": {nested}}}']
        path.write_text("\n".join(texts))
        assert all(line.reason for line in read(path))
        path.write_text(f'{{"party": {{"code": {nested}}}}}\n{{"party": {nested}}}\n{nested}\n')
        assert all(isinstance(found, Problem) for found in import_parties(path))


def test_a_gzip_bomb_and_a_line_without_end(tmp_path: Path) -> None:
    """A file of a megabyte would take all memory."""
    code = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from tribill.importers import IMPORTERS
for kind in IMPORTERS:
    for path in sys.argv[1:]:
        found = list(IMPORTERS[kind](Path(path), recorded_at=datetime(2026, 3, 1, tzinfo=UTC), max_bytes=2**26))
        print(kind, len(found), str(found[0])[:300])
# Of this program alone: what getrusage tells begins with the memory of whoever started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""
    bomb, line = tmp_path / "bomb.csv.gz", tmp_path / "line.csv.gz"
    with gzip.open(bomb, "wb", 1) as file:
        for _ in range(64):
            file.write(b"ods_code,as_of,patients\n" + bytes(1 << 20))
    with gzip.open(line, "wb", 1) as file:
        file.write(b"ods_code,as_of,patients\n")
        for _ in range(40):
            file.write(b"," * (1 << 20))
    found = subprocess.run([sys.executable, "-c", code, bomb, line], capture_output=True, text=True, check=True).stdout
    *said, kilobytes = found.splitlines()
    assert len(said) == 2 * len(IMPORTERS)
    assert all("is larger than" in each for each in said if "bomb.csv" in each)
    assert int(kilobytes) < 400_000
