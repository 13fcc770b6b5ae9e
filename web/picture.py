"""The picture of now that the page shows and Prometheus scrapes, from the ledger at little cost.

Asked again, only what may have changed is computed anew: each part remembers the tokens of its tables
and what it cost, and rests twenty times as long as it took; and only one costly part is computed for one
picture, the others wait for the next.  Money needs no new query while time alone passes: within a London
day an amount and its rate say every instant.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Any, Generic, TypeVar

from rating.amounts import micros_text
from rating.calendar import LONDON, financial_year, first_day, month_start, month_text
from sinks import metrics
from streams.settings import Settings
from web.progress import Progress
from web.queries import Allocation, Amount, Queries, Tokens

Value = TypeVar("Value")

TOP = 10
#: A part rests so many times as long as it took, so each costs at most a twentieth of the ledger's time.
_REST = 20
#: A picture that has cost so much already takes what else has changed from the one before.
_COSTLY_SECONDS = 0.1
#: The months whose parts are remembered; a page names its month, so there must be a bound.
_REMEMBERED = 100
_MONTHS_IN_METRICS = 13
_EXACT = Context(prec=100, rounding=ROUND_HALF_UP)
_ZERO = Decimal(0)


def pounds(pence: Decimal | int, places: int = 6) -> str:
    """Pence as pounds, a decimal string."""
    exact = _EXACT.scaleb(Decimal(pence), -2)
    return f"{exact.quantize(Decimal(1).scaleb(-places), context=_EXACT):f}"


@dataclass(slots=True)
class _Part(Generic[Value]):
    """A part of the picture as last computed."""

    value: Value
    token: Hashable
    rests_until: float


@dataclass(frozen=True, slots=True)
class Money:
    """A month's money as of an instant, and until when its rates hold."""

    at_ms: int
    until_ms: int
    suppliers: Sequence[Amount]
    payers: Sequence[Amount]
    allocations: Sequence[Allocation]


