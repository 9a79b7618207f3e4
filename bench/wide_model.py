"""A model of the same inputs and outputs as ``alpha_model``, and a thousand times the work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_FEATURES, _WIDTH = 50, 2048


def write_wide_model(path: Path) -> None:
    """Write ``features`` float32 [n, 50] to ``prediction`` float32 [n, 1]: a few milliseconds of one core a batch."""
    random = np.random.default_rng(2048)
    shapes = {"first": (_FEATURES, _WIDTH), "second": (_WIDTH, _WIDTH), "last": (_WIDTH, 1)}
    weights = [
        numpy_helper.from_array(random.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["features", "first"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["positive"]),
        helper.make_node("MatMul", ["positive", "second"], ["mixed"]),
        helper.make_node("Relu", ["mixed"], ["kept"]),
        helper.make_node("MatMul", ["kept", "last"], ["prediction"]),
    ]
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", _FEATURES])],
        [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["n", 1])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
