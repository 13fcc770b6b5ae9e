"""A door for each worker to the ledger, at which it can be killed, paused or cut off at an insert.

A worker reaches ClickHouse through a port of its own, so what passes there is known to be its.  A trap
waits for an insert into some table and springs before it is passed on, in the middle of it, or when
ClickHouse has it and the worker does not know: the crash windows of DESIGN.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote_plus

BEFORE, HALF, AFTER = "before", "in the middle of", "after"
MOMENTS = (BEFORE, HALF, AFTER)
FULL = "full"
_FULL_TEXT = b"Code: 243. DB::Exception: Cannot reserve 1.00 MiB, not enough space. (NOT_ENOUGH_SPACE)\n"
#: What ClickHouse answers when its disk is full (tried on a full tmpfs).
_FULL_ANSWER = (
    b"HTTP/1.1 500 Internal Server Error\r\nX-ClickHouse-Exception-Code: 243\r\n"
    b"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(_FULL_TEXT), _FULL_TEXT)
)
_INSERT = re.compile(r"INSERT\s+INTO\s+[`\"]?(?:\w+[`\"]?\.[`\"]?)?(\w+)", re.IGNORECASE)
_HEAD_LIMIT = 1 << 20


@dataclass(slots=True)
class Trap:
    """What happens at the next insert into a table, at whichever of the doors that it was set at.

    `spring` is called in the doors' thread.  The connection is cut unless `hold`: then the insert goes
    on its way when that is set.
    """

    table: str
    moment: str
    spring: Callable[[Door], None]
    hold: threading.Event | None = None
    taken: bool = False
    sprung: threading.Event = field(default_factory=threading.Event)


class Door:
    """One worker's way to the ledger."""

    def __init__(self, port: int, upstream: int) -> None:
        self.port = port
        self._upstream = upstream
        self.trap: Trap | None = None
        #: Every insert is cut at this moment (or answered that the disk is full), until it is None again.
        self.failing: str | None = None

    async def open(self) -> None:
        """Listens."""
        await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=_HEAD_LIMIT)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, _Cut):
            answers, upstream = await asyncio.open_connection("127.0.0.1", self._upstream, limit=_HEAD_LIMIT)
            while True:
                await self._pass(await _message(reader), upstream, answers, writer)
        for each in (writer, upstream):
            if each is not None:
                each.close()

    async def _pass(
        self,
        request: bytes,
        upstream: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        trap, moment = self._caught(request)
        if moment == FULL:
            writer.write(_FULL_ANSWER)
            await writer.drain()
            return
        if moment == BEFORE:
            await self._spring(trap)
        if moment == HALF:
            upstream.write(request[: len(request) // 2])
            await upstream.drain()
            await self._spring(trap)
            upstream.write(request[len(request) // 2 :])
        else:
            upstream.write(request)
        await upstream.drain()
        answer = await _message(answers)
        if moment == AFTER:
            await self._spring(trap)
        writer.write(answer)
        await writer.drain()

    def _caught(self, request: bytes) -> tuple[Trap | None, str]:
        found = _INSERT.search(unquote_plus(request[:8_192].decode("latin-1")))
        if found is None:
            return None, ""
        trap = self.trap
        if trap is not None and trap.taken:
            trap = self.trap = None
        if trap is not None and trap.table == found[1]:
            self.trap, trap.taken = None, True
            return trap, trap.moment
        return None, self.failing or ""

    async def _spring(self, trap: Trap | None) -> None:
        if trap is None:
            raise _Cut
        trap.spring(self)
        trap.sprung.set()
        if trap.hold is None:
            raise _Cut
        while not trap.hold.is_set():
            await asyncio.sleep(0.05)


class Doors:
    """All doors, in a thread of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="doors", daemon=True).start()

    def add(self, port: int, upstream: int) -> Door:
        """Opens a door on a port."""
        door = Door(port, upstream)
        asyncio.run_coroutine_threadsafe(door.open(), self._loop).result(10)
        return door


class _Cut(Exception):
    """This connection ends here."""


async def _message(reader: asyncio.StreamReader) -> bytes:
    """One HTTP request or answer, whole."""
    head = await reader.readuntil(b"\r\n\r\n")
    fields = {
        name.strip().lower(): value.strip().lower()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
    }
    if b"content-length" in fields:
        return head + await reader.readexactly(int(fields[b"content-length"]))
    if fields.get(b"transfer-encoding") != b"chunked":
        return head
    parts = [head]
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        parts += [line, await reader.readexactly(size + 2)]
        if not size:
            return b"".join(parts)
