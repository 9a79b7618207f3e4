"""What a frontend knows about the models: enough to check, place and answer a request without asking anybody.

The supervisor builds the entries and pushes a :class:`Catalog` to every frontend whenever something changes.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from forebay.ipc.errors import NotFound, NotReady
from forebay.ipc.tensor import TensorSpec


class EnsembleStep(msgspec.Struct, frozen=True):
    """One step of an ensemble (spec C-084)."""

    model: str
    version: int
    """-1: the latest."""
    inputs: dict[str, str]
    """The model's input to the ensemble's tensor."""
    outputs: dict[str, str]
    """The model's output to the ensemble's tensor."""
    namespace: str = ""
    """Of the model, as found when the ensemble was loaded."""


class GpuInstance(msgspec.Struct, frozen=True):
    """An instance on a GPU, for metrics."""

    name: str
    gpu_uuid: str
    """As the driver knows the GPU; empty: nobody knows."""
    counter_offset: int
    """Byte offset of the instance's counters in the counters file."""


class ModelEntry(msgspec.Struct, frozen=True):
    """One version of one model, READY or not."""

    name: str
    version: int
    state: str
    """``READY``, ``LOADING``, ``UNLOADING`` or ``UNAVAILABLE`` (spec R-099)."""
    reason: str = ""
    """Why it is not READY, as the index shows it: ``<Code text>: <message>``."""
    route: int = 0
    """The engine's number for this loaded version; never reused while the server runs. 0: none."""
    platform: str = ""
    """What metadata shows as platform (spec H-038)."""
    max_batch_size: int = 0
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    config_json: bytes = b"{}"
    """The reply of ``GET .../config``."""
    decoupled: bool = False
    wants_parcels: bool = False
    """The backend or the scheduler needs each request's id and parameters (Python, sequences, ensembles, cache)."""
    is_ensemble: bool = False
    state_names: tuple[str, ...] = ()
    counter_offset: int = 0
    """Byte offset of this frontend's counters for this route in the counters file; 0: none."""
    instance_counter_offsets: tuple[int, ...] = ()
    """Byte offsets of the instances' counters, for statistics."""
    producer_counter_offsets: tuple[int, ...] = ()
    """Byte offsets of all frontends' counters for this route, for statistics and metrics."""
    metric_tags: dict[str, str] = {}
    namespace: str = ""
    load_ns: int = 0
    """How long the load took."""
    response_cache: bool = False
    default_timeout_us: int = 0
    preserve_ordering: bool = False
    """Answers are given in the order of the requests (spec S-024)."""
    scheduler_counter_offset: int = 0
    """Byte offset of the scheduler's counters for this route, for statistics and metrics; 0: none."""
    worker_restart_count: int = 0
    """How often a worker of this version died and was replaced."""
    steps: tuple[EnsembleStep, ...] = ()
    """Of an ensemble."""
    max_inflight_requests: int = 0
    """Responses of a decoupled step that an ensemble works on at a time (spec S-110); 0: unlimited."""
    step_counter_offset: int = 0
    """Byte offset of this frontend's block, laid out as an instance's, for what an ensemble's steps took; 0: none."""
    instance_count: int = 0
    """How many instances there are; blocks of counters may be more, of instances that an update removed."""
    device_id: int = -1
    """GPU in whose memory tensors of requests may lie, if all instances are there; -1: in host memory only."""
    gpu_uuid: str = ""
    """Of the GPU that all instances run on, for metrics; empty: there is none."""

    detail_offset: int = 0
    """Byte offset of this frontend's block of details (:func:`forebay.ipc.counters.detail_words`); 0: none."""
    detail_offsets: tuple[int, ...] = ()
    """Byte offsets of all frontends' blocks of details, for statistics and metrics."""
    has_latencies: bool = False
    """The details hold latencies."""
    first_response_buckets_ms: tuple[float, ...] = ()
    """Upper bounds of the histogram of first responses, if the model sets its own (spec M-030)."""
    has_ready_check: bool = False
    """The model says itself whether it is ready (spec P-012); the supervisor asks it."""
    sees_requests: bool = False
    """The backend gets requests one by one (Python): only what carries nothing but tensors may live in slab rows."""
    sequence_idle_us: int = 0
    """After so long without a request a sequence is over; 0: the model has no sequences."""
    objective_us: int = 0
    """Within what time requests are to be answered, by :class:`BatchingPolicy`; 0: there is no such objective."""
    has_no_version: bool = False
    """Stands for a model that was to be loaded, but of which no version satisfies its policy (spec R-008)."""
    gpu_instances: tuple[GpuInstance, ...] = ()
    """Its instances on GPUs."""

    @property
    def is_ready(self) -> bool:
        return self.state == "READY"

    @property
    def is_interrupted(self) -> bool:
        """Loaded, but its last worker has died and the next one is not there yet."""
        return self.route != 0 and not self.is_ready and not self.is_ensemble

    @property
    def is_fixed(self) -> bool:
        """True if requests may live in slab rows: every input and output has one size per batch item."""
        return not self.wants_parcels and all(t.is_fixed for t in (*self.inputs, *self.outputs))

    def input_named(self, name: str) -> TensorSpec | None:
        return next((t for t in self.inputs if t.name == name), None)

    def output_named(self, name: str) -> TensorSpec | None:
        return next((t for t in self.outputs if t.name == name), None)


class Catalog(msgspec.Struct, frozen=True):
    """Every model known to the server, sorted by name then version."""

    generation: int
    models: tuple[ModelEntry, ...] = ()
    live: bool = True
    ready: bool = False
    """What ``GET /v2/health/ready`` says, by ``--strict-readiness`` (spec H-031)."""
    cache_counter_offsets: tuple[int, ...] = ()
    """Byte offsets of every frontend's :class:`CacheCounter` block; empty: there is no response cache."""

    def versions(self, name: str) -> tuple[ModelEntry, ...]:
        return tuple(entry for entry in self.models if entry.name == name)


def no_ready_version(name: str, entries: Iterable[ModelEntry]) -> NotFound | NotReady:
    """Return the error of a request for any version of a model of which ``entries``, all of them, none is READY.

    NotFound is Triton's (spec H-041); a version that is back in a moment is worth asking again (spec H-042).
    """
    interrupted = max((entry.version for entry in entries if entry.is_interrupted), default=0)
    if interrupted:
        return NotReady(f"Request for unknown model: '{name}' version {interrupted} is not at ready state")
    return NotFound(f"Request for unknown model: '{name}' has no available versions")
