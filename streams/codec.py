"""Records on the wire: Avro in the Confluent format, and the same records in their interchange form.

The wire format is a zero byte, the schema's id in four bytes (big-endian), and the Avro body.
Without a schema registry the ids are those of `schemas/released`: every version of a schema that was
ever written stays there under its id, so that a record can always be read with its writer's schema.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal, DecimalException
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import fastavro

from rating.amounts import micros, micros_text
from rating.calendar import parse_date, parse_instant
from rating.records import Refused
from streams.settings import Settings

_MICRO = Decimal("0.000001")
_HEADER = struct.Struct(">bI")
#: No record of ours has half of it.
NESTING_MAX_LEVELS = 32
#: How gzip, xerial's snappy, lz4 and zstd begin: what `streams.unfolding` hands over in place of a batch's records.
_COMPRESSED = (b"\x1f\x8b", b"\x82SNAPPY", b"\x04\x22\x4d\x18", b"\x28\xb5\x2f\xfd")


class Undecodable(Exception):
    """Bytes that are not a record of ours; the message says why, for a person."""


class Decoded(NamedTuple):
    """A record: its schema's name and its value (dates, instants and decimals as Python's)."""

    name: str
    value: dict[str, Any]


@cache
def schema_source(name: str) -> dict[str, Any]:
    """A schema as written in `schemas/avro`."""
    text = resources.files("schemas").joinpath("avro", f"{name}.avsc").read_text()
    return dict(json.loads(text))


@cache
def _parsed(name: str) -> Any:
    return fastavro.parse_schema(schema_source(name))


@cache
def released() -> dict[int, tuple[str, dict[str, Any]]]:
    """Every version of a schema that was ever released: its id to its name and source."""
    found = {}
    for file in resources.files("schemas").joinpath("released").iterdir():
        number, _, name = file.name.removesuffix(".avsc").partition("-")
        found[int(number)] = (name, dict(json.loads(file.read_text())))
    return dict(sorted(found.items()))


@cache
def fixed_ids() -> dict[str, int]:
    """The id that records of a name are written with where no registry gives one: the newest version's."""
    return {name: number for number, (name, _) in released().items()}


