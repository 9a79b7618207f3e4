"""The generate extension: a flat JSON object to a request, outputs to a flat JSON object, and event framing.

`ConvertGenerateRequest`, `ExactMappingInput` and `GenerateRequestClass` of Triton's http_server.cc: spec H-270..H-284.
HTTP frontend; pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forebay.frontend.codec.infer_request import (
    JsonData,
    Parameter,
    ParsedInfer,
    ParsedInput,
    check_json_size,
    custom_parameter,
    parse_request_id,
)
from forebay.frontend.codec.infer_response import OutputTensor
from forebay.frontend.codec.json_tensor import encode_leaves, render_json_data
from forebay.frontend.codec.rapid_json import Json, as_object, as_text, dump_json, parse_json, quote
from forebay.frontend.errors import error_body
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import Internal, InvalidArgument, ServingError, from_wire
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.validation import id_prefix

#: The key whose object is mapped like the top level and merged into it.
NESTED_KEY = "parameters"

#: Answered by generate (with status 200, spec H-276) unless the model sent exactly one response.
NOT_ONE_RESPONSE = (
    "generate expects model to produce exactly 1 response, "
    "use generate stream for model that generates various number of responses"
)

STREAM_TYPE = "text/event-stream; charset=utf-8"


def check_generate_encoding(content_encoding: str | None) -> None:
    """Raise InvalidArgument for a compressed request (spec H-145)."""
    if content_encoding not in (None, "", "identity"):
        raise InvalidArgument("Unsupported content-encoding, only 'identity' is supported.")


def parse_generate_request(entry: ModelEntry, body: bytes | memoryview, *, max_json_bytes: int) -> ParsedInfer:
    """Return the request in the body of ``generate`` or ``generate_stream`` (spec H-271..H-274).

    Keys that name an input become that tensor, all others custom parameters; ``id`` is both id and parameter.

    Raises:
        Internal: the JSON is malformed or a value has the wrong type.
        InvalidArgument: a value fits no input shape, or an input is given twice.
    """
    check_json_size(len(body), max_json_bytes)
    document = parse_json(body)
    mapping = _Mapping(entry, parse_request_id(document), max_json_bytes)
    mapping.read(document, is_nested=False)
    return ParsedInfer(inputs=tuple(mapping.inputs.values()), id=mapping.request_id, parameters=mapping.parameters)


class _Mapping:
    """Collects inputs and parameters from the top level and from the nested object."""

    def __init__(self, entry: ModelEntry, request_id: str, max_json_bytes: int) -> None:
        self._specs = {spec.name: spec for spec in entry.inputs}
        self._is_batched = entry.max_batch_size > 0
        self._max_json_bytes = max_json_bytes
        self.request_id = request_id
        self.inputs: dict[str, ParsedInput] = {}
        self.parameters: dict[str, Parameter] = {}

    def read(self, document: Json, *, is_nested: bool) -> None:
        if not isinstance(document, dict):
            raise Internal("attempt to get members for non-object")
        for key, value in document.items():
            if key == NESTED_KEY and not is_nested:
                self._read_nested(value)
            elif (spec := self._specs.get(key)) is not None:
                self._add_input(spec, value)
            else:
                self.parameters[as_text(key)] = custom_parameter(as_text(key), value)

    def _read_nested(self, value: Json) -> None:
        if NESTED_KEY in self._specs:
            raise InvalidArgument(f"Keyword '{NESTED_KEY}' for nested schema also given as input tensor name")
        try:
            members = as_object(value)
        except Internal as error:
            raise Internal(f"Expected JSON object for keyword: '{NESTED_KEY}': {error}") from None
        try:
            self.read(members, is_nested=True)
        except ServingError as error:
            raise from_wire(error.code, f"Converting keyword: '{NESTED_KEY}': {error}") from None

    def _add_input(self, spec: TensorSpec, value: Json) -> None:
        leaves: list[Json] = value if isinstance(value, list) else [value]
        shape = self._shape(spec, len(leaves))
        data = encode_leaves(spec.name, spec.datatype, leaves, len(leaves), max_bytes=self._max_json_bytes)
        if spec.name in self.inputs:
            raise InvalidArgument(f"{id_prefix(self.request_id)}input '{spec.name}' already exists in request")
        self.inputs[spec.name] = ParsedInput(spec.name, spec.datatype, shape, JsonData(data))

    def _shape(self, spec: TensorSpec, element_count: int) -> tuple[int, ...]:
        """Spread the elements over the fixed dimensions, the rest to the innermost open one (spec H-273)."""
        shape = [-1, *spec.dims] if self._is_batched else list(spec.dims)
        left = element_count
        for dim in shape:
            if dim != -1:
                if dim == 0 or left % dim:
                    raise self._shape_fault(spec)
                left //= dim
        for axis in reversed(range(len(shape))):
            if shape[axis] == -1:
                shape[axis], left = left, 1
        if left != 1:
            raise self._shape_fault(spec)
        return tuple(shape)

    @staticmethod
    def _shape_fault(spec: TensorSpec) -> InvalidArgument:
        return InvalidArgument(f"The schema can not convert input '{spec.name}' to tensor with proper shape")


def render_generate_reply(
    model_name: str,
    model_version: int,
    request_id: str,
    parameters: Mapping[str, Parameter],
    outputs: Sequence[OutputTensor],
) -> bytes:
    """Return one response as a flat JSON object, keys sorted; tensors of one element as scalars (spec H-275).

    Of equal keys the identity (``id``, ``model_name``, ``model_version``) wins over parameters, and those over tensors.

    Raises:
        InvalidArgument: an output is FP16 or BF16 (spec H-281).
        Internal: an output's bytes do not make up its shape.
    """
    members: dict[str, bytes] = {}
    for output in outputs:
        data = render_json_data(output.name, output.datatype, output.shape, output.data or b"")
        members[output.name] = data[1:-1] if _is_single(output.shape) else data
    for key, value in parameters.items():
        members[key] = dump_json(value)
    members["model_name"] = quote(model_name)
    members["model_version"] = b'"%d"' % model_version
    if request_id:
        members["id"] = quote(request_id)
    return b"{%s}" % b",".join(b"%s:%s" % (quote(key), members[key]) for key in sorted(members))


def _is_single(shape: Sequence[int]) -> bool:
    return all(dim == 1 for dim in shape)


def server_sent_event(payload: bytes) -> bytes:
    """Return one event of generate_stream (spec H-277)."""
    return b"data: %s\n\n" % payload


def error_event(error: ServingError) -> bytes:
    """Return an error as an event of generate_stream (spec H-278)."""
    return server_sent_event(error_body(error.text))
