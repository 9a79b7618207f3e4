"""A frontend's end of the engine: places requests in shared memory, hands them over, and takes the answers.

One per frontend process, used from its event loop only. Requests of one event-loop turn are coalesced: neighbouring
rows become one run, all runs of a turn one message (I-3). Under a grant the run goes straight to the worker's doorbell.

What a caller sees is small: :meth:`RouteClient.loan` rows or :meth:`EngineClient.allocate` blocks, fill them, publish
them with an owner, and be called back. Ownership: loaned rows and blocks belong to the caller until published, then to
the engine until the owner's callback, then to the caller again, who releases them.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from forebay.frontend.data_plane.awake_cores import AwakeCores
from forebay.frontend.data_plane.cancellations import Cancellations
from forebay.frontend.data_plane.core_sharing import CoreSharing
from forebay.frontend.data_plane.device_pools import DevicePools
from forebay.frontend.data_plane.grants import Grants
from forebay.frontend.data_plane.owners import OwnedSlab
from forebay.frontend.data_plane.parcels_in_flight import ParcelsInFlight
from forebay.frontend.data_plane.recovery import resubmit_all
from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.data_plane.row_answers import RowAnswers
from forebay.frontend.data_plane.wakeful_wait import WakefulWait
from forebay.frontend.route_details import RouteDetails
from forebay.frontend.tracing import Sampler
from forebay.ipc.arena import Arena, BlockAllocator
from forebay.ipc.catalog import Catalog, ModelEntry
from forebay.ipc.channel import SubmitSender
from forebay.ipc.counters import PRODUCER_WORDS, CountersFile, detail_words, instance_words
from forebay.ipc.errors import Unavailable
from forebay.ipc.messages import ParcelHead, ParcelSubmit, RunSubmit, Submit
from forebay.ipc.wire import (
    FLAG_GONE,
    FLAG_HUNG,
    FLAG_REMARKS,
    GRANT,
    HEADER,
    MESSAGE_BYTES_MAX,
    TIMES,
    TIMES_END,
    TOKEN,
    Kind,
    Times,
    is_small_answer,
)

if TYPE_CHECKING:
    from forebay.frontend.response_cache import ResponseCache

#: Seconds between two looks at how much memory requests use, while they use any.
GAUGE_SECS = 0.25
#: Requests of a model that arrive in one event-loop turn and delay those of others.
_CROWD = 8
#: Messages that wait at most while small answers pass them.
_DEFERRED_MAX = 8
#: Answers to parcels that one event-loop turn takes at most.
_REPLIES_PER_TURN = 32
_PARCEL_ANSWERS = (Kind.PARCEL_REPLY, Kind.PARCEL_REPLIES)


class EngineClient:
    """All routes, the arena, the doorbells."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        producer: int,
        epoch: int,
        arena: Arena,
        completions: socket.socket,
        counters: CountersFile,
        submit: SubmitSender,
    ) -> None:
        self.producer = producer
        self.arena = arena
        #: uint8 [arena bytes]: the whole arena
        self.view = arena.view
        self.slabs: dict[int, tuple[RouteClient, OwnedSlab]] = {}
        self.routes: dict[int, RouteClient] = {}
        #: Of couriers, which stand in no catalog: they carry tensors between shared and device memory.
        self.couriers: dict[int, RouteClient] = {}
        #: Device memory between the steps of ensembles.
        self.device_pools = DevicePools()
        #: By model name, what its routes' requests are traced by.
        self.sampler_of: Callable[[str], Sampler | None] = _no_sampler
        #: Whether any model's requests are traced.
        self.is_tracing = False
        #: (namespace, name) to version to route.
        self._by_model: dict[tuple[str, str], dict[int, RouteClient]] = {}
        self._epoch = epoch
        self._loop = loop
        self._completions = completions
        completions.setblocking(False)
        self._counters_file = counters
        self._submit = submit
        self._blocks = BlockAllocator(arena.byte_size)
        # Offset 0 is nobody's, so that a zeroed place is never a real one.
        self._blocks.allocate(64)
        self._tokens = itertools.count(1)
        self._dirty: list[RouteClient] = []
        #: Those of which many requests have arrived together, until that is forgotten.
        self.crowded_routes: set[RouteClient] = set()
        #: Those of which that was so since :meth:`forget_crowds`.
        self._crowded_lately: set[RouteClient] = set()
        #: Called after each answer while any is crowded.
        self.between_answers: Callable[[], None] | None = None
        self._is_flush_due = False
        self._turn_ns = 0
        self._cancellations = Cancellations()
        #: What is done behind the answers that are being given.
        self._afterwards: list[Callable[[], None]] = []
        self._is_answering = False
        #: Of the answer that is being given, if it was held back.
        self.held_times: Times | None = None
        #: Answers of models that have them kept; None: the server has no response cache.
        self.response_cache: ResponseCache | None = None
        #: The gauges of memory in use will be written in a moment.
        self.are_gauges_due = False
        self._buffer = bytearray(MESSAGE_BYTES_MAX)
        self._buffer_view = memoryview(self._buffer)
        #: For answers that pass those that are being given.
        self._early_buffer = bytearray(MESSAGE_BYTES_MAX)
        #: Messages that were read while small answers were looked for, in order: they come before what is not read yet.
        self._deferred: deque[bytes] = deque()
        #: The event loop will come to them.
        self._is_deferred_due = False
        self._encode_head = msgspec.msgpack.Encoder().encode
        #: Runs of ensembles that need a model version, by the offset of its counters; none: 0.
        self.ensemble_uses: dict[int, int] = {}
        self._no_counters = memoryview(bytearray(PRODUCER_WORDS * 8)).cast("Q")
        #: Has a worker run on our core while requests come one at a time.
        self.wakeful_wait = WakefulWait(loop)
        self.cores = CoreSharing(producer, self.wakeful_wait)
        #: Keeps cores from sleeping while requests come.
        self.awake_cores = AwakeCores(loop)
        self.rows = RowAnswers(self)
        self.parcels = ParcelsInFlight(self)
        self.grants = Grants(
            producer, submit, route_of=self.routes.get, run_lost=self.rows.run_lost, parcel_lost=self.parcels.lost
        )
        loop.add_reader(completions.fileno(), self._on_completion)

    # --- models ---

    def update_catalog(self, catalog: Catalog) -> None:
        """Follow a new catalog: open what is new, retire what is gone."""
        alive: set[int] = set()
        for entry in catalog.models:
            if entry.route and entry.is_ready:
                alive.add(entry.route)
                route = self.routes.get(entry.route)
                if route is None:
                    self.routes[entry.route] = RouteClient(self, entry)
                else:
                    route.update(entry)
        for number in [number for number in self.routes if number not in alive]:
            self.routes.pop(number).retire()
        self._by_model = {}
        for route in self.routes.values():
            self._by_model.setdefault((route.entry.namespace, route.entry.name), {})[route.entry.version] = route
        if self.response_cache is not None:
            self.response_cache.forget_retired()

    def trace_by(self, sampler_of: Callable[[str], Sampler | None], *, is_tracing: bool) -> None:
        """Trace requests as these samplers say, from now on.

        Args:
            is_tracing: there is any sampler.
        """
        self.sampler_of = sampler_of
        self.is_tracing = is_tracing
        for route in self.routes.values():
            route.sampler = sampler_of(route.entry.name)

    def find_route(self, namespace: str, model: str, version: int) -> RouteClient | None:
        """Return the route of a READY version, of the highest one for a version below 1; None: there is none."""
        versions = self._by_model.get((namespace, model))
        if not versions:
            return None
        return versions.get(version if version > 0 else max(versions))

    def counters_block(self, offset: int) -> memoryview:
        """Return the words of one of this frontend's blocks; a private one for offset 0."""
        return self._counters_file.block(offset, PRODUCER_WORDS) if offset else self._no_counters

    def route_details(self, entry: ModelEntry) -> RouteDetails | None:
        """Return the writer of this frontend's block of details; None: there is none."""
        if not entry.detail_offset:
            return None
        words = detail_words(has_latencies=entry.has_latencies, is_decoupled=entry.decoupled)
        return RouteDetails(entry, self._counters_file.block(entry.detail_offset, words))

    def step_counters_block(self, entry: ModelEntry) -> memoryview:
        """Return the words for an ensemble's steps; private ones if the entry has none."""
        words = instance_words(entry.max_batch_size)
        if not entry.step_counter_offset:
            return memoryview(bytearray(words * 8)).cast("Q") if entry.is_ensemble else self._no_counters
        return self._counters_file.block(entry.step_counter_offset, words)

    # --- memory ---

    def allocate(self, byte_size: int) -> int:
        """Return the offset of a block.

        Raises:
            ArenaFull: there is no room.
        """
        return self._blocks.allocate(byte_size)

    def free(self, offset: int, byte_size: int) -> None:
        """Give a block back; large ones return their pages to the kernel."""
        self._blocks.free(offset, byte_size)
        if byte_size >= 64 * 1024 * 1024:
            self.arena.discard(offset, byte_size)

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena in use."""
        return self._blocks.used_bytes

    @property
    def in_flight_count(self) -> int:
        """Rows and parcels handed over and not answered."""
        return sum(slab.live for _route, slab in self.slabs.values()) + len(self.parcels)

    def next_token(self) -> int:
        return next(self._tokens)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Have something done when the answers at hand are given; without any, at the end of this event-loop turn."""
        if self._is_answering:
            self._afterwards.append(callback)
        else:
            self._loop.call_soon(callback)

    def encode_head(self, head: ParcelHead) -> bytes:
        return self._encode_head(head)

    # --- gauges ---

    def want_gauges(self) -> None:
        """Memory is being used: write the gauges in a moment, and until all of it is free again."""
        if not self.are_gauges_due:
            self.are_gauges_due = True
            self.awake_cores.used()
            self._loop.call_later(GAUGE_SECS, self._write_gauges)

    def _write_gauges(self) -> None:
        self.are_gauges_due = False
        in_use = [route.write_gauges() for route in self.routes.values()]
        for route in self.routes.values():
            route.write_counters()
        if any(in_use):
            self.want_gauges()

    # --- turns ---

    def turn_ns(self) -> int:
        """Return the time of this event-loop turn; one clock read per turn."""
        if not self._turn_ns:
            self._turn_ns = time.monotonic_ns()
        return self._turn_ns

    def schedule_flush(self, route: RouteClient) -> None:
        """Remember that the route has something to send at the end of the turn."""
        self._schedule_turn_end()
        self._dirty.append(route)

    def _schedule_turn_end(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        self._is_flush_due = False
        self._turn_ns = 0
        runs: list[RunSubmit] = []
        parcels: list[ParcelSubmit] = []
        for route in dirty:
            route.is_flush_scheduled = False
            self._note_crowd(route)
            if (route.turn or route.turn_parcels) and not route.flush_direct():
                route.is_holding = False
                runs.extend(run.to_submit(route.route) for run in route.turn)
                parcels.extend(route.turn_parcels)
                route.turn.clear()
                route.turn_parcels.clear()
            route.write_counters()
        if runs or parcels:
            self.cores.crowded()
            message = Submit(producer=self.producer, epoch=self._epoch, runs=tuple(runs), parcels=tuple(parcels))
            if not self._submit.send_nowait(message):
                self._refuse_unsent(runs, parcels)
        if self._cancellations:
            cancel = self._cancellations.take(self.producer, self.slabs)
            if cancel is not None:
                self.grants.cancel_rows(cancel.rows)
                self.grants.cancel_parcels(cancel.tokens)
                self._submit.send_nowait(cancel)

    def _note_crowd(self, route: RouteClient) -> None:
        requests = sum([run.requests for run in route.turn]) + len(route.turn_parcels)
        if requests >= _CROWD and route.route not in self.couriers:
            self.crowded_routes.add(route)
            self._crowded_lately.add(route)

    def forget_crowd(self, route: RouteClient) -> None:
        """The model version is no longer routed to."""
        self.crowded_routes.discard(route)
        self._crowded_lately.discard(route)

    def forget_crowds(self) -> None:
        """Call none crowded of which that cannot be said since the last time.

        A single small turn says nothing: in a saturated server every third is one.
        """
        self.crowded_routes &= self._crowded_lately
        self._crowded_lately.clear()

    def _refuse_unsent(self, runs: list[RunSubmit], parcels: list[ParcelSubmit]) -> None:
        error = Unavailable("the scheduler does not keep up; try again later")
        for run in runs:
            route, slab = self.slabs[run.base]
            self.rows.fail(route, slab, run.first, run.requests * run.rows_each, error, requests=run.requests)
        for parcel in parcels:
            self.parcels.fail(parcel.token, error)

    # --- completions ---

    @property
    def completions_fd(self) -> int:
        """The receiving end of the completion doorbell, for who cannot wait until the event loop looks at it."""
        return self._completions.fileno()

    def take_answer_now(self) -> None:
        """Act on one message that has come, if that is quick: an answer of one request in rows passes those of batches.

        Those are no quicker for being begun and wait for their turn; so does what comes behind anything else that
        waits. While an answer is being given, nothing but the answer of one request in rows is acted on.
        """
        early, deferred = self._early_buffer, self._deferred
        while len(deferred) < _DEFERRED_MAX and (not deferred or deferred[-1][0] == Kind.RUNS_DONE):
            try:
                size = self._completions.recv_into(early)
            except BlockingIOError:
                return
            if size < HEADER.size:
                return
            if is_small_answer(early, size) and not self._is_awaited(early):
                self._act_early(early, size)
                return
            if not deferred and not self._is_answering and early[0] != Kind.RUNS_DONE:
                self._act_early(early, size)
                return
            deferred.append(bytes(early[:size]))
            self._schedule_deferred()

    def _is_awaited(self, answer: bytearray) -> bool:
        """Tell whether the instance has answered before, and that waits for its turn.

        What it has answered before and is being given may be passed: nobody rings the instance before that is over.
        """
        instance = HEADER.unpack_from(answer)[3]
        return any(HEADER.unpack_from(message)[3] == instance for message in self._deferred)

    def _schedule_deferred(self) -> None:
        if self._deferred and not self._is_deferred_due:
            self._is_deferred_due = True
            self._loop.call_soon(self._take_deferred)

    def _take_deferred(self) -> None:
        self._is_deferred_due = False
        if self._deferred:
            self._on_completion()

    def _act_early(self, message: bytearray, size: int) -> None:
        outer = self._buffer, self.held_times, self._is_answering
        self._buffer, self.held_times, self._is_answering = message, None, True
        try:
            self._completed(memoryview(message)[:size])
        finally:
            self._buffer, self.held_times, self._is_answering = outer
            if not self._is_answering:
                self._do_afterwards()

    def _do_afterwards(self) -> None:
        while self._afterwards:
            self._afterwards.pop()()

    def _on_completion(self) -> None:
        self._is_answering = True
        try:
            self._take_answers()
        finally:
            self._is_answering = False
            self._schedule_deferred()
            self._do_afterwards()

    def _take_answers(self) -> None:
        # Every parcel has a message of its own: several are read in one turn, so that what follows from them (the next
        # steps of ensembles) goes out together.
        for _ in range(_REPLIES_PER_TURN):
            if self._deferred:
                message = self._deferred.popleft()
                size = len(message)
                self._buffer[:size] = message
            else:
                try:
                    size = self._completions.recv_into(self._buffer)
                except BlockingIOError:
                    return
            if size < HEADER.size:
                return
            if self._completed(self._buffer_view[:size]) not in _PARCEL_ANSWERS:
                return

    def _completed(self, message: memoryview) -> int:
        """Handle one message; return its kind."""
        kind, flags, count, instance, batch = HEADER.unpack_from(message)
        if kind == Kind.RUNS_DONE:
            self.rows.done(message, count, instance, batch, has_remarks=bool(flags & FLAG_REMARKS))
        elif kind == Kind.PARCEL_REPLY:
            self.parcels.reply(message, flags, instance)
        elif kind == Kind.PARCEL_REPLIES:
            self.parcels.replies(message, count, instance)
        elif kind == Kind.RUNS_FAILED:
            self.rows.failed(message, count, instance, batch)
        elif kind == Kind.GRANT:
            self.grants.give(message)
        elif kind == Kind.REVOKE:
            if flags & FLAG_GONE:
                self.rows.forget_worker(GRANT.unpack_from(message, HEADER.size)[1])
            self.grants.revoke(message, flags)
        elif kind == Kind.RUNS_LOST:
            self.rows.lost(message, count, instance, batch, is_hung=bool(flags & FLAG_HUNG))
        elif kind == Kind.PARCEL_LOST:
            for index in range(count):
                (token,) = TOKEN.unpack_from(message, TIMES_END + index * TOKEN.size)
                self.parcels.lost(token, is_hung=bool(flags & FLAG_HUNG))
        elif kind == Kind.RESYNC:
            end = HEADER.size + count * TOKEN.size
            running = {token for (token,) in TOKEN.iter_unpack(message[HEADER.size : end])}
            if batch != self._epoch:  # Else: nothing of ours went to an earlier scheduler.
                self._epoch = batch
                resubmit_all(self, running)
        return int(kind)

    def reply_times(self) -> Times:
        """Return the times of the execution whose completion is being handled; zero if it did not run."""
        if self.held_times is not None:
            return self.held_times
        return Times._make(TIMES.unpack_from(self._buffer, HEADER.size))

    # --- cancellation ---

    def cancel(self, token: int) -> None:
        """Tell the engine that nobody waits for the parcel; its owner is still called back once, with the last word."""
        if not self.parcels.withdraw(token):
            self._cancellations.add_parcel(token)
            self._schedule_turn_end()

    def cancel_rows(self, route: int, slab: OwnedSlab, first: int) -> None:
        """Tell the scheduler that nobody waits for a request in rows; see :meth:`RouteClient.cancel_rows`."""
        self._cancellations.add_rows(route, slab, first)
        self._schedule_turn_end()

    # --- end ---

    def close(self) -> None:
        self._deferred.clear()
        self.grants.close()
        self._loop.remove_reader(self._completions.fileno())
        self._submit.close()


def _no_sampler(_model: str) -> None:
    """Tracing is off."""