class Codec:
    """Encodes and decodes every record; with a registry set, schemas are registered and looked up there."""

    def __init__(self, settings: Settings) -> None:
        self._registry: Any = None
        if settings.schema_registry:
            from confluent_kafka.schema_registry import SchemaRegistryClient

            self._registry = SchemaRegistryClient({"url": settings.schema_registry})
        self._ids: dict[str, int] = {} if self._registry else dict(fixed_ids())
        self._writers: dict[int, tuple[str, Any]] = {}

    def incompatible(self) -> list[str]:
        """The schemas that the registry does not take after what is registered; raises ConnectionError."""
        if self._registry is None:
            return []
        from confluent_kafka.schema_registry import Schema

        found = []
        for name in fixed_ids():
            try:
                schema = Schema(json.dumps(schema_source(name)), "AVRO")
                if not self._registry.test_compatibility(f"tribill.{name}", schema):
                    found.append(name)
            except Exception as error:  # the client raises whatever its HTTP library does
                if getattr(error, "http_status_code", 0) != 404:  # 404: none is registered yet
                    raise ConnectionError(f"the schema registry: {error}") from None
        return found

    def encode(self, name: str, value: Mapping[str, Any]) -> bytes:
        """A record's bytes.  Raises Refused when a value does not fit its type."""
        out = io.BytesIO()
        out.write(_HEADER.pack(0, self.schema_id(name)))
        try:
            fastavro.schemaless_writer(out, _parsed(name), value)
        except (ValueError, TypeError, DecimalException, OverflowError) as error:
            raise Refused("", f"does not fit the schema {name}: {error}") from None
        return out.getvalue()

    def decode(self, data: bytes | None, expected: tuple[str, ...]) -> Decoded:
        """The record in these bytes, read with the writer's schema.  Raises Undecodable."""
        if data is None:
            raise Undecodable("the record has no value")
        if data.startswith(_COMPRESSED):
            raise Undecodable(f"is compressed ({len(data)} bytes): a batch that could not be unfolded, or is too large")
        if len(data) < _HEADER.size or data[0] != 0:
            raise Undecodable(
                f"does not begin with the zero byte and schema id of the Confluent wire format ({len(data)} bytes)"
            )
        name, writer = self._writer(_HEADER.unpack_from(data)[1])
        if name not in expected:
            raise Undecodable(f"is a {name}; this topic takes {' or '.join(expected)}")
        body = io.BytesIO(data)
        body.seek(_HEADER.size)
        try:
            value = fastavro.schemaless_reader(body, writer, _parsed(name), return_record_name=True)
        except Exception as error:  # fastavro raises nearly anything on hostile bytes
            raise Undecodable(f"is no Avro record of schema {name}: {type(error).__name__} {error}") from None
        if body.tell() != len(data):
            raise Undecodable(f"has {len(data) - body.tell()} bytes after the {name} record")
        return Decoded(name, value)

    def names(self, data: bytes, name: str) -> bool:
        """Whether these bytes say that they were written with the schema of this name, as it is today."""
        return data[: _HEADER.size] == _HEADER.pack(0, self.schema_id(name))

    def schema_id(self, name: str) -> int:
        """The id that records of this name are written with."""
        if name not in self._ids:
            from confluent_kafka.schema_registry import Schema

            number = self._registry.register_schema(f"tribill.{name}", Schema(json.dumps(schema_source(name)), "AVRO"))
            self._ids[name] = number
            self._writers[number] = (name, _parsed(name))
        return self._ids[name]

    def _writer(self, number: int) -> tuple[str, Any]:
        if number not in self._writers:
            name, source = self._looked_up(number) if self._registry else released().get(number, ("", {}))
            if name not in fixed_ids():
                raise Undecodable(f"names schema id {number}, which is none of ours")
            self._writers[number] = (name, fastavro.parse_schema(source))
        return self._writers[number]

    def _looked_up(self, number: int) -> tuple[str, dict[str, Any]]:
        from confluent_kafka.schema_registry.error import SchemaRegistryError

        try:
            source = json.loads(self._registry.get_schema(number).schema_str)
        except SchemaRegistryError as error:
            if error.http_status_code == 404:
                raise Undecodable(f"names schema id {number}, which the registry does not have") from None
            raise ConnectionError(f"the schema registry: {error}") from None
        named = isinstance(source, dict) and source.get("type") == "record"
        return (str(source["name"]).rpartition(".")[2], source) if named else ("", {})


# --- the interchange form -------------------------------------------------------------------


def from_interchange(name: str, value: object) -> dict[str, Any]:
    """A record in its interchange form (JSON) as Avro takes it.  Raises Refused with the field."""
    schema = schema_source(name)
    converted = _to_avro(schema, value, "", _named_types(name))
    assert isinstance(converted, dict)
    return converted


