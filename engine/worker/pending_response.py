"""A response of a model, as bytes, on its way into a reply block."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from forebay.engine.backends.base import Array
from forebay.ipc.arena import align
from forebay.ipc.messages import ParameterValue, ReplyHead

if TYPE_CHECKING:
    from forebay.engine.worker.kept_outputs import KeptOutput


class RawTensor(NamedTuple):
    """An output as the bytes that the client gets."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Full shape as the client sees it."""
    data: memoryview
    """uint8, C order; BYTES serialised (spec D-004)"""


class PendingResponse:
    """A response that waits for a reply block, or behind one that does."""

    __slots__ = ("final", "index", "kept", "parameters", "tensors", "total_bytes")

    def __init__(
        self,
        tensors: Sequence[RawTensor],
        parameters: dict[str, ParameterValue],
        index: int,
        final: bool,
        kept: Sequence[KeptOutput] = (),
    ) -> None:
        """
        Args:
            kept: outputs that wait on the device for room.
        """
        self.tensors: Sequence[RawTensor] = tensors
        self.kept = kept
        self.parameters = parameters
        self.index = index
        self.final = final
        #: Of those on the host.
        self.total_bytes = sum(align(len(tensor.data)) for tensor in tensors)

    def keep(self) -> None:
        """Copy the tensors: the model may write into its arrays again while they wait."""
        self.tensors = [tensor._replace(data=memoryview(bytes(tensor.data))) for tensor in self.tensors]

    def question(self) -> ReplyHead:
        """Return what asks the producer for room."""
        rooms = {output.name: output.array.nbytes for output in self.kept}
        return ReplyHead(needs_bytes=max(self.total_bytes, 1), needs_rooms=rooms, index=self.index)

    def bytes_without(self, names: Collection[str]) -> int:
        """Return how large a block must be if, of the outputs on the device, only these have room there."""
        homeless = (output for output in self.kept if output.name not in names)
        return self.total_bytes + sum(align(output.array.nbytes) for output in homeless)


def byte_view(array: Array) -> memoryview:
    """Return an array's bytes in C order; copies only if the array is not contiguous."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(flat)  # type: ignore[arg-type]  # numpy's stubs claim the buffer protocol from Python 3.12 on


def address_of(data: memoryview) -> int:
    """Return where a non-empty buffer lies in this process."""
    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])
