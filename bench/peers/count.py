"""What every peer does with a record: decode it with fastavro, add its quantity to its practice's sum.

The sum is kept by the peer's own keyed state, or in a dictionary, which is as cheap as state can be.
Runs in `.venv-bench` and knows nothing of tribill.
"""

import argparse
import io
import json
import os
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro


class Count:
    """Counts records from the first to the last expected one, then says what that took and ends the process."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--broker", required=True)
        parser.add_argument("--topic", required=True)
        parser.add_argument("--events", type=int, required=True)
        parser.add_argument("--schema", type=Path, required=True)
        options = parser.parse_args()
        self.broker, self.topic, self.events = options.broker, options.topic, options.events
        self._schema = fastavro.parse_schema(json.loads(options.schema.read_text()))
        self._seen = 0
        self._started = self._cpu = 0.0
        self._totals: dict[str, Decimal] = {}

    def decode(self, value: bytes) -> Any:
        """The record in these bytes; five of them are the wire format's."""
        if not self._started:
            self.begin()
        return fastavro.schemaless_reader(io.BytesIO(value[5:]), self._schema)

    def add(self, usage: Any) -> None:
        """Adds a decoded record to its practice's sum in the dictionary."""
        code = usage["ods_code"]
        self.summed(code, self._totals.get(code, 0) + usage["quantity"])

    def summed(self, code: str, total: Decimal) -> None:
        """A record was added; this is its practice's sum now."""
        self._totals[code] = total
        self.seen(1)

    def begin(self) -> None:
        """The first record is here."""
        self._started, self._cpu = time.monotonic(), time.process_time()

    def seen(self, records: int) -> None:
        """So many more records are done."""
        self._seen += records
        if self._seen >= self.events:
            self._finish()

    def _finish(self) -> None:
        took = {
            "events": self._seen,
            "seconds": time.monotonic() - self._started,
            "cpu": time.process_time() - self._cpu,
            "peak_mib": _peak_mib(),
            "quantity": str(sum(self._totals.values())),
        }
        sys.__stdout__.write(json.dumps(took) + "\n")
        sys.__stdout__.flush()
        # A framework's own shutdown is nobody's benchmark.
        os._exit(0)


def _peak_mib() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024
