"""By how much the accruals differ from what the ledger gives at the positions that they count (promise 3): by 0."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from agents.context import Context
from agents.explaining import Changes
from rating.amounts import GRAINS, Exact, pence
from rating.book import LineKey
from rating.close import Derivation, rate_lines
from rating.funding import charge_of
from sinks.accruals import Accruals
from sinks.documents import Cut
from sinks.positions import Positions
from streams.topics import partition_for

#: The exact charge of each line's months.
Charges = Mapping[LineKey, Mapping[int, Exact]]


def drift_pence(context: Context, period: int, derived: Derivation, cut: Cut) -> Fraction:
    """The sum of the differences up to a period, without their signs.

    Where the accruals count what the cut does and no more, they are compared with what was just derived.
    """
    accruals, generation = Accruals(context.clickhouse), context.settings.log_generation
    partitions = context.settings.partitions
    expected: list[Charges] = []
    known: dict[tuple[tuple[str, int], ...], Charges] = {}
    complete: list[int] = []
    for partition in range(partitions):
        newest, counted = accruals.counted(partition, generation)
        complete.append(newest)
        same = tuple(sorted(counted.items()))
        if same not in known:
            at_cut = _counts_the_cut(context, counted, cut)
            known[same] = derived.charges if at_cut else _charges_at(context, counted, period)
        expected.append(known[same])
    items = {line[1] for each in known.values() for line in each} | accruals.items()
    partition_of = {item_id: partition_for(item_id, partitions) for item_id in items}
    total = Fraction(0)
    months_of: dict[LineKey, list[int]] = {}
    nothing: dict[int, Exact] = {}
    for line, rows in accruals.exact_rows(period):
        partition = partition_of[line[1]]
        charges = expected[partition].get(line, nothing)
        months_of[line] = [month for month, _, _ in rows]
        for month, exact, at in rows:
            due = charges.get(month, 0)
            numerator, _, denominator = exact.partition("/")
            # A row that was written since its partition's positions were read counts more than they say.
            if due * int(denominator or 1) != int(numerator) * GRAINS and at <= complete[partition]:
                total += abs(Fraction(exact) - pence(due))
    for partition, lines in enumerate(expected):
        for line, charges in lines.items():
            if partition_of[line[1]] == partition:
                without_row = charges.keys() - months_of.get(line, ())
                total += sum(abs(pence(charges[month])) for month in without_row)
    return total


def _counts_the_cut(context: Context, counted: Positions, cut: Cut) -> bool:
    """Whether positions of the accruals and a cut of the input topics take in the same changes and usage."""
    generation = context.settings.log_generation
    return (
        cut.generation == generation
        and all(counted.get(place, 0) == end for place, end in cut.positions.items() if "changes" in place)
        and context.ledger.same_usage(generation, counted, cut.positions)
    )


def _charges_at(context: Context, counted: Positions, period: int) -> Charges:
    """What the ledger gives at positions that the accruals count."""
    generation = context.settings.log_generation
    usage = context.ledger.totals_accepted(generation, counted)
    book = Changes(context, generation, counted).known(usage).book
    return {
        line.key: {month: charge_of(split) for month, split in months.items()}
        for line, months in rate_lines(book, period)
    }
