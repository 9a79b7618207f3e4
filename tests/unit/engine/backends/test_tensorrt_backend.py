"""The TensorRT backend's own decisions over a fake library; plans that run, where there is a GPU (spec B-070)."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import fake_tensorrt as trt
import msgspec
import numpy as np
import onnx
import pytest
from fake_tensorrt import DataType, Engine, Tensor, TensorIOMode, TensorLocation, reshaping_engine
from onnx import TensorProto, helper
from tensorrt_models import write_reshaping_onnx
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.backends import tensorrt_contexts
from forebay.engine.backends.tensorrt_backend import TensorRtBackend
from forebay.engine.backends.tensorrt_engines import find_model_file
from forebay.engine.backends.tensorrt_instance import TensorRtInstance, make_output_allocator
from forebay.engine.backends.tensorrt_profiles import profile_numbers
from forebay.engine.backends.tensorrt_tensors import check_config, describe_engine
from forebay.engine.devices.host_device import HostDevice
from forebay.ipc.errors import BackendFailed, InvalidArgument, ServingError
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import InstanceSpec

INPUT, OUTPUT = TensorIOMode.INPUT, TensorIOMode.OUTPUT
VECTORISED = trt.TensorFormat.CHW32


class Owner:
    """What the backend keeps of an engine."""

    trt = trt
    kernels = None
    makes_graphs = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.logger = self

    def make_context(self) -> Any:
        return self.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def take(self) -> str:
        return "because"


def make_spec(inputs: list[Any], outputs: list[Any], max_batch_size: int = 8, **overrides: Any) -> InstanceSpec:
    config = {"backend": "tensorrt", "max_batch_size": max_batch_size, "input": inputs, "output": outputs}
    return spec_from_config(config, model="m", model_path="/nowhere", **overrides)


def tensor(name: str, *dims: int, data_type: str = "TYPE_FP32") -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": list(dims)}


def doubling(*profiles: tuple[int, int], width: int = 3) -> Engine:
    """An engine that doubles [rows, 3]; a profile for each range of rows."""
    return Engine(
        {"x": Tensor(INPUT, (-1, width)), "y": Tensor(OUTPUT, (-1, width))},
        lambda inputs: {"y": inputs["x"] * 2},
        [{"x": ((low, 3), (high, 3), (high, 3))} for low, high in profiles],
        lambda shapes: {**shapes, "y": shapes.get("x", (-1, width))},
    )


SPEC = make_spec([tensor("x", 3)], [tensor("y", 3)])


def open_instance(engine: Engine, spec: InstanceSpec = SPEC) -> TensorRtInstance:
    device = HostDevice()
    owner: Any = Owner(engine)
    return TensorRtInstance(spec, owner, device, device.make_stream())


def rows(count: int, width: int = 3) -> np.ndarray[Any, Any]:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def test_run_and_bound_run() -> None:
    instance = open_instance(doubling((1, 8)))
    assert (instance.run({"x": rows(2)}, ("y",))["y"] == rows(2) * 2).all()
    outputs = {"y": np.zeros((5, 3), np.float32)}
    instance.bind({"x": rows(5)}, outputs)()
    assert (outputs["y"] == rows(5) * 2).all()
    instance.close()


def test_profile_that_takes_the_shape_runs() -> None:
    engine = doubling((1, 2), (3, 8))
    instance = open_instance(engine, msgspec.structs.replace(SPEC, extra={"profiles": ["0", "1"]}))
    for count in (1, 2, 3, 8):
        instance.run({"x": rows(count)}, ("y",))
    assert [context.runs_count for context in engine.contexts] == [2, 2]
    assert [context.profile for context in engine.contexts] == [0, 1]
    # Both use the same scratch memory, with room for the larger.
    assert len({context.scratch for context in engine.contexts}) == 1
    assert engine.contexts[0].scratch[1] == 2048
    instance.close()


def test_shape_outside_the_profile_is_the_clients_error() -> None:
    instance = open_instance(doubling((1, 2)))
    with pytest.raises(InvalidArgument) as caught:
        instance.run({"x": rows(3)}, ("y",))
    assert caught.value.text == (
        "request specifies invalid shape for input 'x' for m_0_0. Error details: model expected the shape of dimension "
        "0 to be between 1 and 2 but received 3"
    )
    instance.close()


def test_inputs_that_no_profile_takes_are_told_so() -> None:
    instance = open_instance(doubling((1, 2), (5, 8)), msgspec.structs.replace(SPEC, extra={"profiles": ["0", "1"]}))
    with pytest.raises(InvalidArgument, match=r"between 1 and 2 but received 3; nor do the optimization profiles 1 "):
        instance.run({"x": rows(3)}, ("y",))
    with pytest.raises(InvalidArgument, match="model expected 2 dimensions but received 1 dimensions"):
        instance.run({"x": rows(3)[0]}, ("y",))
    instance.close()


@pytest.mark.parametrize("order", [("0", "1", "2"), ("2", "1", "0")])
def test_of_several_profiles_the_one_that_is_best_at_a_shape_runs(order: tuple[str, ...]) -> None:
    engine = doubling((1, 8), (1, 4), (1, 2))
    instance = open_instance(engine, msgspec.structs.replace(SPEC, extra={"profiles": list(order)}))
    for count in (1, 2, 3, 5, 7, 4):
        instance.run({"x": rows(count)}, ("y",))
    assert {context.profile: context.runs_count for context in engine.contexts} == {0: 2, 1: 2, 2: 2}
    instance.close()


def test_profile_that_is_named_twice_is_used_once() -> None:
    engine = doubling((1, 2), (1, 8))
    open_instance(engine, msgspec.structs.replace(SPEC, extra={"profiles": ["1", "1"]})).close()
    assert [context.profile for context in engine.contexts] == [1]


def test_failed_run_tells_the_librarys_reason() -> None:
    engine = doubling((1, 8))
    instance = open_instance(engine)
    engine.fails = True
    with pytest.raises(BackendFailed, match="model 'm': TensorRT: because"):
        instance.run({"x": rows(1)}, ("y",))
    engine.fails = False
    assert (instance.run({"x": rows(1)}, ("y",))["y"] == rows(1) * 2).all()
    instance.close()


def test_output_whose_shape_depends_on_data() -> None:
    engine = Engine(
        {"x": Tensor(INPUT, (-1,)), "y": Tensor(OUTPUT, (-1,), DataType.INT64)},
        lambda inputs: {"y": np.flatnonzero(inputs["x"])},
        [{"x": ((0,), (8,), (64,))}],
        lambda shapes: {**shapes, "y": (-1,)},
    )
    spec = make_spec([tensor("x", -1)], [tensor("y", -1, data_type="TYPE_INT64")], max_batch_size=0)
    instance = open_instance(engine, spec)
    for given in ([0, 1, 0, 1], [1] * 50, [0, 0], [1]):
        result = instance.run({"x": np.array(given, np.float32)}, ("y",))["y"]
        assert result.tolist() == np.flatnonzero(given).tolist()
    instance.close()


def with_shape_tensors(spec: InstanceSpec) -> InstanceSpec:
    """Return a specification whose INT32 tensors are shapes."""

    def marked(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(msgspec.structs.replace(one, is_shape_tensor=one.datatype == "INT32") for one in tensors)

    return msgspec.structs.replace(spec, inputs=marked(spec.inputs), outputs=marked(spec.outputs))


def reshaping_spec(values: int = 2, max_batch_size: int = 8) -> InstanceSpec:
    sizes = [tensor(name, values, data_type="TYPE_INT32") for name in ("size", "made")]
    return with_shape_tensors(
        make_spec([tensor("x", 6), sizes[0]], [tensor("y", -1, -1), sizes[1]], max_batch_size=max_batch_size)
    )


@pytest.mark.parametrize("location", TensorLocation)
def test_shape_tensor_is_the_same_for_all_items_of_a_batch(location: TensorLocation) -> None:
    """D-018: in with the batch size in front, out with a row for each item."""
    engine = reshaping_engine(location)
    spec = reshaping_spec()
    check_config(spec, trt, engine)
    instance = open_instance(engine, spec)
    inputs = {"x": rows(2, 6), "size": np.array([2, 2, 3], np.int32)}
    for _ in range(2):
        results = instance.run(inputs, ("y", "made"))
        assert (results["y"] == rows(2, 6).reshape(2, 2, 3)).all()
        assert results["made"].tolist() == [[2, 3], [2, 3]]
    instance.close()


def test_shape_tensors_of_a_model_that_does_not_batch_are_as_they_are() -> None:
    engine = reshaping_engine()
    spec = with_shape_tensors(
        make_spec(
            [tensor("x", -1, 6), tensor("size", 3, data_type="TYPE_INT32")],
            [tensor("y", -1, -1, -1), tensor("made", 3, data_type="TYPE_INT32")],
            max_batch_size=0,
        )
    )
    check_config(spec, trt, engine)
    instance = open_instance(engine, spec)
    results = instance.run({"x": rows(2, 6), "size": np.array([2, 3, 2], np.int32)}, ("y", "made"))
    assert results["y"].shape == (2, 3, 2)
    assert results["made"].tolist() == [2, 3, 2]
    instance.close()


@pytest.mark.parametrize("first", [0, -1, 9])
def test_output_shape_tensor_without_a_batch_size_is_the_models_error(first: int) -> None:
    engine = reshaping_engine()
    engine.function = lambda inputs: {"made": np.array([first, 2, 3])}
    instance = open_instance(engine, reshaping_spec())
    with pytest.raises(BackendFailed, match="failed to retrieve the output shape values from binding 'm'"):
        instance.run({"x": rows(1, 6), "size": np.array([1, 2, 3], np.int32)}, ("made",))
    instance.close()


@pytest.mark.parametrize("location", TensorLocation)
def test_profile_is_chosen_by_the_values_of_shape_tensors(location: TensorLocation) -> None:
    """B-070: of the profiles that take the values, the one that is best at them."""
    flat, square, any_size = (((1, 1, 1), one, (8, 6, 6)) for one in ((1, 1, 6), (1, 2, 3), (8, 6, 6)))
    narrow = ((1, 1, 6), (1, 1, 6), (1, 1, 6))
    engine = reshaping_engine(location, flat, square, any_size, narrow)
    spec = msgspec.structs.replace(reshaping_spec(), extra={"profiles": ["0", "1", "2"]})
    instance = open_instance(engine, spec)
    for count, *size in ([1, 1, 6], [1, 2, 3], [2, 2, 3], [1, 3, 2], [8, 6, 1]):
        instance.run({"x": rows(count, 6), "size": np.array([count, *size], np.int32)}, ("made",))
    assert [context.runs_count for context in engine.contexts] == [1, 3, 1]
    instance.close()
    instance = open_instance(engine, msgspec.structs.replace(spec, extra={"profiles": ["3"]}))
    with pytest.raises(InvalidArgument) as caught:
        instance.run({"x": rows(1, 6), "size": np.array([1, 2, 3], np.int32)}, ("made",))
    assert caught.value.text == "The shape value at index 1 is expected to be in range from 1 to 1, Got: 2"
    with pytest.raises(InvalidArgument, match=r"number of shape values\. Expecting 3\. Got 2"):
        instance.run({"x": rows(1, 6), "size": np.array([1, 2], np.int32)}, ("made",))
    instance.close()


def test_engine_that_cannot_tell_the_values_of_a_profile_takes_any() -> None:
    engine = reshaping_engine()
    engine.profiles = [{"x": ((1, 6), (8, 6), (8, 6))}]
    instance = open_instance(engine, reshaping_spec())
    results = instance.run({"x": rows(1, 6), "size": np.array([1, 6, 1], np.int32)}, ("y",))
    assert results["y"].shape == (1, 6, 1)
    instance.close()


def test_engine_says_which_tensors_are_shapes_and_how_large_batches_can_be() -> None:
    """R-065: for auto-complete."""
    described = describe_engine(make_spec([], [], extra={"profiles": ["0", "1"]}), trt, reshaping_of_batches(2, 5))
    assert [(one.name, one.data_type, one.shape, one.is_shape_tensor) for one in described.inputs] == [
        ("x", "TYPE_FP32", (-1, 6), False),
        ("size", "TYPE_INT32", (3,), True),
    ]
    assert [one.is_shape_tensor for one in described.outputs] == [False, True]
    assert described.max_batch_size == 5
    assert describe_engine(SPEC, trt, reshaping_of_batches(2, 5)).max_batch_size == 2
    assert describe_engine(SPEC, trt, reshaping_of_batches(9)).max_batch_size == 8


def reshaping_of_batches(*most: int) -> Engine:
    return reshaping_engine(TensorLocation.HOST, *(((1, 1, 1), (1, 1, 1), (rows, 6, 6)) for rows in most))


def test_profile_that_the_engine_lacks_is_refused_before_completion() -> None:
    spec = make_spec([], [], extra={"profiles": ["1"]})
    with pytest.raises(InvalidArgument) as caught:
        describe_engine(spec, trt, reshaping_engine())
    assert caught.value.text == (
        "unable to autofill for 'm', configuration specified invalid profile 1 . Number of profiles supported by "
        "TensorRT engine: 1"
    )


def test_configuration_counts_the_values_without_the_batch_size() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_config(reshaping_spec(values=3), trt, reshaping_engine())
    assert caught.value.text == (
        "unable to load model 'm_0_0', binding 'size' shape expected by framework [3] doesn't match model "
        "configuration shape [3]"
    )


def test_configuration_must_mark_shape_tensors_and_no_others() -> None:
    spec = reshaping_spec()
    unmarked, marked = (
        msgspec.structs.replace(
            spec, inputs=tuple(msgspec.structs.replace(one, is_shape_tensor=to) for one in spec.inputs)
        )
        for to in (False, True)
    )
    with pytest.raises(InvalidArgument) as caught:
        check_config(unmarked, trt, reshaping_engine())
    assert caught.value.text == (
        "input 'size' for model 'm' is a shape tensor but the model configuration doesn't mark it as a shape tensor."
    )
    with pytest.raises(InvalidArgument) as caught:
        check_config(marked, trt, reshaping_engine())
    assert caught.value.text == (
        "input 'x' for model 'm' is incorrectly marked as a shape tensor in the model configuration."
    )


@pytest.mark.parametrize("has_names", [True, False], ids=["full", "lean"])
def test_vectorised_layouts_are_refused(has_names: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-019; the lean runtime describes formats, and has no names for them."""
    if not has_names:
        monkeypatch.delattr(trt, "TensorFormat")
    engine = doubling((1, 8))
    check_config(SPEC, trt, engine)
    engine.tensors["y"].layout = VECTORISED
    with pytest.raises(InvalidArgument, match="output 'y' for model 'm' has the non-linear format 'Thirty-two wide"):
        check_config(SPEC, trt, engine)


