"""What a TorchScript file tells of its inputs and outputs, for auto-complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forebay.engine.backends.base import DescribedModel, DescribedTensor
from forebay.engine.backends.torch_library import Tensor, torch
from forebay.engine.backends.torch_scripts import find_model_file, load_script
from forebay.engine.backends.torch_tensors import OUTPUT_KIND_TEXT, data_type, flatten_result
from forebay.ipc.errors import BackendFailed, InvalidArgument
from forebay.ipc.worker_messages import InstanceSpec


def describe_script(spec: InstanceSpec) -> DescribedModel:
    """Derive inputs and outputs of a TorchScript model where its first layers tell them (L-019).

    A file says how many tensors there are, but rarely their types. The input of a linear, convolution or embedding
    layer follows from that layer's weights; then the model is tried with one and two rows, which shows the outputs and
    whether it batches.

    Raises:
        InvalidArgument: the file does not tell enough; the text asks for a configuration.
    """
    module = load_script(spec, find_model_file(spec, "model.pt"))
    give_up = InvalidArgument(
        f"model configuration is not complete for model '{spec.model}': its TorchScript file does not tell datatypes "
        "and shapes of all inputs; give 'input' and 'output' in config.pbtxt"
    )
    arguments = [argument for argument in module.forward.schema.arguments if argument.name != "self"]
    if not arguments or any(argument.type.kind() != "TensorType" for argument in arguments):
        raise give_up
    graph = torch.jit.freeze(module).graph
    samples: list[tuple[str, Any, tuple[int, ...]]] = []
    for argument, value in zip(arguments, list(graph.inputs())[1:], strict=False):
        found = _input_of_first_layer(value)
        if found is None:
            raise give_up
        samples.append((argument.name, *found))
    try:
        one, two = (_try_rows(module, samples, rows) for rows in (1, 2))
    except Exception:  # a guess that did not fit; the configuration must say it
        raise give_up from None
    outputs: list[DescribedTensor] = []
    for index, (first, second) in enumerate(zip(one, two, strict=True)):
        shape = tuple(a if a == b else -1 for a, b in zip(first.shape, second.shape, strict=True))
        name = "OUTPUT__0" if len(one) == 1 else f"OUTPUT__{index}"
        outputs.append(DescribedTensor(name, data_type(first.dtype), shape))
    inputs = tuple(DescribedTensor(name, data_type(dtype), (-1, *dims)) for name, dtype, dims in samples)
    return DescribedModel(inputs, tuple(outputs))


def _input_of_first_layer(value: Any) -> tuple[Any, tuple[int, ...]] | None:
    for use in value.uses():
        node = use.user
        operands = list(node.inputs())
        if len(operands) < 2:
            continue
        if node.kind() == "aten::embedding" and operands[1].debugName() == value.debugName():
            return torch.int64, (-1,)
        weight = operands[1].toIValue()
        if not isinstance(weight, torch.Tensor) or operands[0].debugName() != value.debugName():
            continue
        if node.kind() == "aten::linear":
            return weight.dtype, (int(weight.shape[1]),)
        if node.kind() in ("aten::conv1d", "aten::conv2d", "aten::conv3d"):
            groups = operands[-1].toIValue()
            spatial = weight.dim() - 2
            return weight.dtype, (int(weight.shape[1]) * int(groups), *([-1] * spatial))
    return None


def _try_rows(module: Any, samples: Sequence[tuple[str, Any, tuple[int, ...]]], rows: int) -> list[Tensor]:
    # Large enough for the strides and poolings of common vision models.
    size_for_variable = 224
    tensors = [
        torch.zeros((rows, *(size_for_variable if dim < 0 else dim for dim in dims)), dtype=dtype)
        for _name, dtype, dims in samples
    ]
    with torch.no_grad():
        results = flatten_result(module.forward(*tensors))
    if not all(isinstance(result, torch.Tensor) for result in results):
        raise BackendFailed(OUTPUT_KIND_TEXT)
    return results
