"""Commands for whoever runs an installation: dead letters, suspense, and what is wrong with the whole."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rating.amounts import micros_text
from tribill.command import Failure, caller, load_settings, printable, require, say

if TYPE_CHECKING:
    from sinks.dead_letters import KeptLetter, LetterBox, LetterFilter, LetterId
    from sinks.replay import Fate
    from streams.settings import Settings

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_SHOWN_BYTES = 4_096


class _Since(click.ParamType):
    """An instant, or a time before now like 24h or 7d."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The instant in UTC."""
        if isinstance(value, datetime):
            return value
        if found := re.fullmatch(r"(\d{1,5})([mhd])", value):
            unit = {"m": "minutes", "h": "hours", "d": "days"}[found[2]]
            return datetime.now(UTC) - timedelta(**{unit: int(found[1])})
        try:
            at = datetime.fromisoformat(value)
            return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is neither an instant such as 2026-04-03T10:00:00Z nor an age such as 24h or 7d")


def _filters(command: _Command) -> _Command:
    """The options that choose dead letters."""
    for option in (
        click.option("--since", type=_Since(), metavar="WHEN", help="Refused since 2026-04-03T10:00:00Z, or 24h, 7d."),
        click.option("--reason", default="", metavar="TEXT", help="The field or reason has this in it."),
        click.option("--topic", default="", help="Came from this topic."),
        click.option("--agent", default="", help="Refused by: intake, usage, contracts, reference, period-close."),
    ):
        command = option(command)
    return command


@click.group("dead-letters")
def dead_letters() -> None:
    """See what was refused and why, and send it again once the cause is mended.

    \b
      tribill dead-letters list --since 24h
      tribill dead-letters show intake/1/usage/0/17/0
      tribill dead-letters replay intake/1/usage/0/17/0

    \b
    To correct a record, edit what was said and send that in its place:
      tribill dead-letters show --value ID > mended.json
      tribill dead-letters replay ID --edit mended.json
    """


