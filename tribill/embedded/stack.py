"""The embedded stack as one object: what tribill needs around it, started and stopped together."""

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import structlog

from tribill.embedded import broker, clickhouse_server, redis_server
from tribill.embedded.process import Process, ProcessFailed, free_port

START_TIMEOUT_SECONDS = 20.0
STOP_TIMEOUT_SECONDS = 10.0
# The parts of a killed stack keep its lock until the kernel has ended them, a few milliseconds later.
LOCK_TIMEOUT_SECONDS = 2.0
_POLL_SECONDS = 0.01

_log = structlog.get_logger(__name__)


class DirectoryInUse(RuntimeError):
    """Another embedded stack runs on this data directory."""


class Part(NamedTuple):
    """One part of the stack. `pid` is None for an external part, or one that is not running."""

    name: str
    address: str
    pid: int | None


_Start = Callable[[int, Path, Sequence[int]], Process]
_IsReady = Callable[[int], bool]

# The slowest first, so that it starts while the others do.
_PARTS: dict[str, tuple[str, _Start, _IsReady]] = {
    "clickhouse": ("http://127.0.0.1:{}", clickhouse_server.start, clickhouse_server.is_ready),
    "redis": ("redis://127.0.0.1:{}/0", redis_server.start, redis_server.is_ready),
    "kafka": ("127.0.0.1:{}", broker.start, broker.is_ready),
}


@dataclass
class _Embedded:
    """A part that this stack starts itself; its port stays the same over restarts."""

    port: int
    start: _Start
    is_ready: _IsReady
    process: Process | None = None


class EmbeddedStack:
    """Log, ledger and claims on 127.0.0.1, as a context manager.

    `directory` is the data directory: `clickhouse/` holds the ledger, `log/` what the parts print. A part
    whose address is given (`kafka` as host:port, `clickhouse` as http://host:port, `redis` as
    redis://host:port/db) is external: it is neither started nor looked at. The log and Redis are empty after
    each start.
    """

    def __init__(
        self,
        directory: Path,
        *,
        kafka: str | None = None,
        clickhouse: str | None = None,
        redis: str | None = None,
    ) -> None:
        self.directory = Path(directory).resolve()
        self._lock: int | None = None
        self._addresses: dict[str, str] = {}
        self._embedded: dict[str, _Embedded] = {}  # in the order of starting

        for name, external in {"clickhouse": clickhouse, "redis": redis, "kafka": kafka}.items():
            if external is not None:
                self._addresses[name] = external
                continue
            taken = {part.port for part in self._embedded.values()}
            port = next(port for port in iter(free_port, None) if port not in taken)
            address, start, is_ready = _PARTS[name]
            self._addresses[name] = address.format(port)
            self._embedded[name] = _Embedded(port, start, is_ready)

    @property
    def kafka(self) -> str:
        """The log's bootstrap address, host:port."""
        return self._addresses["kafka"]

    @property
    def clickhouse(self) -> str:
        """The ledger's URL: `clickhouse_connect.get_client(dsn=stack.clickhouse)`."""
        return self._addresses["clickhouse"]

    @property
    def redis(self) -> str:
        """The claim store's URL: `redis.Redis.from_url(stack.redis)`."""
        return self._addresses["redis"]

    @property
    def parts(self) -> list[Part]:
        """Every part with its address and process id, for the line that is printed of each."""
        pids = {
            name: part.process.pid
            for name, part in self._embedded.items()
            if part.process is not None and part.process.exit_code is None
        }
        return [Part(name, address, pids.get(name)) for name, address in self._addresses.items()]

    @property
    def embedded(self) -> set[str]:
        """The names of the parts that this stack starts itself."""
        return set(self._embedded)

    def start(self) -> Self:
        """Start the missing parts side by side and return when all are ready. Call it in the main thread.

        Raises DirectoryInUse when another stack has the directory, ProcessFailed with the tail of its log
        when a part ends or is not ready within 20 seconds; nothing is left running then.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._acquire_lock()
        try:
            for part in self._embedded.values():
                part.process = part.start(part.port, self.directory, self._inherited)
            for name in self._embedded:
                self._wait_until_ready(name)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop all parts in reverse order and give the directory free. No process is left; idempotent."""
        for part in reversed(self._embedded.values()):
            if part.process is not None:
                part.process.terminate(STOP_TIMEOUT_SECONDS)
                part.process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def kill(self, name: str) -> None:
        """End an embedded part by SIGKILL, as a crash would. Raises KeyError for an external part."""
        part = self._embedded[name]
        if part.process is not None:
            part.process.kill()
            part.process = None

    def restart(self, name: str) -> None:
        """End an embedded part if it runs and start it again on the same port; return when it is ready."""
        part = self._embedded[name]
        if part.process is not None:
            part.process.terminate(STOP_TIMEOUT_SECONDS)
        part.process = part.start(part.port, self.directory, self._inherited)
        self._wait_until_ready(name)

    def failed_parts(self) -> list[str]:
        """The embedded parts that ended by themselves, each with exit code and the tail of its log."""
        return [
            _describe(part.process, f"ended with exit code {part.process.exit_code}")
            for part in self._embedded.values()
            if part.process is not None and part.process.exit_code is not None
        ]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _inherited(self) -> tuple[int, ...]:
        """Every part holds the lock too: the directory is free only when all processes of the stack are
        gone."""
        return () if self._lock is None else (self._lock,)

    def _acquire_lock(self) -> None:
        if self._lock is not None:
            raise RuntimeError("this stack is already started")
        lock = os.open(self.directory / "stack.lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise DirectoryInUse(f"another tribill runs on {self.directory}") from None
                time.sleep(_POLL_SECONDS)
        self._lock = lock

    def _wait_until_ready(self, name: str) -> None:
        part = self._embedded[name]
        process = part.process
        assert process is not None, f"{name} was not started"
        started = time.monotonic()
        while process.exit_code is not None or not part.is_ready(part.port):
            if process.exit_code is not None:
                raise ProcessFailed(_describe(process, f"ended with exit code {process.exit_code}"))
            if time.monotonic() - started > START_TIMEOUT_SECONDS:
                raise ProcessFailed(_describe(process, f"was not ready within {START_TIMEOUT_SECONDS:.0f} s"))
            time.sleep(_POLL_SECONDS)
        _log.info("part ready", part=name, address=self._addresses[name], pid=process.pid)


def _describe(process: Process, what: str) -> str:
    return f"{process.name} {what}; the end of {process.log}:\n{process.log_tail()}"
