"""The loops of a worker process: what one leaves behind for the others."""

from __future__ import annotations

import os
import socket
from typing import Any

from forebay.engine.worker import worker_process
from forebay.engine.worker.loop_threads import LoopThreads
from forebay.ipc.arena import create_memory_file
from forebay.ipc.counters import CountersFile, instance_words
from forebay.ipc.doorbell import Bell, create_doorbell
from forebay.ipc.lifeline import Lifeline
from forebay.ipc.messages import Stop
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.wire import HEADER, Kind
from forebay.ipc.worker_messages import ArenaUp, InstanceSpec, Load, Loaded, WorkerToSupervisor

ARENA_BYTES = 4096
ARENA_NAME = "arena-of-a-loop"


def make_spec(counters: CountersFile) -> InstanceSpec:
    return InstanceSpec(
        model="m",
        version=1,
        route=1,
        instance=1,
        instance_name="m_0",
        backend="identity",
        model_path="",
        version_path="",
        model_file="",
        kind="CPU",
        max_batch_size=4,
        inputs=(TensorSpec(name="INPUT0", datatype="FP32", dims=(2,)),),
        outputs=(TensorSpec(name="OUTPUT0", datatype="FP32", dims=(2,)),),
        counter_offset=counters.allocate(instance_words(4)),
    )


def live(siblings: LoopThreads, counters: CountersFile) -> None:
    """Have one loop load a model, get a producer, and end."""
    sender, doorbell = create_doorbell()
    bell_out, bell_in = create_doorbell()
    done_out, done_in = create_doorbell()
    ours, theirs = socket.socketpair()
    arena_fd = create_memory_file(ARENA_NAME, ARENA_BYTES)
    bell = Bell(sender)
    with ours, bell_out, bell_in, done_in:
        supervisor: Lifeline[Any] = Lifeline(ours, WorkerToSupervisor)
        supervisor.send(ArenaUp(producer=1, byte_size=ARENA_BYTES, trusted=True), (arena_fd, bell_out.fileno()))
        supervisor.send(Load(spec=make_spec(counters)))
        siblings.start("m:1 #0", [doorbell.detach(), done_out.detach(), theirs.detach(), os.dup(counters.fd)])
        while not isinstance(supervisor.receive()[0], Loaded):
            pass
        assert is_mapped()
        supervisor.send(Stop())
        bell.ring(HEADER.pack(Kind.WAKE, 0, 0, 0, 0))
        siblings.join()
    bell.close()
    os.close(arena_fd)


def is_mapped() -> bool:
    with open("/proc/self/maps") as maps:
        return ARENA_NAME in maps.read()


def test_a_loop_that_ends_leaves_neither_descriptors_nor_mappings() -> None:
    siblings, counters = LoopThreads(worker_process._run_sibling), CountersFile()
    live(siblings, counters)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        live(siblings, counters)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not is_mapped()
