"""TensorRT plans from ONNX files: built once, kept in a cache by content, library, GPU and shapes.

Written against what TensorRT and TensorRT-RTX share; the library comes in as an argument. TensorRT-RTX builds without a
GPU too (FACTS 5). Used by worker processes and by tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from forebay.engine.backends.base import DescribedModel, DescribedTensor, parse_int
from forebay.engine.backends.cache_directory import default_cache_directory, make_private_directory, replace_file
from forebay.engine.backends.tensorrt_tensors import protocol_datatype
from forebay.engine.repository.auto_complete import DEFAULT_MAX_BATCH_SIZE
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.log import log
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.worker_messages import InstanceSpec

#: Parameters with the shapes of inputs whose dimensions vary, and the values of shape tensors, as trtexec takes them:
#: ``x:1x3x224x224,y:1x8``.
SHAPE_PARAMETERS = ("trt_min_shapes", "trt_opt_shapes", "trt_max_shapes")

Shape = tuple[int, ...]


class OnnxInput(NamedTuple):
    """An input as an ONNX file has it."""

    name: str
    shape: Shape
    """-1 for a size that varies."""
    is_shape_tensor: bool = False


class ProfileShapes(NamedTuple):
    """Smallest, usual and largest shape of one input; values of a shape tensor."""

    least: Shape
    usual: Shape
    most: Shape


def parse_shapes(text: str, what: str) -> dict[str, Shape]:
    """Read ``x:1x3x224x224,y:1x8``.

    Raises:
        InvalidArgument: it is no such text.
    """
    shapes: dict[str, Shape] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, sizes = part.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            shape = ()
        if not name or not shape or any(size < 0 for size in shape):
            raise InvalidArgument(f"model parameter '{what}' must look like 'x:1x3x224x224,y:1x8', got '{part}'")
        shapes[name] = shape
    return shapes


def choose_profile(spec: InstanceSpec, inputs: Sequence[OnnxInput]) -> dict[str, ProfileShapes]:
    """Return what to build for: from the parameters, else the configured dims with batches up to the largest.

    Args:
        inputs: those with fixed shapes need no profile; of a shape tensor it is the values that vary.

    Raises:
        InvalidArgument: a size or value varies, and nothing says how far.
    """
    given = {key: parse_shapes(spec.parameters.get(key, ""), key) for key in SHAPE_PARAMETERS}
    is_batching = spec.max_batch_size > 0
    # Nothing says how many elements a ragged batch has at most.
    configured = {
        tensor.name: (-1,) if tensor.allow_ragged_batch and is_batching else tensor.backend_dims
        for tensor in spec.inputs
    }
    profile: dict[str, ProfileShapes] = {}
    for one in inputs:
        if -1 not in one.shape and not one.is_shape_tensor:
            continue
        shapes = _given_shapes(given, one.name)
        if shapes is None:
            dims = configured.get(one.name, one.shape[1:] if is_batching else one.shape)
            if -1 in dims or one.is_shape_tensor:
                raise _unknown_extent(spec, one)
            least, most = ((1, *dims), (spec.max_batch_size, *dims)) if is_batching else (dims, dims)
            shapes = ProfileShapes(least, most, most)
        _check_rising(spec, one, shapes)
        profile[one.name] = shapes
    return profile


def _given_shapes(given: Mapping[str, Mapping[str, Shape]], name: str) -> ProfileShapes | None:
    """Return what the parameters say of an input; what one leaves out is as in the largest; None: they say nothing."""
    found = [given[key].get(name) for key in SHAPE_PARAMETERS]
    largest_first = [shape for shape in reversed(found) if shape is not None]
    if not largest_first:
        return None
    return ProfileShapes(*(largest_first[0] if shape is None else shape for shape in found))


def _unknown_extent(spec: InstanceSpec, one: OnnxInput) -> InvalidArgument:
    what = "its values are shapes" if one.is_shape_tensor else f"its shape {list(one.shape)} varies"
    example = (1,) * max(math.prod(one.shape), 1) if one.is_shape_tensor else one.shape
    return InvalidArgument(
        f"model '{spec.model}', input '{one.name}': {what}; say how far with the parameters "
        f"{', '.join(SHAPE_PARAMETERS)}, for example "
        f"'{one.name}:{'x'.join(str(1 if size == -1 else size) for size in example)}'"
    )


def _check_rising(spec: InstanceSpec, one: OnnxInput, shapes: ProfileShapes) -> None:
    count = math.prod(one.shape) if one.is_shape_tensor else len(one.shape)
    if {len(shape) for shape in shapes} != {count}:
        raise InvalidArgument(
            f"model '{spec.model}', input '{one.name}': it has {count} "
            f"{'values' if one.is_shape_tensor else 'dimensions'}"
        )
    if any(not small <= middle <= large for small, middle, large in zip(*shapes, strict=True)):
        raise InvalidArgument(
            f"model '{spec.model}', input '{one.name}': the shapes must rise from {SHAPE_PARAMETERS[0]} to "
            f"{SHAPE_PARAMETERS[2]}"
        )


def make_logger(trt: Any) -> Any:
    """Return a logger that keeps the last errors, for the texts of ours, and passes warnings on."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """See make_logger."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
                del self.errors[:-5]
            elif severity == trt.ILogger.WARNING:
                log.verbose(1, f"TensorRT: {message}")

        def take(self) -> str:
            """Return the errors since the last call."""
            text = "; ".join(self.errors)
            self.errors.clear()
            return text or "TensorRT did not say why"

    return Logger()


