"""The embedded ledger: ClickHouse's HTTP interface over chDB, the ClickHouse engine in a wheel.

So every process uses `clickhouse-connect` with its defaults, as in production. Facts that shape this file:

- One process may have the directory open, so one endpoint serves all. A chDB connection runs one statement at
  a time but connections run side by side, cost 0.2 ms and carry their own settings: each request opens its
  own.
- An insert goes through chDB's streaming insert. chDB truncates binary data inside a statement (20,560 bytes
  of it reached the table's format when tried), so the INSERT line is cut from its data; no other SQL is
  parsed.
- An answered insert is on disk as far as a killed process is concerned: parts are written, then renamed. All
  rows of a request up to a million (1,048,449) are one part and stand or fall together; a failed insert
  leaves nothing.
- Not served, unlike ClickHouse: sessions (`SET`, `USE` and temporary tables last for one request; send
  settings with each), external data, users, roles and progress headers. The time zone is UTC.
"""

import asyncio
import json
import os
import re
import secrets
import socket
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import lz4.frame  # type: ignore[import-untyped]
from aiohttp import web
from aiohttp.typedefs import Handler

from tribill.embedded.process import Process, exit_with_parent

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from chdb.state.sqlitelike import Connection

MAX_REQUEST_MIB = 256
THREADS = 8
_MAX_URL_BYTES = 1 << 20
_SHUTDOWN_SECONDS = 2.0

# Query parameters that speak of the request; every other one is a ClickHouse setting.
_NOT_SETTINGS = {
    *("query", "database", "default_format", "user", "password", "role", "quota_key", "query_id"),
    *("session_id", "session_timeout", "session_check", "client_protocol_version", "stacktrace"),
    *("compress", "decompress", "enable_http_compression", "buffer_size", "wait_end_of_query"),
    *("send_progress_in_http_headers", "http_headers_progress_interval_ms"),
}
_SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INSERT_LINE = re.compile(rb"\s*(INSERT\s+INTO\s.*\S)\s+FORMAT\s+(\w+)\s*", re.IGNORECASE | re.DOTALL)
_TRAILING_FORMAT = re.compile(r"\bFORMAT\s+(\w+)\s*;?\s*\Z", re.IGNORECASE)
_ERROR_CODE = re.compile(r"Code: (\d+)\.")
_NOT_STREAMABLE = "Streaming query is not supported"

Chunks = Generator[bytes, None, None]
"""A result in pieces. Pulled in worker threads; closing it cancels the statement."""


# ---- starting it from the parent --------------------------------------------------------------------------


def start(port: int, directory: Path, inherit: Sequence[int] = ()) -> Process:
    """Start the endpoint on 127.0.0.1:`port` over `directory`/clickhouse; `is_ready` says when it serves."""
    command = [sys.executable, "-m", __name__, "--exit-with-parent"]
    command += ["--directory", str(directory / "clickhouse"), "--port", str(port)]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return Process("clickhouse", command, directory, environment=environment, inherit=inherit)


def is_ready(port: int) -> bool:
    """Whether the endpoint on 127.0.0.1:`port` answers /ping."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /ping HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return connection.recv(16).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


# ---- statements on the engine (worker threads) ------------------------------------------------------------


@dataclass
class _Call:
    """One request, as the engine needs it."""

    statement: str
    data: bytes | None = None
    """The rows of an INSERT ... FORMAT, without the INSERT line; None for every other statement."""
    data_format: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    database: str = ""
    default_format: str = "TabSeparated"
    written_rows: int = 0

    @property
    def result_format(self) -> str | None:
        """The format that the statement itself names."""
        found = _TRAILING_FORMAT.search(self.statement) if self.data is None else None
        return found.group(1) if found else None


class _Engine:
    """The chDB engine over one directory."""

    def __init__(self, directory: Path) -> None:
        from chdb.state.sqlitelike import Connection  # 250 MB and 0.4 s: only in the endpoint's own process

        directory.mkdir(parents=True, exist_ok=True)
        self._open: Callable[[], Connection] = lambda: Connection(str(directory))
        self._first = self._open()  # the engine lives as long as a connection does
        self._first.query("SELECT 1")

    def close(self) -> None:
        self._first.close()

    def run(self, call: _Call) -> Chunks:
        """Run one statement and yield its result in pieces. Raises RuntimeError with ClickHouse's message."""
        with closing(self._open()) as connection:
            _prepare(connection, call)
            if call.data is not None:
                with connection.send_insert(call.statement, call.data_format) as insert:
                    insert.append(call.data)
                    call.written_rows = insert.finish().rows_written
            elif call.result_format == "Native":
                yield from _stream(connection, call)
            else:
                yield connection.query(call.statement, call.default_format, params=call.parameters).bytes()


