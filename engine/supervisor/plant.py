"""What everybody who builds models in the supervisor needs: one object instead of eight arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from weakref import WeakSet

from forebay.engine.repository.normalise import Gpu
from forebay.engine.settings import Settings
from forebay.engine.supervisor.core_pool import CorePool
from forebay.engine.supervisor.core_shares import CoreShares
from forebay.engine.supervisor.host_policies import HostPolicies
from forebay.engine.supervisor.switchboard import Switchboard
from forebay.engine.supervisor.watchdog import Watchdog
from forebay.engine.supervisor.worker_handle import WorkerHandle
from forebay.engine.supervisor.zygotes import Zygotes
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import CountersFile
from forebay.ipc.errors import Unavailable
from forebay.ipc.messages import LogChanged
from forebay.ipc.worker_messages import ModelMetrics


def _ignore(_message: ModelMetrics) -> None:
    """There is no metrics endpoint."""


def _no_side_door(_ensemble: ModelEntry) -> AbstractContextManager[str]:
    raise Unavailable("this server has no door for its own processes")


@dataclass(slots=True)
class Plant:
    """The supervisor's machinery. Numbers from here are never used twice while the server runs."""

    settings: Settings
    switchboard: Switchboard
    zygotes: Zygotes
    counters: CountersFile
    cores: CorePool
    gpus: tuple[Gpu, ...] = ()
    host_policies: HostPolicies = field(default_factory=lambda: HostPolicies(()))
    watchdog: Watchdog = field(default_factory=Watchdog)
    core_shares: CoreShares = field(default_factory=CoreShares)
    #: Passes on the metrics that models define themselves.
    on_model_metrics: Callable[[ModelMetrics], None] = field(default=_ignore)
    #: Lets a process in that warms up an ensemble (``ClientDoor.side_door``).
    side_door: Callable[[ModelEntry], AbstractContextManager[str]] = field(default=_no_side_door)
    #: Of each frontend that keeps a part of the response cache; empty: there is none.
    cache_counter_offsets: tuple[int, ...] = ()
    #: Those that were forked, as long as anybody knows of them.
    workers: WeakSet[WorkerHandle] = field(default_factory=lambda: WeakSet[WorkerHandle]())
    #: How to log, if that has changed since the zygotes were started.
    log_changed: LogChanged | None = None
    next_instance: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    next_route: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def fork(self, family: str, worker: WorkerHandle) -> None:
        """Fork a worker from its family's zygote.

        Raises:
            Unavailable: the family's libraries cannot be imported.
        """
        await self.zygotes.start(family).fork(worker, self.switchboard.done_fd, self.counters.fd)
        self.greet(worker)

    def greet(self, worker: WorkerHandle) -> None:
        """Tell a worker that has just got its process what all others were told."""
        self.workers.add(worker)
        if self.log_changed is not None:
            worker.tell(self.log_changed)

    def change_log(self, changed: LogChanged) -> None:
        """Have every worker log so, those included that are forked later."""
        self.log_changed = changed
        for worker in list(self.workers):
            worker.tell(changed)
