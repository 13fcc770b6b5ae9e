"""A whole installation on this machine: the embedded stack, its tables and topics, and a worker a role."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from sinks.clickhouse import ClickHouse
from streams.settings import Settings
from streams.topics import STAGES, Broker
from tribill.embedded.process import Process, free_port
from tribill.embedded.stack import EmbeddedStack
from tribill.roles import ROLES

_STOP_SECONDS = 15.0


class Installation:
    """Parts, tables, topics and workers, started and stopped together; a context manager.

    Parts whose addresses stand in `settings` are external and not started.  The settings with all
    addresses are in `settings`, and in `tribill.toml` in the directory, for other commands.
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory = directory
        self.settings = settings
        self.workers: dict[str, Process] = {}
        self.worker_ports: dict[str, int] = {}
        self.web: Process | None = None
        self.stack = EmbeddedStack(
            directory,
            kafka=settings.kafka or None,
            clickhouse=settings.clickhouse or None,
            redis=settings.redis or None,
        )

    @property
    def settings_file(self) -> Path:
        """The settings of this installation, for `tribill --config`."""
        return self.directory / "tribill.toml"

    def __enter__(self) -> Self:
        self.stack.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def prepare(self, log_generation: int | None = None) -> None:
        """Brings tables and topics up to date; settles the settings with all addresses."""
        self.settings = replace(
            self.settings,
            kafka=self.stack.kafka,
            clickhouse=self.stack.clickhouse,
            redis=self.stack.redis,
            log_generation=log_generation or self.settings.log_generation,
        )
        self.settings.write(self.settings_file)
        ClickHouse(self.settings).migrate()
        self._broker = Broker(self.settings)
        self._broker.create_topics()

    def start_worker(self, role: str) -> None:
        """Starts a role's worker (again)."""
        port = self.worker_ports.setdefault(role, free_port())
        environment = replace(self.settings, worker_port=port).environment()
        command = [sys.executable, "-m", "tribill", "worker", role]
        self.workers[role] = Process(f"worker-{role}", command, self.directory, environment=environment)

    def start_workers(self, roles: Sequence[str] = tuple(ROLES)) -> None:
        """Starts a worker for each role."""
        for role in roles:
            self.start_worker(role)

    def start_web(self) -> None:
        """Starts the page."""
        command = [sys.executable, "-m", "tribill", "web"]
        self.web = Process("web", command, self.directory, environment=self.settings.environment())

    def ready(self, role: str) -> bool:
        """Whether a role's worker has its partitions."""
        try:
            url = f"http://127.0.0.1:{self.worker_ports[role]}/ready"
            with urllib.request.urlopen(url, timeout=1) as answer:  # our own worker
                return bool(answer.status == 200)
        except OSError:
            return False

    def dead(self) -> dict[str, int]:
        """The roles whose workers have ended by themselves, with their exit codes."""
        return {role: worker.exit_code for role, worker in self.workers.items() if worker.exit_code is not None}

    def behind(self) -> dict[str, int]:
        """How many records each stage has still to do."""
        return {
            role: behind
            for role, topics in STAGES
            if (behind := self._broker.behind(f"tribill-{role}", self._broker.end_offsets(topics(self.settings))))
        }

    def drain(self, seconds: float, say: Callable[[str], None]) -> bool:
        """Waits until every stage has done all that there is; False when the time runs out."""
        deadline, said = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            # A stage that has just finished may have given the next one work: two looks must agree.
            behind = self.behind() or self.behind()
            if not behind:
                return True
            shown = ", ".join(f"{role} {count}" for role, count in behind.items())
            if shown != said:
                say(f"draining: {shown} records to do")
                said = shown
            if self.dead().keys() & behind.keys():
                return False
            time.sleep(0.1)
        return False

    def stop(self) -> None:
        """Stops workers, then parts; no process is left."""
        self.stop_processes()
        self.stack.stop()

    def stop_processes(self) -> None:
        """Stops the workers and the page, side by side."""
        processes = [*self.workers.values(), *([self.web] if self.web else [])]
        for process in processes:
            process.ask_to_end()
        for process in processes:
            process.terminate(_STOP_SECONDS)
        self.workers.clear()
        self.web = None
