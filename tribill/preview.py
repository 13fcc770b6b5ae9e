"""`tribill close --preview`: the documents that a close now would give, without closing; nothing is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from agents.collector import collector_paused
from agents.context import Context
from agents.deriving import Deriving, Issue, attestation_deadline, has_ended
from agents.drift import drift_pence
from rating.amounts import micros, micros_text, pounds_text
from rating.calendar import month_start, month_text
from rating.close import ChargeKey
from rating.completeness import Completeness
from sinks.accruals import decimal
from sinks.documents import Cut, Documents
from sinks.evidence import EvidenceStore, sealed
from sinks.parties import PartyStore
from sinks.positions import place_text
from streams.settings import Settings
from streams.topics import STAGES, Broker, input_topics
from tribill.closing import Closed, CloseRefused


class Preview:
    """The papers of a period as they would be now; `sinks.papers.files` writes them like those of a close."""

    @collector_paused()
    def __init__(self, settings: Settings, period: int, say: Callable[[str], None]) -> None:
        """Derives them.  Raises CloseRefused for a period that is closed, OutOfBalance."""
        self._context = context = Context("preview", settings)
        self._period = period
        text, broker = month_text(period), Broker(settings)
        closed = Documents(context.clickhouse).closed()
        if closed and period <= closed[-1]:
            raise CloseRefused(
                f"{text} cannot be previewed: {month_text(closed[-1])} was closed last. "
                + (f"Its documents: tribill close {text} --out DIR" if period in closed else "")
            )
        ends = broker.end_offsets(input_topics(settings))
        #: What a close would wait for: records to do, by stage.
        self.lag = {
            stage: broker.behind(f"tribill-{stage}", broker.end_offsets(topics(settings)))
            for stage, topics in STAGES
            if stage != "period-close"
        }
        positions = {place_text(*place): end for place, end in ends.items()}
        imports = PartyStore(context.clickhouse).imports()
        now = datetime.now(UTC)
        self.cut = Cut(settings.log_generation, 2**62, positions, now, imports, settings.specimen)
        deriving = Deriving(context)
        say("the lines are being derived")
        self.derived = deriving.derive(period, self.cut)
        self._awaited = deriving.awaited(period)
        say("the documents are being made")
        self.issue: Issue = deriving.issue(self.derived, [], preview=True)
        self.drift = drift_pence(context, period, self.derived.derivation, self.cut)
        self._closed = closed

    # --- what it says ---

    @property
    def completeness(self) -> Mapping[str, Completeness]:
        """How complete each supplier's usage is."""
        return self.derived.completeness

    def summary(self) -> str:
        """One line, as a close prints it."""
        rows, causes = self.derived.rows, self.issue.explained.causes
        corrected = sum(abs(pence) for key, pence in rows.items() if key in causes and not causes[key].is_release)
        return Closed(
            month_text(self._period),
            len(self.issue.documents),
            sum(rows.values()),
            sum(self.derived.held.values()),
            f"{decimal(self.drift):.2f}" if self.drift else "0",
            corrected,
            sum(map(abs, rows.values())),
            self.derived.notice(),
            verb="preview",
        ).summary()

    def lines(self) -> Iterator[str]:
        """All of it for a person: the summary, each document, how complete usage is, what a close would meet."""
        yield self.summary()
        if self.issue.documents:
            yield ""
            yield f"{'payer':<14}{'supplier':<14}{'document':<14}{'net':>18}{'VAT':>18}{'gross':>18}"
        for each in self.issue.documents:
            amounts = (each.net_pence, each.vat_pence, each.net_pence + each.vat_pence)
            shown = "".join(f"{pounds_text(pence):>18}" for pence in amounts)
            yield f"{each.payer:<14}{each.supplier_id:<14}{each.kind:<14}{shown}"
        if self.completeness:
            yield ""
            yield f"{'supplier':<14}usage of {month_text(self._period)}"
            yield from (f"{code:<14}{each.text}" for code, each in self.completeness.items())
        yield ""
        findings = list(self.findings())
        yield from findings or ["a close now would not be refused and would wait for nothing"]

    def findings(self) -> Iterator[str]:
        """What a close now would be refused for, or wait for."""
        settings, text = self._context.settings, month_text(self._period)
        if self._closed and self._period != self._closed[-1] + 1:
            yield f"refused: {month_text(self._closed[-1] + 1)} is to be closed before {text}"
        if not has_ended(self._period):
            ended = f"{month_start(self._period + 1).isoformat()}; charges by time are of the whole month"
            if settings.close_any_period:
                yield f"not refused (close_any_period), and said on the control sheet: {text} ends {ended}"
            else:
                yield f"refused: {text} can be closed from {ended}"
        for stage, behind in self.lag.items():
            if behind:
                yield f"waits for {stage}: {behind} records to do, which the preview may lack"
        deadline = attestation_deadline(self._period, settings.attestation_days)
        if datetime.now(UTC) < deadline and settings.attestation_days and self._awaited:
            until = f"{deadline:%Y-%m-%d %H:%M} UTC"
            yield f"waits for attestations of {', '.join(self._awaited)} until {until} (--accept-attestations)"
        if settings.suspense_limit and self.derived.suspense_micros > micros(settings.suspense_limit):
            units, limit = micros_text(self.derived.suspense_micros), settings.suspense_limit
            yield f"refused: {units} units in suspense, more than {limit} (--accept-suspense)"
        if self.drift:
            found = f"the accruals differ from the ledger by {decimal(self.drift):.2f} pence"
            yield f"refused if it stays: {found} (--accept-drift)"

    # --- what files are written from ---

    def rows(self, period: int, kind: str) -> Mapping[ChargeKey, int]:
        """The rows that would be `invoiced`, or `held`."""
        return self.derived.rows if kind == "invoiced" else self.derived.held

    def numbers(self, period: int) -> list[str]:
        """The numbers of the documents."""
        return [each.number for each in self.issue.documents]

    def issued(self, period: int, numbers: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Some documents: number, JSON and evidence."""
        documents = {each.number: each for each in self.issue.documents}
        for number, evidence in self.issue.explained.evidence_of(documents[number] for number in numbers):
            yield number, json.dumps(sealed(documents[number].as_json())), evidence

    def statements(self, period: int) -> list[str]:
        """The JSON of the statements."""
        return [json.dumps(each.body) for each in self.issue.statements]

    def readings(self, period: int, items: Iterable[str], months: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The readings of some items and months, as interchange values."""
        store = EvidenceStore(self._context.clickhouse)
        return store.readings(self.cut.generation, self.cut.positions, items, months)
