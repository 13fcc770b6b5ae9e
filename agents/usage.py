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
   A partition of charges that has none of them is not told: nothing changes for it, and each time
   that it is told something costs it as much as a batch.  Up to where it has all, a close tells it.

Totals in memory are a cache: they hold for one offset of the partition, and are read from the
ledger again for any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa

from agents.context import Context
from agents.intake import BLOCK_ROWS, encode_block
from rating.amounts import micros_text
from sinks import metrics
from sinks.dead_letters import DeadLetter
from sinks.ledger import USAGE_SCHEMA
from streams.agent import Agent
from streams.batch import Batch
from streams.topics import CHARGE_INPUTS, USAGE_ACCEPTED, partition_for

#: Practice, item, London day (ordinal).
DayKey = tuple[str, str, int]
#: Practice, supplier, id.
Identity = tuple[str, str, str]
_EPOCH_ORDINAL = 719163

#: Day totals as `charge-inputs` carries them; quantities as text, because sums outgrow any integer.
TOTALS_SCHEMA = pa.schema(
    [
        ("ods_code", pa.string()),
        ("item_id", pa.string()),
        ("day", pa.int32()),
        ("quantity_micros", pa.string()),
    ]
)
_DAY_KEY = ["ods_code", "item_id", "day"]
_DAY = (pl.col("day").to_physical() + _EPOCH_ORDINAL).alias("day")
_IDENTITY = ["ods_code", "supplier_id", "id"]
#: Practices whose codes begin alike in so many characters (an area's, as a rule) are asked for together: what
#: a question costs is mostly that it is asked, not how much it finds.
ALIKE = 3
#: So many day totals of a partition are remembered, some 150 bytes each; then all are forgotten.
_REMEMBERED_TOTALS = 1_000_000


@dataclass(slots=True)
class _Totals:
    """The day totals of some months of a partition's practices, as of an offset: micros by service and day."""

    offset: int
    #: Of which beginnings of practices' codes, and months, they are all there.
    known: set[tuple[str, int]] = field(default_factory=set)
    micros: dict[tuple[str, str], dict[int, int]] = field(default_factory=dict)
    size: int = 0

    def set(self, ods_code: str, item_id: str, day: int, quantity_micros: int) -> None:
        """Remembers a total as the ledger has it."""
        days = self.micros.setdefault((ods_code, item_id), {})
        self.size += day not in days
        days[day] = quantity_micros

    def add(self, changes: pl.DataFrame) -> pl.DataFrame:
        """Adds a batch's changes by day and returns the new totals in their place."""
        columns = [changes[name].to_list() for name in (*_DAY_KEY, "quantity_micros")]
        totals = []
        for ods_code, item_id, day, quantity in zip(*columns, strict=True):
            days = self.micros.get((ods_code, item_id))
            if days is None:
                days = self.micros[ods_code, item_id] = {}
            before = days.get(day)
            if before is None:
                self.size += 1
                before = 0
            days[day] = total = before + quantity
            totals.append(str(total))
        return changes[_DAY_KEY].hstack([pl.Series("quantity_micros", totals, pl.String)])


@dataclass(slots=True)
class _Outcome:
    """What a batch comes to: rows to keep, by how much day totals change, and what is told of the rest."""

    #: Rows that are kept without more ado.
    new: pl.DataFrame
    #: Of copies those that are kept, and how totals change by the identities that were judged.
    kept: list[dict[str, Any]] = field(default_factory=list)
    change: dict[DayKey, int] = field(default_factory=dict)
    letters: list[DeadLetter] = field(default_factory=list)
    duplicates: int = 0

    def insert(self) -> pl.DataFrame:
        """All rows to keep."""
        return pl.concat([self.new, pl.DataFrame(self.kept, schema=self.new.schema)]) if self.kept else self.new

    def changes(self) -> pl.DataFrame:
        """All changes of day totals as columns, a row for each."""
        changes = self.new.group_by("ods_code", "item_id", _DAY).agg(pl.col("quantity_micros").cast(pl.Int128).sum())
        if self.change:
            keyed = [(*key, quantity) for key, quantity in self.change.items()]
            changes = pl.concat([changes, pl.DataFrame(keyed, schema=changes.schema, orient="row")])
            changes = changes.group_by(_DAY_KEY).agg(pl.col("quantity_micros").sum())
        return changes


