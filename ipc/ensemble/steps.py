"""What the run of an ensemble and those who run its steps tell each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from forebay.ipc.catalog import EnsembleStep, ModelEntry
from forebay.ipc.ensemble.device_rooms import DeviceRoom
from forebay.ipc.ensemble.tensors import Tensor
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import DeviceMemory, ParameterValue, TensorPlace
from forebay.ipc.wire import Times


class StepTimes(NamedTuple):
    """What executions took, monotonic ns."""

    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0

    @classmethod
    def since(cls, enqueue_ns: int, times: Times) -> StepTimes:
        """Return what an execution took of a request that was handed over at ``enqueue_ns``; zero if it never ran."""
        start_ns, input_end_ns, output_start_ns, end_ns = times
        if not start_ns:
            return cls()
        # Times of one monotonic clock, in this order; a worker that says otherwise must not make a counter negative.
        if not enqueue_ns <= start_ns <= input_end_ns <= output_start_ns <= end_ns:
            return cls()
        return cls(
            start_ns - enqueue_ns, input_end_ns - start_ns, output_start_ns - input_end_ns, end_ns - output_start_ns
        )

    def plus(self, other: StepTimes) -> StepTimes:
        return StepTimes(
            self.queue_ns + other.queue_ns,
            self.input_ns + other.input_ns,
            self.infer_ns + other.infer_ns,
            self.output_ns + other.output_ns,
        )


class StepReply(NamedTuple):
    """One response of a step, or of a whole ensemble. The blocks are held during the callback only."""

    outputs: Mapping[str, Tensor] = {}
    parameters: Mapping[str, ParameterValue] = {}
    error: ServingError | None = None
    ran: bool = True
    """Of an error: a worker had the request; else the queue refused it."""
    final: bool = True
    has_response: bool = True
    """False: only says that no further response follows."""
    times: StepTimes = StepTimes()
    """Of a final reply: of everything that the request ran."""


OnStepReply = Callable[[StepReply], None]


class StepCall(Protocol):
    """A request of a step. ``start`` may reply before it returns."""

    def start(self) -> None: ...

    def cancel(self) -> None: ...


class StepRequest(NamedTuple):
    """A request to the model of a step."""

    inputs: Mapping[str, Tensor]
    """By the model's names, in its shapes, each in a block."""
    places: Sequence[TensorPlace]
    """The same, as the worker is told."""
    rows: int
    """Batch items, at least 1."""
    outputs: tuple[str, ...]
    """Those that somebody reads; empty: all."""
    sequence: tuple[int | str, bool, bool]
    """Correlation id, start, end."""
    memories: tuple[DeviceMemory, ...] = ()
    """On devices, that places lie in."""
    output_devices: Mapping[str, Collection[int]] = {}
    """Of a step that is an ensemble: GPUs in whose memory everybody who gets an output takes it."""
    output_rooms: Mapping[str, DeviceRoom] = {}
    """Places in device memory of the client's own that outputs go to, of those below or of the ensemble."""
    device_outputs: Mapping[str, int] = {}
    """Outputs that may stay on the model's GPU, because nobody but steps there reads them, with their bytes; 0: these
    vary."""


class StepModel(Protocol):
    """A loaded model version that steps run on."""

    @property
    def entry(self) -> ModelEntry: ...


Model = TypeVar("Model", bound=StepModel)


class StepHost(Protocol[Model]):
    """Who runs the steps of one request. What it is handed it may hold, and must release."""

    def find(self, step: EnsembleStep) -> Model | None:
        """Return the version that a step means (spec S-108), kept loaded until :meth:`let_go`; None: not ready.

        Raises:
            ServingError: it cannot be run here.
        """
        ...

    def let_go(self, model: Model) -> None:
        """The request is over."""
        ...

    def device_of(self, model: Model, name: str) -> int:
        """Return the GPU in whose memory a model takes an input; -1: there is none."""
        ...

    def place(self, tensor: Tensor) -> Tensor:
        """Return a tensor that came inside a message with a block of its own, for the caller to release.

        Raises:
            ArenaFull: there is no room.
        """
        ...

    def call(self, model: Model, request: StepRequest, on_reply: OnStepReply) -> StepCall:
        """Return the request of a step, not yet started; ``on_reply`` is called until a final reply."""
        ...

    def ended(self, rows: int, began_ns: int, reply: StepReply) -> None:
        """Count the request of the ensemble, whose last reply this was."""
        ...
