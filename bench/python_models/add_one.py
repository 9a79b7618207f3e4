"""One step of three: called by `three_calls.py`, and a step of the ensemble that it is compared with."""

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]


class TritonPythonModel:
    """``OUT`` is ``IN`` plus one."""

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "IN").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", values + 1)]) for values in inputs]
