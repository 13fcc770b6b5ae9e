"""The reference data that tribill carries: practices, list sizes, systems, prices and suppliers.

All of it is real. Sources, licences and known flaws: README.md beside this file.
Contains public sector information licensed under the Open Government Licence v3.0.
"""

import csv
import gzip
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from importlib import resources
from io import TextIOWrapper
from pathlib import Path

__all__ = [
    "CataloguePrice",
    "ListSize",
    "Practice",
    "PracticeSystem",
    "Supplier",
    "catalogue",
    "file",
    "list_size_history",
    "list_sizes",
    "practice_systems",
    "practices",
    "suppliers",
]


@dataclass(frozen=True, slots=True)
class Practice:
    """A practice and what it belonged to on 1 January 2022; "" where the source has nothing."""

    ods_code: str
    name: str
    sub_icb_code: str
    sub_icb_name: str
    pcn_code: str
    pcn_name: str
    icb_code: str
    icb_name: str
    region_code: str
    region_name: str
    as_of: date


@dataclass(frozen=True, slots=True)
class ListSize:
    """The patients registered with a practice at a snapshot."""

    ods_code: str
    as_of: date
    patients: int


@dataclass(frozen=True, slots=True)
class PracticeSystem:
    """The supplier of a practice's clinical system in mid 2019."""

    ods_code: str
    supplier_id: str


@dataclass(frozen=True, slots=True)
class CataloguePrice:
    """One flat list price, in pounds excluding VAT; an item can have several."""

    price_id: int
    item_id: str
    supplier_id: str
    item_name: str
    item_type: str
    provisioning: str
    unit: str
    time_unit: str
    price: Decimal
    draft: bool


@dataclass(frozen=True, slots=True)
class Supplier:
    """A supplier by its five digits, with its trading name of 2020."""

    supplier_id: str
    name: str


def practices() -> tuple[Practice, ...]:
    """6,527 practices."""
    return tuple(
        Practice(
            ods_code=row["ods_code"],
            name=row["name"],
            sub_icb_code=row["sub_icb_code"],
            sub_icb_name=row["sub_icb_name"],
            pcn_code=row["pcn_code"],
            pcn_name=row["pcn_name"],
            icb_code=row["icb_code"],
            icb_name=row["icb_name"],
            region_code=row["region_code"],
            region_name=row["region_name"],
            as_of=date.fromisoformat(row["as_of"]),
        )
        for row in _rows("practices")
    )


def list_sizes() -> tuple[ListSize, ...]:
    """Two snapshots: 7,033 practices on 1 November 2018 and 6,658 on 1 January 2021."""
    return _list_sizes("list_sizes")


def list_size_history() -> tuple[ListSize, ...]:
    """63,808 sizes in the eight quarters from 1 April 2013, of another publisher: do not splice."""
    return _list_sizes("list_sizes_history")


def practice_systems() -> tuple[PracticeSystem, ...]:
    """6,640 practices that reported one supplier, EMIS (10000) or TPP (10052)."""
    supplier_ids = {"EMIS": "10000", "TPP": "10052"}
    return tuple(
        PracticeSystem(row["ods_code"], supplier_ids[row["supplier"]]) for row in _rows("practice_systems")
    )


def catalogue() -> tuple[CataloguePrice, ...]:
    """115 flat prices of 112 items. What the source calls one-off has the time unit none."""
    return tuple(
        CataloguePrice(
            price_id=int(row["price_id"]),
            item_id=row["item_id"],
            supplier_id=row["supplier_id"],
            item_name=row["item_name"],
            item_type=row["item_type"],
            provisioning=row["provisioning"],
            unit=row["unit"],
            time_unit=row["time_unit"].replace("one_off", "none"),
            price=Decimal(row["price_gbp"]),
            draft=row["item_status"] == "draft",
        )
        for row in _rows("catalogue")
    )


def suppliers() -> tuple[Supplier, ...]:
    """74 suppliers."""
    return tuple(Supplier(row["supplier_id"], row["name"]) for row in _rows("suppliers"))


def file(name: str) -> AbstractContextManager[Path]:
    """The path of a file, such as `list_sizes`, while the context is open: importers read it."""
    return resources.as_file(resources.files(__name__) / f"{name}.csv.gz")


def _list_sizes(name: str) -> tuple[ListSize, ...]:
    return tuple(
        ListSize(row["ods_code"], date.fromisoformat(row["as_of"]), int(row["patients"]))
        for row in _rows(name)
    )


def _rows(name: str) -> Iterator[dict[str, str]]:
    with file(name) as path, gzip.open(path) as content:
        yield from csv.DictReader(TextIOWrapper(content, encoding="utf-8", newline=""))
