"""The command `tribill`: each subcommand reads its options, does one thing, and exits with a code.

0: done.  1: refused or failed, with the reason.  2: the command was not understood.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import structlog

from streams.settings import SettingsError
from tribill.command import Failure as _Failure
from tribill.command import Progress, caller, load_settings, say
from tribill.command import require as _require
from tribill.operating import dead_letters, doctor, suspense
from tribill.roles import ROLES

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--config", type=_FILE, help="A TOML file of settings; TRIBILL_<NAME> in the environment overrides it.")
@click.version_option(package_name="tribill")
@click.pass_context
def cli(context: click.Context, config: Path | None) -> None:
    """Bills tri-party services from streams of usage and contract changes.

    \b
    On a laptop, nothing else needed:
      tribill demo                            a month of GP IT services, live and closed
      tribill run events.jsonl --close 2026-04 --out bills
      tribill up                              an embedded stack to publish to

    \b
    On real clusters (TRIBILL_KAFKA, TRIBILL_CLICKHOUSE, TRIBILL_REDIS set):
      tribill migrate, tribill worker ROLE, tribill web, tribill close 2026-04
    """
    context.obj = config


@cli.command()
@click.argument("role", type=click.Choice([*ROLES]))
@click.pass_context
def worker(context: click.Context, role: str) -> None:
    """Run the worker of one ROLE until it is stopped.

    As many workers of a role may run as its topics have partitions; they share the work.
    """
    from confluent_kafka import KafkaException

    from sinks.clickhouse import LedgerUnavailable
    from tribill.roles import run_worker

    try:
        sys.exit(run_worker(role, load_settings(context)))
    except (SettingsError, KafkaException, LedgerUnavailable, ConnectionError) as error:
        raise _Failure(f"the worker {role} cannot start: {error}") from None


@cli.command()
@click.pass_context
def migrate(context: click.Context) -> None:
    """Bring ClickHouse tables and Kafka topics up to date."""
    from sinks.clickhouse import ClickHouse
    from streams.topics import Broker

    settings = load_settings(context)
    try:
        settings.require("kafka", "clickhouse")
        applied = ClickHouse(settings).migrate()
        created = Broker(settings).create_topics()
    except SettingsError as error:
        raise _Failure(str(error)) from None
    click.echo(f"migrations applied: {', '.join(applied) or 'none missing'}")
    click.echo(f"topics created: {', '.join(created) or 'none missing'}")


class _SeveralCloses(click.Command):
    """`--close 2026-04 2026-05` as `--close 2026-04 --close 2026-05`: an option of click takes one value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        apart: list[str] = []
        closing = False
        for each in args:
            period = re.fullmatch(r"\d{4}-\d{2}", each) is not None
            if closing and period and apart[-1] != "--close":
                apart.append("--close")
            apart.append(each)
            closing = each == "--close" or each.startswith("--close=") or (closing and period)
        return super().parse_args(ctx, apart)


@cli.command(cls=_SeveralCloses)
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option(
    "--close",
    "closes",
    multiple=True,
    metavar="YYYY-MM...",
    help="Close these periods after the last line; may be repeated.",
)
@click.option("--out", type=_FOLDER, help="Where to write <period>/lines.csv, held.csv and the documents.")
@click.option(
    "--parties",
    multiple=True,
    type=_FILE,
    help="Names, addresses, VAT numbers, agreements (docs/documents.md); without, they are invented.",
)
@click.option("--accept-drift", is_flag=True, help="Close though the accruals differ from the ledger.")
def run(
    files: Sequence[Path], closes: Sequence[str], out: Path | None, parties: Sequence[Path], accept_drift: bool
) -> None:
    """Replay interchange FILES through a private stack and write what each close invoices.

    The files are one log in the order named: JSON lines such as

    \b
      {"topic": "usage", "value": {"id": "u1", "supplier_id": "10030", ...}}
      {"topic": "contract-changes", "value": {"id": "c1", "order_number": "C010001", ...}}
      {"close": "2026-04"}

    A record that breaks a rule is refused, said at the end, and stops nothing.  A close that is
    refused ends the run with exit code 1.
    """
    from tribill import interchange
    from tribill import run as replay
    from tribill.closing import CloseRefused

    try:
        closed = replay.run(files, closes, out, parties, say, ["drift"] if accept_drift else [])
    except (CloseRefused, interchange.BadClose, ValueError, OSError) as error:
        raise _Failure(str(error)) from None
    if not closed:
        say('nothing was closed: name a period with --close, or with {"close": "2026-04"} in the file')
    elif out is not None:
        click.echo(f"{len(closed)} periods written to {out}")


