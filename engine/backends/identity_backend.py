"""The identity backend: every OUTPUT<i> is INPUT<i> (spec B-082). For tests, ours and Triton's."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

from forebay.engine.backends.base import Backend, ParameterValue, RequestInstance, parse_int
from forebay.engine.backends.python_model.metrics import COUNTER, registry
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.pending_response import RawTensor
from forebay.ipc.errors import Internal, InvalidArgument, ServingError
from forebay.ipc.tensor import shape_text
from forebay.ipc.validation import id_prefix
from forebay.ipc.worker_messages import InstanceSpec

#: What every response carries (spec B-082, E-105).
RESPONSE_PARAMETERS: Mapping[str, ParameterValue] = {
    "param0": "an example string parameter",
    "param1": 42,
    "param2": False,
    "param3": 123.123,
}


def check_pairs(spec: InstanceSpec) -> dict[str, str]:
    """Return output name to input name.

    Raises:
        InvalidArgument: with Triton's texts.
    """
    if len(spec.inputs) != len(spec.outputs):
        raise InvalidArgument("model configuration must have equal input/output pairs")
    inputs = {_index(tensor.name, "input", "INPUT"): tensor for tensor in spec.inputs}
    pairs: dict[str, str] = {}
    for output in spec.outputs:
        source = inputs.get(_index(output.name, "output", "OUTPUT"))
        if source is None:
            raise InvalidArgument("model configuration must have equal input/output pairs")
        if source.datatype != output.datatype:
            raise InvalidArgument(
                f"expected input and output datatype to match, got {source.datatype} and {output.datatype}"
            )
        if source.dims != output.dims:
            raise InvalidArgument(
                f"expected input and output shape to match, got {shape_text(source.dims)} and {shape_text(output.dims)}"
            )
        pairs[output.name] = source.name
    return pairs


def _index(name: str, kind: str, prefix: str) -> int:
    found = re.fullmatch(rf"{prefix}(\d+)", name)
    if found is None:
        raise InvalidArgument(f"expected {kind} name to follow {prefix}<index> pattern, got '{name}'")
    return int(found.group(1))


class IdentityInstance(RequestInstance):
    """Copies each input from the request's block to the reply's."""

    def __init__(self, spec: InstanceSpec) -> None:
        self._pairs = check_pairs(spec)
        delay_ms = max(parse_int(spec.parameters, "execute_delay_ms", 0), 0)
        multiplier = parse_int(spec.parameters, "instance_wise_delay_multiplier", 0)
        number = spec.instance_name.rpartition("_")[2]
        self._delay_s = delay_ms * max(multiplier * int(number if number.isdigit() else 0), 1) / 1000
        family = registry.family(
            "input_byte_size_counter", "Cumulative input byte size of all requests received by the model", COUNTER
        )
        self._input_bytes = registry.metric(family, {"model": spec.model, "version": str(spec.version)}, ())

    def execute(self, requests: Sequence[ParcelRequest]) -> None:
        if self._delay_s:
            time.sleep(self._delay_s)
        for request in requests:
            try:
                self._answer(request)
            except ServingError as error:
                request.fail(error)

    def _answer(self, request: ParcelRequest) -> None:
        if isinstance(request.head.correlation_id, str):
            raise InvalidArgument(f"{id_prefix(request.head.id)}correlation ID in request is not an unsigned int")
        inputs = {place.name: place for place in request.head.inputs}
        tensors: list[RawTensor] = []
        for name in request.requested_outputs:
            place = inputs.get(self._pairs[name])
            if place is None:
                # Triton's words for an output whose optional input is absent (spec E-034).
                request.fail(Internal("failed to reserve 18446744073709551615 bytes in output tensor buffer"))
                return
            tensors.append(RawTensor(name, place.datatype, place.shape, request.input_buffer(place)))
        self._input_bytes.increment(sum(place.byte_size for place in inputs.values()))
        request.reply_raw(tensors, RESPONSE_PARAMETERS)


class IdentityBackend(Backend):
    """``backend: "identity"``."""

    def load(self, spec: InstanceSpec) -> IdentityInstance:
        return IdentityInstance(spec)


BACKEND = IdentityBackend
