"""By how much the accruals differ from what the ledger gives at the positions that they count (promise 3): by 0."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from agents.context import Context
from agents.explaining import Changes
from rating.amounts import pence
from rating.book import LineKey
from rating.close import Derivation, rate_lines
from rating.funding import charge_of
from sinks.accruals import Accruals
from sinks.documents import Cut
from sinks.positions import Positions
from streams.topics import partition_for

#: Exact pence by line and month.
Charges = Mapping[tuple[LineKey, int], Fraction]


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
            known[same] = derived.exact if at_cut else _exact_at(context, counted, period)
        expected.append(known[same])
    accrued = accruals.exact_and_version(period)
    partition_of: dict[str, int] = {}
    total, nothing = Fraction(0), Fraction(0)
    for key in accrued.keys() | {key for each in known.values() for key in each}:
        item_id = key[0][1]
        if item_id not in partition_of:
            partition_of[item_id] = partition_for(item_id, partitions)
        partition = partition_of[item_id]
        found, at = accrued.get(key, (nothing, 0))
        due = expected[partition].get(key, nothing)
        # A row that was written since its partition's positions were read counts more than they say.
        if found != due and at <= complete[partition]:
            total += abs(found - due)
    return total


def _counts_the_cut(context: Context, counted: Positions, cut: Cut) -> bool:
    """Whether positions of the accruals and a cut of the input topics take in the same changes and usage."""
    generation = context.settings.log_generation
    return (
        cut.generation == generation
        and all(counted.get(place, 0) == end for place, end in cut.positions.items() if "changes" in place)
        and context.ledger.same_usage(generation, counted, cut.positions)
    )


def _exact_at(context: Context, counted: Positions, period: int) -> Charges:
    """What the ledger gives at positions that the accruals count."""
    generation = context.settings.log_generation
    usage = context.ledger.totals_accepted(generation, counted)
    book = Changes(context, generation, counted).known(usage).book
    return {
        (line.key, month): pence(charge_of(split))
        for line, months in rate_lines(book, period)
        for month, split in months.items()
    }
