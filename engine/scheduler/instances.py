"""The instances of a model version as the scheduler sees them.

An instance goes syncing -> idle -> (busy -> idle)*, or idle -> granted -> (revoking ->) idle, until it is gone. A syncing
instance was running when this scheduler started and has not yet said that it finished what an earlier one had sent.
"""

from __future__ import annotations

import enum

from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.doorbell import Bell


class InstanceState(enum.Enum):
    SYNCING = "syncing"
    IDLE = "idle"
    BUSY = "busy"
    GRANTED = "granted"
    REVOKING = "revoking"


class Instance:
    """One worker. Owns the sending end of its doorbell."""

    __slots__ = (
        "batch_id",
        "bell",
        "draining",
        "generation",
        "grantee",
        "id",
        "items",
        "name",
        "route",
        "started_ns",
        "state",
    )

    def __init__(self, instance: int, route: int, name: str, bell: Bell, *, syncing: bool) -> None:
        self.id = instance
        self.route = route
        self.name = name
        self.bell = bell
        self.state = InstanceState.SYNCING if syncing else InstanceState.IDLE
        #: What it runs, to be reported lost if it dies.
        self.items: list[Waiting] = []
        self.batch_id = 0
        self.started_ns = 0
        self.draining = False
        #: Counts grants, so that a late return is told from a current one.
        self.generation = 0
        self.grantee = 0
