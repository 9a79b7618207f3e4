"""The lane does what RowsRunner does: same answers, same counters; and leaves to it what is not its own."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from worker_harness import spec_from_config

from forebay.engine.backends.base import TensorInstance
from forebay.engine.worker.lanes import open_lane
from forebay.engine.worker.places import Producer, Producers
from forebay.engine.worker.rows import RowsRunner
from forebay.ipc.arena import create_memory_file
from forebay.ipc.counters import InstanceCounter, instance_words
from forebay.ipc.doorbell import Bell, create_doorbell
from forebay.ipc.errors import BackendFailed
from forebay.ipc.wire import FLAG_GRANTED, HEADER, RUN, TIMES, Kind, Run, pack_runs
from forebay.ipc.worker_messages import InstanceSpec

pytest.importorskip("forebay.engine.worker.rows_lane", reason="built without a C compiler")

PRODUCER, INSTANCE, CAPACITY, ROWS_MAX = 7, 5, 64, 16
ARENA_BYTES = 1 << 16


class Doubling(TensorInstance):
    """OUT = 2 * IN; fails when told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.calls = 0

    def bind(self, inputs: Any, outputs: Any) -> Callable[[], None]:
        def run() -> None:
            self.calls += 1
            if self.error is not None:
                raise self.error
            outputs["OUT"][:] = 2 * inputs["IN"]

        return run

    def run(self, inputs: Any, outputs: Any) -> Any:
        raise NotImplementedError  # Rows are bound.

    def close(self) -> None:
        pass


class Rig(NamedTuple):
    """A runner between a producer and a scheduler, without processes."""

    runner: RowsRunner
    lane: Any
    producers: Producers
    instance: Doubling
    counters: memoryview
    done: Bell
    answers: socket.socket
    told: socket.socket


def spec() -> InstanceSpec:
    config = {
        "backend": "identity",
        "max_batch_size": ROWS_MAX,
        "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": [3]}],
        "output": [{"name": "OUT", "data_type": "TYPE_FP32", "dims": [3]}],
    }
    return spec_from_config(config, model="doubling", model_path="", instance=INSTANCE)


@contextmanager
def rig() -> Iterator[Rig]:
    bell, answers = create_doorbell()
    done, told = create_doorbell()
    producers = Producers()
    fd = create_memory_file("lane-test", ARENA_BYTES)
    producers.attach(Producer(PRODUCER, fd, ARENA_BYTES, bell.detach()))
    instance = Doubling()
    counters = memoryview(bytearray(8 * instance_words(ROWS_MAX))).cast("Q")
    done_bell = Bell(done)
    lane = open_lane(INSTANCE, counters, done_bell, tells_requests_apart=False)
    assert lane is not None
    runner = RowsRunner(spec(), instance, producers, counters, lane)
    for end in (answers, told):
        end.setblocking(False)
    try:
        yield Rig(runner, lane, producers, instance, counters, done_bell, answers, told)
    finally:
        runner.forget_producer(PRODUCER)
        producers.detach(PRODUCER)
        for closing in (answers, told, done_bell):
            closing.close()


def message(first: int = 2, rows: int = 4, *, requests: int = 3, flags: int = 0, batch: int = 9) -> bytes:
    run = Run(PRODUCER, requests, 0, CAPACITY, first, rows, 0, 1000)
    return pack_runs(Kind.RUNS, flags, 0, batch, [run])


def received(end: socket.socket) -> list[bytes]:
    seen: list[bytes] = []
    for _ in itertools.count():
        try:
            seen.append(end.recv(4096))
        except BlockingIOError:
            break
    return seen


def without_times(reply: bytes) -> bytes:
    return reply[: HEADER.size] + reply[HEADER.size + TIMES.size :]


#: Counters whose values are not times.
EXACT = (
    InstanceCounter.SUCCESS,
    InstanceCounter.INFERENCES,
    InstanceCounter.EXECUTIONS,
    InstanceCounter.SEGMENTS,
    InstanceCounter.RUNNING_SINCE_NS,
    InstanceCounter.BATCH_SIZES + 4 * 3,
)


