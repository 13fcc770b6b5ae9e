"""Charges: rates the lines of each item as what they follow from arrives, into running accruals.

Reads `charge-inputs`, partitioned by item: accepted contract and reference changes, and day totals.
All are absolute, so applying one twice is harmless.  Writes `accruals` (a row a line and month) and
what each would draw on an allocation to `funding-inputs`.

The order of steps for a batch:

1. The inputs are applied to the state of the partition.  The state holds for one offset; for any
   other a new epoch begins, and it is read from the ledger at the positions counted at that offset.
2. The lines touched are rated.  The batch's end and its rows' last month are announced, and if no newer
   epoch has begun, the rows that changed are inserted, with that end as their version.  If the process dies after this,
   the batch is read again and gives the same rows.
3. What changed goes to `funding-inputs` and `accruals`, and the broker acknowledges both.
4. The positions that the accruals now count are inserted.  If no newer epoch has begun meanwhile,
   the batch is done.

A worker that has lost its partition may write late what it announced before its successor's epoch
began.  So the successor, which sees that, ends a batch at the same offset: whatever rows the other
writes are the successor's own or older, for each says what is at its version, and whatever changed
between two ends is written at the later one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from fractions import Fraction
from threading import Lock
from typing import Any, ClassVar

import pyarrow as pa

from agents.collector import collector_paused
from agents.context import Context
from rating.amounts import Exact, pence
from rating.book import Book, Line, LineKey, Order, Reference, Service
from rating.calendar import LONDON, month_of, month_text, parse_month
from rating.charges import MonthCharge, first_month, rate_months, rated_together
from rating.funding import charge_of, groups
from rating.records import (
    ContractBody,
    ContractChange,
    FundingChanged,
    ListSize,
    OrderPlaced,
    OrderTerminated,
    PartyNovated,
    PracticeClosed,
    PracticeMerged,
    PriceAgreed,
    QuantityChanged,
    ReferenceChange,
    Retracted,
    ServiceAccepted,
    Waterfall,
    read_contract_change,
    read_reference_change,
)
from sinks import metrics
from sinks.accruals import AccrualRow, Accruals, fraction_text, group_json
from sinks.positions import place_text, version
from streams.agent import Agent
from streams.batch import Batch, NotYet, Record
from streams.topics import (
    ACCRUALS,
    CHARGE_INPUTS,
    CONTRACT_CHANGES,
    FUNDING_INPUTS,
    REFERENCE_CHANGES,
    USAGE_ACCEPTED,
    Place,
    partition_for,
)

#: Generation, partition and offset of a contract change: its place in the order's log.
LogPlace = tuple[int, int, int]
#: Order number and item id: lines that are rated together.
OrderItem = tuple[str, str]
_ALWAYS = -1
_JSON = json.JSONEncoder(separators=(",", ":"))


@dataclass(slots=True)
class State:
    """All that a partition's items' charges follow from, as of an offset in charge-inputs."""

    offset: int
    positions: dict[str, int] = field(default_factory=dict)
    contracts: dict[str, dict[LogPlace, ContractChange]] = field(default_factory=dict)
    orders: dict[str, Order] = field(default_factory=dict)
    reference: Reference = field(default_factory=Reference)
    usage: dict[Service, dict[int, int]] = field(default_factory=dict)
    book: Book | None = None
    #: Months of a line that have a row, with the row's hash (None: not known) and wanted parties.
    written: dict[LineKey, dict[int, tuple[int | None, frozenset[str]]]] = field(default_factory=dict)
    #: What has been said since the accruals were written, with the first month that it can move: of orders,
    #: of an order's lines for an item (at one practice, or None: at all), and of codes; and months of usage.
    said_of_orders: dict[str, int] = field(default_factory=dict)
    said_of_lines: dict[tuple[str, str, str | None], int] = field(default_factory=dict)
    said_of_codes: dict[str, int] = field(default_factory=dict)
    list_sizes: set[tuple[str, int]] = field(default_factory=set)
    used: dict[Service, set[int]] = field(default_factory=dict)
    #: The month up to which all lines are written ahead.
    horizon: int = 0
    #: Where the batch in hand began.
    since: int = 0
    epoch: int = 0
    #: Where those that held the partition before may have ended batches: it ends some there, too.
    ends: list[int] = field(default_factory=list)


class Charges(Agent):
    """The agent of role `charges`."""

    role: ClassVar[str] = "charges"
    lanes: ClassVar[int] = 2
    idle_seconds: ClassVar[float] = 60

    def __init__(self, context: Context) -> None:
        self._context = context
        self._accruals = Accruals(context.clickhouse)
        self._generation = context.settings.log_generation
        self._partitions = context.settings.partitions
        self._states: dict[int, State] = {}
        self._lock = Lock()

    def topics(self) -> Sequence[str]:
        """`charge-inputs`."""
        return [CHARGE_INPUTS]

    def do(self, batch: Batch) -> None:
        """Does a batch; see the steps above."""
        partition = batch.partition
        with self._lock:
            state = self._states.pop(partition, None)
            if state is None or state.offset < batch.first_offset:
                state = self._take_over(partition, batch.first_offset)
            for record in batch.records:
                if record.offset < state.offset:
                    continue  # done before, by this worker or another
                if state.ends and state.ends[0] <= record.offset:
                    self._end_batch(state, partition, state.ends[0])
                self._apply(record, state, partition)
            if state.offset < batch.end_offset:
                self._end_batch(state, partition, batch.end_offset)
            self._states[partition] = state
        metrics.RECORDS.labels(self.role, "accepted").inc(len(batch.records))

    def idle(self, committed: Mapping[Place, int]) -> None:
        """Writes accruals ahead when the month has changed, also where nothing arrives."""
        with self._lock:
            for (_, partition), offset in committed.items():
                state = self._states.pop(partition, None)
                if state is not None and state.offset < offset:
                    state = None
                horizon = self._accruals.horizon(partition, self._generation) if state is None else state.horizon
                if horizon < self._horizon(horizon):
                    state = state or self._take_over(partition, offset)
                    self._end_batch(state, partition, state.offset)
                if state is not None:
                    self._states[partition] = state

    # --- step 1: state ---

    def _take_over(self, partition: int, offset: int) -> State:
        epoch = self._accruals.begin(partition, self._generation)
        first, ends = self._accruals.left_by_others(partition, epoch, self._generation, offset)
        state = restore(self._context, partition, first)
        state.since, state.epoch, state.ends = first, epoch, ends
        announced = self._accruals.announced(partition)
        if first > offset or announced > state.horizon:
            # What others did is skipped and acknowledged: from now on this epoch says that it is done, for theirs may
            # yet be doubted.  Or others may yet write rows of months that nobody has said to be written, as of here.
            self._end_batch(state, partition, first, announced)
        return state

    def _end_batch(self, state: State, partition: int, offset: int, announced: int = 0) -> None:
        state.offset = offset
        state.ends = [each for each in state.ends if each > offset]
        with collector_paused():
            self._flush(state, partition, self._horizon(max(state.horizon, announced)))
        state.since = offset

    def _apply(self, record: Record, state: State, partition: int) -> None:
        assert record.value is not None, "charge-inputs holds what our agents wrote"
        if record.value[:1] != b"\x00":
            self._apply_totals(record.value, state)
            return
        value = self._context.codec.decode(record.value, ("AcceptedChanges",)).value
        source = value["source"]
        place = place_text(source["topic"], source["partition"])
        counted = state.positions.get(place, 0)
        for each in value["changes"]:
            body = json.loads(zlib.decompress(each["body"]))
            if value["kind"] == "contract":
                self._apply_contract(read_contract_change(body), each, state)
            elif each["offset"] >= counted:
                # List sizes of one day and painted memberships depend on their order in the log.
                self._apply_reference(read_reference_change(body), state)
        state.positions[place] = max(counted, source["end_offset"])

    def _apply_totals(self, block: bytes, state: State) -> None:
        with pa.ipc.open_stream(block) as reader:
            metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
            rows = reader.read_all()
        if "again" in metadata:
            _rate_again(json.loads(metadata["again"]), state)
            return
        place, end = place_text(USAGE_ACCEPTED, int(metadata["partition"])), int(metadata["end_offset"])
        if end < state.positions.get(place, 0):
            return  # from a worker that had lost its partition; its successor has said more
        columns = (rows.column(name).to_pylist() for name in ("ods_code", "item_id", "day", "quantity_micros"))
        for ods_code, item_id, day, quantity in zip(*columns, strict=True):
            service = (item_id, ods_code)
            state.usage.setdefault(service, {})[day] = int(quantity)
            state.used.setdefault(service, set()).add(month_of(day))
        if metadata["last"] == "1":
            state.positions[place] = end

    def _apply_contract(self, change: ContractChange, place: Any, state: State) -> None:
        key = (place["generation"], place["partition"], place["offset"])
        known = state.contracts.setdefault(change.order_number, {})
        if key in known:
            return
        latest = not known or key > max(known)
        known[key] = change
        order = state.orders.get(change.order_number)
        if order is not None and latest and not isinstance(change.body, Retracted):
            order.apply(change.body)
            _note(change.order_number, change.body, state)
        else:
            # Lines that a retraction takes away need their rows set to zero.
            changes = [known[each] for each in sorted(known)]
            state.orders[change.order_number] = Order.fold(change.order_number, changes)
            state.said_of_orders[change.order_number] = _ALWAYS
        state.book = None

    def _apply_reference(self, change: ReferenceChange, state: State) -> None:
        state.reference.say(change)
        body = change.body
        if isinstance(body, ListSize):
            state.list_sizes.add((change.code, body.as_of))
        elif isinstance(body, (PracticeClosed, PracticeMerged, ServiceAccepted, Retracted)):
            state.said_of_codes[change.code] = _ALWAYS

    def _book(self, state: State) -> Book:
        if state.book is None:
            state.book = Book(state.orders.values(), state.reference, state.usage)
        return state.book

    # --- step 2: rating ---

    def _horizon(self, written: int) -> int:
        """The month to whose end accruals are written ahead: the one after today's, or the setting.

        It never goes back from what is written, which must stay right.  So a clock that is ahead must not move
        it alone: the ledger's has to agree.
        """
        if setting := self._context.settings.horizon_month:
            return max(parse_month(setting), written)
        ahead = _month_after(datetime.now(UTC))
        return max(min(ahead, _month_after(self._accruals.now())), written) if ahead > written else written

    def _flush(self, state: State, partition: int, horizon: int) -> None:
        book = self._book(state)
        rows: list[AccrualRow] = []
        for order, item_id, lines, months in touched(state, book, horizon):
            if partition_for(item_id, self._partitions) == partition:
                for month, charges in rate_months(order, item_id, months, book, lines):
                    for line in lines:
                        self._accrue(line, month, charges.get(line.ods_code), book, state, rows)
        for key in self._vanished(state, book):
            for month, (_, parties) in state.written.pop(key).items():
                rows.append(_nothing(key, month, parties))
        state.said_of_orders.clear()
        state.said_of_lines.clear()
        state.said_of_codes.clear()
        state.list_sizes.clear()
        state.used.clear()
        state.horizon = horizon
        batch = (self._generation, state.since, state.offset)
        if not self._accruals.announce(partition, state.epoch, *batch, horizon):
            raise NotYet("another worker has taken the partition over")
        self._accruals.insert(rows, version(self._generation, state.offset), partition)
        self._publish(rows, state, partition)
        positions = (partition, self._generation, state.offset, state.positions, horizon, state.epoch)
        self._accruals.insert_positions(*positions)
        if not self._accruals.holds(partition, state.epoch):
            raise NotYet("another worker has taken the partition over")

    def _vanished(self, state: State, book: Book) -> list[LineKey]:
        """Lines with rows that their order no longer has."""
        gone = []
        for key in state.written if state.said_of_orders else ():
            if key[0] in state.said_of_orders:
                order = book.orders.get(key[0])
                if order is None or key[1:] not in order.lines:
                    gone.append(key)
        return gone

    def _accrue(
        self,
        line: Line,
        month: int,
        charge: MonthCharge | None,
        book: Book,
        state: State,
        rows: list[AccrualRow],
    ) -> None:
        """Adds the row of a line's month, unless it stands as it is."""
        written = state.written.setdefault(line.key, {})
        if charge is None and month not in written:
            return
        row = accrual_row(line, month, charge or MonthCharge(), book)
        parties, digest = frozenset(party for party, _ in row.wanted), hash(row)
        if month in written and written[month] == (digest, parties):
            return
        gone = written[month][1] - parties if month in written else frozenset()
        if gone:
            # What is no longer wanted is said once more, as zero.
            nothing = tuple((party, Fraction(0)) for party in sorted(gone))
            rows.append(replace(row, wanted=row.wanted + nothing))
        else:
            rows.append(row)
        written[month] = (digest, parties)

    # --- step 3: what follows ---

    def _publish(
        self,
        rows: Iterable[AccrualRow],
        state: State,
        partition: int,
    ) -> None:
        wanted: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            order_number, item_id, ods_code = row.line
            for party, exact in row.wanted:
                entry = {
                    "order_number": order_number,
                    "item_id": item_id,
                    "ods_code": ods_code,
                    "ordering_party": party,
                    "month": row.month,
                    "exact_pence": fraction_text(exact),
                }
                wanted.setdefault(partition_for(party, self._partitions), []).append(entry)
            shown = month_text(row.month)
            value = {
                "order_number": order_number,
                "item_id": item_id,
                "ods_code": ods_code,
                "month": shown,
                "supplier_id": row.supplier_id,
                "exact_pence": fraction_text(row.exact),
                "version": state.offset,
                "generation": self._generation,
            }
            self._context.outbox.send(
                ACCRUALS,
                self._context.codec.encode("Accrual", value),
                key="/".join((*row.line, shown)),
            )
        source = {
            "generation": self._generation,
            "topic": CHARGE_INPUTS,
            "partition": partition,
            "end_offset": state.offset,
        }
        for target, entries in wanted.items():
            for start in range(0, len(entries), 20_000):
                body = {"source": source, "wanted": entries[start : start + 20_000]}
                self._context.outbox.send(
                    FUNDING_INPUTS,
                    self._context.codec.encode("WantedOfAllocations", body),
                    partition=target,
                )
        self._context.outbox.flush()


