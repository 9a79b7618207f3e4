"""``grpc.health.v1.Health``: Check, and Watch, which Triton does not have (spec G-018, G-019, L-033)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.frontend.grpc.call import Call
from forebay.frontend.grpc.status import STOPPING_TEXT, RpcError, Status
from forebay.frontend.grpc.wire import fields, integer_field

if TYPE_CHECKING:
    from forebay.frontend.grpc.server import GrpcFrontend

_SERVING = integer_field(1, 1)
_NOT_SERVING = integer_field(1, 2)


def _status(frontend: GrpcFrontend) -> bytes:
    """Return a ``HealthCheckResponse``; the service's name is ignored, as Triton does."""
    is_serving = frontend.catalog.catalog.ready and not frontend.is_draining
    return _SERVING if is_serving else _NOT_SERVING


async def check(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """Answer ``Check``."""
    for _field in fields(message):
        pass
    return _status(frontend)


class WatchCall(Call):
    """One ``Watch``: the state now, and every time it changes."""

    __slots__ = ("_last",)

    _last: bytes

    def opened(self) -> None:
        """Finish construction; called once, before any message."""
        self._last = b""

    def take_message(self, message: memoryview) -> None:
        if self._last:
            raise RpcError(Status.INTERNAL, "the request holds more than one message")
        for _field in fields(message):
            pass
        self.frontend.watch(self._look)
        self._look()

    def _look(self) -> None:
        state = _status(self.frontend)
        if state != self._last:
            self._last = state
            self.send((state,), len(state))

    def take_end(self) -> None:
        if not self._last:
            self.fail(RpcError(Status.INTERNAL, "the request holds no message"))

    def wind_up(self) -> None:
        self._look()
        self.fail(RpcError(Status.UNAVAILABLE, STOPPING_TEXT))

    def cancelled(self) -> None:
        self.frontend.unwatch(self._look)
