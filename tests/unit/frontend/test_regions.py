"""Regions as one frontend knows them."""

from __future__ import annotations

import os

import pytest

from forebay.frontend.codec.infer_request import RegionData
from forebay.frontend.device_places import DeviceRegion
from forebay.frontend.regions import RegionTable, RegionUse
from forebay.ipc.arena import create_memory_file
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import Internal, InvalidArgument, NotFound
from forebay.ipc.messages import DeviceMemory
from forebay.ipc.regions import Region


def table(*names: str) -> tuple[RegionTable, list[int]]:
    regions, fds = RegionTable(), []
    for name in names:
        fds.append(create_memory_file(name, 4096))
        regions.add(Region(name, "system", fds[-1], 0, 4096))
    return regions, fds


def test_one_request_uses_several_places() -> None:
    regions, fds = table("a", "b")
    os.pwrite(fds[0], b"12345678", 100)
    source, target = RegionData("a", 8, 100), RegionData("b", 10, 50)
    use = RegionUse(regions, [source, target, source])
    place = bytearray(8)
    use.fill(memoryview(place), source)
    use.store("OUT", memoryview(place), target)
    assert os.pread(fds[1], 8, 50) == b"12345678"
    with pytest.raises(Internal) as caught:
        use.store("OUT", bytes(11), target)
    assert str(caught.value) == (
        "shared memory size specified with the request for output 'OUT' (10 bytes) should be at least 11 bytes to hold "
        "the results"
    )
    use.release()
    use.release()


def test_unknown_regions_and_wrong_places() -> None:
    regions, _ = table("a")
    with pytest.raises(NotFound, match="Unable to find shared memory region: 'b'"):
        RegionUse(regions, [RegionData("a", 1, 0), RegionData("b", 1, 0)])
    with pytest.raises(InvalidArgument, match="Invalid offset"):
        RegionUse(regions, [RegionData("a", 1, 4096)])


def test_a_removed_region_serves_who_uses_it() -> None:
    regions, fds = table("a")
    place = RegionData("a", 4, 0)
    use = RegionUse(regions, [place])
    regions.remove("a")
    regions.remove("a")
    with pytest.raises(NotFound):
        regions.find("a")
    use.fill(memoryview(bytearray(4)), place)
    use.release()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[0])


def test_a_removed_region_of_device_memory_is_reported_when_its_last_request_has_ended() -> None:
    """H-194."""
    unused: list[int] = []
    regions, place = RegionTable(), RegionData("d", 4, 0)
    courier = ModelEntry(name="courier", version=1, state="READY")
    regions.add(DeviceRegion("d", DeviceMemory(0, 1, 0, 4096, b"handle"), courier, unused.append))
    uses = [RegionUse(regions, [place]) for _ in range(2)]
    uses.pop().release()
    regions.remove("d")
    regions.add(DeviceRegion("d", DeviceMemory(0, 2, 0, 4096, b"handle"), courier, unused.append))
    RegionUse(regions, [place]).release()
    assert unused == []
    uses.pop().release()
    assert unused == [1]
    regions.remove("d")
    assert unused == [1, 2]