def restore(context: Context, partition: int, offset: int) -> State:
    """A partition's state as of an offset in charge-inputs, from the ledger at the positions counted there."""
    ledger, generation, partitions = context.ledger, context.settings.log_generation, context.settings.partitions
    accruals = Accruals(context.clickhouse)
    positions = accruals.positions(partition, generation, offset)
    state = State(offset, dict(positions))
    drawing: dict[str, frozenset[str]] = {}
    for change in ledger.changes(CONTRACT_CHANGES, generation, positions):
        if change.accepted:
            place = (change.generation, change.partition, change.offset)
            state.contracts.setdefault(change.key, {})[place] = read_contract_change(change.body)
    for number, changes in list(state.contracts.items()):
        # Every line ever placed counts, as it does in what `contracts` sends here: a placing that
        # is retracted may come back.
        items = {item_id for item_id, _ in _placed(changes.values())}
        if any(partition_for(item_id, partitions) == partition for item_id in items):
            state.orders[number] = Order.fold(number, [changes[place] for place in sorted(changes)])
            drawing[number] = _may_draw(changes.values())
        else:
            # When it reaches this partition, all that was said of it comes with it.
            del state.contracts[number]
    for change in ledger.changes(REFERENCE_CHANGES, generation, positions):
        if change.accepted:
            state.reference.say(read_reference_change(change.body))
    ours = [each for each in ledger.items() if partition_for(each, partitions) == partition]
    state.usage = ledger.totals_accepted(generation, positions, ours)
    for line, month, parties in accruals.written(partition):
        # The newest row need not be the last that somebody told funding of: another's row of a later offset hides
        # an older one whose parties it never knew.
        state.written.setdefault(line, {})[month] = (None, drawing.get(line[0], frozenset()).union(parties))
    state.horizon = accruals.horizon(partition, generation, offset)
    if not positions:
        # A new life of the log: what the last one left is rated anew, once.
        state.said_of_orders = dict.fromkeys(state.orders, _ALWAYS)
    return state


