"""The peers' own environment, `.venv-bench`, made from `requirements.lock` beside this file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.stack import ROOT, say

_HERE = Path(__file__).parent
_LOCK = _HERE / "requirements.lock"
_DIRECTORY = ROOT / ".venv-bench"
BIN = _DIRECTORY / "bin"
PYTHON = BIN / "python"


def make() -> None:
    """Makes the environment, or makes it anew when the lock has changed."""
    mark = _DIRECTORY / "installed"
    if mark.exists() and mark.read_text() == _LOCK.read_text():
        return
    say("making .venv-bench for the peers ...")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(_DIRECTORY)], check=True)
    install = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
    subprocess.run([*install, "--only-binary", ":all:", "-r", str(_LOCK)], check=True)
    mark.write_text(_LOCK.read_text())


def has(package: str) -> bool:
    """Whether the environment has a package: one without a wheel for this Python is left out of it."""
    found = subprocess.run([str(PYTHON), "-c", f"import {package}"], capture_output=True, check=False)
    return found.returncode == 0
