"""Models that people use, from their PyPI packages, give the same numbers as in this process."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import tritonclient.http as httpclient
from forebay_server import ForebayServer
from http_models import wait_nothing_in_use

#: Model name to package and file.
FILES = {
    "magika": ("magika", "models/standard_v3_3/model.onnx"),
    "silero_vad": ("silero_vad", "data/silero_vad.onnx"),
    "silero_vad_half": ("silero_vad", "data/silero_vad_half.onnx"),
}

#: Triton has no scalars: where the model wants one, the configuration says one element.
SILERO_CONFIG = """
backend: "onnxruntime"
input [
  { name: "input" data_type: TYPE_FP32 dims: [ -1, -1 ] },
  { name: "state" data_type: TYPE_FP32 dims: [ 2, -1, 128 ] },
  { name: "sr" data_type: TYPE_INT64 dims: [ 1 ] }
]
output [
  { name: "output" data_type: TYPE_FP32 dims: [ -1, 1 ] },
  { name: "stateN" data_type: TYPE_FP32 dims: [ -1, -1, -1 ] }
]
"""

Array = npt.NDArray[np.generic]


def model_file(name: str) -> Path:
    package, path = FILES[name]
    # Looked up without being imported: silero_vad imports PyTorch.
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed: make test installs it"
    assert spec.origin is not None
    return Path(spec.origin).parent / path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    repository = tmp_path_factory.mktemp("real") / "models"
    for name in FILES:
        (repository / name / "1").mkdir(parents=True)
        shutil.copy(model_file(name), repository / name / "1" / "model.onnx")
    (repository / "silero_vad" / "config.pbtxt").write_text(SILERO_CONFIG)
    with ForebayServer(repository) as running:
        yield running
        wait_nothing_in_use(running)


def served(client: httpclient.InferenceServerClient, name: str, inputs: dict[str, Array]) -> dict[str, Array]:
    """Ask the server."""
    given: list[httpclient.InferInput] = []
    kinds = {"f": "FP32", "i": "INT32", "l": "INT64"}
    for key, array in inputs.items():
        tensor = httpclient.InferInput(key, array.shape, kinds[array.dtype.char])
        tensor.set_data_from_numpy(array)
        given.append(tensor)
    result = client.infer(name, given)
    return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


def in_process(name: str, inputs: dict[str, Array]) -> dict[str, Array]:
    """Run the file here, with one thread as a worker does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model_file(name)), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def compare(client: httpclient.InferenceServerClient, name: str, inputs: dict[str, Array]) -> dict[str, Array]:
    """Check every output and return them."""
    scalars = {"sr"} & inputs.keys()
    answers = served(client, name, inputs)
    expected = in_process(name, {key: array.reshape(()) if key in scalars else array for key, array in inputs.items()})
    assert answers.keys() == expected.keys()
    for key, array in expected.items():
        assert answers[key].shape == array.shape
        np.testing.assert_allclose(answers[key], array, rtol=1e-5, atol=1e-6)
    return answers


def magika_features(texts: list[bytes]) -> Array:
    """Return int32 [texts, 2048]: the first 1024 and the last 1024 bytes, padded with 256."""
    rows = []
    for text in texts:
        first = list(text[:1024]) + [256] * max(0, 1024 - len(text))
        last = [256] * max(0, 1024 - len(text)) + list(text[-1024:])
        rows.append(first + last)
    return np.array(rows, dtype=np.int32)


@pytest.mark.parametrize("rows", [1, 3])
def test_magika(server: ForebayServer, rows: int) -> None:
    texts = [Path(__file__).read_bytes(), b"#!/bin/sh\necho hello\n" * 20, bytes(range(256)) * 8]
    with httpclient.InferenceServerClient(server.http_url) as client:
        assert client.get_model_metadata("magika")["inputs"][0]["datatype"] == "INT32"
        answers = compare(client, "magika", {"bytes": magika_features(texts[:rows])})
        np.testing.assert_allclose(answers["target_label"].sum(axis=1), 1.0, rtol=1e-3)


@pytest.mark.parametrize("batch", [1, 4])
def test_silero_vad(server: ForebayServer, batch: int) -> None:
    """A recurrent model: the state of one answer is part of the next question; and a scalar input."""
    generator = np.random.default_rng(5)
    state: Array = np.zeros((2, batch, 128), dtype=np.float32)
    with httpclient.InferenceServerClient(server.http_url) as client:
        for _ in range(4):
            sound = (generator.standard_normal((batch, 576)) * 0.1).astype(np.float32)
            inputs: dict[str, Array] = {"input": sound, "state": state, "sr": np.array([16000], dtype=np.int64)}
            answers = compare(client, "silero_vad", inputs)
            state = answers["stateN"]
            assert ((answers["output"] >= 0) & (answers["output"] <= 1)).all()


def test_silero_vad_half(server: ForebayServer) -> None:
    sound = np.random.default_rng(6).standard_normal((1, 576)).astype(np.float32)
    with httpclient.InferenceServerClient(server.http_url) as client:
        compare(client, "silero_vad_half", {"input": sound, "state": np.zeros((2, 1, 128), dtype=np.float32)})
