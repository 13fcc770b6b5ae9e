"""The web process: the live page, its server-sent events, and `/metrics`; GET only, it writes nothing.

One refresh a second serves all browsers that look at the same month; when none looks and none scrapes,
the ledger is asked nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib import resources
from typing import Any, TypeVar

import prometheus_client
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from rating.calendar import parse_month
from sinks.clickhouse import ClickHouse
from streams.settings import Settings
from streams.topics import Broker
from web.picture import Pictures
from web.progress import Progress, progress
from web.queries import Queries

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

#: Each open stream costs a socket and a write a second; beyond this they are refused.
MAX_LISTENERS = 200
REFRESH_SECONDS = 1.0
SCRAPE_SECONDS = 5.0
#: After this a browser is told that the ledger is away; the question itself may go on.
PATIENCE_SECONDS = 4.0
#: Who does not read for so long is not there.
_WRITE_SECONDS = 10.0
#: How far the stages are is asked of the broker at most so often, and is forgotten when it stays away.
_PROGRESS_SECONDS = 2.0
_PROGRESS_HOLDS_SECONDS = 30.0
#: Without an answer for so long, this process is stuck.
_STUCK_SECONDS = 120.0

#: None: whichever month is live.
Month = int | None

FIGURES_AT = prometheus_client.Gauge(
    "tribill_national_figures_timestamp_seconds", "When the web process last computed the national figures"
)

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
#: Nothing but our own files runs or is loaded, and nobody frames the page.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Away(Exception):
    """The ledger does not answer in time, or answers with an error."""


class _Worker:
    """Asks one thing at a time in another thread; who waits may give up, the question may not.

    The threads are daemons: a ledger that hangs does not keep the process from ending.
    """

    def __init__(self) -> None:
        self._running: asyncio.Future[Any] | None = None
        self._turn = asyncio.Lock()
        self.busy_since: float | None = None

    async def ask(self, question: Callable[[], Result], seconds: float) -> Result:
        """The answer.  Raises TimeoutError after so many seconds, and whatever the question raises."""
        async with asyncio.timeout(seconds), self._turn:
            if self._running is not None:
                await asyncio.wait([self._running])
            loop = asyncio.get_running_loop()
            running: asyncio.Future[Result] = loop.create_future()
            self._running = running
            self.busy_since = time.monotonic()

            def settle(result: Any, error: Exception | None) -> None:
                self.busy_since = None
                if error is None:
                    running.set_result(result)
                else:
                    running.set_exception(error)
                    running.exception()  # who asked may be gone

            def run() -> None:
                answer: tuple[Any, Exception | None]
                try:
                    answer = question(), None
                except Exception as error:
                    answer = None, error
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(settle, *answer)

            threading.Thread(target=run, daemon=True).start()
            return await asyncio.shield(running)


class Live:
    """What all requests share: the ledger, the broker, the last pictures, and who listens."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queries = Queries(ClickHouse(settings))
        self._pictures = Pictures(self._queries, settings)
        self._broker: Broker | None = None
        self._ledger_worker = _Worker()
        self._broker_worker = _Worker()
        self._progress: Progress | None = None
        self._progress_at = -_PROGRESS_HOLDS_SECONDS
        self._progress_task: asyncio.Task[None] | None = None
        self._next_progress = 0.0
        self._ledger_away = False
        self._scrape = asyncio.Lock()
        self._scraped_at = -SCRAPE_SECONDS
        self.figures_known = False
        self._listeners: Counter[Month] = Counter()
        self._listening = asyncio.Event()
        self._news = asyncio.Condition()
        self._events: dict[Month, tuple[float, bytes]] = {}
        self.closing = False

    # --- the broker ---

    def _look_at_progress(self) -> Progress | None:
        """The last known progress; asks for news in the background."""
        now = time.monotonic()
        idle = self._progress_task is None or self._progress_task.done()
        if self._settings.kafka and idle and now >= self._next_progress:
            self._progress_task = asyncio.create_task(self._ask_progress())
        return self._progress if now - self._progress_at < _PROGRESS_HOLDS_SECONDS else None

    async def _ask_progress(self) -> None:
        def ask() -> Progress:
            if self._broker is None:
                self._broker = Broker(self._settings)
            return progress(self._broker, self._settings)

        started = time.monotonic()
        try:
            self._progress = await self._broker_worker.ask(ask, 60)
            self._progress_at = time.monotonic()
        except Exception as error:  # a page without lags is better than none
            log.warning("the broker does not say how far the stages are", error=str(error)[:300])
        self._next_progress = time.monotonic() + max(_PROGRESS_SECONDS, 3 * (time.monotonic() - started))

    # --- the ledger ---

    async def _ask_ledger(self, question: Callable[[], Result], seconds: float) -> Result:
        try:
            answer = await self._ledger_worker.ask(question, seconds)
        except Exception as error:
            # Whatever it is, the stream goes on; what exactly is for the log (once), not for the page.
            if not self._ledger_away:
                log.warning("the ledger is away", error=str(error)[:300] or type(error).__name__)
            self._ledger_away = True
            slow = isinstance(error, TimeoutError)
            raise Away("the ledger takes long to answer" if slow else "the ledger does not answer") from error
        self._ledger_away = False
        return answer

    async def picture(self, month: Month) -> dict[str, Any]:
        """The picture of a month.  Raises Away."""
        known = self._look_at_progress()
        return await self._ask_ledger(
            lambda: self._pictures.picture(month, self._pictures.now(), known), PATIENCE_SECONDS
        )

    async def gauges(self) -> None:
        """Brings the national gauges up to date, at most once in SCRAPE_SECONDS.  Raises Away."""
        async with self._scrape:
            if time.monotonic() - self._scraped_at < SCRAPE_SECONDS:
                return
            if self._look_at_progress() is None and self._progress_task is not None:
                # After a pause there is none to show: a scrape can wait a little.
                await asyncio.wait([self._progress_task], timeout=3)
            known = self._look_at_progress()
            await self._ask_ledger(lambda: self._pictures.set_gauges(self._pictures.now(), known), PATIENCE_SECONDS)
            self._scraped_at = time.monotonic()
            FIGURES_AT.set_to_current_time()
            self.figures_known = True

    async def ping(self) -> None:
        """Returns when the ledger answers.  Raises Away."""
        await self._ask_ledger(self._queries.ping, PATIENCE_SECONDS)

    def stuck(self) -> bool:
        """Whether a question to the ledger has gone unanswered for too long."""
        since = self._ledger_worker.busy_since
        return since is not None and time.monotonic() - since > _STUCK_SECONDS

    # --- events ---

    async def refresh(self) -> None:
        """While somebody listens: a picture a second of each month that is looked at."""
        while True:
            await self._listening.wait()
            started = time.monotonic()
            for month in list(self._listeners):
                self._events[month] = (time.monotonic(), await self._event(month))
            for month in self._events.keys() - self._listeners.keys():
                del self._events[month]
            async with self._news:
                self._news.notify_all()
            cost = time.monotonic() - started
            await asyncio.sleep(max(REFRESH_SECONDS - cost, 0.1))

    async def _event(self, month: Month) -> bytes:
        try:
            name, value = "picture", await self.picture(month)
        except Away as reason:
            name, value = "away", {"reason": str(reason)}
        # JSON has no line breaks of its own, so an event is one line of data whatever suppliers wrote.
        return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()

    def _newest(self, month: Month) -> tuple[float, bytes]:
        at, event = self._events.get(month, (0.0, b""))
        # One left from when somebody last listened says nothing of now.
        return (at, event) if time.monotonic() - at < 2 * (REFRESH_SECONDS + PATIENCE_SECONDS) else (0.0, b"")

    def _is_news(self, month: Month, seen: float) -> bool:
        return self.closing or self._newest(month)[0] > seen

    def full(self) -> bool:
        """Whether no one more may listen."""
        return self._listeners.total() >= MAX_LISTENERS

    async def listen(self, month: Month) -> AsyncIterator[bytes]:
        """The events of a month, from the newest on; what a slow reader misses is left out."""
        self._listeners[month] += 1
        self._listening.set()
        seen = 0.0
        try:
            while not self.closing:
                at, event = self._newest(month)
                if at > seen:
                    seen = at
                    yield event
                else:
                    async with self._news:
                        await self._news.wait_for(partial(self._is_news, month, seen))
        finally:
            self._listeners[month] -= 1
            if not self._listeners[month]:
                del self._listeners[month]
            if not self._listeners:
                self._listening.clear()

    async def close(self) -> None:
        """Ends all streams."""
        self.closing = True
        async with self._news:
            self._news.notify_all()


