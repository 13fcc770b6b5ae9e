"""The independent test oracle of the rules: see `oracle.py`."""
