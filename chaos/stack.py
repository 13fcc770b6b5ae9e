"""The installation that is broken: Kafka, Redis and the ledger's endpoint, and one to three workers a role.

Workers that end are started again after a moment, as an orchestrator would.  All processes are children
that the kernel ends with this one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from chaos.planted import NOTHING
from chaos.proxy import Door, Doors
from sinks.clickhouse import ClickHouse
from streams.settings import Settings
from streams.topics import Broker
from tests.kafka.broker import Brokers
from tribill.embedded.process import Process, free_port
from tribill.embedded.stack import EmbeddedStack
from tribill.roles import ROLES

ROOT = Path(__file__).parents[1]
SESSION_SECONDS = 8
START_SECONDS = 240
#: How many workers of a role run from the start; each of the others has one.
WORKERS = {"usage": 2, "charges": 2}
MOST_WORKERS = 3
#: A worker that was asked to end and has not after so long is killed.
LEAVE_SECONDS = 15
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


class NotStarted(Exception):
    """The installation could not be started: nothing can be said of tribill."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker that ended by itself: when (monotonic), and the last that it said."""

    worker: str
    code: int
    at: float
    said: str


@dataclass(eq=False)
class Worker:
    """A worker's place: its ports stay the same over its restarts."""

    role: str
    number: int
    port: int
    door: Door
    clock: Path
    process: Process | None = None
    paused: bool = False
    #: Ended by us, and not yet started again.
    down_until: float = 0

    @property
    def name(self) -> str:
        """`usage.1`."""
        return f"{self.role}.{self.number}"

    @property
    def alive(self) -> bool:
        """Whether it runs and is not paused."""
        return self.process is not None and self.process.exit_code is None and not self.paused

    @property
    def trapped(self) -> bool:
        """Whether a trap waits for it."""
        return self.door.trap is not None and not self.door.trap.taken

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal, unless it has ended."""
        if self.process is not None and self.process.exit_code is None:
            os.kill(self.process.pid, number)

    def pause(self) -> None:
        """SIGSTOP: it keeps its connections and knows nothing of it."""
        self.paused = True
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: here is the zombie."""
        self.signal(signal.SIGCONT)
        self.paused = False

    def jump(self, offset: str) -> None:
        """Sets its wall clock off, `+3d`."""
        self.clock.write_text(offset)


