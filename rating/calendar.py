"""London civil days and calendar months as integers, so that ranges of them are plain arithmetic."""

from __future__ import annotations

import calendar as _calendar
import re
from datetime import UTC, date, datetime
from functools import lru_cache
from zoneinfo import ZoneInfo

LONDON = ZoneInfo("Europe/London")

#: Later than any day that a contract speaks of; stands for "open".
FOREVER = date.max.toordinal()
LAST_MONTH = date.max.year * 12 + date.max.month - 1
#: Earlier than any day that a contract speaks of.
NEVER = 0

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d"
_INSTANT = re.compile(rf"\d{{4}}-\d{{2}}-\d{{2}}[Tt ]{_CLOCK}:[0-5]\d(\.\d+)?([Zz]|[+-]{_CLOCK})?", re.ASCII)


def month_of(day: int) -> int:
    """The month (year * 12 + month - 1) that a day (ordinal) falls in."""
    at = date.fromordinal(day)
    return at.year * 12 + at.month - 1


@lru_cache(maxsize=4096)
def first_day(month: int) -> int:
    """The first day (ordinal) of a month; FOREVER of months later than a date can hold."""
    return date(month // 12, month % 12 + 1, 1).toordinal() if month <= LAST_MONTH else FOREVER


@lru_cache(maxsize=4096)
def days_in(month: int) -> int:
    """How many days the month has.  A month with a clock change counts by days like any other."""
    return _calendar.monthrange(month // 12, month % 12 + 1)[1]


def last_day(month: int) -> int:
    """The last day (ordinal) of a month."""
    return first_day(month) + days_in(month) - 1


def parse_month(text: str) -> int:
    """`2026-04` as a month.  Raises ValueError with the text when it is not one."""
    if len(text) != 7 or text[4] != "-" or not (text[:4] + text[5:]).isascii():
        raise ValueError(f"{text!r} is not a month like 2026-04")
    if not (text[:4] + text[5:]).isdigit() or not 1 <= int(text[5:]) <= 12 or not 1 <= int(text[:4]) <= 9998:
        raise ValueError(f"{text!r} is not a month like 2026-04")
    return int(text[:4]) * 12 + int(text[5:]) - 1


def parse_date(text: str) -> date:
    """`2026-04-01` as a date.  Raises ValueError, which says what it is not, for any other form that ISO 8601 has."""
    try:
        if _DATE.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise ValueError("not a date like 2026-04-01")


def parse_instant(text: str) -> datetime:
    """An instant as RFC 3339 has it: with seconds and an offset.  Raises ValueError, which says what is wrong.

    >>> parse_instant("2026-04-01T09:00:00.5+01:00").astimezone(UTC).isoformat()
    '2026-04-01T08:00:00.500000+00:00'
    """
    wrong = "not an instant like 2026-04-01T09:00:00Z"
    if (found := _INSTANT.fullmatch(text)) is None:
        raise ValueError(wrong)
    fraction, offset = found.groups()
    if fraction and len(fraction.rstrip("0")) > 7:
        raise ValueError("finer than a microsecond")
    if not offset:
        raise ValueError("without an offset; end it with Z or +01:00")
    try:
        return datetime.fromisoformat(text.upper())
    except ValueError:
        raise ValueError(wrong) from None


@lru_cache(maxsize=4096)
def month_text(month: int) -> str:
    """A month as `2026-04`."""
    return f"{month // 12:04d}-{month % 12 + 1:02d}"


def add_months(day: int, months: int) -> int:
    """The day `months` calendar months later, clamped to that month's length.

    >>> date.fromordinal(add_months(date(2026, 1, 31).toordinal(), 1)).isoformat()
    '2026-02-28'

    Days past the last that a date can hold come out as FOREVER.
    """
    at = date.fromordinal(day)
    month = at.year * 12 + at.month - 1 + months
    if month > LAST_MONTH:
        return FOREVER
    return first_day(month) + min(at.day, days_in(month)) - 1


def financial_year(month: int) -> int:
    """The calendar year of the 1 April that began the month's financial year."""
    return (month - 3) // 12


def financial_year_months(year: int) -> range:
    """The twelve months of a financial year, April to March."""
    return range(year * 12 + 3, year * 12 + 15)


def london_day(instant: datetime) -> int:
    """The London civil day (ordinal) of an instant."""
    return instant.astimezone(LONDON).toordinal()


def day_seconds(day: int) -> int:
    """How long a London day is: 82,800, 86,400 or 90,000 seconds."""
    at = date.fromordinal(day)
    start = datetime(at.year, at.month, at.day, tzinfo=LONDON)
    after = date.fromordinal(day + 1)
    end = datetime(after.year, after.month, after.day, tzinfo=LONDON)
    return int((end.astimezone(UTC) - start.astimezone(UTC)).total_seconds())


def month_start(month: int) -> datetime:
    """The instant of 00:00 London time on the first of the month, in UTC."""
    at = date.fromordinal(first_day(month))
    return datetime(at.year, at.month, at.day, tzinfo=LONDON).astimezone(UTC)
