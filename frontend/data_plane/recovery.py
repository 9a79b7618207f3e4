"""What becomes of requests whose worker or scheduler died."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from forebay.ipc.errors import WorkerDied

if TYPE_CHECKING:
    from forebay.frontend.engine_client import EngineClient

#: Times a request is handed to another worker after its worker died.
ATTEMPTS_MAX = 1


def gave_up(model: str, *, is_hung: bool) -> WorkerDied:
    """Return why a request whose worker was lost is not tried again."""
    if is_hung:
        return WorkerDied(
            f"the request ran longer than model '{model}' may (--worker-timeout-secs, or its parameter "
            "worker_timeout_secs) and was ended"
        )
    return WorkerDied(
        f"an instance of model '{model}' ended unexpectedly while it ran the request, and so did the one that tried it "
        "again"
    )


def resubmit_all(engine: EngineClient, running: set[int]) -> None:
    """Hand in again what is left: a new scheduler is up and nothing else of what the old one sent runs.

    Args:
        running: parcels that workers run, or have run and not answered for good, which is no loss.
    """
    # What was rung under a grant runs or has run; what was not yet sent goes out with this turn.
    exempt_rows: set[tuple[int, int]] = set()
    exempt_tokens = running
    for grant in engine.grants:
        for granted in grant.outstanding:
            exempt_rows.update((granted.base, row) for row in range(granted.first, granted.first + granted.rows))
        exempt_tokens.update(grant.tokens)
    engine.grants.forget_scheduler()
    # Those of couriers, and of models that were unloaded and still have requests, are in no catalog.
    in_use = (*(route for route, _slab in engine.slabs.values()), *engine.parcels.routes())
    for route in {*engine.routes.values(), *in_use}:
        route.grant_finished()
        for run in route.turn:
            rows = run.requests * run.rows_each
            exempt_rows.update((run.slab.base, row) for row in range(run.first, run.first + rows))
        exempt_tokens.update(submit.token for submit in route.turn_parcels)
    now_ns = time.monotonic_ns()
    for base, (route, slab) in list(engine.slabs.items()):
        skip = frozenset(row for exempt_base, row in exempt_rows if exempt_base == base)
        engine.rows.resubmit(route, slab, range(slab.capacity), now_ns, 0, skip)
    engine.parcels.resubmit_except(exempt_tokens)
