"""What the scheduler says on doorbells: a batch to its worker, a refusal or a loss to its producer. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from forebay.engine.scheduler.waiting import Waiting, WaitingParcel, WaitingRun
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import ReplyHead
from forebay.ipc.wire import (
    FLAG_FINAL,
    FLAG_HUNG,
    HEADER,
    MESSAGE_BYTES_MAX,
    NO_TIMES,
    PARCEL,
    RUN,
    SLOT,
    TOKEN,
    Kind,
    Run,
    Slot,
    pack_runs,
)

_encode_reply = msgspec.msgpack.Encoder().encode

#: Room for items in one message.
_ITEMS_BYTES_MAX = MESSAGE_BYTES_MAX - HEADER.size - len(NO_TIMES) - 1024


def count_fitting(items: Sequence[Waiting]) -> int:
    """Return how many of the first items, all of one kind, go into one message to a worker."""
    if isinstance(items[0], WaitingRun):
        return min(len(items), _ITEMS_BYTES_MAX // RUN.size)
    room = _ITEMS_BYTES_MAX
    for count, item in enumerate(items):
        assert isinstance(item, WaitingParcel)
        room -= PARCEL.size + SLOT.size + len(item.head)
        if room < 0:
            return count
    return len(items)


def to_wire(item: WaitingRun) -> Run:
    """Return the item as the workers' message names it."""
    return Run(
        item.producer, item.requests, item.base, item.capacity, item.first, item.requests * item.rows_each,
        item.attempt, item.requests * item.enqueue_ns,
    )  # fmt: skip


def merge_runs(items: Sequence[Waiting], *, keeps_requests: bool = False) -> list[Run]:
    """Join neighbouring rows to as few segments as possible; usually one.

    Args:
        keeps_requests: where one request ends and the next begins must be seen: all of a run have equally many rows.
    """
    runs: list[Run] = []
    for item in items:
        assert isinstance(item, WaitingRun)
        run = to_wire(item)
        if runs:
            last = runs[-1]
            if (
                last.producer == run.producer
                and last.base == run.base
                and last.first + last.rows == run.first
                and last.capacity == run.capacity
                and not (keeps_requests and last.rows * run.requests != run.rows * last.requests)
            ):
                runs[-1] = last._replace(
                    requests=last.requests + run.requests,
                    rows=last.rows + run.rows,
                    attempt=max(last.attempt, run.attempt),
                    enqueue_sum_ns=last.enqueue_sum_ns + run.enqueue_sum_ns,
                )
                continue
        runs.append(run)
    return runs


def pack_batch(
    batch_id: int, items: Sequence[Waiting], slots: Sequence[Slot], *, keeps_requests: bool = False
) -> tuple[bytes, int]:
    """Build the message that hands a batch to a worker.

    Args:
        slots: of a sequence model, one per item; else empty.
        keeps_requests: as of :func:`merge_runs`.

    Returns:
        The message, and how many segments it names.
    """
    if isinstance(items[0], WaitingRun):
        runs = merge_runs(items, keeps_requests=keeps_requests)
        return pack_runs(Kind.RUNS, 0, 0, batch_id, runs), len(runs)
    kind = Kind.SEQUENCES if slots else Kind.PARCELS
    parts = [HEADER.pack(kind, 0, len(items), 0, batch_id), *(SLOT.pack(*slot) for slot in slots)]
    for item in items:
        assert isinstance(item, WaitingParcel)
        parts.append(PARCEL.pack(item.producer, item.rows_each, item.token, item.enqueue_ns, len(item.head)))
        parts.append(item.head)
    return b"".join(parts), len(items)


def pack_refusal(item: Waiting, error: ServingError) -> bytes:
    """Build the answer to a request that never ran; an empty text would read as success."""
    text = error.text or "request was cancelled"
    if isinstance(item, WaitingRun):
        trailer = bytes((error.code,)) + text.encode()
        return pack_runs(Kind.RUNS_FAILED, 0, 0, 0, [to_wire(item)], NO_TIMES) + trailer
    assert isinstance(item, WaitingParcel)
    reply = _encode_reply(ReplyHead(code=error.code, text=text))
    return HEADER.pack(Kind.PARCEL_REPLY, FLAG_FINAL, 1, 0, 0) + NO_TIMES + TOKEN.pack(item.token) + reply


def pack_losses(
    instance: int, batch_id: int, items: Sequence[Waiting], *, is_hung: bool = False
) -> list[tuple[int, bytes]]:
    """Build what the producers of a batch hear when its worker died: pairs of producer and message.

    Args:
        is_hung: the batch is to fail, not to be tried again.
    """
    flags = FLAG_HUNG if is_hung else 0
    runs: dict[int, list[Run]] = {}
    tokens: dict[int, list[int]] = {}
    for item in items:
        if isinstance(item, WaitingRun):
            runs.setdefault(item.producer, []).append(to_wire(item))
        elif isinstance(item, WaitingParcel):
            tokens.setdefault(item.producer, []).append(item.token)
    messages = [
        (producer, pack_runs(Kind.RUNS_LOST, flags, instance, batch_id, lost, NO_TIMES))
        for producer, lost in runs.items()
    ]
    for producer, lost_tokens in tokens.items():
        packed = b"".join(TOKEN.pack(token) for token in lost_tokens)
        header = HEADER.pack(Kind.PARCEL_LOST, flags, len(lost_tokens), instance, batch_id)
        messages.append((producer, header + NO_TIMES + packed))
    return messages
