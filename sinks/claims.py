"""Claims of usage identities in Redis: the fast way to know that an identity was never seen.

A claim is never the last word.  An identity that Redis has not seen may be new; it certainly is
only if its event lies inside the window and after the store was last emptied.  All else is looked
up in the ledger.  While Redis is away usage waits: rows kept without a claim would let their later
copies pass as new.

Claims of a partition of `usage-accepted` are the fields of two hashes, of the age that is now and of
the one before: Redis asks and sets many fields with one command, in a third of the time and half of the
memory of keys of their own.  An age lasts as long as a claim must be kept; the one before the last is
thrown away whole.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import redis
import structlog
from numpy.typing import NDArray
from redis.exceptions import RedisError, ResponseError

from streams.settings import Settings, SettingsError

Flags = NDArray[np.bool_]

log = structlog.get_logger(__name__)

#: An event may lie a day after its arrival, so a first copy may have come a day before it; and an hour
#: that the clocks of broker and Redis may differ by.
_AHEAD = timedelta(days=1, hours=1)
#: A hash that has had its time is unlinked with the next claim; after this, where none comes, it expires.
_LINGER_SECONDS = 86_400
#: Fields of a command: Redis does nothing else meanwhile.
_FIELDS_AT_ONCE = 5_000

#: KEYS: the store's own key.  Returns since when the store has every claim, whether that is news, what
#: time it is, and which life of the server this is.  A restarted server has another run id: it may have
#: come back without its last claims.  All times are Redis' own, because a worker's clock may be wrong,
#: and never go back, because claims of a later age are not looked for.
_LIFE = """
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local since = redis.call('HGET', KEYS[1], run)
local last = tonumber(redis.call('HGET', KEYS[1], 'now') or '0')
local now = math.max(tonumber(redis.call('TIME')[1]), last)
local emptied = 0
if not since then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], run, now)
  since = now
  emptied = 1
end
redis.call('HSET', KEYS[1], 'now', now)
return {tonumber(since), emptied, now, run}
"""
#: The same life of the store, in which claims began at the same instant: it has had all from the beginning.
_COMPLETE = """
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
if run == ARGV[1] and redis.call('HGET', KEYS[1], run) == ARGV[2] then
  redis.call('HSET', KEYS[1], run, '0')
  return 1
