"""A compressed batch that unfolds to more than memory holds is one refused record, and its neighbours are read."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cramjam
import pytest
from aiokafka.consumer import fetcher
from aiokafka.record._crecords import default_records
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.structs import TopicPartition
from confluent_kafka import Producer
from hypothesis import given, settings
from hypothesis import strategies as st

from streams import unfolding
from streams.codec import Codec, Undecodable
from streams.settings import Settings
from tests.test_transport import address, bench, wait

__all__ = ["address"]

CODECS = {"gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
LIMIT = unfolding.UNFOLDED_MAX_BYTES


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    names = ("gzip_decode", "snappy_decode", "lz4_decode", "zstd_decode")
    before = [(default_records, name, getattr(default_records, name)) for name in names]
    before.append((fetcher, "MemoryRecords", fetcher.MemoryRecords))
    unfolding.bound_unfolding()
    yield
    for owner, name, value in before:
        setattr(owner, name, value)


def batch(codec: int, values: list[bytes], first: int = 0) -> bytes:
    """A record batch as a producer sends it."""
    made = DefaultRecordBatchBuilder(
        magic=2, compression_type=codec, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=0,
        batch_size=1 << 30,
    )  # fmt: skip
    for number, value in enumerate(values):
        made.append(number, timestamp=1_000 + number, key=b"k", value=value, headers=[])
    data = bytes(made.build())
    return first.to_bytes(8, "big") + data[8:]  # the checksum leaves the offset out


def fetched(data: bytes, offset: int = 0) -> tuple[list[Any], int]:
    """The records of a fetch, and where the next begins."""
    records = fetcher.PartitionRecords(
        TopicPartition("usage", 0), fetcher.MemoryRecords(data), [], offset, None, None, True, 1
    )
    return list(records), records.next_fetch_offset


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_that_is_too_large(codec: str) -> None:
    """A worker would be killed for its memory each time that it is started, and say nothing."""
    bomb = batch(CODECS[codec], [b"a", bytes(LIMIT)], first=2)
    around = batch(CODECS[codec], [b"x", b"y"]), batch(CODECS[codec], [b"z"], first=4)
    records, end = fetched(around[0] + bomb + around[1])
    if end == 4:  # the room of one fetch is spent: the next goes on behind the batch
        more, end = fetched(around[1], end)
        records += more
    assert [record.offset for record in records] == [0, 1, 3, 4]
    assert [record.value for record in records if record.offset != 3] == [b"x", b"y", b"z"]
    assert end == 5
    refused = records[2]
    assert refused.value == bomb[61:], "the original bytes are kept"
    with pytest.raises(Undecodable, match="is compressed"):
        Codec(Settings()).decode(refused.value, ("Usage",))


def test_a_fetch_of_many_large_batches_is_read_in_parts() -> None:
    """Batches that are each within the limit would together outgrow memory."""
    value = bytes(LIMIT * 3 // 5)
    data = [batch(4, [value], first=first) for first in range(5)]
    seen, at, most = [], 0, 0
    while at < 5:
        records, end = fetched(b"".join(data[at:]), at)
        assert end > at
        most = max(most, len(records))
        seen += [record.offset for record in records]
        at = end
    assert seen == [0, 1, 2, 3, 4]
    assert most < 5


@given(st.sampled_from(sorted(CODECS)), st.binary(max_size=300), st.lists(st.binary(max_size=50), min_size=1))
@settings(deadline=None)
def test_any_bytes_for_a_compressed_batch(codec: str, spoilt: bytes, values: list[bytes]) -> None:
    """Bytes that are not compressed as they say would end the worker."""
    good = batch(CODECS[codec], values)
    records, end = fetched(good)
    assert ([record.value for record in records], end) == (values, len(values))
    for payload in (spoilt, good[61:] + spoilt):
        name = f"{codec}_decode"
        try:
            found = getattr(default_records, name)(payload)
        except (ValueError, zlib.error, cramjam.DecompressionError):
            continue
        assert len(found) <= LIMIT


def test_a_bomb_takes_little_memory() -> None:
    """A gigabyte would be held although it is refused."""
    code = """
import resource, zlib
from aiokafka.record._crecords import default_records
from streams.unfolding import bound_unfolding
bound_unfolding()
squeeze = zlib.compressobj(9, wbits=31)
bomb = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(1024)) + squeeze.flush()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    default_records.gzip_decode(bomb)
except ValueError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) * 1024 < 4 * LIMIT


def test_a_worker_survives_it(address: str, tmp_path: Path) -> None:
    """A batch that no memory holds would stop its partition for good."""
    with bench(address, tmp_path, partitions=1) as made:
        made.send(0, 4)
        options = {"bootstrap.servers": address, "compression.type": "zstd", "message.max.bytes": 2 * LIMIT}
        producer = Producer(options)
        producer.produce(made.topic, bytes(LIMIT + 1), partition=0)
        assert not producer.flush(60)
        made.send(4, 8)
        made.start()
        wait(lambda: made.committed() == {0: 9})
        values = [value for line in made.lines("done") for value in line["values"]]
        assert [value for value in values if value.isdigit()] == [str(number) for number in range(8)]
        [refused] = [value for value in values if not value.isdigit()]
        assert refused.encode(errors="replace").startswith(b"(")  # zstd's first byte: it was not unfolded
        assert len(refused) < 1_000_000
