"""Nested inference (BLS) over the shared-memory client: a worker is one more client of its own server.

The connection is made by the first nested call of a process, so models without any cost nothing. A thread that waits
for an answer reads it itself; for those that event loops wait for there is one more thread. Model control goes over the
supervisor's control socket.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping

import zmq

from forebay.client import shm
from forebay.client.connection import Connection
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.placement import BlockPlacement
from forebay.engine.backends.python_model.device_calls import OutputsOnGpu, device_call, gpu_of_outputs
from forebay.engine.backends.python_model.engine_access import NestedCall, NestedRequest
from forebay.engine.backends.python_model.shm_calls import BlockCall, Form, FormKey, Link, uses_gpu
from forebay.ipc.channel import TypedCodec, control_address
from forebay.ipc.errors import Internal, InvalidArgument, NotFound, ServingError, Unavailable, Unsupported, from_wire
from forebay.ipc.frontend_messages import Command, CommandReply, ControlToFrontend
from forebay.ipc.spans import Trace
from forebay.ipc.validation import InputFacts, id_prefix, validate_request

_START, _END = 1, 2

#: Seconds that a model control call may take; a load may have to read gigabytes.
_CONTROL_SECS_MAX = 3600.0


class ShmEngineAccess:
    """:class:`EngineAccess` for a worker process. Thread-safe."""

    def __init__(self, runtime_directory: str) -> None:
        self._runtime_directory = runtime_directory
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._requests = itertools.count(1)

    @property
    def connection(self) -> Connection | None:
        """What calls go over now; None: there was none yet."""
        return None if self._link is None else self._link.connection

    def close(self) -> None:
        """Leave the server. A later call comes back."""
        with self._lock:
            if self._link is not None:
                self._link.close()
                self._link = None

    # --- inference ---

    def infer(self, request: NestedRequest) -> NestedCall:
        link = self._link
        if link is None or link.connection.is_broken:
            link = self._connect()
        key = (
            request.model,
            request.version,
            tuple([tensor.facts for tensor in request.inputs]),
            request.outputs,
            request.allows_many_responses,
            request.output_device,
        )
        form = link.forms.get(key)
        if form is not None and form.uses_gpu:
            _look_for(link, request)
        if form is None or form.is_stale:
            form = _checked_form(link, request, key)
        model = form.model
        trace = None if request.trace is None else request.trace.step(model.name, model.version, request.id)
        return _gpu_call(link, form, request, trace) if form.uses_gpu else _host_call(link, form, request, trace)

    def _connect(self) -> Link:
        link = self._link
        if link is not None and not link.connection.is_broken:
            return link
        with self._lock:
            if self._link is not None and self._link.connection.is_broken:
                self._link.close()
                self._link = None
            if self._link is None:
                self._link = Link(shm.connect(self._runtime_directory))
            return self._link

    # --- model control ---

    def load_model(self, name: str, config: str, files: Mapping[str, bytes]) -> None:
        encoded = {path.removeprefix("file:"): content for path, content in files.items()}
        # An empty text would be taken for a configuration of its own.
        own_config = {"config": config} if config else {}
        self._command("load", {"name": name, "files": encoded, **own_config})

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


def _open(link: Link, request: NestedRequest) -> Opened:
    """Return the model that is asked.

    Raises:
        Internal: it is not ready; Triton's words for whatever is wrong with it (spec P-093).
    """
    try:
        return link.connection.open_model(request.model, _wanted_version(request))
    except ServingError:
        raise _not_ready(request.model) from None


def _look_for(link: Link, request: NestedRequest) -> None:
    """Follow the model that is asked to where it is now.

    Raises:
        Internal: it is not ready.
    """
    model = _open(link, request)
    try:
        link.connection.look_for(model)
    except ServingError:
        raise _not_ready(request.model) from None


def _not_ready(model: str) -> Internal:
    return Internal(f"Failed for execute the inference request. Model '{model}' is not ready.")


def _checked_form(link: Link, request: NestedRequest, key: FormKey) -> Form:
    """Return the form of a request that fits its model; each form is checked once.

    Raises:
        ServingError: it does not fit, or the model is not ready; Triton's texts.
    """
    if uses_gpu(key):
        _look_for(link, request)
    model = _open(link, request)
    _model, _version, facts, outputs, allows_many_responses, _output_device = key
    if model.signature.is_decoupled and not allows_many_responses:
        raise Unsupported(
            f"Model {request.model} is using the decoupled. The current BLS request call doesn't support models "
            "using the decoupled transaction policy. Please use 'decoupled=True' argument to the 'exec' or "
            "'async_exec' calls for decoupled models.'"
        )
    _check_names(request)
    inputs = [InputFacts(name, datatype, shape, byte_size) for name, datatype, shape, byte_size, _is_on_gpu in facts]
    rows = validate_request(model.entry, request.id, inputs, outputs).row_count
    form = Form(link, model, rows, key)
    link.keep_form(key, form)
    return form


def _gpu_call(link: Link, form: Form, request: NestedRequest, trace: Trace | None) -> NestedCall:
    """Submit a request that has tensors in the memory of a GPU, or wants some there."""
    model = form.model
    output_gpu = gpu_of_outputs(model, request)
    call = device_call(link, model, form.rows, request, _options(request, trace), output_gpu)
    if call is None:
        call = _host_call(link, form, request, trace)
    return call if output_gpu is None else OutputsOnGpu(call, link, output_gpu)


def _host_call(link: Link, form: Form, request: NestedRequest, trace: Trace | None) -> NestedCall:
    """Submit a request with all tensors in host memory."""
    if form.takes_rows(request):
        return form.call(request, trace)
    return BlockCall(link, BlockPlacement(link.connection, form.model), request, _options(request, trace))


def _options(request: NestedRequest, trace: Trace | None) -> Options:
    return Options(
        request_id=request.id,
        outputs=request.outputs,
        parameters=dict(request.parameters),
        sequence_id=request.correlation_id,
        sequence_start=bool(request.flags & _START),
        sequence_end=bool(request.flags & _END),
        timeout_us=request.timeout_us,
        trace=trace,
    )


def _wanted_version(request: NestedRequest) -> int:
    """Return the version that is asked for, 0 for the newest.

    Raises:
        NotFound: there is no such version.
    """
    if request.version == -1:
        return 0
    if request.version < 1:
        raise NotFound(f"versions begin at 1, there is no {request.version}")
    return request.version


def _check_names(request: NestedRequest) -> None:
    seen: set[str] = set()
    for tensor in request.inputs:
        if tensor.name() in seen:
            raise InvalidArgument(f"{id_prefix(request.id)}input '{tensor.name()}' already exists in request")
        seen.add(tensor.name())
