"""Nested inference (BLS) over the shared-memory client: a worker is one more client of its own server.

The connection is made by the first nested call of a process, so models without any cost nothing. One thread reads the
answers; nothing is polled. Model control goes over the supervisor's control socket.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Mapping

import zmq

from forebay.client import shm
from forebay.client.pending import Pending, PendingParcel
from forebay.client.placement import BlockPlacement, Options, Placement, RowsPlacement
from forebay.engine.backends.base import Array
from forebay.engine.backends.python_model.engine_access import NestedRequest, NestedResponse
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.ipc.channel import TypedCodec, control_address
from forebay.ipc.errors import Internal, InvalidArgument, ServingError, Unavailable, Unsupported, from_wire
from forebay.ipc.messages import Command, CommandReply, ControlToFrontend
from forebay.ipc.tensor import DATATYPES, TensorSpec, datatype_of

_START, _END = 1, 2
#: Seconds that a model control call may take; a load may have to read gigabytes.
_CONTROL_SECS_MAX = 3600.0

OnResponse = Callable[[NestedResponse], None]


class _Call:
    """A nested request in flight."""

    __slots__ = ("on_response", "outputs", "pending", "placement")

    def __init__(
        self, placement: Placement, pending: Pending, outputs: tuple[str, ...], on_response: OnResponse
    ) -> None:
        self.placement = placement
        self.pending = pending
        self.outputs = outputs
        self.on_response = on_response


class ShmEngineAccess:
    """:class:`EngineAccess` for a worker process. Thread-safe."""

    def __init__(self, runtime_directory: str) -> None:
        self._runtime_directory = runtime_directory
        self._lock = threading.Lock()
        self._engine: shm.Engine | None = None
        #: Calls that have something to deliver.
        self._news: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._calls: set[_Call] = set()
        self._is_needed = threading.Condition(self._lock)
        self._requests = itertools.count(1)

    # --- inference ---

    def infer(self, request: NestedRequest, on_response: OnResponse) -> Callable[[], None]:
        engine = self._connect()
        connection = engine.connection
        try:
            model = connection.open_model(request.model, max(request.version, 0))
        except ServingError as error:
            if error.code == Unsupported.code:
                raise
            # Triton's words for whatever is wrong with the model (spec P-093).
            raise Internal(f"Failed for execute the inference request. Model '{request.model}' is not ready.") from None
        signature = model.signature
        if signature.is_decoupled and not request.allows_many_responses:
            raise Unsupported(
                f"Model {request.model} is using the decoupled. The current BLS request call doesn't support models "
                "using the decoupled transaction policy. Please use 'decoupled=True' argument to the 'exec' or "
                "'async_exec' calls for decoupled models.'"
            )
        specs = {spec.name: spec for spec in signature.inputs}
        for tensor in request.inputs:
            if tensor.name() not in specs:
                raise InvalidArgument(f"unexpected inference input '{tensor.name()}' for model '{request.model}'")
        known = {spec.name for spec in signature.outputs}
        for name in request.outputs:
            if name not in known:
                raise InvalidArgument(f"unexpected inference output '{name}' for model '{request.model}'")
        options = Options(
            request_id=request.id,
            outputs=request.outputs,
            parameters=dict(request.parameters),
            sequence_id=request.correlation_id,
            sequence_start=bool(request.flags & _START),
            sequence_end=bool(request.flags & _END),
            timeout_us=request.timeout_us,
        )
        arrays = [(specs[tensor.name()], tensor.data) for tensor in request.inputs]
        placement: Placement
        if signature.uses_rows and not options.needs_parcel and len(arrays) == len(signature.inputs):
            rows = arrays[0][1].shape[0] if signature.max_batch_size > 0 and arrays[0][1].ndim else 1
            placement = RowsPlacement(connection, model, rows)
        else:
            placement = BlockPlacement(connection, model)
        for spec, array in arrays:
            placement.put(spec, _typed(spec, array))
        call = _Call(placement, placement.submit(options), request.outputs, on_response)
        with self._lock:
            self._calls.add(call)
            self._is_needed.notify()
        self._watch(call)
        return lambda: connection.cancel(call.pending)

    def _connect(self) -> shm.Engine:
        with self._lock:
            if self._engine is None or self._engine.connection.is_broken:
                is_first = self._engine is None
                self._engine = shm.connect(self._runtime_directory)
                if is_first:
                    threading.Thread(target=self._read, name="bls", daemon=True).start()
            return self._engine

    def _watch(self, call: _Call) -> None:
        """Have what comes next delivered: by the reading thread, or now if it is here."""
        engine = self._engine
        assert engine is not None
        if not engine.connection.completions.notify(call.pending, lambda: self._news.put(call)):
            self._deliver(call)

    def _read(self) -> None:
        """The thread that waits for answers while any are due."""
        while True:
            with self._lock:
                while not self._calls:
                    self._is_needed.wait()
                engine = self._engine
            assert engine is not None
            try:
                engine.connection.completions.wait_any()
            except ServingError as error:
                self._fail_all(error)
                continue
            with contextlib.suppress(queue.Empty):
                while True:
                    self._deliver(self._news.get_nowait())

    def _fail_all(self, error: ServingError) -> None:
        with self._lock:
            calls, self._calls = self._calls, set()
        for call in calls:
            call.on_response(NestedResponse((), {}, error, True, True))

    def _deliver(self, call: _Call) -> None:
        pending = call.pending
        is_done = pending.is_done
        for response in self._responses(call, is_done=is_done):
            call.on_response(response)
        if is_done:
            with self._lock:
                self._calls.discard(call)
        else:
            self._watch(call)

    def _responses(self, call: _Call, *, is_done: bool) -> list[NestedResponse]:
        """Return what has arrived for a call; the last is final if it is done."""
        pending, placement = call.pending, call.placement
        found: list[NestedResponse] = []
        if isinstance(pending, PendingParcel) and isinstance(placement, BlockPlacement):
            while pending.responses:
                reply, held = pending.responses.popleft()
                if reply.text or reply.code:
                    found.append(NestedResponse((), {}, from_wire(reply.code, reply.text), True, False))
                    continue
                datatypes = {place.name: place.datatype for place in reply.outputs}
                datatypes.update((tensor.name, tensor.datatype) for tensor in reply.inline)
                outputs = placement.outputs_of(reply, held)
                tensors = tuple(Tensor.of_datatype(name, datatypes[name], array) for name, array in outputs.items())
                found.append(NestedResponse(tensors, reply.parameters, None, True, False))
        elif is_done and pending.error is None:
            wanted = [spec for spec in pending.model.signature.outputs if not call.outputs or spec.name in call.outputs]
            tensors = tuple(
                Tensor.of_datatype(spec.name, spec.datatype, placement.leased_output(pending, spec.name))
                for spec in wanted
            )
            found.append(NestedResponse(tensors, {}, None, True, False))
        if not is_done:
            return found
        if pending.error is not None:
            found.append(NestedResponse((), {}, pending.error, True, True))
        elif found:
            found[-1] = found[-1]._replace(final=True)
        else:
            found.append(NestedResponse((), {}, None, False, True))
        return found

    # --- model control ---

    def load_model(self, name: str, config: str, files: Mapping[str, bytes]) -> None:
        encoded = {path.removeprefix("file:"): content for path, content in files.items()}
        self._command("load", {"name": name, "config": config, "files": encoded})

    def unload_model(self, name: str, *, unload_dependents: bool) -> None:
        self._command("unload", {"name": name, "unload_dependents": unload_dependents})

    def is_model_ready(self, name: str, version: str) -> bool:
        return any(
            model == name and state == "READY" and version in ("", str(number))
            for model, number, state in self._connect().models()
        )

    def _command(self, verb: str, arguments: dict[str, object]) -> None:
        codec: TypedCodec[object] = TypedCodec(ControlToFrontend)
        request = next(self._requests)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        control = context.socket(zmq.DEALER)
        control.setsockopt(zmq.LINGER, 0)
        try:
            control.connect(control_address(self._runtime_directory))
            control.send(codec.encode(Command(request=request, verb=verb, arguments=arguments)))
            while control.poll(int(_CONTROL_SECS_MAX * 1000)):
                reply = codec.decode(control.recv())
                if isinstance(reply, CommandReply) and reply.request == request:
                    if reply.code >= 0:
                        raise from_wire(reply.code, reply.text)
                    return
            raise Unavailable(f"the server did not answer '{verb}' within {_CONTROL_SECS_MAX:.0f} s")
        finally:
            control.close()
            context.term()


def _typed(spec: TensorSpec, array: Array) -> Array:
    """Return the array if the model takes its datatype.

    Raises:
        InvalidArgument: with Triton's text (spec H-085).
    """
    if spec.datatype != "BYTES" and array.dtype != DATATYPES[spec.datatype].numpy_dtype:
        raise InvalidArgument(
            f"inference input '{spec.name}' data-type is '{datatype_of(array)}', "
            f"but the model expects '{spec.datatype}'"
        )
    return array
