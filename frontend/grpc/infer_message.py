"""From the bytes of a ``ModelInferRequest`` to a typed request: walked, not built as objects. Pure.

The order of checks and every text are Triton's: `SetInferenceRequestMetadata`, `InferGRPCToInput` and
`InferAllocatorPayload` of its src/grpc/infer_handler.cc (spec G-030..G-051). What needs the model's signature comes
after, in `frontend/codec/validation.py`.
"""

from __future__ import annotations

import enum
import struct

import msgspec
import numpy as np
import numpy.typing as npt

from forebay.frontend.codec.infer_request import (
    BinaryData,
    JsonData,
    Parameter,
    ParsedInfer,
    ParsedInput,
    ParsedOutput,
    RegionData,
    Source,
)
from forebay.frontend.codec.json_tensor import frame_element
from forebay.frontend.grpc.wire import (
    FIXED32,
    FIXED64,
    LENGTH,
    VARINT,
    Malformed,
    fields,
    read_varint,
    signed,
    text,
    unpack_varints,
)
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.validation import id_prefix

#: Inputs, outputs, parameters of one message, each; far above any real request's.
_ITEMS_MAX = 4096

_EMPTY_FINAL = "triton_enable_empty_final_response"


class Choice(enum.IntEnum):
    """Which field of an ``InferParameter`` is set (spec G-035)."""

    NONE = 0
    BOOL = 1
    INT64 = 2
    STRING = 3
    DOUBLE = 4
    UINT64 = 5


class WireParameter(msgspec.Struct, frozen=True):
    """One ``InferParameter``."""

    choice: Choice = Choice.NONE
    value: bool | int | str | float = 0


class WireInput(msgspec.Struct, frozen=True):
    """One ``InferInputTensor``."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, WireParameter]
    contents: memoryview | None
    """The ``InferTensorContents``; None: not set."""


class WireOutput(msgspec.Struct, frozen=True):
    """One ``InferRequestedOutputTensor``."""

    name: str
    parameters: dict[str, WireParameter]


class WireRequest(msgspec.Struct, frozen=True):
    """A ``ModelInferRequest`` as it is on the wire; refers to the message's bytes."""

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, WireParameter]
    inputs: list[WireInput]
    outputs: list[WireOutput]
    raw: list[tuple[int, int]]
    """Where each of ``raw_input_contents`` starts and ends."""
    is_plain: bool
    """The raw contents come last and one after the other, as every protobuf library writes them."""
    raw_start: int
    """Where the first of them begins, its tag included; the message's length without any."""


class InferMessage(msgspec.Struct, frozen=True):
    """A request whose own rules have been checked."""

    request: ParsedInfer
    asked_version: str = ""
    """As the request names it, maybe not at all."""
    enable_empty_final: bool = False
    """``triton_enable_empty_final_response`` (spec G-064)."""


# --- the walk ---


def walk_request(data: memoryview) -> WireRequest:
    """Return the fields of a message.

    Raises:
        Malformed: it is not a ``ModelInferRequest``.
    """
    name = version = request_id = ""
    parameters: dict[str, WireParameter] = {}
    inputs: list[WireInput] = []
    outputs: list[WireOutput] = []
    raw: list[tuple[int, int]] = []
    is_plain, raw_start, position = True, -1, 0
    for number, kind, start, end in fields(data):
        if number == 7 and kind == LENGTH:
            if raw_start < 0:
                raw_start = position
            raw.append((start, end))
        elif kind == LENGTH and number <= 6:
            if raw_start >= 0:
                is_plain = False
            if number == 1:
                name = text(data[start:end])
            elif number == 2:
                version = text(data[start:end])
            elif number == 3:
                request_id = text(data[start:end])
            elif number == 4:
                _add_parameter(parameters, data[start:end])
            elif number == 5:
                inputs.append(_walk_input(data[start:end]))
            else:
                outputs.append(_walk_output(data[start:end]))
        elif raw_start >= 0:
            is_plain = False
        position = end
        if len(inputs) > _ITEMS_MAX or len(outputs) > _ITEMS_MAX or len(raw) > _ITEMS_MAX:
            raise InvalidArgument(f"a request of more than {_ITEMS_MAX} tensors is not supported")
    return WireRequest(
        model_name=name,
        model_version=version,
        id=request_id,
        parameters=parameters,
        inputs=inputs,
        outputs=outputs,
        raw=raw,
        is_plain=is_plain,
        raw_start=raw_start if raw_start >= 0 else len(data),
    )


