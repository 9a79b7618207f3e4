"""The identity as a model of forebay writes it: into memory that the answer is sent from (``pb_utils.empty``)."""

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]


class TritonPythonModel:
    """``OUT`` has the values of ``IN``; the one pass over them is the model's work, not the server's."""

    def execute(self, requests):
        responses = []
        for request in requests:
            values = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            answer = pb_utils.empty(request, values.shape, values.dtype)
            np.copyto(answer, values)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", answer)]))
        return responses
