"""The peer's model: Triton's Python backend running an ONNX file with ONNX Runtime, one thread, as fast as it goes.

Runs in Triton's own Python, not in ours. All requests of a batch are run at once and the result is cut up again.
"""

import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]


class TritonPythonModel:
    """One instance of ``<version>/model.onnx`` with one input and one output."""

    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.outputs = [self.session.get_outputs()[0].name]

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        batch = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        (result,) = self.session.run(self.outputs, {self.input: batch})
        responses = []
        row = 0
        for rows in inputs:
            part = result[row : row + len(rows)]
            row += len(rows)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(self.outputs[0], part)]))
        return responses
