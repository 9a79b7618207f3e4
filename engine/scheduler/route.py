"""One model version in the scheduler: its line, its instances, its grants, its memory of the last batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from forebay.engine.repository.model_spec import SequenceBatchingSpec
from forebay.engine.scheduler.adaptive_line import AdaptiveLine
from forebay.engine.scheduler.batcher import Decision, Reason
from forebay.engine.scheduler.instances import Instance, InstanceState
from forebay.engine.scheduler.line import Choice, Line, Refusal, SharedLine
from forebay.engine.scheduler.sequence_line import SequenceLine
from forebay.engine.scheduler.waiting import Waiting, running_rows
from forebay.ipc.errors import ServingError
from forebay.ipc.log import log
from forebay.ipc.messages import RowsCancel
from forebay.ipc.scheduler_messages import RouteUp
from forebay.ipc.wire import pack_rows_cancel

#: Batches in a row that must have found nobody else waiting before an instance is granted. Grants under load would be
#: revoked at once, which costs two messages each.
QUIET_BATCHES = 8

#: Batches that ``explain`` can tell about.
EXPLAIN_RING = 512

#: What people see of a batch's number: without the scheduler's epoch.
_BATCH_MASK = (1 << 48) - 1


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

    def __init__(self, up: RouteUp, *, hold_back_requests: int = 0) -> None:
        self.id = up.route
        self.name = up.name
        self.version = up.version
        self.instances: dict[int, Instance] = {}
        #: Idle instances, the most recently used last: its caches are warm.
        self.idle: list[Instance] = []
        self.is_draining = False
        self.is_drain_reported = False
        self.recent: deque[BatchRecord] = deque(maxlen=EXPLAIN_RING)
        self.batch_ns: dict[int, int] = {}
        self.sequences: SequenceLine | None = None
        self._adaptive: AdaptiveLine | None = None
        self._hold_back = hold_back_requests
        self._quiet = 0
        self.keeps_requests = up.keeps_requests
        #: Most rows that a frontend may ring under a grant as one batch.
        self.grant_rows = 0
        self._is_grantable = False
        self.line: Line
        if "sequence" in up.extra:
            policy = msgspec.convert(up.extra["sequence"], SequenceBatchingSpec)
            self.line = self.sequences = SequenceLine(up.name, policy, up.batching, log.warning)
        else:
            self._share(up)

    def _share(self, up: RouteUp) -> None:
        """Take requests in one line for all instances."""
        if up.batching.objective_us:
            self.line = self._adaptive = AdaptiveLine(up.name, up.batching)
            self.grant_rows, self._is_grantable = 0, False
            for instance in self.instances:
                self.line.add_instance(instance)
            return
        self._adaptive = None
        shared = SharedLine(up.batching)
        self.line = shared
        self.grant_rows = shared.batcher.grant_rows
        queueing = up.batching.default_queue_policy
        self._is_grantable = (
            shared.batcher.can_be_granted
            and not up.batching.priority_levels
            and not up.batching.preserve_ordering
            # A frontend keeps a few requests back while the instances that it is granted are busy, but no timeouts.
            and not (queueing.max_queue_size or queueing.default_timeout_us or queueing.allow_timeout_override)
            and not up.extra
            and not self._hold_back
        )

    def change_policy(self, up: RouteUp) -> list[Refusal]:
        """Batch by another policy from now on; return what waits and may not wait under it.

        Sequences are bound to their instances: their policy does not change while the model is loaded.
        """
        refused: list[Refusal] = []
        if self.sequences is not None or "sequence" in up.extra:
            return refused
        waiting = self.line.clear()
        self._share(up)
        for item in waiting:
            try:
                self.line.append(item, item.enqueue_ns)
            except ServingError as error:
                refused.append(Refusal(item, error))
        return refused

    @property
    def is_quiescent(self) -> bool:
        """True if nothing waits, runs, is granted or still owes an answer."""
        return self.line.is_empty and all(
            instance.state is InstanceState.IDLE and not instance.open for instance in self.instances.values()
        )

    # --- instances ---

    def add_instance(self, instance: Instance) -> None:
        self.instances[instance.id] = instance
        self.line.add_instance(instance.id)
        if instance.state is InstanceState.IDLE:
            self.idle.append(instance)

    def remove_instance(self, instance: Instance) -> None:
        self.instances.pop(instance.id, None)
        if instance in self.idle:
            self.idle.remove(instance)
        if self._adaptive is not None:
            self._adaptive.drop_instance(instance.id)

    def drain_instance(self, instance: Instance) -> None:
        """Give the instance nothing more, but for what belongs to sequences that it has."""
        instance.draining = True
        if self.sequences is not None:
            self.sequences.drain_instance(instance.id)
        elif instance in self.idle:
            self.idle.remove(instance)
        if self._adaptive is not None:
            self._adaptive.drop_instance(instance.id)

    def is_drained(self, instance: Instance) -> bool:
        """Whether nothing runs on an instance, none of its requests is open, and it has no sequences."""
        return (
            instance.state is InstanceState.IDLE
            and not instance.open
            and (self.sequences is None or not self.sequences.holds_sequences(instance.id))
        )

    def set_idle(self, instance: Instance) -> None:
        """The instance finished its batch or its grant came back."""
        instance.state = InstanceState.IDLE
        instance.items = ()
        if instance.id in self.instances and (not instance.draining or self.sequences is not None):
            self.idle.append(instance)

    def cancel_running(self, producer: int, cancelled: RowsCancel) -> None:
        """Let the model hear that nobody waits any more for these of the rows that it runs."""
        for instance in self.instances.values():
            running = running_rows(instance.items, producer, cancelled)
            if running and instance.state is InstanceState.BUSY:
                instance.hint(pack_rows_cancel(instance.batch_id, producer, cancelled.base, running))

    # --- batches ---

    @property
    def is_held_back(self) -> bool:
        """True while it waits for the requests that a test wants to see together (spec S-035); then never again."""
        if self._hold_back and self.line.request_count >= self._hold_back:
            self._hold_back = 0
        return self._hold_back > 0

    def choices(self, now_ns: int) -> Iterator[tuple[Instance, Choice]]:
        """Choose what idle instances run now, until nothing is ready.

        The last pair may be without items: its decision says until when the line waits. The caller takes the instances
        of the others out of :attr:`idle` before it asks for the next.
        """
        for instance in reversed(tuple(self.idle)):
            if not self.line.request_count:
                return
            choice = self.line.choose(instance.id, now_ns)
            yield instance, choice
            if not choice.items and not self.line.is_bound:
                return  # What waits does not wait for another instance.

    def note_dispatch(
        self, instance: Instance, batch_id: int, items: Sequence[Waiting], segments: int,
        decision: Decision, now_ns: int,
    ) -> None:  # fmt: skip
        """Remember a batch, and keep count of how quiet it is: quiet means that one batch at a time is enough."""
        busy = sum(other.state is InstanceState.BUSY for other in self.instances.values())
        self._quiet = self._quiet + 1 if self.line.request_count == 0 and busy <= 1 else 0
        rows = requests = 0
        oldest_ns = now_ns
        for item in items:
            requests += item.requests
            rows += item.requests * item.rows_each
            oldest_ns = min(oldest_ns, item.enqueue_ns)
        if self._adaptive is not None:
            self._adaptive.batcher.started(instance.id, rows, now_ns)
        wait_ns = now_ns - oldest_ns
        self.recent.append(
            BatchRecord(batch_id, rows, requests, segments, wait_ns, decision.reason, instance.name, now_ns)
        )

    def note_end(self, instance: Instance, run_ns: int, now_ns: int) -> None:
        """Remember how long an instance's batch took."""
        if self._adaptive is not None:
            self._adaptive.batcher.ended(instance.id, now_ns)
        self.batch_ns[instance.batch_id] = run_ns
        if len(self.batch_ns) > 2 * EXPLAIN_RING:
            alive = {record.batch for record in self.recent}
            self.batch_ns = {batch: ns for batch, ns in self.batch_ns.items() if batch in alive}

    def explain(self) -> list[dict[str, object]]:
        """Return the last batches, oldest first, as plain data."""
        return [
            {
                **record._asdict(),
                "batch": record.batch & _BATCH_MASK,
                "reason": str(record.reason),
                "run_ns": self.batch_ns.get(record.batch, 0),
            }
            for record in self.recent
        ]

    # --- grants ---

    def wants_grant(self) -> bool:
        """True if an idle instance should be granted to the producer that was served last."""
        return (
            self._is_grantable and self._quiet >= QUIET_BATCHES and not self.line.request_count and not self.is_draining
        )

    def note_contention(self) -> None:
        """Somebody had to wait: grants must be earned again."""
        self._quiet = 0

    def granted(self) -> list[Instance]:
        return [instance for instance in self.instances.values() if instance.state is InstanceState.GRANTED]

    def next_alarm_ns(self, wait_until_ns: int) -> int:
        """Return when to look at this route again; 0: only when something happens."""
        expiry_ns = self.line.next_expiry_ns()
        if not wait_until_ns or not expiry_ns:
            return wait_until_ns or expiry_ns
        return min(wait_until_ns, expiry_ns)
