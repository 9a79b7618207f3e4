"""Every typed message that is not on a doorbell: submissions, heads of parcels, control commands, the lifeline.

On the wire each is one MessagePack array whose first item is the tag. One union per direction, one decoder per union.
A new field goes last, with a default.
"""

from __future__ import annotations

from typing import Any

import msgspec

from forebay.ipc.catalog import Catalog, ModelEntry
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.trace import TraceRecord, TraceRules, TraceSpan

#: What a request or response parameter may be (spec H-156, H-098).
ParameterValue = str | int | bool | float


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False, kw_only=True):
    """Base: a frozen array on the wire."""


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
    """Which response of this request, from 0."""
    needs_bytes: int = 0
    """Above 0: no answer yet, the outputs need a reply block of so many bytes (answer with COLLECT)."""
    spans: tuple[TraceSpan, ...] = ()
    """Of a traced request's last answer: what the model has asked others for it; see :meth:`Trace.adopt`."""


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


# --- supervisor -> scheduler (lifeline, with descriptors) ------------------------------------------------------------


class QueuePolicy(msgspec.Struct, frozen=True, array_like=True):
    """One ModelQueuePolicy (spec C-075)."""

    timeout_action: str = "REJECT"
    default_timeout_us: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0


class BatchingPolicy(msgspec.Struct, frozen=True, array_like=True):
    """How a model's requests become batches (spec 6.1, 6.2)."""

    max_batch_size: int = 0
    dynamic: bool = False
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    preserve_ordering: bool = False
    priority_levels: int = 0
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy = QueuePolicy()
    priority_queue_policy: dict[int, QueuePolicy] = {}
    objective_us: int = 0
    """Within what time 99 % of the requests are to be answered; 0: batches are formed as the rest of this says."""


class RouteUp(Message, frozen=True, tag=1):
    """A model version can take requests as soon as it has instances."""

    route: int
    name: str
    version: int
    batching: BatchingPolicy
    extra: dict[str, Any] = {}
    """Scheduling beyond the dynamic batcher (sequences, ensembles, rate limits, cache), by kind."""
    counter_offset: int = 0
    row_bytes: tuple[int, ...] = ()
    """Bytes per row of each input, then each output, to check clients' slabs; empty: the model takes no rows."""
    keeps_requests: bool = False
    """The backend gets requests one by one: a run in a batch is of requests with equally many rows."""


class RouteDrain(Message, frozen=True, tag=2):
    """Accept no new requests for the route; answer RouteDrained when nothing is queued or running."""

    route: int


class RouteGone(Message, frozen=True, tag=3):
    """Forget the route; what is still queued is failed with ``text``."""

    route: int
    code: int
    text: str


class Resource(msgspec.Struct, frozen=True, array_like=True):
    """A number of units of a named resource (spec S-152)."""

    name: str
    count: int
    device: int = -1
    """Device whose units these are; -1: global."""


class InstanceUp(Message, frozen=True, tag=4):
    """A worker is ready. Comes with one descriptor: the sending end of its doorbell."""

    route: int
    instance: int
    name: str
    resources: tuple[Resource, ...] = ()
    """What an execution occupies under the rate limiter."""
    rate_priority: int = 1
    """Weight under the rate limiter: 2 gets half the executions of 1 (spec S-151)."""


class InstanceDown(Message, frozen=True, tag=5):
    """A worker ended or is about to be stopped; its unanswered batch is LOST."""

    instance: int
    exit_status: int = 0
    is_hung: bool = False
    """It was ended because an execution took longer than it may: what it ran is not tried again."""


class InstanceDrain(Message, frozen=True, tag=6):
    """Give this instance no new batches; answer InstanceDrained when it is idle and not granted."""

    instance: int


class ProducerUp(Message, frozen=True, tag=7):
    """A producer exists. Descriptors: the sending end of its completion doorbell; if it is not trusted, also the
    receiving end of its submission socket."""

    producer: int
    name: str
    arena_bytes: int = 0
    trusted: bool = True
    """False for shared-memory clients: everything that they submit is checked, and the worker keeps their grants."""


class ProducerDown(Message, frozen=True, tag=8):
    """A producer ended: drop its queued requests, forget its grants."""

    producer: int


class SchedulerStart(Message, frozen=True, tag=9):
    """First message to a scheduler. Comes with one descriptor: the receiving end of the done doorbell."""

    epoch: int
    runtime_directory: str
    counters_bytes: int = 0
    is_rate_limited: bool = False
    resources: tuple[Resource, ...] = ()
    """Limits that were set; of other resources there is as much as the neediest instance wants (spec S-152)."""
    hold_back_requests: int = 0
    """Each model waits for so many requests before its first batch, for tests (spec S-035)."""


