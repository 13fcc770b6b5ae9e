"""`tribill demo`: a month of GP IT services of the past in fast motion, from order to invoice.

Real practices, list sizes, systems and prices (`tribill.data`); the events are made on the fly from
a seed.  January 2021 is streamed and closed, then what came late, then February is closed.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from rating.amounts import pounds_text
from rating.calendar import parse_month
from sinks.clickhouse import ClickHouse
from sinks.documents import Documents
from sinks.parties import PartyStore
from streams.codec import Codec
from streams.producer import Outbox
from streams.settings import Settings
from streams.topics import USAGE
from tribill import data
from tribill.closing import close_and_wait
from tribill.installation import Installation
from tribill.interchange import Publisher
from tribill.up import Stopped, installation, stopping_by_signal, watch

MONTH, NEXT = "2021-01", "2021-02"
FIRST_DAY, DAYS = date(2021, 1, 1), 31
EMIS, TPP, ACCURX, ADVANCED = "10000", "10052", "10030", "10046"
FOUNDATION = {EMIS: "10000-001", TPP: "10052-002"}
SMS, DOCMAN = "10030-S-001", "10046-001"
TRAINING = {EMIS: "10000-S-003", TPP: "10052-S-001"}
#: Of a hundred practices so many have the add-on, go live within the month, cease within it.
DOCMAN_PERCENT, GO_LIVE_PERCENT = 45, 5
#: Of a thousand usage events so many are sent twice, come after the close, or are garbage.
DOUBLED, LATE, GARBAGE = 10, 15, 1
_CENTRAL = [{"payer": "NHSE", "take": "allocation"}, {"payer": "@ordering_party", "take": "rest"}]
_LOCAL = [{"payer": "@ordering_party", "take": "rest"}]
_SAID = "2020-12-01T09:00:00Z"


@dataclass(frozen=True, slots=True)
class Site:
    """A practice with what it runs."""

    ods_code: str
    party: str
    supplier_id: str
    patients: int
    go_live: date
    docman: bool
    has_sms: bool


class Book:
    """The orders and events of the demonstration, from a seed."""

    def __init__(self, practices: int, events: int, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  # made-up events, not secrets
        self._events = events
        self._prices = {each.item_id: each for each in reversed(data.catalogue())}
        sizes: dict[str, dict[date, int]] = {}
        for size in data.list_sizes():
            sizes.setdefault(size.ods_code, {})[size.as_of] = size.patients
        self.sizes = sizes
        systems = {each.ods_code: each.supplier_id for each in data.practice_systems()}
        known = [
            each
            for each in data.practices()
            if each.ods_code in systems and each.ods_code in sizes and each.sub_icb_code
        ]
        known = known if practices >= len(known) else self._random.sample(known, practices)
        self.practices = sorted(known, key=lambda each: (each.sub_icb_code, each.ods_code))
        self.sites = [self._site(each, systems[each.ods_code]) for each in self.practices]
        self.merged = self.sites[0], self.sites[1]
        self.ceased = self.sites[2:200:9]

    def _site(self, practice: data.Practice, supplier_id: str) -> Site:
        chance = self._random.randrange
        early = chance(100) >= GO_LIVE_PERCENT
        return Site(
            ods_code=practice.ods_code,
            party=practice.sub_icb_code,
            supplier_id=supplier_id,
            patients=max(self.sizes[practice.ods_code].values()),
            go_live=FIRST_DAY if early else FIRST_DAY + timedelta(days=1 + chance(27)),
            docman=chance(100) < DOCMAN_PERCENT,
            has_sms=chance(100) > 0,
        )

    # --- what is known and ordered before the month ---

    def reference(self) -> Iterator[Any]:
        """Memberships, the list sizes of 2018, 1.61 pounds a head, and a few smaller allocations."""
        for each in self.practices:
            code = each.ods_code
            parent = {"ods_code": code, "kind": "commissioner", "parent": each.sub_icb_code, "from": "2020-04-01"}
            yield _reference(f"commissioner-{code}", code, "Membership", parent)
            if (patients := self.sizes[code].get(date(2018, 11, 1))) is not None:
                said = {"ods_code": code, "as_of": "2018-11-01", "patients": patients}
                yield _reference(f"list-{code}-2018", code, "ListSize", said)
        national = {"financial_year": 2020, "per_patient": "1.61", "as_of": "2020-04-01"}
        yield _reference("allocation-2020", "ENGLAND", "Allocation", national)
        # So that the month shows one running dry: three parties have little left of their year.
        heads: dict[str, int] = {}
        for site in self.sites:
            heads[site.party] = heads.get(site.party, 0) + site.patients
        for party in sorted(heads)[:3]:
            amount = {"ordering_party": party, "financial_year": 2020, "amount": pounds_text(heads[party] * 8)}
            yield _reference("allocation-2020", party, "Allocation", amount)

    def published_list_sizes(self) -> Iterator[Any]:
        """The snapshot of 1 January, published in the middle of the month."""
        for site in self.sites:
            if (patients := self.sizes[site.ods_code].get(date(2021, 1, 1))) is not None:
                said = {"ods_code": site.ods_code, "as_of": "2021-01-01", "patients": patients}
                yield _reference(f"list-{site.ods_code}-2021", site.ods_code, "ListSize", said)

    def contracts(self) -> Iterator[Any]:
        """Call-off orders by ordering party and supplier, then the milestones of their lines."""
        orders: dict[tuple[str, str], list[tuple[str, Site]]] = {}
        for site in self.sites:
            add = orders.setdefault
            add((site.party, site.supplier_id), []).append((FOUNDATION[site.supplier_id], site))
            if site.docman:
                add((site.party, ADVANCED), []).append((DOCMAN, site))
            if site.has_sms:
                add((site.party, ACCURX), []).append((SMS, site))
            if site.go_live > FIRST_DAY:
                add((site.party, site.supplier_id), []).append((TRAINING[site.supplier_id], site))
        self.orders: dict[tuple[str, str], str] = {}
        for number, ((party, supplier), lines) in enumerate(orders.items(), start=1):
            order = f"C{number:06d}"
            for item, site in lines:
                self.orders[item, site.ods_code] = order
            yield self._order(order, party, supplier, lines)
            for item, site in lines:
                day = site.go_live if item in FOUNDATION.values() or item in TRAINING.values() else FIRST_DAY
                yield self._milestone(order, item, site, "M1", day)
                if self._random.randrange(100) < 97:
                    yield self._milestone(order, item, site, "M2", day + timedelta(days=2))

    def endings(self) -> Iterator[Any]:
        """Cessations, and a merger of two practices."""
        for site in self.ceased:
            item = FOUNDATION[site.supplier_id]
            body = {"item_id": item, "ods_code": site.ods_code, "date": "2021-01-20"}
            yield _contract(f"cease-{item}-{site.ods_code}", self.orders[item, site.ods_code], "LineCeased", body)
        gone, into = self.merged
        merger = {"ods_code": gone.ods_code, "into": into.ods_code, "date": "2021-01-18"}
        yield _reference(f"merger-{gone.ods_code}", gone.ods_code, "PracticeMerged", merger)

    def _order(self, order: str, party: str, supplier: str, lines: list[tuple[str, Site]]) -> Any:
        body = {
            "order_id": f"{order}-01",
            "ordering_party": party,
            "supplier_id": supplier,
            "framework": "GPITF",
            "commencement": "2021-01-01",
            "term_months": 36,
            "vat_rate": "0.2",
            "lines": [
                {
                    "item_id": item,
                    "ods_code": site.ods_code,
                    "quantity": str(site.patients if self._prices[item].provisioning == "patient" else 1),
                    "price": self._price(item),
                    "funding": _LOCAL if item == DOCMAN else _CENTRAL,
                }
                for item, site in lines
            ],
        }
        return _contract(f"order-{order}-01", order, "OrderPlaced", body)

    def _price(self, item: str) -> dict[str, Any]:
        listed = self._prices[item]
        unit = {"year": "year", "month": "month"}.get(listed.time_unit, "none")
        return {
            "type": "flat",
            "provisioning": listed.provisioning,
            "unit": listed.unit,
            "time_unit": unit,
            "day_count": "month",
            "tiers": [{"from": "1", "price": str(listed.price)}],
        }

    def _milestone(self, order: str, item: str, site: Site, milestone: str, day: date) -> Any:
        body = {"item_id": item, "ods_code": site.ods_code, "milestone": milestone, "date": day.isoformat()}
        return _contract(f"{milestone}-{item}-{site.ods_code}", order, "MilestoneReached", body)

    def item_names(self) -> list[dict[str, Any]]:
        """What the items are called, as rows of party data; the parties themselves are invented."""
        names = {each.item_id: each.item_name for each in data.catalogue()}
        return [{"item": {"item_id": item, "name": name}} for item, name in sorted(names.items()) if name.isprintable()]

    # --- the month ---

    def usage(self, day: int) -> Iterator[tuple[dict[str, Any], bool]]:
        """The SMS of a day as Avro values, each with whether it comes late."""
        count = self._events // DAYS + (1 if day < self._events % DAYS else 0)
        midnight = datetime(2021, 1, 1, tzinfo=UTC) + timedelta(days=day)
        weights = [site.patients for site in self.sites]
        chosen = self._random.choices(self.sites, weights, k=count)
        chance = self._random.random
        for number, site in enumerate(chosen):
            value = {
                "id": f"sms-{day + 1:02d}-{number}",
                "revision": 0,
                "supplier_id": ACCURX,
                "ods_code": site.ods_code,
                "item_id": SMS,
                "quantity": Decimal(1 + int(chance() * 4)),
                "occurred_at": midnight + timedelta(seconds=int(chance() * 86_400)),
            }
            yield value, chance() * 1000 < LATE

    def garbage(self, number: int, codec: Codec) -> bytes:
        """What a broken supplier sends: noise, NaN, another supplier's item, the year 2200, a negative."""
        reading = {
            "id": f"bad-{number}",
            "revision": 0,
            "supplier_id": ACCURX,
            "ods_code": "A81001",
            "item_id": SMS,
            "quantity": Decimal(1),
            "occurred_at": datetime(2021, 1, 5, 10, tzinfo=UTC),
        }
        match number % 5:
            case 0:
                return self._random.randbytes(40)
            case 1:
                return json.dumps(reading | {"quantity": "NaN", "occurred_at": "2021-01-05T10:00:00Z"}).encode()
            case 2:
                reading["item_id"] = FOUNDATION[EMIS]
            case 3:
                reading["occurred_at"] = datetime(2200, 1, 1, tzinfo=UTC)
            case _:
                reading["quantity"] = Decimal(-1)
        return codec.encode("Usage", reading)


