"""Why a close adjusts a month of a line that an earlier one invoiced (RULES 4.1, 4.2; DESIGN promise 5).

The cause is found by comparing what was known at the previous cut with what is known at this one,
as it acts on the line's days of that month: a change that another has overwritten is no cause.
Where nothing of the month itself has changed, its pennies moved with the rounding of earlier ones
(RULES 3.10), so what changed in those is named.  What another practice of the order did is never
said, only that the order's total changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime
from typing import Any, NamedTuple, TypeVar

from rating.amounts import MICRO_GRAINS, MICROS, Exact, micros_text
from rating.book import Line, LineKey
from rating.calendar import (
    FOREVER,
    LONDON,
    NEVER,
    add_months,
    financial_year,
    first_day,
    last_day,
    month_of,
    month_text,
)
from rating.charges import first_month, iso, rated_together
from rating.close import ChargeKey
from rating.evidence import Known, Said
from rating.funding import allocation_exact, draw_down
from rating.records import Price

#: So many are said of one adjustment, and so many change ids of one cause.
SAID_MAX = 4
IDS_MAX = 3

#: A close must not fail for want of a word: this is said where a version of tribill rates otherwise than the last.
UNEXPLAINED = "what is known has changed; the contract changes and the evidence say how"
NOTHING_CHANGED = "nothing that is known has changed: it is rated otherwise than at the previous close"

Value = TypeVar("Value")


class Cause(NamedTuple):
    """Why, in words; what M2 releases names no original document (RULES 4.2)."""

    text: str
    is_release: bool = False


class _News(NamedTuple):
    """A change accepted since the previous cut; of a retraction, what it retracts in the end."""

    kind: str
    body: Said
    text: str
    recorded: str
    is_retraction: bool


class Causes:
    """The causes of one close's adjustments."""

    def __init__(self, before: Known | None, now: Known, period: int) -> None:
        """`before` is what was known at the previous close's cut; None at the first close."""
        self._before = before
        self._now = now
        self._period = period
        self._known: dict[tuple[LineKey, int], Cause] = {}
        self._own_known: dict[tuple[LineKey, int, int], list[str]] = {}
        self._others_known: dict[tuple[str, str, int, int], set[str]] = {}
        self._together_known: dict[tuple[str, str], bool] = {}
        self._coverage_known: dict[tuple[bool, str, int], dict[int, Exact]] = {}
        self._news_known: dict[str, list[_News]] = {}
        #: By order, then by kind, item and practice as a change names them: its place and its text.
        self._named: dict[str, dict[tuple[str, str | None, str | None], list[tuple[int, str]]]] = {}

    def of(self, key: ChargeKey) -> Cause:
        """The cause of an adjustment."""
        line = key[:3]
        if (line, key.month) not in self._known:
            try:
                cause = self._find(line, key.month)
            except Exception:  # a close must not fail for want of a word, whatever dates were said
                cause = Cause(UNEXPLAINED)
            self._known[line, key.month] = cause
        return self._known[line, key.month]

    def _find(self, key: LineKey, month: int) -> Cause:
        before, now = self._before, self._now
        if before is None:
            return Cause(f"{month_text(self._period)} is the first period closed; earlier months were never invoiced")
        old, new = _line(before, key), _line(now, key)
        if new is None:
            return Cause("the line is no longer ordered" + self._ids(key, "OrderPlaced"))
        if old is None:
            said = f"ordered after {month_text(self._period - 1)} was closed"
            return Cause(said + self._ids(key, "OrderPlaced"))
        was, is_now = old.payable(last_day(self._period - 1)), new.payable(last_day(self._period))
        if is_now and not was:
            reached = f"M2 reached {_day(new.m2, month)}: " if new.m2 is not None else ""
            return Cause(f"{reached}held until now", is_release=True)
        if was and not is_now:
            moved = "M2 retracted" if new.m2 is None else f"M2 moved to {_day(new.m2, month)}"
            return Cause(f"{moved}: credited and held again" + self._ids(key, "MilestoneReached"))
        first, after = first_day(month), first_day(month + 1)
        if said_of := self._differences(before, old, new, first, after):
            return Cause(_joined(said_of))
        starts = [start for line, known in ((old, before), (new, now)) if (start := first_month(line, known.book))]
        if said_of := self._differences(before, old, new, first_day(min(starts, default=month)), after):
            return Cause("rounding of earlier months: " + _joined(said_of))
        return Cause(NOTHING_CHANGED)

    def _differences(self, before: Known, old: Line, new: Line, low: int, high: int) -> list[str]:
        """What is known otherwise that acts on the line's days `[low, high)`."""
        said = [*self._own(before, old, new, low, high), *self._payers(before, old, new, low, high)]
        if self._together(old, new) and self._others(before, old, new, low, high) - {new.ods_code}:
            said.append(f"change of the total of order {new.order.number} for {new.item_id}")
        # A line's own change moves what draws on an allocation too; that alone is said only of the other lines.
        amounts, drawn = self._allocation(before, old, new, low, high)
        return said + amounts or drawn

    # --- what the line costs ---

    def _own(self, before: Known, old: Line, new: Line, low: int, high: int) -> list[str]:
        if (new.key, low, high) not in self._own_known:
            self._own_known[new.key, low, high] = [
                *self._supplier(old, new),
                *self._live(before, old, new, low, high),
                *self._prices(old, new, low, high),
                *self._list_sizes(before, old, new, low, high),
                *self._quantities(before, old, new, low, high),
                *self._usage(before, old, new, low, high),
                *self._credits(old, new, low, high),
            ]
        return self._own_known[new.key, low, high]

    def _supplier(self, old: Line, new: Line) -> Iterator[str]:
        was, is_now = old.order.header.supplier_id, new.order.header.supplier_id
        if was != is_now:
            yield f"supplier {was} to {is_now}" + self._ids(new.key, "OrderPlaced")

    def _live(self, before: Known, old: Line, new: Line, low: int, high: int) -> Iterator[str]:
        if _clipped(old.live(before.book.reference), low, high) == _clipped(
            new.live(self._now.book.reference), low, high
        ):
            return
        facts, facts_now = before.book.reference.of(old.ods_code), self._now.book.reference.of(new.ods_code)
        service = (new.item_id, new.ods_code)
        ended, ended_now = old.order.ceased.get(service), new.order.ceased.get(service)
        for name, was, is_now, kind in (
            ("M1", old.m1, new.m1, "MilestoneReached"),
            ("cessation", ended, ended_now, "LineCeased"),
            ("termination of the order", old.order.terminated, new.order.terminated, "OrderTerminated"),
            ("closure of the practice", facts.closed, facts_now.closed, "PracticeClosed"),
            ("merger of the practice", facts.merged, facts_now.merged, "PracticeMerged"),
            ("end of the term", _term_end(old), _term_end(new), "OrderPlaced"),
        ):
            if was != is_now:
                yield _moved(name, was, is_now, month_of(low)) + self._ids(new.key, kind)

    def _prices(self, old: Line, new: Line, low: int, high: int) -> Iterator[str]:
        for day, was, is_now in _changes(_steps(old.price), _steps(new.price), low, high):
            since = _day(day, month_of(low))
            yield f"price agreed from {since}: {_price(was)} to {_price(is_now)}" + self._ids(new.key, "PriceAgreed")

    def _list_sizes(self, before: Known, old: Line, new: Line, low: int, high: int) -> Iterator[str]:
        if not (old.follows_list_size or new.follows_list_size):
            return
        sizes = before.book.reference.of(old.ods_code).list_sizes
        sizes_now = self._now.book.reference.of(new.ods_code).list_sizes
        if sizes.days == sizes_now.days and sizes.patients == sizes_now.patients:
            return
        steps = [(NEVER, None), *zip(sizes.days, sizes.patients, strict=True)]
        steps_now = [(NEVER, None), *zip(sizes_now.days, sizes_now.patients, strict=True)]
        for day, was, is_now in _changes(steps, steps_now, low, high):
            month = month_of(low)
            said = self._publication(new.ods_code, day, month)
            yield f"list size of {_day(day, month)}{said}: {_patients(was)} to {_patients(is_now)}"

    def _publication(self, ods_code: str, as_of: int, month: int) -> str:
        for news in reversed(self._news_of(ods_code)):
            if news.kind == "ListSize" and news.body["as_of"] == iso(as_of):
                return f", {'retracted' if news.is_retraction else 'published'} {_recorded(news.recorded, month)}"
        return ""

    def _quantities(self, before: Known, old: Line, new: Line, low: int, high: int) -> Iterator[str]:
        for day, was, is_now in _changes(_steps(old.quantity), _steps(new.quantity), low, high):
            if self._quantity_counts(before, old, day, low, high) or self._quantity_counts(
                self._now, new, day, low, high
            ):
                since = _day(day, month_of(low))
                said = f"quantity from {since}: {_number(was)} to {_number(is_now)}"
                yield said + self._ids(new.key, "QuantityChanged")

    def _quantity_counts(self, known: Known, line: Line, day: int, low: int, high: int) -> bool:
        """Whether the declared quantity acts on the line anywhere in `[low, high)` from the day on."""
        shared = any(each.ods_code is None and each.item_id == line.item_id for each in line.order.credits)
        sizes = known.book.reference.of(line.ods_code).list_sizes
        for start, _, price in line.price.pieces(max(day, low), high):
            if shared or not (price.is_on_demand or price.provisioning == "patient"):
                return True
            if price.provisioning == "patient" and sizes.at(start) is None:
                return True
        return False

    def _usage(self, before: Known, old: Line, new: Line, low: int, high: int) -> Iterator[str]:
        if not any(price.is_on_demand for line in (old, new) for price in line.price.values):
            return
        service = (new.item_id, new.ods_code)
        days, days_now = before.book.usage.get(service, {}), self._now.book.usage.get(service, {})
        several = max(len(known.book.by_service.get(service, ())) for known in (before, self._now)) > 1
        late: dict[int, int] = {}
        month = month_of(low)
        for day in sorted(day for day in days.keys() | days_now.keys() if low <= day < high):
            more = days_now.get(day, 0) - days.get(day, 0)
            if not more and not several:
                continue
            takers, takers_now = before.book.takers(service, day), self._now.book.takers(service, day)
            took, takes = takers[:1] == [old], takers_now[:1] == [new]
            if more and (took or takes):
                late[day] = more
            if took != takes and takers and takers_now:
                yield f"usage of {_day(day, month)} is taken by order {takers_now[0].order.number} now"
        if late:
            yield _late(late, month)

    def _credits(self, old: Line, new: Line, low: int, high: int) -> Iterator[str]:
        was, is_now = (
            [
                each
                for each in line.order.credits
                if each.item_id == line.item_id and each.ods_code in (None, line.ods_code) and low <= each.day < high
            ]
            for line in (old, new)
        )
        gone = list(was)
        for credit in is_now:
            if credit in gone:
                gone.remove(credit)
            else:
                said = f"service credit of {_pounds(credit.amount_micros)} on {_day(credit.day, month_of(low))}"
                yield said + self._ids(new.key, "ServiceCredit")
        for credit in gone:
            said = f"service credit of {_pounds(credit.amount_micros)} on {_day(credit.day, month_of(low))} withdrawn"
            yield said + self._ids(new.key, "ServiceCredit")

    def _together(self, old: Line, new: Line) -> bool:
        """Whether the order's lines for the item are rated together, at one of the cuts."""
        key = new.key[:2]
        if key not in self._together_known:
            self._together_known[key] = any(rated_together(line.order, line.item_id) for line in (old, new))
        return self._together_known[key]

    def _others(self, before: Known, old: Line, new: Line, low: int, high: int) -> set[str]:
        """The practices whose lines of the order's item have changed in `[low, high)`."""
        key = (*new.key[:2], low, high)
        if key not in self._others_known:
            lines = {line.ods_code: line for line in old.order.by_item.get(old.item_id, ())}
            lines_now = {line.ods_code: line for line in new.order.by_item.get(new.item_id, ())}
            self._others_known[key] = {
                code
                for code in lines.keys() | lines_now.keys()
                if code not in lines
                or code not in lines_now
                or self._own(before, lines[code], lines_now[code], low, high)
            }
        return self._others_known[key]

    # --- who pays ---

    def _payers(self, before: Known, old: Line, new: Line, low: int, high: int) -> Iterator[str]:
        month = month_of(low)
        for day, _, _ in _changes(_steps(old.funding), _steps(new.funding), low, high):
            yield f"funding agreed from {_day(day, month)}" + self._ids(new.key, "FundingChanged")
        for day, was, is_now in _changes(_steps(old.order.party), _steps(new.order.party), low, high):
            yield f"ordering party from {_day(day, month)}: {was} to {is_now}" + self._ids(new.key, "PartyNovated")
        yield from self._acceptance(before, new.item_id, low, high)

    def _acceptance(self, before: Known, item_id: str, low: int, high: int) -> Iterator[str]:
        known, known_now = before.book.reference, self._now.book.reference
        spans, spans_now = (
            {name: each.spans for name, each in reference.of(item_id).acceptances.items()}
            for reference in (known, known_now)
        )
        if spans == spans_now:
            return
        changed = [day for day in range(low, high) if known.accepted(item_id, day) != known_now.accepted(item_id, day)]
        if changed:
            accepted = "" if known_now.accepted(item_id, changed[0]) else "not "
            yield f"{item_id} is {accepted}accepted on {_days(changed, month_of(low))}"

    def _allocation(self, before: Known, old: Line, new: Line, low: int, high: int) -> tuple[list[str], list[str]]:
        """Where an allocation covers another fraction: amounts that changed, and those on which other sums draw."""
        amounts: list[str] = []
        drawn: list[str] = []
        draws = any(
            step.take == "allocation"
            for line in (old, new)
            for _, _, waterfall in line.funding.pieces(low, high)
            for step in waterfall
        )
        if not draws:
            return amounts, drawn
        parties = {party for line in (old, new) for _, _, party in line.order.party.pieces(low, high)}
        months = range(month_of(low), month_of(high - 1) + 1)
        for party in sorted(parties):
            for year in sorted({financial_year(month) for month in months}):
                covered, covered_now = self._coverage(before, party, year), self._coverage(self._now, party, year)
                if all(covered.get(month, 1) == covered_now.get(month, 1) for month in months):
                    continue
                was, is_now = (
                    allocation_exact(known.book.reference, party, year) // MICRO_GRAINS for known in (before, self._now)
                )
                if was != is_now:
                    amounts.append(f"allocation of {year} of {party} changed: {_pounds(was)} to {_pounds(is_now)}")
                else:
                    drawn.append(f"what draws on the allocation of {year} of {party} changed")
        return amounts, drawn

    def _coverage(self, known: Known, party: str, year: int) -> dict[int, Exact]:
        """The fraction covered, by month of a financial year in which something would draw."""
        key = (known is self._now, party, year)
        if key not in self._coverage_known:
            wanted = {
                month: known.wanted[party, month]
                for month in range(year * 12 + 3, year * 12 + 15)
                if (party, month) in known.wanted
            }
            drawn = draw_down(allocation_exact(known.book.reference, party, year), wanted, year)
            self._coverage_known[key] = {month: drawn[month].coverage for month in wanted}
        return self._coverage_known[key]

    # --- which change said so ---

    def _ids(self, key: LineKey, kind: str) -> str:
        """The ids of the order's changes of a kind since the previous cut that name the line."""
        order_number, item_id, ods_code = key
        if order_number not in self._named:
            by_name: dict[tuple[str, str | None, str | None], list[tuple[int, str]]] = {}
            for place, news in enumerate(self._news_of(order_number, is_contract=True)):
                name = (news.kind, news.body.get("item_id"), news.body.get("ods_code") or None)
                by_name.setdefault(name, []).append((place, news.text))
            self._named[order_number] = by_name
        names = ((kind, item, ods) for item in (item_id, None) for ods in (ods_code, None))
        named = sorted(each for name in names for each in self._named[order_number].get(name, ()))
        found = [text for _, text in named]
        more = f" and {len(found) - IDS_MAX} more" if len(found) > IDS_MAX else ""
        return f" ({', '.join(found[-IDS_MAX:])}{more})" if found else ""

    def _news_of(self, key: str, *, is_contract: bool = False) -> list[_News]:
        if key not in self._news_known:
            said = self._now.contract if is_contract else self._now.reference
            known = (self._before.contract if is_contract else self._before.reference) if self._before else {}
            changes = said.get(key, ())
            self._news_known[key] = list(_news(changes, len(known.get(key, ()))))
        return self._news_known[key]


