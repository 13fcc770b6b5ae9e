"""What is checked before an agent takes its first record: that log, ledger and schemas belong together.

Each check answers with a sentence that says what is wrong and what to do; read on instead, an agent
would take new records for known ones, leave some out, or write what nobody can read (promise 2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import polars as pl
import pyarrow as pa

from agents.context import Context
from sinks.accruals import Accruals
from streams.agent import Agent
from streams.codec import Undecodable, released, schema_source, to_interchange
from streams.settings import SettingsError
from streams.topics import (
    CHARGE_INPUTS,
    CONTRACT_CHANGES,
    FUNDING_INPUTS,
    PERIOD_EVENTS,
    REFERENCE_CHANGES,
    USAGE_ACCEPTED,
    Broker,
    Place,
    configurations,
)

_CHANGES = {CONTRACT_CHANGES: ("ContractChange", "order_number"), REFERENCE_CHANGES: ("ReferenceChange", "code")}
#: What makes the records of a topic that only tribill writes, should they be lost.
_MADE_BY = {
    USAGE_ACCEPTED: "intake",
    CHARGE_INPUTS: "usage, contracts and reference",
    FUNDING_INPUTS: "charges and reference",
}
#: Of the last block of usage that was done so many readings are looked for.
_LOOKED_FOR = 100


def check_start(agent: Agent, context: Context) -> None:
    """Raises SettingsError with the first thing that is wrong; what is new in log and schemas is noted."""
    broker = Broker(context.settings)
    for fault in (*faults_of_schemas(context), *faults_of_log(agent.role, agent.topics(), broker, context)):
        raise SettingsError(fault)
    ledger, generation = context.ledger, context.settings.log_generation
    known = ledger.known_topics(generation)
    ids = broker.topic_ids(agent.topics())
    ledger.note_topics(generation, {topic: number for topic, number in ids.items() if topic not in known})
    schemas = ledger.known_schemas()
    ledger.note_schemas({number: each for number, each in _schemas().items() if number not in schemas})


def faults_of_log(role: str, topics: Sequence[str], broker: Broker, context: Context) -> Iterator[str]:
    """What of the topics that a role reads is not as settings and ledger have it."""
    places = broker.partitions(topics)
    yield from _wrong_partitions(topics, places, context)
    ends, firsts = broker.end_offsets(topics), broker.first_offsets(topics)
    stands = broker.committed_at_all(f"tribill-{role}", places)
    anew = [*_made_anew(topics, ends, stands, broker, context)]
    yield from anew
    if anew:
        return
    yield from _retention_ran_past(role, firsts, stands, context)
    for place, offset in stands.items():
        if offset > firsts[place] and not _was_done(role, place, offset, broker, context):
            yield (
                f"the ledger lacks what the role {role} has done of {place[0]} in partition {place[1]} before offset "
                f"{offset}: it was restored from an older backup, or is another database.  Name the right one in "
                f"TRIBILL_CLICKHOUSE; or stop all workers and set the offsets of all groups tribill-* back to before "
                f"the backup was taken (docs/operations.md, section 10): what is read twice does no harm"
            )


def _wrong_partitions(topics: Sequence[str], places: Sequence[Place], context: Context) -> Iterator[str]:
    for topic in topics:
        there, wanted = sum(place[0] == topic for place in places), configurations(context.settings)[topic][0]
        if there != wanted:
            yield (
                f"the topic {topic} has {there} partitions, the setting `partitions` says {wanted}: set "
                f"TRIBILL_PARTITIONS to what the topics have; another number needs a new TRIBILL_LOG_GENERATION"
            )


def _made_anew(
    topics: Sequence[str], ends: Mapping[Place, int], stands: Mapping[Place, int], broker: Broker, context: Context
) -> Iterator[str]:
    """A topic that was made anew has another id, or ends before what ledger or group know of it."""
    ledger, generation = context.ledger, context.settings.log_generation
    cure = (
        f"it was made anew.  Raise TRIBILL_LOG_GENERATION to {generation + 1} on all workers, delete the consumer "
        "groups tribill-*, and have sent again what the old topic still held"
    )
    known = ledger.known_topics(generation)
    for topic, number in broker.topic_ids(topics).items():
        if known.get(topic, number) != number:
            yield (
                f"the topic {topic} has the id {number}, but had {known[topic]} when it was first read in log "
                f"generation {generation}: {cure}"
            )
    seen = ledger.positions_seen(generation)
    if USAGE_ACCEPTED in topics:
        seen |= ledger.positions_accepted(generation)
    for place, end in ends.items():
        topic, partition = place
        if end < (counted := seen.get(f"{topic}/{partition}", 0)):
            yield (
                f"the topic {topic} ends at offset {end} in partition {partition}, but the ledger has records of it "
                f"up to {counted} in log generation {generation}: {cure}"
            )
        elif end < stands.get(place, 0):
            yield (
                f"the topic {topic} ends at offset {end} in partition {partition}, but was read up to "
                f"{stands[place]}: {cure}"
            )


def _retention_ran_past(
    role: str, firsts: Mapping[Place, int], stands: Mapping[Place, int], context: Context
) -> Iterator[str]:
    for (topic, partition), first in firsts.items():
        if first > (stand := stands.get((topic, partition), first)):
            again = (
                f"set the offsets of {_MADE_BY[topic]} back, so that they are made again"
                if topic in _MADE_BY
                else "have them sent again"
            )
            yield (
                f"the broker has deleted the records {stand} to {first - 1} of {topic} in partition {partition} "
                f"before the role {role} did them (retention): {again}, and give the topic a longer retention.ms.  To "
                f"go on from {first}: kafka-consumer-groups --bootstrap-server {context.settings.kafka} --group "
                f"tribill-{role} --topic {topic}:{partition} --reset-offsets --to-earliest --execute"
            )


def _was_done(role: str, place: Place, offset: int, broker: Broker, context: Context) -> bool:
    """Whether the ledger knows of the last record that a role has done; of what leaves no trace, True."""
    topic, partition = place
    ledger, generation = context.ledger, context.settings.log_generation
    if role == "charges":
        counted = Accruals(context.clickhouse).newest(partition, generation)
        return counted is not None and counted[0] >= offset
    if role not in ("usage", "contracts", "reference", "period-close"):
        return True
    value = broker.record_at(place, offset - 1)
    if role == "usage":
        return value is None or _has_readings(value, offset, context)
    if value is None or ledger.has_done(topic, generation, partition, offset - 1):
        return True
    try:
        if topic == PERIOD_EVENTS:
            decoded = context.codec.decode(value, ("PeriodClosed",))
            return ledger.has_period(decoded.value["period"])
        name, key = _CHANGES[topic]
        change = to_interchange(name, context.codec.decode(value, (name,)).value)
    except Undecodable:
        return False  # whatever could not be read is a dead letter
    return ledger.has_change(topic, change[key], change["id"])


def _has_readings(block: bytes, offset: int, context: Context) -> bool:
    with pa.ipc.open_stream(block) as reader:
        rows = pl.DataFrame(reader.read_all())
    wanted = rows.head(_LOOKED_FOR).select("ods_code", "supplier_id", "id").unique() if rows.height else rows
    if not wanted.height:
        return True
    found = context.ledger.known_usage(wanted, context.settings.log_generation, offset)
    return found.select("ods_code", "supplier_id", "id").unique().height == wanted.height


def faults_of_schemas(context: Context) -> Iterator[str]:
    """Schemas that are not what they were when records were written by them."""
    for number, (name, source) in _newest().items():
        if source != schema_source(name):
            yield (
                f"schemas/avro/{name}.avsc differs from the version that is released under the id {number}: records "
                f"would be written that nobody can read.  Release it as schemas/released/"
                f"{max(released()) + 1:03}-{name}.avsc"
            )
    ours = _schemas()
    for number, known in context.ledger.known_schemas().items():
        if number not in ours:
            yield (
                f"a newer tribill has worked on this ledger: it had the schema {known[0]} with the id {number}, which "
                "this version cannot read.  Run that version, or a newer one"
            )
        elif ours[number] != known:
            yield (
                f"the schema {ours[number][0]} with the id {number} is not what it was when it was released: records "
                f"written by it can no longer be read.  Put schemas/released/{number:03}-{known[0]}.avsc back as it "
                "was, and release the change under a new id"
            )
    for name in context.codec.incompatible():
        yield (
            f"the schema registry does not take this version's {name} as compatible with what is registered as "
            f"tribill.{name}: another version of tribill registered it.  Run that version, or delete what was "
            "registered by mistake"
        )


def _newest() -> dict[int, tuple[str, object]]:
    newest = {name: number for number, (name, _) in released().items()}
    return {number: released()[number] for number in newest.values()}


def _schemas() -> dict[int, tuple[str, str]]:
    return {
        number: (name, hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest())
        for number, (name, source) in released().items()
    }
