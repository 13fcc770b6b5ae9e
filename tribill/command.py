"""What every command does alike: settings, failures for a person, progress, and text that is safe to show."""

from __future__ import annotations

from typing import Any

import click

from streams.settings import Settings, SettingsError


class Failure(click.ClickException):
    """An error with a reason for a person."""

    def show(self, file: Any = None) -> None:
        """Prints the reason."""
        click.echo(f"tribill: {self.message}", err=True)


def say(text: str) -> None:
    """A line of progress, on standard error."""
    click.echo(text, err=True)


def load_settings(context: click.Context, **overrides: Any) -> Settings:
    """The settings of this command."""
    try:
        return Settings.load(context.find_root().obj, **overrides)
    except SettingsError as error:
        raise Failure(str(error)) from None


def require(settings: Settings, *names: str) -> None:
    """Fails naming the first of these settings that is empty."""
    try:
        settings.require(*names)
    except SettingsError as error:
        raise Failure(str(error)) from None


def printable(text: str) -> str:
    r"""Text of strangers as a terminal may have it: what is no visible character is escaped.

    >>> printable("a\x1b[2Jb\u202e")
    'a\\x1b[2Jb\\u202e'
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text
    )
