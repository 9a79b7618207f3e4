"""``pb_utils.InferenceRequest``: what a model is asked, and what it asks of other models (spec 7.2, 7.5)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from forebay.engine.backends.python_model.engine_access import ANYWHERE, ON_HOST, NestedRequest
from forebay.engine.backends.python_model.errors import TritonModelException
from forebay.engine.backends.python_model.gpus import Gpu
from forebay.engine.backends.python_model.nested_responses import ResponseIterator, only_response
from forebay.engine.backends.python_model.outer_requests import executing
from forebay.engine.backends.python_model.response import (
    Answering,
    Deliver,
    InferenceResponse,
    InferenceResponseSender,
    check_parameters,
)
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.ipc.messages import ParameterValue, TensorPlace
from forebay.ipc.spans import Trace
from forebay.ipc.worker_messages import InstanceSpec

if TYPE_CHECKING:
    from forebay.engine.worker.parcel_request import ParcelRequest
    from forebay.engine.worker.request_rows import RowRequest

#: Request flags (spec P-033).
SEQUENCE_START = 1
SEQUENCE_END = 2

#: Release flags (spec P-040).
RELEASE_ALL = 1
RELEASE_RESCHEDULE = 2


class Phase:
    """Where the model's life is: nested calls are only for the time between initialize and finalize (spec P-094)."""

    is_serving = False


class InferenceTrace:
    """The trace of a request; requests that are made with it appear below that (spec P-099)."""

    def __init__(self, trace: Trace | None = None) -> None:
        """None: the request is not traced."""
        self.trace = trace

    def get_context(self) -> str | None:
        """Return the W3C context as JSON in OpenTelemetry mode, else None."""
        return None if self.trace is None else self.trace.context or None


#: ``TRITONSERVER_MEMORY_GPU`` and ``_CPU``, as Triton's Python backend numbers them.
MEMORY_GPU, MEMORY_CPU = 0, 1


class PreferredMemory:
    """Where a nested call's outputs should lie (spec P-097)."""

    def __init__(self, preferred_memory_type: int, preferred_device_id: int = 0) -> None:
        self.preferred_memory_type = preferred_memory_type
        self.preferred_device_id = preferred_device_id

    @property
    def device_id(self) -> int:
        """The GPU, or the host."""
        return self.preferred_device_id if self.preferred_memory_type == MEMORY_GPU else ON_HOST


_NO_TRACE = InferenceTrace()
_NO_PARAMETERS: Mapping[str, ParameterValue] = {}


class Recipient:
    """The model that requests come to, as all its requests know it."""

    def __init__(self, spec: InstanceSpec, deliver: Deliver, gpu: Gpu | None = None) -> None:
        """
        Args:
            deliver: sends one response of the model.
            gpu: where tensors of requests may lie; None: on the host only.
        """
        self.gpu = gpu
        self.model = spec.model
        self.version = spec.version
        self.decoupled = spec.decoupled
        self.deliver = deliver
        #: Names and datatypes.
        self.inputs = tuple((tensor.name, tensor.datatype) for tensor in spec.inputs)
        self.outputs = tuple(tensor.name for tensor in spec.outputs)


