"""The faults: what is broken, on whom, how it is noticed that it happened, and how it is undone.

A plan is a list of faults from a seed.  A fault says when it has happened (a trap waits for the insert
that it belongs to) and what is to be undone later; both are looked after by `Faults.tick`.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import redis

from chaos.proxy import AFTER, BEFORE, HALF, MOMENTS, Trap
from chaos.stack import MOST_WORKERS, SESSION_SECONDS, Stack, Worker, clocks_can_jump

#: What each role inserts; a fault at an insert waits for one of them.
INSERTS = {
    "intake": ("dead_letters",),
    "usage": ("usage",),
    "contracts": ("contract_changes",),
    "reference": ("reference_changes",),
    "charges": ("accruals", "accrual_positions"),
    "funding": ("allocations_drawn",),
    "period-close": ("close_requests",),
}
#: Roles with much to do: faults at an insert, and pauses, mostly hit these.
BUSY = ("usage", "charges", "funding", "contracts", "reference")
CLOSE_STEPS = [(table, moment) for table in ("cuts", "document_rows", "documents", "periods") for moment in MOMENTS]
CLOSE_STEPS += [("close_requests", BEFORE), ("close_requests", AFTER)]
TRAP_SECONDS = 12
#: After the insert, and before a planted bug's window closes (chaos/planted.py).
SOON_SECONDS = 0.5
#: A disk of this size is full.
_FULL_BYTES = 64

#: Every kind of fault with how often it stands in a round of the plan.
KINDS = {
    "kill a worker": 2,
    "kill at an insert": 4,
    "cut at an insert": 2,
    "pause a worker": 1,
    "pause at an insert": 3,
    "add a worker": 1,
    "remove a worker": 1,
    "jump a worker's clock": 1,
    "kill the ledger": 1,
    "fill the ledger's disk": 1,
    "fail all inserts": 1,
    "kill a broker": 1,
    "kill the page": 1,
    "kill Redis": 1,
    "flush Redis": 1,
}
#: Once Redis was emptied the ledger decides what is new, so claims are tried first without that.
_LATER = ("kill Redis", "flush Redis")
CLOSE_KIND = "kill the close at a step"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a plan; `dice` makes every further choice."""

    number: int
    kind: str
    dice: float
    #: A certain role, table, moment and action (chaos/planted.py); else the dice choose.
    at: tuple[str, str, str, str] | None = None


