"""A value over days that later changes paint over (RULES 2.1), and intervals that unite."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Generic, TypeVar

from rating.calendar import FOREVER, NEVER

Value = TypeVar("Value")


class Timeline(Generic[Value]):
    """A value for every day: what was said last about a day holds on it.

    `painted` in log order: a later change overwrites from its first day on, until its own end if
    it has one.  Held as steps: on days from `days[i]` to before `days[i + 1]` it is `values[i]`.
    """

    __slots__ = ("days", "is_constant", "values")

    def __init__(self, initial: Value) -> None:
        self.days: list[int] = [NEVER]
        self.values: list[Value] = [initial]
        #: Whether nothing has been painted over the first value: nearly all are so, and need no search.
        self.is_constant = True

    def paint(self, first: int, end: int, value: Value) -> None:
        """From `first` until before `end` the value is `value`.  An empty interval paints nothing."""
        if first >= end:
            return
        after = self.at(end) if end < FOREVER else None
        low = bisect_left(self.days, first)
        high = bisect_right(self.days, end)
        days, values = [first], [value]
        self.is_constant = False
        if end < FOREVER:
            days.append(end)
            values.append(after)  # type: ignore[arg-type]  # set whenever end is not FOREVER
        self.days[low:high] = days
        self.values[low:high] = values

    def at(self, day: int) -> Value:
        """The value on a day."""
        return self.values[bisect_right(self.days, day) - 1]

    def pieces(self, first: int, end: int) -> list[tuple[int, int, Value]]:
        """The steps inside `[first, end)`: (from, to, value), in order, covering all of it."""
        if self.is_constant:
            return [(first, end, self.values[0])] if first < end else []
        days, values = self.days, self.values
        index = bisect_right(days, first) - 1
        if index + 1 == len(days) or end <= days[index + 1]:
            return [(first, end, values[index])] if first < end else []
        found = []
        while first < end:
            until = min(days[index + 1], end) if index + 1 < len(days) else end
            found.append((first, until, values[index]))
            first, index = until, index + 1
        return found


class Snapshots:
    """Registered list sizes: on a day the one with the latest `as_of` up to it holds (RULES 2.2)."""

    __slots__ = ("days", "patients")

    def __init__(self) -> None:
        self.days: list[int] = []
        self.patients: list[int] = []

    def say(self, as_of: int, patients: int) -> None:
        """A snapshot; of two with the same day the one said later stands."""
        index = bisect_left(self.days, as_of)
        if index < len(self.days) and self.days[index] == as_of:
            self.patients[index] = patients
        else:
            self.days.insert(index, as_of)
            self.patients.insert(index, patients)

    def at(self, day: int) -> int | None:
        """The list size on a day; None before the first snapshot."""
        index = bisect_right(self.days, day) - 1
        return self.patients[index] if index >= 0 else None

    def pieces(self, first: int, end: int) -> list[tuple[int, int, int | None]]:
        """The steps inside `[first, end)`: (from, to, patients or None before the first snapshot)."""
        days, patients, found = self.days, self.patients, []
        index = bisect_right(days, first) - 1
        while first < end:
            until = min(days[index + 1], end) if index + 1 < len(days) else end
            found.append((first, until, patients[index] if index >= 0 else None))
            first, index = until, index + 1
        return found

    def next_after(self, day: int) -> int:
        """The day of the first snapshot after a day; FOREVER when it is the last."""
        index = bisect_right(self.days, day)
        return self.days[index] if index < len(self.days) else FOREVER


class Intervals:
    """Days covered by any of several half-open intervals (RULES 2.1: acceptances unite)."""

    __slots__ = ("spans",)

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []

    def add(self, first: int, end: int) -> None:
        """Covers `[first, end)` too."""
        if first < end:
            self.spans.append((first, end))

    def covers(self, day: int) -> bool:
        """Whether the day lies in one of them."""
        return any(first <= day < end for first, end in self.spans)
