"""What an agent is to its worker: it does batches, and what time alone asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from streams.batch import Batch
from streams.topics import Place


class Agent(ABC):
    """One agent.  `role` names its worker and, as `tribill-<role>`, its consumer group."""

    role: ClassVar[str]
    #: So many of it share a worker's partitions out, so that one has work while another waits for a sink.
    lanes: ClassVar[int] = 1
    #: `idle` is called so often while no batch is in hand; 0: never.
    idle_seconds: ClassVar[float] = 0

    @abstractmethod
    def topics(self) -> Sequence[str]:
        """What it reads."""

    @abstractmethod
    def do(self, batch: Batch) -> None:
        """Does a batch as a whole, and returns only when all of it is done.

        Raises one of `streams.worker.SINK_ERRORS` when it may work the next time, NotYet when
        something else must happen first.  It may be handed the same records again.
        """

    def idle(self, committed: Mapping[Place, int]) -> None:  # noqa: B027  # most agents have nothing to do
        """Does what time asks for; given the partitions that the worker holds and what is committed of each.

        Raises as `do`; then it is called again at its next turn.
        """