def _placed(changes: Iterable[ContractChange]) -> set[Service]:
    """Every line that was ever placed, also one that is retracted."""
    return {
        (line.item_id, line.ods_code)
        for change in changes
        if isinstance(change.body, OrderPlaced)
        for line in change.body.lines
    }


def _may_draw(changes: Iterable[ContractChange]) -> frozenset[str]:
    """Every ordering party for which an order may ever have wanted of an allocation."""
    parties: set[str] = set()
    draws = False
    for body in (change.body for change in changes):
        waterfalls: Iterable[Waterfall] = ()
        if isinstance(body, OrderPlaced):
            parties.add(body.header.ordering_party)
            waterfalls = {line.funding for line in body.lines}
        elif isinstance(body, PartyNovated):
            parties.add(body.ordering_party)
        elif isinstance(body, FundingChanged):
            waterfalls = [body.funding]
        draws = draws or any(step.take == "allocation" for steps in waterfalls for step in steps)
    return frozenset(parties) if draws else frozenset()


def _rate_again(months: Iterable[tuple[str, str, str, int]], state: State) -> None:
    """Reconciliation asks for rows to be written anew, whatever is remembered of them: (line, month)."""
    for number, item_id, ods_code, month in months:
        written = state.written.setdefault((number, item_id, ods_code), {})
        _, parties = written.get(month, (None, frozenset()))
        written[month] = (None, parties)
        state.said_of_orders[number] = _ALWAYS


