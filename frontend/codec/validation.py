"""Checks of an HTTP request: how its tensors came, and then what every request is checked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from forebay.frontend.codec.infer_request import RAW_INPUT_NAME, JsonData, ParsedInfer, ParsedInput, RegionData
from forebay.frontend.codec.json_tensor import Buffer
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.validation import InputFacts, Validated, validate_request

__all__ = ["InputFacts", "RegionReader", "Validated", "validate_infer", "validate_request"]

#: Gives the bytes of an input that lies in a region, or None where this process cannot read them (device memory).
RegionReader: TypeAlias = Callable[[RegionData], Buffer | None]


def validate_infer(
    entry: ModelEntry, request: ParsedInfer, body: Buffer, *, read_region: RegionReader | None = None
) -> Validated:
    """Check a parsed HTTP request whose binary tensors lie in ``body``; errors as :func:`validate_request`.

    Args:
        read_region: asked for BYTES inputs in regions, whose framing is then walked (spec H-202).
    """
    facts = [_facts(tensor, request, memoryview(body), read_region) for tensor in request.inputs]
    return validate_request(entry, request.id, facts, [output.name for output in request.outputs])


def _facts(tensor: ParsedInput, request: ParsedInfer, body: memoryview, read_region: RegionReader | None) -> InputFacts:
    source = tensor.source
    content: Buffer | None = None
    if tensor.datatype == "BYTES":
        if isinstance(source, JsonData):
            content = source.data
        elif isinstance(source, RegionData):
            content = read_region(source) if read_region else None
        elif not source.prefix:
            content = body[source.offset : source.offset + source.body_bytes]
    return InputFacts(
        name=tensor.name,
        datatype=tensor.datatype,
        shape=tensor.shape,
        byte_size=source.byte_size,
        content=content,
        label=RAW_INPUT_NAME if request.is_raw else "",
    )
