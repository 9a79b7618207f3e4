"""What Triton's small test backends demand of a configuration, with their sentences."""

from __future__ import annotations

from collections.abc import Sequence

from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import TensorSpec, shape_text
from forebay.ipc.worker_messages import InstanceSpec


def check_count(what: str, tensors: Sequence[TensorSpec], count: int) -> None:
    """Demand so many tensors.

    Args:
        what: ``inputs`` or the like, in the number that the sentence needs.

    Raises:
        InvalidArgument: there are more or fewer.
    """
    if len(tensors) != count:
        raise InvalidArgument(f"expected {count} {what}, got {len(tensors)}")


def check_tensor(tensor: TensorSpec, *, dims: tuple[int, ...] | None = None, datatype: str = "") -> None:
    """Demand a shape or a datatype of a tensor.

    Raises:
        InvalidArgument: it has another.
    """
    if dims is not None and tensor.dims != dims:
        raise InvalidArgument(f"expected {tensor.name} shape to be {shape_text(dims)}, got {shape_text(tensor.dims)}")
    if datatype and tensor.datatype != datatype:
        written = "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
        raise InvalidArgument(f"expected {tensor.name} datatype to be {datatype}, got {written}")


def check_decoupled(spec: InstanceSpec) -> None:
    """Demand a transaction policy under which a request may have any number of responses.

    Raises:
        InvalidArgument: a request has exactly one response.
    """
    if not spec.decoupled:
        raise InvalidArgument(
            f"backend '{spec.backend}' answers a request with any number of responses: model '{spec.model}' must set "
            "'model_transaction_policy { decoupled: true }'"
        )
