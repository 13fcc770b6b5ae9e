"""Python's garbage collector, held back while an agent makes very many objects at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Rating makes millions of objects and no cycles; the collector would look at all of them many times."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
