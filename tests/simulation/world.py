"""Workers, partitions and a clockless scheduler: agents interleaved at every call that they make to the outside.

A seed decides all that happens: which worker goes on, how much it fetches, where its batch stops for a while,
where it is killed (before a call, after it, or with it still on its way), when a sink fails, who gets a partition,
and what a worker that has lost one still does.  The agents are the real ones; the log is in memory as in
`tests/crash_world.py`, the stores are `memory.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from inspect import isgenerator
from operator import attrgetter
from types import SimpleNamespace
from typing import Any
from unittest import mock

from agents.context import Context
from agents.reconcile import Reconcile
from rating import records
from rating.calendar import month_text, parse_month
from sinks.accruals import Accruals
from sinks.clickhouse import LedgerUnavailable
from sinks.dead_letters import DeadLetters
from streams.batch import Batch, NotYet
from streams.codec import Codec
from streams.settings import Settings
from streams.topics import PERIOD_EVENTS, STAGES
from tests.crash_world import AGENTS, UNREAD, CrashNow, Fuse, MemoryLog, MemoryOutbox
from tests.simulation.book import SUPPLIERS
from tests.simulation.memory import MemorySinks
from tests.simulation.task import Task
from tribill.interchange import Publisher

Place = tuple[str, int]
Line = dict[str, Any]

#: Where an agent makes a store of its own, and which of `MemorySinks` it gets.
_STORES = {
    "agents.charges.Accruals": "accruals",
    "agents.funding.Accruals": "accruals",
    "agents.reconcile.Accruals": "accruals",
    "agents.drift.Accruals": "accruals",
    "agents.period_close.Documents": "documents",
    "agents.period_close.EvidenceStore": "documents",
    "agents.period_close.PartyStore": "parties",
    "agents.deriving.Documents": "documents",
    "agents.deriving.PartyStore": "parties",
    "agents.explaining.Documents": "documents",
    "agents.explaining.EvidenceStore": "documents",
}
#: What `sinks.accruals` makes of several calls, between any two of which something may happen.
_COMPOSED = {"begin", "announce", "holds"}
_WORKERS = 2
#: For one thing to come about.
_STEPS_IN_DANGER, _MOST_STEPS = 300, 5_000


@contextmanager
def memory_stores() -> Iterator[None]:
    """Agents that are made meanwhile find their stores in their context."""
    with ExitStack() as stack:
        for where, name in _STORES.items():
            stack.enter_context(mock.patch(where, attrgetter(name)))
        for name in ("read_contract_change", "read_reference_change"):
            stack.enter_context(mock.patch(f"agents.charges.{name}", once(getattr(records, name))))
        stack.enter_context(mock.patch("agents.period_close.Broker", lambda settings: settings))
        # A look at all objects for each of so many small closes.
        stack.enter_context(mock.patch("agents.period_close.gc", SimpleNamespace(collect=int)))
        for module in ("deriving", "period_close"):
            stack.enter_context(mock.patch(f"agents.{module}.ThreadPoolExecutor", AtOnce))
        yield


def once(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Reads the same value (not an equal one) once: the ledger in memory tells the same changes again and again."""
    known: dict[int, tuple[Any, Any]] = {}

    def reader(value: Any) -> Any:
        if id(value) not in known:
            known[id(value)] = value, read(value)
        return known[id(value)][1]

    return reader


