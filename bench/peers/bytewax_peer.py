"""Bytewax: a dataflow of one worker that decodes, and adds up in Bytewax's own state, by practice."""

from decimal import Decimal
from typing import Any

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSource
from bytewax.dataflow import Dataflow
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import cluster_main
from count import Count

count = Count()


class Sums(StatelessSinkPartition):
    """The end of the flow: a batch of practices' sums."""

    def write_batch(self, items: list) -> None:
        """Takes the sums."""
        for code, total in items:
            count.summed(code, total)


class Sink(DynamicSink):
    """A sink of sums."""

    def build(self, _step_id: str, _worker_index: int, _worker_count: int) -> Sums:
        """The sink of a worker."""
        return Sums()


def add(total: Decimal | None, usage: Any) -> tuple[Decimal, Decimal]:
    """The new state, and what goes on."""
    total = usage["quantity"] + (total or 0)
    return total, total


flow = Dataflow("bench")
records = op.input("usage", flow, KafkaSource([count.broker], [count.topic]))
usages = op.map("decode", records, lambda record: count.decode(record.value))
by_practice = op.key_on("practice", usages, lambda usage: usage["ods_code"])
op.output("sums", op.stateful_map("add", by_practice, add), Sink())
cluster_main(flow, [], 0)
