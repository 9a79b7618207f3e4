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
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from forebay.frontend.answer_order import AnswerOrder
from forebay.frontend.route_details import RouteDetails
from forebay.frontend.tracing import Sampler
from forebay.ipc.arena import Arena, BlockAllocator
from forebay.ipc.catalog import Catalog, ModelEntry
from forebay.ipc.channel import SubmitSender
from forebay.ipc.counters import LAST_BUCKET, PRODUCER_WORDS, CountersFile, detail_words, instance_words
from forebay.ipc.counters import ProducerCounter as Count
from forebay.ipc.doorbell import Bell
from forebay.ipc.errors import (
    ArenaFull,
    BackendFailed,
    Cancelled,
    Code,
    Internal,
    ServingError,
    Unavailable,
    WorkerDied,
    from_wire,
)
from forebay.ipc.messages import (
    Cancel,
    GrantReturned,
    ParameterValue,
    ParcelHead,
    ParcelSubmit,
    ReplyHead,
    RowsCancel,
    RunSubmit,
    Submit,
)
from forebay.ipc.slabs import Slab, SlabLayout
from forebay.ipc.wire import (
    FLAG_FINAL,
    FLAG_GONE,
    FLAG_GRANTED,
    FLAG_HUNG,
    GRANT,
    GRANTED_BATCH,
    GROW,
    HEAD_BYTES_MAX,
    HEADER,
    MESSAGE_BYTES_MAX,
    PARCEL,
    RUN,
    TIMES,
    TOKEN,
    Kind,
    Run,
    Times,
    pack_runs,
    unpack_runs,
)

if TYPE_CHECKING:
    from forebay.frontend.response_cache import ResponseCache

#: A request whose tensors take more bytes per row than this lives in blocks of its own: a slow upload must not hold
#: up the slab's ring, and gathering large rows would cost more than running them one by one.
SLAB_ROW_BYTES_MAX = 16 * 1024
#: Bytes of a route's first slab, at most.
SLAB_BYTES_FIRST = 2 * 1024 * 1024
#: Rows of a route's first slab.
SLAB_ROWS_MIN, SLAB_ROWS_MAX = 64, 65536
#: Seconds between two looks at how much memory requests use, while they use any.
GAUGE_SECS = 0.25
#: Times a request is handed to another worker after its worker died.
ATTEMPTS_MAX = 1

_TIMES_END = HEADER.size + TIMES.size

#: Answers to parcels that one event-loop turn takes at most.
_REPLIES_PER_TURN = 32


class RowOwner(Protocol):
    """Who waits for a request in slab rows."""

    @property
    def rows(self) -> int:
        """How many rows the request has."""
        ...

    def rows_done(self, slab: OwnedSlab, first: int) -> None:
        """The outputs are in place. The rows are released when this returns."""
        ...

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        """There are no outputs; ``ran`` tells whether a worker tried. The rows are released when this returns."""
        ...


OwnedSlab = Slab[RowOwner]


