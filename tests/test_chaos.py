"""What of the chaos harness can be told without Kafka: a seed repeats, and nothing passes unverified."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest

from chaos import __main__ as command
from chaos.book import Book
from chaos.checker import Unverified, Verdict
from chaos.faults import KINDS, plan
from chaos.planted import failed
from chaos.run import Report, Stalled
from chaos.stack import NotStarted

ROOT = Path(__file__).parents[1]


def test_a_seed_repeats() -> None:
    """The same seed gives the same book and the same plan, another seed others."""
    books = [Book(seed, 3) for seed in (7, 7, 8)]
    said = [[*book.opening(), *islice(book.stream(), 400)] for book in books]
    assert said[0] == said[1]
    assert said[0] != said[2]
    assert plan(7, 60) == plan(7, 60)
    assert plan(7, 60) != plan(8, 60)


def test_every_kind_of_fault_comes() -> None:
    """The short form in CI leaves no kind out but what the machine has not got."""
    assert {fault.kind for fault in plan(1, 24)} >= KINDS.keys() - {"jump a worker's clock"}


def test_without_kafka_nothing_is_verified() -> None:
    """Not started is not passed."""
    environment = {**os.environ, "TRIBILL_KAFKA_JARS": ""}
    command = [sys.executable, "-m", "chaos", "--seed", "1"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("unverified")


@pytest.mark.parametrize(
    ("error", "code", "of_a_plant"),
    [(NotStarted("no"), 2, 2), (Unverified("no"), 2, 2), (KeyError("no"), 2, 2), (Stalled("no"), 1, 0)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_the_harness_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, code: int, of_a_plant: int
) -> None:
    """An error of the checker would pass as survived, or as a planted bug that was caught."""
    monkeypatch.setattr(command, "JARS", "there")
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/java")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(command, "Stack", mock.Mock(side_effect=error))
    for plant, expected in (([], code), (["--plant", "no-fencing"], of_a_plant)):
        monkeypatch.setattr(sys, "argv", ["chaos", "--seed", "1", *plant])
        assert command.main() == expected


@pytest.mark.parametrize(("happened", "code"), [(24, 2), (25, 0)])
def test_few_faults_prove_nothing(happened: int, code: int) -> None:
    """A run that nothing happened in would pass."""
    asked = argparse.Namespace(seed=1, faults=29, minutes=5, brokers=1, at_least=25)
    assert command._tell(Report(Counter({"kill a worker": happened}), Verdict()), asked) == code


@pytest.mark.parametrize(
    ("said", "is_failed"),
    [
        ('{"event": "a bug: the batch is not acknowledged and the worker ends", "agent": "charges"}', True),
        ("[^App]: Crashed reason=BaseExceptionGroup('in a TaskGroup', [PanicException('left == right')])", True),
        ('{"event": "sink failed, trying again", "agent": "charges"}', False),
    ],
)
def test_a_plant_that_fails_itself(tmp_path: Path, said: str, is_failed: bool) -> None:
    """An error in a planted bug's own code would pass as the bug that was caught."""
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "worker-charges.1.log").write_text(f"started\n{said}\n")
    assert failed(tmp_path) == is_failed
