"""The stores in memory answer what ClickHouse and Redis do: both are asked, all through whole histories."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pytest

from sinks.accruals import Accruals, decimal, fraction_text
from sinks.claims import Claims
from sinks.clickhouse import ClickHouse
from sinks.documents import Documents
from sinks.evidence import EvidenceStore
from sinks.ledger import Ledger
from sinks.parties import PartyStore
from streams.settings import Settings
from tests.simulation.check import check
from tests.simulation.history import book_of
from tests.simulation.memory import MemorySinks
from tests.simulation.world import World
from tribill.embedded.stack import EmbeddedStack

pytestmark = pytest.mark.timeout(280)

HISTORIES = int(os.environ.get("TRIBILL_STAND_IN_HISTORIES", "6"))
#: It counts rows as they lie on the disk, of which a merge makes fewer; who asks only looks whether it has changed.
_OWN = {"state_of"}
#: No book has anything later, and every test runs later.
_LATER = datetime(2026, 9, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStack]:
    """ClickHouse and Redis."""
    with EmbeddedStack(tmp_path_factory.mktemp("stack"), kafka="127.0.0.1:1") as stack:
        yield stack


class Both:
    """Asks several real stores' methods and the model's, and compares the answers."""

    def __init__(self, model: Any, *real: Any) -> None:
        self._model, self._real = model, real
        self.asked: set[str] = set()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        real = next(getattr(each, method) for each in self._real if hasattr(each, method))

        def both(*arguments: Any) -> Any:
            self.asked.add(method)
            expected, found = real(*arguments), getattr(self._model, method)(*arguments)
            found = list(found) if isinstance(found, Iterator) else found
            if method not in _OWN:
                assert comparable(found) == comparable(expected), f"{method}{arguments}"
            return found

        return both


def comparable(answer: Any) -> Any:
    """An answer without what does not count: the order of rows, and an instant that only the clock decides."""
    if isinstance(answer, Iterator):
        answer = list(answer)
    if isinstance(answer, pl.DataFrame):
        return {tuple(sorted(row.items())) for row in answer.iter_rows(named=True)}
    if isinstance(answer, tuple) and isinstance(answer[0], pl.Series):
        return answer[0].to_list(), answer[1] < _LATER
    return sorted(answer, key=repr) if isinstance(answer, list) else answer


class BothSinks(MemorySinks):
    """The stores in memory, each beside the real one."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.clickhouse = ClickHouse(settings)
        self.clickhouse.migrate()
        real = Ledger(self.clickhouse)
        claims = RealClaims(settings, lambda: not real.has_usage())
        claims.flush()
        self.models = (self.ledger, self.accruals, self.documents)
        self.ledger = Both(self.ledger, real)  # type: ignore[assignment]
        self.accruals = Both(self.accruals, Accruals(self.clickhouse))  # type: ignore[assignment]
        stores = Documents(self.clickhouse), EvidenceStore(self.clickhouse)
        self.documents = Both(self.documents, *stores)  # type: ignore[assignment]
        self.parties = Both(self.parties, PartyStore(self.clickhouse))  # type: ignore[assignment]
        self.claims = Both(self.claims, claims)  # type: ignore[assignment]

    def insert(self, table: str, columns: Any, rows: Any) -> None:
        super().insert(table, columns, rows)
        self.clickhouse.insert(table, columns, rows)

    def query(self, statement: str, parameters: Any) -> Any:
        model, self.documents = self.documents, self.models[2]
        found = super().query(statement, parameters)
        self.documents = model
        assert found == self.clickhouse.query(statement, parameters)
        return found


class RealClaims(Claims):
    """The claim store, and what empties it."""

    def flush(self) -> None:
        """FLUSHDB."""
        self._redis.flushdb()


@pytest.mark.parametrize("number", range(HISTORIES))
def test_the_stores_in_memory_do_not_lie(stack: EmbeddedStack, number: int) -> None:
    """The simulation would pass on a ledger that no ClickHouse is."""
    seed = number * 33
    book, expected = book_of(seed)
    world = World(book, seed)
    redis = f"{stack.redis.removesuffix('/0')}/{number % 16}"
    settings = replace(
        world.settings, clickhouse=f"{stack.clickhouse}/simulated{number}", redis=redis, claim_window_days=20_000
    )
    sinks = BothSinks(settings)
    world.sinks = sinks
    world.play()
    ledger, accruals, documents = sinks.models
    query = sinks.clickhouse.query
    drawn = {key: max(said, key=lambda each: each[0]) for key, said in accruals.drawn.items()}
    found = query(
        "SELECT ordering_party, month, version, allocation_pence, wanted_pence, coverage FROM allocations_drawn FINAL"
    )
    assert {(party, month): tuple(row) for party, month, *row in found} == {
        key: (at, decimal(allocation), decimal(each.wanted), fraction_text(each.coverage))
        for key, (at, allocation, each) in drawn.items()
    }
    bodies = dict(query("SELECT number, body FROM documents FINAL"))
    assert bodies == {what[1]: next(iter(each)) for what, each in documents.contents.items() if what[0] == "document"}
    [(kept,)] = query("SELECT count() FROM (SELECT DISTINCT topic, partition, offset, `index` FROM usage)")
    assert kept == len({(row["topic"], row["partition"], row["offset"], row["index"]) for row in ledger.usage})
    sinks.ledger, sinks.accruals, sinks.documents = sinks.models
    check(world, expected)
    sinks.clickhouse.command(f"DROP DATABASE {sinks.clickhouse.database}")
