"""From the bytes of ``POST .../infer`` to a typed request. HTTP frontend; no sockets, no clock, no state.

The order of checks and every text are Triton's: `EVBufferToInput` and `ParseJsonTritonIO` of http_server.cc
(spec H-060..H-080, H-110..H-119, H-130..H-134, H-150..H-157, H-197, H-198, H-203). What needs the model's signature
comes after, in `validation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import msgspec

from forebay.frontend.codec.json_tensor import encode_json_data
from forebay.frontend.codec.rapid_json import (
    Json,
    as_array,
    as_bool,
    as_text,
    as_uint,
    has,
    is_int64,
    member,
    parse_json,
    to_double,
)
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import Internal, InvalidArgument
from forebay.ipc.tensor import DATATYPES, MAX_ELEMENT_COUNT
from forebay.ipc.validation import id_prefix

T = TypeVar("T")

#: A custom request parameter's value.
Parameter: TypeAlias = bool | int | float | str

#: How Triton calls the only input of a raw binary request in its byte size error (spec H-132).
RAW_INPUT_NAME = "raw_input"


class JsonData(msgspec.Struct, frozen=True):
    """The tensor came as JSON; these are its bytes, C order, BYTES with length prefixes."""

    data: bytes

    @property
    def byte_size(self) -> int:
        return len(self.data)


class BinaryData(msgspec.Struct, frozen=True):
    """The tensor's bytes lie in the request body."""

    offset: int
    """Bytes from the start of the body."""
    body_bytes: int
    """How many of the body's bytes are the tensor's."""
    prefix: bytes = b""
    """Bytes of the tensor that go before those of the body: the length of a raw BYTES element (spec H-133)."""

    @property
    def byte_size(self) -> int:
        """Bytes of the tensor."""
        return len(self.prefix) + self.body_bytes


class RegionData(msgspec.Struct, frozen=True):
    """The tensor lies, or shall lie, in a region that the client registered. Nothing here is checked yet."""

    region: str
    byte_size: int
    offset: int


Source: TypeAlias = JsonData | BinaryData | RegionData


