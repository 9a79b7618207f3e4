"""Every unary call but inference: one message in, one handler, one message out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

from forebay.frontend.grpc.call import Call
from forebay.frontend.grpc.http2.connection import Connection
from forebay.frontend.grpc.request_head import RequestHead
from forebay.frontend.grpc.status import RpcError, Status

if TYPE_CHECKING:
    from forebay.frontend.grpc.server import GrpcFrontend

#: Answers a request's bytes with a reply's.
Handler: TypeAlias = "Callable[[GrpcFrontend, memoryview], Awaitable[bytes]]"


class ControlCall(Call):
    """One unary call whose answer may need the supervisor."""

    __slots__ = ("_handler", "_task")

    def __init__(
        self,
        frontend: GrpcFrontend,
        connection: Connection[RequestHead],
        number: int,
        head: RequestHead,
        handler: Handler,
    ) -> None:
        super().__init__(frontend, connection, number, head)
        self._handler = handler
        self._task: asyncio.Task[None] | None = None

    @property
    def is_pending(self) -> bool:
        return self.is_receiving or (self._task is not None and not self._task.done())

    def take_message(self, message: memoryview) -> None:
        if self._task is not None:
            raise RpcError(Status.INTERNAL, "the request holds more than one message")
        self._task = self.frontend.run(self._answer(memoryview(bytes(message))))

    async def _answer(self, message: memoryview) -> None:
        try:
            reply = await self._handler(self.frontend, message)
        except asyncio.CancelledError:
            self.fail(RpcError(Status.CANCELLED))
            raise
        except Exception as error:
            self.fail(error)
            return
        self.reply((reply,), len(reply))

    def take_end(self) -> None:
        if self._task is None:
            self.fail(RpcError(Status.INTERNAL, "the request holds no message"))

    def cancelled(self) -> None:
        # A load or unload goes on in the supervisor; only its answer is no longer waited for.
        task = self._task
        if task is not None and task is not asyncio.current_task():
            task.cancel()
