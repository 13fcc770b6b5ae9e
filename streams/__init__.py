"""The Kafka edge: settings, topics, codecs, the batching Faust transport and the worker of a role."""
