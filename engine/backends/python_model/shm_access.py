"""Nested inference (BLS) over the shared-memory client: a worker is one more client of its own server.

The connection is made by the first nested call of a process, so models without any cost nothing. A thread that waits
for an answer reads it itself; for those that event loops wait for there is one more thread. Model control goes over the
supervisor's control socket.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Mapping

import zmq

from forebay.client import shm
from forebay.client.errors import EngineGone
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.pending import BlockLease, Pending, PendingResponses
from forebay.client.placement import BlockPlacement, Placement, RowsPlacement
from forebay.engine.backends.python_model.engine_access import NestedCall, NestedRequest, NestedResponse
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.ipc.channel import TypedCodec, control_address
from forebay.ipc.errors import Internal, ServingError, Unavailable, Unsupported, from_wire
from forebay.ipc.messages import Command, CommandReply, ControlToFrontend, ReplyHead
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.validation import InputFacts, validate_request

_START, _END = 1, 2

#: Forms of requests that are known to fit their model; at the limit all are forgotten.
_CHECKED_MAX = 256

_DATATYPE_NAMES = {datatype.number: name for name, datatype in DATATYPES.items()}

#: Name, datatype, shape, and bytes (0 for BYTES) of an input.
_Facts = tuple[str, str, tuple[int, ...], int]

#: Seconds that a model control call may take; a load may have to read gigabytes.
_CONTROL_SECS_MAX = 3600.0


class _Call:
    """A nested request in flight: a :class:`NestedCall`."""

    def __init__(self, link: _Link, placement: Placement, pending: Pending, outputs: tuple[str, ...]) -> None:
        self._link = link
        self._placement = placement
        self._pending = pending
        #: Those wanted; empty: all.
        self._outputs = outputs

    def wait(self) -> None:
        # What ends the connection ends the request, too: with that error.
        with contextlib.suppress(EngineGone):
            self._link.connection.completions.wait(self._pending)

    def notify(self, on_news: Callable[[], None]) -> None:
        self._link.watch(self._pending, on_news)

    def cancel(self) -> None:
        self._link.connection.cancel(self._pending)

    def take(self) -> list[NestedResponse]:
        pending = self._pending
        is_done = pending.is_done
        found = self._answers() if isinstance(pending, PendingResponses) or is_done else []
        if not is_done:
            return found
        if pending.error is not None:
            found.append(NestedResponse((), {}, pending.error, True, True))
        elif found:
            found[-1] = found[-1]._replace(final=True)
        else:
            found.append(NestedResponse((), {}, None, False, True))
        return found

    def _answers(self) -> list[NestedResponse]:
        """Return the answers that nobody has taken."""
        pending, placement = self._pending, self._placement
        if isinstance(pending, PendingResponses) and isinstance(placement, BlockPlacement):
            found: list[NestedResponse] = []
            while pending.responses:
                found.append(_response(placement, *pending.responses.popleft()))
            return found
        if pending.error is not None:
            return []
        outputs = pending.model.signature.outputs
        wanted = [spec for spec in outputs if not self._outputs or spec.name in self._outputs]
        tensors = (
            Tensor.of_datatype(spec.name, spec.datatype, placement.leased_output(pending, spec.name)) for spec in wanted
        )
        return [NestedResponse(tuple(tensors), {}, None, True, False)]


def _response(placement: BlockPlacement, reply: ReplyHead, held: tuple[BlockLease, ...]) -> NestedResponse:
    if reply.text or reply.code:
        return NestedResponse((), {}, from_wire(reply.code, reply.text), True, False)
    datatypes = {place.name: place.datatype for place in reply.outputs}
    datatypes.update((tensor.name, tensor.datatype) for tensor in reply.inline)
    tensors = (
        Tensor.of_datatype(name, datatypes[name], array) for name, array in placement.outputs_of(reply, held).items()
    )
    return NestedResponse(tuple(tensors), reply.parameters, None, True, False)


class _Link:
    """One connection, and the thread that reads its answers while event loops wait for some."""

    def __init__(self, engine: shm.Engine) -> None:
        self.engine = engine
        self.connection = engine.connection
        #: Requests that event loops wait for.
        self._watched = 0
        self._is_needed = threading.Condition()
        self._reader: threading.Thread | None = None

    def watch(self, pending: Pending, on_news: Callable[[], None]) -> None:
        """Have ``on_news`` called when there is something to take, whether or not any thread waits."""

        def take_news() -> None:
            with self._is_needed:
                self._watched -= 1
            on_news()

        with self._is_needed:
            self._watched += 1
            self._is_needed.notify()
            if self._reader is None:
                self._reader = threading.Thread(target=self._read, name="bls", daemon=True)
                self._reader.start()
        if not self.connection.completions.notify(pending, take_news):
            take_news()

    def _read(self) -> None:
        while True:
            with self._is_needed:
                while not self._watched:
                    if self.connection.is_broken:
                        return
                    self._is_needed.wait()
            # The end of the connection is news to everybody who waits.
            with contextlib.suppress(EngineGone):
                self.connection.completions.wait_any()


class ShmEngineAccess:
    """:class:`EngineAccess` for a worker process. Thread-safe."""

    def __init__(self, runtime_directory: str) -> None:
        self._runtime_directory = runtime_directory
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._requests = itertools.count(1)
        #: Rows of forms of requests that are known to fit their model.
        self._checked: dict[tuple[int, tuple[_Facts, ...], tuple[str, ...]], int] = {}

    # --- inference ---

    def infer(self, request: NestedRequest) -> NestedCall:
        link = self._connect()
        connection = link.connection
        try:
            model = connection.open_model(request.model, max(request.version, 0))
        except ServingError:
            # Triton's words for whatever is wrong with the model (spec P-093).
            raise Internal(f"Failed for execute the inference request. Model '{request.model}' is not ready.") from None
        signature = model.signature
        if signature.is_decoupled and not request.allows_many_responses:
            raise Unsupported(
                f"Model {request.model} is using the decoupled. The current BLS request call doesn't support models "
                "using the decoupled transaction policy. Please use 'decoupled=True' argument to the 'exec' or "
                "'async_exec' calls for decoupled models.'"
            )
        rows = self._checked_rows(model, request)
        options = Options(
            request_id=request.id,
            # All of them is the same as none in particular.
            outputs=request.outputs if len(request.outputs) < len(signature.outputs) else (),
            parameters=dict(request.parameters),
            sequence_id=request.correlation_id,
            sequence_start=bool(request.flags & _START),
            sequence_end=bool(request.flags & _END),
            timeout_us=request.timeout_us,
        )
        placement: Placement
        uses_rows = (signature.uses_rows and not options.needs_parcel) or (signature.allows_rows and options.is_bare)
        if uses_rows and len(request.inputs) == len(signature.inputs):
            placement = RowsPlacement(connection, model, rows)
        else:
            placement = BlockPlacement(connection, model)
        for tensor in request.inputs:
            spec = model.entry.input_named(tensor.name())
            assert spec is not None
            placement.put(spec, tensor.data)
        return _Call(link, placement, placement.submit(options), request.outputs)

    def _checked_rows(self, model: Opened, request: NestedRequest) -> int:
        """Return the rows of a request that fits its model; each form of requests is checked once.

        Raises:
            InvalidArgument: it does not; Triton's text.
        """
        facts = tuple(_facts(tensor) for tensor in request.inputs)
        key = (model.route, facts, request.outputs)
        rows = self._checked.get(key)
        if rows is None:
            inputs = [InputFacts(name, datatype, shape, byte_size) for name, datatype, shape, byte_size in facts]
            rows = validate_request(model.entry, request.id, inputs, request.outputs).row_count
            if len(self._checked) >= _CHECKED_MAX:
                self._checked.clear()
            self._checked[key] = rows
        return rows

    def _connect(self) -> _Link:
        with self._lock:
            if self._link is None or self._link.connection.is_broken:
                self._link = _Link(shm.connect(self._runtime_directory))
            return self._link

    # --- model control ---

    def load_model(self, name: str, config: str, files: Mapping[str, bytes]) -> None:
        encoded = {path.removeprefix("file:"): content for path, content in files.items()}
        self._command("load", {"name": name, "config": config, "files": encoded})

    def unload_model(self, name: str, *, unload_dependents: bool) -> None:
        self._command("unload", {"name": name, "unload_dependents": unload_dependents})

    def is_model_ready(self, name: str, version: str) -> bool:
        return any(
            model == name and state == "READY" and version in ("", str(number))
            for model, number, state in self._connect().engine.models()
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


def _facts(tensor: Tensor) -> _Facts:
    datatype, array = _DATATYPE_NAMES[tensor.triton_dtype()], tensor.data
    return tensor.name(), datatype, array.shape, 0 if datatype == "BYTES" else array.nbytes
