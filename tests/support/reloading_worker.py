"""One worker process that loads one model after the other: starting a process for each of a thousand takes too long.

A worker that is serving replaces its model when another Load arrives; a load that fails ends it, and the next load
starts a new one. For parcels only: a worker decides once whether it takes rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import msgspec
from worker_harness import Response, WorkerHarness

from forebay.ipc.arena import BlockAllocator
from forebay.ipc.errors import ServingError, from_wire
from forebay.ipc.messages import Failed
from forebay.ipc.worker_messages import InstanceSpec, Load, Phase

#: The models' ``max_batch_size`` at most.
MAX_BATCH_SIZE = 64


class ReloadingWorker:
    """Keeps a :class:`WorkerHarness` with the model that was loaded last."""

    def __init__(self, *, arena_bytes: int = 256 << 20, env: Mapping[str, str] | None = None) -> None:
        self._arena_bytes = arena_bytes
        self._env = env
        self._harness: WorkerHarness | None = None

    def __enter__(self) -> ReloadingWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._harness is not None:
            self._harness.close()
            self._harness = None

    def load(self, spec: InstanceSpec) -> WorkerHarness:
        """Load a model; returns the harness to send requests with.

        Raises:
            ServingError: the worker says why it cannot.
        """
        harness = self._harness
        if harness is None:
            # Counters for the largest batch of any model to come.
            roomy = msgspec.structs.replace(spec, max_batch_size=MAX_BATCH_SIZE)
            harness = WorkerHarness(roomy, arena_bytes=self._arena_bytes, env=self._env, load=False)
            harness.spec = msgspec.structs.replace(spec, counter_offset=harness.spec.counter_offset)
            self._harness = harness
            try:
                harness.load()
            except ServingError:
                self._end()
                raise
            return harness
        harness.blocks = BlockAllocator(self._arena_bytes)  # Nothing of the former model's requests is left.
        harness.spec = msgspec.structs.replace(spec, counter_offset=harness.spec.counter_offset)
        harness.tell(Load(spec=harness.spec))
        while True:
            message, _fds = harness.lifeline.receive()
            if isinstance(message, Failed):
                self._end()
                raise from_wire(message.code, message.text)
            if not isinstance(message, Phase):
                return harness

    def infer(self, inputs: Mapping[str, Any], **head: Any) -> Response:
        """Send one request to the model that was loaded last and return its one response."""
        assert self._harness is not None
        [response] = self._harness.infer(inputs, **head)
        return response
