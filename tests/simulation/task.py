"""Work that can be stopped at any of its calls and go on later: a greenlet, which runs only while it is asked to."""

from __future__ import annotations

from collections.abc import Callable

from greenlet import getcurrent, greenlet

from tests.crash_world import CrashNow


class Task:
    """Runs `work` until it ends, fails or pauses."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._work = work
        self._asks = getcurrent()
        self._runs = greenlet(self._run)

    @property
    def ended(self) -> bool:
        """Whether it has come to its end."""
        return bool(self._runs.dead)

    def go_on(self) -> bool:
        """Lets it run until it pauses or ends; returns whether it has ended."""
        self._asks = self._runs.parent = getcurrent()
        self._runs.switch()
        return self.ended

    def pause(self) -> None:
        """Called by the work itself: returns when it shall go on."""
        self._asks.switch()

    def kill(self) -> None:
        """It dies where it stands."""
        while not self.ended:
            self._runs.throw(CrashNow)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
