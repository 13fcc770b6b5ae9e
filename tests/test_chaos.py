"""What of the chaos harness can be told without Kafka: a seed repeats, and nothing passes unverified."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

from chaos.book import Book
from chaos.faults import KINDS, plan

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
