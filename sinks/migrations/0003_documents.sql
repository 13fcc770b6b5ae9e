-- What was closed: cuts, periods, rows and documents.  Nothing here is ever changed.

CREATE TABLE IF NOT EXISTS cuts
(
    period String,
    generation UInt32,
    offset Int64 COMMENT 'of CutFixed in period-events; the first stands',
    cut Map(String, Int64) COMMENT 'topic/partition to end offset'
)
ENGINE = ReplacingMergeTree
ORDER BY (period, generation, offset);

CREATE TABLE IF NOT EXISTS close_requests
(
    period String,
    generation UInt32,
    offset Int64,
    outcome LowCardinality(String) COMMENT 'refused, waiting or closed',
    detail String,
    at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree(at)
ORDER BY (period, generation, offset);

CREATE TABLE IF NOT EXISTS document_rows
(
    period String,
    kind LowCardinality(String) COMMENT 'invoiced or held',
    order_number String,
    item_id LowCardinality(String),
    ods_code String,
    supplier_id LowCardinality(String),
    payer String,
    month Int32,
    pence Int256,
    vat_rate_micros Int64 COMMENT 'the rate that the row was invoiced at; 0 of what is held'
)
ENGINE = ReplacingMergeTree
ORDER BY (period, kind, order_number, item_id, ods_code, supplier_id, payer, month);

CREATE TABLE IF NOT EXISTS documents
(
    number String,
    period String,
    payer String,
    supplier_id String,
    kind LowCardinality(String) COMMENT 'invoice or credit-note',
    net_pence Int256,
    vat_pence Int256,
    body String COMMENT 'JSON'
)
ENGINE = ReplacingMergeTree
ORDER BY (period, number);

CREATE TABLE IF NOT EXISTS periods
(
    period String,
    month Int32,
    generation UInt32,
    documents UInt32,
    rows UInt64,
    net_pence Int256,
    held_pence Int256,
    drift_pence Decimal(76, 18),
    closed_at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree
ORDER BY period