def _prepare(connection: "Connection", call: _Call) -> None:
    # In ClickHouse 26.9 inserts are asynchronous by default; an acknowledgement of ours means "stored".
    settings = {"async_insert": "0", **call.settings}
    for name in settings:
        if not _SETTING_NAME.fullmatch(name):
            raise RuntimeError(f"Code: 115. DB::Exception: Setting {name!r} is unknown. (UNKNOWN_SETTING)")
    connection.query("SET " + ", ".join(f"{name} = {_quoted(value)}" for name, value in settings.items()))
    if call.database:
        connection.query("USE `" + call.database.replace("\\", "\\\\").replace("`", "\\`") + "`")


def _stream(connection: "Connection", call: _Call) -> Chunks:
    """The result block by block, in bounded memory; only Native blocks may simply follow one another."""
    try:
        stream = connection.send_query(call.statement, "Native", params=call.parameters)
        chunk = stream.fetch()
    except RuntimeError as error:
        if _NOT_STREAMABLE not in str(error):
            raise
        yield connection.query(call.statement, "Native", params=call.parameters).bytes()
        return
    try:
        while chunk is not None:
            yield chunk.bytes()
            chunk = stream.fetch()
    finally:
        stream.close()


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# ---- the wire ---------------------------------------------------------------------------------------------


def _late_errors_in_band(chunks: Chunks, tag: str) -> Chunks:
    """An error after the first piece, when the status is sent, follows in the body, as in ClickHouse."""
    first = next(chunks, None)
    if first is None:
        return
    yield first
    try:
        yield from chunks
    except RuntimeError as error:
        message = _message(error).encode()
        yield b"\r\n__exception__\r\n%b\r\n%b\n%d %b\r\n__exception__\r\n" % (
            tag.encode(), message, len(message) + 1, tag.encode()
        )  # fmt: skip


def _compressed(chunks: Chunks, encoding: str) -> Chunks:
    """`chunks` as one compressed stream; the first piece is pulled before anything is yielded."""
    if encoding == "lz4":
        lz4_frame = lz4.frame.LZ4FrameCompressor()
        compress, flush = lz4_frame.compress, lz4_frame.flush
        begin: Callable[[], bytes] = lz4_frame.begin
    else:
        other = zstd.ZstdCompressor() if encoding == "zstd" else zlib.compressobj(level=1, wbits=31)
        compress, flush, begin = other.compress, other.flush, bytes
    head: bytes | None = None
    for chunk in chunks:
        if head is None:
            head = begin()
            yield head + compress(chunk)
        else:
            yield compress(chunk)
    if head is not None:
        yield flush()


def _encoding_of(request: web.Request) -> str | None:
    """The first compression that the client accepts and we have; None to send plain bytes."""
    if request.query.get("enable_http_compression", "0") in ("0", "false"):
        return None
    accepted = [name.split(";")[0].strip() for name in request.headers.get("Accept-Encoding", "").split(",")]
    return next((name for name in accepted if name in ("lz4", "zstd", "gzip")), None)


def _decompressed(body: bytes, max_bytes: int) -> bytes:
    """The content of one or more LZ4 frames."""
    plain = bytearray()
    while body:
        frame = lz4.frame.LZ4FrameDecompressor()
        try:
            plain += frame.decompress(body, max_length=max_bytes + 1 - len(plain))
        except RuntimeError as error:
            raise web.HTTPBadRequest(text=f"damaged lz4 body: {error}") from error
        if len(plain) > max_bytes:
            raise web.HTTPRequestEntityTooLarge(max_size=max_bytes, actual_size=len(plain))
        if not frame.eof:
            raise web.HTTPBadRequest(text="truncated lz4 body")
        body = frame.unused_data or b""
    return bytes(plain)


async def _read_call(request: web.Request) -> _Call:
    query = dict(request.query)
    body = b""
    if request.content_type == "multipart/form-data":  # how clickhouse-connect sends long bound parameters
        for name, value in (await request.post()).items():
            if isinstance(value, web.FileField):
                raise web.HTTPNotImplemented(text="external data is not supported by the embedded ledger")
            query[name] = value if isinstance(value, str) else bytes(value).decode()
    else:
        body = await request.read()  # aiohttp has undone gzip, deflate and zstd, and bounds the size
        if request.headers.get("Content-Encoding") == "lz4":
            body = _decompressed(body, request.client_max_size)
    call = _Call(
        statement="",
        parameters={name[6:]: value for name, value in query.items() if name.startswith("param_")},
        settings={k: v for k, v in query.items() if k not in _NOT_SETTINGS and not k.startswith("param_")},
        database=query.get("database", ""),
        default_format=query.get("default_format", "TabSeparated"),
    )
    if request.method == "GET":
        call.settings["readonly"] = "2"
    line, data = query.get("query", "").encode(), body
    if not line:
        line, _, data = body.partition(b"\n")
    insert = _INSERT_LINE.fullmatch(line)
    try:
        if insert:
            call.statement, call.data_format = insert.group(1).decode(), insert.group(2).decode()
            call.data = data
        else:
            call.statement = (line + b"\n" + data).decode()
    except UnicodeDecodeError as error:
        raise web.HTTPBadRequest(text=f"the statement is not UTF-8: {error}") from error
    return call


