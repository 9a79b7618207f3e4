"""A model with a ragged input: its configuration, its ONNX file, and its counterpart in Python."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper

#: Y is twice X; SHAPE is the width of the request.
CONFIG: dict[str, Any] = {
    "backend": "onnxruntime",
    "max_batch_size": 8,
    "input": [{"name": "X", "data_type": "TYPE_FP32", "dims": [-1], "allow_ragged_batch": True}],
    "output": [
        {"name": "Y", "data_type": "TYPE_FP32", "dims": [-1]},
        {"name": "SHAPE", "data_type": "TYPE_INT32", "dims": [1]},
    ],
    "batch_input": [
        {
            "kind": "BATCH_ITEM_SHAPE",
            "target_name": ["ITEM_SHAPE"],
            "data_type": "TYPE_INT32",
            "source_input": ["X"],
        }
    ],
    "batch_output": [{"kind": "BATCH_SCATTER_WITH_INPUT_SHAPE", "target_name": ["Y"], "source_input": ["X"]}],
}

#: The same as text, for a Python model too; two requests make a batch.
CONFIG_TEXT = """
backend: "{backend}"
max_batch_size: 8
input {{ name: "X" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }}
output {{ name: "Y" data_type: TYPE_FP32 dims: [ -1 ] }}
output {{ name: "SHAPE" data_type: TYPE_INT32 dims: [ 1 ] }}
dynamic_batching {{ preferred_batch_size: [ 2 ] max_queue_delay_microseconds: 30000000 }}
instance_group {{ count: 1 kind: KIND_CPU }}
"""

BATCH_TENSORS_TEXT = """
batch_input {
  kind: BATCH_ITEM_SHAPE target_name: "ITEM_SHAPE" data_type: TYPE_INT32 source_input: "X"
}
batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "Y" source_input: "X" }
"""

PYTHON_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            answers.append(pb_utils.InferenceResponse([
                pb_utils.Tensor("Y", 2 * x), pb_utils.Tensor("SHAPE", np.array([[x.shape[1]]], np.int32)),
            ]))
        return answers
"""


def double_onnx() -> bytes:
    """Return an ONNX model: Y = 2 * X, one-dimensional; SHAPE = ITEM_SHAPE, int32 [n, 1]."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["X", "X"], ["Y"]), helper.make_node("Identity", ["ITEM_SHAPE"], ["SHAPE"])],
        "double",
        [
            helper.make_tensor_value_info("X", TensorProto.FLOAT, ["elements"]),
            helper.make_tensor_value_info("ITEM_SHAPE", TensorProto.INT32, ["rows", 1]),
        ],
        [
            helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["elements"]),
            helper.make_tensor_value_info("SHAPE", TensorProto.INT32, ["rows", 1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    serialized: bytes = model.SerializeToString()
    return serialized
