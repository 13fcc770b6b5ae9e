"""The worker of one role: a Faust app whose agents do each partition's batches in order.

A role may have several lanes, each an agent with connections of its own, which share the partitions out:
while one waits for a sink another has work.

The order of steps for every batch, and what is left when each fails:

1. The agent does the batch: the ledger has its rows, the broker has acknowledged what follows.
   If a sink fails here, nothing is acknowledged; the batch is tried again in place, which is
   harmless because every write is absolute and keyed by the record's position.
2. The batch is acknowledged.  If the process dies before, the batch is read again.
3. The offset is committed.  If that fails, the batch is read again: the same as 2.

An error that is not a sink's is a bug: the process ends, says so, and nothing is acknowledged.  It ends at once:
Faust's own end may never come amid a rebalance, and until then the worker would hold its partitions and do nothing.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import faust
import numpy as np
import polars as pl
import prometheus_client
import structlog
from aiokafka.errors import KafkaError
from clickhouse_connect.driver.exceptions import OperationalError
from confluent_kafka import KafkaException
from faust.assignor.partition_assignor import PartitionAssignor
from faust.types import TP
from urllib3.exceptions import HTTPError
from yarl import URL

from sinks import metrics
from sinks.clickhouse import LedgerUnavailable
from streams.agent import Agent
from streams.batch import Batch, NotYet
from streams.circuits import Circuits
from streams.health import Progress
from streams.producer import DeliveryFailed
from streams.settings import Settings
from streams.topics import Broker
from streams.transport import Transport

log = structlog.get_logger(__name__)

#: What a sink raises when it may work the next time.
SINK_ERRORS = (
    LedgerUnavailable,
    OperationalError,
    DeliveryFailed,
    KafkaException,
    HTTPError,
    ConnectionError,
    TimeoutError,
)
_SINKS = ("clickhouse", "kafka", "redis")
WAIT_SECONDS = 0.2
#: How often a lane looks whether it may try its batch again.
CIRCUIT_SECONDS = 0.05
#: A worker that has had a batch in hand for longer than this is not healthy, nor is one that holds a
#: partition which has records to do and has not moved for so long.
STUCK_SECONDS = 300
LOOK_SECONDS = 5.0
#: So many new objects make the collector look for cycles; several fetches' records stay below.
_GARBAGE_OBJECTS = 200_000
#: What a worker ends with that has met a bug.
BUG_EXIT = 70
#: What a worker ends with whose client of the broker has failed; started again it can go on.
BROKEN_EXIT = 75


class _Assignor(PartitionAssignor):  # type: ignore[misc]
    """Hands all partitions out, or ends the worker.

    Just after a broker has started again a client may not see all topics.  Faust would hand out what it
    sees, so that nobody had the rest for as long as the group stays as it is.
    """

    @classmethod
    def _get_copartitioned_groups(cls, topics: set[str], cluster: Any, subscriptions: Any) -> Any:
        if missing := sorted(topic for topic in topics if not cluster.partitions_for_topic(topic)):
            log.error("the broker does not show topics that were there: the worker ends", topics=missing)
            os._exit(BROKEN_EXIT)  # an error raised here would leave the consumer waiting for ever
        return super()._get_copartitioned_groups(topics, cluster, subscriptions)


class _App(faust.App):  # type: ignore[misc]  # faust is untyped
    #: The worker sets it: whether a batch is in hand.
    is_busy: Callable[[], bool]

    async def _consumer_wait_empty(self, consumer: Any, logger: Any) -> None:
        """Lets the batch in hand end and be committed before the worker stops or loses its partitions.

        One that takes longer than the group waits is done again by the next owner, which is harmless.
        """
        until = time.monotonic() + float(self.conf.broker_session_timeout) / 3
        while self.is_busy() and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def _crash(self, reason: BaseException) -> None:
        """Whichever service fails, it is told here (and has said why)."""
        if not self.should_stop:
            os._exit(BROKEN_EXIT if isinstance(reason, KafkaError) else BUG_EXIT)
        super()._crash(reason)

    def _new_transport(self) -> Any:
        return Transport(self.conf.broker_consumer, self)

    def _create_directories(self) -> None:
        """Faust's folders are for its tables, which nothing here uses."""


