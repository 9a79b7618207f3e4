"""A real worker process under test: this plays supervisor, scheduler and producer for it.

with WorkerHarness(spec) as worker:
    [response] = worker.infer({"IN": np.ones(3, np.float32)})
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from forebay.ipc.arena import Arena, BlockAllocator, create_memory_file
from forebay.ipc.counters import CountersFile, InstanceCounter, instance_words
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.errors import ServingError, from_wire
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.messages import Failed, ParcelHead, ReplyHead, Rooms, RowRemark, Stop, TensorPlace
from forebay.ipc.slabs import SlabLayout
from forebay.ipc.tensor import DATATYPES, TensorSpec, datatype_of, encode_bytes, view_tensor
from forebay.ipc.wire import (
    FLAG_FINAL,
    FLAG_REMARKS,
    GROW,
    HEADER,
    MESSAGE_BYTES_MAX,
    OPEN,
    PARCEL,
    REPLY,
    RUN,
    TIMES,
    TOKEN,
    Kind,
    Run,
    pack_rows_cancel,
    pack_runs,
    unpack_runs,
)
from forebay.ipc.worker_messages import (
    ArenaDown,
    ArenaUp,
    Describe,
    Described,
    InstanceSpec,
    Load,
    Loaded,
    Phase,
    SupervisorToWorker,
    WorkerToSupervisor,
)

#: This test's id as a producer.
PRODUCER = 7

#: Seconds; a watchdog, not a speed limit.
PATIENCE_S = 60.0

_TIMES_END = HEADER.size + TIMES.size

_CHILD = """
import socket, sys
from forebay.engine.worker.worker_process import run_worker
lifeline, doorbell, done, counters = map(int, sys.argv[1:])
run_worker(socket.socket(fileno=lifeline), socket.socket(fileno=doorbell), socket.socket(fileno=done), counters)
"""

Raw = tuple[str, tuple[int, ...], bytes]


class Response(NamedTuple):
    """One answer to a parcel."""

    token: int
    outputs: dict[str, NDArray[Any]]
    datatypes: dict[str, str]
    parameters: dict[str, Any]
    error: ServingError | None
    index: int
    final: bool
    in_place: bool
    """True if the outputs lie in the block that was lent with the request."""
    needs_rooms: Mapping[str, int] = MappingProxyType({})
    """Outputs that wait on the device."""


class RunsAnswer(NamedTuple):
    """One RUNS_DONE or RUNS_FAILED."""

    kind: Kind
    runs: list[Run]
    error: ServingError | None
    remarks: list[RowRemark]


def spec_from_config(
    config: Mapping[str, Any], *, model: str, model_path: str, version: int = 1, **overrides: Any
) -> InstanceSpec:
    """Return what the supervisor would send for a small config written as a dict (fields as in config.pbtxt)."""

    def tensors(kind: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=item["name"],
                datatype="BYTES" if item["data_type"] == "TYPE_STRING" else item["data_type"].removeprefix("TYPE_"),
                dims=tuple(item["dims"]),
                optional=item.get("optional", False),
                reshape=tuple(item["reshape"]["shape"]) if "reshape" in item else None,
            )
            for item in config.get(kind, ())
        )

    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    values: dict[str, Any] = {
        "model": model,
        "version": version,
        "route": 1,
        "instance": 1,
        "instance_name": f"{model}_0_0",
        "backend": config.get("backend", ""),
        "model_path": model_path,
        "version_path": os.path.join(model_path, str(version)),
        "model_file": config.get("default_model_filename", ""),
        "max_batch_size": config.get("max_batch_size", 0),
        "inputs": tensors("input"),
        "outputs": tensors("output"),
        "parameters": parameters,
        "config_json": msgspec.json.encode({"name": model, **config}),
        "platform": config.get("platform", ""),
        "decoupled": config.get("model_transaction_policy", {}).get("decoupled", False),
        **overrides,
    }
    return InstanceSpec(**values)


class WorkerHarness:
    """Starts the worker and loads ``spec``; ends it on exit.

    Raises (on entry):
        ServingError: the worker answered Failed.
    """

    def __init__(
        self,
        spec: InstanceSpec,
        *,
        arena_bytes: int = 32 << 20,
        env: Mapping[str, str] | None = None,
        load: bool = True,
        counted: bool = True,
    ) -> None:
        self.spec = spec
        self._counters = CountersFile()
        offset = self._counters.allocate(instance_words(spec.max_batch_size))
        self.spec = msgspec.structs.replace(spec, counter_offset=offset)
        self.counters = self._counters.block(offset, instance_words(spec.max_batch_size))
        self._arena_fd = create_memory_file("harness", arena_bytes)
        self.arena = Arena(self._arena_fd, arena_bytes)
        self.blocks = BlockAllocator(arena_bytes)
        self._doorbell, doorbell = create_doorbell()
        completion, self._completion = create_doorbell()
        done, self._done = create_doorbell()
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE_S)
        self._completion.settimeout(PATIENCE_S)
        self._done.settimeout(PATIENCE_S)
        self.lifeline: Lifeline[WorkerToSupervisor] = Lifeline(ours, WorkerToSupervisor)
        self._tokens = itertools.count(1)
        self._batches = itertools.count(1)
        self._last_batch = 0
        self._heads: dict[int, ParcelHead] = {}
        #: Replies that have arrived and were not asked for: token, flags, head.
        self._replies: deque[tuple[int, int, ReplyHead]] = deque()
        #: Kinds of the messages that replies came in.
        self.reply_kinds: list[Kind] = []
        fds = (theirs.fileno(), doorbell.fileno(), done.fileno(), self._counters.fd)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, *map(str, fds)],
            pass_fds=fds,
            env={**os.environ, "FOREBAY_TEST_BACKENDS": "1", **(env or {})},
        )
        for end in (theirs, doorbell, done):
            end.close()
        self.lifeline.send(
            ArenaUp(producer=PRODUCER, byte_size=arena_bytes, counted=counted),
            fds=(self._arena_fd, completion.fileno()),
        )
        completion.close()
        self._loads = load

    def __enter__(self) -> WorkerHarness:
        try:
            if self._loads:
                self.load()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- supervisor ---

    def load(self) -> Loaded:
        """Load the model.

        Raises:
            ServingError: the worker says why not.
        """
        self.lifeline.send(Load(spec=self.spec))
        answer = self._answer()
        assert isinstance(answer, Loaded)
        return answer

    def describe(self) -> Described:
        """Auto-complete.

        Raises:
            ServingError: the worker says why not.
        """
        self.lifeline.send(Describe(spec=self.spec))
        answer = self._answer()
        assert isinstance(answer, Described)
        return answer

    def _answer(self) -> WorkerToSupervisor:
        while True:
            message, _fds = self.lifeline.receive()
            if isinstance(message, Failed):
                raise from_wire(message.code, message.text)
            if not isinstance(message, Phase):
                return message

    def tell(self, message: SupervisorToWorker) -> None:
        """Send a lifeline message to the serving worker."""
        self.lifeline.send(message)
        self._ring(HEADER.pack(Kind.WAKE, 0, 0, 0, 0))

    def drop_producer(self) -> None:
        """Tell the worker that this producer is gone."""
        self.tell(ArenaDown(producer=PRODUCER))

    def close(self) -> None:
        """Stop the worker and wait for it; kill it if it hangs."""
        with contextlib.suppress(PeerClosed, OSError):
            self.tell(Stop())
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for end in (self._doorbell, self._completion, self._done):
            end.close()
        self.lifeline.close()
        with contextlib.suppress(OSError):
            os.close(self._arena_fd)
        with contextlib.suppress(BufferError):
            self.arena.close()
        os.close(self._counters.fd)

    def counter(self, word: InstanceCounter) -> int:
        """Return one word of the instance's counters."""
        return int(self.counters[word])

    # --- producer: parcels ---

    def place(self, name: str, value: NDArray[Any] | Raw | TensorPlace) -> TensorPlace:
        """Write a tensor into a block of its own, unless it has its place already."""
        if isinstance(value, TensorPlace):
            return value
        if isinstance(value, tuple):
            datatype, shape, data = value
        else:
            datatype, shape = datatype_of(value), value.shape
            data = encode_bytes(value) if datatype == "BYTES" else np.ascontiguousarray(value).tobytes()
        offset = self.blocks.allocate(len(data))
        self.arena.slice(offset, len(data))[:] = data
        return TensorPlace(name, datatype, tuple(shape), offset, len(data))

    def submit(self, *requests: Mapping[str, Any], rows: int | None = None, **head: Any) -> list[int]:
        """Send one batch; each request maps input names to arrays or raw tensors. Returns the tokens.

        Args:
            rows: of every request; default: the first dimension if the model batches, else 1.
            head: further fields of :class:`ParcelHead`; ``reply_bytes`` defaults to 4096.
        """
        parts: list[bytes] = []
        tokens: list[int] = []
        reply_bytes = head.pop("reply_bytes", 4096)
        for inputs in requests:
            places = tuple(self.place(name, value) for name, value in inputs.items())
            offset = self.blocks.allocate(reply_bytes) if reply_bytes else 0
            encoded = ParcelHead(inputs=places, reply_offset=offset, reply_bytes=reply_bytes, **head)
            token = next(self._tokens)
            self._heads[token] = encoded
            tokens.append(token)
            count = rows
            if count is None:
                count = places[0].shape[0] if self.spec.max_batch_size and places else 1
            raw = msgspec.msgpack.encode(encoded)
            parts.append(PARCEL.pack(PRODUCER, count, token, time.monotonic_ns(), len(raw)) + raw)
        self._ring(HEADER.pack(Kind.PARCELS, 0, len(parts), 0, next(self._batches)) + b"".join(parts))
        return tokens

    def infer(self, inputs: Mapping[str, Any], **head: Any) -> list[Response]:
        """Send one request and return its responses up to the final one; the empty final one is left out."""
        [token] = self.submit(inputs, **head)
        responses = [response for response in self.responses(token) if response.index >= 0]
        self.wait_done()
        return responses

    def responses(self, *tokens: int) -> list[Response]:
        """Wait until each token had its final response; lend blocks as they are asked for."""
        open_tokens = set(tokens)
        received: list[Response] = []
        while open_tokens:
            response = self.next_response()
            received.append(response)
            if response.final:
                open_tokens.discard(response.token)
        return received

    def next_response(self, *, lend: bool = True) -> Response:
        """Wait for one response; a request for a larger block is answered here, unless ``lend`` is false."""
        while True:
            if not self._replies:
                self._receive_replies()
            token, flags, reply = self._replies.popleft()
            if reply.needs_bytes and lend:
                offset = self.blocks.allocate(reply.needs_bytes)
                self.collect(token, offset, reply.needs_bytes)
                continue
            return self._response(token, reply, bool(flags & FLAG_FINAL))

    def _receive_replies(self) -> None:
        """Read one message with one reply or several."""
        message = self._completion.recv(MESSAGE_BYTES_MAX)
        kind, flags, count, _instance, _batch = HEADER.unpack_from(message)
        self.reply_kinds.append(Kind(kind))
        if kind == Kind.PARCEL_REPLY:
            (token,) = TOKEN.unpack_from(message, _TIMES_END)
            packed = [(token, flags, message[_TIMES_END + TOKEN.size :])]
        else:
            assert kind == Kind.PARCEL_REPLIES, f"unexpected message of kind {kind}"
            packed, offset = [], _TIMES_END
            for _ in range(count):
                token, flags, size = REPLY.unpack_from(message, offset)
                offset += REPLY.size + size
                packed.append((token, flags, message[offset - size : offset]))
        for token, flags, head in packed:
            self._replies.append((token, flags, msgspec.msgpack.decode(head, type=ReplyHead)))

    def collect(self, token: int, offset: int, byte_size: int, rooms: Rooms | None = None) -> None:
        """Lend a reply block, and room on the device."""
        lent = b"" if rooms is None else msgspec.msgpack.encode(rooms)
        self._ring(HEADER.pack(Kind.COLLECT, 0, 1, PRODUCER, 0) + GROW.pack(token, offset, byte_size) + lent)

    def cancel(self, *tokens: int) -> None:
        """Tell the worker that the clients left."""
        packed = b"".join(TOKEN.pack(token) for token in tokens)
        self._ring(HEADER.pack(Kind.CANCEL, 0, len(tokens), PRODUCER, 0) + packed)

    def _response(self, token: int, reply: ReplyHead, final: bool) -> Response:
        outputs: dict[str, NDArray[Any]] = {}
        datatypes: dict[str, str] = {}
        head = self._heads[token]
        in_place = bool(reply.outputs)
        for place in reply.outputs:
            if place.memory:
                datatypes[place.name] = f"{place.datatype} on the device"
                continue
            data = bytes(self.arena.slice(place.offset, place.byte_size))
            outputs[place.name] = view_tensor(memoryview(data), place.datatype, place.shape)
            datatypes[place.name] = place.datatype
            in_place = in_place and head.reply_offset <= place.offset < head.reply_offset + head.reply_bytes
        for tensor in reply.inline:
            outputs[tensor.name] = view_tensor(memoryview(tensor.data), tensor.datatype, tensor.shape)
            datatypes[tensor.name] = tensor.datatype
        error = from_wire(reply.code, reply.text) if reply.text else None
        return Response(
            token, outputs, datatypes, reply.parameters, error, reply.index, final, in_place, reply.needs_rooms
        )

    # --- producer: slab rows ---

    def slab(self, capacity: int) -> int:
        """Allocate a slab; returns its base."""
        return self.blocks.allocate(self.layout(capacity).byte_size)

    def layout(self, capacity: int) -> SlabLayout:
        return SlabLayout(self.spec.inputs, self.spec.outputs, capacity)

    def area(self, base: int, capacity: int, name: str) -> NDArray[Any]:
        """Return the area of an input or output, writable, ``[capacity, *dims]``."""
        layout = self.layout(capacity)
        specs = (*self.spec.inputs, *self.spec.outputs)
        for spec, area in zip(specs, (*layout.inputs, *layout.outputs), strict=True):
            if spec.name == name:
                dtype = DATATYPES[spec.datatype].numpy_dtype
                count = capacity * area.row_bytes // dtype.itemsize
                flat = np.frombuffer(self.arena.view, dtype=dtype, count=count, offset=base + area.offset)
                return flat.reshape(capacity, *spec.dims)
        raise KeyError(name)

    def send_runs(self, *runs: Run) -> None:
        """Send one RUNS batch."""
        self._last_batch = next(self._batches)
        self._ring(pack_runs(Kind.RUNS, 0, 0, self._last_batch, list(runs)))

    def run_of(self, base: int, capacity: int, first: int, rows: int, *, each: int = 1) -> Run:
        """Return a run of requests of ``each`` rows."""
        requests = rows // each
        return Run(PRODUCER, requests, base, capacity, first, rows, 0, requests * time.monotonic_ns())

    def runs_answer(self) -> RunsAnswer:
        """Wait for RUNS_DONE or RUNS_FAILED."""
        message = self._completion.recv(MESSAGE_BYTES_MAX)
        kind, flags, count, _instance, _batch = HEADER.unpack_from(message)
        runs = unpack_runs(memoryview(message), count, _TIMES_END)
        end = _TIMES_END + count * RUN.size
        error = from_wire(message[end], message[end + 1 :].decode()) if kind == Kind.RUNS_FAILED else None
        remarks = msgspec.msgpack.decode(message[end:], type=list[RowRemark]) if flags & FLAG_REMARKS else []
        return RunsAnswer(Kind(kind), runs, error, remarks)

    def cancel_rows(self, base: int, *firsts: int) -> None:
        """Tell the worker that the clients of requests in the batch that was sent last have left."""
        self._ring(pack_rows_cancel(self._last_batch, PRODUCER, base, firsts))

    # --- scheduler ---

    def wait_done(self) -> tuple[int, tuple[int, ...]]:
        """Wait for the DONE of one batch; returns (batch, times in ns)."""
        while True:
            message = self._done.recv(MESSAGE_BYTES_MAX)
            kind, _flags, _count, _instance, batch = HEADER.unpack_from(message)
            if kind == Kind.DONE:
                return batch, TIMES.unpack_from(message, HEADER.size)
            # A request that outlived its batch has its answer.
            assert kind == Kind.CLOSED, f"unexpected message of kind {kind}"

    def told_scheduler(self) -> tuple[Kind, list[tuple[int, int, int]], int]:
        """Wait for SYNCED or UNSYNCED; returns it, what it names (producer, flags, token), and its epoch."""
        while True:
            message = self._done.recv(MESSAGE_BYTES_MAX)
            kind, _flags, count, _instance, epoch = HEADER.unpack_from(message)
            if kind in (Kind.SYNCED, Kind.UNSYNCED):
                parts = [OPEN.unpack_from(message, HEADER.size + index * OPEN.size) for index in range(count)]
                return Kind(kind), [(producer, flags, token) for producer, flags, token in parts], epoch

    def send_raw(self, message: bytes) -> None:
        """Send any bytes to the worker's doorbell."""
        self._ring(message)

    def _ring(self, message: bytes) -> None:
        self._doorbell.sendall(message)
