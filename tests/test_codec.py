"""Records keep their values on the wire, whoever wrote them, and nothing hostile gets through as a record."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable
from datetime import UTC, date
from http.server import BaseHTTPRequestHandler, HTTPServer

import fastavro
import pytest
from fastavro.utils import generate_many
from hypothesis import given
from hypothesis import strategies as st

from rating.calendar import parse_date, parse_instant
from rating.records import Refused
from streams.codec import (
    Codec,
    Undecodable,
    fixed_ids,
    from_interchange,
    released,
    schema_source,
    to_interchange,
)
from streams.settings import Settings
from tests.oracle.oracle import Refusal, to_date, to_instant
from tests.oracle.strategies import books

CODEC = Codec(Settings())
NAMES = {"contract-changes": "ContractChange", "reference-changes": "ReferenceChange"}


def same(value: object) -> object:
    """A value as it reads back: nulls left out, defaults filled, numbers and instants in one way of writing."""
    if isinstance(value, dict):
        return {name: same(each) for name, each in value.items() if each is not None}
    return [same(each) for each in value] if isinstance(value, list) else value


@given(books(flat_only=False))
def test_interchange_survives_the_wire(book: list) -> None:
    """What is encoded, decoded, and encoded again is the same record, for every change of a book."""
    for line in book:
        name = NAMES.get(line.get("topic", ""))
        if name is None:
            continue
        try:
            data = CODEC.encode(name, from_interchange(name, line["value"]))
        except Refused:
            continue
        value = to_interchange(name, CODEC.decode(data, (name,)).value)
        assert CODEC.encode(name, from_interchange(name, value)) == data
        change, before = value["change"], line["value"]["change"]
        assert list(change) == list(before)
        assert value["id"] == line["value"]["id"]


@given(st.binary(max_size=200), st.sampled_from(sorted(fixed_ids().values())))
def test_random_bytes_are_refused_or_read(body: bytes, number: int) -> None:
    """Any bytes are a record or Undecodable; nothing else is ever raised."""
    for data in (body, b"\x00" + number.to_bytes(4, "big") + body):
        with contextlib.suppress(Undecodable):
            CODEC.decode(data, tuple(fixed_ids()))


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("Usage", {"quantity": "NaN"}, "quantity"),
        ("Usage", {"quantity": 3}, "quantity"),
        ("Usage", {"quantity": "1.0000001"}, "quantity"),
        ("Usage", {"quantity": "1000000000000"}, "quantity"),
        ("Usage", {"quantity": "-1"}, "quantity"),
        ("Usage", {"occurred_at": "2026-04-03T10:00:00"}, "occurred_at"),
        ("Usage", {"occurred_at": "yesterday"}, "occurred_at"),
        ("Usage", {"occurred_at": "2026-04-03T10:00Z"}, "occurred_at"),
        ("Usage", {"occurred_at": "2026-04-03T10:00:00.0000001Z"}, "occurred_at"),
        ("Usage", {"revision": "1"}, "revision"),
        ("Usage", {"revision": True}, "revision"),
        ("Usage", {"id": None}, "id"),
        ("Usage", {"quantitty": "1"}, "quantitty"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(name: str, value: dict, field: str) -> None:
    """A value that Avro cannot hold is refused, never rounded, and the field is named."""
    good = {
        "id": "u1",
        "supplier_id": "10030",
        "ods_code": "A83005",
        "item_id": "10030-S-001",
        "quantity": "3.000000000",
        "occurred_at": "2026-04-03T10:00:00Z",
    }
    from_interchange(name, good)
    with pytest.raises(Refused) as refused:
        from_interchange(name, good | value)
    assert refused.value.field == field


def written_oddly(source: str) -> st.SearchStrategy[str]:
    """An instant with a few of its characters left out or replaced."""
    edit = st.tuples(st.integers(0, len(source) - 1), st.sampled_from(["", *"09TtZz +:"]))
    return st.lists(edit, max_size=3).map(
        lambda edits: "".join(dict(edits).get(at, character) for at, character in enumerate(source))
    )


def read_as(reader: Callable[[], date]) -> date | None:
    """What is read, or None where it is refused."""
    try:
        return reader()
    except (Refusal, ValueError):
        return None


@given(
    st.one_of(
        written_oddly("2026-04-03T10:00:00Z"),
        written_oddly("2024-02-29T23:59:59.1234560+01:00"),
        st.sampled_from(
            ["2026-04-03T10:00Z", "2026-W14-5T10:00:00Z", "20260403T100000Z", "2026-04-03T10:00:00+0100",
             "2026-04-03T10:00:60Z", "2026-04-03T24:00:00Z", "2026-04-03T10:00:00+01:60", "٢026-04-03T10:00:00Z",
             "2026-04-03T10:00:00,5Z", "2026-04-03T10:00:00.Z", "2026-04-03T10:00:00-00:00"]
        ),
    )
)  # fmt: skip
def test_instants_are_those_of_rfc_3339(text: str) -> None:
    """No other form that Python or ISO 8601 know is read, and none is rounded: as the oracle reads them."""
    assert read_as(lambda: parse_instant(text).astimezone(UTC)) == read_as(lambda: to_instant(text, "occurred_at"))


@given(written_oddly("2026-04-03"))
def test_dates_are_those_of_rfc_3339(text: str) -> None:
    """Nor is a week's day or a number of the year one."""
    assert read_as(lambda: parse_date(text)) == read_as(lambda: to_date(text, "date"))


