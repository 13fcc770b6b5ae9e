"""The circuits of a worker's sinks, on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streams.circuits import FAILS_AFTER, RESTS_SECONDS, Circuits

SINKS = ("clickhouse", "redis")


def test_one_lane_tries_for_all() -> None:
    """Every lane would hammer a sink that is away, and all of them at once when it comes back."""
    circuits = Circuits()
    assert all(circuits.may_try(0.0) for _ in range(3))
    assert circuits.failed("redis", 0.0) == circuits.failed("redis", 0.0) == RESTS_SECONDS[0]  # two lanes, one finding
    assert not circuits.may_try(RESTS_SECONDS[0] / 2)
    assert [circuits.may_try(1.0) for _ in range(3)] == [True, False, False]
    assert circuits.failed("redis", 1.0) == RESTS_SECONDS[1]
    assert [circuits.may_try(2.0) for _ in range(2)] == [True, False]
    circuits.close()
    assert all(circuits.may_try(2.0) for _ in range(3))


@given(st.lists(st.tuples(st.sampled_from(SINKS), st.floats(0, 30)), min_size=1, max_size=30))
def test_rests_grow_and_are_kept(failures: list[tuple[str, float]]) -> None:
    """A sink that is away for long is asked every ten seconds, and is said to fail from the third time on."""
    circuits, now, times = Circuits(), 0.0, dict.fromkeys(SINKS, 0)
    rest_until = 0.0
    for sink, later in failures:
        now += later
        if not circuits.may_try(now):
            assert now < rest_until
            continue
        assert now >= rest_until
        assert circuits.may_try(now) == (not any(times.values()))  # the others wait for what becomes of it
        times[sink] += 1
        rest = circuits.failed(sink, now)
        assert abs(rest - RESTS_SECONDS[min(times[sink], len(RESTS_SECONDS)) - 1]) < 1e-6
        rest_until = now + rest
        assert circuits.failing() == sorted(each for each in SINKS if times[each] >= FAILS_AFTER)
    circuits.close()
    assert not circuits.is_open
    assert circuits.failing() == []
