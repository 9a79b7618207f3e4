"""The sum of a sequence's numbers so far; the first response of a sequence adds one."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        responses = []
        for request in requests:
            total, start, ready = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("INPUT", "START", "READY")
            )
            # A request that is not ready fills the place of a sequence that has nothing to say.
            if ready.all():
                key = request.correlation_id()
                total = total + (1 if start.all() else self.sums[key])
                self.sums[key] = total
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", total)]))
        return responses