class ParsedInput(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    """Protocol name as sent; perhaps none that we know."""
    shape: tuple[int, ...]
    """As sent, batch dimension included."""
    source: Source


class ParsedOutput(msgspec.Struct, frozen=True):
    name: str
    binary: bool = False
    classification: int = 0
    """How many classes to return; 0: the tensor itself (spec H-170)."""
    region: RegionData | None = None


class ParsedInfer(msgspec.Struct, frozen=True):
    """One inference request as the client wrote it."""

    inputs: tuple[ParsedInput, ...]
    outputs: tuple[ParsedOutput, ...] = ()
    """Requested outputs in the client's order, each name once; empty: all of the model's (spec H-094)."""
    id: str = ""
    sequence_id: int | str = 0
    """0 or empty: no sequence (spec H-150)."""
    sequence_start: bool = False
    sequence_end: bool = False
    priority: int = 0
    timeout_us: int = 0
    binary_data_output: bool = False
    """Whether outputs come back binary when none are listed (spec H-119)."""
    parameters: dict[str, Parameter] = {}
    """Custom parameters, in the client's order."""
    is_raw: bool = False
    """The body was nothing but one tensor (spec H-130)."""

    def is_bare(self, entry: ModelEntry) -> bool:
        """Tell whether a model that looks at requests finds nothing in this one but its tensors."""
        return (
            not (self.id or self.parameters or self.timeout_us)
            and not (self.sequence_id or self.sequence_start or self.sequence_end)
            and len(self.outputs) in (0, len(entry.outputs))
        )

    def output_plan(self, entry: ModelEntry) -> tuple[ParsedOutput, ...]:
        """Return how to answer each output, in the model's order (spec H-094, H-095)."""
        if not self.outputs:
            return tuple(ParsedOutput(spec.name, binary=self.binary_data_output) for spec in entry.outputs)
        wanted = {output.name: output for output in self.outputs}
        return tuple(wanted[spec.name] for spec in entry.outputs if spec.name in wanted)


_HEADER_NUMBER = re.compile(r"[ \t]*([+-]?)([0-9]+)[ \t]*")


def parse_header_length(text: str | None, body_bytes: int) -> int:
    """Return how many bytes of the (decompressed) body are JSON; 0 means a raw binary request.

    Args:
        text: value of ``Inference-Header-Content-Length``, or None without that header: all is JSON (spec H-110).

    Raises:
        InvalidArgument: no number (H-111) or outside of the body (H-112).
    """
    if text is None:
        return body_bytes
    number = _HEADER_NUMBER.fullmatch(text)
    if number is None:
        raise InvalidArgument(f"Unable to parse Inference-Header-Content-Length, got: {text}")
    sign, digits = number.group(1), number.group(2).lstrip("0") or "0"
    length = int(digits) if len(digits) < 19 else MAX_ELEMENT_COUNT
    if length > body_bytes or (sign == "-" and length):
        raise InvalidArgument(f"inference header size should be in range (0, {body_bytes}), got: {text}")
    return length


def decode_infer_request(
    entry: ModelEntry, body: bytes | memoryview, json_bytes: int, *, max_json_bytes: int
) -> ParsedInfer:
    """Return the request in a body, JSON with or without binary tensors, or raw.

    Args:
        entry: the model that is asked; only its name and its inputs are used.
        body: the whole body, decompressed. The result holds no reference to it.
        json_bytes: how much of it is JSON, see :func:`parse_header_length`; 0: the body is raw.
        max_json_bytes: ``--http-max-input-size`` (spec H-013).
    """
    if json_bytes == 0:
        return raw_infer_request(entry, len(body), max_json_bytes=max_json_bytes)
    return parse_infer_request(body, json_bytes, model_name=entry.name, max_json_bytes=max_json_bytes)


def parse_infer_request(
    body: bytes | memoryview,
    header_length: int | None,
    *,
    model_name: str,
    max_json_bytes: int,
    body_bytes: int | None = None,
) -> ParsedInfer:
    """Return the request whose JSON is the first ``header_length`` bytes (None: all) of ``body``.

    Args:
        body_bytes: bytes of the whole body if ``body`` is only its beginning, the JSON included.

    Raises:
        Internal: the JSON is malformed or a member has the wrong type (spec H-002: 500).
        InvalidArgument: any other fault of the request.
    """
    json_bytes = len(body) if header_length is None else header_length
    check_json_size(json_bytes, max_json_bytes)
    document = parse_json(body[:json_bytes] if json_bytes < len(body) else body)
    request_id = parse_request_id(document)
    fields = _parse_parameters(document)
    cursor = _BodyCursor(model_name, json_bytes, len(body) if body_bytes is None else body_bytes)
    inputs = _parse_inputs(document, request_id, cursor, max_json_bytes)
    return ParsedInfer(
        inputs=inputs,
        outputs=_parse_outputs(document),
        id=request_id,
        sequence_id=fields.sequence_id,
        sequence_start=fields.sequence_start,
        sequence_end=fields.sequence_end,
        priority=fields.priority,
        timeout_us=fields.timeout_us,
        binary_data_output=fields.binary_data_output,
        parameters=fields.custom,
    )


def raw_infer_request(entry: ModelEntry, body_bytes: int, *, max_json_bytes: int | None = None) -> ParsedInfer:
    """Return the request of a body that is nothing but the data of the model's only input (spec H-130..H-134).

    Raises:
        InvalidArgument: the model's signature leaves more than one reading.
    """
    if max_json_bytes is not None and body_bytes > max_json_bytes:
        raise InvalidArgument(
            f"raw request size of {body_bytes} bytes exceeds the maximum allowed input size of {max_json_bytes} bytes. "
            "Use --http-max-input-size to increase the limit."
        )
    prefix = id_prefix("")
    if len(entry.inputs) != 1:
        raise InvalidArgument(
            f"{prefix}Raw request must only have 1 input (found 1) to be deduced but got {len(entry.inputs)} inputs "
            f"in '{entry.name}' model configuration"
        )
    spec = entry.inputs[0]
    dims = list(spec.dims)
    if dims.count(-1) > 1:
        raise InvalidArgument(
            f"{prefix}The shape of the raw input '{spec.name}' can not be deduced because there are more than one "
            "variable-sized dimension"
        )
    fixed_count = 1
    for dim in dims:
        fixed_count *= 1 if dim == -1 else dim
    length = b""
    if spec.datatype == "BYTES":
        if -1 in dims or fixed_count != 1:
            raise InvalidArgument(
                f"{prefix}For BYTE datatype raw input '{spec.name}', the model must have input shape [1]"
            )
        length = (body_bytes & 0xFFFFFFFF).to_bytes(4, "little")
    elif -1 in dims:
        row_bytes = fixed_count * DATATYPES[spec.datatype].item_bytes
        dims[dims.index(-1)] = body_bytes // row_bytes if row_bytes else 0
    shape = (1, *dims) if entry.max_batch_size > 0 else tuple(dims)
    source = BinaryData(offset=0, body_bytes=body_bytes, prefix=length)
    return ParsedInfer(
        inputs=(ParsedInput(spec.name, spec.datatype, shape, source),), binary_data_output=True, is_raw=True
    )


def check_json_size(json_bytes: int, max_json_bytes: int) -> None:
    """Raise InvalidArgument for JSON beyond ``--http-max-input-size`` (spec H-013)."""
    if json_bytes > max_json_bytes:
        raise InvalidArgument(
            f"request JSON size of {json_bytes} bytes exceeds the maximum allowed input size of {max_json_bytes} "
            "bytes. Use --http-max-input-size to increase the limit."
        )


def parsed(access: Callable[[Json], T], value: Json, key: str) -> T:
    """Return ``access(value)``; a type error names the key it was found under."""
    try:
        return access(value)
    except Internal as error:
        raise Internal(f"Unable to parse '{key}': {error}") from None


def parse_request_id(document: Json) -> str:
    """Return the member ``id``, or an empty string; it ends at a NUL, as strings of C do."""
    return parsed(as_text, member(document, "id"), "id").partition("\0")[0] if has(document, "id") else ""


def custom_parameter(key: str, value: Json) -> Parameter:
    """Return a custom parameter's value: string, 64-bit integer, bool, or any other number as a double (spec H-156)."""
    if isinstance(value, str):
        return as_text(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return value if is_int64(value) else to_double(value)
    raise InvalidArgument(f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string'.")


class _Fields(msgspec.Struct):
    """The request's `parameters` while they are read."""

    sequence_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    priority: int = 0
    timeout_us: int = 0
    binary_data_output: bool = False
    custom: dict[str, Parameter] = {}


def _parse_parameters(document: Json) -> _Fields:
    fields = _Fields()
    if not has(document, "parameters"):
        return fields
    members = member(document, "parameters")
    if not isinstance(members, dict):
        raise Internal("failed to get request params.: attempt to get members for non-object")
    for key, value in members.items():
        match key:
            case "sequence_id":
                fields.sequence_id = parsed(_sequence_id, value, key)
            case "sequence_start":
                fields.sequence_start = parsed(as_bool, value, key)
            case "sequence_end":
                fields.sequence_end = parsed(as_bool, value, key)
            case "priority":
                fields.priority = parsed(as_uint, value, key)
            case "timeout":
                fields.timeout_us = parsed(as_uint, value, key)
            case "binary_data_output":
                fields.binary_data_output = parsed(as_bool, value, key)
            case _ if key.startswith("triton_"):
                raise InvalidArgument(
                    "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."
                )
            case _:
                fields.custom[as_text(key)] = custom_parameter(as_text(key), value)
    return fields


def _sequence_id(value: Json) -> int | str:
    try:
        return as_uint(value)
    except Internal:
        return as_text(value)


class _BodyCursor:
    """Walks over the binary tensors behind the JSON, in the order of the inputs (spec H-110)."""

    def __init__(self, model_name: str, json_bytes: int, body_bytes: int) -> None:
        self._model_name = model_name
        self._at = json_bytes
        self._end = body_bytes

    def take(self, input_name: str, byte_size: int) -> BinaryData:
        left = self._end - self._at
        if byte_size > left:
            raise InvalidArgument(
                f"unexpected size for input '{input_name}', expecting {byte_size - left} additional bytes "
                f"for model '{self._model_name}'"
            )
        self._at += byte_size
        return BinaryData(offset=self._at - byte_size, body_bytes=byte_size)

    def finish(self) -> None:
        if self._at != self._end:
            raise InvalidArgument(f"unexpected additional input data for model '{self._model_name}'")


def _parse_inputs(document: Json, request_id: str, cursor: _BodyCursor, max_json_bytes: int) -> tuple[ParsedInput, ...]:
    inputs: dict[str, ParsedInput] = {}
    for item in parsed(lambda value: as_array(member(value, "inputs")), document, "inputs"):
        parameters = member(item, "parameters") if has(item, "parameters") else None
        _check_one_source(item, parameters)
        name = parsed(lambda value: as_text(member(value, "name")), item, "name")
        datatype = parsed(lambda value: as_text(member(value, "datatype")), item, "datatype")
        shape = parsed(_parse_shape, item, "shape")
        if any(dim > MAX_ELEMENT_COUNT for dim in shape):
            raise InvalidArgument(f"Input '{name}' contains one or more invalid dimensions")
        if name in inputs:
            raise InvalidArgument(f"{id_prefix(request_id)}input '{name}' already exists in request")
        source: Source
        if has(parameters, "binary_data_size"):
            key = "binary_data_size"
            source = cursor.take(name, parsed(as_uint, member(parameters, key), key))
        elif (region := _parse_region(parameters)) is not None:
            source = region
        else:
            data = member(item, "data")
            source = JsonData(encode_json_data(name, datatype, shape, data, max_bytes=max_json_bytes))
        inputs[name] = ParsedInput(name, datatype, shape, source)
    cursor.finish()
    return tuple(inputs.values())


def _parse_shape(item: Json) -> tuple[int, ...]:
    return tuple(as_uint(dim) for dim in as_array(member(item, "shape")))


def _check_one_source(item: Json, parameters: Json) -> None:
    """Raise unless exactly one of the three ways to give data is used (spec H-070)."""
    found = [key for key in ("data",) if has(item, key)]
    found += [key for key in ("binary_data_size", "shared_memory_region") if has(parameters, key)]
    if len(found) != 1:
        fault = "set " + " ".join(f"'{key}'" for key in found) if found else "no field is set"
        raise InvalidArgument(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'shared_memory_region' in 'parameters'. But {fault}"
        )


def _parse_region(parameters: Json) -> RegionData | None:
    """Return the region named in an input's or output's parameters, or None (spec H-197, H-198)."""
    key = "shared_memory_region"
    region = parsed(as_text, member(parameters, key), key) if has(parameters, key) else None
    offset, byte_size = (
        parsed(as_uint, member(parameters, key), key) if has(parameters, key) else 0
        for key in ("shared_memory_offset", "shared_memory_byte_size")
    )
    return None if region is None else RegionData(region=region, offset=offset, byte_size=byte_size)


def _parse_outputs(document: Json) -> tuple[ParsedOutput, ...]:
    """Return the requested outputs; of equal names the first counts (spec H-081)."""
    outputs: dict[str, ParsedOutput] = {}
    if not has(document, "outputs"):
        return ()
    for item in parsed(lambda value: as_array(member(value, "outputs")), document, "outputs"):
        parameters = member(item, "parameters") if has(item, "parameters") else None
        _check_output_conflicts(parameters)
        name = parsed(lambda value: as_text(member(value, "name")), item, "name")
        classification = 0
        if has(parameters, "classification"):
            classification = _set(as_uint, member(parameters, "classification"), "classification")
        binary = False
        if has(parameters, "binary_data"):
            binary = parsed(as_bool, member(parameters, "binary_data"), "binary_data")
        outputs.setdefault(name, ParsedOutput(name, binary, classification, _parse_region(parameters)))
    return tuple(outputs.values())


def _check_output_conflicts(parameters: Json) -> None:
    """Raise if a region is combined with what cannot go there (spec H-175, H-203)."""
    if not has(parameters, "shared_memory_region"):
        return
    if has(parameters, "classification"):
        raise InvalidArgument("Output can't set both 'shared_memory_region' and 'classification'")
    if has(parameters, "binary_data") and _set(as_bool, member(parameters, "binary_data"), "binary_data"):
        raise InvalidArgument("Output can't set both 'shared_memory_region' and 'binary_data'")


def _set(access: Callable[[Json], T], value: Json, key: str) -> T:
    """As :func:`parsed`, with the other verb that Triton uses in two places."""
    try:
        return access(value)
    except Internal as error:
        raise Internal(f"Unable to set '{key}': {error}") from None