def test_released_schemas_stay_readable() -> None:
    """Records of every schema version ever released are read by the current one; the newest is the current."""
    for number, (name, source) in released().items():
        writer = fastavro.parse_schema(source)
        for record in generate_many(writer, 20):
            out = io.BytesIO()
            fastavro.schemaless_writer(out, writer, record)
            data = b"\x00" + number.to_bytes(4, "big") + out.getvalue()
            assert CODEC.decode(data, (name,)).name == name
    for name, number in fixed_ids().items():
        assert released()[number][1] == schema_source(name), (
            f"{name}.avsc was changed: release it as a new file in schemas/released, keep the old one"
        )


def test_an_older_writer_is_read_with_defaults() -> None:
    """A record written before an optional field existed reads with the field's default."""
    older = json.loads(json.dumps(schema_source("Usage")))
    older["fields"] = [each for each in older["fields"] if each["name"] != "revision"]
    codec = Codec(Settings())
    codec._writers[99] = ("Usage", fastavro.parse_schema(older))
    value = from_interchange(
        "Usage",
        {
            "id": "u",
            "supplier_id": "1",
            "ods_code": "A",
            "item_id": "1-1",
            "quantity": "1",
            "occurred_at": "2026-04-03T10:00:00Z",
        },
    )
    value.pop("revision")
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(older), value)
    data = b"\x00" + (99).to_bytes(4, "big") + out.getvalue()
    assert codec.decode(data, ("Usage",)).value["revision"] == 0


class _Registry(BaseHTTPRequestHandler):
    """As much of a schema registry's protocol as registering and looking up takes."""

    schemas: list[str] = []

    def _answer(self, body: object, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        schema = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["schema"]
        if schema not in self.schemas:
            self.schemas.append(schema)
        self._answer({"id": 700 + self.schemas.index(schema)})

    def do_GET(self) -> None:
        number = int(self.path.split("?")[0].rsplit("/", 1)[1]) - 700
        if 0 <= number < len(self.schemas):
            self._answer({"schema": self.schemas[number]})
        else:
            self._answer({"error_code": 40403, "message": "Schema not found"}, 404)

    def log_message(self, *_: object) -> None:
        pass


def test_registry_gives_and_knows_ids() -> None:
    """With a registry set, schemas are registered there, and a reader that never wrote looks them up."""
    server = HTTPServer(("127.0.0.1", 0), _Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        settings = Settings(schema_registry=f"http://127.0.0.1:{server.server_port}")
        data = Codec(settings).encode("CloseRequested", {"period": "2026-04"})
        assert data[:5] == b"\x00" + (700).to_bytes(4, "big")
        read = Codec(settings).decode(data, ("CloseRequested",)).value
        assert read == {"period": "2026-04", "accept": [], "requested_by": ""}
        with pytest.raises(Undecodable, match="does not have"):
            Codec(settings).decode(b"\x00\x00\x00\x00\x01" + data[5:], ("CloseRequested",))
    finally:
        server.shutdown()
        server.server_close()