def _news(changes: Sequence[Said], known: int) -> Iterator[_News]:
    new = changes[known:]
    by_id = {value["id"]: value for value in changes} if any("Retracted" in value["change"] for value in new) else {}
    for value in new:
        [(kind, body)] = value["change"].items()
        target = value
        while "Retracted" in target["change"]:
            target = by_id[target["change"]["Retracted"]["change_id"]]
        [(kind_said, body_said)] = target["change"].items()
        text = f"change {value['id'][:40]}"
        if kind == "Retracted":
            text = f"{body['change_id'][:40]} retracted by {value['id'][:40]}"
        yield _News(kind_said, body_said, text, value["recorded_at"], kind == "Retracted")


def _line(known: Known, key: LineKey) -> Line | None:
    order = known.book.orders.get(key[0])
    return order.lines.get((key[1], key[2])) if order else None


def _term_end(line: Line) -> int:
    return add_months(line.order.header.commencement, line.order.header.term_months)


def _clipped(live: tuple[int, int], low: int, high: int) -> tuple[int, int] | None:
    first, end = max(live[0], low), min(live[1], high)
    return (first, end) if first < end else None


def _steps(timeline: Any) -> list[tuple[int, Any]]:
    return list(zip(timeline.days, timeline.values, strict=True))


def _changes(
    was: Sequence[tuple[int, Value]], is_now: Sequence[tuple[int, Value]], low: int, high: int
) -> list[tuple[int, Value, Value]]:
    """Where two step functions differ in `[low, high)`: since which day, and both values; each pair once."""
    if was == is_now:
        return []
    starts = sorted({max(low, day) for day, _ in (*was, *is_now) if day < high})
    found: list[tuple[int, Value, Value]] = []
    days, days_now = [day for day, _ in was], [day for day, _ in is_now]
    for day in starts:
        index, index_now = bisect_right(days, day) - 1, bisect_right(days_now, day) - 1
        one, other = was[index][1], is_now[index_now][1]
        if one != other and all(pair[1:] != (one, other) for pair in found):
            since = max(days[index], days_now[index_now])
            found.append((since if since > NEVER else day, one, other))
    return found


