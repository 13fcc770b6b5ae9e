"""`tribill run` as a process: the files that it writes against the oracle, and what it says and leaves.

Each run starts a whole private installation (some 20 seconds), so there are few, rich cases.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import oracle
from tests.oracle.strategies import is_usage, usage_keys

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc"),
    pytest.mark.timeout(150),
]

ROOT = Path(__file__).parents[1]
HEADER = "order_number,item_id,ods_code,supplier_id,payer,for_period,kind,net"
Record = dict[str, Any]


class Run:
    """A `tribill run` in a process of its own, with a folder for temporary files of its own."""

    def __init__(self, folder: Path, lines: Iterable[Record | bytes], *arguments: str) -> None:
        self.out, self.temporary = folder / "out", folder / "tmp"
        self.temporary.mkdir(parents=True)
        file = folder / "events.jsonl"
        file.write_bytes(b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TRIBILL_")},
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
        }
        self._stderr = folder / "stderr"
        command = [sys.executable, "-m", "tribill", "run", str(file), *arguments, "--out", str(self.out)]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(command, env=self.environment, cwd=folder, stderr=stderr, stdout=stderr)

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self._stderr.read_text(errors="replace")

    def end(self, code: int = 0) -> str:
        """Waits until it has ended with this code; returns what it said."""
        assert self.process.wait(120) == code, self.said
        return self.said

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Waits until it has said this."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.said)):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"never said {pattern!r}:\n{self.said}"
            time.sleep(0.05)
        return found

    def rows(self, period: str, name: str = "lines.csv") -> list[tuple[str, ...]]:
        """The rows of a file, without the header."""
        return [tuple(row.split(",")) for row in (self.out / period / name).read_text().splitlines()[1:]]

    def check(self, expected: Iterable[oracle.Close]) -> None:
        """The files of every period are the oracle's, to the byte."""
        expected = list(expected)
        assert sorted(each.name for each in self.out.iterdir()) == sorted(close.period for close in expected)
        for close in expected:
            for name, rows in (("lines.csv", close.lines), ("held.csv", close.held)):
                wanted = "".join(f"{line}\n" for line in (HEADER, *(",".join(row) for row in rows)))
                assert (self.out / close.period / name).read_bytes() == wanted.encode(), f"{close.period} {name}"

    def workers(self) -> dict[str, int]:
        """The process ids of its workers, by role."""
        found = {}
        for pid in descendants(self.process.pid):
            command = command_of(pid)
            if command[-2:-1] == ["worker"]:
                found[command[-1]] = pid
        return found


def command_of(pid: int) -> list[str]:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    except OSError:
        return []


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and those that they have."""
    try:
        children = {int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()}
    except OSError:
        return set()
    return children.union(*(descendants(each) for each in children))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs; afterwards none of them may have left a process or a temporary directory."""
    runs: list[Run] = []

    def start(lines: Iterable[Record | bytes], *arguments: str) -> Run:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        runs.append(Run(folder, lines, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.wait(60)
        assert list(run.temporary.iterdir()) == [], "temporary files are left"
        assert using(run.temporary) == [], "processes are left"


def using(folder: Path) -> list[list[str]]:
    """The commands of processes that were told of a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (path / "environ").read_bytes() + (path / "cmdline").read_bytes():
                found.append(command_of(int(path.name)))
        except OSError:
            continue
    return [command for command in found if command]


# --- books ----------------------------------------------------------------------------------


def mixed(book: Sequence[Record], seed: int) -> list[Record]:
    """The book with its usage between two closes shuffled and half of it doubled.

    Copies of one revision that differ keep their order: which is first decides.
    """
    shuffle = random.Random(seed)
    found: list[Record] = []
    part: list[Record] = []
    for line in [*book, {"close": ""}]:
        if "close" not in line:
            part.append(line)
            continue
        usage = [each for each in part if is_usage(each)]
        usage += shuffle.sample(usage, len(usage) // 2)
        ranks = [shuffle.random() for _ in usage]
        first: dict[Any, float] = {}
        for rank, each in zip(ranks, usage, strict=True):
            for key in usage_keys(each):
                first.setdefault(key, rank)
        order = {}
        for place, (rank, each) in enumerate(zip(ranks, usage, strict=True)):
            order[place] = max([rank, *(first[key] for key in usage_keys(each))]), place
        shuffled = [usage[place] for place in sorted(order, key=lambda place: order[place])]
        others = [each for each in part if not is_usage(each)]
        turns = [True] * len(shuffled) + [False] * len(others)
        shuffle.shuffle(turns)
        found += [shuffled.pop(0) if turn else others.pop(0) for turn in turns]
        if line["close"]:
            found.append(line)
        part = []
    return found


# --- cases ----------------------------------------------------------------------------------
