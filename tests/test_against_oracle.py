"""`rating` and the oracle, two readings of RULES that share no code, give the same bytes."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from tests.oracle import oracle
from tests.oracle.strategies import ARRIVAL, books
from tests.replay import replay

SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=100)


def same(book: list) -> None:
    expected = oracle.run(book, arrival=ARRIVAL)
    found = replay(book, arrival=ARRIVAL)
    assert len(found.closes) == len(expected.closes)
    for (period, lines, held), close in zip(found.closes, expected.closes, strict=True):
        assert period == close.period
        assert [tuple(row) for row in lines] == [tuple(row) for row in close.lines]
        assert [tuple(row) for row in held] == [tuple(row) for row in close.held]


@SLOW
@given(books(flat_only=True))
def test_flat_books(book: list) -> None:
    """Books of flat prices come out the same to the penny."""
    same(book)


@SLOW
@given(books(flat_only=False))
def test_all_books(book: list) -> None:
    """Books with everything in RULES come out the same to the penny."""
    same(book)
