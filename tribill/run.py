"""`tribill run`: replays interchange files through a private stack and writes what each close invoices."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rating.amounts import pounds_text
from rating.calendar import month_start, month_text, parse_month
from sinks.clickhouse import ClickHouse
from sinks.documents import Documents, write_files
from streams.settings import Settings
from tribill import interchange
from tribill.installation import Installation

#: Records are stamped so many milliseconds after this instant as lines came before them: "first"
#: is by broker timestamp, and in an interchange file the order of lines is the order of the log.
_FIRST_STAMP_MS = 1_000_000_000_000
_POLL_SECONDS = 0.1


class CloseRefused(Exception):
    """A close in the file, or asked for, was refused; the message says why."""


@dataclass(frozen=True, slots=True)
class Closed:
    """What a close came to, for the summary."""

    period: str
    documents: int
    net_pence: int
    held_pence: int
    drift: str


def run(
    files: Sequence[Path],
    closes: Sequence[str],
    out: Path | None,
    say: Callable[[str], None],
    **overrides: Any,
) -> list[Closed]:
    """Replays the files, closes what they and `closes` ask for, writes `out/<period>/...`.

    Raises CloseRefused, interchange.BadClose, OSError.
    """
    survey = interchange.survey(list(files))
    periods = [parse_month(text) for text in (*survey.closes, *closes)]
    last = max(periods, default=None)
    now = datetime.now(UTC)
    arrival = now if last is None else max(now, month_start(last + 1))
    settings = Settings(
        partitions=2,
        session_timeout_seconds=6,
        supplier_topics=",".join(sorted(survey.suppliers)),
        arrival_floor=arrival.isoformat(),
        horizon_month="" if last is None else month_text(last),
        close_any_period=True,
        **overrides,
    )
    with tempfile.TemporaryDirectory(prefix="tribill-run-") as directory:
        installation = Installation(Path(directory), settings)
        with installation:
            installation.prepare()
            installation.start_workers()
            say(f"private stack in {directory}; {survey.lines} lines, {len(periods)} closes")
            return _Replay(installation, out, say).replay(files, closes)


class _Replay:
    """One run over a started installation."""

    def __init__(self, installation: Installation, out: Path | None, say: Callable[[str], None]) -> None:
        self._installation = installation
        self._out = out
        self._say = say
        self._publisher = interchange.Publisher(installation.settings)
        self._clickhouse = ClickHouse(installation.settings)
        self._documents = Documents(self._clickhouse)
        self._said = ""

    def replay(self, files: Sequence[Path], closes: Sequence[str]) -> list[Closed]:
        """Sends every line, closing where the files say; then the closes asked for."""
        closed: list[Closed] = []
        number = 0
        for path in files:
            for line in interchange.read(path):
                number += 1
                if line.close:
                    closed.append(self._close(line.close))
                else:
                    self._publisher.send(line, _FIRST_STAMP_MS + number)
                if number % 100_000 == 0:
                    self._say(f"{number} lines sent")
        closed += [self._close(text) for text in closes]
        self._publisher.flush()
        self._report_refused()
        return closed

    def _close(self, text: str) -> Closed:
        self._publisher.flush()
        offset = self._publisher.request_close(text)
        generation = self._installation.settings.log_generation
        while True:
            answer = self._documents.answer_since(text, generation, offset)
            if answer is not None and answer[0] == "refused":
                raise CloseRefused(f"the close of {text} is refused: {answer[1]}")
            if answer is not None and answer[0] == "closed":
                break
            self._say_what_is_waited_for(text, answer[1] if answer else "")
            time.sleep(_POLL_SECONDS)
        if self._out is not None:
            write_files(self._documents, parse_month(text), self._out)
        count, net, held, drift = self._clickhouse.query(
            "SELECT documents, net_pence, held_pence, toString(drift_pence) FROM periods FINAL"
            " WHERE period = {period:String}",
            {"period": text},
        )[0]
        self._say(f"{text} closed: {count} documents, net {pounds_text(net)}, held {pounds_text(held)}")
        return Closed(text, count, net, held, drift)

    def _say_what_is_waited_for(self, text: str, detail: str) -> None:
        said = f"{text}: {detail}" if detail else f"{text}: waits for period-close to take the request"
        for role, code in self._installation.dead().items():
            said += (
                f"; the worker {role} has ended (exit code {code}): start it again with "
                f"`tribill --config {self._installation.settings_file} worker {role}`"
            )
        if said != self._said:
            self._say(said)
            self._said = said

    def _report_refused(self) -> None:
        rows = self._clickhouse.query(
            "SELECT toString(agent), toString(topic), offset, reason, field FROM dead_letters FINAL"
            " ORDER BY broker_timestamp_ms, topic, offset, index"
        )
        if rows:
            self._say(f"{len(rows)} records were refused (dead letters):")
        for agent, topic, offset, reason, field in rows[:20]:
            self._say(f"  {topic} offset {offset} ({agent}): {field + ' ' if field else ''}{reason}")
        if len(rows) > 20:
            self._say(f"  and {len(rows) - 20} more")
