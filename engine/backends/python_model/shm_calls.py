"""Nested requests (BLS) in flight, over a worker's own connection as a shared-memory client."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from forebay.client import shm
from forebay.client.errors import EngineGone
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.pending import BlockLease, Pending, PendingResponses, RowsLease, leased_array
from forebay.client.placement import BlockPlacement
from forebay.client.places import full_shape, output_places
from forebay.engine.backends.python_model.engine_access import NestedRequest, NestedResponse, refusal_text
from forebay.engine.backends.python_model.gpus import gpus
from forebay.engine.backends.python_model.outer_requests import LOOK_PERIOD_S
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.ipc.errors import InvalidArgument, ServingError, from_wire
from forebay.ipc.messages import ReplyHead
from forebay.ipc.spans import Trace


class Link:
    """One connection, and the thread that reads its answers while event loops wait for some."""

    def __init__(self, engine: shm.Engine) -> None:
        self.engine = engine
        self.connection = engine.connection
        self.connection.device_pools.on_over = gpus.close_memory
        self.connection.completions.look_up_every(LOOK_PERIOD_S)
        #: Requests that event loops wait for.
        self._watched = 0
        self._is_needed = threading.Condition()
        self._reader: threading.Thread | None = None

    def close(self) -> None:
        """Leave the server, which may have cut us off, and end the thread. What models have of answers stays theirs."""
        self.engine.close()
        with self._is_needed:
            self._is_needed.notify()

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


class RowsCall(Call):
    """One whose tensors live in slab rows: it has one answer."""

    __slots__ = ("_outputs",)

    def __init__(self, link: Link, model: Opened, rows: int, request: NestedRequest, trace: Trace | None) -> None:
        """Copy the inputs, which fit the model, into rows and hand them over.

        Raises:
            ServingError: there is no room, or no server any more.
        """
        connection = link.connection
        lease = connection.loan_rows(model, rows)
        inputs, _outputs = model.slab_arrays(connection.view, lease.slab)
        chosen = _chosen(model, lease)
        for tensor in request.inputs:
            data = tensor.data
            inputs[tensor.name()][chosen] = data
            connection.memory.copied_bytes += data.nbytes
        pending = Pending(model, lease, rows)
        pending.timeout_us = request.timeout_us
        pending.trace = trace
        connection.submit(pending)
        super().__init__(link, pending)
        # While the other model runs: this one would wait for it anyway.
        self._outputs = self._tensors(model, lease, rows, request.outputs)

    def _tensors(self, model: Opened, lease: RowsLease, rows: int, wanted: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the outputs that are wanted (none: all), where the other model will write them."""
        view, max_batch_size = self._link.connection.view, model.signature.max_batch_size
        tensors: list[Tensor] = []
        for spec, offset in output_places(model, lease):
            if not wanted or spec.name in wanted:
                shape = full_shape(spec, rows, max_batch_size)
                array = leased_array(view, offset, spec.datatype, shape, lease)
                tensors.append(Tensor.of_datatype(spec.name, spec.datatype, array))
        return tuple(tensors)

    def take(self) -> list[NestedResponse]:
        pending = self._pending
        if not pending.has_news:
            return []
        if pending.error is not None:
            return [self._failed(pending.error)]
        return [NestedResponse(self._outputs, pending.parameters, None, True, True)]


def _chosen(model: Opened, lease: RowsLease) -> slice | int:
    """Return which rows of a slab's arrays a request has; a model that does not batch has one, without a dimension."""
    return slice(lease.first, lease.first + lease.rows) if model.signature.max_batch_size > 0 else lease.first


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
            found[-1] = found[-1]._replace(final=True)
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
