"""What every agent works with: settings and its connections, made once a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinks.clickhouse import ClickHouse
from sinks.dead_letters import DeadLetters
from sinks.ledger import Ledger
from streams.codec import Codec
from streams.producer import Outbox
from streams.settings import Settings

if TYPE_CHECKING:
    from sinks.claims import Claims


class Context:
    """Settings and connections of one worker."""

    def __init__(self, role: str, settings: Settings) -> None:
        settings.require("kafka", "clickhouse")
        self.settings = settings
        self.codec = Codec(settings)
        self.outbox = Outbox(settings)
        self.clickhouse = ClickHouse(settings)
        self.ledger = Ledger(self.clickhouse)
        self.dead_letters = DeadLetters(role, settings.log_generation, self.clickhouse, self.outbox, self.codec)

    def claims(self) -> Claims:
        """The claim store; only the usage agent needs Redis."""
        from sinks.claims import Claims

        self.settings.require("redis")
        return Claims(self.settings, lambda: not self.ledger.has_usage())
