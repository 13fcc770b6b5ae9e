"""What a process of tribill must know of its surroundings, from a TOML file and the environment."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any


class SettingsError(ValueError):
    """A setting that is unknown, missing or of the wrong kind."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one installation; each is `TRIBILL_<NAME>` in the environment or `<name>` in the file."""

    #: Kafka bootstrap servers, `host:port,host:port`.
    kafka: str = ""
    #: `plaintext`, `ssl`, `sasl_ssl`; with SASL the mechanism, user and password.
    kafka_security: str = "plaintext"
    kafka_sasl_mechanism: str = ""
    kafka_username: str = ""
    kafka_password: str = ""
    #: ClickHouse over HTTP, `http://user:password@host:port/database`.
    clickhouse: str = ""
    #: Redis, `redis://:password@host:port/0`.
    redis: str = ""
    #: A Confluent schema registry; empty: schema ids are fixed in the project.
    schema_registry: str = ""
    #: Which life of the log the positions in the ledger belong to (an emptied log is a new one).
    log_generation: int = 1
    #: A worker that is silent for so long loses its partitions.  Its heart beats beside its work, in a thread.
    session_timeout_seconds: int = 8
    #: Partitions of each topic that is created, and how often it is replicated.
    partitions: int = 4
    replication: int = 1
    #: Suppliers that write a topic of their own, `usage.<supplier id>`, by comma.
    supplier_topics: str = ""
    #: How long a claim of a usage identity is kept in Redis; older usage is looked up in the ledger.
    claim_window_days: int = 45
    #: Usage is refused when it lies more than a day after its arrival, or after this instant if later.
    arrival_floor: str = ""
    #: Accruals are written ahead to the end of this month, not of the one after today's (a replay, a demonstration).
    horizon_month: str = ""
    #: The page takes the latest instant of usage for now: a demonstration of the past in fast motion.
    replay_clock: bool = False
    #: `tribill run` replays a file and may close a period that has not ended.
    close_any_period: bool = False
    #: A close waits for suppliers' attestations until so many days after the period's end; 0: not at all.
    attestation_days: int = 0
    #: A close is refused when more units of usage than this wait in suspense; empty: however many do.
    suspense_limit: str = ""
    #: A close is refused when a stage that it waits for has done nothing for so long.
    close_wait_seconds: int = 3_600
    #: Parties that nobody has described are invented, and every document is marked SPECIMEN (a trial).
    specimen: bool = False
    #: At most so many records are handed to an agent at once.
    batch_records: int = 100_000
    #: A usage record above this size is refused.
    record_max_bytes: int = 8_388_608
    #: Where a worker serves /metrics, /health and /ready; and the address it binds to.
    worker_port: int = 6066
    bind: str = "127.0.0.1"
    #: Where `tribill web` listens.
    web_port: int = 8066

    @property
    def suppliers_with_topic(self) -> list[str]:
        """The supplier ids of `supplier_topics`."""
        return sorted({each.strip() for each in self.supplier_topics.split(",") if each.strip()})

    @property
    def arrival_floor_at(self) -> datetime | None:
        """`arrival_floor` as an instant."""
        return datetime.fromisoformat(self.arrival_floor) if self.arrival_floor else None

    @classmethod
    def load(
        cls,
        path: Path | None = None,
        environment: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> Settings:
        """Settings from a TOML file (or `TRIBILL_CONFIG`), over it the environment, over both `overrides`."""
        environment = os.environ if environment is None else environment
        named = path or (Path(environment["TRIBILL_CONFIG"]) if environment.get("TRIBILL_CONFIG") else None)
        values: dict[str, Any] = {}
        kinds = {each.name: each.type for each in fields(cls)}
        if named is not None:
            try:
                values |= tomllib.loads(named.read_text())
            except (OSError, tomllib.TOMLDecodeError) as error:
                raise SettingsError(f"{named}: {error}") from None
            for name in values:
                if name not in kinds:
                    raise SettingsError(f"{named}: there is no setting {name!r}; see docs/operations.md")
        for name in kinds:
            if (text := environment.get(f"TRIBILL_{name.upper()}")) is not None:
                values[name] = text
        values |= overrides
        return cls(**{name: _typed(name, str(kinds[name]), value) for name, value in values.items()})

    def environment(self) -> dict[str, str]:
        """The settings as environment variables, for a child process."""
        return {f"TRIBILL_{each.name.upper()}": str(getattr(self, each.name)) for each in fields(self)}

    def require(self, *names: str) -> None:
        """Raises SettingsError naming the first of these settings that is empty."""
        for name in names:
            if not getattr(self, name):
                raise SettingsError(
                    f"TRIBILL_{name.upper()} is not set; `tribill up` starts an embedded stack and prints it"
                )

    def write(self, path: Path) -> None:
        """Writes the settings that differ from the defaults as a TOML file that its owner alone can read."""
        lines = []
        for each in fields(self):
            value = getattr(self, each.name)
            if value != each.default:
                # A JSON string, number or boolean is one of TOML too.
                lines.append(f"{each.name} = {json.dumps(value)}\n")
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write("".join(lines))


def _typed(name: str, kind: str, value: Any) -> Any:
    if kind == "bool":
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "1", "yes", "false", "0", "no", ""):
            return str(value).lower() in ("true", "1", "yes")
        raise SettingsError(f"{name} is {value!r}, not true or false")
    if kind == "int":
        try:
            return int(value)
        except ValueError:
            raise SettingsError(f"{name} is {value!r}, not a whole number") from None
    return str(value)
