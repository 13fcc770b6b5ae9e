"""Intake by columns lets through and refuses exactly what it does reading by reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import intake
from agents.intake import ID_MAX_CHARACTERS, Intake
from agents.usage import Usage
from sinks.dead_letters import DeadLetter
from streams.batch import Batch
from streams.codec import Codec
from streams.columns import CODE_MAX_CHARACTERS, Decoded, decode, decode_batches
from streams.settings import Settings

CODEC = Codec(Settings())
ARRIVED = datetime(2026, 4, 3, 12, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


@dataclass
class Record:
    """What of a record intake looks at."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


codes = st.sampled_from(["10030", "10031", "", "é" * (CODE_MAX_CHARACTERS // 2 + 1), "x" * (CODE_MAX_CHARACTERS + 1)])
readings = st.fixed_dictionaries(
    {
        "id": st.text(max_size=3) | st.sampled_from(["x" * ID_MAX_CHARACTERS, "é" * ID_MAX_CHARACTERS, "x" * 5000]),
        "revision": st.sampled_from([0, 1, -1, 2**62]),
        "item_id": st.sampled_from(["10030-S-001", "10031-S-001", "10030", "", "y" * 300]),
        "quantity": st.sampled_from([-1, 0, 1, 5_000_000, 10**18 - 1]).map(lambda each: Decimal(each).scaleb(-6)),
        "occurred_at": st.sampled_from(
            [
                ARRIVED,
                ARRIVED + timedelta(days=1),
                ARRIVED + timedelta(days=1) + MICROSECOND,
                datetime(2000, 1, 1, tzinfo=UTC),
                datetime(2000, 1, 1, tzinfo=UTC) - MICROSECOND,
                datetime(9999, 12, 30, tzinfo=UTC),
            ]
        ),
    }
)
practices = st.sampled_from(["A83005", "A83006"]) | codes


@st.composite
def values(draw: st.DrawFn) -> bytes | None:
    kind = draw(st.sampled_from(["usage", "usage", "usage", "batch", "garbage"]))
    parties = {"supplier_id": draw(codes), "ods_code": draw(practices)}
    if kind == "usage":
        return CODEC.encode("Usage", {**draw(readings), **parties})
    if kind == "batch":
        return CODEC.encode("UsageBatch", {"usages": draw(st.lists(readings, max_size=4)), **parties})
    return draw(st.sampled_from([None, b"", b"\0\0\0\0\1", b'{"id": "x"}', b"\0\0\0\0\2\0", b"\0" * 2_000]))


def done(agent: Intake, batch: Batch, speaker: str | None) -> tuple[list[dict[str, Any]], list[DeadLetter]]:
    letters: list[DeadLetter] = []
    rows = agent._rows(batch, speaker, letters)
    return rows.to_dicts(), sorted(letters, key=lambda each: (each.offset, each.index))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(values(), min_size=1, max_size=10),
    st.sampled_from([None, "10030"]),
    st.sampled_from(["", (ARRIVED + timedelta(days=3)).isoformat()]),
    st.lists(st.sampled_from([0, -5, 1, 2**62]), max_size=3),
)
def test_by_columns_as_by_readings(
    sent: Sequence[bytes | None], speaker: str | None, floor: str, clocks: Sequence[int]
) -> None:
    """A reading's fate would depend on how quickly it was looked at."""
    chosen = Settings(arrival_floor=floor, record_max_bytes=1_500)
    agent = Intake(SimpleNamespace(settings=chosen, codec=CODEC))  # type: ignore[arg-type]
    stamps = [int(ARRIVED.timestamp() * 1000)] * len(sent)
    stamps[: len(clocks)] = clocks[: len(sent)]
    records = [
        Record(3 * place, stamp, b"k", value) for place, (stamp, value) in enumerate(zip(stamps, sent, strict=True))
    ]
    batch = Batch("usage" if speaker is None else f"usage.{speaker}", 2, records)
    rows, letters = done(agent, batch, speaker)

    def nothing(values: Sequence[bytes | None], schema_id: int) -> Decoded:
        return Decoded(decode([], schema_id).frame, np.zeros(len(values), np.bool_))

    def no_batches(values: Sequence[bytes | None]) -> tuple[pl.DataFrame, list[int]]:
        return decode_batches([])[0], list(range(len(values)))

    with mock.patch.multiple(intake, decode=nothing, decode_batches=no_batches):
        rows_one_by_one, letters_one_by_one = done(agent, batch, speaker)
    assert rows == rows_one_by_one
    assert letters == letters_one_by_one
    assert rows == sorted(rows, key=lambda row: (row["offset"], row["index"]))


def test_most_go_by_columns() -> None:
    """A fetch would go the slow way for one bad record among its neighbours."""
    good = {
        "id": "u1", "revision": 0, "supplier_id": "10030", "ods_code": "A83005", "item_id": "10030-S-001",
        "quantity": Decimal(3), "occurred_at": ARRIVED,
    }  # fmt: skip
    encoded = CODEC.encode("Usage", good)
    bad = CODEC.encode("Usage", {**good, "quantity": Decimal(-3)})
    agent = Intake(SimpleNamespace(settings=Settings(), codec=CODEC))  # type: ignore[arg-type]
    stamp = int(ARRIVED.timestamp() * 1000)
    records = [Record(place, stamp, None, bad if place == 50 else encoded) for place in range(100)]
    with mock.patch.object(agent, "_readings", wraps=agent._readings) as one_by_one:
        letters: list[DeadLetter] = []
        rows = agent._rows(Batch("usage.10030", 0, records), "10030", letters)
    assert one_by_one.call_count == 1
    assert rows.height == 99
    assert [letter.offset for letter in letters] == [50]


@pytest.mark.parametrize("rows", [1, 7])
def test_blocks_hold_all_rows_in_order(rows: int) -> None:
    """A later offset in an earlier block would let the ledger say that it has what it lacks."""
    sent: list[tuple[int, bytes]] = []
    outbox = SimpleNamespace(send=lambda _, block, partition: sent.append((partition, block)), flush=lambda: None)
    letters = SimpleNamespace(write=lambda _: None)
    agent = Intake(SimpleNamespace(settings=Settings(), codec=CODEC, outbox=outbox, dead_letters=letters))  # type: ignore[arg-type]
    good = {"revision": 0, "supplier_id": "1", "ods_code": "A83005", "item_id": "1-S", "quantity": Decimal(3)}
    records = [
        Record(place, int(ARRIVED.timestamp() * 1000), None, CODEC.encode(
            "Usage", {**good, "id": str(place), "occurred_at": ARRIVED}))
        for place in range(20)
    ]  # fmt: skip
    with mock.patch.object(intake, "BLOCK_ROWS", rows):
        agent.do(Batch("usage", 0, records))
    offsets = []
    for _, block in sent:
        with pa.ipc.open_stream(block) as reader:
            offsets += pl.DataFrame(reader.read_all())["offset"].to_list()
    assert offsets == list(range(20))
    assert len({partition for partition, _ in sent}) == 1


@pytest.mark.parametrize("layout", [pa.string(), pa.string_view()])
def test_blocks_of_before_an_upgrade(layout: pa.DataType) -> None:
    """Polars might write text in another layout one day; blocks of both would stop `usage` for ever."""
    new = pa.table({"id": pa.array(["b"], pa.large_string()), "offset": [7]})
    old = pa.table({"id": pa.array(["a"], layout), "offset": [3]})
    context = SimpleNamespace(settings=Settings(log_generation=2), claims=lambda: SimpleNamespace(check=lambda: None))
    usage = Usage(context)  # type: ignore[arg-type]
    blocks = [Record(offset, 0, None, intake.encode_block(block)) for offset, block in ((4, old), (5, new), (6, old))]
    rows, again = usage._rows(Batch("usage-accepted", 1, blocks))
    assert not again
    assert rows.rows() == [("a", 3, 4, 2, 1), ("b", 7, 5, 2, 1), ("a", 3, 6, 2, 1)]
    assert rows.columns[2:] == ["accepted_offset", "generation", "accepted_partition"]
    wrong = Record(7, 0, None, intake.encode_block(old.drop_columns(["offset"])))
    with pytest.raises(ValueError, match="field names"):
        usage._rows(Batch("usage-accepted", 1, [*blocks, wrong]))
