"""Records on their way to Kafka: sent together, and done only when the broker has acknowledged all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from confluent_kafka import KafkaException, Producer

from streams.settings import Settings
from streams.topics import DEAD_LETTER_MAX_BYTES, client_settings

log = structlog.get_logger(__name__)


class DeliveryFailed(Exception):
    """The broker did not take a record; nothing that follows from it may be acknowledged."""

    sink = "kafka"


class Outbox:
    """Sends records and waits until the broker has acknowledged every one.

    Uses Java's partitioner (murmur2), so that a key lands where every other client puts it.
    """

    def __init__(self, settings: Settings) -> None:
        self._producer = Producer(
            client_settings(settings)
            | {
                "partitioner": "murmur2_random",
                "acks": "all",
                "enable.idempotence": "true",
                "compression.type": "lz4",
                "linger.ms": "5",
                "message.max.bytes": str(DEAD_LETTER_MAX_BYTES),
                "queue.buffering.max.messages": "500000",
                "queue.buffering.max.kbytes": "262144",
                "log_level": "0",
            }
        )
        self._errors: list[str] = []

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: str | bytes | None = None,
        partition: int = -1,
        timestamp_ms: int = 0,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """Hands a record over; blocks while the buffer is full."""
        while True:
            try:
                self._producer.produce(
                    topic,
                    value,
                    key,
                    partition,
                    timestamp=timestamp_ms,
                    headers=list(headers),
                    on_delivery=self._delivered,
                )
                return
            except BufferError:
                self._producer.poll(0.1)

    def deliver(self, topic: str, value: bytes, *, key: str) -> int:
        """Sends one record and returns its offset when the broker has acknowledged it."""
        delivered: list[int] = []

        def on_delivery(error: object, message: Any) -> None:
            if error is None:
                delivered.append(message.offset())

        self._producer.produce(topic, value, key, on_delivery=on_delivery)
        self._producer.flush()
        if not delivered:
            raise DeliveryFailed(f"a record for {topic} was not taken by the broker")
        return delivered[0]

    def flush(self) -> None:
        """Returns when every record sent is acknowledged.  Raises DeliveryFailed if one was not."""
        self._producer.flush()
        if self._errors:
            errors, self._errors = self._errors, []
            raise DeliveryFailed("; ".join(sorted(set(errors))))

    def _delivered(self, error: KafkaException | None, _message: object) -> None:
        if error is not None:
            self._errors.append(str(error))