class InferenceRequest:
    """A request to this model, or one that the model makes."""

    __slots__ = (
        "__weakref__",
        "_answering",
        "_correlation_id",
        "_flags",
        "_inputs",
        "_is_sender_taken",
        "_model_name",
        "_model_version",
        "_output_names",
        "_parameters",
        "_preferred_memory",
        "_recipient",
        "_release_flags",
        "_request_id",
        "_source",
        "_timeout",
        "_trace",
    )

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Sequence[Tensor] | None = None,
        requested_output_names: Sequence[str] | None = None,
        model_name: str = "",
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: Mapping[str, ParameterValue] | None = None,
    ) -> None:
        for tensor in inputs or ():
            if tensor is None:  # pyright: ignore[reportUnnecessaryComparison]  # models are not type-checked
                raise _empty("Input tensor", request_id, model_name)
        for name in requested_output_names or ():
            if not name:
                raise _empty("Requested output name", request_id, model_name)
        if not isinstance(correlation_id, int | str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TritonModelException("Correlation ID must be integer or string")
        self._request_id = request_id
        self._correlation_id = correlation_id
        self._inputs = list(inputs or ())
        self._output_names = tuple(requested_output_names or ())
        self._model_name = model_name
        self._model_version = model_version
        self._flags = flags
        self._timeout = timeout
        self._preferred_memory = preferred_memory
        self._trace = trace or _NO_TRACE
        self._parameters: Mapping[str, ParameterValue] = {} if parameters is None else check_parameters(parameters)
        self._release_flags = RELEASE_ALL
        self._recipient: Recipient | None = None
        self._source: ParcelRequest | RowRequest | None = None
        self._answering: Answering | None = None
        self._is_sender_taken = False

    @classmethod
    def of_parcel(cls, recipient: Recipient, parcel: ParcelRequest) -> InferenceRequest:
        """Return a client's request to the model.

        Raises:
            Internal: an input lies outside its arena.
        """
        head = parcel.head
        request = cls._of(recipient, parcel)
        request._request_id = head.id
        request._correlation_id = head.correlation_id
        request._inputs = [_input(recipient, parcel, place) for place in head.inputs]
        request._inputs += [
            Tensor.of_datatype(name, datatype, array) for name, (datatype, array) in parcel.control_inputs.items()
        ]
        request._output_names = parcel.requested_outputs
        request._flags = SEQUENCE_START * head.sequence_start + SEQUENCE_END * head.sequence_end
        request._timeout = head.timeout_us
        request._trace = _NO_TRACE if parcel.trace is None else InferenceTrace(parcel.trace)
        request._parameters = head.parameters
        if recipient.decoupled:
            # Somebody must notice if the model never takes its sender.
            request._answering = Answering(parcel, recipient.deliver, decoupled=True)
        return request

    @classmethod
    def of_row(cls, recipient: Recipient, row: RowRequest) -> InferenceRequest:
        """Return a client's request that has nothing but tensors."""
        request = cls._of(recipient, row)
        request._request_id = ""
        request._correlation_id = 0
        # Views of the kept arrays: a model may set the shape of what it is given.
        request._inputs = [
            Tensor.of_datatype(name, datatype, array.view())
            for (name, datatype), array in zip(recipient.inputs, row.place.inputs, strict=True)
        ]
        request._output_names = recipient.outputs
        request._flags = 0
        request._timeout = 0
        request._trace = _NO_TRACE
        request._parameters = _NO_PARAMETERS
        return request

    @classmethod
    def _of(cls, recipient: Recipient, source: ParcelRequest | RowRequest) -> InferenceRequest:
        request = cls.__new__(cls)
        request._recipient = recipient
        request._source = source
        request._model_name = recipient.model
        request._model_version = recipient.version
        request._preferred_memory = None
        request._release_flags = RELEASE_ALL
        request._answering = None
        request._is_sender_taken = False
        return request

    # --- what it holds ---

    def inputs(self) -> list[Tensor]:
        """Return the inputs."""
        return self._inputs

    def request_id(self) -> str:
        """Return the client's id, empty if it gave none."""
        return self._request_id

    def correlation_id(self) -> int | str:
        """Return the sequence's id, 0 if there is none."""
        return self._correlation_id

    def flags(self) -> int:
        """Return the sequence flags."""
        return self._flags

    def set_flags(self, flags: int) -> None:
        """Replace the sequence flags."""
        self._flags = flags

    def timeout(self) -> int:
        """Return the request's timeout in microseconds, 0 if it has none."""
        return self._timeout

    def parameters(self) -> str:
        """Return the custom parameters as JSON text."""
        return json.dumps(dict(self._parameters), separators=(",", ":"), ensure_ascii=False)

    def requested_output_names(self) -> set[str]:
        """Return the outputs that the client wants."""
        return set(self._output_names)

    def preferred_memory(self) -> PreferredMemory | None:
        """Return what the constructor was given."""
        return self._preferred_memory

    def trace(self) -> InferenceTrace:
        """Return the trace, to read its context and to hand on to requests that are made for this one."""
        return self._trace

    def model_name(self) -> str:
        """Return the name of the model that is asked."""
        return self._model_name

    def model_version(self) -> int:
        """Return its version, -1 for the newest."""
        return self._model_version

    # --- how it is answered ---

    @property
    def source(self) -> ParcelRequest | RowRequest:
        """What the worker has of it; only of an incoming request."""
        if self._source is None:
            raise TritonModelException("the request was made by the model itself")
        return self._source

    @property
    def is_closed(self) -> bool:
        """Whether it has had its last response."""
        return self.source.is_final or (self._answering is not None and self._answering.is_closed)

    @property
    def is_sender_taken(self) -> bool:
        """Whether the model answers by itself, so that None in the list that it returns is an answer."""
        return self._is_sender_taken

    def _take_answering(self) -> Answering:
        source = self.source
        if self._answering is None:
            assert self._recipient is not None
            self._answering = Answering(source, self._recipient.deliver, decoupled=self._recipient.decoupled)
        return self._answering

    def get_response_sender(self) -> InferenceResponseSender:
        """Return the sender of this request's responses; taken again, it is one for the same answer."""
        answering = self._take_answering()
        self._is_sender_taken = True
        return InferenceResponseSender(answering)

    def hand_back(self) -> None:
        """Leave the rest of the answer to a later execution, in which the request comes again (spec S-060)."""
        self._take_answering().hand_back()

    def is_cancelled(self) -> bool:
        """Return whether the client has left or its deadline has passed."""
        return self._source is not None and self._source.is_cancelled

    def set_release_flags(self, flags: int) -> None:
        """Say whether the request is done after ``execute`` or has to come again.

        Raises:
            TritonModelException: the flags are neither RELEASE_ALL nor RELEASE_RESCHEDULE.
        """
        if flags not in (RELEASE_ALL, RELEASE_RESCHEDULE):
            raise TritonModelException(
                "Unable to set release flags. Only TRITONSERVER_REQUEST_RELEASE_ALL or "
                "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE is allowed."
            )
        self._release_flags = flags

    @property
    def is_rescheduled(self) -> bool:
        """Whether the model wants the request again."""
        return self._release_flags == RELEASE_RESCHEDULE

    # --- asking other models ---

    def exec(self, decoupled: bool = False) -> InferenceResponse | ResponseIterator:
        """Run the request on another model and wait for its response, or with ``decoupled`` for its responses."""
        nested = self._nested(decoupled)
        return ResponseIterator(nested) if decoupled else only_response(nested)

    async def async_exec(self, decoupled: bool = False) -> InferenceResponse | ResponseIterator:
        """Run the request on another model without blocking the event loop; cancelling the task cancels the request."""
        responses = ResponseIterator(self._nested(decoupled))
        return responses if decoupled else await responses.async_only()

    def async_stream_exec(self) -> ResponseIterator:
        """Run the request on a decoupled model: ``async for response in request.async_stream_exec()``."""
        return ResponseIterator(self._nested(decoupled=True))

    def _nested(self, decoupled: bool) -> NestedRequest:
        if not Phase.is_serving:
            raise TritonModelException("BLS is only supported during the 'execute' function.")
        return NestedRequest(
            model=self._model_name,
            version=self._model_version,
            id=self._request_id,
            inputs=tuple(self._inputs),
            outputs=self._output_names,
            parameters=self._parameters,
            correlation_id=self._correlation_id,
            flags=self._flags,
            timeout_us=self._timeout,
            trace=self._trace.trace,
            allows_many_responses=decoupled,
            output_device=ANYWHERE if self._preferred_memory is None else self._preferred_memory.device_id,
            made_for=executing.get(),
        )


def _empty(what: str, request_id: str, model_name: str) -> TritonModelException:
    return TritonModelException(
        f"{what} for request with id '{request_id}' and model name '{model_name}' should not be empty."
    )


def _input(recipient: Recipient, parcel: ParcelRequest, place: TensorPlace) -> Tensor:
    if place.memory and recipient.gpu is not None:
        return Tensor.on_gpu(place.name, place.datatype, parcel.input_on_device(place), recipient.gpu)
    return Tensor.view(
        place.name,
        place.datatype,
        parcel.input_shape(place),
        functools.partial(parcel.input_array, place),
        parcel.input_buffer(place),
    )
