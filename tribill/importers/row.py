"""What an importer says of a file: one row with its typed fields, or the Problem that refuses it."""

import re
from collections.abc import Hashable, Mapping, Set
from dataclasses import dataclass, field
from datetime import date
from typing import Any

Record = dict[str, Any]
"""One line of an interchange file: `{"topic": ..., "value": {...}}`."""

MAX_KEYS = 2_000_000
MAX_SHOWN_CHARACTERS = 80
YEARS = range(1900, 2200)

ISO_DATE = re.compile(r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)", re.ASCII)
UK_DATE = re.compile(r"(?P<day>\d\d)/(?P<month>\d\d)/(?P<year>\d{4})", re.ASCII)
EXTRACT_DATE = re.compile(r"(?P<day>\d\d)(?P<month>[A-Za-z]{3})(?P<year>\d{4})", re.ASCII)
ODS_CODE = re.compile(r"[A-Z0-9]{3,12}", re.ASCII)

_DATE_STYLE = {ISO_DATE: "YYYY-MM-DD", UK_DATE: "dd/MM/yyyy", EXTRACT_DATE: "DDMONYYYY"}
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DECIMAL = re.compile(r"(\d+)(?:\.(\d+))?", re.ASCII)
_INTEGER = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Problem:
    """What was refused and why. Line 0 is the file as a whole, an empty field the row as a whole."""

    file: str
    line: int
    field: str
    value: str
    reason: str

    def __str__(self) -> str:
        whole = len(self.value) <= MAX_SHOWN_CHARACTERS
        shown = self.value if whole else self.value[:MAX_SHOWN_CHARACTERS] + "…"
        place = f"{self.file}:{self.line}" if self.line else self.file
        what = f"{self.field} {shown!r}: " if self.field else ""
        return f"{place}: {what}{self.reason}"


class Refused(Exception):
    """Raised inside one row, and turned into its Problem by `convert`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Shape:
    """One published form of a file, known by the columns that it must have."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One row by column name, with the place that it came from."""

    file: str
    line: int
    shape: Shape
    digest: str
    values: Mapping[str, str]

    def refuse(self, column: str, reason: str) -> Refused:
        """The exception that refuses this row for what stands in `column`."""
        return Refused(Problem(self.file, self.line, column, self.values.get(column, ""), reason))

    def text(self, column: str) -> str:
        """The value with its white space collapsed; empty if the file has no such column."""
        return " ".join(self.values.get(column, "").split())

    def required(self, column: str) -> str:
        """The value, which must not be empty."""
        text = self.text(column)
        if not text:
            raise self.refuse(column, "is empty")
        return text

    def matching(self, column: str, pattern: re.Pattern[str], reason: str) -> str:
        """The value in capitals, which must match the whole pattern."""
        text = self.required(column).upper()
        if not pattern.fullmatch(text):
            raise self.refuse(column, reason)
        return text

    def ods_code(self, column: str, known: Set[str] | None = None) -> str:
        """An ODS code, one of the known ones if they are given."""
        code = self.matching(column, ODS_CODE, "is not an ODS code")
        if known is not None and code not in known:
            raise self.refuse(column, "is not among the known practices")
        return code

    def optional_ods_code(self, column: str) -> str | None:
        """An ODS code, or None where the file says nothing."""
        return self.ods_code(column) if self.text(column) else None

    def one_of(self, column: str, choices: Mapping[str, str]) -> str:
        """The choice that the value stands for, whatever its case."""
        choice = choices.get(self.text(column).casefold())
        if choice is None:
            known = ", ".join(repr(key) for key in choices)
            raise self.refuse(column, f"is none of {known}")
        return choice

    def decimal(self, column: str) -> str:
        """A decimal(18,6) that is not negative, as the shortest string that says it."""
        try:
            return plain_decimal(self.required(column))
        except ValueError as error:
            raise self.refuse(column, str(error)) from None

    def integer(self, column: str, least: int = 0, most: int = 999_999_999) -> int:
        """A whole number within bounds."""
        text = self.required(column)
        if not _INTEGER.fullmatch(text) or not least <= int(text) <= most:
            raise self.refuse(column, f"is not a whole number from {least} to {most}")
        return int(text)

    def day(self, column: str, style: re.Pattern[str] = ISO_DATE) -> date:
        """A date in the file's one style."""
        match = style.fullmatch(self.required(column))
        try:
            if match is None:
                raise ValueError
            month = match["month"].upper()
            number = _MONTHS.index(month) + 1 if month.isalpha() else int(month)
            found = date(int(match["year"]), number, int(match["day"]))
            if found.year not in YEARS:
                raise ValueError
        except ValueError:
            raise self.refuse(column, f"is not a date {_DATE_STYLE[style]}") from None
        return found

    def optional_day(self, column: str, style: re.Pattern[str] = ISO_DATE) -> date | None:
        """A date, or None where the file says nothing."""
        return self.day(column, style) if self.text(column) else None


def plain_decimal(text: str) -> str:
    """The shortest string of a decimal(18,6) that is not negative, or a ValueError with the reason."""
    match = _DECIMAL.fullmatch(text)
    if match is None:
        raise ValueError("is not a plain decimal number without a sign")
    whole, places = match[1].lstrip("0") or "0", (match[2] or "").rstrip("0")
    if len(places) > 6 or len(whole) > 12:
        raise ValueError("does not fit decimal(18,6), and nothing is rounded")
    return f"{whole}.{places}" if places else whole


@dataclass(slots=True)
class Keys:
    """The keys that a file has said so far: a row that says one again is refused."""

    lines: dict[Hashable, int] = field(default_factory=dict)

    def claim(self, row: Row, column: str, key: Hashable) -> None:
        """Note the key, or refuse the row."""
        if key in self.lines:
            raise row.refuse(column, f"repeats line {self.lines[key]}")
        if len(self.lines) >= MAX_KEYS:
            raise row.refuse(column, f"comes after {MAX_KEYS:,} others, the most that one file may say")
        self.lines[key] = row.line
