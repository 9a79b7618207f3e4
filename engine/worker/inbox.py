"""The worker's doorbell while a model runs: cancellations and lent blocks are not kept waiting behind the batch.

The worker's loop reads the doorbell between batches. A model that asks during its execution whether a request is
cancelled would otherwise hear of it only afterwards, so :meth:`Inbox.take_signals` reads ahead: signals are handled at
once, batches are kept for the loop. So is a new scheduler's SYNC, which asks for the end of all that came before it;
but it is told at once how things stand, for a model may be waiting for what was lost with the old scheduler.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence

from forebay.ipc.wire import HEADER, MESSAGE_BYTES_MAX, Kind

#: What is handled out of turn; neither starts a batch nor answers one.
_SIGNALS = (Kind.COLLECT, Kind.CANCEL, Kind.CANCEL_ROWS)

#: Those of them that are said again while a batch runs that was read ahead of them.
_CANCELLATIONS = (Kind.CANCEL, Kind.CANCEL_ROWS)

#: Batches that may be read ahead; the scheduler sends at most two.
_KEPT_MAX = 64
#: Cancellations behind them that are remembered, the last ones.
_EARLY_MAX = 1024


class Inbox:
    """Shared by the loop and the model's threads."""

    def __init__(
        self,
        doorbell: socket.socket,
        handle: Callable[[memoryview], None],
        tell_unsynced: Callable[[bytes, Sequence[bytes]], None],
    ) -> None:
        """Read nothing yet.

        Args:
            doorbell: stays the caller's.
            handle: is given whole signals.
            tell_unsynced: is given a SYNC and what was read ahead before it, while the loop stands still.
        """
        self._doorbell = doorbell
        self._handle = handle
        self._tell_unsynced = tell_unsynced
        self._kept: deque[bytes] = deque()
        #: Cancellations that came behind a batch which was read ahead, and may be meant for it.
        self._early: deque[bytes] = deque(maxlen=_EARLY_MAX)
        #: They came during an earlier execution. Each look says them: the batch need not be known at the first one.
        self._is_repeating = False
        self._lock = threading.Lock()
        self._is_executing = False

    @property
    def has_kept(self) -> bool:
        """True if a message that was read ahead waits for the loop."""
        return bool(self._kept)

    def take_kept(self, buffer: bytearray) -> int:
        """Copy the oldest kept message to the start of ``buffer``; returns its size."""
        message = self._kept.popleft()
        buffer[: len(message)] = message
        return len(message)

    @contextlib.contextmanager
    def executing(self) -> Generator[None]:
        """Allow reading ahead while the loop itself does not read."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Allow reading ahead; the loop calls :meth:`end` before it reads again."""
        self._is_repeating = bool(self._early)
        self._is_executing = True

    def end(self) -> None:
        """Reading is the loop's again."""
        # A thread that reads just now finishes first, so that the loop finds what it kept.
        with self._lock:
            self._is_executing = False
            if not self._kept:
                self._early.clear()

    def take_signals(self) -> None:
        """Handle the signals that have arrived, without waiting. Does nothing while the loop reads for itself."""
        if not self._is_executing or not self._lock.acquire(blocking=False):
            return
        signals: list[bytes] = []
        try:
            if self._is_repeating:
                signals += self._early
            while self._is_executing and len(self._kept) < _KEPT_MAX:
                try:
                    message = self._doorbell.recv(MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
                except (BlockingIOError, InterruptedError):
                    break
                if not message:
                    break  # Every sender is gone; the loop will see it too.
                if len(message) >= HEADER.size and message[0] in _SIGNALS:
                    signals.append(message)
                    if self._kept and message[0] in _CANCELLATIONS:
                        self._early.append(message)
                else:
                    ahead = tuple(self._kept)
                    self._kept.append(message)
                    if message[0] == Kind.SYNC:
                        self._tell_unsynced(message, ahead)
        finally:
            self._lock.release()
        for message in signals:
            self._handle(memoryview(message))
