"""Usage: claims each reading's identity, keeps it in the ledger, publishes the day totals it changed.

Reads `usage-accepted`; writes the ledger and `charge-inputs`.  A day total is what of an item was
used at a practice on a London day; charges follow from it alone.

The order of steps for a batch:

1. Identities are claimed in Redis.  A claim is only a hint (see `sinks.claims`), so losing the
   process here, or what Redis holds, costs look-ups and nothing else.
2. What is not certainly new is looked up in the ledger as it was before this batch, so a batch
   that is read again after a crash finds nothing of itself and is done the same way.
3. New rows go into the ledger.  If the process dies after this, the batch is read again and the
   same rows collapse.
4. The totals touched, absolute and as of the end of this batch, go to `charge-inputs`, the losers
   of conflicts to the dead letters, and the broker acknowledges both.  Only then is the batch.

Totals in memory are a cache: they hold for one offset of the partition, and are read from the
ledger again for any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

import polars as pl
import pyarrow as pa

from agents.context import Context
from agents.intake import encode_block
from rating.amounts import micros_text
from sinks import metrics
from sinks.dead_letters import DeadLetter
from streams.agent import Agent
from streams.batch import Batch
from streams.topics import CHARGE_INPUTS, USAGE_ACCEPTED, partition_for

#: Practice, item, London day (ordinal).
DayKey = tuple[str, str, int]
#: Practice, supplier, id.
Identity = tuple[str, str, str]
_EPOCH_ORDINAL = 719163

TOTALS_SCHEMA = pa.schema(
    [
        ("ods_code", pa.string()),
        ("item_id", pa.string()),
        ("day", pa.int32()),
        ("quantity_micros", pa.string()),
    ]
)


@dataclass(slots=True)
class _Totals:
    """The day totals of some of a partition's practices, as of an offset."""

    offset: int
    practices: set[str] = field(default_factory=set)
    micros: dict[DayKey, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Outcome:
    """What a batch comes to."""

    insert: pl.DataFrame
    change: dict[DayKey, int]
    letters: list[DeadLetter]
    duplicates: int = 0


class Usage(Agent):
    """The agent of role `usage`."""

    role: ClassVar[str] = "usage"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._claims = context.claims()
        self._claims.check()
        self._generation = context.settings.log_generation
        self._totals: dict[int, _Totals] = {}

    def topics(self) -> Sequence[str]:
        """`usage-accepted`."""
        return [USAGE_ACCEPTED]

    def do(self, batch: Batch) -> None:
        """Does a batch; see the steps above."""
        totals = self._totals.pop(batch.partition, None)
        if totals is not None and totals.offset > batch.first_offset:
            left = batch.since(totals.offset)
            if left is None or left.first_offset != totals.offset:
                totals = None
            else:
                batch = left
        if totals is None or totals.offset != batch.first_offset:
            totals = _Totals(batch.first_offset)
        rows = self._rows(batch)
        outcome = self._judge(rows, batch)
        self._context.ledger.insert_usage(outcome.insert.to_arrow())
        self._load(totals, {key[0] for key in outcome.change}, batch.first_offset)
        for key, difference in outcome.change.items():
            totals.micros[key] = totals.micros.get(key, 0) + difference
        self._publish(batch, {key: totals.micros[key] for key in outcome.change})
        self._context.dead_letters.write(outcome.letters)
        self._context.outbox.flush()
        totals.offset = batch.end_offset
        self._totals[batch.partition] = totals
        metrics.USAGE.labels("accepted").inc(outcome.insert.height)
        metrics.USAGE.labels("duplicate").inc(outcome.duplicates)
        metrics.USAGE.labels("conflict").inc(len(outcome.letters))
        metrics.RECORDS.labels(self.role, "accepted").inc(rows.height)

    # --- step 0: rows ---

    def _rows(self, batch: Batch) -> pl.DataFrame:
        frames = []
        for record in batch.records:
            assert record.value is not None, "usage-accepted holds what intake wrote"
            with pa.ipc.open_stream(record.value) as reader:
                frame = pl.from_arrow(reader.read_all())
            assert isinstance(frame, pl.DataFrame)
            frames.append(frame.with_columns(accepted_offset=pl.lit(record.offset, pl.Int64)))
        return pl.concat(frames).with_columns(
            generation=pl.lit(self._generation, pl.UInt32),
            accepted_partition=pl.lit(batch.partition, pl.Int32),
        )

    # --- steps 1 and 2: what is new ---

    def _judge(self, rows: pl.DataFrame, batch: Batch) -> _Outcome:
        fresh = self._certainly_new(rows)
        suspects = rows.filter(~fresh)
        names = ["ods_code", "supplier_id", "id"]
        if suspects.height:
            # A suspect's identity is judged with all its copies in the batch.
            copies = rows.join(suspects.select(names).unique(), on=names, how="semi")
            certain = rows.join(suspects.select(names).unique(), on=names, how="anti")
        else:
            copies, certain = suspects, rows
        outcome = _Outcome(certain, {}, [])
        grouped = certain.group_by("ods_code", "item_id", "day").agg(pl.col("quantity_micros").cast(pl.Int128).sum())
        for ods_code, item_id, day, quantity in grouped.iter_rows():
            outcome.change[ods_code, item_id, day.toordinal()] = quantity
        if copies.height:
            self._judge_copies(copies, batch, outcome)
        return outcome

    def _certainly_new(self, rows: pl.DataFrame) -> pl.Series:
        identities = rows.select(pl.concat_str("supplier_id", "ods_code", "id", separator="/").alias("identity"))[
            "identity"
        ].to_list()
        claims = rows.select(
            pl.concat_str(
                pl.lit(str(self._generation)), "accepted_offset", "topic", "partition", "offset", "index", "revision",
                pl.struct("item_id", "quantity_micros", "occurred_at").hash(),
                separator="/",
            ).alias("claim")
        )["claim"].to_list()  # fmt: skip
        standing, certain_after = self._claims.claim(identities, claims)
        unclaimed = pl.Series([each is None for each in standing], dtype=pl.Boolean)
        # A later revision may lie on another day than the first: only the ledger knows.
        return unclaimed & (rows["occurred_at"] >= certain_after) & (rows["revision"] == 0)

    def _judge_copies(self, copies: pl.DataFrame, batch: Batch, outcome: _Outcome) -> None:
        by_identity: dict[Identity, list[dict[str, Any]]] = {}
        for row in copies.iter_rows(named=True):
            by_identity.setdefault((row["ods_code"], row["supplier_id"], row["id"]), []).append(row)
        known: dict[Identity, list[dict[str, Any]]] = {}
        for row in self._context.ledger.known_usage(by_identity, self._generation, batch.first_offset):
            row["occurred_at"] = _instant(row["occurred_at_us"])
            known.setdefault((row["ods_code"], row["supplier_id"], row["id"]), []).append(row)
        inserts: list[dict[str, Any]] = []
        for identity, rows in by_identity.items():
            before = _firsts(known.get(identity, []))
            after = _firsts([*known.get(identity, []), *rows])
            self._settle(before, after, rows, inserts, outcome)
        if inserts:
            outcome.insert = pl.concat([outcome.insert, pl.DataFrame(inserts, schema=copies.schema)])

    def _settle(
        self,
        before: Mapping[int, dict[str, Any]],
        after: Mapping[int, dict[str, Any]],
        rows: Iterable[dict[str, Any]],
        inserts: list[dict[str, Any]],
        outcome: _Outcome,
    ) -> None:
        """One identity: what is kept, what is a duplicate or a conflict, and how its total moves."""
        kept = {_position(row) for row in before.values()}
        for row in rows:
            first = after[row["revision"]]
            if _position(row) == _position(first):
                if _position(row) not in kept:
                    kept.add(_position(row))
                    inserts.append(row)
            elif _content(row) == _content(first):
                outcome.duplicates += 1
            else:
                outcome.letters.append(_conflict(row, first))
        for revision, row in before.items():
            # A copy that came later but lies earlier in the log takes the place of one kept before.
            if _content(row) != _content(after[revision]):
                outcome.letters.append(_conflict(row, after[revision]))
        for row in rows:
            # A batch that ended between these copies may have published what one of them came to alone.
            outcome.change.setdefault((row["ods_code"], row["item_id"], _ordinal(row["day"])), 0)
        for revisions, sign in ((before, -1), (after, 1)):
            if revisions:
                row = revisions[max(revisions)]
                key = (row["ods_code"], row["item_id"], _ordinal(row["day"]))
                outcome.change[key] = outcome.change.get(key, 0) + sign * row["quantity_micros"]

    # --- step 4: totals ---

    def _load(self, totals: _Totals, practices: set[str], offset: int) -> None:
        missing = practices - totals.practices
        if missing:
            totals.micros |= self._context.ledger.totals_of_practices(sorted(missing), self._generation, offset)
            totals.practices |= missing

    def _publish(self, batch: Batch, totals: Mapping[DayKey, int]) -> None:
        partitions = self._context.settings.partitions
        by_partition: dict[int, list[tuple[str, str, int, str]]] = {}
        of_item: dict[str, int] = {}
        for (ods_code, item_id, day), quantity in totals.items():
            if item_id not in of_item:
                of_item[item_id] = partition_for(item_id, partitions)
            by_partition.setdefault(of_item[item_id], []).append((ods_code, item_id, day, str(quantity)))
        metadata = {
            "generation": str(self._generation),
            "topic": USAGE_ACCEPTED,
            "partition": str(batch.partition),
            "end_offset": str(batch.end_offset),
        }
        for partition in range(partitions):
            rows = by_partition.get(partition, [])
            for start in range(0, max(len(rows), 1), 50_000):
                chunk = rows[start : start + 50_000]
                named = [dict(zip(TOTALS_SCHEMA.names, row, strict=True)) for row in chunk]
                table = pa.Table.from_pylist(named, schema=TOTALS_SCHEMA)
                last = {"last": "1" if start + len(chunk) >= len(rows) else "0"}
                self._context.outbox.send(CHARGE_INPUTS, encode_block(table, metadata | last), partition=partition)


def _firsts(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Per revision the row that stands: the first by position."""
    firsts: dict[int, dict[str, Any]] = {}
    for row in rows:
        standing = firsts.get(row["revision"])
        if standing is None or _position(row) < _position(standing):
            firsts[row["revision"]] = row
    return firsts


def _position(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        row["generation"],
        row["broker_timestamp_ms"],
        row["topic"],
        row["partition"],
        row["offset"],
        row["index"],
    )


def _content(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["item_id"], row["quantity_micros"], row["occurred_at"]


def _ordinal(day: Any) -> int:
    return int(day) + _EPOCH_ORDINAL if isinstance(day, int) else int(day.toordinal())


def _instant(microseconds: int) -> datetime:
    seconds, rest = divmod(microseconds, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)


def _conflict(row: Mapping[str, Any], first: Mapping[str, Any]) -> DeadLetter:
    value = {
        "id": row["id"],
        "revision": row["revision"],
        "supplier_id": row["supplier_id"],
        "ods_code": row["ods_code"],
        "item_id": row["item_id"],
        "quantity": micros_text(row["quantity_micros"]),
        "occurred_at": row["occurred_at"].isoformat(),
    }
    return DeadLetter(
        row["topic"],
        row["partition"],
        row["offset"],
        f"was said before with other content, at {first['topic']}/{first['partition']} offset {first['offset']}; "
        "a correction needs a higher revision",
        "id",
        row["index"],
        row["ods_code"].encode(),
        json.dumps(value).encode(),
        row["broker_timestamp_ms"],
    )
