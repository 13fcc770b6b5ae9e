-- What operators did and what workers found: replays of dead letters, rounds of reconciliation, and what
-- the log and the schemas were when they were first seen.

CREATE TABLE IF NOT EXISTS replays
(
    agent LowCardinality(String),
    generation UInt32,
    topic LowCardinality(String),
    partition Int32,
    offset Int64,
    `index` Int32,
    content UInt64 COMMENT 'sipHash64 of topic, value and reason: the same record refused again is the same',
    replayed_at DateTime64(3, 'UTC') DEFAULT now64(3),
    replayed_by String,
    edited Bool COMMENT 'other content was sent than what was refused'
)
ENGINE = MergeTree
ORDER BY (agent, generation, content, replayed_at);

CREATE TABLE IF NOT EXISTS reconciliations
(
    charge_partition Int32,
    generation UInt32,
    offset Int64 COMMENT 'in charge-inputs, at which accruals were compared with the ledger',
    compared UInt64 COMMENT 'months of lines',
    drifting UInt64 COMMENT 'of them those that differ',
    drift_pence Decimal(76, 18) COMMENT 'the sum of the differences without their signs',
    drift_micros Int256,
    at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree(at)
ORDER BY charge_partition;

CREATE TABLE IF NOT EXISTS known_topics
(
    generation UInt32,
    topic String,
    topic_id String COMMENT 'as the broker had it when a worker first started on the topic in this generation'
)
ENGINE = ReplacingMergeTree
ORDER BY (generation, topic, topic_id);

CREATE TABLE IF NOT EXISTS known_schemas
(
    id UInt32,
    name String,
    digest String COMMENT 'SHA-256 of the schema as released'
)
ENGINE = ReplacingMergeTree
ORDER BY (id, name, digest)
