"""Nested requests (BLS) in flight, and what those of one form share, over a worker's own connection as a client."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from forebay.client import shm
from forebay.client.errors import EngineGone
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.pending import Array, BlockLease, Pending, PendingResponses, RowsLease, leased_array
from forebay.client.placement import BlockPlacement
from forebay.client.places import full_shape, output_places
from forebay.engine.backends.python_model.engine_access import NestedRequest, NestedResponse, refusal_text
from forebay.engine.backends.python_model.gpus import gpus
from forebay.engine.backends.python_model.outer_requests import LOOK_PERIOD_S
from forebay.engine.backends.python_model.tensor import Facts, Tensor
from forebay.ipc.errors import InvalidArgument, ServingError, from_wire
from forebay.ipc.messages import ReplyHead
from forebay.ipc.spans import Trace

#: Forms of requests that are known to fit their model; at the limit all are forgotten.
_FORMS_MAX = 256

#: Rows that are larger are not kept ready.
_READY_BYTES_MAX = 64 * 1024

#: What makes the form of a request: model, version, inputs, wanted outputs, whether it takes many responses, and the
#: GPU that outputs are wanted on (``ANYWHERE`` and the like: negative).
FormKey = tuple[str, int, tuple[Facts, ...], tuple[str, ...], bool, int]


def uses_gpu(key: FormKey) -> bool:
    """Tell whether any tensor of such a request is, or shall be, in the memory of a GPU."""
    _name, _version, inputs, _outputs, _allows_many_responses, output_device = key
    return output_device >= 0 or any(is_on_gpu for *_facts, is_on_gpu in inputs)


class Link:
    """One connection, and the thread that reads its answers while event loops wait for some."""

    def __init__(self, engine: shm.Engine) -> None:
        self.engine = engine
        self.connection = engine.connection
        self.connection.device_pools.on_over = gpus.close_memory
        self.connection.completions.look_up_every(LOOK_PERIOD_S)
        #: What is known of requests, unless it is stale.
        self.forms: dict[FormKey, Form] = {}
        #: Requests that event loops wait for.
        self._watched = 0
        self._is_needed = threading.Condition()
        self._reader: threading.Thread | None = None

    def close(self) -> None:
        """Leave the server, which may have cut us off, and end the thread. What models have of answers stays theirs."""
        self.forms.clear()
        self.engine.close()
        with self._is_needed:
            self._is_needed.notify()

    def keep_form(self, key: FormKey, form: Form) -> None:
        """Remember that requests of this form fit their model."""
        for known, other in tuple(self.forms.items()):
            if other.is_stale:
                # Rows that it keeps ready would keep their slab.
                self.forms.pop(known, None)
        if len(self.forms) >= _FORMS_MAX:
            self.forms.clear()
        self.forms[key] = form

    def watch(self, pending: Pending, on_news: Callable[[], None]) -> None:
        """Have ``on_news`` called when there is something to take, whether or not any thread waits."""

        def take_news() -> None:
            with self._is_needed:
                self._watched -= 1
            on_news()

        with self._is_needed:
            self._watched += 1
            self._is_needed.notify()
            if self._reader is None:
                self._reader = threading.Thread(target=self._read, name="bls", daemon=True)
                self._reader.start()
        if not self.connection.completions.notify(pending, take_news):
            take_news()

    def _read(self) -> None:
        while True:
            with self._is_needed:
                while not self._watched:
                    if self.connection.is_broken:
                        return
                    self._is_needed.wait()
            # The end of the connection is news to everybody who waits.
            with contextlib.suppress(EngineGone):
                self.connection.completions.wait_any()


class Call:
    """A nested request in flight: a :class:`forebay.engine.backends.python_model.engine_access.NestedCall`."""

    __slots__ = ("_link", "_pending")

    def __init__(self, link: Link, pending: Pending) -> None:
        self._link = link
        self._pending = pending

    def wait(self) -> None:
        try:
            self._link.connection.completions.wait(self._pending)
        except EngineGone:
            pass  # What ends the connection ends the request, too: with that error.

    def notify(self, on_news: Callable[[], None]) -> None:
        self._link.watch(self._pending, on_news)

    def cancel(self) -> None:
        self._link.connection.cancel(self._pending)

    def abandon(self) -> None:
        self._link.connection.abandon(self._pending)

    @property
    def is_over(self) -> bool:
        return self._pending.is_done or self._pending.is_abandoned

    def _failed(self, error: ServingError) -> NestedResponse:
        """Return the last response of a request that has failed."""
        if isinstance(error, InvalidArgument) and not self._pending.has_run:
            # The queue has refused it, which Triton tells as what is wrong with the request itself (spec P-093).
            error = InvalidArgument(refusal_text(self._pending.model.name, error))
        return NestedResponse((), {}, error, True, True)


class _ReadyRows(NamedTuple):
    """Rows that a request can be put into."""

    pending: Pending
    inputs: list[Array]
    """Where the request's inputs go, in its order."""
    outputs: tuple[Tensor, ...]
    """Those that are wanted, where the other model will write them."""


