"""The instances that the scheduler has granted to this frontend, which rings their workers itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from forebay.ipc.channel import SubmitSender
from forebay.ipc.counters import ProducerCounter as Count
from forebay.ipc.doorbell import RETRY_S, Bell, LoopBell
from forebay.ipc.messages import GrantReturned, ParcelSubmit, RowsCancel
from forebay.ipc.wire import (
    FLAG_GONE,
    FLAG_GRANTED,
    FLAG_HUNG,
    GRANT,
    GRANTED_BATCH,
    HEADER,
    ONE_RUN,
    PARCEL,
    TOKEN,
    Kind,
    Run,
    pack_rows_cancel,
    pack_runs,
)

if TYPE_CHECKING:
    from forebay.frontend.data_plane.route_client import RouteClient


_T = TypeVar("_T", contravariant=True)

# Plain integers: looking up a member of an enum costs as much as what is done with it.
_RUNS, _GRANTED_BATCHES = int(Kind.RUNS), int(Count.GRANTED_BATCHES)


class Lost(Protocol[_T]):
    """Told of something whose worker is gone."""

    def __call__(self, what: _T, /, *, is_hung: bool) -> None: ...


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
        self.route.engine.cores.begun(self, sum([run.requests for run in runs]))
        batch = GRANTED_BATCH | self.batches
        self.bell.ring(pack_runs(Kind.RUNS, FLAG_GRANTED, self.route.engine.producer, batch, runs))
        self.route.counters[Count.GRANTED_BATCHES] += 1

    def ring_one(self, run: Run) -> None:
        """As :meth:`ring`, for the one request that a lone client has in flight."""
        route = self.route
        engine = route.engine
        self.outstanding = [run]
        self.batches += 1
        engine.cores.begun(self, 1)
        self.bell.ring(ONE_RUN.pack(_RUNS, FLAG_GRANTED, 1, engine.producer, GRANTED_BATCH | self.batches, *run))
        route.counters[_GRANTED_BATCHES] += 1

    def ring_parcels(self, parcels: Sequence[ParcelSubmit]) -> None:
        """Have the idle worker run these parcels as one batch; as :meth:`ring` if it is gone."""
        producer = self.route.engine.producer
        self.tokens = [parcel.token for parcel in parcels]
        self.batches += 1
        self.route.engine.cores.begun(self, len(parcels))
        pieces = [HEADER.pack(Kind.PARCELS, FLAG_GRANTED, len(parcels), producer, GRANTED_BATCH | self.batches)]
        for parcel in parcels:
            head = parcel.head
            pieces.append(PARCEL.pack(producer, max(parcel.rows, 1), parcel.token, parcel.enqueue_ns, len(head)))
            pieces.append(head)
        self.bell.ring(b"".join(pieces))
        self.route.counters[Count.GRANTED_BATCHES] += 1

    def cancel(self, rows: RowsCancel) -> None:
        """Tell the worker whose clients left, of what it runs now."""
        running = [
            first
            for run in self.outstanding
            if run.base == rows.base
            for first in rows.firsts
            if run.first <= first < run.first + run.rows
        ]
        if running:
            producer = self.route.engine.producer
            self.bell.ring(pack_rows_cancel(GRANTED_BATCH | self.batches, producer, rows.base, running))


class Grants:
    """All grants of this frontend, and the doorbells of the workers that it may ring."""

    def __init__(
        self,
        producer: int,
        submit: SubmitSender,
        *,
        route_of: Callable[[int], RouteClient | None],
        run_lost: Lost[Run],
        parcel_lost: Lost[int],
    ) -> None:
        """Begin without any.

        Args:
            submit: where grants are returned.
            route_of: by its number.
            run_lost: told of rows.
            parcel_lost: told of a parcel's token.
        """
        self._producer = producer
        self._submit = submit
        self._route_of = route_of
        self._run_lost = run_lost
        self._parcel_lost = parcel_lost
        self._bells: dict[int, Bell] = {}
        self._by_instance: dict[int, Grant] = {}

    def __iter__(self) -> Iterator[Grant]:
        return iter(tuple(self._by_instance.values()))

    # --- doorbells ---

    def add_doorbell(self, instance: int, sock: socket.socket) -> None:
        """A worker that may be granted, and that is told where larger reply blocks are."""
        self._bells[instance] = LoopBell(sock)

    def remove_doorbell(self, instance: int) -> None:
        bell = self._bells.pop(instance, None)
        if bell is not None and instance not in self._by_instance:
            bell.close()

    def bell_of(self, instance: int) -> Bell | None:
        """Return a worker's doorbell; None: its instance is gone."""
        return self._bells.get(instance)

    def close(self) -> None:
        for bell in (*self._bells.values(), *(grant.bell for grant in self)):
            bell.close()

    def cancel_rows(self, cancelled: Sequence[RowsCancel]) -> None:
        """Let models hear that nobody waits any more for these of the rows that they were rung for."""
        for grant in self:
            if grant.route.entry.sees_requests:
                for rows in cancelled:
                    grant.cancel(rows)

    def cancel_parcels(self, tokens: Sequence[int]) -> None:
        """The same for parcels."""
        for grant in self:
            running = [token for token in tokens if token in grant.tokens]
            if running:
                packed = b"".join(TOKEN.pack(token) for token in running)
                grant.bell.ring(HEADER.pack(Kind.CANCEL, 0, len(running), self._producer, 0) + packed)

    # --- what the scheduler says ---

    def give(self, message: memoryview) -> None:
        """Take in a GRANT message."""
        route_id, instance, generation, rows_max = GRANT.unpack_from(message, HEADER.size)
        route = self._route_of(route_id)
        bell = self._bells.get(instance)
        if route is None or bell is None:
            self._tell(GrantReturned(producer=self._producer, instance=instance, generation=generation))
            return
        grant = Grant(route, instance, generation, rows_max, bell)
        self._by_instance[instance] = grant
        route.grants.append(grant)

    def revoke(self, message: memoryview, flags: int) -> None:
        """Take in a REVOKE message; with FLAG_GONE the worker is dead and what was rung is lost."""
        _route, instance, generation, _rows = GRANT.unpack_from(message, HEADER.size)
        is_gone = bool(flags & FLAG_GONE)
        grant = self._by_instance.get(instance)
        # A scheduler that was restarted names a dead worker's grant by a generation of its own.
        if grant is None or (grant.generation != generation and not is_gone):
            return
        grant.revoked = True
        if is_gone:
            self._lose(grant, is_hung=bool(flags & FLAG_HUNG))
        elif grant.is_idle:
            self._return(grant)

    def _lose(self, grant: Grant, *, is_hung: bool) -> None:
        lost_runs, lost_tokens = grant.outstanding, grant.tokens
        grant.outstanding, grant.tokens = [], []
        self._drop(grant)
        for run in lost_runs:
            self._run_lost(run, is_hung=is_hung)
        for token in lost_tokens:
            self._parcel_lost(token, is_hung=is_hung)

    def forget_scheduler(self) -> None:
        """A new scheduler knows of no grants: those whose worker runs are kept to hear of its end, or its death."""
        for grant in self:
            grant.route.grants.clear()
            grant.revoked = True
            if grant.is_idle:
                self._drop(grant)

    # --- what workers say ---

    def runs_ended(self, instance: int) -> None:
        """A worker has answered the rows that it was rung for, if it was."""
        grant = self._by_instance.get(instance)
        if grant is None:
            return
        grant.outstanding = []
        if grant.revoked or grant.route.is_holding:
            self._became_idle(grant)

    def parcel_ended(self, instance: int, token: int) -> None:
        """A worker has given a parcel's last answer."""
        grant = self._by_instance.get(instance)
        if grant is not None and token in grant.tokens:
            grant.tokens.remove(token)
            self._became_idle(grant)

    def _became_idle(self, grant: Grant) -> None:
        """Let go of a grant that was revoked, or let what was held for it go to its worker; unless that has more."""
        if not grant.is_idle:
            return
        if grant.revoked:
            self._return(grant)
        elif grant.route.is_holding:
            grant.route.grant_finished()

    def _return(self, grant: Grant) -> None:
        self._drop(grant)
        self._tell(
            GrantReturned(
                producer=self._producer, instance=grant.instance, generation=grant.generation, batches=grant.batches
            )
        )

    def _tell(self, message: GrantReturned) -> None:
        """Say that a grant is over; a scheduler that does not keep up is told later, for it waits for that."""
        if not self._submit.send_nowait(message):
            asyncio.get_running_loop().call_later(RETRY_S, self._tell, message)

    def _drop(self, grant: Grant) -> None:
        self._by_instance.pop(grant.instance, None)
        if self._bells.get(grant.instance) is not grant.bell:
            grant.bell.close()  # Its instance went while it was granted.
        if grant in grant.route.grants:
            grant.route.grants.remove(grant)
        grant.route.grant_finished()