class _Lane:
    """An agent, and the batches that wait for it: it does one at a time."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.in_hand_since: float | None = None
        #: At most one of each partition (streams.transport).
        self.waiting: asyncio.Queue[Any] = asyncio.Queue()


class Worker:
    """Runs the agents of a role, one a lane, in a Faust worker until SIGTERM."""

    def __init__(self, agents: Sequence[Agent], settings: Settings) -> None:
        self.agent = agents[0]
        self.settings = settings
        self._lanes = [_Lane(each) for each in agents]
        self._circuits = Circuits()
        self._progress = Progress(STUCK_SECONDS)
        self._broker = Broker(settings)
        self.app = self._new_app()

    def run(self) -> int:
        """Blocks until the worker is stopped; returns the exit code."""
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso"),
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
            logger_factory=structlog.PrintLoggerFactory(sys.__stderr__),
        )
        # polars binds numpy when it first meets an array, and two lanes that are the first at once break it: now and
        # then a worker ended with a TypeError in its `_LazyModule._import`, of which `make chaos` told.
        pl.Series(np.empty(0))
        # What a fetch holds is many objects in no cycle: to look through them took half of the time of reading them.
        gc.freeze()
        gc.set_threshold(_GARBAGE_OBJECTS)
        faust.Worker(
            self.app,
            loglevel=logging.WARNING,
            quiet=True,
            redirect_stdouts=False,
            console_port=0,
        ).execute_from_commandline()
        return 0

    def _new_app(self) -> faust.App:
        settings = self.settings
        security: dict[str, Any] = {}
        if settings.kafka_security != "plaintext":
            security["broker_credentials"] = _credentials(settings)
        app = _App(
            f"tribill-{self.agent.role}",
            broker=[URL(f"aiokafka://{each.strip()}") for each in settings.kafka.split(",")],
            store="memory://",
            key_serializer="raw",
            value_serializer="raw",
            PartitionAssignor=_Assignor,
            topic_disable_leader=True,
            topic_allow_declare=False,
            broker_session_timeout=float(settings.session_timeout_seconds),
            broker_rebalance_timeout=float(settings.session_timeout_seconds),
            broker_heartbeat_interval=settings.session_timeout_seconds / 6,
            broker_request_timeout=max(40.0, settings.session_timeout_seconds + 10.0),
            broker_max_poll_records=settings.batch_records,
            # Of a partition.  While a batch is done the next is fetched, so larger ones only wait for each other.
            consumer_max_fetch_size=4 * 1024 * 1024,
            # A partition whose leader was not known, as just after a broker's restart, rests until this has passed.
            consumer_metadata_max_age_ms=10_000,
            consumer_auto_offset_reset="earliest",
            stream_wait_empty=False,
            web_enabled=True,
            web_bind=settings.bind,
            web_port=settings.worker_port,
            web_host="127.0.0.1",
            **security,
        )
        app.is_busy = lambda: self.in_hand_since is not None
        topics = app.topic(*self.agent.topics(), value_serializer="raw", key_serializer="raw")

        async def work(stream: Any) -> None:
            async with asyncio.TaskGroup() as group:
                for lane in self._lanes:
                    group.create_task(self._work(lane))
                async for event in stream.noack().events():
                    await self._lanes[event.message.partition % len(self._lanes)].waiting.put(event)

        app.agent(topics, name=self.agent.role)(work)
        if self.agent.idle_seconds:
            app.timer(self.agent.idle_seconds)(self._idle)
        app.timer(LOOK_SECONDS)(self._look)
        self._serve(app)
        return app

    @property
    def in_hand_since(self) -> float | None:
        """Since when the oldest batch is in hand; None: there is none."""
        return min((lane.in_hand_since for lane in self._lanes if lane.in_hand_since is not None), default=None)

    async def _work(self, lane: _Lane) -> None:
        while True:
            event = await lane.waiting.get()
            # Faust skips what it fetched before a rebalance; so is what has waited here: it is fetched again.
            if event.message.generation_id == self.app.consumer_generation_id:
                batch = Batch(event.message.topic, event.message.partition, event.message.value)
                with structlog.contextvars.bound_contextvars(
                    agent=self.agent.role, topic=batch.topic, partition=batch.partition, offset=batch.first_offset
                ):
                    try:
                        await self._do(lane, batch, event)
                    except asyncio.CancelledError:
                        raise
                    except BaseException:  # what Polars panics with is no Exception
                        log.exception("a bug: the batch is not acknowledged and the worker ends")
                        os._exit(BUG_EXIT)

    async def _do(self, lane: _Lane, batch: Batch, event: Any) -> None:
        tp = TP(batch.topic, batch.partition)
        lane.in_hand_since = started = time.monotonic()
        while not await self._try(lane, batch):
            if tp not in _assignment(self.app):
                log.warning("the partition was taken away: its next owner does the batch")
                self._all_work()  # as far as anybody knows who would try
                lane.in_hand_since = None
                return
        self.app.consumer.finish(tp, batch.end_offset)
        event.ack()
        await self.app.consumer.commit({tp})
        lane.in_hand_since = None
        metrics.BATCH_SECONDS.labels(self.agent.role).observe(time.monotonic() - started)
        metrics.WATERMARK.labels(self.agent.role, batch.topic, str(batch.partition)).set(
            batch.records[-1].timestamp / 1000
        )

    async def _try(self, lane: _Lane, batch: Batch) -> bool:
        """Tries the batch when its turn has come; whether it is done."""
        if not self._circuits.may_try(time.monotonic()):
            await asyncio.sleep(CIRCUIT_SECONDS)
            return False
        try:
            await asyncio.to_thread(lane.agent.do, batch)
        except NotYet as reason:
            # Waiting for others is no sign of being stuck.
            lane.in_hand_since = time.monotonic()
            self._all_work()
            log.debug("waiting", reason=str(reason))
            await asyncio.sleep(WAIT_SECONDS)
            return False
        except SINK_ERRORS as error:
            self._fails(error)
            return False
        self._all_work()
        return True

    async def _idle(self) -> None:
        held = _assignment(self.app)
        for number, lane in enumerate(self._lanes):
            if self._circuits.is_open and self.in_hand_since is not None:
                return  # the batches in hand find out when the sink works again
            if lane.in_hand_since is None and self._circuits.may_try(time.monotonic()):
                own = {each for each in held if each.partition % len(self._lanes) == number}
                try:
                    await asyncio.to_thread(self._do_idle, lane.agent, own)
                    self._all_work()
                except NotYet as reason:
                    self._all_work()
                    log.debug("waiting", reason=str(reason))
                except SINK_ERRORS as error:
                    self._fails(error)

    def _fails(self, error: Exception) -> None:
        sink = _sink(error)
        metrics.SINK_RETRIES.labels(self.agent.role, sink).inc()
        wait = self._circuits.failed(sink, time.monotonic())
        self._show_failing()
        log.warning("sink failed, trying again", sink=sink, error=str(error)[:300], wait=round(wait, 2))

    def _all_work(self) -> None:
        if self._circuits.is_open:
            self._circuits.close()
            self._show_failing()

    def _show_failing(self) -> None:
        failing = self._circuits.failing()
        for sink in _SINKS:
            metrics.SINK_FAILING.labels(self.agent.role, sink).set(sink in failing)

    def _do_idle(self, agent: Agent, held: set[TP]) -> None:
        places = [(each.topic, each.partition) for each in held if each.topic in agent.topics()]
        if places:
            agent.idle(self._broker.committed(f"tribill-{agent.role}", places))

    async def _look(self) -> None:
        """Sees how far each partition is that the worker holds."""
        consumer = self.app.consumer
        found = {}
        for tp in _assignment(self.app):
            if tp.topic in self.agent.topics():
                end, at = consumer.highwater(tp), consumer.reached(tp)
                done = consumer._committed_offset[tp]
                if end is not None and at is not None:
                    # Where nothing was ever committed, what was not fetched yet is to do.
                    found[tp.topic, tp.partition] = (at if done is None else done, end)
        self._progress.look(found, time.monotonic())
        if len(found) == 1 and self.in_hand_since is not None:
            # The one batch in hand speaks for itself: it may wait for others (NotYet).
            self._progress.waits(time.monotonic())

    def _serve(self, app: faust.App) -> None:
        @app.page("/metrics")  # type: ignore[untyped-decorator]
        async def show_metrics(web: Any, request: Any) -> Any:
            return web.bytes(prometheus_client.generate_latest(), content_type="text/plain")

        @app.page("/health")  # type: ignore[untyped-decorator]
        async def show_health(web: Any, request: Any) -> Any:
            now = time.monotonic()
            in_hand = now - (self.in_hand_since or now)
            standing = self._progress.stuck(now)
            stuck = in_hand > STUCK_SECONDS or bool(standing)
            found = {"stuck": stuck, "in_hand_seconds": round(in_hand), "partitions_standing_still": standing}
            return web.json(found, status=503 if stuck else 200)

        @app.page("/ready")  # type: ignore[untyped-decorator]
        async def show_ready(web: Any, request: Any) -> Any:
            # `unassigned`: it has joined, and there are more workers than partitions; it stands by.
            held = len(_assignment(app))
            failing = self._circuits.failing()
            ready = not app.rebalancing and (held > 0 or app.unassigned) and not failing
            found = {"ready": ready, "partitions": held, "sinks_failing": failing}
            return web.json(found, status=200 if ready else 503)


def _sink(error: Exception) -> str:
    """Which of _SINKS an error of SINK_ERRORS came from."""
    return str(getattr(error, "sink", "kafka" if isinstance(error, KafkaException) else "clickhouse"))


def _assignment(app: faust.App) -> set[TP]:
    try:
        return set(app.consumer.assignment())
    except Exception:  # before the consumer thread has started there is none to ask
        return set()


def _credentials(settings: Settings) -> Any:
    import ssl

    context = ssl.create_default_context() if settings.kafka_security in ("ssl", "sasl_ssl") else None
    if settings.kafka_sasl_mechanism:
        return faust.SASLCredentials(
            username=settings.kafka_username,
            password=settings.kafka_password,
            mechanism=settings.kafka_sasl_mechanism,
            ssl_context=context,
        )
    return faust.SSLCredentials(context)
