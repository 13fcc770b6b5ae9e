"""`tribill up`: the embedded stack with workers and page, kept running until it is told to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sinks.clickhouse import ClickHouse
from sinks.ledger import Ledger
from streams.codec import Codec
from streams.producer import Outbox
from streams.settings import Settings
from streams.topics import CHARGE_INPUTS, CONTRACT_CHANGES
from tribill.embedded import log_generation
from tribill.embedded.process import free_port
from tribill.installation import Installation

READY_SECONDS = 60.0
DRAIN_SECONDS = 120.0
_RESTART_SECONDS = 1.0


class Stopped(BaseException):
    """Ctrl-C or SIGTERM: not an error, so that nothing that handles errors takes it."""


class UpFailed(Exception):
    """The stack could not be started or went on the rocks; the message says what to do."""


@contextmanager
def stopping_by_signal() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise Stopped once."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def installation(
    directory: Path, settings: Settings, accept_lost_tail: bool, say: Callable[[str], None]
) -> Iterator[Installation]:
    """A started installation over a data directory, drained and stopped at the end.

    Where the log is embedded each start is a new life of the log: a clean stop drains it first, and
    after a kill the start is refused, because what it held may be lost.  Raises UpFailed.
    """
    settings = replace(settings, web_port=settings.web_port if _is_free(settings.web_port) else free_port())
    held = Installation(directory, settings)
    with held:
        generation = None
        if not settings.kafka:
            try:
                generation = log_generation.begin(directory, accept_lost_tail)
            except log_generation.LostTail as lost:
                raise UpFailed(_lost_tail(held, lost.generation)) from None
        try:
            held.prepare(generation)
            if generation is not None and generation > 1:
                _wake_charges(held.settings)
            held.start_workers()
            held.start_web()
            _wait_until_ready(held)
        except BaseException:
            if generation is not None:
                # Nobody was told of the log yet, so nothing in it can be lost.
                log_generation.end(directory)
            raise
        try:
            yield held
        finally:
            drained = held.drain(DRAIN_SECONDS, say)
            held.stop_processes()
            # Somebody may have published between the drain and the end of the workers.
            if drained and not held.behind():
                if generation is not None:
                    log_generation.end(directory)
            else:
                say("not drained: the next start will say what may be lost")


def up(directory: Path, settings: Settings, accept_lost_tail: bool, say: Callable[[str], None]) -> None:
    """Runs until SIGINT or SIGTERM, starting workers again that end by themselves.  Raises UpFailed."""
    started = time.monotonic()
    try:
        with stopping_by_signal(), installation(directory, settings, accept_lost_tail, say) as held:
            for part in held.stack.parts:
                say(
                    f"{part.name:<14} {without_password(part.address)}"
                    + (f"  (pid {part.pid})" if part.pid else "  (external)")
                )
            for role, worker in held.workers.items():
                say(f"{'worker ' + role:<22} http://127.0.0.1:{held.worker_ports[role]}/metrics  (pid {worker.pid})")
            say(f"settings       {held.settings_file}  (tribill --config ... publish, close, worker)")
            say(f"page           http://127.0.0.1:{held.settings.web_port}/")
            say(f"ready after {time.monotonic() - started:.0f} s; Ctrl-C drains and stops")
            try:
                while True:
                    watch(held, say)
                    time.sleep(_RESTART_SECONDS)
            except Stopped:
                say("stopping: no more is taken, what is in the log is finished first")
    except Stopped:
        say("stopped before it was ready")
        return
    say("stopped")


def watch(held: Installation, say: Callable[[str], None]) -> None:
    """Starts again what has ended by itself.  Raises UpFailed when the log is gone: nothing replaces it."""
    for role, code in held.dead().items():
        say(f"the worker {role} has ended (exit code {code}); starting it again")
        held.start_worker(role)
    if held.web is not None and held.web.exit_code is not None:
        say(f"the page has ended (exit code {held.web.exit_code}); starting it again")
        held.start_web()
    for part in held.stack.parts:
        if part.pid is None and part.name in held.stack.embedded:
            if part.name == "kafka":
                raise UpFailed("the embedded broker has ended, and with it the log that it held in memory")
            say(f"{part.name} has ended; starting it again")
            held.stack.restart(part.name)


def _wait_until_ready(held: Installation) -> None:
    deadline = time.monotonic() + READY_SECONDS
    waiting = set(held.workers)
    while waiting:
        for role, code in held.dead().items():
            tail = held.workers[role].log_tail(5)
            raise UpFailed(f"the worker {role} ended at once (exit code {code}):\n{tail}")
        waiting = {role for role in waiting if not held.ready(role)}
        if time.monotonic() > deadline:
            raise UpFailed(
                f"not ready after {READY_SECONDS:.0f} s: {', '.join(sorted(waiting))}; see {held.directory}/log"
            )
        time.sleep(0.05)


def _wake_charges(settings: Settings) -> None:
    """Has every partition of charges read the ledger: what the last life of the log left is rated anew."""
    codec, outbox = Codec(settings), Outbox(settings)
    for partition in range(settings.partitions):
        source = {
            "generation": settings.log_generation,
            "topic": CONTRACT_CHANGES,
            "partition": partition,
            "end_offset": 0,
        }
        value = codec.encode("AcceptedChanges", {"source": source, "kind": "contract", "changes": []})
        outbox.send(CHARGE_INPUTS, value, partition=partition)
    outbox.flush()


def _lost_tail(held: Installation, generation: int) -> str:
    settings = replace(held.settings, clickhouse=held.stack.clickhouse)
    seen: dict[str, int] = {}
    clickhouse = ClickHouse(settings)
    if clickhouse.exists():
        seen = Ledger(clickhouse).positions_complete(generation, held.settings.partitions)
    places = "".join(f"\n  {place}: send again from offset {end}" for place, end in sorted(seen.items()))
    return (
        f"the last run on {held.directory} was killed, and its log (generation {generation}) was in memory: what "
        f"was published after these positions may be lost and must be sent again (what is sent twice does no harm):"
        f"{places or chr(10) + '  nothing of it had reached the ledger'}\n"
        "start with --accept-lost-tail to go on with what the ledger has"
    )


def without_password(address: str) -> str:
    """An address as it may be shown."""
    url = urlsplit(address)
    return url._replace(netloc=url.netloc.rpartition("@")[2]).geturl() if "@" in url.netloc else address


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
