"""The command `tribill`: each subcommand reads its options, does one thing, and exits with a code.

0: done.  1: refused or failed, with the reason.  2: the command was not understood.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import structlog

from streams.settings import Settings, SettingsError
from tribill.roles import ROLES

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


class _Failure(click.ClickException):
    """An error with a reason for a person."""

    def show(self, file: Any = None) -> None:
        """Prints the reason."""
        click.echo(f"tribill: {self.message}", err=True)


def say(text: str) -> None:
    """A line of progress, on standard error."""
    click.echo(text, err=True)


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


def load_settings(context: click.Context, **overrides: Any) -> Settings:
    """The settings of this command."""
    try:
        return Settings.load(context.obj, **overrides)
    except SettingsError as error:
        raise _Failure(str(error)) from None


@cli.command()
@click.argument("role", type=click.Choice([*ROLES]))
@click.pass_context
def worker(context: click.Context, role: str) -> None:
    """Run the worker of one ROLE until it is stopped.

    As many workers of a role may run as its topics have partitions; they share the work.
    """
    from tribill.roles import run_worker

    try:
        sys.exit(run_worker(role, load_settings(context)))
    except SettingsError as error:
        raise _Failure(str(error)) from None


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


@cli.command()
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option(
    "--close",
    "closes",
    multiple=True,
    metavar="YYYY-MM",
    help="Close this period after the last line; may be repeated.",
)
@click.option("--out", type=_FOLDER, help="Where to write <period>/lines.csv, held.csv and the documents.")
def run(files: Sequence[Path], closes: Sequence[str], out: Path | None) -> None:
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

    try:
        closed = replay.run(files, closes, out, say)
    except (replay.CloseRefused, interchange.BadClose, ValueError, OSError) as error:
        raise _Failure(str(error)) from None
    if not closed:
        say('nothing was closed: name a period with --close, or with {"close": "2026-04"} in the file')
    elif out is not None:
        click.echo(f"{len(closed)} periods written to {out}")


def main() -> None:
    """The entry point.  SIGTERM ends a command as Ctrl-C does: what it started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    cli()