def to_interchange(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A decoded record in its interchange form; what is null is left out."""
    converted = _to_json(schema_source(name), value, _named_types(name))
    assert isinstance(converted, dict)
    return converted


def read_json(data: bytes | None) -> dict[str, Any] | None:
    """The JSON object in these bytes, if they are one: what could not be encoded is sent as it was."""
    if not data or data[:1] != b"{":
        return None
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates are no text that can be kept
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and is_shallow(value) else None


def is_shallow(value: object, levels: int = NESTING_MAX_LEVELS) -> bool:
    """Whether JSON nests no deeper than anything of ours; what does would exhaust whoever looks into it."""
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(is_shallow(each, levels - 1) for each in inner)


@cache
def _named_types(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def walk(schema: Any) -> None:
        if isinstance(schema, list):
            for each in schema:
                walk(each)
        elif isinstance(schema, dict):
            if schema["type"] == "record":
                found[schema["name"]] = schema
                for field in schema["fields"]:
                    walk(field["type"])
            elif schema["type"] == "array":
                walk(schema["items"])

    walk(schema_source(name))
    return found


def _to_avro(schema: Any, value: object, path: str, named: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return _union_to_avro(schema, value, path, named)
    if isinstance(schema, str) and schema in named:
        schema = named[schema]
    if value is None:
        raise Refused(path, "is missing")
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind == "record":
        if not isinstance(value, Mapping):
            raise Refused(path, f"is {_shown(value)}, not a record of named fields")
        record: dict[str, Any] = {}
        for field in schema["fields"]:
            where = f"{path}.{field['name']}" if path else field["name"]
            given = value.get(field["name"])
            if given is None and "default" in field:
                given = field["default"]
                if given is None:
                    record[field["name"]] = None
                    continue
            record[field["name"]] = _to_avro(field["type"], given, where, named)
        for key in value:
            if key not in record:
                raise Refused(f"{path}.{key}" if path else str(key), "is no field of this record")
        return record
    if kind == "array":
        if not isinstance(value, list):
            raise Refused(path, f"is {_shown(value)}, not a list")
        return [_to_avro(schema["items"], each, f"{path}[{index}]", named) for index, each in enumerate(value)]
    logical = schema.get("logicalType") if isinstance(schema, dict) else None
    return _scalar_to_avro(kind, logical, value, path)


def _scalar_to_avro(kind: str, logical: str | None, value: object, path: str) -> Any:
    if logical == "decimal":
        if not isinstance(value, str):
            raise Refused(path, f'is {_shown(value)}; write decimals as strings, "1.26"')
        try:
            return Decimal(micros(value)).scaleb(-6)
        except ValueError as error:
            raise Refused(path, str(error)) from None
    if logical == "date":
        try:
            return parse_date(value if isinstance(value, str) else "")
        except ValueError as error:
            raise Refused(path, f"is {_shown(value)}, {error}") from None
    if logical == "timestamp-micros":
        try:
            return parse_instant(value if isinstance(value, str) else "").astimezone(UTC)
        except ValueError as error:
            raise Refused(path, f"is {_shown(value)}, {error}") from None
        except OverflowError:
            raise Refused(path, f"{_shown(value)} is out of range") from None
    if kind == "string":
        if not isinstance(value, str):
            raise Refused(path, f"is {_shown(value)}, not a string")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(path, f"is {_shown(value)}, not a whole number")
    limit = 2**31 if kind == "int" else 2**63
    if not -limit <= value < limit:
        raise Refused(path, f"is {value}, which does not fit")
    return value


def _union_to_avro(branches: list[Any], value: object, path: str, named: Mapping[str, Any]) -> Any:
    if value is None and "null" in branches:
        return None
    records = {each["name"]: each for each in branches if isinstance(each, dict) and each["type"] == "record"}
    others = [each for each in branches if each != "null" and each not in records.values()]
    if isinstance(value, Mapping) and len(records) > 1:
        # A union of records is written as {"Name": {...}}.
        name = next(iter(value), None)
        if len(value) != 1 or name not in records:
            raise Refused(path, f"is {_shown(value)}, not one of {', '.join(records)}")
        return f"tribill.{name}", _to_avro(records[name], value[name], f"{path}.{name}", named)
    if isinstance(value, Mapping) and records:
        return _to_avro(next(iter(records.values())), value, path, named)
    if not others:
        raise Refused(path, f"is {_shown(value)}, not one of {', '.join(records)}")
    return _to_avro(others[0], value, path, named)


def _to_json(schema: Any, value: Any, named: Mapping[str, Any]) -> Any:
    if value is None:
        return None
    if isinstance(schema, list):
        if isinstance(value, tuple):
            name, inner = value[0].rpartition(".")[2], value[1]
            converted = _to_json(named[name], inner, named)
            records = [each for each in schema if isinstance(each, dict) and each["type"] == "record"]
            return {name: converted} if len(records) > 1 else converted
        return _to_json(next(each for each in schema if each != "null"), value, named)
    if isinstance(schema, str) and schema in named:
        schema = named[schema]
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind == "record":
        if isinstance(value, tuple):
            value = value[1]
        converted = {
            field["name"]: _to_json(field["type"], value.get(field["name"]), named) for field in schema["fields"]
        }
        return {name: each for name, each in converted.items() if each is not None}
    if kind == "array":
        return [_to_json(schema["items"], each, named) for each in value]
    if isinstance(value, Decimal):
        fits = value.adjusted() <= 18 and value == value.quantize(_MICRO)
        # What does not fit is shown as it is, so that whoever reads it refuses it and takes its id.
        return micros_text(int(value.scaleb(6))) if fits else str(value)[:60]
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
