"""What the supervisor and frontends tell each other: on the lifeline, with descriptors, and on the control socket."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from forebay.ipc.catalog import Catalog, ModelEntry
from forebay.ipc.messages import DeviceMemory, Failed, LogChanged, Message, Started, Stop
from forebay.ipc.trace import TraceRecord, TraceRules
from forebay.ipc.worker_messages import ModelMetrics

# --- the lifeline ----------------------------------------------------------------------------------------------------


class FrontendStart(Message, frozen=True, tag=20):
    """First message to a frontend.

    Descriptors: its arena, the receiving end of its completion doorbell, the counters file, then one bound TCP socket
    per entry of ``listen``. The sockets do not listen yet: the frontend starts serving on them at :class:`Serve`.
    """

    producer: int
    arena_bytes: int
    counters_bytes: int
    runtime_directory: str
    scheduler_epoch: int
    settings: dict[str, Any]
    """The settings groups the frontend needs, as plain data."""
    listen: tuple[tuple[str, int], ...] = ()
    cache_bytes: int = 0
    """This frontend's share of the response cache; 0: there is none."""
    cache_counter_offset: int = 0
    name: str = ""
    """The frontend's name in log lines and ps, for example ``http 0``; the same after a restart."""
    keeps_pages: bool = False
    """Workers on GPUs may page-lock the arena, so that its pages must stay."""
    is_quiet: bool = False
    """It listens nowhere: connections of quiet models are handed over to it (:class:`ConnectionMoved`)."""


class DoorbellUp(Message, frozen=True, tag=21):
    """The instance may be granted to this frontend later. Comes with the sending end of its doorbell."""

    instance: int
    route: int


class DoorbellDown(Message, frozen=True, tag=22):
    """The instance is gone."""

    instance: int


class Serve(Message, frozen=True, tag=23):
    """Supervisor -> frontend: the initial load is done, listen and accept connections now (spec H-032)."""


class RegionUp(Message, frozen=True, tag=25):
    """Supervisor -> frontend: clients may use this region. A system region's comes with its descriptor."""

    generation: int
    """Of the set of regions; the frontend answers with :class:`RegionsSeen`."""
    name: str
    kind: str
    """``system`` or ``cuda``."""
    offset: int
    byte_size: int
    memory: DeviceMemory | None = None
    """Of a CUDA region, which comes without a descriptor."""
    courier: ModelEntry | None = None
    """Of a CUDA region: who carries its tensors for models that do not live on its GPU."""


class RegionDown(Message, frozen=True, tag=26):
    """Supervisor -> frontend: no further request may use these regions."""

    generation: int
    names: tuple[str, ...]


class RegionsSeen(Message, frozen=True, tag=27):
    """Frontend -> supervisor: requests that come from now on see the regions as of this generation."""

    generation: int


class RegionUnused(Message, frozen=True, tag=53):
    """Frontend -> supervisor: no request uses this CUDA region any more, which was taken away."""

    number: int
    """Of its device memory."""


class PoolUp(Message, frozen=True, tag=50):
    """Supervisor -> frontend: device memory of its own, for what the steps of ensembles on that GPU tell each other."""

    memory: DeviceMemory


class PoolDown(Message, frozen=True, tag=51):
    """Supervisor -> frontend: take no more of this pool. Answered with :class:`PoolEmpty` when nothing lies there."""

    number: int


class PoolEmpty(Message, frozen=True, tag=52):
    """Frontend -> supervisor: nothing lies in the pool any more, nor will."""

    number: int


class QuietWanted(Message, frozen=True, tag=54):
    """Frontend -> supervisor: it has a crowd, and connections that had better be served elsewhere."""


class QuietOpen(Message, frozen=True, tag=55):
    """Supervisor -> frontend: whether there is a quiet frontend now, which takes connections."""

    is_open: bool


class ConnectionMoved(Message, frozen=True, tag=56):
    """A client's connection on which nothing is asked at the moment; its socket comes with the message.

    Frontend -> supervisor: it is to be served by the quiet frontend, or, if that says so, by another one again.
    Supervisor -> frontend: serve it.
    """

    may_lose_descriptors: ClassVar[bool] = True


class Crowded(Message, frozen=True, tag=57):
    """Frontend -> supervisor: it has crowds of these models. Said anew every quarter of a second while it has any."""

    routes: tuple[int, ...]


SupervisorToFrontend = (
    FrontendStart
    | DoorbellUp
    | DoorbellDown
    | Serve
    | LogChanged
    | RegionUp
    | RegionDown
    | PoolUp
    | PoolDown
    | ModelMetrics
    | QuietOpen
    | ConnectionMoved
    | Stop
)
FrontendToSupervisor = (
    Started | Failed | RegionsSeen | RegionUnused | PoolEmpty | QuietWanted | ConnectionMoved | Crowded
)


# --- the control socket (ZeroMQ) --------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag=60):
    """Frontend -> supervisor, first message: send me catalogs."""

    producer: int


class CatalogSeen(Message, frozen=True, tag=61):
    """Frontend -> supervisor: no request is routed by an older catalog any more."""

    producer: int
    generation: int


class Command(Message, frozen=True, tag=62):
    """Frontend -> supervisor: one control call on behalf of a client.

    ``verb`` is one of load, unload, index, trace_get, trace_set, log_get, log_set, region_register, region_status,
    region_unregister, explain; ``arguments`` is checked by the supervisor's handler of that verb.
    """

    request: int
    verb: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


class CatalogPush(Message, frozen=True, tag=63):
    """Supervisor -> frontend."""

    catalog: Catalog


class CommandReply(Message, frozen=True, tag=64):
    """Supervisor -> frontend."""

    request: int
    code: int = -1
    """-1: success, else a Code."""
    text: str = ""
    result: Any = None


class TraceRulesPush(Message, frozen=True, tag=65):
    """Supervisor -> frontend: trace like this from now on (spec H-251)."""

    rules: TraceRules


class TraceReport(Message, frozen=True, tag=66):
    """Frontend -> supervisor: requests that were traced."""

    records: tuple[TraceRecord, ...]


FrontendToControl = Hello | CatalogSeen | Command | TraceReport
ControlToFrontend = CatalogPush | CommandReply | TraceRulesPush