class Usage(Agent):
    """The agent of role `usage`."""

    role: ClassVar[str] = "usage"
    lanes: ClassVar[int] = 2

    def __init__(self, context: Context) -> None:
        self._context = context
        self._claims = context.claims()
        self._claims.check()
        self._generation = context.settings.log_generation
        self._claimed = (
            pl.concat_str("supplier_id", pl.lit("/"), "ods_code", pl.lit("/"), "id").alias("identity"),
            pl.concat_str(
                pl.lit(str(self._generation)), "accepted_offset", "topic", "partition", "offset", "index", "revision",
                pl.struct("item_id", "quantity_micros", "occurred_at").hash(),
                separator="/",
            ).alias("claim"),
        )  # fmt: skip
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
        rows, again = self._rows(batch)
        outcome = self._judge(rows, batch)
        if again:
            # Reconciliation doubts what is remembered; the ledger is asked again.
            totals = _Totals(batch.first_offset)
            outcome.change |= {key: outcome.change.get(key, 0) for key in again}
        changes = outcome.changes()
        insert = outcome.insert()
        self._context.ledger.insert_usage(insert.to_arrow())
        self._load(totals, changes, batch)
        self._publish(batch, totals.add(changes))
        self._context.dead_letters.write(outcome.letters)
        self._context.outbox.flush()
        totals.offset = batch.end_offset
        if totals.size <= _REMEMBERED_TOTALS:
            self._totals[batch.partition] = totals
        metrics.USAGE.labels("accepted").inc(insert.height)
        metrics.USAGE.labels("duplicate").inc(outcome.duplicates)
        metrics.USAGE.labels("conflict").inc(len(outcome.letters))
        metrics.RECORDS.labels(self.role, "accepted").inc(rows.height)

    # --- step 0: rows ---

    def _rows(self, batch: Batch) -> tuple[pl.DataFrame, set[DayKey]]:
        """The readings of a batch, and the totals that reconciliation wants said again."""
        tables, offsets, again = [], [], set()
        for record in batch.records:
            assert record.value is not None, "usage-accepted holds what intake wrote"
            with pa.ipc.open_stream(record.value) as reader:
                if asked := (reader.schema.metadata or {}).get(b"again"):
                    again |= {(ods_code, item_id, day) for ods_code, item_id, day in json.loads(asked)}
                    continue
                tables.append(reader.read_all())
                offsets.append(record.offset)
        if not tables:
            return pl.DataFrame(USAGE_SCHEMA.empty_table()), again
        # In a block of before an upgrade text may have another layout; nothing else may differ.
        schema = tables[0].schema
        rows = pl.DataFrame(pa.concat_tables(each if each.schema == schema else each.cast(schema) for each in tables))
        accepted = [
            pl.Series("accepted_offset", np.repeat(offsets, [table.num_rows for table in tables]), pl.Int64),
            pl.Series("generation", np.full(rows.height, self._generation), pl.UInt32),
            pl.Series("accepted_partition", np.full(rows.height, batch.partition), pl.Int32),
        ]
        return rows.hstack(accepted), again

    # --- steps 1 and 2: what is new ---

    def _judge(self, rows: pl.DataFrame, batch: Batch) -> _Outcome:
        """What the batch comes to."""
        new = self._certainly_new(rows, batch.partition)
        if new.all():
            return _Outcome(rows)
        suspects = rows.filter(~new)[_IDENTITY].unique()
        known = self._context.ledger.known_usage(suspects, self._generation, batch.first_offset)
        # An identity that is known, or more than once in the batch, is judged with all its copies.
        repeated = rows.join(suspects, on=_IDENTITY, how="semi").filter(~pl.struct(_IDENTITY).is_unique())
        judged = pl.concat([known[_IDENTITY], repeated[_IDENTITY]])
        if judged.is_empty():
            return _Outcome(rows)
        outcome = _Outcome(rows.join(judged, on=_IDENTITY, how="anti"))
        self._judge_copies(rows.join(judged, on=_IDENTITY, how="semi"), known, outcome)
        return outcome

    def _certainly_new(self, rows: pl.DataFrame, partition: int) -> pl.Series:
        named = rows.select(self._claimed)
        unclaimed, certain_after = self._claims.claim(partition, named["identity"], named["claim"])
        # A later revision may lie on another day than the first: only the ledger knows.
        return unclaimed & (rows["occurred_at"] >= certain_after) & (rows["revision"] == 0)

    def _judge_copies(self, copies: pl.DataFrame, known: pl.DataFrame, outcome: _Outcome) -> None:
        by_identity: dict[Identity, list[dict[str, Any]]] = {}
        for row in copies.iter_rows(named=True):
            by_identity.setdefault((row["ods_code"], row["supplier_id"], row["id"]), []).append(row)
        kept: dict[Identity, list[dict[str, Any]]] = {}
        for row in known.iter_rows(named=True):
            kept.setdefault((row["ods_code"], row["supplier_id"], row["id"]), []).append(row)
        for identity, rows in by_identity.items():
            before = _firsts(kept.get(identity, []))
            after = _firsts([*kept.get(identity, []), *rows])
            self._settle(before, after, rows, outcome)

    def _settle(
        self,
        before: Mapping[int, dict[str, Any]],
        after: Mapping[int, dict[str, Any]],
        rows: Iterable[dict[str, Any]],
        outcome: _Outcome,
    ) -> None:
        """One identity: what is kept, what is a duplicate or a conflict, and how its total moves."""
        kept = {_position(row) for row in before.values()}
        for row in rows:
            first = after[row["revision"]]
            if _position(row) == _position(first):
                if _position(row) not in kept:
                    kept.add(_position(row))
                    outcome.kept.append(row)
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

    def _load(self, totals: _Totals, changes: pl.DataFrame, batch: Batch) -> None:
        """Reads what the ledger has of the practices' months that change, as far as it is not remembered."""
        date = (pl.col("day") - _EPOCH_ORDINAL).cast(pl.Date)
        month = date.dt.year().cast(pl.Int64) * 12 + date.dt.month() - 1
        missing = set(changes.select(pl.col("ods_code").str.head(ALIKE), month).unique().rows()) - totals.known
        if missing:
            alike, months = sorted({each[0] for each in missing}), sorted({each[1] for each in missing})
            found = self._context.ledger.totals_of_practices(alike, months, self._generation, batch.first_offset)
            for (ods_code, item_id, day), quantity in found.items():
                if partition_for(ods_code, self._context.settings.partitions) == batch.partition:
                    totals.set(ods_code, item_id, day, quantity)
            totals.known.update(product(alike, months))

    def _publish(self, batch: Batch, totals: pl.DataFrame) -> None:
        partitions = self._context.settings.partitions
        items = totals["item_id"].unique().to_list()
        numbers = [partition_for(item_id, partitions) for item_id in items]
        placed = totals.with_columns(
            for_partition=pl.col("item_id").replace_strict(items, numbers, return_dtype=pl.Int32)
        )
        parts = placed.partition_by("for_partition", as_dict=True, include_key=False)
        for (partition,), part in sorted(parts.items()):
            table = part.to_arrow().cast(TOTALS_SCHEMA)
            for start in range(0, table.num_rows, BLOCK_ROWS):
                last = start + BLOCK_ROWS >= table.num_rows
                block = totals_block(
                    table.slice(start, BLOCK_ROWS), self._generation, batch.partition, batch.end_offset, last
                )
                self._context.outbox.send(CHARGE_INPUTS, block, partition=partition)


def totals_block(totals: pa.Table, generation: int, partition: int, end_offset: int, last: bool) -> bytes:
    """Day totals (`TOTALS_SCHEMA`) of a partition of usage-accepted up to an offset, as `charge-inputs` carries them.

    With the last block of them the partition that gets it has all of its totals up to there.
    """
    metadata = {
        "generation": str(generation),
        "topic": USAGE_ACCEPTED,
        "partition": str(partition),
        "end_offset": str(end_offset),
        "last": "1" if last else "0",
    }
    return encode_block(totals, metadata)


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
