"""Claims of usage identities in Redis: the fast way to know that an identity was never seen.

A claim is never the last word.  An identity that Redis has not seen may be new; it certainly is
only if its event lies inside the window and after the store was last emptied.  All else is looked
up in the ledger.  While Redis is away usage waits: rows kept without a claim would let their later
copies pass as new.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import redis
import structlog
from redis.exceptions import RedisError, ResponseError

from streams.settings import Settings, SettingsError

log = structlog.get_logger(__name__)

#: An event may lie a day after its arrival, so a first copy may have come a day before it; and an hour
#: that the clocks of broker and Redis may differ by.
_AHEAD = timedelta(days=1, hours=1)
_CHUNK = 2_000

#: KEYS: the generation key.  ARGV: seconds to keep, then identity and claim by turns.
#: Returns since when the store has every claim, whether that is news, what time it is, and which of
#: the identities were claimed before.  A restarted server has another run id: it may have come back
#: without its last claims.  All times are Redis' own, by which it also lets claims expire: a worker's
#: clock may be wrong.
_CLAIM = """
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local now = redis.call('TIME')[1]
local since = redis.call('HGET', KEYS[1], run)
local emptied = 0
if not since then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], run, now)
  since = now
  emptied = 1
end
local found = {since, emptied, now, run}
for i = 2, #ARGV, 2 do
  if not redis.call('SET', ARGV[i], ARGV[i + 1], 'NX', 'EX', ARGV[1]) then
    found[#found + 1] = (i - 2) / 2
  end
end
return found
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
_GENERATION_KEY = "tribill:claims"


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
        self._keep_seconds = int((self._window + 2 * _AHEAD).total_seconds())
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

    def claim(self, identities: pl.Series, claims: pl.Series) -> tuple[pl.Series, datetime]:
        """Claims each identity for a record, unless it is claimed already.

        Returns for each whether nobody had claimed it, and the instant after which an event whose
        identity nobody had claimed is certainly new.  Raises ClaimsUnavailable when Redis is away.
        """
        arguments = _words(identities, claims)
        try:
            found = self._evaluate([arguments[start : start + _CHUNK] for start in range(0, len(arguments), _CHUNK)])
            emptied = [bool(each[1]) for each in found]
            if emptied == [True] + [False] * (len(found) - 1) and self._ledger_is_empty():
                # Nothing was ever claimed before: a new installation, not an emptied store.
                since = 0 if self._is_complete(found[0]) else int(found[0][0])
            else:
                since = max((int(each[0]) for each in found), default=0)
        except RedisError as error:
            raise ClaimsUnavailable(f"Redis: {error}") from error
        standing = [chunk * _CHUNK + place for chunk, each in enumerate(found) for place in each[4:]]
        unclaimed = pl.repeat(True, len(arguments), eager=True).scatter(standing, False)
        if self._never_certain:
            return unclaimed, datetime.max.replace(tzinfo=UTC)
        now = min((int(each[2]) for each in found), default=0)
        certain_after = max(datetime.fromtimestamp(since, UTC), datetime.fromtimestamp(now, UTC) - self._window)
        return unclaimed, certain_after + _AHEAD

    def _is_complete(self, answer: Sequence[Any]) -> bool:
        """Notes that the store has had every claim from the beginning, if it has not lost them since."""
        return bool(self._redis.eval(_COMPLETE, 1, _GENERATION_KEY, answer[3], answer[0]))

    def _evaluate(self, chunks: Sequence[pl.Series]) -> list[Any]:
        """The script's answers.  All is sent before the first is read, so that Redis has work meanwhile."""
        connection: Any = self._redis.connection_pool.get_connection()
        keep = str(self._keep_seconds)
        head = "".join(_words(pl.Series(["EVAL", "1"]), pl.Series([_CLAIM, _GENERATION_KEY])))
        head += f"${len(keep)}\r\n{keep}\r\n"
        try:
            for words in chunks:
                command = f"*{5 + 2 * len(words)}\r\n{head}" + "".join(words)
                connection.send_packed_command([command.encode()])
            return [connection.read_response() for _ in chunks]
        except BaseException:
            # Answers that nobody has read must not meet the next question.
            connection.disconnect()
            raise
        finally:
            self._redis.connection_pool.release(connection)


def _words(first: pl.Series, second: pl.Series) -> pl.Series:
    """Two arguments a row as the Redis protocol writes them (its client takes them one by one: slow)."""
    parts = []
    for each in (first, second):
        parts += [pl.lit("$"), each.str.len_bytes(), pl.lit("\r\n"), each, pl.lit("\r\n")]
    return pl.select(pl.concat_str(parts)).to_series()


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
        since = store.hget(_GENERATION_KEY, information["run_id"])
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
