"""Bytewax without its state: one worker decodes and adds up in a dictionary that no other worker could see."""

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSource
from bytewax.dataflow import Dataflow
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import cluster_main
from count import Count

count = Count()


class Adding(StatelessSinkPartition):
    """The end of the flow: adds a batch of records."""

    def write_batch(self, items: list) -> None:
        """Adds them."""
        for usage in items:
            count.add(usage)


class Sink(DynamicSink):
    """A sink that adds."""

    def build(self, _step_id: str, _worker_index: int, _worker_count: int) -> Adding:
        """The sink of a worker."""
        return Adding()


flow = Dataflow("bench")
records = op.input("usage", flow, KafkaSource([count.broker], [count.topic]))
op.output("add", op.map("decode", records, lambda record: count.decode(record.value)), Sink())
cluster_main(flow, [], 0)
