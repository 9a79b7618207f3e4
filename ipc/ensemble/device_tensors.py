"""Which tensors of an ensemble may stay on a GPU between its steps, and how the steps are told where they lie. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.ensemble.graph import GraphPlan, NeededStep
from forebay.ipc.ensemble.tensors import Tensor
from forebay.ipc.messages import DeviceMemory, TensorPlace
from forebay.ipc.tensor import byte_size


def device_outputs(
    needed: NeededStep, entry: ModelEntry, rows: int, plan: GraphPlan, model_of: Callable[[int], ModelEntry]
) -> dict[str, int]:
    """Return which outputs of a step may stay on its model's GPU, by the model's names, and their bytes.

    Those of known size that nobody reads but steps on the same GPU: no client, no response cache, no other device.

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
        if spec is None or not spec.is_fixed or tensor in plan.outputs:
            continue
        if all(_reads_on(entry.device_id, reader, tensor, model_of(reader.number)) for reader in plan.readers[tensor]):
            found[name] = byte_size(spec.datatype, (rows, *spec.dims) if entry.max_batch_size > 0 else spec.dims)
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
