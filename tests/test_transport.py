"""The folding transport on a broker: what is handed over, committed, and read again (promise 2).

On Apache Kafka where its jars are at hand, else on Tansu, which has no transactions.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3
from aiokafka import TopicPartition
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from streams.settings import Settings
from streams.topics import Broker
from streams.transport import REST_SECONDS, Consumer, _Fetcher
from streams.worker import BUG_EXIT
from tests.kafka.broker import JARS, kafka
from tribill.embedded import broker as tansu
from tribill.embedded.process import free_port

GROUP = "tribill-recorder"
PARTITIONS = 4


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker."""
    directory = tmp_path_factory.mktemp("broker")
    if JARS:
        with kafka(directory) as found:
            yield found
        return
    port = free_port()
    process = tansu.start(port, directory, ())
    try:
        wait(lambda: tansu.is_ready(port))
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate(10)


def wait(until: Callable[[], bool], seconds: float = 120) -> None:
    """Returns when it is so."""
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "waited for in vain"
        time.sleep(0.05)


class Bench:
    """A topic of its own, and workers that record what they are handed of it."""

    def __init__(self, address: str, directory: Path, partitions: int) -> None:
        self.topic = f"recorded-{directory.name}"
        self.group = GROUP
        self.file = directory / "record.jsonl"
        self.hold = directory / "record.hold"
        self.settings = Settings(kafka=address, session_timeout_seconds=6, batch_records=50)
        self.broker = Broker(self.settings)
        admin = AdminClient({"bootstrap.servers": address})
        admin.create_topics([NewTopic(self.topic, partitions, 1)])[self.topic].result(30)
        self.places = [(self.topic, partition) for partition in range(partitions)]
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.recording_worker", str(self.file), self.topic]
        self.settings = replace(self.settings, worker_port=free_port())
        environment = {**os.environ, **self.settings.environment()}
        worker = subprocess.Popen(command, env=environment)
        self.workers.append(worker)
        return worker

    def says(self, path: str) -> tuple[int, str]:
        """What the worker that was started last answers; 0: nothing."""
        try:
            found = urllib3.request("GET", f"http://127.0.0.1:{self.settings.worker_port}/{path}", retries=False)
        except urllib3.exceptions.HTTPError:
            return 0, ""
        return found.status, found.data.decode()

    def stop(self) -> None:
        self.hold.unlink(missing_ok=True)
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait(10)

    def send(self, first: int, last: int, padding: int = 0) -> None:
        producer = Producer({"bootstrap.servers": self.settings.kafka})
        for number in range(first, last):
            producer.poll(0)
            producer.produce(self.topic, str(number).ljust(padding), partition=number % len(self.places))
        assert not producer.flush(60)

    def lines(self, what: str) -> list[dict[str, Any]]:
        """What was recorded; the last line may be half written."""
        found = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        read = [json.loads(line) for line in found if line.endswith("\n")]
        return [line for line in read if line["what"] == what]

    def done(self) -> list[int]:
        return [int(value) for line in self.lines("done") for value in line["values"]]

    def committed(self) -> dict[int, int]:
        found = self.broker.committed(self.group, self.places)
        return {partition: end for (_, partition), end in found.items()}

    def ends(self) -> dict[int, int]:
        return {partition: end for (_, partition), end in self.broker.end_offsets([self.topic]).items()}

    def is_committed(self) -> bool:
        return self.committed() == {partition: 0 for _, partition in self.places} | self.ends()


@contextmanager
def bench(address: str, directory: Path, partitions: int = PARTITIONS) -> Iterator[Bench]:
    made = Bench(address, directory, partitions)
    try:
        yield made
    finally:
        made.stop()


def test_all_is_handed_over_in_order_and_committed(address: str, tmp_path: Path) -> None:
    """Records would be left out between two fetches, or committed before they were done."""
    with bench(address, tmp_path) as made:
        made.send(0, 1_000)
        made.start()
        wait(lambda: len(made.done()) == 1_000)
        made.send(1_000, 1_400)
        wait(lambda: len(made.done()) == 1_400 and made.is_committed())
        for partition in range(PARTITIONS):
            lines = [line for line in made.lines("done") if line["partition"] == partition]
            offsets = [each for line in lines for each in line["offsets"]]
            assert offsets == list(range(350))
        assert max(len(line["offsets"]) for line in made.lines("taken")) <= made.settings.batch_records


def test_a_kill_before_the_end_of_a_batch(address: str, tmp_path: Path) -> None:
    """A batch in hand of a killed worker would be lost."""
    with bench(address, tmp_path) as made:
        made.hold.touch()
        made.send(0, 200)
        first = made.start()
        wait(lambda: bool(made.lines("taken")))
        assert set(made.committed().values()) == {0}
        first.kill()
        first.wait(10)
        made.hold.unlink()
        made.start()
        wait(lambda: sorted(made.done()) == list(range(200)) and made.is_committed())


