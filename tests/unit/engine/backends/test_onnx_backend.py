"""ONNX Runtime in real workers: what a configuration may say, what it must not, and what requests get (spec 8.2)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from reloading_worker import ReloadingWorker
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.backends.onnx_backend import without_source_places
from forebay.ipc.errors import ServingError
from forebay.ipc.worker_messages import InstanceSpec

Shape = Sequence[int | str | None] | None

TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "STRING": TensorProto.STRING,
}


@pytest.fixture(scope="module")
def worker() -> Iterator[ReloadingWorker]:
    with ReloadingWorker() as one:
        yield one


class Repository:
    """A model directory that the next load replaces."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], **graph: Any) -> None:
        made = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), **graph)
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        self.write_bytes(model.SerializeToString())

    def write_bytes(self, data: bytes, name: str = "model.onnx") -> None:
        path = self.path / "1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def identity(self, data_type: str = "FP32", shape: Shape = ("n", 2)) -> None:
        kind = TYPES[data_type]
        self.write([node("Identity", ["x"], ["y"])], [value("x", shape, kind)], [value("y", shape, kind)])

    def spec(self, config: dict[str, Any], **overrides: Any) -> InstanceSpec:
        config = {"backend": "onnxruntime", **config}
        return spec_from_config(config, model="m", model_path=str(self.path), **overrides)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), list(outputs), **attributes)


def value(name: str, shape: Shape, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def tensor(name: str, *dims: int, data_type: str = "TYPE_FP32", **fields: Any) -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": list(dims), **fields}


BATCHED = {"max_batch_size": 8, "input": [tensor("x", 2)], "output": [tensor("y", 2)]}
PLAIN = {"input": [tensor("x", -1, 2)], "output": [tensor("y", -1, 2)]}
ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)


def load_error(worker: ReloadingWorker, spec: InstanceSpec) -> str:
    with pytest.raises(ServingError) as caught:
        worker.load(spec)
    return caught.value.text


# --- files


def test_missing_model_file_is_named(worker: ReloadingWorker, repository: Repository) -> None:
    """B-010."""
    text = load_error(worker, repository.spec(PLAIN))
    assert text == f"unable to find '{repository.path}/1/model.onnx' for model instance 'm_0_0'"


