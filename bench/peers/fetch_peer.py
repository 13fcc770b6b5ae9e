"""aiokafka alone: what can be fetched from the broker when nothing is done with it."""

import asyncio

from aiokafka import AIOKafkaConsumer
from count import Count


async def main() -> None:
    """Counts what `getmany` gives."""
    count = Count()
    consumer = AIOKafkaConsumer(
        count.topic, bootstrap_servers=count.broker, group_id="bench-fetch", auto_offset_reset="earliest"
    )
    await consumer.start()
    fetched = False
    while True:
        if not fetched:
            count.begin()
        records = await consumer.getmany(timeout_ms=10, max_records=5_000)
        fetched = fetched or bool(records)
        count.seen(sum(map(len, records.values())))


asyncio.run(main())
