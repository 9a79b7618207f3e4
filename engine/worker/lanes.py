"""Where a worker's shortest path is opened: ``rows_lane.c``, if the package was built with a C compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.ipc.doorbell import Bell

if TYPE_CHECKING:
    from forebay.engine.worker.rows_lane import RowsLane


def open_lane(instance: int, counters: memoryview, done: Bell, *, tells_requests_apart: bool) -> RowsLane | None:
    """Return a lane; None if the package was built without it.

    Args:
        counters: uint64, the instance's block.
        done: rings the scheduler.
        tells_requests_apart: the same rows are something else if they are of another number of requests.
    """
    try:
        from forebay.engine.worker.rows_lane import RowsLane
    except ImportError:
        return None
    return RowsLane(instance, counters, done, tells_requests_apart)