def _month_after(now: datetime) -> int:
    return month_of(now.astimezone(LONDON).date().toordinal()) + 1


def _note(number: str, body: ContractBody, state: State) -> None:
    """Notes whose charges a change of an order can move, and from which month on."""
    if isinstance(body, (OrderPlaced, OrderTerminated, PartyNovated, Retracted)):
        state.said_of_orders[number] = _ALWAYS
        return
    since = month_of(body.first) if isinstance(body, (QuantityChanged, PriceAgreed, FundingChanged)) else _ALWAYS
    named = (number, body.item_id, body.ods_code)
    state.said_of_lines[named] = min(since, state.said_of_lines.get(named, since))


def touched(state: State, book: Book, horizon: int) -> Iterator[tuple[Order, str, list[Line], list[int]]]:
    """What has to be rated again: an order's lines for an item, and the months."""
    months_of: dict[Line, set[int]] = {}

    def touch(lines: Iterable[Line], since: int, until: int) -> None:
        for line in lines:
            starts = list(state.written.get(line.key, ()))
            # Where there are rows from `since` on, as nearly always, it does not matter when the line began.
            if (not starts or min(starts) > since) and (live := first_month(line, book)) is not None:
                starts.append(live)
            if starts:
                months_of.setdefault(line, set()).update(range(max(since, min(starts)), min(until, horizon) + 1))

    for number, since in state.said_of_orders.items():
        # Another order's line may take the usage now, also that of a line that is gone.
        for service in _placed(state.contracts.get(number, {}).values()):
            touch(book.by_service.get(service, ()), since, horizon)
    for (number, item_id, ods_code), since in state.said_of_lines.items():
        for line in book.orders[number].named(item_id, ods_code) if number in book.orders else ():
            touch(book.by_service[item_id, line.ods_code], since, horizon)
    for code, since in state.said_of_codes.items():
        touch(book.by_code.get(code, ()), since, horizon)
    for code, as_of in state.list_sizes:
        until = book.reference.of(code).list_sizes.next_after(as_of) - 1
        lines = [line for line in book.by_code.get(code, ()) if line.follows_list_size]
        touch(lines, month_of(as_of), month_of(until))
    for service, months in state.used.items():
        for month in months:
            touch(book.by_service.get(service, ()), month, month)
    if state.horizon and horizon > state.horizon:
        for order in book.orders.values():
            touch(order.lines.values(), state.horizon + 1, horizon)

    by_item: dict[OrderItem, list[Line]] = {}
    for line in months_of:
        by_item.setdefault((line.order.number, line.item_id), []).append(line)
    for (number, item_id), lines in by_item.items():
        order = book.orders[number]
        if rated_together(order, item_id):
            every = set().union(*(months_of[line] for line in lines))
            yield order, item_id, order.by_item[item_id], sorted(every)
            continue
        alike: dict[frozenset[int], list[Line]] = {}
        for line in lines:
            alike.setdefault(frozenset(months_of[line]), []).append(line)
        for same, each in alike.items():
            yield order, item_id, each, sorted(same)


