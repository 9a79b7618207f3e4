"""Where the tensors of an ensemble lie in this frontend's arena."""

from __future__ import annotations

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.ipc.ensemble.tensors import Tensor


class Block:
    """Arena bytes with a count of users; the maker is the first. Used in the event loop only."""

    __slots__ = ("_route", "_users", "byte_size", "offset")

    def __init__(self, route: RouteClient, byte_size: int) -> None:
        """Take room for a request of ``route``.

        Raises:
            ArenaFull: there is none.
        """
        self.byte_size = byte_size
        self.offset = route.engine.allocate(byte_size)
        self._route = route
        route.block_bytes += byte_size
        route.engine.want_gauges()
        self._users = 1

    def hold(self) -> None:
        self._users += 1

    def release(self) -> None:
        """One user less; the last one frees the bytes."""
        self._users -= 1
        if self._users == 0:
            self._route.engine.free(self.offset, self.byte_size)
            self._route.block_bytes -= self.byte_size

    def contains(self, offset: int) -> bool:
        return self.offset <= offset < self.offset + self.byte_size


def placed(tensor: Tensor, route: RouteClient) -> Tensor:
    """Return an inline tensor with a block of its own, for the caller to release; the copied bytes count for ``route``.

    Raises:
        ArenaFull: there is no room.
    """
    block = Block(route, tensor.byte_size)
    route.engine.view[block.offset : block.offset + tensor.byte_size] = tensor.data
    route.copied_in_bytes += tensor.byte_size
    return tensor._replace(offset=block.offset, block=block, data=b"")
