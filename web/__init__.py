"""What people look at: the live page, its events, and the national figures for Prometheus.  Read only."""
