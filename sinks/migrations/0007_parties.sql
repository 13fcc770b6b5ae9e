-- Who stands on documents, and the statements of a close.

CREATE TABLE IF NOT EXISTS parties
(
    import_id String COMMENT 'in the order of the imports: its instant and the digest of its rows',
    row UInt32,
    body String COMMENT 'JSON, as it was said'
)
ENGINE = ReplacingMergeTree
ORDER BY (import_id, row);

ALTER TABLE cuts
    ADD COLUMN IF NOT EXISTS issued_at_ms Int64 COMMENT 'the issue time of the documents',
    ADD COLUMN IF NOT EXISTS party_imports Array(String) COMMENT 'the imports of party data known at the cut';

CREATE TABLE IF NOT EXISTS statements
(
    period String,
    kind LowCardinality(String) COMMENT 'practice, ordering-party, supplier or control',
    code String,
    net_pence Int256,
    body String COMMENT 'JSON'
)
ENGINE = ReplacingMergeTree
ORDER BY (period, kind, code)
