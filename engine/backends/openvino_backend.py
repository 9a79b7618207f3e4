"""OpenVINO: ``model.xml`` with ``model.bin``, or any file that OpenVINO reads (spec B-060..B-064, R-035).

The library starts a thread when it is imported, so each worker imports it after the fork. A model whose batch dimension
is dynamic takes any batch; one with a fixed batch is set to ``max_batch_size`` and takes exactly that many rows, or
fewer with ``ENABLE_BATCH_PADDING``.

Model parameters, as in Triton's backend: ``PERFORMANCE_HINT``, ``INFERENCE_NUM_THREADS``, ``COMPILATION_NUM_THREADS``,
``NUM_STREAMS``, ``HINT_BF16``, ``CPU_EXTENSION_PATH``, ``RESHAPE_IO_LAYERS``, ``ENABLE_BATCH_PADDING``,
``TARGET_DEVICE``. ``SKIP_OV_DYNAMIC_BATCHSIZE`` switches off what OpenVINO's own batching would do, which is off here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from forebay.engine.backends.base import (
    Array,
    Arrays,
    Backend,
    DescribedModel,
    DescribedTensor,
    TensorInstance,
)
from forebay.ipc.errors import BackendFailed, Internal, InvalidArgument, Unavailable
from forebay.ipc.tensor import TensorSpec, shape_text
from forebay.ipc.worker_messages import InstanceSpec

#: OpenVINO's element types to config.pbtxt's.
_DATA_TYPES = {
    "boolean": "TYPE_BOOL",
    "u8": "TYPE_UINT8",
    "u16": "TYPE_UINT16",
    "u32": "TYPE_UINT32",
    "u64": "TYPE_UINT64",
    "i8": "TYPE_INT8",
    "i16": "TYPE_INT16",
    "i32": "TYPE_INT32",
    "i64": "TYPE_INT64",
    "f16": "TYPE_FP16",
    "f32": "TYPE_FP32",
    "f64": "TYPE_FP64",
}

_HINTS = ("LATENCY", "THROUGHPUT", "CUMULATIVE_THROUGHPUT")


def read_model(spec: InstanceSpec) -> tuple[Any, Any]:
    """Return OpenVINO's core and the model as its file has it.

    Raises:
        ServingError: there is no such file, or OpenVINO cannot read it.
    """
    name = spec.model_file or "model.xml"
    path = os.path.join(spec.version_path, name)
    if not os.path.exists(path):
        raise Unavailable(f"unable to find '{spec.version}/{name}' for model '{spec.model}'")
    import openvino

    # Its annotations name what it does not import.
    core: Any = openvino.Core()
    extension = spec.parameters.get("CPU_EXTENSION_PATH")
    try:
        if extension:
            core.add_extension(extension)
        return core, core.read_model(path)
    except RuntimeError as error:
        raise _failure("reading model", error, spec) from None


def _failure(doing: str, error: RuntimeError, spec: InstanceSpec) -> Internal:
    """Return OpenVINO's error without the places in its own source, and without paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API failed"))]
    text = " ".join(told or lines).replace(f"{spec.version_path}/", "")
    return Internal(f"openvino error in {doing} : {text[:2000]}")


# --- parameters


def compile_options(spec: InstanceSpec) -> dict[str, str]:
    """Return OpenVINO's properties for a model's parameters.

    Raises:
        InvalidArgument: with the texts of Triton's backend.
    """
    parameters = spec.parameters
    options = {
        "INFERENCE_NUM_THREADS": _number(parameters, "INFERENCE_NUM_THREADS", str(max(len(spec.cores), 1))),
        "PERFORMANCE_HINT": _choice(parameters, "PERFORMANCE_HINT", "LATENCY", _HINTS, "LATENCY/THROUGHPUT/"
                                    "CUMULATIVE_THROUGHPUT"),
    }  # fmt: skip
    if threads := _number(parameters, "COMPILATION_NUM_THREADS", ""):
        options["COMPILATION_NUM_THREADS"] = threads
    if streams := parameters.get("NUM_STREAMS"):
        if not streams.isdigit():
            streams = _choice(parameters, "NUM_STREAMS", "", ("AUTO", "NUMA"), "either AUTO/NUMA/<int_value>")
        options["NUM_STREAMS"] = streams
    if _choice(parameters, "HINT_BF16", "", ("YES",), "YES"):
        options["INFERENCE_PRECISION_HINT"] = "bf16"
    return options