GRAPHS = msgspec.structs.replace(SPEC, optimization={"cuda_graphs": True})


def test_second_batch_of_a_size_is_captured_and_then_launched() -> None:
    engine = doubling((1, 8))
    instance = open_instance(engine, GRAPHS)
    device = instance.device
    outputs = {"y": np.zeros((4, 3), np.float32)}
    bound = instance.bind({"x": rows(4)}, outputs)
    bound()  # Runs, and is captured.
    bound()
    bound()
    assert device.traffic.graph_launches == 2
    assert sum(context.runs_count for context in engine.contexts) == 2
    assert (outputs["y"] == rows(4) * 2).all()
    instance.close()


def test_each_size_is_captured_once_in_whatever_order_they_come() -> None:
    """The buffers have room for the largest batch from the first on, so that no graph's addresses become stale."""
    engine = doubling((1, 8))
    instance = open_instance(engine, GRAPHS)
    for count in (1, 8, 4, 1, 8, 4):
        assert (instance.run({"x": rows(count)}, ("y",))["y"] == rows(count) * 2).all()
    assert instance.device.traffic.graph_launches == 3
    instance.close()


def test_each_graph_has_a_context_of_its_own_on_the_same_scratch_memory() -> None:
    """What is changed in a context would change what a graph of it does."""
    engine = doubling((1, 4), (5, 8))
    instance = open_instance(engine, msgspec.structs.replace(GRAPHS, extra={"profiles": ["0", "1"]}))
    for count in (1, 8, 1, 8):
        instance.run({"x": rows(count)}, ("y",))
    assert [(context.profile, context.runs_count) for context in engine.contexts] == [(0, 0), (1, 0), (0, 2), (1, 2)]
    assert len({context.scratch for context in engine.contexts}) == 1
    instance.close()


