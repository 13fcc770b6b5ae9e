"""`python -m chaos`: breaks an installation from a seed, and says what it came to.

Ends with 0 and `faults survived: N, difference: 0.00`; with 1 and the command that repeats it when something
differs; with 2 (unverified) when nothing can be said: no Java, no Kafka, an error of the checker itself, or fewer
faults than `--at-least`.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from chaos.checker import pounds_text
from chaos.planted import PLANTS, failed
from chaos.run import Report, Run, Stalled, wanted, wanted_of
from chaos.stack import NotStarted, Stack, clocks_can_jump
from tests.kafka.broker import JARS

UNVERIFIED = 2
_FAULTS_A_MINUTE = 12


def main() -> int:
    """The command; returns the exit code."""
    asked = _arguments()
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(UNVERIFIED))
    if not JARS or shutil.which("java") is None:
        print("unverified: Apache Kafka needs Java, and TRIBILL_KAFKA_JARS must name its jars (tests/kafka/broker.py)")
        return UNVERIFIED
    if not clocks_can_jump():
        print("libfaketime is not installed: no clock will jump")
    directory = Path(tempfile.mkdtemp(prefix="tribill-chaos-"))
    print(f"seed {asked.seed}; logs in {directory}\nthe same again: {_again(asked)}", flush=True)
    code = _run(asked, directory)
    if asked.plant and failed(directory):
        print(f"unverified: with {asked.plant} an agent died of an error: does chaos/planted.py fit the product?")
        code = UNVERIFIED
    if asked.plant and code != UNVERIFIED:
        print(f"planted {asked.plant}: {'caught' if code else 'NOT caught'}")
        code = 0 if code else 1
    if code == 0 and not asked.keep:
        shutil.rmtree(directory, ignore_errors=True)
    return code


def _run(asked: argparse.Namespace, directory: Path) -> int:
    began = time.monotonic()

    def say(what: str) -> None:
        if what:
            print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)

    plant = PLANTS.get(asked.plant)
    count = asked.faults or int(asked.minutes * _FAULTS_A_MINUTE)
    try:
        with Stack(directory, asked.brokers, asked.plant) as stack:
            say("all workers are ready")
            until = 0 if asked.faults or plant else time.monotonic() + asked.minutes * 60
            run = wanted_of(asked.seed, plant) if plant else wanted(asked.seed, count)
            report = Run(stack, run, say).run(until)
    except Stalled as error:
        print(f"seed {asked.seed}: {error}\nthe same again: {_again(asked)}")
        return 1
    except NotStarted as error:
        print(f"unverified: {error}")
        return UNVERIFIED
    except Exception:
        traceback.print_exc(file=sys.stdout)
        print(f"unverified: seed {asked.seed}: an error of the harness or of the checker, see above")
        return UNVERIFIED
    return _tell(report, asked)


def _again(asked: argparse.Namespace) -> str:
    """The command that makes the same book and the same plan: both depend on how many faults there shall be."""
    long = f"FAULTS={asked.faults}" if asked.faults else f"MINUTES={asked.minutes:g}"
    return f"make chaos SEED={asked.seed} {long} BROKERS={asked.brokers}"


def _tell(report: Report, asked: argparse.Namespace) -> int:
    checked = ", ".join(f"{count} {what}" for what, count in report.verdict.checked.items())
    print(f"checked: {checked}")
    for kind, count in sorted(report.happened.items()):
        print(f"  {count:4} x {kind}")
    print(f"  {report.ended:4} times a worker ended by itself and was started again")
    print(f"  {report.unhealthy:4} times a worker said that it stands still and was killed and started again")
    for difference in report.verdict.differences:
        print(f"DIFFERENCE {difference}")
    if report.verdict.differences or report.verdict.pounds:
        pounds = pounds_text(report.verdict.pounds)
        print(f"seed {asked.seed}: {len(report.verdict.differences)} differences, {pounds} pounds")
        print(f"the same again: {_again(asked)}")
        return 1
    if report.happened.total() < asked.at_least:
        print(f"unverified: {report.happened.total()} faults happened, of {asked.at_least} at least")
        return UNVERIFIED
    print(f"faults survived: {report.happened.total()}, difference: {pounds_text(report.verdict.pounds)}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000), help="of book and faults")
    parser.add_argument("--minutes", type=float, default=5, help="break it for so long")
    parser.add_argument("--faults", type=int, default=0, help="break it so often, instead")
    parser.add_argument("--at-least", type=int, default=0, metavar="N", help="unverified with fewer faults survived")
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=1, help="3: leaders change")
    parser.add_argument("--plant", choices=sorted(PLANTS), default="", help="a bug that must be caught")
    parser.add_argument("--keep", action="store_true", help="keep the logs also when all is well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
