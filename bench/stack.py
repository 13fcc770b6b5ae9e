"""What the benchmarks of the usage path stand on: one broker, tribill's parts and workers, and what each process uses.

Everything is started as a user would start it, `tribill worker ROLE`, and looked at from outside:
its readiness, committed offsets, rows in ClickHouse, and what the kernel says of its process.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Self

import redis
from confluent_kafka import Consumer, TopicPartition

from bench.workload import Record, send
from sinks.clickhouse import ClickHouse
from streams.settings import Settings
from streams.topics import STAGES, Broker, Place, client_settings
from tests.kafka.broker import kafka
from tribill.embedded import broker as tansu
from tribill.embedded.process import Process, free_port
from tribill.installation import Installation

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
_TICKS = os.sysconf("SC_CLK_TCK")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def machine() -> str:
    """The machine in a few words."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores, {model.group(1).strip() if model else platform.machine()}"


def write(name: str, log: Log, result: dict[str, Any]) -> None:
    """Writes bench/results/<name>.json, with what it was measured on."""
    about = {
        "broker": log.name,
        "day": date.today().isoformat(),  # noqa: DTZ011  # of the machine, for the record
        "machine": machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[1], 1),
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result | about, indent=1) + "\n")


# --- the broker -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Log:
    """A running broker."""

    name: str
    address: str
    pid: int


@contextmanager
def broker() -> Iterator[Log]:
    """Apache Kafka where Java is at hand with its jars or Maven to fetch them, else Tansu; ends with the context."""
    with tempfile.TemporaryDirectory(prefix="tribill-bench-") as directory:
        if jars := kafka_jars():
            version = next(Path(jars).glob("kafka_2.13-*.jar")).stem.rpartition("-")[2]
            with kafka(Path(directory), jars) as address:
                yield Log(f"Apache Kafka {version}", address, _child("kafka.Kafka"))
            return
        port = free_port()
        process = tansu.start(port, Path(directory))
        try:
            wait(lambda: tansu.is_ready(port), 20, "the broker")
            yield Log("Tansu 0.6 (no Java here for Apache Kafka)", f"127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()


def kafka_jars() -> str:
    """The folder of Apache Kafka's jars: TRIBILL_KAFKA_JARS, or fetched by Maven; empty where there is no Java."""
    if jars := os.environ.get("TRIBILL_KAFKA_JARS"):
        return jars
    if not shutil.which("java"):
        return ""
    jars = str(Path(tempfile.gettempdir()) / "tribill-kafka-4.1.0")
    if not list(Path(jars).glob("kafka_2.13-*.jar")):
        if not shutil.which("mvn"):
            return ""
        say("fetching Apache Kafka's jars by Maven ...")
        fetch = ["mvn", "-q", "-B", "-f", "tests/kafka/pom.xml", "dependency:copy-dependencies"]
        if subprocess.run([*fetch, f"-DoutputDirectory={jars}"], cwd=ROOT, check=False).returncode:
            return ""
    return jars


def _child(word: str) -> int:
    """The process id of our child whose command line has this word."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and word in (status.parent / "cmdline").read_text():
                return int(status.parent.name)
        except OSError:  # it ended while we looked
            continue
    raise RuntimeError(f"no child runs {word}")


# --- what a process uses --------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """The CPU time that a process and its threads have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def peak_mib(pid: int) -> int:
    """The most resident memory that a process has had, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


def wait(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.05) -> None:
    """Waits until a condition holds.  Raises TimeoutError naming what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)


# --- tribill --------------------------------------------------------------------------------


