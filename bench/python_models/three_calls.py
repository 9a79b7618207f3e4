"""Business logic scripting: a model that calls ``add_one`` three times, each time with the last answer."""

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]


class TritonPythonModel:
    """``OUT`` is ``IN`` plus three."""

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        values = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
        for _ in range(3):
            call = pb_utils.InferenceRequest(
                model_name="add_one", requested_output_names=["OUT"], inputs=[pb_utils.Tensor("IN", values)]
            )
            answer = call.exec()
            if answer.has_error():
                raise pb_utils.TritonModelException(answer.error().message())
            values = pb_utils.get_output_tensor_by_name(answer, "OUT").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", values)])
