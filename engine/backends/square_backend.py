"""The square backend: as many responses as IN says, each of them IN (spec B-083). For tests of streams.

As Triton's ``square_backend``: input IN and output OUT, both INT32 [1]; models may batch, each request has one row.
Parameters, all of them numbers of which others than whole ones count as 0: ``CUSTOM_INFER_DELAY_NS`` and
``CUSTOM_OUTPUT_DELAY_NS`` before each response, ``CUSTOM_FAIL_COUNT`` responses that are errors and
``CUSTOM_EMPTY_COUNT`` that are not sent, at the end of each request and in this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from forebay.engine.backends.base import Backend, RequestInstance
from forebay.engine.backends.tensor_rules import check_count, check_decoupled, check_tensor
from forebay.engine.backends.timed_responses import Script, TimedResponses
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.ipc.errors import InvalidArgument, ServingError
from forebay.ipc.worker_messages import InstanceSpec


def check_config(spec: InstanceSpec) -> None:
    """Compare a configuration with what the backend can do.

    Raises:
        InvalidArgument: with Triton's texts.
    """
    check_count("input", spec.inputs, 1)
    check_count("output", spec.outputs, 1)
    (source,), (target,) = spec.inputs, spec.outputs
    if source.name != "IN":
        raise InvalidArgument(f"expected first input tensor name to be IN, got {source.name}")
    if target.name != "OUT":
        raise InvalidArgument(f"expected first output tensor name to be OUT, got {target.name}")
    for tensor in (source, target):
        check_tensor(tensor, dims=(1,))
    for tensor in (source, target):
        check_tensor(tensor, datatype="INT32")
    check_decoupled(spec)


def _whole_number(parameters: Mapping[str, str], key: str) -> int:
    text = parameters.get(key, "")
    return int(text) if text.isascii() and text.isdigit() else 0


class SquareInstance(RequestInstance):
    """Answers from a thread, and takes the next request at once."""

    def __init__(self, spec: InstanceSpec) -> None:
        check_config(spec)
        parameters = spec.parameters
        delay_ns = sum(_whole_number(parameters, f"CUSTOM_{kind}_DELAY_NS") for kind in ("INFER", "OUTPUT"))
        self._delay_s = delay_ns / 1e9
        self._fail_count = _whole_number(parameters, "CUSTOM_FAIL_COUNT")
        self._empty_count = _whole_number(parameters, "CUSTOM_EMPTY_COUNT")
        self._responses = TimedResponses()

    def execute(self, requests: Sequence[ParcelRequest]) -> None:
        for request in requests:
            try:
                self._begin(request)
            except ServingError as error:
                request.fail(error)

    def _begin(self, request: ParcelRequest) -> None:
        source = request.input_arrays()["IN"]
        if source.size != 1:
            raise InvalidArgument("unexpected shape for IN input")
        self._responses.start(request, self._repeat(request, int(source.flat[0]), source.shape))

    def _repeat(self, request: ParcelRequest, count: int, shape: tuple[int, ...]) -> Script:
        """Send the responses of one request."""
        outputs = {name: ("INT32", np.full(shape, count, np.int32)) for name in request.requested_outputs}
        for index in range(count):
            yield self._delay_s
            left = count - index
            if left > self._fail_count + self._empty_count:
                request.reply(outputs, final=False)
            elif left > self._empty_count:
                request.fail(ServingError("simulated failure"), final=False)

    def close(self) -> None:
        self._responses.wait_done()


class SquareBackend(Backend):
    """``backend: "square"``."""

    def load(self, spec: InstanceSpec) -> SquareInstance:
        return SquareInstance(spec)


BACKEND = SquareBackend
