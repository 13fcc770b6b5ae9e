"""`tribill verify`: derives documents from the evidence beside them, without a server or a database.

Reads files only, and trusts none: each is bounded, and what is no evidence is said with its field.
docs/verification.md says what is compared.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rating.amounts import MICROS, PENNY, micros_text, pounds_text, round_half_away
from rating.calendar import month_text, parse_month
from rating.close import ChargeKey
from rating.evidence import Read, read_evidence, rederive, signed_pence
from rating.records import Fields, Refused
from sinks.papers.forms import document_forms
from tribill.verify_usage import BadUsage, Bill, compare_usage, read_usage

KINDS = ("invoice", "credit-note", "pro-forma")
#: The evidence of a whole country's largest document is some 60 MB.
FILE_MAX_BYTES = 512 * 1024 * 1024
_DECIMAL = re.compile(r"-?[0-9]{1,60}(\.[0-9]{1,6})?")


class Unusable(Exception):
    """What cannot be verified at all; the message says why."""


@dataclass(slots=True)
class Verdict:
    """What agrees and what does not, of all documents."""

    documents: int = 0
    lines: int = 0
    days: int = 0
    differences: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: all agrees.  1: something does not.  2: something could not be read."""
        return 2 if self.unusable else 1 if self.differences else 0


@dataclass(slots=True)
class _Checked:
    """A document with its evidence read."""

    path: Path
    body: dict[str, Any]
    read: Read
    net: dict[ChargeKey, int]


def verify(path: Path, usage: Sequence[Path], say: Callable[[str], None], *, verbose: bool) -> Verdict:
    """Verifies a document, a period's folder, or a folder of periods, and a supplier's own usage against them.

    Says line by line what does not agree, and with `verbose` what does.  Raises Unusable where there
    is no document.
    """
    verdict, checked = Verdict(), []
    said = _Saying(verdict, say, verbose)
    for document in _documents(path, said):
        try:
            found = _verify_document(document, said)
        except Unusable as error:
            verdict.unusable.append(str(error))
            say(str(error))
            continue
        if found is not None:
            checked.append(found)
    if path.is_dir():
        _verify_lines_csv(path, checked, said)
        _verify_invoiced_before(checked, said)
    bills = [Bill(each.read, str(each.path), _listed(each)) for each in checked]
    try:
        verdict.days += compare_usage(bills, read_usage(usage) if usage else None, said.differs, whole=path.is_dir())
    except BadUsage as error:
        raise Unusable(str(error)) from None
    return verdict


class _Saying:
    """Where findings go."""

    def __init__(self, verdict: Verdict, say: Callable[[str], None], verbose: bool) -> None:
        self.verdict = verdict
        self._say = say
        self._verbose = verbose

    def differs(self, text: str) -> None:
        """Something does not agree."""
        self.verdict.differences.append(text)
        self._say(text)

    def agrees(self, text: str) -> None:
        """Something agrees."""
        if self._verbose:
            self._say(text)


# --- which files --------------------------------------------------------------------------------


def _documents(path: Path, said: _Saying) -> list[Path]:
    """The documents at a path; evidence without a document is said."""
    if path.is_file():
        if path.name.endswith("-evidence.json"):
            stem = path.name.removesuffix("-evidence.json")
            found = [each for kind in KINDS if (each := path.with_name(f"{stem}-{kind}.json")).is_file()]
        else:
            found = [path]
    else:
        found = sorted(each for kind in KINDS for each in _files(path, f"*-{kind}.json"))
        stems = {_evidence_of(each) for each in found}
        for evidence in _files(path, "*-evidence.json"):
            if evidence not in stems:
                said.differs(f"{evidence}: there is no document beside this evidence")
    if not found:
        raise Unusable(f"{path}: no document here; its name ends in {', '.join(f'-{kind}.json' for kind in KINDS)}")
    return found


def _files(path: Path, pattern: str) -> list[Path]:
    """The files of periods: a payer or practice may have a code that makes its other papers look like them."""
    found = path.rglob(pattern)
    return sorted(each for each in found if not {"odoo", "statements"} & {*each.relative_to(path).parts[:-1]})


def _evidence_of(document: Path) -> Path:
    for kind in KINDS:
        if document.name.endswith(f"-{kind}.json"):
            return document.with_name(document.name.removesuffix(f"-{kind}.json") + "-evidence.json")
    raise Unusable(f"{document}: is no document; its name ends in {', '.join(f'-{kind}.json' for kind in KINDS)}")


def _listed(checked: _Checked) -> Path:
    evidence = _evidence_of(checked.path)
    return evidence.with_name(evidence.name.removesuffix("-evidence.json") + "-usage.jsonl")


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise Unusable(f"{path}: is longer than {FILE_MAX_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path}: cannot be read: {error.strerror}") from None