def test_model_directory_with_external_data(worker: ReloadingWorker, repository: Repository) -> None:
    """B-010: ``model.onnx/model.onnx`` beside its weights."""
    weight = numpy_helper.from_array(np.full((2, 2), 3, np.float32), "w")
    graph = helper.make_graph(
        [node("MatMul", ["x", "w"], ["y"])], "g", [value("x", ("n", 2))], [value("y", ("n", 2))], initializer=[weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    directory = repository.path / "1" / "model.onnx"
    directory.mkdir(parents=True)
    onnx.save(model, directory / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (directory / "weights.bin").exists()
    worker.load(repository.spec(PLAIN))
    response = worker.infer({"x": ROWS})
    np.testing.assert_array_equal(response.outputs["y"], ROWS @ np.full((2, 2), 3, np.float32))


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x09\x12\x04"], ids=["empty", "text", "truncated"])
def test_broken_file_says_which_model(worker: ReloadingWorker, repository: Repository, data: bytes) -> None:
    repository.write_bytes(data)
    text = load_error(worker, repository.spec(PLAIN))
    assert text.startswith("failed to load ONNX model 'm' version 1: ")
    assert "model.onnx" in text or "ModelProto" in text or "graph" in text


def later_file_error(worker: ReloadingWorker, repository: Repository, opset: int, ir_version: int) -> str:
    """Return what is said of a file made for a later ONNX Runtime, without what every load error begins with."""
    graph = helper.make_graph([node("Identity", ["x"], ["y"])], "g", [value("x", (1,))], [value("y", (1,))])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    repository.write_bytes(model.SerializeToString())
    text = load_error(worker, repository.spec(PLAIN))
    _model, _, reason = text.partition("model.onnx failed:")
    return reason


def test_file_of_a_later_opset_says_so_without_places_in_onnx_runtime_s_code(
    worker: ReloadingWorker, repository: Repository
) -> None:
    reason = later_file_error(worker, repository, opset=900, ir_version=9)
    assert reason.startswith("ONNX Runtime only *guarantees* support for models stamped with official released onnx")
    assert "Opset 900 is under development" in reason


def test_file_of_a_later_format_says_so_without_places_in_onnx_runtime_s_code(
    worker: ReloadingWorker, repository: Repository
) -> None:
    reason = later_file_error(worker, repository, opset=17, ir_version=900)
    assert reason.startswith("Unsupported model IR version: 900, max supported IR version: ")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/o/core/a.cc:1 int f() x was false. no (really) so", "x was false. no (really) so"),
        ("a failed:/o/a.h:46 void n::V(const M<S<char>, int>&, int) const text (1)", "a failed:text (1)"),
        ("/o/a.cc:7 void n::C::f(int)::<lambda(const T&)> text", "text"),
        ("/o/a.cc:7 void n::{anonymous}::f(void (*)(int), int) text", "text"),
        ("nothing of /models/m/1/model.onnx is cut", "nothing of /models/m/1/model.onnx is cut"),
    ],
)
def test_places_in_onnx_runtime_s_code_are_cut(text: str, shown: str) -> None:
    assert without_source_places(text) == shown


# --- the configuration against the model


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({**PLAIN, "input": [tensor("z", -1, 2)]}, "unexpected inference input 'z', allowed inputs are: x"),
        ({**PLAIN, "output": [tensor("z", -1, 2)]}, "unexpected inference output 'z', allowed outputs are: y"),
        (
            {**PLAIN, "input": [tensor("x", -1, 2, data_type="TYPE_INT32")]},
            "unable to load model 'm', configuration expects datatype TYPE_INT32 for input 'x', model provides "
            "TYPE_FP32",
        ),
        (
            {**PLAIN, "input": [tensor("x", -1, 2), tensor("z", 1)]},
            "unable to load model 'm', configuration expects 2 inputs, model provides at most 1",
        ),
        (
            {**BATCHED, "input": [tensor("x", 2, 1)]},
            "model 'm', tensor 'x': the model expects 2 dimensions (shape [-1,2]) but the model configuration "
            "specifies 3 dimensions (an initial batch dimension because max_batch_size > 0 followed by the explicit "
            "tensor shape, making complete shape [-1,2,1])",
        ),
        (
            {**BATCHED, "input": [tensor("x", 2, optional=True)]},
            "optional input 'x' is not supported for models that support batching",
        ),
    ],
    ids=["input name", "output name", "type", "count", "rank", "optional"],
)
def test_contradiction_is_refused(
    worker: ReloadingWorker, repository: Repository, config: dict[str, Any], text: str
) -> None:
    """B-011, B-021, B-022, B-023, B-024: checked at load even if the configuration is complete."""
    repository.identity()
    assert load_error(worker, repository.spec(config)) == text


def test_fixed_first_dimension_cannot_batch(worker: ReloadingWorker, repository: Repository) -> None:
    """B-020."""
    repository.identity(shape=(1, 2))
    assert load_error(worker, repository.spec(BATCHED)).startswith(
        "model 'm', tensor 'x': for the model to support batching the shape should have at least 1 dimension and the "
        "first dimension must be -1; "
    )


def test_describe_tells_names_types_and_shapes(repository: Repository) -> None:
    """R-063."""
    repository.identity("STRING", ("n", 2, None))
    with WorkerHarness(repository.spec({}), load=False) as harness:
        described = harness.describe()
    assert described.inputs == ({"name": "x", "data_type": "TYPE_STRING", "shape": [-1, 2, -1]},)
    assert described.outputs == ({"name": "y", "data_type": "TYPE_STRING", "shape": [-1, 2, -1]},)


# --- tensors


