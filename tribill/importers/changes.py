"""Builds interchange records, so that every importer writes the same envelope."""

from datetime import UTC, date, datetime
from typing import Any

from tribill.importers.row import Record


def contract_change(
    change_id: str, order_number: str, recorded_at: datetime, kind: str, body: dict[str, Any]
) -> Record:
    """A ContractChange of the topic `contract-changes`."""
    return _record("contract-changes", change_id, {"order_number": order_number}, recorded_at, kind, body)


def reference_change(
    change_id: str, code: str, recorded_at: datetime, kind: str, body: dict[str, Any]
) -> Record:
    """A ReferenceChange of the topic `reference-changes`."""
    return _record("reference-changes", change_id, {"code": code}, recorded_at, kind, body)


def _record(
    topic: str, change_id: str, key: dict[str, str], recorded_at: datetime, kind: str, body: dict[str, Any]
) -> Record:
    """Dates become ISO strings; a field that is None is left out, which means the same."""
    change = {
        name: value.isoformat() if isinstance(value, date) else value
        for name, value in body.items()
        if value is not None
    }
    return {
        "topic": topic,
        "value": {"id": change_id, **key, "recorded_at": _instant(recorded_at), "change": {kind: change}},
    }


def _instant(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise ValueError("recorded_at needs an offset")
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
