"""A model repository of small Python and ONNX models and the ensembles over them, for tests.

``add_one``: OUT = IN + 1, Python, batches. ``scale``: Y = 2 X, ONNX, fixed [4], batches. ``plain``: as add_one, does
not batch. ``many``: decoupled, one response per unit of its input. A first element of -1 makes add_one fail, -2 slow.
"""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto, helper

_ADD_ONE = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            given = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            first = float(given.ravel()[0])
            if first == -1:
                error = pb_utils.TritonError("no negative numbers", pb_utils.TritonError.UNAVAILABLE)
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            if first == -2:
                time.sleep(1.0)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", given + np.float32(1))]))
        return responses
"""

_MANY = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            count = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy().ravel()[0])
            for index in range(count):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.full((1,), index, np.float32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

_PAIR = """
input [ {{ name: "{0}" data_type: TYPE_FP32 dims: [ {2} ] }} ]
output [ {{ name: "{1}" data_type: TYPE_FP32 dims: [ {2} ] }} ]
"""


def step(model: str, inputs: dict[str, str], outputs: dict[str, str], version: int = -1) -> str:
    """Return one step of an ensemble as text."""
    maps = [f'input_map {{ key: "{name}" value: "{tensor}" }}' for name, tensor in inputs.items()]
    maps += [f'output_map {{ key: "{name}" value: "{tensor}" }}' for name, tensor in outputs.items()]
    return f'step {{ model_name: "{model}" model_version: {version} {" ".join(maps)} }}'


def write_model(repository: Path, name: str, config: str, files: dict[str, bytes | str] | None = None) -> None:
    """Write one model with a version directory 1 and these files in it."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config)
    for file, content in (files or {}).items():
        (version / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def write_ensemble(repository: Path, name: str, tensors: str, *steps: str, batch: int = 8, more: str = "") -> None:
    """Write an ensemble; ``tensors``: its inputs and outputs as text."""
    write_model(
        repository,
        name,
        f'platform: "ensemble"\nmax_batch_size: {batch}\n{tensors}\n{more}\n'
        f"ensemble_scheduling {{ {' '.join(steps)} }}\n",
    )


def pair(source: str, target: str, dims: str = "4") -> str:
    """Return one FP32 input and one FP32 output as text."""
    return _PAIR.format(source, target, dims)


def scale_onnx(factor: float = 2.0) -> bytes:
    """Return an ONNX model: Y = factor * X, float32 [batch, 4]."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["X", "factor"], ["Y"])],
        "scale",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    serialized: bytes = model.SerializeToString()
    return serialized


def write_repository(repository: Path) -> None:
    """Write all models and ensembles."""
    write_model(
        repository,
        "add_one",
        'backend: "python"\nmax_batch_size: 8\ndynamic_batching { }\n' + pair("IN", "OUT"),
        {"model.py": _ADD_ONE},
    )
    write_model(repository, "plain", 'backend: "python"\n' + pair("IN", "OUT"), {"model.py": _ADD_ONE})
    write_model(
        repository,
        "many",
        'backend: "python"\nmodel_transaction_policy { decoupled: true }\n' + pair("IN", "OUT", "1"),
        {"model.py": _MANY},
    )
    write_model(repository, "plus_many", 'backend: "python"\n' + pair("IN", "OUT", "1"), {"model.py": _ADD_ONE})
    write_model(
        repository,
        "scale",
        'backend: "onnxruntime"\nmax_batch_size: 8\ndynamic_batching { }\n' + pair("X", "Y"),
        {"model.onnx": scale_onnx()},
    )
    write_ensemble(
        repository,
        "two_steps",
        pair("A", "C"),
        step("add_one", {"IN": "A"}, {"OUT": "b"}),
        step("scale", {"X": "b"}, {"Y": "C"}),
    )
    write_ensemble(repository, "one_step", pair("A", "C"), step("scale", {"X": "A"}, {"Y": "C"}))
    write_ensemble(
        repository,
        "line",
        pair("A", "C"),
        step("scale", {"X": "A"}, {"Y": "b"}),
        step("scale", {"X": "b"}, {"Y": "c"}),
        step("add_one", {"IN": "c"}, {"OUT": "C"}),
    )
    write_ensemble(
        repository,
        "branches",
        pair("A", "LEFT") + 'output [ { name: "RIGHT" data_type: TYPE_FP32 dims: [ 4 ] } ]',
        step("add_one", {"IN": "A"}, {"OUT": "LEFT"}),
        step("scale", {"X": "A"}, {"Y": "RIGHT"}),
    )
    write_ensemble(
        repository,
        "nested",
        pair("P", "Q"),
        step("two_steps", {"A": "P"}, {"C": "m"}),
        step("add_one", {"IN": "m"}, {"OUT": "Q"}),
    )
    write_ensemble(
        repository,
        "over_plain",
        pair("A", "C"),
        step("plain", {"IN": "A"}, {"OUT": "b"}),
        step("scale", {"X": "b"}, {"Y": "C"}),
    )
    write_ensemble(
        repository,
        "decoupled",
        pair("A", "C", "1"),
        step("many", {"IN": "A"}, {"OUT": "b"}),
        step("plus_many", {"IN": "b"}, {"OUT": "C"}),
        batch=0,
    )