LIVE: web.AppKey[Live] = web.AppKey("live", Live)


def application(settings: Settings) -> web.Application:
    """The web application."""
    settings.require("clickhouse")
    app = web.Application(middlewares=[_local_names_only(settings)], client_max_size=1024)
    files = {path: (_file(name), kind) for path, (name, kind) in _FILES.items()}

    async def show_file(request: web.Request) -> web.Response:
        text, kind = files[request.path]
        return web.Response(text=text, content_type=kind, charset="utf-8")

    for path in files:
        app.router.add_get(path, show_file)
    app.router.add_get("/events", _events, allow_head=False)
    app.router.add_get("/metrics", _metrics)
    for slash in ("", "/"):
        app.router.add_get(f"/health{slash}", _health)
        app.router.add_get(f"/ready{slash}", _ready)
    app.on_response_prepare.append(_add_headers)

    async def run(app: web.Application) -> AsyncIterator[None]:
        live = app[LIVE] = Live(settings)
        task = asyncio.create_task(live.refresh())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def end_streams(app: web.Application) -> None:
        await app[LIVE].close()

    app.cleanup_ctx.append(run)
    app.on_shutdown.append(end_streams)
    return app


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT.  Raises SettingsError, and OSError when the port is taken."""
    # It logs each failure to connect; ours say once that the ledger is away.
    logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)
    web.run_app(
        application(settings),
        host=settings.bind,
        port=settings.web_port,
        shutdown_timeout=2,
        access_log=None,
        print=None,
    )


def _file(name: str) -> str:
    return resources.files("web").joinpath(name).read_text(encoding="utf-8")


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)


def _local_names_only(settings: Settings) -> Any:
    """On 127.0.0.1 only local names are served, so no page of elsewhere can name its way in (DNS rebinding)."""
    local = settings.bind in ("127.0.0.1", "::1", "localhost")

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if local and request.url.host not in ("127.0.0.1", "::1", "localhost"):
            raise web.HTTPForbidden(text="only for this machine")
        return await handler(request)

    return check


def _month_of(request: web.Request) -> Month:
    text = request.query.get("month", "")
    if not text:
        return None
    try:
        month = parse_month(text)
    except ValueError:
        raise web.HTTPBadRequest(text="month is not like 2026-04") from None
    if not 1900 * 12 <= month < 2200 * 12:
        # What a London day is, ClickHouse knows for these years.
        raise web.HTTPBadRequest(text="month is not of the years 1900 to 2199")
    return month


async def _events(request: web.Request) -> web.StreamResponse:
    month, live = _month_of(request), request.app[LIVE]
    if live.full() or live.closing:
        raise web.HTTPServiceUnavailable(text="too many listen", headers={"Retry-After": "30"})
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
    )
    events = live.listen(month)
    try:
        await response.prepare(request)
        await response.write(b"retry: 2000\n\n")
        async for event in events:
            async with asyncio.timeout(_WRITE_SECONDS):
                await response.write(event)
    except (ConnectionError, TimeoutError):
        pass  # the browser is gone
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # an async generator
    return response


async def _metrics(request: web.Request) -> web.Response:
    """Stale figures when the ledger is away, with their age beside them; none before they were known once."""
    try:
        await request.app[LIVE].gauges()
    except Away as reason:
        if not request.app[LIVE].figures_known:
            raise web.HTTPServiceUnavailable(text=str(reason)) from None
    return web.Response(
        body=prometheus_client.generate_latest(),
        headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST},
    )


async def _health(request: web.Request) -> web.Response:
    stuck = request.app[LIVE].stuck()
    return web.json_response({"stuck": stuck}, status=503 if stuck else 200)


async def _ready(request: web.Request) -> web.Response:
    try:
        await request.app[LIVE].ping()
    except Away as reason:
        return web.json_response({"ready": False, "reason": str(reason)}, status=503)
    return web.json_response({"ready": True})
