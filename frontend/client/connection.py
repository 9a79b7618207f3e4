"""A client's end of the engine: hands requests over and takes the answers. Used by any number of threads.

One lock guards all books: what is free (:mod:`forebay.client.memory`), what is in flight
(:mod:`forebay.client.in_flight`), which workers may be rung (:mod:`forebay.client.grants`). Answers are read by
whichever thread waits (:mod:`forebay.client.completions`).
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

from forebay.client.completions import Completions
from forebay.client.device_pools import DeviceLease, DevicePools
from forebay.client.door import Door
from forebay.client.ensembles import ClientSteps, PendingEnsemble
from forebay.client.errors import EngineGone, ModelChanged, WrongProcess, changed_text
from forebay.client.grants import Grants
from forebay.client.in_flight import InFlight
from forebay.client.memory import Memory
from forebay.client.models import Models
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.pending import BlockLease, Pending, RowsLease
from forebay.client.submissions import Submissions
from forebay.ipc.arena import Arena
from forebay.ipc.ensemble.device_rooms import NO_OUTPUT_ROOMS, DeviceRoom
from forebay.ipc.ensemble.device_tensors import NO_DEVICES, ClientDevices
from forebay.ipc.errors import ArenaFull
from forebay.ipc.messages import TensorPlace

#: Once in so many requests (a power of two, less one), look for workers that were started since.
_LOOK_MASK = 0xFF

_alive: weakref.WeakSet[Connection] = weakref.WeakSet()


class Connection:
    """Everything between :meth:`close` and the door's WELCOME. After :class:`EngineGone` it is of no use any more."""

    def __init__(self, path: str, *, arena_bytes: int = 0, spins: bool = False) -> None:
        """Come in.

        Args:
            path: of the door.
            arena_bytes: 0: as the server likes.
            spins: wait without sleeping.

        Raises:
            NoServer, ServingError: the server is not there or does not let us in.
        """
        self.path = path
        self.pid = os.getpid()
        self._door = Door(path)
        try:
            welcome = self._door.enter(arena_bytes)
        except BaseException:
            self._door.close()
            raise
        self.producer = welcome.producer
        self.arena = Arena(welcome.arena_fd, welcome.arena_bytes, keeps_pages=welcome.keeps_pages)
        os.close(welcome.arena_fd)
        #: uint8 [arena bytes]
        self.view = self.arena.view
        self._lock = threading.Lock()
        self.memory = Memory(self.arena)
        self._grants = Grants()
        self._submissions = Submissions(
            welcome.submissions, welcome.producer, welcome.epoch, self._grants, shares_core=not spins
        )
        self._models = Models(self._door, self.memory, self._grants, self._submissions)
        self._in_flight = InFlight(
            self.arena, self.memory, self._grants, self._submissions, self._models, welcome.outstanding_max
        )
        #: Device memory that the server keeps for us.
        self.device_pools = DevicePools(self._door)
        #: Where callers wait for answers.
        self.completions = Completions(welcome.completions, self._lock, self._in_flight, spins=spins)
        self._is_closed = False
        self._submit_count = 0
        #: This is a forked child; the connection is the parent's.
        self._is_foreign = False
        _alive.add(self)

    # --- models ---

    def open_model(self, name: str, version: int = 0) -> Opened:
        """Return a model; asks the server only once.

        Raises:
            ServingError: there is no such model or version.
        """
        self.check_usable()
        key = (name, version, "")
        with self._lock:
            model = self._models.get(key)
        if model is None:
            found = self._door.open_model(*key)
            with self._lock:
                model = self._models.add(key, found)
        return model

    def list_models(self) -> list[tuple[str, int, str]]:
        """Return (name, version, state) of every version that the server knows."""
        self.check_usable()
        return self._door.list_models()

    def look_for(self, model: Opened) -> None:
        """Follow a model, if the server has told of a newer version or of another place.

        Raises:
            ServingError: it is not served any more.
        """
        self._look_at_door()
        if self._door.gone:
            with self._lock:
                self._models.refresh(model)

    def _look_at_door(self) -> None:
        self._door.look()
        if self._door.news:
            with self._lock:
                self._models.take_news()

    # --- memory ---

    def loan_rows(self, model: Opened, rows: int) -> RowsLease:
        """Return free rows; waits for some if every one is in flight.

        Raises:
            ArenaFull: callers hold so many results that there is no room.
        """
        while True:
            with self._lock:
                try:
                    return self.memory.loan_rows(model, rows)
                except ArenaFull:
                    if not self.in_flight:
                        raise
            self.completions.wait_any()

    def loan_rows_now(self, model: Opened, rows: int) -> RowsLease | None:
        """Return free rows of the slabs that the model has; None: there are none."""
        with self._lock:
            return None if self._is_closed else self.memory.loan_free_rows(model, rows)

    def loan_block(self, byte_size: int) -> BlockLease:
        """Return a block; waits for one if requests in flight hold the arena.

        Raises:
            ArenaFull: callers hold so many results that there is no room.
        """
        while True:
            with self._lock:
                try:
                    return self.memory.loan_block(byte_size)
                except ArenaFull:
                    if not self.in_flight:
                        raise
            self.completions.wait_any()

    def loan_device_block(self, device_id: int, byte_size: int) -> DeviceLease | None:
        """Return a block of device memory of the server's; None: there is none, or not yet, or no room in it."""
        self._look_at_door()
        with self._lock:
            return self.device_pools.take(device_id, byte_size)

    def close_memory(self, number: int, device_id: int) -> None:
        """Have all workers close device memory that this process has exported.

        Raises:
            Unavailable: one has it open still; ask again.
            EngineGone: there is no server to ask.
        """
        self._door.close_memory(number, device_id)

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena in use, slabs as a whole."""
        with self._lock:
            return self.memory.used_bytes()

    # --- requests ---

    def check_usable(self) -> None:
        """Raise what is wrong with this connection, if anything is."""
        if self._is_foreign:
            raise WrongProcess(
                f"this connection belongs to process {self.pid}, which forked this one; call connect() here"
            )
        if (failure := self._in_flight.failure) is not None:
            raise EngineGone(failure.text)

    def submit(self, pending: Pending) -> None:
        """Hand over a request whose rows or blocks are filled."""
        self._make_way(pending.model)
        with self._lock:
            self.check_usable()
            self._check_edition(pending)
            if isinstance(pending, PendingEnsemble):
                pending.start()
            else:
                pending.enqueue_ns = time.monotonic_ns()
                self._in_flight.submit(pending)

    def submit_group(self, pendings: Sequence[Pending], whole: RowsLease) -> None:
        """Hand over requests of equal form that fill the rows of a lease."""
        self._make_way(pendings[0].model, len(pendings))
        with self._lock:
            self.check_usable()
            now_ns = time.monotonic_ns()
            for pending in pendings:
                self._check_edition(pending)
                pending.enqueue_ns = now_ns
            self._in_flight.submit_group(pendings, whole)

    def ensemble_request(
        self,
        model: Opened,
        inputs: Sequence[tuple[TensorPlace, BlockLease]],
        rows: int,
        options: Options,
        output_devices: ClientDevices = NO_DEVICES,
        output_rooms: Mapping[str, DeviceRoom] = NO_OUTPUT_ROOMS,
    ) -> PendingEnsemble:
        """Return a request to an ensemble, to be submitted.

        Args:
            output_devices: outputs that may be in the memory of GPUs.
            output_rooms: where there, if it is this process's: leases.
        """
        return PendingEnsemble(self._steps(model, options, output_devices, output_rooms), model, inputs, rows)

    def device_inputs(self, model: Opened, options: Options) -> dict[str, int]:
        """Return the inputs of an ensemble that steps take in the memory of one GPU each, and that GPU."""
        with self._lock:
            return self._steps(model, options).device_inputs()

    def _steps(
        self,
        model: Opened,
        options: Options,
        output_devices: ClientDevices = NO_DEVICES,
        output_rooms: Mapping[str, DeviceRoom] = NO_OUTPUT_ROOMS,
    ) -> ClientSteps:
        return ClientSteps(
            model,
            self._in_flight,
            self._models,
            self.memory,
            self.device_pools,
            options,
            output_devices=output_devices,
            output_rooms=output_rooms,
        )

    @staticmethod
    def _check_edition(pending: Pending) -> None:
        if pending.edition != pending.model.edition:
            raise ModelChanged(changed_text(pending.model.name))

    def _make_way(self, model: Opened, requests: int = 1) -> None:
        """Wait until so many more requests may be in flight, and see what has come in the meantime."""
        in_flight = self._in_flight
        if model.ensemble is not None:
            # Nobody but the door tells that an ensemble was loaded anew.
            self._look_at_door()
            self.completions.read_nowait()
        elif not model.grants and not in_flight.count and model.rings:
            # A grant follows the answer that earned it. Going to the scheduler without having seen it would end it.
            # Whoever has several in flight has not earned one.
            self.completions.read_nowait()
        while in_flight.count + requests > in_flight.count_max:
            self.completions.wait_any()
        self._submit_count += 1
        if not self._submit_count & _LOOK_MASK:
            self._look_at_door()
        if self._door.gone:
            with self._lock:
                self._models.refresh(model)

    def next_token(self) -> int:
        return self._in_flight.next_token()

    def cancel(self, pending: Pending) -> None:
        """Nobody waits for the request any more; what it lives in comes back when the engine has let go of it."""
        with self._lock:
            self._cancel(pending)

    def abandon(self, pending: Pending) -> None:
        """Cancel, and let whoever waits for the request go at once instead of with its last answer."""
        with self._lock:
            if not pending.is_done:
                self._cancel(pending)
            if not pending.is_done:
                pending.abandon()

    def _cancel(self, pending: Pending) -> None:
        if isinstance(pending, PendingEnsemble):
            pending.cancel()
        else:
            self._in_flight.cancel(pending)

    @property
    def in_flight(self) -> int:
        """Requests handed over and not answered."""
        return self._in_flight.count

    @property
    def is_crowded(self) -> bool:
        """True if submitting would have to wait for answers first."""
        return self.in_flight >= self.in_flight_max

    @property
    def in_flight_max(self) -> int:
        """How many requests may be in flight."""
        return self._in_flight.count_max

    @property
    def grant_count(self) -> int:
        """How many workers may be rung directly at the moment."""
        return len(self._grants)

    # --- the end ---

    @property
    def is_broken(self) -> bool:
        return self._in_flight.failure is not None

    @property
    def has_server_ended(self) -> bool:
        """True if the server's process is no more, and its workers with it."""
        return self._door.has_server_ended

    def close(self) -> None:
        """Leave: the server takes everything back. Arrays that still look into the arena stay readable."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._in_flight.broken("the connection was closed")
            self.completions.shutdown()
            self._close_sockets()
            self.memory.close()
        _alive.discard(self)

    def leave_to_parent(self) -> None:
        """This process was forked: the connection is the parent's, which must be able to end it."""
        self._is_foreign = True
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._door.close()
        self.completions.close()
        self._submissions.close()
        for model in self._models:
            model.close()


def _leave_to_parent() -> None:
    """In a forked child. No locks: they may be held."""
    for connection in list(_alive):
        connection.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)
