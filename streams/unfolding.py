"""Bounds what a compressed batch may unfold to: a megabyte on the wire can be gigabytes in memory.

The broker's `max.message.bytes` holds for what is compressed, and aiokafka unfolds a batch whole.  Here a batch is
unfolded up to a limit; one that goes beyond it, or cannot be unfolded at all, is handed over as one record, at the
offset of its last, that has the compressed bytes as its value: no decoder takes it, so it becomes a dead letter
like any other, and what lies behind it goes on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cramjam
import numpy as np
from aiokafka.consumer import fetcher
from aiokafka.record._crecords import default_records

#: A batch may unfold to so much; and of one fetch no more is unfolded once this is reached, the rest is fetched again.
UNFOLDED_MAX_BYTES = 64 * 1024 * 1024


class TooLarge(ValueError):
    """A batch that unfolds to more than it may."""


class _Last:
    """What was unfolded last, by the one thread that reads."""

    payload: bytes = b""
    size: int = 0


def _gunzip(payload: bytes) -> bytes:
    found = bytearray()
    while payload:
        unzip = zlib.decompressobj(wbits=31)
        found += unzip.decompress(payload, UNFOLDED_MAX_BYTES + 1 - len(found))
        if len(found) > UNFOLDED_MAX_BYTES or not unzip.eof:
            raise TooLarge
        payload = unzip.unused_data
    return bytes(found)


def _unsnap(payload: bytes) -> bytes:
    # Raw blocks say how long they are; xerial's frame is blocks, each behind its length.
    blocks = [payload]
    if payload.startswith(b"\x82SNAPPY\x00"):
        blocks, at = [], 16
        while at < len(payload):
            size = int.from_bytes(payload[at : at + 4], "big")
            blocks.append(payload[at + 4 : at + 4 + size])
            at += 4 + size
    if sum(cramjam.snappy.decompress_raw_len(block) for block in blocks) > UNFOLDED_MAX_BYTES:
        raise TooLarge
    return b"".join(bytes(cramjam.snappy.decompress_raw(block)) for block in blocks)


def _into(decompress_into: Callable[[bytes, Any], int]) -> Callable[[bytes], bytes]:
    def unfold(payload: bytes) -> bytes:
        try:
            room = np.empty(min(16 * len(payload) + 65_536, UNFOLDED_MAX_BYTES), np.uint8)
            return room[: decompress_into(payload, room)].tobytes()
        except cramjam.DecompressionError:  # perhaps for want of room: most batches take little, and room costs time
            room = np.empty(UNFOLDED_MAX_BYTES, np.uint8)
            return room[: decompress_into(payload, room)].tobytes()

    return unfold


def _noted(unfold: Callable[[bytes], bytes]) -> Callable[[Any], bytes]:
    def noting(payload: Any) -> bytes:
        _Last.payload, _Last.size = bytes(payload), UNFOLDED_MAX_BYTES
        found = unfold(_Last.payload)
        _Last.payload, _Last.size = b"", len(found)
        return found

    return noting


class _Batch:
    """A batch of aiokafka's that, where it cannot be unfolded, is one record."""

    def __init__(self, batch: Any, spend: Callable[[int], None]) -> None:
        self._batch, self._spend = batch, spend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:  # of a control batch, which is not compressed
        return next(self._batch)

    def __iter__(self) -> Iterator[Any]:
        _Last.size = 0
        try:
            records: Iterator[Any] = iter(self._batch)
        except Exception:  # each library raises its own on bytes that are not compressed as they say
            records = iter([self._whole(_Last.payload)])
            _Last.payload = b""
        self._spend(_Last.size)
        return records

    def _whole(self, payload: bytes) -> Any:
        batch = self._batch
        stamp = {"timestamp": batch.max_timestamp, "timestamp_type": batch.timestamp_type, "checksum": None}
        return SimpleNamespace(offset=batch.next_offset - 1, key=None, value=payload, headers=[], **stamp)


class BoundedRecords(fetcher.MemoryRecords):  # type: ignore[misc]  # aiokafka is untyped
    """The batches of one fetch of a partition."""

    _left = UNFOLDED_MAX_BYTES

    def has_next(self) -> bool:
        """Whether there is another batch, and room to unfold it."""
        return self._left > 0 and bool(super().has_next())

    def next_batch(self) -> Any:
        """The next batch; None when there is none."""
        batch = super().next_batch()
        return None if batch is None else _Batch(batch, self._spend)

    def _spend(self, size: int) -> None:
        self._left -= size


def bound_unfolding() -> None:
    """aiokafka unfolds batches this way from now on, in this process."""
    for name, unfold in (
        ("gzip_decode", _gunzip),
        ("snappy_decode", _unsnap),
        ("lz4_decode", _into(cramjam.lz4.decompress_into)),
        ("zstd_decode", _into(cramjam.zstd.decompress_into)),
    ):
        setattr(default_records, name, _noted(unfold))
    fetcher.MemoryRecords = BoundedRecords
