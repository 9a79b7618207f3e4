"""The quiet frontend as the supervisor sees it: started when it is wanted, found by connections that others hand over.

Why there is one stands in :mod:`forebay.frontend.http.relocation`. Connections come through here because only the
supervisor knows who runs at the moment; each is passed on with one message, and what happens on it is nobody's business
here.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable, Sequence

from forebay.engine.supervisor.processes import FrontendRole
from forebay.ipc.frontend_messages import ConnectionMoved, QuietOpen
from forebay.ipc.log import log
from forebay.ipc.messages import Message


class QuietFrontend:
    """Used in the supervisor's event loop only."""

    def __init__(
        self, role: FrontendRole, others: Sequence[FrontendRole], wait_ready: Callable[[int], Awaitable[None]]
    ) -> None:
        """Listen to all of them from now on.

        Args:
            role: the quiet frontend, not started.
            others: those of its protocol that clients connect to.
            wait_ready: waits until the frontend with a number knows all models.
        """
        self.role = role
        self._others = others
        self._wait_ready = wait_ready
        self._turns = itertools.count()
        self._is_open = False
        self._opening: asyncio.Task[None] | None = None
        role.serve()
        role.ready.add_done_callback(_note_failed_start)
        role.on_presence = self._presence_changed
        role.on_connection_moved = self._send_back
        for other in others:
            other.greetings = self._greetings
            other.on_quiet_wanted = role.start_when_possible
            other.on_connection_moved = functools.partial(self._take, other)

    def _greetings(self) -> tuple[Message, ...]:
        return (QuietOpen(is_open=True),) if self._is_open else ()

    def _presence_changed(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self.role.is_up:
            self._opening = asyncio.create_task(self._open())
        elif self._is_open:
            self._tell_open(is_open=False)

    async def _open(self) -> None:
        await self._wait_ready(self.role.number)
        self._tell_open(is_open=True)

    def _tell_open(self, *, is_open: bool) -> None:
        self._is_open = is_open
        for other in self._others:
            if other.is_up and other.child is not None:
                other.child.send(QuietOpen(is_open=is_open))

    def _take(self, sender: FrontendRole, fd: int) -> None:
        self._pass_on(fd, (self.role, sender))

    def _send_back(self, fd: int) -> None:
        turn = next(self._turns) % len(self._others)
        self._pass_on(fd, (*self._others[turn:], *self._others[:turn], self.role))

    def _pass_on(self, fd: int, roles: Sequence[FrontendRole]) -> None:
        """Give a connection to the first of them that runs and takes it at once."""
        for role in roles:
            if role.is_up and role.child is not None and role.child.send_nowait(ConnectionMoved(), (fd,)):
                return
        log.warning("a client's connection was closed: no HTTP frontend could take it")

    def close(self) -> None:
        """Tell nobody anything any more."""
        if self._opening is not None:
            self._opening.cancel()


def _note_failed_start(ready: asyncio.Future[None]) -> None:
    if not ready.cancelled() and (error := ready.exception()) is not None:
        log.error(f"there is no frontend for connections of quiet models: {error}")