class Form:
    """What requests of one form to one model have in common, and rows that are ready for the next of them.

    A model that calls another one waits for its answer, and has time to prepare its next call then.
    """

    __slots__ = (
        "_input_bytes",
        "_inputs",
        "_keeps_ready",
        "_link",
        "_outputs",
        "_ready",
        "_route",
        "_takes_all",
        "_takes_bare",
        "model",
        "rows",
        "uses_gpu",
    )

    def __init__(self, link: Link, model: Opened, rows: int, key: FormKey) -> None:
        """
        Args:
            rows: of each request.
            key: fits the model.
        """
        _name, _version, inputs, self._outputs, _allows_many_responses, _output_device = key
        self._link = link
        self.model = model
        self.rows = rows
        #: Whether any tensor is, or shall be, in the memory of a GPU.
        self.uses_gpu = uses_gpu(key)
        self._route = model.route
        self._inputs = [name for name, _datatype, _shape, _byte_size, _is_on_gpu in inputs]
        self._input_bytes = sum(byte_size for _name, _datatype, _shape, byte_size, _is_on_gpu in inputs)
        signature = model.signature
        has_all_inputs = len(inputs) >= len(signature.inputs)
        #: Whether requests may live in slab rows: all, or those that carry nothing but tensors.
        self._takes_all = has_all_inputs and signature.uses_rows
        self._takes_bare = (
            has_all_inputs and signature.allows_rows and len(self._outputs) in (0, len(signature.outputs))
        )
        self._keeps_ready = model.row_bytes * rows <= _READY_BYTES_MAX
        #: One, or none; whoever takes it out has it.
        self._ready: list[_ReadyRows] = []

    @property
    def is_stale(self) -> bool:
        """True if the server has loaded the model anew since."""
        return self._route != self.model.route

    def takes_rows(self, request: NestedRequest) -> bool:
        """Tell whether a request of this form may live in slab rows."""
        if not self._takes_bare or self._takes_all:
            return self._takes_all
        # A model that looks at requests finds nothing in this one but its tensors.
        return request.trace is None and not (
            request.id or request.parameters or request.timeout_us or request.correlation_id or request.flags
        )

    def call(self, request: NestedRequest, trace: Trace | None) -> RowsCall:
        """Copy the inputs of a request into rows and hand them over.

        Raises:
            ServingError: there is no room, or no server any more.
        """
        connection = self._link.connection
        try:
            pending, inputs, outputs = self._ready.pop()
        except IndexError:
            pending, inputs, outputs = self._prepare(connection.loan_rows(self.model, self.rows))
        for tensor, rows in zip(request.inputs, inputs, strict=True):
            rows[...] = tensor.data
        connection.memory.copied_bytes += self._input_bytes
        pending.timeout_us = request.timeout_us
        pending.trace = trace
        connection.submit(pending)
        if self._keeps_ready and not self._ready:
            # While the other model runs: this one would wait for it anyway.
            lease = connection.loan_rows_now(self.model, self.rows)
            if lease is not None:
                self._ready.append(self._prepare(lease))
                # Another thread may have done the same.
                del self._ready[1:]
        return RowsCall(self._link, pending, outputs)

    def _prepare(self, lease: RowsLease) -> _ReadyRows:
        model, rows, view = self.model, self.rows, self._link.connection.view
        max_batch_size = model.signature.max_batch_size
        inputs, _outputs = model.slab_arrays(view, lease.slab)
        # A model that does not batch has one row, without a dimension.
        chosen = slice(lease.first, lease.first + rows) if max_batch_size > 0 else (lease.first, ...)
        outputs: list[Tensor] = []
        for spec, offset in output_places(model, lease):
            if not self._outputs or spec.name in self._outputs:
                shape = full_shape(spec, rows, max_batch_size)
                array = leased_array(view, offset, spec.datatype, shape, lease)
                outputs.append(Tensor.of_datatype(spec.name, spec.datatype, array))
        own = [inputs[name][chosen] for name in self._inputs]
        return _ReadyRows(Pending(model, lease, rows), own, tuple(outputs))


