"""Does what the input ASK says and answers in TEXT; used to look at every part of the model API."""

import json
import os
import sys
import time

import helper
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.args = args
        self.family = pb_utils.MetricFamily("probe_total", "asked", pb_utils.MetricFamily.COUNTER)
        self.metric = self.family.Metric(labels={"model": args["model_name"]})
        try:
            pb_utils.InferenceRequest(model_name="x").exec()
        except pb_utils.TritonModelException as error:
            self.early = str(error)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        ask = pb_utils.get_input_tensor_by_name(request, "ASK")
        if ask is None:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("no ASK", pb_utils.TritonError.INVALID_ARG))
        self.metric.increment(1)
        word = ask.as_numpy().reshape(-1)[0].decode()
        text = getattr(self, word)(request)
        if isinstance(text, pb_utils.InferenceResponse):
            return text
        return pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", np.array([json.dumps(text)], object))])

    def arguments(self, request):
        return self.args | {"early": self.early, "factor": helper.FACTOR, "dir": pb_utils.get_model_dir()}

    def request(self, request):
        return {
            "id": request.request_id(),
            "correlation": request.correlation_id(),
            "flags": request.flags(),
            "timeout": request.timeout(),
            "parameters": request.parameters(),
            "outputs": sorted(request.requested_output_names()),
            "is_set": isinstance(request.requested_output_names(), set),
            "inputs": [[t.name(), t.shape(), t.triton_dtype(), t.is_cpu()] for t in request.inputs()],
            "trace": request.trace().get_context(),
            "cancelled": request.is_cancelled(),
            "missing": pb_utils.get_input_tensor_by_name(request, "NOPE"),
        }

    def copy(self, request):
        data = pb_utils.get_input_tensor_by_name(request, "DATA").as_numpy()
        out = pb_utils.empty(request, data.shape, np.float32)
        np.multiply(data, helper.FACTOR, out=out)
        return pb_utils.InferenceResponse([pb_utils.Tensor("DOUBLE", out)])

    def large(self, request):
        return pb_utils.InferenceResponse([pb_utils.Tensor("DOUBLE", np.arange(200_000, dtype=np.float32))])

    def rigid(self, request):
        return pb_utils.InferenceResponse([pb_utils.Tensor("DOUBLE", np.arange(12, dtype=np.float32)[::2])])

    def again(self, request):
        self.rounds = getattr(self, "rounds", 0) + 1
        if self.rounds < 3:
            request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            return None
        return self.rounds

    def sender(self, request):
        sender = request.get_response_sender()
        found = []
        for response, flags in ((None, 0), (None, 7), (None, 1)):
            try:
                sender.send(response, flags)
            except pb_utils.TritonModelException as error:
                found.append(str(error))
        answer = pb_utils.Tensor("TEXT", np.array([json.dumps(found)], object))
        sender.send(pb_utils.InferenceResponse([answer]))
        self.late = []
        for response, flags in ((pb_utils.InferenceResponse([answer]), 0), (None, 1), (None, 1)):
            try:
                sender.send(response, flags)
            except pb_utils.TritonModelException as error:
                self.late.append(str(error))
        return None

    def late_errors(self, request):
        return self.late

    def wait_for_cancel(self, request):
        give_up = time.monotonic() + 30
        while not request.is_cancelled() and time.monotonic() < give_up:
            time.sleep(0.01)
        return request.is_cancelled()

    def log(self, request):
        pb_utils.Logger.log_info("an information")
        pb_utils.Logger.log_warn("a warning")
        pb_utils.Logger.log_error("an error")
        pb_utils.Logger.log_verbose("nothing to see")
        pb_utils.Logger.log("by level", pb_utils.Logger.WARNING)
        print("printed")
        sys.stdout.flush()
        return os.getpid()

    def nested_failure(self, request):
        def inner():
            return np.zeros(3).reshape(2, 2)

        return inner()

    def finalize(self):
        path = self.args["model_config"] and os.environ.get("PROBE_FINALIZED", "")
        if path:
            with open(path, "w") as file:
                file.write("finalized")