def test_a_slice_seen_before_gets_the_same_answer_and_counts_the_same() -> None:
    with rig() as it:
        lane = it.lane
        assert not lane.run(message(), len(message()), True), "nothing is kept yet"
        it.runner.execute(memoryview(message()), 2000)
        [by_python] = received(it.answers)
        counted = {word: it.counters[word] for word in EXACT}

        assert lane.run(bytearray(message()) + bytes(100), len(message()), True)

        [by_lane] = received(it.answers)
        assert without_times(by_lane) == without_times(by_python)
        assert {word: it.counters[word] for word in EXACT} == {word: 2 * count for word, count in counted.items()}
        [done] = received(it.told)
        assert HEADER.unpack_from(done) == (Kind.DONE, 0, 0, INSTANCE, 9)
        assert TIMES.unpack_from(done, HEADER.size) == TIMES.unpack_from(by_lane, HEADER.size)


def test_every_counter_of_times_adds_up() -> None:
    with rig() as it:
        lane = it.lane
        it.runner.execute(memoryview(message()), 2000)
        received(it.answers)
        before = it.counters.tolist()
        assert lane.run(message(), len(message()), False)
        [reply] = received(it.answers)
        start, input_end, output_start, end = TIMES.unpack_from(reply, HEADER.size)
        expected = list(before)
        for word, amount in (
            (InstanceCounter.SUCCESS, 3),
            (InstanceCounter.INFERENCES, 4),
            (InstanceCounter.EXECUTIONS, 1),
            (InstanceCounter.QUEUE_NS, 3 * start - 1000),
            (InstanceCounter.INPUT_NS, 3 * (input_end - start)),
            (InstanceCounter.INFER_NS, 3 * (output_start - input_end)),
            (InstanceCounter.SEGMENTS, 1),
            (InstanceCounter.BUSY_NS, end - start),
            (InstanceCounter.QUEUE_BUCKETS + min(((3 * start - 1000) // 3 >> 10).bit_length(), 25), 3),
            (InstanceCounter.COMPUTE_BUCKETS + min((end - start >> 10).bit_length(), 25), 3),
            (InstanceCounter.BATCH_SIZES + 4 * 3, 1),
            (InstanceCounter.BATCH_SIZES + 4 * 3 + 1, input_end - start),
            (InstanceCounter.BATCH_SIZES + 4 * 3 + 2, output_start - input_end),
        ):
            expected[word] += amount
        found = it.counters.tolist()
        expected[InstanceCounter.LAST_INFERENCE_MS] = found[InstanceCounter.LAST_INFERENCE_MS]
        assert found == expected
        assert received(it.told) == [], "it was not to be told"


def test_the_scheduler_is_not_told_of_granted_batches() -> None:
    with rig() as it:
        lane = it.lane
        it.runner.execute(memoryview(message()), 2000)
        granted = message(flags=FLAG_GRANTED)
        assert lane.run(granted, len(granted), True)
        assert received(it.told) == []


@pytest.mark.parametrize(
    "other",
    [
        message(first=3),
        message(rows=5),
        message(requests=0),
        message()[:-1],
        message() + b"\0",
        b"",
        HEADER.pack(Kind.WAKE, 0, 0, 0, 0),
        HEADER.pack(Kind.PARCELS, 0, 1, 0, 0) + bytes(RUN.size),
        HEADER.pack(Kind.RUNS, 0, 2, 0, 0) + bytes(RUN.size),
        pack_runs(Kind.RUNS, 0, 0, 9, [Run(PRODUCER + 1, 3, 0, CAPACITY, 2, 4, 0, 0)]),
    ],
)
def test_anything_else_is_left_alone(other: bytes) -> None:
    with rig() as it:
        lane = it.lane
        it.runner.execute(memoryview(message()), 2000)
        received(it.answers)
        assert not lane.run(other, len(other), True)
        assert it.instance.calls == 1
        assert received(it.answers) == received(it.told) == []


def test_a_message_that_says_it_is_longer_than_it_is_is_left_alone() -> None:
    with rig() as it:
        lane = it.lane
        it.runner.execute(memoryview(message()), 2000)
        assert not lane.run(bytearray(message()[:20]), len(message()), True)


def test_what_the_model_raises_is_raised_and_nobody_was_rung() -> None:
    with rig() as it:
        lane = it.lane
        it.runner.execute(memoryview(message()), 2000)
        received(it.answers)
        it.instance.error = BackendFailed("no")
        with pytest.raises(BackendFailed, match="no") as raised:
            lane.run(message(), len(message()), True)
        assert received(it.answers) == received(it.told) == []
        since_ns = it.counters[InstanceCounter.RUNNING_SINCE_NS]
        assert since_ns

        it.runner.failed(memoryview(message()), since_ns, raised.value)
        [reply] = received(it.answers)
        assert reply[0] == Kind.RUNS_FAILED
        assert it.counters[InstanceCounter.FAILED_BACKEND] == 3


def test_a_producer_that_is_gone_is_forgotten() -> None:
    with rig() as it:
        lane = it.lane
        it.runner.execute(memoryview(message()), 2000)
        it.runner.forget_producer(PRODUCER)
        assert not lane.run(message(), len(message()), True)


def test_answers_stay_behind_what_waits_for_a_full_doorbell() -> None:
    with rig() as it:
        lane = it.lane
        it.runner.execute(memoryview(message()), 2000)
        while not it.done.backlog_count:
            it.done.ring(bytes(4096))
        waiting = it.done.backlog_count
        received(it.told)  # There is room again, but not for those who come last.
        assert lane.run(message(), len(message()), True)
        # The bell sent what waited and then the new one, or keeps all of them: never the new one first.
        order = received(it.told)
        assert it.done.backlog_count <= waiting + 1
        assert not order or order[0] == bytes(4096)


def test_rows_of_another_number_of_requests_are_something_else_where_that_matters() -> None:
    calls: list[str] = []
    with rig() as it:
        bell = it.producers.guarded_bell(PRODUCER)
        lane = open_lane(INSTANCE, it.counters, it.done, tells_requests_apart=True)
        assert lane is not None
        three, four = message(requests=3), message(requests=4)
        lane.keep(three[HEADER.size :], lambda: calls.append(f"three of batch {lane.batch}"), bell)
        assert lane.run(three, len(three), True)
        assert not lane.run(four, len(four), True)
        lane.keep(four[HEADER.size :], lambda: calls.append("four"), bell)
        assert lane.run(four, len(four), True)
        assert calls == ["three of batch 9", "four"]
        lane.forget(PRODUCER)
        assert not lane.run(three, len(three), True)
        assert not lane.run(four, len(four), True)


# --- what clients ring themselves ---

TICKET = 1 << 63 | 5


class Ring(NamedTuple):
    """A rig whose lane watches a doorbell and the ring of the producer, as one that has run before."""

    rig: Rig
    client: socket.socket
    receiver: socket.socket
    doorbell: socket.socket
    doorbell_receiver: socket.socket
    buffer: bytearray

    def rung(self, **changes: int) -> bytes:
        header = {"kind": Kind.RUNS, "flags": FLAG_GRANTED, "count": 1, "place": 0, "ticket": TICKET}
        run = {"producer": 99, "requests": 3, "base": 0, "capacity": CAPACITY, "first": 2, "rows": 4, "attempt": 0}
        run["enqueue_sum_ns"] = 3 * time.monotonic_ns()
        for fields in (header, run):
            fields.update({name: value for name, value in changes.items() if name in fields})
        return HEADER.pack(*header.values()) + RUN.pack(*run.values())

    def wait(self) -> int:
        found: int = self.rig.lane.wait(self.buffer, 0)
        return found


@contextmanager
def ring(spin_ns: int = 0) -> Iterator[Ring]:
    doorbell, doorbell_receiver = create_doorbell()
    client, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with rig() as it, doorbell, doorbell_receiver, client, receiver:
        it.runner.execute(memoryview(message()), 2000)
        received(it.answers)
        it.lane.listen(doorbell_receiver.fileno(), ROWS_MAX, spin_ns)
        it.lane.watch(receiver.fileno(), PRODUCER, TICKET, 0)
        yield Ring(it, client, receiver, doorbell, doorbell_receiver, bytearray(4096))


@pytest.mark.parametrize("spin_ns", [0, 200_000])
def test_what_is_rung_is_run_at_once_and_answered(spin_ns: int) -> None:
    with ring(spin_ns) as it:
        it.client.send(it.rung())
        assert it.wait() == -1
        assert it.rig.instance.calls == 2
        [reply] = received(it.rig.answers)
        assert HEADER.unpack_from(reply) == (Kind.RUNS_DONE, 0, 1, INSTANCE, TICKET)
        # Whose rows these are is not for the client to say.
        assert RUN.unpack_from(reply, HEADER.size + TIMES.size)[:2] == (PRODUCER, 3)
        assert RUN.unpack_from(it.buffer, HEADER.size)[0] == PRODUCER
        assert received(it.rig.told) == []
        assert it.rig.counters[InstanceCounter.RUNNING_SINCE_NS] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": Kind.PARCELS},
        {"count": 2},
        {"ticket": TICKET + 1},
        {"place": 1},
        {"requests": 0},
        {"requests": 5},
        {"rows": ROWS_MAX + 1},
        {"first": 3},
        {"base": 64},
    ],
)
def test_what_is_rung_otherwise_is_read_and_left_alone(changes: dict[str, int]) -> None:
    with ring() as it:
        sent = it.rung(**changes)
        it.client.send(sent)
        assert it.wait() == it.receiver.fileno()
        assert bytes(it.buffer[: it.rig.lane.size]) == sent
        assert it.rig.instance.calls == 1


@pytest.mark.parametrize("enqueue_sum_ns", [0, (1 << 64) - 1])
def test_times_that_cannot_be_are_put_right(enqueue_sum_ns: int) -> None:
    with ring() as it:
        before_ns = 3 * time.monotonic_ns()
        it.client.send(it.rung(enqueue_sum_ns=enqueue_sum_ns))
        assert it.wait() == -1
        [reply] = received(it.rig.answers)
        assert before_ns <= RUN.unpack_from(reply, HEADER.size + TIMES.size)[-1] <= 3 * time.monotonic_ns()


def test_the_doorbell_is_not_read_and_has_its_turn() -> None:
    with ring() as it:
        it.doorbell.send(b"x")
        doorbell = it.doorbell_receiver.fileno()
        assert it.wait() == doorbell
        for _ in range(4):
            it.client.send(it.rung())
        assert sorted([it.wait() for _ in range(4)]) == [-1, -1, doorbell, doorbell]
        it.doorbell_receiver.recv(1)
        assert [it.wait() for _ in range(3)] == [-1] * 3
        assert it.rig.instance.calls == 5


def test_the_end_of_a_ring_is_told_with_no_bytes() -> None:
    with ring() as it:
        it.client.close()
        assert it.wait() == it.receiver.fileno()
        assert it.rig.lane.size == 0
        it.rig.lane.unwatch(it.receiver.fileno())
        assert it.wait() == -1


def test_a_ring_that_is_not_watched_is_not_read() -> None:
    with ring() as it:
        it.rig.lane.unwatch(it.receiver.fileno())
        it.rig.lane.unwatch(it.receiver.fileno())
        it.client.send(it.rung())
        assert it.wait() == -1
        assert it.rig.instance.calls == 1
        it.rig.lane.watch(it.receiver.fileno(), PRODUCER, TICKET, 7)
        assert it.wait() == it.receiver.fileno(), "the place is another one"


def test_what_a_rung_model_raises_is_raised_with_its_message_at_hand() -> None:
    with ring() as it:
        it.rig.instance.error = BackendFailed("no")
        it.client.send(it.rung())
        with pytest.raises(BackendFailed, match="no") as raised:
            it.wait()
        whole = memoryview(it.buffer)[: it.rig.lane.size]
        it.rig.runner.failed(whole, it.rig.counters[InstanceCounter.RUNNING_SINCE_NS], raised.value)
        [reply] = received(it.rig.answers)
        assert HEADER.unpack_from(reply) == (Kind.RUNS_FAILED, 0, 1, INSTANCE, TICKET)


def test_a_signal_ends_the_wait_with_what_its_handler_raises() -> None:
    def interrupt(*_: object) -> None:
        raise InterruptedError("now")

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        with ring() as it:
            timer.start()
            with pytest.raises(InterruptedError, match="now"):
                it.rig.lane.wait(it.buffer, -1)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_nothing_leaks() -> None:
    with rig() as it:
        lane = it.lane
        for first in range(8):
            it.runner.execute(memoryview(message(first)), 2000)
        counts: list[int] = []
        for _ in range(3):
            for _ in range(100):
                assert lane.run(message(1), len(message(1)), True)
            received(it.answers)
            received(it.told)
            counts.append(sys.getrefcount(it.done))
        assert counts[0] == counts[1] == counts[2]
        with pytest.raises(TypeError):
            lane.run(message(), 56)  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="RUN"):
            lane.keep(b"short", it.instance.close, it.done)