def accrual_row(line: Line, month: int, charge: MonthCharge, book: Book) -> AccrualRow:
    """The row that says what has accrued for a line in a month."""
    split = groups(line, month, charge, book)
    wanted: dict[str, Exact] = {}
    for group in split:
        if group.wanted:
            wanted[group.party] = wanted.get(group.party, 0) + group.wanted
    day = date.fromordinal
    return AccrualRow(
        line=line.key,
        month=month,
        supplier_id=line.order.header.supplier_id,
        m2=day(line.m2) if line.m2 is not None else None,
        one_off=line.is_one_off,
        exact=pence(charge_of(split)),
        quantity_micros=charge.quantity_micros,
        time=tuple([(day(first), day(end), pence(each)) for first, end, each in charge.time]),
        days=tuple([(day(each), pence(exact)) for each, exact in sorted(charge.days.items())]),
        groups=_JSON.encode([group_json(group.in_pence()) for group in split]),
        wanted=tuple([(party, pence(exact)) for party, exact in sorted(wanted.items())]),
    )


def _nothing(key: LineKey, month: int, parties: Iterable[str]) -> AccrualRow:
    """The row of a line that is gone.  It names what it wanted of, as zero: after a crash it is said again."""
    wanted = tuple((party, Fraction(0)) for party in sorted(parties))
    return AccrualRow(key, month, "", None, False, Fraction(0), 0, (), (), "[]", wanted)
