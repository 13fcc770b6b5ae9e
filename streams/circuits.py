"""Which sinks fail, for all lanes of a worker: while one does, nothing is tried but now and then one batch."""

from __future__ import annotations

from dataclasses import dataclass

#: How long a sink is left alone after it has failed once, twice, and so on.
RESTS_SECONDS = (0.1, 0.5, 1, 2, 5, 10)
#: A sink that has failed so often in a row is said to fail; before that it may be a moment's trouble.
FAILS_AFTER = 3


@dataclass(slots=True)
class _Open:
    times: int
    until: float
    #: Whether somebody is trying it just now.
    tried: bool = False


class Circuits:
    """A circuit a sink.  Closed: all lanes work.  Open: all wait.  When its rest is over one lane tries its batch.

    What becomes of that closes the circuit or opens it for longer.  So a sink that comes back meets one batch, not
    all of them, and no lane finds out by itself what another knows.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}

    @property
    def is_open(self) -> bool:
        """Whether a sink has failed and not worked since."""
        return bool(self._open)

    def failing(self) -> list[str]:
        """The sinks that have failed again and again and not worked since."""
        return sorted(sink for sink, circuit in self._open.items() if circuit.times >= FAILS_AFTER)

    def may_try(self, now: float) -> bool:
        """Whether to try a batch; who does must say what became of it: `failed` or `close`."""
        if any(circuit.tried or now < circuit.until for circuit in self._open.values()):
            return False
        for circuit in self._open.values():
            circuit.tried = True
        return True

    def failed(self, sink: str, now: float) -> float:
        """A batch met a sink that does not work.  Returns for how many seconds nothing is to be tried."""
        known = self._open.get(sink)
        if known is None or now >= known.until:  # else another lane, at work since before, has found the same
            times = known.times + 1 if known else 1
            self._open[sink] = known = _Open(times, now + RESTS_SECONDS[min(times, len(RESTS_SECONDS)) - 1])
        for circuit in self._open.values():
            circuit.tried = False
        return known.until - now

    def close(self) -> None:
        """A batch was done, so all sinks work; or there is nobody left who would try."""
        self._open.clear()
