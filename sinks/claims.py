"""Claims of usage identities in Redis: the fast way to know that an identity was never seen.

A claim is never the last word.  An identity that Redis has not seen may be new; it certainly is
only if its event lies inside the window and after the store was last emptied.  All else is looked
up in the ledger.  While Redis is away usage waits: rows kept without a claim would let their later
copies pass as new.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import redis
import structlog
from redis.exceptions import RedisError

from streams.settings import Settings, SettingsError

log = structlog.get_logger(__name__)

#: An event may lie a day after its arrival, so a first copy may have come a day before it.
_AHEAD = timedelta(days=1)
_CHUNK = 2_000

#: KEYS: the generation key.  ARGV: now, seconds to keep, then id and claim by turns.
#: Returns since when the store has every claim, whether that is news, and for each id the claim
#: that stood (or false).  A restarted server has another run id: it may have come back without
#: its last claims.
_CLAIM = """
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local since = redis.call('HGET', KEYS[1], run)
local emptied = 0
if not since then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], run, ARGV[1])
  since = ARGV[1]
  emptied = 1
end
local found = {since, emptied}
for i = 3, #ARGV, 2 do
  local standing = redis.call('GET', ARGV[i])
  if not standing then
    redis.call('SET', ARGV[i], ARGV[i + 1], 'EX', ARGV[2])
  end
  found[#found + 1] = standing
end
return found
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
        self._script = self._redis.register_script(_CLAIM)

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

    def claim(self, identities: Sequence[str], claim: Sequence[str]) -> tuple[list[str | None], datetime]:
        """Claims each identity for a record, unless it is claimed already.

        Returns for each the claim that stood before (None: none did), and the instant after which
        an event without a claim is certainly new.  Raises ClaimsUnavailable when Redis is away.
        """
        standing: list[str | None] = []
        emptied_at = 0.0
        try:
            for start in range(0, len(identities), _CHUNK):
                arguments: list[str | int] = [int(time.time()), self._keep_seconds]
                chunk = slice(start, start + _CHUNK)
                for identity, each in zip(identities[chunk], claim[chunk], strict=True):
                    arguments += ["u:" + identity, each]
                found = self._script(keys=[_GENERATION_KEY], args=arguments)
                since = float(found[0])
                if found[1] and self._ledger_is_empty():
                    # Nothing was ever claimed before: a new installation, not an emptied store.
                    since = 0.0
                    run = self._redis.info("server")["run_id"]
                    self._redis.hset(_GENERATION_KEY, run, "0")
                emptied_at = max(emptied_at, since)
                standing += [each.decode() if each is not None else None for each in found[2:]]
        except RedisError as error:
            raise ClaimsUnavailable(f"Redis: {error}") from error
        if self._never_certain:
            return standing, datetime.max.replace(tzinfo=UTC)
        certain_after = max(datetime.fromtimestamp(emptied_at, UTC) + _AHEAD, datetime.now(UTC) - self._window + _AHEAD)
        return standing, certain_after
