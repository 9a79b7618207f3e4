"""The regions that clients have registered, as one frontend knows them, and their use by one request.

The supervisor opens a region and sends each frontend its descriptor over the lifeline; a region is usable by every
protocol when ``register`` has been answered (spec H-192, H-194).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from forebay.frontend.codec.infer_request import ParsedInfer, ParsedOutput, RegionData
from forebay.frontend.device_places import NO_TARGETS, DevicePlace, DeviceRegion, Targets
from forebay.frontend.inference import InputTensor
from forebay.ipc.errors import Internal, NotFound
from forebay.ipc.frontend_messages import RegionUp
from forebay.ipc.regions import Region

AnyRegion: TypeAlias = Region | DeviceRegion


def open_region(message: RegionUp, fds: Sequence[int], on_unused: Callable[[int], None]) -> AnyRegion:
    """Return the region that the supervisor announces; takes ownership of its descriptors.

    Args:
        on_unused: see :class:`DeviceRegion`.
    """
    if message.memory is not None and message.courier is not None:
        return DeviceRegion(message.name, message.memory, message.courier, on_unused)
    return Region(message.name, message.kind, fds[0], message.offset, message.byte_size)


class RegionTable:
    """Every usable region by name."""

    def __init__(self) -> None:
        self._regions: dict[str, AnyRegion] = {}

    def add(self, region: AnyRegion) -> None:
        """Make a region usable; takes ownership."""
        self.remove(region.name)
        self._regions[region.name] = region

    def remove(self, name: str) -> None:
        """Use a region for no further request."""
        region = self._regions.pop(name, None)
        if region is not None:
            region.retire()

    def find(self, name: str) -> AnyRegion:
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
        self._regions: dict[str, AnyRegion] = {}
        for place in places:
            region = table.find(place.region)
            region.check(place.offset, place.byte_size)
            self._regions[place.region] = region
        for region in self._regions.values():
            region.acquire()

    def device_place(self, source: RegionData) -> DevicePlace | None:
        """Return where a tensor is in device memory; None: it is not there."""
        region = self._regions[source.region]
        if not isinstance(region, DeviceRegion):
            return None
        return DevicePlace(region.memory, source.offset, source.byte_size, region.courier)

    def targets(self, outputs: Iterable[ParsedOutput]) -> Targets:
        """Return those outputs that go to device memory; classes never do."""
        found = {
            output.name: self.device_place(output.region)
            for output in outputs
            if output.region is not None and not output.classification
        }
        return {name: place for name, place in found.items() if place is not None}

    def fill(self, place: memoryview, source: RegionData) -> None:
        """Read an input; ``place`` has its byte size. What is in device memory stays there.

        Raises:
            InvalidArgument: the client has truncated the region.
        """
        region = self._regions[source.region]
        if isinstance(region, Region):
            region.read_into(place, source.offset)

    def store(self, name: str, data: memoryview | bytes, target: RegionData) -> None:
        """Write output ``name``. What goes to device memory is there already.

        Raises:
            Internal: the client has left less room than it needs (spec H-198).
            InvalidArgument: the client has truncated the region.
        """
        region = self._regions[target.region]
        if not isinstance(region, Region):
            return
        if len(data) > target.byte_size:
            raise Internal(
                f"shared memory size specified with the request for output '{name}' ({target.byte_size} bytes) should "
                f"be at least {len(data)} bytes to hold the results"
            )
        region.write_from([data], target.offset)

    def release(self) -> None:
        """The request has ended, one way or another; may be called again."""
        regions, self._regions = self._regions, {}
        for region in regions.values():
            region.release()


def targets_of(request: ParsedInfer, regions: RegionUse | None) -> Targets:
    """Return which outputs go to device memory."""
    return NO_TARGETS if regions is None else regions.targets(request.outputs)


def take_places(request: ParsedInfer, regions: RegionUse | None = None) -> list[InputTensor]:
    """Return the inputs as the engine places them."""
    return [
        InputTensor(
            tensor.name,
            tensor.datatype,
            tensor.shape,
            tensor.source.byte_size,
            regions.device_place(tensor.source)
            if isinstance(tensor.source, RegionData) and regions is not None
            else None,
        )
        for tensor in request.inputs
    ]
