-- What documents came from: the cause of each adjustment, the evidence of each document, what drew on allocations.

CREATE TABLE IF NOT EXISTS adjustments
(
    period String,
    order_number String,
    item_id LowCardinality(String),
    ods_code String,
    supplier_id LowCardinality(String),
    payer String,
    month Int32,
    cause String,
    is_release Bool COMMENT 'held until M2 before: no correction',
    original_document String COMMENT 'the first that invoiced the key; empty where none did, and of a release'
)
ENGINE = ReplacingMergeTree
ORDER BY (period, order_number, item_id, ods_code, supplier_id, payer, month);

CREATE TABLE IF NOT EXISTS evidence
(
    period String,
    number String COMMENT 'of the document',
    body String COMMENT 'JSON, as the file has it' CODEC(ZSTD(3))
)
ENGINE = ReplacingMergeTree
ORDER BY (period, number);

CREATE TABLE IF NOT EXISTS allocations_wanted
(
    period String COMMENT 'the close that derived it',
    ordering_party String,
    month Int32,
    pence String COMMENT 'exact: a whole number or a fraction of two'
)
ENGINE = ReplacingMergeTree
ORDER BY (period, ordering_party, month)
