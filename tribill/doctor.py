"""What is wrong with an installation: every part looked at once, each answer with what to do about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import TYPE_CHECKING, Literal

from confluent_kafka import KafkaException

from rating.amounts import micros_text
from sinks.clickhouse import ClickHouse, LedgerUnavailable
from sinks.dead_letters import LetterBox, LetterFilter
from sinks.ledger import Ledger
from streams.settings import Settings
from streams.topics import PERIOD_EVENTS, STAGES, Broker, configurations

if TYPE_CHECKING:
    from agents.context import Context

Level = Literal["ok", "warning", "fault"]
#: Beyond this clocks decide differently which of two readings came first, or whether one is too early.
_SKEW_SECONDS = 5.0
_RECONCILED_WITHIN = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `cure` says what to do where it is not ok."""

    level: Level
    part: str
    text: str
    cure: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Looks at every part, as far as it can be reached; changes nothing."""
    clickhouse, log = ClickHouse(settings), Broker(settings)
    log_answers = ledger_answers = False
    for finding in _guarded("broker", lambda: _broker(log)):
        log_answers = finding.level == "ok"
        yield finding
    for finding in _guarded("ledger", lambda: _ledger(clickhouse, settings)):
        ledger_answers = ledger_answers or finding.level == "ok"
        yield finding
    yield from _guarded("redis", lambda: _redis(settings))
    topics_are_there = False
    if log_answers:
        for finding in _guarded("topics", lambda: _topics(log, settings)):
            topics_are_there = topics_are_there or finding.level == "ok"
            yield finding
    if topics_are_there:
        yield from _guarded("groups", lambda: _groups(log, settings))
    if ledger_answers:
        if topics_are_there:
            yield from _guarded("positions", lambda: _positions(log, settings))
        yield from _guarded("schemas", lambda: _schemas(settings))
        yield from _guarded("clocks", lambda: _clocks(clickhouse))
        yield from _guarded("refused", lambda: _refused(clickhouse))
        yield from _guarded("suspense", lambda: _suspense(clickhouse))
        yield from _guarded("drift", lambda: _drift(clickhouse))


def _guarded(part: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a look finds; that it could not be taken is a fault of its own."""
    try:
        yield from look()
    except (KafkaException, LedgerUnavailable, OSError, ValueError) as error:
        yield Finding("fault", part, f"could not be looked at: {str(error)[:300]}", "mend this and ask again")


def _broker(broker: Broker) -> Iterator[Finding]:
    started = time.monotonic()
    nodes = broker.nodes()
    yield Finding("ok", "broker", f"{nodes} nodes answer in {1000 * (time.monotonic() - started):.0f} ms")


def _ledger(clickhouse: ClickHouse, settings: Settings) -> Iterator[Finding]:
    cure = "run `tribill migrate`"
    if not clickhouse.exists():
        yield Finding("fault", "ledger", f"has no tables in the database {clickhouse.database}", cure)
        return
    done = {name for (name,) in clickhouse.query("SELECT name FROM migrations")}
    files = {file.name for file in resources.files("sinks").joinpath("migrations").iterdir()}
    if missing := sorted(name for name in files if name.endswith(".sql") and name not in done):
        yield Finding("fault", "ledger", f"lacks the migrations {', '.join(missing)}", cure)
        return
    [(rows, newest)] = clickhouse.query("SELECT count(), max(generation) FROM usage")
    yield Finding("ok", "ledger", f"answers, migrated up to {max(done)}; {rows} readings")
    if newest > settings.log_generation:
        yield Finding(
            "fault",
            "ledger",
            f"has readings of log generation {newest}, but the setting says {settings.log_generation}",
            f"set TRIBILL_LOG_GENERATION to {newest} everywhere",
        )


def _redis(settings: Settings) -> Iterator[Finding]:
    from sinks.claims import inspect

    found = inspect(settings)
    since = found.complete_since
    known = f"claims are complete since {since:%Y-%m-%d %H:%M} UTC" if since else "no claim was made since it started"
    if since == datetime.fromtimestamp(0, UTC):
        known = "claims are complete"
    yield Finding("ok", "redis", f"answers; {known}")
    if found.evicts:
        yield Finding(
            "fault",
            "redis",
            f"has maxmemory-policy {found.policy} and may throw claims away",
            "set maxmemory-policy to noeviction",
        )
    if found.persists:
        yield Finding(
            "warning",
            "redis",
            "writes its data to disk, which costs time and is never needed",
            "switch save and AOF off",
        )
    if abs(found.ahead_seconds) > _SKEW_SECONDS + found.uncertain_seconds:
        yield _skew("redis", found.ahead_seconds)


def _topics(broker: Broker, settings: Settings) -> Iterator[Finding]:
    cure = "run `tribill migrate`"
    wanted = configurations(settings)
    there = broker.topic_configurations()
    good = 0
    for topic, (partitions, configuration) in wanted.items():
        if topic not in there:
            yield Finding("fault", "topics", f"{topic} does not exist", cure)
            continue
        found, values = there[topic]
        if found != partitions:
            yield Finding(
                "fault",
                "topics",
                f"{topic} has {found} partitions, the settings say {partitions}",
                "set TRIBILL_PARTITIONS to what the topics have",
            )
            continue
        good += 1
        for name in ("message.timestamp.type", "cleanup.policy"):
            if name in configuration and values.get(name, configuration[name]) != configuration[name]:
                yield Finding(
                    "fault",
                    "topics",
                    f"{topic} has {name} {values[name]}, not {configuration[name]}",
                    f"kafka-configs --alter --entity-type topics --entity-name {topic} --add-config "
                    f"{name}={configuration[name]}",
                )
        kept, needed = int(values.get("retention.ms", "-1")), int(configuration.get("retention.ms", "0"))
        if kept >= 0 and (needed < 0 or kept < needed):
            yield Finding(
                "warning",
                "topics",
                f"{topic} keeps records for {kept / 86_400_000:.1f} days only",
                f"kafka-configs --alter --entity-type topics --entity-name {topic} --add-config retention.ms={needed}",
            )
    if good == len(wanted):
        yield Finding("ok", "topics", f"all {good} are there, with the partitions of the settings")