@cli.command()
@click.option("--data", type=_FOLDER, default=Path("tribill-data"), show_default=True, help="The data directory.")
@click.option("--accept-lost-tail", is_flag=True, help="Go on after a kill with what the ledger has.")
@click.pass_context
def up(context: click.Context, data: Path, accept_lost_tail: bool) -> None:
    """Run the whole stack on this machine until Ctrl-C: log, ledger, claims, workers, page.

    A part is external where its address is set: TRIBILL_KAFKA, TRIBILL_CLICKHOUSE, TRIBILL_REDIS.
    The embedded log is in memory: Ctrl-C drains it into the ledger first; after a kill the next start
    says what may be lost and from where suppliers send again.
    """
    from tribill import up as stack
    from tribill.embedded.process import ProcessFailed
    from tribill.embedded.stack import DirectoryInUse

    try:
        stack.up(data, load_settings(context, **_EMBEDDED), accept_lost_tail, say)
    except (stack.UpFailed, ProcessFailed, DirectoryInUse) as error:
        raise _Failure(str(error)) from None


#: Tansu makes a joining worker wait for half the session timeout.
_EMBEDDED = {"session_timeout_seconds": 6}


@cli.command()
@click.option("--practices", default=10_000, show_default="all, 6,151", help="At most so many practices.")
@click.option("--events", default=1_000_000, show_default=True, help="So many usage events.")
@click.option("--seed", default=1, show_default=True, help="The same seed makes the same events.")
@click.option("--out", type=_FOLDER, help="Write lines.csv, held.csv and the documents of both closes here.")
@click.option("--exit", "ends", is_flag=True, help="End after the summary; otherwise the page stays up.")
def demo(practices: int, events: int, seed: int, out: Path | None, ends: bool) -> None:
    """See a real month of GP IT services, from order to invoice, in a few minutes.

    Real practices, list sizes, systems and prices of England; January 2021 in fast motion: call-off
    orders, go-lives, a million SMS, a list-size publication that is backdated, a merger, duplicates,
    late events and garbage.  Closes January, then February with what came late.
    """
    import tempfile

    from tribill.demo import demo as show
    from tribill.embedded.process import ProcessFailed
    from tribill.up import UpFailed

    if practices < 3:
        raise click.BadParameter("the demonstration needs at least 3 practices", param_hint="--practices")
    with tempfile.TemporaryDirectory(prefix="tribill-demo-") as directory:
        try:
            show(Path(directory), practices, events, seed, out, not ends, say)
        except (UpFailed, ProcessFailed, TimeoutError) as error:
            raise _Failure(str(error)) from None


@cli.command()
@click.pass_context
def web(context: click.Context) -> None:
    """Serve the live page, its events and /metrics until stopped.  Read only."""
    from web.app import serve

    settings = load_settings(context)
    _require(settings, "kafka", "clickhouse")
    say(f"the page is at http://{settings.bind}:{settings.web_port}/")
    try:
        serve(settings)
    except OSError as error:
        raise _Failure(f"{settings.bind}:{settings.web_port}: {error}") from None


