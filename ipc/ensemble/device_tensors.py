"""Which tensors of an ensemble may stay on a GPU between its steps, and how the steps are told where they lie. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from forebay.ipc.arena import align
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.ensemble.graph import GraphPlan, NeededStep
from forebay.ipc.ensemble.tensors import Tensor
from forebay.ipc.messages import DeviceMemory, Rooms, TensorPlace
from forebay.ipc.tensor import byte_size


class DeviceRoom(Protocol):
    """Bytes of a device memory."""

    @property
    def memory(self) -> DeviceMemory: ...

    @property
    def offset(self) -> int: ...

    @property
    def byte_size(self) -> int: ...


def device_outputs(
    needed: NeededStep, entry: ModelEntry, rows: int, plan: GraphPlan, model_of: Callable[[int], ModelEntry]
) -> dict[str, int]:
    """Return which outputs of a step may stay on its model's GPU, by the model's names, and their bytes; 0: they vary.

    Those that nobody reads but steps on the same GPU: no client, no response cache, no other device.

    Args:
        entry: of the step's model, which takes tensors on a GPU.
        rows: batch items, at least 1.
        model_of: the model of a step, by its number.
    """
    if entry.decoupled or entry.response_cache:
        return {}
    found: dict[str, int] = {}
    for name in needed.outputs:
        spec, tensor = entry.output_named(name), needed.step.outputs[name]
        if spec is None or spec.datatype == "BYTES" or tensor in plan.outputs:
            continue
        if all(_reads_on(entry.device_id, reader, tensor, model_of(reader.number)) for reader in plan.readers[tensor]):
            shape = (rows, *spec.dims) if entry.max_batch_size > 0 else spec.dims
            found[name] = byte_size(spec.datatype, shape) if spec.is_fixed else 0
    return found


def _reads_on(device_id: int, reader: NeededStep, tensor: str, entry: ModelEntry) -> bool:
    """Whether a step takes a tensor in the memory of a GPU."""
    specs = (entry.input_named(name) for name, read in reader.step.inputs.items() if read == tensor)
    return (
        entry.device_id == device_id
        and not entry.response_cache
        # Shapes are read on the host.
        and not any(spec is None or spec.is_shape_tensor for spec in specs)
    )


def device_places(tensors: Mapping[str, Tensor]) -> tuple[list[TensorPlace], tuple[DeviceMemory, ...]]:
    """Return a step's inputs as a worker is told of them, some of which lie in device memories."""
    memories: list[DeviceMemory] = []
    places: list[TensorPlace] = []
    for name, tensor in tensors.items():
        number = 0
        if tensor.memory is not None:
            if tensor.memory not in memories:
                memories.append(tensor.memory)
            number = memories.index(tensor.memory) + 1
        places.append(TensorPlace(name, tensor.datatype, tensor.shape, tensor.offset, tensor.byte_size, memory=number))
    return places, tuple(memories)


def device_targets(
    memories: Sequence[DeviceMemory], rooms: Mapping[str, DeviceRoom | None]
) -> tuple[tuple[DeviceMemory, ...], tuple[TensorPlace, ...]]:
    """Return the device memories of a request, and where in them its outputs go, as a worker is told.

    Args:
        memories: that its inputs lie in.
        rooms: of outputs by name; None: there is none yet.
    """
    named = list(memories)
    targets: list[TensorPlace] = []
    for name, room in rooms.items():
        if room is None:
            targets.append(TensorPlace(name, "", (), 0, 0))
            continue
        if room.memory not in named:
            named.append(room.memory)
        targets.append(TensorPlace(name, "", (), room.offset, room.byte_size, memory=named.index(room.memory) + 1))
    return tuple(named), tuple(targets)


def lent_rooms(rooms: Mapping[str, DeviceRoom]) -> Rooms:
    """Return what a worker is told of rooms that were lent for outputs that wait, by name."""
    return Rooms(*device_targets((), rooms))


def bytes_without_room(needs: Mapping[str, int], rooms: Mapping[str, DeviceRoom]) -> int:
    """Return how many bytes of a reply block outputs take that wait on a device and were given no room there."""
    return sum(align(byte_size) for name, byte_size in needs.items() if name not in rooms)
