"""What a close issues, derived from the ledger as of its cut: the same for the close, its repetition and its preview.

Nothing here is written anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from agents.context import Context
from agents.explaining import Changes, Explained, Explaining
from rating.amounts import micros_text
from rating.book import Book, Service
from rating.calendar import month_start
from rating.close import Amounts, ChargeKey, Derivation, derive, invoice
from rating.completeness import Completeness, Reported, completeness
from rating.documents import Document, documents
from rating.evidence import Known
from rating.statements import Papers, Statement
from sinks.documents import Cut, Documents
from sinks.parties import PartyStore

Rows = Mapping[ChargeKey, int]


@dataclass(frozen=True, slots=True)
class Derived:
    """What follows from the ledger as of a cut: rows in pence by charge key, before any document."""

    period: int
    cut: Cut
    changes: Changes
    known: Known
    derivation: Derivation
    invoiced: Amounts
    rows: Rows
    held: Rows
    completeness: Mapping[str, Completeness]
    #: Suspense and overlaps, as `Book.untaken`.
    untaken: tuple[Mapping[Service, int], Mapping[Service, list[str]]]

    @property
    def book(self) -> Book:
        """What was known at the cut."""
        return self.known.book

    @property
    def suspense_micros(self) -> int:
        """The usage that no line takes."""
        return sum(self.untaken[0].values())

    def notice(self) -> str:
        """What somebody should look at: suspense, overlapping orders, usage that is not what was attested."""
        suspense, overlaps = self.untaken
        said = []
        if suspense:
            quantity = micros_text(sum(suspense.values()))
            said.append(f"usage of {quantity} units of {len(suspense)} items at practices waits in suspense")
        for (item_id, ods_code), orders in sorted(overlaps.items())[:10]:
            said.append(f"usage of {item_id} at {ods_code} is covered by {', '.join(orders)}: {orders[0]} takes it")
        attested = {code: each for code, each in self.completeness.items() if each.attested}
        said += [f"usage of {code} is {each.text}" for code, each in attested.items() if each.status != "complete"]
        # Where some attest, those who do not are worth a word.
        silent = [code for code in self.completeness if code not in attested]
        if attested and silent:
            said.append(f"no attestation of {', '.join(silent[:10])}{' and others' if len(silent) > 10 else ''}")
        return "; ".join(said)


def has_ended(period: int) -> bool:
    """Whether the period is over, by the clock of this machine."""
    return datetime.now(UTC) >= month_start(period + 1)


def attestation_deadline(period: int, days: int) -> datetime:
    """Until when a close waits for attestations: so many days after the period."""
    return month_start(period + 1) + timedelta(days=days)


@dataclass(frozen=True, slots=True)
class Issue:
    """The papers of a close: documents with their causes, the other papers, and from what they are."""

    documents: Sequence[Document]
    statements: Sequence[Statement]
    explained: Explained


class Deriving:
    """Derives one close after the other."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._documents = Documents(context.clickhouse)
        self._explaining = Explaining(context)
        self._parties = PartyStore(context.clickhouse)

    def awaited(self, period: int) -> dict[str, Completeness]:
        """Whose attestations a close would wait for, as the ledger is now.

        Awaited is each supplier that has reported or attested usage of the period or the one before, until it
        has attested the period and the ledger has as much.
        """
        months = (period - 1, period)
        attested = self._documents.attested(months, self._context.settings.log_generation, 2**62)
        reported = self._context.ledger.reported(months)
        known = {code for month in months for code in (*attested[month], *reported[month])}
        found = completeness(attested[period], dict.fromkeys(known, Reported()) | reported[period])
        return {code: each for code, each in found.items() if each.status in ("none", "short")}

    def derive(self, period: int, cut: Cut) -> Derived:
        """All lines from the first day on, less what was invoiced before."""
        ledger = self._context.ledger
        with ThreadPoolExecutor(1) as aside:  # ClickHouse answers while this thread computes
            usage = aside.submit(ledger.totals_at_cut, cut.generation, cut.positions)
            before = aside.submit(self._documents.invoiced_before, period)
            changes = Changes(self._context, cut.generation, cut.positions)
            known = changes.known(usage.result())
            derivation = derive(known.book, period)
            invoiced = before.result()
        known.wanted = derivation.wanted
        rows, held = invoice(derivation, invoiced, period)
        # What is not in `rows` was invoiced before, and may be a million amounts.
        derivation.payable.clear()
        derivation.held.clear()
        attested = self._documents.attested([period], cut.generation, cut.offset)[period]
        found = ledger.reported_at_cut(cut.generation, cut.positions, period)
        complete = completeness(attested, found, known.book, period)
        untaken = known.book.untaken()
        return Derived(period, cut, changes, known, derivation, invoiced, rows, held, complete, untaken)

    def issue(self, derived: Derived, accepted: Sequence[str], *, preview: bool = False) -> Issue:
        """The papers of what was derived; of a preview without numbers.  Raises OutOfBalance."""
        period, cut, book = derived.period, derived.cut, derived.book
        parties = self._parties.parties(cut.party_imports, cut.specimen)
        months = {key.month for key in derived.rows} - {period}
        issued = documents(
            derived.rows,
            period,
            book,
            {} if preview else self._documents.issued_before(period),
            self._documents.vat_rates_before(period, months) if months else {},
            parties,
            cut.issued_at,
            preview=preview,
        )
        explained = self._explaining.explain(period, cut, derived.changes, derived.known, derived.invoiced, issued)
        papers = Papers(
            period,
            book,
            derived.rows,
            derived.held,
            derived.derivation.wanted,
            issued,
            parties,
            cut.issued_at,
            derived.completeness,
            accepted,
            preview=preview,
        )
        return Issue(issued, papers.statements(), explained)
