"""A small numpy model, 50 values to 1: all requests of a batch are computed at once and the result is cut up again."""

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]


class TritonPythonModel:
    """``OUT`` is ``IN`` weighted with 0, 1, ... 49 and summed, per row."""

    def initialize(self, args):
        self.weights = np.arange(50, dtype=np.float32)[:, np.newaxis]

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "IN").as_numpy() for request in requests]
        batch = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        result = batch @ self.weights
        responses = []
        row = 0
        for rows in inputs:
            part = result[row : row + len(rows)]
            row += len(rows)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", part)]))
        return responses
