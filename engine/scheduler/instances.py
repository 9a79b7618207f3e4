"""The instances of a model version as the scheduler sees them.

An instance goes syncing -> idle -> ((staged ->) busy -> idle)*, or idle -> granted -> (revoking ->) idle, until it is
gone. A syncing instance was running when this scheduler started and has not yet said that it finished what an earlier
one had sent; it may have said what that is.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from forebay.engine.scheduler.waiting import Waiting, WaitingParcel
from forebay.ipc.doorbell import Bell
from forebay.ipc.scheduler_messages import Resource

#: Messages that wait for a worker at most, before those that any client may cause are dropped.
_BACKLOG_MAX = 1024


class InstanceState(enum.Enum):
    SYNCING = "syncing"
    IDLE = "idle"
    STAGED = "staged"
    """Its batch waits for the rate limiter's resources."""
    BUSY = "busy"
    GRANTED = "granted"
    REVOKING = "revoking"


class Instance:
    """One worker. Owns the sending end of its doorbell."""

    __slots__ = (
        "batch_id",
        "bell",
        "draining",
        "executions",
        "generation",
        "grantee",
        "id",
        "items",
        "name",
        "open",
        "rate_priority",
        "resources",
        "ringers",
        "route",
        "started_ns",
        "state",
        "unnamed_producers",
    )

    def __init__(
        self,
        instance: int,
        route: int,
        name: str,
        bell: Bell,
        *,
        syncing: bool,
        generation: int = 0,
        resources: tuple[Resource, ...] = (),
        rate_priority: int = 1,
    ) -> None:
        self.id = instance
        self.route = route
        self.name = name
        self.bell = bell
        self.state = InstanceState.SYNCING if syncing else InstanceState.IDLE
        #: What it runs, to be reported lost if it dies.
        self.items: Sequence[Waiting] = ()
        #: What it has run but not answered for good: decoupled models, answers that wait for room.
        self.open: dict[tuple[int, int], WaitingParcel] = {}
        #: Of a syncing instance: producers that may have requests with it besides the open ones; None: it has not said.
        self.unnamed_producers: frozenset[int] | None = None
        self.batch_id = 0
        self.started_ns = 0
        self.draining = False
        #: Counts grants, so that a late return is told from a current one.
        self.generation = generation
        #: Who was served last, or holds the grant.
        self.grantee = 0
        #: Clients that were granted it at any time: one may have something under way when its grant is over already.
        self.ringers: set[int] = set()
        # Rate limiter
        self.resources = resources
        self.rate_priority = rate_priority
        self.executions = 0

    def hint(self, message: bytes) -> None:
        """Tell the worker something that concerns one request alone; lost if too much waits for the worker already."""
        if self.bell.backlog_count < _BACKLOG_MAX:
            self.bell.ring(message)

    def holds(self, producer: int, token: int) -> bool:
        """True if it runs the parcel, or may: what is rung under a grant is not told to the scheduler."""
        if producer in self.ringers:
            return True
        if self.state in (InstanceState.GRANTED, InstanceState.REVOKING) and self.grantee == producer:
            return True
        key = (producer, token)
        return key in self.open or any(isinstance(item, WaitingParcel) and item.key == key for item in self.items)
