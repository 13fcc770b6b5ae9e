"""What every command does alike: settings, failures for a person, progress, and text that is safe to show."""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
import time
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


class Progress:
    """Says how far work is: in place at a terminal; else, where only numbers have changed, every ten seconds."""

    _PAUSE_SECONDS = 10.0

    def __init__(self) -> None:
        self._at_terminal = sys.stderr.isatty()
        self._shown, self._words, self._at = "", "", 0.0

    def __call__(self, text: str) -> None:
        """A new state of the work."""
        words = re.sub(r"[0-9]+", "", text)
        now = time.monotonic()
        same, pause = words == self._words, 0.1 if self._at_terminal else self._PAUSE_SECONDS
        if same and now - self._at < pause:
            return
        if self._at_terminal:
            # What stands there is written over while only its numbers change.
            click.echo(f"{chr(13) if same else self.end()}\x1b[K{printable(text)}", err=True, nl=False)
        else:
            say(text)
        self._shown, self._words, self._at = text, words, now

    def end(self) -> str:
        """Lets what comes next begin on a line of its own; returns nothing to print."""
        if self._at_terminal and self._shown:
            click.echo(err=True)
        self._shown = self._words = ""
        return ""


def caller() -> str:
    """Who runs the command, for the record: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


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