def test_a_bug_ends_the_worker(address: str, tmp_path: Path) -> None:
    """And acknowledges nothing: the next one does the batch."""
    with bench(address, tmp_path) as made:
        bug = made.file.with_suffix(".bug")
        bug.touch()
        made.send(0, 200)
        assert made.start().wait(120) == BUG_EXIT
        assert set(made.committed().values()) == {0}
        bug.unlink()
        made.start()
        wait(lambda: sorted(made.done()) == list(range(200)) and made.is_committed())


def test_a_bug_outside_of_a_batch_ends_the_worker(address: str, tmp_path: Path) -> None:
    """Faust would stay, hold its partitions and do nothing."""
    with bench(address, tmp_path) as made:
        made.file.with_suffix(".idle-bug").touch()
        assert made.start().wait(120) == BUG_EXIT


def test_waiting_outside_of_a_batch_ends_nothing(address: str, tmp_path: Path) -> None:
    """Charges whose partition another took for a moment would end with the next month."""
    with bench(address, tmp_path) as made:
        waits = made.file.with_suffix(".idle-wait")
        waits.touch()
        worker = made.start()
        wait(lambda: not waits.exists())
        made.send(0, 200)
        wait(lambda: sorted(made.done()) == list(range(200)) and made.is_committed())
        assert worker.poll() is None


def test_a_sink_that_fails(address: str, tmp_path: Path) -> None:
    """A worker that can do nothing would say that it is ready, or leave its batches out."""
    with bench(address, tmp_path) as made:
        down = made.file.with_suffix(".down")
        down.touch()
        made.send(0, 200)
        made.start()
        failing = 'tribill_sink_failing{agent="recorder",sink="clickhouse"} '
        wait(lambda: made.says("ready")[0] == 503 and "clickhouse" in made.says("ready")[1])
        assert failing + "1.0" in made.says("metrics")[1]
        assert made.says("health")[0] == 200
        down.unlink()
        wait(lambda: sorted(made.done()) == list(range(200)) and made.is_committed())
        wait(lambda: made.says("ready")[0] == 200)
        assert failing + "0.0" in made.says("metrics")[1]


def test_a_graceful_stop_ends_the_batch_in_hand(address: str, tmp_path: Path) -> None:
    """What was done before a stop would be read again by the next worker, or not committed at all."""
    with bench(address, tmp_path, partitions=1) as made:
        made.send(0, 40)
        worker = made.start()
        wait(made.is_committed)
        made.hold.touch()
        made.send(40, 60)
        wait(lambda: len(made.lines("taken")) == 2)
        worker.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        made.hold.unlink()
        assert worker.wait(100) == 0
        done = len(made.done())
        assert made.committed() == {0: done}
        made.start()
        wait(lambda: sorted(made.done()) == list(range(60)) and made.is_committed())


def test_back_pressure(address: str, tmp_path: Path) -> None:
    """A slow sink would fill the worker's memory with what is fetched (promise 9)."""
    with bench(address, tmp_path, partitions=1) as made:
        made.settings = replace(made.settings, batch_records=500)
        made.send(0, 100)
        made.hold.touch()
        worker = made.start()
        wait(lambda: bool(made.lines("taken")))
        before = resident_mib(worker.pid)
        made.send(100, 20_100, padding=10_000)
        time.sleep(4)
        # Two hundred megabytes wait at the broker; of them the worker holds a fetch and a few batches.
        assert resident_mib(worker.pid) - before < 80
        assert len(made.lines("taken")) == 1
        made.hold.unlink()
        wait(lambda: made.done() == list(range(20_100)) and made.is_committed())
        assert resident_mib(worker.pid) - before < 80


def resident_mib(process: int) -> int:
    """The memory that a process has now."""
    [line] = [each for each in Path(f"/proc/{process}/status").read_text().splitlines() if each.startswith("VmRSS")]
    return int(line.split()[1]) // 1024


@pytest.mark.parametrize("slow", [False, True])
def test_rebalances(address: str, tmp_path: Path, slow: bool) -> None:
    """A worker that comes or goes would leave records out, or its successor's offsets would go back.

    Slow: what is fetched just after a rebalance was dropped, and its partition stood still for ever.
    """
    with bench(address, tmp_path) as made:
        if slow:
            made.file.with_suffix(".slow").touch()
        made.start()
        sent = 0

        def send_some() -> None:
            nonlocal sent
            made.send(sent, sent + 200)
            sent += 200

        send_some()
        wait(lambda: len(made.done()) >= 200)
        second = made.start()
        while len({line["pid"] for line in made.lines("done")}) < 2:
            assert sent < 60_000, "the second worker was given nothing"
            send_some()
            time.sleep(0.3)
        second.send_signal(signal.SIGTERM)
        for _ in range(5):
            send_some()
            time.sleep(0.3)
        assert second.wait(100) == 0
        send_some()
        wait(lambda: set(made.done()) == set(range(sent)) and made.is_committed())
        for partition in range(PARTITIONS):
            # Read again at a change of hands, perhaps, but never left out: no batch begins beyond what was done.
            end = 0
            for line in made.lines("done"):
                if line["partition"] == partition:
                    assert line["offsets"][0] <= end
                    end = max(end, line["offsets"][-1] + 1)


