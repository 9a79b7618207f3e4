"""What the supervisor and the scheduler tell each other on the lifeline, with descriptors."""

from __future__ import annotations

from typing import Any

import msgspec

from forebay.ipc.messages import Failed, LogChanged, Message, Started, Stop


class QueuePolicy(msgspec.Struct, frozen=True, array_like=True):
    """One ModelQueuePolicy (spec C-075)."""

    timeout_action: str = "REJECT"
    default_timeout_us: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0


class BatchingPolicy(msgspec.Struct, frozen=True, array_like=True):
    """How a model's requests become batches (spec 6.1, 6.2)."""

    max_batch_size: int = 0
    dynamic: bool = False
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    preserve_ordering: bool = False
    priority_levels: int = 0
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy = QueuePolicy()
    priority_queue_policy: dict[int, QueuePolicy] = {}
    objective_us: int = 0
    """Within what time 99 % of the requests are to be answered; 0: batches are formed as the rest of this says."""


class RouteUp(Message, frozen=True, tag=1):
    """A model version can take requests as soon as it has instances."""

    route: int
    name: str
    version: int
    batching: BatchingPolicy
    extra: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """Scheduling beyond the dynamic batcher (sequences, ensembles, rate limits, cache), by kind."""
    counter_offset: int = 0
    row_bytes: tuple[int, ...] = ()
    """Bytes per row of each input, then each output, to check clients' slabs; empty: the model takes no rows."""
    keeps_requests: bool = False
    """The backend gets requests one by one: a run in a batch is of requests with equally many rows."""


class RouteDrain(Message, frozen=True, tag=2):
    """Accept no new requests for the route; answer RouteDrained when nothing is queued or running."""

    route: int


class RouteGone(Message, frozen=True, tag=3):
    """Forget the route; what is still queued is failed with ``text``."""

    route: int
    code: int
    text: str


class Resource(msgspec.Struct, frozen=True, array_like=True):
    """A number of units of a named resource (spec S-152)."""

    name: str
    count: int
    device: int = -1
    """Device whose units these are; -1: global."""


class InstanceUp(Message, frozen=True, tag=4):
    """A worker is ready. Comes with one descriptor: the sending end of its doorbell."""

    route: int
    instance: int
    name: str
    resources: tuple[Resource, ...] = ()
    """What an execution occupies under the rate limiter."""
    rate_priority: int = 1
    """Weight under the rate limiter: 2 gets half the executions of 1 (spec S-151)."""


class InstanceDown(Message, frozen=True, tag=5):
    """A worker ended or is about to be stopped; its unanswered batch is LOST."""

    instance: int
    exit_status: int = 0
    is_hung: bool = False
    """It was ended because an execution took longer than it may: what it ran is not tried again."""


class InstanceDrain(Message, frozen=True, tag=6):
    """Give this instance no new batches; answer InstanceDrained when it is idle and not granted."""

    instance: int


class ProducerUp(Message, frozen=True, tag=7):
    """A producer exists. Descriptors: the sending end of its completion doorbell; if it is not trusted, also the
    receiving end of its submission socket."""

    producer: int
    name: str
    arena_bytes: int = 0
    trusted: bool = True
    """False for shared-memory clients: everything that they submit is checked, and the worker keeps their grants."""


class ProducerDown(Message, frozen=True, tag=8):
    """A producer ended: drop its queued requests, forget its grants."""

    producer: int


class SchedulerStart(Message, frozen=True, tag=9):
    """First message to a scheduler. Comes with one descriptor: the receiving end of the done doorbell."""

    epoch: int
    runtime_directory: str
    counters_bytes: int = 0
    is_rate_limited: bool = False
    resources: tuple[Resource, ...] = ()
    """Limits that were set; of other resources there is as much as the neediest instance wants (spec S-152)."""
    hold_back_requests: int = 0
    """Each model waits for so many requests before its first batch, for tests (spec S-035)."""


class CountersFile(Message, frozen=True, tag=11):
    """Comes with one descriptor: the counters file."""

    byte_size: int


class Drained(Message, frozen=True, tag=12):
    """Child -> supervisor: the route (``route``) or instance (``instance``) asked for is drained."""

    route: int = 0
    instance: int = 0


class Explain(Message, frozen=True, tag=15):
    """Supervisor -> scheduler: send the ring of the last batches of a route."""

    route: int
    request: int


class Explained(Message, frozen=True, tag=16):
    """Scheduler -> supervisor."""

    request: int
    batches: list[dict[str, Any]] = msgspec.field(default_factory=list[dict[str, Any]])


class Restored(Message, frozen=True, tag=17):
    """Supervisor -> scheduler, after a restart: every route, instance and producer has been announced again."""


SupervisorToScheduler = (
    SchedulerStart
    | RouteUp
    | RouteDrain
    | RouteGone
    | InstanceUp
    | InstanceDown
    | InstanceDrain
    | ProducerUp
    | ProducerDown
    | CountersFile
    | LogChanged
    | Stop
    | Explain
    | Restored
)
SchedulerToSupervisor = Started | Failed | Drained | Explained
