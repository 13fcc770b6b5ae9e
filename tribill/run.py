"""`tribill run`: replays interchange files through a private stack and writes what each close invoices."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rating.calendar import month_start, month_text, parse_month
from sinks.clickhouse import ClickHouse
from sinks.documents import Documents
from streams.settings import Settings
from streams.topics import STAGES
from tribill import interchange
from tribill.closing import Closed, close_and_wait
from tribill.command import Progress, caller
from tribill.importing import import_party_files
from tribill.installation import Installation

#: Records are stamped so many milliseconds after this instant as lines came before them: "first"
#: is by broker timestamp, and in an interchange file the order of lines is the order of the log.
_FIRST_STAMP_MS = 1_000_000_000_000
#: So long a close waits for a worker that has ended or does nothing: a run must not hang for ever.
_PATIENCE_SECONDS = 600


def run(
    files: Sequence[Path],
    closes: Sequence[str],
    out: Path | None,
    parties: Sequence[Path],
    say: Callable[[str], None],
    accept: Sequence[str] = (),
    **overrides: Any,
) -> list[Closed]:
    """Replays the files, closes what they and `closes` ask for, writes `out/<period>/...`.

    `accept` is what does not stop a close (`tribill.closing`).

    Without files of `parties` they are invented.  Raises CloseRefused, interchange.BadClose, OSError.
    """
    survey = interchange.survey(list(files))
    periods = [parse_month(text) for text in (*survey.closes, *closes)]
    last = max(periods, default=None)
    now = datetime.now(UTC)
    arrival = now if last is None else max(now, month_start(last + 1))
    settings = Settings(
        partitions=2,
        session_timeout_seconds=4,
        supplier_topics=",".join(sorted(survey.suppliers)),
        arrival_floor=arrival.isoformat(),
        horizon_month="" if last is None else month_text(last),
        close_any_period=True,
        close_wait_seconds=_PATIENCE_SECONDS,
        specimen=not parties,
        **overrides,
    )
    with tempfile.TemporaryDirectory(prefix="tribill-run-") as directory:
        installation = Installation(Path(directory), settings)
        with installation:
            installation.prepare()
            installation.start_workers([role for role, _ in STAGES])
            say(f"private stack in {directory}; {survey.lines} lines, {len(periods)} closes")
            import_party_files(parties, ClickHouse(installation.settings), say)
            return _Replay(installation, out, say, accept).replay(files, closes)


class _Replay:
    """One run over a started installation."""

    def __init__(
        self, installation: Installation, out: Path | None, say: Callable[[str], None], accept: Sequence[str]
    ) -> None:
        self._installation = installation
        self._out = out
        self._say = say
        self._accept = accept
        self._publisher = interchange.Publisher(installation.settings)
        self._clickhouse = ClickHouse(installation.settings)

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
        closed = close_and_wait(
            self._installation.settings,
            text,
            self._say,
            self._dead_workers,
            accept=self._accept,
            requested_by=caller(),
            patience_seconds=_PATIENCE_SECONDS,
        )
        if self._out is not None:
            from sinks.papers.files import write_files

            progress = Progress()
            write_files(Documents(self._clickhouse), parse_month(text), self._out, progress)
            progress.end()
        self._say(closed.summary())
        return closed

    def _dead_workers(self) -> str:
        """What to add to what is waited for: a worker that has ended is not started again by itself."""
        return "".join(
            f"; the worker {role} has ended (exit code {code}): start it again with "
            f"`tribill --config {self._installation.settings_file} worker {role}`"
            for role, code in self._installation.dead().items()
        )

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
