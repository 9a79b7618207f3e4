r"""The fixed binary structs on doorbells: what crosses between processes for every batch.

A doorbell is a SEQPACKET socket, so one ``send`` is one message and the kernel orders memory between the two sides.
All integers are little endian. Nobody trusts a field: the receiver checks ranges against its own tables.

To a worker (senders: scheduler, and frontends that hold a grant)::

    header   kind u8 | flags u8 | count u16 | sender u32 | batch u64                                  16 bytes
    RUNS     header + count * RUN
    PARCELS  header + count * (PARCEL + head bytes)
    COLLECT  header + GROW + [Rooms]           the producer lends a larger reply block, and room on the device
    CANCEL   header + count * TOKEN            the client of these parcels left
    SYNC     header                            answer with SYNCED when everything before is done; with UNSYNCED already
                                               while a Python model runs
    WAKE     header                            something waits on the lifeline
    SEQUENCES header + count * SLOT + count * (PARCEL + head bytes)
    RING_OPEN  header                          sender, a client, may ring its own socket; batch: the ticket
    RING_CLOSE header                          it may not any more; answered to it with REVOKE
    CANCEL_ROWS header + SLAB + count * ROW    batch: which one; the clients of these requests in it left
    PLACE    header                            batch: run on this core, plus one; 0: anywhere again

To a producer, its completion doorbell (senders: workers, scheduler)::

    header   kind u8 | flags u8 | count u16 | instance u32 | batch u64
    RUNS_DONE     header + TIMES + count * RUN             with FLAG_REMARKS: + MessagePack list of RowRemark
    RUNS_FAILED   header + TIMES + count * RUN + code u8 + text
    RUNS_LOST     header + TIMES (zero) + count * RUN      the worker died before it answered
    PARCEL_REPLY  header + TIMES + TOKEN + ReplyHead       one per response
    PARCEL_REPLIES header + TIMES + count * (REPLY + ReplyHead)  those of one execution, to frontends only
    PARCEL_LOST   header + TIMES (zero) + count * TOKEN
    GRANT, REVOKE header + GRANT                           batch: the ticket, for clients
    RESYNC        header + count * TOKEN                   batch: the new scheduler's epoch; parcels that still run
                                                           (nothing else of this producer does)

To the scheduler, its done doorbell (senders: workers)::

    DONE     header + TIMES + count * OPEN                 one per batch that was not sent under a grant; OPEN: its
                                                           requests that have no final answer yet
    CLOSED   header + OPEN                                 such a request now has its final answer
    SYNCED   header + count * OPEN                         batch: the epoch of the SYNC; OPEN: as of DONE, all of them
    UNSYNCED header + count * OPEN                         as SYNCED, of a worker that has more to run first; OPEN with
                                                           FLAG_UNNAMED: a producer that has requests among that

Layouts of RUN, PARCEL and so on stand beside their ``struct.Struct`` below.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

#: Bytes of the largest doorbell message; receivers' buffers have this size.
MESSAGE_BYTES_MAX = 192 * 1024

#: Bytes of one parcel's head at most: ids and parameters live in it, tensors do not.
HEAD_BYTES_MAX = 32 * 1024


class Kind(enum.IntEnum):
    """First byte of every doorbell message."""

    RUNS = 1
    PARCELS = 2
    COLLECT = 3
    CANCEL = 4
    SYNC = 5
    WAKE = 6
    SEQUENCES = 7
    RING_OPEN = 8
    RING_CLOSE = 9
    CANCEL_ROWS = 10
    PLACE = 11
    RUNS_DONE = 16
    RUNS_FAILED = 17
    RUNS_LOST = 18
    PARCEL_REPLY = 19
    PARCEL_LOST = 20
    GRANT = 21
    REVOKE = 22
    RESYNC = 23
    PARCEL_REPLIES = 24
    DONE = 32
    SYNCED = 33
    CLOSED = 34
    OPENED = 35
    UNSYNCED = 36


#: Flag of RUNS: sent by a frontend under a grant, so the scheduler is not told.
FLAG_GRANTED = 1
#: Flag of DONE: the backend failed the batch.
FLAG_FAILED = 2
#: Flag of PARCEL_REPLY: the last response to this request.
FLAG_FINAL = 4
#: Flag of REVOKE: the instance is gone, whatever the generation; what was rung and not answered is lost.
FLAG_GONE = 8
#: Flag of RUNS_LOST, PARCEL_LOST and of REVOKE with FLAG_GONE: the worker was ended because it took too long. Whoever
#: tried again would only have the next one hang.
FLAG_HUNG = 32
#: Flag of OPEN: the model wants the request again (iterative sequences, spec S-060).
FLAG_RESCHEDULE = 16
#: Flag of OPEN: no request, but a producer that has requests here which are not named, or may have: rows, batches that
#: wait, an open ring, answers that it has not taken.
FLAG_UNNAMED = 64

#: Flag of RUNS_FAILED and PARCEL_REPLY to a client: the model was loaded anew; open it and hand the request in again.
FLAG_MOVED = 32

#: Flag of RUNS_DONE: some of its requests failed or have response parameters.
FLAG_REMARKS = 64

#: Set in the batch number of what is rung under a grant: the scheduler's numbers never have it.
GRANTED_BATCH = 1 << 63

#: Flags of SLOT.
SLOT_START, SLOT_END = 1, 2

#: kind u8, flags u8, count u16, sender or instance u32, batch u64
HEADER = struct.Struct("<BBHIQ")
#: producer u32, requests u32, base u64, capacity u32, first u32, rows u32, attempt u32, enqueue_sum_ns u64
RUN = struct.Struct("<IIQIIIIQ")
#: A RUNS message of one run: a header and the run.
ONE_RUN = struct.Struct(HEADER.format + RUN.format[1:])
#: producer u32, rows u32, token u64, enqueue_ns u64, head_bytes u32
PARCEL = struct.Struct("<IIQQI")
#: slot u32, flags u32, assigned correlation id u64 (0: the one in the head)
SLOT = struct.Struct("<IIQ")
#: producer u32, flags u32, token u64
OPEN = struct.Struct("<IIQ")
#: start, input_end, output_start, end: monotonic ns
TIMES = struct.Struct("<QQQQ")
#: a parcel's token u64
TOKEN = struct.Struct("<Q")
#: token u64, flags u32 (as of PARCEL_REPLY), head_bytes u32
REPLY = struct.Struct("<QII")
#: route u32, instance u32, generation u32, rows_max u32
GRANT = struct.Struct("<IIII")
#: a slab's base u64
SLAB = struct.Struct("<Q")
#: a request's first row u32
ROW = struct.Struct("<I")
#: token u64, offset u64, byte_size u64
GROW = struct.Struct("<QQQ")

NO_TIMES = TIMES.pack(0, 0, 0, 0)
#: Where what follows the times of a message begins.
TIMES_END = HEADER.size + TIMES.size
#: Bytes of the answer of one run.
_ONE_ANSWER_BYTES = TIMES_END + RUN.size


class Run(NamedTuple):
    """Requests in consecutive rows of one slab; see :data:`RUN`.

    ``base`` and ``capacity`` name the slab inside the producer's arena and, with the model's signature, its layout.
    """

    producer: int
    requests: int
    base: int
    capacity: int
    first: int
    rows: int
    attempt: int
    enqueue_sum_ns: int


class Slot(NamedTuple):
    """Where a sequence's request stands in its instance; see :data:`SLOT`."""

    slot: int
    flags: int
    assigned_id: int = 0


