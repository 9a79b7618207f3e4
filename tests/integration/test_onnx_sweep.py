"""Every model of the ``onnx`` package's own backend tests that ONNX Runtime can run, through a real worker.

By default the models whose files the package ships and a share of the operator tests it generates; with
FOREBAY_FULL_SWEEP=1 all of them, the networks with made-up weights included.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from reloading_worker import ReloadingWorker
from worker_harness import spec_from_config

from forebay.engine.backends.onnx_backend import _DATATYPES
from forebay.ipc.tensor import DATATYPES

Value = NDArray[Any]

FULL = os.environ.get("FOREBAY_FULL_SWEEP") == "1"

#: Without FULL, one of so many generated operator tests is run.
NODE_STEP = 8


class Case(NamedTuple):
    """One model with one set of inputs and the outputs that the package ships for them."""

    name: str
    model: bytes
    inputs: list[Value]
    outputs: list[Value]
    rtol: float
    atol: float


def test_shipped_models_answer_as_shipped(tmp_path: Path) -> None:
    """B-010, B-029, B-030; data-dependent shapes, strings and scalars among them."""
    counts = sweep(shipped_cases(), tmp_path)
    assert counts["served"] >= 95, counts


@pytest.mark.skipif(not FULL, reason="networks that need a gigabyte: set FOREBAY_FULL_SWEEP=1")
def test_networks_with_made_up_weights_answer_as_shipped(tmp_path: Path) -> None:
    """Deep graphs: ResNet-50, VGG-19, DenseNet-121 and others."""
    counts = sweep(light_cases(), tmp_path)
    assert counts["served"] == 9, counts


def test_operator_models_answer_as_generated(tmp_path: Path) -> None:
    """B-029: every type and operator that ONNX Runtime takes."""
    counts = sweep(generated_cases(), tmp_path)
    assert counts["served"] >= (1000 if FULL else 80), counts


def shipped_cases() -> Iterator[Case]:
    for kind in ("pytorch-converted", "pytorch-operator", "simple"):
        for test in load_model_tests(kind=kind):
            directory = Path(test.model_dir)
            model = (directory / "model.onnx").read_bytes()
            for data_set in sorted(directory.glob("test_data_set_*")):
                yield Case(
                    test.name, model, read_values(data_set, "input"), read_values(data_set, "output"), 1e-3, 1e-6
                )


def light_cases() -> Iterator[Case]:
    """Real networks with made-up weights, on the input that their shipped outputs were computed from."""
    for path in sorted(Path(onnx.__file__).parent.glob("backend/test/data/light/*.onnx")):
        model = onnx.load(path)
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs: list[Value] = []
        for value in model.graph.input:
            if value.name not in weights:
                shape = tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
                count = int(np.prod(shape))
                inputs.append((np.arange(count).reshape(shape) / count).astype(np.float32))
        tensor = onnx.TensorProto.FromString(path.with_name(f"{path.stem}_output_0.pb").read_bytes())
        yield Case(path.stem, path.read_bytes(), inputs, [numpy_helper.to_array(tensor)], 1e-3, 1e-5)


def read_values(directory: Path, kind: str) -> list[Value]:
    values: list[Value] = []
    for index in range(len(list(directory.glob(f"{kind}_*.pb")))):
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString((directory / f"{kind}_{index}.pb").read_bytes())
            values.append(numpy_helper.to_array(tensor))
        except Exception:  # A sequence or an optional value: such models are sorted out by their types.
            values.append(np.empty(0))
    return values


def generated_cases() -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Making the cases divides by zero here and there.
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    for test in cases[:: 1 if FULL else NODE_STEP]:
        if test.model is None or not test.data_sets:
            continue
        inputs, outputs = (
            [np.asarray(value) if isinstance(value, np.generic) else value for value in values]
            for values in test.data_sets[0]
        )
        yield Case(test.name, test.model.SerializeToString(), inputs, outputs, test.rtol, test.atol)


def sweep(cases: Iterator[Case], directory: Path) -> Counter[str]:
    """Serve each case; returns how many were served and how many were left out, by reason."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    with ReloadingWorker() as worker:
        for case in cases:
            try:
                # A process keeps what it has loaded from a place, so every model has one of its own.
                place = directory / case.name
                (place / "1").mkdir(parents=True, exist_ok=True)
                counts[serve(case, worker, place)] += 1
            except Exception as error:
                failures.append(f"{case.name}: {type(error).__name__}: {error}")
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:40])
    return counts


