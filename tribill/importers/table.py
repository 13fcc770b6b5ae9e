"""Reads a CSV file row by row, so that a fault is a Problem with its line and stops nothing but its row."""

import csv
import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedReader, TextIOWrapper
from pathlib import Path

from tribill.importers.row import Problem, Record, Refused, Row, Shape

MAX_BYTES = 512 * 2**20
MAX_LINE_CHARACTERS = 2**20

# What errors="surrogateescape" makes of a byte that is not UTF-8.
_UNDECODABLE = re.compile("[\udc80-\udcff]")


def convert(
    path: Path, shapes: Sequence[Shape], max_bytes: int, records_of: Callable[[Row], Iterable[Record]]
) -> Iterator[Record | Problem]:
    """The records of each row and every Problem, in the order of the file."""
    for row in rows(path, shapes, max_bytes):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            yield from records_of(row)
        except Refused as refused:
            yield refused.problem


def rows(path: Path, shapes: Sequence[Shape], max_bytes: int) -> Iterator[Row | Problem]:
    """Read a UTF-8 CSV file, with or without BOM, plain or gzip (`.gz`), in one of the shapes.

    The file is read twice: first to measure it and to take its digest, which makes the ids of its changes.
    """
    file = str(path)
    try:
        digest = _digest(path, max_bytes)
        with TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield from _rows(file, _records(file, text), shapes, digest)
    except Refused as refused:
        yield refused.problem
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield Problem(file, 0, "", "", f"is not a whole gzip file: {error}")


def _rows(
    file: str, records: Iterator[tuple[int, list[str]] | Problem], shapes: Sequence[Shape], digest: str
) -> Iterator[Row | Problem]:
    first = next(records, Problem(file, 0, "", "", "is empty: it has no header"))
    if isinstance(first, Problem):
        raise Refused(first)
    if spoilt := _spoilt(first[1]):
        raise Refused(Problem(file, first[0], "", "", f"the header is not UTF-8: {spoilt[1]!r}"))
    header = [_name(cell) for cell in first[1]]
    shape = _shape(file, first[0], header, shapes)
    columns = (*shape.required, *shape.optional)
    places = [(column, header.index(_name(column))) for column in columns if _name(column) in header]
    for record in records:
        if isinstance(record, Problem):
            yield record
            continue
        line, cells = record
        if len(cells) < len(header) or any(cells[len(header) :]):
            yield Problem(file, line, "", "", f"has {len(cells)} fields where the header has {len(header)}")
            continue
        if spoilt := _spoilt(cells):
            yield Problem(file, line, first[1][spoilt[0]], spoilt[1], "has bytes that are not UTF-8")
            continue
        yield Row(file, line, shape, digest, {column: cells[place] for column, place in places})


def _spoilt(cells: Sequence[str]) -> tuple[int, str] | None:
    """The place and text of the first cell with bytes that are not UTF-8."""
    if not _UNDECODABLE.search("".join(cells)):
        return None
    return next((place, cell) for place, cell in enumerate(cells) if _UNDECODABLE.search(cell))


def _records(file: str, text: TextIOWrapper) -> Iterator[tuple[int, list[str]] | Problem]:
    """Every record that is not blank, with its first line as an editor counts them."""
    reader = csv.reader(_lines(text), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"is not CSV ({error})"
            if reader.line_num > line:
                reason += f": nothing was read from here to line {reader.line_num}; is a quote not closed?"
            yield Problem(file, line, "", "", reason)
            continue
        if any(cell.strip() for cell in cells):
            yield line, cells


def _shape(file: str, line: int, header: Sequence[str], shapes: Sequence[Shape]) -> Shape:
    """The first shape whose columns the header has, each once."""

    def missing(shape: Shape) -> list[str]:
        return [column for column in shape.required if _name(column) not in header]

    shape = min(shapes, key=lambda one: len(missing(one)))
    if missing(shape):
        names = ", ".join(missing(shape))
        raise Refused(Problem(file, line, "", "", f"the header lacks {names} (read as {shape.name})"))
    for column in (*shape.required, *shape.optional):
        if header.count(_name(column)) > 1:
            raise Refused(Problem(file, line, "", "", f"the header has {column} twice"))
    return shape


def _name(column: str) -> str:
    return " ".join(column.split()).casefold()


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _digest(path: Path, max_bytes: int) -> str:
    """The first 12 hexadecimal digits of the content's SHA-256."""
    digest, size = hashlib.sha256(), 0
    with _open(path) as file:
        while block := file.read(2**20):
            size += len(block)
            if size > max_bytes:
                raise Refused(Problem(str(path), 0, "", "", f"is larger than {max_bytes:,} bytes"))
            digest.update(block)
    return digest.hexdigest()[:12]


def _lines(text: TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE_CHARACTERS):
        if len(line) == MAX_LINE_CHARACTERS:
            raise csv.Error(f"a line of {MAX_LINE_CHARACTERS:,} characters or more ends the reading")
        yield line
