"""A worker that would read a log that its ledger does not know refuses to start, with what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path

import polars as pl
import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition

from agents.context import Context
from agents.intake import Intake, encode_block
from agents.start import check_start
from agents.usage import Usage
from sinks.accruals import Accruals
from sinks.claims import Claims
from sinks.clickhouse import ClickHouse
from sinks.dead_letters import DeadLetter
from sinks.ledger import USAGE_SCHEMA, Ledger, SaidChange
from streams.codec import from_interchange, released
from streams.producer import Outbox
from streams.settings import Settings, SettingsError
from streams.topics import (
    CHARGE_INPUTS,
    CONTRACT_CHANGES,
    FUNDING_INPUTS,
    REFERENCE_CHANGES,
    USAGE,
    USAGE_ACCEPTED,
    Broker,
    client_settings,
)
from streams.worker import BROKEN_EXIT
from tests.kafka.broker import JARS, kafka
from tribill.embedded.stack import EmbeddedStack
from tribill.roles import ROLES


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A stack with tables and topics, and usage in the ledger up to offset 2 of `usage/0`."""
    with EmbeddedStack(tmp_path_factory.mktemp("stack")) as stack:
        found = Settings(kafka=stack.kafka, clickhouse=stack.clickhouse, redis=stack.redis, partitions=2)
        context = Context("intake", found)
        context.clickhouse.migrate()
        Broker(found).create_topics()
        at = datetime(2026, 4, 3, tzinfo=UTC)
        row = {
            "ods_code": "A83005", "supplier_id": "10000", "id": "u1", "revision": 0, "generation": 1,
            "topic": USAGE, "partition": 0, "offset": 1, "index": 0, "broker_timestamp_ms": 0,
            "accepted_partition": 0, "accepted_offset": 0, "item_id": "10000-S-001", "quantity_micros": 1,
            "occurred_at": at, "day": at.date(),
        }  # fmt: skip
        context.ledger.insert_usage(pl.DataFrame([row]).select(USAGE_SCHEMA.names).to_arrow())
        yield found


def test_a_topic_made_anew_is_an_error(settings: Settings) -> None:
    """The ledger knows two records of a partition that ends at 0: read on, new ones would pass for known."""
    context = Context("intake", settings)
    with pytest.raises(SettingsError, match=r"usage ends at offset 0 in partition 0.*TRIBILL_LOG_GENERATION to 2"):
        check_start(Intake(context), context)
    context = Context("usage", settings)
    with pytest.raises(SettingsError, match="usage-accepted ends at offset 0"):
        check_start(Usage(context), context)


def test_a_new_generation_is_accepted(settings: Settings) -> None:
    """With the next log generation the same topics are a new log."""
    context = Context("intake", replace(settings, log_generation=2))
    check_start(Intake(context), context)


def test_another_number_of_partitions_is_an_error(settings: Settings) -> None:
    """With another number of partitions a practice's usage would have two owners."""
    context = Context("intake", replace(settings, log_generation=2, partitions=3))
    with pytest.raises(SettingsError, match="has 2 partitions, the setting `partitions` says 3"):
        check_start(Intake(context), context)


_numbers = count(1)


@pytest.fixture
def fresh(settings: Settings) -> Settings:
    """The same log, over an empty ledger: as when another database is named."""
    found = replace(settings, clickhouse=f"{settings.clickhouse}/start{next(_numbers)}")
    ClickHouse(found).migrate()
    return found


def commit(settings: Settings, role: str, place: tuple[str, int], offset: int) -> None:
    """Commits an offset as the role's worker would."""
    consumer = Consumer(client_settings(settings) | {"group.id": f"tribill-{role}", "log_level": "0"})
    consumer.commit(offsets=[TopicPartition(*place, offset)], asynchronous=False)
    consumer.close()


def leaders(broker: Broker) -> None:
    """Waits until new topics have leaders."""
    while True:
        try:
            broker.end_offsets([USAGE, REFERENCE_CHANGES])
            return
        except KafkaException:
            time.sleep(0.1)


def refused(role: str, settings: Settings) -> str:
    """The sentence with which a worker refuses to start; "" when it starts."""
    context = Context(role, settings)
    try:
        check_start(ROLES[role](context), context)
    except SettingsError as error:
        return str(error)
    return ""