def test_library_that_makes_graphs_itself_gets_a_context_for_each_shape() -> None:
    engine = doubling((1, 8))
    device, owner = HostDevice(), Owner(engine)
    owner.makes_graphs = True
    given: Any = owner
    instance = TensorRtInstance(GRAPHS, given, device, device.make_stream())
    for count in (1, 8, 1, 8):
        instance.run({"x": rows(count)}, ("y",))
    assert [context.runs_count for context in engine.contexts] == [0, 2, 2]
    assert device.traffic.graph_launches == 0
    instance.close()


def test_shapes_beyond_a_limit_run_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_contexts, "GRAPHS_MAX", 1)
    engine = doubling((1, 8))
    instance = open_instance(engine, GRAPHS)
    for count in (1, 8, 1, 8):
        assert (instance.run({"x": rows(count)}, ("y",))["y"] == rows(count) * 2).all()
    assert [context.runs_count for context in engine.contexts] == [2, 2]
    instance.close()


def test_no_room_for_another_context_means_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = doubling((1, 8))
    instance = open_instance(engine, GRAPHS)

    def make_context(_owner: Owner) -> Any:
        raise InvalidArgument("out of memory")

    monkeypatch.setattr(Owner, "make_context", make_context)
    for count in (1, 8, 1):
        assert (instance.run({"x": rows(count)}, ("y",))["y"] == rows(count) * 2).all()
    assert engine.contexts[0].runs_count == 3
    instance.close()


