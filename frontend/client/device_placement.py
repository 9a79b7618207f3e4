"""A request some of whose tensors lie in device memory that the server keeps for this client; not opened here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from forebay.client.connection import Connection
from forebay.client.device_pools import DeviceLease
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.parcels import describe
from forebay.client.pending import BlockLease, PendingParcel, PendingResponses
from forebay.client.placement import BlockPlacement
from forebay.ipc.ensemble.device_rooms import device_targets
from forebay.ipc.ensemble.device_tensors import ClientDevices
from forebay.ipc.messages import DeviceMemory, TensorPlace
from forebay.ipc.tensor import TensorSpec


class DevicePlacement(BlockPlacement):
    """Inputs and outputs in blocks of an arena, or of device memory."""

    def __init__(self, connection: Connection, model: Opened) -> None:
        super().__init__(connection, model)
        self._memories: list[DeviceMemory] = []
        self._targets: dict[str, DeviceLease | None] = {}
        #: Outputs of an ensemble that may be in the memory of GPUs.
        self._output_devices: ClientDevices = {}
        #: Takes device memory for an output, once its size is known.
        self._take_room: Callable[[int], DeviceLease | None] | None = None

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

    def want_leased(self, name: str, lease: DeviceLease | None) -> None:
        """Have an output written to a block of device memory, if it fits there; None: one is taken when it is there."""
        self._targets[name] = lease

    def take_outputs_on(self, devices: Collection[int]) -> None:
        """Let all outputs of an ensemble be in the memory of these GPUs, where the steps that make them live there."""
        self._output_devices = {spec.name: devices for spec in self.model.signature.outputs}

    def take_rooms_by(self, take_room: Callable[[int], DeviceLease | None]) -> None:
        """Say who has device memory for outputs that do not fit, by their bytes. The connection's lock is held then."""
        self._take_room = take_room

    def _ensemble_request(
        self, inputs: Sequence[tuple[TensorPlace, BlockLease]], rows: int, options: Options
    ) -> PendingResponses:
        return self._connection.ensemble_request(self.model, inputs, rows, options, self._output_devices)

    def _describe(
        self, pending: PendingParcel, places: Sequence[TensorPlace], reply: BlockLease, options: Options
    ) -> None:
        memories, targets = device_targets(self._memories, self._targets)
        view = self._connection.view
        describe(pending, places, reply, options, view, memories=memories, targets=targets, may_wait=bool(targets))
        pending.targets = {name: lease for name, lease in self._targets.items() if lease is not None}
        if self._take_room is not None:
            pending.take_room = self._take_room
