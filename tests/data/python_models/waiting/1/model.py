"""An ``async def execute``: a request ends when as many as PARTY says are there, so only together can they finish."""

import asyncio

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.present = 0
        self.complete = None

    async def execute(self, requests):
        if self.complete is None:
            self.complete = asyncio.Event()
        party = int(pb_utils.get_input_tensor_by_name(requests[0], "PARTY").as_numpy()[0])
        if party < 0:
            raise ValueError("no such party")
        self.present += len(requests)
        if self.present >= party:
            self.complete.set()
        await asyncio.wait_for(self.complete.wait(), 30)
        tensor = pb_utils.Tensor("PRESENT", np.array([self.present], np.int32))
        return [pb_utils.InferenceResponse([tensor]) for _request in requests]
