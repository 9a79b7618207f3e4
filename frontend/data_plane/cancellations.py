"""What clients have left since the end of the last turn."""

from __future__ import annotations

from collections.abc import Mapping

from forebay.frontend.data_plane.owners import OwnedSlab, RowOwner
from forebay.ipc.messages import Cancel, RowsCancel


class Cancellations:
    """Collects cancellations until the turn's submissions have been sent, so that the scheduler knows what is meant."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        #: By route and slab: first row and owner of each request.
        self._rows: dict[tuple[int, int], list[tuple[int, RowOwner | None]]] = {}

    def __bool__(self) -> bool:
        return bool(self._tokens or self._rows)

    def add_parcel(self, token: int) -> None:
        self._tokens.append(token)

    def add_rows(self, route: int, slab: OwnedSlab, first: int) -> None:
        """Add the request that begins at row ``first``."""
        self._rows.setdefault((route, slab.base), []).append((first, slab.owners[first]))

    def take(self, producer: int, slabs: Mapping[int, tuple[object, OwnedSlab]]) -> Cancel | None:
        """Return the message for the scheduler, and forget; None: nothing is left to cancel.

        Args:
            slabs: all of this frontend, by their bases, each behind its route.
        """
        tokens, self._tokens = tuple(self._tokens), []
        rows: list[RowsCancel] = []
        for (route, base), requests in self._rows.items():
            found = slabs.get(base)
            # One that ended in this very turn is not meant: its rows may be another's by now.
            firsts = () if found is None else tuple(f for f, owner in requests if found[1].owners[f] is owner)
            if firsts:
                rows.append(RowsCancel(route=route, base=base, firsts=firsts))
        self._rows.clear()
        return Cancel(producer=producer, tokens=tokens, rows=tuple(rows)) if tokens or rows else None
