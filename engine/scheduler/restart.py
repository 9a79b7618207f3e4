"""A scheduler that follows one that died: what that one sent runs on, and what was lost with it is handed in again.

Workers are asked first (SYNC) what they have; then every producer is asked (RESYNC) for what nobody has.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection

from forebay.engine.scheduler.instances import Instance, InstanceState
from forebay.engine.scheduler.waiting import WaitingParcel
from forebay.ipc.wire import FLAG_UNNAMED, HEADER, OPEN, TOKEN, Kind


class Restart:
    """Who has still to be asked."""

    def __init__(self) -> None:
        #: Of this scheduler, the first one's being 1.
        self.epoch = 0
        #: The supervisor is still announcing what there is.
        self.is_restoring = False
        self._is_synced = True
        self._unasked: set[int] = set()

    def start(self, epoch: int) -> None:
        self.epoch = epoch
        self.is_restoring = epoch > 1
        self._is_synced = epoch <= 1

    def restored(self) -> None:
        """Everything has been announced."""
        self.is_restoring = False

    def add_producer(self, producer: int) -> None:
        """It may have handed in requests to the last scheduler."""
        if not self._is_synced:
            self._unasked.add(producer)

    def remove_producer(self, producer: int) -> None:
        self._unasked.discard(producer)

    def has_asked(self, producer: int) -> bool:
        """Tell whether a producer has been asked, or had nothing to be asked for."""
        return producer not in self._unasked

    def take_due(self, instances: Collection[Instance]) -> set[int]:
        """Return the producers to ask now: those of whose requests none may run unknown to us.

        Usually every worker has finished what the last scheduler had sent before anybody is asked. But a model that
        runs may wait for what was lost (BLS), so its worker says what it has, and others are asked meanwhile.
        """
        if self._is_synced or self.is_restoring:
            return set()
        syncing = [instance for instance in instances if instance.state is InstanceState.SYNCING]
        self._is_synced = not syncing
        waiting: set[int] = set()
        for instance in syncing:
            if instance.unnamed_producers is None:
                return set()
            waiting |= instance.unnamed_producers
        due = self._unasked - waiting
        self._unasked &= waiting
        return due

    def pack_sync(self) -> bytes:
        """Build what a worker is asked with."""
        return HEADER.pack(Kind.SYNC, 0, 0, 0, self.epoch)

    def pack_resync(self, producer: int, instances: Collection[Instance]) -> bytes:
        """Build what a producer is asked with: for whatever is not answered, and does not run either."""
        tokens = [TOKEN.pack(token) for instance in instances for owner, token in instance.open if owner == producer]
        return HEADER.pack(Kind.RESYNC, 0, len(tokens), 0, self.epoch) + b"".join(tokens)


def take_open(instance: Instance, message: bytes, count: int, now_ns: int) -> frozenset[int]:
    """A worker has requests that we did not give it, and has still to answer them.

    Returns:
        Producers that have others with it, which it does not name.
    """
    unnamed: set[int] = set()
    with contextlib.suppress(struct.error):
        for index in range(count):
            producer, flags, token = OPEN.unpack_from(message, HEADER.size + index * OPEN.size)
            if flags & FLAG_UNNAMED:
                unnamed.add(producer)
            else:
                instance.open[producer, token] = WaitingParcel(producer, token, 1, now_ns, b"")
    return frozenset(unnamed)
