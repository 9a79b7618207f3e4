"""A client's requests to ensembles with inputs in device memory: whether they may run, and where their answers are."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forebay.client.device_pools import DeviceLease
from forebay.client.ensembles import KeptBlock, PendingEnsemble
from forebay.client.pending import BlockLease
from forebay.ipc.ensemble.steps import StepReply
from forebay.ipc.ensemble.tensors import Tensor
from forebay.ipc.errors import Moved
from forebay.ipc.messages import DeviceMemory, TensorPlace

MEMORY = DeviceMemory(owner=0, number=5, device_id=1, byte_size=1024, handle=b"h")


class Host:
    """Stands in for who runs the steps: they answer at once, with one tensor on the device and one in the arena."""

    def __init__(self, readers: dict[str, int], moves: int = 0) -> None:
        self._readers = readers
        #: How often a step finds that it has left its GPU.
        self._moves = moves
        self.runs = self.uncounted = 0
        self.given: dict[str, Tensor] = {}

    def skip_count(self) -> None:
        self.uncounted += 1

    def device_inputs(self) -> dict[str, int]:
        return self._readers

    def run(self, inputs: dict[str, Tensor], _rows: int, on_reply: Any) -> Any:
        self.given = inputs
        self.runs += 1
        if self.runs <= self._moves:
            return SimpleNamespace(start=lambda: on_reply(StepReply(error=Moved("elsewhere"))))
        outputs = {
            "host": Tensor("FP32", (4,), 16, 64, KeptBlock(BlockLease(deque(), 64, 16))),
            "device": Tensor("FP32", (4,), 16, 256, KeptBlock(device_lease(256)), memory=MEMORY),
        }
        return SimpleNamespace(start=lambda: on_reply(StepReply(outputs)))


def device_lease(offset: int) -> DeviceLease:
    return DeviceLease(deque(), MEMORY, offset, 16)


def request(host: Host) -> PendingEnsemble:
    """A request with one input on the device and one in the arena."""
    model = cast("Any", SimpleNamespace(name="ens", edition=0))
    inputs = [
        (TensorPlace("X", "FP32", (4,), 512, 16, memory=1), device_lease(512)),
        (TensorPlace("Z", "FP32", (4,), 0, 16), BlockLease(deque(), 0, 16)),
    ]
    return PendingEnsemble(cast("Any", host), model, inputs, 1)


@pytest.mark.parametrize("readers", [{}, {"X": 0}, {"Z": 1}], ids=["host", "another GPU", "another input"])
def test_a_request_whose_step_has_moved_since_does_not_run(readers: dict[str, int]) -> None:
    host = Host(readers)
    with pytest.raises(Moved):
        request(host).start()
    assert host.given == {}


def test_tensors_on_the_device_are_told_from_those_in_the_arena() -> None:
    host = Host({"X": 1, "Z": 1})
    pending = request(host)
    pending.start()
    assert [host.given[name].memory for name in "XZ"] == [MEMORY, None]
    [(reply, held)] = pending.responses
    on_host, on_device = reply.outputs
    assert (on_host.name, on_host.memory, on_device.name) == ("host", 0, "device")
    lease = pending.device_lease(on_device, held)
    assert lease is not None
    assert (lease.memory, lease.offset) == (MEMORY, 256)


def test_a_request_whose_step_moves_meanwhile_runs_once_more_and_counts_once() -> None:
    host = Host({"X": 1}, moves=1)
    pending = request(host)
    pending.start()
    assert (host.runs, host.uncounted, pending.error) == (2, 1, None)
    assert len(pending.responses) == 1


def test_a_request_whose_step_moves_again_fails() -> None:
    host = Host({"X": 1}, moves=2)
    pending = request(host)
    pending.start()
    assert (host.runs, host.uncounted) == (2, 1)
    assert isinstance(pending.error, Moved)
