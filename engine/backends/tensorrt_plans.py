"""TensorRT plans from ONNX files: built once, kept in a cache by content, library, GPU and shapes.

Written against what TensorRT and TensorRT-RTX share; the library comes in as an argument. TensorRT-RTX builds without a
GPU too (FACTS 5). Used by worker processes and by tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from forebay.engine.backends.cache_directory import default_cache_directory, make_private_directory, replace_file
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.log import log
from forebay.ipc.worker_messages import InstanceSpec

#: Parameters with the shapes of inputs whose dimensions vary, as trtexec takes them: ``x:1x3x224x224,y:1x8``.
SHAPE_PARAMETERS = ("trt_min_shapes", "trt_opt_shapes", "trt_max_shapes")

Shape = tuple[int, ...]


class ProfileShapes(NamedTuple):
    """Smallest, usual and largest shape of one input."""

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


def choose_profile(spec: InstanceSpec, inputs: Mapping[str, Shape]) -> dict[str, ProfileShapes]:
    """Return the shapes to build for: from the parameters, else the configured dims with batches up to the largest.

    Args:
        inputs: name to shape as the ONNX file has it, -1 for a size that varies. Fixed ones need no profile.

    Raises:
        InvalidArgument: a size varies, and nothing says how far.
    """
    least, usual, most = (parse_shapes(spec.parameters.get(key, ""), key) for key in SHAPE_PARAMETERS)
    is_batching = spec.max_batch_size > 0
    # Nothing says how many elements a ragged batch has at most.
    configured = {
        tensor.name: (-1,) if tensor.allow_ragged_batch and is_batching else tensor.backend_dims
        for tensor in spec.inputs
    }
    profile: dict[str, ProfileShapes] = {}
    for name, shape in inputs.items():
        if -1 not in shape:
            continue
        given = [shapes.get(name) for shapes in (least, usual, most)]
        if any(one is not None for one in given):
            lo, mid, hi = (one or next(other for other in (*given[::-1],) if other is not None) for one in given)
        else:
            dims = configured.get(name, shape[1:] if spec.max_batch_size > 0 else shape)
            if -1 in dims:
                raise InvalidArgument(
                    f"model '{spec.model}', input '{name}': its shape {list(shape)} varies; say how far with the "
                    f"parameters {', '.join(SHAPE_PARAMETERS)}, for example "
                    f"'{name}:{'x'.join(str(1 if size == -1 else size) for size in shape)}'"
                )
            batches = ((1,), (spec.max_batch_size,), (spec.max_batch_size,)) if spec.max_batch_size > 0 else ((),) * 3
            lo, mid, hi = ((*batch, *dims) for batch in batches)
        if not len(lo) == len(mid) == len(hi) == len(shape):
            raise InvalidArgument(f"model '{spec.model}', input '{name}': it has {len(shape)} dimensions")
        if any(not small <= middle <= large for small, middle, large in zip(lo, mid, hi, strict=True)):
            raise InvalidArgument(
                f"model '{spec.model}', input '{name}': the shapes must rise from {SHAPE_PARAMETERS[0]} to "
                f"{SHAPE_PARAMETERS[2]}"
            )
        profile[name] = ProfileShapes(lo, mid, hi)
    return profile


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
    config = builder.create_builder_config()
    inputs = {tensor.name: tuple(tensor.shape) for tensor in _inputs_of(network)}
    profile = choose_profile(spec, inputs)
    if profile:
        made = builder.create_optimization_profile()
        for name, shapes in profile.items():
            made.set_shape(name, shapes.least, shapes.usual, shapes.most)
        config.add_optimization_profile(made)
    if compute_capability and hasattr(config, "set_compute_capability"):
        _set_target(trt, config, compute_capability)
    config.progress_monitor = monitor = _make_monitor(trt, spec.model)
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        raise InvalidArgument(f"TensorRT cannot build model '{spec.model}': {logger.take()}")
    return bytes(plan)


def _inputs_of(network: Any) -> Sequence[Any]:
    return [network.get_input(index) for index in range(network.num_inputs)]


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


def cached_plan(trt: Any, spec: InstanceSpec, onnx_file: str, *, device: str, compute_capability: str) -> bytes:
    """Return the plan of an ONNX file, from the cache or built now; other instances wait meanwhile.

    Args:
        device: the GPU's name: plans belong to it.

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

    return _read_or_make(directory, key, build)


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


def _read_or_make(directory: str, key: str, make: Callable[[], bytes]) -> bytes:
    path = os.path.join(directory, f"{key}.plan")
    try:
        make_private_directory(directory)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        log.warning(f"TensorRT plans are not kept: {error}")
        return make()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            return file.read()
        plan = make()
        try:
            replace_file(path, plan)
        except OSError as error:
            log.warning(f"a TensorRT plan is not kept: {error}")
        return plan
    finally:
        os.close(lock)
