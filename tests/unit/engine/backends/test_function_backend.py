"""Python functions as models, in a real worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reloading_worker import ReloadingWorker
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.function_repository import BACKEND_NAME
from forebay.ipc.errors import ServingError
from forebay.ipc.worker_messages import InstanceSpec

SOURCE = """
import numpy as np
from forebay.engine.model_functions import model

@model(inputs={"x": "FP32[2]"}, outputs={"y": "FP32[1]"}, max_batch_size=8)
def total(x):
    return x.sum(axis=1, keepdims=True)

@model(inputs={"x": "FP32[-1]"}, outputs={"low": "FP32[1]", "high": "FP32[1]"})
def ends(x):
    if len(x) == 0:
        raise ValueError("nothing to look at")
    if x[0] == 1:
        return x.min(keepdims=True), x.max(keepdims=True)
    if x[0] == 2:
        return {"high": [x.max()], "low": [x.min()]}
    if x[0] == 3:
        return x
    if x[0] == 4:
        return x, x, x
    return {"low": "no number", "high": x.max(keepdims=True)}

@model(inputs={"texts": "BYTES[-1]"}, outputs={"joined": "BYTES[1]"})
def join(texts):
    return [b"+".join(texts)]

@model(inputs={"x": "FP32"}, outputs={"y": "FP32"})
class Adder:
    def __init__(self):
        self.offset = 5
    def __call__(self, x):
        return x + self.offset

@model(inputs={"x": "FP32"}, outputs={"y": "FP32"})
class Broken:
    def __init__(self):
        raise OSError("no weights")
    def __call__(self, x):
        return x

number = 3
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("functions")
    (path / "served_functions.py").write_text(SOURCE)
    (path / "unimportable.py").write_text("raise RuntimeError('not today')")
    return path


@pytest.fixture(scope="module")
def worker() -> Iterator[ReloadingWorker]:
    with ReloadingWorker() as one:
        yield one


def make_spec(directory: Path, location: str, **config: Any) -> InstanceSpec:
    config = {
        "backend": BACKEND_NAME,
        "parameters": {"function": {"string_value": location}, "directory": {"string_value": str(directory)}},
        **config,
    }
    return spec_from_config(config, model="m", model_path=str(directory))


def tensor(name: str, *dims: int, data_type: str = "TYPE_FP32") -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": list(dims)}


ENDS = {"input": [tensor("x", -1)], "output": [tensor("low", 1), tensor("high", 1)]}


def test_function_gets_whole_batches(worker: ReloadingWorker, directory: Path) -> None:
    config = {"max_batch_size": 8, "input": [tensor("x", 2)], "output": [tensor("y", 1)]}
    worker.load(make_spec(directory, "served_functions:total", **config))
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert worker.infer({"x": rows}).outputs["y"].tolist() == [[1], [5], [9]]


@pytest.mark.parametrize("first", [1, 2])
def test_tuples_and_mappings_are_outputs(worker: ReloadingWorker, directory: Path, first: int) -> None:
    worker.load(make_spec(directory, "served_functions:ends", **ENDS))
    outputs = worker.infer({"x": np.array([first, 7], np.float32)}).outputs
    assert {name: array.tolist() for name, array in outputs.items()} == {"low": [first], "high": [7]}


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ([], "model 'm': the function raised ValueError: nothing to look at"),
        ([3], "model 'm': the function returned ndarray for 2 outputs; return a tuple or a dictionary"),
        ([4], "model 'm': the function returned 3 values for 2 outputs"),
        ([5], "output 'low' is no array of FP32: could not convert string to float: 'no number'"),
    ],
    ids=["raises", "one", "three", "no number"],
)
def test_what_a_function_does_wrong_fails_its_requests(
    worker: ReloadingWorker, directory: Path, inputs: list[int], text: str
) -> None:
    worker.load(make_spec(directory, "served_functions:ends", **ENDS))
    failed = worker.infer({"x": np.array(inputs, np.float32)})
    assert failed.error is not None
    assert failed.error.text == text
    assert worker.infer({"x": np.array([1], np.float32)}).error is None


def test_strings_are_bytes(worker: ReloadingWorker, directory: Path) -> None:
    texts = [tensor("texts", -1, data_type="TYPE_STRING")], [tensor("joined", 1, data_type="TYPE_STRING")]
    worker.load(make_spec(directory, "served_functions:join", input=texts[0], output=texts[1]))
    response = worker.infer({"texts": np.array([b"a", b"\xff"], dtype=object)})
    assert response.outputs["joined"].tolist() == [b"a+\xff"]


@pytest.mark.parametrize("location", ["served_functions:Adder", "served_functions.py:Adder"])
def test_class_is_made_once(worker: ReloadingWorker, directory: Path, location: str) -> None:
    worker.load(make_spec(directory, location, input=[tensor("x", 1)], output=[tensor("y", 1)]))
    assert worker.infer({"x": np.array([1], np.float32)}).outputs["y"].tolist() == [6]


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("served_functions", "the parameter 'function' must be 'module:function', got 'served_functions'"),
        ("nowhere:f", "cannot import 'nowhere': ModuleNotFoundError: No module named 'nowhere'"),
        ("nowhere.py:f", "there is no file 'nowhere.py'"),
        ("unimportable:f", "cannot import 'unimportable': RuntimeError: not today"),
        ("served_functions:absent", "'served_functions' has no 'absent'"),
        ("served_functions:number", "'3' is not a function"),
        ("served_functions:Broken", "Broken() raised OSError: no weights"),
    ],
)
def test_what_cannot_be_served_says_why(worker: ReloadingWorker, directory: Path, location: str, text: str) -> None:
    with pytest.raises(ServingError) as caught:
        worker.load(make_spec(directory, location, input=[tensor("x", 1)], output=[tensor("y", 1)]))
    assert caught.value.text == f"model 'm': {text}"


def test_describe_returns_the_declaration(directory: Path) -> None:
    with WorkerHarness(make_spec(directory, "served_functions:total"), load=False) as harness:
        described = harness.describe()
    assert described.config["max_batch_size"] == 8
    assert described.config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}]
