"""The one table of command-line flags. Everything that a user sees of a setting is derived from it and `settings.py`.

A row says which setting a flag sets and whether that already has an effect; name, type, default and explanation of the
setting come from `settings.py`. Parsing, the environment, the settings file, `--help`, docs/flags.md and
conf/forebay.toml follow. To announce that a flag now works, change its `status`.
"""

import ast
import enum
import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from forebay.engine import option_values as values
from forebay.engine import settings as settings_module
from forebay.engine.settings import Settings


class Status(enum.Enum):
    """Whether giving a flag changes anything."""

    WORKS = "works"
    #: Taken so that scripts for Triton run unchanged; our processes have nothing that it would set. The note says why.
    ACCEPTED = "accepted"
    #: Any value but the default ends the start-up with a line that says so: a setting is never silently ignored.
    NOT_YET = "not yet"


@dataclass(frozen=True, slots=True)
class Flag:
    """One command-line flag.

    Attributes:
        name: as written after the two dashes.
        path: `<section>.<field>` in `Settings`; empty for --help and --settings, which set nothing.
        status: whether it has an effect.
        note: for ACCEPTED why it needs none; for NOT_YET what to do meanwhile.
        metavar: what the help shows in place of the value; empty means after its type.
        parse: from text to value, or to one item where the setting is a tuple; None means by the setting's type.
        minimum, maximum: bounds of a number.
        environment: Triton's own environment variables that set the same.
        takes_value: False for a flag whose presence means true.
        deprecated: the warning printed when it is used, as Triton prints it.
        group: for a flag without a path, the section of the help that it stands in.
        help: its explanation, where that is not its setting's.
    """

    name: str
    path: str = ""
    status: Status = Status.WORKS
    note: str = ""
    metavar: str = ""
    parse: Callable[[str], object] | None = None
    minimum: int | None = None
    maximum: int | None = None
    environment: tuple[str, ...] = ()
    takes_value: bool = True
    deprecated: str = ""
    group: str = ""
    help: str = ""

    @property
    def section(self) -> str:
        """The group of settings that it belongs to."""
        return self.path.partition(".")[0] or self.group

    @property
    def field(self) -> str:
        """The setting's name within its group."""
        return self.path.partition(".")[2]

    @property
    def variable(self) -> str:
        """The environment variable that sets the same."""
        return "FOREBAY_" + self.name.upper().replace("-", "_")


#: What may stand between two values of a repeatable setting in an environment variable.
ENVIRONMENT_SEPARATOR = ";"

SECTION_TITLES = {
    "server": "Server",
    "log": "Logging",
    "repository": "Model repository",
    "http": "HTTP",
    "grpc": "gRPC",
    "metrics": "Metrics",
    "trace": "Tracing",
    "backend": "Backends and repository agents",
    "cache": "Response cache",
    "rate_limit": "Rate limiter",
    "scheduler": "Scheduler",
    "process": "Processes",
    "memory": "Memory",
    "gpu": "GPUs",
    "cloud": "SageMaker and Vertex AI",
}

ACCEPTED, NOT_YET = Status.ACCEPTED, Status.NOT_YET
MAX_PORT = 65535

_REPLACED = (
    "Warning: '--{}' has been deprecated and will be removed in future releases. Please use '--trace-config {} instead."
)
_EVENT_LOOP = "a frontend is an event loop, not a pool of threads; --http-frontends adds processes"
_GRPC_THREADS = "the gRPC frontend sizes its own pools"
_BUILT_IN = "agents and caches are part of the package"

