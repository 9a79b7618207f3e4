"""Ragged batches: what a model gets of requests of different shapes, and what each request gets back (S-140..S-147)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from ragged_models import CONFIG, double_onnx
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.repository.model_spec import BatchInputSpec, BatchOutputSpec, WarmupInputSpec, WarmupSpec
from forebay.engine.worker.ragged import RaggedPolicy, RaggedRequest, with_batch_tensors
from forebay.ipc.counters import InstanceCounter
from forebay.ipc.errors import BackendFailed, InvalidArgument
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import InstanceSpec

X = TensorSpec("X", "FP32", (-1,), allow_ragged_batch=True)
FIXED = TensorSpec("FIXED", "FP32", (-1,))


def spec_of(
    *,
    inputs: tuple[TensorSpec, ...] = (X,),
    outputs: tuple[TensorSpec, ...] = (TensorSpec("Y", "FP32", (-1,)),),
    kinds: tuple[str, ...] = (),
    scatters: bool = False,
    datatype: str = "INT32",
    max_batch_size: int = 8,
    backend: str = "onnxruntime",
) -> InstanceSpec:
    """Return a model with a batch input for each kind, named after it, and perhaps an output that is divided."""
    batch_inputs = [
        BatchInputSpec(kind=kind, target_names=(kind,), datatype=datatype, source_inputs=("X",)) for kind in kinds
    ]
    scatter = BatchOutputSpec(kind="BATCH_SCATTER_WITH_INPUT_SHAPE", target_names=("Y",), source_inputs=("X",))
    extra = {"batch_inputs": msgspec.to_builtins(batch_inputs)}
    if scatters:
        extra["batch_outputs"] = msgspec.to_builtins([scatter])
    config = {"backend": backend, "max_batch_size": max_batch_size}
    return spec_from_config(config, model="m", model_path="/nowhere", inputs=inputs, outputs=outputs, extra=extra)


def request(**arrays: Any) -> RaggedRequest:
    made = {name: np.array(value, np.float32) for name, value in arrays.items()}
    rows = next(iter(made.values())).shape[0]
    return RaggedRequest(rows, made, {name: array.shape for name, array in made.items()})


@pytest.mark.parametrize("datatype", ["INT32", "FP32"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("BATCH_ELEMENT_COUNT", [3, 4]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT", [3, 7]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", [0, 3, 7]),
        ("BATCH_ITEM_SHAPE", [[3], [2], [2]]),
        ("BATCH_ITEM_SHAPE_FLATTEN", [3, 2, 2]),
    ],
)
def test_batch_inputs_describe_the_requests(kind: str, expected: list[Any], datatype: str) -> None:
    """Spec S-141..S-143, S-145, S-146: the second request has two rows."""
    policy = RaggedPolicy(spec_of(kinds=(kind,), datatype=datatype))
    joined = policy.join([request(X=[[1, 2, 3]]), request(X=[[4, 5], [6, 7]])])
    assert joined["X"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert joined[kind].tolist() == expected
    assert joined[kind].dtype == (np.int32 if datatype == "INT32" else np.float32)


def test_largest_count_is_a_shape() -> None:
    """Spec S-144."""
    kind = "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE"
    joined = RaggedPolicy(spec_of(kinds=(kind,))).join([request(X=[[1, 2, 3]]), request(X=[[4, 5]])])
    assert joined[kind].shape == (3,)


def test_single_request_is_ragged_too() -> None:
    """Spec S-140: the model always has one dimension."""
    assert RaggedPolicy(spec_of()).join([request(X=[[1, 2], [3, 4]])])["X"].tolist() == [1, 2, 3, 4]


def test_model_that_does_not_batch_gets_its_input_as_it_is() -> None:
    policy = RaggedPolicy(spec_of(kinds=("BATCH_ITEM_SHAPE",), max_batch_size=0))
    single = RaggedRequest(1, {"X": np.zeros(3, np.float32)}, {"X": (3,)})
    joined = policy.join([single])
    assert joined["X"].shape == (3,)
    assert joined["BATCH_ITEM_SHAPE"].tolist() == [[3]]
    assert not policy.can_join([single, single])


def test_inputs_that_are_not_ragged_must_fit_together() -> None:
    policy = RaggedPolicy(spec_of(inputs=(X, FIXED)))
    first = request(X=[[1]], FIXED=[[1, 2]])
    assert policy.can_join([first, request(X=[[1, 2]], FIXED=[[3, 4]])])
    assert not policy.can_join([first, request(X=[[1, 2]], FIXED=[[3]])])
    assert not policy.can_join([first, request(X=[[1, 2]])])
    joined = policy.join([first, request(X=[[1, 2]], FIXED=[[3, 4]])])
    assert joined["FIXED"].tolist() == [[1, 2], [3, 4]]


def test_output_is_divided_by_the_shape_of_an_input() -> None:
    """Spec S-147."""
    policy = RaggedPolicy(spec_of(scatters=True))
    requests = [request(X=[[1, 2, 3]]), request(X=[[4, 5], [6, 7]])]
    parts = policy.scatter("Y", np.arange(7, dtype=np.float32), requests)
    assert [part.tolist() for part in parts] == [[[0, 1, 2]], [[3, 4], [5, 6]]]
    with pytest.raises(BackendFailed, match="promises FP32 of 7 elements, as input 'X' has"):
        policy.scatter("Y", np.zeros(6, np.float32), requests)
    with pytest.raises(BackendFailed, match="as int8"):
        policy.scatter("Y", np.zeros(7, np.int8), requests)
    with pytest.raises(BackendFailed, match="did not produce output 'Y'"):
        policy.scatter("Y", None, requests)


def test_sizes_of_an_output_must_be_known_from_its_source() -> None:
    outputs = (TensorSpec("Y", "FP32", (2, -1)),)
    with pytest.raises(InvalidArgument, match="batch output 'Y' of model 'm' has a variable dimension"):
        RaggedPolicy(spec_of(outputs=outputs, scatters=True))


def test_missing_source_is_named() -> None:
    policy = RaggedPolicy(spec_of(inputs=(X, FIXED), kinds=("BATCH_ELEMENT_COUNT",), scatters=True))
    with pytest.raises(InvalidArgument, match="model 'm' needs input 'X' to make its batch inputs from"):
        policy.join([request(FIXED=[[1]])])
    with pytest.raises(InvalidArgument, match="model 'm' needs input 'X' to divide output 'Y'"):
        policy.scatter("Y", np.zeros(1, np.float32), [request(FIXED=[[1]])])


def test_backends_know_the_tensors_of_the_batch() -> None:
    """One dimension for the whole batch is a batch dimension without others."""
    kinds = ("BATCH_ELEMENT_COUNT", "BATCH_ITEM_SHAPE")
    known = with_batch_tensors(spec_of(inputs=(X, FIXED), kinds=kinds, scatters=True))
    assert {tensor.name: tensor.dims for tensor in known.inputs} == {
        "X": (),
        "FIXED": (-1,),
        "BATCH_ELEMENT_COUNT": (),
        "BATCH_ITEM_SHAPE": (1,),
    }
    assert [tensor.dims for tensor in known.outputs] == [()]
    assert not any(tensor.is_fixed for tensor in (*known.inputs, *known.outputs))
    for unchanged in (spec_of(backend="python", kinds=kinds), spec_of(inputs=(FIXED,))):
        assert with_batch_tensors(unchanged) is unchanged


# --- in a worker ---


def onnx_spec(path: Path, *samples: WarmupSpec) -> InstanceSpec:
    (path / "1").mkdir()
    (path / "1" / "model.onnx").write_bytes(double_onnx())
    batch_input = BatchInputSpec(
        kind="BATCH_ITEM_SHAPE", target_names=("ITEM_SHAPE",), datatype="INT32", source_inputs=("X",)
    )
    batch_output = BatchOutputSpec(kind="BATCH_SCATTER_WITH_INPUT_SHAPE", target_names=("Y",), source_inputs=("X",))
    return spec_from_config(
        {**CONFIG, "default_model_filename": "model.onnx"},
        model="m",
        model_path=str(path),
        inputs=(X,),
        extra={
            "batch_inputs": msgspec.to_builtins([batch_input]),
            "batch_outputs": msgspec.to_builtins([batch_output]),
        },
        warmup=tuple(msgspec.to_builtins(sample) for sample in samples),
    )


def test_requests_of_different_shapes_are_one_execution(tmp_path: Path) -> None:
    """Spec S-140, S-147; warm-up goes the same way."""
    given = WarmupInputSpec(name="X", datatype="FP32", dims=(5,), source="zero")
    sample = WarmupSpec(name="s", batch_size=2, count=1, inputs=(given,))
    with WorkerHarness(onnx_spec(tmp_path, sample)) as worker:
        inputs = [[[1, 2, 3]], [[4, 5], [6, 7]], [[8]]]
        tokens = worker.submit(*({"X": np.array(value, np.float32)} for value in inputs))
        answers = {response.token: response for response in worker.responses(*tokens)}
        worker.wait_done()
        assert [answers[token].outputs["Y"].tolist() for token in tokens] == [
            (2 * np.array(value)).tolist() for value in inputs
        ]
        assert [answers[token].outputs["SHAPE"].tolist() for token in tokens] == [[[3]], [[2], [2]], [[1]]]
        assert worker.counter(InstanceCounter.EXECUTIONS) == 1
        assert worker.counter(InstanceCounter.INFERENCES) == 4
        assert worker.counter(InstanceCounter.GATHERED_BYTES) == 8 * 4
        [response] = worker.infer({"X": np.array([[9, 10]], np.float32)}, outputs=("Y",))
        assert {name: array.tolist() for name, array in response.outputs.items()} == {"Y": [[18, 20]]}


def test_one_broken_request_fails_alone(tmp_path: Path) -> None:
    with WorkerHarness(onnx_spec(tmp_path)) as worker:
        good, bad = worker.submit({"X": np.array([[1, 2]], np.float32)}, {"X": ("FP32", (1, 3), bytes(8))})
        answers = {response.token: response for response in worker.responses(good, bad)}
        assert answers[good].outputs["Y"].tolist() == [[2, 4]]
        assert answers[bad].error is not None
