"""The topics, what each is keyed by, and what the broker knows of them: creation, ends, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from aiokafka.partitioner import murmur2
from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from streams.settings import Settings

USAGE = "usage"
CONTRACT_CHANGES = "contract-changes"
REFERENCE_CHANGES = "reference-changes"
PERIOD_EVENTS = "period-events"
#: Internal: usage that intake let through, in blocks, by practice.
USAGE_ACCEPTED = "usage-accepted"
#: Internal: all that the charges of items follow from, by item.
CHARGE_INPUTS = "charge-inputs"
#: Internal: all that allocations are drawn by, by ordering party.
FUNDING_INPUTS = "funding-inputs"
ACCRUALS = "accruals"
INVOICES = "invoices"
DEAD_LETTERS = "dead-letters"

#: Where a producer's own time does not count: "first" is by the broker's (RULES section 1).
_APPENDED_AT = {"message.timestamp.type": "LogAppendTime"}
#: Dead letters carry the original bytes, so they are larger than what any input topic takes.
DEAD_LETTER_MAX_BYTES = 16 * 1024 * 1024
BLOCK_MAX_BYTES = 8 * 1024 * 1024

Place = tuple[str, int]
_COORDINATOR_MOVES = (
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
)


def usage_topics(settings: Settings) -> list[str]:
    """`usage` and every supplier's own topic."""
    return [USAGE, *(f"{USAGE}.{supplier}" for supplier in settings.suppliers_with_topic)]


def input_topics(settings: Settings) -> list[str]:
    """The topics that others write, whose end offsets make a cut."""
    return [*usage_topics(settings), CONTRACT_CHANGES, REFERENCE_CHANGES]


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


def configurations(settings: Settings) -> dict[str, tuple[int, dict[str, str]]]:
    """Every topic with its number of partitions and its configuration."""
    many = settings.partitions
    for_ever = {"retention.ms": "-1"}
    # What lies in the log is in the ledger within seconds; so long an outage may last.
    quarter = {"retention.ms": str(90 * 24 * 3600 * 1000)}
    blocks = {"max.message.bytes": str(BLOCK_MAX_BYTES)}
    return {
        **dict.fromkeys(usage_topics(settings), (many, _APPENDED_AT | quarter | blocks)),
        CONTRACT_CHANGES: (many, _APPENDED_AT | for_ever | blocks),
        REFERENCE_CHANGES: (many, _APPENDED_AT | for_ever | blocks),
        # One partition: periods close in order.
        PERIOD_EVENTS: (1, _APPENDED_AT | for_ever),
        USAGE_ACCEPTED: (many, quarter | blocks),
        CHARGE_INPUTS: (many, quarter | blocks),
        FUNDING_INPUTS: (many, quarter | blocks),
        ACCRUALS: (many, {"cleanup.policy": "compact"}),
        INVOICES: (1, for_ever | blocks),
        DEAD_LETTERS: (1, {"max.message.bytes": str(DEAD_LETTER_MAX_BYTES)}),
    }


@lru_cache(maxsize=100_000)
def partition_for(key: str, partitions: int) -> int:
    """The partition of a key as Java's default partitioner finds it (murmur2); ours all use it."""
    return int((murmur2(key.encode()) & 0x7FFFFFFF) % partitions)


def client_settings(settings: Settings) -> dict[str, str]:
    """librdkafka's connection settings."""
    found = {"bootstrap.servers": settings.kafka, "security.protocol": settings.kafka_security}
    if settings.kafka_sasl_mechanism:
        found |= {
            "sasl.mechanism": settings.kafka_sasl_mechanism,
            "sasl.username": settings.kafka_username,
            "sasl.password": settings.kafka_password,
        }
    return found


