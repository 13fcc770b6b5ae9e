"""Decoding a fetch by columns: the same as one record at a time, and no record reaches its neighbour."""

from __future__ import annotations

import io
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import fastavro
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streams.codec import Codec, Undecodable, released, schema_source
from streams.columns import COLUMNS, LAYOUT, decode, decode_batches
from streams.settings import Settings

CODEC = Codec(Settings())
USAGE = CODEC.schema_id("Usage")

texts = st.text(max_size=40) | st.sampled_from(["", "10030", "A83005", "10030-S-001", "é" * 70, "\0'\""])
readings = st.fixed_dictionaries(
    {
        "id": texts,
        "revision": st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3),
        "supplier_id": texts,
        "ods_code": texts,
        "item_id": texts,
        "quantity": st.integers(-(10**18) + 1, 10**18 - 1).map(lambda micros: Decimal(micros).scaleb(-6)),
        "occurred_at": st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)).map(  # noqa: DTZ001  # UTC is set next
            lambda at: at.replace(tzinfo=UTC)
        ),
    }
)
#: Readings as anybody sends them; others (of the year 4000, of revision 2**60) are sound only to the codec.
usual_readings = readings.map(
    lambda value: {
        **value,
        "revision": value["revision"] % 2**50,
        "occurred_at": value["occurred_at"].replace(year=2028),
    }
)


def varint(number: int) -> bytes:
    number = number * 2 if number >= 0 else -number * 2 - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@st.composite
def damaged(draw: st.DrawFn) -> bytes | None:
    """A record with something wrong: cut, stretched, a byte changed, a length that lies, or nothing at all."""
    whole = CODEC.encode("Usage", draw(readings))
    kind = draw(st.sampled_from(["cut", "stretch", "byte", "length", "schema", "none", "bytes"]))
    if kind == "none":
        return None
    if kind == "bytes":
        return draw(st.binary(max_size=80))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if kind == "stretch":
        return whole + draw(st.binary(min_size=1, max_size=20))
    if kind == "schema":
        return b"\0\0\0\0" + bytes([draw(st.integers(0, 255))]) + whole[5:]
    if kind == "length":
        # The first length claims as much as its neighbours have, or a lot more, or less than nothing.
        claim = draw(st.integers(-5, 300) | st.sampled_from([2**31, 2**62, -(2**62), 2**55 - 1]))
        return whole[:5] + varint(claim) + whole[6:]
    place = draw(st.integers(0, len(whole) - 1))
    return whole[:place] + bytes([draw(st.integers(0, 255))]) + whole[place + 1 :]


def by_itself(value: bytes | None) -> dict[str, Any] | None:
    try:
        return CODEC.decode(value, ("Usage",)).value
    except Undecodable:
        return None


def row_of(value: dict[str, Any]) -> tuple[Any, ...]:
    micros = int(value["quantity"].scaleb(6))
    return bounded([tuple(micros if name == "quantity_micros" else value[name] for name in COLUMNS)])[0]


