"""Where one request's tensors go: rows of a slab for models of fixed shapes, blocks of the arena for all others.

A placement is filled by the caller, turned into a request in flight by ``submit``, and then belongs to the engine until
the answer. Both kinds have the same methods, so that a model handle need not know which it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from forebay.client.connection import Connection
from forebay.client.opened import Opened
from forebay.client.options import NO_OPTIONS, Options
from forebay.client.parcels import describe, reply_bytes
from forebay.client.pending import (
    Array,
    BlockInRows,
    BlockLease,
    Pending,
    PendingParcel,
    PendingResponses,
    leased_array,
)
from forebay.client.places import full_shape, input_places, input_shape, output_places, row_counts
from forebay.ipc.errors import InvalidArgument, Unsupported
from forebay.ipc.messages import ReplyHead, TensorPlace
from forebay.ipc.tensor import DATATYPES, TensorSpec, byte_size, datatype_of, decode_bytes, encode_bytes, view_tensor


def unknown_tensor(kind: str, name: str, specs: Sequence[TensorSpec], model: str) -> InvalidArgument:
    """Return the error for a name that the model does not have."""
    names = ", ".join(f"'{spec.name}'" for spec in specs)
    return InvalidArgument(f"model '{model}' has no {kind} '{name}', but {names}")


class RowsPlacement:
    """Consecutive rows of a slab; every tensor of the model has its place, of one size."""

    def __init__(self, connection: Connection, model: Opened, rows: int) -> None:
        """Take rows.

        Raises:
            InvalidArgument: the model takes fewer rows at a time.
            ArenaFull: there is no room.
        """
        if not 1 <= rows <= model.rows_max:
            raise InvalidArgument(f"model '{model.name}' takes 1 to {model.rows_max} rows at a time, not {rows}")
        self._connection = connection
        self.model = model
        self.edition = model.edition
        self.rows = rows
        self.lease = connection.loan_rows(model, rows)
        inputs, outputs = model.slab_arrays(connection.view, self.lease.slab)
        first = self.lease.first
        chosen = slice(first, first + rows) if model.signature.max_batch_size > 0 else first
        self._inputs: dict[str, Array] = {name: array[chosen, ...] for name, array in inputs.items()}
        self._outputs: dict[str, Array] = {name: array[chosen, ...] for name, array in outputs.items()}
        self._first_output = next(iter(self._outputs.values()))
        #: Used over and over by ``infer``, one request after the other.
        self._pending = Pending(model, self.lease, rows)

    def matches(self, rows: int | None, shape: Sequence[int] | None) -> bool:
        """True if it can hold a request of that many rows; None: any."""
        return self.edition == self.model.edition and rows in (None, self.rows)

    def input(self, spec: TensorSpec, shape: Sequence[int] | None) -> Array:
        """Return a view of an input, full shape.

        Raises:
            InvalidArgument: ``shape`` is another one.
        """
        array = self._inputs[spec.name]
        if shape is not None and tuple(shape) != array.shape:
            raise InvalidArgument(f"input '{spec.name}' has the shape {list(array.shape)}, not {list(shape)}")
        return array

    def put(self, spec: TensorSpec, values: Array) -> None:
        """Copy an input in.

        Raises:
            InvalidArgument: it has another shape.
        """
        array = self.input(spec, values.shape)
        if array.dtype != values.dtype:
            raise _wrong_datatype(spec, values)
        np.copyto(array, values)
        self._connection.memory.copied_bytes += array.nbytes

    def submit(self, options: Options) -> Pending:
        """Hand the request over; the placement is the engine's until the answer."""
        pending = self._pending
        if pending.is_done or pending.enqueue_ns:
            pending = self._pending = Pending(self.model, self.lease, self.rows)
        if options is not NO_OPTIONS:
            pending.priority = options.priority
            pending.timeout_us = options.timeout_us
            pending.deadline_ns = options.deadline_ns
        self._connection.submit(pending)
        return pending

    def as_blocks(self) -> BlockPlacement:
        """Return the same inputs, where they are, for a request that carries more than rows can."""
        blocks = BlockPlacement(self._connection, self.model)
        max_batch_size = self.model.signature.max_batch_size
        for spec, offset in input_places(self.model, self.lease):
            shape = full_shape(spec, self.rows, max_batch_size)
            place = TensorPlace(spec.name, spec.datatype, shape, offset, byte_size(spec.datatype, shape))
            blocks.add(place, BlockInRows(self.lease, offset, place.byte_size))
        return blocks

    def output(self, pending: Pending, name: str | None) -> Array:
        """Return a view of an output, valid until the placement is used again."""
        return self._first_output if name is None else self._outputs[name]

    def leased_output(self, pending: Pending, name: str | None) -> Array:
        """Return a view of an output that keeps the rows from being used again as long as it lives."""
        spec, offset = next(place for place in output_places(self.model, self.lease) if name in (None, place[0].name))
        shape = full_shape(spec, self.rows, self.model.signature.max_batch_size)
        return leased_array(self._connection.view, offset, spec.datatype, shape, self.lease)