class Broker:
    """What is asked of the broker apart from records: topics, end offsets, committed offsets."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._admin = AdminClient(client_settings(settings) | {"log_level": "0"})
        self._groups: dict[str, Consumer] = {}

    def create_topics(self) -> list[str]:
        """Creates the topics that are missing; returns their names."""
        wanted = [
            NewTopic(name, partitions, self._settings.replication, config=config)
            for name, (partitions, config) in configurations(self._settings).items()
        ]
        created = []
        for name, future in self._admin.create_topics(wanted, operation_timeout=30).items():
            try:
                future.result()
                created.append(name)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
        return created

    def nodes(self) -> int:
        """How many brokers there are.  Raises KafkaException when none answers."""
        return len(self._admin.list_topics(timeout=10).brokers)

    def members(self, group: str) -> int | None:
        """How many workers a consumer group has; None where the broker does not say."""
        if self._admin.list_topics(timeout=10).cluster_id == "tansu_cluster":
            return None  # it calls every group empty
        try:
            described = self._admin.describe_consumer_groups([group], request_timeout=5)[group].result()
        except KafkaException:
            return None
        return len(described.members)

    def topic_configurations(self) -> dict[str, tuple[int, dict[str, str]]]:
        """Every topic with its number of partitions and its configuration."""
        topics = self._admin.list_topics(timeout=10).topics
        asked = [ConfigResource(ResourceType.TOPIC, name) for name in topics if not name.startswith("__")]
        found = self._admin.describe_configs(asked, request_timeout=10) if asked else {}
        return {
            resource.name: (
                len(topics[resource.name].partitions),
                {name: entry.value for name, entry in future.result().items() if entry.value is not None},
            )
            for resource, future in found.items()
        }

    def partitions(self, topics: Iterable[str]) -> list[Place]:
        """Every partition of these topics.  Raises KafkaException for one that does not exist."""
        found = []
        for topic in topics:
            metadata = self._admin.list_topics(topic, timeout=10).topics[topic]
            if metadata.error is not None:
                raise KafkaException(metadata.error)
            found += [(topic, partition) for partition in sorted(metadata.partitions)]
        return found

    def topic_ids(self, topics: Iterable[str]) -> dict[str, str]:
        """What tells a topic from another of the same name that is made later; a broker without ids has none."""
        futures = self._admin.describe_topics(TopicCollection([*topics]), request_timeout=10)
        found = {name: future.result().topic_id for name, future in futures.items()}
        return {name: str(number) for name, number in found.items() if number is not None}

    def first_offsets(self, topics: Iterable[str]) -> dict[Place, int]:
        """The offset of the oldest record that each partition still has, or will have."""
        asked = {TopicPartition(*place): OffsetSpec.earliest() for place in self.partitions(topics)}
        return {
            (place.topic, place.partition): max(0, future.result().offset)
            for place, future in self._admin.list_offsets(asked, request_timeout=10).items()
        }

    def record_at(self, place: Place, offset: int) -> bytes | None:
        """The value of one record; None when there is none at this offset any more."""
        settings = {"group.id": "tribill-ends", "enable.auto.commit": "false", "enable.partition.eof": "true"}
        settings |= {"fetch.wait.max.ms": "20", "auto.offset.reset": "error", "log_level": "0"}
        consumer = Consumer(client_settings(self._settings) | settings)
        try:
            consumer.assign([TopicPartition(*place, offset)])
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                message = consumer.poll(0.2)
                if message is None:
                    continue
                if message.error() is not None or message.offset() != offset:
                    return None
                return bytes(message.value()) if message.value() is not None else None
            raise TimeoutError(f"{place[0]}/{place[1]} offset {offset} was not read in 30 s")
        finally:
            consumer.close()

    def end_offsets(self, topics: Iterable[str]) -> dict[Place, int]:
        """The offset that the next record of each partition will have."""
        asked = {TopicPartition(*place): OffsetSpec.latest() for place in self.partitions(topics)}
        ends = {
            (place.topic, place.partition): max(0, future.result().offset)
            for place, future in self._admin.list_offsets(asked, request_timeout=10).items()
        }
        return ends | self._read_to_end({place: end - 1 for place, end in ends.items() if end})

    def _read_to_end(self, starts: Mapping[Place, int]) -> dict[Place, int]:
        # Tansu answers ListOffsets with one past the *first* record of the last batch, so the tail
        # of each partition is read to its end; with Kafka that is one record.
        if not starts:
            return {}
        settings = {"group.id": "tribill-ends", "enable.auto.commit": "false", "enable.partition.eof": "true"}
        settings |= {"fetch.wait.max.ms": "20"}
        consumer = Consumer(client_settings(self._settings) | settings | {"log_level": "0"})
        ends: dict[Place, int] = {}
        try:
            consumer.assign([TopicPartition(*place, offset) for place, offset in starts.items()])
            deadline = time.monotonic() + 30
            while len(ends) < len(starts):
                for message in consumer.consume(10_000, 0.2):
                    error = message.error()
                    if error is not None and error.code() == KafkaError._PARTITION_EOF:
                        ends[message.topic(), message.partition()] = message.offset()
                    elif error is not None:
                        raise KafkaException(error)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the end of {sorted(starts.keys() - ends.keys())} was not reached in 30 s")
        finally:
            consumer.close()
        return ends

    def committed(self, group: str, places: Iterable[Place]) -> dict[Place, int]:
        """The offset that a consumer group will read next; 0 where it has committed nothing."""
        return {place: max(0, offset) for place, offset in self._committed(group, places).items()}

    def committed_at_all(self, group: str, places: Iterable[Place]) -> dict[Place, int]:
        """The same, without the partitions of which the group has committed nothing."""
        return {place: offset for place, offset in self._committed(group, places).items() if offset >= 0}

    def _committed(self, group: str, places: Iterable[Place]) -> dict[Place, int]:
        # The admin client of librdkafka ends the process where a group's coordinator has just moved
        # (its handler of such an answer needs a consumer); a consumer that never joins asks again.
        if group not in self._groups:
            own = {"group.id": group, "enable.auto.commit": "false", "log_level": "0"}
            self._groups[group] = Consumer(client_settings(self._settings) | own)
        asked = [TopicPartition(*place) for place in places]
        deadline = time.monotonic() + 30
        while True:
            try:
                found = self._groups[group].committed(asked, timeout=30)
                break
            except KafkaException as error:
                # A broker that has just started has yet to find who coordinates the group.
                if error.args[0].code() not in _COORDINATOR_MOVES or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        for each in found:
            if each.error is not None:
                raise KafkaException(each.error)
        return {(each.topic, each.partition): each.offset for each in found}

    def behind(self, group: str, ends: Mapping[Place, int]) -> int:
        """How many records a group has still to do up to these offsets."""
        done = self.committed(group, ends)
        return sum(max(0, end - done.get(place, 0)) for place, end in ends.items())