FLAGS: tuple[Flag, ...] = (
    Flag("help", takes_value=False, group="server", help="Print this text."),
    Flag(
        "settings",
        group="server",
        metavar="FILE",
        help="Read settings from this file; conf/forebay.toml explains each. Flags and environment variables win.",
    ),
    Flag("id", "server.id"),
    Flag("exit-timeout-secs", "server.exit_timeout_secs", minimum=0),
    # Logging
    Flag("log-verbose", "log.verbose", metavar="LEVEL", parse=values.parse_verbosity),
    Flag("log-info", "log.info"),
    Flag("log-warning", "log.warning"),
    Flag("log-error", "log.error"),
    Flag("log-format", "log.format"),
    Flag("log-file", "log.file", metavar="FILE"),
    Flag("log-escape", "log.escape", environment=("TRITON_SERVER_ESCAPE_LOG_MESSAGES",)),
    # Model repository
    Flag("model-repository", "repository.paths", metavar="DIRECTORY"),
    Flag("model-store", "repository.paths", metavar="DIRECTORY", help="The same as --model-repository."),
    Flag("exit-on-error", "repository.exit_on_error"),
    Flag("disable-auto-complete-config", "repository.disable_auto_complete_config", takes_value=False),
    Flag("strict-readiness", "repository.strict_readiness"),
    Flag("model-control-mode", "repository.control_mode"),
    Flag("repository-poll-secs", "repository.poll_secs", minimum=0),
    Flag("load-model", "repository.load_models", metavar="MODEL"),
    Flag(
        "model-config-name",
        "repository.config_name",
        metavar="NAME",
        parse=values.parse_config_name,
    ),
    Flag(
        "model-load-thread-count",
        "repository.load_thread_count",
        ACCEPTED,
        "each instance loads in a process of its own, as many at a time as there are cores",
        minimum=0,
    ),
    Flag("model-load-retry-count", "repository.load_retry_count", minimum=0),
    Flag("model-namespacing", "repository.namespacing"),
    Flag(
        "strict-model-config",
        "repository.disable_auto_complete_config",
        help="The same as --disable-auto-complete-config.",
        deprecated="Warning: '--strict-model-config' has been deprecated! "
        "Please use '--disable-auto-complete-config' instead.",
    ),
    # HTTP
    Flag("allow-http", "http.allow"),
    Flag("http-address", "http.address", metavar="ADDRESS"),
    Flag("http-port", "http.port", metavar="PORT", minimum=0, maximum=MAX_PORT),
    Flag("reuse-http-port", "http.reuse_port"),
    Flag(
        "http-header-forward-pattern",
        "http.header_forward_pattern",
        metavar="REGEX",
    ),
    Flag("http-thread-count", "http.thread_count", ACCEPTED, _EVENT_LOOP, minimum=1),
    Flag("http-max-input-size", "http.max_input_size", metavar="BYTES", minimum=1),
    Flag(
        "http-restricted-api",
        "http.restricted_apis",
        metavar="APIS:KEY=VALUE",
        parse=values.parse_restricted_api("api", "http-restricted-api"),
    ),
    Flag("http-frontends", "http.frontends", metavar="COUNT", minimum=1, maximum=256),
    Flag("http-quiet-frontend", "http.quiet_frontend"),
    Flag("max-connections", "http.max_connections", metavar="COUNT", minimum=1),
    Flag("http-request-timeout-secs", "http.request_timeout_secs", metavar="SECONDS", minimum=1),
    # gRPC
    Flag("allow-grpc", "grpc.allow"),
    Flag("grpc-address", "grpc.address", metavar="ADDRESS"),
    Flag("grpc-port", "grpc.port", metavar="PORT", minimum=0, maximum=MAX_PORT),
    Flag("reuse-grpc-port", "grpc.reuse_port"),
    Flag("grpc-header-forward-pattern", "grpc.header_forward_pattern", metavar="REGEX"),
    Flag(
        "grpc-infer-thread-count",
        "grpc.infer_thread_count",
        ACCEPTED,
        _GRPC_THREADS,
        minimum=2,
        maximum=128,
    ),
    Flag(
        "grpc-infer-allocation-pool-size",
        "grpc.infer_allocation_pool_size",
        ACCEPTED,
        "requests live in shared memory, not in pooled objects",
        minimum=0,
    ),
    Flag("grpc-max-response-pool-size", "grpc.max_response_pool_size", minimum=1),
    Flag("grpc-use-ssl", "grpc.use_ssl"),
    Flag("grpc-use-ssl-mutual", "grpc.use_ssl_mutual"),
    Flag("grpc-server-cert", "grpc.server_cert", metavar="FILE"),
    Flag("grpc-server-key", "grpc.server_key", metavar="FILE"),
    Flag("grpc-root-cert", "grpc.root_cert", metavar="FILE"),
    Flag(
        "grpc-infer-response-compression-level",
        "grpc.infer_response_compression_level",
    ),
    Flag("grpc-keepalive-time", "grpc.keepalive_time"),
    Flag("grpc-keepalive-timeout", "grpc.keepalive_timeout"),
    Flag("grpc-keepalive-permit-without-calls", "grpc.keepalive_permit_without_calls"),
    Flag("grpc-http2-max-pings-without-data", "grpc.http2_max_pings_without_data"),
    Flag(
        "grpc-http2-min-recv-ping-interval-without-data",
        "grpc.http2_min_recv_ping_interval_without_data",
    ),
    Flag("grpc-http2-max-ping-strikes", "grpc.http2_max_ping_strikes"),
    Flag("grpc-max-connection-age", "grpc.max_connection_age"),
    Flag("grpc-max-connection-age-grace", "grpc.max_connection_age_grace"),
    Flag(
        "grpc-restricted-protocol",
        "grpc.restricted_protocols",
        metavar="PROTOCOLS:KEY=VALUE",
        parse=values.parse_restricted_api("protocol", "grpc-restricted-protocol"),
    ),
    # Metrics
    Flag("allow-metrics", "metrics.allow"),
    Flag("allow-gpu-metrics", "metrics.allow_gpu"),
    Flag("allow-cpu-metrics", "metrics.allow_cpu"),
    Flag("metrics-address", "metrics.address", metavar="ADDRESS"),
    Flag("metrics-port", "metrics.port", metavar="PORT", minimum=0, maximum=MAX_PORT),
    Flag("metrics-interval-ms", "metrics.interval_ms", parse=values.parse_interval_ms),
    Flag("metrics-config", "metrics.config", metavar="SETTING=VALUE", parse=values.parse_metrics_config),
    # Tracing
    Flag("trace-config", "trace.config", metavar="[MODE,]SETTING=VALUE", parse=values.parse_trace_config),
    Flag(
        "trace-level",
        "trace.level",
        metavar="LEVEL",
        parse=values.parse_trace_level,
        deprecated=_REPLACED.format("trace-level", "level=<OFF|TIMESTAMPS|TENSORS>"),
    ),
    Flag(
        "trace-rate",
        "trace.rate",
        minimum=1,
        deprecated=_REPLACED.format("trace-rate", "rate=<rate value>"),
    ),
    Flag(
        "trace-count",
        "trace.count",
        minimum=-1,
        deprecated=_REPLACED.format("trace-count", "count=<count value>"),
    ),
    Flag(
        "trace-file",
        "trace.file",
        metavar="FILE",
        deprecated=_REPLACED.format("trace-file", "triton,file=<filepath>"),
    ),
    Flag(
        "trace-log-frequency",
        "trace.log_frequency",
        minimum=0,
        deprecated=_REPLACED.format("trace-log-frequency", "triton,log-frequency=<log frequency value>"),
    ),
    # Backends and repository agents
    Flag("backend-directory", "backend.directory", metavar="DIRECTORY"),
    Flag(
        "backend-config",
        "backend.config",
        metavar="[BACKEND,]SETTING=VALUE",
        parse=values.parse_backend_config,
    ),
    Flag("repoagent-directory", "backend.repoagent_directory", ACCEPTED, _BUILT_IN, metavar="DIRECTORY"),
    # Response cache
    Flag(
        "cache-config",
        "cache.config",
        metavar="CACHE,SETTING=VALUE",
        parse=values.parse_cache_config,
    ),
    Flag("cache-directory", "cache.directory", ACCEPTED, _BUILT_IN, metavar="DIRECTORY"),
    Flag(
        "response-cache-byte-size",
        "cache.config",
        metavar="BYTES",
        help="The same as --cache-config local,size=BYTES.",
        parse=values.parse_cache_byte_size,
        deprecated="Warning: '--response-cache-byte-size' has been deprecated! This will default to the 'local' cache "
        "implementation with the provided byte size for its config. Please use '--cache-config' instead.",
    ),
    # Rate limiter
    Flag("rate-limit", "rate_limit.mode"),
    Flag(
        "rate-limit-resource",
        "rate_limit.resources",
        metavar="NAME:COUNT[:DEVICE]",
        parse=values.parse_rate_limit_resource,
    ),
    # Scheduler
    Flag("batching", "scheduler.batching", metavar="triton|eager|slo=MILLISECONDS", parse=values.parse_batching),
    Flag(
        "delay-request-count",
        "scheduler.delay_request_count",
        minimum=0,
        environment=("TRITONSERVER_DELAY_SCHEDULER",),
    ),
    # Processes
    Flag("runtime-directory", "process.runtime_directory", metavar="DIRECTORY"),
    Flag("worker-timeout-secs", "process.worker_timeout_secs", minimum=0),
    Flag("load-timeout-secs", "process.load_timeout_secs", minimum=0),
    Flag("instances-per-process", "process.instances_per_process", minimum=1),
    Flag("wait", "process.wait", metavar="park|spin[=MICROSECONDS]", parse=values.parse_wait),
    Flag("share-cores", "process.share_cores"),
    Flag("cpu-wakeup-latency-us", "process.cpu_wakeup_latency_us", minimum=-1, maximum=1_000_000),
    Flag(
        "host-policy",
        "process.host_policies",
        metavar="POLICY,SETTING=VALUE",
        parse=values.parse_host_policy,
    ),
    # Memory
    Flag("arena-byte-size", "memory.arena_byte_size", minimum=1 << 20, maximum=1 << 44),
    Flag("allow-client-shm", "memory.allow_client_shm"),
    Flag("pinned-memory-pool-byte-size", "memory.pinned_pool_byte_size", minimum=0, maximum=values.INT64_MAX),
    Flag(
        "buffer-manager-thread-count",
        "memory.buffer_manager_thread_count",
        ACCEPTED,
        "batches are slices of shared memory; there is nothing to copy",
        minimum=0,
    ),
    # GPUs
    Flag("gpu-fallback", "gpu.fallback"),
    Flag("cpu-only", "gpu.cpu_only", environment=("TRITON_SERVER_CPU_ONLY",)),
    Flag("mps", "gpu.mps"),
    Flag(
        "enable-peer-access",
        "gpu.enable_peer_access",
        ACCEPTED,
        "instances on different GPUs do not read each other's memory",
    ),
    Flag(
        "cuda-memory-pool-byte-size",
        "gpu.memory_pool_byte_sizes",
        metavar="DEVICE:BYTES",
        parse=values.parse_device_bytes,
    ),
    Flag(
        "cuda-virtual-address-size",
        "gpu.virtual_address_sizes",
        ACCEPTED,
        "implicit states do not reserve addresses ahead",
        metavar="DEVICE:BYTES",
        parse=values.parse_device_bytes,
    ),
    Flag("min-supported-compute-capability", "gpu.min_supported_compute_capability", minimum=0),
    Flag(
        "model-load-gpu-limit",
        "gpu.model_load_limits",
        metavar="DEVICE:FRACTION",
        parse=values.parse_device_fraction,
    ),
    # SageMaker and Vertex AI
    Flag("allow-sagemaker", "cloud.allow_sagemaker"),
    Flag("sagemaker-port", "cloud.sagemaker_port", minimum=0, maximum=MAX_PORT),
    Flag(
        "sagemaker-safe-port-range",
        "cloud.sagemaker_safe_port_range",
        metavar="FIRST-LAST",
        parse=values.parse_port_range,
    ),
    Flag("sagemaker-thread-count", "cloud.sagemaker_thread_count", ACCEPTED, _EVENT_LOOP, minimum=1),
    Flag("allow-vertex-ai", "cloud.allow_vertex_ai"),
    Flag("vertex-ai-port", "cloud.vertex_ai_port", minimum=0, maximum=MAX_PORT),
    Flag("vertex-ai-thread-count", "cloud.vertex_ai_thread_count", ACCEPTED, _EVENT_LOOP, minimum=1),
    Flag("vertex-ai-default-model", "cloud.vertex_ai_default_model", metavar="MODEL"),
)

