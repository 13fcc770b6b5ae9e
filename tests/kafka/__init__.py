"""Apache Kafka itself, for the tests that an embedded broker is not enough for."""