def test_a_topic_of_the_same_name_is_not_the_same(fresh: Settings) -> None:
    """A topic made anew that is as long as the old one by now would be read as if it were that."""
    assert refused("reference", fresh) == ""
    assert refused("reference", fresh) == ""
    clickhouse = ClickHouse(fresh)
    clickhouse.command("TRUNCATE TABLE known_topics")
    Ledger(clickhouse).note_topics(1, {REFERENCE_CHANGES: "AAAAAAAAAAAAAAAAAAAAAA"})
    assert re.search(r"reference-changes has the id .*TRIBILL_LOG_GENERATION to 2", refused("reference", fresh))
    assert refused("reference", replace(fresh, log_generation=2)) == ""


def test_offsets_beyond_the_log(fresh: Settings) -> None:
    """A consumer that stands behind the end would begin again at the start, and say nothing."""
    commit(fresh, "funding", (FUNDING_INPUTS, 1), 7)
    assert "ends at offset 0 in partition 1, but was read up to 7" in refused("funding", fresh)


def test_an_older_database_without_its_usage(fresh: Settings) -> None:
    """Usage that was done before the backup was taken would never be in the ledger."""
    at = datetime(2026, 4, 3, tzinfo=UTC)
    row = {
        "id": "u9", "revision": 0, "supplier_id": "10000", "ods_code": "A83005", "item_id": "10000-S-001",
        "quantity_micros": 1, "occurred_at": at, "index": 0, "offset": 5, "broker_timestamp_ms": 0, "day": at.date(),
        "topic": USAGE, "partition": 0,
    }  # fmt: skip
    outbox = Outbox(fresh)
    outbox.send(USAGE_ACCEPTED, encode_block(pl.DataFrame([row]).to_arrow()), partition=1)
    outbox.flush()
    assert refused("usage", fresh) == ""
    commit(fresh, "usage", (USAGE_ACCEPTED, 1), 1)
    assert re.search(r"lacks what the role usage has done of usage-accepted.*older backup", refused("usage", fresh))
    kept = row | {"generation": 1, "accepted_partition": 1, "accepted_offset": 0}
    Ledger(ClickHouse(fresh)).insert_usage(pl.DataFrame([kept]).select(USAGE_SCHEMA.names).to_arrow())
    assert refused("usage", replace(fresh)) == ""


def test_an_older_database_without_its_changes(fresh: Settings) -> None:
    """An order that was placed before the backup was taken would never be billed."""
    value = {"id": "c1", "order_number": "C010001", "recorded_at": "2026-03-01T09:00:00Z"}
    change = value | {"change": {"OrderTerminated": {"date": "2026-05-01"}}}
    context = Context("contracts", fresh)
    data = context.codec.encode("ContractChange", from_interchange("ContractChange", change))
    context.outbox.send(CONTRACT_CHANGES, data, key="C010001")
    context.outbox.flush()
    [place] = [place for place, end in Broker(fresh).end_offsets([CONTRACT_CHANGES]).items() if end]
    commit(fresh, "contracts", place, 1)
    assert "lacks what the role contracts has done of contract-changes" in refused("contracts", fresh)
    # It is there, or was refused, or is said again: each is a trace.
    said = SaidChange("C010001", 1, place[1], 0, "c1", "OrderTerminated", False, "", change, 0)
    context.ledger.insert_changes(CONTRACT_CHANGES, [replace(said, generation=0)])
    assert refused("contracts", fresh) == ""
    context.clickhouse.command("TRUNCATE TABLE contract_changes")
    assert refused("contracts", fresh)
    context.dead_letters.write([DeadLetter(*place, 0, "was refused")])
    assert refused("contracts", fresh) == ""


def test_an_older_database_without_its_accruals(fresh: Settings) -> None:
    """Charges would believe that they have said what they have not."""
    context = Context("charges", fresh)
    for _ in range(3):
        context.outbox.send(CHARGE_INPUTS, b"", partition=0)
    context.outbox.flush()
    commit(fresh, "charges", (CHARGE_INPUTS, 0), 3)
    accruals = Accruals(context.clickhouse)
    accruals.insert_positions(0, 1, 2, {}, 0, 0)
    assert "lacks what the role charges has done of charge-inputs" in refused("charges", fresh)
    accruals.insert_positions(0, 1, 3, {}, 0, 0)
    assert refused("charges", fresh) == ""


