"""Starts Apache Kafka 4.1 (KRaft, one broker or several) from its jars, where `TRIBILL_KAFKA_JARS` names them.

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
_START_SECONDS = 90

_PROPERTIES = """\
process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
offsets.topic.replication.factor={count}
transaction.state.log.replication.factor={count}
transaction.state.log.min.isr=1
min.insync.replicas={in_sync}
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=4000
broker.heartbeat.interval.ms=500
auto.create.topics.enable=false
message.max.bytes=20000000
"""


class Brokers:
    """Brokers 0 and on of one cluster, each of which can be killed and started again; logs in `directory`."""

    def __init__(self, directory: Path, count: int = 1, jars: str = JARS) -> None:
        self._directory = directory
        self._java = ["java", "-Xmx512m", "-cp", f"{jars}/*"]
        self._processes: dict[int, Process] = {}
        taken: set[int] = set()
        while len(taken) < 2 * count:
            taken.add(free_port())
        self.ports, controllers = sorted(taken)[:count], sorted(taken)[count:]
        tool = [*self._java, "kafka.tools.StorageTool"]
        cluster = subprocess.run([*tool, "random-uuid"], capture_output=True, text=True, check=True).stdout.split()[-1]
        for node, (port, controller) in enumerate(zip(self.ports, controllers, strict=True)):
            text = _PROPERTIES.format(
                node=node,
                voters=",".join(f"{each}@127.0.0.1:{of}" for each, of in enumerate(controllers)),
                port=port,
                controller=controller,
                data=directory / f"kafka{node}",
                count=count,
                in_sync=min(2, count),
            )
            self._properties(node).write_text(text)
            command = [*tool, "format", "-t", cluster, "-c", str(self._properties(node))]
            subprocess.run(command, capture_output=True, check=True)

    @property
    def bootstrap(self) -> str:
        """The addresses, as clients take them."""
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def start(self, node: int) -> None:
        """Starts a broker (again) and returns at once."""
        command = [*self._java, "kafka.Kafka", str(self._properties(node))]
        self._processes[node] = Process(f"kafka{node}", command, self._directory)

    def kill(self, node: int) -> None:
        """Ends a broker by SIGKILL."""
        self._processes[node].kill()

    def wait(self, seconds: float = _START_SECONDS) -> None:
        """Returns when all listen.  Raises RuntimeError with the end of the log of one that does not."""
        deadline = time.monotonic() + seconds
        for node, port in enumerate(self.ports):
            broker = self._processes[node]
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if broker.exit_code is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Kafka's broker {node} does not listen:\n{broker.log_tail()}")
                time.sleep(0.2)

    def stop(self) -> None:
        """Ends all brokers."""
        for broker in self._processes.values():
            broker.ask_to_end()
        for broker in self._processes.values():
            broker.terminate(20)

    def _properties(self, node: int) -> Path:
        return self._directory / f"server{node}.properties"


@contextmanager
def kafka(directory: Path, jars: str = JARS) -> Iterator[str]:
    """A running broker's address; its log lives in `directory` and ends with the context."""
    brokers = Brokers(directory, jars=jars)
    try:
        brokers.start(0)
        brokers.wait()
        yield brokers.bootstrap
    finally:
        brokers.stop()
