"""Batches of several segments on a device: fetched by the device itself, not gathered on the host first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from forebay.engine.backends.base import Array, Arrays, SegmentsInstance
from forebay.engine.worker.places import Producer, Producers
from forebay.engine.worker.rows import RowsRunner
from forebay.ipc.arena import create_memory_file
from forebay.ipc.counters import CountersFile, InstanceCounter, instance_words
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.slabs import SlabLayout
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.wire import HEADER, Kind, Run, pack_runs
from forebay.ipc.worker_messages import InstanceSpec

ARENA_BYTES = 1 << 20
CAPACITY = 16
BASE = 64


class Doubler(SegmentsInstance):
    """Adds nothing but what the device would do."""

    def __init__(self) -> None:
        self.row_counts: list[int] = []
        self.arenas: list[int] = []

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        raise AssertionError("a batch of segments was joined on the host")

    def run_segments(self, segments: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> None:
        for inputs, outputs in segments:
            self.row_counts.append(len(inputs["x"]))
            outputs["y"][...] = inputs["x"] * np.float32(2)


def test_segments_reach_the_device_as_they_are() -> None:
    tensors = (TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (4,)),)
    spec = InstanceSpec(
        model="m", version=1, route=1, instance=1, instance_name="m_0", backend="b", model_path="", version_path="",
        model_file="", max_batch_size=8, inputs=tensors[0], outputs=tensors[1], rows_mode=True,
    )  # fmt: skip
    arena_fd = create_memory_file("test", ARENA_BYTES)
    sender, receiver = create_doorbell()
    producers = Producers()
    producer = Producer(1, arena_fd, ARENA_BYTES, sender.detach())
    producers.attach(producer)
    counters_file = CountersFile()
    words = instance_words(8)
    counters = counters_file.block(counters_file.allocate(words), words)
    device = Doubler()
    runner = RowsRunner(spec, device, producers, counters)
    layout = SlabLayout(*tensors, CAPACITY)
    rows_in = producer.array("FP32", (CAPACITY, 4), BASE + layout.inputs[0].offset)
    rows_out = producer.array("FP32", (CAPACITY, 4), BASE + layout.outputs[0].offset)
    rows_in[...] = np.arange(CAPACITY * 4, dtype=np.float32).reshape(CAPACITY, 4)

    runs = [Run(1, 2, BASE, CAPACITY, 0, 2, 0, 0), Run(1, 3, BASE, CAPACITY, 8, 3, 0, 0)]
    runner.execute(memoryview(pack_runs(Kind.RUNS, 0, 0, 7, runs)), 1)

    assert device.row_counts == [2, 3]
    np.testing.assert_array_equal(rows_out[0:2], rows_in[0:2] * 2)
    np.testing.assert_array_equal(rows_out[8:11], rows_in[8:11] * 2)
    assert not rows_out[2:8].any()
    assert receiver.recv(HEADER.size + 256)[0] == Kind.RUNS_DONE
    assert counters[InstanceCounter.GATHERED_BYTES] == 0
    assert counters[InstanceCounter.SEGMENTS] == 2
    assert counters[InstanceCounter.INFERENCES] == 5
    receiver.close()
    del rows_in, rows_out
    producers.detach(1)
    os.close(counters_file.fd)