def _walk_input(data: memoryview) -> WireInput:
    name = datatype = ""
    shape: list[int] = []
    parameters: dict[str, WireParameter] = {}
    contents: list[memoryview] = []
    for number, kind, start, end in fields(data):
        if number == 3 and kind in (LENGTH, VARINT):
            position = start
            while position < end:
                dim, position = read_varint(data, position, end)
                shape.append(signed(dim))
        elif kind != LENGTH:
            continue
        elif number == 1:
            name = text(data[start:end])
        elif number == 2:
            datatype = text(data[start:end])
        elif number == 4:
            _add_parameter(parameters, data[start:end])
        elif number == 5:
            contents.append(data[start:end])
            # Read later, if at all; but a message that is broken is refused as a whole.
            for _field in fields(contents[-1]):
                pass
    merged = contents[0] if len(contents) == 1 else memoryview(b"".join(contents)) if contents else None
    return WireInput(name, datatype, tuple(shape), parameters, merged)


def _walk_output(data: memoryview) -> WireOutput:
    name = ""
    parameters: dict[str, WireParameter] = {}
    for number, kind, start, end in fields(data):
        if kind == LENGTH and number == 1:
            name = text(data[start:end])
        elif kind == LENGTH and number == 2:
            _add_parameter(parameters, data[start:end])
    return WireOutput(name, parameters)


def _add_parameter(parameters: dict[str, WireParameter], entry: memoryview) -> None:
    """Add one entry of a ``map<string, InferParameter>``; of equal keys the last counts."""
    key = ""
    value = WireParameter()
    for number, kind, start, end in fields(entry):
        if kind == LENGTH and number == 1:
            key = text(entry[start:end])
        elif kind == LENGTH and number == 2:
            value = _walk_parameter(entry[start:end])
    parameters[key] = value
    if len(parameters) > _ITEMS_MAX:
        raise InvalidArgument(f"more than {_ITEMS_MAX} parameters are not supported")


def _walk_parameter(data: memoryview) -> WireParameter:
    found = WireParameter()
    for number, kind, start, end in fields(data):
        if kind == VARINT and number in (1, 2, 5):
            value = read_varint(data, start, end)[0]
            if number == 1:
                found = WireParameter(Choice.BOOL, bool(value))
            else:
                found = WireParameter(Choice(number), signed(value) if number == 2 else value)
        elif kind == LENGTH and number == 3:
            found = WireParameter(Choice.STRING, text(data[start:end]))
        elif kind == FIXED64 and number == 4:
            found = WireParameter(Choice.DOUBLE, float(struct.unpack_from("<d", data, start)[0]))
    return found


# --- what it means ---


def read_request(wire: WireRequest, data: memoryview) -> InferMessage:
    """Return the request that a walked message stands for.

    Args:
        data: the message that was walked.

    Raises:
        InvalidArgument: with Triton's text.
    """
    meta = _Meta()
    for key, parameter in wire.parameters.items():
        meta.take(key, parameter)
    names: set[str] = set()
    for tensor in wire.inputs:
        if tensor.name in names:
            raise InvalidArgument(f"{id_prefix(wire.id)}input '{tensor.name}' already exists in request")
        names.add(tensor.name)
    inputs: list[ParsedInput] = []
    raw_index = 0
    for tensor in wire.inputs:
        source = _explicit_source(wire, tensor)
        if source is None:
            if raw_index >= len(wire.raw):
                raise InvalidArgument(
                    f"unable to find data for input tensor '{tensor.name}' for model '{wire.model_name}' in request."
                )
            start, end = wire.raw[raw_index]
            raw_index += 1
            source = BinaryData(offset=start, body_bytes=end - start)
        inputs.append(ParsedInput(tensor.name, tensor.datatype, tensor.shape, source))
    outputs: dict[str, ParsedOutput] = {}
    for output in wire.outputs:
        outputs.setdefault(output.name, _read_output(output))
    request = ParsedInfer(
        inputs=tuple(inputs),
        outputs=tuple(outputs.values()),
        id=wire.id,
        sequence_id=meta.sequence_id,
        sequence_start=meta.sequence_start,
        sequence_end=meta.sequence_end,
        priority=meta.priority,
        timeout_us=meta.timeout_us,
        binary_data_output=True,
        parameters=meta.custom,
    )
    return InferMessage(request, wire.model_version, meta.enable_empty_final)


