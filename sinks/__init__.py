"""Where results go: ClickHouse (ledger, accruals, documents), Redis (claims), Prometheus."""
