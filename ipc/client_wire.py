"""The binary structs between a shared-memory client and the server; docs/shm-protocol.md tells their states.

All integers are little endian. A client has four sockets, all SEQPACKET: one ``send`` is one message.

The door, a listening Unix socket in the runtime directory (control; the client's end of it is its life)::

    header   kind u16 | flags u16 | request u32                                                        8 bytes
    HELLO    header + HELLO + name                           ->  WELCOME or REFUSED
    OPEN     header + OPEN + model name [+ NUL + namespace]  ->  MODEL or REFUSED
    LIST     header                                          ->  MODELS, one or more
    WELCOME  header + WELCOME                                +3 descriptors: arena, completions, submissions
    MODEL    header + MODEL + count * instance u32 + tensors +count descriptors: one ring per instance
             [+ ENSEMBLE, MessagePack, with FLAG_ENSEMBLE]
    REFUSED  header + code u32 + text
    MODELS   header + lines of ``name TAB version TAB state``; the last one has FLAG_LAST
    INSTANCE header + route u32 + instance u32               +1 descriptor; unasked: a worker was started (again)
    COUNTS   header + COUNTS                                 no answer: where the client counts its requests
    GONE     header + route u32                              unasked: what was opened there has another one now
    MAKE_MEMORY  header + MEMORY_NAME                        ->  MEMORY or REFUSED: what the server keeps for it
    MEMORY   header + MEMORY
    CLOSE_MEMORY header + MEMORY_NAME                        ->  CLOSED or REFUSED: nobody has it open any more
    CLOSED   header
    LOST     header + number u64                             unasked: a memory that the server kept is gone

Submissions, to the scheduler; the header is that of doorbells (:mod:`forebay.ipc.wire`), ``batch`` is the epoch::

    SUBMIT_RUNS    header + count * SUBMIT_RUN
    SUBMIT_PARCEL  header + SUBMIT_PARCEL + head + correlation text
    SUBMIT_CANCEL  header + count * TOKEN
    SUBMIT_CANCEL_RUNS  header + count * CANCEL_RUN
    SUBMIT_CANCEL_RUNG  header + CANCEL_RUNG                 sender: the instance that was rung
    SUBMIT_COLLECT header + GROW + [Rooms]                   sender: the instance that asked
    SUBMIT_RINGS   header + count * instance u32             rings that this client holds

Rings, one per instance, straight to the worker; only under a grant, ``batch`` is the grant's ticket::

    RUNS     header + RUN                                    count 1; the producer in it is ignored
    PARCELS  header + PARCEL + head                          count 1
"""

from __future__ import annotations

import enum
import struct

import msgspec

from forebay.ipc.catalog import EnsembleStep
from forebay.ipc.tensor import DATATYPES, TensorSpec

#: The first bytes of HELLO.
MAGIC = b"forebay\0"
#: Raised when an older client would misunderstand a newer server or the other way round.
PROTOCOL_VERSION = 1

#: Name of the door in the runtime directory.
DOOR_NAME = "clients.sock"
#: Names the server's runtime directory to processes that it starts, and to clients that are told where it is.
RUNTIME_DIRECTORY_VARIABLE = "FOREBAY_RUNTIME_DIRECTORY"

#: Bytes of a message to the door at most.
DOOR_REQUEST_BYTES_MAX = 4096
#: Bytes of a message from the door at most.
DOOR_REPLY_BYTES_MAX = 64 * 1024
#: Descriptors with one message from the door at most; a model's further instances have no ring.
DOOR_FDS_MAX = 64

#: Requests that a client may have in flight.
OUTSTANDING_MAX = 512

#: Rows of a client's slab at most.
SLAB_CAPACITY_MAX = 1 << 20

#: Bytes of a message on the submission socket at most.
SUBMIT_BYTES_MAX = 64 * 1024


class DoorKind(enum.IntEnum):
    """First field of a message on the door's socket."""

    HELLO = 1
    WELCOME = 2
    OPEN = 3
    MODEL = 4
    REFUSED = 5
    INSTANCE = 6
    LIST = 7
    MODELS = 8
    GONE = 9
    COUNTS = 10
    MAKE_MEMORY = 11
    MEMORY = 12
    CLOSE_MEMORY = 13
    CLOSED = 14
    LOST = 15


class SubmitKind(enum.IntEnum):
    """First byte of a message on the submission socket."""

    RUNS = 48
    PARCEL = 49
    CANCEL = 50
    COLLECT = 51
    RINGS = 52
    CANCEL_RUNS = 53
    CANCEL_RUNG = 54


