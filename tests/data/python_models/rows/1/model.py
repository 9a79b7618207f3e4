"""Small and fixed, so that its requests lie in slab rows. The first value of IN says what happens to a request."""

import sys
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request, len(requests)) for request in requests]

    def answer(self, request, batch):
        given = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
        about = self.about(request, batch, len(given))
        match int(given[0, 0]):
            case -1:
                return pb_utils.InferenceResponse(
                    error=pb_utils.TritonError("not this one", pb_utils.TritonError.NOT_FOUND)
                )
            case -2:
                raise ValueError("bad thing")
            case -11:
                sys.exit(4)
            case -3:
                return self.response(given[:, :2], about)
            case -4:
                return self.response(given.astype(np.float64), about)
            case -5:
                return pb_utils.InferenceResponse([pb_utils.Tensor("ABOUT", about)])
            case -6:
                return self.response(given, about, {"seen": 1, "by": "rows"})
            case -7:
                doubled = pb_utils.empty(request, given.shape, np.float32)
                np.multiply(given, 2, out=doubled)
                return self.response(doubled, about)
            case -8:
                # Not by its name, which would make all requests parcels.
                sender = getattr(request, "_".join(("get", "response", "sender")))()
                threading.Thread(target=self.answer_late, args=(sender, given.copy(), about)).start()
                return None
            case -9:
                while not request.is_cancelled():
                    time.sleep(0.001)
            case -10:
                given.shape = (4, len(given))
        return self.response(given * 2, about)

    def about(self, request, batch, rows):
        bare = (
            request.request_id() == ""
            and request.parameters() == "{}"
            and request.correlation_id() == 0
            and request.flags() == 0
            and request.timeout() == 0
            and request.requested_output_names() == {"OUT", "ABOUT"}
            and request.trace().get_context() is None
        )
        return np.tile(np.array([[batch, rows, bare]], np.int32), (rows, 1))

    def response(self, out, about, parameters=None):
        tensors = [pb_utils.Tensor("OUT", out), pb_utils.Tensor("ABOUT", about)]
        return pb_utils.InferenceResponse(tensors, parameters=parameters)

    def answer_late(self, sender, given, about):
        time.sleep(0.05)
        sender.send(self.response(given * 2, about), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
