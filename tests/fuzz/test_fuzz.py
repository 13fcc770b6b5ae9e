"""A short run of each fuzzer, where atheris is installed (`make fuzz` installs it)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")


@pytest.mark.parametrize("target", ["codec", "intake", "text", "interchange", "imports"])
def test_a_short_run(target: str, tmp_path: Path) -> None:
    """Bytes that are near to good records would end whoever reads them."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        target,
        "-atheris_runs=300",
        "-seed=1",
        f"-artifact_prefix={tmp_path}/",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3_000:]
