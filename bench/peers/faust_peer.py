"""A Faust agent as its documentation writes it: event by event, over the default transport."""

import sys

import faust
from count import Count

count = Count()
app = faust.App(
    "bench-faust",
    broker=f"kafka://{count.broker}",
    store="memory://",
    topic_disable_leader=True,
    web_enabled=False,
    consumer_auto_offset_reset="earliest",
)
topic = app.topic(count.topic, value_serializer="raw", key_serializer="raw")


@app.agent(topic)
async def usage(stream: faust.Stream) -> None:
    """Decodes and adds each record."""
    async for value in stream:
        count.add(count.decode(value))


sys.argv = ["faust", "worker", "--loglevel=error"]
app.main()
