"""Readings against bills: those listed beside a document, and a supplier's own, reading by reading.

A day's digest is the SHA-256 of its readings' lines `<revision> <millionths> <id>`, each ended by a
line feed, sorted as bytes; readings of quantity 0 are left out.  A supplier can compute it itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rating.amounts import micros_text
from rating.book import Service
from rating.calendar import london_day, month_of
from rating.charges import iso
from rating.evidence import Read, Readings
from rating.records import Fields, Refused, read_instant

#: As the interchange form: a longer line is no record of anything.
LINE_MAX_BYTES = 16 * 1024 * 1024
#: So many readings of one day are named; what more there are is said as a number.
NAMED_MAX = 20


class BadUsage(Exception):
    """A file of usage that cannot be read at all."""


class Reading(NamedTuple):
    """What stands of one reading."""

    revision: int
    quantity_micros: int
    occurred_at: str


#: Readings by identity: supplier and id.
OfDay = dict[tuple[str, str], Reading]


@dataclass(slots=True)
class Usage:
    """What stands in files of usage, by service and London day; `refused` says what is no usage, and where."""

    days: dict[Service, dict[int, OfDay]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Bill:
    """A document's evidence, where it lies, and where its readings are listed."""

    read: Read
    name: str
    listed: Path


@dataclass(frozen=True, slots=True)
class _Counted:
    """What bills count on a day; the readings are None where a later bill gives a total only."""

    quantity_micros: int
    readings: Readings | None
    listed: Usage | None


_NOTHING = _Counted(0, Readings(0, hashlib.sha256(b"").hexdigest()), None)


def digest(readings: OfDay) -> Readings:
    """The number and digest of a day's readings.

    >>> digest({("10030", "u1"): Reading(0, 3_000_000, "")}).sha256[:12]
    'e4e54a771837'
    """
    lines = sorted(
        f"{each.revision} {each.quantity_micros} {reading_id}\n".encode(errors="surrogatepass")
        for (_, reading_id), each in readings.items()
    )
    return Readings(len(lines), hashlib.sha256(b"".join(lines)).hexdigest())


# --- reading files ------------------------------------------------------------------------------


def read_usage(paths: Iterable[Path]) -> Usage:
    """What stands in interchange files of usage: the first of a revision, the highest revision (RULES 1)."""
    said: dict[tuple[str, str, str], dict[int, tuple[str, int, int, str]]] = {}
    found = Usage()
    for path in paths:
        for place, value in _values(path, found):
            for fields in _readings(value, place):
                try:
                    identity, revision, content = _read(fields)
                except Refused as error:
                    found.refused.append(f"{place}: {error}")
                    continue
                revisions = said.setdefault(identity, {})
                if revisions.setdefault(revision, content) != content:
                    found.refused.append(f"{place}: reading {identity[2]!r} was said before with other content")
    for (supplier_id, ods_code, reading_id), revisions in said.items():
        revision = max(revisions)
        item_id, quantity, day, occurred_at = revisions[revision]
        if quantity:
            days = found.days.setdefault((item_id, ods_code), {})
            days.setdefault(day, {})[supplier_id, reading_id] = Reading(revision, quantity, occurred_at)
    return found


def read_listed(path: Path) -> Usage | None:
    """The readings listed beside a document; None where there is no such file."""
    return read_usage([path]) if path.is_file() else None


def _values(path: Path, found: Usage) -> Iterator[tuple[str, Any]]:
    """The usage records of a file, each with its place; other topics and closes are passed over."""
    try:
        with path.open("rb") as file:
            number = 0
            while text := file.readline(LINE_MAX_BYTES):
                number += 1
                if len(text) == LINE_MAX_BYTES and not text.endswith(b"\n"):
                    raise BadUsage(f"{path}:{number}: is longer than {LINE_MAX_BYTES} bytes")
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    found.refused.append(f"{path}:{number}: is no JSON")
                    continue
                if isinstance(line, dict) and str(line.get("topic", "")).partition(".")[0] == "usage":
                    yield f"{path}:{number}", line.get("value")
    except OSError as error:
        raise BadUsage(f"{path}: cannot be read: {error.strerror}") from None


def _readings(value: Any, place: str) -> Iterator[Fields]:
    """A record's readings: one, or those of a batch with what it says for all."""
    batch = value.get("UsageBatch") if isinstance(value, dict) else None
    if not isinstance(batch, dict) or not isinstance(batch.get("usages"), list):
        yield Fields(value if isinstance(value, dict) else {})
        return
    head = {name: batch.get(name) for name in ("supplier_id", "ods_code")}
    for reading in batch["usages"]:
        yield Fields({**reading, **head} if isinstance(reading, dict) else {})


def _read(fields: Fields) -> tuple[tuple[str, str, str], int, tuple[str, int, int, str]]:
    identity = (fields.text("supplier_id"), fields.text("ods_code"), fields.text("id"))
    at = read_instant(fields, "occurred_at")
    content = (fields.text("item_id"), fields.micros("quantity"), london_day(at), fields.text("occurred_at"))
    return identity, fields.integer("revision", 0), content


# --- comparing ----------------------------------------------------------------------------------


