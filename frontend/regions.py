"""The regions that clients have registered, as one frontend knows them, and their use by one request.

The supervisor opens a region and sends each frontend its descriptor over the lifeline; a region is usable by every
protocol when ``register`` has been answered (spec H-192, H-194).
"""

from __future__ import annotations

from collections.abc import Iterable

from forebay.frontend.codec.infer_request import RegionData
from forebay.ipc.errors import Internal, NotFound
from forebay.ipc.regions import Region


class RegionTable:
    """Every usable region by name."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

    def add(self, region: Region) -> None:
        """Make a region usable; takes ownership."""
        self.remove(region.name)
        self._regions[region.name] = region

    def remove(self, name: str) -> None:
        """Use a region for no further request."""
        region = self._regions.pop(name, None)
        if region is not None:
            region.retire()

    def find(self, name: str) -> Region:
        """Return a region.

        Raises:
            NotFound: there is none of that name (spec H-200).
        """
        try:
            return self._regions[name]
        except KeyError:
            raise NotFound(f"Unable to find shared memory region: '{name}'") from None


class RegionUse:
    """The regions of one request, from its parsing until :meth:`release`."""

    __slots__ = ("_regions",)

    def __init__(self, table: RegionTable, places: Iterable[RegionData]) -> None:
        """Find the regions and check the places in them.

        Raises:
            NotFound: one is not registered.
            InvalidArgument: a place lies outside of its region.
        """
        self._regions: dict[str, Region] = {}
        for place in places:
            region = table.find(place.region)
            region.check(place.offset, place.byte_size)
            self._regions[place.region] = region
        for region in self._regions.values():
            region.acquire()

    def fill(self, place: memoryview, source: RegionData) -> None:
        """Read an input; ``place`` has its byte size.

        Raises:
            InvalidArgument: the client has truncated the region.
        """
        self._regions[source.region].read_into(place, source.offset)

    def store(self, name: str, data: memoryview | bytes, target: RegionData) -> None:
        """Write output ``name``.

        Raises:
            Internal: the client has left less room than it needs (spec H-198).
            InvalidArgument: the client has truncated the region.
        """
        if len(data) > target.byte_size:
            raise Internal(
                f"shared memory size specified with the request for output '{name}' ({target.byte_size} bytes) should "
                f"be at least {len(data)} bytes to hold the results"
            )
        self._regions[target.region].write_from([data], target.offset)

    def release(self) -> None:
        """The request has ended, one way or another; may be called again."""
        regions, self._regions = self._regions, {}
        for region in regions.values():
            region.release()
