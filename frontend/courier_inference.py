"""Requests whose tensors lie in device memory, to models that do not live there: couriers carry the tensors.

An input is carried from the client's memory to its place in our arena before the request is submitted, an output from
our arena to the client's memory before its response is given on. So the model, wherever it runs, sees shared memory as
ever, and this process no device.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.device_places import DevicePlace, HeadMemories, Targets
from forebay.frontend.engine_client import EngineClient
from forebay.frontend.inference import InputTensor, OnResponse, OutputView, RequestMeta, Response
from forebay.frontend.start_inference import PlacedInference
from forebay.ipc.ensemble.device_rooms import DeviceRoom
from forebay.ipc.errors import ArenaFull, Internal, ServingError, from_wire
from forebay.ipc.messages import ParcelHead, ParcelSubmit, ReplyHead, TensorPlace

_NOWHERE = memoryview(b"")


def courier_route(engine: EngineClient, place: DevicePlace) -> RouteClient:
    """Return what the requests to a place's courier go through."""
    route = engine.couriers.get(place.courier.route)
    if route is None:
        route = engine.couriers[place.courier.route] = RouteClient(engine, place.courier)
    return route


class Carriage:
    """One tensor on its way. Its place in the arena is the engine's until ``on_done``."""

    def __init__(self, route: RouteClient, on_done: Callable[[Carriage, ServingError | None], None]) -> None:
        self._route = route
        self._on_done = on_done
        self._token = 0

    def fetch(self, source: DevicePlace, offset: int) -> None:
        """Carry from device memory to ``offset`` in the arena."""
        memories = HeadMemories()
        size = source.byte_size
        place = memories.place("X", "UINT8", (size,), source)
        self._submit(ParcelHead(inputs=(place,), reply_offset=offset, reply_bytes=size, memories=(source.memory,)))

    def bring(self, target: DevicePlace, offset: int, size: int) -> None:
        """Carry from the arena to device memory, which has room for it."""
        memories = HeadMemories()
        [to] = memories.targets({"Y": target})
        place = TensorPlace("X", "UINT8", (size,), offset, size)
        head = ParcelHead(inputs=(place,), reply_offset=0, reply_bytes=0, memories=(target.memory,), targets=(to,))
        self._submit(head)

    def _submit(self, head: ParcelHead) -> None:
        route, engine = self._route, self._route.engine
        self._token = engine.next_token()
        submit = ParcelSubmit(
            route=route.route, token=self._token, rows=1, enqueue_ns=engine.turn_ns(), head=engine.encode_head(head)
        )
        route.submit_parcel(submit, self)

    def cancel(self) -> None:
        """Nobody needs it any more; ``on_done`` is called all the same."""
        self._route.engine.cancel(self._token)

    # --- called by the engine client ---

    def parcel_reply(self, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        self._on_done(self, from_wire(reply.code, reply.text) if reply.text else None)

    def lend(self, byte_size: int) -> int:
        raise ArenaFull("a courier needs no other room than it was given")

    def lend_rooms(self, needs: Mapping[str, int]) -> Mapping[str, DeviceRoom]:
        return {}


class CourierInference:
    """Stands around a request to a model; see :class:`PlacedInference`."""

    def __init__(
        self, engine: EngineClient, inner: PlacedInference, inputs: Sequence[InputTensor], targets: Targets
    ) -> None:
        """Take a request that was placed as if its tensors lay in host memory, those that are carried.

        Args:
            inputs: as they really lie if they are carried, in the order of ``inner.places``.
            targets: of outputs that are carried if ``inner`` leaves them on the host.
        """
        self._engine = engine
        self._inner = inner
        self._inputs = inputs
        self._targets = targets
        self._on_response: OnResponse | None = None
        self._under_way: set[Carriage] = set()
        self._error: ServingError | None = None
        self._is_cancelled = False
        self._is_forwarded = False
        #: Responses whose outputs are still to be carried, in their order.
        self._responses: deque[Response] = deque()
        #: Where an output waits for its courier.
        self._blocks: dict[Carriage, tuple[int, int]] = {}
        self.places = [
            place if tensor.device is None else _NOWHERE for tensor, place in zip(inputs, inner.places, strict=True)
        ]

    @property
    def route(self) -> RouteClient:
        return self._inner.route

    @property
    def rows(self) -> int:
        return self._inner.rows

    @property
    def rows_route(self) -> None:
        """Requests with tensors on devices have no plans."""
        return

    def submit(self, meta: RequestMeta, on_response: OnResponse) -> None:
        self._meta = meta
        self._on_response = on_response
        for tensor, place in zip(self._inputs, self._inner.places, strict=True):
            if tensor.device is not None and tensor.byte_size:
                carriage = self._carriage(tensor.device, self._fetched)
                carriage.fetch(msgspec.structs.replace(tensor.device, byte_size=tensor.byte_size), self._offset(place))
        if not self._under_way:
            self._forward()

    def _carriage(self, place: DevicePlace, on_done: Callable[[Carriage, ServingError | None], None]) -> Carriage:
        carriage = Carriage(courier_route(self._engine, place), on_done)
        self._under_way.add(carriage)
        return carriage

    def _offset(self, place: memoryview) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(place)) - self._engine.arena.address

    # --- inputs ---

    def _fetched(self, carriage: Carriage, error: ServingError | None) -> None:
        self._under_way.discard(carriage)
        self._error = self._error or error
        if self._under_way:
            return
        if self._is_cancelled or self._error is not None:
            self._inner.cancel()
            if not self._is_cancelled and self._on_response is not None and self._error is not None:
                self._on_response(Response(error=self._error, ran=False))
            return
        self._forward()

    def _forward(self) -> None:
        self._is_forwarded = True
        self._inner.submit(self._meta, self._take)

    # --- outputs ---

    def _take(self, response: Response) -> None:
        if not self._responses and all(view.is_placed or view.name not in self._targets for view in response.outputs):
            self._deliver(response)
            return
        # Its views are valid during this call only.
        try:
            kept = tuple(self._kept(view) for view in response.outputs)
        except ServingError as error:
            response = Response(error=error, final=True)
            kept = ()
        self._responses.append(msgspec.structs.replace(response, outputs=kept))
        self._pump()

    def _kept(self, view: OutputView) -> OutputView:
        target = self._targets.get(view.name)
        if target is None or view.is_placed:
            return msgspec.structs.replace(view, data=bytes(view.data))
        size = len(view.data)
        if size > target.byte_size:
            raise Internal(
                f"shared memory size specified with the request for output '{view.name}' ({target.byte_size} bytes) "
                f"should be at least {size} bytes to hold the results"
            )
        if size:
            offset = self._engine.allocate(size)
            self._engine.view[offset : offset + size] = view.data
            carriage = self._carriage(target, self._brought)
            self._blocks[carriage] = (offset, size)
            carriage.bring(msgspec.structs.replace(target, byte_size=size), offset, size)
        return msgspec.structs.replace(view, data=b"")

    def _brought(self, carriage: Carriage, error: ServingError | None) -> None:
        self._under_way.discard(carriage)
        self._engine.free(*self._blocks.pop(carriage))
        self._error = self._error or error
        self._pump()

    def _pump(self) -> None:
        """Give on what waits, once every output is where it belongs."""
        if self._under_way:
            return
        while self._responses:
            response = self._responses.popleft()
            if self._error is not None:
                response, self._error = Response(error=self._error, final=response.final), None
            self._deliver(response)

    def _deliver(self, response: Response) -> None:
        if not self._is_cancelled and self._on_response is not None:
            self._on_response(response)

    # --- the end ---

    def cancel(self) -> None:
        if self._is_cancelled:
            return
        self._is_cancelled = True
        for carriage in tuple(self._under_way):
            carriage.cancel()
        # As long as a courier may write there, the room of the inputs is not given back.
        if self._is_forwarded or not self._under_way:
            self._inner.cancel()
