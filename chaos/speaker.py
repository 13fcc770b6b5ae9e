"""Those who write to the input topics: they send the book and remember what they said, by number.

Each record carries its number in a header, so the checker knows of every record of the log what was meant
by it, without any decoder of tribill's.
"""

from __future__ import annotations

from typing import Any

from confluent_kafka import Producer

from chaos.book import Garbage
from streams.codec import Codec
from streams.settings import Settings
from streams.topics import DEAD_LETTER_MAX_BYTES, PERIOD_EVENTS, client_settings
from tribill import interchange

NUMBER = "number"


class Speaker(interchange.Publisher):
    """Sends interchange lines as `tribill publish` would, numbered."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._codec = Codec(settings)
        #: What was meant by each record: its line, or None for garbage and period events of ours.
        self.said: list[dict[str, Any] | Garbage | None] = []
        self.failed: list[str] = []
        self._producer = Producer(
            client_settings(settings)
            | {
                "partitioner": "murmur2_random",
                "acks": "all",
                "enable.idempotence": "true",
                "message.timeout.ms": "600000",
                "message.max.bytes": str(DEAD_LETTER_MAX_BYTES),
                "log_level": "0",
            }
        )

    def say(self, line: dict[str, Any] | Garbage) -> None:
        """Sends a line of the book."""
        if isinstance(line, Garbage):
            self._produce(line, line.topic, line.key, line.value)
        else:
            self.send_record(line["topic"], line["value"])

    def ask_to_close(self, period: str) -> None:
        """Sends a CloseRequested."""
        self._produce(None, PERIOD_EVENTS, period.encode(), self._codec.encode("CloseRequested", {"period": period}))

    def wait(self) -> None:
        """Returns when the broker has everything.  Raises RuntimeError when it did not take something."""
        self._producer.flush()
        if self.failed:
            raise RuntimeError(f"{len(self.failed)} records were not taken by the broker: {self.failed[0]}")

    def _send(self, line: interchange.Line, timestamp_ms: int) -> None:
        key, value = self._encode(line)
        self._produce(
            {"topic": line.topic, "value": line.value}, line.topic, None if key is None else key.encode(), value
        )

    def _produce(
        self, meant: dict[str, Any] | Garbage | None, topic: str, key: bytes | None, value: bytes | None
    ) -> None:
        number = str(len(self.said)).encode()
        self.said.append(meant)
        self._producer.produce(topic, value, key, headers=[(NUMBER, number)], on_delivery=self._delivered)
        self._producer.poll(0)

    def _delivered(self, error: object, _message: object) -> None:
        if error is not None:
            self.failed.append(str(error))
