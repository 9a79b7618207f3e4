"""Who is called back when a request in rows or a parcel has its answer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from forebay.ipc.ensemble.device_rooms import DeviceRoom
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import ParameterValue, ReplyHead
from forebay.ipc.slabs import Slab

#: Most responses have none.
NO_PARAMETERS: Mapping[str, ParameterValue] = MappingProxyType({})


class RowOwner(Protocol):
    """Who waits for a request in slab rows."""

    @property
    def rows(self) -> int:
        """How many rows the request has."""
        ...

    def rows_done(self, slab: OwnedSlab, first: int, parameters: Mapping[str, ParameterValue] = NO_PARAMETERS) -> None:
        """The outputs are in place. The rows are released when this returns.

        Args:
            parameters: of the response, besides those that every response of the model has.
        """
        ...

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        """There are no outputs; ``ran`` tells whether a worker tried. The rows are released when this returns."""
        ...


OwnedSlab = Slab[RowOwner]


class ParcelOwner(Protocol):
    """Who waits for a parcel."""

    def parcel_reply(self, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        """One response; an error if ``reply.text`` is set. Places are valid until the owner frees its blocks."""
        ...

    def lend(self, byte_size: int) -> int:
        """Return the offset of a reply block of at least this size.

        Raises:
            ArenaFull: there is no room.
        """
        ...

    def lend_rooms(self, needs: Mapping[str, int]) -> Mapping[str, DeviceRoom]:
        """Return room on the GPU for outputs that wait there, whose bytes these are; what finds none is missing."""
        ...
