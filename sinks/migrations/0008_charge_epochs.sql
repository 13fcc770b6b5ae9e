-- Who writes the accruals of a partition, and how far it has come: so that a worker that has lost its
-- partition writes nothing that its successor does not write, too (agents/charges.py).

CREATE TABLE IF NOT EXISTS charge_epochs
(
    charge_partition Int32,
    epoch UInt64 COMMENT 'one worker''s hold on the partition: the highest has it. A count * 2**32 + a random number',
    generation UInt32,
    first_offset Int64 COMMENT 'in charge-inputs, of the batch that it writes now, or has written last',
    end_offset Int64 COMMENT 'of that batch; -1 before the first'
)
ENGINE = ReplacingMergeTree(end_offset)
ORDER BY (charge_partition, epoch);

ALTER TABLE accrual_positions
    ADD COLUMN IF NOT EXISTS epoch UInt64 COMMENT 'of the worker that wrote them; 0 before there were any',
    MODIFY ORDER BY (charge_partition, generation, offset, epoch)
