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

    # --- what clients ring themselves ---

    @property
    def size(self) -> int:
        """Bytes of the message that :meth:`wait` has read."""

    def listen(self, doorbell: int, rows_max: int, spin_ns: int, /) -> None:
        """Have :meth:`wait` watch the doorbell.

        Args:
            rows_max: of one message.
            spin_ns: how long to look before sleeping.
        """

    def watch(self, ring: int, producer: int, ticket: int, place: int, /) -> None:
        """Have :meth:`wait` watch the ring of a producer too, or change what is known of it; not owned.

        Args:
            place: the core that the producer shares with the worker, plus one; 0: none.
        """

    def unwatch(self, ring: int, /) -> None:
        """Do not watch it any more."""

    def wait(self, buffer: bytearray, timeout_ms: int, /) -> int:
        """Wait for one message, and run it if it is one for the lane.

        Args:
            buffer: what rings bring is read into it.
            timeout_ms: -1: for ever.

        Returns:
            The doorbell, which is not read; or a ring whose message, :attr:`size` bytes at the start of ``buffer``, was
            left to the caller, 0 bytes: it is at its end; -1: it was run, or there was none.

        Raises:
            ServingError: the model failed; the message is in ``buffer``. See :meth:`run`.
        """
