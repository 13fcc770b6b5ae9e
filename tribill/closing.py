"""Asking for a close and waiting for its answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rating.amounts import pounds_text, round_half_away
from rating.calendar import LONDON, month_text, parse_month
from sinks.clickhouse import ClickHouse
from sinks.documents import Documents
from streams.codec import Codec
from streams.producer import Outbox
from streams.settings import Settings
from streams.topics import PERIOD_EVENTS

_POLL_SECONDS = 0.1


class CloseRefused(Exception):
    """A close that was refused; the message says why."""


@dataclass(frozen=True, slots=True)
class Closed:
    """What a close came to."""

    period: str
    documents: int
    net_pence: int
    held_pence: int
    drift: str
    corrected_pence: int
    billed_pence: int
    notice: str
    verb: str = "closed"

    def summary(self) -> str:
        """One line for a person; corrections and what they are a share of count without regard to sign."""
        permille = round_half_away(1000 * self.corrected_pence, self.billed_pence or 1)
        return (
            f"{self.period} {self.verb}: {self.documents} documents, net {pounds_text(self.net_pence)}, "
            f"held {pounds_text(self.held_pence)}, corrections {pounds_text(self.corrected_pence)} "
            f"({permille // 10}.{permille % 10} % of all billed), drift {self.drift}"
            + (f"; {self.notice}" if self.notice else "")
        )


def previous_month() -> str:
    """The London month before this one."""
    now = datetime.now(UTC).astimezone(LONDON)
    return month_text(now.year * 12 + now.month - 2)


def close_and_wait(
    settings: Settings,
    period: str,
    say: Callable[[str], None],
    add: Callable[[], str] = str,
    *,
    accept: Sequence[str] = (),
    requested_by: str = "",
    patience_seconds: float = float("inf"),
    meanwhile: Callable[[], object] = lambda: None,
) -> Closed:
    """Asks for the close of a period and returns when its documents are final.

    `accept` is what shall not stop it: any of lag, attestations, suspense, drift.  Says what is waited for
    whenever that changes, with what `add` has to add; if that is something, and nothing else changes, for no
    longer than `patience_seconds`.  Does `meanwhile` each time that it has looked.  Raises CloseRefused.
    """
    clickhouse = ClickHouse(settings)
    documents = Documents(clickhouse)
    request = {"period": period, "accept": list(accept), "requested_by": requested_by}
    value = Codec(settings).encode("CloseRequested", request)
    offset = Outbox(settings).deliver(PERIOD_EVENTS, value, key=period)
    said, changed = "", time.monotonic()
    while True:
        answer = documents.answer_since(period, settings.log_generation, offset)
        if answer is not None and answer[0] == "refused":
            raise CloseRefused(f"the close of {period} is refused: {answer[1]}")
        if answer is not None and answer[0] == "closed":
            break
        added = add()
        waits = (answer[1] if answer else f"{period} waits for period-close to take the request") + added
        if waits != said:
            say(waits)
            said, changed = waits, time.monotonic()
        elif added and time.monotonic() - changed > patience_seconds:
            raise CloseRefused(f"the close of {period} was given up after {patience_seconds:.0f} s: {waits}")
        meanwhile()
        time.sleep(_POLL_SECONDS)
    [(count, net, held, drift)] = clickhouse.query(
        "SELECT documents, net_pence, held_pence, toString(round(drift_pence, 2)) FROM periods FINAL"
        " WHERE period = {period:String}",
        {"period": period},
    )
    corrected, billed = documents.evidence.corrections(parse_month(period))
    return Closed(period, count, net, held, drift, corrected, billed, notice=answer[1])
