"""From outputs to the bytes of a ``ModelInferResponse``; tensor bytes stay views. Pure (spec G-033, G-043)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from forebay.frontend.codec.infer_request import Parameter
from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.grpc.wire import double_field, field, integer_field, text_field, varint

_PARAMETERS, _OUTPUTS = 4, 5
_RAW_TAG = bytes((6 << 3 | 2,))


class ReplyTensor(msgspec.Struct, frozen=True):
    """One output of a reply."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer
    """C order, little endian; empty if the bytes went into the client's region."""


def parameter_entry(key: str, value: Parameter) -> bytes:
    """Return one entry of ``parameters``, its tag included (spec G-053)."""
    if isinstance(value, bool):
        choice = integer_field(1, value)
    elif isinstance(value, int):
        choice = integer_field(2, value)
    elif isinstance(value, str):
        choice = field(3, value.encode())
    else:
        choice = double_field(4, value)
    return field(_PARAMETERS, text_field(1, key) + field(2, choice))


def parameter_entries(parameters: Mapping[str, Parameter]) -> bytes:
    """Return every entry of ``parameters``."""
    return b"".join(parameter_entry(key, value) for key, value in parameters.items())


FINAL_ENTRY = parameter_entry("triton_final_response", True)
NOT_FINAL_ENTRY = parameter_entry("triton_final_response", False)


def identity_fields(model_name: str, model_version: str, request_id: str) -> bytes:
    """Return name, version and id."""
    return text_field(1, model_name) + text_field(2, model_version) + text_field(3, request_id)


def output_entry(name: str, datatype: str, shape: Sequence[int]) -> bytes:
    """Return one entry of ``outputs``, its tag included."""
    dims = b"".join(map(varint, shape))
    return field(_OUTPUTS, text_field(1, name) + text_field(2, datatype) + (field(3, dims) if dims else b""))


def raw_head(byte_size: int) -> bytes:
    """Return what precedes the bytes of one entry of ``raw_output_contents``."""
    return _RAW_TAG + varint(byte_size)


def render_reply(identity: bytes, parameters: Mapping[str, Parameter], outputs: Sequence[ReplyTensor]) -> list[Buffer]:
    """Return the pieces of a reply message, in order."""
    parts = [identity]
    parts += [parameter_entry(key, value) for key, value in parameters.items()]
    parts += [output_entry(output.name, output.datatype, output.shape) for output in outputs]
    pieces: list[Buffer] = [b"".join(parts)]
    for output in outputs:
        pieces.append(raw_head(len(output.data)))
        if len(output.data):
            pieces.append(output.data)
    return pieces


def stream_reply(pieces: list[Buffer], message_bytes: int) -> tuple[list[Buffer], int]:
    """Return a ``ModelStreamInferResponse`` around a reply message, and its length (spec G-007)."""
    head = b"\x12" + varint(message_bytes)
    return [head, *pieces], message_bytes + len(head)


def stream_error(text: str, inner: bytes) -> bytes:
    """Return a ``ModelStreamInferResponse`` with an error (spec G-066).

    Args:
        inner: the ``ModelInferResponse`` beside it: the request's id and what else is known.
    """
    return text_field(1, text) + field(2, inner)
