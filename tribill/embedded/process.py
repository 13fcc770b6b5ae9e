"""One child process that never outlives its parent, with its output in a log file.

A part of the embedded stack must not stay behind when tribill is killed, however it is killed. On Linux the
kernel ends the child (`PR_SET_PDEATHSIG`); elsewhere our own children notice that their standard input, a
pipe whose other end only the parent holds, has closed (`exit_with_parent`).
"""

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# Loaded here, not in the child: between fork and exec a child of a threaded parent must not load or lock
# anything.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

# Below the range from which kernels take the ports of outgoing connections (Linux 32768, others 49152): a
# part that is restarted finds its port still free.
_PORTS = range(20_000, 32_000)
#: Between a port's choice and its use is a second or more: the last ports chosen here, each a socket of its name.
_CHOSEN_AT_MOST = 64
_chosen: deque[socket.socket] = deque()


class ProcessFailed(RuntimeError):
    """A child process ended, or was not ready in time. The message carries the tail of its log."""


class Process:
    """A child process in a session of its own, so that a terminal's Ctrl-C reaches only the parent.

    `name` names the log `<directory>/log/<name>.log` (standard output and error together); the log of the run
    before is kept as `<name>.log.1`. `environment` is added to the parent's. `inherit` are file descriptors
    that the child keeps open. Construct it in the main thread: the kernel's death signal follows the thread
    that started the child, not its process. Raises OSError when the program cannot be started, RuntimeError
    in another thread.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        *,
        environment: dict[str, str] | None = None,
        inherit: Sequence[int] = (),
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(f"start {name} from the main thread: it would die with the thread that starts it")
        self.name = name
        self.log = directory / "log" / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        parent = os.getpid()
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603 - the commands are our own
                list(command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                pass_fds=tuple(inherit),
                preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509 - one system call, loaded before
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, minus the signal's number when a signal ended the child, None while it runs."""
        return self._child.poll()

    def log_tail(self, lines: int = 20) -> str:
        """The last `lines` lines that the child wrote."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - 16_384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """End the child by SIGKILL, at once, and wait until it is gone."""
        self._child.kill()
        self._reap(None)

    def ask_to_end(self) -> None:
        """Ask the child to end by SIGTERM and return at once, so that several end side by side."""
        self._child.terminate()

    def terminate(self, timeout: float = 5.0) -> int:
        """Ask the child to end by SIGTERM, kill it after `timeout` seconds; return the exit code.
        Idempotent."""
        self._child.terminate()
        try:
            return self._reap(timeout)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._reap(None)

    def _reap(self, timeout: float | None) -> int:
        code = self._child.wait(timeout)
        if self._child.stdin is not None:
            self._child.stdin.close()
        return code


def _die_with(parent: int) -> None:
    """Runs in the child before exec: have the kernel kill it when the thread that started it ends."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the call: no signal will come
            os._exit(1)


def exit_with_parent() -> None:
    """In a child that `Process` started: end this process at once when the parent is gone, on any system."""

    def wait_for_end_of_input() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait_for_end_of_input, name="exit-with-parent", daemon=True).start()


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on now, and that no program of ours is about to take.

    A program of somebody else may take it before you do.
    """
    # A seeded test run must not choose the same ports again.
    for port in random.SystemRandom().sample(_PORTS, 100):
        chosen = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                if sys.platform == "linux":  # only there are names that nobody sees and that end with their owner
                    chosen.bind(f"\0tribill-port-{port}")
                probe.bind(("127.0.0.1", port))
            except OSError:
                chosen.close()
                continue
        _chosen.append(chosen)
        if len(_chosen) > _CHOSEN_AT_MOST:
            _chosen.popleft().close()
        return port
    raise OSError("no free TCP port between 20000 and 32000 on 127.0.0.1")
