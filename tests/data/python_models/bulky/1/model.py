"""Sends IN = n responses of 40 kB each from a thread, writing into the same array again and again."""

import threading

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.run, args=(request,), daemon=True).start()

    def run(self, request):
        sender = request.get_response_sender()
        array = np.zeros(10_000, np.int32)
        for index in range(int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0])):
            array[:] = index
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", array)]))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
