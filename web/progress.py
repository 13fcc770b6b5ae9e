"""How far the stages are behind the log, asked of the broker."""

from __future__ import annotations

from dataclasses import dataclass

from sinks.positions import place_text
from streams.settings import Settings
from streams.topics import STAGES, Broker


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
