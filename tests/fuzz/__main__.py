"""Coverage-guided fuzzing with atheris: `python -m tests.fuzz TARGET [libFuzzer's options] [corpus]`.

A target takes any bytes and may raise nothing; `make fuzz TARGET=codec SECONDS=60` runs one.  What libFuzzer has
found lies in a file `crash-...`: `python -m tests.fuzz TARGET crash-...` repeats it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import atheris

with atheris.instrument_imports(include=["agents", "rating", "streams", "tribill"]):
    from agents.intake import Intake
    from rating.parties import read_party_row
    from rating.records import Refused
    from streams.batch import Batch
    from streams.codec import Codec, Undecodable, fixed_ids, from_interchange, read_json, to_interchange
    from streams.settings import Settings
    from tests.crash_world import Fuse, MemoryLog, MemoryOutbox
    from tests.rich_book import BOOK
    from tribill.importers import IMPORTERS, Problem
    from tribill.importers.orders import FULL
    from tribill.importers.parties import import_parties
    from tribill.interchange import BadClose, Publisher, read

SETTINGS = Settings(partitions=2, supplier_topics="10030")
CODEC = Codec(SETTINGS)
ARRIVED_MS = 1_775_000_000_000
_FILE = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / "fuzzed_Full.csv"


def codec(data: bytes) -> None:
    """What decodes can be shown as JSON, and comes back the same from what can be sent again."""
    try:
        decoded = CODEC.decode(data, tuple(fixed_ids()))
    except Undecodable:
        return
    shown = json.loads(json.dumps(to_interchange(decoded.name, decoded.value), default=repr))
    assert isinstance(shown, dict)


def intake(data: bytes) -> None:
    """Each record is let through or refused; by columns as by itself."""
    let_through: list[Any] = []
    letters: list[Any] = []

    def send(topic: str, block: bytes, **_: Any) -> None:
        let_through.append(block)

    context = SimpleNamespace(
        settings=SETTINGS,
        codec=CODEC,
        outbox=SimpleNamespace(send=send, flush=lambda: None),
        dead_letters=SimpleNamespace(write=letters.extend),
    )
    header = CODEC.encode("Usage", from_interchange("Usage", _READING))[:5]
    batch_header = b"\0" + fixed_ids()["UsageBatch"].to_bytes(4, "big")
    for value in (data, header + data, batch_header + data):
        before = len(let_through), len(letters)
        record = SimpleNamespace(offset=0, timestamp=ARRIVED_MS, key=None, value=value)
        Intake(context).do(Batch("usage", 0, [record]))  # type: ignore[arg-type,list-item]
        assert (len(let_through), len(letters)) != before or value.startswith(batch_header), value


_READING = {
    "id": "u1", "supplier_id": "10030", "ods_code": "A", "item_id": "10030-1", "quantity": "1",
    "occurred_at": "2026-04-01T10:00:00Z",
}  # fmt: skip


def text(data: bytes) -> None:
    """JSON that was sent as it is: refused with a reason, or the record that it says."""
    value = read_json(data)
    for name in fixed_ids() if value is not None else ():
        try:
            encoded = CODEC.encode(name, from_interchange(name, value))
        except Refused:
            continue
        assert CODEC.decode(encoded, (name,)).name == name


def interchange(data: bytes) -> None:
    """Every line is sent, refused, or a close that is no period."""
    _FILE.write_bytes(data)
    log = MemoryLog(SETTINGS)
    with (
        mock.patch("tribill.interchange.Outbox", return_value=MemoryOutbox(log, Fuse())),
        mock.patch("tribill.interchange.ClickHouse"),
    ):
        publisher = Publisher(SETTINGS)
    try:
        for line in read(_FILE):
            if not line.close:
                publisher.send(line)
    except BadClose:
        return
    publisher.flush()


def imports(data: bytes) -> None:
    """Every importer yields records that can be encoded, and problems."""
    _FILE.write_bytes(data)
    for importer in IMPORTERS.values():
        for found in importer(_FILE, recorded_at=datetime(2026, 3, 1, tzinfo=UTC)):
            if not isinstance(found, Problem):
                name = "ContractChange" if found["topic"] == "contract-changes" else "ReferenceChange"
                CODEC.encode(name, from_interchange(name, found["value"]))
    for row in import_parties(_FILE):
        if not isinstance(row, Problem):
            read_party_row(row)


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (codec, intake, text, interchange, imports)
}


def seeds(target: str) -> list[bytes]:
    """What a target begins with: records as they should be, which libFuzzer then spoils."""
    lines = [line for line in BOOK if "close" not in line]
    if target == "imports":
        return [",".join(header).encode() + b"\n" + row for header, row in _TABLES]
    if target == "interchange":
        return [json.dumps(line).encode() for line in BOOK]
    if target == "text":
        return [json.dumps(line["value"]).encode() for line in lines]
    encoded = []
    for line in lines:
        name = {"contract-changes": "ContractChange", "reference-changes": "ReferenceChange"}.get(
            line["topic"], "Usage"
        )
        if "UsageBatch" not in line["value"]:
            encoded.append(CODEC.encode(name, from_interchange(name, line["value"])))
    return [each[5:] for each in encoded if each[4] == fixed_ids()["Usage"]] if target == "intake" else encoded


_TABLES = [
    (["ods_code", "as_of", "patients"], b"A83005,2026-04-01,8461\n"),
    (["ordering_party", "financial_year", "amount"], b"QOP,2026,1000.5\n"),
    (["ods_code", "sub_icb_code", "pcn_code", "icb_code", "as_of"], b"A83005,00L,U00001,QHM,2026-04-01\n"),
    ([*FULL.required, *FULL.optional], b"C010001-01,QOP,01/04/2026,A83005,10030,10030-001,Catalogue Solution,100,"
        b"patient,1.26,Central,01/04/2026,01/04/2026,,per year,1,,,36,Flat,\n"),
]  # fmt: skip


def main() -> None:
    """Fuzzes one target until libFuzzer's options say that it is enough."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"python -m tests.fuzz {'|'.join(TARGETS)} [-max_total_time=60] [corpus]")
    corpus = _FILE.parent / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(sys.argv[1])):
        (corpus / str(number)).write_bytes(seed)
    repeated = any(os.path.isfile(each) for each in sys.argv[2:])
    atheris.Setup([sys.argv[0], *sys.argv[2:], *([] if repeated else [str(corpus)])], TARGETS[sys.argv[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