def _groups(broker: Broker, settings: Settings) -> Iterator[Finding]:
    stages = [*STAGES, ("reconcile", lambda settings: [PERIOD_EVENTS])]
    for role, topics_of in stages:
        places = broker.partitions(topics_of(settings))
        ends = broker.end_offsets(topics_of(settings))
        behind = broker.behind(f"tribill-{role}", ends) if role != "reconcile" else 0
        members = broker.members(f"tribill-{role}")
        todo = f"{behind} records to do"
        if members == 0:
            yield Finding("fault", "groups", f"{role}: no worker; {todo}", f"start `tribill worker {role}`")
        elif members is None:
            yield Finding("ok", "groups", f"{role}: {todo} (the broker does not say who works)")
        elif members > len(places):
            text = f"{role}: {members} workers for {len(places)} partitions; {todo}"
            yield Finding("warning", "groups", text, "those beyond stand by; stop them or leave them so")
        else:
            yield Finding("ok", "groups", f"{role}: {members} workers; {todo}")


def _positions(log: Broker, settings: Settings) -> Iterator[Finding]:
    from agents.context import Context
    from agents.start import faults_of_log

    context: Context = Context("doctor", settings)
    faults = 0
    for role, topics_of in STAGES:
        for fault in faults_of_log(role, topics_of(settings), log, context):
            faults += 1
            text, _, cure = fault.partition(".  ")
            yield Finding("fault", "positions", f"{role}: {text}", cure or "see docs/operations.md, section 9")
    if not faults:
        yield Finding("ok", "positions", "ledger, topics and committed offsets belong together")


def _schemas(settings: Settings) -> Iterator[Finding]:
    from agents.context import Context
    from agents.start import faults_of_schemas

    faults = [*faults_of_schemas(Context("doctor", settings))]
    for fault in faults:
        text, _, cure = fault.partition(".  ")
        yield Finding("fault", "schemas", text, cure)
    if not faults:
        where = "the registry takes them" if settings.schema_registry else "no registry is set"
        yield Finding("ok", "schemas", f"are those that were released; {where}")


def _clocks(clickhouse: ClickHouse) -> Iterator[Finding]:
    before = time.time()
    [(there, newest)] = clickhouse.query(
        "SELECT toUnixTimestamp64Milli(now64(3)) / 1000,"
        " (SELECT max(broker_timestamp_ms) FROM usage WHERE accepted_offset >= 0) / 1000"
    )
    after = time.time()
    ahead = float(there) - (before + after) / 2
    if abs(ahead) > _SKEW_SECONDS + (after - before) / 2:
        yield _skew("clickhouse", ahead)
    elif float(newest) > time.time() + _SKEW_SECONDS:
        yield _skew("the broker (by the newest reading)", float(newest) - time.time())
    else:
        yield Finding("ok", "clocks", f"this machine and ClickHouse agree within {max(abs(ahead), 0.01):.2f} s")


def _skew(where: str, ahead: float) -> Finding:
    text = f"{where}: {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine"
    return Finding("fault", "clocks", text, "let all machines keep time by NTP")


def _refused(clickhouse: ClickHouse) -> Iterator[Finding]:
    box = LetterBox(clickhouse)
    waiting = box.count(LetterFilter(waiting=True))
    lately = box.count(LetterFilter(since=datetime.now(UTC) - timedelta(days=1)))
    text = f"{waiting} dead letters wait, {lately} came in the last day"
    yield Finding(
        "warning" if waiting else "ok", "refused", text, "tribill dead-letters list --waiting" if waiting else ""
    )


def _suspense(clickhouse: ClickHouse) -> Iterator[Finding]:
    services = Ledger(clickhouse).totals_not_counted()
    quantity = micros_text(sum(sum(days.values()) for days in services.values()))
    if services:
        text = f"usage of {len(services)} items at practices is not all counted (of {quantity} units in all)"
        yield Finding("warning", "suspense", text, "tribill suspense list")
    else:
        yield Finding("ok", "suspense", "no usage waits for a contract")


def _drift(clickhouse: ClickHouse) -> Iterator[Finding]:
    closed = clickhouse.query("SELECT period, drift_pence FROM periods FINAL ORDER BY period DESC LIMIT 1")
    if closed and closed[0][1]:
        text = f"the close of {closed[0][0]} found {closed[0][1]} pence between accruals and ledger"
        yield Finding("fault", "drift", text, "report it with the logs of charges and period-close")
    [(partitions, drifting, pence, at)] = clickhouse.query(
        "SELECT count(), sum(drifting), sum(drift_pence), max(at) FROM reconciliations FINAL"
    )
    if not partitions:
        yield Finding(
            "warning", "drift", "nothing was reconciled yet", "start `tribill worker reconcile`, or wait a minute"
        )
        return
    age = datetime.now(UTC) - at.replace(tzinfo=UTC)
    minutes = int(age.total_seconds() // 60)
    text = f"{drifting} months of lines differ, by {pence.normalize():f} pence, as compared {minutes} minutes ago"
    if age > _RECONCILED_WITHIN:
        yield Finding("warning", "drift", text, "start `tribill worker reconcile`, or read its log")
    elif drifting:
        yield Finding("warning", "drift", text, "they are being rated again; ask again in some minutes")
    else:
        yield Finding("ok", "drift", text)
