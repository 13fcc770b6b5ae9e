"""A worker that would read a log that its ledger does not know refuses to start, with what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from agents.context import Context
from agents.intake import Intake
from agents.start import check_log
from agents.usage import Usage
from sinks.claims import Claims
from sinks.ledger import USAGE_SCHEMA
from streams.settings import Settings, SettingsError
from streams.topics import USAGE, Broker
from streams.worker import UNSEEN_EXIT
from tribill.embedded.stack import EmbeddedStack


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
        check_log(Intake(context), context)
    context = Context("usage", settings)
    with pytest.raises(SettingsError, match="usage-accepted ends at offset 0"):
        check_log(Usage(context), context)


def test_a_new_generation_is_accepted(settings: Settings) -> None:
    """With the next log generation the same topics are a new log."""
    context = Context("intake", replace(settings, log_generation=2))
    check_log(Intake(context), context)


def test_another_number_of_partitions_is_an_error(settings: Settings) -> None:
    """With another number of partitions a practice's usage would have two owners."""
    context = Context("intake", replace(settings, log_generation=2, partitions=3))
    with pytest.raises(SettingsError, match="has 2 partitions, the setting `partitions` says 3"):
        check_log(Intake(context), context)


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
    assert done.returncode == UNSEEN_EXIT
    assert "period-events" in done.stdout + done.stderr
