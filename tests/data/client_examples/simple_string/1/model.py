"""The sum and the difference of two tensors whose numbers are written as texts."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            first, second = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy().astype(np.int32)
                for name in ("INPUT0", "INPUT1")
            )
            results = {"OUTPUT0": first + second, "OUTPUT1": first - second}
            outputs = [
                pb_utils.Tensor(
                    name,
                    np.array([str(value).encode() for value in result.ravel()], dtype=np.object_).reshape(result.shape),
                )
                for name, result in results.items()
            ]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
