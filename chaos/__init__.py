"""The chaos harness: a real installation that bills a book while it is being broken, judged by the oracle.

`python -m chaos --help` says how to use it, docs/guarantees.md what it shows.
"""
