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

from chaos.proxy import AFTER, BEFORE, FULL, HALF, MOMENTS, Door, Trap
from chaos.stack import MOST_WORKERS, SESSION_SECONDS, Stack, Worker, clocks_can_jump

#: What each role inserts; a fault at an insert waits for one of them.
INSERTS = {
    "intake": ("dead_letters",),
    "usage": ("usage",),
    "contracts": ("contract_changes",),
    "reference": ("reference_changes",),
    "charges": ("charge_epochs", "accruals", "accrual_positions"),
    "funding": ("allocations_drawn",),
    "period-close": ("close_requests",),
}
#: Roles with much to do: faults at an insert, and pauses, mostly hit these.
BUSY = ("usage", "charges", "funding", "contracts", "reference")
#: The writes of a close in their order, each with the moments at which it can die there.
CLOSE_STEPS = [
    (table, moment)
    for table in (
        "close_requests",
        "cuts",
        "close_decisions",
        "adjustments",
        "allocations_wanted",
        "document_rows",
        "statements",
        "evidence",
        "documents",
        "periods",
    )
    for moment in MOMENTS
]
TRAP_SECONDS = 15
DIRECTED_SECONDS = 120
#: After the insert, and before a planted bug's window closes (chaos/planted.py).
SOON_SECONDS = 0.5

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
    "restore Redis": 1,
    "flush Redis": 1,
}
#: Once Redis has lost claims the ledger decides what is new, so claims are tried first without that.
_LATER = ("kill Redis", "restore Redis", "flush Redis")
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
    role: str
    trap: Trap
    deadline: float
    #: Who it was, once it has sprung.
    caught: Worker | None = None


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
                self._done(waiting.kind, waiting.what.format(waiting.caught and waiting.caught.name))
            elif now > waiting.deadline:
                self._waiting.remove(waiting)
                self._give_up(waiting)

    def undo_all(self) -> None:
        """Nothing stays broken."""
        for waiting in self._waiting:
            waiting.trap.taken, waiting.deadline = True, 0
        self._waiting.clear()
        while self._undo:
            _, what, undo = self._undo.pop(0)
            undo()
            self._say(what)

    def inject(self, fault: Fault) -> None:
        """Does a fault, or sets its trap."""
        getattr(self, "_" + fault.kind.replace(" ", "_").replace("'s", ""))(fault)

    def direct(self, fault: Fault) -> bool:
        """Sets the trap of a fault that knows its place.  False when nobody is there now."""
        assert fault.at is not None
        return self._set(fault.kind, *fault.at, seconds=DIRECTED_SECONDS)

    def kill_close(self, table: str, moment: str) -> bool:
        """The worker of the close dies at this insert.  False when it is not there now."""
        return self._set(CLOSE_KIND, "period-close", table, moment, "kill", float("inf"))

    def spare_close(self) -> None:
        """The close is done: what was to happen to it has not."""
        for waiting in self._waiting:
            if waiting.kind == CLOSE_KIND:
                waiting.deadline = 0

    def _give_up(self, waiting: _Waiting) -> None:
        """Nothing came that way: a worker of the role dies all the same."""
        waiting.trap.taken, waiting.deadline = True, 0
        there = [each for each in self._stack.of(waiting.role) if each.alive]
        if waiting.kind == CLOSE_KIND or not there:
            self._say(f"not met: {waiting.what}".format("a worker"))
            return
        there[0].signal(signal.SIGKILL)
        self._done("kill a worker", f"kill -9 of {there[0].name}, which inserts nothing")

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
        self._set(fault.kind, *steps[int(fault.dice * len(steps))], action)

    def _set(self, kind: str, role: str, table: str, moment: str, action: str, seconds: float = TRAP_SECONDS) -> bool:
        """A trap for the first of the role's workers that comes there.  False when none is there now."""
        workers = [each for each in self._stack.of(role) if each.alive and not each.trapped]
        hold = None if action in ("kill", "cut") else threading.Event()

        def spring(door: Door) -> None:
            [worker] = [each for each in workers if each.door is door]
            if not waiting.deadline:
                (hold or threading.Event()).set()  # it was given up meanwhile
                return
            waiting.caught = worker
            if action == "kill":
                worker.signal(signal.SIGKILL)
            elif action == "pause":
                worker.pause()
            elif hold is not None:
                hold.set()
                threading.Timer(SOON_SECONDS, worker.signal, (signal.SIGKILL,)).start()

        what = {"kill": "kill -9 of", "cut": "connection cut of", "pause": "SIGSTOP of", "kill soon": "soon kill -9 of"}
        trap = Trap(table, moment, spring, hold)
        shown = f"{what[action]} {{}} {moment} its insert into {table}"
        waiting = _Waiting(shown, kind, role, trap, time.monotonic() + seconds)
        for worker in workers:
            worker.door.trap = trap
        if workers:
            self._waiting.append(waiting)
        if hold is not None and action == "pause":
            self._when_paused(waiting, hold)
        return bool(workers)

    def _when_paused(self, waiting: _Waiting, hold: threading.Event) -> None:
        """Once the trap has sprung: another takes over, and after the session has ended the zombie returns."""
        worker = waiting.caught
        if worker is None:
            if time.monotonic() < waiting.deadline:
                self._later(0.2, "", lambda: self._when_paused(waiting, hold))
            else:
                hold.set()
            return

        def come_back() -> None:
            hold.set()
            worker.resume()

        self._replacement(worker)
        self._later(SESSION_SECONDS + 4, f"{worker.name} comes back as a zombie", come_back)

    def _replacement(self, worker: Worker) -> None:
        """A role whose only worker is paused is given another, for good measure."""
        if len(self._stack.of(worker.role)) == 1:
            other = self._stack.add_worker(worker.role)
            self._stack.start_worker(other)
            self._later(SESSION_SECONDS + 20, f"{other.name} is taken away", lambda: self._remove(other))

    def _remove(self, worker: Worker) -> None:
        """Takes a worker away that was added, unless it is the last of its role by now."""
        if worker in self._stack.workers and len(self._stack.of(worker.role)) > 1:
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
        # Not by RLIMIT_FSIZE: under it chDB acknowledges what it could not write.
        self._inserts_fail(fault, FULL, "the ledger's disk is full")

    def _fail_all_inserts(self, fault: Fault) -> None:
        moment = MOMENTS[int(fault.dice * 997) % 3]
        self._inserts_fail(fault, moment, f"every insert is cut {moment} it")

    def _inserts_fail(self, fault: Fault, how: str, what: str) -> None:
        def fail(how: str | None) -> None:
            for worker in self._stack.workers:
                worker.door.failing = how

        fail(how)
        self._later(2 + fault.dice * 4, "inserts work again", lambda: fail(None))
        self._done(fault.kind, what)

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
            self._later(fault.dice * 6, "Redis is back", lambda: self._stack.parts.restart("redis"))
            self._done(fault.kind, "kill -9 of Redis")

    def _restore_Redis(self, fault: Fault) -> None:
        """Of its claims it has afterwards those that it had some seconds before."""

        def come_back() -> None:
            self._stack.parts.kill("redis")
            self._stack.parts.restart("redis")
            (self._stack.directory / "dump.rdb").unlink(missing_ok=True)  # whoever kills it next empties it

        with suppress(redis.RedisError), redis.Redis.from_url(self._stack.settings.redis) as client:
            client.save()
            self._later(1 + fault.dice * 6, "Redis is killed and back with older claims", come_back)
            self._done(fault.kind, "Redis saves its claims, to come back with them later")

    def _flush_Redis(self, fault: Fault) -> None:
        with suppress(redis.RedisError), redis.Redis.from_url(self._stack.settings.redis) as client:
            client.flushall()
            self._done(fault.kind, "FLUSHALL of Redis")
