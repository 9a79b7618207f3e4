"""What waits for a model: a run of equal requests in slab rows, or one parcel. Pure data."""

from __future__ import annotations

from collections.abc import Iterable

from forebay.ipc.messages import ParcelSubmit, RowsCancel, RunSubmit


class Waiting:
    """Something in a queue: ``requests`` equal requests of ``rows_each`` rows that arrived together."""

    __slots__ = (
        "attempt",
        "deadline_ns",
        "enqueue_ns",
        "expiry_ns",
        "priority",
        "producer",
        "requests",
        "rows_each",
        "shape_key",
        "timeout_us",
    )

    def __init__(
        self,
        producer: int,
        requests: int,
        rows_each: int,
        enqueue_ns: int,
        *,
        attempt: int = 0,
        priority: int = 0,
        timeout_us: int = 0,
        shape_key: int = 0,
        deadline_ns: int = 0,
    ) -> None:
        self.producer = producer
        self.requests: int = requests
        #: Batch items of each request, at least 1.
        self.rows_each = rows_each
        self.enqueue_ns = enqueue_ns
        #: How many workers died of it, or while they ran it.
        self.attempt = attempt
        self.priority = priority
        self.timeout_us = timeout_us
        #: Items of different keys never share a batch.
        self.shape_key = shape_key
        #: When its client gives up on it; 0: never.
        self.deadline_ns = deadline_ns
        #: When the queue policy gives up on it; 0: never.
        self.expiry_ns = 0

    @property
    def next_end_ns(self) -> int:
        """When waiting ends if nothing happens before: at the policy's timeout or the client's deadline; 0: never."""
        if self.expiry_ns and self.deadline_ns:
            return min(self.expiry_ns, self.deadline_ns)
        return self.expiry_ns or self.deadline_ns

    def split(self, requests: int) -> Waiting:
        """Take the first ``requests`` out of this item and return them as one of their own."""
        raise NotImplementedError


class WaitingRun(Waiting):
    """Requests in consecutive slab rows."""

    __slots__ = ("base", "capacity", "first")

    def __init__(
        self,
        producer: int,
        base: int,
        capacity: int,
        first: int,
        requests: int,
        rows_each: int,
        enqueue_ns: int,
        *,
        attempt: int = 0,
        priority: int = 0,
        timeout_us: int = 0,
        deadline_ns: int = 0,
    ) -> None:
        super().__init__(
            producer, requests, rows_each, enqueue_ns, attempt=attempt, priority=priority, timeout_us=timeout_us,
            deadline_ns=deadline_ns,
        )  # fmt: skip
        self.base = base
        self.capacity = capacity
        self.first = first

    @classmethod
    def of(cls, producer: int, run: RunSubmit) -> WaitingRun:
        """Return what a producer submitted."""
        return cls(
            producer, run.base, run.capacity, run.first, run.requests, run.rows_each, run.enqueue_ns,
            attempt=run.attempt, priority=run.priority, timeout_us=run.timeout_us, deadline_ns=run.deadline_ns,
        )  # fmt: skip

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.first + self.requests * self.rows_each

    def split(self, requests: int) -> WaitingRun:
        head = WaitingRun(
            self.producer,
            self.base,
            self.capacity,
            self.first,
            requests,
            self.rows_each,
            self.enqueue_ns,
            attempt=self.attempt,
            priority=self.priority,
            timeout_us=self.timeout_us,
            deadline_ns=self.deadline_ns,
        )
        head.expiry_ns = self.expiry_ns
        self.first += requests * self.rows_each
        self.requests -= requests
        return head


class WaitingParcel(Waiting):
    """One request outside a slab."""

    __slots__ = ("correlation_id", "head", "sequence_end", "sequence_start", "token")

    def __init__(
        self,
        producer: int,
        token: int,
        rows: int,
        enqueue_ns: int,
        head: bytes,
        *,
        attempt: int = 0,
        priority: int = 0,
        timeout_us: int = 0,
        shape_key: int = 0,
        deadline_ns: int = 0,
        correlation_id: int | str = 0,
        sequence_start: bool = False,
        sequence_end: bool = False,
    ) -> None:
        super().__init__(
            producer,
            1,
            max(rows, 1),
            enqueue_ns,
            attempt=attempt,
            priority=priority,
            timeout_us=timeout_us,
            shape_key=shape_key,
            deadline_ns=deadline_ns,
        )
        self.token = token
        #: Encoded ParcelHead, never read here.
        self.head = head
        self.correlation_id = correlation_id
        self.sequence_start = sequence_start
        self.sequence_end = sequence_end

    @classmethod
    def of(cls, producer: int, parcel: ParcelSubmit) -> WaitingParcel:
        """Return what a producer submitted."""
        return cls(
            producer, parcel.token, parcel.rows, parcel.enqueue_ns, parcel.head, attempt=parcel.attempt,
            priority=parcel.priority, timeout_us=parcel.timeout_us, shape_key=parcel.shape_key,
            deadline_ns=parcel.deadline_ns, correlation_id=parcel.correlation_id,
            sequence_start=parcel.sequence_start, sequence_end=parcel.sequence_end,
        )  # fmt: skip

    @property
    def key(self) -> tuple[int, int]:
        """Unique among all parcels."""
        return self.producer, self.token

    def split(self, requests: int) -> WaitingParcel:
        raise AssertionError("a parcel is one request")


def running_rows(items: Iterable[Waiting], producer: int, cancelled: RowsCancel) -> list[int]:
    """Return which of the cancelled requests are among these, by their first rows."""
    return [
        first
        for item in items
        if isinstance(item, WaitingRun) and item.producer == producer and item.base == cancelled.base
        for first in cancelled.firsts
        if item.first <= first < item.end
    ]
