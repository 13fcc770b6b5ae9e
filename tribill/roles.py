"""The roles of workers: which agent each runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from streams.settings import Settings

if TYPE_CHECKING:
    from agents.context import Context
    from streams.agent import Agent


def _intake(context: Context) -> Agent:
    from agents.intake import Intake

    return Intake(context)


def _usage(context: Context) -> Agent:
    from agents.usage import Usage

    return Usage(context)


def _contracts(context: Context) -> Agent:
    from agents.contracts import Contracts

    return Contracts(context)


def _reference(context: Context) -> Agent:
    from agents.reference import Reference

    return Reference(context)


def _charges(context: Context) -> Agent:
    from agents.charges import Charges

    return Charges(context)


def _funding(context: Context) -> Agent:
    from agents.funding import Funding

    return Funding(context)


def _period_close(context: Context) -> Agent:
    from agents.period_close import PeriodClose

    return PeriodClose(context)


def _reconcile(context: Context) -> Agent:
    from agents.reconcile import Reconcile

    return Reconcile(context)


#: Each role imports only its own agent, so that its process starts quickly and holds little.
ROLES: dict[str, Callable[[Context], Agent]] = {
    "intake": _intake,
    "usage": _usage,
    "contracts": _contracts,
    "reference": _reference,
    "charges": _charges,
    "funding": _funding,
    "period-close": _period_close,
    "reconcile": _reconcile,
}


def run_worker(role: str, settings: Settings) -> int:
    """Runs a role's worker until it is stopped; returns the exit code."""
    # Columns of a batch are too short to share among threads, which then only wake each other.  Read when Polars is.
    os.environ.setdefault("POLARS_MAX_THREADS", "1")
    from agents.context import Context
    from agents.start import check_start
    from streams.worker import Worker

    context = Context(role, settings)
    agent = ROLES[role](context)
    check_start(agent, context)
    others = [ROLES[role](Context(role, settings)) for _ in range(agent.lanes - 1)]
    return Worker([agent, *others], settings).run()
