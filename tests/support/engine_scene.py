"""A frontend's end of the engine with a test in the place of scheduler and workers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from forebay.frontend.data_plane.owners import NO_PARAMETERS, OwnedSlab
from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.engine_client import EngineClient
from forebay.ipc.arena import Arena, create_memory_file
from forebay.ipc.catalog import Catalog, ModelEntry
from forebay.ipc.counters import PRODUCER_WORDS, CountersFile, ProducerCounter
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.ensemble.device_rooms import DeviceRoom
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import Message, ParameterValue, ParcelSubmit, ReplyHead
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.wire import FLAG_FINAL, GRANT, HEADER, NO_TIMES, TOKEN, Kind, Run, pack_runs

PRODUCER, ROUTE, INSTANCE = 7, 3, 11
ARENA_BYTES = 1 << 22


class Rows:
    """A request in slab rows; remembers how it ended."""

    def __init__(self, rows: int = 1) -> None:
        self.rows = rows
        self.end = ""
        self.text = ""
        self.parameters = NO_PARAMETERS

    def rows_done(self, slab: OwnedSlab, first: int, parameters: Mapping[str, ParameterValue] = NO_PARAMETERS) -> None:
        assert not self.end
        self.end = "done"
        self.parameters = parameters

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        assert not self.end
        self.end = f"{error.code.name} {'ran' if ran else 'never ran'}"
        self.text = error.text


class Parcel:
    """A parcel; remembers its answers."""

    def __init__(self) -> None:
        self.answers: list[str] = []

    def parcel_reply(self, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        self.answers.append((reply.text or "ok") + ("." if final else ""))

    def lend(self, byte_size: int) -> int:
        raise AssertionError("nobody asked for room")

    def lend_rooms(self, needs: Mapping[str, int]) -> Mapping[str, DeviceRoom]:
        raise AssertionError("nobody asked for room on a device")


class Sent:
    """Stands for the submit socket."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.is_full = False

    def send_nowait(self, message: Message) -> bool:
        if not self.is_full:
            self.messages.append(message)
        return not self.is_full

    def close(self) -> None:
        pass


