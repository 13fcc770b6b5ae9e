"""Exact numbers: decimals of six places as integers, money as fractions of pence, one way to round."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

MICROS = 1_000_000
#: price_micros * quantity_micros is in 10**-12 pounds; so many of them are one penny.
PENNY = 10**10
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


def round_half_away(exact: Fraction) -> int:
    """The nearest integer, halves away from zero (RULES 3.10).

    >>> [round_half_away(Fraction(n, 2)) for n in (1, -1, 3, 0)]
    [1, -1, 2, 0]
    """
    numerator, denominator = exact.numerator, exact.denominator
    magnitude = (2 * abs(numerator) + denominator) // (2 * denominator)
    return magnitude if numerator >= 0 else -magnitude


def largest_remainder(exact: Sequence[Fraction], total: int) -> list[int] | None:
    """Integers that sum to `total`, each the floor of its share or one more.

    The extra ones go to the largest remainders (what exceeds the floor, also when negative); of
    equal ones to the earlier in the sequence, so the caller orders it by the tie rule.  None when
    no such integers exist.

    >>> largest_remainder([Fraction(1, 3)] * 3, 1)
    [1, 0, 0]
    """
    floors = [share.numerator // share.denominator for share in exact]
    extra = total - sum(floors)
    if not 0 <= extra <= len(floors):
        return None
    order = sorted(range(len(floors)), key=lambda index: floors[index] - exact[index])
    for index in order[:extra]:
        floors[index] += 1
    return floors
