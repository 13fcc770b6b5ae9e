"""What a close explains: the cause of each adjustment, and the evidence of each document.

The close derives from what was known at its cut; causes compare that with the previous cut, so
both are made here from one reading of the ledger's changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from agents.context import Context
from rating.book import Book, Order, Reference, Service
from rating.causes import Cause, Causes
from rating.close import Amounts, ChargeKey
from rating.documents import Document
from rating.evidence import Evidence, Known, Readings, Said
from rating.records import read_contract_change, read_reference_change
from sinks.documents import Cut, Documents
from sinks.evidence import EvidenceStore, evidence_text
from sinks.ledger import SaidChange
from sinks.positions import Positions, place_text
from streams.topics import CONTRACT_CHANGES, REFERENCE_CHANGES

Usage = Mapping[Service, Mapping[int, int]]


class Changes:
    """The accepted changes of the ledger at positions, and the books that they make there and earlier."""

    def __init__(self, context: Context, generation: int, positions: Positions) -> None:
        self._contract, self._reference = (
            [change for change in context.ledger.changes(topic, generation, positions) if change.accepted]
            for topic in (CONTRACT_CHANGES, REFERENCE_CHANGES)
        )

    def known(self, usage: Usage) -> Known:
        """What was known at the positions, with the usage of then."""
        contract, reference = _by_key(self._contract), _by_key(self._reference)
        orders = [_order(number, changes) for number, changes in contract.items()]
        return Known(Book(orders, _folded(self._reference), usage), contract, reference, {})

    def known_earlier(self, cut: Cut, usage: Usage, now: Known) -> Known:
        """What was known at an earlier cut; orders of which nothing was said since are the same ones."""
        before = [change for change in self._contract if _counts(CONTRACT_CHANGES, change, cut)]
        said = [change for change in self._reference if _counts(REFERENCE_CHANGES, change, cut)]
        contract, reference = _by_key(before), _by_key(said)
        orders = [
            now.book.orders[number]
            if number in now.book.orders and len(changes) == len(now.contract[number])
            else _order(number, changes)
            for number, changes in contract.items()
        ]
        return Known(Book(orders, _folded(said), usage), contract, reference, {})


@dataclass(frozen=True, slots=True)
class Explained:
    """Why and from what the documents of a close are: found, not yet kept."""

    causes: Mapping[ChargeKey, Cause]
    #: The document that first invoiced a key.
    originals: Mapping[ChargeKey, str]
    evidence: Evidence

    def evidence_of(self, documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
        """The evidence of each document, number and JSON, one at a time; the document then names it."""
        for document in documents:
            body = evidence_text(self.evidence.of(document))
            document.evidence_sha256 = hashlib.sha256(body.encode()).hexdigest()
            yield document.number, body


class Explaining:
    """Explains the documents of one close after the other."""

    def __init__(self, context: Context) -> None:
        self._ledger = context.ledger
        self._documents = Documents(context.clickhouse)
        self._store = EvidenceStore(context.clickhouse)

    def explain(
        self,
        period: int,
        cut: Cut,
        changes: Changes,
        known: Known,
        invoiced: Amounts,
        documents: Sequence[Document],
    ) -> Explained:
        """Finds causes and evidence, and names the causes in the documents.

        Repeated it finds the same: all of it follows from the cut and the cut before.
        """
        adjusted = [key for document in documents for key in document.rows if key.month != period]
        causes = self._causes(period, changes, known, adjusted)
        first = self._store.originals(period, {key.month for key in adjusted}) if adjusted else {}
        originals: dict[ChargeKey, str] = {}
        for document in documents:
            # What is in the series corrects no pro-forma, which was no VAT document.
            in_series = document.kind != "pro-forma"
            for key in document.rows:
                if key in causes:
                    found = "" if causes[key].is_release or key not in first else first[key][in_series]
                    originals[key] = found
                    document.explanations[key] = (causes[key].text, found)
        # Of items that are charged by use: the months that documents have rows of.
        keys = [key for document in documents for key in document.rows]
        items = _metered(known, keys)
        months = {period, *(key.month for key in keys if key.item_id in items)} if items else set()
        return Explained(causes, originals, Evidence(known, invoiced, self._digests(cut, items, months), months))

    def _causes(
        self, period: int, changes: Changes, known: Known, adjusted: Sequence[ChargeKey]
    ) -> dict[ChargeKey, Cause]:
        if not adjusted:
            return {}
        before = None
        cut = self._documents.cut(period - 1)
        if cut is not None:
            usage = self._ledger.totals_at_cut(cut.generation, cut.positions) if _metered(known, adjusted) else {}
            before = changes.known_earlier(cut, usage, known)
            before.wanted = self._store.wanted(period - 1)
        causes = Causes(before, known, period)
        return {key: causes.of(key) for key in adjusted}

    def _digests(self, cut: Cut, items: Collection[str], months: Collection[int]) -> dict[Service, dict[int, Readings]]:
        return self._store.digests(cut.generation, cut.positions, items, months) if months else {}


def _metered(known: Known, keys: Iterable[ChargeKey]) -> set[str]:
    """The items of the keys that an order of theirs has at an on-demand price."""
    orders = known.book.orders
    return {
        item_id
        for number, item_id in {(key.order_number, key.item_id) for key in keys}
        if number not in orders
        or any(price.is_on_demand for line in orders[number].by_item.get(item_id, ()) for price in line.price.values)
    }


def _counts(topic: str, change: SaidChange, cut: Cut) -> bool:
    """Whether a change lies before a cut, as `sinks.positions.at_cut` has it."""
    end = cut.positions.get(place_text(topic, change.partition), 0)
    return change.generation < cut.generation or (change.generation == cut.generation and change.offset < end)


def _by_key(changes: Iterable[SaidChange]) -> dict[str, list[Said]]:
    found: dict[str, list[Said]] = {}
    for change in changes:
        found.setdefault(change.key, []).append(change.body)
    return found


def _order(number: str, changes: Iterable[Said]) -> Order:
    return Order.fold(number, map(read_contract_change, changes))


def _folded(changes: Iterable[SaidChange]) -> Reference:
    return Reference.fold(read_reference_change(change.body) for change in changes)