def bounded(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Quantities of nineteen digits as one: fastavro rounds them to eighteen, and intake refuses all of them."""
    place = COLUMNS.index("quantity_micros")
    return [(*row[:place], max(-(10**18), min(row[place], 10**18)), *row[place + 1 :]) for row in rows]


@settings(deadline=None)
@given(st.lists(st.one_of(readings.map(lambda value: CODEC.encode("Usage", value)), damaged()), max_size=12))
@example([None])
@example([b"\0\0\0\0\1"])
def test_columns_are_what_the_codec_reads(values: list[bytes | None]) -> None:
    """A hostile record would change, hide or invent a reading of its neighbours."""
    decoded = decode(values, USAGE)
    assert len(decoded.sound) == len(values)
    expected = []
    for value, sound in zip(values, decoded.sound, strict=True):
        if sound:
            alone = by_itself(value)
            assert alone is not None
            expected.append(row_of(alone))
    assert bounded(decoded.frame.rows()) == expected


@settings(deadline=None)
@given(st.lists(usual_readings, min_size=1, max_size=20))
def test_usual_records_are_sound(values: list[dict[str, Any]]) -> None:
    """All would go the slow way, and nobody would notice."""
    assert decode([CODEC.encode("Usage", value) for value in values], USAGE).sound.all()


@settings(deadline=None)
@given(usual_readings, damaged(), st.integers(0, 6), st.integers(0, 6))
def test_a_bad_record_does_not_spoil_its_neighbours(
    good: dict[str, Any], bad: bytes | None, before: int, after: int
) -> None:
    """One record of garbage would send a whole fetch to the dead letters, or swallow the next record."""
    sound = CODEC.encode("Usage", good)
    decoded = decode([sound] * before + [bad] + [sound] * after, USAGE)
    assert decoded.sound[:before].all()
    assert decoded.sound[before + 1 :].all()


@settings(deadline=None)
@given(st.lists(readings, max_size=12), st.data())
def test_the_readings_of_a_batch(values: list[dict[str, Any]], data: st.DataObject) -> None:
    """A batch's readings would differ from the same readings sent one by one."""
    plain = [{key: each for key, each in value.items() if key not in ("supplier_id", "ods_code")} for value in values]
    whole = CODEC.encode("UsageBatch", {"supplier_id": "10030", "ods_code": "A83005", "usages": plain})
    expected = [row_of({**value, "supplier_id": "10030", "ods_code": "A83005"}) for value in values]
    place = data.draw(st.integers(5, len(whole) - 1))
    changed = whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :]
    frame, left = decode_batches([whole, changed, None, whole])
    assert 2 in left
    assert bounded(frame.filter(place=0).select(COLUMNS).rows()) == expected
    assert bounded(frame.filter(place=3).select(COLUMNS).rows()) == expected
    assert frame.filter(place=3)["index"].to_list() == list(range(len(values)))
    if 1 not in left:
        try:
            read = CODEC.decode(changed, ("UsageBatch",)).value
        except Undecodable as error:
            # An instant that Python's calendar lacks is one for columns; intake refuses it by its range.
            assert "OverflowError" in str(error) or "out of range" in str(error)  # noqa: PT017
        else:
            parties = {name: read[name] for name in ("supplier_id", "ods_code")}
            again = frame.filter(place=1).select(COLUMNS).rows()
            assert bounded(again) == [row_of({**each, **parties}) for each in read["usages"]]


def test_the_layout_is_the_schema() -> None:
    """A field added to Usage would make every record slow, or worse, be read as another."""
    fields = schema_source("Usage")["fields"]

    def kind(schema: Any) -> str:
        return schema.get("logicalType", schema["type"]) if isinstance(schema, dict) else schema

    assert tuple((field["name"], kind(field["type"])) for field in fields) == LAYOUT
    assert released()[USAGE][1]["fields"] == fields


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_a_number_written_longer_than_it_need_be(padding: int) -> None:
    """Avro allows it; a reader that took it for something else would disagree with every other reader."""
    body = io.BytesIO()
    fastavro.schemaless_writer(
        body,
        schema_source("Usage"),
        {
            "id": "x", "revision": 3, "supplier_id": "1", "ods_code": "A", "item_id": "1-S",
            "quantity": Decimal(1), "occurred_at": datetime(2026, 4, 1, tzinfo=UTC),
        },
    )  # fmt: skip
    usual = body.getvalue()
    longer = usual[:2] + bytes([usual[2] | 128] + [128] * padding + [0]) + usual[3:]
    head = b"\0" + USAGE.to_bytes(4, "big")
    first, second = decode([head + usual, head + longer], USAGE).frame.rows()
    assert first == second


def test_polars_knows_numpy_before_there_are_lanes() -> None:
    """It binds it when it first meets an array; two lanes of a worker that do so at once ended it with a TypeError.

    Only its own private module tells.
    """
    program = """
import polars
from unittest import mock
from streams import worker
with mock.patch.object(worker.faust, "Worker"):
    worker.Worker.run(mock.Mock())
from polars import _dependencies
print(type(_dependencies.numpy).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["module"]
