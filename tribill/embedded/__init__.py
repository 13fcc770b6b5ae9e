"""The embedded stack: log, ledger and claims on one machine, from wheels, without root or Docker."""
