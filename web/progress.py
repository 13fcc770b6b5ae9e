"""How far the stages are behind the log, asked of the broker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sinks.positions import place_text
from streams.settings import Settings
from streams.topics import (
    CHARGE_INPUTS,
    CONTRACT_CHANGES,
    FUNDING_INPUTS,
    PERIOD_EVENTS,
    REFERENCE_CHANGES,
    USAGE_ACCEPTED,
    Broker,
    usage_topics,
)

#: The order in which a record passes the stages, each with what it reads.
STAGES: tuple[tuple[str, Callable[[Settings], list[str]]], ...] = (
    ("intake", usage_topics),
    ("contracts", lambda settings: [CONTRACT_CHANGES]),
    ("reference", lambda settings: [REFERENCE_CHANGES]),
    ("usage", lambda settings: [USAGE_ACCEPTED]),
    ("charges", lambda settings: [CHARGE_INPUTS]),
    ("funding", lambda settings: [FUNDING_INPUTS]),
    ("period-close", lambda settings: [PERIOD_EVENTS]),
)


@dataclass(frozen=True, slots=True)
class Progress:
    """What each stage has still to do, by topic; and up to where usage is settled, if it is."""

    behind: dict[str, dict[str, int]]
    #: End offsets of the usage topics up to which every record is in the ledger, refused or a duplicate.
    settled: dict[str, int] | None

    def stage(self, name: str) -> int:
        """What a stage has still to do."""
        return sum(self.behind[name].values())


def progress(broker: Broker, settings: Settings) -> Progress:
    """Asks the broker; takes as long as that does.  Raises KafkaException, TimeoutError."""
    behind: dict[str, dict[str, int]] = {}
    read: dict[str, int] = {}
    for stage, topics_of in STAGES:
        topics = topics_of(settings)
        ends = broker.end_offsets(topics)
        done = broker.committed(f"tribill-{stage}", ends)
        behind[stage] = dict.fromkeys(topics, 0)
        for place, end in ends.items():
            behind[stage][place[0]] += max(0, end - done.get(place, 0))
        if stage == "intake":
            read = {place_text(*place): offset for place, offset in done.items()}
    # Intake's offsets were taken before usage was found to have nothing left, so what they cover is done.
    settled = read if not any(behind["usage"].values()) else None
    return Progress(behind, settled)