def test_a_capture_that_raises_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = doubling((1, 8))
    instance = open_instance(engine, GRAPHS)
    run, calls = trt.Context.execute_async_v3, itertools.count(1)

    def raise_second_time(context: trt.Context, stream: int) -> bool:
        if next(calls) == 2:
            raise RuntimeError("not while it captures")
        return run(context, stream)

    monkeypatch.setattr(trt.Context, "execute_async_v3", raise_second_time)
    with pytest.raises(RuntimeError, match="not while it captures"):
        instance.run({"x": rows(1)}, ("y",))
    for count in (1, 2):
        assert (instance.run({"x": rows(count)}, ("y",))["y"] == rows(count) * 2).all()
    instance.close()


def test_shapes_that_tensorrt_cannot_infer_are_the_requests_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = doubling((1, 8))
    instance = open_instance(engine)

    def infer_shapes() -> list[str]:
        raise RuntimeError("inferShapes failed")

    monkeypatch.setattr(engine.contexts[0], "infer_shapes", infer_shapes)
    with pytest.raises(InvalidArgument, match="model 'm': inferShapes failed: because"):
        instance.run({"x": rows(1)}, ("y",))
    instance.close()


@pytest.mark.parametrize(
    ("inputs", "outputs", "text"),
    [
        ([tensor("z", 3)], [tensor("y", 3)], "unexpected inference input 'z', allowed inputs are: x"),
        ([tensor("x", 3)], [tensor("z", 3)], "unexpected inference output 'z', allowed outputs are: y"),
        (
            [tensor("x", 4)],
            [tensor("y", 3)],
            "model 'm', tensor 'x': the model expects 2 dimensions (shape [-1,3]) but the model configuration "
            "specifies 2 dimensions (an initial batch dimension because max_batch_size > 0 followed by the explicit "
            "tensor shape, making complete shape [-1,4])",
        ),
        (
            [tensor("x", 3, data_type="TYPE_FP16")],
            [tensor("y", 3)],
            "unexpected datatype TYPE_FP32 for inference input 'x', expecting TYPE_FP16 for m_0_0",
        ),
        (
            [tensor("x", 3), tensor("b", 3)],
            [tensor("y", 3)],
            "unable to load model 'm', configuration expects 2 inputs, model provides at most 1",
        ),
        ([], [tensor("y", 3)], "expected configuration for input 'x' for m_0_0"),
    ],
    ids=["input", "output", "shape", "type", "count", "missing"],
)
def test_contradiction_is_refused(inputs: list[Any], outputs: list[Any], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_config(make_spec(inputs, outputs), trt, doubling((1, 8)))
    assert caught.value.text == text


@pytest.mark.parametrize("profile", ["2", "-1", "first"])
def test_invalid_profile_is_refused(profile: str) -> None:
    """C-097."""
    spec = msgspec.structs.replace(SPEC, extra={"profiles": [profile]})
    with pytest.raises(InvalidArgument, match=f"configuration specified invalid profile {profile} "):
        profile_numbers(spec, 2)
    assert profile_numbers(SPEC, 2) == [0]


def test_model_file_by_compute_capability(tmp_path: Path) -> None:
    """R-042; an ONNX file stands in for a plan."""
    (tmp_path / "1").mkdir()
    spec = msgspec.structs.replace(
        SPEC, version_path=str(tmp_path / "1"), extra={"cc_model_filenames": {"9.0": "hopper.plan"}}
    )
    with pytest.raises(ServingError, match=r"unable to find '.*/1/model\.plan' for model instance 'm_0_0'"):
        find_model_file(spec, "8.0")
    for name, capability in (("model.onnx", "8.0"), ("model.plan", "8.0"), ("hopper.plan", "9.0")):
        (tmp_path / "1" / name).write_bytes(b"")
        assert find_model_file(spec, capability) == str(tmp_path / "1" / name)


def test_without_a_gpu_the_model_says_so(tmp_path: Path) -> None:
    from forebay.engine.devices.opening import open_device

    try:
        open_device("cuda")
    except ServingError:
        with pytest.raises(ServingError, match=r"model 'm': TensorRT runs on GPUs only: .*CUDA"):
            WorkerHarness(msgspec.structs.replace(SPEC, version_path=str(tmp_path))).__enter__()
    else:
        pytest.skip("there is a GPU")


needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


@needs_rtx
def test_output_allocator_is_one_to_the_library() -> None:
    library, device = importlib.import_module("tensorrt_rtx"), HostDevice()
    allocator = make_output_allocator(library, device, device.make_stream())
    first = allocator.reallocate_output_async("y", 0, 100, 256, 0)
    assert first
    assert allocator.reallocate_output_async("y", first, 50, 256, 0) == first
    allocator.notify_shape("y", library.Dims((2, 3)))
    assert allocator.shape == (2, 3)
    allocator.memory.close()


@pytest.mark.gpu
@needs_rtx
@pytest.mark.parametrize("graphs", [False, True])
def test_onnx_file_is_built_and_runs_on_the_gpu(tmp_path: Path, graphs: bool) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    (tmp_path / "1").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "1" / "model.onnx")
    settings = {"library": "tensorrt_rtx", "plan-cache-directory": str(tmp_path / "cache")}
    spec = msgspec.structs.replace(
        SPEC,
        version_path=str(tmp_path / "1"),
        kind="GPU",
        backend_config=settings,
        optimization={"cuda_graphs": graphs},
    )
    with WorkerHarness(spec) as worker:
        for count in (1, 8, 8, 8):
            [response] = worker.infer({"x": rows(count)})
            assert response.error is None
            assert (response.outputs["y"] == rows(count) * 2).all()