class AtOnce(nullcontext[Any]):
    """As an executor whose threads are always first: a seed decides all."""

    def __init__(self, _threads: int) -> None:
        super().__init__(self)

    def submit(self, action: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(action(*arguments))
        return done


@dataclass(frozen=True)
class Dangers:
    """How often what happens, of a call (first line) or of a step; all 0: nothing but work."""

    pause: float = 0.06
    die: float = 0.006
    arrive_late: float = 0.004
    fail: float = 0.006
    reassign: float = 0.12
    crash: float = 0.03
    zombie: float = 0.1
    land: float = 0.1
    flush_redis: float = 0.02
    reconcile: float = 0.01
    idle: float = 0.02
    #: Of each batch of charges.
    clock_ahead: float = 0.03

    @classmethod
    def drawn(cls, source: random.Random) -> Dangers:
        """Each left out, as usual, or often: histories of one kind of trouble reach what a mixture seldom does."""
        return cls(**{each.name: each.default * source.choice((0, 1, 1, 4)) for each in fields(cls)})


CALM = Dangers(*[0.0] * 12)


class Door:
    """A store as a worker reaches it: every call may be its last."""

    def __init__(self, worker: Worker, name: str, store: Any) -> None:
        self._worker, self._name, self._store = worker, name, store

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method in _COMPOSED:
            return partial(getattr(Accruals, method), self)
        action = getattr(self._store, method)

        def call(*arguments: Any, **options: Any) -> Any:
            ready = [list(each) if isgenerator(each) else each for each in arguments]
            return self._worker.call(f"{self._name}.{method}", lambda: action(*ready, **options))

        return call


class SimulatedOutbox:
    """What a worker sends: into the log at once, or one by one when it is flushed."""

    def __init__(self, worker: Worker, log: MemoryLog) -> None:
        self._worker, self._log = worker, log
        self._waiting: list[tuple[str, bytes | None, Any, int]] = []
        self.eager = True

    def send(self, topic: str, value: bytes | None, *, key: Any = None, partition: int = -1, **_: Any) -> None:
        """As `streams.producer.Outbox.send`."""
        if topic not in UNREAD:
            self._waiting.append((topic, value, key, partition))
            if self.eager:
                self._deliver()

    def flush(self) -> None:
        """As `streams.producer.Outbox.flush`."""
        self._deliver()
        self._worker.call("acknowledged", lambda: None)

    def _deliver(self) -> None:
        waiting, self._waiting = self._waiting, []
        for record in waiting:
            self._worker.call(f"send {record[0]}", lambda record=record: self._log.append(*record))


class SimulatedContext(Context):
    """A worker's context over the stores in memory."""

    def __init__(self, worker: Worker) -> None:
        world = worker.world
        self.settings, self.codec = world.settings, world.codec
        self.outbox = SimulatedOutbox(worker, world.log)  # type: ignore[assignment]
        self.ledger = Door(worker, "ledger", world.sinks.ledger)  # type: ignore[assignment]
        self._claims = Door(worker, "redis", world.sinks.claims)
        self.clickhouse = _Clickhouse(worker, world.sinks)  # type: ignore[assignment]
        letters = DeadLetters(
            worker.role,
            1,
            Door(worker, "clickhouse", world.sinks),
            self.outbox,
            self.codec,  # type: ignore[arg-type]
        )
        self.dead_letters = letters

    def claims(self) -> Any:
        return self._claims


class _Clickhouse:
    """What agents hand to the stores that they make."""

    def __init__(self, worker: Worker, sinks: Any) -> None:
        self.accruals = Door(worker, "accruals", sinks.accruals)
        self.documents = Door(worker, "documents", sinks.documents)
        self.parties = Door(worker, "parties", sinks.parties)
        self.query = sinks.query


class Worker:
    """A process of a role: its agent with all that it remembers, where it reads on, and the batch in hand."""

    def __init__(self, world: World, role: str, number: int) -> None:
        self.world, self.role, self.number = world, role, number
        self.agent: Any = None
        #: The partitions that it holds.
        self.places: list[Place] = []
        self.at: dict[Place, int] = {}
        self.again: Batch | None = None
        self.batch: Batch | None = None
        self.task: Task | None = None
        #: How much must have been done before it tries again what it had to wait for.
        self.rests = 0
        #: What it may still do of each partition that it has lost.
        self.lost: dict[Place, int] = {}

    def __str__(self) -> str:
        return f"{self.role}-{self.number}"

    def call(self, name: str, action: Callable[[], Any]) -> Any:
        """A call to the outside, and what becomes of it."""
        world, dangers, chance = self.world, self.world.dangers, self.world.random.random()
        if self.task is None or dangers is CALM:
            return action()
        if chance < dangers.pause:
            world.tell(f"{self} stops before {name}")
            self.task.pause()
            return action()
        chance -= dangers.pause
        if chance < dangers.die:
            if done := world.random.random() < 0.5:
                action()
            raise CrashNow(f"{'after' if done else 'before'} {name}")
        chance -= dangers.die
        if chance < dangers.arrive_late:
            if not name.startswith("redis"):
                world.late.append((f"{name} of {self}", action))
            raise CrashNow(f"with {name} still on its way")
        chance -= dangers.arrive_late
        if chance < dangers.fail:
            if done := world.random.random() < 0.5:
                action()
            raise LedgerUnavailable(f"{name} {'was made' if done else 'was not made'} and failed")
        return action()

    def start(self, batch: Batch) -> None:
        """Takes a batch in hand and goes on until it stops, fails or is done."""
        agent = self._ready(self.world.dangers.clock_ahead)
        self.batch, self.again = batch, None
        self.task = Task(lambda: agent.do(batch))
        self.go_on()

    def idle(self) -> None:
        """Does what is due by the clock, also of partitions that it has lost."""
        agent, committed = self._ready(1 / 2), self.world.committed
        places = {place: committed.get((self.role, place), 0) for place in [*self.places, *self.lost]}
        self.task = Task(lambda: agent.idle(places))
        self.go_on()

    def _ready(self, clock_ahead: float) -> Any:
        if self.agent is None:
            self.agent = AGENTS[self.role](SimulatedContext(self))
            if self.role == "period-close":
                self.agent._broker = LogBroker(self.world)
        self.agent._context.settings = self.world.settings_of(self, clock_ahead)
        self.agent._context.outbox.eager = self.world.random.random() < 0.5
        return self.agent

    def go_on(self) -> None:
        """The batch in hand goes on."""
        assert self.task is not None
        if not self.task.go_on():
            return
        error, batch = self.task.error, self.batch
        self.task = self.batch = None
        if error is None:
            if batch is not None:
                self.world.commit(self, batch)
        elif isinstance(error, (LedgerUnavailable, NotYet)):
            self.world.tell(f"{self}: {type(error).__name__} {error}")
            self.again = batch
            if isinstance(error, NotYet):
                self.rests = self.world.done + self.world.random.choice((1, 2, 4, 8))
        elif isinstance(error, CrashNow):
            self.world.tell(f"{self} is killed {error}")
            self.forget()
        else:
            raise error

    def crash(self) -> None:
        """kill -9."""
        if self.task is not None:
            self.task.kill()
            self.task = None
        self.forget()

    def forget(self) -> None:
        """Another process takes its place: it reads on where its group has committed."""
        self.agent = self.again = self.batch = None
        self.lost.clear()
        self.at = {place: self.world.committed.get((self.role, place), 0) for place in self.places}


class LogBroker:
    """What the close asks of the broker."""

    def __init__(self, world: World) -> None:
        self._world = world

    def end_offsets(self, topics: Iterable[str]) -> dict[Place, int]:
        """As `streams.topics.Broker.end_offsets`."""
        wanted = set(topics)
        return {place: len(records) for place, records in self._world.log.records.items() if place[0] in wanted}

    def behind(self, group: str, ends: Mapping[Place, int]) -> int:
        """As `streams.topics.Broker.behind`."""
        role = group.removeprefix("tribill-")
        return sum(max(0, end - self._world.committed.get((role, place), 0)) for place, end in ends.items())


@dataclass
class World:
    """An installation, and the scheduler that plays a book on it."""

    book: Sequence[Line]
    seed: int
    dangers: Dangers | None = None
    sinks: Any = field(default_factory=MemorySinks)

    def __post_init__(self) -> None:
        closes = [line["close"] for line in self.book if "close" in line]
        self.horizon = parse_month(max(closes)) + 1
        self.settings = Settings(
            kafka="127.0.0.1:1",
            clickhouse="http://127.0.0.1:1",
            redis="redis://127.0.0.1:1",
            partitions=2,
            supplier_topics=",".join(SUPPLIERS),
            horizon_month=month_text(self.horizon),
            close_any_period=True,
        )
        self.random = random.Random(f"history {self.seed}")
        self.dangers = self.dangers or Dangers.drawn(self.random)
        self.codec = Codec(self.settings)
        self.log = MemoryLog(self.settings)
        self.committed: dict[tuple[str, Place], int] = {}
        self.late: list[tuple[str, Callable[[], Any]]] = []
        self.told: list[str] = []
        #: How many batches were done.
        self.done = 0
        self.workers = [Worker(self, role, number) for role in AGENTS for number in range(_WORKERS)]
        self.reconciler = Worker(self, "reconcile", 0)
        self.owners: dict[tuple[str, Place], Worker] = {}
        for worker in self.workers:
            for place in self._read_by(worker.role):
                if self.owners.setdefault((worker.role, place), worker) is worker:
                    worker.places.append(place)
        for worker in self.workers:
            worker.forget()

    def tell(self, text: str) -> None:
        """What happened, for whoever has to find out why."""
        self.told.append(text)

    def settings_of(self, worker: Worker, clock_ahead: float) -> Settings:
        """Those of all, unless charges take today, this time, for a day of a later month."""
        if worker.role != "charges" or self.random.random() >= clock_ahead:
            return self.settings
        self.tell(f"the clock of {worker} is ahead")
        return replace(self.settings, horizon_month=month_text(self.horizon + self.random.choice((1, 2))))

    def _read_by(self, role: str) -> list[Place]:
        topics = dict(STAGES)[role](self.settings)
        return [place for place in self.log.records if place[0] in topics]

    def commit(self, worker: Worker, batch: Batch) -> None:
        """A batch is done; the broker takes the offset of whoever holds the partition, and never goes back."""
        place, end = (batch.topic, batch.partition), batch.end_offset
        held = self.owners[worker.role, place] is worker
        if held and end > self.committed.get((worker.role, place), 0):
            self.committed[worker.role, place] = end
        if place in worker.lost:
            worker.lost[place] = end
        worker.at[place] = max(worker.at.get(place, 0), end)
        self.done += 1
        self.tell(f"{worker} has done {place[0]}/{place[1]} to {end}{'' if held else ', which is not its own'}")

    # --- playing a book ---

    def play(self) -> None:
        """The whole book with all that goes wrong; at the end everything is done that there is to do."""
        with memory_stores(), mock.patch("secrets.randbits", self.random.getrandbits):
            try:
                self._publish_all()
                self._settle()
            finally:
                for worker in [*self.workers, self.reconciler]:
                    if worker.task is not None:
                        worker.task.kill()

    def reconcile(self) -> int:
        """How many months of lines reconciliation finds to differ."""
        with memory_stores():
            return Reconcile(SimulatedContext(Worker(self, "reconcile", 1))).reconcile()

    def _publish_all(self) -> None:
        outbox = MemoryOutbox(self.log, Fuse())
        with (
            mock.patch("tribill.interchange.Outbox", lambda _: outbox),  # noqa: PT008 (a Mock costs a millisecond)
            mock.patch("tribill.interchange.ClickHouse", lambda _: None),  # noqa: PT008
        ):
            publisher = Publisher(self.settings)
        for line in self.book:
            if "close" in line:
                self._close(parse_month(line["close"]))
                continue
            publisher.send_record(line["topic"], line["value"])
            while self.random.random() < 0.4 and self.step():
                pass

    def _close(self, period: int) -> None:
        """Asks for a close; what follows in the book is said after the cut, while the close may be at work."""
        request = self.codec.encode("CloseRequested", {"period": month_text(period)})
        self.log.append(PERIOD_EVENTS, request, month_text(period), 0)
        self._until(lambda: self.sinks.documents.cut(period) is not None)
        if self.random.random() < 0.5:
            return
        self._until(lambda: period in self.sinks.documents.closed())

    def _until(self, holds: Callable[[], bool]) -> None:
        for number in range(_MOST_STEPS):
            if holds():
                return
            if number == _STEPS_IN_DANGER:
                self.dangers = CALM  # where all die all the time nothing is ever done
            self.step()
        raise AssertionError(f"after {_MOST_STEPS} steps it still waits")

    def _settle(self) -> None:
        """Nothing goes wrong any more, and all that was under way arrives."""
        self._until(lambda: not self._waiting())
        self.dangers = CALM
        for what, land in self.late:
            self.tell(f"late: {what}")
            land()
        self.late.clear()
        for worker in [*self.workers, self.reconciler]:
            while worker.task is not None:
                worker.go_on()
            worker.lost.clear()
        self._until(lambda: not self._waiting())

    def _waiting(self) -> bool:
        return any(self.waits(role, place) for role, place in self.owners)

    def waits(self, role: str, place: Place) -> int:
        """How many records a role has to do of a partition."""
        return self.log.end(place) - self.committed.get((role, place), 0)

    # --- one step ---

    def step(self) -> bool:
        """One thing happens; False when there is nothing to do."""
        chance = self.random.random()
        for name in ("reassign", "crash", "zombie", "land", "flush_redis", "reconcile", "idle"):
            chance -= getattr(self.dangers, name)
            if chance < 0:
                return bool(getattr(self, f"_{name}")()) or self._work()
        return self._work()

    def _work(self) -> bool:
        able = [worker for worker in self.workers if worker.task is not None or self._next(worker)]
        if self.reconciler.task is not None:
            able.append(self.reconciler)
        if not able:
            return False
        worker = self.random.choice([each for each in able if each.rests <= self.done] or able)
        if worker.task is not None:
            worker.go_on()
        elif worker.again is not None:
            worker.start(worker.again)
        else:
            self._fetch(worker, self.random.choice(self._next(worker)))
        return True

    def _next(self, worker: Worker) -> list[Place]:
        """The partitions that a worker may fetch from, or repeat a batch of."""
        if worker.again is not None:
            place = (worker.again.topic, worker.again.partition)
            if self.owners[worker.role, place] is worker:
                return [place]
            worker.again = None
        at, records = worker.at, self.log.records
        return [place for place in worker.places if at.get(place, 0) < len(records[place])]

    def _fetch(self, worker: Worker, place: Place) -> None:
        size = self.random.choice((1, 2, 3, 5, 1000, 1000))
        first = worker.at.get(place, 0)
        worker.start(Batch(*place, self.log.records[place][first : first + size]))

    def _reassign(self) -> bool:
        """A group that has work to do shares its partitions anew; about half of them move."""
        among = self.random.choice([role for role, place in self.owners if self.waits(role, place)] or list(AGENTS))
        for (role, place), old in self.owners.items():
            if role != among or self.random.random() < 0.5:
                continue
            new = self.random.choice([each for each in self.workers if each.role == role and each is not old])
            old.lost[place] = old.at.get(place, 0)
            self.owners[role, place] = new
            old.places.remove(place)
            new.places.append(place)
            new.lost.pop(place, None)
            new.at[place] = self.committed.get((role, place), 0)
            self.tell(f"{place[0]}/{place[1]} goes from {old} to {new}")
        return True

    def _crash(self) -> bool:
        worker = self.random.choice(self.workers)
        self.tell(f"{worker} is killed")
        worker.crash()
        return True

    def _zombie(self) -> bool:
        """A worker that has lost a partition goes on with what it had fetched."""
        able = [
            (worker, place)
            for worker in self.workers
            if worker.task is None
            for place, at in worker.lost.items()
            if at < self.log.end(place)
        ]
        if not able:
            return False
        worker, place = self.random.choice(able)
        first = worker.lost[place]
        size = self.random.choice((1, 2, 1000))
        self.tell(f"{worker} goes on with {place[0]}/{place[1]} from {first}, which it has lost")
        worker.start(Batch(*place, self.log.records[place][first : first + size]))
        return True

    def _land(self) -> bool:
        if not self.late:
            return False
        what, land = self.late.pop(self.random.randrange(len(self.late)))
        self.tell(f"late: {what}")
        land()
        return True

    def _flush_redis(self) -> bool:
        self.tell("Redis is emptied")
        self.sinks.claims.flush()
        return True

    def _idle(self) -> bool:
        """Charges that have nothing in hand look whether the month has changed."""
        able = [each for each in self.workers if each.role == "charges" and each.task is None and each.again is None]
        if able:
            worker = self.random.choice(able)
            self.tell(f"{worker} has nothing to do")
            worker.idle()
        return bool(able)

    def _reconcile(self) -> bool:
        worker = self.reconciler
        if worker.task is None:
            self.tell("reconciliation begins")
            worker.task = Task(Reconcile(SimulatedContext(worker)).reconcile)
        worker.go_on()
        return True
