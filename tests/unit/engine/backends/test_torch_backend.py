"""The PyTorch backend in real worker processes (spec 8.3)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from worker_harness import WorkerHarness, spec_from_config

from forebay.ipc.errors import ServingError
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import InstanceSpec

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

RISK = Path(__file__).parents[4] / "conf" / "models" / "risk_model"


class Sum(torch.nn.Module):  # type: ignore[misc,name-defined]
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return left + right, left - right


class Dictionary(torch.nn.Module):  # type: ignore[misc,name-defined]
    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        return x["left"] - x["right"]


class Strings(torch.nn.Module):  # type: ignore[misc,name-defined]
    def forward(self, texts: list[str]) -> list[str]:
        return [text + "!" for text in texts]


class ListOfTensors(torch.nn.Module):  # type: ignore[misc,name-defined]
    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        return x[0] - x[1]


class SumOfEach(torch.nn.Module):  # type: ignore[misc,name-defined]
    """The sum of each request of a ragged batch; ``ends`` accumulates their element counts."""

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        sums = torch.cumsum(x, 0)[ends.long() - 1]
        return torch.diff(sums, prepend=torch.zeros(1)).unsqueeze(1)


class Odd(torch.nn.Module):  # type: ignore[misc,name-defined]
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x}


class Scalar(torch.nn.Module):  # type: ignore[misc,name-defined]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


class Raises(torch.nn.Module):  # type: ignore[misc,name-defined]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape([2, 2])


class Counting(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Keeps state, so it must not be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * 0 + self.count


class Accumulating(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Keeps state in a buffer that it writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x * 0 + 1)
        return self.total.clone()


def save(module: Any, folder: Path) -> str:
    (folder / "1").mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module.eval()).save(str(folder / "1" / "model.pt"))
    return str(folder)


def tensors(*names: str, data_type: str = "TYPE_FP32", dims: tuple[int, ...] = (-1,)) -> list[dict[str, Any]]:
    return [{"name": name, "data_type": data_type, "dims": list(dims)} for name in names]


def spec_of(path: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], **extra: Any) -> InstanceSpec:
    batch = extra.pop("max_batch_size", 0)
    config = {"backend": "pytorch", "input": inputs, "output": outputs, "max_batch_size": batch}
    return spec_from_config(config, model="m", model_path=path, **extra)


LEFT, RIGHT = np.array([5, 7], np.float32), np.array([1, 2], np.float32)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param("left", "right", id="arguments"),
        pytest.param("any__0", "other__1", id="indices"),
        pytest.param("first", "second", id="order"),
    ],
)
def test_inputs_are_found_by_argument_index_or_order(tmp_path: Path, left: str, right: str) -> None:
    """B-041, B-042."""
    order = [left, right] if left == "first" else [right, left]
    spec = spec_of(save(Sum(), tmp_path), tensors(*order), tensors("DIFF__1", "SUM__0"))
    with WorkerHarness(spec) as worker:
        [response] = worker.infer({left: LEFT, right: RIGHT})
        assert response.outputs["SUM__0"].tolist() == [6, 9]
        assert response.outputs["DIFF__1"].tolist() == [4, 5]


def test_dictionaries_lists_and_strings(tmp_path: Path) -> None:
    """B-041 (4), B-043, B-046."""
    spec = spec_of(save(Dictionary(), tmp_path), tensors("right", "left"), tensors("anything"))
    with WorkerHarness(spec) as worker:
        [response] = worker.infer({"left": LEFT, "right": RIGHT})
        assert response.outputs["anything"].tolist() == [4, 5]
    spec = spec_of(save(ListOfTensors(), tmp_path), tensors("b__1", "a__0"), tensors("OUTPUT__0"))
    with WorkerHarness(spec) as worker:
        [response] = worker.infer({"a__0": LEFT, "b__1": RIGHT})
        assert response.outputs["OUTPUT__0"].tolist() == [4, 5]
    texts = tensors("texts", data_type="TYPE_STRING"), tensors("OUTPUT__0", data_type="TYPE_STRING")
    with WorkerHarness(spec_of(save(Strings(), tmp_path), *texts)) as worker:
        [response] = worker.infer({"texts": np.array(["a", "é"], object)})
        assert response.outputs["OUTPUT__0"].tolist() == [b"a!", "é!".encode()]
        [response] = worker.infer({"texts": ("BYTES", (1,), b"\1\0\0\0\xff")})
        assert response.error is not None
        assert "not UTF-8" in response.error.text


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            Odd(),
            "output must be of type Tensor, List[str] or Tuple containing one of these two types. "
            "It should not be a List / Dictionary of Tensors or a Scalar",
        ),
        (Scalar(), "output 'OUTPUT__0' is a scalar which is not supported."),
    ],
)
def test_unusable_outputs_fail_with_tritons_texts(tmp_path: Path, module: Any, text: str) -> None:
    """B-043, B-045."""
    with WorkerHarness(spec_of(save(module, tmp_path), tensors("x"), tensors("OUTPUT__0"))) as worker:
        [response] = worker.infer({"x": LEFT})
        assert response.error is not None
        assert response.error.text == text


def test_failing_forward_says_so_without_paths(tmp_path: Path) -> None:
    """B-049."""
    with WorkerHarness(spec_of(save(Raises(), tmp_path), tensors("x"), tensors("OUTPUT__0"))) as worker:
        [response] = worker.infer({"x": LEFT})
        assert response.error is not None
        assert response.error.text.startswith("PyTorch execute failure: ")
        assert "shape '[2, 2]' is invalid for input of size 2" in response.error.text
        assert str(Path(__file__).parent) not in response.error.text


def test_output_index_beyond_the_results(tmp_path: Path) -> None:
    with WorkerHarness(spec_of(save(Sum(), tmp_path), tensors("left", "right"), tensors("OUTPUT__2"))) as worker:
        [response] = worker.infer({"left": LEFT, "right": RIGHT})
        assert response.error is not None
        assert response.error.text == (
            "The output OUTPUT__2 in the model configuration refers to an output index which doesn't exist. "
            "This model has 2 outputs"
        )


@pytest.mark.parametrize("module", [Counting(), Accumulating()])
def test_module_that_keeps_state_keeps_it(tmp_path: Path, module: Any) -> None:
    """Nor does loading change it."""
    spec = spec_of(save(module, tmp_path), tensors("x", dims=(2,)), tensors("OUTPUT__0", dims=(2,)))
    with WorkerHarness(spec) as worker:
        for count in (1, 2, 3):
            [response] = worker.infer({"x": LEFT})
            assert response.outputs["OUTPUT__0"].tolist() == [count, count]


@pytest.mark.parametrize(
    ("inputs", "outputs", "text"),
    [
        (
            ["left", "right", "more"],
            ["OUTPUT__0"],
            "unable to load model 'm', configuration expects 3 inputs, model provides at most 2 inputs",
        ),
        (["left", "right"], ["SUM", "DIFF"], "output 'SUM' does not follow <name>__<index> naming convention."),
        (
            ["a__0", "b__5"],
            ["OUTPUT__0"],
            "unable to load model 'm', the inputs ['a__0', 'b__5'] do not name each of the first 2 arguments of "
            "forward() once: left, right",
        ),
    ],
)
def test_configurations_that_do_not_fit_the_file(
    tmp_path: Path, inputs: list[str], outputs: list[str], text: str
) -> None:
    """B-042, B-044."""
    spec = spec_of(save(Sum(), tmp_path), tensors(*inputs), tensors(*outputs))
    with pytest.raises(ServingError) as caught, WorkerHarness(spec):
        pass
    assert caught.value.text == text


def test_bad_files_and_parameters_say_what_is_wrong(tmp_path: Path) -> None:
    """B-047 and "Bad input": missing, of another kind, a parameter that is no boolean."""
    (tmp_path / "1").mkdir()
    spec = spec_of(str(tmp_path), tensors("left", "right"), tensors("OUTPUT__0"))
    with pytest.raises(ServingError) as caught, WorkerHarness(spec):
        pass
    assert caught.value.text == "unable to find '1/model.pt' for model instance 'm_0_0'"
    (tmp_path / "1" / "model.pt").write_bytes(b"not a model")
    with pytest.raises(ServingError) as caught, WorkerHarness(spec):
        pass
    assert caught.value.text.startswith("failed to load model 'm': '1/model.pt' is not a TorchScript file")
    assert str(tmp_path) not in caught.value.text
    save(Sum(), tmp_path)
    wrong = spec_of(
        str(tmp_path), tensors("left", "right"), tensors("OUTPUT__0"), parameters={"INFERENCE_MODE": "perhaps"}
    )
    with pytest.raises(ServingError) as caught, WorkerHarness(wrong):
        pass
    assert caught.value.text == "model parameter 'INFERENCE_MODE' must be a boolean, got 'perhaps'"


def test_every_parameter_is_accepted(tmp_path: Path) -> None:
    """B-047."""
    names = (
        "DISABLE_OPTIMIZED_EXECUTION",
        "INFERENCE_MODE",
        "DISABLE_CUDNN",
        "ENABLE_WEIGHT_SHARING",
        "ENABLE_CACHE_CLEANING",
        "ENABLE_JIT_EXECUTOR",
        "ENABLE_JIT_PROFILING",
        "ENABLE_TENSOR_FUSER",
    )
    parameters = {**dict.fromkeys(names, "false"), "INTER_OP_THREAD_COUNT": "2", "INTRA_OP_THREAD_COUNT": "2"}
    spec = spec_of(save(Sum(), tmp_path), tensors("left", "right"), tensors("OUTPUT__0"), parameters=parameters)
    with WorkerHarness(spec) as worker:
        [response] = worker.infer({"left": LEFT, "right": RIGHT})
        assert response.outputs["OUTPUT__0"].tolist() == [6, 9]


def test_half_precisions_pass_through(tmp_path: Path) -> None:
    """BF16 has no numpy type: its bits are kept."""
    for data_type, name in (("TYPE_BF16", "BF16"), ("TYPE_FP16", "FP16")):
        spec = spec_of(
            save(Sum(), tmp_path),
            tensors("left", "right", data_type=data_type, dims=(2,)),
            tensors("OUTPUT__0", data_type=data_type, dims=(2,)),
        )
        kind = torch.bfloat16 if name == "BF16" else torch.float16
        left = torch.tensor([1.5, 2], dtype=kind).view(torch.uint16).numpy()
        with WorkerHarness(spec) as worker:
            raw = (name, (2,), left.tobytes())
            [response] = worker.infer({"left": raw, "right": raw})
            bits = torch.from_numpy(response.outputs["OUTPUT__0"].view(np.uint16).copy()).view(kind)
            assert bits.tolist() == [3, 4]


def risk_spec() -> InstanceSpec:
    return spec_from_config(
        {
            "backend": "pytorch",
            "max_batch_size": 64,
            "input": [{"name": "features__0", "data_type": "TYPE_FP32", "dims": [50]}],
            "output": [{"name": "risk__0", "data_type": "TYPE_FP32", "dims": [1]}],
        },
        model="risk_model",
        model_path=str(RISK),
    )


def test_example_model_runs_in_the_slab() -> None:
    """Rows in place and gathered give what the file gives in process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(RISK / "1" / "model.pt")).eval()
    features = np.random.default_rng(1).standard_normal((8, 50)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(features)).numpy()
    with WorkerHarness(risk_spec()) as worker:
        base = worker.slab(8)
        worker.area(base, 8, "features__0")[:] = features
        worker.send_runs(worker.run_of(base, 8, 0, 4))
        assert worker.runs_answer().error is None
        worker.send_runs(worker.run_of(base, 8, 6, 2), worker.run_of(base, 8, 4, 2))
        assert worker.runs_answer().error is None
        assert np.allclose(worker.area(base, 8, "risk__0"), expected, atol=1e-6)


