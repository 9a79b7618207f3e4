"""Requests in flight, and the memory that they and their answers live in.

Who owns rows and blocks: a :class:`RowsLease` or :class:`BlockLease`, which gives them back when nobody refers to it
any more. A request in flight refers to its lease, and so do the arrays of a future's result; so neither the engine nor
a caller can be left with rows that somebody else fills.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from forebay.client.errors import DeadlineExceeded
from forebay.ipc.errors import Cancelled, ServingError
from forebay.ipc.messages import ParameterValue, ReplyHead, TensorPlace
from forebay.ipc.slabs import Slab
from forebay.ipc.spans import Trace
from forebay.ipc.tensor import DATATYPES

if TYPE_CHECKING:
    from forebay.client.device_pools import DeviceLease
    from forebay.client.opened import Opened

#: Any array.
Array = npt.NDArray[np.generic]

#: What is to be given back, by whoever next looks: a lease may end anywhere, even while the connection is locked.
RowsReturns = deque[tuple["Slab[Pending]", int, int]]
BlockReturns = deque[tuple[int, int]]


_NO_PARAMETERS: Mapping[str, ParameterValue] = {}


class Rows:
    """Consecutive rows of a slab."""

    __slots__ = ("first", "rows", "slab")

    def __init__(self, slab: Slab[Pending], first: int, rows: int) -> None:
        self.slab = slab
        self.first = first
        self.rows = rows


class RowsLease(Rows):
    """The right to rows, which come back with it."""

    __slots__ = ("__weakref__", "_returns")

    def __init__(self, returns: RowsReturns, slab: Slab[Pending], first: int, rows: int) -> None:
        super().__init__(slab, first, rows)
        self._returns = returns

    def __del__(self) -> None:
        self._returns.append((self.slab, self.first, self.rows))


class PartOfRows(Rows):
    """Some of the rows of a lease, which come back when the last part is gone."""

    __slots__ = ("_whole",)

    def __init__(self, whole: RowsLease, first: int, rows: int) -> None:
        super().__init__(whole.slab, first, rows)
        self._whole = whole


class BlockLease:
    """The right to a block of the arena."""

    __slots__ = ("_returns", "byte_size", "offset")

    def __init__(self, returns: BlockReturns, offset: int, byte_size: int) -> None:
        self._returns = returns
        self.offset = offset
        self.byte_size = byte_size

    def __del__(self) -> None:
        self._returns.append((self.offset, self.byte_size))

    def contains(self, offset: int, byte_size: int) -> bool:
        """Whether these bytes lie in it."""
        return self.offset <= offset and offset + byte_size <= self.offset + self.byte_size


class BlockInRows(BlockLease):
    """A tensor of a request in rows; what comes back is the rows."""

    __slots__ = ("_lease",)

    def __init__(self, lease: RowsLease, offset: int, byte_size: int) -> None:
        super().__init__(deque(), offset, byte_size)
        self._lease = lease


def leased_array(view: memoryview, offset: int, datatype: str, shape: tuple[int, ...], lease: object) -> Array:
    """Return a view of the arena that keeps ``lease`` and the mapping alive as long as any array made from it."""
    dtype = DATATYPES[datatype].numpy_dtype
    count = 1
    for dim in shape:
        count *= dim
    if not count:
        return np.empty(shape, dtype)
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_buffer(view, offset)
    # numpy keeps the exporter of its bytes alive, and that keeps what hangs on it.
    raw.lease = lease  # type: ignore[attr-defined]
    return np.ndarray(shape, dtype, memoryview(raw))


class Pending:
    """One request: submitted -> (response)* -> done. Changed under the connection's lock only."""

    __slots__ = (
        "attempt",
        "deadline_ns",
        "edition",
        "enqueue_ns",
        "error",
        "has_run",
        "is_abandoned",
        "is_cancelled",
        "is_done",
        "lease",
        "model",
        "parameters",
        "priority",
        "route",
        "rows",
        "timeout_us",
        "trace",
        "waiter",
    )

    def __init__(self, model: Opened, lease: Rows | None, rows: int) -> None:
        self.model = model
        self.edition = model.edition
        #: Rows that the request lives in; a parcel has blocks instead.
        self.lease = lease
        self.rows = rows
        #: Where it was handed in last.
        self.route = 0
        self.attempt = 0
        self.priority = 0
        self.timeout_us = 0
        self.deadline_ns = 0
        self.enqueue_ns = 0
        #: Of a request that is traced.
        self.trace: Trace | None = None
        self.error: ServingError | None = None
        #: Response parameters of a request in rows.
        self.parameters: Mapping[str, ParameterValue] = _NO_PARAMETERS
        self.is_done = False
        #: Of a request that is done: a worker had it.
        self.has_run = False
        self.is_cancelled = False
        #: Nobody waits even for the last answer, which is still to come.
        self.is_abandoned = False
        #: Called once, as soon as there is something to take.
        self.waiter: Callable[[], None] | None = None

    @property
    def has_news(self) -> bool:
        """True if waiting is over: it is done, or has a response that nobody has taken."""
        return self.is_done or self.is_abandoned

    def abandon(self) -> None:
        """Let whoever waits go: that is its answer, whatever comes. Its memory stays lent until it is done."""
        self.error = Cancelled("request was cancelled")
        self.is_abandoned = True
        self.wake()

    def finish(self, error: ServingError | None = None) -> None:
        """It has its last answer."""
        if not self.is_abandoned:
            self.error = error
        self.is_done = True
        self.wake()

    def raise_error(self) -> None:
        """Raise what ended it, if anything did.

        Raises:
            DeadlineExceeded: the caller's deadline has passed, whoever noticed it first.
            ServingError: the server's answer.
        """
        error = self.error
        if error is None:
            return
        if isinstance(error, Cancelled) and 0 < self.deadline_ns <= time.monotonic_ns():
            raise DeadlineExceeded(error.text)
        raise error

    def wake(self) -> None:
        """Let whoever waits look."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter()


class PendingResponses(Pending):
    """A request whose inputs and answers lie in blocks; it may have several answers."""

    __slots__ = ("ends_empty", "inputs", "response_count", "responses")

    def __init__(self, model: Opened, rows: int) -> None:
        super().__init__(model, None, rows)
        #: What the inputs lie in: not given back while a worker may read it.
        self.inputs: tuple[BlockLease, ...] = ()
        #: Responses that nobody has taken yet, each with what its outputs lie in.
        self.responses: deque[tuple[ReplyHead, tuple[BlockLease, ...]]] = deque()
        #: Responses that have come so far.
        self.response_count = 0
        #: The end was told by itself, after the last response (decoupled models).
        self.ends_empty = False

    @property
    def has_news(self) -> bool:
        return self.is_done or self.is_abandoned or bool(self.responses)

    def device_lease(self, place: TensorPlace, held: Sequence[BlockLease]) -> DeviceLease | None:
        """Return the device memory that an output of a response lies in; None: it is none of ours.

        Args:
            held: what the response lies in.
        """
        return None

    def respond(self, reply: ReplyHead, held: tuple[BlockLease, ...]) -> None:
        """Keep a response until somebody takes it; nobody is woken yet."""
        self.responses.append((reply, held))
        self.response_count += 1


class PendingParcel(PendingResponses):
    """A request outside slabs, as the engine knows it."""

    __slots__ = ("blocks", "device_id", "head", "lent", "sequence", "shape_key", "take_room", "targets", "token")

    def __init__(self, model: Opened, rows: int, token: int) -> None:
        super().__init__(model, rows)
        self.token = token
        #: An encoded ``ParcelHead``.
        self.head = b""
        self.shape_key = 0
        #: Correlation id as text, or empty; as a number; flags of SUBMIT_PARCEL.
        self.sequence: tuple[str, int, int] = ("", 0, 0)
        #: The GPU that tensors of the request lie on; -1: none do.
        self.device_id = -1
        #: Device memory that outputs go to, by name: not given back while a worker may write there.
        self.targets: dict[str, DeviceLease] = {}
        #: Takes device memory for an output that waits there, by its bytes.
        self.take_room: Callable[[int], DeviceLease | None] = _no_room
        #: The reply block that came with the request.
        self.blocks: list[BlockLease] = []
        #: Reply blocks lent since, for responses that have not come yet.
        self.lent: deque[BlockLease] = deque()

    def lend_rooms(self, needs: Mapping[str, int]) -> Mapping[str, DeviceLease]:
        """Return room on the device for outputs that wait there, whose bytes these are; what finds none is missing."""
        rooms: dict[str, DeviceLease] = {}
        for name, byte_size in needs.items():
            self.targets.pop(name, None)
            lease = self.take_room(byte_size) if byte_size > 0 else None
            if lease is not None:
                rooms[name] = self.targets[name] = lease
        return rooms

    def device_lease(self, place: TensorPlace, held: Sequence[BlockLease]) -> DeviceLease | None:
        lease = self.targets.get(place.name)
        fits = lease is not None and place.offset == lease.offset and place.byte_size <= lease.byte_size
        return lease if fits else None


def _no_room(_byte_size: int) -> DeviceLease | None:
    return None
