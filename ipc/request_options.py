"""What a request carries besides its tensors, wherever it comes from."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from forebay.ipc.messages import DeviceMemory, ParameterValue, ParcelHead, TensorPlace
from forebay.ipc.spans import Trace


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Names and meanings as in the KServe protocol. How the identifier is called is the subclass's."""

    outputs: tuple[str, ...] = ()
    """Requested outputs; empty: all."""
    parameters: dict[str, ParameterValue] = {}
    sequence_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    priority: int = 0
    timeout_us: int = 0
    """For the model's queue policy; how long the client waits is another matter."""
    deadline_ns: int = 0
    """Monotonic time after which nobody waits; 0: none."""
    trace: Trace | None = None
    """Of a request that is traced."""

    def parcel_head(
        self,
        request_id: str,
        inputs: Sequence[TensorPlace],
        reply: tuple[int, int],
        memories: Sequence[DeviceMemory] = (),
        targets: tuple[TensorPlace, ...] = (),
        *,
        may_wait: bool = False,
    ) -> ParcelHead:
        """Return what the worker must know.

        Args:
            inputs: where they lie, filled.
            reply: offset and bytes of the block lent for the outputs.
            memories: on devices, that inputs and targets lie in.
            targets: of outputs that go there.
            may_wait: an output that does not fit its target waits on the device for room.
        """
        trace = self.trace
        return ParcelHead(
            inputs=tuple(inputs),
            reply_offset=reply[0],
            reply_bytes=reply[1],
            outputs=self.outputs,
            id=request_id,
            parameters=self.parameters,
            correlation_id=self.sequence_id,
            sequence_start=self.sequence_start,
            sequence_end=self.sequence_end,
            priority=self.priority,
            timeout_us=self.timeout_us,
            deadline_ns=self.deadline_ns,
            trace_context="" if trace is None else trace.context,
            memories=tuple(memories),
            targets=targets,
            trace_levels=() if trace is None else trace.levels,
            may_wait=may_wait,
        )