class ParcelOwner(Protocol):
    """Who waits for a parcel."""

    def parcel_reply(self, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        """One response; an error if ``reply.text`` is set. Places are valid until the owner frees its blocks."""
        ...

    def lend(self, byte_size: int) -> int:
        """Return the offset of a reply block of at least this size.

        Raises:
            ArenaFull: there is no room.
        """
        ...


# Plain integers: looking up a member of an enum costs as much as the addition.
_SUCCESS, _SUCCESS_NS, _REQUEST_BUCKETS = int(Count.SUCCESS), int(Count.SUCCESS_NS), int(Count.REQUEST_BUCKETS)


def count_answered(counters: memoryview, requests: int, elapsed_ns: int) -> None:
    """Count requests that have their answer.

    Args:
        elapsed_ns: summed over the requests; their mean decides on the bucket.
    """
    if elapsed_ns < 0:
        elapsed_ns = 0
    counters[_SUCCESS] += requests
    counters[_SUCCESS_NS] += elapsed_ns
    bucket = (elapsed_ns // requests >> 10).bit_length()
    counters[_REQUEST_BUCKETS + (bucket if bucket < LAST_BUCKET else LAST_BUCKET)] += requests


def count_failure(counters: memoryview, error: ServingError, requests: int, elapsed_ns: int, *, ran: bool) -> None:
    """Count failed requests, by Triton's reasons (spec M-021).

    Args:
        elapsed_ns: summed over the requests.
        ran: a worker had them.
    """
    counters[Count.FAILED] += requests
    counters[Count.FAILED_NS] += elapsed_ns
    if error.code is Code.CANCELLED:
        counters[Count.CANCELED] += requests
    elif not ran and error.code is Code.UNAVAILABLE:
        counters[Count.REJECTED] += requests
    elif ran:
        counters[Count.FAILED_BACKEND] += requests
    else:
        counters[Count.FAILED_OTHER] += requests


class Grant:
    """The right to ring one worker. Owns nothing: the doorbell belongs to the client."""

    __slots__ = ("batches", "bell", "generation", "instance", "outstanding", "revoked", "route", "rows_max", "tokens")

    def __init__(self, route: RouteClient, instance: int, generation: int, rows_max: int, bell: Bell) -> None:
        self.route = route
        self.instance = instance
        self.generation = generation
        self.rows_max = rows_max
        self.bell = bell
        #: What the worker runs now; empty: it is idle.
        self.outstanding: list[Run] = []
        self.tokens: list[int] = []
        self.revoked = False
        self.batches = 0

    @property
    def is_idle(self) -> bool:
        return not self.outstanding and not self.tokens

    def ring(self, runs: list[Run]) -> None:
        """Have the idle worker run these rows.

        If the worker is gone the doorbell takes nothing; the scheduler then says so (REVOKE, gone) after everything
        that the worker had sent, and the rows are handed in again.
        """
        self.outstanding = runs
        self.batches += 1
        batch = GRANTED_BATCH | self.batches
        self.bell.ring(pack_runs(Kind.RUNS, FLAG_GRANTED, self.route.engine.producer, batch, runs))
        self.route.counters[Count.GRANTED_BATCHES] += 1

    def ring_parcel(self, parcel: ParcelSubmit) -> None:
        """Have the idle worker run this parcel; as :meth:`ring` if it is gone."""
        producer = self.route.engine.producer
        self.tokens = [parcel.token]
        self.batches += 1
        self.bell.ring(
            b"".join(
                (
                    HEADER.pack(Kind.PARCELS, FLAG_GRANTED, 1, producer, GRANTED_BATCH | self.batches),
                    PARCEL.pack(producer, max(parcel.rows, 1), parcel.token, parcel.enqueue_ns, len(parcel.head)),
                    parcel.head,
                )
            )
        )
        self.route.counters[Count.GRANTED_BATCHES] += 1


class _TurnRun:
    """Consecutive rows published in this event-loop turn."""

    __slots__ = ("attempt", "enqueue_ns", "first", "priority", "requests", "rows_each", "slab", "timeout_us")

    def __init__(
        self,
        slab: OwnedSlab,
        first: int,
        rows_each: int,
        enqueue_ns: int,
        requests: int,
        attempt: int,
        priority: int,
        timeout_us: int,
    ) -> None:
        self.slab = slab
        self.first = first
        self.requests = requests
        self.rows_each = rows_each
        self.enqueue_ns = enqueue_ns
        self.attempt = attempt
        self.priority = priority
        self.timeout_us = timeout_us

    def without(self, first: int) -> list[_TurnRun]:
        """Return what is left without the request that begins at ``first``."""
        ahead = (first - self.first) // self.rows_each
        behind = self.requests - ahead - 1
        parts = ((self.first, ahead), (first + self.rows_each, behind))
        return [
            _TurnRun(
                self.slab, start, self.rows_each, self.enqueue_ns, requests, self.attempt, self.priority,
                self.timeout_us,
            )
            for start, requests in parts
            if requests
        ]  # fmt: skip

    def to_submit(self, route: int) -> RunSubmit:
        """Return the message for the scheduler."""
        return RunSubmit(
            route=route,
            base=self.slab.base,
            capacity=self.slab.capacity,
            first=self.first,
            requests=self.requests,
            rows_each=self.rows_each,
            enqueue_ns=self.enqueue_ns,
            attempt=self.attempt,
            priority=self.priority,
            timeout_us=self.timeout_us,
        )


class _Parcel:
    """A parcel in flight."""

    __slots__ = ("has_responses", "last_response_ns", "owner", "route", "submit")

    def __init__(self, route: RouteClient, submit: ParcelSubmit, owner: ParcelOwner) -> None:
        self.route = route
        self.submit = submit
        self.owner = owner
        #: The client has part of the answer: the request cannot be tried again.
        self.has_responses = False
        #: When the worker sent the last of them; kept for statistics of responses only.
        self.last_response_ns = 0


class RouteClient:
    """One loaded model version as this frontend uses it."""

    def __init__(self, engine: EngineClient, entry: ModelEntry) -> None:
        self.engine = engine
        self.entry = entry
        self.route = entry.route
        self.is_retired = False
        #: Says which requests are traced; None: none of them.
        self.sampler: Sampler | None = engine.sampler_of(entry.name)
        self.slabs: list[OwnedSlab] = []
        self.counters = engine.counters_block(entry.counter_offset)
        #: Latencies and responses one by one; None: nobody wants them.
        self.details: RouteDetails | None = engine.route_details(entry)
        # A frontend that used the block before us may have died with requests in flight.
        self.count_ensemble_use(0)
        #: Of an ensemble: what its steps took, laid out as an instance's block.
        self.step_counters = engine.step_counters_block(entry)
        #: What the requests of an ensemble share; made and used by ``ensemble/run.py``.
        self.ensemble: object = None
        #: Bytes copied in user space since the counters were last written.
        self.copied_in_bytes = 0
        self.copied_out_bytes = 0
        #: What goes out at the end of this turn, or is held until a granted worker is idle.
        self.turn: list[_TurnRun] = []
        self.turn_rows = 0
        self.is_holding = False
        self.is_flush_scheduled = False
        self.instance_count = entry.instance_count or len(entry.instance_counter_offsets)
        self.turn_parcels: list[ParcelSubmit] = []
        self.grants: list[Grant] = []
        #: Bytes of arena blocks that requests of this model have.
        self.block_bytes = 0
        #: Bytes that replies of unknown size are expected to take; learned from those that did not fit.
        self.reply_guess_bytes = 1024
        self._row_bytes = sum(tensor.row_bytes for tensor in (*entry.inputs, *entry.outputs)) if entry.is_fixed else 0
        #: True if requests may live in slab rows.
        self.uses_rows = entry.is_fixed and self._row_bytes <= SLAB_ROW_BYTES_MAX
        #: Holds answers back until it is their turn; None: nobody minds.
        self.order = AnswerOrder() if entry.preserve_ordering else None
        self._layouts: dict[int, SlabLayout] = {}
        self.input_indices = {tensor.name: index for index, tensor in enumerate(entry.inputs)}
        self.output_indices = {tensor.name: index for index, tensor in enumerate(entry.outputs)}
        self.output_specs = entry.outputs
        #: What every reply to a request in rows says.
        self.reply_parameters: dict[str, ParameterValue] = {}

    def update(self, entry: ModelEntry) -> None:
        """Take in what may change while a version is loaded: its instances and how it queues, not its tensors."""
        self.entry = entry
        self.instance_count = entry.instance_count or len(entry.instance_counter_offsets)

    # --- rows ---

    def loan(self, rows: int) -> tuple[OwnedSlab, int]:
        """Return a slab and the first of ``rows`` free consecutive rows in it.

        Raises:
            ArenaFull: the arena has no room for a larger slab.
        """
        if self.slabs:
            slab = self.slabs[-1]
            first = slab.loan(rows)
            if first >= 0:
                return slab, first
        return self._loan_from_new(rows)

    def _loan_from_new(self, rows: int) -> tuple[OwnedSlab, int]:
        for slab in self.slabs[:-1]:
            first = slab.loan(rows)
            if first >= 0:
                return slab, first
        if self.slabs:
            capacity = self.slabs[-1].capacity * 2
        else:
            fitting = SLAB_BYTES_FIRST // max(self._row_bytes, 1)
            wanted = max(SLAB_ROWS_MIN, 8 * self.entry.max_batch_size)
            capacity = max(min(wanted, fitting), 2 * max(self.entry.max_batch_size, 1))
        capacity = min(max(capacity, rows), SLAB_ROWS_MAX)
        layout = SlabLayout(self.entry.inputs, self.entry.outputs, capacity)
        slab = Slab[RowOwner](self.engine.allocate(layout.byte_size), layout)
        self.slabs.append(slab)
        self.engine.slabs[slab.base] = (self, slab)
        first = slab.loan(rows)
        if first < 0:
            raise ArenaFull("too many requests in flight for one model; send fewer at a time")
        return slab, first

    def publish(
        self, slab: OwnedSlab, first: int, rows: int, owner: RowOwner, priority: int = 0, timeout_us: int = 0
    ) -> None:
        """Hand filled rows over.

        They go out at the end of this event-loop turn, together with what else arrives in it; or at once, if nothing
        else is in flight and a granted worker is idle: a lone client's request has nothing to wait for, and one pass
        of the event loop is saved. With others in flight the turn is awaited: more of them make one batch.
        """
        slab.owners[first] = owner
        turn = self.turn
        if not self.engine.are_gauges_due:
            self.engine.want_gauges()
        if not turn:
            if self.grants and slab.live == rows and not self.turn_parcels and self._ring_now(slab, first, rows):
                return
            self.need_flush()
        else:
            last = turn[-1]
            if self.is_holding and self.turn_rows + rows > self.grants[0].rows_max:
                self.need_flush()
            if (
                last.slab is slab
                and last.rows_each == rows
                and last.first + last.requests * rows == first
                and last.priority == priority
                and last.timeout_us == timeout_us
            ):
                last.requests += 1
                self.turn_rows += rows
                return
        self.append_turn(_TurnRun(slab, first, rows, self.engine.turn_ns(), 1, 0, priority, timeout_us))

    def append_turn(self, run: _TurnRun) -> None:
        """Add to what goes out at the end of the turn."""
        if not self.turn:
            self.turn_rows = 0
        self.turn_rows += run.requests * run.rows_each
        self.turn.append(run)

    def need_flush(self) -> None:
        """Have the turn's requests sent at its end."""
        if not self.is_flush_scheduled:
            self.is_flush_scheduled = True
            self.engine.schedule_flush(self)

    def cancel_rows(self, slab: OwnedSlab, first: int) -> None:
        """Nobody waits any more for the request that begins at ``first``; its owner still hears once of its end."""
        if slab.owners[first] is None:
            return
        for place, run in enumerate(self.turn):
            end = run.first + run.requests * run.rows_each
            if run.slab is slab and run.first <= first < end:
                self.turn[place : place + 1] = run.without(first)
                self.turn_rows -= run.rows_each
                self.is_holding = self.is_holding and bool(self.turn)
                self.engine.fail_run(self, slab, first, run.rows_each, Cancelled("request was cancelled"))
                return
        self.engine.cancel_rows(self, slab, first)

    def _ring_now(self, slab: OwnedSlab, first: int, rows: int) -> bool:
        for grant in self.grants:
            if grant.is_idle and not grant.revoked:
                engine = self.engine
                grant.ring([Run(engine.producer, 1, slab.base, slab.capacity, first, rows, 0, time.monotonic_ns())])
                return True
        return False

    def input_slice(self, slab: OwnedSlab, first: int, rows: int, index: int) -> memoryview:
        """Return the bytes of input ``index`` of loaned rows: writable, ``rows * row_bytes``."""
        area = slab.layout.inputs[index]
        start = slab.base + area.offset + first * area.row_bytes
        return self.engine.view[start : start + rows * area.row_bytes]

    def output_slice(self, slab: OwnedSlab, first: int, rows: int, index: int) -> memoryview:
        """Return the bytes of output ``index``; valid until the rows are released."""
        area = slab.layout.outputs[index]
        start = slab.base + area.offset + first * area.row_bytes
        return self.engine.view[start : start + rows * area.row_bytes]

    # --- parcels ---

    def submit_parcel(self, submit: ParcelSubmit, owner: ParcelOwner) -> None:
        """Hand over a parcel whose tensors are filled in."""
        self.engine.parcels[submit.token] = _Parcel(self, submit, owner)
        if self.order is not None:
            self.order.expect(submit.token)
        self.need_flush()
        self.turn_parcels.append(submit)

    # --- end of a turn ---

    def flush_direct(self) -> bool:
        """Do without the scheduler if a grant allows it; False if this turn's requests must go to it.

        An idle granted worker is rung. If all instances are granted to us and busy, up to the granted number of rows
        waits here for the first to finish: the scheduler could do nothing else with them. More than that is the
        scheduler's to cut into batches.
        """
        grants = self.grants
        if not grants:
            return False
        if self.turn_parcels:
            return self._flush_parcel()
        single = len(self.turn) == 1 and self.turn[0].requests == 1
        if not single and self.turn_rows > grants[0].rows_max:
            return False
        for grant in grants:
            if grant.is_idle and not grant.revoked:
                grant.ring([self.engine.to_wire(run) for run in self.turn])
                self.turn.clear()
                return True
        if len(grants) < self.instance_count or any(grant.revoked for grant in grants):
            return False
        self.is_holding = True
        return True

    def _flush_parcel(self) -> bool:
        if self.turn or len(self.turn_parcels) != 1 or len(self.turn_parcels[0].head) > HEAD_BYTES_MAX:
            return False  # The scheduler refuses a head that no doorbell takes.
        for grant in self.grants:
            if grant.is_idle and not grant.revoked:
                grant.ring_parcel(self.turn_parcels.pop())
                return True
        return False

    def grant_finished(self) -> None:
        """A granted worker is idle, or a grant ended: what was held back can go."""
        if self.is_holding:
            self.is_holding = False
            if not self.flush_direct():
                self.need_flush()

    def count_ensemble_use(self, change: int) -> None:
        """Note that a run of an ensemble needs this model version (+1), or no longer (-1).

        The count outlives this object: a model that was away for a moment comes back as another, over the same words.
        """
        uses, offset = self.engine.ensemble_uses, self.entry.counter_offset
        self.counters[Count.ENSEMBLE_USES] = count = uses.get(offset, 0) + change
        if count:
            uses[offset] = count
        else:
            uses.pop(offset, None)

    def retire(self) -> None:
        """The model version is no longer routed to; give back slabs as they empty."""
        self.is_retired = True
        self.free_idle_slabs()

    def free_idle_slabs(self) -> None:
        """Free slabs that hold nothing: all of a retired route, all but the newest of a live one."""
        keep = [] if self.is_retired else self.slabs[-1:]
        for slab in list(self.slabs):
            if slab.live == 0 and slab not in keep:
                self.slabs.remove(slab)
                self.engine.slabs.pop(slab.base, None)
                self.engine.free(slab.base, slab.layout.byte_size)

    def write_counters(self) -> None:
        counters = self.counters
        if self.copied_in_bytes:
            counters[Count.COPIED_IN_BYTES] += self.copied_in_bytes
            self.copied_in_bytes = 0
        if self.copied_out_bytes:
            counters[Count.COPIED_OUT_BYTES] += self.copied_out_bytes
            self.copied_out_bytes = 0

    def write_gauges(self) -> bool:
        """Write how much memory requests use right now; return whether they use any."""
        counters = self.counters
        rows = sum(slab.live for slab in self.slabs)
        counters[Count.ROWS_IN_USE] = rows
        counters[Count.ROWS_CAPACITY] = sum(slab.capacity for slab in self.slabs)
        counters[Count.BLOCK_BYTES_IN_USE] = self.block_bytes
        return bool(rows or self.block_bytes)


def _answer_rows(slab: OwnedSlab, first: int, rows: int) -> None:
    """Call everybody who waits for one of these rows."""
    owners = slab.owners
    for row in range(first, first + rows):
        owner = owners[row]
        if owner is not None:
            owners[row] = None
            owner.rows_done(slab, row)


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
        self.parcels: dict[int, _Parcel] = {}
        self.routes: dict[int, RouteClient] = {}
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
        self._is_flush_due = False
        self._turn_ns = 0
        #: What clients have left since the end of the last turn.
        self._cancelled_tokens: list[int] = []
        #: By route and slab: first row and owner of each request.
        self._cancelled_rows: dict[tuple[int, int], list[tuple[int, RowOwner | None]]] = {}
        #: By instance: the last batch of ours that it answered.
        self._answered_batches: dict[int, int] = {}
        #: Of the answer that is being given, if it was held back.
        self._held_times: Times | None = None
        #: Answers of models that have them kept; None: the server has no response cache.
        self.response_cache: ResponseCache | None = None
        #: The gauges of memory in use will be written in a moment.
        self.are_gauges_due = False
        self._bells: dict[int, Bell] = {}
        self._grants: dict[int, Grant] = {}
        self._buffer = bytearray(MESSAGE_BYTES_MAX)
        self._buffer_view = memoryview(self._buffer)
        self._decode_reply = msgspec.msgpack.Decoder(ReplyHead).decode
        self._encode_head = msgspec.msgpack.Encoder().encode
        #: Runs of ensembles that need a model version, by the offset of its counters; none: 0.
        self.ensemble_uses: dict[int, int] = {}
        self._no_counters = memoryview(bytearray(PRODUCER_WORDS * 8)).cast("Q")
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
        """Have something done at the end of this event-loop turn."""
        self._loop.call_soon(callback)

    def encode_head(self, head: ParcelHead) -> bytes:
        return self._encode_head(head)

    # --- gauges ---

    def want_gauges(self) -> None:
        """Memory is being used: write the gauges in a moment, and until all of it is free again."""
        if not self.are_gauges_due:
            self.are_gauges_due = True
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
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)
        self._dirty.append(route)

    def _schedule_cancel(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def to_wire(self, run: _TurnRun) -> Run:
        return Run(
            self.producer, run.requests, run.slab.base, run.slab.capacity, run.first, run.requests * run.rows_each,
            run.attempt, run.requests * run.enqueue_ns,
        )  # fmt: skip

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        self._is_flush_due = False
        self._turn_ns = 0
        runs: list[RunSubmit] = []
        parcels: list[ParcelSubmit] = []
        for route in dirty:
            route.is_flush_scheduled = False
            if (route.turn or route.turn_parcels) and not route.flush_direct():
                route.is_holding = False
                runs.extend(run.to_submit(route.route) for run in route.turn)
                parcels.extend(route.turn_parcels)
                route.turn.clear()
                route.turn_parcels.clear()
            route.write_counters()
        if runs or parcels:
            message = Submit(producer=self.producer, epoch=self._epoch, runs=tuple(runs), parcels=tuple(parcels))
            if not self._submit.send_nowait(message):
                self._refuse_unsent(runs, parcels)
        if self._cancelled_tokens or self._cancelled_rows:
            self._send_cancels()

    def _send_cancels(self) -> None:
        # Behind the submissions of the same turn, so that the scheduler knows what is meant.
        tokens, self._cancelled_tokens = tuple(self._cancelled_tokens), []
        rows: list[RowsCancel] = []
        for (route, base), requests in self._cancelled_rows.items():
            found = self.slabs.get(base)
            # One that ended in this very turn is not meant: its rows may be another's by now.
            firsts = () if found is None else tuple(f for f, owner in requests if found[1].owners[f] is owner)
            if firsts:
                rows.append(RowsCancel(route=route, base=base, firsts=firsts))
        self._cancelled_rows.clear()
        if tokens or rows:
            self._submit.send_nowait(Cancel(producer=self.producer, tokens=tokens, rows=tuple(rows)))

    def _refuse_unsent(self, runs: list[RunSubmit], parcels: list[ParcelSubmit]) -> None:
        error = Unavailable("the scheduler does not keep up; try again later")
        for run in runs:
            route, slab = self.slabs[run.base]
            self.fail_run(route, slab, run.first, run.requests * run.rows_each, error, requests=run.requests)
        for parcel in parcels:
            self._fail_parcel(parcel.token, error)

    # --- completions ---

    def _on_completion(self) -> None:
        # Every parcel has a message of its own: several are read in one turn, so that what follows from them (the next
        # steps of ensembles) goes out together.
        for _ in range(_REPLIES_PER_TURN):
            try:
                size = self._completions.recv_into(self._buffer)
            except BlockingIOError:
                return
            if size < HEADER.size:
                return
            if self._completed(self._buffer_view[:size]) != Kind.PARCEL_REPLY:
                return

    def _completed(self, message: memoryview) -> int:
        """Handle one message; return its kind."""
        kind, flags, count, instance, batch = HEADER.unpack_from(message)
        if kind == Kind.RUNS_DONE:
            self._answered_batches[instance] = batch
            self._runs_done(message, count, instance)
        elif kind == Kind.PARCEL_REPLY:
            self._parcel_reply(message, flags, instance)
        elif kind == Kind.RUNS_FAILED:
            if instance:
                self._answered_batches[instance] = batch
            self._runs_failed(message, count, instance)
        elif kind == Kind.GRANT:
            self._granted(message)
        elif kind == Kind.REVOKE:
            self._revoked(message, flags)
        elif kind == Kind.RUNS_LOST:
            # A worker may die when it has answered us and not yet told the scheduler: the rows may be others' by now.
            if self._answered_batches.get(instance) != batch:
                for run in unpack_runs(message, count, _TIMES_END):
                    self._run_lost(run, is_hung=bool(flags & FLAG_HUNG))
        elif kind == Kind.PARCEL_LOST:
            for index in range(count):
                (token,) = TOKEN.unpack_from(message, _TIMES_END + index * TOKEN.size)
                self._parcel_lost(token, is_hung=bool(flags & FLAG_HUNG))
        elif kind == Kind.RESYNC:
            end = HEADER.size + count * TOKEN.size
            self._resync(batch, {token for (token,) in TOKEN.iter_unpack(message[HEADER.size : end])})
        return int(kind)

    def _runs_done(self, message: memoryview, count: int, instance: int) -> None:
        now_ns = time.monotonic_ns()
        slabs = self.slabs
        for index in range(count):
            _producer, requests, base, _capacity, first, rows, _attempt, enqueue_sum_ns = RUN.unpack_from(
                message, _TIMES_END + index * RUN.size
            )
            found = slabs.get(base)
            if found is None:
                continue
            route, slab = found
            _answer_rows(slab, first, rows)
            slab.release(first, rows)
            count_answered(route.counters, requests, requests * now_ns - enqueue_sum_ns)
            if route.details is not None:
                enqueue_ns = enqueue_sum_ns // requests
                route.details.answered(requests, now_ns - enqueue_ns, enqueue_ns, self.reply_times())
            route.write_counters()
            if route.is_retired or len(route.slabs) > 1:
                route.free_idle_slabs()
        if self._grants:
            self._grant_idle(instance)

    def _runs_failed(self, message: memoryview, count: int, instance: int) -> None:
        now_ns = time.monotonic_ns()
        end = _TIMES_END + count * RUN.size
        error = from_wire(message[end], bytes(message[end + 1 :]).decode(errors="replace"))
        for run in unpack_runs(message, count, _TIMES_END):
            found = self.slabs.get(run.base)
            if found is None:
                continue
            route, slab = found
            elapsed_ns = max(run.requests * now_ns - run.enqueue_sum_ns, 0)
            count_failure(route.counters, error, run.requests, elapsed_ns, ran=instance != 0)
            self._fail_rows(slab, run.first, run.rows, error, ran=instance != 0)
        if instance:
            self._grant_idle(instance)

    def fail_run(
        self, route: RouteClient, slab: OwnedSlab, first: int, rows: int, error: ServingError, *, requests: int = 1
    ) -> None:
        """Answer requests in rows that never reached the scheduler."""
        count_failure(route.counters, error, requests, 0, ran=False)
        self._fail_rows(slab, first, rows, error, ran=False)

    def _fail_rows(self, slab: OwnedSlab, first: int, rows: int, error: ServingError, *, ran: bool) -> None:
        for row in range(first, first + rows):
            owner = slab.owners[row]
            if owner is not None:
                slab.owners[row] = None
                owner.rows_failed(slab, row, error, ran=ran)
        slab.release(first, rows)

    def _run_lost(self, run: Run, *, is_hung: bool) -> None:
        found = self.slabs.get(run.base)
        if found is None or run.first + run.rows > found[1].capacity:
            return
        route, slab = found
        if all(slab.owners[row] is None for row in range(run.first, run.first + run.rows)):
            return
        if is_hung or run.attempt >= ATTEMPTS_MAX or route.is_retired:
            error = _gave_up(route.entry.name, is_hung=is_hung)
            count_failure(route.counters, error, run.requests, 0, ran=True)
            self._fail_rows(slab, run.first, run.rows, error, ran=True)
            return
        enqueue_ns = run.enqueue_sum_ns // max(run.requests, 1)
        self._resubmit_rows(route, slab, range(run.first, run.first + run.rows), enqueue_ns, run.attempt + 1)

    def _resubmit_rows(
        self,
        route: RouteClient,
        slab: OwnedSlab,
        rows: range,
        enqueue_ns: int,
        attempt: int,
        skip: frozenset[int] = frozenset(),
    ) -> None:
        """Hand in again every request that starts in ``rows`` and still has an owner, each for itself."""
        for row in rows:
            owner = slab.owners[row]
            if owner is None or row in skip:
                continue
            # Models with priorities get parcels, which keep theirs.
            route.append_turn(_TurnRun(slab, row, owner.rows, enqueue_ns, 1, attempt, 0, 0))
            route.need_flush()
            route.counters[Count.RESUBMITTED] += 1

    # --- parcels ---

    def reply_times(self) -> Times:
        """Return the times of the execution whose completion is being handled; zero if it did not run."""
        if self._held_times is not None:
            return self._held_times
        return Times._make(TIMES.unpack_from(self._buffer, HEADER.size))

    def _parcel_reply(self, message: memoryview, flags: int, instance: int) -> None:
        (token,) = TOKEN.unpack_from(message, _TIMES_END)
        parcel = self.parcels.get(token)
        final = bool(flags & FLAG_FINAL)
        if parcel is not None:
            try:
                reply = self._decode_reply(message[_TIMES_END + TOKEN.size :])
                for place in reply.outputs:
                    self.arena.check(place.offset, place.byte_size)
            except (msgspec.DecodeError, msgspec.ValidationError, Internal):
                reply = ReplyHead(code=int(Code.INTERNAL), text="the model's answer could not be read")
                final = True
            if reply.needs_bytes:
                self._lend(parcel, token, reply.needs_bytes, instance)
            else:
                if parcel.route.details is not None and instance:
                    times = self.reply_times()
                    submit = parcel.submit
                    parcel.route.details.responded(reply, times, parcel.last_response_ns, submit.enqueue_ns)
                    parcel.last_response_ns = times.end_ns
                parcel.has_responses = True
                if final:
                    del self.parcels[token]
                self._answer_parcel(parcel, reply, final=final, ran=instance != 0)
        grant = self._grants.get(instance)
        if grant is not None and final and token in grant.tokens:
            grant.tokens.remove(token)
            self._grant_idle(instance)

    def _answer_parcel(self, parcel: _Parcel, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        order = parcel.route.order
        if order is None:
            self._give_answer(parcel, reply, final=final, ran=ran)
            return
        times = self.reply_times()

        def give() -> None:
            self._held_times = times
            try:
                self._give_answer(parcel, reply, final=final, ran=ran)
            finally:
                self._held_times = None

        order.answer(parcel.submit.token, give, final=final)

    def _give_answer(self, parcel: _Parcel, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        if final:
            self._count_parcel(parcel, reply, ran=ran)
        parcel.owner.parcel_reply(reply, final=final, ran=ran)
        parcel.route.write_counters()

    def _count_parcel(self, parcel: _Parcel, reply: ReplyHead, *, ran: bool) -> None:
        counters = parcel.route.counters
        elapsed_ns = time.monotonic_ns() - parcel.submit.enqueue_ns
        if reply.text:
            count_failure(counters, from_wire(reply.code, reply.text), 1, elapsed_ns, ran=ran)
            return
        count_answered(counters, 1, elapsed_ns)
        details = parcel.route.details
        if details is not None:
            details.answered(1, elapsed_ns, parcel.submit.enqueue_ns, self.reply_times() if ran else None)

    def _lend(self, parcel: _Parcel, token: int, byte_size: int, instance: int) -> None:
        bell = self._bells.get(instance)
        try:
            if bell is None:
                raise WorkerDied("the model instance is gone")
            offset = parcel.owner.lend(byte_size)
        except ServingError as error:
            self._fail_parcel(token, error)
            self.cancel(token)
            return
        bell.ring(HEADER.pack(Kind.COLLECT, 0, 1, self.producer, 0) + GROW.pack(token, offset, byte_size))

    def _fail_parcel(self, token: int, error: ServingError) -> None:
        parcel = self.parcels.pop(token, None)
        if parcel is not None:
            reply = ReplyHead(code=int(error.code), text=error.text)
            self._answer_parcel(parcel, reply, final=True, ran=isinstance(error, BackendFailed | WorkerDied))

    def _parcel_lost(self, token: int, *, is_hung: bool) -> None:
        parcel = self.parcels.get(token)
        if parcel is None:
            return
        submit = parcel.submit
        if parcel.has_responses and not is_hung:
            self._fail_parcel(
                token,
                WorkerDied(
                    f"an instance of model '{parcel.route.entry.name}' ended unexpectedly before its last response"
                ),
            )
            return
        if is_hung or submit.attempt >= ATTEMPTS_MAX or parcel.route.is_retired:
            self._fail_parcel(token, _gave_up(parcel.route.entry.name, is_hung=is_hung))
            return
        parcel.route.counters[Count.RESUBMITTED] += 1
        again = msgspec.structs.replace(submit, attempt=submit.attempt + 1)
        parcel.route.submit_parcel(again, parcel.owner)

    def cancel(self, token: int) -> None:
        """Tell the engine that nobody waits for the parcel; its owner is still called back once, with the last word."""
        self._cancelled_tokens.append(token)
        self._schedule_cancel()

    def cancel_rows(self, route: RouteClient, slab: OwnedSlab, first: int) -> None:
        """Tell the scheduler that nobody waits for a request in rows; see :meth:`RouteClient.cancel_rows`."""
        self._cancelled_rows.setdefault((route.route, slab.base), []).append((first, slab.owners[first]))
        self._schedule_cancel()

    # --- grants ---

    def add_doorbell(self, instance: int, sock: socket.socket) -> None:
        """A worker that may be granted, and that is told where larger reply blocks are."""
        self._bells[instance] = Bell(sock)

    def remove_doorbell(self, instance: int) -> None:
        bell = self._bells.pop(instance, None)
        if bell is not None and instance not in self._grants:
            bell.close()

    def _granted(self, message: memoryview) -> None:
        route_id, instance, generation, rows_max = GRANT.unpack_from(message, HEADER.size)
        route = self.routes.get(route_id)
        bell = self._bells.get(instance)
        if route is None or bell is None:
            self._submit.send_nowait(GrantReturned(producer=self.producer, instance=instance, generation=generation))
            return
        grant = Grant(route, instance, generation, rows_max, bell)
        self._grants[instance] = grant
        route.grants.append(grant)

    def _revoked(self, message: memoryview, flags: int) -> None:
        _route, instance, generation, _rows = GRANT.unpack_from(message, HEADER.size)
        grant = self._grants.get(instance)
        if flags & FLAG_GONE:
            self._answered_batches.pop(instance, None)
        elif grant is not None and grant.generation != generation:
            return
        if grant is None:
            return
        grant.revoked = True
        if flags & FLAG_GONE:
            lost_runs, lost_tokens = grant.outstanding, grant.tokens
            grant.outstanding, grant.tokens = [], []
            self._drop_grant(grant)
            for run in lost_runs:
                self._run_lost(run, is_hung=bool(flags & FLAG_HUNG))
            for token in lost_tokens:
                self._parcel_lost(token, is_hung=bool(flags & FLAG_HUNG))
        elif grant.is_idle:
            self._return_grant(grant)

    def _grant_idle(self, instance: int) -> None:
        grant = self._grants.get(instance)
        if grant is not None:
            grant.outstanding = []
            if grant.revoked and grant.is_idle:
                self._return_grant(grant)
            elif grant.route.is_holding:
                grant.route.grant_finished()

    def _return_grant(self, grant: Grant) -> None:
        self._drop_grant(grant)
        self._submit.send_nowait(
            GrantReturned(
                producer=self.producer, instance=grant.instance, generation=grant.generation, batches=grant.batches
            )
        )

    def _drop_grant(self, grant: Grant) -> None:
        self._grants.pop(grant.instance, None)
        if self._bells.get(grant.instance) is not grant.bell:
            grant.bell.close()  # Its instance went while it was granted.
        if grant in grant.route.grants:
            grant.route.grants.remove(grant)
        grant.route.grant_finished()

    # --- restart of the scheduler ---

    def _resync(self, epoch: int, running: set[int]) -> None:
        """A new scheduler is up and every worker has finished what the old one sent: hand in again what is left.

        Args:
            running: parcels that workers have run and not answered for good, which is no loss.
        """
        if epoch == self._epoch:
            return  # Started, or told, in the meantime: nothing of ours went to an earlier one.
        self._epoch = epoch
        # What was rung under a grant runs or has run; what was not yet sent goes out with this turn.
        exempt_rows: set[tuple[int, int]] = set()
        exempt_tokens = running
        for grant in self._grants.values():
            for granted in grant.outstanding:
                exempt_rows.update((granted.base, row) for row in range(granted.first, granted.first + granted.rows))
            exempt_tokens.update(grant.tokens)
            grant.route.grants.clear()
            # The new scheduler knows of no grants. Those whose worker runs are kept to hear of its end, or its death.
            grant.revoked = True
        for grant in [grant for grant in self._grants.values() if grant.is_idle]:
            self._drop_grant(grant)
        for route in self.routes.values():
            route.grant_finished()
            for run in route.turn:
                rows = run.requests * run.rows_each
                exempt_rows.update((run.slab.base, row) for row in range(run.first, run.first + rows))
            exempt_tokens.update(submit.token for submit in route.turn_parcels)
        now_ns = time.monotonic_ns()
        for base, (route, slab) in list(self.slabs.items()):
            skip = frozenset(row for exempt_base, row in exempt_rows if exempt_base == base)
            self._resubmit_rows(route, slab, range(slab.capacity), now_ns, 0, skip)
        for token, parcel in list(self.parcels.items()):
            if token in exempt_tokens:
                continue
            if parcel.has_responses:
                self._parcel_lost(token, is_hung=False)
            else:
                parcel.route.submit_parcel(parcel.submit, parcel.owner)

    def close(self) -> None:
        for bell in (*self._bells.values(), *(grant.bell for grant in self._grants.values())):
            bell.close()
        self._loop.remove_reader(self._completions.fileno())
        self._submit.close()


def _no_sampler(_model: str) -> None:
    """Tracing is off."""


def _gave_up(model: str, *, is_hung: bool) -> WorkerDied:
    """Return why a request whose worker was lost is not tried again."""
    if is_hung:
        return WorkerDied(
            f"the request ran longer than model '{model}' may (--worker-timeout-secs, or its parameter "
            "worker_timeout_secs) and was ended"
        )
    return WorkerDied(
        f"an instance of model '{model}' ended unexpectedly while it ran the request, and so did the one that tried it "
        "again"
    )