@pytest.mark.parametrize("data_type", sorted(TYPES))
def test_every_type_passes_unchanged(worker: ReloadingWorker, repository: Repository, data_type: str) -> None:
    """B-029, D-001."""
    repository.identity(data_type, ("n",))
    config_type = f"TYPE_{data_type}"
    worker.load(
        repository.spec(
            {"input": [tensor("x", -1, data_type=config_type)], "output": [tensor("y", -1, data_type=config_type)]}
        )
    )
    if data_type == "STRING":
        sent: Any = np.array(["", "plain", "żółć", "nul\0inside", "x" * 5000], dtype=object)
        response = worker.infer({"x": sent})
        assert [item.decode() for item in response.outputs["y"].tolist()] == sent.tolist()
        return
    if data_type == "BF16":
        bits = np.array([1.0, -2.5, 3.0e38], ml_dtypes.bfloat16).view(np.uint16)
        response = worker.infer({"x": ("BF16", bits.shape, bits.tobytes())})
        assert response.datatypes["y"] == "BF16"
        np.testing.assert_array_equal(response.outputs["y"].view(np.uint16), bits)
        return
    array = np.array([0, 1, 1, 0], helper.tensor_dtype_to_np_dtype(TYPES[data_type]))
    response = worker.infer({"x": array})
    assert response.outputs["y"].dtype == array.dtype
    np.testing.assert_array_equal(response.outputs["y"], array)


def test_text_that_is_not_utf8_is_the_clients_error(worker: ReloadingWorker, repository: Repository) -> None:
    """B-030."""
    repository.identity("STRING", ("n",))
    worker.load(
        repository.spec(
            {"input": [tensor("x", -1, data_type="TYPE_STRING")], "output": [tensor("y", -1, data_type="TYPE_STRING")]}
        )
    )
    response = worker.infer({"x": np.array([b"\xff"], dtype=object)})
    assert response.error is not None
    assert response.error.text.startswith("input 'x' has an element that is not UTF-8")


def test_empty_tensor(worker: ReloadingWorker, repository: Repository) -> None:
    """D-012."""
    repository.identity()
    worker.load(repository.spec(PLAIN))
    response = worker.infer({"x": np.empty((0, 2), np.float32)})
    assert response.outputs["y"].shape == (0, 2)


def test_scalar_is_configured_as_one_element(worker: ReloadingWorker, repository: Repository) -> None:
    repository.identity(shape=())
    worker.load(repository.spec({"input": [tensor("x", 1)], "output": [tensor("y", 1)]}))
    response = worker.infer({"x": np.array([4.5], np.float32)})
    assert response.outputs["y"].tolist() == [4.5]


def test_scalar_per_item_with_reshape(worker: ReloadingWorker, repository: Repository) -> None:
    """D-016: a rank 1 graph tensor is ``dims: [1], reshape: {}`` per item."""
    repository.identity(shape=("n",))
    empty = {"reshape": {"shape": []}}
    worker.load(
        repository.spec({"max_batch_size": 4, "input": [tensor("x", 1, **empty)], "output": [tensor("y", 1, **empty)]})
    )
    response = worker.infer({"x": np.array([[1], [2]], np.float32)})
    assert response.outputs["y"].tolist() == [[1], [2]]


def test_output_shape_depends_on_data(worker: ReloadingWorker, repository: Repository) -> None:
    repository.write([node("NonZero", ["x"], ["y"])], [value("x", ("n",))], [value("y", (1, "k"), TensorProto.INT64)])
    worker.load(repository.spec({"input": [tensor("x", -1)], "output": [tensor("y", 1, -1, data_type="TYPE_INT64")]}))
    response = worker.infer({"x": np.array([0, 5, 0, 7], np.float32)})
    assert response.outputs["y"].tolist() == [[1, 3]]


def test_optional_input_is_an_initializer(worker: ReloadingWorker, repository: Repository) -> None:
    """B-024: left out, the initializer's value counts."""
    default = numpy_helper.from_array(np.array([10, 20], np.float32), "bias")
    repository.write(
        [node("Add", ["x", "bias"], ["y"])],
        [value("x", ("n", 2)), value("bias", (2,))],
        [value("y", ("n", 2))],
        initializer=[default],
    )
    worker.load(
        repository.spec({"input": [tensor("x", -1, 2), tensor("bias", 2, optional=True)], "output": PLAIN["output"]})
    )
    assert worker.infer({"x": ROWS}).outputs["y"].tolist() == (ROWS + np.array([10, 20])).tolist()
    given = worker.infer({"x": ROWS, "bias": np.array([1, 2], np.float32)})
    assert given.outputs["y"].tolist() == (ROWS + np.array([1, 2])).tolist()


