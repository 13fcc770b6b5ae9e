"""A fetch of Usage records decoded at once, as columns.

Each record is read inside its own bytes alone: one that claims a wrong length cannot reach its
neighbour.  What is not plainly sound here is left to the codec, which reads it by itself and says
what is wrong; so this knows no reasons, only the one layout that all Usage is written in.

All integers of Avro are zigzag varints; one of up to eight bytes is read from the eight bytes that
begin at its place, for all records together (Avro specification, "Binary Encoding").
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import fastavro
import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from streams.codec import schema_source

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]

_HEADER_BYTES = 5
#: Around all records, so that the eight bytes at and before any place of theirs are there.
_MARGIN = bytes(8)
_HIGH_BITS = np.uint64(0x8080808080808080)
#: Takes groups of seven bits together: mask of the lower and of the upper of two neighbours, shift.
_JOIN_GROUPS = [
    (np.uint64(0x007F007F007F007F), np.uint64(0x7F007F007F007F00), np.uint64(1)),
    (np.uint64(0x00003FFF00003FFF), np.uint64(0x3FFF00003FFF0000), np.uint64(2)),
    (np.uint64(0x000000000FFFFFFF), np.uint64(0x0FFFFFFF00000000), np.uint64(4)),
]
_ONE = np.uint64(1)

#: The layout: the fields of `Usage.avsc` in order, with their Avro types.
LAYOUT = (
    ("id", "string"),
    ("revision", "long"),
    ("supplier_id", "string"),
    ("ods_code", "string"),
    ("item_id", "string"),
    ("quantity", "decimal"),
    ("occurred_at", "timestamp-micros"),
)
#: What a record is decoded to: the fields of the layout, the quantity as its unscaled integer.
COLUMNS = tuple(f"{name}_micros" if kind == "decimal" else name for name, kind in LAYOUT)
_TYPES: dict[str, Any] = {
    name: {"string": pl.String, "timestamp-micros": pl.Datetime("us", "UTC")}.get(kind, pl.Int64)
    for name, (_, kind) in zip(COLUMNS, LAYOUT, strict=True)
}
_INT64 = 2**63
#: Far above any real one; what is longer would multiply with every reading of a batch.
CODE_MAX_CHARACTERS = 256


class Decoded(NamedTuple):
    """The sound records as columns (see COLUMNS), in order, and which of the records they are."""

    frame: pl.DataFrame
    sound: Flags


def decode(values: Sequence[bytes | None], schema_id: int) -> Decoded:
    """Decodes records written with the schema of this id, each in the Confluent wire format."""
    plain = [value or b"" for value in values]
    lengths = np.fromiter(map(len, plain), np.int64, len(plain))
    records = _Records(b"".join((_MARGIN, *plain, _MARGIN)), lengths)
    records.take_header(schema_id)
    columns: dict[str, Integers | pa.Array] = {}
    bounds: dict[str, tuple[Integers, Integers]] = {}
    for name, kind in LAYOUT:
        if kind == "string":
            bounds[name] = records.take_bytes()
        elif kind == "decimal":
            columns[f"{name}_micros"] = records.take_decimal()
        else:
            columns[name] = records.take_long()
    records.end()
    strings = _strings(records, bounds)
    columns = {name: column[records.sound] for name, column in columns.items()} | strings
    # Series by series: of a small fetch an expression costs more than all that is done with its records.
    return Decoded(pl.DataFrame([pl.Series(name, columns[name], kind) for name, kind in _TYPES.items()]), records.sound)


class _Records:
    """Records side by side in one buffer, read field by field; `sound` are those without a fault so far."""

    def __init__(self, buffer: bytes, lengths: Integers) -> None:
        self.buffer = buffer
        size = len(buffer) - 7
        #: The eight bytes from every place on, as one number: element i begins at byte i.
        self._little: Words = np.ndarray((size,), "<u8", buffer, strides=(1,))
        self._big: Words = np.ndarray((size,), ">u8", buffer, strides=(1,))
        self._ends: Integers = np.cumsum(lengths) + len(_MARGIN)
        self._at: Integers = self._ends - lengths
        self.sound: Flags = lengths > _HEADER_BYTES

    def take_header(self, schema_id: int) -> None:
        """The zero byte and the schema's id."""
        self._require((self._big[self._at] >> np.uint64(24)) == np.uint64(schema_id))
        self._advance(np.full_like(self._at, _HEADER_BYTES))

    def take_long(self) -> Integers:
        """An int or long of up to eight bytes (larger than any instant here)."""
        word = self._little[self._at]
        stops = ~word & _HIGH_BITS
        self._require(stops != 0)
        first_stop = stops & (~stops + _ONE)
        word &= (first_stop << _ONE) - _ONE
        for lower, upper, shift in _JOIN_GROUPS:
            word = (word & lower) | ((word & upper) >> shift)
        self._advance((np.bitwise_count(first_stop - _ONE) >> 3).astype(np.int64) + 1)
        value: Integers = (word >> _ONE).view(np.int64) ^ -(word & _ONE).view(np.int64)
        return value

    def take_bytes(self) -> tuple[Integers, Integers]:
        """Where a string or bytes begins and ends in the buffer."""
        length = self.take_long()
        self._require(length >= 0)
        start = self._at
        self._advance(length)
        return start, self._at

    def take_decimal(self) -> Integers:
        """A decimal's unscaled integer, of one to eight bytes, the highest first."""
        start, end = self.take_bytes()
        length = end - start
        self._require((length > 0) & (length <= 8))
        unused = ((8 - np.clip(length, 1, 8)) * 8).astype(np.int64)
        word = self._big[end - 8].astype(np.int64)
        number: Integers = (word << unused) >> unused
        return number

    def end(self) -> None:
        """Nothing is left of any record."""
        self._require(self._at == self._ends)

    def _require(self, sound: Flags) -> None:
        self.sound &= sound

    def _advance(self, by: Integers) -> None:
        # One that would go beyond its end stays where it is, whatever is read there.
        fits = self.sound & (by <= self._ends - self._at)
        self.sound = fits
        self._at = np.where(fits, self._at + by, self._at)