end
return 0
"""
#: What Redis answers for a field that is not there, in either version of its protocol.
_NOTHING = (b"$-1\r\n", b"_\r\n")


class ClaimsUnavailable(ConnectionError):
    """Redis is away.  Usage waits for it: rows without a claim would let their copies pass as new."""

    sink = "redis"


class Claims:
    """Claims identities, a batch at a time."""

    def __init__(self, settings: Settings, ledger_is_empty: Callable[[], bool]) -> None:
        self._ledger_is_empty = ledger_is_empty
        # A replayed file says when it arrived, so the clock tells nothing of what came before.
        self._never_certain = bool(settings.arrival_floor)
        self._window = timedelta(days=settings.claim_window_days)
        self._keep_seconds = _keep_seconds(settings)
        self._key = _key(settings)
        self._redis = redis.Redis.from_url(settings.redis, socket_timeout=10, socket_connect_timeout=2)

    def check(self) -> None:
        """Raises SettingsError when Redis may throw claims away, ClaimsUnavailable when it does not answer."""
        try:
            memory = self._redis.info("memory")
        except RedisError as error:
            raise ClaimsUnavailable(f"Redis: {error}") from error
        if memory.get("maxmemory") and memory.get("maxmemory_policy") != "noeviction":
            raise SettingsError(
                f"Redis has maxmemory-policy {memory.get('maxmemory_policy')}, so it may throw claims away and their "
                "copies would pass as new; set it to noeviction"
            )

    def claim(self, partition: int, identities: pl.Series, claims: pl.Series) -> tuple[pl.Series, datetime]:
        """Claims each identity of a partition of `usage-accepted` for a record, unless it is claimed already.

        A claim is ASCII.  Returns for each whether nobody had claimed it, and the instant after which an
        event whose identity nobody had claimed is certainly new.  Raises ClaimsUnavailable when Redis is away.

        Asking and setting are two steps.  Workers that overlap on a partition, one of them a zombie, may
        both find the same record unclaimed; they keep the same row.  For a copy it does not matter: each
        of them has done, and claimed, all that lies before it.
        """
        try:
            life = self._life()
            if life.emptied and self._ledger_is_empty():
                self._complete(life)
            age = life.now // self._keep_seconds
            key = f"{self._key}:{partition}:{age}"
            fields = _words(identities)
            found = self._found([f"{self._key}:{partition}:{age - 1}", key], fields)
            unclaimed = ~found & identities.is_first_distinct()
            self._set(key, pl.select(pl.concat_str(fields, _words(claims))).to_series().filter(unclaimed))
            self._redis.expireat(key, (age + 2) * self._keep_seconds + _LINGER_SECONDS)
            self._redis.unlink(f"{self._key}:{partition}:{age - 2}")
            # Asked again: a store that lost claims before or meanwhile says so now.
            since = self._life().since
        except RedisError as error:
            raise ClaimsUnavailable(f"Redis: {error}") from error
        if self._never_certain:
            return unclaimed, datetime.max.replace(tzinfo=UTC)
        certain_after = max(datetime.fromtimestamp(since, UTC), datetime.fromtimestamp(life.now, UTC) - self._window)
        return unclaimed, certain_after + _AHEAD

    def _life(self) -> _Life:
        since, emptied, now, run = self._redis.eval(_LIFE, 1, self._key)
        return _Life(since, bool(emptied), now, run)

    def _complete(self, life: _Life) -> None:
        """Notes that the store has had every claim from the beginning, if it has not lost them since.

        Nothing was ever claimed before: a new installation, not an emptied store.
        """
        self._redis.eval(_COMPLETE, 1, self._key, life.run, life.since)

    def _found(self, keys: Sequence[str], fields: pl.Series) -> pl.Series:
        """For each field whether any of the hashes has it."""
        parts = [part.to_series() for part in fields.to_frame().iter_slices(_FIELDS_AT_ONCE)]
        questions = [_command("HMGET", key, part, len(part)) for part in parts for key in keys]
        with self._answers(questions) as answers:
            found = [[answers.array(len(part)) for _ in keys] for part in parts]
        return pl.Series(np.concatenate([np.logical_or.reduce(each) for each in found] or [[]]), dtype=pl.Boolean)

    def _set(self, key: str, pairs: pl.Series) -> None:
        """Sets fields of a hash."""
        parts = [part.to_series() for part in pairs.to_frame().iter_slices(_FIELDS_AT_ONCE)]
        with self._answers([_command("HSET", key, part, 2 * len(part)) for part in parts]) as answers:
            for _ in parts:
                answers.line()

    @contextmanager
    def _answers(self, commands: Sequence[bytes]) -> Iterator[_Answers]:
        """Sends commands, all before the first answer is read, so that Redis has work meanwhile."""
        connection: Any = self._redis.connection_pool.get_connection()
        try:
            connection.send_packed_command(commands)
            yield _Answers(connection._sock)
        except BaseException as error:
            # Answers that nobody has read must not meet the next question.
            connection.disconnect()
            if isinstance(error, OSError):
                raise ClaimsUnavailable(f"Redis: {error}") from error
            raise
        finally:
            self._redis.connection_pool.release(connection)


class _Life(NamedTuple):
    """How the store was when asked; see `_LIFE`."""

    since: int
    emptied: bool
    now: int
    run: bytes


class _Answers:
    """Answers as they come, read by columns: the client takes longer over each than Redis does."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._at = 0

    def line(self) -> bytes:
        """An answer of one line, or the first line of a longer one.  Raises ClaimsUnavailable for an error."""
        while (end := self._received.find(b"\r\n", self._at) + 2) < 2:
            self._receive()
        line, self._at = self._received[self._at : end], end
        if line.startswith((b"-", b"!")):
            raise ClaimsUnavailable(f"Redis: {line.decode(errors='replace').strip()}")
        return line

    def array(self, size: int) -> Flags:
        """An array of texts and nothings: for each whether it is a text.  A text has no line end in it."""
        if (head := self.line()) != b"*%d\r\n" % size:
            raise ClaimsUnavailable(f"Redis: {head!r} is no answer for {size} fields")
        for nothing in _NOTHING:
            all_new = nothing * size
            while len(here := self._received[self._at :]) < len(all_new) and all_new.startswith(here):
                self._receive()
            if here.startswith(all_new):
                self._at += len(all_new)
                return np.zeros(size, np.bool_)
        return np.fromiter((self._is_text() for _ in range(size)), np.bool_, size)

    def _is_text(self) -> bool:
        return self.line() not in _NOTHING and bool(self.line())

    def _receive(self) -> None:
        part = self._connection.recv(1 << 18)
        if not part:
            raise ConnectionError("it closed the connection")
        self._received, self._at = self._received[self._at :] + part, 0


def _words(texts: pl.Series) -> pl.Series:
    """Each text as the Redis protocol writes it."""
    words = [pl.lit("$"), texts.str.len_bytes(), pl.lit("\r\n"), texts, pl.lit("\r\n")]
    return pl.select(pl.concat_str(words)).to_series()


def _command(name: str, key: str, words: pl.Series, count: int) -> bytes:
    """A command about a hash with so many more arguments, which are words already."""
    head = f"*{2 + count}\r\n${len(name)}\r\n{name}\r\n${len(key)}\r\n{key}\r\n"
    return (head + "".join(words)).encode()


def _keep_seconds(settings: Settings) -> int:
    return int((timedelta(days=settings.claim_window_days) + 2 * _AHEAD).total_seconds())


def _key(settings: Settings) -> str:
    """What all keys of the store begin with.  Another window is another store: it counts as emptied."""
    return f"tribill:claims:{_keep_seconds(settings)}"


@dataclass(frozen=True, slots=True)
class Condition:
    """How the claim store is: for `tribill doctor`."""

    policy: str
    evicts: bool
    persists: bool
    #: Since when it has every claim; None: none was made since it started.
    complete_since: datetime | None
    ahead_seconds: float
    uncertain_seconds: float


def inspect(settings: Settings) -> Condition:
    """Looks at the claim store and changes nothing.  Raises ClaimsUnavailable."""
    store = redis.Redis.from_url(settings.redis, socket_timeout=10, socket_connect_timeout=2)
    try:
        information = store.info()
        before = time.time()
        seconds, micros = store.time()
        after = time.time()
        since = store.hget(_key(settings), information["run_id"])
        try:
            saves = store.config_get("save").get("save")
        except ResponseError:  # a managed Redis may not say
            saves = ""
    except RedisError as error:
        raise ClaimsUnavailable(f"Redis: {error}") from error
    policy = str(information.get("maxmemory_policy"))
    return Condition(
        policy,
        bool(information.get("maxmemory")) and policy != "noeviction",
        bool(information.get("aof_enabled")) or bool(saves),
        datetime.fromtimestamp(float(since), UTC) if since else None,
        seconds + micros / 1e6 - (before + after) / 2,
        (after - before) / 2,
    )
