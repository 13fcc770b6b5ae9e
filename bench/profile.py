"""Profiles running workers from outside with py-spy, and says which functions their time went to."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_ENTRIES = 30
#: Where a thread only waits, though py-spy takes it for busy.
_WAITING = ("EpollSelector.select (", "_worker (concurrent/futures/thread.py")


@contextmanager
def profiled(py_spy: Path, pids: Mapping[str, int], directory: Path | None) -> Iterator[None]:
    """Samples these processes while the block runs; writes `<name>.txt` and `<name>.folded` (stacks) for each.

    Work in C is counted to the Python function that called it.
    """
    if directory is None:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    stacks = {name: directory / f"{name}.folded" for name in pids}
    spies = [
        subprocess.Popen(
            [py_spy, "record", "--pid", str(pid), "--rate", "200", "--format", "raw", "--output", stacks[name]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name, pid in pids.items()
    ]
    try:
        yield
    finally:
        for spy in spies:
            spy.send_signal(signal.SIGINT)
        for spy in spies:
            spy.wait(60)
    for name, file in stacks.items():
        (directory / f"{name}.txt").write_text("\n".join(table(file.read_text().splitlines())) + "\n")


def table(folded: list[str]) -> list[str]:
    """The functions of folded stacks (`a;b;c samples`) by their share, below them and of their own."""
    whole: Counter[str] = Counter()
    own: Counter[str] = Counter()
    total = 0
    for line in folded:
        stack, _, samples = line.rpartition(" ")
        frames = [_function(frame) for frame in stack.split(";")]
        if frames[-1].startswith(_WAITING):
            continue
        total += int(samples)
        own[frames[-1]] += int(samples)
        for frame in set(frames):
            whole[frame] += int(samples)
    head = [f"{total} samples", "", "own time:"]
    by_own = [f"{count / total:6.1%} {name}" for name, count in own.most_common(_ENTRIES)]
    by_whole = [f"{count / total:6.1%} {name}" for name, count in whole.most_common(_ENTRIES)]
    return [*head, *by_own, "", "with what it calls:", *by_whole]


def _function(frame: str) -> str:
    """A frame without its line: `name (file.py:12)` is `name (file.py)`."""
    return frame.rpartition(":")[0] + ")" if ":" in frame else frame