class Surroundings:
    """An engine client with one route and further ``entries``; ``ordered`` keeps the route's answers in order."""

    def __init__(self, *, ordered: bool = False, entries: Sequence[ModelEntry] = ()) -> None:
        fd = create_memory_file("test", ARENA_BYTES)
        self.counters = CountersFile()
        offset = self.counters.allocate(PRODUCER_WORDS)
        self._words = self.counters.block(offset, PRODUCER_WORDS)
        self.bell, completions = create_doorbell()
        self.sent = Sent()
        self.engine = EngineClient(
            asyncio.get_running_loop(),
            producer=PRODUCER,
            epoch=1,
            arena=Arena(fd, ARENA_BYTES),
            completions=completions,
            counters=self.counters,
            submit=self.sent,  # type: ignore[arg-type]
        )
        os.close(fd)
        entry = ModelEntry(
            name="m",
            version=1,
            state="READY",
            route=ROUTE,
            max_batch_size=8,
            inputs=(TensorSpec("X", "FP32", (4,)),),
            outputs=(TensorSpec("Y", "FP32", (1,)),),
            counter_offset=offset,
            instance_counter_offsets=(64,),
            wants_parcels=ordered,
            preserve_ordering=ordered,
        )
        self.engine.update_catalog(Catalog(generation=1, models=(entry, *map(self._with_counters, entries))))
        self.route: RouteClient = self.engine.routes[ROUTE]
        self._completions = completions
        self.worker: socket.socket | None = None

    def _with_counters(self, entry: ModelEntry) -> ModelEntry:
        offset = self.counters.allocate(PRODUCER_WORDS)
        return msgspec.structs.replace(entry, counter_offset=offset)

    def close(self) -> None:
        self.engine.close()
        self._completions.close()
        self.bell.close()
        if self.worker is not None:
            self.worker.close()
        self.engine.grants.remove_doorbell(INSTANCE)

    def count(self, counter: ProducerCounter) -> int:
        return int(self._words[counter])

    # --- what clients do

    def publish(self, rows: int = 1) -> tuple[Rows, OwnedSlab, int]:
        slab, first = self.route.loan(rows)
        owner = Rows(rows)
        self.route.publish(slab, first, rows, owner)
        return owner, slab, first

    def submit(self, token: int, *, shape_key: int = 0) -> Parcel:
        owner = Parcel()
        self.route.submit_parcel(ParcelSubmit(ROUTE, token, 1, 5, b"head", shape_key), owner)
        return owner

    # --- what the engine says

    async def tell(self, message: bytes) -> None:
        self.bell.send(message)
        await turn()

    async def tell_runs(self, kind: Kind, *runs: tuple[int, int], batch: int = 1, **f: Any) -> None:
        """Tell of (first, rows) in a slab; without one, in the newest of the one route."""
        await self.tell(self.packed_runs(kind, *runs, batch=batch, **f))

    def packed_runs(self, kind: Kind, *runs: tuple[int, int], batch: int = 1, **f: Any) -> bytes:
        """Build what :meth:`tell_runs` sends."""
        slab = f.pop("slab", None) or self.route.slabs[-1]
        instance, error = f.pop("instance", INSTANCE), f.pop("error", b"")
        packed = [
            Run(PRODUCER, rows, slab.base, slab.capacity, first, rows, f.get("attempt", 0), rows * 5)
            for first, rows in runs
        ]
        return pack_runs(kind, 0, instance, batch, packed, NO_TIMES) + error

    async def reply(
        self, token: int, *, text: str = "", final: bool = True, instance: int = INSTANCE, **more: Any
    ) -> None:
        await self.tell(self.packed_reply(token, text=text, final=final, instance=instance, **more))

    def packed_reply(
        self, token: int, *, text: str = "", final: bool = True, instance: int = INSTANCE, **more: Any
    ) -> bytes:
        """Build what :meth:`reply` sends."""
        reply = msgspec.msgpack.encode(ReplyHead(code=4 if text else 0, text=text, **more))
        header = HEADER.pack(Kind.PARCEL_REPLY, FLAG_FINAL if final else 0, 1, instance, 0)
        return header + NO_TIMES + TOKEN.pack(token) + reply

    async def lose_parcel(self, token: int) -> None:
        header = HEADER.pack(Kind.PARCEL_LOST, 0, 1, INSTANCE, 1)
        await self.tell(header + NO_TIMES + TOKEN.pack(token))

    async def grant(self, generation: int = 1, *, route: int = ROUTE) -> socket.socket:
        sender, self.worker = create_doorbell()
        self.worker.setblocking(False)
        self.engine.grants.add_doorbell(INSTANCE, sender)
        await self.tell(HEADER.pack(Kind.GRANT, 0, 0, INSTANCE, 0) + GRANT.pack(route, INSTANCE, generation, 8))
        return self.worker

    async def revoke(self, generation: int = 1, flags: int = 0) -> None:
        message = HEADER.pack(Kind.REVOKE, flags, 0, INSTANCE, 0) + GRANT.pack(ROUTE, INSTANCE, generation, 0)
        await self.tell(message)

    async def resync(self, epoch: int = 2, *running: int) -> None:
        tokens = b"".join(TOKEN.pack(token) for token in running)
        await self.tell(HEADER.pack(Kind.RESYNC, 0, len(running), 0, epoch) + tokens)

    def take_sent(self) -> list[Any]:
        messages, self.sent.messages = self.sent.messages, []
        return messages


async def turn() -> None:
    """Let the event loop handle everything that is due."""
    for _ in range(4):
        await asyncio.sleep(0)


Scenario = Callable[[Surroundings], Coroutine[Any, Any, None]]


def play(scenario: Scenario, **options: Any) -> None:
    async def run() -> None:
        surroundings = Surroundings(**options)
        try:
            await scenario(surroundings)
        finally:
            surroundings.close()

    asyncio.run(run())