class Stack:
    """Everything, started and stopped together; a context manager."""

    def __init__(self, directory: Path, brokers: int, planted: str = "") -> None:
        self.directory = directory
        self._planted = planted
        self._doors = Doors()
        self.brokers = Brokers(directory, brokers)
        self.parts = EmbeddedStack(directory, kafka=self.brokers.bootstrap)
        self.workers: list[Worker] = []
        self._leaving: list[threading.Thread] = []
        self.web: Process | None = None
        self.settings = Settings(
            kafka=self.brokers.bootstrap,
            clickhouse=self.parts.clickhouse,
            redis=self.parts.redis,
            partitions=3,
            replication=brokers,
            session_timeout_seconds=SESSION_SECONDS,
            supplier_topics="10000,10052",
            # So wide that claims decide what is new, as they do of this month's usage in production.
            claim_window_days=20_000,
            web_port=free_port(),
            specimen=True,
        )

    def __enter__(self) -> Stack:
        try:
            for node in range(len(self.brokers.ports)):
                self.brokers.start(node)
            self.parts.start()
            self.brokers.wait()
            self.settings.write(self.directory / "tribill.toml")
            ClickHouse(self.settings).migrate()
            self._create_topics()
            for role in ROLES:
                for _ in range(WORKERS.get(role, 1)):
                    self.start_worker(self.add_worker(role))
            self.start_web()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every process."""
        for each in self._leaving:
            each.join()
        for worker in self.workers:
            worker.resume()
            worker.signal(signal.SIGKILL)
        for process in [*(each.process for each in self.workers), self.web]:
            if process is not None:
                process.kill()
        self.parts.stop()
        self.brokers.stop()

    # --- workers ---

    def add_worker(self, role: str) -> Worker:
        """A place for another worker of a role."""
        number = 1 + max((each.number for each in self.of(role)), default=0)
        clock = self.directory / f"clock-{role}.{number}"
        clock.write_text("+0")
        upstream = int(self.settings.clickhouse.rpartition(":")[2])
        worker = Worker(role, number, free_port(), self._doors.add(free_port(), upstream), clock)
        self.workers.append(worker)
        return worker

    def start_worker(self, worker: Worker) -> None:
        """Starts a worker (again)."""
        clickhouse = f"http://127.0.0.1:{worker.door.port}"
        settings = replace(self.settings, worker_port=worker.port, clickhouse=clickhouse)
        command = ["-m", "chaos.planted", self._planted or NOTHING]
        environment = settings.environment() | {"PYTHONPATH": str(ROOT)}
        if _FAKETIME.exists():
            environment |= {
                "LD_PRELOAD": str(_FAKETIME),
                "FAKETIME_TIMESTAMP_FILE": str(worker.clock),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        worker.process = Process(
            f"worker-{worker.name}", [sys.executable, *command, "worker", worker.role], self.directory,
            environment=environment,
        )  # fmt: skip
        worker.paused = False

    def remove_worker(self, worker: Worker) -> None:
        """Asks a worker to end, and has it killed if it does not; it does not come back."""
        self.workers.remove(worker)
        worker.resume()
        if worker.process is not None:
            # Nobody waits for it: while one leaves, other things break.
            leaving = threading.Thread(target=worker.process.terminate, args=(LEAVE_SECONDS,))
            leaving.start()
            self._leaving.append(leaving)

    def of(self, role: str) -> list[Worker]:
        """The workers of a role."""
        return [each for each in self.workers if each.role == role]

    def restart_dead(self) -> Iterator[Ended]:
        """Starts again what has ended, a moment later; tells what ended by itself."""
        now = time.monotonic()
        for worker in self.workers:
            if worker.process is None or worker.process.exit_code is None:
                continue
            if not worker.down_until:
                worker.down_until = now + 0.5
                code = worker.process.exit_code
                if code != -signal.SIGKILL:
                    tail = worker.process.log_tail(60)
                    with (self.directory / "deaths.log").open("a") as log:
                        log.write(f"--- {worker.name}, exit code {code}\n{tail}\n")
                    yield Ended(worker.name, code, now, tail.strip().rpartition("\n")[2])
            elif now > worker.down_until:
                worker.down_until = 0
                self.start_worker(worker)

    def kill_unhealthy(self) -> Iterator[tuple[str, str]]:
        """Kills what says that it stands still, as Kubernetes does by its liveness probe; tells its words."""
        for worker in self.workers:
            if worker.process is None or worker.process.exit_code is not None or worker.paused:
                continue
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{worker.port}/health", timeout=1).close()
            except urllib.error.HTTPError as answer:
                yield worker.name, answer.read().decode()
                os.kill(worker.process.pid, signal.SIGUSR1)  # where its threads stand, in its log
                time.sleep(0.5)
                worker.process.kill()
            except OSError:
                continue  # it starts, or is too busy to say

    def ready(self, worker: Worker) -> bool:
        """Whether it says that it holds partitions."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{worker.port}/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while waits := [worker for worker in self.workers if not self.ready(worker)]:
            if time.monotonic() > deadline:
                tails = "\n".join(f"{each.name}: {each.process and each.process.log_tail()}" for each in waits)
                raise NotStarted(f"not ready within {START_SECONDS} s:\n{tails}")
            for _ in self.restart_dead():
                pass
            time.sleep(0.2)

    # --- the rest ---

    def start_web(self) -> None:
        """Starts the page (again)."""
        environment = self.settings.environment()
        self.web = Process("web", [sys.executable, "-m", "tribill", "web"], self.directory, environment=environment)

    def web_answers(self) -> bool:
        """Whether the page can be read."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.settings.web_port}/", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _create_topics(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                Broker(self.settings).create_topics()
                return
            except Exception as error:
                if time.monotonic() > deadline:
                    raise NotStarted(f"the topics could not be created: {error}") from error
                time.sleep(1)


def clocks_can_jump() -> bool:
    """Whether libfaketime is here."""
    return _FAKETIME.exists()
