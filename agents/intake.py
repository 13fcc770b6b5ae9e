"""Intake: lets usage through to its practice, or refuses it with a reason.

Reads `usage` and every `usage.<supplier id>`; writes `usage-accepted`, partitioned by the practice
in the record.  On a supplier's own topic the topic says who speaks; the record's key says nothing.

The order of steps for a batch:

1. The records are decoded and checked by columns, all at once; those with anything against them
   again, each reading by itself, which also says what it is.
2. What was let through goes to `usage-accepted` in one block a partition; what was refused goes
   to the dead letters.  If this fails, or the process dies, the batch is read again: a block sent
   twice holds the same positions, which the usage agent knows again.
3. Both are acknowledged by the broker.  Only then is the batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa

from agents.context import Context
from rating.amounts import LIMIT_MICROS
from rating.records import Refused
from sinks import metrics
from sinks.dead_letters import DeadLetter
from streams.agent import Agent
from streams.batch import LATEST_MS, Batch, Record, instant
from streams.codec import Undecodable, from_interchange, read_json, to_interchange
from streams.columns import CODE_MAX_CHARACTERS, COLUMNS, Integers, decode, decode_batches
from streams.topics import BLOCK_MAX_BYTES, USAGE, USAGE_ACCEPTED, partition_for, usage_topics

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
AHEAD = timedelta(days=1)
#: Rows of a block; one that is too large for a Kafka record all the same is halved.
BLOCK_ROWS = 20_000
ID_MAX_CHARACTERS = 4_096
LETTERS_AT_ONCE = 5_000

_LONDON_DAY = pl.col("occurred_at").dt.convert_time_zone("Europe/London").dt.date()

#: A reading let through: its columns and its index in a UsageBatch.
Reading = tuple[str, int, str, str, str, int, datetime, int]


class Intake(Agent):
    """The agent of role `intake`."""

    role: ClassVar[str] = "intake"
    lanes: ClassVar[int] = 2

    def __init__(self, context: Context) -> None:
        self._context = context
        self._floor = context.settings.arrival_floor_at

    def topics(self) -> Sequence[str]:
        """`usage` and the suppliers' own topics."""
        return usage_topics(self._context.settings)

    def do(self, batch: Batch) -> None:
        """Does a batch; see the steps above."""
        speaker = batch.topic.removeprefix(f"{USAGE}.") if batch.topic != USAGE else None
        letters: list[DeadLetter] = []
        rows = self._rows(batch, speaker, letters)
        for (partition,), part in rows.partition_by("for_partition", as_dict=True, include_key=False).items():
            for block in part.iter_slices(BLOCK_ROWS):
                self._send(partition, block)
        self._write(letters)
        self._context.outbox.flush()
        metrics.RECORDS.labels(self.role, "accepted").inc(rows.height)

    def _write(self, letters: list[DeadLetter]) -> None:
        """Writes refusals and forgets them; the same are written when the batch is read again."""
        self._context.dead_letters.write(letters)
        metrics.USAGE.labels("refused").inc(len(letters))
        letters.clear()

    # --- step 1: by columns what is plainly right, by itself what is not ---

    def _rows(self, batch: Batch, speaker: str | None, letters: list[DeadLetter]) -> pl.DataFrame:
        """The readings let through, in the order of the log; what is refused goes to `letters`."""
        size = len(batch.records)
        offsets = np.fromiter([record.offset for record in batch.records], np.int64, size)
        timestamps = np.fromiter([record.timestamp for record in batch.records], np.int64, size)
        rows, left = self._by_columns(batch, timestamps, speaker)
        looked_at = [
            (*reading, place)
            for place in left
            for reading in self._readings(batch, batch.records[place], speaker, letters)
        ]
        if looked_at:
            alone = pl.DataFrame(looked_at, schema=rows.schema, orient="row")
            # What of a partition came later is never in an earlier block: see Ledger.positions_complete.
            rows = pl.concat([rows, alone]).sort("place", "index")
        practices = rows["ods_code"].unique().to_list()
        partitions = [partition_for(each, self._context.settings.partitions) for each in practices]
        return rows.select(
            *COLUMNS,
            "index",
            offset=pl.Series(offsets)[rows["place"]],
            broker_timestamp_ms=pl.Series(timestamps)[rows["place"]],
            day=_LONDON_DAY,
            topic=pl.lit(batch.topic),
            partition=pl.lit(batch.partition, pl.Int32),
            for_partition=pl.col("ods_code").replace_strict(practices, partitions, return_dtype=pl.Int32),
        )

    def _by_columns(self, batch: Batch, timestamps: Integers, speaker: str | None) -> tuple[pl.DataFrame, list[int]]:
        """The readings of the records with nothing against them, and the places of all other records."""
        limit, codec = self._context.settings.record_max_bytes, self._context.codec
        values = [record.value if record.value and len(record.value) <= limit else b"" for record in batch.records]
        decoded = decode(values, codec.schema_id("Usage"))
        [sound] = np.nonzero(decoded.sound)
        rows = decoded.frame.hstack([pl.Series("index", np.zeros_like(sound), pl.Int32), pl.Series("place", sound)])
        left: list[int] = []
        if rows.height < len(values):
            [unsound] = np.nonzero(~decoded.sound)
            batches = [values[place] if codec.names(values[place], "UsageBatch") else None for place in unsound]
            readings, places = decode_batches(batches)
            left = unsound[places].tolist()
            readings = readings.with_columns(place=pl.Series(unsound)[readings["place"]])
            rows = pl.concat([rows, readings.select(rows.columns)]).sort("place", "index")
        arrivals = np.clip(timestamps, 0, LATEST_MS) * 1000
        if self._floor is not None:
            arrivals = np.maximum(arrivals, (self._floor - EPOCH) // MICROSECOND)
        latest = pl.Series("latest", arrivals + AHEAD // MICROSECOND, pl.Datetime("us", "UTC"))[rows["place"]]
        admissible = rows.hstack([latest]).select(_admissible(speaker)).to_series()
        if not admissible.all():
            refused = rows["place"].filter(~admissible).unique()
            rows = rows.filter(~pl.col("place").is_in(refused.implode()))
            left = sorted({*left, *refused})
        return rows, left

    def _readings(
        self, batch: Batch, record: Record, speaker: str | None, letters: list[DeadLetter]
    ) -> Iterator[Reading]:
        def refuse(reason: str, field: str = "", index: int = 0, value: bytes | None = record.value) -> None:
            place = (batch.topic, batch.partition, record.offset)
            letters.append(DeadLetter(*place, reason, field, index, record.key, value, record.timestamp))
            if len(letters) >= LETTERS_AT_ONCE:
                # One record may hold a million readings, each with something wrong.
                self._write(letters)

        arrival = instant(record.timestamp)
        if self._floor is not None:
            arrival = max(arrival, self._floor)
        limit = self._context.settings.record_max_bytes
        if record.value is not None and len(record.value) > limit:
            refuse(f"is {len(record.value)} bytes long; a usage record has at most {limit}")
            return
        try:
            decoded = self._context.codec.decode(record.value, ("Usage", "UsageBatch"))
        except Undecodable as error:
            refuse(*_why(record.value, str(error)))
            return
        value = decoded.value
        readings = [value] if decoded.name == "Usage" else value["usages"]
        supplier, practice = value["supplier_id"], value["ods_code"]
        if decoded.name == "UsageBatch":
            for field in ("supplier_id", "ods_code"):
                if len(value[field]) > CODE_MAX_CHARACTERS:
                    # Once for the record: its readings would repeat the code as often.
                    refuse(f"is {value[field][:40]!r}...; a code has 1 to {CODE_MAX_CHARACTERS} characters", field)
                    return
        for index, reading in enumerate(readings):
            try:
                quantity = check(reading, supplier, practice, speaker, arrival)
            except Refused as error:
                whole = record.value if decoded.name == "Usage" else _alone(reading, supplier, practice)
                refuse(error.reason, error.field, index, whole)
                continue
            yield (
                reading["id"],
                reading["revision"],
                supplier,
                practice,
                reading["item_id"],
                quantity,
                reading["occurred_at"],
                index,
            )

    # --- step 2 ---

    def _send(self, partition: int, rows: pl.DataFrame) -> None:
        block = encode_block(rows.to_arrow())
        if len(block) > BLOCK_MAX_BYTES // 2 and rows.height > 1:
            middle = rows.height // 2
            self._send(partition, rows[:middle])
            self._send(partition, rows[middle:])
            return
        self._context.outbox.send(USAGE_ACCEPTED, block, partition=partition)


@cache
def _admissible(speaker: str | None) -> pl.Expr:
    """By columns, `latest` among them, what `check` asks of a reading; what fails is checked by itself."""
    supplier, practice, item = pl.col("supplier_id"), pl.col("ods_code"), pl.col("item_id")
    codes = [each.str.len_bytes().is_between(1, CODE_MAX_CHARACTERS) for each in (supplier, practice, item)]
    return pl.all_horizontal(
        *codes,
        pl.col("id").str.len_bytes() <= ID_MAX_CHARACTERS,
        *([] if speaker is None else [supplier == speaker]),
        item.str.starts_with(supplier),
        pl.col("quantity_micros").is_between(0, LIMIT_MICROS, closed="left"),
        pl.col("occurred_at").is_between(EARLIEST, pl.col("latest")),
    )


def check(reading: Any, supplier: str, practice: str, speaker: str | None, arrival: datetime) -> int:
    """A reading's quantity in micros.  Raises Refused with what RULES section 1 has against it."""
    for name, value in (("supplier_id", supplier), ("ods_code", practice), ("item_id", reading["item_id"])):
        if not isinstance(value, str) or not 0 < len(value) <= CODE_MAX_CHARACTERS:
            raise Refused(name, f"is {str(value)[:40]!r}; a code has 1 to {CODE_MAX_CHARACTERS} characters")
    if len(reading["id"]) > ID_MAX_CHARACTERS:
        raise Refused("id", f"has {len(reading['id'])} characters; an id has at most {ID_MAX_CHARACTERS}")
    at = reading["occurred_at"]
    if not isinstance(reading["quantity"], Decimal) or not isinstance(at, datetime) or at.tzinfo is None:
        raise Refused("", "its writer's schema has no decimal quantity or no instant: use the schemas of tribill")
    if speaker is not None and supplier != speaker:
        raise Refused("supplier_id", f"is {supplier!r}, but this is the topic of supplier {speaker!r}")
    if not reading["item_id"].startswith(supplier):
        raise Refused("item_id", f"is {reading['item_id']!r}, which is not an item of supplier {supplier!r}")
    quantity = int(reading["quantity"].scaleb(6)) if reading["quantity"].adjusted() <= 18 else LIMIT_MICROS
    if quantity < 0:
        raise Refused("quantity", f"is {reading['quantity']}, which is negative")
    if reading["quantity"].adjusted() <= 18 and reading["quantity"].scaleb(6) != quantity:
        raise Refused("quantity", f"is {reading['quantity']}, which has more than six decimal places")
    if quantity >= LIMIT_MICROS:
        raise Refused("quantity", "does not fit decimal(18,6): more than eighteen digits")
    occurred_at = reading["occurred_at"]
    if occurred_at < EARLIEST:
        raise Refused("occurred_at", f"is {occurred_at.isoformat()}, before the year 2000")
    if occurred_at > arrival + AHEAD:
        raise Refused(
            "occurred_at",
            f"is {occurred_at.isoformat()}, more than a day after it arrived ({arrival.isoformat()})",
        )
    return quantity


def _alone(reading: Any, supplier: str, practice: str) -> bytes:
    """A reading of a UsageBatch as a Usage of its own, in the interchange form."""
    value = {**reading, "supplier_id": supplier, "ods_code": practice}
    try:
        return json.dumps(to_interchange("Usage", value)).encode()
    except Undecodable:
        return repr(value)[:10_000].encode()


def _why(data: bytes | None, reason: str) -> tuple[str, str]:
    """Why bytes are no usage: for JSON text what is wrong in it, which is more helpful."""
    value = read_json(data)
    if value is None:
        return reason, ""
    try:
        if "UsageBatch" in value:
            from_interchange("UsageBatch", value["UsageBatch"])
        else:
            from_interchange("Usage", value)
    except Refused as error:
        return error.reason, error.field
    return "is JSON; records are Avro in the Confluent wire format (`tribill publish` encodes them)", ""


def encode_block(rows: pa.Table, metadata: dict[str, str] | None = None) -> bytes:
    """An Arrow table as one Kafka record."""
    sink = pa.BufferOutputStream()
    schema = rows.schema.with_metadata(metadata) if metadata else rows.schema
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(rows.replace_schema_metadata(metadata))
    return bytes(sink.getvalue())