class _Meta:
    """The request's parameters while they are read (spec G-050..G-052)."""

    def __init__(self) -> None:
        self.sequence_id: int | str = 0
        self.sequence_start = False
        self.sequence_end = False
        self.priority = 0
        self.timeout_us = 0
        self.enable_empty_final = False
        self.custom: dict[str, Parameter] = {}

    def take(self, key: str, parameter: WireParameter) -> None:
        choice, value = parameter.choice, parameter.value
        if key == "sequence_id":
            if choice is Choice.INT64:
                # Triton's correlation ids are unsigned.
                self.sequence_id = int(value) & 2**64 - 1
            elif choice is Choice.STRING:
                self.sequence_id = str(value)
            else:
                raise _wrong_type(key, "int64_param or string_param.")
        elif key in ("sequence_start", "sequence_end"):
            if choice is not Choice.BOOL:
                raise _wrong_type(key, "bool_param.")
            setattr(self, key, bool(value))
        elif key == "priority":
            if choice not in (Choice.INT64, Choice.UINT64):
                raise _wrong_type(key, "int64_param or uint64_param.")
            if int(value) < 0:
                raise InvalidArgument("invalid value for 'priority', expected value >= 0.")
            self.priority = int(value)
        elif key == "timeout":
            if choice is not Choice.INT64:
                raise _wrong_type(key, "int64_param.")
            # A negative one is as good as none: unsigned, it is longer than anybody waits.
            self.timeout_us = max(int(value), 0)
        elif key.startswith("triton_"):
            if key != _EMPTY_FINAL:
                raise InvalidArgument(
                    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys "
                    f"starting with 'triton_' are allowed: {_EMPTY_FINAL}"
                )
            if choice is not Choice.BOOL:
                raise _wrong_type(key, "bool_param.")
            self.enable_empty_final = bool(value)
        elif choice in (Choice.INT64, Choice.BOOL, Choice.STRING, Choice.DOUBLE):
            self.custom[key] = value
        else:
            # A double may be given all the same.
            raise _wrong_type(key, "int64_param, bool_param, or string_param.")


def _wrong_type(key: str, expected: str) -> InvalidArgument:
    return InvalidArgument(f"invalid value type for '{key}' parameter, expected {expected}")


def _read_region(name: str, parameters: dict[str, WireParameter]) -> RegionData | None:
    """Return the region named in a tensor's parameters, or None (spec G-046; `ParseSharedMemoryParams`)."""
    region = parameters.get("shared_memory_region")
    if region is not None and region.choice is not Choice.STRING:
        raise _wrong_region_type("shared_memory_region", name, "string_param")
    sizes = [0, 0]
    for index, key in enumerate(("shared_memory_offset", "shared_memory_byte_size")):
        parameter = parameters.get(key)
        if parameter is None:
            continue
        if region is None:
            raise InvalidArgument(
                f"'{key}' can not be specified without 'shared_memory_region' parameter for tensor '{name}'"
            )
        if parameter.choice is not Choice.INT64:
            raise _wrong_region_type(key, name, "int64_param")
        sizes[index] = int(parameter.value)
    if region is None:
        return None
    if "shared_memory_byte_size" not in parameters:
        raise InvalidArgument(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor "
            f"'{name}'"
        )
    # As unsigned numbers, like Triton's: a negative one is then far outside of every region.
    return RegionData(region=str(region.value), offset=sizes[0] & 2**64 - 1, byte_size=sizes[1] & 2**64 - 1)


def _wrong_region_type(key: str, name: str, expected: str) -> InvalidArgument:
    return InvalidArgument(f"invalid value type for '{key}' parameter for tensor '{name}', expected {expected}.")


