"""Stands in for a frontend's engine client: models are functions, and answer when the test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec
import numpy as np

from forebay.frontend.data_plane.device_pools import DevicePools
from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.engine_client import EngineClient
from forebay.ipc.arena import BlockAllocator
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import PRODUCER_WORDS, ProducerCounter, instance_words
from forebay.ipc.ensemble.output_sizes import OutputSizes
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import ParcelHead, ParcelSubmit, ReplyHead, TensorPlace
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.wire import Times

ARENA_BYTES = 1 << 20

#: What a model does: inputs by name to outputs by name; or raises.
Function = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def spec(name: str, dims: tuple[int, ...] = (-1,), **options: Any) -> TensorSpec:
    return TensorSpec(name, "FP32", dims, **options)


def words(count: int) -> memoryview:
    return memoryview(bytearray(8 * count)).cast("Q")


class FakeRoute:
    """One model. Requests wait in ``pending`` until :meth:`FakeEngine.step`."""

    def __init__(self, engine: FakeEngine, entry: ModelEntry, function: Function | None) -> None:
        self.engine = engine
        self.entry = entry
        self.route = entry.route
        self.function = function
        self.uses_rows = False
        self.is_retired = False
        self.counters = words(PRODUCER_WORDS)
        self.step_counters = words(instance_words(entry.max_batch_size))
        self.block_bytes = self.copied_in_bytes = self.copied_out_bytes = 0
        self.reply_guess_bytes = 1024
        self.output_sizes = OutputSizes()
        self.ensemble: object = None
        self.details = None
        self.heads: list[ParcelHead] = []

    def count_ensemble_use(self, change: int) -> None:
        self.counters[ProducerCounter.ENSEMBLE_USES] += change

    def write_counters(self) -> None:
        self.copied_in_bytes = self.copied_out_bytes = 0

    def submit_parcel(self, submit: ParcelSubmit, owner: Any) -> None:
        self.heads.append(msgspec.msgpack.decode(submit.head, type=ParcelHead))
        self.engine.pending.append((self, submit, owner))

    @property
    def client(self) -> RouteClient:
        return cast(RouteClient, self)


class FakeEngine:
    """All models, and an arena."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(ARENA_BYTES))
        self.blocks = BlockAllocator(ARENA_BYTES)
        self.routes: dict[int, FakeRoute] = {}
        self.pending: deque[tuple[FakeRoute, ParcelSubmit, Any]] = deque()
        self.cancelled: set[int] = set()
        self.response_cache: Any = None
        self.device_pools = DevicePools()
        self._token = 0

    # --- what the engine client offers ---

    def allocate(self, byte_size: int) -> int:
        return self.blocks.allocate(byte_size)

    def free(self, offset: int, byte_size: int) -> None:
        self.blocks.free(offset, byte_size)

    def next_token(self) -> int:
        self._token += 1
        return self._token

    def turn_ns(self) -> int:
        return 1000

    def want_gauges(self) -> None:
        pass

    def call_soon(self, callback: Callable[[], None]) -> None:
        callback()

    def encode_head(self, head: ParcelHead) -> bytes:
        return msgspec.msgpack.encode(head)

    def cancel(self, token: int) -> None:
        self.cancelled.add(token)

    def reply_times(self) -> Times:
        return Times(1100, 1110, 1160, 1170)

    def find_route(self, _namespace: str, model: str, version: int) -> FakeRoute | None:
        found = [
            route
            for route in self.routes.values()
            if route.entry.name == model and (version < 1 or route.entry.version == version)
        ]
        return max(found, key=lambda route: route.entry.version, default=None)

    @property
    def client(self) -> EngineClient:
        return cast(EngineClient, self)

    # --- for tests ---

    def add(
        self,
        name: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        function: Function | None = None,
        **options: Any,
    ) -> FakeRoute:
        """Add a model; without a function the test answers with :meth:`reply`."""
        number = len(self.routes) + 1
        entry = ModelEntry(
            name, options.pop("version", 1), "READY", route=number, inputs=inputs, outputs=outputs, **options
        )
        route = self.routes[number] = FakeRoute(self, entry, function)
        return route

    @property
    def waiting(self) -> list[str]:
        """Names of the models whose requests have not been answered."""
        return [route.entry.name for route, _submit, _owner in self.pending]

    def step(self, name: str | None = None) -> None:
        """Let the oldest request (of one model) run."""
        index = 0 if name is None else self.waiting.index(name)
        route, submit, _owner = self.pending[index]
        head = msgspec.msgpack.decode(submit.head, type=ParcelHead)
        inputs = {
            place.name: np.frombuffer(self.view[place.offset : place.offset + place.byte_size], np.float32).reshape(
                place.shape
            )
            for place in head.inputs
        }
        assert route.function is not None
        try:
            results = route.function(inputs)
        except ServingError as error:
            self.reply(index, ReplyHead(code=error.code, text=error.text), final=True)
            return
        wanted = head.outputs or tuple(tensor.name for tensor in route.entry.outputs)
        self.reply(index, self.place(index, {name: results[name] for name in wanted if name in results}), final=True)

    def place(self, index: int, results: Mapping[str, np.ndarray]) -> ReplyHead:
        """Write outputs into a request's reply block."""
        head = msgspec.msgpack.decode(self.pending[index][1].head, type=ParcelHead)
        offset = head.reply_offset
        places: list[TensorPlace] = []
        for name, array in results.items():
            data = np.ascontiguousarray(array, np.float32).tobytes()
            self.view[offset : offset + len(data)] = data
            places.append(TensorPlace(name, "FP32", tuple(array.shape), offset, len(data)))
            offset += -(-len(data) // 64) * 64
        return ReplyHead(outputs=tuple(places))

    def reply(self, index: int, reply: ReplyHead, *, final: bool) -> None:
        """Answer a waiting request."""
        _route, _submit, owner = self.pending[index]
        if final:
            del self.pending[index]
        owner.parcel_reply(reply, final=final, ran=True)

    def run_all(self) -> None:
        """Let everything run until nothing waits."""
        while self.pending:
            self.step()
