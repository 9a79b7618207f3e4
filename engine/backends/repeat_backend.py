"""The repeat backend: a response for each element of IN, each after its DELAY (spec B-083). For tests of streams.

As Triton's ``repeat_backend``: inputs IN (INT32, one dimension), DELAY (UINT32, milliseconds, as many) and WAIT
(UINT32 [1], milliseconds until the instance takes the next request); outputs OUT (INT32 [1], the element) and IDX
(UINT32 [1], its number from 0).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from forebay.engine.backends.base import Array, Backend, RequestInstance
from forebay.engine.backends.tensor_rules import check_count, check_decoupled, check_tensor
from forebay.engine.backends.timed_responses import Script, TimedResponses
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.ipc.errors import InvalidArgument, ServingError
from forebay.ipc.tensor import shape_text
from forebay.ipc.worker_messages import InstanceSpec


def check_config(spec: InstanceSpec) -> None:
    """Compare a configuration with what the backend can do.

    Raises:
        InvalidArgument: with Triton's texts.
    """
    if spec.max_batch_size != 0:
        raise InvalidArgument("repeat backend only supports models with max_batch_size == 0")
    check_count("inputs", spec.inputs, 3)
    check_count("outputs", spec.outputs, 2)
    values, delays, wait = spec.inputs
    out, index = spec.outputs
    named = (
        (values, "first input", "IN"),
        (delays, "second input", "DELAY"),
        (wait, "third input", "WAIT"),
        (out, "first output", "OUT"),
        (index, "second output", "IDX"),
    )
    for tensor, place, name in named:
        if tensor.name != name:
            raise InvalidArgument(f"expected {place} tensor name to be {name}, got {tensor.name}")
    if len(values.dims) != 1:
        raise InvalidArgument(f"expected IN shape to have one dimension, got {shape_text(values.dims)}")
    _check_same_shape(values.dims, delays.dims)
    for tensor in (wait, out, index):
        check_tensor(tensor, dims=(1,))
    for tensor, datatype in zip((values, delays, wait, out, index), _DATATYPES, strict=True):
        check_tensor(tensor, datatype=datatype)
    check_decoupled(spec)


_DATATYPES = ("INT32", "UINT32", "UINT32", "INT32", "UINT32")


def _check_same_shape(values: tuple[int, ...], delays: tuple[int, ...]) -> None:
    if values != delays:
        raise InvalidArgument(
            f"expected IN and DELAY shape to match, got {shape_text(values)} and {shape_text(delays)}"
        )


class RepeatInstance(RequestInstance):
    """Answers from a thread; is busy for as long as WAIT says."""

    def __init__(self, spec: InstanceSpec) -> None:
        check_config(spec)
        self._responses = TimedResponses()

    def execute(self, requests: Sequence[ParcelRequest]) -> None:
        wait_ms = 0
        for request in requests:
            try:
                wait_ms = max(wait_ms, self._begin(request))
            except ServingError as error:
                request.fail(error)
        time.sleep(wait_ms / 1000)

    def _begin(self, request: ParcelRequest) -> int:
        """Start to answer; return WAIT, ms."""
        inputs = request.input_arrays()
        _check_same_shape(inputs["IN"].shape, inputs["DELAY"].shape)
        wait_ms = int(inputs["WAIT"][0])
        self._responses.start(request, _repeat(request, inputs["IN"].copy(), inputs["DELAY"].copy()))
        return wait_ms

    def close(self) -> None:
        self._responses.wait_done()


def _repeat(request: ParcelRequest, values: Array, delays_ms: Array) -> Script:
    """Send the responses of one request."""
    wanted = request.requested_outputs
    for index in range(len(values)):
        yield int(delays_ms[index]) / 1000
        outputs = {"OUT": ("INT32", values[index : index + 1]), "IDX": ("UINT32", np.array([index], np.uint32))}
        request.reply({name: outputs[name] for name in wanted}, final=False)


class RepeatBackend(Backend):
    """``backend: "repeat"``."""

    def load(self, spec: InstanceSpec) -> RepeatInstance:
        return RepeatInstance(spec)


BACKEND = RepeatBackend
