"""Work that can be stopped at any of its calls and go on later: a thread that runs only while it is asked to."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Thread

from tests.crash_world import CrashNow


class Task:
    """Runs `work` until it ends, fails or pauses; one at a time, so that a seed decides all."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.ended = False
        self.error: BaseException | None = None
        self._work = work
        self._killed = False
        self._go, self._back = Lock(), Lock()
        self._go.acquire()
        self._back.acquire()
        Thread(target=self._run, daemon=True).start()

    def go_on(self) -> bool:
        """Lets it run until it pauses or ends; returns whether it has ended."""
        self._go.release()
        self._back.acquire()
        return self.ended

    def pause(self) -> None:
        """Called by the work itself: returns when it shall go on."""
        self._back.release()
        self._go.acquire()
        if self._killed:
            raise CrashNow

    def kill(self) -> None:
        """It dies where it stands."""
        self._killed = True
        while not self.go_on():
            pass

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._killed:
                self._work()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._back.release()
