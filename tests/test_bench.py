"""The benchmark of the usage path runs: what it sends is in the ledger, once and to the last micro."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from bench.plot import bars
from bench.profile import table
from bench.rating import World, describe
from rating.close import derive

ROOT = Path(__file__).parents[1]


def test_usage_path_on_the_embedded_broker(tmp_path: Path) -> None:
    """Where there is no Java the broker is Tansu; the command fails unless every reading was counted."""
    environment = {**os.environ, "TRIBILL_KAFKA_JARS": "", "PATH": str(tmp_path)}
    command = [sys.executable, "-m", "bench.usage", "--only", "tribill,tribill_batch", "--events", "500"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Tansu" in done.stderr
    for name in ("tribill", "tribill_batch"):
        assert re.search(rf"^{name} +[\d,]+ ", done.stdout, re.MULTILINE), done.stdout


def test_a_profile_tells_own_time_from_what_is_called() -> None:
    """Of folded stacks, with waiting left out."""
    stacks = ["main (a.py:1);work (a.py:5) 30", "main (a.py:2) 10", "main (a.py:1);EpollSelector.select (s.py:9) 99"]
    lines = table(stacks)
    assert lines[0] == "40 samples"
    assert lines[lines.index("own time:") + 1 :][:2] == [" 75.0% work (a.py)", " 25.0% main (a.py)"]
    assert " 100.0% main (a.py)".strip() in [line.strip() for line in lines[lines.index("with what it calls:") :]]


def test_bars_are_as_long_as_their_values() -> None:
    """Twice the value, twice the bar; names are text."""
    picture = bars("<rates>", {"tribill": 200, "other": 100})
    assert [int(width) for width in re.findall(r'<rect x="130" y="\d+" width="(\d+)"', picture)] == [480, 240]
    assert "&lt;rates&gt;" in picture


def test_what_the_benchmark_of_rating_rates() -> None:
    """It says of what book its figures are."""
    world = World(2_000, 2)
    told = describe(world.book(), derive(world.book(), world.months[-1]), world.months[-1])
    assert re.match(r"2,000 lines of [\d,]+ orders: .*\n[\d,]+ payable and [\d,]+ held amounts, ", told)
