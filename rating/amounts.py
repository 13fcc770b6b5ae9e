"""Exact numbers: decimals of six places as integers, money as grains of a penny, one way to round.

A grain is so small that prices, quantities, days and months come out as whole ones: a day of any
month, of a twelfth of a year, of 365 and of 366 is a whole number of `PARTS`.  So an exact amount
is an integer nearly always, and a `Fraction` of grains where a tier's total, a bound or an
allocation that runs dry divides by any other number.  Both are exact, and Python counts with them
alike; which of the two an amount is makes it fast or slow, never right or wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import lcm

MICROS = 1_000_000
#: price_micros * quantity_micros is in 10**-12 pounds; so many of them are one penny.
PENNY = 10**10
#: 10**-12 pounds are so many grains.
PARTS = lcm(12 * 28, 12 * 29, 12 * 30, 12 * 31, 365, 366)
#: A penny is so many grains.
GRAINS = PENNY * PARTS
#: A millionth of a pound is so many grains.
MICRO_GRAINS = MICROS * PARTS

#: An exact amount of money, in grains.
Exact = int | Fraction
#: decimal(18,6): at most eighteen digits in all.
LIMIT_MICROS = 10**18

_DECIMAL = re.compile(r"(-?)(\d+)(?:\.(\d+))?\Z", re.ASCII)


def micros(text: str) -> int:
    """A decimal(18,6) written as text, in millionths.

    >>> micros("1.26"), micros("3.0000000")
    (1260000, 3000000)

    Trailing zeros do not count.  Raises ValueError for what does not fit: more than six places,
    more than eighteen digits, NaN, exponents, a sign of minus.
    """
    if len(text) > 100 or not (match := _DECIMAL.match(text)):
        raise ValueError(f"{text[:40]!r} is not a decimal number such as 1.26")
    sign, whole, places = match[1], match[2], (match[3] or "").rstrip("0")
    if len(places) > 6:
        raise ValueError(f"{text[:40]!r} has more than six decimal places")
    value = int(whole) * MICROS + int(places.ljust(6, "0"))
    if sign and value:
        raise ValueError(f"{text[:40]!r} is negative")
    if value >= LIMIT_MICROS:
        raise ValueError(f"{text[:40]!r} is too large for decimal(18,6)")
    return value


def micros_text(value: int) -> str:
    """Millionths as the shortest decimal text.

    >>> micros_text(1260000)
    '1.26'
    """
    sign, value = ("-", -value) if value < 0 else ("", value)
    whole, places = divmod(value, MICROS)
    return f"{sign}{whole}.{places:06d}".rstrip("0").rstrip(".") if places else f"{sign}{whole}"


def pounds_text(pence: int) -> str:
    """Pence as pounds with two places.

    >>> pounds_text(-5)
    '-0.05'
    """
    sign, pence = ("-", -pence) if pence < 0 else ("", pence)
    return f"{sign}{pence // 100}.{pence % 100:02d}"


def divided(exact: Exact, by: Exact) -> Exact:
    """A quotient, as an integer where it is one.

    >>> divided(6, 3), divided(1, 3)
    (2, Fraction(1, 3))
    """
    quotient, rest = divmod(exact, by)
    return Fraction(exact, by) if rest else quotient


def whole(exact: Exact) -> Exact:
    """The same number, as an integer where it is one."""
    return exact.numerator if exact.denominator == 1 else exact


@lru_cache(maxsize=65_536)
def pence(exact: Exact) -> Fraction:
    """Grains as pence, still exact, for other eyes than the rules'.

    >>> pence(GRAINS // 31)
    Fraction(1, 31)
    """
    return Fraction(exact, GRAINS)


def round_half_away(exact: Exact, unit: int = 1) -> int:
    """The nearest whole number of units, halves away from zero (RULES 3.10).

    >>> [round_half_away(n, 2) for n in (1, -1, 3, 0)]
    [1, -1, 2, 0]
    """
    numerator, denominator = exact.numerator, exact.denominator * unit
    magnitude = (2 * abs(numerator) + denominator) // (2 * denominator)
    return magnitude if numerator >= 0 else -magnitude


def largest_remainder(exact: Sequence[Exact], total: int, unit: int = 1) -> list[int] | None:
    """Numbers of units that sum to `total`, each the floor of its share or one more.

    The extra ones go to the largest remainders (what exceeds the floor, also when negative); of
    equal ones to the earlier in the sequence, so the caller orders it by the tie rule.  None when
    no such integers exist.

    >>> largest_remainder([1, 1, 1], 1, 3)
    [1, 0, 0]
    """
    floors = [share // unit for share in exact]
    extra = total - sum(floors)
    if not 0 <= extra <= len(floors):
        return None
    if extra:
        order = sorted(range(len(floors)), key=lambda index: floors[index] * unit - exact[index])
        for index in order[:extra]:
            floors[index] += 1
    return floors