def _message(error: Exception) -> str:
    """ClickHouse's own message, without what chDB puts before it."""
    text = str(error)
    return text[max(0, text.find("Code: ")) :]


class _Endpoint:
    """The HTTP handlers over one engine."""

    def __init__(self, directory: Path, threads: int) -> None:
        self._directory = directory
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="statement")
        self._engine: _Engine

    def application(self, max_request_bytes: int) -> web.Application:
        application = web.Application(client_max_size=max_request_bytes, middlewares=[_local_programs_only])
        application.cleanup_ctx.append(self._engine_open)
        application.router.add_get("/ping", self._ping)
        application.router.add_route("*", "/", self._statement)
        return application

    async def _engine_open(self, _: web.Application) -> AsyncIterator[None]:
        self._engine = _Engine(self._directory)
        yield
        self._threads.shutdown()
        self._engine.close()

    async def _ping(self, _: web.Request) -> web.Response:
        return web.Response(text="Ok.\n")

    async def _statement(self, request: web.Request) -> web.StreamResponse:
        started = time.monotonic_ns()
        if request.method == "GET" and "query" not in request.query:
            return await self._ping(request)
        call = await _read_call(request)
        encoding, tag = _encoding_of(request), secrets.token_hex(8)
        chunks = _late_errors_in_band(self._engine.run(call), tag)
        if encoding:
            chunks = _compressed(chunks, encoding)
        headers = {"X-ClickHouse-Timezone": "UTC", "X-ClickHouse-Query-Id": request.query.get("query_id", "")}
        in_thread = asyncio.get_running_loop().run_in_executor
        try:
            chunk = await in_thread(self._threads, next, chunks, None)
        except RuntimeError as error:
            found = _ERROR_CODE.search(str(error))
            headers["X-ClickHouse-Exception-Code"] = found.group(1) if found else "1002"  # UNKNOWN_EXCEPTION
            return web.Response(status=500, text=_message(error), headers=headers)
        summary = {"written_rows": str(call.written_rows), "elapsed_ns": str(time.monotonic_ns() - started)}
        headers["X-ClickHouse-Summary"] = json.dumps(summary)
        if call.result_format or chunk:
            headers["X-ClickHouse-Format"] = call.result_format or call.default_format
        if chunk is None:
            return web.Response(headers=headers)
        headers["X-ClickHouse-Exception-Tag"] = tag
        if encoding:
            headers["Content-Encoding"] = encoding
        response = web.StreamResponse(headers=headers)
        try:
            await response.prepare(request)
            while chunk is not None:
                if chunk:
                    await response.write(chunk)
                chunk = await in_thread(self._threads, next, chunks, None)
            await response.write_eof()
        finally:
            await in_thread(self._threads, chunks.close)
        return response


@web.middleware
async def _local_programs_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse web pages: a browser here reaches 127.0.0.1 too, but it names its page's origin or host."""
    if "Origin" in request.headers or request.url.host not in ("127.0.0.1", "localhost"):
        raise web.HTTPForbidden(text="only for programs on this machine")
    return await handler(request)


@click.command()
@click.option("--directory", type=click.Path(path_type=Path), required=True, help="Where the ledger is kept.")
@click.option("--port", type=int, required=True, help="TCP port on 127.0.0.1.")
@click.option("--max-request-mib", default=MAX_REQUEST_MIB, show_default=True, help="Largest request body.")
@click.option("--threads", default=THREADS, show_default=True, help="Statements that run side by side.")
@click.option("--exit-with-parent", "with_parent", is_flag=True, help="End when standard input closes.")
def main(directory: Path, port: int, max_request_mib: int, threads: int, with_parent: bool) -> None:
    """Serve the ledger in DIRECTORY over ClickHouse's HTTP interface on 127.0.0.1."""
    if with_parent:
        exit_with_parent()
    os.environ["TZ"] = "UTC"  # before chDB is loaded: it takes the process's time zone as the server's
    time.tzset()
    web.run_app(
        _Endpoint(directory, threads).application(max_request_mib << 20),
        host="127.0.0.1",
        port=port,
        shutdown_timeout=_SHUTDOWN_SECONDS,
        access_log=None,
        max_line_size=_MAX_URL_BYTES,
        print=lambda *_: None,
    )


if __name__ == "__main__":
    main()
