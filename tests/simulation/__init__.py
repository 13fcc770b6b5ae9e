"""The agents in random interleavings, thousands of histories a minute: seeds, faults, and what must hold after each."""