def build_plan(trt: Any, spec: InstanceSpec, onnx_file: str, *, compute_capability: str = "") -> bytes:
    """Build a plan.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        compute_capability: what to build for, for example ``8.9``; empty: the GPU of this machine, or what the library
            builds for without one.

    Raises:
        InvalidArgument: the library does not take the file; the text says where and why.
    """
    builder, network, _parser, logger = _parse(trt, spec, onnx_file)
    config = builder.create_builder_config()
    inputs = _inputs_of(network)
    profile = choose_profile(spec, inputs)
    if profile:
        config.add_optimization_profile(_make_profile(builder, inputs, profile))
    if compute_capability and hasattr(config, "set_compute_capability"):
        _set_target(trt, config, compute_capability)
    config.progress_monitor = monitor = _make_monitor(trt, spec.model)
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        raise InvalidArgument(f"TensorRT cannot build model '{spec.model}': {logger.take()}")
    return bytes(plan)


def _parse(trt: Any, spec: InstanceSpec, onnx_file: str) -> tuple[Any, Any, Any, Any]:
    """Return a builder, the network of an ONNX file, the parser that has its weights, and the logger.

    Raises:
        InvalidArgument: the library does not take the file; the text says where and why.
    """
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag.__members__
    network = builder.create_network(1 << int(flags["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in flags else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx_file):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"{error.node_operator() or 'the graph'} {error.node_name()}: {error.desc()}" for error in errors]
        raise InvalidArgument(
            f"TensorRT cannot read '{os.path.basename(onnx_file)}' of model '{spec.model}': "
            f"{'; '.join(reasons) or logger.take()}"
        )
    return builder, network, parser, logger


def _inputs_of(network: Any) -> Sequence[OnnxInput]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return [OnnxInput(tensor.name, tuple(tensor.shape), bool(tensor.is_shape_tensor)) for tensor in tensors]


def _make_profile(builder: Any, inputs: Sequence[OnnxInput], profile: Mapping[str, ProfileShapes]) -> Any:
    made = builder.create_optimization_profile()
    for one in inputs:
        if one.name in profile:
            set_extent = made.set_shape_input if one.is_shape_tensor else made.set_shape
            set_extent(one.name, *profile[one.name])
    return made


def describe_onnx(trt: Any, spec: InstanceSpec, onnx_file: str) -> DescribedModel:
    """Return what a plan of an ONNX file will say of its tensors; nothing is built.

    Raises:
        InvalidArgument: as :func:`build_plan`, or a tensor has a type that the protocol has no name for.
    """
    given = {key: parse_shapes(spec.parameters.get(key, ""), key) for key in SHAPE_PARAMETERS}
    usual = spec.max_batch_size or parse_int(spec.backend_config, "default-max-batch-size", DEFAULT_MAX_BATCH_SIZE)
    _builder, network, _parser, _logger = _parse(trt, spec, onnx_file)
    firsts: list[int] = []
    for one in _inputs_of(network):
        shapes = _given_shapes(given, one.name)
        first = shapes.most[0] if shapes is not None else -1 if one.is_shape_tensor else (*one.shape, 0)[0]
        firsts.append(usual if first == -1 else first)
    return DescribedModel(
        tuple(_describe_tensor(network.get_input(index)) for index in range(network.num_inputs)),
        tuple(_describe_tensor(network.get_output(index)) for index in range(network.num_outputs)),
        max_batch_size=min(firsts, default=0),
    )


def _describe_tensor(tensor: Any) -> DescribedTensor:
    return DescribedTensor(
        tensor.name,
        DATATYPES[protocol_datatype(tensor.dtype, tensor.name)].config_name,
        tuple(tensor.shape),
        is_shape_tensor=bool(tensor.is_shape_tensor),
    )


def _set_target(trt: Any, config: Any, compute_capability: str) -> None:
    target = trt.ComputeCapability.__members__.get("SM" + compute_capability.replace(".", ""))
    if target is None:
        # Newer than the library has a name for: its portable plans are compiled on loading.
        log.info(f"TensorRT has no target for compute capability {compute_capability}; building a portable plan")
        return
    config.num_compute_capabilities = 1
    config.set_compute_capability(target, 0)


def _make_monitor(trt: Any, model: str) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Logs the phases of the first two levels as they begin."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._top: set[str] = set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._top.add(phase_name)
            if parent_phase is None or parent_phase in self._top:
                log.info(f"model '{model}': TensorRT: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            return

    return Monitor()


class CachedPlan(NamedTuple):
    """A plan, and whether it was built just now."""

    data: bytes
    is_new: bool


def cached_plan(
    trt: Any, spec: InstanceSpec, onnx_file: str, *, device: str, compute_capability: str, unusable: bytes = b""
) -> CachedPlan:
    """Return the plan of an ONNX file, from the cache or built now; other instances wait meanwhile.

    Args:
        device: the GPU's name: plans belong to it.
        unusable: a plan that the library does not take; if it is the one in the cache, another takes its place.

    Raises:
        InvalidArgument: as :func:`build_plan`.
    """
    key = plan_key(trt, spec, onnx_file, device=device, compute_capability=compute_capability)
    directory = spec.backend_config.get("plan-cache-directory") or default_cache_directory("tensorrt")

    def build() -> bytes:
        start_ns = time.monotonic_ns()
        log.info(f"model '{spec.model}': building a TensorRT plan from '{os.path.basename(onnx_file)}'")
        plan = build_plan(trt, spec, onnx_file, compute_capability=compute_capability)
        log.info(f"model '{spec.model}': built a plan in {(time.monotonic_ns() - start_ns) / 1e9:.1f} s")
        return plan

    return _read_or_make(directory, key, build, unusable)


def plan_key(trt: Any, spec: InstanceSpec, onnx_file: str, *, device: str, compute_capability: str) -> str:
    """Return the cache's name for a plan: everything that it depends on."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(os.path.dirname(onnx_file))):
        # The model, and what may be its weights beside it.
        path = os.path.join(os.path.dirname(onnx_file), name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                digest.update(f"{name} {os.path.getsize(path)}\0".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
    shapes = [f"{tensor.name}{list(tensor.backend_dims)}" for tensor in spec.inputs]
    given = [spec.parameters.get(key, "") for key in SHAPE_PARAMETERS]
    facts = [trt.__name__, trt.__version__, device, compute_capability, str(spec.max_batch_size), *shapes, *given]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:32]


def _read_or_make(directory: str, key: str, make: Callable[[], bytes], unusable: bytes = b"") -> CachedPlan:
    path = os.path.join(directory, f"{key}.plan")
    try:
        make_private_directory(directory)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        log.warning(f"TensorRT plans are not kept: {error}")
        return CachedPlan(make(), is_new=True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            kept = file.read()
            if kept != unusable:
                return CachedPlan(kept, is_new=False)
        plan = make()
        try:
            replace_file(path, plan)
        except OSError as error:
            log.warning(f"a TensorRT plan is not kept: {error}")
        return CachedPlan(plan, is_new=True)
    finally:
        os.close(lock)
