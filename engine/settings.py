"""Everything about a server that its user can choose: one frozen struct per concern, grouped by `Settings`.

This file is the only place where a setting's name, type, default and explanation are written down. The flags
(`flags.py`), the environment, the settings file, the help and the reference pages are all derived from it; the
explanations are the strings under the fields. Names, units and defaults are Triton's where Triton has the setting
(spec 10-cli), so a name that ends in `_secs`, `_ms` or `_byte_size` says its unit.

Built once, in the process that the user started; other processes receive the parts that they need.
"""

from typing import Literal

import msgspec

ControlMode = Literal["none", "poll", "explicit"]
LogFormat = Literal["default", "ISO8601"]
CompressionLevel = Literal["none", "low", "medium", "high"]
RateLimitMode = Literal["off", "execution_count"]
TraceLevel = Literal["OFF", "TIMESTAMPS", "TENSORS"]
TraceMode = Literal["triton", "opentelemetry"]
GpuFallback = Literal["none", "cpu"]
MpsMode = Literal["auto", "on", "off"]

#: The APIs that `--http-restricted-api` and `--grpc-restricted-protocol` can name (Triton's restricted_features.h).
RESTRICTED_APIS = (
    "health",
    "metadata",
    "inference",
    "shared-memory",
    "model-config",
    "model-repository",
    "statistics",
    "trace",
    "logging",
)


class ConfigEntry(msgspec.Struct, frozen=True):
    """One `[<name>,]<setting>=<value>` of a repeatable flag; an empty name means "for all"."""

    name: str
    setting: str
    value: str


class RestrictedApi(msgspec.Struct, frozen=True):
    """APIs that answer only requests which carry the header `key` with exactly this value."""

    apis: tuple[str, ...]
    key: str
    value: str


class RateLimitResource(msgspec.Struct, frozen=True):
    """How many of a named resource there are; on one device, or on each when `device` is -1."""

    name: str
    count: int
    device: int = -1


class DeviceBytes(msgspec.Struct, frozen=True):
    """A number of bytes for one CUDA device."""

    device: int
    byte_size: int


class DeviceFraction(msgspec.Struct, frozen=True):
    """A fraction of one CUDA device's memory, from 0.0 to 1.0."""

    device: int
    fraction: float


class PortRange(msgspec.Struct, frozen=True):
    """Ports from `first` to `last`, both included."""

    first: int
    last: int


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The server as a whole."""

    id: str = "triton"
    """The server's name in its metadata and in traces."""

    exit_timeout_secs: int = 30
    """How long, in seconds, a stopping server waits for requests in flight. What still runs then is ended."""


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is logged, how and where."""

    verbose: int = 0
    """Verbosity: 0 is off, 1 logs each request, 2 more. `true` and `false` mean 1 and 0."""

    info: bool = True
    """Log informational lines (letter I)."""

    warning: bool = True
    """Log warnings (letter W)."""

    error: bool = True
    """Log errors (letter E)."""

    format: LogFormat = "default"
    """How a line begins: `default` (letter, month and day, time) or `ISO8601`."""

    file: str = ""
    """The file that log lines are appended to; empty means standard error."""

    escape: bool = True
    """Write each message as a JSON-escaped, quoted string, so that no client's text can forge a log line."""


class RepositorySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where models come from and how they are loaded."""

    paths: tuple[str, ...] = ()
    """Model repositories: directories, or s3://, gs:// and as:// locations. A model name that is in two of them is not
    served."""

    functions: tuple[str, ...] = ()
    """Python functions to serve as models, each as `module:function`."""

    exit_on_error: bool = True
    """Exit when a model fails to load at start-up. With `false` the others are served."""

    disable_auto_complete_config: bool = False
    """Take config.pbtxt as it is, instead of completing what it leaves out from the model file."""

    strict_readiness: bool = True
    """Whether /v2/health/ready needs all models to be ready, or only a server that answers."""

    control_mode: ControlMode = "none"
    """`none` loads all models at start-up, `poll` also follows changes of the repository, `explicit` loads what
    `--load-model` and clients name."""

    poll_secs: int = 15
    """Seconds between two looks at the repository; only with the control mode `poll`."""

    load_models: tuple[str, ...] = ()
    """A model to load at start-up with the control mode `explicit`; `*` alone means all."""

    config_name: str = ""
    """Use configs/<name>.pbtxt of each model directory, where there is one, in place of config.pbtxt."""

    load_thread_count: int = 4
    """How many models are loaded at the same time."""

    load_retry_count: int = 0
    """How often a failed load is tried again."""

    namespacing: bool = False
    """Let repositories hold models of the same name, told apart by the repository's own name."""


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP endpoint."""

    allow: bool = True
    """Serve HTTP."""

    address: str = "0.0.0.0"
    """The address to listen on."""

    port: int = 8000
    """The port to listen on; 0 takes a free one."""

    reuse_port: bool = False
    """Let another server listen on the same port (SO_REUSEPORT); the kernel shares out the connections."""

    header_forward_pattern: str = ""
    """A regular expression: request headers whose name it finds a match in, case aside, become request parameters."""

    thread_count: int = 8
    """Triton's number of HTTP threads."""

    max_input_size: int = 67_108_864
    """The largest JSON header, JSON data of one input, raw request or decompressed body, in bytes. Binary tensors that
    follow a header are bounded by the model's shapes instead."""

    restricted_apis: tuple[RestrictedApi, ...] = ()
    """APIs that need a header with a secret value, as `<api>[,<api>...]:<header>=<value>`."""

    frontends: int = 1
    """How many HTTP frontend processes share the port. More than one pays on machines with many cores."""

    quiet_frontend: bool = True
    """While many requests to one model arrive together, serve the connections of other models in a frontend process of
    their own, with an arena of its own, started when it is first needed. Not with a response cache, of which each
    frontend has its own."""

    max_connections: int = 10_000
    """How many client connections one frontend keeps open; further ones wait to be accepted."""

    request_timeout_secs: float = 60.0
    """Seconds that a client may take to send a request it has begun, and more for a large body: a second for each
    64 KiB. One that takes longer is answered 408; one that takes no byte of its replies for so long is cut off."""


class GrpcSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The gRPC endpoint."""

    allow: bool = True
    """Serve gRPC."""

    address: str = "0.0.0.0"
    """The address to listen on."""

    port: int = 8001
    """The port to listen on; 0 takes a free one."""

    reuse_port: bool = False
    """Let another server listen on the same port (SO_REUSEPORT)."""

    header_forward_pattern: str = ""
    """A regular expression: request metadata whose key it finds a match in becomes request parameters."""

    infer_thread_count: int = 2
    """Triton's number of threads that handle inference calls, 2 to 128."""

    infer_allocation_pool_size: int = 8
    """How many request and response objects Triton keeps for reuse."""

    max_response_pool_size: int = 2_147_483_647
    """The largest number of responses that may wait to be written to one stream."""

    use_ssl: bool = False
    """Encrypt: needs the server certificate and key."""

    use_ssl_mutual: bool = False
    """Encrypt and ask clients for a certificate too; implies `use_ssl`."""

    server_cert: str = ""
    """The server's certificate, a PEM file."""

    server_key: str = ""
    """The server's private key, a PEM file."""

    root_cert: str = ""
    """The certificate authority that client certificates are checked against, a PEM file."""

    infer_response_compression_level: CompressionLevel = "none"
    """How hard responses are compressed, for clients that accept it."""

    keepalive_time: int = 7_200_000
    """Milliseconds without activity after which the server pings a client."""

    keepalive_timeout: int = 20_000
    """Milliseconds that the server waits for the answer to a ping before it closes the connection."""

    keepalive_permit_without_calls: bool = False
    """Ping also while no call is open."""

    http2_max_pings_without_data: int = 2
    """How many pings may be sent without data in between; 0 means any number."""

    http2_min_recv_ping_interval_without_data: int = 300_000
    """Milliseconds that must lie between two pings of a client that sends no data."""

    http2_max_ping_strikes: int = 2
    """How many bad pings end a client's connection; 0 means that none does."""

    max_connection_age: int | None = None
    """Milliseconds after which a connection is closed; unset means never."""

    max_connection_age_grace: int | None = None
    """Milliseconds that calls get to finish once the connection has reached its age."""

    restricted_protocols: tuple[RestrictedApi, ...] = ()
    """Protocols that need metadata with a secret value, as `<protocol>[,<protocol>...]:<key>=<value>`."""


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The Prometheus endpoint."""

    allow: bool = True
    """Serve metrics."""

    allow_gpu: bool = True
    """Include GPU metrics, where there is a GPU."""

    allow_cpu: bool = True
    """Include CPU and memory metrics of the machine."""

    address: str = ""
    """The address to listen on; empty means the HTTP address."""

    port: int = 8002
    """The port to listen on; 0 takes a free one."""

    interval_ms: int = 2000
    """Milliseconds between two readings of CPU and GPU metrics. Models' counters are always current."""

    config: tuple[ConfigEntry, ...] = ()
    """What is measured, as `<setting>=<value>`: counter_latencies, summary_latencies, summary_quantiles,
    histogram_latencies."""

    def option(self, setting: str) -> str | None:
        """Return the value given last for a setting of `config`, or None."""
        return next((entry.value for entry in reversed(self.config) if entry.setting == setting), None)


class TraceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Request tracing. `config` is already folded into the other fields, except what only OpenTelemetry reads."""

    config: tuple[ConfigEntry, ...] = ()
    """What is traced, as `[<mode>,]<setting>=<value>`: level, rate, count, mode; triton,file; triton,log-frequency;
    opentelemetry,url; opentelemetry,resource=<key>=<value>; ..."""

    mode: TraceMode = "triton"
    """Write traces to a file in Triton's format, or send them to an OpenTelemetry collector."""

    level: tuple[TraceLevel, ...] = ()
    """What is traced: `TIMESTAMPS`, `TENSORS`, or `OFF`, which wins over the others."""

    rate: int = 1000
    """One of this many requests is traced."""

    count: int = -1
    """How many requests are traced in all; -1 means any number."""

    file: str = ""
    """The file that traces are written to."""

    log_frequency: int = 0
    """Write a numbered file after this many traces; 0 writes one file at exit."""


class BackendSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What runs the models."""

    directory: str = "/opt/tritonserver/backends"
    """Where backends that are written in Python lie, as `<name>/model.py`. Libraries in it are not loaded."""

    config: tuple[ConfigEntry, ...] = ()
    """Options of backends, as `<backend>,<setting>=<value>`, or `<setting>=<value>` for all of them."""

    repoagent_directory: str = "/opt/tritonserver/repoagents"
    """Triton's directory of repository agents."""

    def options(self, backend: str) -> dict[str, str]:
        """Return what `config` says for one backend: its own settings over those for all."""
        shared = {entry.setting: entry.value for entry in self.config if not entry.name}
        return shared | {entry.setting: entry.value for entry in self.config if entry.name == backend}


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The response cache."""

    config: tuple[ConfigEntry, ...] = ()
    """The cache and its options, as `<cache>,<setting>=<value>`: `local,size=<bytes>`. Without any there is no cache.
    Each HTTP and gRPC frontend keeps answers of its own; the size is that of all together."""

    directory: str = "/opt/tritonserver/caches"
    """Triton's directory of cache libraries."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the cache; 0: there is none.

        Raises:
            ValueError: the options name another cache than `local`, or no usable size.
        """
        if not self.config:
            return 0
        options = {entry.setting: entry.value for entry in self.config}
        name = self.config[0].name
        if name != "local":
            raise ValueError(f"the cache '{name}' is not part of forebay; use 'local,size=<bytes>'")
        unknown = sorted(set(options) - {"size"})
        if unknown or "size" not in options:
            raise ValueError(f"the local cache has one setting, 'size', got {', '.join(map(repr, options))}")
        text = options["size"]
        if not text.isascii() or not text.isdigit():
            raise ValueError(f"the size of the local cache must be a number of bytes, got '{text}'")
        return int(text)


class RateLimitSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which instances may run at the same time."""

    mode: RateLimitMode = "off"
    """`execution_count` lets an instance run only while the resources that it names are free."""

    resources: tuple[RateLimitResource, ...] = ()
    """How many of a resource there are, as `<name>:<count>[:<device>]`."""


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How requests become batches."""

    batching: str = "triton"
    """`triton` forms batches exactly as the model's configuration says; `eager` never lets an idle instance wait for
    a batch to fill; `slo=<milliseconds>ms` forms the largest batches that still answer in that time, and refuses what
    would be answered later (models with `dynamic_batching`; `forebay_slo_ms` sets it for one model)."""

    delay_request_count: int = 0
    """Hold back this many requests of each model before the first batch; only for tests."""


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The processes that a server consists of."""

    runtime_directory: str = ""
    """A directory for this server's sockets, made with mode 0700; empty means a fresh one under XDG_RUNTIME_DIR or
    /tmp, which is removed at exit."""

    worker_timeout_secs: float = 120.0
    """Seconds that one execution may take before its worker counts as hung: it is replaced, and its requests fail. 0
    means any time. The model parameter `worker_timeout_secs` sets the same for one model; decoupled models, which may
    stream for long, have no limit but that."""

    load_timeout_secs: float = 0.0
    """Seconds that loading a model, or looking into its file, may take before its process counts as hung and the load
    fails. 0 means any time."""

    instances_per_process: int = 1
    """How many instances of a model on one device share a worker process, and with it their model's memory where the
    backend allows it: each runs in a thread, on a GPU with a stream, of its own. One keeps a crash to itself. Backends
    that keep state for a whole process, such as Python models, have one instance in each."""

    wait: str = "park"
    """How workers wait: `park` sleeps until there is work; `spin=<microseconds>` looks for it so long before it sleeps
    (`spin`: 50), which saves a wake-up per batch where there is a core to spare for each worker."""

    share_cores: bool = True
    """While requests come one at a time, a frontend and the worker that serves it run on one core, by turns: the one
    that the client's packets arrive on. A wake-up then costs less; and the frontend stays awake for a client that comes
    back at once, where that costs hardly more CPU time, or, on machines of up to four cores and if it may, has the
    kernel keep all cores awake, where requests become so much faster that this costs no more; each then runs on a core
    of its own. As soon as two requests are in flight they run anywhere again. Off: the kernel places them, always."""

    cpu_wakeup_latency_us: int = -1
    """While HTTP or gRPC requests come, the longest that an idle core of this machine may take to wake up, in
    microseconds; 0 keeps all cores awake, which can halve the latency of single requests and costs power. Needs write
    access to /dev/cpu_dma_latency. -1: only what `--share-cores` does for a lone client; any other value replaces that,
    and a large one leaves everything as the system has it."""

    host_policies: tuple[ConfigEntry, ...] = ()
    """Where instances of a host policy run, as `<policy>,numa-node=<n>` or `<policy>,cpu-cores=<a>-<b>`."""


class MemorySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Memory for tensors."""

    arena_byte_size: int = 268_435_456
    """Bytes of shared memory that each frontend may use for the tensors of its requests. Pages are taken as they are
    needed; a request that finds no room is answered 503."""

    allow_client_shm: bool = False
    """Let clients register shared memory of their own, for requests that carry no tensor bytes."""

    pinned_pool_byte_size: int = 268_435_456
    """GPU workers page-lock each frontend's shared memory, for fast copies, if it is of at most so many bytes; 0
    page-locks nothing."""

    buffer_manager_thread_count: int = 0
    """Triton's number of extra threads that copy tensors."""


class GpuSettings(msgspec.Struct, frozen=True, kw_only=True):
    """GPUs."""

    fallback: GpuFallback = "none"
    """What becomes of a model that asks for a GPU which is not there: `none` fails to load it, `cpu` serves it on the
    CPU and says so."""

    cpu_only: bool = False
    """Use no GPU, as if there were none."""

    mps: MpsMode = "auto"
    """The CUDA Multi-Process Service lets workers on one GPU run at the same time. `auto` uses a daemon that runs
    already, `on` starts one if none does, `off` uses none."""

    enable_peer_access: bool = True
    """Let GPUs read each other's memory directly."""

    memory_pool_byte_sizes: tuple[DeviceBytes, ...] = ()
    """Bytes of GPU memory for tensors that pass between models on one GPU, as `<device>:<bytes>`; 64 MiB on devices
    that are not named. So many for steps of ensembles, and as many for shared-memory clients and Python models that
    call others. Without room there tensors pass through shared memory."""

    virtual_address_sizes: tuple[DeviceBytes, ...] = ()
    """Bytes of GPU addresses for growing implicit states, as `<device>:<bytes>`; 1 GiB on devices not named."""

    min_supported_compute_capability: float = 6.0
    """GPUs below this compute capability are not used."""

    model_load_limits: tuple[DeviceFraction, ...] = ()
    """The fraction of a GPU's memory beyond which no model is loaded on it, as `<device>:<fraction>`."""


class CloudSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoints of SageMaker and Vertex AI."""

    allow_sagemaker: bool = False
    """Serve SageMaker's endpoint."""

    sagemaker_port: int = 8080
    """The port of SageMaker's endpoint."""

    sagemaker_safe_port_range: PortRange | None = None
    """The ports that the other endpoints may use, as `<first>-<last>`; unset means any."""

    sagemaker_thread_count: int = 8
    """Triton's number of threads of SageMaker's endpoint."""

    allow_vertex_ai: bool = False
    """Serve Vertex AI's endpoint; on by default where AIP_MODE is PREDICTION."""

    vertex_ai_port: int = 8080
    """The port of Vertex AI's endpoint; by default AIP_HTTP_PORT."""

    vertex_ai_thread_count: int = 8
    """Triton's number of threads of Vertex AI's endpoint."""

    vertex_ai_default_model: str = ""
    """The model that answers Vertex AI's predictions; empty means the only one."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of a server. The names of the groups are the sections of the settings file."""

    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    repository: RepositorySettings = RepositorySettings()
    http: HttpSettings = HttpSettings()
    grpc: GrpcSettings = GrpcSettings()
    metrics: MetricsSettings = MetricsSettings()
    trace: TraceSettings = TraceSettings()
    backend: BackendSettings = BackendSettings()
    cache: CacheSettings = CacheSettings()
    rate_limit: RateLimitSettings = RateLimitSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    process: ProcessSettings = ProcessSettings()
    memory: MemorySettings = MemorySettings()
    gpu: GpuSettings = GpuSettings()
    cloud: CloudSettings = CloudSettings()