def _json(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text, parse_int=_small_integer, parse_constant=_no_number, parse_float=_no_number)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{path}: is no JSON of ours: {str(error)[:200]}") from None


def _small_integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text[:20]} stands as a number; amounts are text")


# --- one document -------------------------------------------------------------------------------


def _verify_document(path: Path, said: _Saying) -> _Checked | None:
    evidence_path = _evidence_of(path)
    body = _json(path, _bytes(path))
    if not isinstance(body, dict):
        raise Unusable(f"{path}: is no document")
    said.verdict.documents += 1
    if not evidence_path.is_file():
        said.differs(f"{path}: there is no {evidence_path.name} beside it")
        return None
    text = _bytes(evidence_path)
    if hashlib.sha256(text).hexdigest() != body.get("evidence_sha256"):
        said.differs(f"{evidence_path}: its SHA-256 is not the evidence_sha256 of {path.name}")
    sealed = _seal(body) == body.get("sha256")
    if not sealed:
        said.differs(f"{path}: its sha256 is not that of what it says")
    try:
        read = read_evidence(_json(evidence_path, text))
        expected = rederive(read)
    except Refused as error:
        said.differs(f"{evidence_path}: {error}")
        return None
    try:
        net = _verify_lines(path, body, read, expected, said)
        _verify_totals(path, body, read, net, said)
        if sealed:
            _verify_forms(path, body, said)
    except Refused as error:
        said.differs(f"{path}: {error}")
        return None
    return _Checked(path, body, read, net)


