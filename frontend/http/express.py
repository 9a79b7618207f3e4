"""Requests of quiet models pass those of a crowded one within a turn of the event loop.

A turn takes every request that has arrived and gives every answer that has come; with many connections to one model
that is a millisecond, and a request to another model would wait for up to two of them: until it is read, and until its
answer is. So while a model is crowded, every few of its requests and answers the loop looks whether anything else is
waiting: on connections whose last request went to another model, and on the completion doorbell.

A connection is in the express epoll *and* in the event loop's: whoever comes first reads, the other finds nothing.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay.frontend.engine_client import EngineClient
    from forebay.frontend.http.connection import Connection

#: Requests or answers of a crowded model between two looks: about 50 us of work, for 1 us of looking.
_STRIDE = 4
#: Connections that one look serves.
_SERVED_MAX = 8
#: Seconds between two reviews of which connections belong to a crowd and which do not.
_REVIEW_S = 0.05


class Express:
    """Of one event loop."""

    def __init__(self, engine: EngineClient) -> None:
        """Have ``engine`` call us between answers."""
        self._engine = engine
        self._epoll = select.epoll()
        self._epoll.register(engine.completions_fd, select.EPOLLIN)
        self._connections: dict[int, Connection] = {}
        self._steps = 0
        self._is_looking = False
        #: Called every now and then as long as there is a crowd.
        self.on_review: Callable[[], None] | None = None
        self._review_s = 0.0
        #: Connections with requests to a crowded model since the last review; None: nobody wants to know.
        self.crowd: set[Connection] | None = None
        engine.between_answers = self.step

    @property
    def quiet_connections(self) -> Collection[Connection]:
        """Connections whose last request went to a quiet model."""
        return self._connections.values()

    def sort(self, connection: Connection, fd: int, *, is_quiet: bool) -> None:
        """A connection's request went to a quiet model, or to a crowded one: look after it from now on, or not."""
        if self.crowd is not None and not is_quiet:
            self.crowd.add(connection)
        if is_quiet is (fd in self._connections) or fd < 0:
            return
        if is_quiet:
            self._connections[fd] = connection
            self._epoll.register(fd, select.EPOLLIN)
        else:
            self.leave(fd)

    def leave(self, fd: int) -> None:
        """Look after it no more, if it was looked after."""
        if self._connections.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # Where the client has left, the loop has closed it already.
                self._epoll.unregister(fd)

    def step(self) -> None:
        """A request has been taken or answered, and there is a crowd; the scratch buffers are free."""
        self._steps += 1
        if self._steps % _STRIDE == 0 and not self._is_looking:
            self._is_looking = True
            try:
                self._look()
            finally:
                self._is_looking = False
            if time.monotonic() >= self._review_s:
                self._review()

    def _review(self) -> None:
        self._engine.forget_crowds()
        if self.on_review is not None:
            self.on_review()
        if self.crowd is not None:
            self.crowd.clear()
        self._review_s = time.monotonic() + _REVIEW_S

    def _look(self) -> None:
        for fd, _events in self._epoll.poll(0, _SERVED_MAX):
            connection = self._connections.get(fd)
            if connection is not None:
                connection.read_now()
            elif fd == self._engine.completions_fd:
                self._engine.take_answer_now()
