-- Up to which month a worker may have written accruals, also if it never came to say which positions they
-- count: whoever holds the partition after it keeps these months right (agents/charges.py).

ALTER TABLE charge_epochs
    ADD COLUMN IF NOT EXISTS horizon Int32 COMMENT 'the month up to which the batch''s rows are written ahead; 0 before the first'