@pytest.mark.gpu
@needs_rtx
def test_shape_tensors_decide_on_the_gpu(tmp_path: Path) -> None:
    """D-018, R-065: an ONNX file whose input is a shape, described, built and run."""
    (tmp_path / "1").mkdir()
    write_reshaping_onnx(tmp_path / "1" / "model.onnx")
    shapes = {"trt_min_shapes": "size:1x1x1", "trt_opt_shapes": "size:8x2x3", "trt_max_shapes": "size:8x6x6"}
    bare = msgspec.structs.replace(
        make_spec([], []),
        version_path=str(tmp_path / "1"),
        kind="GPU",
        parameters=shapes,
        backend_config={"library": "tensorrt_rtx", "plan-cache-directory": str(tmp_path / "cache")},
    )
    backend = TensorRtBackend()
    described = backend.describe(bare)
    assert [one.is_shape_tensor for one in described.inputs] == [False, True]
    assert described.max_batch_size == 8
    sizes = TensorSpec("size", "INT64", (2,), is_shape_tensor=True)
    tensors = make_spec([tensor("x", 6)], [tensor("y", -1, -1)])
    spec = msgspec.structs.replace(bare, inputs=(*tensors.inputs, sizes), outputs=tensors.outputs)
    instance = backend.load(spec)
    for count, *size in ([2, 2, 3], [8, 6, 1], [1, 3, 2]):
        shape = np.array([count, *size], np.int64)
        results = instance.run({"x": rows(count, 6), "size": shape}, ("y",))
        assert (results["y"] == rows(count, 6).reshape(shape)).all()
    instance.close()