class Stop(Message, frozen=True, tag=10):
    """Finish what runs, then exit 0."""


class CountersFile(Message, frozen=True, tag=11):
    """Comes with one descriptor: the counters file."""

    byte_size: int


class Drained(Message, frozen=True, tag=12):
    """Child -> supervisor: the route (``route``) or instance (``instance``) asked for is drained."""

    route: int = 0
    instance: int = 0


class Started(Message, frozen=True, tag=13):
    """Child -> supervisor: initialised and serving."""

    detail: str = ""


class Failed(Message, frozen=True, tag=14):
    """Child -> supervisor: cannot start; one clear line."""

    code: int
    text: str


class Explain(Message, frozen=True, tag=15):
    """Supervisor -> scheduler: send the ring of the last batches of a route."""

    route: int
    request: int


class Explained(Message, frozen=True, tag=16):
    """Scheduler -> supervisor."""

    request: int
    batches: list[dict[str, Any]] = []


class Restored(Message, frozen=True, tag=17):
    """Supervisor -> scheduler, after a restart: every route, instance and producer has been announced again."""


SupervisorToScheduler = (
    SchedulerStart
    | RouteUp
    | RouteDrain
    | RouteGone
    | InstanceUp
    | InstanceDown
    | InstanceDrain
    | ProducerUp
    | ProducerDown
    | CountersFile
    | Stop
    | Explain
    | Restored
)
SchedulerToSupervisor = Started | Failed | Drained | Explained


# --- supervisor -> frontend (lifeline, with descriptors) -------------------------------------------------------------


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


class DoorbellUp(Message, frozen=True, tag=21):
    """The instance may be granted to this frontend later. Comes with the sending end of its doorbell."""

    instance: int
    route: int


class DoorbellDown(Message, frozen=True, tag=22):
    """The instance is gone."""

    instance: int


class Serve(Message, frozen=True, tag=23):
    """Supervisor -> frontend: the initial load is done, listen and accept connections now (spec H-032)."""


class LogChanged(Message, frozen=True, tag=24):
    """Supervisor -> frontend, worker: log like this from now on (spec H-263).

    ``options`` are the fields of :class:`forebay.ipc.log.LogOptions`.
    """

    options: dict[str, Any]


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


class MetricSample(msgspec.Struct, frozen=True, array_like=True):
    """One metric of a model's own at one moment (spec P-119)."""

    labels: dict[str, str]
    value: float
    """Of a histogram: the sum of what was observed."""
    buckets: tuple[tuple[float, int], ...] = ()
    """Upper bound and cumulative count; the last bound is infinity."""


class FamilySample(msgspec.Struct, frozen=True, array_like=True):
    """One family of a model's own metrics at one moment."""

    name: str
    description: str
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    metrics: tuple[MetricSample, ...]


class ModelMetrics(Message, frozen=True, tag=28):
    """Worker -> supervisor -> metrics frontend: the metrics that a worker's model defines, as they are now."""

    instance: int
    families: tuple[FamilySample, ...]
    """Empty: the worker is gone."""


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
    | Stop
)
FrontendToSupervisor = Started | Failed | RegionsSeen | RegionUnused | PoolEmpty


# --- supervisor <-> zygote and worker (lifeline, with descriptors) ---------------------------------------------------


class Fork(Message, frozen=True, tag=30):
    """Supervisor -> zygote: fork a worker.

    Descriptors: doorbell receive end, done send end, worker lifeline, counters file.
    """

    instance: int
    name: str


class Forked(Message, frozen=True, tag=31):
    """Zygote -> supervisor."""

    instance: int
    pid: int


class WorkerExited(Message, frozen=True, tag=32):
    """Zygote -> supervisor: how a worker ended, as ``os.waitstatus_to_exitcode`` gives it (negative: signal)."""

    instance: int
    pid: int
    exit_code: int


class InstanceSpec(msgspec.Struct, frozen=True):
    """Everything a worker needs to load one instance of one model version."""

    model: str
    version: int
    route: int
    instance: int
    instance_name: str
    backend: str
    model_path: str
    """The model's directory (config, labels, warmup)."""
    version_path: str
    """The version's directory."""
    model_file: str
    """Default model file name, for example ``model.onnx``."""
    kind: str = "CPU"
    device_id: int = 0
    cores: tuple[int, ...] = ()
    """Cores to pin to; empty: none."""
    max_batch_size: int = 0
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    parameters: dict[str, str] = {}
    backend_config: dict[str, str] = {}
    config_json: bytes = b"{}"
    platform: str = ""
    decoupled: bool = False
    optimization: dict[str, Any] = {}
    warmup: tuple[dict[str, Any], ...] = ()
    extra: dict[str, Any] = {}
    counter_offset: int = 0
    rows_mode: bool = False
    """True: requests come as RUNS, else as PARCELS."""
    spin_us: int = 0
    """How long the worker looks for work before it sleeps."""


