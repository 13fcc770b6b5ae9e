"""Which life of the embedded log the stored positions belong to.

The embedded log is empty after each start, while the ledger stays. So every start begins a new *log
generation*, and every stored position names its generation. After a clean end (everything drained into the
ledger) nothing is missing; after a kill the log's tail may be lost, and a start must say so instead of going
on silently.
"""

import json
import os
from pathlib import Path
from typing import Literal, TypedDict

FILE_NAME = "log-generation.json"


class _Record(TypedDict):
    generation: int
    state: Literal["running", "stopped"]


class LostTail(RuntimeError):
    """The last run was killed: what log generation `generation` had not yet put into the ledger is lost."""

    def __init__(self, generation: int) -> None:
        super().__init__(
            f"the last run (log generation {generation}) was killed before its log was drained: events that"
            " were accepted but are not yet in the ledger are lost and must be sent again;"
            " start with --accept-lost-tail"
        )
        self.generation = generation


class DamagedGenerationFile(RuntimeError):
    """The generation file cannot be read; to guess a generation could mix up positions."""


def begin(directory: Path, accept_lost_tail: bool = False) -> int:
    """Begin a new log generation over the data directory and return its number (1 for the first).

    Raises LostTail when the last run was killed and the loss is not accepted, DamagedGenerationFile when the
    file is not what `begin` or `end` writes.
    """
    last = _read(directory)
    if last is not None and last["state"] == "running" and not accept_lost_tail:
        raise LostTail(last["generation"])
    generation = 1 if last is None else last["generation"] + 1
    _write(directory, {"generation": generation, "state": "running"})
    return generation


def end(directory: Path) -> None:
    """Mark the running generation as drained and stopped. Call it only when the ledger has all of the log."""
    last = _read(directory)
    if last is None:
        raise DamagedGenerationFile(f"{directory / FILE_NAME} is missing: no log generation was begun")
    _write(directory, {"generation": last["generation"], "state": "stopped"})


def current(directory: Path) -> int | None:
    """The number of the latest log generation, None before the first."""
    last = _read(directory)
    return None if last is None else last["generation"]


def _read(directory: Path) -> _Record | None:
    path = directory / FILE_NAME
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedGenerationFile(f"{path}: {error}") from error
    match record:
        case {"generation": int(generation), "state": "running" | "stopped" as state} if generation > 0:
            return {"generation": generation, "state": state}
    raise DamagedGenerationFile(f"{path} holds {record!r}")


def _write(directory: Path, record: _Record) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE_NAME
    draft = path.with_suffix(".draft")
    with draft.open("w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    # The rename itself is durable only when the directory is.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
