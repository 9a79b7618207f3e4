"""Answers IN = n with n responses n, the last one final: Triton's square example. -1: forgets to answer."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            n = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0])
            sender = request.get_response_sender()
            if n == -2:
                return []
            if n == -1:
                continue
            for index in range(n):
                flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if index == n - 1 else 0
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([n], np.int32))]), flags)
            if n == 0:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None
