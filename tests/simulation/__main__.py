"""Histories from seeds, one after the other, until the minutes are over or one fails.

`python -m tests.simulation --minutes 10`; with `--seed N` one history, and all that happened in it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import count

from tests.simulation.history import survive

_AT_ONCE = 100


def _survive_all(first: int, until: float) -> tuple[int, int, str]:
    """Histories of seeds in a row: how many, how much happened in them, and what the first that fails says."""
    happened = 0
    for number in range(_AT_ONCE):
        if time.time() > until:
            return number, happened, ""
        try:
            happened += len(survive(first + number))
        except AssertionError as error:
            return number, happened, str(error)
    return _AT_ONCE, happened, ""


def main() -> int:
    """The exit code: 1 when a history has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1, help="how long (1)")
    parser.add_argument("--seed", type=int, help="one history alone")
    parser.add_argument("--first", type=int, help="the first seed (any)")
    options = parser.parse_args()
    if options.seed is not None:
        try:
            told = survive(options.seed)
            print(*told, f"seed {options.seed}: {len(told)} things happened, and all is right", sep="\n")
            return 0
        except AssertionError as error:
            print(error)
            return 1
    first = options.first if options.first is not None else random.randrange(10**6) * _AT_ONCE
    started = time.time()
    until, histories, happened = started + 60 * options.minutes, 0, 0
    print(f"histories from seed {first} on")
    with ProcessPoolExecutor() as pool:
        seeds = count(first, _AT_ONCE)
        waiting = {pool.submit(_survive_all, next(seeds), until) for _ in range(2 * (os.cpu_count() or 1))}
        while waiting:
            done = next(as_completed(waiting))
            waiting.remove(done)
            number, more, failure = done.result()
            histories += number
            happened += more
            if failure:
                pool.shutdown(wait=False, cancel_futures=True)
                print(failure)
                return 1
            if time.time() < until:
                waiting.add(pool.submit(_survive_all, next(seeds), until))
    minutes = (time.time() - started) / 60
    print(f"{histories} histories, {happened} things happened, {histories / minutes:.0f} a minute: all is right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