class Pictures:
    """Pictures of any month; used by one thread at a time."""

    def __init__(self, queries: Queries, settings: Settings) -> None:
        self._queries = queries
        self._generation = settings.log_generation
        self._floor = settings.arrival_floor_at
        self._replay_clock = settings.replay_clock
        self._parts: OrderedDict[Hashable, _Part[Any]] = OrderedDict()
        self._spent = 0.0

    def now(self) -> datetime:
        """Now; in a replay, which may play ahead of the calendar, the end of what it replays if later.

        In a demonstration of the past it is the latest instant of usage.
        """
        now = datetime.now(UTC)
        if self._replay_clock and (latest := self._queries.latest_usage()) is not None:
            return latest
        return now if self._floor is None else max(now, self._floor)

    def _part(self, name: Hashable, token: Hashable, compute: Callable[[], Value]) -> Value:
        known: _Part[Value] | None = self._parts.get(name)
        started = time.monotonic()
        if known is not None:
            may_wait = started < known.rests_until or self._spent > _COSTLY_SECONDS
            if known.token == token or may_wait:
                self._parts.move_to_end(name)
                return known.value
        value = compute()
        ended = time.monotonic()
        self._spent += ended - started
        self._parts[name] = _Part(value, token, ended + _REST * (ended - started))
        self._parts.move_to_end(name)
        while len(self._parts) > _REMEMBERED:
            self._parts.popitem(last=False)
        return value

    # --- the page ---

    def picture(self, month: int | None, now: datetime, progress: Progress | None) -> dict[str, Any]:
        """What the page shows of a month (None: the live one), as JSON.  Raises what the ledger raises."""
        self._spent = 0.0
        tokens = self._queries.tokens()
        months = self._part("months", tokens.accruals, self._queries.months)
        shown = self._live_month(now, tokens) if month is None else month
        now_ms = _milliseconds(now)
        start_ms, end_ms = _milliseconds(month_start(shown)), _milliseconds(month_start(shown + 1))
        at_ms = min(max(now_ms, start_ms), end_ms)
        money = self._money(shown, at_ms, tokens)
        # A part that rests may be of the day before: its rates held until that day's end.
        passed = max(0, min(at_ms, money.until_ms) - money.at_ms)
        return {
            "month": month_text(shown),
            "months": [month_text(each) for each in months],
            "state": "past" if now_ms >= end_ms else "future" if now_ms < start_ms else "live",
            "at_ms": at_ms,
            "start_ms": start_ms,
            "end_ms": end_ms,
            "until_ms": max(at_ms, money.until_ms),
            "national": _amount(_total(money.suppliers), passed),
            "suppliers": _top(money.suppliers, passed),
            "payers": _top(money.payers, passed),
            "allocations": _allocations(money.allocations, shown),
            "usage": self._usage(tokens, progress),
            "suspense": self._suspense_json(tokens),
            "dead_letters": self._letters(tokens),
            "lag": None if progress is None else [[stage, progress.stage(stage)] for stage in progress.behind],
            "periods": self._periods_json(tokens),
        }

    def _live_month(self, now: datetime, tokens: Tokens) -> int:
        """The newest month with usage that is not in the future; without any, the current one."""
        current = _month(now)
        before = date.fromordinal(first_day(current + 1))
        newest = self._part(("newest usage", before), tokens.usage, lambda: self._queries.newest_usage(before))
        return current if newest is None else newest.year * 12 + newest.month - 1

    def _money(self, month: int, at_ms: int, tokens: Tokens) -> Money:
        at = datetime.fromtimestamp(at_ms / 1000, LONDON)  # whole milliseconds are exact
        next_day = datetime.combine(at.date() + timedelta(days=1), datetime.min.time(), LONDON)

        def compute() -> Money:
            return Money(
                at_ms,
                _milliseconds(next_day),
                self._queries.by_supplier(month, at_ms),
                self._queries.by_payer(month, at_ms),
                self._queries.allocations(month),
            )

        return self._part(("money", month), (tokens.accruals, at.date()), compute)

    def _usage(self, tokens: Tokens, progress: Progress | None) -> dict[str, Any]:
        by_agent = self._part("letters by agent", tokens.dead_letters, self._queries.dead_letters)
        return {
            "accepted": tokens.usage[0],
            "duplicates": self._duplicates(tokens, progress),
            "conflicts": by_agent.get("usage", 0),
            "refused": by_agent.get("intake", 0),
        }

    def _duplicates(self, tokens: Tokens, progress: Progress | None) -> int | None:
        """Records of this life of the log of which nothing was kept or refused.

        The ledger keeps no duplicates, so they are what is missing from it; that can be told only up to
        where usage is settled.  While it is not, the last number stands.
        """
        if progress is None or progress.settled is None:
            known = self._parts.get("duplicates")
            return None if known is None else known.value
        settled = progress.settled

        def compute() -> int:
            return max(0, sum(settled.values()) - self._queries.records_kept(self._generation, settled))

        token = (tokens.usage, tokens.dead_letters, tuple(sorted(settled.items())))
        return self._part("duplicates", token, compute)

    def _suspense_json(self, tokens: Tokens) -> dict[str, Any]:
        found = self._part("suspense", (tokens.usage, tokens.accruals), lambda: self._queries.suspense(TOP))
        return {
            "services": found.services,
            "quantity": micros_text(found.quantity_micros),
            "largest": [
                {"item_id": item, "ods_code": ods, "quantity": micros_text(micros)}
                for item, ods, micros in found.largest
            ],
        }

    def _letters(self, tokens: Tokens) -> dict[str, Any]:
        by_agent = self._part("letters by agent", tokens.dead_letters, self._queries.dead_letters)
        last = self._part("last letters", tokens.dead_letters, lambda: self._queries.last_letters(TOP))
        return {
            "count": sum(by_agent.values()),
            "by_agent": by_agent,
            "last": [
                {
                    "agent": letter.agent,
                    "source": f"{letter.topic}/{letter.partition} offset {letter.offset}",
                    "reason": f"{letter.field} {letter.reason}" if letter.field else letter.reason,
                    "at_ms": _milliseconds(letter.written_at),
                }
                for letter in last
            ],
        }

    def _periods_json(self, tokens: Tokens) -> list[dict[str, Any]]:
        periods = self._part("periods", tokens.periods, self._queries.periods)
        return [
            {
                "period": month_text(each.month),
                "documents": each.documents,
                "net": pounds(each.net_pence, 2),
                "held": pounds(each.held_pence, 2),
                "drift": pounds(each.drift_pence, 20 if each.drift_pence else 2),
                "closed_at_ms": _milliseconds(each.closed_at),
            }
            for each in periods[:24]
        ]

    # --- Prometheus ---

    def set_gauges(self, now: datetime, progress: Progress | None) -> None:
        """Sets the national gauges.  Raises what the ledger raises.

        Prometheus knows floats only: these are figures to watch, not to account with.
        """
        self._spent = 0.0
        tokens = self._queries.tokens()
        for agent, count in self._part("letters by agent", tokens.dead_letters, self._queries.dead_letters).items():
            metrics.DEAD_LETTERS.labels(agent).set(count)
        suspense = self._part("suspense", (tokens.usage, tokens.accruals), lambda: self._queries.suspense(TOP))
        metrics.SUSPENSE_SERVICES.set(suspense.services)
        metrics.SUSPENSE_QUANTITY.set(float(Decimal(suspense.quantity_micros).scaleb(-6)))
        current = _month(now)
        at_ms = _milliseconds(now)
        money = self._money(current, at_ms, tokens)
        total = _total(money.suppliers)
        passed = max(0, min(at_ms, money.until_ms) - money.at_ms)
        first = current - _MONTHS_IN_METRICS + 1
        months = self._part(
            ("by month", first),
            tokens.accruals,
            lambda: self._queries.accrued_by_month(first, current - 1),
        )
        for month, pence in {**months, current: _after(total, passed)}.items():
            metrics.ACCRUED.labels(month_text(month)).set(float(pence))
        metrics.SPEND_RATE.set(float(total.pence_per_second))
        periods = self._part("periods", tokens.periods, self._queries.periods)
        if periods:
            metrics.HELD.set(float(periods[0].held_pence))
            metrics.ACCRUAL_DRIFT.set(float(periods[0].drift_pence))
            metrics.CLOSED_PERIOD.set(month_start(periods[0].month + 1).timestamp())
        for stage, topics in progress.behind.items() if progress is not None else ():
            for topic, behind in topics.items():
                metrics.LAG.labels(stage, topic).set(behind)


