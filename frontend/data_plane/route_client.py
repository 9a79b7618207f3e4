"""One loaded model version as a frontend uses it: its slabs, what this turn sends, the instances granted to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from forebay.frontend.answer_order import AnswerOrder
from forebay.frontend.data_plane.core_sharing import Pace
from forebay.frontend.data_plane.grants import Grant
from forebay.frontend.data_plane.owners import OwnedSlab, ParcelOwner, RowOwner
from forebay.frontend.data_plane.slab_set import SlabSet
from forebay.frontend.data_plane.turn_run import TurnRun
from forebay.frontend.route_details import RouteDetails
from forebay.frontend.tracing import Sampler
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import ProducerCounter as Count
from forebay.ipc.ensemble.output_sizes import OutputSizes
from forebay.ipc.errors import Cancelled
from forebay.ipc.messages import ParameterValue, ParcelSubmit
from forebay.ipc.slabs import Slab, SlabLayout
from forebay.ipc.wire import HEAD_BYTES_MAX, Run

if TYPE_CHECKING:
    from forebay.frontend.engine_client import EngineClient

#: A request whose tensors take more bytes per row than this lives in blocks of its own: slabs keep room for batches.
SLAB_ROW_BYTES_MAX = 1024 * 1024

#: Deadlines of requests in rows are rounded up to multiples of this, so that those of one turn make one run, ns.
_DEADLINE_GRID_NS = 500_000


class RouteClient:
    """One loaded model version as this frontend uses it."""

    def __init__(self, engine: EngineClient, entry: ModelEntry) -> None:
        self.engine = engine
        self.entry = entry
        self.route = entry.route
        self.is_retired = False
        #: Says which requests are traced; None: none of them.
        self.sampler: Sampler | None = engine.sampler_of(entry.name)
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
        self.turn: list[TurnRun] = []
        self.turn_rows = 0
        self.is_holding = False
        self.is_flush_scheduled = False
        self.instance_count = entry.instance_count or len(entry.instance_counter_offsets)
        self.turn_parcels: list[ParcelSubmit] = []
        self.grants: list[Grant] = []
        self.pace = Pace()
        #: Bytes of arena blocks that requests of this model have.
        self.block_bytes = 0
        #: Bytes that replies of unknown size are expected to take; learned from those that did not fit.
        self.reply_guess_bytes = 1024
        #: Of outputs that stay on its GPU.
        self.output_sizes = OutputSizes()
        row_bytes = sum(tensor.row_bytes for tensor in (*entry.inputs, *entry.outputs)) if entry.is_fixed else 0
        #: Whom requests go to first, which is another for ensembles.
        self.first_model = self
        #: True if requests may live in slab rows; see :meth:`takes_rows`.
        self.uses_rows = entry.is_fixed and row_bytes <= SLAB_ROW_BYTES_MAX
        #: Holds answers back until it is their turn; None: nobody minds.
        self.order = AnswerOrder() if entry.preserve_ordering else None
        self._slab_set = SlabSet(row_bytes, entry.max_batch_size, self._make_slab, self._free_slab)
        #: The same list; read for every request.
        self.slabs = self._slab_set.slabs
        #: Those that were replaced and still have requests in them.
        self._leaving: list[SlabSet] = []
        self.input_indices = {tensor.name: index for index, tensor in enumerate(entry.inputs)}
        self.output_indices = {tensor.name: index for index, tensor in enumerate(entry.outputs)}
        self.output_specs = entry.outputs
        #: What every reply to a request in rows says.
        self.reply_parameters: dict[str, ParameterValue] = {}
        self.write_gauges()

    def update(self, entry: ModelEntry) -> None:
        """Take in what may change while a version is loaded: its instances and how it queues, not its tensors."""
        self.entry = entry
        self.instance_count = entry.instance_count or len(entry.instance_counter_offsets)

    # --- rows ---

    @property
    def sees_requests(self) -> bool:
        """Whether the model looks at what a request carries besides tensors."""
        return self.entry.sees_requests

    def takes_rows(self, *, is_bare: bool) -> bool:
        """Tell whether a request lives in slab rows.

        Args:
            is_bare: it carries nothing but tensors.
        """
        return self.uses_rows and (not self.entry.sees_requests or (is_bare and self.sampler is None))

    def loan(self, rows: int) -> tuple[OwnedSlab, int]:
        """Return a slab and the first of ``rows`` free consecutive rows in it.

        Raises:
            ArenaFull: the arena has no room for a larger slab.
        """
        slabs = self.slabs
        if slabs:
            slab = slabs[-1]
            first = slab.loan(rows)
            if first >= 0:
                return slab, first
        return self._slab_set.loan(rows)

    def release(self, slab: OwnedSlab, first: int, rows: int) -> None:
        """Give rows back: those of requests that have ended, or that were never published."""
        slab.release(first, rows)
        if self.is_retired or self._leaving or len(self.slabs) > 1:
            self._free_idle()

    def _free_idle(self) -> None:
        self._slab_set.free_idle()
        for leaving in self._leaving:
            leaving.free_idle()
        self._leaving = [leaving for leaving in self._leaving if leaving.slabs]

    def _make_slab(self, capacity: int) -> OwnedSlab:
        layout = SlabLayout(self.entry.inputs, self.entry.outputs, capacity)
        slab = Slab[RowOwner](self.engine.allocate(layout.byte_size), layout)
        self.engine.slabs[slab.base] = (self, slab)
        return slab

    def _free_slab(self, slab: OwnedSlab) -> None:
        self.engine.slabs.pop(slab.base, None)
        self.engine.free(slab.base, slab.layout.byte_size)

    def use_slabs(self, slab_set: SlabSet) -> None:
        """Have rows from these slabs from now on; the others go as they empty."""
        self._slab_set.retire()
        if self.slabs:
            self._leaving.append(self._slab_set)
        self._slab_set = slab_set
        self.slabs = slab_set.slabs

    def publish(
        self, slab: OwnedSlab, first: int, rows: int, owner: RowOwner,
        priority: int = 0, timeout_us: int = 0, deadline_ns: int = 0,
    ) -> None:  # fmt: skip
        """Hand filled rows over.

        They go out at the end of this event-loop turn, together with what else arrives in it; or at once, if nothing
        else is in flight and a granted worker is idle: a lone client's request has nothing to wait for, and one pass
        of the event loop is saved. With others in flight the turn is awaited: more of them make one batch.
        """
        slab.owners[first] = owner
        if deadline_ns:
            deadline_ns = self._told_deadline_ns(deadline_ns)
        turn = self.turn
        if not self.engine.are_gauges_due:
            self.engine.want_gauges()
        if not turn:
            if self.grants and slab.lender.live == rows and not self.turn_parcels and self._ring_now(slab, first, rows):
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
                and last.deadline_ns == deadline_ns
            ):
                last.requests += 1
                self.turn_rows += rows
                return
        self.append_turn(TurnRun(slab, first, rows, self.engine.turn_ns(), 1, 0, priority, timeout_us, deadline_ns))

    def _told_deadline_ns(self, deadline_ns: int) -> int:
        """Return the deadline that the scheduler is told of; 0: none.

        Whoever waits for rows takes them back at the deadline. The scheduler needs it where batches are formed for a
        latency objective, and only if it comes first: a run is of requests with one deadline, so they are rounded too.
        """
        objective_us = self.entry.objective_us
        if not objective_us or deadline_ns - self.engine.turn_ns() >= objective_us * 1000:
            return 0
        return deadline_ns + -deadline_ns % _DEADLINE_GRID_NS

    def append_turn(self, run: TurnRun) -> None:
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

    def cancel_rows(self, slab: OwnedSlab, first: int, owner: RowOwner) -> None:
        """Nobody waits any more for the request of ``owner`` at ``first``; the owner still hears once of its end."""
        if slab.owners[first] is not owner:
            return
        for place, run in enumerate(self.turn):
            end = run.first + run.requests * run.rows_each
            if run.slab is slab and run.first <= first < end:
                self.turn[place : place + 1] = run.without(first)
                self.turn_rows -= run.rows_each
                self.is_holding = self.is_holding and bool(self.turn)
                self.engine.rows.fail(self, slab, first, run.rows_each, Cancelled("request was cancelled"))
                return
        self.engine.cancel_rows(self.route, slab, first)

    def _ring_now(self, slab: OwnedSlab, first: int, rows: int) -> bool:
        grant = self._idle_grant()
        if grant is None:
            return False
        grant.ring_one(Run(self.engine.producer, 1, slab.base, slab.capacity, first, rows, 0, time.monotonic_ns()))
        return True

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
        self.engine.parcels.expect(self, submit, owner)
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
            return self._flush_parcels()
        single = len(self.turn) == 1 and self.turn[0].requests == 1
        if not single and self.turn_rows > grants[0].rows_max:
            return False
        grant = self._idle_grant()
        if grant is not None:
            grant.ring([run.to_wire(self.engine.producer) for run in self.turn])
            self.turn.clear()
            return True
        return self._hold()

    def _idle_grant(self) -> Grant | None:
        for grant in self.grants:
            if not grant.outstanding and not grant.tokens and not grant.revoked:
                return grant
        return None

    def _hold(self) -> bool:
        """Let what this turn has wait for a granted worker; False if it is not all of them that are granted."""
        if len(self.grants) < self.instance_count or any(grant.revoked for grant in self.grants):
            return False
        self.is_holding = True
        return True

    def _flush_parcels(self) -> bool:
        """As :meth:`flush_direct`, for parcels."""
        parcels = self.turn_parcels
        if self.turn or not self._make_one_batch(parcels):
            return False
        grant = self._idle_grant()
        if grant is not None:
            grant.ring_parcels(parcels)
            parcels.clear()
            return True
        # A model that sees requests may answer long after its execution: others need not wait for that.
        return not self.entry.sees_requests and not self.entry.decoupled and self._hold()

    def _make_one_batch(self, parcels: Sequence[ParcelSubmit]) -> bool:
        """Tell whether the scheduler would surely make one batch of these."""
        head_bytes = sum(len(parcel.head) for parcel in parcels)
        if head_bytes > HEAD_BYTES_MAX:
            return False  # The scheduler refuses a head that no doorbell takes.
        if len(parcels) == 1:
            return True
        shape_key = parcels[0].shape_key
        if any(parcel.shape_key != shape_key or parcel.attempt or parcel.deadline_ns for parcel in parcels):
            return False
        return sum(parcel.rows for parcel in parcels) <= self.grants[0].rows_max

    def withdraw_parcel(self, parcel: ParcelSubmit) -> bool:
        """Take back a parcel that is held here; False: it is with the scheduler or a worker."""
        if not self.is_holding or parcel not in self.turn_parcels:
            return False
        self.turn_parcels.remove(parcel)
        self.is_holding = bool(self.turn or self.turn_parcels)
        return True

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
        self.engine.forget_crowd(self)
        self._slab_set.retire()

    def write_counters(self) -> None:
        counters = self.counters
        if self.copied_in_bytes:
            counters[Count.COPIED_IN_BYTES] += self.copied_in_bytes
            self.copied_in_bytes = 0
        if self.copied_out_bytes:
            counters[Count.COPIED_OUT_BYTES] += self.copied_out_bytes
            self.copied_out_bytes = 0

    def write_gauges(self) -> bool:
        """Write how much memory requests use right now, and how many are held back; return whether they use any."""
        counters = self.counters
        rows = sum(slab.live for slab in self.slabs)
        counters[Count.ROWS_IN_USE] = rows
        counters[Count.ROWS_CAPACITY] = sum(slab.capacity for slab in self.slabs)
        counters[Count.BLOCK_BYTES_IN_USE] = self.block_bytes
        held = sum(run.requests for run in self.turn) + len(self.turn_parcels) if self.is_holding else 0
        counters[Count.REQUESTS_HELD] = held
        return bool(rows or self.block_bytes)
