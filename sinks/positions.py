"""Positions in the log, as the ledger's queries take them: which rows count at a cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: `topic/partition` to end offset; rows of that partition before it count.
Positions = Mapping[str, int]

#: A row counts when its life of the log has ended, or it lies before its partition's end.
_AT_CUT = """(generation < {{generation:UInt32}} OR generation = {{generation:UInt32}} AND {offset}
    < transform({place}, {{places:Array(String)}}, {{ends:Array(Int64)}}, toInt64(0)))"""


def place_text(topic: str, partition: int) -> str:
    """How a partition is named in positions."""
    return f"{topic}/{partition}"


def at_cut(place: str, offset: str = "offset") -> str:
    """The SQL condition for rows that count at a cut; `place` is an SQL expression for topic/partition."""
    return _AT_CUT.format(place=place, offset=offset)


def cut_parameters(generation: int, positions: Positions) -> dict[str, Any]:
    """The bound parameters of `at_cut`."""
    # An empty array has no type to infer from, so there is always one place that no row has.
    places = ["/", *positions]
    return {"generation": generation, "places": places, "ends": [0, *positions.values()]}


def version(generation: int, offset: int) -> int:
    """Generation and offset as one number that only grows: the version of a derived row."""
    return (generation << 48) + offset
