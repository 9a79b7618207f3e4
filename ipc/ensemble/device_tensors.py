"""Which tensors of an ensemble may stay on a GPU between its steps, and how the steps are told where they lie. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.ensemble.graph import GraphPlan, NeededStep
from forebay.ipc.ensemble.tensors import Tensor
from forebay.ipc.messages import DeviceMemory, TensorPlace
from forebay.ipc.tensor import byte_size

#: Returns the GPU in whose memory a step takes one of its inputs, by the model's name; -1: there is none.
DeviceOfInput = Callable[[NeededStep, str], int]

#: Ensemble output to the GPUs in whose memory its client takes it.
ClientDevices = Mapping[str, Collection[int]]

#: A client that takes all outputs on the host.
NO_DEVICES: ClientDevices = {}


def device_of_input(entry: ModelEntry, name: str) -> int:
    """Return the GPU in whose memory a model that is no ensemble takes an input; -1: there is none."""
    spec = entry.input_named(name)
    # Shapes are read on the host, and so is what the cache is asked for.
    is_read_on_host = spec is None or spec.is_shape_tensor or entry.response_cache
    return -1 if is_read_on_host else entry.device_id


def device_of_tensor(plan: GraphPlan, tensor: str, device_of: DeviceOfInput) -> int:
    """Return the GPU in whose memory all steps that read a tensor take it; -1: there is none."""
    devices = {
        device_of(reader, name)
        for reader in plan.readers.get(tensor, ())
        for name, read in reader.step.inputs.items()
        if read == tensor
    }
    return devices.pop() if len(devices) == 1 else -1


def device_inputs(plan: GraphPlan, names: Iterable[str], device_of: DeviceOfInput) -> dict[str, int]:
    """Return the inputs of an ensemble that nobody reads but steps on one GPU each, and that GPU."""
    devices = {name: device_of_tensor(plan, name, device_of) for name in names if name not in plan.outputs}
    return {name: device for name, device in devices.items() if device >= 0}


def devices_of_output(plan: GraphPlan, tensor: str, device_of: DeviceOfInput, clients: ClientDevices) -> frozenset[int]:
    """Return the GPUs in whose memory everybody who gets a tensor takes it: steps, and the client."""
    devices = frozenset(clients.get(tensor, ()))
    if tensor in plan.readers:
        device = device_of_tensor(plan, tensor, device_of)
        devices = frozenset((device,)) & (devices if tensor in plan.outputs else frozenset((device,)))
    elif tensor not in plan.outputs:
        return frozenset()
    return devices - {-1}


def device_outputs(
    needed: NeededStep, entry: ModelEntry, rows: int, devices_of: Callable[[str], Collection[int]]
) -> dict[str, int]:
    """Return which outputs of a step may stay on its model's GPU, by the model's names, and their bytes; 0: they vary.

    Args:
        entry: of the step's model, which takes tensors on a GPU.
        rows: batch items, at least 1.
        devices_of: GPUs in whose memory everybody who gets a tensor of the ensemble takes it.
    """
    if entry.decoupled or entry.response_cache:
        return {}
    found: dict[str, int] = {}
    for name in needed.outputs:
        spec = entry.output_named(name)
        if spec is None or spec.datatype == "BYTES" or entry.device_id not in devices_of(needed.step.outputs[name]):
            continue
        shape = (rows, *spec.dims) if entry.max_batch_size > 0 else spec.dims
        found[name] = byte_size(spec.datatype, shape) if spec.is_fixed else 0
    return found


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