def _month(instant: datetime) -> int:
    at = instant.astimezone(LONDON)
    return at.year * 12 + at.month - 1


def _milliseconds(instant: datetime) -> int:
    aware = instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def _total(amounts: Sequence[Amount]) -> Amount:
    return Amount(
        "",
        sum((each.accrued_pence for each in amounts), _ZERO),
        sum((each.pence_per_second for each in amounts), _ZERO),
        sum((each.month_pence for each in amounts), _ZERO),
    )


def _after(amount: Amount, passed_ms: int) -> Decimal:
    return amount.accrued_pence + amount.pence_per_second * passed_ms / 1000


def _amount(amount: Amount, passed_ms: int) -> dict[str, str]:
    return {
        "id": amount.id,
        "accrued": pounds(_after(amount, passed_ms), 8),
        "per_second": pounds(amount.pence_per_second, 12),
        "whole_month": pounds(amount.month_pence, 2),
    }


def _top(amounts: Sequence[Amount], passed_ms: int) -> dict[str, Any]:
    rest = amounts[TOP:]
    return {
        "count": len(amounts),
        "top": [_amount(each, passed_ms) for each in amounts[:TOP]],
        "others": _amount(_total(rest), passed_ms) if rest else None,
    }


def _allocations(allocations: Sequence[Allocation], month: int) -> dict[str, Any]:
    """All parties' total; all of them if few, else those with the least and the most left."""
    year = financial_year(month)
    allocation = sum((each.allocation_pence for each in allocations), _ZERO)
    left = sum((each.left_pence for each in allocations), _ZERO)
    shown = allocations if len(allocations) <= TOP else (*allocations[: TOP // 2], *allocations[-TOP // 2 :])
    return {
        "year": f"{year}/{(year + 1) % 100:02d}",
        "parties": len(allocations),
        "allocation": pounds(allocation, 2),
        "drawn": pounds(allocation - left, 2),
        "left": pounds(left, 2),
        "shown": [
            {
                "party": each.party,
                "allocation": pounds(each.allocation_pence, 2),
                "drawn": pounds(each.allocation_pence - each.left_pence, 2),
                "left": pounds(each.left_pence, 2),
                "wanted": pounds(each.wanted_pence, 2),
                "left_percent": _percent(each.left_pence, each.allocation_pence),
                "covered_percent": f"{each.coverage * 100:.1f}",
            }
            for each in shown
        ],
    }


def _percent(part: Decimal, whole: Decimal) -> str:
    return f"{part * 100 / whole:.1f}" if whole else "0.0"
