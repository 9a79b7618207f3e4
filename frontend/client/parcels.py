"""How a request outside slabs is described to the engine."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.pending import BlockLease, PendingParcel
from forebay.ipc.arena import align
from forebay.ipc.client_wire import FLAG_SEQUENCE_END, FLAG_SEQUENCE_START
from forebay.ipc.messages import DeviceMemory, TensorPlace
from forebay.ipc.shape_key import shape_key

_encode_head = msgspec.msgpack.Encoder().encode


def describe(
    pending: PendingParcel,
    places: Sequence[TensorPlace],
    reply: BlockLease,
    options: Options,
    view: memoryview,
    *,
    memories: tuple[DeviceMemory, ...] = (),
    targets: tuple[TensorPlace, ...] = (),
    may_wait: bool = False,
) -> None:
    """Fill in a request whose inputs lie in ``places`` and whose answer goes to ``reply``.

    Args:
        view: uint8 [arena bytes]
        memories: on devices, that places and targets lie in.
        targets: of outputs that go there.
        may_wait: an output that does not fit its target waits on the device for room.
    """
    pending.blocks = [reply]
    pending.device_id = memories[0].device_id if memories else -1
    model = pending.model
    if not model.has_fixed_inputs:
        signature = model.signature
        pending.shape_key = shape_key(signature.inputs, signature.max_batch_size, places, view, pending.token)
    pending.priority, pending.timeout_us = options.priority, options.timeout_us
    pending.deadline_ns, pending.trace = options.deadline_ns, options.trace
    text, number = (options.sequence_id, 0) if isinstance(options.sequence_id, str) else ("", options.sequence_id)
    flags = options.sequence_start * FLAG_SEQUENCE_START | options.sequence_end * FLAG_SEQUENCE_END
    pending.sequence = (text, number, flags)
    pending.head = _encode_head(
        options.parcel_head(
            options.request_id,
            places,
            (reply.offset, reply.byte_size),
            memories=memories,
            targets=targets,
            may_wait=may_wait,
        )
    )


def reply_bytes(model: Opened, rows: int) -> int:
    """Return how large a block to lend for the answer: exact for outputs of fixed shapes, else what has been seen."""
    fixed = model.reply_row_bytes
    if fixed is None:
        return model.reply_guess_bytes
    return max(sum(align(row_bytes * rows) for row_bytes in fixed), 64)
