-- What was said, one row a record for ever.  Only the same record inserted again collapses:
-- no version column, and the position is part of the key.

CREATE TABLE IF NOT EXISTS usage
(
    ods_code String,
    supplier_id LowCardinality(String),
    id String,
    revision Int64,
    generation UInt32 COMMENT 'life of the log that the positions belong to',
    topic LowCardinality(String),
    partition Int32,
    offset Int64,
    `index` Int32 COMMENT 'within a UsageBatch',
    broker_timestamp_ms Int64,
    accepted_partition Int32 COMMENT 'in usage-accepted',
    accepted_offset Int64,
    item_id LowCardinality(String),
    quantity_micros Int64,
    occurred_at DateTime64(6, 'UTC'),
    day Date32 COMMENT 'London day of occurred_at'
)
ENGINE = ReplacingMergeTree
ORDER BY (ods_code, supplier_id, id, revision, generation, topic, partition, offset, `index`, accepted_offset);

CREATE TABLE IF NOT EXISTS contract_changes
(
    order_number String,
    generation UInt32,
    partition Int32,
    offset Int64,
    id String,
    kind LowCardinality(String),
    outcome LowCardinality(String) COMMENT 'accepted or refused',
    reason String,
    body String COMMENT 'the change in its interchange form, JSON',
    broker_timestamp_ms Int64
)
ENGINE = ReplacingMergeTree
ORDER BY (order_number, generation, partition, offset);

CREATE TABLE IF NOT EXISTS reference_changes
(
    code String,
    generation UInt32,
    partition Int32,
    offset Int64,
    id String,
    kind LowCardinality(String),
    outcome LowCardinality(String),
    reason String,
    body String,
    broker_timestamp_ms Int64
)
ENGINE = ReplacingMergeTree
ORDER BY (code, generation, partition, offset);

CREATE TABLE IF NOT EXISTS attestations
(
    supplier_id String,
    period String,
    generation UInt32,
    offset Int64,
    count Int64,
    quantity_micros Int64
)
ENGINE = ReplacingMergeTree
ORDER BY (period, supplier_id, generation, offset);

CREATE TABLE IF NOT EXISTS dead_letters
(
    agent LowCardinality(String),
    generation UInt32,
    topic LowCardinality(String),
    partition Int32,
    offset Int64,
    `index` Int32,
    reason String,
    field String,
    key String,
    value String COMMENT 'the original bytes',
    broker_timestamp_ms Int64,
    written_at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree
ORDER BY (agent, generation, topic, partition, offset, `index`)