def _number(parameters: Mapping[str, str], key: str, default: str) -> str:
    text = parameters.get(key) or default
    if text and not (text.isascii() and text.isdigit()):
        raise InvalidArgument(f"expected the parameter '{key}' to be a non-negative number, got {text.lower()}")
    return text


def _choice(parameters: Mapping[str, str], key: str, default: str, choices: Sequence[str], listed: str) -> str:
    text = parameters.get(key) or default
    if text and text.upper() not in choices:
        raise InvalidArgument(f"expected the parameter '{key}' to be {listed}, got {text.lower()}")
    return text.upper()


def _is_yes(spec: InstanceSpec, key: str) -> bool:
    return spec.parameters.get(key, "").lower() == "yes"


# --- the model and its configuration


def _name(port: Any) -> str:
    names = sorted(port.get_names())
    if not names:
        raise InvalidArgument("OpenVINO models must have a name for each of their inputs and outputs")
    # One that people gave rather than one of its aliases: OpenVINO's own choice.
    return str(port.get_any_name())


def _shape(port: Any) -> tuple[int, ...]:
    """Return a port's shape; -1 for a size that varies.

    Raises:
        InvalidArgument: nothing can be said of it, as Triton's backend (spec B-064).
    """
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic:
        raise InvalidArgument(f"tensor '{_name(port)}' of an OpenVINO model has no known rank")
    return tuple(-1 if dimension.is_dynamic else dimension.get_length() for dimension in shape)


def _data_type(port: Any) -> str:
    found = _DATA_TYPES.get(port.get_element_type().get_type_name())
    if found is None:
        raise InvalidArgument(f"tensor '{_name(port)}' has a datatype that OpenVINO models cannot be served with")
    return found


def check_names(spec: InstanceSpec, model: Any) -> None:
    """Compare the tensors that a configuration names with those of the model.

    Raises:
        InvalidArgument: with the texts of Triton's backend.
    """
    if spec.kind not in ("CPU", "AUTO"):
        raise InvalidArgument(f"unable to load model '{spec.model}', Triton openVINO backend supports only CPU device")
    if len(model.inputs) != len(spec.inputs):
        raise InvalidArgument(
            f"unable to load model '{spec.model}', configuration expects {len(spec.inputs)} inputs, model provides "
            f"{len(model.inputs)}"
        )
    for kind, configured, ports in (("input", spec.inputs, model.inputs), ("output", spec.outputs, model.outputs)):
        known = sorted(_name(port) for port in ports)
        for tensor in configured:
            if tensor.name not in known:
                raise InvalidArgument(
                    f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {', '.join(known)}"
                )
            data_type = "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
            if data_type not in _DATA_TYPES.values():
                raise Internal(f"unsupported datatype {data_type} for {kind} '{tensor.name}' for model '{spec.model}'")


def _check_shape(spec: InstanceSpec, tensor: TensorSpec, shape: tuple[int, ...], *, is_reshaped: bool = False) -> None:
    """Compare a configured shape with the model's, but for the batch dimension.

    Args:
        is_reshaped: the model's is about to become the configured one.

    Raises:
        InvalidArgument: they contradict each other.
    """
    if not shape:
        raise InvalidArgument(f"model '{spec.model}', tensor '{tensor.name}': OpenVINO backend takes no scalars")
    start = 1 if spec.max_batch_size > 0 else 0
    dims = (-1,) * start + tensor.backend_dims
    pairs = () if is_reshaped else tuple(zip(shape[start:], dims[start:], strict=False))
    if len(shape) != len(dims) or any(-1 not in pair and pair[0] != pair[1] for pair in pairs):
        raise InvalidArgument(
            f"model '{spec.model}', tensor '{tensor.name}': the model expects {len(shape)} dimensions (shape "
            f"{shape_text(shape)}) but the model configuration specifies {len(dims)} dimensions (shape "
            f"{shape_text(dims)})"
        )


def prepare(spec: InstanceSpec, model: Any) -> tuple[Any, bool]:
    """Return a model with the datatypes and shapes of its configuration, and whether it takes one batch size only.

    Raises:
        InvalidArgument: the configuration contradicts the model.
        RuntimeError: OpenVINO cannot do it.
    """
    import openvino

    reshapes = _is_yes(spec, "RESHAPE_IO_LAYERS")
    start = 1 if spec.max_batch_size > 0 else 0
    shapes: dict[str, list[int]] = {}
    for tensor in spec.inputs:
        shape = _shape(model.input(tensor.name))
        _check_shape(spec, tensor, shape, is_reshaped=reshapes)
        shapes[tensor.name] = [*shape[:start], *(tensor.backend_dims if reshapes else shape[start:])]
    is_fixed = bool(start) and any(shape[0] != -1 for shape in shapes.values())
    if is_fixed:
        shapes = {name: [spec.max_batch_size, *shape[1:]] for name, shape in shapes.items()}
    if is_fixed or reshapes:
        model.reshape({name: openvino.PartialShape(shape) for name, shape in shapes.items()})
    for tensor in spec.outputs:
        _check_shape(spec, tensor, _shape(model.output(tensor.name)))
    processor = openvino.preprocess.PrePostProcessor(model)
    for tensors, side in ((spec.inputs, processor.input), (spec.outputs, processor.output)):
        for tensor in tensors:
            side(tensor.name).tensor().set_element_type(openvino.Type(_element(tensor)))
    return processor.build(), is_fixed


