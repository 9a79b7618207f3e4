"""Inference on tensors in GPU memory of this process: nothing comes to the host, and nothing is copied but on the GPU.

::

    import forebay.client.device
    import forebay.client.shm

    with (
        forebay.client.shm.connect() as engine,
        forebay.client.device.cuda_arena(engine, 64 << 20) as arena,  # on GPU 0, seen by the server's workers there
    ):
        model = arena.model("image_model")
        x = model.input("image", (8, 3, 224, 224))     # a CuPy array in the arena: fill it in place
        model.put("image", tensor)                     # or copy from any library's GPU tensor (DLPack)
        y = model.infer()["scores"]                    # a CuPy array in the arena; or torch.from_dlpack(y), not copied

Models must live on the arena's GPU, and so must the steps of ensembles that read inputs or make outputs. Outputs of
fixed shapes stay on the GPU; for others ``infer`` is told their largest size. CuPy is needed (``pip install
cupy-cuda13x``), and only here.

The memory is this process's. Workers have it open, so it is freed by :meth:`DeviceArena.close` when they have closed
it, or at the end of the process.
"""

from __future__ import annotations

import importlib
import os
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from forebay.client.device_pools import DeviceLease, memory_numbers
from forebay.client.ensembles import PendingEnsemble
from forebay.client.errors import DeadlineExceeded, EngineGone
from forebay.client.opened import Opened
from forebay.client.options import NO_OPTIONS, Options, deadline_after
from forebay.client.parcels import describe
from forebay.client.pending import PendingParcel, PendingResponses
from forebay.client.placement import unknown_tensor
from forebay.client.places import full_shape, row_counts
from forebay.client.shm import Engine
from forebay.ipc.arena import BlockAllocator
from forebay.ipc.errors import Internal, InvalidArgument, ServingError, Unavailable, Unsupported
from forebay.ipc.messages import DeviceMemory, TensorPlace
from forebay.ipc.tensor import DATATYPES, TensorSpec, byte_size

#: An array of whatever library the memory belongs to; CuPy's for GPUs.
DeviceTensor = Any


class ExportedMemory(Protocol):
    """Device memory of this process that others can open."""

    device_id: int
    byte_size: int
    handle: bytes
    """64 bytes, as ``cudaIpcGetMemHandle`` gives them."""

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> DeviceTensor:
        """Return an array over a part of it."""
        ...

    def copy(self, target: DeviceTensor, source: object) -> None:
        """Copy from any tensor on the device that speaks DLPack."""
        ...

    def synchronize(self) -> None:
        """Wait until what was written here is there for others."""
        ...

    def close(self) -> None:
        """Free it with the last array that looks into it; nobody else has it open."""
        ...


class _CudaBlock:
    """A block of ``cudaMalloc``, freed with the last reference to it."""

    def __init__(self, runtime: Any, byte_size: int) -> None:
        self.address = int(runtime.malloc(byte_size))
        weakref.finalize(self, _free, runtime, self.address, os.getpid()).atexit = False


def _free(runtime: Any, address: int, pid: int) -> None:
    # A forked child has the block's object, and no CUDA.
    if os.getpid() == pid:
        runtime.free(address)


#: Blocks that others may have open, though nobody here refers to them any more.
_exported_blocks: set[_CudaBlock] = set()


class CudaMemory:
    """A block of ``cudaMalloc``, exported by its CUDA IPC handle. Kept until :meth:`close`."""

    def __init__(self, byte_size: int, device_id: int) -> None:
        self.device_id = device_id
        self.byte_size = byte_size
        self._cupy: Any = importlib.import_module("cupy")
        with self._cupy.cuda.Device(device_id):
            self._block: _CudaBlock | None = _CudaBlock(self._cupy.cuda.runtime, byte_size)
            self.handle = bytes(self._cupy.cuda.runtime.ipcGetMemHandle(self._block.address))
        _exported_blocks.add(self._block)

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> DeviceTensor:
        cupy, block = self._cupy, self._block
        if block is None:
            raise InvalidArgument("the device arena was closed")
        owner = cupy.cuda.UnownedMemory(block.address, self.byte_size, block, self.device_id)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(owner, offset))

    def copy(self, target: DeviceTensor, source: object) -> None:
        with self._cupy.cuda.Device(self.device_id):
            tensor = self._cupy.from_dlpack(source)
            # A BF16 input is an array of uint16: it gets the bits. Anything else is converted, as in host memory.
            target[...] = tensor.view(target.dtype) if tensor.dtype.name == "bfloat16" else tensor

    def synchronize(self) -> None:
        with self._cupy.cuda.Device(self.device_id):
            self._cupy.cuda.get_current_stream().synchronize()

    def close(self) -> None:
        if self._block is not None:
            _exported_blocks.discard(self._block)
            self._block = None