#: Flag of WELCOME: workers may page-lock the arena; no page of its file may be given back (hole punching).
FLAG_KEEPS_PAGES = 1
#: Flag of MODEL: requests live in slab rows; without it, they are parcels.
FLAG_ROWS = 1
#: Flag of MODEL: a request may have any number of responses.
FLAG_DECOUPLED = 2
#: Flag of MODEL: an ensemble, which the client runs itself: its steps follow the tensors.
FLAG_ENSEMBLE = 4
#: Flag of MODEL: requests that carry nothing but tensors may live in slab rows; the others are parcels.
FLAG_BARE_ROWS = 8
#: Flag of OPEN: the client can run ensembles.
FLAG_RUNS_ENSEMBLES = 1
#: Flag of MODELS: nothing follows.
FLAG_LAST = 1
#: Flags of SUBMIT_PARCEL.
FLAG_SEQUENCE_START, FLAG_SEQUENCE_END = 1, 2
#: Flags of a tensor.
FLAG_OPTIONAL, FLAG_RAGGED, FLAG_SHAPE_TENSOR = 1, 2, 4

#: kind u16, flags u16, request u32
DOOR_HEADER = struct.Struct("<HHI")
#: magic 8 bytes, protocol version u32, zero u32, arena_bytes u64 (0: as the server likes)
HELLO = struct.Struct("<8sIIQ")
#: protocol version u32, producer u32, arena_bytes u64, epoch u32, outstanding_max u32
WELCOME = struct.Struct("<IIQII")
#: version i64; 0: the newest
OPEN = struct.Struct("<q")
#: route u32, max_batch_size u32, version i64, inputs u16, outputs u16, instances u16,
#: device u16: one more than the number of the GPU in whose memory tensors of requests may lie; 0: there is none
MODEL = struct.Struct("<IIqHHHH")
#: datatype number u8, flags u8, rank u16, name bytes u16, zero u16; then rank * dim i64, then the name
TENSOR = struct.Struct("<BBHHH")
DIM = struct.Struct("<q")
NUMBER = struct.Struct("<I")
#: route u32, zero u32, offset u64 of a block of ``ProducerCounter`` words, of an ensemble ``InstanceCounter`` words too
COUNTS = struct.Struct("<IIQ")
#: number u64 that the client has chosen, device u32, zero u32
MEMORY_NAME = struct.Struct("<QII")
#: number u64, device u32, zero u32, byte_size u64, handle
MEMORY = struct.Struct("<QIIQ64s")
#: number u64
MEMORY_NUMBER = struct.Struct("<Q")
#: route u32, instance u32
INSTANCE = struct.Struct("<II")

#: route, requests u32; base u64; capacity, first, rows_each, attempt, priority, patience_us (from enqueue_ns on; 0: for
#: ever) u32; timeout_us, enqueue_ns u64
SUBMIT_RUN = struct.Struct("<IIQIIIIIIQQ")
#: route, rows u32; token, shape_key, timeout_us, deadline_ns, enqueue_ns, correlation u64;
#: priority, attempt, head_bytes, correlation_bytes (0: the number counts), flags, zero u32
SUBMIT_PARCEL = struct.Struct("<IIQQQQQQIIIIII")

#: route u32, first u32, base u64: a request in rows
CANCEL_RUN = struct.Struct("<IIQ")
#: ticket u64, base u64, first u32, zero u32: a request in rows that a worker was rung for
CANCEL_RUNG = struct.Struct("<QQII")

_BY_NUMBER = {datatype.number: name for name, datatype in DATATYPES.items()}


class EnsemblePlan(msgspec.Struct, frozen=True, array_like=True):
    """How an ensemble is run: the end of a MODEL message."""

    max_inflight_requests: int = 0
    """Responses of a decoupled step that are worked on at a time (spec S-110); 0: unlimited."""
    steps: tuple[EnsembleStep, ...] = ()


def pack_tensor(spec: TensorSpec) -> bytes:
    """Return a tensor of a MODEL message."""
    name = spec.name.encode()
    flags = spec.optional * FLAG_OPTIONAL | spec.allow_ragged_batch * FLAG_RAGGED
    flags |= spec.is_shape_tensor * FLAG_SHAPE_TENSOR
    head = TENSOR.pack(DATATYPES[spec.datatype].number, flags, len(spec.dims), len(name), 0)
    return b"".join((head, *(DIM.pack(dim) for dim in spec.dims), name))


def unpack_tensor(message: memoryview, offset: int) -> tuple[TensorSpec, int]:
    """Read a tensor; return it and the offset behind it.

    Raises:
        struct.error, KeyError, UnicodeDecodeError: that is no tensor.
    """
    number, flags, rank, name_bytes, _zero = TENSOR.unpack_from(message, offset)
    offset += TENSOR.size
    dims = tuple(int(DIM.unpack_from(message, offset + DIM.size * index)[0]) for index in range(rank))
    offset += DIM.size * rank
    name = bytes(message[offset : offset + name_bytes]).decode()
    spec = TensorSpec(
        name=name,
        datatype=_BY_NUMBER[number],
        dims=dims,
        optional=bool(flags & FLAG_OPTIONAL),
        allow_ragged_batch=bool(flags & FLAG_RAGGED),
        is_shape_tensor=bool(flags & FLAG_SHAPE_TENSOR),
    )
    return spec, offset + name_bytes
