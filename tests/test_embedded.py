"""The embedded stack with its real parts: round trips, kills, restarts and the promises of its endpoint."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import clickhouse_connect
import pyarrow as pa
import pytest
import redis as redis_client
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from clickhouse_connect.driver.exceptions import DatabaseError, StreamFailureError

from tribill.embedded import clickhouse_server, log_generation, process
from tribill.embedded.process import Process, ProcessFailed, free_port
from tribill.embedded.stack import DirectoryInUse, EmbeddedStack

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc"),
    pytest.mark.timeout(200),
]

ROOT = Path(__file__).parents[1]
EXTERNAL = {"kafka": "external:9092", "clickhouse": "http://external", "redis": "redis://external"}


def children() -> set[int]:
    """The process ids of our children, zombies included."""
    lists = Path("/proc/self/task").glob("*/children")
    return {int(pid) for path in lists for pid in path.read_text().split()}


def stack_of(directory: Path, *parts: str) -> EmbeddedStack:
    """A stack that starts only `parts`."""
    return EmbeddedStack(directory, **{name: at for name, at in EXTERNAL.items() if name not in parts})


def wait_for(condition: Callable[[], bool], timeout: float = 100.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[str]:
    """The URL of a ledger on its own."""
    with stack_of(tmp_path, "clickhouse") as stack:
        yield stack.clickhouse


def client(url: str, **options: Any) -> Any:
    return clickhouse_connect.get_client(dsn=url, **options)


# ---- the stack --------------------------------------------------------------------------------------------


def test_every_part_serves_its_own_client(tmp_path: Path) -> None:
    """A new stack answers on all three addresses, each part in a session of its own on 127.0.0.1."""
    with EmbeddedStack(tmp_path) as stack:
        assert client(stack.clickhouse).command("SELECT 40 + 2") == 42
        with redis_client.Redis.from_url(stack.redis) as claims:
            assert claims.set("claim", "1", nx=True)
            assert not claims.set("claim", "2", nx=True)
        assert asyncio.run(_through_kafka(stack.kafka, 500)) == list(range(500))
        assert [part.name for part in stack.parts] == ["clickhouse", "redis", "kafka"]
        assert all(part.pid and os.getsid(part.pid) == part.pid for part in stack.parts)
        assert stack.failed_parts() == []
    assert (tmp_path / "log" / "broker.log").read_text()


async def _through_kafka(address: str, count: int) -> list[int]:
    """Send `count` records, read half in a group, commit, and read the rest with the group's next member."""
    producer = AIOKafkaProducer(bootstrap_servers=address)
    await producer.start()
    for number in range(count):
        await producer.send(
            "usage", str(number).encode(), key=str(number).encode(), timestamp_ms=1000 + number
        )
    await producer.stop()
    got: list[int] = []
    for goal in (count // 2, count):
        consumer = AIOKafkaConsumer(
            "usage",
            bootstrap_servers=address,
            group_id="readers",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            session_timeout_ms=2000,
            heartbeat_interval_ms=500,
        )
        await consumer.start()
        while len(got) < goal:
            fetched = await consumer.getmany(timeout_ms=500, max_records=goal - len(got))
            for record in (record for records in fetched.values() for record in records):
                got.append(int(record.value))
                assert record.timestamp == 1000 + int(record.value)
        await consumer.commit()
        await consumer.stop()
    return sorted(got)


def test_a_killed_part_comes_back_on_its_port(tmp_path: Path) -> None:
    """`kill` and `restart` concern one part; Redis and the log come back empty."""
    with stack_of(tmp_path, "redis", "kafka") as stack:
        before = {part.name: part for part in stack.parts}
        claims = redis_client.Redis.from_url(stack.redis)
        claims.set("claim", "1")
        for name in ("redis", "kafka"):
            stack.kill(name)
            stack.restart(name)
        after = {part.name: part for part in stack.parts}
        assert all(before[name].address == after[name].address for name in after)
        assert before["redis"].pid != after["redis"].pid
        assert before["clickhouse"] == after["clickhouse"] == ("clickhouse", "http://external", None)
        assert claims.get("claim") is None
        claims.close()
        with pytest.raises(KeyError):
            stack.kill("clickhouse")


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    """After SIGKILL of the parent no part is left, the directory is free and the ledger is whole."""
    program = (
        "import sys, time, json, pathlib, clickhouse_connect\n"
        "from tribill.embedded.stack import EmbeddedStack\n"
        "stack = EmbeddedStack(pathlib.Path(sys.argv[1])).start()\n"
        "c = clickhouse_connect.get_client(dsn=stack.clickhouse)\n"
        "c.command('CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a')\n"
        "c.insert('t', [[number] for number in range(1000)], ['a'])\n"
        "print('PIDS', json.dumps([part.pid for part in stack.parts]), flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        line = next(line for line in parent.stdout if line.startswith("PIDS"))
        pids = json.loads(line.removeprefix("PIDS"))
        assert len(pids) == 3
        parent.kill()
    wait_for(lambda: all(is_gone(pid) for pid in pids))
    with stack_of(tmp_path, "clickhouse") as stack:
        assert client(stack.clickhouse).command("SELECT sum(a) FROM t") == 499_500


def test_a_directory_has_one_stack(tmp_path: Path) -> None:
    """A second stack on the directory is refused while the first runs, and allowed after it."""
    with stack_of(tmp_path, "redis"), pytest.raises(DirectoryInUse, match=re.escape(str(tmp_path))):
        stack_of(tmp_path, "redis").start()
    with stack_of(tmp_path, "redis") as stack:
        assert stack.parts[1].pid


def test_a_part_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The error carries the end of the part's log; the other parts are stopped."""
    stack = stack_of(tmp_path, "redis", "kafka")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(stack.redis.split(":")[2].split("/")[0])))
        taken.listen()
        with pytest.raises(ProcessFailed, match=r"redis ended with exit code 1(.|\n)*Address already in use"):
            stack.start()
    with stack:
        assert [bool(part.pid) for part in stack.parts] == [False, True, True]


