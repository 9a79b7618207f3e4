"""Checks of an HTTP request: how its tensors came, and then what every request is checked for."""

from __future__ import annotations

from collections.abc import Sequence

from forebay.frontend.codec.infer_request import RAW_INPUT_NAME, BinaryData, JsonData, ParsedInfer, ParsedInput
from forebay.frontend.codec.json_tensor import Buffer
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.validation import InputFacts, Validated, validate_request

__all__ = ["InputFacts", "Validated", "check_strings", "validate_infer", "validate_request"]


def validate_infer(entry: ModelEntry, request: ParsedInfer, body: Buffer) -> Validated:
    """Check a parsed HTTP request whose binary tensors lie in ``body``; errors as :func:`validate_request`.

    Strings in regions are not walked yet: see :func:`check_strings`.
    """
    facts = [_facts(tensor, request, memoryview(body)) for tensor in request.inputs]
    return validate_request(entry, request.id, facts, [output.name for output in request.outputs])


def check_strings(entry: ModelEntry, request: ParsedInfer, places: Sequence[Buffer]) -> None:
    """Check the framing of BYTES that could not be looked at before they were in their places (spec H-202).

    Args:
        places: of the inputs, filled; empty where this process cannot read them (device memory).

    Raises:
        InvalidArgument: with Triton's texts (spec H-091).
    """
    if all(tensor.datatype != "BYTES" for tensor in request.inputs):
        return
    facts = [
        InputFacts(tensor.name, tensor.datatype, tensor.shape, tensor.source.byte_size, content=place or None)
        for tensor, place in zip(request.inputs, places, strict=True)
    ]
    validate_request(entry, request.id, facts, [output.name for output in request.outputs])


def _facts(tensor: ParsedInput, request: ParsedInfer, body: memoryview) -> InputFacts:
    source = tensor.source
    content: Buffer | None = None
    if tensor.datatype == "BYTES":
        if isinstance(source, JsonData):
            content = source.data
        elif isinstance(source, BinaryData) and not source.prefix:
            content = body[source.offset : source.offset + source.body_bytes]
    return InputFacts(
        name=tensor.name,
        datatype=tensor.datatype,
        shape=tensor.shape,
        byte_size=source.byte_size,
        content=content,
        label=RAW_INPUT_NAME if request.is_raw else "",
    )
