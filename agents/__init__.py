"""One file an agent: decode, rate, sink, in numbered steps.

Each agent is a worker and consumer group of its own (`tribill worker ROLE`).  All of them take
batches of one partition in order, and may be handed a batch again; every write is absolute.
"""
