"""Quix Streams without its state: a streaming data frame that decodes and adds up in a dictionary."""

from count import Count
from quixstreams import Application

count = Count()
app = Application(
    broker_address=count.broker,
    consumer_group="bench-quix-dict",
    auto_offset_reset="earliest",
    loglevel="ERROR",
)
frame = app.dataframe(app.topic(count.topic, value_deserializer="bytes", key_deserializer="bytes"))
frame.apply(count.decode).update(count.add)
app.run()