@cli.command()
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.pass_context
def publish(context: click.Context, files: Sequence[Path]) -> None:
    """Send interchange FILES to a running installation.

    {"close": ...} lines ask for the close and wait for it, so that what follows is late.
    """
    from tribill import interchange
    from tribill.closing import CloseRefused, close_and_wait

    settings = load_settings(context)
    _require(settings, "kafka", "clickhouse")
    publisher, refused = interchange.Publisher(settings), 0
    try:
        for path in files:
            for line in interchange.read(path):
                if line.close:
                    refused += publisher.flush()
                    close_and_wait(settings, line.close, say)
                else:
                    publisher.send(line)
                if publisher.sent and publisher.sent % 100_000 == 0:
                    say(f"{publisher.sent} records sent")
        refused += publisher.flush()
    except (CloseRefused, interchange.BadClose, OSError) as error:
        raise _Failure(str(error)) from None
    click.echo(f"{publisher.sent} records sent, {refused} lines refused (tribill's dead letters say why)")
    sys.exit(1 if refused else 0)


@cli.command()
@click.argument("period", required=False, metavar="[YYYY-MM]")
@click.option("--previous", is_flag=True, help="The month before this one, in London.")
@click.option("--preview", is_flag=True, help="Show what a close now would give; nothing is closed or recorded.")
@click.option("--out", type=_FOLDER, help="Write <period>/lines.csv, held.csv and the documents here.")
@click.option("--accept-lag", is_flag=True, help="Do not wait for charges and funding; accruals are not compared.")
@click.option("--accept-attestations", is_flag=True, help="Do not wait for suppliers' attestations of usage.")
@click.option("--accept-suspense", is_flag=True, help="Close with more usage in suspense than suspense_limit.")
@click.option("--accept-drift", is_flag=True, help="Close though the accruals differ from the ledger.")
@click.pass_context
def close(
    context: click.Context, /, period: str | None, previous: bool, preview: bool, out: Path | None, **accepts: bool
) -> None:
    """Close a PERIOD: fix the cut, wait until all stages have reached it, and issue the documents.

    Asking for a closed period answers with its documents.  What is accepted is recorded with the close,
    under your name, and stands on its control sheet.  A period that has not ended, or is not the next
    one, is refused: there is no switch for that here, but a --preview.
    """
    from rating.calendar import parse_month
    from rating.statements import OutOfBalance
    from sinks.clickhouse import ClickHouse
    from sinks.documents import Documents
    from sinks.papers.files import Folder, write_files
    from tribill.closing import CloseRefused, close_and_wait, previous_month
    from tribill.preview import Preview

    if (period is None) != previous:
        raise click.UsageError("name a period such as 2026-04, or give --previous")
    settings = load_settings(context)
    _require(settings, "kafka", "clickhouse")
    text = period or previous_month()
    progress = Progress()
    accept = [name.removeprefix("accept_") for name, given in accepts.items() if given]
    try:
        month = parse_month(text)
        if preview:
            shown = Preview(settings, month, progress)
            if out is not None:
                write_files(shown, month, out, progress)
            progress.end()
            click.echo("\n".join(shown.lines()))
            return
        close_it = partial(close_and_wait, settings, text, progress, accept=accept, requested_by=caller())
        if out is None:
            closed = close_it()
        else:
            with Folder(Documents(ClickHouse(settings)), month, out) as folder:
                closed = close_it(meanwhile=folder.write_issued)
                folder.finish(progress)
    except (CloseRefused, OutOfBalance, ValueError) as error:
        progress.end()
        raise _Failure(str(error)) from None
    progress.end()
    click.echo(closed.summary())


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--usage",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A supplier's own readings, an interchange file: compared reading by reading.  May be repeated.",
)
@click.option("--verbose", is_flag=True, help="Say what agrees too, line by line.")
def verify(path: Path, usage: Sequence[Path], verbose: bool) -> None:
    """Derive documents from the evidence beside them, and say what does not agree.

    PATH is a document (NUMBER-invoice.json), the folder of a period, or the folder that `tribill run
    --out` wrote.  Nothing else is needed: no server, no database.

    \b
      tribill verify bills
      tribill verify bills/2026-04/NHSE-000001-invoice.json --usage april.jsonl

    Exit code 0: all agrees.  1: something does not; it is listed.  2: something could not be read.
    """
    from tribill.verify import Unusable
    from tribill.verify import verify as verify_path

    try:
        verdict = verify_path(path, usage, click.echo, verbose=verbose)
    except Unusable as error:
        click.echo(f"tribill: {error}", err=True)
        sys.exit(2)
    compared = f"{verdict.documents} documents, {verdict.lines} lines agree"
    if verdict.days:
        compared += f", {verdict.days} days of readings compared"
    differences = len(verdict.differences) + len(verdict.unusable)
    click.echo(f"{compared}; {differences or 'no'} difference{'' if differences == 1 else 's'}")
    sys.exit(verdict.exit_code)