class Worker:
    """One `tribill worker ROLE`."""

    def __init__(self, stack: Stack, role: str, number: int = 0) -> None:
        self.role = role
        self._port = free_port()
        #: The last instant before its first partitions at which it had none: it has taken nothing before.
        self.joined_after = 0.0
        self._joined = False
        self.cpu_before = 0.0
        environment = replace(stack.settings, worker_port=self._port).environment()
        command = [sys.executable, "-m", "tribill", "worker", role]
        self.process = Process(f"{role}-{number}", command, stack.directory, environment=environment)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def ready(self) -> bool:
        """Whether it has its partitions.  Raises RuntimeError with its log when it has ended."""
        if self.process.exit_code is not None:
            ended = f"the {self.role} worker ended with {self.process.exit_code}"
            raise RuntimeError(f"{ended}:\n{self.process.log_tail()}")
        asked, cpu = time.monotonic(), cpu_seconds(self.pid)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/ready", timeout=1) as answer:
                if answer.status == 200:
                    self._joined = True
                    return True
        except OSError:
            pass
        if not self._joined:
            self.joined_after, self.cpu_before = asked, cpu
        return False

    def wait_until_ready(self) -> None:
        """Returns when it has its partitions."""
        wait(self.ready, 90, f"the {self.role} worker's partitions", every=0.01)


