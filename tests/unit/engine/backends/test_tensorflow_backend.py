"""TensorFlow models in a real worker: signatures, frozen graphs, strings (spec B-085, L-045)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from reloading_worker import ReloadingWorker
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.backends.tensorflow_backend import FoundTensor, Signature, check_accelerators, check_config
from forebay.ipc.errors import ServingError
from forebay.ipc.worker_messages import InstanceSpec

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is None,
        reason="TensorFlow is not installed: pip install 'forebay[tensorflow]'",
    ),
    # Importing TensorFlow takes seconds, and here two processes do.
    pytest.mark.timeout(300),
]

SUPPORT = Path(__file__).parents[3] / "support"
ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorflow")
    subprocess.run([sys.executable, SUPPORT / "make_tensorflow_models.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def worker() -> Iterator[ReloadingWorker]:
    with ReloadingWorker() as one:
        yield one


def tensor(name: str, *dims: int, data_type: str = "TYPE_FP32") -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": list(dims)}


def make_spec(models: Path, inputs: list[Any], outputs: list[Any], **config: Any) -> InstanceSpec:
    model = config.pop("model", "linear")
    platform = "tensorflow_graphdef" if model == "graph" else "tensorflow_savedmodel"
    parameters = {key: {"string_value": text} for key, text in config.pop("parameters", {}).items()}
    whole = {
        "backend": "tensorflow",
        "platform": platform,
        "input": inputs,
        "output": outputs,
        "parameters": parameters,
        **config,
    }
    return spec_from_config(whole, model=model, model_path=str(models / model))


def test_default_signature_in_a_batch(worker: ReloadingWorker, models: Path) -> None:
    worker.load(make_spec(models, [tensor("x", 2)], [tensor("y", 2)], max_batch_size=8))
    response = worker.infer({"x": ROWS})
    assert response.error is None
    np.testing.assert_allclose(response.outputs["y"], ROWS @ np.array([[1, 2], [3, 4]], np.float32))


def test_another_signature_with_bytes_that_are_no_text(worker: ReloadingWorker, models: Path) -> None:
    strings = [tensor(name, -1, data_type="TYPE_STRING") for name in ("left", "right", "joined")]
    worker.load(make_spec(models, strings[:2], strings[2:], parameters={"TF_SIGNATURE_DEF": "join"}))
    left = np.array([b"a", b"\xff\0"], dtype=object)
    response = worker.infer({"left": left, "right": np.array([b"b", b""], dtype=object)})
    assert response.error is None
    assert response.outputs["joined"].tolist() == [b"a-b", b"\xff\0-"]


def test_bfloat16(worker: ReloadingWorker, models: Path) -> None:
    tensors = [tensor("x", -1, data_type="TYPE_BF16")], [tensor("y", -1, data_type="TYPE_BF16")]
    worker.load(make_spec(models, *tensors, parameters={"TF_SIGNATURE_DEF": "negative"}))
    bits = np.array([0x3F80, 0x4000], np.uint16)
    response = worker.infer({"x": ("BF16", (2,), bits.tobytes())})
    assert response.error is None
    assert (response.outputs["y"].view(np.uint16) == (bits | 0x8000)).all()


def test_scalar_is_configured_as_one_element(worker: ReloadingWorker, models: Path) -> None:
    """D-013."""
    worker.load(make_spec(models, [tensor("x", 1)], [tensor("y", 1)], parameters={"TF_SIGNATURE_DEF": "half"}))
    assert worker.infer({"x": np.array([5], np.float32)}).outputs["y"].tolist() == [2.5]


def test_frozen_graph_by_tensor_names(worker: ReloadingWorker, models: Path) -> None:
    worker.load(make_spec(models, [tensor("x", 2)], [tensor("y", 2)], model="graph", max_batch_size=8))
    assert (worker.infer({"x": ROWS}).outputs["y"] == ROWS * 3).all()


def test_failed_run_fails_the_request_and_the_worker_lives(worker: ReloadingWorker, models: Path) -> None:
    strings = [tensor(name, -1, data_type="TYPE_STRING") for name in ("left", "right", "joined")]
    worker.load(make_spec(models, strings[:2], strings[2:], parameters={"TF_SIGNATURE_DEF": "join"}))
    texts = [np.array([b"x"] * count, dtype=object) for count in (2, 3)]
    failed = worker.infer({"left": texts[0], "right": texts[1]})
    assert failed.error is not None
    assert failed.error.text.startswith("TensorFlow execute failure: ")
    assert worker.infer({"left": texts[0], "right": texts[0]}).error is None


@pytest.mark.parametrize(
    ("inputs", "outputs", "text"),
    [
        ([tensor("z", 2)], [tensor("y", 2)], "unexpected inference input 'z', allowed inputs are: x"),
        ([tensor("x", 2)], [tensor("z", 2)], "unexpected inference output 'z', allowed outputs are: sum, y"),
        (
            [tensor("x", 2, data_type="TYPE_INT8")],
            [tensor("y", 2)],
            "configuration expects datatype TYPE_INT8 for input 'x', model provides TYPE_FP32",
        ),
        ([tensor("x", 3)], [tensor("y", 2)], "the model expects 2 dimensions (shape [-1,2])"),
    ],
    ids=["input", "output", "type", "shape"],
)
def test_contradiction_is_refused(inputs: list[Any], outputs: list[Any], text: str) -> None:
    signature = Signature(
        inputs=(FoundTensor("x", "TYPE_FP32", (-1, 2)),),
        outputs=(FoundTensor("sum", "TYPE_FP32", (-1,)), FoundTensor("y", "TYPE_FP32", (-1, 2))),
        call=dict,
        keep_alive=None,
    )
    with pytest.raises(ServingError) as caught:
        check_config(make_spec(Path(), inputs, outputs, max_batch_size=8), signature)
    assert text in caught.value.text


def test_missing_signature_lists_those_there_are(worker: ReloadingWorker, models: Path) -> None:
    spec = make_spec(models, [tensor("x", 2)], [tensor("y", 2)], parameters={"TF_SIGNATURE_DEF": "zzz"})
    with pytest.raises(ServingError, match="it has: half, join, negative, serving_default"):
        worker.load(spec)


@pytest.mark.parametrize("model", ["linear", "graph"])
def test_missing_file_is_named(worker: ReloadingWorker, tmp_path: Path, model: str) -> None:
    (tmp_path / model / "1").mkdir(parents=True)
    with pytest.raises(ServingError, match=r"unable to find '.*model\.(savedmodel|graphdef)' for model instance"):
        worker.load(make_spec(tmp_path, [tensor("x", 2)], [tensor("y", 2)], model=model))


def test_damaged_model_says_which(worker: ReloadingWorker, tmp_path: Path) -> None:
    folder = tmp_path / "linear" / "1" / "model.savedmodel"
    folder.mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"damaged")
    with pytest.raises(ServingError, match=r"failed to load TensorFlow model 'linear' version 1 from model\.s"):
        worker.load(make_spec(tmp_path, [tensor("x", 2)], [tensor("y", 2)]))


def test_unknown_accelerator_is_refused() -> None:
    """C-053."""
    spec = make_spec(Path(), [tensor("x", 2)], [tensor("y", 2)])
    with pytest.raises(ServingError, match="unknown Execution Accelerator 'zzz' is requested"):
        check_accelerators(msgspec.structs.replace(spec, optimization={"gpu_accelerators": [{"name": "zzz"}]}))


def test_describe_reads_the_signature(models: Path) -> None:
    with WorkerHarness(make_spec(models, [], [], max_batch_size=0), load=False) as harness:
        described = harness.describe()
    assert described.inputs == ({"name": "x", "data_type": "TYPE_FP32", "shape": [-1, 2]},)
    assert [item["name"] for item in described.outputs] == ["sum", "y"]