# --- words ------------------------------------------------------------------------------------


def _joined(said: Iterable[str]) -> str:
    texts = list(dict.fromkeys(said))
    more = f"; and {len(texts) - SAID_MAX} more" if len(texts) > SAID_MAX else ""
    return "; ".join(texts[:SAID_MAX]) + more


def _day(day: int | None, month: int) -> str:
    """A day in words; the year where it is not that of the adjusted month.

    >>> _day(date(2026, 3, 1).toordinal(), 2026 * 12)
    '1 March'
    """
    assert day is not None, "there is a day to speak of"
    at = date.fromordinal(day)
    year = "" if at.year == month // 12 else f" {at.year}"
    return f"{at.day} {_MONTHS[at.month - 1]}{year}"


_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def _days(days: Sequence[int], month: int) -> str:
    if len(days) == 1:
        return _day(days[0], month)
    return f"{len(days)} days from {_day(days[0], month)} to {_day(days[-1], month)}"


def _recorded(instant: str, month: int) -> str:
    try:
        at = datetime.fromisoformat(instant).astimezone(LONDON)
    except OverflowError:  # the first or last instant that there is, as some systems write "unknown"
        at = datetime.fromisoformat(instant)
    return _day(at.toordinal(), month)


def _moved(name: str, was: int | None, is_now: int | None, month: int) -> str:
    if was is None or (was == FOREVER and is_now is not None):
        return f"{name} on {_day(is_now, month)}"
    if is_now is None or is_now == FOREVER:
        return f"{name} on {_day(was, month)} withdrawn"
    return f"{name} moved from {_day(was, month)} to {_day(is_now, month)}"