@cli.command("import")
@click.argument("kind", type=click.Choice(["orders", "list-sizes", "practices", "allocations", "parties"]))
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option(
    "--to",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write an interchange file instead of publishing.",
)
@click.option(
    "--practices",
    "known",
    type=_FILE,
    help="Refuse practices that this file, a CSV with a column ods_code, does not have.",
)
@click.option("--whole", is_flag=True, help="Hold an order file with a bad row back: an order is placed once.")
@click.pass_context
def import_files(
    context: click.Context,
    kind: str,
    files: Sequence[Path],
    target: Path | None,
    known: Path | None,
    whole: bool,
) -> None:
    """Read real files of a KIND and publish what they say.

    \b
    orders       {CallOffId}_{ODS}_Full.csv and _Patients.csv of the order feed
    list-sizes   NHS "Patients Registered at a GP Practice"
    practices    practices with PCN and commissioner
    allocations  ordering_party,financial_year,amount or financial_year,per_patient,as_of
    parties      names, addresses, VAT numbers, self-billing agreements (docs/documents.md); these go
                 straight into the ledger, and the next close knows them

    A bad row is reported with file, line, field and reason and stops nothing but itself; the exit
    status is 1 then.  A line left out of an order comes with a later revision of it.
    """
    from sinks.clickhouse import ClickHouse
    from tribill.importing import import_all, import_party_files

    settings = load_settings(context)
    if kind == "parties":
        if target is not None:
            raise click.UsageError("party data is no interchange file: it goes into the ledger, without --to")
        _require(settings, "clickhouse")
        kept, problems = import_party_files(files, ClickHouse(settings), say)
        click.echo(f"{kept} rows kept, {problems} problems")
        sys.exit(1 if problems else 0)
    if target is None:
        _require(settings, "kafka", "clickhouse")
    try:
        published, problems = import_all(kind, files, settings, target, known, whole, say)
    except (OSError, ValueError) as error:
        raise _Failure(str(error)) from None
    click.echo(f"{published} records {'published' if target is None else f'written to {target}'}, {problems} problems")
    sys.exit(1 if problems else 0)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=_FILE)
def paper(files: Sequence[Path]) -> None:
    """Make a PDF beside each of these documents or statements, given as the JSON that a close has written.

    Practices' statements are written as JSON alone, for there are thousands of them.
    """
    import json

    from sinks.papers.pdf import document_pdf, statement_pdf

    for path in files:
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            made = document_pdf(body) if "number" in body else statement_pdf(body)
        except (ValueError, KeyError, TypeError) as error:
            raise _Failure(f"{path} is no document or statement of a close: {error!r}") from None
        path.with_suffix(".pdf").write_bytes(made)


for _command in (dead_letters, suspense, doctor):
    cli.add_command(_command)


def main() -> None:
    """The entry point.  SIGTERM ends a command as Ctrl-C does: what it started is stopped."""
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True
        # Not sys.exit(): its bare number is no exception to librdkafka's binding, when this falls into its callback.
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, end)
    # Exact fractions of tiered prices may have thousands of digits.
    sys.set_int_max_str_digits(0)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        cli()
    except BaseException:
        if ended:
            # That binding, when it is about to read its settings, raises an error of its own in place of any other.
            raise SystemExit(143) from None
        raise
