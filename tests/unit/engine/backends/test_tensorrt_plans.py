"""Plans from ONNX files; TensorRT-RTX builds them on machines without a GPU too (FACTS 5)."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import fake_tensorrt
import msgspec
import onnx
import pytest
from onnx import TensorProto, helper
from tensorrt_models import write_reshaping_onnx
from worker_harness import spec_from_config

from forebay.engine.backends import tensorrt_engines, tensorrt_plans
from forebay.engine.backends.tensorrt_engines import load_engine
from forebay.engine.backends.tensorrt_plans import (
    OnnxInput,
    ProfileShapes,
    _read_or_make,
    build_plan,
    cached_plan,
    choose_profile,
    describe_onnx,
    parse_shapes,
    plan_key,
)
from forebay.engine.devices.host_device import HostDevice
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import InstanceSpec

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu12",
)


def make_spec(*dims: int, max_batch_size: int = 8, cache: str = "", **parameters: str) -> InstanceSpec:
    config = {
        "backend": "tensorrt",
        "max_batch_size": max_batch_size,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": list(dims)}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": list(dims)}],
        "parameters": {key: {"string_value": text} for key, text in parameters.items()},
    }
    return spec_from_config(
        config, model="m", model_path="/nowhere", backend_config={"plan-cache-directory": cache} if cache else {}
    )


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "model.onnx", "Relu")


def write_onnx(path: Path, operator: str, domain: str = "") -> Path:
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def rtx() -> Any:
    return importlib.import_module("tensorrt_rtx")


@needs_rtx
@pytest.mark.parametrize("compute_capability", ["", "8.9", "9.9"])
def test_plan_is_built(onnx_file: Path, compute_capability: str) -> None:
    """Also for a GPU that the library has no name for: then the plan is portable."""
    assert len(build_plan(rtx(), make_spec(3), str(onnx_file), compute_capability=compute_capability)) > 1000


@needs_rtx
def test_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "model.onnx", "NoSuchOperator", "nowhere")
    with pytest.raises(InvalidArgument, match=r"TensorRT cannot read 'model\.onnx' of model 'm': .*NoSuchOperator"):
        build_plan(rtx(), make_spec(3), str(path))


@needs_rtx
def test_plan_is_built_once(onnx_file: Path, tmp_path: Path) -> None:
    spec = make_spec(3, cache=str(tmp_path / "cache"))
    plans = [cached_plan(rtx(), spec, str(onnx_file), device="a GPU", compute_capability="8.9") for _ in range(2)]
    assert plans[0].data == plans[1].data
    assert [plan.is_new for plan in plans] == [True, False]
    assert len(list((tmp_path / "cache").glob("*.plan"))) == 1


class Library:
    __name__ = "library"
    __version__ = "1"


def test_key_depends_on_all_that_the_plan_does(onnx_file: Path) -> None:
    facts = {"device": "a GPU", "compute_capability": "8.9"}
    base = plan_key(Library, make_spec(3), str(onnx_file), **facts)
    assert base == plan_key(Library, make_spec(3), str(onnx_file), **facts)
    others = [
        plan_key(Library, make_spec(3), str(onnx_file), device="another", compute_capability="8.9"),
        plan_key(Library, make_spec(3), str(onnx_file), device="a GPU", compute_capability="9.0"),
        plan_key(Library, make_spec(3, max_batch_size=9), str(onnx_file), **facts),
        plan_key(Library, make_spec(4), str(onnx_file), **facts),
        plan_key(Library, make_spec(3, trt_max_shapes="x:9x3"), str(onnx_file), **facts),
    ]
    (onnx_file.parent / "weights.bin").write_bytes(b"changed")
    others.append(plan_key(Library, make_spec(3), str(onnx_file), **facts))
    assert len({base, *others}) == 7


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert _read_or_make(str(tmp_path / "file" / "cache"), "key", lambda: b"plan").data == b"plan"


def test_plan_that_is_of_no_use_is_built_anew_once(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged file, say; what was built just now and is refused is not built again."""
    built = iter([b"[]", b"no plan", b"[]"])
    monkeypatch.setattr(tensorrt_plans, "build_plan", lambda *_arguments, **_options: next(built))
    monkeypatch.setattr(tensorrt_engines, "installed_libraries", lambda _spec: [fake_tensorrt])
    monkeypatch.setattr(fake_tensorrt, "OnnxParser", None, raising=False)
    spec = msgspec.structs.replace(make_spec(3, cache=str(tmp_path / "cache")), version_path=str(onnx_file.parent))
    load_engine(spec, HostDevice())
    [kept] = (tmp_path / "cache").glob("*.plan")
    kept.write_bytes(b"damaged")
    with pytest.raises(
        InvalidArgument, match=r"unable to load model 'm' from 'model\.onnx': fake_tensorrt 0: TensorRT did"
    ):
        load_engine(spec, HostDevice())
    assert kept.read_bytes() == b"no plan"
    load_engine(spec, HostDevice())
    assert kept.read_bytes() == b"[]"


def test_shapes_are_read_as_trtexec_does() -> None:
    assert parse_shapes("x:1x3x224, a:b:0:7", "trt_min_shapes") == {"x": (1, 3, 224), "a:b:0": (7,)}
    for text in ("x", "x:", "x:1xa", ":3", "x:-1"):
        with pytest.raises(InvalidArgument, match="model parameter 'trt_min_shapes' must look like"):
            parse_shapes(text, "trt_min_shapes")