FLAGS_BY_NAME = {flag.name: flag for flag in FLAGS}

#: The flag that stands for a setting in the settings file and the reference: the first of those that set it.
FLAGS_BY_PATH: dict[str, Flag] = {}
for _flag in FLAGS:
    if _flag.path:
        FLAGS_BY_PATH.setdefault(_flag.path, _flag)


@functools.cache
def field_type(path: str) -> Any:
    """Return the annotation of a setting, without `| None`."""
    section, _, field = path.partition(".")
    annotation = get_type_hints(get_type_hints(Settings)[section])[field]
    if get_origin(annotation) in (Union, types.UnionType):
        return next(member for member in get_args(annotation) if member is not type(None))
    return annotation


def is_repeatable(flag: Flag) -> bool:
    """Whether each use of the flag adds a value instead of replacing it."""
    return bool(flag.path) and get_origin(field_type(flag.path)) is tuple


def get_setting(settings: Settings, path: str) -> Any:
    """Return the value of a setting."""
    section, _, field = path.partition(".")
    return getattr(getattr(settings, section), field)


def default_value(flag: Flag) -> Any:
    """Return the value that a flag's setting has when nobody sets it."""
    return get_setting(Settings(), flag.path)


def parse_value(flag: Flag, text: str) -> Any:
    """Turn the text given for a flag into its value, or into one item of it where the flag is repeatable.

    Raises:
        ValueError: the text is no such value; the message is for the user.
    """
    if flag.parse is not None:
        return flag.parse(text)
    kind = field_type(flag.path)
    if kind is bool:
        return values.parse_bool(text)
    if kind is int:
        minimum = values.INT32_MAX * -1 - 1 if flag.minimum is None else flag.minimum
        return values.parse_int(text, minimum, values.INT32_MAX if flag.maximum is None else flag.maximum)
    if kind is float:
        return values.parse_float(text, float("-inf") if flag.minimum is None else flag.minimum)
    if get_origin(kind) is Literal:
        return values.parse_choice(text, get_args(kind), flag.name)
    return text


def placeholder(flag: Flag) -> str:
    """Return what the help writes in place of the flag's value: `true|false`, `N`, `none|poll|explicit`, ..."""
    if not flag.takes_value:
        return ""
    if flag.metavar:
        return flag.metavar
    kind = field_type(flag.path)
    if kind is bool:
        return "true|false"
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if kind in (int, float):
        return flag.name.rpartition("-")[2].upper() if flag.name.endswith(("-secs", "-ms", "-size")) else "N"
    return "TEXT"


def explanation(flag: Flag) -> str:
    """Return the sentence or two that explain a flag: the string under its setting in settings.py."""
    if flag.help:
        return flag.help
    return field_explanations()[flag.path]


@functools.cache
def field_explanations() -> dict[str, str]:
    """Return the string under each field of settings.py, by path.

    Python keeps no docstrings of fields, so they are read from the module's source.
    """
    sections = {struct.__name__: section for section, struct in get_type_hints(Settings).items()}
    found: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(settings_module)).body:
        if not isinstance(node, ast.ClassDef) or node.name not in sections:
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[f"{sections[node.name]}.{field.target.id}"] = " ".join(text.value.value.split())
    return found
