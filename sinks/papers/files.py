"""The folder of a closed period: lines.csv, held.csv, and every document and statement in its forms (RULES 4.4).

```
<period>/lines.csv, held.csv                    what was invoiced and what is held
<period>/<number>-<kind>.json .xml .pdf .csv    a document; no XML where it is no e-invoice
<period>/<number>-evidence.json -usage.jsonl    what it came from, for `tribill verify`
<period>/statements/practice-<ods>.json         and ordering-party-<ods>, supplier-<id> with a PDF
<period>/odoo/<payer>.csv .json                 the payer's bills for Odoo
<period>/control.json, control.txt              what ties out with what
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, Self

from rating.calendar import month_text
from rating.close import CSV_HEADER, ChargeKey, csv_rows
from rating.statements import CONTROL, PRACTICE
from sinks.evidence import EvidenceFiles, write_whole
from sinks.ledger import chunks
from sinks.papers.forms import csv_text, document_forms, json_text

#: From so many papers on it pays to start other processes.
_MANY = 500
#: After so many files it is told how far they are.
_TOLD = 50


#: A paper's files, and its bill for the payer's Odoo, if it is one.
Paper = tuple[list[Path], str, list[list[str]]]
Papers = list[Paper]


class Source(Protocol):
    """Where the papers of a period come from: the ledger (`sinks.documents.Documents`), or a preview."""

    def rows(self, period: int, kind: str) -> Mapping[ChargeKey, int]:
        """The `invoiced` or `held` rows."""

    def numbers(self, period: int) -> list[str]:
        """The numbers of the documents that are issued by now."""

    def issued(self, period: int, numbers: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Some documents: number, JSON and evidence."""

    def statements(self, period: int) -> list[str]:
        """The JSON of the statements."""

    def readings(self, period: int, items: Iterable[str], months: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The readings of some items and months, as interchange values."""


def write_files(
    source: Source, period: int, directory: Path, tell: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Writes all files of a closed period, or of a preview, and tells how far it is; returns their paths."""
    with Folder(source, period, directory) as folder:
        return folder.finish(tell)


class Folder:
    """The files of a period.

    Each is there whole or not at all; written again after a kill they are the same, byte for byte.
    """

    def __init__(self, source: Source, period: int, directory: Path) -> None:
        self._source, self._period = source, period
        self._path = directory / month_text(period)
        self._evidence = EvidenceFiles(self._path, safe_name)
        #: What is written or being written: a document by its number, some statements by their place.
        self._papers: dict[str | int, Papers | Future[Papers]] = {}
        self._written: list[Path] = []
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def write_issued(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Writes the documents that were issued since, each with its evidence.

        What is issued stays, so that this may be asked before the period is closed.
        """
        numbers = self._source.numbers(self._period)
        for some in chunks((number,) for number in numbers if number not in self._papers):
            self._path.mkdir(parents=True, exist_ok=True)
            for number, body, evidence in self._source.issued(self._period, [number for (number,) in some]):
                self._papers[number] = self._write([body], len(numbers))
                self._written.append(self._evidence.write(number, evidence))
                if len(self._papers) % _TOLD == 0:
                    tell(f"{month_text(self._period)}: evidence of {len(self._papers)} documents is written")

    def finish(self, tell: Callable[[str], None]) -> list[Path]:
        """Writes all that there is not yet of a closed period; returns the paths of all files."""
        text, written = month_text(self._period), self._written
        (self._path / "statements").mkdir(parents=True, exist_ok=True)
        self.write_issued(tell)
        documents = sorted(number for number in self._papers if isinstance(number, str))
        statements = self._source.statements(self._period)
        some = [statements[start : start + _TOLD] for start in range(0, len(statements), _TOLD)]
        self._papers |= {place: self._write(bodies, len(statements)) for place, bodies in enumerate(some)}
        for name, kind in (("lines.csv", "invoiced"), ("held.csv", "held")):
            rows = csv_rows(self._source.rows(self._period, kind), self._period)
            written.append(write_whole(self._path / name, csv_text(CSV_HEADER, rows).encode()))
        written += self._evidence.write_usage(partial(self._source.readings, self._period))
        bills: dict[str, list[list[str]]] = {}
        for key in (*documents, *range(len(some))):
            papers = self._papers[key]
            for paths, payer, bill in papers.result() if isinstance(papers, Future) else papers:
                written += paths
                if bill:
                    bills.setdefault(payer, []).extend(bill)
            tell(f"{text}: {len(written)} files are written")
        return written + _write_odoo(self._path / "odoo", bills)

    def _write(self, bodies: list[str], of: int) -> Papers | Future[Papers]:
        """Writes papers; where there are many, on all processors."""
        if self._pool is None and of >= _MANY:
            self._pool = ProcessPoolExecutor(mp_context=get_context("spawn"))
        return self._pool.submit(write_papers, self._path, bodies) if self._pool else write_papers(self._path, bodies)


def write_papers(folder: Path, texts: Iterable[str]) -> Papers:
    """Writes documents or statements, given as JSON, in their forms."""
    return [write_paper(folder, text) for text in texts]


def write_paper(folder: Path, text: str) -> Paper:
    """Writes a document or statement, given as JSON, in its forms."""
    body = json.loads(text)
    if "number" in body:
        from sinks.papers.odoo import odoo_table

        return _write_document(folder, body), body["payer"], odoo_table([body])
    return _write_statement(folder, body), "", []


def _write_document(folder: Path, body: dict[str, Any]) -> list[Path]:
    stem = folder / f"{safe_name(body['number'])}-{body['kind']}"
    return [_write(stem, suffix, content) for suffix, content in document_forms(body).items()]


def _write_statement(folder: Path, body: dict[str, Any]) -> list[Path]:
    from sinks.papers.pdf import statement_pdf

    kind = body["statement"]
    stem = folder / (CONTROL if kind == CONTROL else f"statements/{kind}-{safe_name(body['code'])}")
    written = [_write(stem, ".json", json_text(body).encode())]
    if kind == CONTROL:
        written.append(_write(stem, ".txt", control_text(body).encode()))
    elif kind != PRACTICE:  # of which there are thousands; `tribill paper` makes one
        written.append(_write(stem, ".pdf", statement_pdf(body)))
    return written


def _write_odoo(folder: Path, bills: dict[str, list[list[str]]]) -> list[Path]:
    from sinks.papers.odoo import odoo_csv, odoo_json

    written = []
    for payer, table in sorted(bills.items()):
        folder.mkdir(exist_ok=True)
        stem = folder / safe_name(payer)
        written.append(_write(stem, ".csv", odoo_csv(table).encode()))
        written.append(_write(stem, ".json", odoo_json(table).encode()))
    return written


def _write(stem: Path, suffix: str, content: bytes) -> Path:
    return write_whole(stem.with_name(stem.name + suffix), content)


def control_text(body: dict[str, Any]) -> str:
    """The control sheet for a person."""
    rows = [(name, body[name]) for name in ("charges", "adjustments", "net", "vat", "gross", "held")]
    rows += [(f"documents: {kind}", str(count)) for kind, count in body["documents"].items()]
    title = "Preview of the control sheet" if body["preview"] else "Control sheet"
    lines = [f"{title} of {body['period']}, in pounds", ""]
    lines += [f"{name:<44}{value:>20}" for name, value in rows]
    lines += ["", f"{'what must agree':<44}{'found':>20}{'due':>20}"]
    lines += [f"{each['what']:<44}{each['found']:>20}{each['due']:>20}" for each in body["checks"]]
    if body["usage"]:
        lines += ["", "usage as attested"]
        lines += [f"{code:<14}{each['said']}" for code, each in body["usage"].items()]
    if body["accepted"]:
        lines += ["", "found, and accepted", *body["accepted"]]
    lines += ["", "series of numbers, without a gap"]
    lines += [f"{payer:<44}{each['first']:>20}{each['last']:>20}" for payer, each in body["series"].items()]
    return "\n".join(lines) + "\n"


def safe_name(text: str) -> str:
    """A number as part of a file name: payers' codes come from data, so no separator may survive."""
    plain = "".join(each if each.isalnum() or each in "-_." else f"%{ord(each):06x}" for each in text)
    plain = plain if not plain.startswith(".") else f"%{ord('.'):06x}{plain[1:]}"
    if len(plain.encode()) <= 100:
        return plain
    # A file system has a limit, in bytes; what is cut off is told apart by its digest.
    return f"{plain.encode()[:60].decode(errors='ignore')}~{hashlib.sha256(text.encode()).hexdigest()[:24]}"