def cuda_arena(engine: Engine, byte_size: int, device_id: int = 0) -> DeviceArena:
    """Return an arena in the memory of a GPU."""
    return DeviceArena(engine, CudaMemory(byte_size, device_id))


class DeviceArena:
    """Device memory for the tensors of requests. Used by one thread at a time; a context manager, which closes it."""

    def __init__(self, engine: Engine, memory: ExportedMemory) -> None:
        self.engine = engine
        self.memory = memory
        self.exported = DeviceMemory(
            owner=0,
            number=next(memory_numbers),
            device_id=memory.device_id,
            byte_size=memory.byte_size,
            handle=memory.handle,
        )
        self._blocks = BlockAllocator(memory.byte_size)
        #: What requests that were given up have left, by whichever thread reads answers.
        self._returns: deque[tuple[int, int]] = deque()
        #: Requests that were given up and may still use the memory.
        self._given_up: list[PendingParcel] = []
        self._is_closed = False

    def model(self, name: str, version: int | str | None = None) -> DeviceModel:
        """Return a handle of a model.

        Raises:
            ServingError: there is no such model.
        """
        return DeviceModel(self, self.engine.connection.open_model(name, int(version or 0)))

    def allocate(self, size: int) -> int:
        """Return the offset of free bytes.

        Raises:
            ArenaFull: there are not so many.
            InvalidArgument: the arena was closed.
        """
        self.check_open()
        while self._returns:
            self.free(*self._returns.popleft())
        return self._blocks.allocate(max(size, 1))

    def free(self, offset: int, size: int) -> None:
        """Give bytes back."""
        self._blocks.free(offset, max(size, 1))

    def lease(self, offset: int, byte_size: int) -> DeviceLease:
        """Return what stands for allocated bytes as long as a step of an ensemble may use them."""
        return DeviceLease(deque(), self.exported, offset, byte_size)

    def free_with(self, lease: DeviceLease, offset: int, size: int) -> None:
        """Give bytes of a request that was given up back when no step refers to their lease any more."""
        weakref.finalize(lease, self._returns.append, (offset, size)).atexit = False

    def free_after(self, pending: PendingParcel, places: Sequence[tuple[int, int]]) -> None:
        """Give (offset, size) of a request back when the engine has let go of it."""

        def give_back() -> None:
            self._returns.extend(places)

        if not self.engine.connection.completions.notify(pending, give_back):
            give_back()
        self._given_up = [*(request for request in self._given_up if not request.is_done), pending]

    # --- the end ---

    def check_open(self) -> None:
        """Raise InvalidArgument if it was closed."""
        if self._is_closed:
            raise InvalidArgument("the device arena was closed")

    def close(self, timeout_s: float | None = None) -> None:
        """Free the memory: no request uses it any more, and no worker has it open. A second call does nothing.

        Arrays that look into it stay as they are; it is freed with the last of them. Requests that were given up are
        waited for, and so is what the workers are running.

        Args:
            timeout_s: how long to wait; None: as long as it takes.

        Raises:
            DeadlineExceeded: a worker has it open; it is not freed, close it again.
            EngineGone: the connection has ended, and nobody knows what workers do with it: close it again after
                ``engine.reconnect()``. A server that has ended has no workers any more, and is no error.
        """
        if self._is_closed:
            return
        connection, deadline_ns = self.engine.connection, deadline_after(timeout_s)
        try:
            for pending in self._given_up:
                connection.completions.wait(pending, deadline_ns)
            self._have_closed(deadline_ns)
        except EngineGone:
            if not connection.has_server_ended:
                raise
        self._is_closed = True
        self.memory.close()

    def _have_closed(self, deadline_ns: int) -> None:
        """Have the workers close the memory."""
        connection = self.engine.connection
        connection.check_usable()
        while True:
            try:
                return connection.close_memory(self.exported.number, self.exported.device_id)
            except EngineGone:
                raise
            except Unavailable:
                if 0 < deadline_ns <= time.monotonic_ns():
                    raise DeadlineExceeded("a worker still has the device arena open") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DeviceModel:
    """One model as callers with tensors on its GPU use it: fill inputs, run, take outputs; one request at a time."""

    def __init__(self, arena: DeviceArena, opened: Opened) -> None:
        self._arena = arena
        self._opened = opened
        #: Where tensors are, with the room that they have, by ("input" or "output", name).
        self._room: dict[tuple[str, str], tuple[int, int]] = {}
        self._inputs: dict[str, TensorPlace] = {}
        #: What stands for the places of a request to an ensemble while it runs, as in ``_room``.
        self._leases: dict[tuple[str, str], DeviceLease] = {}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._opened.signature.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._opened.signature.outputs

    def input(self, name: str, shape: Sequence[int]) -> DeviceTensor:
        """Return an input as an array on the device, to be filled in place.

        Args:
            shape: full shape, batch dimension included.

        Raises:
            InvalidArgument: no such input, or it is BYTES, which cannot be on a device.
            ArenaFull: there is no room.
        """
        spec = self._spec(name)
        full = tuple(int(size) for size in shape)
        size = byte_size(spec.datatype, full)
        offset = self._place("input", name, size)
        self._inputs[name] = TensorPlace(name, spec.datatype, full, offset, size, memory=1)
        return self._arena.memory.view(offset, full, DATATYPES[spec.datatype].numpy_dtype)

    def put(self, name: str, tensor: Any) -> None:
        """Copy an input from any library's tensor on the device: what has ``shape`` and ``__dlpack__``."""
        self._arena.memory.copy(self.input(name, tensor.shape), tensor)

    def _spec(self, name: str) -> TensorSpec:
        found = next((spec for spec in self.inputs if spec.name == name), None)
        if found is None:
            raise unknown_tensor("input", name, self.inputs, self._opened.name)
        if found.datatype == "BYTES":
            raise InvalidArgument(f"input '{name}' is BYTES, which cannot lie in device memory")
        return found

    def _place(self, kind: str, name: str, size: int) -> int:
        offset, room = self._room.get((kind, name), (0, -1))
        if room < size:
            if room >= 0:
                self._arena.free(offset, room)
            offset = self._arena.allocate(size)
            self._room[kind, name] = (offset, size)
        return offset

    def infer(
        self,
        *,
        output_bytes: Mapping[str, int] | None = None,
        timeout_s: float | None = None,
        options: Options = NO_OPTIONS,
    ) -> dict[str, DeviceTensor]:
        """Run the request and wait for its answer.

        Args:
            output_bytes: room for outputs whose shapes vary.

        Returns:
            Every wanted output as an array on the device, valid until the next call.

        Raises:
            InvalidArgument: an input was not filled, or the size of an output is not known.
            ServingError: the server's answer.
        """
        connection = self._arena.engine.connection
        pending = self._make_request(output_bytes or {}, options)
        self._arena.memory.synchronize()
        connection.submit(pending)
        try:
            if not pending.has_news:
                connection.completions.wait(pending, deadline_after(timeout_s))
        except BaseException:
            self._give_up(pending)
            connection.cancel(pending)
            raise
        self._leases.clear()
        if pending.error is not None:
            raise pending.error
        reply, held = pending.responses.popleft()
        for place in reply.outputs:
            self._check_place(place, pending.device_lease(place, held) if place.memory else None)
        return {
            place.name: self._arena.memory.view(place.offset, place.shape, DATATYPES[place.datatype].numpy_dtype)
            for place in reply.outputs
            if place.memory
        }

    def _give_up(self, pending: PendingResponses) -> None:
        """The engine still has the places: others for the next request."""
        if not isinstance(pending, PendingParcel):
            for key, (offset, size) in self._room.items():
                lease = self._leases.get(key) or self._arena.lease(offset, size)
                self._arena.free_with(lease, offset, size)
            self._leases.clear()
        else:
            self._arena.free_after(pending, list(self._room.values()))
        self._room.clear()
        self._inputs.clear()

    def _check_place(self, place: TensorPlace, lease: DeviceLease | None) -> None:
        """Raise what is wrong with where an ensemble has left an output, if anything is."""
        if self._opened.ensemble is None:
            return
        if lease is None:
            raise Unsupported(
                f"output '{place.name}' of ensemble '{self._opened.name}' is not made on GPU "
                f"{self._arena.memory.device_id}, or also read elsewhere"
            )
        if lease.memory != self._arena.exported:
            _offset, room = self._room["output", place.name]
            raise Internal(
                f"shared memory size specified with the request for output '{place.name}' ({room} bytes) "
                f"should be at least {place.byte_size} bytes to hold the results"
            )

    def _make_request(self, output_bytes: Mapping[str, int], options: Options) -> PendingResponses:
        self._arena.check_open()
        connection, opened = self._arena.engine.connection, self._opened
        signature = opened.signature
        missing = [spec.name for spec in signature.inputs if not spec.optional and spec.name not in self._inputs]
        if missing:
            raise InvalidArgument(f"model '{opened.name}' needs input '{missing[0]}', which was not filled")
        places = [self._inputs[spec.name] for spec in signature.inputs if spec.name in self._inputs]
        rows = max(row_counts(signature, places), default=1)
        wanted = [spec for spec in signature.outputs if not options.outputs or spec.name in options.outputs]
        targets = tuple(self._target(spec, rows, output_bytes) for spec in wanted)
        if opened.ensemble is not None:
            return self._ensemble_request(places, targets, rows, options)
        pending = PendingParcel(opened, rows, connection.next_token())
        reply = connection.loan_block(64)
        memories = (self._arena.exported,)
        describe(pending, places, reply, options, connection.view, memories=memories, targets=targets)
        return pending

    def _ensemble_request(
        self, places: Sequence[TensorPlace], targets: Sequence[TensorPlace], rows: int, options: Options
    ) -> PendingEnsemble:
        connection, opened, device_id = self._arena.engine.connection, self._opened, self._arena.memory.device_id
        if opened.signature.is_decoupled:
            raise Unsupported(f"ensemble '{opened.name}' is decoupled: its responses would overwrite one another")
        readers = connection.device_inputs(opened, options)
        for place in places:
            if readers.get(place.name) != device_id:
                raise InvalidArgument(
                    f"not every step of ensemble '{opened.name}' that reads '{place.name}' lives on GPU {device_id}"
                )
        leases = self._leases
        for kind, named in (("input", places), ("output", targets)):
            leases.update(((kind, place.name), self._arena.lease(place.offset, place.byte_size)) for place in named)
        return connection.ensemble_request(
            opened,
            [(place, leases["input", place.name]) for place in places],
            rows,
            options,
            {target.name: (device_id,) for target in targets},
            {target.name: leases["output", target.name] for target in targets},
        )

    def _target(self, spec: TensorSpec, rows: int, output_bytes: Mapping[str, int]) -> TensorPlace:
        if spec.name in output_bytes:
            size = output_bytes[spec.name]
        elif spec.is_fixed:
            size = byte_size(spec.datatype, full_shape(spec, rows, self._opened.signature.max_batch_size))
        else:
            raise InvalidArgument(f"output '{spec.name}' varies in size: say how large it gets, with output_bytes=")
        return TensorPlace(spec.name, "", (), self._place("output", spec.name, size), size, memory=1)


__all__ = ["CudaMemory", "DeviceArena", "DeviceModel", "ExportedMemory", "ServingError", "cuda_arena"]