def _strings(records: _Records, bounds: dict[str, tuple[Integers, Integers]]) -> dict[str, pa.Array]:
    """The columns of text of the sound records; a record with any that is not UTF-8 is sound no more."""
    try:
        return _cut(records, bounds)
    except pa.ArrowInvalid:
        for row in np.flatnonzero(records.sound):
            for starts, ends in bounds.values():
                try:
                    records.buffer[starts[row] : ends[row]].decode()
                except UnicodeDecodeError:
                    records.sound[row] = False
        return _cut(records, bounds)


def _cut(records: _Records, bounds: dict[str, tuple[Integers, Integers]]) -> dict[str, pa.Array]:
    # All bounds in order cut the buffer into texts and what lies between them: every second piece
    # is a text, of the fields in turn.
    edges = np.stack([edge[records.sound] for pair in bounds.values() for edge in pair], axis=1).ravel()
    pieces = max(len(edges) - 1, 0)
    edges = np.concatenate([edges, np.zeros(1 if not len(edges) else 0, np.int64)])
    buffers = [None, pa.py_buffer(edges), pa.py_buffer(records.buffer)]
    cut = pa.Array.from_buffers(pa.large_binary(), pieces, buffers)
    width = 2 * len(bounds)
    texts = {}
    for place, name in enumerate(bounds):
        every = np.arange(2 * place, pieces, width)
        # pa.array() would import pandas first, where it is installed: a second of the worker's start.
        texts[name] = cut.take(pa.Array.from_buffers(pa.int64(), len(every), [None, pa.py_buffer(every)]))
    return {name: text.cast(pa.large_string()) for name, text in texts.items()}


def decode_batches(values: Sequence[bytes | None]) -> tuple[pl.DataFrame, list[int]]:
    """The readings of UsageBatch records as columns, with `place` (which of the records) and `index` in it.

    Also returns which places the codec must look at.  The values are in the wire format and name the
    schema of UsageBatch, or are None.  Readings have no known bounds, so they are read one by one.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("place", "index", *COLUMNS)}
    left = []
    for place, value in enumerate(values):
        readings = _readings(value) if value else None
        if readings is None:
            left.append(place)
            continue
        columns["place"] += [place] * len(readings)
        columns["index"] += range(len(readings))
        for name, column in zip(COLUMNS, zip(*readings, strict=True), strict=False):
            columns[name] += column
    return pl.DataFrame(columns, schema={"place": pl.Int64, "index": pl.Int32, **_TYPES}), left


def _readings(value: bytes) -> list[tuple[Any, ...]] | None:
    """The readings of a UsageBatch as rows of COLUMNS; None where anything is not as it should be."""
    body = io.BytesIO(value)
    body.seek(_HEADER_BYTES)
    try:
        batch = fastavro.schemaless_reader(body, _plain("UsageBatch"))
        supplier_id, ods_code = batch["supplier_id"], batch["ods_code"]
        if max(len(supplier_id), len(ods_code)) > CODE_MAX_CHARACTERS:
            return None  # each reading would repeat it
        readings = [
            (
                each["id"],
                each["revision"],
                supplier_id,
                ods_code,
                each["item_id"],
                int.from_bytes(each["quantity"], "big", signed=True),
                each["occurred_at"],
            )
            for each in batch["usages"]
        ]
    except Exception:  # fastavro raises nearly anything on hostile bytes; the codec says what is wrong
        return None
    sound = body.tell() == len(value) and all(-_INT64 <= each[5] < _INT64 for each in readings)
    return readings if sound else None


@cache
def _plain(name: str) -> Any:
    """A schema without its logical types: integers and bytes are enough for columns."""

    def plain(schema: Any) -> Any:
        if isinstance(schema, dict):
            without = ("logicalType", "precision", "scale")
            return {key: plain(value) for key, value in schema.items() if key not in without}
        return [plain(each) for each in schema] if isinstance(schema, list) else schema

    return fastavro.parse_schema(plain(schema_source(name)))
