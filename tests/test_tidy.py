"""House rules that no linter knows: what would break the design without breaking a test."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("agents", "rating", "sinks", "streams", "tribill", "web")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name.split(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_file_says_its_reason(path: Path) -> None:
    """A newcomer finds out what a file is for from its first line."""
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


@pytest.mark.parametrize("path", sorted((ROOT / "rating").rglob("*.py")), ids=str)
def test_rating_is_pure(path: Path) -> None:
    """Rating knows no Kafka, no database, no clock, and no float."""
    allowed = {
        "__future__", "bisect", "calendar", "collections", "dataclasses", "datetime", "fractions", "functools",
        "itertools", "math", "operator", "rating", "re", "typing", "zoneinfo",
    }  # fmt: skip
    assert imported(path) <= allowed
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), f"{path}:{node.lineno}"
        assert not (isinstance(node, ast.Name) and node.id == "float"), f"{path}:{node.lineno}"
        assert not (isinstance(node, ast.Attribute) and node.attr in ("now", "today", "utcnow")), path


def test_arrows_point_one_way() -> None:
    """agents -> rating and sinks; sinks and streams never import agents or the command line."""
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0]
        if room in ("sinks", "streams", "web"):
            assert not imported(path) & {"agents", "tribill"}, path
        if room == "agents":
            assert "tribill" not in imported(path), path


def test_no_take() -> None:
    """Faust's `take` acknowledges what was not done."""
    for path in SOURCES:
        assert not re.search(r"stream\w*\.take\(", path.read_text()), path


def test_no_statement_is_built_from_data() -> None:
    """SQL is a literal with bound parameters; what is formatted in is marked, and never comes from data."""
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.search(r"""f["']{1,3}\s*(SELECT|INSERT|DELETE|ALTER|DROP)""", line):
                assert "noqa: S608" in line, f"{path}:{number}"


def test_no_registry_is_named() -> None:
    """No committed file names a package registry's host."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout
    hosts = re.compile(rb"py" + rb"pi\.org|files\.pythonhosted|registry\.np" + rb"mjs|repo1?\.maven|crates\.i" + rb"o/")
    for name in filter(None, listed.split(b"\0")):
        path = ROOT / name.decode()
        if path.is_file() and path.stat().st_size < 5_000_000:
            assert not hosts.search(path.read_bytes()), path
