"""Models for tests of device memory: one on a GPU, which the host plays, and one on the CPU."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

CONFIG = """
backend: "onnxruntime"
max_batch_size: 8
input {{ name: "X" data_type: TYPE_FP32 dims: [ {dim} ] }}
output {{ name: "Y" data_type: TYPE_FP32 dims: [ {dim} ] }}
instance_group {{ kind: {kind} count: {count} }}
{more}
"""

ENSEMBLE = """
platform: "ensemble"
max_batch_size: 8
input { name: "X" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "Y" data_type: TYPE_FP32 dims: [ 4 ] }
ensemble_scheduling {
  step { model_name: "gpu" model_version: -1 input_map { key: "X" value: "X" } output_map { key: "Y" value: "T" } }
  step { model_name: "gpu" model_version: -1 input_map { key: "X" value: "T" } output_map { key: "Y" value: "Y" } }
}
"""


def add_doubler(root: Path, name: str, kind: str, *, dim: int = 4, count: int = 1, more: str = "") -> None:
    """Add a model that answers Y = X + X."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["X", "X"], ["Y"])],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ("n", "k"))],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ("n", "k"))],
    )
    (root / name / "1").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, root / name / "1" / "model.onnx")
    (root / name / "config.pbtxt").write_text(CONFIG.format(kind=kind, dim=dim, count=count, more=more))


def add_chain(root: Path, name: str) -> None:
    """Add an ensemble that runs the model ``gpu`` twice."""
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(ENSEMBLE)