def test_example_model_is_described_without_its_configuration() -> None:
    """L-019: the first layer tells the input, a trial run the output."""
    with WorkerHarness(risk_spec(), load=False) as worker:
        described = worker.describe()
        assert described.inputs == ({"name": "input", "data_type": "TYPE_FP32", "shape": [-1, 50]},)
        assert described.outputs == ({"name": "OUTPUT__0", "data_type": "TYPE_FP32", "shape": [-1, 1]},)


def test_file_that_tells_too_little_asks_for_a_configuration(tmp_path: Path) -> None:
    spec = spec_of(save(Sum(), tmp_path), [], [])
    with pytest.raises(ServingError) as caught, WorkerHarness(spec, load=False) as worker:
        worker.describe()
    assert caught.value.text == (
        "model configuration is not complete for model 'm': its TorchScript file does not tell datatypes and shapes of "
        "all inputs; give 'input' and 'output' in config.pbtxt"
    )


MODEL_PY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, a, b):
        return a * self.scale - b
"""


def test_plain_module_with_weights(tmp_path: Path) -> None:
    """B-051: inputs in the order of the configuration."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.py").write_text(MODEL_PY)
    torch.save({"scale": torch.tensor([3.0])}, tmp_path / "1" / "model.pt")
    spec = spec_from_config(
        {"backend": "pytorch", "runtime": "model.py", "input": tensors("x", "y"), "output": tensors("z")},
        model="m",
        model_path=str(tmp_path),
        parameters={"TORCH_COMPILE_OPTIONAL_PARAMETERS": '{"disable": true}', "NUM_THREADS": "1"},
    )
    with WorkerHarness(spec) as worker:
        [response] = worker.infer({"y": RIGHT, "x": LEFT})
        assert response.outputs["z"].tolist() == [14, 19]
    (tmp_path / "1" / "model.pt").write_bytes(b"no weights")
    with (
        pytest.raises(ServingError, match=r"failed to load model 'm': '1/model.pt' does not fit model.py: "),
        WorkerHarness(spec),
    ):
        pass
    (tmp_path / "1" / "model.py").write_text("x = 1\n")
    with pytest.raises(ServingError, match=r"'1/model.py' has no subclass of torch.nn.Module"), WorkerHarness(spec):
        pass


def test_ragged_input_is_one_tensor_for_the_batch(tmp_path: Path) -> None:
    """Spec S-140, S-142: a batch input is an argument like any other."""
    path = save(SumOfEach(), tmp_path)
    ends = {
        "kind": "BATCH_ACCUMULATED_ELEMENT_COUNT",
        "target_names": ["ends"],
        "datatype": "INT32",
        "source_inputs": ["x"],
    }
    made = spec_of(path, [], tensors("y", dims=(1,)), max_batch_size=4, extra={"batch_inputs": [ends]})
    ragged = TensorSpec("x", "FP32", (-1,), allow_ragged_batch=True)
    spec = msgspec.structs.replace(made, inputs=(ragged,))
    with WorkerHarness(spec) as worker:
        tokens = worker.submit({"x": np.array([[1, 2, 3]], np.float32)}, {"x": np.array([[4, 5]], np.float32)})
        answers = {response.token: response.outputs["y"].tolist() for response in worker.responses(*tokens)}
        assert [answers[token] for token in tokens] == [[[6]], [[9]]]