def test_profile_follows_the_configuration() -> None:
    inputs = [OnnxInput("x", (-1, 3)), OnnxInput("fixed", (2, 2))]
    assert choose_profile(make_spec(3), inputs) == {"x": ProfileShapes((1, 3), (8, 3), (8, 3))}
    assert choose_profile(make_spec(5, 3, max_batch_size=0), inputs) == {"x": ProfileShapes((5, 3), (5, 3), (5, 3))}


def test_profile_follows_the_parameters() -> None:
    spec = make_spec(-1, trt_min_shapes="x:1x1", trt_opt_shapes="x:4x16", trt_max_shapes="x:8x99")
    assert choose_profile(spec, [OnnxInput("x", (-1, -1))]) == {"x": ProfileShapes((1, 1), (4, 16), (8, 99))}
    only_most = make_spec(-1, trt_max_shapes="x:8x99")
    assert choose_profile(only_most, [OnnxInput("x", (-1, -1))]) == {"x": ProfileShapes((8, 99), (8, 99), (8, 99))}


def test_profile_has_the_values_of_shape_tensors() -> None:
    size = OnnxInput("size", (3,), is_shape_tensor=True)
    spec = make_spec(6, trt_min_shapes="size:1x1x1", trt_max_shapes="size:8x6x6")
    assert choose_profile(spec, [size]) == {"size": ProfileShapes((1, 1, 1), (8, 6, 6), (8, 6, 6))}
    with pytest.raises(
        InvalidArgument, match=r"'size': its values are shapes; say how far .*, for example 'size:1x1x1'"
    ):
        choose_profile(make_spec(6), [size])
    with pytest.raises(InvalidArgument, match="'size': it has 3 values"):
        choose_profile(make_spec(6, trt_max_shapes="size:8x6"), [size])


@needs_rtx
def test_plan_with_shape_tensors_is_built(tmp_path: Path) -> None:
    path = str(write_reshaping_onnx(tmp_path / "model.onnx"))
    spec = make_spec(6, trt_min_shapes="size:1x1x1", trt_opt_shapes="size:8x2x3", trt_max_shapes="size:8x6x6")
    assert len(build_plan(rtx(), spec, path, compute_capability="8.9")) > 1000


@needs_rtx
def test_onnx_file_is_described_without_a_plan(tmp_path: Path, onnx_file: Path) -> None:
    """R-065, R-063: the largest batch is the configured one, else the default; or what the parameters say."""
    described = describe_onnx(rtx(), make_spec(3, max_batch_size=0), str(onnx_file))
    assert [(one.name, one.data_type, one.shape) for one in described.inputs] == [("x", "TYPE_FP32", (-1, 3))]
    assert [(one.name, one.data_type, one.shape) for one in described.outputs] == [("y", "TYPE_FP32", (-1, 3))]
    assert described.max_batch_size == 4
    assert describe_onnx(rtx(), make_spec(3), str(onnx_file)).max_batch_size == 8
    assert describe_onnx(rtx(), make_spec(3, trt_max_shapes="x:16x3"), str(onnx_file)).max_batch_size == 16
    reshaping = describe_onnx(rtx(), make_spec(6), str(write_reshaping_onnx(tmp_path / "model.onnx")))
    assert [(one.name, one.is_shape_tensor) for one in reshaping.inputs] == [("x", False), ("size", True)]
    assert [one.is_shape_tensor for one in reshaping.outputs] == [False]
    assert reshaping.max_batch_size == 8


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({}, "its shape \\[-1, -1\\] varies; say how far with the parameters trt_min_shapes"),
        ({"trt_max_shapes": "x:8"}, "it has 2 dimensions"),
        ({"trt_min_shapes": "x:9x9", "trt_max_shapes": "x:8x8"}, "the shapes must rise"),
    ],
)
def test_impossible_profile_is_refused(parameters: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        choose_profile(make_spec(-1, **parameters), [OnnxInput("x", (-1, -1))])


def test_profile_of_a_ragged_input_must_be_said() -> None:
    """Spec S-140: nothing tells how many elements a batch has at most."""
    ragged = TensorSpec("x", "FP32", (), allow_ragged_batch=True)
    spec = msgspec.structs.replace(make_spec(3), inputs=(ragged,))
    with pytest.raises(InvalidArgument, match="its shape \\[-1\\] varies; say how far"):
        choose_profile(spec, [OnnxInput("x", (-1,))])


@needs_rtx
def test_what_tensorrt_is_asked_for_by_name_is_there() -> None:
    """Nothing of it runs without a GPU; a name that is not there would be noticed on one only."""
    library, folder = rtx(), Path(tensorrt_plans.__file__).parent
    source = "".join(path.read_text() for path in sorted(folder.glob("tensorrt_*.py")))
    asked = {
        library: r"\btrt\.([A-Za-z_]\w*)",
        library.ICudaEngine: r"(?<!forebay\.)\bengine\.([a-z]\w*)",
        library.IExecutionContext: r"\bcontext\.([a-z]\w*)\(",
    }
    for holder, pattern in asked.items():
        names = set(re.findall(pattern, source)) - {"init_libnvinfer_plugins", "__name__", "__version__"}
        assert len(names) > 5
        assert [name for name in sorted(names) if not hasattr(holder, name)] == []