def serve(case: Case, worker: ReloadingWorker, directory: Path) -> str:
    """Run one case here and in the worker, and compare; returns what came of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(case.model, options, providers=["CPUExecutionProvider"])
    except Exception:
        return "ONNX Runtime cannot load it"
    nodes = [*session.get_inputs(), *session.get_outputs()]
    if any(node.type not in _DATATYPES for node in nodes):
        return "has a type that KServe has no name for"
    if any(not isinstance(value, np.ndarray) for value in (*case.inputs, *case.outputs)):
        return "has values that are no tensors"
    # Optional inputs that a test leaves out have no data.
    feed = dict(zip([node.name for node in session.get_inputs()], case.inputs, strict=False))
    try:
        here = run_here(session, feed)
    except Exception:
        return "ONNX Runtime cannot run it"
    (directory / "1" / "model.onnx").write_bytes(case.model)
    config = {
        "backend": "onnxruntime",
        "max_batch_size": 0,
        "input": [configured(n, feed[n.name]) for n in session.get_inputs()],
        "output": [configured(n, value) for n, value in zip(session.get_outputs(), case.outputs, strict=True)],
    }
    worker.load(spec_from_config(config, model=case.name, model_path=str(directory)))
    room = sum(value.nbytes for value in here) + (1 << 16)
    response = worker.infer({n.name: sent(n, feed[n.name]) for n in session.get_inputs()}, reply_bytes=room)
    if response.error is not None:
        raise response.error
    served = [response.outputs[n.name] for n in session.get_outputs()]
    for node, have, ours, shipped in zip(session.get_outputs(), served, here, case.outputs, strict=True):
        assert response.datatypes[node.name] == _DATATYPES[node.type]
        want = ours if not is_close(ours, shipped, case) else shipped
        assert have.size == want.size, f"shape {have.shape} instead of {want.shape}"
        assert is_close(have.reshape(want.shape), want, case), f"output '{node.name}' differs"
    return "served"


def run_here(session: ort.InferenceSession, feed: dict[str, Value]) -> list[Value]:
    binding = session.io_binding()
    if not any("bfloat16" in n.type for n in (*session.get_inputs(), *session.get_outputs())):
        return list(session.run(None, feed))
    for name, value in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy_with_onnx_type(*bits_of(value)))
    for node in session.get_outputs():
        binding.bind_output(node.name)
    session.run_with_iobinding(binding)
    return [np.asarray(value.numpy()) for value in binding.get_outputs()]


def bits_of(value: Value) -> tuple[Value, int]:
    if value.dtype.name == "bfloat16":
        return value.view(np.uint16), onnx.TensorProto.BFLOAT16
    return value, onnx.helper.np_dtype_to_tensor_dtype(value.dtype)


def configured(node: Any, value: Value) -> dict[str, Any]:
    """What an author would write: the graph's shape, [1] for a scalar, the value's rank where the graph has none."""
    dims: Sequence[int] = [dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape]
    if len(dims) != value.ndim or not dims:
        dims = [-1] * value.ndim or [1]
    return {"name": node.name, "data_type": DATATYPES[_DATATYPES[node.type]].config_name, "dims": dims}


def sent(node: Any, value: Value) -> Any:
    shape = value.shape or (1,)
    if _DATATYPES[node.type] == "BYTES":
        return value.reshape(shape).astype(object)
    return _DATATYPES[node.type], shape, np.ascontiguousarray(value).tobytes()


def is_close(have: Value, want: Value, case: Case) -> bool:
    if want.dtype.kind in "OSU":
        return [as_text(item) for item in have.reshape(-1).tolist()] == [
            as_text(item) for item in want.reshape(-1).tolist()
        ]
    if want.dtype.name == "bfloat16":
        want = want.view(np.uint16)
    if have.dtype.name == "bfloat16":
        have = have.view(np.uint16)
    if have.dtype != want.dtype:
        return False
    rtol = max(case.rtol, 1e-2) if want.dtype == np.float16 else case.rtol
    return np.allclose(have, want, rtol=rtol, atol=case.atol, equal_nan=want.dtype.kind == "f")


def as_text(item: Any) -> str:
    return item.decode() if isinstance(item, bytes) else str(item)


if __name__ == "__main__":
    pytest.main([__file__, "-q"])
