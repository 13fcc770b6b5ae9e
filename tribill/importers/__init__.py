"""Turns the files that finance really receives into interchange records, and says what it had to refuse."""

from collections.abc import Iterator, Mapping, Set
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from tribill.importers.allocations import import_allocations
from tribill.importers.list_sizes import import_list_sizes
from tribill.importers.orders import import_orders
from tribill.importers.practices import import_practices
from tribill.importers.row import Problem, Record
from tribill.importers.table import MAX_BYTES

__all__ = [
    "IMPORTERS",
    "MAX_BYTES",
    "Importer",
    "Problem",
    "Record",
    "import_allocations",
    "import_list_sizes",
    "import_orders",
    "import_practices",
]


class Importer(Protocol):
    """What every importer takes; each has settings of its own besides, all with defaults.

    It reads the file as a stream and yields records and problems as they come; a problem stops nothing but
    its row. `recorded_at` is the moment when the file was received: give the same again for the same file,
    and an import repeated is a harmless duplicate. A code that is not in `practices` is refused, if given.
    """

    def __call__(
        self, path: Path, *, recorded_at: datetime, practices: Set[str] | None = None, max_bytes: int = ...
    ) -> Iterator[Record | Problem]: ...


IMPORTERS: Mapping[str, Importer] = MappingProxyType(
    {
        "orders": import_orders,
        "list-sizes": import_list_sizes,
        "practices": import_practices,
        "allocations": import_allocations,
    }
)
