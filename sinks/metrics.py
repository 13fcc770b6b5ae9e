"""The figures that an operator asks for first, as Prometheus metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RECORDS = Counter("tribill_records", "Records that an agent has done, by outcome", ["agent", "outcome"])
USAGE = Counter("tribill_usage", "Usage readings, by outcome", ["outcome"])
BATCH_SECONDS = Histogram(
    "tribill_batch_seconds",
    "From taking a batch to its acknowledgement",
    ["agent"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
SINK_RETRIES = Counter("tribill_sink_retries", "Batches tried again because a sink failed", ["agent", "sink"])
SINK_FAILING = Gauge("tribill_sink_failing", "1 while a sink fails again and again", ["agent", "sink"])
LAG = Gauge("tribill_lag_records", "Records that an agent has still to do", ["agent", "topic"])
WATERMARK = Gauge(
    "tribill_watermark_timestamp_seconds",
    "Broker time of the last record done",
    ["agent", "topic", "partition"],
)
DEAD_LETTERS = Gauge("tribill_dead_letters", "Records in the dead letters", ["agent"])
SUSPENSE_QUANTITY = Gauge("tribill_suspense_quantity", "Usage that no contract covers yet")
SUSPENSE_SERVICES = Gauge("tribill_suspense_services", "Items at practices with usage that no contract covers")
ACCRUAL_DRIFT = Gauge("tribill_accrual_drift_pence", "Accruals less what the ledger gives at their positions")
ACCRUED = Gauge("tribill_accrued_pence", "Accrued up to now, by month", ["month"])
SPEND_RATE = Gauge("tribill_spend_pence_per_second", "What time charges add each second now")
HELD = Gauge("tribill_held_pence", "Held until M2 at the last close")
CLOSED_PERIOD = Gauge("tribill_closed_period_timestamp_seconds", "End of the last closed period")
RECONCILED = Gauge("tribill_reconciled_timestamp_seconds", "When all accruals were compared with the ledger last")
DRIFT = Gauge("tribill_drift_pence", "Accruals less the ledger, without signs, as compared last", ["partition"])
DRIFT_UNITS = Gauge("tribill_drift_quantity", "Usage in accruals less the ledger's, without signs", ["partition"])
DRIFT_ROWS = Gauge("tribill_drift_line_months", "Months of lines of which the accrual differs", ["partition"])
REPAIRS = Counter("tribill_repairs", "Months of lines that reconciliation had rated again")
