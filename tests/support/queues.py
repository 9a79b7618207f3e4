"""Short ways to write queues of waiting requests, for tests of the scheduler."""

from __future__ import annotations

from collections.abc import Iterable

from forebay.engine.scheduler.request_queue import RequestQueue
from forebay.engine.scheduler.waiting import Waiting, WaitingParcel, WaitingRun
from forebay.ipc.scheduler_messages import BatchingPolicy

#: A producer's number where it does not matter.
PRODUCER = 7

MS = 1_000_000


def run(
    first: int,
    requests: int = 1,
    rows: int = 1,
    at_ns: int = 0,
    *,
    producer: int = PRODUCER,
    base: int = 4096,
    capacity: int = 1024,
    attempt: int = 0,
    priority: int = 0,
    timeout_us: int = 0,
    deadline_ns: int = 0,
) -> WaitingRun:
    """Return ``requests`` requests of ``rows`` rows each in slab rows from ``first``."""
    return WaitingRun(
        producer, base, capacity, first, requests, rows, at_ns, attempt=attempt, priority=priority,
        timeout_us=timeout_us, deadline_ns=deadline_ns,
    )  # fmt: skip


def parcel(
    token: int,
    rows: int = 1,
    at_ns: int = 0,
    *,
    producer: int = PRODUCER,
    shape: int = 0,
    attempt: int = 0,
    priority: int = 0,
    timeout_us: int = 0,
    deadline_ns: int = 0,
    head: bytes = b"",
) -> WaitingParcel:
    """Return one request outside a slab."""
    return WaitingParcel(
        producer, token, rows, at_ns, head, attempt=attempt, priority=priority, timeout_us=timeout_us, shape_key=shape,
        deadline_ns=deadline_ns,
    )  # fmt: skip


def queue_of(items: Iterable[Waiting], policy: BatchingPolicy | None = None) -> RequestQueue:
    """Return a queue that the items have entered in this order."""
    queue = RequestQueue(policy or BatchingPolicy(max_batch_size=64, dynamic=True))
    for item in items:
        queue.append(item)
    return queue


def tokens(items: Iterable[Waiting]) -> list[int]:
    """Return what names each item: a parcel's token, a run's first row."""
    names: list[int] = []
    for item in items:
        assert isinstance(item, WaitingParcel | WaitingRun)
        names.append(item.token if isinstance(item, WaitingParcel) else item.first)
    return names