def _late(late: dict[int, int], month: int) -> str:
    """What more or less was used on days.

    >>> _late({date(2026, 4, 3).toordinal(): 12_000_000}, 2026 * 12 + 3)
    'usage of 3 April reported late: 12 more'
    """
    more = sum(late.values())
    if more > 0:
        return f"usage of {_days([*late], month)} reported late: {_number(more)} more"
    return f"usage of {_days([*late], month)} corrected: {_number(-more)} less"


def _number(micros: int) -> str:
    whole, places = divmod(micros, MICROS)
    return f"{whole:,}" + (f".{places:06d}".rstrip("0") if places else "")


def _pounds(micros: int) -> str:
    """Pounds with at least two places.

    >>> _pounds(1_200_000), _pounds(17_000), _pounds(1_500_000_000)
    ('1.20', '0.017', '1,500.00')
    """
    whole, places = divmod(micros, MICROS)
    return f"{whole:,}.{places // 10_000:02d}" + f"{places % 10_000:04d}".rstrip("0")


def _patients(patients: int | None) -> str:
    return "none" if patients is None else f"{patients:,}"


def _price(price: Price) -> str:
    tiers = " / ".join(_pounds(tier.price_micros) for tier in price.tiers)
    said = tiers if price.is_flat else f"{price.calculation.replace('_', '-')} {tiers}"
    shown: tuple[tuple[str, int | None, Callable[[int], str]], ...] = (
        ("included", price.included_micros, micros_text),
        ("minimum", price.minimum_micros, _pounds),
        ("maximum", price.maximum_micros, _pounds),
    )
    bounds = [f"{name} {text(value)}" for name, value, text in shown if value]
    return said + (f" ({', '.join(bounds)})" if bounds else "")
