"""Claims against a real Redis: nothing that is claimed passes as new while its claim must be kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks.claims import Claims, ClaimsUnavailable, inspect
from streams.settings import Settings
from tribill.embedded import redis_server
from tribill.embedded.process import free_port

KEEP_SECONDS = (45 * 24 + 2 * 25) * 3600


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of its own."""
    directory: Path = tmp_path_factory.mktemp("redis")
    port = free_port()
    server = redis_server.start(port, directory)
    try:
        wait_until_ready(port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()


def wait_until_ready(port: int) -> None:
    """Returns when the Redis there serves."""
    while not redis_server.is_ready(port):
        time.sleep(0.05)


def emptied(address: str, **changed: object) -> tuple[redis.Redis, Claims]:
    """The store with nothing in it, and who claims there."""
    store = redis.Redis.from_url(address)
    store.flushall()
    return store, Claims(Settings.load(environment={}, redis=address, **changed), lambda: True)


def own_key(store: redis.Redis) -> bytes:
    """The key under which the store says how it is."""
    return min(store.scan_iter("tribill:claims:*"), key=len)


def claim(claims: Claims, identities: list[str], partition: int = 0) -> list[bool]:
    """Whether each was unclaimed."""
    texts = pl.Series(identities, dtype=pl.String)
    unclaimed, _ = claims.claim(partition, texts, pl.Series(["1/2/usage/3/4"] * len(texts), dtype=pl.String))
    return unclaimed.to_list()


IDENTITIES = st.sampled_from(["a", "b", "c/\r\n$1\r\n", "", "\0", "'; FLUSHALL", "ü" * 300, "*3\r\n$3\r\nSET"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(IDENTITIES, max_size=12), st.integers(0, KEEP_SECONDS)), max_size=12),
    st.integers(0, KEEP_SECONDS),
)
def test_kept_as_long_as_it_must_be(address: str, batches: list[tuple[list[str], int]], begin: int) -> None:
    """While its claim must be kept an identity is found, at most twice as long, and nothing else ever is."""
    store, claims = emptied(address)
    claim(claims, [])
    key = own_key(store)
    now = int(store.time()[0]) + begin
    claimed: dict[str, int] = {}
    for identities, later in batches:
        now += later
        store.hset(key, "now", now)
        for identity, unclaimed in zip(identities, claim(claims, identities), strict=True):
            age = now - claimed.get(identity, -(10**12))
            if age <= KEEP_SECONDS:
                assert not unclaimed, identity
            elif age > 2 * KEEP_SECONDS:
                assert unclaimed, identity
            if unclaimed:
                claimed[identity] = now
    assert len(list(store.scan_iter("tribill:claims:*:0:*"))) <= 2, "what has had its time is thrown away"
    assert all(store.ttl(each) > 0 for each in store.scan_iter("tribill:claims:*:0:*"))


@given(st.lists(IDENTITIES | st.integers(0, 40_000).map(str), max_size=30), st.integers(0, 12_000))
@settings(max_examples=25, deadline=None)
def test_many_at_once(address: str, known: list[str], others: int) -> None:
    """Commands and answers in many pieces: what was claimed before, and that alone, is found, in its place."""
    _, claims = emptied(address)
    claim(claims, known)
    asked = [*map(str, range(others)), *known[:5], *map(str, range(others // 2))]
    seen = set(known)
    expected = []
    for each in asked:
        expected.append(each not in seen)
        seen.add(each)
    assert claim(claims, asked) == expected
    assert not any(claim(claims, asked))
    assert sum(claim(claims, asked, partition=1)) == len(set(asked)), "each partition has claims of its own"


def test_an_emptied_store_says_so(address: str) -> None:
    """After FLUSHALL nothing that happened before is certainly new, and nothing a day later."""
    store, claims = emptied(address)
    nobody = pl.Series([], dtype=pl.String)
    assert claims.claim(0, nobody, nobody)[1] < datetime.now(UTC) - timedelta(days=40), "a new installation"
    full = Claims(Settings.load(environment={}, redis=address), lambda: False)
    assert full.claim(0, nobody, nobody)[1] < datetime.now(UTC) - timedelta(days=40)
    store.flushall()
    assert full.claim(0, nobody, nobody)[1] > datetime.now(UTC) + timedelta(days=1)
    assert full.claim(1, nobody, nobody)[1] > datetime.now(UTC) + timedelta(days=1), "and goes on saying so"
    complete = inspect(Settings.load(environment={}, redis=address)).complete_since
    assert complete is not None
    assert abs(complete - datetime.now(UTC)) < timedelta(hours=1)


def test_a_store_that_comes_back_with_older_claims(tmp_path: Path) -> None:
    """What was claimed after the snapshot that it comes back with would pass as new."""
    port = free_port()
    server = redis_server.start(port, tmp_path)
    try:
        wait_until_ready(port)
        store, claims = emptied(f"redis://127.0.0.1:{port}/0")
        assert claim(claims, ["before"]) == [True]
        store.save()
        assert claim(claims, ["after"]) == [True]
        server.kill()
        server = redis_server.start(port, tmp_path)
        wait_until_ready(port)
        full = Claims(Settings.load(environment={}, redis=f"redis://127.0.0.1:{port}/0"), lambda: False)
        texts = pl.Series(["before", "after"])
        unclaimed, certain_after = full.claim(0, texts, texts)
        assert unclaimed.to_list() == [False, True]
        assert certain_after > datetime.now(UTC) + timedelta(days=1), "so the ledger is asked"
    finally:
        server.kill()


def test_another_window_is_another_store(address: str) -> None:
    """Claims that were kept for a shorter time do not vouch for a longer window."""
    emptied(address)
    claims = [
        Claims(Settings.load(environment={}, redis=address, claim_window_days=days), lambda: False) for days in (10, 45)
    ]
    nobody = pl.Series([], dtype=pl.String)
    assert all(each.claim(0, nobody, nobody)[1] > datetime.now(UTC) for each in claims)


def test_a_clock_that_goes_back(address: str) -> None:
    """A clock that was ahead for a while makes nothing certain that was claimed before it was."""
    store, claims = emptied(address)
    assert claim(claims, ["a"]) == [True]
    key = own_key(store)
    store.hset(key, "now", int(store.time()[0]) + 3 * KEEP_SECONDS)
    texts = pl.Series(["a"])
    unclaimed, certain_after = claims.claim(0, texts, texts)
    # It is not found any more, but its event lies before what is certain, whatever the clock says now.
    assert unclaimed.to_list() == [True]
    assert certain_after > datetime.now(UTC) + timedelta(days=30)


def test_an_answer_that_is_an_error(address: str) -> None:
    """What Redis refuses is said, and the connection works again afterwards."""
    store, claims = emptied(address)
    claim(claims, [])
    key = own_key(store)
    age = int(store.hget(key, "now")) // KEEP_SECONDS
    store.set(f"{key.decode()}:0:{age}", "no hash")
    with pytest.raises(ClaimsUnavailable, match="WRONGTYPE"):
        claim(claims, ["a"])
    store.delete(f"{key.decode()}:0:{age}")
    assert claim(claims, ["a", "a"]) == [True, False]