class BlockPlacement:
    """A block per input, and one for the answer."""

    def __init__(self, connection: Connection, model: Opened) -> None:
        self._connection = connection
        self.model = model
        self.edition = model.edition
        self._inputs: dict[str, tuple[TensorPlace, BlockLease]] = {}
        #: What the last answer lies in.
        self._held: tuple[BlockLease, ...] = ()
        self._reply: ReplyHead | None = None

    def matches(self, rows: int | None, shape: Sequence[int] | None) -> bool:
        return self.edition == self.model.edition

    def input(self, spec: TensorSpec, shape: Sequence[int] | None) -> Array:
        """Return a view of an input; the same again as long as the shape is the same.

        Raises:
            InvalidArgument: the model does not take that shape, or the input is BYTES.
            ArenaFull: there is no room.
        """
        if spec.datatype == "BYTES":
            raise InvalidArgument(f"input '{spec.name}' is BYTES, whose elements vary in size: use put()")
        wanted = self._shape_of(spec, shape)
        place = self._place(spec, wanted, byte_size(spec.datatype, wanted))
        return _view(self._connection.view, place.offset, spec.datatype, wanted)

    def put(self, spec: TensorSpec, values: Array) -> None:
        """Copy an input in; BYTES as objects, ``S`` or ``U``.

        Raises:
            InvalidArgument: the datatype or the shape is not the model's.
            ArenaFull: there is no room.
        """
        shape = self._shape_of(spec, values.shape)
        if spec.datatype == "BYTES":
            if datatype_of(values) != "BYTES":
                raise _wrong_datatype(spec, values)
            data = encode_bytes(values)
            place = self._place(spec, shape, len(data))
            self._connection.view[place.offset : place.offset + len(data)] = data
            self._connection.memory.copied_bytes += len(data)
            return
        if values.dtype != DATATYPES[spec.datatype].numpy_dtype:
            raise _wrong_datatype(spec, values)
        np.copyto(self.input(spec, shape), values)
        self._connection.memory.copied_bytes += values.nbytes

    def add(self, place: TensorPlace, lease: BlockLease) -> None:
        """Take an input that is filled already."""
        self._inputs[place.name] = (place, lease)

    def _shape_of(self, spec: TensorSpec, shape: Sequence[int] | None) -> tuple[int, ...]:
        limit = self.model.signature.max_batch_size
        expected = input_shape(spec, -1, limit)
        if shape is None:
            if -1 in spec.dims:
                raise InvalidArgument(f"input '{spec.name}' has the shape {list(expected)}: say which, with shape=")
            return tuple(1 if dim == -1 else dim for dim in expected)
        given = tuple(int(dim) for dim in shape)
        if len(given) != len(expected) or not all(
            have >= 0 and want in (-1, have) for want, have in zip(expected, given, strict=True)
        ):
            raise InvalidArgument(f"input '{spec.name}' has the shape {list(expected)}, not {list(given)}")
        if limit > 0 and not spec.is_shape_tensor and not 1 <= given[0] <= self.model.rows_max:
            raise InvalidArgument(
                f"model '{self.model.name}' takes 1 to {self.model.rows_max} rows at a time, not {given[0]}"
            )
        return given

    def _place(self, spec: TensorSpec, shape: tuple[int, ...], size: int) -> TensorPlace:
        known = self._inputs.get(spec.name)
        if known is not None and known[1].byte_size >= size:
            lease = known[1]
        else:
            lease = self._connection.loan_block(size)
        place = TensorPlace(spec.name, spec.datatype, shape, lease.offset, size)
        self._inputs[spec.name] = (place, lease)
        return place

    def submit(self, options: Options) -> PendingResponses:
        """Hand the request over; the placement is the engine's until the answer.

        Raises:
            InvalidArgument: an input is missing, or the inputs have different numbers of rows.
        """
        connection, model = self._connection, self.model
        signature = model.signature
        places = [self._inputs[spec.name][0] for spec in signature.inputs if spec.name in self._inputs]
        missing = [s.name for s in signature.inputs if not s.optional and s.name not in self._inputs]
        if missing:
            raise InvalidArgument(f"model '{model.name}' needs input '{missing[0]}', which was not filled")
        rows = row_counts(signature, places)
        if len(rows) > 1:
            raise InvalidArgument(f"the inputs of a request must have the same number of rows, not {sorted(rows)}")
        count = max(rows, default=1)
        leases = tuple(lease for _place, lease in self._inputs.values())
        pending: PendingResponses
        if signature.is_ensemble:
            pending = self._ensemble_request([self._inputs[place.name] for place in places], count, options)
        else:
            reply = connection.loan_block(reply_bytes(model, count))
            pending = PendingParcel(model, count, connection.next_token())
            self._describe(pending, places, reply, options)
        pending.inputs = leases
        self._reply, self._held = None, ()
        connection.submit(pending)
        return pending

    def _ensemble_request(
        self, inputs: Sequence[tuple[TensorPlace, BlockLease]], rows: int, options: Options
    ) -> PendingResponses:
        """Return a request to an ensemble, with these inputs."""
        return self._connection.ensemble_request(self.model, inputs, rows, options)

    def _describe(
        self, pending: PendingParcel, places: Sequence[TensorPlace], reply: BlockLease, options: Options
    ) -> None:
        """Fill in a request whose inputs lie in ``places``."""
        describe(pending, places, reply, options, self._connection.view)

    def output(self, pending: Pending, name: str | None) -> Array:
        """Return an output, valid until the placement is used again (BYTES: a copy, for good)."""
        return self.leased_output(pending, name)

    def leased_output(self, pending: Pending, name: str | None) -> Array:
        """Return an output; its block is not used again as long as it lives."""
        assert isinstance(pending, PendingResponses)
        if self._reply is None:
            self._reply, self._held = pending.responses.popleft()
        outputs = self.outputs_of(self._reply, self._held)
        if name is None:
            return next(iter(outputs.values()))
        if name not in outputs:
            raise InvalidArgument(f"the answer of model '{self.model.name}' has no output '{name}'")
        return outputs[name]

    def outputs_of(self, reply: ReplyHead, held: tuple[BlockLease, ...]) -> Mapping[str, Array]:
        """Return every output of a response by name, but for those in device memory."""
        arrays: dict[str, Array] = {}
        for place in reply.outputs:
            if place.memory:
                continue
            if place.datatype == "BYTES":
                raw = self._connection.view[place.offset : place.offset + place.byte_size]
                arrays[place.name] = decode_bytes(raw, place.shape)
                self._connection.memory.copied_bytes += place.byte_size
            elif byte_size(place.datatype, place.shape) != place.byte_size:
                raise Unsupported("the model's answer does not have the bytes of its shape")
            else:
                arrays[place.name] = leased_array(
                    self._connection.view, place.offset, place.datatype, place.shape, held
                )
        for tensor in reply.inline:
            arrays[tensor.name] = view_tensor(memoryview(tensor.data), tensor.datatype, tensor.shape)
        return arrays


Placement = RowsPlacement | BlockPlacement


def _view(view: memoryview, offset: int, datatype: str, shape: tuple[int, ...]) -> Array:
    size = byte_size(datatype, shape)
    dtype = DATATYPES[datatype].numpy_dtype
    return np.frombuffer(view[offset : offset + size], dtype).reshape(shape)


def _wrong_datatype(spec: TensorSpec, values: Array) -> InvalidArgument:
    return InvalidArgument(f"input '{spec.name}' is {spec.datatype}, not {values.dtype}")