def compare_usage(bills: Sequence[Bill], own: Usage | None, differs: Callable[[str], None], *, whole: bool) -> int:
    """Compares the readings listed beside each bill with its digests, and a supplier's own with the bills.

    Of several bills the latest that speaks of a day counts.  With `whole` the bills are all that
    there are, so a reading of theirs months that none of them lists is a difference.  Returns how
    many days were compared.
    """
    compared = 0
    latest: dict[Service, dict[int, _Counted]] = {}
    months: dict[Service, set[int]] = {}
    for bill in sorted(bills, key=lambda bill: (bill.read.period, bill.name)):
        listed = read_listed(bill.listed)
        compared += _compare_listed(bill, listed, differs)
        for service, days in bill.read.days.items():
            covered = months.setdefault(service, set())
            covered |= bill.read.months
            _count(latest.setdefault(service, {}), days, covered, bill.read.months, listed)
    if own is None:
        return compared
    for text in own.refused:
        differs(f"{text}: is no usage that can be billed")
    for service in sorted(latest):
        mine = {day for day in own.days.get(service, ()) if month_of(day) in months[service]}
        for day in sorted(mine | latest[service].keys()):
            compared += 1
            _compare_day(service, day, latest[service].get(day, _NOTHING), own, differs)
    if whole:
        _report_unbilled(own, latest, {month for bill in bills for month in bill.read.months}, differs)
    return compared


def _count(
    known: dict[int, _Counted],
    days: Mapping[int, tuple[int, Readings | None]],
    covered: set[int],
    fresh: set[int],
    listed: Usage | None,
) -> None:
    """Takes over what a bill counts on the days of a service: all of its own months, of others what has changed."""
    for day in {*known, *days}:
        quantity, readings = days.get(day, (0, None))
        if month_of(day) in fresh:
            known[day] = _Counted(quantity, readings or _NOTHING.readings, listed)
        elif month_of(day) in covered and known.get(day, _NOTHING).quantity_micros != quantity:
            known[day] = _Counted(quantity, None, None)


def _compare_listed(bill: Bill, listed: Usage | None, differs: Callable[[str], None]) -> int:
    """The readings beside a bill are those that its evidence counts."""
    if listed is None:
        return 0
    for text in listed.refused:
        differs(text)
    compared = 0
    for service in sorted(bill.read.days.keys() | listed.days.keys()):
        days, found = bill.read.days.get(service, {}), listed.days.get(service, {})
        for day in sorted({day for day in days if days[day][1] is not None} | found.keys()):
            quantity, readings = days.get(day, (0, None))
            here = found.get(day, {})
            compared += 1
            if readings is None or digest(here) != readings:
                differs(f"{bill.listed}: {_of(service, day)}: the readings are not those that the evidence counts")
            elif sum(each.quantity_micros for each in here.values()) != quantity:
                differs(f"{bill.listed}: {_of(service, day)}: the readings do not sum to {micros_text(quantity)}")
    return compared


def _compare_day(service: Service, day: int, billed: _Counted, own: Usage, differs: Callable[[str], None]) -> None:
    mine = own.days.get(service, {}).get(day, {})
    quantity = sum(each.quantity_micros for each in mine.values())
    if billed.readings is None:
        if quantity != billed.quantity_micros:
            differs(
                f"{_of(service, day)}: the bill counts {micros_text(billed.quantity_micros)}, your file has "
                f"{micros_text(quantity)}"
            )
        return
    if digest(mine) == billed.readings:
        return
    differs(
        f"{_of(service, day)}: the bill counts {micros_text(billed.quantity_micros)} in {billed.readings.count} "
        f"readings, your file has {micros_text(quantity)} in {len(mine)}"
    )
    if billed.listed is None and billed.readings.count:
        for text in _named("your file has", mine):
            differs(text)
        return
    theirs = billed.listed.days.get(service, {}).get(day, {}) if billed.listed else {}
    for text in _named("only your file has", {key: each for key, each in mine.items() if key not in theirs}):
        differs(text)
    for text in _named("only the bill counts", {key: each for key, each in theirs.items() if key not in mine}):
        differs(text)
    for key in sorted(mine.keys() & theirs.keys()):
        if mine[key][:2] != theirs[key][:2]:
            differs(f"  {key[1]}: the bill counts {_shown(theirs[key])}, your file has {_shown(mine[key])}")


def _report_unbilled(own: Usage, latest: Iterable[Service], months: set[int], differs: Callable[[str], None]) -> None:
    known = set(latest)
    for service in sorted(own.days.keys() - known):
        for day, readings in sorted(own.days[service].items()):
            if month_of(day) in months:
                differs(f"{_of(service, day)}: no bill counts usage of it, your file has {len(readings)} readings")
                for text in _named("only your file has", readings):
                    differs(text)


def _named(said: str, readings: OfDay) -> Iterator[str]:
    for key in sorted(readings)[:NAMED_MAX]:
        yield f"  {said} {key[1]}: {_shown(readings[key])}"
    if len(readings) > NAMED_MAX:
        yield f"  {said} {len(readings) - NAMED_MAX} more"


def _shown(reading: Reading) -> str:
    return f"{micros_text(reading.quantity_micros)} at {reading.occurred_at}, revision {reading.revision}"


def _of(service: Service, day: int) -> str:
    return f"{iso(day)} {service[0]} at {service[1]}"