class Demonstration:
    """One run over a started installation."""

    def __init__(self, held: Installation, book: Book, out: Path | None, say: Callable[[str], None]) -> None:
        self._held = held
        self._book = book
        self._out = out
        self._say = say
        self._publisher = Publisher(held.settings)
        self._outbox = Outbox(held.settings)
        self._codec = Codec(held.settings)
        self._clickhouse = ClickHouse(held.settings)
        self._late: list[tuple[str, bytes]] = []
        self._events = 0
        self._sent = 0

    def run(self) -> None:
        """Orders, the month, its close, what came late, the next close."""
        self._order()
        self._stream()
        self._finish(f"all {self._sent:,} usage records of {MONTH} are sent; the agents finish them")
        self._close(MONTH)
        self._print_bill()
        self._say(f"\n{len(self._late):,} events of January arrive after its close ...")
        for code, value in self._late:
            self._outbox.send(USAGE, value, key=code)
        self._outbox.flush()
        self._finish("the late events are being rated")
        self._close(NEXT)
        self._print_adjustments()

    def _order(self) -> None:
        book, count = self._book, 0
        PartyStore(self._clickhouse).insert(book.item_names(), datetime.now(UTC))
        for values in (book.reference(), book.contracts()):
            for topic, value in values:
                self._publisher.send_record(topic, value)
                count += 1
        self._publisher.flush()
        self._finish(f"{count:,} reference and contract changes are sent; the agents read them")
        parties = len({site.party for site in book.sites})
        orders = len(set(book.orders.values()))
        self._say(
            f"{len(book.sites):,} practices under {parties} ordering parties, {orders} call-off orders with "
            f"{len(book.orders):,} charge lines"
        )

    def _stream(self) -> None:
        say_at = time.monotonic()
        for day in range(DAYS):
            for value, late in self._book.usage(day):
                self._send_usage(value, late)
                if time.monotonic() > say_at:
                    say_at = time.monotonic() + 2
                    self._tick(day)
            if day == 13:
                before = self._accrued(day)
                count = 0
                for topic, value in self._book.published_list_sizes():
                    self._publisher.send_record(topic, value)
                    count += 1
                self._publisher.flush()
                self._finish(f"14 January: {count:,} list sizes of 1 January are published, a fortnight late")
                self._say(f"  accrued up to today: {pounds_text(before)} -> {pounds_text(self._accrued(day))}")
            if day == 17:
                for topic, value in self._book.endings():
                    self._publisher.send_record(topic, value)
                self._publisher.flush()
                self._say("18 January: two practices merge, some lines cease")
        self._outbox.flush()

    def _send_usage(self, value: dict[str, Any], late: bool) -> None:
        encoded = self._codec.encode("Usage", value)
        code = value["ods_code"]
        if late:
            self._late.append((code, encoded))
            return
        self._events += 1
        copies = 2 if self._events % (1000 // DOUBLED) == 0 else 1
        for _ in range(copies):
            self._outbox.send(USAGE, encoded, key=code)
        self._sent += copies
        if self._events % (1000 // GARBAGE) == 0:
            self._outbox.send(USAGE, self._book.garbage(self._events // 1000, self._codec), key=code)
            self._sent += 1

    def _tick(self, day: int) -> None:
        (rows,) = self._clickhouse.query("SELECT count() FROM usage")[0]
        self._say(
            f"{date.fromordinal(FIRST_DAY.toordinal() + day)}  sent {self._sent:>9,}  in the ledger {rows:>9,}  "
            f"accrued {pounds_text(self._accrued(day)):>13}"
        )
        watch(self._held, self._say)

    def _accrued(self, day: int) -> int:
        """The national accrual at the end of a day of the month, in whole pence, for showing."""
        rows = self._clickhouse.query(
            """
            SELECT toInt256(sum(
                arraySum(
                    (first, until, each) -> each * greatest(0, dateDiff('day', first, least(until, {after:Date32}))),
                    time_from, time_to, time_day_pence)
                + arraySum((day, pence) -> if(day < {after:Date32}, pence, toDecimal256(0, 18)), days, days_pence)))
            FROM accruals FINAL WHERE month = {month:Int32}
            """,
            {"month": parse_month(MONTH), "after": FIRST_DAY + timedelta(days=day + 1)},
        )
        return int(rows[0][0] or 0)

    def _finish(self, what: str) -> None:
        self._say(what)
        if not self._held.drain(300, lambda text: self._say(f"  {text}")):
            raise TimeoutError("the agents did not finish in 300 s")

    def _close(self, period: str) -> None:
        started = time.monotonic()
        closed = close_and_wait(self._held.settings, period, lambda text: self._say(f"  {text}"))
        self._say(f"{closed.summary()}  ({time.monotonic() - started:.1f} s)")
        if self._out is not None:
            from sinks.papers.files import write_files

            write_files(Documents(self._clickhouse), parse_month(period), self._out)
            self._say(f"  its documents are in {self._out / period}")

    # --- what it came to ---

    def _print_bill(self) -> None:
        names = {each.supplier_id: each.name for each in data.suppliers()}
        self._table(f"\nThe bill of {MONTH} by supplier (pounds, excluding VAT)", "supplier_id", MONTH, names)
        self._table(f"\nThe bill of {MONTH} by payer, the ten largest", "payer", MONTH, {"NHSE": "national fund"})
        kinds = self._clickhouse.query(
            "SELECT toString(kind), count(), sum(net_pence), sum(vat_pence) FROM documents FINAL"
            " WHERE period = {period:String} GROUP BY kind ORDER BY kind",
            {"period": MONTH},
        )
        for kind, count, net, vat in kinds:
            self._say(f"  {count:,} documents ({kind}): net {pounds_text(net)}, VAT {pounds_text(vat)}")
        drawn = self._clickhouse.query(
            "SELECT countIf(coverage_decimal < 1), count() FROM allocations_drawn FINAL WHERE month = {month:Int32}",
            {"month": parse_month(MONTH)},
        )[0]
        self._say(f"  allocations run dry: {drawn[0]} of {drawn[1]} ordering parties")
        waiting = self._clickhouse.query(
            """
            SELECT count(), sum(used - counted) FROM (
                SELECT item_id, ods_code, sum(quantity_micros) AS used, any(counted) AS counted
                FROM (SELECT ods_code, argMin(toString(item_id), offset) AS item_id,
                             argMin(quantity_micros, offset) AS quantity_micros
                      FROM usage GROUP BY ods_code, supplier_id, id) AS used
                LEFT JOIN (SELECT toString(item_id) AS item_id, ods_code, sum(quantity) AS counted
                           FROM (SELECT item_id, ods_code, month, argMax(quantity_micros, version) AS quantity
                                 FROM accruals GROUP BY order_number, item_id, ods_code, month)
                           GROUP BY item_id, ods_code) AS taken
                USING (item_id, ods_code) GROUP BY item_id, ods_code)
            WHERE used > counted
            """
        )[0]
        self._say(
            f"  in suspense: {(waiting[1] or 0) // 1_000_000:,} SMS at {waiting[0]} practices that no order covers"
        )
        reasons = self._clickhouse.query(
            "SELECT toString(agent), if(field = '', '', concat(field, ' ')) AS f, any(reason), count()"
            " FROM dead_letters FINAL GROUP BY agent, f, substring(reason, 1, 12) ORDER BY count() DESC LIMIT 8"
        )
        self._say(f"  dead letters: {sum(row[3] for row in reasons):,}")
        for agent, field, reason, count in reasons:
            self._say(f"    {count:>6,}  {agent}: {field}{reason[:90]}")

    def _table(self, title: str, column: str, period: str, names: dict[str, str]) -> None:
        self._say(title)
        assert column in ("supplier_id", "payer")
        rows = self._clickhouse.query(
            f"SELECT toString({column}), sum(pence) AS net, uniqExact(ods_code) FROM document_rows FINAL"  # noqa: S608
            " WHERE period = {period:String} AND kind = 'invoiced' GROUP BY 1 ORDER BY net DESC LIMIT 10",
            {"period": period},
        )
        for code, net, practices in rows:
            self._say(f"  {code:<6} {names.get(code, '')[:40]:<40} {pounds_text(net):>16}  {practices:>6,} practices")

    def _print_adjustments(self) -> None:
        row = self._clickhouse.query(
            "SELECT count(), sum(pence), sum(abs(pence)) FROM document_rows FINAL"
            " WHERE period = {period:String} AND kind = 'invoiced' AND month < {month:Int32}",
            {"period": NEXT, "month": parse_month(NEXT)},
        )[0]
        self._say(f"  of these {row[0]:,} rows are adjustments of January: {pounds_text(row[1])}")


def demo(
    directory: Path, practices: int, events: int, seed: int, out: Path | None, stay: bool, say: Callable[[str], None]
) -> None:
    """Runs the demonstration; with `stay` the page stays up until Ctrl-C."""
    started = time.monotonic()
    settings = Settings.load(
        None,
        {},
        session_timeout_seconds=6,
        claim_window_days=20_000,
        supplier_topics=ACCURX,
        horizon_month="2021-03",
        replay_clock=True,
        specimen=True,
    )
    with ExitStack() as stack:
        try:
            stack.enter_context(stopping_by_signal())
            book = Book(practices, events, seed)
            held = stack.enter_context(installation(directory, settings, True, say))
            say(f"page           http://127.0.0.1:{held.settings.web_port}/?month={MONTH}")
            Demonstration(held, book, out, say).run()
            say(f"\ndone in {time.monotonic() - started:.0f} s")
            if stay:
                say(f"the page stays at http://127.0.0.1:{held.settings.web_port}/?month={MONTH}; Ctrl-C ends")
                while True:
                    watch(held, say)
                    time.sleep(1)
        except Stopped:
            say("stopping")


def _reference(change_id: str, code: str, kind: str, body: dict[str, Any]) -> tuple[str, Any]:
    return "reference-changes", {"id": change_id, "code": code, "recorded_at": _SAID, "change": {kind: body}}


def _contract(change_id: str, order: str, kind: str, body: dict[str, Any]) -> tuple[str, Any]:
    return "contract-changes", {"id": change_id, "order_number": order, "recorded_at": _SAID, "change": {kind: body}}