def test_schemas_of_another_version(fresh: Settings) -> None:
    """Records of a schema that was changed under its id, or is not there yet, would all be refused."""
    ledger = Ledger(ClickHouse(fresh))
    assert refused("intake", replace(fresh, log_generation=2)) == ""
    assert ledger.known_schemas().keys() == released().keys()
    ledger.note_schemas({99: ("Later", "0")})
    assert re.search("newer tribill.* Later with the id 99", refused("intake", replace(fresh, log_generation=2)))
    ClickHouse(fresh).command("TRUNCATE TABLE known_schemas")
    ledger.note_schemas({1: ("Usage", "0")})
    assert "001-Usage.avsc back as it was" in refused("intake", replace(fresh, log_generation=2))


@pytest.mark.parametrize("compatible", [True, False])
def test_a_registry_that_has_other_schemas(fresh: Settings, compatible: bool) -> None:
    """A worker would find out with its first record, and stop the others' work with it."""

    class Registry(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            other = "DeadLetter" in self.path and not compatible
            self._answer(404 if "Accrual" in self.path else 200, {"is_compatible": not other})

        def _answer(self, status: int, value: dict[str, object]) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(value | ({"error_code": 40401, "message": "none"} if status == 404 else {})).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silence."""

    with HTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry = f"http://127.0.0.1:{server.server_port}"
        found = refused("intake", replace(fresh, log_generation=2, schema_registry=registry))
        server.shutdown()
    assert found == "" if compatible else "version's DeadLetter as compatible" in found
    with pytest.raises(ConnectionError, match="schema registry"):
        refused("intake", replace(fresh, log_generation=2, schema_registry=registry))


@pytest.mark.skipif(not JARS, reason="TRIBILL_KAFKA_JARS names no jars of Apache Kafka")
def test_on_kafka_what_the_broker_deleted(fresh: Settings, tmp_path: Path) -> None:
    """Records that retention took before they were done would never be missed."""
    with kafka(tmp_path) as address:
        settings = replace(fresh, kafka=address)
        broker = Broker(settings)
        broker.create_topics()
        leaders(broker)
        assert refused("intake", settings) == ""
        outbox = Outbox(settings)
        for _ in range(5):
            outbox.send(USAGE, b"x", partition=1)
        outbox.flush()
        commit(settings, "intake", (USAGE, 1), 2)
        assert refused("intake", settings) == ""
        for future in broker._admin.delete_records([TopicPartition(USAGE, 1, 4)]).values():
            future.result()
        found = refused("intake", settings)
        assert re.search(r"deleted the records 2 to 3 of usage in partition 1.*usage:1 --reset", found)
        commit(settings, "intake", (USAGE, 1), 4)
        assert refused("intake", settings) == ""


def test_redis_that_evicts_is_an_error(settings: Settings) -> None:
    """A claim thrown away would let the copy of its record pass as new."""
    claims = Claims(settings, lambda: True)
    claims.check()
    claims._redis.config_set("maxmemory", "100mb")
    claims._redis.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(SettingsError, match="noeviction"):
        claims.check()


def test_settings_survive_a_file(tmp_path: Path) -> None:
    """Passwords with quotes and backslashes are read back, and no one else reads the file."""
    written = Settings(clickhouse='http://a:"\\b#@host:1/x', close_any_period=True, partitions=7)
    path = tmp_path / "tribill.toml"
    path.touch(mode=0o644)
    written.write(path)
    assert Settings.load(path, {}) == written
    assert path.stat().st_mode & 0o777 == 0o600


def test_topics_that_the_broker_does_not_show_end_the_worker() -> None:
    """Just after a broker's restart: partitions that are not handed out would be nobody's, silently."""
    lines = ("from aiokafka.cluster import ClusterMetadata", "from streams.worker import _Assignor",
             "_Assignor._get_copartitioned_groups({'period-events'}, ClusterMetadata(), {})")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == BROKEN_EXIT
    assert "period-events" in done.stdout + done.stderr
