"""As many responses as the input has numbers, each after a delay of its own, ms."""

import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            given, delays, wait = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy().ravel() for name in ("IN", "DELAY", "WAIT")
            )
            sender = request.get_response_sender()
            threading.Thread(target=self.answer, args=(sender, given.copy(), delays.copy())).start()
            time.sleep(int(wait[0]) / 1000)

    def answer(self, sender, given, delays):
        for index, (value, delay) in enumerate(zip(given, delays, strict=True)):
            time.sleep(int(delay) / 1000)
            outputs = [
                pb_utils.Tensor("OUT", np.array([value], np.int32)),
                pb_utils.Tensor("IDX", np.array([index], np.uint32)),
            ]
            sender.send(pb_utils.InferenceResponse(outputs))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
