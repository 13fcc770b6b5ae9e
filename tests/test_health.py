"""A worker's health: whether each of its partitions moves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streams.health import Progress

A, B = ("usage", 0), ("usage", 1)


def test_one_partition_stands_still_while_another_moves() -> None:
    """A busy worker would hide that nobody does one of its partitions."""
    progress = Progress(300)
    for minute in range(10):
        progress.look({A: (7, 9), B: (minute, 99)}, 60.0 * minute)
        assert progress.stuck(60.0 * minute) == (["usage/0"] if minute > 5 else [])
    progress.look({A: (8, 9), B: (9, 99)}, 600.0)
    assert progress.stuck(600.0) == []


def test_a_partition_that_came_back_begins_anew() -> None:
    """A partition that was away would be called stuck for the time that another had it."""
    progress = Progress(300)
    progress.look({A: (7, 9)}, 0.0)
    progress.look({}, 10.0)
    progress.look({A: (7, 9)}, 1000.0)
    assert progress.stuck(1001.0) == []
    progress.waits(1200.0)
    assert progress.stuck(1400.0) == []
    assert progress.stuck(1501.0) == ["usage/0"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 400)), min_size=1))
def test_stuck_is_what_it_says(looks: list[tuple[int, int, int]]) -> None:
    """Stuck: work to do at every look and the same offset, for longer than the limit."""
    progress, now, history = Progress(300), 0, []
    for done, more, seconds in looks:
        now += seconds
        progress.look({A: (done, done + more)}, float(now))
        history.append((now, done, more))
        since = now
        for index in range(len(history) - 1, 0, -1):
            if not history[index][2] or history[index][1] != history[index - 1][1]:
                break
            since = history[index - 1][0]
        assert bool(progress.stuck(float(now))) == (now - since > 300)