@dead_letters.command("list")
@_filters
@click.option("--waiting", is_flag=True, help="Leave out what was sent again already.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000), help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def list_letters(context: click.Context, /, waiting: bool, limit: int, as_json: bool, **chosen: Any) -> None:
    """List dead letters, the newest first: when, which, and why."""
    box, _ = _open(context)
    wanted = _wanted(waiting=waiting, **chosen)
    letters = _ask(lambda: box.newest(wanted, limit))
    if as_json:
        for letter in letters:
            click.echo(json.dumps(_letter_json(letter)))
        return
    for letter in letters:
        click.echo(f"{letter.written_at:%Y-%m-%d %H:%M:%S}  {printable(str(letter.id))}")
        click.echo(f"    {_short(_why(letter))}")
        if letter.replayed_at:
            click.echo(f"    sent again {letter.replayed_at:%Y-%m-%d %H:%M:%S} by {printable(letter.replayed_by)}")
    count = _ask(lambda: box.count(wanted))
    say(f"{len(letters)} of {count} dead letters" if count else "no dead letters")


@dead_letters.command("show")
@click.argument("letter", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="As a JSON object, all bytes in hex.")
@click.option("--value", "as_value", is_flag=True, help="Only what was said, as JSON: to be edited and replayed.")
@click.pass_context
def show_letter(context: click.Context, letter: str, as_json: bool, as_value: bool) -> None:
    """Show one dead letter: reason, source and original bytes, and the record in them where it can be read."""
    from sinks.replay import pretty, said
    from streams.codec import Codec

    box, settings = _open(context)
    found = _find(box, _parsed_id(letter))
    value = said(Codec(settings), found.id.topic, found.value)
    if as_value:
        if value is None:
            raise Failure("its bytes are no record that can be read; show it without --value to see them")
        click.echo(pretty(value))
        return
    if as_json:
        more = {"key_hex": found.key.hex(), "value_hex": found.value.hex(), "value": value}
        click.echo(json.dumps(_letter_json(found) | more, indent=2))
        return
    click.echo(f"letter     {printable(str(found.id))}")
    click.echo(f"refused    {found.written_at:%Y-%m-%d %H:%M:%S} UTC by {printable(found.id.agent)}")
    click.echo(f"field      {printable(found.field) or '-'}")
    click.echo(f"reason     {printable(found.reason)}")
    click.echo(
        f"source     {printable(found.id.topic)}, partition {found.id.partition}, offset {found.id.offset}, "
        f"place {found.id.index} in its batch, log generation {found.id.generation}"
    )
    if found.replayed_at:
        click.echo(f"sent again {found.replayed_at:%Y-%m-%d %H:%M:%S} UTC by {printable(found.replayed_by)}")
    click.echo(f"key        {_hex(found.key)}")
    click.echo(f"bytes      {len(found.value)}\n{_hex_lines(found.value)}")
    if value is not None:
        click.echo(f"record\n{pretty(value)}")


@dead_letters.command("replay")
@click.argument("letters", nargs=-1, metavar="[ID]...")
@_filters
@click.option("--edit", type=_FILE, help="Send this record (JSON, as `show --value` prints it) in place of the one ID.")
@click.option("--again", is_flag=True, help="Send also what was sent again before, and refused again.")
@click.option("--by", default="", metavar="NAME", help="Who sends it again; you, on this machine, unless named.")
@click.option("--dry-run", is_flag=True, help="Only say what would become of each.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def replay(
    context: click.Context,
    /,
    letters: Sequence[str],
    edit: Path | None,
    again: bool,
    by: str,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Send dead letters again to the topics they came from: those named by ID, or all that the options choose.

    Doing it twice adds nothing: a reading has the same id and revision, and what was sent again, and
    refused again for the same reason, is not sent a third time without --again.  A refused contract or
    reference change keeps its id and stays refused; correct it under a new id with --edit.  Usage that
    contradicts what was said before needs a higher revision.

    The exit status is 1 when something was not sent; each line says why.
    """
    from rating.records import Refused
    from sinks.clickhouse import ClickHouse
    from sinks.replay import Replay

    ids = [_parsed_id(each) for each in letters]
    if bool(ids) == any(chosen.values()):
        raise click.UsageError("name dead letters by ID, or choose them with --agent, --topic, --reason, --since")
    if edit is not None and len(ids) != 1:
        raise click.UsageError("--edit mends one dead letter: name its ID")
    box, settings = _open(context)
    require(settings, "kafka")
    edited = _edited(edit) if edit else None
    chosen_ids = ids or [each.id for each in _ask(lambda: box.newest(_wanted(waiting=not again, **chosen), 100_000))]
    found: Iterator[KeptLetter] = (_find(box, each) for each in chosen_ids)
    replayer = Replay(settings, ClickHouse(settings))
    sent = kept = 0
    try:
        fates: Iterator[Fate]
        if dry_run:
            fates = (replayer.fate(each, edited, again=again) for each in found)
        else:
            fates = replayer.send(found, _name(by), edited, again=again)
        for fate in _asked(fates):
            sent, kept = sent + fate.sent, kept + (not fate.sent)
            if as_json:
                click.echo(json.dumps({"letter": str(fate.id), "sent": fate.sent and not dry_run, "fate": fate.text}))
            else:
                verb = ("would be sent" if dry_run else "sent") if fate.sent else "not sent"
                click.echo(f"{printable(str(fate.id))}: {verb}: {printable(fate.text)}")
    except Refused as error:
        raise Failure(f"{edit}: {printable(str(error))}") from None
    say(f"{sent} {'would be ' if dry_run else ''}sent again, {kept} not")
    sys.exit(1 if kept else 0)


@click.group("suspense")
def suspense() -> None:
    """See usage that no line takes yet: it is neither lost nor charged, and waits for an order or a go-live."""


@suspense.command("list")
@click.option("--practice", default="", metavar="ODS", help="Only of this practice.")
@click.option("--item", default="", metavar="ITEM", help="Only of this item.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1_000_000), help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def list_suspense(context: click.Context, practice: str, item: str, limit: int, as_json: bool) -> None:
    """List what waits by practice and item: on which days, how much, and why; the largest quantity first.

    \b
    no order has a line for it          an order is missing, or the practice or item code is wrong
    not live on the day: ...            say M1 of the line, or look at its end
    not at an on-demand price on ...    the line is charged by time; its usage costs nothing
    """
    from sinks.clickhouse import ClickHouse
    from sinks.suspense import suspended

    settings = load_settings(context)
    require(settings, "clickhouse")
    found = _ask(lambda: suspended(ClickHouse(settings), practice, item))
    if not as_json and found:
        click.echo(
            f"{'PRACTICE':<10} {'ITEM':<18} {'FIRST DAY':<10} {'LAST DAY':<10} {'DAYS':>5} {'QUANTITY':>14}  WHY"
        )
    for each in found[:limit]:
        first, last = date.fromordinal(each.first_day), date.fromordinal(each.last_day)
        quantity = micros_text(each.quantity_micros)
        if as_json:
            value: dict[str, Any] = {"ods_code": each.ods_code, "item_id": each.item_id, "first_day": str(first)}
            value |= {"last_day": str(last), "days": each.days, "quantity": quantity, "why": each.why}
            click.echo(json.dumps(value))
        else:
            code, name = printable(each.ods_code), printable(each.item_id)
            click.echo(f"{code:<10} {name:<18} {first} {last} {each.days:>5} {quantity:>14}  {each.why}")
    total = micros_text(sum(each.quantity_micros for each in found))
    say(f"{min(limit, len(found))} of {len(found)} kinds, {total} units in all" if found else "nothing waits")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Look at a whole installation and say of each part whether it is well, and what to do where it is not.

    Broker and topics, workers and what they have to do, ledger and its tables, positions against offsets,
    Redis, schemas, clocks, dead letters, suspense, drift.  It changes nothing.  The exit status is 1 when
    there is a fault; warnings are worth a look.
    """
    from tribill.doctor import examine

    settings = load_settings(context)
    require(settings, "kafka", "clickhouse", "redis")
    levels = []
    for finding in examine(settings):
        levels.append(finding.level)
        if as_json:
            value = {"level": finding.level, "part": finding.part, "text": finding.text, "cure": finding.cure}
            click.echo(json.dumps(value))
        else:
            click.echo(f"{finding.level:<8} {finding.part:<10} {printable(finding.text)}")
            if finding.cure:
                click.echo(f"{'':<19} -> {printable(finding.cure)}")
    say(f"{levels.count('fault')} faults, {levels.count('warning')} warnings, {levels.count('ok')} ok")
    sys.exit(1 if "fault" in levels else 0)


def _open(context: click.Context) -> tuple[LetterBox, Settings]:
    from sinks.clickhouse import ClickHouse
    from sinks.dead_letters import LetterBox

    settings = load_settings(context)
    require(settings, "clickhouse")
    return LetterBox(ClickHouse(settings)), settings


_Answer = TypeVar("_Answer")


def _ask(question: Callable[[], _Answer]) -> _Answer:
    """An answer of ledger or broker; that one is away is said in a sentence."""
    return next(_asked(question() for _ in range(1)))


def _asked(answers: Iterator[_Answer]) -> Iterator[_Answer]:
    from confluent_kafka import KafkaException

    from sinks.clickhouse import LedgerUnavailable
    from streams.producer import DeliveryFailed

    try:
        yield from answers
    except (LedgerUnavailable, DeliveryFailed, KafkaException, ConnectionError) as error:
        text = str(error)
        if "UNKNOWN_TABLE" in text or "UNKNOWN_DATABASE" in text:
            text = "the ledger has not all its tables: run `tribill migrate`"
        raise Failure(printable(text)[:500]) from None


def _wanted(**chosen: Any) -> LetterFilter:
    from sinks.dead_letters import LetterFilter

    return LetterFilter(**chosen)


def _parsed_id(text: str) -> LetterId:
    from sinks.dead_letters import LetterId

    try:
        return LetterId.parse(text)
    except ValueError as error:
        raise click.UsageError(printable(str(error))) from None


def _find(box: LetterBox, which: LetterId) -> KeptLetter:
    found = _ask(lambda: box.find(which))
    if found is None:
        raise Failure(f"there is no dead letter {printable(str(which))}; `tribill dead-letters list` shows them")
    return found


def _edited(path: Path) -> Mapping[str, Any]:
    from streams.codec import read_json

    if path.stat().st_size > 16 * 1024 * 1024 or (value := read_json(path.read_bytes().strip())) is None:
        raise Failure(f"{path} is no JSON object such as `tribill dead-letters show --value ID` prints")
    return value


def _name(by: str) -> str:
    return by or caller()


def _why(letter: KeptLetter) -> str:
    return f"{letter.field}: {letter.reason}" if letter.field else letter.reason


def _short(text: str) -> str:
    return printable(text if len(text) <= 200 else text[:199] + "…")


def _hex(data: bytes) -> str:
    shown = data[:64].hex(" ") + (" ..." if len(data) > 64 else "")
    return f"{shown}  {printable(data[:64].decode(errors='replace'))}" if data else "-"


def _hex_lines(data: bytes) -> str:
    lines = []
    for start in range(0, min(len(data), _SHOWN_BYTES), 16):
        row = data[start : start + 16]
        text = "".join(chr(each) if 32 <= each < 127 else "." for each in row)
        lines.append(f"  {start:06x}  {row.hex(' '):<47}  {text}")
    if len(data) > _SHOWN_BYTES:
        lines.append(f"  ... {len(data) - _SHOWN_BYTES} more; --json has them all")
    return "\n".join(lines)


def _letter_json(letter: KeptLetter) -> dict[str, Any]:
    which = letter.id
    return {
        "letter": str(which),
        "agent": which.agent,
        "generation": which.generation,
        "topic": which.topic,
        "partition": which.partition,
        "offset": which.offset,
        "index": which.index,
        "field": letter.field,
        "reason": letter.reason,
        "written_at": letter.written_at.isoformat(),
        "bytes": letter.size,
        "replayed_at": letter.replayed_at.isoformat() if letter.replayed_at else None,
        "replayed_by": letter.replayed_by,
    }
