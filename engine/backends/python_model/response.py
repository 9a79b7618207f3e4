"""``pb_utils.InferenceResponse`` and the sender that delivers it (spec 7.4)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from forebay.engine.backends.python_model.errors import TritonError, TritonModelException
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.ipc.errors import BackendFailed
from forebay.ipc.messages import ParameterValue

if TYPE_CHECKING:
    from forebay.engine.worker.parcel_request import ParcelRequest
    from forebay.engine.worker.request_rows import RowRequest

#: ``TRITONSERVER_RESPONSE_COMPLETE_FINAL``
COMPLETE_FINAL = 1


def check_parameters(parameters: Mapping[str, ParameterValue]) -> dict[str, ParameterValue]:
    """Return a copy of request or response parameters.

    Raises:
        TritonModelException: it is no mapping, a key is not a string or a value not bool, int or str (spec P-041), or
            one of them cannot be sent: a number of more than 64 bits, a text that UTF-8 does not have.
    """
    if not isinstance(parameters, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # models are not type-checked
        raise TritonModelException(f"Expect parameters to have type dict, found type {type(parameters)}")
    checked: dict[str, ParameterValue] = {}
    for key, value in parameters.items():
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # models are not type-checked
            raise TritonModelException(f"Expect parameters keys to have type str, found type {type(key)}")
        if not isinstance(value, bool | int | str):
            raise TritonModelException(f"Expect parameters values to have type bool/int/str, found type {type(value)}")
        _check_sendable(key, value)
        checked[key] = value
    return checked


def _check_sendable(key: str, value: ParameterValue) -> None:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise TritonModelException(f"parameter '{key}' does not fit into 64 bits: {value}")
    try:
        f"{key}{value}".encode()
    except UnicodeEncodeError as error:
        raise TritonModelException(f"a parameter cannot be sent: {error}") from None


class InferenceResponse:
    """What a model answers, or what a nested call answered."""

    __slots__ = ("__weakref__", "_error", "_output_tensors", "_parameters")

    def __init__(
        self,
        output_tensors: Sequence[Tensor] | None = None,
        error: TritonError | None = None,
        parameters: Mapping[str, ParameterValue] | None = None,
    ) -> None:
        self._output_tensors = list(output_tensors or ())
        # Models are not type-checked.
        for tensor in self._output_tensors:
            if tensor is None:  # pyright: ignore[reportUnnecessaryComparison]
                raise TritonModelException("Output tensor for inference response should not be empty.")
            if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TritonModelException(f"output_tensors must hold Tensor objects, found type {type(tensor)}")
        if error is not None and not isinstance(error, TritonError):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the error of an InferenceResponse must be a TritonError, found type {type(error)}")
        self._error = error
        self._parameters = {} if parameters is None else check_parameters(parameters)

    def output_tensors(self) -> list[Tensor]:
        """Return the outputs."""
        return self._output_tensors

    def has_error(self) -> bool:
        """Return whether the request failed."""
        return self._error is not None

    def error(self) -> TritonError | None:
        """Return the error, if any."""
        return self._error

    def parameters(self) -> dict[str, ParameterValue]:
        """Return the response parameters."""
        return self._parameters


#: Sends one response to a request; the last argument tells that it is the final one.
Deliver = Callable[["ParcelRequest | RowRequest", InferenceResponse, bool], None]


class Answering:
    """The duty to answer one request. Shared by the request and its sender; when both are gone, it is too late.

    A sender that is dropped without its final flag would leave the client waiting for ever (spec L-028).
    """

    def __init__(
        self,
        source: ParcelRequest | RowRequest,
        deliver: Deliver,
        *,
        decoupled: bool,
    ) -> None:
        self.source = source
        self.decoupled = decoupled
        self._deliver = deliver
        self._lock = threading.Lock()
        self._sent_count = 0
        self._is_closed = False
        self._is_handed_back = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed or self.source.is_final

    def hand_back(self) -> None:
        """Leave the rest of the answer to a later execution, in which the request comes again (spec S-060)."""
        self._is_handed_back = True
        # Only sequences do, whose requests are parcels.
        cast("ParcelRequest", self.source).reschedule()

    def send(self, response: InferenceResponse | None, flags: int) -> None:
        """Send one response, or only the flag; see :meth:`InferenceResponseSender.send`."""
        if flags not in (0, COMPLETE_FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if response is None and flags == 0:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        # Models are not type-checked.
        if not isinstance(response, InferenceResponse | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"only an InferenceResponse can be sent, found type {type(response)}")
        with self._lock:
            if not self.decoupled:
                if response is not None and self._sent_count > 0:
                    raise TritonModelException(
                        "Unable to send response. Non-decoupled model cannot send more than one response."
                    )
                if response is None and self._sent_count == 0:
                    raise TritonModelException(
                        "Unable to send response. Non-decoupled model cannot send complete final before sending a "
                        "response."
                    )
            if self._is_closed:
                raise TritonModelException("Unable to send response. Response sender has been closed.")
            self._is_closed = flags == COMPLETE_FINAL
            if response is not None:
                self._sent_count += 1
                # A model that is not decoupled has one response, so that one is the last.
                self._deliver(self.source, response, self._is_closed or not self.decoupled)
            else:
                self.source.finish()

    def __del__(self) -> None:
        # The collector may come by at any moment, also while this thread holds the doorbells' lock: only hand over.
        if not self.source.is_final and not self._is_handed_back:
            _dropped.put(self.source)


#: Requests that nobody can answer any more. A SimpleQueue may be put to from a destructor.
_dropped: queue.SimpleQueue[ParcelRequest | RowRequest] = queue.SimpleQueue()


def start_answering_dropped() -> None:
    """Start the thread that fails what models drop; once per worker."""
    threading.Thread(target=_answer_dropped, name="dropped requests", daemon=True).start()


def _answer_dropped() -> None:
    while True:
        _dropped.get().fail(BackendFailed("the model dropped the request without a final response"), by_model=True)


class InferenceResponseSender:
    """Sends responses from any thread, also after ``execute`` has returned."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Send ``response``; with ``TRITONSERVER_RESPONSE_COMPLETE_FINAL`` it is the last, and may be missing.

        Raises:
            TritonModelException: with Triton's texts (spec P-075).
        """
        self._answering.send(response, flags)

    def is_cancelled(self) -> bool:
        """Return whether the client has left or its deadline has passed."""
        return self._answering.source.is_cancelled