class RowsCall(Call):
    """One whose tensors live in slab rows: it has one answer."""

    __slots__ = ("_outputs",)

    def __init__(self, link: Link, pending: Pending, outputs: tuple[Tensor, ...]) -> None:
        """
        Args:
            outputs: those that are wanted, where they will be.
        """
        super().__init__(link, pending)
        self._outputs = outputs

    def take(self) -> list[NestedResponse]:
        pending = self._pending
        if not pending.has_news:
            return []
        if pending.error is not None:
            return [self._failed(pending.error)]
        return [NestedResponse(self._outputs, pending.parameters, None, True, True)]


class BlockCall(Call):
    """One with blocks of its own: it may have any number of answers. Requests to ensembles are among them."""

    __slots__ = ("_placement", "_responses")

    def __init__(self, link: Link, placement: BlockPlacement, request: NestedRequest, options: Options) -> None:
        """Copy the inputs, which fit the model, into blocks and hand them over.

        Raises:
            ServingError: there is no room, or no server any more.
        """
        self._link = link
        self._placement = placement
        for tensor in request.inputs:
            self._put(tensor)
        self._responses: PendingResponses = placement.submit(options)
        super().__init__(link, self._responses)

    def _put(self, tensor: Tensor) -> None:
        """Place one input."""
        spec = self._placement.model.entry.input_named(tensor.name())
        assert spec is not None
        if tensor.device is None:
            self._placement.put(spec, tensor.data)
        else:
            tensor.copy_to(self._placement.input(spec, tensor.device.shape))

    def take(self) -> list[NestedResponse]:
        pending = self._responses
        is_over = self.is_over
        found: list[NestedResponse] = []
        while pending.responses and not pending.is_abandoned:
            found.append(self._response(*pending.responses.popleft()))
        if not is_over:
            return found
        if pending.error is not None:
            found.append(self._failed(pending.error))
        elif pending.ends_empty:
            # Triton, too, gives the end by itself as a response without outputs.
            found.append(NestedResponse((), {}, None, True, True))
        elif found:
            found[-1] = msgspec.structs.replace(found[-1], final=True)
        else:
            found.append(NestedResponse((), {}, None, False, True))
        return found

    def _response(self, reply: ReplyHead, held: tuple[BlockLease, ...]) -> NestedResponse:
        if reply.text or reply.code:
            return NestedResponse((), {}, from_wire(reply.code, reply.text), True, False)
        return NestedResponse(tuple(self._tensors(reply, held)), reply.parameters, None, True, False)

    def _tensors(self, reply: ReplyHead, held: tuple[BlockLease, ...]) -> Iterator[Tensor]:
        """Yield the outputs of a response."""
        datatypes = {place.name: place.datatype for place in reply.outputs}
        datatypes.update((tensor.name, tensor.datatype) for tensor in reply.inline)
        for name, array in self._placement.outputs_of(reply, held).items():
            yield Tensor.of_datatype(name, datatypes[name], array)
