"""The ClickHouse client, and migrations: SQL files in order, each applied once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import clickhouse_connect
import structlog
from clickhouse_connect.driver.exceptions import DatabaseError

from streams.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa

log = structlog.get_logger(__name__)


class LedgerUnavailable(Exception):
    """ClickHouse did not take or answer a statement; it may the next time."""


class ClickHouse:
    """A connection, or one more while another thread uses it: the client keeps a pool and no session."""

    def __init__(self, settings: Settings) -> None:
        url = urlsplit(settings.clickhouse)
        self.database = url.path.strip("/") or "tribill"
        self._url = url
        self._client: Any = None
        self._types: dict[tuple[str, ...], Any] = {}

    def query(self, statement: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """The rows of a SELECT."""
        return list(self._call("query", statement, parameters=parameters).result_rows)

    def stream(self, statement: str, parameters: Mapping[str, Any] | None = None) -> Iterator[tuple[Any, ...]]:
        """The rows of a SELECT, block by block: as many as there are, in bounded memory."""
        with self._call("query_row_block_stream", statement, parameters=parameters) as blocks:
            for block in blocks:
                yield from block

    def query_arrow(self, statement: str, parameters: Mapping[str, Any] | None = None) -> pa.Table:
        """The rows of a SELECT as an Arrow table."""
        return self._call("query_arrow", statement, parameters=parameters)

    def command(self, statement: str, parameters: Mapping[str, Any] | None = None) -> None:
        """A statement without rows."""
        self._call("command", statement, parameters=parameters)

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Inserts rows as one block; returns when they are durable."""
        if rows:
            # The client would ask for the columns' types each time.
            types = self._types.get((table, *columns))
            settings = {"async_insert": 0}
            context = self._call(
                "create_insert_context", table, columns, column_types=types, settings=settings, data=rows
            )
            self._types[table, *columns] = context.column_types
            self._call("insert", context=context)

    def insert_arrow(self, table: str, rows: pa.Table) -> None:
        """Inserts an Arrow table as one block; returns when it is durable."""
        if rows.num_rows:
            # Rows that repeat collapse in a merge, as those of different blocks do: no need to look for them now.
            self._call("insert_arrow", table, rows, settings={"async_insert": 0, "optimize_on_insert": 0})

    def exists(self) -> bool:
        """Whether the database and its ledger are there."""
        found = self._call(
            "query",
            "SELECT 1 FROM system.tables WHERE database = {database:String} AND name = 'usage'",
            parameters={"database": self.database},
            database="",
        )
        return bool(found.result_rows)

    def migrate(self) -> list[str]:
        """Applies the migrations that are missing, in order; returns their names."""
        self._call("command", f"CREATE DATABASE IF NOT EXISTS {quoted(self.database)}", database="")
        self.command(
            "CREATE TABLE IF NOT EXISTS migrations (name String, applied_at DateTime64(3, 'UTC') DEFAULT now64(3))"
            " ENGINE = ReplacingMergeTree ORDER BY name"
        )
        done = {name for (name,) in self.query("SELECT name FROM migrations")}
        applied = []
        folder = resources.files("sinks").joinpath("migrations")
        for file in sorted(folder.iterdir(), key=lambda each: each.name):
            if not file.name.endswith(".sql") or file.name in done:
                continue
            for statement in file.read_text().split(";\n"):
                if statement.strip():
                    self.command(statement)
            self.insert("migrations", ["name"], [[file.name]])
            applied.append(file.name)
        return applied

    def _call(self, name: str, *arguments: Any, database: str | None = None, **options: Any) -> Any:
        try:
            if database is not None:
                return getattr(self._connect("default"), name)(*arguments, **options)
            client = self._client
            if client is None:
                client = self._client = self._connect(self.database)
            return getattr(client, name)(*arguments, **options)
        except DatabaseError as error:
            self._client = None
            raise LedgerUnavailable(str(error)) from error
        except Exception:
            self._client = None
            raise
        finally:
            if self._client is None:
                self._types.clear()

    def _connect(self, database: str) -> Any:
        return clickhouse_connect.get_client(
            host=self._url.hostname or "127.0.0.1",
            port=self._url.port or (8443 if self._url.scheme == "https" else 8123),
            secure=self._url.scheme == "https",
            username=self._url.username or "default",
            password=self._url.password or "",
            database=database,
            autogenerate_session_id=False,
            connect_timeout=5,
            send_receive_timeout=300,
            query_limit=0,
            # Bound arrays of a batch's ids outgrow a URL.
            form_encode_query_params=True,
        )


def quoted(identifier: str) -> str:
    """A database's or table's name inside backquotes; it comes from settings, never from a user."""
    if not identifier.replace("_", "").isalnum():
        raise ValueError(f"{identifier!r} is no name of a database")
    return f"`{identifier}`"
