"""A model configuration as plain values: what the rest of the engine reads.

Frozen structs without protobuf behind them: cheap to import, to compare and to send to another process.
:func:`forebay.engine.repository.spec_reader.spec_from_config` makes them.
"""

from __future__ import annotations

import enum

import msgspec

from forebay.ipc.tensor import TensorSpec


class InstanceKind(enum.StrEnum):
    """Where an instance runs. The value is what Python models see as ``model_instance_kind``."""

    CPU = "CPU"
    GPU = "GPU"
    MODEL = "MODEL"


class TimeoutAction(enum.StrEnum):
    """What happens to a request that waited too long (spec C-075)."""

    REJECT = "REJECT"
    DELAY = "DELAY"


class ModelPriority(enum.StrEnum):
    """``optimization.priority`` (spec C-051)."""

    DEFAULT = "DEFAULT"
    MAX = "MAX"
    MIN = "MIN"


class InputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input of a model."""

    name: str
    datatype: str
    """Protocol name, for example ``FP32``."""
    dims: tuple[int, ...]
    """Without the batch dimension; -1 for a size that varies."""
    reshape: tuple[int, ...] | None = None
    """What the backend sees instead of ``dims``; None: the same."""
    optional: bool = False
    allow_ragged_batch: bool = False
    is_shape_tensor: bool = False
    is_non_linear_format_io: bool = False
    format: str = "NONE"
    """``NONE``, ``NHWC`` or ``NCHW``; informational."""

    def tensor(self) -> TensorSpec:
        """Return what a frontend needs of it."""
        return TensorSpec(
            name=self.name,
            datatype=self.datatype,
            dims=self.dims,
            optional=self.optional,
            allow_ragged_batch=self.allow_ragged_batch,
            reshape=self.reshape,
            is_shape_tensor=self.is_shape_tensor,
        )


class OutputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One output of a model."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    reshape: tuple[int, ...] | None = None
    label_filename: str = ""
    """Relative to the model directory; empty: none."""
    is_shape_tensor: bool = False
    is_non_linear_format_io: bool = False

    def tensor(self, labels: tuple[str, ...] = ()) -> TensorSpec:
        """Return what a frontend needs of it, with the content of the label file."""
        return TensorSpec(
            name=self.name,
            datatype=self.datatype,
            dims=self.dims,
            reshape=self.reshape,
            labels=labels,
            is_shape_tensor=self.is_shape_tensor,
        )


class BatchInputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An input that is made from the whole batch (spec S-141..S-146)."""

    kind: str
    """For example ``BATCH_ELEMENT_COUNT``."""
    target_names: tuple[str, ...]
    datatype: str
    """INT32 or FP32."""
    source_inputs: tuple[str, ...]


class BatchOutputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Outputs that are split by the shape of an input (spec S-147)."""

    kind: str
    target_names: tuple[str, ...]
    source_inputs: tuple[str, ...]


class QueuePolicySpec(msgspec.Struct, frozen=True, kw_only=True):
    """Admission and waiting of one priority level (spec C-075)."""

    timeout_action: TimeoutAction = TimeoutAction.REJECT
    default_timeout_us: int = 0
    """0: none."""
    allow_timeout_override: bool = False
    max_queue_size: int = 0
    """0: unlimited."""


class DefaultSchedulingSpec(msgspec.Struct, frozen=True, kw_only=True, tag="default"):
    """No scheduling block: every request is its own execution, first come first served (spec S-001..S-006)."""


class DynamicBatchingSpec(msgspec.Struct, frozen=True, kw_only=True, tag="dynamic"):
    """The dynamic batcher (spec C-070..C-076)."""

    preferred_batch_sizes: tuple[int, ...] = ()
    """Ascending, without repeats."""
    max_queue_delay_us: int = 0
    preserve_ordering: bool = False
    priority_levels: int = 0
    """0: priorities are off."""
    default_priority_level: int = 0
    default_queue_policy: QueuePolicySpec = QueuePolicySpec()
    priority_queue_policies: dict[int, QueuePolicySpec] = {}
    """By priority level; levels that are not here have the default policy."""

    @property
    def has_queue_policy(self) -> bool:
        """True if any timeout, queue limit or priority is configured (spec S-020)."""
        policies = (self.default_queue_policy, *self.priority_queue_policies.values())
        return self.priority_levels > 1 or any(p.default_timeout_us or p.max_queue_size for p in policies)


class ControlSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One control tensor of a sequence batcher (spec C-079)."""

    name: str
    kind: str
    """``START``, ``END``, ``READY`` or ``CORRID``."""
    datatype: str
    false_value: float = 0.0
    true_value: float = 1.0
    """Both exact: INT32, FP32 and BOOL fit a double. Without meaning for CORRID."""


class StateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of implicit state (spec C-080)."""

    input_name: str
    output_name: str
    datatype: str
    dims: tuple[int, ...]
    initial_dims: tuple[int, ...] | None = None
    """Shape of the initial value; None: ``dims`` with 1 for -1, filled with zeros (spec S-081)."""
    initial_file: str = ""
    """File below ``<model>/initial_state/``; empty: zeros."""
    initial_name: str = ""
    use_same_buffer_for_input_output: bool = False
    use_growable_memory: bool = False


class DirectStrategy(msgspec.Struct, frozen=True, kw_only=True, tag="direct"):
    """A sequence keeps its batch slot (spec S-064, S-065)."""

    max_queue_delay_us: int = 0
    minimum_slot_utilization: float = 0.0


class OldestStrategy(msgspec.Struct, frozen=True, kw_only=True, tag="oldest"):
    """The oldest requests of the candidate sequences make a batch (spec S-067)."""

    max_candidate_sequences: int = 1
    """Slots per instance; where none is written, the maximum batch size."""
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    preserve_ordering: bool = False


class SequenceBatchingSpec(msgspec.Struct, frozen=True, kw_only=True, tag="sequence"):
    """The sequence batcher (spec C-077..C-083)."""

    max_sequence_idle_us: int = 1_000_000
    strategy: DirectStrategy | OldestStrategy = DirectStrategy()
    controls: tuple[ControlSpec, ...] = ()
    states: tuple[StateSpec, ...] = ()
    iterative_sequence: bool = False


class EnsembleStepSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an ensemble (spec C-084)."""

    model_name: str
    model_version: int
    """-1: the latest."""
    input_map: dict[str, str]
    """The model's input to the ensemble's tensor."""
    output_map: dict[str, str]
    """The model's output to the ensemble's tensor."""
    model_namespace: str = ""


class EnsembleSpec(msgspec.Struct, frozen=True, kw_only=True, tag="ensemble"):
    """An ensemble's graph (spec S-100..S-120)."""

    steps: tuple[EnsembleStepSpec, ...]
    max_inflight_requests: int = 0
    """0: unlimited."""


#: What schedules a model's requests.
Scheduling = DefaultSchedulingSpec | DynamicBatchingSpec | SequenceBatchingSpec | EnsembleSpec


class ResourceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an execution occupies while it runs (spec S-152)."""

    name: str
    is_global: bool
    count: int


class InstanceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One instance: one loaded copy of the model in one worker."""

    name: str
    """``<group>_<k>`` (spec C-091); instances of one group on several GPUs share it, as in Triton."""
    group: str
    kind: InstanceKind
    device_id: int
    """GPU id; 0 for CPU and MODEL."""
    host_policy: str
    """Name of a policy given by ``--host-policy``; by default ``cpu``, ``gpu_<id>`` or ``model``."""
    passive: bool = False
    """Exists, but gets no requests (spec C-098)."""
    profiles: tuple[str, ...] = ()
    """TensorRT optimisation profiles."""
    resources: tuple[ResourceSpec, ...] = ()
    rate_priority: int = 1
    """Weight in the rate limiter; never 0 (spec S-151)."""


class AcceleratorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of ``execution_accelerators`` (spec C-053)."""

    name: str
    parameters: dict[str, str] = {}


class OptimizationSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Hints for the backend (spec C-050..C-056)."""

    graph_level: int | None = None
    """None: not given."""
    priority: ModelPriority = ModelPriority.DEFAULT
    gpu_accelerators: tuple[AcceleratorSpec, ...] = ()
    cpu_accelerators: tuple[AcceleratorSpec, ...] = ()
    input_pinned_memory: bool = True
    output_pinned_memory: bool = True
    gather_kernel_buffer_threshold: int = 0
    eager_batching: bool = False
    cuda_graphs: bool = False
    cuda_graph_batch_sizes: tuple[int, ...] = ()
    cuda_busy_wait_events: bool = False
    cuda_output_copy_stream: bool = False


class WarmupInputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input of a warm-up sample (spec C-110)."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    """Without the batch dimension."""
    source: str
    """``zero``, ``random`` or ``file``."""
    filename: str = ""
    """File below ``<model>/warmup/``."""


class WarmupSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Requests to run before an instance is READY (spec C-110)."""

    name: str
    batch_size: int
    """Requests of batch 1 that are made; 0: the sample is skipped."""
    count: int
    """Times the sample is run; at least 1."""
    inputs: tuple[WarmupInputSpec, ...]


class HistogramSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Buckets for one histogram family of the model's metrics (spec C-021)."""

    family: str
    buckets: tuple[float, ...]


class AgentSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One repository agent (spec R-126)."""

    name: str
    parameters: dict[str, str] = {}


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a configuration says about one model."""

    name: str
    backend: str
    platform: str
    runtime: str = ""
    max_batch_size: int = 0
    """0: the model does not batch, and dims are whole shapes."""
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    batch_inputs: tuple[BatchInputSpec, ...] = ()
    batch_outputs: tuple[BatchOutputSpec, ...] = ()
    scheduling: Scheduling
    instances: tuple[InstanceSpec, ...] = ()
    """Empty for an ensemble."""
    default_model_filename: str = ""
    cc_model_filenames: dict[str, str] = {}
    """Compute capability, for example ``8.0``, to file name."""
    op_libraries: tuple[str, ...] = ()
    """Custom operator libraries, relative to the model directory."""
    parameters: dict[str, str] = {}
    metric_tags: dict[str, str] = {}
    decoupled: bool = False
    response_cache: bool = False
    optimization: OptimizationSpec = OptimizationSpec()
    warmup: tuple[WarmupSpec, ...] = ()
    histograms: tuple[HistogramSpec, ...] = ()
    agents: tuple[AgentSpec, ...] = ()
    version_policy: str = "latest 1"
    """``all``, ``latest N`` or ``specific A B``; for tables and logs, ``versions.py`` decides."""

    @property
    def is_ensemble(self) -> bool:
        return isinstance(self.scheduling, EnsembleSpec)

    @property
    def is_batching(self) -> bool:
        return self.max_batch_size > 0

    @property
    def metadata_platform(self) -> str:
        """What model metadata shows as platform (spec H-038)."""
        return self.platform or self.backend
