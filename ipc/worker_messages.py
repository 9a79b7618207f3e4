"""What the supervisor tells zygotes and workers on their lifelines, with descriptors, and what they answer."""

from __future__ import annotations

from typing import Any

import msgspec

from forebay.ipc.messages import DeviceMemory, Failed, LogChanged, Message, Started, Stop
from forebay.ipc.tensor import TensorSpec


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
    """``{"name", "data_type": "TYPE_*", "shape": [...]}`` with -1 for sizes that vary, batch dimension included;
    ``"is_shape_tensor": True`` besides, of one that is."""
    outputs: tuple[dict[str, Any], ...]
    config: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """What else the backend sets (Python ``auto_complete_config``)."""
    max_batch_size: int | None = None
    """Largest batch that the model file allows, 0 for none; None: it does not say."""


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
    counted: bool = True
    """False: statistics are not to know of its requests (spec C-115)."""


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