def test_only_wanted_outputs_are_returned(worker: ReloadingWorker, repository: Repository) -> None:
    """B-027."""
    repository.write(
        [node("Identity", ["x"], ["y"]), node("Neg", ["x"], ["z"])],
        [value("x", ("n", 2))],
        [value("y", ("n", 2)), value("z", ("n", 2))],
    )
    worker.load(repository.spec({**PLAIN, "output": [tensor("y", -1, 2), tensor("z", -1, 2)]}))
    response = worker.infer({"x": ROWS}, outputs=("z",))
    assert list(response.outputs) == ["z"]
    assert response.outputs["z"].tolist() == (-ROWS).tolist()


def test_failed_run_has_the_code_and_text_of_onnx_runtime(worker: ReloadingWorker, repository: Repository) -> None:
    """B-028."""
    repository.write(
        [node("Gather", ["x", "index"], ["y"])],
        [value("x", ("n", 2)), value("index", ("k",), TensorProto.INT64)],
        [value("y", ("k", 2))],
    )
    index = tensor("index", -1, data_type="TYPE_INT64")
    worker.load(repository.spec({**PLAIN, "input": [*PLAIN["input"], index]}))
    failed = worker.infer({"x": ROWS, "index": np.array([99])})
    assert failed.error is not None
    assert failed.error.text.startswith("onnx runtime error 2: ")
    assert "Gather" in failed.error.text


def test_batch_of_rows_fails_together_and_the_worker_lives(repository: Repository) -> None:
    """B-028."""
    repository.write(
        [node("Gather", ["t", "x"], ["y"])],
        [value("x", ("n",), TensorProto.INT64)],
        [value("y", ("n",))],
        initializer=[numpy_helper.from_array(np.array([5, 6], np.float32), "t")],
    )
    empty = {"reshape": {"shape": []}}
    spec = repository.spec(
        {
            "max_batch_size": 4,
            "input": [tensor("x", 1, data_type="TYPE_INT64", **empty)],
            "output": [tensor("y", 1, **empty)],
        },
        rows_mode=True,
    )
    with WorkerHarness(spec) as harness:
        base = harness.slab(4)
        harness.area(base, 4, "x")[:2] = [[1], [9]]
        harness.send_runs(harness.run_of(base, 4, 0, 2))
        answer = harness.runs_answer()
        harness.wait_done()
        assert answer.error is not None
        assert answer.error.text.startswith("onnx runtime error 2: ")
        harness.area(base, 4, "x")[:2] = [[1], [0]]
        harness.send_runs(harness.run_of(base, 4, 0, 2))
        assert harness.runs_answer().error is None
        harness.wait_done()
        assert harness.area(base, 4, "y")[:2].tolist() == [[6], [5]]


# --- parameters and optimization


@pytest.mark.parametrize(
    "parameters",
    [
        {"intra_op_thread_count": "2", "inter_op_thread_count": "2", "execution_mode": "1"},
        {"enable_mem_arena": "0", "enable_mem_pattern": "0"},
        {"memory.enable_memory_arena_shrinkage": "cpu:0"},
        {"session.use_device_allocator_for_initializers": "1", "unknown_parameter": "x"},
        {"cudnn_conv_algo_search": "7", "gpu_mem_limit": "many"},
    ],
    ids=["threads", "memory", "shrinkage", "session", "of the GPU"],
)
def test_parameters_are_accepted(worker: ReloadingWorker, repository: Repository, parameters: dict[str, str]) -> None:
    """B-003, B-013, B-014: those of the CUDA provider do not matter on the CPU."""
    repository.identity()
    texts = {key: {"string_value": text} for key, text in parameters.items()}
    worker.load(repository.spec({**PLAIN, "parameters": texts}))
    assert worker.infer({"x": ROWS}).outputs["y"].tolist() == ROWS.tolist()


