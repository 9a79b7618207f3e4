"""The worker's life: take the specification from the lifeline, load, then serve batches from the doorbell.

Runs in a process forked from a zygote. It blocks on its doorbell only; the supervisor rings WAKE when something waits
on the lifeline.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from forebay.engine.backends.base import Backend, RequestInstance, RowsInstance, TensorInstance, open_backend
from forebay.engine.backends.python_model.metrics import registry
from forebay.engine.backends.python_model.outer_requests import watch
from forebay.engine.devices.memory_limit import check_memory_limit
from forebay.engine.worker.custom_metrics import MetricsSender
from forebay.engine.worker.inbox import Inbox
from forebay.engine.worker.lanes import open_lane
from forebay.engine.worker.loop_threads import LoopThreads
from forebay.engine.worker.parcels import ParcelsRunner
from forebay.engine.worker.placement import Placement
from forebay.engine.worker.places import Producer, Producers
from forebay.engine.worker.ragged import RaggedPolicy, with_batch_tensors
from forebay.engine.worker.ready_check import start_ready_check
from forebay.engine.worker.request_rows import RequestRowsRunner
from forebay.engine.worker.rings import Rings
from forebay.engine.worker.rows import RowsRunner
from forebay.engine.worker.sequences import SequencesRunner, sequence_policy, with_sequence_tensors
from forebay.engine.worker.wait_styles import Park, wait_style
from forebay.engine.worker.warmup import warm_up
from forebay.ipc.counters import CountersFile, InstanceCounter, instance_words
from forebay.ipc.doorbell import Bell
from forebay.ipc.errors import Internal, ServingError
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.log import LogOptions, log
from forebay.ipc.messages import DeviceMemory, Failed, LogChanged, Stop
from forebay.ipc.process import set_name
from forebay.ipc.wire import FLAG_GRANTED, FLAG_UNNAMED, HEADER, MESSAGE_BYTES_MAX, NO_TIMES, OPEN, Kind, producers_of
from forebay.ipc.worker_messages import (
    Adopt,
    ArenaDown,
    ArenaUp,
    AskReady,
    CheckMemory,
    Describe,
    Described,
    InstanceSpec,
    Load,
    Loaded,
    MakeMemory,
    MemoryChecked,
    MemoryClosed,
    MemoryDown,
    MemoryMade,
    Phase,
    RingUp,
    SupervisorToWorker,
)

if TYPE_CHECKING:
    from forebay.engine.worker.rows_lane import RowsLane

#: How long to wait between tries to deliver to a producer that does not read.
_BACKLOG_RETRY_S = 0.01

#: How long a new scheduler is kept waiting for producers that do not read, s.
_SYNC_PATIENCE_S = 2.0

#: Open requests whose names fit into one message.
_NAMED_MAX = 8192

_SINCE = InstanceCounter.RUNNING_SINCE_NS
_CLOCK_WORDS = InstanceCounter.BATCH_SIZES


class Worker:
    """One instance. ``serve`` returns when the supervisor says stop or is gone."""

    def __init__(
        self,
        lifeline: Lifeline[SupervisorToWorker],
        doorbell: socket.socket,
        done: Bell,
        counters: CountersFile,
        siblings: LoopThreads,
    ) -> None:
        self._lifeline = lifeline
        self._doorbell = doorbell
        self._done = done
        self._counters_file = counters
        #: The other instances of this process.
        self._siblings = siblings
        self._producers = Producers()
        self._spec: InstanceSpec | None = None
        self._backend: Backend | None = None
        self._instance: TensorInstance | RequestInstance | None = None
        self._rows: RowsRunner | RequestRowsRunner | None = None
        self._lane: RowsLane | None = None
        self._parcels: ParcelsRunner | None = None
        self._sequences: SequencesRunner | None = None
        self._rings: Rings | None = None
        self._wait = Park()
        self._placement: Placement | None = None
        #: Reads ahead while a batch of parcels runs, so that a model hears of cancellations.
        self._inbox = Inbox(doorbell, self._handle_early, self._tell_unsynced)
        #: The message that the loop has read last.
        self._buffer = bytearray(MESSAGE_BYTES_MAX)
        #: Our counters; only for :attr:`InstanceCounter.RUNNING_SINCE_NS`, which tells the supervisor of a hung batch.
        self._clock = memoryview(bytearray(_CLOCK_WORDS * 8)).cast("Q")
        #: A batch of parcels runs in the loop's own thread.
        self._is_executing = False
        self._stopping = False

    # --- lifeline ---

    def prepare(self) -> bool:
        """Handle lifeline messages until the model is loaded; False if it never will be."""
        while self._instance is None:
            message, fds = self._lifeline.receive()
            self._handle(message, fds)
            if self._stopping:
                return False
        return True

    def _handle(self, message: SupervisorToWorker, fds: list[int]) -> None:
        match message:
            case ArenaUp():
                arena_fd, bell_fd = fds
                producer = Producer(
                    message.producer,
                    arena_fd,
                    message.byte_size,
                    bell_fd,
                    is_trusted=message.trusted,
                    is_counted=message.counted,
                )
                self._producers.attach(producer)
                if self._instance is not None:
                    self._instance.attach_memory(producer.arena.address, producer.arena.byte_size)
            case RingUp():
                self._attach_ring(message.producer, fds[0])
            case ArenaDown():
                if self._placement is not None:
                    self._placement.leave(message.producer)
                if self._rings is not None:
                    self._rings.detach(message.producer)
                if self._instance is not None and message.producer in self._producers:
                    self._instance.detach_memory(self._producers.get(message.producer).arena.address)
                if self._rows is not None:
                    self._rows.forget_producer(message.producer)
                if self._parcels is not None:
                    self._parcels.forget_producer(message.producer)
                self._producers.detach(message.producer)
            case Describe():
                self._answer(lambda: self._describe(message.spec))
            case Load():
                self._answer(lambda: self._load(message.spec))
            case LogChanged():
                with contextlib.suppress(OSError, msgspec.ValidationError):
                    log.configure(msgspec.convert(message.options, LogOptions))
            case CheckMemory():
                self._check_memory(message.memory)
            case MakeMemory():
                self._make_memory(message)
            case MemoryDown():
                if self._parcels is not None and self._parcels.memories is not None:
                    self._parcels.memories.forget((message.owner, message.number))
                self._lifeline.send(MemoryClosed(owner=message.owner, number=message.number))
            case Adopt():
                self._siblings.start(message.name, fds)
            case AskReady():
                if self._instance is not None and self._instance.ready_check is not None:
                    start_ready_check(self._lifeline, self._instance.ready_check, message.request)
            case Stop():
                self._stopping = True

    def _check_memory(self, memory: DeviceMemory) -> None:
        text = "there is no device"
        if self._parcels is not None and self._parcels.memories is not None:
            text = ""
            try:
                self._parcels.memories.address((memory.owner, memory.number), memory, 0, memory.byte_size)
            except ServingError as error:
                # CUDA's own words, as Triton shows them.
                text = error.text.rpartition(": ")[2]
        self._lifeline.send(MemoryChecked(text=text))

    def _make_memory(self, message: MakeMemory) -> None:
        memories = None if self._parcels is None else self._parcels.memories
        if memories is None:
            made = MemoryMade(text="there is no device")
        else:
            try:
                made = MemoryMade(handle=memories.make((message.owner, message.number), message.byte_size))
            except ServingError as error:
                made = MemoryMade(text=error.text)
        self._lifeline.send(made)

    def _attach_ring(self, producer: int, fd: int) -> None:
        if self._rings is None:
            os.close(fd)  # Rings come after the model has loaded.
        else:
            self._rings.attach(self._producers.get(producer), fd)

    def _answer(self, action: Callable[[], None]) -> None:
        # One place turns whatever loading raises into the reason that the index shows.
        try:
            action()
        except ServingError as error:
            self._fail(error)
        except MemoryError:
            self._fail(Internal("not enough memory to load the model"))
        except Exception as error:  # a framework may raise anything
            traceback.print_exc(file=sys.stderr)
            self._fail(Internal(f"{type(error).__name__}: {error}"))

    def _fail(self, error: ServingError) -> None:
        self._stopping = True
        self._lifeline.send(Failed(code=error.code, text=error.text))

    def _open(self, spec: InstanceSpec) -> Backend:
        self._spec = spec
        if threading.current_thread() is threading.main_thread():
            set_name(f"worker {spec.model}:{spec.version} {spec.instance_name}")
        if spec.cores:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, spec.cores)
        if self._backend is None:
            self._backend = open_backend(spec.backend)
        return self._backend

    def _describe(self, spec: InstanceSpec) -> None:
        described = self._open(spec).describe(spec)
        self._lifeline.send(
            Described(
                inputs=tuple(map(msgspec.to_builtins, described.inputs)),
                outputs=tuple(map(msgspec.to_builtins, described.outputs)),
                config=dict(described.config),
                max_batch_size=described.max_batch_size,
            )
        )

    def _load(self, spec: InstanceSpec) -> None:
        start_ns = time.monotonic_ns()
        self._lifeline.send(Phase(text="loading"))
        policy = sequence_policy(spec)
        check_memory_limit(spec)
        instance = self._open(spec).load(with_batch_tensors(with_sequence_tensors(spec)))
        counters = self._counters_file.block(spec.counter_offset, instance_words(spec.max_batch_size))
        self._clock = counters
        if isinstance(instance, TensorInstance):
            self._lane = open_lane(spec.instance, counters, self._done, tells_requests_apart=False)
            self._rows = RowsRunner(spec, instance, self._producers, counters, self._lane)
        elif isinstance(instance, RowsInstance):
            self._lane = open_lane(spec.instance, counters, self._done, tells_requests_apart=True)
            self._rows = RequestRowsRunner(spec, instance, self._producers, counters, self._inbox, self._lane)
        self._parcels = ParcelsRunner(spec, instance, self._producers, counters)
        self._parcels.tell_closed = self._tell_closed
        self._parcels.note_end = self._watch_open
        self._parcels.take_signals = self._inbox.take_signals
        if policy is not None:
            self._sequences = SequencesRunner(spec, policy, instance, self._parcels)
        self._wait = wait_style(spec.spin_us)
        self._placement = Placement(is_movable=not spec.spin_us)
        self._rings = Rings(
            spec,
            self._producers,
            self._doorbell,
            self._run_ring,
            self._wait,
            self._placement,
            self._parcels.open_tokens,
            self._lane,
            self._fail_in_lane,
        )
        self._instance = instance
        # A model that waits for others hears of signals whichever of its threads has called them.
        watch.on_look.append(self._inbox.take_signals)
        instance.count_copies(counters)
        for producer in self._producers:
            instance.attach_memory(producer.arena.address, producer.arena.byte_size)
        load_ns = time.monotonic_ns() - start_ns
        warmup_ns = 0
        if spec.warmup:
            self._lifeline.send(Phase(text="warming up"))
            warmup_ns = warm_up(spec, instance)
        wants_parcels = isinstance(instance, RequestInstance) and not (
            isinstance(instance, RowsInstance) and not instance.wants_parcels
        )
        device_id = self._device_id(spec)
        self._lifeline.send(
            Loaded(
                load_ns=load_ns,
                warmup_ns=warmup_ns,
                wants_parcels=wants_parcels,
                has_ready_check=instance.ready_check is not None,
                device_id=device_id,
            )
        )
        MetricsSender(self._lifeline, spec.instance, registry).start()

    def _device_id(self, spec: InstanceSpec) -> int:
        """Return the device that requests' tensors may lie on; sequences and ragged batches are made on the host."""
        instance = self._instance
        is_plain = self._sequences is None and not RaggedPolicy(spec).is_needed
        if instance is None or instance.device is None or not instance.takes_device_tensors or not is_plain:
            return -1
        return instance.device.index

    # --- doorbell ---

    def serve(self) -> None:
        """Take batches until told to stop."""
        buffer = self._buffer
        view = memoryview(buffer)
        receive, doorbell = self._wait.receive, self._doorbell
        runs, parcels = Kind.RUNS, Kind.PARCELS
        self._doorbell.setblocking(True)
        rows_runner, rings, clock = self._rows, self._rings, self._clock
        assert rings is not None
        while not self._stopping:
            if self._inbox.has_kept:
                size = self._inbox.take_kept(buffer)
            elif rings.is_open and not self._wait_doorbell(rings, buffer):
                continue
            elif self._producers.has_backlog() or self._done.backlog_count:
                size = self._receive_with_retry(buffer)
            else:
                size = receive(doorbell, buffer)
            if size < HEADER.size:
                if size == 0:
                    return  # Every sender is gone.
                continue
            if self._lane is not None and self._run_in_lane(self._lane, buffer, size, tells_scheduler=True):
                continue
            kind = buffer[0]
            if kind == runs and rows_runner is not None:
                start_ns = clock[_SINCE] = time.monotonic_ns()
                try:
                    times = rows_runner.execute(view[:size], start_ns)
                except struct.error:
                    times = NO_TIMES  # A torn message; its sender alone is concerned.
                clock[_SINCE] = 0
                if not buffer[1] & FLAG_GRANTED:
                    self._tell_done(buffer, times)
            elif kind == parcels or kind == Kind.SEQUENCES:
                self._run_parcels(kind, buffer, view[:size])
            else:
                self._handle_signal(kind, buffer, view[:size])

    def _wait_doorbell(self, rings: Rings, buffer: bytearray) -> bool:
        """Run what clients ring themselves until the doorbell rings; now and then look after full doorbells."""
        if not self._producers.has_backlog() and not self._done.backlog_count:
            return rings.wait_doorbell(buffer, None)
        self._producers.flush()
        self._done.flush()
        return rings.wait_doorbell(buffer, int(_BACKLOG_RETRY_S * 1000))

    def _run_in_lane(
        self, lane: RowsLane, message: bytearray | memoryview, size: int, *, tells_scheduler: bool
    ) -> bool:
        """Run the message without further ado if it is of the simplest kind, which nearly every one is."""
        try:
            return lane.run(message, size, tells_scheduler)
        except ServingError as error:
            whole = memoryview(message)[:size]
            times = self._fail_in_lane(whole, error)
            if tells_scheduler and not whole[1] & FLAG_GRANTED:
                self._tell_done(whole, times)
            return True

    def _fail_in_lane(self, message: memoryview, error: ServingError) -> bytes:
        """Answer what the lane has run and left unanswered; returns its TIMES, packed."""
        assert self._rows is not None
        times = self._rows.failed(message, self._clock[_SINCE], error)
        self._clock[_SINCE] = 0
        return times

    def _run_ring(self, kind: int, message: memoryview) -> None:
        if self._lane is not None and self._run_in_lane(self._lane, message, len(message), tells_scheduler=False):
            return
        if kind == Kind.PARCELS:
            self._run_parcels(kind, message, message, is_rung=True)
            return
        start_ns = self._clock[_SINCE] = time.monotonic_ns()
        try:
            if self._rows is not None:
                self._rows.execute(message, start_ns)
        finally:
            with self._producers.lock:
                self._watch_open()

    def _tell_done(self, buffer: bytearray | memoryview, times: bytes, still_open: Sequence[bytes] = ()) -> None:
        """Tell the scheduler that the batch in ``buffer`` has run; ``still_open``: its unanswered requests, packed."""
        assert self._spec is not None
        _kind, _flags, _count, _sender, batch = HEADER.unpack_from(buffer)
        header = HEADER.pack(Kind.DONE, 0, len(still_open), self._spec.instance, batch)
        self._done.ring(b"".join((header, times, *still_open)))

    def _tell_synced(self, epoch: int) -> None:
        """Tell a new scheduler that everything its predecessor sent has run, and what is still to be answered."""
        assert self._spec is not None
        assert self._parcels is not None
        with self._producers.lock:
            still_open = self._parcels.report_all_open()
            header = HEADER.pack(Kind.SYNCED, 0, len(still_open), self._spec.instance, epoch)
            self._done.ring(b"".join((header, *still_open)))

    def _tell_unsynced(self, sync: bytes | bytearray, ahead: Sequence[bytes]) -> None:
        """Tell a new scheduler how things stand while a model runs, which may wait for what was lost with the old one.

        Requests of earlier batches that are still open are named. Of producers that have anything else here, or in
        their ring, nothing is known to be lost before SYNCED: a request that is being unpacked or answered may be in no
        list, and one that a sequence model wants again is the scheduler's.

        Args:
            sync: the scheduler's message.
            ahead: what is to be run before it, besides what runs now.
        """
        assert self._spec is not None
        assert self._parcels is not None
        assert self._rings is not None
        epoch = HEADER.unpack_from(sync)[-1]
        unnamed = self._rings.open_producers
        batches: list[bytes | bytearray] = [self._buffer, *ahead]
        for message in batches:
            with contextlib.suppress(struct.error):  # A torn message; its sender alone is concerned.
                unnamed |= producers_of(message)
        with self._producers.lock:
            named: list[bytes] = []
            if self._sequences is None and self._parcels.open_count <= _NAMED_MAX:
                named = self._parcels.report_all_open()
            else:
                unnamed |= self._parcels.open_producers()
            # After the requests: what is answered in between is in one of both.
            unnamed |= self._producers.lagging()
            parts = [*named, *(OPEN.pack(producer, FLAG_UNNAMED, 0) for producer in unnamed)]
            header = HEADER.pack(Kind.UNSYNCED, 0, len(parts), self._spec.instance, epoch)
            self._done.ring(b"".join((header, *parts)))

    def _tell_opened(self, still_open: Sequence[bytes]) -> None:
        """Tell the scheduler of requests that a client's grant may not outlive, packed: they have run, unanswered."""
        assert self._spec is not None
        if still_open:
            header = HEADER.pack(Kind.OPENED, 0, len(still_open), self._spec.instance, 0)
            self._done.ring(b"".join((header, *still_open)))

    def _tell_closed(self, packed: bytes) -> None:
        """Tell the scheduler that a request has its answer now; the doorbells' lock is held."""
        assert self._spec is not None
        self._done.ring(HEADER.pack(Kind.CLOSED, 0, 1, self._spec.instance, 0) + packed)

    def _run_parcels(
        self, kind: int, buffer: bytearray | memoryview, message: memoryview, *, is_rung: bool = False
    ) -> None:
        assert self._parcels is not None
        runner = self._sequences if kind == Kind.SEQUENCES else self._parcels
        if runner is None:
            return
        with self._producers.lock:
            self._is_executing = True
            start_ns = self._clock[_SINCE] = time.monotonic_ns()
        try:
            with self._inbox.executing():
                times = runner.execute(message, start_ns)
        except struct.error:
            times = NO_TIMES
        with self._producers.lock:
            self._is_executing = False
            self._watch_open()
            if is_rung:
                self._tell_opened(self._parcels.report_open())
            elif not buffer[1] & FLAG_GRANTED:
                # A model's own threads answer too; who answers after this says so (CLOSED).
                self._tell_done(buffer, times, self._parcels.report_open())

    def _watch_open(self) -> None:
        """Let the supervisor watch what awaits its answer after its execution has returned; the lock is held."""
        if not self._is_executing and self._parcels is not None:
            self._clock[_SINCE] = self._parcels.oldest_open_ns()

    def _receive_with_retry(self, buffer: bytearray) -> int:
        # A producer does not read its doorbell. Keep serving the others, and try it again between their batches.
        self._doorbell.settimeout(_BACKLOG_RETRY_S)
        try:
            while True:
                self._producers.flush()
                self._done.flush()
                try:
                    return self._doorbell.recv_into(buffer)
                except TimeoutError:
                    if not self._producers.has_backlog() and not self._done.backlog_count:
                        self._doorbell.settimeout(None)
        finally:
            self._doorbell.settimeout(None)

    def _handle_early(self, message: memoryview) -> None:
        """Handle a COLLECT, CANCEL or CANCEL_ROWS that a running model read ahead."""
        assert self._parcels is not None
        kind, _flags, count, sender, _batch = HEADER.unpack_from(message)
        if kind == Kind.COLLECT:
            self._parcels.collect(sender, message)
        elif kind == Kind.CANCEL_ROWS:
            if isinstance(self._rows, RequestRowsRunner):
                self._rows.cancel(sender, message)
        else:
            self._parcels.cancel(sender, message, count)

    def _handle_signal(self, kind: int, buffer: bytearray, message: memoryview) -> None:
        assert self._spec is not None
        _kind, _flags, count, sender, batch = HEADER.unpack_from(buffer)
        if kind == Kind.WAKE:
            try:
                for received, fds in self._lifeline.receive_nowait():
                    self._handle(received, fds)
            except PeerClosed:
                self._stopping = True
        elif kind == Kind.PLACE and self._placement is not None:
            if batch:
                self._placement.join(sender, batch - 1)
            else:
                self._placement.leave(sender)
        elif kind == Kind.RING_OPEN and self._rings is not None:
            self._rings.open(sender, batch)
        elif kind == Kind.RING_CLOSE and self._rings is not None:
            self._rings.close(sender, batch, buffer)
        elif kind == Kind.SYNC:
            if self._rings is not None and self._rings.is_open:
                # What has been rung is run first, and may wait for what was lost with the old scheduler.
                self._tell_unsynced(buffer, ())
                self._rings.close_all(buffer)
            self._deliver_backlog()
            self._tell_synced(batch)
        elif kind == Kind.COLLECT and self._parcels is not None:
            self._parcels.collect(sender, message)
        elif kind == Kind.CANCEL and self._parcels is not None:
            self._parcels.cancel(sender, message, count)

    def _deliver_backlog(self) -> None:
        """Let what waits for full doorbells go first: whoever reads RESYNC takes the rest for lost."""
        end_s = time.monotonic() + _SYNC_PATIENCE_S
        while self._producers.has_backlog() and time.monotonic() < end_s:
            self._producers.flush()
            time.sleep(_BACKLOG_RETRY_S)

    def close(self) -> None:
        with contextlib.suppress(ValueError):  # It never loaded.
            watch.on_look.remove(self._inbox.take_signals)
        if self._parcels is not None and self._parcels.memories is not None:
            self._parcels.memories.close()
        if self._instance is not None:
            self._instance.close()
        # Threads of the model may have answered until now. Other instances may go on in this process.
        for producer in self._producers:
            self._producers.detach(producer.id)