def _explicit_source(wire: WireRequest, tensor: WireInput) -> Source | None:
    """Return where an input's data is, unless it is in ``raw_input_contents`` (spec G-037, G-038)."""
    region = _read_region(tensor.name, tensor.parameters)
    if region is not None:
        if tensor.contents is not None:
            raise InvalidArgument(
                f"unexpected 'content' provided when using shared memory for input tensor '{tensor.name}' "
                f"for model '{wire.model_name}'"
            )
        return region
    if tensor.contents is None:
        return None
    if wire.raw:
        raise InvalidArgument(
            f"contents field must not be specified when using raw_input_contents for '{tensor.name}' "
            f"for model '{wire.model_name}'"
        )
    return JsonData(_ContentsReader(tensor, wire.model_name).read(tensor.contents))


def _read_output(output: WireOutput) -> ParsedOutput:
    region = _read_region(output.name, output.parameters)
    classification = 0
    wanted = output.parameters.get("classification")
    if wanted is not None:
        if wanted.choice is not Choice.INT64:
            raise InvalidArgument("invalid value type for 'classification' parameter, expected int64_param")
        classification = int(wanted.value)
        if classification <= 0:
            raise InvalidArgument("invalid value for 'classification' parameter, expected >= 0")
        if region is not None:
            raise InvalidArgument("output can't set both 'shared_memory_region' and 'classification'")
    return ParsedOutput(output.name, binary=True, classification=classification, region=region)


#: Field of ``InferTensorContents`` to the datatypes that it may hold; the first is what an error calls it (spec G-034).
_CONTENT_TYPES: dict[int, tuple[str, ...]] = {
    1: ("BOOL",),
    2: ("INT32", "INT8", "INT16"),
    3: ("INT64",),
    4: ("UINT32", "UINT8", "UINT16"),
    5: ("UINT64",),
    6: ("FP32",),
    7: ("FP64",),
    8: ("BYTES",),
}


class _ContentsReader:
    """Turns ``InferTensorContents`` into a tensor's bytes (spec D-009: narrowing is silent)."""

    def __init__(self, tensor: WireInput, model_name: str) -> None:
        self._tensor = tensor
        self._model_name = model_name

    def read(self, data: memoryview) -> bytes:
        """Return the bytes, C order, BYTES with length prefixes.

        Raises:
            InvalidArgument: a field of another datatype, or several fields (spec G-040).
            Malformed: it is not protobuf.
        """
        pieces: dict[int, list[bytes]] = {}
        for number, kind, start, end in fields(data):
            if number not in _CONTENT_TYPES:
                continue
            value = bytes(data[start:end])
            if number == 8:
                if kind == LENGTH:
                    pieces.setdefault(8, []).append(frame_element(value))
            elif value and kind in (LENGTH, FIXED32 if number == 6 else FIXED64 if number == 7 else VARINT):
                pieces.setdefault(number, []).append(value)
        found = b""
        for number in sorted(pieces):
            found = self._convert(number, b"".join(pieces[number]), is_first=not found)
        return found

    def _convert(self, number: int, value: bytes, *, is_first: bool) -> bytes:
        name, datatype = self._tensor.name, self._tensor.datatype
        where = f"unexpected explicit tensor data for input tensor '{name}' for model '{self._model_name}'"
        if not is_first:
            raise InvalidArgument(f"{where}, binary data was already supplied.")
        allowed = _CONTENT_TYPES[number]
        if datatype not in allowed:
            expected = datatype if datatype in DATATYPES else "<invalid>"
            raise InvalidArgument(f"{where} of type '{allowed[0]}', expected datatype '{expected}'")
        if number == 8:
            return value
        if number in (6, 7):
            if len(value) % DATATYPES[datatype].item_bytes:
                raise Malformed
            return value
        numbers: npt.NDArray[np.uint64] = unpack_varints(value)
        if number == 1:
            numbers = np.minimum(numbers, np.uint64(1))
        narrowed: bytes = numbers.astype(f"uint{DATATYPES[datatype].item_bytes * 8}").tobytes()
        return narrowed
