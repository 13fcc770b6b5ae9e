"""A worker for tests of the transport: writes down what it was handed, and can be slow or stand still.

`python -m tests.recording_worker FILE TOPIC` with the settings in the environment.  Each batch is a line
in FILE when its agent takes it and another when it is done.  While FILE.hold exists a batch stays in hand;
if FILE.bug exists its agent meets a bug, if FILE.idle-bug exists it does so while it has nothing to do.
If FILE.idle-wait exists it finds, once, that what it would do then must wait.
While FILE.down exists the ledger does not work.  If FILE.slow exists it takes its time after a rebalance, as a
busy machine does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sinks.clickhouse import LedgerUnavailable
from streams.agent import Agent
from streams.batch import Batch, NotYet
from streams.settings import Settings
from streams.topics import Place
from streams.worker import Worker


class _Panic(BaseException):
    """What Polars panics with is no Exception either."""


class Recorder(Agent):
    """Writes down what it is handed."""

    role: ClassVar[str] = "recorder"
    idle_seconds: ClassVar[float] = 0.5

    def __init__(self, file: Path, topic: str) -> None:
        self._file = file
        self._topic = topic
        self._hold = file.with_suffix(".hold")
        self._bug = file.with_suffix(".bug")
        self._down = file.with_suffix(".down")
        self._idle_bug = file.with_suffix(".idle-bug")
        self._idle_wait = file.with_suffix(".idle-wait")

    def topics(self) -> Sequence[str]:
        """The one topic."""
        return [self._topic]

    def do(self, batch: Batch) -> None:
        """Writes the batch down, waits while it is told to, and writes down that it is done."""
        self._write("taken", batch)
        while self._hold.exists():
            time.sleep(0.02)
        if self._down.exists():
            raise LedgerUnavailable("on purpose")
        if self._bug.exists():
            raise _Panic("on purpose")
        self._write("done", batch)

    def idle(self, committed: Mapping[Place, int]) -> None:
        """Meets a bug, or has to wait, when it is told to."""
        if self._idle_bug.exists():
            raise ValueError("on purpose")
        if self._idle_wait.exists():
            self._idle_wait.unlink()
            raise NotYet("on purpose")

    def _write(self, what: str, batch: Batch) -> None:
        offsets = [record.offset for record in batch.records]
        values = [record.value.decode(errors="replace").strip() if record.value else None for record in batch.records]
        line = {"what": what, "pid": os.getpid(), "partition": batch.partition, "offsets": offsets, "values": values}
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


async def _take_time(app: Any, **_: Any) -> None:
    await asyncio.sleep(1)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    worker = Worker([Recorder(file, sys.argv[2])], Settings.load())
    if file.with_suffix(".slow").exists():
        worker.app.on_rebalance_complete.connect(_take_time)
    raise SystemExit(worker.run())
