"""One model version in the scheduler: its queue, its instances, its grants. Decides; the loop sends."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from forebay.engine.scheduler.batcher import Batcher, Decision, Reason
from forebay.engine.scheduler.instances import Instance, InstanceState
from forebay.engine.scheduler.request_queue import RequestQueue
from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.messages import RouteUp

#: Batches in a row that must have found nobody else waiting before an instance is granted. Grants under load would be
#: revoked at once, which costs two messages each.
QUIET_BATCHES = 8

#: Batches that ``explain`` can tell about.
EXPLAIN_RING = 512


class BatchRecord(NamedTuple):
    """One line of ``explain``."""

    batch: int
    rows: int
    requests: int
    segments: int
    oldest_wait_ns: int
    reason: Reason
    instance: str
    started_ns: int


class Route:
    """One loaded model version."""

    def __init__(self, up: RouteUp) -> None:
        self.id = up.route
        self.name = up.name
        self.version = up.version
        self.batching = up.batching
        self.queue = RequestQueue(up.batching)
        self.batcher = Batcher(up.batching)
        self.instances: dict[int, Instance] = {}
        #: Idle instances, the most recently used last: its caches are warm.
        self.idle: list[Instance] = []
        self.is_draining = False
        self.is_drain_reported = False
        self.recent: deque[BatchRecord] = deque(maxlen=EXPLAIN_RING)
        self.batch_ns: dict[int, int] = {}
        policy = up.batching
        self._is_grantable = (
            self.batcher.can_be_granted
            and not policy.priority_levels
            and not policy.preserve_ordering
            and not policy.default_queue_policy.max_queue_size
            and not up.extra
        )
        self._quiet = 0

    @property
    def is_quiescent(self) -> bool:
        """True if nothing waits, runs or is granted."""
        return not self.queue.request_count and all(
            instance.state is InstanceState.IDLE for instance in self.instances.values()
        )

    def add_instance(self, instance: Instance) -> None:
        self.instances[instance.id] = instance
        if instance.state is InstanceState.IDLE:
            self.idle.append(instance)

    def remove_instance(self, instance: Instance) -> None:
        self.instances.pop(instance.id, None)
        if instance in self.idle:
            self.idle.remove(instance)

    def set_idle(self, instance: Instance) -> None:
        """The instance finished its batch or its grant came back."""
        instance.state = InstanceState.IDLE
        instance.items = []
        if not instance.draining and instance.id in self.instances:
            self.idle.append(instance)

    def next_batch(self, now_ns: int) -> tuple[Decision, list[Waiting]]:
        """Choose what an idle instance runs now; an empty list: nothing (``Decision.wait_until_ns`` says until when)."""
        decision = self.batcher.decide(self.queue, now_ns)
        if not decision.requests:
            return decision, []
        return decision, self.queue.take(decision.requests)

    def note_dispatch(self) -> None:
        """Keep count of how quiet it is: quiet means that one batch at a time is enough."""
        busy = sum(instance.state is InstanceState.BUSY for instance in self.instances.values())
        if self.queue.request_count == 0 and busy <= 1:
            self._quiet += 1
        else:
            self._quiet = 0

    def wants_grant(self) -> bool:
        """True if an idle instance should be granted to the producer that was served last."""
        return (
            self._is_grantable
            and self._quiet >= QUIET_BATCHES
            and not self.queue.request_count
            and not self.is_draining
        )

    def note_contention(self) -> None:
        """Somebody had to wait: grants must be earned again."""
        self._quiet = 0

    def granted(self) -> list[Instance]:
        return [instance for instance in self.instances.values() if instance.state is InstanceState.GRANTED]

    def next_alarm_ns(self, decision: Decision) -> int:
        """Return when to look at this route again; 0: only when something happens."""
        expiry_ns = self.queue.next_expiry_ns()
        alarms = [alarm for alarm in (decision.wait_until_ns, expiry_ns) if alarm]
        return min(alarms, default=0)
