"""Quix Streams: a streaming data frame that decodes, and adds up in Quix's own state, by the record's key."""

from decimal import Decimal
from typing import Any

from count import Count
from quixstreams import Application, State

count = Count()
app = Application(
    broker_address=count.broker,
    consumer_group="bench-quix",
    auto_offset_reset="earliest",
    loglevel="ERROR",
)


def add(usage: Any, state: State) -> tuple[str, Decimal]:
    """The practice and its sum; the state takes JSON."""
    total = Decimal(state.get("total", "0")) + usage["quantity"]
    state.set("total", str(total))
    return usage["ods_code"], total


frame = app.dataframe(app.topic(count.topic, value_deserializer="bytes", key_deserializer="bytes"))
frame = frame.apply(count.decode).apply(add, stateful=True)
frame.update(lambda practice: count.summed(*practice))
app.run()
