"""How the names of a configuration map to the positions of a PyTorch model's inputs and outputs (spec B-041, B-042)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from forebay.ipc.errors import InvalidArgument
from forebay.ipc.log import log
from forebay.ipc.worker_messages import InstanceSpec

_INDEXED_NAME = re.compile(r"__(\d+)$")


def name_index(name: str) -> int | None:
    """Return the index of ``<name>__<index>``, or None if the name has none."""
    found = _INDEXED_NAME.search(name)
    return int(found.group(1)) if found else None


def order_inputs(spec: InstanceSpec, arguments: Sequence[str], required_count: int) -> tuple[str, ...]:
    """Return the configured input names in the order of ``forward``'s arguments (spec B-041).

    Args:
        arguments: names of forward's arguments, without ``self``.
        required_count: how many of them have no default.

    Raises:
        InvalidArgument: the configuration has more inputs than the model, too few, or an impossible index.
    """
    names = [tensor.name for tensor in spec.inputs]
    if len(names) > len(arguments):
        raise InvalidArgument(
            f"unable to load model '{spec.model}', configuration expects {len(names)} inputs, "
            f"model provides at most {len(arguments)} inputs"
        )
    if len(names) < required_count:
        raise InvalidArgument(
            f"unable to load model '{spec.model}', configuration specifies {len(names)} inputs, "
            f"but forward() needs {required_count}: {', '.join(arguments[:required_count])}"
        )
    if all(name in arguments for name in names):
        positions = {name: list(arguments).index(name) for name in names}
    else:
        indices = {name: name_index(name) for name in names}
        if any(index is None for index in indices.values()):
            log.warning(
                f"model '{spec.model}': the inputs {names} are not arguments of forward(), nor do they follow the "
                "<name>__<index> naming convention; they are passed in the order of the model configuration"
            )
            return tuple(names)
        positions = {name: index for name, index in indices.items() if index is not None}
    by_position = {position: name for name, position in positions.items()}
    if sorted(by_position) != list(range(len(names))):
        raise InvalidArgument(
            f"unable to load model '{spec.model}', the inputs {names} do not name each of the first {len(names)} "
            f"arguments of forward() once: {', '.join(arguments)}"
        )
    return tuple(by_position[position] for position in range(len(names)))


def index_outputs(spec: InstanceSpec) -> dict[str, int]:
    """Return the position of each configured output (spec B-042).

    Raises:
        InvalidArgument: a name has no index and is not the only one.
    """
    positions: dict[str, int] = {}
    for tensor in spec.outputs:
        index = name_index(tensor.name)
        if index is None:
            if len(spec.outputs) > 1:
                raise InvalidArgument(f"output '{tensor.name}' does not follow <name>__<index> naming convention.")
            index = 0
        positions[tensor.name] = index
    return positions


def check_strings(spec: InstanceSpec) -> None:
    """Refuse string tensors of more than one dimension (spec B-046)."""
    for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
        for tensor in tensors:
            if tensor.datatype == "BYTES" and len(tensor.backend_dims) > 1:
                raise InvalidArgument(
                    f"Triton only supports 1 dimensional List of String as {kind} for '{tensor.name}' "
                    f"for model '{spec.model}'"
                )
