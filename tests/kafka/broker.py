"""Starts Apache Kafka 4.1 (KRaft, one broker) from its jars, where `TRIBILL_KAFKA_JARS` names them.

`mvn -f tests/kafka/pom.xml dependency:copy-dependencies -DoutputDirectory=DIR` fetches the jars.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tribill.embedded.process import Process, free_port

JARS = os.environ.get("TRIBILL_KAFKA_JARS", "")

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
message.max.bytes=20000000
"""


@contextmanager
def kafka(directory: Path, jars: str = JARS) -> Iterator[str]:
    """A running broker's address; its log lives in `directory` and ends with the context."""
    port, controller = free_port(), free_port()
    properties = directory / "server.properties"
    properties.write_text(_PROPERTIES.format(port=port, controller=controller, data=directory / "kafka"))
    java = ["java", "-Xmx512m", "-cp", f"{jars}/*"]
    tool = [*java, "kafka.tools.StorageTool"]
    cluster = subprocess.run([*tool, "random-uuid"], capture_output=True, text=True, check=True).stdout.split()[-1]
    subprocess.run([*tool, "format", "-t", cluster, "-c", str(properties)], capture_output=True, check=True)
    broker = Process("kafka", [*java, "kafka.Kafka", str(properties)], directory)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert broker.exit_code is None, broker.log_tail()
            assert time.monotonic() < deadline, broker.log_tail()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        broker.terminate(20)
