"""The judge: the whole log, read back, given to the oracle; then everything that tribill came to beside it.

Which records lie before a cut depends on timing.  So the cuts are those that were recorded, and the oracle
is given the log's prefix up to each, in the log's order.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from chaos.book import Garbage
from chaos.speaker import NUMBER
from sinks.clickhouse import ClickHouse
from streams.settings import Settings
from streams.topics import DEAD_LETTERS, PERIOD_EVENTS, STAGES, Broker, client_settings, configurations, input_topics
from tests.oracle import oracle
from tribill.roles import ROLES

Place = tuple[str, int]
Position = tuple[str, int, int]
_READ_SECONDS = 60
#: Of a kind so many differences are shown.
_SHOWN = 5


class Unverified(Exception):
    """The checker itself could not do its work: nothing can be said of tribill."""


@dataclass(frozen=True, slots=True)
class Found:
    """A record of the log; `number` is that of what was said, None for what tribill itself wrote."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    number: int | None
    value: bytes | None

    @property
    def position(self) -> Position:
        """Where it lies."""
        return self.topic, self.partition, self.offset


@dataclass(slots=True)
class Verdict:
    """What differs, and by how much money."""

    differences: list[str] = field(default_factory=list)
    pounds: Fraction = Fraction(0)
    checked: dict[str, int] = field(default_factory=dict)

    def note(self, what: str, differing: Iterable[str]) -> None:
        """Adds differences of a kind, the first of them in words."""
        every = list(differing)
        self.differences += [f"{what}: {each}" for each in every[:_SHOWN]]
        if len(every) > _SHOWN:
            self.differences.append(f"{what}: and {len(every) - _SHOWN} more")


class Log:
    """The topics as an independent consumer reads them."""

    def __init__(self, settings: Settings) -> None:
        self._clients = client_settings(settings)
        self.admin = AdminClient(self._clients | {"log_level": "0"})
        self._broker = Broker(settings)
        self._topics = configurations(settings)

    def ends(self, topics: Iterable[str]) -> dict[Place, int]:
        """The end offset of every partition."""
        asked = {
            TopicPartition(topic, partition): OffsetSpec.latest()
            for topic in topics
            for partition in range(self._topics[topic][0])
        }
        futures = self.admin.list_offsets(asked, request_timeout=20)
        return {(place.topic, place.partition): future.result().offset for place, future in futures.items()}

    def committed(self, role: str, places: Iterable[Place]) -> dict[Place, int]:
        """What a role's group has committed; 0 where nothing."""
        return self._broker.committed(f"tribill-{role}", places)

    def behind(self, settings: Settings) -> dict[str, int]:
        """How many records each role has still to do; empty when all is done."""
        found = {}
        for role, topics in STAGES:
            ends = self.ends(topics(settings))
            done = self.committed(role, ends)
            if lag := sum(end - done.get(place, 0) for place, end in ends.items()):
                found[role] = lag
        return found

    def read(self, topics: Iterable[str]) -> list[Found]:
        """Every record of these topics."""
        ends = {place: end for place, end in self.ends(topics).items() if end}
        settings = {"group.id": "chaos-checker", "enable.auto.commit": "false", "enable.partition.eof": "true"}
        consumer = Consumer(self._clients | settings | {"log_level": "0"})
        found: list[Found] = []
        finished: set[Place] = set()
        deadline = datetime.now(UTC).timestamp() + _READ_SECONDS
        try:
            consumer.assign([TopicPartition(*place, 0) for place in ends])
            while finished != ends.keys():
                if datetime.now(UTC).timestamp() > deadline:
                    raise Unverified(f"the log could not be read: {sorted(ends.keys() - finished)} have no end")
                for message in consumer.consume(5_000, 1):
                    error = message.error()
                    if error is None:
                        found.append(_found(message))
                    elif error.code() == KafkaError._PARTITION_EOF:
                        finished.add((message.topic(), message.partition()))
        finally:
            consumer.close()
        counts = Counter((each.topic, each.partition) for each in found)
        if counts != Counter(ends):
            raise Unverified(f"the log has not as many records as offsets: {counts} of {ends}")
        return found


