"""Models for tests of device memory: one on a GPU, which the host may play, and one on the CPU.

On a machine with a GPU whose ONNX Runtime cannot use it, the models on it are PyTorch's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from forebay.engine.devices.opening import has_gpu_files

CONFIG = """
{backend}
max_batch_size: 8
input {{ name: "X" data_type: TYPE_FP32 dims: [ {dim} ] }}
output {{ name: "Y" data_type: TYPE_FP32 dims: [ {dim} ] }}
instance_group {{ kind: {kind} count: {count} }}
{more}
"""

ENSEMBLE = """
platform: "ensemble"
max_batch_size: 8
input {{ name: "X" data_type: TYPE_FP32 dims: [ {dim} ] }}
output {{ name: "Y" data_type: TYPE_FP32 dims: [ {dim} ] }}
ensemble_scheduling {{
  step {{
    model_name: "{model}" model_version: -1 input_map {{ key: "X" value: "X" }} output_map {{ key: "Y" value: "T" }}
  }}
  step {{
    model_name: "{last}" model_version: -1 input_map {{ key: "X" value: "T" }} output_map {{ key: "Y" value: "Y" }}
  }}
}}
"""

ONNX = 'backend: "onnxruntime"'
TORCH = """
backend: "pytorch"
runtime: "model.py"
parameters { key: "TORCH_COMPILE_OPTIONAL_PARAMETERS" value { string_value: "{\\"disable\\": true}" } }
"""

TORCH_MODULE = """
import torch

class Doubler(torch.nn.Module):
    def forward(self, x):
        return x + x
"""


def must_use_torch() -> bool:
    """Whether only PyTorch can use the GPU of this machine."""
    return (
        has_gpu_files()
        and "CUDAExecutionProvider" not in ort.get_available_providers()
        and importlib.util.find_spec("torch") is not None
    )


def add_doubler(root: Path, name: str, kind: str, *, dim: int = 4, count: int = 1, more: str = "") -> None:
    """Add a model that answers Y = X + X."""
    (root / name / "1").mkdir(parents=True)
    backend = ONNX
    if "KIND_GPU" in kind + more and must_use_torch():
        backend = TORCH
        (root / name / "1" / "model.py").write_text(TORCH_MODULE)
    else:
        write_onnx_doubler(root / name / "1" / "model.onnx")
    text = CONFIG.format(backend=backend, kind=kind, dim=dim, count=count, more=more)
    (root / name / "config.pbtxt").write_text(text)


def write_onnx_doubler(path: Path) -> None:
    """Write Y = X + X for matrices."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["X", "X"], ["Y"])],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ("n", "k"))],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ("n", "k"))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def add_chain(root: Path, name: str, *, model: str = "gpu", last: str = "", dim: int = 4) -> None:
    """Add an ensemble that runs a model, and then another; twice the same if there is no other."""
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(ENSEMBLE.format(model=model, last=last or model, dim=dim))
