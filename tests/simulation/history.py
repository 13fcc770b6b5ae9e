"""A history: a book and a schedule from one seed, played and checked."""

from __future__ import annotations

import gc
import logging
import traceback
from functools import lru_cache

import structlog

from tests.simulation.book import Line, small_book
from tests.simulation.check import Expected, check, straight
from tests.simulation.world import World

#: So many seeds in a row share a book, which is played once without a fault.
_SCHEDULES_OF_A_BOOK = 20
_SHOWN = 200


def book_of(seed: int) -> tuple[list[Line], Expected]:
    """The book of a seed, and what it comes to."""
    return _book(seed // _SCHEDULES_OF_A_BOOK)


@lru_cache(maxsize=4)
def _book(number: int) -> tuple[list[Line], Expected]:
    # A close looks through all objects for cycles; the modules' own are most of them, and it took half of the time.
    gc.collect()
    gc.freeze()
    book = small_book(number)
    return book, straight(book)


def survive(seed: int) -> list[str]:
    """Plays the history of a seed; returns all that happened.  An AssertionError tells it."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    book, expected = book_of(seed)
    world = World(book, seed)
    try:
        world.play()
        check(world, expected)
    except Exception as error:
        told = "\n  ".join(world.told[-_SHOWN:])
        where = "".join(traceback.format_tb(error.__traceback__)[-6:])
        raise AssertionError(
            f"seed {seed} (make simulate SEED={seed}): {type(error).__name__}: {error}\n"
            f"the last of {len(world.told)} things that happened:\n  {told}\n{where}"
        ) from None
    return world.told
