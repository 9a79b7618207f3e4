"""The line before a model with a latency objective: no place in it for what would be answered too late.

:class:`AdaptiveBatcher` decides; this file applies it to the queue, and words the refusals. Pure: no clock, no sockets.
"""

from __future__ import annotations

from forebay.engine.scheduler.adaptive_batcher import AdaptiveBatcher
from forebay.engine.scheduler.line import Choice, QueueLine, Refusal
from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.errors import ServingError, Unavailable
from forebay.ipc.scheduler_messages import BatchingPolicy


class AdaptiveLine(QueueLine):
    """One queue for all instances; each of them has its own costs, so what suits one may be too late on another."""

    is_bound = True

    def __init__(self, model: str, batching: BatchingPolicy) -> None:
        super().__init__(batching)
        self.batcher = AdaptiveBatcher(batching)
        self._model = model
        #: The latest time that was told; what arrives is stamped by its producer, a little earlier.
        self._now_ns = 0

    def append(self, item: Waiting, now_ns: int) -> None:
        now_ns = self._now_ns = max(now_ns, self._now_ns)
        admitted, answer_ns = self.batcher.admit(item, self.queue, now_ns)
        self.batcher.arrived(item.requests * item.rows_each, now_ns)
        if admitted < self.queue.room(item):
            if admitted:
                self.queue.append(item.split(admitted))
            raise self._too_late(item, answer_ns)
        self.queue.append(item)

    def choose(self, instance: int, now_ns: int) -> Choice:
        return self._take(self.batcher.decide(self.queue, instance, now_ns))

    def expire(self, now_ns: int) -> list[Refusal]:
        self._now_ns = max(now_ns, self._now_ns)
        refusals = super().expire(now_ns)
        queue = self.queue
        while (first := queue.first) is not None and self.batcher.is_hopeless(first, queue.request_count - 1, now_ns):
            error = self._too_late(first, self.batcher.answer_ns(first.rows_each, now_ns))
            # The last of all may be worth a try.
            is_alone = queue.request_count == first.requests
            count = max(first.requests - 1, 1) if is_alone else first.requests
            refusals += [Refusal(item, error) for item in queue.take(count)]
        if refusals:
            self.batcher.forget_plan()
        return refusals

    def next_expiry_ns(self) -> int:
        look_ns = self.batcher.next_look_ns(self.queue.first)
        times = (super().next_expiry_ns(), look_ns if look_ns > self._now_ns else 0)
        return min((time_ns for time_ns in times if time_ns), default=0)

    def add_instance(self, instance: int) -> None:
        self.batcher.add_instance(instance)

    def drop_instance(self, instance: int) -> None:
        """An instance takes no further batches; what was learned of it goes too."""
        self.batcher.remove_instance(instance)

    def _too_late(self, item: Waiting, answer_ns: int) -> ServingError:
        given_ns = self.batcher.given_ns(item)
        # As the client sees it: with the time that is kept for the way.
        taken_ms = (given_ns + answer_ns - self.batcher.due_ns(item)) / 1e6
        given_ms = round(given_ns / 1e6, 1)
        if self.batcher.has_own_time(item):
            return Unavailable(
                f"Exceeds request timeout: the answer would take {taken_ms:.1f} ms or more, and {given_ms:g} ms are "
                "given; try again later, or with a longer timeout"
            )
        return Unavailable(
            f"Exceeds latency objective: the answer would take {taken_ms:.1f} ms or more, and the objective of model "
            f"'{self._model}' is {given_ms:g} ms; try again later, or give the model more instances or a larger "
            "objective"
        )
