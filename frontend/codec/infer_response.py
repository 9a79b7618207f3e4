"""From outputs to the bytes of an inference reply; tensor bytes are passed on as views, never copied (I-1).

`FinalizeResponse` of Triton's http_server.cc: spec H-096..H-098, H-118..H-122, H-170..H-176. HTTP frontend; pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from forebay.frontend.codec.infer_request import Parameter
from forebay.frontend.codec.json_tensor import Buffer, frame_element, render_json_data
from forebay.frontend.codec.rapid_json import dump_json, quote
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import DATATYPES

JSON_TYPE = "application/json"
BINARY_TYPE = "application/octet-stream"

Shape: TypeAlias = Sequence[int]


class OutputTensor(msgspec.Struct, frozen=True):
    """One output as it is to be answered."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer | None
    """The tensor's bytes, C order, little endian; None if they went into the client's region (spec H-198)."""
    binary: bool = False
    """Whether the bytes follow the JSON (spec H-118) or are part of it."""


class RenderedReply(msgspec.Struct, frozen=True):
    """A reply body and the headers that describe it."""

    buffers: tuple[Buffer, ...]
    """To be written one after the other; the first is the JSON. Views belong to whoever owns the outputs."""
    header_length: int | None
    """Value of ``Inference-Header-Content-Length``; None: no such header (spec H-120)."""
    content_type: str

    @property
    def body_bytes(self) -> int:
        return sum(map(len, self.buffers))


def render_infer_response(
    model_name: str,
    model_version: int,
    request_id: str,
    parameters: Mapping[str, Parameter],
    outputs: Sequence[OutputTensor],
) -> RenderedReply:
    """Return the reply to one inference request, keys and outputs in order.

    Raises:
        InvalidArgument: FP16 or BF16 is to be written as JSON (spec H-077).
        Internal: an output's bytes do not make up its shape.
    """
    parts = [_response_start(model_name, model_version, request_id, parameters)]
    binaries: list[Buffer] = []
    for index, output in enumerate(outputs):
        parts.append(b"," if index else b"")
        parts.append(_output_start(output.name, output.datatype, output.shape))
        if output.data is None:
            parts.append(b"}")
        elif output.binary:
            byte_size = len(output.data)
            parts.append(b',"parameters":{"binary_data_size":%d}}' % byte_size)
            if byte_size:
                binaries.append(output.data)
        else:
            data = render_json_data(output.name, output.datatype, output.shape, output.data)
            parts += (b',"data":', data, b"}")
    parts.append(b"]}")
    head = b"".join(parts)
    if not binaries:
        return RenderedReply((head,), None, JSON_TYPE)
    return RenderedReply((head, *binaries), len(head), BINARY_TYPE)


def _response_start(model_name: str, model_version: int, request_id: str, parameters: Mapping[str, Parameter]) -> bytes:
    identity = b'{"id":%s,' % quote(request_id) if request_id else b"{"
    extra = b',"parameters":' + dump_json(parameters) if parameters else b""
    return b'%s"model_name":%s,"model_version":"%d"%s,"outputs":[' % (identity, quote(model_name), model_version, extra)


def _output_start(name: str, datatype: str, shape: Shape) -> bytes:
    dims = b",".join(b"%d" % dim for dim in shape)
    return b'{"name":%s,"datatype":"%s","shape":[%s]' % (quote(name), datatype.encode(), dims)


class FixedOutput(msgspec.Struct, frozen=True):
    """An output whose size is known before it is computed, answered binary."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Batch dimension included."""
    byte_size: int


def response_prefix(
    model_name: str,
    model_version: int,
    request_id: str,
    outputs: Sequence[FixedOutput],
    parameters: Mapping[str, Parameter] = MappingProxyType({}),
    *,
    extra_headers: bytes = b"",
) -> bytes:
    """Return status line, headers and JSON of a reply with binary outputs only: what precedes the tensor bytes.

    The bytes are the same for each request of the same plan, so they are made once and kept. The tensors follow in
    the order of ``outputs``, those without bytes left out.

    Args:
        extra_headers: complete header lines, each with its CRLF.
    """
    entries = b",".join(
        b'%s,"parameters":{"binary_data_size":%d}}'
        % (_output_start(output.name, output.datatype, output.shape), output.byte_size)
        for output in outputs
    )
    head = _response_start(model_name, model_version, request_id, parameters) + entries + b"]}"
    tensor_bytes = sum(output.byte_size for output in outputs)
    kind = (
        b"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n" % len(head)
        if tensor_bytes
        else b"Content-Type: application/json\r\n"
    )
    return b"HTTP/1.1 200 OK\r\n%s%sContent-Length: %d\r\n\r\n%s" % (
        kind,
        extra_headers,
        len(head) + tensor_bytes,
        head,
    )


def classify(
    name: str,
    datatype: str,
    shape: Shape,
    data: Buffer,
    class_count: int,
    labels: Sequence[str],
    *,
    is_batched: bool,
    binary: bool = False,
) -> OutputTensor:
    """Return an output replaced by its best classes: BYTES ``<value>:<index>[:<label>]`` (spec H-170..H-176).

    Values are sorted in descending order; among equal ones the lower index comes first.

    Args:
        shape: of the tensor, batch dimension included.
        class_count: how many classes were asked for, above 0.
        labels: of the classes, by index; there may be fewer than classes.
        is_batched: whether the model batches: then each batch item has its own classes.

    Raises:
        InvalidArgument: the datatype cannot be ordered (H-174).
    """
    row = DATATYPES[datatype]
    if datatype in ("BYTES", "BOOL", "FP16", "BF16"):
        raise InvalidArgument(f"class result not available for output due to unsupported type '{datatype}'")
    batch_size = shape[0] if is_batched and shape else 0
    values = np.frombuffer(data, dtype=row.numpy_dtype)
    item_count = 1
    for dim in shape[1 if batch_size else 0 :]:
        item_count *= dim
    kept = min(class_count, item_count)
    elements = [
        frame_element(_class_text(values_of_item.item(index), index, labels))
        for values_of_item in values.reshape(max(1, batch_size), item_count)
        for index in _descending(values_of_item)[:kept].tolist()
    ]
    result_shape = (batch_size, kept) if batch_size else (kept,)
    return OutputTensor(name, "BYTES", result_shape, b"".join(elements), binary)


def _descending(values: npt.NDArray[np.generic]) -> npt.NDArray[np.intp]:
    """Return the indexes of values from high to low, stable; NaN counts as highest."""
    ascending = np.argsort(values[::-1], kind="stable")
    return (len(values) - 1 - ascending)[::-1]


def _class_text(value: float | int, index: int, labels: Sequence[str]) -> bytes:
    number = f"{value:.6f}" if isinstance(value, float) else str(value)
    label = f":{labels[index]}" if index < len(labels) and labels[index] else ""
    return f"{number}:{index}{label}".encode()