def _seal(body: dict[str, Any]) -> str:
    """The digest of all that a document says."""
    rest = {name: value for name, value in body.items() if name != "sha256"}
    text = json.dumps(rest, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _verify_lines(
    path: Path, body: dict[str, Any], read: Read, expected: dict[ChargeKey, int], said: _Saying
) -> dict[ChargeKey, int]:
    """Each line of the document against what its evidence gives; returns the lines' pence."""
    fields = Fields(body)
    for name, value in (
        ("number", read.number),
        ("period", month_text(read.period)),
        ("payer", read.payer),
        ("supplier_id", read.supplier_id),
    ):
        if body.get(name) != value:
            said.differs(f"{path}: {name} is {body.get(name)!r}, in the evidence {value!r}")
    net: dict[ChargeKey, int] = {}
    for row in fields.list("lines"):
        key = _key(row, read)
        if key in net:
            said.differs(f"{path}: {_name(key)}: stands twice")
            continue
        net[key] = signed_pence(row, "net")
        problems = list(_problems_of_line(row, key, net[key], expected.get(key, 0), read))
        for problem in problems:
            said.differs(f"{path}: {_name(key)}: {problem}")
        if not problems:
            said.verdict.lines += 1
            said.agrees(f"{path}: {_name(key)}: {pounds_text(net[key])} agrees")
    for key in sorted(expected.keys() - net.keys()):
        said.differs(f"{path}: {_name(key)}: is not there, the evidence gives {pounds_text(expected[key])}")
    return net


def _problems_of_line(row: Fields, key: ChargeKey, net: int, expected: int, read: Read) -> Iterator[str]:
    if net != expected:
        yield f"net is {pounds_text(net)}, the evidence gives {pounds_text(expected)}"
    kind = "charge" if key.month == read.period else "adjustment"
    if row.text("kind") != kind:
        yield f"kind is {row.text('kind')!r}, of a month that makes it {kind}"
    rate = read.vat_rate_micros(key)
    if row.micros("vat_rate") != rate:
        yield f"vat_rate is {row.text('vat_rate')}, in the evidence {'none' if rate is None else micros_text(rate)}"
    if kind == "adjustment" and not row.get("cause"):
        yield "is an adjustment without a cause"
    if row.get("unit_price") is not None and row.get("quantity") is not None:
        product = _signed_micros(row, "quantity") * _signed_micros(row, "unit_price")
        if abs(round_half_away(product, PENNY) - net) > 1:
            yield f"quantity x unit_price is not {pounds_text(net)}"


def _signed_micros(row: Fields, name: str) -> int:
    """A quantity or price of a document, which may be a sum: of any size, and negative."""
    text = row.text(name)
    if not _DECIMAL.fullmatch(text):
        raise Refused(row.at(name), f"is {text[:40]!r}, not a decimal with at most six places")
    units, _, places = text.partition(".")
    return int(units + places.ljust(6, "0"))


def _verify_totals(path: Path, body: dict[str, Any], read: Read, net: dict[ChargeKey, int], said: _Saying) -> None:
    """VAT on the sum of each rate's lines (RULES 3.11), and the sums."""
    fields = Fields(body)
    of_rate: dict[int, int] = {}
    for row, pence in zip(fields.list("lines"), net.values(), strict=False):
        rate = row.micros("vat_rate")
        of_rate[rate] = of_rate.get(rate, 0) + pence
    vat = {rate: round_half_away(sum_ * rate, MICROS) for rate, sum_ in of_rate.items()}
    stated = {
        row.micros("vat_rate"): (signed_pence(row, "net"), signed_pence(row, "vat"))
        for row in fields.list("vat_by_rate")
    }
    if stated != {rate: (of_rate[rate], vat[rate]) for rate in of_rate}:
        said.differs(f"{path}: vat_by_rate is not the sum of the lines of each rate and its VAT")
    net_sum, vat_sum = sum(net.values()), sum(vat.values())
    for name, pence in (("net", net_sum), ("vat", vat_sum), ("gross", net_sum + vat_sum)):
        if signed_pence(fields, name) != pence:
            said.differs(f"{path}: {name} is {fields.text(name)}, the lines give {pounds_text(pence)}")
    kind = "credit-note" if net_sum < 0 else "invoice"
    if fields.text("kind") not in (kind, "pro-forma") or not path.name.endswith(f"-{fields.text('kind')}.json"):
        said.differs(f"{path}: kind is {fields.text('kind')!r}; with net {pounds_text(net_sum)} it is a {kind}")


def _verify_forms(path: Path, body: dict[str, Any], said: _Saying) -> None:
    """What is beside the document in other forms says what it says: they follow from it, byte by byte."""
    try:
        forms = document_forms(body)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said.differs(f"{path}: its other forms cannot be made: {type(error).__name__} {str(error)[:200]}")
        return
    for suffix in (".xml", ".pdf", ".csv"):
        file = path.with_suffix(suffix)
        if not file.is_file():
            continue  # a counterparty may have been given the JSON alone
        if suffix not in forms:
            said.differs(f"{file}: is not to be there; the document is no e-invoice")
        elif _bytes(file) != forms[suffix]:
            said.differs(f"{file}: does not say what {path.name} says")


def _key(row: Fields, read: Read) -> ChargeKey:
    try:
        month = parse_month(row.text("for_period"))
    except ValueError as error:
        raise Refused(row.at("for_period"), str(error)) from None
    line = (row.text("order_number"), row.text("item_id"), row.text("ods_code"))
    return ChargeKey(*line, read.supplier_id, read.payer, month)


def _name(key: ChargeKey) -> str:
    return f"{key.order_number} {key.item_id} {key.ods_code} for {month_text(key.month)}"


# --- documents together -------------------------------------------------------------------------


def _verify_lines_csv(path: Path, checked: Sequence[_Checked], said: _Saying) -> None:
    """Each lines.csv has the rows of the documents beside it, and no others."""
    for file in _files(path, "lines.csv"):
        documents = [each for each in checked if each.path.parent == file.parent]
        expected = {
            (*key[:5], month_text(key.month), "charge" if key.month == each.read.period else "adjustment"): pence
            for each in documents
            for key, pence in each.net.items()
        }
        try:
            rows = list(csv.reader(io.StringIO(_bytes(file).decode(), newline="")))[1:]
            found = {tuple(row[:7]): row[7] for row in rows}
        except (UnicodeDecodeError, IndexError, csv.Error):
            said.differs(f"{file}: is no lines.csv")
            continue
        for row in sorted(expected.keys() | found.keys()):
            stated = pounds_text(expected[row]) if row in expected else "no line"
            if found.get(row, "no line") != stated:
                said.differs(f"{file}: {' '.join(row)}: {found.get(row, 'no line')}, in the documents {stated}")


def _verify_invoiced_before(checked: Sequence[_Checked], said: _Saying) -> None:
    """What evidence says was invoiced before is what the earlier documents say, where all of them are here."""
    periods = {each.read.period for each in checked}
    before: dict[ChargeKey, int] = {}
    for period in sorted(periods):
        now = [each for each in checked if each.read.period == period]
        for each in now:
            for key, pence in each.read.invoiced.items():
                whole = all(month in periods for month in range(key.month, period))
                if whole and key.month >= min(periods) and before.get(key, 0) != pence:
                    said.differs(
                        f"{_evidence_of(each.path)}: {_name(key)}: {pounds_text(pence)} invoiced before, the earlier "
                        f"documents say {pounds_text(before.get(key, 0))}"
                    )
        for each in now:
            for key, pence in each.net.items():
                before[key] = before.get(key, 0) + pence
