"""A large body of a known plan, received straight into slab rows."""

from __future__ import annotations

from forebay.frontend.http.call import PlannedCall
from forebay.frontend.http.connection import Connection
from forebay.frontend.http.fast_path import InferPlan
from forebay.frontend.http.head import Head


class PlannedUpload:
    """Rows that are being filled by the socket. Life: opened -> received -> submitted; ``abandon`` until then.

    The tensors' places are filled in the order in which they stand in the body.
    """

    def __init__(self, plan: InferPlan, head: Head, data: memoryview) -> None:
        """Take rows and put there what has arrived.

        Args:
            data: the JSON, and what came with it of the tensors.

        Raises:
            ArenaFull: there are no rows.
        """
        self._plan = plan
        self._head = head
        route = plan.route
        self._slab, self._first = route.loan(plan.rows)
        #: Places still to be filled; the first may be partly filled.
        self._places: list[memoryview] = []
        #: Bytes of the body that have not arrived yet.
        self.remaining_bytes = head.content_length - len(data)
        memory, areas = route.engine.view, self._slab.layout.inputs
        for start, end, index in plan.copies:
            offset, row_bytes = areas[index]
            begin = self._slab.base + offset + self._first * row_bytes
            place = memory[begin : begin + end - start]
            arrived = data[start:end]
            if arrived:
                place[: len(arrived)] = arrived
                route.copied_in_bytes += len(arrived)
            if len(arrived) < len(place):
                self._places.append(place[len(arrived) :])

    def next_place(self) -> memoryview:
        """Return where the next bytes go; never empty while the upload lasts."""
        return self._places[0]

    def received(self, count: int) -> bool:
        """Note that ``count`` bytes have arrived; True: the body is complete."""
        self.remaining_bytes -= count
        rest = self._places[0][count:]
        if rest:
            self._places[0] = rest
        else:
            del self._places[0]
        return not self._places

    def submit(self, connection: Connection) -> None:
        """The body is complete: hand the request over."""
        plan = self._plan
        call = PlannedCall(connection, plan, keep_alive=self._head.keep_alive)
        call.slab, call.first = self._slab, self._first
        connection.add_call(call)
        plan.route.publish(self._slab, self._first, plan.rows, call, plan.priority, plan.timeout_us)
        connection.sort(plan.route.first_model)

    def abandon(self) -> None:
        """The client has left: give the rows back."""
        self._plan.route.release(self._slab, self._first, self._plan.rows)
