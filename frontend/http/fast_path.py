"""Plans: what is to be done for a request whose head and JSON have been seen before.

A plan exists only for requests that are all binary, of fixed shapes, and need nothing from their header but sizes. It
holds where each input's bytes go and the whole reply head, so a repeated request costs two dictionary look-ups, a copy
of the bytes that came with the header, and one system call for the reply.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from forebay.frontend.codec.infer_request import BinaryData, ParsedInfer
from forebay.frontend.codec.infer_response import FixedOutput, response_prefix
from forebay.frontend.start_inference import RowsRoute
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.messages import ParameterValue
from forebay.ipc.tensor import byte_size


class InferPlan:
    """How to place and answer one form of request."""

    __slots__ = (
        "connection_line",
        "copied_bytes",
        "copies",
        "outputs",
        "priority",
        "render_head",
        "reply_head",
        "route",
        "rows",
        "timeout_us",
    )

    def __init__(
        self,
        route: RowsRoute,
        rows: int,
        copies: Sequence[tuple[int, int, int]],
        outputs: Sequence[int],
        render_head: Callable[[Mapping[str, ParameterValue]], bytes],
        priority: int,
        timeout_us: int,
        connection_line: bytes,
    ) -> None:
        self.route = route
        self.rows = rows
        #: Per input: where its bytes start and end in the body, and its index in the model.
        self.copies = tuple(copies)
        #: Indices of the outputs in the order of the reply.
        self.outputs = tuple(outputs)
        #: Makes status line, headers and JSON from the response's parameters.
        self.render_head = render_head
        #: The same of a response that has no parameters of its own.
        self.reply_head = render_head(route.reply_parameters)
        self.priority = priority
        self.timeout_us = timeout_us
        #: For a reply other than ``reply_head``.
        self.connection_line = connection_line
        self.copied_bytes = sum(end - start for start, end, _index in copies)

    def reply_head_with(self, parameters: Mapping[str, ParameterValue]) -> bytes:
        """Return status line, headers and JSON of a response with parameters of its own."""
        return self.render_head({**self.route.reply_parameters, **parameters})


def make_plan(
    route: RowsRoute, entry: ModelEntry, request: ParsedInfer, rows: int, connection_line: bytes
) -> InferPlan | None:
    """Return the plan for requests that are equal to this validated one but for their tensor bytes; None: no plan.

    Args:
        rows: batch items, at least 1.
        connection_line: what the reply says about the connection, as the head of these requests wants it.
    """
    if request.sequence_id or request.sequence_start or request.sequence_end or request.is_raw:
        return None
    copies: list[tuple[int, int, int]] = []
    for tensor in request.inputs:
        if not isinstance(tensor.source, BinaryData) or tensor.source.prefix:
            return None
        start = tensor.source.offset
        copies.append((start, start + tensor.source.body_bytes, route.input_indices[tensor.name]))
    fixed: list[FixedOutput] = []
    indices: list[int] = []
    for output in request.output_plan(entry):
        if not output.binary or output.classification or output.region is not None:
            return None
        index = route.output_indices[output.name]
        spec = route.output_specs[index]
        shape = (rows, *spec.dims) if entry.max_batch_size > 0 else spec.dims
        size = byte_size(spec.datatype, shape)
        if size == 0:
            return None
        fixed.append(FixedOutput(output.name, spec.datatype, shape, size))
        indices.append(index)
    render_head = functools.partial(
        response_prefix, entry.name, entry.version, request.id, fixed, extra_headers=connection_line
    )
    return InferPlan(route, rows, copies, indices, render_head, request.priority, request.timeout_us, connection_line)
