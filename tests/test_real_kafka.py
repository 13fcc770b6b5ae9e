"""The same pennies on Apache Kafka as from the oracle, through a kill of everything but the broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kafka.broker import JARS, kafka
from tests.oracle import oracle
from tests.test_billing_book import BOOK, LATE

pytestmark = pytest.mark.skipif(not JARS, reason="TRIBILL_KAFKA_JARS names no jars of Apache Kafka")
TRIBILL = [sys.executable, "-m", "tribill"]


def start(data: Path, broker: str) -> subprocess.Popen[bytes]:
    """`tribill up` on the broker, ready."""
    log = (data.parent / "up.log").open("ab")
    environment = {**os.environ, "TRIBILL_KAFKA": broker, "TRIBILL_SUPPLIER_TOPICS": "10000"}
    before = (data.parent / "up.log").read_bytes().count(b"ready after")
    up = subprocess.Popen([*TRIBILL, "up", "--data", str(data)], stderr=log, env=environment)
    for _ in range(2_000):
        if (data.parent / "up.log").read_bytes().count(b"ready after") > before:
            return up
        assert up.poll() is None, (data.parent / "up.log").read_text()
        time.sleep(0.1)
    raise AssertionError((data.parent / "up.log").read_text())


def tribill(data: Path, *arguments: str) -> str:
    """A command against the running installation."""
    command = [*TRIBILL, "--config", str(data / "tribill.toml"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_same_pennies_through_a_kill(tmp_path: Path) -> None:
    """Published, killed at once by SIGKILL, started again, closed; then late events and the next close."""
    data, out = tmp_path / "data", tmp_path / "out"
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("".join(json.dumps(line) + "\n" for line in BOOK))
    second.write_text("".join(json.dumps(line) + "\n" for line in LATE))
    expected = oracle.run([*BOOK, {"close": "2026-04"}, *LATE, {"close": "2026-05"}])
    with kafka(tmp_path) as broker:
        up = start(data, broker)
        try:
            tribill(data, "publish", str(first))
            up.kill()
            up.wait()
            up = start(data, broker)
            assert "drift 0" in tribill(data, "close", "2026-04", "--out", str(out))
            tribill(data, "publish", str(second))
            assert "drift 0" in tribill(data, "close", "2026-05", "--out", str(out))
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(120)
    for close in expected.closes:
        for name, rows in (("lines", close.lines), ("held", close.held)):
            written = (out / close.period / f"{name}.csv").read_text().splitlines()[1:]
            assert written == [",".join(row) for row in rows]
            assert name == "held" or rows
