"""Large bodies of a known form, received into slab rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from engine_scene import Surroundings, play, turn

from forebay.frontend.http.fast_path import InferPlan
from forebay.frontend.http.planned_upload import PlannedUpload
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.tensor import TensorSpec

ENTRY = ModelEntry(
    name="two",
    version=1,
    state="READY",
    route=30,
    max_batch_size=8,
    inputs=(TensorSpec("A", "INT8", (4,)), TensorSpec("B", "INT8", (2,))),
    outputs=(TensorSpec("Y", "INT8", (1,)),),
    instance_counter_offsets=(64,),
)
JSON = b"{...}"
#: Two rows of B, then two of A.
BODY = JSON + b"bbBB" + b"aaaaAAAA"
COPIES = ((5, 9, 1), (9, 17, 0))


def open_upload(s: Surroundings, arrived: int) -> PlannedUpload:
    plan = InferPlan(s.engine.routes[30], 2, COPIES, (0,), lambda _parameters: b"", 0, 0, b"")
    head: Any = SimpleNamespace(content_length=len(BODY), keep_alive=True)
    return PlannedUpload(plan, head, memoryview(BODY)[:arrived])


def receive(upload: PlannedUpload, start: int, size: int) -> bool:
    """Let up to ``size`` bytes arrive; return whether the body is complete."""
    while True:
        place = upload.next_place()[:size]
        place[:] = BODY[start : start + len(place)]
        is_complete = upload.received(len(place))
        start, size = start + len(place), size - len(place)
        if is_complete or not size:
            return is_complete


def test_parts_arrive_in_the_rows_of_their_inputs() -> None:
    async def scenario(s: Surroundings) -> None:
        upload = open_upload(s, len(JSON) + 1)
        assert not receive(upload, 6, 2)
        assert upload.remaining_bytes == 9
        assert receive(upload, 8, 9)
        connection: Any = SimpleNamespace(calls=[], sort=lambda _route: None)
        connection.add_call = connection.calls.append
        upload.submit(connection)
        await turn()
        (message,) = s.take_sent()
        (run,) = message.runs
        assert (run.route, run.first, run.rows_each) == (30, 0, 2)
        route = s.engine.routes[30]
        slab = route.slabs[0]
        assert bytes(route.input_slice(slab, 0, 2, 0)) == b"aaaaAAAA"
        assert bytes(route.input_slice(slab, 0, 2, 1)) == b"bbBB"
        assert slab.owners[0] is connection.calls[0]

    play(scenario, entries=(ENTRY,))


def test_client_that_leaves_gives_the_rows_back() -> None:
    async def scenario(s: Surroundings) -> None:
        upload = open_upload(s, len(JSON))
        assert s.engine.in_flight_count == 2
        upload.abandon()
        assert s.engine.in_flight_count == 0

    play(scenario, entries=(ENTRY,))