class Describe(Message, frozen=True, tag=33):
    """Supervisor -> worker: say what the model file holds (auto-complete), do not load for serving yet."""

    spec: InstanceSpec


class Described(Message, frozen=True, tag=34):
    """Worker -> supervisor."""

    inputs: tuple[dict[str, Any], ...]
    """``{"name", "data_type": "TYPE_*", "shape": [...]}`` with -1 for sizes that vary, batch dimension included."""
    outputs: tuple[dict[str, Any], ...]
    config: dict[str, Any] = {}
    """What else the backend sets (Python ``auto_complete_config``)."""


class Load(Message, frozen=True, tag=35):
    """Supervisor -> worker: load, warm up, then answer Loaded or Failed."""

    spec: InstanceSpec


class Loaded(Message, frozen=True, tag=36):
    """Worker -> supervisor: ready for batches."""

    load_ns: int
    warmup_ns: int = 0
    memory_bytes: int = 0
    wants_parcels: bool = False
    """The loaded model wants what only parcels have, for example answers after the execution."""
    has_ready_check: bool = False
    """The model says itself whether it is ready (spec P-012): ask it with :class:`AskReady`."""
    device_id: int = -1
    """Device in whose memory tensors of requests may lie; -1: there is none."""


class CheckMemory(Message, frozen=True, tag=42):
    """Supervisor -> courier: can this memory be opened? Answered with MemoryChecked; it stays open."""

    memory: DeviceMemory


class MemoryChecked(Message, frozen=True, tag=43):
    """Worker -> supervisor."""

    text: str = ""
    """Why not; empty: it can."""


class MemoryDown(Message, frozen=True, tag=44):
    """Supervisor -> worker: the memory is taken away; close it, or free it. Answered with MemoryClosed."""

    owner: int
    number: int


class MemoryClosed(Message, frozen=True, tag=45):
    """Worker -> supervisor."""

    owner: int
    number: int


class MakeMemory(Message, frozen=True, tag=48):
    """Supervisor -> courier: allocate device memory for a frontend. Answered with MemoryMade; kept until MemoryDown."""

    owner: int
    number: int
    byte_size: int


class MemoryMade(Message, frozen=True, tag=49):
    """Worker -> supervisor."""

    handle: bytes = b""
    text: str = ""
    """Why there is none; empty: there is."""


class ArenaUp(Message, frozen=True, tag=37):
    """Supervisor -> worker. Descriptors: the producer's arena, the sending end of its completion doorbell."""

    producer: int
    byte_size: int
    trusted: bool = True
    """False for shared-memory clients: what their messages say is checked against the model."""


class ArenaDown(Message, frozen=True, tag=38):
    """Supervisor -> worker: the producer is gone; unmap."""

    producer: int


class Phase(Message, frozen=True, tag=39):
    """Worker -> supervisor: what it is doing, for the start-up display."""

    text: str


class RingUp(Message, frozen=True, tag=40):
    """Supervisor -> worker. Comes with one descriptor: the receiving end of the ring of a client whose arena it has."""

    producer: int


class Adopt(Message, frozen=True, tag=41):
    """Supervisor -> worker: run another instance beside yours, in a thread. Descriptors as those of :class:`Fork`."""

    name: str


class AskReady(Message, frozen=True, tag=46):
    """Supervisor -> worker: ask the model whether it is ready; answered with :class:`ReadyAnswer`."""

    request: int


class ReadyAnswer(Message, frozen=True, tag=47):
    """Worker -> supervisor."""

    request: int
    is_ready: bool
    text: str = ""
    """Why asking it failed."""


SupervisorToZygote = Fork | Stop
ZygoteToSupervisor = Started | Failed | Forked | WorkerExited
SupervisorToWorker = (
    Describe
    | Load
    | ArenaUp
    | ArenaDown
    | RingUp
    | LogChanged
    | Adopt
    | CheckMemory
    | MakeMemory
    | MemoryDown
    | AskReady
    | Stop
)
WorkerToSupervisor = (
    Described | Loaded | Failed | Phase | ModelMetrics | MemoryChecked | MemoryMade | MemoryClosed | ReadyAnswer
)


# --- control socket (ZeroMQ): frontend <-> supervisor ----------------------------------------------------------------


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
    arguments: dict[str, Any] = {}


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
