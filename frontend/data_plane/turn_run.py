"""Rows that are handed over together at the end of an event-loop turn."""

from __future__ import annotations

from forebay.frontend.data_plane.owners import OwnedSlab
from forebay.ipc.messages import RunSubmit
from forebay.ipc.wire import Run


class TurnRun:
    """Consecutive rows published in this event-loop turn."""

    __slots__ = (
        "attempt", "deadline_ns", "enqueue_ns", "first", "priority", "requests", "rows_each", "slab", "timeout_us",
    )  # fmt: skip

    def __init__(
        self,
        slab: OwnedSlab,
        first: int,
        rows_each: int,
        enqueue_ns: int,
        requests: int,
        attempt: int,
        priority: int,
        timeout_us: int,
        deadline_ns: int = 0,
    ) -> None:
        self.slab = slab
        self.first = first
        self.requests = requests
        self.rows_each = rows_each
        self.enqueue_ns = enqueue_ns
        self.attempt = attempt
        self.priority = priority
        self.timeout_us = timeout_us
        self.deadline_ns = deadline_ns

    def without(self, first: int) -> list[TurnRun]:
        """Return what is left without the request that begins at ``first``."""
        ahead = (first - self.first) // self.rows_each
        behind = self.requests - ahead - 1
        parts = ((self.first, ahead), (first + self.rows_each, behind))
        return [
            TurnRun(
                self.slab, start, self.rows_each, self.enqueue_ns, requests, self.attempt, self.priority,
                self.timeout_us, self.deadline_ns,
            )
            for start, requests in parts
            if requests
        ]  # fmt: skip

    def to_submit(self, route: int) -> RunSubmit:
        """Return the message for the scheduler."""
        return RunSubmit(
            route=route,
            base=self.slab.base,
            capacity=self.slab.capacity,
            first=self.first,
            requests=self.requests,
            rows_each=self.rows_each,
            enqueue_ns=self.enqueue_ns,
            attempt=self.attempt,
            priority=self.priority,
            timeout_us=self.timeout_us,
            deadline_ns=self.deadline_ns,
        )

    def to_wire(self, producer: int) -> Run:
        """Return what a granted worker's doorbell takes."""
        rows = self.requests * self.rows_each
        return Run(
            producer, self.requests, self.slab.base, self.slab.capacity, self.first, rows, self.attempt,
            self.requests * self.enqueue_ns,
        )  # fmt: skip
