"""ONNX files for TensorRT."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def write_reshaping_onnx(path: Path) -> Path:
    """Write a model that gives ``x`` the shape of ``size``."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "size"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6]),
            helper.make_tensor_value_info("size", TensorProto.INT64, [3]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