def _element(tensor: TensorSpec) -> np.dtype[Any]:
    return np.dtype({"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"}.get(
        tensor.datatype, tensor.datatype.lower()
    ))  # fmt: skip


# --- running


class OpenvinoInstance(TensorInstance):
    """One compiled model with two requests, which are used again and again.

    A request goes on writing to the outputs that it was last given: what is bound has one of its own, so that
    :meth:`run` never writes to rows.
    """

    def __init__(self, spec: InstanceSpec, core: Any, model: Any) -> None:
        self._spec = spec
        self._pads = _is_yes(spec, "ENABLE_BATCH_PADDING")
        device = spec.parameters.get("TARGET_DEVICE") or "CPU"
        options = compile_options(spec)
        try:
            # Releases differ in what their plugins know: COMPILATION_NUM_THREADS is gone from the CPU's.
            known = core.get_property(device, "SUPPORTED_PROPERTIES")
            options = {name: value for name, value in options.items() if name in known}
            prepared, is_fixed = prepare(spec, model)
            compiled = core.compile_model(prepared, device, options)
            self._request, self._bound_request = compiled.create_infer_request(), compiled.create_infer_request()
        except RuntimeError as error:
            raise _failure("loading model", error, spec) from None
        #: The one batch size that it takes; 0: any.
        self._batch_size = spec.max_batch_size if is_fixed else 0

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        rows = len(next(iter(inputs.values()))) if self._batch_size else 0
        if rows != self._batch_size:
            inputs = {name: self._padded(array, rows) for name, array in inputs.items()}
        self._infer(self._request, _in_place(inputs))
        results: Arrays = {name: self._request.get_tensor(name).data.copy() for name in outputs}
        return {name: array[:rows] for name, array in results.items()} if rows != self._batch_size else results

    def _padded(self, array: Array, rows: int) -> Array:
        """Return a batch with as many rows as the model takes; the last ones are zeros."""
        if not self._pads:
            raise Internal(
                f"expected requests with batch size '{self._batch_size}', got '{rows}'... this error can be avoided by "
                "setting 'ENABLE_BATCH_PADDING' parameter in model configuration to 'YES' at a performance cost."
            )
        padded = np.zeros((self._batch_size, *array.shape[1:]), array.dtype)
        padded[:rows] = array
        return padded

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        rows = len(next(iter(inputs.values())))
        if self._batch_size not in (0, rows):
            return super().bind(inputs, outputs)
        places = [*_in_place(inputs), *_in_place(outputs)]

        def run_in_place() -> None:
            self._infer(self._bound_request, places)

        return run_in_place

    def _infer(self, request: Any, places: Iterable[tuple[str, Any]]) -> None:
        """Run a request with these tensors, OpenVINO's, by name."""
        try:
            for name, tensor in places:
                request.set_tensor(name, tensor)
            request.infer()
        except RuntimeError as error:
            raise BackendFailed(_failure("running inference", error, self._spec).text) from None


def _in_place(arrays: Mapping[str, Array]) -> Iterator[tuple[str, Any]]:
    """Yield OpenVINO's tensors, by name, that lie where arrays do."""
    import openvino

    for name, array in arrays.items():
        yield name, openvino.Tensor(array, shared_memory=True)


class OpenvinoBackend(Backend):
    """``backend: "openvino"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        _core, model = read_model(spec)
        return DescribedModel(
            inputs=tuple(_described(port) for port in model.inputs),
            outputs=tuple(_described(port) for port in model.outputs),
        )

    def load(self, spec: InstanceSpec) -> TensorInstance:
        core, model = read_model(spec)
        check_names(spec, model)
        return OpenvinoInstance(spec, core, model)


def _described(port: Any) -> DescribedTensor:
    return DescribedTensor(_name(port), _data_type(port), _shape(port))


BACKEND = OpenvinoBackend
