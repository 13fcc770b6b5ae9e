"""Whether every partition that a worker holds moves; a worker that is alive may yet stand still."""

from __future__ import annotations

from collections.abc import Mapping

from streams.topics import Place


class Progress:
    """Remembers since when each partition that has records to do has not moved."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        #: By partition, up to where it is done, and since when that is so while there is more to do.
        self._stands: dict[Place, tuple[int, float]] = {}

    def look(self, partitions: Mapping[Place, tuple[int, int]], now: float) -> None:
        """Takes in what of each partition is done and where it ends; others are not held any more."""
        stands = {}
        for place, (done, end) in partitions.items():
            before, since = self._stands.get(place, (-1, now))
            stands[place] = (done, since if done == before and done < end else now)
        self._stands = stands

    def waits(self, now: float) -> None:
        """What is in hand waits for others, which is no standing still."""
        self._stands = {place: (done, now) for place, (done, _) in self._stands.items()}

    def stuck(self, now: float) -> list[str]:
        """The partitions that have had work and not moved for too long."""
        return [
            f"{topic}/{partition}"
            for (topic, partition), (_, since) in sorted(self._stands.items())
            if now - since > self._seconds
        ]
