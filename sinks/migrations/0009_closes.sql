-- What was decided at a close: whether it may issue its documents, and who accepted what.

ALTER TABLE cuts
    ADD COLUMN IF NOT EXISTS specimen Bool COMMENT 'parties that nobody has described are invented';

ALTER TABLE close_requests
    ADD COLUMN IF NOT EXISTS accepted Array(String) COMMENT 'what stops this close no more',
    ADD COLUMN IF NOT EXISTS requested_by String;

CREATE TABLE IF NOT EXISTS close_decisions
(
    period String,
    generation UInt32,
    offset Int64 COMMENT 'of the CutFixed that it is about',
    outcome LowCardinality(String) COMMENT 'go: its documents are issued; refused: its cut counts no more',
    drift_pence Decimal(76, 18),
    accepted Array(String) COMMENT 'what was found and did not stop it, in words',
    requested_by String,
    at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree
ORDER BY (period, generation, offset, outcome)