class Times(NamedTuple):
    """When a batch passed its stages, monotonic ns."""

    start_ns: int
    input_end_ns: int
    output_start_ns: int
    end_ns: int


def pack_runs(kind: Kind, flags: int, sender: int, batch: int, runs: list[Run], times: bytes = b"") -> bytes:
    """Build a RUNS, RUNS_DONE or RUNS_LOST message."""
    if len(runs) == 1:
        return HEADER.pack(kind, flags, 1, sender, batch) + times + RUN.pack(*runs[0])
    return b"".join((HEADER.pack(kind, flags, len(runs), sender, batch), times, *(RUN.pack(*run) for run in runs)))


def unpack_runs(message: memoryview, count: int, offset: int) -> list[Run]:
    """Read ``count`` runs from ``offset``; raises ``struct.error`` if the message is too short."""
    size = RUN.size
    return [Run._make(RUN.unpack_from(message, offset + index * size)) for index in range(count)]


def producers_of(batch: bytes | bytearray | memoryview) -> set[int]:
    """Return whose requests are in a message to a worker, or follow it in a ring.

    Raises ``struct.error`` if the message is too short.
    """
    kind, _flags, count, sender, _batch = HEADER.unpack_from(batch)
    if kind == Kind.RUNS:
        return {RUN.unpack_from(batch, HEADER.size + index * RUN.size)[0] for index in range(count)}
    if kind == Kind.RING_OPEN:
        return {sender}
    if kind not in (Kind.PARCELS, Kind.SEQUENCES):
        return set()
    offset = HEADER.size + (count * SLOT.size if kind == Kind.SEQUENCES else 0)
    producers: set[int] = set()
    for _ in range(count):
        producer, _rows, _token, _enqueue_ns, head_bytes = PARCEL.unpack_from(batch, offset)
        producers.add(producer)
        offset += PARCEL.size + head_bytes
    return producers


def is_small_answer(message: bytearray, size: int) -> bool:
    """Tell whether a message of ``size`` bytes is the answer of one request in rows."""
    if size != _ONE_ANSWER_BYTES or message[0] != Kind.RUNS_DONE:
        return False
    return bool(RUN.unpack_from(message, TIMES_END)[1] == 1)


def pack_rows_cancel(batch: int, producer: int, base: int, firsts: Sequence[int]) -> bytes:
    """Build a CANCEL_ROWS message."""
    rows = b"".join(ROW.pack(first) for first in firsts)
    return HEADER.pack(Kind.CANCEL_ROWS, 0, len(firsts), producer, batch) + SLAB.pack(base) + rows