def plan(seed: int, count: int) -> list[Fault]:
    """So many faults: every kind comes before any comes again as often."""
    dice = random.Random(f"faults {seed}")
    kinds = {kind: often for kind, often in KINDS.items() if clocks_can_jump() or "clock" not in kind}
    found: list[str] = []
    while len(found) < count:
        drawn = [kind for kind, often in kinds.items() for _ in range(often)]
        dice.shuffle(drawn)
        found += drawn
    found = found[:count]
    if count < 2 * sum(kinds.values()):
        found.sort(key=lambda kind: kind in _LATER)
    else:
        found[: count // 4] = sorted(found[: count // 4], key=lambda kind: kind in _LATER)
    return [Fault(number, kind, dice.random()) for number, kind in enumerate(found, 1)]


@dataclass(slots=True)
class _Waiting:
    """A trap that has been set, and when it is given up."""

    what: str
    kind: str
    trap: Trap
    worker: Worker
    deadline: float


class Faults:
    """Injects faults into a stack and undoes them; `survived` counts by kind what has happened."""

    def __init__(self, stack: Stack, say: Callable[[str], None]) -> None:
        self._stack = stack
        self._say = say
        self._undo: list[tuple[float, str, Callable[[], None]]] = []
        self._waiting: list[_Waiting] = []
        self.happened: Counter[str] = Counter()

    @property
    def waits(self) -> bool:
        """Whether a trap has been set that nothing has sprung; those of the close apart."""
        return any(waiting.kind != CLOSE_KIND for waiting in self._waiting)

    def tick(self) -> None:
        """Undoes what is due; looks after the traps."""
        now = time.monotonic()
        for due in [each for each in self._undo if each[0] <= now]:
            self._undo.remove(due)
            due[2]()
            self._say(due[1])
        for waiting in list(self._waiting):
            if waiting.trap.sprung.is_set():
                self._waiting.remove(waiting)
                self._done(waiting.kind, waiting.what)
            elif now > waiting.deadline:
                # Nothing came that way.
                self._waiting.remove(waiting)
                waiting.worker.door.trap = None
                self._say(f"not met: {waiting.what}")

    def undo_all(self) -> None:
        """Nothing stays broken."""
        for waiting in self._waiting:
            waiting.worker.door.trap = None
        self._waiting.clear()
        while self._undo:
            _, what, undo = self._undo.pop(0)
            undo()
            self._say(what)

    def inject(self, fault: Fault) -> None:
        """Does a fault, or sets its trap."""
        if fault.at is not None:
            self._set(fault, *fault.at)
            return
        getattr(self, "_" + fault.kind.replace(" ", "_").replace("'s", ""))(fault)

    def kill_close(self, table: str, moment: str) -> bool:
        """The worker of the close dies at this insert.  False when it is not there now."""
        workers = [each for each in self._stack.of("period-close") if each.alive and each.door.trap is None]
        if workers:
            self._trap(workers[0], table, moment, "kill", CLOSE_KIND, float("inf"))
        return bool(workers)

    def spare_close(self) -> None:
        """The close is done: what was to happen to it has not."""
        for waiting in self._waiting:
            if waiting.kind == CLOSE_KIND:
                waiting.deadline = 0

    def _done(self, kind: str, what: str) -> None:
        self.happened[kind] += 1
        self._say(f"fault {self.happened.total()}: {what}")

    def _later(self, seconds: float, what: str, undo: Callable[[], None]) -> None:
        self._undo.append((time.monotonic() + seconds, what, undo))

    # --- workers ---

    def _one(self, fault: Fault, roles: tuple[str, ...] = ()) -> Worker | None:
        fit = [each for each in self._stack.workers if each.alive and (not roles or each.role in roles)]
        return fit[int(fault.dice * len(fit))] if fit else None

    def _kill_a_worker(self, fault: Fault) -> None:
        if worker := self._one(fault):
            worker.signal(signal.SIGKILL)
            self._done(fault.kind, f"kill -9 of {worker.name}")

    def _kill_at_an_insert(self, fault: Fault) -> None:
        self._at_an_insert(fault, "kill")

    def _cut_at_an_insert(self, fault: Fault) -> None:
        self._at_an_insert(fault, "cut")

    def _pause_at_an_insert(self, fault: Fault) -> None:
        self._at_an_insert(fault, "pause")

    def _at_an_insert(self, fault: Fault, action: str) -> None:
        steps = [(role, table, moment) for role in BUSY for table in INSERTS[role] for moment in (BEFORE, HALF, AFTER)]
        self._set(fault, *steps[int(fault.dice * len(steps))], action)

    def _set(self, fault: Fault, role: str, table: str, moment: str, action: str) -> None:
        """A trap for one of the role's workers."""
        free = [each for each in self._stack.of(role) if each.alive and each.door.trap is None]
        if free:
            self._trap(free[int(fault.dice * 997) % len(free)], table, moment, action, fault.kind)

    def _trap(
        self, worker: Worker, table: str, moment: str, action: str, kind: str, seconds: float = TRAP_SECONDS
    ) -> None:
        process = worker.process
        hold = None if action in ("kill", "cut") else threading.Event()

        def spring() -> None:
            if worker.process is not process:
                return
            if action == "kill":
                worker.signal(signal.SIGKILL)
            elif action == "pause":
                worker.pause()
            elif hold is not None:
                hold.set()
                threading.Timer(SOON_SECONDS, worker.signal, (signal.SIGKILL,)).start()

        what = {"kill": "kill -9 of", "cut": "connection cut of", "pause": "SIGSTOP of", "kill soon": "soon kill -9 of"}
        trap = Trap(table, moment, spring, hold)
        worker.door.trap = trap
        shown = f"{what[action]} {worker.name} {moment} its insert into {table}"
        self._waiting.append(_Waiting(shown, kind, trap, worker, time.monotonic() + seconds))
        if hold is not None and action == "pause":
            self._replace_paused(worker, hold, trap.sprung)

    def _replace_paused(self, worker: Worker, hold: threading.Event, sprung: threading.Event) -> None:
        def come_back() -> None:
            hold.set()
            worker.resume()

        def when_sprung() -> None:
            if sprung.is_set():
                self._replacement(worker)
                self._later(SESSION_SECONDS + 4, f"{worker.name} comes back as a zombie", come_back)
            elif worker.door.trap is not None:
                self._later(0.2, "", when_sprung)
            else:
                hold.set()

        self._later(0.2, "", when_sprung)

    def _replacement(self, worker: Worker) -> None:
        """A role whose only worker is paused is given another, for good measure."""
        if len(self._stack.of(worker.role)) == 1:
            other = self._stack.add_worker(worker.role)
            self._stack.start_worker(other)
            self._later(SESSION_SECONDS + 20, f"{other.name} is taken away", lambda: self._remove(other))

    def _remove(self, worker: Worker) -> None:
        if worker in self._stack.workers:
            self._stack.remove_worker(worker)

    def _pause_a_worker(self, fault: Fault) -> None:
        if worker := self._one(fault, BUSY):
            worker.pause()
            self._replacement(worker)
            self._later(SESSION_SECONDS + 4, f"{worker.name} comes back as a zombie", worker.resume)
            self._done(fault.kind, f"SIGSTOP of {worker.name}")

    def _add_a_worker(self, fault: Fault) -> None:
        roles = [role for role in INSERTS if role != "period-close" and len(self._stack.of(role)) < MOST_WORKERS]
        role = roles[int(fault.dice * len(roles))]
        worker = self._stack.add_worker(role)
        self._stack.start_worker(worker)
        self._later(25, f"{worker.name} is taken away", lambda: self._remove(worker))
        self._done(fault.kind, f"another worker {worker.name}")

    def _remove_a_worker(self, fault: Fault) -> None:
        if worker := self._one(fault, BUSY):
            self._stack.remove_worker(worker)
            self._done(fault.kind, f"SIGTERM of {worker.name}")
            if not self._stack.of(worker.role):
                self._stack.start_worker(self._stack.add_worker(worker.role))

    def _jump_a_worker_clock(self, fault: Fault) -> None:
        if worker := self._one(fault):
            offset = ("+3h", "-3h", "+40d", "-40d", "+400d")[int(fault.dice * 997) % 5]
            worker.jump(offset)
            self._later(8, f"the clock of {worker.name} is right again", lambda: worker.jump("+0"))
            self._done(fault.kind, f"the clock of {worker.name} jumps by {offset}")

    # --- what they stand on ---

    def _kill_the_ledger(self, fault: Fault) -> None:
        self._stack.parts.kill("clickhouse")
        self._later(fault.dice * 4, "the ledger's endpoint is back", lambda: self._stack.parts.restart("clickhouse"))
        self._done(fault.kind, "kill -9 of the ledger's endpoint")

    def _fill_the_ledger_disk(self, fault: Fault) -> None:
        self._stack.limit_ledger_files(_FULL_BYTES)
        self._later(2 + fault.dice * 4, "the ledger's disk has room", lambda: self._stack.limit_ledger_files(-1))
        self._done(fault.kind, "the ledger's disk is full")

    def _fail_all_inserts(self, fault: Fault) -> None:
        moment = MOMENTS[int(fault.dice * 997) % 3]

        def fail(how: str | None) -> None:
            for worker in self._stack.workers:
                worker.door.failing = how

        fail(moment)
        self._later(2 + fault.dice * 4, "inserts work again", lambda: fail(None))
        self._done(fault.kind, f"every insert is cut {moment} it")

    def _kill_a_broker(self, fault: Fault) -> None:
        brokers = self._stack.brokers
        node = int(fault.dice * len(brokers.ports))
        brokers.kill(node)

        def restart() -> None:
            brokers.start(node)

        self._later(2 + fault.dice * 3, f"broker {node} is started again", restart)
        self._done(fault.kind, f"kill -9 of broker {node}")

    def _kill_the_page(self, fault: Fault) -> None:
        if self._stack.web is not None:
            self._stack.web.kill()
        self._later(1, "the page is started again", self._stack.start_web)
        self._done(fault.kind, "kill -9 of the page")

    def _kill_Redis(self, fault: Fault) -> None:
        if "redis" in {part.name for part in self._stack.parts.parts if part.pid}:
            self._stack.parts.kill("redis")
            self._later(fault.dice * 6, "Redis is back, and empty", lambda: self._stack.parts.restart("redis"))
            self._done(fault.kind, "kill -9 of Redis")

    def _flush_Redis(self, fault: Fault) -> None:
        with suppress(redis.RedisError), redis.Redis.from_url(self._stack.settings.redis) as client:
            client.flushall()
            self._done(fault.kind, "FLUSHALL of Redis")
