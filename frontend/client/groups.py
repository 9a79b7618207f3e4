"""Many requests of equal form with one message: what each of them costs the client, the socket and the scheduler is
shared. They are requests of their own all the same: batched with others', answered and failed one by one.

::

    group = model.group(32)                      # 32 requests of one row each
    group.input("features")[:] = features        # float32 [32, 50]: a view of shared memory
    group.submit()
    y = group.result()                           # float32 [32, 1]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from forebay.client.opened import Opened
from forebay.client.options import NO_OPTIONS, Options, deadline_after
from forebay.client.pending import Array, PartOfRows, Pending, leased_array
from forebay.client.placement import unknown_tensor
from forebay.client.places import input_places, output_places
from forebay.ipc.errors import InvalidArgument, ServingError

if TYPE_CHECKING:
    from forebay.client.connection import Connection


class RequestGroup:
    """Requests in neighbouring rows of a slab: filled -> submitted -> answered. For one thread at a time."""

    def __init__(self, connection: Connection, model: Opened, count: int, rows: int) -> None:
        """Take rows; :meth:`forebay.client.model.Model.group` tells the rest.

        Raises:
            InvalidArgument: the model's tensors vary in size, or it does not take so many.
            ArenaFull: there is no room.
        """
        if not model.signature.allows_rows:
            raise InvalidArgument(f"model '{model.name}' does not take groups: its requests do not live in rows")
        if not 1 <= rows <= model.rows_max:
            raise InvalidArgument(f"model '{model.name}' takes 1 to {model.rows_max} rows at a time, not {rows}")
        if not 1 <= count <= connection.in_flight_max:
            raise InvalidArgument(f"a group has 1 to {connection.in_flight_max} requests, not {count}")
        self._connection = connection
        self._model = model
        self._lease = connection.loan_rows(model, count * rows)
        self._count = count
        self._rows = rows
        self._pendings: list[Pending] = []

    def __len__(self) -> int:
        return self._count

    def input(self, name: str) -> Array:
        """Return an input of all requests, one behind the other, to be filled in place.

        Returns:
            The datatype's numpy dtype, [requests * rows, *dims]; valid until the group is submitted.

        Raises:
            InvalidArgument: no such input.
        """
        for spec, offset in input_places(self._model, self._lease):
            if spec.name == name:
                shape = (self._lease.rows, *spec.dims)
                return leased_array(self._connection.view, offset, spec.datatype, shape, self._lease)
        raise unknown_tensor("input", name, self._model.signature.inputs, self._model.name)

    def put(self, name: str, values: npt.ArrayLike) -> None:
        """Copy an input of all requests in: [requests * rows, *dims]."""
        place = self.input(name)
        np.copyto(place, np.asarray(values, place.dtype))
        self._connection.memory.copied_bytes += place.nbytes

    def submit(self, options: Options = NO_OPTIONS) -> None:
        """Hand all requests over and return at once; waits only if too many are in flight.

        Args:
            options: priority and timeout of each.

        Raises:
            InvalidArgument: the group was submitted before, or the options need requests outside rows.
            EngineGone: the server has ended.
        """
        if self._pendings:
            raise InvalidArgument("a group is submitted once")
        if options.needs_parcel:
            raise InvalidArgument("requests of a group have no parameters and belong to no sequence")
        lease, rows = self._lease, self._rows
        for first in range(lease.first, lease.first + lease.rows, rows):
            pending = Pending(self._model, PartOfRows(lease, first, rows), rows)
            pending.priority, pending.timeout_us = options.priority, options.timeout_us
            self._pendings.append(pending)
        self._connection.submit_group(self._pendings, lease)

    def done(self) -> int:
        """Return how many requests are answered."""
        self._connection.completions.read_nowait()
        return sum(pending.is_done for pending in self._pendings)

    def wait(self, timeout_s: float | None = None) -> dict[int, ServingError]:
        """Wait for all answers; return the errors of those that failed, by their place in the group.

        Raises:
            DeadlineExceeded: ``timeout_s`` has passed; ask again, or cancel.
        """
        deadline_ns = deadline_after(timeout_s)
        # The last one is mostly answered last, and then the others need no waiting.
        for pending in reversed(self._pendings):
            if not pending.is_done:
                self._connection.completions.wait(pending, deadline_ns)
        return {index: pending.error for index, pending in enumerate(self._pendings) if pending.error is not None}

    def result(self, timeout_s: float | None = None, *, output: str | None = None) -> Array:
        """Wait for all answers and return an output: the one named, else the model's first.

        Returns:
            [requests * rows, *dims]; the rows are not used again as long as it lives.

        Raises:
            DeadlineExceeded: ``timeout_s`` has passed; ask again, or cancel.
            ServingError: the error of the first request that failed; see :meth:`wait`.
        """
        for error in self.wait(timeout_s).values():
            raise error
        for spec, offset in output_places(self._model, self._lease):
            if output in (None, spec.name):
                shape = (self._lease.rows, *spec.dims)
                return leased_array(self._connection.view, offset, spec.datatype, shape, self._lease)
        raise unknown_tensor("output", str(output), self._model.signature.outputs, self._model.name)

    def cancel(self) -> None:
        """Give all up; what has not started will not."""
        for pending in self._pendings:
            self._connection.cancel(pending)
