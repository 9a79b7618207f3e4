"""Announcements: everybody hears everything, in the order that the protocol needs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from forebay.engine.supervisor.switchboard import Producer, Switchboard
from forebay.engine.supervisor.worker_handle import WorkerHandle
from forebay.ipc.arena import create_memory_file
from forebay.ipc.counters import COUNTERS_BYTES, CountersFile
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.frontend_messages import DoorbellDown, DoorbellUp
from forebay.ipc.messages import Message
from forebay.ipc.scheduler_messages import (
    BatchingPolicy,
    Drained,
    InstanceDown,
    InstanceUp,
    ProducerDown,
    ProducerUp,
    Restored,
    RouteDrain,
    RouteUp,
    SchedulerStart,
)
from forebay.ipc.scheduler_messages import CountersFile as CountersFileMessage


class Ear:
    """A process that only listens."""

    def __init__(self) -> None:
        self.heard: list[Message] = []

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        for fd in fds:
            os.fstat(fd)  # Must be open.
        self.heard.append(message)
        return True

    def kinds(self) -> list[type[Message]]:
        return [type(message) for message in self.heard]


@pytest.fixture
def switchboard() -> Iterator[Switchboard]:
    counters = CountersFile()
    made = Switchboard("/tmp/nowhere", counters.fd, COUNTERS_BYTES)
    yield made
    made.close()
    os.close(counters.fd)


def producer(number: int) -> Producer:
    sender, receiver = create_doorbell()
    receiver.close()
    return Producer(number, "http 0", create_memory_file("test", 4096), 4096, sender.detach())


ROUTE = RouteUp(route=7, name="m", version=1, batching=BatchingPolicy())


def test_restarted_scheduler_hears_everything_again(switchboard: Switchboard) -> None:
    async def scenario() -> None:
        first, second = Ear(), Ear()
        switchboard.attach_scheduler(first)
        switchboard.add_producer(producer(1))
        switchboard.add_route(ROUTE)
        worker = WorkerHandle(3, "m:1 #0", switchboard.remove_worker)
        switchboard.introduce_worker(worker)
        switchboard.add_instance(7, "m_0_0", worker)
        assert first.kinds() == [SchedulerStart, CountersFileMessage, ProducerUp, RouteUp, InstanceUp]
        switchboard.detach_scheduler(first)
        switchboard.attach_scheduler(second)
        assert second.kinds() == [*first.kinds(), Restored]
        assert [ear.heard[0].epoch for ear in (first, second)] == [1, 2]  # type: ignore[attr-defined]
        worker.kill()
        assert second.heard[-1] == InstanceDown(instance=3, exit_status=0)
        assert worker.ended.is_set()

    asyncio.run(scenario())


def test_frontends_learn_of_instances_before_and_after_they_came(switchboard: Switchboard) -> None:
    async def scenario() -> None:
        switchboard.add_route(ROUTE)
        early, late = Ear(), Ear()
        worker = WorkerHandle(3, "m:1 #0", switchboard.remove_worker)
        switchboard.attach_frontend(1, early)
        switchboard.add_instance(7, "m_0_0", worker)
        switchboard.attach_frontend(2, late)
        worker.kill()
        expected = [DoorbellUp(instance=3, route=7), DoorbellDown(instance=3)]
        assert early.heard == late.heard == expected

    asyncio.run(scenario())


def test_drain_outlives_a_scheduler(switchboard: Switchboard) -> None:
    async def scenario() -> None:
        first, second = Ear(), Ear()
        switchboard.attach_scheduler(first)
        switchboard.add_route(ROUTE)
        draining = asyncio.create_task(switchboard.drain_route(7, 10.0))
        await asyncio.sleep(0)
        assert first.heard[-1] == RouteDrain(route=7)
        switchboard.detach_scheduler(first)
        switchboard.attach_scheduler(second)
        assert second.heard[-2:] == [RouteDrain(route=7), Restored()]
        switchboard.note_drained(Drained(route=7))
        assert await draining

    asyncio.run(scenario())


def test_drain_that_takes_too_long_gives_up(switchboard: Switchboard) -> None:
    async def scenario() -> None:
        switchboard.add_route(ROUTE)
        assert not await switchboard.drain_route(7, 0.01)

    asyncio.run(scenario())


def test_gone_producer_is_announced_and_its_descriptors_closed(switchboard: Switchboard) -> None:
    ear = Ear()
    switchboard.attach_scheduler(ear)
    made = producer(4)
    switchboard.add_producer(made)
    switchboard.remove_producer(4)
    assert ear.heard[-1] == ProducerDown(producer=4)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made.arena_fd)
