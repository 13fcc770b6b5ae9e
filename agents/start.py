"""What is checked before an agent takes its first record: that the log is the one the ledger knows."""

from __future__ import annotations

from agents.context import Context
from streams.agent import Agent
from streams.settings import SettingsError
from streams.topics import USAGE_ACCEPTED, Broker, configurations


def check_log(agent: Agent, context: Context) -> None:
    """Raises SettingsError where the agent's topics are not what settings and ledger say of them.

    A topic that was made anew ends before positions that the ledger has; read on, its records would
    pass for ones that are known (DESIGN promise 2).
    """
    settings, broker = context.settings, Broker(context.settings)
    places = broker.partitions(agent.topics())
    for topic in agent.topics():
        there, wanted = sum(place[0] == topic for place in places), configurations(settings)[topic][0]
        if there != wanted:
            raise SettingsError(
                f"the topic {topic} has {there} partitions, the setting `partitions` says {wanted}: set "
                f"TRIBILL_PARTITIONS to what the topics have; another number needs a new TRIBILL_LOG_GENERATION"
            )
    seen = context.ledger.positions_seen(settings.log_generation)
    if USAGE_ACCEPTED in agent.topics():
        seen |= context.ledger.positions_accepted(settings.log_generation)
    ends = broker.end_offsets(agent.topics())
    for (topic, partition), end in ends.items():
        known = seen.get(f"{topic}/{partition}", 0)
        if end < known:
            raise SettingsError(
                f"the topic {topic} ends at offset {end} in partition {partition}, but the ledger has records of it "
                f"up to {known} in log generation {settings.log_generation}: it was made anew.  Raise "
                f"TRIBILL_LOG_GENERATION to {settings.log_generation + 1} on all workers and have sent again what "
                f"the old topic still held"
            )