def test_a_part_that_ends_by_itself_is_reported(tmp_path: Path) -> None:
    """`failed_parts` names a part that somebody else killed."""
    with stack_of(tmp_path, "redis") as stack:
        pid = stack.parts[1].pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: bool(stack.failed_parts()))
        assert stack.failed_parts()[0].startswith("redis ended with exit code -9")


# ---- one process ------------------------------------------------------------------------------------------


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """`terminate` gives the child its time, then ends it; its output is in its log."""
    program = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    child = Process("deaf", [sys.executable, "-c", program], tmp_path)
    wait_for(lambda: child.log_tail() == "deaf")
    assert child.exit_code is None
    assert child.terminate(timeout=0.1) == -signal.SIGKILL
    assert child.terminate() == -signal.SIGKILL


def test_a_child_starts_from_the_main_thread_only(tmp_path: Path) -> None:
    """The kernel ties a child's death to the thread that started it."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread"):
        pool.submit(Process, "true", ["true"], tmp_path).result()


# ---- log generations --------------------------------------------------------------------------------------


def test_log_generations_count_starts(tmp_path: Path) -> None:
    """Each start after a clean end is the next generation."""
    assert log_generation.current(tmp_path) is None
    for generation in (1, 2, 3):
        assert log_generation.begin(tmp_path) == generation
        assert log_generation.current(tmp_path) == generation
        log_generation.end(tmp_path)
    stored = json.loads((tmp_path / "log-generation.json").read_text())
    assert stored == {"generation": 3, "state": "stopped"}


def test_a_lost_tail_must_be_accepted(tmp_path: Path) -> None:
    """After a kill a start is refused, naming the generation, until the loss is accepted."""
    log_generation.begin(tmp_path)
    with pytest.raises(log_generation.LostTail) as caught:
        log_generation.begin(tmp_path)
    assert caught.value.generation == 1
    assert log_generation.begin(tmp_path, accept_lost_tail=True) == 2


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"generation": 0, "state": "stopped"}', '{"generation": 1}']
)
def test_a_damaged_generation_file_is_an_error(tmp_path: Path, content: str) -> None:
    """No generation is guessed, not even when a lost tail is accepted."""
    (tmp_path / "log-generation.json").write_text(content)
    with pytest.raises(log_generation.DamagedGenerationFile):
        log_generation.begin(tmp_path, accept_lost_tail=True)


# ---- the ledger's endpoint --------------------------------------------------------------------------------


def test_acknowledged_inserts_survive_a_kill(tmp_path: Path) -> None:
    """Whatever was acknowledged before kill -9 is there; what was not is there as a whole or not at all."""
    rows = 2_000
    with stack_of(tmp_path, "clickhouse") as stack:
        client(stack.clickhouse).command(
            "CREATE TABLE t (batch UInt32, a UInt32) ENGINE = MergeTree ORDER BY a"
        )
        for _ in range(3):
            start = client(stack.clickhouse).command("SELECT max(batch) FROM t") + 1
            acknowledged: list[int] = []

            def insert(start: int = start, acknowledged: list[int] = acknowledged) -> None:
                writer = client(stack.clickhouse, query_retries=0)
                for batch in range(start, start + 10_000):
                    block = pa.table({"batch": pa.array([batch] * rows, pa.uint32()), "a": range(rows)})
                    try:
                        writer.insert_arrow("t", block)
                    except Exception:
                        return
                    acknowledged.append(batch)

            writer = threading.Thread(target=insert)
            writer.start()
            wait_for(lambda acknowledged=acknowledged: len(acknowledged) >= 20)  # type: ignore[misc]
            stack.kill("clickhouse")
            writer.join()
            stack.restart("clickhouse")
            found = dict(
                client(stack.clickhouse).query("SELECT batch, count() FROM t GROUP BY batch").result_rows
            )
            assert set(found.values()) == {rows}
            assert set(acknowledged) <= set(found)


def test_all_types_and_ways_of_inserting(ledger: str) -> None:
    """Rows, columns and Arrow go in and come out alike under every compression; written rows are counted."""
    columns = "id UInt64, name LowCardinality(String), amount Decimal(18, 6), at DateTime64(3, 'UTC')"
    client(ledger).command(
        f"CREATE TABLE t ({columns}, l Array(String), n Nullable(Int32)) ENGINE = MergeTree ORDER BY id"
    )
    names = ["id", "name", "amount", "at", "l", "n"]
    row = [
        1,
        "Ü\n\t'",
        Decimal("1.500000"),
        datetime(2026, 3, 29, 1, 30, 0, 123000, tzinfo=UTC),
        ["a", "b\\"],
        None,
    ]
    for number, compress in enumerate(("lz4", "zstd", "gzip", False)):
        writer = client(ledger, compress=compress, tz_mode="aware")
        writer.command("TRUNCATE TABLE t")
        assert writer.insert("t", [row], names).written_rows == 1
        assert writer.insert("t", [[value] for value in row], names, column_oriented=True).written_rows == 1
        arrow = writer.query_arrow("SELECT * FROM t")
        assert writer.insert_arrow("t", arrow).written_rows == 2
        assert writer.raw_insert("t", ["id"], b'{"id": 7}\n', fmt="JSONEachRow").written_rows == 1
        found = [list(stored) for stored in writer.query("SELECT * FROM t WHERE id = 1").result_rows]
        assert found == [row] * 4, number
    assert client(ledger).raw_query("SELECT 1 AS a FORMAT JSONEachRow") == b'{"a":1}\n'
    assert client(ledger).query_arrow("SELECT id FROM t WHERE id = 99").num_rows == 0
    assert client(ledger).query("SELECT id FROM t LIMIT 0").column_names == ("id",)
    assert client(ledger).query("SHOW TABLES").result_rows == [("t",)]
    with pytest.raises(DatabaseError) as refused:
        client(ledger).raw_insert("t", ["id"], b'{"id": 8}\n{"id": "x"}\n', fmt="JSONEachRow")
    assert refused.value.code == 27
    assert client(ledger).command("SELECT count() FROM t WHERE id = 8") == 0


def test_a_statement_sees_its_parameters_settings_and_database(ledger: str) -> None:
    """Bound values arrive exactly, also many; settings and database hold for one statement."""
    reader = client(ledger)
    values = {"a": ["x'", "y\n", "\\"], "s": "t\tb{b:UInt8}", "n": None, "d": Decimal("-1.250000")}
    sql = "SELECT {a:Array(String)}, {s:String}, {n:Nullable(String)}, {d:Decimal(18, 6)}"
    assert reader.query(sql, parameters=values).result_rows == [(values["a"], values["s"], None, values["d"])]
    for count in (10, 500, 50_000):  # in the URL, in the URL when it is long, as a form
        ids = [f"event {number}" for number in range(count)]
        assert reader.query("SELECT length({i:Array(String)})", parameters={"i": ids}).result_rows == [
            (count,)
        ]
    setting = "SELECT getSetting('max_threads')"
    assert reader.query(setting, settings={"max_threads": 1}).result_rows == [(1,)]
    assert reader.query(setting, settings={"max_threads": 3}).result_rows == [(3,)]
    assert reader.command("SELECT getSetting('async_insert')") == "false"
    assert reader.command("SELECT timezone()") == "UTC"
    reader.command("CREATE DATABASE billing")
    assert client(f"{ledger}/billing").command("SELECT currentDatabase()") == "billing"


def test_errors_carry_the_code(ledger: str) -> None:
    """Also an error in the middle of a result that is already on its way."""
    reader = client(ledger)
    for sql, code in (
        ("SELECT nope", 47),
        ("SELECT * FROM nope", 60),
        ("SELEC 1", 62),
        ("DROP TABLE nope", 60),
    ):
        with pytest.raises(DatabaseError) as refused:
            reader.command(sql)
        assert refused.value.code == code
    for compress in (True, False):
        late = client(ledger, compress=compress)
        with pytest.raises(StreamFailureError, match="throwIf"):
            late.query("SELECT throwIf(number = 3000000) FROM numbers(10000000)").result_rows


def test_a_long_result_streams(ledger: str) -> None:
    """Block by block; a reader that leaves early does no harm."""
    reader = client(ledger)
    with reader.query_row_block_stream("SELECT number FROM numbers(3000000)") as blocks:
        assert sum(len(block) for block in blocks) == 3_000_000
    with reader.query_row_block_stream("SELECT number FROM numbers(3000000)") as blocks:
        assert next(iter(blocks))
    with reader.query_arrow_stream("SELECT number FROM numbers(300000)") as batches:
        assert sum(batch.num_rows for batch in batches) == 300_000


def test_eight_clients_at_once(ledger: str) -> None:
    """Inserts and selects side by side: readers see whole inserts, and in the end all rows are there."""
    client(ledger).command("CREATE TABLE t (a UInt64, b UInt64) ENGINE = MergeTree ORDER BY a")
    block = pa.table({"a": pa.array(range(1_000), pa.uint64()), "b": pa.array([1] * 1_000, pa.uint64())})
    start = threading.Barrier(8)

    def work(_: int) -> None:
        own = client(ledger)
        start.wait()
        for _round in range(20):
            own.insert_arrow("t", block)
            ((rows, total),) = own.query("SELECT count(), sum(a) FROM t").result_rows
            assert rows % 1_000 == 0
            assert total == rows // 1_000 * 499_500

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert client(ledger).query("SELECT count(), sum(b) FROM t").result_rows == [(160_000, 160_000)]


def test_ping_answers_while_statements_are_slow(ledger: str) -> None:
    """Slow statements occupy threads, not the endpoint."""

    def slow(_: int) -> None:
        client(ledger).command("SELECT sleep(1) FORMAT Null")

    with ThreadPoolExecutor(8) as pool:
        running = pool.map(slow, range(8))
        time.sleep(0.5)
        started = time.monotonic()
        with urllib.request.urlopen(f"{ledger}/ping") as answer:
            assert answer.read() == b"Ok.\n"
        assert time.monotonic() - started < 0.5
        list(running)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sockets with such names")
def test_a_port_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts, or two installations that start at once, would be given the same one now and then."""
    monkeypatch.setattr(process, "_PORTS", range(20_000, 20_200))
    ours = {free_port() for _ in range(20)}
    assert len(ours) == 20
    ask = (
        "from tribill.embedded import process; process._PORTS = range(20_000, 20_200);"
        "print([process.free_port() for _ in range(20)])"
    )
    theirs = json.loads(subprocess.run([sys.executable, "-c", ask], capture_output=True, check=True, cwd=ROOT).stdout)
    assert len(set(theirs)) == 20
    assert not ours & set(theirs)


def test_requests_are_bounded_and_local(tmp_path: Path) -> None:
    """Too much data, plain or unpacked, is refused before it is stored; so is a web page."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tribill.embedded.clickhouse_server",
        "--directory",
        str(tmp_path / "data"),
    ]
    command += ["--port", str(port), "--max-request-mib", "1", "--exit-with-parent"]
    server = Process("small", command, tmp_path, environment={"PYTHONPATH": str(ROOT)})
    try:
        wait_for(lambda: clickhouse_server.is_ready(port))
        url = f"http://127.0.0.1:{port}"
        client(url).command("CREATE TABLE t (s String) ENGINE = MergeTree ORDER BY s")
        for compress in ("lz4", "zstd", "gzip", False):
            with pytest.raises(DatabaseError, match="413"):
                client(url, compress=compress).insert("t", [["x" * 2_000_000]], ["s"])
        assert client(url).command("SELECT count() FROM t") == 0
        for headers in ({"Origin": "https://example.org"}, {"Host": "example.org"}):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(urllib.request.Request(f"{url}/", b"SELECT 1", headers))
    finally:
        server.terminate()
