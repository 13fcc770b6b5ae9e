"""A run: the book streams, faults come, periods close; then all is undone, drained, closed and judged."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chaos.book import Book, Garbage
from chaos.checker import Checker, Log, Unverified, Verdict
from chaos.faults import CLOSE_STEPS, Fault, Faults, plan
from chaos.planted import Plant
from chaos.speaker import Speaker
from chaos.stack import ROOT, Ended, Stack
from sinks.clickhouse import ClickHouse
from streams.worker import BUG_EXIT, SINK_ERRORS

TICK_SECONDS = 0.05
#: In bursts: a batch costs a worker more than a record does.
BURST_SECONDS = 2
LINES_A_BURST = 40
DRAIN_SECONDS = 400
CLOSES_AT_MOST = 12
_STEPS_OF_A_CLOSE = 2
#: How often workers are asked for their health.
_HEALTH_SECONDS = 10
_PLANTED_FAULTS = 6
#: A worker that ends by itself so often in so many seconds will not do its work: no fault lasts as long.
_ENDS, _ENDS_SECONDS = 8, 120


class Stalled(Exception):
    """Tribill did not do what it had to do, though nothing is broken any more."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run shall do."""

    seed: int
    faults: list[Fault]
    closes: int
    steps_of_a_close: int = _STEPS_OF_A_CLOSE
    gap_seconds: tuple[float, float] = (2.0, 5.0)


