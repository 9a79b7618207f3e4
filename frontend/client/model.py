"""A model as callers use it: fill inputs in place, run, read outputs in place.

A handle may be shared by threads: each of them has a request of its own that it fills.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from forebay.client.groups import RequestGroup
from forebay.client.opened import Opened
from forebay.client.options import NO_OPTIONS, Options, deadline_after
from forebay.client.pending import Array, Pending, PendingResponses
from forebay.client.placement import BlockPlacement, Placement, RowsPlacement, unknown_tensor
from forebay.client.places import input_shape
from forebay.ipc.errors import Cancelled, InvalidArgument, from_wire
from forebay.ipc.tensor import TensorSpec

if TYPE_CHECKING:
    from forebay.client.connection import Connection
    from forebay.client.shm import Engine


class Future:
    """A request in flight. Results are views of shared memory, which stay as they are as long as anybody has them."""

    __slots__ = ("_connection", "_is_cancelled", "_placement", "pending")

    def __init__(self, connection: Connection, placement: Placement, pending: Pending) -> None:
        self._connection = connection
        self._placement = placement
        #: The request itself.
        self.pending = pending
        self._is_cancelled = False

    def done(self) -> bool:
        """True if ``result`` would return, or raise, at once."""
        if not self.pending.has_news:
            self._connection.completions.read_nowait()
        return self.pending.has_news or self._is_cancelled

    def cancelled(self) -> bool:
        return self._is_cancelled

    def cancel(self) -> bool:
        """Give the request up; False if its answer is here already. What has not started will not."""
        if self.pending.has_news:
            return False
        self._is_cancelled = True
        self._connection.cancel(self.pending)
        return True

    def result(self, timeout_s: float | None = None, *, output: str | None = None) -> Array:
        """Wait for the answer and return an output: the one named, else the model's first.

        Raises:
            DeadlineExceeded: ``timeout_s`` has passed; ask again, or cancel.
            Cancelled: ``cancel`` was called.
            ServingError: the server's answer.
        """
        self._finish(timeout_s)
        return self._placement.leased_output(self.pending, output)

    def outputs(self, timeout_s: float | None = None) -> dict[str, Array]:
        """Wait for the answer and return every output by name; raises like :meth:`result`."""
        self._finish(timeout_s)
        names = [spec.name for spec in self._placement.model.signature.outputs]
        return {name: self._placement.leased_output(self.pending, name) for name in names}

    def _finish(self, timeout_s: float | None) -> None:
        if self._is_cancelled:
            raise Cancelled("the request was cancelled")
        pending = self.pending
        if not pending.has_news:
            self._connection.completions.wait(pending, deadline_after(timeout_s))
        pending.raise_error()


class Model:
    """One model of the server; ``engine.model(name)`` makes it."""

    def __init__(self, engine: Engine, name: str, version: int) -> None:
        """Look it up.

        Raises:
            ServingError: there is no such model.
        """
        self._engine = engine
        self.name = name
        self._wanted_version = version
        self._local = threading.local()
        self._connection = engine.connection
        self._opened: Opened = self._connection.open_model(name, version)

    # --- what it is ---

    @property
    def version(self) -> int:
        """The version that answers."""
        return self._opened.version

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._opened.signature.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._opened.signature.outputs

    @property
    def max_batch_size(self) -> int:
        """Rows of a request at most; 0: the model does not batch."""
        return self._opened.signature.max_batch_size

    @property
    def is_decoupled(self) -> bool:
        """True if a request may have any number of responses: use :meth:`stream`."""
        return self._opened.signature.is_decoupled

    # --- filling ---

    def input(self, name: str, rows: int | None = None, *, shape: tuple[int, ...] | None = None) -> Array:
        """Return an input of this thread's next request: a view of shared memory, to be filled in place.

        Args:
            rows: batch items of the request; None: as many as before, at first 1.
            shape: full shape, for inputs whose shape varies.

        Returns:
            The datatype's numpy dtype (BF16: uint16), full shape with the batch dimension; what it holds is left over
            from earlier requests. Valid until the request is submitted, and again for ``infer`` after ``infer``.

        Raises:
            InvalidArgument: no such input, or it cannot have that shape.
            ArenaFull: there is no room.
        """
        if rows is not None and shape is None and not self._opened.signature.allows_rows:
            spec = self._input_named(name)
            limit = self.max_batch_size
            shape = input_shape(spec, rows, limit) if limit > 0 and -1 not in spec.dims else None
        return self._placement(rows, shape).input(self._input_named(name), shape)

    def put(self, name: str, values: npt.ArrayLike) -> None:
        """Copy an input of this thread's next request in; the only way for BYTES.

        Args:
            values: full shape with the batch dimension; BYTES as ``bytes`` or ``str`` elements.

        Raises:
            InvalidArgument: no such input, or it has another datatype or shape.
            ArenaFull: there is no room.
        """
        spec = self._input_named(name)
        if spec.datatype == "BYTES" and not isinstance(values, np.ndarray):
            array: Array = np.array(values, dtype=np.object_)
        else:
            array = np.asarray(values)
        rows = array.shape[0] if self.max_batch_size > 0 and array.ndim else None
        self._placement(rows, array.shape).put(spec, array)

    def _input_named(self, name: str) -> TensorSpec:
        for spec in self._opened.signature.inputs:
            if spec.name == name:
                return spec
        raise unknown_tensor("input", name, self._opened.signature.inputs, self.name)

    def _placement(self, rows: int | None, shape: tuple[int, ...] | None) -> Placement:
        placement: Placement | None = getattr(self._local, "placement", None)
        if (
            placement is not None
            and placement.model is self._opened
            and placement.matches(rows, shape)
            and self._connection is self._engine.connection
        ):
            return placement
        self._rebind()
        self._local.placement = None
        if self._opened.signature.allows_rows:
            placement = RowsPlacement(self._connection, self._opened, 1 if rows is None else rows)
        else:
            placement = BlockPlacement(self._connection, self._opened)
        self._local.placement = placement
        return placement

    def _rebind(self) -> None:
        """Follow the engine to the connection that it has now."""
        connection = self._engine.connection
        connection.check_usable()
        if connection is not self._connection:
            self._opened = connection.open_model(self.name, self._wanted_version)
            self._connection = connection

    # --- running ---

    def infer(
        self,
        *,
        timeout_s: float | None = None,
        options: Options = NO_OPTIONS,
    ) -> Array:
        """Run this thread's request and wait for its answer.

        Args:
            timeout_s: how long to wait; None: until there is an answer.
            options: id, priority, sequence and so on.

        Returns:
            The model's first output, full shape: a view of shared memory, valid until this thread's next call. Others:
            :meth:`output`.

        Raises:
            InvalidArgument: an input was not filled.
            DeadlineExceeded: ``timeout_s`` has passed; the request may still run.
            EngineGone: the server has ended; ``engine.reconnect()``.
            ServingError: the server's answer.
        """
        self._local.answered = None
        placement = self._filled(options)
        deadline_ns = 0
        if timeout_s is not None:
            deadline_ns = deadline_after(timeout_s)
            options = with_deadline(options, deadline_ns)
        pending = placement.submit(options)
        try:
            if not pending.has_news:
                self._connection.completions.wait(pending, deadline_ns)
        except BaseException:
            # Whoever fills the next request must not write into this one, which may still run.
            self._local.placement = None
            self._connection.cancel(pending)
            raise
        pending.raise_error()
        self._local.answered = placement, pending
        return placement.output(pending, None)

    def output(self, name: str) -> Array:
        """Return an output of this thread's last ``infer``, valid until its next call.

        Raises:
            InvalidArgument: no such output, or nothing was inferred.
        """
        answered: tuple[Placement, Pending] | None = getattr(self._local, "answered", None)
        if answered is None:
            raise InvalidArgument(f"model '{self.name}' has no answer in this thread")
        placement, pending = answered
        if all(spec.name != name for spec in self._opened.signature.outputs):
            raise unknown_tensor("output", name, self._opened.signature.outputs, self.name)
        return placement.output(pending, name)

    def submit(self, *, options: Options = NO_OPTIONS) -> Future:
        """Hand this thread's request over and return at once; the next ``input`` belongs to the next request.

        Raises:
            InvalidArgument: an input was not filled.
            EngineGone: the server has ended.
        """
        placement = self._filled(options)
        self._local.placement = None
        return Future(self._connection, placement, placement.submit(options))

    def group(self, count: int, rows: int = 1) -> RequestGroup:
        """Return so many requests of equal form, to be filled, handed over and waited for together.

        Args:
            rows: batch items of each.

        Raises:
            InvalidArgument: the model's tensors vary in size, or it does not take so many.
            ArenaFull: there is no room.
        """
        self._rebind()
        return RequestGroup(self._connection, self._opened, count, rows)

    def stream(self, *, timeout_s: float | None = None, options: Options = NO_OPTIONS) -> Iterator[Mapping[str, Array]]:
        """Run this thread's request and yield each response of a decoupled model, outputs by name.

        Raises:
            DeadlineExceeded: ``timeout_s`` has passed before the last response.
            ServingError: the server's answer; responses may have come before.
        """
        placement = self._filled(options)
        self._local.placement = None
        deadline_ns = deadline_after(timeout_s)
        pending = placement.submit(with_deadline(options, deadline_ns) if deadline_ns else options)
        if not isinstance(placement, BlockPlacement) or not isinstance(pending, PendingResponses):
            yield Future(self._connection, placement, pending).outputs(timeout_s)
            return
        try:
            while True:
                self._connection.completions.wait(pending, deadline_ns)
                while pending.responses:
                    reply, held = pending.responses.popleft()
                    if reply.text or reply.code:
                        raise from_wire(reply.code, reply.text)
                    yield placement.outputs_of(reply, held)
                if pending.is_done:
                    break
        finally:
            self._connection.cancel(pending)
        pending.raise_error()

    def _filled(self, options: Options) -> Placement:
        """Return the request that this thread has filled, in the form in which its model gets it."""
        placement: Placement | None = getattr(self._local, "placement", None)
        if placement is None:
            self._connection.check_usable()
            raise InvalidArgument(f"no input of model '{self.name}' was filled: call input() or put() first")
        if isinstance(placement, RowsPlacement) and not placement.model.signature.uses_rows and not options.is_bare:
            return placement.as_blocks()
        return placement


def with_deadline(options: Options, deadline_ns: int) -> Options:
    """Return options that tell the engine that nobody waits after ``deadline_ns``."""
    return msgspec.structs.replace(options, deadline_ns=deadline_ns)
