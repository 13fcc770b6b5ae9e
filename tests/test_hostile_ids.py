"""Ids and codes of any characters mean the same to Redis, ClickHouse and Arrow: each reading counts once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_client

from streams.topics import USAGE
from tests.crash_world import World
from tests.rich_book import BY_PARTY, C1, METERED, P1, contract, ordered, placed, reached, used
from tribill.embedded.stack import EmbeddedStack

AT_WORK = ("intake", "contracts", "reference", "usage", "charges", "funding")
#: Text that ends, escapes or formats something somewhere: RESP, SQL, ClickHouse's TSV of bound arrays, Kafka keys.
HOSTILE = [
    "", " ", "\x00", "a\x00b", "\t", "\n", "\r\n", "a\r\n$1\r\nb\r\n", "*1\r\n$8\r\nFLUSHALL\r\n", "$-1\r\n",
    "'", "''", "\\", "\\'", "\\\\'", '"', "`", "--", "/*", "*/", "'); DROP TABLE usage; --", "' OR 1=1 --",
    "\\N", "NULL", "[]", "['a','b']", "{id:String}", "{}", "{0}", "%s", "%n%n", "$1", "${jndi:ldap://x}",
    "a,b", "a/b", "u:a", "tribill:claims", "../../etc/passwd", "=1+1", "@SUM(1)", "+1", "-1", "<b>&amp;</b>",
    "\u202etxt", "\ufeff", "\u0000\u0001\u001f\u007f\u0085", "\U0001f600", "e\u0301", "\u00e9", "\u2028", "\uffff",
    "x" * 4_096, "\U0001f600" * 1_024, "'" * 4_096, "\\" * 4_096,
]  # fmt: skip


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStack]:
    """ClickHouse and Redis."""
    with EmbeddedStack(tmp_path_factory.mktemp("stack"), kafka="127.0.0.1:1") as stack:
        yield stack


def a_world(stack: EmbeddedStack, name: str) -> World:
    """A world whose claim store is empty."""
    redis_client.Redis.from_url(stack.redis).flushdb()
    return World(f"{stack.clickhouse}/{name}", stack.redis, "2026-06", ("10030",))


@pytest.mark.parametrize("window_days", [20_000, 45])
def test_ids_of_any_characters(stack: EmbeddedStack, window_days: int) -> None:
    """A reading would be lost, or taken for another's, by what its id looks like to one of the stores."""
    world = a_world(stack, f"ids{window_days}")
    item = "10030-S-001"
    for line in [
        contract(C1, "c1", OrderPlaced=placed("C010001-01", "QOP", "10030", ordered(item, P1, METERED, BY_PARTY))),
        reached(C1, "c2", item, P1, "M1", "2026-04-01"),
    ]:
        world.say(line)
    for line in [used(each, "2026-04-03", "1") for each in HOSTILE]:
        world.say(line)
    world.drain(AT_WORK)
    if window_days == 45:
        # All is looked up in the ledger: every id is bound in an array.
        redis_client.Redis.from_url(stack.redis).flushdb()
    for each in HOSTILE:
        world.say(used(each, "2026-04-03", "1.0", topic="usage.10030"))
        world.say(used(each, "2026-04-04", "2", revision=1))
        world.say(used(each, "2026-04-05", "7", topic="usage.10030"))
    world.drain(AT_WORK, 50)
    assert {each for (each,) in world.clickhouse.query("SELECT id FROM usage")} == set(HOSTILE)
    [(readings, micros)] = world.clickhouse.query(
        "SELECT count(), sum(quantity_micros) FROM (SELECT DISTINCT id, revision, quantity_micros FROM usage)"
    )
    assert (readings, micros) == (2 * len(HOSTILE), 3_000_000 * len(HOSTILE))
    conflicts = [letter for letter in world.dead_letters() if letter[0] == "usage"]
    assert len(conflicts) == len(HOSTILE)
    [totals] = world.book().usage.values()
    assert sum(totals.values()) == 2_000_000 * len(HOSTILE)
    world.check_state()
    claims = redis_client.Redis.from_url(world.settings.redis)
    claimed = {field.decode() for key in claims.keys("tribill:claims:*:*:*") for field in claims.hkeys(key)}
    assert claimed == {f"10030/{P1}/{each}" for each in HOSTILE}
    world.drop()


def test_codes_of_any_characters(stack: EmbeddedStack) -> None:
    """A practice, supplier or item of any characters is usage in suspense, of itself alone."""
    world = a_world(stack, "codes")
    codes = [each for each in HOSTILE if 0 < len(each) <= 256]
    for code in codes:
        for practice in (code, "A83006"):
            value: Any = used("u1", "2026-04-03", "3", item=code, ods=practice)["value"] | {"supplier_id": code}
            for _ in range(2):
                world.say({"topic": USAGE, "value": value})
    world.drain(AT_WORK)
    assert world.dead_letters() == []
    usage = world.book().usage
    assert usage.keys() == {(code, practice) for code in codes for practice in (code, "A83006")}
    assert all(sum(days.values()) == 3_000_000 for days in usage.values())
    world.agents.clear()
    world.say({"topic": USAGE, "value": used("u2", "2026-04-03", "1", item="10030-S-001")["value"]})
    world.drain(AT_WORK)
    world.check_state()
    world.drop()


def test_ids_that_are_not_text(stack: EmbeddedStack) -> None:
    """Bytes that are not UTF-8 would reach a column of text; their neighbours are billed."""
    world = a_world(stack, "bytes")
    good = world.codec.encode("Usage", _avro("good-id"))
    for spoilt in (b"\xff\xfe\xfd-id!"[:7], b"\xc0\x80aaaaa", b"\xed\xa0\x80bbbb", b"\xf5\x80\x80\x80ccc"):
        assert len(spoilt) == len("good-id")
        world.log.append(USAGE, good.replace(b"good-id", spoilt), b"\xff\x00", 0)
    world.log.append(USAGE, good, b"\xff\x00", 0)
    world.drain(AT_WORK)
    assert [each for (each,) in world.clickhouse.query("SELECT id FROM usage")] == ["good-id"]
    assert len(world.dead_letters()) == 4
    [(keys,)] = world.clickhouse.query("SELECT count() FROM dead_letters WHERE hex(key) = 'FF00'")
    assert keys == 4
    world.drop()


def _avro(name: str) -> Any:
    from streams.codec import from_interchange

    return from_interchange("Usage", used(name, "2026-04-03", "1")["value"])
