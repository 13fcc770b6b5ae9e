"""Pennies: a line's cumulative entitlement rounded once, and its payers' shares to sum to it (RULES 3.10)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rating.amounts import GRAINS, Exact, largest_remainder, round_half_away, whole


class Entitlement:
    """One line's running entitlement and its payers' cumulative shares, month after month.

    With E the exact entitlement to the end of a month the line has earned round(E) pence; the
    month's charge is what that grew by.  Payers are rounded to sum to it by largest remainder (3.10).

    Three months of a third of a penny each, all of one payer: the penny is earned in the second.

    >>> line = Entitlement()
    >>> [line.add_month(GRAINS // 3, {"NHSE": GRAINS // 3}, lambda: ["NHSE"]) for _ in range(3)]
    [{}, {'NHSE': 1}, {}]
    """

    __slots__ = ("exact", "payers_exact", "payers_pence")

    def __init__(self) -> None:
        self.exact: Exact = 0
        self.payers_exact: dict[str, Exact] = {}
        self.payers_pence: dict[str, int] = {}

    def add_month(
        self, charge: Exact, shares: Mapping[str, Exact], ties: Callable[[], Sequence[str]]
    ) -> dict[str, int]:
        """Adds a month's exact charge and its payers' shares; returns the pence that each payer's part grew by.

        The shares sum to the charge, which is a whole number where they often are not.  `ties` gives
        the payers of the waterfall in force on the month's last day, in its order.
        """
        if len(shares) == 1 and (shares.keys() == self.payers_exact.keys() or not self.payers_exact):
            return self._add_all_to_one(*shares.items())
        taking = [payer for payer, share in shares.items() if share]
        for payer in taking:
            self.payers_exact[payer] = self.payers_exact.get(payer, 0) + shares[payer]
        self.exact = whole(self.exact + charge)
        earned = round_half_away(self.exact, GRAINS)
        kept = sum([pence for payer, pence in self.payers_pence.items() if payer not in taking])
        rounded = self._round(taking, earned - kept, ties)
        if rounded is None:
            rounded = self._round(list(self.payers_exact), earned, ties)
        assert rounded is not None, "all payers together can always be rounded to the line's pence"
        grown = {}
        for payer, pence in rounded.items():
            if difference := pence - self.payers_pence.get(payer, 0):
                grown[payer] = difference
            self.payers_pence[payer] = pence
        return grown

    def _add_all_to_one(self, only: tuple[str, Exact]) -> dict[str, int]:
        """The one payer that the line ever had takes all: nothing is left to share out."""
        payer, share = only
        self.exact = self.payers_exact[payer] = self.exact + share
        earned, before = round_half_away(self.exact, GRAINS), self.payers_pence.get(payer, 0)
        self.payers_pence[payer] = earned
        return {payer: earned - before} if earned != before else {}

    def _round(self, payers: list[str], total: int, ties: Callable[[], Sequence[str]]) -> dict[str, int] | None:
        if len(payers) > 1:
            ranked = [payer for payer in dict.fromkeys(ties()) if payer in payers]
            payers = ranked + sorted(set(payers) - set(ranked), key=str.encode)
        pence = largest_remainder([self.payers_exact[payer] for payer in payers], total, GRAINS)
        return None if pence is None else dict(zip(payers, pence, strict=True))
