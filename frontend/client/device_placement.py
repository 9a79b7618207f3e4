"""A request some of whose tensors lie in device memory that the server keeps for this client; not opened here."""

from __future__ import annotations

from collections.abc import Sequence

from forebay.client.connection import Connection
from forebay.client.device_pools import DeviceLease
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.parcels import describe, device_targets
from forebay.client.pending import BlockLease, PendingParcel
from forebay.client.placement import BlockPlacement
from forebay.ipc.messages import DeviceMemory, TensorPlace
from forebay.ipc.tensor import TensorSpec


class DevicePlacement(BlockPlacement):
    """Inputs and outputs in blocks of an arena, or of device memory."""

    def __init__(self, connection: Connection, model: Opened) -> None:
        super().__init__(connection, model)
        self._memories: list[DeviceMemory] = []
        self._targets: dict[str, DeviceLease] = {}

    def put_leased(self, spec: TensorSpec, shape: Sequence[int], size: int, lease: DeviceLease) -> None:
        """Let an input be what lies at the beginning of a block of device memory.

        Raises:
            InvalidArgument: the shape is not the model's.
        """
        if lease.memory not in self._memories:
            self._memories.append(lease.memory)
        number = self._memories.index(lease.memory) + 1
        place = TensorPlace(spec.name, spec.datatype, self._shape_of(spec, shape), lease.offset, size, memory=number)
        self._inputs[spec.name] = (place, lease)

    def want_leased(self, name: str, lease: DeviceLease) -> None:
        """Have an output written to a block of device memory, if it fits there."""
        self._targets[name] = lease

    def target(self, place: TensorPlace) -> DeviceLease | None:
        """Return the block that an output of the answer lies in; None: it is none of ours."""
        lease = self._targets.get(place.name)
        return lease if lease is not None and lease.contains(place.offset, place.byte_size) else None

    def _describe(
        self, pending: PendingParcel, places: Sequence[TensorPlace], reply: BlockLease, options: Options
    ) -> None:
        memories, targets = device_targets(self._memories, self._targets)
        view = self._connection.view
        describe(pending, places, reply, options, view, memories=memories, targets=targets, may_spill=True)
        pending.targets = tuple(self._targets.values())