class Changing(Consumer):
    """A consumer without a broker; partition 0 has a marker to commit past, and 1 a batch in hand."""

    def __init__(self, changes_at: str) -> None:
        self.changes_at = changes_at
        self._handed, self._done, self._finished = {TP("usage", 1): 150}, {TP("usage", 1): 100}, {}
        self._wanted, self._hands = set(), 0
        self._committed_offset = {TP("usage", 0): 7, TP("usage", 1): 100}
        self.commits: dict[TP, int] = {}

    def reached(self, tp: TP) -> int:
        return {0: 8, 1: 150}[tp.partition]

    def _change_hands(self) -> None:
        self._begin_anew()
        self._committed_offset = dict.fromkeys(self._committed_offset)

    async def _commit_offsets(self, offsets: Any, start_new_transaction: bool = True) -> bool:
        self.commits |= offsets
        if self.changes_at == "commit":
            self._change_hands()
        return True


@pytest.mark.parametrize("changes_at", ["never", "fetch", "commit"])
def test_a_batch_in_hand_is_not_committed_while_hands_change(
    monkeypatch: pytest.MonkeyPatch, changes_at: str
) -> None:
    """What is in hand is forgotten when partitions change hands; it was taken for done, and lost."""
    changing = Changing(changes_at)

    async def fetch(self: Any, *_: Any) -> dict[Any, Any]:
        if changes_at == "fetch":
            changing._change_hands()
        return {}

    monkeypatch.setattr(driver.Consumer, "_getmany", fetch)
    asyncio.run(changing._getmany({TP("usage", 0), TP("usage", 1)}, 1))
    assert changing.commits == ({} if changes_at == "fetch" else {TP("usage", 0): 8})
    if changes_at != "never":
        assert changing._handed == {}


@pytest.mark.skipif(not JARS, reason="TRIBILL_KAFKA_JARS names no jars of Apache Kafka; Tansu has no transactions")
def test_transactions(address: str, tmp_path: Path) -> None:
    """What a producer took back would be billed, and a log that ends with a marker never be done."""
    with bench(address, tmp_path, partitions=1) as made:
        producer = Producer({"bootstrap.servers": address, "transactional.id": tmp_path.name})
        producer.init_transactions(30)
        for first, keep in ((0, True), (100, False), (200, True), (300, False)):
            producer.begin_transaction()
            for number in range(first, first + 50):
                producer.produce(made.topic, str(number), partition=0)
            producer.flush(30)
            if keep:
                producer.commit_transaction(30)
            else:
                producer.abort_transaction(30)
        made.start()
        wait(made.is_committed)
        assert made.done() == [*range(50), *range(200, 250)]
        assert made.ends() == {0: 204}
        made.send(400, 420)
        wait(lambda: made.done()[100:] == list(range(400, 420)) and made.is_committed())


def test_partitions_left_out_of_a_request_are_asked_for_soon() -> None:
    """Else a partition whose records wait here would starve for as long as all others have none."""
    both = [TopicPartition("t", 0), TopicPartition("t", 1)]
    fetcher = _Fetcher.__new__(_Fetcher)
    fetcher._records = {}
    fetcher._in_flight = set()
    fetcher._patience_ms = 1_500
    fetcher._fetch_min_bytes, fetcher._fetch_max_bytes, fetcher._max_partition_fetch_bytes = 1, 9, 9
    fetcher._isolation_level, fetcher._client_rack, fetcher._fetcher_timeout = 0, None, 1
    fetcher._select_read_replica = lambda tp: 7
    states = {tp: SimpleNamespace(has_valid_position=True, paused=False, position=3) for tp in both}
    assignment = SimpleNamespace(tps=both, state_value=states.get)

    def asked() -> tuple[int, list[int], bool]:
        requests, _, seconds, *_ = fetcher._get_actions_per_node(assignment)
        [(_, request)] = requests
        [(_, partitions)] = request._topics
        return request._max_wait_ms, sorted(number for number, *_ in partitions), seconds < 1

    assert asked() == (1_500, [0, 1], False)
    # One rests: the other is asked for, and both again when it has rested.
    states[both[0]].rests_until = time.monotonic() + REST_SECONDS
    wait_ms, partitions, looks_again = asked()
    assert partitions == [1]
    assert wait_ms <= REST_SECONDS * 1000
    assert looks_again
    states[both[0]].rests_until = time.monotonic()
    assert asked() == (1_500, [0, 1], False)
    # Records of one wait.
    fetcher._records[both[0]] = SimpleNamespace(calculate_backoff=lambda: 0)
    wait_ms, partitions, _ = asked()
    assert partitions == [1]
    assert wait_ms <= REST_SECONDS * 1000