class Checker:
    """Compares what a stack came to with the oracle."""

    def __init__(self, settings: Settings, said: list[dict[str, Any] | Garbage | None], out: Path) -> None:
        self._settings = settings
        self._said = said
        self._out = out
        self._log = Log(settings)
        self._ledger = ClickHouse(settings)
        self.verdict = Verdict()

    def check(self) -> Verdict:
        """Everything.  Raises Unverified, or whatever the oracle dies of."""
        records = self._log.read([*input_topics(self._settings), PERIOD_EVENTS])
        self._check_log(records)
        inputs = sorted((each for each in records if each.topic != PERIOD_EVENTS), key=_log_order)
        whole = self._read_by_oracle(inputs)
        self._check_documents(inputs)
        self._check_states()
        self._check_accruals(whole)
        self._check_dead_letters(records, inputs, whole)
        self._check_offsets()
        return self.verdict

    # --- the log ---

    def _check_log(self, records: list[Found]) -> None:
        there = Counter(each.number for each in records if each.number is not None)
        missing = [number for number in range(len(self._said)) if number not in there]
        if missing:
            raise Unverified(f"{len(missing)} records that the broker acknowledged are not in the log")
        self.verdict.checked["records"] = len(records)

    def _read_by_oracle(self, records: list[Found]) -> oracle.Log:
        log = oracle.Log(datetime.now(UTC))
        for place, record in enumerate(records):
            line = self._meant(record)
            if isinstance(line, dict):
                log.read(place, line)
        return log

    def _meant(self, record: Found) -> dict[str, Any] | Garbage | None:
        return None if record.number is None else self._said[record.number]

    # --- documents ---

    def _check_documents(self, inputs: list[Found]) -> None:
        books = oracle.Books()
        for period, cut in self._cuts():
            before = [each for each in inputs if each.offset < cut[f"{each.topic}/{each.partition}"]]
            books.close(self._read_by_oracle(before), period)
            for name, rows in (("lines", books.closes[-1].lines), ("held", books.closes[-1].held)):
                written = _rows((self._out / period / f"{name}.csv").read_text())
                self._compare_rows(f"{name}.csv of {period}", written, rows)
        self.verdict.checked["closes"] = len(books.closes)
        if not any(close.lines for close in books.closes):
            raise Unverified("the book came to no money at all")

    def _cuts(self) -> list[tuple[str, dict[str, int]]]:
        rows = self._ledger.query(
            "SELECT period, argMin(cut, (generation, offset)) FROM cuts GROUP BY period ORDER BY period"
        )
        closed = {period for (period,) in self._ledger.query("SELECT period FROM periods FINAL")}
        if closed != {period for period, _ in rows}:
            raise Unverified(f"closed are {sorted(closed)}, cuts there are of {[period for period, _ in rows]}")
        return [(period, dict(cut)) for period, cut in rows]

    def _compare_rows(self, what: str, found: list[tuple[str, ...]], expected: list[oracle.Row]) -> None:
        ours, theirs = Counter(found), Counter(expected)
        surplus, missing = ours - theirs, theirs - ours
        by_key: dict[tuple[str, ...], Fraction] = defaultdict(Fraction)
        for rows, sign in ((surplus, 1), (missing, -1)):
            for row, times in rows.items():
                by_key[row[:-1]] += sign * times * Fraction(row[-1])
        self.verdict.pounds += sum(abs(each) for each in by_key.values())
        shown = [f"{','.join(row)} is one too many" for row in surplus]
        self.verdict.note(what, [*shown, *(f"{','.join(row)} is missing" for row in missing)])
        self.verdict.checked["rows"] = self.verdict.checked.get("rows", 0) + len(expected)

    # --- no line in two states ---

    def _check_states(self) -> None:
        """One row, one number, one period: whatever is keyed must have one content, in the table and on the topic."""
        keyed = {
            "accruals": ("order_number, item_id, ods_code, month, version", "exact_pence, groups, quantity_micros"),
            "document_rows": (
                "period, kind, order_number, item_id, ods_code, supplier_id, payer, month",
                "pence, vat_rate_micros",
            ),
            "documents": ("number", "period, body, net_pence, vat_pence"),
            "statements": ("period, kind, code", "net_pence, body"),
            "evidence": ("period, number", "body"),
            "adjustments": (
                "period, order_number, item_id, ods_code, supplier_id, payer, month",
                "cause, is_release, original_document",
            ),
            "allocations_wanted": ("period, ordering_party, month", "pence"),
            "periods": ("period", "documents, rows, net_pence, held_pence"),
            "contract_changes": ("order_number, generation, partition, offset", "outcome, body"),
            "reference_changes": ("code, generation, partition, offset", "outcome, body"),
        }
        for table, (key, content) in keyed.items():
            rows = self._ledger.query(f"SELECT {key} FROM {table} GROUP BY {key} HAVING uniqExact({content}) > 1")
            self.verdict.note(f"two states in {table}", (str(row) for row in rows))
        twice = self._ledger.query(
            """
            SELECT period, order_number, item_id, ods_code, payer, month FROM document_rows AS held FINAL
            INNER JOIN (
                SELECT h.period AS period, i.order_number AS order_number, i.item_id AS item_id,
                       i.ods_code AS ods_code, i.supplier_id AS supplier_id, i.payer AS payer, i.month AS month
                FROM document_rows AS i FINAL
                INNER JOIN (SELECT DISTINCT period FROM document_rows) AS h ON 1 = 1
                WHERE i.kind = 'invoiced' AND i.period <= h.period
                GROUP BY ALL HAVING sum(i.pence) != 0
            ) AS invoiced USING (period, order_number, item_id, ods_code, supplier_id, payer, month)
            WHERE kind = 'held' AND pence != 0
            """
        )
        self.verdict.note("held and invoiced at once", (str(row) for row in twice))
        drifts = self._ledger.query("SELECT period, toString(drift_pence) FROM periods FINAL WHERE drift_pence != 0")
        self.verdict.pounds += sum((abs(Fraction(pence)) / 100 for _, pence in drifts), Fraction(0))
        self.verdict.note("accruals differed from the ledger at the close of", (str(row) for row in drifts))
        gaps = self._ledger.query(
            "SELECT splitByChar('-', number)[1] AS payer, count(), max(toUInt32(splitByChar('-', number)[-1])) AS last"
            " FROM documents FINAL WHERE kind != 'pro-forma' GROUP BY payer HAVING count() != last"
        )
        self.verdict.note("document numbers have gaps", (str(row) for row in gaps))
        totals = self._ledger.query(
            "SELECT period, sum(net_pence), any(of_rows) FROM documents FINAL INNER JOIN (SELECT period,"
            " sum(pence) AS of_rows FROM document_rows FINAL WHERE kind = 'invoiced' GROUP BY period) AS r"
            " USING period GROUP BY period HAVING sum(net_pence) != any(of_rows)"
        )
        self.verdict.note("documents do not sum to their lines", (str(row) for row in totals))

    # --- accruals ---

    def _check_accruals(self, log: oracle.Log) -> None:
        known = oracle.what_is_known(log)
        units, _ = oracle.assign_usage(known)
        rows = self._ledger.query(
            "SELECT order_number, toString(item_id), ods_code, month, exact_pence FROM accruals FINAL"
        )
        found = {(*row[:3], row[3]): Fraction(row[4]) for row in rows}
        expected: dict[tuple[str, str, str, int], Fraction] = {}
        months = sorted({month for *_, month in found})
        for month in range(months[0] - 12, months[-1] + 1) if months else []:
            at = (month // 12, month % 12 + 1)
            lines = [each for each in known.lines if oracle.touches(each, at)]
            for line, days in oracle.month_charges(known, lines, at, units).items():
                expected[(*line, month)] = sum(days.values(), Fraction(0)) * 100
        differing = []
        for key in sorted(found.keys() | expected.keys()):
            ours, theirs = found.get(key, Fraction(0)), expected.get(key, Fraction(0))
            if ours != theirs:
                self.verdict.pounds += abs(ours - theirs) / 100
                differing.append(f"{key}: {float(ours):.4f}, by the oracle {float(theirs):.4f} pence")
        self.verdict.note("accruals", differing)
        self.verdict.checked["accruals"] = len(expected)

    # --- dead letters ---

    def _check_dead_letters(self, records: list[Found], inputs: list[Found], whole: oracle.Log) -> None:
        expected: Counter[Position] = Counter(inputs[place].position for place, _ in whole.refused)
        for record in records:
            if isinstance(self._meant(record), Garbage):
                expected[record.position] += 1
        found: Counter[Position] = Counter()
        for topic, partition, offset in self._ledger.query(
            "SELECT toString(topic), partition, offset FROM dead_letters FINAL WHERE agent != 'publish'"
        ):
            found[topic, partition, offset] += 1
        # A copy that came first and lies later in the log was told of when its better came.
        disputed = {position for position in found if position[0].startswith("usage")}
        # "Redelivered it stays refused": whether that is told again is left open.
        refused = {name for place, _ in whole.refused if (name := self._name(inputs[place]))}
        disputed |= {each.position for each in inputs if self._name(each) in refused}
        surplus = [each for each in (found - expected) if each not in disputed]
        self.verdict.note("no dead letter of", (self._tell(each, records) for each in expected - found))
        self.verdict.note("a dead letter too many of", (self._tell(each, records) for each in surplus))
        topic = {_key_of(record) for record in self._log.read([DEAD_LETTERS])}
        untold = [each for each in expected if f"{each[0]}/{each[1]}/{each[2]}" not in topic]
        self.verdict.note("not on the topic dead-letters", map(str, untold))
        self.verdict.checked["dead letters"] = expected.total()

    def _name(self, record: Found) -> tuple[Any, ...] | None:
        """Of a change, what its id is unique within, and the id."""
        meant = self._meant(record)
        if not isinstance(meant, dict) or record.topic.startswith("usage") or not isinstance(meant["value"], dict):
            return None
        value = meant["value"]
        return record.topic, str(value.get("order_number", value.get("code"))), str(value.get("id"))

    def _tell(self, position: Position, records: list[Found]) -> str:
        [record] = [each for each in records if each.position == position]
        meant = self._meant(record)
        if not isinstance(meant, dict):
            return f"{position}: {meant!r:.100}"
        value = meant["value"] if isinstance(meant["value"], dict) else {}
        rows = self._ledger.query(
            "SELECT revision, broker_timestamp_ms, topic, partition, offset, accepted_partition, accepted_offset,"
            " toString(item_id), quantity_micros, occurred_at FROM usage FINAL"
            " WHERE id = {id:String} AND ods_code = {ods_code:String} ORDER BY broker_timestamp_ms",
            {"id": str(value.get("id", "")), "ods_code": str(value.get("ods_code", ""))},
        )
        kept = "; ".join(str(row) for row in rows)
        return f"{position} at {record.timestamp}: {json.dumps(meant)[:300]}; the ledger has {kept or 'nothing'}"

    # --- offsets ---

    def _check_offsets(self) -> None:
        for role, lag in self._log.behind(self._settings).items():
            self.verdict.note("not committed", [f"{lag} records of {role}"])
        self.verdict.checked["groups"] = len(ROLES)


def _log_order(record: Found) -> tuple[Any, ...]:
    """Changes by their partition's order, usage by the broker's time (RULES section 1)."""
    if record.topic.startswith("usage"):
        return 1, record.timestamp, record.topic, record.partition, record.offset
    return 0, record.topic, record.partition, record.offset


def _found(message: Any) -> Found:
    number = next((int(value) for name, value in message.headers() or () if name == NUMBER), None)
    value = message.value()
    if message.topic() == DEAD_LETTERS:
        value = message.key()
    place = (message.topic(), message.partition(), message.offset())
    return Found(*place, message.timestamp()[1], number, value)


def _key_of(letter: Found) -> str:
    """The source position in a dead letter's key, without the index."""
    return (letter.value or b"").decode().rpartition("/")[0]


def _rows(text: str) -> list[tuple[str, ...]]:
    return [tuple(row) for row in csv.reader(io.StringIO(text))][1:]


def pounds_text(pounds: Fraction) -> str:
    """An amount of money for a person, never rounded to nothing."""
    shown = (Decimal(pounds.numerator) / pounds.denominator).quantize(Decimal("0.01"))
    return "0.01" if pounds and not shown else str(shown)