@pytest.mark.parametrize(
    ("key", "text"), [("intra_op_thread_count", "two"), ("execution_mode", "2"), ("enable_mem_arena", "perhaps")]
)
def test_bad_parameter_is_refused(worker: ReloadingWorker, repository: Repository, key: str, text: str) -> None:
    """B-013."""
    repository.identity()
    error = load_error(worker, repository.spec({**PLAIN, "parameters": {key: {"string_value": text}}}))
    assert key in error
    assert text in error


@pytest.mark.parametrize("level", [-1, 0, 1, 2, 17])
def test_graph_levels_load(worker: ReloadingWorker, repository: Repository, level: int) -> None:
    """B-012, C-050."""
    repository.identity()
    worker.load(repository.spec(PLAIN, optimization={"graph_level": level}))
    assert worker.infer({"x": ROWS}).outputs["y"].tolist() == ROWS.tolist()


def test_global_thread_pool_takes_the_backends_numbers(worker: ReloadingWorker, repository: Repository) -> None:
    """B-018."""
    repository.identity()
    settings = {"enable-global-threadpool": "1", "intra_op_thread_count": "2", "inter_op_thread_count": "1"}
    worker.load(repository.spec(PLAIN, backend_config=settings))
    assert worker.infer({"x": ROWS}).outputs["y"].tolist() == ROWS.tolist()


@pytest.mark.parametrize(
    ("optimization", "kind", "text"),
    [
        ({"cpu_accelerators": [{"name": "zzz"}]}, "CPU", "unknown Execution Accelerator 'zzz' is requested"),
        ({"gpu_accelerators": [{"name": "zzz"}]}, "GPU", "unknown Execution Accelerator 'zzz' is requested"),
        (
            {"gpu_accelerators": [{"name": "tensorrt", "parameters": {"precision_mode": "FP4"}}]},
            "GPU",
            "unsupported precision mode 'FP4' is requested",
        ),
        (
            {"gpu_accelerators": [{"name": "tensorrt", "parameters": {"trt_zzz": "1"}}]},
            "GPU",
            "unknown parameter 'trt_zzz' is provided for TensorRT Execution Accelerator",
        ),
    ],
    ids=["cpu", "gpu", "precision", "parameter"],
)
def test_unknown_accelerator_is_refused(
    worker: ReloadingWorker, repository: Repository, optimization: dict[str, Any], kind: str, text: str
) -> None:
    """B-015, B-016, C-053."""
    repository.identity()
    assert load_error(worker, repository.spec(PLAIN, optimization=optimization, kind=kind)) == text


def test_accelerator_that_is_not_installed_says_what_is(worker: ReloadingWorker, repository: Repository) -> None:
    """B-016."""
    repository.identity()
    error = load_error(worker, repository.spec(PLAIN, optimization={"cpu_accelerators": [{"name": "openvino"}]}))
    assert "OpenVINOExecutionProvider" in error
    assert "CPUExecutionProvider" in error


def test_accelerators_of_the_gpu_do_not_matter_on_the_cpu(worker: ReloadingWorker, repository: Repository) -> None:
    """C-052, C-053."""
    repository.identity()
    worker.load(repository.spec(PLAIN, optimization={"gpu_accelerators": [{"name": "zzz"}], "cuda_graphs": True}))


@pytest.mark.parametrize("name", ["../outside.so", "/etc/passwd", "absent.so"])
def test_operator_library_stays_in_the_model_directory(
    worker: ReloadingWorker, repository: Repository, name: str
) -> None:
    """B-017."""
    repository.identity()
    (repository.path.parent / "outside.so").write_bytes(b"")
    error = load_error(worker, repository.spec(PLAIN, extra={"op_libraries": [name]}))
    assert f"the custom operator library '{name}'" in error
    os.unlink(repository.path.parent / "outside.so")


def test_operator_library_that_is_none_is_refused(worker: ReloadingWorker, repository: Repository) -> None:
    """B-017: found below the model directory, handed to ONNX Runtime, refused by it."""
    repository.identity()
    (repository.path / "ops.so").write_bytes(b"no library")
    assert "ops.so" in load_error(worker, repository.spec(PLAIN, extra={"op_libraries": ["ops.so"]}))
