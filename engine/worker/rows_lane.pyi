"""What ``rows_lane.c`` makes; an optional part of the package, see ``rows.py``."""

from collections.abc import Callable

from forebay.engine.worker.places import GuardedBell
from forebay.ipc.doorbell import Bell

class RowsLane:
    """Runs batches of slices that are kept here; one per worker loop, and used by it alone."""

    def __init__(self, instance: int, counters: memoryview, done: Bell, tells_requests_apart: bool, /) -> None:
        """Count into ``counters`` (uint64, the instance's block); ``done`` rings the scheduler.

        Args:
            tells_requests_apart: the same rows are something else if they are of another number of requests.
        """

    @property
    def batch(self) -> int:
        """The number of the batch that runs, or that ran last."""

    def keep(self, run: bytes, call: Callable[[], None], bell: Bell | GuardedBell, /) -> None:
        """Remember how the rows of a ``RUN``, which has been checked, are run, and whom to ring."""

    def forget(self, producer: int, /) -> None:
        """Drop what is kept for a producer."""

    def run(self, message: bytearray | memoryview, size: int, tells_scheduler: bool, /) -> bool:
        """Run a message and ring its producer, and the scheduler if that sent it; False: it is not for the lane.

        Raises:
            ServingError: the model failed. Nobody was rung; RUNNING_SINCE_NS still says when the run began.
        """
