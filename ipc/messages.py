"""The base of all typed messages that are not on a doorbell, those about requests, and what any child is told.

On the wire each is one MessagePack array whose first item is the tag. One union per direction, one decoder per union.
A new field goes last, with a default. What the supervisor and its children tell each other besides is in
``scheduler_messages.py``, ``frontend_messages.py`` and ``worker_messages.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from forebay.ipc.trace import TraceSpan

#: What a request or response parameter may be (spec H-156, H-098).
ParameterValue = str | int | bool | float


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False, kw_only=True):
    """Base: a frozen array on the wire."""

    may_lose_descriptors: ClassVar[bool] = False
    """Whoever has no room for the descriptors that come with it may do without them."""


# --- parcels ---------------------------------------------------------------------------------------------------------


class DeviceMemory(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Memory on a device that some process has exported, for workers on that device to open."""

    owner: int
    """Producer whose it is; 0: a client has registered it as a region."""
    number: int
    """Unique for its owner, and never used again."""
    device_id: int
    byte_size: int
    handle: bytes


class TensorPlace(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tensor in its producer's arena."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Full shape, batch dimension included."""
    offset: int
    byte_size: int
    arena: int = 0
    """Producer id of the arena if it is not the requester's own (ensembles, BLS); 0: the requester's."""
    memory: int = 0
    """Which of the head's device memories it lies in, from 1; 0: in an arena."""


class ParcelHead(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a worker must know of one request outside a slab."""

    inputs: tuple[TensorPlace, ...]
    reply_offset: int
    reply_bytes: int
    """The block that the producer lends for the outputs; 0 bytes: none yet."""
    outputs: tuple[str, ...] = ()
    """Requested outputs; empty: all."""
    id: str = ""
    parameters: dict[str, ParameterValue] = {}
    correlation_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    priority: int = 0
    timeout_us: int = 0
    deadline_ns: int = 0
    """Monotonic time after which nobody waits for the answer; 0: none."""
    trace_context: str = ""
    memories: tuple[DeviceMemory, ...] = ()
    """Device memory that places lie in."""
    targets: tuple[TensorPlace, ...] = ()
    """Outputs that go to device memory: where to, and how much room there is; their shapes mean nothing."""
    trace_levels: tuple[str, ...] = ()
    """What is noted of requests that the model makes for this one; empty: it is not traced."""
    may_spill: bool = False
    """Outputs that do not fit their targets come to the reply block instead of failing the request."""
    may_wait: bool = False
    """Outputs that do not fit their targets wait on the device until there is room (:class:`Rooms`); those for whom
    there is none come to the host. A target without a memory has no room yet."""


class InlineTensor(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A small output that travels in the message (decoupled responses)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class ReplyHead(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A worker's answer to a parcel."""

    outputs: tuple[TensorPlace, ...] = ()
    inline: tuple[InlineTensor, ...] = ()
    parameters: dict[str, ParameterValue] = {}
    code: int = 0
    text: str = ""
    """Error text; empty: success."""
    index: int = 0
    """Which response of this request, from 0; below 0: none, it only says that no further one follows."""
    needs_bytes: int = 0
    """Above 0: no answer yet, the outputs need a reply block of so many bytes (answer with COLLECT)."""
    spans: tuple[TraceSpan, ...] = ()
    """Of a traced request's last answer: what the model has asked others for it; see :meth:`Trace.adopt`."""
    needs_rooms: dict[str, int] = {}
    """Beside ``needs_bytes``: outputs that wait on the device, and how many bytes of room each needs there. The block
    must be larger by the aligned bytes of those that are given none."""


class Rooms(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a COLLECT lends besides a reply block: room for outputs that wait on the device."""

    memories: tuple[DeviceMemory, ...] = ()
    targets: tuple[TensorPlace, ...] = ()
    """In those memories; their shapes mean nothing."""


#: No room on any device.
NO_ROOMS = Rooms()


class RowRemark(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a RUNS_DONE says of one request besides that its outputs are in its rows."""

    run: int
    """Index of its run in the message."""
    first: int
    """The request's first row."""
    code: int = 0
    text: str = ""
    """Error text: the request has failed; empty: success."""
    parameters: dict[str, ParameterValue] = {}
    """Response parameters."""


# --- frontend -> scheduler (submit socket) ---------------------------------------------------------------------------


class RunSubmit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``requests`` requests of ``rows_each`` rows in consecutive slab rows from ``first``."""

    route: int
    base: int
    capacity: int
    first: int
    requests: int
    rows_each: int
    enqueue_ns: int
    attempt: int = 0
    priority: int = 0
    timeout_us: int = 0
    deadline_ns: int = 0
    """Monotonic time after which nobody waits for any of them; 0: none, or their producer sees to it."""


class ParcelSubmit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request outside a slab. ``head`` is an encoded :class:`ParcelHead` that the scheduler passes on unread."""

    route: int
    token: int
    rows: int
    enqueue_ns: int
    head: bytes
    shape_key: int = 0
    """Equal for requests that may share a batch (spec S-011)."""
    priority: int = 0
    timeout_us: int = 0
    deadline_ns: int = 0
    correlation_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    attempt: int = 0


class Submit(Message, frozen=True, tag=1):
    """What arrived in one event-loop turn of a producer."""

    producer: int
    epoch: int
    """The scheduler's epoch that the producer knows; an older one is dropped and resubmitted after RESYNC."""
    runs: tuple[RunSubmit, ...] = ()
    parcels: tuple[ParcelSubmit, ...] = ()


class RowsCancel(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Requests in rows of one slab."""

    route: int
    base: int
    firsts: tuple[int, ...]
    """First row of each request."""


class Cancel(Message, frozen=True, tag=2):
    """The clients of these requests left. What waits is answered as cancelled; workers hear of running parcels."""

    producer: int
    tokens: tuple[int, ...] = ()
    """Parcel tokens."""
    rows: tuple[RowsCancel, ...] = ()


class GrantReturned(Message, frozen=True, tag=3):
    """The producer will not ring this instance any more until the next grant."""

    producer: int
    instance: int
    generation: int
    batches: int = 0


FrontendToScheduler = Submit | Cancel | GrantReturned


# --- supervisor <-> any child ----------------------------------------------------------------------------------------


class Stop(Message, frozen=True, tag=10):
    """Finish what runs, then exit 0."""


class Started(Message, frozen=True, tag=13):
    """Child -> supervisor: initialised and serving."""

    detail: str = ""


class Failed(Message, frozen=True, tag=14):
    """Child -> supervisor: cannot start; one clear line."""

    code: int
    text: str


class LogChanged(Message, frozen=True, tag=24):
    """Supervisor -> scheduler, frontend, worker: log like this from now on (spec H-263).

    ``options`` are the fields of :class:`forebay.ipc.log.LogOptions`.
    """

    options: dict[str, Any]