def wanted(seed: int, count: int) -> Wanted:
    """A run of so many faults, of which a part are kills of the close at its steps."""
    closes = max(2, min(CLOSES_AT_MOST, count // 10))
    return Wanted(seed, plan(seed, max(0, count - _STEPS_OF_A_CLOSE * closes)), closes)


def wanted_of(seed: int, plant: Plant) -> Wanted:
    """A run of the fault that brings a planted bug out, again and again."""
    at = (plant.role, plant.table, plant.moment, plant.action)
    dice = random.Random(f"planted {seed}")
    faults = [Fault(number, f"for {plant.name}", dice.random(), at) for number in range(1, _PLANTED_FAULTS + 1)]
    return Wanted(seed, faults, closes=1, steps_of_a_close=0)


@dataclass(slots=True)
class Report:
    """What happened and what it came to."""

    happened: Counter[str]
    verdict: Verdict
    #: How often a worker ended by itself: it could not reach something while it started.
    ended: int = 0
    #: How often a worker said that it stands still and was killed for it.
    unhealthy: int = 0


class Run:
    """One run over a started stack."""

    def __init__(self, stack: Stack, wanted: Wanted, say: Callable[[str], None]) -> None:
        self._stack = stack
        self._wanted = wanted
        self._say = say
        self._faults = Faults(stack, say)
        self._book = Book(wanted.seed, wanted.closes)
        self._speaker = Speaker(stack.settings)
        self._ledger = ClickHouse(stack.settings)
        self._lines: Iterator[dict[str, object] | Garbage] = self._book.stream()
        self._next_burst = 0.0
        self._closing = ""
        self._closed = 0
        self._detail = ""
        self._look_at = 0.0
        self._unhealthy = 0
        self._health_at = 0.0
        self._steps: list[tuple[str, str]] = []
        self._ended: list[Ended] = []

    def run(self, until: float = 0) -> Report:
        """Breaks, mends, closes and judges; `until` (monotonic) ends the faults early."""
        for line in self._book.opening():
            self._speaker.say(line)
        self._break(until)
        self._say("no more faults; all is mended")
        self._faults.undo_all()
        self._speaker.wait()
        self._finish()
        verdict = self._judge()
        bugs = (each for each in self._ended if each.code == BUG_EXIT)
        verdict.note("a bug", (f"{each.worker} ended by itself, and said: {each.said[:200]}" for each in bugs))
        return Report(self._faults.happened, verdict, len(self._ended), self._unhealthy)

    # --- while it is broken ---

    def _break(self, until: float) -> None:
        faults = self._wanted.faults
        for fault in faults:
            if until and time.monotonic() > until:
                return
            low, high = self._wanted.gap_seconds
            self._tick_for(low + (high - low) * fault.dice)
            if not self._closing and fault.number * self._wanted.closes > self._closed * len(faults) + len(faults) / 2:
                self._ask_to_close()
            if fault.at is None:
                self._faults.inject(fault)
            else:
                self._until(partial(self._faults.direct, fault), "a worker for a directed fault", str, self._tick)
                self._until(lambda: not self._faults.waits, "a directed fault", str, self._tick)
        self._until(lambda: not self._faults.waits and not self._closing, "the close", lambda: self._detail, self._tick)

    def _tick_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._tick()

    def _tick(self) -> None:
        if time.monotonic() > self._next_burst:
            self._next_burst = time.monotonic() + BURST_SECONDS
            for _ in range(LINES_A_BURST):
                self._speaker.say(next(self._lines))
        self._faults.tick()
        self._look_at_dead()
        self._set_step()
        self._look_at_close()
        time.sleep(TICK_SECONDS)

    def _set_step(self) -> None:
        if self._steps and self._faults.kill_close(*self._steps[0]):
            self._steps.pop(0)

    def _look_at_dead(self) -> None:
        if time.monotonic() > self._health_at:
            self._health_at = time.monotonic() + _HEALTH_SECONDS
            for worker, said in self._stack.kill_unhealthy():
                self._say(f"{worker} is killed, for it says of its health: {said}")
                self._unhealthy += 1
        for each in self._stack.restart_dead():
            self._say(f"{each.worker} ended by itself with exit code {each.code}")
            self._ended.append(each)
            since = each.at - _ENDS_SECONDS
            if sum(other.worker == each.worker and other.at > since for other in self._ended) >= _ENDS:
                raise Stalled(f"{each.worker} ends again and again, and says: {each.said}")

    def _ask_to_close(self) -> None:
        period = self._book.period(self._closed)
        first = (self._wanted.seed + 4 * self._closed) % len(CLOSE_STEPS)
        steps = sorted((first + 7 * each) % len(CLOSE_STEPS) for each in range(self._wanted.steps_of_a_close))
        self._steps = [CLOSE_STEPS[each] for each in steps]
        self._set_step()
        self._say(f"the close of {period} is asked for")
        self._speaker.ask_to_close(period)
        self._closing = period

    def _look_at_close(self) -> None:
        """Once a second: is it closed, and if not, what does it wait for?"""
        if not self._closing or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + 1
        rows = self._ask(
            "SELECT argMax(outcome, at), argMax(detail, at),"
            " (SELECT count() FROM periods WHERE period = {period:String})"
            " FROM close_requests WHERE period = {period:String}",
            {"period": self._closing},
        )
        for outcome, detail, closed in rows:
            if outcome == "refused":
                raise Stalled(f"the close of {self._closing} was refused: {detail}")
            if detail != self._detail:
                self._detail = detail
                self._say(f"the close: {detail[:100] or 'done'}")
            if closed:
                self._say(f"{self._closing} is closed")
                self._closing, self._closed = "", self._closed + 1
                self._steps = []
                self._faults.spare_close()

    def _ask(self, statement: str, parameters: dict[str, str]) -> list[tuple[Any, ...]]:
        """Rows, or none while the ledger is away."""
        try:
            return self._ledger.query(statement, parameters)
        except SINK_ERRORS:
            return []

    # --- when all is mended ---

    def _finish(self) -> None:
        while self._closed < self._wanted.closes:
            self._ask_to_close()
            self._until(lambda: not self._closing, "the close", lambda: self._detail, self._tick)
        self._faults.undo_all()
        self._speaker.wait()
        log = Log(self._stack.settings)
        behind: dict[str, int] = {}

        def all_done() -> bool:
            # A stage that has just finished may have given the next one work: two looks must agree.
            nonlocal behind
            behind = log.behind(self._stack.settings) or log.behind(self._stack.settings)
            return not behind

        self._until(all_done, "the end of the log", lambda: f"{behind} records to do", self._tick_quietly)
        self._until(self._stack.web_answers, "the page", str, self._tick_quietly)

    def _until(self, done: Callable[[], bool], what: str, left: Callable[[], str], tick: Callable[[], None]) -> None:
        deadline, said = time.monotonic() + DRAIN_SECONDS, left()
        while not done():
            if left() != said:
                # Slow is not stalled.
                deadline, said = time.monotonic() + DRAIN_SECONDS, left()
            if time.monotonic() > deadline:
                raise Stalled(f"{what} was not reached in {DRAIN_SECONDS} s, with nothing broken: {left()}")
            tick()

    def _tick_quietly(self) -> None:
        """As a tick, without more of the book."""
        self._look_at_dead()
        time.sleep(0.3)

    def _judge(self) -> Verdict:
        out = self._stack.directory / "out"
        for number in range(self._closed):
            self._write_documents(self._book.period(number), out)
        return Checker(self._stack.settings, self._speaker.said, out).check()

    def _write_documents(self, period: str, out: Path) -> None:
        config = str(self._stack.directory / "tribill.toml")
        command = [sys.executable, "-m", "tribill", "--config", config, "close", period, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
        if done.returncode:
            raise Unverified(f"`tribill close {period} --out` failed: {done.stderr}")
