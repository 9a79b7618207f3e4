"""Requests of one connection that have been taken and not yet answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.data_plane.owners import NO_PARAMETERS, OwnedSlab
from forebay.frontend.http.fast_path import InferPlan
from forebay.frontend.http.replies import error_reply
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import ParameterValue

if TYPE_CHECKING:
    from forebay.frontend.http.connection import Connection


class Call:
    """A request that has been taken and not yet answered; its place in the order of answers."""

    __slots__ = ("buffers", "connection", "keep_alive")

    def __init__(self, connection: Connection, *, keep_alive: bool) -> None:
        self.connection = connection
        self.keep_alive = keep_alive
        #: The answer, once it is known but not yet its turn.
        self.buffers: list[bytes] | None = None

    def cancel(self) -> None:
        """The client has left."""

    def count_copy(self, count: int) -> None:
        """Note that so many bytes of the reply were copied (I-1)."""


class PlannedCall(Call):
    """A request of a known plan, waiting in slab rows."""

    __slots__ = ("first", "plan", "slab")

    def __init__(self, connection: Connection, plan: InferPlan, *, keep_alive: bool) -> None:
        self.connection = connection
        self.keep_alive = keep_alive
        self.buffers = None
        self.plan = plan
        self.slab: OwnedSlab | None = None
        self.first = 0

    @property
    def rows(self) -> int:
        return self.plan.rows

    def rows_done(self, slab: OwnedSlab, first: int, parameters: Mapping[str, ParameterValue] = NO_PARAMETERS) -> None:
        plan = self.plan
        view = plan.route.engine.view
        rows = plan.rows
        areas = slab.layout.outputs
        buffers: list[Buffer] = [plan.reply_head_with(parameters) if parameters else plan.reply_head]
        for index in plan.outputs:
            offset, row_bytes = areas[index]
            start = slab.base + offset + first * row_bytes
            buffers.append(view[start : start + rows * row_bytes])
        self.connection.answer(self, buffers)

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        content_type = "text/plain" if ran else "application/json"
        self.connection.answer(self, [error_reply(error, content_type, self.plan.connection_line)])

    def cancel(self) -> None:
        if self.slab is not None:
            self.plan.route.cancel_rows(self.slab, self.first, self)

    def count_copy(self, count: int) -> None:
        self.plan.route.copied_out_bytes += count
