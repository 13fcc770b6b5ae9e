"""Pennies: a line's cumulative entitlement rounded once, and its payers' shares to sum to it (RULES 3.10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from rating.amounts import largest_remainder, round_half_away
from rating.charges import ZERO


class Entitlement:
    """One line's running entitlement and its payers' cumulative shares, month after month.

    With E the exact entitlement to the end of a month the line has earned round(E) pence; the
    month's charge is what that grew by.  Payers are rounded to sum to it by largest remainder.
    """

    __slots__ = ("exact", "payers_exact", "payers_pence")

    def __init__(self) -> None:
        self.exact = ZERO
        self.payers_exact: dict[str, Fraction] = {}
        self.payers_pence: dict[str, int] = {}

    def add_month(self, shares: Mapping[str, Fraction], ties: Sequence[str]) -> dict[str, int]:
        """Adds a month's exact shares; returns the pence that each payer's part grew by.

        `ties` are the payers of the waterfall in force on the month's last day, in its order.
        """
        taking = {payer for payer, share in shares.items() if share}
        for payer in taking:
            self.payers_exact[payer] = self.payers_exact.get(payer, ZERO) + shares[payer]
            self.exact += shares[payer]
        earned = round_half_away(self.exact)
        kept = sum(pence for payer, pence in self.payers_pence.items() if payer not in taking)
        rounded = self._round(taking, earned - kept, ties)
        if rounded is None:
            rounded = self._round(set(self.payers_exact), earned, ties)
        assert rounded is not None, "all payers together can always be rounded to the line's pence"
        grown = {}
        for payer, pence in rounded.items():
            if difference := pence - self.payers_pence.get(payer, 0):
                grown[payer] = difference
            self.payers_pence[payer] = pence
        return grown

    def _round(self, payers: set[str], total: int, ties: Sequence[str]) -> dict[str, int] | None:
        order = {payer: index for index, payer in reversed(list(enumerate(ties)))}
        ranked = sorted(payers, key=lambda payer: (order.get(payer, len(ties)), payer.encode()))
        pence = largest_remainder([self.payers_exact[payer] for payer in ranked], total)
        return None if pence is None else dict(zip(ranked, pence, strict=True))