class Stack:
    """tribill on a broker: Redis, ClickHouse, tables and topics; workers are started one by one."""

    def __init__(self, log: Log, **settings: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tribill-bench-")
        self.directory = Path(self._folder.name)
        # Tansu lets a member join after half the session timeout.
        defaults: dict[str, Any] = {"partitions": 4, "session_timeout_seconds": 6 if "Tansu" in log.name else 30}
        self._installation = Installation(self.directory, Settings(kafka=log.address, **(defaults | settings)))
        self._log = log
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        self._installation.__enter__()
        self._installation.prepare()
        self.settings = self._installation.settings
        self.clickhouse = ClickHouse(self.settings)
        self._broker = Broker(self.settings)
        own = {"group.id": "bench", "enable.auto.commit": "false", "log_level": "0"}
        self._ends = Consumer(client_settings(self.settings) | own)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_workers()
        self._installation.stop()
        self._folder.cleanup()

    def start(self, *roles: str) -> list[Worker]:
        """Starts a worker a role, each when the one before has its partitions; a role may stand twice."""
        started = []
        for role in roles:
            worker = Worker(self, role, len(self.workers))
            self.workers.append(worker)
            worker.wait_until_ready()
            started.append(worker)
        # A second worker of a role has the first one share anew.
        wait(lambda: all(worker.ready() for worker in started), 90, "the partitions shared")
        return started

    def stop_workers(self) -> None:
        """Stops all workers."""
        for worker in self.workers:
            worker.process.ask_to_end()
        for worker in self.workers:
            worker.process.terminate(15)
        self.workers.clear()

    def parts(self) -> dict[str, int]:
        """The process ids of broker, Redis and ClickHouse."""
        pids = {part.name: part.pid for part in self._installation.stack.parts if part.pid}
        return {"broker": self._log.pid, "redis": pids["redis"], "clickhouse": pids["clickhouse"]}

    def rows(self) -> int:
        """How many rows the ledger has; a batch that was read again may count twice."""
        return int(self.clickhouse.query("SELECT count() FROM usage")[0][0])

    def all_done(self, roles: Sequence[str] = ("intake", "usage")) -> bool:
        """Whether these roles have committed all that there is."""
        for role, topics in STAGES:
            ends = self._broker.end_offsets(topics(self.settings)) if role in roles else {}
            if ends and self._broker.behind(f"tribill-{role}", ends):
                return False
        return True

    def caught_up(self, roles: Sequence[str] = ("intake", "usage")) -> bool:
        """The same, asked in some milliseconds; of Tansu, which tells wrong ends, it may be said too early."""
        for role, topics in STAGES:
            if role in roles:
                places = self._broker.partitions(topics(self.settings))
                committed = self._broker.committed(f"tribill-{role}", places)
                if any(end < self._end(place) for place, end in committed.items()):
                    return False
        return True

    def _end(self, place: Place) -> int:
        return int(self._ends.get_watermark_offsets(TopicPartition(*place))[1])

    def footprint(self) -> dict[str, int]:
        """Bytes that a reading takes in Redis, as a claim, and in ClickHouse, compressed as its parts are now."""
        claims = redis.Redis.from_url(self.settings.redis)
        rows, size = self.clickhouse.query(
            "SELECT sum(rows), sum(bytes_on_disk) FROM system.parts"
            " WHERE active AND database = currentDatabase() AND table = 'usage'"
        )[0]
        return {
            "redis_bytes_per_reading": int(claims.info("memory")["used_memory"]) // int(rows),
            "ledger_bytes_per_reading": int(size) // int(rows),
        }

    def check_ledger(self, topic: str, count: int, micros: int) -> None:
        """Raises AssertionError unless the ledger has these readings of a topic, each once, and their sum."""
        found = self.clickhouse.query(
            "SELECT count(), sum(toInt128(quantity_micros)) FROM usage FINAL WHERE topic = {topic:String}",
            {"topic": topic},
        )[0]
        assert tuple(map(int, found)) == (count, micros), f"the ledger has {found}, {count} and {micros} were sent"


@dataclass(slots=True)
class Measured:
    """What some events took."""

    events: int
    seconds: float
    #: CPU seconds by role or part, and the most memory of a worker in MiB.
    cpu: dict[str, float]
    peak_mib: dict[str, int]

    @property
    def rate(self) -> int:
        """Events a second."""
        return round(self.events / self.seconds)

    def cpu_us(self, names: Sequence[str]) -> float:
        """Microseconds of CPU an event, of these roles or parts together."""
        return round(sum(self.cpu[name] for name in names) / self.events * 1e6, 2)


class Meter:
    """Measures from its start to `stop`: the clock, and the CPU of processes by name."""

    def __init__(self, pids: Mapping[str, Sequence[int]]) -> None:
        self._pids = dict(pids)
        self._cpu = self._used()
        self.started = time.monotonic()

    def take_in(self, worker: Worker) -> None:
        """Measures one more worker, and lets the clock run from when it got its partitions."""
        self._pids[worker.role] = [worker.pid]
        self._cpu[worker.role] = worker.cpu_before
        self.started = worker.joined_after

    def _used(self) -> dict[str, float]:
        return {name: sum(map(cpu_seconds, pids)) for name, pids in self._pids.items()}

    def stop(self, events: int, ended: float | None = None) -> Measured:
        """What `events` events took until now, or until `ended`."""
        seconds = (ended or time.monotonic()) - self.started
        cpu = {name: after - self._cpu[name] for name, after in self._used().items()}
        peaks = {name: max(map(peak_mib, pids)) for name, pids in self._pids.items()}
        return Measured(events, seconds, cpu, peaks)


def measure_sending(
    stack: Stack, workers: Sequence[Worker], topic: str, records: Sequence[Record], seconds: float = 600
) -> Measured:
    """What the running workers take for records that are sent to them now, from the first to the last."""
    pids = {role: [each.pid for each in workers if each.role == role] for role in ("intake", "usage")}
    meter, before = Meter(pids | {name: [pid] for name, pid in stack.parts().items()}), stack.rows()
    sent = send(stack.settings, topic, records)
    return measure(stack, sent.readings, before, meter, seconds)


def measure(stack: Stack, events: int, rows_before: int, meter: Meter, seconds: float = 600) -> Measured:
    """Waits until the usage path has done `events` more events and committed them; what that took."""
    wanted, said = rows_before + events, time.monotonic()

    def stored() -> bool:
        nonlocal said
        rows = stack.rows()
        if time.monotonic() - said > 5:
            said = time.monotonic()
            say(f"  {rows - rows_before:,} of {events:,} in the ledger")
        return rows >= wanted

    # Each look costs ClickHouse some milliseconds.
    wait(stored, seconds, f"{events:,} rows in the ledger", every=0.1)
    wait(stack.caught_up, 60, "the offsets of the last records committed", every=0.01)
    measured = meter.stop(events)
    wait(stack.all_done, 60, "the offsets of the last records committed")
    return measured
