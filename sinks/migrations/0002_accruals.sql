-- What has accrued: a row a charge line and month, the newest position wins.
-- Money is exact pence: `exact_pence` as a fraction in text, the rest to 18 places for display.

CREATE TABLE IF NOT EXISTS accruals
(
    order_number String,
    item_id LowCardinality(String),
    ods_code String,
    month Int32 COMMENT 'year * 12 + month - 1',
    version UInt64 COMMENT 'log generation * 2**48 + end offset in charge-inputs',
    charge_partition Int32,
    supplier_id LowCardinality(String),
    m2 Nullable(Date32) COMMENT 'payable from the period that this day lies in; one-offs at once',
    one_off Bool,
    exact_pence String,
    charge_pence Decimal(76, 18),
    quantity_micros Int128 COMMENT 'usage counted',
    time_from Array(Date32),
    time_to Array(Date32),
    time_day_pence Array(Decimal(76, 18)) COMMENT 'the charge of each day in [time_from, time_to)',
    days Array(Date32),
    days_pence Array(Decimal(76, 18)) COMMENT 'what falls on single days: usage, one-offs, credits',
    groups String COMMENT 'the split by waterfall, ordering party and acceptance, JSON',
    wanted_party Array(String),
    wanted_exact_pence Array(String) COMMENT 'what would draw on the party''s allocation, fractions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (order_number, item_id, ods_code, month);

CREATE TABLE IF NOT EXISTS accrual_positions
(
    charge_partition Int32,
    generation UInt32,
    offset Int64 COMMENT 'end offset in charge-inputs',
    positions Map(String, Int64) COMMENT 'topic/partition to the end offset that is counted',
    horizon Int32 COMMENT 'the month up to which every line is written ahead'
)
ENGINE = ReplacingMergeTree
ORDER BY (charge_partition, generation, offset);

CREATE TABLE IF NOT EXISTS allocations_drawn
(
    ordering_party String,
    month Int32,
    version UInt64 COMMENT 'log generation * 2**48 + end offset in funding-inputs',
    allocation_pence Decimal(76, 18),
    wanted_pence Decimal(76, 18),
    coverage String COMMENT 'the fraction of what is wanted that is covered',
    coverage_decimal Decimal(76, 18),
    left_pence Decimal(76, 18)
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (ordering_party, month)
